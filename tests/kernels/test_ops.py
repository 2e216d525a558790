"""Registration and argument checks: the operations as callers meet them."""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import austeer_kernels
from austeer_kernels import KernelArgumentError, momentum_counters, reference


def column_arguments(device="cpu"):
    row_plan = torch.tensor([0, -1, 1, 0, 1], dtype=torch.int32, device=device)
    index = torch.tensor([[6, 1, 3], [1, -1, 0]], device=device)
    table = [torch.randn(2, 3, device=device) for _ in range(2)]
    return torch.randn(5, 8, device=device), index, *table, row_plan


def linear_arguments(prologue, device="cpu", tokens=5):
    x, weight = torch.randn(tokens, 8, device=device), torch.randn(6, 8, device=device)
    table = [torch.randn(2, 8 if prologue else 6, device=device) for _ in range(2)]
    row_plan = (torch.arange(tokens, device=device) % 3 - 1).int()
    return x, weight, torch.randn(6, device=device), *table, row_plan


# --- registration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_update_passes_opcheck(seed, device, dtype):
    positive, negative = (torch.randn(9, 4, device=device).to(dtype) for _ in range(2))
    torch.library.opcheck(torch.ops.austeer.momentum_update, (positive, negative, *momentum_counters(4, device), 3))


@pytest.mark.parametrize("magnitude", [False, True])
def test_steer_columns_passes_opcheck(seed, device, magnitude):
    *arguments, row_plan = column_arguments(device=device)
    torch.library.opcheck(torch.ops.austeer.steer_columns_, (*arguments, magnitude, row_plan))
    y, index, gamma, shift = arguments
    torch.library.opcheck(torch.ops.austeer.steer_columns_, (y, index[:1], gamma[:1], shift[:1], magnitude, None))


@pytest.mark.parametrize(("prologue", "tokens"), [(False, 5), (True, 5), (False, 70), (True, 70)])
def test_steered_linear_passes_opcheck(seed, device, prologue, tokens):
    x, weight, bias, gamma, shift, row_plan = linear_arguments(prologue, device, tokens)
    op = torch.ops.austeer.steered_linear
    torch.library.opcheck(op, (x, weight, bias, gamma, shift, prologue, True, row_plan))
    torch.library.opcheck(op, (x, weight, None, gamma[:1], shift[:1], prologue, False, None))


def test_on_a_cpu_the_ops_are_the_definitions(seed):
    x, weight, bias, gamma, shift, row_plan = linear_arguments(False)
    got = austeer_kernels.steered_linear(x, weight, bias, gamma, shift, row_plan=row_plan)
    assert torch.equal(got, reference.steered_linear(x, weight, bias, gamma, shift, False, False, row_plan))
    y, index, gamma, shift, row_plan = column_arguments()
    wanted = y.clone()
    reference.steer_columns_(wanted, index, gamma, shift, True, row_plan)
    assert austeer_kernels.steer_columns_(y, index, gamma, shift, magnitude=True, row_plan=row_plan) is y
    assert torch.equal(y, wanted)


# --- torch.compile ----------------------------------------------------------------------------------------------


def every_operation(x, weight, bias, gamma, shift, row_plan, index, column_gamma, column_shift, counters):
    y = austeer_kernels.steered_linear(x * 2, weight, bias, gamma, shift, row_plan=row_plan)
    z = austeer_kernels.steer_columns_(y + 1, index, column_gamma, column_shift, row_plan=row_plan) + 1
    austeer_kernels.momentum_update(y * 2, z * 2, *counters)
    return z


@pytest.mark.parametrize(("backend", "tokens"), [("aot_eager", 5), ("aot_eager", 70), ("inductor", 5)])
def test_new_strengths_and_rows_do_not_recompile(seed, device, backend, tokens):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(every_operation, fullgraph=True, backend=counter)
    found, wanted = momentum_counters(6, device), momentum_counters(6, device)
    for _ in range(3):
        *operands, row_plan = linear_arguments(False, device, tokens)
        row_plan = row_plan[torch.randperm(tokens)]
        index = torch.stack([torch.randperm(6)[:3] for _ in range(2)]).to(device)
        columns = index, torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)
        got = compiled(*operands, row_plan, *columns, found)
        torch.testing.assert_close(got, every_operation(*operands, row_plan, *columns, wanted))
    assert counter.frame_count == 1
    assert found[0].sum() > 0 and all(torch.equal(found[i], wanted[i]) for i in (0, 1, 4))
    assert all(torch.allclose(found[i], wanted[i], rtol=1e-4, atol=1e-4) for i in (2, 3))


# --- argument checks --------------------------------------------------------------------------------------------

ROWS, COLUMNS = 3, 4


def expect_error(operation, arguments, name, found):
    """An error that names the argument and the value found."""
    with pytest.raises(KernelArgumentError, match=f"^{name}: found {re.escape(found)}"):
        operation(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("positive", torch.randn(4), "1 dimensions"),
        ("positive", torch.ones(3, 4, dtype=torch.int64), "torch.int64"),
        ("positive", torch.randn(4, 3).T, "stride 3"),
        ("negative", torch.randn(2, 4), "shape [2, 4]"),
        ("negative", torch.randn(3, 4).half(), "torch.float16"),
        ("negative", torch.randn(4, 3).T, "stride 3"),
        ("delta_sum", torch.zeros(4), "torch.float32"),
        ("delta_square_sum", torch.zeros(8, dtype=torch.float64)[::2], "strides (2,)"),
        ("first_nonfinite", torch.zeros(5).long(), "shape [5]"),
        ("positive_count", torch.zeros(8, dtype=torch.int64)[::2], "strides (2,)"),
        ("negative_count", torch.zeros(4), "torch.float32"),
    ],
)
def test_momentum_update_names_what_does_not_fit(name, value, found):
    names = ("positive_count", "negative_count", "delta_sum", "delta_square_sum", "first_nonfinite")
    arguments = dict(zip(names, momentum_counters(COLUMNS)))
    arguments.update(positive=torch.randn(ROWS, COLUMNS), negative=torch.randn(ROWS, COLUMNS))
    expect_error(austeer_kernels.momentum_update, {**arguments, name: value}, name, found)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("y", torch.randn(5), "1 dimensions"),
        ("y", torch.randn(8, 5).T, "stride 5"),
        ("index", torch.arange(3), "1 dimensions"),
        ("index", torch.arange(6).view(2, 3).int(), "torch.int32"),
        ("index", torch.arange(6).view(3, 2).T, "stride 2"),
        ("index", torch.arange(18).view(2, 9), "9 columns"),
        ("index", torch.arange(9).view(3, 3), "the lists of 3 plans"),
        ("gamma", torch.randn(2, 4), "shape [2, 4]"),
        ("gamma", torch.randn(2, 3).half(), "torch.float16"),
        ("gamma", torch.randn(0, 3), "no plan"),
        ("shift", torch.randn(1, 3), "shape [1, 3]"),
        ("row_plan", None, "none"),
        ("row_plan", torch.zeros(5, dtype=torch.int64), "torch.int64"),
    ],
)
def test_steer_columns_names_what_does_not_fit(name, value, found):
    arguments = dict(zip(("y", "index", "gamma", "shift", "row_plan"), column_arguments()))
    expect_error(austeer_kernels.steer_columns_, {**arguments, name: value}, name, found)


@pytest.mark.parametrize(
    ("prologue", "name", "value", "found"),
    [
        (False, "x", torch.randn(8), "1 dimensions"),
        (False, "weight", torch.randn(6, 7), "shape [6, 7]"),
        (False, "weight", torch.randn(6, 8).half(), "torch.float16"),
        (False, "weight", torch.randn(8, 6).T, "stride 6"),
        (False, "bias", torch.randn(8), "shape [8]"),
        # gamma belongs to the output in the epilogue and to the input in the prologue.
        (False, "gamma", torch.randn(2, 8), "shape [2, 8]"),
        (True, "gamma", torch.randn(2, 6), "shape [2, 6]"),
        (False, "row_plan", torch.zeros(4, dtype=torch.int32), "shape [4]"),
    ],
)
def test_steered_linear_names_what_does_not_fit(prologue, name, value, found):
    arguments = dict(zip(("x", "weight", "bias", "gamma", "shift", "row_plan"), linear_arguments(prologue)))
    expect_error(austeer_kernels.steered_linear, {**arguments, name: value, "prologue": prologue}, name, found)


@pytest.mark.gpu
def test_mixed_devices_are_named():
    arguments = dict(zip(("x", "weight", "bias", "gamma", "shift", "row_plan"), linear_arguments(False)))
    arguments["x"] = arguments["x"].cuda()
    expect_error(austeer_kernels.steered_linear, arguments, "weight", "a tensor on cpu")


# --- coalesce ---------------------------------------------------------------------------------------------------


def test_coalesce_of_nothing():
    index, gamma, shift = austeer_kernels.coalesce([(torch.empty(0).long(), torch.empty(0), torch.empty(0))] * 2)
    assert index.shape == gamma.shape == shift.shape == (2, 0) and index.dtype == torch.int64


def test_coalesce_fills_up_with_what_steers_nothing():
    plans = [(torch.tensor(index), torch.ones(len(index)), -torch.ones(len(index))) for index in ([5, 2, 5], [9])]
    index, gamma, shift = austeer_kernels.coalesce(plans)
    assert index.tolist() == [[2, 5], [9, -1]]
    assert gamma.tolist() == [[1, 2], [1, 0]] and shift.tolist() == [[-1, -2], [-1, 0]]
