"""The adapters of a batch of documents: one flat row of parameters a slot, and Adam on it.

A row holds, block after block, the LoRA of Q, K and V (A [3, R, D], B [Nq+Nk+Nv, R]) and the bias [D], then the LoRA of
the head (A [Rh, D], B [V, Rh]). A starts as U(-1/sqrt(D), 1/sqrt(D)), B and bias as zero: every document starts from
the same adapter, which changes nothing. Everything is fp32.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import lora_adam_ref_
from ..model.config import ModelConfig
from ..model.network import Adapters
from .protocols import TTTConfig


@dataclass(frozen=True)
class Part:
    """One tensor inside a slot's row: where it starts, its shape and what its learning rate is multiplied by.

    `group_lr` is one factor, or one for each row of the part's first dimension.
    """

    start: int
    shape: tuple[int, ...]
    group_lr: Tensor
    is_lora_a: bool

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


class AdapterLayout:
    """Where each tensor of an adapter lies in its row of `size` parameters."""

    def __init__(self, model: ModelConfig, ttt: TTTConfig):
        width, sizes = model.width, model.qkv_sizes
        self.width = width
        self.parts: list[Part] = []
        self.size = 0
        qkv_lr = torch.tensor([ttt.q_lr, ttt.k_lr, ttt.v_lr])
        rows_lr = qkv_lr.repeat_interleave(torch.tensor(sizes))
        for _ in range(model.blocks):
            self._add((3, ttt.lora_rank, width), qkv_lr, is_lora_a=True)
            self._add((sum(sizes), ttt.lora_rank), rows_lr)
            self._add((width,), torch.tensor([ttt.bias_lr]))
        head_lr = torch.tensor([ttt.head_lr])
        self._add((ttt.head_rank, width), head_lr, is_lora_a=True)
        self._add((model.vocab_size, ttt.head_rank), head_lr)

    def _add(self, shape: tuple[int, ...], group_lr: Tensor, is_lora_a: bool = False) -> None:
        self.parts.append(Part(self.size, shape, group_lr, is_lora_a))
        self.size += math.prod(shape)

    def group_lr(self) -> Tensor:
        """Learning-rate factor of every parameter, fp32 [size]."""
        return torch.cat(
            [p.group_lr.repeat_interleave(math.prod(p.shape) // p.group_lr.numel()) for p in self.parts]
        ).float()

    def initial(self, seed: int) -> Tensor:
        """The row a document starts with, fp32 [size], drawn on the CPU so that it is the same on every machine."""
        row = torch.zeros(self.size)
        generator = torch.Generator().manual_seed(seed)
        for part in self.parts:
            if part.is_lora_a:
                values = torch.rand(math.prod(part.shape), generator=generator)
                row[part.start : part.stop] = (2 * values - 1) / math.sqrt(self.width)
        return row


class AdapterPool:
    """`slots` adapters side by side, with their gradients, Adam moments and step counters."""

    def __init__(self, model: ModelConfig, ttt: TTTConfig, slots: int, device: torch.device, dtype=torch.float32):
        self.layout, self.ttt = AdapterLayout(model, ttt), ttt
        self.initial = self.layout.initial(ttt.adapter_seed).to(device, dtype)
        self.group_lr = self.layout.group_lr().to(device, dtype)
        self.params = self.initial.expand(slots, -1).clone()
        self.grads = torch.zeros_like(self.params)
        self.exp_avg = torch.zeros_like(self.params)
        self.exp_avg_sq = torch.zeros_like(self.params)
        self.step = torch.zeros(slots, dtype=torch.int64, device=device)
        self.lr = torch.zeros(slots, dtype=dtype, device=device)
        self._leaves: list[Tensor] = []

    def reset(self) -> None:
        """Put every slot back to the initial state: new documents start here."""
        self.params.copy_(self.initial.expand_as(self.params))
        for tensor in (self.grads, self.exp_avg, self.exp_avg_sq, self.step):
            tensor.zero_()

    def start(self, slots: Tensor) -> None:
        """Put the slots that `slots` int64 names back to the initial state. What waits in `grads` is left there."""
        self.params.index_copy_(0, slots, self.initial.expand(len(slots), -1))
        for tensor in (self.exp_avg, self.exp_avg_sq, self.step):
            tensor.index_fill_(0, slots, 0)

    def adapters(self, count: int) -> tuple[Adapters, tuple[Tensor, Tensor]]:
        """The adapters of the first `count` slots: those of the blocks, and the head's (A, B).

        They are autograd leaves over the pool's memory; :meth:`backward` differentiates with respect to them.
        """
        self._leaves = [view.detach().requires_grad_() for view in self.views(self.params, count)]
        *blocks, head_a, head_b = self._leaves
        return Adapters(None, blocks), (head_a, head_b)

    def backward(self, loss: Tensor, count: int) -> None:
        """Write the gradient of `loss` to the adapters last handed out into `grads`, for the first `count` slots."""
        gradients = torch.autograd.grad(loss, self._leaves)
        torch._foreach_copy_(self.views(self.grads, count), [gradient[:count] for gradient in gradients])

    def views(self, rows: Tensor, count: int) -> list[Tensor]:
        """Each part of the first `count` rows, as a view [count, *shape]."""
        return [rows[:count, p.start : p.stop].view(count, *p.shape) for p in self.layout.parts]

    def update(self, count: int, lr: Tensor) -> None:
        """One Adam step of the first `count` slots from `grads`, slot s at learning rate lr[s]."""
        self.lr[:count] = lr
        lora_adam_ref_(
            self.params,
            self.grads,
            self.exp_avg,
            self.exp_avg_sq,
            self.step,
            self.lr,
            self.group_lr,
            slice(0, count),
            (self.ttt.beta1, self.ttt.beta2),
            self.ttt.eps,
        )
