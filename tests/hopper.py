"""Of tests for Hopper: how many rows fill a GPU, and kernels recorded and compiled on a machine without one, in a
process where Triton is itself.

Code that a test runs as `python -c` in this folder, without TRITON_INTERPRET, calls :func:`pretend` first.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from klora.kernels import dispatch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

MULTIPROCESSORS = 132
"""Of an H200, for which the sizes of tests on a GPU are chosen."""
TILES_EACH = 6
"""Of a program where a GPU has fewer: of two groups of warps that take turns each has three, so that a barrier's phase
has been both."""
TILE = 128


def for_this_gpu(rows: int, outputs: int, processors: int | None = None) -> int:
    """`rows` of a product [rows, outputs], or as many fewer as leave TILES_EACH tiles a program, the last one as full.

    `processors` are the GPU's. Fewer than an H200 has they are under compute-sanitizer (:mod:`sanitized`).
    """
    processors = processors or dispatch.multiprocessors(torch.device("cuda", torch.cuda.current_device()))
    if processors >= MULTIPROCESSORS:
        return rows
    blocks = dispatch.cdiv(TILES_EACH * processors, dispatch.cdiv(outputs, TILE))
    return min(rows, blocks * TILE - -rows % TILE)


def few(count: int, most: int, processors: int | None = None) -> int:
    """`count` of tokens or runs; `most` at most where a GPU seems to have few multiprocessors, as for a tool's sake."""
    processors = processors or dispatch.multiprocessors(torch.device("cuda", torch.cuda.current_device()))
    return count if processors >= MULTIPROCESSORS else min(count, most)


class NoGPU:
    """As much of a driver as recording and compiling ask of it."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


def pretend() -> None:
    """Kernels can be asked for on CPU tensors; none can be launched."""
    driver._active, dispatch.INTERPRETED = NoGPU(), True


def compiled_for_hopper(code: str, *arguments: str) -> str:
    """What `code` prints, with these in sys.argv[1:]. AssertionError, with what it says, where it ends with another
    status than 0.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, folder = [sys.executable, "-c", code, *arguments], Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SHUFFLED = re.compile(r"shfl\.sync\.\w+\.b32\s+(%\w+)")
MULTIPLIED = re.compile(r"mul(?:\.ftz)?\.f32\s+(%\w+)")
FUSED = re.compile(r"fma\.rn(?:\.ftz)?\.f32\s+%\w+, %\w+, %\w+, (%\w+);")
ADDED = re.compile(r"add(?:\.ftz)?\.f32\s+%\w+, (%\w+), (%\w+);")


def fused_with_another_lane(ptx: str) -> list[str]:
    """Additions of a product to what another lane holds that round once, or may: ptxas fuses what says no rounding.

    Of two lanes that add up each other's product each rounds the other's alone, so that their sums differ.
    """
    shuffled, products, found = set(), set(), []
    for line in map(str.strip, ptx.splitlines()):
        shuffled.update(SHUFFLED.findall(line))
        products.update(MULTIPLIED.findall(line))
        is_fused = not shuffled.isdisjoint(FUSED.findall(line))
        added = {term for terms in ADDED.findall(line) for term in terms}
        if is_fused or (added & shuffled and added & products):
            found.append(line)
    return found
