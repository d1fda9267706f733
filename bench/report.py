"""Records as tables and pictures: what results/<gpu>/<group>.json say, for people.

    tables        one row an op, shape and variant, one section a GPU and group, between two marker lines of a README
    speedup-*.png one group: speedup over eager of every other variant, op by op
    roofline.png  all groups of a GPU: attained FLOP/s against FLOPs a byte, under the measured copy and GEMM ceilings
    floor.png     all groups of a GPU: how near the best variant of each op and shape comes to the floor
    waterfall-*.png a whole training step: from torch.compile's milliseconds to klora's, piece by piece

Tables and pictures show each variant by the first of TIMINGS that it has; the records hold the others too. All numbers
are those of cold caches but for one column of the tables. A speedup is always taken against eager at the same op,
shape, dtype, timing and cache.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KloraError
from ..model.storage import write_text
from .pictures import draw
from .readings import (
    ONE_CALL,
    UNSTEADY,
    YARDSTICK,
    Record,
    Result,
    eager_times,
    gpu_of,
    load_records,
    place_of,
    preferred,
    rates_text,
    signed_ms,
    speedup_of,
    three_digits,
    unsteady_mark,
)
from .timing import SPREAD
from .waterfall import AFTER, BEFORE, STEP, savings_of

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
BOUND = "‡"
COLUMNS = (
    *("op", "shape", "variant", "timing", "cold ms: p50 (p20 - p80)", "warm ms", "% of floor", f"x vs {YARDSTICK}"),
    *("peak MiB", "error"),
)
TEXT_COLUMNS = 4


class ReadmeError(KloraError, ValueError):
    """A README without exactly one pair of marker lines; the message says what to write."""


@dataclass(frozen=True)
class Report:
    """What `report` made. `readme_changed` is None where no README was given."""

    records: list[dict[str, Any]]
    tables: str
    pictures: list[Path]
    readme_changed: bool | None


def report(folder: Path, readme: Path | None = None, say: Callable[[str], None] = warnings.warn) -> Report:
    """Tables and pictures of the records in `folder`; pictures go beside their records, tables into `readme`."""
    records = load_records(folder)
    tables = markdown_tables(records)
    changed = rewrite_readme(readme, tables) if readme else None
    return Report(records, tables, draw(records, folder, say), changed)


def rewrite_readme(readme: Path, tables: str) -> bool:
    """Put `tables` between the marker lines of `readme`; whether that changed the file."""
    before = readme.read_bytes().decode()
    lines = before.splitlines(keepends=True)
    places = [[number for number, line in enumerate(lines) if line.strip() == marker] for marker in (BEGIN, END)]
    for marker, numbers in zip((BEGIN, END), places, strict=True):
        if len(numbers) != 1:
            raise ReadmeError(
                f"{readme} has {len(numbers)} lines `{marker}`, one is needed: tables go from `{BEGIN}` to `{END}`"
            )
    (begin,), (end,) = places
    if end < begin:
        raise ReadmeError(f"{readme} has the line `{END}` before the line `{BEGIN}`: exchange them")
    after = "".join((*lines[: begin + 1], f"\n{tables.strip()}\n\n", *lines[end:]))
    if after != before:
        write_text(readme, after)
    return after != before


def markdown_tables(records: Sequence[Record]) -> str:
    """One section a record: where it was made, its results, and the variants that could not run."""
    return (
        "\n\n".join(_section(record, [r for r in records if gpu_of(r) == gpu_of(record)]) for record in records) + "\n"
    )


def _section(record: Record, of_gpu: Sequence[Record]) -> str:
    eager = eager_times(record["results"])
    rows = [COLUMNS, [":--"] * TEXT_COLUMNS + ["--:"] * (len(COLUMNS) - TEXT_COLUMNS)]
    warm = {_key(result): result["ms"] for result in record["results"] if result["cache"] == "warm"}
    for result in preferred(record["results"]):
        ms, speedup, peak = result["ms"], speedup_of(result, eager), result["peak_bytes"]
        spread = f"{three_digits(ms['p50'])} ({three_digits(ms['p20'])} - {three_digits(ms['p80'])})"
        also = warm.get(_key(result))
        rows.append(
            (
                *(result["op"], result["shape"], result["variant"], result["timing"]),
                spread + unsteady_mark(ms),
                "-" if also is None else three_digits(also["p50"]) + unsteady_mark(also),
                three_digits(result["percent_of_floor"]),
                "-" if speedup is None else three_digits(speedup),
                "-" if peak is None else three_digits(peak / 2**20),
                f"{max(result['errors']):.2e}" if result["errors"] else BOUND,
            )
        )
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    parts = [f"### {gpu_of(record)}: {record['group']}", _facts(record), table if record["results"] else "No results."]
    if ONE_CALL in table:
        parts.append(f"{ONE_CALL} one call.")
    if UNSTEADY in table:
        parts.append(f"{UNSTEADY} unsteady: at the last round, p80 - p20 was still {SPREAD:.0%} of the median or more.")
    if record["group"] == "training":
        parts += _worth([result for other in of_gpu for result in other["results"]])
    if record["bounds"]:
        parts.append(_listed(f"{BOUND} Timed as bounds, these compute something else:", record["bounds"], "instead"))
    if record["missing"]:
        parts.append(_listed("Missing:", record["missing"], "why"))
    return "\n\n".join(parts)


def _worth(results: Sequence[Result]) -> list[str]:
    """What removing each piece would cost a step of the first shape; nothing where no piece has both variants."""
    name, sizes = next(iter(STEP.shapes.items()))
    savings = savings_of(results, sizes)
    if not savings:
        return []
    rows = [("piece", f"{BEFORE}, ms", f"{AFTER}, ms", "times a step", "ms a step"), (":--", *["--:"] * 4)]
    rows += [(s.name, three_digits(s.before), three_digits(s.after), f"{s.times}", signed_ms(s.ms)) for s in savings]
    rows.append(("together", "", "", "", signed_ms(sum(saving.ms for saving in savings))))
    head = f"What removing a piece, for {BEFORE} of it, would cost a training step ({name}):"
    return [head, "\n".join("| " + " | ".join(row) + " |" for row in rows)]


def _listed(head: str, entries: Sequence[Mapping[str, str]], reason: str) -> str:
    """A list below `head`: each variant with its ops and the reason that they share."""
    ops: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        ops.setdefault((entry["variant"], entry[reason]), []).append(entry["op"])
    return "\n".join((f"{head}\n", *(f"- {variant} ({', '.join(of)}): {why}" for (variant, why), of in ops.items())))


def _key(result: Result) -> tuple[str, ...]:
    return *place_of(result), result["variant"], result["timing"]


def _facts(record: Record) -> str:
    """One sentence: machine, versions, commit, date, dtype and ceilings; what is unknown is left out."""
    environment, ceilings = record["environment"], record["ceilings"]
    versions = environment["versions"]
    driver = None if gpu_of(record) == "CPU" else environment["driver"]
    named = {"driver": driver, "torch": versions.get("torch"), "triton": versions.get("triton")}
    named["commit"] = environment["commit"][:7]
    facts = [gpu_of(record), *(f"{name} {value}" for name, value in named.items() if value), environment["date"][:10]]
    return f"{', '.join((*facts, *sorted({r['dtype'] for r in record['results']})))}; ceilings: {rates_text(ceilings)}."
