"""SwiGLU where the tiles of products with adapters leave, on Hopper, by groups of warps that take turns
(:mod:`..pingpong`): what is done to a tile is hidden by the other group's product.

    forward     g = x Wg^T + (x Ag^T) Bg^T    u = x Wu^T + (x Au^T) Bu^T    h = silu(g) u
    backward    t = dout B    dh = dout W + t A    dg, du of :mod:`..swiglu`, for h = silu(g) u

Half of a forward's tile is columns of gate, the other half the same columns of up: g and u meet in registers. Both
weights lie side by side in the ring, and both adapters are one, the ranks of up behind those of gate: rows of B have
zeros at the ranks of the other. The inner rows x A^T, or t, are made by the first tile of a chunk, as in :mod:`.turns`.

Backward memory is the bound: 64 KiB of g and u come for a tile and 64 KiB of dg and du leave, by a multiprocessor's
share of 30 KB a microsecond in 4.3 us; shared memory takes as long for 576 inputs. All else has to hide behind that. So
g and u come in pieces, a quarter of a tile each, into a ring of PLACES, by a warp of their own: while one piece is
worked on, those of the next tile are on their way. A group writes dg and du where g and u were, says so, and goes on:
that warp stores them, and once they have left their place loads what comes PLACES pieces later. No group waits for a
store.

g, u and dh are rounded before they are read, and every sum is made in the order of the launches that this stands for:
their bits are the same.
"""

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
    HALVED,
    LOAD_REGISTERS,
    NARROW,
    NARROW_3D,
    SWIZZLED,
    SWIZZLED_3D,
    SWIZZLED_4D,
    await_turn,
    empty_stage,
    make_barriers,
    multiplied,
    multiply_steps,
    runs_on,
    swizzled,
)
from ..swiglu import silu, swiglu_gradient
from .adapters import Adapters
from .turns import (
    HALF,
    INNER,
    RANK_LOADS,
    RANKS,
    TURNS,
    adapter_of,
    blocks_of,
    pick_columns,
    place_of,
)

PIECES = gl.constexpr(4)
"""Of a tile of g, or of u: HALF rows of HALF columns, two below one another and then the next two."""
FACTOR_LOADS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
WIDE_INNER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * RANKS.value, 16]))


def pick_gated_stages(rank: int) -> int:
    """Of the forward's ring, as many as shared memory holds beside the ranks.

    An H200, 65,536 x 1,536 x 576, rank 8: 437 us; 469 in 4 stages, 470 where every tile makes x A^T, 463 in tiles of
    192 outputs (nvidia-h200/tuning/lora_swiglu-1.json). Gate and up in turns and SwiGLU after them take 495.
    """
    return 5 if rank <= 8 else 4


BACKWARD_IN_TURNS = False
"""Whether the backward is made here: not timed yet. Its first form, with two places of half a tile that the groups
shared and stored from, took 547 us where dx with dB beside it and SwiGLU's gradient after them take 457."""
BACKWARD_STAGES, PLACES = 3, 6
"""34 KiB a stage and 16 KiB a place; 4 stages leave room for 4 places."""


# Forward


@gluon.jit
def _load_both_ranks(
    b_ptr, b_stride, slot, n, place, N: gl.constexpr, R: gl.constexpr, RT: gl.constexpr, EACH: gl.constexpr,
    STACKED: gl.constexpr,
):  # fmt: skip
    """Rows of B from `n` on into shared memory, those of gate and then those of up, each at its ranks."""
    WIDTH: gl.constexpr = place.shape[0] // 2
    i = gl.arange(0, place.shape[0], gl.SliceLayout(1, RANK_LOADS))
    p, row = i // WIDTH, n + i % WIDTH
    r = gl.arange(0, place.shape[1], gl.SliceLayout(0, RANK_LOADS))[None, :] - (p * EACH)[:, None]
    rows = b_ptr + slot.to(gl.int64) * b_stride + ((p * N + row) * RT)[:, None] + r
    if STACKED:
        rows += (p * R)[:, None]
    place.store(gl.load(rows, mask=(row < N)[:, None] & (r >= 0) & (r < R) & (slot >= 0), other=0.0))


@gluon.jit
def _store_inner(xa_ptr, place, b, s, S, EACH: gl.constexpr):
    """x A^T of gate and up to their places in xa [B, S, 3 RANKS]."""
    L: gl.constexpr = WIDE_INNER if EACH > 8 else INNER
    row = s + gl.arange(0, BLOCK, gl.SliceLayout(1, L))
    j = gl.arange(0, 2 * EACH, gl.SliceLayout(0, L))
    places = xa_ptr + (b.to(gl.int64) * S + row)[:, None] * (3 * RANKS) + (j // EACH * RANKS + j % EACH)[None, :]
    gl.store(places, place.load(L), mask=(row < S)[:, None])


@gluon.jit
def _halves(tile):
    return gl.split(gl.permute(gl.reshape(tile, [BLOCK, 2, tile.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def _store_piece(out_desc, b, s, n, piece, place):
    """Has a piece stored once the one before it has left its place."""
    tma.store_wait(0)
    place.store(piece.to(place.dtype).reshape([1, BLOCK, piece.shape[1]]))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [b, s, n], place)


@gluon.jit
def _finish_gated(
    b_ptr, slots_ptr, g_desc, u_desc, h_desc, xa_ptr, b_stride, S, columns, tiles, pool,
    inputs, weights, factors, inners, inner_made, ranks, outs, loaded, empty, turn,
    GROUP: gl.constexpr, N: gl.constexpr, ACROSS: gl.constexpr, R: gl.constexpr, RT: gl.constexpr, EACH: gl.constexpr,
    STACKED: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every other tile of the program."""
    out = outs.index(GROUP)
    for count in range(GROUP, tiles, 2):
        b, s, _, n, _, makes_inner = place_of(count, columns, S, N, 0, ACROSS, 0, 0, HALF, 1)
        number = count // columns
        slot = adapter_of(slots_ptr, b, pool)
        acc = gl.zeros([BLOCK, BLOCK], gl.float32, ACC)
        _load_both_ranks(b_ptr, b_stride, slot, n, ranks.index(GROUP), N, R, RT, EACH, STACKED)
        fence_async_shared()
        await_turn(turn, count, GROUP)
        place = inners.index(number % 2)
        if makes_inner:
            xa = gl.zeros([BLOCK, 2 * EACH], gl.float32, WIDE_INNER if EACH > 8 else INNER)
            acc, xa = multiply_steps(
                inputs, (weights, factors), (acc, xa), loaded, empty, turn, count, GROUP, STEPS, STAGES
            )
            place.store(xa.to(place.dtype))
            fence_async_shared()
            mbarrier.arrive(inner_made.index(number % 2))
        else:
            (acc,) = multiply_steps(inputs, (weights,), (acc,), loaded, empty, turn, count, GROUP, STEPS, STAGES)
        mbarrier.wait(inner_made.index(number % 2), number // 2 % 2)
        (acc,) = multiplied(0, (warpgroup_mma(place, ranks.index(GROUP).permute((1, 0)), acc, is_async=True),))
        g, u = _halves(acc)
        g, u = g.to(out.dtype), u.to(out.dtype)
        _store_piece(g_desc, b, s, n, g, out)
        _store_piece(u_desc, b, s, n, u, out)
        _store_piece(h_desc, b, s, n, silu(g.to(gl.float32)) * u.to(gl.float32), out)
        if n == 0:  # now that the sums have left the registers
            _store_inner(xa_ptr, place, b, s, S, EACH)
    tma.store_wait(0)


@gluon.jit
def _load_gated(
    x_desc, w_desc, a_desc, slots_ptr, S, columns, tiles, pool, inputs, halves, factors, loaded, empty,
    N: gl.constexpr, ACROSS: gl.constexpr, EACH: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`halves` are those of the ring's weights, of gate and of up by turns."""
    PRODUCT: gl.constexpr = 2 * BLOCK * DEPTH * 2  # bytes
    step = 0
    for count in range(tiles):
        b, s, _, n, _, makes_inner = place_of(count, columns, S, N, 0, ACROSS, 0, 0, HALF, 1)
        slot = adapter_of(slots_ptr, b, pool)
        for k in range(STEPS):
            stage = empty_stage(empty, step, STAGES)
            is_loaded = loaded.index(stage)
            mbarrier.expect(is_loaded, PRODUCT, pred=not makes_inner)
            mbarrier.expect(is_loaded, PRODUCT + 2 * EACH * DEPTH * 2, pred=makes_inner)
            tma.async_copy_global_to_shared(x_desc, [b, s, k * DEPTH], is_loaded, inputs.index(stage))
            for p in gl.static_range(2):
                half = halves.index(2 * stage + p)
                tma.async_copy_global_to_shared(w_desc, [p * N + n, k * DEPTH], is_loaded, half)
            factor = factors.index(stage)
            tma.async_copy_global_to_shared(a_desc, [slot, 0, 0, k * DEPTH], is_loaded, factor, pred=makes_inner)
            step += 1


@launched
@gluon.jit(do_not_specialize=["S", "columns", "chunks", "pool"])
def _gated_in_turns(
    x_desc,  # [B, S, D], blocks [1, BLOCK, DEPTH]
    w_desc,  # [2 N, D], blocks [HALF, DEPTH]
    a_desc,  # [pool, 3, R, D], blocks [1, 2, EACH, DEPTH]: zeros past R
    b_ptr,
    slots_ptr,
    g_desc,  # [B, S, N], blocks [1, BLOCK, HALF]
    u_desc,
    h_desc,
    xa_ptr,
    b_stride,
    S,
    columns,
    chunks,
    pool,
    N: gl.constexpr,
    ACROSS: gl.constexpr,
    R: gl.constexpr,
    RT: gl.constexpr,
    EACH: gl.constexpr,
    STACKED: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """EACH is R, rounded up to 8 or 16."""
    dtype: gl.constexpr = x_desc.dtype
    RANK_PLACES: gl.constexpr = HALVED if EACH > 8 else NARROW
    inputs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, DEPTH], SWIZZLED_3D)
    halves = gl.allocate_shared_memory(dtype, [2 * STAGES, HALF, DEPTH], SWIZZLED)
    factors = gl.allocate_shared_memory(dtype, [STAGES, 1, 2, EACH, DEPTH], SWIZZLED_4D)
    ranks = gl.allocate_shared_memory(dtype, [2, BLOCK, 2 * EACH], RANK_PLACES)
    inners = gl.allocate_shared_memory(dtype, [2, BLOCK, 2 * EACH], RANK_PLACES)
    outs = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, HALF], SWIZZLED_3D)
    inner_made = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(2):
        mbarrier.init(inner_made.index(number), count=1)
    loaded, empty, turn = make_barriers(STAGES)
    tiles = (chunks - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * columns
    flat_inputs = inputs._reinterpret(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    weights = halves._reinterpret(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    flat_factors = factors._reinterpret(dtype, [STAGES, 2 * EACH, DEPTH], SWIZZLED)
    gl.warp_specialize(
        [
            (_finish_gated, (
                b_ptr, slots_ptr, g_desc, u_desc, h_desc, xa_ptr, b_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                0, N, ACROSS, R, RT, EACH, STACKED, STEPS, STAGES,
            )),
            (_finish_gated, (
                b_ptr, slots_ptr, g_desc, u_desc, h_desc, xa_ptr, b_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                1, N, ACROSS, R, RT, EACH, STACKED, STEPS, STAGES,
            )),
            (_load_gated, (
                x_desc, w_desc, a_desc, slots_ptr, S, columns, tiles, pool, inputs, halves, factors, loaded, empty,
                N, ACROSS, EACH, STEPS, STAGES,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def takes_gated(x: Tensor, rank: int, hidden: int) -> bool:
    """Whether gate and up of `x` [B, S, D] pay here: 16 bits, on Hopper, few ranks, and tiles for most of its
    multiprocessors.
    """
    if not runs_on(x) or rank > RANKS.value:
        return False
    return blocks_of(x) * cdiv(hidden, HALF.value) >= TURNS * multiprocessors(x.device)


def launch_gated(
    x: Tensor, weight: Tensor, adapters: Adapters, is_stacked: bool, g: Tensor, u: Tensor, h: Tensor, xa: Tensor
) -> None:
    """Writes g, u and h [B, S, N] of `weight` [2 N, D], and of `xa` [B, S, 3 RANKS] what is gate's and up's."""
    block, depth, half = BLOCK.value, DEPTH.value, HALF.value
    hidden, rank, blocks, across = h.size(2), adapters.rank, blocks_of(x), cdiv(h.size(2), half)
    each = 8 if rank <= 8 else RANKS.value
    columns = pick_columns(blocks, across, multiprocessors(x.device), x.size(2) * x.itemsize)
    chunks = blocks * across // columns
    g_d, u_d, h_d = (swizzled(out, 1, block, half) for out in (g, u, h))
    _gated_in_turns[(min(multiprocessors(x.device), chunks),)](
        x_desc=swizzled(aligned(x), 1, block, depth), w_desc=swizzled(aligned(weight), half, depth),
        a_desc=swizzled(adapters.a.unflatten(1, (-1, rank)), 1, 2, each, depth), b_ptr=adapters.b,
        slots_ptr=adapters.slots, g_desc=g_d, u_desc=u_d, h_desc=h_d, xa_ptr=xa, b_stride=adapters.b.stride(0),
        S=x.size(1), columns=columns, chunks=chunks, pool=adapters.b.size(0), N=hidden, ACROSS=across, R=rank,
        RT=adapters.b.size(2), EACH=each, STACKED=is_stacked, STEPS=cdiv(x.size(2), depth),
        STAGES=pick_gated_stages(rank), num_warps=4, maxnreg=168,
    )  # fmt: skip


# Backward


@gluon.jit
def _load_factor(a_ptr, a_stride, slot, n, place, N: gl.constexpr, R: gl.constexpr):
    """Columns of A from `n` on into shared memory, zeros past R and past N."""
    r = gl.arange(0, RANKS, gl.SliceLayout(1, FACTOR_LOADS))
    column = n + gl.arange(0, BLOCK, gl.SliceLayout(0, FACTOR_LOADS))
    rows = a_ptr + slot.to(gl.int64) * a_stride + (r * N)[:, None] + column[None, :]
    place.store(gl.load(rows, mask=(r < R)[:, None] & (column < N)[None, :] & (slot >= 0), other=0.0))


@gluon.jit
def _write_gradients(dh, number, gs, us, read_loaded, made, PLACES: gl.constexpr):
    """dg and du of piece `number` of the program, to where g and u are.

    A barrier tells one round of the places from the next alone: a group looks at g and u only once the other has made
    what was in their place before.
    """
    L: gl.constexpr = dh.type.layout
    dtype: gl.constexpr = gs.dtype
    i = number % PLACES
    g_place = gs.index(i)._reinterpret(dtype, [HALF, HALF], SWIZZLED)
    u_place = us.index(i)._reinterpret(dtype, [HALF, HALF], SWIZZLED)
    mbarrier.wait(made.index(i), (number // PLACES + 1) % 2)
    mbarrier.wait(read_loaded.index(i), number // PLACES % 2)
    g, u = g_place.load(L).to(gl.float32), u_place.load(L).to(gl.float32)
    dg, du = swiglu_gradient(dh.to(dtype).to(gl.float32), g, u)
    g_place.store(dg.to(dtype))
    u_place.store(du.to(dtype))
    fence_async_shared()
    mbarrier.arrive(made.index(i))


@gluon.jit
def _upper_and_lower(half):
    """The rows of half a tile by halves: a thread holds rows of both."""
    return gl.split(gl.permute(gl.reshape(half, [2, HALF, HALF]), [1, 2, 0]))


@gluon.jit
def _finish_gradients(
    a_ptr, slots_ptr, t_desc, a_stride, S, columns, tiles, pool,
    inputs, weights, factors, inners, inner_made, ranks, gs, us, loaded, empty, turn, read_loaded, made,
    GROUP: gl.constexpr, N: gl.constexpr, ACROSS: gl.constexpr, R: gl.constexpr, STEPS: gl.constexpr,
    STAGES: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Every other tile of the program."""
    for count in range(GROUP, tiles, 2):
        b, s, _, n, _, makes_inner = place_of(count, columns, S, N, 0, ACROSS, 0, 0, BLOCK, 1)
        number = count // columns
        slot = adapter_of(slots_ptr, b, pool)
        _load_factor(a_ptr, a_stride, slot, n, ranks.index(GROUP), N, R)
        fence_async_shared()
        acc = gl.zeros([BLOCK, BLOCK], gl.float32, ACC)
        await_turn(turn, count, GROUP)
        place = inners.index(number % 2)
        if makes_inner:
            t = gl.zeros([BLOCK, RANKS], gl.float32, INNER)
            acc, t = multiply_steps(
                inputs, (weights, factors), (acc, t), loaded, empty, turn, count, GROUP, STEPS, STAGES, True
            )
            place.store(t.to(place.dtype).reshape([1, BLOCK, RANKS]))
            fence_async_shared()
            if n == 0:
                tma.async_copy_shared_to_global(t_desc, [b, s, 0], place)
            mbarrier.arrive(inner_made.index(number % 2))
        else:
            (acc,) = multiply_steps(inputs, (weights,), (acc,), loaded, empty, turn, count, GROUP, STEPS, STAGES, True)
        mbarrier.wait(inner_made.index(number % 2), number // 2 % 2)
        inner = place._reinterpret(place.dtype, [BLOCK, RANKS], NARROW)
        (acc,) = multiplied(0, (warpgroup_mma(inner, ranks.index(GROUP), acc, is_async=True),))
        left, right = _halves(acc)
        for i in gl.static_range(2):
            upper, lower = _upper_and_lower(right if i else left)
            piece = count * PIECES + 2 * i
            _write_gradients(upper, piece, gs, us, read_loaded, made, PLACES)
            _write_gradients(lower, piece + 1, gs, us, read_loaded, made, PLACES)
        tma.store_wait(0)  # t, long since: its place is written again two chunks later


@gluon.jit
def _load_products(
    dy_desc, w_desc, b_desc, slots_ptr, S, columns, tiles, pool, inputs, weights, factors, loaded, empty,
    N: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PRODUCT: gl.constexpr = 2 * BLOCK * DEPTH * 2  # bytes
    step = 0
    for count in range(tiles):
        b, s, _, n, _, makes_inner = place_of(count, columns, S, N, 0, ACROSS, 0, 0, BLOCK, 1)
        slot = adapter_of(slots_ptr, b, pool)
        for k in range(STEPS):
            stage = empty_stage(empty, step, STAGES)
            is_loaded = loaded.index(stage)
            mbarrier.expect(is_loaded, PRODUCT, pred=not makes_inner)
            mbarrier.expect(is_loaded, PRODUCT + RANKS * DEPTH * 2, pred=makes_inner)
            tma.async_copy_global_to_shared(dy_desc, [b, s, k * DEPTH], is_loaded, inputs.index(stage))
            tma.async_copy_global_to_shared(w_desc, [k * DEPTH, n], is_loaded, weights.index(stage))
            factor = factors.index(stage)
            tma.async_copy_global_to_shared(b_desc, [slot, k * DEPTH, 0], is_loaded, factor, pred=makes_inner)
            step += 1


@gluon.jit
def _piece_of(number, columns, S, N: gl.constexpr, ACROSS: gl.constexpr):
    """Document, first token and first column of piece `number` of the program."""
    b, s, _, n, _, _ = place_of(number // PIECES, columns, S, N, 0, ACROSS, 0, 0, BLOCK, 1)
    return b, s + number % 2 * HALF, n + number // 2 % 2 * HALF


@gluon.jit
def _read_piece(
    g_desc, u_desc, number, columns, S, gs, us, read_loaded,
    N: gl.constexpr, ACROSS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    b, s, n = _piece_of(number, columns, S, N, ACROSS)
    is_loaded = read_loaded.index(number % PLACES)
    mbarrier.expect(is_loaded, 2 * HALF * HALF * 2)
    tma.async_copy_global_to_shared(g_desc, [b, s, n], is_loaded, gs.index(number % PLACES))
    tma.async_copy_global_to_shared(u_desc, [b, s, n], is_loaded, us.index(number % PLACES))


@gluon.jit
def _move_pieces(
    g_desc, u_desc, dg_desc, du_desc, S, columns, tiles, gs, us, read_loaded, made,
    N: gl.constexpr, ACROSS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """g and u into all places; then of each piece dg and du out of its place, and the next g and u into it."""
    pieces = tiles * PIECES
    for number in range(gl.minimum(pieces, PLACES)):
        _read_piece(g_desc, u_desc, number, columns, S, gs, us, read_loaded, N, ACROSS, PLACES)
    for number in range(pieces):
        b, s, n = _piece_of(number, columns, S, N, ACROSS)
        i = number % PLACES
        mbarrier.wait(made.index(i), number // PLACES % 2)
        tma.async_copy_shared_to_global(dg_desc, [b, s, n], gs.index(i))
        tma.async_copy_shared_to_global(du_desc, [b, s, n], us.index(i))
        tma.store_wait(0)
        if number + PLACES < pieces:
            _read_piece(g_desc, u_desc, number + PLACES, columns, S, gs, us, read_loaded, N, ACROSS, PLACES)


@launched
@gluon.jit(do_not_specialize=["S", "columns", "chunks", "pool"])
def _gradients_in_turns(
    dy_desc,  # [B, S, D], blocks [1, BLOCK, DEPTH]
    w_desc,  # [D, N], blocks [DEPTH, BLOCK]
    b_desc,  # [pool, D, R], blocks [1, DEPTH, RANKS]: zeros past R
    a_ptr,
    slots_ptr,
    g_desc,  # [B, S, N], blocks [1, HALF, HALF]
    u_desc,
    dg_desc,
    du_desc,
    t_desc,  # [B, S, RANKS], blocks [1, BLOCK, RANKS]
    a_stride,
    S,
    columns,
    chunks,
    pool,
    N: gl.constexpr,
    ACROSS: gl.constexpr,
    R: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    PLACES: gl.constexpr,
):
    dtype: gl.constexpr = dy_desc.dtype
    inputs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, DEPTH], SWIZZLED_3D)
    weights = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, BLOCK], SWIZZLED)
    factors = gl.allocate_shared_memory(dtype, [STAGES, 1, DEPTH, RANKS], NARROW_3D)
    ranks = gl.allocate_shared_memory(dtype, [2, RANKS, BLOCK], SWIZZLED)
    inners = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, RANKS], NARROW_3D)
    gs = gl.allocate_shared_memory(dtype, [PLACES, 1, HALF, HALF], SWIZZLED_3D)
    us = gl.allocate_shared_memory(dtype, [PLACES, 1, HALF, HALF], SWIZZLED_3D)
    inner_made = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    read_loaded = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    made = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(inner_made.index(i), count=1)
    for i in gl.static_range(PLACES):
        mbarrier.init(read_loaded.index(i), count=1)
        mbarrier.init(made.index(i), count=1)
    loaded, empty, turn = make_barriers(STAGES)
    tiles = (chunks - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * columns
    flat_inputs = inputs._reinterpret(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    flat_factors = factors._reinterpret(dtype, [STAGES, DEPTH, RANKS], NARROW)
    gl.warp_specialize(
        [
            (_finish_gradients, (
                a_ptr, slots_ptr, t_desc, a_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, gs, us, loaded, empty, turn, read_loaded,
                made, 0, N, ACROSS, R, STEPS, STAGES, PLACES,
            )),
            (_finish_gradients, (
                a_ptr, slots_ptr, t_desc, a_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, gs, us, loaded, empty, turn, read_loaded,
                made, 1, N, ACROSS, R, STEPS, STAGES, PLACES,
            )),
            (_load_products, (
                dy_desc, w_desc, b_desc, slots_ptr, S, columns, tiles, pool, inputs, weights, factors, loaded, empty,
                N, ACROSS, STEPS, STAGES,
            )),
            (_move_pieces, (
                g_desc, u_desc, dg_desc, du_desc, S, columns, tiles, gs, us, read_loaded, made, N, ACROSS, PLACES,
            )),
        ],
        [4, 1, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def takes_gradients(dy: Tensor, rank: int, hidden: int) -> bool:
    """Whether the backward of `dy` [B, S, D] pays here; as :func:`takes_gated`."""
    is_known = BACKWARD_IN_TURNS and runs_on(dy) and rank <= RANKS.value
    return is_known and blocks_of(dy) * cdiv(hidden, BLOCK.value) >= TURNS * multiprocessors(dy.device)


def launch_gated_backward(
    dy: Tensor, weight: Tensor, adapters: Adapters, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, t: Tensor
) -> None:
    """Writes dg and du [B, S, N], and `t` [B, S, RANKS], of `dy` [B, S, D] and `weight` [D, N]."""
    block, depth, half = BLOCK.value, DEPTH.value, HALF.value
    hidden, blocks, across = g.size(2), blocks_of(dy), cdiv(g.size(2), block)
    columns = pick_columns(blocks, across, multiprocessors(dy.device), dy.size(2) * dy.itemsize)
    chunks = blocks * across // columns
    g_d, u_d, dg_d, du_d = (swizzled(tensor, 1, half, half) for tensor in (g, u, dg, du))
    _gradients_in_turns[(min(multiprocessors(dy.device), chunks),)](
        dy_desc=swizzled(dy, 1, block, depth), w_desc=swizzled(weight, depth, block),
        b_desc=swizzled(adapters.b, 1, depth, RANKS.value), a_ptr=adapters.a, slots_ptr=adapters.slots, g_desc=g_d,
        u_desc=u_d, dg_desc=dg_d, du_desc=du_d, t_desc=swizzled(t, 1, block, RANKS.value),
        a_stride=adapters.a.stride(0), S=dy.size(1), columns=columns, chunks=chunks, pool=adapters.a.size(0), N=hidden,
        ACROSS=across, R=adapters.rank, STEPS=cdiv(dy.size(2), depth), STAGES=BACKWARD_STAGES,
        PLACES=PLACES, num_warps=4, maxnreg=168,
    )  # fmt: skip
