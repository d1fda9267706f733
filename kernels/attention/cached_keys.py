"""Cached keys and values as the kernels of attention read them: a ring of cells a slot, and the loops over it.

Position p of a document lies in cell p mod capacity. What is not read is not loaded either: whatever a cell holds that
was never written, NaN included, stays there.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..dot import multiply, multiply_add


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

    def arguments(self) -> tuple:
        """Those of a kernel, from `cache_k_ptr` to `cell_stride_d`."""
        slots, capacity = self.k.shape[:2]
        return *self[:4], slots, max(capacity, 1), self.window, *self.k.stride()


NO_CACHE = (None,) * 11
"""The arguments of a kernel without a cache."""


@triton.jit
def _range(slots_ptr, filled_ptr, b, T, SLOTS, CAPACITY, WINDOW):
    """(slot, first cell, number of cells) that a chunk of T tokens of document b reads, in the order of positions."""
    slot = tl.load(slots_ptr + b).to(tl.int64)
    filled = tl.load(filled_ptr + b).to(tl.int64)
    named = (slot >= 0) & (slot < SLOTS)
    first = tl.maximum(filled + T - WINDOW, 0)
    count = tl.where(named, tl.maximum(filled - first, 0), 0)
    return tl.where(named, slot, 0), (first % CAPACITY).to(tl.int32), count.to(tl.int32)


@triton.jit
def _load_cells(
    x_ptr, first, n, count, CAPACITY, stride, stride_d, MASK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):
    """The cells from the n-th on [BN, D], counted from cell `first` around the ring; with MASK zeros past `count`."""
    key = n + tl.arange(0, BN)
    cell = first + key
    cell = tl.where(cell < CAPACITY, cell, cell - CAPACITY)
    x_ptr += cell[:, None] * stride + tl.arange(0, D)[None, :] * stride_d
    return tl.load(x_ptr, mask=(key < count)[:, None], other=0.0) if MASK else tl.load(x_ptr)


@triton.jit
def _attend_loop(
    acc, total, top, q, k_ptr, v_ptr, first, start, stop, count, CAPACITY, stride, stride_d, scale,
    MASK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    for n in tl.range(start, stop, BN):
        k = _load_cells(k_ptr, first, n, count, CAPACITY, stride, stride_d, MASK, BN, D)
        s = multiply(q, k.T)
        if MASK:
            s = tl.where((n + tl.arange(0, BN) < count)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.math.exp2(s * scale - new_top[:, None])
        rescale = tl.math.exp2(top - new_top)
        v = _load_cells(v_ptr, first, n, count, CAPACITY, stride, stride_d, MASK, BN, D)
        p = p.to(v.dtype)
        total = multiply_add(p, tl.full((BN, 8), 1.0, p.dtype), total * rescale[:, None])
        acc = multiply_add(p, v, acc * rescale[:, None])
        top = new_top
    return acc, total, top


@triton.jit
def attend_cache(
    acc, total, top, q, k_ptr, v_ptr, slots_ptr, filled_ptr, SLOTS, CAPACITY, WINDOW,
    slot_stride, stride, group_stride, stride_d, b, g, T, scale, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The cached keys joined to what a tile has seen, as `_attend` of forward.py joins those of the chunk. Only the
    last block of them is masked.
    """
    slot, first, count = _range(slots_ptr, filled_ptr, b, T, SLOTS, CAPACITY, WINDOW)
    offset = slot * slot_stride + g * group_stride
    whole = count // BN * BN
    acc, total, top = _attend_loop(
        acc, total, top, q, k_ptr + offset, v_ptr + offset, first, 0, whole, count, CAPACITY, stride, stride_d, scale,
        False, BN, D,
    )  # fmt: skip
    acc, total, top = _attend_loop(
        acc, total, top, q, k_ptr + offset, v_ptr + offset, first, whole, count, count, CAPACITY, stride, stride_d,
        scale, True, BN, D,
    )  # fmt: skip
    return acc, total, top


@triton.jit
def _dq_loop(
    dq, q, dout, lse, delta, k_ptr, v_ptr, first, start, stop, count, CAPACITY, stride, stride_d, scale,
    MASK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    for n in tl.range(start, stop, BN):
        k = _load_cells(k_ptr, first, n, count, CAPACITY, stride, stride_d, MASK, BN, D)
        v = _load_cells(v_ptr, first, n, count, CAPACITY, stride, stride_d, MASK, BN, D)
        s = multiply(q, k.T)
        dp = multiply(dout, v.T)
        p = tl.math.exp2(s * scale - lse[:, None])
        if MASK:
            p = tl.where((n + tl.arange(0, BN) < count)[None, :], p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = multiply_add(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def add_dq_of_cache(
    dq, q, dout, lse, delta, k_ptr, v_ptr, slots_ptr, filled_ptr, SLOTS, CAPACITY, WINDOW,
    slot_stride, stride, group_stride, stride_d, b, g, T, scale, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dq and the cached keys' share of it; they get no gradient themselves."""
    slot, first, count = _range(slots_ptr, filled_ptr, b, T, SLOTS, CAPACITY, WINDOW)
    offset = slot * slot_stride + g * group_stride
    whole = count // BN * BN
    dq = _dq_loop(
        dq, q, dout, lse, delta, k_ptr + offset, v_ptr + offset, first, 0, whole, count, CAPACITY, stride, stride_d,
        scale, False, BN, D,
    )  # fmt: skip
    return _dq_loop(
        dq, q, dout, lse, delta, k_ptr + offset, v_ptr + offset, first, whole, count, count, CAPACITY, stride,
        stride_d, scale, True, BN, D,
    )  # fmt: skip
