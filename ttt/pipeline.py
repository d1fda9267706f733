"""Scoring documents from end to end: base pass, adaptation, deadline, journal, results.

One process and the ranks of torchrun take the same way; what they share is a queue. Every finished document goes into a
journal at once, and what the base model has said so far with it, so that an interrupted run can go on where it stopped.
The deadline is checked before every adaptation step; what it leaves out keeps the base model's score and says so.

Documents are named by their index in the request. Outside the engine there is no other number for them.

With phases the groups of documents follow one another. Every process learns from all earlier groups before it adapts a
document of the next, which waits until all processes are through with the one before. What is learned depends on the
documents alone: a run that goes on learns it again.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import KloraError
from ..model.config import ConfigError
from ..model.gpt import GPT
from ..model.storage import attempt
from ..model.weights import Weights, frozen_weights
from .base import BaseNll
from .claims import Taken, dealt
from .documents import Document
from .engine import ROWS, Engine, engine_of
from .engine_memory import memory_of
from .hf_model import HfModel
from .journal import Journal, JournalError, NoJournal
from .phases import groups_of
from .protocols import TTTConfig
from .queue import DocumentQueue, HandsOut
from .results import Adapted, DocumentResult, NonFiniteScore, ScoreResult, is_short, unadapted, with_adaptation
from .store import LostStore
from .token_gains import TokenGains

ENGINE, UNCAPTURED = "engine", "uncaptured"
SCORERS = ("auto", ENGINE, UNCAPTURED)
"""engine: fused kernels in CUDA graphs; uncaptured: the same steps without graphs, for debugging and for a CPU, with
the same bits. auto: the engine on a GPU, elsewhere uncaptured."""

CPU_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Numbers of places that steps are made for on a CPU, where an empty place costs as much as a full one and a step that
is not captured costs nothing to make."""

RESCORED = 1e-5
"""Relative difference up to which a document that is scored again has the NLL that its journal kept."""

CPU_EVERY = 1.0
"""Seconds after which documents that are through are handed over on a CPU, where there is no device to wait for."""

TIME_SHARE = 0.01
"""Share of the time spent so far after which the journal notes it again, at the earliest after a second: what a kill
gives a deadline back."""

BLOCK = 512
"""Documents that a rank takes at a time where nothing is adapted."""


class Interrupted(KloraError, RuntimeError):
    """Scoring was stopped before its end; the journal, or those of all ranks, hold `done` of `total` documents."""

    def __init__(self, done: int, total: int):
        super().__init__(f"{done} of {total} documents are scored")
        self.done, self.total = done, total


def pick_scorer(scorer: str, device: torch.device) -> str:
    """The scorer that `scorer` means on `device`; ConfigError where there is none."""
    if scorer == "eager":
        raise ConfigError("scorer='eager' is gone: the engine scores on a CPU, too; allowed: auto, uncaptured")
    if scorer not in SCORERS:
        raise ConfigError(f"scorer={scorer!r} is not possible; allowed: {', '.join(SCORERS)}")
    if scorer == ENGINE and device.type != "cuda":
        raise ConfigError(f"scorer='engine' is not possible on {device}: graphs want a GPU; allowed: auto, uncaptured")
    return (ENGINE if device.type == "cuda" else UNCAPTURED) if scorer == "auto" else scorer


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, and how. Both models are frozen by it.

    model, documents, config: the model, and its test-time training on each of the documents.
    journal: keeps what is finished; documents that it holds are not scored again. None: nothing is kept.
    prequant: the model before quantisation, scored beside the base model on the same windows.
    queue: what the processes of this run share. None: there is this one alone.
    scorer: one of SCORERS.
    should_stop: asked between steps; once it says so, the run ends by Interrupted.
    progress: gets (phase, targets done, targets in all).
    say: hears what the engine chose.
    facts: go into the result, with those of the engine and of the ranks.
    keeps_nll: whether the result has the NLL of every target; of one process alone. Documents that the journal holds
    are scored again for it.

    Example: request = ScoreRequest(model, [document], ttt_preset())
    """

    model: GPT | HfModel
    documents: Sequence[Document]
    config: TTTConfig
    journal: Journal | None = None
    prequant: GPT | None = None
    queue: DocumentQueue | None = None
    scorer: str = "auto"
    should_stop: Callable[[], bool] = lambda: False
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None
    say: Callable[[str], None] = lambda text: None
    facts: dict[str, Any] = field(default_factory=dict)
    keeps_nll: bool = False


@torch.inference_mode(False)  # adapters are trained here, also for a caller that evaluates
@torch.enable_grad()
def score(request: ScoreRequest) -> ScoreResult:
    """Score the documents of a request; of several ranks every one that is not lost gets the whole result.

    A document whose adapter gives no number has the base model's score from there on, and the result says so. Where a
    GPU has not the memory for a batch, the next one is half as large.

    Interrupted: the request's `should_stop` said so; the journals hold what was finished. NonFiniteScore: an NLL of an
    unadapted model that is no number. LostStore: the ranks' store, or the first rank, is gone. JournalError: a journal
    of other documents, or with `keeps_nll` one that says another NLL of a document than scoring it again. ConfigError:
    a scorer that does not exist or does not run on the model's device, or `keeps_nll` on several ranks.

    Example: result = score(ScoreRequest(model, [document], ttt_preset()))
    """
    scorer = pick_scorer(request.scorer, request.model.device)
    for model in filter(None, (request.model, request.prequant)):
        model.requires_grad_(False)
    run = _Run(request, request.queue or DocumentQueue(), request.journal or NoJournal(), scorer)
    run.journal.require_of(request.documents)
    if request.keeps_nll and run.queue.is_shared:
        raise ConfigError("the NLL of every target is not kept by several ranks; score in one process")
    try:
        with run.timed("score") if run.queue.is_shared else nullcontext():
            facts = run.everything()
    except (Interrupted, LostStore) as ended:
        run.journal.add_seconds(run.spent)
        # All ranks were asked to stop, and the one that keeps the store was the first to go.
        if isinstance(ended, LostStore) and request.should_stop():
            raise run.interrupted() from None
        raise
    except NonFiniteScore as error:  # every rank would come to it
        run.queue.fail(str(error))
        raise
    results = [run.queue.results[index] for index in range(len(request.documents))]
    if run.gains is not None:

        def choose() -> None:
            run.gains.choose(request.documents, results)

        attempt("the choice of a document for the report", choose, run.say)
    nll = None
    if request.keeps_nll:
        nll = run.target_nll()
        missing = [i for i, result in enumerate(results) if not run.knows_nll(i, result, nll[i])]
        for index, found in _scored_again(request, results, missing).items():
            nll[index] = found
    facts = request.facts | {"scorer": scorer, "threads": torch.get_num_threads()} | facts
    hashes = [document.sha256 for document in request.documents]
    return ScoreResult(results, request.config, run.seconds, facts, run.gains, hashes, nll)


def _scored_again(
    request: ScoreRequest, results: Sequence[DocumentResult], indices: Sequence[int]
) -> dict[int, np.ndarray]:
    """The NLL of every target of documents of which only the sum is known: from the journal of an interrupted run."""
    if not indices:
        return {}
    among = range(len(results)) if request.config.phases else indices
    documents, config = [request.documents[index] for index in among], request.config.override({"deadline": 0.0})
    again = score(replace(request, documents=documents, config=config, journal=None, prequant=None, queue=None))
    found = dict(zip(among, zip(again.documents, again.nll, strict=True), strict=True))
    for index in indices:
        kept, new = results[index].adapted_nats, found[index][0].adapted_nats
        if abs(kept - new) > RESCORED * max(abs(new), 1.0):
            raise JournalError(
                f"the journal says that {results[index].name!r} has {kept} nats, and scoring it again gives {new}; "
                "give --overwrite to start afresh"
            )
    return {index: found[index][1] for index in indices}


def _frozen(model: GPT | HfModel) -> Weights | HfModel:
    """What passes and engines read, made once."""
    return model if isinstance(model, HfModel) else frozen_weights(model)


class _Run:
    """What one process does of a request. `seconds` by phase are those of interrupted runs, too."""

    def __init__(self, request: ScoreRequest, queue: DocumentQueue, journal: Journal, scorer: str):
        self.documents, self.config, self.scorer = request.documents, request.config, scorer
        self.should_stop, self.say, self.show = request.should_stop, request.say, request.progress
        self.queue, self.journal, self.seconds, self._timed = queue, journal, dict(journal.seconds), None
        sizes = np.array([len(document.tokens) for document in self.documents], dtype=np.int64)
        self.ends = np.cumsum(sizes)
        self.begins = self.ends - sizes
        self.weights = _frozen(request.model)
        self.unadapted: dict[str, Weights | HfModel] = {"base": self.weights}
        if request.prequant is not None:
            self.unadapted["prequant"] = frozen_weights(request.prequant)
        self.drafts: dict[int, DocumentResult] = {}
        self.gains = None if queue.is_shared else TokenGains(self.documents, self.config)
        self.engine_facts: dict[str, Any] = {}
        self.groups = groups_of(self.documents, self.config.phases)
        self.group_of = {index: number for number, group in enumerate(self.groups) for index in group}
        self.adapted_nll: dict[int, np.ndarray] | None = {} if request.keeps_nll else None
        self.engine: Engine | None = None
        self._note_time_at = 1.0 + sum(self.seconds.values())
        self.learnt = self.targets_before = self.targets_to_adapt = 0

    def everything(self) -> dict[str, Any]:
        """Work until every document has a result; facts of the run."""
        began = time.perf_counter()
        spent = sum(self.seconds.values())
        done, self.deadline = self.queue.begin(self.journal.done, self.config.deadline, spent, self.tick)
        left = (index for index in range(len(self.documents)) if index not in done)
        order = sorted(left, key=lambda index: -self.documents[index].targets)
        self.tick()
        if not self.queue.is_shared:
            self.base_pass(order, self._stoppable)
            self.unadapted.pop("prequant", None)  # the engine may have its memory
        self.targets_to_adapt = sum(self.documents[index].targets for index in order if not self._is_short(index))
        for number in range(len(self.groups)):
            self.score_group(number, [index for index in order if self.group_of[index] == number], began)
        return {"engine": self.engine_facts} | self._facts_of_phases() | self.queue.leave(self.should_stop)

    def score_group(self, group: int, order: Sequence[int], began: float) -> None:
        """Work until every document of a group has a result; `order` are those without one, longest first."""
        long = [index for index in order if not self._is_short(index)]
        short = [index for index in order if self._is_short(index)]
        if not self.queue.is_shared:
            self.finish(short)
        if long:
            self.learn_until(group)
        suffix = f"/{group}" if group else ""
        order_of_claims = dealt([self.documents[index].targets for index in long], self.queue.world)
        self.adapt(long, partial(self.queue.waiting, name=f"long{suffix}", order=order_of_claims))
        self.tick()
        claimable = [long[place] for place in order_of_claims]
        for name, indices in ((f"long{suffix}", claimable), (f"short{suffix}", short)):
            while numbers := [number for number in self.queue.claim(name, BLOCK) if number < len(indices)]:
                claimed = [indices[number] for number in numbers]
                self.queue.own(claimed)
                self.finish(claimed)
                self.tick()
        self.queue.worked(time.perf_counter() - began)
        while missing := self._missing(order):
            self.tick()
            if taken := self.queue.take_over(missing):
                self.adapt([] if self.deadline.passed() else [i for i in taken if not self._is_short(i)])
                self.finish([index for index in taken if index not in self.queue.results])
            else:
                time.sleep(0.05)

    def learn_until(self, group: int) -> None:
        """Let the shared adapter learn from the groups before `group` that it has not learned from yet.

        Once the deadline has passed nothing more is adapted, and nothing is learned.
        """

        def ends() -> bool:
            return self.deadline.passed() or self.should_stop()

        while self.learnt < group and not self.deadline.passed():
            documents = [self.documents[index] for index in self.groups[self.learnt]]
            total = sum(document.targets for document in documents)
            with self.timed("learn"):
                learned = False

                def learn(engine: Engine, documents: Sequence[Document] = documents, total: int = total) -> None:
                    nonlocal learned
                    learned = engine.learn(documents, ends, lambda done: self.progress("learn", done, total))

                if not self._fits(documents, learn):
                    continue
                if learned:
                    self.learnt += 1
                elif not self.deadline.passed():
                    raise self.interrupted()  # with half a phase in the shared adapter

    def _facts_of_phases(self) -> dict[str, Any]:
        if not self.config.phases:
            return {}
        return {
            "phases": {
                "order": "by the SHA-256 of the names, in groups of as many documents each",
                "documents_in_groups": [len(group) for group in self.groups],
                "tokens_in_groups": [sum(self.documents[index].targets for index in group) for group in self.groups],
            }
        }

    def _is_short(self, index: int) -> bool:
        return is_short(self.documents[index], self.config, self.group_of[index])

    def _missing(self, order: Sequence[int]) -> list[int]:
        self.collect()
        return [index for index in order if index not in self.queue.results]

    def interrupted(self) -> Interrupted:
        """The error that says how far the run came."""
        return Interrupted(len(self.queue.results), len(self.documents))

    def tick(self) -> None:
        """Between any two pieces of work: a pulse, and an end where one was asked for and something is left to do."""
        self._beat()
        if self.should_stop() and len(self.queue.results) < len(self.documents):
            raise self.interrupted()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[phase]`, also when it ends by an exception.

        A phase inside another is part of that one.
        """
        if self._timed is not None:
            yield
            return
        self._timed = phase, time.perf_counter()
        try:
            yield
        finally:
            self.seconds, self._timed = dict(self.spent), None

    @property
    def spent(self) -> Mapping[str, float]:
        """Seconds by phase until now."""
        if self._timed is None:
            return self.seconds
        phase, since = self._timed
        return self.seconds | {phase: self.seconds.get(phase, 0.0) + time.perf_counter() - since}

    def _beat(self) -> None:
        """Show that this process is alive, and let the journal know the time."""
        self.queue.beat()
        spent = self.spent
        total = sum(spent.values())
        if total >= self._note_time_at:
            self.journal.add_seconds(spent)
            self._note_time_at = total + max(1.0, TIME_SHARE * total)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show how far this process is; of several, only :meth:`collect` shows how far they all are."""
        self._beat()
        if not self.queue.is_shared:
            self.show(phase, done, total)

    def _stoppable(self, phase: str, done: int, total: int) -> None:
        self.progress(phase, done, total)
        self.tick()

    def collect(self) -> None:
        """Learn what all ranks have published."""
        self.queue.collect()
        if self.queue.is_shared:
            done = sum(result.tokens for result in self.queue.results.values())
            self.show("score", done, sum(document.targets for document in self.documents))

    def base_pass(self, indices: Sequence[int], tick: Callable[[str, int, int], None]) -> None:
        """Draft the results of documents from what the unadapted models say of them."""
        for phase, weights in self.unadapted.items():
            with self.timed(phase):
                self._pass(phase, weights, indices, tick)
        for index in indices:
            before = self._nats("prequant", index)[0] if "prequant" in self.unadapted else None
            self.drafts[index] = unadapted(
                self.documents[index], self.config, self._nats("base", index), before, self.group_of[index]
            )

    def _pass(
        self, phase: str, weights: Weights | HfModel, indices: Sequence[int], tick: Callable[[str, int, int], None]
    ) -> None:
        """One unadapted model's NLL of documents, into the journal's array; what that holds is not computed again."""
        if not indices:
            return
        documents, kept = [self.documents[index] for index in indices], self._nll(phase)
        cells = np.concatenate([np.arange(self.begins[index], self.ends[index]) for index in indices])
        total = sum(document.targets for document in documents)

        def keep(nll: np.ndarray) -> None:
            kept[:, cells] = nll
            if not self.queue.is_shared:
                attempt("the copy of the base pass for --resume", lambda: self.journal.keep_base(phase), self.say)

        found = BaseNll(
            weights,
            documents,
            self.config,
            lambda done: tick(phase, done, total),
            known=kept[:, cells],
            keep=keep,
            say=self.say,
        )
        kept[:, cells] = found.nll, found.tempered

    def _nll(self, phase: str) -> np.ndarray:
        """A pass of an unadapted model: fp32 [2, tokens] at both temperatures, over the request's documents."""
        return self.journal.base(phase, int(self.ends[-1]))

    def _nats(self, phase: str, index: int, start: int = 0) -> tuple[float, float]:
        """(nats, nats at the adapted temperature) of a document from its target `start` on."""
        nll = self._nll(phase)[:, self.begins[index] + 1 + start : self.ends[index]]
        return float(nll[0].sum(dtype=np.float64)), float(nll[1].sum(dtype=np.float64))

    def target_nll(self) -> list[np.ndarray]:
        """The NLL [targets] of every document that this process scored: the adapted model's, then the base model's."""
        found, base = [], self._nll("base")[0]
        for index in range(len(self.documents)):
            head = self.adapted_nll.get(index, base[:0])
            found.append(np.concatenate([head, base[self.begins[index] + 1 + len(head) : self.ends[index]]]))
        return found

    def knows_nll(self, index: int, result: DocumentResult, nll: np.ndarray) -> bool:
        """Whether `nll` is what made a result, and not what the base model said instead."""
        return result.adapted_tokens == len(self.adapted_nll.get(index, ())) and bool(np.isfinite(nll).all())

    def finish(self, indices: Sequence[int], adapted: Adapted | None = None) -> None:
        """Make the results of documents known: the base model's, joined with what adapting them gave."""
        if not indices:
            return
        # A stop that was asked for waits for this: what is adapted is not to be lost.
        self.base_pass([index for index in indices if index not in self.drafts], self.progress)
        results = {index: self.drafts[index] for index in indices}
        if adapted is not None:
            for row, index in enumerate(indices):
                results[index] = with_adaptation(
                    results[index], adapted, row, lambda start, index=index: self._nats("base", index, start)[0]
                )
        self.journal.add(results, self.spent)
        self.queue.publish(results)
        self.collect()

    def adapt(self, indices: Sequence[int], waiting: Callable[[Taken], HandsOut | None] = lambda taken: None) -> None:
        """Adapt documents, longest first, and finish them: those that `waiting` hands out, or all of them."""
        if not indices:
            return
        left = self._adapt(indices, waiting)
        if left is None:
            return
        # Half the documents side by side: first those that were under way, then those that still wait.
        self.adapt(left)
        if waiting(lambda places: None) is not None:
            self.adapt(indices, waiting)

    def _adapt(self, indices: Sequence[int], waiting: Callable[[Taken], HandsOut | None]) -> list[int] | None:
        """As :meth:`adapt`; where the GPU's memory ran out, the documents that are this process's and not finished."""
        documents, handed = [self.documents[index] for index in indices], set()

        def taken(places: list[int]) -> None:
            claimed.extend(places)
            self.queue.own(indices[place] for place in places)
            self._beat()

        def finished(places: np.ndarray, adapted: Adapted) -> None:
            handed.update(places.tolist())
            self.finish([indices[place] for place in places], adapted)

        hands_out = waiting(taken)
        claimed: list[int] = [] if hands_out else list(range(len(indices)))

        def work(engine: Engine) -> None:
            adapted = engine.adapt(
                documents,
                self.deadline,
                self.should_stop,
                lambda done: self.progress("adapt", self.targets_before + done, self.targets_to_adapt),
                waiting=hands_out,
                finished=finished,
                every=CPU_EVERY if self._is_on_cpu else self.queue.every,
            )
            self._after_adapting(engine, indices, adapted, [place for place in claimed if place not in handed])

        with self.timed("adapt"):
            if self._fits(documents, work):
                return None
        self.targets_before += sum(documents[place].targets for place in handed)
        return [indices[place] for place in claimed if place not in handed]

    def _after_adapting(self, engine: Engine, indices: Sequence[int], adapted: Adapted, rest: list[int]) -> None:
        """Finish the places `rest`, and note what the report and the facts want to know."""
        self.targets_before += sum(self.documents[index].targets for index in indices)
        if rest:
            self.tick()  # what was stopped is lost; what the deadline left out is finished
        self.finish([indices[place] for place in rest], adapted.of(np.array(rest, dtype=np.int64)))
        if self.adapted_nll is not None:
            read = engine.token_nll([self.documents[index] for index in indices], adapted.kept_pass)
            for index, reached, nll in zip(indices, adapted.targets, read, strict=True):
                self.adapted_nll[index] = nll[:reached]
        if self.gains is not None:
            attempt("the gain along the documents", lambda: self._keep_gains(engine, indices, adapted), self.say)
        if self.config.phases:  # one engine for all groups, whose facts of a run are those of the last one
            added = "rounds", "seconds", "handing_over_seconds"
            sums = {name: self.engine_facts.get(name, 0) + engine.facts[name] for name in added}
            self.engine_facts = {**engine.facts, **sums}
            del self.engine_facts["useful_places"]
        elif not self.engine_facts or engine.facts["batch"] < self.engine_facts["batch"]:
            self.engine_facts = engine.facts

    def _fits(self, documents: Sequence[Document], work: Callable[[Engine], None]) -> bool:
        """Do `work` with an engine for these documents; whether the GPU had the memory for it.

        If not, the next engine has half as many places, which changes no score. With phases the shared adapter, which
        goes with its engine, learns again what it had learned.
        """
        batch = self.config.batch
        try:
            engine = self._engine_for(documents)
            batch = engine.facts["batch"]
            work(engine)
            return True
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise
            why = str(error).partition("\n")[0]
        engine = self.engine = None
        self.config = self.config.override({"batch": batch // 2})
        gc.collect()
        torch.cuda.empty_cache()
        self.say(
            f"the GPU's memory ran out with {batch} documents side by side; going on with {batch // 2}, which changes "
            f"no score ({why})"
        )
        learnt, self.learnt = self.learnt, 0
        self.learn_until(learnt)
        return False

    @property
    def _is_on_cpu(self) -> bool:
        return self.weights.device.type == "cpu"

    def _engine_for(self, documents: Sequence[Document]) -> Engine:
        """An engine for these documents; with phases one for all documents, which has the shared adapter."""
        if self.engine is not None:
            return self.engine
        rows, capture = CPU_ROWS if self._is_on_cpu else ROWS, False if self.scorer == UNCAPTURED else None
        held = self.documents if self.config.phases else documents
        config = self.config
        if self._is_on_cpu and torch.get_num_threads() > 1:
            # Several threads share out a product's rows by how many there are: a batch would change the last bits.
            config = config.override({"batch": 1})
        engine = engine_of(self.weights, config, held, rows=rows, capture=capture)
        self.say(memory_of(engine.facts))
        if self.config.phases:
            self.engine = engine
        return engine

    def _keep_gains(self, engine: Engine, indices: Sequence[int], adapted: Adapted) -> None:
        read = engine.token_nll([self.documents[index] for index in indices], adapted.kept_pass)
        for index, reached, nll in zip(indices, adapted.targets, read, strict=True):
            begin = self.begins[index] + 1
            self.gains.add(index, self._nll("base")[0, begin : begin + reached], nll[:reached])
