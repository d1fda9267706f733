"""Launch shapes, what both directions share, and the forward kernel.

The logsumexp is that of powers of two: log2(sum_j 2^(s_ij log2 e)).
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import cdiv, padded_rank
from ..dot import multiply, multiply_add
from ..launch import launched
from ..tile import descriptor
from .cached_keys import NO_CACHE, Cache, load_cells, ring_of

LOG2_E = math.log2(math.e)
LARGEST = tl.constexpr(60.0)
"""The largest bound of a score that is subtracted as it is: 2^-(2 * 60) is a number of fp32."""
LOWEST = tl.constexpr(-1e38)
"""Below every score: where a tile's first keys may be of no document of a row, -inf - -inf would be the exponent."""


@dataclass(frozen=True)
class AttentionConfig:
    """A tile is [rows, keys] of the scores. `registers` caps those of a lane."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def padded_head(head_dim: int) -> int:
    """The width of a block of heads of this size, a power of two: the copy engine fills it up with zeros."""
    return padded_rank(head_dim)


@functools.cache
def pick_config(kernel: str, dtype: torch.dtype, head_dim: int) -> AttentionConfig:
    """The tile of "forward", "bounded" (a forward with a gain), "dq" or "dkdv"."""
    if dtype == torch.float32:
        return AttentionConfig(rows=16, keys=16, warps=8, stages=1)  # no tensor cores: what does not spill up to d 64
    if head_dim > 128:  # compiled for sm_90: what fits in shared memory and does not spill
        rows, keys = {"dq": (64, 32), "dkdv": (32, 64)}.get(kernel, (128, 64))
        return AttentionConfig(rows=rows, keys=keys, warps=8, stages=2)
    if head_dim > 64:
        return AttentionConfig(rows=64, keys=64, warps=8 if kernel == "dkdv" else 4, stages=2)
    # NVIDIA H100, bf16, 64 documents of 1,024 tokens, H 8, G 4, d 64. Forward: 0.206 ms; 2 stages 0.224. The backward's
    # two launches: 0.539 ms; dq with 32 keys 0.545, with 2 stages 0.598.
    if kernel == "dkdv":  # 168 registers let three programs share a multiprocessor; 160 spill: 0.576, uncapped 0.602
        return AttentionConfig(rows=64, keys=64, warps=4, stages=3, registers=168)
    # NVIDIA H200, 96 documents of 1,024 tokens, bounded: 0.269 ms; 168 registers 0.315, uncapped 0.304, with a running
    # maximum 0.296
    return AttentionConfig(rows=64, keys=64, warps=4, stages=3, registers=128 if kernel == "bounded" else None)


def packed_heads(heads: int, groups: int) -> int:
    """Query heads of one group in one tile: up to four, a power of two that divides their number."""
    return math.gcd(heads // groups, 4)


def by_heads(tensor: Tensor, heads: int, tokens: int) -> TensorDescriptor:
    """How the copy engine moves blocks [heads, tokens, padded d] of tensor [B, S, H, d]: outside of it, it reads zeros
    and stores nothing.
    """
    (batch, length, count, width), (of_batch, of_token, of_head, _) = tensor.shape, tensor.stride()
    block = [1, heads, tokens, padded_head(width)]
    return descriptor(tensor, [batch, count, length, width], [of_batch, of_head, of_token, 1], block)


@triton.jit
def load(x_d, b, h, t, HEADS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr):
    """Rows [HEADS * TOKENS, D] of document b: heads from h on, of each the tokens from t on."""
    return x_d.load([b, h, t, 0]).reshape(HEADS * TOKENS, D)


@triton.jit
def store(x_d, x, b, h, t, HEADS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr):
    x_d.store([b, h, t, 0], x.to(x_d.dtype).reshape(1, HEADS, TOKENS, D))


@triton.jit
def place(BLOCKS, H: tl.constexpr, HEADS: tl.constexpr):
    """(document, first head, block) of a program: of a document and heads the last block, with most keys, comes first,
    and its blocks run side by side, so that the keys come from the L2 cache.
    """
    pid = tl.program_id(0)
    whole = pid // BLOCKS
    return whole // (H // HEADS), whole % (H // HEADS) * HEADS, BLOCKS - 1 - pid % BLOCKS


@triton.jit
def row_at(b, h, t, stride, H: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Where the rows of a tile lie in a tensor [B, H, ...] whose heads are `stride` apart."""
    r = tl.arange(0, HEADS * TOKENS)
    return (b.to(tl.int64) * H + h + r // TOKENS) * stride + t + r % TOKENS


@triton.jit
def sees(position, start, n, BN: tl.constexpr):
    """Which of the keys from n on the rows at `position` see: none after it, none before its document."""
    seen = position[:, None] >= n + tl.arange(0, BN)[None, :]
    if start is not None:
        seen = seen & (start[:, None] <= n + tl.arange(0, BN)[None, :])
    return seen


@triton.jit
def spans(start_ptr, b, t, position, seen_by_all, T, OFFSET, BM: tl.constexpr, BN: tl.constexpr):
    """Where the documents of a tile's rows start, and the keys that this leaves: the first block that any row sees, and
    the first that no document starts in.
    """
    starts = start_ptr + b.to(tl.int64) * (OFFSET + T) + OFFSET
    start = tl.load(starts + position - OFFSET, mask=position < OFFSET + T, other=0)
    first = tl.load(starts + t) // BN * BN
    last = tl.load(starts + tl.minimum(t + BM, T) - 1)
    return start, first, tl.minimum(tl.cdiv(last, BN) * BN, seen_by_all)


@triton.jit
def load_keys(
    keys, PART: tl.constexpr, n, MASK: tl.constexpr, IS_RING: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """A block [BN, D] of keys (PART 0) or values (PART 1), from the n-th on: of a ring, or of the chunk itself, whose
    `keys` are k_d, v_d, document, head, positions of the rows, starts of their documents.
    """
    x = keys[PART]
    return load_cells(x, keys, n, MASK, BN, D) if IS_RING else load(x, keys[2], keys[3], n, 1, BN, D)


@triton.jit
def seen_keys(keys, n, IS_RING: tl.constexpr, BN: tl.constexpr):
    """Which of that block's keys the rows see."""
    return (n + tl.arange(0, BN) < keys[3])[None, :] if IS_RING else sees(keys[4], keys[5], n, BN)


@triton.jit
def _attend(
    acc, total, top, q, keys, first, last, scale,
    MASK: tl.constexpr, IS_RING: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The keys from `first` to `last` joined to what a tile has seen: acc and total are relative to 2^top. The eight
    columns of `total` are all the sum of p: the tensor cores add faster than the lanes do.
    """
    for n in tl.range(first, last, BN):
        k = load_keys(keys, 0, n, MASK, IS_RING, BN, D)
        s = multiply(q, k.T)
        if MASK:
            s = tl.where(seen_keys(keys, n, IS_RING, BN), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.math.exp2(s * scale - new_top[:, None])
        rescale = tl.math.exp2(top - new_top)
        v = load_keys(keys, 1, n, MASK, IS_RING, BN, D)
        p = p.to(v.dtype)
        total = multiply_add(p, tl.full((BN, 8), 1.0, p.dtype), total * rescale[:, None])
        acc = multiply_add(p, v, acc * rescale[:, None])
        top = new_top
    return acc, total, top


@triton.jit
def _attend_bounded(
    acc, total, top, q, keys, first, last, scale, MASK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """As :func:`_attend` where 2^top is known to bound every score: nothing is rescaled on the way."""
    for n in tl.range(first, last, BN):
        k = load_keys(keys, 0, n, MASK, False, BN, D)
        s = multiply(q, k.T)
        p = tl.math.exp2(s * scale - top[:, None])
        if MASK:
            p = tl.where(seen_keys(keys, n, False, BN), p, 0.0)
        v = load_keys(keys, 1, n, MASK, False, BN, D)
        p = p.to(v.dtype)
        total = multiply_add(p, tl.full((BN, 8), 1.0, p.dtype), total)
        acc = multiply_add(p, v, acc)
    return acc, total


@launched
@triton.jit(do_not_specialize=["SLOTS", "CAPACITY", "WINDOW", "T", "OFFSET", "BLOCKS"])
def _forward_kernel(
    q_d, k_d, v_d, out_d, lse_ptr, gain_ptr, start_ptr, cache_k_ptr, cache_v_ptr, slots_ptr, filled_ptr,
    SLOTS, CAPACITY, WINDOW, slot_stride, cell_stride, group_stride, cell_stride_d, scale, T, OFFSET, BLOCKS,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of HEADS heads and BM queries through all keys up to its own. Query t stands at position
    OFFSET + t. With a cache, its keys come first.

    With `gain`, q and k are heads normed to rms 1 and q is times its gain: |q k| <= gain D where the rotation keeps
    lengths. A bound below LARGEST is subtracted in place of the running maximum. Where it did not hold (tables that
    stretch), the tile is done again.

    With `start`, blocks of keys before the first document of the tile are skipped, and those that documents start in
    are masked like those that the diagonal crosses.
    """
    LEAST: tl.constexpr = float("-inf") if start_ptr is None else LOWEST
    b, h, block = place(BLOCKS, H, HEADS)
    g = h // (H // G)
    t = block * BM
    q = load(q_d, b, h, OFFSET + t, HEADS, BM, D)
    query = t + tl.arange(0, HEADS * BM) % BM
    position = OFFSET + query
    acc = tl.zeros((HEADS * BM, D), tl.float32)
    total = tl.zeros((HEADS * BM, 8), tl.float32)
    top = tl.full((HEADS * BM,), LEAST, tl.float32)
    seen_by_all = (OFFSET + t + 1) // BN * BN
    last = OFFSET + tl.minimum(t + BM, T)
    start, clear = None, 0
    if start_ptr is not None:
        start, first, clear = spans(start_ptr, b, t, position, seen_by_all, T, OFFSET, BM, BN)
    keys = k_d, v_d, b, g, position, start
    searches = True
    if gain_ptr is not None:
        bound = tl.abs(tl.load(gain_ptr + h + tl.arange(0, HEADS * BM) // BM)) * (1.02 * D * scale)
        if tl.max(bound) < LARGEST:
            if start_ptr is not None:
                acc, total = _attend_bounded(acc, total, bound, q, keys, first, clear, scale, True, BN, D)
            acc, total = _attend_bounded(acc, total, bound, q, keys, clear, seen_by_all, scale, False, BN, D)
            acc, total = _attend_bounded(acc, total, bound, q, keys, seen_by_all, last, scale, True, BN, D)
            top = bound
            whole = (tl.max(total, 1) > 0.0) & (tl.max(total, 1) < float("inf"))
            searches = tl.min(whole.to(tl.int32)) == 0
    if searches:
        if gain_ptr is not None:
            acc = tl.zeros((HEADS * BM, D), tl.float32)
            total = tl.zeros((HEADS * BM, 8), tl.float32)
            top = tl.full((HEADS * BM,), LEAST, tl.float32)
        if cache_k_ptr is not None:
            ring = ring_of(
                cache_k_ptr, cache_v_ptr, slots_ptr, filled_ptr, SLOTS, CAPACITY, WINDOW, slot_stride, cell_stride,
                group_stride, cell_stride_d, b, g, T, BN,
            )  # fmt: skip
            acc, total, top = _attend(acc, total, top, q, ring, 0, ring[4], scale, False, True, BN, D)
            acc, total, top = _attend(acc, total, top, q, ring, ring[4], ring[3], scale, True, True, BN, D)
        if start_ptr is not None:
            acc, total, top = _attend(acc, total, top, q, keys, first, clear, scale, True, False, BN, D)
        acc, total, top = _attend(acc, total, top, q, keys, clear, seen_by_all, scale, False, False, BN, D)
        acc, total, top = _attend(acc, total, top, q, keys, seen_by_all, last, scale, True, False, BN, D)
    total = tl.max(total, 1)
    tl.store(lse_ptr + row_at(b, h, t, T, H, HEADS, BM), top + tl.math.log2(total), mask=query < T)
    store(out_d, acc * (1.0 / total)[:, None], b, h, t, HEADS, BM, D)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail: int,
    out: Tensor | None = None,
    gain: Tensor | None = None,
    cache: Cache | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, tail, H, d], logsumexp fp32 [B, H, tail]) of q [B, S, H, d], k and v [B, S, G, d].

    `gain` fp32 [H] says that the heads of q and k were normed to rms 1 and those of q are times their gain. In fp16,
    whose range is too small for what a bound leaves of a score, it goes unused. The keys of `cache` come before those
    of k; tail is S then, and no gain is given. `start` int32 [B, S], contiguous: the first token of each token's
    document; it never falls along a row.
    """
    gain = None if q.dtype == torch.float16 else gain
    (batch, length, heads, width), groups = q.shape, k.size(2)
    out = q.new_empty(batch, tail, heads, width) if out is None else out
    lse = q.new_empty(batch, heads, tail, dtype=torch.float32)
    if out.numel():
        kernel = "forward" if gain is None else "bounded"
        config, packed = pick_config(kernel, q.dtype, width), packed_heads(heads, groups)
        queries, keys = config.rows // packed, config.keys
        blocks = cdiv(tail, queries)
        _forward_kernel[(blocks * batch * heads // packed,)](
            q_d=by_heads(q, packed, queries), k_d=by_heads(k, 1, keys), v_d=by_heads(v, 1, keys),
            out_d=by_heads(out, packed, queries), lse_ptr=lse, gain_ptr=gain, start_ptr=start,
            **(cache.arguments() if cache else NO_CACHE), scale=LOG2_E / math.sqrt(width), T=tail,
            OFFSET=length - tail, BLOCKS=blocks, H=heads, G=groups, D=padded_head(width), HEADS=packed, BM=queries,
            BN=keys, num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return out, lse
