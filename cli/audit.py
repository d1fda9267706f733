"""`klora audit`: does what `klora score` computes have the properties of a score?"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..model.artifact import load_artifact
from ..model.config import ConfigError
from ..model.loading import WEIGHTS_HELP, model_from_artifact, tokenizer_of
from ..model.parallel import own_device
from ..ttt.audit_report import AuditReport
from ..ttt.documents import Document
from ..ttt.engines import SCORERS, pick_scorer
from ..ttt.model_audit import audit_model
from ..ttt.protocols import SCORE_FIRST, label, ttt_preset
from . import options
from .console import Output
from .subject import documents_of, source_of
from .threads import settle_threads

MOST_TOKENS = 8192
LONGEST = 2048
"""Tokens that are tried in all, and of one document."""


def audit(
    artifact: Annotated[Path, typer.Argument(help="Artifact that `klora export` wrote.")],
    text: options.Text = None,
    jsonl: options.Jsonl = None,
    field: options.Field = "text",
    shards: options.Shards = None,
    most_tokens: Annotated[
        int,
        typer.Option(
            "--most-tokens",
            min=4,
            help="Documents of this many tokens in all are tried, in the order of their texts' hashes, of each at "
            "most the first 2,048; they are read some thirty times.",
        ),
    ] = MOST_TOKENS,
    protocol: Annotated[str | None, typer.Option("--protocol", help="As of `klora score`.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="As of `klora score`.")] = None,
    set_: options.Set = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Nats by which a target's NLL may differ by rounding; 0: bit for bit. Left out: between two passes "
            "what is measured on the model, which the report says, and 0 where nothing but the batch is another.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws places and tokens.")] = 0,
    weights: Annotated[str, typer.Option("--weights", help=WEIGHTS_HELP)] = "dense",
    scorer: Annotated[str, typer.Option("--scorer", help=f"{', '.join(SCORERS)}, as of `klora score`.")] = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Look for what would make an artifact's scores no scores: leaks, sums that are not 1, targets left out.

    Text after a place, the target itself, the documents beside it and its length are changed, and every check is one
    line with its evidence. Exit status 0 where all pass, 1 where one fails.

    Example: klora audit tiny.klora --jsonl held-out.jsonl
    """
    output = Output(as_json)
    overrides = options.parse_overrides(set_)
    overrides |= {"protocol": protocol} if protocol is not None else {}
    config = ttt_preset(preset, overrides.get("protocol", SCORE_FIRST)).override(overrides)
    if config.phases:
        raise ConfigError(
            f"phases={config.phases} is not possible in an audit: documents learn from one another then; allowed: 0"
        )
    source = source_of(text, jsonl, field, shards)
    loaded, chosen = load_artifact(artifact), own_device(device)
    settle_threads(chosen)
    scorer = pick_scorer(scorer, chosen)
    model = model_from_artifact(loaded, chosen, weights)
    documents = tried(documents_of(source, tokenizer_of(loaded), loaded.provenance), most_tokens)
    tokens = sum(len(document) - 1 for document in documents)
    about = f"{label(config.protocol)}, {scorer}, on {chosen}"
    output.say(f"auditing {about}: {len(documents)} documents, {tokens:,} tokens")
    adapted = sum(not config.is_left_to_base(len(document) - 1, 0) for document in documents)
    if not adapted:
        output.say("note: none is long enough to adapt: what is audited is the base model", style="bold yellow")
    report = audit_model(model, config, documents, scorer=scorer, tolerance=tolerance, seed=seed)
    facts = {"protocol": config.protocol, "scorer": scorer, "documents": len(documents), "tokens": tokens}
    finish(output, report, facts | {"adapted": adapted, "config": config.to_dict()})


def tried(documents: list[Document], most_tokens: int) -> list[np.ndarray]:
    """The beginnings of documents that an audit tries, in the order of their texts' hashes."""
    chosen = []
    for document in sorted(documents, key=lambda document: document.sha256):
        cut = document.tokens[: min(LONGEST, most_tokens) + 1]
        if len(cut) > 1:
            chosen.append(cut)
            most_tokens -= len(cut) - 1
        if most_tokens < 1:
            break
    return chosen


def finish(output: Output, report: AuditReport, facts: dict) -> None:
    """Say a report; exit status 1 where it did not pass."""
    for check in report.checks:
        mark, style = ("pass", "") if check.passed else ("FAIL", "bold red")
        output.say(f"{mark}  {check.name}: {check.evidence}", style=style)
    if report.rounding:
        output.say(f"rounding: {report.rounding}")
    output.say("not seen here: " + "; ".join(report.unseen))
    output.say("passed" if report.passed else f"failed: {', '.join(report.failed)}", style="bold")
    output.result(facts | report.to_json())
    if not report.passed:
        raise typer.Exit(1)
