"""What scoring found: one record a document, totals, and their CSV and JSON forms.

    BPB = nats / ln 2 / bytes of the original text,   sums over documents in float64

Of token shards whose tokenizer normalises, the text is the normalised one, which is all that they hold; notes say so.

A result of a leaky protocol says LEAKY in every form: in the CSV's column name, in the JSON and in the report. Where a
deadline left targets to the base model, the share that was adapted stands beside the number in every form. So does,
with phases, that scores depend on earlier documents.
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import KloraError
from ..model.reading import is_count, is_finite, read_bytes
from ..model.storage import replacing, write_text
from .documents import Document
from .protocols import LEAK_WARNING, LEAKY, NOT_CAUSAL, TTTConfig, label

if TYPE_CHECKING:
    from .token_gains import TokenGains

SCORE = "score.json"
"""Name of the file that holds everything."""

DOCUMENTS, REPORT, PICTURE = "documents.csv", "report.html", "report.png"
"""Names of the files beside it."""

RESULTS = SCORE, DOCUMENTS, REPORT, PICTURE

SHORT, ADAPTED, PARTIAL, NOT_ADAPTED = "short", "adapted", "partly adapted (deadline)", "not adapted (deadline)"
DIVERGED = "diverged: base model from there"
"""Of a document whose adapter gave an NLL that is no number: what it scored before counts, and the base model's score
from that target on. Nothing later has a say in where that is."""
BASE_ALONE = "base model alone"
"""Of a document that nothing was to adapt to."""

STATUSES = SHORT, ADAPTED, PARTIAL, NOT_ADAPTED, DIVERGED, BASE_ALONE
FINISHED = SHORT, ADAPTED, DIVERGED
"""Of documents that a run which goes on does not score again."""

NLL_ROUNDING = 2.0**-13
"""Nats by which rounding may put an NLL below 0: of each target, and as often of a document as it has targets.

The NLL is a logsumexp minus a logit in fp32, which for a target that is all but certain are the same number. Of 256 to
512, more than any logits are that a model is trained with, numbers of fp32 are 2^-15 apart. Four such steps are for
what the two went through before: sums in another order, exp and log to the base 2."""

LISTED = 5
"""Names of diverged documents that a note lists."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a spreadsheet takes for a formula's start, with the full-width forms of the four signs."""


class NonFiniteScore(KloraError, RuntimeError):
    """An NLL of the unadapted model that is no number: its weights are not finite."""


@dataclass(frozen=True)
class Adapted:
    """What adapting documents gave: float64 nats [B] (of the targets reached), how many targets, and the pass kept.

    `diverged` bool [B]: whether the next target's NLL is no number; in a leaky protocol no target counts then. `nll`:
    of each document fp32 of the targets reached, whose sum its nats are.
    """

    nats: np.ndarray
    targets: np.ndarray
    kept_pass: np.ndarray
    diverged: np.ndarray
    nll: Sequence[np.ndarray]

    def of(self, rows: np.ndarray) -> "Adapted":
        """The results of these documents."""
        nll = [self.nll[row] for row in rows]
        return Adapted(self.nats[rows], self.targets[rows], self.kept_pass[rows], self.diverged[rows], nll)


@dataclass(frozen=True)
class DocumentResult:
    """One document: `tokens` scored targets, `bytes` of text, and its NLL in nats by several models.

    base_nats: the artifact's model as it is. tempered_nats: the same at the adapted temperature, for documents that are
    long enough to adapt. prequant_nats: the model before quantisation, where one was given. adapted_nats: the score, of
    which `adapted_tokens` targets come from the adapted model and the rest from the base model. group: which of the
    groups of the phases it is in; 0 without phases.
    """

    name: str
    tokens: int
    bytes: int
    status: str
    base_nats: float
    tempered_nats: float
    adapted_nats: float
    prequant_nats: float | None = None
    kept_pass: int = 0
    adapted_tokens: int = 0
    group: int = 0

    @classmethod
    def from_json(cls, values: Any) -> "DocumentResult":
        """What `asdict` made JSON of. ValueError for values that no document can have."""
        try:
            result = cls(**values)
        except TypeError:
            raise ValueError("no result of a document") from None
        counts = result.tokens, result.bytes, result.kept_pass, result.adapted_tokens, result.group
        nats = [result.base_nats, result.tempered_nats, result.adapted_nats]
        nats += [] if result.prequant_nats is None else [result.prequant_nats]
        if not all(isinstance(text, str) for text in (result.name, result.status)) or not all(
            type(count) is int for count in counts
        ):
            raise ValueError("a result whose values are of other types")
        if result.status not in STATUSES or not all(map(is_count, counts)) or result.adapted_tokens > result.tokens:
            raise ValueError(f"a result that no document can have: {result!r:.300}")
        if not all(is_finite(value) and value >= -NLL_ROUNDING * result.tokens for value in nats):
            raise ValueError(f"a result whose nats are negative or no number: {nats!r:.200}")
        result.name.encode(errors="surrogateescape")  # as a file's name can be; UnicodeEncodeError is a ValueError
        return result

    @property
    def base_bpb(self) -> float | None:
        """Bits per byte of the model as it is; None where there is no text."""
        return bits_per_byte(self.base_nats, self.bytes)

    @property
    def adapted_bpb(self) -> float | None:
        """Bits per byte of the score; None where there is no text."""
        return bits_per_byte(self.adapted_nats, self.bytes)

    @property
    def gain_bpb(self) -> float | None:
        """base - adapted, positive is better; None where nothing was adapted, there is no text, or it is not finite."""
        if self.status not in (ADAPTED, PARTIAL, DIVERGED) or not self.bytes:
            return None
        gain = self.base_bpb - self.adapted_bpb
        return gain if math.isfinite(gain) else None

    @property
    def adapted_share(self) -> float | None:
        """The share of its targets that the adapted model scored; None where the document is too short to adapt."""
        if self.status == SHORT:
            return None
        return 1.0 if self.status == ADAPTED else self.adapted_tokens / self.tokens


def is_short(document: Document, config: TTTConfig, group: int = 0) -> bool:
    """Whether the document is left to the base model, in that group of the phases."""
    return config.is_left_to_base(document.targets, group)


def unadapted(
    document: Document, config: TTTConfig, base: tuple[float, float], prequant: float | None = None, group: int = 0
) -> DocumentResult:
    """The document as the base model leaves it: `base` are its nats and those at the adapted temperature.

    NonFiniteScore where one of them is no number.
    """
    nats, tempered = base
    if not all(math.isfinite(value) for value in (nats, tempered, prequant or 0.0)):
        raise NonFiniteScore(
            f"the unadapted model gives {document.name!r} an NLL of {nats}, before quantisation {prequant}; nothing is "
            "reported. Export an artifact whose weights are finite"
        )
    return DocumentResult(
        name=document.name,
        tokens=document.targets,
        bytes=document.bytes,
        status=SHORT if is_short(document, config, group) else NOT_ADAPTED,
        base_nats=nats,
        tempered_nats=tempered,
        adapted_nats=nats,
        prequant_nats=prequant,
        group=group,
    )


def with_adaptation(
    draft: DocumentResult, adapted: Adapted, row: int, base_from: Callable[[int], float]
) -> DocumentResult:
    """`draft` with the targets that were reached scored by the adapted model, and the rest by the base model.

    `base_from` gives the base model's nats from a target on.
    """
    reached, diverged = int(adapted.targets[row]), bool(adapted.diverged[row])
    if not reached:
        return replace(draft, status=DIVERGED) if diverged else draft
    return replace(
        draft,
        status=DIVERGED if diverged else ADAPTED if reached == draft.tokens else PARTIAL,
        adapted_nats=float(adapted.nats[row]) + base_from(reached),
        kept_pass=int(adapted.kept_pass[row]),
        adapted_tokens=reached,
    )


def bits_per_byte(nats: float | None, text_bytes: int) -> float | None:
    """nats / ln 2 / bytes; None where there is no text or nothing was measured."""
    return nats / math.log(2) / text_bytes if text_bytes and nats is not None else None


@dataclass(frozen=True)
class ScoreResult:
    """Every document's result, the config they were scored with, seconds by phase and facts of the run.

    Of the facts, `notes` are sentences that belong beside every number; `bytes_of` says of which text the bytes are.
    `token_gains` is for the report alone, where the run could keep it. `sha256` of each document is that of its text,
    or of its tokens where there is no text. `nll` has each document's targets [n] in nats, where they were asked for.
    """

    documents: Sequence[DocumentResult]
    config: TTTConfig
    seconds: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    token_gains: "TokenGains | None" = field(default=None, compare=False, repr=False)
    sha256: Sequence[str] = ()
    nll: Sequence[np.ndarray] | None = field(default=None, compare=False, repr=False)

    @property
    def has_gains(self) -> bool:
        """Whether any document's gain was kept, target by target."""
        return self.token_gains is not None and self.token_gains.documents > 0

    @property
    def deadline_hit(self) -> bool:
        """Whether the deadline left any target to the base model."""
        return any(d.status in (PARTIAL, NOT_ADAPTED) for d in self.documents)

    @property
    def adapted_share(self) -> float:
        """The share, of the targets of documents that are long enough to adapt, that the adapted model scored."""
        long = [d for d in self.documents if d.status != SHORT]
        adapted = sum(d.tokens if d.status == ADAPTED else d.adapted_tokens for d in long)
        return adapted / max(sum(d.tokens for d in long), 1) if long else 1.0

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of any bits per byte has to know: of its bytes, of documents that diverged, and with phases
        what scores depend on.
        """
        phases, is_late = self.config.phases, not (self.config.is_leaky or self.config.is_causal)
        notes = [*self.facts.get("notes", ()), *([NOT_CAUSAL] if is_late else ()), *self._note_on_diverged()]
        if not phases:
            return notes
        times = "once" if phases == 1 else f"{phases:,} times"
        start = "there" if self.config.starts_learned else "its A alone, with B and biases of zero"
        return [
            *notes,
            f"scores depend on earlier documents ({self._phases}): {times}, after a group of documents is scored, a "
            f"shared adapter learns from it, and all later documents start from {start}; this is one score of all "
            "documents in the order of their names' hashes, and no document's on its own",
        ]

    def _note_on_diverged(self) -> list[str]:
        names = [d.name for d in self.documents if d.status == DIVERGED]
        if not names:
            return []
        listed = ", ".join(map(repr, names[:LISTED])) + (f" and {len(names) - LISTED:,} more" if names[LISTED:] else "")
        documents = "1 document" if len(names) == 1 else f"{len(names):,} documents"
        return [
            f"{documents} diverged ({listed}): from the first target whose adapted NLL is no number, the base model's "
            "score counts; try a smaller lr, alpha or weight_decay, or a temperature nearer to 1"
        ]

    @property
    def why_not_valid(self) -> list[str]:
        """Why the score may not be reported as one; empty where it is valid."""
        reasons = {
            LEAK_WARNING: self.config.is_leaky,
            NOT_CAUSAL: not (self.config.is_leaky or self.config.is_causal),
            "not a valid score: the deadline left text to the base model, and how much depends on the speed of the "
            "machine and on where documents end": self.deadline_hit,
        }
        return [reason for reason, holds in reasons.items() if holds]

    @property
    def bytes_of(self) -> str:
        """Of which text the bytes are: text; where a tokenizer normalises it, original text or normalised text."""
        return self.facts.get("bytes_of", "text")

    @property
    def deadline_note(self) -> str:
        """What stands beside every adapted number: nothing, or how much was adapted before the deadline."""
        if not self.deadline_hit:
            return ""
        # Rounded down: what is not all must not read as 100%.
        return f"deadline: {math.floor(self.adapted_share * 1000) / 10:.1f}% adapted"

    @property
    def phases_note(self) -> str:
        """What stands beside every adapted number: nothing, or that it depends on earlier documents."""
        return f"{self._phases}: depends on earlier documents" if self.config.phases else ""

    @property
    def _phases(self) -> str:
        start = "" if self.config.starts_learned else f", phase_start={self.config.phase_start}"
        return f"phases={self.config.phases}{start}"

    def totals(self) -> dict[str, Any]:
        """Sums over all documents; the *_bpb are None where they were not measured."""
        documents = self.documents
        text_bytes = sum(d.bytes for d in documents)
        prequant = [d.prequant_nats for d in documents]
        by_status: dict[str, int] = {}
        for document in documents:
            by_status[document.status] = by_status.get(document.status, 0) + 1
        return {
            "documents": len(documents),
            "tokens": sum(d.tokens for d in documents),
            "bytes": text_bytes,
            "by_status": by_status,
            "prequant_bpb": bits_per_byte(None if None in prequant else math.fsum(prequant), text_bytes),
            "base_bpb": bits_per_byte(math.fsum(d.base_nats for d in documents), text_bytes),
            "base_bpb_at_temperature": bits_per_byte(math.fsum(d.tempered_nats for d in documents), text_bytes),
            "adapted_bpb": bits_per_byte(math.fsum(d.adapted_nats for d in documents), text_bytes),
            "adapted_share": self.adapted_share,
            "deadline_hit": self.deadline_hit,
        }

    def to_json(self) -> dict[str, Any]:
        """The whole result as JSON values. Where `valid_score` is false, `why_not_valid` says why."""
        leak = {"label": LEAKY, "warning": LEAK_WARNING} if self.config.is_leaky else {}
        return {
            "protocol": self.config.protocol,
            "protocol_label": label(self.config.protocol),
            "valid_score": not self.why_not_valid,
            **({"why_not_valid": self.why_not_valid} if self.why_not_valid else {}),
            "depends_on_earlier_documents": self.config.phases > 0,
            **leak,
            "totals": self.totals(),
            "seconds": self.seconds,
            "config": self.config.to_dict(),
            **self.facts,
            **({"notes": list(self.notes)} if self.notes else {}),
            "documents": [
                {**asdict(d), "base_bpb": d.base_bpb, "adapted_bpb": d.adapted_bpb} | hashed
                for d, hashed in zip(self.documents, self._hashes(), strict=True)
            ],
        }

    def _hashes(self) -> list[dict[str, str]]:
        return [{"sha256": digest} for digest in self.sha256] if self.sha256 else [{}] * len(self.documents)

    def write(self, folder: Path) -> None:
        """Write documents.csv and score.json into `folder`, from which everything of an earlier run goes first.

        In the CSV an apostrophe stands before a name that a spreadsheet would run as a formula, and before one that
        starts with an apostrophe itself; :func:`read_documents_csv` takes it away again. The column of the bytes says
        of which text they are, where there are two.
        """
        for name in (DOCUMENTS, REPORT, PICTURE):  # a kill leaves none of them beside the score of another run
            (folder / name).unlink(missing_ok=True)
        write_text(folder / SCORE, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        suffix = f"_{LEAKY}" if self.config.is_leaky else ""
        with (
            replacing(folder / DOCUMENTS) as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)  # a name is one cell whatever separates them elsewhere
            size = "bytes" if self.bytes_of == "text" else f"bytes_of_{self.bytes_of.replace(' ', '_')}"
            writer.writerow(["name", "tokens", size, "status", "base_bpb", f"adapted_bpb{suffix}", "adapted_share"])
            for d in self.documents:
                name = f"'{d.name}" if d.name.startswith((*FORMULA, "'")) else d.name
                numbers = map(_six, (d.base_bpb, d.adapted_bpb, d.adapted_share))
                writer.writerow([name, d.tokens, d.bytes, d.status, *numbers])


def read_documents_csv(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a documents.csv by column: names as they were, numbers as numbers, None where a cell is empty.

    OSError: a file that cannot be read. ValueError: no CSV, or a cell of a column of numbers that is none.

    Example: rows = read_documents_csv("scores/documents.csv")
    """
    text = read_bytes(Path(path)).decode(errors="surrogateescape")
    try:
        rows = list(csv.DictReader(StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is no documents.csv: {error}") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is no documents.csv: a row has another number of cells than the first")
    kinds = {"name": lambda cell: cell.removeprefix("'"), "status": str, "tokens": int}
    kinds |= {column: int for column in rows[0] if column.startswith("bytes")} if rows else {}
    return [
        {column: kinds.get(column, float)(cell) if cell or column == "name" else None for column, cell in row.items()}
        for row in rows
    ]


def _six(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
