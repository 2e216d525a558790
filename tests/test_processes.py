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
from austeer.processes import Processes
from naive_momentum import COUNTS, numbered_pairs

ROOT = Path(__file__).parent.parent
PAIRS, BLOCK = 29, 4  # eight blocks, the last one of a single pair
PLACES = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"), "cpu")
PLACES |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
COUNTED = {"numbered": PAIRS, "few": 3}


def work(folder: Path, task: str) -> None:
    """What each process does."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rank, options = os.environ["RANK"], {}
    pairs = numbered_pairs(COUNTED.get(task, PAIRS))
    if task == "resume":
        options = {"checkpoint": folder / "kept", "checkpoint_every": BLOCK, "resume": True}
    if task == "fails" and rank == "1":
        model.model.layers[1].mlp.down_proj.weight.data[5, 3] = float("nan")
    if task == "disordered" and rank == "1":
        pairs = Pairs.of([*list(pairs)[1:], pairs[0]])
    if task == "mapped":
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map=PLACES, offload_folder=folder / f"offload{rank}"
        )
    momentum = austeer.measure(
        model, tokenizer, pairs, block_pairs=BLOCK, batch_tokens=64, distributed=True, progress=False, **options
    )
    momentum.save(folder / f"{task}.{os.environ['WORLD_SIZE']}.{rank}")
    if rank == "0":
        (folder / f"{task}.json").write_text(json.dumps(momentum.report.to_json()))


def launch(folder: Path, task: str, count: int) -> list[subprocess.CompletedProcess]:
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
            [sys.executable, __file__, str(folder), task],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(count)
    ]
    return [
        subprocess.CompletedProcess([], p.returncode, *out) for p in started for out in [p.communicate(timeout=300)]
    ]


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """A small model on disk, and what one process counts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(demo[1]), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    demo[1].save_pretrained(folder / "model")
    for task, count in COUNTED.items():
        pairs = numbered_pairs(count)
        austeer.measure(model, demo[1], pairs, block_pairs=BLOCK, batch_tokens=64, progress=False).save(folder / task)
    return folder


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


@pytest.mark.parametrize("count", [2, 3])
def test_counts_are_those_of_one_process(folder, count):
    for done in launch(folder, "numbered", count):
        assert done.returncode == 0, done.stderr
    everywhere = [Momentum.load(folder / f"numbered.{count}.{rank}") for rank in range(count)]
    assert 0 < everywhere[0].half_pairs < PAIRS
    for momentum in everywhere:  # every process has the whole
        assert_same(momentum, Momentum.load(folder / "numbered"))
    report = json.loads((folder / "numbered.json").read_text())
    assert report["processes"] == count and report["pairs"] == PAIRS and report["texts"] == 2 * PAIRS


def test_a_process_without_pairs(folder):
    for done in launch(folder, "few", 2):  # one block: nothing is left for the second process
        assert done.returncode == 0, done.stderr
    assert_same(Momentum.load(folder / "few.2.1"), Momentum.load(folder / "few"))


def test_a_device_map_inside_a_process(folder):
    for done in launch(folder, "mapped", 2):
        assert done.returncode == 0, done.stderr
    assert_same(Momentum.load(folder / "mapped.2.0"), Momentum.load(folder / "numbered"))


def test_one_process_fails_and_the_others_do_not_wait_for_it(folder):
    good, bad = launch(folder, "fails", 2)
    assert bad.returncode and re.search("CaptureError: .*'ffn', layer 1, AU 5: .*NaN", bad.stderr)
    assert good.returncode and "another process" in good.stderr
    assert not (folder / "fails.2.0").exists()


def test_processes_that_read_other_pairs_are_refused(folder):
    for done in launch(folder, "disordered", 2):
        assert done.returncode and re.search("process 1 .*other pairs.* process 0", done.stderr)


def test_each_process_has_a_checkpoint_of_its_own(folder):
    for done in launch(folder, "resume", 2):
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in folder.glob("kept*"))
    assert names == ["kept.0-of-2", "kept.1-of-2"]
    for done in launch(folder, "resume", 2):  # everything is counted: nothing is left to run
        assert done.returncode == 0, done.stderr
    assert_same(Momentum.load(folder / "resume.2.0"), Momentum.load(folder / "numbered"))
    report = json.loads((folder / "resume.json").read_text())
    assert report["resumed"] > PAIRS // 2 and report["pairs"] < PAIRS // 2


def test_processes_that_accelerate_does_not_know_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    from accelerate import PartialState

    PartialState()  # of the one process that this is
    with pytest.raises(AusteerError, match=r"4 processes in WORLD_SIZE.* 1 .*accelerate"):
        Processes.launched()


def test_alone_nothing_is_added():
    alone, tensors = Processes(), {"a": torch.tensor([1, 2])}
    assert alone.main and alone.gather(3) == [3] and alone.add(tensors) == tensors


if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), sys.argv[2])
    except AusteerError:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # as a process that dies does, without a farewell to the others
