"""What comes before and after the products: norm, momentum, the copy into the arena, and the update of the weights.

Every kernel takes the tensors themselves, up to 64 in a launch, and a table of 64 x 64 pieces. Norms are sums of
squares of x / max|x| in fp32, piece by piece and then over the pieces of a matrix in their order: no square overflows,
and the result does not depend on what else is in the launch.

Momentum is written by the second of the two kernels that need it. The first only reads, and its sums say which
matrices are finite. So whether the step is taken is known before anything is written, at no more bytes: gradient and
momentum are read twice and momentum is written once, whichever kernel writes it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pieces as layout
from . import reference
from .pieces import Pieces

PIECE, FIELDS = tl.constexpr(layout.PIECE), tl.constexpr(layout.MATRIX_FIELDS)
SHRINK = tl.constexpr(reference.SHRINK)
TINY = tl.constexpr(1e-30)
"""Entries below it count as zeros in a norm, to which EPS is added anyway; the inverse of any other is finite."""


@triton.jit
def _pointers(tensors, which, offsets, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers into the tensor of number `which`."""
    address = tensors[0].to(tl.int64)
    for index in tl.static_range(1, len(tensors)):
        address = tl.where(which == index, tensors[index].to(tl.int64), address)
    pointers = address.to(tl.pointer_type(DTYPE)) + offsets
    if VECTOR > 1:
        pointers = tl.multiple_of(pointers, [1, 16])
    return pointers


@triton.jit
def _place(table_ptr, matrices_ptr, piece):
    """Tensor, matrix, offsets of a piece's elements, and which of them exist."""
    which = tl.load(table_ptr + piece * 4)
    matrix = tl.load(table_ptr + piece * 4 + 1)
    row = tl.multiple_of(tl.load(table_ptr + piece * 4 + 2), PIECE)
    column = tl.multiple_of(tl.load(table_ptr + piece * 4 + 3), PIECE)
    about = matrices_ptr + matrix * FIELDS
    r = row + tl.arange(0, PIECE)
    c = column + tl.arange(0, PIECE)
    return which, matrix, about, row, column, r, c


@triton.jit
def _offsets(about, r, c, UNIT: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of rows r and columns c. UNIT: columns lie side by side; VECTOR > 1: in whole vectors of 16 bytes."""
    offsets = tl.load(about) + r.to(tl.int64)[:, None] * tl.load(about + 1)
    columns = tl.load(about + 4)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    offsets += c[None, :] if UNIT else c.to(tl.int64)[None, :] * tl.load(about + 2)
    return offsets, (r < tl.load(about + 3))[:, None] & (c < columns)[None, :]


@triton.jit
def _direction(g, m, rate, NESTEROV: tl.constexpr, MOMENTUM_DTYPE: tl.constexpr):
    """SHRINK times what is orthogonalised, and the momentum mu m + g as it is stored."""
    x = SHRINK * g
    m = (rate * m + g).to(MOMENTUM_DTYPE)
    if NESTEROV:
        x += SHRINK * rate * m.to(tl.float32)
    else:
        x = SHRINK * m.to(tl.float32)
    return x, m


@triton.jit
def _measure(
    tensors, momenta, table_ptr, matrices_ptr, parts_ptr, finite_ptr, rate, first,
    DTYPE: tl.constexpr, MOMENTUM_DTYPE: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    NESTEROV: tl.constexpr, RATE_ON_DEVICE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Largest magnitude of a piece and sum of squares in its units, which is NaN if an entry is not finite.

    `finite` becomes 1.
    """
    piece = first + tl.program_id(0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    tl.store(finite_ptr, 1, mask=piece == 0)
    which, matrix, about, row, column, r, c = _place(table_ptr, matrices_ptr, piece)
    offsets, exists = _offsets(about, r, c, UNIT, VECTOR)
    g = tl.load(_pointers(tensors, which, offsets, DTYPE, VECTOR), mask=exists, other=0.0).to(tl.float32)
    if momenta is None:
        x = SHRINK * g
    else:
        if RATE_ON_DEVICE:
            rate = tl.load(rate)
        pointer = _pointers(momenta, which, offsets, MOMENTUM_DTYPE, VECTOR)
        m = tl.load(pointer, mask=exists, other=0.0).to(tl.float32)
        x, _ = _direction(g, m, rate, NESTEROV, MOMENTUM_DTYPE)
    largest = tl.max(tl.abs(x))
    x = x / tl.where(largest > TINY, largest, 1.0)
    tl.store(parts_ptr + piece * 2, largest)
    tl.store(parts_ptr + piece * 2 + 1, tl.sum(x * x))
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _inverse_norm(
    matrices_ptr, parts_ptr, inverses_ptr, finite_ptr, eps, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """Two factors whose product is 1 / (norm + eps) of a matrix; both zero where it is not finite, as `finite` then."""
    matrix = tl.program_id(0)
    first = tl.load(matrices_ptr + matrix * FIELDS + 9)
    count = tl.load(matrices_ptr + matrix * FIELDS + 10)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    largest = tl.full((BLOCK,), TINY, tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(parts_ptr + (first + index) * 2, mask=index < count, other=0.0))
    inverse = 1.0 / tl.max(largest)
    squares = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        share = tl.load(parts_ptr + (first + index) * 2, mask=index < count, other=0.0) * inverse
        of_piece = tl.load(parts_ptr + (first + index) * 2 + 1, mask=index < count, other=0.0)
        squares += share * share * of_piece
        broken = tl.where(of_piece == of_piece, broken, 1)
    is_finite = tl.max(broken) == 0
    norm = tl.sqrt(tl.sum(squares)) + eps * inverse
    tl.store(inverses_ptr + matrix * 2, tl.where(is_finite, inverse, 0.0))
    tl.store(inverses_ptr + matrix * 2 + 1, tl.where(is_finite, 1.0 / norm, 0.0))
    tl.store(finite_ptr, 0, mask=is_finite == 0)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _fill(
    tensors, momenta, table_ptr, matrices_ptr, inverses_ptr, finite_ptr, skipped_ptr, arena_ptr, rate, first,
    PANEL: tl.constexpr, DTYPE: tl.constexpr, MOMENTUM_DTYPE: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    NESTEROV: tl.constexpr, RATE_ON_DEVICE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Write a normalised piece into the arena, short side first; zeros where it has no element.

    With momenta, m <- mu m + g if `finite` is 1; else m stays, the arena gets NaN, and one is added to `skipped`, if
    there is one. The last pieces first: they were measured last, and are still in L2.
    """
    piece = first + tl.num_programs(0) - 1 - tl.program_id(0)
    which, matrix, about, row, column, r, c = _place(table_ptr, matrices_ptr, piece)
    offsets, exists = _offsets(about, r, c, UNIT, VECTOR)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    one = tl.load(inverses_ptr + matrix * 2)
    two = tl.load(inverses_ptr + matrix * 2 + 1)
    g = tl.load(_pointers(tensors, which, offsets, DTYPE, VECTOR), mask=exists, other=0.0).to(tl.float32)
    if momenta is None:
        x = tl.where(one > 0.0, SHRINK * g * one * two, 0.0)
    else:
        if RATE_ON_DEVICE:
            rate = tl.load(rate)
        pointer = _pointers(momenta, which, offsets, MOMENTUM_DTYPE, VECTOR)
        m = tl.load(pointer, mask=exists, other=0.0).to(tl.float32)
        is_taken = tl.load(finite_ptr) > 0
        x, m = _direction(g, m, rate, NESTEROV, MOMENTUM_DTYPE)
        tl.store(pointer, m, mask=exists & is_taken)
        x = tl.where(is_taken, x * one * two, float("nan"))
        if skipped_ptr is not None:
            is_counted = (tl.program_id(0) == 0) & (is_taken == 0)
            tl.store(skipped_ptr, tl.load(skipped_ptr, mask=is_counted, other=0) + 1, mask=is_counted)
    x = x.to(arena_ptr.dtype.element_ty)
    index = tl.arange(0, PIECE)
    square = index[:, None] * PANEL + index[None, :]
    first_row = tl.load(about + 5)
    if tl.load(about + 6) == 0:
        target = (first_row + column // PANEL * tl.load(about + 7) + row) * PANEL + column % PANEL
        tl.store(arena_ptr + tl.multiple_of(target, PIECE) + square, x)
    else:
        target = (first_row + row // PANEL * tl.load(about + 8) + column) * PANEL + row % PANEL
        tl.store(arena_ptr + tl.multiple_of(target, PIECE) + square, x.T)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _apply(
    parameters, updates, table_ptr, matrices_ptr, scales_ptr, lr, decay, first,
    DTYPE: tl.constexpr, UPDATE_DTYPE: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr,
    RATE_ON_DEVICE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """W <- (1 - lr * decay) W - lr * scale * u of one piece; W stays where u is NaN."""
    piece = first + tl.program_id(0)
    which, matrix, about, row, column, r, c = _place(table_ptr, matrices_ptr, piece)
    offsets, exists = _offsets(about, r, c, UNIT, VECTOR)
    if RATE_ON_DEVICE:
        lr = tl.load(lr)
        decay = tl.load(decay)
    scale = tl.load(scales_ptr + matrix)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    from_update = r.to(tl.int64)[:, None] * tl.load(about + 5) + c[None, :]
    pointers = _pointers(updates, which, from_update, UPDATE_DTYPE, VECTOR)
    u = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    pointers = _pointers(parameters, which, offsets, DTYPE, VECTOR)
    w = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    tl.store(pointers, tl.where(u == u, (1.0 - lr * decay) * w - lr * scale * u, w), mask=exists)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _access(tensors: Sequence[Tensor]) -> tuple[bool, int]:
    """UNIT and VECTOR of :func:`_offsets` for these tensors."""
    if any(t.stride(-1) != 1 for t in tensors):
        return False, 1
    sizes = {16 // t.itemsize for t in tensors}
    whole = all(
        t.data_ptr() % 16 == 0 and t.size(-1) % max(sizes) == 0 and all(s % max(sizes) == 0 for s in t.stride()[:-1])
        for t in tensors
    )
    return True, min(sizes) if whole else 1


def _launches(pieces: Pieces, *lists: Sequence[Tensor] | None) -> Iterator[tuple]:
    """Of each launch: its grid, what every kernel takes, and its part of each list."""
    for start, count, first, programs in pieces.launches:
        shared = {"table_ptr": pieces.table, "matrices_ptr": pieces.matrices, "first": first}
        shared |= _dependent(pieces.table)
        yield (programs,), shared, *(None if one is None else tuple(one[start : start + count]) for one in lists)


def _dependent(tensor: Tensor) -> dict[str, bool]:
    """Options of every launch here: on a GPU, each is a programmatic dependent of the one before."""
    return {"DEPENDENT": True, "launch_pdl": True} if tensor.is_cuda else {"DEPENDENT": False}


def _constants(
    tensors: Sequence[Tensor], momenta: Sequence[Tensor] | None, momentum: float | Tensor, nesterov: bool
) -> dict[str, Any]:
    """What measuring and filling share."""
    unit, vector = _access([*tensors, *(momenta or ())])
    dtypes = {"DTYPE": _TRITON[tensors[0].dtype], "MOMENTUM_DTYPE": _TRITON[(momenta or tensors)[0].dtype]}
    return {
        **dtypes, "UNIT": unit, "VECTOR": vector, "NESTEROV": nesterov, "RATE_ON_DEVICE": isinstance(momentum, Tensor)
    }  # fmt: skip


def measure(
    tensors: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    momentum: float | Tensor,
    nesterov: bool,
    pieces: Pieces,
    inverses: Tensor,
    finite: Tensor,
) -> None:
    """Write factors that normalise the matrices, or the directions of momentum with them, and whether all are finite.

    `inverses` is fp32 [M, 2], `finite` an int32 scalar. With momenta, a matrix is finite if mu m + g is.
    """
    parts = inverses.new_empty(len(pieces.table), 2)
    constants = _constants(tensors, momenta, momentum, nesterov)
    for grid, shared, some, others in _launches(pieces, tensors, momenta):
        _measure[grid](
            tensors=some, momenta=others, parts_ptr=parts, finite_ptr=finite, rate=momentum, **shared, **constants
        )
    _inverse_norm[(len(pieces.matrices),)](
        matrices_ptr=pieces.matrices, parts_ptr=parts, inverses_ptr=inverses, finite_ptr=finite,
        eps=reference.EPS * reference.SHRINK, BLOCK=512, **_dependent(inverses),
    )  # fmt: skip


def fill_arena(
    tensors: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    momentum: float | Tensor,
    nesterov: bool,
    pieces: Pieces,
    inverses: Tensor,
    finite: Tensor,
    arena: Tensor,
    skipped: Tensor | None = None,
) -> None:
    """Put what :func:`measure` measured into `arena`, normalised.

    Momentum is updated in place if `finite`, an int32 scalar, is 1; else the arena gets NaN, and one is added to
    `skipped`, an int64.
    """
    constants = _constants(tensors, momenta, momentum, nesterov)
    for grid, shared, some, others in _launches(pieces, tensors, momenta):
        _fill[grid](
            tensors=some, momenta=others, inverses_ptr=inverses, finite_ptr=finite, skipped_ptr=skipped,
            arena_ptr=arena, rate=momentum, PANEL=arena.size(1), **shared, **constants,
        )  # fmt: skip
        skipped = None  # it is counted once


def apply_updates(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    scales: Tensor,
    lr: float | Tensor,
    decay: float | Tensor,
    pieces: Pieces,
) -> None:
    """Update parameters [1, rows, columns] with updates of the same shapes, whose columns lie side by side."""
    unit, vector = _access(parameters)
    vector = min(vector, _access(updates)[1])
    for grid, shared, some, others in _launches(pieces, parameters, updates):
        _apply[grid](
            parameters=some, updates=others, scales_ptr=scales, lr=lr, decay=decay, UNIT=unit, VECTOR=vector,
            DTYPE=_TRITON[parameters[0].dtype], UPDATE_DTYPE=_TRITON[updates[0].dtype],
            RATE_ON_DEVICE=isinstance(lr, Tensor), **shared,
        )  # fmt: skip
