"""Scoring documents from end to end: base pass, adaptation, deadline, journal, results.

One process and the ranks of torchrun take the same way; what they share is a queue. Every finished document goes into a
journal at once, and what the base model has said so far with it, so that an interrupted run can go on where it stopped.
The deadline is checked before every adaptation step; what it leaves out keeps the base model's score and says so.

This file has the order of a run. The base model's scores are drafts (drafts.py), joined with what an engine gives
(engines.py); each joined result goes to the journal and to the queue. The clock and the stop are in progress.py.

Documents are named by their index in the request. Outside the engine there is no other number for them.

With phases the groups of documents follow one another. Every process learns from all earlier groups before it adapts a
document of the next, which waits until all processes are through with the one before. What is learned depends on the
documents alone: a run that goes on learns it again.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..model.config import ConfigError
from ..model.gpt import GPT
from ..model.storage import attempt
from ..model.weights import Weights, frozen_weights
from .claims import Taken, dealt
from .documents import Document
from .drafts import Drafts
from .engine import Engine
from .engines import Engines, pick_scorer
from .hf_model import HfModel
from .journal import Journal, JournalError, NoJournal
from .phases import groups_of
from .progress import Interrupted, ScoringProgress
from .protocols import TTTConfig
from .queue import DocumentQueue, HandsOut
from .results import Adapted, DocumentResult, NonFiniteScore, ScoreResult, is_short, with_adaptation
from .store import LostStore
from .token_gains import TokenGains

RESCORED = 1e-5
"""Relative difference up to which a document that is scored again has the NLL that its journal kept."""

CPU_EVERY = 1.0
"""Seconds after which documents that are through are handed over on a CPU, where there is no device to wait for."""

BLOCK = 512
"""Documents that a rank takes at a time where nothing is adapted."""


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, and how. Both models are frozen by it.

    model, documents, config: the model, and its test-time training on each of the documents.
    journal: keeps what is finished; documents that it holds are not scored again. None: nothing is kept.
    prequant: the model before quantisation, scored beside the base model on the same windows.
    queue: what the processes of this run share. None: there is this one alone.
    scorer: auto, engine or uncaptured, as SCORERS in engines.py describes them.
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
        with run.progress.timed("score") if run.queue.is_shared else nullcontext():
            facts = run.everything()
    except (Interrupted, LostStore) as ended:
        run.journal.add_seconds(run.progress.spent)
        # All ranks were asked to stop, and the one that keeps the store was the first to go.
        if isinstance(ended, LostStore) and request.should_stop():
            raise run.progress.interrupted() from None
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
    return ScoreResult(results, request.config, run.progress.seconds, facts, run.gains, hashes, nll)


def _scored_again(
    request: ScoreRequest, results: Sequence[DocumentResult], indices: Sequence[int]
) -> dict[int, np.ndarray]:
    """The NLL of every target of documents of which only the sum is known: from the journal of an interrupted run."""
    if not indices:
        return {}
    among = range(len(results)) if request.config.phases else indices
    documents, config = [request.documents[index] for index in among], request.config.override({"deadline": 0.0})
    try:
        again = score(replace(request, documents=documents, config=config, journal=None, prequant=None, queue=None))
    except Interrupted:
        lost = (
            f", but {len(documents)} that an earlier run scored were being scored again for the NLL of every target, "
            "of which nothing is kept (without --nll the results can be written at once)"
        )
        raise Interrupted(len(results), len(results), lost) from None
    found = dict(zip(among, zip(again.documents, again.nll, strict=True), strict=True))
    for index in indices:
        kept, new = results[index].adapted_nats, found[index][0].adapted_nats
        if not _agree(kept, new):
            raise JournalError(
                f"the journal says that {results[index].name!r} has {kept} nats, and scoring it again gives {new}; "
                "give --overwrite to start afresh"
            )
    return {index: found[index][1] for index in indices}


def _agree(kept: float, new: float) -> bool:
    """Whether nats that were kept are those that are known now, but for the order of their sum."""
    return abs(kept - new) <= RESCORED * max(abs(new), 1.0)


def _frozen(request: ScoreRequest) -> dict[str, Weights | HfModel]:
    """The unadapted models by phase: what passes and engines read, made once."""
    models = {"base": request.model, "prequant": request.prequant}
    return {
        phase: model if isinstance(model, HfModel) else frozen_weights(model)
        for phase, model in models.items()
        if model is not None
    }


class _Run:
    """What one process does of a request, in its order."""

    def __init__(self, request: ScoreRequest, queue: DocumentQueue, journal: Journal, scorer: str):
        self.documents, self.config = request.documents, request.config
        self.should_stop, self.say = request.should_stop, request.say
        self.queue, self.journal = queue, journal
        self.progress = ScoringProgress(self.documents, queue, journal, request.should_stop, request.progress)
        self.groups = groups_of(self.documents, self.config.phases)
        self.group_of = {index: number for number, group in enumerate(self.groups) for index in group}
        frozen = _frozen(request)
        self.engines = Engines(scorer, frozen["base"], self.config, self.documents, self.say)
        self.drafts = Drafts(
            frozen,
            self.documents,
            self.config,
            self.group_of,
            journal,
            self.progress,
            keeps=not queue.is_shared,
            say=self.say,
        )
        self.gains = None if queue.is_shared else TokenGains(self.documents, self.config)
        self.adapted_nll: dict[int, np.ndarray] | None = dict(journal.nll) if request.keeps_nll else None
        self.targets_before = self.targets_to_adapt = 0

    def everything(self) -> dict[str, Any]:
        """Work until every document has a result; facts of the run."""
        began = time.perf_counter()
        spent = sum(self.progress.seconds.values())
        done, self.deadline = self.queue.begin(
            self.journal.done, self.config.deadline, spent, self.progress.tick, self.journal.of_run
        )
        left = (index for index in range(len(self.documents)) if index not in done)
        order = sorted(left, key=lambda index: -self.documents[index].targets)
        self.progress.tick()
        if not self.queue.is_shared:
            self.drafts.make(order, self.progress.show_and_tick)
            self.drafts.models.pop("prequant", None)  # the engine may have its memory
        self.targets_to_adapt = sum(self.documents[index].targets for index in order if not self._is_short(index))
        for number in range(len(self.groups)):
            self.score_group(number, [index for index in order if self.group_of[index] == number], began)
        return {"engine": self.engines.facts} | self._facts_of_phases() | self.queue.leave(self.should_stop)

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
        self.progress.tick()
        claimable = [long[place] for place in order_of_claims]
        for name, indices in ((f"long{suffix}", claimable), (f"short{suffix}", short)):
            while numbers := [number for number in self.queue.claim(name, BLOCK) if number < len(indices)]:
                claimed = [indices[number] for number in numbers]
                self.queue.own(claimed)
                self.finish(claimed)
                self.progress.tick()
        self.queue.worked(time.perf_counter() - began)
        while missing := self._missing(order):
            self.progress.tick()
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

        while self.engines.learnt < group and not self.deadline.passed():
            documents = [self.documents[index] for index in self.groups[self.engines.learnt]]
            total = sum(document.targets for document in documents)
            with self.progress.timed("learn"):
                learned = False

                def learn(engine: Engine, documents: Sequence[Document] = documents, total: int = total) -> None:
                    nonlocal learned
                    learned = engine.learn(documents, ends, lambda done: self.progress.show("learn", done, total))

                if not self.engines.fits(documents, learn):
                    continue  # with an engine that has learned nothing yet
                if learned:
                    self.engines.learnt += 1
                elif not self.deadline.passed():
                    raise self.progress.interrupted()  # with half a phase in the shared adapter

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
        self.progress.collect()
        return [index for index in order if index not in self.queue.results]

    def target_nll(self) -> list[np.ndarray]:
        """The NLL [targets] of every document that this process scored: the adapted model's, then the base model's."""
        found = []
        for index in range(len(self.documents)):
            base = self.drafts.target_nll(index)
            head = self.adapted_nll.get(index, base[:0])
            found.append(np.concatenate([head, base[len(head) :]]))
        return found

    def knows_nll(self, index: int, result: DocumentResult, nll: np.ndarray) -> bool:
        """Whether `nll` is what made a result: not what the base model said instead, nor a journal's of another sum."""
        if result.adapted_tokens != len(self.adapted_nll.get(index, ())) or not np.isfinite(nll).all():
            return False
        return index not in self.journal.nll or _agree(float(nll.sum(dtype=np.float64)), result.adapted_nats)

    def finish(self, indices: Sequence[int], adapted: Adapted | None = None) -> None:
        """Make the results of documents known: the base model's, joined with what adapting them gave."""
        if not indices:
            return
        # A stop that was asked for waits for this: what is adapted is not to be lost.
        drafts = self.drafts.results
        self.drafts.make([index for index in indices if index not in drafts], self.progress.show)
        results = {index: drafts[index] for index in indices}
        nll: dict[int, np.ndarray] = {}
        if adapted is not None:
            for row, index in enumerate(indices):
                results[index] = with_adaptation(
                    results[index], adapted, row, lambda start, index=index: self.drafts.nats("base", index, start)[0]
                )
        if adapted is not None and self.adapted_nll is not None:
            nll = dict(zip(indices, adapted.nll, strict=True))
            self.adapted_nll |= nll
        self.journal.add(results, self.progress.spent, nll)
        self.queue.publish(results)
        self.progress.collect()

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
            self.progress.beat()

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
                lambda done: self.progress.show("adapt", self.targets_before + done, self.targets_to_adapt),
                waiting=hands_out,
                finished=finished,
                every=CPU_EVERY if self.engines.is_on_cpu else self.queue.every,
            )
            self._after_adapting(engine, indices, adapted, [place for place in claimed if place not in handed])

        learnt = self.engines.learnt
        with self.progress.timed("adapt"):
            if self.engines.fits(documents, work):
                return None
            self.learn_until(learnt)
        self.targets_before += sum(documents[place].targets for place in handed)
        return [indices[place] for place in claimed if place not in handed]

    def _after_adapting(self, engine: Engine, indices: Sequence[int], adapted: Adapted, rest: list[int]) -> None:
        """Finish the places `rest`, and note what the report and the facts want to know."""
        self.targets_before += sum(self.documents[index].targets for index in indices)
        if rest:
            self.progress.tick()  # what was stopped is lost; what the deadline left out is finished
        self.finish([indices[place] for place in rest], adapted.of(np.array(rest, dtype=np.int64)))
        if self.gains is not None:
            attempt("the gain along the documents", lambda: self._keep_gains(indices, adapted), self.say)
        self.engines.note(engine)

    def _keep_gains(self, indices: Sequence[int], adapted: Adapted) -> None:
        for index, nll in zip(indices, adapted.nll, strict=True):
            self.gains.add(index, self.drafts.target_nll(index)[: len(nll)], nll)
