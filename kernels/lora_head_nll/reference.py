"""The plain PyTorch statement of the head's loss, with and without adapters."""

import torch
import torch.nn.functional as F
from torch import Tensor


def softcap_logits_ref(z: Tensor, softcap: float, temperature: float = 1.0) -> Tensor:
    """softcap * tanh(z / softcap) / temperature in fp32 (fp64 stays fp64)."""
    z = z if z.dtype == torch.float64 else z.float()
    return softcap * torch.tanh(z / softcap) / temperature


def softcap_nll_ref(h: Tensor, weight: Tensor, targets: Tensor, softcap: float, temperature: float = 1.0) -> Tensor:
    """nll of `targets` [...] for h [..., D] under the head `weight` [V, D]."""
    return _nll(F.linear(h, weight), targets, softcap, temperature)


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
    """nll [B, S] of `targets` [B, S] for h [B, S, D], batch row b adapted by slot slots[b] (b itself without slots).

    A slot named twice sums its gradients; slot -1 is no adapter.
    """
    if slots is not None:
        named = (slots >= 0)[:, None, None]
        lora_a, lora_b = (t[slots.clamp(min=0)] * named for t in (lora_a, lora_b))
    inner = torch.bmm(h, lora_a.to(h.dtype).mT)
    z = torch.baddbmm(F.linear(h, weight), inner, lora_b.to(h.dtype).mT)
    return _nll(z, targets, softcap, temperature)


def _nll(z: Tensor, targets: Tensor, softcap: float, temperature: float) -> Tensor:
    logits = softcap_logits_ref(z, softcap, temperature)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction="none").view(targets.shape)
