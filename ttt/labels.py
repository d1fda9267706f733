"""What the page and the picture of a report both say of a number, a document or a run."""

from collections.abc import Iterable

from .protocols import LEAKY
from .results import DocumentResult, ScoreResult


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.4f}"


def leak_of(result: ScoreResult) -> str:
    """What stands behind the label of every adapted number: nothing, or `` (LEAKY)``."""
    return f" ({LEAKY})" if result.config.is_leaky else ""


def marks_of(result: ScoreResult) -> list[str]:
    """What every number over all documents that adaptation has touched is marked with: LEAKY, phases, the deadline."""
    marks = LEAKY if result.config.is_leaky else "", result.phases_note, result.deadline_note
    return [f"({mark})" for mark in marks if mark]


def mark_of(result: ScoreResult) -> str:
    return "".join(f" {mark}" for mark in marks_of(result))


def clean(text: str) -> str:
    """`text` without what UTF-8 or HTML cannot hold: control characters, line breaks, lone surrogates."""
    kept = "".join(c if c >= " " and not "\x7f" <= c <= "\x9f" else " " for c in text)
    return kept.encode("utf-8", "replace").decode()


def short_name(name: str, most: int) -> str:
    """A document's name on one line, its middle left out past `most` characters: the end often tells files apart."""
    name = clean(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}\u2026{name[-(most // 2) :]}"


def most_first(documents: Iterable[DocumentResult], gained: bool) -> list[DocumentResult]:
    """Adapted documents that gained (or lost) anything, the most first."""
    sign = -1 if gained else 1
    kept = [d for d in documents if (d.gain_bpb or 0.0) * sign < 0]
    return sorted(kept, key=lambda d: sign * d.gain_bpb)
