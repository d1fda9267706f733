"""The table by which the kernels of edges.py walk over matrices of any shapes: pieces of 64 x 64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import round_up

PIECE = 64
MOST_TENSORS = 64
"""Tensors a launch: three pointers of each are kernel arguments, of which CUDA takes 4 KiB."""
MATRIX_FIELDS = 16

Layouts = tuple[tuple[torch.Size, tuple[int, ...]], ...]
"""Sizes and strides of tensors [B, rows, columns]."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of all matrices, on the device."""

    table: Tensor
    """int32 [pieces, 4]: tensor within its launch, matrix, first row, first column."""
    matrices: Tensor
    """int64 [matrices, MATRIX_FIELDS]; see :func:`pieces_of`."""
    launches: tuple[tuple[int, int, int, int], ...]
    """First tensor, tensors, first piece and pieces of each launch."""


def pieces_of(layouts: Layouts, unit: int, targets: Sequence[int], device: torch.device) -> Pieces:
    """Pieces of tensors [B, rows, columns], padded to `unit`.

    A matrix: 0 offset in its tensor, 1 row stride, 2 column stride, 3 rows, 4 columns, 5 its target (the arena row of
    its X, or the row stride of its update), 6 whether it is tall, 7 padded rows, 8 padded columns, 9 first piece,
    10 pieces.
    """
    table, matrices, launches = [], [], []
    first = 0
    for index, ((count, rows, columns), strides) in enumerate(layouts):
        if index % MOST_TENSORS == 0:
            launches.append([index, 0, first, 0])
        padded = [round_up(side, unit) for side in (rows, columns)]
        r, c = torch.meshgrid(*(torch.arange(0, side, PIECE) for side in padded), indexing="ij")
        for q in range(count):
            about = (targets[len(matrices)], int(rows > columns))
            ahead = (q * strides[0], strides[1], strides[2], rows, columns, *about, *padded, first, r.numel())
            matrices.append([*ahead, *[0] * (MATRIX_FIELDS - len(ahead))])
            fixed = [torch.full_like(r, value) for value in (index % MOST_TENSORS, len(matrices) - 1)]
            table.append(torch.stack([f.reshape(-1) for f in (*fixed, r, c)], dim=1))
            first += r.numel()
        launches[-1][1] += 1
        launches[-1][3] = first - launches[-1][2]
    return Pieces(
        torch.cat(table).to(torch.int32).to(device),
        torch.tensor(matrices, dtype=torch.int64).to(device),
        tuple(map(tuple, launches)),
    )
