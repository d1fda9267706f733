"""Projections to Q, K and V, QK norm, rotation and attention in one op, forward and backward, all of it trained.

    q, k, v = W x;   q_h = gain_h rotate(q_h / rms(q_h)),  k_h = rotate(k_h / rms(k_h));   out = attention(q, k, v)

x [B, S, D], weight [Nq+Nk+Nv, D] of one dtype: bf16, fp16 or fp32; cos, sin [S, d/2] and gain [Nq/d] fp32 ->
out [B, T, Nq] of the last T = `tail` tokens. d is 16, 32, 64 or 128. Sums are fp32 and rounded once.

Launches, forward: the product into one stacked [B, S, N], with norm and rotation of the heads as its epilogue; then
attention. Backward: dq and delta, then dk and dv, each with the gradient of its projection as epilogue, into one
stacked [B, S, N]; then dx = dqkv W, and dW = dqkv^T x by cuBLAS. Against separate launches this saves, in items of the
dtype a token: 2 (Nq + Nk) forward, 3 (Nq + Nk) backward, and 2 N for stacking the gradients.

Kept for the backward: the stacked q, k and v, 1 / rms of each head and the logsumexp in fp32, out. dgain_h is
sum(dq_h q_h) / gain_h, summed by block, then over blocks, without atomics; where gain_h is 0 it is 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import HEAD_DIMS, causal_attention_ref
from .attention.backward import NormRotary, launch_backward
from .attention.forward import launch_forward
from .attention.op import causal_op, checked_start, checked_tail
from .dispatch import aligned, custom_op, dtypes_of, empty_grad, expect, keep_output, resolve_backend
from .linear.op import linear_dweight, linear_dx
from .linear.product import HEADS, Heads, RowNorm, launch_product
from .rms_norm import Unnormed, opened
from .rotary import norm_rotary_ref
from .rotary.op import expect_tables


def qkv_attention_ref(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    sizes: Sequence[int],
    head_dim: int,
    tail: int | None = None,
    attention: str = "math",
    start: Tensor | None = None,
) -> Tensor:
    """out [B, T, Nq]: the parts one after the other. Arguments as of :func:`qkv_attention`.

    `x` [B, S, D] and `weight` [Nq+Nk+Nv, D] of one float dtype; `cos`, `sin` [S, head_dim/2], `gain` [Nq/head_dim];
    `sizes` (Nq, Nk, Nv). T is `tail`, None is S. `attention` is PyTorch's backend of the last part. `start`
    int32 [B, S] keeps documents apart. Autograd gives all gradients.

    Example: out = qkv_attention_ref(x, weight, cos, sin, gain, sizes, head_dim=16)
    """
    parts = torch.nn.functional.linear(x, weight).split(list(sizes), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    q, k = norm_rotary_ref(q, cos, sin, gain), norm_rotary_ref(k, cos, sin)
    out = causal_attention_ref(q, k, v, attention, start).flatten(2)
    return out[:, x.size(1) - (x.size(1) if tail is None else tail) :]


@custom_op("klora::qkv_attention", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    sizes: list[int],
    head_dim: int,
    tail: int,
    is_unit: bool,
    start: Tensor | None,
    stream: Tensor | None,
    squares: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, and what the backward wants: the stacked q, k and v, 1 / rms of the heads of q and k, the logsumexp, and of
    a `stream` that is read in place of x, as of :class:`Unnormed`, 1 / rms of each row, else nothing. `is_unit` is only
    passed on to it.
    """
    heads, groups = sizes[0] // head_dim, sizes[1] // head_dim
    rstd = x.new_empty(*x.shape[:2], heads + groups, dtype=torch.float32)
    about = Heads(cos, sin, gain, rstd, heads, groups, head_dim)
    norm = _empty_norm(x, squares)
    unnormed = None if squares is None else RowNorm(norm, squares)
    qkv = launch_product(x if stream is None else stream, weight, epilogue=HEADS, heads=about, norm=unnormed)
    out = x.new_empty(x.size(0), tail, sizes[0])
    _, lse = launch_forward(*_split(qkv, sizes, head_dim), tail, out.unflatten(-1, (-1, head_dim)), gain, start=start)
    return out, qkv, rstd, lse, norm


def _empty_norm(x: Tensor, squares: Tensor | None) -> Tensor:
    return x.new_empty(0 if squares is None else x.shape[:2], dtype=torch.float32)


@_op.register_fake
def _(x, weight, cos, sin, gain, sizes, head_dim, tail, is_unit, start, stream, squares):
    heads, groups = sizes[0] // head_dim, sizes[1] // head_dim
    return (
        x.new_empty(x.size(0), tail, sizes[0]),
        x.new_empty(*x.shape[:2], weight.size(0)),
        cos.new_empty(*x.shape[:2], heads + groups),
        cos.new_empty(x.size(0), heads, tail),
        _empty_norm(x, squares),
    )


@custom_op("klora::qkv_attention_backward_", mutates_args=("dqkv", "dgain"))
def _backward_op(
    dout: Tensor,
    out: Tensor,
    qkv: Tensor,
    rstd: Tensor,
    lse: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    sizes: list[int],
    head_dim: int,
    is_unit: bool,
    start: Tensor | None,
    norm: Tensor | None,
    dqkv: Tensor,
    dgain: Tensor | None,
) -> None:
    """Writes the gradients of the stacked projections [B, S, N] and of the gain."""
    heads = sizes[0] // head_dim
    rotary = NormRotary(cos, sin, gain, rstd[..., :heads], rstd[..., heads:], is_unit, norm)
    split, grads = (_split(t, sizes, head_dim) for t in (qkv, dqkv))
    dout, out = (t.unflatten(-1, (-1, head_dim)) for t in (aligned(dout), out))
    launch_backward(dout, *split, out, lse, grads, rotary, dgain, start=start)


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel takes heads of this size."""
    return head_dim in HEAD_DIMS and head_dim <= (64 if dtype == torch.float32 else 128)


def _split(qkv: Tensor, sizes: Sequence[int], head_dim: int) -> list[Tensor]:
    """Views [B, S, heads, d] of the parts of a stacked [B, S, N]."""
    return [part.unflatten(-1, (-1, head_dim)) for part in qkv.split(list(sizes), dim=-1)]


def _setup(ctx, inputs, output):
    x, weight, cos, sin, gain, ctx.sizes, ctx.head_dim, ctx.tail, ctx.is_unit, start, stream, _ = inputs
    out, qkv, rstd, lse, norm = output
    out, ctx.is_changed = keep_output(out)
    x = (x if stream is None else stream) if ctx.needs_input_grad[1] else None
    norm = None if stream is None else norm
    ctx.save_for_backward(x, weight, cos, sin, gain, out, qkv, rstd, lse, start, norm)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, *_):
    x, weight, cos, sin, gain, out, qkv, rstd, lse, start, norm = ctx.saved_tensors
    needs_x, needs_weight, _, _, needs_gain, *_ = ctx.needs_input_grad
    if dout is None:
        return (None,) * 12
    if ctx.is_changed():
        out = causal_op(*_split(qkv, ctx.sizes, ctx.head_dim), start, ctx.tail)[0].flatten(2)
    about = ctx.sizes, ctx.head_dim, ctx.is_unit, start, norm
    dqkv, dgain = empty_grad(qkv), empty_grad(gain, needs_gain)
    _backward_op(dout, out, qkv, rstd, lse, cos, sin, gain, *about, dqkv, dgain)
    dx = linear_dx(dqkv, weight) if needs_x else None
    dweight = linear_dweight(dqkv, x) if needs_weight else None
    return dx, dweight, None, None, dgain, *(None,) * 7


_op.register_autograd(_autograd, setup_context=_setup)


def qkv_attention(
    x: Tensor | Unnormed,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    sizes: Sequence[int],
    *,
    head_dim: int,
    tail: int | None = None,
    unit_tables: bool = False,
    start: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out [B, T, Nq] of `x` [B, S, D] by `weight` [Nq+Nk+Nv, D], all of one dtype.

    `sizes` is (Nq, Nk, Nv): as many heads of v as of k, and a multiple of them of q, each `head_dim` wide. `cos` and
    `sin` are [S, head_dim/2] and `gain` is [Nq/head_dim], float32 for the kernels. T is `tail`, where only the last T
    tokens are wanted; None is S. x, weight and gain get gradients. `unit_tables` is the caller's word that cos^2 +
    sin^2 is 1, as it is of rotary_tables: the backward then does not look. `start` int32 [B, S] keeps documents apart,
    as in causal_attention. The kernels take an x that residual_mlp_norm left unnormed.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernels take
    bfloat16, float16 or float32 and a head_dim of 16, 32, 64 or, in 16 bits, 128.
    ValueError: other shapes, sizes, dtypes, tails, starts or backends, tensors on several devices, tables that require
    gradients.

    Example: out = qkv_attention(x, weight, cos, sin, gain, sizes, head_dim=16)
    """
    x, *unnormed = opened(x)
    backend, sizes = resolve_backend(backend, x), list(sizes)
    expect("x", x, ("B", "S", "D"), dtypes_of(backend))
    expect("weight", weight, (sum(sizes), x.size(2)), (x.dtype,), x.device)
    if len(sizes) != 3 or any(n % head_dim or not n for n in sizes) or sizes[1] != sizes[2] or sizes[0] % sizes[1]:
        raise ValueError(
            f"sizes are {sizes}; wanted: heads of {head_dim}, as many of v as of k, a multiple of them of q"
        )
    length = x.size(1)
    expect_tables(cos, sin, gain, (length, head_dim // 2), sizes[0] // head_dim, x.device, backend)
    tail, start = checked_tail(tail, length), checked_start(start, x)
    if backend == "reference":
        return qkv_attention_ref(x, weight, cos, sin, gain, sizes, head_dim, tail, start=start)
    if not takes(x.dtype, head_dim):
        raise ValueError(f"head_dim is {head_dim} in {x.dtype}; wanted 16, 32, 64 or, in 16 bits, 128")
    tables = (table.contiguous() for table in (cos, sin, gain))
    return _op(x, weight, *tables, sizes, head_dim, tail, unit_tables, start, *unnormed)[0]
