"""Where text comes from: the Python standard library, text files, or JSON lines.

A :class:`Corpus` is a description, not data. It can be iterated any number of times and holds one document at a time. A
document's split depends on its name alone, not on what else the corpus contains.
"""

import gzip
import hashlib
import json
import logging
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import zstandard

from ..errors import KloraError
from .reading import limit, open_regular, parse_json, raising, read_bytes

log = logging.getLogger(__name__)

KINDS = ("stdlib", "text", "jsonl")
SPLITS = ("all", "train", "validation")
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class CorpusError(KloraError, ValueError):
    """A source that does not exist, cannot be read, is malformed or has no document."""


@dataclass(frozen=True)
class TextDocument:
    """One text and the name that decides its split. `text` is never empty and encodes to UTF-8."""

    name: str
    text: str


def in_validation(name: str, share: float) -> bool:
    """Whether the document of that name is held out, for a held-out share in [0, 1].

    The name's hash alone decides, so that documents added, removed or reordered never move another one.
    """
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # a file's name need not be UTF-8
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Corpus:
    """A source of documents that can be read again. Build it with :meth:`stdlib`, :meth:`text` or :meth:`jsonl`.

    kind              "stdlib" | "text" | "jsonl"
    paths             files, and for "text" also directories; empty for "stdlib"
    field             "jsonl" only: the key of the text
    split             "all" | "train" | "validation"
    validation_share  share of the names in the validation split, above 0 and below 1
    """

    kind: str
    paths: tuple[Path, ...] = ()
    field: str = "text"
    split: str = "all"
    validation_share: float = 0.05

    @classmethod
    def stdlib(cls, split: str = "all", validation_share: float = 0.05) -> Self:
        """The running Python's own library: every *.py without its test suites, named by relative path."""
        return cls("stdlib", split=split, validation_share=validation_share)

    @classmethod
    def text(cls, paths: Iterable[str | Path], split: str = "all", validation_share: float = 0.05) -> Self:
        """UTF-8 files, one document each, and directories of them.

        A directory is walked in sorted order without following links to folders; entries whose name starts with a dot
        are left out, and files that are not UTF-8 are skipped with a warning. A file named in `paths` must be UTF-8.
        A document is named by its path inside the directory, or by its file name.
        """
        return cls("text", tuple(paths), split=split, validation_share=validation_share)

    @classmethod
    def jsonl(
        cls, paths: Iterable[str | Path], field: str = "text", split: str = "all", validation_share: float = 0.05
    ) -> Self:
        """Files of one JSON object a line, plain, .gz or .zst: the text under `field`, the name under "name".

        A document without a name is called FILE:LINE. Blank lines and empty texts are skipped.
        """
        return cls("jsonl", tuple(paths), field=field, split=split, validation_share=validation_share)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise CorpusError(f"kind={self.kind!r} is not possible; allowed: one of {', '.join(KINDS)}")
        if self.split not in SPLITS:
            raise CorpusError(f"split={self.split!r} is not possible; allowed: one of {', '.join(SPLITS)}")
        if not 0 < self.validation_share < 1:
            raise CorpusError(f"validation_share={self.validation_share!r} is not possible; allowed: above 0, below 1")
        object.__setattr__(self, "paths", tuple(Path(path) for path in self.paths))
        if (self.kind == "stdlib") != (not self.paths):
            raise CorpusError(f"a {self.kind} corpus takes {'no paths' if self.paths else 'at least one path'}")
        for path in self.paths:
            if not path.exists():
                raise CorpusError(f"{path}: there is no such file or directory")
            if self.kind == "jsonl" and path.is_dir():
                raise CorpusError(f"{path} is a directory; wanted files of one JSON object a line")
            if not (path.is_file() or path.is_dir()):
                raise CorpusError(f"{path} is a pipe, device or socket, which may never end; give a regular file")

    def with_split(self, split: str) -> Self:
        """The same source, another split of it."""
        return replace(self, split=split)

    def __str__(self) -> str:
        where = ", ".join(map(str, self.paths)) or sysconfig.get_path("stdlib")
        return f"{self.kind} corpus {where} (split {self.split})"

    def documents(self) -> Iterator[TextDocument]:
        """Yield the split's documents in a fixed order. CorpusError at the end if there was none."""
        found = False
        for document in self._readable():
            found = True
            yield document
        if not found:
            hint = (
                f"; documents go to validation by their names' hashes, a share of {self.validation_share}: "
                "give each split a corpus of its own, or another share"
            )
            raise CorpusError(f"{self}: no document with any text{'' if self.split == 'all' else hint}")

    def fingerprint(self) -> str:
        """Hex SHA-256 of what identifies the content without reading it: settings, paths, sizes, times of change."""
        parts = [self.kind, self.field, self.split, repr(self.validation_share)]
        if self.kind == "stdlib":
            parts.append(sys.version)
        for _, path, _ in self._files():
            seen = path.stat()
            parts.append(f"{path.resolve()} {seen.st_size} {seen.st_mtime_ns}")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _files(self) -> Iterator[tuple[str, Path, bool]]:
        """(document or file name, path, whether the caller named that very file)."""
        if self.kind == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            for path in _walk(root, NOT_LIBRARY):
                if path.suffix == ".py":
                    yield path.relative_to(root).as_posix(), path, False
        for root in self.paths:
            if root.is_dir():
                yield from ((path.relative_to(root).as_posix(), path, False) for path in _walk(root))
            else:
                yield root.name, root, True

    def _holds(self, name: str) -> bool:
        return self.split == "all" or in_validation(name, self.validation_share) == (self.split == "validation")

    def _readable(self) -> Iterator[TextDocument]:
        for name, path, named in self._files():
            if self.kind == "jsonl":
                yield from (found for found in _json_documents(path, self.field) if self._holds(found.name))
            elif self._holds(name) and (text := _read_text(path, named)):
                yield TextDocument(name, text)


def _walk(folder: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files below `folder`, sorted by their path's parts; hidden entries and `skipped` folders left out.

    What cannot be read, as a link that leads to itself, is left out with a warning. Folders may lie within each other
    as deep as the file system lets them.
    """
    waiting = _entries(folder)
    while waiting:
        entry = waiting.pop()
        try:
            is_folder, is_file = entry.is_dir(follow_symlinks=False), entry.is_file()
        except OSError as error:
            log.warning("%s skipped: %s", entry.path, error.strerror)
            continue
        if is_folder and entry.name not in skipped:
            waiting += _entries(Path(entry.path))
        elif is_file:
            yield Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, the last by name first; nothing, with a warning, where it cannot be read."""
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        log.warning("%s skipped: %s", folder, error)
        return []
    return [entry for entry in found if not entry.name.startswith(".")]


def _read_text(path: Path, named: bool) -> str:
    """The file's text, line ends as they are; '' with a warning if it cannot be read and was not asked for by name."""
    try:
        return read_bytes(path, "MAX_DOCUMENT_BYTES").decode()
    except (OSError, UnicodeDecodeError) as error:
        if named:
            raise CorpusError(f"{path}: wanted UTF-8 text, but {error}") from error
        log.warning("%s skipped: not readable as UTF-8 text: %s", path, error)
        return ""


def _json_documents(path: Path, field: str) -> Iterator[TextDocument]:
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip() and (document := _json_document(line, field, f"{path.name}:{number}")).text:
                yield document
    except _BadLine as error:
        raise CorpusError(
            f"{path}, line {number}: {error}; wanted one JSON object a line with the text under {field!r}"
        ) from None
    except _LongLine as error:
        raise CorpusError(f"{path}, line {number + 1}: {error}") from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(f"{path}, line {number + 1}: cannot be read: {error}") from error


ZSTD_STEP = 512
"""Bytes decompressed at a time: four of them can be 128 KiB of one character."""


class _BadLine(Exception):
    """What is wrong with a line."""


class _LongLine(Exception):
    """A line that is longer than a document may be."""


def _json_document(line: bytes, field: str, default_name: str) -> TextDocument:
    try:
        record = parse_json(line.decode(), numbers=False)
    except ValueError as error:
        raise _BadLine(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _BadLine(f"its value is of type {type(record).__name__}, not an object")
    if field not in record:
        raise _BadLine(f"no field {field!r} (it has {', '.join(map(repr, record)) or 'none':.200})")
    for key in ("name", field):
        value = record.get(key, "")  # the name of a file, where there is none, need not be UTF-8
        if not isinstance(value, str):
            raise _BadLine(f"field {key!r} is of type {type(value).__name__}, not a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _BadLine(f"field {key!r} has half a surrogate pair, which is no character") from None
    return TextDocument(record.get("name", default_name), record[field])


def _lines(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        if path.suffix == ".zst":
            yield from _split_lines(_zstd_blocks(file))
        elif path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield from _split_lines(iter(lambda: unpacked.read(2**16), b""))
        else:
            yield from _split_lines(iter(lambda: file.read(2**16), b""))


def _zstd_blocks(file) -> Iterator[bytes]:
    """Decompress frame by frame. zstandard's own stream reader takes a truncated file for a complete one."""
    # Text archives are made with windows of up to 2 GiB (zstd --long=31); the decoder's default stops at 128 MiB.
    decoder = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    while data := file.read(2**14):
        start = 0
        while start < len(data):
            frame = frame or decoder.decompressobj()
            part = data[start : start + ZSTD_STEP]
            yield frame.decompress(part)
            start += len(part)
            if frame.eof:
                start -= len(frame.unused_data)
                frame = None
    if frame is not None:
        raise EOFError("the compressed data ends in the middle of a frame")


def _split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that blocks make up. _LongLine: one that is longer than a document may be."""
    begun: list[bytes] = []
    size, most = 0, limit("MAX_DOCUMENT_BYTES")
    for block in blocks:
        *ended, last = block.split(b"\n")
        for line in ended:
            _require_short(size + len(line), most)
            yield b"".join([*begun, line])
            begun.clear()
            size = 0
        begun.append(last)
        size += len(last)
        _require_short(size, most)
    yield b"".join(begun)


def _require_short(size: int, most: int) -> None:
    if size > most:
        raise _LongLine(
            f"it has {size:,} bytes or more and {most:,} are allowed; {raising('MAX_DOCUMENT_BYTES', 16 * most)}, say"
        )
