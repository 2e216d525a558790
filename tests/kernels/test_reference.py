"""The definitions, against numpy, and loops over single numbers in Python's own float64."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from austeer_kernels import NO_PAIR, momentum_counters, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def steer_one(x: float, gamma: float, shift: float, magnitude: bool) -> float:
    return x + gamma * (abs(x) if magnitude else x) + shift


def test_momentum_difference_is_exact_where_float32_would_lose_it():
    positive, negative = torch.tensor([[1.0]]), torch.tensor([[2.0**-40]])
    got = momentum_counters(1)
    reference.momentum_update(positive, negative, *got, 0)
    assert got[2].item() == 1.0 - 2.0**-40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 2100), (33, 1009), (700, 63), (0, 5), (5, 0)])
def test_momentum_over_tiles_equals_numpy(seed, dtype, rows, columns):
    """More rows and columns than a tile has, in pieces that do not divide them."""
    positive, negative = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    negative[rows // 2 : rows // 2 + 2] = positive[rows // 2 : rows // 2 + 2]
    p, n = positive.double().numpy(), negative.double().numpy()
    got = momentum_counters(columns)
    reference.momentum_update(positive, negative, *got, 3)
    assert np.array_equal(got[0], (p > n).sum(0)) and np.array_equal(got[1], (p < n).sum(0))
    m = p.astype(np.longdouble) - n
    scale = np.abs(m).sum(0) + 1e-300
    assert (np.abs(got[2].numpy() - m.sum(0)) <= 1e-14 * scale).all()
    assert np.allclose(got[3], (m * m).sum(0).astype(float), rtol=1e-14, atol=0)
    assert (got[4] == NO_PAIR).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_momentum_of_nonfinite_entries_in_any_tile(seed, dtype):
    rows, columns = 70, 2100
    positive, negative = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    for row, column, value in ((0, 0, math.nan), (69, 2015, math.inf), (15, 2016, -math.inf), (16, 2099, math.nan)):
        positive[row, column] = value
    negative[15, 2016], negative[5, 1015] = -math.inf, math.inf
    p, n = positive.double().numpy(), negative.double().numpy()
    finite = np.isfinite(p) & np.isfinite(n)
    m = np.where(finite, p - np.where(np.isfinite(n), n, 0), 0)
    got = momentum_counters(columns)
    reference.momentum_update(positive, negative, *got, 100)
    assert np.array_equal(got[0], ((p > n) & finite).sum(0)) and np.array_equal(got[1], ((p < n) & finite).sum(0))
    assert np.allclose(got[2], m.sum(0), rtol=1e-12, atol=1e-12) and np.allclose(got[3], (m * m).sum(0), rtol=1e-12)
    where = {0: 100, 1015: 105, 2015: 169, 2016: 115, 2099: 116}
    assert {c: int(got[4][c]) for c in (got[4] != NO_PAIR).nonzero().flatten().tolist()} == where


@pytest.mark.parametrize("dtype", DTYPES)
def test_momentum_tells_neighbouring_numbers_apart(dtype):
    """The smallest difference there is counts, also between denormal numbers and of zeros of both signs."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    pairs = [(tiny, 0.0), (0.0, tiny), (-0.0, 0.0), (1.0, 1.0 - info.eps / 2), (info.max, -info.max)]
    positive, negative = torch.tensor(pairs, dtype=torch.float64).T.to(dtype)
    got = momentum_counters(5)
    reference.momentum_update(positive[None].contiguous(), negative[None].contiguous(), *got, 0)
    assert [got[0].tolist(), got[1].tolist()] == [[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert (got[4] == NO_PAIR).all()


def test_momentum_does_not_depend_on_the_number_of_threads(seed):
    positive, negative = torch.randn(300, 3000), torch.randn(300, 3000)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(momentum_counters(3000))
            reference.momentum_update(positive, negative, *results[-1], 0)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 80), st.integers(1, 1200), st.lists(st.integers(0, 80), max_size=3))
def test_momentum_integers_do_not_depend_on_how_the_rows_were_cut(number, rows, columns, cuts):
    torch.manual_seed(number)
    positive, negative = torch.randn(rows, columns).half(), torch.randn(rows, columns).half()
    positive[number % rows, number % columns] = math.nan
    whole, parts = momentum_counters(columns), momentum_counters(columns)
    reference.momentum_update(positive, negative, *whole, 0)
    for start, stop in itertools.pairwise(sorted({0, rows, *(cut % rows for cut in cuts)})):
        reference.momentum_update(positive[start:stop], negative[start:stop], *parts, start)
    assert all(torch.equal(whole[i], parts[i]) for i in (0, 1, 4))
    assert all(torch.allclose(whole[i], parts[i], rtol=1e-13, atol=1e-12) for i in (2, 3))


def test_momentum_needs_no_memory_of_the_buffers_size(seed):
    """Memory while it runs, over what the buffers take: a few tiles, however many rows and columns there are."""
    program = """
import resource, torch
from austeer_kernels import momentum_counters, reference
positive, negative = torch.ones(2, 100, 200_000).bfloat16()
counters = momentum_counters(200_000)
reference.momentum_update(positive[:, :2000], negative[:, :2000], *(t[:2000] for t in counters), 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reference.momentum_update(positive, negative, *counters, 0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 8e6, "80 MB of buffers, and 160 MB for one float64 copy of either"


#: A plan of its own for some tokens, none for others; one plan for all, with and without unused entries.
LISTS = {
    "rows": ([[4, 1], [1, -1], [-1, -1]], [0, -1, 2, 1, 0]),
    "rows, all used": ([[4, 1], [1, 0], [2, 5]], [0, 1, 2, 1, 0]),
    "one": ([[4, 1]], None),
    "one, unused": ([[-1, 4]], None),
    "none": ([[]], None),
    "rows, none": ([[], []], [0, 1, -1, 1, 0]),
}


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lists", LISTS)
def test_steer_columns_entry_by_entry(seed, lists, dtype, magnitude):
    index, rows = LISTS[lists]
    index = torch.tensor(index, dtype=torch.int64)
    y, (gamma, shift) = torch.randn(5, 6).to(dtype), torch.randn(2, *index.shape)
    gamma[index < 0], shift[index < 0] = math.nan, math.inf
    row_plan = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    exact, named = y.to(torch.float64, copy=True), torch.zeros(5, 6, dtype=torch.bool)
    for t, plan in enumerate(rows or [0] * 5):
        for i, c in enumerate(index[plan].tolist()):
            if plan >= 0 and c >= 0:
                x = y[t, c].item()
                exact[t, c] = steer_one(x, gamma[plan, i].item(), shift[plan, i].item(), magnitude)
                named[t, c] = True
    wide = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
    in_place = y.clone()
    reference.steer_columns_(in_place, index, gamma, shift, magnitude, row_plan)
    for found in (in_place, reference.steer_columns(y, index, gamma, shift, magnitude, row_plan)):
        torch.testing.assert_close(found.double(), exact, rtol=wide, atol=4 * torch.finfo(torch.float32).eps)
        assert torch.equal(found[~named], y[~named]), "an entry that no plan of its token names changed"


@pytest.mark.parametrize("rows", [None, [0, -1, 1, 2]])
@pytest.mark.parametrize("magnitude", [False, True])
def test_the_definition_has_the_formula_s_gradients(seed, rows, magnitude):
    index = torch.tensor([[4, 1, -1], [-1, 0, 5], [-1, -1, -1]])[: 1 if rows is None else 3]
    y = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    gamma, shift = (torch.randn(index.shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    row_plan = None if rows is None else torch.tensor(rows, dtype=torch.int32)

    def steer(*given):
        return reference.steer_columns(given[0], index, *given[1:], magnitude, row_plan)

    assert torch.autograd.gradcheck(steer, (y, gamma, shift))
    steer(y, gamma, shift).sum().backward()
    assert not gamma.grad[index < 0].any() and not shift.grad[index < 0].any()


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_steered_linear_entry_by_entry(seed, prologue, magnitude):
    x, weight, bias = torch.randn(3, 4).double(), torch.randn(5, 4).double(), torch.randn(5).double()
    width = 4 if prologue else 5
    gamma, shift = torch.randn(2, width), torch.randn(2, width)
    row_plan = torch.tensor([1, -1, 0], dtype=torch.int32)
    got = reference.steered_linear(x, weight, bias, gamma, shift, prologue, magnitude, row_plan)

    def steer(value: float, t: int, i: int) -> float:
        plan = row_plan[t].item()
        return value if plan < 0 else steer_one(value, gamma[plan, i].item(), shift[plan, i].item(), magnitude)

    for t in range(3):
        row = [steer(x[t, k].item(), t, k) if prologue else x[t, k].item() for k in range(4)]
        for n in range(5):
            y = sum(a * b for a, b in zip(row, weight[n].tolist())) + bias[n].item()
            assert got[t, n].item() == pytest.approx(y if prologue else steer(y, t, n), rel=1e-12)


def test_steering_linear_input_rounds_to_the_inputs_dtype():
    x, weight = torch.tensor([[1.0]], dtype=torch.bfloat16), torch.tensor([[1.0]], dtype=torch.bfloat16)
    shift = torch.tensor([[2.0**-10]])
    got = reference.steered_linear(x, weight, None, torch.zeros(1, 1), shift, True, False, None)
    assert got.item() == 1.0  # 1 + 2^-10 is no bfloat16


def test_scaling_is_the_papers_formula(seed):
    x, alpha, beta = torch.randn(4, 3), 15.0, torch.tensor([[0.5, -1.0, 0.0]])
    got = reference.steered(x.double(), alpha * beta, torch.zeros(1, 3), magnitude=False)
    torch.testing.assert_close(got, x.double() + alpha * beta.double() * x.double())


def test_steering_is_differentiable(seed):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gamma, shift = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for magnitude in (False, True):
        assert torch.autograd.gradcheck(lambda v, m=magnitude: reference.steered(v, gamma, shift, m), (x,))


def ablate_one(x: list[float], d: dict[int, float], strength: float) -> list[float]:
    """x - strength * d (d . x), in Python's own float64."""
    along = sum(value * x[column] for column, value in d.items())
    return [value - strength * along * d.get(column, 0.0) for column, value in enumerate(x)]


def directions_of_sets(sets: int, width: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and direction of sets of which each has one column less than the one before, of ``most`` entries."""
    index, direction = torch.full((sets, most), -1), torch.zeros(sets, most)
    for number in range(sets):
        count = max(most - number, 0)
        index[number, :count] = torch.randperm(width)[:count]
        direction[number, :count] = torch.nn.functional.normalize(torch.randn(count), dim=0)
    return index, direction


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [1, 7, 65])
def test_ablated_columns_equal_a_loop_in_float64(seed, dtype, most):
    """For each token by its set; the first has all of the width, and one set no column at all."""
    x, strength = torch.randn(9, 65).to(dtype), torch.tensor([1.0, 2.0, -0.5, 0.0, 1.0])
    index, direction = directions_of_sets(5, 65, most)
    index[4], direction[4] = -1, 0.0
    rows = torch.tensor([0, 1, 2, 3, 4, -1, 2, 1, 0], dtype=torch.int32)
    got, in_place = reference.ablate_columns(x, index, direction, strength, rows), x.clone()
    reference.ablate_columns_(in_place, index, direction, strength, rows)
    assert torch.equal(got, in_place) and got.dtype == dtype
    unsteered = [3, 4, 5]  # of strength 0, without columns, without a set
    assert torch.equal(got[unsteered], x[unsteered])
    for token, row in enumerate(rows.tolist()):
        if token in unsteered:
            continue
        d = {c: v for c, v in zip(index[row].tolist(), direction[row].double().tolist()) if c >= 0}
        expected = torch.tensor(ablate_one(x[token].double().tolist(), d, float(strength[row])), dtype=torch.float64)
        wide = torch.finfo(reference.compute_dtype(dtype)).eps * 8 * x[token].double().norm()
        assert ((got[token].double() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps / 2 + wide).all()
        others = [c for c in range(65) if c not in d]
        assert torch.equal(got[token, others], x[token, others])


def test_ablation_of_one_set_for_all_tokens(seed):
    x, (index, direction) = torch.randn(9, 65), directions_of_sets(1, 65, 20)
    strength, rows = torch.tensor([1.0]), torch.zeros(9, dtype=torch.int32)
    got, in_place = reference.ablate_columns(x, index, direction, strength, None), x.clone()
    reference.ablate_columns_(in_place, index, direction, strength, None)
    expected = reference.ablate_columns(x, index, direction, strength, rows)
    assert torch.allclose(got, expected, atol=1e-6) and torch.allclose(in_place, expected, atol=1e-6)
    along = got[:, index[0]].double() @ direction[0].double()
    assert along.abs().max() < 1e-6, "strength 1 removes the direction"


def test_ablation_reads_no_column_that_it_does_not_change(seed):
    """An infinity or NaN beside the direction's columns stays there, and where nothing is ablated everything does."""
    x = torch.randn(4, 6)
    x[:, 2], x[:, 3] = math.inf, math.nan
    index, direction = torch.tensor([[0, 2, 5], [2, 3, -1]]), torch.tensor([[0.6, 0.0, 0.8], [0.6, 0.8, 0.0]])
    got = reference.ablate_columns(
        x, index, direction, torch.tensor([1.0, 0.0]), torch.tensor([0, 1, -1, 0], dtype=torch.int32)
    )
    expected = x.clone()
    for token in (0, 3):
        along = 0.6 * x[token, 0] + 0.8 * x[token, 5]
        expected[token, 0] -= 0.6 * along
        expected[token, 5] -= 0.8 * along
    assert torch.allclose(got, expected, equal_nan=True)


def test_ablation_is_differentiable_and_traced_once(seed):
    """Its gradient is that of the dense formula, and other rows, strengths and directions make no new graph."""
    (index, direction), strength = directions_of_sets(3, 8, 5), torch.tensor([1.0, 0.5, 2.0])
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 1, 2, -1, 0, 1], dtype=torch.int32)
    arguments = (index, direction.double(), strength.double(), rows)
    assert torch.autograd.gradcheck(lambda t: reference.ablate_columns(t, *arguments), x)
    count = CompileCounter()
    compiled = torch.compile(reference.ablate_columns, backend=count, fullgraph=True)
    for _ in range(3):
        with torch.no_grad():
            got = compiled(x.detach(), *arguments)
        assert torch.equal(got, reference.ablate_columns(x.detach(), *arguments))
        arguments = (index, -direction.double(), 2 * arguments[2], rows.roll(1))
    assert count.frame_count == 1
