"""The documents of one run of the engine: what they write into the plan of a round, and how much of them counts."""

from collections.abc import Sequence

import numpy as np

from .documents import Document
from .phases import SharedStep
from .protocols import CACHED, TTTConfig
from .schedule import Round
from .step import CHUNKS, COUNT, FILLED, FIRST, FRESH, LENGTH, RECORD, SLOT, START, TRAINED, clear_plan


class Run:
    """The documents of one run, in order, as arrays: where they lie, and how far they are.

    `places` counts the input positions of the rounds sent off, `inputs` those that held a document's token.
    """

    def __init__(self, documents: Sequence[Document], config: TTTConfig):
        self.config = config
        self.targets = np.array([document.targets for document in documents], dtype=np.int64)
        self.offsets = np.cumsum(self.targets + 1) - (self.targets + 1)
        self.tokens = int((self.targets + 1).sum())
        self.chunks = -(-self.targets // config.chunk)
        self._passes = np.zeros_like(self.targets)
        self._reached = np.zeros_like(self.targets)
        self._handed = np.zeros(len(documents), dtype=bool)
        self.places = self.inputs = self._done = 0

    def fill(self, plan: np.ndarray, taken: Round, records: int) -> int:
        """Write a round's indices into a plan int32 [FIELDS, batch]; the number of documents that it starts."""
        count = len(taken.document)
        self._place(plan, taken)
        plan[SLOT, :count] = taken.slot
        plan[TRAINED, :count] = np.where(taken.trains, taken.slot, -1)
        # A chunk that a document learns from is whole.
        plan[COUNT, :count] = np.where(taken.trains, self.config.chunk, -1)
        plan[RECORD, :count] = np.minimum(taken.number, records - 1)
        fresh = int(taken.starts.sum())
        plan[FRESH, :fresh] = taken.slot[taken.starts]
        plan[CHUNKS, :fresh] = self.chunks[taken.document[taken.starts]]
        return fresh

    def fill_shared(self, plan: np.ndarray, step: SharedStep, slot: int) -> int:
        """Write a step of the shared adapter in `slot` into a plan; the targets passed with it so far."""
        count, (first, _, end) = len(step.document), self.window(step)
        targets = int((end - first).sum())
        self._place(plan, step)
        plan[SLOT, :count] = slot
        plan[TRAINED, 0] = slot
        plan[COUNT, :count] = targets
        self._done += targets
        return self._done

    def _place(self, plan: np.ndarray, taken: Round | SharedStep) -> None:
        """Clear a plan and write where the windows of a step lie."""
        count, (first, start, end) = len(taken.document), self.window(taken)
        clear_plan(plan)
        plan[START, :count] = self.offsets[taken.document] + start
        plan[LENGTH, :count] = end - start
        plan[FIRST, :count] = first - start
        plan[FILLED, :count] = start

    def window(self, taken: Round | SharedStep) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the chunks of a round begin, and where their windows begin and end, in targets of the document.

        With the context `cached` a window is the chunk: what a step computes.
        """
        size = self.config.chunk
        end = np.minimum((taken.chunk + 1) * size, self.targets[taken.document])
        first = taken.chunk * size
        return first, first if self.config.context == CACHED else self.config.window_start(taken.chunk, end), end

    def count(self, taken: Round, length: int) -> None:
        """Note that a round with windows of `length` inputs was sent off."""
        first, start, end = self.window(taken)
        self.places += taken.rows * length
        self.inputs += int((end - start).sum())
        self._done += int((end - first).sum())
        self._reached[taken.document] = end
        self._passes[taken.document] += taken.ends

    @property
    def passed(self) -> int:
        """Targets passed so far, a share of all of them in each pass."""
        return self._done // self.config.passes

    def newly_through(self) -> np.ndarray:
        """The documents whose last pass has ended since this was asked last."""
        through = (self._passes == self.config.passes) & ~self._handed
        self._handed |= through
        return np.flatnonzero(through)

    def covered(self) -> np.ndarray:
        """How many targets of each document count."""
        if self.config.is_leaky:
            return np.where(self._passes == self.config.passes, self.targets, 0)
        return self._reached.copy()
