"""Token shards, the order in which training reads them, and their preparation from corpora."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import documents, peak_memory, words
from forks import Forked
from klora.model import prepare as prepare_module
from klora.model import shards as shards_module
from klora.model.corpus import Corpus, CorpusError
from klora.model.prepare import prepare, prepared_from_shards
from klora.model.shards import RowSampler, Shard, ShardError, ShardWriter, TokenStream, find_shards, survey
from klora.model.storage import building
from klora.model.tokenizer import Tokenizer, TokenizerError
from test_tokenizer import CONTEST, model_with

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
    shard = Shard(path)
    tokens = shard.read(0, len(shard))
    assert tokens.dtype == np.uint16 and tokens.tolist() == [1, 5, 65535]


def test_writer_streams_over_shards(tmp_path):
    with ShardWriter(tmp_path, tokens_per_shard=10) as writer:
        for part in np.split(np.arange(30), [3, 3, 17, 20]):
            writer.add(part.astype(np.int32))
        assert list(tmp_path.glob("*.bin")) == []
    assert writer.tokens == 30
    assert writer.paths == [tmp_path / f"fineweb_train_{i:06d}.bin" for i in range(3)] == sorted(tmp_path.iterdir())
    assert [Shard(path).read(0, 10).tolist() for path in writer.paths] == [list(range(i, i + 10)) for i in (0, 10, 20)]


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


def test_a_shard_that_is_cut_short_while_it_is_read_ends_in_a_sentence(tmp_path):
    """A map of it ended the process by SIGBUS."""
    paths = [*write(tmp_path, range(1, 5000)), *write(tmp_path, range(1, 100), prefix="b")]
    stream = TokenStream(paths)
    sampler = RowSampler(stream, 64, seed=0)
    os.truncate(paths[0], 1024 + 2 * 100)
    assert stream.tokens(0, 100).tolist() == list(range(1, 101))
    says = r"fineweb_train_000000.bin ends before token .* of 4,999: it was cut short after it was opened; copy"
    for read in (
        lambda: stream.tokens(50, 101),
        lambda: stream.tokens(4990, 5010),
        lambda: list(stream.documents()),
        lambda: [sampler.next_rows(1) for _ in range(70)],
    ):
        with pytest.raises(ShardError, match=says):
            read()
    assert stream.tokens(4999, 5001).tolist() == [1, 2]


def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "a_train_0.bin"
    os.mkfifo(path)
    with pytest.raises(ShardError, match="a_train_0.bin"):
        TokenStream([path])


def test_shards_are_told_apart_by_their_tokens_and_looked_through_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SCAN_TOKENS", 10)
    paths = [*write(tmp_path, range(1, 30)), *write(tmp_path, range(30, 1, -1), prefix="b")]
    first, second = survey(paths, 31)
    assert first == ("fineweb_train_000000.bin", 29, hashlib.sha256(np.arange(1, 30, dtype="<u2")).hexdigest())
    assert second.tokens == 29 and second.sha256 != first.sha256
    with pytest.raises(ShardError, match="b_train_000000.bin has token 30 at place 0, but the tokenizer has 30 pieces"):
        survey(paths, 30)
    with pytest.raises(ShardError, match="fineweb_train_000000.bin has token 25 at place 24, but the tokenizer has"):
        survey(paths[:1], 25)


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


def test_a_damaged_cache_is_named_with_what_to_do(tmp_path, corpora):
    found = prepare(*corpora, 400, tmp_path / "cache")
    found.train[0].unlink()
    with pytest.raises(ShardError, match=f"no token shard .*; remove {found.folder}, which is made again"):
        prepare(*corpora, 400, tmp_path / "cache")
    shutil.rmtree(found.folder)
    assert prepare(*corpora, 400, tmp_path / "cache").train == found.train


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


@pytest.mark.slow
def test_killed_prepare_leaves_nothing_to_reuse_and_what_it_left_is_removed(tmp_path, corpora):
    code = (
        "import os, signal, sys; from klora.model.corpus import Corpus; from klora.model.prepare import prepare\n"
        "def stop(phase, done):\n"
        "    if phase == 'validation': os.kill(os.getpid(), signal.SIGKILL)\n"
        "splits = [Corpus.text([sys.argv[1]], split=s, validation_share=0.2) for s in ('train', 'validation')]\n"
        "prepare(*splits, 400, sys.argv[2], progress=stop)"
    )
    assert Forked(["-c", code, tmp_path / "text", tmp_path / "cache"]).wait() == -signal.SIGKILL
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 1
    prepared = prepare(*corpora, 400, tmp_path / "cache")
    assert prepared.folder not in left and list((tmp_path / "cache").iterdir()) == [prepared.folder]
    assert len(list(TokenStream(prepared.validation).documents())) == len(list(corpora[1].documents()))


def test_what_a_living_process_builds_stays(tmp_path):
    with building(tmp_path / "first") as first, building(tmp_path / "second") as second:
        assert first.is_dir() and second.is_dir() and first.parent == second.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


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
        (
            lambda folder: write(folder, [1, 400], prefix="x"),
            ShardError,
            r"token 400, but the tokenizer beside it has 400 pieces",
        ),
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


def test_shards_of_a_tokenizer_that_normalises_are_taken_and_say_so(tmp_path):
    theirs = model_with(**CONTEST)
    contest = Tokenizer(theirs, may_normalise=True)
    for split in ("train", "val"):
        write(tmp_path, np.append(contest.encode("alpha\nbeta"), 2), split)  # an end token, as some shards have
    (tmp_path / "fineweb_1024_bpe.model").write_bytes(theirs)
    notes = prepared_from_shards(tmp_path).notes
    assert notes[0] == contest.notes_on_shards(0)[0] and len(notes) == 2
    assert "the validation shards have 1 control tokens other than BOS" in notes[1]
    (tmp_path / "fineweb_1024_bpe.model").write_bytes(model_with(treat_whitespace_as_suffix=True))
    with pytest.raises(TokenizerError, match="fineweb_1024_bpe.model changes a space"):
        prepared_from_shards(tmp_path)


@pytest.mark.parametrize(
    ("token", "says"), [(0, "has the unknown token 0, whose bytes"), (400, "has ids from 1 to 400; allowed: 0 to 399")]
)
def test_validation_shards_are_looked_through_before_the_work(tmp_path, tokenizer, monkeypatch, token, says):
    """Not only their beginning: training would end with an error after its last step."""
    monkeypatch.setattr(prepare_module, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(shards_module, "SCAN_TOKENS", 8)
    (tmp_path / "a.model").write_bytes(tokenizer.to_bytes())
    write(tmp_path, [1] + [5] * 30 + [0])
    write(tmp_path, [1] + [5] * 29, split="val", prefix="a")
    assert prepared_from_shards(tmp_path).notes == ()
    write(tmp_path, [1] + [5] * 29 + [1, token], split="val", prefix="b")
    with pytest.raises(TokenizerError, match=f"b_val_000000.bin {says}"):
        prepared_from_shards(tmp_path)
