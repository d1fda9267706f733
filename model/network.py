"""The forward of the model, written once: a pure function of weights, for training, adapting and int6.

    e_i = E[t_i] + Bg[hash(t_i, t_{i-1})]                 token plus hashed bigram, whose table is projected already
    x0  = smear(rmsnorm(e)):  x_i = (1-g)*x_i + g*x_{i-1},  g = sigmoid(gate), nothing across BOS
    block i:  x  = a*(x + skip*pop()) + b*x0              U-Net join (later half) and residual mix
              x += Wo attn(rope(q), rope(k), v),          q,k,v from rmsnorm(x); the scales lie in Wo and W2
              x += W2 relu(W1 rmsnorm(x))^2 + bias        the bias is a document's own
    the first L//2 blocks push their output

model/weights.py makes the weights. `backend` says whether each op runs its reference or its kernel; it is decided
once, by the caller. An architecture is changed here, in the oracle of tests/test_model.py, and nowhere else.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import (
    BOS_ID,
    Unnormed,
    bigram_embedding,
    bigram_hash_ref,
    causal_attention,
    linear,
    lora_attention,
    lora_linear,
    lora_mlp,
    lora_qkv,
    norm_rotary,
    relu_squared_mlp,
    relu_squared_ref,
    residual_mlp,
    residual_mlp_norm,
    residual_norm,
    rms_norm_ref,
)
from ..kernels.attention import HEAD_DIMS, attend
from ..kernels.int6 import Int6Matrix, int6_linear
from ..kernels.qkv_attention import qkv_attention, takes
from .config import ModelConfig
from .ranges import phase
from .weights import BlockWeights, Matrix, Weights

Rotary = tuple[Tensor, Tensor]
"""cos and sin [S, head_dim/2] of the positions of the inputs."""


class Lora(NamedTuple):
    """Adapters of one matrix [N, K]: A [slots, R, K] and B [slots, N, R]; those of Q, K and V stacked have A [slots, 3,
    R, D]. `grads`, two tensors like them, get their gradients in the backward, where autograd shall not have them.
    """

    a: Tensor
    b: Tensor
    grads: tuple[Tensor, Tensor] | None = None


NO_LORA = None, None, None


class BlockAdapters(NamedTuple):
    """What documents add to a block: to its matrices, and a bias [slots, D] to its output. None is nothing."""

    qkv: Lora | None = None
    o: Lora | None = None
    up: Lora | None = None
    down: Lora | None = None
    bias: Tensor | None = None
    bias_grad: Tensor | None = None


class Adapters(NamedTuple):
    """What documents add to the blocks. `slots` int [B] names the adapter of each batch row; None: row b has adapter b.

    An adapter of Wo or W2 belongs to the matrix that the depth and layer scales are folded into.
    """

    slots: Tensor | None
    blocks: list[BlockAdapters]

    def of(self, index: int) -> tuple[BlockAdapters, dict[str, Tensor | None]]:
        """Block `index`, and what residual_norm wants to know of its bias."""
        block = self.blocks[index]
        if block.bias is None:
            return block, {}
        return block, {"bias": block.bias, "slots": self.slots, "bias_grad": block.bias_grad}


class Context(Protocol):
    """Tokens before those of a forward, which reads what is kept of them: it does what depends on that."""

    takes_unnormed: bool
    """Whether its attention takes an n that is not stored"""

    def embedded(self, weights: Weights, tokens: Tensor, backend: str | None) -> Tensor:
        """tokens int [B, S or more] -> x0 [B, S, D] of the last S, in the compute dtype."""

    def attend(
        self, about: "About", index: int, weight: BlockWeights, n: Tensor | Unnormed, lora: Lora | None
    ) -> Tensor:
        """What block `index`'s attention gives its input n [B, S, D]: [B, S, Nq]."""


class KVCache:
    """Keys, values and the smear's last state of a batch that is read token by token, up to `length` tokens.

    A context of the tokens that it holds; the caller adds those of a forward to `filled`.
    """

    takes_unnormed = False

    def __init__(self, weights: Weights, batch: int, length: int):
        config, device = weights.config, weights.embed.device
        shape = (config.blocks, batch, length, config.kv_heads, config.head_dim)
        self.weights = weights
        self.keys = torch.empty(shape, device=device, dtype=weights.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = length
        self.filled = 0
        self.last_token: Tensor | None = None
        self.last_x: Tensor | None = None

    def check(self, tokens: int) -> None:
        """ValueError unless so many tokens can follow those that the cache holds."""
        if self.filled and tokens != 1:
            raise ValueError(f"a filled cache continues with 1 token at a time, not {tokens}")
        if self.filled + tokens > self.length:
            raise ValueError(f"the cache holds {self.length} tokens; {self.filled} + {tokens} were given")

    def embedded(self, weights: Weights, tokens: Tensor, backend: str | None) -> Tensor:
        """x0 [B, S, D] of the tokens [B, S] that follow. The first token of all has no previous one."""
        rows = bigram_hash_ref(tokens, weights.config.bigram_rows, self.last_token)
        x = rms_norm_ref(F.embedding(tokens, weights.embed) + F.embedding(rows, weights.bigram)).to(weights.dtype)
        first = torch.zeros_like(x[:, :1]) if self.last_x is None else self.last_x[:, None]
        before = torch.cat([first, x[:, :-1]], dim=1).masked_fill((tokens == BOS_ID)[..., None], 0.0)
        self.last_token, self.last_x = tokens[:, -1], x[:, -1]
        return torch.lerp(x, before, torch.sigmoid(weights.gate).to(x.dtype))

    def attend(self, about: "About", index: int, weight: BlockWeights, n: Tensor, lora: Lora | None) -> Tensor:
        """Attention over all keys and values that there are, after those of the new tokens are taken in."""
        q, k, v = _projected(about, weight, n, lora)
        stop = self.filled + k.size(1)
        self.keys[index, :, self.filled : stop], self.values[index, :, self.filled : stop] = k, v
        return attend(q, self.keys[index, :, :stop], self.values[index, :, :stop], about.attention).flatten(2)


def pick_backend(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """'triton' where every op of the forward has a kernel for this network, else 'reference'."""
    fits = config.width % 16 == 0 and config.width <= 4096 and dtype != torch.float64
    return "triton" if device.type == "cuda" and fits else "reference"


def hidden(
    weights: Weights,
    tokens: Tensor,
    rotary: Rotary,
    adapters: Adapters | None = None,
    tail: int | None = None,
    context: Context | None = None,
    backend: str | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """tokens int [B, S] -> rmsnorm(x) [B, tail or S, D] in the compute dtype, what the tied head reads.

    With `tail`, only the last so many positions are computed where the last block allows it. With a context, `tokens`
    continue what it holds. `backend` is "reference" or "triton"; left out, CPU tensors take the reference. `start`
    int32 [B, S] keeps the documents of a row apart in training: ValueError beside adapters or a context.
    """
    if start is not None and (adapters is not None or context is not None):
        raise ValueError("start was given with adapters or a context; their rows hold one document each: leave it out")
    blocks, x0_grad = weights.blocks, None
    if (
        torch.is_grad_enabled()
        and weights.embed.requires_grad
        and (backend or tokens.device.type) in ("triton", "cuda")
    ):
        x0_grad = weights.head.new_empty(*tokens.shape, weights.config.width)  # one sum of what all boundaries give
    if context is not None:
        x0 = context.embedded(weights, tokens, backend)
    else:
        tables = weights.embed, weights.bigram, weights.gate
        x0 = bigram_embedding(tokens, *tables, weights.dtype, x0_grad=x0_grad, backend=backend)
    pushes, pushed = len(blocks) // 2, []
    slots = None if adapters is None else adapters.slots
    about = About(weights.config, rotary, weights.attention, weights.chosen, slots, backend, start)
    grads = {"x0_grad": x0_grad, "adds_x0": len(blocks) > 1}
    _, x, n = residual_norm(x0, mix=blocks[0].mix, x0=x0, **grads, backend=backend)
    for index, weight in enumerate(blocks):
        after = blocks[index + 1] if index + 1 < len(blocks) else None
        joins = after is not None and after.skip is not None
        lora, bias = (BlockAdapters(), {}) if adapters is None else adapters.of(index)
        held = None if context is None else partial(context.attend, about, index)
        if after is None and tail is not None:
            x = x[:, x.size(1) - tail :]
        with phase("block"):
            # The output of the last block that pushes is joined through the next one's mix.
            push, popped = index + 1 < pushes, pushed.pop() if joins else None
            given, unnormed = {}, False
            if after is not None:
                given = {"x0": x0, "x0_grad": x0_grad, "adds_x0": index + 2 < len(blocks)}
                its_lora = None if adapters is None else adapters.blocks[index + 1].qkv
                unnormed = _is_one_op(about, after, its_lora, x0.is_cuda) if held is None else context.takes_unnormed
            x_out, x, n = block(about, weight, after, x, n, given | bias, lora, held, push, popped, unnormed)
        if push:
            pushed.append(x_out)
    return n


class About(NamedTuple):
    """What all blocks of a forward share."""

    config: ModelConfig
    rotary: Rotary
    attention: str
    chosen: str
    slots: Tensor | None
    backend: str | None
    start: Tensor | None = None
    """int32 [B, S], the first token of each token's document, where attention keeps documents apart"""


def block(
    about: About,
    weight: BlockWeights,
    after: BlockWeights | None,
    x: Tensor,
    n: Tensor | Unnormed,
    given: dict[str, Tensor | None],
    lora: BlockAdapters,
    held: Callable[..., Tensor] | None,
    push: bool,
    popped: Tensor | None,
    unnormed: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | Unnormed]:
    """One block, from the stream x [B, T, D] and what it reads of it, n [B, S, D], to the next block's x and n.

    The first of the results is the block's output, where it is pushed. `after` is the next block, whose join and mix
    belong to the boundary, as does what is `given` to it. `held` is attention in a context. `unnormed`: the next block
    takes an n that is not stored.
    """
    backend = about.backend
    mixed = attention(about, weight, n, lora.qkv, x.size(1), held)
    adapted = lora.o is not None or lora.up is not None or lora.down is not None
    if after is not None:
        skip = after.skip if popped is not None else None
        given = {**given, "pushed": popped, "skip": skip, "mix": after.mix, "push": push}
    if adapted or isinstance(weight.out, Int6Matrix):
        _, x, n = residual_norm(x, *_out(about, weight, mixed, lora.o), backend=backend)
        branch, scale = _mlp(about, weight, n, lora.up, lora.down)
    elif unnormed:
        return residual_mlp_norm(mixed, x, weight.out, weight.up, weight.down, **given, backend=backend)
    else:
        x = residual_mlp(mixed, x, weight.out, weight.up, weight.down, backend=backend)
        branch = scale = None
    return residual_norm(x, branch, scale, **given, last=after is None, backend=backend)


def _linear(x: Tensor, weight: Matrix, backend: str | None) -> Tensor:
    if isinstance(weight, Int6Matrix):
        return int6_linear(x, weight, backend=backend)
    return linear(x, weight, backend=backend)


def _dense(weight: Matrix, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """What adapters are added to. They come with many tokens, where a dequantised copy costs nothing beside them."""
    if isinstance(weight, Tensor):
        return weight
    return weight.dequantize(dtype) if scale is None else (weight.dequantize(scale.dtype) * scale[:, None]).to(dtype)


def _out(about: About, weight: BlockWeights, mixed: Tensor, lora: Lora | None) -> tuple[Tensor, Tensor | None]:
    """The attention's branch, and the scale that it still wants."""
    if lora is None:
        return _linear(mixed, weight.out, about.backend), weight.attn_scale
    out, options = _dense(weight.out, mixed.dtype, weight.attn_scale), {"grads": lora.grads, "backend": about.backend}
    return lora_linear(mixed, out, lora.a, lora.b, about.slots, **options), None


def _mlp(
    about: About, weight: BlockWeights, n: Tensor, up: Lora | None, down: Lora | None
) -> tuple[Tensor, Tensor | None]:
    """The MLP's branch, and the scale that it still wants."""
    backend = about.backend
    if up is not None or down is not None:
        matrices = _dense(weight.up, n.dtype), _dense(weight.down, n.dtype, weight.mlp_scale)
        (up_a, up_b, up_grads), (down_a, down_b, down_grads) = up or NO_LORA, down or NO_LORA
        grads = {"up_grads": up_grads, "down_grads": down_grads}
        return lora_mlp(n, *matrices, up_a, up_b, down_a, down_b, about.slots, **grads, backend=backend), None
    if isinstance(weight.up, Int6Matrix):
        branch = _linear(relu_squared_ref(_linear(n, weight.up, backend)), weight.down, backend)
    else:
        branch = relu_squared_mlp(n, weight.up, weight.down, backend=backend)
    return branch, weight.mlp_scale


def _projected(about: About, weight: BlockWeights, n: Tensor, lora: Lora | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, H, d], k and v [B, S, G, d] of n [B, S, D]; heads of q and k normed and rotated."""
    if lora is None:
        parts = _linear(n, weight.qkv, about.backend).split(about.config.qkv_sizes, dim=-1)
    else:
        options = {"slots": about.slots, "sizes": about.config.qkv_sizes, "grads": lora.grads, "backend": about.backend}
        parts = lora_qkv(n, _dense(weight.qkv, n.dtype), lora.a, lora.b, **options)
    q, k, v = (part.unflatten(-1, (-1, about.config.head_dim)) for part in parts)
    return *norm_rotary(q, k, *about.rotary, weight.gain, backend=about.backend), v


def _by_kernel(about: About, lora: Lora | None, is_cuda: bool) -> bool:
    """Whether attention is our kernels': what was chosen for training replaces them, but beside adapters."""
    runs_kernel = about.backend == "triton" or (about.backend is None and is_cuda)
    return runs_kernel and about.config.head_dim in HEAD_DIMS and (lora is not None or about.chosen == "klora")


def _is_one_op(about: About, weight: BlockWeights, lora: Lora | None, is_cuda: bool) -> bool:
    """Whether one op makes attention's output of n, which then need not be stored."""
    is_taken = isinstance(weight.qkv, Tensor) and takes(weight.qkv.dtype, about.config.head_dim)
    return _by_kernel(about, lora, is_cuda) and (lora is not None or is_taken)


def attention(
    about: About,
    weight: BlockWeights,
    n: Tensor | Unnormed,
    lora: Lora | None,
    tail: int,
    held: Callable[..., Tensor] | None,
) -> Tensor:
    """n [B, S, D] -> what the block's attention gives the last `tail` inputs, [B, tail, Nq].

    A head size that our kernels do not take goes through PyTorch's attention, whose backward promises no bits. `held`,
    in a context, is its own.
    """
    if held is not None:
        return held(weight, n, lora)[:, n.size(1) - tail :]
    backend, sizes, head_dim = about.backend, about.config.qkv_sizes, about.config.head_dim
    tables, options = (*about.rotary, weight.gain), {"head_dim": head_dim, "tail": tail, "unit_tables": True}
    if _is_one_op(about, weight, lora, n.is_cuda):
        if lora is None:
            return qkv_attention(n, weight.qkv, *tables, sizes, **options, start=about.start, backend=backend)
        options |= {"slots": about.slots, "sizes": sizes, "grads": lora.grads}
        return lora_attention(n, _dense(weight.qkv, n.dtype), lora.a, lora.b, *tables, **options, backend=backend)
    q, k, v = _projected(about, weight, n, lora)
    if _by_kernel(about, lora, n.is_cuda):
        return causal_attention(q, k, v, tail, start=about.start, backend=backend).flatten(2)
    name = about.attention if lora is not None or about.chosen == "klora" else about.chosen
    return attend(q, k, v, name, about.start)[:, q.size(1) - tail :].flatten(2)
