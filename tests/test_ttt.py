"""Adapting to documents: what is scored when, what a document may depend on, and what must be called LEAKY."""

import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, randomized
from klora.bench.eager import Batch
from klora.kernels import BOS_ID, lora_adam_ref_
from klora.model import network, weights
from klora.model.config import ConfigError, preset
from klora.model.storage import write_text
from klora.ttt import pipeline
from klora.ttt.adapters import AdapterLayout
from klora.ttt.base import BaseNll
from klora.ttt.documents import Document, chunk_windows
from klora.ttt.engine import Engine, engine_of
from klora.ttt.engines import pick_scorer
from klora.ttt.journal import Journal, fingerprint, settings_of
from klora.ttt.protocols import LEAKY, TARGETS, TTTConfig, label, learning_rate, ttt_preset
from klora.ttt.queue import Deadline, DocumentQueue, StoreQueue
from klora.ttt.results import (
    ADAPTED,
    DIVERGED,
    NOT_ADAPTED,
    PARTIAL,
    SHORT,
    DocumentResult,
    NonFiniteScore,
    ScoreResult,
    read_documents_csv,
)
from klora.ttt.step import EngineStep
from oracles import eager

TTT = TTTConfig(chunk=16, window=64, min_tokens=32, lora_rank=2, head_rank=3, epochs=2, deadline=0.0, batch=4)


def document(targets: int, seed: int = 0) -> Document:
    tokens = np.random.default_rng(seed).integers(3, SMALL.vocab_size, targets + 1).astype(np.uint16)
    tokens[0] = BOS_ID
    return Document(f"{seed}-{targets}", tokens, bytes=2 * targets)


def score(documents, tmp_path, config=TTT, model=None, resume=False, **options) -> ScoreResult:
    model = model or randomized()
    of_run = "artifact", documents, config, False
    journal = Journal(
        tmp_path / "journal.jsonl", fingerprint(*of_run), resume, overwrite=not resume, settings=settings_of(*of_run)
    )
    try:
        return pipeline.score(pipeline.ScoreRequest(model, documents, config, journal, **options))
    finally:
        journal.close()


def adapted_nats(result: ScoreResult) -> list[float]:
    return [d.adapted_nats for d in result.documents]


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
        chunks = chunk_nats(Document("x", tokens, 1), config)
        sums.append(chunks[:4])
    for other in sums[1:]:
        assert other == pytest.approx(sums[0], rel=1e-5)


def chunk_nats(doc: Document, config: TTTConfig) -> list[float]:
    """Nats of each chunk as the engine records them."""
    engine = engine_of(randomized().requires_grad_(False), config, [doc])
    (nll,) = engine.token_nll([doc], engine.adapt([doc], Deadline(0)).kept_pass)
    return np.add.reduceat(nll, range(0, doc.targets, config.chunk), dtype=np.float64).tolist()


@pytest.mark.slow
def test_adaptation_learns_a_repeating_document(tmp_path):
    tokens = np.tile(np.arange(10, 26, dtype=np.uint16), 40)
    tokens[0] = BOS_ID
    result = score([Document("loop", tokens, 1000)], tmp_path, TTT.override({"steps_per_chunk": 4}))
    assert result.documents[0].adapted_nats < 0.8 * result.documents[0].base_nats


@pytest.mark.slow
def test_a_chunk_is_recorded_before_any_update_has_seen_it(tmp_path):
    """With a learning rate of zero, score_first is the base model at the temperature; chunk 0 is so at any rate."""
    config, documents = TTT.override({"lr": 0.0}), [document(100), document(48, 1)]
    for index, doc in enumerate(documents):
        tempered = BaseNll(randomized(), documents, config).of(index)[1]
        assert sum(chunk_nats(doc, config)) == pytest.approx(tempered, rel=1e-5)
    first = chunk_nats(document(100), TTT)[0]
    huge = chunk_nats(document(100), TTT.override({"lr": 1.0}))[0]
    assert first == pytest.approx(huge, rel=1e-6)


def test_temperature_divides_the_logits(tmp_path):
    """At a high temperature every token is equally likely: log V a token. A loss times T would grow with T instead."""
    hot = score([document(64)], tmp_path, TTT.override({"temperature": 1e6, "lr": 1e-30}))
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
    windows = chunk_windows(targets, offsets, TTT)
    scored = np.concatenate(
        [np.arange(s + f, s + n) + 1 for s, n, f in zip(windows.start, windows.length, windows.first, strict=True)]
    )
    expected = np.concatenate([np.arange(o + 1, o + 1 + n) for o, n in zip(offsets, targets, strict=True)])
    assert sorted(scored) == sorted(expected)
    assert windows.length.max() == 64
    assert (windows.length[:4] == [16, 32, 48, 64]).all()


@pytest.mark.parametrize("window", [16, 50, 64])
def test_windows_from_the_start_score_every_target_once_with_its_context(window):
    """Chunk is the stride: past the first window every target has at least window - chunk tokens before it."""
    config = TTTConfig(layout="start", chunk=16, window=window)
    targets, offsets = np.array([150, 0, 16, 33, 1]), np.array([0, 151, 152, 169, 203])
    windows = chunk_windows(targets, offsets, config)
    scored, context = [], []
    for start, length, first in zip(windows.start, windows.length, windows.first, strict=True):
        scored += range(start + first + 1, start + length + 1)
        context += range(first + 1, length + 1)
    assert scored == [o + 1 + n for o, count in zip(offsets, targets, strict=True) for n in range(count)]
    places = np.concatenate([np.arange(count) + 1 for count in targets])
    assert (np.array(context) >= np.minimum(places, window - 16 + 1)).all() and windows.length.max() <= window


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
    config = TTT.override({"lr": 1e-30, "temperature": 1.0, "window": 100})
    for d in score([document(130), document(97, 1), document(40, 2)], tmp_path, config).documents:
        assert d.status == ADAPTED and d.adapted_nats == pytest.approx(d.base_nats, rel=1e-6)


queues = pytest.mark.parametrize(
    "queue",
    [DocumentQueue, pytest.param(lambda: StoreQueue(dist.HashStore(), 0, 1), marks=pytest.mark.slow)],
    ids=["alone", "store"],
)


def poison(monkeypatch, place: int, after: int) -> None:
    """Let the adapter of the document of that place, longest first, be no numbers after its chunk `after`."""
    launch = Engine._launch

    def poisoned(self, number, taken, run):
        launch(self, number, taken, run)
        for document, slot, chunk in zip(taken.document, taken.slot, taken.chunk, strict=True):
            if (document, chunk) == (place, after):
                self.pool.params[int(slot)] = math.nan

    monkeypatch.setattr(Engine, "_launch", poisoned)


@queues
def test_a_document_that_diverges_falls_back_and_no_other_bit_changes(tmp_path, monkeypatch, queue):
    """What it scored before stays, as it would if the document ended there; its batch mates are kept as ever."""
    documents = [document(n, n) for n in (40, 200, 64, 150, 20)]
    clean = score(documents, tmp_path / "clean", queue=queue()).documents
    before = chunk_nats(documents[3], TTT)[:3]
    with monkeypatch.context() as patch:
        poison(patch, place=1, after=2)  # the one of 150 targets
        result = score(documents, tmp_path / "poisoned", queue=queue())
    for index, (found, expected) in enumerate(zip(result.documents, clean, strict=True)):
        assert index == 3 or found == expected
    one = result.documents[3]
    assert (one.status, one.adapted_tokens, one.adapted_share) == (DIVERGED, 48, 48 / 150)
    assert one.base_nats == clean[3].base_nats and one.adapted_nats != one.base_nats
    base = BaseNll(randomized(), [documents[3]], TTT)
    assert one.adapted_nats == pytest.approx(sum(before) + base.of(0, 48)[0], rel=1e-6)
    assert result.totals()["by_status"] == {ADAPTED: 3, DIVERGED: 1, SHORT: 1} and not result.deadline_hit
    *_, note = result.to_json()["notes"]
    assert note.startswith("1 document diverged ('150-150'): from the first target whose adapted NLL is no number, the")
    resumed = score(documents, tmp_path / "poisoned", resume=True, queue=queue())  # nothing is scored again
    assert resumed.documents == result.documents


def test_a_rate_at_which_all_diverge_leaves_the_first_chunks_and_the_base_model(tmp_path):
    documents = [document(100), document(90, 1)]
    for config, reached in ((TTT, 16), (TTT.override({"protocol": "min_nll"}), 16), (TTT, 16)):
        result = score(documents, tmp_path, config.override({"lr": 1e38}))
        for d in result.documents:
            assert math.isfinite(d.adapted_nats) and d.status == DIVERGED
            assert d.adapted_tokens == (0 if config.is_leaky else reached)
            assert not config.is_leaky or d.adapted_nats == d.base_nats
        assert "2 documents diverged" in result.notes[-1]


@pytest.mark.slow
def test_where_a_document_diverges_does_not_depend_on_what_follows(tmp_path, monkeypatch):
    """A document cut after any target keeps every score before it."""
    whole = document(150, 3)
    poison(monkeypatch, place=0, after=2)
    for targets in (150, 100, 49, 48):
        cut = Document("cut", whole.tokens[: targets + 1], 300)
        engine = engine_of(randomized().requires_grad_(False), TTT, [cut])
        adapted = engine.adapt([cut], Deadline(0))
        assert adapted.targets.tolist() == [48] and adapted.diverged.tolist() == [targets > 48]
        assert adapted.nats[0] == pytest.approx(sum(chunk_nats(whole, TTT)[:3]), rel=1e-6)


class Full:
    """Calls of `method` run out of memory, those of these numbers."""

    def __init__(self, patch, owner, name: str, *numbers: int):
        self.calls, call = 0, getattr(owner, name)

        def full(*given, **options):
            self.calls += 1
            if self.calls in numbers:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")
            return call(*given, **options)

        patch.setattr(owner, name, full)


@queues
@pytest.mark.parametrize(
    ("method", "numbers"),
    [pytest.param("train", (5, 14), marks=pytest.mark.slow), ("_inputs", (1,))],
    ids=["twice", "at first"],
)
@pytest.mark.usefixtures("one_thread")
def test_memory_that_runs_out_halves_the_batch_aloud_and_changes_no_score(
    tmp_path, monkeypatch, queue, method, numbers
):
    documents, said = [document(n, n) for n in (40, 200, 64, 150, 20, 33, 90)], []
    model = randomized(dataclasses.replace(SMALL, blocks=2))
    clean = score(documents, tmp_path / "clean", model=model, queue=queue())
    with monkeypatch.context() as patch:
        Full(patch, EngineStep, method, *numbers)
        result = score(documents, tmp_path / "full", model=model, queue=queue(), say=said.append)
    assert adapted_nats(result) == pytest.approx(adapted_nats(clean), rel=1e-6)
    assert [d.status for d in result.documents] == [d.status for d in clean.documents]
    aloud = [line for line in said if "memory ran out" in line]
    says = "the GPU's memory ran out with 4 documents side by side; going on with 2, which changes no score (CUDA"
    assert aloud[0] == f"{says} out of memory. Tried to allocate 2.00 GiB.)" and len(aloud) == len(numbers)
    assert result.facts["engine"]["batch"] == 4 >> len(numbers) and result.config == clean.config
    assert len(lines_with_results(tmp_path / "full")) == len(documents)


def lines_with_results(folder) -> list[str]:
    return [line for line in (folder / "journal.jsonl").read_text().splitlines() if '"result"' in line]


@pytest.mark.slow
def test_memory_that_one_document_alone_exhausts_is_an_error(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        Full(patch, EngineStep, "_inputs", *range(1, 99))
        score([document(100)], tmp_path)


@pytest.mark.usefixtures("one_thread")
def test_memory_that_runs_out_in_the_base_pass_halves_what_goes_at_a_time(tmp_path, monkeypatch):
    documents, said = [document(33 + n, n) for n in range(8)], []
    clean = score(documents, tmp_path / "clean")
    with monkeypatch.context() as patch:
        Full(patch, network, "hidden", 1, 2)
        result = score(documents, tmp_path / "full", say=said.append)
    for found, expected in zip(result.documents, clean.documents, strict=True):
        assert found.base_nats == pytest.approx(expected.base_nats, rel=1e-6)
        assert found.tempered_nats == pytest.approx(expected.tempered_nats, rel=1e-6)
    assert sum("memory ran out with" in line and "tokens at a time; going on with" in line for line in said) == 2
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        Full(patch, network, "hidden", *range(1, 99))
        score([document(100)], tmp_path / "one")


@pytest.mark.slow
def test_a_shared_adapter_learns_again_where_memory_ran_out(tmp_path, monkeypatch):
    config = TTTConfig(**{**TTT.to_dict(), "layout": "start", "min_tokens": 512, "phases": 2, "phase_chunks": 2})
    documents = [document(n, n) for n in (40, 90, 64, 70, 33, 80)]
    clean = score(documents, tmp_path / "clean", config)
    for number in (4, 12, 20):
        with monkeypatch.context() as patch:
            full = Full(patch, EngineStep, "train", number)
            result = score(documents, tmp_path / str(number), config)
        assert full.calls > number and adapted_nats(result) == pytest.approx(adapted_nats(clean), rel=1e-6)


def test_results_of_another_run_are_gone_before_the_score_is_there(tmp_path, monkeypatch):
    """Killed right after score.json."""
    for name in ("documents.csv", "report.html", "report.png", "score.json"):
        (tmp_path / name).write_text("another run's")

    class Killed(BaseException):
        pass

    def kill(path, text):
        write_text(path, text)
        raise Killed

    monkeypatch.setattr("klora.ttt.results.write_text", kill)
    with pytest.raises(Killed):
        ScoreResult([DocumentResult("a", 10, 20, ADAPTED, 14.0, 13.5, 12.0)], TTT, {}).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["score.json"]
    assert json.loads((tmp_path / "score.json").read_text())["documents"][0]["name"] == "a"


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


def test_contest_is_what_its_source_says():
    contest = ttt_preset("contest")
    assert [contest.rank(target) for target in TARGETS] == [80] * 7 == [contest.lora_rank] * 7
    assert [contest.scale(target) for target in TARGETS] == [144 / 80] * 7
    assert (contest.layout, contest.context, contest.chunk, contest.window) == ("start", "cached", 48, 2048)
    assert (contest.lr, contest.beta1, contest.temperature, contest.bias_lr) == (0.0001, 0.0, 1.0, 0.0)
    assert contest.protocol == "score_first" and contest.passes == contest.steps_per_chunk == 1
    assert {getattr(contest, f"{target}_lr") for target in TARGETS} == {1.0}


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


@pytest.mark.slow
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
    assert stored["valid_score"] is False and "label" not in stored
    (why,) = stored["why_not_valid"]
    assert why.startswith("not a valid score: with layout=original") and why in stored["notes"]
    strict = TTTConfig(layout="start", chunk=16, window=64)
    score(documents, tmp_path, strict).write(tmp_path)
    stored = json.loads((tmp_path / "score.json").read_text())
    assert stored["valid_score"] is True and "why_not_valid" not in stored and not stored.get("notes")
    score(documents, tmp_path, strict.override({"deadline": 1e-9})).write(tmp_path)
    stored = json.loads((tmp_path / "score.json").read_text())
    assert stored["valid_score"] is False and "the deadline left text" in stored["why_not_valid"][0]


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


def test_a_rate_that_rises_and_falls_goes_by_the_targets_scored():
    """After chunks of 16 from target 40 on, two steps each: the steps are taken after 48, 48, 64, 64, ... targets."""
    config = TTTConfig(layout="start", chunk=16, adapt_from=40, steps_per_chunk=2, lr=0.01, lr_warmup=100, lr_half=50)
    steps, chunks = torch.arange(8), torch.full((8,), 9)
    scored = [48, 48, 64, 64, 80, 80, 96, 96]
    expected = [0.01 * min(1, p / 100) / (1 + p / 50) for p in scored]
    assert learning_rate(config, steps, chunks).tolist() == pytest.approx(expected)
    assert torch.equal(learning_rate(config, steps, chunks), learning_rate(config, steps, chunks + 50))
    falls = config.override({"lr_warmup": 0})
    assert learning_rate(falls, steps[:1], chunks[:1]).item() == pytest.approx(0.01 / (1 + 48 / 50))
    for name in ("lr_warmup", "lr_half"):
        with pytest.raises(ConfigError, match=f"{name}=5 is not possible; allowed: 0, with protocol=min_nll"):
            TTTConfig(**{"protocol": "min_nll", name: 5})


@pytest.mark.slow
def test_deadline_leaves_the_rest_to_the_base_model_and_says_which(tmp_path, monkeypatch):
    documents = [document(n, n) for n in (200, 180, 160, 140, 120, 20)]
    rounds = []

    class AfterRounds(Deadline):
        def passed(self) -> bool:
            return len(rounds) >= 2

    def progress(phase, done, total):
        rounds.extend([done] if phase == "adapt" else [])

    config = TTT.override({"batch": 2})
    with monkeypatch.context() as patch:
        patch.setattr("klora.ttt.queue.Deadline", AfterRounds)
        result = score(documents, tmp_path, config, progress=progress)
    assert [d.status for d in result.documents] == [PARTIAL, PARTIAL, NOT_ADAPTED, NOT_ADAPTED, NOT_ADAPTED, SHORT]
    full = score(documents, tmp_path, config)
    for d in result.documents[2:5]:
        assert d.adapted_nats == d.base_nats
    for part, whole in zip(result.documents[:2], full.documents[:2], strict=True):
        assert part.adapted_nats != whole.adapted_nats and part.adapted_nats != part.base_nats
    assert result.totals()["by_status"] == {PARTIAL: 2, NOT_ADAPTED: 3, SHORT: 1}


@pytest.mark.parametrize("protocol", ["score_first", pytest.param("min_nll", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("one_thread")
def test_a_run_gives_the_results_of_the_oracle(tmp_path, protocol):
    documents = [document(n, n) for n in (20, 200, 33, 0, 120, 31)]
    config, said = TTT.override({"protocol": protocol}), []
    found = score(documents, tmp_path, config, say=said.append)
    model = randomized().requires_grad_(False)
    expected = eager.adapt(model, documents, config)
    for index, one in enumerate(found.documents):
        is_long = len(documents[index].tokens) >= config.min_tokens
        assert (one.name, one.status) == (documents[index].name, ADAPTED if is_long else SHORT)
        assert one.adapted_nats == (pytest.approx(expected.nats[index], rel=1e-5) if is_long else one.base_nats)
        assert one.kept_pass == (expected.kept_pass[index] if is_long else 0)
    assert said == ["engine: 4 documents side by side in 4 slots, at most 0.0 GiB"]
    assert found.facts["scorer"] == "uncaptured" and 0 < found.facts["engine"]["useful_places"] <= 1


def test_one_document_alone_takes_one_place_on_a_cpu(tmp_path):
    """A step over four places would take four times as long there."""
    assert score([document(112)], tmp_path).facts["engine"]["useful_places"] == 1.0
    assert score([document(112, n) for n in range(3)], tmp_path).facts["engine"]["useful_places"] == 1.0


@pytest.mark.usefixtures("one_thread")
def test_a_batch_beyond_all_documents_takes_no_places_for_them_on_a_cpu(tmp_path):
    documents = [document(n, n) for n in (40, 64, 90)]
    found = score(documents, tmp_path / "many", TTT.override({"batch": 10**12}))
    assert found.facts["engine"]["batch"] == found.facts["engine"]["slots"] == 3
    assert adapted_nats(found) == adapted_nats(score(documents, tmp_path / "few", TTT.override({"batch": 3})))


def test_what_the_deadline_leaves_out_is_the_base_models(tmp_path):
    documents = [document(n, n) for n in (200, 20, 120)]
    result = score(documents, tmp_path, TTT.override({"deadline": "1e-9"}))
    assert [d.status for d in result.documents] == [NOT_ADAPTED, SHORT, NOT_ADAPTED]
    assert adapted_nats(result) == [d.base_nats for d in result.documents]


def test_a_run_without_a_journal_gives_the_same_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = [document(n, n) for n in (100, 20)]
    kept = score(documents, tmp_path / "kept")
    bare = pipeline.score(pipeline.ScoreRequest(randomized(), documents, TTT))
    assert bare.documents == kept.documents and [path.name for path in tmp_path.iterdir()] == ["kept"]
    empty = pipeline.score(pipeline.ScoreRequest(randomized(), [], TTT, keeps_nll=True))
    assert not empty.documents and empty.totals()["documents"] == 0 and empty.nll == []


@queues
def test_the_weights_of_each_model_are_frozen_once(tmp_path, monkeypatch, queue):
    made, make = [], weights.weights_of
    monkeypatch.setattr(weights, "weights_of", lambda *given, **how: made.append(given) or make(*given, **how))
    documents = [document(n, n) for n in (100, 20, 70, 5)]
    score(documents, tmp_path, prequant=randomized(seed=1), queue=queue())
    assert len(made) == 2


def test_the_eager_scorer_is_gone_and_says_what_is_left():
    cpu = torch.device("cpu")
    assert pick_scorer("auto", cpu) == pick_scorer("uncaptured", cpu) == "uncaptured"
    assert pick_scorer("auto", torch.device("cuda")) == "engine"
    for scorer, says in (
        ("eager", "scorer='eager' is gone: the engine scores on a CPU, too; allowed: auto, uncaptured"),
        ("engine", "scorer='engine' is not possible on cpu: graphs want a GPU; allowed: auto, uncaptured"),
        ("fast", "scorer='fast' is not possible; allowed: auto, engine, uncaptured"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            pick_scorer(scorer, cpu)


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


def test_the_row_of_the_default_targets_is_laid_out_as_it_always_was():
    """Block after block A, B of Q, K and V and the bias, then the head's A and B; A drawn in that order."""
    layout = AdapterLayout(SMALL, TTT)
    D, N, V = SMALL.width, sum(SMALL.qkv_sizes), SMALL.vocab_size
    assert [part.shape for part in layout.parts] == [(3, 2, D), (N, 2), (D,)] * SMALL.blocks + [(3, D), (V, 3)]
    generator, row = torch.Generator().manual_seed(TTT.adapter_seed), layout.initial(TTT.adapter_seed)
    for part in layout.parts:
        values = torch.zeros(math.prod(part.shape))
        if part.is_lora_a:
            values = (2 * torch.rand(len(values), generator=generator) - 1) / math.sqrt(D)
        assert torch.equal(row[part.start : part.stop], values)
    assert layout.decay() is None


def test_every_target_has_its_rank_rate_and_scale():
    config = TTT.override({"targets": "up, q,down,head,o", "o_rank": 5, "up_alpha": 6.0, "down_lr": 7.0, "a_scale": 3})
    layout = AdapterLayout(SMALL, config)
    D, hidden, (nq, nk, nv) = SMALL.width, SMALL.mlp_hidden, SMALL.qkv_sizes
    names = list(layout.blocks[0])
    assert names == ["qkv", "o", "up", "down", "bias"] and [config.rank(n) for n in "qkvo"] == [2, 0, 0, 5]
    pairs = [(3, 2, D), (nq + nk + nv, 2), (5, D), (D, 5), (2, D), (hidden, 2), (2, hidden), (D, 2)]
    assert [part.shape for part in layout.parts[:9]] == [*pairs, (D,)]
    factors, row = layout.group_lr(), layout.initial(0)

    def of(values, name, which):
        part = layout.parts[layout.blocks[0][name].start + which]
        return values[part.start : part.stop].view(part.shape)

    assert (of(factors, "up", 0) == 1.0).all() and (of(factors, "up", 1) == 3.0).all()
    assert (of(factors, "down", 0) == 7.0).all() and (of(factors, "o", 1) == 1.0).all()
    assert (of(factors, "qkv", 1)[:nq] == 0.5).all() and of(row, "qkv", 0)[0].all() and not of(row, "qkv", 0)[1:].any()
    assert 3 / math.sqrt(hidden) * 0.9 < of(row, "down", 0).abs().max() <= 3 / math.sqrt(hidden)
    assert 3 / math.sqrt(D) * 0.9 < of(row, "o", 0).abs().max() <= 3 / math.sqrt(D)
    assert AdapterLayout(SMALL, config.override({"weight_decay": 0.5})).decay()[0] == 0.25


@pytest.mark.slow
def test_a_smaller_rank_of_q_k_or_v_stays_zero_and_is_that_rank():
    """Rows of A and columns of B past it are zeros after many steps; one projection alone is that of its own config."""
    config = TTT.override({"q_rank": 3, "k_rank": 1, "targets": "q,k,head", "weight_decay": 0.1, "steps_per_chunk": 3})
    docs = [document(150)]
    engine = engine_of(randomized(dtype=torch.float64).requires_grad_(False), config, docs)
    engine.adapt(docs, Deadline(0))
    pool, (nq, nk, _) = engine.pool, SMALL.qkv_sizes
    assert pool.step.tolist() == [27]
    views = pool.views(pool.params, 1)
    for block in pool.layout.blocks:
        a, b = (view[0] for view in views[block["qkv"]])
        assert a[0].all() and a[1, :1].all() and not a[1, 1:].any() and not a[2].any()
        assert b[:nq].all() and b[nq : nq + nk, :1].all() and not b[nq : nq + nk, 1:].any() and not b[nq + nk :].any()


def test_alpha_is_a_scale_of_the_lora_by_alpha_over_rank():
    """Against Adam on unscaled A and B, whose product a scale multiplies, in float64; epsilon tends to nothing."""
    alphas = {"q_alpha": 4.0, "k_alpha": 0.5, "o_alpha": 3.0, "down_alpha": 8.0, "head_alpha": 1.5}
    config = TTT.override({"targets": "q,k,v,o,up,down,head", "weight_decay": 0.3, "eps": 1e-30, "lr": 0.02, **alphas})
    model = randomized(dtype=torch.float64).requires_grad_(False)
    docs, device = [document(80)], torch.device("cpu")

    def adapted(config: TTTConfig) -> float:
        return engine_of(model, config, docs).adapt(docs, Deadline(0)).nats[0]

    layout = AdapterLayout(SMALL, config)
    plain = [
        layout.initial(config.adapter_seed)[p.start : p.stop].view(1, *p.shape).double().requires_grad_()
        for p in layout.parts
    ]
    scales = [p.scale.double() if len(p.scale) == 1 else p.scale.double()[:, None] for p in layout.parts]
    assert {float(value) for scale in scales for value in scale.flatten()} == {2.0, 0.25, 1.5, 4.0, 0.5, 1.0}
    batch, total, moments = Batch(docs, config, device), 0.0, [(0.0, 0.0)] * len(plain)
    for j in range(batch.rounds):
        inputs, at, targets, exists = batch.chunk(j, 1)
        adapters, head = layout.adapters(None, [scale * part for scale, part in zip(scales, plain, strict=True)])
        hidden = model.hidden(inputs, adapters, rotary_length=config.window)[0, at[0]]
        z = hidden @ model.embed.T + hidden @ head.a[0].T @ head.b[0].T
        logits = SMALL.softcap * torch.tanh(z / SMALL.softcap) / config.temperature
        nll = -logits.log_softmax(-1).gather(1, targets[0][:, None])[:, 0]
        total += nll[exists[0]].sum().item()
        if j + 1 == batch.rounds:
            break
        for i, gradient in enumerate(torch.autograd.grad(nll.mean(), plain)):
            m, v = moments[i]
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
            moments[i] = m, v
            rate = layout.parts[i].group_lr.double()
            rate = config.lr * (rate.view(-1, *(1,) * (plain[i].dim() - 2)) if len(rate) > 1 else rate)
            step = (m / (1 - 0.9 ** (j + 1))) / (v / (1 - 0.95 ** (j + 1))).sqrt()
            plain[i].data -= rate * (config.weight_decay * plain[i].data + step.nan_to_num())
    assert adapted(config) == pytest.approx(total, rel=1e-7)
    assert abs(adapted(config.override(dict.fromkeys(alphas, 0.0))) - total) > 1e-3


@pytest.mark.parametrize("targets", ["", "q,k,w", "q,q", "q;k", "all"])
def test_targets_that_do_not_exist_are_refused(targets):
    allowed = "some of q, k, v, o, up, down, head, each once, with commas between them"
    with pytest.raises(ConfigError, match=f"targets='{targets}' is not possible; allowed: {allowed}"):
        TTTConfig(targets=targets)
    with pytest.raises(ConfigError, match=re.escape(f"targets=['q'] is not possible; allowed: {allowed}")):
        TTTConfig(targets=["q"])


def test_a_rank_or_an_alpha_of_no_target_is_refused():
    """It would change nothing, and no output would say so."""
    for target in TARGETS:
        others = ",".join(name for name in TARGETS if name != target)
        for name in (f"{target}_rank", f"{target}_alpha"):
            if name != "head_rank":
                config = TTTConfig().override({"targets": target, name: "8"})
                with pytest.raises(ConfigError, match=f"{name}=8.* is not possible; allowed: 0, with targets={others}"):
                    config.override({"targets": others})
    assert ttt_preset("best").override({"targets": "o"}).rank("o") == 64


def test_a_lora_that_starts_as_zeros_and_stays_so_is_refused():
    """B starts as zeros, too, and each is a factor of the other's gradient."""
    with pytest.raises(ConfigError, match="a_scale=0.0 is not possible; allowed: float, above 0.0"):
        TTTConfig(a_scale=0.0)


@pytest.mark.parametrize(
    "name", ["lora_rank", "head_rank", "q_rank", "k_rank", "v_rank", "o_rank", "up_rank", "down_rank"]
)
def test_ranks_go_up_to_128(name):
    assert getattr(TTTConfig(targets="q,k,v,o,up,down").override({name: "128"}), name) == 128
    with pytest.raises(ConfigError, match=f"{name}=129 is not possible; allowed: .*128"):
        TTTConfig().override({name: "129"})


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
    strict = TTTConfig(layout="start")
    for changes, says in (
        ({"protocol": "min_nll"}, "layout='start' is not possible; allowed: original, with protocol=min_nll"),
        ({"min_tokens": 64}, "min_tokens=64 is not possible; allowed: 512, which is not used: layout=start goes by"),
        ({"layout": "original", "adapt_from": 1}, "adapt_from=1 is not possible; allowed: 0; layout=original goes"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            strict.override(changes)
    assert ttt_preset("quick").layout == ttt_preset("thorough").layout == "start"
    assert ttt_preset("design").layout == ttt_preset("quick", "min_nll").layout == "original"
    with pytest.raises(ConfigError, match="protocol='best' is not possible; allowed: one of score_first"):
        TTTConfig(protocol="best")
    assert TTTConfig().protocol == "score_first" and label("score_first") == "score_first"
    assert label("min_nll") == "min_nll (LEAKY)"
