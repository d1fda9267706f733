"""`make`: what its targets run and say, without running them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"

pytestmark = pytest.mark.skipif(
    not (ROOT / "Makefile").exists() or not shutil.which("make"), reason="needs make, and the source"
)


def commands(target: str, folder: Path, *variables: str) -> str:
    done = subprocess.run(
        ["make", "-n", target, f"VENV={folder / 'venv'}", *variables], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_setup_shows_its_progress_and_knows_pytorch_without_cuda(tmp_path):
    said = commands("setup", tmp_path)
    assert "--quiet" not in said and " -q " not in said and "--index-url" not in said
    assert "1 of 2: PyTorch" in said and "2 of 2: klora" in said and f"TORCH_INDEX={CPU_WHEELS}" in said
    assert "du -sh" in said
    assert f"--index-url {CPU_WHEELS} torch" in commands("setup", tmp_path, f"TORCH_INDEX={CPU_WHEELS}")


@pytest.mark.parametrize(("target", "marks"), [("test", '"not gpu"'), ("test-fast", '"not gpu and not slow"')])
def test_the_tests_run_on_every_core_with_a_thread_each_and_are_counted_last(target, marks, tmp_path):
    last = commands(target, tmp_path).splitlines()[-1]
    assert last.startswith("OMP_NUM_THREADS=1 TRITON_INTERPRET=1 ") and "-n auto" in last and f"-m {marks}" in last
    assert "--cov" not in last and last in commands("coverage", tmp_path) or target == "test-fast"
    assert "--cov-fail-under=80" in commands("coverage", tmp_path)


def test_faults_kills_fifty_times_unless_told_otherwise(tmp_path):
    assert "KLORA_FAULTS=50 " in commands("faults", tmp_path) and "tests/test_faults.py" in commands("faults", tmp_path)
    assert "KLORA_FAULTS=10 " in commands("faults", tmp_path, "KILLS=10")


def test_the_audit_runs_the_tests_that_the_page_names(tmp_path):
    (last,) = re.findall(r"pytest .*", commands("audit", tmp_path))
    page = (ROOT / "docs/trust.md").read_text()
    assert "`make audit`" in page and "tests/test_audit.py tests/test_model_audit.py tests/test_verify.py" in last
    written = "".join(
        (ROOT / "tests" / name).read_text()
        for name in ("test_audit.py", "test_model_audit.py", "test_verify.py", "test_tokenizer.py")
    )
    promised = re.findall(r"`(test_\w+)`", page)
    assert len(promised) >= 9 and all(f"def {name}(" in written for name in promised)


def test_fuzz_sanitize_and_growth_say_what_they_run(tmp_path):
    assert "tests/fuzz.py --count 1000000 --seed 0" in commands("fuzz", tmp_path)
    assert "tests/fuzz.py --count 50 --seed 3" in commands("fuzz", tmp_path, "N=50", "SEED=3")
    assert "tests/sanitize.py" in commands("sanitize", tmp_path)
    assert "tests/growth.py --seconds 480" in commands("growth", tmp_path, "SECONDS=480")


def test_the_readme_and_the_command_say_how_long_the_tests_take(tmp_path):
    readme = (ROOT / "README.md").read_text()
    for target, most in (("test", 8), ("test-fast", 2)):
        (minutes,) = re.findall(rf"make {target} +#.*: about ([\d.]+) minutes", readme)
        assert f"about {minutes} minutes on two cores" in commands(target, tmp_path)
        assert float(minutes) <= most, "which is what they may take"
