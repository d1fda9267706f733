"""What a call costs the host: remembered launches are Triton's own, calls are few, and the measurement of it."""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import ROOT, replayed
from klora.bench.host import LIMITS, host_time, measured, rows
from klora.kernels import causal_attention, int6_linear, lora_linear, quantize_int6
from klora.kernels.launch import launched
from triton.runtime.jit import JITFunction

CALLS = {"rms_norm": (86, 225), "linear": (104, 245), "lora_linear": (272, 592)}
"""Python's calls, those of C functions included, of a forward, and of a forward and backward."""


@pytest.fixture(scope="module")
def without_a_gpu() -> dict:
    """What tests/launches.py found: it fails where a remembered launch is another than Triton's."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.launches"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_remembered_launch_is_the_one_that_triton_would_make(without_a_gpu):
    assert without_a_gpu["remembered"] > 20 and without_a_gpu["gluon"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
def test_an_op_makes_few_calls_on_the_host(without_a_gpu, op):
    """A count, where a time would say how busy the machine is. Versions of PyTorch and Triton differ by a few calls."""
    for made, known in zip(without_a_gpu["calls"][op], CALLS[op], strict=True):
        assert made <= 1.1 * known


@pytest.mark.slow
def test_no_launch_of_an_op_takes_triton_s_own_way_twice(without_a_gpu):
    found = without_a_gpu["rows"]
    assert set(found) == set(rows(torch.device("cpu"), torch.float32))
    assert all(first for first, _ in found.values())
    assert {name: second for name, (_, second) in found.items() if second} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("op", rows(torch.device("cpu"), torch.float32))
@pytest.mark.slow
def test_no_launch_of_an_op_takes_triton_s_own_way_twice_on_a_gpu(op):
    from launches import forward_and_backward, launches_of_triton  # whose import turns the interpreter off

    row = rows(torch.device("cuda"), torch.bfloat16)[op]
    forward_and_backward(row)
    with launches_of_triton(JITFunction.run) as seen:
        forward_and_backward(row)
    assert seen == []


def test_nothing_changes_where_triton_is_not_the_compiler(monkeypatch):
    interpreted = object()
    assert launched(interpreted) is interpreted
    monkeypatch.setattr("klora.kernels.launch.IS_KNOWN", False)

    def kernel(x_ptr):
        """Of another version of Triton."""

    other = JITFunction(kernel)
    assert type(launched(other)) is JITFunction


def test_every_kernel_that_takes_a_descriptor_is_launched_so():
    """Else a thread could begin with a tensor map. The kernels of Newton-Schulz's edges take none."""
    plain, used = set(), set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
            if any("jit" in decorator for decorator in decorators):
                used |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                plain |= {node.name} if "launched" not in decorators else set()
    assert plain - used == {"_measure", "_inverse_norm", "_fill", "_apply"}


def test_the_least_of_all_rounds_counts_and_the_gpu_is_not_awaited(monkeypatch):
    now = iter([0.0, 4e-6, 6e-6, 10.0, 10.0 + 2e-6, 10.0 + 6e-6])
    monkeypatch.setattr("klora.bench.host.time.perf_counter", lambda: next(now))
    made = []
    assert host_time(lambda: made.append(1), torch.device("cpu"), calls=2, rounds=2) == {"us": 1.0, "waited": 2.0}
    assert len(made) == 10 + 2 * 2


def test_every_row_runs_and_is_compared_on_the_same_leaves():
    torch.manual_seed(0)
    device = torch.device("cpu")
    for name, row in rows(device, torch.float32).items():
        ours, theirs = row.klora(*row.leaves), row.eager(*row.leaves)
        if name != "int6_linear":  # of another weight
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    found = measured(rows(device, torch.float32)["rms_norm"], device, calls=1, rounds=1)
    assert set(found) == {"without gradient", *LIMITS} and all(set(of) == {"klora", "eager"} for of in found.values())


@pytest.mark.gpu
def test_a_remembered_launch_gives_the_bits_of_the_first_and_can_be_captured():
    x, weight, a, b = (
        torch.randn(*s, device="cuda").bfloat16() for s in ((2, 40, 64), (64, 64), (2, 16, 64), (2, 64, 16))
    )
    lora_linear(x, weight, a, b)
    first = lora_linear(x, weight, a, b).clone()
    for _ in range(3):
        assert torch.equal(lora_linear(x, weight, a, b), first)
    (out,), replay = replayed(lambda: [lora_linear(x, weight, a, b)])
    replay()
    assert torch.equal(out, first)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16 and torch.equal(lora_linear(shifted, weight, a, b), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = lora_linear(x, weight, a, b)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, first)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["causal_attention", "int6_linear"])
def test_a_thread_may_begin_with_a_launch(op):
    """All of its memory comes from PyTorch's cache, so nothing gives it a CUDA context before the first tensor map."""
    if op == "causal_attention":
        given = [torch.randn(2, 128, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2)]
        call = partial(causal_attention, *given)
    else:  # on Hopper by its kernel of many rows, which takes descriptors
        weight = quantize_int6(torch.randn(4096, 4096, device="cuda"))
        call = partial(int6_linear, torch.randn(400, 4096, device="cuda").bfloat16(), weight)
    first = call()
    call()
    torch.cuda.synchronize()
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(call).result(), first)
