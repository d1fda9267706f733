"""What the launches share: the projections of one input, their adapters, and which slot and rank a document has."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, is_packed, round_up
from ..dropout import FIRST, GOLDEN, SECOND, threshold

STEP = 16
"""Ranks that a matrix instruction takes at once."""

_GOLDEN, _FIRST, _SECOND = tl.constexpr(GOLDEN), tl.constexpr(FIRST), tl.constexpr(SECOND)


@dataclass(frozen=True)
class Pool:
    """The adapters of P projections of one input, and which a document has. Lists have one entry for each projection.

    What is computed for a row by one factor of an adapter is its inner row: x A^T, or dy B. The inner rows of all
    projections lie side by side, [B, S, sum], each from `starts` on, in a place of its pool's rank rounded up to
    STEP. Above the rank of the row's own adapter they are zeros.
    """

    lora_a: list[Tensor]
    """[slots, R, K] each"""
    lora_b: list[Tensor]
    """[slots, N, R]"""
    slots: Tensor | None
    scales: list[Tensor | None]
    """fp32 [slots]"""
    ranks: list[Tensor | None]
    """int32 [slots]"""
    keys: list[Tensor | None]
    """int64 [B]; without dropout None"""
    rate: float

    @classmethod
    def of(cls, lora_a, lora_b, *rest) -> "Pool":
        """With factors whose slots are contiguous."""
        packed = ([lora if is_packed(lora) else lora.contiguous() for lora in factor] for factor in (lora_a, lora_b))
        return cls(*packed, *rest)

    @cached_property
    def widest(self) -> list[int]:
        """R of each projection's pool."""
        return [b.size(2) for b in self.lora_b]

    @cached_property
    def starts(self) -> list[int]:
        places = [0]
        for rank in self.widest:
            places.append(places[-1] + round_up(rank, STEP))
        return places[:-1]

    @property
    def places(self) -> list[slice]:
        """The columns of each projection's inner rows."""
        return [slice(start, start + round_up(r, STEP)) for start, r in zip(self.starts, self.widest, strict=True)]

    @property
    def threshold(self) -> int:
        """Of dropout; 0 where there is none."""
        return threshold(self.rate) if self.keys[0] is not None else 0

    @property
    def inverse(self) -> float:
        """What an element that dropout keeps is multiplied by."""
        return 1 / (1 - self.rate) if self.threshold else 1.0


def inner_width(lora_b: Sequence[Tensor]) -> int:
    """Numbers of a row's inner rows."""
    return sum(round_up(b.size(2), STEP) for b in lora_b)


@triton.jit
def slot_and_rank(slots_ptr, ranks_ptr, b, count, R: tl.constexpr):
    """The slot of document b, and the rank of its adapter there: 0 for a document without one."""
    slot = tl.zeros((), tl.int64) + b
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    is_named = (slot >= 0) & (slot < count)
    rank = tl.where(is_named, R, 0)
    if ranks_ptr is not None:
        rank = tl.minimum(tl.maximum(tl.load(ranks_ptr + slot, is_named, other=0), 0), R)
    return slot, rank


def variants(ranks: int) -> int:
    """How many widths a program of up to so many ranks can have: STEP, 2 STEP, ..."""
    return (ranks // STEP).bit_length()


@triton.jit
def variant_of(ranks, VARIANTS: tl.constexpr):
    """The smallest of the widths 16 2^i that holds `ranks`, by its i; the last one where none does."""
    i = tl.zeros((), tl.int32)
    for width in tl.static_range(VARIANTS - 1):
        i += (ranks > 16 * 2**width).to(tl.int32)
    return i


@triton.jit
def load_factor(factor_ptr, j, rank, c, C: tl.constexpr, R: tl.constexpr, ACROSS: tl.constexpr):
    """Ranks `j` of columns `c` of one adapter's A [R, C], or, ACROSS, B [C, R], as [c, j]; zeros from its rank on."""
    if ACROSS:
        return tl.load(factor_ptr + c[:, None] * R + j[None, :], (c < C)[:, None] & (j < rank)[None, :], other=0.0)
    else:
        return tl.load(factor_ptr + j[:, None] * C + c[None, :], (j < rank)[:, None] & (c < C)[None, :], other=0.0).T


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * tl.full((), _FIRST, tl.uint32)
    bits = (bits ^ (bits >> 15)) * tl.full((), _SECOND, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def kept(tile, key, row, column, K: tl.constexpr, THRESHOLD: tl.constexpr):
    """`tile` [rows, columns] of a row [S, K] with zeros where its elements, at `row` and `column`, are dropped."""
    first = key.to(tl.uint32)
    second = _mix(first + tl.full((), _GOLDEN, tl.uint32))
    elements = row.to(tl.uint32)[:, None] * tl.full((), K, tl.uint32) + column.to(tl.uint32)[None, :]
    bits = _mix(_mix(elements + first) + second)
    return tl.where(bits >= tl.full((), THRESHOLD, tl.uint32), tile, 0.0)


def documents(x: Tensor, tokens: int) -> int:
    """Tiles of so many tokens in x [B, S, ..], none of which lies in two documents."""
    return x.size(0) * cdiv(x.size(1), tokens)


def dense(tensor: Tensor) -> Tensor:
    """Contiguous, at 16 bytes: loads are as wide as the width of a row allows."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def inner_like(x: Tensor, lora_b: Sequence[Tensor]) -> Tensor:
    """Memory for the inner rows of x [B, S, K]."""
    return torch.empty(*x.shape[:2], inner_width(lora_b), dtype=x.dtype, device=x.device)
