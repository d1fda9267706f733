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

from ..kernels.linear.turns import takes
from ..model.config import ModelConfig
from ..model.ranges import ranges_on
from ..model.storage import replacing
from .entry import Entry, Shape
from .step import model_config
from .timing import synchronized_clock
from .waterfall import times_in_step

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class KernelRow:
    """One kernel (an operator where there is no GPU): what a call launches and takes, bytes and FLOPs where known."""

    name: str
    calls: float
    ms: float
    share: float
    bytes: int | None
    flops: int | None
    percent_of_floor: float | None
    """100 * the larger of bytes / copy rate and FLOPs / GEMM rate / time; None: neither is known."""


@dataclass(frozen=True)
class Work:
    """What all launches of a kernel in one call do at least: FLOPs, and bytes through device memory."""

    launches: int
    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.launches + other.launches, self.flops + other.flops, self.bytes + other.bytes)


def step_work(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """Kernel -> its work in klora's training step of `shape`, by the network: products, attention, residual, head.

    Products of weight gradients are cuBLAS's, whose kernels' names say nothing of what they multiply.
    """
    config, size = model_config(shape), dtype.itemsize
    tokens, width, hidden, blocks = shape["B"] * shape["S"], config.width, config.mlp_hidden, config.blocks
    queries, keys, _ = config.qkv_sizes
    stacked = queries + 2 * keys
    rows = torch.empty(tokens, 1, dtype=dtype, device=device)

    def product(inputs: int, outputs: int, reads: int = 0) -> Work:
        moved = tokens * (inputs + outputs + reads) + inputs * outputs
        return Work(1, 2 * tokens * inputs * outputs, size * moved)

    plain = [product(width, queries), product(width, hidden), product(stacked, width)]
    # Outputs and head size of products that warps in turns may make; what they end in reads more.
    turning = [
        (stacked, config.head_dim, product(width, stacked)),
        (hidden, 0, product(width, hidden, reads=hidden)),
        (width, 0, product(queries, width, reads=width)),
        (width, 0, product(hidden, width, reads=width)),
        (width, 0, product(hidden, width, reads=2 * width)),
    ]
    work: dict[str, Work] = {}

    def add(name: str, times: int, one: Work) -> None:
        many = Work(times * one.launches, times * one.flops, times * one.bytes)
        work[name] = work[name] + many if name in work else many

    for one in plain:
        add("_product_kernel", blocks, one)
    add("_product_kernel", 1, product(config.vocab_size, width))  # the head's, to its input
    for outputs, head_dim, one in turning:
        add("_product" if takes(rows, outputs, head_dim) else "_product_kernel", blocks, one)

    square = shape["B"] * shape["S"] ** 2 * queries  # FLOPs of a product over the causal half
    for name, products, of_queries, of_keys in (
        ("_forward_kernel", 2, 2, 2),
        ("_dq_kernel", 3, 4, 2),
        ("_dkdv_kernel", 4, 2, 4),
    ):
        add(name, blocks, Work(1, products * square, size * tokens * (of_queries * queries + of_keys * keys)))

    sweep = product(width, config.vocab_size)
    add("_sweep", 1, sweep)

    tensors = residual_tensors(config)
    joined = Work(0, 0, size * tokens * width * tensors.pop("joined"))
    add("_product" if takes(rows, width, 0) else "_product_kernel", 1, joined)
    for name, count in tensors.items():
        launches = 2 if name == "forward" else blocks + 1
        add(name, 1, Work(launches, 0, size * tokens * width * count + 4 * tokens * launches))
    return work


def residual_tensors(config: ModelConfig) -> dict[str, int]:
    """Kernel of the residual stream -> tensors [B, S, D] that all its launches in a step read or write.

    They are the boundaries of blocks, forward the first and the last: those between blocks are "joined" with the
    product before, which reads x0 and what is joined and writes the stream before the mix, besides what it would
    without. A backward reads dn, dx and n, or x in its place, and writes dx; with a mix x0, and dx0, which all but one
    boundary add to; what else its sums want is made of n, but in fp32, which reads x. A push adds its gradient, a join
    what it reads and its gradient. The first norm's x is x0; the last one's is not written.
    """
    blocks, pushes = config.blocks, config.blocks // 2
    joins, mixed = times_in_step(config)["residual_norm_joined_trained"], blocks - 1
    pushed = max(pushes - 1, 0)
    return {
        "forward": 3 + 2,
        "joined": 2 * mixed + joins,
        "backward": 7 + 7 * mixed - (mixed > 0) + pushed + 2 * joins + 3,
    }


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
    work: Mapping[str, Work] | None = None,
) -> Profile:
    """Run one variant of `entry` at `shape` and see where its time goes. `work` is that of kernels that are known.

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
        events = _device_events(trace) if device.type == "cuda" else _operators(watcher)
        kernels = kernel_table(events, calls, ceilings, work)
    busy = sum(row.ms for row in kernels) / ms
    return Profile(ms, busy, floor, kernels, trace)


def kernel_table(
    events: Iterator[tuple[str, int, float, int | None]],
    calls: int,
    ceilings: Mapping[str, float],
    work: Mapping[str, Work] | None = None,
) -> list[KernelRow]:
    """Rows by falling time from (name, count, microseconds, bytes or None) of `calls` calls.

    `work` is believed where a call launches the kernel as often as it says.
    """
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
        ms, launches = times[name] / 1e3 / calls, counts[name] / calls
        known = (work or {}).get(name)
        if known is not None and known.launches == launches:
            size, flops = known.bytes, known.flops
        else:
            size, flops = None if moved[name] is None else moved[name] // calls, None
        percent = None
        if size is not None and ms > 0:
            floor = max(size / ceilings["bytes_per_second"], (flops or 0) / ceilings["flops_per_second"])
            percent = 100 * 1e3 * floor / ms
        rows.append(KernelRow(name, launches, ms, times[name] / total, size, flops, percent))
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
