"""Device code that the int6 kernels share: words of a tile to codes, and the tensor-core product of a warp's lanes.

The warp kernels keep tensors of one element a thread, element i being what thread i holds, so that an elementwise
instruction is one of each lane and `lane_product` is the warp's mma. Those tensors have exactly as many elements as the
program has threads, for which Triton's only layout is that one. With inline assembly (`ASM`) a triple of words becomes
eight registers of two bf16 or fp16 codes in 17 integer instructions and 8 subtractions; without it, in the interpreter
and for fp32, plain shifts and masks do the same.

HALF says in every kernel that the last tile column is of 64 inputs, where two tile rows share a tile (layout.py). Warps
then take their own chunks first, the tile and dequantising kernels move the other operand by the inputs `before`. What
they read of other rows meets zeros or is not stored. Sums are those of inputs padded with zeros, bit for bit.
"""

import triton
import triton.language as tl

_PAIRS = (
    """{
.reg .b32 low, high, bias;
mov.b32 bias, BIAS;
lop3.b32 $0, $8, 0x003f003f, MAGIC, 0xEA;
shr.u32 $1, $8, 6;
lop3.b32 $1, $1, 0x003f003f, MAGIC, 0xEA;
lop3.b32 $2, $9, 0x003f003f, MAGIC, 0xEA;
shr.u32 $3, $9, 6;
lop3.b32 $3, $3, 0x003f003f, MAGIC, 0xEA;
lop3.b32 $4, $10, 0x003f003f, MAGIC, 0xEA;
shr.u32 $5, $10, 6;
lop3.b32 $5, $5, 0x003f003f, MAGIC, 0xEA;
shr.u32 low, $8, 12;
lop3.b32 low, low, 0x000f000f, MAGIC, 0xEA;
shr.u32 high, $10, 8;
lop3.b32 $6, high, 0x00300030, low, 0xEA;
shr.u32 low, $9, 12;
lop3.b32 low, low, 0x000f000f, MAGIC, 0xEA;
shr.u32 high, $10, 10;
lop3.b32 $7, high, 0x00300030, low, 0xEA;
"""
    + "".join(f"sub.rn.TYPE ${pair}, ${pair}, bias;\n" for pair in range(8))
    + "}"
)
"""0xEA is (a & b) | c: a field and its exponent in one instruction. MAGIC | f is 128 + f in bf16, 1024 + f in fp16."""

_PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


def _filled(text: str, **values: str) -> tl.constexpr:
    for name, value in values.items():
        text = text.replace(name, value)
    return tl.constexpr(text)


PAIRS_BF16 = _filled(_PAIRS, BIAS="0x43204320", MAGIC="0x43004300", TYPE="bf16x2")
PAIRS_FP16 = _filled(_PAIRS, BIAS="0x64206420", MAGIC="0x64006400", TYPE="f16x2")
PRODUCT_BF16 = _filled(_PRODUCT, TYPE="bf16")
PRODUCT_FP16 = _filled(_PRODUCT, TYPE="f16")
SCALED_BF16 = tl.constexpr("""{
.reg .b32 high, low;
.reg .f32 rest;
cvt.rn.bf16x2.f32 high, $2, $2;
shl.b32 low, high, 16;
mov.b32 rest, low;
sub.f32 rest, $2, rest;
cvt.rn.bf16x2.f32 low, rest, rest;
mul.rn.bf16x2 low, $1, low;
fma.rn.bf16x2 $0, $1, high, low;
}""")
SCALED_FP16 = tl.constexpr("""{
.reg .b32 both;
cvt.rn.f16x2.f32 both, $2, $2;
mul.rn.f16x2 $0, $1, both;
}""")
"""A scale has 11 significant bits, 8 in `high` and 3 in `low`; a code has 5, so code * low is exact in bf16."""
PAIRS_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r")
PRODUCT_REGISTERS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")


@triton.jit
def code_pairs(w0, w1, w2, dtype: tl.constexpr):
    """Words of a triple -> eight int32, each two codes as `dtype`, in the order of layout.py."""
    return tl.inline_asm_elementwise(
        PAIRS_BF16 if dtype == tl.bfloat16 else PAIRS_FP16,
        PAIRS_REGISTERS,
        [w0, w1, w2],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def lane_product(a0, a1, a2, a3, b0, b1, acc, dtype: tl.constexpr):
    """16x8x16 product of a warp, every element of the tensors being what the thread of its index holds."""
    return tl.inline_asm_elementwise(
        PRODUCT_BF16 if dtype == tl.bfloat16 else PRODUCT_FP16,
        PRODUCT_REGISTERS,
        [a0, a1, a2, a3, b0, b1, acc[0], acc[1], acc[2], acc[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def four(words, THREADS: tl.constexpr):
    """[THREADS, 4] -> its columns; all four lie in one thread, so this moves nothing."""
    even, odd = tl.split(tl.reshape(words, [THREADS, 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def tile_words(pointers, mask):
    """A lane's twelve words of a tile in three loads of 16 bytes; none is read twice, so none need stay in cache."""
    w0 = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    w1 = tl.load(pointers + 128, mask=mask, other=0, eviction_policy="evict_first")
    w2 = tl.load(pointers + 256, mask=mask, other=0, eviction_policy="evict_first")
    return w0, w1, w2


@triton.jit
def shared_tile(row, tile_rows, columns):
    """Number of the tile that has the last 64 inputs of tile row `row`, after all tiles of `columns` whole columns."""
    return tile_rows.to(tl.int64) * columns + row // 8 * 4 + row % 4


@triton.jit
def inputs_before(row, column, columns):
    """Inputs of another row that are before its own in the tile of tile row `row` in `column`: 0 or 64."""
    return tl.where((column == columns) & (row // 4 % 2 == 1), 64, 0)


@triton.jit
def own_half(words, before):
    """Four words of a lane -> the same, chunks 2 and 3 in the place of 0 and 1 where `before` is 64."""
    second = before > 0
    return tl.where(second, words[2], words[0]), tl.where(second, words[3], words[1]), words[2], words[3]


@triton.jit
def over_warps(acc, LOG_WARPS: tl.constexpr):
    """A quadruple of accumulators [32 << LOG_WARPS] -> [32, 4] as 2 half + odd, summed over the warps in a fixed order.

    Halving by `split` costs one exchange through shared memory without bank conflicts; `tl.sum` over the warps makes
    several of up to 32 ways (2,200 cycles for 8 warps).
    """
    four = tl.join(tl.join(acc[0], acc[2]), tl.join(acc[1], acc[3]))  # the last joined is the last dimension
    sums = tl.permute(tl.reshape(four, [1 << LOG_WARPS, 32, 4]), [1, 2, 0])
    for level in tl.static_range(LOG_WARPS):
        low, high = tl.split(tl.reshape(sums, [32, 4, 1 << (LOG_WARPS - level - 1), 2]))
        sums = low + high
    return tl.reshape(sums, [32, 4])


@triton.jit
def field_pairs(w0, w1, w2):
    """Words of a triple -> eight int32, each two fields code + 32 in bits 0..5 and 16..21; other bits are undefined."""
    last = ((w0 >> 12) & 0x000F000F) | ((w2 >> 8) & 0x00300030)
    return (w0, w0 >> 6, w1, w1 >> 6, w2, w2 >> 6) + (last,) + (((w1 >> 12) & 0x000F000F) | ((w2 >> 10) & 0x00300030),)


@triton.jit
def load_triples(packed_ptr, first, tile_rows, column, tile_columns, HALF: tl.constexpr, R: tl.constexpr):
    """The words of R tiles, one above the other, at tile row `first` and tile column `column`: three of [R, 32, 4].

    With HALF `first` is a multiple of R, and R divides 4: `inputs_before` is one number for all of them.
    """
    row = first + tl.arange(0, R)
    columns = tile_columns - 1 if HALF else tile_columns
    tile = row.to(tl.int64) * columns + column
    if HALF:
        tile = tl.where(column < columns, tile, shared_tile(row, tile_rows, columns))
    offsets = tile[:, None, None] * 384
    offsets += tl.arange(0, 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    mask = (row < tile_rows)[:, None, None]
    w0 = tl.load(packed_ptr + offsets, mask=mask, other=0)
    w1 = tl.load(packed_ptr + offsets + 128, mask=mask, other=0)
    w2 = tl.load(packed_ptr + offsets + 256, mask=mask, other=0)
    return w0, w1, w2


@triton.jit
def load_scales(scale_ptr, first, column, before, N, groups, GROUP: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr):
    """Scales in fp32 of what each lane holds of R tiles: of its rows g and of its rows g + 8.

    [R, 32, 1] of scale [N] (GROUP 0), [R, 32, 4] of scale [N, groups]: one for each chunk, 0 for those of other rows.
    """
    row = (first + tl.arange(0, R))[:, None, None] * 16 + (tl.arange(0, 32) // 4)[None, :, None]
    if GROUP == 0:
        upper = tl.load(scale_ptr + row, mask=row < N, other=0.0)
        lower = tl.load(scale_ptr + row + 8, mask=row + 8 < N, other=0.0)
    else:
        group = column * (128 // GROUP) + (tl.arange(0, 4) * 32 // GROUP)[None, None, :]
        if HALF:
            own = (tl.arange(0, 4) * 32 >= before)[None, None, :]
            group = tl.where(own, group - before // GROUP, groups)
        pointers = scale_ptr + row.to(tl.int64) * groups + group
        upper = tl.load(pointers, mask=(row < N) & (group < groups), other=0.0)
        lower = tl.load(pointers + 8 * groups, mask=(row + 8 < N) & (group < groups), other=0.0)
    return upper.to(tl.float32), lower.to(tl.float32)


@triton.jit
def scaled_pair(pair, scale, dtype: tl.constexpr):
    """int32 of two codes -> int32 of two code * scale, rounded once: a bf16 scale is split in two exact terms."""
    return tl.inline_asm_elementwise(
        SCALED_BF16 if dtype == tl.bfloat16 else SCALED_FP16, "=&r,r,f", [pair, scale], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def code_tile(words, scales, R: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr, SLOTS: tl.constexpr):
    """Three word tensors [R, 32, 4] -> codes [16 R, 128] in `dtype`, times `scales` unless those are None.

    SLOTS gives the inputs in the order in which a lane's registers are the A operand of a tensor-core product, the
    order that `permute_inputs` gives x; else they are in their own. The joins go from the slowest to the fastest bit of
    a register's place in that order: nothing is shuffled, neither to the operand nor to a store of 16 bytes.
    """
    p = code_pairs(words[0], words[1], words[2], dtype) if ASM else field_pairs(words[0], words[1], words[2])
    if ASM and scales is not None:
        upper = ()
        lower = ()
        for j in tl.static_range(4):
            upper = upper + (scaled_pair(p[j], scales[0], dtype),)
            lower = lower + (scaled_pair(p[4 + j], scales[1], dtype),)
        p = upper + lower
    if SLOTS:
        even = tl.join(tl.join(p[0], p[2]), tl.join(p[1], p[3]))
        odd = tl.join(tl.join(p[4], p[6]), tl.join(p[5], p[7]))
    else:
        even = tl.join(tl.join(p[0], p[4]), tl.join(p[2], p[6]))
        odd = tl.join(tl.join(p[1], p[5]), tl.join(p[3], p[7]))
    both = tl.join(even, odd)  # row, lane, chunk, then j's two bits and h (SLOTS) or h and j's two bits
    if ASM:
        codes = tl.join(both.to(tl.int16).to(dtype, bitcast=True), (both >> 16).to(tl.int16).to(dtype, bitcast=True))
    else:
        codes = tl.join((both & 63) - 32, ((both >> 16) & 63) - 32).to(tl.float32)
        if scales is not None:
            half = tl.join(scales[0], scales[1])
            codes *= half[:, :, :, None, None, :, None] if SLOTS else half[:, :, :, :, None, None, None]
        codes = codes.to(dtype)
    codes = tl.reshape(codes, [R, 8, 4, 4, 2, 2, 2, 2])  # row, g, t, chunk, the three of above, even/odd
    codes = tl.permute(codes, [0, 6, 1, 3, 4, 5, 2, 7] if SLOTS else [0, 4, 1, 3, 2, 5, 6, 7])
    return tl.reshape(codes, [R * 16, 128])
