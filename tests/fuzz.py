"""Mutated files of every format that klora reads, each opened as a command opens it: `make fuzz`.

    python tests/fuzz.py --count 1000000

A case is a number: with the seed it says which file of which target is changed, and how. Half of the changes go behind
hashes, sizes and the syntax of JSON and protobuf, which are made right again, since blind ones stop there. A file may
be refused by an error for users (KloraError, OSError), in a sentence that can be shown, or be read. What is none of
both is a finding: another exception, a crash, over SECONDS of work or waiting, or more memory than the target declares.
Findings are kept with their files; the exit status is 1.

Cases run in processes that live on, some hundreds a second in each. Limits are lowered (see LIMITS), so that small
files reach them. A process that crashes or hangs is started again behind its case.
"""

import argparse
import ctypes
import gc
import logging
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from fuzzing.originals import Files, made_files
from fuzzing.targets import LIMITS, TARGETS
from klora.cli.console import printable
from klora.errors import KloraError

ROOT = Path(__file__).parents[1]
SECONDS = 2.0
STUCK = 30.0
"""Seconds on the clock after which a process that has not ended its case is stopped."""
SPARE = 32 << 20
"""Bytes beside what a target declares: caches of allocators, code that is loaded at first use."""
ADDRESSES = 6 << 30
"""Bytes of address space beyond the start: what asks for more gets a MemoryError, which is a finding."""


@dataclass(frozen=True)
class Plan:
    """Which cases there are, and where what is found is kept."""

    first: int
    end: int
    seed: int
    processes: int
    only: Sequence[str]
    found: Path

    def drawn(self, number: int) -> tuple[random.Random, str]:
        """The random numbers of a case, and its target."""
        draw = random.Random(f"{self.seed} {number}")
        return draw, draw.choices(list(self.only), [TARGETS[name].share for name in self.only])[0]

    def keep(self, folder: Path, number: int, wrong: str) -> None:
        """Copy a case's files beside what is wrong with it."""
        name = self.drawn(number)[1]
        place = self.found / f"{name}-{number}"
        shutil.copytree(folder / name, place, dirs_exist_ok=True)
        (place / "finding.txt").write_text(wrong)
        last = wrong.strip().splitlines()[-1][:300]
        print(f"\nfuzz: case {number}, {name}: {last}; kept in {place}", flush=True)


def peak_bytes(reset: bool = False) -> int:
    """The most bytes that were resident in this process since the last reset; of a reset, those that are now."""
    if reset:
        with open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"5")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _give_back() -> None:
    """Free memory to the system: a file would take it without being seen."""
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _seconds() -> tuple[float, float]:
    """(CPU time of this process, time on the clock without that in which it waited for a processor)."""
    with open("/proc/self/schedstat", "rb", buffering=0) as file:
        queued = int(file.read().split()[1])
    return time.process_time(), time.monotonic() - queued / 1e9


def opened(case: Iterator[None]) -> str:
    """How it ends to open a file: "read", or "refused" by a sentence that can be shown."""
    try:
        next(case, None)
    except (KloraError, OSError) as error:
        printable(str(error)).encode()
        return "refused"
    return "read"


def run_case(files: Files, folder: Path, plan: Plan, number: int, tries: int = 2) -> tuple[str, str, str]:
    """(name of its target, how it ended, what is wrong with it or nothing) of one case.

    One that only waited is tried again: a machine that reads evicted pages back delays any file, a file that makes its
    reader wait does so each time.
    """
    draw, name = plan.drawn(number)
    target, place, outcome, wrong = TARGETS[name], folder / name, "", ""
    place.mkdir(parents=True, exist_ok=True)
    case = target.open(files, place, draw)
    next(case)
    _give_back()
    resident, (cpu, clock) = peak_bytes(reset=True), _seconds()
    try:
        outcome = opened(case)
    except Exception:
        wrong = traceback.format_exc()
    cpu, clock = (now - before for now, before in zip(_seconds(), (cpu, clock), strict=True))
    taken = peak_bytes() - resident
    if not wrong and cpu <= SECONDS < clock and tries > 1:
        return run_case(files, folder, plan, number, tries - 1)
    if not wrong and max(cpu, clock) > SECONDS:
        wrong = f"it took {cpu:.1f} s of CPU time, {clock:.1f} s on the clock"
    if not wrong and taken > target.bytes + SPARE:
        wrong = f"it took {taken:,} bytes and {target.bytes:,} are declared"
    return name, "findings" if wrong else outcome, wrong


OUTCOMES = "read", "refused", "findings"


class Worker:
    """A process that runs every n-th case, and what it says of them in memory that both share."""

    def __init__(self, plan: Plan, files: Files, folder: Path, first: int):
        self.plan, self.files, self.folder = plan, files, folder
        self.context = multiprocessing.get_context("fork")
        self.at = self.context.RawArray("d", 2)
        """The number of the case that runs, or -1, and when it began."""
        self.counts = self.context.RawArray("q", len(OUTCOMES) * len(plan.only))
        """Of each target by outcome."""
        self.start(first)

    def start(self, first: int) -> None:
        self.at[:] = first, time.monotonic()
        self.process = self.context.Process(target=self.work, args=(first,), daemon=True)
        self.process.start()

    def work(self, first: int) -> None:
        torch.set_num_threads(1)
        gc.freeze()  # what was imported is looked through no more
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in range(first, self.plan.end, self.plan.processes):
            self.at[:] = number, time.monotonic()
            name, outcome, wrong = run_case(self.files, self.folder, self.plan, number)
            if wrong:
                self.plan.keep(self.folder, number, wrong)
            self.add(name, outcome)
        self.at[0] = -1

    def add(self, name: str, outcome: str) -> None:
        self.counts[len(OUTCOMES) * self.plan.only.index(name) + OUTCOMES.index(outcome)] += 1

    def goes_on(self) -> bool:
        """Whether there is more to wait for. A process that crashed or hung is started again behind its case."""
        is_alive = self.process.is_alive()  # first: one that ends now has said so before
        number, is_stuck = int(self.at[0]), time.monotonic() - self.at[1] > STUCK
        if is_alive:
            if number < 0 or not is_stuck:
                return True
            self.process.kill()
        self.process.join()
        if number < 0:
            return False
        hung = is_stuck and self.process.exitcode == -signal.SIGKILL
        self.plan.keep(
            self.folder, number, f"it hung for {STUCK:.0f} s" if hung else f"exit status {self.process.exitcode}"
        )
        self.add(self.plan.drawn(number)[1], "findings")
        if number + self.plan.processes >= self.plan.end:
            return False
        self.start(number + self.plan.processes)
        return True


def fuzz(
    count: int,
    seed: int = 0,
    processes: int = 1,
    only: Sequence[str] = tuple(TARGETS),
    found: Path | None = None,
    first: int = 0,
    say: Callable[[str], None] = print,
) -> int:
    """Run cases `first` to `first + count`; how many of them are findings. They are kept in `found`."""
    logging.getLogger("klora").addHandler(logging.NullHandler())
    plan = Plan(first, first + count, seed, processes, only, found or Path(tempfile.mkdtemp(prefix="klora-fuzz-")))
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    limits = {f"KLORA_{name}": str(value) for name, value in LIMITS.items()}
    with mock.patch.dict(os.environ, limits), tempfile.TemporaryDirectory(dir=memory) as scratch:
        files = made_files(Path(scratch))
        workers = [Worker(plan, files, Path(scratch) / f"worker-{i}", first + i) for i in range(min(processes, count))]
        return _watched(workers, plan, say)


def _watched(workers: Sequence[Worker], plan: Plan, say: Callable[[str], None]) -> int:
    """Wait for all workers, say how far they are and at the end what came of each target; the number of findings."""
    count, running = plan.end - plan.first, list(workers)
    started = said = time.monotonic()
    while running:
        time.sleep(0.05)
        running = [worker for worker in running if worker.goes_on()]
        if time.monotonic() - said > 10 or not running:
            said = time.monotonic()
            totals = np.sum([worker.counts for worker in workers], axis=0).reshape(-1, len(OUTCOMES))
            done, findings = int(totals.sum()), int(totals[:, -1].sum())
            rate = done / (said - started)
            left = (count - done) / rate / 60 if rate else math.inf
            say(f"fuzz: {done:,} of {count:,} files, {rate:,.0f}/s, {findings} findings, {left:,.0f} min left")
    for name, numbers in zip(plan.only, totals.tolist(), strict=True):
        outcomes = ", ".join(f"{number:,} {outcome}" for number, outcome in zip(numbers, OUTCOMES, strict=True))
        say(f"  {name}: {sum(numbers):,} files, {outcomes}")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="files to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: with --count 1, that one again")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; repeatable")
    parser.add_argument("--found", type=Path, default=ROOT / "runs" / "fuzz", help="where findings are kept")
    given = parser.parse_args()
    only = given.target or tuple(TARGETS)
    findings = fuzz(given.count, given.seed, given.processes, only, given.found, given.first)
    where = f" in {given.found}" if findings else ""
    print(f"fuzz: {given.count:,} files of {len(only)} formats, {findings} findings{where}")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
