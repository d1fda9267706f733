"""A second stream of a GPU: what is launched in it runs beside what the current stream is given."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


def event(device: torch.device) -> torch.cuda.Event | None:
    """When what the current stream was given so far is done; None where there are no streams."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def beside(device: torch.device, ready: torch.cuda.Event | None) -> AbstractContextManager:
    """What is launched inside runs once `ready`, beside what the current stream is given, until :func:`join`."""
    if ready is None:
        return nullcontext()
    side = _side_stream(device)
    side.wait_event(ready)
    return torch.cuda.stream(side)


def join(device: torch.device, ready: torch.cuda.Event | None) -> None:
    """The current stream waits for what was launched :func:`beside` it; `ready` None: nothing was."""
    if ready is not None:
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
