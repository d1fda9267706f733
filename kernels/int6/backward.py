"""dx = dout W from the tiles that the forward reads, and the dequantisation of a whole weight for many rows."""

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
    scaled_pair,
    shared_tile,
    tile_words,
)


@triton.jit
def from_top(row, step, column, tile_rows, columns, HALF: tl.constexpr):
    """Words from tile 0 of `column`, as if that were a whole one, to the tile of tile row `row`: [THREADS, 1]."""
    offset = row * step
    if HALF:
        shared = (shared_tile(row, tile_rows, columns) - column) * 384
        offset = tl.where(column < columns, offset, shared)
    return offset[:, None]


@triton.jit
def transposed(pair):
    """The 8x8 matrix whose row g lies in lanes 4g .. 4g + 3, two elements a lane, transposed over the warp."""
    return tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [pair], tl.int32, is_pure=True, pack=1
    )


@launched
@triton.jit(do_not_specialize=["M", "tile_rows", "tile_columns"])
def warp_backward(
    dout_ptr,  # [M, N] as int32 pairs
    packed_ptr,
    scale_ptr,
    parts_ptr,  # fp32 [SPLIT, M, K]
    M,
    N,
    K,
    tile_rows,
    tile_columns,
    groups,
    dtype: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    EIGHTS: tl.constexpr,
    LOG_WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """M <= 8 * EIGHTS. A program has one tile column and a share of its tile rows, which its warps take in turn.

    The contraction runs over the weight's rows, which a warp's lanes hold across: each register of two codes is scaled
    (rounded once to dout's dtype, as a dequantised weight is) and transposed over the warp, and is then the A operand
    of the product W^T dout^T.
    """
    WARPS: tl.constexpr = 1 << LOG_WARPS
    THREADS: tl.constexpr = 32 * WARPS
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    g = lane // 4
    t = lane % 4
    column = tl.program_id(0)
    share = tl.cdiv(tile_rows, SPLIT)
    row = tl.program_id(1) * share + thread // 32
    stop = tl.minimum(tl.program_id(1) * share + share, tile_rows)
    columns = tile_columns - 1 if HALF else tile_columns
    step = columns.to(tl.int64) * 384
    tiles = packed_ptr + column * 384 + (lane * 4)[:, None] + tl.arange(0, 4)[None, :]
    pairs = dout_ptr + g * (N // 2) + t
    zero = tl.zeros([THREADS], tl.float32)
    acc = ()
    for _ in tl.static_range(8 * EIGHTS):
        acc = acc + ((zero, zero, zero, zero),)
    n0, n1, n2 = tile_words(tiles + from_top(row, step, column, tile_rows, columns, HALF), (row < stop)[:, None])
    for _ in range(0, tl.cdiv(share, WARPS)):
        w0 = four(n0, THREADS)
        w1 = four(n1, THREADS)
        w2 = four(n2, THREADS)
        if HALF:
            before = inputs_before(row, column, columns)
            w0 = own_half(w0, before)
            w1 = own_half(w1, before)
            w2 = own_half(w2, before)
        following = row + WARPS
        next_tiles = tiles + from_top(following, step, column, tile_rows, columns, HALF)
        n0, n1, n2 = tile_words(next_tiles, (following < stop)[:, None])
        n = row * 16
        b = ()
        for eight in tl.static_range(EIGHTS):
            mask = (row < stop) & (eight * 8 + g < M)
            pair = pairs + eight * 4 * N + row * 8
            b0 = tl.load(pair, mask=mask & (n + 2 * t < N), other=0)
            b1 = tl.load(pair + 4, mask=mask & (n + 8 + 2 * t < N), other=0)
            b = b + ((b0, b1),)
        sums = ()
        for chunk in tl.static_range(4):
            if chunk == 0 or GROUP != 0 and chunk * 32 % GROUP == 0:
                group = 0 if GROUP == 0 else column * (128 // GROUP) + chunk * 32 // GROUP
                known = scale_ptr + (n + g).to(tl.int64) * groups + group
                live = (row < stop) & (group < groups)
                upper = tl.load(known, mask=live & (n + g < N), other=0.0).to(tl.float32)
                lower = tl.load(known + 8 * groups, mask=live & (n + 8 + g < N), other=0.0).to(tl.float32)
            p = code_pairs(w0[chunk], w1[chunk], w2[chunk], dtype)
            for half in tl.static_range(2):
                a0 = transposed(scaled_pair(p[2 * half], upper, dtype))
                a1 = transposed(scaled_pair(p[2 * half + 1], upper, dtype))
                a2 = transposed(scaled_pair(p[2 * half + 4], lower, dtype))
                a3 = transposed(scaled_pair(p[2 * half + 5], lower, dtype))
                for eight in tl.static_range(EIGHTS):
                    old = acc[(chunk * 2 + half) * EIGHTS + eight]
                    sums = sums + (lane_product(a0, a1, a2, a3, b[eight][0], b[eight][1], old, dtype),)
        acc = sums
        row = row + WARPS
    owner = tl.arange(0, 32)[:, None]
    place = tl.arange(0, 4)[None, :]
    for sixteen in tl.static_range(8):
        k = column * 128 + sixteen // 2 * 32 + owner // 8 * 8 + sixteen % 2 * 4 + place // 2 * 2 + owner // 4 % 2
        for eight in tl.static_range(EIGHTS):
            m = eight * 8 + owner % 4 * 2 + place % 2
            total = over_warps(acc[sixteen * EIGHTS + eight], LOG_WARPS)
            tl.store(parts_ptr + (tl.program_id(1) * M + m) * K + k, total, mask=(m < M) & (k < K))


@launched
@triton.jit(do_not_specialize=["tile_rows", "tile_columns"])
def dequantize_tiles(
    packed_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    tile_rows,
    tile_columns,
    groups,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
):
    """w_hat [N, K] in out's dtype; a program has R tiles, one above the other."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    column = tl.program_id(0)
    n = tl.program_id(1) * R * 16 + tl.arange(0, R * 16)
    words = load_triples(packed_ptr, tl.program_id(1) * R, tile_rows, column, tile_columns, HALF, R)
    before = inputs_before(tl.program_id(1) * R, column, tile_columns - 1) if HALF else 0
    scales = load_scales(scale_ptr, tl.program_id(1) * R, column, before, N, groups, GROUP, HALF, R)
    k = column * 128 - before + tl.arange(0, 128)
    mask = (n < N)[:, None] & (k < K)[None, :]
    if HALF:
        mask &= (k >= column * 128)[None, :]
    offsets = n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_ptr + offsets, code_tile(words, scales, R, dtype, ASM, False), mask=mask)
