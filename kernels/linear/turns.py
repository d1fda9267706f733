"""Products that end in a slope or in heads, on Hopper, by groups of warps that take turns (:mod:`..pingpong`).

    slope    out [M, N] = x [M, K] W [K, N] * 2 relu(u), from `kept` [M, N]: relu(u)^2, or u
    heads    out [M, N] = x W^T of W [N, K], whose first heads are normed and rotated (:class:`product.Heads`)
    residual, norm_gradient, and slope or heads by a norm: as of :class:`product.RowNorm`
    boundary: as of :class:`product.Boundary`

The tile of `kept` is loaded beside the operands, into the place that the finished tile leaves from: neither the wait
for it nor the store is seen. Where a tile wants more than one, they come into that place one after the other. bf16 or
fp16; sums and bits are :mod:`product`'s. 2 M N K FLOPs; `kept` is read and out written once.

NVIDIA H200, ms: slope, 98304 x 512 x 1536, 0.261 (product's, two programs a multiprocessor, 0.348; cuBLAS without the
slope 0.226); heads, 98304 x 512 x 1024, 0.179 (product's 0.197; its plain store 0.167). `kept` asked for earlier or
later in the tile: 0.266, 0.270. Without an epilogue or with the square of relu this way loses to product's: 0.208 for
0.204 (1536 -> 512), 0.256 for 0.244.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..dispatch import cdiv, multiprocessors
from ..launch import launched
from ..pingpong import (
    ACC,
    BLOCK,
    DEPTH,
    GROUP_REGISTERS,
    LOAD_REGISTERS,
    ROW,
    STAGES,
    SWIZZLED,
    halves_of,
    load_step,
    make_ring,
    multiply_tile,
    runs_on,
    swizzled,
)
from ..rms_norm import EPS as RMS_EPS
from ..tile import rotate

if TYPE_CHECKING:
    from .product import Boundary

COLUMN = gl.constexpr(gl.SliceLayout(0, ACC.value))


@gluon.jit
def _with_heads(
    acc, m, n, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, S, ROWS,
    HEAD: gl.constexpr, Q: gl.constexpr, G: gl.constexpr, EPS: gl.constexpr,
):  # fmt: skip
    """As product's: all heads of the tile at once, those from Q + G on as they are."""
    COUNT: gl.constexpr = BLOCK // HEAD
    left, right = gl.split(gl.permute(gl.reshape(acc, [BLOCK, COUNT, 2, HEAD // 2]), [0, 1, 3, 2]))
    if n < (Q + G) * HEAD:
        L: gl.constexpr = left.type.layout
        row = m + gl.arange(0, BLOCK, gl.SliceLayout(1, gl.SliceLayout(2, L)))
        column = gl.arange(0, HEAD // 2, gl.SliceLayout(0, gl.SliceLayout(1, L)))
        head = n // HEAD + gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(2, L)))
        offsets = (row % S * (HEAD // 2))[:, None][:, :, None] + column[None, :][:, None, :]
        cos = gl.load(cos_ptr + offsets)
        sin = gl.load(sin_ptr + offsets)
        gain = gl.load(gain_ptr + head, mask=head < Q, other=1.0)
        is_rotated = (head < Q + G)[None, :]
        rstd = gl.rsqrt(gl.sum(left * left + right * right, 2) * (1.0 / HEAD) + EPS)
        places = rstd_ptr + row.to(gl.int64)[:, None] * (Q + G) + head[None, :]
        gl.store(places, rstd, mask=(row < ROWS)[:, None] & is_rotated)
        scale = (rstd * gain[None, :])[:, :, None]
        first, second = rotate(left, right, cos, sin)
        first *= scale
        second *= scale
        if (Q + G) * HEAD % BLOCK:
            first = gl.where(is_rotated[:, :, None], first, left)
            second = gl.where(is_rotated[:, :, None], second, right)
        left = first
        right = second
    both = gl.reshape(gl.permute(gl.join(left, right), [0, 1, 3, 2]), [BLOCK, BLOCK])
    return gl.convert_layout(both, ACC, assert_trivial=True)


@gluon.jit
def _row_sums(tile):
    """As product adds up a row of a tile: pieces of 32, then those."""
    left, right = halves_of(tile)
    a, b = halves_of(left)
    c, d = halves_of(right)
    sums = (gl.sum(a, 1) + gl.sum(b, 1)) + (gl.sum(c, 1) + gl.sum(d, 1))
    return gl.convert_layout(sums, ROW)


@gluon.jit
def _added(sums_ptr, row, ROWS, BLOCKS: gl.constexpr):
    total = gl.load(sums_ptr + row, mask=row < ROWS, other=0.0)
    for _ in gl.static_range(1, BLOCKS):
        sums_ptr += ROWS
        total += gl.load(sums_ptr + row, mask=row < ROWS, other=0.0)
    return total


@gluon.jit
def _gradient_factor(norm_ptr, sums_ptr, row, ROWS, D: gl.constexpr, BLOCKS: gl.constexpr):
    """As product's factor of the stream in its gradient through the norm."""
    rstd = gl.load(norm_ptr + row, mask=row < ROWS, other=0.0)
    return rstd * rstd * (1.0 / D) * _added(sums_ptr, row, ROWS, BLOCKS)


@gluon.jit
def _of_columns(ptr, n, COLUMNS: gl.constexpr):
    column = n + gl.arange(0, BLOCK, COLUMN)
    return gl.load(ptr + column, mask=column < COLUMNS, other=0.0)[None, :]


@gluon.jit
def _document_bias(bias_ptr, slots_ptr, m, n, length, pool, stride, COLUMNS: gl.constexpr):
    """[1, BLOCK], what the document of row m adds to the columns from n on."""
    document = m // length
    slot = document.to(gl.int64)
    if slots_ptr is not None:
        slot = gl.load(slots_ptr + document).to(gl.int64)
    column = n + gl.arange(0, BLOCK, COLUMN)
    is_there = (column < COLUMNS) & (slot >= 0) & (slot < pool)
    return gl.load(bias_ptr + slot * stride + column, mask=is_there, other=0.0)[None, :]


@gluon.jit
def _computed(tile):
    """`tile`, computed here: the compiler would rather keep what it is computed from across a wait, and spill it."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [tile], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _release(kept_empty, group: gl.constexpr):
    """Says that a place was read."""
    fence_async_shared()
    mbarrier.arrive(kept_empty.index(group))


@gluon.jit
def _finish_tiles(
    out_desc, x_out_desc, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, norm_ptr, sums_ptr, bias_ptr, slots_ptr, skip_ptr,
    mix_ptr, pool, bias_stride, S, ROWS, inputs, weights, kepts, loaded, empty, turn, kept_loaded, kept_empty, tiles,
    GROUP: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr, KIND: gl.constexpr, LOADS: gl.constexpr,
    IS_U: gl.constexpr, HEAD: gl.constexpr, Q: gl.constexpr, G: gl.constexpr, EPS: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    count = GROUP
    kept = kepts.index(GROUP)
    for tile in range(gl.program_id(0) + GROUP * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        m, n = tile // ACROSS * BLOCK, tile % ACROSS * BLOCK
        row = m + gl.arange(0, BLOCK, ROW)
        sums_row = sums_ptr
        if BLOCKS and KIND != "heads":
            sums_row += (n // BLOCK).to(gl.int64) * ROWS + row
        # What comes from memory is asked for before the product: it arrives meanwhile.
        if KIND == "slope" and BLOCKS:
            factor = gl.load(norm_ptr + row, mask=row < ROWS, other=0.0)
        if KIND == "norm_gradient":
            factor = _gradient_factor(norm_ptr, sums_ptr, row, ROWS, D, BLOCKS)
        if KIND == "heads" and BLOCKS:
            factor = gl.div_rn(1.0, gl.sqrt_rn(_added(sums_ptr, row, ROWS, BLOCKS) * (1.0 / D) + EPS))
            gl.store(norm_ptr + row, factor, mask=(row < ROWS) & (n == 0))
        transposed: gl.constexpr = KIND == "slope" or KIND == "norm_gradient"
        acc = multiply_tile(inputs, weights, loaded, empty, turn, count, GROUP, STEPS, transposed)
        first = count // 2 * LOADS  # of the loads into the group's place
        if KIND == "heads":
            if BLOCKS:
                acc *= factor[:, None]
            acc = _with_heads(acc, m, n, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, S, ROWS, HEAD, Q, G, EPS)
            tma.store_wait(0)
        elif KIND == "slope":
            mbarrier.wait(kept_loaded.index(GROUP), first % 2)
            relu = kept.load(ACC).to(gl.float32)
            relu = gl.where(relu <= 0.0, 0.0, relu) if IS_U else gl.sqrt(relu)
            acc = gl.where(relu == 0.0, 0.0, 2.0 * relu * acc)
            if BLOCKS:
                gl.store(sums_row, _row_sums(acc * relu), mask=row < ROWS)
                acc *= factor[:, None]
        elif KIND == "residual":
            mbarrier.wait(kept_loaded.index(GROUP), first % 2)
            acc = (acc + kept.load(ACC).to(gl.float32)).to(kept.dtype).to(gl.float32)
            if BLOCKS:
                gl.store(sums_row, _row_sums(acc * acc), mask=row < ROWS)
        elif KIND == "norm_gradient":
            mbarrier.wait(kept_loaded.index(GROUP), 0)
            acc -= kept.load(ACC).to(gl.float32) * factor[:, None]
            _release(kept_empty, GROUP)
            mbarrier.wait(kept_loaded.index(GROUP), 1)
            acc += kept.load(ACC).to(gl.float32)
        else:
            mbarrier.wait(kept_loaded.index(GROUP), first % 2)
            acc += kept.load(ACC).to(gl.float32)
            if bias_ptr is not None:
                acc += _document_bias(bias_ptr, slots_ptr, m, n, S, pool, bias_stride, N)
            if x_out_desc is not None:
                kept.store(acc.to(kept.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(x_out_desc, [m, n], kept)
                tma.store_wait(0)
            acc = _computed(acc)
            _release(kept_empty, GROUP)
            if LOADS == 3:
                mbarrier.wait(kept_loaded.index(GROUP), (first + 1) % 2)
                skip = _of_columns(skip_ptr, n, N)
                acc = gl.fma(kept.load(ACC).to(gl.float32), skip, acc)
                acc = _computed(acc)
                _release(kept_empty, GROUP)
            mbarrier.wait(kept_loaded.index(GROUP), (first + LOADS - 1) % 2)
            acc *= _of_columns(mix_ptr, n, N)
            mix_x0 = _of_columns(mix_ptr + N, n, N)
            acc = gl.fma(kept.load(ACC).to(gl.float32), mix_x0, acc)
            acc = acc.to(kept.dtype).to(gl.float32)
            gl.store(sums_row, _row_sums(acc * acc), mask=row < ROWS)
        kept.store(acc.to(kept.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [m, n], kept)
        if KIND != "heads":
            tma.store_wait(0)
            mbarrier.arrive(kept_empty.index(GROUP))
        count += 2
    tma.store_wait(0)


@gluon.jit
def _load_kept(kept_desc, m, n, kepts, kept_loaded, kept_empty, group, number):
    """Load `number` into a group's place, once load `number` - 1 was read there, and what was stored has left it."""
    mbarrier.wait(kept_empty.index(group), (number + 1) % 2)
    mbarrier.expect(kept_loaded.index(group), kept_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(kept_desc, [m, n], kept_loaded.index(group), kepts.index(group))


@gluon.jit
def _load(
    x_desc, w_desc, kept_desc, second_desc, third_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty,
    tiles,
    ACROSS: gl.constexpr, STEPS: gl.constexpr, KIND: gl.constexpr, LOADS: gl.constexpr,
):  # fmt: skip
    """LOADS tiles come into a place, one after the other: from the second on during the next tile's steps, when their
    group has multiplied and is done with the one before.
    """
    LATE: gl.constexpr = min(STAGES + 3, STEPS - 1)
    LATER: gl.constexpr = min(STAGES + 7, STEPS - 1)
    step = 0
    count = 0
    last_m, last_n = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n, group = tile // ACROSS * BLOCK, tile % ACROSS * BLOCK, count % 2
        for k in range(STEPS):
            if KIND == "slope" or KIND == "norm_gradient":
                load_step(x_desc, w_desc, [m, k * DEPTH], [k * DEPTH, n], inputs, weights, loaded, empty, step)
            else:
                load_step(x_desc, w_desc, [m, k * DEPTH], [n, k * DEPTH], inputs, weights, loaded, empty, step)
            if LOADS > 1 and k == LATE and count > 0:
                number = (count - 1) // 2 * LOADS + 1
                _load_kept(second_desc, last_m, last_n, kepts, kept_loaded, kept_empty, 1 - group, number)
            if LOADS > 2 and k == LATER and count > 0:
                number = (count - 1) // 2 * LOADS + 2
                _load_kept(third_desc, last_m, last_n, kepts, kept_loaded, kept_empty, 1 - group, number)
            if LOADS > 0 and k == STEPS // 2:
                _load_kept(kept_desc, m, n, kepts, kept_loaded, kept_empty, group, count // 2 * LOADS)
            step += 1
        last_m, last_n = m, n
        count += 1
    number = (count - 1) // 2 * LOADS
    if LOADS > 1:
        _load_kept(second_desc, last_m, last_n, kepts, kept_loaded, kept_empty, (count + 1) % 2, number + 1)
    if LOADS > 2:
        _load_kept(third_desc, last_m, last_n, kepts, kept_loaded, kept_empty, (count + 1) % 2, number + 2)


@launched
@gluon.jit(do_not_specialize=["tiles", "S", "ROWS", "pool"])
def _product(
    x_desc,  # [M, K], blocks [BLOCK, DEPTH]
    w_desc,  # slope, norm_gradient: [K, N], blocks [DEPTH, BLOCK]; the others: [N, K], blocks [BLOCK, DEPTH]
    kept_desc,  # [M, N], blocks [BLOCK, BLOCK]
    second_desc,
    third_desc,
    out_desc,
    x_out_desc,
    cos_ptr,
    sin_ptr,
    gain_ptr,
    rstd_ptr,
    norm_ptr,
    sums_ptr,
    bias_ptr,
    slots_ptr,
    skip_ptr,
    mix_ptr,
    pool,
    bias_stride,
    S,
    ROWS,
    tiles,
    ACROSS: gl.constexpr,
    STEPS: gl.constexpr,
    KIND: gl.constexpr,
    LOADS: gl.constexpr,
    IS_U: gl.constexpr,
    HEAD: gl.constexpr,
    Q: gl.constexpr,
    G: gl.constexpr,
    EPS: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    """LOADS tiles are read beside a product's. `D` is the width of a norm, and BLOCKS the sums of a row that are left
    or read: 0 without a norm.
    """
    transposed: gl.constexpr = KIND == "slope" or KIND == "norm_gradient"
    weight_shape: gl.constexpr = [DEPTH, BLOCK] if transposed else [BLOCK, DEPTH]
    inputs, weights, loaded, empty, turn = make_ring(x_desc.dtype, weight_shape)
    kepts = gl.allocate_shared_memory(x_desc.dtype, [2, BLOCK, BLOCK], SWIZZLED)
    kept_loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kept_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(kept_loaded.index(group), count=1)
        mbarrier.init(kept_empty.index(group), count=1)
    gl.warp_specialize(
        [
            (_finish_tiles, (
                out_desc, x_out_desc, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, norm_ptr, sums_ptr, bias_ptr, slots_ptr,
                skip_ptr, mix_ptr, pool, bias_stride, S, ROWS, inputs, weights, kepts, loaded, empty, turn, kept_loaded,
                kept_empty, tiles, 0, ACROSS, STEPS, KIND, LOADS, IS_U, HEAD, Q, G, EPS, N, D, BLOCKS,
            )),
            (_finish_tiles, (
                out_desc, x_out_desc, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, norm_ptr, sums_ptr, bias_ptr, slots_ptr,
                skip_ptr, mix_ptr, pool, bias_stride, S, ROWS, inputs, weights, kepts, loaded, empty, turn, kept_loaded,
                kept_empty, tiles, 1, ACROSS, STEPS, KIND, LOADS, IS_U, HEAD, Q, G, EPS, N, D, BLOCKS,
            )),
            (_load, (
                x_desc, w_desc, kept_desc, second_desc, third_desc, inputs, weights, kepts, loaded, empty, kept_loaded,
                kept_empty, tiles, ACROSS, STEPS, KIND, LOADS,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


TURNS = 3
"""Tiles for each multiprocessor, two groups of which take turns."""


def takes(x: Tensor, outputs: int, head_dim: int) -> bool:
    """Whether a product of rows [M, K] pays here: 16 bits, on Hopper, and some tiles for each group to take turns.

    Four tiles a multiprocessor still pay: 16,384 rows to 512 outputs take 0.046 ms for 0.055 (NVIDIA H200). Fewer have
    not been tried. Heads of 128 would need more registers than there are.
    """
    return runs_on(x) and head_dim <= 64 and _tiles(x.size(0), outputs) >= TURNS * multiprocessors(x.device)


def launch_slope(
    x: Tensor, weight: Tensor, kept: Tensor, out: Tensor, rstd: Tensor | None = None, sums: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] weight [K, N] times 2 relu(u); `kept` [M, N] is relu(u)^2, in fp16 u.

    All of one 16-bit dtype and reached by the copy engine: rows at multiples of 16 bytes. `rstd` and `sums` are those
    of :class:`product.RowNorm`.
    """
    weight_d = swizzled(weight, DEPTH.value, BLOCK.value)
    _launch("slope", x, weight_d, out, [kept], norm=rstd, sums=sums, IS_U=x.dtype == torch.float16)


def launch_heads(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tables: tuple[Tensor, ...],
    queries: int,
    keys: int,
    head_dim: int,
    rstd: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """out [M, N] = x [M, K] weight [N, K]^T, its first `queries` and `keys` heads normed and rotated.

    `tables` are cos, sin, gain and rstd of :class:`product.Heads`. 16-bit tensors as for :func:`launch_slope`.
    """
    weight_d = swizzled(weight, BLOCK.value, DEPTH.value)
    about = {"HEAD": head_dim, "Q": queries, "G": keys, "D": x.size(1)}
    _launch("heads", x, weight_d, out, [], tables, norm=rstd, sums=sums, **about)


def launch_residual(x: Tensor, weight: Tensor, stream: Tensor, out: Tensor, sums: Tensor | None) -> None:
    """out [M, N] = x [M, K] weight [N, K]^T + stream [M, N], and `sums` of its squares; as :func:`launch_slope`."""
    weight_d = swizzled(weight, BLOCK.value, DEPTH.value)
    _launch("residual", x, weight_d, out, [stream], sums=sums)


def launch_boundary(x: Tensor, weight: Tensor, stream: Tensor, out: Tensor, sums: Tensor, boundary: "Boundary") -> None:
    """out [M, N], what the next block reads of x [M, K] weight [N, K]^T + stream [M, N], and `sums` of its squares;
    tensors of `boundary` as for :func:`launch_slope`.
    """
    weight_d = swizzled(weight, BLOCK.value, DEPTH.value)
    read = [tensor for tensor in (stream, boundary.pushed, boundary.x0) if tensor is not None]
    _launch("boundary", x, weight_d, out, read, sums=sums, boundary=boundary)


def launch_norm_gradient(
    x: Tensor, weight: Tensor, stream: Tensor, direct: Tensor, out: Tensor, rstd: Tensor, sums: Tensor
) -> None:
    """out [M, N], the gradient of the stream [M, N]: x [M, K] weight [K, N], through the norm, and `direct` [M, N];
    as :func:`launch_slope`.
    """
    weight_d = swizzled(weight, DEPTH.value, BLOCK.value)
    _launch("norm_gradient", x, weight_d, out, [stream, direct], norm=rstd, sums=sums)


def _launch(
    kind: str,
    x: Tensor,
    weight_d: TensorDescriptor,
    out: Tensor,
    read: list[Tensor],
    tables: tuple[Tensor | None, ...] = (None,) * 4,
    norm: Tensor | None = None,
    sums: Tensor | None = None,
    boundary: "Boundary | None" = None,
    **constants: int,
) -> None:
    """`read` are the tensors [M, N] whose tiles a tile wants, in their order."""
    (rows, inputs), outputs, block, depth = x.shape, out.size(1), BLOCK.value, DEPTH.value
    tiles = _tiles(rows, outputs)
    cos, sin, gain, rstd = tables
    mix, _, _, skip, bias, slots, x_out, length = boundary or (*(None,) * 7, 1)
    kept_d, second_d, third_d = ([swizzled(tensor, block, block) for tensor in read] + [None] * 3)[:3]
    out_d = swizzled(out, block, block)
    _product[(min(multiprocessors(x.device), tiles),)](
        x_desc=swizzled(x, block, depth), w_desc=weight_d, kept_desc=kept_d, second_desc=second_d, third_desc=third_d,
        out_desc=out_d, x_out_desc=None if x_out is None else swizzled(x_out, block, block), cos_ptr=cos, sin_ptr=sin,
        gain_ptr=gain, rstd_ptr=rstd, norm_ptr=norm, sums_ptr=sums, bias_ptr=bias, slots_ptr=slots, skip_ptr=skip,
        mix_ptr=mix, pool=0 if bias is None else len(bias), bias_stride=0 if bias is None else bias.stride(0),
        S=length if cos is None else len(cos), ROWS=rows, tiles=tiles, ACROSS=cdiv(outputs, block),
        STEPS=cdiv(inputs, depth), KIND=kind, LOADS=len(read), EPS=RMS_EPS, N=outputs,
        BLOCKS=0 if sums is None else len(sums),
        **{"IS_U": False, "HEAD": 0, "Q": 0, "G": 0, "D": outputs, **constants}, num_warps=4, maxnreg=168,
    )  # fmt: skip


def _tiles(rows: int, outputs: int) -> int:
    return cdiv(rows, BLOCK.value) * cdiv(outputs, BLOCK.value)
