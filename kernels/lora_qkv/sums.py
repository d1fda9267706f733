"""Sums over the documents of a slot, for dA and dB: each document's is one program's, whoever else has its slot.

Where one document has a slot, its sum is the gradient. What several have is kept in `parts`, a row of fp32 for each
document, and the program of a slot that ends last adds its parts up in the order of the batch: the same bits in every
run, and no document waits for another. `ended` counts, in the row of the slot's first document.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIDES = "parts_stride", "ended_stride"
"""Of rows, by the batch's launches: a kernel is not compiled again for them."""

Sums = dict[str, Tensor | int | None]
"""What a kernel takes: parts fp32 [B, numbers of a slot], ended int32 [B, tiles of a document], and their strides."""

NOTHING: Sums = {"parts_ptr": None, "ended_ptr": None} | dict.fromkeys(STRIDES, 0)
"""Where no slot is shared."""


def can_share(slots: Tensor | None, x: Tensor) -> bool:
    """Whether two documents of x [B, S, D] may have one slot. None gives each its own."""
    return slots is not None and x.size(0) > 1


def sums_of(x: Tensor, one: tuple[int, int], other: tuple[int, int]) -> tuple[Sums, Sums]:
    """For two launches, by the numbers of a slot and the tiles of a document. To be called before either of them."""
    (numbers, tiles), (more, others) = one, other
    tiles += -tiles % 4  # 16 bytes, as kernels take a pointer to begin at
    parts = x.new_empty(x.size(0), numbers + more, dtype=torch.float32)
    ended = x.new_zeros(x.size(0), tiles + others, dtype=torch.int32)
    strides = {"parts_stride": numbers + more, "ended_stride": tiles + others}
    first = {"parts_ptr": parts, "ended_ptr": ended, **strides}
    return first, {"parts_ptr": parts[:, numbers:], "ended_ptr": ended[:, tiles:], **strides}


@triton.jit
def slots_of(slots_ptr, b, count, B, BP: tl.constexpr):
    """(slot of document b, slots of the whole batch); -1 for a document without an adapter."""
    j = tl.arange(0, BP)
    if slots_ptr is None:
        slot = tl.zeros((), tl.int64) + b
        every = j.to(tl.int64)
    else:
        slot = tl.load(slots_ptr + b).to(tl.int64)
        every = tl.load(slots_ptr + j, mask=j < B, other=-1).to(tl.int64)
    return tl.where(slot < count, slot, -1), every


@triton.jit
def following(every, slot, b, B, BP: tl.constexpr):
    """The first document after b that has this slot; B if there is none."""
    j = tl.arange(0, BP)
    return tl.min(tl.where((every == slot) & (j > b) & (j < B), j, B))


@triton.jit
def documents_of(every, slot, B, BP: tl.constexpr):
    """How many documents have this slot."""
    j = tl.arange(0, BP)
    return tl.sum(((every == slot) & (j < B)).to(tl.int32))


@triton.jit
def ends_last(ended_ptr, count):
    """Whether the others of the `count` programs of a sum have stored their parts."""
    tl.debug_barrier()  # all threads' stores, before one of them says so
    return tl.atomic_add(ended_ptr, 1, sem="acq_rel") == count - 1


@triton.jit
def add_parts(grad_ptr, parts_ptr, parts_stride, places, mask, every, slot, B, BP: tl.constexpr):
    """The gradient of a slot that several documents have. Parts come from the L2 cache, where others put them."""
    total = tl.zeros(places.shape, tl.float32)
    document = following(every, slot, -1, B, BP)
    while document < B:
        part_ptr = parts_ptr + document.to(tl.int64) * parts_stride
        total += tl.load(part_ptr + places, mask, other=0.0, cache_modifier=".cg")
        document = following(every, slot, document, B, BP)
    tl.store(grad_ptr + places, total, mask)


@triton.jit
def store_sum(
    total, places, mask, grad_ptr, parts_ptr, ended_ptr, parts_stride, ended_stride, tile, every, slot, b, B,
    BP: tl.constexpr,
):  # fmt: skip
    """Document b's sum, of the numbers `places` of the slot's gradient, which are the launch's tile `tile`."""
    if parts_ptr is None:
        tl.store(grad_ptr + places, total, mask)
    else:
        count = documents_of(every, slot, B, BP)
        if count == 1:
            tl.store(grad_ptr + places, total, mask)
        else:
            document = tl.zeros((), tl.int64) + b
            tl.store(parts_ptr + document * parts_stride + places, total, mask)
            if ends_last(ended_ptr + following(every, slot, -1, B, BP) * ended_stride + tile, count):
                add_parts(grad_ptr, parts_ptr, parts_stride, places, mask, every, slot, B, BP)
