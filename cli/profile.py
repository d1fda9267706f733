"""`klora profile`: where the time of a training step or of test-time training goes."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ..bench.environment import environment
from ..bench.groups import GROUPS
from ..bench.profile import Profile, profile_entry, step_work
from ..bench.record import measure_ceilings
from ..model.config import ConfigError, TrainConfig
from ..model.parallel import pick_device
from ..model.placement import compute_dtype
from ..model.reading import read_json
from ..model.storage import write_text
from . import options
from .console import Output

PROFILED = ("step", "ttt")


def profile(
    what: Annotated[str, typer.Argument(help="step or ttt.")],
    variant: Annotated[str, typer.Option("--variant", help="The entry's variant.")] = "eager",
    toy: Annotated[bool, typer.Option("--toy", help="Small shapes; the only ones on a CPU.")] = False,
    calls: Annotated[int, typer.Option("--calls", min=1, help="Measured calls.")] = 3,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Kernels to list.")] = 10,
    trace: Annotated[
        bool, typer.Option(help="Write a PyTorch trace; --no-trace leaves the device to nsys or ncu.")
    ] = True,
    out: Annotated[Path, typer.Option("--out", help="Folder of the trace.")] = Path("runs/profile"),
    record: Annotated[
        Path | None, typer.Option("--record", help="File to write the result to: its largest kernels, as JSON.")
    ] = None,
    device: options.Device = "auto",
    commit: options.Commit = "",
    as_json: options.Json = False,
) -> None:
    """Write a trace of one training step or TTT pass and list the kernels that take the time.

    `--variant klora` of a step is what `klora train` runs on a GPU, replayed. How near a kernel comes to its floor is
    said where its bytes or FLOPs are known: of that step's products, attention, residual stream and head.

    Open the trace in chrome://tracing or ui.perfetto.dev. The measured calls are bracketed with cudaProfilerStart and
    cudaProfilerStop, and NVTX ranges in the domain `klora` name their phases, for nsys and ncu.

    Example: klora profile ttt --rows 20
    """
    output = Output(as_json)
    if what not in PROFILED:
        raise ConfigError(f"{what!r} cannot be profiled; allowed: {', '.join(PROFILED)}")
    if record is not None and not trace:
        raise ConfigError("--record wants the trace that --no-trace leaves out; leave one of them out")
    if record is not None:
        _require_replaceable(record)
    if trace:
        options.require_folder(out)
    chosen = pick_device(device)
    dtype, toy = compute_dtype(TrainConfig(), chosen), toy or chosen.type == "cpu"
    entry = GROUPS[what][0]
    present = [v.name for v in entry.present(chosen)]
    if variant not in present:
        raise ConfigError(f"variant={variant!r} is not possible; allowed on this device: {', '.join(present)}")
    shape = entry.toy if toy else next(iter(entry.shapes.values()))
    ceilings = measure_ceilings(GROUPS["ceilings"], chosen, dtype, toy, (5, 20))
    path = out / f"{what}-{variant}.json" if trace else None
    work = step_work(shape, chosen, dtype) if (what, variant) == ("step", "klora") else None
    found = profile_entry(entry, variant, shape, chosen, dtype, ceilings, path, calls, work=work)
    _say(entry.op, variant, found, rows, output)
    command = f"klora profile {what} --variant {variant} --no-trace" + (" --toy" if toy else "")
    output.say(f"nsys: nsys profile --capture-range=cudaProfilerApi --trace=cuda,nvtx -o {what} {command}")
    output.say(f"ncu:  ncu --profile-from-start off --set full -o {what} {command} --calls 1")
    result = {
        "op": entry.op,
        "variant": variant,
        "shape": dict(shape),
        "environment": environment(commit),
        "ceilings": ceilings,
        **dataclasses.asdict(found),
        "kernels": [dataclasses.asdict(row) for row in found.kernels[:rows]],
    }
    if record is not None:
        write_text(record, json.dumps(result | {"trace": None}, indent=1) + "\n")
        output.say(f"record: {record}")
    output.result(result)


def _require_replaceable(record: Path) -> None:
    """ConfigError where the record would take the place of what is no older one, or cannot be written."""
    options.require_file(record, "--record")
    try:
        is_one = not record.exists() or {"op", "variant", "kernels"} <= read_json(record).keys()
    except (OSError, ValueError, AttributeError):
        is_one = False
    if not is_one:
        raise ConfigError(f"{record} is there and is no profile's record; move it or give another --record")


def _say(op: str, variant: str, found: Profile, most: int, output: Output) -> None:
    output.say(f"{op}, {variant}: {found.ms:.3f} ms a call, floor {found.floor_ms:.3f} ms")
    if found.trace is None:
        return
    table = [
        (
            row.name[:72],
            f"{row.calls:g}",
            f"{row.ms:.4f}",
            f"{100 * row.share:.1f}%",
            "unknown" if row.bytes is None else f"{row.bytes:,}",
            "unknown" if row.flops is None else f"{row.flops / 1e9:,.1f}",
            "unknown" if row.percent_of_floor is None else f"{row.percent_of_floor:.0f}%",
        )
        for row in found.kernels[:most]
    ]
    output.table("", table, ("kernel", "calls", "ms", "share", "bytes", "GFLOP", "of floor"))
    output.say(f"{len(found.kernels)} kernels, {100 * found.busy:.0f}% of the wall clock; trace: {found.trace}")
