"""newton_schulz and the two halves of Muon's step as operators: what runs where, in which form, with which tiles."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..dispatch import check_backend, custom_op, round_up
from .edges import apply_updates, fill_arena, measure
from .pieces import PIECE, Layouts, Pieces, pieces_of
from .plan import Plan, Shapes, plan_of, result_layout
from .products import NewtonSchulzConfig, run_products
from .reference import (
    coefficients_of,
    muon_advanced_ref,
    muon_apply_ref_,
    muon_directions_ref,
    newton_schulz_ref,
    result_dtype,
    spelled,
    update_scale,
)
from .validate import check_alike, check_apart, check_device, check_tensors, checked_rate, takes_kernel


def pick_form(rows: int, columns: int) -> str:
    """'gram' or 'standard' for matrices of this shape.

    Multiplications of five iterations on m x n: standard m*m*(15 n + 5 m)/2, gram m*m*(6 n + 14 m)/2, in 15 and 17 sets
    that follow one another. Products of the 60 matrices of `seed` on an NVIDIA H200: 0.463 ms; with the 256 x 512 in
    the standard form 0.477 ms; an earlier version 0.463 ms, and 0.624 ms with all in it. Between n = m and n = 2 m
    nothing was measured.
    """
    return "gram" if max(rows, columns) >= 2 * min(rows, columns) else "standard"


HOPPER = 132
"""Multiprocessors of a full one; smaller ones get the same tiles. A constant: torch.compile traces :func:`pick_config`,
and would not trace a question to the device.
"""


def pick_config(shapes: Sequence[Shapes], dtype: torch.dtype, device: torch.device) -> NewtonSchulzConfig:
    """Tiles for these shapes, where results are of `dtype`. Milliseconds on an NVIDIA H200, fill included."""
    if device.type != "cuda":  # the interpreter: few large tiles
        return NewtonSchulzConfig(panel=64, block_k=64, num_warps=4, num_stages=1)
    if dtype == torch.float32:  # no tensor cores; not tuned
        return NewtonSchulzConfig(panel=64, block_k=32, num_warps=4, num_stages=2)
    side = 128
    blocks = [(round_up(min(s.rows, s.columns), side) // side, s.count) for s in shapes]
    tiles = sum(count * m * (m + 1) // 2 for m, count in blocks)  # of a symmetric product of all matrices
    if tiles < 2 * HOPPER:
        # Too few: smaller tiles. One 512 x 512: 0.075, with 128 x 128 0.111.
        return NewtonSchulzConfig(panel=64, block_k=64, num_warps=4, num_stages=4)
    if tiles < 1024:
        # The gaps between launches weigh: chained. `seed`'s 60 on an NVIDIA H100, products alone: 0.354, with 4 stages
        # 0.368; a chain of blocks without roles, two a multiprocessor, took 0.512.
        return NewtonSchulzConfig(panel=side, block_k=64, num_warps=4, num_stages=5, chained=True)
    # 32 x (2048, 2048): 10.3, 4 warps 11.2; 128 registers so that two blocks share a multiprocessor. On an NVIDIA H100
    # 11.1, chained 12.0 to 15.6.
    return NewtonSchulzConfig(panel=side, block_k=64, num_warps=8, num_stages=3, registers=128)


_READ_BY_GRAPHS: dict[int, tuple] = {}
"""Tables that a captured graph reads. The caches below may drop theirs; these stay, since nothing reports that a graph
was freed."""


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _lasting(tables: tuple, device: torch.device) -> tuple:
    """`tables`, kept if a graph is being captured that will read them."""
    if _is_captured(device):
        _READ_BY_GRAPHS[id(tables)] = tables
    return tables


@lru_cache(maxsize=256)
def _layout(
    layouts: Layouts, steps: int, coefficients: str, forms: str, config: NewtonSchulzConfig, device: torch.device
) -> tuple[Plan, Pieces]:
    plan = plan_of(_shapes(layouts, forms), steps, coefficients, config.panel, device, config.chained)
    return plan, pieces_of(layouts, config.panel, plan.starts, device)


@lru_cache(maxsize=256)
def _targets(
    layouts: Layouts, pitches: tuple[int, ...], rows: tuple[int, ...], scale: str, device: torch.device
) -> tuple[Pieces, Tensor]:
    factors = [update_scale(whole, size[2], scale) for whole, (size, _) in zip(rows, layouts, strict=True)]
    scales = torch.tensor(factors, dtype=torch.float32)
    return pieces_of(layouts, PIECE, pitches, device), scales.to(device)


def _shapes(layouts: Layouts, forms: str) -> tuple[Shapes, ...]:
    """`forms`: one for each tensor, with commas."""
    return tuple(Shapes(*size, form) for (size, _), form in zip(layouts, forms.split(","), strict=True))


def _layouts(tensors: Sequence[Tensor]) -> Layouts:
    return tuple((tuple(t.size()), tuple(t.stride())) for t in tensors)


def _tables(
    tensors: Sequence[Tensor], steps: int, coefficients: str, forms: str, dtype: torch.dtype
) -> tuple[NewtonSchulzConfig, Plan, Pieces]:
    """How tensors [B, rows, columns] are orthogonalised."""
    layouts, device = _layouts(tensors), tensors[0].device
    check_device(device)
    config = pick_config(_shapes(layouts, forms), dtype, device)
    plan, pieces = _lasting(_layout(layouts, steps, coefficients, forms, config, device), device)
    return config, plan, pieces


def _empty_arena(config: NewtonSchulzConfig, plan: Plan, result: Tensor) -> Tensor:
    inner = torch.float32 if result.dtype == torch.float32 else torch.float16
    return result.new_empty(plan.arena_rows, config.panel, dtype=inner)


def _empty_norms(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two factors for each matrix, and whether all are finite: what :func:`measure` writes."""
    matrices = sum(t.size(0) for t in tensors)
    return tensors[0].new_empty(matrices, 2, dtype=torch.float32), tensors[0].new_empty((), dtype=torch.int32)


def _empty_result(tensors: Sequence[Tensor], forms: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A packed result, and its views in the shapes of tensors [B, rows, columns]."""
    shapes = _shapes(_layouts(tensors), forms)
    unit = pick_config(shapes, dtype, tensors[0].device).panel
    firsts, rows, columns = result_layout(shapes, unit)
    packed, views = tensors[0].new_empty(rows, columns, dtype=dtype), []
    for first, s in zip(firsts, shapes, strict=True):
        height = round_up(s.rows, unit)
        views.append(packed[first : first + s.count * height].view(s.count, height, -1)[:, : s.rows, : s.columns])
    return packed, views


@custom_op("klora::newton_schulz", mutates_args=("result",))
def _newton_schulz(matrices: list[Tensor], steps: int, coefficients: str, forms: str, result: Tensor) -> None:
    config, plan, pieces = _tables(matrices, steps, coefficients, forms, result.dtype)
    arena, norms = _empty_arena(config, plan, result), _empty_norms(matrices)
    measure(matrices, None, 0.0, True, pieces, *norms)
    fill_arena(matrices, None, 0.0, True, pieces, *norms, arena)
    run_products(plan, arena, result, config)


@custom_op("klora::muon_norms", mutates_args=("inverses", "finite"))
def _muon_norms(
    gradients: list[Tensor],
    momenta: list[Tensor],
    momentum: float,
    momentum_on_device: Tensor | None,
    nesterov: bool,
    steps: int,
    coefficients: str,
    forms: str,
    dtype: torch.dtype,
    inverses: Tensor,
    finite: Tensor,
) -> None:
    rate = momentum if momentum_on_device is None else momentum_on_device
    _, _, pieces = _tables(gradients, steps, coefficients, forms, dtype)
    measure(gradients, momenta, rate, nesterov, pieces, inverses, finite)


@custom_op("klora::muon_updates", mutates_args=("momenta", "skipped", "result"))
def _muon_updates(
    gradients: list[Tensor],
    momenta: list[Tensor],
    momentum: float,
    momentum_on_device: Tensor | None,
    nesterov: bool,
    steps: int,
    coefficients: str,
    forms: str,
    inverses: Tensor,
    finite: Tensor,
    skipped: Tensor | None,
    result: Tensor,
) -> None:
    rate = momentum if momentum_on_device is None else momentum_on_device
    config, plan, pieces = _tables(gradients, steps, coefficients, forms, result.dtype)
    arena = _empty_arena(config, plan, result)
    fill_arena(gradients, momenta, rate, nesterov, pieces, inverses, finite, arena, skipped)
    run_products(plan, arena, result, config)


@custom_op("klora::muon_apply", mutates_args=("parameters",))
def _muon_apply(
    parameters: list[Tensor],
    updates: list[Tensor],
    lr: float,
    weight_decay: float,
    lr_on_device: Tensor | None,
    weight_decay_on_device: Tensor | None,
    scale: str,
    rows: list[int],
) -> None:
    strides, device = tuple(u.stride(-2) for u in updates), parameters[0].device
    check_device(device)
    pieces, scales = _lasting(_targets(_layouts(parameters), strides, tuple(rows), scale, device), device)
    rates = (lr, weight_decay) if lr_on_device is None else (lr_on_device, weight_decay_on_device)
    apply_updates(parameters, updates, scales, *rates, pieces)


def newton_schulz(
    matrices: Tensor | Sequence[Tensor],
    steps: int = 5,
    coefficients: str | Sequence[float] = "jordan",
    dtype: torch.dtype | None = None,
    form: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Orthogonalise one tensor [..., m, n], or each of a list of tensors of any such shapes -> the same shapes.

    `matrices` are of one float dtype on one device; `steps` is the number of iterations. `coefficients`: 'jordan',
    'polar_express', or three numbers for every step. `dtype` of the result: None is bfloat16 on a GPU, as given on a
    CPU. Results of a list are parts of one tensor. `form`: 'standard' or 'gram' in place of the one picked for each
    shape. A matrix of zeros, or with an entry that is no finite number, gives zeros. A batch of no matrices gives one.
    Strides and alignment are free, and entries may share memory. No gradient.

    `backend` is "reference" or "triton"; None takes the kernel on a GPU (Hopper), but for float64.
    ValueError: a tensor that is not [..., m, n] with m and n above 0 or not of floating point, a list of several dtypes
    or devices, settings out of range, a GPU that the kernels do not run on.

    Example: orthogonal = newton_schulz(weight)
    """
    is_one = isinstance(matrices, Tensor)
    tensors = [matrices] if is_one else list(matrices)
    check_tensors("matrices", tensors)
    coefficients_of(coefficients, steps)
    if form not in (None, "standard", "gram"):
        raise ValueError(f"form={form!r} is not possible; allowed: 'standard', 'gram' or None")
    if not tensors:
        check_backend(backend)
        return []
    first = tensors[0]
    dtype = dtype or result_dtype(first)
    if not takes_kernel(first, backend, dtype):
        results = [newton_schulz_ref(t, steps, dtype, coefficients) for t in tensors]
        return results[0] if is_one else results
    flat = [t.detach().reshape(-1, *t.shape[-2:]) for t in tensors]
    full = [t for t in flat if t.numel()]
    views = []
    if full:
        forms = ",".join(form or pick_form(*t.shape[-2:]) for t in full)
        packed, views = _empty_result(full, forms, dtype)
        _newton_schulz(full, steps, spelled(coefficients), forms, packed)
    made = iter(views)
    results = [next(made).reshape(t.shape) if t.numel() else t.new_empty(t.shape, dtype=dtype) for t in tensors]
    return results[0] if is_one else results


def _laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` with the strides of `other`: itself where it has them."""
    if tensor.stride() == other.stride():
        return tensor
    copy = torch.empty_strided(other.shape, other.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


class MuonDirections:
    """The first half of :func:`muon_updates`, which only reads; :meth:`updates` is the second.

    In between, several of them can agree on whether the step of all is taken: `finite`, an int32 scalar on their
    device, is 1 if every mu m + g is finite, else 0. Arguments and errors are those of :func:`muon_updates`.
    """

    def __init__(
        self,
        gradients: Sequence[Tensor],
        momenta: Sequence[Tensor],
        momentum: float | Tensor,
        nesterov: bool = True,
        steps: int = 5,
        coefficients: str | Sequence[float] = "jordan",
        backend: str | None = None,
    ):
        check_tensors("gradients", gradients, 2)
        check_tensors("momenta", momenta, 2)
        check_alike("gradients", gradients, "momenta", momenta)
        check_apart(momenta, gradients)
        coefficients_of(coefficients, steps)
        first = gradients[0]
        self.momenta = [m.detach() for m in momenta]
        self.gradients = [_laid_out_as(g.detach(), m) for g, m in zip(gradients, self.momenta, strict=True)]
        self.momentum = checked_rate("momentum", momentum, first.device)
        self.settings = nesterov, steps, spelled(coefficients)
        self.runs_kernel = takes_kernel(first, backend, momenta[0].dtype)
        if not self.runs_kernel:
            self.advanced, self.finite = muon_advanced_ref(self.gradients, self.momenta, self.momentum)
            return
        lists = [[t[None] for t in some] for some in (self.gradients, self.momenta)]
        rate = (0.0, self.momentum) if isinstance(self.momentum, Tensor) else (self.momentum, None)
        self.forms = ",".join(pick_form(*t.shape) for t in self.gradients)
        self.arguments = *lists, *rate, *self.settings, self.forms
        self.dtype = torch.float16 if first.is_cuda else torch.float32
        self.inverses, self.finite = _empty_norms(lists[0])
        _muon_norms(*self.arguments, self.dtype, self.inverses, self.finite)

    def updates(self, finite: Tensor | None = None, skipped: Tensor | None = None) -> list[Tensor]:
        """Advance the momenta in place and return the updates; or if `finite` is 0, leave them and return NaN.

        `finite` None is their own. `skipped`, an int64 scalar, grows by one if `finite` is 0.
        """
        finite = self.finite if finite is None else finite
        if not self.runs_kernel:
            if skipped is not None:
                skipped.add_(1 - finite)
            return muon_directions_ref(
                self.gradients, self.momenta, self.advanced, finite, self.momentum, *self.settings
            )
        packed, views = _empty_result(self.arguments[0], self.forms, self.dtype)
        _muon_updates(*self.arguments, self.inverses, finite, skipped, packed)
        return [view[0] for view in views]


def muon_updates(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    momentum: float | Tensor,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: str | Sequence[float] = "jordan",
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """m <- mu m + g in place, then NS(g + mu m), or NS(m) -> the updates, fp16 on a GPU, in the gradients' shapes.

    `gradients` and `momenta` are lists of matrices [m, n], of one float dtype each. `momentum` is mu, a number or a
    scalar tensor. `nesterov` False takes NS(m). `steps` and `coefficients` are those of :func:`newton_schulz`. No
    gradient, and nothing waits for the GPU.

    If any mu m + g has an entry that is no finite number (its gradient has one, or the sum overflows), the whole step
    is skipped: every m stays as it is, and every update is NaN, which :func:`muon_apply_` leaves out.

    `backend` is "reference" or "triton"; None takes the kernel on a GPU (Hopper), but for float64.
    ValueError: what is no matrix of floating point, lists of several dtypes or devices or of different shapes, momenta
    that share memory with each other or with a gradient.

    Example: updates = muon_updates(gradients, momenta, momentum=0.95)
    """
    if not gradients and not momenta:
        check_backend(backend)
        return []
    return MuonDirections(gradients, momenta, momentum, nesterov, steps, coefficients, backend).updates()


def muon_apply_(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float | Tensor,
    scale: str = "original",
    *,
    rows: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """W <- (1 - lr * decay) W - lr * update_scale * u, in place; an entry stays as it is where u is NaN.

    So a skipped step of :func:`muon_updates` changes nothing. `parameters` and `updates` are lists of matrices [m, n],
    of one float dtype each. `lr` and `weight_decay` are numbers or scalar tensors. `scale` is 'original', sqrt(max(1, m
    / n)), or 'match_rms_adamw', 0.2 sqrt(max(m, n)). Parameters may require gradients; none is recorded. `rows` are the
    m of larger matrices of which the parameters are some rows; None: they are whole.

    `backend` is "reference" or "triton"; None takes the kernel on a GPU (Hopper), but for float64.
    ValueError: what is no matrix [m, n] of floating point, lists of several dtypes or devices or of different shapes,
    parameters that share memory, another scale, fewer `rows` than a parameter has.

    Example: muon_apply_(parameters, updates, lr=0.02, weight_decay=0.01)
    """
    update_scale(1, 1, scale)
    if not parameters and not updates:
        check_backend(backend)
        return
    check_tensors("parameters", parameters, 2)
    check_tensors("updates", updates, 2)
    check_alike("parameters", parameters, "updates", updates)
    check_apart(parameters, updates)
    rows = [p.size(0) for p in parameters] if rows is None else list(rows)
    if len(rows) != len(parameters) or any(p.size(0) > whole for p, whole in zip(parameters, rows, strict=True)):
        raise ValueError(f"rows are {rows}; allowed: for each of {len(parameters)} parameters its own rows or more")
    device = parameters[0].device
    rates = [checked_rate("lr", lr, device), checked_rate("weight_decay", weight_decay, device)]
    if not takes_kernel(parameters[0], backend, updates[0].dtype):
        muon_apply_ref_(parameters, updates, *rates, scale, rows)
        return
    if any(isinstance(rate, Tensor) for rate in rates):
        on_device = [
            r if isinstance(r, Tensor) else torch.full((), r, dtype=torch.float32, device=device) for r in rates
        ]
        rates = [0.0, 0.0]
    else:
        on_device = [None, None]
    flat = [p.detach()[None] for p in parameters]
    side_by_side = [u.detach() if u.stride(-1) == 1 else u.detach().contiguous() for u in updates]
    _muon_apply(flat, [u[None] for u in side_by_side], *rates, *on_device, scale, rows)
