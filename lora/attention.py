"""Attention of a model of transformers by :func:`klora.kernels.causal_attention`: k and v are not repeated for grouped
heads, and there is no mask.

transformers makes no mask for an attention whose masks it does not know, and says nothing of one that it was given. So
what a forward is given is looked at before it (:class:`Guard`), and what a layer asks of its attention in `_attend`.
"""

import math
import sys
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..kernels import causal_attention
from ..kernels.attention.op import MOST_HEAD
from .pool import LoraError

NAME = "klora_causal_attention"
"""Under which transformers knows it."""
WITHOUT = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions")
"""What layers of transformers ask of an attention, and this one does not do."""
INSTEAD = "detach() it for this"


class Attention:
    """klora's attention on a model; made by :func:`set_attention`. `before` is the name of the one that it had.

    Example: attention: Attention = set_attention(model)
    """

    def __init__(self, model: nn.Module, before: str):
        self.model, self.before = model, before
        self.hook = model.base_model.register_forward_pre_hook(Guard(model.base_model), with_kwargs=True)

    def detach(self) -> nn.Module:
        """Give the model back its own attention; the model. A second call does nothing.

        Example: model = attention.detach()
        """
        self.hook.remove()
        if self.model.config._attn_implementation == NAME:
            self.model.set_attn_implementation(self.before)
        return self.model


def set_attention(model: nn.Module) -> Attention:
    """Let a causal language model of transformers compute its attention by :func:`klora.kernels.causal_attention`,
    until :meth:`Attention.detach`.

    It is for training: whole rows, each from its first token on, padded on the right or not at all. What is padded on
    the right is read by no token before it, so leave `attention_mask` out. A mask that is given is looked at on a CPU;
    on a GPU that would wait for it, so there every mask is refused.

    LoraError: a model of another kind or of several parts; one whose attention is not causal, or has sliding windows,
    chunks, a softcap, or heads that are no multiple of 8 up to 256. LoraError in a forward: padding on the left or a
    mask that cannot be looked at, `position_ids`, tokens in a cache, another scale than 1 / sqrt(d), attention dropout,
    sinks, a position bias, weights of attention that are asked for.

    Example: attention = set_attention(model)
    """
    transformers = sys.modules.get("transformers")  # who has such a model has imported it
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise LoraError(f"model is a {type(model).__name__}; wanted: a causal language model of transformers")
    kind, before = type(model).__name__, model.config._attn_implementation
    if before == NAME:
        raise LoraError(f"this {kind} has klora's attention already; detach() that first")
    if why := _why_not(model):
        raise LoraError(f"{kind} {why}; leave its attention as it is")
    _register()
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, NotImplementedError) as error:
        raise LoraError(f"{kind} takes no other attention: {error}") from None
    if model.config._attn_implementation != NAME:
        raise LoraError(f"{kind} takes no other attention; leave it as it is")
    return Attention(model, before)


def _why_not(model: nn.Module) -> str:
    """What such a model has that the kernel does not do; empty where there is nothing."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        return "has several parts; wanted: a language model alone"
    is_causal = getattr(config, "is_causal", True) and all(getattr(m, "is_causal", True) for m in model.modules())
    if not is_causal:
        return "has attention that is not causal"
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or (window is not None and getattr(config, "use_sliding_window", True)):
        return f"has {', '.join(sorted(kinds)) or f'a sliding window of {window}'}; allowed: full attention"
    for name in ("attention_chunk_size", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            return f"has {name}={getattr(config, name)}"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"has heads of {size}; allowed: multiples of 8 up to {MOST_HEAD}" if size % 8 or size > MOST_HEAD else ""


class Guard:
    """Before a forward of a model's base: LoraError for what it is given and the attention would not see."""

    def __init__(self, base: nn.Module):
        self.names = list(signature(base.forward).parameters)

    def __setstate__(self, state: dict) -> None:
        """In another process, transformers does not know the attention yet."""
        vars(self).update(state)
        _register()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        if mask is not None:
            _check_mask(mask)
        if given.get("position_ids") is not None:
            raise LoraError("position_ids may pack documents into a row, of which klora's attention does not know; "
                            f"leave them out, or {INSTEAD}")  # fmt: skip


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        found = f"of {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise LoraError(f"attention_mask is {found}; allowed: [batch, tokens], padded on the right, or {INSTEAD}")
    if mask.device.type != "cpu":
        raise LoraError(
            f"attention_mask cannot be looked at on {mask.device} without waiting for it. Pad on the right and leave "
            f"it out: no token reads what comes after it. Or {INSTEAD}"
        )
    kept = mask != 0
    if (kept[:, 1:] & ~kept[:, :-1]).any():
        row = int((kept[:, 1:] & ~kept[:, :-1]).any(1).nonzero()[0])
        raise LoraError(f"attention_mask hides tokens of row {row} before others; pad on the right, or {INSTEAD}")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Of query [B, H, S, d], key and value [B, G, S, d]: [B, S, H, d], as transformers calls an attention."""
    if attention_mask is not None:
        raise LoraError(f"a mask was made for attention; klora's has none: {INSTEAD}")
    if not getattr(module, "is_causal", True) if is_causal is None else not is_causal:
        raise LoraError(f"attention that is not causal was asked for; {INSTEAD}")
    if query.size(2) != key.size(2):
        raise LoraError(
            f"{query.size(2)} queries and {key.size(2)} keys: klora's attention reads no cache; give use_cache=False, "
            f"or {INSTEAD}, as for generate()"
        )
    if dropout:
        raise LoraError(f"attention_dropout is {dropout} in training; set it to 0 in the model, or {INSTEAD}")
    if scaling is not None and not math.isclose(scaling, query.size(3) ** -0.5):
        raise LoraError(f"the scale of attention is {scaling}; allowed: 1 / sqrt({query.size(3)}), or {INSTEAD}")
    for name in WITHOUT:
        asked = more.get(name)
        if asked is not None and asked is not False:
            raise LoraError(f"{name} is asked of attention, and klora's has none; {INSTEAD}")
    return causal_attention(*(heads.transpose(1, 2) for heads in (query, key, value))), None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
