"""The distribution: what a wheel and an editable install put on a machine, in a fresh virtual environment of each."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "model", "ttt", "bench", "cli")
PROBE = """
import importlib, pathlib, sys
from importlib.metadata import entry_points, version
for room in sys.argv[1:]:
    print(pathlib.Path(importlib.import_module(f"klora.{room}").__file__).resolve().parent)
print(version("klora"), [e.value for e in entry_points(group="console_scripts") if e.name == "klora"])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="on a GPU machine the tests travel without the source"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source to build from, so that no build leaves files in the repository."""
    copy = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory) -> dict[str, str]:
    """An environment that lends this one's packages, klora left out, to another interpreter."""
    folder = tmp_path_factory.mktemp("packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "klora" not in path.name:
            (folder / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": str(folder)}


def output_of(*command: str | Path, env: dict[str, str], cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_in_fresh_environment(folder: Path, borrowed: dict[str, str], *install: str) -> Path:
    """The interpreter of a new virtual environment with klora installed."""
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-build-isolation")
    output_of(*pip, *install, env=borrowed)
    return python


def test_a_wheel_installs_all_rooms_and_the_command(source, borrowed, tmp_path):
    wheel_of = (sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir")
    output_of(*wheel_of, tmp_path, source, env=borrowed)
    (wheel,) = tmp_path.glob("klora-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not any("bench/results/" in name or "tests/" in name for name in names)
    python = python_in_fresh_environment(tmp_path / "venv", borrowed, str(wheel))
    *folders, last = output_of(python, "-c", PROBE, *ROOMS, env=borrowed, cwd=tmp_path).splitlines()
    assert len(folders) == len(ROOMS)
    assert all(folder.startswith(str((tmp_path / "venv").resolve())) for folder in folders)
    assert last.endswith("['klora.cli:main']")
    assert output_of(tmp_path / "venv" / "bin" / "klora", "--version", env=borrowed).startswith("klora ")


def test_an_editable_install_imports_the_source_tree(source, borrowed, tmp_path):
    python = python_in_fresh_environment(tmp_path / "venv", borrowed, "--editable", str(source))
    *folders, _ = output_of(python, "-c", PROBE, *ROOMS, env=borrowed, cwd=tmp_path).splitlines()
    assert folders == [str((source / room).resolve()) for room in ROOMS]


def test_constraints_pin_every_dependency_and_the_tested_pair():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"
    setup = (ROOT / "setup.py").read_text()
    for name in ("numpy", "sentencepiece", "zstandard", "safetensors", "nvtx", "typer", "rich", "matplotlib"):
        assert name in pins and f'"{name}>=' in setup


def test_rooms_import_only_what_their_place_allows():
    """kernels import no other room; model imports kernels; ttt both; nothing imports bench or cli."""
    allowed = {"kernels": set(), "model": {"kernels"}, "ttt": {"kernels", "model"}}
    for room, others in allowed.items():
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            above = "." * (len(path.relative_to(ROOT).parts) - 1)  # how a file names its room's neighbours
            assert f"from .{above} import" not in text, path
            used = {other for other in ROOMS if f"from .{above}{other}" in text or f"klora.{other}" in text}
            assert used <= others, (path, used)
