"""One command at a time writes into a folder: a lock that the system takes back from a process that dies.

The lock is flock's on a hidden file in the folder. The file says who holds it, for the sentence that a second command
gets. A kill leaves the file and releases the lock: what a file says bars nobody. A network folder's locks reach across
machines where its file system has any; where it has none, a command goes on with a warning.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ..errors import KloraError
from .reading import parse_json
from .storage import require_writable

UNABLE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What flock says on a file system without locks."""


class Locked(KloraError, RuntimeError):
    """Another process writes there: which, and what to do."""


@contextmanager
def locked(
    out: str | Path, rank: str = "", is_file: bool = False, say: Callable[[str], None] = warnings.warn
) -> Iterator[None]:
    """Hold the lock of the folder `out`, or of one `rank` of a run in it; with `is_file`, that of the file `out`.

    Folders that are made for the lock are removed at the end where nothing else is in them. Locked: another process has
    it. OSError: the folder cannot be written.
    """
    out = Path(out).absolute()
    require_writable(out)
    folder, name = (out.parent, f".{out.name}.lock") if is_file else (out, f".klora{'-' + rank if rank else ''}.lock")
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = _opened(folder / name, out, say)
    try:
        yield
    finally:
        (folder / name).unlink(missing_ok=True)
        os.close(handle)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _opened(path: Path, guarded: Path, say: Callable[[str], None]) -> int:
    """The lock file, open and locked, with this process's description in it."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except IsADirectoryError:
            raise IsADirectoryError(f"{path} is a folder in the place of klora's lock file; remove it") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise Locked(f"{guarded} is in use by {holder}; wait until it has ended, or give another --out") from None
        except OSError as error:
            if error.errno not in UNABLE:
                os.close(handle)
                raise
            say(f"{guarded} is on a file system without locks ({error.strerror}): let no other command write there")
        # Whoever held it may have removed the file while this process opened it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                break
        os.close(handle)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv[1:2])}
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(about | {"since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}).encode())
    return handle


def _holder(handle: int) -> str:
    """Who the file says holds the lock, for people."""
    try:
        about = parse_json(os.pread(handle, 4096, 0))
        pid, host, command, since = (about[key] for key in ("pid", "host", "command", "since"))
        return f"klora {command!s:.20} (process {pid:d} on {host!s:.60}, since {since!s:.20})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
