"""report.html and report.png: one scoring run on one page that needs nothing beside itself.

The page says what was measured (bits per byte before quantisation, after it, and adapted), where the gain comes from,
along the documents and token by token in one of them, what the deadline left out, and on which run. A gain is what the
base model has more than the adapted one: it is positive and drawn upward or to the right, in blue; a loss is negative
and orange. A leaky protocol's page says LEAKY in its banner, its title, its picture
and at every adapted number. The share that was adapted before a deadline stands there, too.

A picture that cannot be drawn, for whatever reason, is left out, and the page says why.
"""

import base64
import codecs
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ..model.storage import attempt, figure_png, new_figure, write_bytes, write_text
from .protocols import LEAK_WARNING, LEAKY, label
from .results import (
    ADAPTED,
    DIVERGED,
    NOT_ADAPTED,
    PARTIAL,
    PICTURE,
    REPORT,
    SHORT,
    DocumentResult,
    ScoreResult,
)

TABLE_ROWS, BAR_ROWS, LISTED = 10, 6, 20
"""Most rows of each table of documents, most bars of each sign in the picture, most names the deadline's list gives."""

WHY_VALID = (
    "Valid score: every chunk's loss is recorded before any update that has seen the chunk, and the learning rate "
    "depends on nothing later, so that no target is scored by weights that were trained on it."
)
GREY, DARK, GREEN, RED = "#9a9fa6", "#565c64", "#55a868", "#c44e52"
GAIN, LOSS = "#2f6fc4", "#d9731a"
"""The colours of gains and losses in the picture; the page's --gain and --loss are the same hues."""

LEVELS = (0.05, 0.25, 1.0, 3.0)
"""Bits from which on a token's gain or loss has the next stronger colour."""

TokenBytes = Callable[[np.ndarray], list[bytes]]
"""Token ids to the bytes of text of each: :meth:`Tokenizer.token_bytes`."""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5f6670; --page: #fff; --card: #f3f4f6; --line: #d8dbe0;
  --gain: 47 111 196; --loss: 217 115 26; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2a9b3; --page: #16181c; --card: #22252b; --line: #3a3f47;
    --gain: 74 144 255; --loss: 245 130 32; }
}
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: var(--ink); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.leak { background: #b3261e; color: #fff; padding: 1rem; border-radius: .5rem; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.card b { display: block; font-size: 1.9rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card .none { font-size: 1.2rem; } code { white-space: nowrap; } .card small, .note { color: var(--soft); }
.wide { overflow-x: auto; } .wide img { width: 100%; min-width: 44rem; border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
.numbers :not(:first-child) { text-align: right; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
td:first-child { min-width: 7rem; }
.text { white-space: pre-wrap; font: .9rem/1.75 ui-monospace, monospace; background: var(--card); padding: .75rem 1rem;
  border-radius: .5rem; max-height: 34rem; overflow-y: auto; unicode-bidi: isolate; tab-size: 4; }
.text span, .legend span { border-radius: .2rem; } .legend span { padding: .1rem .4rem; white-space: nowrap; }
.g1 { background: rgb(var(--gain) / .17); } .g2 { background: rgb(var(--gain) / .3); }
.g3 { background: rgb(var(--gain) / .45); } .g4 { background: rgb(var(--gain) / .62); }
.l1 { background: rgb(var(--loss) / .17); } .l2 { background: rgb(var(--loss) / .3); }
.l3 { background: rgb(var(--loss) / .45); } .l4 { background: rgb(var(--loss) / .62); }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin: 2rem 0 1rem; }
</style>
</head>
<body>
$banner<h1>$heading</h1>
<p>$about</p>$notes
<div class="cards">$cards</div>
<ul>$differences</ul>
$picture
$along
$example
<h2>Documents that gained most$leak</h2>$gained
<h2>Documents that lost most$leak</h2>$lost
<h2>Counts</h2>$counts$left_out
<h2>Time</h2>$seconds
<h2>Run</h2>$facts
<details><summary>Every setting of the test-time training</summary>$config</details>
</body>
</html>
""")


def write_report(
    result: ScoreResult,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
    token_bytes: TokenBytes | None = None,
) -> Path:
    """Write report.html and report.png into `folder`, each atomically, and return the page's path.

    `token_bytes` gives the text of the document that is shown token by token; without it none is shown. Where the
    picture cannot be drawn, there is none, and the page and `say` tell why.
    """
    page, picture = Path(folder) / REPORT, Path(folder) / PICTURE
    missing: list[str] = []
    png = attempt("the picture", lambda: _draw(result), missing.append) or b""
    if png:
        write_bytes(picture, png)
    else:
        picture.unlink(missing_ok=True)  # an earlier run's
        say(missing[0])
    write_text(page, _page(result, png, "".join(missing), token_bytes))
    return page


def _page(result: ScoreResult, png: bytes, missing: str, token_bytes: TokenBytes | None) -> str:
    config, totals, mark = result.config, result.totals(), _mark(result)
    before, base, adapted = (totals[name] for name in ("prequant_bpb", "base_bpb", "adapted_bpb"))
    cards = [
        ("before quantisation", before, "give the run's folder to measure it: <code>--prequant RUN</code>"),
        ("after quantisation", base, "no scored document has text"),
        (f"adapted{mark}", adapted, "no scored document has text"),
    ]
    if _is_hf(result):  # nothing was quantised
        cards = [("base model", *cards[1][1:]), cards[2]]
    heading = f"Bits per byte under {label(config.protocol)}"
    return PAGE.substitute(
        title=escape(f"klora report: {label(config.protocol)}"),
        banner=f'<p class="leak" role="alert">{escape(LEAK_WARNING)}</p>\n' if config.is_leaky else "",
        heading=escape(heading),
        about=escape("Lower is better." if result.why_not_valid else f"Lower is better. {WHY_VALID}"),
        notes="".join(f"\n<p><b>{escape(_clean(_sentence(note)))}</b></p>" for note in result.notes),
        cards="\n".join(_card(*card) for card in cards),
        differences=_differences(result, totals),
        picture=_picture(heading, png, result) if png else f'<p class="note">{escape(_clean(missing))}</p>',
        along=_along(result),
        example=_example(result, token_bytes),
        leak=_leak(result),
        gained=_documents_table(result, _most(result.documents, gained=True)[:TABLE_ROWS]),
        lost=_documents_table(result, _most(result.documents, gained=False)[:TABLE_ROWS]),
        counts=_counts(result),
        left_out=_left_out(result),
        seconds=_time(result),
        facts=_table(("fact", "value"), _flat(result.facts)),
        config=_table(("setting", "value"), _flat({**config.to_dict(), "protocol": label(config.protocol)})),
    )


def _picture(heading: str, png: bytes, result: ScoreResult) -> str:
    along = " and along the documents" if _has_gains(result) else ""
    alt = escape(f"{heading}: the three numbers, the gain by document length{along}, the largest gains and losses")
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<div class="wide" tabindex="0"><img alt="{alt}" src="{source}"></div>'


def _card(name: str, value: float | None, missing: str) -> str:
    number = '<b class="none">not measured</b>' if value is None else f"<b>{value:.4f}</b>"
    return f'<div class="card">{name}{number}<small>{missing if value is None else "bits per byte"}</small></div>'


def _differences(result: ScoreResult, totals: dict[str, Any]) -> str:
    """List items: what quantisation costs, what adaptation gains, and the part of it that the temperature explains."""
    base, mark = totals["base_bpb"], _mark(result)
    gap = _minus(base, totals["prequant_bpb"])
    gain, by_temperature = _minus(base, totals["adapted_bpb"]), _minus(base, totals["base_bpb_at_temperature"])
    share = ", part of it in documents that the deadline left out" if result.deadline_hit else ""
    if not result.deadline_hit and gain is not None and gain > 0 and by_temperature > 0:
        share = f", {by_temperature / gain:.0%} of the gain{mark}"
    is_hf = _is_hf(result)
    items = [
        *([] if is_hf else [f"Quantisation gap (after - before): {_signed(gap)}"]),
        f"Gain by adaptation{mark} ({'base model' if is_hf else 'after quantisation'} - adapted; positive is better): "
        f"{_signed(gain)}",
        f"Temperature alone (logits / {result.config.temperature:g} on documents long enough to adapt, nothing "
        f"adapted): {_signed(by_temperature)}{share}",
    ]
    return "\n".join(f"<li>{escape(item)}</li>" for item in items)


def _is_hf(result: ScoreResult) -> bool:
    """Whether a model of transformers was scored."""
    return "hf" in result.facts


def _has_gains(result: ScoreResult) -> bool:
    return result.token_gains is not None and result.token_gains.documents > 0


def _along(result: ScoreResult) -> str:
    """What the picture of the gain along the documents is over, and which documents are not in it."""
    adapted = sum(d.adapted_share not in (None, 0.0) for d in result.documents)
    counted = result.token_gains.documents if _has_gains(result) else 0
    why = "what a target gained is kept within one run of one process, not over a resume and not by several ranks"
    if not adapted:
        text = "No document was adapted: there is no gain along the documents to draw."
    elif not counted:
        text = f"The gain along the documents is left out: {why}."
    else:
        text = (
            f"The picture of the gain along the documents{_leak(result)} is over {counted:,} adapted documents: at "
            "each position, the mean over those that reach it of base NLL - adapted NLL, in bits per token; positive "
            "is better."
        )
        if result.config.temperature != 1:
            text += " What the temperature alone gains is in it."
        if not result.config.is_leaky:
            of_group = " of a document of the first group" if result.config.starts_learned else ""
            from_a = result.config.phases and not result.config.starts_learned
            what = "the document's own first step" if from_a else "anything was learned"
            text += f" The first {result.config.first_adapted:,} tokens{of_group} are scored before {what}."
        if counted < adapted:
            text += f" {adapted - counted:,} more are left out: {why}."
    return f'<p class="note">{escape(text)}</p>'


def _example(result: ScoreResult, token_bytes: TokenBytes | None) -> str:
    """One document's text, its tokens coloured by what adapting gained there; nothing where none is kept."""
    example = result.token_gains.example if result.token_gains is not None else None
    if example is None or token_bytes is None:
        return ""
    document, leak = result.documents[example.index], _leak(result)
    first, last = example.begin + 1, example.begin + len(example.gain)
    sample = ", a sample by the hash of their names," if example.sampled else ""
    about = (
        f"{_name(document.name, 120)}: tokens {first:,} to {last:,} of {document.tokens:,}. "
        f"Of {example.candidates:,} adapted documents"
        f"{sample} it has the median gain{leak}: {_signed(document.gain_bpb)} bits per byte. "
        "A token's gain is base NLL - adapted NLL in bits; point at a token to read it."
    )
    tokens = "".join(
        f'<span class="{level}" title="{gain:+.2f}">{escape(text)}</span>' if level else escape(text)
        for text, gain, level in _texts(token_bytes(example.tokens)[1:], example.gain)
    )
    return (
        f"<h2>One document: what adapting gained at each token{leak}</h2>\n<p><bdi>{escape(about)}</bdi></p>\n"
        f'{_legend()}\n<div class="text" tabindex="0">{tokens}</div>'
    )


def _legend() -> str:
    marks = [f'<span class="l{i}">-{LEVELS[i - 1]:g}</span>' for i in range(len(LEVELS), 0, -1)]
    marks += [f'<span class="g{i}">+{LEVELS[i - 1]:g}</span>' for i in range(1, len(LEVELS) + 1)]
    return f'<p class="legend">lost {" ".join(marks)} gained (bits, at least)</p>'


def _texts(pieces: Sequence[bytes], gains: np.ndarray) -> Iterator[tuple[str, float, str]]:
    """(text, bits gained, CSS class or none) of tokens; those that end inside a character go with the next ones."""
    decoder, gain = codecs.getincrementaldecoder("utf-8")("replace"), 0.0
    for number, (piece, more) in enumerate(zip(pieces, gains.tolist(), strict=True), start=1):
        gain += more
        text = "".join(
            c if c == "\n" or c == "\t" else _clean(c) for c in decoder.decode(piece, final=number == len(pieces))
        )
        if text:
            level = int(np.searchsorted(LEVELS, abs(gain), side="right"))
            yield text, gain, f"{'g' if gain > 0 else 'l'}{level}" if level else ""
            gain = 0.0


def _documents_table(result: ScoreResult, documents: Sequence[DocumentResult]) -> str:
    leak = _leak(result)
    rows = [
        (_name(d.name, 120), f"{d.tokens:,}", f"{d.base_bpb:.4f}", f"{d.adapted_bpb:.4f}", _signed(d.gain_bpb))
        for d in documents
    ]
    return _table(("document", "tokens", "base BPB", f"adapted BPB{leak}", f"gain{leak}"), rows)


def _counts(result: ScoreResult) -> str:
    """Documents, tokens and bytes of every status, and of all."""
    statuses = [SHORT, ADAPTED, PARTIAL, NOT_ADAPTED]
    statuses += [DIVERGED] if any(d.status == DIVERGED for d in result.documents) else []
    groups = {s: [d for d in result.documents if d.status == s] for s in statuses}
    rows = [
        (status, f"{len(group):,}", f"{sum(d.tokens for d in group):,}", f"{sum(d.bytes for d in group):,}")
        for status, group in {**groups, "all": result.documents}.items()
    ]
    return _table(("documents", "number", "tokens", "bytes"), rows)


def _left_out(result: ScoreResult) -> str:
    """Names of the documents that the deadline kept from being adapted; nothing where there are none."""
    parts = []
    for status, note in ((NOT_ADAPTED, "the base model's score counts"), (PARTIAL, "the base model scored the rest")):
        names = [d.name for d in result.documents if d.status == status]
        if names:
            listed = ", ".join(f"<bdi>{escape(_name(name, 120))}</bdi>" for name in names[:LISTED])
            more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
            parts.append(f"<p><b>{escape(status)}</b>, {note}: {listed}{more}</p>")
    return "\n".join(parts)


def _time(result: ScoreResult) -> str:
    rows = [(f"{phase} (s)", f"{seconds:,.2f}") for phase, seconds in result.seconds.items()]
    tokens = sum(d.tokens for d in result.documents if d.status == ADAPTED)
    if result.seconds.get("adapt") and tokens:
        passes = f", {result.config.passes} passes, each token counted once" if result.config.passes > 1 else ""
        rate = f"{tokens / result.seconds['adapt']:,.0f}"
        rows.append((f"tokens/s of the adapt phase (wholly adapted documents{passes})", rate))
    return _table(("phase", "value"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of escaped text; all columns but the first hold numbers, unless they are headed `value`."""
    lines = [("th", head), *(("td", row) for row in rows)]
    if len(lines) == 1:
        return '<p class="note">none</p>'
    body = "\n".join(
        "<tr>" + "".join(f"<{tag}><bdi>{escape(cell)}</bdi></{tag}>" for cell in cells) + "</tr>"
        for tag, cells in lines
    )
    kind = "texts" if head[1] == "value" else "numbers"
    return f'<div class="wide"><table class="{kind}">\n{body}\n</table></div>'


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of JSON values, nested objects opened."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            rows.append((_clean(f"{prefix}{key}"), _clean(text)))
    return rows


def _draw(result: ScoreResult) -> bytes:
    """The picture as PNG, 1800 pixels wide."""
    along = [1.0] if _has_gains(result) else []
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
        step = (None, _minus(values[1], values[0]), _minus(values[1], values[2]))[i]
        if step is not None:
            text += f"\n{('', 'gap', 'gain')[i]} {_signed(step)}"
        axes.annotate(text, (i, drawn[i]), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=11)
    names = ("before\nquantisation", "after\nquantisation", "\n".join(("adapted", *_marks(result))))
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
    axes.set_title(f"gain by adaptation{_leak(result)}: base BPB - adapted BPB", fontsize=12)
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
        f"gain along the documents{_leak(result)}: mean of base NLL - adapted NLL at each position", fontsize=12
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
    gained, lost = (_most(result.documents, gained)[:BAR_ROWS] for gained in (True, False))
    shown = [*gained, *reversed(lost)]
    axes.set_title(f"documents that gained and lost most{_leak(result)}: base BPB - adapted BPB", fontsize=12)
    if not shown:
        _say_empty(axes, "no document gained or lost")
        return
    gains = [d.gain_bpb for d in shown]
    bars = axes.barh(range(len(shown)), gains, color=[GAIN if gain > 0 else LOSS for gain in gains], height=0.7)
    axes.set_xlabel("bits per byte gained", fontsize=11)
    axes.bar_label(bars, [_signed(gain) for gain in gains], padding=4)
    # Names are not ours: no dollar of theirs starts a formula.
    axes.set_yticks(range(len(shown)), _drawable([_name(d.name, 44) for d in shown]), parse_math=False)
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


def _most(documents: Iterable[DocumentResult], gained: bool) -> list[DocumentResult]:
    """Adapted documents that gained (or lost) anything, the most first."""
    sign = -1 if gained else 1
    kept = [d for d in documents if (d.gain_bpb or 0.0) * sign < 0]
    return sorted(kept, key=lambda d: sign * d.gain_bpb)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.4f}"


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."


def _leak(result: ScoreResult) -> str:
    """What stands behind the label of every adapted number: nothing, or `` (LEAKY)``."""
    return f" ({LEAKY})" if result.config.is_leaky else ""


def _marks(result: ScoreResult) -> list[str]:
    """What every number over all documents that adaptation has touched is marked with: LEAKY, phases, the deadline."""
    marks = LEAKY if result.config.is_leaky else "", result.phases_note, result.deadline_note
    return [f"({mark})" for mark in marks if mark]


def _mark(result: ScoreResult) -> str:
    return "".join(f" {mark}" for mark in _marks(result))


def _clean(text: str) -> str:
    """`text` without what UTF-8 or HTML cannot hold: control characters, line breaks, lone surrogates."""
    kept = "".join(c if c >= " " and not "\x7f" <= c <= "\x9f" else " " for c in text)
    return kept.encode("utf-8", "replace").decode()


def _name(name: str, most: int) -> str:
    """A document's name on one line, its middle left out past `most` characters: the end often tells files apart."""
    name = _clean(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}\u2026{name[-(most // 2) :]}"
