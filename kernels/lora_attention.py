"""Causal attention from the normed stream, with one LoRA adapter a document: projections, norms, rotation, attention.

    q, k, v = lora_qkv_rope(x, ...)          each head of q and k normed, rotated, q's times its gain
    out     = causal_attention(q, k, v)      out [B, T, H d] of the last T = `tail` tokens, or of all

    lora_cached_attention: the same of a chunk, over a cache of earlier ones (attention/cached.py)

The two ops one after the other, with one launch less in the backward: attention's backward ends in the gradients of
the projections, and lora_qkv's backward follows at once. That saves 3 (H + G) d numbers a token read or written in the
backward, and the rounding of (H + G) d.

x [B, S, D]; weight [(H + 2 G) d, D]; lora_a [slots, 3, R, D]; lora_b [slots, (H + 2 G) d, R]; cos, sin [S, d/2] (with
a cache [B, S, d/2]: each document is at a position of its own) and gain [H] fp32. Dtypes, sums, FLOPs, bytes and the
promise of the same bits in every run and every batch are those of the two ops.

Refused: what either op refuses. That includes a gradient of cos, sin or gain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import HEAD_DIMS, cached_attention_ref, causal_attention_ref
from .attention.backward import Rotary as Projected
from .attention.backward import launch_backward as attention_backward
from .attention.cached import validate_cache
from .attention.cached_keys import Cache
from .attention.forward import launch_forward as attention_forward
from .attention.op import attention_op
from .dispatch import aligned, custom_op, empty_grad, keep_output
from .lora_qkv.forward import launch_forward
from .lora_qkv.heads import Rotary
from .lora_qkv.op import adapters_and_packed, fake_outputs, fake_packed, gradients, saved
from .lora_qkv.reference import lora_qkv_rope_ref
from .lora_qkv.rope import validate_heads
from .lora_qkv.validate import validate

WITHOUT_CACHE = (None, None, None, None, 0)
"""The last arguments of the registered ops where there is no cache."""


def lora_attention_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    sizes: tuple[int, int, int],
    head_dim: int,
    slots: Tensor | None = None,
    tail: int | None = None,
    attention: str = "math",
) -> Tensor:
    """out [B, T, Nq]: the two references, one after the other. Arguments as of :func:`lora_attention`.

    `x`, `weight`, `lora_a`, `lora_b`, `cos`, `sin`, `gain`, `sizes`, `head_dim` and `slots` go to lora_qkv_rope_ref;
    `tail` is the number of last tokens wanted, None all; `attention` is PyTorch's backend. Autograd gives all
    gradients.

    Example: out = lora_attention_ref(x, weight, lora_a, lora_b, cos, sin, gain, sizes, head_dim=16, slots=slots)
    """
    projected = lora_qkv_rope_ref(x, weight, lora_a, lora_b, cos, sin, gain, sizes, head_dim, slots)
    out = causal_attention_ref(*(part.unflatten(-1, (-1, head_dim)) for part in projected), attention)
    return out.flatten(2)[:, x.size(1) - (x.size(1) if tail is None else tail) :]


def lora_cached_attention_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    cache_slots: Tensor,
    filled: Tensor,
    window: int,
    sizes: tuple[int, int, int],
    head_dim: int,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, k, v): the two references, one after the other. Arguments as of :func:`lora_cached_attention`.

    `x`, `weight`, `lora_a`, `lora_b`, `cos`, `sin` [B, T, head_dim/2], `gain`, `sizes`, `head_dim` and `slots` go to
    lora_qkv_rope_ref; `cache_k`, `cache_v`, `cache_slots`, `filled` and `window` to cached_attention_ref. Autograd
    gives all gradients of out; k and v have none.

    Example: out, k, v = lora_cached_attention_ref(
        x, weight, lora_a, lora_b, own_cos, own_sin, gain, cache_k, cache_v, slots, filled, 12, sizes, 16, slots)
    """
    projected = lora_qkv_rope_ref(x, weight, lora_a, lora_b, cos, sin, gain, sizes, head_dim, slots)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in projected)
    out = cached_attention_ref(q, k, v, cache_k, cache_v, cache_slots, filled, window)
    return out.flatten(2), k.detach(), v.detach()


def lora_attention(
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
    tail: int | None = None,
    grads: tuple[Tensor, Tensor] | None = None,
    unit_tables: bool = False,
    backend: str | None = None,
) -> Tensor:
    """out [B, T, Nq] of `x` [B, S, D], in x's dtype: causal attention over lora_qkv_rope's q, k and v.

    `weight`, `lora_a`, `lora_b`, `cos`, `sin`, `gain`, `slots`, `sizes` and `grads` are those of :func:`lora_qkv_rope`.
    `head_dim` is one that both ops take: 16, 32, 64 or, in 16 bits with ranks up to 16, 128. T is `tail`, the number of
    last tokens wanted; None is all. `unit_tables` is as of :func:`qkv_attention`.

    x, weight, lora_a and lora_b get gradients. out may be changed in place: the backward, which reads it, then makes it
    again.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: what either op refuses.

    Example: out = lora_attention(x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, head_dim=16)
    """
    backend, sizes, slots = validate(x, weight, lora_a, lora_b, slots, sizes, grads, backend)
    validate_heads(x, lora_a, cos, sin, gain, sizes, head_dim, backend)
    _validate_attention(sizes, head_dim, backend)
    tail = x.size(1) if tail is None else tail
    if not 0 <= tail <= x.size(1):
        raise ValueError(f"tail is {tail}; allowed: 0 to S, {x.size(1)}")
    if backend == "reference":
        return lora_attention_ref(x, weight, lora_a, lora_b, cos, sin, gain, tuple(sizes), head_dim, slots, tail)
    tables = (table.contiguous() for table in (cos, sin, gain))
    about = slots, sizes, head_dim, tail, *(grads or (None, None)), unit_tables
    return _op(x, weight, lora_a, lora_b, *tables, *about, *WITHOUT_CACHE)[0]


def lora_cached_attention(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    cache_slots: Tensor,
    filled: Tensor,
    window: int,
    slots: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    *,
    head_dim: int,
    grads: tuple[Tensor, Tensor] | None = None,
    unit_tables: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, T, Nq], k, v [B, T, Nk / head_dim, head_dim]) of the chunks `x` [B, T, D], in x's dtype: attention over
    lora_qkv_rope's q, k and v and over the cache of each document's earlier tokens.

    `weight`, `lora_a`, `lora_b`, `gain`, `slots`, `sizes`, `grads`, `head_dim` and `unit_tables` are those of
    :func:`lora_attention`. `cos` and `sin` float32 [B, T, head_dim/2] belong to positions filled[b] .. filled[b] + T -
    1 of the document: `table[filled[:, None] + torch.arange(T)]`, gathered once for all blocks. `cache_k`, `cache_v`,
    `filled` and `window` are those of :func:`cached_attention`, and `cache_slots` are its slots.

    x, weight, lora_a and lora_b get gradients, from out alone. k and v are for :func:`cache_write_`, after the
    backward. out may be changed in place; k and v, which the backward reads too, may not before it.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: what either op refuses.

    Example: out, k, v = lora_cached_attention(
        x, weight, lora_a, lora_b, own_cos, own_sin, gain, cache_k, cache_v, slots, filled, window=12, slots=slots,
        sizes=sizes, head_dim=16)
    """
    backend, sizes, slots = validate(x, weight, lora_a, lora_b, slots, sizes, grads, backend)
    validate_heads(x, lora_a, cos, sin, gain, sizes, head_dim, backend, own_tables=True)
    _validate_attention(sizes, head_dim, backend)
    shape = [*x.shape[:2], sizes[1] // head_dim, head_dim]
    validate_cache(cache_k, cache_v, cache_slots, filled, window, shape, x, "cache_slots")
    cache = cache_k, cache_v, cache_slots, filled, window
    if backend == "reference":
        return lora_cached_attention_ref(
            x, weight, lora_a, lora_b, cos, sin, gain, *cache, tuple(sizes), head_dim, slots
        )
    tables = (table.contiguous() for table in (cos, sin, gain))
    about = slots, sizes, head_dim, x.size(1), *(grads or (None, None)), unit_tables
    out, _, _, k, v, *_ = _op(x, weight, lora_a, lora_b, *tables, *about, *cache)
    return out, *_heads((k, v), head_dim)


def _validate_attention(sizes, head_dim, backend) -> None:
    if sizes[1] != sizes[2] or sizes[0] % sizes[1]:
        raise ValueError(f"sizes is {tuple(sizes)}; wanted as many heads of v as of k, and a multiple of them of q")
    if backend == "triton" and head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}; the kernel wants one of {', '.join(map(str, HEAD_DIMS))}")


@custom_op("klora::lora_attention", mutates_args=())
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
    tail: int,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    is_unit: bool,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    cache_slots: Tensor | None,
    filled: Tensor | None,
    window: int,
) -> list[Tensor]:
    """out, and what the backward wants: logsumexp, q, k, v, xa, packed adapters, 1 / rms of the heads of q and k."""
    adapters, packed = adapters_and_packed(x, lora_a, lora_b, slots, sizes)
    made = launch_forward(aligned(x), aligned(weight), adapters, sizes, Rotary(cos, sin, gain, head_dim))
    out = x.new_empty(x.size(0), tail, sizes[0])
    cache = Cache.of(cache_k, cache_v, cache_slots, filled, window)
    _, lse = attention_forward(*_heads(made.outs, head_dim), tail, *_heads([out], head_dim), cache=cache)
    return [out, lse, *made.outs, made.xa, *packed, made.rstd_q, made.rstd_k]


@_op.register_fake
def _(x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, head_dim, tail, grad_a, grad_b, is_unit, *cache):
    out = x.new_empty(x.size(0), tail, sizes[0])
    lse = cos.new_empty(x.size(0), sizes[0] // head_dim, tail)
    rstds = (cos.new_empty(*x.shape[:2], size // head_dim) for size in sizes[:2])
    return [out, lse, *fake_outputs(x, sizes, lora_a.size(2)), *fake_packed(x, weight, lora_a), *rstds]


@custom_op("klora::lora_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    is_unit: bool,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    cache_slots: Tensor | None,
    filled: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the three projections."""
    if not dout.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    head_dim = 2 * cos.size(-1)
    dout, out = _heads((aligned(dout), out), head_dim)
    projected = Projected(cos, sin, gain, rstd_q, rstd_k, is_unit)
    cache = Cache.of(cache_k, cache_v, cache_slots, filled, window)
    grads = [empty_grad(part) for part in (q, k, v)]
    heads, dheads = _heads((q, k, v), head_dim), _heads(grads, head_dim)
    attention_backward(dout, *heads, out, lse, dheads, projected, cache=cache)
    return tuple(grads)


@_backward_op.register_fake
def _(dout, out, lse, q, k, v, cos, sin, gain, rstd_q, rstd_k, is_unit, *cache):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx, inputs, output):
    x, weight, lora_a, lora_b, cos, sin, gain, slots, _, _, _, grad_a, grad_b, ctx.is_unit, *cache, ctx.window = inputs
    out, lse, q, k, v, xa, packed_a, packed_b, rstd_q, rstd_k = output
    out, ctx.is_changed = keep_output(out)
    attended = out, lse, q, k, v, cos, sin, gain, rstd_q, rstd_k, *cache
    ctx.save_for_backward(*saved(x, weight, lora_a, lora_b, slots, xa, packed_a, packed_b), *attended)
    ctx.lora = lora_a.size(0), lora_a.size(2), lora_a.dtype
    ctx.grads = grad_a, grad_b
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, douts):
    if douts[0] is None:
        return (None,) * 19
    out, lse, q, k, v, cos, *others = ctx.saved_tensors[6:-4]
    cache = *ctx.saved_tensors[-4:], ctx.window
    if ctx.is_changed():
        out = attention_op(*_heads((q, k, v), 2 * cos.size(-1)), out.size(1), None, *cache)[0].flatten(2)
    return *gradients(ctx, _backward_op(douts[0], out, lse, q, k, v, cos, *others, ctx.is_unit, *cache)), *(None,) * 15


_op.register_autograd(_backward, setup_context=_setup)


def _heads(tensors: Sequence[Tensor], head_dim: int) -> list[Tensor]:
    return [tensor.unflatten(-1, (-1, head_dim)) for tensor in tensors]
