"""The projections with QK norm, rotation and gain in the same launch, forward and backward."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, custom_op, empty_grad, keep_output, refuse_gradients
from ..launch import launched
from ..rotary.op import expect_tables
from ..tile import UNIT, off_unit, unrotate
from .adapters import unpacked
from .forward import empty_projected, launch_forward, pick_forward_config
from .heads import HeadTables
from .op import Lora, Saved, gradients, with_zeros
from .reference import lora_qkv_rope_ref
from .validate import expect_projections

TOKENS = 64
"""Tokens of one head in a program of the backward."""


@triton.jit
def _head_gradient(
    dout_ptr, out_ptr, rstd_ptr, dx_ptr, gain, cos, sin, offsets, mask, rstd_offsets, stride_b, stride_s, b, token,
    head, D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, HALF)
    dout_offsets = b.to(tl.int64) * stride_b + token.to(tl.int64) * stride_s + head * D
    dout_ptr += dout_offsets[:, None] + column
    dleft = tl.load(dout_ptr, mask[:, None], other=0.0).to(tl.float32)
    dright = tl.load(dout_ptr + HALF, mask[:, None], other=0.0).to(tl.float32)
    left = tl.load(out_ptr + offsets, mask[:, None], other=0.0).to(tl.float32)
    right = tl.load(out_ptr + HALF + offsets, mask[:, None], other=0.0).to(tl.float32)
    # The norm's sum along a head is the same before and after unrotating, whatever the tables' length. A gain of 0 lets
    # no gradient through.
    share = tl.sum(dleft * left + dright * right, 1) * (1.0 / D) * tl.where(gain == 0.0, 0.0, 1.0 / (gain * gain))
    if off_unit(cos, sin) > UNIT:
        inverse = 1.0 / (cos * cos + sin * sin)
        left, right = left * inverse, right * inverse
    dleft, dright = dleft - left * share[:, None], dright - right * share[:, None]
    factor = (tl.load(rstd_ptr + rstd_offsets, mask, other=0.0) * gain)[:, None]
    dtype = dx_ptr.dtype.element_ty
    dleft, dright = unrotate(dleft, dright, cos, sin)
    tl.store(dx_ptr + offsets, (dleft * factor).to(dtype), mask[:, None])
    tl.store(dx_ptr + HALF + offsets, (dright * factor).to(dtype), mask[:, None])


@launched
@triton.jit(do_not_specialize=["S"])
def _heads_backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, rstd_q_ptr, rstd_k_ptr, cos_ptr, sin_ptr, gain_ptr, dq_ptr, dk_ptr,
    q_stride_b, q_stride_s, k_stride_b, k_stride_s, S,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head of q and then of k, document): the gradient before norm, rotation and gain.

    With z = gain n rotated, all that is kept of a head: dx = rstd gain (dz - z / l mean(dz z) / gain^2) rotated back,
    l = cos^2 + sin^2 of the element's pair. Where all l of a tile are 1, nothing is divided.
    """
    HALF: tl.constexpr = D // 2
    blocks = tl.cdiv(S, TOKENS)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    head, b = tl.program_id(0) // blocks % (H + G), tl.program_id(0) // blocks // (H + G)
    mask = token < S
    table = token[:, None] * HALF + tl.arange(0, HALF)
    cos = tl.load(cos_ptr + table, mask[:, None], other=1.0)
    sin = tl.load(sin_ptr + table, mask[:, None], other=0.0)
    row = b.to(tl.int64) * S + token
    if head < H:
        gain = tl.load(gain_ptr + head)
        offsets = row[:, None] * (H * D) + head * D + tl.arange(0, HALF)
        _head_gradient(
            dq_out_ptr, q_ptr, rstd_q_ptr, dq_ptr, gain, cos, sin, offsets, mask, row * H + head, q_stride_b,
            q_stride_s, b, token, head, D, HALF,
        )  # fmt: skip
    else:
        head -= H
        offsets = row[:, None] * (G * D) + head * D + tl.arange(0, HALF)
        _head_gradient(
            dk_out_ptr, k_ptr, rstd_k_ptr, dk_ptr, 1.0, cos, sin, offsets, mask, row * G + head, k_stride_b,
            k_stride_s, b, token, head, D, HALF,
        )  # fmt: skip


@custom_op("klora::lora_qkv_rope", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    slots: Tensor | None,
    sizes: list[int],
    head_dim: int,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and what the backward wants: xa, packed adapters, 1 / rms of the heads of q and k."""
    return launch_forward(x, weight, lora_a, lora_b, slots, sizes, HeadTables(cos, sin, gain, head_dim)).flat()


@_op.register_fake
def _(x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, head_dim, grad_a, grad_b):
    return empty_projected(x, lora_a, lora_b, sizes, head_dim).flat()


@custom_op("klora::lora_qkv_rope_heads_backward_", mutates_args=("dq", "dk"))
def _heads_backward_op(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    dq: Tensor,
    dk: Tensor,
) -> None:
    """Writes the gradients of q and k before norm, rotation and gain."""
    heads, groups, head_dim = rstd_q.size(2), rstd_k.size(2), 2 * cos.size(1)
    if q.numel():
        dq_out, dk_out = (dout if dout.stride(2) == 1 else dout.contiguous() for dout in (dq_out, dk_out))
        _heads_backward_kernel[(cdiv(q.size(1), TOKENS) * (heads + groups) * q.size(0),)](
            dq_out_ptr=dq_out, dk_out_ptr=dk_out, q_ptr=q, k_ptr=k, rstd_q_ptr=rstd_q, rstd_k_ptr=rstd_k, cos_ptr=cos,
            sin_ptr=sin, gain_ptr=gain, dq_ptr=dq, dk_ptr=dk, q_stride_b=dq_out.stride(0), q_stride_s=dq_out.stride(1),
            k_stride_b=dk_out.stride(0), k_stride_s=dk_out.stride(1), S=q.size(1),
            H=heads, G=groups, D=head_dim, TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip


def _setup(ctx, inputs, output):
    x, weight, lora_a, lora_b, cos, sin, gain, slots, ctx.sizes, _, *grads = inputs
    q, k, _, xa, packed_a, packed_b, rstd_q, rstd_k = output
    (q, ctx.is_q_changed), (k, ctx.is_k_changed) = keep_output(q), keep_output(k)
    saved = Saved.of(x, weight, lora_a, lora_b, slots, xa, packed_a, packed_b)
    ctx.save_for_backward(*saved, q, k, rstd_q, rstd_k, cos, sin, gain)
    ctx.lora = Lora.of(lora_a, lora_b, *grads)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, *douts):
    saved, (q, k, *heads) = Saved.split(ctx.saved_tensors)
    if ctx.is_q_changed() or ctx.is_k_changed():
        x, weight, a, b, _, slots = saved
        if ctx.lora.dtype != x.dtype:
            (a, b), slots = unpacked(a, b, ctx.lora.b_shape[2], ctx.sizes), None
        q, k, *_ = _op(x, weight, a, b, *heads[2:], slots, ctx.sizes, 2 * heads[2].size(1), None, None)
    dq_out, dk_out, dv = with_zeros(saved.x, douts[:3], ctx.sizes)
    dq, dk = empty_grad(q), empty_grad(k)
    _heads_backward_op(dq_out, dk_out, q, k, *heads, dq, dk)
    return *gradients(saved, ctx.lora, ctx.needs_input_grad[:4], (dq, dk, dv)), *(None,) * 8


_op.register_autograd(_backward, setup_context=_setup)


def expect_heads(
    x: Tensor,
    lora_b: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    sizes: Sequence[int],
    head_dim: int,
    backend: str,
    own_tables: bool = False,
) -> None:
    """Raises on heads and tables that the backend does not take; `own_tables`: each document has its own."""
    refuse_gradients("detach it, or use lora_qkv and norm_rotary", gain=gain)
    if head_dim < 2 or head_dim % 2 or any(size % head_dim for size in sizes[:2]):
        raise ValueError(f"head_dim is {head_dim} and sizes {tuple(sizes)}; wanted an even divisor of the first two")
    shape = (*x.shape[:2], head_dim // 2) if own_tables else (x.size(1), head_dim // 2)
    expect_tables(cos, sin, gain, shape, sizes[0] // head_dim, x.device, backend)
    widest = pick_forward_config(x.dtype, lora_b.size(2)).widest_head
    if backend == "triton" and (head_dim & (head_dim - 1) or head_dim > widest):
        raise ValueError(f"head_dim is {head_dim}; wanted a power of two up to {widest}")


def lora_qkv_rope(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    slots: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    *,
    head_dim: int,
    grads: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as of :func:`lora_qkv`; each head of q and k is normed to rms 1, rotated, and q's times its gain.

    `x`, `weight`, `lora_a`, `lora_b`, `slots`, `sizes` and `grads` are those of :func:`lora_qkv`, and so are the
    gradients. `cos` and `sin` [S, head_dim/2] and `gain` [Nq/head_dim] are float32 and get no gradient (that of gain
    comes from `norm_rotary`). The tables may be scaled: cos^2 + sin^2 is whatever it is, but 0, whose gradient is NaN.

    The head is a row's `head_dim` neighbours, whose halves rotate into each other (as in `norm_rotary`). Sums are fp32
    until the one rounding at the end. q and k may be changed in place: the backward, which reads them, then makes them
    again.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. In the kernel
    head_dim is a power of two up to 128; up to 64 in float32 and for ranks above 16.
    ValueError: what :func:`lora_qkv` refuses, another head_dim, tables or gain of another shape, or one that requires a
    gradient.

    Example: q, k, v = lora_qkv_rope(x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, head_dim=16)
    """
    backend, sizes, slots = expect_projections(x, weight, lora_a, lora_b, slots, sizes, grads, backend)
    expect_heads(x, lora_b, cos, sin, gain, sizes, head_dim, backend)
    if backend == "reference":
        return lora_qkv_rope_ref(x, weight, lora_a, lora_b, cos, sin, gain, tuple(sizes), head_dim, slots)
    tables = (table.contiguous() for table in (cos, sin, gain))
    return _op(x, weight, lora_a, lora_b, *tables, slots, sizes, head_dim, *(grads or (None, None)))[:3]
