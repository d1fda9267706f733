"""Rotary position embedding, with per-head QK-norm and query gain, or alone for anyone's model (:func:`apply_rotary`).

    y = x * r,  r = 1 / sqrt(mean(x^2) + eps)         over one head, no weight
    z[:d/2] = y[:d/2]*cos - y[d/2:]*sin               half-split rotation by position * base^(-2i/d)
    z[d/2:] = y[d/2:]*cos + y[:d/2]*sin
    out = gain[h] * z                                 gain on queries only

    e  = the rotation of dout by the opposite angle;  c = sum(e * y) over the head
    dx = gain[h] * r * (e - y * c / d);               dgain[h] = sum of c over documents and tokens

q [B, S, H, d] and k [B, S, G, d] of one dtype: bf16, fp16 or fp32, the elements of a head side by side, documents,
tokens and heads any distance apart (views of the stacked output of a QKV product); cos, sin [S, d/2] and gain [H] fp32.
The outputs and gradients are contiguous, in the dtype of q. fp64 everywhere for the reference. All arithmetic is fp32
and rounded once, on the way out.

Bytes, in items of the dtype: forward 2 (H + G) d a token, backward 3 (H + G) d. q and k are kept and their norm is
computed again, which costs no bytes; keeping r would. cos and sin are read once a token for all heads, from cache. q
and k take one launch. dgain is summed over a program's tokens, then over programs, in fixed order.

Rotation by RoFormer (Su et al. 2021), NTK-scaled base past the training length: base * (S / S_train)^(d / (d - 2)).
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports
from .reference import apply_rotary_ref, norm_rotary_ref, ntk_base, rotary_tables

if TYPE_CHECKING:
    from .op import norm_rotary
    from .plain import apply_rotary

__all__ = ["apply_rotary", "apply_rotary_ref", "norm_rotary", "norm_rotary_ref", "ntk_base", "rotary_tables"]

__getattr__, __dir__ = lazy_exports(__name__)
