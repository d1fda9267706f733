"""A call as the replay of a CUDA graph.

Shapes and addresses are those of the capture: whoever replays writes into the tensors that the call reads. A call must
have run before it is captured, so that its kernels are compiled and its state exists, and on another stream than the
default one, which cannot be captured.
"""

from collections.abc import Callable
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
) -> Replay:
    """`call` as the replay of one graph, after `warm_up` runs of it.

    Both take place on `stream`, or on one of their own. Graphs that never run at the same time may share the memory of
    a `pool`, from torch.cuda.graph_pool_handle(); then they share the stream too, because memory that was freed on one
    is not handed out on another.
    """
    stream = stream or torch.cuda.Stream(device)
    for _ in range(warm_up):
        run_on(stream, call)
    graph = torch.cuda.CUDAGraph()
    with phase("capture"), torch.cuda.graph(graph, pool=pool, stream=stream):
        call()
    return Replay(graph, call)
