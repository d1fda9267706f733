"""Which constants of test-time training suit a model: a sweep on a tuning split, and presets on one it never saw.

    python -m klora.bench.sweep seed.klora --jsonl val.jsonl.zst --record sweep.json
    python -m klora.bench.sweep seed.klora --jsonl val.jsonl.zst --record presets.json --presets

Documents are split in two by the hash of their names. Every candidate adapts the same sample of the first half under
score_first. What counts is bits per byte over the sample, short documents included.

The sweep goes one step at a time: learning rate and steps a chunk together, then chunk, temperature, rank and what else
scales the steps. Each is varied around the choice so far. That is the cheapest config within TOLERANCE of the best,
because twice the steps are not worth their time for a gain that cannot be seen. The second half is for what the sweep
led to: --presets scores the presets of ttt/protocols.py and the model as it is on all of it.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..model.artifact import load_artifact
from ..model.corpus import Corpus
from ..model.gpt import GPT
from ..model.loading import model_from_artifact, tokenizer_of
from ..model.parallel import pick_device
from ..model.storage import write_text
from ..model.weights import frozen_weights
from ..ttt.base import BaseNll
from ..ttt.documents import Document, documents_from_texts
from ..ttt.engine import engine_of
from ..ttt.protocols import PRESETS, TTTConfig, ttt_preset
from ..ttt.queue import Deadline
from ..ttt.sampling import name_digest, sample
from .environment import environment

TOLERANCE = 0.0005
"""Bits per byte that a config may lose against the best and be chosen, if it takes fewer steps."""

TUNING_TOKENS = 400_000
"""Tokens that each candidate adapts to."""

NO_DEADLINE = {"deadline": 0.0}


def is_held_out(name: str) -> bool:
    """Whether the document of this name is in the half that the sweep never sees."""
    return name_digest(name)[0] % 2 == 1


@dataclass(frozen=True)
class Found:
    """Bits per byte of a sample under one config, with what the unadapted model has on the same windows."""

    base_bpb: float
    adapted_bpb: float
    gained: float
    """share of the documents long enough to adapt that got better"""
    seconds: float


class Sample:
    """Documents that configs are tried on; the base model's scores are computed once for each way to cut them."""

    def __init__(self, model: GPT, documents: Sequence[Document]):
        self.weights, self.documents = frozen_weights(model), documents
        self.bytes = sum(document.bytes for document in documents)
        self._base: dict[tuple[int, int, int], BaseNll] = {}

    def base(self, config: TTTConfig) -> BaseNll:
        key = config.chunk, config.window, config.min_tokens
        if key not in self._base:
            self._base[key] = BaseNll(self.weights, self.documents, config)
        return self._base[key]

    def run(self, config: TTTConfig) -> Found:
        base = self.base(config)
        nats = [base.of(index)[0] for index in range(len(self.documents))]
        long = [index for index in range(len(nats)) if not base.is_short[index]]
        documents = [self.documents[index] for index in long]
        engine = engine_of(self.weights, config, documents)
        adapted = engine.adapt(documents, Deadline(0)).nats
        before = [nats[index] for index in long]
        rest = math.fsum(nats) - math.fsum(before)
        scale = 1 / math.log(2) / self.bytes
        better = sum(a < b for a, b in zip(adapted, before, strict=True)) / max(len(long), 1)
        return Found(math.fsum(nats) * scale, (rest + math.fsum(adapted)) * scale, better, engine.facts["seconds"])


RATES = {1: (0.001, 0.002, 0.004), 2: (0.001,), 4: (0.0006,)}
"""Learning rates to try with so many steps a chunk."""

STEPS: tuple[Callable[[TTTConfig], list[dict[str, Any]]], ...] = (
    lambda best: [{}],
    lambda best: [{"lr": lr, "steps_per_chunk": steps} for steps in RATES for lr in RATES[steps]],
    lambda best: [{"chunk": chunk, "lr": lr} for chunk in (64, 128) for lr in (best.lr / 2, best.lr)],
    lambda best: [{"temperature": 1.0}, {"bias_lr": 1.0}],
    lambda best: [{"lora_rank": rank, "head_rank": 2 * rank} for rank in (4, 16)],
    lambda best: [{"head_lr": 1.0}, {"min_tokens": best.chunk + 2}],
    lambda best: [{"lr": best.lr * factor} for factor in (0.7, 1.4)],
)
"""The steps of the sweep: changes to the choice so far."""


def choice(rows: Sequence[tuple[TTTConfig, float]]) -> TTTConfig:
    """Of configs and their bits per byte the one with the fewest steps a token that is within TOLERANCE of the best."""
    least = min(bpb for _, bpb in rows)
    near = [(config.steps_per_chunk / config.chunk, bpb, at) for at, (config, bpb) in enumerate(rows)]
    return rows[min(one for one in near if one[1] <= least + TOLERANCE)[2]][0]


def search(tuning: Sample, start: TTTConfig) -> Iterator[tuple[TTTConfig, list[dict[str, Any]]]]:
    """The choice so far, from `start` on, and a row for every config that was tried, after each of them."""
    best, tried, rows = start, [], []
    for step in STEPS:
        for changes in step(best):
            config = best.override(changes)
            found = tuning.run(config)
            tried.append((config, found.adapted_bpb))
            rows.append({"changes": changes, "config": config.to_dict(), **vars(found)})
            yield choice(tried), rows
        best = choice(tried)


def sweep(
    artifact: Annotated[Path, typer.Argument(help="Artifact that `klora export` wrote.")],
    jsonl: Annotated[Path, typer.Option(help="Documents that the model was not trained on, JSON lines.")],
    record: Annotated[Path, typer.Option(help="The record to write, and to write again after each config.")],
    presets: Annotated[bool, typer.Option("--presets", help="Score the presets on the other half instead.")] = False,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of the half that is used; 400,000, or with --presets all.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Run the sweep, or score the presets, and write the record."""
    loaded, began = load_artifact(artifact), time.perf_counter()
    model = model_from_artifact(loaded, pick_device(device))
    every = documents_from_texts(Corpus.jsonl([jsonl]).documents(), tokenizer_of(loaded), os.cpu_count() or 1)
    half = [document for document in every if is_held_out(document.name) is presets]
    most = tokens or (1 << 62 if presets else TUNING_TOKENS)
    used = Sample(model, sample(half, most))
    if not used.documents:
        raise typer.BadParameter(
            f"of the documents in {jsonl} {len(half)} are in the half that is used, none of at most {most} tokens; "
            "give more documents, or more tokens"
        )
    about = {
        "name": "presets" if presets else "sweep",
        "environment": environment(commit),
        "artifact": {"payload_sha256": loaded.header["payload_sha256"], "provenance": loaded.provenance},
        "half": "held out" if presets else "tuning",
        "documents": len(used.documents),
        "tokens": sum(document.targets for document in used.documents),
    }
    for found in score_presets(used) if presets else searched(used):
        seconds = time.perf_counter() - began
        write_text(record, json.dumps({**about, **found, "seconds": seconds}, indent=1) + "\n")


def searched(tuning: Sample) -> Iterator[dict[str, Any]]:
    """The rows of the sweep so far, and what the choice among them changes of the design's constants."""
    design = ttt_preset("design").override(NO_DEADLINE)
    changed: dict[str, Any] = {}
    for best, rows in search(tuning, design):
        changed = {name: value for name, value in best.to_dict().items() if value != design.to_dict()[name]}
        print(_describe(str(rows[-1]["changes"]), rows[-1]))
        yield {"chosen": changed, "rows": rows}
    print(f"chosen: {changed}")


def score_presets(held_out: Sample) -> Iterator[dict[str, Any]]:
    """What the presets come to, one after the other."""
    found = {}
    for name in PRESETS:
        found[name] = vars(held_out.run(ttt_preset(name).override(NO_DEADLINE)))
        print(_describe(name, found[name]))
        yield {"presets": found}


def _describe(name: str, found: dict[str, Any]) -> str:
    base, adapted, gained, seconds = (found[field.name] for field in fields(Found))
    return f"{name}: {base:.5f} -> {adapted:.5f}; {gained:.0%} of the long documents gain; {seconds:.1f} s"


if __name__ == "__main__":
    typer.run(sweep)
