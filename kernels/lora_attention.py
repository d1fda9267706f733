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

from torch import Tensor

from .attention import HEAD_DIMS, cached_attention_ref, causal_attention_ref
from .attention.backward import NormRotary
from .attention.backward import launch_backward as attention_backward
from .attention.cached import validate_cache
from .attention.cached_keys import Cache
from .attention.forward import launch_forward as attention_forward
from .attention.op import WITHOUT_CACHE, cached_op, causal_op, checked_tail
from .dispatch import aligned, custom_op, empty_grad, expect_one_of, keep_output
from .lora_qkv.forward import empty_projected, launch_forward
from .lora_qkv.heads import HeadTables
from .lora_qkv.op import Lora, Saved, gradients
from .lora_qkv.reference import lora_qkv_rope_ref
from .lora_qkv.rope import expect_heads
from .lora_qkv.validate import expect_projections
from .rms_norm import Unnormed, opened


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
    stream: Tensor | None,
    squares: Tensor | None,
) -> list[Tensor]:
    """out, and what the backward wants: logsumexp, q, k, v, xa, packed adapters, 1 / rms of the heads of q and k; of a
    `stream` that is read in place of x, as of :class:`Unnormed`, 1 / rms of each row.
    """
    read, heads = x if stream is None else stream, HeadTables(cos, sin, gain, head_dim)
    made = launch_forward(read, weight, lora_a, lora_b, slots, sizes, heads, squares=squares)
    out = x.new_empty(x.size(0), tail, sizes[0])
    cache = Cache.of(cache_k, cache_v, cache_slots, filled, window)
    _, lse = attention_forward(*_heads(made.outs, head_dim), tail, *_heads([out], head_dim), cache=cache)
    return [out, lse, *made.flat(), *([] if squares is None else [made.norm])]


@_op.register_fake
def _(x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, head_dim, tail, grad_a, grad_b, is_unit, *more):
    out = x.new_empty(x.size(0), tail, sizes[0])
    lse = cos.new_empty(x.size(0), sizes[0] // head_dim, tail)
    norm = [] if more[-1] is None else [cos.new_empty(x.shape[:2])]
    return [out, lse, *empty_projected(x, lora_a, lora_b, sizes, head_dim).flat(), *norm]


@custom_op("klora::lora_attention_backward_", mutates_args=("dq", "dk", "dv"))
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
    norm: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes the gradients of the three projections."""
    head_dim = 2 * cos.size(-1)
    dout, out, q, k, v, *grads = _heads((aligned(dout), out, q, k, v, dq, dk, dv), head_dim)
    rotary = NormRotary(cos, sin, gain, rstd_q, rstd_k, is_unit, norm)
    cache = Cache.of(cache_k, cache_v, cache_slots, filled, window)
    attention_backward(dout, q, k, v, out, lse, grads, rotary, cache=cache)


def _setup(ctx, inputs, output):
    x, weight, lora_a, lora_b, cos, sin, gain, slots, _, _, _, grad_a, grad_b, ctx.is_unit, *more = inputs
    *cache, ctx.window, stream, _ = more
    out, lse, q, k, v, xa, packed_a, packed_b, rstd_q, rstd_k, *norm = output
    out, ctx.is_changed = keep_output(out)
    saved = Saved.of(x if stream is None else stream, weight, lora_a, lora_b, slots, xa, packed_a, packed_b)
    ctx.save_for_backward(*saved, *cache, out, lse, q, k, v, cos, sin, gain, rstd_q, rstd_k, *norm)
    ctx.lora = Lora.of(lora_a, lora_b, grad_a, grad_b)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, douts):
    if douts[0] is None:
        return (None,) * 21
    saved, kept = Saved.split(ctx.saved_tensors)
    *cache, out, lse, q, k, v, cos, sin, gain, rstd_q, rstd_k = kept[:14]
    cache, norm = (*cache, ctx.window), kept[14] if len(kept) > 14 else None
    if ctx.is_changed():
        heads = _heads((q, k, v), 2 * cos.size(-1))
        out = (causal_op(*heads, None, out.size(1)) if cache[0] is None else cached_op(*heads, *cache))[0].flatten(2)
    grads = empty_grad(q), empty_grad(k), empty_grad(v)
    _backward_op(douts[0], out, lse, q, k, v, cos, sin, gain, rstd_q, rstd_k, ctx.is_unit, *cache, norm, *grads)
    return *gradients(saved, ctx.lora, ctx.needs_input_grad[:4], grads), *(None,) * 17


_op.register_autograd(_backward, setup_context=_setup)


def _heads(tensors: Sequence[Tensor], head_dim: int) -> list[Tensor]:
    return [tensor.unflatten(-1, (-1, head_dim)) for tensor in tensors]


def _expect(
    x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, head_dim, grads, backend, own_tables=False
) -> tuple[str, list[int], Tensor | None]:
    """The backend that runs, the sizes and contiguous slots; raises on what it does not take but tail and cache."""
    backend, sizes, slots = expect_projections(x, weight, lora_a, lora_b, slots, sizes, grads, backend)
    expect_heads(x, lora_b, cos, sin, gain, sizes, head_dim, backend, own_tables)
    if sizes[1] != sizes[2] or sizes[0] % sizes[1]:
        raise ValueError(f"sizes is {tuple(sizes)}; wanted as many heads of v as of k, and a multiple of them of q")
    if backend == "triton":
        expect_one_of("head_dim", head_dim, HEAD_DIMS)
    return backend, sizes, slots


def lora_attention(
    x: Tensor | Unnormed,
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
    last tokens wanted; None is all. `unit_tables` is as of :func:`qkv_attention`. The kernel takes an x that
    residual_mlp_norm left unnormed.

    x, weight, lora_a and lora_b get gradients. out may be changed in place: the backward, which reads it, then makes it
    again.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: what either op refuses.

    Example: out = lora_attention(x, weight, lora_a, lora_b, cos, sin, gain, slots, sizes, head_dim=16)
    """
    x, *unnormed = opened(x)
    given = x, weight, lora_a, lora_b, cos, sin, gain
    backend, sizes, slots = _expect(*given, slots, sizes, head_dim, grads, backend)
    tail = checked_tail(tail, x.size(1))
    if backend == "reference":
        return lora_attention_ref(*given, tuple(sizes), head_dim, slots, tail)
    tables = (table.contiguous() for table in (cos, sin, gain))
    about = slots, sizes, head_dim, tail, *(grads or (None, None)), unit_tables
    return _op(x, weight, lora_a, lora_b, *tables, *about, *WITHOUT_CACHE, *unnormed)[0]


def lora_cached_attention(
    x: Tensor | Unnormed,
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
    lora_qkv_rope's q, k and v and over the cache of each document's earlier tokens. x may be unnormed as there.

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
    x, *unnormed = opened(x)
    given = x, weight, lora_a, lora_b, cos, sin, gain
    backend, sizes, slots = _expect(*given, slots, sizes, head_dim, grads, backend, own_tables=True)
    shape = [*x.shape[:2], sizes[1] // head_dim, head_dim]
    validate_cache(cache_k, cache_v, cache_slots, filled, window, shape, x, "cache_slots")
    cache = cache_k, cache_v, cache_slots, filled, window
    if backend == "reference":
        return lora_cached_attention_ref(*given, *cache, tuple(sizes), head_dim, slots)
    tables = (table.contiguous() for table in (cos, sin, gain))
    about = slots, sizes, head_dim, x.size(1), *(grads or (None, None)), unit_tables
    out, _, _, k, v, *_ = _op(x, weight, lora_a, lora_b, *tables, *about, *cache, *unnormed)
    return out, *_heads((k, v), head_dim)
