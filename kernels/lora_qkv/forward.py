"""The forward launches: the adapters of the batch as the tensor cores read them, then the three projections."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dot import multiply_add
from .tiles import padded_rank, programs, stacked_rank, store_tile, tiled


@dataclass(frozen=True)
class ForwardConfig:
    """Tile of a step: block_m tokens x block_n outputs, block_k of D; the result leaves in `pieces`."""

    block_m: int
    block_n: int
    block_k: int
    pieces: int
    warps: int
    stages: int


def pick_forward_config(dtype: torch.dtype, rank: int) -> ForwardConfig:
    if dtype == torch.float32:
        return ForwardConfig(64, 64, 16, 1, 8, 2)  # no tensor cores: what does not spill
    if padded_rank(rank) > 16:
        return ForwardConfig(128, 128, 64, 1, 8, 3)  # room in registers and shared memory for R up to 64
    # NVIDIA H200, 65536 x 512 x 1024: 0.130 ms; 3 stages and 2 pieces 0.131, 3 and 1 0.134
    return ForwardConfig(128, 256, 64, 4, 8, 4)


PACK = 128
"""Columns of A, or rows of B, that a program of the packing launch rounds."""


@triton.jit
def _pack_kernel(
    a_ptr, b_ptr, packed_a_ptr, packed_b_ptr, slots_ptr, a_stride, b_stride, count, N, D,
    NQ: tl.constexpr, NK: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile, b): PACK columns of document b's A (the first tiles) or PACK rows of its B; zeros without one."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = b
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    named = (slot >= 0) & (slot < count)
    j, i = tl.arange(0, RT), tl.arange(0, BLOCK)
    across = tl.cdiv(D, BLOCK)
    if tile < across:
        d = tile * BLOCK + i
        a = tl.load(a_ptr + slot * a_stride + j[:, None] * D + d, named & (j < 3 * R)[:, None] & (d < D), other=0.0)
        tl.store(packed_a_ptr + (b * RT + j)[:, None] * D + d, a, (d < D)[None, :])
    else:
        n = (tile - across) * BLOCK + i
        r = j - ((n >= NQ).to(tl.int32) + (n >= NQ + NK).to(tl.int32))[:, None] * R
        mask = named & (n < N)[:, None] & (r >= 0) & (r < R)
        lora_b = tl.load(b_ptr + slot * b_stride + n[:, None] * R + r, mask, other=0.0)
        tl.store(packed_b_ptr + (b * N + n)[:, None] * RT + j, lora_b, (n < N)[:, None])


@triton.jit(do_not_specialize=["S", "TILES"])
def _forward_kernel(
    x_d, w_d, a_d, b_ptr, q_d, k_d, v_d, xa_ptr, S, TILES,
    NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    RT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A program walks tiles [BM tokens, BN outputs of one projection] in one loop over all steps of all its tiles, so
    that the loads of a tile start while the one before it is finished. Neighbours work on the same tokens: x comes from
    the L2 cache.
    """
    TQ: tl.constexpr = (NQ + BN - 1) // BN
    TK: tl.constexpr = (NK + BN - 1) // BN
    TV: tl.constexpr = (NV + BN - 1) // BN
    STEPS: tl.constexpr = (D + BK - 1) // BK
    N: tl.constexpr = NQ + NK + NV
    across = tl.cdiv(S, BM)
    tile = tl.program_id(0) - tl.num_programs(0)
    b, s, p, n = 0, 0, 0, 0
    step = STEPS - 1
    acc = tl.zeros((BM, BN), tl.float32)
    xa = tl.zeros((BM, RP), tl.float32)
    for _ in range(0, tl.cdiv(TILES - tl.program_id(0), tl.num_programs(0)) * STEPS):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            column, row = tile % (TQ + TK + TV), tile // (TQ + TK + TV)
            b, s = row // across, row % across * BM
            p = (column >= TQ).to(tl.int32) + (column >= TQ + TK).to(tl.int32)
            n = (column - tl.where(p == 0, 0, tl.where(p == 1, TQ, TQ + TK))) * BN
        first = tl.where(p == 0, 0, tl.where(p == 1, NQ, NQ + NK))
        x = x_d.load([b, s, step * BK]).reshape(BM, BK)
        w = w_d.load([first + n, step * BK])
        a = a_d.load([b, p * R, step * BK]).reshape(RP, BK)
        # x A^T comes first and starts from a select: with both products in flight over the loop's edge, or with xa
        # zeroed at the tile's end, ptxas runs every matrix instruction by itself (0.152 ms for 0.131)
        xa = multiply_add(x, a.T, tl.where(step == 0, 0.0, xa))
        acc = multiply_add(x, w.T, acc)
        if step == STEPS - 1:
            # R rows of A were wanted and RP loaded: those past R belong to the next projection
            r, row_n, row_s = tl.arange(0, RP), first + n + tl.arange(0, BN), s + tl.arange(0, BM)
            inner = tl.where((r < R)[None, :], xa, 0.0).to(x.dtype)
            b_rows = b_ptr + (b.to(tl.int64) * N + row_n)[:, None] * RT + p * R + r
            lora_b = tl.load(b_rows, (row_n < N)[:, None] & (r < R)[None, :], other=0.0)
            acc = multiply_add(inner, lora_b.T, acc)
            if n == 0:
                xa_rows = xa_ptr + ((b.to(tl.int64) * S + row_s)[:, None] * 3 + p) * RP + r
                tl.store(xa_rows, inner, (row_s < S)[:, None])
            out_d = q_d
            if p == 2:
                out_d = v_d
            elif p == 1:
                out_d = k_d
            store_tile(out_d, acc, b, s, n, BM, BN, PIECES)
            acc = tl.zeros((BM, BN), tl.float32)


def launch_pack(lora_a: Tensor, lora_b: Tensor, slots: Tensor | None, batch: int, sizes, dtype: torch.dtype):
    """A of the batch's documents [B, RT, D], projections stacked, and B [B, N, RT], a row's R values at the place of
    its projection and zeros elsewhere: B A is then the whole low-rank weight.
    """
    rank, width, rows = lora_a.size(2), lora_a.size(3), lora_b.size(1)
    stacked = stacked_rank(rank)
    packed_a = torch.empty(batch, stacked, width, device=lora_a.device, dtype=dtype)
    packed_b = torch.empty(batch, rows, stacked, device=lora_a.device, dtype=dtype)
    if batch:
        _pack_kernel[(triton.cdiv(width, PACK) + triton.cdiv(rows, PACK), batch)](
            lora_a, lora_b, packed_a, packed_b, slots, lora_a.stride(0), lora_b.stride(0),
            lora_a.size(0), rows, width,
            NQ=sizes[0], NK=sizes[1], R=rank, RT=stacked, BLOCK=PACK, num_warps=4,
        )  # fmt: skip
    return packed_a, packed_b


def launch_forward(x: Tensor, weight: Tensor, packed_a: Tensor, packed_b: Tensor, rank: int, sizes):
    """(q, k, v, xa): the projections, and x A^T [B, S, 3 RP] rounded to x's dtype, which dB wants."""
    batch, length, width = x.shape
    padded, config = padded_rank(rank), pick_forward_config(x.dtype, rank)
    outs = [x.new_empty(batch, length, size) for size in sizes]
    xa = x.new_empty(batch, length, 3 * padded)
    if xa.numel():
        m, n, k = config.block_m, config.block_n, config.block_k
        tiles = batch * triton.cdiv(length, m) * sum(triton.cdiv(size, n) for size in sizes)
        _forward_kernel[(programs(x.device, tiles),)](
            tiled(x, 1, m, k), tiled(weight, n, k), tiled(packed_a, 1, padded, k), packed_b,
            *(tiled(out, 1, m, n // config.pieces) for out in outs), xa, length, tiles,
            *sizes, D=width, R=rank, RP=padded, RT=packed_a.size(1), BM=m, BN=n, BK=k, PIECES=config.pieces,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return *outs, xa
