"""Products on Hopper whose tiles need finishing: two groups of warps take turns, a third loads.

A program is nine warps. One loads steps of both operands into a ring in shared memory. Two groups of four multiply a
whole tile [BLOCK, BLOCK] each, by turns: while one multiplies, the other finishes its tile. The ring holds the steps of
tile 0, 1, 2, ... of the program, of which the even ones are the first group's. `turn` keeps the order: a group looks at
the ring only once the other has seen all steps of its own tile, for a barrier tells one round of the ring from the
next, not from the one after that.

Gluon, for Triton has no way to say which warps do what; it has no interpreter. Operands of 16 bits, sums in fp32 over
steps of DEPTH.
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

from .dispatch import is_hopper

BLOCK = gl.constexpr(128)
DEPTH = gl.constexpr(64)
STAGES = gl.constexpr(5)
"""Of the ring: 160 KiB, beside a tile of 16 bits for each group. They hide latency: with 4, a tenth longer."""

GROUP_REGISTERS = gl.constexpr(240)
"""A thread's, of the second group; the first gets as many as are left of 168 for each of 384 threads."""
LOAD_REGISTERS = gl.constexpr(24)

SWIZZLED, SWIZZLED_3D, SWIZZLED_4D = (gl.NVMMASharedLayout(128, element_bitwidth=16, rank=rank) for rank in (2, 3, 4))
NARROW, NARROW_3D = (gl.NVMMASharedLayout(32, element_bitwidth=16, rank=rank) for rank in (2, 3))
"""Of rows of 16 numbers."""
HALVED, HALVED_3D = (gl.NVMMASharedLayout(64, element_bitwidth=16, rank=rank) for rank in (2, 3))
"""Of rows of 32."""
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK.value, 16]))
ROW = gl.constexpr(gl.SliceLayout(1, ACC.value))


@gluon.jit
def make_barriers(STAGES: gl.constexpr):
    """Barriers that say a stage is loaded or empty, and the groups' turns."""
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turn.index(group), count=1)
    return loaded, empty, turn


@gluon.jit
def make_ring(dtype: gl.constexpr, weight_shape: gl.constexpr):
    """The operands of STAGES steps, and :func:`make_barriers`."""
    inputs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    weights = gl.allocate_shared_memory(dtype, [STAGES] + weight_shape, SWIZZLED)
    loaded, empty, turn = make_barriers(STAGES)
    return inputs, weights, loaded, empty, turn


@gluon.jit
def empty_stage(empty, step, STAGES: gl.constexpr):
    """The stage that step `step` of the program is loaded into, once it is empty."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
    return stage


@gluon.jit
def load_step(x_desc, w_desc, x_place, w_place, inputs, weights, loaded, empty, step):
    """Step `step` of the program into the ring, once its stage is empty."""
    stage = empty_stage(empty, step, STAGES)
    mbarrier.expect(loaded.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(x_desc, x_place, loaded.index(stage), inputs.index(stage))
    tma.async_copy_global_to_shared(w_desc, w_place, loaded.index(stage), weights.index(stage))


@gluon.jit
def await_turn(turn, count, GROUP: gl.constexpr):
    """Returns when all steps of the tile before `count` were multiplied, or are about to be."""
    mbarrier.wait(turn.index(GROUP), (count // 2 + 1 - GROUP) % 2)


@gluon.jit
def multiply_tile(
    inputs, weights, loaded, empty, turn, count,
    GROUP: gl.constexpr, STEPS: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """The program's tile `count`, of group `GROUP`: x W^T of W [N, K], or x W of W [K, N] where it is TRANSPOSED."""
    await_turn(turn, count, GROUP)
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, ACC)
    (acc,) = multiply_steps(inputs, (weights,), (acc,), loaded, empty, turn, count, GROUP, STEPS, STAGES, TRANSPOSED)
    return acc


@gluon.jit
def multiply_steps(
    inputs, weights, accs, loaded, empty, turn, count,
    GROUP: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr = False,
    BEGIN: gl.constexpr = 0, END: gl.constexpr = None,
):  # fmt: skip
    """`accs` of tile `count`, each plus x W^T, or x W, of the one of `weights` at its place; in the group's turn.

    With END, of the tile's STEPS only those from BEGIN to END; the turn ends with the last one.
    """
    COUNT: gl.constexpr = len(accs)
    LAST: gl.constexpr = STEPS if END is None else END
    step = count * STEPS + BEGIN
    for k in range(LAST - BEGIN):
        stage = step % STAGES
        mbarrier.wait(loaded.index(stage), step // STAGES % 2)
        sums = ()
        for i in gl.static_range(COUNT):
            weight = weights[i].index(stage)
            if not TRANSPOSED:
                weight = weight.permute((1, 0))
            sums = sums + (warpgroup_mma(inputs.index(stage), weight, accs[i], is_async=True),)
        accs = multiplied(COUNT, sums)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    if LAST == STEPS:
        mbarrier.arrive(turn.index(1 - GROUP))
    accs = multiplied(0, accs)
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return accs


@gluon.jit
def multiplied(outstanding: gl.constexpr, sums):
    """`sums` as a tuple, once no more than `outstanding` products are."""
    done = warpgroup_mma_wait(outstanding, deps=sums)
    if len(sums) == 1:
        done = (done,)
    return done


@gluon.jit
def halves_of(tile):
    """Of its columns."""
    return gl.split(gl.permute(gl.reshape(tile, [BLOCK, 2, tile.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def put_piece(piece, place):
    """Rounds some columns of a tile into their place, once what was there before has left."""
    tma.store_wait(0)
    place.store(piece.to(place.dtype).reshape(place.shape))
    fence_async_shared()


@gluon.jit
def store_piece(out_desc, b, s, n, piece, place):
    """Has some columns of a tile stored; the copy engine leaves out what is not there."""
    put_piece(piece, place)
    tma.async_copy_shared_to_global(out_desc, [b, s, n], place)


def runs_on(x: Tensor) -> bool:
    """Whether x is of 16 bits and on Hopper."""
    return x.is_cuda and x.dtype != torch.float32 and is_hopper(x.device)


def swizzled(tensor: Tensor, *block: int) -> TensorDescriptor:
    """How the copy engine moves blocks of `tensor` to and from shared memory that is swizzled.

    Rows of a block have 16 or 32 numbers, in two or three dimensions, or a multiple of 64.
    """
    narrow = {16: (NARROW, NARROW_3D), 32: (HALVED, HALVED_3D)}
    layouts = narrow.get(block[-1], (SWIZZLED, SWIZZLED_3D, SWIZZLED_4D))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layouts[len(block) - 2])
