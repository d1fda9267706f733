"""Corpora: where documents come from, their splits, and what is said about files that cannot be read."""

import gzip
import inspect
import json
import os
import random
import sys
from pathlib import Path

import pytest
import zstandard
from conftest import peak_memory
from klora.model.corpus import Corpus, CorpusError, TextDocument, in_validation


def names(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus.documents()]


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


def test_folders_within_each_other_are_no_calls_within_each_other(tmp_path):
    """A file system takes more of them than Python's calls may be within each other."""
    deep = tmp_path.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("found")
    (tmp_path / "e.txt").write_text("last")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert [document.text for document in Corpus.text([tmp_path]).documents()] == ["found", "last"]
    finally:
        sys.setrecursionlimit(before)


def test_a_link_that_leads_to_itself_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("kept")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    assert [document.name for document in Corpus.text([tmp_path]).documents()] == ["a.txt"]
    assert "loop.txt skipped: Too many levels of symbolic links" in caplog.text


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


def test_a_jsonl_whose_own_name_is_no_utf8_is_read(tmp_path):
    """Its records have no name: it had been called the name of one with half a surrogate pair."""
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_text('{"text": "x"}\n')
    assert list(Corpus.jsonl([path]).documents()) == [TextDocument(f"{path.name}:1", "x")]


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
