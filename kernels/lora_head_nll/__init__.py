"""Negative log-likelihood of a soft-capped, tied LM head, with or without one LoRA adapter a batch row.

    u   = h A^T;   z = h W^T + u B^T
    l   = c * tanh(z / c) / T                        c the softcap, T the temperature: it divides the logits
                                                     c infinite: l = z / T, no softcap
    nll = logsumexp(l) - l[target]                   natural log

    dz  = dnll * (softmax(l) - onehot(target)) * (1 - tanh^2(z / c)) / T
    dh  = dz W + (dz B) A;   dA = (dz B)^T h;   dB = dz^T u;   dW = dz^T h

h [B, S, D] (any leading dimensions without adapters), weight [V, D] in the same dtype: bf16, fp16 or fp32; lora_a
[slots, R, D] and lora_b [slots, V, R] in any float dtype, cast to h's where they are multiplied, R up to 128; each
slot's matrix contiguous, the slots any distance apart, so that both may be views of a flat pool. targets int [B, S];
slots int [B], the adapter of each batch row. nll fp32 [B, S]. Gradients come in the dtype of what they belong to. All
sums are in fp32, in an order that depends on nothing but the shapes: the same bits in every run, and for a row in every
batch.

The forward takes a block of tokens through the whole vocabulary, tile by tile, and keeps the logits on the chip. As
|l| <= c / T, exp(l) needs no running maximum (up to c / T = 60, in 16 bits): a tile of
E = exp(l) (1 - tanh^2) / T is final up to a row factor when the tile is. bf16, whose range holds it, stores it as such:
dz = dnll * exp(-logsumexp) * E. The target's element is replaced by that of p - 1. Its rounding, the largest of its
row, goes into the row factor. The gradients are products with E, scaled in their epilogues. Of [B, S, V] only E is ever
in memory: 2 bytes a logit, for as long as a gradient is wanted; without one nothing is kept. Other dtypes and caps take
a second sweep that normalises E.

FLOPs: 2 B S V D for each of forward, dh and dW; 2 B S R (D + V) for each of forward, dh and the adapters' gradients.
Bytes, bf16: h twice, E written once and read twice (dh, dB; dW), dh once.

Slot -1, or one past the pool, is no adapter and gets no gradient. A slot named twice sums its gradients in the order of
the rows. A target outside [0, V) is not scored: nll 0, no gradient. :func:`check_targets` finds those that are not
-100. Refused: D that is not a multiple of 16, ranks over 128, a softcap or temperature that is not above 0.

:func:`linear_nll` (:mod:`klora.kernels.lora_head_nll.logits`) is for vocabularies and heads of any size.

Hu et al. 2021 (adapters); Moshier's Cephes (tanh).
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports
from .reference import linear_nll_ref, lora_head_nll_ref, softcap_logits_ref, softcap_nll_ref

if TYPE_CHECKING:
    from .launch import pick_config
    from .logits import linear_nll
    from .op import check_targets, lora_head_nll, lora_head_nll_grads_, softcap_nll

__all__ = [
    "check_targets",
    "linear_nll",
    "linear_nll_ref",
    "lora_head_nll",
    "lora_head_nll_grads_",
    "lora_head_nll_ref",
    "pick_config",
    "softcap_logits_ref",
    "softcap_nll",
    "softcap_nll_ref",
]

__getattr__, __dir__ = lazy_exports(__name__)
