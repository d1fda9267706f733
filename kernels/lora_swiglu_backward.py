"""The middle of lora_swiglu_mlp's backward in one pass: from dh, the gradient of h = silu(g) u, all that reads it.

    dg, du of :mod:`.swiglu`;   dBg = dg^T (x Ag^T);   dBu = du^T (x Au^T);   dAd = td^T h

Before it comes dx of down, which writes dh and td = dout Bd, with dB of down beside it. dh, g and u are read once, dg
and du written: 10 bytes a number in 16 bits, and what else is read has 16 columns. h is made again, not read: its bits
are the forward's. dg, du and h are rounded before they are multiplied, and every sum is made in the order of the
launches that this stands for, so its bits are theirs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import aligned, cdiv, custom_op, empty_as, multiprocessors, next_power_of_2
from .dot import multiply_add
from .launch import launched
from .lora_qkv.adapters import Adapters, adapters_of
from .lora_qkv.backward import db_sizes, launch_db
from .lora_qkv.dx import launch_dx, pick_backward_config
from .lora_qkv.sums import (
    NOTHING,
    STRIDES,
    Sums,
    add_parts,
    can_share,
    documents_of,
    ends_last,
    following,
    slots_of,
    sums_of,
)
from .lora_qkv.tiles import stacked_rank
from .side_stream import beside, join
from .swiglu import silu, swiglu_gradient
from .tile import tiled

MOST_RANKS = 16
ROWS = 64
"""Of a sum, the fewest of a Hopper matrix instruction: x A^T of gate, then of up, or td; and what lies behind them.

They are its rows, not its columns, for what is computed may come from shared memory only on the other side. Out of
registers Triton computes dg, du and h twice, once as a matrix instruction wants them and once as they are stored.
"""


@dataclass(frozen=True)
class SlopesConfig:
    """A program's columns of hidden, the tokens of a step, warps, stages of the steps' loads."""

    block_n: int
    block_s: int
    warps: int
    stages: int


CONFIG = SlopesConfig(64, 32, 4, 3)
"""Of 16 on an H200 the fastest at 64 x 1,024 x 1,536 and eight ranks; 291 us, the passes that it stands for 386."""


def takes_slopes(g: Tensor, *ranks: int) -> bool:
    """Whether the middle is one launch: of 16 bits, few ranks, and as many programs as a GPU runs at once. With fewer
    a document's tokens take longer than the passes do: 46 us for 31 at 4 x 1,024 x 1,536, on an H200.
    """
    programs = g.size(0) * cdiv(g.size(2), CONFIG.block_n)
    return g.dtype != torch.float32 and max(ranks) <= MOST_RANKS and programs >= 2 * multiprocessors(g.device)


@triton.jit
def _slopes(dh_d, g_d, u_d, b, s, n, BS: tl.constexpr, BN: tl.constexpr):
    """dg, du and h of a tile [BS tokens, BN columns], rounded."""
    dh = dh_d.load([b, s, n]).reshape(BS, BN).to(tl.float32)
    g = g_d.load([b, s, n]).reshape(BS, BN).to(tl.float32)
    u = u_d.load([b, s, n]).reshape(BS, BN).to(tl.float32)
    dg, du = swiglu_gradient(dh, g, u)
    return dg.to(g_d.dtype), du.to(g_d.dtype), (silu(g) * u).to(g_d.dtype)


@triton.jit
def _of_ranks(first, n, rank_step, column_step, R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr):
    """Of sums [ROWS, BN] from column n on: their numbers in a gradient, and the mask of R rows from the `first` on."""
    r, column = tl.arange(0, ROWS) - first, n + tl.arange(0, BN)
    mask = ((r >= 0) & (r < R))[:, None] & (column < N)[None, :]
    return r[:, None] * rank_step + column * column_step, mask


@triton.jit
def _store(
    db_ptr, da_ptr, db_gate, db_up, da, n,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DOWN_R: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums as the gradients have them, or as a document keeps them."""
    gate, is_gate = _of_ranks(0, n, 1, R, R, N, ROWS, BN)
    up, is_up = _of_ranks(RP, n, 1, R, R, N, ROWS, BN)
    down, is_down = _of_ranks(0, n, N, 1, DOWN_R, N, ROWS, BN)
    tl.store(db_ptr + gate, db_gate, is_gate)
    tl.store(db_ptr + N * R + up, db_up, is_up)
    tl.store(da_ptr + down, da, is_down)


@launched
@triton.jit(do_not_specialize=["B", "S", *STRIDES])
def _slopes_kernel(
    dh_d, g_d, u_d, xa_d, t_d, dg_ptr, du_ptr, db_ptr, da_ptr, parts_ptr, ended_ptr, scale_ptr, slots_ptr, db_stride,
    da_stride, parts_stride, ended_stride, count, B, S,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DOWN_R: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Program (BN columns, document b): dg and du, and b's part of dB of gate and up, times their scale, and of dA of
    down, tokens in order. What other documents have of the slot is added as :mod:`.lora_qkv.sums` says.
    """
    TILES: tl.constexpr = (N + BN - 1) // BN
    tile, b = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    n, first, row = tile * BN, b.to(tl.int64) * S, tl.arange(0, BS)
    column = n + tl.arange(0, BN)
    slot, every = slots_of(slots_ptr, b, count, B, BP)
    db_gate = tl.zeros((ROWS, BN), tl.float32)  # transposed
    db_up = tl.zeros((ROWS, BN), tl.float32)
    da = tl.zeros((ROWS, BN), tl.float32)
    for s in range(0, S, BS):
        dg, du, h = _slopes(dh_d, g_d, u_d, b, s, n, BS, BN)
        place, mask = (first + s) * N, (row < S - s)[:, None] & (column < N)[None, :]
        tl.store(dg_ptr + place + (row[:, None] * N + column), dg, mask)
        tl.store(du_ptr + place + (row[:, None] * N + column), du, mask)
        xa = xa_d.load([b, s, 0]).reshape(BS, ROWS)
        t = t_d.load([b, s, 0]).reshape(BS, ROWS)
        db_gate = multiply_add(xa.T, dg, db_gate)
        db_up = multiply_add(xa.T, du, db_up)
        da = multiply_add(t.T, h, da)
    if slot >= 0:
        if scale_ptr is not None:
            db_gate *= tl.load(scale_ptr + slot)
            db_up *= tl.load(scale_ptr + count + slot)
        own_db_ptr, own_da_ptr = db_ptr + slot * db_stride, da_ptr + slot * da_stride
        if parts_ptr is None:
            _store(own_db_ptr, own_da_ptr, db_gate, db_up, da, n, N, R, RP, DOWN_R, ROWS, BN)
        else:
            members = documents_of(every, slot, B, BP)
            if members == 1:
                _store(own_db_ptr, own_da_ptr, db_gate, db_up, da, n, N, R, RP, DOWN_R, ROWS, BN)
            else:
                own_ptr = parts_ptr + b.to(tl.int64) * parts_stride
                _store(own_ptr, own_ptr + 2 * N * R, db_gate, db_up, da, n, N, R, RP, DOWN_R, ROWS, BN)
                if ends_last(ended_ptr + following(every, slot, -1, B, BP) * ended_stride + tile, members):
                    gate, is_gate = _of_ranks(0, n, 1, R, R, N, ROWS, BN)
                    up, is_up = _of_ranks(RP, n, 1, R, R, N, ROWS, BN)
                    down, is_down = _of_ranks(0, n, N, 1, DOWN_R, N, ROWS, BN)
                    add_parts(own_db_ptr, parts_ptr, parts_stride, gate, is_gate, every, slot, B, BP)
                    add_parts(own_db_ptr + N * R, parts_ptr + N * R, parts_stride, up, is_up, every, slot, B, BP)
                    add_parts(own_da_ptr, parts_ptr + 2 * N * R, parts_stride, down, is_down, every, slot, B, BP)


def _sizes(hidden: int, rank: int, down_rank: int) -> tuple[int, int]:
    """As :func:`.lora_qkv.backward.db_sizes`, of the middle."""
    return (2 * rank + down_rank) * hidden, cdiv(hidden, CONFIG.block_n)


def _launch_slopes(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    xa: Tensor,
    t: Tensor,
    slots: Tensor | None,
    scale: Tensor | None,
    dg: Tensor,
    du: Tensor,
    db: Tensor,
    da: Tensor,
    sums: Sums,
) -> None:
    """Writes dg and du [B, S, N], and the rows of db [slots, 2 N, R] and da [slots, R, N] that `slots` name."""
    (batch, length, hidden), n, s = dh.shape, CONFIG.block_n, CONFIG.block_s
    dh_d, g_d, u_d = (tiled(each, 1, s, n) for each in (dh, g, u))
    _slopes_kernel[(cdiv(hidden, n) * batch,)](
        dh_d=dh_d, g_d=g_d, u_d=u_d, xa_d=tiled(xa, 1, s, ROWS), t_d=tiled(t, 1, s, ROWS), dg_ptr=dg, du_ptr=du,
        db_ptr=db, da_ptr=da, **sums, scale_ptr=scale, slots_ptr=slots, db_stride=db.stride(0),
        da_stride=da.stride(0), count=db.size(0), B=batch, S=length, N=hidden, R=db.size(2), RP=MOST_RANKS,
        DOWN_R=da.size(1), ROWS=ROWS, BN=n, BS=s, BP=next_power_of_2(batch), num_warps=CONFIG.warps,
        num_stages=CONFIG.stages,
    )  # fmt: skip


@custom_op("klora::lora_swiglu_slopes_", mutates_args=("dg", "du", "db", "da_down", "db_down"))
def adapted_slopes_(
    dout: Tensor,
    h: Tensor,
    down: Tensor,
    a: Tensor,
    b: Tensor,
    xa_down: Tensor,
    slots: Tensor | None,
    g: Tensor,
    u: Tensor,
    xa: Tensor,
    scale: Tensor | None,
    down_scale: Tensor | None,
    rank: int,
    is_packed: bool,
    dg: Tensor,
    du: Tensor,
    db: Tensor,
    da_down: Tensor,
    db_down: Tensor,
) -> None:
    """Writes dg and du [B, S, hidden], and the rows that `slots` name of dB of gate and up [slots, 2 hidden, R], and of
    dA and dB of down, whose rank is `rank`; `xa` is x A^T of gate and up. Others as of :func:`lora_qkv.op.backward_op`.
    """
    if not h.numel():  # sums over no tokens: the zeros that the caller gave
        return
    dout, down = aligned(dout), aligned(down)
    adapters = Adapters(a, b, rank, None) if is_packed else adapters_of(h, a, b, slots, [dout.size(2)])
    config = pick_backward_config(h.dtype, rank, 1, h.size(2))
    dh, sizes = empty_as(dg), [dout.size(2)]
    db_sums = sums = NOTHING
    if can_share(slots, h):
        db_sums, sums = sums_of(h, db_sizes(config, sizes, rank), _sizes(h.size(2), db.size(2), rank))
    t, config, ready = launch_dx(config, [dout], sizes, h, down, adapters, stacked_rank(rank, 1), 1, dh)
    with beside(h.device, ready):
        launch_db(config, [dout], sizes, xa_down, slots, db_down, db_sums, rank, down_scale)
    _launch_slopes(dh, g, u, xa, t, slots, scale, dg, du, db, da_down, sums)
    join(h.device, ready)
