"""The ops: one file or folder each, usable alone. `<op>_ref` is its reference in PyTorch."""

from typing import TYPE_CHECKING

# By its full name: in the repository's root, transformers takes this folder for Hugging Face's package `kernels` and
# imports it to ask its version.
from klora.lazy import lazy_exports

if TYPE_CHECKING:
    from .attention import (
        auto_attention,
        cache_write_,
        cache_write_ref_,
        cached_attention,
        cached_attention_ref,
        causal_attention,
        causal_attention_ref,
        causal_attention_varlen,
        check_cu_seqlens,
        explain_attention,
        packed_starts,
        pick_attention,
    )
    from .bigram import BOS_ID, bigram_hash_ref
    from .dropout import Dropout, drop_ref, row_keys
    from .embedding import bigram_embedding, bigram_embedding_ref
    from .int6 import (
        Int6Linear,
        Int6Matrix,
        Int6Weight,
        dequantize_int6_ref,
        int6_linear,
        int6_linear_dx,
        int6_linear_ref,
        pack_int6,
        pack_int6_ref,
        quantize_int6,
        quantize_int6_ref,
        unpack_int6,
        unpack_int6_ref,
    )
    from .linear import linear, linear_ref
    from .lora_adam import lora_adam_, lora_adam_ref_
    from .lora_attention import (
        lora_attention,
        lora_attention_ref,
        lora_cached_attention,
        lora_cached_attention_ref,
    )
    from .lora_head_nll import (
        check_targets,
        linear_nll,
        linear_nll_ref,
        lora_head_nll,
        lora_head_nll_grads_,
        lora_head_nll_ref,
        softcap_logits_ref,
        softcap_nll,
        softcap_nll_ref,
    )
    from .lora_linear import lora_linear, lora_linear_ref
    from .lora_mlp import lora_mlp, lora_mlp_ref
    from .lora_qkv import lora_qkv, lora_qkv_ref, lora_qkv_rope, lora_qkv_rope_ref
    from .lora_swiglu_mlp import lora_swiglu_mlp, lora_swiglu_mlp_ref
    from .mlp import relu_squared_mlp, relu_squared_mlp_ref, relu_squared_ref, swiglu_mlp, swiglu_mlp_ref
    from .newton_schulz import muon_apply_, muon_updates, newton_schulz, newton_schulz_ref
    from .qkv_attention import qkv_attention, qkv_attention_ref
    from .residual_mlp import residual_mlp, residual_mlp_norm, residual_mlp_norm_ref, residual_mlp_ref
    from .rms_norm import ResidualNorm, Unnormed, residual_norm, residual_norm_ref, rms_norm, rms_norm_ref
    from .rotary import apply_rotary, apply_rotary_ref, norm_rotary, norm_rotary_ref, ntk_base, rotary_tables
    from .slots import check_slots
    from .swiglu import swiglu, swiglu_ref

__all__ = [
    "BOS_ID",
    "Dropout",
    "Int6Linear",
    "Int6Matrix",
    "Int6Weight",
    "ResidualNorm",
    "Unnormed",
    "apply_rotary",
    "apply_rotary_ref",
    "auto_attention",
    "bigram_embedding",
    "bigram_embedding_ref",
    "bigram_hash_ref",
    "cache_write_",
    "cache_write_ref_",
    "cached_attention",
    "cached_attention_ref",
    "causal_attention",
    "causal_attention_ref",
    "causal_attention_varlen",
    "check_cu_seqlens",
    "check_slots",
    "check_targets",
    "dequantize_int6_ref",
    "drop_ref",
    "explain_attention",
    "int6_linear",
    "int6_linear_dx",
    "int6_linear_ref",
    "linear",
    "linear_nll",
    "linear_nll_ref",
    "linear_ref",
    "lora_adam_",
    "lora_adam_ref_",
    "lora_attention",
    "lora_attention_ref",
    "lora_cached_attention",
    "lora_cached_attention_ref",
    "lora_head_nll",
    "lora_head_nll_grads_",
    "lora_head_nll_ref",
    "lora_linear",
    "lora_linear_ref",
    "lora_mlp",
    "lora_mlp_ref",
    "lora_qkv",
    "lora_qkv_ref",
    "lora_qkv_rope",
    "lora_qkv_rope_ref",
    "lora_swiglu_mlp",
    "lora_swiglu_mlp_ref",
    "muon_apply_",
    "muon_updates",
    "newton_schulz",
    "newton_schulz_ref",
    "norm_rotary",
    "norm_rotary_ref",
    "ntk_base",
    "pack_int6",
    "pack_int6_ref",
    "packed_starts",
    "pick_attention",
    "qkv_attention",
    "qkv_attention_ref",
    "quantize_int6",
    "quantize_int6_ref",
    "relu_squared_mlp",
    "relu_squared_mlp_ref",
    "relu_squared_ref",
    "residual_mlp",
    "residual_mlp_norm",
    "residual_mlp_norm_ref",
    "residual_mlp_ref",
    "residual_norm",
    "residual_norm_ref",
    "rms_norm",
    "rms_norm_ref",
    "rotary_tables",
    "row_keys",
    "softcap_logits_ref",
    "softcap_nll",
    "softcap_nll_ref",
    "swiglu",
    "swiglu_mlp",
    "swiglu_mlp_ref",
    "swiglu_ref",
    "unpack_int6",
    "unpack_int6_ref",
]

__getattr__, __dir__ = lazy_exports(__name__)
