"""Gradients of the leaves of a pool, added to the pool's by many in one launch."""

from functools import partial

import torch
from torch import Tensor

from ..kernels.columns import PARTS, add_columns_


class Gradients:
    """`total` fp32 [slots, P] and the gradients of leaves that it does not have yet: :meth:`watch` puts a leaf's among
    them whenever a backward has made it. The leaf does not keep it.

    They are added as soon as PARTS of them wait and one more comes, and the rest as the last thing that the backward
    does. One that fails leaves some waiting: who reads the total calls :meth:`add_all` first. Those of one stream wait
    for each other only: its order is theirs.
    """

    def __init__(self, total: Tensor):
        self.total = total
        self.waiting: dict[int, dict[int, Tensor]] = {}
        """of each stream, by the column where they start"""
        self.backward = -1
        """the last one that was asked to call :meth:`add_all` at its end"""

    def watch(self, leaf: Tensor, start: int) -> None:
        """Add the gradients of `leaf` [slots, ...] to the columns of the total from `start` on."""
        columns = self.total[:, start : start + leaf[0].numel()].view(leaf.shape)
        leaf.register_post_accumulate_grad_hook(partial(self._take, columns))

    def _take(self, columns: Tensor, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        if torch.compiler.is_compiling():  # this backward, which then has no engine to ask
            columns.add_(grad.detach())
        else:
            self._gather(columns.storage_offset(), grad)

    def _gather(self, start: int, grad: Tensor) -> None:
        if self.backward != (backward := torch._C._current_graph_task_id()):
            self.backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.add_all)
        stream = torch.cuda.current_stream(grad.device).cuda_stream if grad.is_cuda else 0
        waiting = self.waiting.setdefault(stream, {})
        if len(waiting) == PARTS or start in waiting:  # as where a backward runs inside another
            self._add(waiting)
        waiting[start] = grad

    def add_all(self) -> None:
        """Add those that wait. At the end of a backward the current stream has waited for the others."""
        for waiting in filter(None, self.waiting.values()):
            for grad in waiting.values():
                if grad.is_cuda:  # its memory is that of the stream that made it, which does not wait for this one
                    grad.record_stream(torch.cuda.current_stream(grad.device))
            self._add(waiting)

    @torch.no_grad()
    def _add(self, waiting: dict[int, Tensor]) -> None:
        add_columns_(self.total, list(waiting.values()), list(waiting))
        waiting.clear()
