"""The main job on a GPU, by its own commands: train, export, score; one record with BPBs, bytes and seconds.

    python -m klora.bench.pipeline --train train.jsonl.zst --val val.jsonl.zst --record pipeline.json

Every phase runs as `klora ... --json` in a process of its own, so that its seconds include what a user waits for.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..model.storage import write_text
from .environment import environment


def pipeline(
    train: Annotated[Path, typer.Option(help="Training documents, JSON lines.")],
    val: Annotated[Path, typer.Option(help="Validation documents, JSON lines; they are scored too.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/pipeline"),
    record: Annotated[Path, typer.Option(help="The record to write.")] = Path("pipeline.json"),
    preset: Annotated[str, typer.Option(help="Preset to train.")] = "seed",
    seconds: Annotated[float, typer.Option(help="Seconds of training.")] = 120.0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE for `klora train`.")] = None,
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Run the whole chain and write the record."""
    overrides = [part for pair in set_ or () for part in ("--set", pair)]
    artifact, scores = out / "model.klora", out / "score"
    trained = _klora(
        *("train", "--preset", preset, "--seconds", str(seconds), "--out", str(out)),
        *("--jsonl", str(train), "--val-jsonl", str(val), "--cache", str(out / "cache"), *overrides),
    )
    exported = _klora("export", str(out), "--out", str(artifact))
    scored = _klora(
        *("score", str(artifact), "--jsonl", str(val), "--out", str(scores), "--prequant", str(out)),
    )
    totals = scored["result"]["totals"]
    result: dict[str, Any] = {
        "name": "pipeline",
        "preset": preset,
        "environment": environment(commit),
        "train": trained,
        "export": {**exported, "result": {k: v for k, v in exported["result"].items() if k not in ("clips", "errors")}},
        "score": scored,
        "bpb": {
            "before_quantisation": totals["prequant_bpb"],
            "after_quantisation": totals["base_bpb"],
            "quantisation_gap": totals["base_bpb"] - totals["prequant_bpb"],
            "adapted_score_first": totals["adapted_bpb"],
            "base_at_temperature": totals["base_bpb_at_temperature"],
        },
        "artifact_bytes": exported["result"]["bytes"],
    }
    write_text(record, json.dumps(result, indent=1) + "\n")
    for name, value in result["bpb"].items():
        print(f"{name:24} {value:.4f}")
    print(f"{'artifact bytes':24} {result['artifact_bytes']:,}")
    for phase in ("train", "export", "score"):
        print(f"{phase + ' seconds':24} {result[phase]['wall_seconds']:.1f}")


def _klora(*arguments: str) -> dict[str, Any]:
    """Run one command; its arguments, JSON result and wall-clock seconds. A failure ends the run with its message."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "klora.cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"klora {' '.join(arguments)} ended with status {done.returncode}: {done.stdout}")
    return {
        "command": " ".join(["klora", *(Path(a).name if "/" in a else a for a in arguments)]),
        "wall_seconds": time.perf_counter() - started,
        "result": json.loads(done.stdout),
    }


if __name__ == "__main__":
    typer.run(pipeline)
