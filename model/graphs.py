"""A call as the replay of a CUDA graph.

Shapes and addresses are those of the capture: whoever replays writes into the tensors that the call reads. A call must
have run before it is captured, so that its kernels are compiled and its state exists, and on another stream than the
default one, which cannot be captured.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .ranges import phase


@dataclass(frozen=True, eq=False)
class Replay:
    """A captured call. The graph reads the call's tensors, so whoever keeps the one keeps the other."""

    graph: torch.cuda.CUDAGraph
    call: Callable[[], object]

    def __call__(self) -> None:
        with phase("replay"):
            self.graph.replay()


_WITH_COLLECTIVES: weakref.WeakSet[Replay] = weakref.WeakSet()
_IDLE: dict[torch.device, list[torch.cuda.Stream]] = {}


def capture_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream for what `owner` captures, its own until it is gone: then the next one gets it.

    cuBLAS keeps a workspace for every stream that it ever ran on, 32 MiB on Hopper.
    """
    idle = _IDLE.setdefault(device, [])
    stream = idle.pop() if idle else torch.cuda.Stream(device)
    weakref.finalize(owner, idle.append, stream)
    return stream


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing that is garbage goes meanwhile: with a graph among it, whatever is being captured would be spoilt."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def run_on(stream: torch.cuda.Stream, call: Callable[[], object]) -> None:
    """Run `call` on `stream`, after what the current stream has been given and before what it gets next."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        call()
    current.wait_stream(stream)


def captured(
    call: Callable[[], object],
    device: torch.device,
    *,
    warm_up: int = 2,
    stream: torch.cuda.Stream | None = None,
    pool: tuple[int, int] | None = None,
    collectives: bool = False,
) -> Replay:
    """`call` as the replay of one graph, after `warm_up` runs of it.

    Both take place on `stream`, or on one of their own. Graphs that never run at the same time may share the memory of
    a `pool`, from torch.cuda.graph_pool_handle(); then they share the stream too, because memory that was freed on one
    is not handed out on another. With `collectives` in the call, NCCL's threads may do meanwhile what may not be
    captured, and :func:`release_collectives` ends the graph.
    """
    replay = Replay(torch.cuda.CUDAGraph(), call)
    stream = stream or capture_stream(replay, device)
    for _ in range(warm_up):
        run_on(stream, call)
    options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local" if collectives else "global"}
    if collectives:
        _WITH_COLLECTIVES.add(replay)
    with phase("capture"), _no_collection(), torch.cuda.graph(replay.graph, **options):
        call()
    return replay


def release_collectives() -> None:
    """End every graph with collectives, before the process group does: NCCL waits for its graphs, even for ever."""
    for replay in list(_WITH_COLLECTIVES):
        replay.graph.reset()
