"""The weights as the forward reads them, made from a model's parameters.

Q, K and V are stacked; the depth and layer scales are folded into Wo and W2 before these are rounded to the compute
dtype; the bigram table is projected; and the skip that joins the middle of the U-Net to itself is folded into the mix
of the block that follows. Training differentiates through this, adapting does not. Matrices that are stored at six bits
stay so, beside scales that cannot be folded, unless dense ones are asked for.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.fold import int6_values_ref
from ..kernels.int6 import Int6Linear, Int6Matrix
from .config import ModelConfig

if TYPE_CHECKING:
    from .gpt import GPT, Block

Matrix = Tensor | Int6Matrix
"""A weight in the compute dtype, or at six bits."""


class BlockWeights(NamedTuple):
    """One block: matrices in the compute dtype, vectors in fp32 (fp64 for a float64 model)."""

    mix: Tensor
    """[2, D], the factors of the stream and of x0"""
    skip: Tensor | None
    """[D], where an earlier block's output joins"""
    qkv: Matrix
    """[Nq+Nk+Nv, D]"""
    gain: Tensor
    """[H]"""
    out: Matrix
    """[D, Nq]"""
    up: Matrix
    """[hidden, D]"""
    down: Matrix
    """[D, hidden]"""
    attn_scale: Tensor | None = None
    """[D], of the attention's branch; None where it is folded into `out`"""
    mlp_scale: Tensor | None = None
    """[D], of the MLP's branch; None where it is folded into `down`"""


@dataclass(frozen=True, eq=False)
class Weights:
    """A whole model, as :func:`klora.model.network.hidden` takes it."""

    config: ModelConfig
    embed: Tensor
    """[V, D], fp32 (fp64 for a float64 model)"""
    bigram: Tensor
    """[rows, D], projected and scaled, as `embed`"""
    gate: Tensor
    """[D], the smear's"""
    head: Tensor
    """[V, D] in the compute dtype"""
    blocks: tuple[BlockWeights, ...]
    rotary: Callable[[int, int], tuple[Tensor, Tensor]]
    """cos and sin of (at least so many positions, the base of sequences of that length)"""
    attention: str
    """PyTorch's backend for attention where our kernel does not run"""
    chosen: str = "klora"
    """What runs attention in training: one of kernels.attention.CHOICES; "klora": our kernel where it can, else
    `attention`. Adapters and caches take no other."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.head.dtype


def weights_of(model: "GPT", dense: bool = False, int6_clip: float = 0.0) -> Weights:
    """The model's weights, differentiable in its parameters. `dense`: int6 matrices dequantised. `int6_clip`: dense
    ones at their int6 values, differentiated as if they were not.
    """
    bigram = model.bigram
    return Weights(
        model.config,
        model.embed,
        bigram.scale * F.linear(bigram.table, bigram.project),
        model.smear.gate,
        model.embed.to(model.dtype),
        tuple(_block(model, index, block, dense, int6_clip) for index, block in enumerate(model.blocks)),
        model.rotary,
        model.attention,
        model.chosen_attention,
    )


@torch.no_grad()
def frozen_weights(model: "GPT | Weights") -> Weights:
    """The model's weights as they are now, dense and without a gradient; attention is our kernel.

    Weights are taken to be frozen and come back as they are, so that they can be made once and handed on.
    """
    if isinstance(model, Weights):
        return model
    made = weights_of(model, dense=True)
    blocks = tuple(BlockWeights(*(part if part is None else part.detach() for part in block)) for block in made.blocks)
    parts = {name: getattr(made, name).detach() for name in ("embed", "bigram", "gate", "head")}
    return dataclasses.replace(made, **parts, blocks=blocks, chosen="klora")


class _StraightThrough(torch.autograd.Function):
    """A matrix at its int6 values; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, weight: Tensor, clip: float) -> Tensor:
        return int6_values_ref(weight, clip)[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _block(model: "GPT", index: int, block: "Block", dense: bool, int6_clip: float) -> BlockWeights:
    dtype, vectors = model.dtype, torch.float64 if model.dtype == torch.float64 else torch.float32
    mix, skip = block.resid_mix.to(vectors), None
    joined = index - len(model.blocks) // 2
    if 0 <= joined < len(model.skip):
        skip = model.skip[joined].to(vectors)
        if joined == 0:  # what joins here is the output of the block before, which is the stream itself
            mix, skip = torch.stack([mix[0] * (1 + skip), mix[1]]), None
    gain = block.gain.to(vectors)
    attn_scale, mlp_scale = block.depth_scale * block.attn_scale, block.depth_scale * block.mlp_scale
    if isinstance(block.o, Int6Linear) and not dense:
        qkv, out, up, down = (linear.matrix for linear in (block.qkv, block.o, block.up, block.down))
        return BlockWeights(mix, skip, qkv, gain, out, up, down, attn_scale.to(vectors), mlp_scale.to(vectors))
    matrices = _dense_matrices(block, model.embed.dtype)
    if int6_clip:
        matrices = (_StraightThrough.apply(matrix, int6_clip) for matrix in matrices)
    qkv, out, up, down = matrices
    folded = (attn_scale[:, None] * out).to(dtype), up.to(dtype), (mlp_scale[:, None] * down).to(dtype)
    return BlockWeights(mix, skip, qkv.to(dtype), gain, *folded)


def _dense_matrices(block: "Block", dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Q, K and V stacked, Wo, W1 and W2."""
    if isinstance(block.o, Int6Linear):
        return tuple(linear.dequantize(dtype) for linear in (block.qkv, block.o, block.up, block.down))
    return torch.cat([block.q, block.k, block.v]), block.o, block.up, block.down
