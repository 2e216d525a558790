"""Every operation's definition in plain PyTorch: what the Triton kernels are tested against, and what runs on a CPU.

A function of a registered operation's name (ops.py) has exactly its arguments, which that checks first. Ablation is not
registered: PyTorch's own operations are what runs on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: What ``first_nonfinite`` holds for a column in which every value so far was finite.
NO_PAIR = torch.iinfo(torch.int64).max


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on ``dtype`` is done in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def momentum_update(
    positive: Tensor,
    negative: Tensor,
    positive_count: Tensor,
    negative_count: Tensor,
    delta_sum: Tensor,
    delta_square_sum: Tensor,
    first_nonfinite: Tensor,
    pair_offset: int,
) -> None:
    """Counts, in place, the signs of m = positive - negative over the pairs of one buffer (paper, activation momentum).

    An entry of which either side is NaN or infinite is counted nowhere; the lowest ``pair_offset + row`` of such
    entries is kept in ``first_nonfinite``. See :func:`austeer_kernels.momentum_update` for shapes and dtypes.
    """
    sums = _momentum_sums(positive, negative)
    nonfinite = ~sums.isfinite().all(0)
    if nonfinite.any():
        row = torch.arange(pair_offset, pair_offset + positive.shape[0], device=positive.device)
        for columns in nonfinite.nonzero().flatten().split(_TILE_COLUMNS):
            p, n = positive[:, columns], negative[:, columns]
            finite = p.isfinite() & n.isfinite()
            first = torch.where(finite, NO_PAIR, row[:, None]).amin(0)
            first_nonfinite[columns] = torch.minimum(first_nonfinite[columns], first)
            sums[:, columns] = _momentum_sums(p.masked_fill(~finite, 0), n.masked_fill(~finite, 0))  # ties add nothing
    positive_count += sums[0].long()
    negative_count += sums[1].long()
    delta_sum += sums[2]
    delta_square_sum += sums[3]


#: Tiles that stay in a core's cache: on whole buffers every operation below would go through memory, in float64.
#: Fewer than 2**15 entries, which torch does not split over threads: a thread that is late would be waited for at each.
_TILE_COLUMNS, _TILE_ENTRIES = 2016, 16 * 2016


def _momentum_sums(positive: Tensor, negative: Tensor) -> Tensor:
    """The sums over pairs of [m > 0], [m < 0], m and m * m, float64 [4, columns]; not finite if an entry is not.

    The counts are exact: the difference of two distinct numbers is never 0 in float64, and has their order's sign.
    """
    sums = torch.zeros(4, positive.shape[1], dtype=torch.float64, device=positive.device)
    tiles = torch.empty(2, _TILE_ENTRIES, dtype=torch.float64, device=positive.device)
    for start in range(0, positive.shape[1], _TILE_COLUMNS):
        part = slice(start, start + _TILE_COLUMNS)
        more, less, total, squares = sums[:, part]
        rows = _TILE_ENTRIES // len(more)
        for p, n in zip(positive[:, part].split(rows), negative[:, part].split(rows)):
            if p.dtype == torch.float16:  # torch is three times slower from float16 to float64 at once
                p, n = p.float(), n.float()
            m, other = tiles[:, : p.numel()].view(2, *p.shape)  # [rows of the tile, columns of the part]
            m.copy_(p).sub_(other.copy_(n))
            more += torch.gt(m, 0, out=other).sum(0)  # into float64: a result of bool is slower, and slow to add up
            less += torch.lt(m, 0, out=other).sum(0)
            total += m.sum(0)
            squares += m.square_().sum(0)
    return sums


def steered(x: Tensor, gamma: Tensor, shift: Tensor, magnitude: bool) -> Tensor:
    """x + gamma * (|x| if magnitude else x) + shift, in the dtype of ``x``; differentiable.

    Computed as x * (1 + gamma, with the sign of x if magnitude) + shift: where gamma is 0 an infinity stays one.
    """
    if gamma.dtype != x.dtype:  # a cast that changes nothing still costs a microsecond, and decoding counts them
        gamma, shift = gamma.to(x.dtype), shift.to(x.dtype)
    return torch.addcmul(shift, x, 1 + (gamma * x.sign() if magnitude else gamma))


def steered_columns(old: Tensor, gamma: Tensor, shift: Tensor, magnitude: bool, row_plan: Tensor | None) -> Tensor:
    """The steered values of selected columns, [tokens, count], rounded once to their dtype; differentiable."""
    wide = compute_dtype(old.dtype)
    x = old if old.dtype == wide else old.to(wide)
    if row_plan is not None:
        plan = row_plan.clamp(min=0).long()
        gamma, shift = gamma[plan], shift[plan]  # [tokens, count]
    new = steered(x, gamma, shift, magnitude)
    if old.dtype != wide:
        new = new.to(old.dtype)
    return new if row_plan is None else torch.where((row_plan >= 0)[:, None], new, old)


def steer_columns(
    y: Tensor, index: Tensor, gamma: Tensor, shift: Tensor, magnitude: bool, row_plan: Tensor | None
) -> Tensor:
    """The definition of :func:`steer_columns_`: a new tensor, differentiable in y, gamma and shift, and traceable."""
    if not index.shape[1]:
        return y.clone()
    plan = y.new_zeros(y.shape[0], dtype=torch.int32) if row_plan is None else row_plan
    columns, new, once = _steered_entries(y, index, gamma, shift, magnitude, plan)
    return y.scatter(1, columns, torch.where(once, new, new.detach()))


def _steered_entries(
    y: Tensor, index: Tensor, gamma: Tensor, shift: Tensor, magnitude: bool, row_plan: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, and what they become, [tokens, count]; and where a column of a token stands there for the first time."""
    plan = row_plan.clamp(min=0)
    columns, gamma, shift = (t.index_select(0, plan) for t in (index, gamma, shift))
    used = (columns >= 0) & (row_plan >= 0)[:, None]
    entry, once = _entries(used)
    columns, gamma, shift = (t.gather(1, entry) for t in (columns.clamp(min=0), gamma, shift))
    old = y.gather(1, columns)
    new = torch.where(used.any(1, keepdim=True), steered_columns(old, gamma, shift, magnitude, None), old)
    return columns, new, once


def _entries(used: Tensor) -> tuple[Tensor, Tensor]:
    """Which entry each of a token's stands for, int64 [tokens, count], and where that is itself.

    One that is not used stands for its token's first used one, with the same result; where there is none, all stand
    for one column, which becomes what it was.
    """
    count = used.shape[1]
    place = torch.arange(count, device=used.device)
    # No argmax of ``used``: compiled for a CPU it may give any number for a row of zeros.
    first = torch.where(used, place, count).amin(1, keepdim=True).clamp(max=count - 1)
    entry = torch.where(used, place, first)
    return entry, entry == place


def steer_columns_(
    y: Tensor, index: Tensor, gamma: Tensor, shift: Tensor, magnitude: bool, row_plan: Tensor | None
) -> None:
    """y[t, c] <- y[t, c] + gamma[p, i] * (y[t, c] or its magnitude) + shift[p, i], c = index[p, i], p = row_plan[t].

    Rounded once to y's dtype. What :func:`steer_columns` gives, with work for the lists' entries alone.
    """
    if not index.shape[1]:
        return
    if row_plan is not None:
        columns, x, _ = _steered_entries(y, index, gamma, shift, magnitude, row_plan)
        y.scatter_(1, columns, x)
        return
    columns = index.squeeze(0)
    try:
        x = y.index_select(1, columns)
    except (IndexError, RuntimeError):  # -1, which is rare here: to look for it would cost microseconds a call
        used = columns >= 0
        columns, gamma, shift = columns[used], gamma[:, used], shift[:, used]
        x = y.index_select(1, columns)
    y.index_copy_(1, columns, steered_columns(x, gamma, shift, magnitude, None))


def ablated(x: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """x - strength * d (d . x) for d the ``direction`` [..., width], rounded once to x's dtype; differentiable.

    Where d is 0, or the strength [..., 1] is, x is what it was, an infinity too.
    """
    wide = compute_dtype(x.dtype)
    d, strength = direction.to(wide), strength.to(wide)
    there = (d != 0) & (strength != 0)
    old = torch.where(there, x.to(wide), 0.0)
    along = (d * old).sum(-1, keepdim=True)
    return torch.where(there, (old - strength * along * d).to(x.dtype), x)


def ablate_columns(x: Tensor, index: Tensor, direction: Tensor, strength: Tensor, rows: Tensor | None) -> Tensor:
    """Each token less its part along a direction of its set: x - strength * d (d . x).

    Computed in float32 (float64 for float64) and rounded once. A token without a set, and every column that its set
    does not name, stays what it was, bit for bit. A new tensor: differentiable in x, traceable, and without a kernel
    of its own, as it reads and writes the named columns alone.

    Args:
        x: [tokens, width], floating point.
        index: int64 [sets, count], the columns of d, distinct within a set; -1 for an entry that is not used.
        direction: float32 [sets, count], d, of length 1 (it is not looked at); 0 where ``index`` is -1.
        strength: float32 [sets]; 1 removes the direction.
        rows: int32 [tokens], each token's set, -1 for none. None: the first set for all, which uses all its entries.
    """
    if not index.shape[1]:
        return x.clone()
    columns, new, once = _ablated_entries(x, index, direction, strength, rows)
    return x.scatter(1, columns, torch.where(once, new, new.detach()))


def ablate_columns_(x: Tensor, index: Tensor, direction: Tensor, strength: Tensor, rows: Tensor | None) -> None:
    """The same in place."""
    if not index.shape[1]:
        return
    if rows is None:
        columns = index[0]
        x.index_copy_(1, columns, ablated(x.index_select(1, columns), direction[0], strength[:1]))
        return
    columns, new, _ = _ablated_entries(x, index, direction, strength, rows)
    x.scatter_(1, columns, new)


def _ablated_entries(
    x: Tensor, index: Tensor, direction: Tensor, strength: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_steered_entries`."""
    rows = x.new_zeros(x.shape[0], dtype=torch.int32) if rows is None else rows
    one = rows.clamp(min=0)
    columns, d, strength = (t.index_select(0, one) for t in (index, direction, strength[:, None]))
    used = (columns >= 0) & (rows >= 0)[:, None]
    old = x.gather(1, columns.clamp(min=0))
    new = torch.where(used, ablated(torch.where(used, old, 0.0), d, strength), old)
    entry, once = _entries(used)
    return columns.clamp(min=0).gather(1, entry), new.gather(1, entry), once


def steered_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    shift: Tensor,
    prologue: bool,
    magnitude: bool,
    row_plan: Tensor | None,
) -> Tensor:
    """x @ weight.T + bias with the steering before (prologue) or after it (epilogue); one rounding of the result.

    gamma and shift are dense over the steered side: [plans, in] in the prologue, [plans, out] in the epilogue.
    The prologue rounds the steered input to x's dtype, as the tensor that the site is.
    """
    wide = compute_dtype(x.dtype)
    if row_plan is not None:
        plan = row_plan.clamp(min=0).long()
        active = (row_plan >= 0)[:, None]  # a row without a plan gets gamma 0 and shift 0
        gamma, shift = gamma[plan] * active, shift[plan] * active  # [tokens, in or out]
    h = x.to(wide)
    if prologue:
        h = steered(h, gamma, shift, magnitude).to(x.dtype).to(wide)
    y = torch.nn.functional.linear(h, weight.to(wide), None if bias is None else bias.to(wide))
    if not prologue:
        y = steered(y, gamma, shift, magnitude)
    return y.to(x.dtype)
