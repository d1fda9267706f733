"""Where the time of an entry goes: a PyTorch-profiler trace, a table of kernels, and ranges for nsys and ncu.

The measured calls run between cudaProfilerStart and cudaProfilerStop, after warm-up, so that
`nsys profile --capture-range=cudaProfilerApi` records them alone. Trace and nsys exclude each other: both use CUPTI.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..model.ranges import ranges_on
from ..model.storage import replacing
from .entry import Entry, Shape
from .timing import synchronized_clock

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class KernelRow:
    """One kernel (an operator where there is no GPU): calls, milliseconds and share of a call, bytes where known."""

    name: str
    calls: float
    ms: float
    share: float
    bytes: int | None
    percent_of_floor: float | None
    """100 * (bytes / copy rate) / time, where the bytes are known."""


@dataclass(frozen=True)
class Profile:
    """Milliseconds by wall clock of one call, share of them in which the device was busy, kernels by time."""

    ms: float
    busy: float
    floor_ms: float
    kernels: list[KernelRow]
    trace: Path | None


def profile_entry(
    entry: Entry,
    variant: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Mapping[str, float],
    trace: Path | None,
    calls: int = 3,
    warmup: int = 2,
) -> Profile:
    """Run one variant of `entry` at `shape` and see where its time goes.

    With `trace`, a Chrome trace is written there and the kernels are taken from it; without, nothing watches but what
    was started outside. KeyError for a variant that is not present.
    """
    chosen = {v.name: v for v in entry.present(device)}[variant]
    inputs = entry.draw(shape, device, dtype, torch.Generator(device).manual_seed(1))
    call = chosen.build(shape, device, dtype)
    for _ in range(warmup):
        call(*inputs)
    floor = entry.bytes(shape, dtype.itemsize) / ceilings["bytes_per_second"]
    floor = 1e3 * max(floor, entry.flops(shape) / ceilings["flops_per_second"])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    watcher = profile(activities=activities) if trace else nullcontext()
    with ranges_on(), watcher:
        ms = _measured(lambda: call(*inputs), calls, device)
    kernels: list[KernelRow] = []
    if trace:
        with replacing(trace) as temporary:
            watcher.export_chrome_trace(str(temporary))
        kernels = kernel_table(_device_events(trace) if device.type == "cuda" else _operators(watcher), calls, ceilings)
    busy = sum(row.ms for row in kernels) / ms
    return Profile(ms, busy, floor, kernels, trace)


def kernel_table(
    events: Iterator[tuple[str, int, float, int | None]], calls: int, ceilings: Mapping[str, float]
) -> list[KernelRow]:
    """Rows by falling time from (name, count, microseconds, bytes or None) of `calls` calls."""
    counts: dict[str, int] = {}
    times: dict[str, float] = {}
    moved: dict[str, int | None] = {}
    for name, count, microseconds, size in events:
        counts[name] = counts.get(name, 0) + count
        times[name] = times.get(name, 0.0) + microseconds
        moved[name] = None if size is None else (moved.get(name) or 0) + size
    total = sum(times.values()) or 1.0
    rows = []
    for name in sorted(times, key=times.__getitem__, reverse=True):
        size, ms = moved[name], times[name] / 1e3 / calls
        known = size is not None and ms > 0
        percent = 100 * (size / calls / ceilings["bytes_per_second"] * 1e3) / ms if known else None
        per_call = size // calls if size is not None else None
        rows.append(KernelRow(name, counts[name] / calls, ms, times[name] / total, per_call, percent))
    return rows


def _measured(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds of one call, between cudaProfilerStart and cudaProfilerStop on a GPU."""
    with _profiler_api(device):
        started = synchronized_clock()
        for _ in range(calls):
            call()
        return (synchronized_clock() - started) * 1e3 / calls


@contextmanager
def _profiler_api(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
    try:
        yield
    finally:
        torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())


def _device_events(trace: Path) -> Iterator[tuple[str, int, float, int | None]]:
    """Kernels, copies and fills of a Chrome trace. Copies and fills say their bytes; a copy reads and writes them."""
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") in DEVICE_EVENTS:
            size = event["args"].get("bytes")
            both_ways = 2 if event["cat"] == "gpu_memcpy" else 1
            yield event["name"], 1, event["dur"], None if size is None else both_ways * size


def _operators(watcher: profile) -> Iterator[tuple[str, int, float, int | None]]:
    """Operators of the CPU by the time spent in themselves."""
    for average in watcher.key_averages():
        if average.self_cpu_time_total > 0 and not average.key.startswith("klora::"):
            yield average.key, average.count, average.self_cpu_time_total, None
