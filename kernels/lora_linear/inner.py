"""The inner rows of all projections, in one launch: s x A^T of the forward, s dy B of the backward. With dropout both
are divided by 1 - rate as well, so that nothing else needs to be. Above a document's own rank they are zeros.

A skinny product: every row is read once from memory, and by the programs of the other projections from the L2 cache.
Of one projection whose adapters have x's 16 bits, tiles come by the copy engine, and nothing is converted on the way.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, multiprocessors, padded_rank
from ..dot import multiply_add
from ..launch import launched
from ..lora_qkv.adapters import Adapters
from ..lora_qkv.tiles import slot_in_pool
from ..tile import tiled
from .pool import Pool, documents, inner_like, kept, load_factor, slot_and_rank, variant_of, variants


@dataclass(frozen=True)
class InnerConfig:
    """A program has block_m rows and up to `ranks` ranks of one projection, block_c of the sum a step."""

    block_m: int
    block_c: int
    ranks: int
    warps: int
    stages: int


def pick_inner_config(dtype: torch.dtype, rank: int) -> InnerConfig:
    """By the largest rank of the pools. No GPU has chosen between these yet; none spills on sm_90."""
    ranks = min(64, padded_rank(rank))
    return InnerConfig(32, 16, ranks, 4, 2) if dtype == torch.float32 else InnerConfig(128, 64, ranks, 4, 3)


def pick_tiled_inner_config(rank: int, rows: int, processors: int) -> InnerConfig:
    """Two programs of 96 KiB on a multiprocessor, three quarters of it on the way. Where tiles of 128 rows are no more
    than `processors`, they have half as many. By bytes in flight; no GPU has chosen.
    """
    return InnerConfig(128 if rows > 128 * processors else 64, 64, min(64, padded_rank(rank)), 4, 4)


@triton.jit
def _inner_tile(
    x_ptr, factor_ptr, out_ptr, key, factor, b, s, S, r, rank,
    C: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr, ACROSS: tl.constexpr, THRESHOLD: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Ranks r to r + W of the inner rows s to s + BM of document b."""
    row, j = s + tl.arange(0, BM), r + tl.arange(0, W)
    token = b.to(tl.int64) * S + row
    acc = tl.zeros((BM, W), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        x = tl.load(x_ptr + token[:, None] * C + c[None, :], (row < S)[:, None] & (c < C)[None, :], other=0.0)
        if THRESHOLD:
            x = kept(x, key, row, c, C, THRESHOLD)
        acc = multiply_add(x, load_factor(factor_ptr, j, rank, c, C, R, ACROSS).to(x.dtype), acc)
    places = out_ptr + token[:, None] * TOTAL + j[None, :]
    mask = (row < S)[:, None] & (j < (R + 15) // 16 * 16)[None, :]
    tl.store(places, (acc * factor).to(out_ptr.dtype.element_ty), mask)


@launched
@triton.jit(do_not_specialize=["S"])
def _inner_kernel(
    xs, factors, strides, counts, scales, ranks, keys, slots_ptr, out_ptr, S, inverse,
    P: tl.constexpr, SIZES: tl.constexpr, WIDEST: tl.constexpr, STARTS: tl.constexpr, FIRSTS: tl.constexpr,
    TOTAL: tl.constexpr, ACROSS: tl.constexpr, THRESHOLD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    WIDTH: tl.constexpr, VARIANTS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, WIDTH ranks of a projection): as wide a product as the document's own rank takes."""
    part, tile = tl.program_id(0) % FIRSTS[P], tl.program_id(0) // FIRSTS[P]
    across = tl.cdiv(S, BM)
    b, s = tile // across, tile % across * BM
    for p in tl.static_range(P):
        if (part >= FIRSTS[p]) & (part < FIRSTS[p + 1]):
            slot, rank = slot_and_rank(slots_ptr, ranks[p], b, counts[p], WIDEST[p])
            r = (part - FIRSTS[p]) * WIDTH
            if r < rank:
                factor, key = inverse, tl.zeros((), tl.int64)
                if scales[p] is not None:
                    factor *= tl.load(scales[p] + slot)
                if THRESHOLD:
                    key = tl.load(keys[p] + b)
                own, out = factors[p] + slot * strides[p], out_ptr + STARTS[p]
                for i in tl.static_range(VARIANTS):
                    if variant_of(rank - r, VARIANTS) == i:
                        _inner_tile(
                            xs[p], own, out, key, factor, b, s, S, r, rank, SIZES[p], WIDEST[p], TOTAL, ACROSS,
                            THRESHOLD, BM, BC, 16 * 2**i,
                        )  # fmt: skip
            row, j = s + tl.arange(0, BM), r + tl.arange(0, WIDTH)
            places = out_ptr + STARTS[p] + (b.to(tl.int64) * S + row)[:, None] * TOTAL + j[None, :]
            first = r + tl.where(r < rank, 16 << variant_of(rank - r, VARIANTS), 0)
            is_above = (j >= first) & (j < (WIDEST[p] + 15) // 16 * 16)
            zeros = tl.zeros((BM, WIDTH), out_ptr.dtype.element_ty)
            tl.store(places, zeros, (row < S)[:, None] & is_above[None, :])


@launched
@triton.jit(do_not_specialize=["S", "COUNT"])
def _tiled_inner_kernel(
    x_d, factor_d, scale_ptr, ranks_ptr, slots_ptr, out_ptr, S, COUNT,
    C: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr, PACKED: tl.constexpr, ACROSS: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, W ranks) of one projection: as wide a product as the pool's R takes; none where all of it
    is above the document's rank. PACKED, a document has a factor of its own, with zeros there.
    """
    PARTS: tl.constexpr = (TOTAL + W - 1) // W
    r, tile, across = tl.program_id(0) % PARTS * W, tl.program_id(0) // PARTS, tl.cdiv(S, BM)
    b, s = tile // across, tile % across * BM
    slot, rank = slot_and_rank(slots_ptr, ranks_ptr, b, COUNT, R)
    place = b
    if not PACKED:
        place = slot_in_pool(slot, COUNT)
    acc = tl.zeros((BM, W), tl.float32)
    for c in range(0, tl.where(r < rank, C, 0), BC):
        x = x_d.load([b, s, c]).reshape(BM, BC)
        if ACROSS:
            acc = multiply_add(x, factor_d.load([place, c, r]).reshape(BC, W), acc)
        else:
            acc = multiply_add(x, factor_d.load([place, r, c]).reshape(W, BC).T, acc)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + slot, rank > 0, other=0.0)
    row, j = s + tl.arange(0, BM), r + tl.arange(0, W)
    places = out_ptr + (b.to(tl.int64) * S + row)[:, None] * TOTAL + j[None, :]
    tl.store(places, acc.to(out_ptr.dtype.element_ty), (row < S)[:, None] & (j < TOTAL)[None, :])


def launch_tiled_inner(x: Tensor, pool: Pool, adapters: Adapters, is_backward: bool = False) -> Tensor:
    """As :func:`launch_inner`, of one projection without dropout, by `adapters`, which are those of the pool; `x` in 16
    bits and of a multiple of 8 columns.
    """
    out, factor = inner_like(x, pool.lora_b), adapters.b if is_backward else adapters.a
    rows, processors = x.size(0) * x.size(1), multiprocessors(x.device)
    config = pick_tiled_inner_config(adapters.rank, rows, processors)
    m, c, ranks = config.block_m, config.block_c, config.ranks
    programs, block = documents(x, m) * cdiv(out.size(2), ranks), (c, ranks) if is_backward else (ranks, c)
    if programs:
        _tiled_inner_kernel[(programs,)](
            x_d=tiled(x, 1, m, c), factor_d=tiled(factor, 1, *block),
            scale_ptr=pool.scales[0], ranks_ptr=pool.ranks[0], slots_ptr=pool.slots, out_ptr=out, S=x.size(1),
            COUNT=pool.lora_a[0].size(0), C=x.size(2), R=adapters.rank, TOTAL=out.size(2),
            PACKED=adapters.slots is None, ACROSS=is_backward, BM=m, BC=c, W=ranks, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
    return out


def launch_inner(xs: list[Tensor], pool: Pool, is_backward: bool = False) -> Tensor:
    """The inner rows [B, S, total] of `xs`, contiguous: one [B, S, K] for each projection, all the same; backward the
    gradients [B, S, N] of the outputs, by B in the place of A.

    Dropout is of x: backward there is none.
    """
    x, out = xs[0], inner_like(xs[0], pool.lora_b)
    config = pick_inner_config(x.dtype, max(pool.widest))
    factors = pool.lora_b if is_backward else pool.lora_a
    firsts = [0]
    for rank in pool.widest:
        firsts.append(firsts[-1] + cdiv(rank, config.ranks))
    programs = documents(x, config.block_m) * firsts[-1]
    if programs:
        _inner_kernel[(programs,)](
            xs=tuple(xs), factors=tuple(factors), strides=tuple(factor.stride(0) for factor in factors),
            counts=tuple(factor.size(0) for factor in factors), scales=tuple(pool.scales), ranks=tuple(pool.ranks),
            keys=tuple(pool.keys), slots_ptr=pool.slots, out_ptr=out, S=x.size(1),
            inverse=pool.inverse, P=len(xs), SIZES=tuple(x.size(2) for x in xs),
            WIDEST=tuple(pool.widest), STARTS=tuple(pool.starts), FIRSTS=tuple(firsts), TOTAL=out.size(2),
            ACROSS=is_backward, THRESHOLD=0 if is_backward else pool.threshold, BM=config.block_m, BC=config.block_c,
            WIDTH=config.ranks, VARIANTS=variants(config.ranks), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out
