"""Scoring a set of documents from end to end: base pass, adaptation, deadline, journal, result.

Every finished document goes into a journal at once, and what the base model has said so far with it, so that an
interrupted run can go on where it stopped. The deadline is checked before every adaptation step; what it leaves out
keeps the base model's score and says so.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import KloraError
from ..model.config import ConfigError
from ..model.gpt import GPT
from ..model.storage import attempt
from .adapters import AdapterPool
from .base import BaseNll
from .documents import Document
from .engine import engine_of, memory_of
from .journal import Journal
from .protocols import CACHED, MIN_NLL, TTTConfig
from .results import ADAPTED, NOT_ADAPTED, PARTIAL, SHORT, DocumentResult, ScoreResult
from .scorer import Adapted, Batch, Deadline, adapt_batch
from .token_gains import TokenGains

ENGINE, UNCAPTURED, EAGER = "engine", "uncaptured", "eager"
SCORERS = ("auto", ENGINE, UNCAPTURED, EAGER)
"""engine: graphs of fused kernels; uncaptured: the same steps without graphs, for debugging; eager: plain PyTorch, the
reference. auto: the engine on a GPU; elsewhere eager, or uncaptured on several ranks. All give the same scores to
rounding."""


class Interrupted(KloraError, RuntimeError):
    """Scoring was stopped before its end; the journal, or those of all ranks, hold `done` of `total` documents."""

    def __init__(self, done: int, total: int):
        super().__init__(f"{done} of {total} documents are scored")
        self.done, self.total = done, total


class NonFiniteScore(KloraError, RuntimeError):
    """An NLL that is no number: the adapter diverged, or the model's weights are not finite."""


def pick_scorer(scorer: str, device: torch.device, are_many: bool = False) -> str:
    """The scorer that `scorer` means on `device`, not the eager one where `are_many`; ConfigError if there is none."""
    if scorer not in SCORERS:
        raise ConfigError(f"scorer={scorer!r} is not possible; allowed: {', '.join(SCORERS)}")
    if scorer == EAGER and are_many:
        raise ConfigError(
            "scorer='eager' is not possible on several ranks or with context='cached'; allowed: auto, engine, "
            "uncaptured"
        )
    if scorer == "auto":
        return ENGINE if device.type == "cuda" else UNCAPTURED if are_many else EAGER
    if scorer == ENGINE and device.type != "cuda":
        raise ConfigError(f"scorer='engine' is not possible on {device}: graphs want a GPU; allowed: uncaptured, eager")
    return scorer


@torch.inference_mode(False)  # adapters are trained here, also for a caller that evaluates
@torch.enable_grad()
def score_documents(
    model: GPT,
    documents: Sequence[Document],
    config: TTTConfig,
    journal: Journal,
    prequant: GPT | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    facts: dict[str, Any] | None = None,
    scorer: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> ScoreResult:
    """Score `documents` with `model` and its adapters under `config`; both models are frozen here.

    `prequant` is the model before quantisation, scored beside the base model on the same windows. `progress` gets
    (phase, targets done, targets in all). `scorer` is one of SCORERS; `say` hears what the engine chose. `facts` go
    into the result, with those of the engine. Documents that `journal` holds are not scored again.

    Interrupted: `should_stop` said so; the journal holds what was finished. NonFiniteScore: an NLL that is no number.
    ConfigError: a scorer that does not exist or does not run on the model's device.

    Example: result = score_documents(model, [document], ttt_preset(), journal)
    """
    model.requires_grad_(False)
    facts = dict(facts or {})
    scorer = pick_scorer(scorer, model.embed.device, config.context == CACHED)
    seconds = dict(journal.seconds)
    deadline = Deadline(config.deadline, spent=sum(seconds.values()))
    left = sorted(set(range(len(documents))) - journal.done.keys(), key=lambda index: -documents[index].targets)
    remaining = [documents[index] for index in left]
    gains = TokenGains(documents, config)
    sizes = np.array([document.targets + 1 for document in documents], dtype=np.int64)
    begins = np.cumsum(sizes) - sizes
    cells = np.concatenate([np.arange(begins[i], begins[i] + sizes[i]) for i in left] or [np.zeros(0, dtype=np.int64)])

    def base_pass(phase: str, of: GPT) -> BaseNll:
        def tick(done: int) -> None:
            progress(phase, done, sum(document.targets for document in remaining))
            if should_stop():
                raise Interrupted(len(journal.done), len(documents))

        kept = journal.base(phase, int(sizes.sum()))

        def keep(nll: np.ndarray) -> None:
            kept[:, cells] = nll
            attempt("the copy of the base pass for --resume", lambda: journal.keep_base(phase), say)

        with _timed(seconds, phase):
            return BaseNll(of, remaining, config, tick, known=kept[:, cells], keep=keep)

    try:
        if left:
            base = base_pass("base", model)
            before = base_pass("prequant", prequant.requires_grad_(False)) if prequant else None
            drafts = [unadapted(document, position, base, before) for position, document in enumerate(remaining)]
            journal.add({index: draft for index, draft in zip(left, drafts, strict=True) if draft.status == SHORT})

            def found(results: dict[int, DocumentResult]) -> None:
                journal.add({left[position]: result for position, result in results.items()})

            def scored(position: int, adapted: np.ndarray) -> None:
                begin = base.offsets[position] + 1
                gains.add(left[position], base.nll[begin : begin + len(adapted)], adapted)

            job = _Job(model, remaining, drafts, base, deadline, should_stop, progress, found, scored, say)
            with _timed(seconds, "adapt"):
                job.eagerly() if scorer == EAGER else facts.update(engine=job.by_engine(scorer))
            if any(index not in journal.done for index in left):
                raise Interrupted(len(journal.done), len(documents))
    except Interrupted:
        journal.add_seconds(seconds)
        raise
    results = [journal.done[index] for index in range(len(documents))]
    attempt("the choice of a document for the report", lambda: gains.choose(documents, results), say)
    return ScoreResult(results, config, seconds, facts | {"scorer": scorer}, gains)


@dataclass(frozen=True)
class _Job:
    """Adapt the documents that are long enough, which come longest first; `found` gets their results by position.

    `scored` gets the adapted NLL [targets reached] of each, for the report: where that fails, `say` tells it.
    A document that `should_stop` broke off is not among them; one that the deadline left out is.
    """

    model: GPT
    documents: Sequence[Document]
    drafts: Sequence[DocumentResult]
    base: BaseNll
    deadline: Deadline
    should_stop: Callable[[], bool]
    progress: Callable[[str, int, int], None]
    found: Callable[[dict[int, DocumentResult]], None]
    scored: Callable[[int, np.ndarray], None]
    say: Callable[[str], None]

    def eagerly(self) -> None:
        """Batch by batch, by the eager scorer."""
        config, device, (long, total), done = self.base.config, self.model.embed.device, self._long(), 0
        pool = AdapterPool(self.model.config, config, min(config.batch, max(len(long), 1)), device)
        for begin in range(0, len(long), config.batch):
            positions = long[begin : begin + config.batch]
            results = {position: self.drafts[position] for position in positions}
            if not self.deadline.passed():
                batch = Batch([self.documents[position] for position in positions], config, device)

                def progress(at: int, done: int = done) -> None:
                    self.progress("adapt", done + at, total)

                record = _Record(config)
                adapted = adapt_batch(self.model, pool, batch, self.deadline, self.should_stop, progress, record.add)
                results = self._results(positions, adapted)
                self._hand_on(positions, adapted, partial(record.token_nll, adapted))
                if self.should_stop():
                    # Those that are through are kept; the others' adapters are gone.
                    self.found({at: result for at, result in results.items() if result.status == ADAPTED})
                    return
            self.found(results)
            done += sum(self.drafts[position].tokens for position in positions)
            if self.should_stop():
                return

    def by_engine(self, scorer: str) -> dict[str, Any]:
        """All side by side, by the engine, whose facts this returns."""
        long, total = self._long()
        if not long:
            return {}
        documents, handed = [self.documents[position] for position in long], set()
        engine = engine_of(self.model, self.base.config, documents, capture=False if scorer == UNCAPTURED else None)
        self.say(memory_of(engine.facts))

        def finished(places: np.ndarray, adapted: Adapted) -> None:
            handed.update(places.tolist())
            self.found(self._results([long[place] for place in places], adapted))

        def progress(at: int) -> None:
            self.progress("adapt", at, total)

        adapted = engine.adapt(documents, self.deadline, self.should_stop, progress, finished=finished)
        if not self.should_stop():  # the deadline's
            rest = np.array([place for place in range(len(long)) if place not in handed], dtype=np.int64)
            self.found(self._results([long[place] for place in rest], adapted.of(rest)))
            self._hand_on(long, adapted, lambda: engine.token_nll(documents, adapted.kept_pass))
        return engine.facts

    def _hand_on(self, positions: Sequence[int], adapted: Adapted, read: Callable[[], list[np.ndarray]]) -> None:
        """Give what `read` finds of each document's targets, as far as they were reached, to `scored`."""

        def hand_on() -> None:
            for position, reached, nll in zip(positions, adapted.targets, read(), strict=True):
                self.scored(position, nll[:reached])

        attempt("the gain along the documents", hand_on, self.say)

    def _long(self) -> tuple[list[int], int]:
        """Positions of the documents to adapt, and their targets."""
        long = [position for position, draft in enumerate(self.drafts) if draft.status != SHORT]
        return long, sum(self.drafts[position].tokens for position in long)

    def _results(self, positions: Sequence[int], adapted: Adapted) -> dict[int, DocumentResult]:
        return {
            position: with_adaptation(self.drafts[position], adapted, row, self.base, position)
            for row, position in enumerate(positions)
        }


class _Record:
    """The NLL of a batch's targets as the eager scorer records it: of all passes that may count, on their device."""

    def __init__(self, config: TTTConfig):
        self._keeps_all = config.protocol == MIN_NLL
        self._passes: dict[int, list[torch.Tensor]] = {}

    def add(self, number: int, nll: torch.Tensor) -> None:
        """Note the NLL [active, chunk] of the next chunk of pass `number`."""
        if number not in self._passes:
            if not self._keeps_all:
                self._passes.clear()
            self._passes[number] = []
        self._passes[number].append(nll)

    def token_nll(self, adapted: Adapted) -> list[np.ndarray]:
        """NLL [targets reached] of each document in the pass that counts."""
        passes = {number: [nll.cpu().numpy() for nll in chunks] for number, chunks in self._passes.items()}
        found = []
        for row, (reached, kept) in enumerate(zip(adapted.targets, adapted.kept_pass, strict=True)):
            chunks = [nll[row] for nll in passes[int(kept)] if row < len(nll)] if reached else []
            found.append(np.concatenate([np.zeros(0, np.float32), *chunks])[:reached])
        return found


@contextmanager
def _timed(seconds: dict[str, float], phase: str):
    """Add the time spent inside to `seconds[phase]`, also when it ends by an exception."""
    before, started = seconds.get(phase, 0.0), time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = before + time.perf_counter() - started


def unadapted(document: Document, position: int, base: BaseNll, before: BaseNll | None) -> DocumentResult:
    """The document as the base model leaves it. NonFiniteScore where that is no number."""
    nats, tempered = base.of(position)
    prequant = before.of(position)[0] if before else None
    if not all(math.isfinite(value) for value in (nats, tempered, prequant or 0.0)):
        raise NonFiniteScore(
            f"the unadapted model gives {document.name!r} an NLL of {nats}, before quantisation {prequant}; nothing is "
            "reported. Export an artifact whose weights are finite"
        )
    return DocumentResult(
        name=document.name,
        tokens=document.targets,
        bytes=document.bytes,
        status=SHORT if base.is_short[position] else NOT_ADAPTED,
        base_nats=nats,
        tempered_nats=tempered,
        adapted_nats=nats,
        prequant_nats=prequant,
    )


def with_adaptation(draft: DocumentResult, adapted: Adapted, row: int, base: BaseNll, position: int) -> DocumentResult:
    """`draft` with the targets that were reached scored by the adapted model and the rest by the base model."""
    reached = int(adapted.targets[row])
    if not reached:
        return draft
    if not math.isfinite(adapted.nats[row]):
        raise NonFiniteScore(
            f"adapting {draft.name!r} gave an NLL of {adapted.nats[row]}; nothing is reported. Try a smaller lr or a "
            "temperature nearer to 1"
        )
    return dataclasses.replace(
        draft,
        status=ADAPTED if reached == draft.tokens else PARTIAL,
        adapted_nats=float(adapted.nats[row]) + base.of(position, reached)[0],
        kept_pass=int(adapted.kept_pass[row]),
        adapted_tokens=reached,
    )
