"""newton_schulz and the two halves of Muon's step as operators: what runs where, in which form, with which tiles."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..registration import custom_op
from .edges import PIECE, Layouts, Pieces, apply_updates, fill_arena, pieces_of
from .plan import Plan, Shapes, plan_of, result_layout
from .products import NewtonSchulzConfig, run_products
from .reference import (
    coefficients_of,
    muon_apply_ref_,
    muon_updates_ref,
    newton_schulz_ref,
    result_dtype,
    update_scale,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pick_form(rows: int, columns: int) -> str:
    """'gram' or 'standard' for matrices of this shape.

    Multiplications of five iterations on m x n: standard m*m*(15 n + 5 m)/2, gram m*m*(6 n + 14 m)/2, in 15 and 17 sets
    that follow one another. Products of the 60 matrices of `seed` on an NVIDIA H200: 0.463 ms; with the 256 x 512 in
    the standard form 0.477 ms; an earlier version 0.463 ms, and 0.624 ms with all in it. Between n = m and n = 2 m
    nothing was measured.
    """
    return "gram" if max(rows, columns) >= 2 * min(rows, columns) else "standard"


def pick_backend(device: torch.device) -> str:
    """'triton' where the kernels run, which is on Hopper; 'reference' elsewhere."""
    runs = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return "triton" if runs else "reference"


def pick_config(shapes: Sequence[Shapes], dtype: torch.dtype, on_gpu: bool) -> NewtonSchulzConfig:
    """Tiles for these shapes, where results are of `dtype`. Milliseconds on an NVIDIA H200, fill included."""
    if not on_gpu:  # the interpreter: few large tiles
        return NewtonSchulzConfig(panel=64, block_k=64, num_warps=4, num_stages=1)
    if dtype == torch.float32:  # no tensor cores; not tuned
        return NewtonSchulzConfig(panel=64, block_k=32, num_warps=4, num_stages=2)
    side = 128
    blocks = [(-(-min(s.rows, s.columns) // side), s.count) for s in shapes]
    tiles = sum(count * m * (m + 1) // 2 for m, count in blocks)  # of a symmetric product of all matrices
    if tiles < 264:
        # Too few for the 132 multiprocessors: smaller tiles. One 512 x 512: 0.075, with 128 x 128 0.111.
        return NewtonSchulzConfig(panel=64, block_k=64, num_warps=4, num_stages=4)
    if tiles < 1024:
        # The gaps between launches weigh: chained. `seed`'s 60 on an NVIDIA H100, products alone: 0.354, with 4 stages
        # 0.368; a chain of blocks without roles, two a multiprocessor, took 0.512.
        return NewtonSchulzConfig(panel=side, block_k=64, num_warps=4, num_stages=5, chained=True)
    # 32 x (2048, 2048): 10.3, 4 warps 11.2; 128 registers so that two blocks share a multiprocessor. On an NVIDIA H100
    # 11.1, chained 12.0 to 15.6.
    return NewtonSchulzConfig(panel=side, block_k=64, num_warps=8, num_stages=3, registers=128)


_READ_BY_GRAPHS: dict[int, tuple] = {}
"""Tables that a captured graph reads. The caches below may drop theirs; these stay, since nobody says when a graph is
gone."""


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _lasting(tables: tuple, device: torch.device) -> tuple:
    """`tables`, kept if a graph is being captured that will read them."""
    if _is_captured(device):
        _READ_BY_GRAPHS[id(tables)] = tables
    return tables


@lru_cache(maxsize=256)
def _layout(
    layouts: Layouts,
    steps: int,
    coefficients: str,
    forms: tuple[str, ...],
    config: NewtonSchulzConfig,
    device: torch.device,
) -> tuple[Plan, Pieces]:
    plan = plan_of(_shapes(layouts, forms), steps, coefficients, config.panel, device, config.chained)
    return plan, pieces_of(layouts, config.panel, plan.starts, device)


@lru_cache(maxsize=256)
def _targets(layouts: Layouts, pitches: tuple[int, ...], scale: str, device: torch.device) -> tuple[Pieces, Tensor]:
    scales = torch.tensor([update_scale(size[1], size[2], scale) for size, _ in layouts], dtype=torch.float32)
    return pieces_of(layouts, PIECE, pitches, device), scales.to(device)


def _shapes(layouts: Layouts, forms: Sequence[str]) -> tuple[Shapes, ...]:
    return tuple(Shapes(*size, form) for (size, _), form in zip(layouts, forms, strict=True))


def _names(gram: Sequence[bool]) -> list[str]:
    return ["gram" if is_gram else "standard" for is_gram in gram]


def _layouts(tensors: Sequence[Tensor]) -> Layouts:
    return tuple((tuple(t.size()), tuple(t.stride())) for t in tensors)


def _run(
    tensors: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    momentum: float | Tensor,
    nesterov: bool,
    steps: int,
    coefficients: str,
    forms: Sequence[str],
    dtype: torch.dtype,
) -> Tensor:
    """Orthogonal matrices of tensors [B, rows, columns], packed; :func:`_unpack` finds them."""
    layouts, device = _layouts(tensors), tensors[0].device
    _check_device(device)
    config = pick_config(_shapes(layouts, forms), dtype, tensors[0].is_cuda)
    plan, pieces = _lasting(_layout(layouts, steps, coefficients, tuple(forms), config, device), device)
    inner = torch.float32 if dtype == torch.float32 else torch.float16
    arena = torch.empty(plan.arena_rows, config.panel, device=device, dtype=inner)
    result = torch.empty(plan.result_rows, plan.result_columns, device=device, dtype=dtype)
    fill_arena(tensors, momenta, momentum, nesterov, pieces, arena)
    run_products(plan, arena, result, config)
    return result


def _empty_result(tensors: Sequence[Tensor], forms: Sequence[str], dtype: torch.dtype) -> Tensor:
    shapes = _shapes(_layouts(tensors), forms)
    config = pick_config(shapes, dtype, tensors[0].is_cuda)
    _, rows, columns = result_layout(shapes, config.panel)
    return tensors[0].new_empty(rows, columns, dtype=dtype)


def _unpack(result: Tensor, tensors: Sequence[Tensor], forms: Sequence[str]) -> list[Tensor]:
    """Views of the packed result in the shapes of tensors [B, rows, columns]."""
    shapes = _shapes(_layouts(tensors), forms)
    unit = pick_config(shapes, result.dtype, result.is_cuda).panel
    firsts, _, _ = result_layout(shapes, unit)
    views = []
    for first, s in zip(firsts, shapes, strict=True):
        height = -(-s.rows // unit) * unit
        views.append(result[first : first + s.count * height].view(s.count, height, -1)[:, : s.rows, : s.columns])
    return views


@custom_op("klora::newton_schulz", mutates_args=())
def _newton_schulz(
    matrices: list[Tensor], steps: int, coefficients: str, gram: list[bool], dtype: torch.dtype
) -> Tensor:
    return _run(matrices, None, 0.0, True, steps, coefficients, _names(gram), dtype)


@_newton_schulz.register_fake
def _(matrices, steps, coefficients, gram, dtype):
    return _empty_result(matrices, _names(gram), dtype)


@custom_op("klora::muon_updates", mutates_args=("momenta",))
def _muon_updates(
    gradients: list[Tensor],
    momenta: list[Tensor],
    momentum: float,
    momentum_on_device: Tensor | None,
    nesterov: bool,
    steps: int,
    coefficients: str,
    gram: list[bool],
    dtype: torch.dtype,
) -> Tensor:
    rate = momentum if momentum_on_device is None else momentum_on_device
    return _run(gradients, momenta, rate, nesterov, steps, coefficients, _names(gram), dtype)


@_muon_updates.register_fake
def _(gradients, momenta, momentum, momentum_on_device, nesterov, steps, coefficients, gram, dtype):
    return _empty_result(gradients, _names(gram), dtype)


@custom_op("klora::muon_apply", mutates_args=("parameters",))
def _muon_apply(
    parameters: list[Tensor],
    updates: list[Tensor],
    lr: float,
    weight_decay: float,
    lr_on_device: Tensor | None,
    weight_decay_on_device: Tensor | None,
    scale: str,
) -> None:
    layouts = _layouts(parameters)
    strides, device = tuple(u.stride(-2) for u in updates), parameters[0].device
    _check_device(device)
    pieces, scales = _lasting(_targets(layouts, strides, scale, device), device)
    if lr_on_device is None:
        apply_updates(parameters, updates, scales, lr, weight_decay, pieces)
    else:
        apply_updates(parameters, updates, scales, lr_on_device, weight_decay_on_device, pieces)


@_muon_apply.register_fake
def _(parameters, updates, lr, weight_decay, lr_on_device, weight_decay_on_device, scale):
    return None


def newton_schulz(
    matrices: Tensor | Sequence[Tensor],
    steps: int = 5,
    coefficients: str = "jordan",
    dtype: torch.dtype | None = None,
    form: str | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Orthogonalise one tensor [..., m, n], or each of a list of tensors of any such shapes -> the same shapes.

    `coefficients`: 'jordan' or 'polar_express'. `dtype` of the result: bf16 on a GPU, as given on a CPU. Results of a
    list are parts of one tensor. `form`: 'standard' or 'gram' in place of the one picked for each shape. `backend`:
    'triton' or 'reference'; None takes the kernel on a GPU. A matrix of zeros, or with an entry that is no finite
    number, gives zeros. There is no gradient.
    """
    is_one = isinstance(matrices, Tensor)
    tensors = [matrices] if is_one else list(matrices)
    if not tensors:
        return []
    _check(tensors)
    coefficients_of(coefficients, steps)
    if form not in (None, "standard", "gram"):
        raise ValueError(f"form={form!r} is not possible; allowed: 'standard', 'gram' or None")
    first = tensors[0]
    dtype = dtype or result_dtype(first)
    if not _takes_kernel(first, backend):
        results = [newton_schulz_ref(t, steps, dtype, coefficients) for t in tensors]
        return results[0] if is_one else results
    for t in tensors:
        if t.dtype not in DTYPES or dtype not in DTYPES:
            raise ValueError(f"{t.dtype} -> {dtype} is not possible; allowed: {DTYPES}, or backend='reference'")
    flat = [t.detach().reshape(-1, *t.shape[-2:]) for t in tensors]
    forms = [form or pick_form(*t.shape[-2:]) for t in tensors]
    packed = _newton_schulz(flat, steps, coefficients, [f == "gram" for f in forms], dtype)
    results = [view.reshape(t.shape) for view, t in zip(_unpack(packed, flat, forms), tensors, strict=True)]
    return results[0] if is_one else results


def muon_updates(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    momentum: float | Tensor,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: str = "jordan",
    backend: str | None = None,
) -> list[Tensor]:
    """m <- mu m + g in place, then NS(g + mu m), or NS(m) -> the updates, fp16 on a GPU, in the gradients' shapes."""
    _check(gradients)
    if not _takes_kernel(gradients[0], backend):
        return muon_updates_ref(gradients, momenta, momentum, nesterov, steps, coefficients)
    flat = [t.detach()[None] for t in gradients]
    forms = [pick_form(*t.shape) for t in gradients]
    dtype = torch.float16 if flat[0].is_cuda else torch.float32
    number, on_device = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
    gram = [f == "gram" for f in forms]
    packed = _muon_updates(
        flat, [m[None] for m in momenta], number, on_device, nesterov, steps, coefficients, gram, dtype
    )
    return [view[0] for view in _unpack(packed, flat, forms)]


def muon_apply_(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float | Tensor,
    scale: str = "original",
    backend: str | None = None,
) -> None:
    """W <- (1 - lr * decay) W - lr * update_scale * u, in place."""
    if not _takes_kernel(parameters[0], backend):
        muon_apply_ref_(parameters, updates, lr, weight_decay, scale)
        return
    rates = [lr, weight_decay]
    if any(isinstance(rate, Tensor) for rate in rates):
        device = parameters[0].device
        on_device = [
            r if isinstance(r, Tensor) else torch.full((), r, dtype=torch.float32, device=device) for r in rates
        ]
        rates = [0.0, 0.0]
    else:
        on_device = [None, None]
    flat = [p.detach()[None] for p in parameters]
    _muon_apply(flat, [u[None] for u in updates], *rates, *on_device, scale)


def _takes_kernel(tensor: Tensor, backend: str | None) -> bool:
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend={backend!r} is not possible; allowed: 'triton', 'reference' or None")
    return backend == "triton" or (backend is None and tensor.is_cuda)


def _check_device(device: torch.device) -> None:
    """ValueError for a GPU that the kernels do not run on. Inside the ops, where no compiler traces it.

    Off the GPU they run in Triton's interpreter.
    """
    if device.type == "cuda" and pick_backend(device) != "triton":
        raise ValueError("the kernels need compute capability 9.0 (Hopper); allowed here: backend='reference'")


def _check(tensors: Sequence[Tensor]) -> None:
    """ValueError for what is no matrix, and for a list that is not of one kind."""
    first = tensors[0]
    for t in tensors:
        if t.ndim < 2 or 0 in t.shape:
            raise ValueError(f"a tensor of shape {tuple(t.shape)} is not possible; allowed: [..., m, n], none 0")
        if not t.is_floating_point():
            raise ValueError(f"a tensor of {t.dtype} is not possible; allowed: floating point")
        if (t.dtype, t.device) != (first.dtype, first.device):
            raise ValueError(
                f"tensors of {first.dtype} on {first.device} and {t.dtype} on {t.device} are not possible in one call; "
                "allowed: one dtype on one device"
            )
