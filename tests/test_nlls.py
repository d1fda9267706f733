"""Numbers of a stored score and of its file of NLLs: what is none is refused, and rounding below zero is kept."""

import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import randomized
from klora.kernels import BOS_ID
from klora.ttt import pipeline
from klora.ttt.documents import Document, digest_of
from klora.ttt.journal import Journal, JournalError, fingerprint
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.progress import Interrupted
from klora.ttt.protocols import TTTConfig
from klora.ttt.report import write_report
from klora.ttt.results import NLL_ROUNDING
from klora.ttt.verify import NLL_FORMAT, Stored, VerifyError, read_nll, verify, write_nll
from test_journal import chained, lines_of
from test_model_audit import STRICT, rounds_below_zero, sure_model
from test_ttt import TTT
from test_ttt import document as document_of
from test_verify import artifact, forged, lines, scored

__all__ = ["artifact", "lines", "rounds_below_zero", "scored"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_nll_that_is_no_number_is_refused(scored, tmp_path, value):
    """Of any document but the last, a NaN had been forgotten by the largest difference."""
    nll = safetensors.numpy.load_file(scored / "nll.safetensors")
    with safetensors.safe_open(scored / "nll.safetensors", "numpy") as file:
        metadata = file.metadata()
    nll["nll"][5] = value
    safetensors.numpy.save_file(nll, tmp_path / "nll.safetensors", metadata)
    with pytest.raises(VerifyError, match="is no file of NLLs .*: an NLL is no finite number"):
        read_nll(tmp_path / "nll.safetensors", Stored(scored / "score.json"))


def test_numbers_whose_sum_no_float_holds_are_refused(scored, tmp_path):
    folder = forged(scored, tmp_path, lambda v: [d.update(adapted_nats=1e308) for d in v["documents"]])
    with pytest.raises(VerifyError, match="that could be recomputed: intermediate overflow"):
        Stored(folder / "score.json")


def test_nlls_whose_metadata_is_too_deep_are_refused(scored, tmp_path):
    nll = safetensors.numpy.load_file(scored / "nll.safetensors")
    metadata = {"format": NLL_FORMAT, "sha256": "[" * 100_000}
    safetensors.numpy.save_file(nll, tmp_path / "nll.safetensors", metadata)
    with pytest.raises(VerifyError, match="is no file of NLLs .*: its objects and lists are too deep"):
        read_nll(tmp_path / "nll.safetensors", Stored(scored / "score.json"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.bool])
def test_nlls_of_a_dtype_that_none_is_written_in_are_refused(scored, tmp_path, dtype):
    """Of fp8 NumPy has no name at all, which was a traceback."""
    nll = {"nll": torch.zeros(3).to(dtype), "offsets": torch.tensor([0, 3])}
    metadata = {"format": NLL_FORMAT, "sha256": json.dumps(["a"])}
    safetensors.torch.save_file(nll, tmp_path / "nll.safetensors", metadata)
    with pytest.raises(VerifyError, match="is no file of NLLs"):
        read_nll(tmp_path / "nll.safetensors", Stored(scored / "score.json"))


@pytest.mark.parametrize(
    "change", [{"nats": -1.0}, {"nats": float("nan")}, {"nats": "1"}, {"nats": True}, {"nats": 10**400}]
)
def test_numbers_that_are_none_are_refused(scored, tmp_path, change):
    folder = forged(scored, tmp_path, lambda v: v["documents"][1].update(adapted_nats=change["nats"]))
    with pytest.raises(VerifyError, match="that could be recomputed: .*(nats are negative or no number|beyond 64|NaN)"):
        Stored(folder / "score.json")


def test_a_document_of_certain_tokens_is_kept_written_read_and_verified(tmp_path, rounds_below_zero):
    """Whose nats are below 0 by rounding: in the journal, in score.json, in the report, and elsewhere by another."""
    sure, tokens = sure_model(257, 16.0), np.array([BOS_ID, 257, 257, 257], np.uint16)
    documents = [Document("one", tokens[:2], 3), Document("two", tokens[:3], 6), Document("more", tokens, 9)]
    key = fingerprint("artifact", documents, STRICT, False)
    about = {"artifact": {"header_sha256": "a", "payload_sha256": "b"}, "weights": "dense", "device": "here"}
    source = {"documents": 3, "tokens": 6, "sha256": digest_of(documents), "most_tokens": 0}
    about |= {"source": source, "versions": {}}

    def scored(resume):
        book = Journal(tmp_path / "journal.jsonl", key, resume=resume)
        done = dict(book.done)
        result = score(ScoreRequest(sure, documents, STRICT, journal=book, facts=about, keeps_nll=True))
        book.close()
        return done, result

    _, result = scored(False)
    assert all(-NLL_ROUNDING < one.adapted_nats < 0 for one in result.documents)
    again, resumed = scored(True)
    assert again == dict(enumerate(result.documents)) and resumed.documents == result.documents
    result.write(tmp_path)
    write_nll(tmp_path / "nll.safetensors", result)
    write_report(result, tmp_path)
    stored = Stored(tmp_path / "score.json")
    nll = read_nll(tmp_path / "nll.safetensors", stored)
    setting = {"versions": {}, "device": "here"}
    report = verify(stored, sure, documents, setting, share=1.0, nll=nll)
    assert report.passed and "to the bit" in str(report), str(report)
    for document in stored.documents:
        document["adapted_nats"] += 1e-6  # more than they are, and no more than rounding
    elsewhere = verify(stored, sure, documents, {"versions": {}, "device": "elsewhere"}, share=1.0)
    assert "recomputed" not in elsewhere.failed, str(elsewhere)
    assert "recomputed" in verify(stored, sure, documents, setting, share=1.0).failed
    for document in stored.documents:
        document["adapted_nats"] += 0.01
    elsewhere = verify(stored, sure, documents, {"versions": {}, "device": "elsewhere"}, share=1.0)
    assert "recomputed" in elsewhere.failed


@pytest.mark.parametrize("phases", [0, 2])
@pytest.mark.parametrize("is_full", [False, True])
def test_a_run_that_goes_on_scores_nothing_again_for_its_nll(tmp_path, monkeypatch, phases, is_full):
    """Unless the journal was too large to take them."""
    sizes = {"chunk": 16, "window": 64, "adapt_from": 32, "lora_rank": 2, "head_rank": 3}
    config = TTTConfig(layout="start", batch=1, phases=phases, **sizes)
    documents, model = [document_of(length) for length in (60, 50, 45, 40, 35, 3)], randomized()
    key, path = fingerprint("artifact", documents, config, False), tmp_path / "journal.jsonl"
    whole = score(ScoreRequest(model, documents, config, keeps_nll=True))
    monkeypatch.setattr(pipeline, "CPU_EVERY", 0.0)
    monkeypatch.setattr(Journal, "_is_half_full", lambda book: is_full)
    again = []
    honest = pipeline._scored_again
    monkeypatch.setattr(pipeline, "_scored_again", lambda *given: again.append(given[-1]) or honest(*given))
    for stop_at in (2, 4):
        book = Journal(path, key, resume=stop_at > 2)
        stops = {"should_stop": lambda book=book, stop_at=stop_at: len(book.done) >= stop_at}
        with pytest.raises(Interrupted):
            score(ScoreRequest(model, documents, config, journal=book, keeps_nll=True, **stops))
        book.close()
    book = Journal(path, key, resume=True)
    assert 4 <= len(book.done) < 6
    found = score(ScoreRequest(model, documents, config, journal=book, keeps_nll=True))
    book.close()
    assert any(again) == is_full and found.documents == whole.documents
    for ours, theirs in zip(found.nll, whole.nll, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_nll_of_a_journal_whose_sum_is_not_the_documents_is_not_believed(tmp_path):
    documents, model = [document_of(60), document_of(50)], randomized()
    whole = score(ScoreRequest(model, documents, TTT, keeps_nll=True))
    path, key = tmp_path / "journal.jsonl", fingerprint("artifact", documents, TTT, False)
    book = Journal(path, key, resume=False)
    book.add(dict(enumerate(whole.documents)), nll={0: whole.nll[0], 1: whole.nll[1] * 0.99})
    book.close()
    book = Journal(path, key, resume=True)
    found = score(ScoreRequest(model, documents, TTT, journal=book, keeps_nll=True))
    book.close()
    np.testing.assert_array_equal(found.nll[1], whole.nll[1])


def test_a_journal_that_is_half_as_large_as_may_be_read_takes_no_more_nll(tmp_path, monkeypatch):
    monkeypatch.setenv("KLORA_MAX_RECORD_BYTES", "4000")
    documents, model = [document_of(length) for length in (60, 50, 45)], randomized()
    book = Journal(tmp_path / "journal.jsonl", "a run", resume=False)
    (result,) = score(ScoreRequest(model, documents[:1], TTT)).documents
    for index in range(8):
        book.add({index: result}, nll={index: np.ones(result.adapted_tokens, np.float32)})
    book.close()
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert "nll" in lines[1] and "nll" not in lines[-1] and (tmp_path / "journal.jsonl").stat().st_size < 4000


@pytest.mark.parametrize("nll", ["", "AAAA", "no base64", 3, None, "twice"])
def test_an_nll_of_a_journal_that_is_not_that_of_each_target_is_refused_by_line(tmp_path, nll):
    path, (result,) = tmp_path / "journal.jsonl", score(ScoreRequest(randomized(), [document_of(60)], TTT)).documents
    book = Journal(path, "a run", resume=False)
    book.add({0: result}, nll={0: np.ones(result.adapted_tokens, np.float32)})
    book.close()
    Journal(path, "a run", resume=True).close()
    records = lines_of(path)
    (at,) = (number for number, record in enumerate(records) if "nll" in record)
    records[at]["nll"] = 2 * records[at]["nll"] if nll == "twice" else nll
    path.write_text(chained(records))
    with pytest.raises(JournalError, match=rf"line {at + 1}: its nll are not the numbers of 60 targets; remove that"):
        Journal(path, "a run", resume=True)


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_nats_below_zero_by_more_than_rounding_are_refused(scored, tmp_path, share):
    """By a target's rounding for each of its targets."""

    def below(values):
        document = values["documents"][1]
        document["adapted_nats"] = -share * NLL_ROUNDING * document["tokens"]

    folder = forged(scored, tmp_path, below)
    if share < 1:
        assert Stored(folder / "score.json").documents[1]["adapted_nats"] < 0
    else:
        with pytest.raises(VerifyError, match="that could be recomputed: a result whose nats are negative"):
            Stored(folder / "score.json")
