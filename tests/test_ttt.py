"""Adapting to documents: what is scored when, what a document may depend on, and what must be called LEAKY."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import SMALL, randomized
from klora.kernels import BOS, lora_adam_ref_
from klora.model.config import ConfigError, preset
from klora.ttt.adapters import AdapterLayout, AdapterPool
from klora.ttt.base import MICRO_TOKENS, BaseNll
from klora.ttt.documents import Document, chunk_windows
from klora.ttt.journal import Journal, JournalError, fingerprint
from klora.ttt.protocols import LEAKY, TTTConfig, label, learning_rate, ttt_preset
from klora.ttt.results import (
    ADAPTED,
    NOT_ADAPTED,
    PARTIAL,
    SHORT,
    DocumentResult,
    ScoreResult,
    read_documents_csv,
)
from klora.ttt.score import Interrupted, NonFiniteScore, score_documents
from klora.ttt.scorer import Batch, Deadline, adapt_batch

TTT = TTTConfig(chunk=16, window=64, min_tokens=32, lora_rank=2, head_rank=3, epochs=2, deadline=0.0, batch=4)


def document(targets: int, seed: int = 0) -> Document:
    tokens = np.random.default_rng(seed).integers(3, SMALL.vocab_size, targets + 1).astype(np.uint16)
    tokens[0] = BOS
    return Document(f"{seed}-{targets}", tokens, bytes=2 * targets)


def score(documents, tmp_path, config=TTT, model=None, resume=False, **options) -> ScoreResult:
    model = model or randomized()
    key = fingerprint("artifact", documents, config, False)
    journal = Journal(tmp_path / "journal.jsonl", key, resume, overwrite=not resume)
    try:
        return score_documents(model, documents, config, journal, **options)
    finally:
        journal.close()


def adapted_nats(result: ScoreResult) -> list[float]:
    return [d.adapted_nats for d in result.documents]


def naive_score_first(model, doc: Document, config: TTTConfig) -> tuple[float, list[float]]:
    """One document alone, chunk by chunk, with torch's own Adam: total nats and nats of each chunk."""
    layout = AdapterLayout(model.config, config)
    params = [
        layout.initial(config.adapter_seed)[p.start : p.stop].view(1, *p.shape).to(model.embed.dtype).requires_grad_()
        for p in layout.parts
    ]
    # torch.optim has one learning rate a tensor, so every row with a factor of its own is stepped as its own tensor.
    factors = [p.group_lr for p in layout.parts]
    pool = AdapterPool(model.config, config, 1, torch.device("cpu"), model.embed.dtype)
    tokens = torch.from_numpy(doc.tokens.astype(np.int64))
    chunks, state = [], {}
    count = -(-doc.targets // config.chunk)
    for j in range(count):
        end = min((j + 1) * config.chunk, doc.targets)
        start = max(0, end - config.window)
        first = j * config.chunk
        for step in range(config.steps_per_chunk):
            for part, view in zip(params, pool.views(pool.params, 1), strict=True):
                view.copy_(part.detach())
            adapters, (head_a, head_b) = pool.adapters(1)
            hidden = model.hidden(tokens[None, start:end], adapters)[0, first - start :]
            z = hidden @ model.embed.T + hidden @ head_a[0].T @ head_b[0].T
            logits = model.config.softcap * torch.tanh(z / model.config.softcap) / config.temperature
            nll = -logits.log_softmax(-1).gather(1, tokens[first + 1 : end + 1, None])[:, 0]
            if step == 0:
                chunks.append(nll.sum().item())
            if j == count - 1:
                break
            gradients = torch.autograd.grad(nll.mean(), pool._leaves)
            for i, (part, gradient) in enumerate(zip(params, gradients, strict=True)):
                m, v, t = state.get(i, (0.0, 0.0, 0))
                m, v, t = (
                    config.beta1 * m + (1 - config.beta1) * gradient,
                    config.beta2 * v + (1 - config.beta2) * gradient**2,
                    t + 1,
                )
                state[i] = (m, v, t)
                rate = config.lr * factors[i]
                if rate.numel() > 1:
                    rate = rate.view(1, -1, *[1] * (part.ndim - 2))
                update = (m / (1 - config.beta1**t)) / ((v / (1 - config.beta2**t)).sqrt() + config.eps)
                part.data -= (rate * update).to(part.dtype)
    return math.fsum(chunks), chunks


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_batched_scores_equal_one_document_alone_in_float64(steps):
    config = TTT.override({"steps_per_chunk": steps, "min_tokens": 2})
    model = randomized(dtype=torch.float64)
    documents = [document(n, seed) for seed, n in enumerate((16, 40, 64, 150, 96, 33))]
    pool = AdapterPool(SMALL, config, len(documents), torch.device("cpu"), torch.float64)
    ordered = sorted(documents, key=lambda d: -d.targets)
    adapted = adapt_batch(model, pool, Batch(ordered, config, torch.device("cpu")), Deadline(0))
    model.requires_grad_(False)
    for row, doc in enumerate(ordered):
        assert adapted.targets[row] == doc.targets
        assert adapted.nats[row] == pytest.approx(naive_score_first(model, doc, config)[0], rel=1e-6)


@pytest.mark.slow
def test_scores_do_not_depend_on_batch_mates_order_or_batch_size(tmp_path):
    documents = [document(n, n) for n in (40, 200, 64, 31, 150, 20, 90, 129)]
    whole = adapted_nats(score(documents, tmp_path))
    assert adapted_nats(score(documents[::-1], tmp_path))[::-1] == pytest.approx(whole, rel=1e-5)
    for batch in (1, 3, 64):
        again = score(documents, tmp_path, TTT.override({"batch": batch}))
        assert adapted_nats(again) == pytest.approx(whole, rel=1e-5), batch
    alone = [adapted_nats(score([doc], tmp_path))[0] for doc in documents]
    assert alone == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_scores_of_first_chunks_do_not_depend_on_the_text_after_them(tmp_path):
    """Chunks 0 to 3 of two documents that share their first 64 targets, whatever follows and however long it is."""
    config = TTT.override({"min_tokens": 2})
    base = document(64, 5)
    rng = np.random.default_rng(9)
    sums = []
    for extra in (0, 7, 80, 300):
        tokens = np.concatenate([base.tokens, rng.integers(3, 300, extra).astype(np.uint16)])
        chunks = naive_chunks(Document("x", tokens, 1), config)
        sums.append(chunks[:4])
    for other in sums[1:]:
        assert other == pytest.approx(sums[0], rel=1e-5)


def naive_chunks(doc: Document, config: TTTConfig) -> list[float]:
    """Nats of each chunk as the scorer records them, read from its progress between two chunks."""
    model = randomized().requires_grad_(False)
    pool = AdapterPool(SMALL, config, 1, torch.device("cpu"))
    totals, batch = [], Batch([doc], config, torch.device("cpu"))
    stop_after = [0]
    for stop_after[0] in range(1, batch.rounds + 1):
        seen = [0]

        def enough(seen=seen) -> bool:
            seen[0] += 1
            return seen[0] > stop_after[0]

        totals.append(float(adapt_batch(model, pool, batch, Deadline(0), enough).nats[0]))
    return list(np.diff([0.0, *totals]))


@pytest.mark.slow
def test_adaptation_learns_a_repeating_document(tmp_path):
    tokens = np.tile(np.arange(10, 26, dtype=np.uint16), 40)
    tokens[0] = BOS
    result = score([Document("loop", tokens, 1000)], tmp_path, TTT.override({"steps_per_chunk": 4}))
    assert result.documents[0].adapted_nats < 0.8 * result.documents[0].base_nats


@pytest.mark.slow
def test_a_chunk_is_recorded_before_any_update_has_seen_it(tmp_path):
    """With a learning rate of zero, score_first is the base model at the temperature; chunk 0 is so at any rate."""
    documents = [document(100), document(48, 1)]
    frozen = score(documents, tmp_path, TTT.override({"lr": 0.0}))
    for d in frozen.documents:
        assert d.adapted_nats == pytest.approx(d.tempered_nats, rel=1e-5)
    first = naive_chunks(document(100), TTT)[0]
    huge = naive_chunks(document(100), TTT.override({"lr": 1.0}))[0]
    assert first == pytest.approx(huge, rel=1e-6)


def test_temperature_divides_the_logits(tmp_path):
    """At a high temperature every token is equally likely: log V a token. A loss times T would grow with T instead."""
    hot = score([document(64)], tmp_path, TTT.override({"temperature": 1e6, "lr": 0.0}))
    assert hot.documents[0].adapted_nats == pytest.approx(64 * math.log(SMALL.vocab_size), rel=1e-4)


def test_short_documents_are_left_to_the_base_model(tmp_path):
    model = randomized()
    result = score([document(30), document(31, 1), document(0, 2)], tmp_path, model=model)
    short, long, empty = result.documents
    assert (short.status, long.status, empty.status) == (SHORT, ADAPTED, SHORT)
    tokens = torch.from_numpy(document(30).tokens.astype(np.int64))[None]
    assert short.adapted_nats == short.base_nats == pytest.approx(model.nll(tokens[:, :-1], tokens[:, 1:]).sum().item())
    assert empty.tokens == 0 and empty.adapted_nats == 0 and empty.adapted_bpb is None


def test_every_target_is_scored_once_in_a_window_that_ends_with_its_chunk():
    targets, offsets = np.array([150, 16, 33, 1]), np.array([0, 151, 168, 202])
    windows = chunk_windows(targets, offsets, chunk=16, window=64)
    scored = np.concatenate(
        [np.arange(s + f, s + n) + 1 for s, n, f in zip(windows.start, windows.length, windows.first, strict=True)]
    )
    expected = np.concatenate([np.arange(o + 1, o + 1 + n) for o, n in zip(offsets, targets, strict=True)])
    assert sorted(scored) == sorted(expected)
    assert windows.length.max() == 64
    assert (windows.length[:4] == [16, 32, 48, 64]).all()


def test_a_bound_that_no_document_comes_near_costs_nothing():
    """Everything is left to the base model by a `min_tokens` beyond all documents: no table of that many rows."""
    base = BaseNll(randomized(), [document(40)], TTT.override({"min_tokens": 10**12}))
    assert base.is_short.all() and np.isfinite(base.nll).all() and base.of(0)[0] > 0


@torch.no_grad()
def test_base_model_sees_the_same_windows_as_the_adapted_one():
    model, docs = randomized(), [document(150, 3), document(70, 4)]
    base = BaseNll(model, docs, TTT)
    for index, doc in enumerate(docs):
        tokens = torch.from_numpy(doc.tokens.astype(np.int64))[None]
        nats = 0.0
        for first in range(0, doc.targets, TTT.chunk):
            end = min(first + TTT.chunk, doc.targets)
            start = max(0, end - TTT.window)
            nats += model.nll(tokens[:, start:end], tokens[:, start + 1 : end + 1])[0, first - start :].sum().item()
        assert base.of(index)[0] == pytest.approx(nats, rel=1e-6)
        assert base.of(index, doc.targets) == (0.0, 0.0)


def test_nothing_adapted_changes_nothing_where_windows_exceed_the_training_length(tmp_path):
    """The rotary base past the training length is that of a whole window, not of what a window is padded to."""
    config = TTT.override({"lr": 0.0, "temperature": 1.0, "window": 100})
    for d in score([document(130), document(97, 1), document(40, 2)], tmp_path, config).documents:
        assert d.adapted_nats == pytest.approx(d.base_nats, rel=1e-6)


def test_a_diverged_adapter_is_an_error_and_not_a_score(tmp_path):
    with pytest.raises(NonFiniteScore, match=r"adapting '0-100' gave an NLL of nan"):
        score([document(100)], tmp_path, TTT.override({"lr": 1e38}))


def test_time_spent_before_an_interruption_counts_against_the_deadline(tmp_path):
    documents, config = [document(100), document(90, 1)], TTT.override({"deadline": 100.0})
    journal = Journal(tmp_path / "journal.jsonl", fingerprint("artifact", documents, config, False), resume=False)
    journal.add_seconds({"adapt": 101.0})
    journal.close()
    late = score(documents, tmp_path, config, resume=True)
    assert [d.status for d in late.documents] == [NOT_ADAPTED, NOT_ADAPTED]
    more = score(documents, tmp_path, TTT, resume=True)
    assert [d.status for d in more.documents] == [ADAPTED, ADAPTED]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"no json", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1, 2]", "a JSON value of type list, not an object"),
        (b"{}", "no result of a document"),
        (b'{"index": 0, "result": {"name": "a"}}', "no result of a document"),
        (b'{"seconds": {"base": "long"}}', "seconds are no numbers by phase"),
        (b'{"seconds": 3}', "seconds are no numbers by phase"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_journal_is_refused_by_line(tmp_path, line, says):
    score([document(40)], tmp_path)
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + line + b"\n")
    with pytest.raises(
        JournalError, match=rf"journal.jsonl, line 3: .*{says}.*; remove that line, or give --overwrite"
    ):
        score([document(40)], tmp_path, resume=True)
    journal.write_bytes(line + b"\n" + whole)
    with pytest.raises(JournalError, match=r"journal.jsonl, line 1: "):
        score([document(40)], tmp_path, resume=True)


@pytest.mark.parametrize("change", [{"index": -1}, {"index": "0"}, {"index": True}, {"tokens": "40"}, {"name": 3}])
def test_a_result_of_other_types_is_refused_by_line(tmp_path, change):
    score([document(40)], tmp_path)
    journal = tmp_path / "journal.jsonl"
    first, second = journal.read_text().splitlines()
    record = json.loads(second)
    record = {**record, **change} if "index" in change else {**record, "result": {**record["result"], **change}}
    journal.write_text(f"{first}\n{json.dumps(record)}\n")
    with pytest.raises(JournalError, match=r"journal.jsonl, line 2: (index|a result whose values are of other types)"):
        score([document(40)], tmp_path, resume=True)


def test_finished_work_is_not_lost_without_a_word(tmp_path):
    """A run that starts afresh where an interrupted one left documents, its own or another's."""
    documents = [document(n, n) for n in (200, 40, 20)]
    score(documents, tmp_path)
    kept = (tmp_path / "journal.jsonl").read_bytes()
    for key in ("another run", fingerprint("artifact", documents, TTT, False)):
        with pytest.raises(JournalError, match=r"journal.jsonl: 3 finished documents and 100% of the base pass of an "):
            Journal(tmp_path / "journal.jsonl", key, resume=False)
    with pytest.raises(JournalError, match="give --resume to go on from there, or --overwrite to start afresh"):
        Journal(tmp_path / "journal-5.jsonl", "run", resume=False, others=[tmp_path / "journal.jsonl"])
    assert (tmp_path / "journal.jsonl").read_bytes() == kept
    book = Journal(tmp_path / "journal.jsonl", "run", resume=False, overwrite=True)
    assert not book.done and not book.base_share and not (tmp_path / "journal.base.npy").exists()
    book.close()
    Journal(tmp_path / "journal.jsonl", "run", resume=False).close()  # one that holds nothing is in nobody's way


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["base", "prequant"])
def test_a_base_pass_that_is_stopped_goes_on_from_there(tmp_path, monkeypatch, phase):
    monkeypatch.setitem(MICRO_TOKENS, "cpu", 64)
    documents = [document(n, n) for n in (200, 180, 20, 90, 31)]
    before = randomized(seed=3)
    whole = score(documents, tmp_path, prequant=before)
    total, seen = sum(d.targets for d in documents), []

    def stop() -> bool:
        return len(seen) > 0 and seen[-1][0] == phase and seen[-1][1] > total / 2

    def progress(*at):
        seen.append(at)

    with pytest.raises(Interrupted, match="0 of 5 documents"):
        score(documents, tmp_path, prequant=before, should_stop=stop, progress=progress)
    stopped = seen[-1][1]
    assert total / 2 < stopped < total
    seen.clear()
    resumed = score(documents, tmp_path, prequant=before, resume=True, progress=progress)
    first = [done for name, done, _ in seen if name == phase]
    assert first[0] > stopped and first[-1] == total
    assert phase == "base" or not [done for name, done, _ in seen if name == "base"]
    for ours, theirs in zip(resumed.documents, whole.documents, strict=True):
        assert ours.base_nats == pytest.approx(theirs.base_nats, rel=1e-6)
        assert ours.prequant_nats == pytest.approx(theirs.prequant_nats, rel=1e-6)
        assert ours.adapted_nats == pytest.approx(theirs.adapted_nats, rel=1e-6)


def test_a_killed_base_pass_loses_a_minute_at_most(tmp_path, monkeypatch):
    """Nothing is caught of a kill: what is kept was written before."""
    monkeypatch.setitem(MICRO_TOKENS, "cpu", 64)
    monkeypatch.setattr("klora.ttt.base.KEEP_SECONDS", 0.0)

    class Killed(BaseException):
        pass

    def progress(phase, done, total):
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        score([document(200), document(20, 1)], tmp_path, progress=progress)
    book = Journal(
        tmp_path / "journal.jsonl", fingerprint("artifact", [document(200), document(20, 1)], TTT, False), True
    )
    assert 0.2 < book.base_share < 0.9


def test_a_damaged_base_pass_is_an_error_that_says_what_to_do(tmp_path):
    documents = [document(40)]
    score(documents, tmp_path)
    array = tmp_path / "journal.base.npy"
    whole = array.read_bytes()
    np.save(array, np.zeros((2, 7), np.float32))
    (tmp_path / "journal.jsonl").write_text((tmp_path / "journal.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(JournalError, match=r"journal.base.npy is of other documents; give --overwrite"):
        score(documents, tmp_path, resume=True)
    for damaged in (whole[:50], b"", b"junk" * 30):
        array.write_bytes(damaged)
        with pytest.raises(JournalError, match=r"journal.base.npy is damaged; give --overwrite"):
            score(documents, tmp_path, resume=True)


def test_a_base_pass_that_cannot_be_kept_ends_nothing(tmp_path, monkeypatch):
    def full(journal, phase):
        raise OSError("no space left on device")

    monkeypatch.setattr(Journal, "keep_base", full)
    said = []
    assert score([document(40)], tmp_path, say=said.append).documents[0].status == ADAPTED
    assert len(said) == 1 and "the copy of the base pass for --resume could not be made" in said[0]


@pytest.mark.slow
def test_documents_of_a_batch_that_are_through_outlive_a_stop(tmp_path):
    documents = [document(n, n) for n in (400, 40, 35)]
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 20

    whole = score(documents, tmp_path)
    with pytest.raises(Interrupted) as interrupted:
        score(documents, tmp_path, should_stop=stop)
    assert interrupted.value.done == 2
    seen = []
    resumed = score(documents, tmp_path, resume=True, progress=lambda phase, done, total: seen.append((phase, total)))
    assert set(seen) == {("adapt", 400)}
    assert adapted_nats(resumed) == pytest.approx(adapted_nats(whole), rel=1e-6)


def test_a_model_of_no_numbers_is_an_error_and_not_a_score(tmp_path):
    model = randomized()
    with torch.no_grad():
        model.embed[5:] = math.nan
    with pytest.raises(NonFiniteScore, match=r"the unadapted model gives '0-20' an NLL of nan"):
        score([document(20)], tmp_path, model=model)
    with pytest.raises(NonFiniteScore, match=r"before quantisation nan"):
        score([document(20)], tmp_path, prequant=model)


FORMULAS = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-2",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1",
    "'quoted'",
    "''",
    "plain.txt",
    "a=b",
]


def test_names_are_no_formulas_in_the_csv_and_come_back(tmp_path):
    results = [DocumentResult(name, 10, 20, ADAPTED, 14.0, 13.5, 12.0) for name in [*FORMULAS, "", 'n\udcff,"x"']]
    results.append(DocumentResult("=short", 3, 0, SHORT, 1.0, 1.0, 1.0))
    ScoreResult(results, TTT, {}).write(tmp_path)
    with open(tmp_path / "documents.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["name"] == "'=cmd|' /C calc'!A0" and rows[10]["name"] == "plain.txt"
    assert not [row["name"] for row in rows if row["name"].startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝"))]
    assert float(rows[0]["base_bpb"]) == pytest.approx(results[0].base_bpb, abs=1e-6)
    read = read_documents_csv(tmp_path / "documents.csv")
    assert [row["name"] for row in read] == [result.name for result in results]
    assert read[0]["tokens"] == 10 and read[0]["adapted_share"] == 1.0 and read[0]["status"] == ADAPTED
    assert read[-1]["base_bpb"] is None and read[-1]["adapted_share"] is None and read[-1]["bytes"] == 0
    stored = json.loads((tmp_path / "score.json").read_text())["documents"]
    assert [d["name"] for d in stored] == [result.name for result in results]


def test_no_deadline_is_the_default_and_the_designs_is_the_originals():
    assert TTTConfig().deadline == ttt_preset().deadline == ttt_preset("thorough").deadline == 0.0
    assert ttt_preset("design").deadline == ttt_preset(protocol="min_nll").deadline == 550.0


def test_the_share_that_was_adapted_stands_beside_the_number(tmp_path):
    documents = [
        DocumentResult("whole", 100, 200, ADAPTED, 14.0, 13.5, 12.0),
        DocumentResult("part", 300, 600, PARTIAL, 14.0, 13.5, 13.0, adapted_tokens=200),
        DocumentResult("none", 600, 900, NOT_ADAPTED, 14.0, 13.5, 14.0),
        DocumentResult("short", 5000, 9000, SHORT, 14.0, 14.0, 14.0),
    ]
    result = ScoreResult(documents, TTT, {})
    assert result.totals()["adapted_share"] == 0.3 and result.totals()["deadline_hit"] is True
    assert result.deadline_note == "deadline: 30.0% adapted"
    result.write(tmp_path)
    shares = [row["adapted_share"] for row in read_documents_csv(tmp_path / "documents.csv")]
    assert shares == [1.0, pytest.approx(2 / 3, abs=1e-6), 0.0, None]
    assert json.loads((tmp_path / "score.json").read_text())["totals"]["adapted_share"] == 0.3
    nearly = [
        DocumentResult("a", 99_999, 9, ADAPTED, 1.0, 1.0, 1.0),
        DocumentResult("b", 1, 9, NOT_ADAPTED, 1.0, 1.0, 1.0),
    ]
    assert ScoreResult(nearly, TTT, {}).deadline_note == "deadline: 99.9% adapted"
    whole = ScoreResult([documents[0], documents[3]], TTT, {})
    assert whole.totals()["adapted_share"] == 1.0 and whole.deadline_note == "" and not whole.deadline_hit


def test_a_name_that_is_not_utf8_is_scored_and_stored(tmp_path):
    doc = document(40)
    result = score([Document("n\udcff.txt", doc.tokens, doc.bytes)], tmp_path)
    result.write(tmp_path)
    assert b"n\xff.txt" in (tmp_path / "documents.csv").read_bytes()


@pytest.mark.parametrize("protocol", ["multi_epoch", "min_nll"])
def test_leaky_protocols_leak_and_say_so_everywhere(tmp_path, protocol):
    documents = [document(n, n) for n in (100, 64, 40)]
    honest = score(documents, tmp_path)
    leaky = score(documents, tmp_path, TTT.override({"protocol": protocol, "epochs": 6, "lr": 0.02}))
    for fair, unfair in zip(honest.documents, leaky.documents, strict=True):
        assert unfair.adapted_nats < fair.adapted_nats  # random tokens hold nothing to learn but themselves
    leaky.write(tmp_path)
    stored = json.loads((tmp_path / "score.json").read_text())
    assert stored["label"] == LEAKY and stored["valid_score"] is False and LEAKY in stored["protocol_label"]
    with open(tmp_path / "documents.csv") as file:
        assert f"adapted_bpb_{LEAKY}" in next(csv.reader(file))
    honest.write(tmp_path)
    assert LEAKY not in (tmp_path / "documents.csv").read_text()
    stored = json.loads((tmp_path / "score.json").read_text())
    assert stored["valid_score"] is True and "label" not in stored


@pytest.mark.slow
def test_min_nll_keeps_each_documents_best_pass(tmp_path):
    documents = [document(n, n) for n in (100, 64, 40)]
    overrides = {"epochs": 4, "lr": 0.5}
    best = score(documents, tmp_path, TTT.override({"protocol": "min_nll", **overrides})).documents
    last = score(documents, tmp_path, TTT.override({"protocol": "multi_epoch", **overrides})).documents
    for b, e in zip(best, last, strict=True):
        assert b.adapted_nats <= e.adapted_nats * (1 + 1e-6)
        assert e.kept_pass == 3
    assert any(b.kept_pass != 3 for b in best)


def test_learning_rate_depends_on_the_documents_own_steps_alone():
    chunks = torch.tensor([9, 3])
    constant = learning_rate(TTT, torch.tensor([0, 5]), chunks)
    assert constant.tolist() == pytest.approx([0.01, 0.01])
    leaky = TTT.override({"protocol": "multi_epoch", "epochs": 3})
    first = learning_rate(leaky, torch.tensor([0, 0]), chunks)
    last = learning_rate(leaky, torch.tensor([3 * 8 - 1, 3 * 2 - 1]), chunks)
    assert first.tolist() == pytest.approx([0.01, 0.01])
    assert last.tolist() == pytest.approx([0.001, 0.001])
    alone = learning_rate(leaky, torch.tensor([2]), chunks[1:])
    assert alone[0] == learning_rate(leaky, torch.tensor([7, 2]), chunks)[1]


def test_deadline_leaves_the_rest_to_the_base_model_and_says_which(tmp_path):
    documents = [document(n, n) for n in (200, 180, 160, 140, 120, 20)]
    steps = [0]

    class AfterSteps(Deadline):
        def passed(self) -> bool:
            steps[0] += 1
            return steps[0] > 6

    config = TTT.override({"batch": 2})
    import klora.ttt.score as module

    original, module.Deadline = module.Deadline, AfterSteps
    try:
        result = score(documents, tmp_path, config)
    finally:
        module.Deadline = original
    assert [d.status for d in result.documents] == [PARTIAL, PARTIAL, NOT_ADAPTED, NOT_ADAPTED, NOT_ADAPTED, SHORT]
    full = score(documents, tmp_path, config)
    for d in result.documents[2:5]:
        assert d.adapted_nats == d.base_nats
    for part, whole in zip(result.documents[:2], full.documents[:2], strict=True):
        assert part.adapted_nats != whole.adapted_nats and part.adapted_nats != part.base_nats
    assert result.totals()["by_status"] == {PARTIAL: 2, NOT_ADAPTED: 3, SHORT: 1}


@pytest.mark.parametrize("protocol", ["multi_epoch", "min_nll"])
def test_deadline_counts_only_documents_whose_last_pass_ended(protocol):
    config = TTT.override({"protocol": protocol, "epochs": 2})
    ordered = [document(100), document(40, 1)]
    batch = Batch(ordered, config, torch.device("cpu"))
    pool = AdapterPool(SMALL, config, 2, torch.device("cpu"))
    model = randomized().requires_grad_(False)
    calls = [0]

    def after(count):
        calls[0] += 1
        return calls[0] > count

    first_pass = adapt_batch(model, pool, batch, Deadline(0), lambda: after(5))
    assert first_pass.targets.tolist() == [0, 0]
    calls[0] = 0
    second_pass = adapt_batch(model, pool, batch, Deadline(0), lambda: after(batch.rounds + 3))
    assert second_pass.targets.tolist() == [0, 40]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_gives_the_same_scores(tmp_path):
    documents = [document(n, n) for n in (200, 180, 160, 140, 120, 20, 10)]
    config = TTT.override({"batch": 2})
    whole = score(documents, tmp_path, config)
    calls = [0]

    def stop() -> bool:
        calls[0] += 1
        return calls[0] > 16

    with pytest.raises(Interrupted) as interrupted:
        score(documents, tmp_path, config, should_stop=stop)
    assert 2 < interrupted.value.done < len(documents)
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"index": 3, "name": "torn')
    seen = []
    resumed = score(documents, tmp_path, config, resume=True, progress=lambda phase, done, total: seen.append(total))
    assert adapted_nats(resumed) == pytest.approx(adapted_nats(whole), rel=1e-6)
    assert [d.name for d in resumed.documents] == [d.name for d in documents]
    assert max(seen) < sum(d.targets for d in documents if d.targets >= 31)


@pytest.mark.parametrize("protocol", ["score_first", "min_nll"])
def test_the_engine_gives_the_result_of_the_eager_scorer(tmp_path, protocol):
    documents = [document(n, n) for n in (20, 200, 33, 0, 120, 31)]
    config, said = TTT.override({"protocol": protocol}), []
    eager = score(documents, tmp_path, config, scorer="eager")
    engine = score(documents, tmp_path, config, scorer="uncaptured", say=said.append)
    assert adapted_nats(engine) == pytest.approx(adapted_nats(eager), rel=1e-5)
    for ours, theirs in zip(engine.documents, eager.documents, strict=True):
        assert (ours.name, ours.status, ours.kept_pass) == (theirs.name, theirs.status, theirs.kept_pass)
        assert (ours.base_nats, ours.tempered_nats) == (theirs.base_nats, theirs.tempered_nats)
    assert said == ["engine: 4 documents side by side in 4 slots, at most 0.0 GiB"]
    assert eager.facts == {"scorer": "eager"} and engine.facts["scorer"] == "uncaptured"
    assert 0 < engine.facts["engine"]["useful_places"] <= 1


def test_what_the_deadline_leaves_out_is_the_base_models_and_is_said_by_both_scorers(tmp_path):
    documents = [document(n, n) for n in (200, 20, 120)]
    for scorer in ("eager", "uncaptured"):
        result = score(documents, tmp_path, TTT.override({"deadline": "1e-9"}), scorer=scorer)
        assert [d.status for d in result.documents] == [NOT_ADAPTED, SHORT, NOT_ADAPTED]
        assert adapted_nats(result) == [d.base_nats for d in result.documents]


@pytest.mark.slow
def test_an_interrupted_engine_keeps_the_documents_that_were_through(tmp_path):
    documents = [document(n, n) for n in (200, 180, 40, 35, 33, 20)]
    config = TTT.override({"batch": 2})
    asked = []

    def stopping(after: float):
        asked.clear()

        def stop() -> bool:
            asked.append(True)
            return len(asked) > after

        return stop

    whole = score(documents, tmp_path, config, scorer="uncaptured", should_stop=stopping(math.inf))
    done = []
    for after in (3, len(asked) // 2, len(asked) - 4):
        with pytest.raises(Interrupted) as interrupted:
            score(documents, tmp_path, config, scorer="uncaptured", should_stop=stopping(after))
        done.append(interrupted.value.done)
        resumed = score(documents, tmp_path, config, scorer="uncaptured", resume=True)
        assert adapted_nats(resumed) == pytest.approx(adapted_nats(whole), rel=1e-6)
    assert done == sorted(done) and 1 <= done[0] < done[-1] < len(documents)


def test_a_journal_of_another_run_is_refused(tmp_path):
    score([document(40)], tmp_path)
    with pytest.raises(JournalError, match="belongs to a run with another artifact"):
        score([document(40)], tmp_path, TTT.override({"lr": 0.5}), resume=True)
    assert score([document(40)], tmp_path, TTT.override({"batch": 7}), resume=True).documents[0].status == ADAPTED


def test_adapters_have_the_size_and_the_start_that_the_design_gives():
    config = preset("seed").model
    layout = AdapterLayout(config, TTTConfig())
    assert layout.size == 234_496
    row = layout.initial(0)
    bound = 1 / math.sqrt(512)
    for part in layout.parts:
        values = row[part.start : part.stop]
        if part.is_lora_a:
            assert values.abs().max() <= bound and values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        else:
            assert not values.any()
    factors = layout.group_lr()
    block, head = layout.parts[:3], layout.parts[-2:]
    assert factors[block[0].start : block[0].stop].unique(sorted=False).sort().values.tolist() == pytest.approx(
        [0.3, 0.5, 1.5]
    )
    b_rows = factors[block[1].start : block[1].stop].view(1024, 8)
    assert (b_rows[:512] == 0.5).all() and (b_rows[512:768] == 0.3).all() and (b_rows[768:] == 1.5).all()
    assert (factors[block[2].start : block[2].stop] == 3.0).all()
    assert (factors[head[0].start : head[1].stop] == 2.0).all()


def test_adam_is_torchs_adam_and_leaves_other_slots_alone():
    torch.manual_seed(0)
    params, lr = torch.randn(3, 50, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    factor = torch.rand(50, dtype=torch.float64)
    m, v, step = torch.zeros_like(params), torch.zeros_like(params), torch.zeros(3, dtype=torch.int64)
    twins = [torch.nn.Parameter(params[s, i : i + 1].clone()) for s in (0, 2) for i in range(50)]
    groups = [{"params": [p], "lr": float(lr[(0, 2)[n // 50]] * factor[n % 50])} for n, p in enumerate(twins)]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-10)
    untouched = params[1].clone()
    for _ in range(50):
        grads = torch.randn(3, 50, dtype=torch.float64)
        for n, p in enumerate(twins):
            p.grad = grads[(0, 2)[n // 50], n % 50].view(1).clone()
        adam.step()
        lora_adam_ref_(params, grads, m, v, step, lr, factor, torch.tensor([0, 2]))
    torch.testing.assert_close(params[[0, 2]].flatten(), torch.cat(list(twins)).detach(), rtol=1e-9, atol=1e-12)
    assert torch.equal(params[1], untouched) and step.tolist() == [50, 0, 50]
    assert not m[1].any() and not v[1].any()


def test_documents_that_have_ended_take_no_more_adam_steps():
    pool = AdapterPool(SMALL, TTT, 2, torch.device("cpu"))
    model = randomized().requires_grad_(False)
    adapt_batch(model, pool, Batch([document(100), document(40, 1)], TTT, torch.device("cpu")), Deadline(0))
    assert pool.step.tolist() == [6, 2]  # 7 and 3 chunks; the last one is scored only


def test_totals_are_float64_sums_over_bytes():
    documents = [
        DocumentResult("a", 10, 20, ADAPTED, base_nats=14.0, tempered_nats=13.5, adapted_nats=12.0, prequant_nats=13.0),
        DocumentResult("b", 5, 10, SHORT, base_nats=7.0, tempered_nats=7.0, adapted_nats=7.0, prequant_nats=6.0),
        DocumentResult("empty", 0, 0, SHORT, 0.0, 0.0, 0.0, 0.0),
    ]
    totals = ScoreResult(documents, TTT, {}).totals()
    assert totals["base_bpb"] == 21.0 / math.log(2) / 30
    assert totals["adapted_bpb"] == 19.0 / math.log(2) / 30
    assert totals["prequant_bpb"] == 19.0 / math.log(2) / 30
    assert totals["base_bpb_at_temperature"] == 20.5 / math.log(2) / 30
    assert totals["documents"] == 3 and totals["bytes"] == 30


def test_config_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="chunk=2048 is not possible; allowed: at most window=1024"):
        TTTConfig().override({"chunk": "2048"})
    with pytest.raises(ConfigError, match="protocol='best' is not possible; allowed: one of score_first"):
        TTTConfig(protocol="best")
    assert TTTConfig().protocol == "score_first" and label("score_first") == "score_first"
    assert label("min_nll") == "min_nll (LEAKY)"
