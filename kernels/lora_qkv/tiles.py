"""What the launches share: descriptors, the number of programs, and how a tile is multiplied and stored."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def tiled(tensor: Tensor, *block: int) -> TensorDescriptor:
    """How the copy engine moves blocks of `tensor`: outside of it, it reads zeros and stores nothing."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def programs(device: torch.device, tiles: int) -> int:
    """One program a multiprocessor, or one a tile where there are fewer tiles."""
    return min(_multiprocessors(device), tiles)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def padded_rank(rank: int) -> int:
    """R as the tensor cores take it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rank))


def stacked_rank(rank: int) -> int:
    """Rows of the three projections' A stacked, as a power of two."""
    return max(32, triton.next_power_of_2(3 * rank))


@triton.jit
def _halves(tile, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tile.reshape(M, 2, N // 2).permute(0, 2, 1))


@triton.jit
def _store(out_d, tile, b, s, n, M: tl.constexpr, N: tl.constexpr):
    out_d.store([b, s, n], tile.to(out_d.dtype).reshape(1, M, N))


@triton.jit
def store_tile(out_d, tile, b, s, n, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr):
    """Rounds `tile` [M, N] and stores it whole or in 4 pieces side by side: less shared memory at a time."""
    if PIECES == 1:
        _store(out_d, tile, b, s, n, M, N)
    else:
        half: tl.constexpr = N // 2
        quarter: tl.constexpr = N // 4
        left, right = _halves(tile, M, N)
        first, second = _halves(left, M, half)
        _store(out_d, first, b, s, n, M, quarter)
        _store(out_d, second, b, s, n + quarter, M, quarter)
        third, fourth = _halves(right, M, half)
        _store(out_d, third, b, s, n + half, M, quarter)
        _store(out_d, fourth, b, s, n + half + quarter, M, quarter)
