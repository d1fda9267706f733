"""Pictures of the records: speedups, the roofline, the floors, and a training step piece by piece."""

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..model.storage import attempt, figure_png, load_matplotlib, new_figure, write_bytes
from .readings import (
    ONE_CALL,
    UNSTEADY,
    YARDSTICK,
    Record,
    Result,
    attained,
    best_of,
    by_place,
    eager_times,
    gpu_of,
    intensity,
    place_of,
    preferred,
    rates_text,
    signed_ms,
    speedup_of,
    three_digits,
    timings_of,
    unsteady_mark,
)
from .timing import SPREAD, TIMINGS
from .waterfall import AFTER, BEFORE, Saving, Waterfall, waterfalls

GREY = "#8c8c8c"
WHOLE, SAVED, COST, REST = "#a8c8ec", "#a9dcb0", "#f4b5ad", "#dcdfe4"
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def draw(records: Sequence[Record], folder: Path, say: Callable[[str], None] = warnings.warn) -> list[Path]:
    """Write the pictures of every GPU to `folder`/<gpu>/; a picture that would show nothing is not made.

    One that cannot be made is left out, and `say` gets the reason: the tables do not need it.
    """
    written = []
    for gpu in dict.fromkeys(map(gpu_of, records)):
        of_gpu = [record for record in records if gpu_of(record) == gpu]
        results = [result for record in of_gpu for result in record["results"]]
        pictures = {f"speedup-{r['group']}": partial(_draw_speedup, gpu, r) for r in of_gpu}
        pictures["roofline"] = partial(_draw_roofline, gpu, of_gpu, preferred(results))
        pictures["floor"] = partial(_draw_floor, gpu, preferred(results))
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

    eager = eager_times(record["results"])
    compared = [r for r in record["results"] if r["variant"] != YARDSTICK and speedup_of(r, eager) is not None]
    places = by_place(preferred(compared))
    if not places:
        return None
    bars = [result for results in places.values() for result in results]
    speedups = [speedup_of(result, eager) for result in bars]
    rows, middles = [], []
    for results in places.values():
        first = rows[-1] + 1.8 if rows else 0.0  # a gap between places
        rows += [first + index for index in range(len(results))]
        middles.append((first + rows[-1]) / 2)
    axes = _bar_axes(rows[-1])
    drawn = axes.barh(rows, speedups, 0.85, color=[colours[result["variant"]] for result in bars])
    labels = [f"{three_digits(speedup)}x{_marks(result, bars)}" for speedup, result in zip(speedups, bars, strict=True)]
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
    places = by_place(results)
    if not places:
        return None
    best = [best_of(those) for those in places.values()]
    shown = [result["percent_of_floor"] for result in best]
    axes = _bar_axes(len(best) - 1)
    drawn = axes.barh(range(len(best)), shown, 0.75, color=[colours[result["variant"]] for result in best])
    labels = [f"{three_digits(r['percent_of_floor'])}% {r['variant']}{_marks(r, best)}" for r in best]
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
    labels = [three_digits(waterfall.before), *(signed_ms(-ms) for _, ms, _ in parts), three_digits(waterfall.after)]
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
        notes.append("; ".join(f"{name}: {three_digits(ms)} ms" for name, ms in waterfall.others.items()))
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
    places = by_place(result for result in results if result["flops"] and result["bytes"])
    best = [best_of(those) for those in places.values()]
    figure = _figure(max(7.0, 2.5 + 0.24 * len(best)))
    axes, handles, names = figure.subplots(), [], []
    dots, rest = [(intensity(result), attained(result)) for result in best], []
    for number, (result, (x, y)) in enumerate(zip(best, dots, strict=True), 1):
        handles += axes.plot(x, y, "o", color=colours[result["variant"]], markersize=8, zorder=4)
        rate = f"{three_digits(y)} TFLOP/s{_marks(result, best)}"
        names.append(f"{number}  {result['op']} {result['shape']}: {result['variant']}, {rate}")
        for other in places[place_of(result)]:
            if other["variant"] == YARDSTICK and other is not result and other["timing"] == result["timing"]:
                rest.append((x, attained(other)))
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
        [f"roof: {rates_text(ceilings)}", f"{YARDSTICK}, where timed alike", *names],
    )
    figure.legend(handles, names, loc="outside right upper", fontsize=10, frameon=False)
    zero = dict.fromkeys(result["op"] for result in results if place_of(result) not in places)
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
    first, *others = timings_of(results)
    marked = "".join(f"; where marked ({name}), by {TIMINGS[name]}" for name in others)
    lines = [f"cold cache, timed by {TIMINGS[first]}{marked}", *notes]
    marks = "".join(unsteady_mark(result["ms"]) for result in results)
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


def _marks(result: Result, among: Sequence[Result]) -> str:
    """What stands behind a number: its timing, where that is not the first of the picture's, and the unsteady sign."""
    other = "" if result["timing"] == timings_of(among)[0] else f" ({result['timing']})"
    return other + unsteady_mark(result["ms"])


def _colours(results: Iterable[Result]) -> dict[str, Any]:
    """One colour a variant, the same in all pictures of a GPU; grey is the yardstick's."""
    from matplotlib import colormaps

    names = sorted({result["variant"] for result in results} - {YARDSTICK})
    tab20 = colormaps["tab20"].colors
    palette = [colour for index, colour in enumerate((*tab20[::2], *tab20[1::2])) if index % 10 != 7]  # 7 is grey
    return {YARDSTICK: GREY} | {name: palette[index % len(palette)] for index, name in enumerate(names)}
