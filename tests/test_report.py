"""report.html and report.png: what they say, that they stand alone, and that no result breaks them."""

import base64
import math
import os
import re
import subprocess
import sys
import time
from contextlib import closing
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import SMALL, randomized
from klora.kernels import BOS_ID
from klora.ttt import token_gains
from klora.ttt.base import BaseNll
from klora.ttt.documents import Document
from klora.ttt.journal import Journal
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.progress import Interrupted
from klora.ttt.protocols import LEAK_WARNING, MIN_NLL, MULTI_EPOCH, SCORE_FIRST, TTTConfig
from klora.ttt.report import write_report
from klora.ttt.results import ADAPTED, NOT_ADAPTED, PARTIAL, SHORT, DocumentResult, ScoreResult
from klora.ttt.token_gains import TokenGains, bin_edges
from oracles.eager import token_nll

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
    whole = [document("long"), document("tiny", 40, 100, SHORT)]
    reader, html = report(tmp_path, result(whole, layout="start"))
    assert "Bits per byte under score_first" in reader.text
    assert "Valid score: every chunk's loss is recorded before any update that has seen the chunk" in reader.text
    assert not re.search("leaky|not a valid score", reader.text, re.IGNORECASE) and 'class="leak"' not in html


def test_a_score_that_is_not_strictly_causal_or_hit_a_deadline_is_not_called_valid(tmp_path):
    reader, html = report(tmp_path, result([document("long")]))
    assert "Not a valid score: with layout=original" in reader.text and "Valid score:" not in reader.text
    assert "leaky" not in reader.text.lower() and 'class="leak"' not in html
    reader, _ = report(tmp_path, result([document("late", status=NOT_ADAPTED)], layout="start"))
    assert "Valid score:" not in reader.text


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("documents", EDGES.values(), ids=EDGES.keys())
def test_edges(tmp_path, documents):
    reader, _ = report(tmp_path, result(documents, seconds={} if len(documents) < 2 else None, facts={}))
    assert ["all", str(len(documents))] in [row[:2] for row in reader.rows]
    if not sum(d.bytes for d in documents):
        assert "adapted not measured no scored document has text" in reader.text


@pytest.mark.slow
def test_documents_of_certain_tokens_are_drawn_upright(tmp_path, drawn):
    """Whose nats are below 0 by rounding."""
    below = {"base": -1e-7, "adapted": -2e-7, "tempered": -1e-7, "before": -1e-7}
    report(tmp_path, result([document(f"doc {i}", 2, 6, **below) for i in range(3)]))
    bottom, top = axes_titled(drawn[0], "bits per byte").get_ylim()
    assert bottom == 0 < top


def test_ten_thousand_documents_are_quick_and_small(tmp_path):
    scored = result(mixed(10_000))
    start = time.process_time()
    reader, html = report(tmp_path, scored)
    assert time.process_time() - start < 10
    assert len(html) < 1_500_000 and len(reader.rows) < 100


@pytest.mark.slow
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

    monkeypatch.setattr("klora.ttt.report.draw", draw)
    said = []
    page = write_report(result([document()]), tmp_path, said.append)
    assert said == ["the picture could not be made (RuntimeError: no <fonts>\n); the results do not need it"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    reader = Reader(page.read_text(encoding="utf-8"))
    assert "the picture could not be made (RuntimeError: no <fonts> )" in reader.text and "img" not in dict(reader.tags)
    assert "adapted 1.1000 bits per byte" in reader.text


@pytest.mark.slow
def test_a_notebooks_backend_that_is_not_installed_ends_no_report_and_no_curve(tmp_path):
    """In a process of its own: matplotlib reads MPLBACKEND when it is imported."""
    code = (
        "import sys; from pathlib import Path; from klora.ttt.protocols import TTTConfig\n"
        "from klora.model.curve import LossCurve\n"
        "from klora.ttt.report import write_report; from klora.ttt.results import DocumentResult, ScoreResult\n"
        "one = DocumentResult('a', 10, 20, 'adapted', 14.0, 13.5, 12.0)\n"
        "write_report(ScoreResult([one], TTTConfig(), {}), Path(sys.argv[1]))\n"
        "curve = LossCurve(Path(sys.argv[1]))\n"
        "curve.add(step=1, loss=2.0)\n"
        "curve.close()"
    )
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file()
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("report.png", "loss.png"))


TTT = TTTConfig(chunk=16, window=64, min_tokens=32, lora_rank=2, head_rank=3, epochs=2, deadline=0.0, batch=4)


def scored_document(targets, seed=0, name=None, text_bytes=None):
    tokens = np.random.default_rng(seed).integers(3, SMALL.vocab_size, targets + 1).astype(np.uint16)
    tokens[0] = BOS_ID
    return Document(name or f"{seed}-{targets}", tokens, 2 * targets if text_bytes is None else text_bytes)


def gained(gains, config=TTT, **settings):
    """A result whose documents gained `gains` bits at each of their targets, and its documents."""
    documents = [scored_document(len(gain), i, f"d{i}") for i, gain in enumerate(gains)]
    kept = TokenGains(documents, config)
    results = []
    for i, gain in enumerate(gains):
        nats = np.asarray(gain) * math.log(2)
        kept.add(i, nats + 1.0, np.ones(len(nats)))
        base, adapted = float(nats.sum() + len(nats)), float(len(nats))
        size = documents[i].bytes
        results.append(DocumentResult(f"d{i}", len(nats), size, ADAPTED, base, base, adapted, base))
    kept.choose(documents, results)
    return ScoreResult(results, config, {"adapt": 1.0}, {}, kept), documents


def letters(ids):
    return [b"" if i == BOS_ID else bytes([97 + int(i) % 26]) for i in ids]


def with_gains(folder, scored, token_bytes=letters):
    page = write_report(scored, folder, token_bytes=token_bytes)
    html = page.read_text(encoding="utf-8")
    return Reader(html), html


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def axes_titled(figure, start):
    return next(axes for axes in figure.axes if axes.get_title().startswith(start))


def test_bins_are_of_whole_chunks_two_a_doubling_and_cover_the_longest_document():
    assert bin_edges(16, 100).tolist() == [0, 16, 32, 48, 64, 96, 128]
    assert bin_edges(16, 0).tolist() == bin_edges(16, 16).tolist() == [0, 16]
    for longest in range(1, 300):
        edges = bin_edges(4, longest)
        assert edges[-2] < longest <= edges[-1] and (np.diff(edges) > 0).all() and not (edges % 4).any()
    assert len(bin_edges(1, 2**30)) < 64


def test_the_gain_along_documents_is_the_mean_over_those_that_reach_a_position():
    config = TTTConfig(chunk=2, window=8, min_tokens=2)
    scored, _ = gained([[1.0, 1.0, 2.0], [3.0, 3.0, 5.0, 7.0, -4.0]], config)
    kept = scored.token_gains
    assert kept.edges.tolist() == [0, 2, 4, 6]
    assert kept.mean == pytest.approx([2.0, 14 / 3, -4.0])
    assert kept.targets.tolist() == [4, 3, 1] and kept.reached.tolist() == [2, 2, 1] and kept.documents == 2
    kept.add(0, np.zeros(0), np.zeros(0))
    assert kept.documents == 2, "a document of which nothing was reached"


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [SCORE_FIRST, MULTI_EPOCH, MIN_NLL])
def test_a_run_keeps_the_gain_of_every_target(protocol):
    documents = [scored_document(n, n) for n in (200, 20, 90, 130, 33, 48)]
    config, model = TTT.override({"protocol": protocol}), randomized()
    scored = score(ScoreRequest(model, documents, config))
    gains, long = scored.token_gains, [d for d in scored.documents if d.status == ADAPTED]
    bits = sum(d.base_nats - d.adapted_nats for d in long) / math.log(2)
    assert gains.documents == len(long) == 5 and gains.targets.sum() == sum(d.tokens for d in long)
    assert gains.gain.sum() == pytest.approx(bits, rel=1e-4, abs=1e-3)
    example = gains.example
    assert example.begin == config.chunk and len(example.gain) == documents[example.index].targets - config.chunk
    assert example.tokens.tolist() == documents[example.index].tokens[config.chunk :].tolist()
    assert "token_gains" not in scored.to_json()
    expected, base = TokenGains(documents, config), BaseNll(model, documents, config)
    for index, one in enumerate(scored.documents):
        if one.status == ADAPTED:
            begin = base.offsets[index] + 1
            adapted = token_nll(model, documents[index], config)[one.kept_pass]
            expected.add(index, base.nll[begin : begin + one.tokens], adapted)
    expected.choose(documents, scored.documents)
    assert gains.gain == pytest.approx(expected.gain, rel=1e-3, abs=1e-3)
    assert example.index == expected.example.index and example.gain == pytest.approx(expected.example.gain, abs=1e-3)


def test_the_document_is_the_median_gainer_of_a_sample_that_no_score_chooses(monkeypatch):
    gains = [[g] * 40 for g in (0.5, -1.0, 0.25, 2.0, 0.125)]
    assert gained(gains)[0].token_gains.example.index == 2
    assert gained(gains[:4])[0].token_gains.example.index == 2, "the lower of two in the middle"
    assert gained([gains[0]] * 5)[0].token_gains.example.index == 2, "of equal gains by index"
    monkeypatch.setattr(token_gains, "CANDIDATES", 3)
    sampled = [gained([[sign * (i + 1.0)] * 40 for i in range(20)])[0].token_gains for sign in (1, -1)]
    assert sampled[0].example.sampled and sampled[0].example.candidates == 3
    assert sampled[0].example.index == sampled[1].example.index


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(token_gains, "CANDIDATES", 8)
    monkeypatch.setattr(token_gains, "SHOWN", 50)
    documents = [scored_document(1000, i) for i in range(100)]
    kept = TokenGains(documents, TTT)
    for i in range(100):
        kept.add(i, np.ones(1000, np.float32), np.zeros(1000, np.float32))
    arrays = [gain for _, gain in kept._kept.values()]
    assert len(arrays) == 8 and all(a.nbytes == 200 and (a.base is None or a.base.nbytes == 200) for a in arrays)
    assert len(kept.edges) < 20
    results = [DocumentResult(d.name, 1000, 2000, ADAPTED, 1000.0, 1000.0, 0.0) for d in documents]
    kept.choose(documents, results)
    assert not kept._kept and (kept.example.begin, len(kept.example.tokens)) == (950, 51)


def test_a_token_is_coloured_by_its_gain_and_its_text_is_escaped(tmp_path):
    gain = [0.0] * 16 + [5.0, -5.0, 0.2, -0.2, 0.02, 0.3, 0.4] + [0.0] * 17
    scored, _ = gained([gain])
    texts = iter([b"<b>", b"&amp;", b"'\"", b"\x00\x1b", b"\n\t", b"\xc3", b"\xa9", *[b"z"] * 17])
    reader, html = with_gains(tmp_path, scored, lambda ids: [b"before", *(next(texts) for _ in ids[1:])])
    body = html.partition('<div class="text"')[2].partition("</div>")[0]
    assert '<span class="g4" title="+5.00">&lt;b&gt;</span><span class="l4" title="-5.00">&amp;amp;</span>' in body
    assert '<span class="g1" title="+0.20">&#x27;&quot;</span><span class="l1" title="-0.20">  </span>\n\t' in body
    assert '<span class="g2" title="+0.70">\u00e9</span>zzz' in body, "a character's bytes are one piece"
    assert "before" not in body and "<b>" not in body
    assert "d0: tokens 17 to 40 of 40. Of 1 adapted documents it has the median gain" in reader.text
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert all(f".{sign}{level} {{" in style for sign in "gl" for level in range(1, 5))


@pytest.mark.slow
def test_signs_agree_between_picture_page_and_lists(tmp_path, drawn):
    """Blue, upward and plus for a gain; orange, downward and minus for a loss."""
    for folder, sign in (("won", 2.0), ("lost", -2.0)):
        (tmp_path / folder).mkdir()
        reader, html = with_gains(tmp_path / folder, gained([[sign] * 40] * 3)[0])
        figure = drawn.pop()
        along, extremes = axes_titled(figure, "gain along"), axes_titled(figure, "documents that gained")
        heights = [bar.get_height() for bar in along.patches]
        assert heights == pytest.approx([sign] * 3) and along.get_ylabel() == "bits per token gained"
        assert [bar.get_width() * sign > 0 for bar in extremes.patches] == [True] * 3
        assert extremes.get_xlabel() == axes_titled(figure, "gain by").get_ylabel() == "bits per byte gained"
        colours = {bar.get_facecolor() for axes in (along, extremes) for bar in axes.patches}
        assert len(colours) == 1 and (next(iter(colours))[2] > next(iter(colours))[0]) == (sign > 0)
        text = f"{sign / 2:+.4f}"
        assert any(f"gain {text}" in t.get_text() for t in axes_titled(figure, "bits per byte").texts)
        assert f"positive is better): {text}" in reader.text and ["d0", "40", *reader.rows[1][2:4], text] in reader.rows
        body = html.partition('<div class="text"')[2].partition("</div>")[0]
        assert set(re.findall('class="(..)"', body)) == {"g3" if sign > 0 else "l3"}


@pytest.mark.parametrize("protocol", [MULTI_EPOCH, MIN_NLL])
def test_the_gains_of_a_leaky_protocol_are_labelled(tmp_path, drawn, protocol):
    reader, html = with_gains(tmp_path, gained([[1.0] * 40] * 3, TTT.override({"protocol": protocol}))[0])
    assert "gain along the documents (LEAKY): mean" in axes_titled(drawn[0], "gain along").get_title()
    assert "The picture of the gain along the documents (LEAKY) is over 3" in reader.text
    heads = re.findall("<h2>(.*?)</h2>", html)
    assert [head.endswith("(LEAKY)") for head in heads if "gain" in head or "lost" in head] == [True] * 3
    assert "median gain (LEAKY)" in reader.text and "before anything was learned" not in reader.text


@pytest.mark.slow
def test_what_a_resumed_run_did_not_keep_is_left_out_and_said(tmp_path):
    documents = [scored_document(n, n) for n in (200, 90, 130, 33, 48, 60)]
    seen = []

    def stop():
        return any(done >= 400 for phase, done in seen if phase == "adapt")

    def progress(phase, done, total):
        seen.append((phase, done))

    with closing(Journal(tmp_path / "journal.jsonl", "f", False)) as journal, pytest.raises(Interrupted):
        score(ScoreRequest(randomized(), documents, TTT, journal, should_stop=stop, progress=progress))
    before = len(journal.done)
    with closing(Journal(tmp_path / "journal.jsonl", "f", True)) as journal:
        scored = score(ScoreRequest(randomized(), documents, TTT, journal))
    (tmp_path / "page").mkdir()
    reader, _ = with_gains(tmp_path / "page", scored)
    assert 0 < before < 6 and scored.token_gains.documents == 6 - before
    assert f"{before} more are left out: what a target gained is kept within one run of one process" in reader.text
    reader, _ = with_gains(tmp_path / "page", result([document()]))
    assert "The gain along the documents is left out: what a target gained is kept" in reader.text


def test_keeping_gains_ends_no_run(monkeypatch):
    def broken(*_):
        raise RuntimeError("no memory")

    for name in ("add", "choose"):
        monkeypatch.setattr(TokenGains, name, broken)
    said = []
    scored = score(ScoreRequest(randomized(), [scored_document(60)], TTT, say=said.append))
    assert scored.documents[0].status == ADAPTED and len(said) == 3 and said[0].startswith("engine: ")
    assert said[1].startswith("the gain along the documents could not be made")
