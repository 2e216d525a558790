"""The definitions, against loops over single numbers in Python's own float64."""

import math

import pytest
import torch

from austeer_kernels import NO_PAIR, momentum_counters, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def steer_one(x: float, gamma: float, shift: float, magnitude: bool) -> float:
    return x + gamma * (abs(x) if magnitude else x) + shift


@pytest.mark.parametrize("dtype", DTYPES)
def test_momentum_counts_each_pair(seed, dtype):
    positive, negative = torch.randn(7, 5).to(dtype), torch.randn(7, 5).to(dtype)
    positive[2, 0], negative[4, 1], positive[5, 1], negative[6, 2] = math.nan, math.inf, -math.inf, math.nan
    negative[3, 3] = positive[3, 3]  # a tie counts on neither side
    got = momentum_counters(5)
    reference.momentum_update(positive, negative, *got, 10)
    for c in range(5):
        up = down = 0
        total = squares = 0.0
        first = NO_PAIR
        for j in range(7):
            p, n = positive[j, c].item(), negative[j, c].item()
            if not (math.isfinite(p) and math.isfinite(n)):
                first = min(first, 10 + j)
                continue
            up, down = up + (p > n), down + (p < n)
            total, squares = total + (p - n), squares + (p - n) ** 2
        assert [got[0][c].item(), got[1][c].item(), got[4][c].item()] == [up, down, first]
        assert got[2][c].item() == pytest.approx(total, rel=1e-13, abs=1e-13)
        assert got[3][c].item() == pytest.approx(squares, rel=1e-13)
    assert got[4].tolist()[:3] == [12, 14, 16]


def test_momentum_difference_is_exact_where_float32_would_lose_it():
    positive, negative = torch.tensor([[1.0]]), torch.tensor([[2.0**-40]])
    got = momentum_counters(1)
    reference.momentum_update(positive, negative, *got, 0)
    assert got[2].item() == 1.0 - 2.0**-40


def test_momentum_of_no_pairs_changes_nothing():
    got = momentum_counters(3)
    reference.momentum_update(torch.empty(0, 3), torch.empty(0, 3), *got, 0)
    assert all(torch.equal(a, b) for a, b in zip(got, momentum_counters(3)))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steer_columns_entry_by_entry(seed, dtype, magnitude):
    y = torch.randn(4, 6).to(dtype)
    index, gamma, shift = torch.tensor([4, 1]), torch.randn(3, 2), torch.randn(3, 2)
    row_plan = torch.tensor([0, -1, 2, 1], dtype=torch.int32)
    got = y.clone()
    reference.steer_columns_(got, index, gamma, shift, magnitude, row_plan)
    exact = y.double()
    for t, plan in enumerate(row_plan.tolist()):
        for i, c in enumerate(index.tolist()):
            if plan >= 0:
                x = y[t, c].item()
                exact[t, c] = steer_one(x, gamma[plan, i].item(), shift[plan, i].item(), magnitude)
    wide = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
    torch.testing.assert_close(got.double(), exact, rtol=wide, atol=4 * torch.finfo(torch.float32).eps)
    assert torch.equal(got[1], y[1]), "the token without a plan changed"
    others = [c for c in range(6) if c not in index.tolist()]
    assert torch.equal(got[:, others], y[:, others]), "a column that was not selected changed"


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
