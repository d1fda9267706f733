"""A causal language model of transformers as the base pass and the engine read it.

A chunk's NLL wants the head on the chunk's positions alone: the model's base gives hidden states, and its head is
applied to the last of them, or is part of the loss kernel, which keeps no logits. Attention wants no mask: windows
begin where a sequence begins, and padding on the right is read by nothing that is scored. Neither is so for every
model (logits with a softcap of their own, sliding windows). So both are tried on a window of random tokens, and taken
where they give the same bits as the model's own forward; elsewhere that runs as it is.
"""

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import softcap_nll
from ..lora.attach import Lora, Rows, attach
from ..model.config import ConfigError
from .head import head_nll, head_nll_grads_
from .protocols import HF, RECOMPUTED, SCORE_FIRST, START, TTTConfig

if TYPE_CHECKING:
    from .hf_engine import HfEngine

FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")
"""Linears that hold q, k and v in one."""

LINEARS = {
    "q": ("q_proj", *FUSED),
    "k": ("k_proj", *FUSED),
    "v": ("v_proj", *FUSED),
    "o": ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense"),
    "up": ("gate_proj", "up_proj", "gate_up_proj", "mlp.c_fc", "fc1", "dense_h_to_4h"),
    "down": ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h"),
    "head": ("lm_head", "embed_out"),
}
"""What the linears of a target are called, by the ends of their names; a gated MLP has two of `up`."""

MASKLESS = "klora_causal"
"""Name under which transformers knows attention by PyTorch's causal kernels, for which it makes no mask."""

MICRO_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens in one forward of the base pass, by device type."""

LOGIT_BYTES = 2**33
"""Most bytes of logits, in fp32 and in the model's dtype, where they are made at all."""

PROBED = 8
"""Positions at which the logits of two ways are compared."""


class HfModel:
    """A causal language model of transformers, frozen, in eval mode, and read by windows of up to `config.window`.

    `lora` are its adapters, while an engine has attached some. :meth:`close` gives the module back as it was.
    `skips_masks` and `has_parts` say which ways it can be read; `micro_tokens` how many tokens a base pass takes.

    ConfigError: a setting that is not for such a model, a target that it has not, a model of several devices or without
    a head.
    """

    def __init__(self, module: nn.Module, config: TTTConfig):
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ConfigError(
                f"a {type(module).__name__} has no head that gives logits; wanted: a causal language model of "
                "transformers, as AutoModelForCausalLM gives it"
            )
        devices = {parameter.device for parameter in module.parameters()}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            found = ", ".join(sorted(map(str, devices))) or "none"
            raise ConfigError(f"the model's parameters are on {found}; wanted: all of them on one CPU or GPU")
        self.module, self.lora = module, None
        self.device, self.dtype = devices.pop(), module.get_input_embeddings().weight.dtype
        _require_possible(module, config)
        self.ends = ends_of_targets(module, config)
        self._before = module.training, [(p, p.requires_grad) for p in module.parameters()], _attention_of(module)
        module.eval().requires_grad_(False)
        self.positions = _positions_of(module) or sys.maxsize
        self.base, self.head = getattr(module, "base_model", module), head
        self._keeps = "logits_to_keep" in inspect.signature(module.forward).parameters
        self.backend = "reference" if self.dtype == torch.float64 else None
        self.skips_masks, self.has_parts = self._probe(config)
        self.micro_tokens = MICRO_TOKENS[self.device.type]
        if not self.has_parts:
            self.micro_tokens = max(1, min(self.micro_tokens, LOGIT_BYTES // (6 * self.vocab_size)))

    @property
    def vocab_size(self) -> int:
        """Logits of a position."""
        return len(self.head.weight)

    def requires_grad_(self, flag: bool) -> None:
        """As a module's; :meth:`close` sets what was set before."""
        self.module.requires_grad_(flag)

    def close(self) -> None:
        """Give the module back as it was: no adapters, its attention, its mode and its gradients' flags."""
        self.detach()
        training, flags, attention = self._before
        if _attention_of(self.module) != attention:
            self.module.set_attn_implementation(attention)
        self.module.train(training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    def engine(self, config: TTTConfig, tokens: int, **options: Any) -> "HfEngine":
        """The engine that adapts this model."""
        from .hf_engine import HfEngine

        return HfEngine(self, config, tokens, **options)

    def attach(self, config: TTTConfig, slots: int) -> Lora:
        """`slots` adapters of `config` on the linears of its targets; those that were attached before are gone."""
        self.detach()
        ranks = {end: config.rank(target) for end, target in self.ends.items()}
        self.lora = attach(self.module, slots=slots, targets=list(ranks), rank=ranks, backend=self.backend)
        self.lora.stacks = False  # there are as many slots as documents: a document's bits would depend on the others
        return self.lora

    def detach(self) -> None:
        """Take the adapters off, if there are any."""
        if self.lora is not None:
            self.lora.detach()
            self.lora = None

    @contextmanager
    def rows(self, slots: Tensor) -> Iterator[None]:
        """Inside, row b of a forward is adapted by slot slots[b] of int [B]; -1 is none. Nothing waits for the device,
        as the check of names in :meth:`Lora.rows` would on a CPU.
        """
        self.lora.current = Rows(slots.long())
        try:
            yield
        finally:
            self.lora.current = None

    def hidden(self, inputs: Tensor, tail: int) -> Tensor:
        """What :meth:`nll` takes, of the last `tail` of `inputs` int [B, S]: hidden states, or logits.

        Inputs past the model's last position are padding, of which nothing is scored: zeros.
        """
        padding = inputs.size(1) - self.positions
        if padding > 0:
            return F.pad(self.hidden(inputs[:, :-padding], tail - padding), (0, 0, 0, padding))
        inputs = inputs.long()
        if self.has_parts:
            return self.base(input_ids=inputs, use_cache=False)[0][:, -tail:].contiguous()
        kept = {"logits_to_keep": tail} if self._keeps else {}
        return self.module(input_ids=inputs, use_cache=False, **kept).logits[:, -tail:]

    def nll(self, hidden: Tensor, targets: Tensor, temperature: float, slots: Tensor | None = None) -> Tensor:
        """NLL [B, tail], fp32, of `targets` int [B, tail]; 0 where a target is -100.

        With `slots`, its bits are those of :meth:`nll_grads`, which keeps what a gradient wants.
        """
        if not self.has_parts:
            return _nll_of_logits(hidden, targets, temperature)
        weight, about = self.head.weight, (targets, math.inf, temperature)
        if slots is None:
            return softcap_nll(hidden, weight, *about, backend=self.backend)
        return head_nll(hidden, weight, None, *about, slots=slots, backend=self.backend)

    def nll_grads(
        self, hidden: Tensor, targets: Tensor, share: Tensor, temperature: float, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`nll`, and the gradient of sum(share * NLL) to `hidden`."""
        if self.has_parts:
            about = targets, share, math.inf, temperature
            return head_nll_grads_(hidden, self.head.weight, None, *about, slots=slots, backend=self.backend)
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            nll = _nll_of_logits(leaf, targets, temperature)
            (grad,) = torch.autograd.grad(nll, leaf, share.to(nll.dtype))
        return nll.detach(), grad

    @torch.no_grad()
    def _probe(self, config: TTTConfig) -> tuple[bool, bool]:
        """Whether the model can be read without masks, and by its base and its head."""
        length = config.window
        tail, draw = min(PROBED, length), torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (1, length), generator=draw).to(self.device)
        self.has_parts = False
        wanted = self.hidden(tokens, tail)
        skips_masks = skip_masks(self.module)
        if skips_masks and not torch.equal(self.hidden(tokens, tail), wanted):
            skips_masks = False
            self.module.set_attn_implementation(self._before[2])
        if not self._may_have_parts(config):
            return skips_masks, False
        hidden = self.base(input_ids=tokens, use_cache=False)[0]
        if hidden.shape != (1, length, self.head.weight.size(1)) or hidden.dtype != self.head.weight.dtype:
            return skips_masks, False
        return skips_masks, torch.equal(self.head(hidden[:, -tail:]), wanted)

    def _may_have_parts(self, config: TTTConfig) -> bool:
        """Whether the loss kernel takes the head: a plain matrix without a LoRA."""
        head = self.head
        is_plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
        return (
            self.base is not self.module
            and is_plain
            and "head" not in config.target_names
            and (head.weight.size(1) % 16 == 0)
        )


def skip_masks(module: nn.Module) -> bool:
    """Let attention of a model of transformers go without masks; whether the model takes that."""
    if _attention_of(module) != "sdpa":
        return False
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(MASKLESS, sdpa_attention_forward)
    try:
        module.set_attn_implementation(MASKLESS)
    except (ValueError, NotImplementedError):
        return False
    return _attention_of(module) == MASKLESS


def ends_of_targets(module: nn.Module, config: TTTConfig) -> dict[str, str]:
    """The ends of the names of the linears that `config` adapts, each with its target; of q, k and v in one, with q.

    ConfigError: a target that the model has not, or that it has only together with others.
    """
    names = [
        f".{name}" for name, m in module.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    ends: dict[str, str] = {}
    for target in config.target_names:
        found = [end for end in LINEARS[target] if any(name.endswith(f".{end}") for name in names)]
        called = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        config.require(bool(found), "targets", f"no {target} for this model, whose linears are called {called}")
        for end in found:
            ends.setdefault(end, target)
    for end in ends.keys() & set(FUSED):
        about = [(config.rank(t), config.scale(t), getattr(config, f"{t}_lr")) for t in "qkv"]
        config.require(
            {"q", "k", "v"} <= set(config.target_names) and len(set(about)) == 1,
            "targets",
            f"all of q, k and v or none, of one rank, alpha and lr: {end} of this model is all three in one",
        )
    return ends


def require_for_hf(config: TTTConfig) -> None:
    """ConfigError for a setting that only klora's own model has."""
    why = f"for a Hugging Face model; the preset {HF} is made for them"
    allowed = {"protocol": SCORE_FIRST, "layout": START, "context": RECOMPUTED, "phases": 0, "bias_lr": 0.0}
    for name, value in allowed.items():
        config.require(getattr(config, name) == value, name, f"{value} {why}")


def _require_possible(module: nn.Module, config: TTTConfig) -> None:
    """ConfigError for a setting that a model of this kind, or this one, cannot have."""
    require_for_hf(config)
    if "head" in config.target_names:
        tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
        config.require(not tied, "targets", "no head for this model, whose head is tied to its embeddings")
    most = _positions_of(module)
    config.require(most is None or config.window <= most, "window", f"at most {most}, the positions of this model")


def _positions_of(module: nn.Module) -> int | None:
    """Most inputs of a window; None where the model's config does not say."""
    return getattr(module.config.get_text_config(), "max_position_embeddings", None)


def _attention_of(module: nn.Module) -> str | None:
    return getattr(module.config, "_attn_implementation", None)


def _nll_of_logits(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """NLL of `targets` [B, S], its softmax in fp32 or wider; 0 where a target is -100."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    nll = F.cross_entropy(wide.flatten(0, 1), targets.flatten().long(), ignore_index=-100, reduction="none")
    return nll.view(targets.shape)
