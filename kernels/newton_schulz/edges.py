"""What comes before and after the products: norm, momentum, the copy into the arena, and the update of the weights.

Every kernel takes the tensors themselves, up to 64 in a launch, and a table of 64 x 64 pieces. Norms are sums of
squares of x / max|x| in fp32, piece by piece and then over the pieces of a matrix in their order: no square overflows,
and the result does not depend on what else is in the launch.

Momentum is written by the second of the two kernels that need it. The first only reads, and its sums say which
matrices are finite. So whether the step is taken is known before anything is written, at no more bytes: gradient and
momentum are read twice and momentum is written once, whichever kernel writes it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pieces import MATRIX_FIELDS, PIECE, Pieces
from .reference import EPS, SHRINK

TINY = 1e-30
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
def _place(table, matrices, piece, FIELDS: tl.constexpr, PIECE: tl.constexpr):
    """Tensor, matrix, offsets of a piece's elements, and which of them exist."""
    which = tl.load(table + piece * 4)
    matrix = tl.load(table + piece * 4 + 1)
    row = tl.multiple_of(tl.load(table + piece * 4 + 2), PIECE)
    column = tl.multiple_of(tl.load(table + piece * 4 + 3), PIECE)
    about = matrices + matrix * FIELDS
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
def _direction(
    g,
    m,
    rate,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MOMENTUM_DTYPE: tl.constexpr,
    SHRINK: tl.constexpr,
):
    """SHRINK times what is orthogonalised, and the momentum mu m + g as it is stored."""
    x = SHRINK * g
    if MOMENTUM:
        m = (rate * m + g).to(MOMENTUM_DTYPE)
        if NESTEROV:
            x += SHRINK * rate * m.to(tl.float32)
        else:
            x = SHRINK * m.to(tl.float32)
    return x, m


@triton.jit
def _measure(
    tensors,
    momenta,
    table,
    matrices,
    parts,
    finite,
    rate,
    first,
    FIELDS: tl.constexpr,
    PIECE: tl.constexpr,
    DTYPE: tl.constexpr,
    MOMENTUM_DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    SHRINK: tl.constexpr,
    TINY: tl.constexpr,
    RATE_ON_DEVICE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Largest magnitude of a piece and sum of squares in its units, which is NaN if an entry is not finite.

    `finite` becomes 1.
    """
    piece = first + tl.program_id(0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    tl.store(finite, 1, mask=piece == 0)
    which, matrix, about, row, column, r, c = _place(table, matrices, piece, FIELDS, PIECE)
    offsets, exists = _offsets(about, r, c, UNIT, VECTOR)
    g = tl.load(_pointers(tensors, which, offsets, DTYPE, VECTOR), mask=exists, other=0.0).to(tl.float32)
    m = g
    if MOMENTUM:
        if RATE_ON_DEVICE:
            rate = tl.load(rate)
        pointer = _pointers(momenta, which, offsets, MOMENTUM_DTYPE, VECTOR)
        m = tl.load(pointer, mask=exists, other=0.0).to(tl.float32)
    x, _ = _direction(g, m, rate, MOMENTUM, NESTEROV, MOMENTUM_DTYPE, SHRINK)
    largest = tl.max(tl.abs(x))
    x = x / tl.where(largest > TINY, largest, 1.0)
    tl.store(parts + piece * 2, largest)
    tl.store(parts + piece * 2 + 1, tl.sum(x * x))
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _inverse_norm(
    matrices,
    parts,
    inverses,
    finite,
    eps,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    TINY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Two factors whose product is 1 / (norm + eps) of a matrix; both zero where it is not finite, as `finite` then."""
    matrix = tl.program_id(0)
    first = tl.load(matrices + matrix * FIELDS + 9)
    count = tl.load(matrices + matrix * FIELDS + 10)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    largest = tl.full((BLOCK,), TINY, tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(parts + (first + index) * 2, mask=index < count, other=0.0))
    inverse = 1.0 / tl.max(largest)
    squares = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        share = tl.load(parts + (first + index) * 2, mask=index < count, other=0.0) * inverse
        of_piece = tl.load(parts + (first + index) * 2 + 1, mask=index < count, other=0.0)
        squares += share * share * of_piece
        broken = tl.where(of_piece == of_piece, broken, 1)
    is_finite = tl.max(broken) == 0
    norm = tl.sqrt(tl.sum(squares)) + eps * inverse
    tl.store(inverses + matrix * 2, tl.where(is_finite, inverse, 0.0))
    tl.store(inverses + matrix * 2 + 1, tl.where(is_finite, 1.0 / norm, 0.0))
    tl.store(finite, 0, mask=is_finite == 0)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _fill(
    tensors,
    momenta,
    table,
    matrices,
    inverses,
    finite,
    skipped,
    arena,
    rate,
    first,
    FIELDS: tl.constexpr,
    PIECE: tl.constexpr,
    PANEL: tl.constexpr,
    DTYPE: tl.constexpr,
    MOMENTUM_DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    SHRINK: tl.constexpr,
    RATE_ON_DEVICE: tl.constexpr,
    COUNTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Write a normalised piece into the arena, short side first; zeros where it has no element.

    With MOMENTUM, m <- mu m + g if `finite` is 1; else m stays, the arena gets NaN, and with COUNTS one is added to
    `skipped`. The last pieces first: they were measured last, and are still in L2.
    """
    piece = first + tl.num_programs(0) - 1 - tl.program_id(0)
    which, matrix, about, row, column, r, c = _place(table, matrices, piece, FIELDS, PIECE)
    offsets, exists = _offsets(about, r, c, UNIT, VECTOR)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    one = tl.load(inverses + matrix * 2)
    two = tl.load(inverses + matrix * 2 + 1)
    g = tl.load(_pointers(tensors, which, offsets, DTYPE, VECTOR), mask=exists, other=0.0).to(tl.float32)
    if MOMENTUM:
        if RATE_ON_DEVICE:
            rate = tl.load(rate)
        pointer = _pointers(momenta, which, offsets, MOMENTUM_DTYPE, VECTOR)
        m = tl.load(pointer, mask=exists, other=0.0).to(tl.float32)
        is_taken = tl.load(finite) > 0
        x, m = _direction(g, m, rate, MOMENTUM, NESTEROV, MOMENTUM_DTYPE, SHRINK)
        tl.store(pointer, m, mask=exists & is_taken)
        x = tl.where(is_taken, x * one * two, float("nan"))
        if COUNTS:
            is_counted = (tl.program_id(0) == 0) & (is_taken == 0)
            tl.store(skipped, tl.load(skipped, mask=is_counted, other=0) + 1, mask=is_counted)
    else:
        x = tl.where(one > 0.0, SHRINK * g * one * two, 0.0)
    x = x.to(arena.dtype.element_ty)
    index = tl.arange(0, PIECE)
    square = index[:, None] * PANEL + index[None, :]
    first_row = tl.load(about + 5)
    if tl.load(about + 6) == 0:
        target = (first_row + column // PANEL * tl.load(about + 7) + row) * PANEL + column % PANEL
        tl.store(arena + tl.multiple_of(target, PIECE) + square, x)
    else:
        target = (first_row + row // PANEL * tl.load(about + 8) + column) * PANEL + row % PANEL
        tl.store(arena + tl.multiple_of(target, PIECE) + square, x.T)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _apply(
    parameters,
    updates,
    table,
    matrices,
    scales,
    lr,
    decay,
    first,
    FIELDS: tl.constexpr,
    PIECE: tl.constexpr,
    DTYPE: tl.constexpr,
    UPDATE_DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    RATE_ON_DEVICE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """W <- (1 - lr * decay) W - lr * scale * u of one piece; W stays where u is NaN."""
    piece = first + tl.program_id(0)
    which, matrix, about, row, column, r, c = _place(table, matrices, piece, FIELDS, PIECE)
    offsets, exists = _offsets(about, r, c, UNIT, VECTOR)
    if RATE_ON_DEVICE:
        lr = tl.load(lr)
        decay = tl.load(decay)
    scale = tl.load(scales + matrix)
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
    vector = min(sizes)
    whole = all(
        t.data_ptr() % 16 == 0 and t.size(-1) % max(sizes) == 0 and all(s % max(sizes) == 0 for s in t.stride()[:-1])
        for t in tensors
    )
    return True, vector if whole else 1


def measure(
    tensors: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    momentum: float | Tensor,
    nesterov: bool,
    pieces: Pieces,
) -> tuple[Tensor, Tensor]:
    """Factors fp32 [M, 2] that normalise the matrices, or the directions of momentum with them; whether all are finite.

    The second is an int32 scalar. With momenta, a matrix is finite if mu m + g is.
    """
    device = pieces.table.device
    parts = torch.empty(len(pieces.table), 2, device=device)
    inverses = torch.empty(len(pieces.matrices), 2, device=device)
    finite = torch.empty((), device=device, dtype=torch.int32)
    shared = _shared(tensors, momenta, momentum, nesterov)
    for start, count, first, programs in pieces.launches:
        some, others = _some(tensors, momenta, start, count)
        _measure[(programs,)](
            some, others, pieces.table, pieces.matrices, parts, finite, momentum, first, TINY=TINY, **shared
        )
    _inverse_norm[(len(pieces.matrices),)](
        pieces.matrices,
        parts,
        inverses,
        finite,
        EPS * SHRINK,
        FIELDS=MATRIX_FIELDS,
        BLOCK=512,
        TINY=TINY,
        DEPENDENT=device.type == "cuda",
        **_launch(device),
    )
    return inverses, finite


def fill_arena(
    tensors: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    momentum: float | Tensor,
    nesterov: bool,
    pieces: Pieces,
    arena: Tensor,
    inverses: Tensor,
    finite: Tensor,
    skipped: Tensor | None = None,
) -> None:
    """Put what :func:`measure` measured into `arena`, normalised.

    Momentum is updated in place if `finite`, an int32 scalar, is 1; else the arena gets NaN, and one is added to
    `skipped`, an int64.
    """
    shared = _shared(tensors, momenta, momentum, nesterov)
    for start, count, first, programs in pieces.launches:
        some, others = _some(tensors, momenta, start, count)
        _fill[(programs,)](
            some,
            others,
            pieces.table,
            pieces.matrices,
            inverses,
            finite,
            finite if skipped is None else skipped,
            arena,
            momentum,
            first,
            PANEL=arena.size(1),
            COUNTS=skipped is not None and start == 0,
            **shared,
        )


def _launch(device: torch.device) -> dict[str, bool]:
    """Options of every launch here: on a GPU, each is a programmatic dependent of the one before."""
    return {"launch_pdl": True} if device.type == "cuda" else {}


def _some(
    tensors: Sequence[Tensor], momenta: Sequence[Tensor] | None, start: int, count: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors of a launch, and their momenta; without any, the tensors twice, of which the second is not read."""
    some = tuple(tensors[start : start + count])
    return some, some if momenta is None else tuple(momenta[start : start + count])


def _shared(
    tensors: Sequence[Tensor], momenta: Sequence[Tensor] | None, momentum: float | Tensor, nesterov: bool
) -> dict[str, object]:
    """Arguments that measuring and filling share."""
    unit, vector = _access([*tensors, *(momenta or ())])
    return {
        "FIELDS": MATRIX_FIELDS,
        "PIECE": PIECE,
        "DTYPE": _TRITON[tensors[0].dtype],
        "MOMENTUM_DTYPE": _TRITON[(momenta or tensors)[0].dtype],
        "UNIT": unit,
        "VECTOR": vector,
        "MOMENTUM": momenta is not None,
        "NESTEROV": nesterov,
        "SHRINK": SHRINK,
        "RATE_ON_DEVICE": isinstance(momentum, Tensor),
        "DEPENDENT": tensors[0].is_cuda,
        **_launch(tensors[0].device),
    }


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
    _, update_vector = _access(updates)
    for start, count, first, programs in pieces.launches:
        _apply[(programs,)](
            tuple(parameters[start : start + count]),
            tuple(updates[start : start + count]),
            pieces.table,
            pieces.matrices,
            scales,
            lr,
            decay,
            first,
            FIELDS=MATRIX_FIELDS,
            PIECE=PIECE,
            DTYPE=_TRITON[parameters[0].dtype],
            UPDATE_DTYPE=_TRITON[updates[0].dtype],
            UNIT=unit,
            VECTOR=min(vector, update_vector),
            RATE_ON_DEVICE=isinstance(lr, Tensor),
            DEPENDENT=scales.is_cuda,
            **_launch(scales.device),
        )
