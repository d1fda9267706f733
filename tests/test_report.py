"""report.html and report.png: what they say, that they stand alone, and that no result breaks them."""

import base64
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from klora.ttt.protocols import LEAK_WARNING, MIN_NLL, MULTI_EPOCH, SCORE_FIRST, TTTConfig
from klora.ttt.report import write_report
from klora.ttt.results import ADAPTED, NOT_ADAPTED, PARTIAL, SHORT, DocumentResult, ScoreResult

pytestmark = pytest.mark.filterwarnings("error")

VOID = {"meta", "img", "br"}
FACTS = {
    "artifact": {"path": "runs/a & b/model", "bytes": 15_530_112, "sha256": "9f86d0"},
    "device": "cpu",
    "gpus": [0, 1],
}


def document(
    name="doc", tokens=1000, text_bytes=2400, status=ADAPTED, base=1.2, adapted=1.1, tempered=1.19, before=1.18
):
    """A document from its bits per byte."""
    nats = [None if bpb is None else bpb * math.log(2) * text_bytes for bpb in (base, tempered, adapted, before)]
    return DocumentResult(name, tokens, text_bytes, status, *nats)


def result(documents, protocol=SCORE_FIRST, seconds=None, facts=FACTS, **settings):
    seconds = {"base": 1.5, "prequant": 1.25, "adapt": 4.0} if seconds is None else seconds
    return ScoreResult(documents, TTTConfig(protocol=protocol, **settings), seconds, facts)


class Reader(HTMLParser):
    """Text, tags with attributes, and rows of cells; fails on an unbalanced tag."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.rows, self.parts = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def report(folder, scored):
    """Write the report of `scored`; the page read back, after the checks that every page and picture must pass."""
    page, picture = write_report(scored, folder), folder / "report.png"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.png"]
    html, png = page.read_text(encoding="utf-8"), picture.read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (1800, 1350)
    assert 20_000 < len(png) < 1_000_000
    reader = Reader(html)
    links = [attrs[name] for _, attrs in reader.tags for name in ("src", "href", "srcset", "data") if name in attrs]
    assert len(links) == 1 and base64.b64decode(links[0].removeprefix("data:image/png;base64,")) == png
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "base", "form"}
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    return reader, html


def mixed(count=60, seed=0):
    """Documents of every status."""
    random = np.random.default_rng(seed)
    documents = []
    for i in range(count):
        status = (SHORT, ADAPTED, ADAPTED, ADAPTED, PARTIAL, NOT_ADAPTED)[i % 6]
        tokens = int(random.integers(20, 500) if status == SHORT else np.exp(random.uniform(6.3, 10)))
        adapted = 1.2 - (random.normal(0.02, 0.03) if status in (ADAPTED, PARTIAL) else 0)
        tempered = 1.2 if status == SHORT else 1.195
        documents.append(document(f"d{i}", tokens, 2 * tokens, status, adapted=adapted, tempered=tempered))
    return documents


def test_headline_numbers_and_their_differences(tmp_path):
    write_report(result([document("replaced", adapted=1.0)], MIN_NLL), tmp_path)
    reader, _ = report(tmp_path, result([document("a"), document("b", adapted=1.12)]))
    assert (
        "before quantisation 1.1800 bits per byte after quantisation 1.2000 bits per byte adapted 1.1100" in reader.text
    )
    assert "Quantisation gap (after - before): +0.0200" in reader.text
    assert "Gain by adaptation (after quantisation - adapted; positive is better): +0.0900" in reader.text
    assert (
        "Temperature alone (logits / 0.98" in reader.text
        and "nothing adapted): +0.0100, 11% of the gain" in reader.text
    )
    assert "replaced" not in reader.text


def test_score_first_says_why_it_is_valid_and_nothing_of_a_leak(tmp_path):
    reader, html = report(tmp_path, result(mixed()))
    assert "Bits per byte under score_first" in reader.text
    assert "Valid score: every chunk's loss is recorded before any update that has seen the chunk" in reader.text
    assert not re.search("leaky", reader.text, re.IGNORECASE) and 'class="leak"' not in html


@pytest.mark.parametrize("protocol", [MULTI_EPOCH, MIN_NLL])
def test_a_leaky_protocol_is_labelled_everywhere(tmp_path, protocol, monkeypatch):
    drawn = set()
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        drawn.update(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", spy)
    reader, html = report(tmp_path, result([d for d in mixed() if d.status in (ADAPTED, SHORT)], protocol))
    assert f"<title>klora report: {protocol} (LEAKY)</title>" in html
    body = reader.text.partition(f"klora report: {protocol} (LEAKY)")[2].strip()
    assert body.startswith(LEAK_WARNING), "the banner comes first"
    assert "Valid score" not in body
    assert f"Bits per byte under {protocol} (LEAKY)" in body
    assert re.search(r"\d% of the gain \(LEAKY\)", body)
    assert re.search(r"adapted \(LEAKY\) \d\.\d{4} bits per byte", body) and "Gain by adaptation (LEAKY)" in body
    heads = [row for row in reader.rows if "tokens" in row and "base BPB" in row]
    assert heads == [["document", "tokens", "base BPB", "adapted BPB (LEAKY)", "gain (LEAKY)"]] * 2
    assert ["protocol", f"{protocol} (LEAKY)"] in reader.rows
    image = next(attrs for tag, attrs in reader.tags if tag == "img")
    assert "LEAKY" in image["alt"]
    assert f"klora: {protocol} (LEAKY)" in drawn and "adapted\n(LEAKY)" in drawn
    assert all("LEAKY" in text for text in drawn if text.startswith(("adapted", "gain", "documents that")))
    assert sum(text.startswith(("adapted", "gain", "documents that")) for text in drawn) == 3


def test_without_a_model_before_quantisation_it_says_how_to_get_the_number(tmp_path):
    reader, _ = report(tmp_path, result([document(before=None)], seconds={"base": 1.0}))
    assert "before quantisation not measured give the run's folder to measure it: --prequant RUN" in reader.text
    assert "Quantisation gap (after - before): not measured" in reader.text
    assert "+0.1000" in reader.text


def test_counts_times_facts_and_config(tmp_path):
    documents = [
        document("s", tokens=100, text_bytes=250, status=SHORT, adapted=1.2, tempered=1.2),
        document("a", tokens=1000, text_bytes=2500),
        document("b", tokens=3000, text_bytes=7000),
        document("c", tokens=2000, text_bytes=5000, status=PARTIAL),
    ]
    reader, html = report(tmp_path, result(documents, lr=0.0125))
    for row in (
        ["short", "1", "100", "250"],
        ["adapted", "2", "4,000", "9,500"],
        ["partly adapted (deadline)", "1", "2,000", "5,000"],
        ["not adapted (deadline)", "0", "0", "0"],
        ["all", "4", "6,100", "14,750"],
        ["base (s)", "1.50"],
        ["prequant (s)", "1.25"],
        ["adapt (s)", "4.00"],
        ["tokens/s of the adapt phase (wholly adapted documents)", "1,000"],
        ["artifact.path", "runs/a & b/model"],
        ["artifact.bytes", "15530112"],
        ["device", "cpu"],
        ["gpus", "[0, 1]"],
    ):
        assert row in reader.rows
    details = html.partition("<details>")[2].partition("</details>")[0]
    assert Reader(details).rows[1:] == [
        [name, value if name == "protocol" else f"{value}"] for name, value in TTTConfig(lr=0.0125).to_dict().items()
    ]


def test_documents_that_the_deadline_left_out_are_named_up_to_twenty(tmp_path):
    documents = [document(f"late{i:02d}", status=NOT_ADAPTED, adapted=1.2) for i in range(25)]
    reader, _ = report(tmp_path, result([*documents, document("half", status=PARTIAL)]))
    assert "late19 and 5 more" in reader.text and "late20" not in reader.text
    assert "partly adapted (deadline) , the base model scored the rest: half" in reader.text
    assert "part of it in documents that the deadline left out" in reader.text and "of the gain" not in reader.text


def test_tables_rank_by_gain_and_are_capped(tmp_path):
    gains = [*(0.01 * i for i in range(1, 15)), *(-0.01 * i for i in range(1, 4)), 0.0]
    reader, _ = report(tmp_path, result([document(f"g{gain:+.2f}", adapted=1.2 - gain) for gain in gains]))
    gained, lost = ([row[0] for row in reader.rows if re.match(rf"g\{sign}0", row[0])] for sign in "+-")
    assert gained == [f"g+{0.01 * i:.2f}" for i in range(14, 4, -1)]
    assert lost == ["g-0.03", "g-0.02", "g-0.01"]
    assert ["g+0.14", "1,000", "1.2000", "1.0600", "+0.1400"] in reader.rows


NAMES = [
    "<script>alert('x')</script>",
    "a\"b'c&amp;<b>bold",
    "party \U0001f389 \U0001f469\u200d\U0001f680 \u6f22\u5b57 \u0627\u0644\u0639",
    "$\\frac{1}{$ and $x_1$",
    "long/" * 200 + "end.txt",
    "two\nlines\tand\x00null\x85",
    "lone \udcff surrogate",
    "\u202egnp.exe",
    "${title} $picture",
    "",
]


def test_names_are_escaped_shortened_and_drawable(tmp_path):
    for status in (ADAPTED, NOT_ADAPTED):
        documents = [document(name, adapted=1.2 - 0.01 * (i - 4.5), status=status) for i, name in enumerate(NAMES)]
        reader, html = report(tmp_path, result(documents, facts={"<i>": "<u>&", "x": {"y": "\udcff</td>"}}))
        assert "<script" not in html and "<b>bold" not in html and "<i>" not in html and "<u>" not in html
        assert "<script>alert('x')</script>" in reader.text and "a\"b'c&amp;<b>bold" in reader.text
        assert "\U0001f389" in reader.text and "${title} $picture" in reader.text
        assert "two lines and null" in reader.text
        assert "long/" * 40 not in reader.text and "end.txt" in reader.text
        assert ["<i>", "<u>&"] in reader.rows and ["x.y", "?</td>"] in reader.rows


EDGES = {
    "nothing": [],
    "one adapted": [document()],
    "none adapted": [document(tokens=10, status=SHORT, adapted=1.2), document(status=NOT_ADAPTED, adapted=1.2)],
    "no bytes": [document(text_bytes=0), document(tokens=0, text_bytes=0, status=SHORT)],
    "some without bytes, tokens or prequant": [document(text_bytes=0), document(tokens=0), document(before=None)],
    "all the same length and gain": [document()] * 50,
    "gain of zero": [document(adapted=1.2)] * 4,
    "all lost": [document(adapted=1.5)] * 4,
    "lengths from 1 to 100 million": [document(tokens=10**i) for i in range(9)],
    "no loss at all": [document(base=0.0, adapted=0.0, tempered=0.0, before=0.0)],
    "not finite": [document(adapted=math.nan), document(adapted=math.inf), document(base=math.nan), document()],
}


@pytest.mark.parametrize("documents", EDGES.values(), ids=EDGES.keys())
def test_edges(tmp_path, documents):
    reader, _ = report(tmp_path, result(documents, seconds={} if len(documents) < 2 else None, facts={}))
    assert ["all", str(len(documents))] in [row[:2] for row in reader.rows]
    if not sum(d.bytes for d in documents):
        assert "adapted not measured no scored document has text" in reader.text


def test_ten_thousand_documents_are_quick_and_small(tmp_path):
    scored = result(mixed(10_000))
    start = time.process_time()
    reader, html = report(tmp_path, scored)
    assert time.process_time() - start < 10
    assert len(html) < 1_500_000 and len(reader.rows) < 100


def test_the_share_adapted_before_the_deadline_stands_at_every_number(tmp_path, monkeypatch):
    drawn = set()
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        drawn.update(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", spy)
    documents = [document("a", 250), document("b", 750, status=NOT_ADAPTED, adapted=1.2)]
    reader, _ = report(tmp_path, result(documents))
    assert "adapted (deadline: 25.0% adapted) 1.1500 bits per byte" in reader.text
    assert "Gain by adaptation (deadline: 25.0% adapted) (after quantisation" in reader.text
    assert "adapted\n(deadline: 25.0% adapted)" in drawn
    drawn.clear()
    reader, _ = report(tmp_path, result(documents, MIN_NLL))
    assert "adapted (LEAKY) (deadline: 25.0% adapted) 1.1500 bits per byte" in reader.text
    assert "adapted\n(LEAKY)\n(deadline: 25.0% adapted)" in drawn
    reader, html = report(tmp_path, result(documents[:1]))
    assert "deadline:" not in html.partition("<details>")[0] and "adapted 1.1000 bits per byte" in reader.text


def test_a_picture_that_cannot_be_drawn_is_left_out_and_said(tmp_path, monkeypatch):
    write_report(result([document()]), tmp_path)  # an earlier run's picture must not stand for this one

    def draw(scored):
        raise RuntimeError("no <fonts>\n")

    monkeypatch.setattr("klora.ttt.report._draw", draw)
    said = []
    page = write_report(result([document()]), tmp_path, said.append)
    assert said == ["the picture could not be made (RuntimeError: no <fonts>\n); the results do not need it"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    reader = Reader(page.read_text(encoding="utf-8"))
    assert "the picture could not be made (RuntimeError: no <fonts> )" in reader.text and "img" not in dict(reader.tags)
    assert "adapted 1.1000 bits per byte" in reader.text


def test_a_notebooks_backend_ends_no_report(tmp_path):
    """In a process of its own: matplotlib reads MPLBACKEND when it is imported."""
    code = (
        "import sys; from pathlib import Path; from klora.ttt.protocols import TTTConfig\n"
        "from klora.ttt.report import write_report; from klora.ttt.results import DocumentResult, ScoreResult\n"
        "one = DocumentResult('a', 10, 20, 'adapted', 14.0, 13.5, 12.0)\n"
        "write_report(ScoreResult([one], TTTConfig(), {}), Path(sys.argv[1]))"
    )
    env = {**os.environ, "MPLBACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file() and (tmp_path / "report.png").is_file()
