"""`klora export`: a trained run to one int6 artifact under a byte budget."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ..model.artifact import ArtifactError, ArtifactSummary, is_artifact, save_artifact
from ..model.checkpoint import CheckpointError
from ..model.config import ModelConfig
from ..model.loading import load_run, tokenizer_of_run
from ..model.lock import locked
from ..model.parallel import rank_of_many
from ..model.run_folder import MODEL, TOKENIZER
from . import options
from .console import Output

DEFAULT_BUDGET = 16_000_000


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `klora train`.")],
    out: Annotated[Path | None, typer.Option("--out", help="The artifact; RUN/model.klora if left out.")] = None,
    budget: Annotated[
        int, typer.Option(min=1, help="Most bytes the artifact may have, everything counted.")
    ] = DEFAULT_BUDGET,
    clips: Annotated[bool, typer.Option("--clips", help="List the clip chosen for every matrix.")] = False,
    as_json: options.Json = False,
) -> None:
    """Quantise a run's weights to int6 and write one artifact that fits the budget.

    Every matrix gets its clip (scale = clip x the row's RMS) by a search for the least weight error that fits. The
    artifact holds config, tokenizer, weights and provenance; it contains no code and no pickle. A budget that costs the
    weights much gets a warning, with the budgets that do not.

    Example: klora export runs/tiny --out tiny.klora
    """
    if rank_of_many():  # one process compresses, however many were started
        return
    output = Output(as_json)
    path = out or run / "model.klora"
    summary = export_run(run, path, budget, output)
    if clips:
        rows = [(name, f"{clip:.4f}", f"{summary.errors[name]:.6f}") for name, clip in summary.clips.items()]
        output.table("", rows, ("matrix", "clip", "relative squared error"))
    output.result({"artifact": str(path), **vars(summary)})


def export_run(run: Path, path: Path, budget: int, output: Output) -> ArtifactSummary:
    """Write the artifact of the run folder and say what was chosen.

    It may take the place of an artifact, which a run can give again; ArtifactError where `path` is another file.
    """
    options.require_file(path)
    if path.is_file() and path.stat().st_size and not is_artifact(path):
        raise ArtifactError(f"{path} is there and is no artifact of klora's; move it or give another --out")
    tensors, meta = load_run(run)
    config = ModelConfig.from_dict(meta["model"])
    sources = meta["provenance"].get("sources", {})
    if not isinstance(sources, dict):
        raise CheckpointError(f"{run / MODEL} is damaged: its sources are no object; copy it again, or train again")
    is_of_shards = sources.get("kind", "shards") == "shards"
    tokenizer = tokenizer_of_run(run, may_normalise=is_of_shards)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{run / TOKENIZER} has {tokenizer.vocab_size} pieces, the model {config.vocab_size}; it is not this run's"
        )
    started = time.perf_counter()
    with locked(path, is_file=True, say=output.warn), output.progress() as show:
        show("choosing clips and compressing", 0, None)
        summary = save_artifact(
            path,
            tensors,
            config,
            tokenizer.to_bytes(),
            meta["provenance"],
            budget,
        )
    low, high = min(summary.clips.values()), max(summary.clips.values())
    output.say(
        f"artifact {path}: {summary.bytes:,} of {budget:,} bytes; int6 clips {low:.3f} to {high:.3f} of the row's RMS, "
        f"relative squared weight error {summary.relative_error:.2e} ({time.perf_counter() - started:.1f} s)"
    )
    if summary.warning:
        output.say(f"warning: {summary.warning}", style="bold yellow")
        rows = [(f"{size:,}", f"{error:.2g}") for size, error in summary.budgets.items()]
        output.table("", rows, ("about so many bytes", "would have a relative squared weight error of"))
    return summary
