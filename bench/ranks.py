"""The training step on the ranks of one machine: that they compute what one does, and what it costs.

`torchrun --nproc-per-node N -m klora.bench.ranks --record ranks.json`. First correctness, for every way in which a step
may be taken: the losses of a few steps are those of one rank over the same tokens, and after many steps all replicas
are equal bit for bit. Then the time of a step, beside that of one rank while the others are idle, and of each rank
while all work and none waits: what is above the slowest of these is exchange. Times of all-reduce and all-gather alone;
AdamW of everything but the matrices, on every rank or shared out. Last, a projection to more GPUs.

A way that raises is recorded with its reason, and the rest goes on. Where something hangs, the record says what, and
the process ends. The record is written after every row.
"""

import copy
import faulthandler
import gc
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from ..errors import KloraError
from ..model.attention import choose_attention
from ..model.config import TrainConfig
from ..model.fused import FusedStep
from ..model.gpt import is_block_matrix
from ..model.graphs import captured
from ..model.muon_sharded import all_gather
from ..model.parallel import Ranks, join_ranks
from ..model.storage import write_text
from .environment import environment
from .step import LENGTH, ROWS, seeded_model

STUCK = 240.0
"""Seconds after which a part is given up. The first one compiles the kernels."""
LIMITS = {ROWS: 1.04, ROWS // 2: 0.54}
"""What a step of two ranks with so many rows each may take, in steps of one rank with ROWS."""
MODEL = """\
step(N) = alone + exposed(2) * t(N) / t(2), with t(N) = 2 (N - 1) latency + 2 (N - 1) / N * bytes / bandwidth: a ring's
all-reduce of what no backward hides. That is the first range of blocks and all that is no matrix, or everything where
the collectives stand between graphs or all blocks are one range. exposed(2) is the measured step of two ranks less that
of one; latency and bandwidth are fitted to the measured all-reduces of two. It assumes the same link between all GPUs,
no straggler, and that each rank still orthogonalises as many matrices."""


class Way(NamedTuple):
    """A way in which ranks may take a step: settings of TrainConfig, as `klora train --set` takes them."""

    graph_collectives: str = TrainConfig.graph_collectives
    reduce_dtype: str = TrainConfig.reduce_dtype
    gradient_buckets: int = TrainConfig.gradient_buckets
    muon_gathers: int = TrainConfig.muon_gathers

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


WAYS = (
    Way("between"),
    Way("between", muon_gathers=1),
    Way(),
    Way(gradient_buckets=4),
    Way(reduce_dtype="bfloat16"),
    Way(reduce_dtype="bfloat16", gradient_buckets=4),
    Way(muon_gathers=1),
    Way(muon_gathers=2),
    Way(gradient_buckets=4, muon_gathers=2),
)
"""Those that need least of NCCL first. With one bucket nothing hides behind the backward, and nothing is in its way: a
collective takes multiprocessors, and a kernel whose blocks are as many as those has two waves then."""


class Sizes(NamedTuple):
    """Of what is measured."""

    blocks: int
    rows: tuple[int, ...]
    length: int
    few: int
    """rows a rank where only the results count"""
    timed: int
    equal_after: int
    megabytes: tuple[int, ...]
    """of what travels alone"""


class Run:
    """What all measurements share: the ranks, a model to copy, the record, and the watch over what is going on."""

    def __init__(self, ranks: Ranks, sizes: Sizes, path: Path, commit: str, dtype: torch.dtype, seconds: float):
        self.ranks, self.sizes, self.path = ranks, sizes, path
        self.ends = time.monotonic() + seconds
        self.record: dict[str, Any] = {"name": "ranks", "preset": "seed-11l", "world": ranks.world}
        self.record |= {"environment": environment(commit), "nccl": _nccl(), "problems": []}
        self.model = seeded_model({"blocks": sizes.blocks}, ranks.device, dtype)
        self._part, self._since = "", math.inf
        faulthandler.enable()
        threading.Thread(target=self._watch, daemon=True).start()

    def write(self) -> None:
        if self.ranks.is_first:
            write_text(self.path, json.dumps(self.record, indent=1) + "\n")

    def part(self, name: str, measure: Callable[[], None]) -> None:
        """Something that all ranks do together. What one of them raises is recorded, and the rest goes on."""
        why = ""
        if self.ranks.most(time.monotonic() - self.ends)[0] > 0:
            why = "no time was left"
        else:
            self._part, self._since = name, time.monotonic()
            try:
                measure()
            except Exception as error:
                why = f"rank {self.ranks.rank}: {type(error).__name__}: {error}"[:500]
                print(f"{name}: {why}", file=sys.stderr, flush=True)
        (failed,) = self.ranks.most(float(bool(why)))
        self._since = math.inf
        if failed:
            self.record["problems"].append({"part": name, "why": why or "another rank failed"})
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        self.write()

    def _watch(self) -> None:
        while True:
            time.sleep(1.0)
            if time.monotonic() - self._since > STUCK:
                self.record["problems"].append({"part": self._part, "why": f"no end after {STUCK:.0f} s"})
                self.write()
                print(f"rank {self.ranks.rank} is stuck in {self._part}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(4)

    def step(self, rows: int, way: Way | None) -> FusedStep:
        """A step of `rows` rows a rank; without a way, of a rank alone."""
        ranks = self.ranks if way else Ranks(0, 1, self.ranks.device)
        way = way or Way()
        config = TrainConfig(
            batch_tokens=rows * self.sizes.length * ranks.world,
            micro_batch_tokens=rows * self.sizes.length,
            **way._asdict(),
        )
        return FusedStep(copy.deepcopy(self.model), config, rows, 1, ranks, self.sizes.length, say=self.say)

    def say(self, text: str) -> None:
        self.record["problems"].append({"part": self._part, "why": text[:500]})
        print(f"rank {self.ranks.rank}: {self._part}: {text}", file=sys.stderr, flush=True)

    def tokens(self, step: int, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randint(3, self.model.config.vocab_size, (rows, self.sizes.length + 1), generator=generator)


def check_results(run: Run, way: Way) -> None:
    """Losses and gradient norms of three steps beside those of one rank over the same tokens."""
    few, ranks = run.sizes.few, run.ranks
    alone, together = run.step(few * ranks.world, None), run.step(few, way)
    reports: list[list[tuple[float, float]]] = []
    for step in (alone, together):
        found = []
        for index in range(3):
            rows = run.tokens(index, few * ranks.world)
            own = rows if step is alone else rows.chunk(ranks.world)[ranks.rank]
            late = step.run([own], index, 1.0)
            found += [late] if late else []
        reports.append(found + step.flush())
    losses, norms = ([abs(a[k] / b[k] - 1) for a, b in zip(*reports, strict=True)] for k in range(2))
    # The first ones are of the same weights; later ones differ by what two orders of a sum make of bf16.
    is_right = losses[0] < 1e-4 and norms[0] < 1e-2 and all(loss < 1e-2 for loss in losses)
    row = {"way": way._asdict(), "collectives": together.collectives, "losses_apart": losses, "norms_apart": norms}
    run.record.setdefault("results", []).append(row | {"right": is_right})
    if not is_right:
        raise ArithmeticError(f"losses {losses} and norms {norms} apart from those of one rank")


def check_replicas(run: Run, way: Way) -> None:
    """Whether weights, momenta and AdamW's state are the same bits on all ranks after many steps."""
    step, ranks = run.step(run.sizes.few, way), run.ranks
    started = time.perf_counter()
    for index in range(run.sizes.equal_after):
        step.run([run.tokens(index * ranks.world + ranks.rank, run.sizes.few)], index, 1.0)
    reports = step.flush()
    apart = 0
    for tensor in [step.stored.values, *step.optimizers.state_tensors().values()]:
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        apart += int((first != tensor).sum())
    (apart,) = ranks.most(float(apart))
    row = {"way": way._asdict(), "collectives": step.collectives, "steps": run.sizes.equal_after}
    row |= {"entries_apart": int(apart), "last_loss": reports[-1][0], "skipped": step.optimizers.muon.skipped_steps}
    run.record.setdefault("replicas", []).append(row | {"seconds": time.perf_counter() - started})
    if apart or row["skipped"] or not math.isfinite(row["last_loss"]):
        raise ArithmeticError(f"{apart} entries apart after {row['steps']} steps: {row}")


def time_alone(run: Run, rows: int) -> None:
    """A step of the first rank alone; the others wait at the end of this part."""
    if run.ranks.is_first:
        times = _times(run, run.step(rows, None), rows)
        run.record.setdefault("alone", []).append({"tokens": rows * run.sizes.length, "ms": times})


def time_apart(run: Run, rows: int) -> None:
    """A step of every rank at the same time, none of which waits for another: how unlike the GPUs are."""
    step = run.step(rows, None)
    dist.barrier()
    medians: list[float] = [0.0] * run.ranks.world
    dist.all_gather_object(medians, _times(run, step, rows)["p50"])
    run.record.setdefault("apart", []).append({"tokens": rows * run.sizes.length, "ms_of_each": medians})


def time_together(run: Run, way: Way, rows: int) -> None:
    step = run.step(rows, way)
    dist.barrier()
    times = _times(run, step, rows)
    row = {"tokens_a_rank": rows * run.sizes.length, "way": way._asdict(), "collectives": step.collectives, "ms": times}
    whole = next((one["ms"]["p50"] for one in run.record.get("alone", ()) if one["tokens"] == _whole(run)), None)
    if whole:
        row |= {"of_one_rank": times["p50"] / whole, "at_most": LIMITS.get(rows) if run.ranks.world == 2 else None}
    run.record.setdefault("together", []).append(row)


def _whole(run: Run) -> int:
    """Tokens of the step of one rank that everything is compared with."""
    return run.sizes.rows[0] * run.sizes.length


def _times(run: Run, step: FusedStep, rows: int) -> dict[str, float]:
    """Milliseconds of a step among many, one begun before the one before has ended, as in training."""
    step.rates.zero_()
    step.tokens.copy_(run.tokens(run.ranks.rank, rows))
    for _ in range(5):
        step.replay()
    return _summary(_between(step.replay, run.sizes.timed, run.ranks.device))


def _between(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds between the ends of calls that follow one another."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in zip(marks, marks[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in zip(events, events[1:], strict=False)]


def _summary(samples: list[float]) -> dict[str, float]:
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return {"p20": p20, "p50": statistics.median(samples), "p80": p80, "rounds": len(samples)}


def time_links(run: Run) -> None:
    """Collectives alone, by size; bandwidth is what a link carries of a ring's traffic."""
    world, device = run.ranks.world, run.ranks.device
    for megabytes in run.sizes.megabytes:
        buffer = torch.zeros(megabytes * 2**18, device=device)
        part = buffer.new_empty(len(buffer) // world)
        whole = buffer[: len(part) * world]
        calls = {"all_reduce": lambda buffer=buffer: dist.all_reduce(buffer)}
        calls["all_gather"] = lambda part=part, whole=whole: all_gather(whole, part)
        for name, call in calls.items():
            for _ in range(5):
                call()
            ms = _summary(_between(call, 20, device))["p50"]
            moved = (2 if name == "all_reduce" else 1) * (world - 1) / world * 4 * len(buffer)
            row = {"collective": name, "bytes": 4 * len(buffer), "ms": ms, "bytes_per_second": moved / ms * 1e3}
            run.record.setdefault("links", []).append(row)


def time_adamw(run: Run) -> None:
    """AdamW of everything but the matrices: on every rank, or each its share, and the values gathered after it."""
    ranks, device = run.ranks, run.ranks.device
    shapes = [p.shape for name, p in run.model.named_parameters() if not is_block_matrix(name)]
    load, share = [0] * ranks.world, []
    for shape in sorted(shapes, key=torch.Size.numel, reverse=True):
        owner = load.index(min(load))
        load[owner] += shape.numel()
        if owner == ranks.rank:
            share.append(shape)
    sent, received = torch.zeros(max(load), device=device), torch.zeros(ranks.world * max(load), device=device)

    def adamw(some: list[torch.Size]) -> Callable[[], object]:
        parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in some]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return torch.optim.AdamW(parameters, fused=True, capturable=device.type == "cuda").step

    whole, own = adamw(shapes), adamw(share)

    def shared() -> None:
        own()
        all_gather(received, sent)

    def graph(call: Callable[[], object]) -> Callable[[], object]:
        return captured(call, device, collectives=True) if device.type == "cuda" else call

    for name, call in (("on each", whole), ("shared", shared)):
        replay = graph(call)
        replay()
        row = {"adamw": name, "captured": device.type == "cuda", "ms": _summary(_between(replay, 50, device))["p50"]}
        run.record.setdefault("adamw", []).append(row)


def project(record: dict[str, Any], tokens: int, exposed: dict[str, int]) -> list[dict[str, Any]]:
    """Milliseconds of a step of `tokens` tokens a GPU on more GPUs, by MODEL, for each way that was timed.

    `exposed` are the fp32 bytes that nothing hides: "all" of them, or those of the "last" buckets.
    """
    alone = next(row["ms"]["p50"] for row in record["alone"] if row["tokens"] == tokens)
    latency, bandwidth = fit([row for row in record["links"] if row["collective"] == "all_reduce"])

    def on_wire(world: int, moved: float) -> float:
        return 2 * (world - 1) * latency + 2 * (world - 1) / world * moved / bandwidth

    rows = []
    for row in record["together"]:
        if row["tokens_a_rank"] == tokens:
            narrow = 0.5 if row["way"]["reduce_dtype"] == "bfloat16" else 1.0
            hides = row["collectives"] == "captured" and row["way"]["gradient_buckets"] > 1
            moved, extra = narrow * exposed["last" if hides else "all"], max(row["ms"]["p50"] - alone, 0.0)
            for world in (4, 8):
                ms = alone + extra * on_wire(world, moved) / on_wire(2, moved)
                about = {"gpus": world, "tokens_a_step": world * tokens, "way": row["way"]}
                rows.append(about | {"ms": ms, "tokens_per_second": 1e3 * world * tokens / ms})
    return rows


def fit(links: list[dict[str, Any]]) -> tuple[float, float]:
    """Milliseconds of one of a ring's two hops and bytes a millisecond, by least squares over all-reduces of two.

    Relative errors count: the small sizes say what the latency is.
    """
    points = torch.tensor([[2.0, row["bytes"]] for row in links], dtype=torch.float64)
    ms = torch.tensor([row["ms"] for row in links], dtype=torch.float64)
    latency, slope = torch.linalg.lstsq(points / ms[:, None], torch.ones(len(links), 1, dtype=torch.float64)).solution
    return max(latency.item(), 1e-6), 1.0 / max(slope.item(), 1e-12)


def table(record: dict[str, Any]) -> str:
    """What was found, for people."""
    lines = [f"{record['world']} ranks, {record['environment']['gpu'] or 'CPU'}"]
    lines += [
        f"  one rank alone, {row['tokens']:>7,} tokens: {row['ms']['p50']:8.3f} ms" for row in record.get("alone", ())
    ]
    for row in record.get("apart", ()):
        each = ", ".join(f"{ms:.3f}" for ms in row["ms_of_each"])
        lines.append(f"  all at once, none waiting, {row['tokens']:>7,} tokens: {each} ms")
    for row in record.get("together", ()):
        way = Way(**row["way"])._replace(graph_collectives=row["collectives"])
        of_one = f", {row['of_one_rank']:.3f} of one rank's" if "of_one_rank" in row else ""
        wanted = f" (at most {row['at_most']})" if row.get("at_most") else ""
        lines.append(f"  {row['tokens_a_rank']:>7,} tokens a rank, {way}: {row['ms']['p50']:8.3f} ms{of_one}{wanted}")
    for row in record.get("links", ()):
        speed = row["bytes_per_second"] / 1e9
        lines.append(f"  {row['collective']} of {row['bytes'] / 2**20:.0f} MiB: {row['ms']:.3f} ms, {speed:.0f} GB/s")
    lines += [f"  AdamW {row['adamw']}: {1e3 * row['ms']:.1f} us" for row in record.get("adamw", ())]
    for row in record.get("replicas", ()):
        lines.append(f"  {Way(**row['way'])}: {row['entries_apart']} entries apart after {row['steps']} steps")
    for row in record.get("projection", {}).get("rows", ()):
        lines.append(f"  projected, {row['gpus']} GPUs, {Way(**row['way'])}: {row['ms']:.2f} ms a step")
    lines += [f"  PROBLEM in {row['part']}: {row['why']}" for row in record["problems"]]
    return "\n".join(lines)


def _nccl() -> dict[str, Any]:
    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {"version": version, "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("NCCL_")}}


def measure(run: Run, checks: bool) -> None:
    """Everything, in the order of the record; without `checks`, times alone."""
    sizes, together = run.sizes, run.ranks.world > 1
    ways = WAYS if together else ()
    run.part("attention", lambda: _choose(run))
    for way in ways if checks else ():
        run.part(f"results, {way}", lambda way=way: check_results(run, way))
    if together:
        run.part("links", lambda: time_links(run))
    for rows in sizes.rows:
        run.part(f"alone, {rows} rows", lambda rows=rows: time_alone(run, rows))
        if together:
            run.part(f"apart, {rows} rows", lambda rows=rows: time_apart(run, rows))
    for rows in sizes.rows:
        for way in ways:
            run.part(f"time, {rows} rows a rank, {way}", lambda way=way, rows=rows: time_together(run, way, rows))
    if together:
        run.part("AdamW", lambda: time_adamw(run))
    for way in ways if checks else ():
        run.part(f"replicas, {way}", lambda way=way: check_replicas(run, way))
    if run.ranks.world == 2:
        run.part("projection", lambda: _project(run))


def _choose(run: Run) -> None:
    ranks, sizes = run.ranks, run.sizes
    is_captured = ranks.device.type == "cuda"
    chosen = choose_attention(run.model, "auto", sizes.rows[0], sizes.length, ranks, capture=is_captured)
    run.record["attention"] = str(chosen)
    run.record["parameters"] = sum(p.numel() for p in run.model.parameters())


def _project(run: Run) -> None:
    stored = run.step(run.sizes.few, Way()).stored
    last = sum(bucket.sums.stop - bucket.sums.start for bucket in stored.buckets[-2:])
    exposed = {"last": 4 * last, "all": 4 * len(stored.sums)}
    if run.ranks.is_first:
        rows = project(run.record, _whole(run), exposed)
        run.record["projection"] = {"is": "a projection, not a measurement", "model": MODEL, "exposed_bytes": exposed}
        run.record["projection"]["rows"] = rows


def main(
    record: Annotated[Path, typer.Option(help="Where to write the record.")],
    commit: Annotated[str, typer.Option(help="Of the tree; asked of git where it is not given.")] = "",
    seconds: Annotated[float, typer.Option(help="After which nothing new begins.")] = 480.0,
    checks: Annotated[bool, typer.Option(help="Whether results and replicas are compared, too.")] = True,
    toy: Annotated[bool, typer.Option(help="Tiny sizes, for a try on a CPU.")] = False,
) -> None:
    """Measure the training step on the ranks that torchrun started."""
    sizes = Sizes(11, (ROWS, ROWS // 2), LENGTH, 8, 50, 500, (1, 4, 16, 64, 104))  # 104: the matrices in fp32
    if toy:
        sizes = Sizes(0, (4, 2), 32, 2, 4, 5, (1, 2))
    if not (toy or torch.cuda.is_available()):
        raise SystemExit("ranks are measured on CUDA GPUs, and PyTorch sees none here; --toy only tries it")
    try:
        _measured(record, commit, seconds, checks, sizes)
    except KloraError as error:
        raise SystemExit(str(error)) from None


def _measured(record: Path, commit: str, seconds: float, checks: bool, sizes: Sizes) -> None:
    with join_ranks() as ranks:
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        run = Run(ranks, sizes, record, commit, dtype, seconds)
        measure(run, checks)
        run.write()
        if ranks.is_first:
            print(table(run.record))
        if run.record["problems"]:
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
