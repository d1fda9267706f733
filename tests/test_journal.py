"""What a scoring run keeps: journals that are gone on with, damaged, of another run, or changed."""

import json
from types import SimpleNamespace

import pytest
from conftest import randomized
from klora.ttt import pipeline
from klora.ttt.base import MICRO_TOKENS
from klora.ttt.journal import Journal, JournalError, _chained, fingerprint, open_journal, settings_of
from klora.ttt.progress import Interrupted
from klora.ttt.results import (
    ADAPTED,
    NLL_ROUNDING,
    NOT_ADAPTED,
)
from test_ttt import TTT, adapted_nats, document, score


def test_a_damaged_journal_of_another_rank_is_refused_and_not_passed_over(tmp_path):
    """A damaged first line makes it no file of the user's: its documents would be scored again without a word."""
    score([document(40)], tmp_path)
    (tmp_path / "journal-1.jsonl").write_text("no json\n" + (tmp_path / "journal.jsonl").read_text())
    with pytest.raises(JournalError, match="journal-1.jsonl, line 1: "):
        open_journal(tmp_path, "the run", resume=True)


def test_time_spent_before_an_interruption_counts_against_the_deadline(tmp_path):
    documents, config = [document(100), document(90, 1)], TTT.override({"deadline": 100.0})
    journal = Journal(tmp_path / "journal.jsonl", fingerprint("artifact", documents, config, False), resume=False)
    journal.add_seconds({"adapt": 101.0})
    journal.close()
    late = score(documents, tmp_path, config, resume=True)
    assert [d.status for d in late.documents] == [NOT_ADAPTED, NOT_ADAPTED]
    more = score(documents, tmp_path, TTT, resume=True)
    assert [d.status for d in more.documents] == [ADAPTED, ADAPTED]


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chained(records: list[dict]) -> str:
    """A journal of these lines, with checksums as whoever has read the code can make them."""
    chain, text = "", ""
    for record in records:
        record = {name: value for name, value in record.items() if name != "chain"}
        chain = _chained(chain, json.dumps(record))
        text += json.dumps(record | {"chain": chain}) + "\n"
    return text


def refused(documents, tmp_path, says: str) -> None:
    with pytest.raises(JournalError, match=says):
        score(documents, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"no json", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1, 2]", "a JSON value of type list, not an object"),
        (b"{}", "it has no checksum"),
        (b'{"chain": 3}', "its checksum is wrong"),
        ({"seconds": None}, "seconds are no numbers by phase"),
        ({"seconds": {"base": "long"}}, "seconds are no numbers by phase"),
        ({"seconds": {"base": -1.0}}, "seconds are no numbers by phase"),
        ({"seconds": {}, "index": 0, "result": {"name": "a"}}, "no result of a document"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_journal_is_refused_by_line(tmp_path, line, says):
    score([document(40)], tmp_path)
    journal = tmp_path / "journal.jsonl"
    whole, records = journal.read_bytes(), lines_of(journal)
    if isinstance(line, dict):
        journal.write_text(chained([*records, {"protocol": "score_first", **line}]))
    else:
        journal.write_bytes(whole + line + b"\n")
    number = len(records) + 1
    end = "; remove that line and all after it, or give --overwrite to start afresh"
    refused([document(40)], tmp_path, rf"journal.jsonl, line {number}: .*{says}.*{end}")
    journal.write_bytes((b"{}" if isinstance(line, dict) else line) + b"\n" + whole)
    refused([document(40)], tmp_path, r"journal.jsonl, line 1: ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"index": -1}, "index -1 is no document's"),
        ({"index": "0"}, "index '0' is no document's"),
        ({"index": True}, "index True is no document's"),
        ({"tokens": "40"}, "a result whose values are of other types"),
        ({"name": 3}, "a result whose values are of other types"),
        ({"kept_pass": 1.5}, "a result whose values are of other types"),
        ({"status": "perfect"}, "a result that no document can have"),
        ({"tokens": -40}, "a result that no document can have"),
        ({"adapted_tokens": 41}, "a result that no document can have"),
        ({"adapted_nats": -1.1 * NLL_ROUNDING * 40}, r"a result whose nats are negative or no number: .*-0.005"),
        ({"adapted_nats": -100.0}, r"a result whose nats are negative or no number: .*-100"),
    ],
    ids=str,
)
def test_a_result_that_no_document_can_have_is_refused_by_line(tmp_path, change, says):
    """With the checksum that belongs to it, and without."""
    score([document(40)], tmp_path)
    journal = tmp_path / "journal.jsonl"
    records = lines_of(journal)
    (at,) = (number for number, record in enumerate(records) if "result" in record)
    if "index" in change:
        records[at] |= change
    else:
        records[at]["result"] |= change
    journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    refused([document(40)], tmp_path, rf"journal.jsonl, line {at + 1}: its checksum is wrong: it was changed, or")
    journal.write_text(chained(records))
    refused([document(40)], tmp_path, rf"journal.jsonl, line {at + 1}: {says}")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_json_has_not_is_refused_by_line(tmp_path, value):
    score([document(40)], tmp_path)
    journal = tmp_path / "journal.jsonl"
    records = lines_of(journal)
    (at,) = (number for number, record in enumerate(records) if "result" in record)
    records[at]["result"]["base_nats"] = value
    journal.write_text(chained(records))
    refused([document(40)], tmp_path, rf"journal.jsonl, line {at + 1}: no JSON")


def test_every_line_has_the_protocol_the_time_and_a_checksum_of_all_before_it(tmp_path):
    documents = [document(n, n) for n in (40, 50, 20)]
    score(documents, tmp_path)
    journal = tmp_path / "journal.jsonl"
    records = lines_of(journal)
    assert sum("result" in record for record in records) == 3 and chained(records) == journal.read_text()
    assert all(record["protocol"] == "score_first" for record in records)
    times = [sum(record["seconds"].values()) for record in records]
    assert times == sorted(times) and times[-1] > 0
    for changed in ([records[0], *records[2:]], [*records[:2], records[3], records[2], *records[4:]]):
        journal.write_text("".join(json.dumps(record) + "\n" for record in changed))
        refused(documents, tmp_path, r"journal.jsonl, line [23]: its checksum is wrong")
    journal.write_text(chained(records))
    assert len(score(documents, tmp_path, resume=True).documents) == 3


def test_lines_of_a_leaky_run_are_refused_under_an_honest_first_line(tmp_path):
    """With their own checksums, and with such as belong there."""
    documents, journal = [document(40)], tmp_path / "journal.jsonl"
    score(documents, tmp_path, TTT.override({"protocol": "min_nll"}))
    leaky = lines_of(journal)
    score(documents, tmp_path)
    mixed = [lines_of(journal)[0], *leaky[1:]]
    journal.write_text("".join(json.dumps(record) + "\n" for record in mixed))
    refused(documents, tmp_path, "journal.jsonl, line 2: its checksum is wrong: .* does not belong behind the line")
    journal.write_text(chained(mixed))
    refused(documents, tmp_path, "journal.jsonl, line 2: it is of the protocol 'min_nll', not of score_first")


@pytest.mark.parametrize("change", [{"tokens": 39}, {"bytes": 1}, {"name": "another"}, {"index": 7}], ids=str)
def test_results_of_other_documents_are_refused(tmp_path, change):
    """Their sums would be divided by another text's bytes."""
    score([document(20)], tmp_path)
    journal = tmp_path / "journal.jsonl"
    records = lines_of(journal)
    for record in records:
        if "result" in record:
            record["index"] = change.get("index", 0)
            record["result"] |= {name: value for name, value in change.items() if name != "index"}
    journal.write_text(chained(records))
    refused([document(20)], tmp_path, "journal.jsonl has a result of document .* that is not the text's")


@pytest.mark.parametrize("killed_in", ["base", "adapt"])
def test_a_kill_gives_a_deadline_no_time_back(tmp_path, monkeypatch, killed_in):
    """Four kills of a run whose clock goes on by two seconds at every look: all of it is known afterwards."""
    monkeypatch.setitem(MICRO_TOKENS, "cpu", 64)
    now, spent = [0.0], 0.0
    clock = SimpleNamespace(perf_counter=lambda: now.append(now[-1] + 2.0) or now[-1])
    monkeypatch.setattr("klora.ttt.progress.time", clock)
    documents = [document(300), document(200, 1)]
    key = fingerprint("artifact", documents, TTT, False)

    class Killed(BaseException):
        pass

    def kill(phase, done, total):
        if phase == killed_in and done > total / 4:
            raise Killed

    for _ in range(4):
        began = now[-1]
        book = Journal(tmp_path / "journal.jsonl", key, resume=spent > 0)
        with pytest.raises(Killed):
            pipeline.score(pipeline.ScoreRequest(randomized(), documents, TTT, book, progress=kill))
        book.close()
        spent += now[-1] - began
        book = Journal(tmp_path / "journal.jsonl", key, resume=True)
        assert 0.7 * spent < sum(book.seconds.values()) <= spent
        book.close()


def test_a_journal_that_the_disk_does_not_take_ends_in_a_sentence_and_stays_whole(tmp_path):
    book = Journal(tmp_path / "journal.jsonl", "run", resume=False)
    results = score([document(20), document(20, 1)], tmp_path / "other").documents
    book.add({0: results[0]}, {"base": 1.0})
    whole, file = book.path.read_bytes(), book._file

    class Full:
        """Takes the first bytes of what it gets."""

        fileno = file.fileno

        def write(self, data: bytes) -> int:
            return file.write(data[:50])

    book._file = Full()
    with pytest.raises(OSError, match=r"journal.jsonl could not be written .*kept: make space, then .* --resume"):
        book.add({1: results[1]})
    assert book.path.read_bytes() == whole
    book._file = file
    book.add({1: results[1]})  # there is space again
    book.close()
    assert Journal(book.path, "run", resume=True).done == dict(enumerate(results))


def test_a_journal_without_checksums_is_one_of_an_older_klora(tmp_path):
    score([document(40)], tmp_path)
    journal = tmp_path / "journal.jsonl"
    first = {name: value for name, value in lines_of(journal)[0].items() if name != "chain"}
    journal.write_text(json.dumps(first) + "\n")
    refused([document(40)], tmp_path, "line 1: it has no checksum, as no line of this klora; remove .* or give --over")


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
    documents, others = [document(40)], [document(7)]
    score(others, tmp_path)
    array = tmp_path / "journal.base.npy"
    foreign = array.read_bytes()
    score(documents, tmp_path)
    whole = array.read_bytes()
    flipped = [bytearray(whole) for _ in range(2)]
    flipped[0][-100] ^= 1  # a number of the array
    flipped[1][-1] ^= 128  # the checksum
    for damaged in (whole[:50], whole[:-1], whole + b"x", b"", b"junk" * 30, foreign, *flipped):
        array.write_bytes(damaged)
        refused(documents, tmp_path, r"journal.base.npy is damaged; give --overwrite")
    array.write_bytes(whole)
    assert score(documents, tmp_path, resume=True).documents[0].status == ADAPTED
    key = fingerprint("artifact", documents, TTT, False)
    with pytest.raises(JournalError, match=r"journal.base.npy is of other documents; give --overwrite"):
        Journal(tmp_path / "journal.jsonl", key, resume=True).base("base", 7)


def test_a_base_pass_that_cannot_be_kept_ends_nothing(tmp_path, monkeypatch):
    def full(journal, phase):
        raise OSError("no space left on device")

    monkeypatch.setattr(Journal, "keep_base", full)
    said = []
    assert score([document(40)], tmp_path, say=said.append).documents[0].status == ADAPTED
    assert len(said) == 2 and "the copy of the base pass for --resume could not be made" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["journal.jsonl", "journal.prequant.npy"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_the_place_of_a_journal_is_named_with_what_to_do(tmp_path, name, resume):
    (tmp_path / name).mkdir()
    with pytest.raises(JournalError, match=rf"{name} is a folder in the place of a journal's file; move it away"):
        open_journal(tmp_path, "run 1", resume)


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


def stop_after(rounds: int):
    """`should_stop` and `progress` of a run that is stopped after so many rounds of adapting."""
    seen = []
    return {
        "should_stop": lambda: len(seen) >= rounds,
        "progress": lambda phase, done, total: seen.extend([done] if phase == "adapt" else []),
    }


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [3, 11, 15])
def test_an_interrupted_run_goes_on_and_gives_the_same_scores(tmp_path, rounds):
    """What was through is kept, also where the journal's last line was torn."""
    documents = [document(n, n) for n in (200, 180, 40, 35, 33, 20, 10)]
    config = TTT.override({"batch": 2})
    whole = score(documents, tmp_path, config)
    with pytest.raises(Interrupted) as interrupted:
        score(documents, tmp_path, config, **stop_after(rounds))
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    kept = [line["result"]["tokens"] for line in lines if "result" in line]
    assert interrupted.value.done == len(kept) == {3: 2, 11: 2, 15: 5}[rounds]
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"index": 3, "name": "torn')
    seen = []
    resumed = score(documents, tmp_path, config, resume=True, progress=lambda phase, done, total: seen.append(total))
    assert adapted_nats(resumed) == pytest.approx(adapted_nats(whole), rel=1e-6)
    assert [d.name for d in resumed.documents] == [d.name for d in documents]
    assert max(seen) == sum(d.targets for d in documents) - sum(kept)


def test_a_stop_after_the_last_document_is_no_interruption(tmp_path):
    result = score([document(40)], tmp_path, **stop_after(3))
    assert result.documents[0].status == ADAPTED and result.token_gains.documents == 1


def test_a_journal_of_another_run_is_refused_by_what_differs(tmp_path):
    """Not by the batch size and the deadline, which change no document's score."""
    documents = [document(40)]

    def opened(config=TTT, documents=documents, artifact="artifact", resume=True) -> None:
        of_run = artifact, documents, config, False
        open_journal(tmp_path, fingerprint(*of_run), resume, settings=settings_of(*of_run)).close()

    opened(resume=False)
    opened(TTT.override({"batch": 7, "deadline": 3.0}))
    for given, says in (
        (
            {"config": TTT.override({"lr": 0.5, "chunk": 8})},
            "chunk is 16 there and 8 here, lr is 0.01 there and 0.5 here",
        ),
        ({"documents": [document(41)]}, "documents is 1 of digest [0-9a-f]* there and 1 of digest [0-9a-f]* here"),
        ({"artifact": "another"}, "artifact is artifact there and another here"),
    ):
        says = f"another artifact, other documents or other settings: {says}; give the same ones, or --overwrite"
        with pytest.raises(JournalError, match=says):
            opened(**given)
