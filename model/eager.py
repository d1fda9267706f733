"""The training step in eager PyTorch: on a CPU, and the reference of the fused one (fused.py)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels import BOS_ID
from ..kernels.attention import document_starts
from .average import WeightAverages
from .config import TrainConfig
from .gpt import GPT
from .optimizers import FlatGradients, Optimizers
from .parallel import Ranks
from .ranges import phase


class EagerStep:
    """The step in eager PyTorch, as :class:`FusedStep` takes it: over micro-batches of any number of rows."""

    rows = None

    def __init__(self, model: GPT, config: TrainConfig, ranks: Ranks):
        self.model, self.config, self.ranks = model, config, ranks
        self.gradients = FlatGradients(model)
        self.optimizers = Optimizers(model, config)
        self.averages = WeightAverages(model, config)
        self._last: tuple[float, float] | None = None

    def run(self, batches: Iterable[Tensor], step: int, scale: float, quantized: bool = False) -> None:
        """One step over token rows int [rows, length + 1]; :meth:`flush` tells what it gave."""
        config, device = self.config, self.ranks.device
        int6_clip = config.qat_clip if quantized else 0.0
        self.gradients.buffer.zero_()
        total, tokens = torch.zeros((), device=device), 0
        for rows in batches:
            rows = rows.to(device, non_blocking=True)
            start = document_starts(rows[:, :-1], BOS_ID) if config.document_mask else None
            with phase("forward"):
                nll = self.model.nll(rows[:, :-1], rows[:, 1:], start=start, int6_clip=int6_clip)
                loss = nll.sum() / config.batch_tokens
            with phase("backward"):
                loss.backward()
            total += loss.detach()
            tokens += rows[:, 1:].numel() * self.ranks.world
        self.ranks.sum_(self.gradients.buffer)
        self.ranks.sum_(total)
        if tokens < config.batch_tokens:
            self.gradients.buffer.mul_(config.batch_tokens / tokens)
            total.mul_(config.batch_tokens / tokens)
        grad_norm = self.gradients.clip_(config.grad_clip)
        loss, norm = torch.stack([total, grad_norm]).tolist()
        with self.ranks.changing(), phase("optimizer"):
            self._last = loss, norm
            if math.isfinite(loss) and math.isfinite(norm):
                self.optimizers.step(step, scale)
                self.averages.update(step + 1, scale)

    def refresh(self) -> None:
        """Nothing of the step is kept beside the parameters."""

    def flush(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of the step that none has asked for."""
        last, self._last = self._last, None
        return [last] if last else []

    finished = flush
    """No step is under way once :meth:`run` has returned."""
