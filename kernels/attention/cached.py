"""Attention of a chunk over itself and over cached keys and values of the document's earlier tokens.

    s_ij = q_i k_j / sqrt(d);   p_i = softmax(s_i);   out_i = sum_j p_ij v_j

j runs over the keys of the chunk up to i, and over the cached positions p with filled + T - window <= p < filled and
p >= 0, the same for every query: what a window of `window` tokens that ends with the chunk would see. A chunk costs its
own tokens, and not its window's.

q [B, T, H, d], k and v [B, T, G, d], normed and rotated at positions filled .. filled + T - 1; cache_k and cache_v
[slots, capacity, G, d], rings in which position p lies in cell p mod capacity; slots, filled [B] -> out [B, T, H, d].
One dtype: bf16, fp16 or fp32; d 16, 32, 64 or 128; any T up to window; window - T up to capacity. Query head h reads
key head h G / H.

The kernels are those of `causal_attention` with one loop more, and promise what they do: fp32 sums, no atomics, the
same bits in every run and in every batch. A tile holds the query heads that share a key head (up to four), so that a
cached key is read once for them, and 32 tokens fill it where two share one. `slots` and `filled` are read on the
device: a document pays for what its cache holds and not for the window. Nothing waits for the host; a CUDA graph
replays it.

n = min(filled, window - T) cached keys of a document cost H T n d FLOPs 4 times forward and 6 times backward, beside
those of causal attention over the chunk, and 2 n G d numbers read by each of T / 32 tiles (where H = 2 G), forward and
backward. The gradients are those of q, k and v; the cache is a constant.

:func:`cache_write_` moves a chunk into the ring once it is done.

Refused: shapes, dtypes and devices that do not fit, a window below T or beyond what the cache holds, two caches that
lie differently in memory, a cache that requires a gradient.

Example: out = cached_attention(q, k, v, cache_k, cache_v, slots, filled, window=2048)
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dispatch import INTEGERS, cdiv, custom_op, describe, expect, refuse_gradients, resolve_backend
from ..launch import launched
from ..slots import is_in_pool, rows_of_slots
from .op import HEAD_DIMS, cached_op, check_heads, check_qkv
from .reference import is_grouped

TOKENS = 32
"""Tokens of one head that a program of the writing launch copies."""


def cached_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, slots: Tensor, filled: Tensor, window: int
) -> Tensor:
    """Attention of `q` over `cache_k`, `cache_v`, `k` and `v` -> [B, T, H, d], of one float dtype.

    Shapes, `slots`, `filled` and `window` are those of :func:`cached_attention`; so is what is seen. Autograd gives the
    gradients of q, k and v.

    Example: out = cached_attention_ref(q, k, v, cache_k, cache_v, slots, filled, window=12)
    """
    (batch, length), reach = q.shape[:2], window - q.size(1)
    position = filled[:, None] - torch.arange(reach, 0, -1, device=q.device)
    is_read = (position >= 0) & is_in_pool(slots, cache_k.size(0))[:, None]
    row, cell = torch.arange(batch, device=q.device)[:, None], position % max(cache_k.size(1), 1)
    held = (rows_of_slots(cache.detach(), slots)[row, cell] for cache in (cache_k, cache_v))
    k, v = (
        torch.cat([old.masked_fill(~is_read[..., None, None], 0.0), new], 1).transpose(1, 2)
        for old, new in zip(held, (k, v), strict=True)
    )
    own = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    mask = torch.cat([is_read[:, None].expand(-1, length, -1), own.expand(batch, -1, -1)], -1)[:, None]
    q = q.transpose(1, 2)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=is_grouped(q, k))
    return out.transpose(1, 2)


def cache_write_ref_(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, slots: Tensor, filled: Tensor, count: Tensor
) -> None:
    """Write `k` and `v` [B, T, G, d] into `cache_k` and `cache_v` [slots, capacity, G, d].

    `slots`, `filled` and `count` int [B] are those of :func:`cache_write_`.

    Example: cache_write_ref_(cache_k, cache_v, k, v, slots, filled, count)
    """
    (length, capacity), token = (k.size(1), cache_k.size(1)), torch.arange(k.size(1), device=k.device)
    count = count.clamp(max=length)[:, None]
    is_written = (token < count) & (token >= count - capacity)
    is_written &= (is_in_pool(slots, cache_k.size(0)) & (filled >= 0))[:, None]
    cell = (filled[:, None] + token) % max(capacity, 1)
    cells = slots[:, None].expand_as(cell)[is_written], cell[is_written]
    with torch.no_grad():
        cache_k[cells], cache_v[cells] = k[is_written], v[is_written]


@launched
@triton.jit(do_not_specialize=["SLOTS", "CAPACITY", "T"])
def _write_kernel(
    cache_k_ptr, cache_v_ptr, k_ptr, v_ptr, slots_ptr, filled_ptr, count_ptr, SLOTS, CAPACITY, T,
    slot_stride, cell_stride, group_stride, cell_stride_d,
    G: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, key head, document). Of more tokens than the ring has cells, the last are written."""
    blocks = tl.cdiv(T, TOKENS)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    g, b = head % G, (head // G).to(tl.int64)
    slot = tl.load(slots_ptr + b).to(tl.int64)
    filled = tl.load(filled_ptr + b).to(tl.int64)
    count = tl.minimum(tl.load(count_ptr + b).to(tl.int64), T)
    token = block * TOKENS + tl.arange(0, TOKENS)
    named = (slot >= 0) & (slot < SLOTS) & (filled >= 0)
    mask = (named & (token < count) & (token >= count - CAPACITY))[:, None]
    cell = ((filled % CAPACITY).to(tl.int32) + token) % CAPACITY
    column = tl.arange(0, D)[None, :]
    read = ((b * T + token)[:, None] * G + g) * D + column
    written = slot * slot_stride + g * group_stride + cell[:, None] * cell_stride + column * cell_stride_d
    k = tl.load(k_ptr + read, mask, other=0.0)
    v = tl.load(v_ptr + read, mask, other=0.0)
    tl.store(cache_k_ptr + written, k, mask)
    tl.store(cache_v_ptr + written, v, mask)


@custom_op("klora::cache_write_", mutates_args=("cache_k", "cache_v"))
def _write_op(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, slots: Tensor, filled: Tensor, count: Tensor
) -> None:
    batch, length, groups, width = k.shape
    if k.numel() and cache_k.numel():
        _write_kernel[(cdiv(length, TOKENS) * groups * batch,)](
            cache_k_ptr=cache_k, cache_v_ptr=cache_v, k_ptr=k.contiguous(), v_ptr=v.contiguous(),
            slots_ptr=slots.contiguous(), filled_ptr=filled.contiguous(), count_ptr=count.contiguous(),
            SLOTS=cache_k.size(0), CAPACITY=cache_k.size(1), T=length,
            slot_stride=cache_k.stride(0), cell_stride=cache_k.stride(1), group_stride=cache_k.stride(2),
            cell_stride_d=cache_k.stride(3), G=groups, D=width, TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip


def validate_cache(cache_k, cache_v, slots, filled, window, shape, like, slots_name="slots") -> None:
    """Raises ValueError on a cache that no backend takes beside keys of `shape` [B, T, G, d], of the dtype and device
    of `like`, whose first dimension is B too.
    """
    refuse_gradients("detach it", cache_k=cache_k, cache_v=cache_v)
    length, *heads = shape[1:]
    expect("cache_k", cache_k, ("slots", "capacity", *heads), (like.dtype,), like.device)
    expect("cache_v", cache_v, cache_k.shape, (like.dtype,), like.device)
    strides = cache_k.stride()
    if strides != cache_v.stride():
        raise ValueError(
            f"cache_k has strides {strides}, cache_v {cache_v.stride()}; wanted the same: allocate both alike"
        )
    if sum((size - 1) * stride for size, stride in zip(cache_k.shape[1:], strides[1:], strict=True)) >= 2**31:
        raise ValueError(f"cache_k is {describe(cache_k)}; allowed: slots of fewer than 2^31 numbers")
    expect(slots_name, slots, like.shape[:1], INTEGERS, like.device)
    expect("filled", filled, like.shape[:1], INTEGERS, like.device)
    capacity = cache_k.size(1)
    if not length <= window <= length + capacity:
        raise ValueError(
            f"window is {window}; allowed, beside chunks of {length} tokens and a capacity of {capacity}: "
            f"{length} to {length + capacity}"
        )


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    slots: Tensor,
    filled: Tensor,
    window: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention of `q` [B, T, H, d] over its chunk and the cache -> [B, T, H, d], contiguous, in their dtype.

    `k` and `v` [B, T, G, d] are the chunk's own, `cache_k` and `cache_v` [slots, capacity, G, d] rings of those before
    it, in the same dtype. `slots` int32 or int64 [B] names each document's ring; any that names none, -1, reads nothing
    of the cache. `filled` int32 or int64 [B] is how many tokens of the document came before the chunk. `window` is how
    many tokens are seen at most, the T of the chunk among them, padding or not: T to T + capacity.

    q, k and v get gradients. The backward reads the cache again: write to it afterwards (:func:`cache_write_`), or
    autograd raises RuntimeError. The result may be changed in place: the backward then makes it again.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32 and a head size d of 16, 32, 64 or 128. It copies q, k and v that are not rows of 16
    bytes, never the cache.
    ValueError: other shapes, dtypes, windows or backends, tensors of several dtypes or devices, caches of different
    strides, a cache that requires a gradient.

    Example: out = cached_attention(q, k, v, cache_k, cache_v, slots, filled, window=12)
    """
    backend = check_qkv(q, k, v, backend, HEAD_DIMS)
    validate_cache(cache_k, cache_v, slots, filled, window, k.shape, k)
    if backend == "reference":
        return cached_attention_ref(q, k, v, cache_k, cache_v, slots, filled, window).contiguous()
    return cached_op(q, k, v, cache_k, cache_v, slots, filled, window)[0]


def cache_write_(
    cache_k: Tensor,
    cache_v: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    filled: Tensor,
    count: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write the first `count` [B] keys and values of each document's chunk into its ring, in one launch.

    `k` and `v` [B, T, G, d] are those of positions `filled` [B] and on; `cache_k` and `cache_v` [slots, capacity, G, d]
    are of their dtype. `slots` [B] names each document's ring, once; nothing is written where it names none. All three
    are int32 or int64. Of more tokens than the ring has cells, the last ones are written. No gradient goes through it.

    Order: a chunk is written after the last attention of it and that one's backward, and before the attention of the
    next chunk, with `filled` as it was for the attention. Then a capacity of window - T is enough.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: other shapes, dtypes or backends, tensors of several dtypes or devices, caches of different strides.

    Example: cache_write_(cache_k, cache_v, k, v, slots, filled, count)
    """
    backend = resolve_backend(backend, k)
    check_heads("k", k, backend, HEAD_DIMS)
    expect("v", v, k.shape, (k.dtype,), k.device)
    tensors = [t.detach() for t in (cache_k, cache_v, k, v, slots, filled, count)]
    validate_cache(*tensors[:2], slots, filled, k.size(1), k.shape, k)
    expect("count", count, k.shape[:1], INTEGERS, k.device)
    if backend == "reference":
        cache_write_ref_(*tensors)
    else:
        _write_op(*tensors)
