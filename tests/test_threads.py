"""Threads and processes: no more than the cores that a command may use, shared with those that run beside it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from klora import cores
from klora.cli import threads
from klora.kernels import precompile
from klora.model.parallel import processes_here

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def machine(root, groups: str, files: dict[str, str]):
    """A root with the control groups of a process, and what their files say."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight(monkeypatch):
    """Eight cores that the process may run on, and 64 that the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "250000 100000"}, 2),
        ("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "1600000 100000"}, 8),
        ("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "20000 100000"}, 1),
        (
            "12:memory:/m\n4:cpu,cpuacct:/docker/1\n0::/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "500000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            5,
        ),
        (
            "1:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            8,
        ),
        ("nonsense", {"sys/fs/cgroup/cpu.max": "1 1"}, 8),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "what"}, 8),
    ],
)
def test_the_cores_are_those_of_the_affinity_and_of_the_control_groups(tmp_path, eight, groups, files, expected):
    assert cores.usable_cores(machine(tmp_path, groups, files)) == expected


def test_a_machine_without_control_groups_has_its_affinity(tmp_path, eight):
    assert cores.usable_cores(tmp_path) == 8


@pytest.mark.parametrize(
    ("device", "processes", "omp", "expected"),
    [
        (CPU, 1, None, 8),
        (CPU, 4, None, 2),
        (CPU, 100, None, 1),
        (GPU, 1, None, 4),  # a machine of 64 cores, of which it may use 8
        (GPU, 4, None, 2),
        (GPU, 1, "16", 64),
        (CPU, 4, "16", 64),
    ],
)
def test_threads_are_a_share_of_the_cores_and_few_beside_a_gpu(monkeypatch, eight, device, processes, omp, expected):
    chosen = [64]
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(threads, "processes_here", lambda: processes)
    threads.settle_threads(device)
    assert chosen[-1] == expected
    monkeypatch.setattr(threads, "processes_here", lambda: 1)
    threads.settle_threads(device)  # more than it has, nobody gives it
    assert chosen[-1] == expected


def test_ranks_that_are_started_by_hand_share_the_cores(monkeypatch):
    """Nothing says how many of them are on this machine: all."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes_here() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes_here() == 2
    monkeypatch.delenv("RANK")
    assert processes_here() == 1


def test_no_more_processes_compile_than_there_are_cores(monkeypatch):
    class Pool:
        def __init__(self, jobs, *about, **more):
            raise InterruptedError(jobs)

    monkeypatch.setattr(precompile, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(precompile, "usable_cores", lambda: 3)
    with pytest.raises(InterruptedError, match="^3$"):
        precompile.compile_all([None] * 50)
    with pytest.raises(InterruptedError, match="^5$"):
        precompile.compile_all([None] * 50, jobs=5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, cores.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_a_command_says_how_long_threads_spin_before_torch_is_loaded(given, expected):
    code = """
import json, os, sys
from klora.cli import app
app.app = lambda: print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules]))
app.main()
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**environment, **given})
    assert json.loads(done.stdout) == [expected, False], done.stderr
