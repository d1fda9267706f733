"""Scoring on several GPUs as a user starts it: `klora score` alone and by torchrun, over the same documents.

`python -m klora.bench.rank_scoring ARTIFACT --jsonl val.jsonl.zst --record rank_scoring.json --ranks 1 --ranks 2`. Each
number of ranks is run `repeats` times, in turns, and the fastest counts: the first run of all compiles kernels, so
that one is not enough, and other work on the machine only adds. Of each there are three times:

    whole       from the start of the process to its end: imports, weights, tokens, captures, scores, the report
    scoring     from the first pass to the last result, captures of graphs left out
    adapting    the first rank's rounds, until it finds nothing left to adapt; documents handed over meanwhile left out

The record has tokens a second of each, their ratios to the first number of ranks, how evenly the ranks were busy, and
whether the scores are equal bit for bit. The exit status is 1 where they are not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..model.storage import write_text
from .environment import environment

TIMES = "whole", "scoring", "adapting"
PHASES = "base", "prequant", "learn", "adapt", "score"
"""Of a result's seconds, those of its scores; a run of several ranks has `score` alone."""

SCORES = "name", "status", "tokens", "base_nats", "tempered_nats", "prequant_nats", "adapted_nats"
"""What of a document is to be equal bit for bit."""


def command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """`klora score` of so many ranks of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "klora.cli", "score", *arguments]


def scored(ranks: int, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """What a run wrote into `folder`, and its `whole` seconds; SystemExit with the end of what it said if it failed."""
    started = time.perf_counter()
    run = command(ranks, [*arguments, "--out", str(folder), "--overwrite"])
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(run)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = json.loads((folder / "score.json").read_text(encoding="utf-8")) | {"whole": seconds}
    if not result["engine"]:
        raise SystemExit("the first rank adapted no document: give more of them, and longer ones")
    return result


def times_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by TIMES of one run."""
    engine = result["engine"]
    scoring = sum(result["seconds"].get(phase, 0.0) for phase in PHASES) - engine["prepare_seconds"]
    adapting = engine["seconds"] - engine["handing_over_seconds"]
    return {"whole": result["whole"], "scoring": scoring, "adapting": adapting}


def balance_of(result: Mapping[str, Any]) -> float | None:
    """How long the rank that was busy longest was, by the mean of all; None of one process."""
    seconds = result.get("rank_seconds")
    return max(seconds) * len(seconds) / sum(seconds) if seconds and None not in seconds else None


def differing(result: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of documents whose scores are not the same to the bit in both."""
    if len(result["documents"]) != len(other["documents"]):
        return [f"{len(result['documents'])} documents against {len(other['documents'])}"]
    pairs = zip(result["documents"], other["documents"], strict=True)
    return [one["name"] for one, two in pairs if any(one.get(name) != two.get(name) for name in SCORES)]


def summary(runs: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The record's rows by number of ranks, from the results of their runs; the first number is what others are to."""
    reference, rows = next(iter(runs.values()))[0], {}
    for ranks, results in runs.items():
        each = [times_of(result) for result in results]
        best = {name: min(times[name] for times in each) for name in TIMES}
        tokens = sum(document["tokens"] for document in results[0]["documents"])
        adapted = sum(document["adapted_tokens"] for document in results[0]["documents"])
        base = rows[next(iter(rows))] if rows else {"seconds": best}
        even = [balance for result in results if (balance := balance_of(result)) is not None]
        rows[ranks] = {
            "seconds": best,
            "runs": each,
            "tokens_per_second": {name: (adapted if name == "adapting" else tokens) / best[name] for name in TIMES},
            "times_as_fast": {name: base["seconds"][name] / best[name] for name in TIMES},
            "busiest_by_mean": min(even, default=None),
            "rank_seconds": [result.get("rank_seconds") for result in results],
            "phases": [result["seconds"] for result in results],
            "engine": results[-1]["engine"],
            "differing": sorted({name for result in results for name in differing(result, reference)}),
            "adapted_bpb": results[0]["totals"]["adapted_bpb"],
        }
    return rows


def said(rows: Mapping[int, Mapping[str, Any]]) -> str:
    """The rows as a short table."""
    lines = [f"{'ranks':>5} " + " ".join(f"{f'{name}, s':>12} {'times':>6}" for name in TIMES) + "  busiest  scores"]
    for ranks, row in rows.items():
        times = " ".join(f"{row['seconds'][name]:>12.2f} {row['times_as_fast'][name]:>6.3f}" for name in TIMES)
        even = f"{row['busiest_by_mean']:.3f}" if row["busiest_by_mean"] else "-"
        equal = f"{len(row['differing'])} differ" if row["differing"] else "equal"
        lines.append(f"{ranks:>5} {times}  {even:>7}  {equal}")
    return "\n".join(lines)


def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact that `klora export` wrote.")],
    jsonl: Annotated[list[Path] | None, typer.Option(help="Documents, JSON lines. Repeatable.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Or a folder of token shards and their tokenizer.")] = None,
    record: Annotated[Path, typer.Option(help="The record to write, and to write again after each run.")] = Path(
        "rank_scoring.json"
    ),
    ranks: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of ranks. Repeatable; 1 and 2.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Runs of each, of which the fastest counts.")] = 2,
    preset: Annotated[str, typer.Option(help="Preset of `klora score`.")] = "quick",
    set_: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE, as in `klora score`.")] = None,
    most_tokens: Annotated[int, typer.Option(min=0, help="A sample of so many tokens; 0: all.")] = 0,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Score with each number of ranks, compare, and write the record."""
    if not jsonl and not shards:
        raise typer.BadParameter("give the documents by --jsonl or --shards")
    source = ["--shards", str(shards)] if shards else [part for path in jsonl for part in ("--jsonl", str(path))]
    settings = [part for pair in set_ or () for part in ("--set", pair)]
    more = ["--preset", preset, "--most-tokens", str(most_tokens), "--device", device]
    arguments = [str(artifact), *source, *settings, *more]
    runs: dict[int, list[dict[str, Any]]] = {}
    named = [Path(argument).name if "/" in argument else argument for argument in arguments]
    about = {"name": "rank_scoring", "environment": environment(commit), "arguments": named, "repeats": repeats}
    rows: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for count in dict.fromkeys(ranks or (1, 2)):
                result = scored(count, arguments, Path(folder) / str(count))
                runs.setdefault(count, []).append(result)
                rows = summary(runs)
                facts = {name: result[name] for name in ("artifact", "source", "config", "device", "versions")}
                write_text(record, json.dumps(about | facts | {"rows": rows}, indent=1) + "\n")
                print(f"{count} ranks: {result['whole']:.1f} s", flush=True)
    print(said(rows))
    if any(row["differing"] for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
