"""What a scoring run has finished, on disk at once, so that an interrupted run can go on where it stopped.

`journal.jsonl` has one JSON object a line: which run it is, finished documents, seconds spent. `journal.base.npy` and
`journal.prequant.npy` beside it hold what the unadapted models said of each target, as far as they had come.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import KloraError
from ..model.reading import is_count, is_finite, open_regular, parse_json, read_bytes
from ..model.storage import replacing, write_text
from .documents import Document
from .protocols import TTTConfig
from .results import ADAPTED, NOT_ADAPTED, PARTIAL, SHORT, DocumentResult

STATUSES = (SHORT, ADAPTED, PARTIAL, NOT_ADAPTED)
PHASES = ("base", "prequant")
"""The passes of unadapted models whose results are kept."""


NPY_HEADER = re.compile(rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,18}), (\d{1,18})\), \} *\n")
"""Of an array [rows, columns] of fp32 as NumPy writes it."""

ROUNDING = 1e-4
"""Nats of a target by which rounding may bring a sure one below zero."""


class JournalError(KloraError, ValueError):
    """A journal that would be lost, that belongs to another run or is damaged, and what to do."""


class _OtherRun(JournalError):
    """A journal of a run with another artifact, other documents or other settings."""


class Journal:
    """Finished documents of one scoring run, by their index in `done`.

    Documents that a deadline left out are not finished: a run that goes on adapts them, if it is given time. With
    `resume`, `others` are journals of other ranks of the same run, whose documents are done, too. Without it the
    journal starts afresh; JournalError if that would lose finished work and `overwrite` does not say that it may.

    `fingerprint` is text that names the run: :func:`fingerprint` makes it of the artifact, the documents and the
    settings. JournalError, too, where a resumed journal is of another run, or is damaged. Call :meth:`close` at the
    end.

    Example: journal = Journal(Path("journal.jsonl"), fingerprint="run 1", resume=False)
    """

    def __init__(
        self, path: Path, fingerprint: str, resume: bool, others: Sequence[Path] = (), overwrite: bool = False
    ):
        self.path = path
        self.done: dict[int, DocumentResult] = {}
        self.seconds: dict[str, float] = {}
        self._base: dict[str, np.ndarray] = {}
        records: list[dict[str, Any]] = [{"fingerprint": fingerprint}]
        if resume:
            for known in others:
                # One that an earlier run left behind holds nothing of this one.
                with suppress(_OtherRun):
                    records += self._read(known, fingerprint)[1:]
            if path.exists():
                records += self._read(path, fingerprint)[1:]
                self._base = {phase: _read_array(file) for phase in PHASES if (file := self._array(phase)).exists()}
        elif not overwrite:
            _require_no_work([path, *others], [self._array(phase) for phase in PHASES])
        if not self._base:
            for phase in PHASES:
                self._array(phase).unlink(missing_ok=True)
        # Written whole again, so that a line torn by the interruption does not stay in the middle of the file.
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held open for the whole run)

    def _array(self, phase: str) -> Path:
        return self.path.with_suffix(f".{phase}.npy")

    def _read(self, path: Path, fingerprint: str) -> list[dict[str, Any]]:
        """The records of a journal, whose documents and seconds are taken in."""
        records = []
        for number, line in enumerate(read_bytes(path).splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # torn by the interruption
            try:
                record = _parsed(line)
                if number == 1 and "fingerprint" not in record:
                    raise ValueError("wanted the run's fingerprint")
                if number == 1 and record["fingerprint"] != fingerprint:
                    break
                if number > 1:
                    self._take_in(record)
            except ValueError as error:
                raise JournalError(
                    f"{path}, line {number}: {error}; remove that line, or give --overwrite to start afresh"
                ) from None
            records.append(record)
        if not records:
            raise _OtherRun(
                f"{path} belongs to a run with another artifact, other documents or other settings; "
                "give the same ones, or --overwrite to start afresh"
            )
        return records

    def _take_in(self, record: dict[str, Any]) -> None:
        """Note what a line says. ValueError for one that no run has written."""
        if "seconds" in record:
            seconds = record["seconds"]
            if not isinstance(seconds, dict) or not all(is_finite(value) and value >= 0 for value in seconds.values()):
                raise ValueError("seconds are no numbers by phase")
            # They add up over interruptions, and ranks run side by side: the most is the time spent.
            self.seconds = max(self.seconds, seconds, key=lambda spent: sum(spent.values()))
            return
        index, result = record.get("index"), _result(record.get("result"))
        if not is_count(index):
            raise ValueError(f"index {index!r:.60} is no document's")
        if result.status in (SHORT, ADAPTED):
            self.done[index] = result

    def _append(self, *records: dict[str, Any]) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()

    def add(self, results: dict[int, DocumentResult]) -> None:
        """Store finished documents by their index."""
        self._append(*({"index": i, "result": dataclasses.asdict(result)} for i, result in results.items()))
        self.done.update(results)

    def add_seconds(self, seconds: dict[str, float]) -> None:
        """Store the time spent so far by phase, for the run that goes on from here."""
        self._append({"seconds": seconds})

    def base(self, phase: str, cells: int) -> np.ndarray:
        """What is kept of a pass of an unadapted model: fp32 [2, cells], NaN where nothing is."""
        if phase not in self._base:
            self._base[phase] = np.full((2, cells), np.nan, dtype=np.float32)
        if self._base[phase].shape != (2, cells):
            raise JournalError(f"{self._array(phase)} is of other documents; give --overwrite to start afresh")
        return self._base[phase]

    def keep_base(self, phase: str) -> None:
        """Store what stands in the array that :meth:`base` gave."""
        with replacing(self._array(phase)) as temporary, open(temporary, "wb") as file:
            np.save(file, self._base[phase])

    @property
    def base_share(self) -> float:
        """The share of the base model's pass that is kept."""
        return _share(self._base["base"]) if "base" in self._base else 0.0

    def close(self) -> None:
        """Close the file; nothing can be added afterwards."""
        self._file.close()


class NoJournal(Journal):
    """A journal that keeps nothing on disk: of a run that is not to be resumed.

    `base` are the passes of the unadapted models, which another run over the same windows may go on with.
    """

    def __init__(self, base: dict[str, np.ndarray] | None = None):
        self.done, self.seconds = {}, {}
        self._base = {} if base is None else base

    def _append(self, *records: dict[str, Any]) -> None:
        pass

    def keep_base(self, phase: str) -> None:
        pass

    def close(self) -> None:
        pass


def open_journal(
    folder: Path, fingerprint: str, resume: bool, overwrite: bool = False, rank: int = 0, world: int = 1
) -> Journal:
    """The journal of one of `world` ranks; the first one's holds what all ranks of an interrupted run had finished."""
    if rank:
        return Journal(folder / f"journal-{rank}.jsonl", fingerprint, resume, overwrite=overwrite)
    others = sorted(folder.glob("journal-*.jsonl"))
    journal = Journal(folder / "journal.jsonl", fingerprint, resume, others, overwrite)
    if not resume:
        running = {f"journal-{number}.jsonl" for number in range(world)}
        for left_behind in (path for path in others if path.name not in running):
            left_behind.unlink()
    return journal


def fingerprint(artifact_sha256: str, documents: Sequence[Document], config: TTTConfig, prequant: bool) -> str:
    """What a journal belongs to. The batch size and the deadline change no document's score, and are left out."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("batch", "deadline")}
    digest = hashlib.sha256(json.dumps([artifact_sha256, settings, prequant]).encode())
    for document in documents:
        digest.update(document.name.encode(errors="surrogateescape") + b"\0" + document.tokens.tobytes())
    return digest.hexdigest()


def has_journals(folder: Path) -> bool:
    """Whether `folder` holds a journal, of a run that was interrupted."""
    return any(folder.glob("journal*"))


def remove_journals(folder: Path) -> None:
    """Remove the journals of all ranks and what lies beside them."""
    for path in [*folder.glob("journal*.jsonl"), *(folder / f"journal.{phase}.npy" for phase in PHASES)]:
        path.unlink(missing_ok=True)


def _require_no_work(journals: Iterable[Path], arrays: Iterable[Path]) -> None:
    finished = {path: count for path in journals if (count := _finished_in(path))}
    share = 0.0
    for path in arrays:
        with suppress(JournalError, OSError):  # a damaged one holds nothing
            share = max(share, _share(_read_array(path)))
    if finished or share:
        where = ", ".join(map(str, finished)) or str(next(iter(arrays)))
        base = f" and {share:.0%} of the base pass" if share else ""
        raise JournalError(
            f"{where}: {sum(finished.values()):,} finished documents{base} of an interrupted run would be lost; give "
            "--resume to go on from there, or --overwrite to start afresh"
        )


def _finished_in(path: Path) -> int:
    """How many finished documents a journal holds, whichever run it is of."""
    found = set()
    for line in read_bytes(path).splitlines() if path.exists() else ():
        with suppress(ValueError):
            record = _parsed(line)
            if "result" in record and _result(record["result"]).status in (SHORT, ADAPTED):
                found.add(str(record.get("index")))
    return len(found)


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. ValueError says what is there instead."""
    try:
        record = parse_json(line)
    except ValueError:
        raise ValueError(f"no JSON ({line[:40]!r})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON value of type {type(record).__name__}, not an object")
    return record


def _result(values: Any) -> DocumentResult:
    """A document's result from its JSON form. ValueError where it is none."""
    try:
        result = DocumentResult(**values)
    except TypeError:
        raise ValueError("no result of a document") from None
    counts = result.tokens, result.bytes, result.kept_pass, result.adapted_tokens, result.group
    nats = result.base_nats, result.tempered_nats, result.adapted_nats
    before = () if result.prequant_nats is None else (result.prequant_nats,)
    if not isinstance(result.name, str) or result.status not in STATUSES or not all(map(is_count, counts)):
        raise ValueError("a result whose values are of other types")
    if result.adapted_tokens > result.tokens:
        raise ValueError("a result with more adapted targets than targets")
    if not all(is_finite(value) and value >= -ROUNDING * result.tokens for value in (*nats, *before)):
        raise ValueError("a result whose NLL is negative or no number")
    result.name.encode(errors="surrogateescape")  # as a file's name can be; UnicodeEncodeError is a ValueError
    return result


def _read_array(path: Path) -> np.ndarray:
    """What :meth:`Journal.keep_base` wrote. Its header is compared with the file's size before memory is taken."""
    with open_regular(path) as file:
        start = file.read(10)
        header = file.read(int.from_bytes(start[8:], "little"))
        shape = [int(size) for found in [NPY_HEADER.fullmatch(header)] if found for size in found.groups()]
        left = os.fstat(file.fileno()).st_size - file.tell()
        if start[:8] != b"\x93NUMPY\x01\x00" or not shape or 4 * math.prod(shape) != left:
            raise JournalError(f"{path} is damaged; give --overwrite to start afresh")
        return np.fromfile(file, dtype="<f4").reshape(shape)


def _share(nll: np.ndarray) -> float:
    """The share of targets whose NLL is known."""
    return float(np.isfinite(nll).all(0).mean()) if nll.size else 0.0
