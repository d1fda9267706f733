"""Many rows on Hopper: out = x W^T (+ bias) and dx = dout W, weights unpacked beside the products they go into.

    out [M, F] = x [M, C] W_hat^T, C = K, F = N           dx [M, F] = dout [M, C] W_hat, C = N, F = K

A program is twelve warps that take one block [128 F, BLOCK_M] after another. Eight multiply: the weight is the A
operand of wgmma and x the B operand, both in shared memory. Four unpack: 128 x 128 codes (a load) arrive by TMA as
words, become two steps of 64 along C in shared memory and are written nowhere else. STAGES steps are under way, so that
unpacking, loading x and multiplying overlap. Each block unpacks its weights anew: 28 instructions for 16 codes, 44
where they are scaled, serve BLOCK_M rows.

Gluon, for Triton has no way to say which warps do what; it has no interpreter. bf16 or fp16, sums in fp32; one scale a
row, applied to the sum forward and to the codes backward; F and C multiples of 8.
"""

import torch
import triton.language as tl
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

from ..dispatch import cdiv, multiprocessors
from ..launch import launched
from .layout import tile_grid
from .unpack import TILES, block_of, following, items_of_this_program, unpack

BLOCK_F = tl.constexpr(128)
DEPTH = tl.constexpr(64)
"""Of a step, along C."""

UNPACK_REGISTERS = tl.constexpr(128)
"""A thread's, of 168 that each of 384 may have; the others' eight warps get 184 each: 128 hold a block's sums."""

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
WORDS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)


@gluon.jit
def slices(acc, WIDTH: gl.constexpr):
    """[128, M] -> tuple of [128, WIDTH], in order; nothing moves between lanes."""
    M: gl.constexpr = acc.shape[1]
    parts = (acc,)
    if M > WIDTH:
        first, second = gl.split(gl.permute(gl.reshape(acc, [BLOCK_F, 2, M // 2]), [0, 2, 1]))
        parts = slices(first, WIDTH) + slices(second, WIDTH)
    return parts


@gluon.jit
def multiply(
    x_desc, out_desc, parts_ptr, scale_ptr, bias_ptr, inputs, weights, output, loaded, unpacked, empty,
    M, F, blocks_f, blocks_m, steps,
    BACKWARD: gl.constexpr, BIAS: gl.constexpr, SPLIT: gl.constexpr, GROUP_M: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, SLICE: gl.constexpr,
):  # fmt: skip
    """The eight warps that load x, multiply and store. A product is in flight while the one before it is waited for."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, SLICE, 16])
    items = blocks_f * blocks_m * SPLIT
    total = items_of_this_program(items) * steps
    x_item = gl.program_id(0)
    x_step = 0
    _, x_m, x_share = block_of(x_item, blocks_f, blocks_m, SPLIT, GROUP_M)
    for early in gl.static_range(STAGES - 1):
        mbarrier.expect(loaded.index(early), x_desc.block_type.nbytes, pred=early < total)
        place = [x_m * BLOCK_M, (x_share * steps + x_step) * DEPTH]
        tma.async_copy_global_to_shared(x_desc, place, loaded.index(early), inputs.index(early), pred=early < total)
        x_item, x_step = following(x_item, x_step, steps)
        _, x_m, x_share = block_of(x_item, blocks_f, blocks_m, SPLIT, GROUP_M)
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        f, m, share = block_of(item, blocks_f, blocks_m, SPLIT, GROUP_M)
        acc = gl.zeros([BLOCK_F, BLOCK_M], gl.float32, ACC)
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(loaded.index(stage), step // STAGES % 2)
            mbarrier.wait(unpacked.index(stage), step // STAGES % 2)
            weight = weights.index(stage)
            if BACKWARD:
                weight = weight.permute((1, 0))
            acc = warpgroup_mma(weight, inputs.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            free = (step + STAGES - 1) % STAGES
            mbarrier.arrive(empty.index(free), pred=k > 0)
            more = step + STAGES - 1 < total
            mbarrier.expect(loaded.index(free), x_desc.block_type.nbytes, pred=more)
            place = [x_m * BLOCK_M, (x_share * steps + x_step) * DEPTH]
            tma.async_copy_global_to_shared(x_desc, place, loaded.index(free), inputs.index(free), pred=more)
            x_item, x_step = following(x_item, x_step, steps)
            if x_step == 0:
                _, x_m, x_share = block_of(x_item, blocks_f, blocks_m, SPLIT, GROUP_M)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        n = f * BLOCK_F + gl.arange(0, BLOCK_F, gl.SliceLayout(1, ACC))
        if not BACKWARD:
            acc *= gl.load(scale_ptr + n, mask=n < F, other=0.0).to(gl.float32)[:, None]
        if BIAS:
            acc += gl.load(bias_ptr + n, mask=n < F, other=0.0).to(gl.float32)[:, None]
        parts = slices(acc, SLICE)
        for i in gl.static_range(BLOCK_M // SLICE):
            first = m * BLOCK_M + i * SLICE
            if SPLIT > 1:
                row = first + gl.arange(0, SLICE, gl.SliceLayout(0, PART))
                column = f * BLOCK_F + gl.arange(0, BLOCK_F, gl.SliceLayout(1, PART))
                offsets = ((share * M + row) * F)[None, :] + column[:, None]
                part = gl.convert_layout(parts[i], PART, assert_trivial=True)
                gl.store(parts_ptr + offsets, part, mask=(row < M)[None, :] & (column < F)[:, None])
            else:
                tma.store_wait(0)
                output.permute((1, 0)).store(parts[i].to(output.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(out_desc, [first, f * BLOCK_F], output)
    tma.store_wait(0)


@launched
@gluon.jit(do_not_specialize=["M", "blocks_f", "blocks_m", "loads"])
def wide_product(
    x_desc,  # [M, C], blocks [BLOCK_M, 64]
    words_desc,  # int32 [tile rows, 384 whole tile columns], blocks [8, 128]
    shared_desc,  # int32 [tiles of a last column of 64 inputs, 384], blocks [8, 128]; None without one
    scale_desc,  # fp16 [1, N], blocks [1, 128]
    out_desc,  # [M, F], blocks [SLICE, 128]
    parts_ptr,  # fp32 [SPLIT, M, F]
    scale_ptr,
    bias_ptr,
    M,
    F,
    blocks_f,
    blocks_m,
    loads,  # of an item
    BACKWARD: gl.constexpr,
    BIAS: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    SLICE: gl.constexpr,
):
    """With SPLIT > 1 the products' shares of C go to `parts`, to be added by `add_parts`, else the product to `out`."""
    dtype: gl.constexpr = x_desc.dtype
    weight_shape: gl.constexpr = [DEPTH, BLOCK_F] if BACKWARD else [BLOCK_F, DEPTH]
    weights = gl.allocate_shared_memory(dtype, [STAGES] + weight_shape, SWIZZLED)
    inputs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, DEPTH], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [3 * SLOTS, TILES, 128], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.float16, [SLOTS, 1, 128], scale_desc.layout)
    output = gl.allocate_shared_memory(dtype, [SLICE, BLOCK_F], out_desc.layout)
    fetched = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    unpacked = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(fetched.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(unpacked.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (multiply, (
                x_desc, out_desc, parts_ptr, scale_ptr, bias_ptr, inputs, weights, output, loaded, unpacked, empty,
                M, F, blocks_f, blocks_m, 2 * loads,
                BACKWARD, BIAS, SPLIT, GROUP_M, BLOCK_M, STAGES, SLICE,
            )),
            (unpack, (
                words_desc, shared_desc, scale_desc, words, scales, fetched, weights, unpacked, empty,
                blocks_f, blocks_m, loads, BACKWARD, SPLIT, GROUP_M, STAGES, SLOTS,
            )),
        ],
        [4],
        [UNPACK_REGISTERS],
    )  # fmt: skip


def _words(tiles: Tensor, columns: int) -> TensorDescriptor:
    """Descriptor of the tiles of so many columns."""
    shape = [len(tiles) // columns, columns * 384]
    return TensorDescriptor(tiles, shape, [shape[1], 1], [TILES.value, 128], WORDS)


def wide(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    backward: bool,
    split: int,
    block_m: int,
    stages: int,
) -> tuple[Tensor, Tensor | None]:
    """x [M, K] -> out [M, N], or dout [M, N] -> dx [M, K]; with split > 1 the fp32 parts [split, M, F] beside it.

    Then out is empty and the bias is not in it: both are the business of who adds the parts.
    """
    M, C = x.shape
    F = shape[1] if backward else shape[0]
    tile_rows, tile_columns, has_half = tile_grid(*shape)
    whole = tile_rows * (tile_columns - has_half)
    loads = cdiv(tile_rows, TILES.value) if backward else tile_columns
    out = x.new_empty(M, F)
    parts = x.new_empty(split, M, F, dtype=torch.float32) if split > 1 else None
    blocks_f, blocks_m = cdiv(F, BLOCK_F.value), cdiv(M, block_m)
    slice_m = min(32, block_m)
    shared = _words(packed[whole:], 1) if has_half else None
    wide_product[(min(multiprocessors(x.device), blocks_f * blocks_m * split),)](
        x_desc=TensorDescriptor(x, [M, C], [C, 1], [block_m, DEPTH.value], SWIZZLED),
        words_desc=_words(packed[:whole], tile_columns - has_half) if whole else shared,
        shared_desc=shared,
        scale_desc=TensorDescriptor(scale, [1, shape[0]], [shape[0], 1], [1, 128], SCALES),
        out_desc=TensorDescriptor(out, [M, F], [F, 1], [slice_m, BLOCK_F.value], SWIZZLED),
        parts_ptr=scale if parts is None else parts, scale_ptr=scale, bias_ptr=scale if bias is None else bias,
        M=M, F=F, blocks_f=blocks_f, blocks_m=blocks_m, loads=loads // split,
        BACKWARD=backward, BIAS=bias is not None and split == 1, SPLIT=split, GROUP_M=8, BLOCK_M=block_m,
        STAGES=stages, SLOTS=2, SLICE=slice_m, num_warps=8, maxnreg=168,
    )  # fmt: skip
    return out, parts
