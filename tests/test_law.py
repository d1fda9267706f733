"""Documents of the law that scoring is timed on."""

import numpy as np
import pytest
from klora.bench.law import law, law_lengths
from klora.bench.ttt import corpus_lengths
from klora.model.corpus import Corpus


def test_lengths_are_those_of_the_law():
    lengths = law_lengths(6250)
    assert lengths.min() >= 8 and lengths.max() <= 60_000
    assert np.log(lengths).mean() == pytest.approx(6.555, abs=0.03)
    assert np.log(lengths).std() == pytest.approx(1.066, abs=0.03)
    assert np.array_equal(law_lengths(500), lengths[:500])
    assert np.array_equal(corpus_lengths({"every": 100, "longest": 640}), lengths.clip(8, 640)[::100])


def test_documents_are_the_text_end_to_end_and_again(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "law.jsonl.zst"
    source.write_text('{"text": "one two"}\n{"text": "three \u00e9"}\n', encoding="utf-8")
    law(source, out, documents=5, characters=0.5)
    texts = [document.text for document in Corpus.jsonl([out]).documents()]
    assert [len(text) for text in texts] == [int(length * 0.5) for length in law_lengths(5)]
    whole = "one two\n\nthree \u00e9"
    assert "".join(texts) == (whole * 1000)[: sum(map(len, texts))]


def test_no_text_is_refused(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="no document with any text"):
        law(source, tmp_path / "out.jsonl.zst")
    assert not (tmp_path / "out.jsonl.zst").exists()
