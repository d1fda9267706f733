"""`klora score`: an artifact, documents and a protocol to bits per byte and a report."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ..model.config import ConfigError
from ..model.loading import WEIGHTS_HELP
from ..model.lock import locked
from ..model.parallel import is_one_of_many, rank_of_many
from ..ttt.engines import SCORERS
from ..ttt.hf import DTYPES
from ..ttt.hf_model import require_for_hf
from ..ttt.journal import has_journals
from ..ttt.protocols import HF, SCORE_FIRST, TTTConfig, label, ttt_preset
from ..ttt.queue import PATIENCE
from ..ttt.results import RESULTS, SCORE
from ..ttt.verify import is_nll
from . import options
from .console import Output
from .scoring import Scoring
from .subject import source_of


def score(
    artifact: Annotated[
        Path | None, typer.Argument(help="Artifact that `klora export` wrote; --fields and --hf go without.")
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option(
            "--hf",
            metavar="FOLDER",
            help="In an artifact's place: a causal model of Hugging Face and its tokenizer, as save_pretrained wrote "
            "them. Nothing is fetched. The preset is hf.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help=f"With --hf, what the model computes in: {', '.join(DTYPES)}. auto: bfloat16 on a GPU, else float32.",
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results; ARTIFACT-score if left out.")
    ] = None,
    text: options.Text = None,
    jsonl: options.Jsonl = None,
    field: options.Field = "text",
    shards: options.Shards = None,
    most_tokens: Annotated[
        int,
        typer.Option(
            "--most-tokens",
            min=0,
            help="Score a sample of this many tokens: whole documents in the order of their texts' hashes, "
            "passing over those that no longer fit; 0: all documents.",
        ),
    ] = 0,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="score_first; multi_epoch and min_nll are LEAKY and labelled so.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="quick (the default of score_first), thorough and best (five and six times its seconds): constants "
            "that a sweep found for one pass; contest: another's for one pass; design (the default of the LEAKY "
            "protocols): the original's, for six; hf (the default with --hf): for models of Hugging Face.",
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline",
            help="Seconds after which nothing more is adapted; 0: none. None is the default, but for the preset "
            "design: what a deadline leaves out depends on the machine's speed.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            min=1,
            help="Tokens that windows advance by, of the base model and the adapted one: every target past the first "
            "window has at least window - stride tokens before it. A step follows each: a smaller stride takes more. "
            "--set chunk=N is the same.",
        ),
    ] = None,
    phases: Annotated[
        int | None,
        typer.Option(
            "--phases",
            help="After each of so many groups of scored documents a shared adapter learns from them, and all later "
            "documents start from there: scores then depend on earlier documents, and every output says so. 0, the "
            "default: every document is on its own. --set phases=N is the same; --set phase_start=a lets documents "
            "start from its A alone.",
        ),
    ] = None,
    prequant: Annotated[
        Path | None, typer.Option("--prequant", help="Run folder: also score its weights before quantisation.")
    ] = None,
    nll: Annotated[
        Path | None,
        typer.Option(
            "--nll",
            metavar="FILE",
            help="Also write what every target cost, in nats, as safetensors; `klora verify` compares with it.",
        ),
    ] = None,
    set_: options.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start afresh where --out holds a finished or an interrupted run.")
    ] = False,
    tunes: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Choose lr and chunk on half of the documents, by the hash of their text, and score the other half "
            "alone. It takes six passes over the first half, again with --resume; twelve where beta1 is above 0, which "
            "is then chosen, too.",
        ),
    ] = False,
    weights: Annotated[str, typer.Option("--weights", help=WEIGHTS_HELP)] = "dense",
    scorer: Annotated[
        str,
        typer.Option(
            "--scorer",
            help=f"{', '.join(SCORERS)}. engine: CUDA graphs of fused kernels; uncaptured: the same steps and bits "
            "without graphs, to debug and for a CPU. auto: the engine on a GPU, elsewhere uncaptured.",
        ),
    ] = "auto",
    patience: Annotated[
        float,
        typer.Option(
            "--patience",
            min=1.0,
            help="Of several ranks: seconds without a sign of life after which others take over a rank's documents.",
        ),
    ] = PATIENCE,
    warm: options.Warm = True,
    device: options.Device = "auto",
    fields: options.Fields = False,
    as_json: options.Json = False,
) -> None:
    """Score documents in bits per byte, adapting the model to each while it reads it.

    Every document gets its own adapter, which starts from nothing, or with --phases from what earlier documents taught.
    Under score_first, the default, a chunk is scored before the adapter has seen it: that number is a valid score. The
    other protocols train on what they score; they are here to show what that is worth, and everything they print says
    LEAKY.

    Without --text, --jsonl or --shards it scores the held-out part of Python's standard library. With --hf any causal
    model of Hugging Face is scored in an artifact's place. --out gets documents.csv, score.json, report.html and
    report.png.

    Example: klora score tiny.klora --text essays/ --out scores/
    """
    output = Output(as_json)
    overrides = options.parse_overrides(set_)
    for option, name, value in (
        ("--protocol", "protocol", protocol),
        ("--deadline", "deadline", deadline),
        ("--stride", "chunk", stride),
        ("--phases", "phases", phases),
    ):
        if value is not None and name in overrides:
            raise ConfigError(f"{option} was given together with --set {name}={overrides[name]}; give one of them")
        overrides |= {name: str(value)} if value is not None else {}
    preset = HF if hf and preset is None else preset
    config = ttt_preset(preset, overrides.get("protocol", SCORE_FIRST)).override(overrides)
    if fields:
        options.list_fields(output, config)
        return
    if hf:
        _require_for_hf(
            {"an artifact": artifact, "--shards": shards, "--prequant": prequant},
            {"--weights": weights != "dense"},
            text or jsonl,
            config,
        )
    elif dtype != "auto":
        raise ConfigError(f"--dtype {dtype} was given without --hf; leave it out")
    elif artifact is None:
        raise ConfigError(
            "no artifact was given; give the path of one that klora export wrote, or a Hugging Face folder with --hf"
        )
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite were both given; give one of them")
    source = source_of(text, jsonl, field, shards)
    if tunes and config.is_leaky:
        raise ConfigError(f"--sweep was given with the protocol {label(config.protocol)}; allowed: {SCORE_FIRST}")
    if tunes and is_one_of_many():
        raise ConfigError("--sweep was given to several ranks; give it to one process, and its constants to the ranks")
    if nll and is_one_of_many():
        raise ConfigError("--nll was given to several ranks; score in one process")
    scored = hf or artifact
    folder = out or _beside(scored, is_folder=bool(hf))
    options.require_folder(folder)
    if nll:
        _require_for_nll(nll, folder)
    for name in RESULTS:
        options.require_file(folder / name)
    with locked(folder, rank_of_many(), say=output.warn):
        if not overwrite:
            _require_no_results(folder, resume)
        if tunes and not (resume or overwrite) and has_journals(folder):  # found out before the sweep, not after it
            raise ConfigError(f"{folder} holds the journal of an interrupted run; give --resume or --overwrite")
        result = Scoring(
            path=scored,
            source=source,
            config=config,
            folder=folder,
            device=device,
            most_tokens=most_tokens,
            prequant=prequant,
            nll=nll,
            resume=resume,
            overwrite=overwrite,
            tunes=tunes,
            weights=weights,
            scorer=scorer,
            patience=patience,
            warm=warm,
            hf_dtype=dtype if hf else None,
        ).run(output)
    output.result({"out": str(folder), **{k: v for k, v in result.to_json().items() if k != "documents"}})


def _require_for_hf(
    paths: Mapping[str, Path | None], others: Mapping[str, bool], texts: list[Path] | None, config: TTTConfig
) -> None:
    """ConfigError for what does not go with --hf, before the model is loaded."""
    for name, given in (paths | others).items():
        if given:
            raise ConfigError(f"--hf was given together with {name}; give one of them")
    if not texts:
        raise ConfigError("--hf was given without --text or --jsonl; say what is to be scored")
    require_for_hf(config)


def _require_for_nll(path: Path, folder: Path) -> None:
    """ConfigError or OSError where --nll cannot be written, or would take the place of what is something else."""
    options.require_file(path, "--nll")
    if path.resolve().parent == folder.resolve() and (
        path.name in RESULTS or path.name.startswith(("journal", ".klora"))
    ):
        raise ConfigError(f"--nll {path} has the name of another file of the results; give another name")
    if path.exists() and path.stat().st_size and not is_nll(path):
        raise ConfigError(f"{path} is there and is no file of NLLs; move it or give another --nll")


def _beside(scored: Path, is_folder: bool) -> Path:
    """The folder of the results if --out names none: beside what is scored, under its name."""
    named = Path(os.path.abspath(scored))
    if not named.name:
        raise ConfigError(f"{scored} has no name that the results could be called after; give --out")
    name = f"{named.name if is_folder else named.stem}-score"
    return scored.with_name(name) if scored.name == named.name else named.with_name(name)


def _require_no_results(folder: Path, resume: bool) -> None:
    """ConfigError where results would take the place of a finished run's, or of other files of their names.

    With `resume` they may, where a journal shows that a later run was begun: that one had leave to replace them.
    """
    held = [name for name in RESULTS if (folder / name).exists()]
    is_begun = has_journals(folder)
    if not held or (resume and is_begun):
        return
    what = "the results of a finished run" if SCORE in held else f"{', '.join(held)}, which the results would replace"
    begun, go_on = (" and the journal of another", "--resume to go on with that, ") if is_begun else ("", "")
    raise ConfigError(f"{folder} holds {what}{begun}; give {go_on}--overwrite to replace them, or another --out")
