"""Many small tensors into the columns of one, in few launches: gradients of adapters into their pool.

    total[:, start : start + n] += part.flatten(1)        for each part [rows, ...] of n numbers a row; or = it

total fp32 [rows, P], contiguous; parts fp32, each on the columns that begin at its start, and no two on the same. A
launch takes up to PARTS of them; the 420 of a model's adapters, one launch each, cost a step of 134 ms 3 to 5
(docs/notes/lora.md). A part whose rows are no whole pieces of memory is copied first. 12 bytes a number, 8 where
columns are overwritten. Each is one addition: the bits are those of `add_`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import cdiv, device_of, resolve_backend
from .launch import launched

PARTS = 16
BLOCK = 2048
"""Numbers of a program. 16 parts of 64 rows, 69 MB with what is read, take 17.5 us on an NVIDIA H200, 4.0 TB/s
(nvidia-h200/tuning/adapters-14-profile.txt). No other was tried."""


@launched
@triton.jit
def _write_columns(
    total_ptr, parts, starts, strides, sizes, width, PLACES, BLOCKS, ADDS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (part, place: row and block of it)."""
    place = tl.program_id(0) % PLACES
    row, first = (place // BLOCKS).to(tl.int64), place % BLOCKS * BLOCK
    for part in tl.static_range(PARTS):
        if tl.program_id(0) // PLACES == part and first < sizes[part]:
            i = first + tl.arange(0, BLOCK)
            mask = i < sizes[part]
            places = total_ptr + row * width + starts[part] + i
            values = tl.load(parts[part] + row * strides[part] + i, mask=mask)
            if ADDS:
                values += tl.load(places, mask=mask)
            tl.store(places, values, mask=mask)


def add_columns_(total: Tensor, parts: Sequence[Tensor], starts: Sequence[int], backend: str | None = None) -> None:
    """Add each of `parts` fp32 [rows, ...] to the columns of `total` fp32 [rows, P] from its entry of `starts` on.

    Example: add_columns_(torch.zeros(3, 20), [torch.ones(3, 2, 4)], [8])
    """
    _write(total, parts, starts, True, backend)


def copy_columns_(total: Tensor, parts: Sequence[Tensor], starts: Sequence[int], backend: str | None = None) -> None:
    """As :func:`add_columns_`, in the place of what those columns hold.

    Example: copy_columns_(torch.zeros(3, 20), [torch.ones(3, 2, 4)], [8])
    """
    _write(total, parts, starts, False, backend)


def _write(total: Tensor, parts: Sequence[Tensor], starts: Sequence[int], adds: bool, backend: str | None) -> None:
    if resolve_backend(backend, total) == "reference":
        for part, start in zip(parts, starts, strict=True):
            columns = total[:, start : start + part[0].numel()].unflatten(1, part.shape[1:])
            (columns.add_ if adds else columns.copy_)(part)
        return
    with device_of(total):
        for first in range(0, len(parts), PARTS):
            _launch(total, parts[first : first + PARTS], starts[first : first + PARTS], adds)


def _launch(total: Tensor, parts: Sequence[Tensor], starts: Sequence[int], adds: bool) -> None:
    parts = [part if part[0].is_contiguous() else part.contiguous() for part in parts]
    sizes, strides = [part[0].numel() for part in parts], [part.stride(0) for part in parts]
    blocks, missing = cdiv(max(sizes), BLOCK), PARTS - len(parts)  # one kernel for any number of parts
    places = len(total) * blocks
    _write_columns[(places * len(parts),)](
        total_ptr=total, parts=(*parts, *parts[:1] * missing), starts=(*starts, *(0,) * missing),
        strides=(*strides, *(0,) * missing), sizes=(*sizes, *(0,) * missing), width=total.size(1), PLACES=places,
        BLOCKS=blocks, ADDS=adds, PARTS=PARTS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
