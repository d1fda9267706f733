"""The command's entry point: its subcommands, and errors as sentences instead of tracebacks."""

import json
import sys
from importlib.metadata import version
from typing import Annotated

import torch
import typer

from ..bench.against import RevisionError
from ..bench.groups import UnknownGroup
from ..bench.record import RecordError
from ..bench.report import ReadmeError
from ..model.artifact import ArtifactError
from ..model.checkpoint import CheckpointError
from ..model.config import ConfigError
from ..model.corpus import CorpusError
from ..model.shards import ShardError
from ..model.tokenizer import TokenizerError
from ..model.train import NonFiniteLoss
from ..ttt.journal import JournalError
from ..ttt.ranks import LostStore
from ..ttt.score import NonFiniteScore
from .bench import bench
from .demo import demo
from .doctor import doctor
from .export import export
from .generate import generate
from .profile import profile
from .score import score
from .train import train

USER_ERRORS = (
    ArtifactError,
    CheckpointError,
    ConfigError,
    CorpusError,
    JournalError,
    LostStore,
    MemoryError,
    NonFiniteLoss,
    NonFiniteScore,
    OSError,
    ReadmeError,
    RecordError,
    RevisionError,
    ShardError,
    TokenizerError,
    UnknownGroup,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Train a small language model, compress it to 16 MB of int6, and adapt it to each document while it reads it.",
    epilog="Start with: klora demo",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"klora {version('klora')}")
        raise typer.Exit


@app.callback()
def klora(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


for command in (demo, train, export, score, generate, bench, profile, doctor):
    app.command()(command)


def main() -> None:
    """Run the command line. A user's mistake or a broken file ends with one sentence on stderr and exit status 2."""
    try:
        app()
    except torch.OutOfMemoryError as error:
        print(f"klora: out of GPU memory ({error}); give a smaller micro_batch_tokens or batch", file=sys.stderr)
        sys.exit(2)
    except USER_ERRORS as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        print(f"klora: {error}", file=sys.stderr)
        sys.exit(2)
