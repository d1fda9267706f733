"""Newton-Schulz and Muon in plain PyTorch: the coefficient sets, and the references that the kernels are held to."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)
"""One quintic for every step (Jordan 2024): singular values in [0.01, 1] end in [0.68, 1.13] after five steps."""

# The composition of quintics that is nearest to 1 on [0.001, 1], one after the other (Amsel et al. 2025,
# arXiv:2505.16932, with their cushion); computed by tests/test_newton_schulz.py's exchange algorithm, and equal to the
# paper's list. From the eighth on they are the Taylor polynomial at 1.
_POLAR = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_TAYLOR: Coefficients = (1.875, -1.25, 0.375)
SAFETY = 1.01
"""polar_express takes x / SAFETY instead of x, so that rounding above 1 is not driven away from 1."""
EPS = 1e-7
"""Added to the Frobenius norm: a matrix of zeros stays zeros."""
SHRINK = 2.0**-4
"""Factor of a direction and of EPS beside it, which changes no other bit of the result: g + mu m of the largest finite
numbers stays finite, and 1 / x normal."""


def coefficients_of(coefficients: str | Sequence[float], steps: int) -> list[Coefficients]:
    """(a, b, c) of each of `steps` steps: of 'jordan', of 'polar_express', or the same three given numbers.

    The numbers are a sequence, or text as :func:`spelled` writes it.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps} is not possible; allowed: 1 or more")
    if coefficients == "jordan":
        return [JORDAN] * steps
    if coefficients == "polar_express":
        safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in _POLAR]
        return (safe + [_TAYLOR] * steps)[:steps]
    try:
        a, b, c = map(float, coefficients.split(",") if isinstance(coefficients, str) else coefficients)
    except (TypeError, ValueError):
        a = math.nan
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        raise ValueError(
            f"coefficients={coefficients!r} is not possible; allowed: 'jordan', 'polar_express' or three finite numbers"
        )
    return [(a, b, c)] * steps


def spelled(coefficients: str | Sequence[float]) -> str:
    """`coefficients` as text, which an operator's schema takes."""
    return coefficients if isinstance(coefficients, str) else ",".join(repr(float(x)) for x in coefficients)


def result_dtype(matrices: Tensor) -> torch.dtype:
    """bf16 on a GPU, where the products are cheap in it; as given for float64 and on a CPU."""
    return torch.bfloat16 if matrices.is_cuda and matrices.dtype != torch.float64 else matrices.dtype


@torch.no_grad()
def newton_schulz_ref(
    matrices: Tensor,
    steps: int = 5,
    dtype: torch.dtype | None = None,
    coefficients: str | Sequence[float] = "jordan",
    eps: float = EPS,
) -> Tensor:
    """Orthogonalise `matrices` [..., m, n] -> the same shape, in `dtype`; None is :func:`result_dtype`. No gradient.

    `steps` iterations with `coefficients` 'jordan', 'polar_express' or three numbers; `eps` is added to the Frobenius
    norm. The norm is taken in fp64, where no fp32 entry overflows. A matrix with an entry that is no finite number
    gives zeros.
    ValueError: steps below 1, other coefficients.

    Example: orthogonal = newton_schulz_ref(weight)
    """
    dtype = dtype or result_dtype(matrices)
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    x = torch.where(norm.isfinite(), matrices / (norm + eps), 0.0).to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for a, b, c in coefficients_of(coefficients, steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def update_scale(rows: int, columns: int, scale: str = "original") -> float:
    """Factor of lr for a matrix: sqrt(max(1, rows/columns)), or 0.2 sqrt(max(rows, columns)) for 'match_rms_adamw'."""
    if scale == "original":
        return max(1.0, rows / columns) ** 0.5
    if scale == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    raise ValueError(f"scale={scale!r} is not possible; allowed: 'original', 'match_rms_adamw'")


def muon_updates_ref(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    momentum: float | Tensor,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: str | Sequence[float] = "jordan",
) -> list[Tensor]:
    """m <- mu m + g in place, then Newton-Schulz of g + mu m (Nesterov) or of m; matrices of one shape in one batch.

    If any mu m + g has an entry that is no finite number, the step is skipped: every m stays, and every update is NaN.
    """
    advanced, finite = muon_advanced_ref(gradients, momenta, momentum)
    return muon_directions_ref(gradients, momenta, advanced, finite, momentum, nesterov, steps, coefficients)


@torch.no_grad()
def muon_advanced_ref(
    gradients: Sequence[Tensor], momenta: Sequence[Tensor], momentum: float | Tensor
) -> tuple[list[Tensor], Tensor]:
    """mu m + g of each matrix, and whether all are finite, an int32 scalar."""
    advanced = list(torch._foreach_mul(momenta, momentum))
    torch._foreach_add_(advanced, gradients)
    return advanced, torch.stack([m.isfinite().all() for m in advanced]).all().int()


@torch.no_grad()
def muon_directions_ref(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    advanced: Sequence[Tensor],
    finite: Tensor,
    momentum: float | Tensor,
    nesterov: bool,
    steps: int,
    coefficients: str | Sequence[float],
) -> list[Tensor]:
    """The second half of :func:`muon_updates_ref`; the step is taken if `finite` is 1."""
    is_taken = finite > 0
    directions = torch._foreach_mul(advanced, SHRINK)
    if nesterov:
        torch._foreach_mul_(directions, momentum)
        small = [
            gradient.to(direction.dtype) * SHRINK for gradient, direction in zip(gradients, directions, strict=True)
        ]
        directions = torch._foreach_add(small, directions)
    for m, new in zip(momenta, advanced, strict=True):
        m.copy_(torch.where(is_taken, new, m))
    by_shape: dict[torch.Size, list[int]] = {}
    for index, direction in enumerate(directions):
        by_shape.setdefault(direction.shape, []).append(index)
    updates: dict[int, Tensor] = {}
    for indices in by_shape.values():
        stacked = torch.stack([directions[i] for i in indices])
        batch = newton_schulz_ref(stacked, steps, None, coefficients, EPS * SHRINK)
        updates.update(zip(indices, torch.where(is_taken, batch, math.nan).unbind(), strict=True))
    return [updates[index] for index in range(len(directions))]


@torch.no_grad()
def muon_apply_ref_(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float | Tensor,
    scale: str = "original",
    rows: Sequence[int] | None = None,
) -> None:
    """W <- (1 - lr * decay) W - lr * update_scale * u, in place; an entry stays where u is NaN.

    `rows` are those of the matrices that the parameters are parts of; None: they are whole.
    """
    if not parameters:
        return
    rows = [parameter.size(0) for parameter in parameters] if rows is None else rows
    decayed = torch._foreach_mul(parameters, 1.0 - lr * weight_decay)
    for parameter, new, update, whole in zip(parameters, decayed, updates, rows, strict=True):
        new.sub_(update.to(parameter.dtype) * (lr * update_scale(whole, parameter.size(1), scale)))
        parameter.copy_(torch.where(update.isnan(), parameter, new))
