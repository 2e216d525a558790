"""Running counters: those of a plain loop, in any number of buffers or layer by layer; what is not finite is found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.measuring.counting import Counting

LAYERS, WIDTH = 3, 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def texts(pairs, seed=0, dtype=torch.float32, layers=LAYERS):
    """Activations with many ties [2 * pairs, layers, width]; text r and text r + pairs are a pair."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2 * pairs, layers, WIDTH, generator=generator) * 2).round().div(2).to(dtype)


def naive(buffer, pairs):
    delta = buffer[:pairs].double() - buffer[pairs : 2 * pairs].double()
    return [(delta > 0).sum(0), (delta < 0).sum(0), delta.sum(0), delta.square().sum(0)]


def assert_counts(counting, expected):
    found = list(counting.counters().tensors().values())
    assert [t.dtype for t in found] == [torch.int64, torch.int64, torch.float64, torch.float64]
    assert all(t.shape == counting.shape for t in found)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99), st.sampled_from(DTYPES))
def test_buffers_add_up(sizes, seed, dtype):
    counting, expected, offset = Counting(LAYERS, WIDTH, "cpu"), None, 0
    for i, pairs in enumerate(sizes):
        buffer = texts(pairs, seed + i, dtype)
        counting.add(buffer, pairs, offset)
        offset += pairs
        part = naive(buffer, pairs)
        expected = part if expected is None else [a + b for a, b in zip(expected, part)]
    assert_counts(counting, expected)
    assert counting.nonfinite() is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 99))
def test_a_half_is_a_count_of_its_own_and_changes_no_total(flags, seed):
    counting, plain, expected = Counting(LAYERS, WIDTH, "cpu"), Counting(LAYERS, WIDTH, "cpu"), None
    for i, inside in enumerate(flags):
        pairs, rows = len(inside), [j for j, flag in enumerate(inside) if flag]
        buffer = texts(pairs, seed + i, dtype=torch.bfloat16)
        counting.add(buffer, pairs, 0, half=torch.tensor(rows, dtype=torch.int64))
        plain.add(buffer, pairs, 0)
        part = naive(torch.cat([buffer[:pairs][rows], buffer[pairs:][rows]]), len(rows))
        expected = part if expected is None else [a + b for a, b in zip(expected, part)]
    for mine, theirs in zip(counting.half_counters().tensors().values(), expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    for mine, theirs in zip(counting.totals, plain.totals):
        assert torch.equal(mine, theirs), "the totals do not change, sums neither, bit for bit"


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_one_layer_at_a_time_is_all_at_once(order):
    buffer, half = texts(9), torch.tensor([0, 3, 4])
    whole, parts = Counting(LAYERS, WIDTH, "cpu"), Counting(LAYERS, WIDTH, "cpu")
    whole.add(buffer, 9, 0, half=half)
    for row in order:
        parts.add(buffer[:, row : row + 1].contiguous(), 9, 0, row, half)
    for mine, theirs in zip([*parts.totals, *parts.half], [*whole.totals, *whole.half]):
        assert torch.equal(mine, theirs) and mine.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_the_first_pair_that_is_not_finite(value, side):
    buffer = texts(6)
    for pair, layer, au in ((4, 0, 1), (3, 2, 4), (3, 2, 3)):
        buffer[pair + 6 * side, layer, au] = value
    counting = Counting(LAYERS, WIDTH, "cpu")
    counting.add(texts(6), 6, 0)
    assert counting.nonfinite() is None
    counting.add(buffer, 6, 100)
    pair, row, au = counting.nonfinite()
    assert (pair, row) == (103, 2) and au in (3, 4)
    counting.add(texts(6), 6, 200)
    assert counting.nonfinite()[0] == 103, "it stays"


def test_one_layer_that_is_not_finite_is_named():
    buffer = texts(6, layers=1)
    buffer[2, 0, 3] = float("nan")
    counting = Counting(LAYERS, WIDTH, "cpu")
    counting.add(buffer, 6, 50, 1)
    assert counting.nonfinite() == (52, 1, 3)


def test_going_on_from_earlier_counters():
    first, second = texts(8, 1), texts(5, 2)
    whole, half, rest = (Counting(LAYERS, WIDTH, "cpu") for _ in range(3))
    rows = torch.tensor([0, 2])
    whole.add(first, 8, 0, half=rows)
    half.add(first, 8, 0, half=rows)
    rest.restore(half.counters(), half.half_counters())
    for counting in (whole, rest):
        counting.add(second, 5, 8, half=rows)
    for mine, theirs in zip([*rest.totals, *rest.half], [*whole.totals, *whole.half]):
        assert torch.equal(mine, theirs) and mine.any(), "sums too, bit for bit"
