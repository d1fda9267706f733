"""The backward launches: dx and t = dY B, then dA from t and x; beside both dB."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, next_power_of_2, padded_rank
from ..dot import multiply_add
from ..launch import launched
from ..tile import halves, tiled
from .adapters import Adapters
from .dx_turns import launch_dx_in_turns, phases, takes
from .sums import NOTHING, STRIDES, Sums, can_share, slots_of, store_sum, sums_of
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


@launched
@triton.jit(do_not_specialize=["B", "S", "TILES", *STRIDES])
def _db_kernel(
    q_d, k_d, v_d, xa_d, db_ptr, parts_ptr, ended_ptr, scale_ptr, slots_ptr, db_stride, parts_stride, ended_stride,
    count, B, S, TILES,
    NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A program walks tiles (document, BN outputs of one projection): dB = dY^T xa, tokens in order, and what other
    documents have of the slot as :mod:`.sums` adds it. With scale_ptr, times that of projection and slot.
    """
    TQ: tl.constexpr = (NQ + BN - 1) // BN
    TK: tl.constexpr = (NK + BN - 1) // BN
    TV: tl.constexpr = (NV + BN - 1) // BN
    for tile in range(tl.program_id(0), TILES, tl.num_programs(0)):
        b, column = tile // (TQ + TK + TV), tile % (TQ + TK + TV)
        p, n, first, width, g_d = 0, column * BN, 0, NQ, q_d
        if v_d is not None:
            if column >= TQ + TK:
                p, n, first, width, g_d = 2, (column - TQ - TK) * BN, NQ + NK, NV, v_d
            elif column >= TQ:
                p, n, first, width, g_d = 1, (column - TQ) * BN, NQ, NK, k_d
        slot, every = slots_of(slots_ptr, b, count, B, BP)
        if slot >= 0:
            db = tl.zeros((BN, RP), tl.float32)
            for s in range(0, S, BS):
                g = g_d.load([b, s, n]).reshape(BS, BN)
                xa = xa_d.load([b, s, p * RP]).reshape(BS, RP)
                db = multiply_add(g.T, xa, db)
            if scale_ptr is not None:
                db *= tl.load(scale_ptr + p * count + slot)
            row, r = n + tl.arange(0, BN), tl.arange(0, RP)
            places, mask = (first + row)[:, None] * R + r, (row < width)[:, None] & (r < R)[None, :]
            store_sum(
                db, places, mask, db_ptr + slot * db_stride, parts_ptr, ended_ptr, parts_stride, ended_stride, column,
                every, slot, b, B, BP,
            )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["B", "S", *STRIDES])
def _da_kernel(
    t_d, x_d, da_ptr, parts_ptr, ended_ptr, slots_ptr, da_stride, parts_stride, ended_stride, count, B, S,
    D: tl.constexpr, ROWS: tl.constexpr, RT: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr,
    BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Program (tile of D and part of t, b): ROWS rows of dA = t^T x, tokens in order; slots as for dB."""
    TILES: tl.constexpr = (D + BD - 1) // BD * PARTS
    tile, b = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    d, part = tile // PARTS * BD, tile % PARTS
    slot, every = slots_of(slots_ptr, b, count, B, BP)
    if slot >= 0:
        da = tl.zeros((RT, BD), tl.float32)
        for s in range(0, S, BS):
            t = t_d.load([b, s, part * STEP]).reshape(BS, RT)
            x = x_d.load([b, s, d]).reshape(BS, BD)
            da = multiply_add(t.T, x, da)
        j, column = tl.arange(0, RT), d + tl.arange(0, BD)
        places, mask = (part * ROWS + j)[:, None] * D + column, (j < ROWS)[:, None] & (column < D)[None, :]
        store_sum(
            da, places, mask, da_ptr + slot * da_stride, parts_ptr, ended_ptr, parts_stride, ended_stride, tile,
            every, slot, b, B, BP,
        )  # fmt: skip


def event(device: torch.device) -> torch.cuda.Event | None:
    """When what the current stream was given so far is done; None where there are no streams."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def beside(device: torch.device, ready: torch.cuda.Event | None) -> AbstractContextManager:
    """What is launched inside runs once `ready`, beside what the current stream is given, until :func:`join`."""
    if ready is None:
        return nullcontext()
    side = _side_stream(device)
    side.wait_event(ready)
    return torch.cuda.stream(side)


def join(device: torch.device, ready: torch.cuda.Event | None) -> None:
    if ready is not None:
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def launch_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    adapters: Adapters,
    xa: Tensor,
    slots: Tensor | None,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    kept: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Writes dx, and the rows of da and db that `slots` name. dx, or da and db, may be None; db alone where it was made
    elsewhere.

    `grads` are those of the projections, or of one product. `kept`, what :func:`times_slope` reads of an x that is
    relu(u)^2, makes dx the gradient of u. `scale` fp32 [slots], for each projection one after the other, is what B was
    scaled by.
    """
    rank, groups, sizes = adapters.rank, len(grads), [grad.size(2) for grad in grads]
    config = pick_backward_config(x.dtype, rank, groups, x.size(2), kept is not None)
    stacked, parts = stacked_rank(rank, groups), 1 if is_stacked(rank, groups) else groups
    db_sums = da_sums = NOTHING
    if da is not None and can_share(slots, x):
        of_da = groups * rank * x.size(2), cdiv(x.size(2), config.da_d) * parts
        db_sums, da_sums = sums_of(x, db_sizes(config, sizes, rank) if db is not None else (0, 0), of_da)
    t, config, ready = launch_dx(config, grads, sizes, x, weight, adapters, stacked, parts, dx, kept)
    if da is None:
        return
    if db is not None:
        with beside(x.device, ready):
            launch_db(config, grads, sizes, xa, slots, db, db_sums, rank, scale)
    _launch_da(config, x, t, stacked, parts, slots, da, da_sums, groups * rank // parts)
    join(x.device, ready)


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
    batch, length, _ = x.shape
    if dx is not None and kept is None and takes(x, adapters.rank, sizes):
        t = x.new_empty(batch, length, phases(adapters.rank, sizes) * RANKS.value)
        launch_dx_in_turns(grads, weight, adapters, t, dx)
        return t, replace(config, **DB_ALONE), None  # beside dx it would not fit
    t, ready = x.new_empty(batch, length, parts * stacked), event(x.device)
    _launch_dx(config, grads, sizes, x, weight, adapters, t, stacked, parts, dx, kept)
    return t, config, ready


def _launch_dx(
    config: BackwardConfig,
    grads: Sequence[Tensor],
    sizes: Sequence[int],
    x: Tensor,
    weight: Tensor,
    adapters: Adapters,
    t: Tensor,
    stacked: int,
    parts: int,
    dx: Tensor | None,
    kept: Tensor | None,
) -> None:
    (batch, length, width), (nq, nk, nv) = x.shape, of_three(sizes, 0)
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


def db_sizes(config: BackwardConfig, sizes: Sequence[int], rank: int) -> tuple[int, int]:
    """The numbers of a slot's dB, and the tiles of a document's, as :func:`.sums.sums_of` takes them."""
    return sum(sizes) * rank, sum(cdiv(size, config.db_n) for size in sizes)


def launch_db(
    config: BackwardConfig,
    grads: Sequence[Tensor],
    sizes: Sequence[int],
    xa: Tensor,
    slots: Tensor | None,
    db: Tensor,
    sums: Sums,
    rank: int,
    scale: Tensor | None,
) -> None:
    """Writes the rows of db that `slots` name."""
    (batch, length, _), padded, n, s = xa.shape, padded_rank(rank), config.db_n, config.db_s
    nq, nk, nv = of_three(sizes, 0)
    tiles = batch * sum(cdiv(size, n) for size in sizes)
    q_d, k_d, v_d = of_three([tiled(grad, 1, s, n) for grad in described(grads)])
    _db_kernel[(programs(xa.device, tiles, config.db_programs),)](
        q_d=q_d, k_d=k_d, v_d=v_d, xa_d=tiled(xa, 1, s, padded),
        db_ptr=db, **sums, scale_ptr=scale, slots_ptr=slots, db_stride=db.stride(0), count=db.size(0),
        B=batch, S=length, TILES=tiles,
        NQ=nq, NK=nk, NV=nv, R=rank, RP=padded, BN=n, BS=s, BP=next_power_of_2(batch),
        num_warps=config.db_warps, num_stages=config.db_stages,
    )  # fmt: skip


def _launch_da(
    config: BackwardConfig,
    x: Tensor,
    t: Tensor,
    stacked: int,
    parts: int,
    slots: Tensor | None,
    da: Tensor,
    sums: Sums,
    every: int,
) -> None:
    """`every`: rows of A of a part."""
    batch, length, width = x.shape
    d, s, rows = config.da_d, config.da_s, max(64, stacked)  # 64: the fewest rows of a Hopper matrix instruction
    _da_kernel[(cdiv(width, d) * parts * batch,)](
        t_d=tiled(t, 1, s, rows), x_d=tiled(x, 1, s, d), da_ptr=da, **sums, slots_ptr=slots,
        da_stride=da.stride(0), count=da.size(0), B=batch, S=length, D=width, ROWS=every, RT=rows, STEP=stacked,
        PARTS=parts, BD=d, BS=s, BP=next_power_of_2(batch), num_warps=config.da_warps, num_stages=config.da_stages,
    )  # fmt: skip
