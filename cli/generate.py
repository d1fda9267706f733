"""`klora generate`: sample text from an artifact."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..model.artifact import load_artifact
from ..model.config import ConfigError
from ..model.generate import generate_text
from ..model.loading import WEIGHTS_HELP, model_from_artifact, tokenizer_of
from ..model.parallel import pick_device
from . import options
from .console import Output, printable


def generate(
    artifact: Annotated[Path, typer.Argument(help="Artifact that `klora export` wrote.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.")] = "",
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=65536, help="Most tokens to sample.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample among this many likeliest tokens; 0: all.")] = 50,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text on the same machine.")
    ] = 0,
    weights: Annotated[str, typer.Option("--weights", help=WEIGHTS_HELP)] = "dense",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Sample text that goes on from a prompt, token by token over a KV cache, until a new document would begin.

    Example: klora generate tiny.klora --prompt "import os" --tokens 100
    """
    output = Output(as_json)
    loaded = load_artifact(artifact)
    model = model_from_artifact(loaded, pick_device(device), weights)
    tokenizer = tokenizer_of(loaded)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        prompt = _as_utf8(prompt)
    started, pieces = time.perf_counter(), []
    # The pieces are the artifact's: a terminal gets no control character of theirs, a file or a pipe gets the text.
    shown = printable if sys.stdout.isatty() else str
    if not as_json:
        sys.stdout.write(shown(prompt))
    settings = {"most": tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    for piece in generate_text(model, tokenizer, prompt, **settings):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
    output.result({"prompt": prompt, "text": "".join(pieces), "seconds": time.perf_counter() - started, **settings})


def _as_utf8(prompt: str) -> str:
    """An argument whose bytes the locale has no characters for: they may be UTF-8. ConfigError: they are not."""
    try:
        return os.fsencode(prompt).decode()
    except UnicodeError:
        raise ConfigError("--prompt holds bytes that are not UTF-8; allowed: any Unicode text") from None
