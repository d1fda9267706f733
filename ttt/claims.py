"""In which order ranks claim the documents of a list, and how many of them each holds."""

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .schedule import Waiting

if TYPE_CHECKING:
    from .queue import DocumentQueue

Taken = Callable[[list[int]], None]
"""Hears the places, of documents longest first, that were handed to this process."""

FILLED = 2
"""Rounds of documents that all ranks together hold at least: on two ranks, one each. Simulated with rounds that cost
what the schedule takes them to, two ranks are 1.998 times as fast as one so, and 1.994 without (4,000 documents of a
lognormal law; tests/test_claims.py, bench/results/cpu/start-1.txt)."""

AT_ONCE = 16
"""Most documents in one claim, which is for half of those that are wanted: a rank begins with some hundred, and waits a
tenth of a millisecond for each answer of the store. Of all at once it would have too many where others come before."""


class SharedWaiting(Waiting):
    """The documents of the list `name` that wait for a slot on any rank. `taken` gets the places this rank got.

    They are claimed in `order`, which :func:`dealt` makes; longest first, if left out.
    """

    def __init__(
        self,
        visits: np.ndarray,
        queue: "DocumentQueue",
        taken: Taken,
        name: str = "long",
        order: Sequence[int] | None = None,
    ):
        self._order = np.arange(len(visits)) if order is None else np.asarray(order, dtype=np.int64)
        super().__init__(visits[self._order])
        self._longest = np.maximum.accumulate(self.visits[::-1], 0)[::-1]
        self.queue, self._taken, self._name = queue, taken, name
        self.sharers = queue.world

    def take(self, free: int, held: int, active: int = 0, widest: int = 0) -> np.ndarray:
        taken: list[int] = []
        # Few documents make narrow rounds, in which each costs more; the last to be claimed are short, so that some
        # more than a share of them do not make a rank late. On many ranks they would be all that is left.
        few = FILLED * widest // self.queue.world - active
        if self._wanted(free, held, few) > 1:
            self.next = min(self.queue.claim(self._name, 0).start, len(self.visits))  # others have had some since
        while wanted := self._wanted(free - len(taken), held, few - len(taken)):
            numbers = self.queue.claim(self._name, min(AT_ONCE, -(-wanted // 2)))
            self.next = min(numbers.stop, len(self.visits))
            for number in numbers[: max(self.next - numbers.start, 0)]:
                taken.append(int(self._order[number]))
                held += int(self.visits[number].sum())
        self._taken(taken)
        return np.array(taken, dtype=np.int64)

    def _wanted(self, free: int, held: int, few: int) -> int:
        """How many documents to claim, if no other rank claims any meanwhile: until this one holds a share of what
        nobody has yet, or one document, and `few` at least."""
        rest = self._rest[self.next : self.next + free + 1].sum(1)
        most = min(free, len(rest) - 1)
        holds = held + rest[0] - rest
        enough = np.flatnonzero((holds > 0) & (holds * self.queue.world >= rest))
        return min(most, max(few, int(enough[0]) if len(enough) else most))

    @property
    def left(self) -> np.ndarray:
        return self._rest[self.next] // self.queue.world

    @property
    def longest(self) -> np.ndarray:
        return self._longest[self.next] if self.next < len(self.visits) else np.zeros_like(self._rest[0])


def dealt(work: Sequence[int], world: int) -> list[int]:
    """The order in which documents of so much `work` each, most first, are claimed by `world` ranks.

    Ranks come one after the other, and each begins with a share of what is then left: 1 / (world + 1) of it, by the
    rule of :class:`SharedWaiting`. Longest first, the one that comes first had all of the longest, whose chunks follow
    one another, and was done a third later than the mean of eight. So what is handed out at the start is dealt out into
    as many piles of equal work, and one pile follows the other. The rest goes longest first to whoever has a slot free.

    Example: order = dealt([50, 40, 30, 2, 1, 1, 1], world=2)
    """
    share = (1 - (world / (world + 1)) ** world) / world * sum(work)
    piles: list[tuple[int, int, list[int]]] = [(0, rank, []) for rank in range(world)]
    count = 0
    while count < len(work) and piles[0][0] < share:
        filled, rank, places = piles[0]
        places.append(count)
        heapq.heapreplace(piles, (filled + work[count], rank, places))
        count += 1
    first = [place for _, _, places in sorted(piles, key=lambda pile: pile[1]) for place in places]
    return [*first, *range(count, len(work))]
