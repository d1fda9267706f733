"""For which rounds an engine makes a step of its own, and which larger one takes the others.

A step with more places, or with training, has the same bits for a round, at a price: places that are empty, and a
backward of which nothing is kept. Making one takes a while, too, where it is captured as a CUDA graph. A round costs

    OVERHEAD + places * length tokens, SCORED of it without training

and making a step as much as `price` tokens. So a shape gets a step when its rounds, those that are known or those that
there have been, lose more than that in the cheapest larger one. A scoring whose rounds are known makes what they are
worth at the start. Where documents are handed out among several processes as it goes, they are taken to be about those
of every so many-th document, and a shape that this misses loses no more than twice the price.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .schedule import OVERHEAD, Round

CAPTURE = 3 * 2**17
"""Tokens that take as long as making a step as a graph: 0.12 s for `seed` on one NVIDIA H200 (13 steps in 1.5 s), which
takes 3.1 million tokens of windows a second (bench/results/nvidia-h200/tuning/scoring-2.txt, cpu/start-1.txt)."""

SCORED = 1 / 3
"""What a round without training costs, of one with it: an assumption, as OVERHEAD is, and never of a result."""


LOOKED_AT = 2**16
"""Chunks of which rounds are made to learn which steps to expect, and up to twice as many: 0.015 to 0.12 s of a CPU
before the first round (bench/results/cpu/ranks-steps-1.txt)."""


class Shape(NamedTuple):
    """What a step is made for."""

    queue: int
    rows: int
    trains: bool

    @classmethod
    def of(cls, taken: Round) -> "Shape":
        """That of a round."""
        return cls(taken.queue, taken.rows, bool(taken.trains.any()))

    def takes(self, other: "Shape") -> bool:
        """Whether a step of this shape has the bits of one of the `other`."""
        return self.queue == other.queue and self.rows >= other.rows and self.trains >= other.trains


class Shapes:
    """Which shapes are worth a step: rounds of the queues have windows of `lengths`, and a step costs `price`."""

    def __init__(self, lengths: Sequence[int], price: float):
        self.lengths, self.price = lengths, price
        self._lost: defaultdict[Shape, float] = defaultdict(float)

    def cost(self, shape: Shape) -> float:
        """Tokens that take as long as a round."""
        return (OVERHEAD + shape.rows * self.lengths[shape.queue]) * (1 if shape.trains else SCORED)

    def worth(self, rounds: Mapping[Shape, int], made: Iterable[Shape] = ()) -> list[Shape]:
        """The shapes of so many `rounds` that want steps beside those that are `made`, the largest first."""
        found, there = [], list(made)
        # The largest first: the others run in it, and find their memory in the graphs' pool.
        for shape in sorted(rounds, key=lambda shape: (-self.cost(shape), shape)):
            larger = self._cheapest(shape, there)
            if larger is None or rounds[shape] * (self.cost(larger) - self.cost(shape)) > self.price:
                found.append(shape)
                there.append(shape)
        return [shape for shape in found if shape not in set(made)]

    def pick(self, shape: Shape, made: Iterable[Shape]) -> Shape:
        """The shape whose step takes a round of `shape`: one that is made, or its own, which is then to be made."""
        larger = self._cheapest(shape, made)
        if larger is None or larger == shape:
            return shape
        self._lost[shape] += self.cost(larger) - self.cost(shape)
        return shape if self._lost[shape] > self.price else larger

    def _cheapest(self, shape: Shape, made: Iterable[Shape]) -> Shape | None:
        return min((one for one in made if one.takes(shape)), key=self.cost, default=None)


def expected_rounds(
    chunks: np.ndarray, sharers: int, rounds_of: Callable[[np.ndarray], Iterable[Round]]
) -> dict[Shape, int]:
    """About how many rounds of each shape one of `sharers` processes gets, of documents of so many `chunks` each.

    `rounds_of` makes the rounds of such documents. Of many documents fewer than a share are looked at, so that narrow
    rounds, of which a share has hardly more, are counted too often: then a capture is a small part of the time.

    Example: expected_rounds(chunks, 2, lambda chunks: Schedule(chunks, 1, 256, queues, rows))
    """
    every = max(sharers, int(chunks.sum()) // LOOKED_AT)
    rounds = Counter(map(Shape.of, rounds_of(chunks[::every])))
    return {shape: count * every // sharers for shape, count in rounds.items()}
