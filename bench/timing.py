"""How long a call takes: interleaved rounds, medians, cold and warm caches, events and graph replay.

Every variant runs once in each round, in turn, so that drift of clocks and temperature meets all of them alike. A round
is timed by CUDA events on a GPU and by the processor's clock elsewhere. Rounds go on until the spread (p80 - p20) / p50
of every variant is under 2%, or until the most rounds or seconds are spent; `is_steady` says which.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..model import graphs

TIMINGS = {"graph": "CUDA graph replay", "events": "CUDA events", "clock": "the processor's clock"}
"""How a call may be timed, what is preferred first."""

SPREAD = 0.02
LEAST_OF_SLOW = 3
"""Rounds of calls so slow that the seconds run out first."""
Thunk = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call over `rounds` rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @property
    def spread(self) -> float:
        return (self.p80 - self.p20) / self.p50

    @property
    def is_steady(self) -> bool:
        return self.rounds > 1 and self.spread < SPREAD


def time_interleaved(
    thunks: Mapping[str, Sequence[Thunk]],
    device: torch.device,
    least_rounds: int = 20,
    most_rounds: int = 200,
    warmup: int = 5,
    most_seconds: float = 20.0,
) -> dict[str, Times]:
    """Time each variant's thunks. One thunk is called again and again (warm); several are rotated through (cold).

    After `most_seconds` no round begins but the first LEAST_OF_SLOW, whatever `least_rounds` says.
    """
    started = time.perf_counter()
    for calls in thunks.values():
        for index in range(warmup):
            if not index or time.perf_counter() - started < most_seconds / 4:
                calls[index % len(calls)]()
    samples: dict[str, list[float]] = {name: [] for name in thunks}
    for number in range(most_rounds):
        for name, calls in thunks.items():
            samples[name].append(_milliseconds(calls[number % len(calls)], device))
        if number + 1 >= least_rounds and all(_summary(values).is_steady for values in samples.values()):
            break
        if number + 1 >= LEAST_OF_SLOW and time.perf_counter() - started > most_seconds:
            break
    return {name: _summary(values) for name, values in samples.items()}


def synchronized_clock() -> float:
    """Seconds, after all GPU work so far: the timer for pytest-benchmark."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _milliseconds(thunk: Thunk, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        thunk()
        return (time.perf_counter() - started) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    thunk()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def _summary(values: Sequence[float]) -> Times:
    if len(values) == 1:
        return Times(values[0], values[0], values[0], 1)
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Times(p20, statistics.median(values), p80, len(values))


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many input sets to rotate so that none is still in the L2 cache when its turn comes again."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-3 * cache // max(bytes_of_one, 1)) + 1))


def captured(thunk: Thunk, device: torch.device) -> Thunk:
    """`thunk` as the bare replay of one CUDA graph: nothing of Python's stands between two events but its launch."""
    return graphs.captured(thunk, device, warm_up=3).graph.replay


class Taken(NamedTuple):
    """Bytes of GPU memory: the most that was taken, and what still is."""

    peak: int
    kept: int


class MemoryWatch:
    """Watches what is allocated on `device` from its making on."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)

    def taken(self) -> Taken | None:
        """On top of what was allocated before; None without a GPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        now = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_allocated(self.device)
        return Taken(*(amount - self.before for amount in now))


def peak_bytes(thunk: Thunk, device: torch.device) -> int | None:
    """Most memory that one call of `thunk` allocates on top of what is allocated before it; None without a GPU."""
    watch = MemoryWatch(device)
    thunk()
    taken = watch.taken()
    return None if taken is None else taken.peak
