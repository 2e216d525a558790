"""What ways to steer do at one site, by hand. Against real forward passes: test_steering.py."""

import itertools
from dataclasses import replace

import pytest
import torch

from austeer.costs.ways import WAYS, automatic, bias, columns, fused, runs_kernel
from austeer.costs.work import Place, Target, Work
from austeer.steering.forms import FEW_ELEMENTS, MANY_COLUMNS
from austeer_kernels import launch

GRAPH = Target("cuda", "graph")


def test_the_sparse_kernel_by_hand():
    place = Place(3, 4096, 10, torch.bfloat16, "scale")
    # 10 values of 2 bytes in and out for each token; an index of 8 and two strengths of 4 bytes for each AU
    expected = Work(3 * 20 + 160, 3 * 20, 3 * 30, 1, 2 * 3 * 10 * 30)
    assert columns(place, GRAPH) == expected
    assert columns(replace(place, operation="push"), GRAPH).operations == 3 * 40
    whole = columns(replace(place, count=4096), GRAPH)
    assert whole.padding == 0, "whole rows are read anyway"


def test_the_fused_kernel_on_a_gpu_is_launched_as_predicted():
    """Against the settings that the kernel takes; in the interpreter's made-up GPU, which can be asked here."""
    interpreter, here = Target("cuda", "graph", "interpreter", "cpu", 4), torch.device("cpu")
    seen = set()
    for tokens, inputs, outputs in itertools.product((1, 8, 64), (64, 4096), (64, 4096)):
        place = Place(tokens, outputs, 4, torch.bfloat16, "scale", projection=(inputs, outputs))
        taken = launch.settings("steered_linear_output", tokens, outputs, inputs, torch.bfloat16, here)
        splits = taken.splits
        work = fused(place, interpreter)
        seen.add(splits > 1)
        assert work.launches == (1 if splits > 1 else 0)
        parts = 4 * tokens * outputs * splits if splits > 1 else 0
        assert (work.read, work.written) == (8 * outputs + parts, parts)
    assert seen == {False, True}, "with and without a split"


@pytest.mark.parametrize("target", [Target("cpu"), Target("cuda")], ids=["cpu", "cuda"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_beyond_its_tokens_fused_is_columns(target, side):
    few = Place(64, 96, 4, torch.bfloat16, "scale", side, projection=(96, 96))
    many = replace(few, tokens=65)
    assert fused(many, target) == columns(many, target) and fused(few, target) != columns(few, target)


def test_columns_in_eager_mode_on_a_gpu():
    """One operation on the whole tensor while it is small or much of it is steered, then the sparse kernel."""
    few = Place(FEW_ELEMENTS["cuda"] // 4096, 4096, 10, torch.bfloat16, "scale")
    many, gpu = replace(few, tokens=few.tokens + 1), Target("cuda")
    wide = replace(many, count=-(-4096 // MANY_COLUMNS["cuda"]))
    assert [runs_kernel("columns", place, gpu) for place in (few, many, wide)] == [False, True, False]
    size = 2 * few.values
    assert columns(few, gpu) == Work(size + 4 * 4096, size, few.values, 1)
    assert columns(replace(few, operation="push"), gpu).launches == 3
    assert columns(many, gpu) == columns(many, GRAPH)


def test_compiled_forms_have_no_launch_of_their_own():
    place = Place(3, 4096, 10, torch.bfloat16, "push")
    for kind in ("cpu", "cuda"):
        assert columns(place, Target(kind, "compile")) == Work(4 * 4096, 0, 3 * 3 * 4096)
        for way in ("dense", "public", "dense hook"):
            work = WAYS[way](place, Target(kind, "compile"))
            assert work.launches == work.written == 0 < work.read <= 4 * 4096


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_bias_by_hand(kind):
    """An input side of 14336 read by a layer of 4096 outputs, and an output side of 4096: they gain 4096 numbers."""
    place = Place(5, 4096, 10, torch.bfloat16, "shift", projection=(14336, 4096))
    expected = Work(2 * 4096)
    for site in (place, replace(place, side="input", width=14336)):
        assert bias(site, Target(kind)) == expected
        assert bias(replace(site, bias=True), Target(kind)) == Work(), "it is added already"


def test_auto_in_a_graph_fuses_up_to_the_tokens_of_the_device_s_table():
    place = Place(16, 4096, 10, torch.bfloat16, "push", projection=(14336, 4096))
    h100, other = GRAPH, replace(GRAPH, architecture="sm_80", name="NVIDIA A100-SXM4-80GB")
    assert launch.limit_for("steered_linear_output", 4096, 14336, torch.bfloat16, h100.architecture, h100.name) == 16
    both = ("columns", "fused")
    assert automatic(both, [place, place], h100) == "fused"
    for ways, places, target in (
        (("columns",), [place], h100),
        (both, [place, replace(place, tokens=17)], h100),
        (both, [replace(place, projection=(512, 4096))], h100),
        (both, [place], other),
        (both, [place], replace(h100, execution="eager")),
        (both, [place], replace(h100, execution="compile")),
    ):
        assert automatic(ways, places, target) == "columns"
    assert automatic(("fold", *both), [replace(place, operation="scale")], h100) == "fold"
    assert automatic(("bias", *both), [replace(place, operation="shift")], h100) == "bias"
