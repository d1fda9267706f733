"""Products that end in a slope or in heads, on Hopper, by groups of warps that take turns (:mod:`..pingpong`).

    slope    out [M, N] = x [M, K] W [K, N] * 2 relu(u), from `kept` [M, N]: relu(u)^2, or u
    heads    out [M, N] = x W^T of W [N, K], whose first heads are normed and rotated (:class:`product.Heads`)

The tile of `kept` is loaded beside the operands, into the place that the finished tile leaves from: neither the wait
for it nor the store is seen. bf16 or fp16; sums and bits are :mod:`product`'s. 2 M N K FLOPs; `kept` is read and out
written once.

NVIDIA H200, ms: slope, 98304 x 512 x 1536, 0.261 (product's, two programs a multiprocessor, 0.348; cuBLAS without the
slope 0.226); heads, 98304 x 512 x 1024, 0.179 (product's 0.197; its plain store 0.167). `kept` asked for earlier or
later in the tile: 0.266, 0.270. Without an epilogue or with the square of relu this way loses to product's: 0.208 for
0.204 (1536 -> 512), 0.256 for 0.244.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..dispatch import cdiv, multiprocessors
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
    swizzled,
)
from ..rms_norm import EPS as RMS_EPS
from ..tile import rotate


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
def _finish_tiles(
    out_desc, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, S, ROWS, inputs, weights, kepts, loaded, empty, turn, kept_loaded,
    kept_empty, tiles,
    GROUP: gl.constexpr, ACROSS: gl.constexpr, STEPS: gl.constexpr, IS_U: gl.constexpr, HEAD: gl.constexpr,
    Q: gl.constexpr, G: gl.constexpr, EPS: gl.constexpr,
):  # fmt: skip
    count = GROUP
    kept = kepts.index(GROUP)
    for tile in range(gl.program_id(0) + GROUP * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        m, n = tile // ACROSS * BLOCK, tile % ACROSS * BLOCK
        acc = multiply_tile(inputs, weights, loaded, empty, turn, count, GROUP, STEPS, HEAD == 0)
        if HEAD:
            acc = _with_heads(acc, m, n, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, S, ROWS, HEAD, Q, G, EPS)
            tma.store_wait(0)
        else:
            mbarrier.wait(kept_loaded.index(GROUP), count // 2 % 2)
            relu = kept.load(ACC).to(gl.float32)
            relu = gl.where(relu <= 0.0, 0.0, relu) if IS_U else gl.sqrt(relu)
            acc = gl.where(relu == 0.0, 0.0, 2.0 * relu * acc)
        kept.store(acc.to(kept.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [m, n], kept)
        if HEAD == 0:
            tma.store_wait(0)
            mbarrier.arrive(kept_empty.index(GROUP))
        count += 2
    tma.store_wait(0)


@gluon.jit
def _load(
    x_desc, w_desc, kept_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, tiles,
    ACROSS: gl.constexpr, STEPS: gl.constexpr, HEAD: gl.constexpr,
):  # fmt: skip
    step = 0
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n, group = tile // ACROSS * BLOCK, tile % ACROSS * BLOCK, count % 2
        for k in range(STEPS):
            if HEAD:
                load_step(x_desc, w_desc, [m, k * DEPTH], [n, k * DEPTH], inputs, weights, loaded, empty, step)
            else:
                load_step(x_desc, w_desc, [m, k * DEPTH], [k * DEPTH, n], inputs, weights, loaded, empty, step)
                if k == STEPS // 2:
                    mbarrier.wait(kept_empty.index(group), (count // 2 + 1) % 2)
                    mbarrier.expect(kept_loaded.index(group), kept_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(kept_desc, [m, n], kept_loaded.index(group), kepts.index(group))
            step += 1
        count += 1  # noqa: SIM113 (Gluon has no enumerate)


@gluon.jit(do_not_specialize=["tiles", "S", "ROWS"])
def _product(
    x_desc,  # [M, K], blocks [BLOCK, DEPTH]
    w_desc,  # slope: [K, N], blocks [DEPTH, BLOCK]; heads: [N, K], blocks [BLOCK, DEPTH]
    kept_desc,  # [M, N], blocks [BLOCK, BLOCK]
    out_desc,
    cos_ptr,
    sin_ptr,
    gain_ptr,
    rstd_ptr,
    S,
    ROWS,
    tiles,
    ACROSS: gl.constexpr,
    STEPS: gl.constexpr,
    IS_U: gl.constexpr,
    HEAD: gl.constexpr,
    Q: gl.constexpr,
    G: gl.constexpr,
    EPS: gl.constexpr,
):
    """A slope where HEAD is 0."""
    weight_shape: gl.constexpr = [BLOCK, DEPTH] if HEAD else [DEPTH, BLOCK]
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
                out_desc, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, S, ROWS, inputs, weights, kepts, loaded, empty, turn,
                kept_loaded, kept_empty, tiles, 0, ACROSS, STEPS, IS_U, HEAD, Q, G, EPS,
            )),
            (_finish_tiles, (
                out_desc, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, S, ROWS, inputs, weights, kepts, loaded, empty, turn,
                kept_loaded, kept_empty, tiles, 1, ACROSS, STEPS, IS_U, HEAD, Q, G, EPS,
            )),
            (_load, (
                x_desc, w_desc, kept_desc, inputs, weights, kepts, loaded, empty, kept_loaded, kept_empty, tiles,
                ACROSS, STEPS, HEAD,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def takes(x: Tensor, outputs: int, head_dim: int) -> bool:
    """Whether a product of rows [M, K] pays here: 16 bits, on Hopper, and some tiles for each group to take turns.

    Heads of 128 would need more registers than there are.
    """
    return runs_on(x) and head_dim <= 64 and _tiles(x.size(0), outputs) >= 8 * multiprocessors(x.device)


def launch_slope(x: Tensor, weight: Tensor, kept: Tensor, out: Tensor) -> None:
    """out [M, N] = x [M, K] weight [K, N] times 2 relu(u); `kept` [M, N] is relu(u)^2, in fp16 u.

    All of one 16-bit dtype and reached by the copy engine: rows at multiples of 16 bytes.
    """
    weight_d = swizzled(weight, DEPTH.value, BLOCK.value)
    _launch(x, weight_d, kept, out, (None,) * 4, IS_U=x.dtype == torch.float16, HEAD=0, Q=0, G=0)


def launch_heads(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tables: tuple[Tensor, ...],
    queries: int,
    keys: int,
    head_dim: int,
) -> None:
    """out [M, N] = x [M, K] weight [N, K]^T, its first `queries` and `keys` heads normed and rotated.

    `tables` are cos, sin, gain and rstd of :class:`product.Heads`. 16-bit tensors as for :func:`launch_slope`.
    """
    weight_d = swizzled(weight, BLOCK.value, DEPTH.value)
    _launch(x, weight_d, out, out, tables, IS_U=False, HEAD=head_dim, Q=queries, G=keys)


def _launch(
    x: Tensor,
    weight_d: TensorDescriptor,
    kept: Tensor,
    out: Tensor,
    tables: tuple[Tensor | None, ...],
    **constants: int,
) -> None:
    (rows, inputs), outputs, block, depth = x.shape, out.size(1), BLOCK.value, DEPTH.value
    tiles = _tiles(rows, outputs)
    cos, sin, gain, rstd = tables
    _product[(min(multiprocessors(x.device), tiles),)](
        x_desc=swizzled(x, block, depth), w_desc=weight_d, kept_desc=swizzled(kept, block, block),
        out_desc=swizzled(out, block, block), cos_ptr=cos, sin_ptr=sin, gain_ptr=gain, rstd_ptr=rstd,
        S=1 if cos is None else len(cos), ROWS=rows, tiles=tiles, ACROSS=cdiv(outputs, block),
        STEPS=cdiv(inputs, depth), EPS=RMS_EPS, **constants, num_warps=4, maxnreg=168,
    )  # fmt: skip


def _tiles(rows: int, outputs: int) -> int:
    return cdiv(rows, BLOCK.value) * cdiv(outputs, BLOCK.value)
