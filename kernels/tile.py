"""What kernels that read tiles share: how the copy engine moves one, a tile cut in half, and tables of unit length."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def tiled(tensor: Tensor, *block: int) -> TensorDescriptor:
    """How the copy engine moves blocks of `tensor`: outside of it, it reads zeros and stores nothing."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


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
