"""Triton: in-place sparse steering of a matrix, each token by its plan's list of columns; and block helpers it shares.

The interpreter (TRITON_INTERPRET=1) keeps bfloat16 as raw 16-bit words: it cannot compute on them, and truncates where
a GPU rounds to nearest even. :func:`rounded` and the upcasts right after each load keep both runs equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """b_x in DTYPE, rounded to nearest even. A plain cast on a GPU."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_even = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, b_even.to(tl.float32, bitcast=True), b_x)
    return b_x.to(DTYPE)


@triton.jit
def plan_of_rows(p_row_plan, o_t, m_t):
    """Each token's row of the table, -1 for a token that keeps its values. [BLOCK_T] int64"""
    if p_row_plan is None:
        b_plan = tl.where(m_t, 0, -1).to(tl.int64)  # [BLOCK_T]
    else:
        b_plan = tl.load(p_row_plan + o_t, mask=m_t, other=-1).to(tl.int64)  # [BLOCK_T]
    return b_plan


@triton.jit
def steered_block(
    b_x, p_gamma, p_shift, p_row_plan, b_plan, o_c, m_c, width, MAGNITUDE: tl.constexpr, INPUT: tl.constexpr = False
):
    """x + gamma[plan, c] * (|x| if MAGNITUDE else x) + shift[plan, c] in float32; x where plan is -1.

    b_x [BLOCK_T, BLOCK_C] float32, b_plan [BLOCK_T], o_c and m_c [BLOCK_C], tables [plans, width]. Where gamma is 0 an
    infinity stays one, but for the INPUT of a product, which it makes infinite or NaN anyway: registers are dear there.
    """
    if p_row_plan is None:
        b_gamma = tl.load(p_gamma + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_C]
        b_shift = tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_C]
    else:
        o_table = b_plan[:, None] * width + o_c[None, :]
        m_table = (b_plan >= 0)[:, None] & m_c[None, :]
        b_gamma = tl.load(p_gamma + o_table, mask=m_table, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
        b_shift = tl.load(p_shift + o_table, mask=m_table, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
    if INPUT:
        b_y = b_x + b_gamma * (tl.abs(b_x) if MAGNITUDE else b_x) + b_shift  # [BLOCK_T, BLOCK_C]
    else:
        if MAGNITUDE:
            b_gamma = tl.where(b_x < 0, -b_gamma, b_gamma)  # [BLOCK_T, BLOCK_C]
        b_y = b_x * (1 + b_gamma) + b_shift  # [BLOCK_T, BLOCK_C]
    if p_row_plan is not None:
        b_y = tl.where((b_plan >= 0)[:, None], b_y, b_x)
    return b_y


@triton.jit(do_not_specialize=["tokens"])
def steer_columns_kernel(
    p_y,
    p_index,
    p_gamma,
    p_shift,
    p_row_plan,
    tokens,
    count,
    y_stride,
    index_stride,
    MAGNITUDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """y[t, c] <- x + gamma[p, i] * (|x| if MAGNITUDE else x) + shift[p, i] with x = y[t, c].

    c is index[p, i], and p is row_plan[t]. Without row_plan a block reads its part of the one list once.
    Entries with c = -1, and those of tokens without a plan, are neither loaded nor stored.
    """
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_i = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < count
    b_plan = plan_of_rows(p_row_plan, o_t, o_t < tokens)  # [BLOCK_T]
    m_t = (b_plan >= 0)[:, None]
    if p_row_plan is None:
        b_index = tl.load(p_index + o_i, mask=m_i, other=-1).to(tl.int64)[None, :]  # [1, BLOCK_I]
    else:
        p_list = p_index + b_plan[:, None] * index_stride + o_i[None, :]
        b_index = tl.load(p_list, mask=m_t & m_i[None, :], other=-1).to(tl.int64)  # [BLOCK_T, BLOCK_I]
    p_tile = p_y + o_t[:, None] * y_stride + b_index
    m_tile = m_t & (b_index >= 0)
    b_x = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_I]
    b_y = steered_block(b_x, p_gamma, p_shift, p_row_plan, b_plan, o_i, m_i, count, MAGNITUDE)  # [BLOCK_T, BLOCK_I]
    tl.store(p_tile, rounded(b_y, p_y.dtype.element_ty), mask=m_tile)


def steer_columns_(
    y: Tensor, index: Tensor, gamma: Tensor, shift: Tensor, magnitude: bool, row_plan: Tensor | None
) -> None:
    """Launches the kernel behind :func:`austeer_kernels.steer_columns_`, which checks the arguments."""
    tokens, count = y.shape[0], index.shape[1]
    if tokens == 0 or count == 0:
        return
    if launch.elsewhere(y):
        with torch.cuda.device(y.device):
            return steer_columns_(y, index, gamma, shift, magnitude, row_plan)
    s = launch.settings("steer_columns_", tokens, count, 0, y.dtype, y.device)
    steer_columns_kernel[(-(-tokens // s.block_m), -(-count // s.block_n))](
        y,
        index,
        gamma,
        shift,
        row_plan,
        tokens,
        count,
        y.stride(0),
        index.stride(0),
        MAGNITUDE=magnitude,
        BLOCK_T=s.block_m,
        BLOCK_I=s.block_n,
        num_warps=s.num_warps,
    )
