"""Registration and argument checks: the operations as callers meet them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import austeer_kernels
from austeer_kernels import KernelArgumentError, momentum_counters, reference


def column_arguments(dtype=torch.float32, device="cpu"):
    row_plan = torch.tensor([0, -1, 1, 0, 1], dtype=torch.int32, device=device)
    index = torch.tensor([6, 1, 3], device=device)
    table = [torch.randn(2, 3, device=device) for _ in range(2)]
    return torch.randn(5, 8, device=device).to(dtype), index, *table, row_plan


def linear_arguments(prologue, dtype=torch.float32, device="cpu"):
    x, weight = torch.randn(5, 8, device=device).to(dtype), torch.randn(6, 8, device=device).to(dtype)
    table = [torch.randn(2, 8 if prologue else 6, device=device) for _ in range(2)]
    row_plan = torch.tensor([0, -1, 1, 0, 1], dtype=torch.int32, device=device)
    return x, weight, torch.randn(6, device=device).to(dtype), *table, row_plan


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
    torch.library.opcheck(torch.ops.austeer.steer_columns_, (y, index, gamma[:1], shift[:1], magnitude, None))


@pytest.mark.parametrize("prologue", [False, True])
def test_steered_linear_passes_opcheck(seed, device, prologue):
    x, weight, bias, gamma, shift, row_plan = linear_arguments(prologue, device=device)
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


def steer_and_project(x, weight, bias, gamma, shift, index, column_gamma, column_shift, row_plan):
    y = austeer_kernels.steered_linear(x * 2, weight, bias, gamma, shift, row_plan=row_plan)
    return austeer_kernels.steer_columns_(y, index, column_gamma, column_shift, row_plan=row_plan) + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_new_strengths_and_rows_do_not_recompile(seed, device, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(steer_and_project, fullgraph=True, backend=counter)
    for _ in range(3):
        x, weight, bias, gamma, shift, _ = linear_arguments(False, device=device)
        row_plan = torch.randint(-1, 2, (5,), dtype=torch.int32, device=device)
        index = torch.randperm(6)[:3].to(device)
        column_gamma, column_shift = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)
        arguments = (x, weight, bias, gamma, shift, index, column_gamma, column_shift, row_plan)
        torch.testing.assert_close(compiled(*arguments), steer_and_project(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_momentum_update_compiles(seed, device, backend):
    torch._dynamo.reset()

    def measure(hidden, state):
        austeer_kernels.momentum_update(hidden[0] * 2, hidden[1] * 2, *state)
        return hidden.sum()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(measure, fullgraph=True, backend=counter)
    state, wanted = momentum_counters(4, device), momentum_counters(4, device)
    for _ in range(3):
        hidden = torch.randn(2, 9, 4, device=device)
        compiled(hidden, state)
        measure(hidden, wanted)
    assert counter.frame_count == 1
    assert all(torch.equal(a, b) for a, b in zip(state, wanted))


# --- argument checks --------------------------------------------------------------------------------------------

ROWS, COLUMNS = 3, 4


def momentum_error(**changes) -> str:
    names = ("positive_count", "negative_count", "delta_sum", "delta_square_sum", "first_nonfinite")
    arguments = dict(zip(names, momentum_counters(COLUMNS)))
    arguments.update(positive=torch.randn(ROWS, COLUMNS), negative=torch.randn(ROWS, COLUMNS))
    with pytest.raises(KernelArgumentError) as caught:
        austeer_kernels.momentum_update(**{**arguments, **changes})
    return str(caught.value)


def test_momentum_update_names_what_does_not_fit():
    assert momentum_error(positive=torch.randn(4)) == "positive: found 1 dimensions, expected [pairs, columns]"
    assert momentum_error(negative=torch.randn(2, 4)) == "negative: found shape [2, 4], expected [3, 4]"
    assert "found torch.int64" in momentum_error(positive=torch.ones(3, 4, dtype=torch.int64))
    assert "negative: found torch.float16" in momentum_error(negative=torch.randn(3, 4).half())
    assert momentum_error(delta_sum=torch.zeros(4)) == "delta_sum: found torch.float32, expected torch.float64"
    assert "first_nonfinite: found shape [5], expected [4]" in momentum_error(first_nonfinite=torch.zeros(5).long())
    assert "stride 3 over columns, expected stride 1" in momentum_error(positive=torch.randn(4, 3).T)
    strided = torch.zeros(8, dtype=torch.int64)[::2]
    assert "positive_count: found strides (2,)" in momentum_error(positive_count=strided)


def columns_error(**changes) -> str:
    arguments = dict(zip(("y", "index", "gamma", "shift", "row_plan"), column_arguments()))
    with pytest.raises(KernelArgumentError) as caught:
        austeer_kernels.steer_columns_(**{**arguments, **changes})
    return str(caught.value)


def test_steer_columns_names_what_does_not_fit():
    assert columns_error(y=torch.randn(5)) == "y: found 1 dimensions, expected [tokens, width]"
    assert "stride 5 over columns" in columns_error(y=torch.randn(8, 5).T)
    assert "index: found torch.int32, expected torch.int64" in columns_error(index=torch.arange(3).int())
    assert "index: found strides (2,)" in columns_error(index=torch.arange(6)[::2])
    assert "index: found 9 columns, expected at most 8" in columns_error(index=torch.arange(9))
    assert columns_error(gamma=torch.randn(2, 4)) == "gamma: found shape [2, 4], expected [2, 3]"
    assert columns_error(shift=torch.randn(1, 3)) == "shift: found shape [1, 3], expected [2, 3]"
    assert "gamma: found torch.float16" in columns_error(gamma=torch.randn(2, 3).half())
    assert columns_error(row_plan=None) == "row_plan: found none, with 2 plans, expected one entry a token"
    assert "row_plan: found torch.int64" in columns_error(row_plan=torch.zeros(5, dtype=torch.int64))
    assert "gamma: found no plan" in columns_error(gamma=torch.randn(0, 3), shift=torch.randn(0, 3))


def linear_error(prologue: bool = False, **changes) -> str:
    arguments = dict(zip(("x", "weight", "bias", "gamma", "shift", "row_plan"), linear_arguments(prologue)))
    with pytest.raises(KernelArgumentError) as caught:
        austeer_kernels.steered_linear(**{**arguments, **changes}, prologue=prologue)
    return str(caught.value)


def test_steered_linear_names_what_does_not_fit():
    assert linear_error(x=torch.randn(8)) == "x: found 1 dimensions, expected [tokens, in]"
    assert linear_error(weight=torch.randn(6, 7)) == "weight: found shape [6, 7], expected [6, 8]"
    assert "weight: found torch.float16" in linear_error(weight=torch.randn(6, 8).half())
    assert "weight: found stride 6 over columns" in linear_error(weight=torch.randn(8, 6).T)
    assert linear_error(bias=torch.randn(8)) == "bias: found shape [8], expected [6]"
    # gamma belongs to the output in the epilogue and to the input in the prologue.
    assert linear_error(gamma=torch.randn(2, 8)) == "gamma: found shape [2, 8], expected [2, 6]"
    assert linear_error(True, gamma=torch.randn(2, 6)) == "gamma: found shape [2, 6], expected [2, 8]"
    assert "row_plan: found shape [4], expected [5]" in linear_error(row_plan=torch.zeros(4, dtype=torch.int32))


@pytest.mark.gpu
def test_mixed_devices_are_named():
    message = linear_error(x=torch.randn(5, 8, device="cuda"))
    assert message == "weight: found a tensor on cpu, expected one on cuda:0, where the activations are"


# --- coalesce ---------------------------------------------------------------------------------------------------


def test_coalesce_sorts_and_adds(seed):
    index = torch.tensor([5, 2, 5, 9])
    gamma, shift = torch.randn(2, 4), torch.randn(2, 4)
    distinct, gamma_sum, shift_sum = austeer_kernels.coalesce(index, gamma, shift)
    assert distinct.tolist() == [2, 5, 9]
    for table, summed in ((gamma, gamma_sum), (shift, shift_sum)):
        torch.testing.assert_close(summed, torch.stack([table[:, 1], table[:, 0] + table[:, 2], table[:, 3]], 1))


def test_coalesce_of_nothing():
    distinct, gamma, shift = austeer_kernels.coalesce(torch.empty(0).long(), torch.empty(1, 0), torch.empty(1, 0))
    assert distinct.shape == (0,) and gamma.shape == shift.shape == (1, 0)
