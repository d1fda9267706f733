"""What the engine's numbers are worth on a GPU: errors, bits, how busy the device is and how full the places are.

    python -m klora.bench.engine --record engine.json

    errors   |x - exact| / |exact| of the NLL of the chunks after 1, 8 and 48 Adam steps of one document. x is the
             engine's or eager PyTorch's in bf16, exact eager PyTorch's in fp32.
    bits     whether every target's NLL is the same to the bit: graphs against no graphs, one run against another, one
             document in batches of 1, 4, 16, 41 and 64
    busy     share of the time from the first kernel to the last in which one runs, for workloads of bench/ttt.py, and
             the share of places in use

The model is bench/ttt.py's: `seed` with random weights, none of them zero.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..kernels import BOS
from ..model.gpt import GPT
from ..model.storage import write_text
from ..ttt.documents import Document
from ..ttt.engine import Engine, engine_of
from ..ttt.protocols import MIN_NLL, TTTConfig
from ..ttt.queue import Deadline
from .eager import Adam, adapt_batch
from .environment import environment
from .step import seeded_model
from .ttt import LAW, corpus_lengths

SEED = {"blocks": 10}
STEPS = (1, 8, 48)
MATES = (0, 3, 15, 40, 63)


def drawn(lengths: Sequence[int], vocabulary: int = 1024) -> list[Document]:
    """A document of random tokens of each length, BOS among them."""
    draw = np.random.default_rng(1)
    parts = [draw.integers(3, vocabulary, length).astype(np.uint16) for length in lengths]
    for part in parts:
        part[0] = BOS
    return [Document(str(index), part, bytes=1) for index, part in enumerate(parts)]


def eager_nll(model: GPT, document: Document, config: TTTConfig) -> np.ndarray:
    """NLL of every target of one document, in eager PyTorch."""
    (nll,) = adapt_batch(model, Adam(model, config, 1), [document])
    return nll.double().cpu().numpy()


def engine_nll(engine: Engine, documents: list[Document]) -> list[np.ndarray]:
    return engine.token_nll(documents, engine.adapt(documents, Deadline(0)).kept_pass)


def errors(model: GPT, exact_model: GPT, config: TTTConfig) -> dict[str, dict[str, float]]:
    """Relative errors of the chunks after STEPS, of the engine and of eager PyTorch in bf16."""
    (document,) = drawn([config.chunk * (max(STEPS) + 1) + 101])
    exact = eager_nll(exact_model, document, config)
    found = {
        "engine": engine_nll(engine_of(model, config, [document]), [document])[0],
        "eager": eager_nll(model, document, config),
    }
    chunks = {str(steps): slice(steps * config.chunk, (steps + 1) * config.chunk) for steps in STEPS}
    norm = np.linalg.norm
    return {
        name: {steps: float(norm(nll[at] - exact[at]) / norm(exact[at])) for steps, at in chunks.items()}
        for name, nll in found.items()
    }


def bits(model: GPT, config: TTTConfig) -> dict[str, Any]:
    """Which runs give the same bits; where they do not, the largest relative difference of a document's sum."""

    def compared(some: list[np.ndarray], others: list[np.ndarray]) -> dict[str, Any]:
        pairs = list(zip(some, others, strict=True))
        apart = max(abs(float(a.sum(dtype=np.float64) / b.sum(dtype=np.float64)) - 1) for a, b in pairs)
        return {"equal": all(np.array_equal(a, b) for a, b in pairs), "largest_difference": apart}

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


def check(
    record: Annotated[Path, typer.Option(help="The record to write.")] = Path("engine.json"),
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Measure and write the record."""
    if not torch.cuda.is_available():
        raise SystemExit("the engine is measured on a CUDA GPU, and PyTorch sees none here")
    began, device = time.perf_counter(), torch.device("cuda")
    model = seeded_model(SEED, device, torch.bfloat16).requires_grad_(False)
    exact = seeded_model(SEED, device, torch.float32).requires_grad_(False)
    config = TTTConfig(deadline=0.0)
    long = drawn([int(n) for n in corpus_lengths({"every": 16}) if n >= LAW["shortest"]])
    result = {
        "name": "engine",
        "environment": environment(commit),
        "errors": errors(model, exact, config),
        "bits": bits(model, config),
        "busy": {
            "64 documents of 2,049 tokens, score_first": busy(model, drawn([2049] * 64), config),
            "391 documents less the short ones, 6 passes of min_nll (LEAKY)": busy(
                model, long, TTTConfig(protocol=MIN_NLL, deadline=0.0)
            ),
        },
        "seconds": time.perf_counter() - began,
    }
    write_text(record, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("errors", "bits", "busy")}, indent=1))


if __name__ == "__main__":
    typer.run(check)
