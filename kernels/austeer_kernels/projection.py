"""Triton: a linear layer with steering of its input (prologue) or of its output (epilogue), for few tokens.

The weight is the tall operand of the matrix instruction and 16 tokens are the narrow one, and K is split over programs
so that a small output still reads the weight with the whole GPU; partial sums are added in a fixed order by a second
kernel. Many tokens are left to PyTorch's product and the sparse kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from . import launch
from .columns import INTERPRETED, plan_of_rows, rounded, steer_columns_, steered_block


@triton.jit
def dot_operand(b_x):
    """b_x as tl.dot takes it: as it is on a GPU; in float32 in the interpreter, which has no bfloat16 arithmetic."""
    if INTERPRETED:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def finished(
    b_acc,
    p_y,
    p_bias,
    p_gamma,
    p_shift,
    p_row_plan,
    o_t,
    o_n,
    m_t,
    m_n,
    n_width,
    EPILOGUE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """Stores acc + bias [BLOCK_T, BLOCK_N], steered if EPILOGUE, rounded once."""
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE:
        b_plan = plan_of_rows(p_row_plan, o_t, m_t)  # [BLOCK_T]
        b_acc = steered_block(b_acc, p_gamma, p_shift, p_row_plan, b_plan, o_n, m_n, n_width, MAGNITUDE)
    p_tile = p_y + o_t[:, None] * n_width + o_n[None, :]
    tl.store(p_tile, rounded(b_acc, p_y.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["tokens", "k_tiles"])
def steered_linear_kernel(
    p_x,
    p_weight,
    p_bias,
    p_gamma,
    p_shift,
    p_row_plan,
    p_out,
    tokens,
    n_width,
    k_width,
    k_tiles,
    x_stride,
    weight_stride,
    SPLIT: tl.constexpr,
    PROLOGUE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """acc[n, t] = sum over one split's k of weight[n, k] * s(x)[t, k], s the steering if PROLOGUE, else nothing.

    With SPLIT, out is a float32 workspace [splits, tokens, n_width]; otherwise it is the finished result.

    float32 is summed in two levels: BLOCK_K products from zero, and those sums with compensation (Kahan, 1965). For
    K random products of size 1 the partial sums grow as the root of their number, and each addition errs by up to
    2^-24 of what it gives: one running sum errs by up to K / sqrt(2) * 2^-24 (root of the mean square), this by
    sqrt(K * BLOCK_K / 2) * 2^-24, 21 times less at K = 14336. 16-bit results are rounded more coarsely than that.
    """
    split = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_t = tl.program_id(2).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_k = split * k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n = o_n < n_width
    m_t = o_t < tokens
    b_plan = plan_of_rows(p_row_plan, o_t, m_t)  # [BLOCK_T]
    p_weight_row = p_weight + o_n[:, None] * weight_stride
    p_x_row = p_x + o_t[:, None] * x_stride

    b_acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)  # [BLOCK_N, BLOCK_T]
    b_excess = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)  # [BLOCK_N, BLOCK_T], float32: what b_acc is too large by
    for _ in tl.range(0, k_tiles, num_stages=NUM_STAGES):
        m_k = o_k < k_width
        b_w = tl.load(p_weight_row + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_w = dot_operand(b_w)  # [BLOCK_N, BLOCK_K]
        b_x = tl.load(p_x_row + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
        if PROLOGUE:
            b_wide = b_x.to(tl.float32)  # [BLOCK_T, BLOCK_K]
            b_wide = steered_block(b_wide, p_gamma, p_shift, p_row_plan, b_plan, o_k, m_k, k_width, MAGNITUDE, True)
            b_x = rounded(b_wide, p_x.dtype.element_ty)  # [BLOCK_T, BLOCK_K]
        b_x = dot_operand(b_x)  # [BLOCK_T, BLOCK_K]
        if p_x.dtype.element_ty == tl.float32:
            b_part = tl.dot(b_w, tl.trans(b_x), input_precision="ieee") - b_excess  # [BLOCK_N, BLOCK_T]
            b_sum = b_acc + b_part  # [BLOCK_N, BLOCK_T]
            b_excess = (b_sum - b_acc) - b_part
            b_acc = b_sum
        else:
            b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision="ieee")
        o_k += BLOCK_K

    b_acc = tl.trans(b_acc)  # [BLOCK_T, BLOCK_N]
    if SPLIT:
        o_part = (split * tokens + o_t[:, None]) * n_width + o_n[None, :]
        tl.store(p_out + o_part, b_acc, mask=m_t[:, None] & m_n[None, :])
    else:
        finished(
            b_acc,
            p_out,
            p_bias,
            p_gamma,
            p_shift,
            p_row_plan,
            o_t,
            o_n,
            m_t,
            m_n,
            n_width,
            not PROLOGUE,
            MAGNITUDE,
        )


@triton.jit(do_not_specialize=["tokens", "splits"])
def steered_finish_kernel(
    p_part,
    p_bias,
    p_gamma,
    p_shift,
    p_row_plan,
    p_y,
    tokens,
    n_width,
    splits,
    EPILOGUE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = s(sum_s part[s] + bias), s rising, so that results repeat; the steering s only if EPILOGUE."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t = o_t < tokens
    m_n = o_n < n_width
    o_part = o_t[:, None] * n_width + o_n[None, :]
    m_tile = m_t[:, None] & m_n[None, :]
    step = tl.cast(tokens, tl.int64) * n_width
    b_acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)  # [BLOCK_T, BLOCK_N]
    for _ in range(splits):
        b_acc += tl.load(p_part + o_part, mask=m_tile, other=0.0).to(tl.float32)
        o_part += step
    finished(b_acc, p_y, p_bias, p_gamma, p_shift, p_row_plan, o_t, o_n, m_t, m_n, n_width, EPILOGUE, MAGNITUDE)


#: The finish kernel's tile: it only streams the partial sums.
FINISH_BLOCK_N, FINISH_WARPS = 256, 4


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
    """Launches the kernels behind :func:`austeer_kernels.steered_linear`, which checks the arguments."""
    tokens, k_width = x.shape
    n_width = weight.shape[0]
    if tokens > launch.MOST_TOKENS:
        return product_and_columns(x, weight, bias, gamma, shift, prologue, magnitude, row_plan)
    y = torch.empty((tokens, n_width), dtype=x.dtype, device=x.device)
    if tokens == 0 or n_width == 0:
        return y
    if launch.elsewhere(x):
        with torch.cuda.device(x.device):
            return steered_linear(x, weight, bias, gamma, shift, prologue, magnitude, row_plan)
    op = launch.form(prologue, row_plan is not None)
    s = launch.settings(op, tokens, n_width, k_width, x.dtype, x.device)
    split = s.splits > 1
    out = torch.empty((s.splits, tokens, n_width), dtype=torch.float32, device=x.device) if split else y
    steered_linear_kernel[(-(-n_width // s.block_n), s.splits, -(-tokens // s.block_m))](
        x,
        weight,
        None if split else bias,
        gamma,
        shift,
        row_plan if prologue or not split else None,
        out,
        tokens,
        n_width,
        k_width,
        -(-k_width // (s.block_k * s.splits)),
        x.stride(0),
        weight.stride(0),
        SPLIT=split,
        PROLOGUE=prologue,
        MAGNITUDE=magnitude and (prologue or not split),
        BLOCK_T=s.block_m,
        BLOCK_N=s.block_n,
        BLOCK_K=s.block_k,
        NUM_STAGES=s.num_stages,
        num_warps=s.num_warps,
    )
    if split:
        steered_finish_kernel[(tokens, -(-n_width // FINISH_BLOCK_N))](
            out,
            bias,
            gamma,
            shift,
            None if prologue else row_plan,
            y,
            tokens,
            n_width,
            s.splits,
            EPILOGUE=not prologue,
            MAGNITUDE=magnitude and not prologue,
            BLOCK_T=1,
            BLOCK_N=FINISH_BLOCK_N,
            num_warps=FINISH_WARPS,
        )
    return y


def product_and_columns(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    shift: Tensor,
    prologue: bool,
    magnitude: bool,
    row_plan: Tensor | None,
) -> Tensor:
    """The same for many tokens: PyTorch's product, and the sparse kernel on all columns before or after it.

    The product is rounded to x's dtype before an epilogue steers it.
    """
    columns = torch.arange(gamma.shape[1], device=x.device).expand(gamma.shape)  # one list, for every plan
    # A kernel computes in the dtype that it is given, and is not differentiated.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if prologue:
            x = x.clone(memory_format=torch.contiguous_format)
            steer_columns_(x, columns, gamma, shift, magnitude, row_plan)
            return linear(x, weight, bias)
        y = linear(x, weight, bias)
        steer_columns_(y, columns, gamma, shift, magnitude, row_plan)
        return y
