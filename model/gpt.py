"""The language model: equations and constants of the `seed` design in plain PyTorch.

    e_i = E[t_i] + s * P(Bg[hash(t_i, t_{i-1})])          token plus hashed bigram
    x   = rmsnorm(e);  x_i = (1-g)*x_i + g*x_{i-1}        smear gate, g = sigmoid(gate), nothing across BOS
    x0  = x
    block i:  x  = a*x + b*x0                             residual mix
              x += d_i * s_attn * Wo attn(rope(q), rope(k), v),    q,k,v from rmsnorm(x),  d_i = 1/sqrt(i+1)
              x += d_i * s_mlp * W2 relu(W1 rmsnorm(x))^2
    the first L//2 blocks push their output; each later block first adds skip_j * pop()
    logits = c * tanh(E rmsnorm(x) / c)

Parameters are fp32 masters; the network computes in `compute_dtype` (the parameters' own dtype unless set). The first
token of a forward without a cache counts as having no previous one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import (
    BOS,
    bigram_hash_ref,
    causal_attention_ref,
    lora_qkv_ref,
    norm_rotary_ref,
    ntk_base,
    pick_attention,
    relu_squared_mlp_ref,
    rms_norm_ref,
    rotary_tables,
    softcap_logits_ref,
    softcap_nll_ref,
)
from .config import ModelConfig
from .ranges import phase

ROTARY_TABLES = 4
"""Rotary bases whose tables a model holds at a time. Sequences up to the training length share one base, and the
windows of one run of adaptation another."""

MATRICES = ("q", "k", "v", "o", "up", "down")
"""The six matrices of a block: what Muon trains and int6 stores."""


class BlockAdapter(NamedTuple):
    """What a document adds to one block: LoRA on Q, K, V and a bias after the block. One entry a batch row."""

    lora_a: Tensor
    """[B, 3, R, D]"""
    lora_b: Tensor
    """[B, Nq+Nk+Nv, R]"""
    bias: Tensor
    """[B, D]"""


class KVCache:
    """Keys, values and the smear's last state of a batch that is read token by token, up to `length` tokens."""

    def __init__(self, model: "GPT", batch: int, length: int):
        config, weight = model.config, model.embed
        shape = (config.blocks, batch, length, config.kv_heads, config.head_dim)
        self.keys = torch.empty(shape, device=weight.device, dtype=model.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = length
        self.filled = 0
        self.last_token: Tensor | None = None
        self.last_x: Tensor | None = None


class Bigram(nn.Module):
    """Hash table of (previous token, token) rows and its projection to the model's width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(config.bigram_rows, config.bigram_width))
        self.project = nn.Parameter(torch.empty(config.width, config.bigram_width))
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, tokens: Tensor, previous: Tensor | None) -> Tensor:
        rows = bigram_hash_ref(tokens, self.table.size(0), previous)
        return self.scale * F.linear(F.embedding(rows, self.table), self.project)


class SmearGate(nn.Module):
    """Mixes each position with the one before it, never across BOS."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.width))

    def forward(self, x: Tensor, tokens: Tensor, last_x: Tensor | None) -> Tensor:
        first = torch.zeros_like(x[:, :1]) if last_x is None else last_x[:, None]
        before = torch.cat([first, x[:, :-1]], dim=1)
        before = before.masked_fill((tokens == BOS)[..., None], 0.0)
        return torch.lerp(x, before, torch.sigmoid(self.gate).to(x.dtype))


class Block(nn.Module):
    """Attention and MLP with residual mix and depth-scaled residual branches."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        width, hidden = config.width, config.mlp_hidden
        q_rows, k_rows, v_rows = config.qkv_sizes
        self.config = config
        self.depth_scale = 1.0 / math.sqrt(index + 1)
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(width), torch.zeros(width)]))
        self.q = nn.Parameter(torch.empty(q_rows, width))
        self.k = nn.Parameter(torch.empty(k_rows, width))
        self.v = nn.Parameter(torch.empty(v_rows, width))
        self.o = nn.Parameter(torch.zeros(width, q_rows))
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.down = nn.Parameter(torch.zeros(width, hidden))
        self.gain = nn.Parameter(torch.full((config.heads,), 1.5))
        self.attn_scale = nn.Parameter(torch.ones(width))
        self.mlp_scale = nn.Parameter(torch.ones(width))

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention: str,
        adapter: BlockAdapter | None = None,
        cache: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:
        """x, x0 [B, S, D] -> [B, S, D]. `cache` is this block's (keys, values, tokens already there)."""
        keep, restore = self.resid_mix.to(x.dtype)
        x = keep * x + restore * x0
        q, k, v = self.project_qkv(rms_norm_ref(x), adapter)
        q = norm_rotary_ref(q, *rotary, gain=self.gain)
        k = norm_rotary_ref(k, *rotary)
        if cache is not None:
            keys, values, filled = cache
            stop = filled + x.size(1)
            keys[:, filled:stop], values[:, filled:stop] = k, v
            k, v = keys[:, :stop], values[:, :stop]
        mixed = causal_attention_ref(q, k, v, attention).flatten(2)
        x = x + (self.depth_scale * self.attn_scale).to(x.dtype) * self.project_out(mixed)
        x = x + (self.depth_scale * self.mlp_scale).to(x.dtype) * self.mlp(rms_norm_ref(x))
        return x if adapter is None else x + adapter.bias.to(x.dtype)[:, None]

    def project_qkv(self, x: Tensor, adapter: BlockAdapter | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> q [B, S, H, d], k and v [B, S, G, d]."""
        sizes = self.config.qkv_sizes
        weight = torch.cat([self.q, self.k, self.v]).to(x.dtype)
        if adapter is None:
            parts = F.linear(x, weight).split(sizes, dim=-1)
        else:
            parts = lora_qkv_ref(x, weight, adapter.lora_a, adapter.lora_b, sizes)
        return tuple(part.unflatten(-1, (-1, self.config.head_dim)) for part in parts)

    def project_out(self, mixed: Tensor) -> Tensor:
        """mixed [B, S, Nq] -> [B, S, D]."""
        return F.linear(mixed, self.o.to(mixed.dtype))

    def mlp(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        return relu_squared_mlp_ref(x, self.up.to(x.dtype), self.down.to(x.dtype))


class GPT(nn.Module):
    """The model. `GPT(config)` is initialised from torch's global generator; see :func:`parameter_shapes` for names."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.attention = "math"
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.bigram = Bigram(config)
        self.smear = SmearGate(config)
        pushes = config.blocks // 2
        self.skip = nn.Parameter(torch.ones(min(pushes, config.blocks - pushes), config.width))
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.blocks))
        self._rotary: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal matrices; Wo, W2 and the bigram table stay zero, so the first forward is the embedding alone."""
        if self.embed.is_meta:
            return
        nn.init.normal_(self.embed, std=0.005)
        nn.init.orthogonal_(self.bigram.project)
        for block in self.blocks:
            for matrix in (block.q, block.k, block.v, block.up):
                nn.init.orthogonal_(matrix)

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embed.dtype

    def configure(self, device: torch.device, dtype: torch.dtype | None = None) -> str:
        """Move to `device`, compute in `dtype`, pick the attention backend there; returns the reason for the choice."""
        self.to(device)
        self.compute_dtype = dtype
        self.attention, why = pick_attention(self.embed.device, self.dtype, self.config.head_dim)
        return why

    def hidden(
        self,
        tokens: Tensor,
        adapters: Sequence[BlockAdapter] | None = None,
        cache: KVCache | None = None,
        rotary_length: int | None = None,
    ) -> Tensor:
        """tokens int [B, S] -> rmsnorm(x) [B, S, D] in the compute dtype, what the tied head reads.

        With a cache, `tokens` continue what it holds (any number into an empty one, one at a time after). The rotary
        base is that of `rotary_length` tokens: of the cache's length or of S where it is left out. Whoever pads S gives
        it, so that the padding does not change the function.
        """
        if cache is not None and cache.filled and tokens.size(1) != 1:
            raise ValueError(f"a filled cache continues with 1 token at a time, not {tokens.size(1)}")
        if cache is not None and cache.filled + tokens.size(1) > cache.length:
            raise ValueError(f"the cache holds {cache.length} tokens; {cache.filled} + {tokens.size(1)} were given")
        start, total = (cache.filled, cache.length) if cache is not None else (0, tokens.size(1))
        cos, sin = self.rotary(total, rotary_length or total)
        rotary = cos[start : start + tokens.size(1)], sin[start : start + tokens.size(1)]
        last_token, last_x = (cache.last_token, cache.last_x) if cache is not None else (None, None)
        embedded = F.embedding(tokens, self.embed) + self.bigram(tokens, last_token)
        normed = rms_norm_ref(embedded).to(self.dtype)
        x = x0 = self.smear(normed, tokens, last_x)
        pushed = []
        for index, block in enumerate(self.blocks):
            if index >= len(self.blocks) // 2 and pushed:
                x = x + self.skip[index - len(self.blocks) // 2].to(x.dtype) * pushed.pop()
            adapter = adapters[index] if adapters is not None else None
            held = (cache.keys[index], cache.values[index], start) if cache is not None else None
            with phase("block"):
                x = block(x, x0, rotary, self.attention, adapter, held)
            if index < len(self.blocks) // 2:
                pushed.append(x)
        if cache is not None:
            cache.filled += tokens.size(1)
            cache.last_token, cache.last_x = tokens[:, -1], normed[:, -1]
        return rms_norm_ref(x)

    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, S] -> soft-capped logits [B, S, V] in fp32 (fp64 for a float64 model)."""
        hidden = self.hidden(tokens, cache=cache)
        return softcap_logits_ref(F.linear(hidden, self.embed.to(hidden.dtype)), self.config.logit_softcap)

    def nll(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of `targets` [B, S] after `tokens` [B, S] -> [B, S] fp32."""
        hidden = self.hidden(tokens)
        return softcap_nll_ref(hidden, self.embed.to(hidden.dtype), targets, self.config.logit_softcap)

    def rotary(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [at least `rows`, head_dim/2] with the base of sequences of `length` tokens.

        The tables of the last few bases are kept; one that is too short is made again, of twice the rows or more.
        """
        config = self.config
        base = ntk_base(config.rope_base, length, config.train_length, config.head_dim)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        key = base, self.embed.device, dtype
        tables = self._rotary.pop(key, None)
        if tables is None or len(tables[0]) < rows:
            most = max(config.train_length, 1 << (rows - 1).bit_length())
            with torch.inference_mode(False), torch.no_grad():  # the next to read them may be a training step
                tables = rotary_tables(most, config.head_dim, *key)
        self._rotary[key] = tables  # the last one used is the last one in the dictionary
        if len(self._rotary) > ROTARY_TABLES:
            del self._rotary[next(iter(self._rotary))]
        return tables


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter, without allocating one."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def is_block_matrix(name: str) -> bool:
    """Whether the parameter of this name is one of a block's six matrices."""
    return name.startswith("blocks.") and name.rsplit(".", 1)[1] in MATRICES
