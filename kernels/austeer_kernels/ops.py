"""The three operations: argument checks, and registration with torch (schema, CPU, CUDA, fake) in one place.

``Library.define`` with ``impl`` and ``register_fake`` is used rather than ``torch.library.custom_op``: it costs half
as much host time a call, and ``triton_op`` fails on CPU under ``torch.compile(backend="aot_eager")``.
The CUDA implementations import Triton when they are first called, so this module loads where Triton is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import reference

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
FLOATING = (*HALF_AND_SINGLE, torch.float64)

_library = torch.library.Library("austeer", "DEF")
_library.define(
    "momentum_update(Tensor positive, Tensor negative, Tensor(a!) positive_count, Tensor(b!) negative_count, "
    "Tensor(c!) delta_sum, Tensor(d!) delta_square_sum, Tensor(e!) first_nonfinite, int pair_offset) -> ()"
)
_library.define(
    "steer_columns_(Tensor(a!) y, Tensor index, Tensor gamma, Tensor shift, bool magnitude, Tensor? row_plan) -> ()"
)
_library.define(
    "steered_linear(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor shift, bool prologue, "
    "bool magnitude, Tensor? row_plan) -> Tensor"
)


def _launcher(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of this package, imported at the first call and kept: an import costs 8 us a call."""
    found: Callable[..., Any] | None = None

    def launch(*args):
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f".{module}", __package__), name)
        return found(*args)

    return launch


_library.impl("momentum_update", reference.momentum_update, "CPU")
_library.impl("steer_columns_", reference.steer_columns_, "CPU")
_library.impl("steered_linear", reference.steered_linear, "CPU")
_library.impl("momentum_update", _launcher("momentum", "momentum_update"), "CUDA")
_library.impl("steer_columns_", _launcher("columns", "steer_columns_"), "CUDA")
_library.impl("steered_linear", _launcher("projection", "steered_linear"), "CUDA")


@torch.library.register_fake("austeer::momentum_update", lib=_library)
def _(positive, negative, positive_count, negative_count, delta_sum, delta_square_sum, first_nonfinite, pair_offset):
    return None


@torch.library.register_fake("austeer::steer_columns_", lib=_library)
def _(y, index, gamma, shift, magnitude, row_plan):
    return None


@torch.library.register_fake("austeer::steered_linear", lib=_library)
def _(x, weight, bias, gamma, shift, prologue, magnitude, row_plan):
    return x.new_empty(x.shape[0], weight.shape[0])


class KernelArgumentError(ValueError):
    """An argument of a kernel has the wrong shape, dtype or device."""


def _expect(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise KernelArgumentError(f"{name}: found {found}, expected {expected}")


def _expect_tensor(
    name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    _expect(tuple(t.shape) == shape, name, f"shape {list(t.shape)}", f"{list(shape)}")
    _expect(t.dtype in dtypes, name, str(t.dtype), " or ".join(str(d) for d in dtypes))
    _expect(t.device == device, name, f"a tensor on {t.device}", f"one on {device}, where the activations are")


def momentum_counters(columns: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """The five counters of :func:`momentum_update` before the first pair, in its order; each [columns]."""
    return (
        torch.zeros(columns, dtype=torch.int64, device=device),
        torch.zeros(columns, dtype=torch.int64, device=device),
        torch.zeros(columns, dtype=torch.float64, device=device),
        torch.zeros(columns, dtype=torch.float64, device=device),
        torch.full((columns,), reference.NO_PAIR, dtype=torch.int64, device=device),
    )


def momentum_update(
    positive: Tensor,
    negative: Tensor,
    positive_count: Tensor,
    negative_count: Tensor,
    delta_sum: Tensor,
    delta_square_sum: Tensor,
    first_nonfinite: Tensor,
    pair_offset: int = 0,
) -> None:
    """Adds one buffer of contrastive activations to running activation-momentum counters, in place.

    For each column c, over rows j with m = positive[j, c] - negative[j, c] (paper, section on activation momentum)::

        positive_count[c]   += sum_j [m > 0]        delta_sum[c]        += sum_j m
        negative_count[c]   += sum_j [m < 0]        delta_square_sum[c] += sum_j m * m

    Values are compared as they are (exact); the sums are float64. A row whose positive or negative value is NaN or
    infinite counts nowhere, and ``first_nonfinite[c]`` becomes the lowest ``pair_offset + j`` of such rows, so a
    stream of calls needs no check, and no wait for the device, until it ends. :func:`momentum_counters` makes the five.

    Args:
        positive, negative: [pairs, columns], float16, bfloat16 or float32 (float64 on a CPU), same dtype. Any stride
            over pairs; the columns are adjacent.
        positive_count, negative_count: int64 [columns].
        delta_sum, delta_square_sum: float64 [columns].
        first_nonfinite: int64 [columns], filled with ``NO_PAIR`` before the first call.
        pair_offset: the number of row 0 in the whole stream.

    The integer results do not depend on how the stream was cut into calls; the sums do in the last bits, and are
    the same each time for the same cuts (no atomics).

    Raises:
        KernelArgumentError: a shape, dtype, stride or device does not fit.
    """
    _expect(positive.dim() == 2, "positive", f"{positive.dim()} dimensions", "[pairs, columns]")
    allowed = FLOATING if positive.device.type == "cpu" else HALF_AND_SINGLE
    _expect(positive.dtype in allowed, "positive", str(positive.dtype), " or ".join(map(str, allowed)))
    _expect_tensor("negative", negative, tuple(positive.shape), (positive.dtype,), positive.device)
    columns = (positive.shape[1],)
    for name, t in (("positive", positive), ("negative", negative)):
        _expect(t.stride(1) == 1 or t.shape[1] <= 1, name, f"stride {t.stride(1)} over columns", "stride 1")
    for name, t in (
        ("positive_count", positive_count),
        ("negative_count", negative_count),
        ("first_nonfinite", first_nonfinite),
    ):
        _expect_tensor(name, t, columns, (torch.int64,), positive.device)
        _expect(t.is_contiguous(), name, f"strides {t.stride()}", "a contiguous tensor")
    for name, t in (("delta_sum", delta_sum), ("delta_square_sum", delta_square_sum)):
        _expect_tensor(name, t, columns, (torch.float64,), positive.device)
        _expect(t.is_contiguous(), name, f"strides {t.stride()}", "a contiguous tensor")
    torch.ops.austeer.momentum_update(
        positive,
        negative,
        positive_count,
        negative_count,
        delta_sum,
        delta_square_sum,
        first_nonfinite,
        pair_offset,
    )


def _expect_table(gamma: Tensor, shift: Tensor, columns: int, row_plan: Tensor | None, x: Tensor) -> None:
    _expect(gamma.dim() == 2, "gamma", f"shape {list(gamma.shape)}", f"[plans, {columns}]")
    _expect(gamma.shape[0] > 0, "gamma", "no plan", "at least one")
    _expect_tensor("gamma", gamma, (gamma.shape[0], columns), (torch.float32,), x.device)
    _expect_tensor("shift", shift, (gamma.shape[0], columns), (torch.float32,), x.device)
    for name, t in (("gamma", gamma), ("shift", shift)):
        _expect(t.is_contiguous(), name, f"strides {t.stride()}", "a contiguous table")
    if row_plan is None:
        _expect(gamma.shape[0] == 1, "row_plan", f"none, with {gamma.shape[0]} plans", "one entry a token")
    else:
        _expect_tensor("row_plan", row_plan, (x.shape[0],), (torch.int32,), x.device)
        _expect(row_plan.is_contiguous(), "row_plan", f"strides {row_plan.stride()}", "a contiguous tensor")


def steer_columns_(
    y: Tensor,
    index: Tensor,
    gamma: Tensor,
    shift: Tensor,
    *,
    magnitude: bool = False,
    row_plan: Tensor | None = None,
) -> Tensor:
    """Steers each token at its plan's list of columns, in place, and touches nothing else. Returns ``y``.

    For every token t and every i, with p = row_plan[t] (0 without ``row_plan``), c = index[p, i] and x = y[t, c]::

        y[t, c] <- x + gamma[p, i] * (|x| if magnitude else x) + shift[p, i]        where c is not -1

    computed in float32 (float64 for float64) and rounded once (paper: x + alpha * beta * x, with gamma = alpha * beta).
    Work and tables grow with the longest list, and not with what all plans together steer.

    Args:
        y: [tokens, width], floating point (float64 on a CPU only); any stride over tokens, columns adjacent.
        index: int64 [plans, count], 0 <= index < width, distinct within a plan (see :func:`coalesce`); -1 for an entry
            that is not used, whatever gamma and shift hold there. Any stride over plans (0: one list for all of them).
        gamma, shift: float32 [plans, count], contiguous.
        magnitude: gamma multiplies |x| instead of x.
        row_plan: int32 [tokens], each token's plan, -1 for a token that is left as it is.
            Needed when there is more than one plan.

    Raises:
        KernelArgumentError: a shape, dtype, stride or device does not fit. The values of ``index`` and ``row_plan``
            are not read (that would wait for the device).
    """
    _expect(y.dim() == 2, "y", f"{y.dim()} dimensions", "[tokens, width]")
    allowed = FLOATING if y.device.type == "cpu" else HALF_AND_SINGLE
    _expect(y.dtype in allowed, "y", str(y.dtype), " or ".join(map(str, allowed)))
    _expect(y.stride(1) == 1 or y.shape[1] <= 1, "y", f"stride {y.stride(1)} over columns", "stride 1")
    _expect(index.dim() == 2, "index", f"{index.dim()} dimensions", "[plans, count]")
    plans, count = index.shape
    _expect_tensor("index", index, (plans, count), (torch.int64,), y.device)
    _expect(index.stride(1) == 1 or count <= 1, "index", f"stride {index.stride(1)} over entries", "stride 1")
    _expect(count <= y.shape[1], "index", f"{count} columns", f"at most {y.shape[1]}, distinct")
    _expect_table(gamma, shift, count, row_plan, y)
    _expect(gamma.shape[0] == plans, "index", f"the lists of {plans} plans", f"{gamma.shape[0]}, as gamma has")
    torch.ops.austeer.steer_columns_(y, index, gamma, shift, magnitude, row_plan)
    return y


def steered_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    shift: Tensor,
    *,
    prologue: bool = False,
    magnitude: bool = False,
    row_plan: Tensor | None = None,
) -> Tensor:
    """A linear layer with steering fused into it, before the product (prologue) or after it (epilogue).

    With s(v)[t, i] = v[t, i] + gamma[p, i] * (|v[t, i]| if magnitude else v[t, i]) + shift[p, i], p = row_plan[t]
    (0 without ``row_plan``; a token with -1 has s(v) = v)::

        epilogue:  s(x @ weight.T + bias)        prologue:  s(x) @ weight.T + bias

    Products are accumulated in float32 and the result is rounded once; the prologue also rounds s(x) to x's dtype.
    On a GPU more than ``launch.MOST_TOKENS`` tokens take PyTorch's product, under its settings (TF32, reduced-precision
    sums), and the sparse kernel, so that an epilogue's product is rounded before it is steered.

    Args:
        x: [tokens, in], floating point (float64 on a CPU only), columns adjacent.
        weight: [out, in], x's dtype, columns adjacent. ``bias``: [out] or None.
        gamma, shift: float32, contiguous, dense over the steered side: [plans, in] for the prologue, [plans, out]
            for the epilogue. (Dense vectors cost 8 bytes a column, one thousandth of the weight; a scatter costs more.)
        row_plan: int32 [tokens] or None, as in :func:`steer_columns_`.

    Returns:
        [tokens, out], x's dtype.

    Raises:
        KernelArgumentError: a shape, dtype, stride or device does not fit.
    """
    _expect(x.dim() == 2, "x", f"{x.dim()} dimensions", "[tokens, in]")
    _expect(weight.dim() == 2, "weight", f"{weight.dim()} dimensions", "[out, in]")
    allowed = FLOATING if x.device.type == "cpu" else HALF_AND_SINGLE
    _expect(x.dtype in allowed, "x", str(x.dtype), " or ".join(map(str, allowed)))
    _expect_tensor("weight", weight, (weight.shape[0], x.shape[1]), (x.dtype,), x.device)
    for name, t in (("x", x), ("weight", weight)):
        _expect(t.stride(1) == 1 or t.shape[1] <= 1, name, f"stride {t.stride(1)} over columns", "stride 1")
    if bias is not None:
        _expect_tensor("bias", bias, (weight.shape[0],), (x.dtype,), x.device)
        _expect(bias.stride(0) == 1 or bias.shape[0] <= 1, "bias", f"stride {bias.stride(0)}", "stride 1")
    _expect_table(gamma, shift, x.shape[1] if prologue else weight.shape[0], row_plan, x)
    return torch.ops.austeer.steered_linear(x, weight, bias, gamma, shift, prologue, magnitude, row_plan)


def coalesce(plans: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of :func:`steer_columns_` for some plans; entries of one column of a plan add up, as in an index-add.

    Args:
        plans: for each index int64 [count], any order, repeats allowed; gamma and shift float32 [count].

    Returns:
        index [plans, most], ascending, -1 behind a list that is shorter than the longest; gamma and shift, 0 there.
    """
    lists = []
    for index, gamma, shift in plans:
        distinct, place = index.unique(return_inverse=True)
        lists.append((distinct, *(t.new_zeros(len(distinct)).index_add_(0, place, t) for t in (gamma, shift))))
    index, gamma, shift = (pad_sequence(list(part), True, value) for part, value in zip(zip(*lists), (-1, 0, 0)))
    return index, gamma, shift
