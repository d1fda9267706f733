"""The script behind `make sanitize`: what it runs and how it reads what the tools say. The tools want a GPU."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import klora.kernels
import pytest
import sanitize
import torch

MEMCHECK = """========= COMPUTE-SANITIZER
..========= Invalid __global__ read of size 2 bytes
=========     at _dq_kernel+0x1b0 in backward.py:30
=========     by thread (33,0,0) in block (0,0,0)
=========     Access at 0x7f0000000200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f0000000000 of size 512 bytes
========= Invalid __global__ read of size 2 bytes
=========     at _dq_kernel+0x1b0 in backward.py:30
========= Invalid __global__ write of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<float>>(int)+0x60
.
=============================== warnings summary ===============================
3 passed
========= ERROR SUMMARY: 3 errors
"""
UNINITIALIZED = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at _dq_kernel+0x1b0
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
ELSEWHERE = """========= COMPUTE-SANITIZER
...========= Error: Race reported between Write access at fmha_f32_rf_sm80(PyTorch::Kernel<float, (bool)1>::Params)+0x40
=========     and Read access at fmha_f32_rf_sm80(PyTorch::Kernel<float, (bool)1>::Params)+0x10070 [8 hazards]
=========     and Read access at fmha_f32_rf_sm80(PyTorch::Kernel<float, (bool)1>::Params)+0x101d0 [8 hazards]
=========
========= Error: Race reported between Read access at nvjet_sm90_tst_64x8_64x16_4x1_v_bz_NNT+0xb00
=========     and Write access at nvjet_sm90_tst_64x8_64x16_4x1_v_bz_NNT+0x2820 [128 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
RACE = ELSEWHERE.replace("fmha_f32_rf_sm80(PyTorch::Kernel<float, (bool)1>::Params)", "_dq_kernel")
UNKNOWN = "========= Barrier error detected. Missing init.\n========= ERROR SUMMARY: 1 error\n"
NO_MEMORY = """========= COMPUTE-SANITIZER
..========= Program hit cudaErrorMemoryAllocation (error 2) due to "out of memory" on CUDA API call to cudaMalloc.
=========
F
E           torch.AcceleratorError: CUDA error: out of memory
========= Target application returned an error
========= ERROR SUMMARY: 1 error
"""
CRASH = """========= COMPUTE-SANITIZER
.========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.
=========
FF
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
LAUNCH_FAILURE = """========= COMPUTE-SANITIZER
.========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call.
=========
========= ERROR SUMMARY: 1 error
"""
COPIED = """========= COMPUTE-SANITIZER
========= Host API memory access error at host access to 0x7f2cfa000000 of size 2,097,152 bytes
=========     Uninitialized access to 0x7f2cfa000020 on access by cudaMemcpy source
=========
========= Uninitialized __global__ memory read of size 16 bytes
=========     at void at::native::<unnamed>::CatArrayBatchedCopy_vectorized<at::native::<unnamed>::Opaque<2>>(T1)+0x170
=========     by thread (32,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n3 passed\n========= ERROR SUMMARY: 0 errors\n"
ENDED = """========= COMPUTE-SANITIZER
========= Error: process didn't terminate successfully
=========     The application may have hit an error at host_function(int)+0x10
========= Error: Target application terminated before first instrumented API call
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script with a stub for the tool, a shell script, over made-up tests; (status, what it printed)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def run(stub: str, *more: str, tests: int = 3) -> tuple[int, str]:
        ids = [f"tests/test_mlp.py::test_{number}" for number in range(tests)]
        monkeypatch.setattr(sanitize, "collected", lambda files, whole: dict.fromkeys(files, ids))
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\ncd {tmp_path}\n[ $1 = --version ] && echo Version 2026.4 && exit\n{stub}\n")
        tool.chmod(0o755)
        given = ["--sanitizer", str(tool), "--logs", str(tmp_path / "logs"), "--file", "test_mlp"]
        return sanitize.main([*given, *more]), capsys.readouterr().out

    return run


def most(tool: str) -> int:
    """Tests of one part."""
    return sanitize.SHARE // sanitize.COSTS[tool]


def printing(text: str) -> str:
    return f"cat <<'END'\n{text}END"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_one_sentence_and_status_2(capsys):
    assert sanitize.main([]) == 2
    assert capsys.readouterr().out == f"{sanitize.NO_GPU}\n"


def test_what_is_ours_is_told_from_what_is_elsewhere():
    def parts(text, tool):
        found, kept = sanitize.findings(text, tool, "test_mlp")
        assert not found.known and not found.hindered and kept == text
        return found.here, found.elsewhere

    assert parts(MEMCHECK, "memcheck") == ({"_dq_kernel": 2}, {"vectorized_elementwise_kernel": 1})
    elsewhere = {"fmha_f32_rf_sm80": 1, "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_NNT": 1}
    assert parts(ELSEWHERE, "racecheck") == ({}, elsewhere)
    assert parts(RACE, "racecheck")[0] == {"_dq_kernel": 1}
    assert parts(CLEAN, "memcheck") == parts(ENDED, "memcheck") == ({}, {})
    assert parts(UNKNOWN, "synccheck") == ({sanitize.UNNAMED: 1}, {}), "it may be ours"
    assert parts(ELSEWHERE.replace("2 hazards", "60 hazards"), "racecheck")[0] == {sanitize.NOT_PRINTED: 58}
    assert parts(COPIED, "initcheck") == ({}, {"cudaMemcpy": 1, "CatArrayBatchedCopy_vectorized": 1})
    assert parts(COPIED.replace("Uninitialized access", "Invalid access"), "memcheck")[0] == {sanitize.UNNAMED: 1}
    assert sanitize.findings(MEMCHECK[:120], "memcheck", "test_mlp")[0].here, "of a log that was cut"


def test_ours_are_found_behind_any_number_of_others_and_the_log_stays_short(run, tmp_path):
    """Of each kernel some reports stay, and of pytest all."""
    others = "".join(ELSEWHERE.splitlines(keepends=True)[1:-1])
    ours = "".join(RACE.splitlines(keepends=True)[1:4])
    (tmp_path / "text").write_text(f"{others * 500}{ours}\n.3 passed\n")
    status, printed = run("cat text", "--tool", "racecheck")
    assert status == 1 and "1 findings in ours (_dq_kernel x1), 1000 elsewhere (fmha_f32_rf_sm80 x500; nvjet" in printed
    log = (tmp_path / "logs/racecheck-test_mlp.txt").read_text().partition("\n")[2]
    for each, kernel in ((3, "fmha_f32_rf_sm80("), (2, "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_NNT+")):
        assert log.count(kernel) == each * sanitize.MOST_KEPT
    assert log.count("_dq_kernel") == 3 and log.count("...") == 501 and "\n.3 passed\n" in log
    assert "sanitize: 480 more reports as those of fmha_f32_rf_sm80\n" in log
    command = sanitize.Part("racecheck", "test_mlp", [], 1, 1).command("compute-sanitizer")
    assert int(command[command.index("--print-limit") + 1]) >= 100_000


def test_racecheck_watches_all_of_ours_and_nothing_else():
    command = sanitize.Part("racecheck", "test_mlp", [], 1, 1).command("compute-sanitizer")
    kind, _, name = command[command.index("--kernel-name") + 1].partition("=")
    assert kind == "regex" and "exclude" not in " ".join(command)
    watched = re.compile(name)
    assert all(watched.search(kernel) for kernel in sanitize.ours())
    for other in ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_NNT", "vectorized_elementwise_kernel", "_dq_kernel_of_another"):
        assert not watched.search(other)


def test_the_other_tools_watch_all_kernels():
    """initcheck would take what one that is left out has written for unwritten."""
    for tool in {*sanitize.TOOLS} - {"racecheck"}:
        command = " ".join(sanitize.Part(tool, "test_mlp", [], 1, 1).command("compute-sanitizer"))
        assert "exclude" not in command and "--kernel-name" not in command
        assert ("--check-api-memory-access no" in command) == (tool == "initcheck")


def test_our_kernels_are_what_the_package_compiles():
    assert {"_dq_kernel", "rotate"} < sanitize.ours() and len(sanitize.ours()) > 150
    assert not {"cudaMemcpy", sanitize.UNNAMED} & sanitize.ours()
    for tool, explained in sanitize.KNOWN.items():
        for (file, kernel), reason in explained.items():
            assert tool in sanitize.TOOLS and file in sanitize.FILES and kernel in sanitize.ours() and reason
            assert tool != "initcheck" or file not in sanitize.PLAIN, "there a finding is one"


def test_every_file_is_there_and_has_tests_for_a_gpu():
    for name in sanitize.FILES:
        assert "mark.gpu" in Path(__file__).with_name(f"{name}.py").read_text(), name


def test_no_file_of_an_op_is_missing():
    """A file of tests that is named after an op, or a module of kernels."""
    modules = (path.stem for path in Path(klora.kernels.__file__).parent.iterdir())
    named = {f"test_{name}" for name in (*klora.kernels.__all__, *modules)}
    files = {file.stem for file in Path(__file__).parent.glob("test_*.py") if "mark.gpu" in file.read_text()}
    assert len(files & named) > 12 and files & named <= {*sanitize.FILES, "test_dispatch"}


@pytest.mark.parametrize(
    ("text", "status", "tool", "said"),
    [
        (CLEAN, 0, "memcheck", "memcheck test_mlp: 0 findings in ours, tests pass"),
        (MEMCHECK, 1, "memcheck", "2 findings in ours (_dq_kernel x2), 1 elsewhere (vectorized_elementwise_ker"),
        (ELSEWHERE, 0, "racecheck", "racecheck test_mlp: 0 findings in ours, 2 elsewhere (fmha_f32_rf_sm80 x1; nvjet_"),
        (RACE, 1, "racecheck", "1 findings in ours (_dq_kernel x1), 1 elsewhere (nvjet_sm90"),
        (UNINITIALIZED, 1, "initcheck", "1 findings in ours (_dq_kernel x1), tests pass"),
        (UNKNOWN, 1, "synccheck", "1 findings in ours (no kernel x1)"),
    ],
)
def test_the_verdict(text, status, tool, said, run):
    """A finding in a kernel of ours, or in none, fails the run; those elsewhere are named apart."""
    ended, printed = run(printing(text), "--tool", tool)
    assert ended == status and said in printed
    assert f"--tool {tool}" in printed and "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in printed, "the command is printed"
    assert printed.startswith("Version 2026.4\n3 tests of 1 files, in 1 processes")
    assert (f"{tool} in all: " in printed) and ("sanitize: clean" in printed) == (status == 0)


def test_a_finding_that_is_explained_fails_nothing_and_is_named(run, monkeypatch):
    known = {("test_mlp", "_dq_kernel"): "reads what the copy engine stored"}
    monkeypatch.setitem(sanitize.KNOWN, "initcheck", known)
    status, printed = run(printing(UNINITIALIZED), "--tool", "initcheck")
    assert status == 0 and "0 findings in ours, 1 explained (_dq_kernel x1), tests pass" in printed
    assert run(printing(UNINITIALIZED), "--tool", "memcheck")[0] == 1, "explained for another tool"
    monkeypatch.setitem(sanitize.KNOWN, "initcheck", {("test_muon", "_dq_kernel"): "another file"})
    assert run(printing(UNINITIALIZED), "--tool", "initcheck")[0] == 1


def test_a_test_that_fails_fails_the_run_and_hides_no_other(run):
    status, printed = run("exit 1", "--tool", "memcheck")
    assert status == 1 and "0 findings in ours, status 1" in printed
    assert "-x" not in sanitize.Part("memcheck", "test_mlp", [], 1, 1).command("compute-sanitizer")


def test_what_ran_out_of_memory_beside_others_runs_again_alone(run, tmp_path):
    once = f"if mkdir once 2>/dev/null; then {printing(NO_MEMORY)}\nexit 1; fi; {printing(CLEAN)}"
    status, printed = run(once, "--tool", "memcheck", "--jobs", "2")
    assert status == 0 and "memcheck test_mlp: out of memory beside the others" in printed
    assert "memcheck test_mlp alone: 0 findings in ours, tests pass" in printed
    assert "out of memory" in (tmp_path / "logs/memcheck-test_mlp.txt").read_text(), "the first log is kept"
    status, printed = run(f"{printing(NO_MEMORY)}\nexit 1", "--tool", "memcheck", "--jobs", "2")
    assert status == 1 and "memcheck test_mlp alone: 0 findings in ours, status 1, out of memory" in printed
    assert " alone" not in run(f"{printing(NO_MEMORY)}\nexit 1", "--tool", "memcheck", "--jobs", "1")[1]


@pytest.mark.parametrize(
    ("text", "tool", "said", "found"),
    [
        (CRASH, "racecheck", "a crash of the tool", "0 findings in ours"),
        (LAUNCH_FAILURE, "memcheck", "a launch failure of no kernel", "1 findings in ours (no kernel x1)"),
    ],
)
def test_what_crashed_beside_others_runs_again_alone(text, tool, said, found, run):
    """Once; what crashes alone, too, fails the run."""
    once = f"if mkdir once 2>/dev/null; then {printing(text)}\nexit 6; fi; {printing(CLEAN)}"
    status, printed = run(once, "--tool", tool, "--jobs", "2")
    assert status == 0 and f"{tool} test_mlp: {said} beside the others" in printed
    assert f"{tool} test_mlp alone: 0 findings in ours, tests pass" in printed
    status, printed = run(f"{printing(text)}\nexit 6", "--tool", tool, "--jobs", "2")
    assert status == 1 and f"alone: {found}, status 6, {said}" in printed
    assert run(printing(text), "--tool", tool, "--jobs", "1")[0] == 1, "with no test that fails"
    status, printed = run(f"{printing(MEMCHECK + LAUNCH_FAILURE)}\nexit 1", "--tool", "memcheck", "--jobs", "2")
    assert status == 1 and " alone" not in printed, "the kernel is named, and ended by the tool"


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_ends_all_at_once_and_says_what_was_found(name, run, tmp_path):
    """By the last of two parts that run; each has started a process of its own, and one part waits."""
    stub = f"{printing(RACE)}\nsleep 60 & echo $! >> children\n[ $(wc -l < children) = 2 ] && kill -{name} $PPID\nwait"
    began = time.monotonic()
    status, printed = run(stub, "--tool", "racecheck", "--jobs", "2", tests=3 * most("racecheck"))
    assert time.monotonic() - began < 5
    assert status == 128 + getattr(signal, f"SIG{name}") and f"stopped by SIG{name}" in printed
    assert printed.count("1 findings in ours (_dq_kernel x1), 1 elsewhere") == 2
    assert "racecheck in all: 2 findings in ours" in printed
    assert "cut: racecheck test_mlp 1/3, racecheck test_mlp 2/3\n" in printed
    assert "not begun: racecheck test_mlp 3/3\n" in printed
    for child in (tmp_path / "children").read_text().split():
        assert is_over(int(child))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def is_over(process: int) -> bool:
    """Whether it ends within a second; one that nobody has waited for is a zombie."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_a_signal_before_anything_runs_ends_it_too(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        sanitize, "collected", lambda files, whole: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9)
    )
    with pytest.raises(SystemExit) as ended:
        sanitize.main(["--sanitizer", sys.executable])
    assert ended.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM" in capsys.readouterr().out


def test_the_time_of_the_whole_run_and_of_one_process(run):
    limited = ("--tool", "memcheck", "--jobs", "1", "--seconds-in-all", "0.3")
    status, printed = run(f"{printing(CLEAN)}\nsleep 60", *limited, tests=2 * most("memcheck"))
    assert status == 1 and "the 0 s of --seconds-in-all are over" in printed
    assert "cut: memcheck test_mlp 1/2\nnot begun: memcheck test_mlp 2/2\n" in printed
    status, printed = run("sleep 60", "--tool", "memcheck", "--seconds", "0.2")
    assert status == 1 and "memcheck test_mlp: 0 findings in ours, cut off after 0 s" in printed
    assert "cut: memcheck test_mlp\n" in printed and "not begun" not in printed


LINES = """========= COMPUTE-SANITIZER
. sanitized: 3.5 s, passed: tests/test_mlp.py::test_0
========= Invalid __global__ read of size 2 bytes
=========     at _dq_kernel+0x1b0 in backward.py:30
F sanitized: 120.0 s, failed: tests/test_mlp.py::test_2[a, b/c-1]========= Invalid __global__ read of size 2 bytes
=========     at _dq_kernel+0x1b0 in backward.py:30
"""


def test_the_seconds_of_each_test_stand_among_the_reports():
    """Neither hides the other, and no test's name reads like a word of the tools."""
    assert sanitize.tests_over(LINES) == [
        (3.5, "tests/test_mlp.py::test_0"),
        (120.0, "tests/test_mlp.py::test_2[a, b/c-1]"),
    ]
    found, kept = sanitize.findings(LINES, "memcheck", "test_mlp")
    assert found.here == {"_dq_kernel": 2} and not found.elsewhere and not found.hindered and kept == LINES
    for name in sanitize.FILES:
        for test in re.findall(r"def (test_\w+)", Path(__file__).with_name(f"{name}.py").read_text()):
            line = f"sanitized: 1.0 s, passed: tests/{name}.py::{test}\n"
            assert sanitize.findings(line, "memcheck", name) == (sanitize.Found(), line)


def test_what_has_passed_in_one_run_the_next_leaves_out(run, tmp_path):
    """Of that tool alone. A test that failed runs again, and so does whatever stood beside a finding or a crash."""
    passed, ended = tmp_path / "passed.txt", LINES.replace("test_2[a, b/c-1]", "test_1")
    clean = "\n".join(line for line in ended.splitlines() if "_dq_kernel" not in line) + "\n"
    clean = clean.replace("========= Invalid __global__ read of size 2 bytes", "")
    again = ("--passed", str(passed), "--tool", "memcheck")
    for text in (ended, clean + CRASH):
        run(f"{printing(text)}\nexit 1", *again)
        assert not passed.exists() or not passed.read_text(), text
    status, printed = run(f"{printing(clean)}\nexit 1", *again)
    assert status == 1 and passed.read_text() == "memcheck tests/test_mlp.py::test_0\n"
    printed = run(f'echo "$@" > asked\n{printing(CLEAN)}', *again)[1]
    assert f"2 tests of 1 files, less the 1 of {passed}, in 1 processes" in printed
    asked = (tmp_path / "asked").read_text()
    assert "::test_0" not in asked and "::test_1 tests/test_mlp.py::test_2" in asked
    assert "3 tests of 1 files, less" in run(printing(CLEAN), *again[:2], "--tool", "synccheck")[1]


def test_a_file_of_passed_that_is_none_is_refused(run, tmp_path):
    (tmp_path / "passed.txt").write_text("memcheck tests/test_mlp.py::test_0\nracecheck test_mlp\n")
    with pytest.raises(
        SystemExit, match="'racecheck test_mlp' is no line of --passed; wanted TOOL tests/FILE.py::TEST"
    ):
        run(printing(CLEAN), "--passed", str(tmp_path / "passed.txt"))


def test_a_crash_of_the_tool_is_no_finding_and_no_success(run):
    """Also where its process is cut, or ends well: its records may be incomplete."""
    assert sanitize.findings(CRASH, "racecheck", "test_mlp")[0].here == {}
    status, printed = run(f"{printing(CRASH)}\nexit 0", "--tool", "racecheck", "--jobs", "1")
    assert status == 1 and "0 findings in ours, tests pass, a crash of the tool" in printed
    status, printed = run(f"{printing(CRASH)}\nsleep 60", "--tool", "racecheck", "--seconds", "0.3")
    assert status == 1 and "0 findings in ours, cut off after 0 s and a crash of the tool, 0 of 3 tests" in printed


def test_what_was_slow_and_where_a_process_was_cut_are_said(run):
    status, printed = run(f"{printing(LINES.replace('test_2[a, b/c-1]', 'test_2'))}\nsleep 60", "--seconds", "0.3")
    assert status == 1 and "cut off after 0 s, 2 of 3 tests done, in test_1\n" in printed
    assert "memcheck, slowest: 120 s tests/test_mlp.py::test_2; 4 s tests/test_mlp.py::test_0\n" in printed
    assert "cut off after 0 s, 0 of 3 tests done, in test_0\n" in run("sleep 60", "--seconds", "0.3")[1]
    assert "slowest" not in run(printing(CLEAN))[1]
    command = next(line for line in printed.splitlines() if line.startswith("$ "))
    assert f"PYTHONPATH={Path(__file__).parent} " in command and " -p sanitized " in command, "it runs as it is printed"


def test_what_is_worth_most_begins_first_and_a_file_is_dealt_in_parts():
    """Tool by tool; some of each file before the rest of any; of these the longest."""
    number = 3 * most("memcheck") - 1
    races = -(-number // most("racecheck"))
    tests = {"test_mlp": [str(each) for each in range(number)], "test_rotary": ["a"], "test_swiglu": []}
    parts = sanitize.parts_of(["memcheck", "racecheck"], tests, set())
    assert [str(part) for part in parts[:5]] == [
        *("memcheck test_mlp 1/3", "memcheck test_rotary", "memcheck test_mlp 2/3", "memcheck test_mlp 3/3"),
        f"racecheck test_mlp 1/{races}",
    ]
    assert [str(part) for part in parts[5:7]] == ["racecheck test_rotary", f"racecheck test_mlp 2/{races}"]
    assert max(part.cost for part in parts) <= sanitize.SHARE
    for tool in ("memcheck", "racecheck"):
        those = [part for part in parts if part.tool == tool and part.file == "test_mlp"]
        assert Counter(test for part in those for test in part.tests) == Counter(tests["test_mlp"])
        assert len(those) == -(-number * sanitize.COSTS[tool] // sanitize.SHARE)
        assert max(len(part.tests) for part in those) - min(len(part.tests) for part in those) <= 1
    assert [str(part) for part in parts if part.file == "test_swiglu"] == []
    assert len({part.log(Path("logs")) for part in parts}) == len(parts)


def test_the_tools_run_in_their_order_and_initcheck_where_it_sees_what_is_written(run, monkeypatch):
    asked = ("--tool", "synccheck", "--tool", "initcheck", "--tool", "memcheck", "--jobs", "1")
    status, printed = run(printing(CLEAN), *asked)
    begun = [line.split()[5] for line in printed.splitlines() if line.startswith("$ ")]
    assert status == 0 and begun == ["memcheck", "synccheck", "initcheck"], "initcheck: its file is named"
    parts = sanitize.parts_of(list(sanitize.TOOLS), dict.fromkeys(sanitize.FILES, ["a"]), set(sanitize.PLAIN))
    assert {part.file for part in parts if part.tool == "initcheck"} == {*sanitize.PLAIN} < {*sanitize.FILES}
    assert {part.file for part in parts if part.tool == "racecheck"} == {*sanitize.FILES}
    descriptors = ("TensorDescriptor", "tiled(", "descriptor(", "async_copy_shared_to_global")
    kernels = Path(klora.kernels.__file__).parent
    plain = [path for name in ("rotary", "rms_norm") for path in (kernels / name).glob("*.py")]
    for path in (*plain, kernels / "embedding.py", kernels / "lora_adam.py"):
        assert not any(word in path.read_text() for word in descriptors), f"{path} stores through a tensor map"


def test_the_tool_that_pip_installed_is_taken_first(tmp_path, monkeypatch):
    pip, path = tmp_path / "nvidia/cu13/bin/compute-sanitizer", tmp_path / "bin/compute-sanitizer"
    for tool in (pip, path):
        tool.parent.mkdir(parents=True)
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert sanitize.installed() == str(path)
    record = tmp_path / "nvidia_cuda_sanitizer_api-13.5.25.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: nvidia-cuda-sanitizer-api\nVersion: 13.5.25\n")
    (record / "RECORD").write_text(
        "nvidia/cu13/compute-sanitizer/compute-sanitizer,,\nnvidia/cu13/bin/compute-sanitizer,,\n"
    )
    assert sanitize.installed() == str(pip)
    (record / "RECORD").write_text("")
    monkeypatch.setenv("PATH", "")
    assert sanitize.installed() == "/usr/local/cuda/bin/compute-sanitizer"


def test_without_the_tool_one_sentence_that_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sanitize.main(["--sanitizer", "/nowhere/compute-sanitizer"]) == 2
    assert capsys.readouterr().out == f"{sanitize.NO_TOOL}\n"
    page = (Path(__file__).parents[1] / "docs/trust.md").read_text()
    for text in (page, sanitize.NO_TOOL):
        assert "`pip install nvidia-cuda-sanitizer-api`" in text
    assert f"{', '.join(sanitize.TOOLS[:-1])} and {sanitize.TOOLS[-1]}, in this order" in page


def test_cases_with_every_value_of_every_parameter():
    shapes, dtypes = ("7-64", "9-64", "9-32"), ("bf16", "fp16", "fp32")
    tests = [f"t.py::test_a[{shape}-{dtype}]" for shape in shapes for dtype in dtypes]
    chosen = sanitize.spread([*tests, "t.py::test_b", "t.py::test_c[x]", "t.py::test_c[y]"])
    assert chosen[-3:] == ["t.py::test_b", "t.py::test_c[x]", "t.py::test_c[y]"]
    values = [test.partition("[")[2].rstrip("]").split("-") for test in chosen[:-3]]
    assert [{*column} for column in zip(*values, strict=True)] == [{"7", "9"}, {"64", "32"}, {*dtypes}]
    assert len(values) == 3, "three dtypes, and no more than they take"


@pytest.mark.slow
def test_what_runs_under_the_tools():
    """Something of every file, and no more than fits in minutes; what is left out is there to be left out."""
    chosen = sanitize.collected(list(sanitize.FILES), whole=False)
    assert all(chosen.values()) and 250 < sum(map(len, chosen.values())) < 350
    assert all(Path(test.partition("::")[0]).stem == name for name, tests in chosen.items() for test in tests)
    written = "".join(Path(__file__).with_name(f"{name}.py").read_text() for name in sanitize.FILES)
    every = {name.lower() for name in re.findall(r"def (test_\w+)", written)}
    ran = {test.partition("[")[0].rpartition("::")[2].lower() for tests in chosen.values() for test in tests}
    for word in sanitize.GRAPHS + sanitize.REPEATED + sanitize.LARGE:
        assert not any(word in name for name in ran) and any(word in name for name in every), word


@pytest.mark.slow
def test_what_a_slow_process_raises_where_nobody_catches_it_ends_no_test(tmp_path):
    """It does in the suite, and nothing else is let pass."""
    file = tmp_path / "test_it.py"
    file.write_text(
        "import gc, pytest, warnings\n\nclass Late:\n    def __del__(self):\n        raise ValueError('late')\n\n"
        "@pytest.mark.gpu\ndef test_it():\n    Late()\n    gc.collect()\n"
    )
    asked = sanitize.Part("racecheck", "test_it", [], 1, 1).command("compute-sanitizer")
    asked = asked[asked.index(sys.executable) :]
    asked += ["-c", str(Path(__file__).parents[1] / "pyproject.toml"), "--rootdir", str(tmp_path), str(file)]
    as_in_the_suite = [word for word in asked if "Unraisable" not in word and word != "-W"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": path}}
    ended = [subprocess.run(words, **options) for words in (asked, as_in_the_suite)]
    assert [done.returncode for done in ended] == [0, 1], ended[0].stdout
