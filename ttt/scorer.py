"""The eager scorer: the adapted model, document by document in result, batch by batch in execution.

One adaptation step takes every active document of a batch through one chunk:

    nll_j   = NLL of chunk j's targets inside its window, under the document's adapter            (recorded)
    adapter <- Adam(adapter, grad mean(nll_j)),   steps_per_chunk times; not for the last chunk

Documents are sorted by length, so that the active ones are always the first rows of the batch. Every window of one step
is padded to the same length, which depends on the chunk's index alone. So a document's arithmetic does not depend on
the rest of its batch. The rotary base is that of a whole window, NTK-scaled where `window` exceeds the training length.
This scorer is the reference that faster engines are tested against.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.gpt import GPT
from ..model.ranges import phase
from .adapters import AdapterPool
from .documents import Document
from .head import head_nll_ref
from .protocols import MIN_NLL, TTTConfig, learning_rate


class Deadline:
    """`seconds` from now, of which `spent` are gone already; 0 seconds never pass."""

    def __init__(self, seconds: float, spent: float = 0.0):
        self.end = time.perf_counter() + seconds - spent if seconds else float("inf")

    def passed(self) -> bool:
        return time.perf_counter() >= self.end


@dataclass(frozen=True)
class Adapted:
    """What adapting documents gave: float64 nats [B] (of the targets reached), how many targets, and the pass kept."""

    nats: np.ndarray
    targets: np.ndarray
    kept_pass: np.ndarray

    def of(self, rows: np.ndarray) -> "Adapted":
        """The results of these documents."""
        return Adapted(self.nats[rows], self.targets[rows], self.kept_pass[rows])


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
        self.whole = int(targets.sum())
        self.active = [sum(count > j for count in counts) for j in range(self.rounds + 1)]

    def chunk(self, j: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Chunk j of the first `rows` documents.

        Returns inputs int64 [rows, L]; `at` int64 [rows, chunk], the input that each target follows; its target id; and
        whether that target exists. L = min((j + 1) * chunk, window), for every batch.
        """
        size, length = self.config.chunk, min((j + 1) * self.config.chunk, self.config.window)
        end = self.targets[:rows].clamp(max=(j + 1) * size)
        start = (end - self.config.window).clamp(min=0)
        last = self.tokens.size(1) - 1
        at = start[:, None] + torch.arange(length, device=self.device)
        inputs = self.tokens[:rows].gather(1, at.clamp(max=last))
        position = j * size + torch.arange(size, device=self.device)
        exists = position < end[:, None]
        targets = self.tokens[:rows].gather(1, (position + 1).clamp(max=last).expand(rows, -1))
        return inputs, (position - start[:, None]).clamp(max=length - 1), targets, exists


def adapted_nll(model: GPT, pool: AdapterPool, rows: int, inputs: Tensor, at: Tensor, targets: Tensor) -> Tensor:
    """NLL [rows, chunk] of `targets` under the adapters of the first `rows` slots."""
    adapters, head = pool.adapters(rows)
    hidden = model.hidden(inputs, adapters, rotary_length=pool.ttt.window, backend="reference")
    hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.size(-1)))
    weight = model.embed.to(hidden.dtype)
    return head_nll_ref(hidden, weight, head, targets, model.config.logit_softcap, pool.ttt.temperature)


def adapt_batch(
    model: GPT,
    pool: AdapterPool,
    batch: Batch,
    deadline: Deadline,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda targets: None,
    recorded: Callable[[int, Tensor], None] = lambda number, nll: None,
) -> Adapted:
    """Adapt and score one batch under `pool.ttt`'s protocol. `progress` gets the targets passed so far.

    `recorded` gets the number of a pass and its next chunk's NLL [active, chunk], longest documents first.

    When the deadline passes or `should_stop` says so, what is scored so far counts for score_first; for the leaky
    protocols, whose numbers need whole passes, a document counts only after its last one. `targets` in the result says
    how many targets `nats` covers.
    """
    config = pool.ttt
    documents = len(batch.targets)
    pool.reset()
    totals = torch.zeros(config.passes, documents, dtype=torch.float64, device=batch.device)
    reached = torch.zeros(documents, dtype=torch.int64, device=batch.device)
    finished, passed, steps = True, 0, config.passes * sum(batch.active)
    for index in range(config.passes):
        reached.zero_()
        for j in range(batch.rounds):
            if deadline.passed() or should_stop():
                finished = False
                break
            active = batch.active[j]
            nll, exists = _score_then_train(model, pool, batch, j)
            recorded(index, nll)
            totals[index, :active] += nll.double().masked_fill(~exists, 0.0).sum(1)
            reached[:active] += exists.sum(1)
            passed += active
            progress(passed * batch.whole // steps)
        if not finished:
            break
    kept = totals.argmin(0) if config.protocol == MIN_NLL else torch.full_like(reached, config.passes - 1)
    if not finished and config.is_leaky:
        reached = torch.where((reached == batch.targets) & (index == config.passes - 1), reached, 0)
    nats = totals.gather(0, kept[None])[0]
    return Adapted(nats.cpu().numpy(), reached.cpu().numpy(), kept.cpu().numpy())


def _score_then_train(model: GPT, pool: AdapterPool, batch: Batch, j: int) -> tuple[Tensor, Tensor]:
    """Chunk j: its NLL [active, chunk] under the adapters as they are, then the Adam steps on it."""
    active, trained = batch.active[j], batch.active[j + 1]
    inputs, at, targets, exists = batch.chunk(j, active)
    with phase("scoring"), torch.set_grad_enabled(trained > 0):
        nll = adapted_nll(model, pool, active, inputs, at, targets)
    recorded = nll.detach()
    for step in range(pool.ttt.steps_per_chunk if trained else 0):
        if step:
            with phase("forward"):
                nll = adapted_nll(model, pool, trained, inputs[:trained], at[:trained], targets[:trained])
        # A chunk that is trained on is whole: only a document's last chunk, which is not, can be shorter.
        with phase("backward"):
            pool.backward(nll[:trained].mean(dim=1).sum(), trained)
        with phase("optimizer"):
            pool.update(trained, learning_rate(pool.ttt, pool.step[:trained], batch.chunks[:trained]))
    return recorded, exists
