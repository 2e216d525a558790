"""Measuring in several real processes: the counts of one, whatever their number.

This file is also the program that the processes run; they talk over gloo on the CPU.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import austeer
from austeer import AusteerError, Momentum, Pairs
from austeer.measuring.processes import Processes
from naive_momentum import COUNTS, numbered_pairs
from places import ROOT

PAIRS, BLOCK, COUNT = 29, 4, 3  # eight blocks, the last one of a single pair, for three processes
PLACES = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"), "cpu")
PLACES |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
COUNTED = {"numbered": PAIRS, "few": 3}


TASKS = ("numbered", "few", "mapped", "resume", "resumed", "disordered", "fails")


def work(folder: Path) -> None:
    """What each process does: one task after another, each of which leaves its momentum or its error."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rank = os.environ["RANK"]
    for task in TASKS:
        options = {}
        pairs = numbered_pairs(COUNTED.get(task, PAIRS))
        if task in ("resume", "resumed"):
            options = {"checkpoint": folder / "kept", "checkpoint_every": BLOCK, "resume": True}
        if task == "fails" and rank == "1":
            model.model.layers[1].mlp.down_proj.weight.data[5, 3] = float("nan")
        if task == "disordered" and rank == "1":
            pairs = Pairs.of([*list(pairs)[1:], pairs[0]])
        used = model
        if task == "mapped":
            used = AutoModelForCausalLM.from_pretrained(
                folder / "model", device_map=PLACES, offload_folder=folder / f"offload{rank}"
            )
        try:
            momentum = austeer.measure(
                used, tokenizer, pairs, block_pairs=BLOCK, batch_tokens=64, distributed=True, progress=False, **options
            )
        except AusteerError as error:
            (folder / f"{task}.{rank}.error").write_text(f"{type(error).__name__}: {error}")
            continue
        momentum.save(folder / f"{task}.{rank}")
        (folder / f"{task}.{rank}.json").write_text(json.dumps(momentum.report.to_json()))


def launch(folder: Path, count: int) -> list[subprocess.CompletedProcess]:
    """Starts the processes and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(count)
    ]
    return [
        subprocess.CompletedProcess([], p.returncode, *out) for p in started for out in [p.communicate(timeout=500)]
    ]


@pytest.fixture(scope="module")
def folder(demo, tiny_of, tmp_path_factory):
    """A small model on disk, and what one process counts."""
    folder, model = tmp_path_factory.mktemp("processes"), tiny_of("llama")
    model.save_pretrained(folder / "model")
    demo[1].save_pretrained(folder / "model")
    for task, count in COUNTED.items():
        pairs = numbered_pairs(count)
        austeer.measure(model, demo[1], pairs, block_pairs=BLOCK, batch_tokens=64, progress=False).save(folder / task)
    for done in launch(folder, COUNT):
        assert done.returncode == 0, done.stderr
    return folder


def error_of(folder: Path, task: str, rank: int) -> str:
    assert not (folder / f"{task}.{rank}").exists()
    return (folder / f"{task}.{rank}.error").read_text()


def assert_same(found: Momentum, expected: Momentum) -> None:
    assert (found.pairs, found.cut, found.identical) == (expected.pairs, expected.cut, expected.identical)
    assert found.half_pairs == expected.half_pairs
    for mine, theirs in ((found.sites, expected.sites), (found.half, expected.half)):
        for name, counters in theirs.items():
            for what, t in counters.tensors().items():
                if what in COUNTS:
                    assert torch.equal(mine[name].tensors()[what], t)
                else:
                    torch.testing.assert_close(mine[name].tensors()[what], t, rtol=1e-12, atol=1e-12)


def test_counts_are_those_of_one_process(folder):
    everywhere = [Momentum.load(folder / f"numbered.{rank}") for rank in range(COUNT)]
    assert 0 < everywhere[0].half_pairs < PAIRS
    for momentum in everywhere:  # every process has the whole
        assert_same(momentum, Momentum.load(folder / "numbered"))
    report = json.loads((folder / "numbered.0.json").read_text())
    assert report["processes"] == COUNT and report["pairs"] == PAIRS and report["texts"] == 2 * PAIRS


@pytest.mark.parametrize("found, expected", [("few.1", "few"), ("mapped.0", "numbered")])
def test_a_process_without_pairs_and_a_device_map_inside_one(folder, found, expected):
    assert_same(Momentum.load(folder / found), Momentum.load(folder / expected))


def test_one_process_fails_and_the_others_do_not_wait_for_it(folder):
    assert re.search("CaptureError: .*'ffn', layer 1, AU 5: .*NaN", error_of(folder, "fails", 1))
    for rank in (0, 2):
        assert "another process" in error_of(folder, "fails", rank)


def test_processes_that_read_other_pairs_are_refused(folder):
    for rank in range(COUNT):
        assert re.search("process 1 .*other pairs.* process 0", error_of(folder, "disordered", rank))


def test_each_process_has_a_checkpoint_of_its_own(folder):
    names = sorted(path.name for path in folder.glob("kept*"))
    assert names == [f"kept.{rank}-of-{COUNT}" for rank in range(COUNT)]
    for task in ("resume", "resumed"):
        assert_same(Momentum.load(folder / f"{task}.0"), Momentum.load(folder / "numbered"))
    report = json.loads((folder / "resumed.0.json").read_text())  # everything is counted: nothing is left to run
    assert report["resumed"] > PAIRS // 2 and report["pairs"] < PAIRS // 2


def test_processes_that_accelerate_does_not_know_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    from accelerate import PartialState

    PartialState()  # of the one process that this is
    with pytest.raises(AusteerError, match=r"4 processes in WORLD_SIZE.* 1 .*accelerate"):
        Processes.launched()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    os._exit(0)  # as a process that fails does, without a farewell to the others
