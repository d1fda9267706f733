"""The reference of the head's loss in PyTorch, with and without adapters."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..slots import rows_of_slots

NO_SOFTCAP = 2.0**64
"""From here on, infinity included, a softcap is none: it would change no logit up to 2^38, not even in fp64."""


REDUCTIONS = ("none", "sum", "mean")


def check_softcap(softcap: float, temperature: float) -> None:
    """Raise ValueError for values that the ops do not take."""
    if softcap is None or not (softcap > 0 and 0 < temperature < math.inf):
        raise ValueError(
            f"softcap is {softcap} and temperature {temperature}; both must be above 0, and temperature finite; "
            "softcap=math.inf is no softcap"
        )


def softcap_logits_ref(z: Tensor, softcap: float, temperature: float = 1.0) -> Tensor:
    """softcap * tanh(z / softcap) / temperature for `z` of any shape; z / temperature if `softcap` is infinite.

    fp64 stays fp64, anything else becomes fp32. Autograd gives the gradient of z.
    ValueError: a softcap or `temperature` that is not above 0, or an infinite temperature.

    Example: logits = softcap_logits_ref(x, softcap=30.0)
    """
    check_softcap(softcap, temperature)
    z = z if z.dtype == torch.float64 else z.float()
    return (softcap * torch.tanh(z / softcap) if softcap < NO_SOFTCAP else z) / temperature


def softcap_nll_ref(h: Tensor, weight: Tensor, targets: Tensor, softcap: float, temperature: float = 1.0) -> Tensor:
    """nll fp32 [...] of `targets` int [...] for `h` [..., D] under the head `weight` [V, D] of h's dtype.

    fp64 stays fp64. `softcap` and `temperature` are those of :func:`softcap_logits_ref`, and so are the errors
    (ValueError). A target outside [0, V) gives 0 and no gradient. Autograd gives the gradients of h and weight.

    Example: nll = softcap_nll_ref(h, head, targets, softcap=30.0)
    """
    return _nll(F.linear(h, weight), targets, softcap, temperature)


def lora_head_nll_ref(
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    softcap: float,
    temperature: float = 1.0,
    slots: Tensor | None = None,
) -> Tensor:
    """nll fp32 [B, S] of `targets` int [B, S] for `h` [B, S, D], row b adapted by slot slots[b]; fp64 stays fp64.

    `weight` [V, D] in h's dtype; `lora_a` [slots, R, D] and `lora_b` [slots, V, R] are cast to it; `slots` int [B],
    None for slot b itself. A slot named twice sums its gradients; -1, or any slot outside the pool, is no adapter; None
    for both of lora_a and lora_b is none for any row.
    `softcap`, `temperature` and targets as of :func:`softcap_nll_ref`. Autograd gives the gradients of h, weight,
    lora_a and lora_b.

    Example: nll = lora_head_nll_ref(h, head, head_a, head_b, targets, softcap=30.0, slots=slots)
    """
    if lora_a is None:
        return softcap_nll_ref(h, weight, targets, softcap, temperature)
    if slots is not None:
        lora_a, lora_b = rows_of_slots(lora_a, slots), rows_of_slots(lora_b, slots)
    inner = torch.bmm(h, lora_a.to(h.dtype).mT)
    z = torch.baddbmm(F.linear(h, weight), inner, lora_b.to(h.dtype).mT)
    return _nll(z, targets, softcap, temperature)


def _nll(z: Tensor, targets: Tensor, softcap: float, temperature: float) -> Tensor:
    logits = softcap_logits_ref(z, softcap, temperature)
    targets = targets.long()
    scored = torch.where((targets >= 0) & (targets < z.size(-1)), targets, -100)
    return F.cross_entropy(logits.flatten(0, -2), scored.flatten(), reduction="none").view(targets.shape)


def linear_nll_ref(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """F.linear and F.cross_entropy: the nll fp32 [...] of `targets` int [...] for `h` [..., D], reduced.

    `weight` is [V, D] in h's dtype, `token_weights` float [...]; fp64 stays fp64. `softcap`, `temperature`,
    `ignore_index` and `reduction` are those of :func:`linear_nll`. Autograd gives the gradients of h, weight and
    token_weights.

    Example: loss = linear_nll_ref(h, head, targets)
    """
    scored = torch.where(targets == ignore_index, -100, targets)
    nll = _nll(F.linear(h, weight), scored, math.inf if softcap is None else softcap, temperature)
    return reduce_nll(nll, targets, weight.size(0), token_weights, ignore_index, reduction)


def reduce_nll(
    nll: Tensor, targets: Tensor, vocabulary: int, token_weights: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """`nll` [...], which is 0 where nothing is scored, weighted and reduced."""
    if token_weights is None and reduction != "mean":
        return nll if reduction == "none" else nll.sum()
    scored = (targets >= 0) & (targets < vocabulary) & (targets != ignore_index)
    if token_weights is None:
        count = scored.sum()
    else:
        token_weights = torch.where(scored, token_weights.to(nll.dtype), 0.0)
        nll, count = nll * token_weights, token_weights.sum()
    if reduction == "none":
        return nll
    return nll.sum() / torch.where(count == 0, 1, count) if reduction == "mean" else nll.sum()
