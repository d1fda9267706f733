"""Numbers of a stored score and of its file of NLLs: what is none is refused, and rounding below zero is kept."""

import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from klora.kernels import BOS_ID
from klora.ttt.documents import Document, digest_of
from klora.ttt.journal import Journal, fingerprint
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.report import write_report
from klora.ttt.results import NLL_ROUNDING
from klora.ttt.verify import NLL_FORMAT, Stored, VerifyError, read_nll, verify, write_nll
from test_model_audit import STRICT, rounds_below_zero, sure_model
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
