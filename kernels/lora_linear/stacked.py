"""Two or three projections of one input as one product: their weights and adapters one after the other, by the kernels
of `lora_qkv`. x and the gradients are read once for all of them, and dx is written once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import round_up
from ..int6.layout import Int6Matrix
from ..lora_qkv.op import projected
from .validate import Projections

RANKS = 8
"""Of other numbers of ranks than multiples of it the three projections' forward is serialised by the compiler."""
SLOTS = 64
"""The most slots of a pool that is copied. It is not the batch that decides: a document's bits would depend on it."""


def can_be_stacked(
    weights: Sequence[Tensor | Int6Matrix],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> bool:
    """Whether those kernels can make them, for all but the sizes: frozen dense weights and no bias, adapters of one
    rank in a pool of up to SLOTS, for it is copied.
    """
    return (
        len(weights) > 1
        and len({b.size(2) for b in lora_b}) == len({a.dtype for a in lora_a}) == 1
        and lora_a[0].size(0) <= SLOTS
        and all(bias is None for bias in biases)
        and not any(isinstance(weight, Int6Matrix) or weight.requires_grad for weight in weights)
    )


def stacked_linears(x: Tensor, given: Projections) -> list[Tensor]:
    """y of each projection. The adapters are copied by PyTorch, which adds their gradients up; torch.compile joins the
    copies.
    """
    sizes, rank = [weight.size(0) for weight in given.weights], given.lora_b[0].size(2)
    lora_a = torch.stack(_up_to_rank(given.lora_a, given.ranks, 1), dim=1)
    lora_b = torch.cat(_scaled(_up_to_rank(given.lora_b, given.ranks, 2), given.scales), dim=1)
    if more := round_up(rank, RANKS) - rank:
        lora_a, lora_b = F.pad(lora_a, (0, 0, 0, more)), F.pad(lora_b, (0, more))
    return projected(x, torch.cat(given.weights), lora_a, lora_b, given.slots, sizes)


def _up_to_rank(factors: Sequence[Tensor], ranks: Sequence[Tensor | None], dim: int) -> list[Tensor]:
    """A or B, zeros from each adapter's rank on, whatever lies there."""
    of_rank = [-1 if dim == each else 1 for each in range(3)]
    count = torch.arange(factors[0].size(dim), device=factors[0].device).view(of_rank)
    return [
        factor if rank is None else torch.where(count < rank.view(-1, 1, 1), factor, 0.0)
        for factor, rank in zip(factors, ranks, strict=True)
    ]


def _scaled(factors: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        factor if scale is None else factor * scale.view(-1, 1, 1).to(factor.dtype)
        for factor, scale in zip(factors, scales, strict=True)
    ]
