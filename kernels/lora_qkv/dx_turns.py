"""dx of projections with adapters on Hopper, by groups of warps that take turns (:mod:`..pingpong`): t A, the rounding
and the store of a tile are hidden by the other group's product, as in the forward, :mod:`.turns`.

    dx = dY W + t A        t = dY B, rounded, of up to RANKS ranks

dY is of one projection, or of two side by side with half of the ranks each. Of three with as many, t is made in two
phases: first that of two, then that of the third; a thread has no registers for both. The first tile of a chunk
multiplies dY by B as well, and leaves t in shared memory for the tiles to its right. Every sum is made in the order of
the kernel of :mod:`.backward`, whatever the tiles and chunks.
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
    HALVED_3D,
    LOAD_REGISTERS,
    NARROW,
    NARROW_3D,
    SWIZZLED,
    SWIZZLED_3D,
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
from .adapters import Adapters
from .turns import (
    HALF,
    HALF_ACC,
    INNER,
    RANKS,
    TURNS,
    adapter_of,
    blocks_of,
    make_inner_barriers,
    pick_columns,
    place_of,
    tiles_of_program,
)

FACTOR_LOADS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))

BN = gl.constexpr(BLOCK.value + HALF.value)
"""Columns of a tile: two sums of a group's registers, as in the forward's wide one."""
STAGES = gl.constexpr(4)
"""Of the ring: 220 KiB of shared memory."""


@gluon.jit
def _load_factor(a_ptr, a_stride, slot, first, n, place, N: gl.constexpr, ROWS: gl.constexpr):
    """Rows of A from `first` on, columns from `n` on, into shared memory; zeros past its ROWS and past N."""
    r = first + gl.arange(0, place.shape[0], gl.SliceLayout(1, FACTOR_LOADS))
    column = n + gl.arange(0, place.shape[1], gl.SliceLayout(0, FACTOR_LOADS))
    rows = a_ptr + slot.to(gl.int64) * a_stride + (r * N)[:, None] + column[None, :]
    place.store(gl.load(rows, mask=(r < ROWS)[:, None] & (column < N)[None, :] & (slot >= 0), other=0.0))


@gluon.jit
def _store(dx_desc, b, s, n, half, place):
    """HALF columns from `n` on, in one piece or in two, as `place` is."""
    if place.shape[2] == HALF:
        store_piece(dx_desc, b, s, n, half, place)
    else:
        left, right = halves_of(half)
        store_piece(dx_desc, b, s, n, left, place)
        store_piece(dx_desc, b, s, n + HALF // 2, right, place)


@gluon.jit
def _finish_tiles(
    a_ptr, slots_ptr, dx_desc, t_desc, a_stride, S, columns, tiles, pool,
    inputs, weights, factors, inners, inner_made, ranks, outs, loaded, empty, turn,
    GROUP: gl.constexpr, D: gl.constexpr, ACROSS: gl.constexpr, ROWS: gl.constexpr, ENDS: gl.constexpr,
):  # fmt: skip
    """Every other tile of the program. ENDS: the steps after which each phase of t is made."""
    PHASES: gl.constexpr = len(ENDS)
    STEPS: gl.constexpr = ENDS[PHASES - 1]
    out = outs.index(GROUP)
    for count in range(GROUP, tiles, 2):
        b, s, _, n, _, makes_t = place_of(count, columns, S, D, 0, ACROSS, 0, 0, BN, 1)
        number = count // columns
        slot = adapter_of(slots_ptr, b, pool)
        begun = (gl.zeros([BLOCK, BLOCK], gl.float32, ACC), gl.zeros([BLOCK, HALF], gl.float32, HALF_ACC))
        for phase in gl.static_range(PHASES):
            for i in gl.static_range(2):
                place = ranks[i].index(GROUP * PHASES + phase)
                _load_factor(a_ptr, a_stride, slot, phase * RANKS, n + i * BLOCK, place, D, ROWS)
        fence_async_shared()
        await_turn(turn, count, GROUP)
        first = number % 2 * PHASES
        if makes_t:
            sums = begun
            for phase in gl.static_range(PHASES):
                t = gl.zeros([BLOCK, RANKS], gl.float32, INNER)
                sums = multiply_steps(
                    inputs, weights + (factors,), sums + (t,), loaded, empty, turn, count, GROUP, STEPS, STAGES, True,
                    ENDS[phase - 1] if phase else 0, ENDS[phase],
                )  # fmt: skip
                inner = inners.index(first + phase)
                inner.store(sums[-1].to(inner.dtype).reshape([1, BLOCK, RANKS]))
                fence_async_shared()
                if n == 0:
                    tma.async_copy_shared_to_global(t_desc, [b, s, phase * RANKS], inner)
                sums = sums[:-1]
            mbarrier.arrive(inner_made.index(number % 2))
        else:
            sums = multiply_steps(inputs, weights, begun, loaded, empty, turn, count, GROUP, STEPS, STAGES, True)
        mbarrier.wait(inner_made.index(number % 2), number // 2 % 2)
        for phase in gl.static_range(PHASES):
            t_rows = inners.index(first + phase)._reinterpret(inners.dtype, [BLOCK, RANKS], NARROW)
            whole = ()
            for i in gl.static_range(2):
                factor = ranks[i].index(GROUP * PHASES + phase)
                whole = whole + (warpgroup_mma(t_rows, factor, sums[i], is_async=True),)
            sums = whole
        sums = multiplied(0, sums)
        left, right = halves_of(sums[0])
        _store(dx_desc, b, s, n, left, out)
        _store(dx_desc, b, s, n + HALF, right, out)
        _store(dx_desc, b, s, n + BLOCK, sums[1], out)
    tma.store_wait(0)


@gluon.jit
def _load(
    dys, w_descs, b_desc, slots_ptr, S, columns, tiles, pool, inputs, weights, factors, loaded, empty,
    D: gl.constexpr, ACROSS: gl.constexpr, BEGINS: gl.constexpr, FIRSTS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """A step takes DEPTH outputs of one projection, which begins with the step BEGINS, and in the weight with the row
    FIRSTS; its rows of B are read from their number PLACES on, where the copy engine reads zeros left of them.
    """
    PRODUCT: gl.constexpr = (BLOCK + BN) * DEPTH * 2  # bytes
    STEPS: gl.constexpr = BEGINS[len(dys)]
    step = 0
    for count in range(tiles):
        b, s, _, n, _, makes_t = place_of(count, columns, S, D, 0, ACROSS, 0, 0, BN, 1)
        slot = adapter_of(slots_ptr, b, pool)
        for k in range(STEPS):
            stage = empty_stage(empty, step, STAGES)
            is_loaded = loaded.index(stage)
            mbarrier.expect(is_loaded, PRODUCT, pred=not makes_t)
            mbarrier.expect(is_loaded, PRODUCT + RANKS * DEPTH * 2, pred=makes_t)
            for p in gl.static_range(len(dys)):
                if (k >= BEGINS[p]) & (k < BEGINS[p + 1]):
                    output = (k - BEGINS[p]) * DEPTH
                    row = FIRSTS[p] + output
                    tma.async_copy_global_to_shared(dys[p], [b, s, output], is_loaded, inputs.index(stage))
                    for i in gl.static_range(2):
                        weight = weights[i].index(stage)
                        tma.async_copy_global_to_shared(w_descs[i], [row, n + i * BLOCK], is_loaded, weight)
                    factor = factors.index(stage)
                    tma.async_copy_global_to_shared(b_desc, [slot, row, PLACES[p]], is_loaded, factor, pred=makes_t)
            step += 1


@launched
@gluon.jit(do_not_specialize=["S", "columns", "chunks", "pool"])
def _dx_in_turns(
    dy_desc,  # [B, S, N], blocks [1, BLOCK, DEPTH]
    second_desc,  # of another projection of x, or None
    third_desc,
    square_desc,  # W [outputs, D], blocks [DEPTH, BLOCK]
    half_desc,  # the same, blocks [DEPTH, HALF]
    b_desc,  # [pool, outputs, ranks], blocks [1, DEPTH, RANKS]
    a_ptr,
    slots_ptr,
    dx_desc,  # [B, S, D], blocks [1, BLOCK, PIECE]
    t_desc,  # [B, S, RANKS of each phase], blocks [1, BLOCK, RANKS]
    a_stride,
    S,
    columns,
    chunks,
    pool,
    D: gl.constexpr,
    ACROSS: gl.constexpr,
    ROWS: gl.constexpr,
    BEGINS: gl.constexpr,
    FIRSTS: gl.constexpr,
    PLACES: gl.constexpr,
    ENDS: gl.constexpr,
):
    dtype: gl.constexpr = dy_desc.dtype
    PHASES: gl.constexpr = len(ENDS)
    PIECE: gl.constexpr = HALF // PHASES
    dys = (dy_desc,)
    if second_desc is not None:
        dys = dys + (second_desc,)
    if third_desc is not None:
        dys = dys + (third_desc,)
    inputs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, DEPTH], SWIZZLED_3D)
    weights = (
        gl.allocate_shared_memory(dtype, [STAGES, DEPTH, BLOCK], SWIZZLED),
        gl.allocate_shared_memory(dtype, [STAGES, DEPTH, HALF], SWIZZLED),
    )
    ranks = (
        gl.allocate_shared_memory(dtype, [2 * PHASES, RANKS, BLOCK], SWIZZLED),
        gl.allocate_shared_memory(dtype, [2 * PHASES, RANKS, HALF], SWIZZLED),
    )
    factors = gl.allocate_shared_memory(dtype, [STAGES, 1, DEPTH, RANKS], NARROW_3D)
    inners = gl.allocate_shared_memory(dtype, [2 * PHASES, 1, BLOCK, RANKS], NARROW_3D)
    outs = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, PIECE], SWIZZLED_3D if PIECE == HALF else HALVED_3D)
    inner_made = make_inner_barriers()
    loaded, empty, turn = make_barriers(STAGES)
    tiles = tiles_of_program(chunks, columns)
    flat_inputs = inputs._reinterpret(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    flat_factors = factors._reinterpret(dtype, [STAGES, DEPTH, RANKS], NARROW)
    gl.warp_specialize(
        [
            (_finish_tiles, (
                a_ptr, slots_ptr, dx_desc, t_desc, a_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                0, D, ACROSS, ROWS, ENDS,
            )),
            (_finish_tiles, (
                a_ptr, slots_ptr, dx_desc, t_desc, a_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                1, D, ACROSS, ROWS, ENDS,
            )),
            (_load, (
                dys, (square_desc, half_desc), b_desc, slots_ptr, S, columns, tiles, pool,
                inputs, weights, factors, loaded, empty, D, ACROSS, BEGINS, FIRSTS, PLACES,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def takes(x: Tensor, rank: int, sizes: Sequence[int]) -> bool:
    """Whether dx of `x` [B, S, D] pays here: 16 bits, on Hopper, few ranks, tiles for most of its multiprocessors, and
    D that BN covers with no more columns than BLOCK does.
    """
    if not runs_on(x) or not phases(rank, sizes):
        return False
    across = cdiv(x.size(2), BN.value)
    is_covered = across * BN.value <= cdiv(x.size(2), BLOCK.value) * BLOCK.value
    return is_covered and blocks_of(x) * across >= TURNS * multiprocessors(x.device)


def phases(rank: int, sizes: Sequence[int]) -> int:
    """In how many phases t is made, of RANKS ranks each: of one projection, of two of three, or of three whose third
    one has a phase of its own. 0: not here.
    """
    if len(sizes) == 1:
        return int(rank <= RANKS.value)
    if 0 in sizes[:2]:
        return 0
    return 2 * int(2 * rank == RANKS.value) if sizes[2] else int(2 * rank <= RANKS.value)


def launch_dx_in_turns(grads: Sequence[Tensor], weight: Tensor, adapters: Adapters, t: Tensor, dx: Tensor) -> None:
    """Writes `dx` [B, S, D] and `t` [B, S, phases x RANKS], of `grads` [B, S, N_p], of which the third one may have no
    outputs.
    """
    sizes, rank, (batch, length, width) = [grad.size(2) for grad in grads], adapters.rank, dx.shape
    count, block, depth, processors = phases(rank, sizes), BLOCK.value, DEPTH.value, multiprocessors(dx.device)
    grads = [grad for grad, size in zip(grads, sizes, strict=True) if size]
    begins, firsts = [0], [0]
    for size in sizes[: len(grads)]:
        begins.append(begins[-1] + cdiv(size, depth))
        firsts.append(firsts[-1] + size)
    phase = [0, 0, RANKS.value][: len(grads)]
    places = [begin - (0 if adapters.is_packed else p * rank) for p, begin in enumerate(phase)]
    blocks, across = batch * cdiv(length, block), cdiv(width, BN.value)
    columns = pick_columns(blocks, across, processors, sum(sizes) * dx.itemsize)
    chunks = blocks * across // columns
    dy_d, second_d, third_d = [*(swizzled(grad, 1, block, depth) for grad in grads), None, None][:3]
    _dx_in_turns[(min(processors, chunks),)](
        dy_desc=dy_d, second_desc=second_d, third_desc=third_d, square_desc=swizzled(weight, depth, block),
        half_desc=swizzled(weight, depth, HALF.value), b_desc=swizzled(adapters.b, 1, depth, RANKS.value),
        a_ptr=adapters.a, slots_ptr=adapters.slots, dx_desc=swizzled(dx, 1, block, HALF.value // count),
        t_desc=swizzled(t, 1, block, RANKS.value), a_stride=adapters.a.stride(0), S=length, columns=columns,
        chunks=chunks, pool=adapters.a.size(0), D=width, ACROSS=across, ROWS=len(grads) * rank, BEGINS=tuple(begins),
        FIRSTS=tuple(firsts[:-1]), PLACES=tuple(places), ENDS=(begins[2], begins[3]) if count == 2 else (begins[-1],),
        num_warps=4, maxnreg=168,
    )  # fmt: skip
