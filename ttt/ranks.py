"""One scoring run on several GPUs: documents from a shared counter, results through a store, lost ranks replaced.

Every rank is a process of its own and reads all documents. Long ones are handed out longest first, one at a time, by a
counter in a torch.distributed store; a rank holds no more than its share of what is left, so that none ends long after
the others. Short ones go out in blocks once the long ones are gone. Results are published in the store as they come,
base and adapted scores of a document together, and the first rank writes the report.

There are no collectives: between the first rank's word at the start and its stay until the others have left, no rank
waits for a certain other one. A rank counts up its own pulse while it works; a rank with nothing left to do watches the
pulses of those that hold documents without a result, and takes over the documents of one that stood still for
`patience` seconds. A document that two ranks end up scoring gets the same score from both. The deadline is one time for
all; the first rank to see it pass tells the others.

A document's score depends on that document alone, so that it is the same on any number of ranks.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from ..errors import KloraError
from ..model.config import ConfigError
from ..model.gpt import GPT
from ..model.weights import frozen_weights
from .base import BaseNll
from .documents import Document
from .engine import engine_of, memory_of
from .journal import Journal
from .protocols import TTTConfig
from .results import DocumentResult, ScoreResult
from .schedule import Waiting
from .score import UNCAPTURED, Interrupted, unadapted, with_adaptation
from .scorer import Adapted, Deadline

PATIENCE = 60.0
"""Seconds without a pulse after which a rank counts as lost: several times what compiling and capturing take."""

SHORT_BLOCK = 512
"""Short documents that a rank takes at a time."""

PUBLISHED = 256
"""Results in one value of the store: a TCPStore drops whoever sends more than 8 MiB, and a resumed run has many."""

TAKEN_OVER = 64
"""Documents of a lost rank that another takes over at a time, so that several can share them."""

JOIN = timedelta(minutes=30)
"""How long a rank waits for the first one, which may read the journals of an interrupted run."""


class LostStore(KloraError, RuntimeError):
    """The process that keeps the ranks' store, or the first rank, is gone or never came, and what to do."""


class Board:
    """What the ranks of one run tell each other, in a store that all of them reach.

    `clock` is what pulses are timed with; `is_restarted` says that a launcher started the ranks again after a loss.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        is_restarted: bool = False,
    ):
        self.is_restarted = is_restarted
        self.store, self.rank, self.world, self.patience, self.clock = store, rank, world, patience, clock
        self.results: dict[int, DocumentResult] = {}
        self._read = [0] * world
        self._pulses: dict[int, tuple[bytes, float]] = {}
        self._beaten = -float("inf")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def begin(self, said: dict[str, Any] | None = None, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """What the first rank says at the start: it gives `said`, the others wait for it and call `tick` meanwhile."""
        if self.is_first:
            self.store.set("begin", json.dumps(said))
        # The store's own wait would hear no signal.
        until = self.clock() + JOIN.total_seconds()
        while not self.store.check(["begin"]):
            tick()
            if self.clock() >= until:
                raise LostStore(f"the first rank has not begun within {JOIN}; start all ranks at about the same time")
            time.sleep(0.05)
        return json.loads(self.store.get("begin"))

    def claim(self, queue: str, count: int = 1) -> range:
        """The next `count` numbers of `queue`, which nobody else gets."""
        stop = self.store.add(f"next/{queue}", count)
        return range(stop - count, stop)

    def own(self, indices: Iterable[int]) -> None:
        """Note that this rank has these documents."""
        for index in indices:
            self.store.set(f"owner/{index}", str(self.rank))

    def take_over(self, index: int, owner: int | None) -> bool:
        """Whether document `index` of the lost rank `owner`, or of none that is known, is this rank's now."""
        key, own = f"owner/{index}", str(self.rank)
        is_taken = self.store.compare_set(key, "" if owner is None else str(owner), own).decode() == own
        if is_taken and owner is not None:
            self.store.set(f"lost/{owner}", "")
        return is_taken

    def lost(self) -> list[int]:
        """The ranks from which any rank took documents over."""
        return [rank for rank in range(self.world) if self.store.check([f"lost/{rank}"])]

    def owner(self, index: int) -> int | None:
        """The rank that has document `index`; None while nobody took it."""
        key = f"owner/{index}"
        return int(self.store.get(key)) if self.store.check([key]) else None

    def publish(self, results: dict[int, DocumentResult]) -> None:
        """Tell all ranks the results of documents."""
        self.results |= results
        items = list(results.items())
        for begin in range(0, len(items), PUBLISHED):
            text = json.dumps({index: asdict(result) for index, result in items[begin : begin + PUBLISHED]})
            self.store.set(f"results/{self.rank}/{self._read[self.rank]}", text)
            self._read[self.rank] = self.store.add(f"batches/{self.rank}", 1)

    def collect(self) -> None:
        """Bring `results` up to what all ranks have published."""
        for rank in range(self.world):
            published = self.store.add(f"batches/{rank}", 0)
            for number in range(self._read[rank], published):
                found = json.loads(self.store.get(f"results/{rank}/{number}"))
                self.results |= {int(index): DocumentResult(**result) for index, result in found.items()}
            self._read[rank] = published

    def beat(self) -> None:
        """Show that this rank is alive, at most once a second."""
        if self.clock() - self._beaten >= 1.0:
            self._beaten = self.clock()
            self.store.add(f"pulse/{self.rank}", 1)

    def is_lost(self, rank: int) -> bool:
        """Whether that rank's pulse has stood still for `patience` seconds while this rank watched."""
        pulse = self.store.add(f"pulse/{rank}", 0)
        seen, since = self._pulses.get(rank, (None, 0.0))
        if pulse != seen:
            self._pulses[rank] = pulse, self.clock()
            return False
        return rank != self.rank and self.clock() - since >= self.patience

    def leave(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Say that this rank is done.

        The first rank, which may keep the store, stays until all have or are lost, or until it shall stop.
        """
        self.store.set(f"left/{self.rank}", "")
        staying = set(range(self.world)) - set(self.lost()) if self.is_first else set()
        while staying and not should_stop():
            staying = {rank for rank in staying if not self.store.check([f"left/{rank}"]) and not self.is_lost(rank)}
            time.sleep(0.02)

    def worked(self, seconds: float) -> None:
        """Note that this rank has run out of work of its own after `seconds`."""
        self.store.set(f"worked/{self.rank}", str(seconds))

    def seconds_of_ranks(self) -> list[float | None]:
        """What each rank noted by `worked`; None for one that never did."""
        keys = [f"worked/{rank}" for rank in range(self.world)]
        return [float(self.store.get(key)) if self.store.check([key]) else None for key in keys]

    def pass_deadline(self) -> None:
        self.store.set("deadline", "passed")

    def deadline_passed(self) -> bool:
        return self.store.check(["deadline"])


class SharedDeadline(Deadline):
    """A deadline at the wall-clock time `end` for all ranks: it has passed for all once one rank saw it pass."""

    def __init__(self, board: Board, end: float | None):
        self.board, self.end, self._passed = board, end, False

    def passed(self) -> bool:
        if not self._passed and self.end is not None:
            if time.time() >= self.end:
                self.board.pass_deadline()
            self._passed = self.board.deadline_passed()
        return self._passed


class SharedWaiting(Waiting):
    """The documents that wait for a slot on any rank. `taken` gets the places this rank was given."""

    def __init__(self, visits: np.ndarray, board: Board, taken: Callable[[list[int]], None]):
        super().__init__(visits)
        self.board, self._taken = board, taken

    def take(self, free: int, held: int) -> np.ndarray:
        taken: list[int] = []
        while len(taken) < free and self.next < len(self.visits):
            # A share of what nobody has yet is enough to hold, or one document.
            if held and held * self.board.world >= self._rest[self.next].sum():
                break
            place = self.board.claim("long").start
            self.next = min(place + 1, len(self.visits))
            if place < len(self.visits):
                taken.append(place)
                held += int(self.visits[place].sum())
        self._taken(taken)
        return np.array(taken, dtype=np.int64)

    @property
    def left(self) -> np.ndarray:
        return self._rest[self.next] // self.board.world


def board_of_torchrun(patience: float = PATIENCE) -> Board:
    """The board of the processes that torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, put side by side."""
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=JOIN))
    except (ValueError, dist.DistError) as error:
        raise ConfigError(f"RANK and WORLD_SIZE are set, but the ranks cannot meet: {error}") from None
    # A restarted run starts from its journals, not from what its predecessor left in the launcher's store.
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return Board(dist.PrefixStore(f"klora/score/{attempt}", store), rank, world, patience, is_restarted=attempt > 0)


class RankRun:
    """What one rank does in :func:`score_on_ranks`. `order` lists the documents to score, longest first."""

    def __init__(
        self,
        model: GPT,
        documents: Sequence[Document],
        order: Sequence[int],
        config: TTTConfig,
        journal: Journal,
        board: Board,
        prequant: GPT | None,
        should_stop: Callable[[], bool],
        progress: Callable[[str, int, int], None],
        say: Callable[[str], None],
    ):
        self.model, self.weights, self.documents, self.config = model, frozen_weights(model), documents, config
        self.prequant = frozen_weights(prequant) if prequant is not None else None
        self.journal, self.board, self.should_stop, self.progress, self.say = journal, board, should_stop, progress, say
        self.long = [index for index in order if config.adapts(documents[index].targets)]
        self.short = [index for index in order if not config.adapts(documents[index].targets)]
        self.total = sum(document.targets for document in documents)

    def _beat(self, targets: int) -> None:
        self.board.beat()

    def tick(self) -> None:
        """Between any two pieces of work: a pulse, and an end where one was asked for."""
        self.board.beat()
        if self.should_stop():
            raise Interrupted(len(self.board.results), len(self.documents))

    def collect(self) -> None:
        """Learn what all ranks have published, and show how far they are."""
        self.board.collect()
        self.progress("score", sum(result.tokens for result in self.board.results.values()), self.total)

    def publish(self, indices: Sequence[int], adapted: Adapted | None) -> None:
        """Score documents with the base model, join what adapting them gave, and make it known."""
        if not len(indices):
            return
        documents = [self.documents[index] for index in indices]
        # A stop that was asked for waits for this: what is adapted is not to be lost.
        base = BaseNll(self.weights, documents, self.config, self._beat)
        before = BaseNll(self.prequant, documents, self.config, self._beat) if self.prequant is not None else None
        results = {}
        for row, index in enumerate(indices):
            draft = unadapted(documents[row], row, base, before)
            results[index] = draft if adapted is None else with_adaptation(draft, adapted, row, base, row)
        self.journal.add(results)
        self.board.publish(results)
        self.collect()

    def adapt(self, indices: Sequence[int], deadline: Deadline, scorer: str, shared: bool) -> dict[str, Any]:
        """Adapt documents with an engine, whose facts this returns: those that nobody else takes, or all of them."""
        if not indices:
            return {}
        documents, claimed, handed = [self.documents[index] for index in indices], [], set()
        engine = engine_of(self.model, self.config, documents, capture=False if scorer == UNCAPTURED else None)
        self.say(memory_of(engine.facts))

        def taken(places: list[int]) -> None:
            claimed.extend(places)
            self.board.own(indices[place] for place in places)
            self.board.beat()

        def finished(places: np.ndarray, adapted: Adapted) -> None:
            handed.update(places.tolist())
            self.publish([indices[place] for place in places], adapted)

        adapted = engine.adapt(
            documents,
            deadline,
            self.should_stop,
            self._beat,
            waiting=(lambda visits: SharedWaiting(visits, self.board, taken)) if shared else None,
            finished=finished,
            every=15.0,
        )
        self.tick()
        rest = [place for place in (claimed if shared else range(len(indices))) if place not in handed]
        self.publish([indices[place] for place in rest], adapted.of(np.array(rest, dtype=np.int64)))
        return engine.facts

    def drain(self, queue: str, indices: Sequence[int]) -> None:
        """Score what is left of a queue with the base model, block by block."""
        while (block := self.board.claim(queue, SHORT_BLOCK)).start < len(indices):
            some = [indices[place] for place in block if place < len(indices)]
            self.board.own(some)
            self.publish(some, None)

    def all(self, deadline: Deadline, scorer: str) -> dict[str, Any]:
        """Everything that this rank does, until every document has a result; facts of the run."""
        began = time.perf_counter()
        self.tick()
        engine = self.adapt(self.long, deadline, scorer, shared=True)
        self.drain("long", self.long)
        self.drain("short", self.short)
        self.board.worked(time.perf_counter() - began)
        self.replace_lost([*self.long, *self.short], deadline, scorer)
        lost, seconds = self.board.lost(), self.board.seconds_of_ranks()
        self.board.leave(self.should_stop)
        if self.board.is_first:  # whose store is there until it goes; others may note their seconds late
            seconds = self.board.seconds_of_ranks()
        return {"ranks": self.board.world, "lost_ranks": lost, "rank_seconds": seconds, "engine": engine}

    def replace_lost(self, everything: Sequence[int], deadline: Deadline, scorer: str) -> None:
        """Take over what lost ranks have left; return once every document has a result."""
        long, ownerless_since = set(self.long), None
        while True:
            self.tick()
            self.collect()
            missing = [index for index in everything if index not in self.board.results]
            if not missing:
                return
            lost: set[int | None] = {rank for rank in range(self.board.world) if self.board.is_lost(rank)}
            owners = {index: self.board.owner(index) for index in missing}
            # Whoever claimed a document and died before it could say so left no owner.
            if None not in owners.values():
                ownerless_since = None
            elif ownerless_since is None:
                ownerless_since = self.board.clock()
            elif self.board.clock() - ownerless_since >= self.board.patience:
                lost.add(None)
            taken: list[int] = []
            for index, owner in owners.items():
                if owner in lost and len(taken) < TAKEN_OVER and self.board.take_over(index, owner):
                    taken.append(index)
            if not taken:
                time.sleep(0.05)
            elif deadline.passed():
                self.publish(taken, None)
            else:
                self.adapt([index for index in taken if index in long], deadline, scorer, shared=False)
                self.publish([index for index in taken if index not in long], None)


def score_on_ranks(
    model: GPT,
    documents: Sequence[Document],
    config: TTTConfig,
    journal: Journal,
    board: Board,
    prequant: GPT | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    facts: dict[str, Any] | None = None,
    scorer: str = UNCAPTURED,
    say: Callable[[str], None] = lambda text: None,
) -> ScoreResult:
    """Score `documents` together with the other ranks of `board`; every rank that is not lost gets the whole result.

    As :func:`score_documents`, by the engine. Each rank has a journal of its own; the first rank's may
    hold results of an interrupted run, which nobody computes again. Raises Interrupted when `should_stop` says so.
    """
    started = time.perf_counter()

    def seconds() -> dict[str, float]:
        return {**journal.seconds, "score": journal.seconds.get("score", 0.0) + time.perf_counter() - started}

    def tick() -> None:
        if should_stop():
            raise Interrupted(len(board.results), len(documents))

    try:
        end = time.time() + config.deadline - sum(journal.seconds.values()) if config.deadline else None
        if board.is_first:
            board.publish(dict(journal.done))
        begun = board.begin({"end": end, "done": sorted(journal.done)} if board.is_first else None, tick)
        left = set(range(len(documents))) - set(begun["done"])
        order = sorted(left, key=lambda index: (-documents[index].targets, index))
        model.requires_grad_(False)
        run = RankRun(model, documents, order, config, journal, board, prequant, should_stop, progress, say)
        found = run.all(SharedDeadline(board, begun["end"]), scorer)
    except Interrupted:
        journal.add_seconds(seconds())
        raise
    except dist.DistError as error:
        journal.add_seconds(seconds())
        if should_stop():  # as all ranks were asked to, and the one that keeps the store was the first to go
            raise Interrupted(len(board.results), len(documents)) from None
        raise LostStore(
            f"the process that keeps the ranks' store, the first rank or its launcher, is gone ({error}); what is "
            "scored is kept: the same command with --resume goes on from there"
        ) from None
    results = [board.results[index] for index in range(len(documents))]
    return ScoreResult(results, config, seconds(), (facts or {}) | {"scorer": scorer} | found)
