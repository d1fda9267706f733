"""The distribution: what a wheel, an sdist and an editable install put on a machine, each in a fresh environment."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import klora
import pytest

ROOT = Path(__file__).parent.parent
SUBPACKAGES = ("kernels", "lora", "model", "ttt", "bench", "cli")
PROBE = """
import importlib.util, pathlib, klora
from importlib.metadata import entry_points, version
for name in ("", ".kernels", ".lora", ".model", ".ttt", ".bench", ".cli"):
    print(pathlib.Path(importlib.util.find_spec(f"klora{name}").origin).resolve().parent)
from klora.install import pip_install
print(pip_install("bench"))
assert version("klora-kernels") == klora.__version__
print([e.value for e in entry_points(group="console_scripts") if e.name == "klora"])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="on a GPU machine the tests travel without the source"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source to build from, so that no build leaves files in the repository; called as a clone may be."""
    copy = tmp_path_factory.mktemp("source") / "klora"
    for name in (*SUBPACKAGES, "src"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results", "*.egg-info"))
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


def build(kind: str, source: Path, out: Path, env: dict[str, str]) -> Path:
    """The 'wheel' or 'sdist' of `source`, by the backend that pip calls."""
    code = f"import sys; from setuptools.build_meta import build_{kind} as build; build(sys.argv[1])"
    out.mkdir()
    output_of(sys.executable, "-c", code, out, env=env, cwd=source)
    (built,) = out.iterdir()
    return built


def test_a_wheel_installs_every_package_and_the_command(source, borrowed, tmp_path):
    wheel = build("wheel", source, tmp_path / "wheel", borrowed)
    assert wheel.name == f"klora_kernels-{klora.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "klora/py.typed" in names
    assert not any("bench/results/" in name or "tests/" in name for name in names)
    sdist = build("sdist", source, tmp_path / "sdist", borrowed)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", unpacked, tmp_path / "again", borrowed)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(names)

    python = python_in_fresh_environment(tmp_path / "venv", borrowed, str(wheel))
    imported = "import klora.bench, klora.cli, klora.kernels.int6 as i, klora.lora, klora.ttt; print(i.__file__)"
    assert output_of(python, "-c", imported, env=borrowed, cwd=tmp_path).startswith(str((tmp_path / "venv").resolve()))
    for cwd in (tmp_path, source, source.parent):  # a clone does not go before what is installed
        *folders, advice, command = output_of(python, "-c", PROBE, env=borrowed, cwd=cwd).splitlines()
        assert len(folders) == 7 and all(folder.startswith(str((tmp_path / "venv").resolve())) for folder in folders)
        assert command == "['klora.cli:main']" and advice.endswith("pip install 'klora-kernels[bench]'")
    expected = f"klora {klora.__version__}\n"
    assert output_of(tmp_path / "venv" / "bin" / "klora", "--version", env=borrowed) == expected
    for module in ("klora", "klora.cli"):
        assert output_of(python, "-m", module, "--version", env=borrowed, cwd=source) == expected


def test_an_editable_install_imports_the_source_tree(source, borrowed, tmp_path):
    python = python_in_fresh_environment(tmp_path / "venv", borrowed, "--editable", str(source))
    expected = ["src/klora", *SUBPACKAGES]
    for cwd, place in ((tmp_path, str(source)), (source.parent, str(source)), (source, "")):
        *folders, advice, command = output_of(python, "-c", PROBE, env=borrowed, cwd=cwd).splitlines()
        assert sorted(folders) == sorted(str((source / name).resolve()) for name in expected)
        assert command == "['klora.cli:main']"
        assert advice.endswith(f"pip install -e '{place or '.'}[bench]'")
    assert output_of(python, "-m", "klora", "--version", env=borrowed, cwd=source.parent).startswith("klora ")


def test_no_advice_names_somebody_elses_package():
    """PyPI's `klora` is not this one."""
    named = re.compile(r"pip install[^\n]*\bklora\b(?!-kernels)|\bklora\[")
    paths = [ROOT / "README.md", *(path for name in (*SUBPACKAGES, "src") for path in (ROOT / name).rglob("*.py"))]
    assert not [(path, match[0]) for path in paths for match in named.finditer(path.read_text())]


def test_constraints_pin_every_dependency_and_the_tested_pair():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"
    setup = (ROOT / "setup.py").read_text()
    for name in (
        "numpy",
        "sentencepiece",
        "zstandard",
        "safetensors",
        "nvtx",
        "typer",
        "rich",
        "matplotlib",
        "transformers",
        "peft",
    ):
        assert name in pins and f'"{name}>=' in setup


def test_packages_import_only_what_their_place_allows():
    """kernels import no other package; model imports kernels; lora both; ttt all three; nothing imports bench, cli."""
    allowed = {"kernels": set(), "model": {"kernels"}, "lora": {"kernels", "model"}}
    allowed["ttt"] = set(allowed)
    for package, others in allowed.items():
        others = others | {package}  # a message may name what is its own
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            above = "." * (len(path.relative_to(ROOT).parts) - 1)  # how a file names its package's neighbours
            assert f"from .{above} import" not in text, path
            used = {other for other in SUBPACKAGES if f"from .{above}{other}" in text or f"klora.{other}" in text}
            assert used <= others, (path, used)
