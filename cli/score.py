"""`klora score`: an artifact, documents and a protocol to bits per byte and a report."""

import hashlib
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..model.config import ConfigError
from ..model.loading import WEIGHTS_HELP
from ..model.lock import locked
from ..model.parallel import is_one_of_many, own_device, rank_of_many
from ..model.signals import StopSignals
from ..model.storage import attempt, require_writable
from ..model.train import device_name
from ..ttt import pipeline
from ..ttt.documents import facts_of_texts, facts_of_tokens
from ..ttt.engines import SCORERS, pick_scorer
from ..ttt.hf import DTYPES
from ..ttt.hf_model import require_for_hf
from ..ttt.journal import Journal, fingerprint, has_journals, open_journal, remove_journals, settings_of
from ..ttt.pipeline import ScoreRequest
from ..ttt.progress import Interrupted
from ..ttt.protocols import HF, SCORE_FIRST, TTTConfig, label, ttt_preset
from ..ttt.queue import PATIENCE, queue_of_processes
from ..ttt.report import write_report
from ..ttt.results import SCORE, ScoreResult, is_short
from ..ttt.sweep import sweep
from ..ttt.verify import write_nll
from . import options
from .console import Output
from .subject import Source, Subject, facts_of_source, sampled
from .threads import settle_threads
from .totals import say_totals

SPARE_BYTES = 2**24
"""Disk space that a run wants whatever it scores: the report, its picture, a journal of some thousand documents."""

TOKEN_BYTES = 48
"""Disk space a token: 8 for each kept pass, written beside the one that it replaces, and its documents' lines."""


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
            "default: every document is on its own. --set phases=N is the same.",
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
            help="Choose lr, chunk and beta1 on half of the documents, by the hash of their text, and score the other "
            "half alone. It takes twelve passes over the first half, again with --resume.",
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
    if shards and (text or jsonl):
        raise ConfigError("--shards was given together with --text or --jsonl; give one of them")
    options.require_field_is_read(field, jsonl)
    if tunes and config.is_leaky:
        raise ConfigError(f"--sweep was given with the protocol {label(config.protocol)}; allowed: {SCORE_FIRST}")
    if tunes and is_one_of_many():
        raise ConfigError("--sweep was given to several ranks; give it to one process, and its constants to the ranks")
    if nll and is_one_of_many():
        raise ConfigError("--nll was given to several ranks; score in one process")
    scored = hf or artifact
    folder = out or scored.with_name(f"{scored.name if hf else scored.stem}-score")
    options.require_folder(folder)
    with locked(folder, rank_of_many(), say=output.warn):
        if not overwrite:
            _require_no_results(folder)
        if tunes and not (resume or overwrite) and has_journals(folder):  # found out before the sweep, not after it
            raise ConfigError(f"{folder} holds the journal of an interrupted run; give --resume or --overwrite")
        result = score_artifact(
            scored,
            (text, jsonl, field, shards),
            most_tokens,
            config,
            folder,
            prequant,
            resume,
            device,
            output,
            weights,
            scorer,
            patience,
            overwrite,
            tunes,
            warm,
            nll,
            dtype if hf else None,
        )
    output.result({"out": str(folder), **{k: v for k, v in result.to_json().items() if k != "documents"}})


def score_artifact(
    path: Path,
    source: Source,
    most_tokens: int,
    config: TTTConfig,
    folder: Path,
    prequant: Path | None,
    resume: bool,
    device: str,
    output: Output,
    weights: str = "dense",
    scorer: str = "auto",
    patience: float = PATIENCE,
    overwrite: bool = False,
    tunes: bool = False,
    warm: bool = False,
    nll: Path | None = None,
    hf_dtype: str | None = None,
) -> ScoreResult:
    """Score the documents of `source` (text, jsonl, field, shards), write the results to `folder`, say the totals.

    `path` is an artifact; with `hf_dtype`, which goes to :func:`load_hf`, a folder of Hugging Face.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    require_writable(folder, SPARE_BYTES)
    chosen = own_device(device)
    settle_threads(chosen)
    scorer = pick_scorer(scorer, chosen)
    if hf_dtype is None:
        subject = Subject.of_artifact(path, chosen, weights, prequant)
    else:
        subject = Subject.of_folder(path, chosen, hf_dtype, config)
        weights, warm = subject.facts["hf"]["dtype"], False
    model, before = subject.model, subject.before
    seconds["load"], started = time.perf_counter() - started, time.perf_counter()
    every = subject.documents(source, output.warn)
    documents = sampled(every, most_tokens)
    of_bytes = facts_of_tokens(documents, subject.tokenizer) if source[-1] else facts_of_texts()
    seconds["tokenize"] = time.perf_counter() - started
    require_writable(folder, SPARE_BYTES + TOKEN_BYTES * sum(document.targets for document in documents))
    queue = queue_of_processes(patience)
    output.is_silent, output.as_json = output.is_silent or not queue.is_first, output.as_json and queue.is_first
    many = f" x {queue.world}" if queue.is_shared else ""
    output.say(f"scoring {len(documents):,} documents, {label(config.protocol)}, on {chosen}{many}")
    if warm and chosen.type == "cuda":
        from .warm import scoring, warmed

        started = time.perf_counter()
        adapted = sum(not is_short(document, config) for document in documents)
        warmed(lambda: scoring(model, config, adapted, weights), chosen, output)
        seconds["warm"] = time.perf_counter() - started
    with StopSignals(output.say) as stop:
        request = ScoreRequest(
            model,
            documents,
            config,
            prequant=before,
            queue=queue,
            scorer=scorer,
            should_stop=lambda: bool(stop.received),
            say=output.say,
            facts=subject.facts
            | {
                "device": device_name(chosen),
                "weights": weights,
                "source": facts_of_source(source, every, most_tokens),
            }
            | of_bytes,
            keeps_nll=nll is not None,
        )
        try:
            if tunes:
                started = time.perf_counter()
                try:
                    with output.progress() as show:
                        request = sweep(replace(request, progress=_shown(show)))
                except Interrupted:
                    output.say("stopped in the sweep, of which nothing is kept: the same command begins it again")
                    raise typer.Exit(128 + stop.received) from None
                seconds["sweep"] = time.perf_counter() - started
            of_run = " ".join(subject.hashes.values()), request.documents, request.config, prequant is not None
            more = {"weights": weights, "scorer": scorer}
            key, settings = fingerprint(*of_run, **more), settings_of(*of_run, **more)
            resume |= queue.is_restarted
            with closing(open_journal(folder, key, resume, overwrite, queue.rank, queue.world, settings)) as journal:
                _say_what_is_kept(journal, resume, output)
                with output.progress() as show:
                    result = pipeline.score(replace(request, journal=journal, progress=_shown(show)))
        except Interrupted as interrupted:
            output.say(f"stopped: {interrupted}; the same command with --resume goes on from there")
            raise typer.Exit(128 + stop.received) from None
    if not queue.is_first:
        return result
    result.seconds.update(seconds)
    started = time.perf_counter()
    if nll:
        write_nll(nll, result)
        result.facts["nll"] = {"file": nll.name, "sha256": hashlib.sha256(nll.read_bytes()).hexdigest()}
    result.write(folder)
    page = attempt("the report", lambda: write_report(result, folder, output.warn, subject.token_bytes), output.warn)
    result.seconds["report"] = time.perf_counter() - started
    remove_journals(folder)
    say_totals(result, output)
    if page is not None:
        output.say(f"report: {page}")
    return result


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


def _require_no_results(folder: Path) -> None:
    """ConfigError where `folder` holds the results of a run, and no journal of a later one that was interrupted."""
    if (folder / SCORE).exists() and not has_journals(folder):
        raise ConfigError(
            f"{folder} holds the results of a finished run; give --overwrite to replace them, or another --out"
        )


def _say_what_is_kept(journal: Journal, resume: bool, output: Output) -> None:
    if journal.done or journal.base_share:
        kept = f", the base pass is done for {journal.base_share:.0%} of the text" if journal.base_share else ""
        output.say(f"resuming: {len(journal.done):,} documents are already scored{kept}")
    elif resume:
        output.say("nothing to resume from; starting afresh")


def _shown(show):
    names = {
        "base": "base model",
        "prequant": "before quantisation",
        "adapt": "adapting",
        "learn": "shared adapter",
        "score": "scoring, all ranks",
        "sweep": "sweep",
    }
    return lambda phase, done, total: show(names[phase], done, total, "tokens")
