"""Which constants of test-time training suit a model: rows on one half of a text, and the best of them on the other.

    python -m klora.bench.sweep seed.klora --jsonl val.jsonl.zst --record sweep.json --seconds 400

A document is in the half that the hash of its tokens says, as for `klora score --sweep`. Every row of ROWS adapts the
same sample of the tuning half under score_first. What counts is bits per byte over the sample, short documents
included. A row says:

    base_bpb       the model as it is, in the row's own windows; recomputed ones, whatever the row's context
    adapted_bpb    in the pass that adapts
    gain           1 - adapted_bpb / base_bpb of row `quick`: what windows and steps bring together
    own_gain       1 - adapted_bpb / base_bpb: what the steps bring, and a context that is cached
    long, short    share of the documents of at least LONG tokens, and of the others, whose own_gain is above 0
    seconds        of adapting, captures and compiling left out; `wall_seconds` has all of them

At the end each preset takes the row with the fewest bits per byte of those whose seconds it may cost and with which
most long documents gain. The rows that were chosen, and the presets as they are, score the held-out half, which no row
has seen.

The record is written again after every row. A row that is in it already is not measured again, so that a sweep may be
made in several calls. `seconds` is for one call: no row begins that would leave no time for the held-out half.
"""

import gc
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import KloraError
from ..model.artifact import load_artifact
from ..model.corpus import Corpus
from ..model.gpt import GPT
from ..model.loading import model_from_artifact, tokenizer_of
from ..model.parallel import pick_device
from ..model.reading import read_json
from ..model.storage import write_text
from ..model.weights import frozen_weights
from ..ttt.base import BaseNll
from ..ttt.documents import Document, documents_from_texts
from ..ttt.engine import engine_of
from ..ttt.phases import groups_of
from ..ttt.protocols import BEST, CACHED, CONTEST, FROM_A, QUICK, TARGETS, THOROUGH, TTTConfig, ttt_preset
from ..ttt.queue import Deadline
from ..ttt.results import is_short
from ..ttt.sampling import is_for_tuning, sample
from .environment import environment
from .rows import picked

TOKENS = 400_000
"""Tokens of each half that are used."""

LONG = 2048
"""Tokens of a document that counts as long."""

BEST_COST = 8
"""The preset `best` may cost so many times the seconds of `quick`."""

MOST_GAIN = 0.75
"""A preset is not chosen where a smaller share of the long documents gain: bits per byte alone would take constants
that gain much on a few."""

LIKE = 1.05
"""Seconds that differ by less are the same: two measurements of one row do."""

PRESETS = QUICK, THOROUGH, BEST, CONTEST
ALL = {"targets": ",".join(TARGETS)}
RECOMPUTED_64 = {"chunk": 64, "lr": 0.001}
RECOMPUTED_128 = RECOMPUTED_64 | {"chunk": 128}
RECOMPUTED_32 = RECOMPUTED_64 | {"chunk": 32, "lr": 0.0007}
ALL_RECOMPUTED_64 = RECOMPUTED_64 | ALL | {"lr": 0.0005}
CACHED_64 = {"context": CACHED} | RECOMPUTED_64
CACHED_32 = CACHED_64 | {"chunk": 32, "lr": 0.0005}


def _ranks(rank: int) -> dict[str, int]:
    return {"lora_rank": rank, "head_rank": rank}


def _rows() -> dict[str, TTTConfig]:
    """Changes to `quick`, the ones that are likeliest to win first; the presets to be beaten before them."""
    quick = ttt_preset(QUICK)
    changes: dict[str, dict[str, Any]] = {
        "quick-beta1-0.9": {"beta1": 0.9},
        "two-steps-of-64-beta1-0.9": {"chunk": 64, "steps_per_chunk": 2, "lr": 0.0005, "beta1": 0.9}
        | {"lora_rank": 16, "head_rank": 32},
        "recomputed-64-all-rank-64": ALL_RECOMPUTED_64 | _ranks(64),
        "recomputed-64-all-rank-64-lr-0.00035": ALL_RECOMPUTED_64 | _ranks(64) | {"lr": 0.00035},
        "recomputed-64-all-lr-0.00075": ALL_RECOMPUTED_64 | {"lr": 0.00075},
        "recomputed-48-all-rank-64-lr-0.0002": ALL_RECOMPUTED_64 | _ranks(64) | {"chunk": 48, "lr": 0.0002},
        "recomputed-64-all-rank-64-lr-half": ALL_RECOMPUTED_64 | _ranks(64) | {"lr_half": 2048},
        "recomputed-64-all-rank-32-lr-0.0004": ALL_RECOMPUTED_64 | _ranks(32) | {"lr": 0.0004},
        "recomputed-64": RECOMPUTED_64,
        "recomputed-64-lr-0.0015": RECOMPUTED_64 | {"lr": 0.0015},
        "recomputed-128": RECOMPUTED_128,
        "recomputed-128-all-rank-64": RECOMPUTED_128 | ALL | _ranks(64) | {"lr": 0.0005},
        "quick-lr-0.003": {"lr": 0.003},
        "quick-lr-0.0015": {"lr": 0.0015},
        "recomputed-256-all-rank-64": {"lr": 0.001} | ALL | _ranks(64),
        "recomputed-32": RECOMPUTED_32,
        "recomputed-32-all": ALL_RECOMPUTED_64 | {"chunk": 32, "lr": 0.0003},
        "recomputed-32-all-rank-64": ALL_RECOMPUTED_64 | _ranks(64) | {"chunk": 32, "lr": 0.0002},
        "recomputed-64-decay-0.5": RECOMPUTED_64 | {"weight_decay": 0.5},
        "recomputed-64-a-scale-0.5": RECOMPUTED_64 | {"a_scale": 0.5},
        "recomputed-64-phases-3": RECOMPUTED_64 | {"phases": 3},
        "recomputed-64-phases-3-a": RECOMPUTED_64 | {"phases": 3, "phase_start": FROM_A},
        "cached-64": CACHED_64,
        "cached-256": {"context": CACHED},
        "cached-128": {"context": CACHED} | RECOMPUTED_128,
        "cached-32": {"context": CACHED} | RECOMPUTED_32,
        "cached-64-all-lr-0.0005": CACHED_64 | ALL | {"lr": 0.0005},
        "cached-64-all-rank-64-lr-0.00025": CACHED_64 | ALL | _ranks(64) | {"lr": 0.00025},
        "cached-32-all": CACHED_32 | ALL,
        "cached-32-all-window-1536": CACHED_32 | ALL | {"window": 1536},
        "cached-128-all-lr-0.0005": CACHED_64 | ALL | {"chunk": 128, "lr": 0.0005},
        "cached-256-all-lr-0.0005": CACHED_64 | ALL | {"chunk": 256, "lr": 0.0005},
        "contest-lr-0.00005": ttt_preset(CONTEST).override({"lr": 0.00005}).to_dict(),
        "contest-lr-0.00003": ttt_preset(CONTEST).override({"lr": 0.00003}).to_dict(),
        "contest-lr-0.0002": ttt_preset(CONTEST).override({"lr": 0.0002}).to_dict(),
        "contest-lr-0.0003": ttt_preset(CONTEST).override({"lr": 0.0003}).to_dict(),
        "cached-64-beta1-0.9": CACHED_64 | {"beta1": 0.9},
        "recomputed-64-warmup-512": RECOMPUTED_64 | {"lr_warmup": 512},
        "recomputed-64-from-256": RECOMPUTED_64 | {"adapt_from": 256},
        "recomputed-64-all-mlp-rank-4": ALL_RECOMPUTED_64 | {"up_rank": 4, "down_rank": 4},
        "recomputed-64-phases-3-lr-0.0003": RECOMPUTED_64 | {"phases": 3, "phase_lr": 0.0003},
    }
    presets = {name: ttt_preset(name) for name in PRESETS}
    return presets | {name: quick.override(changed) for name, changed in changes.items()}


ROWS = _rows()
"""The configs that are tried, by the names of their rows, in the order in which they are worth a GPU's seconds."""


@dataclass(frozen=True)
class Found:
    """What a sample comes to under one config; the module says what the fields are. None: the adapters diverged."""

    base_bpb: float
    adapted_bpb: float | None
    own_gain: float | None
    long: float | None
    short: float | None
    seconds: float
    wall_seconds: float


class Sample:
    """Documents that configs are tried on; the base model's scores are computed once for each way to cut them."""

    def __init__(self, model: GPT, documents: Sequence[Document]):
        self.weights, self.documents = frozen_weights(model), documents
        self.bytes = sum(document.bytes for document in documents)
        self.targets = sum(document.targets for document in documents)
        self._base: dict[tuple, BaseNll] = {}

    def base(self, config: TTTConfig) -> BaseNll:
        key = config.layout, config.chunk, config.window, config.min_tokens, config.adapt_from
        if key not in self._base:
            self._base[key] = BaseNll(self.weights, self.documents, config)
        return self._base[key]

    def run(self, config: TTTConfig) -> Found:
        began = time.perf_counter()
        base = self.base(config)
        before = [base.of(index)[0] for index in range(len(self.documents))]
        documents, after, seconds = self.documents, list(before), 0.0
        engine = engine_of(self.weights, config, documents)
        for number, group in enumerate(groups := groups_of(documents, config.phases)):
            if number:
                engine.learn([documents[index] for index in groups[number - 1]])
            adapts = [index for index in group if not is_short(documents[index], config, number)]
            adapted = engine.adapt([documents[index] for index in adapts], Deadline(0))
            seconds += engine.facts["seconds"]
            for index, nats, diverged in zip(adapts, adapted.nats, adapted.diverged, strict=True):
                after[index] = math.nan if diverged else float(nats)
        seconds += engine.facts.get("learn_seconds", 0.0)
        scale = 1 / math.log(2) / self.bytes
        base_bpb, adapted_bpb = math.fsum(before) * scale, math.fsum(after) * scale
        is_long = [document.targets >= LONG for document in self.documents]
        kinds = [
            [a < b for a, b, of in zip(after, before, is_long, strict=True) if of is long] for long in (True, False)
        ]
        long, short = (sum(kind) / len(kind) if kind else None for kind in kinds)
        wall_seconds = time.perf_counter() - began
        if not math.isfinite(adapted_bpb):
            return Found(base_bpb, None, None, None, None, seconds, wall_seconds)
        return Found(base_bpb, adapted_bpb, 1 - adapted_bpb / base_bpb, long, short, seconds, wall_seconds)


def choices(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Preset -> the row with the fewest bits per byte of those that take no longer than the preset may.

    `quick` and `thorough` may take what their own rows take, LIKE times that at most, `best` BEST_COST times `quick`.
    At least MOST_GAIN of the long documents gain, where there are any. A preset is left out where the row that limits
    it is not there. None has phases: its documents are to be independent.
    """
    done = {name: row for name, row in rows.items() if row.get("adapted_bpb") is not None}
    limits = {name: LIKE * done[name]["seconds"] for name in (QUICK, THOROUGH) if name in done}
    if QUICK in limits:
        limits[BEST] = BEST_COST * done[QUICK]["seconds"]
    fair = {name: row for name, row in done.items() if not _has_phases(row) and _most_gain(row)}
    affordable = {
        preset: [name for name, row in fair.items() if row["seconds"] <= limit] for preset, limit in limits.items()
    }
    return {
        preset: min(names, key=lambda name: fair[name]["adapted_bpb"]) for preset, names in affordable.items() if names
    }


def _has_phases(row: Mapping[str, Any]) -> bool:
    return row["config"]["phases"] > 0


def _most_gain(row: Mapping[str, Any]) -> bool:
    return row["long"] is None or row["long"] >= MOST_GAIN


def sweep(
    artifact: Annotated[Path, typer.Argument(help="Artifact that `klora export` wrote.")],
    jsonl: Annotated[Path, typer.Option(help="Documents that the model was not trained on, JSON lines.")],
    record: Annotated[Path, typer.Option(help="The record to write, and to go on with.")],
    rows: Annotated[str, typer.Option(help="Rows, with commas; all.")] = "",
    seconds: Annotated[float, typer.Option(min=0.0, help="What this call may take; 0: no limit.")] = 0.0,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each half.")] = TOKENS,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Measure the rows that the record has not, choose, score the held-out half, and write the record."""
    began, wanted = time.perf_counter(), picked(ROWS, rows)
    try:
        loaded = load_artifact(artifact)
        model = model_from_artifact(loaded, pick_device(device))
        texts = Corpus.jsonl([jsonl]).documents()
        every = list(documents_from_texts(texts, tokenizer_of(loaded), os.cpu_count() or 1))
    except KloraError as error:
        raise SystemExit(str(error)) from None
    tuning, held_out = (
        Sample(model, sample([d for d in every if is_for_tuning(d) is side], tokens)) for side in (True, False)
    )
    for name, half in (("tuning", tuning), ("held-out", held_out)):
        if not half.documents:
            raise typer.BadParameter(
                f"of the {len(every)} documents in {jsonl} none of at most {tokens} tokens is in the {name} half; give "
                "more documents, or more tokens"
            )
    machine = environment(commit)
    about = {
        "name": "sweep",
        "gpu": machine["gpu"],
        "artifact": {"payload_sha256": loaded.header["payload_sha256"], "provenance": loaded.provenance},
        "halves": "by the SHA-256 of the tokens",
        **{
            name: {"documents": len(half.documents), "tokens": half.targets, "bytes": half.bytes}
            for name, half in (("tuning", tuning), ("held_out", held_out))
        },
    }
    if not Sweep(about, record, machine).run(wanted, tuning, held_out, seconds, began):
        raise typer.Exit(1)


def _rows_of(old: dict[str, Any], name: str, record: Path) -> dict[str, dict[str, Any]]:
    rows = old.get(name)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise typer.BadParameter(f"{record} is damaged at {name}; give another --record")
    return rows


class Sweep:
    """A record and what it has so far. BadParameter: the file there is of another model, text or GPU."""

    def __init__(self, about: dict[str, Any], record: Path, machine: dict[str, Any]):
        self.record, self.about, self.machine = record, about, machine
        self.rows: dict[str, dict[str, Any]] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        if record.exists():
            try:
                old = read_json(record)
            except ValueError:
                old = None
            if not isinstance(old, dict) or {name: old.get(name) for name in about} != json.loads(json.dumps(about)):
                raise typer.BadParameter(
                    f"{record} is no sweep of this artifact and text on this GPU; give another --record"
                )
            self.rows, self.scores = (_rows_of(old, name, record) for name in ("rows", "held_out_scores"))

    def run(
        self, wanted: Mapping[str, TTTConfig], tuning: Sample, held_out: Sample, seconds: float, began: float
    ) -> bool:
        """Rows, then the choice among all that there are, then the held-out half. Whether nothing failed."""
        limit, longest = seconds or math.inf, 0.0
        for name, config in wanted.items():
            if self._has(self.rows, name, config):
                print(f"{name}: it is in {self.record}", flush=True)
                continue
            share = held_out.targets / tuning.targets
            kept_back = share * sum(self.rows[name]["wall_seconds"] for name in self._to_score())
            left = limit - (time.perf_counter() - began)
            if left < kept_back + (1 + share) * longest:  # the row may be chosen
                print(f"{left:.0f} s are left: {name} and the rows behind it wait for another call", flush=True)
                break
            self.rows[name] = self._measured(tuning, config)
            longest = max(longest, self.rows[name]["wall_seconds"])
            self._write()
            print(described(name, self.rows[name], self.rows.get(QUICK)), flush=True)
        for name in self._to_score():
            config = TTTConfig(**self.rows[name]["config"])
            if not self._has(self.scores, name, config):
                self.scores[name] = self._measured(held_out, config)
                self._write()
        chosen = choices(self.rows)
        for name in self._to_score():
            chosen_for = ", ".join(preset for preset, row in chosen.items() if row == name)
            said = described(name, self.scores[name], self.scores.get(QUICK))
            print(f"held-out half, {f'chosen for {chosen_for}: ' if chosen_for else ''}{said}", flush=True)
        self._write()
        return not any("error" in row for found in (self.rows, self.scores) for row in found.values())

    def _has(self, found: Mapping[str, Mapping[str, Any]], name: str, config: TTTConfig) -> bool:
        """Whether a row was measured, without an error and under the config that has its name now.

        A field that is younger than the row had the value that is the default.
        """
        if name not in found or "error" in found[name]:
            return False
        return TTTConfig().to_dict() | found[name]["config"] == config.to_dict()

    def _to_score(self) -> list[str]:
        """The rows that were chosen, and the presets that were measured."""
        presets = [name for name in PRESETS if self.rows.get(name, {}).get("adapted_bpb") is not None]
        return list(dict.fromkeys([*choices(self.rows).values(), *presets]))

    def _measured(self, half: Sample, config: TTTConfig) -> dict[str, Any]:
        """A row. One that fails says why, and the rows behind it are measured all the same."""
        gc.collect()  # graphs and pools of the row before
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        row: dict[str, Any] = {"config": config.to_dict(), "commit": self.machine["commit"]}
        began = time.perf_counter()
        try:
            return row | vars(half.run(config))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            return row | {"error": text, "wall_seconds": time.perf_counter() - began}

    def _write(self) -> None:
        quick = self.rows.get(QUICK, {}).get("base_bpb")
        for row in self.rows.values():
            if quick and row.get("adapted_bpb") is not None:
                row["gain"] = 1 - row["adapted_bpb"] / quick
        result = {
            **self.about,
            "environment": self.machine,
            "rows": self.rows,
            "chosen": choices(self.rows),
            "held_out_scores": self.scores,
        }
        write_text(self.record, json.dumps(result, indent=1) + "\n")


def described(name: str, row: Mapping[str, Any], quick: Mapping[str, Any] | None) -> str:
    """A row in a line; its gain is over the base of `quick`, where that is there."""
    if "error" in row:
        return f"{name}: {row['error']}"
    if row["adapted_bpb"] is None:
        return f"{name}: {row['base_bpb']:.5f}, and then it diverged; {row['seconds']:.1f} s"
    over = "" if quick is None else f"; {1 - row['adapted_bpb'] / quick['base_bpb']:+.2%} of quick's base"
    shares = (f"{kind} -" if row[kind] is None else f"{kind} {row[kind]:.0%}" for kind in ("long", "short"))
    return (
        f"{name}: {row['base_bpb']:.5f} -> {row['adapted_bpb']:.5f} ({row['own_gain']:+.2%}{over}); documents that "
        f"gain: {', '.join(shares)}; {row['seconds']:.1f} s ({row['wall_seconds']:.0f} s in all)"
    )


if __name__ == "__main__":
    typer.run(sweep)
