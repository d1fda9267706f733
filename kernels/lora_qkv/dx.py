"""dx and t = dY B in one launch, and the tiles of all three launches of the backward, which are made for each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, padded_rank
from ..dot import multiply_add
from ..launch import launched
from ..side_stream import event
from ..tile import halves, tiled
from .adapters import Adapters
from .dx_turns import launch_dx_in_turns, phases, takes
from .tiles import (
    PIECES,
    cleared,
    described,
    is_stacked,
    of_three,
    programs,
    slot_in_pool,
    stacked_rank,
    store_slopes,
    store_tile,
)
from .turns import RANKS


@dataclass(frozen=True)
class BackwardConfig:
    """Tile of a dx step: block_m tokens x block_d and tail of D, block_n outputs; of dB: db_n outputs, db_s tokens a
    step; of dA: da_d of D, da_s tokens a step. dB's programs walk their tiles, db_programs on a multiprocessor.
    """

    block_m: int
    block_d: int
    block_n: int
    warps: int
    stages: int
    db_n: int
    db_s: int
    db_warps: int
    db_stages: int
    da_d: int
    da_s: int
    da_warps: int
    da_stages: int
    db_programs: int = 1
    tail: int = 0


def pick_backward_config(
    dtype: torch.dtype, rank: int, groups: int, width: int, has_kept: bool = False
) -> BackwardConfig:
    if dtype == torch.float32:
        block_m = 32 if stacked_rank(rank, groups) <= 64 else 16  # t is [block_m, stacked_rank] in registers
        return BackwardConfig(block_m, 64, 16, 4, 2, 64, 16, 8, 2, 32, 16, 8, 2)
    if padded_rank(rank) > 16:
        # A tile of 256 computes t half as often as two of 128; it fits, 223 KB, beside the t of one product up to 64.
        # dB does not fit beside it: as many programs as multiprocessors hold, 49 KB each. By the compiler.
        width = 256 if groups == 1 and rank <= 64 else 128
        stages = 2 if is_stacked(rank, groups) else 3
        return BackwardConfig(128, width, 64, 8, stages, 64, 64, 4, 3, 64, 64, 8, 3, db_programs=4)
    # NVIDIA H100, 65536 tokens of the seed's sizes, each alone: dx 0.121 ms (a form with 202 KB), dB 0.055, dA 0.029.
    # dB's blocks (20 KB) fit beside dx's (194 KB, 190 registers) on a multiprocessor, and run on beside dA. All three
    # on an H200: 0.161 ms; with dB in steps of 32 tokens 0.202 in three stages, 0.163 in four; of 128 outputs 0.164.
    config = BackwardConfig(128, 256, 64, 8, 3, 64, 64, 4, 2, 128, 64, 4, 4)
    if has_kept or 10 * 192 * cdiv(width, 192) > 9 * 256 * cdiv(width, 256):
        return config
    # Of three tiles of 256 a quarter lies past the last of 576 columns, of 192 nothing. Beside them fit more stages of
    # dB, whose one step ahead, 10 KB, is about 1 TB/s: 41 KB beside 160 KB of one product or 173 KB of three, 31 KB
    # beside 199 KB of three in 64 rows. H200, 65536 x 1536 x 576, rank 8: both 0.289 ms for 0.333, dB alone 0.136 for
    # 0.222 (nvidia-h200/tuning/lora_linears-6.txt).
    return replace(config, block_d=128, tail=64, db_stages=3 if stacked_rank(rank, groups) > 32 else 4)


@triton.jit
def _rows_of_a(a_ptr, row, column, named, D: tl.constexpr):
    """These columns of these rows of A; zeros for rows that are not named, and past D."""
    a_rows = a_ptr + row[:, None] * D + column
    return tl.load(a_rows, named[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _store_dx(dx_d, kept_d, dx, b, s, d, BM: tl.constexpr, BD: tl.constexpr):
    if kept_d is None:
        store_tile(dx_d, dx, b, s, d, BM, BD)
    else:
        store_slopes(dx_d, kept_d, dx, b, s, d, BM, BD)


@triton.jit
def _store_with_tail(dx_d, dx, tail, b, s, d, BM: tl.constexpr, BD: tl.constexpr):
    """The halves of dx [BM, BD], then the tail [BM, BD / 2]: one block for the copy engine."""
    left, right = halves(dx.to(dx_d.dtype), BM, BD)
    dx_d.store([b, s, d], left.reshape(1, BM, BD // 2))
    dx_d.store([b, s, d + BD // 2], right.reshape(1, BM, BD // 2))
    dx_d.store([b, s, d + BD], tail.to(dx_d.dtype).reshape(1, BM, BD // 2))


@launched
@triton.jit(do_not_specialize=["S", "TILES", "COUNT"])
def _dx_kernel(
    q_d, k_d, v_d, w_d, tail_d, a_ptr, b_d, slots_ptr, dx_d, kept_d, t_ptr, a_stride, S, TILES, COUNT,
    NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, STACKED: tl.constexpr, PACKED: tl.constexpr,
    WITH_DX: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A program walks tiles [BM tokens, BD + TAIL of D] like the forward's; a step takes BN outputs of q, k or v where
    they lie, without joining them. One product is q alone, without k_d and v_d.

    TAIL is half of BD, or 0. Blocks are powers of two: a tile of 192 columns is one of 128 and one of 64, which has its
    own block of the weight, tail_d, and its own sums.

    The tile of the first columns stores t, projections side by side, rounded to x's dtype. Each is multiplied by its A
    and stored [.., RT] when it is complete; STACKED, all at once. For that a row of B, if not packed so, is read from
    as far left of it as its projection's place is. What lies left of it reads as zeros.

    With kept_d x is a relu(u)^2, and the gradient of u leaves for that of x.
    """
    GROUPS: tl.constexpr = 1 if v_d is None else 3
    PARTS: tl.constexpr = 1 if STACKED else GROUPS
    ROWS: tl.constexpr = GROUPS * R // PARTS
    CQ: tl.constexpr = (NQ + BN - 1) // BN
    CK: tl.constexpr = (NK + BN - 1) // BN
    CV: tl.constexpr = (NV + BN - 1) // BN
    STEPS: tl.constexpr = CQ + CK + CV
    BT: tl.constexpr = BD + TAIL
    TD: tl.constexpr = (D + BT - 1) // BT if WITH_DX else 1
    DTYPE: tl.constexpr = q_d.dtype
    across = tl.cdiv(S, BM)
    tile = tl.program_id(0) - tl.num_programs(0)
    b, s, d, slot = 0, 0, 0, 0
    step = STEPS - 1
    dx = tl.zeros((BM, BD), tl.float32)
    if TAIL:
        tail = tl.zeros((BM, TAIL), tl.float32)
    t = tl.zeros((BM, RT), tl.float32)
    for _ in range(0, tl.cdiv(TILES - tl.program_id(0), tl.num_programs(0)) * STEPS):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            row = tile // TD
            b, s, d = row // across, row % across * BM, tile % TD * BT
            slot = b
            if slots_ptr is not None:
                slot = slot_in_pool(tl.load(slots_ptr + b), COUNT)
        g_d, n, first, place = q_d, step * BN, 0, 0
        if GROUPS == 3:
            if step >= CQ + CK:
                g_d, n, first, place = v_d, (step - CQ - CK) * BN, NQ + NK, 2 * R
            elif step >= CQ:
                g_d, n, first, place = k_d, (step - CQ) * BN, NQ, R
        g = g_d.load([b, s, n]).reshape(BM, BN)
        lora_b = b_d.load([slot, first + n, -place if STACKED and not PACKED else 0]).reshape(BN, RT)
        t = multiply_add(g, lora_b, t)
        if WITH_DX:
            dx = multiply_add(g, w_d.load([first + n, d]), dx)
            if TAIL:
                tail = multiply_add(g, tail_d.load([first + n, d + BD]), tail)
        part, is_whole = 0, step == STEPS - 1
        if PARTS == 3:
            part = (step >= CQ).to(tl.int32) + (step >= CQ + CK).to(tl.int32)
            is_whole = is_whole | (step == CQ - 1) | (step == CQ + CK - 1)
        if is_whole:
            j, row_s = tl.arange(0, RT), s + tl.arange(0, BM)
            rounded = t.to(DTYPE)
            if WITH_DX:
                column = d + tl.arange(0, BD)
                named = (slot >= 0) & (slot < COUNT) & (j < ROWS)
                own_a_ptr = a_ptr + slot.to(tl.int64) * a_stride
                a = _rows_of_a(own_a_ptr, part * R + j, column, named, D)
                if TAIL:  # asked for before the product: it arrives meanwhile
                    tail_a = _rows_of_a(own_a_ptr, part * R + j, d + BD + tl.arange(0, TAIL), named, D)
                dx = multiply_add(rounded, a, dx)
                if TAIL:
                    tail = multiply_add(rounded, tail_a, tail)
            if d == 0:
                t_rows = t_ptr + (b.to(tl.int64) * S + row_s)[:, None] * (PARTS * RT) + part * RT + j
                tl.store(t_rows, rounded, (row_s < S)[:, None])
            if WITH_DX and (PARTS == 1 or step == STEPS - 1):
                if TAIL:
                    _store_with_tail(dx_d, dx, tail, b, s, d, BM, BD)
                    tail = cleared(BM, TAIL, DTYPE, 32)  # t can be as wide
                else:
                    _store_dx(dx_d, kept_d, dx, b, s, d, BM, BD)
                dx = cleared(BM, BD, DTYPE)
            t = cleared(BM, RT, DTYPE)


DB_ALONE = {"db_stages": 4, "db_programs": 4}
"""Of up to 16 ranks, where no dx runs beside it: 41 KB a program. 104 us for 65,536 x 3,072 on an H200, by bytes 96.
A tile's outputs stay what :func:`db_sizes` has counted with."""


def launch_dx(
    config: BackwardConfig,
    grads: Sequence[Tensor],
    sizes: Sequence[int],
    x: Tensor,
    weight: Tensor,
    adapters: Adapters,
    stacked: int,
    parts: int,
    dx: Tensor | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, BackwardConfig, torch.cuda.Event | None]:
    """Writes dx where it is given. Returns t, the config of dB, and what dB waits for: None is all launched so far."""
    batch, length, width = x.shape
    if dx is not None and kept is None and takes(x, adapters.rank, sizes):
        t = x.new_empty(batch, length, phases(adapters.rank, sizes) * RANKS.value)
        launch_dx_in_turns(grads, weight, adapters, t, dx)
        return t, replace(config, **DB_ALONE), None  # beside dx it would not fit
    t, ready = x.new_empty(batch, length, parts * stacked), event(x.device)
    nq, nk, nv = of_three(sizes, 0)
    m, d, n, tail = config.block_m, config.block_d, config.block_n, config.tail
    tiles = batch * cdiv(length, m) * (1 if dx is None else cdiv(width, d + tail))
    piece = tail or d // PIECES
    q_d, k_d, v_d = of_three([tiled(grad, 1, m, n) for grad in described(grads)])
    _dx_kernel[(programs(x.device, tiles),)](
        q_d=q_d, k_d=k_d, v_d=v_d, w_d=tiled(weight, n, d), tail_d=tiled(weight, n, tail) if tail else None,
        a_ptr=adapters.a, b_d=tiled(adapters.b, 1, n, stacked), slots_ptr=adapters.slots,
        dx_d=tiled(x if dx is None else dx, 1, m, piece),
        kept_d=None if kept is None else tiled(kept, 1, m, piece), t_ptr=t, a_stride=adapters.a.stride(0),
        S=length, TILES=tiles, COUNT=adapters.a.size(0), NQ=nq, NK=nk, NV=nv, D=width, R=adapters.rank, RT=stacked,
        BM=m, BD=d, BN=n, STACKED=parts < len(grads), PACKED=adapters.is_packed, WITH_DX=dx is not None, TAIL=tail,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return t, config, ready
