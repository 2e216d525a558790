"""``austeer momentum`` as a user runs it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from austeer import AusteerError, Momentum
from austeer.cli import app
from austeer.measuring.stored.count import momentum_from_activations
from austeer.models.sites import Fingerprint
from stored_activations import LAYERS, assert_counts, assert_same, random_rows, write_blocks, write_plain

BY_HAND = ("--model-type", "llama", "--model-layers", 4, "--name", "by hand", "--layers", "0-1,3")


def run(*arguments):
    """The command in this process; standard output. Errors come as they are."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_from_activations_equals_the_library(tmp_path):
    sides = random_rows(20)
    write_blocks(tmp_path / "a", sides, 8, skip={3})
    out = tmp_path / "kind.momentum"
    text = run("momentum", "from-activations", tmp_path / "a", "--out", out, "--device", "cpu", "--quiet")
    momentum = Momentum.load(out)
    assert_same(momentum, momentum_from_activations(tmp_path / "a", device="cpu"))
    assert_counts(momentum, sides)
    assert (
        "21 pairs on tiny" in text
        and "attention 3 layers x 7 AUs" in text
        and "of equal sides, which count for nothing: 1 pair" in text
    )
    assert re.search(r"20 rows, 0\.00 GB in .* s, .* GB/s; waiting for storage .* s, counting .* s", text)
    assert not (tmp_path / "kind.momentum.checkpoint").exists(), "the result is saved: nothing is left to resume"


def test_json_and_dry_run(tmp_path):
    write_blocks(tmp_path / "a", random_rows(20), 8)
    out = tmp_path / "kind.momentum"
    arguments = ("momentum", "from-activations", tmp_path / "a", "--device", "cpu", "--json")
    needs = json.loads(run(*arguments, "--dry-run"))
    assert needs["rows"] == 20 and needs["columns"] == 36 and needs["bytes"] == 20 * 2 * 36 * 4
    assert not out.exists()
    data = json.loads(run(*arguments, "--out", out))
    assert data["pairs"] == 20 and data["sites"] == {"attention": [3, 7], "ffn": [3, 5]} and data["layers"] == [0, 1, 3]
    assert data["report"]["bytes"] == needs["bytes"]
    text = run("momentum", "from-activations", tmp_path / "a", "--dry-run")
    assert "20 rows x 36 AUs in 3 shards" in text and "memory:" in text and "storage gives" in text


def test_model_by_hand_and_by_config(tmp_path, tiny):
    sides = random_rows(20, torch.bfloat16)
    shard, out = write_plain(tmp_path / "a.safetensors", sides), tmp_path / "m"
    run("momentum", "from-activations", shard, "--out", out, "--chat", *BY_HAND)
    momentum = Momentum.load(out)
    assert momentum.model == Fingerprint("llama", 4, {"attention": 7, "ffn": 5}, "by hand", None)
    assert momentum.layers == LAYERS and momentum.chat_template
    assert_counts(momentum, sides)
    tiny.config.save_pretrained(tmp_path / "model")
    wide = write_plain(tmp_path / "b.safetensors", random_rows(9, shapes={"ffn": (3, 32)}))
    run("momentum", "from-activations", wide, "--out", out, "--force", "--model", tmp_path / "model")
    assert Momentum.load(out).model == Fingerprint("llama", 3, {"ffn": 32}, "model", None)
    with pytest.raises(AusteerError, match=r"'attention': 7.*'attention': 32"):
        run("momentum", "from-activations", shard, "--out", out, "--force", "--model", tmp_path / "model")


def test_merge(tmp_path):
    sides = random_rows(30)
    write_blocks(tmp_path / "a", sides, 10)
    files = [tmp_path / f"{i}.momentum" for i in range(3)]
    for i, file in enumerate(files):
        momentum_from_activations(tmp_path / "a", device="cpu", part=(i, 3)).save(file)
    out = tmp_path / "all.momentum"
    assert "30 pairs on tiny" in run("momentum", "merge", *files, "--out", out)
    assert_counts(Momentum.load(out), sides)
    data = json.loads(run("momentum", "merge", *files[1:], "--out", out, "--force", "--json", "--quiet"))
    assert data["pairs"] == 20 and Momentum.load(out).pairs == 20
    with pytest.raises(AusteerError, match=r"all\.momentum: exists"):
        run("momentum", "merge", *files, "--out", out)
    with pytest.raises(AusteerError, match=f"{files[0]}.*same"):
        run("momentum", "merge", files[0], files[0], "--out", tmp_path / "new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{plain}", "--out", "{new}"), r"plain\.safetensors.*model"),
        (("{plain}", "--out", "{new}", "--model-type", "llama"), "--model-layers, --name"),
        (("{plain}", "--out", "{new}", "--model", "demo", "--name", "x"), "--name.*--model"),
        (("{plain}", "--out", "{new}", "--model", "{new}"), "new.*config"),
        (("{plain}", "--out", "{new}", *BY_HAND[:-1], "0-2,x"), "--layers.*'x'"),
        (("{plain}", "--out", "{new}", *BY_HAND[:-2]), "3 layers"),
        (("{own}",), "--out.*none"),
        (("{own}", "--out", "{plain}"), r"plain\.safetensors: exists"),
        (("{own}", "--out", "{new}", "--device", "abacus"), "device.*'abacus'"),
    ],
)
def test_bad_input_is_one_message(tmp_path, arguments, message):
    write_blocks(tmp_path / "own", random_rows(8), 4)
    places = {name: tmp_path / name for name in ("own", "new")}
    places["plain"] = write_plain(tmp_path / "plain.safetensors", random_rows(8))
    with pytest.raises(AusteerError, match=message):
        run("momentum", "from-activations", *(str(a).format(**places) for a in arguments))
    assert not places["new"].exists()


INTERRUPTED = """
import os, signal
from austeer.measuring.stored.chunks import Chunks
from austeer.cli import main
read = Chunks.read
def interrupted(*arguments):
    for number, chunk in enumerate(read(*arguments), 1):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        yield chunk
Chunks.read = interrupted
main()
"""


def test_an_interrupted_process_goes_on(tmp_path):
    """130 and how to go on for Ctrl-C; --resume ends it."""
    out = tmp_path / "m"
    write_blocks(tmp_path / "b", random_rows(40), 8)
    arguments = ("from-activations", tmp_path / "b", "--out", out, "--device", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "momentum", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 130 and not out.exists()
    assert re.match(f"interrupted.* 24 of 40 .*{out}.checkpoint.*resume", done.stderr)
    with pytest.raises(AusteerError, match=f"{out}.checkpoint.*resume"):
        run("momentum", *arguments)
    data = json.loads(run("momentum", *arguments, "--resume", "--json"))
    assert (data["report"]["resumed"], data["report"]["rows"]) == (24, 16)
    assert_same(Momentum.load(out), momentum_from_activations(tmp_path / "b", device="cpu"))
