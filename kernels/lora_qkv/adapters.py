"""The adapters of a batch as the kernels read them: where they lie, or rounded and padded copies."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import cdiv, is_aligned, is_packed
from ..launch import launched
from .tiles import is_stacked, stacked_rank


class Adapters(NamedTuple):
    """a [count, 3R, D] (of one product [count, R, D]) and b [count, N, R] of x's dtype, as they were given; `slots` [B]
    names each document's, or is None where document b has adapter b.

    Where they had to be copied, one for each document: b is [B, N, RT], a row's R numbers at the place of its
    projection, where projections are stacked, else at the start; and zeros elsewhere.
    """

    a: Tensor
    b: Tensor
    rank: int
    slots: Tensor | None

    @property
    def is_packed(self) -> bool:
        return self.b.size(2) != self.rank


def adapters_of(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None,
    sizes: Sequence[int],
    packed: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Adapters:
    """Those of x's documents, in place where the kernels can read them: of x's dtype, on 16 bytes; else in `packed`.

    With `scale` fp32 [slots] or `ranks` int32 [slots] they are packed: B times the scale, zeros from the rank on.
    """
    is_readable = all(lora.size(0) and is_packed(lora) and is_aligned(lora) for lora in (lora_a, lora_b))
    if lora_a.dtype == x.dtype and is_readable and scale is None and ranks is None:
        return Adapters(lora_a.flatten(1, -2), lora_b, lora_b.size(2), slots)
    packed = packed or empty_packed(x, lora_b, len(sizes))
    launch_pack(lora_a, lora_b, slots, sizes, scale, ranks, *packed)
    return Adapters(*packed, lora_b.size(2), None)


def empty_packed(x: Tensor, lora_b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Memory for the adapters of x's documents: A [B, 3R, D], or [B, R, D], and B [B, N, RT], in x's dtype."""
    (batch, _, width), (_, rows, rank) = x.shape, lora_b.shape
    return x.new_empty(batch, groups * rank, width), x.new_empty(batch, rows, stacked_rank(rank, groups))


PACK = 4096
"""Numbers that a program of the packing launch rounds."""


@launched
@triton.jit
def _pack_kernel(
    a_ptr, b_ptr, packed_a_ptr, packed_b_ptr, slots_ptr, scale_ptr, ranks_ptr, a_stride, b_stride, packed_a_stride,
    packed_b_stride, count, A, N, D,
    NQ: tl.constexpr, NK: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, STACKED: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block, b): BLOCK of the A numbers of document b's A, then of the N RT of its B; zeros without one.

    PADDED: more rows of A leave than come. They are zeros.
    """
    blocks = tl.cdiv(A, BLOCK)
    every = blocks + tl.cdiv(N * RT, BLOCK)
    block, b = tl.program_id(0) % every, (tl.program_id(0) // every).to(tl.int64)
    slot = b
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    named = (slot >= 0) & (slot < count)
    rank = R
    if ranks_ptr is not None:
        rank = tl.load(ranks_ptr + slot, named, other=0)
    if block < blocks:
        i = block * BLOCK + tl.arange(0, BLOCK)
        is_there = named & (i < A)
        if PADDED or ranks_ptr is not None:
            is_there = is_there & (i // D < rank)
        a = tl.load(a_ptr + slot * a_stride + i, is_there, other=0.0)
        tl.store(packed_a_ptr + b * packed_a_stride + i, a, i < A)
    else:
        i = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        n = i // RT
        r = i % RT
        if STACKED:
            r -= ((n >= NQ).to(tl.int32) + (n >= NQ + NK).to(tl.int32)) * R
        lora_b = tl.load(b_ptr + slot * b_stride + n * R + r, named & (n < N) & (r >= 0) & (r < rank), other=0.0)
        if scale_ptr is not None:
            lora_b = lora_b.to(tl.float32) * tl.load(scale_ptr + slot, named, other=0.0)
        tl.store(packed_b_ptr + b * packed_b_stride + i, lora_b, n < N)


def launch_pack(
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None,
    sizes: Sequence[int],
    scale: Tensor | None,
    ranks: Tensor | None,
    packed_a: Tensor,
    packed_b: Tensor,
) -> None:
    """Writes what :func:`empty_packed` made, or for one product a part of it: more rows and ranks are zeros there."""
    lora_a, lora_b = (lora if is_packed(lora) else lora.contiguous() for lora in (lora_a, lora_b))
    (batch, rows, stacked), rank, groups = packed_b.shape, lora_b.size(2), len(sizes)
    numbers = packed_a.size(1) * packed_a.size(2)
    if batch:
        _pack_kernel[((cdiv(numbers, PACK) + cdiv(rows * stacked, PACK)) * batch,)](
            a_ptr=lora_a, b_ptr=lora_b, packed_a_ptr=packed_a, packed_b_ptr=packed_b, slots_ptr=slots,
            scale_ptr=scale, ranks_ptr=ranks, a_stride=lora_a.stride(0), b_stride=lora_b.stride(0),
            packed_a_stride=packed_a.stride(0), packed_b_stride=packed_b.stride(0), count=lora_a.size(0), A=numbers,
            N=rows, D=packed_a.size(2), NQ=sizes[0], NK=sizes[-2 % groups], R=rank, RT=stacked,
            STACKED=is_stacked(rank, groups), PADDED=packed_a.size(1) > groups * rank, BLOCK=PACK, num_warps=8,
        )  # fmt: skip


def unpacked(packed_a: Tensor, packed_b: Tensor, rank: int, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A [B, 3, R, D] and B [B, N, R] of what was packed."""
    parts = packed_b.split(list(sizes), dim=1)
    places = [i * rank if is_stacked(rank, 3) else 0 for i in range(3)]
    lora_b = torch.cat([part[..., i : i + rank] for i, part in zip(places, parts, strict=True)], dim=1)
    return packed_a.unflatten(1, (3, rank)), lora_b
