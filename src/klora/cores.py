"""The cores that this process may use, which are few in many a container, and threads that give them away in time."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SPINS = "1000"
"""Turns that a thread of OpenMP waits for the others before it sleeps, of GNU's 300,000: four scorings started by hand
on two cores took 32 s, and alone one takes as long as before."""


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on and that its control groups pay for, at least 1. `root` holds proc and sys.

    Example: threads = usable_cores()
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Seconds of processor time a second of every control group above this process that limits it, in either version.

    A container sees its own group where others see the root, and under the path that it has outside.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            for group in {mount, *(mount / part for part in _above(path.strip("/")))}:
                with suppress(OSError, ValueError):
                    yield _quota(group, is_second=not controllers)


def _above(path: str) -> list[str]:
    """A path and the paths above it."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _quota(group: Path, is_second: bool) -> float:
    """A control group's share, in cores. ValueError where it has no limit, OSError where it has no such files."""
    if is_second:
        quota, period = (group / "cpu.max").read_text().split()
    else:
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) <= 0:
        raise ValueError("no limit")
    return max(1.0, int(quota) / int(period))


def spin_less() -> None:
    """Let threads that wait give their core away soon, unless the environment says otherwise. To be called before torch
    is imported, which reads it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
