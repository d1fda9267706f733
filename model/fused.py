"""The training step on a GPU: forward, backward, clip, both optimizers and the averages, captured in CUDA graphs.

Shapes and addresses are fixed; what changes from step to step (learning rates, momentum, the averages' weights, tokens)
is written into device tensors before a replay. Nothing waits for the device: tokens come from pinned memory on a stream
beside the computing one, and a step's loss and gradient norm are copied out behind it and read when they are there.
With one micro-batch and one rank a step is one graph; else it is one of the first micro-batch, one of the others, and
one of the update, with the sum over ranks before it.

A step whose loss or gradient norm is no number changes no weight, on the device, before the host knows: the clip makes
every gradient a NaN then, and both optimizers leave everything as it is. The host learns of it AHEAD steps later. Those
in between are steps from the same unharmed weights.
"""

import math
from collections.abc import Callable, Iterable
from itertools import takewhile

import torch
from torch import Tensor

from ..kernels import BOS_ID, softcap_nll
from ..kernels.attention import document_starts
from . import network
from .average import WeightAverages
from .config import TrainConfig
from .gpt import GPT
from .graphs import capture_stream, captured, run_on
from .optimizers import Optimizers
from .parallel import Ranks
from .ranges import phase
from .stored import StoredWeights

AHEAD = 2
"""Steps that the host may be ahead of the device, so that the device never waits for it."""
RATES = 6
"""Numbers of a step that the device reads: three learning rates, Muon's momentum, the weights of EMA and SWA."""


class FusedStep:
    """Training steps of `model`, each over `micro_batches` batches of `rows` sequences of `length` tokens.

    The model's parameters move into the buffers of `stored`, and stay views of them.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        rows: int,
        micro_batches: int,
        ranks: Ranks,
        length: int | None = None,
        capture: bool = True,
    ):
        device, length = model.embed.device, length or model.config.train_length
        self.model, self.config, self.ranks, self.device = model, config, ranks, device
        self.rows, self.micro_batches = rows, micro_batches
        self.stored = StoredWeights(model, config.qat_clip if config.qat_share else 0.0)
        self.rates = torch.zeros(RATES, device=device)
        self.optimizers = Optimizers(model, config, rates=self.rates[:4])
        self.averages = WeightAverages(model, config, self.stored.values)
        self.rotary = tuple(table[:length].contiguous() for table in model.rotary(length, length))
        self.tokens = torch.ones(rows, length + 1, dtype=torch.int32, device=device)
        self.total = torch.zeros((), device=device)
        self.report = torch.zeros(2, device=device)
        pinned = device.type == "cuda"
        self._ring = torch.zeros(AHEAD, 2, pin_memory=pinned)
        self._rates_ring = torch.zeros(AHEAD, RATES, pin_memory=pinned)
        self._feed = TokenFeed(self.tokens)
        self._events: list[torch.cuda.Event | None] = [None] * AHEAD
        self._steps = 0
        self._whole = micro_batches == 1 and ranks.world == 1
        self._first, self._other, self._update = self._made(capture and pinned)

    def run(
        self, batches: Iterable[Tensor], step: int, lr_scale: float, quantized: bool = False
    ) -> tuple[float, float] | None:
        """Start a step over token rows int [rows, length + 1] on the CPU, one for each micro-batch.

        `quantized`: with the matrices at their int6 values. The switch lies on the device: the same graph runs on.
        Returns (loss, gradient norm before clipping) of the step AHEAD before it, or None where there is none. What
        `batches` raises leaves the step out: no weight has changed.
        """
        slot = self._steps % AHEAD
        late = self._read(slot)
        self.stored.quantize(quantized)
        weights = self.averages.weights_at(step + 1, lr_scale)
        self._rates_ring[slot] = torch.tensor([*self.optimizers.rates_at(step, lr_scale), *weights])
        self.rates.copy_(self._rates_ring[slot], non_blocking=True)
        for index, rows in enumerate(batches):
            self._feed.send(rows)
            (self._other if index else self._first)()
        if not self._whole:
            self.ranks.sum_(self.stored.sums)
            self.ranks.sum_(self.total)
            with self.ranks.changing():
                self._update()
        self._ring[slot].copy_(self.report, non_blocking=True)
        self._events[slot] = self._recorded()
        self._steps += 1
        self.averages.count(*weights)
        return late

    def replay(self) -> None:
        """The step over what `tokens` and `rates` hold; for measuring, where a step is one graph."""
        self._first()

    def refresh(self) -> None:
        """Take the parameters as they are now: they were changed from outside."""
        self.stored.refresh()

    def flush(self) -> list[tuple[float, float]]:
        """Wait for the steps that are under way; their (loss, gradient norm), oldest first."""
        return [late for i in range(AHEAD) if (late := self._read((self._steps + i) % AHEAD)) is not None]

    def finished(self) -> list[tuple[float, float]]:
        """As :meth:`flush`, of the steps that are over: it waits for none."""
        slots = ((self._steps + i) % AHEAD for i in range(AHEAD))
        over = takewhile(lambda slot: self._events[slot].query(), (slot for slot in slots if self._events[slot]))
        return [self._read(slot) for slot in over]

    def _read(self, slot: int) -> tuple[float, float] | None:
        event, self._events[slot] = self._events[slot], None
        if event is None:
            return None
        event.synchronize()
        return tuple(self._ring[slot].tolist())

    def _recorded(self):
        if self.device.type != "cuda":
            return _Done()
        event = torch.cuda.Event()
        event.record()
        return event

    def _gradients(self, first: bool) -> None:
        inputs, targets = self.tokens[:, :-1].contiguous(), self.tokens[:, 1:].contiguous()
        weights, stored = self.stored.weights, self.stored
        start = document_starts(inputs, BOS_ID) if self.config.document_mask else None
        with torch.enable_grad():
            with phase("forward"):
                hidden = network.hidden(weights, inputs, self.rotary, backend=self.model.backend, start=start)
                softcap = self.model.config.logit_softcap
                nll = softcap_nll(hidden, weights.head, targets, softcap, backend=self.model.backend)
                loss = nll.sum() / self.config.batch_tokens
            with phase("backward"):
                gradients = torch.autograd.grad(loss, stored.leaves)
        stored.take(gradients, first)
        if first:
            self.total.copy_(loss.detach())
        else:
            self.total.add_(loss.detach())

    @torch.no_grad()
    def _updates(self) -> None:
        with phase("optimizer"):
            self.stored.finish()
            gradients = self.stored.grads
            norm = torch.linalg.vector_norm(gradients)
            finite = torch.isfinite(norm) & torch.isfinite(self.total)
            clip = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            gradients.mul_(torch.where(finite, clip, math.nan))
            self.optimizers.step_on_device(finite)
            self.averages.update_on_device(self.rates[4:], self.model.backend)
            self.stored.refresh()
            torch.stack([self.total, norm], out=self.report)

    def _made(self, capture: bool) -> tuple[Callable[[], None], ...]:
        """The first micro-batch (with the update, where a step is one graph), another one, and the update."""

        def first() -> None:
            self._gradients(first=True)
            if self._whole:
                self._updates()

        parts = first, lambda: self._gradients(first=False), self._updates
        if not capture:
            return parts
        stream, pool = capture_stream(self, self.device), torch.cuda.graph_pool_handle()
        run_on(stream, self._warm_up)
        self.optimizers.forget_skipped()
        wanted = (True, self.micro_batches > 1, not self._whole)
        return tuple(
            captured(part, self.device, warm_up=0, stream=stream, pool=pool) if is_wanted else part
            for part, is_wanted in zip(parts, wanted, strict=True)
        )

    def _warm_up(self) -> None:
        """Compile every kernel and make every state, without changing a parameter: the gradients are NaN."""
        self._gradients(first=True)
        self._gradients(first=False)
        self.total.fill_(math.nan)
        self._updates()


class TokenFeed:
    """Brings token rows to `tokens`, int32 on the device: through pinned memory, on a stream beside the computing one.

    A copy over the bus waits for no step and no step waits for it, unless it is late.
    """

    def __init__(self, tokens: Tensor):
        self.tokens = tokens
        self._sent = 0
        if tokens.is_cuda:
            self._stream = torch.cuda.Stream(tokens.device)
            self._pinned = torch.zeros(AHEAD, *tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._arrived = torch.empty_like(self._pinned, device=tokens.device)
            # That memory may still be written to by what the current stream was given before.
            self._stream.wait_stream(torch.cuda.current_stream(tokens.device))
            self._copied, self._taken = ([torch.cuda.Event() for _ in range(AHEAD)] for _ in range(2))

    def send(self, rows: Tensor) -> None:
        """Let `tokens` be `rows`, int [rows, length + 1] on the CPU, for what the current stream gets next."""
        if not self.tokens.is_cuda:
            self.tokens.copy_(rows)
            return
        slot, computing = self._sent % AHEAD, torch.cuda.current_stream(self.tokens.device)
        self._sent += 1
        self._copied[slot].synchronize()  # the pinned rows may be written again
        self._pinned[slot].copy_(rows)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._taken[slot])
            self._arrived[slot].copy_(self._pinned[slot], non_blocking=True)
            self._copied[slot].record(self._stream)
        computing.wait_event(self._copied[slot])
        self.tokens.copy_(self._arrived[slot])
        self._taken[slot].record(computing)


class _Done:
    """An event of a device that waits for every call."""

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True
