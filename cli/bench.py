"""`klora bench`: gate, time and record the entries of bench/."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from ..bench.against import Comparison, compare
from ..bench.gate import RedGate
from ..bench.groups import GROUPS, entries_of
from ..bench.record import RecordError, measure_ceilings, result_key, run_group, slower_than, validate
from ..bench.report import Report, report
from ..model.config import ConfigError, TrainConfig
from ..model.parallel import pick_device
from ..model.placement import compute_dtype, device_name
from ..model.reading import read_json
from ..model.storage import write_text
from . import options
from .console import Output


def bench(
    groups: Annotated[
        list[str] | None, typer.Argument(help=f"Groups to run; all if left out: {', '.join(GROUPS)}.")
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Small shapes; the only ones on a CPU.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder of the records.")] = Path("bench/results"),
    baseline: Annotated[
        Path | None, typer.Option("--check", help="A record: end with status 1 if a median is over 5% slower.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="REV", help="Time another commit beside this one, in turns.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option("--readme", help="With `report`: rewrite the tables between this file's markers.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Most rounds of timing.")] = 200,
    device: options.Device = "auto",
    commit: options.Commit = "",
    as_json: options.Json = False,
) -> None:
    """Check every variant against float64, time those that pass, and write one record a group.

    A variant that computes something else ends the run with status 1 and no speed. Peers that are not installed are
    named as missing. Records go to OUT/GPU/GROUP.json; their fields are described in bench/record.py. A run that is
    killed leaves what it had measured in GROUP.json.part.

    `klora bench report` prints the tables of all records in OUT and draws their pictures beside them.

    Example: klora bench attention step --check bench/results/nvidia-h200/attention.json
    """
    output = Output(as_json)
    if groups == ["report"]:
        say_report(report(out, readme, output.warn), output)
        return
    if readme:
        raise ConfigError("--readme was given without `report`; allowed: klora bench report --readme FILE")
    entries_of(groups or [])
    if against and baseline:
        raise ConfigError("--against and --check were both given; give one of them")
    if against:
        flags = ["--rounds", str(rounds), "--device", device, *(["--toy"] if toy else [])]
        say_comparison(against, compare(against, groups or [], flags), output)
        return
    before = read_record(baseline) if baseline else None
    if before and before["group"] not in (groups or GROUPS):
        raise RecordError(
            f"{baseline} is of the group {before['group']}, which is not run; add it, or leave out --check"
        )
    chosen = pick_device(device)
    dtype, toy = compute_dtype(TrainConfig(), chosen), toy or chosen.type == "cpu"
    folder = out / re.sub(r"[^a-z0-9]+", "-", device_name(chosen).lower())
    options.require_folder(folder)
    for group in groups or GROUPS:
        require_replaceable(folder / f"{group}.json", toy)
    limits = (min(20, rounds), rounds)
    ceilings = measure_ceilings(GROUPS["ceilings"], chosen, dtype, toy, limits)
    slower, records = [], []
    for group in groups or GROUPS:
        part = folder / f"{group}.json.part"
        with output.progress() as show:
            try:
                record = run_group(
                    group,
                    GROUPS[group],
                    ceilings,
                    chosen,
                    dtype,
                    toy,
                    limits,
                    commit,
                    progress=lambda text, done, total: show(text, done, total, "shapes"),
                    so_far=lambda record, part=part: write_text(part, json.dumps(record, indent=1) + "\n"),
                )
            except RedGate as red:
                part.unlink(missing_ok=True)
                output.say(f"red gate: {red}", style="bold red")
                output.result({"error": str(red), "kind": "RedGate"})
                raise typer.Exit(1) from None
        write_text(folder / f"{group}.json", json.dumps(record, indent=1) + "\n")
        part.unlink(missing_ok=True)
        say_record(record, output)
        records.append(record)
        if before and before["group"] == group:
            slower = slower_than(before, record)
            if not {result_key(r) for r in before["results"]} & {result_key(r) for r in record["results"]}:
                raise RecordError(
                    f"{baseline} has no result in common with this run: other shapes, dtypes or variants; nothing was "
                    "compared"
                )
    for line in slower:
        output.say(f"slower: {line}", style="bold red")
    output.result({"records": records, "slower": slower})
    if slower:
        raise typer.Exit(1)


def say_report(made: Report, output: Output) -> None:
    """The tables of all records, and where their pictures are."""
    output.say(made.tables)
    for picture in made.pictures:
        output.say(f"picture: {picture}")
    output.result({"pictures": [str(p) for p in made.pictures], "readme_changed": made.readme_changed})


def say_comparison(revision: str, comparisons: list[Comparison], output: Output) -> None:
    """Both commits' medians, and which is slower."""
    rows = [(c.name, f"{c.here:.4f}", f"{c.there:.4f}", f"{c.ratio:.3f}") for c in comparisons]
    output.table("", rows, ("result", "here, ms", f"{revision}, ms", f"here / {revision}"))
    output.result({"against": revision, "results": [{**vars(c), "ratio": c.ratio} for c in comparisons]})


def require_replaceable(path: Path, toy: bool) -> None:
    """RecordError where a new record would take the place of something else than an older one of its kind."""
    if not path.exists():
        return
    try:
        shapes = {result["shape"] for result in read_json(path)["results"]}
    except (ValueError, KeyError, TypeError, OSError):
        raise RecordError(
            f"{path} is no benchmark record and would be replaced; move it or give another --out"
        ) from None
    if toy and not shapes <= {"toy"}:
        raise RecordError(f"{path} is a record of full shapes and --toy would replace it; give another --out")


def read_record(path: Path) -> dict:
    """A record from disk; RecordError says what is wrong with it."""
    if not path.is_file():
        raise RecordError(f"{path}: there is no such file; give a record that klora bench wrote")
    try:
        record = read_json(path)
    except ValueError as error:
        raise RecordError(f"{path} is no benchmark record: it is not JSON ({error})") from None
    validate(record, str(path))
    return record


def say_record(record: dict, output: Output) -> None:
    """A record's results as a table, with what is missing below it."""
    rows = [
        (
            result["op"],
            result["shape"],
            result["variant"],
            f"{result['timing']}, {result['cache']}",
            f"{result['ms']['p50']:.4f}",
            f"{result['ms']['p20']:.4f} - {result['ms']['p80']:.4f}" + ("" if result["ms"]["steady"] else " unsteady"),
            f"{result['percent_of_floor']:.0f}%",
            f"{max(result['errors']):.1e}" if result["errors"] else "a bound",
        )
        for result in record["results"]
    ]
    columns = ("op", "shape", "variant", "timing, cache", "ms", "p20 - p80", "of floor", "error")
    output.table(record["group"], rows, columns)
    for bound in record["bounds"]:
        output.say(f"a bound: {bound['variant']} of {bound['op']} computes {bound['instead']}")
    for missing in record["missing"]:
        output.say(f"missing: {missing['variant']} of {missing['op']}: {missing['why']}")
