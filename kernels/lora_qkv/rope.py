"""The projections with QK norm, rotation and gain in the same launch, forward and backward."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import aligned, custom_op, keep_output, refuse_gradients
from ..tile import UNIT, off_unit, unrotate
from .adapters import unpacked
from .forward import launch_forward, pick_forward_config
from .heads import Rotary
from .op import adapters_and_packed, fake_outputs, fake_packed, gradients, saved
from .reference import lora_qkv_rope_ref
from .validate import validate

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
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, b = tl.program_id(1), tl.program_id(2)
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
    backend, sizes, slots = validate(x, weight, lora_a, lora_b, slots, sizes, grads, backend)
    validate_heads(x, lora_a, cos, sin, gain, sizes, head_dim, backend)
    if backend == "reference":
        return lora_qkv_rope_ref(x, weight, lora_a, lora_b, cos, sin, gain, tuple(sizes), head_dim, slots)
    tables = (table.contiguous() for table in (cos, sin, gain))
    return _op(x, weight, lora_a, lora_b, *tables, slots, sizes, head_dim, *(grads or (None, None)))[:3]


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
    adapters, packed = adapters_and_packed(x, lora_a, lora_b, slots, sizes)
    made = launch_forward(aligned(x), aligned(weight), adapters, sizes, Rotary(cos, sin, gain, head_dim))
    return *made.outs, made.xa, *packed, made.rstd_q, made.rstd_k


@_op.register_fake
def _(x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, head_dim, grad_a, grad_b):
    rstds = (cos.new_empty(*x.shape[:2], size // head_dim) for size in sizes[:2])
    return *fake_outputs(x, sizes, lora_a.size(2)), *fake_packed(x, weight, lora_a), *rstds


@custom_op("klora::lora_qkv_rope_heads_backward", mutates_args=())
def _heads_backward_op(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k before norm, rotation and gain."""
    heads, groups, head_dim = rstd_q.size(2), rstd_k.size(2), 2 * cos.size(1)
    outs = torch.empty_like(q), torch.empty_like(k)
    if q.numel():
        dq, dk = (dout if dout.stride(2) == 1 else dout.contiguous() for dout in (dq, dk))
        _heads_backward_kernel[(triton.cdiv(q.size(1), TOKENS), heads + groups, q.size(0))](
            dq, dk, q, k, rstd_q, rstd_k, cos, sin, gain, *outs, *dq.stride()[:2], *dk.stride()[:2], q.size(1),
            H=heads, G=groups, D=head_dim, TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip
    return outs


@_heads_backward_op.register_fake
def _(dq, dk, q, k, rstd_q, rstd_k, cos, sin, gain):
    return torch.empty_like(q), torch.empty_like(k)


def _setup(ctx, inputs, output):
    x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, _, grad_a, grad_b = inputs
    q, k, _, xa, packed_a, packed_b, rstd_q, rstd_k = output
    (q, ctx.is_q_changed), (k, ctx.is_k_changed) = keep_output(q), keep_output(k)
    heads = q, k, rstd_q, rstd_k, cos, sin, gain
    ctx.save_for_backward(*saved(x, weight, lora_a, lora_b, slots, xa, packed_a, packed_b), *heads)
    ctx.lora = lora_a.size(0), lora_a.size(2), lora_a.dtype
    ctx.grads, ctx.sizes = (grad_a, grad_b), sizes
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, *douts):
    (x, weight, a, b, _, slots), (q, k, *heads) = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    if ctx.is_q_changed() or ctx.is_k_changed():
        lora = (a, b, slots) if a.dim() == 4 else (*unpacked(a, b, ctx.lora[1], ctx.sizes), None)
        cos, sin, gain = heads[2:]
        q, k, *_ = _op(x, weight, *lora[:2], cos, sin, gain, lora[2], ctx.sizes, 2 * cos.size(1), None, None)
    dq, dk, dv = (x.new_zeros(*x.shape[:2], n) if d is None else d for d, n in zip(douts[:3], ctx.sizes, strict=True))
    return *gradients(ctx, (*_heads_backward_op(dq, dk, q, k, *heads), dv)), *(None,) * 8


_op.register_autograd(_backward, setup_context=_setup)


def validate_heads(x, lora_a, cos, sin, gain, sizes, head_dim, backend, own_tables=False) -> None:
    """Raises ValueError on heads and tables that the backend does not take; `own_tables`: each document has its own."""
    refuse_gradients("detach it", cos=cos, sin=sin)
    refuse_gradients("detach it, or use lora_qkv and norm_rotary", gain=gain)
    if head_dim < 2 or head_dim % 2 or any(size % head_dim for size in sizes[:2]):
        raise ValueError(f"head_dim is {head_dim} and sizes {tuple(sizes)}; wanted an even divisor of the first two")
    table = [*x.shape[:2], head_dim // 2] if own_tables else [x.size(1), head_dim // 2]
    for name, tensor, shape in (
        ("cos", cos, table),
        ("sin", sin, table),
        ("gain", gain, [sizes[0] // head_dim]),
    ):
        if list(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(f"{name} is {list(tensor.shape)} on {tensor.device}; wanted {shape} on {x.device}")
        if backend == "triton" and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}; the kernel wants float32")
    widest = pick_forward_config(x.dtype, lora_a.size(2)).widest_head
    if backend == "triton" and (head_dim & (head_dim - 1) or head_dim > widest):
        raise ValueError(f"head_dim is {head_dim}; the kernel wants a power of two up to {widest}")
