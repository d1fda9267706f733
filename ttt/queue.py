"""What the processes of one scoring run share: documents handed out once each, results, and one deadline.

:class:`DocumentQueue` is that of one process, a world of one: all documents are its own from the start.

:class:`StoreQueue` is that of several ranks, each a process that reads all documents. Long ones are handed out first,
one at a time, by a counter in a torch.distributed store; a rank holds no more than its share of what is left, so that
none ends long after the others, and the longest are dealt out among them. Short ones go out in blocks once the long
ones are gone. Results are published in the store as they come, base and adapted scores of a document together, and the
first rank writes the report.

There are no collectives: between the first rank's word at the start and its stay until the others have left, no rank
waits for a certain other one. A rank counts up its own pulse while it works; a rank with nothing left to do watches the
pulses of those that hold documents without a result, and takes over the documents of one that stood still for
`patience` seconds. A document that two ranks end up scoring gets the same score from both.

A rank that died may be started again alone, under the same number, while the others live. The store counts how often
each rank was started, and all that a process says there is said as the :class:`Member` that it is: of which rank, and
which of its starts. So a new process publishes beside its predecessor and not over it, and its pulse is its own. What
the predecessor held without a result goes at once to whoever runs out of work first, the new process included.

The deadline is one time for all: each rank counts the seconds that the first one gave it on a clock of its own that
nobody sets, and the first rank to see it pass tells the others. A store that gives no answer for `patience` seconds
counts as gone, and so does a first rank that was lost: it alone writes the results, and what is scored is kept.

A document's score depends on that document alone, and with phases on the earlier groups, of which every rank learns the
same before it takes documents of the next one. So it is the same on any number of ranks.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from ..model.config import ConfigError
from ..model.parallel import is_one_of_many, met, restarts
from ..model.storage import differences
from ..model.watch import JOIN
from .claims import SharedWaiting, Taken
from .results import DocumentResult, NonFiniteScore
from .schedule import Waiting
from .store import LostStore, PatientStore

PATIENCE = 60.0
"""Seconds without a pulse after which a rank counts as lost: several times what compiling and capturing take."""

PUBLISHED = 256
"""Results in one value of the store: a TCPStore drops whoever sends more than 8 MiB, and a resumed run has many."""

HandsOut = Callable[[np.ndarray], Waiting]
"""Makes, from the visits of the documents longest first, what hands out some of them: `waiting` of Engine.adapt."""

TAKEN_OVER = 64
"""Documents of a lost rank that another takes over at a time, so that several can share them."""

LOST_FIRST = (
    "all documents are scored, but the first rank, which writes the results, is lost; what is scored is kept: the same "
    "command with --resume writes them"
)


class Member(NamedTuple):
    """One process of a run: its rank, and which start of that rank it is, from 1 on."""

    rank: int
    start: int

    def __str__(self) -> str:
        return f"{self.rank}.{self.start}"

    @classmethod
    def of(cls, text: str) -> "Member":
        """The member that `str` made a text of."""
        return cls(*map(int, text.split(".")))


class Deadline:
    """`seconds` from now, of which `spent` are gone already; 0 seconds never pass."""

    def __init__(self, seconds: float, spent: float = 0.0):
        self.end = time.perf_counter() + seconds - spent if seconds else float("inf")

    def passed(self) -> bool:
        return time.perf_counter() >= self.end


class DocumentQueue:
    """The queue of one process. Documents are named by their index in the request.

    `results` are those that are known here, of all processes. `is_shared`: documents are claimed, not owned from the
    start. `is_restarted`: this process follows one that was lost, and goes on from its journal.
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
        self,
        done: dict[int, DocumentResult],
        seconds: float,
        spent: float,
        tick: Callable[[], None],
        of_run: Mapping[str, Any],
    ) -> tuple[set[int], Deadline]:
        """The documents that are done, and the deadline in `seconds` of which `spent` are gone, as the first rank says.

        The others wait for it and call `tick` meanwhile. ConfigError on one whose run, in JSON values, is another.
        """
        self.publish(done)
        return set(done), Deadline(seconds, spent)

    def waiting(self, taken: Taken, name: str = "long", order: Sequence[int] | None = None) -> HandsOut | None:
        """What hands the documents of the list `name` to an engine; None: all of them are this process's.

        `order` is that in which their places, longest first, are claimed; as they are, if left out.
        """
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
        self.store, self.rank, self.world, self.patience, self.clock = (
            PatientStore(store, patience),
            rank,
            world,
            patience,
            clock,
        )
        self.member = Member(rank, self.store.add(f"starts/{rank}", 1))
        self.is_restarted = is_restarted or self.member.start > 1
        self._results, self._claims = _Log(self, "results"), _Log(self, "claims")
        self._first_owner: dict[int, Member] = {}
        self._heir: dict[int, Member] = {}
        self._pulses: dict[Member, tuple[int, float]] = {}
        self._beaten = -float("inf")
        self._ownerless_since: float | None = None

    def begin(
        self,
        done: dict[int, DocumentResult],
        seconds: float = 0.0,
        spent: float = 0.0,
        tick: Callable[[], None] = lambda: None,
        of_run: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[set[int], Deadline]:
        left = seconds - spent if seconds else None
        if self.is_first or self.member.start > 1:  # whose journal no other has read
            self.publish(done)
        if self.is_first and self.member.start == 1:
            self.store.set("begin", json.dumps({"left": left, "done": sorted(done), "run": dict(of_run)}))
        # The store's own wait would hear no signal.
        until = self.clock() + JOIN  # it may read the journals of an interrupted run
        while not self.store.check(["begin"]):
            tick()
            if self.clock() >= until:
                raise LostStore(
                    f"the first rank has not begun within {JOIN:g} s; start all ranks at about the same time"
                )
            time.sleep(0.05)
        said = json.loads(self.store.get("begin"))
        if differing := differences(said["run"], of_run):
            raise ConfigError(
                f"rank {self.rank} is not of the first rank's run: {differing}; start all ranks with the same model, "
                "text and options"
            )
        if said["left"] is not None and left is not None:  # a rank that was started again has spent more
            said["left"] = min(said["left"], left)
        return set(said["done"]), SharedDeadline(self, said["left"])

    def last_of(self, rank: int) -> Member:
        """The process that was started last under that number, or that is to be started first."""
        return Member(rank, max(1, self.store.add(f"starts/{rank}", 0)))

    def _works(self, member: Member, lost: Sequence[Member]) -> bool:
        """Whether that process may still want the store."""
        return not (member in lost or self.store.check([f"left/{member}"]) or self.is_lost(member))

    def members(self) -> list[Member]:
        """All processes that were started so far, rank by rank."""
        starts = ((rank, self.store.add(f"starts/{rank}", 0)) for rank in range(self.world))
        return [Member(rank, start) for rank, count in starts for start in range(1, count + 1)]

    def waiting(self, taken: Taken, name: str = "long", order: Sequence[int] | None = None) -> HandsOut:
        return lambda visits: SharedWaiting(visits, self, taken, name, order)

    def claim(self, name: str, count: int = 1) -> range:
        stop = self.store.add(f"next/{name}", count)
        return range(stop - count, stop)

    def own(self, indices: Iterable[int]) -> None:
        owned = list(indices)
        self._first_owner |= dict.fromkeys(owned, self.member)
        self._claims.append([owned])

    def owner(self, index: int) -> Member | None:
        """Who has document `index`, as far as this process knows; None where nobody is known to have taken it."""
        return self._heir.get(index) or self._first_owner.get(index)

    def take_over(self, missing: Sequence[int]) -> list[int]:
        for member, indices in self._claims.new():
            self._first_owner |= dict.fromkeys(indices, member)
        owners = {index: self.owner(index) for index in missing}
        lost: set[Member | None] = {member for member in self.members() if self.is_lost(member)}
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

    def _take_from(self, owner: Member | None, index: int) -> bool:
        """Whether document `index` of the lost `owner`, or of none that is known, is this process's now."""
        before = str(self._heir.get(index, ""))
        heir = self.store.compare_set(f"heir/{index}", before, str(self.member)).decode()
        self._heir[index] = Member.of(heir)
        is_taken = self._heir[index] == self.member
        if is_taken and owner is not None:
            self.store.set(f"lost/{owner}", "")
        return is_taken

    def lost(self) -> list[Member]:
        """The processes from which any other took documents over."""
        return [member for member in self.members() if self.store.check([f"lost/{member}"])]

    def publish(self, results: dict[int, DocumentResult]) -> None:
        super().publish(results)
        items = [(index, vars(result)) for index, result in results.items()]
        self._results.append(items[begin : begin + PUBLISHED] for begin in range(0, len(items), PUBLISHED))

    def collect(self) -> None:
        if self.store.check(["failed"]):
            raise NonFiniteScore(self.store.get("failed").decode())
        for _, found in self._results.new():
            self.results |= {index: DocumentResult(**result) for index, result in found}

    def beat(self) -> None:
        """Count up this process's pulse, at most once a second."""
        if self.clock() - self._beaten >= 1.0:
            self._beaten = self.clock()
            self.store.add(f"pulse/{self.member}", 1)

    def is_lost(self, member: Member) -> bool:
        """Whether another has come in that process's place, or this one saw its pulse stand still for `patience` s."""
        if member == self.member:
            return False
        if self.store.add(f"starts/{member.rank}", 0) > member.start:
            return True
        pulse = self.store.add(f"pulse/{member}", 0)
        seen, since = self._pulses.get(member, (None, 0.0))
        if pulse != seen:
            self._pulses[member] = pulse, self.clock()
            return False
        return self.clock() - since >= self.patience

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
        self.store.set(f"left/{self.member}", "")
        if self.last_of(0) in lost and not self.is_first:
            raise LostStore(LOST_FIRST)
        staying = range(self.world) if self.is_first else ()
        while (staying := [rank for rank in staying if self._works(self.last_of(rank), lost)]) and not should_stop():
            time.sleep(0.02)
        if self.is_first:  # whose store is there until it goes; others may note their seconds late
            seconds = self.seconds_of_ranks()
        started = {member.rank: member.start for member in self.members()}
        about = {
            "restarted_ranks": [rank for rank, start in started.items() if start > 1],
            "absent_ranks": sorted(set(range(self.world)) - set(started)),
        }
        lost_ranks = sorted({member.rank for member in lost})
        return {"ranks": self.world, "lost_ranks": lost_ranks, **about, "rank_seconds": seconds}

    def pass_deadline(self) -> None:
        """Tell all ranks that the deadline has passed."""
        self.store.set("deadline", "passed")

    def deadline_passed(self) -> bool:
        """Whether any rank saw the deadline pass."""
        return self.store.check(["deadline"])


class _Log:
    """Lists that each process of a queue tells all others, in order: numbered values under `name` and its member.

    A value is set before it is counted: what is counted can be read, whenever its writer dies.
    """

    def __init__(self, queue: StoreQueue, name: str):
        self._queue, self._name = queue, name
        self._written = 0
        self._read: dict[Member, int] = {}

    def append(self, values: Iterable[list]) -> None:
        """Tell the others each of these lists that is not empty."""
        store, key = self._queue.store, f"{self._name}/{self._queue.member}"
        for value in filter(None, values):
            store.set(f"{key}/{self._written}", json.dumps(value))
            self._written = self._read[self._queue.member] = store.add(key, 1)

    def new(self) -> Iterator[tuple[Member, list]]:
        """Every list that others appended since this was asked last, and by whom."""
        store = self._queue.store
        for member in self._queue.members():
            count = store.add(f"{self._name}/{member}", 0)
            for number in range(self._read.get(member, 0), count):
                yield member, json.loads(store.get(f"{self._name}/{member}/{number}"))
            self._read[member] = count


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


def queue_of_processes(patience: float = PATIENCE) -> DocumentQueue:
    """The queue of the processes that torchrun, or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, put side by side.

    One process gets a queue of its own. ConfigError: the processes cannot meet.
    """
    if not is_one_of_many():
        return DocumentQueue()
    store, rank, world = met()
    # A restarted run starts from its journals, not from what its predecessor left in the launcher's store.
    store = dist.PrefixStore(f"klora/score/{restarts()}", store)
    return StoreQueue(store, rank, world, patience, is_restarted=restarts() > 0)
