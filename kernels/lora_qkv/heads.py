"""QK norm, rotation and gain of the heads that lie in a tile of sums, before anything of it is rounded."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..tile import halves, norm_rotate


class HeadTables(NamedTuple):
    """Tables [S, head_dim/2] or each document's own [B, S, head_dim/2], gain [query heads]; fp32 and contiguous."""

    cos: Tensor
    sin: Tensor
    gain: Tensor
    head_dim: int

    @property
    def table_stride(self) -> int | None:
        """From the tables of a document to those of the next; None where all share them."""
        return self.cos.stride(0) if self.cos.dim() == 3 else None


def heads_at_once(width: int, head_dim: int) -> int:
    """Heads normed and rotated at a time in a tile of this width: those of a quarter, or all where a head is wider."""
    if not head_dim:
        return 0
    return width // 4 // head_dim if head_dim <= width // 4 else width // head_dim


@triton.jit
def gains(gain_ptr, head, count, HEADS: tl.constexpr):
    """Gain of HEADS heads from `head` on; 1 from the `count`-th on."""
    heads = head + tl.arange(0, HEADS)
    return tl.load(gain_ptr + heads, heads < count, other=1.0)


@triton.jit
def _norm_rotate(
    tile, cos, sin, gain, square, M: tl.constexpr, N: tl.constexpr, HEAD: tl.constexpr, EPS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The heads in `tile` [M, N] normed, rotated, times `gain` and rounded, as two halves; and 1 / rms of each.

    `square` is as of :func:`klora.kernels.tile.norm_rotate`. The two numbers that rotate into each other belong to one
    lane, and so splitting and joining moves nothing. A single head is not joined all the same: 850 instructions fewer
    at 4 heads a tile, and no spills.
    """
    HEADS: tl.constexpr = N // HEAD
    left, right = tl.split(tile.reshape(M, HEADS, 2, HEAD // 2).permute(0, 1, 3, 2))
    tables = cos[:, None, :], sin[:, None, :]
    left, right, rstd = norm_rotate(left, right, *tables, gain, square, HEAD, EPS, dtype == tl.float32)
    rotated_left, rotated_right = left.to(dtype), right.to(dtype)
    if HEADS == 1:
        first, second = rotated_left.reshape(M, N // 2), rotated_right.reshape(M, N // 2)
    else:
        rotated = tl.join(rotated_left, rotated_right).permute(0, 1, 3, 2).reshape(M, N)
        first, second = halves(rotated, M, N)
    return first, second, rstd


@triton.jit
def norm_rotate_whole(
    tile, cos, sin, gain, rstd_ptr, mask, head, count, square, M: tl.constexpr, N: tl.constexpr, HEAD: tl.constexpr,
    EPS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The PIECES of the rotated tile, whose heads are those from `head` on. Stores 1 / rms of them."""
    left, right, rstd = _norm_rotate(tile, cos, sin, gain, square, M, N, HEAD, EPS, dtype)
    _store_rstd(rstd_ptr, rstd, mask, head, count, N // HEAD)
    a, b = halves(left, M, N // 2)
    c, d = halves(right, M, N // 2)
    y0, y1 = halves(a, M, N // 4)
    y2, y3 = halves(b, M, N // 4)
    y4, y5 = halves(c, M, N // 4)
    y6, y7 = halves(d, M, N // 4)
    return y0, y1, y2, y3, y4, y5, y6, y7


@triton.jit
def norm_rotate_by_quarters(
    tile, cos, sin, gain_0, gain_1, gain_2, gain_3, rstd_ptr, mask, head, count, square, M: tl.constexpr,
    N: tl.constexpr, HEAD: tl.constexpr, EPS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """As :func:`norm_rotate_whole`, a quarter of the tile after the other: registers for one of them are enough."""
    Q: tl.constexpr = N // 4
    HEADS: tl.constexpr = Q // HEAD
    left, right = halves(tile, M, N)
    z0, z1 = halves(left, M, N // 2)
    z2, z3 = halves(right, M, N // 2)
    y0, y1, rstd = _norm_rotate(z0, cos, sin, gain_0, square, M, Q, HEAD, EPS, dtype)
    _store_rstd(rstd_ptr, rstd, mask, head, count, HEADS)
    y2, y3, rstd = _norm_rotate(z1, cos, sin, gain_1, square, M, Q, HEAD, EPS, dtype)
    _store_rstd(rstd_ptr, rstd, mask, head + HEADS, count, HEADS)
    y4, y5, rstd = _norm_rotate(z2, cos, sin, gain_2, square, M, Q, HEAD, EPS, dtype)
    _store_rstd(rstd_ptr, rstd, mask, head + 2 * HEADS, count, HEADS)
    y6, y7, rstd = _norm_rotate(z3, cos, sin, gain_3, square, M, Q, HEAD, EPS, dtype)
    _store_rstd(rstd_ptr, rstd, mask, head + 3 * HEADS, count, HEADS)
    return y0, y1, y2, y3, y4, y5, y6, y7


@triton.jit
def _store_rstd(rstd_ptr, rstd, mask, head, count, HEADS: tl.constexpr):
    """To rows of `count` heads each, at `head`."""
    heads = head + tl.arange(0, HEADS)
    tl.store(rstd_ptr[:, None] + heads, rstd, mask[:, None] & (heads < count)[None, :])
