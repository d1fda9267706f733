"""Gradients of the leaves of a pool, added to the pool's by many in one launch."""

from functools import partial

import torch
from torch import Tensor

from ..kernels.columns import PARTS, add_columns_


class Gradients:
    """`total` fp32 [slots, P] and the leaves whose gradient it does not have yet: :meth:`watch` makes a leaf one of
    them whenever a backward has made its gradient.

    They are added as soon as PARTS of them wait, and the rest as the last thing that the backward does, so that nobody
    sees a gradient that is missing. Those of one stream wait for each other only: its order is theirs.
    """

    def __init__(self, total: Tensor):
        self.total = total
        self.waiting: dict[int, list[tuple[int, Tensor]]] = {}
        self.backward = -1
        """the last one that was asked to call :meth:`_add_all` at its end"""

    def watch(self, leaf: Tensor, start: int) -> None:
        """Add the gradients of `leaf` [slots, ...] to the columns of the total from `start` on."""
        leaf.register_post_accumulate_grad_hook(partial(self._note, start))

    def _note(self, start: int, leaf: Tensor) -> None:
        if self.backward != (backward := torch._C._current_graph_task_id()):
            self.backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._add_all)
        stream = torch.cuda.current_stream(leaf.device).cuda_stream if leaf.is_cuda else 0
        waiting = self.waiting.setdefault(stream, [])
        waiting.append((start, leaf))
        if len(waiting) == PARTS:
            self._add(waiting)

    def _add_all(self) -> None:
        """Once a backward is done, whose streams the current one then waits for."""
        for waiting in self.waiting.values():
            self._add(waiting)

    def forget(self) -> None:
        """Gradients that wait, as they do after a backward that failed, are added to nothing."""
        for waiting in self.waiting.values():
            for _, leaf in waiting:
                leaf.grad = None
            waiting.clear()

    @torch.no_grad()
    def _add(self, waiting: list[tuple[int, Tensor]]) -> None:
        given = {start: leaf for start, leaf in waiting if leaf.grad is not None}
        waiting.clear()
        if given:
            add_columns_(self.total, [leaf.grad for leaf in given.values()], list(given))
        for leaf in given.values():
            leaf.grad = None
