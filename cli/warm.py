"""`klora warm`: the kernels of training and scoring compiled before the first run, side by side.

On a fresh machine a run spends most of its first minute compiling one kernel after another. `klora train` and `klora
score` do the same by themselves where kernels are missing. What they took the last time is listed in Triton's cache, so
that they see at once whether all of it is still there.
"""

import fcntl
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer

from .. import __version__, kernels, lora, ttt
from .. import model as models
from ..model.artifact import load_artifact
from ..model.attention import why_not_here
from ..model.config import PRESETS, ConfigError, Preset, preset
from ..model.fused import FusedStep
from ..model.gpt import GPT
from ..model.loading import WEIGHTS_HELP, model_from_artifact
from ..model.parallel import Ranks, pick_device
from ..model.placement import compute_dtype, device_name, is_fused, micro_batches_of, rows_per_rank
from ..model.storage import write_text
from ..ttt.base import MICRO_TOKENS, BaseNll
from ..ttt.documents import Document
from ..ttt.engine import Engine, slots_a_place
from ..ttt.hf_model import HfModel
from ..ttt.protocols import PRESETS as TTT_PRESETS
from ..ttt.protocols import TTTConfig, ttt_preset
from . import options
from .console import Output

if TYPE_CHECKING:
    from ..kernels.precompile import Compilation

FEWEST = 4
"""Missing kernels from which a run starts processes for them, which takes two or three seconds."""

TURN = 180.0
"""Seconds after which a run no longer waits for another that compiles: several times what all kernels take."""

SLOTS = (16, 17)
"""Kernels for a pool of a multiple of 16 slots are others than for a pool of any number."""


@dataclass(frozen=True)
class Work:
    """A part of a run whose kernels are wanted."""

    facts: Mapping[str, Any]
    """what they depend on, in JSON values"""
    run: Callable[[], None]
    """does it once; nothing is launched, and what it computes is thrown away"""


def warm(
    artifact: Annotated[Path | None, typer.Argument(help="Artifact that `klora export` wrote: its scoring.")] = None,
    preset_name: Annotated[
        str | None, typer.Option("--preset", help=f"{', '.join(PRESETS)}; tiny if left out: its training and scoring.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Training alone.")] = False,
    score: Annotated[bool, typer.Option("--score", help="Scoring alone.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Override a field of the preset. Repeatable; klora train --fields lists them.",
        ),
    ] = None,
    scoring_preset: Annotated[
        str | None,
        typer.Option("--scoring", help=f"Preset of the scoring: {', '.join(TTT_PRESETS)}; quick if left out."),
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help=WEIGHTS_HELP)] = "dense",
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes that compile; left out, one a core, at most 8.")
    ] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Compile the kernels of training and scoring side by side, before the first run needs them.

    They go into Triton's cache, where every later run finds them. Nothing is trained and nothing is scored. Scoring is
    score_first with the preset that --scoring names. `klora train` and `klora score` do the same for their own
    settings, where kernels are missing: this is for machines and images that are made ready ahead.

    Example: klora warm --preset seed
    """
    output = Output(as_json)
    if artifact and (preset_name or train or set_):
        raise ConfigError("an artifact is scored, not trained; leave out --preset, --train and --set, or the artifact")
    if weights != "dense" and not artifact:
        raise ConfigError(f"--weights {weights} was given without an artifact, whose weights they are; name one")
    if scoring_preset and train and not score:
        raise ConfigError(f"--scoring {scoring_preset} was given with --train, which leaves scoring out; leave out one")
    config = ttt_preset(scoring_preset)
    chosen_device = require_gpu(device)
    chosen = preset(preset_name or "tiny").override(options.parse_overrides(set_))
    works = [training(chosen, chosen_device)] if train or not (score or artifact) else []
    if score or not train:
        scored = (
            model_from_artifact(load_artifact(artifact), chosen_device, weights)
            if artifact
            else untrained(chosen, chosen_device)
        )
        works += [scoring(scored, config, slots, weights) for slots in SLOTS]
    began, found = time.perf_counter(), {}
    for work in works:
        found |= record(work, chosen_device)
    result = compile_missing(found, output, jobs)
    for work in works:
        if not result["failed"]:
            _list_kernels(work, found)
    result["seconds"] = time.perf_counter() - began
    if not result["compiled"]:
        output.say(f"nothing to do: all {result['kernels']} kernels are in {result['cache']}")
    output.result(result)


def require_gpu(device: str) -> torch.device:
    """The device; ConfigError where it is no GPU."""
    chosen = pick_device(device)
    if chosen.type != "cuda":
        raise ConfigError(
            f"there is nothing to compile for {chosen}: the kernels run on a CUDA GPU and are compiled for the one "
            "that is there; run this on the machine that trains or scores"
        )
    return chosen


def training(chosen: Preset, device: torch.device, world: int = 1) -> Work:
    """A fused step of one of `world` ranks, and the validation after it."""
    config, length = chosen.train, chosen.model.train_length

    def run() -> None:
        model = untrained(chosen, device)
        if not is_fused(config, model):
            return
        if config.attention in ("auto", "klora") and not why_not_here("klora", chosen.model, device, model.dtype):
            model.chosen_attention = "klora"
        rows, most = rows_per_rank(chosen, world), max(1, config.micro_batch_tokens // length)
        # Two micro-batches: the first one's gradients are written, those of others are added.
        step = FusedStep(model, config, rows // micro_batches_of(rows, most), 2, Ranks(0, 1, device), capture=False)
        tokens = torch.ones(step.rows, length + 1, dtype=torch.int32)
        step.run([tokens, tokens], step=0, lr_scale=1.0)
        rows = torch.ones(most, length + 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            model.nll(rows[:, :-1], rows[:, 1:])

    facts = {"training": chosen.model.to_dict(), "train": config.to_dict(), "world": world}
    return Work(facts | {"device": device_name(device)}, run)


def scoring(
    model: GPT | HfModel, config: TTTConfig, documents: int, weights: str = "dense", backend: str | None = None
) -> Work:
    """The base pass and the engine's steps for so many documents. `backend` is handed to the ops.

    A model of Hugging Face computes each step once, as only our launches are left out.
    """
    slots, is_hf = max(1, min(slots_a_place(config) * config.batch, documents)), isinstance(model, HfModel)

    def run() -> None:
        longest = config.window + config.chunk
        make = model.engine if is_hf else partial(Engine, model)
        engine = make(config, 2 * longest, slots=slots, capture=False, backend=backend)
        engine.rehearse()
        sizes = {longest + 1, next(size for size in range(longest, 1, -1) if size == 2 or not config.adapts(size - 1))}
        texts = [Document(str(size), np.zeros(size, dtype=np.uint16), size) for size in sizes]
        # A product's tile depends on how many rows it has: batches of every size up to the largest.
        most = max(1, (model.micro_tokens if is_hf else MICRO_TOKENS[model.device.type]) // config.window)
        for size in [1 << power for power in range(most.bit_length())]:
            BaseNll(engine.weights, texts * size, config, backend=backend)
        if is_hf:
            model.detach()

    about = _facts_of_hf(model) if is_hf else model.config.to_dict()
    facts = {"scoring": about, "ttt": config.to_dict(), "weights": weights, "dtype": str(model.dtype)}
    return Work(facts | {"slots": [slots == 1, slots % 16 == 0], "device": device_name(model.device)}, run)


def _facts_of_hf(model: HfModel) -> dict[str, Any]:
    """What its kernels depend on beside the settings: sizes, how it is read, and who computes what is not ours."""
    ways = {"skips_masks": model.skips_masks, "has_parts": model.has_parts}
    return ways | {"hf": json.loads(model.module.config.to_json_string()), "transformers": version("transformers")}


def untrained(chosen: Preset, device: torch.device) -> GPT:
    """A model of the preset on `device`, whose parameters hold anything."""
    with torch.device("meta"):
        model = GPT(chosen.model)
    model.to_empty(device=device)
    model.configure(device, compute_dtype(chosen.train, device))
    return model


def record(work: Work, device: torch.device) -> "dict[str, Compilation]":
    """What `work` would compile; its memory is given back."""
    from ..kernels.precompile import recorded

    try:
        return recorded(work.run)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def compile_missing(found: "Mapping[str, Compilation]", output: Output, jobs: int | None = None) -> dict[str, Any]:
    """Compile what Triton's cache lacks; how many kernels, of which how many were compiled, and which failed."""
    from ..kernels.precompile import cache_folder, compile_all, is_cached

    began = time.perf_counter()
    missing = [one for key, one in found.items() if not is_cached(key, one.name)]
    failed = []
    if missing:
        with output.progress() as show:
            failed = compile_all(missing, jobs, lambda done, total: show("compiling", done, total, "kernels"))
        seconds = time.perf_counter() - began
        output.say(f"{len(missing) - len(failed)} kernels compiled in {seconds:.1f} s, kept in {cache_folder()}")
    for one in failed[:1]:
        output.warn(f"{len(failed)} kernels could not be compiled ahead; the first: {one}")
    counts = {"kernels": len(found), "compiled": len(missing) - len(failed)}
    return counts | {"failed": failed, "cache": str(cache_folder())}


def warmed(make: Callable[[], Work], device: torch.device, output: Output) -> None:
    """Before a run: compile what it takes and Triton's cache lacks. Whatever goes wrong here, the run goes on.

    Of several processes one compiles, whether they know of each other or not, and the others wait for what it compiles.
    """
    if device.type != "cuda":
        return
    try:
        work = make()
        if _are_listed(work):
            return
        with _in_turn(_list_of(work).parent, output):
            if _are_listed(work):
                return
            found = record(work, device)
            from ..kernels.precompile import is_cached

            missing = sum(not is_cached(key, one.name) for key, one in found.items())
            if missing >= FEWEST:
                output.say(
                    f"compiling {missing} kernels side by side, once on this machine; --no-warm leaves them to the run"
                )
                compile_missing(found, output)
            _list_kernels(work, found)
    except Exception as error:
        output.warn(f"kernels were not compiled ahead ({type(error).__name__}: {error}); the run compiles them itself")


@contextmanager
def _in_turn(folder: Path, output: Output) -> Iterator[None]:
    """Hold the lock of `folder`, after whoever has it, but for no longer than TURN seconds and not where none can be.

    The system takes it back from a process that dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "compiling.lock", "ab") as file:
        until, has_waited = time.monotonic() + TURN, False
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not has_waited:
                    output.say("another process compiles kernels on this machine; waiting for them")
                has_waited = True
                time.sleep(0.1)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield


def _are_listed(work: Work) -> bool:
    """Whether a list of the kernels of `work` is there, and every one of them."""
    from ..kernels.precompile import is_cached

    path = _list_of(work)
    return path.is_file() and all(is_cached(*one) for one in json.loads(path.read_text(encoding="utf-8")).items())


def _list_kernels(work: Work, found: "Mapping[str, Compilation]") -> None:
    path = _list_of(work)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({key: one.name for key, one in found.items()}))


def _list_of(work: Work) -> Path:
    """The file in Triton's cache that lists the kernels of `work`, as this code launches them."""
    import triton

    from ..kernels.precompile import cache_folder

    versions = __version__, torch.__version__, triton.__version__
    digest = hashlib.sha256(json.dumps([dict(work.facts), versions], sort_keys=True).encode())
    for package in (kernels, lora, models, ttt):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return cache_folder() / "klora" / f"{digest.hexdigest()}.json"
