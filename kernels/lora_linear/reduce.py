"""The gradients of A and B: sums over the rows of each slot, split so that one slot fills a GPU, in a fixed order.

    dA = t^T mask x [R, K]            dB = dy^T u [N, R]            t, u inner rows

A program sums PART tokens of one document in their order. The parts of a slot are added in the order of the batch and
of the tokens by a second launch; where a document is one part and no other has its slot, the first one writes the
gradient. So the bits are the same in every run, and a document's do not depend on the documents of other slots. Of one
projection in 16 bits without a mask, tiles come by the copy engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, is_aligned, next_power_of_2, padded_rank
from ..dot import multiply_add
from ..launch import launched
from ..lora_qkv.sums import following, slots_of
from ..tile import tiled
from .pool import Pool, kept, slot_and_rank, variant_of, variants

PART = 1024
"""Tokens of a part. It must not depend on the batch: the bits of a slot do not either."""
FOLD = 2048
"""Numbers that a program of the second launch adds."""


@dataclass(frozen=True)
class ReduceConfig:
    """A program has block_c columns and up to `ranks` ranks, block_s tokens a step."""

    block_c: int
    block_s: int
    ranks: int
    warps: int
    stages: int


def pick_reduce_config(dtype: torch.dtype, rank: int) -> ReduceConfig:
    """By the largest rank of the pools. No GPU has chosen between these yet; none spills on sm_90."""
    ranks = min(64, padded_rank(rank))
    return ReduceConfig(32, 16, ranks, 4, 2) if dtype == torch.float32 else ReduceConfig(128, 64, ranks, 4, 3)


def pick_tiled_reduce_config(rank: int) -> ReduceConfig:
    """48 KiB in two stages and up to 111 registers: one fits beside a program of dx, four where that is done. By the
    compiler; no GPU has chosen.
    """
    return ReduceConfig(128, 64, min(64, padded_rank(rank)), 4, 2)


@triton.jit
def _reduce_tile(
    y_ptr, inner_ptr, y_d, inner_d, grad_ptr, part_ptr, is_alone, key, b, S, first, last, n, r, rank,
    C: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr, ACROSS: tl.constexpr, THRESHOLD: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Columns n to n + BC, ranks r to r + W: the sum of rows `first` to `last` of document b."""
    c, j, token = n + tl.arange(0, BC), r + tl.arange(0, W), b.to(tl.int64) * S
    acc = tl.zeros((BC, W), tl.float32)
    for start in range(first, last, BS):
        if y_d is not None:
            y = y_d.load([b, start, n]).reshape(BS, BC)
            inner = inner_d.load([b, start, r]).reshape(BS, W)
        else:
            row = start + tl.arange(0, BS)
            at, is_row = (token + row)[:, None], (row < last)[:, None]
            y = tl.load(y_ptr + at * C + c[None, :], is_row & (c < C)[None, :], other=0.0)
            if THRESHOLD:
                y = kept(y, key, row, c, C, THRESHOLD)
            inner = tl.load(inner_ptr + at * TOTAL + j[None, :], is_row & (j < rank)[None, :], other=0.0)
        acc = multiply_add(y.T, inner, acc)
    acc = tl.where((j < rank)[None, :], acc, 0.0)
    _store(grad_ptr, part_ptr, is_alone, acc, c, j, (c < C)[:, None] & (j < R)[None, :], C, R, ACROSS)


@triton.jit
def _store(
    grad_ptr, part_ptr, is_alone, tile, c, j, mask, C: tl.constexpr, R: tl.constexpr, ACROSS: tl.constexpr
):  # fmt: skip
    """`tile` [c, j] to the gradient where it is whole, as all are without `part_ptr`; else to its part."""
    places = c[:, None] * R + j[None, :] if ACROSS else j[None, :] * C + c[:, None]
    if part_ptr is None:  # noqa: SIM114 (with `or` both sides would be compiled)
        tl.store(grad_ptr + places, tile.to(grad_ptr.dtype.element_ty), mask)
    elif is_alone:
        tl.store(grad_ptr + places, tile.to(grad_ptr.dtype.element_ty), mask)
    else:
        tl.store(part_ptr + places, tile, mask)


@triton.jit
def _is_alone(slots_ptr, every, slot, b, B, parts, BP: tl.constexpr):
    """Whether document b is one part and no other has its slot."""
    is_alone = parts == 1
    if slots_ptr is not None:
        is_alone = is_alone & (following(every, slot, -1, B, BP) == b) & (following(every, slot, b, B, BP) == B)
    return is_alone


@launched
@triton.jit(do_not_specialize=["B", "S"])
def _reduce_kernel(
    ys, inner_ptr, y_d, inner_d, grads, strides, counts, ranks, keys, slots_ptr, parts_ptr, B, S,
    P: tl.constexpr, SIZES: tl.constexpr, WIDEST: tl.constexpr, STARTS: tl.constexpr, FIRSTS: tl.constexpr,
    PLACES: tl.constexpr, TOTAL: tl.constexpr, ACROSS: tl.constexpr, THRESHOLD: tl.constexpr, PART: tl.constexpr,
    BC: tl.constexpr, BS: tl.constexpr, WIDTH: tl.constexpr, VARIANTS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Program (part of a document, tile of columns and WIDTH ranks of a projection). With y_d and inner_d there is one
    projection, PART a multiple of BS and a program as wide as WIDTH.
    """
    LEAST: tl.constexpr = WIDTH >> (VARIANTS - 1)
    tile, part = tl.program_id(0) % FIRSTS[P], tl.program_id(0) // FIRSTS[P]
    parts = tl.cdiv(S, PART)
    b, first = part // parts, part % parts * PART
    for p in tl.static_range(P):
        if (tile >= FIRSTS[p]) & (tile < FIRSTS[p + 1]):
            CHUNKS: tl.constexpr = (WIDEST[p] + WIDTH - 1) // WIDTH
            slot, rank = slot_and_rank(slots_ptr, ranks[p], b, counts[p], WIDEST[p])
            n = (tile - FIRSTS[p]) // CHUNKS * BC
            r = (tile - FIRSTS[p]) % CHUNKS * WIDTH
            named, every = slots_of(slots_ptr, b, counts[p], B, BP)
            is_alone = _is_alone(slots_ptr, every, slot, b, B, parts, BP)
            if (named >= 0) & ((r < rank) | is_alone):
                key = tl.zeros((), tl.int64)
                if THRESHOLD:
                    key = tl.load(keys[p] + b)
                last = tl.where(r < rank, tl.minimum(first + PART, S), first)
                grad_ptr = grads[p] + slot * strides[p]
                part_ptr = parts_ptr
                if parts_ptr is not None:
                    part_ptr += part.to(tl.int64) * PLACES[P] + PLACES[p]
                variant = variant_of(rank - r, VARIANTS)
                for i in tl.static_range(VARIANTS):
                    if variant == i:
                        _reduce_tile(
                            ys[p], inner_ptr + STARTS[p], y_d, inner_d, grad_ptr, part_ptr, is_alone, key, b, S, first,
                            last, n, r, rank, SIZES[p], WIDEST[p], TOTAL, ACROSS, THRESHOLD, BC, BS, LEAST * 2**i,
                        )  # fmt: skip
                if VARIANTS > 1 and is_alone:  # zeros for what the pool has above the width of this rank
                    c, j = n + tl.arange(0, BC), r + tl.arange(0, WIDTH)
                    mask = (c < SIZES[p])[:, None] & ((j >= r + (LEAST << variant)) & (j < WIDEST[p]))[None, :]
                    zeros = tl.zeros((BC, WIDTH), tl.float32)
                    _store(grad_ptr, None, True, zeros, c, j, mask, SIZES[p], WIDEST[p], ACROSS)


@launched
@triton.jit(do_not_specialize=["B", "S"])
def _fold_kernel(
    parts_ptr, grads, strides, counts, ranks, slots_ptr, B, S,
    P: tl.constexpr, SIZES: tl.constexpr, WIDEST: tl.constexpr, FIRSTS: tl.constexpr, PLACES: tl.constexpr,
    ACROSS: tl.constexpr, PART: tl.constexpr, FILLS: tl.constexpr, BLOCK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Program (BLOCK numbers of a gradient, document): the first document with a slot adds all parts of it. FILLS: a
    program is a slot's, and one that no document has gets zeros.
    """
    block, each, parts = tl.program_id(0) % FIRSTS[P], tl.program_id(0) // FIRSTS[P], tl.cdiv(S, PART)
    for p in tl.static_range(P):
        if (block >= FIRSTS[p]) & (block < FIRSTS[p + 1]):
            if FILLS:
                slot = each.to(tl.int64)
                every = slots_of(slots_ptr, 0, counts[p], B, BP)[1]
                b = following(every, slot, -1, B, BP)
                is_first, has_one = slot < counts[p], b < B
            else:
                b = each
                slot, every = slots_of(slots_ptr, b, counts[p], B, BP)
                is_first, has_one = slot >= 0, True
                if slots_ptr is not None:
                    is_first = is_first & (following(every, slot, -1, B, BP) == b)
            if is_first & ((has_one & _is_alone(slots_ptr, every, slot, b, B, parts, BP)) == 0):
                rank = slot_and_rank(slots_ptr, ranks[p], tl.minimum(b, B - 1), counts[p], WIDEST[p])[1]
                i = (block - FIRSTS[p]) * BLOCK + tl.arange(0, BLOCK)
                j = i % WIDEST[p] if ACROSS else i // SIZES[p]
                total = tl.zeros((BLOCK,), tl.float32)
                document = b
                while document < B:
                    for part in range(0, parts):
                        place = (document.to(tl.int64) * parts + part) * PLACES[P] + PLACES[p]
                        total += tl.load(parts_ptr + place + i, (i < WIDEST[p] * SIZES[p]) & (j < rank), other=0.0)
                    document = B if slots_ptr is None else following(every, slot, document, B, BP)
                out = grads[p] + slot * strides[p] + i
                tl.store(out, total.to(grads[p].dtype.element_ty), i < WIDEST[p] * SIZES[p])


def launch_reduce(
    ys: list[Tensor], inner: Tensor, pool: Pool, grads: Sequence[Tensor], of_a: bool, fills: bool = False
) -> None:
    """Writes the rows of `grads` that the slots name: of lora_a, by the inputs and the inner rows of the backward; or
    of lora_b, by the gradients of the outputs and the inner rows of the forward. `ys` are contiguous, one for each
    projection. `fills`: the other rows become zeros.
    """
    (batch, length, _), projections, y = ys[0].shape, len(ys), ys[0]
    threshold, widest = pool.threshold if of_a else 0, max(pool.widest)
    is_tiled = projections == 1 and not threshold and y.dtype != torch.float32 and is_aligned(y)
    config = pick_tiled_reduce_config(widest) if is_tiled else pick_reduce_config(y.dtype, widest)
    step = min(config.block_s, PART)
    sizes, batch_pow2 = [y.size(2) for y in ys], next_power_of_2(batch)
    tiles, places, blocks = [0], [0], [0]
    for size, rank in zip(sizes, pool.widest, strict=True):
        tiles.append(tiles[-1] + cdiv(size, config.block_c) * cdiv(rank, config.ranks))
        places.append(places[-1] + size * rank)
        blocks.append(blocks[-1] + cdiv(size * rank, FOLD))
    parts = cdiv(length, PART)
    is_whole = parts == 1 and pool.slots is None
    fills = fills and pool.slots is not None
    sums = None if is_whole else inner.new_empty(batch * parts, places[-1], dtype=torch.float32)
    shared = dict(
        grads=tuple(grads), strides=tuple(grad.stride(0) for grad in grads),
        counts=tuple(grad.size(0) for grad in grads), ranks=tuple(pool.ranks), slots_ptr=pool.slots, parts_ptr=sums,
        B=batch, S=length, P=projections, SIZES=tuple(sizes), WIDEST=tuple(pool.widest), PLACES=tuple(places),
        ACROSS=not of_a, PART=PART, BP=batch_pow2,
    )  # fmt: skip
    _reduce_kernel[(batch * parts * tiles[-1],)](
        ys=tuple(ys), inner_ptr=inner, y_d=tiled(y, 1, step, config.block_c) if is_tiled else None,
        inner_d=tiled(inner, 1, step, config.ranks) if is_tiled else None, keys=tuple(pool.keys), **shared,
        STARTS=tuple(pool.starts), FIRSTS=tuple(tiles), TOTAL=inner.size(2), THRESHOLD=threshold, BC=config.block_c,
        BS=step, WIDTH=config.ranks, VARIANTS=1 if is_tiled else variants(config.ranks), num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    if not is_whole:
        each = max(grad.size(0) for grad in grads) if fills else batch
        _fold_kernel[(blocks[-1] * each,)](**shared, FIRSTS=tuple(blocks), FILLS=fills, BLOCK=FOLD, num_warps=8)
