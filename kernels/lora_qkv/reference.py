"""The plain statement of the op."""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_qkv_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    sizes: tuple[int, int, int],
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of width `sizes`. Adapters of another dtype are cast to x's. A slot named twice sums its gradients; slot
    -1 is no adapter.
    """
    if slots is not None:
        named = slots >= 0
        lora_a = lora_a[slots.clamp(min=0)] * named[:, None, None, None]
        lora_b = lora_b[slots.clamp(min=0)] * named[:, None, None]
    batch, rank = x.size(0), lora_a.size(-2)
    inner = torch.bmm(x, lora_a.to(x.dtype).reshape(batch, 3 * rank, -1).mT).split(rank, dim=-1)
    base = F.linear(x, weight).split(sizes, dim=-1)
    outer = lora_b.to(x.dtype).split(sizes, dim=-2)
    return tuple(torch.baddbmm(b, i, o.mT) for b, i, o in zip(base, inner, outer, strict=True))
