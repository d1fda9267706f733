"""The entries under pytest-benchmark: `pytest bench/ --benchmark-only`, with its JSON output and comparison.

Each test is one variant of one entry at one shape; it is timed only after the entry's gate is green. Without a GPU the
toy shapes run.
"""

import functools

import pytest
import torch
from klora.bench.gate import check
from klora.bench.groups import entries_of
from klora.bench.timing import synchronized_clock
from klora.model.config import TrainConfig
from klora.model.parallel import pick_device
from klora.model.placement import compute_dtype

DEVICE = pick_device()
DTYPE = compute_dtype(TrainConfig(), DEVICE)
IS_TOY = DEVICE.type == "cpu"


@functools.cache
def green_gate(entry) -> bool:
    check(entry, entry.toy if IS_TOY else entry.gate or next(iter(entry.shapes.values())), DEVICE, DTYPE)
    return True


def cases():
    for entry in entries_of([]):
        for name, shape in ({"toy": entry.toy} if IS_TOY else entry.shapes).items():
            for variant in entry.present(DEVICE):
                marks = pytest.mark.benchmark(group=f"{entry.op} {name}", timer=synchronized_clock)
                yield pytest.param(entry, shape, variant, id=f"{entry.op}-{name}-{variant.name}", marks=marks)


@pytest.mark.parametrize(("entry", "shape", "variant"), cases())
def test_speed(benchmark, entry, shape, variant):
    assert green_gate(entry)
    inputs = entry.draw(shape, DEVICE, DTYPE, torch.Generator(DEVICE).manual_seed(1))
    call = variant.build(shape, DEVICE, DTYPE)
    if entry.once:
        benchmark.pedantic(call, inputs, rounds=1, iterations=1)
    else:
        benchmark(call, *inputs)
