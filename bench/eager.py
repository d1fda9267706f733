"""The baseline `eager`: test-time training in plain PyTorch, a batch of documents at a time.

One adaptation step takes every active document of a batch through one chunk:

    nll_j   = NLL of chunk j's targets inside its window, under the document's adapter            (recorded)
    adapter <- Adam(adapter, grad mean(nll_j)),   steps_per_chunk times; not for the last chunk

Documents are sorted by length, so that the active ones are always the first rows of the batch. Every window of one step
is padded to the same length, which depends on the chunk's index alone. So a document's arithmetic does not depend on
the rest of its batch. The rotary base is that of a whole window, NTK-scaled where `window` exceeds the training length.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels import lora_adam_ref_, lora_head_nll_ref
from ..model.gpt import GPT
from ..model.network import NO_LORA
from ..model.ranges import phase
from ..ttt.adapters import AdapterLayout
from ..ttt.documents import Document
from ..ttt.protocols import MIN_NLL, TTTConfig, learning_rate


class Adam:
    """The adapters of `rows` documents, one flat row of parameters each, and Adam on them."""

    def __init__(self, model: GPT, config: TTTConfig, rows: int, dtype: torch.dtype = torch.float32):
        layout, device = AdapterLayout(model.config, config), model.embed.device
        self.layout, self.config = layout, config
        self.initial = layout.initial(config.adapter_seed).to(device, dtype)
        self.group_lr = layout.group_lr().to(device, dtype)
        decay = layout.decay()
        self.decay = None if decay is None else decay.to(device, dtype)
        self.params = self.initial.expand(rows, -1).clone()
        self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.params) for _ in range(3))
        self.step = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lr = torch.zeros(rows, dtype=dtype, device=device)

    def reset(self) -> None:
        """Put every row back to the initial state."""
        self.params.copy_(self.initial.expand_as(self.params))
        for tensor in (self.grads, self.exp_avg, self.exp_avg_sq, self.step):
            tensor.zero_()

    def views(self, rows: Tensor, count: int) -> list[Tensor]:
        """Each part of the first `count` rows, as a view [count, *shape]."""
        return [rows[:count, part.start : part.stop].view(count, *part.shape) for part in self.layout.parts]

    def leaves(self, count: int) -> list[Tensor]:
        """The adapters of the first `count` documents, over the rows' memory: the layout's parts."""
        return [view.detach().requires_grad_() for view in self.views(self.params, count)]

    def backward(self, loss: Tensor, leaves: list[Tensor], count: int) -> None:
        """Write the gradient of `loss` to `leaves` into the first `count` rows of `grads`."""
        gradients = torch.autograd.grad(loss, leaves)
        torch._foreach_copy_(self.views(self.grads, count), [gradient[:count] for gradient in gradients])

    def update(self, count: int, lr: Tensor) -> None:
        """One Adam step of the first `count` rows, row r at learning rate lr[r]."""
        self.lr[:count] = lr
        state = self.params, self.grads, self.exp_avg, self.exp_avg_sq, self.step, self.lr, self.group_lr
        betas = self.config.beta1, self.config.beta2
        lora_adam_ref_(*state, slice(0, count), betas, self.config.eps, decay=self.decay)


class Batch:
    """Up to `config.batch` documents, longest first, on the device: one padded token matrix and their chunk counts."""

    def __init__(self, documents: Sequence[Document], config: TTTConfig, device: torch.device):
        targets = np.array([document.targets for document in documents])
        if (np.diff(targets) > 0).any():
            raise ValueError("documents of a batch come longest first")
        tokens = np.zeros((len(documents), targets[0] + 1), np.int64)
        for row, document in enumerate(documents):
            tokens[row, : len(document.tokens)] = document.tokens
        self.config, self.device = config, device
        self.tokens = torch.from_numpy(tokens).to(device)
        self.targets = torch.from_numpy(targets).to(device)
        self.chunks = -(-self.targets // config.chunk)
        counts = self.chunks.tolist()
        self.rounds = counts[0]
        self.active = [sum(count > j for count in counts) for j in range(self.rounds + 1)]

    def chunk(self, j: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Chunk j of the first `rows` documents.

        Returns inputs int64 [rows, L]; `at` int64 [rows, chunk], the input that each target follows; its target id; and
        whether that target exists. L = min((j + 1) * chunk, window), for every batch.
        """
        size, length = self.config.chunk, min((j + 1) * self.config.chunk, self.config.window)
        end = self.targets[:rows].clamp(max=(j + 1) * size)
        start = self.config.window_start(torch.full_like(end, j), end)
        last = self.tokens.size(1) - 1
        at = start[:, None] + torch.arange(length, device=self.device)
        inputs = self.tokens[:rows].gather(1, at.clamp(max=last))
        position = j * size + torch.arange(size, device=self.device)
        exists = position < end[:, None]
        targets = self.tokens[:rows].gather(1, (position + 1).clamp(max=last).expand(rows, -1))
        return inputs, (position - start[:, None]).clamp(max=length - 1), targets, exists


def adapted_nll(
    model: GPT, adam: Adam, leaves: list[Tensor], j: int, inputs: Tensor, at: Tensor, targets: Tensor
) -> Tensor:
    """NLL [rows, chunk] of `targets`, those of chunk j, under adapters that :meth:`Adam.leaves` gave."""
    config = adam.config
    adapters, head = adam.layout.adapters(None, leaves)
    hidden = model.hidden(inputs, adapters, rotary_length=config.window, backend="reference")
    hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.size(-1)))
    weight = model.embed.to(hidden.dtype)
    head_a, head_b, _ = head or NO_LORA
    loss = model.config.logit_softcap, config.temperature_of(j)
    return lora_head_nll_ref(hidden, weight, head_a, head_b, targets, *loss)


def adapt_batch(model: GPT, adam: Adam, documents: Sequence[Document]) -> list[Tensor]:
    """Adapt and score up to as many documents as `adam` has rows, longest first: NLL [targets] of each in the pass
    that counts."""
    config = adam.config
    batch = Batch(documents, config, model.embed.device)
    adam.reset()
    totals = torch.zeros(config.passes, len(documents), dtype=torch.float64, device=batch.device)
    passes: list[list[Tensor]] = []
    for number in range(config.passes):
        passes.append([])
        for j in range(batch.rounds):
            nll, exists = _score_then_train(model, adam, batch, j)
            passes[number].append(nll)
            totals[number, : len(nll)] += nll.double().masked_fill(~exists, 0.0).sum(1)
    kept = totals.argmin(0).tolist() if config.protocol == MIN_NLL else [config.passes - 1] * len(documents)
    return [
        torch.cat([nll[row] for nll in passes[number] if row < len(nll)])[: document.targets]
        for row, (document, number) in enumerate(zip(documents, kept, strict=True))
    ]


def _score_then_train(model: GPT, adam: Adam, batch: Batch, j: int) -> tuple[Tensor, Tensor]:
    """Chunk j: its NLL [active, chunk] under the adapters as they are, then the Adam steps on it."""
    config, active = batch.config, batch.active[j]
    trained = batch.active[j + 1] if j >= config.trained_from else 0
    inputs, at, targets, exists = batch.chunk(j, active)
    with phase("scoring"), torch.set_grad_enabled(trained > 0):
        leaves = adam.leaves(active)
        nll = adapted_nll(model, adam, leaves, j, inputs, at, targets)
    recorded = nll.detach()
    for step in range(config.steps_per_chunk if trained else 0):
        if step:
            with phase("forward"):
                leaves = adam.leaves(trained)
                nll = adapted_nll(model, adam, leaves, j, inputs[:trained], at[:trained], targets[:trained])
        # A chunk that is trained on is whole: only a document's last chunk, which is not, can be shorter.
        with phase("backward"):
            adam.backward(nll[:trained].mean(dim=1).sum(), leaves, trained)
        with phase("optimizer"):
            adam.update(trained, learning_rate(config, adam.step[:trained], batch.chunks[:trained]))
    return recorded, exists
