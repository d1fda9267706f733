"""Negative log-likelihood of a soft-capped, tied LM head, with or without one LoRA adapter a batch row.

    z   = h W^T [+ (h A^T) B^T]
    l   = c * tanh(z / c) / T                        c the softcap, T the temperature: it divides the logits
    nll = logsumexp(l) - l[target]                   natural log

h [B, S, D] or [..., D]; weight [V, D]; lora_a [slots, R, D]; lora_b [slots, V, R]; targets int [B, S]; slots int [B].
Returns nll [B, S] fp32 (fp64 for fp64 input). z is in h's dtype, everything after it in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def softcap_logits_ref(z: Tensor, softcap: float, temperature: float = 1.0) -> Tensor:
    """softcap * tanh(z / softcap) / temperature in fp32 (fp64 stays fp64)."""
    z = z if z.dtype == torch.float64 else z.float()
    return softcap * torch.tanh(z / softcap) / temperature


def softcap_nll_ref(h: Tensor, weight: Tensor, targets: Tensor, softcap: float, temperature: float = 1.0) -> Tensor:
    """nll of `targets` [...] for h [..., D] under the head `weight` [V, D]."""
    logits = softcap_logits_ref(F.linear(h, weight), softcap, temperature)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction="none").view(targets.shape)


def lora_head_nll_ref(
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    targets: Tensor,
    softcap: float,
    temperature: float = 1.0,
    slots: Tensor | None = None,
) -> Tensor:
    """nll [B, S] of `targets` [B, S] for h [B, S, D], batch row b adapted by slot slots[b] (b itself without slots)."""
    if slots is not None:
        lora_a, lora_b = lora_a[slots], lora_b[slots]
    inner = torch.bmm(h, lora_a.to(h.dtype).mT)
    z = torch.baddbmm(F.linear(h, weight), inner, lora_b.to(h.dtype).mT)
    logits = softcap_logits_ref(z, softcap, temperature)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction="none").view(targets.shape)
