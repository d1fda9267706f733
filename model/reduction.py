"""The sum of a step's gradients over ranks, a bucket after the other while the backward goes on.

Hooks on the autograd leaves tell when a bucket is whole: then it is on its way, beside the computing. Buckets leave in
one order on all ranks. What comes back is the same on all ranks bit for bit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .stored import StoredWeights


class GradientReduction:
    """Adds up the buckets of `stored` over the default process group, whose ranks all call the same methods.

    `waiting` stands around what waits for the other ranks, as :meth:`Ranks.waiting` does.
    """

    def __init__(self, stored: StoredWeights, waiting: Callable[[], AbstractContextManager] = nullcontext):
        self.stored, self._waiting = stored, waiting
        self._is_on = False
        for number, bucket in enumerate(stored.buckets):
            for place, leaf in enumerate(stored.leaves[bucket.leaves]):
                leaf.register_hook(partial(self._arrived, number, place))

    def backward(self, loss: Tensor, first: bool) -> None:
        """The backward of the last micro-batch, `first` if it is the only one, and the sum over ranks meanwhile."""
        buckets = self.stored.buckets
        self._gradients: list[dict[int, Tensor]] = [{} for _ in buckets]
        self._works: list[dist.Work] = []
        self._is_on, self._first = True, first
        try:
            torch.autograd.grad(loss, self.stored.leaves)
        finally:
            self._is_on, self._gradients = False, []
        if len(self._works) != len(buckets):
            raise RuntimeError(f"{len(self._works)} of {len(buckets)} buckets of gradients came: a leaf has none")
        with self._waiting():
            for work in self._works:
                work.wait()

    def reduce(self) -> None:
        """The same sum after the backward, of what :meth:`StoredWeights.take` has taken."""
        with self._waiting():
            for number in range(len(self.stored.buckets)):
                dist.all_reduce(self.stored.carried(number))

    def _arrived(self, number: int, place: int, gradient: Tensor) -> None:
        if not self._is_on:
            return
        self._gradients[number][place] = gradient
        while (following := len(self._works)) < len(self._gradients) and self._is_whole(following):
            arrived, self._gradients[following] = self._gradients[following], {}
            self.stored.take_bucket(following, [arrived[place] for place in sorted(arrived)], self._first)
            self._works.append(dist.all_reduce(self.stored.carried(following), async_op=True))

    def _is_whole(self, number: int) -> bool:
        leaves = self.stored.buckets[number].leaves
        return len(self._gradients[number]) == leaves.stop - leaves.start
