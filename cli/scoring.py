"""One run of `klora score`: load, tokenize, compile, score, write, in this order, each timed."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer

from ..model.parallel import own_device
from ..model.placement import device_name, processor_name
from ..model.signals import StopSignals
from ..model.storage import attempt, require_writable
from ..ttt import pipeline
from ..ttt.documents import Document, facts_of_texts, facts_of_tokens
from ..ttt.engines import pick_scorer
from ..ttt.journal import Journal, fingerprint, open_journal, remove_journals, settings_of
from ..ttt.pipeline import ScoreRequest
from ..ttt.progress import Interrupted
from ..ttt.protocols import TTTConfig, label
from ..ttt.queue import PATIENCE, DocumentQueue, queue_of_processes
from ..ttt.report import write_report
from ..ttt.results import ScoreResult, is_short
from ..ttt.sweep import sweep
from ..ttt.verify import write_nll
from .console import Output
from .subject import Source, Subject, facts_of_source, sampled
from .threads import settle_threads
from .totals import say_totals

SPARE_BYTES = 2**24
"""Disk space that a run wants whatever it scores: the report, its picture, a journal of some thousand documents."""

TOKEN_BYTES = 48
"""Disk space a token: 8 for each kept pass, written beside the one that it replaces, and its documents' lines."""

SHOWN = {
    "base": "base model",
    "prequant": "before quantisation",
    "adapt": "adapting",
    "learn": "shared adapter",
    "score": "scoring, all ranks",
    "sweep": "sweep",
}
"""What the progress bar calls the phases."""


@dataclass(frozen=True)
class Scoring:
    """What is scored, how, and into which folder. The fields are the command's options.

    `path` is an artifact; with `hf_dtype`, which goes to :func:`load_hf`, a folder of Hugging Face.
    """

    path: Path
    source: Source
    config: TTTConfig
    folder: Path
    device: str = "auto"
    most_tokens: int = 0
    prequant: Path | None = None
    nll: Path | None = None
    resume: bool = False
    overwrite: bool = False
    tunes: bool = False
    weights: str = "dense"
    scorer: str = "auto"
    patience: float = PATIENCE
    warm: bool = False
    hf_dtype: str | None = None

    def run(self, output: Output) -> ScoreResult:
        """Score, write the results, say the totals. typer.Exit where a signal ends it."""
        seconds: dict[str, float] = {}
        require_writable(self.folder, SPARE_BYTES)
        device = own_device(self.device)
        settle_threads(device)
        scorer = pick_scorer(self.scorer, device)
        with _timed(seconds, "load"):
            subject = self._subject(device)
        with _timed(seconds, "tokenize"):
            every = subject.documents(self.source, output.warn)
            documents = sampled(every, self.most_tokens)
            of_bytes = facts_of_tokens(documents, subject.tokenizer) if self.source.shards else facts_of_texts()
        require_writable(self.folder, SPARE_BYTES + TOKEN_BYTES * sum(document.targets for document in documents))
        queue = queue_of_processes(self.patience)
        output.is_silent, output.as_json = output.is_silent or not queue.is_first, output.as_json and queue.is_first
        many = f" x {queue.world}" if queue.is_shared else ""
        output.say(f"scoring {len(documents):,} documents, {label(self.config.protocol)}, on {device}{many}")
        if self.warm and self.hf_dtype is None and device.type == "cuda":
            with _timed(seconds, "warm"):
                self._compile(subject, documents, device, output)
        with StopSignals(output.say) as stop:
            request = ScoreRequest(
                subject.model,
                documents,
                self.config,
                prequant=subject.before,
                queue=queue,
                scorer=scorer,
                should_stop=lambda: bool(stop.received),
                say=output.say,
                facts=subject.facts
                | {
                    "device": device_name(device),
                    "processor": processor_name(device),
                    "weights": self._weights(subject),
                    "source": facts_of_source(self.source, every, self.most_tokens),
                }
                | of_bytes,
                keeps_nll=self.nll is not None,
            )
            if self.tunes:
                with _timed(seconds, "sweep"):
                    request = _tuned(request, stop, output)
            result = self._scored(request, subject, queue, stop, output)
        if queue.is_first:
            result.seconds.update(seconds)
            self._write(result, subject, output)
        return result

    def _subject(self, device: torch.device) -> Subject:
        if self.hf_dtype is None:
            return Subject.of_artifact(self.path, device, self.weights, self.prequant)
        return Subject.of_folder(self.path, device, self.hf_dtype, self.config)

    def _weights(self, subject: Subject) -> str:
        """What the model's weights are, as a result and its journal say it."""
        return self.weights if self.hf_dtype is None else subject.facts["hf"]["dtype"]

    def _compile(self, subject: Subject, documents: Sequence[Document], device: torch.device, output: Output) -> None:
        """What the run will launch, ahead and side by side."""
        from .warm import scoring, warmed

        adapted = sum(not is_short(document, self.config) for document in documents)
        warmed(lambda: scoring(subject.model, self.config, adapted, self.weights), device, output)

    def _scored(
        self, request: ScoreRequest, subject: Subject, queue: DocumentQueue, stop: StopSignals, output: Output
    ) -> ScoreResult:
        """The result, with the journal of an interrupted run where there is one."""
        of_run = " ".join(subject.hashes.values()), request.documents, request.config, self.prequant is not None
        more = {"weights": self._weights(subject), "scorer": request.scorer}
        key, settings = fingerprint(*of_run, **more), settings_of(*of_run, **more)
        resume = self.resume or queue.is_restarted
        try:
            with closing(
                open_journal(self.folder, key, resume, self.overwrite, queue.rank, queue.world, settings)
            ) as journal:
                _say_what_is_kept(journal, resume, output)
                with output.progress() as show:
                    return pipeline.score(replace(request, journal=journal, progress=_shown(show)))
        except Interrupted as interrupted:
            output.say(f"stopped: {interrupted}; the same command with --resume goes on from there")
            raise typer.Exit(128 + stop.received) from None

    def _write(self, result: ScoreResult, subject: Subject, output: Output) -> None:
        with _timed(result.seconds, "report"):
            if self.nll:
                write_nll(self.nll, result)
                digest = hashlib.sha256(self.nll.read_bytes()).hexdigest()
                result.facts["nll"] = {"file": self.nll.name, "sha256": digest}
            result.write(self.folder)
            page = attempt(
                "the report", lambda: write_report(result, self.folder, output.warn, subject.token_bytes), output.warn
            )
        remove_journals(self.folder)
        say_totals(result, output)
        if page is not None:
            output.say(f"report: {page}")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _tuned(request: ScoreRequest, stop: StopSignals, output: Output) -> ScoreRequest:
    """The request for the documents that the sweep leaves, with the constants that it chose."""
    try:
        with output.progress() as show:
            return sweep(replace(request, progress=_shown(show)))
    except Interrupted:
        output.say("stopped in the sweep, of which nothing is kept: the same command begins it again")
        raise typer.Exit(128 + stop.received) from None


def _say_what_is_kept(journal: Journal, resume: bool, output: Output) -> None:
    if journal.done or journal.base_share:
        kept = f", the base pass is done for {journal.base_share:.0%} of the text" if journal.base_share else ""
        output.say(f"resuming: {len(journal.done):,} documents are already scored{kept}")
    elif resume:
        output.say("nothing to resume from; starting afresh")


def _shown(show: Callable[..., None]) -> Callable[[str, int, int], None]:
    return lambda phase, done, total: show(SHOWN[phase], done, total, "tokens")
