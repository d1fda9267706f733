"""dx of projections with adapters on Hopper, by groups of warps that take turns (:mod:`..pingpong`): t A, the rounding
and the store of a tile are hidden by the other group's product, as in the forward, :mod:`.turns`.

    dx = dY W + t A        t = dY B, rounded, of up to RANKS ranks

dY is of one projection, or of two side by side with half of the ranks each. The first tile of a chunk multiplies dY by
B as well, and leaves t in shared memory for the tiles to its right. Every sum is made in the order of the kernel of
:mod:`.backward`, whatever the tiles and chunks.
"""

from collections.abc import Sequence

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from ..dispatch import cdiv, multiprocessors
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
    await_turn,
    empty_stage,
    make_barriers,
    multiplied,
    multiply_steps,
    runs_on,
    swizzled,
)
from .adapters import Adapters
from .turns import HALF, HALF_ACC, INNER, RANKS, TURNS, adapter_of, blocks_of, pick_columns, place_of

FACTOR_LOADS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))

BN = gl.constexpr(BLOCK.value + HALF.value)
"""Columns of a tile: two sums of a group's registers, as in the forward's wide one."""
STAGES = gl.constexpr(4)
"""Of the ring: 220 KiB of shared memory."""


@gluon.jit
def _load_factor(a_ptr, a_stride, slot, n, place, N: gl.constexpr, ROWS: gl.constexpr):
    """Columns of A from `n` on into shared memory, zeros past its ROWS and past N."""
    r = gl.arange(0, place.shape[0], gl.SliceLayout(1, FACTOR_LOADS))
    column = n + gl.arange(0, place.shape[1], gl.SliceLayout(0, FACTOR_LOADS))
    rows = a_ptr + slot.to(gl.int64) * a_stride + (r * N)[:, None] + column[None, :]
    place.store(gl.load(rows, mask=(r < ROWS)[:, None] & (column < N)[None, :] & (slot >= 0), other=0.0))


@gluon.jit
def _store_piece(dx_desc, b, s, n, piece, place):
    tma.store_wait(0)
    place.store(piece.to(place.dtype).reshape([1, BLOCK, HALF]))
    fence_async_shared()
    tma.async_copy_shared_to_global(dx_desc, [b, s, n], place)


@gluon.jit
def _finish_tiles(
    a_ptr, slots_ptr, dx_desc, t_desc, a_stride, S, columns, tiles, pool,
    inputs, weights, factors, inners, inner_made, ranks, outs, loaded, empty, turn,
    GROUP: gl.constexpr, D: gl.constexpr, ACROSS: gl.constexpr, ROWS: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Every other tile of the program."""
    out = outs.index(GROUP)
    for count in range(GROUP, tiles, 2):
        b, s, _, n, _, makes_t = place_of(count, columns, S, D, 0, ACROSS, 0, 0, BN, 1)
        number = count // columns
        slot = adapter_of(slots_ptr, b, pool)
        begun = (gl.zeros([BLOCK, BLOCK], gl.float32, ACC), gl.zeros([BLOCK, HALF], gl.float32, HALF_ACC))
        for i in gl.static_range(2):
            _load_factor(a_ptr, a_stride, slot, n + i * BLOCK, ranks[i].index(GROUP), D, ROWS)
        fence_async_shared()
        await_turn(turn, count, GROUP)
        place = inners.index(number % 2)
        if makes_t:
            t = gl.zeros([BLOCK, RANKS], gl.float32, INNER)
            sums = multiply_steps(
                inputs, weights + (factors,), begun + (t,), loaded, empty, turn, count, GROUP, STEPS, STAGES, True
            )
            place.store(sums[-1].to(place.dtype).reshape([1, BLOCK, RANKS]))
            fence_async_shared()
            if n == 0:
                tma.async_copy_shared_to_global(t_desc, [b, s, 0], place)
            mbarrier.arrive(inner_made.index(number % 2))
            sums = sums[:-1]
        else:
            sums = multiply_steps(inputs, weights, begun, loaded, empty, turn, count, GROUP, STEPS, STAGES, True)
        mbarrier.wait(inner_made.index(number % 2), number // 2 % 2)
        inner = place._reinterpret(place.dtype, [BLOCK, RANKS], NARROW)
        whole = ()
        for i in gl.static_range(2):
            whole = whole + (warpgroup_mma(inner, ranks[i].index(GROUP), sums[i], is_async=True),)
        whole = multiplied(0, whole)
        left, right = gl.split(gl.permute(gl.reshape(whole[0], [BLOCK, 2, HALF]), [0, 2, 1]))
        _store_piece(dx_desc, b, s, n, left, out)
        _store_piece(dx_desc, b, s, n + HALF, right, out)
        _store_piece(dx_desc, b, s, n + BLOCK, whole[1], out)
    tma.store_wait(0)


@gluon.jit
def _load(
    dy_desc, second_desc, w_descs, b_desc, slots_ptr, S, columns, tiles, pool, inputs, weights, factors, loaded, empty,
    D: gl.constexpr, ACROSS: gl.constexpr, N: gl.constexpr, COUNT: gl.constexpr, SHIFT: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """A step takes DEPTH outputs of one projection: the first has N, in COUNT steps. Rows of B of the second one are
    read from SHIFT numbers further left, where its ranks do not lie behind the first one's.
    """
    PRODUCT: gl.constexpr = (BLOCK + BN) * DEPTH * 2  # bytes
    step = 0
    for count in range(tiles):
        b, s, _, n, _, makes_t = place_of(count, columns, S, D, 0, ACROSS, 0, 0, BN, 1)
        slot = adapter_of(slots_ptr, b, pool)
        for k in range(STEPS):
            stage = empty_stage(empty, step, STAGES)
            is_loaded = loaded.index(stage)
            mbarrier.expect(is_loaded, PRODUCT, pred=not makes_t)
            mbarrier.expect(is_loaded, PRODUCT + RANKS * DEPTH * 2, pred=makes_t)
            row = k * DEPTH
            place = 0
            if second_desc is None or k < COUNT:
                tma.async_copy_global_to_shared(dy_desc, [b, s, k * DEPTH], is_loaded, inputs.index(stage))
            else:
                output = (k - COUNT) * DEPTH
                tma.async_copy_global_to_shared(second_desc, [b, s, output], is_loaded, inputs.index(stage))
                row = N + output
                place = -SHIFT
            for i in gl.static_range(2):
                weight = weights[i].index(stage)
                tma.async_copy_global_to_shared(w_descs[i], [row, n + i * BLOCK], is_loaded, weight)
            factor = factors.index(stage)
            tma.async_copy_global_to_shared(b_desc, [slot, row, place], is_loaded, factor, pred=makes_t)
            step += 1


@launched
@gluon.jit(do_not_specialize=["S", "columns", "chunks", "pool"])
def _dx_in_turns(
    dy_desc,  # [B, S, N], blocks [1, BLOCK, DEPTH]
    second_desc,  # of another projection of x, or None
    square_desc,  # W [outputs, D], blocks [DEPTH, BLOCK]
    half_desc,  # the same, blocks [DEPTH, HALF]
    b_desc,  # [pool, outputs, ranks], blocks [1, DEPTH, RANKS]
    a_ptr,
    slots_ptr,
    dx_desc,  # [B, S, D], blocks [1, BLOCK, HALF]
    t_desc,  # [B, S, RANKS], blocks [1, BLOCK, RANKS]
    a_stride,
    S,
    columns,
    chunks,
    pool,
    D: gl.constexpr,
    ACROSS: gl.constexpr,
    N: gl.constexpr,
    COUNT: gl.constexpr,
    ROWS: gl.constexpr,
    SHIFT: gl.constexpr,
    STEPS: gl.constexpr,
):
    dtype: gl.constexpr = dy_desc.dtype
    inputs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, DEPTH], SWIZZLED_3D)
    weights = (
        gl.allocate_shared_memory(dtype, [STAGES, DEPTH, BLOCK], SWIZZLED),
        gl.allocate_shared_memory(dtype, [STAGES, DEPTH, HALF], SWIZZLED),
    )
    ranks = (
        gl.allocate_shared_memory(dtype, [2, RANKS, BLOCK], SWIZZLED),
        gl.allocate_shared_memory(dtype, [2, RANKS, HALF], SWIZZLED),
    )
    factors = gl.allocate_shared_memory(dtype, [STAGES, 1, DEPTH, RANKS], NARROW_3D)
    inners = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, RANKS], NARROW_3D)
    outs = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, HALF], SWIZZLED_3D)
    inner_made = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(2):
        mbarrier.init(inner_made.index(number), count=1)
    loaded, empty, turn = make_barriers(STAGES)
    tiles = (chunks - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * columns
    flat_inputs = inputs._reinterpret(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    flat_factors = factors._reinterpret(dtype, [STAGES, DEPTH, RANKS], NARROW)
    gl.warp_specialize(
        [
            (_finish_tiles, (
                a_ptr, slots_ptr, dx_desc, t_desc, a_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                0, D, ACROSS, ROWS, STEPS,
            )),
            (_finish_tiles, (
                a_ptr, slots_ptr, dx_desc, t_desc, a_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                1, D, ACROSS, ROWS, STEPS,
            )),
            (_load, (
                dy_desc, second_desc, (square_desc, half_desc), b_desc, slots_ptr, S, columns, tiles, pool,
                inputs, weights, factors, loaded, empty, D, ACROSS, N, COUNT, SHIFT, STEPS,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def takes(x: Tensor, rank: int, sizes: Sequence[int]) -> bool:
    """Whether dx of `x` [B, S, D] pays here: 16 bits, on Hopper, one projection or two of three, few ranks, tiles for
    most of its multiprocessors, and D that BN covers with no more columns than BLOCK does.
    """
    if not runs_on(x) or not _are_few(rank, sizes):
        return False
    across = cdiv(x.size(2), BN.value)
    is_covered = across * BN.value <= cdiv(x.size(2), BLOCK.value) * BLOCK.value
    return is_covered and blocks_of(x) * across >= TURNS * multiprocessors(x.device)


def _are_few(rank: int, sizes: Sequence[int]) -> bool:
    if len(sizes) == 1:
        return rank <= RANKS.value
    return 0 not in sizes[:2] and not sizes[2] and 2 * rank <= RANKS.value


def launch_dx_in_turns(grads: Sequence[Tensor], weight: Tensor, adapters: Adapters, t: Tensor, dx: Tensor) -> None:
    """Writes `dx` [B, S, D] and `t` [B, S, RANKS], of `grads` [B, S, N_p]: of one projection, or of three without the
    last one's outputs.
    """
    grads, block, depth, processors = grads[:2], BLOCK.value, DEPTH.value, multiprocessors(dx.device)
    sizes, (batch, length, width) = [grad.size(2) for grad in grads], dx.shape
    steps, across = [cdiv(size, depth) for size in sizes], cdiv(width, BN.value)
    blocks = batch * cdiv(length, block)
    columns = pick_columns(blocks, across, processors, sum(sizes) * dx.itemsize)
    chunks = blocks * across // columns
    dy_d, second_d = [*(swizzled(grad, 1, block, depth) for grad in grads), None][:2]
    _dx_in_turns[(min(processors, chunks),)](
        dy_desc=dy_d, second_desc=second_d, square_desc=swizzled(weight, depth, block),
        half_desc=swizzled(weight, depth, HALF.value), b_desc=swizzled(adapters.b, 1, depth, RANKS.value),
        a_ptr=adapters.a, slots_ptr=adapters.slots, dx_desc=swizzled(dx, 1, block, HALF.value),
        t_desc=swizzled(t, 1, block, RANKS.value), a_stride=adapters.a.stride(0), S=length, columns=columns,
        chunks=chunks, pool=adapters.a.size(0), D=width, ACROSS=across, N=sizes[0], COUNT=steps[0],
        ROWS=len(sizes) * adapters.rank, SHIFT=0 if adapters.is_packed else adapters.rank, STEPS=sum(steps),
        num_warps=4, maxnreg=168,
    )  # fmt: skip
