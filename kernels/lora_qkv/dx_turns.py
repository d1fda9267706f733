"""dx of projections with adapters on Hopper, by groups of warps that take turns (:mod:`..pingpong`): as in their forward,
:mod:`.turns`, t A, the rounding and the store of a tile are hidden by the other group's product.

    dx = sum of dY_p W_p + t A        t = [dY_q | dY_k | dY_v] B, rounded, of up to 32 ranks side by side

The tile of the first columns of a chunk multiplies dY by B as well, and leaves t in shared memory for the tiles to its
right. Every sum is made in the order of :mod:`.backward`'s kernel, whatever the tiles and chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    HALVED_3D,
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
from .tiles import described, of_three
from .turns import HALF, HALF_ACC, INNER, TURNS, adapter_of, blocks_of, pick_columns, place_of

FACTOR_LOADS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
WIDE_INNER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))


@dataclass(frozen=True)
class DxConfig:
    """Columns of a tile, BLOCK or HALF more, ranks of t, and stages of the ring: as many as shared memory holds."""

    block_n: int
    ranks: int
    stages: int


def pick_config(width: int, ranks: int) -> DxConfig:
    """Tiles with the fewest columns too many; of 32 ranks the sums leave registers for BLOCK columns alone."""
    if ranks == 32 or cdiv(width, 128) * 128 < cdiv(width, 192) * 192:
        return DxConfig(128, ranks, 5 if ranks == 16 else 4)
    return DxConfig(192, ranks, 4)


def ranks_of(rank: int, sizes: Sequence[int]) -> int:
    """Ranks side by side up to the last projection that has outputs, as a multiple of 16."""
    return cdiv(rank * max(p for p, size in enumerate(sizes, 1) if size or p == 1), 16) * 16


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
    GROUP: gl.constexpr, D: gl.constexpr, ACROSS: gl.constexpr, ROWS: gl.constexpr, RT: gl.constexpr,
    BN: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every other tile of the program."""
    PARTS: gl.constexpr = len(weights)
    FLAT: gl.constexpr = HALVED if RT > 16 else NARROW
    out = outs.index(GROUP)
    for count in range(GROUP, tiles, 2):
        b, s, _, n, _, makes_t = place_of(count, columns, S, D, 0, ACROSS, 0, 0, BN, 1)
        number = count // columns
        slot = adapter_of(slots_ptr, b, pool)
        begun = (gl.zeros([BLOCK, BLOCK], gl.float32, ACC),)
        if PARTS > 1:
            begun = begun + (gl.zeros([BLOCK, HALF], gl.float32, HALF_ACC),)
        for i in gl.static_range(PARTS):
            _load_factor(a_ptr, a_stride, slot, n + i * BLOCK, ranks[i].index(GROUP), D, ROWS)
        fence_async_shared()
        await_turn(turn, count, GROUP)
        place = inners.index(number % 2)
        if makes_t:
            t = gl.zeros([BLOCK, RT], gl.float32, WIDE_INNER if RT > 16 else INNER)
            sums = multiply_steps(
                inputs, weights + (factors,), begun + (t,), loaded, empty, turn, count, GROUP, STEPS, STAGES, True
            )
            place.store(sums[-1].to(place.dtype).reshape([1, BLOCK, RT]))
            fence_async_shared()
            if n == 0:
                tma.async_copy_shared_to_global(t_desc, [b, s, 0], place)
            mbarrier.arrive(inner_made.index(number % 2))
            sums = sums[:-1]
        else:
            sums = multiply_steps(inputs, weights, begun, loaded, empty, turn, count, GROUP, STEPS, STAGES, True)
        mbarrier.wait(inner_made.index(number % 2), number // 2 % 2)
        inner = place._reinterpret(place.dtype, [BLOCK, RT], FLAT)
        whole = ()
        for i in gl.static_range(PARTS):
            whole = whole + (warpgroup_mma(inner, ranks[i].index(GROUP), sums[i], is_async=True),)
        whole = multiplied(0, whole)
        left, right = gl.split(gl.permute(gl.reshape(whole[0], [BLOCK, 2, HALF]), [0, 2, 1]))
        _store_piece(dx_desc, b, s, n, left, out)
        _store_piece(dx_desc, b, s, n + HALF, right, out)
        if PARTS > 1:
            _store_piece(dx_desc, b, s, n + BLOCK, whole[1], out)
    tma.store_wait(0)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, w_descs, b_desc, slots_ptr, S, columns, tiles, pool,
    inputs, weights, factors, loaded, empty,
    D: gl.constexpr, ACROSS: gl.constexpr, NQ: gl.constexpr, NK: gl.constexpr, CQ: gl.constexpr, CK: gl.constexpr,
    SHIFT: gl.constexpr, RT: gl.constexpr, BN: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A step takes DEPTH outputs of one projection. Rows of B whose ranks do not lie at their projection's place are read
    from SHIFT numbers further left for each projection before it.
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
            mbarrier.expect(is_loaded, PRODUCT + RT * DEPTH * 2, pred=makes_t)
            row = k * DEPTH
            place = 0
            if v_desc is None or k < CQ:
                tma.async_copy_global_to_shared(q_desc, [b, s, k * DEPTH], is_loaded, inputs.index(stage))
            elif k < CQ + CK:
                tma.async_copy_global_to_shared(k_desc, [b, s, (k - CQ) * DEPTH], is_loaded, inputs.index(stage))
                row = NQ + (k - CQ) * DEPTH
                place = SHIFT
            else:
                tma.async_copy_global_to_shared(v_desc, [b, s, (k - CQ - CK) * DEPTH], is_loaded, inputs.index(stage))
                row = NQ + NK + (k - CQ - CK) * DEPTH
                place = 2 * SHIFT
            for i in gl.static_range(len(weights)):
                weight = weights[i].index(stage)
                tma.async_copy_global_to_shared(w_descs[i], [row, n + i * BLOCK], is_loaded, weight)
            factor = factors.index(stage)
            tma.async_copy_global_to_shared(b_desc, [slot, row, -place], is_loaded, factor, pred=makes_t)
            step += 1


@launched
@gluon.jit(do_not_specialize=["S", "columns", "chunks", "pool"])
def _dx_in_turns(
    q_desc,  # dY_q [B, S, NQ], blocks [1, BLOCK, DEPTH]
    k_desc,
    v_desc,
    square_desc,  # W [N, D], blocks [DEPTH, BLOCK]
    half_desc,  # the same, blocks [DEPTH, HALF]; None for tiles of BLOCK columns
    b_desc,  # [pool, N, ranks], blocks [1, DEPTH, RT]
    a_ptr,
    slots_ptr,
    dx_desc,  # [B, S, D], blocks [1, BLOCK, HALF]
    t_desc,  # [B, S, ranks], blocks [1, BLOCK, RT]
    a_stride,
    S,
    columns,
    chunks,
    pool,
    D: gl.constexpr,
    ACROSS: gl.constexpr,
    NQ: gl.constexpr,
    NK: gl.constexpr,
    CQ: gl.constexpr,
    CK: gl.constexpr,
    ROWS: gl.constexpr,
    SHIFT: gl.constexpr,
    RT: gl.constexpr,
    BN: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One product is q alone, without k_desc and v_desc."""
    dtype: gl.constexpr = q_desc.dtype
    FLAT: gl.constexpr = HALVED if RT > 16 else NARROW
    DEEP: gl.constexpr = HALVED_3D if RT > 16 else NARROW_3D
    inputs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, DEPTH], SWIZZLED_3D)
    w_descs = (square_desc,)
    weights = (gl.allocate_shared_memory(dtype, [STAGES, DEPTH, BLOCK], SWIZZLED),)
    ranks = (gl.allocate_shared_memory(dtype, [2, RT, BLOCK], SWIZZLED),)
    if BN > BLOCK:
        w_descs = w_descs + (half_desc,)
        weights = weights + (gl.allocate_shared_memory(dtype, [STAGES, DEPTH, HALF], SWIZZLED),)
        ranks = ranks + (gl.allocate_shared_memory(dtype, [2, RT, HALF], SWIZZLED),)
    factors = gl.allocate_shared_memory(dtype, [STAGES, 1, DEPTH, RT], DEEP)
    inners = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, RT], DEEP)
    outs = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, HALF], SWIZZLED_3D)
    inner_made = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(2):
        mbarrier.init(inner_made.index(number), count=1)
    loaded, empty, turn = make_barriers(STAGES)
    tiles = (chunks - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * columns
    flat_inputs = inputs._reinterpret(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    flat_factors = factors._reinterpret(dtype, [STAGES, DEPTH, RT], FLAT)
    gl.warp_specialize(
        [
            (_finish_tiles, (
                a_ptr, slots_ptr, dx_desc, t_desc, a_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                0, D, ACROSS, ROWS, RT, BN, STEPS, STAGES,
            )),
            (_finish_tiles, (
                a_ptr, slots_ptr, dx_desc, t_desc, a_stride, S, columns, tiles, pool,
                flat_inputs, weights, flat_factors, inners, inner_made, ranks, outs, loaded, empty, turn,
                1, D, ACROSS, ROWS, RT, BN, STEPS, STAGES,
            )),
            (_load, (
                q_desc, k_desc, v_desc, w_descs, b_desc, slots_ptr, S, columns, tiles, pool,
                inputs, weights, factors, loaded, empty, D, ACROSS, NQ, NK, CQ, CK, SHIFT, RT, BN, STEPS, STAGES,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def takes(x: Tensor, adapters: Adapters, sizes: Sequence[int]) -> bool:
    """Whether dx of `x` [B, S, D] pays here: 16 bits, on Hopper, few ranks, tiles for most of its multiprocessors."""
    ranks = ranks_of(adapters.rank, sizes)
    if not runs_on(x) or ranks > 32 or (len(sizes) == 1 and ranks > 16):
        return False
    tiles = blocks_of(x) * cdiv(x.size(2), pick_config(x.size(2), ranks).block_n)
    return tiles >= TURNS * multiprocessors(x.device)


def launch_dx_in_turns(grads: Sequence[Tensor], weight: Tensor, adapters: Adapters, t: Tensor, dx: Tensor) -> None:
    """Writes `dx` [B, S, D] and `t` [B, S, padded ranks], of `grads` [B, S, N_p]: of one product, or of three that are
    stacked. What t has no ranks for becomes zeros.
    """
    sizes, width, block, depth = [grad.size(2) for grad in grads], dx.size(2), BLOCK.value, DEPTH.value
    config = pick_config(width, ranks_of(adapters.rank, sizes))
    blocks, across, processors = blocks_of(dx), cdiv(width, config.block_n), multiprocessors(dx.device)
    columns = pick_columns(blocks, across, processors, sum(sizes) * dx.itemsize)
    chunks, weight = blocks * across // columns, aligned(weight)
    if config.ranks < t.size(2):
        t.zero_()
    q_d, k_d, v_d = of_three([swizzled(grad, 1, block, depth) for grad in described(grads)])
    (nq, nk, _), (cq, ck, cv) = of_three(sizes, 0), of_three([cdiv(size, depth) for size in sizes], 0)
    _dx_in_turns[(min(processors, chunks),)](
        q_desc=q_d, k_desc=k_d, v_desc=v_d, square_desc=swizzled(weight, depth, block),
        half_desc=swizzled(weight, depth, HALF.value) if config.block_n > block else None,
        b_desc=swizzled(adapters.b, 1, depth, config.ranks), a_ptr=adapters.a, slots_ptr=adapters.slots,
        dx_desc=swizzled(dx, 1, block, HALF.value), t_desc=swizzled(t, 1, block, config.ranks),
        a_stride=adapters.a.stride(0), S=dx.size(1), columns=columns, chunks=chunks, pool=adapters.a.size(0), D=width,
        ACROSS=across, NQ=nq, NK=nk, CQ=cq, CK=ck, ROWS=min(len(sizes) * adapters.rank, config.ranks),
        SHIFT=0 if adapters.is_packed else adapters.rank, RT=config.ranks, BN=config.block_n, STEPS=cq + ck + cv,
        STAGES=config.stages, num_warps=4, maxnreg=168,
    )  # fmt: skip
