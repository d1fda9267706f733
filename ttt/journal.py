"""What a scoring run has finished, on disk at once, so that an interrupted run can go on where it stopped.

`journal.jsonl` has one JSON object a line: first which run it is, then finished documents and the time. Where the NLL
of every target is kept, a document's line has the adapted model's, fp32 in base64. Every line says under which protocol
it was written and how many seconds the run had spent by then, so that a kill gives a deadline no time back. Its last
field, `chain`, is a checksum of the line and of all lines before it: a line that was changed, moved, taken out or
brought in from another journal is refused by its number. The checksum has no secret. It finds damage and mixtures;
whoever can run this code can write another journal.

`journal.base.npy` and `journal.prequant.npy` beside it hold what the unadapted models said of each target, as far as
they had come, and a checksum behind the array.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import KloraError
from ..model.reading import is_count, is_finite, limit, open_regular, parse_json, read_bytes
from ..model.storage import differences, replacing, write_text
from .documents import Document
from .protocols import SCORE_FIRST, TTTConfig
from .results import FINISHED, DocumentResult

JOURNAL = re.compile(r"journal(-[1-9]\d*)?\.jsonl")
"""Names of the journals of the first rank and of the others. A user's own file can have such a name, too."""

PHASES = ("base", "prequant")
"""The passes of unadapted models whose results are kept."""

MOST_SETTINGS = 2**16
"""Bytes of a journal's first line: a fingerprint and the settings of the run, some two thousand."""

NPY_HEADER = re.compile(rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,18}), (\d{1,18})\), \} *\n")
"""Of an array [rows, columns] of fp32 as NumPy writes it."""


class JournalError(KloraError, ValueError):
    """A journal that would be lost, that belongs to another run or is damaged, and what to do."""


class _OtherRun(JournalError):
    """A journal of a run with another artifact, other documents or other settings."""


class Journal:
    """Finished documents of one scoring run, by their index in `done`; `seconds` by phase are those of all its parts.
    `nll`, by the same index, has what the adapted model said of each target that it reached, as far as it is kept.

    Documents that a deadline left out are not finished: a run that goes on adapts them, if it is given time. With
    `resume`, `others` are journals of other ranks of the same run, whose documents are done, too. Without it the
    journal starts afresh; JournalError if that would lose finished work and `overwrite` does not say that it may.

    `fingerprint` is text that names the run: :func:`fingerprint` makes it of the artifact, the documents and the
    settings. `settings` are what :func:`settings_of` says of them: a journal of another run is refused by those that
    differ. JournalError, too, where a resumed journal is damaged; OSError where it cannot be written. Call
    :meth:`close` at the end.

    Example: journal = Journal(Path("journal.jsonl"), fingerprint="run 1", resume=False)
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        resume: bool,
        others: Sequence[Path] = (),
        overwrite: bool = False,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.path, self._fingerprint, self._settings = path, fingerprint, dict(settings)
        self.of_run = self._settings or {"fingerprint": fingerprint}
        self._protocol = self._settings.get("protocol", SCORE_FIRST)
        self.done: dict[int, DocumentResult] = {}
        self.nll: dict[int, np.ndarray] = {}
        self.seconds: dict[str, float] = {}
        self._base: dict[str, np.ndarray] = {}
        for file in (path, *map(self._array, PHASES)):
            if file.is_dir():
                raise JournalError(f"{file} is a folder in the place of a journal's file; move it away")
        if resume:
            for known in others:
                # One that an earlier run left behind holds nothing of this one.
                with suppress(_OtherRun):
                    self._read(known)
            if path.exists():
                self._read(path)
                files = {phase: self._array(phase) for phase in PHASES}
                self._base = {phase: self._checked(file) for phase, file in files.items() if file.exists()}
        elif not overwrite:
            _require_no_work([path, *others], [self._array(phase) for phase in PHASES])
            _require_no_other_file(path)
        if not self._base:
            for phase in PHASES:
                self._array(phase).unlink(missing_ok=True)
        # Written whole again, so that a line torn by the interruption does not stay in the middle of the file.
        self._chain = ""
        lines = [self._line({"fingerprint": fingerprint, "settings": self._settings})]
        lines += [self._line(_record(index, result, self.nll.get(index))) for index, result in self.done.items()]
        lines += [self._line({})] if self.seconds else []
        write_text(path, "".join(lines))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (held open for the whole run)

    def _array(self, phase: str) -> Path:
        return self.path.with_suffix(f".{phase}.npy")

    def _line(self, record: dict[str, Any]) -> str:
        """The next line of the journal."""
        text = json.dumps(record | {"protocol": self._protocol, "seconds": self.seconds})
        self._chain = _chained(self._chain, text)
        return f'{text[:-1]}, "chain": "{self._chain}"}}\n'

    def _read(self, path: Path) -> None:
        """Take in the documents and the seconds of a journal."""
        chain = ""
        for number, line in enumerate(read_bytes(path).splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # torn by the interruption
            try:
                record = _parsed(line)
                if number == 1:
                    self._require_this_run(path, record)
                chain = _next_chain(chain, record)
                if record.get("protocol") != self._protocol:
                    raise ValueError(f"it is of the protocol {record.get('protocol')!r:.40}, not of {self._protocol}")
                self._take_in(record)
            except ValueError as error:
                if isinstance(error, JournalError):
                    raise
                raise JournalError(
                    f"{path}, line {number}: {error}; remove that line and all after it, or give --overwrite to start "
                    "afresh"
                ) from None
        if not chain:
            raise _OtherRun(f"{path} does not say which run it is of; give --overwrite to start afresh")

    def _require_this_run(self, path: Path, record: dict[str, Any]) -> None:
        if "fingerprint" not in record:
            raise ValueError("wanted the run's fingerprint")
        if record["fingerprint"] != self._fingerprint:
            differing = differences(record.get("settings"), self._settings)
            raise _OtherRun(
                f"{path} belongs to a run with another artifact, other documents or other settings"
                f"{': ' + differing if differing else ''}; give the same ones, or --overwrite to start afresh"
            )

    def _take_in(self, record: dict[str, Any]) -> None:
        """Note what a line says. ValueError for one that no run has written."""
        seconds = record.get("seconds")
        if not isinstance(seconds, dict) or not all(is_finite(value) and value >= 0 for value in seconds.values()):
            raise ValueError("seconds are no numbers by phase")
        # They add up over interruptions, and ranks run side by side: the most is the time spent.
        self.seconds = max(self.seconds, seconds, key=lambda spent: sum(spent.values()))
        if "result" not in record:
            return
        index, result = record.get("index"), DocumentResult.from_json(record["result"])
        if not is_count(index):
            raise ValueError(f"index {index!r:.60} is no document's")
        if result.status in FINISHED:
            self.done[index] = result
            if "nll" in record:
                self.nll[index] = _nll_of(record["nll"], result.adapted_tokens)

    def _checked(self, file: Path) -> np.ndarray:
        """The array of a file. JournalError where it is not what a run of this fingerprint wrote."""
        array, checksum = _read_array(file)
        if checksum != self._checksum(array):
            raise JournalError(f"{file} is damaged; give --overwrite to start afresh")
        return array

    def _checksum(self, array: np.ndarray) -> bytes:
        return hashlib.sha256(self._fingerprint.encode() + array.tobytes()).digest()

    def _append(self, *records: dict[str, Any]) -> None:
        """OSError says what is kept: the journal as it was before."""
        chain, size = self._chain, os.fstat(self._file.fileno()).st_size
        lines = "".join(map(self._line, records)).encode()
        try:
            if self._file.write(lines) != len(lines):
                raise OSError("only part of it could be written")
        except OSError as error:
            self._chain = chain
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
            raise OSError(
                f"{self.path} could not be written ({error}); what was scored before is kept: make space, then the "
                "same command with --resume goes on from there"
            ) from None

    def add(
        self,
        results: dict[int, DocumentResult],
        seconds: Mapping[str, float] | None = None,
        nll: Mapping[int, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Store finished documents by their index, the time spent so far by phase, and the `nll` that are to be kept.

        A journal of half the size that may be read again takes no more of these: such documents are scored again.
        """
        self.seconds = self.seconds if seconds is None else dict(seconds)
        if self._is_half_full():
            nll = {}
        self._append(*(_record(index, result, nll.get(index)) for index, result in results.items()))
        self.done.update(results)

    def _is_half_full(self) -> bool:
        return os.fstat(self._file.fileno()).st_size > limit("MAX_RECORD_BYTES") // 2

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Store the time spent so far by phase, for the run that goes on from here."""
        self.seconds = dict(seconds)
        self._append({})

    def require_of(self, documents: Sequence[Document]) -> None:
        """JournalError unless what is done are results of these documents, as they are."""
        for index, result in self.done.items():
            kept = (result.name, result.tokens, result.bytes)
            if index >= len(documents) or kept != _about(documents[index]):
                raise JournalError(
                    f"{self.path} has a result of document {index} ({kept}) that is not the text's; "
                    "give --overwrite to start afresh"
                )

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
            file.write(self._checksum(self._base[phase]))

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
        self.of_run, self.done, self.nll, self.seconds = {}, {}, {}, {}
        self._base = {} if base is None else base

    def _append(self, *records: dict[str, Any]) -> None:
        pass

    def _is_half_full(self) -> bool:
        return True

    def keep_base(self, phase: str) -> None:
        pass

    def close(self) -> None:
        pass


def open_journal(
    folder: Path,
    fingerprint: str,
    resume: bool,
    overwrite: bool = False,
    rank: int = 0,
    world: int = 1,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Journal:
    """The journal of one of `world` ranks; the first one's holds what all ranks of an interrupted run had finished."""
    if rank:
        path = folder / f"journal-{rank}.jsonl"
        return Journal(path, fingerprint, resume, overwrite=overwrite, settings=settings)
    first = folder / "journal.jsonl"
    others = [path for path in _named_as_journals(folder) if path != first]  # a damaged one is refused, not passed over
    journal = Journal(first, fingerprint, resume, others, overwrite, settings)
    if not resume:
        running = {f"journal-{number}.jsonl" for number in range(world)}
        for left_behind in (path for path in others if path.name not in running and _is_journal(path)):
            left_behind.unlink()
    return journal


def settings_of(
    artifact_sha256: str, documents: Sequence[Document], config: TTTConfig, prequant: bool, **more: str
) -> dict[str, Any]:
    """What a journal belongs to, by name. The batch size and the deadline change no document's score, and are left out.

    The documents are named by a digest of their names, texts and tokens. `more` is what else a score depends on.
    """
    settings = {name: value for name, value in config.to_dict().items() if name not in ("batch", "deadline")}
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode(errors="surrogateescape") + b"\0" + document.sha256.encode())
        digest.update(document.tokens.tobytes())
    texts = f"{len(documents):,} of digest {digest.hexdigest()}"
    return {"artifact": artifact_sha256, "documents": texts, "prequant": prequant, **more, **settings}


def fingerprint(
    artifact_sha256: str, documents: Sequence[Document], config: TTTConfig, prequant: bool, **more: str
) -> str:
    """One hash of :func:`settings_of`."""
    settings = settings_of(artifact_sha256, documents, config, prequant, **more)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def has_journals(folder: Path) -> bool:
    """Whether `folder` holds a journal, of a run that was interrupted."""
    return bool(_journals_in(folder))


def remove_journals(folder: Path) -> None:
    """Remove the journals of all ranks and what lies beside them."""
    for path in [*_journals_in(folder), *(folder / f"journal.{phase}.npy" for phase in PHASES)]:
        path.unlink(missing_ok=True)


def _journals_in(folder: Path) -> list[Path]:
    """The journals of all ranks in `folder`; a file that merely has such a name is none, and is left alone."""
    return [path for path in _named_as_journals(folder) if _is_journal(path)]


def _named_as_journals(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("journal*.jsonl") if JOURNAL.fullmatch(path.name))


def _is_journal(path: Path) -> bool:
    """Whether the first line of a file says which run it is of."""
    try:
        with open_regular(path) as file:
            return "fingerprint" in _parsed(file.readline(MOST_SETTINGS))
    except (OSError, ValueError):
        return False


def _require_no_other_file(path: Path) -> None:
    """JournalError where a journal would take the place of what is none, as of a text of that name."""
    if path.exists() and not _is_journal(path):
        raise JournalError(
            f"{path} is there and is no journal of klora's, and a journal would take its place; move it, give another "
            "--out, or --overwrite to replace it"
        )


def _require_no_work(journals: Iterable[Path], arrays: Iterable[Path]) -> None:
    finished = {path: count for path in journals if (count := _finished_in(path))}
    share = 0.0
    for path in arrays:
        with suppress(JournalError, OSError):  # a damaged one holds nothing
            share = max(share, _share(_read_array(path)[0]))
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
            if "result" in record and DocumentResult.from_json(record["result"]).status in FINISHED:
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


def _record(index: int, result: DocumentResult, nll: np.ndarray | None) -> dict[str, Any]:
    kept = {} if nll is None else {"nll": base64.b64encode(nll.astype("<f4").tobytes()).decode()}
    return {"index": index, "result": vars(result), **kept}


def _nll_of(text: Any, targets: int) -> np.ndarray:
    """The NLL of so many targets that a line has. ValueError for what :func:`_record` has not written."""
    try:
        nll = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (TypeError, ValueError):
        nll = None
    if nll is None or len(nll) != targets or not np.isfinite(nll).all():
        raise ValueError(f"its nll are not the numbers of {targets:,} targets")
    return nll


def _about(document: Document) -> tuple[str, int, int]:
    return document.name, document.targets, document.bytes


def _chained(chain: str, text: str) -> str:
    """The checksum of a line, whose JSON without it is `text`, after one whose checksum is `chain`."""
    return hashlib.sha256(f"{chain} {text}".encode()).hexdigest()[:32]


def _next_chain(chain: str, record: dict[str, Any]) -> str:
    """The checksum of a line that follows one whose checksum is `chain`. ValueError where the line has another."""
    found = record.get("chain")
    if found is None:
        raise ValueError("it has no checksum, as no line of this klora")
    expected = _chained(chain, json.dumps({name: value for name, value in record.items() if name != "chain"}))
    if found != expected:
        raise ValueError("its checksum is wrong: it was changed, or it does not belong behind the line before it")
    return expected


def _read_array(path: Path) -> tuple[np.ndarray, bytes]:
    """The array of a file and the checksum behind it. Its header is compared with its size before memory is taken.

    JournalError where it is no such file.
    """
    with open_regular(path) as file:
        start = file.read(10)
        header = file.read(int.from_bytes(start[8:], "little"))
        shape = [int(size) for found in [NPY_HEADER.fullmatch(header)] if found for size in found.groups()]
        left = os.fstat(file.fileno()).st_size - file.tell() - hashlib.sha256().digest_size
        if start[:8] != b"\x93NUMPY\x01\x00" or not shape or 4 * math.prod(shape) != left:
            raise JournalError(f"{path} is damaged; give --overwrite to start afresh")
        return np.fromfile(file, dtype="<f4", count=math.prod(shape)).reshape(shape), file.read()


def _share(nll: np.ndarray) -> float:
    """The share of targets whose NLL is known."""
    return float(np.isfinite(nll).all(0).mean()) if nll.size else 0.0
