"""How klora and what it needs are installed here: the command that a message can advise."""

import shlex
import shutil
import sys
from pathlib import Path

DISTRIBUTION = "klora-kernels"


def pip_install(extra: str = "", *options: str) -> str:
    """The command that adds `extra` to this installation: to the clone that it runs from, or by the name on PyPI.

    It reaches this interpreter's packages from the current folder; `options` are pip's.
    """
    clone = Path(__file__).resolve().parents[2]
    if (clone / "setup.py").is_file() and (clone / "src/klora/install.py").is_file():
        what = ["-e", "." if clone == Path.cwd() else str(clone)]
    else:
        what = [DISTRIBUTION]
    what[-1] += f"[{extra}]" if extra else ""
    return shlex.join([*_pip(), "install", *options, *what])


def _pip() -> list[str]:
    """`pip` where that is this interpreter's, as in an activated environment."""
    found = shutil.which("pip")
    is_own = found is not None and Path(found).parent == Path(sys.executable).parent
    return ["pip"] if is_own else [sys.executable, "-m", "pip"]
