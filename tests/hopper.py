"""Kernels recorded and compiled for Hopper on a machine without a GPU, in a process where Triton is itself.

Code that a test runs as `python -c` in this folder, without TRITON_INTERPRET, calls :func:`pretend` first.
"""

import os
import subprocess
import sys
from pathlib import Path

from klora.kernels import dispatch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NoGPU:
    """As much of a driver as recording and compiling ask of it."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


def pretend() -> None:
    """Kernels can be asked for on CPU tensors; none can be launched."""
    driver._active, dispatch.INTERPRETED = NoGPU(), True


def compiled_for_hopper(code: str) -> str:
    """What `code` prints. AssertionError, with what it says, where it ends with another status than 0."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
