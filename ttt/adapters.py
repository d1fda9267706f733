"""The adapters of a batch of documents: one flat row of parameters a slot, and Adam on it.

A row holds, block after block, the LoRA of Q, K and V (A [3, R, D], B [Nq+Nk+Nv, R]), of Wo, W1 and W2 (A [R, K], B
[N, R]) and the bias [D], then the LoRA of the head (A [Rh, D], B [V, Rh]): those of them that are targets. A starts as
a_scale U(-1/sqrt(K), 1/sqrt(K)), K its last dimension, B and bias as zero: every document starts from the same adapter,
which changes nothing. Everything is fp32.

Q, K and V share a tensor of the largest of their ranks. The rows of A past a projection's own rank are zeros, and so
are the columns of B. Each is a factor of the other's gradient, which is therefore zero, and Adam moves neither: it is
the smaller rank, exactly. A projection that is no target has rank 0.

What the LoRA is scaled by, s = alpha / rank, is in B: the row holds s B. Adam's step of B does not know the size of its
gradient, so that of s B is the same step times s. A's gradient has the factor s B either way. A learning rate of B
times s is therefore the scale itself, but for Adam's epsilon, which is s times as large for B; weight decay of B is not
scaled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.network import Adapters, BlockAdapters, Lora
from .protocols import FROM_ALL, TTTConfig


@dataclass(frozen=True)
class Part:
    """One tensor inside a slot's row: where it starts, its shape and what its learning rate is multiplied by.

    `group_lr` is one factor, or one for each row of the part's first dimension; `scale`, of a B alone, is alpha / rank
    in the same form. Of an A, `ranks` are the rows of each of its matrices that are not zeros for good.
    """

    start: int
    shape: tuple[int, ...]
    group_lr: Tensor
    scale: Tensor
    ranks: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    @property
    def is_lora_a(self) -> bool:
        return bool(self.ranks)

    def of_each(self, factors: Tensor) -> Tensor:
        """Factors of rows as factors of parameters."""
        return factors.repeat_interleave(math.prod(self.shape) // factors.numel())


class AdapterLayout:
    """Where each tensor of an adapter lies in its row of `size` parameters.

    `blocks` names the parts of each block, `head` those of the head; the last `len(parts) - head_start` are the head's.
    """

    def __init__(self, model: ModelConfig, ttt: TTTConfig):
        width, hidden = model.width, model.mlp_hidden
        matrices = {"o": (width, model.qkv_sizes[0]), "up": (hidden, width), "down": (width, hidden)}
        self.ttt = ttt
        self.parts: list[Part] = []
        self.size = 0
        self.blocks: list[dict[str, slice]] = []
        for _ in range(model.blocks):
            block = {}
            if any(ttt.rank(target) for target in "qkv"):
                block["qkv"] = self._add_lora("qkv", model.qkv_sizes, width)
            block |= {name: self._add_lora([name], [N], K) for name, (N, K) in matrices.items() if ttt.rank(name)}
            block["bias"] = self._add((width,), torch.tensor([ttt.bias_lr]))
            self.blocks.append(block)
        self.head_start = len(self.parts)
        self.head = self._add_lora(["head"], [model.vocab_size], width) if ttt.rank("head") else None

    def _add_lora(self, targets, outputs, inputs: int) -> slice:
        """A and B of a matrix, or of several with one of each."""
        ttt = self.ttt
        ranks = tuple(ttt.rank(target) for target in targets)
        rates = torch.tensor([getattr(ttt, f"{target}_lr") for target in targets])
        scales = torch.tensor([ttt.scale(target) for target in targets])
        rows, several = torch.tensor(outputs), (len(ranks),) if len(ranks) > 1 else ()
        first = self._add((*several, max(ranks), inputs), rates, ranks=ranks)
        last = self._add((sum(outputs), max(ranks)), rates.repeat_interleave(rows), scales.repeat_interleave(rows))
        return slice(first.start, last.stop)

    def _add(
        self, shape: tuple[int, ...], group_lr: Tensor, scale: Tensor | None = None, ranks: tuple[int, ...] = ()
    ) -> slice:
        self.parts.append(Part(self.size, shape, group_lr, torch.ones(1) if scale is None else scale, ranks))
        self.size += math.prod(shape)
        return slice(len(self.parts) - 1, len(self.parts))

    def group_lr(self) -> Tensor:
        """Learning-rate factor of every parameter, fp32 [size]."""
        return torch.cat([part.of_each(part.group_lr * part.scale) for part in self.parts]).float()

    def decay(self) -> Tensor | None:
        """Weight decay of every parameter, in units of the learning rate, fp32 [size]; None where there is none."""
        if not self.ttt.weight_decay:
            return None
        return self.ttt.weight_decay * torch.cat([part.of_each(part.group_lr) for part in self.parts]).float()

    def initial(self, seed: int) -> Tensor:
        """The row a document starts with, fp32 [size], drawn on the CPU so that it is the same on every machine."""
        row = torch.zeros(self.size)
        generator = torch.Generator().manual_seed(seed)
        for part in self.parts:
            if part.is_lora_a:
                values = torch.rand(math.prod(part.shape), generator=generator)
                values = self.ttt.a_scale * (2 * values - 1) / math.sqrt(part.shape[-1])
                for matrix, rank in zip(values.view(len(part.ranks), -1, part.shape[-1]), part.ranks, strict=True):
                    matrix[rank:] = 0.0
                row[part.start : part.stop] = values
        return row

    def carried(self) -> list[slice]:
        """What of a row later documents take from the phases' adapter: all of it, or every A alone."""
        if self.ttt.phase_start == FROM_ALL:
            return [slice(self.size)]
        return [slice(part.start, part.stop) for part in self.parts if part.is_lora_a]

    def adapters(
        self, slots: Tensor | None, parts: list[Tensor], grads: list[Tensor] | None = None
    ) -> tuple[Adapters, Lora | None]:
        """The adapters of the blocks and that of the head, of views of the parts; `grads`, like them, get gradients."""

        def lora(where: slice | None) -> Lora | None:
            if where is None:
                return None
            return Lora(*parts[where], None if grads is None else tuple(grads[where]))

        blocks = []
        for block in self.blocks:
            *_, bias = parts[block["bias"]]
            bias_grad = None if grads is None else grads[block["bias"]][0]
            loras = {name: lora(where) for name, where in block.items() if name != "bias"}
            blocks.append(BlockAdapters(**loras, bias=bias, bias_grad=bias_grad))
        return Adapters(slots, blocks), lora(self.head)


class Slots:
    """Adapters side by side in the rows of `params` [slots, size], with gradients, Adam moments and step counters.

    `initial` [size] is the row that a document starts with, `group_lr` [size] what multiplies each parameter's learning
    rate, `decay` [size] its weight decay, if there is any. `shared` is the slot of the phases' adapter, None without,
    and `carried` the columns of it that documents start from.
    """

    def __init__(
        self,
        ttt: TTTConfig,
        params: Tensor,
        grads: Tensor,
        initial: Tensor,
        group_lr: Tensor,
        decay: Tensor | None,
        shared: int | None = None,
        carried: Sequence[slice] = (),
    ):
        self.ttt, self.shared, self.carried = ttt, shared, carried
        self.params, self.grads = params, grads
        self.initial, self.group_lr, self.decay = initial, group_lr, decay
        self.exp_avg = torch.zeros_like(params)
        self.exp_avg_sq = torch.zeros_like(params)
        self.step = torch.zeros(len(params), dtype=torch.int64, device=params.device)
        self.lr = torch.zeros(len(params), dtype=params.dtype, device=params.device)

    def start(self, slots: Tensor) -> None:
        """Put the slots that `slots` int64 names back to the initial state. What waits in `grads` is left there."""
        self.params.index_copy_(0, slots, self.initial.expand(len(slots), -1))
        for tensor in (self.exp_avg, self.exp_avg_sq, self.step):
            tensor.index_fill_(0, slots, 0)

    def start_from_shared(self) -> None:
        """Let documents start from the shared adapter as it is now, or from what of it is carried."""
        for columns in self.carried:
            self.initial[columns].copy_(self.params[self.shared, columns])


class AdapterPool(Slots):
    """`slots` adapters of our own model.

    With phases there is one more, the slot `shared`, whose moments go on from phase to phase.
    """

    def __init__(self, model: ModelConfig, ttt: TTTConfig, slots: int, device: torch.device, dtype=torch.float32):
        self.layout = layout = AdapterLayout(model, ttt)
        initial, decay = layout.initial(ttt.adapter_seed).to(device, dtype), layout.decay()
        params = initial.expand(slots + bool(ttt.phases), -1).clone()
        super().__init__(
            ttt,
            params,
            torch.zeros_like(params),
            initial,
            layout.group_lr().to(device, dtype),
            None if decay is None else decay.to(device, dtype),
            slots if ttt.phases else None,
            layout.carried(),
        )

    def views(self, rows: Tensor, count: int) -> list[Tensor]:
        """Each part of the first `count` rows, as a view [count, *shape]."""
        return [rows[:count, p.start : p.stop].view(count, *p.shape) for p in self.layout.parts]
