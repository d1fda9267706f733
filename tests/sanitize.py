"""compute-sanitizer over the GPU tests of the kernels: `make sanitize`.

    memcheck   reads and writes outside an allocation, and misaligned ones
    racecheck  hazards between threads of a block in shared memory
    synccheck  barriers that not all threads reach
    initcheck  reads of global memory that nothing has written

Each tool runs each file of tests in a process of its own, without PyTorch's caching allocator: with it an access past
a tensor's end falls into its neighbour and is not seen. Graphs cannot be captured without it, so tests of graphs are
left out, and those that compare speed or take minutes under a tool. `--whole` leaves nothing out.

The tools do not see the copy engine (TMA): what it writes to shared memory has no writer for racecheck, and what it
stores to global memory counts as never written for initcheck. initcheck's findings are therefore listed by kernel, to
be explained one by one, and do not fail the run; those of the other tools do.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FILES = (
    *("test_attention", "test_cached_attention", "test_contract", "test_elementwise"),
    *("test_embedding", "test_int6_linear", "test_linear_nll", "test_lora_adam"),
    *("test_lora_attention", "test_lora_head_nll", "test_lora_linear", "test_lora_linears"),
    *("test_lora_qkv", "test_lora_qkv_rope", "test_mlp", "test_muon"),
    *("test_newton_schulz", "test_qkv_attention", "test_residual_mlp", "test_residual_mlp_norm", "test_rotary"),
    "test_swiglu",
)
LEFT_OUT = "graph or captur or compile or fullgraph or opcheck or faster or speed or twenty or every_time or past_2_31"
KERNEL = re.compile(r"in (?:kernel )?`?([A-Za-z_]\w*)(?:\(|`|\+0x| in )|at ([A-Za-z_]\w*)\+0x|at (\w+)\(")
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")
NO_GPU = (
    "there is no CUDA GPU here, and compute-sanitizer watches kernels run on one; run `make sanitize` where there is"
)
NO_TOOL = (
    "compute-sanitizer was not found; it comes with the CUDA toolkit (cuda-sanitizer), give its path with --sanitizer"
)


def command(sanitizer: str, tool: str, file: Path, chosen: str) -> list[str]:
    """One tool over one file of tests."""
    more = {"memcheck": ["--leak-check", "no"], "racecheck": ["--racecheck-report", "analysis"]}.get(tool, [])
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu", str(file)]
    tests += ["-k", chosen] if chosen else []
    return [sanitizer, "--tool", tool, *more, "--target-processes", "all", "--print-limit", "50", *tests]


def findings(text: str) -> tuple[int, Counter]:
    """(how many errors a tool counted, in which kernels it reported them)."""
    counted = sum(int(found) for found in SUMMARY.findall(text))
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    kernels = Counter(next(filter(None, found.groups())) for line in lines if (found := KERNEL.search(line)))
    return counted, kernels


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this one; repeatable")
    parser.add_argument("--file", action="append", help="only this file of tests, such as test_mlp; repeatable")
    parser.add_argument("--whole", action="store_true", help="every GPU test of the files, however long")
    parser.add_argument(
        "--sanitizer", default=shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, which share the GPU and its memory")
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit of one tool over one file")
    parser.add_argument("--logs", type=Path, default=Path("runs/sanitize"), help="where the tools' output goes")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    if not shutil.which(given.sanitizer):
        print(NO_TOOL)
        return 2
    given.logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}

    def run(tool: str, name: str) -> bool:
        """Whether this tool over this file found something that fails the run."""
        file = Path(__file__).with_name(f"{name}.py")
        asked = command(given.sanitizer, tool, file, "" if given.whole else f"not ({LEFT_OUT})")
        print("$ PYTORCH_NO_CUDA_MEMORY_CACHING=1", " ".join(f"'{a}'" if " " in a else a for a in asked), flush=True)
        log, began = given.logs / f"{tool}-{name}.txt", time.monotonic()
        with open(log, "w") as output:
            try:
                status = subprocess.run(
                    asked, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=given.seconds
                ).returncode
            except subprocess.TimeoutExpired:
                status = -1
        counted, kernels = findings(log.read_text(errors="replace"))
        ended = {-1: f"cut off after {given.seconds:.0f} s", 0: "tests pass", 5: "no test chosen"}
        said = ended.get(status, f"status {status}")
        where = "; ".join(f"{kernel} x{count}" for kernel, count in kernels.most_common(20))
        print(f"{tool} {name}: {counted} findings, {said}, {time.monotonic() - began:.0f} s {where}", flush=True)
        return status not in (0, 5) or (counted > 0 and tool != "initcheck")

    with ThreadPoolExecutor(given.jobs) as pool:
        runs = [pool.submit(run, tool, name) for tool in given.tool or TOOLS for name in given.file or FILES]
        failed = any([one.result() for one in runs])
    print(
        "sanitize: findings or failures, see above"
        if failed
        else f"sanitize: clean; the tools' output is in {given.logs}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
