"""New interpreters without the seconds of `import torch`: a server that has imported it forks one for each command.

It has imported more of what most commands need, where no GPU is: a fork of a process that asked for one cannot use it.
What a library reads from the environment when it is imported (TRITON_INTERPRET, MPLBACKEND) is therefore the server's.

A command is what stands behind `python`: -c CODE, -m MODULE or a FILE, and its arguments. It has an environment and a
folder of its own, signals reach it, and nothing of these tests is in it.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

SERVER = """
import contextlib, json, os, runpy, signal, sys, traceback
for name in sys.argv[1:]:
    __import__(name)

def run(first, *rest):
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")

def status_of(arguments):
    try:
        run(*arguments)
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else exit.code is not None
        if status is True:
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    return int(status)

def reap(*_):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass

signal.signal(signal.SIGCHLD, reap)
for line in sys.stdin:
    job = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(job["folder"])
    pid = os.fork()
    if pid:  # waits for the process, since nobody but its parent can
        with open(job["files"] + ".pid~", "w") as file: file.write(str(pid))
        os.rename(job["files"] + ".pid~", job["files"] + ".pid")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(job["files"] + ".status~", "w") as file: file.write(str(status))
        os.rename(job["files"] + ".status~", job["files"] + ".status")
        os._exit(0)
    for number, name in enumerate((os.devnull, job["files"] + ".out", job["files"] + ".err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(job["environment"])
    os._exit(status_of(job["arguments"]))
"""


LIBRARIES = (
    ("torch",) if torch.cuda.is_available() else ("torch", "torch._dynamo", "matplotlib.figure", "rich.progress")
)


@cache
def _server() -> tuple[subprocess.Popen, str]:
    """The server, and the folder of its files. It ends when its input does, at the latest with this process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", SERVER, *LIBRARIES], env=environment, text=True, **pipes)
    folder = tempfile.mkdtemp()

    @atexit.register
    def end():
        server.communicate()
        shutil.rmtree(folder)

    return server, folder


class Forked:
    """A process that has been started, with the methods of subprocess.Popen that these tests need."""

    count = 0

    def __init__(self, arguments, folder: Path | None = None, environment: dict[str, str] | None = None):
        server, files = _server()
        Forked.count += 1
        self._files = f"{files}/{Forked.count}"
        job = {
            "arguments": list(map(str, arguments)),
            "folder": str(folder or Path.cwd()),
            "environment": dict(os.environ if environment is None else environment),
            "files": self._files,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        self.pid = int(self._read("pid", 600))

    def _read(self, name: str, timeout: float) -> str:
        until, path = time.monotonic() + timeout, Path(f"{self._files}.{name}")
        while not path.exists():
            assert _server()[0].poll() is None, "the server of forks has ended"
            assert time.monotonic() < until, f"no {name} in {timeout:.0f} s"
            time.sleep(0.01)
        return path.read_text()

    def poll(self) -> int | None:
        path = Path(f"{self._files}.status")
        return int(path.read_text()) if path.exists() else None

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float = 600.0) -> int:
        return int(self._read("status", timeout))

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        """What it has written to stdout and stderr, at its end."""
        self.wait()
        return Path(f"{self._files}.out").read_text(), Path(f"{self._files}.err").read_text()
