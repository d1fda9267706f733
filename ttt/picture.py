"""report.png: bits per byte, the gain by length and along the documents, and the documents that gained and lost most.

A gain is what the base model has more than the adapted one: positive, blue, upward or to the right.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..model.storage import figure_png, new_figure
from .labels import leak_of, marks_of, minus, most_first, short_name, signed
from .protocols import label
from .results import SHORT, ScoreResult

BAR_ROWS = 6
"""Most bars of each sign."""
GREY, DARK, GREEN, RED = "#9a9fa6", "#565c64", "#55a868", "#c44e52"
GAIN, LOSS = "#2f6fc4", "#d9731a"
"""The colours of gains and losses; the page's --gain and --loss are the same hues."""


def draw(result: ScoreResult) -> bytes:
    """The picture as PNG, 1800 pixels wide."""
    along = [1.0] if result.has_gains else []
    figure = new_figure(12, 9 + 4 * len(along))
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    colour = RED if result.config.is_leaky else "black"
    figure.suptitle(f"klora: {label(result.config.protocol)}", fontsize=16, weight="bold", color=colour)
    top, *middle, bottom = figure.subfigures(2 + len(along), 1, height_ratios=(1.1, *along, 1))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.5))
    _draw_totals(left, result)
    _draw_gains(right, result)
    if middle:
        _draw_along(*middle[0].subplots(2, 1, sharex=True, height_ratios=(3, 1.2)), result)
    _draw_extremes(bottom.subplots(), result)
    return figure_png(figure, dpi=150)


def _draw_totals(axes, result: ScoreResult) -> None:
    """Bars from zero; written above them the values, the quantisation gap and the gain."""
    totals = result.totals()
    values = [totals[name] for name in ("prequant_bpb", "base_bpb", "adapted_bpb")]
    drawn = [value if value is not None and math.isfinite(value) else 0.0 for value in values]
    axes.bar(range(3), drawn, color=(GREY, DARK, RED if result.config.is_leaky else GREEN), width=0.6)
    for i, value in enumerate(values):
        text = "not\nmeasured" if value is None else f"{value:.4f}"
        # As on the page: what quantisation costs and what adaptation gains are positive.
        step = (None, minus(values[1], values[0]), minus(values[1], values[2]))[i]
        if step is not None:
            text += f"\n{('', 'gap', 'gain')[i]} {signed(step)}"
        axes.annotate(text, (i, drawn[i]), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=11)
    names = ("before\nquantisation", "after\nquantisation", "\n".join(("adapted", *marks_of(result))))
    axes.set_xticks(range(3), names, fontsize=11)
    axes.set_xlabel("gap: after - before; gain: after - adapted", fontsize=11)
    most = max(drawn)
    axes.set_ylim(0, most * 1.25 if most > 0 else 1.0)
    text = "" if result.bytes_of == "text" else f" of the {result.bytes_of}"
    axes.set_title(f"bits per byte{text} (lower is better)", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_gains(axes, result: ScoreResult) -> None:
    """Gain against length, a dot a document, and the token-weighted mean of length bins."""
    plotted = [d for d in result.documents if d.tokens and d.gain_bpb is not None]
    short = sum(d.status == SHORT for d in result.documents)
    other = len(result.documents) - short - len(plotted)
    note = f"not plotted: {short:,} short" + (f", {other:,} not adapted or without text" if other else "")
    axes.set_xlabel(f"document length (tokens, log scale)\n{note}", fontsize=11)
    axes.set_title(f"gain by adaptation{leak_of(result)}: base BPB - adapted BPB", fontsize=12)
    axes.set_ylabel("bits per byte gained", fontsize=11)
    axes.axhline(0, color="black", linewidth=0.8)
    if not plotted:
        _say_empty(axes, "no adapted documents")
        return
    tokens = np.array([d.tokens for d in plotted], np.float64)
    gains = np.array([d.gain_bpb for d in plotted])
    colours = np.where(gains < 0, LOSS, GAIN)
    axes.scatter(tokens, gains, s=30, alpha=0.6 if len(plotted) < 1000 else 0.2, color=colours, linewidths=0)
    count = int(np.clip(math.isqrt(len(plotted)), 1, 12))
    edges = np.geomspace(tokens.min(), tokens.max() * 1.001, count + 1)[1:-1]
    bins = np.digitize(tokens, edges)
    weight = np.bincount(bins, tokens, count)
    filled = weight > 0
    mean = np.bincount(bins, tokens * gains, count)[filled] / weight[filled]
    # A bin's mark stands at the weighted mean of its documents' log lengths, not at its middle: bins can be wide.
    length = np.exp(np.bincount(bins, tokens * np.log(tokens), count)[filled] / weight[filled])
    line = axes.plot(
        length, mean, "o-", color="#1c1e21", markersize=4, linewidth=1.2, label="token-weighted mean of length bins"
    )
    # 1.6 to either side: wide enough for at least one tick at 1, 2 or 5 times a power of ten, whatever the lengths.
    axes.set_xlim(tokens.min() / 1.6, tokens.max() * 1.6)
    axes.set_xscale("log")
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5) if tokens.max() < 200 * tokens.min() else (1,))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))  # the legend stands above every dot
    axes.grid(alpha=0.3)
    axes.legend(handles=line, loc="upper right", framealpha=0.8)


def _draw_along(axes, below, result: ScoreResult) -> None:
    """A bar for each bin of positions: the mean gain above, and below how many documents reach it."""
    gains = result.token_gains
    bins = np.flatnonzero(gains.targets)
    mean, edges = gains.mean[bins], gains.edges[: len(bins) + 1]
    bars = axes.bar(bins, mean, width=0.9, color=np.where(mean < 0, LOSS, GAIN))
    below_bars = below.bar(bins, gains.reached[bins], width=0.9, color=GREY)
    if len(bins) <= 24:
        axes.bar_label(bars, [f"{value:+.3f}" for value in mean], padding=3, fontsize=10)
        below.bar_label(below_bars, [f"{count:,}" for count in gains.reached[bins]], padding=2, fontsize=10)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.16)
    below.margins(y=0.35)
    axes.set_title(
        f"gain along the documents{leak_of(result)}: mean of base NLL - adapted NLL at each position", fontsize=12
    )
    axes.set_ylabel("bits per token gained", fontsize=11)
    below.set_ylabel("documents", fontsize=11)
    below.set_xlabel("position in the document (tokens; a bar covers those between its two marks)", fontsize=11)
    every = -(-len(edges) // 25)
    below.set_xticks(np.arange(len(edges))[::every] - 0.5, [f"{edge:,}" for edge in edges[::every]])
    below.set_yticks([])
    axes.tick_params(axis="x", length=0)
    for part in (axes, below):
        part.set_xlim(-0.6, max(len(bins), 4) - 0.4)
        part.spines[["top", "right"]].set_visible(False)


def _draw_extremes(axes, result: ScoreResult) -> None:
    """Horizontal bars of the documents that gained most, and below them of those that lost most."""
    gained, lost = (most_first(result.documents, gained)[:BAR_ROWS] for gained in (True, False))
    shown = [*gained, *reversed(lost)]
    axes.set_title(f"documents that gained and lost most{leak_of(result)}: base BPB - adapted BPB", fontsize=12)
    if not shown:
        _say_empty(axes, "no document gained or lost")
        return
    gains = [d.gain_bpb for d in shown]
    bars = axes.barh(range(len(shown)), gains, color=[GAIN if gain > 0 else LOSS for gain in gains], height=0.7)
    axes.set_xlabel("bits per byte gained", fontsize=11)
    axes.bar_label(bars, [signed(gain) for gain in gains], padding=4)
    # Names are not ours: no dollar of theirs starts a formula.
    axes.set_yticks(range(len(shown)), _drawable([short_name(d.name, 44) for d in shown]), parse_math=False)
    axes.set_ylim(max(len(shown), 4) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _say_empty(axes, text: str) -> None:
    axes.text(0.5, 0.55, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=13)
    axes.set_xticks([])
    axes.set_yticks([])


def _drawable(texts: Sequence[str]) -> list[str]:
    """`texts` with a question mark for every character that the picture's font lacks, such as emoji."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return ["".join(c if ord(c) in glyphs else "?" for c in text) for text in texts]
