"""The registered ops, their autograd, the checks that attention over a cache shares, and the public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import (
    DTYPES,
    aligned,
    custom_op,
    empty_grad,
    expect,
    expect_multiples,
    expect_one_of,
    keep_output,
    resolve_backend,
)
from .backward import launch_backward
from .cached_keys import Cache
from .forward import launch_forward
from .reference import causal_attention_ref, packed_starts

HEAD_DIMS = (16, 32, 64, 128)
"""Head sizes of the ops that norm, rotate or cache heads."""
MOST_HEAD = 256
"""Attention alone takes every multiple of 8 up to here."""
WITHOUT_CACHE = (None, None, None, None, 0)
"""What ops that may have a cache take where there is none."""


@custom_op("klora::causal_attention", mutates_args=())
def causal_op(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, tail: int) -> tuple[Tensor, Tensor]:
    """out, and the logsumexp that the backward wants."""
    return launch_forward(aligned(q), aligned(k), aligned(v), tail, start=start)


@custom_op("klora::cached_attention", mutates_args=())
def cached_op(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, slots: Tensor, filled: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """As :func:`causal_op`, over a cache too. An op of its own: each argument costs PyTorch's autograd 3 us a call."""
    cache = Cache.of(cache_k, cache_v, slots, filled, window)
    return launch_forward(aligned(q), aligned(k), aligned(v), q.size(1), cache=cache)


def _fake(q: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = q.shape
    return q.new_empty(batch, tail, heads, width), q.new_empty(batch, heads, tail, dtype=torch.float32)


causal_op.register_fake(lambda q, k, v, start, tail: _fake(q, tail))
cached_op.register_fake(lambda q, *_: _fake(q, q.size(1)))


@custom_op("klora::attention_backward", mutates_args=("dq", "dk", "dv"))
def _backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    slots: Tensor | None,
    filled: Tensor | None,
    window: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    cache = Cache.of(cache_k, cache_v, slots, filled, window)
    inputs = (aligned(t) for t in (dout, q, k, v))
    launch_backward(*inputs, out, lse, (dq, dk, dv), cache=cache, start=start)


def _setup(ctx, inputs, output):
    *tensors, ctx.number = inputs
    out, ctx.is_changed = keep_output(output[0])
    ctx.save_for_backward(out, output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    out, lse, q, k, v, *others = ctx.saved_tensors
    nothing = (None,) * (len(others) + 1)
    if dout is None:
        return None, None, None, *nothing
    is_cached = len(others) > 1
    if ctx.is_changed():
        out = (cached_op if is_cached else causal_op)(q, k, v, *others, ctx.number)[0]
    grads = [empty_grad(t) for t in (q, k, v)]
    about = (None, *others, ctx.number) if is_cached else (*others, *WITHOUT_CACHE)
    _backward_op(dout, q, k, v, out, lse, *about, *grads)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *nothing


for op in (causal_op, cached_op):
    op.register_autograd(_backward, setup_context=_setup)


def check_heads(name: str, x: Tensor, backend: str, sizes: Sequence[int] = ()) -> None:
    """ValueError unless `x` is [B, S, H, d] with heads that the backend takes: of these `sizes`, or of any multiple of
    16 bytes in 16 bits.
    """
    takes_kernel = backend == "triton"
    expect(name, x, ("B", "S", "H", "d"), DTYPES if takes_kernel else ())
    if not x.size(2):
        raise ValueError(f"{name} has no heads; wanted at least one")
    if takes_kernel and sizes:
        expect_one_of("d", x.size(3), sizes)
    elif takes_kernel:
        expect_multiples(8, MOST_HEAD, d=x.size(3))


def check_qkv(q: Tensor, k: Tensor, v: Tensor, backend: str | None, sizes: Sequence[int] = ()) -> str:
    """The backend that runs; ValueError for q [B, S, H, d], k or v [B, S, G, d] that it does not take."""
    backend = resolve_backend(backend, q)
    check_heads("q", q, backend, sizes)
    expect("k", k, (*q.shape[:2], "G", q.size(3)), (q.dtype,), q.device)
    if not k.size(2) or q.size(2) % k.size(2):
        raise ValueError(f"k has {k.size(2)} heads; wanted a divisor of q's {q.size(2)}")
    expect("v", v, k.shape, (q.dtype,), q.device)
    return backend


def checked_tail(tail: int | None, length: int) -> int:
    """`tail`, or the length where it is None; ValueError for one that is longer."""
    tail = length if tail is None else tail
    if not 0 <= tail <= length:
        raise ValueError(f"tail is {tail}; allowed: 0 to S, {length}")
    return tail


def checked_start(start: Tensor | None, x: Tensor) -> Tensor | None:
    """`start`, contiguous; ValueError unless it is int32 [B, S] beside x [B, S, ...]."""
    if start is None:
        return None
    expect("start", start, x.shape[:2], (torch.int32,), x.device)
    return start.contiguous()


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail: int | None = None,
    *,
    start: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of `q` [B, S, H, d] over `k` and `v` [B, S, G, d] -> [B, T, H, d], contiguous, in their dtype.

    H is a multiple of G. T is `tail`, where only the last T queries are wanted, else S. q is given whole all the same,
    and its gradient is zero before them. q, k and v get gradients. The result may be changed in place: the backward,
    which reads it, then makes it again.

    `start` int32 [B, S] keeps documents of a row apart: token i sees tokens start_i to i. It must not fall along a row
    nor be beyond its own token (document_starts makes it); this is not checked, because that would wait for the GPU.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, and a head size d that is a multiple of 8 up to 256, at the cost of the next power of
    two. It copies tensors whose elements of a head are not side by side, or whose rows are not a multiple of 16 bytes
    apart.
    ValueError: other shapes, dtypes, tails, starts or backends, tensors of several dtypes or devices.

    Example: out = causal_attention(q, k, v)
    """
    backend = check_qkv(q, k, v, backend)
    tail, start = checked_tail(tail, q.size(1)), checked_start(start, q)
    if backend == "reference":
        return causal_attention_ref(q, k, v, start=start)[:, q.size(1) - tail :].contiguous()
    return causal_op(q, k, v, start, tail)[0]


def causal_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, backend: str | None = None
) -> Tensor:
    """Causal attention within packed documents: `q` [T, H, d] over `k` and `v` [T, G, d] -> [T, H, d], in their dtype.

    `cu_seqlens` int32 [documents + 1] are the cumulative lengths, from 0 on: document i is the tokens cu_seqlens[i] up
    to cu_seqlens[i + 1]. A document may be empty; tokens from the last entry on are a document of their own, such as
    padding. The entries are not read by the host: check_cu_seqlens does that, for debugging. Blocks of keys of other
    documents are skipped. This is causal_attention with its `start`; whoever runs several layers over one packing
    calls packed_starts once, and that. Like every attention in blocks, it multiplies what is masked by zero: values
    that are not finite reach the documents that share a block of tokens with theirs.

    q, k and v get gradients. `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on
    a GPU. Dtypes and head sizes are those of causal_attention.
    ValueError: other shapes, dtypes or backends, tensors of several dtypes or devices.

    Example: cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32)
    out = causal_attention_varlen(q[0], k[0], v[0], cu_seqlens)
    """
    expect("q", q, ("T", "H", "d"))
    expect("k", k, (q.size(0), "G", q.size(2)))
    expect("v", v, k.shape)
    expect("cu_seqlens", cu_seqlens, ("documents + 1",), (torch.int32,), q.device)
    start = packed_starts(cu_seqlens, q.size(0))
    return causal_attention(q[None], k[None], v[None], start=start, backend=backend)[0]
