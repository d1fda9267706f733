"""The backward launches: dq and delta, then dk and dv; both may end in the gradients of the projections.

With `rotary`, q = gain * rotate(n) and k = rotate(n) are normed and rotated heads of projections x, n = x * rstd, and
the launches write the gradients of x instead of those of q and k. mean(dq * q) / gain is that of n with its gradient,
for tables of any length: the norm's part is taken before the rotation is undone:

    dx = rotated back(rstd * (gain * dq - q / l / gain * mean(dq * q)))       l = cos^2 + sin^2 of the element's pair

0 where gain is 0; dk likewise without gain. Where all l of a tile are 1, nothing is divided.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, round_up
from ..dot import multiply, multiply_add
from ..launch import launched
from ..tile import UNIT, halves, off_unit, row_dots, tiled, unrotate
from .cached_keys import NO_CACHE, Cache, ring_of
from .forward import (
    LOG2_E,
    by_heads,
    load,
    load_keys,
    packed_heads,
    padded_head,
    pick_config,
    place,
    row_at,
    seen_keys,
    spans,
    store,
)

MOST_QUERIES = 64
"""In a tile: `rows` is written in whole blocks. It makes 16 bytes at least of each of its rows."""


class NormRotary(NamedTuple):
    """How q and k came from their projections; all fp32, the tables contiguous."""

    cos: Tensor
    """[S, d/2], or [B, S, d/2] for a document's own"""
    sin: Tensor
    """as cos"""
    gain: Tensor
    """[H], of queries"""
    rstd_q: Tensor
    """[B, S, H], 1 / rms of each projected head; tokens any distance apart"""
    rstd_k: Tensor
    """[B, S, G]"""
    is_unit: bool = False
    """Whether cos^2 + sin^2 is known to be 1: then it is not checked."""
    norm: Tensor | None = None
    """[B, S], 1 / rms of each row whose unnormed product was divided by it: the gradients are those of that product"""

    @property
    def table_stride(self) -> int | None:
        """From the tables of a document to those of the next; None where all share them."""
        return self.cos.stride(0) if self.cos is not None and self.cos.dim() == 3 else None


@triton.jit
def _unrotate(
    dx, x, b, position, offsets, gain, cos_ptr, sin_ptr, table_stride, rstd_ptr, S,
    ROWS: tl.constexpr, D: tl.constexpr, IS_UNIT: tl.constexpr,
):  # fmt: skip
    """The gradient of a projection: dx and x [ROWS, D] are rotated and of any gain; `at` finds a row's rstd."""
    mask = position < S
    rstd = tl.load(rstd_ptr + offsets, mask=mask, other=0.0)
    x = x.to(tl.float32)
    along = row_dots(dx, x) * rstd * (1.0 / D) * tl.where(gain == 0.0, 0.0, 1.0 / gain)
    left, right = halves(dx * (rstd * gain)[:, None] - x * along[:, None], ROWS, D)
    if table_stride is not None:
        cos_ptr += b.to(tl.int64) * table_stride
        sin_ptr += b.to(tl.int64) * table_stride
    table = position[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    cos = tl.load(cos_ptr + table, mask=mask[:, None], other=1.0)
    sin = tl.load(sin_ptr + table, mask=mask[:, None], other=0.0)
    if not IS_UNIT:  # noqa: SIM102 (decided when it is compiled)
        if off_unit(cos, sin) > UNIT:
            x_left, x_right = halves(x, ROWS, D)
            excess = along[:, None] * (1.0 - 1.0 / (cos * cos + sin * sin))
            left, right = left + x_left * excess, right + x_right * excess
    left, right = unrotate(left, right, cos, sin)
    return tl.join(left, right).permute(0, 2, 1).reshape(ROWS, D)


@triton.jit
def _norm_of(norm_ptr, b, position, S):
    return tl.load(norm_ptr + b.to(tl.int64) * S + position, mask=position < S, other=0.0)


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, keys, first, last, scale,
    MASK: tl.constexpr, IS_RING: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    for n in tl.range(first, last, BN):
        k = load_keys(keys, 0, n, MASK, IS_RING, BN, D)
        v = load_keys(keys, 1, n, MASK, IS_RING, BN, D)
        s = multiply(q, k.T)
        dp = multiply(dout, v.T)
        p = tl.math.exp2(s * scale - lse[:, None])
        if MASK:
            p = tl.where(seen_keys(keys, n, IS_RING, BN), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = multiply_add(ds.to(k.dtype), k, dq)
    return dq


@launched
@triton.jit(do_not_specialize=["SLOTS", "CAPACITY", "WINDOW", "T", "OFFSET", "BLOCKS"])
def _dq_kernel(
    q_d, k_d, v_d, out_d, dout_d, dq_d, lse_ptr, rows_ptr, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, norm_ptr, sums_ptr,
    start_ptr, cache_k_ptr, cache_v_ptr, slots_ptr, filled_ptr, SLOTS, CAPACITY, WINDOW,
    slot_stride, cell_stride, group_stride, cell_stride_d,
    scale, softmax_scale, T, OFFSET, BLOCKS, padded, rstd_stride, table_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    IS_UNIT: tl.constexpr,
):  # fmt: skip
    """Programs and tiles are the forward's. `rows` [B, H, 2, padded] gets the logsumexp and delta of each row, for the
    next launch; past T it gets 0, where dout reads as 0 and the rows add nothing. `sums` [B, H, BLOCKS] gets the sum of
    dq * q of each head and block, where the gain is trained.
    """
    b, h, block = place(BLOCKS, H, HEADS)
    g = h // (H // G)
    t = block * BM
    r = tl.arange(0, HEADS * BM)
    query = t + r % BM
    position = OFFSET + query
    dout = load(dout_d, b, h, t, HEADS, BM, D)
    delta = row_dots(load(out_d, b, h, t, HEADS, BM, D).to(tl.float32), dout.to(tl.float32))
    lse = tl.load(lse_ptr + row_at(b, h, t, T, H, HEADS, BM), mask=query < T, other=0.0)
    offsets = row_at(b, h, t, 2 * padded, H, HEADS, BM)
    tl.store(rows_ptr + offsets, lse)
    tl.store(rows_ptr + offsets + padded, delta)
    q = load(q_d, b, h, OFFSET + t, HEADS, BM, D)
    dq = tl.zeros((HEADS * BM, D), tl.float32)
    if cache_k_ptr is not None:
        ring = ring_of(
            cache_k_ptr, cache_v_ptr, slots_ptr, filled_ptr, SLOTS, CAPACITY, WINDOW, slot_stride, cell_stride,
            group_stride, cell_stride_d, b, g, T, BN,
        )  # fmt: skip
        dq = _add_dq(dq, q, dout, lse, delta, ring, 0, ring[4], scale, False, True, BN, D)
        dq = _add_dq(dq, q, dout, lse, delta, ring, ring[4], ring[3], scale, True, True, BN, D)
    seen_by_all = (OFFSET + t + 1) // BN * BN
    start, clear = None, 0
    if start_ptr is not None:
        start, first, clear = spans(start_ptr, b, t, position, seen_by_all, T, OFFSET, BM, BN)
    keys = k_d, v_d, b, g, position, start
    if start_ptr is not None:
        dq = _add_dq(dq, q, dout, lse, delta, keys, first, clear, scale, True, False, BN, D)
    dq = _add_dq(dq, q, dout, lse, delta, keys, clear, seen_by_all, scale, False, False, BN, D)
    last = OFFSET + tl.minimum(t + BM, T)
    dq = _add_dq(dq, q, dout, lse, delta, keys, seen_by_all, last, scale, True, False, BN, D)
    dq *= softmax_scale
    if cos_ptr is not None:
        head = h + r // BM
        offsets = (b.to(tl.int64) * (OFFSET + T) + position) * rstd_stride + head
        gain = tl.load(gain_ptr + head)
        if sums_ptr is not None:
            along = tl.sum(row_dots(dq, q.to(tl.float32)).reshape(HEADS, BM), 1)
            tl.store(sums_ptr + (b * H + h + tl.arange(0, HEADS)) * BLOCKS + block, along)
        dq = _unrotate(
            dq, q, b, position, offsets, gain, cos_ptr, sin_ptr, table_stride, rstd_ptr, OFFSET + T,
            HEADS * BM, D, IS_UNIT,
        )  # fmt: skip
    if norm_ptr is not None:
        dq *= _norm_of(norm_ptr, b, position, OFFSET + T)[:, None]
    store(dq_d, dq, b, h, OFFSET + t, HEADS, BM, D)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, q_d, dout_d, rows_d, b, h, key, starts, first, last, T, OFFSET, scale,
    MASK: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEADS * BM
    for t in tl.range(first, last, BM):
        q = load(q_d, b, h, OFFSET + t, HEADS, BM, D)
        dout = load(dout_d, b, h, t, HEADS, BM, D)
        rows = rows_d.load([2 * (b * H + h), t]).reshape(HEADS, 2, BM).permute(0, 2, 1).reshape(ROWS, 2)
        lse, delta = tl.split(rows)
        s = multiply(k, q.T)
        p = tl.math.exp2(s * scale - lse[None, :])
        if MASK:
            p = tl.where(key[:, None] <= OFFSET + t + (tl.arange(0, ROWS) % BM)[None, :], p, 0.0)
            if starts is not None:
                query = t + tl.arange(0, ROWS) % BM
                start = tl.load(starts + query, mask=query < T, other=0)
                p = tl.where(key[:, None] >= start[None, :], p, 0.0)
        dv = multiply_add(p.to(dout.dtype), dout, dv)
        dp = multiply(v, dout.T)  # as late as this: its registers are those of s
        ds = p * (dp - delta[None, :])
        dk = multiply_add(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _reached(starts, n, T, OFFSET, BN: tl.constexpr):
    """Queries up to the last one whose document has key n, and up to the last one whose document has any of its BN.

    Starts never fall, so that counting those behind the keys finds both ends. What precedes the keys' own queries is
    counted unseen: the diagonal's loop masks it.
    """
    SCANNED: tl.constexpr = 1024
    t = tl.maximum(n + BN - OFFSET, 0)
    within = tl.minimum(t, T)
    reach = within
    while tl.load(starts + t, mask=t < T, other=2147483647) < n + BN:
        query = t + tl.arange(0, SCANNED)
        start = tl.load(starts + query, mask=query < T, other=2147483647)
        within += tl.sum((start <= n).to(tl.int32))
        reach += tl.sum((start < n + BN).to(tl.int32))
        t += SCANNED
    return within, reach


@launched
@triton.jit(do_not_specialize=["T", "OFFSET", "BLOCKS"])
def _dkdv_kernel(
    q_d, k_d, v_d, dout_d, rows_d, dk_d, dv_d, cos_ptr, sin_ptr, rstd_ptr, norm_ptr, start_ptr,
    scale, softmax_scale, T, OFFSET, BLOCKS, rstd_stride, table_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    IS_UNIT: tl.constexpr,
):  # fmt: skip
    """A program takes BN keys of a group through all queries from their own on, of HEADS heads at a time. Its scores
    are transposed, [keys, rows]: p and ds are multiplied from registers.

    With `start`, it ends at the last query whose document reaches into its keys, and masks where a query's does not
    reach to the first of them.
    """
    b, g, block = place(BLOCKS, G, 1)
    n = (BLOCKS - 1 - block) * BN
    k = load(k_d, b, g, n, 1, BN, D)
    v = load(v_d, b, g, n, 1, BN, D)
    key = n + tl.arange(0, BN)
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    first = tl.maximum(n - OFFSET, 0) // BM * BM
    all_see = tl.minimum(tl.cdiv(tl.maximum(n + BN - 1 - OFFSET, 0), BM), tl.cdiv(T, BM)) * BM
    starts, clear = None, T
    if start_ptr is not None:
        starts = start_ptr + b.to(tl.int64) * (OFFSET + T) + OFFSET
        within, reach = _reached(starts, n, T, OFFSET, BN)
        clear = tl.maximum(within // BM * BM, all_see)
    for more in range(0, H // G, HEADS):
        h = g * (H // G) + more
        dk, dv = _dkdv_loop(
            dk, dv, k, v, q_d, dout_d, rows_d, b, h, key, starts, first, all_see, T, OFFSET, scale,
            True, H, D, HEADS, BM,
        )  # fmt: skip
        dk, dv = _dkdv_loop(
            dk, dv, k, v, q_d, dout_d, rows_d, b, h, key, starts, all_see, clear, T, OFFSET, scale,
            False, H, D, HEADS, BM,
        )  # fmt: skip
        if start_ptr is not None:
            dk, dv = _dkdv_loop(
                dk, dv, k, v, q_d, dout_d, rows_d, b, h, key, starts, clear, reach, T, OFFSET, scale,
                True, H, D, HEADS, BM,
            )  # fmt: skip
    if norm_ptr is not None:
        dv *= _norm_of(norm_ptr, b, key, OFFSET + T)[:, None]
    store(dv_d, dv, b, g, n, 1, BN, D)
    dk *= softmax_scale
    if cos_ptr is not None:
        offsets = (b.to(tl.int64) * (OFFSET + T) + key) * rstd_stride + g
        gain = tl.full((BN,), 1.0, tl.float32)
        dk = _unrotate(
            dk, k, b, key, offsets, gain, cos_ptr, sin_ptr, table_stride, rstd_ptr, OFFSET + T, BN, D, IS_UNIT
        )
    if norm_ptr is not None:
        dk *= _norm_of(norm_ptr, b, key, OFFSET + T)[:, None]
    store(dk_d, dk, b, g, n, 1, BN, D)


@launched
@triton.jit(do_not_specialize=["B", "BLOCKS"])
def _gain_kernel(sums_ptr, gain_ptr, dgain_ptr, B, BLOCKS, H: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of one head's gain, from its sums [B, H, BLOCKS] in their order; 0 where the gain is 0."""
    head = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, B * BLOCKS, BLOCK):
        i = start + tl.arange(0, BLOCK)
        offsets = (i // BLOCKS * H + head) * BLOCKS + i % BLOCKS
        total += tl.load(sums_ptr + offsets, mask=i < B * BLOCKS, other=0.0)
    gain = tl.load(gain_ptr + head)
    tl.store(dgain_ptr + head, tl.where(gain == 0.0, 0.0, tl.sum(total) / gain))


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: Sequence[Tensor],
    rotary: NormRotary | None = None,
    dgain: Tensor | None = None,
    cache: Cache | None = None,
    start: Tensor | None = None,
) -> None:
    """Write `grads`, dq [B, S, H, d], dk and dv [B, S, G, d], from dout [B, T, H, d] and what the forward kept.

    T is the number of queries with an output; before them dq is zero. With `rotary`, dq and dk belong to
    the projections that q and k were normed and rotated from; with `dgain` [H], that of the gain is written too, 0
    where the gain is 0. `cache` and `start` are the forward's, as they were then; the cache gets no gradient.
    """
    (batch, length, heads, width), groups, tail = q.shape, k.size(2), dout.size(1)
    dq, dk, dv = grads
    if tail < length:
        dq[:, : length - tail].zero_()
    if not dout.numel():
        for grad in (dk, dv, dgain):
            if grad is not None:
                grad.zero_()
        return
    rows = lse.new_empty(batch, heads, 2, round_up(tail, MOST_QUERIES))
    rotary = rotary or NormRotary(None, None, None, None, None)
    strides = [0 if rstd is None else rstd.stride(1) for rstd in (rotary.rstd_q, rotary.rstd_k)]
    packed = packed_heads(heads, groups)
    shared = dict(
        cos_ptr=rotary.cos, sin_ptr=rotary.sin, norm_ptr=rotary.norm, start_ptr=start, table_stride=rotary.table_stride,
        scale=LOG2_E / math.sqrt(width), softmax_scale=1 / math.sqrt(width), T=tail, OFFSET=length - tail,
        H=heads, G=groups, D=padded_head(width), HEADS=packed, IS_UNIT=rotary.is_unit,
    )  # fmt: skip

    config = pick_config("dq", q.dtype, width)
    queries, keys = config.rows // packed, config.keys
    blocks = cdiv(tail, queries)
    sums = None if dgain is None else lse.new_empty(batch, heads, blocks)
    _dq_kernel[(blocks * batch * heads // packed,)](
        q_d=by_heads(q, packed, queries), k_d=by_heads(k, 1, keys), v_d=by_heads(v, 1, keys),
        out_d=by_heads(out, packed, queries), dout_d=by_heads(dout, packed, queries),
        dq_d=by_heads(dq, packed, queries), lse_ptr=lse, rows_ptr=rows, gain_ptr=rotary.gain, rstd_ptr=rotary.rstd_q,
        sums_ptr=sums, **(cache.arguments() if cache else NO_CACHE), BLOCKS=blocks, padded=rows.size(3),
        rstd_stride=strides[0], BM=queries, BN=keys, **shared,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip

    config = pick_config("dkdv", q.dtype, width)
    queries, keys = config.rows // packed, config.keys
    blocks = cdiv(length, keys)
    _dkdv_kernel[(blocks * batch * groups,)](
        q_d=by_heads(q, packed, queries), k_d=by_heads(k, 1, keys), v_d=by_heads(v, 1, keys),
        dout_d=by_heads(dout, packed, queries), rows_d=tiled(rows.view(-1, rows.size(3)), 2 * packed, queries),
        dk_d=by_heads(dk, 1, keys), dv_d=by_heads(dv, 1, keys), rstd_ptr=rotary.rstd_k, BLOCKS=blocks,
        rstd_stride=strides[1], BM=queries, BN=keys, **shared,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    if dgain is not None:
        _gain_kernel[(heads,)](
            sums_ptr=sums, gain_ptr=rotary.gain, dgain_ptr=dgain, B=batch, BLOCKS=sums.size(2), H=heads, BLOCK=1024,
            num_warps=4,
        )  # fmt: skip
