"""The streaming momentum kernel: in Triton's interpreter, and with ``-m gpu`` on a GPU through the registered op."""

import itertools
import math

import pytest
import torch

import austeer_kernels
from austeer_kernels import NO_PAIR, launch, momentum, momentum_counters, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(1, 1), (1, 65), (63, 65), (65, 63), (130, 64), (0, 5), (5, 0)]


def update(positive, negative, state, pair_offset=0):
    """The registered op on a GPU; the launcher itself on a CPU, where the op is the definition."""
    run = austeer_kernels.momentum_update if positive.device.type == "cuda" else momentum.momentum_update
    run(positive, negative, *state, pair_offset)


def expected(positive, negative, state, pair_offset=0):
    """The definition, on copies of the counters, on the CPU."""
    state = [t.cpu().clone() for t in state]
    reference.momentum_update(positive.cpu(), negative.cpu(), *state, pair_offset)
    return state


def assert_counters(state, wanted, scale=1.0):
    for i in (0, 1, 4):
        assert torch.equal(state[i].cpu(), wanted[i]), f"counter {i} differs"
    for i in (2, 3):  # only the order of summing differs
        torch.testing.assert_close(state[i].cpu(), wanted[i], rtol=1e-13, atol=1e-12 * scale)


def pairs(rows, columns, dtype, device="cpu"):
    positive, negative = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    if rows > 2 and columns:
        negative[rows // 2] = positive[rows // 2]  # a row of ties
    return positive.to(device), negative.to(device)


@pytest.fixture(params=[1, 3])
def splits(request, monkeypatch):
    """Forces the number of row splits (and small blocks, so that the interpreter is quick)."""
    s = launch.Settings(8, 32, block_k=0, num_warps=4, num_stages=2, splits=request.param)
    monkeypatch.setattr(launch, "settings", lambda *_: s)
    return request.param


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_matches_the_definition(seed, device, splits, rows, columns):
    positive, negative = pairs(rows, columns, torch.bfloat16, device)
    state = momentum_counters(columns, device)
    wanted = expected(positive, negative, state)
    update(positive, negative, state)
    assert_counters(state, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_settings(seed, device, dtype):
    positive, negative = pairs(100, 130, dtype, device)
    state = momentum_counters(130, device)
    wanted = expected(positive, negative, state)
    update(positive, negative, state)
    assert_counters(state, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_is_reported_and_not_counted(seed, device, splits, dtype):
    positive, negative = pairs(40, 33, dtype)
    for row, column, value in ((3, 0, math.nan), (30, 0, math.inf), (39, 1, -math.inf), (0, 32, math.nan)):
        positive[row, column] = value
    negative[5, 1], negative[17, 2], negative[20, 3] = math.nan, math.inf, -math.inf
    positive[17, 2] = math.inf  # a pair of equal infinities is not a tie
    positive, negative = positive.to(device), negative.to(device)
    state = momentum_counters(33, device)
    wanted = expected(positive, negative, state, 1000)
    update(positive, negative, state, 1000)
    assert_counters(state, wanted)
    assert state[4].tolist()[:5] == [1003, 1005, 1017, 1020, NO_PAIR] and state[4][32] == 1000
    update(positive, negative, state, 2000)
    assert state[4].tolist()[:5] == [1003, 1005, 1017, 1020, NO_PAIR], "a later pair replaced an earlier one"


def test_counts_past_32_bits(seed, device, splits):
    positive, negative = pairs(20, 3, torch.float32, device)
    state = momentum_counters(3, device)
    for t in state[:4]:
        t.fill_(2**40)
    wanted = expected(positive, negative, state, 2**41)
    update(positive, negative, state, 2**41)
    assert_counters(state, wanted, scale=2.0**40)


def test_difference_is_taken_in_float64(device, splits):
    positive = torch.full((9, 1), 1.0, device=device)
    negative = torch.full((9, 1), 2.0**-40, device=device)
    state = momentum_counters(1, device)
    update(positive, negative, state)
    assert state[2].item() == 9 * (1.0 - 2.0**-40)


def test_rows_may_be_strided(seed, device, splits):
    wide, other = pairs(66, 80, torch.bfloat16, device)
    positive, negative = wide[::2, 5:70], other[1::2, 3:68]
    state = momentum_counters(65, device)
    wanted = expected(positive, negative, state)
    update(positive, negative, state)
    assert_counters(state, wanted)


@pytest.mark.gpu
def test_repeats_bit_for_bit(seed, splits):
    positive, negative = pairs(2000, 400, torch.float32, "cuda")
    first, second = momentum_counters(400, "cuda"), momentum_counters(400, "cuda")
    update(positive, negative, first)
    update(positive, negative, second)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("cuts", [(1,), (7, 7, 33), (0, 47, 48)])
def test_integers_do_not_depend_on_how_the_stream_was_cut(seed, device, splits, cuts):
    positive, negative = pairs(48, 5, torch.float16, device)
    positive[20, 3] = math.nan
    whole, parts = momentum_counters(5, device), momentum_counters(5, device)
    update(positive, negative, whole)
    for start, stop in itertools.pairwise([0, *cuts, 48]):
        update(positive[start:stop], negative[start:stop], parts, start)
    assert_counters(parts, [t.cpu() for t in whole])


@pytest.mark.gpu
def test_in_a_cuda_graph(seed, splits):
    positive, negative = pairs(100, 70, torch.bfloat16, "cuda")
    state = momentum_counters(70, "cuda")
    austeer_kernels.momentum_update(positive, negative, *state)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        austeer_kernels.momentum_update(positive, negative, *state)
    state_before = [t.clone() for t in state]
    fresh = pairs(100, 70, torch.bfloat16, "cuda")
    positive.copy_(fresh[0])
    negative.copy_(fresh[1])
    wanted = expected(positive, negative, state_before)
    graph.replay()
    assert_counters(state, wanted)
