"""What the launches share: the number of programs, and how a tile is cleared, cut, finished and stored."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..dispatch import multiprocessors, next_power_of_2, padded_rank
from ..dot import multiply
from ..linear.product import relu, times_slope
from ..tile import halves

PIECES = 8
"""Pieces, side by side, in which a tile leaves: shared memory for one of them is enough."""


def of_three(projections: Sequence, nothing: Any = None) -> Sequence:
    """What the kernels take for q, k and v: as it is, or the one product as q."""
    return (*projections, nothing, nothing) if len(projections) == 1 else projections


def described(projections: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The projections, of which one without numbers has no descriptor: the first in its place. Nobody reads it."""
    return [each if each.numel() else projections[0] for each in projections]


def programs(device: torch.device, tiles: int, each: int = 1) -> int:
    """`each` of a multiprocessor, or one a tile where there are fewer tiles."""
    return min(each * multiprocessors(device), tiles)


def is_stacked(rank: int, groups: int) -> bool:
    """Whether the backward takes the rows of A of all projections at once: where they are few."""
    return groups == 3 and 3 * rank <= 64


def stacked_rank(rank: int, groups: int) -> int:
    """Rows of A that the backward takes at once, as a power of two."""
    return max(32, next_power_of_2(3 * rank)) if is_stacked(rank, groups) else padded_rank(rank)


@triton.jit
def slot_in_pool(slot, count):
    """`slot` as the copy engine takes it; -1, of which it reads zeros, for a slot outside the pool."""
    return tl.where((slot >= 0) & (slot < count), slot, -1).to(tl.int32)


@triton.jit
def cleared(M: tl.constexpr, N: tl.constexpr, dtype: tl.constexpr, K: tl.constexpr = 16):
    """Zeros [M, N] in fp32 for the sums of the next tile.

    In 16 bits a matrix instruction writes them. Where other instructions write a register that matrix instructions add
    to over the edge of the loop, ptxas makes all of them wait for one another. So does a copy: two sums of one size
    want another K each, or the compiler makes one product for both.
    """
    if dtype == tl.float32:
        return tl.zeros((M, N), tl.float32)
    else:
        return tl.dot(tl.zeros((M, K), dtype), tl.zeros((K, N), dtype))


@triton.jit
def begun(bias_ptr, n, COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, dtype: tl.constexpr):
    """The sums [M, N] of a tile before its first step: zeros, or those of its columns' bias, from `n` on of COUNT.

    A product with 1, by matrix instructions as in :func:`cleared`, and while the sums of the tile before are gone:
    added to a finished tile it spills.
    """
    if bias_ptr is None:
        return cleared(M, N, dtype)
    else:
        column, r = n + tl.arange(0, N), tl.arange(0, 16)
        is_first = (column < COUNT)[:, None] & (r == 0)[None, :]
        bias = tl.load(bias_ptr + column[:, None] + r * 0, is_first, other=0.0)
        one = (tl.arange(0, M) >= 0)[:, None] & (r == 0)[None, :]
        return multiply(one.to(dtype), bias.T)


@triton.jit
def eighths(tile, M: tl.constexpr, N: tl.constexpr):
    """The PIECES of `tile` [M, N], from left to right."""
    left, right = halves(tile, M, N)
    a, b = halves(left, M, N // 2)
    c, d = halves(right, M, N // 2)
    a0, a1 = halves(a, M, N // 4)
    b0, b1 = halves(b, M, N // 4)
    c0, c1 = halves(c, M, N // 4)
    d0, d1 = halves(d, M, N // 4)
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit
def _store_square(out_d, piece, b, s, n, M: tl.constexpr, N: tl.constexpr):
    piece = relu(piece)
    out_d.store([b, s, n], (piece * piece).to(out_d.dtype).reshape(1, M, N))


@triton.jit
def store_squares(out_d, tile, b, s, n, M: tl.constexpr, N: tl.constexpr):
    """As :func:`store_tile`, relu(tile)^2."""
    W: tl.constexpr = N // 8
    p0, p1, p2, p3, p4, p5, p6, p7 = eighths(tile, M, N)
    _store_square(out_d, p0, b, s, n, M, W)
    _store_square(out_d, p1, b, s, n + W, M, W)
    _store_square(out_d, p2, b, s, n + 2 * W, M, W)
    _store_square(out_d, p3, b, s, n + 3 * W, M, W)
    _store_square(out_d, p4, b, s, n + 4 * W, M, W)
    _store_square(out_d, p5, b, s, n + 5 * W, M, W)
    _store_square(out_d, p6, b, s, n + 6 * W, M, W)
    _store_square(out_d, p7, b, s, n + 7 * W, M, W)


@triton.jit
def _store_slope(out_d, kept_d, piece, b, s, n, M: tl.constexpr, N: tl.constexpr):
    """A piece [M, N] of a gradient of relu(u)^2 leaves as one of u; `kept_d` is what :func:`times_slope` reads."""
    piece = times_slope(piece, kept_d.load([b, s, n]).reshape(M, N))
    out_d.store([b, s, n], piece.to(out_d.dtype).reshape(1, M, N))


@triton.jit
def store_slopes(out_d, kept_d, tile, b, s, n, M: tl.constexpr, N: tl.constexpr):
    """As :func:`store_tile`, each number times the slope of relu(u)^2."""
    W: tl.constexpr = N // 8
    p0, p1, p2, p3, p4, p5, p6, p7 = eighths(tile, M, N)
    _store_slope(out_d, kept_d, p0, b, s, n, M, W)
    _store_slope(out_d, kept_d, p1, b, s, n + W, M, W)
    _store_slope(out_d, kept_d, p2, b, s, n + 2 * W, M, W)
    _store_slope(out_d, kept_d, p3, b, s, n + 3 * W, M, W)
    _store_slope(out_d, kept_d, p4, b, s, n + 4 * W, M, W)
    _store_slope(out_d, kept_d, p5, b, s, n + 5 * W, M, W)
    _store_slope(out_d, kept_d, p6, b, s, n + 6 * W, M, W)
    _store_slope(out_d, kept_d, p7, b, s, n + 7 * W, M, W)


@triton.jit
def store_tile(out_d, tile, b, s, n, M: tl.constexpr, N: tl.constexpr):
    """Rounds `tile` [M, N] and stores it piece by piece."""
    W: tl.constexpr = N // 8
    p0, p1, p2, p3, p4, p5, p6, p7 = eighths(tile.to(out_d.dtype), M, N)
    out_d.store([b, s, n], p0.reshape(1, M, W))
    out_d.store([b, s, n + W], p1.reshape(1, M, W))
    out_d.store([b, s, n + 2 * W], p2.reshape(1, M, W))
    out_d.store([b, s, n + 3 * W], p3.reshape(1, M, W))
    out_d.store([b, s, n + 4 * W], p4.reshape(1, M, W))
    out_d.store([b, s, n + 5 * W], p5.reshape(1, M, W))
    out_d.store([b, s, n + 6 * W], p6.reshape(1, M, W))
    out_d.store([b, s, n + 7 * W], p7.reshape(1, M, W))
