"""The product that ends in a slope, on Hopper, by groups of warps that take turns (:mod:`klora.kernels.pingpong`).

    out [M, N] = x [M, K] W [K, N] * slope          slope = 2 relu(u), from `kept` [M, N]: relu(u)^2, or u

The tile of `kept` is loaded beside the operands, into the place that the finished tile leaves from, so that neither the
wait for it nor the store is seen. bf16 or fp16; the sums are :mod:`product`'s, and so are the bits. 2 M N K FLOPs;
`kept` is read and out written once.

NVIDIA H200, 98304 x 512 x 1536 (ms): 0.281; product's, two programs a multiprocessor, 0.348; cuBLAS without the slope
0.226. `kept` asked for at the tile's first, middle or last step: 0.284, 0.281, 0.282. Without a slope this way loses to
product's: 0.220 for 0.208 (1536 -> 512), 0.264 for 0.247 (the square of relu).
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..pingpong import (
    ACC,
    BLOCK,
    DEPTH,
    GROUP_REGISTERS,
    LOAD_REGISTERS,
    SWIZZLED,
    load_step,
    make_ring,
    multiply_tile,
    runs_on,
    tiled,
)
from ..tile import multiprocessors


@gluon.jit
def _finish_tiles(
    out_desc, inputs, weights, kepts, loaded, empty, turn, kept_loaded, kept_empty, tiles,
    GROUP: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr, IS_U: gl.constexpr,
):  # fmt: skip
    count = GROUP
    kept = kepts.index(GROUP)
    for tile in range(gl.program_id(0) + GROUP * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        acc = multiply_tile(inputs, weights, loaded, empty, turn, count, GROUP, STEPS, True)
        mbarrier.wait(kept_loaded.index(GROUP), count // 2 % 2)
        relu = kept.load(ACC).to(gl.float32)
        relu = gl.where(relu <= 0.0, 0.0, relu) if IS_U else gl.sqrt(relu)
        kept.store(gl.where(relu == 0.0, 0.0, 2.0 * relu * acc).to(kept.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [tile // ACROSS * BLOCK, tile % ACROSS * BLOCK], kept)
        tma.store_wait(0)
        mbarrier.arrive(kept_empty.index(GROUP))
        count += 2


@gluon.jit
def _first_group(
    out_desc, inputs, weights, kepts, loaded, empty, turn, kept_loaded, kept_empty, tiles,
    ACROSS: gl.constexpr, STEPS: gl.constexpr, IS_U: gl.constexpr,
):  # fmt: skip
    _finish_tiles(
        out_desc, inputs, weights, kepts, loaded, empty, turn, kept_loaded, kept_empty, tiles, 0, ACROSS, STEPS, IS_U
    )


@gluon.jit
def _second_group(
    out_desc, inputs, weights, kepts, loaded, empty, turn, kept_loaded, kept_empty, tiles,
    ACROSS: gl.constexpr, STEPS: gl.constexpr, IS_U: gl.constexpr,
):  # fmt: skip
    _finish_tiles(
        out_desc, inputs, weights, kepts, loaded, empty, turn, kept_loaded, kept_empty, tiles, 1, ACROSS, STEPS, IS_U
    )


@gluon.jit
def _load(
    x_desc, w_desc, kept_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, tiles,
    ACROSS: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    step = 0
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n, group = tile // ACROSS * BLOCK, tile % ACROSS * BLOCK, count % 2
        for k in range(STEPS):
            load_step(x_desc, w_desc, [m, k * DEPTH], [k * DEPTH, n], inputs, weights, loaded, empty, step)
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
    inputs, weights, loaded, empty, turn = make_ring(x_desc.dtype, [DEPTH, BLOCK])
    kepts = gl.allocate_shared_memory(x_desc.dtype, [2, BLOCK, BLOCK], SWIZZLED)
    kept_loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kept_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(kept_loaded.index(group), count=1)
        mbarrier.init(kept_empty.index(group), count=1)
    gl.warp_specialize(
        [
            (_first_group, (
                out_desc, inputs, weights, kepts, loaded, empty, turn, kept_loaded, kept_empty, tiles,
                ACROSS, STEPS, IS_U,
            )),
            (_second_group, (
                out_desc, inputs, weights, kepts, loaded, empty, turn, kept_loaded, kept_empty, tiles,
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
    return runs_on(x) and _tiles(x.size(0), outputs) >= 8 * multiprocessors(x.device)


def launch_slope(x: Tensor, weight: Tensor, kept: Tensor, out: Tensor) -> None:
    """out [M, N] = x [M, K] weight [K, N] times 2 relu(u); `kept` [M, N] is relu(u)^2, in fp16 u.

    All of one 16-bit dtype and reached by the copy engine: rows at multiples of 16 bytes.
    """
    (rows, inputs), outputs, block, depth = x.shape, out.size(1), BLOCK.value, DEPTH.value
    tiles = _tiles(rows, outputs)
    _slope_product[(min(multiprocessors(x.device), tiles),)](
        tiled(x, block, depth), tiled(weight, depth, block), tiled(kept, block, block), tiled(out, block, block),
        tiles, ACROSS=triton.cdiv(outputs, block), STEPS=triton.cdiv(inputs, depth), IS_U=x.dtype == torch.float16,
        num_warps=4, maxnreg=168,
    )  # fmt: skip


def _tiles(rows: int, outputs: int) -> int:
    return triton.cdiv(rows, BLOCK.value) * triton.cdiv(outputs, BLOCK.value)
