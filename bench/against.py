"""Two commits side by side: this source and another revision, in turns, so that both meet the same machine.

The revision is checked out into a temporary worktree and imported from there. Every turn is a process of its own that
runs `klora bench`; a result's time is the median over turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import KloraError
from .record import result_key

SUBPACKAGES = ("kernels", "model", "lora", "ttt", "bench", "cli")


class RevisionError(KloraError, ValueError):
    """A revision that cannot be measured, and why."""


@dataclass(frozen=True)
class Comparison:
    """Median milliseconds of one result here and at the other revision."""

    name: str
    here: float
    there: float

    @property
    def ratio(self) -> float:
        """Above 1 where this source is slower."""
        return self.here / self.there


def compare(revision: str, groups: Sequence[str], options: Sequence[str], turns: int = 3) -> list[Comparison]:
    """Run `klora bench GROUPS OPTIONS` here and at `revision` alternately; results that both have, in this one's order.

    Raises RevisionError where git does not know the revision, or its benchmarks fail.
    """
    here: dict[tuple[str, ...], list[float]] = {}
    there: dict[tuple[str, ...], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, _worktree(revision, Path(folder)) as packages:
        for _ in range(turns):
            for times, path in ((here, None), (there, packages)):
                for key, ms in _run([*groups, *options], path, revision).items():
                    times.setdefault(key, []).append(ms)
    return [
        Comparison(" ".join(key), statistics.median(times), statistics.median(there[key]))
        for key, times in here.items()
        if key in there
    ]


@contextmanager
def _worktree(revision: str, folder: Path):
    """A folder for PYTHONPATH in which `klora` is the source at `revision`."""
    tree = folder / "tree"
    done = _git("worktree", "add", "--detach", str(tree), revision)
    if done.returncode:
        raise RevisionError(f"git cannot check out {revision!r}: {done.stderr.strip().splitlines()[-1]}")
    try:
        package = folder / "packages" / "klora"
        package.mkdir(parents=True)
        for source in (*(tree / "src/klora").glob("*"), *(tree / name for name in SUBPACKAGES)):
            if source.exists():
                (package / source.name).symlink_to(source)
        # A revision from before src/klora has none; without one the installed klora would go first.
        (package / "__init__.py").touch()
        if not (package / "bench" / "record.py").exists():
            raise RevisionError(f"{revision!r} has no benchmark harness to run; allowed: a later revision")
        yield package.parent
    finally:
        _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)


def _run(arguments: Sequence[str], packages: Path | None, revision: str) -> dict[tuple[str, ...], float]:
    """Medians by result of one `klora bench` in a new process; `packages` is where it finds klora."""
    environment = dict(os.environ)
    if packages is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(packages), environment.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "klora.cli", "bench", *arguments, "--json", "--out", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        where = "here" if packages is None else f"at {revision!r}"
        raise RevisionError(f"klora bench failed {where}: {(done.stderr or done.stdout).strip()[-500:]}")
    records = json.loads(done.stdout)["records"]
    return {result_key(result): result["ms"]["p50"] for record in records for result in record["results"]}
