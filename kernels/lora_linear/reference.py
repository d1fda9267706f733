"""The reference, and the forms in which one or several projections are given."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import Dropout, drop_ref
from ..int6.layout import Int6Matrix
from ..slots import rows_of_slots


def as_list(given: Any, count: int) -> list:
    """One thing for each projection: `given` itself is one, or a sequence; None is None for all."""
    return [None] * count if given is None else list(given) if isinstance(given, list | tuple) else [given]


def lora_linear_ref(
    x: Tensor,
    weight: Tensor | Int6Matrix | Sequence[Tensor | Int6Matrix],
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    slots: Tensor | None = None,
    *,
    bias: Tensor | None | Sequence[Tensor | None] = None,
    scale: Tensor | None | Sequence[Tensor | None] = None,
    ranks: Tensor | None | Sequence[Tensor | None] = None,
    dropout: Dropout | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """y [B, S, N] of `x` [B, S, K], in its float dtype: x W^T + bias + s (drop(x) A^T) B^T, each document's A and B.

    `weight` is [N, K] in x's dtype, or an Int6Matrix. `lora_a` [slots, R, K] and `lora_b` [slots, N, R] are cast to x's
    dtype. `slots` int [B] names the adapter of each document, None document b's own. A slot named twice sums its
    gradients; -1, or any slot outside the pool, is no adapter. `bias` [N], `scale` [slots], `ranks` int [slots] and
    `dropout` are as of :func:`lora_linear`. Autograd gives the gradients of x, a dense weight, lora_a, lora_b and bias.

    With a sequence of weights all others are sequences too, and there is an output for each: a tuple.

    Example: y = lora_linear_ref(x, up, up_a, up_b, slots)
    """
    if not isinstance(weight, list | tuple):
        return _one(x, weight, lora_a, lora_b, slots, bias, scale, ranks, dropout)
    keys = [None] * len(weight) if dropout is None else dropout.keys
    rate = 0.0 if dropout is None else dropout.rate
    each = [as_list(given, len(weight)) for given in (bias, scale, ranks)]
    return tuple(
        _one(x, *one, slots, *more, None if key is None else Dropout(rate, key))
        for *one, more, key in zip(weight, lora_a, lora_b, zip(*each, strict=True), keys, strict=True)
    )


def _one(x, weight, lora_a, lora_b, slots, bias, scale, ranks, dropout) -> Tensor:
    base = F.linear(x, weight.dequantize(x.dtype) if isinstance(weight, Int6Matrix) else weight, bias)
    if scale is not None:
        lora_b = lora_b * scale[:, None, None]
    if ranks is not None:
        is_above = torch.arange(lora_a.size(1), device=x.device) >= ranks[:, None]
        lora_a, lora_b = lora_a.masked_fill(is_above[:, :, None], 0.0), lora_b.masked_fill(is_above[:, None, :], 0.0)
    if slots is not None:
        lora_a, lora_b = rows_of_slots(lora_a, slots), rows_of_slots(lora_b, slots)
    inputs = x if dropout is None else drop_ref(x, *dropout)
    return torch.baddbmm(base, torch.bmm(inputs, lora_a.to(x.dtype).mT), lora_b.to(x.dtype).mT)
