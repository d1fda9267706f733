"""The folder of a training run: its files, and what becomes of a run that another one replaces."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .reading import read_json

CHECKPOINT, MODEL, RUN, TOKENIZER = "checkpoint.safetensors", "model.safetensors", "run.json", "tokenizer.model"
RUN_FILES = (CHECKPOINT, MODEL, RUN, TOKENIZER, "loss.csv", "loss.png")
REPLACED = "replaced"
"""Folder within a run's that keeps the run it replaces until it has finished."""


def set_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Move the run that is in `folder` to replaced/; it is deleted if unfinished and replaced/ holds a run."""
    names = [name for name in RUN_FILES if (folder / name).is_file()]
    kept = folder / REPLACED
    if not {CHECKPOINT, MODEL} & set(names):
        for name in (RUN, TOKENIZER):  # left where a kill came between the moves below
            if name in names and kept.exists() and not (kept / name).exists():
                (folder / name).rename(kept / name)
        return
    if MODEL in names or not kept.exists():
        drop_replaced(folder)
        kept.mkdir(exist_ok=True)
        for name in names:
            (folder / name).rename(kept / name)
        say(f"the run that was in {folder} is kept in {kept} until this one has finished")
    else:
        for name in (CHECKPOINT, RUN):
            (folder / name).unlink(missing_ok=True)


def drop_replaced(folder: Path) -> None:
    """Remove the run in replaced/, and the folder if it is then empty."""
    for name in RUN_FILES:
        (folder / REPLACED / name).unlink(missing_ok=True)
    with suppress(OSError):
        (folder / REPLACED).rmdir()


def is_of_run(path: Path) -> bool:
    """Whether a file says what a run of klora is, and is no other run.json."""
    try:
        return {"klora", "preset"} <= read_json(path).keys()
    except (OSError, ValueError, AttributeError):
        return False


def began_with(path: Path) -> str:
    """What ran attention in the run that `path` describes; empty where it does not say."""
    try:
        return str(read_json(path)["attention"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
