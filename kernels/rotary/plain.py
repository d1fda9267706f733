"""Rotary position embedding alone: both pairings, of a head's first elements, at any positions.

    z[a] = x[a] cos - x[b] sin;   z[b] = x[b] cos + x[a] sin        cos, sin [L, r/2] at the token's position
    a, b = i, i + r/2             halves: Llama, Hugging Face
    a, b = 2 i, 2 i + 1           interleaved: GPT-J, RoFormer
    z = x from r on               where a head is wider than r

The backward is the same launch by the opposite angles, and a backward of that the launch itself. q and k take one
launch. All arithmetic is fp32, rounded once. Bytes, in items of the dtype: 2 (H + G) d a token, each way; nothing is
kept but the tables and positions.

Su et al. 2021 (RoFormer).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import (
    DTYPES,
    INTEGERS,
    cdiv,
    custom_op,
    describe,
    empty_as,
    expect,
    expect_multiples,
    next_power_of_2,
    refuse_gradients,
    resolve_backend,
)
from ..launch import launched
from ..tile import rotate, unrotate
from .forward import load_halves, pick_config
from .op import with_whole_heads
from .reference import apply_rotary_ref


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, stride_b, stride_s, stride_h, cos, sin, document, first, tokens,
    H: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    x_ptr += document.to(tl.int64) * stride_b + first.to(tl.int64) * stride_s
    out_ptr += (document.to(tl.int64) * tokens + first) * (H * D)
    token = tl.arange(0, TOKENS)[None, :, None]
    column = tl.arange(0, HALF)[None, None, :]
    dtype = out_ptr.dtype.element_ty
    for start in range(0, H, HEADS):
        head = start + tl.arange(0, HEADS)[:, None, None]
        is_head = (first + token < tokens) & (head < H)
        mask = is_head & (column < ROTATED // 2)
        read, written = token * stride_s + head * stride_h, token * (H * D) + head * D
        if INTERLEAVED:
            place = tl.arange(0, 2 * HALF)[None, None, :]
            mask = is_head & (place < ROTATED)
            pairs = tl.load(x_ptr + read + place, mask=mask, other=0.0).to(tl.float32)
            left, right = tl.split(pairs.reshape(HEADS, TOKENS, HALF, 2))
        else:
            left, right = load_halves(x_ptr, read + column, mask, ROTATED)
        if INVERSE:
            left, right = unrotate(left, right, cos, sin)
        else:
            left, right = rotate(left, right, cos, sin)
        if INTERLEAVED:
            pairs = tl.join(left, right).reshape(HEADS, TOKENS, 2 * HALF)
            tl.store(out_ptr + written + place, pairs.to(dtype), mask=mask)
        else:
            tl.store(out_ptr + written + column, left.to(dtype), mask=mask)
            tl.store(out_ptr + ROTATED // 2 + written + column, right.to(dtype), mask=mask)
        if REST:
            rest = ROTATED + tl.arange(0, REST)[None, None, :]
            mask = is_head & (rest < D)
            tl.store(out_ptr + written + rest, tl.load(x_ptr + read + rest, mask=mask, other=0.0), mask=mask)


@launched
@triton.jit
def rotate_both(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr, tokens, length, positions_stride, q_stride_b,
    q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HEADS_K: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """All heads of TOKENS tokens of a document, q's and then k's. A position outside the tables gives NaN."""
    blocks = tl.cdiv(tokens, TOKENS)
    document = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * TOKENS
    token = first + tl.arange(0, TOKENS)
    position = token.to(tl.int64)
    if positions_ptr is not None:
        places = positions_ptr + document.to(tl.int64) * positions_stride + token
        position = tl.load(places, mask=token < tokens, other=0).to(tl.int64)
    column = tl.arange(0, HALF)[None, None, :]
    position = position[None, :, None]
    mask = (position >= 0) & (position < length) & (column < ROTATED // 2)
    offsets = position * (ROTATED // 2) + column
    cos = tl.load(cos_ptr + offsets, mask=mask, other=float("nan"))
    sin = tl.load(sin_ptr + offsets, mask=mask, other=float("nan"))
    _rotate_heads(
        q_ptr, q_out_ptr, q_stride_b, q_stride_s, q_stride_h, cos, sin, document, first, tokens, H, D, ROTATED,
        INTERLEAVED, INVERSE, HEADS, TOKENS, HALF, REST,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, k_out_ptr, k_stride_b, k_stride_s, k_stride_h, cos, sin, document, first, tokens, G, D, ROTATED,
        INTERLEAVED, INVERSE, HEADS_K, TOKENS, HALF, REST,
    )  # fmt: skip


@custom_op("klora::apply_rotary", mutates_args=())
def _op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = empty_as(q), empty_as(k)
    if q.numel():
        q, k = with_whole_heads(q), with_whole_heads(k)
        batch, tokens, heads, head_dim = q.shape
        config, rotated = pick_config(max(heads, k.size(2)), head_dim), 2 * cos.size(1)
        (q_b, q_s, q_h, _), (k_b, k_s, k_h, _) = q.stride(), k.stride()
        rotate_both[(batch * cdiv(tokens, config.tokens),)](
            q_ptr=q, k_ptr=k, cos_ptr=cos, sin_ptr=sin, positions_ptr=positions, q_out_ptr=q_out, k_out_ptr=k_out,
            tokens=tokens, length=len(cos), positions_stride=tokens if positions is not None and positions.dim() == 2
            else 0, q_stride_b=q_b, q_stride_s=q_s, q_stride_h=q_h, k_stride_b=k_b, k_stride_s=k_s, k_stride_h=k_h,
            H=heads, G=k.size(2), D=head_dim, ROTATED=rotated, INTERLEAVED=interleaved, INVERSE=inverse,
            HEADS=min(config.heads, next_power_of_2(heads)),
            HEADS_K=min(config.heads, next_power_of_2(k.size(2))), TOKENS=config.tokens,
            HALF=next_power_of_2(rotated // 2),
            REST=next_power_of_2(head_dim - rotated) if head_dim > rotated else 0, num_warps=config.num_warps,
        )  # fmt: skip
    return q_out, k_out


@_op.register_fake
def _(q, k, cos, sin, positions, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, *tables, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(*tables)


def _backward(ctx, dq_out, dk_out):
    dq, dk = _op(dq_out, dk_out, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dq, dk, *(None,) * 5


_op.register_autograd(_backward, setup_context=_setup_context)


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`q` [B, S, H, d] and `k` [B, S, G, d], the first r elements of each head rotated and the others as they are.

    `cos` and `sin` are [L, r/2], as :func:`rotary_tables` of r makes them, float32 for the kernel and of any length; r
    is d or less. q and k are of one dtype, which is that of the results, and get gradients, to any order.

    `positions` int32 or int64 [B, S], or [S] for all documents, are the rows of the tables; None is 0 to S - 1. Packed
    documents start at 0 again. A position outside the tables makes its token NaN.

    Elements i and i + r/2 rotate into each other (Llama, Hugging Face), or `interleaved` 2 i and 2 i + 1 (GPT-J).

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32.
    ValueError: other shapes, dtypes or backends, tables shorter than S without positions or wider than d / 2, tensors
    on several devices, a cos or sin that requires a gradient.

    Example: q, k = apply_rotary(q, k, cos, sin, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]))
    """
    reference = resolve_backend(backend, q) == "reference"
    expect("q", q, ("B", "S", "H", "d"), () if reference else DTYPES)
    batch, tokens, heads, head_dim = q.shape
    expect("k", k, (batch, tokens, "G", head_dim), (q.dtype,), q.device)
    expect_multiples(1, H=heads, G=k.size(2))
    refuse_gradients("detach it", cos=cos, sin=sin)
    fp32 = () if reference else (torch.float32,)
    expect("cos", cos, ("L", "r/2"), fp32, q.device)
    expect("sin", sin, cos.shape, fp32, q.device)
    if not 2 <= 2 * cos.size(1) <= head_dim or (positions is None and len(cos) < tokens):
        raise ValueError(
            f"cos is {describe(cos)}; wanted [L, r/2] with r from 2 to d = {head_dim}, and without positions an L of "
            f"at least S = {tokens}"
        )
    if positions is not None:
        expect("positions", positions, (tokens,) if positions.dim() == 1 else (batch, tokens), INTEGERS, q.device)
        positions = positions.contiguous()
    if reference:
        return tuple(apply_rotary_ref(x, cos, sin, positions, interleaved) for x in (q, k))
    return _op(q, k, cos.contiguous(), sin.contiguous(), positions, interleaved, False)
