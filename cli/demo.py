"""`klora demo`: the whole chain on text that every machine has, in a few minutes on a CPU."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..model.config import preset
from ..model.corpus import Corpus
from ..model.gpt import GPT
from ..model.lock import locked
from ..model.parallel import Ranks, pick_device
from ..model.reading import read_json
from ..model.run_folder import RUN
from ..ttt.protocols import ttt_preset
from . import options
from .console import Output
from .export import DEFAULT_BUDGET, export_run
from .scoring import Scoring
from .subject import Source
from .train import describe, prepare_first, require_no_run, run_training

ARTIFACT = "demo.klora"
TOKENS = 40_000
"""Held-out tokens that the demo scores: enough for a picture, few enough for a minute on two CPU cores."""

DEADLINE = 100.0
"""Seconds after which the demo adapts no further document, so that a busy machine ends in time too."""

SHOWN = ("prequant_bpb", "base_bpb", "adapted_bpb", "adapted_share", "deadline_hit")
"""The totals of the scores that the demo gives to machines."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of everything the demo makes.")] = Path("runs/demo"),
    seconds: Annotated[float, typer.Option(min=1.0, help="Seconds of training.")] = 90.0,
    tokens: Annotated[int, typer.Option(min=1000, help="Most held-out tokens to score.")] = TOKENS,
    device: options.Device = "auto",
    cache: options.Cache = options.DEFAULT_CACHE,
    as_json: options.Json = False,
) -> None:
    """Train the tiny preset on Python's standard library, export it, adapt it to held-out files, draw the report."""
    started = time.perf_counter()
    output = Output(as_json)
    ranks = Ranks(0, 1, pick_device(device))
    options.require_folder(out)
    with locked(out, say=output.warn), locked(out / "score", say=output.warn):
        if not is_demo(out):
            require_no_run(out)
        _make(out, seconds, tokens, device, cache, ranks, output, started)


def _make(
    out: Path, seconds: float, tokens: int, device: str, cache: Path, ranks: Ranks, output: Output, started: float
) -> None:
    chosen = preset("tiny").override({"seconds": seconds})
    corpora = Corpus.stdlib("train"), Corpus.stdlib("validation")
    if ranks.device.type == "cpu":
        fit_threads()
    output.say("1. text to tokens", style="bold")
    data = prepare_first(corpora, chosen, cache, ranks, output)
    output.say("2. training", style="bold")
    trained = run_training(chosen, data, out, ranks, output, {**describe(*corpora), "demo": True})
    if trained.signal:
        raise typer.Exit(128 + trained.signal)
    output.say("3. int6 artifact", style="bold")
    artifact = out / ARTIFACT
    summary = export_run(out, artifact, DEFAULT_BUDGET, output)
    if ranks.device.type == "cpu":
        fit_threads()
    output.say(f"4. scoring, adapted to each document (no further ones after {DEADLINE:g} s)", style="bold")
    scores, config = out / "score", ttt_preset().override({"deadline": DEADLINE})
    source, more = Source(), {"device": device, "most_tokens": tokens, "prequant": out, "overwrite": True}
    result = Scoring(artifact, source, config, scores, **more).run(output)
    total = time.perf_counter() - started
    totals, note = result.totals(), f", {result.deadline_note}" if result.deadline_hit else ""
    output.say(
        f"done in {total:.0f} s: BPB {totals['prequant_bpb']:.4f} before quantisation, "
        f"{totals['base_bpb']:.4f} after, {totals['adapted_bpb']:.4f} adapted (score_first{note}); "
        f"artifact {summary.bytes:,} bytes; report {scores / 'report.html'}"
    )
    output.result(
        {
            "seconds": total,
            "artifact": str(artifact),
            "artifact_bytes": summary.bytes,
            "report": str(scores / "report.html"),
            "deadline": DEADLINE,
            **{name: totals[name] for name in SHOWN},
        }
    )


def is_demo(out: Path) -> bool:
    """Whether the run in `out` is an earlier demo's, which the next one may replace as soon as it has finished."""
    if (out / ARTIFACT).is_file():
        return True
    try:
        return read_json(out / RUN)["sources"]["demo"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fit_threads() -> None:
    """Use one thread instead of all where that is faster: threads that wait for a busy core cost more than they give.

    Only the demo does this, since sums over another number of threads differ in their last bits.
    """
    model = GPT(preset("tiny").model)
    tokens = torch.randint(3, 1024, (1, 512))
    seconds = {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        model.nll(tokens, tokens).sum().backward()
        started = time.perf_counter()
        for _ in range(4):
            model.nll(tokens, tokens).sum().backward()
        seconds[threads] = time.perf_counter() - started
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))
