"""Files that nobody vouches for: only regular ones are opened, they are read up to a limit, and JSON is plain JSON.

The limits are declared here. Each can be raised by an environment variable of its name with KLORA_ before it, in bytes.

    MAX_MODEL_BYTES     2 GiB    what a model takes from its file to the weights that the forward reads
    MAX_DOCUMENT_BYTES  128 MiB  one text, or one JSON line; tokenizing takes up to 40 times as much
    MAX_RECORD_BYTES    256 MiB  a file of JSON or CSV that klora wrote: journal, run.json, loss.csv, benchmark records
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import KloraError

DEFAULTS = {"MAX_MODEL_BYTES": 2 << 30, "MAX_DOCUMENT_BYTES": 128 << 20, "MAX_RECORD_BYTES": 256 << 20}
MAX_DEPTH = 100
"""Objects and lists within each other; nothing that klora writes has more than a dozen."""


class LimitError(KloraError, ValueError):
    """A limit in the environment that is no number of bytes."""


def limit(name: str) -> int:
    """The bytes allowed under one of the names above: the environment's, or the default. LimitError: no number."""
    text = os.environ.get(f"KLORA_{name}", "")
    if not text:
        return DEFAULTS[name]
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text)):
        raise LimitError(f"KLORA_{name}={text!r} is not possible; allowed: bytes, from 1 to 10^18")
    return int(text)


def raising(name: str, needed: int) -> str:
    """How one raises a limit."""
    return f"if you trust the file, set KLORA_{name}={needed}"


def open_regular(path: Path) -> BinaryIO:
    """The file, open for reading in binary. OSError for what is none: a pipe is waited for, a device may never end."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder where a file is to be read; move it away or give a file") from None
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(f"{path} is a pipe, device or socket, which may never end; give a regular file")


def read_bytes(path: Path, name: str = "MAX_RECORD_BYTES") -> bytes:
    """The whole file. OSError: it cannot be read, is no regular file, or is larger than the limit of that name."""
    most = limit(name)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(f"{path} has {size:,} bytes and {most:,} are allowed; {raising(name, size)}")
        return file.read(most + 1)[:most]


def parse_json(data: bytes | str, numbers: bool = True) -> Any:
    """The value of a JSON text. ValueError: no JSON or UTF-8, a name twice in an object, more than MAX_DEPTH levels, an
    integer beyond 64 bits: a formula would overflow on it.

    With `numbers`, also NaN, infinities and what is beyond float64.
    """
    hooks = {"parse_float": _finite, "parse_constant": _finite} if numbers else {}
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_int=_integer, **hooks)
    except RecursionError:
        raise ValueError("its objects and lists are too deep") from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"its objects and lists are over {MAX_DEPTH} deep")
    return value


def read_json(path: Path) -> Any:
    """The value in a JSON file. OSError as of `read_bytes`, ValueError as of `parse_json`."""
    return parse_json(read_bytes(path))


def is_count(value: Any, most: int = 2**53) -> bool:
    """Whether a value from JSON is an integer from 0 to `most`; true and false are none."""
    return type(value) is int and 0 <= value <= most


def is_finite(value: Any) -> bool:
    """Whether a value from JSON is a number that float64 holds."""
    if type(value) is int:
        return abs(value) <= 2**53
    return type(value) is float and value - value == 0


def _integer(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) >= 2**64:
        raise ValueError(f"the integer {text:.30} is beyond 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"the number {text:.30} is not finite")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        _refuse_twice([name for name, _ in pairs])
    return value


def _refuse_twice(names: list[str]) -> NoReturn:
    seen: set[str] = set()
    twice = next(name for name in names if name in seen or seen.add(name))
    raise ValueError(f"the name {twice!r:.60} stands twice in one object")


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
