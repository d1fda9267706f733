"""Where a measurement was made: what every record in results/ carries."""

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__

PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "zstandard", "safetensors")


def environment(commit: str = "", *more: str) -> dict[str, Any]:
    """GPU, driver, versions, commit and date (UTC). `commit` is asked of git where it is not given, and `more` are
    packages whose versions matter too.
    """
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _gpu("driver_version"),
        "clocks": {"sm": _gpu("clocks.sm"), "sm_max": _gpu("clocks.max.sm"), "memory": _gpu("clocks.mem")},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {"klora": __version__} | {name: _version(name) for name in (*PACKAGES, *more)},
        "commit": commit or _output("git", "rev-parse", "HEAD") or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _gpu(field: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader") or None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
