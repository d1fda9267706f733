"""Named, coloured ranges for profilers: nsys shows them in the domain `klora`, the PyTorch profiler in its trace.

Off, which is the default, `phase` returns one shared context that does nothing. A range inside a CUDA graph is recorded
when the graph is captured, not when it is replayed; the replay has a range of its own.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

COLOURS = {
    "data": "blue",
    "forward": "green",
    "block": "yellow",
    "backward": "red",
    "optimizer": "purple",
    "capture": "orange",
    "replay": "cyan",
    "scoring": "white",
}
DOMAIN = "klora"

_NOTHING = nullcontext()
_is_on = False


def phase(name: str) -> AbstractContextManager:
    """A range called `name`, one of COLOURS, around what runs inside; KeyError for another name while ranges are on."""
    return _marked(name) if _is_on else _NOTHING


@contextmanager
def ranges_on() -> Iterator[None]:
    """Turn ranges on for what runs inside."""
    global _is_on
    before, _is_on = _is_on, True
    try:
        yield
    finally:
        _is_on = before


@contextmanager
def _marked(name: str) -> Iterator[None]:
    import nvtx
    from torch.profiler import record_function

    with nvtx.annotate(name, color=COLOURS[name], domain=DOMAIN), record_function(f"{DOMAIN}::{name}"):
        yield
