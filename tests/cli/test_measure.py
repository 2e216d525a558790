"""`austeer measure` as a user runs it: streams, strategies, checkpoints, the dry run, a full disk."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import austeer
from austeer import FileFormatError, Momentum
from austeer.cli.momentum_file import parse_layers
from naive_momentum import numbered_pairs
from places import ROOT


@pytest.fixture(scope="module")
def place(demo, tiny_of, tmp_path_factory):
    """A folder with a small model and pairs in two files."""
    place = tmp_path_factory.mktemp("measure")
    tiny_of("llama").save_pretrained(place / "model")
    demo[1].save_pretrained(place / "model")
    lines = [json.dumps(vars(pair)) + "\n" for pair in numbered_pairs(21)]
    (place / "all.jsonl").write_text("".join(lines))
    with gzip.open(place / "a.jsonl.gz", "wt") as file:
        file.writelines(lines[:9])
    (place / "b.jsonl").write_text("".join(lines[9:]))
    return place


@pytest.fixture
def austeer_measure(place, command_line):
    return lambda *arguments: command_line("measure", *arguments, "--model", place / "model", "--device", "cpu")


def same_counts(a, b):
    return all(
        a.sites[site].tensors()[what].equal(b.sites[site].tensors()[what])
        for site in b.sites
        for what in ("positive", "negative")
    )


def test_several_files_are_one_stream_and_the_report_is_told(place, austeer_measure, tmp_path):
    code, out, _ = austeer_measure(place / "a.jsonl.gz", place / "b.jsonl", "--out", tmp_path / "m")
    assert code == 0
    assert "21 pairs on model in" in out and "padding" in out and "time: load" in out and "next: austeer inspect" in out
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "the checkpoint goes when the result is there"
    code, out, _ = austeer_measure(place / "all.jsonl", "--out", tmp_path / "whole", "--json")
    report = json.loads(out)["report"]
    assert report["pairs"] == 21 and report["strategy"] == "resident" and report["seconds"]["load"] > 0
    assert same_counts(Momentum.load(tmp_path / "m"), Momentum.load(tmp_path / "whole"))


def test_input_that_fails_leaves_nothing_in_the_way(place, austeer_measure, tmp_path):
    good = (place / "all.jsonl").read_text()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(good + '{"prompt": "a", "positive": " b", "negative": null}\n')
    code, _, error = austeer_measure(pairs, "--out", tmp_path / "m")
    assert code == 2 and "line 22: field 'negative' is null" in error
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    pairs.write_text(good)
    assert austeer_measure(pairs, "--out", tmp_path / "m")[0] == 0


def test_layerwise_from_disk_counts_the_same(place, austeer_measure, tmp_path):
    austeer_measure(place / "all.jsonl", "--out", tmp_path / "m", "--layers", "0-1")
    code, out, _ = austeer_measure(
        *(place / "all.jsonl", "--out", tmp_path / "n", "--layers", "0,1", "--strategy", "layerwise", "--json")
    )
    data = json.loads(out)
    assert code == 0 and data["layers"] == [0, 1] and data["report"]["strategy"] == "layerwise"
    layer = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(place / "model").model.layers[0].parameters()) * 4
    vocabulary = json.loads((place / "model" / "config.json").read_text())["vocab_size"]
    # The layers asked for, the embedding, the last norm; each once.
    assert 0 <= data["report"]["weights_read"] - (2 * layer + vocabulary * 32 * 4) <= 32 * 4
    assert same_counts(Momentum.load(tmp_path / "n"), Momentum.load(tmp_path / "m"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "n"], "hidden states and checkpoint are gone"


def test_auto_takes_layerwise_where_the_model_does_not_fit(place, austeer_measure, tmp_path, monkeypatch):
    monkeypatch.setattr("austeer.models.load.free_memory", lambda device: 10**6)
    code, out, _ = austeer_measure(place / "all.jsonl", "--out", tmp_path / "m", "--json")
    assert code == 0 and json.loads(out)["report"]["strategy"] == "layerwise"


def test_a_dry_run_needs_no_weights_and_writes_nothing(place, austeer_measure, tmp_path, monkeypatch):
    monkeypatch.setattr("austeer.cli.common.load", None)
    code, out, _ = austeer_measure(place / "all.jsonl", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and found["work"]["pairs"] == 21 and found["strategy"] == "resident"
    code, out, _ = austeer_measure(place / "all.jsonl", "--dry-run", "--out", tmp_path / "m")
    assert code == 0 and "resident" in out and "layerwise" in out and not list(tmp_path.iterdir())


def test_an_interrupted_command_goes_on(place, tmp_path):
    """Ctrl-C in a terminal: exit code 130, one message, and a second run that goes on."""
    program = (
        "import sys, time, austeer.forward.capture as c; plain = c.LastTokens.run\n"
        "def run(*a):\n    time.sleep(0.05); plain(*a)\n"
        "c.LastTokens.run = run\nfrom austeer.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "measure", place / "all.jsonl", "--model", place / "model", "--out"]
    options = [tmp_path / "m", "--device", "cpu", "--checkpoint-every", "1", "--batch-tokens", "16"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # A block is all 21 pairs here, so the second signal comes before the first checkpoint, and the message says so.
    process = subprocess.Popen([*command, *options], env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    time.sleep(1)
    while not handles_signals(process.pid):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in error
    assert "resume" in error and not (tmp_path / "m").exists()
    assert (tmp_path / "m.checkpoint").exists()


def handles_signals(pid: int) -> bool:
    """Whether a process has its own handler for SIGTERM (Python has none by default)."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_resume_without_a_checkpoint_is_noted(place, austeer_measure, tmp_path):
    code, _, error = austeer_measure(place / "all.jsonl", "--out", tmp_path / "m", "--resume")
    assert code == 0 and "no checkpoint" in error


def test_a_checkpoint_that_is_there_is_neither_used_nor_lost(place, austeer_measure, tmp_path):
    from austeer.models.load import load_model

    model, tokenizer = load_model(str(place / "model"), device="cpu")
    pairs, checkpoint = austeer.stream_pairs(place / "all.jsonl"), tmp_path / "m.checkpoint"
    austeer.measure(model, tokenizer, pairs, checkpoint=checkpoint, checkpoint_every=1, progress=False)
    before = checkpoint.read_bytes()
    code, _, error = austeer_measure(place / "all.jsonl", "--out", tmp_path / "m")
    assert code == 2 and str(checkpoint) in error and "resume" in error and checkpoint.read_bytes() == before
    code, out, _ = austeer_measure(place / "all.jsonl", "--out", tmp_path / "m", "--resume", "--json")
    assert code == 0 and json.loads(out)["report"]["resumed"] == 21 and not checkpoint.exists()
    checkpoint.write_bytes(before)
    code, out, _ = austeer_measure(place / "all.jsonl", "--out", tmp_path / "m", "--force", "--json")
    assert code == 0 and json.loads(out)["report"]["resumed"] == 0


def test_nothing_is_removed_but_checkpoints(place, austeer_measure, tmp_path):
    mine = {
        name: tmp_path / name
        for name in ("k", "k.jsonl", "k.0-of-2", "k.hidden", "k.notes", "runX.momentum.checkpoint")
    }
    for name in ("k.hidden", "k.notes"):
        mine[name].mkdir()
        (mine[name] / "mine").write_text("mine")
    for name in ("k.jsonl", "k.0-of-2", "runX.momentum.checkpoint"):
        mine[name].write_text("mine")
    code, _, _ = austeer_measure(place / "all.jsonl", "--out", tmp_path / "k.momentum", "--checkpoint", tmp_path / "k")
    assert code == 0 and (tmp_path / "k.momentum").exists() and not mine["k"].exists()
    code, _, _ = austeer_measure(place / "all.jsonl", "--out", tmp_path / "run[X].momentum", "--force")
    assert code == 0
    for name in ("k.jsonl", "k.0-of-2", "runX.momentum.checkpoint"):
        assert mine[name].read_text() == "mine"
    assert (mine["k.hidden"] / "mine").exists() and (mine["k.notes"] / "mine").exists()


@pytest.mark.parametrize("name", ["out", "pairs", "folder"])
def test_a_checkpoint_has_a_name_of_its_own(place, austeer_measure, tmp_path, name):
    file = {"out": tmp_path / "m", "pairs": place / "all.jsonl", "folder": tmp_path}[name]
    code, _, error = austeer_measure(
        *(place / "all.jsonl", "--out", tmp_path / "m", "--checkpoint", file, "--force"),
    )
    assert code == 2 and re.search(f"checkpoint.*{file}", error) and (place / "all.jsonl").exists()


def test_a_full_disk_at_the_end_saves_elsewhere(place, austeer_measure, tmp_path, monkeypatch):
    plain = Momentum.save

    def save(self, path):
        if Path(path) == tmp_path / "m":
            raise FileFormatError(f"{path}: cannot be written (No space left on device); give another place")
        return plain(self, path)

    monkeypatch.setattr(Momentum, "save", save)
    code, _, error = austeer_measure(place / "all.jsonl", "--out", tmp_path / "m")
    assert code == 2 and "No space left on device" in error
    elsewhere = Path(error.split("The result is whole, in ")[1].split(": move")[0])
    assert Momentum.load(elsewhere).pairs == 21 and (tmp_path / "m.checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{all}", "--out", "{new}", "--layers", "0-x"), "--layers.*'0-x'"),
        (("{all}", "--out", "{new}", "--strategy", "fast"), "strategy.*'fast'"),
        (("{all}",), "--out.*none"),
        (("{all}", "--out", "{new}", "--split", "train"), "split.*'train'"),
    ],
)
def test_bad_input(place, austeer_measure, tmp_path, arguments, message):
    places = {"all": place / "all.jsonl", "new": tmp_path / "new"}
    code, out, error = austeer_measure(*(a.format(**places) for a in arguments))
    assert code == 2 and re.search(message, error) and "Traceback" not in error and not out
    assert not list(tmp_path.iterdir())


def test_layers_as_they_are_typed():
    assert parse_layers("0-2, 7,9-9") == [0, 1, 2, 7, 9] and parse_layers(None) is None
