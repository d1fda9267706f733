"""One step of the engine: a chunk of each document of a dense batch, scored and, where it trains, learnt from.

    nll_j   = NLL of the chunk's targets inside its window, under the document's adapter         (recorded)
    adapter <- Adam(adapter, grad mean(nll_j)),   steps_per_chunk times, where a place trains

The mathematics are those of scorer.adapted_nll and AdapterPool; this is the form for a GPU. Shapes are fixed, every
index is a tensor and nothing waits for the device, so that a step can be captured in a CUDA graph. Windows lie so that
the chunk is among their last `chunk` inputs: the head, and all of the last block after its attention, run on those
alone, and neither a gather nor a scatter is needed between them. Gradients exist from block 0's QKV upwards only; those
of the adapters are written into the pool by the kernels. The reference ops, which is what a CPU runs, give them to
autograd instead, and they are copied.

Frozen weights are prepared once: Q, K and V stacked, the depth and layer scales folded into Wo and W2 before these are
rounded to the compute dtype, the bigram table projected, and the skip that joins the middle of the U-Net to itself
folded into the mix of the block that follows.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import (
    bigram_hash_ref,
    causal_attention,
    causal_attention_ref,
    linear,
    lora_adam_,
    lora_attention,
    lora_head_nll,
    lora_head_nll_grads_,
    lora_qkv,
    norm_rotary,
    relu_squared_mlp,
    residual_norm,
    rms_norm,
)
from ..kernels.attention import HEAD_DIMS
from ..model.gpt import GPT, Block
from ..model.int6_model import Int6Block
from ..model.ranges import phase
from .adapters import AdapterPool
from .protocols import learning_rate

SLOT, TRAINED, START, LENGTH, FIRST, RECORD, FRESH, CHUNKS = range(8)
"""The fields of a plan, int32 [8, batch]. A place: its slot; its slot again if it trains, else -1; where its window
starts in the tokens; the window's inputs; the first of them that is scored; the row of the record. FRESH and CHUNKS
list the slots that a document enters in this round, and its chunks, from the first entry on."""

FIELDS = 8


def clear_plan(plan: Tensor | np.ndarray) -> None:
    """Make all places empty: no slot, a window of the first token, and no target in it."""
    plan[SLOT : TRAINED + 1] = -1
    plan[START:] = 0
    plan[LENGTH : FIRST + 1] = 1


class FrozenBlock(NamedTuple):
    """One block's weights in the compute dtype, its vectors in fp32 (fp64 for a float64 model)."""

    mix: Tensor
    """[2, D]"""
    skip: Tensor | None
    """[D], where an earlier block's output joins"""
    qkv: Tensor
    """[Nq+Nk+Nv, D]"""
    gain: Tensor
    """[H]"""
    out: Tensor
    """[D, Nq], scaled"""
    up: Tensor
    """[hidden, D]"""
    down: Tensor
    """[D, hidden], scaled"""


class FrozenModel:
    """The model as a step reads it."""

    @torch.no_grad()
    def __init__(self, model: GPT):
        self.model, self.config, self.dtype = model, model.config, model.dtype
        self.vectors = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.embed = model.embed.detach()
        bigram = model.bigram
        self.bigram = (bigram.scale * F.linear(bigram.table, bigram.project)).detach()
        self.head = self.embed.to(self.dtype)
        self.blocks = [self._block(index, block) for index, block in enumerate(model.blocks)]

    def _block(self, index: int, block: Block) -> FrozenBlock:
        mix, skip = block.resid_mix.detach().to(self.vectors), None
        joined = index - len(self.model.blocks) // 2
        if 0 <= joined < len(self.model.skip):
            skip = self.model.skip[joined].detach().to(self.vectors)
            if joined == 0:  # what joins here is the output of the block before, which is the stream itself
                mix, skip = torch.stack([mix[0] * (1 + skip), mix[1]]), None
        qkv, out, up, down = _matrices(block, self.embed.dtype)
        return FrozenBlock(
            mix,
            skip,
            qkv.to(self.dtype),
            block.gain.detach().to(self.vectors),
            (block.depth_scale * block.attn_scale[:, None] * out).to(self.dtype),
            up.detach().to(self.dtype),
            (block.depth_scale * block.mlp_scale[:, None] * down).to(self.dtype),
        )

    @torch.no_grad()
    def first(self, tokens: Tensor, backend: str | None) -> Tensor:
        """tokens [B, S] -> x0 [B, S, D] in the compute dtype: nothing below block 0 is trained."""
        rows = bigram_hash_ref(tokens, self.config.bigram_rows)
        embedded = F.embedding(tokens, self.embed) + F.embedding(rows, self.bigram)
        return self.model.smear(rms_norm(embedded, backend=backend).to(self.dtype), tokens, None)

    def hidden(
        self,
        inputs: Tensor,
        rotary: tuple[Tensor, Tensor],
        tail: int,
        adapters: "Adapters | None" = None,
        backend: str | None = None,
    ) -> Tensor:
        """inputs int [B, S] -> rmsnorm(x) [B, tail, D] at the last `tail` inputs; rotary is cos, sin [S, d/2]."""
        x0 = self.first(inputs, backend)
        pushes, pushed = len(self.blocks) // 2, []
        slots = None if adapters is None else adapters.slots
        _, x, n = residual_norm(x0, mix=self.blocks[0].mix, x0=x0, backend=backend)
        for index, block in enumerate(self.blocks):
            lora, bias = ((), {}) if adapters is None else adapters.of(index)
            is_last = index + 1 == len(self.blocks)
            with phase("block"):
                if is_last:
                    x = x[:, -tail:]
                mixed = self._attention(n, block, lora, slots, rotary, x.size(1), backend)
                _, x, n = residual_norm(x, linear(mixed, block.out, backend=backend), backend=backend)
                branch = relu_squared_mlp(n, block.up, block.down, backend=backend)
                # The output of the last block that pushes is joined through the next one's mix.
                push = index + 1 < pushes
                after = self.blocks[index + 1] if not is_last else None
                joins = after is not None and after.skip is not None
                x_out, x, n = residual_norm(
                    x,
                    branch,
                    **bias,
                    pushed=pushed.pop() if joins else None,
                    skip=after.skip if joins else None,
                    mix=after.mix if after is not None else None,
                    x0=x0 if after is not None else None,
                    push=push,
                    last=is_last,
                    backend=backend,
                )
                if push:
                    pushed.append(x_out)
        return n

    def _attention(
        self,
        n: Tensor,
        block: FrozenBlock,
        lora: tuple,
        slots: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        tail: int,
        backend: str | None,
    ) -> Tensor:
        """n [B, S, D] -> what the block's attention gives the last `tail` inputs, [B, tail, Nq].

        A head size that our kernels do not take goes through PyTorch's attention, whose backward promises no bits.
        """
        sizes, head_dim = self.config.qkv_sizes, self.config.head_dim
        by_kernel = (backend == "triton" or (backend is None and n.is_cuda)) and head_dim in HEAD_DIMS
        if not lora:
            parts = linear(n, block.qkv, backend=backend).split(sizes, dim=-1)
        else:
            *adapter, grads = lora
            about = {"slots": slots, "sizes": sizes, "grads": grads, "backend": backend}
            if by_kernel:
                tables = (*rotary, block.gain)
                return lora_attention(n, block.qkv, *adapter, *tables, head_dim=head_dim, tail=tail, **about)
            parts = lora_qkv(n, block.qkv, *adapter, **about)
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
        q, k = norm_rotary(q, k, *rotary, block.gain, backend=backend)
        if by_kernel:
            return causal_attention(q, k, v, tail, backend=backend).flatten(2)
        return causal_attention_ref(q, k, v, self.model.attention)[:, -tail:].flatten(2)


class Adapters(NamedTuple):
    """What the documents of a batch add to the model: `parts` are A, B and bias of every block, [slots, ...].

    `grads` are like them and get their gradients in the backward, where autograd shall not have them. `slots` int [B].
    """

    slots: Tensor
    parts: list[Tensor]
    grads: list[Tensor] | None = None

    def of(self, index: int) -> tuple[tuple, dict[str, Tensor | None]]:
        """Block `index`: (A, B, their gradients or None), and what residual_norm wants to know of the bias."""
        lora_a, lora_b, bias = self.parts[3 * index : 3 * index + 3]
        if self.grads is None:
            return (lora_a, lora_b, None), {"bias": bias, "slots": self.slots}
        *lora_grads, bias_grad = self.grads[3 * index : 3 * index + 3]
        return (lora_a, lora_b, tuple(lora_grads)), {"bias": bias, "slots": self.slots, "bias_grad": bias_grad}


def _matrices(block: Block, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Q, K and V stacked, Wo, W1 and W2."""
    if isinstance(block, Int6Block):
        return tuple(linear.dequantize(dtype) for linear in (block.qkv, block.o, block.up, block.down))
    return torch.cat([block.q, block.k, block.v]), block.o, block.up, block.down


class EngineStep:
    """The step for windows of `length` inputs and `rows` places.

    It reads the first `rows` places of `plan`, the documents' `tokens` int32 [any], and the `chunks` int64 [slots] of
    the document in each slot; it writes `record` (fp32, fp64 for a float64 model) and the pool. `record` holds rows of
    len(tokens), target for target where the token lies, and then batch * chunk cells that take what does not exist.
    """

    def __init__(
        self,
        model: FrozenModel,
        pool: AdapterPool,
        tokens: Tensor,
        record: Tensor,
        plan: Tensor,
        chunks: Tensor,
        length: int,
        rows: int,
        backend: str | None = None,
    ):
        self.model, self.pool, self.ttt, self.backend = model, pool, pool.ttt, backend
        self.tokens, self.record, self.plan, self.chunks = tokens, record, plan, chunks
        self.length, self.rows = length, rows
        self.writes_pool = backend == "triton" or (backend is None and tokens.is_cuda)
        cos, sin = model.model.rotary(length, self.ttt.window)
        self.rotary = cos[:length].contiguous(), sin[:length].contiguous()
        column = torch.arange(length, device=tokens.device)
        self.column, self.scored = column, column[-self.ttt.chunk :]
        self.nowhere = len(record) - torch.arange(rows * self.ttt.chunk, device=tokens.device).view(rows, -1) - 1

    @torch.no_grad()
    def score(self) -> None:
        """Record the NLL of every place's chunk.

        The head runs as if gradients would follow, as it does in `train`: without them it adds up its logits in another
        order. A document's last chunk comes here if no other place trains in its round, and there if one does, with the
        same bits.
        """
        slots, inputs, targets, place = self._inputs()
        *blocks, head_a, head_b = self._parts(self.pool.params)
        hidden = self._hidden(inputs, Adapters(slots, blocks)).requires_grad_()
        with torch.enable_grad():
            nll = lora_head_nll(
                hidden, self.model.head, head_a, head_b, targets, *self._loss, slots=slots, backend=self.backend
            ).detach()
        self._write(nll, place)

    def train(self) -> None:
        """Record the NLL of every place's chunk, then take the Adam steps of the places that train."""
        slots, inputs, targets, place = self._inputs()
        trained = self.plan[TRAINED, : self.rows]
        # A chunk that is trained on is whole: its mean is over `chunk` targets.
        share = ((trained >= 0).to(self.record.dtype) / self.ttt.chunk)[:, None].expand_as(targets).contiguous()
        for step in range(self.ttt.steps_per_chunk):
            nll = self._gradients(slots, inputs, targets, share)
            if step == 0:
                self._write(nll, place)
            with phase("optimizer"), torch.no_grad():
                self._update(trained)

    @property
    def _loss(self) -> tuple[float, float]:
        return self.model.config.logit_softcap, self.ttt.temperature

    @torch.no_grad()
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """slots [rows]; inputs [rows, length]; targets [rows, chunk], -100 where there is none; where each one's NLL
        goes.

        Inputs past a window's end repeat its last one: nothing that is scored reads them.
        """
        slots = self.plan[SLOT, : self.rows]
        start, length, first, row = (self.plan[field, : self.rows, None].long() for field in range(START, RECORD + 1))
        inputs = self.tokens[start + torch.minimum(self.column, length - 1)]
        exists = (self.scored >= first) & (self.scored < length)
        at = start + torch.minimum(self.scored, length - 1) + 1
        targets = torch.where(exists, self.tokens[at], -100)
        return slots, inputs, targets, torch.where(exists, row * len(self.tokens) + at, self.nowhere)

    def _gradients(self, slots: Tensor, inputs: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        """The NLL [rows, chunk]; the gradient of sum(share * NLL) goes to the pool's rows of `slots`."""
        *blocks, head_a, head_b = self._parts(self.pool.params)
        *block_grads, head_a_grad, head_b_grad = self._parts(self.pool.grads)
        leaves = [part.detach().requires_grad_() for part in blocks]
        with phase("forward"), torch.enable_grad():
            hidden = self._hidden(inputs, Adapters(slots, leaves, block_grads if self.writes_pool else None))
        with phase("backward"):
            nll, dhidden = lora_head_nll_grads_(
                hidden.detach(),
                self.model.head,
                head_a,
                head_b,
                targets,
                share,
                head_a_grad,
                head_b_grad,
                *self._loss,
                slots=slots,
                backend=self.backend,
            )
            if self.writes_pool:
                torch.autograd.backward(hidden, dhidden)
            else:
                torch._foreach_copy_(block_grads, torch.autograd.grad(hidden, leaves, dhidden))
        return nll

    def _update(self, trained: Tensor) -> None:
        pool = self.pool
        pool.lr.copy_(learning_rate(self.ttt, pool.step, self.chunks))
        lora_adam_(
            pool.params,
            pool.grads,
            pool.exp_avg,
            pool.exp_avg_sq,
            pool.step,
            pool.lr,
            trained,
            pool.group_lr,
            (self.ttt.beta1, self.ttt.beta2),
            self.ttt.eps,
            backend=self.backend,
        )

    def _write(self, nll: Tensor, place: Tensor) -> None:
        with torch.no_grad():
            self.record.index_copy_(0, place.flatten(), nll.flatten().to(self.record.dtype))

    def _hidden(self, inputs: Tensor, adapters: Adapters) -> Tensor:
        return self.model.hidden(inputs, self.rotary, self.ttt.chunk, adapters, self.backend)

    def _parts(self, rows: Tensor) -> list[Tensor]:
        return self.pool.views(rows, len(rows))
