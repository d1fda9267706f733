"""The adapters' part added to a product that something else made: cuBLAS, or the kernels of six bits.

    y += u B^T    of one projection            dx += sum_p mask_p (t_p A_p)    of all, in one pass over dx

It reads and writes y once, of documents with an adapter; others are not touched.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv
from ..dot import multiply_add
from ..launch import launched
from .pool import Pool, documents, kept, load_factor, slot_and_rank


@dataclass(frozen=True)
class AddConfig:
    """A program has a tile of block_m rows and block_c columns; a step takes STEP ranks."""

    block_m: int
    block_c: int
    warps: int
    stages: int


def pick_add_config(dtype: torch.dtype) -> AddConfig:
    """No GPU has chosen between these yet; none spills on sm_90."""
    return AddConfig(32, 64, 4, 2) if dtype == torch.float32 else AddConfig(64, 128, 4, 3)


@launched
@triton.jit(do_not_specialize=["S"])
def _add_kernel(
    inner_ptr, factors, strides, counts, ranks, keys, slots_ptr, out_ptr, S,
    P: tl.constexpr, C: tl.constexpr, WIDEST: tl.constexpr, STARTS: tl.constexpr, TOTAL: tl.constexpr,
    ACROSS: tl.constexpr, THRESHOLD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, tile of columns): neighbours read the same inner rows."""
    TILES: tl.constexpr = (C + BC - 1) // BC
    tile, across = tl.program_id(0) // TILES, tl.cdiv(S, BM)
    b = tile // across
    row, c = tile % across * BM + tl.arange(0, BM), tl.program_id(0) % TILES * BC + tl.arange(0, BC)
    every = 0
    for p in tl.static_range(P):
        every += slot_and_rank(slots_ptr, ranks[p], b, counts[p], WIDEST[p])[1]
    if every > 0:
        token, mask = b.to(tl.int64) * S + row, (row < S)[:, None] & (c < C)[None, :]
        places = out_ptr + token[:, None] * C + c[None, :]
        acc = tl.load(places, mask, other=0.0).to(tl.float32)
        for p in tl.static_range(P):
            slot, rank = slot_and_rank(slots_ptr, ranks[p], b, counts[p], WIDEST[p])
            own, inner_rows = factors[p] + slot * strides[p], inner_ptr + token[:, None] * TOTAL + STARTS[p]
            part = tl.zeros((BM, BC), tl.float32) if THRESHOLD else acc
            for r in range(0, rank, 16):
                j = r + tl.arange(0, 16)
                inner = tl.load(inner_rows + j[None, :], (row < S)[:, None], other=0.0)
                factor = load_factor(own, j, rank, c, C, WIDEST[p], ACROSS).to(inner.dtype)
                part = multiply_add(inner, factor.T, part)
            if THRESHOLD:
                acc += kept(part, tl.load(keys[p] + b), row, c, C, THRESHOLD)
            else:
                acc = part
        tl.store(places, acc.to(out_ptr.dtype.element_ty), mask)


def launch_add(out: Tensor, inner: Tensor, pool: Pool, p: int | None = None) -> None:
    """Adds to `out` [B, S, N], contiguous, the adapters' part of projection `p`; without one to dx [B, S, K] that of
    all.
    """
    config = pick_add_config(out.dtype)
    chosen = slice(None) if p is None else slice(p, p + 1)
    factors, columns = (pool.lora_a if p is None else pool.lora_b)[chosen], out.size(2)
    programs = documents(out, config.block_m) * cdiv(columns, config.block_c)
    if programs:
        _add_kernel[(programs,)](
            inner_ptr=inner, factors=tuple(factors), strides=tuple(factor.stride(0) for factor in factors),
            counts=tuple(factor.size(0) for factor in factors), ranks=tuple(pool.ranks[chosen]),
            keys=tuple(pool.keys[chosen]), slots_ptr=pool.slots, out_ptr=out, S=out.size(1),
            P=len(factors), C=columns, WIDEST=tuple(pool.widest[chosen]), STARTS=tuple(pool.starts[chosen]),
            TOTAL=inner.size(2), ACROSS=p is not None, THRESHOLD=pool.threshold if p is None else 0,
            BM=config.block_m, BC=config.block_c, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
