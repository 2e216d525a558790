"""What the host takes, against a model's eager times that were measured on a GPU."""

import json
from pathlib import Path

import pytest
import torch

from austeer.costs import host
from austeer.costs.host import Host
from austeer.costs.steering import steering_cost
from bench import shapes

GPU = torch.device("cuda")
RESULTS = Path(__file__).parents[2] / "bench/results/nvidia-h200"


def eager_result():
    """The result that the figures of austeer/costs/host.py are from; ``columns`` has been another form since."""
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["kind"], content["environment"]["commit"]) != ("inference", "30a7754"):
            continue
        if content["model"]["name"].startswith(shapes.LLAMA_8B.name) and content["cases"][0]["execution"] == "eager":
            return content
    pytest.skip(f"{RESULTS}: no eager result of {shapes.LLAMA_8B.name} at commit 30a7754")


@pytest.fixture(scope="module")
def measured():
    """The one case of the file, Llama-3.1-8B in eager mode, and what is predicted for it."""
    content = eager_result()
    [case] = content["cases"]
    rates = {name: content["ceilings"][name] for name in ("bandwidth", "flops", "launch")}
    sizes = {name: case[name] for name in ("site", "k", "layers", "batch", "prompt_tokens")}
    context = case["prompt_tokens"] + 1
    execution = {"device": "cuda", "execution": case["execution"], "host_us": host.MODEL}
    return case["variants"], steering_cost(shapes.LLAMA_8B.config(), **sizes, context=context, **rates, **execution)


def test_eager_tokens_and_prompts_are_predicted_within_30_percent(measured):
    variants, cost = measured
    assert variants["unsteered"]["device_seconds"] == pytest.approx(cost.decode.device, rel=0.3)
    assert cost.decode.seconds == cost.decode.host > 5 * cost.decode.device
    for one, of in ((cost.decode, "token"), (cost.prefill, "first_token")):
        assert one.seconds == pytest.approx(variants["unsteered"][of]["seconds"]["median"], rel=0.3)


@pytest.mark.parametrize("way", ["public", "dense hook", "sparse hook", "lora", "fused"])
def test_eager_overheads_are_predicted_within_30_percent(measured, way):
    variants, cost = measured
    found = variants[way]["token"]["ratio"]["median"] - 1
    assert cost.decode.extra[way].overhead == pytest.approx(found, rel=0.3)


def test_fold_adds_nothing(measured):
    variants, cost = measured
    ratio = variants["fold"]["token"]["ratio"]
    assert ratio["low"] <= 1 + cost.decode.extra["fold"].overhead <= ratio["high"]


def test_a_sparse_kernel_is_predicted_within_30_percent(measured):
    """``columns`` was the kernel for every number of tokens then."""
    variants, cost = measured
    added = cost.layers * Host.of(GPU, host.MODEL).site("columns", 1, kernel=True)
    assert added / cost.decode.seconds == pytest.approx(variants["columns"]["token"]["ratio"]["median"] - 1, rel=0.3)


def test_the_run_time_form_is_predicted_as_a_dense_hook(measured):
    extra = measured[1].decode.extra
    assert extra["columns"].overhead == pytest.approx(extra["dense hook"].overhead)
    assert extra["columns"].overhead < extra["public"].overhead


def test_a_way_is_as_slow_as_the_model_is():
    one, other = Host.of(GPU, 10.0), Host.of(GPU, 30.0)
    for way in ("columns", "fused", "public", "lora"):
        for kernel in {False, way in ("columns", "fused")}:
            assert 3 * one.site(way, 2, kernel) == pytest.approx(other.site(way, 2, kernel))
    assert one.site("bias", 0, False) == one.site("fold", 0, False) == 0
    split, whole = one.site("fused", 1, True), one.site("fused", 0, True)
    assert split - whole == pytest.approx(host.KERNEL * 10e-6 / host.MODEL)
