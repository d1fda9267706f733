"""The store of several ranks, whose calls end: where it is gone, and where it stands still."""

import queue
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from ..errors import KloraError

GONE = (
    "the process that keeps the ranks' store, the first rank or its launcher, is gone ({}); what is scored is kept: "
    "the same command with --resume goes on from there"
)

NO_ANSWER = "it has not answered for {:g} s"


class LostStore(KloraError, RuntimeError):
    """The process that keeps the ranks' store, or the first rank, is gone or never came, and what to do."""


class PatientStore:
    """A store whose errors are LostStore, and so is an answer that does not come within `patience` seconds.

    A process that is stopped keeps its connections open: a call waits for ever, in a library that no signal reaches.
    Therefore a thread makes the calls. It is left behind where it waits.
    """

    def __init__(self, store: dist.Store, patience: float):
        self._patience, self._is_gone = patience, False
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(store, self._asked, self._answers), daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._answered, name)

    def _answered(self, name: str, *arguments: Any) -> Any:
        try:
            if self._is_gone:  # a late answer would be taken for that of another call
                raise queue.Empty
            self._asked.put((name, arguments))
            answer, error = self._answers.get(timeout=self._patience)
        except queue.Empty:
            self._is_gone = True
            raise LostStore(GONE.format(NO_ANSWER.format(self._patience))) from None
        if isinstance(error, dist.DistError):
            raise LostStore(GONE.format(error)) from None
        if error is not None:
            raise error
        return answer


def _serve(store: dist.Store, asked: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Make the calls that are asked for, until None is."""
    while (call := asked.get()) is not None:
        name, arguments = call
        try:
            answers.put((getattr(store, name)(*arguments), None))
        except Exception as error:
            answers.put((None, error))
