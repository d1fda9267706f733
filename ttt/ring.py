"""Keys and values that are kept of each document's last tokens, as they were when their chunk was scored.

With the context `cached` a chunk reads them instead of computing its window anew: a step runs on the chunk's own
tokens. What is kept was made under the adapter of its time, and is not made again when the adapter changes. No gradient
goes into it. Position p of a document lies in cell p mod capacity of its slot.

Heads are rotated by their position in the document, up to the longest. The base of the rotation is that of sequences of
`window` tokens, as everywhere: only distances up to the window matter. The embedding of a token reads the two before
it, so a chunk comes with LEAD tokens more, which are embedded and dropped. A document starts with BOS, across which the
embedding reads nothing: what lies before that does not matter.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import Unnormed, bigram_embedding, cache_write_, lora_cached_attention
from ..kernels.attention import HEAD_DIMS
from ..model.config import ConfigError, ModelConfig
from ..model.network import About, Lora
from ..model.weights import BlockWeights, Weights
from .protocols import TTTConfig

LEAD = 2
"""Tokens before a chunk that its embedding reads: the smear reads the previous token, whose bigram one more."""


def capacity_of(config: TTTConfig) -> int:
    """Cells of a slot: what a chunk may see of the tokens before it."""
    return max(config.window - config.chunk, 1)


def ring_numbers(shape: ModelConfig, config: TTTConfig) -> int:
    """Numbers that a slot's keys and values of all blocks are."""
    return 2 * shape.blocks * capacity_of(config) * shape.kv_heads * shape.head_dim


class Ring:
    """Keys and values [blocks, slots, capacity, G, d] in the compute dtype, for documents of up to `longest` tokens.

    ConfigError: a head size that no kernel takes, where kernels are to run (`by_kernel`).
    """

    def __init__(self, weights: Weights, config: TTTConfig, slots: int, longest: int, by_kernel: bool = False):
        shape, device = weights.config, weights.embed.device
        if by_kernel and shape.head_dim not in HEAD_DIMS:
            raise ConfigError(
                f"context='cached' is not possible on a GPU with heads of {shape.head_dim}; allowed: recomputed, or "
                f"heads of {', '.join(map(str, HEAD_DIMS))}"
            )
        size = shape.blocks, slots, capacity_of(config), shape.kv_heads, shape.head_dim
        self.window = config.window
        self.keys = torch.zeros(size, dtype=weights.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        # A last chunk is as wide as the others, also past the document's end.
        rows = -(-longest // config.chunk) * config.chunk
        self.cos, self.sin = (table[:rows] for table in weights.rotary(rows, config.window))


@dataclass(frozen=True, eq=False)
class RingContext:
    """The context of one chunk of each of B documents, whose `slots` int32 [B] say where they lie; -1 is no document.

    `filled` int32 [B] tokens of each come before the chunk, of which `count` int32 [B] tokens exist. `cos` and `sin`
    [B, chunk, d/2] are of their positions. `kept` takes each block's keys and values [B, chunk, G, d].
    """

    ring: Ring
    slots: Tensor
    filled: Tensor
    count: Tensor
    cos: Tensor
    sin: Tensor
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    takes_unnormed: ClassVar[bool] = True

    @classmethod
    def of(cls, ring: Ring, slots: Tensor, filled: Tensor, count: Tensor, column: Tensor) -> "RingContext":
        """The context of chunks whose tokens are `column` int64 [chunk] places from their first one."""
        at = filled[:, None] + column
        return cls(ring, slots, filled, count, ring.cos[at], ring.sin[at])

    def embedded(self, weights: Weights, tokens: Tensor, backend: str | None) -> Tensor:
        """x0 [B, chunk, D] of tokens [B, LEAD + chunk]."""
        tables = weights.embed, weights.bigram, weights.gate
        return bigram_embedding(tokens, *tables, weights.dtype, backend=backend)[:, LEAD:].contiguous()

    def attend(self, about: About, index: int, weight: BlockWeights, n: Tensor | Unnormed, lora: Lora) -> Tensor:
        """Attention over the chunk and what its window holds of the tokens before it, under the documents' adapters."""
        ring = self.ring
        held = ring.keys[index], ring.values[index], self.slots, self.filled, ring.window
        out, k, v = lora_cached_attention(
            n,
            weight.qkv,
            lora.a,
            lora.b,
            self.cos,
            self.sin,
            weight.gain,
            *held,
            about.slots,
            about.config.qkv_sizes,
            head_dim=about.config.head_dim,
            grads=lora.grads,
            unit_tables=True,
            backend=about.backend,
        )
        if len(self.kept) == index:  # the first forward's are those that are written
            self.kept.append((k.detach(), v.detach()))
        return out

    def write(self, backend: str | None) -> None:
        """Move the chunk's keys and values into the ring, once no backward reads it any more."""
        for keys, values, (k, v) in zip(self.ring.keys, self.ring.values, self.kept, strict=True):
            cache_write_(keys, values, k, v, self.slots, self.filled, self.count, backend=backend)
