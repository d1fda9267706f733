"""Which documents go through which chunk in which round.

A round takes up to a batch of documents, one chunk of each, all from one queue: the chunks whose windows have one
length. Queues follow one another along a document. A document that has a slot is ready in exactly one queue. Documents
get slots longest first, and give them back the moment they end.

The rule. A document's chunks follow one another, so the longest document bounds the number of rounds from below, and
rounds that it spends alone are the waste to avoid. Each queue q therefore wants as many places as make its work last
until its longest document is through:

    want_q = ceil(places left in q / most places left in q for one document),    between `least` and the batch

and each round goes to the queue whose round would be the best one relative to what it wants. A round of r captured
places and length L costs as much as OVERHEAD + r L tokens. Then n documents in it are worth n L / (OVERHEAD + r L), and
r is the captured number of places that makes this largest. Between equals the queue of the document with most left
goes first. Within a queue the documents with most left go first, so that the longest never waits behind others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .protocols import TTTConfig

OVERHEAD = 4096
"""Tokens that take as long as the fixed cost of a round: an assumption of the order of rounds, never of a result."""


class Queue(NamedTuple):
    """The chunks from number `first` on, up to those of the next queue, whose windows are of `length` inputs.

    The logits of their targets are divided by `temperature`.
    """

    first: int
    length: int
    temperature: float


@dataclass(frozen=True)
class Round:
    """One step of the engine: int64 arrays of one entry a document, `rows` places of which the first are taken."""

    queue: int
    rows: int
    document: np.ndarray
    slot: np.ndarray
    chunk: np.ndarray
    number: np.ndarray
    """which pass"""
    trains: np.ndarray
    """whether an Adam step follows"""
    ends: np.ndarray
    """whether it is the last chunk of a pass, after which no step follows"""

    @property
    def starts(self) -> np.ndarray:
        """Which entries are a document's very first chunk, for which its slot is reset."""
        return (self.chunk == 0) & (self.number == 0)


def queues_of(config: TTTConfig) -> list[Queue]:
    """The queues of a config: windows of chunk, 2 * chunk, ..., window inputs, apart where the temperature changes.

    With the context `cached` all are of `chunk` inputs.
    """
    firsts = set(range(-(-config.inputs // config.chunk)))
    if config.temperature_of(0) != config.temperature:
        firsts.add(config.trained_from + 1)
    return [Queue(j, min((j + 1) * config.chunk, config.inputs), config.temperature_of(j)) for j in sorted(firsts)]


class Waiting:
    """The documents that have no slot yet, longest first, each with its visits int64 [queues] still to be made."""

    sharers = 1
    """Processes that they are handed out to."""

    def __init__(self, visits: np.ndarray):
        self.visits = visits
        self.next = 0
        self._rest = np.concatenate([np.cumsum(visits[::-1], 0)[::-1], np.zeros((1, visits.shape[1]), np.int64)])

    def take(self, free: int, held: int, active: int = 0, widest: int = 0) -> np.ndarray:
        """The documents that go into `free` slots now, beside `active` ones with `held` visits left. A round has
        `widest` places at most."""
        first, self.next = self.next, min(self.next + free, len(self.visits))
        return np.arange(first, self.next)

    @property
    def left(self) -> np.ndarray:
        """Visits to each queue by documents that will still come from here."""
        return self._rest[self.next]

    @property
    def longest(self) -> np.ndarray:
        """Visits to each queue of the longest of them."""
        return self.visits[self.next] if self.next < len(self.visits) else np.zeros_like(self._rest[0])


def visits_of(chunks: Sequence[int], passes: int, firsts: Sequence[int]) -> np.ndarray:
    """Visits int64 [documents, queues] in all passes, of queues whose first chunks are `firsts`."""
    bounds = np.array([*firsts, np.iinfo(np.int64).max])
    return passes * np.diff(np.minimum(np.asarray(chunks, dtype=np.int64)[:, None], bounds), axis=1)


class Schedule:
    """The rounds of documents of `chunks` chunks each, longest first, through `passes` passes and `slots` slots.

    `rows` are the numbers of places that a round may have. No chunk before number `trained_from` is trained on.
    `waiting` hands out the documents; all of them, where it is left out. Iterating gives the rounds; it is done once.
    """

    def __init__(
        self,
        chunks: Sequence[int],
        passes: int,
        slots: int,
        queues: Sequence[Queue],
        rows: Sequence[int],
        trained_from: int = 0,
        waiting: Waiting | None = None,
    ):
        self.chunks = np.asarray(chunks, dtype=np.int64)
        if (np.diff(self.chunks) > 0).any():
            raise ValueError("documents come longest first")
        if (self.chunks < 1).any():
            raise ValueError("a document without targets has nothing to adapt")
        self.passes, self.trained_from = passes, trained_from
        self.firsts, self.lengths = (np.array([queue[i] for queue in queues], dtype=np.int64) for i in range(2))
        self.rows = np.unique(np.asarray(rows, dtype=np.int64))
        self._visits = visits_of(self.chunks, passes, self.firsts)
        self._waiting = waiting or Waiting(self._visits.copy())
        self._held = np.zeros(len(self.lengths), dtype=np.int64)
        self._document = np.full(slots, -1, dtype=np.int64)
        self._chunk = np.zeros(slots, dtype=np.int64)
        self._pass = np.zeros(slots, dtype=np.int64)
        self._steps = np.zeros(slots, dtype=np.int64)
        # A row of this many places or more is taken to be as quick, place by place, as a whole batch.
        self._least = np.minimum(-(-2 * OVERHEAD // self.lengths), self.rows[-1])

    def __iter__(self) -> Iterator[Round]:
        self._admit()
        while (self._document >= 0).any():
            yield self._next()
            self._admit()

    def _admit(self) -> None:
        free = np.flatnonzero(self._document < 0)
        active = len(self._document) - len(free)
        taken = self._waiting.take(len(free), int(self._held.sum()), active, int(self.rows[-1])) if len(free) else free
        if len(taken):
            free = free[: len(taken)]
            self._document[free] = taken
            self._chunk[free] = self._pass[free] = 0
            self._steps[free] = self.passes * self.chunks[taken]
            self._held += self._visits[taken].sum(0)

    def _next(self) -> Round:
        taken = np.flatnonzero(self._document >= 0)
        # Most left first; a tie goes to the document that was given first.
        order = taken[np.lexsort((self._document[taken], -self._steps[taken]))]
        queue_of = np.searchsorted(self.firsts, self._chunk[order], side="right") - 1
        best = None
        for queue in range(len(self.lengths)):
            ready = order[queue_of == queue]
            if not len(ready):
                continue
            want = self._want(queue)
            rows, worth = self._shape(queue, min(len(ready), want))
            _, most = self._shape(queue, want)
            score = (worth / most, self._steps[ready[0]])
            if best is None or score > best[0]:
                best = (score, queue, rows, ready[: min(rows, len(ready))])
        _, queue, rows, slots = best
        return self._take(queue, rows, slots)

    def _want(self, queue: int) -> int:
        active = self._document[self._document >= 0]
        longest = max(self._visits[active, queue].max(), self._waiting.longest[queue])
        want = -(-(self._held[queue] + self._waiting.left[queue]) // max(int(longest), 1))
        return int(min(max(want, self._least[queue]), self.rows[-1]))

    def _shape(self, queue: int, ready: int) -> tuple[int, float]:
        """The number of places that suits `ready` documents best, and what a token of such a round's cost is worth."""
        worth = np.minimum(ready, self.rows) / (OVERHEAD / self.lengths[queue] + self.rows)
        best = int(worth.argmax())
        return int(self.rows[best]), float(worth[best])

    def _take(self, queue: int, rows: int, slots: np.ndarray) -> Round:
        document, chunk, number = self._document[slots], self._chunk[slots].copy(), self._pass[slots].copy()
        ends = chunk + 1 == self.chunks[document]
        trains = ~ends & (chunk >= self.trained_from)
        taken = Round(queue, rows, document, slots, chunk, number, trains, ends)
        self._held[queue] -= len(slots)
        self._visits[document, queue] -= 1
        self._steps[slots] -= 1
        self._chunk[slots] = np.where(ends, 0, chunk + 1)
        self._pass[slots] = number + ends
        self._document[slots[self._steps[slots] == 0]] = -1
        return taken
