"""compute-sanitizer over the GPU tests of the kernels: `make sanitize`.

    memcheck   reads and writes outside an allocation, and misaligned ones
    racecheck  hazards between threads of a block in shared memory
    synccheck  barriers that not all threads reach
    initcheck  reads of global memory that nothing has written

They run in this order, of each file some tests before the rest of any: what a limit of time cuts is worth least.

Tests run without PyTorch's caching allocator: with it an access past a tensor's end falls into its neighbour and is not
seen. Graphs cannot be captured without it, so tests of graphs are left out, and those that compile, compare speed,
repeat what others have run for its bits or its statistics, or take gigabytes; of a test with parameters run as many
cases as have each value of each parameter once. `--whole` leaves nothing out. Each file is dealt in parts, each a
process of its own.

A tool slows down all that runs on a GPU, so a test there runs little but our kernels, and few tiles of them: most of
what ours are compared with is computed on the CPU, and the GPU seems to have few multiprocessors (:mod:`sanitized`).
How exact ours are, and at which sizes, is the suite's matter; here it is what they read and write.

A finding in a kernel of ours, or in none, fails the run, and so does a test that fails. Findings in other kernels are
named and fail nothing: cuBLAS lives by the copy engine (TMA) and its barriers, which the tools know in part. For the
same reason some of ours may have findings; KNOWN says which and why. A kernel that memcheck ends, whosever it is, also
fails its test. memcheck, synccheck and initcheck watch all kernels: initcheck would take what one that is left out has
written for unwritten. racecheck watches ours alone: of PyTorch's it lost track of launches in one process of ten, in
some tests whenever they ran, and it takes several times as long with them. What crashes or runs out of memory beside
other processes runs once more, alone.

A run may be made in several, racecheck above all: what has passed in one is written to the file of `--passed`, and the
next leaves it out. It says nothing once a kernel has changed.

initcheck does not see what the copy engine stores through a tensor map (cp.async.bulk.tensor), up to version 2026.4:
what Triton's descriptors and most of cuBLAS write is unwritten to it. So it runs over PLAIN alone, unless --file names
another. In most other files results start as NaN (`empty_is_nan`), which finds an element that nothing wrote as well.

By NVIDIA's release notes, racecheck has fewer false findings about barriers with each version up to 2026.3.
`pip install nvidia-cuda-sanitizer-api` brings the newest, which is taken before the toolkit's; --sanitizer takes the
path of any.
"""

import argparse
import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from itertools import chain
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
"""What finds most first."""
COSTS = {"racecheck": 20, "memcheck": 5, "initcheck": 3, "synccheck": 3}
"""Seconds that a test takes at the mean, beside 8 to 15 others (bench/results/nvidia-h200/tuning/sanitizer-7.txt)."""
SHARE = 60
"""The most that a part costs: three tests by racecheck. Less, and processes would only start; more, and the last of
them would run alone, or be lost to a limit of time."""
FILES = (
    *("test_attention", "test_cached_attention", "test_columns", "test_contract", "test_elementwise"),
    *("test_embedding", "test_int6_linear", "test_linear_nll", "test_lora_adam"),
    *("test_lora_attention", "test_lora_dx_turns", "test_lora_head_nll", "test_lora_linear", "test_lora_linears"),
    *("test_lora_qkv", "test_lora_qkv_rope", "test_lora_swiglu_mlp", "test_lora_turns", "test_mlp", "test_muon"),
    *("test_newton_schulz", "test_qkv_attention", "test_residual_mlp", "test_residual_mlp_norm", "test_rotary"),
    "test_swiglu",
)
PLAIN = ("test_columns", "test_elementwise", "test_embedding", "test_lora_adam", "test_rotary")
"""Whose kernels, and what they are compared with, read and write by plain loads and stores alone."""
GRAPHS = ("graph", "captur", "compile", "opcheck", "symbols")
"""Captured, or made by a compiler, which traces nothing inside a mode of :mod:`sanitized`."""
REPEATED = ("twenty", "fifty", "thousand", "every_time", "every_batch", "every_run", "runs_and_batches")
REPEATED += ("depend_on_the_batch", "everything_is_written", "bits_of_no_mask", "not_finite_stays")
"""Their kernels run in other tests; what they add is that bits are equal, or many steps."""
LARGE = ("beyond_32_bits", "two_to_the_thirty", "vocabulary_of_a_large_model", "its_memory_is")
LARGE += ("logits_in_memory", "second_copy")
"""More than 4 GB, or a count of the bytes that the caching allocator holds."""
LEFT_OUT = " or ".join(GRAPHS + REPEATED + LARGE)

KNOWN: dict[str, dict[tuple[str, str], str]] = {
    "initcheck": {
        ("test_contract", "backward"): "of residual_mlp_norm: dn, x_in and x_out are stored through tensor maps",
    },
}
"""Of a tool: the file and the kernel of ours whose findings there have been explained, and how."""

REPORT = re.compile(r"(?<!=)={9}(?!=) ?(.*)")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
PLACE = re.compile(
    r"(?:\bat |\bin kernel |Device Frame: ?)`?(?:0x[0-9a-f]+ in )?(?:void )?(~?[A-Za-z_][\w:.$]*)(?=[+(<`])"
)
ASIDE = ("COMPUTE-SANITIZER", "Target application", "process didn't terminate")
"""What the tools say that is no finding."""
COPIED = re.compile(r"Uninitialized access to .* on access by (\w+) source")
"""By PyTorch, of a tensor: no kernel of ours copies so."""
NO_MEMORY = re.compile(r"out of memory|MEMORY_ALLOCATION|cudaErrorMemoryAllocation", re.IGNORECASE)
CRASH = re.compile(r"Internal Sanitizer Error")
CRASHED = "a crash of the tool"
ENDED = re.compile(r"Program hit .*(?:LaunchFailure|LAUNCH_FAILED)")
"""A finding where a kernel is named, too; else another process may have brought the GPU to it."""
OVER = re.compile(r"sanitized: ([\d.]+) s, (\w+): (.+?)(?=={9}|$)", re.MULTILINE)
"""A test's end, by :mod:`sanitized`. What a tool says may follow in the same line."""
UNNAMED, NOT_PRINTED = "no kernel", "not printed"
MOST_PRINTED = 100_000
"""Findings of a process. With fewer, those elsewhere would hide ours; with no limit, one fault would fill the disk."""
MOST_KEPT = 20
"""Of these, reports of a kernel that stay in the log; the rest are counted."""
SLOWEST = 5
"""Tests of a tool that are named at the end, and the seconds that they took."""
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(TESTS)}
SHOWN = " ".join(f"{name}={shlex.quote(value)}" for name, value in ENVIRONMENT.items())

NO_GPU = (
    "there is no CUDA GPU here, and compute-sanitizer watches kernels run on one; run `make sanitize` where there is"
)
NO_TOOL = (
    "compute-sanitizer was not found: `pip install nvidia-cuda-sanitizer-api`, 18 MB, brings the newest and is found; "
    "or give the path of one, such as the CUDA toolkit's, with --sanitizer"
)
say = partial(print, flush=True)


@cache
def ours() -> frozenset[str]:
    """Names of klora's kernels and device functions: what is decorated with triton.jit or gluon.jit."""
    found = set()
    for file in (TESTS.parent / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list):
                found.add(node.name)
    return frozenset(found)


@dataclass
class Found:
    """Findings by kernel: in ours, those of ours that are explained, elsewhere. `hindered`: by what other processes may
    have done to this one, or nothing.
    """

    here: Counter = field(default_factory=Counter)
    known: Counter = field(default_factory=Counter)
    elsewhere: Counter = field(default_factory=Counter)
    hindered: str = ""

    def __str__(self) -> str:
        parts = [f"{self.here.total()} findings in ours{_named(self.here)}"]
        parts += [f"{self.known.total()} explained{_named(self.known)}"] if self.known else []
        parts += [f"{self.elsewhere.total()} elsewhere{_named(self.elsewhere)}"] if self.elsewhere else []
        return ", ".join(parts)

    def add(self, other: "Found") -> None:
        for name in ("here", "known", "elsewhere"):
            getattr(self, name).update(getattr(other, name))


def _named(kernels: Counter) -> str:
    most = [f"{kernel} x{count}" for kernel, count in kernels.most_common(20)]
    return f" ({'; '.join(most)}{'; ...' if len(kernels) > 20 else ''})" if most else ""


@dataclass
class Report:
    """What a tool says of one finding. `lines`: their numbers in the output."""

    said: str
    lines: list[int]

    def places(self) -> list[str]:
        """The kernel and the device functions that it names."""
        named = PLACE.findall(self.said.replace("<unnamed>::", "").replace("(anonymous namespace)::", ""))
        return [name.rpartition("::")[2].rpartition(".")[2] for name in named]

    def kernel(self) -> str:
        """The first of ours that it names, else the first."""
        if copied := COPIED.search(self.said):
            return copied[1]
        places = self.places()
        return next((place for place in places if place in ours()), places[0] if places else UNNAMED)


def reports_in(lines: list[str]) -> tuple[list[Report], int]:
    """The findings in a tool's output, and how many of them its summary counts."""
    reports, counted, is_report = [], 0, False
    for number, line in enumerate(lines):
        said = REPORT.search(line)  # after pytest's dots, in the middle of a line
        if said is None:
            continue
        said = said[1]
        if summary := SUMMARY.search(said):
            counted += int(summary[1])
        elif said.startswith((" ", "and ")) or not said.strip():
            if is_report:
                reports[-1].said += f"\n{said}"
                reports[-1].lines.append(number)
        else:
            is_report = not any(aside in said for aside in ASIDE)
            reports += [Report(said, [number])] * is_report
    return reports, counted


def findings(text: str, tool: str, file: str) -> tuple[Found, str]:
    """What a tool reported in its output, be it whole or cut, and the output with MOST_KEPT reports of each kernel."""
    lines = text.splitlines()
    reports, counted = reports_in(lines)
    found, dropped = Found(), Counter()
    kept: Counter = Counter()
    for report in reports:
        kernel = report.kernel()
        kept[kernel] += 1
        if kept[kernel] > MOST_KEPT:
            dropped[kernel] += 1
            for number in report.lines:
                lines[number] = lines[number].partition("=========")[0]
        if report.said.startswith("Program hit") and NO_MEMORY.search(report.said):
            continue
        if CRASH.search(report.said):
            continue
        if (file, kernel) in KNOWN.get(tool, ()):
            found.known[kernel] += 1
        elif kernel == UNNAMED or kernel in ours():
            found.here[kernel] += 1
        else:
            found.elsewhere[kernel] += 1
    if counted > len(reports):
        found.here[NOT_PRINTED] += counted - len(reports)
    if CRASH.search(text):
        found.hindered = CRASHED
    elif NO_MEMORY.search(text):
        found.hindered = "out of memory"
    elif ENDED.search(text) and not any(report.places() for report in reports):
        found.hindered = "a launch failure of no kernel"
    if dropped:
        lines = [line for line in lines if line]
        lines += [f"sanitize: {count} more reports as those of {kernel}" for kernel, count in dropped.items()]
        text = "\n".join(lines) + "\n"
    return found, text


def tests_over(text: str) -> list[tuple[float, str]]:
    """The seconds and the ids of the tests that ended, by a log that may be cut."""
    return [(float(seconds), test) for seconds, _, test in OVER.findall(text)]


def line_of(tool: str, test: str) -> str:
    """Of a file of --passed; `test` is an id, its file by any path."""
    file, _, name = test.partition("::")
    return f"{tool} {TESTS.name}/{Path(file).name}::{name}"


def lines_in(passed: Path | None) -> set[str]:
    """What earlier runs wrote. SystemExit: lines that no run writes."""
    lines = set(passed.read_text().splitlines()) if passed and passed.exists() else set()
    for line in lines:
        if not re.fullmatch(rf"({'|'.join(TOOLS)}) {TESTS.name}/\w+\.py::.+", line):
            raise SystemExit(f"{passed}: {line!r} is no line of --passed; wanted TOOL {TESTS.name}/FILE.py::TEST")
    return lines


def spread(tests: list[str]) -> list[str]:
    """Of each test those cases, by their ids, that have each value of each parameter at least once."""
    cases, chosen = defaultdict(list), set()
    for test in tests:
        name, _, ids = test.partition("[")
        cases[name].append((test, list(enumerate(ids.removesuffix("]").split("-")))))
    for those in cases.values():
        left, taken = set(chain.from_iterable(values for _, values in those)), Counter()
        while left:
            # Most new values, then those that were taken least: dtypes take turns over the shapes.
            test, values = max(those, key=lambda case: (len(left & {*case[1]}), -sum(taken[v] for v in case[1])))
            chosen.add(test)
            left -= {*values}
            taken.update(values)
    return [test for test in tests if test in chosen]


def collected(files: list[str], whole: bool) -> dict[str, list[str]]:
    """The tests of each file by their ids, as pytest finds and selects them. SystemExit: it cannot."""
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    asked += ["-m", "gpu", *([] if whole else ["-k", f"not ({LEFT_OUT})"])]
    done = subprocess.run([*asked, *(str(TESTS / f"{name}.py") for name in files)], capture_output=True, text=True)
    if done.returncode not in (0, 5):
        raise SystemExit(f"pytest could not collect the tests:\n{done.stdout}{done.stderr}")
    found: dict[str, list[str]] = {name: [] for name in files}
    for line in done.stdout.splitlines():
        file, colons, test = line.partition("::")
        if colons and Path(file).stem in found:
            found[Path(file).stem].append(f"{TESTS / Path(file).name}::{test}")
    return found if whole else {name: spread(tests) for name, tests in found.items()}


@dataclass(eq=False)
class Part:
    """Some tests of a file under one tool. `is_alone`: again, when no other process shares the GPU."""

    tool: str
    file: str
    tests: list[str]
    number: int
    of: int
    is_alone: bool = False
    began: float = 0.0
    process: subprocess.Popen | None = None

    def __str__(self) -> str:
        which = f" {self.number}/{self.of}" if self.of > 1 else ""
        return f"{self.tool} {self.file}{which}{' alone' if self.is_alone else ''}"

    @property
    def cost(self) -> int:
        return COSTS[self.tool] * len(self.tests)

    def left(self, over: list[tuple[float, str]]) -> str:
        """Where it was cut, once the tests `over` had ended."""
        ended = {test.partition("::")[2] for _, test in over}
        after = [test.partition("::")[2] for test in self.tests if test.partition("::")[2] not in ended]
        return f", {len(over)} of {len(self.tests)} tests done" + (f", in {after[0]}" if after else "")

    def log(self, logs: Path) -> Path:
        return logs / f"{str(self).replace(' ', '-').replace('/', '-of-')}.txt"

    def command(self, sanitizer: str) -> list[str]:
        options = {
            "racecheck": ["--racecheck-report", "analysis", "--kernel-name", f"regex=^({'|'.join(sorted(ours()))})$"],
            "memcheck": ["--report-api-errors", "explicit"],  # newer versions add advice about calls that succeed
            "initcheck": ["--check-api-memory-access", "no"],  # what PyTorch copies; ours are read by kernels
        }.get(self.tool, [])
        asked = [sanitizer, "--tool", self.tool, *options, "--target-processes", "all"]
        asked += ["--print-limit", str(MOST_PRINTED), "--show-backtrace", "device"]
        asked += [sys.executable, "-m", "pytest", "-q", "-p", "sanitized", "-p", "no:cacheprovider", "-m", "gpu"]
        # The suite makes an error of what is raised where nobody can catch it, such as in a callback of a lock. In a
        # process slowed down a hundred times that is about the clock, and it would end a test that has no finding.
        return [*asked, "-W", "default::pytest.PytestUnraisableExceptionWarning"]

    def start(self, sanitizer: str, logs: Path) -> None:
        """The command and its tests are the first line of the log."""
        asked = self.command(sanitizer)
        environment = {**os.environ, **ENVIRONMENT, "TRITON_INTERPRET": "0"}
        if path := os.environ.get("PYTHONPATH"):
            environment["PYTHONPATH"] += f"{os.pathsep}{path}"
        self.began = time.monotonic()
        with open(self.log(logs), "w") as output:
            output.write(f"$ {SHOWN} {shlex.join([*asked, *self.tests])}\n")
            output.flush()
            # In a group of its own: the tool and its tests end together, and Ctrl-C is for this process alone.
            self.process = subprocess.Popen(
                [*asked, *self.tests],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def kill(self) -> None:
        """The tool, the tests, and what they started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def parts_of(
    tools: list[str], tests: dict[str, list[str]], initcheck: set[str], passed: Set[str] = frozenset()
) -> list[Part]:
    """All that is to run: tool by tool, the first part of each file before the second of any, the longest first.

    `initcheck`: files for this tool. `passed`: lines of what is not to run again.
    """
    parts = []
    for tool in tools:
        for file, every in tests.items():
            if tool == "initcheck" and file not in initcheck:
                continue
            those = [test for test in every if line_of(tool, test) not in passed]
            of = -(-len(those) * COSTS[tool] // SHARE)
            # Dealt in turn: long tests stand side by side in a file.
            parts += [Part(tool, file, those[i::of], i + 1, of) for i in range(of)]
    return sorted(parts, key=lambda part: (tools.index(part.tool), part.number, -part.cost))


class Run:
    """Parts that run side by side, and what they found."""

    def __init__(self, parts: list[Part], given: argparse.Namespace):
        self.waiting, self.given = parts, given
        self.running: list[Part] = []
        self.alone: list[Part] = []
        self.cut: list[Part] = []
        self.found: dict[str, Found] = defaultdict(Found)
        self.over: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self.shown: set[str] = set()
        self.has_failed = False
        self.stopped_by = 0
        self.until = given.began + given.seconds_in_all

    def stop(self, number: int, frame: object) -> None:
        self.stopped_by = number

    def go(self) -> None:
        """Until all is done, the time is over or a signal came; nothing runs afterwards."""
        try:
            while (self.waiting or self.running or self.alone) and not self.is_over():
                self.begin()
                time.sleep(0.05)
                for part in [*self.running]:
                    if part.process.poll() is not None:
                        self.end(part, part.process.returncode)
                    elif time.monotonic() - part.began > self.given.seconds:
                        self.cut_off([part])
        finally:
            self.cut_off([*self.running])

    def is_over(self) -> bool:
        return bool(self.stopped_by) or time.monotonic() > self.until

    def begin(self) -> None:
        while self.waiting and len(self.running) < self.given.jobs:
            self.start(self.waiting.pop(0))
        if self.alone and not self.running:
            self.start(self.alone.pop(0))

    def start(self, part: Part) -> None:
        if part.tool not in self.shown:  # of each tool once: they differ in their tests alone
            command = shlex.join(part.command(self.given.sanitizer))
            say(f"$ {SHOWN} {command} TESTS")
            self.shown.add(part.tool)
        part.start(self.given.sanitizer, self.given.logs)
        self.running.append(part)

    def cut_off(self, parts: list[Part]) -> None:
        for part in parts:
            part.kill()
        until = time.monotonic() + 1.0  # a driver may take longer to clear up after them, and does so without us
        for part in parts:
            with suppress(subprocess.TimeoutExpired):
                part.process.wait(max(until - time.monotonic(), 0.0))
            self.end(part, None)

    def end(self, part: Part, status: int | None) -> None:
        """Says what `part` found; status None: it was cut off."""
        self.running.remove(part)
        seconds = time.monotonic() - part.began
        log = part.log(self.given.logs)
        text = log.read_text(errors="replace")
        found, kept = findings(text, part.tool, part.file)
        over = tests_over(text)
        if kept != text:
            log.write_text(kept)
        if found.hindered and not part.is_alone and self.given.jobs > 1 and status is not None:
            say(f"{part}: {found.hindered} beside the others, {seconds:.0f} s; it runs again, alone, at the end")
            self.alone.append(Part(part.tool, part.file, part.tests, part.number, part.of, is_alone=True))
            return
        said = f"cut off after {seconds:.0f} s{' and ' * bool(found.hindered)}{found.hindered}{part.left(over)}"
        if status is None:
            self.cut.append(part)
        else:
            ended = {0: "tests pass", 5: "no test chosen"}.get(status, f"status {status}")
            said = f"{ended}{', ' * bool(found.hindered)}{found.hindered}, {seconds:.0f} s"
        say(f"{part}: {found}, {said}")
        self.found[part.tool].add(found)
        self.over[part.tool] += over
        self.has_failed |= status not in (0, 5) or bool(found.here) or found.hindered == CRASHED
        if self.given.passed and not found.here and not found.hindered:
            self.remember(part.tool, [test for _, outcome, test in OVER.findall(text) if outcome == "passed"])

    def remember(self, tool: str, tests: list[str]) -> None:
        with open(self.given.passed, "a") as file:
            file.writelines(f"{line_of(tool, test)}\n" for test in tests)

    def conclude(self) -> int:
        """What was found in all and what was left undone; the exit status."""
        for tool, found in self.found.items():
            say(f"{tool} in all: {found}")
            if slowest := sorted(self.over[tool], reverse=True)[:SLOWEST]:
                say(f"{tool}, slowest: " + "; ".join(f"{seconds:.0f} s {test}" for seconds, test in slowest))
        undone = [*self.waiting, *self.alone]
        if self.cut:
            say(f"cut: {', '.join(map(str, self.cut))}")
        if undone:
            say(f"not begun: {', '.join(map(str, undone))}")
        if self.stopped_by:
            say(f"sanitize: stopped by {signal.Signals(self.stopped_by).name}; logs so far are in {self.given.logs}")
            return 128 + self.stopped_by
        if (self.cut or undone) and time.monotonic() > self.until:
            say(f"sanitize: the {self.given.seconds_in_all:.0f} s of --seconds-in-all are over")
        if self.has_failed or self.cut or undone:
            say("sanitize: findings, failures or parts that were not run to their end, see above")
            return 1
        say(f"sanitize: clean; the tools' output is in {self.given.logs}")
        return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this one; repeatable")
    parser.add_argument("--file", action="append", help="only this file of tests, such as test_mlp; repeatable")
    parser.add_argument("--whole", action="store_true", help="every GPU test of the files, however long")
    parser.add_argument("--sanitizer", default=installed(), help="path of compute-sanitizer")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(len(os.sched_getaffinity(0)), 16),
        help="processes at a time, which share the GPU and its memory; one a core, up to 16",
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit of one process")
    parser.add_argument(
        "--seconds-in-all", type=float, default=float("inf"), help="then nothing begins, and what runs is cut"
    )
    parser.add_argument(
        "--passed",
        type=Path,
        help="file of tests that passed before, which do not run again; those of this run join it",
    )
    parser.add_argument("--logs", type=Path, default=Path("runs/sanitize"), help="where the tools' output goes")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        say(NO_GPU)
        return 2
    if not shutil.which(given.sanitizer):
        say(NO_TOOL)
        return 2
    given.logs.mkdir(parents=True, exist_ok=True)
    given.began = time.monotonic()
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        tests = collected(list(given.file or FILES), given.whole)
        tools = sorted({*(given.tool or TOOLS)}, key=TOOLS.index)
        before = lines_in(given.passed)
        run = Run(parts_of(tools, tests, set(given.file or PLAIN), before), given)
        for number in handlers:
            signal.signal(number, run.stop)
        many, of = len({test for part in run.waiting for test in part.tests}), len(run.waiting)
        say(version_of(given.sanitizer))
        less = f", less the {len(before)} of {given.passed}" if before else ""
        say(f"{many} tests of {len(tests)} files{less}, in {of} processes, {given.jobs} at a time")
        run.go()
        return run.conclude()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def installed() -> str:
    """The path of pip's, which is the newest, else of that on PATH, else of the CUDA toolkit's."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files("nvidia-cuda-sanitizer-api") or ():
            if file.parts[-2:] == ("bin", "compute-sanitizer"):
                return str(file.locate())
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def version_of(sanitizer: str) -> str:
    """What it calls itself: its findings depend on it."""
    said = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, timeout=60).stdout
    return next((line for line in said.splitlines() if line.startswith("Version")), "Version unknown")


def leave(number: int, frame: object) -> None:
    """While nothing runs yet."""
    say(f"sanitize: stopped by {signal.Signals(number).name} before anything was begun")
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
