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

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import KloraError
from ..model.reading import read_json
from ..model.storage import attempt, figure_png, load_matplotlib, new_figure, write_bytes, write_text
from .record import RecordError, validate
from .timing import SPREAD, TIMINGS
from .waterfall import AFTER, BEFORE, STEP, Saving, Waterfall, savings_of, waterfalls

YARDSTICK = "eager"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
UNSTEADY = "†"
ONE_CALL = "§"
BOUND = "‡"
GREY = "#8c8c8c"
WHOLE, SAVED, COST, REST = "#a8c8ec", "#a9dcb0", "#f4b5ad", "#dcdfe4"
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1}
COLUMNS = (
    *("op", "shape", "variant", "timing", "cold ms: p50 (p20 - p80)", "warm ms", "% of floor", f"x vs {YARDSTICK}"),
    *("peak MiB", "error"),
)
TEXT_COLUMNS = 4

Record = Mapping[str, Any]
Result = Mapping[str, Any]


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


def load_records(folder: Path) -> list[dict[str, Any]]:
    """Valid records of `folder`/<gpu>/<group>.json by GPU and group. Other JSON files there are passed over."""
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            record = read_json(path)
        except ValueError as error:
            raise RecordError(f"{path} is no benchmark record: it is not JSON ({error})") from None
        if not isinstance(record, dict) or not {"schema", "results"} <= record.keys():
            continue
        validate(record, str(path))
        other, _ = found.setdefault((_gpu(record), record["group"]), (path, record))
        if other != path:
            raise RecordError(f"{other} and {path} are both {_gpu(record)}, {record['group']}: keep one of them")
    if not found:
        raise RecordError(f"there are no benchmark records in {folder}: make some with `klora bench --out {folder}`")
    return [record for _, (_, record) in sorted(found.items())]


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
    return "\n\n".join(_section(record, [r for r in records if _gpu(r) == _gpu(record)]) for record in records) + "\n"


def _section(record: Record, of_gpu: Sequence[Record]) -> str:
    eager = _eager(record["results"])
    rows = [COLUMNS, [":--"] * TEXT_COLUMNS + ["--:"] * (len(COLUMNS) - TEXT_COLUMNS)]
    warm = {_key(result): result["ms"] for result in record["results"] if result["cache"] == "warm"}
    for result in _preferred(record["results"]):
        ms, speedup, peak = result["ms"], _speedup(result, eager), result["peak_bytes"]
        spread = f"{_three(ms['p50'])} ({_three(ms['p20'])} - {_three(ms['p80'])})"
        also = warm.get(_key(result))
        rows.append(
            (
                *(result["op"], result["shape"], result["variant"], result["timing"]),
                spread + _unsteady(ms),
                "-" if also is None else _three(also["p50"]) + _unsteady(also),
                _three(result["percent_of_floor"]),
                "-" if speedup is None else _three(speedup),
                "-" if peak is None else _three(peak / 2**20),
                f"{max(result['errors']):.2e}" if result["errors"] else BOUND,
            )
        )
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    parts = [f"### {_gpu(record)}: {record['group']}", _facts(record), table if record["results"] else "No results."]
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
    rows += [(s.name, _three(s.before), _three(s.after), f"{s.times}", _signed(s.ms)) for s in savings]
    rows.append(("together", "", "", "", _signed(sum(saving.ms for saving in savings))))
    head = f"What removing a piece, for {BEFORE} of it, would cost a training step ({name}):"
    return [head, "\n".join("| " + " | ".join(row) + " |" for row in rows)]


def _signed(ms: float) -> str:
    return f"{'-' if ms < 0 else '+'}{_three(abs(ms))}"


def _listed(head: str, entries: Sequence[Mapping[str, str]], reason: str) -> str:
    """A list below `head`: each variant with its ops and the reason that they share."""
    ops: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        ops.setdefault((entry["variant"], entry[reason]), []).append(entry["op"])
    return "\n".join((f"{head}\n", *(f"- {variant} ({', '.join(of)}): {why}" for (variant, why), of in ops.items())))


def _unsteady(ms: Mapping[str, Any]) -> str:
    mark = ONE_CALL if ms["rounds"] == 1 else UNSTEADY
    return "" if ms["steady"] else f" {mark}"


def _key(result: Result) -> tuple[str, ...]:
    return *_place(result), result["variant"], result["timing"]


def _facts(record: Record) -> str:
    """One sentence: machine, versions, commit, date, dtype and ceilings; what is unknown is left out."""
    environment, ceilings = record["environment"], record["ceilings"]
    versions = environment["versions"]
    driver = None if _gpu(record) == "CPU" else environment["driver"]
    named = {"driver": driver, "torch": versions.get("torch"), "triton": versions.get("triton")}
    named["commit"] = environment["commit"][:7]
    facts = [_gpu(record), *(f"{name} {value}" for name, value in named.items() if value), environment["date"][:10]]
    return f"{', '.join((*facts, *sorted({r['dtype'] for r in record['results']})))}; ceilings: {_rates(ceilings)}."


def _rates(ceilings: Mapping[str, float]) -> str:
    copy, gemm = (_three(ceilings[name] / 1e12) for name in ("bytes_per_second", "flops_per_second"))
    return f"copy {copy} TB/s, GEMM {gemm} TFLOP/s"


def draw(records: Sequence[Record], folder: Path, say: Callable[[str], None] = warnings.warn) -> list[Path]:
    """Write the pictures of every GPU to `folder`/<gpu>/; a picture that would show nothing is not made.

    One that cannot be made is left out, and `say` gets the reason: the tables do not need it.
    """
    written = []
    for gpu in dict.fromkeys(map(_gpu, records)):
        of_gpu = [record for record in records if _gpu(record) == gpu]
        results = [result for record in of_gpu for result in record["results"]]
        pictures = {f"speedup-{r['group']}": partial(_draw_speedup, gpu, r) for r in of_gpu}
        pictures["roofline"] = partial(_draw_roofline, gpu, of_gpu, _preferred(results))
        pictures["floor"] = partial(_draw_floor, gpu, _preferred(results))
        pictures |= {f"waterfall-{w.shape}": partial(_draw_waterfall, gpu, w) for w in waterfalls(results)}
        for name, picture in pictures.items():
            path = folder / re.sub(r"[^a-z0-9]+", "-", gpu.lower()) / f"{name}.png"
            if attempt(str(path), partial(_write_picture, path, picture, results), say):
                written.append(path)
    return written


def _write_picture(path: Path, picture: Callable[[Mapping[str, Any]], Any], results: Sequence[Result]) -> bool:
    """Whether there was anything to show."""
    load_matplotlib()
    figure = picture(_colours(results))
    if figure is not None:
        write_bytes(path, figure_png(figure, dpi=150))
    return figure is not None


def _draw_speedup(gpu: str, record: Record, colours: Mapping[str, Any]):
    """Horizontal bars of speedup, those of one op and shape side by side; None without anything to compare."""
    from matplotlib.patches import Patch

    eager = _eager(record["results"])
    compared = [r for r in record["results"] if r["variant"] != YARDSTICK and _speedup(r, eager) is not None]
    places = _by_place(_preferred(compared))
    if not places:
        return None
    bars = [result for results in places.values() for result in results]
    speedups = [_speedup(result, eager) for result in bars]
    rows, middles = [], []
    for results in places.values():
        first = rows[-1] + 1.8 if rows else 0.0  # a gap between places
        rows += [first + index for index in range(len(results))]
        middles.append((first + rows[-1]) / 2)
    axes = _bar_axes(rows[-1])
    drawn = axes.barh(rows, speedups, 0.85, color=[colours[result["variant"]] for result in bars])
    labels = [f"{_three(speedup)}x{_marks(result, bars)}" for speedup, result in zip(speedups, bars, strict=True)]
    axes.bar_label(drawn, labels, padding=4, fontsize=11, bbox=BEHIND_TEXT)
    axes.set_yticks(middles, [f"{op}\n{shape}" for op, shape, _ in places], fontsize=11)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 1.15 * max(1.0, *speedups))
    axes.set_xlabel(f"times as fast as {YARDSTICK} (line at 1.0)", fontsize=12)
    named = {result["variant"]: Patch(color=colours[result["variant"]]) for result in bars}
    axes.figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=11, frameon=False)
    return _titled(axes.figure, f"{gpu}, {record['group']}: speedup over {YARDSTICK}", bars)


def _draw_floor(gpu: str, results: Sequence[Result], colours: Mapping[str, Any]):
    """Percent of floor of the fastest variant of each op and shape; None without results."""
    places = _by_place(results)
    if not places:
        return None
    best = [_best(those) for those in places.values()]
    shown = [result["percent_of_floor"] for result in best]
    axes = _bar_axes(len(best) - 1)
    drawn = axes.barh(range(len(best)), shown, 0.75, color=[colours[result["variant"]] for result in best])
    labels = [f"{_three(r['percent_of_floor'])}% {r['variant']}{_marks(r, best)}" for r in best]
    axes.axvline(100, color="black", linewidth=1)
    axes.bar_label(drawn, labels, padding=4, fontsize=11, bbox=BEHIND_TEXT)
    axes.set_yticks(range(len(best)), [f"{op}  {shape}" for op, shape, _ in places], fontsize=11)
    axes.set_xlim(0, 1.35 * max(100, *shown))  # space for a variant's name behind the longest bar
    axes.set_xlabel("floor / median time (%); the floor, the line at 100, is what the ceilings allow", fontsize=12)
    return _titled(axes.figure, f"{gpu}: percent of floor, fastest variant of each op and shape", best)


def _draw_waterfall(gpu: str, waterfall: Waterfall, colours: Mapping[str, Any]):
    """Bars from one whole step down to the other: what each piece saves, or costs, and the rest."""
    parts = [(_times(saving), saving.ms, SAVED if saving.ms >= 0 else COST) for saving in waterfall.savings]
    parts.append(("rest: optimizers, casts, clip", waterfall.rest, REST))
    levels = [waterfall.before - sum(ms for _, ms, _ in parts[:count]) for count in range(len(parts) + 1)]
    names = [BEFORE, *(name for name, _, _ in parts), AFTER]
    starts = [0.0, *map(min, levels, levels[1:]), 0.0]
    widths = [waterfall.before, *(abs(ms) for _, ms, _ in parts), waterfall.after]
    labels = [_three(waterfall.before), *(_signed(-ms) for _, ms, _ in parts), _three(waterfall.after)]
    fills = [WHOLE, *(fill for _, _, fill in parts), WHOLE]
    axes = _bar_axes(len(names) - 1)
    drawn = axes.barh(range(len(names)), widths, 0.75, left=starts, color=fills, edgecolor=GREY, linewidth=0.6)
    axes.bar_label(drawn, [f"{label} ms" for label in labels], padding=4, fontsize=11, bbox=BEHIND_TEXT)
    for row, level in enumerate(levels):  # where a bar ends the next one begins
        axes.plot([level, level], [row, row + 1], color=GREY, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.set_xlim(min(0, *levels), 1.15 * max(waterfall.after, *levels))
    axes.set_xlabel("milliseconds of a step", fontsize=12)
    notes = ["a piece: what it saves alone, forward and backward, times how often a step runs it; cold cache"]
    if waterfall.others:
        notes.append("; ".join(f"{name}: {_three(ms)} ms" for name, ms in waterfall.others.items()))
    if waterfall.unmeasured:
        notes.append(f"not measured, in the rest: {', '.join(waterfall.unmeasured)}")
    return _noted(axes.figure, f"{gpu}, {waterfall.shape}: a training step, from {BEFORE} to {AFTER}", notes)


def _times(saving: Saving) -> str:
    """A piece as the picture names it: what it saves each time, and how often."""
    return saving.name if saving.times == 1 else f"{saving.times} x {saving.name}"


def _draw_roofline(gpu: str, records: Sequence[Record], results: Sequence[Result], colours: Mapping[str, Any]):
    """Numbered dots of the fastest variant of each op and shape, hollow ones of eager; None without results."""
    if not results:
        return None
    # Runs differ a little; the roof is the best that any of them saw.
    ceilings = {name: max(record["ceilings"][name] for record in records) for name in records[0]["ceilings"]}
    ridge, peak = ceilings["flops_per_second"] / ceilings["bytes_per_second"], ceilings["flops_per_second"] / 1e12
    places = _by_place(result for result in results if result["flops"] and result["bytes"])
    best = [_best(those) for those in places.values()]
    figure = _figure(max(7.0, 2.5 + 0.24 * len(best)))
    axes, handles, names = figure.subplots(), [], []
    dots, rest = [(_intensity(result), _attained(result)) for result in best], []
    for number, (result, (x, y)) in enumerate(zip(best, dots, strict=True), 1):
        handles += axes.plot(x, y, "o", color=colours[result["variant"]], markersize=8, zorder=4)
        rate = f"{_three(y)} TFLOP/s{_marks(result, best)}"
        names.append(f"{number}  {result['op']} {result['shape']}: {result['variant']}, {rate}")
        for other in places[_place(result)]:
            if other["variant"] == YARDSTICK and other is not result and other["timing"] == result["timing"]:
                rest.append((x, _attained(other)))
                axes.plot([x, x], [y, rest[-1][1]], color=GREY, linewidth=1, zorder=2)
    hollow = axes.plot(*zip(*rest, strict=True) if rest else ([], []), "o", color=GREY, mfc="white", zorder=3)
    xs, ys = zip(*dots, *rest, (ridge, peak), strict=True)
    ends = min(xs) / 10, max(xs) * 10
    roof = axes.plot([ends[0], ridge, ends[1]], [ends[0] / ridge * peak, peak, peak], color="black", zorder=1)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=(min(*ys, peak / 10) / 3, 3 * max(ys)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("FLOPs a byte of least traffic (log scale)", fontsize=12)
    axes.set_ylabel("attained TFLOP/s (log scale)", fontsize=12)
    axes.grid(alpha=0.3)
    handles, names = (
        [*roof, *hollow, *handles],
        [f"roof: {_rates(ceilings)}", f"{YARDSTICK}, where timed alike", *names],
    )
    figure.legend(handles, names, loc="outside right upper", fontsize=10, frameon=False)
    zero = dict.fromkeys(result["op"] for result in results if _place(result) not in places)
    note = [f"left out, no FLOPs or bytes to count: {', '.join(zero)}"] if zero else []
    _titled(figure, f"{gpu}: roofline", best or results, ["dots: the fastest variant of each op and shape", *note])
    _number(axes, dots, rest)
    return figure


def _number(axes, dots: Sequence[tuple[float, float]], rest: Sequence[tuple[float, float]]) -> None:
    """Count the dots, each number at the nearest free spot, with a line to its dot if another dot may seem meant."""
    axes.figure.draw_without_rendering()  # settles the layout, so that spots on the picture are known
    spots = [axes.transData.transform(dot) * 72 / axes.figure.dpi for dot in (*dots, *rest)]  # in points, as below
    taken = [(x, y, 11, 9) for x, y in spots]
    for number, (dot, (x, y)) in enumerate(zip(dots, spots, strict=False), 1):
        others = [spot for spot in spots if spot is not spots[number - 1]]
        around = [
            (radius * math.cos(math.pi / 8 * turn), radius * math.sin(math.pi / 8 * turn))
            for radius in range(14, 150, 9)
            for turn in (0, 8, 2, 6, 4, 1, 7, 3, 5, 15, 9, 14, 10, 13, 11, 12)
        ]
        free = (
            (a, b)
            for a, b in around
            if all(abs(x + a - u) > w or abs(y + b - v) > h for u, v, w, h in taken)
            and (math.hypot(a, b) > 15 or all(math.dist((x + a, y + b), other) > 13 for other in others))
        )
        a, b = next(free, around[0])
        taken.append((x + a, y + b, 16, 12))
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0} if math.hypot(a, b) > 15 else None
        place = {"textcoords": "offset points", "ha": "center", "va": "center", "bbox": BEHIND_TEXT}
        axes.annotate(str(number), dot, (a, b), fontsize=11, arrowprops=line, zorder=5, **place)


def _figure(height: float):
    """An empty picture, 1800 pixels wide when saved."""
    figure = new_figure(12, height)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    return figure


def _bar_axes(last: float):
    """Axes for horizontal bars from row 0 down to row `last`."""
    axes = _figure(2.4 + 0.3 * last).subplots()
    axes.set_ylim(last + 0.7, -0.7)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _titled(figure, title: str, results: Sequence[Result], notes: Sequence[str] = ()):
    """`figure` with a title above, and below it what its numbers are: caches, timings, and what the marks mean."""
    first, *others = _timings(results)
    marked = "".join(f"; where marked ({name}), by {TIMINGS[name]}" for name in others)
    lines = [f"cold cache, timed by {TIMINGS[first]}{marked}", *notes]
    marks = "".join(_unsteady(result["ms"]) for result in results)
    if UNSTEADY in marks:
        lines.append(f"{UNSTEADY} unsteady: p80 - p20 was {SPREAD:.0%} of the median or more")
    if ONE_CALL in marks:
        lines.append(f"{ONE_CALL} one call")
    return _noted(figure, title, lines)


def _noted(figure, title: str, lines: Sequence[str]):
    """`figure` with a title above and lines below it."""
    figure.suptitle(title, x=0.015, ha="left", fontsize=15, weight="bold")
    wrapped = [part for line in lines for part in textwrap.wrap(line, 120)]
    figure.supxlabel("\n".join(wrapped), x=0.015, ha="left", fontsize=11, color="#444444")
    return figure


def _timings(results: Iterable[Result]) -> list[str]:
    """The timings of `results`, the preferred one first."""
    used = {result["timing"] for result in results}
    return [name for name in TIMINGS if name in used]


def _marks(result: Result, among: Sequence[Result]) -> str:
    """What stands behind a number: its timing, where that is not the first of the picture's, and the unsteady sign."""
    other = "" if result["timing"] == _timings(among)[0] else f" ({result['timing']})"
    return other + _unsteady(result["ms"])


def _preferred(results: Iterable[Result]) -> list[Result]:
    """Of the cold results, one for each variant at each place, by the first of TIMINGS that it has."""
    order, chosen = list(TIMINGS), {}
    for result in results:
        key = (_place(result), result["variant"])
        if result["cache"] == "cold" and (
            key not in chosen or order.index(result["timing"]) < order.index(chosen[key]["timing"])
        ):
            chosen[key] = result
    return list(chosen.values())


def _place(result: Result) -> tuple[str, str, str]:
    return result["op"], result["shape"], result["dtype"]


def _by_place(results: Iterable[Result]) -> dict[tuple[str, str, str], list[Result]]:
    places: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        places.setdefault(_place(result), []).append(result)
    return places


def _best(results: Iterable[Result]) -> Result:
    """The fastest that computes the op; a bound, which has no errors, only where there is nothing else."""
    return min(results, key=lambda result: (not result["errors"], result["ms"]["p50"]))


def _eager(results: Iterable[Result]) -> dict[tuple[str, ...], float]:
    """Median of the yardstick by op, shape, dtype, timing and cache."""
    return {(*_place(r), r["timing"], r["cache"]): r["ms"]["p50"] for r in results if r["variant"] == YARDSTICK}


def _speedup(result: Result, eager: Mapping[tuple[str, ...], float]) -> float | None:
    """Eager's median over this one's; None where eager was not measured in the same way."""
    yardstick = eager.get((*_place(result), result["timing"], result["cache"]))
    return None if yardstick is None else yardstick / result["ms"]["p50"]


def _attained(result: Result) -> float:
    """TFLOP/s."""
    return result["flops"] / result["ms"]["p50"] / 1e9


def _intensity(result: Result) -> float:
    return result["flops"] / result["bytes"]


def _gpu(record: Record) -> str:
    """The GPU's name; CPU for what was timed by the processor's clock, even on a machine with a GPU."""
    on_cpu = any(result["timing"] == "clock" for result in record["results"])
    return "CPU" if on_cpu else record["environment"]["gpu"] or "CPU"


def _colours(results: Iterable[Result]) -> dict[str, Any]:
    """One colour a variant, the same in all pictures of a GPU; grey is the yardstick's."""
    from matplotlib import colormaps

    names = sorted({result["variant"] for result in results} - {YARDSTICK})
    tab20 = colormaps["tab20"].colors
    palette = [colour for index, colour in enumerate((*tab20[::2], *tab20[1::2])) if index % 10 != 7]  # 7 is grey
    return {YARDSTICK: GREY} | {name: palette[index % len(palette)] for index, name in enumerate(names)}


def _three(value: float) -> str:
    """`value` to three significant digits; "inf" where a quotient of two numbers is beyond float64."""
    rounded = float(f"{value:.3g}")
    if not math.isfinite(rounded):
        return str(rounded)
    if rounded and abs(rounded) < 1e-3:
        return f"{value:.2e}"
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(digits, 0)}f}"
