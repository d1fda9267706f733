"""The language model: parameters, their initial values, and the public methods; model/network.py is its forward.

    logits = c * tanh(E rmsnorm(x) / c)

Parameters are fp32 masters; the network computes in `compute_dtype` (the parameters' own dtype unless set). The first
token of a forward without a cache counts as having no previous one.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ntk_base, pick_attention, rotary_tables, softcap_logits_ref, softcap_nll
from . import network
from .config import ModelConfig
from .network import Adapters, KVCache, pick_backend
from .weights import weights_of

ROTARY_TABLES = 4
"""Rotary bases whose tables a model holds at a time. Sequences up to the training length share one base, and the
windows of one run of adaptation another."""

MATRICES = ("q", "k", "v", "o", "up", "down")
"""The six matrices of a block: what Muon trains and int6 stores."""


class Bigram(nn.Module):
    """Hash table of (previous token, token) rows and its projection to the model's width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(config.bigram_rows, config.bigram_width))
        self.project = nn.Parameter(torch.empty(config.width, config.bigram_width))
        self.scale = nn.Parameter(torch.tensor(0.05))


class SmearGate(nn.Module):
    """The gate that mixes each position with the one before it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.width))


def _first_of_two(width: int) -> Tensor:
    """Factors [2, width] that take the first of two streams. Not by `repeat`, for which PyTorch imports sympy on the
    meta device, at every start."""
    factors = torch.zeros(2, width)
    factors[0].fill_(1.0)
    return factors


class Block(nn.Module):
    """The parameters of attention and MLP, with residual mix and depth-scaled residual branches."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        width, hidden = config.width, config.mlp_hidden
        q_rows, k_rows, v_rows = config.qkv_sizes
        self.config = config
        self.depth_scale = 1.0 / math.sqrt(index + 1)
        self.resid_mix = nn.Parameter(_first_of_two(width))
        self.q = nn.Parameter(torch.empty(q_rows, width))
        self.k = nn.Parameter(torch.empty(k_rows, width))
        self.v = nn.Parameter(torch.empty(v_rows, width))
        self.o = nn.Parameter(torch.zeros(width, q_rows))
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.down = nn.Parameter(torch.zeros(width, hidden))
        self.gain = nn.Parameter(torch.full((config.heads,), 1.5))
        self.attn_scale = nn.Parameter(torch.ones(width))
        self.mlp_scale = nn.Parameter(torch.ones(width))


class GPT(nn.Module):
    """The model: called with tokens int [B, S] it returns logits fp32 [B, S, V]; see :meth:`logits`.

    `GPT(config)` is initialised from torch's global generator, in fp32 on the CPU. See :func:`parameter_shapes` for the
    parameters' names. It computes in the parameters' dtype until :meth:`configure` names another. `backend` follows the
    device: the kernels on a GPU, else the reference; what it is set to stays.

    Example: logits = GPT(ModelConfig(width=64, blocks=2))(torch.randint(1024, (2, 16)))
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.attention = "math"
        self.chosen_attention = "klora"
        self._backend: str | None = None
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
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in: `compute_dtype`, or the dtype of the parameters."""
        return self.compute_dtype or self.embed.dtype

    @property
    def backend(self) -> str:
        """'reference' or 'triton': what it was set to, else what the device and dtype of now take."""
        return self._backend or pick_backend(self.config, self.embed.device, self.dtype)

    @backend.setter
    def backend(self, name: str | None) -> None:
        self._backend = name

    def configure(self, device: torch.device, dtype: torch.dtype | None = None) -> str:
        """Move to `device`, compute in `dtype`, pick the backends for both; returns the reason for attention's."""
        self.to(device)
        self.compute_dtype = dtype
        self._backend = None
        self.attention, why = pick_attention(self.embed.device, self.dtype, self.config.head_dim)
        return why

    def cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of up to `length` tokens, around the weights as they are now."""
        with torch.no_grad():
            return KVCache(weights_of(self), batch, length)

    def hidden(
        self,
        tokens: Tensor,
        adapters: Adapters | None = None,
        cache: KVCache | None = None,
        rotary_length: int | None = None,
        backend: str | None = None,
        start: Tensor | None = None,
        int6_clip: float = 0.0,
    ) -> Tensor:
        """tokens int [B, S] -> rmsnorm(x) [B, S, D] in the compute dtype, what the tied head reads.

        With a cache, `tokens` continue what it holds (any number into an empty one, one at a time after). The rotary
        base is that of `rotary_length` tokens: of the cache's length or of S where it is left out. Whoever pads S gives
        it, so that the padding does not change the function. `backend` in place of the model's own. `start` and
        `int6_clip` are those of :meth:`nll`.
        """
        if cache is not None:
            cache.check(tokens.size(-1))
        begin, total = (cache.filled, cache.length) if cache is not None else (0, tokens.size(-1))
        cos, sin = (table[begin : begin + tokens.size(-1)] for table in self.rotary(total, rotary_length or total))
        weights = weights_of(self, int6_clip=int6_clip) if cache is None else cache.weights
        hidden = network.hidden(weights, tokens, (cos, sin), adapters, None, cache, backend or self.backend, start)
        if cache is not None:
            cache.filled += tokens.size(-1)
        return hidden

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """As :meth:`logits`."""
        return self.logits(tokens, cache)

    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens int [B, S] -> soft-capped logits [B, S, V] in fp32 (fp64 for a float64 model).

        With a cache, `tokens` continue what it holds, as in :meth:`hidden`; ValueError where it has no place for them.

        Example: logits = model.logits(tokens)
        """
        hidden = self.hidden(tokens, cache=cache)
        return softcap_logits_ref(F.linear(hidden, self.embed.to(hidden.dtype)), self.config.logit_softcap)

    def nll(self, tokens: Tensor, targets: Tensor, *, start: Tensor | None = None, int6_clip: float = 0.0) -> Tensor:
        """Negative log-likelihood in nats of `targets` int [B, S] after `tokens` int [B, S] -> [B, S] fp32.

        `start` int32 [B, S], from document_starts, keeps the documents of a row apart. With `int6_clip`, the matrices
        of the blocks are at the int6 values of that clip, and their gradients pass as if they were not.

        Example: loss = model.nll(tokens[:, :-1], tokens[:, 1:]).mean()
        """
        hidden = self.hidden(tokens, start=start, int6_clip=int6_clip)
        head = self.embed.to(hidden.dtype)
        return softcap_nll(hidden, head, targets, self.config.logit_softcap, backend=self.backend)

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
            tables = rotary_tables(most, config.head_dim, *key)
        self._rotary[key] = tables  # the last one used is the last one in the dictionary
        if len(self._rotary) > ROTARY_TABLES:
            del self._rotary[next(iter(self._rotary))]
        return tables


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter, without allocating one."""
    return dict(_parameter_shapes(config))


@lru_cache(16)  # a model of 256 blocks takes half a second to describe, and a loader asks several times
def _parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    return sum(shape.numel() for shape in _parameter_shapes(config).values())


def is_block_matrix(name: str) -> bool:
    """Whether the parameter of this name is one of a block's six matrices."""
    return name.startswith("blocks.") and name.rsplit(".", 1)[1] in MATRICES
