"""PyTorch's default device is the caller's (``set_default_device("cuda")``): what is made here names its own."""

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import austeer
from austeer.causal import causal_check
from austeer.export.control_vector import write_control_vector
from austeer.forward.timing import decode_times
from austeer.overview.overview import of_momentum, of_plan
from austeer.pairs.pairs import Pairs
from austeer.tasks import Item, Task, evaluate
from austeer.tuning import compare
from dense_formula import OPERATIONS, PATHS, POSSIBLE, SITES, formula_logits, logits, random_plan
from places import ROOT
from searches import NEUTRAL, NOUNS, words

PAIRS = Pairs.of([(f"I think the {noun} is", " good", " bad") for noun in NOUNS[:12]])


@pytest.fixture
def elsewhere():
    """Another default device, of which no tensor can be computed with."""
    with torch.device("meta"):
        yield


def on_cpu(function, *args, **options):
    with torch.device("cpu"):
        return function(*args, **options)


# --- steering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", *PATHS])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_steering(one_lively, elsewhere, operation, mode):
    if operation not in POSSIBLE.get(mode, OPERATIONS):
        pytest.skip("no such path")
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]], device="cpu")
    plan = on_cpu(random_plan, one_lively, ("ffn", "attention"), 25, operation)
    expected = on_cpu(formula_logits, one_lively, {"input_ids": ids}, plan.top(20), 0.5)
    with austeer.steer(one_lively, plan, 2.0, mode=mode) as steering:
        steering.alpha, steering.k = 0.5, 20
        torch.testing.assert_close(logits(one_lively, {"input_ids": ids}), expected, rtol=1e-3, atol=1e-3)
        str(steering.report())
    austeer.steer(one_lively, plan, mode="columns", scope="generation")
    scoped = austeer.steer(one_lively, {"a": plan, "b": plan.top(3)}, scope=(1, 3))
    with scoped, scoped.rows(["b", None]):
        assert logits(one_lively, {"input_ids": ids}).device.type == "cpu"


# --- everything else -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(one_lively, demo):
    return one_lively, demo[1]


@pytest.fixture(scope="module")
def momentum(loaded):
    return austeer.measure(*loaded, PAIRS, SITES, progress=False)


def measuring(loaded, momentum, folder):
    options = {"batch_tokens": 60, "block_pairs": 5, "progress": False}
    found = austeer.measure(*loaded, PAIRS, SITES, save_activations=folder / "stored", **options)
    stored = austeer.momentum_from_activations(folder / "stored", progress=False)
    streamed = austeer.measure(*loaded, PAIRS, SITES, strategy="layerwise", scratch=folder, **options)
    found.save(folder / "one.momentum")
    again = austeer.Momentum.load(folder / "one.momentum")
    for one in (stored, streamed, again):
        for site in SITES:
            assert torch.equal(one.counters(site).positive, momentum.counters(site).positive)
    str(of_momentum(found, "ffn", 9))


def planning(loaded, momentum, folder):
    plan = momentum.select("ffn", max_fdr=0.9) + momentum.select("layer", k=7)
    momentum.select("attention", min_stability=0.01)
    plan.top(3).save_pretrained(folder)
    assert austeer.Plan.from_pretrained(folder).keys() == plan.top(3).keys()
    str(of_plan(plan, None, 3))


def exporting(loaded, momentum, folder):
    plan = momentum.select("ffn", k=9, operation="scale")
    shift = momentum.select("layer", k=90, operation="shift")
    shift = shift.take((shift.layer > 0).nonzero().flatten())
    austeer.export_lora([plan, shift], loaded[0], folder / "lora", lora_bias=True)
    austeer.export_checkpoint(plan, loaded[0], folder / "checkpoint")
    austeer.export_gguf(plan, loaded[0], folder / "plan.gguf", progress=False)
    write_control_vector([(shift, 1.0)], loaded[0], folder / "vector.gguf", False)


def evaluating(loaded, momentum, folder):
    variants = {"a": (momentum.select("ffn", k=9), 2.0)}
    for kind in ("choice", "continuation"):
        evaluate(*loaded, words(4, kind), variants, neutral=NEUTRAL, progress=False)
    numbers = Task("numbers", "numeric", (Item("One and one is", answer=2.0), Item("Two is", answer=2.0)))
    evaluate(*loaded, numbers, variants, neutral=(), max_new_tokens=3, progress=False)


def searching(loaded, momentum, folder):
    options = {"methods": ("momentum", "iti", "sadi", "caa"), "operations": ("shift",), "layers": [1], "timed": False}
    compare(*loaded, words(12), ks=(2,), neutral=NEUTRAL, sites=("attention",), folder=folder, **options)
    decode_times(*loaded, {"plain": nullcontext}, prompt="The soup was", tokens=2, rounds=2)


def checking(loaded, momentum, folder):
    causal_check(*loaded, words(4), momentum, "ffn", n=2, sample=3, progress=False)


def verifying(loaded, momentum, folder):
    plan = austeer.record_replay(*loaded, momentum.select("ffn", k=9), 2.0, prompts=["The soup was"], progress=False)
    assert austeer.verify(plan, *loaded).applied


STAGES = (measuring, planning, exporting, evaluating, searching, checking, verifying)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_each_stage(loaded, momentum, elsewhere, stage, tmp_path, monkeypatch):
    monkeypatch.setattr("austeer.causal.statistics.RESAMPLES", 20)
    stage(loaded, momentum, tmp_path)


# --- in the code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["austeer", "kernels"])
def test_every_tensor_that_is_made_names_its_device(folder):
    makers = {f"torch.{function.__name__}" for function in _device_constructors()}
    found = []
    for file in sorted(Path(ROOT, folder).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or {keyword.arg for keyword in call.keywords} & {"device", None}:
                continue
            if makers & {ast.unparse(part) for part in (call.func, *call.args)}:  # also in a partial
                found.append(f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert not found, "name the device of each:\n" + "\n".join(found)
