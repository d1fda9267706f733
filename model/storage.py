"""What a run leaves on disk: files that are whole or absent, and pictures whose failure costs nothing else.

A file is written beside its final name, synced, then renamed over it.
"""

import glob
import os
import shutil
import socket
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on success it is fsynced and takes the name `path`.

    On an exception the temporary file goes and whatever had the name before stays as it was. The rename is atomic on
    one POSIX file system, and the folder is synced too, so that a power cut leaves the old file or the new one. The
    file gets the permissions of the one it replaces, or those that the umask gives a new one, whoever writes it. What
    processes of this machine left half written when they were killed is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = os.fsencode(path.name)  # cut: with what is added it could be too long for a file system
    begin = f".{os.fsdecode(name[:100])}.{zlib.crc32(name + socket.gethostname().encode()):08x}."
    for left in path.parent.glob(f"{glob.escape(begin)}*.partial"):
        pid = left.name[len(begin) : -len(".partial")]
        if pid.isdigit() and not _is_alive(int(pid)):
            left.unlink(missing_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder where a file is to be written; move it away")
    temporary = path.with_name(f"{begin}{os.getpid()}.partial")
    try:
        temporary.touch()
        mode = (path if path.is_file() else temporary).stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # safetensors writes with 0600, whatever the umask
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `folder`, to build it in; it is removed at the end, whatever is left in it.

    What processes of this machine left beside it when they were killed is removed.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    host = f"{zlib.crc32(socket.gethostname().encode()):08x}"
    for left in folder.parent.glob(f".*.{host}.*.building"):
        pid = left.name.split(".")[-3]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.{host}.{os.getpid()}.", suffix=".building", dir=folder.parent
    ) as temporary:
        yield Path(temporary)


def _is_alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def write_bytes(path: Path, *parts: bytes) -> None:
    """Write `parts` one after the other as the whole content of `path`, atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for part in parts:
            file.write(part)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` as the whole content of `path`, atomically."""
    write_bytes(path, text.encode())


def sync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_writable(path: Path, size: int = 0) -> None:
    """OSError unless a file or folder `path` can be written; nothing is created.

    Tried in the nearest folder that exists, which must have `size` bytes free.
    """
    folder = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if folder == Path(path).absolute() and not folder.is_dir():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            free = os.fstatvfs(file.fileno())
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {folder}: {error.strerror}; give a path in a writable folder"
        ) from None
    if free.f_bavail * free.f_frsize < size:
        raise OSError(
            f"{path} needs {size:,} bytes and {folder} has {free.f_bavail * free.f_frsize:,} free; "
            "make space or give a path on another disk"
        )


def differences(stored: Any, given: Mapping[str, Any]) -> str:
    """Which of the settings `given` are others in `stored`, for people; empty where it cannot be said."""
    if not isinstance(stored, dict):
        return ""
    names = [name for name in given if name in stored and stored[name] != given[name]]
    return ", ".join(f"{name} is {stored[name]!s:.40} there and {given[name]!s:.40} here" for name in names)


def load_matplotlib() -> None:
    """Import matplotlib whatever MPLBACKEND says; call it before any other import of it.

    A notebook hands its backend down to the commands it starts, and matplotlib refuses to be imported with one that is
    not installed. Nothing here shows a picture, so no backend is needed.
    """
    before = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib  # noqa: F401
    finally:
        if before is not None:
            os.environ["MPLBACKEND"] = before


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, `width` x `height` inches, on the Agg canvas: no pyplot and no backend."""
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def figure_png(figure: Any, dpi: int) -> bytes:
    """The picture as PNG."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    return png.getvalue()


def attempt(what: str, work: Callable[[], T], say: Callable[[str], None] = warnings.warn) -> T | None:
    """work(), or None where it raises: what ornaments a run never ends it. `say` gets a line that names `what`."""
    try:
        return work()
    except Exception as error:
        say(f"{what} could not be made ({type(error).__name__}: {error}); the results do not need it")
        return None
