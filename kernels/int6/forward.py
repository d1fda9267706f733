"""out = x W^T (+ bias) for few rows (`warp_forward`) and for more (`tile_forward`), weights unpacked in registers."""

import triton
import triton.language as tl

from ..launch import launched
from .tile import (
    code_pairs,
    code_tile,
    four,
    inputs_before,
    lane_product,
    load_scales,
    load_triples,
    over_warps,
    own_half,
    shared_tile,
    tile_words,
)


@triton.jit
def from_first(column, columns, shared, HALF: tl.constexpr):
    """Words from a tile row's first tile to that in `column`; `shared`: to that with its last 64 inputs."""
    return tl.where(column < columns, column * 384, shared) if HALF else column * 384


@launched
@triton.jit(do_not_specialize=["M", "tile_columns"])
def warp_forward(
    x_ptr,  # [M, K] as int32 pairs
    packed_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    tile_columns,
    groups,
    dtype: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    LOG_WARPS: tl.constexpr,
):
    """M <= 8. A program has one tile row; its warps take the tile columns in turn, and their sums are added.

    Every row of x is a column of its own in the products, and a warp's share is the same for any M: a row's bits do not
    depend on the batch around it. The words of the next tile are on their way while one is multiplied.
    """
    WARPS: tl.constexpr = 1 << LOG_WARPS
    THREADS: tl.constexpr = 32 * WARPS
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    g = lane // 4
    t = lane % 4
    column = (thread // 32)[:, None]
    word = tl.arange(0, 4)[None, :]
    columns = tile_columns - 1 if HALF else tile_columns
    first = tl.program_id(0).to(tl.int64) * columns * 384
    shared = shared_tile(tl.program_id(0), tl.num_programs(0), columns) * 384 - first if HALF else 0
    tiles = packed_ptr + first + (lane * 4)[:, None] + word
    rows = x_ptr + (g * (K // 2) + t * 4)[:, None] + word
    zero = tl.zeros([THREADS], tl.float32)
    acc = (zero, zero, zero, zero)
    n0, n1, n2 = tile_words(tiles + from_first(column, columns, shared, HALF), column < tile_columns)
    for _ in range(0, tl.cdiv(tile_columns, WARPS)):
        w0 = four(n0, THREADS)
        w1 = four(n1, THREADS)
        w2 = four(n2, THREADS)
        if HALF:
            before = inputs_before(tl.program_id(0), tl.reshape(column, [THREADS]), columns)
            w0 = own_half(w0, before)
            w1 = own_half(w1, before)
            w2 = own_half(w2, before)
        following = column + WARPS
        n0, n1, n2 = tile_words(tiles + from_first(following, columns, shared, HALF), following < tile_columns)
        part = acc
        for chunk in tl.static_range(4):
            if GROUP != 0 and chunk * 32 % GROUP == 0:
                part = (zero, zero, zero, zero)
            mask = (column * 128 + chunk * 32 + t[:, None] * 8 < K) & (g[:, None] < M)
            x = four(tl.load(rows + (column * 64 + chunk * 16), mask=mask, other=0), THREADS)
            a = code_pairs(w0[chunk], w1[chunk], w2[chunk], dtype)
            part = lane_product(a[0], a[4], a[1], a[5], x[0], x[1], part, dtype)
            part = lane_product(a[2], a[6], a[3], a[7], x[2], x[3], part, dtype)
            if GROUP != 0 and (chunk + 1) * 32 % GROUP == 0:
                group = tl.reshape(column, [THREADS]) * (128 // GROUP) + chunk * 32 // GROUP
                n = tl.program_id(0) * 16 + g
                known = scale_ptr + n.to(tl.int64) * groups + group
                upper = tl.load(known, mask=(n < N) & (group < groups), other=0.0).to(tl.float32)
                lower = tl.load(known + 8 * groups, mask=(n + 8 < N) & (group < groups), other=0.0).to(tl.float32)
                acc = (
                    acc[0] + upper * part[0],
                    acc[1] + upper * part[1],
                    acc[2] + lower * part[2],
                    acc[3] + lower * part[3],
                )
        if GROUP == 0:
            acc = part
        column = following
    owner = tl.arange(0, 32)[:, None]
    place = tl.arange(0, 4)[None, :]
    n = tl.program_id(0) * 16 + place // 2 * 8 + owner // 4
    m = owner % 4 * 2 + place % 2
    out = over_warps(acc, LOG_WARPS)
    if GROUP == 0:
        out *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * N + n, out.to(dtype), mask=(m < M) & (n < N))


@launched
@triton.jit(do_not_specialize=["tile_columns"])
def permute_inputs(x_ptr, out_ptr, K, tile_columns, BLOCK: tl.constexpr):
    """x [M, K] -> [M, 128 tile_columns], each 32 inputs in the order of `code_tile`'s SLOTS, zeros after the last.

    Slot 16q + 8h + 2t + e holds input 8t + 4q + 2h + e.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = slot // 32 * 32 + slot // 2 % 4 * 8 + slot // 16 % 2 * 4 + slot // 8 % 2 * 2 + slot % 2
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
    tl.store(out_ptr + row * tile_columns * 128 + slot, x, mask=slot < tile_columns * 128)


FENCE = tl.constexpr("fence.proxy.async.shared::cta;\n" + "".join(f"mov.b32 ${i}, ${i + 4};\n" for i in range(4)))


@triton.jit
def fenced(words):
    """`words`, and by data dependence a fence between the copies to shared memory before it and the products after it.

    wgmma reads shared memory by another proxy than cp.async writes it, and Triton 3.6 puts no fence between the two.
    """
    return tl.inline_asm_elementwise(FENCE, "=r,=r,=r,=r,r,r,r,r", [words], tl.int32, is_pure=True, pack=4)


@launched
@triton.jit(do_not_specialize=["M", "tile_rows", "tile_columns"])
def tile_forward(
    x_ptr,  # [M, 128 tile_columns] by `permute_inputs`
    packed_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    tile_rows,
    tile_columns,
    groups,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """A program makes [BLOCK_M, 16 R] of out, transposed, over its share of the tile columns.

    The weight is the A operand, unpacked in the registers that wgmma reads it from. With one scale a row the product is
    of bare codes, which are exact, and is scaled in fp32 at the end; group scales go into the weights, rounded to x's
    dtype. With SPLIT > 1 `out_ptr` is fp32 [SPLIT, M, N], added by `add_parts`.
    """
    BLOCK_N: tl.constexpr = 16 * R
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_row = tl.program_id(0) // blocks_m * R
    share = tl.cdiv(tile_columns, SPLIT)
    start = tl.program_id(1) * share
    columns = tile_columns - 1 if HALF else tile_columns
    rows = x_ptr + m.to(tl.int64)[:, None] * (tile_columns * 128) + tl.arange(0, 128)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for column in tl.range(start, tl.minimum(start + share, tile_columns), num_stages=STAGES):
        w0, w1, w2 = load_triples(packed_ptr, tile_row, tile_rows, column, tile_columns, HALF, R)
        before = inputs_before(tile_row, column, columns) if HALF else 0
        live = (m < M)[:, None]
        if HALF:
            live &= (tl.arange(0, 128) >= before)[None, :]
        x = tl.load(rows + (column * 128 - before), mask=live, other=0.0)
        scales = None if GROUP == 0 else load_scales(scale_ptr, tile_row, column, before, N, groups, GROUP, HALF, R)
        if ASM:
            w0 = fenced(w0)
        acc = tl.dot(code_tile((w0, w1, w2), scales, R, dtype, ASM, True), x.T, acc, input_precision="ieee")
        if ASM:
            # A use of the sum makes Triton wait for the product here. Without it the next step is unpacked into the
            # registers of products that are still running. Without this and the fence a tile came out wrong once.
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], tl.float32, is_pure=True, pack=1)
    acc = acc.T
    n = tile_row * 16 + tl.arange(0, BLOCK_N)
    if GROUP == 0:
        acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if SPLIT > 1:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * M * N + offsets, acc, mask=mask)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + offsets, acc.to(dtype), mask=mask)


@launched
@triton.jit(do_not_specialize=["M"])
def add_parts(parts_ptr, bias_ptr, out_ptr, M, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, N] = the sum of parts fp32 [SPLIT, M, N] in their order (+ bias)."""
    total = M.to(tl.int64) * N
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + part * total + offsets, mask=offsets < total, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offsets % N, mask=offsets < total, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=offsets < total)
