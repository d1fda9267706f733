"""The references of the ops."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rotary import norm_rotary_ref
from ..slots import rows_of_slots


def lora_qkv_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    sizes: tuple[int, int, int],
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, Nq], k [B, S, Nk] and v [B, S, Nv] of `x` [B, S, D], in its float dtype; `sizes` is (Nq, Nk, Nv).

    `weight` is [Nq+Nk+Nv, D] in x's dtype. `lora_a` [slots, 3, R, D] and `lora_b` [slots, Nq+Nk+Nv, R] are cast to x's
    dtype. `slots` int [B] names the adapter of each document, None document b's own. A slot named twice sums its
    gradients; -1, or any slot outside the pool, is no adapter. Autograd gives the gradients of x, weight, lora_a and
    lora_b.

    Example: q, k, v = lora_qkv_ref(x, weight, lora_a, lora_b, sizes, slots)
    """
    if slots is not None:
        lora_a, lora_b = rows_of_slots(lora_a, slots), rows_of_slots(lora_b, slots)
    inner = torch.bmm(x, lora_a.to(x.dtype).flatten(1, 2).mT).split(lora_a.size(-2), dim=-1)
    base = F.linear(x, weight).split(sizes, dim=-1)
    outer = lora_b.to(x.dtype).split(sizes, dim=-2)
    return tuple(torch.baddbmm(b, i, o.mT) for b, i, o in zip(base, inner, outer, strict=True))


def lora_qkv_rope_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    sizes: tuple[int, int, int],
    head_dim: int,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of :func:`lora_qkv_ref`, then norm, rotation and, for q, gain of each head.

    `x`, `weight`, `lora_a`, `lora_b`, `sizes` and `slots` are those of :func:`lora_qkv_ref`. Heads are `head_dim` wide;
    `cos` and `sin` are [S, head_dim/2], `gain` is [Nq/head_dim]. Autograd gives all gradients.

    Example: q, k, v = lora_qkv_rope_ref(x, weight, lora_a, lora_b, cos, sin, gain, sizes, head_dim=16, slots=slots)
    """
    q, k, v = lora_qkv_ref(x, weight, lora_a, lora_b, sizes, slots)
    q = norm_rotary_ref(q.unflatten(-1, (-1, head_dim)), cos, sin, gain).flatten(-2)
    return q, norm_rotary_ref(k.unflatten(-1, (-1, head_dim)), cos, sin).flatten(-2), v
