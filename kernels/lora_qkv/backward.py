"""The backward launches: dx and t = dY B (:mod:`.dx`), then dA from t and x; beside both dB."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, next_power_of_2, padded_rank
from ..dot import multiply_add
from ..launch import launched
from ..side_stream import beside, join
from ..tile import tiled
from .adapters import Adapters
from .dx import BackwardConfig, launch_dx, pick_backward_config
from .sums import NOTHING, STRIDES, Sums, can_share, slots_of, store_sum, sums_of
from .tiles import described, is_stacked, of_three, programs, stacked_rank


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
