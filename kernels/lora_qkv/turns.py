"""The plain forward launch on Hopper, by groups of warps that take turns (:mod:`..pingpong`): u B^T, the rounding and
the store of a tile are hidden by the other group's product.

    y_p = x W_p^T + bias + u_p B_p^T        u_p = x A_p^T, rounded, of up to RANKS ranks

A chunk is a row of tiles, or an equal share of it, that one program takes from left to right. Its first tile, and the
first one of a projection, multiplies x by A as well, and leaves u in shared memory for the tiles to its right: x A^T is
made once a chunk, not in every tile. Every sum is made in :mod:`forward`'s order, whatever the tiles and chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from ..dispatch import aligned, cdiv, multiprocessors
from ..launch import launched
from ..pingpong import (
    ACC,
    BLOCK,
    DEPTH,
    GROUP_REGISTERS,
    LOAD_REGISTERS,
    NARROW,
    NARROW_3D,
    SWIZZLED,
    SWIZZLED_3D,
    SWIZZLED_4D,
    await_turn,
    empty_stage,
    halves_of,
    make_barriers,
    multiplied,
    multiply_steps,
    put_piece,
    runs_on,
    swizzled,
)
from .adapters import Adapters
from .tiles import described, of_three

HALF = gl.constexpr(BLOCK.value // 2)
"""Outputs of a piece that leaves at once, and what a wide tile has beside BLOCK."""
RANKS = gl.constexpr(16)
"""A product's least. Of a wide tile sums take 208 of a thread's 240 registers."""

HALF_ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF.value, 16]))
INNER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RANKS.value, 16]))
RANK_LOADS = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))


@dataclass(frozen=True)
class TurnsConfig:
    """Outputs of a tile, BLOCK or HALF more, and stages of the ring: as many as shared memory holds."""

    block_n: int
    stages: int


def pick_config(sizes: Sequence[int]) -> TurnsConfig:
    """The tiles that cover the projections with the fewest outputs too many; of equals the wide ones."""
    wide, square = TurnsConfig(192, 4), TurnsConfig(128, 5)
    return min((wide, square), key=lambda config: _tiles_across(sizes, config) * config.block_n)


def _tiles_across(sizes: Sequence[int], config: TurnsConfig) -> int:
    return sum(cdiv(size, config.block_n) for size in sizes)


U = 0.25
"""Of a tile, what u costs: by arithmetic, for x is read from shared memory once more."""


X_IN_L2 = 40 << 20
"""Bytes of x that the programs read again for tile after tile, of a Hopper's 50 MB of L2. Of 1,536 inputs, 52 MB,
chunks of one tile are the faster; of 576, 19 MB, and of 960 gradients, 32 MB, long ones."""


@cache
def pick_columns(blocks: int, across: int, processors: int, row_bytes: int) -> int:
    """Tiles of a chunk, for `blocks` rows of tiles of x, of `row_bytes` a row: the equal share of `across` with which
    all of them end first.

    One where x would not stay in the L2 cache meanwhile: then programs side by side take the same rows.
    """
    if min(blocks, processors) * BLOCK.value * row_bytes > X_IN_L2:
        return 1

    def tiles_long(columns: int) -> float:
        return cdiv(blocks * across // columns, processors) * (columns + U)

    return min((columns for columns in range(1, across + 1) if across % columns == 0), key=tiles_long)


@gluon.jit
def make_inner_barriers():
    """Of u, or of t in the backward, the last two: whether it is in shared memory."""
    made = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(2):
        mbarrier.init(made.index(number), count=1)
    return made


@gluon.jit
def tiles_of_program(chunks, columns):
    return (chunks - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * columns


@gluon.jit
def place_of(
    count, columns, S, NQ: gl.constexpr, NK: gl.constexpr, TQ: gl.constexpr, TK: gl.constexpr, TV: gl.constexpr,
    BN: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Of the program's tile `count`: document, first token, projection, its first output, the row of the weight that
    makes it, and whether the tile makes u.
    """
    chunk = gl.program_id(0) + count // columns * gl.num_programs(0)
    shares = (TQ + TK + TV) // columns
    block, column = chunk // shares, chunk % shares * columns + count % columns
    across = (S + BLOCK - 1) // BLOCK
    p = 0
    first = 0
    if GROUPS == 3:
        p = (column >= TQ).to(gl.int32) + (column >= TQ + TK).to(gl.int32)
        column -= gl.where(p == 0, 0, gl.where(p == 1, TQ, TQ + TK))
        first = gl.where(p == 0, 0, gl.where(p == 1, NQ, NQ + NK))
    makes_u = (count % columns == 0) | (column == 0)
    return block // across, block % across * BLOCK, p, column * BN, first + column * BN, makes_u


@gluon.jit
def adapter_of(slots_ptr, b, pool):
    """The adapter of document b; -1, of which the copy engine reads zeros, for a slot outside the pool."""
    slot = b
    if slots_ptr is not None:
        slot = gl.load(slots_ptr + b)
    return gl.where((slot >= 0) & (slot < pool), slot, -1).to(gl.int32)


@gluon.jit
def _load_ranks(
    b_ptr, b_stride, slot, p, row, place, N: gl.constexpr, R: gl.constexpr, RT: gl.constexpr, STACKED: gl.constexpr
):
    """Rows of B from `row` on into shared memory, zeros past R and past N."""
    row += gl.arange(0, place.shape[0], gl.SliceLayout(1, RANK_LOADS))
    r = gl.arange(0, RANKS, gl.SliceLayout(0, RANK_LOADS))
    rows = b_ptr + slot.to(gl.int64) * b_stride + row[:, None] * RT + r[None, :]
    if STACKED:
        rows += p * R
    place.store(gl.load(rows, mask=(row < N)[:, None] & (r < R)[None, :] & (slot >= 0), other=0.0))


@gluon.jit
def _begun(bias_ptr, n, N: gl.constexpr, PART: gl.constexpr):
    """The sums of a part of a tile before its first step: zeros, or its columns' bias."""
    W: gl.constexpr = HALF if PART else BLOCK
    L: gl.constexpr = HALF_ACC if PART else ACC
    acc = gl.zeros([BLOCK, W], gl.float32, L)
    if bias_ptr is not None:
        column = n + gl.arange(0, W, gl.SliceLayout(0, L))
        acc += gl.load(bias_ptr + column, mask=column < N, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def _store_piece(q_desc, k_desc, v_desc, p, b, s, n, piece, place):
    """Has a piece [BLOCK, HALF] of projection p stored; the copy engine leaves out what is not there."""
    put_piece(piece, place)
    if v_desc is None or p == 0:
        tma.async_copy_shared_to_global(q_desc, [b, s, n], place)
    elif p == 1:
        tma.async_copy_shared_to_global(k_desc, [b, s, n], place)
    else:
        tma.async_copy_shared_to_global(v_desc, [b, s, n], place)


@gluon.jit
def _keep_inner(xa, xa_desc, b, s, p, is_stored, place):
    """u into shared memory, and from there into xa where the tile is its projection's first."""
    place.store(xa.to(place.dtype).reshape([1, BLOCK, RANKS]))
    fence_async_shared()
    if is_stored:
        tma.async_copy_shared_to_global(xa_desc, [b, s, p * RANKS], place)


@gluon.jit
def _finish_tiles(
    b_ptr, bias_ptr, slots_ptr, q_desc, k_desc, v_desc, xa_desc, b_stride, S, columns, tiles, pool,
    inputs, weights, factors, inners, inner_made, ranks, outs, loaded, empty, turn,
    GROUP: gl.constexpr, NQ: gl.constexpr, NK: gl.constexpr, NV: gl.constexpr, TQ: gl.constexpr, TK: gl.constexpr,
    TV: gl.constexpr, R: gl.constexpr, RT: gl.constexpr, STACKED: gl.constexpr, BN: gl.constexpr, STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Every other tile of the program.

    Of u the last two are kept. The one before those is read by nobody: its tiles were finished before a group took the
    turn of the tile before this one.
    """
    GROUPS: gl.constexpr = 1 if v_desc is None else 3
    PARTS: gl.constexpr = len(weights)
    out = outs.index(GROUP)
    number = -1 + GROUP  # of u's last beginning
    for count in range(GROUP, tiles, 2):
        b, s, p, n, row, makes_u = place_of(count, columns, S, NQ, NK, TQ, TK, TV, BN, GROUPS)
        number += makes_u.to(gl.int32)
        slot = adapter_of(slots_ptr, b, pool)
        # What comes from memory is asked for before the product: it arrives while the other group multiplies.
        begun = ()
        for i in gl.static_range(PARTS):
            place = ranks[i].index(GROUP)
            _load_ranks(b_ptr, b_stride, slot, p, row + i * BLOCK, place, NQ + NK + NV, R, RT, STACKED)
            begun = begun + (_begun(bias_ptr, n + i * BLOCK, NQ, i),)
        fence_async_shared()
        await_turn(turn, count, GROUP)
        place = inners.index(number % 2)
        if makes_u:
            xa = gl.zeros([BLOCK, RANKS], gl.float32, INNER)
            sums = multiply_steps(
                inputs, weights + (factors,), begun + (xa,), loaded, empty, turn, count, GROUP, STEPS, STAGES
            )
            _keep_inner(sums[-1], xa_desc, b, s, p, n == 0, place)
            mbarrier.arrive(inner_made.index(number % 2))
            sums = sums[:-1]
        else:
            sums = multiply_steps(inputs, weights, begun, loaded, empty, turn, count, GROUP, STEPS, STAGES)
        mbarrier.wait(inner_made.index(number % 2), number // 2 % 2)
        inner = place._reinterpret(place.dtype, [BLOCK, RANKS], NARROW)
        whole = ()
        for i in gl.static_range(PARTS):
            whole = whole + (warpgroup_mma(inner, ranks[i].index(GROUP).permute((1, 0)), sums[i], is_async=True),)
        whole = multiplied(0, whole)
        left, right = halves_of(whole[0])
        _store_piece(q_desc, k_desc, v_desc, p, b, s, n, left, out)
        _store_piece(q_desc, k_desc, v_desc, p, b, s, n + HALF, right, out)
        if PARTS > 1:
            _store_piece(q_desc, k_desc, v_desc, p, b, s, n + BLOCK, whole[1], out)
        _, _, _, _, _, other_makes_u = place_of(count + 1, columns, S, NQ, NK, TQ, TK, TV, BN, GROUPS)
        number += other_makes_u.to(gl.int32)
    tma.store_wait(0)


@gluon.jit
def _load(
    x_desc, w_descs, a_desc, slots_ptr, S, columns, tiles, pool,
    inputs, weights, factors, loaded, empty,
    NQ: gl.constexpr, NK: gl.constexpr, TQ: gl.constexpr, TK: gl.constexpr, TV: gl.constexpr, BN: gl.constexpr,
    STEPS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    PRODUCT: gl.constexpr = (BLOCK + BN) * DEPTH * 2  # bytes
    step = 0
    for count in range(tiles):
        b, s, p, n, row, makes_u = place_of(count, columns, S, NQ, NK, TQ, TK, TV, BN, GROUPS)
        slot = adapter_of(slots_ptr, b, pool)
        for k in range(STEPS):
            stage = empty_stage(empty, step, STAGES)
            is_loaded = loaded.index(stage)
            mbarrier.expect(is_loaded, PRODUCT, pred=not makes_u)
            mbarrier.expect(is_loaded, PRODUCT + RANKS * DEPTH * 2, pred=makes_u)
            tma.async_copy_global_to_shared(x_desc, [b, s, k * DEPTH], is_loaded, inputs.index(stage))
            for i in gl.static_range(len(weights)):
                place = weights[i].index(stage)
                tma.async_copy_global_to_shared(w_descs[i], [row + i * BLOCK, k * DEPTH], is_loaded, place)
            factor = factors.index(stage)
            tma.async_copy_global_to_shared(a_desc, [slot, p, 0, k * DEPTH], is_loaded, factor, pred=makes_u)
            step += 1


@launched
@gluon.jit(do_not_specialize=["S", "columns", "chunks", "pool"])
def _forward_in_turns(
    x_desc,  # [B, S, D], blocks [1, BLOCK, DEPTH]
    square_desc,  # [N, D], blocks [BLOCK, DEPTH]
    half_desc,  # the same, blocks [HALF, DEPTH]; None for tiles of BLOCK outputs
    a_desc,  # [pool, projections, R, D], blocks [1, 1, RANKS, DEPTH]: zeros past R
    b_ptr,
    bias_ptr,
    slots_ptr,
    q_desc,  # [B, S, N_p], blocks [1, BLOCK, HALF]
    k_desc,
    v_desc,
    xa_desc,  # [B, S, projections x RANKS], blocks [1, BLOCK, RANKS]
    b_stride,
    S,
    columns,
    chunks,
    pool,
    NQ: gl.constexpr,
    NK: gl.constexpr,
    NV: gl.constexpr,
    TQ: gl.constexpr,
    TK: gl.constexpr,
    TV: gl.constexpr,
    R: gl.constexpr,
    RT: gl.constexpr,
    STACKED: gl.constexpr,
    BN: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One product is q alone, without k_desc and v_desc."""
    dtype: gl.constexpr = x_desc.dtype
    inputs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, DEPTH], SWIZZLED_3D)
    w_descs = (square_desc,)
    weights = (gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED),)
    ranks = (gl.allocate_shared_memory(dtype, [2, BLOCK, RANKS], NARROW),)
    if BN > BLOCK:
        w_descs = w_descs + (half_desc,)
        weights = weights + (gl.allocate_shared_memory(dtype, [STAGES, HALF, DEPTH], SWIZZLED),)
        ranks = ranks + (gl.allocate_shared_memory(dtype, [2, HALF, RANKS], NARROW),)
    factors = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, RANKS, DEPTH], SWIZZLED_4D)
    inners = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, RANKS], NARROW_3D)
    outs = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, HALF], SWIZZLED_3D)
    inner_made = make_inner_barriers()
    loaded, empty, turn = make_barriers(STAGES)
    tiles = tiles_of_program(chunks, columns)
    flat_inputs = inputs._reinterpret(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    flat_factors = factors._reinterpret(dtype, [STAGES, RANKS, DEPTH], SWIZZLED)
    gl.warp_specialize(
        [
            (_finish_tiles, (
                b_ptr, bias_ptr, slots_ptr, q_desc, k_desc, v_desc, xa_desc, b_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                0, NQ, NK, NV, TQ, TK, TV, R, RT, STACKED, BN, STEPS, STAGES,
            )),
            (_finish_tiles, (
                b_ptr, bias_ptr, slots_ptr, q_desc, k_desc, v_desc, xa_desc, b_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                1, NQ, NK, NV, TQ, TK, TV, R, RT, STACKED, BN, STEPS, STAGES,
            )),
            (_load, (
                x_desc, w_descs, a_desc, slots_ptr, S, columns, tiles, pool,
                inputs, weights, factors, loaded, empty, NQ, NK, TQ, TK, TV, BN, STEPS, STAGES,
                1 if v_desc is None else 3,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


TURNS = 0.7
"""Tiles for each multiprocessor: the fewest that were timed, 96 on 132, where turns were the faster by an eighth
(bench/results/nvidia-h200/tuning/lora_turns-1.txt)."""


def takes(x: Tensor, rank: int, sizes: Sequence[int]) -> bool:
    """Whether the plain forward of `x` [B, S, D] pays here: 16 bits, on Hopper, few ranks, and tiles for most
    of its multiprocessors.
    """
    if not runs_on(x) or rank > RANKS.value:
        return False
    tiles = blocks_of(x) * _tiles_across(sizes, pick_config(sizes))
    return tiles >= TURNS * multiprocessors(x.device)


def blocks_of(x: Tensor) -> int:
    return x.size(0) * cdiv(x.size(1), BLOCK.value)


def launch_in_turns(
    x: Tensor,
    weight: Tensor,
    adapters: Adapters,
    sizes: Sequence[int],
    is_stacked: bool,
    bias: Tensor | None,
    outs: Sequence[Tensor],
    xa: Tensor,
) -> None:
    """Writes `outs` [B, S, N_p] and `xa` [B, S, projections x RANKS], as :func:`forward.launch_forward`."""
    config, block, depth = pick_config(sizes), BLOCK.value, DEPTH.value
    is_wide, blocks = config.block_n > block, blocks_of(x)
    tiles = [cdiv(size, config.block_n) for size in sizes]
    columns = pick_columns(blocks, sum(tiles), multiprocessors(x.device), x.size(2) * x.itemsize)
    chunks = blocks * sum(tiles) // columns
    weight = aligned(weight)
    q_d, k_d, v_d = of_three([swizzled(out, 1, block, HALF.value) for out in described(outs)])
    (nq, nk, nv), (tq, tk, tv) = of_three(sizes, 0), of_three(tiles, 0)
    _forward_in_turns[(min(multiprocessors(x.device), chunks),)](
        x_desc=swizzled(aligned(x), 1, block, depth), square_desc=swizzled(weight, block, depth),
        half_desc=swizzled(weight, HALF.value, depth) if is_wide else None,
        a_desc=swizzled(adapters.a.unflatten(1, (-1, adapters.rank)), 1, 1, RANKS.value, depth),
        b_ptr=adapters.b, bias_ptr=bias, slots_ptr=adapters.slots, q_desc=q_d, k_desc=k_d, v_desc=v_d,
        xa_desc=swizzled(xa, 1, block, RANKS.value), b_stride=adapters.b.stride(0), S=x.size(1), columns=columns,
        chunks=chunks, pool=adapters.b.size(0), NQ=nq, NK=nk, NV=nv, TQ=tq, TK=tk, TV=tv, R=adapters.rank,
        RT=adapters.b.size(2), STACKED=is_stacked, BN=config.block_n, STEPS=cdiv(x.size(2), depth),
        STAGES=config.stages, num_warps=4, maxnreg=168,
    )  # fmt: skip
