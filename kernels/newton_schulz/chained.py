"""All products of a plan in one launch; written in Gluon, for what its warps do apart from each other is its point.

A block for each multiprocessor walks through the tiles in order. One warp fetches: it waits until the tiles that a tile
needs are counted as stored, then keeps a ring of stages full, each BK deep. Two groups of four warps take turns to
multiply: while one puts its tile into shared memory, the other keeps the tensor cores busy. Two more warps store the
tiles and count them, so that no group waits for memory to have them.

Of a symmetric matrix only tiles on and under the diagonal are stored; what is above is read transposed, which costs
tensor cores nothing. A tile on the diagonal takes its upper half from its lower.

Blocks wait for tiles of other blocks, so all must run at once: the launch is cooperative, which CUDA starts whole or
not at all, and two of them one after the other. Nothing is summed through the counters: results are the same bits as
those of the plan in steps.

What bounds it is reading operands from L2: on an NVIDIA H100 a variant that also read the table ahead took 0.343 ms for
the 60 matrices of `seed`, 0.240 ms with the reads of operands left out, and 0.359 ms with the waits left out.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..dispatch import multiprocessors
from ..launch import launched
from .plan import CHAIN_FIELDS, Plan

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7 renames it
REGISTERS = (232, 40, 40, 40)
"""Of a thread of the second group that multiplies, of the warp that fetches, and of the two that store."""


@gluon.jit
def _await(done, needed):
    """Return once `needed` tiles are counted at `done`; what they stored may be read through descriptors then."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred ready;
        .reg .u32 count;
        again:
        ld.acquire.gpu.global.u32 count, [$1];
        setp.ge.u32 ready, count, $2;
        @ready bra over;
        nanosleep.u32 20;
        bra again;
        over:
        fence.proxy.async;
        mov.u32 $0, count;
        }""",
        "=r,l,r",
        [done, needed],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _fetch_stage(
    rows,
    columns,
    ring,
    full,
    empty,
    step,
    left,
    left_column,
    right,
    right_column,
    LEFT_AS_ROWS: gl.constexpr,
    RIGHT_AS_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the next stage of the ring, once what it held is multiplied."""
    slot = step % STAGES
    barrier = full.index(slot)
    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
    mbarrier.expect(barrier, 2 * rows.block_type.nbytes)
    _copy(rows, columns, left, left_column, barrier, ring[0].index(slot), LEFT_AS_ROWS)
    _copy(rows, columns, right, right_column, barrier, ring[1].index(slot), RIGHT_AS_ROWS)


@gluon.jit
def _copy(rows, columns, row, column, barrier, to, AS_ROWS: gl.constexpr):
    """Start the copy of [PANEL, BK] or of [BK, PANEL] of the arena."""
    if AS_ROWS:
        tma.async_copy_global_to_shared(rows, [row, column], barrier, to)
    else:
        to = to._reinterpret(columns.dtype, columns.block_shape, columns.layout)
        tma.async_copy_global_to_shared(columns, [row, column], barrier, to)


@gluon.jit
def _fetch(descriptors, table, done, total, shared, STAGES: gl.constexpr, FIELDS: gl.constexpr):
    """The warp that fetches operands, and addends into the places of the results."""
    rows, columns, squares, _ = descriptors
    ring, tiles, full, empty, added, free, _, _ = shared
    PANEL: gl.constexpr = rows.block_shape[0]
    BK: gl.constexpr = rows.block_shape[1]
    step = 0
    number = gl.program_id(0)
    turn = 0
    while number < total:
        tile = table + number * FIELDS
        left = gl.load(tile)
        m = gl.load(tile + 1)
        right = gl.load(tile + 2)
        left_columns = gl.load(tile + 3)
        right_columns = gl.load(tile + 4)
        depth = gl.load(tile + 5)
        first = gl.load(tile + 6)
        second = gl.load(tile + 7)
        addend = gl.load(tile + 8)
        matrix = gl.load(tile + 12)
        needed = gl.load(tile + 13)
        _await(done + matrix, needed)
        for k in range(0, first, BK):
            below = k // PANEL * m
            coordinates = (left + below, k % PANEL, right + below, k % PANEL)
            _fetch_stage(rows, columns, ring, full, empty, step, *coordinates, True, True, STAGES)
            step += 1
        for k in range(first, second, BK):
            coordinates = (left + k // PANEL * m, k % PANEL, right_columns + k, 0)
            _fetch_stage(rows, columns, ring, full, empty, step, *coordinates, True, False, STAGES)
            step += 1
        for k in range(second, depth, BK):
            coordinates = (left_columns + k, 0, right_columns + k, 0)
            _fetch_stage(rows, columns, ring, full, empty, step, *coordinates, False, False, STAGES)
            step += 1
        if addend >= 0:
            group = turn % 2
            mbarrier.wait(free.index(group), (turn // 2 & 1) ^ 1)
            mbarrier.expect(added.index(group), squares.block_type.nbytes)
            tma.async_copy_global_to_shared(squares, [addend, 0], added.index(group), tiles.index(group))
        turn += 1
        number += gl.num_programs(0)


@gluon.jit
def _multiply(
    descriptors, table, factors, total, shared, GROUP: gl.constexpr, STAGES: gl.constexpr, FIELDS: gl.constexpr
):
    """Group 0 or 1, which computes every second tile."""
    _, columns, squares, result = descriptors
    ring, tiles, full, empty, added, free, turns, ready = shared
    BK: gl.constexpr = columns.block_shape[0]
    PANEL: gl.constexpr = columns.block_shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PANEL, 16])
    buffer = tiles.index(GROUP)
    step = 0
    number = gl.program_id(0)
    if GROUP == 1:
        if number < total:
            step += gl.load(table + number * FIELDS + 5) // BK
        number += gl.num_programs(0)
    addends = 0
    count = 0
    while number < total:
        tile = table + number * FIELDS
        depth = gl.load(tile + 5)
        first = gl.load(tile + 6)
        second = gl.load(tile + 7)
        addend = gl.load(tile + 8)
        kind = gl.load(tile + 11)
        is_diagonal = gl.load(tile + 14)
        alpha = gl.load(factors + number * 4)
        beta = gl.load(factors + number * 4 + 1)
        gamma = gl.load(factors + number * 4 + 2)
        number += gl.num_programs(0)
        stages_of_the_other = 0
        if number < total:
            stages_of_the_other = gl.load(table + number * FIELDS + 5) // BK
        number += gl.num_programs(0)

        acc = gl.zeros((PANEL, PANEL), gl.float32, layout)
        # A stage's barrier tells two fillings apart, not three: the other group must have seen those before its own.
        mbarrier.wait(turns.index(GROUP), (count & 1) ^ (1 - GROUP))
        count += 1
        # A product is started before the one ahead of it is done, whose stage is given back then.
        for k in range(0, first, BK):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            left = ring[0].index(slot)
            right = ring[1].index(slot).permute((1, 0))
            acc = warpgroup_mma(left, right, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        for k in range(first, second, BK):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            left = ring[0].index(slot)
            right = ring[1].index(slot)._reinterpret(columns.dtype, [BK, PANEL], columns.layout)
            acc = warpgroup_mma(left, right, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        for k in range(second, depth, BK):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            left = ring[0].index(slot)._reinterpret(columns.dtype, [BK, PANEL], columns.layout).permute((1, 0))
            right = ring[1].index(slot)._reinterpret(columns.dtype, [BK, PANEL], columns.layout)
            acc = warpgroup_mma(left, right, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        mbarrier.arrive(turns.index(1 - GROUP))
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += stages_of_the_other

        if addend >= 0:
            mbarrier.wait(added.index(GROUP), addends & 1)
            addends += 1
            acc = alpha * acc + beta * buffer.load(layout).to(gl.float32)
            if is_diagonal > 0:
                i = gl.arange(0, PANEL, gl.SliceLayout(1, layout))
                j = gl.arange(0, PANEL, gl.SliceLayout(0, layout))
                acc += gl.where(i[:, None] == j[None, :], gamma, 0.0)
        else:
            mbarrier.wait(free.index(GROUP), count & 1)
        if kind >= 2:
            last = buffer._reinterpret(result.dtype, [PANEL, PANEL], result.layout)
            if kind == 2:
                last.store(acc.to(result.dtype))
            else:
                last.permute((1, 0)).store(acc.to(result.dtype))
        else:
            block = acc.to(squares.dtype)
            if kind == 1:
                buffer.store(block)
                i = gl.arange(0, PANEL, gl.SliceLayout(1, layout))
                j = gl.arange(0, PANEL, gl.SliceLayout(0, layout))
                block = gl.where(i[:, None] >= j[None, :], block, buffer.permute((1, 0)).load(layout))
            buffer.store(block)
        fence_async_shared()
        _barrier()
        mbarrier.arrive(ready.index(GROUP))


@gluon.jit
def _store(descriptors, table, done, total, shared, GROUP: gl.constexpr, FIELDS: gl.constexpr):
    """The warp that stores the tiles of a group, and counts each after all of it has arrived in memory."""
    _, _, squares, result = descriptors
    _, tiles, _, _, _, free, _, ready = shared
    buffer = tiles.index(GROUP)
    number = gl.program_id(0) + GROUP * gl.num_programs(0)
    count = 0
    while number < total:
        tile = table + number * FIELDS
        row = gl.load(tile + 9)
        column = gl.load(tile + 10)
        kind = gl.load(tile + 11)
        matrix = gl.load(tile + 12)
        mbarrier.wait(ready.index(GROUP), count & 1)
        if kind >= 2:
            last = buffer._reinterpret(result.dtype, result.block_shape, result.layout)
            tma.async_copy_shared_to_global(result, [row, column], last)
            tma.store_wait(0)
        else:
            tma.async_copy_shared_to_global(squares, [row, 0], buffer)
            # tma.store_wait returns once shared memory is read; a counted tile must be in memory.
            gl.inline_asm_elementwise(
                "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
            _barrier()
            gl.atomic_add(done + matrix, 1, sem="release", scope="gpu")
        mbarrier.arrive(free.index(GROUP))
        count += 1
        number += 2 * gl.num_programs(0)


@launched
@gluon.jit(do_not_specialize=["total"])
def _chained(
    rows,  # [PANEL, BK] of the arena
    columns,  # [BK, PANEL] of the arena
    squares,  # [PANEL, PANEL] of the arena
    result,  # [PANEL, PANEL] of the result
    table,
    factors,
    done,
    total,
    STAGES: gl.constexpr,
    FIELDS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    PANEL: gl.constexpr = rows.block_shape[0]
    BK: gl.constexpr = rows.block_shape[1]
    left = gl.allocate_shared_memory(rows.dtype, [STAGES, PANEL, BK], rows.layout)
    right = gl.allocate_shared_memory(rows.dtype, [STAGES, PANEL, BK], rows.layout)
    tiles = gl.allocate_shared_memory(squares.dtype, [2, PANEL, PANEL], squares.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # the addend of a tile has arrived
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # a tile is stored
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # a tile may be stored
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # a group may multiply
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
        mbarrier.init(ready.index(group), count=1)
        mbarrier.init(added.index(group), count=1)
        mbarrier.init(free.index(group), count=1)
    fence_async_shared()
    descriptors = (rows, columns, squares, result)
    shared = ((left, right), tiles, full, empty, added, free, turns, ready)
    gl.warp_specialize(
        [
            (_multiply, (descriptors, table, factors, total, shared, 0, STAGES, FIELDS)),
            (_multiply, (descriptors, table, factors, total, shared, 1, STAGES, FIELDS)),
            (_fetch, (descriptors, table, done, total, shared, STAGES, FIELDS)),
            (_store, (descriptors, table, done, total, shared, 0, FIELDS)),
            (_store, (descriptors, table, done, total, shared, 1, FIELDS)),
        ],
        [4, 1, 1, 1],
        REGISTERS,
    )


def run_chained(plan: Plan, arena: Tensor, result: Tensor, block_k: int, stages: int) -> None:
    """All products of a chained `plan` in `arena` fp16 [arena_rows, panel]; `result` is of 16 bits."""
    panel = arena.size(1)
    blocks = {
        "rows": (arena, panel, block_k), "columns": (arena, block_k, panel),
        "squares": (arena, panel, panel), "result": (result, panel, panel),
    }  # fmt: skip
    descriptors = {
        name: TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, gl.float16))
        for name, (tensor, *block) in blocks.items()
    }
    done = torch.zeros(len(plan.starts), dtype=torch.int32, device=arena.device)
    _chained[(min(multiprocessors(arena.device), len(plan.tiles)),)](
        **descriptors, table=plan.tiles, factors=plan.factors, done=done, total=len(plan.tiles),
        STAGES=stages, FIELDS=CHAIN_FIELDS, REGISTERS=REGISTERS, num_warps=4, launch_cooperative_grid=True,
    )  # fmt: skip
