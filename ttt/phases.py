"""Phases: which documents are scored before a shared adapter learns, and which chunks it learns from together.

Documents go in the order of their names' hashes and are cut into `phases` + 1 groups of as many documents each. Group 0
starts from the adapter that changes nothing. Once a group is scored, the shared adapter takes Adam steps on its
documents, and those of the next group start from there. So a document's score depends on the groups before its own, and
on nothing in its own group or after it: names and their number alone say which group a document is in, never its text,
its length, a score or a batch.

A shared step learns from `phase_chunks` chunks at once, each in the window that it was cut into for scoring: the mean
over all their targets. Chunks come document after document; a step is full once that many of one window length have
come together, and what is left at the end of a pass makes smaller ones. Neither the batch nor the number of processes
has a part in it: every process takes the same steps and comes to the same bits.

What a later document starts from is `phase_start`. The shared adapter learns A, B and biases in either case, as A's
gradient has the factor B: its A moves from its second step on.

    all   A, B and biases: what was learned helps from the first target on. The default: a document that is too short
          for a step of its own gets something only so, and what was measured was measured so
    a     A alone, B and biases zero: the LoRA adds exactly nothing before the document's own first step, whose
          directions are then those that were useful before. Documents that take no step are left to the base model,
          as without phases. At lr=0 none takes one: then every score is the base model's, whatever was learned
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .documents import Document
from .sampling import name_digest


@dataclass(frozen=True)
class SharedStep:
    """Chunks that one step of the shared adapter learns from: int64 arrays of one entry a place, all of one queue."""

    queue: int
    document: np.ndarray
    chunk: np.ndarray


def groups_of(documents: Sequence[Document], phases: int) -> list[list[int]]:
    """The documents of each of `phases` + 1 groups by their index, in the order of their names' hashes."""
    order = sorted(range(len(documents)), key=lambda index: (name_digest(documents[index].name), index))
    return [group.tolist() for group in np.array_split(np.array(order, dtype=np.int64), phases + 1)]


def shared_steps(chunks: Sequence[int], firsts: Sequence[int], places: int) -> Iterator[SharedStep]:
    """The steps of one pass over documents of `chunks` chunks each, in queues whose first chunks are `firsts`."""
    waiting: list[list[tuple[int, int]]] = [[] for _ in firsts]
    for document, count in enumerate(chunks):
        for chunk in range(count):
            queue = bisect_right(firsts, chunk) - 1
            waiting[queue].append((document, chunk))
            if len(waiting[queue]) == places:
                yield _step(queue, waiting[queue])
                waiting[queue] = []
    for queue, rest in enumerate(waiting):
        if rest:
            yield _step(queue, rest)


def _step(queue: int, places: list[tuple[int, int]]) -> SharedStep:
    document, chunk = np.array(places, dtype=np.int64).T
    return SharedStep(queue, document, chunk)
