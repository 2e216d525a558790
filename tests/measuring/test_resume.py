"""A measurement that is killed, interrupted or fails goes on to the identical result."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import austeer
from austeer import FileFormatError, Momentum, Pairs, PairsError
from austeer.utils import files
from austeer.utils.interrupt import MeasurementInterrupted
from forking import FORKS, errors_to, may_start_from, start
from naive_momentum import numbered_pairs
from stored_activations import assert_same

may_start_from(__name__)
PAIRS, BLOCK = 60, 4
OPTIONS = {"block_pairs": BLOCK, "batch_tokens": 64, "progress": False}


def work(folder: Path, strategy: str, ready) -> None:
    """Measures slowly, keeps a checkpoint after each block, and goes on from it; a process that is killed."""
    errors_to(folder / "errors")
    torch.set_num_threads(1)
    slow = 0.03 if strategy == "resident" else 0.004
    plain = austeer.forward.capture.LastTokens.run
    austeer.forward.capture.LastTokens.run = lambda *args: (time.sleep(slow), plain(*args))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ready.set()
    momentum = austeer.measure(
        *(model, tokenizer, numbered_pairs(PAIRS)),
        **OPTIONS,
        strategy=strategy,
        checkpoint=folder / f"{strategy}.checkpoint",
        checkpoint_every=BLOCK,
        resume=True,
    )
    momentum.save(folder / f"{strategy}.momentum")


@pytest.fixture(scope="module")
def folder(demo, tiny_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny_of("llama", num_hidden_layers=4).save_pretrained(folder / "model")
    demo[1].save_pretrained(folder / "model")
    return folder


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


@pytest.fixture
def options(tmp_path):
    return OPTIONS | {"checkpoint": tmp_path / "kept", "checkpoint_every": BLOCK}


def at_work(folder, strategy):
    ready = FORKS.Event()
    process = start(work, folder, strategy, ready)
    assert ready.wait(60), (folder / "errors").read_text()
    return process


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_killed_at_random_moments(folder, model, demo, strategy):
    """SIGKILL, again and again, at moments of which many lie in the writing of a checkpoint."""
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    checkpoint, kept = folder / f"{strategy}.checkpoint", 0
    for _ in range(4):
        process = at_work(folder, strategy)
        time.sleep(chance.uniform(0.05, 1.2))
        process.kill()
        process.join()
        kept += checkpoint.exists()
    process = at_work(folder, strategy)
    process.join(120)
    assert process.exitcode == 0, (folder / "errors").read_text()
    torch.set_num_threads(1)
    expected = austeer.measure(model, demo[1], numbered_pairs(PAIRS), **OPTIONS, strategy=strategy)
    assert_same(Momentum.load(folder / f"{strategy}.momentum"), expected)
    print("checkpoints found:", kept)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(folder, number):
    checkpoint = folder / "resident.checkpoint"
    checkpoint.unlink(missing_ok=True)
    process = at_work(folder, "resident")
    while not checkpoint.exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 1
    assert re.search(r"MeasurementInterrupted: .*\d+ pairs.*resume", (folder / "errors").read_text())
    assert checkpoint.exists()


def test_an_interruption_keeps_every_whole_block(model, demo, tmp_path, monkeypatch):
    checkpoint, pairs = tmp_path / "kept", numbered_pairs(PAIRS)
    expected = austeer.measure(model, demo[1], pairs, **OPTIONS)
    plain, count = austeer.forward.capture.LastTokens.run, 0

    def run(*args):
        nonlocal count
        count += 1
        if count == 20:
            os.kill(os.getpid(), signal.SIGINT)
        plain(*args)

    monkeypatch.setattr(austeer.forward.capture.LastTokens, "run", run)
    with pytest.raises(MeasurementInterrupted, match=rf"\d+ pairs.*{checkpoint}"):
        austeer.measure(model, demo[1], pairs, **OPTIONS, checkpoint=checkpoint)  # not one checkpoint was due by then
    monkeypatch.undo()
    found = austeer.measure(model, demo[1], pairs, **OPTIONS, checkpoint=checkpoint, resume=True)
    assert found.report.resumed >= BLOCK and found.report.resumed + found.report.pairs == PAIRS
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": ["ffn"]}, r"sites \['attention', 'ffn'\].*\['ffn'\]"),
        ({"layers": [0, 1]}, r"layers \[0, 1, 2, 3\].*\[0, 1\]"),
        ({"block_pairs": 5}, "block_pairs.*4.*5"),
        ({"max_length": 7}, "max_length.*512.*7"),
        ({"strategy": "layerwise"}, "strategy.*'resident'.*'layerwise'"),
    ],
)
def test_the_checkpoint_of_another_run(model, demo, options, change, message):
    pairs = numbered_pairs(12)
    austeer.measure(model, demo[1], pairs, **options)
    with pytest.raises(FileFormatError, match=message):
        austeer.measure(model, demo[1], pairs, **(options | {"resume": True} | change))
    with pytest.raises(FileFormatError, match=r"kept.*earlier run"):
        austeer.measure(model, demo[1], pairs, **options)


def test_other_pairs_than_were_counted(model, demo, options):
    pairs = list(numbered_pairs(12))
    austeer.measure(model, demo[1], Pairs.of(pairs[:8]), **options)
    changed = Pairs.of([pairs[1], pairs[0], *pairs[2:]])
    with pytest.raises(PairsError, match=r"other pairs.*8"):
        austeer.measure(model, demo[1], changed, **options, resume=True)
    longer = austeer.measure(model, demo[1], Pairs.of(pairs), **options, resume=True)  # more of the same may follow
    assert longer.report.resumed == 8 and longer.pairs == 12


def test_other_weights_or_another_tokenizer(model, demo, options):
    pairs = numbered_pairs(12)
    austeer.measure(model, demo[1], pairs, **options)
    with pytest.raises(FileFormatError, match=r"another run.*tokenizer"):
        austeer.measure(model, Words(demo[1]), pairs, **options, resume=True)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.neg_()
    with pytest.raises(FileFormatError, match=r"another run.*weights"):
        austeer.measure(model, demo[1], pairs, **options, resume=True)


class Words:
    """Another tokenizer for the same model: it takes texts apart before."""

    def __init__(self, inner):
        self.inner, self.bos_token_id = inner, inner.bos_token_id
        self.eos_token_id, self.eos_token = inner.eos_token_id, inner.eos_token

    def __call__(self, texts, **options):
        return self.inner([text[::-1] for text in texts], **options)


def test_a_finished_layerwise_checkpoint_knows_its_pairs(model, demo, tmp_path):
    pairs = numbered_pairs(12)
    options = OPTIONS | {"strategy": "layerwise", "checkpoint": tmp_path / "kept"}
    found = austeer.measure(model, demo[1], pairs, **options)
    assert_same(austeer.measure(model, demo[1], pairs, **options, resume=True), found)
    swapped = Pairs.of([(pair.prompt, pair.negative, pair.positive) for pair in pairs])
    with pytest.raises(PairsError, match=r"other pairs.*12"):
        austeer.measure(model, demo[1], swapped, **options, resume=True)
    assert not (tmp_path / "kept.hidden").exists()


def test_another_number_of_processes(model, demo, tmp_path, options):
    austeer.measure(model, demo[1], numbered_pairs(12), **options)
    (tmp_path / "kept").rename(tmp_path / "kept.1-of-2")
    with pytest.raises(FileFormatError, match=r"kept\.1-of-2.*number"):
        austeer.measure(model, demo[1], numbered_pairs(12), **options, resume=True)


def test_another_batch_size(model, demo, options):
    austeer.measure(model, demo[1], numbered_pairs(12), **options)
    with pytest.raises(FileFormatError, match=r"batch_tokens.*32.*64"):
        austeer.measure(model, demo[1], numbered_pairs(12), **options | {"batch_tokens": 32}, resume=True)
    del options["batch_tokens"]
    assert austeer.measure(model, demo[1], numbered_pairs(12), **options, resume=True).report.batch_tokens == 64


def test_an_error_keeps_every_whole_block(model, demo, tmp_path):
    """Also those since the last checkpoint."""
    good = list(numbered_pairs(12))
    tokenizer, options = demo[1], {"block_pairs": BLOCK, "checkpoint": tmp_path / "kept", "progress": False}

    class Broken(Words):
        def __call__(self, texts, **rest):
            if any(text.startswith("9 ") for text in texts):
                raise RuntimeError("made up")
            return self.inner(texts, **rest)

    with pytest.raises(RuntimeError, match="made up"):
        austeer.measure(model, Broken(tokenizer), Pairs.of(good), **options)
    found = austeer.measure(model, tokenizer, Pairs.of(good), **options, resume=True)
    assert found.report.resumed == 8 and found.pairs == 12


def test_a_full_disk_does_not_stop_a_measurement(model, demo, options, monkeypatch):
    expected = austeer.measure(model, demo[1], numbered_pairs(12), **OPTIONS)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.warns(UserWarning, match="kept.*No space left"):
        found = austeer.measure(model, demo[1], numbered_pairs(12), **options)
    assert_same(found, expected)


def test_resume_needs_a_file_and_a_missing_one_is_a_new_start(model, demo, options):
    with pytest.raises(FileFormatError, match=r"resume.*no checkpoint"):
        austeer.measure(model, demo[1], numbered_pairs(4), resume=True, progress=False)
    assert austeer.measure(model, demo[1], numbered_pairs(4), **options, resume=True).report.resumed == 0
