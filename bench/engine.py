"""What the engine's numbers are worth on a GPU: errors, bits, how busy the device is and how full the places are.

    python -m klora.bench.engine --record engine.json
    python -m klora.bench.engine --record engine.json --rows cached-64,contest

A row of PACES is one pass of score_first over 64 documents of 2,049 tokens, under a way to read them:

    tokens_per_second   of the faster of two runs, graphs and compiled kernels made before
    bits                whether the second run gives every target the first one's NLL, to the bit
    errors              |x - exact| / |exact| of the NLL of the chunks after 1, 8 and 48 Adam steps, over TRIALS
                        documents: the targets of one share the error of its adapter. x is the engine's or eager
                        PyTorch's in bf16, exact eager PyTorch's in fp32. With recomputed windows eager is
                        bench/eager.py; with cached context, the engine's schedule over the reference ops.

`bits`: the same bits with and without graphs, and one document's in batches of 1, 4, 16, 41 and 64. `busy`: share of
the time from the first kernel to the last in which one runs, for workloads of bench/ttt.py, and the share of places in
use. The model is bench/ttt.py's: `seed` with random weights, none of them zero.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..kernels import BOS_ID
from ..model.gpt import GPT
from ..model.storage import write_text
from ..ttt.documents import Document
from ..ttt.engine import Engine, engine_of
from ..ttt.protocols import CACHED, CONTEST, MIN_NLL, START, TTTConfig, ttt_preset
from ..ttt.queue import Deadline
from .eager import Adam, adapt_batch
from .environment import environment
from .rows import picked
from .step import model_config, seeded_model
from .ttt import LAW, corpus_lengths

SEED, TOY = {"blocks": 10}, {"blocks": 0}
STEPS, TOY_STEPS = (1, 8, 48), (1, 2)
MATES = (0, 3, 15, 40, 63)
LENGTHS, TOY_LENGTHS = (2049,) * 64, (2049,) * 2
TRIALS = 16
"""Documents whose errors are taken together."""

PACES = {
    "recomputed-256": TTTConfig(deadline=0.0),
    **{
        f"cached-{chunk}": TTTConfig(layout=START, context=CACHED, chunk=chunk, deadline=0.0)
        for chunk in (256, 128, 64, 32)
    },
    CONTEST: ttt_preset(CONTEST),
}
"""Ways to read the documents, by the names of their rows."""

BITS, BUSY = "bits", "busy"
"""The other rows."""


def drawn(lengths: Sequence[int], vocabulary: int = 1024) -> list[Document]:
    """A document of random tokens of each length, BOS among them."""
    draw = np.random.default_rng(1)
    parts = [draw.integers(3, vocabulary, length).astype(np.uint16) for length in lengths]
    for part in parts:
        part[0] = BOS_ID
    return [Document(str(index), part, bytes=1) for index, part in enumerate(parts)]


def plain_nll(model: GPT, documents: list[Document], config: TTTConfig) -> np.ndarray:
    """NLL [documents, targets] of documents of one length, without a kernel of ours."""
    if config.context != CACHED:
        nll = torch.stack(adapt_batch(model, Adam(model, config, len(documents)), documents))
        return nll.double().cpu().numpy()
    engine = engine_of(model, config, documents, backend="reference", capture=False)
    return np.stack(engine_nll(engine, documents)).astype(np.float64)


def engine_nll(engine: Engine, documents: list[Document]) -> list[np.ndarray]:
    return engine.token_nll(documents, engine.adapt(documents, Deadline(0)).kept_pass)


def errors(
    model: GPT, exact_model: GPT, config: TTTConfig, after: Sequence[int] | None = None, trials: int = TRIALS
) -> dict[str, dict[str, float]]:
    """Relative errors of the chunks `after` so many steps (STEPS), of the engine and of eager PyTorch in bf16."""
    after = after or STEPS
    documents = drawn([config.chunk * (max(after) + 1) + 101] * trials, model.config.vocab_size)
    config = config.override({"batch": trials})
    exact = plain_nll(exact_model, documents, config)
    found = {
        "engine": np.stack(engine_nll(engine_of(model, config, documents), documents)),
        "eager": plain_nll(model, documents, config),
    }
    chunks = {str(steps): np.s_[:, steps * config.chunk : (steps + 1) * config.chunk] for steps in after}
    norm = np.linalg.norm
    return {
        name: {steps: float(norm(nll[at] - exact[at]) / norm(exact[at])) for steps, at in chunks.items()}
        for name, nll in found.items()
    }


def compared(some: list[np.ndarray], others: list[np.ndarray]) -> dict[str, Any]:
    """Whether all documents' bits are the same, and the largest relative difference of a document's sum."""
    pairs = list(zip(some, others, strict=True))
    apart = max(abs(float(a.sum(dtype=np.float64) / b.sum(dtype=np.float64)) - 1) for a, b in pairs)
    return {"equal": all(np.array_equal(a, b) for a, b in pairs), "largest_difference": apart}


def pace(model: GPT, config: TTTConfig, documents: list[Document]) -> dict[str, Any]:
    """What two runs over `documents` take and whether their bits are the same."""
    engine, runs, seconds = engine_of(model, config, documents), [], []
    for _ in range(2):
        runs.append(engine_nll(engine, documents))
        seconds.append(engine.facts["seconds"])
    kept = "batch", "rounds", "useful_places", "prepare_seconds", "estimated_bytes"
    return {
        "config": config.to_dict(),
        "tokens": sum(document.targets for document in documents),
        "seconds": seconds,
        "tokens_per_second": sum(document.targets for document in documents) / min(seconds),
        "bits": compared(*runs),
        **{name: engine.facts[name] for name in kept},
    }


def bits(model: GPT, config: TTTConfig) -> dict[str, Any]:
    """Which runs give the same bits; where they do not, the largest relative difference of a document's sum."""
    documents = drawn([2049 + 97 * (index % 7) for index in range(64)])
    engine = engine_of(model, config, documents)
    first = engine_nll(engine, documents)
    alone = {
        str(mates): compared(engine_nll(engine_of(model, config, some := documents[: mates + 1]), some)[:1], first[:1])
        for mates in MATES
    }
    return {
        "another run": compared(engine_nll(engine, documents), first),
        "without graphs": compared(engine_nll(engine_of(model, config, documents, capture=False), documents), first),
        "batch mates": alone,
    }


def covered_by(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The sum of the ranges' lengths, and the length of what at least one of them covers."""
    total = covered = 0.0
    until = float("-inf")
    for start, end in sorted(ranges):
        total += end - start
        covered += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total, covered


def busy(model: GPT, documents: list[Document], config: TTTConfig) -> dict[str, float]:
    """Seconds of a run that is not watched, kernel seconds of one that is, and what the engine says of its places."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_reserved()
    engine = engine_of(model, config, documents)
    engine.prepare()
    engine.adapt(documents, Deadline(0))
    seconds = engine.facts["seconds"]
    with profile(activities=[ProfilerActivity.CUDA]) as watcher:
        engine.adapt(documents, Deadline(0))
        torch.cuda.synchronize()
    ranges = [(e.time_range.start, e.time_range.end) for e in watcher.events() if e.device_type == DeviceType.CUDA]
    kernels, covered = covered_by(ranges)
    return {
        "seconds": seconds,
        "watched_seconds": engine.facts["seconds"],
        "kernel_seconds": kernels / 1e6,
        "busy": covered / (max(end for _, end in ranges) - min(start for start, _ in ranges)),
        "useful_places": engine.facts["useful_places"],
        "rounds": engine.facts["rounds"],
        "prepare_seconds": engine.facts["prepare_seconds"],
        "estimated_bytes": engine.facts["estimated_bytes"],
        "taken_bytes": torch.cuda.max_memory_reserved() - others,
    }


def busy_workloads(model: GPT) -> dict[str, dict[str, float]]:
    """:func:`busy` of documents of one length, and of a corpus."""
    long = drawn([int(n) for n in corpus_lengths({"every": 16}) if n >= LAW["shortest"]])
    return {
        "64 documents of 2,049 tokens, score_first": busy(model, drawn(LENGTHS), TTTConfig(deadline=0.0)),
        "391 documents less the short ones, 6 passes of min_nll (LEAKY)": busy(
            model, long, TTTConfig(protocol=MIN_NLL, deadline=0.0)
        ),
    }


def check(
    record: Annotated[Path, typer.Option(help="The record to write, and to write again after each row.")] = Path(
        "engine.json"
    ),
    rows: Annotated[str, typer.Option(help=f"Rows, with commas: {', '.join((*PACES, BITS, BUSY))}; all.")] = "",
    toy: Annotated[bool, typer.Option("--toy", help="A small model and few documents; also on a CPU.")] = False,
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Measure and write the record."""
    if not (torch.cuda.is_available() or toy):
        raise SystemExit("the engine is measured on a CUDA GPU, and PyTorch sees none here; --toy only tries it")
    began, on_gpu = time.perf_counter(), torch.cuda.is_available()
    shape, device = TOY if toy else SEED, torch.device("cuda" if on_gpu else "cpu")
    model = seeded_model(shape, device, torch.bfloat16 if on_gpu else torch.float32).requires_grad_(False)
    exact = seeded_model(shape, device, torch.float32).requires_grad_(False)
    documents = drawn(TOY_LENGTHS if toy else LENGTHS, model_config(shape).vocab_size)
    after, trials = (TOY_STEPS, 2) if toy else (STEPS, TRIALS)

    def paced(config: TTTConfig) -> dict[str, Any]:
        return pace(model, config, documents) | {"errors": errors(model, exact, config, after, trials)}

    measures: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: partial(paced, config) for name, config in PACES.items()},
        **({} if toy else {BITS: lambda: bits(model, TTTConfig(deadline=0.0)), BUSY: lambda: busy_workloads(model)}),
    }
    found: dict[str, dict[str, Any]] = {}
    result = {"name": "engine", "environment": environment(commit), "toy": toy, "rows": found}
    for name, measure in picked(measures, rows).items():
        started = time.perf_counter()
        found[name] = measure()
        print(f"{name} ({time.perf_counter() - started:.1f} s): {_said(found[name])}", flush=True)
        result["seconds"] = time.perf_counter() - began
        write_text(record, json.dumps(result, indent=1) + "\n")
        if on_gpu:
            torch.cuda.empty_cache()


def _said(row: dict[str, Any]) -> str:
    """A row in a line; what is no pace, in full."""
    if "tokens_per_second" not in row:
        return json.dumps(row, indent=1)
    apart = {name: " / ".join(f"{error:.1e}" for error in of.values()) for name, of in row["errors"].items()}
    steps = ", ".join(row["errors"]["engine"])
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, bits {'equal' if row['bits']['equal'] else 'DIFFER'}, errors after "
        f"{steps} steps {apart['engine']} (eager {apart['eager']})"
    )


if __name__ == "__main__":
    typer.run(check)
