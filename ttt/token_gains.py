"""What adapting gained along documents, target by target, in bounded memory.

    gain of a target = (NLL of the base model - NLL of the adapted model) / ln 2     in bits; positive is better

Kept are sums over bins of positions, and the last targets of a sample of documents, one of which the report shows.
Nothing here is part of a score.
"""

import hashlib
import heapq
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .documents import Document
from .protocols import TTTConfig
from .results import DocumentResult

CANDIDATES = 256
"""Documents whose last targets are kept until one of them is chosen; more documents than that are sampled."""

SHOWN = 2000
"""Most targets of a document that are kept."""


@dataclass(frozen=True)
class Example:
    """The document that is shown: its index, and `gain` fp32 [n] in bits of its targets from target `begin` on.

    `tokens` uint16 [n + 1] are those targets and the token before them. The document is the median of `candidates`
    documents by gain in bits per byte; `sampled` says whether there were more.
    """

    index: int
    begin: int
    tokens: np.ndarray
    gain: np.ndarray
    candidates: int
    sampled: bool


class TokenGains:
    """Gains of adapted documents: bin i covers the targets `edges[i]` to `edges[i + 1] - 1` of each of them.

    `gain` float64 [bins] is the sum of bits gained, `targets` and `reached` int64 [bins] how many targets and documents
    it is over, `documents` how many documents were added. Memory: the bins, of which there are two for each doubling of
    the longest document, and CANDIDATES times SHOWN numbers.
    """

    def __init__(self, documents: Sequence[Document], config: TTTConfig):
        self.edges = bin_edges(config.chunk, max((document.targets for document in documents), default=0))
        bins = len(self.edges) - 1
        self.gain = np.zeros(bins)
        self.targets, self.reached = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        self.documents = 0
        self.example: Example | None = None
        long = [i for i, document in enumerate(documents) if config.adapts(document.targets)]
        # By the hash of the name, so that no score can influence which documents are candidates.
        digest = {i: hashlib.sha256(os.fsencode(documents[i].name)).digest() for i in long}
        self._candidates = set(heapq.nsmallest(CANDIDATES, long, key=lambda i: (digest[i], i)))
        self._sampled = len(long) > CANDIDATES
        self._kept: dict[int, tuple[int, np.ndarray]] = {}
        self._adapted = config.first_adapted

    def add(self, index: int, base: np.ndarray, adapted: np.ndarray) -> None:
        """Take in document `index`: the NLL, in nats [n], that both models give its first n targets."""
        if not len(adapted):
            return
        gain = (base.astype(np.float64) - adapted) / math.log(2)
        starts = self.edges[:-1][self.edges[:-1] < len(gain)]
        bins = len(starts)
        self.gain[:bins] += np.add.reduceat(gain, starts)
        self.targets[:bins] += np.diff(starts, append=len(gain))
        self.reached[:bins] += 1
        self.documents += 1
        if index in self._candidates:
            # From the first target on that a step could change, where there is one.
            begin = max(len(gain) - SHOWN, self._adapted if len(gain) > self._adapted else 0)
            self._kept[index] = begin, gain[begin:].astype(np.float32)

    def choose(self, documents: Sequence[Document], results: Sequence[DocumentResult]) -> None:
        """Choose the example: the median by gain in bits per byte; of two in the middle the lower, then by index."""
        gains = {i: results[i].gain_bpb for i in self._kept}
        ranked = sorted((gain, i) for i, gain in gains.items() if gain is not None)
        if ranked:
            index = ranked[(len(ranked) - 1) // 2][1]
            begin, gain = self._kept[index]
            tokens = documents[index].tokens[begin : begin + len(gain) + 1]
            self.example = Example(index, begin, tokens, gain, len(ranked), self._sampled)
        self._kept = {}

    @property
    def mean(self) -> np.ndarray:
        """Bits gained a target, float64 [bins]: at each position the mean over the documents that reach it."""
        return np.divide(self.gain, self.targets, out=np.full(len(self.gain), np.nan), where=self.targets > 0)


def bin_edges(chunk: int, longest: int) -> np.ndarray:
    """Where bins begin, in targets, and where the last ends: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... times `chunk`."""
    edges, power = [0, 1], 1
    while edges[-1] * chunk < longest:
        edges += [2 * power, 3 * power]
        power *= 2
    while len(edges) > 2 and edges[-2] * chunk >= longest:
        edges.pop()
    return np.array(edges, np.int64) * chunk
