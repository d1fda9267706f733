"""Kernels compiled side by side before a benchmark, which would compile one after another as it launches them."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ..cli.console import Output
from ..cli.warm import Work, compile_missing, record
from .gate import why_broken


def compiled_ahead(run: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """For a record: how many kernels `run()` launches, how many Triton's cache lacked and has now, and the seconds.

    Nothing is launched. Empty without a GPU. Whatever goes wrong is said, and the benchmark compiles what it launches.
    """
    if device.type != "cuda":
        return {}
    began, output = time.perf_counter(), Output()
    try:
        found = compile_missing(record(Work({}, run), device), output)
    except Exception as error:
        output.warn(f"kernels were not compiled ahead: {why_broken(error)}")
        return {"failed": [why_broken(error)]}
    del found["cache"]  # a place of this machine
    return found | {"seconds": time.perf_counter() - began}
