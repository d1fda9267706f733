"""Constants that suit a user's own text: tried on one half of it, and then used to score the other half alone.

A document is in the half that the hash of its text says. Every config of a small grid around the request's adapts the
tuning half under score_first; the one with the fewest bits per byte there is used for the other half. No document that
helped to choose the constants is scored with them, and every form of the result says how many those were.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from ..model.config import ConfigError
from .documents import Document
from .journal import NoJournal
from .pipeline import ScoreRequest, score
from .protocols import SCORE_FIRST, TTTConfig
from .results import DIVERGED, is_short
from .sampling import is_for_tuning


def grid(config: TTTConfig) -> list[dict[str, Any]]:
    """Changes to `config`, none first: lr halved and doubled, chunks halved, a beta1 above 0 with half the memory."""
    values = {
        "lr": (config.lr, config.lr / 2, config.lr * 2),
        "chunk": (config.chunk, max(config.chunk // 2, 1)),
        "beta1": (config.beta1, max(round(2 * config.beta1 - 1, 9), 0.0)),
    }
    own = config.to_dict()
    found = product(*map(dict.fromkeys, values.values()))
    return [{name: x for name, x in zip(values, chosen, strict=True) if x != own[name]} for chosen in found]


def in_halves(documents: Sequence[Document], config: TTTConfig) -> tuple[list[Document], list[Document]]:
    """The documents to choose constants on, and those to score. ConfigError where one half has nothing to adapt."""
    tuning, scored = ([d for d in documents if is_for_tuning(d) is side] for side in (True, False))
    for name, half in (("tuning", tuning), ("scored", scored)):
        if all(is_short(document, config) for document in half):
            raise ConfigError(
                f"of {len(documents):,} documents {len(half):,} are in the {name} half, none of them long enough to "
                "adapt; give more documents, or leave the sweep out"
            )
    return tuning, scored


def sweep(request: ScoreRequest) -> ScoreRequest:
    """The request for the half of its documents that is scored, with the constants that were best on the other half.

    Its facts say what was tried, and a note what was left out. The deadline is for scoring; the sweep has none.

    ConfigError: a protocol other than score_first, several ranks, a rate of zero, or too few documents. Interrupted:
    `should_stop` said so.

    Example: result = score(sweep(ScoreRequest(model, essays, ttt_preset())))
    """
    if request.config.protocol != SCORE_FIRST:
        raise ConfigError(f"a sweep under protocol={request.config.protocol!r} is not possible; allowed: {SCORE_FIRST}")
    if request.queue is not None and request.queue.is_shared:
        raise ConfigError(
            "a sweep on several ranks is not possible; run it in one process, and give them its constants"
        )
    if not request.config.learns:
        raise ConfigError("a sweep at lr=0 is not possible: no step changes anything; give a rate above 0")
    tuning, scored = in_halves(request.documents, request.config)
    targets, tried = sum(document.targets for document in tuning), grid(request.config)
    base: dict[int, dict[str, np.ndarray]] = {}
    rows: list[dict[str, Any]] = []
    for number, changes in enumerate(tried):
        config = request.config.override(changes | {"deadline": 0.0})

        def progress(phase: str, done: int, total: int, number: int = number) -> None:
            request.progress("sweep", number * targets + (done if phase == "adapt" else 0), len(tried) * targets)

        one = replace(
            request,
            documents=tuning,
            config=config,
            journal=NoJournal(base.setdefault(config.chunk, {})),
            prequant=None,
            progress=progress,
            say=lambda text: None,
        )
        totals = score(one).totals()
        if DIVERGED in totals["by_status"]:
            totals["adapted_bpb"] = None
        rows.append({"changes": changes, "base_bpb": totals["base_bpb"], "adapted_bpb": totals["adapted_bpb"]})
        request.say(f"sweep: {_described(changes)}: {_number(totals['adapted_bpb'])} bits per byte of the tuning half")
    best, facts = best_of(rows), facts_of_halves(tuning, scored)
    if best is None:
        raise ConfigError("no config of the sweep gave the tuning half a finite score; give a smaller lr")
    notes = [*request.facts.get("notes", ()), note_on(facts, best)]
    return replace(
        request,
        documents=scored,
        config=request.config.override(best),
        facts=request.facts | {"notes": notes, "sweep": facts | {"chosen": best, "tried": rows}},
    )


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The changes with the fewest bits per byte, of equal ones the first; None where no config had a finite score."""
    fair = [row for row in rows if row["adapted_bpb"] is not None]
    return min(fair, key=lambda row: row["adapted_bpb"])["changes"] if fair else None


def facts_of_halves(tuning: Sequence[Document], scored: Sequence[Document]) -> dict[str, Any]:
    """What a result says of the two halves."""
    return {
        "documents_tuning": len(tuning),
        "tokens_tuning": sum(document.targets for document in tuning),
        "documents_scored": len(scored),
        "halves": "by the SHA-256 of the tokens",
    }


def note_on(halves: dict[str, Any], chosen: dict[str, Any]) -> str:
    """The sentence that belongs beside the score: what was left out, of :func:`facts_of_halves`, and for what."""
    tuning, scored = halves["documents_tuning"], halves["documents_scored"]
    return (
        f"{tuning:,} of the {tuning + scored:,} documents were used to choose the constants ({_described(chosen)}) and "
        f"are left out of the score, which is of the other {scored:,}"
    )


def _described(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in changes.items()) or "unchanged"


def _number(value: float | None) -> str:
    return "diverged, no" if value is None else f"{value:.4f}"
