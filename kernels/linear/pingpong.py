"""The product that ends in a slope, on Hopper: two groups of warps take turns.

    out [M, N] = x [M, K] W [K, N] * slope          slope = 2 relu(u), from `kept` [M, N]: relu(u)^2, or u

A program is nine warps that walk tiles [BLOCK, BLOCK] of the output. One loads steps of x and W into a ring that both
groups share, and the tile of `kept` beside them. Two groups of four multiply a whole tile each, by turns: while one
multiplies, the other finishes its tile, so that neither the wait for `kept` nor the store is seen. `turn` keeps the
order: a group looks at the ring only once the other has seen all of its own steps, for a barrier tells one round from
the next, not from the one after that.

Gluon, for Triton has no way to say which warps do what; it has no interpreter. bf16 or fp16, sums in fp32 over K in
steps of DEPTH, as :mod:`product`'s: the same bits. Bytes: x and W from the L2 cache for each tile; `kept` read and out
written once. 2 M N K FLOPs.

NVIDIA H200, 98304 x 512 x 1536 (ms): 0.281; product's, two programs a multiprocessor, 0.348; cuBLAS without the slope
0.226. `kept` asked for at the tile's first, middle or last step: 0.284, 0.281, 0.282. Without a slope this way loses to
product's: 0.220 for 0.208 (1536 -> 512), 0.264 for 0.247 (the square of relu).
"""

import torch
import triton
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

from ..tile import is_hopper, multiprocessors

BLOCK = gl.constexpr(128)
DEPTH = gl.constexpr(64)
STAGES = gl.constexpr(4)
GROUP_REGISTERS = gl.constexpr(232)
"""A thread's, of the second group; the first gets as many as are left of 168 for each of 384 threads."""
LOAD_REGISTERS = gl.constexpr(40)

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def _multiply(
    out_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, turn, tiles,
    GROUP: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr, IS_U: gl.constexpr,
):  # fmt: skip
    """Every other tile of the program. The slopes' place in shared memory takes what leaves."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    count = GROUP
    kept = kepts.index(GROUP)
    for tile in range(gl.program_id(0) + GROUP * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        mbarrier.wait(turn.index(GROUP), (count // 2 + 1 - GROUP) % 2)
        acc = gl.zeros([BLOCK, BLOCK], gl.float32, ACC)
        step = count * STEPS
        for k in range(STEPS):
            stage = step % STAGES
            mbarrier.wait(loaded.index(stage), step // STAGES % 2)
            acc = warpgroup_mma(inputs.index(stage), weights.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - GROUP))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        mbarrier.wait(kept_loaded.index(GROUP), count // 2 % 2)
        relu = kept.load(ACC).to(gl.float32)
        relu = gl.where(relu <= 0.0, 0.0, relu) if IS_U else gl.sqrt(relu)
        acc = gl.where(relu == 0.0, 0.0, 2.0 * relu * acc)
        kept.store(acc.to(kept.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [tile // ACROSS * BLOCK, tile % ACROSS * BLOCK], kept)
        tma.store_wait(0)
        mbarrier.arrive(kept_empty.index(GROUP))
        count += 2


@gluon.jit
def _multiply_first(
    out_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, turn, tiles,
    ACROSS: gl.constexpr, STEPS: gl.constexpr, IS_U: gl.constexpr,
):  # fmt: skip
    _multiply(
        out_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, turn, tiles, 0, ACROSS, STEPS, IS_U
    )


@gluon.jit
def _multiply_second(
    out_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, turn, tiles,
    ACROSS: gl.constexpr, STEPS: gl.constexpr, IS_U: gl.constexpr,
):  # fmt: skip
    _multiply(
        out_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, turn, tiles, 1, ACROSS, STEPS, IS_U
    )


@gluon.jit
def _load(
    x_desc, w_desc, kept_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, tiles,
    ACROSS: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """The warp that loads: as far ahead as the ring is long, through all tiles of the program."""
    step = 0
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n, group = tile // ACROSS * BLOCK, tile % ACROSS * BLOCK, count % 2
        for k in range(STEPS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
            mbarrier.expect(loaded.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [m, k * DEPTH], loaded.index(stage), inputs.index(stage))
            tma.async_copy_global_to_shared(w_desc, [k * DEPTH, n], loaded.index(stage), weights.index(stage))
            if k == STEPS // 2:
                mbarrier.wait(kept_empty.index(group), (count // 2 + 1) % 2)
                mbarrier.expect(kept_loaded.index(group), kept_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(kept_desc, [m, n], kept_loaded.index(group), kepts.index(group))
            step += 1
        count += 1  # noqa: SIM113 (Gluon has no enumerate)


@gluon.jit(do_not_specialize=["tiles"])
def _slope_product(
    x_desc,  # [M, K], blocks [BLOCK, DEPTH]
    w_desc,  # [K, N], blocks [DEPTH, BLOCK]
    kept_desc,  # [M, N], blocks [BLOCK, BLOCK]
    out_desc,
    tiles,
    ACROSS: gl.constexpr,
    STEPS: gl.constexpr,
    IS_U: gl.constexpr,
):
    inputs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK, DEPTH], SWIZZLED)
    weights = gl.allocate_shared_memory(x_desc.dtype, [STAGES, DEPTH, BLOCK], SWIZZLED)
    kepts = gl.allocate_shared_memory(x_desc.dtype, [2, BLOCK, BLOCK], SWIZZLED)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kept_loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kept_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(kept_loaded.index(group), count=1)
        mbarrier.init(kept_empty.index(group), count=1)
        mbarrier.init(turn.index(group), count=1)
    gl.warp_specialize(
        [
            (_multiply_first, (
                out_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, turn, tiles,
                ACROSS, STEPS, IS_U,
            )),
            (_multiply_second, (
                out_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, turn, tiles,
                ACROSS, STEPS, IS_U,
            )),
            (_load, (
                x_desc, w_desc, kept_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, tiles,
                ACROSS, STEPS,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def takes(x: Tensor, outputs: int) -> bool:
    """Whether a product of rows [M, K] pays here: 16 bits, on Hopper, and some tiles for each group to take turns."""
    if x.dtype == torch.float32 or not x.is_cuda or not is_hopper(x.device):
        return False
    return _tiles(x.size(0), outputs) >= 8 * multiprocessors(x.device)


def launch_slope(x: Tensor, weight: Tensor, kept: Tensor, out: Tensor) -> None:
    """out [M, N] = x [M, K] weight [K, N] times 2 relu(u); `kept` [M, N] is relu(u)^2, in fp16 u.

    All of one 16-bit dtype and reached by the copy engine: rows at multiples of 16 bytes.
    """
    (rows, inputs), outputs, block, depth = x.shape, out.size(1), BLOCK.value, DEPTH.value
    tiles = _tiles(rows, outputs)
    _slope_product[(min(multiprocessors(x.device), tiles),)](
        _tiled(x, block, depth), _tiled(weight, depth, block), _tiled(kept, block, block), _tiled(out, block, block),
        tiles, ACROSS=triton.cdiv(outputs, block), STEPS=triton.cdiv(inputs, depth), IS_U=x.dtype == torch.float16,
        num_warps=4, maxnreg=168,
    )  # fmt: skip


def _tiles(rows: int, outputs: int) -> int:
    return triton.cdiv(rows, BLOCK.value) * triton.cdiv(outputs, BLOCK.value)


def _tiled(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), SWIZZLED)
