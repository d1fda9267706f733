"""The tokenizer: its training, its round trip, and the count of bytes behind every token."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from conftest import documents, words
from hypothesis import example, given, settings
from hypothesis import strategies as st
from klora.model import tokenizer as tokenizer_module
from klora.model.corpus import Corpus, CorpusError, Document
from klora.model.tokenizer import Tokenizer, TokenizerError

NASTY = "\0\t\n\r\x0b\x1c\x85 \u00a0\u2028\u3000\ufeff\ufffd\u2047\u2585<s>0x1Aé\u0301字😀"


@pytest.fixture(scope="module")
def nasty_tokenizer() -> Tokenizer:
    """Pieces learned from text full of characters that SentencePiece or Python treat specially."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(NASTY + "   ab", k=200)) for _ in range(40)]
    return Tokenizer.train([Document(str(i), text) for i, text in enumerate(texts)], vocab_size=400)


def test_training_is_deterministic_and_has_the_size_asked_for(tokenizer):
    again = Tokenizer.train(iter(documents(40)), vocab_size=400)
    assert again.to_bytes() == tokenizer.to_bytes()
    assert tokenizer.vocab_size == 400 and tokenizer.bos_id == 1


def test_training_on_a_sample_is_deterministic(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "SAMPLED_SENTENCES", 101)  # the least that SentencePiece takes
    many = documents(150)
    sampled, again = (Tokenizer.train(many, vocab_size=400) for _ in range(2))
    assert sampled.to_bytes() == again.to_bytes()
    monkeypatch.undo()
    pieces, whole = (
        set(trained.decode([1, i]) for i in range(400)) for trained in (sampled, Tokenizer.train(many, 400))
    )
    assert pieces != whole


def test_training_learns_from_line_ends_indentation_and_long_lines():
    lines = [Document("a", "if x:\n    pass\n" * 200), Document("b", "longword " * 2000), Document("c", "qz" * 9000)]
    lines.append(Document("d", "\u2585vwvwvwvw " * 50))
    learned = Tokenizer.train(lines, vocab_size=300)
    pieces = {learned.decode([1, i]) for i in range(learned.vocab_size)}
    assert any(piece.endswith(":\n") for piece in pieces)
    assert {"   ", "qzqz", "vwvw"} <= pieces
    assert any("longword" in piece for piece in pieces)


def test_training_sentences_are_all_of_the_text_and_short_enough():
    text = words(1, 2000) + "x" * 5000 + " " + "😀" * 3000 + "\n" * 3000 + " y" * 3000
    sentences = list(tokenizer_module._sentences([Document("a", text), Document("b", "end")]))
    assert all(0 < len(sentence.encode()) <= tokenizer_module.SENTENCE_BYTES for sentence in sentences)
    assert "".join(sentences).replace(" ", "") == text.replace(" ", "") + "end"
    lines = list(tokenizer_module._sentences([Document("c", "some words\n" * 1000)]))
    assert len(lines) > 10 and all(sentence.endswith("words\n") for sentence in lines)


def test_training_needs_text(tokenizer):
    with pytest.raises(TokenizerError, match="vocab_size=1024 is too large for this text.*vocab_size of at most 2"):
        Tokenizer.train([Document("a", "hello hello")])
    with pytest.raises(TokenizerError, match="vocab_size=260 is too small.*need a vocab_size of at least 266"):
        Tokenizer.train([Document("a", "abc def")], vocab_size=260)
    with pytest.raises(TokenizerError, match="no text to train"):
        Tokenizer.train([])
    with pytest.raises(TokenizerError, match="vocab_size=65537 is not possible; allowed: at most 65536"):
        Tokenizer.train(documents(1), vocab_size=65537)


def test_training_passes_on_the_error_of_its_source(tmp_path):
    with pytest.raises(CorpusError, match="no document with any text"):
        Tokenizer.train(Corpus.text([tmp_path]).documents())
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": words(0, 1000)}) + "\n[]")
    with pytest.raises(CorpusError, match=r"d\.jsonl, line 2: its value is of type list"):
        Tokenizer.train(Corpus.jsonl([tmp_path / "d.jsonl"]).documents())


def test_model_survives_bytes_and_file(tmp_path, tokenizer):
    (tmp_path / "t.model").write_bytes(tokenizer.to_bytes())
    for loaded in (Tokenizer.from_bytes(tokenizer.to_bytes()), Tokenizer.from_file(tmp_path / "t.model")):
        assert loaded.encode("alpha = beta").tolist() == tokenizer.encode("alpha = beta").tolist()


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["alpha beta"]), model_writer=model, model_type="bpe", minloglevel=4, **options
    )
    return model.getvalue()


def test_models_that_do_not_fit_are_refused(tmp_path, monkeypatch, tokenizer):
    with pytest.raises(TokenizerError, match="no byte fallback"):
        Tokenizer(sentencepiece_model(vocab_size=12))
    with pytest.raises(TokenizerError, match="BOS id 2; wanted 1"):
        Tokenizer(sentencepiece_model(vocab_size=270, byte_fallback=True, bos_id=2, eos_id=1))
    with pytest.raises(TokenizerError, match=r"none\.model: cannot be read as a tokenizer"):
        Tokenizer.from_file(tmp_path / "none.model")
    for junk in (b"", b"junk"):
        (tmp_path / "junk.model").write_bytes(junk)
        with pytest.raises(TokenizerError, match=r"junk\.model is not a SentencePiece model"):
            Tokenizer.from_file(tmp_path / "junk.model")
    monkeypatch.setattr(tokenizer_module, "MAX_VOCAB", 399)
    with pytest.raises(TokenizerError, match="has 400 pieces; allowed: at most 399"):
        Tokenizer(tokenizer.to_bytes())


def test_encode_starts_with_bos_and_many_threads_agree(tokenizer):
    texts = [document.text for document in documents(20)] + ["", " "]
    encoded = tokenizer.encode_many(texts, threads=3)
    assert tokenizer.encode_many([], threads=3) == []
    for text, tokens in zip(texts, encoded, strict=True):
        assert tokens.dtype == np.uint16 and tokens[0] == 1
        assert tokens.tolist() == tokenizer.encode(text).tolist()
    assert encoded[-2].tolist() == [1]
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


def test_decode(tokenizer):
    first, second = tokenizer.encode("alpha beta"), tokenizer.encode(" gamma")
    assert tokenizer.decode(first[1:]) == tokenizer.decode(first.tolist()) == "alpha beta"
    assert tokenizer.decode(np.concatenate([first, second])) == "alpha beta gamma"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("字")[:-1]) == "\ufffd"
    for ids in ([1, 400], [-1]):
        with pytest.raises(TokenizerError, match="allowed: 0 to 399"):
            tokenizer.decode(ids)


def assert_exact(tokenizer: Tokenizer, text: str):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    counted = tokenizer.target_bytes(tokens)
    assert counted.dtype == np.int64 and len(counted) == len(tokens) - 1
    assert counted.sum() == len(text.encode())


plain_text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))
nasty_text = st.lists(st.sampled_from([*NASTY, "<s>", "</s>", "<unk>", "<0x0A>", "\r\n", "    ", "ab"])).map("".join)


@settings(max_examples=300, deadline=None)
@given(plain_text | nasty_text)
@example("")
@example(" ")
@example("  \n  ")
@example("\0")
@example(" \u2047 ")
@example("<0x0A></s>")
def test_bytes_and_text_are_exact(tokenizer, nasty_tokenizer, text):
    assert_exact(tokenizer, text)
    assert_exact(nasty_tokenizer, text)


def test_bytes_of_each_piece_are_those_of_the_rule(tokenizer):
    """The counts restated piece by piece from SentencePiece's own description of the model."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.to_bytes())
    for i in range(tokenizer.vocab_size):
        piece = processor.id_to_piece(i)
        control = processor.is_control(i) or processor.is_unknown(i)
        space = piece.startswith("\u2581")
        length = len(piece.removeprefix("\u2581").replace("\u2581", " ").encode())
        expected = 0 if control else 1 if processor.is_byte(i) else length
        assert tokenizer.is_control[i] == control == (i < 3)
        assert tokenizer.leading_space[i] == space
        assert tokenizer.piece_bytes[i] == expected
        after_bos, after_text = (tokenizer.target_bytes(np.array([before, i]))[0] for before in (1, 300))
        assert (after_bos, after_text) == (expected, expected + space)
    assert tokenizer.leading_space.dtype == tokenizer.is_control.dtype == bool
    assert tokenizer.piece_bytes.dtype == np.int64


def test_a_literal_space_mark_is_a_space(tokenizer):
    tokens = tokenizer.encode("a\u2581b")
    assert tokens.tolist() == tokenizer.encode("a b").tolist()
    assert tokenizer.target_bytes(tokens).sum() == 3
