"""The head's loss in a step, with the LoRA of each document or without one."""

import torch
from torch import Tensor

from ..kernels import lora_head_nll, lora_head_nll_grads_
from ..model.network import NO_LORA, Lora


def head_nll(
    hidden: Tensor,
    weight: Tensor,
    lora: Lora | None,
    targets: Tensor,
    *loss: float,
    slots: Tensor,
    backend: str | None,
) -> Tensor:
    """NLL [B, S] of `targets` int [B, S] for `hidden` [B, S, D], document b adapted by slot slots[b], with the bits of
    :func:`head_nll_grads_`; `loss` is softcap and temperature.

    The head runs as if gradients would follow: without them it adds up its logits in another order.
    """
    a, b, _ = lora or NO_LORA
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        return lora_head_nll(hidden, weight, a, b, targets, *loss, slots=slots, backend=backend).detach()


def head_nll_grads_(
    hidden: Tensor,
    weight: Tensor,
    lora: Lora | None,
    targets: Tensor,
    share: Tensor,
    *loss: float,
    slots: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """NLL [B, S], and the gradient of sum(share * NLL) to `hidden`; that of the adapter goes to `lora.grads`."""
    a, b, grads = lora or NO_LORA
    about = targets, share, *(grads or (None, None)), *loss
    return lora_head_nll_grads_(hidden.detach(), weight, a, b, *about, slots=slots, backend=backend)
