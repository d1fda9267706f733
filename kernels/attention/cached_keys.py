"""Cached keys and values as the kernels of attention read them: a ring of cells a slot.

Position p of a document lies in cell p mod capacity. What is not read is not loaded either: whatever a cell holds that
was never written, NaN included, stays there.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Cache(NamedTuple):
    """Keys and values of earlier tokens, and who reads how many of them."""

    k: Tensor
    """[slots, capacity, G, d]"""
    v: Tensor
    """[slots, capacity, G, d], with the strides of k"""
    slots: Tensor
    """int32 or int64 [B]: each document's; any that names none reads nothing"""
    filled: Tensor
    """int32 or int64 [B]: tokens of the document before this chunk"""
    window: int
    """tokens, those of the chunk among them; those before the chunk are no more than the capacity"""

    @classmethod
    def of(cls, k: Tensor | None, v: Tensor, slots: Tensor, filled: Tensor, window: int) -> "Cache | None":
        """None where there is none."""
        return None if k is None else cls(k, v, slots.contiguous(), filled.contiguous(), window)

    def arguments(self) -> dict[str, Any]:
        """Those of a kernel."""
        slots, capacity = self.k.shape[:2]
        sizes = slots, max(capacity, 1), self.window
        return dict(zip(NO_CACHE, (*self[:4], *sizes, *self.k.stride()), strict=True))


NO_CACHE = dict.fromkeys((
    "cache_k_ptr", "cache_v_ptr", "slots_ptr", "filled_ptr", "SLOTS", "CAPACITY", "WINDOW",
    "slot_stride", "cell_stride", "group_stride", "cell_stride_d",
))  # fmt: skip
"""The arguments of a kernel without a cache."""


@triton.jit
def ring_of(
    k_ptr, v_ptr, slots_ptr, filled_ptr, SLOTS, CAPACITY, WINDOW, slot_stride, stride, group_stride, stride_d, b, g, T,
    BN: tl.constexpr,
):  # fmt: skip
    """What a chunk of T tokens of document b reads of head g, in the order of positions: keys, values, first cell,
    number of cells, those of whole blocks, capacity and the strides of cells and of elements.
    """
    slot = tl.load(slots_ptr + b).to(tl.int64)
    filled = tl.load(filled_ptr + b).to(tl.int64)
    named = (slot >= 0) & (slot < SLOTS)
    first = tl.maximum(filled + T - WINDOW, 0)
    count = tl.where(named, tl.maximum(filled - first, 0), 0)
    slot, first, count = tl.where(named, slot, 0), (first % CAPACITY).to(tl.int32), count.to(tl.int32)
    offset = slot * slot_stride + g * group_stride
    whole = count // BN * BN
    return k_ptr + offset, v_ptr + offset, first, count, whole, CAPACITY, stride, stride_d


@triton.jit
def load_cells(x_ptr, ring, n, MASK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """The cells from the n-th on [BN, D], counted from the first around the ring; with MASK zeros past the last."""
    _, _, first, count, _, CAPACITY, stride, stride_d = ring
    key = n + tl.arange(0, BN)
    cell = first + key
    cell = tl.where(cell < CAPACITY, cell, cell - CAPACITY)
    x_ptr += cell[:, None] * stride + tl.arange(0, D)[None, :] * stride_d
    return tl.load(x_ptr, mask=(key < count)[:, None], other=0.0) if MASK else tl.load(x_ptr)
