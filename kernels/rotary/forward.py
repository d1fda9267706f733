"""Launch shapes, what both directions compute, and the forward kernel.

A tile is [HEADS, TOKENS, HALF] of the left half of each head, and as much of the right: the two elements that rotate
into each other belong to one lane, and a mean over a head needs two shuffles.
"""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from ..dispatch import next_power_of_2
from ..launch import launched
from ..tile import rotate


@dataclass(frozen=True)
class NormRotaryConfig:
    heads: int
    """heads of q in one tile; as many of k, or fewer"""
    tokens: int
    half: int
    """d/2, padded"""
    num_warps: int


@functools.cache
def pick_config(heads: int, head_dim: int) -> NormRotaryConfig:
    """Tiles of 2,048 elements a half head: 16 a lane, loads of 16 bytes for 16-bit dtypes."""
    half = next_power_of_2(head_dim // 2)
    heads = min(next_power_of_2(heads), max(1, 2048 // half))
    return NormRotaryConfig(heads, max(1, 2048 // (heads * half)), half, num_warps=4)


@triton.jit
def tables(cos_ptr, sin_ptr, first, tokens, D: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """cos and sin [1, TOKENS, HALF] of the tokens from `first` on."""
    token = first + tl.arange(0, TOKENS)[None, :, None]
    column = tl.arange(0, HALF)[None, None, :]
    offsets = token * (D // 2) + column
    mask = (token < tokens) & (column < D // 2)
    return tl.load(cos_ptr + offsets, mask=mask, other=0.0), tl.load(sin_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_halves(ptr, offsets, mask, D: tl.constexpr):
    """Both halves of each head, in fp32."""
    left = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(ptr + D // 2 + offsets, mask=mask, other=0.0).to(tl.float32)
    return left, right


@triton.jit
def rstd_of(left, right, EPS: tl.constexpr, D: tl.constexpr):
    """1 / rms of each head, [HEADS, TOKENS, 1]."""
    square = tl.sum(left * left + right * right, axis=2, keep_dims=True) * (1.0 / D)
    return tl.div_rn(1.0, tl.sqrt_rn(square + EPS))


@triton.jit
def _norm_rotate(
    x_ptr, out_ptr, gain_ptr, stride_b, stride_s, stride_h, cos, sin, document, first, tokens,
    EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    x_ptr += document.to(tl.int64) * stride_b + first.to(tl.int64) * stride_s
    out_ptr += (document.to(tl.int64) * tokens + first) * (H * D)
    token = tl.arange(0, TOKENS)[None, :, None]
    column = tl.arange(0, HALF)[None, None, :]
    for start in range(0, H, HEADS):
        head = start + tl.arange(0, HEADS)[:, None, None]
        mask = (first + token < tokens) & (column < D // 2) & (head < H)
        left, right = load_halves(x_ptr, token * stride_s + head * stride_h + column, mask, D)
        factor = rstd_of(left, right, EPS, D)
        if gain_ptr is not None:
            heads = start + tl.arange(0, HEADS)
            factor *= tl.load(gain_ptr + heads, mask=heads < H, other=0.0)[:, None, None]
        offsets = token * (H * D) + head * D + column
        dtype = out_ptr.dtype.element_ty
        left, right = rotate(left, right, cos, sin)
        tl.store(out_ptr + offsets, (left * factor).to(dtype), mask=mask)
        tl.store(out_ptr + D // 2 + offsets, (right * factor).to(dtype), mask=mask)


@launched
@triton.jit
def forward(
    q_ptr, k_ptr, cos_ptr, sin_ptr, gain_ptr, q_out_ptr, k_out_ptr, tokens, q_stride_b, q_stride_s, q_stride_h,
    k_stride_b, k_stride_s, k_stride_h,
    EPS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEADS_K: tl.constexpr,
    TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, TOKENS)
    document = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * TOKENS
    cos, sin = tables(cos_ptr, sin_ptr, first, tokens, D, TOKENS, HALF)
    _norm_rotate(
        q_ptr, q_out_ptr, gain_ptr, q_stride_b, q_stride_s, q_stride_h, cos, sin, document, first, tokens, EPS, H, D,
        HEADS, TOKENS, HALF,
    )  # fmt: skip
    _norm_rotate(
        k_ptr, k_out_ptr, None, k_stride_b, k_stride_s, k_stride_h, cos, sin, document, first, tokens, EPS, G, D,
        HEADS_K, TOKENS, HALF,
    )  # fmt: skip
