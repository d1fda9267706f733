"""The command's entry point: its subcommands, and errors as sentences instead of tracebacks."""

import json
import logging
import os
import sys
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

from .. import KloraError, __version__
from ..cores import spin_less
from .console import Said, printable

COMMANDS = {
    "demo": "Train the tiny preset on Python's standard library, export it, adapt it to held-out files, "
    "draw the report.",
    "train": "Train a model on text, on CPU or GPU, alone or under torchrun.",
    "export": "Quantise a run's weights to int6 and write one artifact that fits the budget.",
    "score": "Score documents in bits per byte, adapting the model to each while it reads it.",
    "audit": "Look for what would make an artifact's scores no scores: leaks, sums that are not 1, targets left out.",
    "verify": "Recompute a random share of a stored score and compare it with what score.json says.",
    "warm": "Compile the kernels of training and scoring side by side, before the first run needs them.",
    "generate": "Sample text that goes on from a prompt, token by token over a KV cache, "
    "until a new document would begin.",
    "bench": "Check every variant against float64, time those that pass, and write one record a group.",
    "profile": "Write a trace of one training step or TTT pass and list the kernels that take the time.",
    "doctor": "Show device, versions, the attention backend in use and why, the kernel backend, and what is missing.",
}
"""The first line of each command's help, so that listing them imports none. A command is a function in a module of its
name."""

MARKUP = "markdown"


class Commands(TyperGroup):
    """Imports the module of the command that runs, and no other. What an argument is quoted in is printable."""

    def make_context(self, *args, **kwargs):
        with _printable_complaints():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        with _printable_complaints():
            return super().invoke(ctx)

    def resolve_command(self, ctx, args):
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and command_of(listed.name), rest


@contextmanager
def _printable_complaints():
    """Clean the message of an error about arguments, which may be a file's name; with --json machines get it, too."""
    try:
        yield
    except Exception as error:
        if isinstance(getattr(error, "message", None), str) and hasattr(error, "format_message"):
            error.message = printable(error.message)
            _print_json(error.format_message(), error)
        raise


def _print_json(says: str, error: BaseException) -> None:
    """What went wrong, for machines, where they asked."""
    if "--json" in sys.argv:
        with suppress(OSError):
            print(json.dumps({"error": says, "kind": type(error).__name__}))


def command_of(name: str):
    """The command, from its module."""
    single = typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
    single.command(name)(getattr(import_module(f".{name}", __package__), name))
    return get_command(single)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=MARKUP,
    help="Train a small language model, compress it to 16 MB of int6, and adapt it to each document while it reads it.",
    epilog="Start with: klora demo",
)
for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"klora {__version__}")
        raise typer.Exit


@app.callback()
def klora(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. A user's mistake or a broken file ends with one sentence on stderr and exit status 2."""
    _open_streams()
    spin_less()
    # torch reads it when it is imported. Where another process is gone, its C++ would show a stack before our sentence.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        if not any(isinstance(handler, Said) for handler in logging.getLogger("klora").handlers):
            logging.getLogger("klora").addHandler(Said())
        app()
    except (KloraError, MemoryError, OSError) as error:
        _print_json(str(error), error)
        # Python's own MemoryError says nothing.
        print(f"klora: {printable(str(error)) or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        memory = _exhausted(error)
        if memory is None:
            raise
        print(f"klora: out of {memory} ({error}); give a smaller micro_batch_tokens or batch", file=sys.stderr)
        sys.exit(2)


def _open_streams() -> None:
    """Let what goes to a stream that was closed before the start go nowhere.

    Python has None for it, and the next file to be opened would get its number, and what a library writes to that.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)


def _exhausted(error: RuntimeError) -> str | None:
    """Which memory PyTorch says has run out; None where it says something else."""
    torch = sys.modules.get("torch")  # who raised it has imported it
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "GPU memory"
    return "memory" if "DefaultCPUAllocator: can't allocate memory" in str(error) else None
