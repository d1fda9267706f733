"""Causal grouped-query attention, deterministic, with a backward that can end in the projections' own gradients.

    s_ij = q_i k_j / sqrt(d) for j <= i;   p_i = softmax(s_i);   out_i = sum_j p_ij v_j     head h reads group h G / H

    dv_j  = sum_i p_ij dout_i;   dp_ij = dout_i v_j;   delta_i = dout_i out_i
    ds_ij = p_ij (dp_ij - delta_i);   dq_i = sum_j ds_ij k_j / sqrt(d);   dk_j = sum_i ds_ij q_i / sqrt(d)

q [B, S, H, d], k and v [B, S, G, d] -> out [B, S, H, d], of one dtype: bf16, fp16 or fp32; d a multiple of 8 up to
256, tuned for 64 in 16 bits; H a multiple of G, any S. With `tail`, out [B, tail, H, d] belongs to the last `tail`
queries, and dq is zero before them. With `start`, token i sees the tokens from start_i on: its own document. Blocks of
keys and of queries that share no document are skipped; only blocks in which a document starts are masked. Packed
documents, [T, H, d] with `cu_seqlens`, are one row with such starts.

A block of a head is a power of two wide: the copy engine fills what a head lacks with zeros and stores nothing there,
so that no kernel knows of it. Heads of 80 cost what heads of 128 do.

The elements of a head lie side by side. Documents, tokens and heads may be any multiple of 16 bytes apart (views of the
stacked output of a QKV product); anything else is copied. Sums are fp32. p and ds are rounded to the inputs' dtype
before they are multiplied, and the row sum of p is that of the rounded ones. fp32 is not tuned: p comes from the
logsumexp, which costs its gradients up to half as much error again as a kept softmax.

FLOPs: forward 2 B H S^2 d; backward 7 B H S^2 d instead of 5. dk and dv come from one launch and dq from another, and
each computes s and dp. In return one program takes each sum in a fixed order, without atomics: the same bits in every
run, and a document's bits do not depend on the rest of its batch. It also saves the launches around an atomic backward:
the sums of dk and dv over a group's heads, delta, the conversion of an fp32 dq. Kept for the backward: out and the
logsumexp, 4 bytes a query and head.

A program's tile is 64 rows, 16 in fp32: up to four heads of a group (two of 32 queries, say), whose keys and values are
read once. The blocks that the diagonal crosses have their own loop, and no other block is masked.

Dao et al. 2022 and 2023 (FlashAttention); Milakov and Gimelshein 2018 (online softmax).
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports
from .choices import CHOICES, PACKAGES, attend, pick_attention, why_not
from .reference import BACKENDS, causal_attention_ref, check_cu_seqlens, document_starts, packed_starts

if TYPE_CHECKING:
    from .auto import Chosen, auto_attention, explain_attention
    from .cached import cache_write_, cache_write_ref_, cached_attention, cached_attention_ref
    from .op import HEAD_DIMS, causal_attention, causal_attention_varlen

__all__ = [
    "BACKENDS",
    "CHOICES",
    "Chosen",
    "HEAD_DIMS",
    "PACKAGES",
    "attend",
    "auto_attention",
    "cache_write_",
    "cache_write_ref_",
    "cached_attention",
    "cached_attention_ref",
    "causal_attention",
    "causal_attention_ref",
    "causal_attention_varlen",
    "check_cu_seqlens",
    "document_starts",
    "explain_attention",
    "packed_starts",
    "pick_attention",
    "why_not",
]

__getattr__, __dir__ = lazy_exports(__name__)
