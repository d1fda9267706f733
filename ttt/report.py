"""report.html and report.png: one scoring run on one page that needs nothing beside itself.

The page says what was measured (bits per byte before quantisation, after it, and adapted), where the gain comes from,
along the documents and token by token in one of them, what the deadline left out, and on which run. A gain is what the
base model has more than the adapted one: it is positive, and blue; a loss is negative, and orange. A leaky protocol's
page says LEAKY in its banner, its title, its picture and at every adapted number. The share that was adapted before a
deadline stands there, too.

A picture (picture.py) that cannot be drawn, for whatever reason, is left out, and the page says why.
"""

import base64
import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ..model.storage import attempt, write_bytes, write_text
from .labels import clean, leak_of, mark_of, minus, most_first, short_name, signed
from .picture import draw
from .protocols import LEAK_WARNING, label
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

TABLE_ROWS, LISTED = 10, 20
"""Most rows of each table of documents, and most names that the deadline's list gives."""

WHY_VALID = (
    "Valid score: every chunk's loss is recorded before any update that has seen the chunk, and the learning rate "
    "depends on nothing later, so that no target is scored by weights that were trained on it."
)

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
    png = attempt("the picture", lambda: draw(result), missing.append) or b""
    if png:
        write_bytes(picture, png)
    else:
        picture.unlink(missing_ok=True)  # an earlier run's
        say(missing[0])
    write_text(page, _page(result, png, "".join(missing), token_bytes))
    return page


def _page(result: ScoreResult, png: bytes, missing: str, token_bytes: TokenBytes | None) -> str:
    config, totals, mark = result.config, result.totals(), mark_of(result)
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
        notes="".join(f"\n<p><b>{escape(clean(_sentence(note)))}</b></p>" for note in result.notes),
        cards="\n".join(_card(*card) for card in cards),
        differences=_differences(result, totals),
        picture=_picture(heading, png, result) if png else f'<p class="note">{escape(clean(missing))}</p>',
        along=_along(result),
        example=_example(result, token_bytes),
        leak=leak_of(result),
        gained=_documents_table(result, most_first(result.documents, gained=True)[:TABLE_ROWS]),
        lost=_documents_table(result, most_first(result.documents, gained=False)[:TABLE_ROWS]),
        counts=_counts(result),
        left_out=_left_out(result),
        seconds=_time(result),
        facts=_table(("fact", "value"), _flat(result.facts)),
        config=_table(("setting", "value"), _flat({**config.to_dict(), "protocol": label(config.protocol)})),
    )


def _picture(heading: str, png: bytes, result: ScoreResult) -> str:
    along = " and along the documents" if result.has_gains else ""
    alt = escape(f"{heading}: the three numbers, the gain by document length{along}, the largest gains and losses")
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<div class="wide" tabindex="0"><img alt="{alt}" src="{source}"></div>'


def _card(name: str, value: float | None, missing: str) -> str:
    number = '<b class="none">not measured</b>' if value is None else f"<b>{value:.4f}</b>"
    return f'<div class="card">{name}{number}<small>{missing if value is None else "bits per byte"}</small></div>'


def _differences(result: ScoreResult, totals: dict[str, Any]) -> str:
    """List items: what quantisation costs, what adaptation gains, and the part of it that the temperature explains."""
    base, mark = totals["base_bpb"], mark_of(result)
    gap = minus(base, totals["prequant_bpb"])
    gain, by_temperature = minus(base, totals["adapted_bpb"]), minus(base, totals["base_bpb_at_temperature"])
    share = ", part of it in documents that the deadline left out" if result.deadline_hit else ""
    if not result.deadline_hit and gain is not None and gain > 0 and by_temperature > 0:
        share = f", {by_temperature / gain:.0%} of the gain{mark}"
    is_hf = _is_hf(result)
    items = [
        *([] if is_hf else [f"Quantisation gap (after - before): {signed(gap)}"]),
        f"Gain by adaptation{mark} ({'base model' if is_hf else 'after quantisation'} - adapted; positive is better): "
        f"{signed(gain)}",
        f"Temperature alone (logits / {result.config.temperature:g} on documents long enough to adapt, nothing "
        f"adapted): {signed(by_temperature)}{share}",
    ]
    return "\n".join(f"<li>{escape(item)}</li>" for item in items)


def _is_hf(result: ScoreResult) -> bool:
    """Whether a model of transformers was scored."""
    return "hf" in result.facts


def _along(result: ScoreResult) -> str:
    """What the picture of the gain along the documents is over, and which documents are not in it."""
    adapted = sum(d.adapted_share not in (None, 0.0) for d in result.documents)
    counted = result.token_gains.documents if result.has_gains else 0
    why = "what a target gained is kept within one run of one process, not over a resume and not by several ranks"
    if not adapted:
        text = "No document was adapted: there is no gain along the documents to draw."
    elif not counted:
        text = f"The gain along the documents is left out: {why}."
    else:
        text = (
            f"The picture of the gain along the documents{leak_of(result)} is over {counted:,} adapted documents: at "
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
    document, leak = result.documents[example.index], leak_of(result)
    first, last = example.begin + 1, example.begin + len(example.gain)
    sample = ", a sample by the hash of their names," if example.sampled else ""
    about = (
        f"{short_name(document.name, 120)}: tokens {first:,} to {last:,} of {document.tokens:,}. "
        f"Of {example.candidates:,} adapted documents"
        f"{sample} it has the median gain{leak}: {signed(document.gain_bpb)} bits per byte. "
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
            c if c == "\n" or c == "\t" else clean(c) for c in decoder.decode(piece, final=number == len(pieces))
        )
        if text:
            level = int(np.searchsorted(LEVELS, abs(gain), side="right"))
            yield text, gain, f"{'g' if gain > 0 else 'l'}{level}" if level else ""
            gain = 0.0


def _documents_table(result: ScoreResult, documents: Sequence[DocumentResult]) -> str:
    leak = leak_of(result)
    rows = [
        (short_name(d.name, 120), f"{d.tokens:,}", f"{d.base_bpb:.4f}", f"{d.adapted_bpb:.4f}", signed(d.gain_bpb))
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
            listed = ", ".join(f"<bdi>{escape(short_name(name, 120))}</bdi>" for name in names[:LISTED])
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
            rows.append((clean(f"{prefix}{key}"), clean(text)))
    return rows


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."
