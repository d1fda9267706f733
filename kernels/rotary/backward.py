"""The backward kernel: it takes the norm of q and k again."""

import triton
import triton.language as tl

from ..launch import launched
from ..tile import unrotate
from .forward import load_halves, rstd_of, tables


@triton.jit
def _norm_rotate_backward(
    dout_ptr, x_ptr, dx_ptr, gain_ptr, sums_ptr, dout_stride_b, dout_stride_s, dout_stride_h, stride_b, stride_s,
    stride_h, cos, sin, document, first, tokens,
    EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    dout_ptr += document.to(tl.int64) * dout_stride_b + first.to(tl.int64) * dout_stride_s
    x_ptr += document.to(tl.int64) * stride_b + first.to(tl.int64) * stride_s
    dx_ptr += (document.to(tl.int64) * tokens + first) * (H * D)
    token = tl.arange(0, TOKENS)[None, :, None]
    column = tl.arange(0, HALF)[None, None, :]
    for start in range(0, H, HEADS):
        head = start + tl.arange(0, HEADS)[:, None, None]
        mask = (first + token < tokens) & (column < D // 2) & (head < H)
        dleft, dright = load_halves(dout_ptr, token * dout_stride_s + head * dout_stride_h + column, mask, D)
        left, right = load_halves(x_ptr, token * stride_s + head * stride_h + column, mask, D)
        rstd = rstd_of(left, right, EPS, D)
        dleft, dright = unrotate(dleft, dright, cos, sin)
        left, right = left * rstd, right * rstd
        dot = tl.sum(dleft * left + dright * right, axis=2, keep_dims=True)
        if sums_ptr is not None:
            sums = tl.sum(dot, axis=1, keep_dims=True)
            tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * H + head, sums, mask=head < H)
        factor = rstd
        if gain_ptr is not None:
            heads = start + tl.arange(0, HEADS)
            factor *= tl.load(gain_ptr + heads, mask=heads < H, other=0.0)[:, None, None]
        mean = dot * (1.0 / D)
        offsets = token * (H * D) + head * D + column
        dtype = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + offsets, (factor * (dleft - left * mean)).to(dtype), mask=mask)
        tl.store(dx_ptr + D // 2 + offsets, (factor * (dright - right * mean)).to(dtype), mask=mask)


@launched
@triton.jit
def backward(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, gain_ptr, dq_ptr, dk_ptr, sums_ptr, tokens, dq_stride_b,
    dq_stride_s, dq_stride_h, dk_stride_b, dk_stride_s, dk_stride_h, q_stride_b, q_stride_s, q_stride_h, k_stride_b,
    k_stride_s, k_stride_h,
    EPS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEADS_K: tl.constexpr,
    TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, TOKENS)
    document = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * TOKENS
    cos, sin = tables(cos_ptr, sin_ptr, first, tokens, D, TOKENS, HALF)
    _norm_rotate_backward(
        dq_out_ptr, q_ptr, dq_ptr, gain_ptr, sums_ptr, dq_stride_b, dq_stride_s, dq_stride_h, q_stride_b, q_stride_s,
        q_stride_h, cos, sin, document, first, tokens, EPS, H, D, HEADS, TOKENS, HALF,
    )  # fmt: skip
    _norm_rotate_backward(
        dk_out_ptr, k_ptr, dk_ptr, None, None, dk_stride_b, dk_stride_s, dk_stride_h, k_stride_b, k_stride_s,
        k_stride_h, cos, sin, document, first, tokens, EPS, G, D, HEADS_K, TOKENS, HALF,
    )  # fmt: skip
