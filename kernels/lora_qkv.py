"""Q, K and V projections with one LoRA adapter a batch row.

    [q | k | v] = x W^T + (x A_p^T) B_p^T           p the projection (q, k or v) that an output row belongs to

x [B, S, D]; weight [Nq+Nk+Nv, D], the three projections stacked; lora_a [slots, 3, R, D]; lora_b [slots, Nq+Nk+Nv, R];
slots int [B] gives the adapter of each batch row, and may be left out when the batch row is the slot. Returns q
[B, S, Nq], k [B, S, Nk], v [B, S, Nv] in x's dtype. 2*B*S*D*N FLOPs for the weight, 2*B*S*R*(3*D + N) for the adapters
(low-rank adaptation: Hu et al. 2021).
"""

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
    """q, k, v of width `sizes`. Adapters of another dtype are cast to x's. A slot named twice sums its gradients."""
    if slots is not None:
        lora_a, lora_b = lora_a[slots], lora_b[slots]
    batch, rank = x.size(0), lora_a.size(-2)
    inner = torch.bmm(x, lora_a.to(x.dtype).reshape(batch, 3 * rank, -1).mT).split(rank, dim=-1)
    base = F.linear(x, weight).split(sizes, dim=-1)
    outer = lora_b.to(x.dtype).split(sizes, dim=-2)
    return tuple(torch.baddbmm(b, i, o.mT) for b, i, o in zip(base, inner, outer, strict=True))
