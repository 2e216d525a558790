"""The sparse in-place kernel: in Triton's interpreter, and with ``-m gpu`` on a GPU through the registered op."""

import math

import pytest
import torch

import austeer_kernels
from austeer_kernels import columns, launch, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES, F64 = [torch.float16, torch.bfloat16, torch.float32], torch.float64


def steer(y, index, gamma, shift, magnitude=False, row_plan=None):
    """The registered op on a GPU; the launcher itself on a CPU, where the op is the definition."""
    if y.device.type == "cuda":
        austeer_kernels.steer_columns_(y, index, gamma, shift, magnitude=magnitude, row_plan=row_plan)
    else:
        columns.steer_columns_(y, index, gamma, shift, magnitude, row_plan)


def case(tokens, width, count, plans, dtype, device, unused=0.0):
    """Random y, a list of distinct columns a plan, and a plan a token (some without one) if there are several plans.

    About the share ``unused`` of the entries is -1, with NaN or infinity beside it.
    """
    y = torch.randn(tokens, width).to(dtype).to(device)
    index = torch.stack([torch.randperm(width)[:count] for _ in range(plans)])
    gamma, shift = torch.randn(plans, count), torch.randn(plans, count)
    free = torch.rand(plans, count) < unused
    index, gamma, shift = (
        index.masked_fill(free, -1),
        gamma.masked_fill(free, math.nan),
        shift.masked_fill(free, math.inf),
    )
    row_plan = torch.randint(-1, plans, (tokens,), dtype=torch.int32).to(device) if plans > 1 else None
    return y, index.to(device), gamma.to(device), shift.to(device), row_plan


def oracles(y, index, gamma, shift, magnitude, row_plan):
    """(plain PyTorch in the dtype, float64), both by the definition."""
    return [reference.steer_columns(y.to(dtype), index, gamma, shift, magnitude, row_plan) for dtype in (y.dtype, F64)]


def untouched(y, index, row_plan):
    """bool [tokens, width]: what no entry of the token's plan names."""
    found = torch.ones(y.shape, dtype=torch.bool)
    plans = [0] * len(y) if row_plan is None else row_plan.tolist()
    for t, plan in enumerate(plans):
        found[t, [c for c in index[plan].tolist() if c >= 0 and plan >= 0]] = False
    return found.to(y.device)


def check(assert_errs_no_more, dtype, plans, magnitude, tokens, width, count, device, unused=0.0):
    y, index, gamma, shift, row_plan = case(tokens, width, count, plans, dtype, device, unused)
    plain, exact = oracles(y, index, gamma, shift, magnitude, row_plan)
    before, others = y.clone(), untouched(y, index, row_plan)
    steer(y, index, gamma, shift, magnitude, row_plan)
    assert_errs_no_more(y, plain, exact)
    assert torch.equal(y[others], before[others]), "an entry that no plan of its token names changed"


@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "width", "count"),
    [(1, 63, 1), (1, 1, 1), (63, 65, 65), (65, 130, 7), (3, 200, 150), (0, 5, 2), (5, 9, 0)],
)
@pytest.mark.parametrize("unused", [0.0, 0.4, 1.0])
def test_matches_the_definition(seed, device, assert_errs_no_more, plans, tokens, width, count, unused):
    check(assert_errs_no_more, torch.bfloat16, plans, False, tokens, width, count, device, unused)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize("magnitude", [False, True])
def test_every_dtype_and_magnitude(seed, device, assert_errs_no_more, dtype, plans, magnitude):
    check(assert_errs_no_more, dtype, plans, magnitude, 17, 65, 33, device, unused=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once_to_nearest_even(seed, device, dtype):
    y, index, gamma, shift, _ = case(40, 64, 64, 1, dtype, device)
    _, exact = oracles(y, index, gamma, shift, False, None)
    steer(y, index, gamma, shift)
    # float32 arithmetic may land on the other side of a tie; a second rounding would differ far more often.
    assert (y != exact.to(dtype)).double().mean().item() <= 0.01
    eps = torch.finfo(dtype).eps
    ties = torch.tensor([[1.0], [1.0 + eps]], device=device).to(dtype)
    half, zero = torch.full((1, 1), eps / 2, device=device), torch.zeros(1, 1, device=device)
    steer(ties, torch.zeros(1, 1, dtype=torch.int64, device=device), zero, half)
    assert ties.tolist() == [[1.0], [1.0 + 2 * eps]]


def test_rows_may_be_strided(seed, device, assert_errs_no_more):
    wide = torch.randn(60, 90).to(torch.bfloat16).to(device)
    _, index, gamma, shift, row_plan = case(30, 65, 20, 2, torch.bfloat16, device)
    before, view = wide.clone(), wide[::2, 7:72]
    plain, exact = oracles(view, index, gamma, shift, False, row_plan)
    steer(view, index, gamma, shift, False, row_plan)
    assert_errs_no_more(view, plain, exact)
    wide[::2, 7:72] = before[::2, 7:72]
    assert torch.equal(wide, before), "something outside the view changed"


def test_one_list_may_be_that_of_all_plans(seed, device, assert_errs_no_more):
    y, index, gamma, shift, row_plan = case(21, 70, 45, 3, torch.float32, device)
    shared = index[1].expand(3, -1)
    assert shared.stride(0) == 0
    plain, exact = oracles(y, shared, gamma, shift, False, row_plan)
    steer(y, shared, gamma, shift, False, row_plan)
    assert_errs_no_more(y, plain, exact)


def test_repeated_columns_add_up_through_coalesce(seed, device, assert_errs_no_more):
    y = torch.randn(5, 20).to(device)
    indices = [torch.tensor([3, 7, 3, 0, 7, 3]), torch.tensor([19, 3])]
    plans = [(index.to(device), *torch.randn(2, len(index), device=device)) for index in indices]
    row_plan = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32, device=device)
    exact = y.double()
    for t, plan in enumerate(row_plan.tolist()):
        if plan >= 0:
            index, gamma, shift = plans[plan]
            exact[t].index_add_(0, index, y[t, index].double() * gamma.double() + shift.double())
    lists = austeer_kernels.coalesce(plans)
    plain = oracles(y, *lists, False, row_plan)[0]
    steer(y, *lists, False, row_plan)
    assert lists[0].tolist() == [[0, 3, 7], [3, 19, -1]]
    assert_errs_no_more(y, plain, exact)


def test_keeps_nonfinite_values_apart(device):
    y = torch.tensor([[math.nan, 1.0, math.inf], [2.0, math.nan, 3.0]], device=device, dtype=torch.bfloat16)
    index, one = torch.tensor([[1]], device=device), torch.ones(1, 1, device=device)
    steer(y, index, one, one)
    assert y[0, 1] == 3.0 and y[1, 1].isnan() and y[1].tolist()[::2] == [2.0, 3.0] and y[0, 2] == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[0], [0, 1, 2, -1, 1]])
def test_what_is_not_steered_keeps_its_bits(device, dtype, rows):
    """NaNs with payloads, infinities and negative zeros: beside steered entries, under unused ones, without a plan."""
    index = torch.tensor([[4, -1, 0], [-1, 2, -1], [-1, -1, -1]], device=device)[: max(rows) + 1]
    gamma = torch.full(index.shape, math.nan, device=device).where(index < 0, 1.0)
    row_plan = torch.tensor(rows, dtype=torch.int32, device=device) if len(rows) > 1 else None
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    y = torch.tensor([math.inf, -0.0, math.nan, -math.inf, 0.0], dtype=dtype).repeat(len(rows), 1)
    y.view(bits)[:, 3] = torch.tensor(math.nan, dtype=dtype).view(bits).item() + 3  # a NaN with a payload
    y = y.to(device)
    others, before = untouched(y, index, row_plan), y.clone()
    steer(y, index, gamma, torch.zeros_like(gamma), False, row_plan)
    assert torch.equal(y.view(bits)[others], before.view(bits)[others])


def test_zero_gamma_and_shift_change_no_bit(seed, device):
    for dtype in DTYPES:
        y, index, gamma, shift, _ = case(9, 33, 20, 1, dtype, device)
        y[0] = 0.0
        before = y.clone()
        steer(y, index, torch.zeros_like(gamma), torch.zeros_like(shift))
        assert torch.equal(y, before)


@pytest.mark.parametrize("block", [(1, 16), (4, 128), (16, 32)])
def test_any_block_shape(seed, device, monkeypatch, assert_errs_no_more, block):
    monkeypatch.setattr(
        launch, "settings", lambda *_: launch.Settings(*block, block_k=0, num_warps=4, num_stages=1, splits=1)
    )
    y, index, gamma, shift, row_plan = case(21, 70, 45, 3, torch.float16, device)
    plain, exact = oracles(y, index, gamma, shift, True, row_plan)
    steer(y, index, gamma, shift, True, row_plan)
    assert_errs_no_more(y, plain, exact)


@pytest.mark.gpu
def test_in_a_cuda_graph(seed, assert_errs_no_more):
    y, index, gamma, shift, row_plan = case(33, 256, 100, 3, torch.bfloat16, "cuda")
    steer(y.clone(), index, gamma, shift, False, row_plan)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steer(y, index, gamma, shift, False, row_plan)
    # New values in the same tensors: no new capture.
    y.normal_()
    gamma.normal_()
    shift.normal_()
    row_plan.random_(-1, 3)
    plain, exact = oracles(y, index, gamma, shift, False, row_plan)
    graph.replay()
    assert_errs_no_more(y, plain, exact)
