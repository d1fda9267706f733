"""One training step of 64 adapters on a model of transformers: klora.lora beside PEFT and torch.compile.

    python -m klora.bench.adapters --model FOLDER --record adapters.json
    python -m klora.bench.adapters --model FOLDER --record adapters.json --rows klora,klora-int6

A step is forward, cross entropy, backward and Adam: of 64 rows of 1,024 random tokens, each a document with an adapter
of its own, on all seven linears of a block. The base is bf16 and frozen, the adapters are fp32.

    klora                      klora.lora, the whole step one CUDA graph
    klora-uncaptured           the same without a graph
    klora-linear-nll           as klora, the loss by klora.kernels.linear_nll, which keeps no logits
    klora-mixed-ranks          as klora, with ranks from 4 to 64
    klora-int6                 as klora, the base at six bits
    klora-compiled             as klora, the layers, the last norm and the loss by torch.compile
    klora-compiled-attention   the same with klora.lora.set_attention
    klora-compiled-fused       the same, the loss by klora.kernels.linear_nll
    peft-one-by-one            PEFT with all adapters loaded: set_adapter and a step for each, one after the other
    peft-mixed-batch           PEFT with `adapter_names` in the forward
    compiled-bmm               torch.compile of adapters stacked as [64, R, K], applied by torch.bmm, also as one graph

All rows have the same adapters, tokens and loss and, but for the two with set_attention, attention by PyTorch's causal
kernels, without masks. Nothing is dropped out. First the gate: for a cut of the model, in fp32, the gradients of every
adapter, B not zero, against those of the stacked adapters in float64 (bench/tolerance.py), of several batches of
tokens. Rows are timed one after another, each on a model of its own that is freed after it. A step that runs out of
memory is tried again in 2, 4, ... `parts`, one after the other. Before all of it our kernels are compiled side by side:
one after another they take minutes. torch.compile is no part of that; `first_step_seconds` of a row has it.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ..errors import KloraError
from ..model.config import ConfigError
from ..model.storage import write_text
from ..ttt.hf import load_hf
from .adapter_trainers import (
    LINEARS,
    CompiledBmm,
    Klora,
    KloraCompiled,
    PeftMixedBatch,
    PeftOneByOne,
    Stacked,
    Trainer,
    Work,
    linears_of,
)
from .ahead import compiled_ahead
from .environment import environment
from .gate import FOREIGN, RedGate, why_broken
from .rows import picked
from .timing import captured, time_interleaved
from .tolerance import MARGIN, allowed_error, relative_error

LEAST, MOST = 4, 64
"""Of mixed ranks."""

GATE = {"layers": 2, "batch": 3, "tokens": 64}
DRAWS = {torch.float32: 4, torch.bfloat16: 32, torch.float16: 32}
"""Batches of random tokens whose gradients the gate takes as one sample. The numbers of one gradient are no independent
roundings: an adapter's A has thousands, and what is wrong with them comes from some tokens times ranks. So of one batch
in bf16 the error of right arithmetic is 0.97 of PyTorch's, give or take 0.15, as if 50 numbers were compared: one batch
in four was red for nothing. Of 32 it is 0.96, give or take 0.03, and of scales or weights that lose one bit 1.12, give
or take 0.04. Over 20 models the worst adapter has 0.86 to 0.97 of what is allowed, with scales that lose a bit 1.03 to
1.19 (six bits and dense, 64 wide, 12 tokens, by a CPU's bf16). In fp32 the floor is wider, and four do."""

FASTER = {"peft-one-by-one": 4.0, "peft-one-by-one, set_adapter left out": 4.0, "peft-mixed-batch": 3.0}
FASTER |= {"compiled-bmm": 1.5}
"""How many times faster than these the fastest row of ours with their ranks and base shall be."""
INT6_BYTES, INT6_TIME = 0.40, 1.15
"""The most that a base at six bits shall take of the bytes and of the time of one in bf16."""

ONE_AT_A_TIME = "each row alone, on a fresh model, one row after another"


@dataclass(frozen=True)
class Row:
    """What is timed. `captures`: as one CUDA graph. `is_mixed`: with unlike ranks. `package` is what it wants. `ahead`
    builds what launches the same kernels of ours without torch.compile; left out, `build` does.
    """

    build: Callable[[Work], Trainer]
    captures: bool = False
    is_ours: bool = False
    is_mixed: bool = False
    package: str = ""
    ahead: Callable[[Work], Trainer] | None = None

    @property
    def is_like_the_peers(self) -> bool:
        """Ours, with the ranks and the base that peers have."""
        return self.is_ours and not self.is_mixed and self.build is not INT6

    @property
    def why_missing(self) -> str:
        """Empty where its package is installed, or where it wants none."""
        is_there = not self.package or find_spec(self.package) is not None
        return "" if is_there else f"package {self.package} is not installed"


INT6, FUSED = partial(Klora, base="int6"), partial(Klora, is_fused=True)
COMPILED, COMPILED_ATTENTION = partial(KloraCompiled), partial(KloraCompiled, attends=True)
COMPILED_FUSED = partial(COMPILED_ATTENTION, is_fused=True)
ROWS = {
    "klora": Row(Klora, captures=True, is_ours=True),
    "klora-uncaptured": Row(Klora, is_ours=True),
    "klora-linear-nll": Row(FUSED, captures=True, is_ours=True),
    "klora-mixed-ranks": Row(Klora, captures=True, is_ours=True, is_mixed=True),
    "klora-int6": Row(INT6, captures=True, is_ours=True),
    "klora-compiled": Row(COMPILED, captures=True, is_ours=True, ahead=partial(COMPILED, compiles=False)),
    "klora-compiled-attention": Row(
        COMPILED_ATTENTION, captures=True, is_ours=True, ahead=partial(COMPILED_ATTENTION, compiles=False)
    ),
    "klora-compiled-fused": Row(
        COMPILED_FUSED, captures=True, is_ours=True, ahead=partial(COMPILED_FUSED, compiles=False)
    ),
    "peft-one-by-one": Row(PeftOneByOne, package="peft"),
    "peft-mixed-batch": Row(PeftMixedBatch, package="peft"),
    "compiled-bmm": Row(CompiledBmm, captures=True),
}


def gate(work: Work, row: Row, name: str) -> dict[str, Any]:
    """Of a cut of `work`: the worst error of an adapter's gradient for A or B, in fp32 and, of ours, in its dtype; the
    worst is the nearest to what is allowed.

    RedGate: one in fp32 is larger than the rule allows.
    """
    torch.compiler.reset()  # a function is compiled eight times at most, and then runs as it is
    cut, found = work.cut(**GATE), {}
    for dtype in _gated(work, row):
        trainer = row.build(replace(cut, dtype=dtype))
        of_base = replace(cut, module=trainer.dense(), dtype=dtype)
        truth = Stacked(replace(of_base, dtype=torch.float64), has_masks=True)
        ours, plain, exact = (_sample(one, DRAWS[dtype]) for one in (trainer, Stacked(of_base), truth))
        worst: dict[str, Any] = {}
        for part, sizes in exact.items():
            eager, error = (relative_error(gradients[part], sizes) for gradients in (plain, ours))
            allowed = allowed_error(eager, dtype, sizes.numel(), MARGIN if row.is_ours else FOREIGN)
            if dtype == torch.float32 and not error <= allowed:
                says = f"{name}: the gradient of {part} is {error:.2e} from float64; allowed: {allowed:.2e}"
                raise RedGate(f"{says}. No speed is reported.")
            if not worst or error * worst["allowed"] > worst["error"] * allowed:
                worst = {"error": error, "eager": eager, "allowed": allowed, "of": part}
        found[str(dtype).removeprefix("torch.")] = worst
    return found


def _gated(work: Work, row: Row) -> list[torch.dtype]:
    """The dtypes of a row's gate."""
    return list(dict.fromkeys((torch.float32, work.dtype if row.is_ours else torch.float32)))


def _sample(trainer: Trainer, draws: int) -> dict[str, Tensor]:
    """The gradients of so many batches of random tokens, one after the other; the same tokens for every trainer."""
    tokens, vocabulary = trainer.work.tokens, trainer.work.module.get_input_embeddings().num_embeddings
    draw, each = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        trainer.work = replace(trainer.work, tokens=torch.randint(vocabulary, tokens.shape, generator=draw).to(tokens))
        each.append(_gradients(trainer))
        trainer.forget()
    return {part: torch.cat([one[part] for one in each]) for part in each[0]}


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Flat, of A and of B of each adapter."""
    for rows in trainer.parts:
        trainer.backward(rows)
    found, ranks = trainer.gradients(), trainer.work.ranks
    flat = {}
    for number, rank in enumerate(ranks):
        flat[f"A of adapter {number}"] = torch.cat([a[number, :rank].flatten() for a, _ in found.values()])
        flat[f"B of adapter {number}"] = torch.cat([b[number, :, :rank].flatten() for _, b in found.values()])
    return flat


def timed(work: Work, row: Row, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, most bytes that were allocated, and how it was run. `first_step_seconds` are from the
    building to the end of the first step: adapters made and kernels compiled, but for ours that are compiled ahead.
    `graphs` are torch.compile's, `graph_breaks` where it left one for Python.
    """
    device = work.tokens.device
    _free(device)
    counters.clear()
    began = time.perf_counter()
    trainer = row.build(work)
    loss, parts = _first_step(trainer, device)
    found: dict[str, Any] = {
        "loss": loss / work.batch,
        "parts": parts,
        "captured": False,
        "first_step_seconds": time.perf_counter() - began,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    step: Callable[[], object] = trainer.step
    if row.captures and device.type == "cuda":
        try:
            step = captured(trainer.step, device)
            found["captured"] = True
        except RuntimeError as error:
            found["why_not_captured"] = why_broken(error)
            trainer.forget()
    thunks, factor = {"ms": [step]}, 1.0
    if isinstance(trainer, PeftOneByOne):
        thunks["ms_set_adapter_left_out"] = [trainer.steps_of_the_last]
        factor = work.batch / trainer.sample
        found |= {"loss": loss / trainer.sample, "measured_adapters": trainer.sample}
        found["ms_are"] = f"scaled to {work.batch} adapters by their number"
    times = time_interleaved(thunks, device, least_rounds=3, most_rounds=rounds, warmup=1, most_seconds=10.0)
    for name, of in times.items():
        found[name] = {"p20": factor * of.p20, "p50": factor * of.p50, "p80": factor * of.p80, "rounds": of.rounds}
    found["peak_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if isinstance(trainer, PeftMixedBatch):
        found["mode"] = f"eval; in training mode {trainer.refusal}" if trainer.refusal else "training"
    if row.build is INT6:
        found["base_bytes"] = trainer.base_bytes()
    return found


def _first_step(trainer: Trainer, device: torch.device) -> tuple[float, int]:
    """The loss of the first step, and in how many parts it fits."""
    parts = 1
    while True:
        try:
            return float(trainer.step()), parts
        except torch.OutOfMemoryError:
            if parts >= trainer.work.batch or isinstance(trainer, PeftOneByOne):
                raise
        trainer.forget()
        _free(device)
        parts *= 2
        trainer.split(parts)


def launches(works: Mapping[bool, Work], rows: Mapping[str, Row]) -> None:
    """Launch what the gates and then the steps of our rows launch, for :func:`compiled_ahead`."""
    kinds = {(row.build, row.is_mixed): row for row in rows.values() if row.is_ours}
    for row in kinds.values():
        work, build = works[row.is_mixed], row.ahead or row.build
        for dtype in _gated(work, row):
            trainer = build(replace(work.cut(**GATE), dtype=dtype))
            trainer.dense()
            _gradients(trainer)
    for row in kinds.values():
        work, build = works[row.is_mixed], row.ahead or row.build
        _free(work.tokens.device)
        _first_step(build(work), work.tokens.device)


def _free(device: torch.device) -> None:
    """Nothing of an earlier row is left, and peaks of memory count from here."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def verdicts(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What klora shall reach beside each row that was timed, and what it does: `by` which row of ours."""
    times = {name: row["ms"]["p50"] for name, row in rows.items()}
    for name, row in rows.items():
        if "ms_set_adapter_left_out" in row:
            times[f"{name}, set_adapter left out"] = row["ms_set_adapter_left_out"]["p50"]
    found = []
    ours = [name for name, row in ROWS.items() if row.is_like_the_peers and name in times]
    if ours:
        fastest = min(ours, key=times.get)
        for name, wanted in FASTER.items():
            if name in times:
                faster = times[name] / times[fastest]
                about = {"what": f"times faster than {name}", "by": fastest}
                found.append(about | {"found": faster, "at_least": wanted, "is_reached": faster >= wanted})
    if "klora-int6" in rows:
        ratio = rows["klora-int6"]["base_bytes"]["ratio"]
        what = "bytes of the base at six bits, of those in the model's dtype"
        found.append({"what": what, "found": ratio, "at_most": INT6_BYTES, "is_reached": ratio <= INT6_BYTES})
        if "klora" in times:
            ratio = times["klora-int6"] / times["klora"]
            what = "time with a base at six bits, of that in the model's dtype"
            found.append({"what": what, "found": ratio, "at_most": INT6_TIME, "is_reached": ratio <= INT6_TIME})
    return found


def mixed_ranks(batch: int) -> tuple[int, ...]:
    """From LEAST to MOST in even steps."""
    return tuple(LEAST + (MOST - LEAST) * number // max(batch - 1, 1) for number in range(batch))


def measured(
    works: Mapping[bool, Work], rows: Mapping[str, Row], rounds: int
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(row, what it gave, why it gave nothing): first every gate, then every time. `works` are those of like and of
    mixed ranks. What is ours raises; a peer that raises is named.
    """
    errors: dict[tuple, dict[str, Any]] = {}
    missing = {name: row.why_missing for name, row in rows.items() if row.why_missing}
    for name, row in rows.items():
        kind = row.build, row.is_mixed
        if name not in missing and kind not in errors:
            with _peer(name, row, missing):
                errors[kind] = gate(works[row.is_mixed], row, name)
    for name, row in rows.items():
        found: dict[str, Any] = {}
        if name not in missing:
            with _peer(name, row, missing):
                found = {"errors": errors[row.build, row.is_mixed], **timed(works[row.is_mixed], row, rounds)}
        yield name, found, missing.get(name, "")
    _free(works[False].tokens.device)


@contextmanager
def _peer(name: str, row: Row, missing: dict[str, str]) -> Iterator[None]:
    """Inside, what somebody else's package raises is noted in `missing`; what is ours, and a red gate, raise."""
    try:
        yield
    except Exception as error:
        if row.is_ours or isinstance(error, RedGate):
            raise
        missing[name] = why_broken(error)


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder, on the CPU. ConfigError: it has no blocks with the seven linears."""
    module, _ = load_hf(folder, torch.device("cpu"), str(dtype).removeprefix("torch."))
    layers = getattr(module.base_model, "layers", None)
    missing = {*LINEARS} - {name.rpartition(".")[2] for name in linears_of(module)}
    if not isinstance(layers, nn.ModuleList) or missing:
        raise ConfigError(
            f"{folder} holds a {type(module).__name__}; wanted: a model of Llama's kind, whose `layers` have the "
            f"linears {', '.join(LINEARS)}"
        )
    return module


def facts_of(module: nn.Module) -> dict[str, Any]:
    """What a record says of the model."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    parameters = sum(parameter.numel() for parameter in module.parameters())
    about = {name: getattr(module.config, name) for name in sizes}
    return {"kind": type(module).__name__, "parameters": parameters, **about}


def works_of(module: nn.Module, device: torch.device, batch: int, tokens: int, rank: int) -> dict[bool, Work]:
    """The same rows with adapters of one rank (False) and of mixed ranks (True)."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = module.get_input_embeddings().num_embeddings
    drawn = torch.randint(vocabulary, (batch, tokens + 1), generator=draw).to(device)
    like = Work(module, drawn, (rank,) * batch, module.dtype)
    return {False: like, True: replace(like, ranks=mixed_ranks(batch))}


def said(name: str, row: Mapping[str, Any], why: str) -> str:
    """A line about a row."""
    if why:
        return f"{name}: {why}"
    more = ["one graph"] * row["captured"] + [f"{row['parts']} parts"] * (row["parts"] > 1)
    if "ms_set_adapter_left_out" in row:
        more.append(f"without set_adapter {row['ms_set_adapter_left_out']['p50']:.1f} ms")
        more.append(f"scaled from {row['measured_adapters']}")
    if row["peak_bytes"] is not None:
        more.append(f"peak {row['peak_bytes'] / 2**30:.1f} GiB")
    return f"{name}: {row['ms']['p50']:.1f} ms a step{''.join(f', {part}' for part in more)}"


def main(
    model: Annotated[Path, typer.Option(help="Folder of a model of Llama's kind, as save_pretrained writes it.")],
    record: Annotated[Path, typer.Option(help="The record to write, and to write again after each row.")] = Path(
        "adapters.json"
    ),
    names: Annotated[str, typer.Option("--rows", help="Rows, with commas; all.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Adapters, each with one row of the batch.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 1024,
    rank: Annotated[int, typer.Option(min=1, help="Rank of every adapter but the mixed ones.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Most steps of which the median counts.")] = 5,
    toy: Annotated[bool, typer.Option("--toy", help="Also on a CPU, in fp32: it only tries the measurement.")] = False,
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Measure and write the record."""
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or toy):
        raise SystemExit("a training step is measured on a CUDA GPU, and PyTorch sees none here; --toy only tries it")
    rows = picked(ROWS, names)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    try:
        works = works_of(load(model, dtype), device, batch, tokens, rank)
        result = {
            "name": "adapters",
            "environment": environment(commit, "transformers", "peft"),
            "toy": not on_gpu,
            "model": facts_of(works[False].module),
            "sizes": {"batch": batch, "tokens": tokens, "rank": rank, "mixed_ranks": [LEAST, MOST]},
            "linears": LINEARS,
            "dtype": str(dtype).removeprefix("torch."),
            "gate": GATE,
            "timed": ONE_AT_A_TIME,
            "compiled_ahead": compiled_ahead(partial(launches, works, rows), device),
            "rows": found,
            "missing": missing,
        }
        for name, row, why in measured(works, rows, rounds):
            (missing if why else found)[name] = why or row
            print(said(name, row, why), flush=True)
            result["verdicts"] = verdicts(found) if on_gpu else []
            write_text(record, json.dumps(result, indent=1) + "\n")
    except KloraError as error:
        raise SystemExit(str(error)) from None
    for verdict in result["verdicts"]:
        wanted = f"at least {verdict['at_least']}" if "at_least" in verdict else f"at most {verdict['at_most']}"
        by, missed = f" by {verdict['by']}" if "by" in verdict else "", " - missed" * (not verdict["is_reached"])
        print(f"{verdict['found']:.2f} {verdict['what']}{by}; wanted: {wanted}{missed}")


if __name__ == "__main__":
    typer.run(main)
