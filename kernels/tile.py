"""What kernels on the copy engine share: descriptors, tensors that it can reach, and a tile cut in half."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def tiled(tensor: Tensor, *block: int) -> TensorDescriptor:
    """How the copy engine moves blocks of `tensor`: outside of it, it reads zeros and stores nothing."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def is_aligned(tensor: Tensor) -> bool:
    """Whether the copy engine can reach it: innermost stride 1, other strides and address multiples of 16 bytes."""
    steps = [tensor.data_ptr(), *(stride * tensor.itemsize for stride in tensor.stride()[:-1])]
    return tensor.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` if the copy engine can reach it or nothing is in it, else a contiguous copy."""
    fits = not tensor.numel() or is_aligned(tensor)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere 2, so that the interpreter walks several tiles a program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether this GPU has Hopper's tensor cores and copy engine."""
    return torch.cuda.get_device_capability(device)[0] == 9


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
