"""`klora train`: text to tokenizer to shards to trained weights, in one run folder."""

import dataclasses
import json
import signal
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ..model.attention import require_attention
from ..model.checkpoint import CheckpointError, load_meta, unusable
from ..model.config import PRESETS, ConfigError, ModelConfig, Preset, TrainConfig, preset
from ..model.corpus import Corpus
from ..model.lock import locked
from ..model.parallel import Ranks, join_ranks, rank_of_many
from ..model.placement import compute_dtype
from ..model.prepare import Prepared, prepare, prepared_from_shards
from ..model.reading import read_json
from ..model.run_folder import CHECKPOINT, MODEL, RUN, RUN_FILES, is_of_run
from ..model.shards import ShardError
from ..model.storage import attempt, differences
from ..model.train import Trainer, TrainResult
from ..model.watch import PATIENCE
from . import options
from .console import Output
from .threads import settle_threads

CHANGEABLE = (
    *("seconds", "max_steps", "checkpoint_seconds", "validate_seconds"),
    *("muon_lr", "embed_lr", "scalar_lr", "grad_clip", "dtype", "attention"),
    *("micro_batch_tokens", "reduce_dtype", "graph_collectives", "gradient_buckets", "muon_gathers"),
)
"""Fields that may change when a run is resumed: when it ends, what helps one that diverged, what runs attention, and
how a step is shared out, which another number or kind of GPUs may want otherwise."""


def train(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/latest"),
    preset_name: Annotated[
        str | None, typer.Option("--preset", help=f"{', '.join(PRESETS)}; tiny if left out.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Wall-clock cap; short for --set seconds=...")] = None,
    text: options.Text = None,
    jsonl: options.Jsonl = None,
    field: options.Field = "text",
    validation_text: Annotated[list[Path] | None, typer.Option("--val-text", help="As --text, for validation.")] = None,
    validation_jsonl: Annotated[
        list[Path] | None, typer.Option("--val-jsonl", help="As --jsonl, for validation.")
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option("--val-share", help="Share of documents held out by the hash of their names; 0.05 if left out."),
    ] = None,
    shards: options.Shards = None,
    set_: options.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Start afresh in --out though a run is there; OUT/replaced keeps it until the new one has finished.",
        ),
    ] = False,
    patience: Annotated[
        float,
        typer.Option(
            "--patience",
            min=2.0,
            help="Of several ranks: seconds without a sign of life after which one is lost and training ends.",
        ),
    ] = PATIENCE,
    device: options.Device = "auto",
    cache: options.Cache = options.DEFAULT_CACHE,
    warm: options.Warm = True,
    fields: options.Fields = False,
    as_json: options.Json = False,
) -> None:
    """Train a model on text, on CPU or GPU, alone or under torchrun.

    Without --text, --jsonl or --shards it reads the running Python's own standard library, which is text that every
    machine has. The run folder gets run.json, loss.csv, loss.png, checkpoint.safetensors and, at the end,
    model.safetensors, which `klora export` turns into an artifact: the best of the last weights and their averages.
    Ctrl-C writes a checkpoint; --resume goes on. A second Ctrl-C ends at once. Of several ranks, one that is lost ends
    training with a checkpoint and status 75; where torchrun starts them again, they go on by themselves.

    Presets: tiny for a CPU and two minutes; seed, 10 blocks for 600 s on 8 GPUs; seed-11l with 11 blocks; seed-2k on
    rows of 2,048 tokens, for windows of that length. --set document_mask=true keeps the documents of a row apart, --set
    qat_share=0.1 trains the last tenth at int6 values; --fields lists every field.

    Examples:

      klora train --preset tiny --out runs/tiny

      klora train --preset seed --jsonl train.jsonl.zst --val-jsonl val.jsonl.zst --seconds 600 --out runs/seed

      torchrun --nproc-per-node 8 -m klora.cli train --preset seed --shards shards/ --out runs/seed
    """
    output = Output(as_json)
    overrides = options.parse_overrides(set_)
    if seconds is not None:
        overrides["seconds"] = str(seconds)
    if fields:
        chosen = preset(preset_name or "tiny").override(overrides)
        options.list_fields(output, chosen.model, chosen.train)
        return
    options.require_folder(out)
    if resume and overwrite:
        raise ConfigError("--resume goes on with the run in --out and --overwrite starts afresh; give one of them")
    names_text = bool(text or jsonl or validation_text or validation_jsonl) or validation_share is not None

    def report(why: str) -> None:
        if as_json:
            print(json.dumps({"error": why, "kind": "LostRank"}))
        output.warn(why)

    with locked(out, rank_of_many(), say=output.warn), join_ranks(device, patience, report) as ranks:
        settle_threads(ranks.device)
        # A launcher that starts the ranks again repeats their command, which began the run that they go on with.
        is_again = ranks.has_begun
        if not (resume or overwrite or is_again):
            require_no_run(out)
        output.is_silent |= not ranks.is_first
        # What differs there would have the ranks wait for each other in different places.
        ranks.require_same({"--resume": resume, "--shards": bool(shards)})
        goes_on = ranks.from_first(resume or (is_again and (out / CHECKPOINT).exists()))
        if goes_on:
            if resume and (preset_name or shards or field != "text" or names_text):
                raise ConfigError(
                    f"--resume takes preset and data from the run{_kept_there(out)}; leave out --preset and the "
                    "options that name text"
                )
            chosen, data, sources = _stored_run(out, overrides)
        elif shards:
            if field != "text" or names_text:
                raise ConfigError(
                    "--shards was given, whose folder holds both splits; leave out --text, --jsonl, --field, "
                    "--val-text, --val-jsonl and --val-share, or --shards"
                )
            chosen = preset(preset_name or "tiny").override(overrides)
            data = prepared_from_shards(shards)
            sources = {"kind": "shards"} | ({"notes": list(data.notes)} if data.notes else {})
        else:
            options.require_field_is_read(field, jsonl, validation_jsonl)
            chosen = preset(preset_name or "tiny").override(overrides)
            dtype = compute_dtype(chosen.train, ranks.device)
            require_attention(chosen.train.attention, chosen.model, ranks.device, dtype, chosen.train.document_mask)
            corpora = _corpora(text, jsonl, field, validation_text, validation_jsonl, validation_share)
            data, sources = prepare_first(corpora, chosen, cache, ranks, output), describe(*corpora)
        if warm and ranks.device.type == "cuda":
            if ranks.is_first_here:
                from .warm import training, warmed

                warmed(lambda: training(chosen, ranks.device, ranks.world), ranks.device, output)
            ranks.wait()
        result = run_training(chosen, data, out, ranks, output, sources, goes_on)
        if ranks.is_first:
            output.result({"run": str(out), **vars(result), "notes": list(data.notes)})
    if result.signal:
        raise typer.Exit(128 + result.signal)


def _kept_there(out: Path) -> str:
    """The preset and the data of the run in `out`, for people; nothing where it does not say."""
    try:
        run = read_json(out / RUN)
        return f" (preset {run['preset']!s:.40}, data {run['data']!s:.200})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def require_no_run(out: Path) -> None:
    """ConfigError where `out` holds a run, or files that are none of a run's and have their names: what to do."""
    if (out / MODEL).exists():
        raise ConfigError(
            f"{out} holds a finished run{_facts(out / MODEL)}; give --resume with another length to go on, --overwrite "
            "to replace it, or another --out"
        )
    if (out / CHECKPOINT).exists():
        raise ConfigError(
            f"{out} holds an unfinished run; give --resume to go on, --overwrite to start afresh, or another --out"
        )
    held = [name for name in RUN_FILES if (out / name).exists()]
    if held and not is_of_run(out / RUN):
        raise ConfigError(
            f"{out} holds {', '.join(held)}, which the run would replace; give --overwrite to replace them, or another "
            "--out"
        )


def _facts(path: Path) -> str:
    """What a finished run's file tells: its steps, and when it was written."""
    when = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    try:
        result = load_meta(path, {"provenance": dict})["provenance"]["result"]
        return f" ({result['step']:,} steps in {result['seconds']:.0f} s, written {when})"
    except (CheckpointError, KeyError, TypeError, ValueError):
        return f" (its {path.name} is damaged, written {when})"


def run_training(
    chosen: Preset, data: Prepared, out: Path, ranks: Ranks, output: Output, sources: dict, resume: bool = False
) -> TrainResult:
    """Train with a progress display and say what came out."""
    try:
        trainer = Trainer(chosen, data, out, ranks, resume, sources, output.warn)
    except KeyboardInterrupt:
        if ranks.is_first:
            output.warn(
                "stopped before the first step; the data and what was saved before are kept. The same command starts "
                "again"
            )
        raise typer.Exit(128 + signal.SIGINT) from None
    ranks.begin()
    config = chosen.train
    output.say(f"training {chosen.name} on {ranks.device} x {ranks.world}; attention {trainer.attention}")
    output.say(str(trainer.estimate))
    if trainer.step:
        output.say(f"resuming at step {trainer.step}")

    with output.progress() as show:

        def progress(row: dict[str, Any]) -> None:
            by_clock, by_steps = row["seconds"] / config.seconds, row["step"] / (config.max_steps or float("inf"))
            text = f"step {row['step']}  loss {row['loss']:.4f}  lr x{row['lr_scale']:.2f}"
            if by_steps > by_clock:
                show(text, row["step"], config.max_steps, "steps")
            else:
                show(text, row["seconds"], config.seconds, "s")

        result = trainer.run(progress)
    if result.status == "interrupted":
        output.say(f"stopped at step {result.step}; `klora train --resume --out {out}` goes on from there")
        return result
    rate = result.tokens / max(result.seconds, 1e-9)
    output.say(
        f"{result.step} steps, {result.tokens:,} tokens in {result.seconds:.1f} s ({rate:,.0f} tokens/s), "
        f"{result.parameters:,} parameters"
    )
    scores = ", ".join(f"{name} {bpb:.4f}" for name, bpb in result.validation_bpb.items())
    output.say(f"validation BPB before quantisation: {scores}; kept {result.kept} in {out}")
    for note in data.notes:
        output.say(f"note: {note}", style="bold yellow")
    return result


def prepare_first(
    corpora: tuple[Corpus, Corpus], chosen: Preset, cache: Path, ranks: Ranks, output: Output
) -> Prepared:
    """Tokenizer and shards of both corpora: rank 0 makes them, the others find them.

    On other machines, which may have folders of their own, the first rank there makes what it does not find.
    Ctrl-C ends the command with status 130 and says what is kept.
    """
    names = {"tokenizer": "learning the tokenizer", "train": "tokenizing train", "validation": "tokenizing validation"}
    reached = "looking for the data"
    try:
        if ranks.is_first:
            with output.progress() as show:

                def progress(phase: str, done: int) -> None:
                    nonlocal reached
                    reached = f"{names[phase]}, after {done:,} documents"
                    show(names[phase], done, None, "documents")

                prepare(*corpora, chosen.model.vocab_size, cache, progress)
        ranks.wait()
        if ranks.is_first_here and not ranks.is_first:
            prepare(*corpora, chosen.model.vocab_size, cache)
        ranks.wait()
    except KeyboardInterrupt:
        if ranks.is_first:
            output.warn(
                f"stopped while {reached}. Of the data nothing is kept: {cache} holds only what was whole before, and "
                "no run was begun. The same command starts again"
            )
        raise typer.Exit(128 + signal.SIGINT) from None
    data = prepare(*corpora, chosen.model.vocab_size, cache)
    if ranks.is_first:
        attempt("the counts of the data", lambda: output.say(_counts(data.folder / "prepared.json")), output.warn)
    return data


def _counts(path: Path) -> str:
    counts = read_json(path)
    splits = (
        f"{counts[s]['documents']:,} {s} documents, {counts[s]['tokens']:,} tokens" for s in ("train", "validation")
    )
    return f"data: {'; '.join(splits)}"


def _corpora(text, jsonl, field, validation_text, validation_jsonl, share) -> tuple[Corpus, Corpus]:
    """(training, validation): two sources where both are given, else one source split by name."""
    train = options.corpus_from(text, jsonl, field)
    validation = options.corpus_from(validation_text, validation_jsonl, field, "val-")
    if validation and not train:
        raise ConfigError("a validation source was given without a training source; add --text or --jsonl")
    if validation and share is not None:
        raise ConfigError("--val-share splits one source and a validation source was given, too; give one of them")
    if validation:
        return train, validation
    whole = train or Corpus.stdlib()
    if share is not None:
        whole = dataclasses.replace(whole, validation_share=share)
    return whole.with_split("train"), whole.with_split("validation")


def describe(train: Corpus, validation: Corpus) -> dict:
    """What the text was, without the machine's folders; `validation_share` where one source was split."""
    one_source = train.paths == validation.paths and train.kind == validation.kind
    return {
        "kind": train.kind,
        "files": [path.name for path in train.paths],
        "validation_share": train.validation_share if one_source else None,
    }


def _stored_run(out: Path, overrides: dict[str, str]) -> tuple[Preset, Prepared, dict]:
    """Preset, data and sources of the run in `out`, as run.json tells."""
    path = out / RUN
    if not path.is_file():
        raise ConfigError(f"there is no run to resume in {out}: {path} is missing")
    try:
        run = read_json(path)
        model, train = dict(run["model"]), dict(run["train"])
        data, sources, name = Path(run["data"]), dict(run["sources"]), str(run["preset"])
        data.exists()  # ValueError where it is no path
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r:.200}); start the run afresh with --overwrite") from None
    try:
        stored = Preset(name, ModelConfig.from_dict(model), TrainConfig.from_dict(train), about="resumed")
    except (ConfigError, TypeError) as error:
        raise unusable(path, error, run.get("klora")) from None
    given = stored.override(overrides)
    before, now = ({**of.model.to_dict(), **of.train.to_dict()} for of in (stored, given))
    wrong = {name: now[name] for name in overrides if name not in CHANGEABLE and now[name] != before[name]}
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)} cannot change when a run is resumed ({differences(before, wrong)}); allowed: "
            f"{', '.join(CHANGEABLE)}"
        )
    if not data.is_dir():
        raise ShardError(
            f"the shards that the run in {out} reads were in {data}, which is gone; put them back, or name their new "
            f'folder as "data" in {path}'
        )
    return given, prepared_from_shards(data), sources
