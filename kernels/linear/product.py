"""The launch of a product of rows by a weight, with what is done to a tile before it leaves."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import aligned, cdiv, empty_aligned, is_aligned, multiprocessors
from ..launch import launched
from ..rms_norm import EPS
from ..swiglu import silu, swiglu_gradient
from ..tile import added, halves, norm_rotate, rstd_of, tiled
from .turns import launch_boundary, launch_heads, launch_norm_gradient, launch_residual, launch_slope, takes

STORE, SQUARE, SLOPE, HEADS, FACTORS = "store", "square", "slope", "heads", "factors"
GATE, GATE_SLOPE, ADD = "gate", "gate_slope", "add"
RESIDUAL, NORM_GRADIENT, BOUNDARY = "residual", "norm_gradient", "boundary"
IN_TURNS = SLOPE, HEADS, RESIDUAL, NORM_GRADIENT, BOUNDARY
"""What warps in turns can end with."""
"""Epilogues of a tile: as it is; relu(tile)^2; the tile times the slope of relu(u)^2; heads normed and rotated; each
row times its factor. For SwiGLU: silu(gate) times the tile; the gradients of gate and up from that of their product;
the tile and what was there. The tile and the stream; with :class:`RowNorm` the stream's gradient through its norm; with
:class:`Boundary` what the next block reads of the stream."""


class RowNorm(NamedTuple):
    """An RMS norm of rows x [rows, D] between products, without a pass over them: n = x / rms(x) is never stored.

    The product that makes x leaves the sums of its squares, tile for tile. The next one is by x itself, and multiplies
    its rows by 1 / rms. The gradient's mean(dn n) is mean(du u) hidden / D for u = W n, du its gradient: the product
    that makes du leaves those sums, and the one by W ends in the gradient of x.
    """

    rstd: Tensor | None
    """[rows], fp32, 1 / rms: "square" and "heads" write it, "slope" and "norm_gradient" read it"""
    sums: Tensor
    """[blocks, rows], fp32: of squares of x, over blocks of D, from "residual" and "boundary" to "square" and "heads";
    of du u, over blocks of hidden, from "slope" to "norm_gradient"
    """

    @staticmethod
    def of(width: int, rstd: Tensor, like: Tensor) -> "RowNorm":
        """With memory for the sums that a product of `width` outputs leaves, in the dtype of `like`."""
        return RowNorm(rstd, empty_sums(width, rstd.numel(), like))


def empty_sums(width: int, rows: int, like: Tensor) -> Tensor:
    """Memory for the sums of :class:`RowNorm`."""
    block = (FP32_TILE if like.dtype == torch.float32 else SLOPE_TILE).block_n
    return like.new_empty(cdiv(width, block), rows, dtype=torch.float32)


class Boundary(NamedTuple):
    """What the epilogue "boundary" makes of the stream z [rows, N] with the tile in it: x_in of the package rms_norm.

    Row r is of document r // length. A bias wants lengths that are multiples of BOUNDARY_ROWS: a tile is of one.
    """

    mix: Tensor
    """[2, N], fp32 and contiguous, as are all vectors"""
    x0: Tensor
    """[rows, N], as are all tensors"""
    pushed: Tensor | None = None
    skip: Tensor | None = None
    """[N]"""
    bias: Tensor | None = None
    """[pool, N], rows any distance apart"""
    slots: Tensor | None = None
    """[documents], the row of bias that each adds; None is its own"""
    x_out: Tensor | None = None
    """[rows, N], gets z with its bias, where it is given"""
    length: int = 1


class Heads(NamedTuple):
    """What the epilogue "heads" does to the first columns of a product: each head normed, rotated and times its gain.

    Columns are `queries` heads, `keys` heads, and others that stay as they are. Row r stands at position r mod S.
    """

    cos: Tensor
    """[S, head_dim/2], fp32 and contiguous"""
    sin: Tensor
    gain: Tensor
    """[queries], fp32"""
    rstd: Tensor
    """[rows, queries + keys], fp32: gets 1 / rms of each head"""
    queries: int
    keys: int
    head_dim: int


@dataclass(frozen=True)
class Tile:
    """block_m rows x block_n outputs, block_k of the sum a step; it leaves in `pieces`. `programs` run side by side on
    a multiprocessor. `cost` is the time of one tile in that of the largest.
    """

    block_m: int
    block_n: int
    block_k: int
    pieces: int
    warps: int
    stages: int
    programs: int = 1
    cost: float = 1.0


# NVIDIA H100, 1024 to 4096 rows x 512 x 1536: a round of tiles takes 17.6, 10.0, 7.5 and 6.8 us. 65536 rows (ms):
# 0.145, 0.165, 0.239, 0.325; the largest with 3 stages 0.152; 256 x 128 0.164; 64 x 256 0.218.
TILES = (
    Tile(128, 256, 64, 4, 8, 4),
    Tile(128, 128, 64, 4, 8, 4, cost=0.57),
    Tile(64, 128, 64, 2, 4, 4, cost=0.43),
    Tile(64, 64, 64, 1, 4, 4, cost=0.39),
)
# What is multiplied by a slope waits for it: two programs fill each other's gaps. NVIDIA H100, 65536 x 1536 x 512 (ms):
# 0.248; with 2 stages 0.311; 128 x 256 and one program 0.256 (the slopes in one piece) to 0.304 (in four).
SLOPE_TILE = Tile(128, 128, 64, 4, 8, 3, programs=2)
# Heads are finished all at once, beside fewer loads. NVIDIA H200, 98304 x 512 x 1024 (ms): 0.190; 4 stages and 4 pieces
# 0.197; head by head 0.238; 128 x 128 and two programs 0.241; 256 x 128 0.216. Without heads: 0.165.
HEADS_TILE = Tile(128, 256, 64, 2, 8, 3)
# A row's sum of squares is the same whatever the number of rows: all have as many outputs, in pieces of 32.
RESIDUAL_TILES = (Tile(128, 128, 64, 4, 8, 3, programs=2), Tile(64, 128, 64, 4, 4, 4, cost=0.75))
NORM_GRADIENT_TILE = Tile(128, 128, 64, 4, 8, 3, programs=2)
BOUNDARY_ROWS = 128
FP32_TILE = Tile(64, 64, 16, 1, 8, 2)  # no tensor cores: what does not spill; alone, for its sums depend on block_k


@functools.lru_cache(1024)
def pick_tile(dtype: torch.dtype, epilogue: str, rows: int, outputs: int, processors: int, head_dim: int = 0) -> Tile:
    """The tile with which the busiest multiprocessor is done first, of those that hold a whole head."""
    if dtype == torch.float32:
        return FP32_TILE
    if epilogue in (SLOPE, GATE, GATE_SLOPE):
        return SLOPE_TILE
    if epilogue == NORM_GRADIENT:
        return NORM_GRADIENT_TILE
    tiles = {HEADS: (HEADS_TILE, *TILES[1:]), RESIDUAL: RESIDUAL_TILES, BOUNDARY: RESIDUAL_TILES}.get(epilogue, TILES)
    wide = [tile for tile in tiles if tile.block_n >= head_dim]
    return min(wide, key=lambda tile: cdiv(tile_count(tile, rows, outputs), processors) * tile.cost)


def tile_count(tile: Tile, rows: int, outputs: int) -> int:
    return cdiv(rows, tile.block_m) * cdiv(outputs, tile.block_n)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_of(kept):
    """relu(u) in fp32 from what was kept: relu(u)^2, or u in fp16."""
    if kept.dtype == tl.float16:
        return relu(kept.to(tl.float32))
    elif kept.dtype == tl.float32:
        return tl.sqrt_rn(kept)
    else:
        return tl.sqrt(kept.to(tl.float32))


@triton.jit
def times_slope(tile, kept):
    """fp32 `tile` times the slope of relu(u)^2, 2 relu(u), from what was kept as of :func:`relu_of`."""
    root = relu_of(kept)
    return tl.where(root == 0.0, 0.0, 2.0 * root * tile)


@triton.jit
def _add_product(acc, x, w):
    """acc + x w. In fp32, which no tensor core multiplies, acc is fp64: only the sum of a step is a chain of fp32."""
    if x.dtype == tl.float32:
        acc += tl.dot(x, w, input_precision="ieee").to(tl.float64)
    else:
        acc = tl.dot(x, w, acc)
    return acc


@triton.jit
def _finish_heads(
    out_d, tile, m, n, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, S, ROWS,
    M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, HEAD: tl.constexpr, Q: tl.constexpr, G: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """All heads in `tile` [M, N] at once, as the halves [M, heads, HEAD/2] that rotate into each other. Those from
    Q + G on stay as they are.
    """
    COUNT: tl.constexpr = N // HEAD
    left, right = tl.split(tile.to(tl.float32).reshape(M, COUNT, 2, HEAD // 2).permute(0, 1, 3, 2))
    if n < (Q + G) * HEAD:
        row, head = m + tl.arange(0, M), n // HEAD + tl.arange(0, COUNT)
        is_rotated = head < Q + G
        offsets = (row % S)[:, None] * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, :]
        cos, sin = tl.load(cos_ptr + offsets)[:, None, :], tl.load(sin_ptr + offsets)[:, None, :]
        gain = tl.load(gain_ptr + head, mask=head < Q, other=1.0)
        is_exact: tl.constexpr = out_d.dtype == tl.float32
        first, second, rstd = norm_rotate(left, right, cos, sin, gain, None, HEAD, EPS, is_exact)
        places = rstd_ptr + row.to(tl.int64)[:, None] * (Q + G) + head[None, :]
        tl.store(places, rstd, mask=(row < ROWS)[:, None] & is_rotated[None, :])
        if (Q + G) * HEAD % N == 0:
            left, right = first, second
        else:
            left = tl.where(is_rotated[None, :, None], first, left)
            right = tl.where(is_rotated[None, :, None], second, right)
    tile = tl.join(left.to(out_d.dtype), right.to(out_d.dtype)).permute(0, 1, 3, 2).reshape(M, N)
    _store_pieces(out_d, tile, m, n, M, N, PIECES)


@triton.jit
def _store_pieces(out_d, tile, m, n, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr):
    if PIECES == 1:
        out_d.store([m, n], tile)
    else:
        left, right = halves(tile, M, N)
        _store_pieces(out_d, left, m, n, M, N // 2, PIECES // 2)
        _store_pieces(out_d, right, m, n + N // 2, M, N // 2, PIECES // 2)


@triton.jit
def _bias_of(bias_ptr, slots_ptr, m, length, pool, stride):
    """Where the bias of the document of row m lies, and how many rows there are to read: 1, or 0 for no bias."""
    document = m // length
    slot = document.to(tl.int64)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + document).to(tl.int64)
    return bias_ptr + slot * stride, ((slot >= 0) & (slot < pool)).to(tl.int32)


@triton.jit
def _next_stream(z, pushed, skip, x0, mix_x, mix_x0):
    """mix_x (z + skip pushed) + mix_x0 x0, by multiply-adds that the compiler cannot choose."""
    if pushed is not None:
        z = tl.fma(pushed.to(tl.float32), skip[None, :], z)
    return tl.fma(x0.to(tl.float32), mix_x0[None, :], z * mix_x[None, :])


@triton.jit
def _finish(
    out_d, kept_d, second_d, dup_d, pushed_d, vectors, tile, factor, m, n,
    COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Ends a piece of a tile and stores it, rounded. Returns what an epilogue wants to know of its rows, else 0."""
    tile = tile.to(tl.float32)
    sums = 0.0
    if EPILOGUE == "square":
        if NORMED:
            tile *= factor[:, None]
        if kept_d is not None:
            kept_d.store([m, n], tile.to(kept_d.dtype))
        tile = relu(tile)
        tile *= tile
    elif EPILOGUE == "slope":
        kept = kept_d.load([m, n])
        tile = times_slope(tile, kept)
        if NORMED:
            sums = tl.sum(tile * relu_of(kept), 1)
            tile *= factor[:, None]
    elif EPILOGUE == "gate":
        if kept_d is not None:
            kept_d.store([m, n], tile.to(kept_d.dtype))
        tile *= silu(second_d.load([m, n]).to(tl.float32))
    elif EPILOGUE == "gate_slope":
        gate, up = second_d.load([m, n]).to(tl.float32), kept_d.load([m, n]).to(tl.float32)
        tile, dup = swiglu_gradient(tile, gate, up)
        dup_d.store([m, n], dup.to(dup_d.dtype))
    elif EPILOGUE == "add":
        tile += kept_d.load([m, n]).to(tl.float32)
    elif EPILOGUE == "residual":
        tile = (tile + kept_d.load([m, n]).to(tl.float32)).to(out_d.dtype).to(tl.float32)
        if NORMED:
            sums = tl.sum(tile * tile, 1)
    elif EPILOGUE == "boundary":
        bias_ptr, has_bias, skip_ptr, mix_ptr = vectors
        column = n + tl.arange(0, tile.shape[1])
        is_column = column < COLUMNS
        tile += kept_d.load([m, n]).to(tl.float32)
        if bias_ptr is not None:
            tile += tl.load(bias_ptr + column, mask=is_column & (has_bias > 0), other=0.0)[None, :]
        if dup_d is not None:
            dup_d.store([m, n], tile.to(dup_d.dtype))
        pushed, skip = None, None
        if pushed_d is not None:
            pushed = pushed_d.load([m, n])
            skip = tl.load(skip_ptr + column, mask=is_column, other=0.0)
        mix_x = tl.load(mix_ptr + column, mask=is_column, other=0.0)
        mix_x0 = tl.load(mix_ptr + COLUMNS + column, mask=is_column, other=0.0)
        tile = _next_stream(tile, pushed, skip, second_d.load([m, n]), mix_x, mix_x0)
        tile = tile.to(out_d.dtype).to(tl.float32)
        sums = tl.sum(tile * tile, 1)
    elif EPILOGUE == "norm_gradient":
        tile -= kept_d.load([m, n]).to(tl.float32) * factor[:, None]
        if second_d is not None:
            tile += second_d.load([m, n]).to(tl.float32)
    out_d.store([m, n], tile.to(out_d.dtype))
    return sums


@triton.jit
def _finish_pieces(
    out_d, kept_d, second_d, dup_d, pushed_d, vectors, tile, factor, m, n,
    M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """`tile` [M, N] leaves in `PIECES` side by side: less shared memory at a time."""
    if PIECES == 1:
        return _finish(out_d, kept_d, second_d, dup_d, pushed_d, vectors, tile, factor, m, n, COLUMNS, EPILOGUE, NORMED)
    else:
        left, right = halves(tile, M, N)
        H: tl.constexpr = N // 2
        tensors = out_d, kept_d, second_d, dup_d, pushed_d, vectors
        sums = _finish_pieces(*tensors, left, factor, m, n, M, H, PIECES // 2, COLUMNS, EPILOGUE, NORMED)
        sums += _finish_pieces(*tensors, right, factor, m, n + H, M, H, PIECES // 2, COLUMNS, EPILOGUE, NORMED)
        return sums


@triton.jit
def _row_factor(
    norm_ptr, sums_ptr, row, n, ROWS, D: tl.constexpr, EPS: tl.constexpr, BLOCKS: tl.constexpr, EPILOGUE: tl.constexpr
):  # fmt: skip
    """What a row of an epilogue with :class:`RowNorm` is multiplied by, or of x in its gradient."""
    if EPILOGUE == "square" or EPILOGUE == "heads":
        rstd = rstd_of(sums_ptr, row, row < ROWS, ROWS, D, EPS, BLOCKS)
        tl.store(norm_ptr + row, rstd, mask=(row < ROWS) & (n == 0))
        return rstd
    rstd = tl.load(norm_ptr + row, mask=row < ROWS, other=0.0)
    if EPILOGUE == "norm_gradient":
        return rstd * rstd * (1.0 / D) * added(sums_ptr, row, row < ROWS, ROWS, BLOCKS)
    else:
        return rstd


@launched
@triton.jit(do_not_specialize=["TILES", "S", "ROWS", "pool"])
def _product_kernel(
    x_d, w_d, out_d, kept_d, second_d, dup_d, pushed_d, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, factors_ptr, norm_ptr,
    sums_ptr, bias_ptr, slots_ptr, skip_ptr, mix_ptr, pool, bias_stride, TILES, S, ROWS,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr,
    TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr, HEAD: tl.constexpr, Q: tl.constexpr, G: tl.constexpr,
    EPS: tl.constexpr, NORMED: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program walks tiles [BM rows, BN outputs] in one loop over all steps of all its tiles, so that the loads of a
    tile start while the one before it is finished. Neighbours work on the same rows: x comes from the L2 cache.
    """
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    STEPS: tl.constexpr = (K + BK - 1) // BK
    tile = tl.program_id(0) - tl.num_programs(0)
    m, n = 0, 0
    step = STEPS - 1
    acc = tl.zeros((BM, BN), tl.float64 if x_d.dtype == tl.float32 else tl.float32)
    factor = tl.zeros((BM,), tl.float32)
    for _ in range(0, tl.cdiv(TILES - tl.program_id(0), tl.num_programs(0)) * STEPS):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            m, n = tile // ACROSS * BM, tile % ACROSS * BN
        if NORMED and EPILOGUE != "residual" and EPILOGUE != "boundary":  # noqa: SIM102 (known to the compiler, and a number that is not)
            if step == STEPS - 1:  # before the last product: what it waits for arrives during the one before
                factor = _row_factor(norm_ptr, sums_ptr, m + tl.arange(0, BM), n, ROWS, WIDTH, EPS, BLOCKS, EPILOGUE)
        x = x_d.load([m, step * BK])
        if TRANSPOSED:
            acc = _add_product(acc, x, w_d.load([step * BK, n]))
        else:
            acc = _add_product(acc, x, w_d.load([n, step * BK]).T)
        if step == STEPS - 1:
            if EPILOGUE == "heads":
                if NORMED:
                    acc *= factor[:, None]
                _finish_heads(
                    out_d, acc, m, n, cos_ptr, sin_ptr, gain_ptr, rstd_ptr, S, ROWS, BM, BN, PIECES, HEAD, Q, G, EPS
                )
            else:
                row = m + tl.arange(0, BM)
                if EPILOGUE == "factors":
                    acc *= tl.load(factors_ptr + row, mask=row < ROWS, other=0.0)[:, None]
                own_bias_ptr, has_bias = None, 0
                if bias_ptr is not None:
                    own_bias_ptr, has_bias = _bias_of(bias_ptr, slots_ptr, m, S, pool, bias_stride)
                vectors = own_bias_ptr, has_bias, skip_ptr, mix_ptr
                sums = _finish_pieces(
                    out_d, kept_d, second_d, dup_d, pushed_d, vectors, acc, factor, m, n,
                    BM, BN, PIECES, N, EPILOGUE, NORMED,
                )  # fmt: skip
                if NORMED and (EPILOGUE == "residual" or EPILOGUE == "slope" or EPILOGUE == "boundary"):
                    tl.store(sums_ptr + (n // BN).to(tl.int64) * ROWS + row, sums, mask=row < ROWS)
            acc = tl.zeros((BM, BN), acc.dtype)


def launch_product(
    x: Tensor,
    weight: Tensor,
    transposed: bool = False,
    epilogue: str = STORE,
    kept: Tensor | None = None,
    heads: Heads | None = None,
    factors: Tensor | None = None,
    result: Tensor | None = None,
    gate: Tensor | None = None,
    dup: Tensor | None = None,
    norm: RowNorm | None = None,
    direct: Tensor | None = None,
    boundary: Boundary | None = None,
) -> Tensor:
    """x [..., K] by weight [N, K] (`transposed`: [K, N]) -> [..., N], written to `result` if it is given, contiguous.

    `kept` [..., N] is for two epilogues: "square" writes the tile itself to it, if it is given; "slope" reads relu(u)^2
    from it, or u in fp16. `heads` is for the epilogue "heads", `factors` fp32, one a row of x, for "factors".

    Of SwiGLU, "gate" reads `gate` [..., N] and writes the tile to `kept`, if it is given; "gate_slope" reads `gate` and
    up, which is `kept`, and writes dgate to `result` and `dup` [rows, N], whose rows start at multiples of 16 bytes;
    "add" adds `kept`, which may be `result`.

    "residual" adds `kept`, the stream. With `norm` it leaves the sums of squares; "square" is of n W^T for a product by
    the stream; "slope" is by the u of that, times 1 / rms; "norm_gradient" makes of the product the gradient of the
    stream, which is `kept`: through its norm, and `direct` [..., N] beside it. "boundary" adds `kept` and goes on as
    `boundary` says; it leaves sums of squares, with which "heads" is of n W^T.
    """
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    if result is None:  # not a view: autograd refuses an in-place change of a view that an op returned
        result = x.new_empty(*x.shape[:-1], outputs)
    if not x.numel() or not weight.numel():
        return result.zero_()
    x = aligned(x.reshape(-1, inputs))
    rows, processors = x.size(0), multiprocessors(x.device)
    cos, sin, gain, rstd, queries, keys, head_dim = heads or (None, None, None, None, 0, 0, 0)
    tile = pick_tile(x.dtype, epilogue, rows, outputs, processors, head_dim)
    tiles = tile_count(tile, rows, outputs)
    flat = result.view(rows, outputs) if result.dim() != 2 else result
    out = flat if is_aligned(flat) else empty_aligned(x, rows, outputs)
    weight = aligned(weight)
    if epilogue in (SLOPE, GATE_SLOPE, ADD, RESIDUAL, NORM_GRADIENT, BOUNDARY):
        kept = aligned(kept.reshape(-1, outputs))
    second = gate if direct is None else direct
    second = None if second is None else aligned(second.reshape(-1, outputs))
    norm_rstd, sums = norm or (None, None)
    mix, x0, pushed, skip, bias, slots, x_out, length = boundary or (*(None,) * 7, 1)
    if boundary is not None:
        second = aligned(x0.reshape(-1, outputs))
        pushed = None if pushed is None else aligned(pushed.reshape(-1, outputs))
        dup = None if x_out is None else x_out if is_aligned(x_out) else empty_aligned(x, rows, outputs)
    in_turns = epilogue in IN_TURNS and takes(x, outputs, head_dim)
    if epilogue == SLOPE and transposed and in_turns:
        launch_slope(x, weight, kept, out, norm_rstd, sums)
    elif epilogue == RESIDUAL and not transposed and in_turns:
        launch_residual(x, weight, kept, out, sums)
    elif epilogue == NORM_GRADIENT and transposed and direct is not None and in_turns:
        launch_norm_gradient(x, weight, kept, second, out, norm_rstd, sums)
    elif epilogue == HEADS and not transposed and in_turns:
        launch_heads(x, weight, out, (cos, sin, gain, rstd), queries, keys, head_dim, norm_rstd, sums)
    elif epilogue == BOUNDARY and not transposed and in_turns:
        launch_boundary(x, weight, kept, out, sums, boundary._replace(x0=second, pushed=pushed, x_out=dup))
    else:
        m, n, k, piece = tile.block_m, tile.block_n, tile.block_k, tile.block_n // tile.pieces
        _product_kernel[(min(processors * tile.programs, tiles),)](
            x_d=tiled(x, m, k), w_d=tiled(weight, *((k, n) if transposed else (n, k))), out_d=tiled(out, m, piece),
            kept_d=None if kept is None else tiled(kept, m, piece),
            second_d=None if second is None else tiled(second, m, piece),
            dup_d=None if dup is None else tiled(dup, m, piece),
            pushed_d=None if pushed is None else tiled(pushed, m, piece),
            cos_ptr=cos, sin_ptr=sin, gain_ptr=gain, rstd_ptr=rstd,
            factors_ptr=factors, norm_ptr=norm_rstd, sums_ptr=sums, bias_ptr=bias, slots_ptr=slots, skip_ptr=skip,
            mix_ptr=mix, pool=0 if bias is None else len(bias), bias_stride=0 if bias is None else bias.stride(0),
            TILES=tiles, S=length if cos is None else len(cos), ROWS=rows,
            N=outputs, K=inputs, BM=m, BN=n, BK=k, PIECES=tile.pieces,
            TRANSPOSED=transposed, EPILOGUE=epilogue,
            HEAD=head_dim, Q=queries, G=keys, EPS=EPS, NORMED=norm is not None,
            WIDTH=inputs if epilogue in (SQUARE, HEADS) else outputs, BLOCKS=0 if norm is None else len(sums),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if out is not flat:
        flat.copy_(out)
    if boundary is not None and dup is not x_out:
        x_out.copy_(dup)
    return result
