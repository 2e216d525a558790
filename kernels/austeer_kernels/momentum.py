"""Triton: sign counts and sums over contrastive activations, in one streaming pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

_NO_PAIR = tl.constexpr(2**63 - 1)  # reference.NO_PAIR
_NO_TILE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["pair_offset", "rows", "tiles_per_split"])
def momentum_kernel(
    p_positive,
    p_negative,
    p_positive_count,
    p_negative_count,
    p_delta_sum,
    p_delta_square_sum,
    p_first_nonfinite,
    pair_offset: tl.int64,
    rows,
    columns,
    positive_stride,
    negative_stride,
    tiles_per_split,
    ACCUMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Over the rows j of one split, with m = positive[j, c] - negative[j, c] where both are finite::

        positive_count[c] += sum_j [m > 0]      delta_sum[c]        += sum_j m
        negative_count[c] += sum_j [m < 0]      delta_square_sum[c] += sum_j m * m
        first_nonfinite[c] = min(first_nonfinite[c], pair_offset + j of the first row that is not finite)

    ACCUMULATE adds to the counters themselves (there is one split); otherwise row ``split`` of a workspace
    [splits, columns] is written. The accumulators have the shape of a tile and meet across rows once, at the end.
    """
    split = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    first_tile = split * tiles_per_split
    o_positive = o_r[:, None] * positive_stride + o_c[None, :]
    o_negative = o_r[:, None] * negative_stride + o_c[None, :]

    b_positive_count = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)  # [BLOCK_R, BLOCK_C]
    b_negative_count = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)  # [BLOCK_R, BLOCK_C]
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)  # [BLOCK_R, BLOCK_C]
    b_square_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)  # [BLOCK_R, BLOCK_C]
    b_first_tile = tl.full([BLOCK_R, BLOCK_C], _NO_TILE, tl.int32)  # [BLOCK_R, BLOCK_C]

    for tile in tl.range(0, tiles_per_split, num_stages=NUM_STAGES):
        row = (first_tile + tile) * BLOCK_R
        m_tile = (o_r[:, None] < rows - row) & m_c[None, :]
        # Entries outside the buffers read as a pair of zeros, which counts nowhere and adds nothing.
        b_p = tl.load(p_positive + row * positive_stride + o_positive, mask=m_tile, other=0.0)
        b_n = tl.load(p_negative + row * negative_stride + o_negative, mask=m_tile, other=0.0)
        b_p = b_p.to(tl.float32)  # [BLOCK_R, BLOCK_C]
        b_n = b_n.to(tl.float32)  # [BLOCK_R, BLOCK_C]
        m_finite = (tl.abs(b_p) < float("inf")) & (tl.abs(b_n) < float("inf"))
        b_p = tl.where(m_finite, b_p, 0.0)
        b_n = tl.where(m_finite, b_n, 0.0)
        b_positive_count += (b_p > b_n).to(tl.int32)
        b_negative_count += (b_p < b_n).to(tl.int32)
        b_m = b_p.to(tl.float64) - b_n.to(tl.float64)  # [BLOCK_R, BLOCK_C], exact for 16-bit inputs
        b_sum += b_m
        b_square_sum += b_m * b_m
        b_first_tile = tl.minimum(b_first_tile, tl.where(m_finite, _NO_TILE, tile))

    b_row = pair_offset + (first_tile + b_first_tile) * BLOCK_R + o_r[:, None]  # [BLOCK_R, BLOCK_C]
    b_first = tl.min(tl.where(b_first_tile == _NO_TILE, _NO_PAIR, b_row), axis=0)  # [BLOCK_C]
    b_positives = tl.sum(b_positive_count.to(tl.int64), axis=0)  # [BLOCK_C]
    b_negatives = tl.sum(b_negative_count.to(tl.int64), axis=0)  # [BLOCK_C]
    b_sums = tl.sum(b_sum, axis=0)  # [BLOCK_C]
    b_square_sums = tl.sum(b_square_sum, axis=0)  # [BLOCK_C]

    o_out = split * columns + o_c
    if ACCUMULATE:
        b_positives += tl.load(p_positive_count + o_out, mask=m_c, other=0)
        b_negatives += tl.load(p_negative_count + o_out, mask=m_c, other=0)
        b_sums += tl.load(p_delta_sum + o_out, mask=m_c, other=0.0)
        b_square_sums += tl.load(p_delta_square_sum + o_out, mask=m_c, other=0.0)
        b_first = tl.minimum(b_first, tl.load(p_first_nonfinite + o_out, mask=m_c, other=_NO_PAIR))
    tl.store(p_positive_count + o_out, b_positives, mask=m_c)
    tl.store(p_negative_count + o_out, b_negatives, mask=m_c)
    tl.store(p_delta_sum + o_out, b_sums, mask=m_c)
    tl.store(p_delta_square_sum + o_out, b_square_sums, mask=m_c)
    tl.store(p_first_nonfinite + o_out, b_first, mask=m_c)


@triton.jit(do_not_specialize=["splits"])
def momentum_finish_kernel(
    p_positive_part,
    p_negative_part,
    p_sum_part,
    p_square_sum_part,
    p_first_part,
    p_positive_count,
    p_negative_count,
    p_delta_sum,
    p_delta_square_sum,
    p_first_nonfinite,
    splits,
    columns,
    BLOCK_C: tl.constexpr,
):
    """counter[c] += sum_s part[s, c] (first_nonfinite: the minimum), s in rising order, so that results repeat."""
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    b_positives = tl.load(p_positive_count + o_c, mask=m_c, other=0)  # [BLOCK_C]
    b_negatives = tl.load(p_negative_count + o_c, mask=m_c, other=0)  # [BLOCK_C]
    b_first = tl.load(p_first_nonfinite + o_c, mask=m_c, other=_NO_PAIR)  # [BLOCK_C]
    b_sum = tl.zeros([BLOCK_C], tl.float64)  # [BLOCK_C]
    b_square_sum = tl.zeros([BLOCK_C], tl.float64)  # [BLOCK_C]
    o_part = o_c
    for _ in range(splits):
        b_positives += tl.load(p_positive_part + o_part, mask=m_c, other=0)
        b_negatives += tl.load(p_negative_part + o_part, mask=m_c, other=0)
        b_sum += tl.load(p_sum_part + o_part, mask=m_c, other=0.0)
        b_square_sum += tl.load(p_square_sum_part + o_part, mask=m_c, other=0.0)
        b_first = tl.minimum(b_first, tl.load(p_first_part + o_part, mask=m_c, other=_NO_PAIR))
        o_part += columns
    b_sum += tl.load(p_delta_sum + o_c, mask=m_c, other=0.0)
    b_square_sum += tl.load(p_delta_square_sum + o_c, mask=m_c, other=0.0)
    tl.store(p_positive_count + o_c, b_positives, mask=m_c)
    tl.store(p_negative_count + o_c, b_negatives, mask=m_c)
    tl.store(p_first_nonfinite + o_c, b_first, mask=m_c)
    tl.store(p_delta_sum + o_c, b_sum, mask=m_c)
    tl.store(p_delta_square_sum + o_c, b_square_sum, mask=m_c)


#: The finish kernel's columns a program: it only streams the few partial sums, so it has no table entry.
FINISH_BLOCK_C, FINISH_WARPS = 128, 4


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
    """Launches the kernels behind :func:`austeer_kernels.momentum_update`, which checks the arguments."""
    rows, columns = positive.shape
    if rows == 0 or columns == 0:
        return
    if launch.elsewhere(positive):
        with torch.cuda.device(positive.device):
            return momentum_update(
                *(positive, negative, positive_count, negative_count),
                *(delta_sum, delta_square_sum, first_nonfinite, pair_offset),
            )
    s = launch.settings("momentum_update", rows, columns, 0, positive.dtype, positive.device)
    counters = (positive_count, negative_count, delta_sum, delta_square_sum, first_nonfinite)
    if s.splits == 1:
        targets = counters
    else:
        counts = torch.empty((3, s.splits, columns), dtype=torch.int64, device=positive.device)
        sums = torch.empty((2, s.splits, columns), dtype=torch.float64, device=positive.device)
        targets = (counts[0], counts[1], sums[0], sums[1], counts[2])
    momentum_kernel[(-(-columns // s.block_n), s.splits)](
        positive,
        negative,
        *targets,
        pair_offset,
        rows,
        columns,
        positive.stride(0),
        negative.stride(0),
        -(-rows // (s.block_m * s.splits)),
        ACCUMULATE=s.splits == 1,
        BLOCK_R=s.block_m,
        BLOCK_C=s.block_n,
        NUM_STAGES=s.num_stages,
        num_warps=s.num_warps,
    )
    if s.splits > 1:
        momentum_finish_kernel[(-(-columns // FINISH_BLOCK_C),)](
            *targets,
            *counters,
            s.splits,
            columns,
            BLOCK_C=FINISH_BLOCK_C,
            num_warps=FINISH_WARPS,
        )
