"""The script behind `make sanitize`: what it runs and how it reads what the tools say. The tools want a GPU."""

from pathlib import Path

import klora.kernels
import pytest
import sanitize
import torch

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at _rms_norm_forward+0x1b0 in rms.py:30
=========     by thread (33,0,0) in block (0,0,0)
========= Invalid __global__ read of size 2 bytes
=========     at _rms_norm_forward+0x1b0 in rms.py:30
3 passed
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
CLEAN = "========= COMPUTE-SANITIZER\n3 passed\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_one_sentence_and_status_2(capsys):
    assert sanitize.main([]) == 2
    assert capsys.readouterr().out == f"{sanitize.NO_GPU}\n"


def test_what_a_tool_found():
    counted, kernels = sanitize.findings(MEMCHECK)
    assert counted == 2 and kernels == {"_rms_norm_forward": 2}
    assert sanitize.findings(RACECHECK)[0] == 1 and sanitize.findings(CLEAN) == (0, {})


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
    ("text", "status", "tool"), [(CLEAN, 0, "memcheck"), (MEMCHECK, 1, "memcheck"), (MEMCHECK, 0, "initcheck")]
)
def test_the_verdict(text, status, tool, tmp_path, monkeypatch, capsys):
    """A finding fails the run; initcheck's, which has a known blind spot, are listed by kernel to be explained."""
    stub = tmp_path / "compute-sanitizer"
    stub.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    stub.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = [
        "--jobs",
        "2",
        "--sanitizer",
        str(stub),
        "--tool",
        tool,
        "--file",
        "test_mlp",
        "--logs",
        str(tmp_path / "logs"),
    ]
    assert sanitize.main(given) == status
    said = capsys.readouterr().out
    assert f"--tool {tool}" in said and "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in said, "the command is printed"
    assert ("_rms_norm_forward x2" in said) == (text == MEMCHECK)
