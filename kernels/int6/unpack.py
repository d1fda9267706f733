"""What the wide kernel's four unpacking warps do, and the order of blocks that they share with those that multiply.

The words come by TMA because the fence between what the four warps wrote and the products that read it waits for all of
their loads: words on their way to registers would be waited for in each step. Shared memory is what bounds the
products, so the stores must not meet bank conflicts: lanes of odd rows store their two chunks of a pair in the other
order.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .tile import PAIRS_BF16, PAIRS_FP16, PAIRS_REGISTERS

TILES = tl.constexpr(8)
"""Of a load, one above the other."""
LOAD_BYTES = tl.constexpr(TILES.value * 1536)

TERMS_BF16 = tl.constexpr("""{
.reg .b32 rounded;
.reg .f32 rest;
cvt.rn.bf16x2.f32 $0, $2, $2;
shl.b32 rounded, $0, 16;
mov.b32 rest, rounded;
sub.f32 rest, $2, rest;
cvt.rn.bf16x2.f32 $1, rest, rest;
}""")
TERMS_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $2;\nmov.b32 $1, 0;")
OF_TERMS_BF16 = tl.constexpr("""{
.reg .b32 rest;
mul.rn.bf16x2 rest, $1, $3;
fma.rn.bf16x2 $0, $1, $2, rest;
}""")
OF_TERMS_FP16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")
"""tile.py's `scaled_pair` in two parts, so that the terms of a scale are made once for all pairs of its row."""


@gluon.jit
def block_of(item, blocks_f, blocks_m, SPLIT: gl.constexpr, GROUP_M: gl.constexpr):
    """(block of F, block of M, share of C) of an item: GROUP_M blocks of M go with all of F before the next ones."""
    block = item // SPLIT
    per_group = GROUP_M * blocks_f
    first = block // per_group * GROUP_M
    wide = gl.minimum(blocks_m - first, GROUP_M)
    return block % per_group // wide, first + block % per_group % wide, item % SPLIT


@gluon.jit
def items_of_this_program(items):
    return (items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def following(item, position, length):
    """(item, position) after `position` of `item` among this program's items, each of `length` positions."""
    ends = position + 1 == length
    return gl.where(ends, item + gl.num_programs(0), item), gl.where(ends, 0, position + 1)


@gluon.jit
def fetch(
    words_desc, shared_desc, scale_desc, ready, words, scales, slot, f, load, last_column, pred, BACKWARD: gl.constexpr
):  # fmt: skip
    """Starts the copy of a load's words (and, backward, of its rows' scales) to a slot.

    In a last column of 64 inputs four tiles have eight tile rows; the four after them come too and are not used.
    """
    row = load * TILES if BACKWARD else f * TILES
    column = f if BACKWARD else load
    mbarrier.expect(ready.index(slot), LOAD_BYTES + 256 if BACKWARD else LOAD_BYTES, pred=pred)
    whole = pred
    if shared_desc is not None:
        whole = pred & (column != last_column)
    for word in gl.static_range(3):
        place = words.index(slot * 3 + word)
        tma.async_copy_global_to_shared(
            words_desc, [row, column * 384 + word * 128], ready.index(slot), place, pred=whole
        )
        if shared_desc is not None:
            shared = pred & (column == last_column)
            tma.async_copy_global_to_shared(shared_desc, [row // 2, word * 128], ready.index(slot), place, pred=shared)
    if BACKWARD:
        tma.async_copy_global_to_shared(scale_desc, [0, row * 16], ready.index(slot), scales.index(slot), pred=pred)


@gluon.jit
def load_words(buffer, odd, L: gl.constexpr):
    """int32 [8, 128] in shared memory -> [8, 32, 4]: tile, lane, chunk. Odd rows have the chunks of a pair swapped."""
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    words = gl.convert_layout(gl.reshape(buffer.load(FLAT), [TILES, 32, 4]), L, assert_trivial=True)
    first, second = gl.split(gl.reshape(words, [TILES, 32, 2, 2]))
    swap, _ = gl.split(gl.reshape(odd, [TILES, 32, 2, 2]))
    return gl.reshape(gl.join(gl.where(swap, second, first), gl.where(swap, first, second)), [TILES, 32, 4])


@gluon.jit
def own_halves(words, shared, L: gl.constexpr):
    """[8, 32, 4] -> the same, or where tile rows share tiles, chunks 0 and 1 of each in its own place.

    Tiles 0 to 3 have those of 4 to 7 as chunks 2 and 3 (layout.py). Other chunks meet inputs of zero or are not stored.
    """
    halves = gl.reshape(words, [2, TILES // 2, 32, 2, 2])
    upper, lower = gl.split(gl.permute(halves, [1, 2, 4, 3, 0]))
    _, second = gl.split(upper)
    first, rest = gl.split(lower)
    lower = gl.join(gl.where(shared, second, first), rest)
    halves = gl.permute(gl.join(upper, lower), [4, 0, 1, 3, 2])
    return gl.convert_layout(gl.reshape(halves, [TILES, 32, 4]), L, assert_trivial=True)


@gluon.jit
def load_scales(buffer, L: gl.constexpr):
    """fp16 [1, 128] in shared memory -> fp32 [8, 32, 4] twice: of each lane's rows g of 8 tiles, and of its g + 8."""
    QUADS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 64, 0], [0, 8, 0]],
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 16, 0], [0, 32, 0]],
        [],
        [1, 128, 4],
    )
    scales = buffer.load(gl.SliceLayout(2, QUADS)).to(gl.float32)[:, :, None]
    scales = gl.reshape(scales + gl.zeros([1, 128, 4], gl.float32, QUADS), [TILES, 2, 8, 4])
    upper, lower = gl.split(gl.permute(scales, [0, 2, 3, 1]))
    upper = gl.convert_layout(gl.reshape(upper, [TILES, 32]), gl.SliceLayout(2, L), assert_trivial=True)
    lower = gl.convert_layout(gl.reshape(lower, [TILES, 32]), gl.SliceLayout(2, L), assert_trivial=True)
    chunks = gl.zeros([TILES, 32, 4], gl.float32, L)
    return upper[:, :, None] + chunks, lower[:, :, None] + chunks


@gluon.jit
def half_of(loaded, half: gl.constexpr, BACKWARD: gl.constexpr):
    """A step's share of what a load brought: its upper or lower four tiles, or the first or last two chunks of all."""
    if BACKWARD:
        low, high = gl.split(gl.permute(gl.reshape(loaded, [2, TILES // 2, 32, 4]), [1, 2, 3, 0]))
    else:
        low, high = gl.split(gl.permute(gl.reshape(loaded, [TILES, 32, 2, 2]), [0, 1, 3, 2]))
    return low if half == 0 else high


@gluon.jit
def code_pairs(w0, w1, w2, dtype: gl.constexpr):
    """tile.py's, for Gluon."""
    return gl.inline_asm_elementwise(
        PAIRS_BF16 if dtype == gl.bfloat16 else PAIRS_FP16,
        PAIRS_REGISTERS,
        [w0, w1, w2],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def scaled(pairs, upper, lower, dtype: gl.constexpr):
    """Eight int32 of two codes each -> of code * scale, rounded once: pairs 0..3 by `upper`, 4..7 by `lower`."""
    TERMS: gl.constexpr = TERMS_BF16 if dtype == gl.bfloat16 else TERMS_FP16
    SCALED: gl.constexpr = OF_TERMS_BF16 if dtype == gl.bfloat16 else OF_TERMS_FP16
    products = ()
    for side in gl.static_range(2):
        high, low = gl.inline_asm_elementwise(
            TERMS, "=&r,=&r,f", [lower if side else upper], (gl.int32, gl.int32), is_pure=True, pack=1
        )
        for j in gl.static_range(4):
            pair = pairs[4 * side + j]
            products = products + (
                gl.inline_asm_elementwise(SCALED, "=&r,r,r,r", [pair, high, low], gl.int32, is_pure=True, pack=1),
            )
    return products


@gluon.jit
def codes_in_place(p, R: gl.constexpr, CHUNKS: gl.constexpr):
    """Eight int32 [R, 32, CHUNKS] of pairs -> int32 [16 R, 16 CHUNKS]: row, and two inputs an element."""
    even = gl.join(gl.join(p[0], p[4]), gl.join(p[2], p[6]))
    odd = gl.join(gl.join(p[1], p[5]), gl.join(p[3], p[7]))
    both = gl.reshape(gl.join(even, odd), [R, 8, 4, CHUNKS, 2, 2, 2])  # tile, g, t, chunk, h, j's two bits
    return gl.reshape(gl.permute(both, [0, 4, 1, 3, 2, 5, 6]), [R * 16, CHUNKS * 16])


@gluon.constexpr_function
def swapped_layout(rows, columns):
    """Of int32 pairs: SWIZZLED, where in odd rows what is called the first chunk of two is the second.

    Eight lanes that store together hold four pieces of 16 bytes of an even row and four of an odd one. The swizzle
    keeps an even row's first chunk and an odd row's second apart, and lets the first chunks of both meet.
    """
    bases = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [1, 4 ^ 16], [2, 8], [4, 16]]
    bases += [[1 << bit, 0] for bit in range(3, rows.bit_length() - 1)]
    bases += [[0, 1 << bit] for bit in range(5, columns.bit_length() - 1)]
    return gl.SharedLinearLayout(bases, alignment=1024)


@gluon.jit
def unpack(
    words_desc, shared_desc, scale_desc, words, scales, fetched, weights, unpacked, empty, blocks_f, blocks_m, loads,
    BACKWARD: gl.constexpr, SPLIT: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The four warps that fill `weights`, step after step."""
    dtype: gl.constexpr = weights.dtype
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0])
    R: gl.constexpr = TILES // 2 if BACKWARD else TILES
    CHUNKS: gl.constexpr = 4 if BACKWARD else 2
    PLACES: gl.constexpr = swapped_layout(R * 16, CHUNKS * 16)
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    odd = gl.zeros([TILES, 32, 4], gl.int32, L) + (lane // 4 % 2)[None, :, None] != 0
    total = items_of_this_program(blocks_f * blocks_m * SPLIT) * loads
    item = gl.program_id(0)
    position = 0  # of the item: the load to fetch next
    f, _, share = block_of(item, blocks_f, blocks_m, SPLIT, GROUP_M)
    last_column = blocks_f - 1 if BACKWARD else SPLIT * loads - 1
    for early in gl.static_range(SLOTS):
        fetch(
            words_desc, shared_desc, scale_desc, fetched, words, scales, early, f, share * loads + position,
            last_column, early < total, BACKWARD,
        )  # fmt: skip
        item, position = following(item, position, loads)
        f, _, share = block_of(item, blocks_f, blocks_m, SPLIT, GROUP_M)
    for load in range(total):
        slot = load % SLOTS
        mbarrier.wait(fetched.index(slot), load // SLOTS % 2)
        w0 = load_words(words.index(slot * 3), odd, L)
        w1 = load_words(words.index(slot * 3 + 1), odd, L)
        w2 = load_words(words.index(slot * 3 + 2), odd, L)
        if shared_desc is not None:
            here = gl.program_id(0) + load // loads * gl.num_programs(0)
            own_f, _, own_share = block_of(here, blocks_f, blocks_m, SPLIT, GROUP_M)
            shared = (own_f if BACKWARD else own_share * loads + load % loads) == last_column
            w0 = own_halves(w0, shared, L)
            w1 = own_halves(w1, shared, L)
            w2 = own_halves(w2, shared, L)
        if BACKWARD:
            upper, lower = load_scales(scales.index(slot), L)
        for half in gl.static_range(2):
            pairs = code_pairs(
                half_of(w0, half, BACKWARD), half_of(w1, half, BACKWARD), half_of(w2, half, BACKWARD), dtype
            )
            if BACKWARD:
                pairs = scaled(pairs, half_of(upper, half, True), half_of(lower, half, True), dtype)
            step = load * 2 + half
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), step // STAGES % 2 ^ 1)
            place = weights.index(stage)._reinterpret(gl.int32, [R * 16, CHUNKS * 16], PLACES)
            place.store(codes_in_place(pairs, R, CHUNKS))
            fence_async_shared()
            mbarrier.arrive(unpacked.index(stage))
        # The barrier of that arrival says that every lane has read the slot.
        more = load + SLOTS < total
        fetch(
            words_desc, shared_desc, scale_desc, fetched, words, scales, slot, f, share * loads + position,
            last_column, more, BACKWARD,
        )  # fmt: skip
        item, position = following(item, position, loads)
        f, _, share = block_of(item, blocks_f, blocks_m, SPLIT, GROUP_M)
