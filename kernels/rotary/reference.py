"""The tables, and the reference of norm, rotation and gain."""

import math

import torch
from torch import Tensor

from ..rms_norm import rms_norm_ref


def ntk_base(base: float, length: int, train_length: int, head_dim: int) -> float:
    """The rotary base for sequences of `length` tokens: `base` up to `train_length`, NTK-scaled past it.

    `head_dim` is above 2. All are numbers, and so is the result.

    Example: base = ntk_base(10000.0, length=2048, train_length=1024, head_dim=64)
    """
    return base * max(1.0, length / train_length) ** (head_dim / (head_dim - 2))


def rotary_tables(length: int, head_dim: int, base: float, device=None, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim/2] for positions 0..length-1, without gradients.

    Angles are `base`^(-2i / head_dim) times the position, computed in float64 on `device` and rounded once to `dtype`.

    Example: cos, sin = rotary_tables(length=8, head_dim=16, base=10000.0)
    """
    with torch.inference_mode(False):  # who keeps them may train with them later
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
        angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary_ref(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """`x` [B, S, H, d] with the first elements of each head rotated, in x's float dtype.

    `cos`, `sin`, `positions` and `interleaved` are those of :func:`apply_rotary`; the rotation is computed in the
    tables' dtype. Autograd gives the gradient of x.

    Example: q = apply_rotary_ref(q, cos, sin)
    """
    if positions is None:
        cos, sin = cos[: x.size(1)], sin[: x.size(1)]
    else:
        is_inside = (positions >= 0) & (positions < len(cos))
        rows = torch.where(is_inside, positions, 0)
        cos, sin = (table[rows].masked_fill(~is_inside[..., None], math.nan) for table in (cos, sin))
    rotated, rest = x.split([2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    pairs = rotated.to(cos.dtype).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    pairs = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(pairs, -1 if interleaved else -2).flatten(-2)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)


def norm_rotary_ref(x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None = None) -> Tensor:
    """`x` [B, S, H, d], each head normed, rotated and, if `gain` [H] is given, times it; in x's float dtype.

    `cos` and `sin` are [S, d/2], or [B, S, d/2] for a document's own; the rotation is computed in their dtype. Autograd
    gives all gradients.

    Example: z = norm_rotary_ref(q, cos, sin, gain)
    """
    first, second = rms_norm_ref(x).to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    if gain is not None:
        rotated = rotated * gain[:, None]
    return rotated.to(x.dtype)
