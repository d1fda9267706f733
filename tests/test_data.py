"""Corpora, the tokenizer and its byte counts, token shards and the order in which training reads them."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from klora.model import prepare as prepare_module
from klora.model import shards as shards_module
from klora.model import tokenizer as tokenizer_module
from klora.model.corpus import Corpus, CorpusError, Document, in_validation
from klora.model.prepare import prepare, prepared_from_shards
from klora.model.shards import RowSampler, ShardError, ShardWriter, TokenStream, find_shards, read_shard
from klora.model.tokenizer import Tokenizer, TokenizerError

NASTY = "\0\t\n\r\x0b\x1c\x85 \u00a0\u2028\u3000\ufeff\ufffd\u2047\u2585<s>0x1Aé\u0301字😀"


def words(seed: int, count: int) -> str:
    """Text with indentation and line ends, the same for the same seed."""
    draw = random.Random(seed)
    stems = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "kappa", "lambda", "sigma", "omega"]
    ends = ["ing", "ed", "s", "", "tion", "ly", "er"]
    return "".join(
        draw.choice(stems) + draw.choice(ends) + draw.choice([" ", " ", " = ", ":\n    ", "\n", "\n\n"])
        for _ in range(count)
    )


def documents(count: int, length: int = 100) -> list[Document]:
    return [Document(f"{i}.txt", words(i, length)) for i in range(count)]


def names(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus.documents()]


def peak_memory(work) -> int:
    """Bytes allocated by Python and NumPy at the highest point while `work()` runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# corpus


def test_stdlib_is_the_library_without_its_tests():
    found = {document.name: document.text for document in Corpus.stdlib().documents()}
    assert list(found) == sorted(found, key=lambda name: name.split("/"))
    assert found["json/decoder.py"] == Path(json.decoder.__file__).read_bytes().decode()
    assert len(found) > 300 and all(found.values())
    for name in found:
        assert name.endswith(".py")
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(name.split("/")[:-1])


def test_stdlib_splits_are_disjoint_complete_and_repeatable():
    train, validation = Corpus.stdlib(split="train"), Corpus.stdlib(split="validation")
    in_train, in_validation_ = names(train), names(validation)
    assert not set(in_train) & set(in_validation_)
    assert set(in_train) | set(in_validation_) == set(names(Corpus.stdlib()))
    assert names(train) == in_train and names(validation) == in_validation_
    assert 0.02 < len(in_validation_) / len(in_train) < 0.1


HELD_OUT_OF_40 = ["9", "39"]


def test_a_documents_split_depends_on_its_name_alone(tmp_path):
    # Written out: any change would silently move documents between the splits of a run and its continuation.
    assert [name for name in map(str, range(40)) if in_validation(name, 0.1)] == HELD_OUT_OF_40
    for i in range(40):
        (tmp_path / str(i)).write_text("x")
    corpus = Corpus.text([tmp_path], split="validation", validation_share=0.1)
    assert sorted(names(corpus), key=int) == HELD_OUT_OF_40
    for i in range(40):
        if str(i) not in HELD_OUT_OF_40[1:]:
            (tmp_path / str(i)).unlink()
    assert sorted(names(corpus), key=int) == HELD_OUT_OF_40[1:]


def test_validation_share_is_met():
    held_out = sum(in_validation(f"document {i}", 0.25) for i in range(4000))
    assert 900 < held_out < 1100


def test_text_walks_directories_in_order_and_keeps_text_as_it_is(tmp_path, caplog):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "c.txt").write_bytes(b"last\r\n")
    (folder / "b" / "2.md").write_text("two")
    (folder / "b" / "1.md").write_text("one")
    (folder / "bad.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".git" / "config").write_text("hidden")
    (tmp_path / "single.txt").write_bytes("\ufeffeinzeln".encode())
    corpus = Corpus.text([folder, tmp_path / "single.txt"])
    expected = [("b/1.md", "one"), ("b/2.md", "two"), ("c.txt", "last\r\n"), ("single.txt", "\ufeffeinzeln")]
    assert [(document.name, document.text) for document in corpus.documents()] == expected
    assert [record.getMessage().split(" skipped")[0] for record in caplog.records] == [str(folder / "bad.bin")]


def test_text_of_a_file_asked_for_by_name_must_be_utf8(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(CorpusError, match=r"bad\.txt: wanted UTF-8 text.*position 2"):
        list(Corpus.text([tmp_path / "bad.txt"]).documents())


@pytest.mark.skipif(sys.platform != "linux", reason="file names that are not UTF-8")
def test_text_files_may_have_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("x")
    corpus = Corpus.text([tmp_path], split="train", validation_share=1e-9)
    assert [document.text for document in corpus.documents()] == ["x"]
    assert len(corpus.fingerprint()) == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Corpus.text([folder / "none.txt"]), r"none\.txt: there is no such file"),
        (lambda folder: Corpus.jsonl([folder]), "is a directory; wanted files of one JSON object a line"),
        (lambda folder: Corpus.text([]), "takes at least one path"),
        (lambda folder: Corpus("stdlib", (folder,)), "takes no paths"),
        (lambda folder: Corpus("csv", (folder,)), "'csv' is not possible; allowed: one of stdlib, text, jsonl"),
        (lambda folder: Corpus.stdlib(split="test"), "'test' is not possible; allowed: one of all, train, validation"),
        (lambda folder: Corpus.stdlib(validation_share=1.0), r"1\.0 is not possible; allowed: above 0, below 1"),
    ],
)
def test_impossible_corpora_are_refused(tmp_path, make, message):
    with pytest.raises(CorpusError, match=message):
        make(tmp_path)


def test_an_empty_corpus_says_which_source_and_split(tmp_path):
    with pytest.raises(CorpusError, match=rf"text corpus {tmp_path} \(split all\): no document with any text$"):
        list(Corpus.text([tmp_path]).documents())
    (tmp_path / "one.txt").write_text("x")
    assert not in_validation("one.txt", 0.05)
    with pytest.raises(CorpusError, match=r"\(split validation\): no document.*share of 0\.05: give each split"):
        list(Corpus.text([tmp_path], split="validation").documents())


RECORDS = [{"text": "first\n\u2028line"}, {"text": "second", "name": "named", "id": 3}, {"text": ""}, {"text": "é"}]
LINES = ("\n".join(json.dumps(record) for record in RECORDS[:2]) + "\r\n\n" + json.dumps(RECORDS[2]) + "\n").encode()
LINES += json.dumps(RECORDS[3], ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".gz", lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:])),
        (".zst", zstandard.compress),
        (".zst", lambda data: zstandard.compress(data[:20]) + zstandard.compress(data[20:])),
    ],
)
def test_jsonl_plain_and_compressed(tmp_path, suffix, compress):
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(compress(LINES))
    expected = [(f"{path.name}:1", "first\n\u2028line"), ("named", "second"), (f"{path.name}:5", "é")]
    assert [(document.name, document.text) for document in Corpus.jsonl([path]).documents()] == expected


def test_jsonl_zst_with_a_window_beyond_the_decoders_default(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # its size is not in the header
    data = frame.compress(b'{"body": "wide"}\n') + frame.flush()
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(data)
    (tmp_path / "wide.jsonl.zst").write_bytes(data)
    assert [d.text for d in Corpus.jsonl([tmp_path / "wide.jsonl.zst"], field="body").documents()] == ["wide"]


def test_jsonl_splits_by_name(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": "x", "name": str(i)}) + "\n" for i in range(200)))
    train, validation = (Corpus.jsonl([tmp_path / "d.jsonl"], split=split) for split in ("train", "validation"))
    assert names(validation) == [str(i) for i in range(200) if in_validation(str(i), 0.05)] != []
    assert sorted(names(train) + names(validation), key=int) == [str(i) for i in range(200)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut"', "not JSON .*Expecting"),
        (b'{"text": "\xff"}', "not JSON .*can't decode byte 0xff"),
        (b"[1]", "its value is of type list, not an object"),
        (b'{"body": "x", "id": 1}', r"no field 'text' \(it has 'body', 'id'\)"),
        (b'{"text": 3}', "field 'text' is of type int, not a string"),
        (b'{"text": "x", "name": 3}', "field 'name' is of type int, not a string"),
        (b'{"text": "\\ud800"}', "field 'text' has half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_jsonl_errors_name_the_file_the_line_and_the_cure(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    reading = Corpus.jsonl([path]).documents()
    assert next(reading).text == "good"
    wanted = "wanted one JSON object a line with the text under 'text'"
    with pytest.raises(CorpusError, match=rf"d\.jsonl, line 3: {message}.*; {wanted}"):
        next(reading)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_a_truncated_archive_is_an_error(tmp_path, suffix, compress, keep):
    draw = random.Random(0)
    whole = compress("".join(json.dumps({"text": draw.randbytes(50).hex()}) + "\n" for _ in range(5000)).encode())
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CorpusError, match=rf"d\.jsonl{suffix}, line \d+: cannot be read: .* end"):
        list(Corpus.jsonl([path]).documents())


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_no_archive_is_an_error(tmp_path, suffix):
    (tmp_path / f"d{suffix}").write_text('{"text": "plain"}')
    with pytest.raises(CorpusError, match=rf"d{suffix}, line 1: cannot be read"):
        list(Corpus.jsonl([tmp_path / f"d{suffix}"]).documents())


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_jsonl_is_streamed(tmp_path, suffix, compress):
    draw = random.Random(0)
    lines = "".join(json.dumps({"text": draw.randbytes(500).hex()}) + "\n" for _ in range(5000)).encode()
    assert len(lines) > 5_000_000
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(compress(lines))
    assert peak_memory(lambda: [None for _ in Corpus.jsonl([path]).documents()]) < 1_000_000


def test_fingerprint_changes_with_content_and_settings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    corpus = Corpus.text([path])
    first = corpus.fingerprint()
    assert first == Corpus.text([str(path)]).fingerprint() and len(bytes.fromhex(first)) == 32
    others = [
        Corpus.text([tmp_path], split="train"),
        Corpus.text([path], split="train"),
        Corpus.text([path], split="train", validation_share=0.1),
        Corpus.jsonl([path]),
        Corpus.jsonl([path], field="body"),
        Corpus.stdlib(),
    ]
    seen = {first, *(other.fingerprint() for other in others[1:])}
    before = path.stat().st_mtime_ns
    path.write_text("two")
    os.utime(path, ns=(before, before + 1))
    seen.add(corpus.fingerprint())
    path.write_text("three")
    os.utime(path, ns=(before, before))
    seen.add(corpus.fingerprint())
    assert len(seen) == len(others) + 2
    folder = others[0].fingerprint()
    (tmp_path / "b.txt").write_text("new")
    assert others[0].fingerprint() != folder


# tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(documents(40), vocab_size=400)


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


# shards


def write(folder: Path, tokens, split="train", per_shard=100_000_000, prefix="fineweb") -> list[Path]:
    with ShardWriter(folder, split, prefix, per_shard) as writer:
        writer.add(np.asarray(tokens))
    return writer.paths


def test_shard_format(tmp_path):
    (path,) = write(tmp_path, [1, 5, 65535], split="val")
    assert path == tmp_path / "fineweb_val_000000.bin"
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], "<i4")
    assert header.tolist() == [20240520, 1, 3] + [0] * 253
    assert data[1024:] == bytes([1, 0, 5, 0, 255, 255])
    tokens = read_shard(path)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.tolist() == [1, 5, 65535]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 2


def test_writer_streams_over_shards(tmp_path):
    with ShardWriter(tmp_path, tokens_per_shard=10) as writer:
        for part in np.split(np.arange(30), [3, 3, 17, 20]):
            writer.add(part.astype(np.int32))
        assert list(tmp_path.glob("*.bin")) == []
    assert writer.tokens == 30
    assert writer.paths == [tmp_path / f"fineweb_train_{i:06d}.bin" for i in range(3)] == sorted(tmp_path.iterdir())
    assert [read_shard(path).tolist() for path in writer.paths] == [list(range(i, i + 10)) for i in (0, 10, 20)]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path, tokens_per_shard=10) as writer:
        writer.add(np.arange(25))
        assert len(list(tmp_path.iterdir())) == 3
        with pytest.raises(ShardError, match="there is no token shard"):  # what a killed writer would leave
            find_shards(tmp_path, "train")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, np.arange(25))


def test_writer_refuses_what_is_no_token_and_a_folder_in_use(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.add(np.array([], dtype=np.uint16))
        for tokens in ([65536], [-1], [1.0], [[1]]):
            with pytest.raises(ShardError, match="wanted"):
                writer.add(np.array(tokens))
    assert writer.paths == [] and list(tmp_path.iterdir()) == []
    write(tmp_path, [1])
    with pytest.raises(ShardError, match=r"already has fineweb_train_000000\.bin; remove"):
        ShardWriter(tmp_path)
    write(tmp_path, [1], split="val")
    write(tmp_path, [1], prefix="web")
    with pytest.raises(ShardError, match="'test' is not possible; allowed: one of train, val"):
        ShardWriter(tmp_path, "test")
    with pytest.raises(ShardError, match="tokens_per_shard=0 is not possible"):
        ShardWriter(tmp_path, "val", "other", 0)


def test_writer_holds_no_more_than_it_is_given(tmp_path):
    part = np.ones(10_000, dtype=np.uint16)

    def work():
        with ShardWriter(tmp_path, tokens_per_shard=3_000_000) as writer:
            for _ in range(500):
                writer.add(part)

    assert peak_memory(work) < 500_000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 2 * (1024 + 5_000_000)


def corrupt(path: Path, at: int, value: int):
    data = bytearray(path.read_bytes())
    data[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: corrupt(path, 0, 7), "has magic 7; wanted 20240520"),
        (lambda path: corrupt(path, 4, 2), "has version 2; wanted 1"),
        (lambda path: corrupt(path, 8, 4), r"has 1030 bytes and a header of 4 tokens; wanted .* 1024 \+ 2"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 1029 bytes and a header of 3 tokens"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has 1031 bytes and a header of 3 tokens"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "has 1000 bytes; wanted a header of 1024"),
        (lambda path: (path.write_bytes(path.read_bytes()[:1024]), corrupt(path, 8, 0)), "has .*at least 1 token"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, damage, message):
    (path,) = write(tmp_path, [1, 2, 3])
    damage(path)
    with pytest.raises(ShardError, match=rf"fineweb_train_000000\.bin:? {message}"):
        TokenStream([path])


def test_find_shards_sorts_by_number_and_tells_splits_apart(tmp_path):
    with pytest.raises(ShardError, match=r"there is no token shard \*_train_<number>\.bin"):
        find_shards(tmp_path, "train")
    wanted = ["a_train_9.bin", "a_train_10.bin", "my_val_set_train_000000.bin"]
    for name in [*wanted[::-1], "a_train_x.bin", "a_val_0.bin", ".a_train_11.bin.77.partial"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(tmp_path, "train")] == wanted
    assert [path.name for path in find_shards(tmp_path, "val")] == ["a_val_0.bin"]


def test_stream_reads_across_shards(tmp_path):
    stream = TokenStream(write(tmp_path, np.arange(100), per_shard=9))
    assert len(stream) == 100 and len(stream.paths) == 12
    for start, stop in ((0, 100), (0, 0), (100, 100), (8, 10), (9, 18), (17, 64), (99, 100)):
        tokens = stream.tokens(start, stop)
        assert tokens.dtype == np.uint16 and tokens.tolist() == list(range(start, stop))
    for start, stop in ((-1, 3), (5, 4), (90, 101)):
        with pytest.raises(ShardError, match=f"tokens {start} to {stop} of a stream of 100"):
            stream.tokens(start, stop)
    with pytest.raises(ShardError, match="no shards"):
        TokenStream([])


@pytest.mark.parametrize("scan", [1, 3, 4, 2**20])
@pytest.mark.parametrize("per_shard", [1, 2, 5, 7, 1000])
def test_documents_cross_shards_and_blocks(tmp_path, monkeypatch, scan, per_shard):
    monkeypatch.setattr(shards_module, "SCAN_TOKENS", scan)
    lengths = [1, 6, 1, 1, 13, 3, 2]
    parts = [[1, *range(10 * i, 10 * i + n - 1)] for i, n in enumerate(lengths, start=1)]
    stream = TokenStream(write(tmp_path, sum(parts, []), per_shard=per_shard))
    found = list(stream.documents())
    assert [tokens.tolist() for _, tokens in found] == parts
    assert all(tokens.dtype == np.uint16 for _, tokens in found)
    starts = np.cumsum([0, *lengths[:-1]]) // per_shard
    indices = [int((starts[:i] == starts[i]).sum()) for i in range(len(starts))]
    expected = [f"fineweb_train_{shard:06d}#{index}" for shard, index in zip(starts, indices, strict=True)]
    assert [name for name, _ in found] == expected


def test_a_stream_that_starts_inside_a_document_has_no_documents(tmp_path):
    paths = write(tmp_path, [1, 7, 8, 9, 1, 7], per_shard=3)
    with pytest.raises(ShardError, match=r"fineweb_train_000001\.bin starts with token 9; wanted BOS, 1"):
        next(TokenStream(paths[1:]).documents())


def test_documents_are_read_in_bounded_memory(tmp_path):
    tokens = np.full(4_000_000, 7, dtype=np.uint16)
    tokens[::1000] = 1
    stream = TokenStream(write(tmp_path, tokens, per_shard=1_500_000))
    del tokens
    assert peak_memory(lambda: [None for _ in stream.documents()]) < 5_000_000
    assert sum(1 for _ in stream.documents()) == 4000


@pytest.fixture
def stream(tmp_path) -> TokenStream:
    return TokenStream(write(tmp_path, np.arange(81) + 100, per_shard=30))


def row_numbers(inputs: torch.Tensor) -> list[int]:
    """Which rows of 8 of the `stream` fixture these are."""
    return ((inputs[:, 0] - 100) // 8).tolist()


def test_rows_are_the_stream_shifted_by_one(stream):
    sampler = RowSampler(stream, 8, seed=0)
    assert sampler.rows == 10
    inputs, targets = sampler.next_rows(10)
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (10, 8)
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert sorted(row_numbers(inputs)) == list(range(10)) and (inputs[:, 0] % 8 == 100 % 8).all()


def test_a_last_row_without_its_last_target_is_dropped(tmp_path):
    stream = TokenStream(write(tmp_path, np.arange(80)))
    assert RowSampler(stream, 8, seed=0).rows == 9
    assert RowSampler(stream, 79, seed=0).next_rows(1)[1].tolist() == [list(range(1, 80))]
    with pytest.raises(ShardError, match=r"stream of 80 tokens has no row of 80 \+ 1"):
        RowSampler(stream, 80, seed=0)
    with pytest.raises(ShardError, match="row_length=0"):
        RowSampler(stream, 0, seed=0)


def test_order_is_new_every_epoch_and_fixed_by_the_seed(stream):
    def epochs(seed):
        sampler = RowSampler(stream, 8, seed)
        return [tuple(row_numbers(sampler.next_rows(10)[0])) for _ in range(3)]

    assert epochs(5) == epochs(5)
    assert len(set(epochs(5) + epochs(6))) == 6
    sampler = RowSampler(stream, 8, seed=5)
    uneven = [row for count in (3, 9, 1, 17) for row in row_numbers(sampler.next_rows(count)[0])]
    assert uneven == [row for epoch in epochs(5) for row in epoch]


@pytest.mark.parametrize("taken", [0, 3, 10, 14, 27])
def test_sampler_resumes_exactly(stream, taken):
    sampler = RowSampler(stream, 8, seed=1)
    if taken:
        sampler.next_rows(taken)
    state = json.loads(json.dumps(sampler.state()))
    assert all(type(value) is int for value in state.values())
    resumed = RowSampler(stream, 8, seed=1)
    resumed.next_rows(6)
    resumed.load_state(state)
    for count in (4, 25):
        for left, right in zip(sampler.next_rows(count), resumed.next_rows(count), strict=True):
            assert torch.equal(left, right)
    assert sampler.state() == resumed.state()


def test_sampler_refuses_a_state_of_something_else(stream):
    state = RowSampler(stream, 8, seed=1).state()
    for other, name in ((RowSampler(stream, 8, seed=2), "seed=1"), (RowSampler(stream, 4, seed=1), "row_length=8")):
        with pytest.raises(ShardError, match=f"saved sampler has {name}"):
            other.load_state(state)
    for broken in ({"tokens": 80}, {"position": 11}, {"position": -1}, {"epoch": -1}):
        with pytest.raises(ShardError, match="the saved sampler"):
            RowSampler(stream, 8, seed=1).load_state({**state, **broken})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_rows_that_one_process_would_take(stream, world):
    alone = RowSampler(stream, 8, seed=3)
    ranks = [RowSampler(stream, 8, seed=3) for _ in range(world)]
    for _ in range(4):  # the second and third time cross the end of an epoch
        expected = alone.next_rows(8)
        shares = [sampler.take(8, rank, world) for rank, sampler in enumerate(ranks)]
        assert all(len(inputs) == 8 // world for inputs, _ in shares)
        for whole, parts in zip(expected, zip(*shares, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts))
    assert all(sampler.state() == alone.state() for sampler in ranks)


@pytest.mark.parametrize(("count", "rank", "world"), [(9, 0, 2), (8, 2, 2), (8, -1, 2), (0, 0, 1)])
def test_rows_must_divide_over_the_ranks(stream, count, rank, world):
    with pytest.raises(ShardError, match=f"{count} rows for rank {rank} of {world}"):
        RowSampler(stream, 8, seed=3).take(count, rank, world)


# prepare


@pytest.fixture
def corpora(tmp_path) -> tuple[Corpus, Corpus]:
    folder = tmp_path / "text"
    folder.mkdir()
    for document in documents(60):
        (folder / document.name).write_text(document.text)
    return tuple(Corpus.text([folder], split=split, validation_share=0.2) for split in ("train", "validation"))


def test_prepare_writes_both_splits_exactly(tmp_path, corpora, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 2000)
    seen = []
    prepared = prepare(*corpora, 400, tmp_path / "cache", progress=lambda *event: seen.append(event))
    record = json.loads((prepared.folder / "prepared.json").read_text())
    counts = {}
    for phase, paths, corpus in zip(
        ("train", "validation"), (prepared.train, prepared.validation), corpora, strict=True
    ):
        found = [tokens for _, tokens in TokenStream(paths).documents()]
        texts = [document.text for document in corpus.documents()]
        assert [prepared.tokenizer.decode(tokens) for tokens in found] == texts
        counts[phase] = len(texts)
        assert record[phase] == {
            "documents": len(texts),
            "tokens": sum(map(len, found)),
            "bytes": sum(int(prepared.tokenizer.target_bytes(tokens).sum()) for tokens in found),
        }
    assert counts["train"] + counts["validation"] == 60 and min(counts.values()) > 1
    assert prepared.tokenizer.to_bytes() == Tokenizer.train(corpora[0].documents(), 400).to_bytes()
    phases = [("tokenizer", counts["train"]), ("train", counts["train"]), ("validation", counts["validation"])]
    assert seen == [(phase, done) for phase, count in phases for done in range(1, count + 1)]


def test_prepare_is_reused_until_something_changes(tmp_path, corpora, monkeypatch):
    first = prepare(*corpora, 400, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_build", None)  # calling it would raise TypeError
        again = prepare(*corpora, 400, tmp_path / "cache")
    assert (again.folder, again.train, again.validation) == (first.folder, first.train, first.validation)
    assert again.tokenizer.to_bytes() == first.tokenizer.to_bytes()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]
    train, validation = corpora
    others = [
        prepare(train, validation, 390, tmp_path / "cache"),
        prepare(train, train, 400, tmp_path / "cache"),
        prepare(train.with_split("all"), validation, 400, tmp_path / "cache"),
    ]
    (tmp_path / "text" / "0.txt").write_text("changed")
    others.append(prepare(train, validation, 400, tmp_path / "cache"))
    assert len({first.folder, *(other.folder for other in others)}) == 5


def test_interrupted_prepare_leaves_nothing_to_reuse(tmp_path, corpora):
    class Stop(BaseException):
        pass

    def stop(phase, done):
        if phase == "validation":
            raise Stop

    with pytest.raises(Stop):
        prepare(*corpora, 400, tmp_path / "cache", progress=stop)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(prepare(*corpora, 400, tmp_path / "cache").train) == 1


def test_killed_prepare_leaves_nothing_to_reuse(tmp_path, corpora):
    code = (
        "import os, signal, sys; from klora.model.corpus import Corpus; from klora.model.prepare import prepare\n"
        "def stop(phase, done):\n"
        "    if phase == 'validation': os.kill(os.getpid(), signal.SIGKILL)\n"
        "splits = [Corpus.text([sys.argv[1]], split=s, validation_share=0.2) for s in ('train', 'validation')]\n"
        "prepare(*splits, 400, sys.argv[2], progress=stop)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "text"), str(tmp_path / "cache")])
    assert killed.returncode == -signal.SIGKILL
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 1
    prepared = prepare(*corpora, 400, tmp_path / "cache")
    assert prepared.folder not in left
    assert len(list(TokenStream(prepared.validation).documents())) == len(names(corpora[1]))


def test_of_two_prepares_at_once_the_first_is_kept(tmp_path, corpora):
    inner = []

    def race(phase, done):
        if phase == "validation" and not inner:
            inner.append(None)
            inner.append(prepare(*corpora, 400, tmp_path / "cache"))
            inner.append(inner[1].train[0].stat().st_ino)

    outer = prepare(*corpora, 400, tmp_path / "cache", progress=race)
    assert outer.folder == inner[1].folder and outer.train[0].stat().st_ino == inner[2]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [outer.folder.name]


def test_prepare_passes_on_an_empty_split(tmp_path):
    (tmp_path / "one.txt").write_text(words(0, 500))
    train, validation = (Corpus.text([tmp_path / "one.txt"], split=split) for split in ("train", "validation"))
    with pytest.raises(CorpusError, match=r"one\.txt \(split validation\): no document"):
        prepare(train, validation, 300, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_prepared_from_shards_takes_a_folder_as_it_is(tmp_path, tokenizer):
    write(tmp_path, np.concatenate([tokenizer.encode(document.text) for document in documents(5)]), per_shard=300)
    write(tmp_path, tokenizer.encode("alpha"), split="val")
    (tmp_path / "fineweb_1024_bpe.model").write_bytes(tokenizer.to_bytes())
    prepared = prepared_from_shards(tmp_path)
    assert prepared.folder == tmp_path and len(prepared.train) > 1 and len(prepared.validation) == 1
    assert prepared.tokenizer.decode(next(TokenStream(prepared.train).documents())[1]) == words(0, 100)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: (folder / "a.model").unlink(), ShardError, r"wanted one tokenizer \*\.model.*found none"),
        (lambda folder: (folder / "b.model").touch(), ShardError, r"found a\.model, b\.model"),
        (lambda folder: (folder / "a.model").write_bytes(b"x"), TokenizerError, "a.model is not a SentencePiece"),
        (lambda folder: (folder / "fineweb_val_000000.bin").unlink(), ShardError, r"no token shard \*_val_"),
        (lambda folder: (folder / "fineweb_train_000000.bin").unlink(), ShardError, r"no token shard \*_train_"),
        (lambda folder: write(folder, [1, 400], prefix="x"), ShardError, r"token 400, but a\.model has 400 pieces"),
        (lambda folder: write(folder, [7], prefix="a"), ShardError, "a_train_000000.bin starts with token 7; wanted"),
        (lambda folder: corrupt(folder / "fineweb_val_000000.bin", 0, 7), ShardError, "has magic 7"),
    ],
)
def test_prepared_from_shards_says_what_is_wrong(tmp_path, tokenizer, change, error, message):
    write(tmp_path, [1, 399])
    write(tmp_path, [1, 5], split="val")
    (tmp_path / "a.model").write_bytes(tokenizer.to_bytes())
    prepared_from_shards(tmp_path)
    change(tmp_path)
    with pytest.raises(error, match=message):
        prepared_from_shards(tmp_path)
