"""The training step on a GPU: forward, backward, clip, both optimizers and the averages, captured in CUDA graphs.

Shapes and addresses are fixed; what changes from step to step (learning rates, momentum, the averages' weights, tokens)
is written into device tensors before a replay. Nothing waits for the device: tokens come from pinned memory on a stream
beside the computing one, and a step's loss and gradient norm are copied out behind it and read when they are there.
With one micro-batch a step is one graph; else it is one of the first micro-batch, one of the others, and one of the
update.

Ranks add up their gradients in buckets, while the backward of the last micro-batch goes on (reduction.py). Those
collectives are part of the graph that the update belongs to; with `graph_collectives=between` they stand between two
graphs, and overlap with nothing. What every rank applies comes from the same bits, so that replicas stay equal. Until
the last collective of a step has returned, nothing of weights, momenta, AdamW's state or averages is written; and
where a rank is gone by then (`Ranks.alive`), nothing after it either. The loss of such a step is reported as NaN.

A step whose loss or gradient norm is no number changes no weight, on the device, before the host knows: the clip makes
every gradient a NaN then, and both optimizers leave everything as it is. The host learns of it AHEAD steps later. Those
in between are steps from the same unharmed weights.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
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
from .reduction import GradientReduction
from .stored import StoredWeights

AHEAD = 2
"""Steps that the host may be ahead of the device, so that the device never waits for it."""
RATES = 6
"""Numbers of a step that the device reads: three learning rates, Muon's momentum, the weights of EMA and SWA."""


class FusedStep:
    """Training steps of `model`, each over `micro_batches` batches of `rows` sequences of `length` tokens.

    The model's parameters move into the buffers of `stored`, and stay views of them. On several ranks, all of them run
    the same steps, shared out as `config` says. `say` gets a line where the collectives could not be captured.
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
        say: Callable[[str], None] = warnings.warn,
    ):
        device, length = model.embed.device, length or model.config.train_length
        self.model, self.config, self.ranks, self.device = model, config, ranks, device
        self.rows, self.micro_batches = rows, micro_batches
        self._is_alone = ranks.world == 1
        wire = torch.float32 if self._is_alone else getattr(torch, config.reduce_dtype)
        clip = config.qat_clip if config.qat_share else 0.0
        self.stored = StoredWeights(model, clip, 1 if self._is_alone else config.gradient_buckets, wire)
        # On a GPU it is the device that waits, in an order that a capture keeps; the host goes on.
        self._waiting = ranks.waiting if device.type == "cpu" else nullcontext
        self.reduction = None if self._is_alone else GradientReduction(self.stored, self._waiting)
        self.rates = torch.zeros(RATES, device=device)
        self.optimizers = Optimizers(model, config, rates=self.rates[:4])
        if config.muon_gathers and not self._is_alone:
            self.optimizers.share(self.stored.matrix_grads, config.muon_gathers)
        self.averages = WeightAverages(model, config, self.stored.values)
        self.rotary = tuple(table[:length].contiguous() for table in model.rotary(length, length))
        self.tokens = torch.ones(rows, length + 1, dtype=torch.int32, device=device)
        self.total = self.stored.total
        self._alive = torch.ones(1, dtype=torch.int32, device=device)
        self.report = torch.zeros(2, device=device)
        pinned = device.type == "cuda"
        self._ring = torch.zeros(AHEAD, 2, pin_memory=pinned)
        self._rates_ring = torch.zeros(AHEAD, RATES, pin_memory=pinned)
        self._feed = TokenFeed(self.tokens)
        self._events: list[torch.cuda.Event | None] = [None] * AHEAD
        self._weights = [(0.0, 0.0)] * AHEAD
        self._steps = 0
        self.collectives = "none" if self._is_alone else config.graph_collectives
        self._micro_batches, self._rest = self._made(capture and pinned, say)

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
            self._micro_batches[index]()
        for part in self._rest:
            part()
        self._ring[slot].copy_(self.report, non_blocking=True)
        self._events[slot] = self._recorded()
        self._weights[slot] = weights
        self._steps += 1
        return late

    def replay(self) -> None:
        """The step over what `tokens` and `rates` hold; for measuring, with one micro-batch."""
        self._micro_batches[0]()
        for part in self._rest:
            part()

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
        loss, norm = self._ring[slot].tolist()
        if self._is_alone or (math.isfinite(loss) and math.isfinite(norm)):  # several ranks leave the averages, too
            self.averages.count(*self._weights[slot])
        return loss, norm

    def _recorded(self):
        if self.device.type != "cuda":
            return _Done()
        event = torch.cuda.Event()
        event.record()
        return event

    def _gradients(self, first: bool, last: bool = True, reduces: bool = False) -> None:
        """Forward and backward of one micro-batch; its gradients are taken, and with `reduces` added up over ranks."""
        inputs, targets = self.tokens[:, :-1].contiguous(), self.tokens[:, 1:].contiguous()
        weights, stored = self.stored.weights, self.stored
        start = document_starts(inputs, BOS_ID) if self.config.document_mask else None
        with torch.enable_grad():
            with phase("forward"):
                hidden = network.hidden(weights, inputs, self.rotary, backend=self.model.backend, start=start)
                softcap = self.model.config.logit_softcap
                nll = softcap_nll(hidden, weights.head, targets, softcap, backend=self.model.backend)
                loss = nll.sum() / self.config.batch_tokens
            if first:
                self.total.copy_(loss.detach())
            else:
                self.total.add_(loss.detach())
            with phase("backward"):
                if reduces:
                    self.reduction.backward(loss, first)
                else:
                    stored.take(torch.autograd.grad(loss, stored.leaves), first, last)

    @torch.no_grad()
    def _prepare(self, send: bool = True) -> None:
        """From the sums to clipped gradients. Ranks that share Newton-Schulz make their updates, and `send` them."""
        with phase("optimizer"):
            self.stored.finish()
            gradients = self.stored.grads
            self._norm = torch.linalg.vector_norm(gradients)
            self._finite = torch.isfinite(self._norm) & torch.isfinite(self.total)
            self._taken = self._finite
            if not self._is_alone and self.optimizers.shared is None:
                self._taken = self._finite & self._are_all_alive()
            clip = (self.config.grad_clip / (self._norm + 1e-6)).clamp(max=1.0)
            gradients.mul_(torch.where(self._taken, clip, math.nan))
            if self.optimizers.shared is not None:
                with self._waiting():
                    self.optimizers.shared.orthogonalise(self._finite, send)

    @torch.no_grad()
    def _commit(self) -> None:
        """Write weights, states and averages, after the last collective."""
        with self.ranks.changing(), phase("optimizer"):
            weights, total = self.rates[4:], self.total
            if self.optimizers.shared is not None:
                self._taken = self._finite & self.optimizers.shared.finite() & self._are_all_alive()
            if not self._is_alone:
                weights = torch.where(self._taken, weights, 0.0)
                total = torch.where(self._taken == self._finite, total, math.nan)
            self.optimizers.step_on_device(self._taken)
            self.averages.update_on_device(weights, self.model.backend)
            self.stored.refresh()
            torch.stack([total, self._norm], out=self.report)

    def _are_all_alive(self) -> Tensor:
        """Whether all ranks are there when the device comes here, bool []."""
        self._alive.copy_(self.ranks.alive, non_blocking=True)
        return self._alive[0] > 0

    def _updates(self) -> None:
        self._prepare()
        self._commit()

    def _parts(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """What a step calls: for each of its micro-batches, and after them."""
        count, shared = self.micro_batches, self.optimizers.shared
        first = last = partial(self._gradients, first=True, last=count == 1)
        parts = [first]
        if count > 1:
            last = partial(self._gradients, first=False)
            middle = last if self._is_alone else partial(self._gradients, first=False, last=False)
            parts += [*[middle] * (count - 2), last]

        def whole() -> None:
            last(reduces=not self._is_alone)
            self._updates()

        if self._is_alone and count > 1:
            return parts, [self._updates]
        if self.collectives != "between":
            return [*parts[:-1], whole], []
        if shared is None:
            return parts, [_Eager(self.reduction.reduce), self._updates]
        prepare = partial(self._prepare, send=False)
        return parts, [_Eager(self.reduction.reduce), prepare, _Eager(shared.gather), self._commit]

    def _made(
        self, capture: bool, say: Callable[[str], None]
    ) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """The parts of a step; with `capture`, as replays of CUDA graphs.

        If the collectives cannot be captured on some rank, they stand between graphs on all, and `say` tells why.
        """
        if not capture:
            return self._parts()
        stream = capture_stream(self, self.device)
        run_on(stream, self._warm_up)
        self.optimizers.forget_skipped()
        if self._is_alone:
            return self._captured(stream)
        problem = None
        try:
            made = self._captured(stream)
        except RuntimeError as error:
            problem = error
        (failed,) = self.ranks.most(float(problem is not None))
        if not failed:
            return made
        why = f"{type(problem).__name__}: {problem}" if problem else "it failed on another rank"
        if self.collectives == "between":
            raise RuntimeError(f"a training step could not be captured: {why}") from problem
        say(f"the collectives of a step could not be captured and run between its CUDA graphs, which is slower: {why}")
        self.collectives = "between"
        return self._captured(capture_stream(self, self.device))

    def _captured(self, stream: torch.cuda.Stream) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        pool, replays = torch.cuda.graph_pool_handle(), {}
        options = {"warm_up": 0, "stream": stream, "pool": pool, "collectives": not self._is_alone}

        def replay(part: Callable[[], None]) -> Callable[[], None]:
            if isinstance(part, _Eager):
                return part
            if part not in replays:
                replays[part] = captured(part, self.device, **options)
            return replays[part]

        micro_batches, rest = self._parts()
        return list(map(replay, micro_batches)), list(map(replay, rest))

    def _warm_up(self) -> None:
        """Compile every kernel and make every state, without changing a parameter: the gradients are NaN.

        Collectives run as they will be captured, so that NCCL has what it needs for them.
        """
        self._gradients(first=True, last=False)
        self._gradients(first=False, reduces=not self._is_alone)
        self.total.fill_(math.nan)
        self._updates()


class _Eager(partial):
    """A part of a step that is in no CUDA graph."""


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
