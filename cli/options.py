"""Options that several commands share, and what is made of them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..model.config import ConfigError, Settings, allowed_values
from ..model.corpus import Corpus
from ..model.storage import require_writable
from .console import Output


def _default_cache() -> Path:
    """In the home folder; beside the runs for a user who has none, as in a container under any number."""
    try:
        return Path.home() / ".cache" / "klora"
    except RuntimeError:
        return Path("runs/cache")


DEFAULT_CACHE = _default_cache()

Text = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="PATH", help="Text file or folder of text files, one document a file. Repeatable."),
]
Jsonl = Annotated[
    list[Path] | None,
    typer.Option(
        "--jsonl", metavar="FILE", help="File of one JSON object a line (.jsonl, .jsonl.gz, .jsonl.zst). Repeatable."
    ),
]
Field = Annotated[str, typer.Option("--field", help="Name of the text's field in --jsonl files.")]
Shards = Annotated[
    Path | None,
    typer.Option(
        "--shards",
        metavar="FOLDER",
        help="Folder of token shards (`*_train_*.bin`, `*_val_*.bin`) and their tokenizer (`*.model`).",
    ),
]
Cache = Annotated[Path, typer.Option("--cache", help="Where tokenizers and token shards are kept between runs.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N. auto: the GPU if there is one.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Override a field of the config. Repeatable; --fields lists them."
    ),
]
Fields = Annotated[
    bool, typer.Option("--fields", help="List every field with its value and what is allowed, and stop.")
]
Warm = Annotated[
    bool,
    typer.Option(
        "--warm/--no-warm",
        help="On a GPU, first compile the kernels that Triton's cache lacks, side by side; --no-warm: each at its "
        "first launch.",
    ),
]
Commit = Annotated[str, typer.Option("--commit", help="Commit that is measured, where there is no git to ask.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for machines.")]


def parse_overrides(pairs: list[str] | None) -> dict[str, str]:
    """FIELD=VALUE pairs as a dictionary; ConfigError for one without '='."""
    values = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair!r} is not possible; allowed: FIELD=VALUE, such as --set width=256")
        values[name.strip()] = value.strip()
    return values


def require_folder(path: Path) -> None:
    """Refuse an --out that is no folder and cannot become one, or that cannot be written, before any work is done.

    Raises ConfigError or OSError; creates nothing.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"--out {path} is no folder; allowed: a folder, or a path where there is nothing yet")
    require_writable(path)


def require_file(path: Path, option: str = "--out") -> None:
    """As :func:`require_folder`, for an option that is to be a file; one that is there is replaced."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option} {path} is no file; allowed: a file, or a path where there is nothing yet")
    require_writable(path)


def corpus_from(text: list[Path] | None, jsonl: list[Path] | None, field: str, option: str = "") -> Corpus | None:
    """The corpus that --text or --jsonl name (`option` is their common prefix), or None."""
    if text and jsonl:
        raise ConfigError(f"--{option}text and --{option}jsonl were both given; give one of them")
    if text:
        return Corpus.text(text)
    return Corpus.jsonl(jsonl, field=field) if jsonl else None


def require_field_is_read(field: str, *sources: list[Path] | None) -> None:
    """ConfigError where a --field was named and no source is a JSON file."""
    if field != "text" and not any(sources):
        raise ConfigError(f"--field {field} was given without a --jsonl file to read it from; add one or leave it out")


def list_fields(output: Output, *settings: Settings) -> None:
    """Print every field of `settings`: name, value, what is allowed, what it is."""
    import dataclasses

    values = {}
    for part in settings:
        rows = []
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            rows.append((field.name, str(value), allowed_values(field), field.metadata["help"]))
            values[field.name] = {"value": value, "allowed": allowed_values(field), "help": field.metadata["help"]}
        output.table(type(part).__name__, rows, ("field", "value", "allowed", "what it is"))
        output.say("")
    output.result(values)
