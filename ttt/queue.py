"""What the processes of one scoring run share: documents handed out once each, results, and one deadline.

:class:`DocumentQueue` is that of one process, a world of one: all documents are its own from the start.

:class:`StoreQueue` is that of several ranks, each a process that reads all documents. Long ones are handed out longest
first, one at a time, by a counter in a torch.distributed store; a rank holds no more than its share of what is left, so
that none ends long after the others. Short ones go out in blocks once the long ones are gone. Results are published in
the store as they come, base and adapted scores of a document together, and the first rank writes the report.

There are no collectives: between the first rank's word at the start and its stay until the others have left, no rank
waits for a certain other one. A rank counts up its own pulse while it works; a rank with nothing left to do watches the
pulses of those that hold documents without a result, and takes over the documents of one that stood still for
`patience` seconds. A document that two ranks end up scoring gets the same score from both. The deadline is one time for
all: each rank counts the seconds that the first one gave it on a clock of its own that nobody sets, and the first rank
to see it pass tells the others. A store that gives no answer for `patience` seconds counts as gone, and so does a first
rank that was lost: it alone writes the results, and what is scored is kept.

A document's score depends on that document alone, and with phases on the earlier groups, of which every rank learns the
same before it takes documents of the next one. So it is the same on any number of ranks.
"""

import json
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist

from ..errors import KloraError
from ..model.config import ConfigError
from ..model.parallel import is_one_of_many
from .results import DocumentResult, NonFiniteScore
from .schedule import Waiting

PATIENCE = 60.0
"""Seconds without a pulse after which a rank counts as lost: several times what compiling and capturing take."""

PUBLISHED = 256
"""Results in one value of the store: a TCPStore drops whoever sends more than 8 MiB, and a resumed run has many."""

Taken = Callable[[list[int]], None]
"""Hears the places, of documents longest first, that were handed to this process."""

HandsOut = Callable[[np.ndarray], Waiting]
"""Makes, from the visits of the documents longest first, what hands out some of them: `waiting` of Engine.adapt."""

TAKEN_OVER = 64
"""Documents of a lost rank that another takes over at a time, so that several can share them."""

JOIN = timedelta(minutes=30)
"""How long a rank waits for the first one, which may read the journals of an interrupted run."""

GONE = (
    "the process that keeps the ranks' store, the first rank or its launcher, is gone ({}); what is scored is kept: "
    "the same command with --resume goes on from there"
)


NO_ANSWER = "it has not answered for {:g} s"

LOST_FIRST = (
    "all documents are scored, but the first rank, which writes the results, is lost; what is scored is kept: the same "
    "command with --resume writes them"
)


class LostStore(KloraError, RuntimeError):
    """The process that keeps the ranks' store, or the first rank, is gone or never came, and what to do."""


class Deadline:
    """`seconds` from now, of which `spent` are gone already; 0 seconds never pass."""

    def __init__(self, seconds: float, spent: float = 0.0):
        self.end = time.perf_counter() + seconds - spent if seconds else float("inf")

    def passed(self) -> bool:
        return time.perf_counter() >= self.end


class DocumentQueue:
    """The queue of one process. Documents are named by their index in the request.

    `results` are those that are known here, of all processes. `is_shared`: documents are claimed, not owned from the
    start. `is_restarted`: a launcher started the processes again after a loss.
    """

    rank, world = 0, 1
    is_shared = is_restarted = False
    every = 30.0
    """Seconds after which documents that are through are handed over: what a kill can cost."""

    def __init__(self):
        self.results: dict[int, DocumentResult] = {}

    @property
    def is_first(self) -> bool:
        """Whether this process says what the run is, and writes its report."""
        return self.rank == 0

    def begin(
        self, done: dict[int, DocumentResult], seconds: float, spent: float, tick: Callable[[], None]
    ) -> tuple[set[int], Deadline]:
        """The documents that are done, and the deadline in `seconds` of which `spent` are gone, as the first rank says.

        The others wait for it and call `tick` meanwhile.
        """
        self.publish(done)
        return set(done), Deadline(seconds, spent)

    def waiting(self, taken: Taken, name: str = "long") -> HandsOut | None:
        """What hands the documents of the list `name` to an engine; None: all of them are this process's."""
        return None

    def claim(self, name: str, count: int = 1) -> range:
        """The next `count` numbers of the list `name`, which nobody else gets; none where all are owned anyhow."""
        return range(0)

    def own(self, indices: Iterable[int]) -> None:
        """Note that this process has these documents."""

    def take_over(self, missing: Sequence[int]) -> list[int]:
        """Those of the `missing` documents that lost processes had and that are this one's from now on."""
        return []

    def publish(self, results: dict[int, DocumentResult]) -> None:
        """Tell all processes the results of documents."""
        self.results |= results

    def collect(self) -> None:
        """Bring `results` up to what all processes have published."""

    def beat(self) -> None:
        """Show that this process is alive."""

    def fail(self, why: str) -> None:
        """Tell all processes what ends the run for every one of them."""

    def worked(self, seconds: float) -> None:
        """Note that this process has run out of work of its own after `seconds`."""

    def leave(self, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Say that this process is done; facts of the processes."""
        return {}


class StoreQueue(DocumentQueue):
    """The queue of several ranks, in a store that all of them reach. `clock` is what pulses are timed with.

    LostStore: the store has not answered for `patience` seconds, or the first rank is lost.
    """

    is_shared, every = True, 15.0

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        is_restarted: bool = False,
    ):
        super().__init__()
        self.is_restarted = is_restarted
        self.store, self.rank, self.world, self.patience, self.clock = (
            _Store(store, patience),
            rank,
            world,
            patience,
            clock,
        )
        self._read = [0] * world
        self._pulses: dict[int, tuple[bytes, float]] = {}
        self._beaten = -float("inf")
        self._ownerless_since: float | None = None

    def begin(
        self,
        done: dict[int, DocumentResult],
        seconds: float = 0.0,
        spent: float = 0.0,
        tick: Callable[[], None] = lambda: None,
    ) -> tuple[set[int], Deadline]:
        if self.is_first:
            self.publish(done)
            left = seconds - spent if seconds else None
            self.store.set("begin", json.dumps({"left": left, "done": sorted(done)}))
        # The store's own wait would hear no signal.
        until = self.clock() + JOIN.total_seconds()
        while not self.store.check(["begin"]):
            tick()
            if self.clock() >= until:
                raise LostStore(f"the first rank has not begun within {JOIN}; start all ranks at about the same time")
            time.sleep(0.05)
        said = json.loads(self.store.get("begin"))
        return set(said["done"]), SharedDeadline(self, said["left"])

    def waiting(self, taken: Taken, name: str = "long") -> HandsOut:
        return lambda visits: SharedWaiting(visits, self, taken, name)

    def claim(self, name: str, count: int = 1) -> range:
        stop = self.store.add(f"next/{name}", count)
        return range(stop - count, stop)

    def own(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.store.set(f"owner/{index}", str(self.rank))

    def owner(self, index: int) -> int | None:
        """The rank that has document `index`; None while nobody took it."""
        key = f"owner/{index}"
        return int(self.store.get(key)) if self.store.check([key]) else None

    def take_over(self, missing: Sequence[int]) -> list[int]:
        lost: set[int | None] = {rank for rank in range(self.world) if self.is_lost(rank)}
        owners = {index: self.owner(index) for index in missing}
        # Whoever claimed a document and died before it could say so left no owner.
        if None not in owners.values():
            self._ownerless_since = None
        elif self._ownerless_since is None:
            self._ownerless_since = self.clock()
        elif self.clock() - self._ownerless_since >= self.patience:
            lost.add(None)
        taken: list[int] = []
        for index, owner in owners.items():
            if owner in lost and len(taken) < TAKEN_OVER and self._take_from(owner, index):
                taken.append(index)
        return taken

    def _take_from(self, owner: int | None, index: int) -> bool:
        """Whether document `index` of the lost rank `owner`, or of none that is known, is this rank's now."""
        own = str(self.rank)
        before = "" if owner is None else str(owner)
        is_taken = self.store.compare_set(f"owner/{index}", before, own).decode() == own
        if is_taken and owner is not None:
            self.store.set(f"lost/{owner}", "")
        return is_taken

    def lost(self) -> list[int]:
        """The ranks from which any rank took documents over."""
        return [rank for rank in range(self.world) if self.store.check([f"lost/{rank}"])]

    def publish(self, results: dict[int, DocumentResult]) -> None:
        super().publish(results)
        items = list(results.items())
        for begin in range(0, len(items), PUBLISHED):
            text = json.dumps({index: asdict(result) for index, result in items[begin : begin + PUBLISHED]})
            self.store.set(f"results/{self.rank}/{self._read[self.rank]}", text)
            self._read[self.rank] = self.store.add(f"batches/{self.rank}", 1)

    def collect(self) -> None:
        if self.store.check(["failed"]):
            raise NonFiniteScore(self.store.get("failed").decode())
        for rank in range(self.world):
            published = self.store.add(f"batches/{rank}", 0)
            for number in range(self._read[rank], published):
                found = json.loads(self.store.get(f"results/{rank}/{number}"))
                self.results |= {int(index): DocumentResult(**result) for index, result in found.items()}
            self._read[rank] = published

    def beat(self) -> None:
        """Count up this rank's pulse, at most once a second."""
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

    def fail(self, why: str) -> None:
        self.store.set("failed", why)

    def worked(self, seconds: float) -> None:
        self.store.set(f"worked/{self.rank}", str(seconds))

    def seconds_of_ranks(self) -> list[float | None]:
        """What each rank noted by `worked`; None for one that never did."""
        keys = [f"worked/{rank}" for rank in range(self.world)]
        return [float(self.store.get(key)) if self.store.check([key]) else None for key in keys]

    def leave(self, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """The first rank, which may keep the store, stays until all have left or are lost, or until it shall stop.

        LostStore for the others where it was lost.
        """
        lost, seconds = self.lost(), self.seconds_of_ranks()
        self.store.set(f"left/{self.rank}", "")
        if 0 in lost and not self.is_first:
            raise LostStore(LOST_FIRST)
        staying = set(range(self.world)) - set(self.lost()) if self.is_first else set()
        while staying and not should_stop():
            staying = {rank for rank in staying if not self.store.check([f"left/{rank}"]) and not self.is_lost(rank)}
            time.sleep(0.02)
        if self.is_first:  # whose store is there until it goes; others may note their seconds late
            seconds = self.seconds_of_ranks()
        return {"ranks": self.world, "lost_ranks": lost, "rank_seconds": seconds}

    def pass_deadline(self) -> None:
        """Tell all ranks that the deadline has passed."""
        self.store.set("deadline", "passed")

    def deadline_passed(self) -> bool:
        """Whether any rank saw the deadline pass."""
        return self.store.check(["deadline"])


class _Store:
    """A store whose errors are LostStore, and so is an answer that does not come within `patience` seconds.

    A process that is stopped keeps its connections open: a call waits for ever, in a library that no signal reaches.
    Therefore a thread makes the calls. It is left behind where it waits.
    """

    def __init__(self, store: dist.Store, patience: float):
        self._patience, self._is_gone = patience, False
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(store, self._asked, self._answers), daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._answered, name)

    def _answered(self, name: str, *arguments: Any) -> Any:
        try:
            if self._is_gone:  # a late answer would be taken for that of another call
                raise queue.Empty
            self._asked.put((name, arguments))
            answer, error = self._answers.get(timeout=self._patience)
        except queue.Empty:
            self._is_gone = True
            raise LostStore(GONE.format(NO_ANSWER.format(self._patience))) from None
        if isinstance(error, dist.DistError):
            raise LostStore(GONE.format(error)) from None
        if error is not None:
            raise error
        return answer


def _serve(store: dist.Store, asked: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Make the calls that are asked for, until None is."""
    while (call := asked.get()) is not None:
        name, arguments = call
        try:
            answers.put((getattr(store, name)(*arguments), None))
        except Exception as error:
            answers.put((None, error))


class SharedDeadline(Deadline):
    """A deadline for all ranks, in `left` seconds or never: it has passed for all once one rank saw it pass."""

    def __init__(self, queue: StoreQueue, left: float | None):
        self.queue, self._passed = queue, False
        self.end = None if left is None else time.perf_counter() + left

    def passed(self) -> bool:
        if not self._passed and self.end is not None:
            if time.perf_counter() >= self.end:
                self.queue.pass_deadline()
            self._passed = self.queue.deadline_passed()
        return self._passed


class SharedWaiting(Waiting):
    """The documents of the list `name` that wait for a slot on any rank. `taken` gets the places this rank got."""

    def __init__(self, visits: np.ndarray, queue: StoreQueue, taken: Taken, name: str = "long"):
        super().__init__(visits)
        self.queue, self._taken, self._name = queue, taken, name

    def take(self, free: int, held: int) -> np.ndarray:
        taken: list[int] = []
        while len(taken) < free and self.next < len(self.visits):
            # A share of what nobody has yet is enough to hold, or one document.
            if held and held * self.queue.world >= self._rest[self.next].sum():
                break
            place = self.queue.claim(self._name).start
            self.next = min(place + 1, len(self.visits))
            if place < len(self.visits):
                taken.append(place)
                held += int(self.visits[place].sum())
        self._taken(taken)
        return np.array(taken, dtype=np.int64)

    @property
    def left(self) -> np.ndarray:
        return self._rest[self.next] // self.queue.world


def queue_of_processes(patience: float = PATIENCE) -> DocumentQueue:
    """The queue of the processes that torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, put side by side.

    One process gets a queue of its own. ConfigError: the processes cannot meet.
    """
    if not is_one_of_many():
        return DocumentQueue()
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=JOIN))
    except (ValueError, dist.DistError) as error:
        raise ConfigError(f"RANK and WORLD_SIZE are set, but the ranks cannot meet: {error}") from None
    # A restarted run starts from its journals, not from what its predecessor left in the launcher's store.
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    store = dist.PrefixStore(f"klora/score/{attempt}", store)
    return StoreQueue(store, rank, world, patience, is_restarted=attempt > 0)
