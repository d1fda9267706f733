"""The tokenizer: its training, its round trip, and the count of bytes behind every token."""

import hashlib
import io
import json
import random
from functools import cache

import numpy as np
import pytest
import sentencepiece
from conftest import documents, words
from hypothesis import example, given, settings
from hypothesis import strategies as st
from klora.kernels import BOS_ID
from klora.model import tokenizer as tokenizer_module
from klora.model.corpus import Corpus, CorpusError, TextDocument
from klora.model.tokenizer import Tokenizer, TokenizerError
from klora.ttt.documents import documents_from_texts, documents_from_tokens

NASTY = "\0\t\n\r\x0b\x1c\x85 \u00a0\u2028\u3000\ufeff\ufffd\u2047\u2585<s>0x1Aé\u0301字😀"


@pytest.fixture(scope="module")
def nasty_tokenizer() -> Tokenizer:
    """Pieces learned from text full of characters that SentencePiece or Python treat specially."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(NASTY + "   ab", k=200)) for _ in range(40)]
    return Tokenizer.train([TextDocument(str(i), text) for i, text in enumerate(texts)], vocab_size=400)


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
    lines = [
        TextDocument("a", "if x:\n    pass\n" * 200),
        TextDocument("b", "longword " * 2000),
        TextDocument("c", "qz" * 9000),
    ]
    lines.append(TextDocument("d", "\u2585vwvwvwvw " * 50))
    learned = Tokenizer.train(lines, vocab_size=300)
    pieces = {learned.decode([1, i]) for i in range(learned.vocab_size)}
    assert any(piece.endswith(":\n") for piece in pieces)
    assert {"   ", "qzqz", "vwvw"} <= pieces
    assert any("longword" in piece for piece in pieces)


def test_training_sentences_are_all_of_the_text_and_short_enough():
    text = words(1, 2000) + "x" * 5000 + " " + "😀" * 3000 + "\n" * 3000 + " y" * 3000
    sentences = list(tokenizer_module._sentences([TextDocument("a", text), TextDocument("b", "end")]))
    assert all(0 < len(sentence.encode()) <= tokenizer_module.SENTENCE_BYTES for sentence in sentences)
    assert "".join(sentences).replace(" ", "") == text.replace(" ", "") + "end"
    lines = list(tokenizer_module._sentences([TextDocument("c", "some words\n" * 1000)]))
    assert len(lines) > 10 and all(sentence.endswith("words\n") for sentence in lines)


def test_training_needs_text(tokenizer):
    with pytest.raises(TokenizerError, match="vocab_size=1024 is too large for this text.*vocab_size of at most 2"):
        Tokenizer.train([TextDocument("a", "hello hello")])
    with pytest.raises(TokenizerError, match="vocab_size=260 is too small.*need a vocab_size of at least 266"):
        Tokenizer.train([TextDocument("a", "abc def")], vocab_size=260)
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


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_bytes_of_tokens_are_those_of_each_one_after_the_other(tokenizer, data):
    """Gathered some at a time, whatever the ids: control tokens, after which a space is added, and broken UTF-8."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 3), max_size=40))
    wanted = b"".join(tokenizer.token_bytes(ids))
    with pytest.MonkeyPatch.context() as patch:
        for at_a_time in (1, 3, 2**20):
            patch.setattr(tokenizer_module, "GATHERED", at_a_time)
            assert tokenizer.text_bytes(ids) == wanted
    with pytest.raises(TokenizerError):
        tokenizer.text_bytes([*ids, tokenizer.vocab_size])


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


# ---- models that others have trained

WORDS = ["alpha", "beta", "Gamma", "delta", "Epsilon", "zeta", "theta", "é", "ﬁne", "Ａ", "12", "foo(bar)"]


@cache
def model_with(**options) -> bytes:
    """A model as klora trains them, but for `options`."""
    draw = random.Random(0)
    ours = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    ours |= {"model_type": "bpe", "vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 4}
    sentences = [" ".join(draw.choices(WORDS, k=30)) for _ in range(100)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **(ours | options))
    return model.getvalue()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"normalization_rule_name": "nfkc"}, r"changes composed and decomposed accents: it reads 'é e\u0301"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"changes line ends: it reads 'a\\nb"),
        ({"normalization_rule_name": "nfkc_cf"}, "changes upper case: it reads 'Straße ABC İI' back as 'straße abc"),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "changes line ends"),
        ({"treat_whitespace_as_suffix": True}, "changes a space: it reads ' ' back as '  '"),
        ({"remove_extra_whitespaces": True}, "changes a space: it reads ' ' back as ''"),
        ({"model_type": "word"}, "changes a space"),
    ],
)
def test_models_that_change_text_are_refused_by_what_they_do(options, says):
    """Their tokens stand for another text: bits per byte would be off by 1 to 60% without a word."""
    with pytest.raises(TokenizerError, match=says) as refused:
        Tokenizer(model_with(**options), "their.model")
    assert "their.model" in str(refused.value) and "normalization_rule_name=identity" in str(refused.value)


@cache
def without_space() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abcdefgh" * 50] * 20),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 280, "byte_fallback": True, "add_dummy_prefix": False},
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 4},
    )
    return model.getvalue()


@pytest.mark.parametrize("may_normalise", [False, True])
def test_a_model_without_a_piece_for_the_space_is_refused(may_normalise):
    with pytest.raises(TokenizerError, match="changes a space: it reads ' ' back as '\u2581'"):
        Tokenizer(without_space(), may_normalise=may_normalise)


def test_a_rule_for_a_single_character_is_found(tmp_path):
    """No sample of text would hold the one character that a model's own rule replaces."""
    (tmp_path / "rule.tsv").write_text("4E00\t4E8C\n")
    with pytest.raises(TokenizerError, match="changes characters: it reads .*一.* as .*二丁"):
        Tokenizer(model_with(normalization_rule_tsv=str(tmp_path / "rule.tsv")))


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": False, "user_defined_symbols": "\u2581"},
        {"user_defined_symbols": "<sep>,\u2581\u2581foo,ab"},
        {"control_symbols": "<ctl>"},
        {"model_type": "unigram"},
        {"model_type": "char"},
        {"split_digits": True, "pad_id": 0, "unk_id": 3},
        {"allow_whitespace_only_pieces": True, "split_by_whitespace": False},
    ],
    ids=str,
)
def test_models_that_keep_text_are_counted_exactly(options):
    theirs = Tokenizer(model_with(**options))
    assert theirs.adds_space == options.get("add_dummy_prefix", True)
    for text in ("", " ", "  alpha  foo ", "<sep>x<ctl> a", "\tif x:\r\n", *tokenizer_module.PROBES.values()):
        if "\u2581" not in text:
            assert_exact(theirs, text)


def test_the_probes_hold_every_byte_that_a_text_can_have():
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set(tokenizer_module.PROBES["all bytes"].encode()) == set(range(256)) - never


def test_documents_are_checked_against_their_text(tokenizer):
    """A tokenizer that passed every probe and still loses some text."""
    (found,) = documents_from_texts([TextDocument("good.txt", "alpha beta\n")], tokenizer)
    assert (found.bytes, found.sha256) == (11, hashlib.sha256(b"alpha beta\n").hexdigest())
    marked = r"document 'marked.txt' has 8 bytes of text, and its tokens stand for 4 \('a▁b▁' is read back as 'a b '\)"
    with pytest.raises(TokenizerError, match=marked):
        list(documents_from_texts([TextDocument("marked.txt", "a\u2581b\u2581")], tokenizer))
    forgetful = Tokenizer(tokenizer.to_bytes())
    forgetful.encode_many = lambda texts, threads: [ids[:1] for ids in tokenizer.encode_many(texts, threads)]
    with pytest.raises(TokenizerError, match=r"document 'lost.txt' has 14 bytes of text, and its tokens stand for 0"):
        list(documents_from_texts([TextDocument("lost.txt", "the last omega")], forgetful))
    folding = Tokenizer(tokenizer.to_bytes())
    folding.encode_many = lambda texts, threads: tokenizer.encode_many([text.lower() for text in texts], threads)
    with pytest.raises(
        TokenizerError, match=r"document 'upper.txt' .* stand for 5 \('ALPHA' is read back as 'alpha'\)"
    ):
        list(documents_from_texts([TextDocument("upper.txt", "ALPHA")], folding))


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.booleans())
def test_a_document_is_exactly_its_text_or_an_error_that_names_it(tokenizer, text, normalises):
    used = normalising() if normalises else tokenizer
    try:
        (found,) = documents_from_texts([TextDocument("some.txt", text)], used)
    except TokenizerError as error:
        assert str(error).startswith("document 'some.txt' has ") and (normalises or "\u2581" in text)
    else:
        assert used.decode(found.tokens) == text and used.target_bytes(found.tokens).sum() == found.bytes


def test_shards_with_tokens_that_stand_for_no_known_text_are_refused(tokenizer):
    with pytest.raises(
        TokenizerError, match=r"document 'a#1' has the unknown token 0, whose bytes of text nobody knows"
    ):
        list(documents_from_tokens([("a#1", np.array([1, 5, 0, 7], np.uint16))], tokenizer))
    with pytest.raises(
        TokenizerError, match=r"document 'a#2' has ids from 1 to 900; allowed: 0 to 399; give the token"
    ):
        list(documents_from_tokens([("a#2", np.array([1, 900], np.uint16))], tokenizer))
    with pytest.raises(TokenizerError, match="ids from 1 to 400; allowed: 0 to 399"):
        tokenizer.target_bytes(np.array([1, 400]))


# ---- models that normalise, which token shards may be made by

CONTEST = {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "remove_extra_whitespaces": True}
CONTEST |= {"split_digits": True, "character_coverage": 0.999, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
"""The options of the tokenizer that the fineweb shards are made with."""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (CONTEST, "a space, several spaces, leading and trailing spaces, line ends, tabs, composed and decomposed acc"),
        ({**CONTEST, "add_dummy_prefix": True}, "a space, several spaces"),
        ({"normalization_rule_name": "nfkc_cf"}, "upper case, composed and decomposed accents, full-width letters, l"),
        ({"remove_extra_whitespaces": True}, "a space, several spaces, leading and trailing spaces"),
    ],
    ids=["contest", "contest with a prefix", "folding", "spaces"],
)
def test_models_that_only_normalise_count_the_normalised_text(options, says):
    theirs = Tokenizer(model_with(**options), may_normalise=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_with(**options))
    assert theirs.changes.startswith(says) and "(it reads " in theirs.changes and "all bytes" not in theirs.changes
    for text in (*tokenizer_module.PROBES.values(), "  alpha  ﬁne\n\tGamma  字\u0301", "x" * 50, ""):
        tokens = theirs.encode(text)
        # SentencePiece's own normalised text, less the space that it puts in front.
        normalised = (
            processor.normalize(text).removeprefix("\u2581" if theirs.adds_space else "").replace("\u2581", " ")
        )
        assert theirs.decode(tokens) == theirs.normalise(text) == normalised
        assert theirs.target_bytes(tokens).sum() == len(normalised.encode())
    assert "of the normalised text, as the shards hold it" in theirs.notes_on_shards(0)[0]
    assert theirs.notes_on_shards(0)[0].endswith(f"the tokenizer changes {theirs.changes}")


@pytest.mark.parametrize("options", [{"treat_whitespace_as_suffix": True}, {"model_type": "word"}], ids=str)
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_models_that_miscount_the_normalised_text_are_refused_for_shards_too(options, rule):
    with pytest.raises(TokenizerError, match="changes a space: it reads"):
        Tokenizer(model_with(**options, normalization_rule_name=rule), may_normalise=True)


def test_a_rule_of_their_own_is_found_though_no_probe_has_its_character(tmp_path):
    (tmp_path / "rule.tsv").write_text("4E00\t4E8C\n")
    theirs = Tokenizer(model_with(normalization_rule_tsv=str(tmp_path / "rule.tsv")), may_normalise=True)
    assert theirs.changes.startswith("characters (it reads ") and theirs.normalise("a一") == "a二"


def test_a_model_that_keeps_text_has_nothing_to_say(tokenizer):
    assert tokenizer.changes == "" and tokenizer.notes_on_shards(0) == ()
    assert tokenizer.normalise("  a\n ﬁ\u2581") == "  a\n ﬁ "


@cache
def normalising() -> Tokenizer:
    return Tokenizer(model_with(**CONTEST), may_normalise=True)


@pytest.mark.parametrize("text", ["  alpha \n\n ﬁne\u2581 ", "alpha  beta", " ", "ﬁne"])
def test_texts_that_a_tokenizer_normalises_are_refused(text):
    """One of spaces alone has no token at all: its score was 0 bits per byte."""
    (kept,) = documents_from_texts([TextDocument("a.txt", "alpha beta")], normalising())
    assert kept.bytes == len("alpha beta")
    with pytest.raises(
        TokenizerError, match=r"document 'a.txt' has .* is read back as .*; give a tokenizer that keeps"
    ):
        list(documents_from_texts([TextDocument("a.txt", text)], normalising()))


def test_control_tokens_in_shards_are_counted_and_lost_text_is_found():
    theirs = Tokenizer(model_with(**CONTEST), may_normalise=True)
    assert np.flatnonzero(theirs.is_lost).tolist() == [3]
    assert np.flatnonzero(theirs.is_control).tolist() == [0, 1, 2, 3]
    tokens = np.array([1, 50, 2, 1, 60, 0], np.uint16)
    assert theirs.count_controls(tokens) == 2
    assert "the shards have 2 control tokens other than BOS" in theirs.notes_on_shards(2)[1]
    theirs.require_known(tokens, "a")
    with pytest.raises(TokenizerError, match="a has the unknown token 3, whose bytes of text nobody knows"):
        theirs.require_known(np.array([1, 3], np.uint16), "a")


def test_texts_train_as_the_documents_that_hold_them_do():
    texts = [words(seed, 100) for seed in range(40)]
    as_documents = Tokenizer.train([TextDocument(str(i), text) for i, text in enumerate(texts)], vocab_size=400)
    assert Tokenizer.train(texts, vocab_size=400).to_bytes() == as_documents.to_bytes()
    joined = "\n".join(texts)
    assert Tokenizer.train(joined, 400).to_bytes() == Tokenizer.train([joined], 400).to_bytes()


def test_documents_start_with_the_same_token_for_the_kernels_and_the_tokenizer():
    assert tokenizer_module.BOS_ID == BOS_ID


def test_the_tokenizers_bos_is_the_one_that_kernels_know():
    """Two constants, as neither package imports the other where it needs only this."""
    assert tokenizer_module.BOS_ID == BOS_ID
