"""The engine: documents adapted side by side at the pace of the GPU, with the results of one document adapted alone.

The tokens of all documents lie in one buffer on the device. Adapters and their Adam state lie in the slots of the pool,
and the NLL of every target in one record that is read once at the end. Schedule says which documents take which chunk
in which round. A round is one small array of indices sent to the device, and one step. A step is captured as a CUDA
graph for a window length and a number of places, with or without training, where :mod:`.shapes` says that it is worth
one. `capture=False` runs the same steps without graphs. On a CPU that is the only way, and the reference ops take the
kernels' place. A round's indices are written by :mod:`.run`; what fits into the memory says :mod:`.engine_memory`.

Captures are made over places that are all empty: these read token 0 alone and write nothing of the pool, so that a
capture leaves no trace.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch

from ..kernels.dispatch import device_of
from ..model.gpt import GPT
from ..model.graphs import capture_stream, captured
from ..model.weights import Weights, frozen_weights
from .adapters import AdapterPool, Slots
from .documents import Document
from .engine_memory import activation_bytes, largest_batch, slot_bytes
from .hf_model import HfModel
from .phases import shared_steps
from .protocols import CACHED, MIN_NLL, RECOMPUTED, TTTConfig
from .queue import Deadline
from .results import Adapted
from .ring import Ring
from .run import Run
from .schedule import Queue, Round, Schedule, Waiting, queues_of, visits_of
from .shapes import CAPTURE, Shape, Shapes, expected_rounds
from .step import CHUNKS, FIELDS, FRESH, EngineStep, clear_plan

ROWS = (64, 16, 4)
"""Numbers of places that steps are made for: full, and two for the tail of the longest documents."""

AHEAD = 3
"""Rounds that the host may be ahead of the device: enough that the device never waits, few enough that the deadline is
looked at when it should be."""

SLOTS_A_PLACE = 4
"""Slots of the pool for each place of a batch: documents that are ready for the other window lengths wait in them."""


def slots_a_place(config: TTTConfig) -> int:
    """Slots for each place of a batch: nobody waits for the rounds of another queue where there is one."""
    return min(SLOTS_A_PLACE, len(queues_of(config)))


def on_its_device(method: Callable) -> Callable:
    """Runs a method of an engine with its GPU as the current one, of which streams, events and graphs are made."""

    @functools.wraps(method)
    def run(self: "Engine", *arguments: Any, **options: Any) -> Any:
        with device_of(self.tokens):
            return method(self, *arguments, **options)

    return run


class Engine:
    """Adapts sets of documents of up to `tokens` tokens (BOS among them) in all under one config.

    `batch` is `config.batch` or the largest that fits; `rows` are the numbers of places below it that steps are made
    for, and `slots` the documents that may be under way. No document has more than `longest` tokens (`tokens`, if left
    out): the context `cached` wants tables of that length. `facts` says what was chosen, and after :meth:`adapt` what
    the run was like. `backend` is handed to the ops.

    With phases, :meth:`learn` takes the steps of the shared adapter, in whole windows whatever the context.
    """

    def __init__(
        self,
        model: GPT | Weights,
        config: TTTConfig,
        tokens: int,
        *,
        rows: Sequence[int] = ROWS,
        slots: int | None = None,
        longest: int | None = None,
        capture: bool | None = None,
        backend: str | None = None,
    ):
        self.config, self.device = config, model.device
        device = self.device
        can_capture = device.type == "cuda" and backend != "reference"
        self.captures = can_capture if capture is None else capture
        if self.captures and not can_capture:
            raise ValueError(f"capture is True, on {device.type} with backend {backend!r}; graphs want CUDA kernels")
        if slots is not None and slots < 1:
            raise ValueError(f"slots is {slots}; allowed: at least 1")
        if not 2 <= tokens < 2**31:
            raise ValueError(f"tokens is {tokens}; allowed: 2 to {2**31 - 1}")
        self.longest = tokens if longest is None else longest
        self.queues = queues_of(config)
        self._whole = config.override({"context": RECOMPUTED})
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        batch, slots, self.facts = self._fit(model, tokens, slots)
        self.rows = sorted({row for row in rows if 0 < row < batch} | {batch})
        self.facts |= {"rows": self.rows, "captured": self.captures, "context": config.context}
        self.backend = backend
        self._make_pool(model, slots, dtype, can_capture)
        self.tokens = torch.zeros(tokens, dtype=torch.int32, device=device)
        places = max(batch, self._shared_places)
        self.record = torch.zeros(self._records * tokens + places * config.chunk, dtype=dtype, device=device)
        self.slots = slots
        self.chunks = torch.ones(len(self.pool.params), dtype=torch.int64, device=device)
        self.plan = torch.empty(FIELDS, places, dtype=torch.int32, device=device)
        self._ring = torch.zeros(AHEAD, FIELDS, places, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._sent = [torch.cuda.Event() for _ in range(AHEAD)] if device.type == "cuda" else None
        self._steps: dict[Shape, Callable[[], None]] = {}
        self._shapes = Shapes([queue.length for queue in self.queues], CAPTURE if self.captures else 0.0)
        # With recomputed windows a shared step is one like the others.
        self._shared_steps = {} if config.context == CACHED else self._steps
        self._memory = torch.cuda.graph_pool_handle() if self.captures else None
        # Of this GPU and for all graphs: PyTorch's own stream for captures is of the first GPU that captured, and
        # memory freed on one stream is not handed out on another.
        self._stream = capture_stream(self, self.device) if self.captures else None

    def _make_pool(self, model: GPT | Weights, slots: int, dtype: torch.dtype, can_capture: bool) -> None:
        """The weights as a step reads them, the adapters, and what is kept of their documents' context."""
        config = self.config
        self.pool: Slots = AdapterPool(model.config, config, slots, self.device, dtype)
        self.weights = frozen_weights(model)
        self.ring = Ring(self.weights, config, slots, self.longest, can_capture) if config.context == CACHED else None

    def _slot_bytes(self, model: GPT | Weights) -> int:
        return slot_bytes(model, self.config)

    def _activation_bytes(self, model: GPT | Weights, config: TTTConfig, rows: int) -> int:
        return activation_bytes(model, config, rows)

    def _tables_bytes(self, model: GPT | Weights) -> int:
        """cos and sin in fp32, of up to twice the positions."""
        return 8 * self.longest * model.config.head_dim if self.config.context == CACHED else 0

    def _new_step(self, queue: Queue, rows: int, ring: Ring | None) -> EngineStep:
        state = self.pool, self.tokens, self.record, self.plan, self.chunks
        return EngineStep(self.weights, *state, queue, rows, self.backend, ring)

    @property
    def _records(self) -> int:
        """Passes whose NLL is kept: all that one may be chosen from."""
        return self.config.passes if self.config.protocol == MIN_NLL else 1

    @property
    def _shared_places(self) -> int:
        """Places of a step of the shared adapter; 0 where there is none."""
        return self.config.phase_chunks if self.config.phases else 0

    def _fit(self, model: GPT | Weights, tokens: int, slots: int | None) -> tuple[int, int, dict[str, Any]]:
        """Places and slots that fit into the memory that is free now, and the estimate that says so.

        A step's activations count twice with graphs: their pool holds those of the largest step while another one,
        hardly smaller, runs once before its capture.
        """
        config, each, tables = self.config, self._slot_bytes(model), self._tables_bytes(model)

        def chosen(batch: int) -> int:
            return slots_a_place(config) * batch if slots is None else slots

        def needed(batch: int) -> int:
            largest = self._activation_bytes(model, config, batch)
            if config.phases:
                largest = max(largest, self._activation_bytes(model, self._whole, self._shared_places))
            rows = chosen(batch) + bool(config.phases)
            return 4 * tokens * (1 + self._records) + tables + rows * each + (1 + self.captures) * largest

        facts: dict[str, Any] = {}
        batch = config.batch
        if self.device.type == "cuda":
            # What PyTorch holds and does not use is free, too.
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            facts["free_bytes"] = torch.cuda.mem_get_info(self.device)[0] + unused
            batch = largest_batch(batch, needed, facts["free_bytes"])
        facts |= {"batch": batch, "slots": chosen(batch), "estimated_bytes": needed(batch)}
        return batch, facts["slots"], facts

    @on_its_device
    def prepare(self, shapes: Iterable[Shape] | None = None, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Make the steps of these shapes, or of all that there can be: captured, or ready to run as they are.

        `should_stop` is asked before each.
        """
        if shapes is None:
            shapes = [Shape(q, rows, t) for q in range(len(self.queues)) for rows in self.rows for t in (True, False)]
        began = time.perf_counter()
        for shape in sorted(set(shapes) - self._steps.keys(), key=lambda shape: (-self._shapes.cost(shape), shape)):
            if should_stop():
                break
            self._steps[shape] = self._made(shape)
        self.facts["prepare_seconds"] = self.facts.get("prepare_seconds", 0.0) + time.perf_counter() - began
        self.facts["steps"] = len(self._steps)

    def _step_of(self, taken: Round) -> Callable[[], None]:
        """The step that a round takes, which is made if it is worth that."""
        shape = self._shapes.pick(Shape.of(taken), self._steps)
        if shape not in self._steps:
            self.prepare([shape])
        return self._steps[shape]

    def _made(self, shape: Shape, whole: bool = False) -> Callable[[], None]:
        """A step of documents, or of whole windows whatever the context."""
        queue, rows, trains = shape
        queues, ring = (queues_of(self._whole), None) if whole else (self.queues, self.ring)
        step = self._new_step(queues[queue], rows, ring)
        run = step.train if trains else step.score
        if not self.captures:
            return run
        clear_plan(self.plan)
        return captured(run, self.device, warm_up=1, stream=self._stream, pool=self._memory)

    @on_its_device
    def rehearse(self) -> None:
        """Run every step once over places that are all empty, which leaves no trace."""
        self.prepare()
        if self.config.phases:
            self._prepare_shared(range(len(queues_of(self._whole))))
        clear_plan(self.plan)
        for steps in (self._steps, self._shared_steps):
            for run in steps.values():
                run()

    @on_its_device
    def adapt(
        self,
        documents: Sequence[Document],
        deadline: Deadline,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda targets: None,
        *,
        waiting: Callable[[np.ndarray], Waiting] | None = None,
        finished: Callable[[np.ndarray, Adapted], None] = lambda positions, adapted: None,
        every: float = 30.0,
    ) -> Adapted:
        """Adapt and score `documents`; the result is in their order. `progress` gets the targets passed so far.

        The deadline is asked before every step that is made, it and `should_stop` before every round. What is scored by
        then counts for score_first; for the leaky protocols a document counts only if its last pass is through.
        `targets` in the result says how many targets `nats` covers.

        `finished` gets the positions of documents that are through, and their results, every `every` seconds and at the
        end. `waiting` makes, from the visits of the documents longest first, what hands out some or all of them.
        """
        order = np.array(sorted(range(len(documents)), key=lambda index: -documents[index].targets), dtype=np.int64)
        run = Run([documents[index] for index in order], self.config)
        self._require_fits(run)
        if len(run.targets) and run.targets[0] >= self.longest:
            raise ValueError(f"a document has {run.targets[0] + 1} tokens; this engine takes up to {self.longest}")

        def schedule(chunks: np.ndarray, waiting: Waiting | None = None) -> Schedule:
            shape = chunks, self.config.passes, self.slots, self.queues, self.rows
            return Schedule(*shape, self.config.trained_from, waiting)

        rounds: Iterable[Round]
        if waiting is None:
            rounds = list(schedule(run.chunks))
            counts: Mapping[Shape, int] = Counter(map(Shape.of, rounds))
        else:
            handed_out = waiting(visits_of(run.chunks, self.config.passes, [queue.first for queue in self.queues]))
            rounds = schedule(run.chunks, handed_out)
            counts = expected_rounds(run.chunks, handed_out.sharers, schedule)
        shapes = self._shapes.worth(counts, self._steps)
        self.prepare(shapes, deadline.passed)
        self._load(run, [documents[index] for index in order])

        def hand_over() -> None:
            through = run.newly_through()
            if len(through):
                found = self._read(run, int(through[0]), int(through[-1]) + 1)
                finished(order[through], found.of(through - through[0]))

        began = handed = time.perf_counter()
        launched, spent, prepared = 0, 0.0, self.facts["prepare_seconds"]
        for number, taken in enumerate(rounds):
            self._wait(number)
            if deadline.passed() or should_stop():
                break
            self._launch(number, taken, run)
            launched += 1
            run.count(taken, self.queues[taken.queue].length)
            progress(run.passed)
            if time.perf_counter() - handed > every:
                stopped = time.perf_counter()
                hand_over()
                handed = time.perf_counter()
                spent += handed - stopped
        adapted = self._read(run, 0, len(order))
        self.facts |= {
            "rounds": launched,
            "useful_places": run.inputs / max(run.places, 1),
            "seconds": time.perf_counter() - began - (self.facts["prepare_seconds"] - prepared),
            "handing_over_seconds": spent,
        }
        hand_over()
        return adapted.of(np.argsort(order))

    @on_its_device
    def learn(
        self,
        documents: Sequence[Document],
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda targets: None,
    ) -> bool:
        """Let the shared adapter learn from scored documents, in their order, and later ones start from it or its A.

        Whether it came to the end: `should_stop`, asked before every step, says that it shall not. What an engine has
        recorded is gone afterwards. `progress` gets the targets passed so far, a share of all of them in each pass.
        """
        if not self.config.phases:
            raise ValueError("phases is 0: there is no shared adapter to learn; allowed: a config with phases")
        run, queues = Run(documents, self._whole), queues_of(self._whole)
        self._require_fits(run)
        steps = list(shared_steps(run.chunks, [queue.first for queue in queues], self._shared_places))
        self._prepare_shared({step.queue for step in steps})
        self._load(run, documents)
        began = time.perf_counter()
        passes = self.config.phase_passes
        for number, step in enumerate(chain.from_iterable(repeat(steps, passes))):
            self._wait(number)
            if should_stop():
                return False
            place = number % AHEAD
            passed = run.fill_shared(self._ring[place].numpy(), step, self.pool.shared)
            self.plan.copy_(self._ring[place], non_blocking=True)
            self._shared_steps[self._shared_shape(step.queue)]()
            if self._sent is not None:
                self._sent[place].record()
            progress(passed // passes)
        if self._sent is not None:
            torch.cuda.current_stream(self.device).synchronize()
        self.pool.start_from_shared()
        self.facts["shared_steps"] = self.facts.get("shared_steps", 0) + len(steps) * passes
        self.facts["learn_seconds"] = self.facts.get("learn_seconds", 0.0) + time.perf_counter() - began
        return True

    def _shared_shape(self, queue: int) -> Shape:
        return Shape(queue, self._shared_places, True)

    def _prepare_shared(self, queues: Iterable[int]) -> None:
        """Make the shared adapter's steps of these queues: in whole windows, which the context `cached` has not."""
        shapes = {self._shared_shape(queue) for queue in queues}
        for shape in sorted(shapes - self._shared_steps.keys(), reverse=True):
            self._shared_steps[shape] = self._made(shape, whole=True)

    def _require_fits(self, run: Run) -> None:
        if run.tokens > len(self.tokens):
            raise ValueError(f"the documents have {run.tokens} tokens; this engine holds {len(self.tokens)}")

    def _load(self, run: Run, documents: Sequence[Document]) -> None:
        tokens = np.concatenate([document.tokens for document in documents] or [np.zeros(0)]).astype(np.int32)
        self.tokens[: run.tokens].copy_(torch.from_numpy(tokens))
        self.record.zero_()

    def _wait(self, number: int) -> None:
        """Until the round that used this place of the ring has run."""
        if self._sent is not None and number >= AHEAD:
            self._sent[number % AHEAD].synchronize()

    def _launch(self, number: int, taken: Round, run: Run) -> None:
        place, step = number % AHEAD, self._step_of(taken)
        fresh = run.fill(self._ring[place].numpy(), taken, self._records)
        self.plan.copy_(self._ring[place], non_blocking=True)
        if fresh:
            slots, chunks = self.plan[FRESH, :fresh].long(), self.plan[CHUNKS, :fresh].long()
            self.pool.start(slots)
            self.chunks.index_copy_(0, slots, chunks)
        step()
        if self._sent is not None:
            self._sent[place].record()

    def token_nll(self, documents: Sequence[Document], kept_pass: Sequence[int] | None = None) -> list[np.ndarray]:
        """NLL [targets] of each of the documents that were adapted last, in the pass that counts.

        `kept_pass` is what :meth:`adapt` returned; min_nll keeps the passes apart, the others record one.
        """
        order = np.array(sorted(range(len(documents)), key=lambda index: -documents[index].targets), dtype=np.int64)
        run = Run([documents[index] for index in order], self.config)
        record = self.record[: self._records * len(self.tokens)].view(self._records, -1).cpu().numpy()
        rows = np.zeros(len(order), np.int64) if kept_pass is None or self._records == 1 else np.array(kept_pass)[order]
        # Copies: on a CPU the record is the engine's own, which the next documents overwrite.
        found = [record[r, o + 1 : o + 1 + n].copy() for r, o, n in zip(rows, run.offsets, run.targets, strict=True)]
        return [found[place] for place in np.argsort(order)]

    def _read(self, run: Run, first: int, stop: int) -> Adapted:
        """What is recorded of the documents from `first` up to `stop`, which alone leave the device: nats of each in
        the pass that counts, how many targets, and which pass.
        """
        covered, count = run.covered()[first:stop], stop - first
        if not count:
            return Adapted(np.zeros(0), covered, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool), [])
        begin, end = int(run.offsets[first]), int(run.offsets[stop - 1] + run.targets[stop - 1]) + 1
        record = self.record[: self._records * len(self.tokens)].view(self._records, -1)[:, begin:end].cpu().numpy()
        offsets, targets = run.offsets[first:stop] - begin, run.targets[first:stop]
        totals = np.stack([np.add.reduceat(row, offsets, dtype=np.float64) for row in record])
        if self.config.protocol == MIN_NLL:
            kept = np.where(np.isfinite(totals), totals, np.inf).argmin(0)
            rows = kept
        else:
            kept, rows = np.full(count, self.config.passes - 1), np.zeros(count, dtype=np.int64)
        nats = totals[rows, np.arange(count)]
        diverged = ~np.isfinite(nats)
        for place in np.flatnonzero(diverged):
            begin = offsets[place] + 1
            nll = record[rows[place], begin : begin + targets[place]]
            finite = 0 if self.config.is_leaky else int(np.isfinite(nll).argmin())
            covered[place], nats[place] = finite, nll[:finite].sum(dtype=np.float64)
        # Copies: on a CPU the record is the engine's own, which the next documents overwrite.
        nll = [record[r, o + 1 : o + 1 + n].copy() for r, o, n in zip(rows, offsets, covered, strict=True)]
        return Adapted(nats, covered, kept, diverged, nll)


def engine_of(
    model: GPT | Weights | HfModel, config: TTTConfig, documents: Sequence[Document], **options: Any
) -> Engine:
    """An engine of the size of `documents`, whose options these are: the one that adapts models like `model`."""
    # More slots than documents would stay empty.
    options.setdefault("slots", max(1, min(slots_a_place(config) * config.batch, len(documents))))
    sizes = [2, *(document.targets + 1 for document in documents)]
    make = model.engine if isinstance(model, HfModel) else functools.partial(Engine, model)
    return make(config, max(2, sum(sizes[1:])), longest=max(sizes), **options)
