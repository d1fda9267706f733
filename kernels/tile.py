"""What kernels that read tiles share: how the copy engine moves one, a tile cut in half, and tables of unit length."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def tiled(tensor: Tensor, *block: int) -> TensorDescriptor:
    """How the copy engine moves blocks of `tensor`: outside of it, it reads zeros and stores nothing."""
    return descriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def descriptor(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """TensorDescriptor(...) without its checks, a microsecond or two of every launch.

    The copy engine can reach the tensor: :func:`klora.kernels.dispatch.is_aligned`; `block` is powers of two.
    """
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = tensor, shape, strides, block
    return made


UNIT = tl.constexpr(2.0**-21)
"""Up to here a tile's :func:`off_unit` is rounding: that of unit tables is below 2^-22."""


@triton.jit
def off_unit(cos, sin):
    """The largest |cos^2 + sin^2 - 1| of a tile of rotary tables."""
    return tl.max(tl.abs(cos * cos + (sin * sin - 1.0)))


@triton.jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of `tile` [M, N]."""
    return tl.split(tile.reshape(M, 2, N // 2).permute(0, 2, 1))


@triton.jit
def row_dots(a, b):
    """sum(a * b) of each row of two tiles [M, N] in fp32 -> [M]: the same bits in every lane that holds a row's sum.

    Where a lane has one element, the compiler would fuse its product with the addition of another lane's: one of the
    two is rounded then, the other is not, and each lane has another sum. All of them store it where a layout changes,
    and no one says who wins.
    """
    return tl.sum(tl.fma(a, b, 0.0), 1)


@triton.jit
def rotate(left, right, cos, sin):
    """The halves of heads, rotated by the angles of the tables."""
    return left * cos - right * sin, right * cos + left * sin


@triton.jit
def unrotate(left, right, cos, sin):
    """As :func:`rotate`, by the opposite angles; for tables of length 1 its inverse."""
    return left * cos + right * sin, right * cos - left * sin


@triton.jit
def added(sums_ptr, row, mask, ROWS, BLOCKS: tl.constexpr):
    """sums [BLOCKS, ROWS] of the rows, added up in their order."""
    total = tl.load(sums_ptr + row, mask=mask, other=0.0)
    for _ in tl.static_range(1, BLOCKS):
        sums_ptr += ROWS
        total += tl.load(sums_ptr + row, mask=mask, other=0.0)
    return total


@triton.jit
def rstd_of(squares_ptr, row, mask, ROWS, D: tl.constexpr, EPS: tl.constexpr, BLOCKS: tl.constexpr):
    """1 / rms of rows [D], from the sums of their squares over blocks of D, [BLOCKS, ROWS]."""
    # The approximate rsqrt would be the largest error of fp32.
    return tl.div_rn(1.0, tl.sqrt_rn(added(squares_ptr, row, mask, ROWS, BLOCKS) * (1.0 / D) + EPS))


@triton.jit
def norm_rotate(left, right, cos, sin, gain, square, HEAD: tl.constexpr, EPS: tl.constexpr, IS_EXACT: tl.constexpr):
    """Heads [M, heads, HEAD/2] twice, normed, rotated and times `gain` [heads]; and 1 / rms of each [M, heads].

    `square` [M] is mean(x^2) + eps of an unnormed row x that the heads are products of, or None. Their norm takes the
    division by its root away, but for eps, which is in the row's own measure: 1 / rms is that of the divided heads.
    The approximate rsqrt would be the largest error of fp32: IS_EXACT does without it.
    """
    mean = tl.sum(left * left + right * right, 2) * (1.0 / HEAD)
    mean += EPS if square is None else EPS * square[:, None]
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean)) if IS_EXACT else tl.rsqrt(mean)
    rstd = factor
    if square is not None:
        rstd = tl.sqrt_rn(tl.div_rn(square[:, None], mean)) if IS_EXACT else tl.sqrt_rn(square)[:, None] * factor
    scale = (factor * gain[None, :])[:, :, None]
    left, right = rotate(left, right, cos, sin)
    return left * scale, right * scale, rstd
