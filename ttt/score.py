"""Scoring a set of documents from end to end: base pass, adaptation, deadline, journal, result.

Every finished document is appended to a journal at once, so that an interrupted run can go on where it stopped. The
deadline is checked before every adaptation step; what it leaves out keeps the base model's score and says so.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import KloraError
from ..model.config import ConfigError
from ..model.gpt import GPT
from ..model.storage import write_text
from .adapters import AdapterPool
from .base import BaseNll
from .documents import Document
from .engine import engine_of, memory_of
from .protocols import TTTConfig
from .results import DocumentResult, ScoreResult
from .scorer import ADAPTED, NOT_ADAPTED, PARTIAL, SHORT, Adapted, Batch, Deadline, adapt_batch

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
    """An adapted NLL that is no number: the adapter diverged."""


class JournalError(KloraError, ValueError):
    """A journal that belongs to another run, and what to do."""


class Journal:
    """Finished documents of one scoring run, one JSON object a line; the first line says which run.

    Documents that a deadline left out are not finished: a run that goes on adapts them, if it is given time. With
    `resume`, `others` are journals of other ranks of the same run, whose documents are done, too.
    """

    def __init__(self, path: Path, fingerprint: str, resume: bool, others: Sequence[Path] = ()):
        self.done: dict[int, DocumentResult] = {}
        self.seconds: dict[str, float] = {}
        records: list[dict[str, Any]] = [{"fingerprint": fingerprint}]
        for known in others if resume else ():
            # One that an earlier run left behind holds nothing of this one.
            with suppress(JournalError):
                records += self._read(known, fingerprint)[1:]
        if resume and path.exists():
            records += self._read(path, fingerprint)[1:]
        # Written whole again, so that a line torn by the interruption does not stay in the middle of the file.
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held open for the whole run)

    def _read(self, path: Path, fingerprint: str) -> list[dict[str, Any]]:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            records = [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            raise JournalError(f"{path} is damaged; leave out --resume to start afresh") from None
        if not records or records[0].get("fingerprint") != fingerprint:
            raise JournalError(
                f"{path} belongs to a run with another artifact, other documents or other settings; "
                "give the same ones, or leave out --resume to start afresh"
            )
        for record in records[1:]:
            if "seconds" in record:
                # They add up over interruptions, and ranks run side by side: the most is the time spent.
                self.seconds = max(self.seconds, record["seconds"], key=lambda seconds: sum(seconds.values()))
            elif record["result"]["status"] in (SHORT, ADAPTED):
                self.done[record["index"]] = DocumentResult(**record["result"])
        return records

    def _append(self, *records: dict[str, Any]) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()

    def add(self, results: dict[int, DocumentResult]) -> None:
        """Store finished documents by their index."""
        self._append(*({"index": i, "result": dataclasses.asdict(result)} for i, result in results.items()))
        self.done.update(results)

    def add_seconds(self, seconds: dict[str, float]) -> None:
        """Store the time spent so far by phase, for the run that goes on from here."""
        self._append({"seconds": seconds})

    def close(self) -> None:
        self._file.close()


def fingerprint(artifact_sha256: str, documents: Sequence[Document], config: TTTConfig, prequant: bool) -> str:
    """What a journal belongs to. The batch size and the deadline change no document's score, and are left out."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("batch", "deadline")}
    digest = hashlib.sha256(json.dumps([artifact_sha256, settings, prequant]).encode())
    for document in documents:
        digest.update(document.name.encode(errors="surrogateescape") + b"\0" + document.tokens.tobytes())
    return digest.hexdigest()


def pick_scorer(scorer: str, device: torch.device, are_many: bool = False) -> str:
    """The scorer that `scorer` means on `device`, where `are_many` on one of many; ConfigError where there is none."""
    if scorer not in SCORERS:
        raise ConfigError(f"scorer={scorer!r} is not possible; allowed: {', '.join(SCORERS)}")
    if scorer == EAGER and are_many:
        raise ConfigError("scorer='eager' is not possible on several ranks; allowed: auto, engine, uncaptured")
    if scorer == "auto":
        return ENGINE if device.type == "cuda" else UNCAPTURED if are_many else EAGER
    if scorer == ENGINE and device.type != "cuda":
        raise ConfigError(f"scorer='engine' is not possible on {device}: graphs want a GPU; allowed: uncaptured, eager")
    return scorer


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
    into the result, with those of the engine. Raises Interrupted when `should_stop` says so.
    """
    model.requires_grad_(False)
    facts = dict(facts or {})
    scorer = pick_scorer(scorer, model.embed.device)
    seconds = dict(journal.seconds)
    deadline = Deadline(config.deadline, spent=sum(seconds.values()))
    left = sorted(set(range(len(documents))) - journal.done.keys(), key=lambda index: -documents[index].targets)
    remaining = [documents[index] for index in left]

    def base_pass(phase: str, of: GPT) -> BaseNll:
        def tick(done: int) -> None:
            progress(phase, done, sum(document.targets for document in remaining))
            if should_stop():
                raise Interrupted(len(journal.done), len(documents))

        with _timed(seconds, phase):
            return BaseNll(of, remaining, config, tick)

    try:
        if left:
            base = base_pass("base", model)
            before = base_pass("prequant", prequant.requires_grad_(False)) if prequant else None
            drafts = [unadapted(document, position, base, before) for position, document in enumerate(remaining)]
            journal.add({index: draft for index, draft in zip(left, drafts, strict=True) if draft.status == SHORT})

            def found(results: dict[int, DocumentResult]) -> None:
                journal.add({left[position]: result for position, result in results.items()})

            job = _Job(model, remaining, drafts, base, deadline, should_stop, progress, found)
            with _timed(seconds, "adapt"):
                job.eagerly() if scorer == EAGER else facts.update(engine=job.by_engine(scorer, say))
            if len(journal.done) < len(documents):
                raise Interrupted(len(journal.done), len(documents))
    except Interrupted:
        journal.add_seconds(seconds)
        raise
    results = [journal.done[index] for index in range(len(documents))]
    return ScoreResult(results, config, seconds, facts | {"scorer": scorer})


@dataclass(frozen=True)
class _Job:
    """Adapt the documents that are long enough, which come longest first; `found` gets their results by position.

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

                adapted = adapt_batch(self.model, pool, batch, self.deadline, self.should_stop, progress)
                if self.should_stop():
                    return
                results = self._results(positions, adapted)
            self.found(results)
            done += sum(self.drafts[position].tokens for position in positions)
            if self.should_stop():
                return

    def by_engine(self, scorer: str, say: Callable[[str], None]) -> dict[str, Any]:
        """All side by side, by the engine, whose facts this returns."""
        long, total = self._long()
        if not long:
            return {}
        documents, handed = [self.documents[position] for position in long], set()
        engine = engine_of(self.model, self.base.config, documents, capture=False if scorer == UNCAPTURED else None)
        say(memory_of(engine.facts))

        def finished(places: np.ndarray, adapted: Adapted) -> None:
            handed.update(places.tolist())
            self.found(self._results([long[place] for place in places], adapted))

        def progress(at: int) -> None:
            self.progress("adapt", at, total)

        adapted = engine.adapt(documents, self.deadline, self.should_stop, progress, finished=finished)
        if not self.should_stop():  # the deadline's
            rest = np.array([place for place in range(len(long)) if place not in handed], dtype=np.int64)
            self.found(self._results([long[place] for place in rest], adapted.of(rest)))
        return engine.facts

    def _long(self) -> tuple[list[int], int]:
        """Positions of the documents to adapt, and their targets."""
        long = [position for position, draft in enumerate(self.drafts) if draft.status != SHORT]
        return long, sum(self.drafts[position].tokens for position in long)

    def _results(self, positions: Sequence[int], adapted: Adapted) -> dict[int, DocumentResult]:
        return {
            position: with_adaptation(self.drafts[position], adapted, row, self.base, position)
            for row, position in enumerate(positions)
        }


@contextmanager
def _timed(seconds: dict[str, float], phase: str):
    """Add the time spent inside to `seconds[phase]`, also when it ends by an exception."""
    before, started = seconds.get(phase, 0.0), time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = before + time.perf_counter() - started


def unadapted(document: Document, position: int, base: BaseNll, before: BaseNll | None) -> DocumentResult:
    """The document as the base model leaves it."""
    nats, tempered = base.of(position)
    return DocumentResult(
        name=document.name,
        tokens=document.targets,
        bytes=document.bytes,
        status=SHORT if base.is_short[position] else NOT_ADAPTED,
        base_nats=nats,
        tempered_nats=tempered,
        adapted_nats=nats,
        prequant_nats=before.of(position)[0] if before else None,
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
    )
