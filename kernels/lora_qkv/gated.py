"""SwiGLU where the tiles of two products with adapters leave, on Hopper, by groups of warps that take turns
(:mod:`..pingpong`): what is done to a tile is hidden by the other group's product.

    g = x Wg^T + (x Ag^T) Bg^T;   u = x Wu^T + (x Au^T) Bu^T;   h = silu(g) u

Half of a tile is columns of gate, the other half the same columns of up: g and u meet in registers. Both weights lie
side by side in the ring, and both adapters are one, the ranks of up behind those of gate: rows of B have zeros at the
ranks of the other. The inner rows x A^T are made by the first tile of a chunk, as in :mod:`.turns`.

g and u are rounded before they are read, and every sum is made in the order of the launches that this stands for: their
bits are the same.
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
    SWIZZLED,
    SWIZZLED_3D,
    SWIZZLED_4D,
    await_turn,
    empty_stage,
    halves_of,
    make_barriers,
    multiplied,
    multiply_steps,
    runs_on,
    store_piece,
    swizzled,
)
from ..swiglu import silu
from .adapters import Adapters
from .turns import (
    HALF,
    INNER,
    RANK_LOADS,
    RANKS,
    TURNS,
    adapter_of,
    blocks_of,
    make_inner_barriers,
    pick_columns,
    place_of,
    tiles_of_program,
)

WIDE_INNER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * RANKS.value, 16]))


def pick_gated_stages(rank: int) -> int:
    """Of the ring, as many as shared memory holds beside the ranks.

    An H200, 65,536 x 1,536 x 576, rank 8: 437 us; 469 in 4 stages, 470 where every tile makes x A^T, 463 in tiles of
    192 outputs (nvidia-h200/tuning/lora_swiglu-1.json). Gate and up in turns and SwiGLU after them take 495.
    """
    return 5 if rank <= 8 else 4


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
        g, u = halves_of(acc)
        g, u = g.to(out.dtype), u.to(out.dtype)
        store_piece(g_desc, b, s, n, g, out)
        store_piece(u_desc, b, s, n, u, out)
        store_piece(h_desc, b, s, n, silu(g.to(gl.float32)) * u.to(gl.float32), out)
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
    inner_made = make_inner_barriers()
    loaded, empty, turn = make_barriers(STAGES)
    tiles = tiles_of_program(chunks, columns)
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
