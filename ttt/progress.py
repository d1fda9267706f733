"""How far a scoring run is: its seconds by phase, the pulse that others see, and its end where a stop was asked for.

The journal hears of the time as it goes by, so that a kill gives a deadline none of it back.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..errors import KloraError
from .documents import Document
from .journal import Journal
from .queue import DocumentQueue

TIME_SHARE = 0.01
"""Share of the time spent so far after which the journal notes it again, at the earliest after a second: what a kill
gives a deadline back."""


class Interrupted(KloraError, RuntimeError):
    """Scoring was stopped before its end; the journal, or those of all ranks, hold `done` of `total` documents.

    `lost` says what was under way that no journal holds.
    """

    def __init__(self, done: int, total: int, lost: str = ""):
        super().__init__(f"{done} of {total} documents are scored{lost}")
        self.done, self.total = done, total


class ScoringProgress:
    """What one process says of a run while it goes on. `seconds` by phase are those of interrupted runs, too.

    `should_stop` and `show` are `should_stop` and `progress` of the request.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        queue: DocumentQueue,
        journal: Journal,
        should_stop: Callable[[], bool],
        show: Callable[[str, int, int], None],
    ):
        self.documents, self.queue, self.journal = documents, queue, journal
        self._should_stop, self._show = should_stop, show
        self.seconds, self._timed = dict(journal.seconds), None
        self._note_time_at = 1.0 + sum(self.seconds.values())

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

    def beat(self) -> None:
        """Show that this process is alive, and let the journal know the time."""
        self.queue.beat()
        spent = self.spent
        total = sum(spent.values())
        if total >= self._note_time_at:
            self.journal.add_seconds(spent)
            self._note_time_at = total + max(1.0, TIME_SHARE * total)

    def tick(self) -> None:
        """Between any two pieces of work: a pulse, and an end where one was asked for and something is left to do."""
        self.beat()
        if self._should_stop() and len(self.queue.results) < len(self.documents):
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """The error that says how far the run came."""
        return Interrupted(len(self.queue.results), len(self.documents))

    def show(self, phase: str, done: int, total: int) -> None:
        """Show how far this process is; of several, only :meth:`collect` shows how far they all are."""
        self.beat()
        if not self.queue.is_shared:
            self._show(phase, done, total)

    def show_and_tick(self, phase: str, done: int, total: int) -> None:
        """As :meth:`show`, and then an end where one was asked for."""
        self.show(phase, done, total)
        self.tick()

    def collect(self) -> None:
        """Learn what all ranks have published."""
        self.queue.collect()
        if self.queue.is_shared:
            done = sum(result.tokens for result in self.queue.results.values())
            self._show("score", done, sum(document.targets for document in self.documents))
