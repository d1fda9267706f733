"""Several ranks score one set of documents: every document once, the same scores, and nothing lost with a rank."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, randomized, wait_for, words
from forks import Forked
from klora.model.artifact import save_artifact
from klora.model.config import ConfigError
from klora.ttt.claims import dealt
from klora.ttt.engine import Engine
from klora.ttt.journal import Journal, JournalError, open_journal
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.progress import Interrupted
from klora.ttt.queue import Member, SharedDeadline, StoreQueue, queue_of_processes
from klora.ttt.results import ADAPTED, DIVERGED, NOT_ADAPTED, SHORT, DocumentResult, NonFiniteScore
from klora.ttt.store import LostStore
from test_engine import TTT, model64
from test_ttt import document

CONFIG = TTT.override({"min_tokens": 32})
LENGTHS = (200, 40, 150, 20, 90, 33, 31, 7, 64, 120, 0, 50)


def documents():
    return [document(n, seed) for seed, n in enumerate(LENGTHS)]


def journal(tmp_path, rank: int) -> Journal:
    return Journal(tmp_path / f"journal-{rank}.jsonl", "run", False)


def run(book: Journal | None, queue, config=CONFIG, model=None, **options):
    return score(ScoreRequest(model or model64(), documents(), config, book, queue=queue, **options))


def together(tmp_path, world: int, config=CONFIG, **options):
    """A run on `world` threads, which share a store."""
    store, found, model = dist.HashStore(), {}, model64()

    def one(rank: int) -> None:
        found[rank] = run(journal(tmp_path, rank), StoreQueue(store, rank, world), config, model, **options)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(Journal(tmp_path_factory.mktemp("alone") / "journal.jsonl", "run", False), None)


def claims(world: int) -> list[int]:
    """The long documents in the order in which so many ranks claim them."""
    long = sorted((i for i in range(len(LENGTHS)) if LENGTHS[i] >= 31), key=lambda i: -LENGTHS[i])
    return [long[place] for place in dealt([LENGTHS[i] for i in long], world)]


def scores(result) -> list[float]:
    return [d.adapted_nats for d in result.documents]


# ---- the queue


def test_numbers_are_claimed_once_and_results_reach_every_rank():
    store = dist.HashStore()
    boards = [StoreQueue(store, rank, 3) for rank in range(3)]
    assert [list(board.claim("long", 2)) for board in boards] == [[0, 1], [2, 3], [4, 5]]
    assert boards[1].claim("short").start == 0
    result = DocumentResult("a", 3, 6, SHORT, 1.0, 1.0, 0.5)
    boards[2].publish({4: result})
    boards[2].publish({})
    boards[0].publish({1: result})
    for board in boards:
        board.collect()
        board.collect()
        assert board.results == {4: result, 1: result}
    begun = [board.begin({4: result}) for board in boards[:2]]
    assert [done for done, _ in begun] == [{4}, {4}] and not any(deadline.passed() for _, deadline in begun)
    late = [StoreQueue(dist.PrefixStore("late", store), rank, 2).begin({}, 10.0, 11.0)[1] for rank in range(2)]
    assert [deadline.passed() for deadline in late] == [True, True]


@pytest.mark.slow
def test_the_results_of_a_large_run_fit_into_a_store_that_refuses_large_values():
    """What 50,000 documents of an interrupted run come to; a TCPStore hangs up on more than 8 MiB at once."""
    store = dist.TCPStore("127.0.0.1", 0, None, True)
    results = {n: DocumentResult(f"text-{n}", 3, 6, SHORT, n / 7, n / 3, n / 9) for n in range(50_000)}
    first, second = (StoreQueue(dist.PrefixStore("run", store), rank, 2) for rank in range(2))
    first.publish(results)
    second.collect()
    assert second.results == results
    first.publish({7: results[8]})
    second.collect()
    assert second.results[7] == results[8]


def test_a_rank_that_waits_for_the_first_can_be_stopped_and_does_not_wait_for_ever(tmp_path):
    asked, now = [0], [0.0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 2

    with pytest.raises(Interrupted, match="0 of 12 documents"):
        run(journal(tmp_path, 1), StoreQueue(dist.HashStore(), 1, 2), should_stop=stop)
    waiting = StoreQueue(dist.HashStore(), 1, 2, clock=lambda: now.append(now[-1] + 1000) or now[-1])
    with pytest.raises(LostStore, match="the first rank has not begun within 1800 s"):
        waiting.begin({})


@pytest.mark.parametrize("settings", [{"lr": 0.1, "artifact": "a"}, {}])
def test_a_rank_of_another_run_is_refused(tmp_path, settings):
    store = dist.HashStore()
    books = [
        Journal(tmp_path / f"journal-{rank}.jsonl", f"run {rank}", False, settings=settings and settings | {"lr": rate})
        for rank, rate in enumerate((0.1, 0.3))
    ]
    StoreQueue(store, 0, 2).begin({}, of_run=books[0].of_run)
    says = "lr is 0.1 there and 0.3 here" if settings else "fingerprint is run 0 there and run 1 here"
    with pytest.raises(ConfigError, match=f"rank 1 is not of the first rank's run: {says}; start all ranks"):
        run(books[1], StoreQueue(store, 1, 2))
    StoreQueue(store, 1, 2).begin({}, of_run=books[0].of_run)


def test_ranks_without_a_master_address_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="RANK and WORLD_SIZE are set, but MASTER_ADDR"):
        queue_of_processes()


def test_a_rank_is_lost_when_its_pulse_stands_still_and_only_one_other_takes_a_document_over():
    store, now = dist.HashStore(), [0.0]
    boards = [StoreQueue(store, rank, 3, patience=10.0, clock=lambda: now[0]) for rank in range(3)]
    boards[1].own([7])
    boards[1].beat()
    rank_1 = boards[1].member
    assert not boards[0].is_lost(rank_1)
    now[0] = 9.0
    boards[1].beat()
    assert not boards[0].is_lost(rank_1)
    now[0] = 18.9
    assert not boards[0].is_lost(rank_1)
    now[0] = 19.0
    assert boards[0].is_lost(rank_1) and not boards[0].is_lost(boards[0].member)
    assert not boards[2].is_lost(rank_1)  # who has not watched for as long cannot tell
    assert boards[0].is_lost(rank_1) and not boards[2].take_over([7])
    assert boards[2].owner(7) == rank_1 and boards[2].owner(8) is None
    now[0] = 29.0
    assert boards[2].take_over([7, 8]) == [7] and boards[2].lost() == [rank_1]
    assert not boards[0].take_over([7]) and boards[0].owner(7) == boards[2].member
    now[0] = 38.9  # nobody said that document 8 was taken: patience is for it, too
    boards[2].beat()
    assert not boards[2].take_over([8])
    now[0] = 39.0
    assert boards[2].take_over([8]) == [8] and not boards[0].take_over([8])
    now[0] = 49.0
    assert boards[0].take_over([7, 8]) == [7], "who took it over can be lost, too"
    assert boards[0].owner(8) == boards[2].member and boards[0].take_over([8]) == [8]


def test_the_first_rank_stays_until_the_others_have_left_or_are_lost():
    store, now = dist.HashStore(), [0.0]
    first, second, third = (StoreQueue(store, rank, 4, patience=10.0, clock=lambda: now[0]) for rank in range(3))
    third.leave()  # does not wait
    StoreQueue(store, 3, 4).own([5])
    assert not second.take_over([5])
    now[0] = 10.0
    assert second.take_over([5]) == [5] and first.lost() == [Member(3, 1)]
    thread = threading.Thread(target=first.leave)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    second.leave()
    thread.join(timeout=600)
    assert not thread.is_alive()
    StoreQueue(dist.HashStore(), 0, 2).leave(
        should_stop=lambda: True
    )  # its results are whole: it goes on to the report
    again = threading.Thread(target=StoreQueue(dist.HashStore(), 0, 2, 10.0, lambda: now[0]).leave)
    again.start()
    time.sleep(0.1)
    assert again.is_alive()
    now[0] = 20.0
    again.join(timeout=600)
    assert not again.is_alive()


# ---- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_scores_are_those_of_one_process(tmp_path, alone, world):
    found = together(tmp_path, world)
    assert len(found) == world
    for result in found.values():
        assert [d.name for d in result.documents] == [d.name for d in alone.documents]
        assert [d.status for d in result.documents] == [d.status for d in alone.documents]
        np.testing.assert_allclose(scores(result), scores(alone), rtol=1e-12)
        bases = [[(d.base_nats, d.tempered_nats) for d in r.documents] for r in (result, alone)]
        np.testing.assert_allclose(*bases, rtol=1e-6)
        assert result.facts["ranks"] == world and result.facts["lost_ranks"] == []
        assert len(result.facts["rank_seconds"]) == world


@pytest.mark.slow
def test_leaky_protocols_and_a_second_model_go_the_same_way(tmp_path):
    config = CONFIG.override({"protocol": "min_nll"})
    prequant = model64()
    expected = run(None, None, config, prequant=prequant)
    found = together(tmp_path, 2, config, prequant=prequant)[0]
    np.testing.assert_allclose(scores(found), scores(expected), rtol=1e-12)
    assert found.to_json()["label"] == "LEAKY"
    assert [d.kept_pass for d in found.documents] == [d.kept_pass for d in expected.documents]
    np.testing.assert_allclose(
        [d.prequant_nats for d in found.documents], [d.prequant_nats for d in expected.documents], rtol=1e-6
    )


@pytest.mark.slow
def test_the_documents_of_a_lost_rank_go_to_the_others(tmp_path, alone):
    """Rank 1 takes documents of both kinds, shows a pulse and is never heard of again."""
    store = dist.HashStore()
    lost = StoreQueue(store, 1, 3)
    lost.beat()
    long = claims(3)
    first, *others = [long[number] for number in lost.claim("long", 3)]
    lost.own(others)  # of the first it could not say so any more
    lost.own([i for i in range(len(LENGTHS)) if i not in long])
    lost.claim("short", 512)
    found, model = {}, model64()

    def one(rank: int) -> None:
        found[rank] = run(journal(tmp_path, rank), StoreQueue(store, rank, 3, patience=2.5), model=model)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.facts["lost_ranks"] for result in found.values()] == [[1], [1]]  # whichever took them over
    for result in found.values():
        np.testing.assert_allclose(scores(result), scores(alone), rtol=1e-12)


@pytest.mark.slow
def test_the_deadline_is_one_decision_and_what_it_leaves_out_is_said(tmp_path, alone):
    store = dist.HashStore()
    boards = [StoreQueue(store, rank, 2) for rank in range(2)]
    deadlines = [SharedDeadline(boards[0], -1.0), SharedDeadline(boards[1], 1000.0)]
    assert not deadlines[1].passed() and deadlines[0].passed() and deadlines[1].passed()
    assert not SharedDeadline(boards[0], None).passed()
    found = together(tmp_path, 2, CONFIG.override({"deadline": "1e-9"}))
    for result in found.values():
        assert [d.status for d in result.documents] == [NOT_ADAPTED if n >= 31 else SHORT for n in LENGTHS]
        np.testing.assert_allclose(scores(result), [d.base_nats for d in alone.documents], rtol=1e-6)


def test_an_interrupted_run_keeps_what_every_rank_finished(tmp_path, alone):
    store, asked = dist.HashStore(), [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 17

    with pytest.raises(Interrupted):
        run(journal(tmp_path, 0), StoreQueue(store, 0, 1), should_stop=stop)
    paths = [tmp_path / "journal-0.jsonl", tmp_path / "journal-1.jsonl"]
    other = Journal(paths[1], "run", False)
    whole = dict(enumerate(alone.documents))
    other.add({9: whole[9], 10: whole[10]})
    other.close()
    Journal(tmp_path / "journal-2.jsonl", "another run", False).close()
    (tmp_path / "journal-3.jsonl").write_text("torn")
    paths += [tmp_path / "journal-2.jsonl", tmp_path / "journal-3.jsonl"]
    book = Journal(tmp_path / "journal.jsonl", "run", True, others=paths)
    assert {9, 10} < set(book.done) and len(book.done) < len(LENGTHS)
    shown = []
    result = run(book, StoreQueue(dist.HashStore(), 0, 1), progress=lambda *at: shown.append(at))
    np.testing.assert_allclose(scores(result), scores(alone), rtol=1e-12)
    assert shown[-1] == ("score", sum(LENGTHS), sum(LENGTHS)) and shown == sorted(shown)


def test_ranks_that_start_afresh_lose_no_finished_work_without_a_word(tmp_path, alone):
    """The first rank answers for all journals of the folder, whose ranks may be gone, any other for its own."""
    book = journal(tmp_path, 1)
    book.add(dict(enumerate(alone.documents)))
    book.close()
    for rank, world in ((0, 2), (0, 1), (1, 2)):
        with pytest.raises(JournalError, match=r"journal-1.jsonl: 12 finished documents of an interrupted run"):
            open_journal(tmp_path, "run", False, False, rank, world)
    assert (tmp_path / "journal-1.jsonl").stat().st_size > 1000
    resumed = open_journal(tmp_path, "run", True)
    assert len(resumed.done) == 12
    resumed.close()
    afresh = open_journal(tmp_path, "run", False, True)
    assert not afresh.done and not (tmp_path / "journal-1.jsonl").exists()
    afresh.close()


def test_the_time_of_every_interrupted_run_counts(tmp_path):
    for rank, seconds in ((0, 300.0), (1, 200.0)):
        book = journal(tmp_path, rank)
        book.add_seconds({"score": seconds})
        book.close()
    paths = [tmp_path / "journal-0.jsonl", tmp_path / "journal-1.jsonl"]
    book = Journal(tmp_path / "journal.jsonl", "run", True, others=paths)
    assert book.seconds == {"score": 300.0}
    with pytest.raises(Interrupted):
        run(book, StoreQueue(dist.HashStore(), 0, 1), should_stop=lambda: True)
    with pytest.raises(LostStore):
        run(book, StoreQueue(GoneStore(), 0, 1))
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert [300 < json.loads(line)["seconds"]["score"] < 400 for line in lines[-2:]] == [True, True]


def test_a_rank_that_waits_after_the_deadline_leaves_the_store_in_peace(tmp_path):
    """Another rank holds the last document; nothing is left to do but to wait for it."""
    store, asked = dist.HashStore(), [0]
    other = StoreQueue(store, 1, 2)
    other.claim("long")
    other.own([0])
    until = time.monotonic() + 1.0

    def stop() -> bool:
        asked[0] += 1
        return time.monotonic() > until

    config = CONFIG.override({"deadline": "1e-9"})
    with pytest.raises(Interrupted, match="11 of 12 documents"):
        run(journal(tmp_path, 0), StoreQueue(store, 0, 2), config, should_stop=stop)
    assert asked[0] < 50


class GoneStore:
    """A store whose keeper died as soon as this process had said that it is there."""

    def __getattr__(self, name):
        def call(*arguments):
            if arguments[:1] == ("starts/0",):
                return 1
            raise dist.DistNetworkError("connection reset by peer")

        return call


def test_a_store_that_is_gone_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(LostStore, match=r"the first rank or its launcher, is gone .* with --resume goes on"):
        run(journal(tmp_path, 0), StoreQueue(GoneStore(), 0, 2))
    with pytest.raises(Interrupted):  # all were stopped, and the store's keeper went first
        run(journal(tmp_path, 0), StoreQueue(GoneStore(), 0, 2), should_stop=lambda: True)


def test_a_wall_clock_that_is_off_stops_no_adapting(monkeypatch):
    """One machine's is an hour ahead of the other's, and is set back while the run goes on."""
    store = dist.HashStore()
    monkeypatch.setattr(time, "time", lambda: 3600.0)
    _, first = StoreQueue(store, 0, 2).begin({}, 100.0, 0.0)
    monkeypatch.setattr(time, "time", lambda: 7200.0)
    _, second = StoreQueue(store, 1, 2).begin({}, 100.0, 0.0)
    assert not first.passed() and not second.passed()
    assert all(99 < deadline.end - time.perf_counter() <= 100 for deadline in (first, second))


class StoppedStore:
    """A store whose keeper was stopped: it takes a question and gives no answer. `calls` questions are answered."""

    def __init__(self, store, calls: int = 0):
        self.store, self.calls = store, calls

    def __getattr__(self, name):
        def call(*arguments):
            self.calls -= 1
            if self.calls < 0:
                threading.Event().wait()
            return getattr(self.store, name)(*arguments)

        return call


@pytest.mark.parametrize("calls", [0, 5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_store_that_stands_still_ends_the_others_after_patience(tmp_path, calls):
    started = time.monotonic()
    book = journal(tmp_path, 0)
    with pytest.raises(LostStore, match=r"is gone \(it has not answered for 0.5 s\); what is scored is kept.*--resume"):
        run(book, StoreQueue(StoppedStore(dist.HashStore(), calls), 0, 2, patience=0.5))
    assert time.monotonic() - started < 60
    book.close()
    Journal(book.path, "run", resume=True).close()  # whole


@pytest.mark.slow
def test_where_the_first_rank_is_lost_the_others_say_how_to_get_the_results(tmp_path, alone):
    """It took documents, was stopped, and its store lives on in the launcher."""
    store = dist.HashStore()
    first = StoreQueue(store, 0, 2)
    first.begin({}, 0.0, 0.0)
    first.beat()
    first.own([first.claim("long").start])
    book = journal(tmp_path, 1)
    with pytest.raises(LostStore, match="all documents are scored, but the first rank, .* is lost"):
        run(book, StoreQueue(store, 1, 2, patience=1.0))
    book.close()
    resumed = Journal(tmp_path / "journal.jsonl", "run", True, others=[book.path])
    assert len(resumed.done) == len(LENGTHS)
    np.testing.assert_allclose([resumed.done[i].adapted_nats for i in range(len(LENGTHS))], scores(alone), rtol=1e-12)


def test_a_document_that_diverges_costs_no_rank(tmp_path, alone, monkeypatch):
    """It was taken over by one rank after the other, and each died of it."""
    launch, longest = Engine._launch, documents()[0].name

    def poisoned(self, number, taken, run):
        launch(self, number, taken, run)
        for place, slot, chunk in zip(taken.document, taken.slot, taken.chunk, strict=True):
            if (place, chunk) == (0, 2):  # the longest document, whichever rank has it
                self.pool.params[int(slot)] = float("nan")

    monkeypatch.setattr(Engine, "_launch", poisoned)
    found = together(tmp_path, 2)
    for result in found.values():
        assert [d.name for d in result.documents if d.status == DIVERGED] == [longest]
        assert result.facts["lost_ranks"] == []
        np.testing.assert_allclose(scores(result)[1:], scores(alone)[1:], rtol=1e-12)


def test_a_model_of_no_numbers_ends_all_ranks_at_once(tmp_path):
    model = model64()
    with torch.no_grad():
        model.embed[5:] = float("nan")
    ended, store = [], dist.HashStore()

    def one(rank: int) -> None:
        try:
            run(journal(tmp_path, rank), StoreQueue(store, rank, 2, patience=600.0), model=model)
        except NonFiniteScore as error:
            ended.append(str(error))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert len(ended) == 2 and all("the unadapted model gives" in text for text in ended)


# ---- a rank that is started again alone


def test_a_rank_that_is_started_again_is_another_process_than_its_predecessor():
    """What it says goes beside what the other said, and the other's documents wait for nobody's patience."""
    store, now = dist.HashStore(), [0.0]
    first, old = (StoreQueue(store, rank, 2, patience=1000.0, clock=lambda: now[0]) for rank in range(2))
    results = [DocumentResult(str(n), 3, 6, SHORT, 1.0 + n, 1.0, 0.5) for n in range(4)]
    first.begin({}, 100.0, 0.0)
    assert not old.is_restarted
    old.beat()
    old.own([old.claim("long").start, old.claim("long").start])
    old.publish({0: results[0]})
    assert not first.take_over([1]) and not first.is_lost(old.member)

    new = StoreQueue(store, 1, 2, patience=1000.0, clock=lambda: now[0])
    assert new.is_restarted and (new.member, old.member) == (Member(1, 2), Member(1, 1))
    done, deadline = new.begin({3: results[3]}, 100.0, 60.0)  # of its journal, which nobody else has read
    assert done == set() and 39 < deadline.end - time.perf_counter() <= 40
    assert list(new.claim("long")) == [2]
    new.own([2])
    new.publish({2: results[2]})
    old.publish({1: results[1]})  # it was not dead after all
    for queue in (first, new):
        queue.collect()
        assert queue.results == dict(enumerate(results))
    assert first.is_lost(old.member) and not first.is_lost(new.member)
    assert new.take_over([1, 2]) == [1], "its own documents are not its predecessor's"
    assert not first.take_over([1, 2]), "and whoever comes first has them"
    new.leave()
    facts = first.leave()
    assert facts["lost_ranks"] == [1] and facts["restarted_ranks"] == [1] and facts["absent_ranks"] == []


def test_the_first_rank_stays_for_one_that_was_started_again_and_lost_before():
    store = dist.HashStore()
    first, old = (StoreQueue(store, rank, 2, patience=1000.0) for rank in range(2))
    old.own([5])
    new = StoreQueue(store, 1, 2, patience=1000.0)
    assert first.take_over([5]) == [5]
    thread = threading.Thread(target=first.leave)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    old.leave()
    time.sleep(0.1)
    assert thread.is_alive(), "its successor is at work"
    new.leave()
    thread.join(timeout=600)
    assert not thread.is_alive()


@pytest.mark.slow
def test_a_rank_that_is_started_again_goes_on_from_its_journal(tmp_path, alone):
    """It had finished a document that it could not publish, and held two more."""
    store, model = dist.HashStore(), model64()
    old = StoreQueue(store, 1, 2)
    held = [claims(2)[number] for number in old.claim("long", 3)]
    old.own(held)
    book = journal(tmp_path, 1)
    book.add({held[0]: alone.documents[held[0]]})
    book.close()
    found, adapted = {}, []

    def one(rank: int) -> None:
        queue = StoreQueue(store, rank, 2, patience=600.0)
        own = Journal(tmp_path / f"journal-{rank}.jsonl", "run", resume=queue.is_restarted)
        adapt = own.add
        own.add = lambda results, *more: (adapted.extend(results), adapt(results, *more))
        found[rank] = run(own, queue, model=model)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted([*adapted, held[0]]) == list(range(len(LENGTHS))), "every other document once"
    for result in found.values():
        np.testing.assert_allclose(scores(result), scores(alone), rtol=1e-12)
        assert result.facts["lost_ranks"] == result.facts["restarted_ranks"] == [1]


def test_claims_are_told_in_lists_and_nothing_is_asked_about_a_document_whose_rank_lives():
    """A store's answer takes a tenth of a millisecond: 50,000 documents must not wait for one each."""
    calls = []

    class Counting:
        def __init__(self, store):
            self.store = store

        def __getattr__(self, name):
            return lambda *arguments: (calls.append(name), getattr(self.store, name)(*arguments))[1]

    store = Counting(dist.HashStore())
    first, second = (StoreQueue(store, rank, 2) for rank in range(2))
    calls.clear()
    second.own(range(50_000))
    assert len(calls) <= 2
    calls.clear()
    assert not first.take_over(range(50_000))
    assert len(calls) <= 12 and first.owner(49_999) == second.member
    calls.clear()
    first.publish({n: DocumentResult(str(n), 3, 6, SHORT, 1.0, 1.0, 1.0) for n in range(5_000)})
    second.collect()
    assert len(calls) <= 4 * 5_000 / 256 + 12


# ---- processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def scoring(tmp_path_factory, tokenizer) -> list:
    """`klora score` of some texts by a small model, without --out."""
    folder = tmp_path_factory.mktemp("scoring")
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size, blocks=2)
    save_artifact(folder / "m.klora", randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    (folder / "texts").mkdir()
    for number in range(8):
        (folder / "texts" / f"{number}.txt").write_text(words(number, 40 + 30 * (number % 4)))
    sets = [part for pair in ("chunk=16", "window=64", "batch=2") for part in ("--set", pair)]
    return ["-m", "klora.cli", "score", folder / "m.klora", "--text", folder / "texts", *sets, "--device", "cpu"]


KILLED_ONCE_IT_HAS_BEGUN = """
import os, signal
from klora.cli import main
from klora.ttt.queue import StoreQueue
begin = StoreQueue.begin
StoreQueue.begin = lambda *given: begin(*given) and os.kill(os.getpid(), signal.SIGKILL)
main()
"""
"""A signal from outside may come when a rank of so few documents is through."""

STANDS_ONCE_IT_HAS_BEGUN = KILLED_ONCE_IT_HAS_BEGUN.replace("os.kill(os.getpid(), signal.SIGKILL)", "signal.pause()")


@pytest.mark.slow
def test_a_killed_rank_is_started_again_while_the_other_lives(tmp_path, scoring):
    """By the same command. Nobody waits for the patience of ten minutes, and the scores are those of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    many = env | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start(rank: int, command: list) -> Forked:
        return Forked([*command, "--out", two, "--patience", "600"], environment={**many, "RANK": str(rank)})

    first, second = start(0, scoring), start(1, ["-c", KILLED_ONCE_IT_HAS_BEGUN, *scoring[2:]])
    assert second.wait() == -signal.SIGKILL and (two / "journal-1.jsonl").exists()
    again = start(1, scoring)
    said = [process.communicate() for process in (first, again)]
    assert [first.returncode, again.returncode] == [0, 0], said
    alone = Forked([*scoring, "--out", one], environment=env)
    assert alone.wait() == 0
    expected, found = (json.loads((folder / "score.json").read_text()) for folder in (one, two))
    assert found["restarted_ranks"] == [1] and found["ranks"] == 2
    assert [d["adapted_nats"] for d in found["documents"]] == [d["adapted_nats"] for d in expected["documents"]]
    assert not list(two.glob("journal*"))


@pytest.mark.slow
def test_where_the_first_rank_dies_with_its_store_the_other_says_one_sentence(tmp_path, scoring):
    """No stack of torch's C++ before it: a process that has not imported torch yet, as a user's."""
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env.pop("TORCH_CPP_LOG_LEVEL", None)
    scoring = [str(part) for part in (*scoring[2:], "--out", tmp_path / "out", "--patience", "600")]
    first = Forked(["-c", STANDS_ONCE_IT_HAS_BEGUN, *scoring], environment=env | {"RANK": "0"})
    command = [sys.executable, "-m", "klora.cli", *scoring]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    other = subprocess.Popen(command, env=env | {"RANK": "1"}, text=True, **pipes)
    wait_for((tmp_path / "out" / "journal-1.jsonl").exists, other)
    first.send_signal(signal.SIGKILL)
    _, said = other.communicate(timeout=300)
    assert other.returncode == 2, said
    assert said.count("\n") == 1 and said.startswith("klora: the process that keeps the ranks' store")
    assert "the same command with --resume goes on from there" in said


@pytest.mark.slow
def test_a_rank_that_never_comes_is_waited_for_no_longer_than_patience(tmp_path, scoring):
    """Its command was refused, say: the others stood for half an hour and said nothing."""
    many = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0"}
    first = Forked([*scoring, "--out", tmp_path / "out", "--patience", "2"], environment={**os.environ, **many})
    said = first.communicate()
    assert first.returncode == 0, said
    found = json.loads((tmp_path / "out" / "score.json").read_text())
    assert found["absent_ranks"] == [1] and found["lost_ranks"] == [] and len(found["documents"]) == 8
    assert "of the ranks, these never came: 1" in said[0] and "were lost" not in said[0]


SCORED = """
import json, os, sys
import numpy as np
import torch.distributed as dist
from klora.model.parallel import is_one_of_many, met, own_device
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.protocols import ttt_preset
from klora.ttt.queue import StoreQueue
from test_engine import on_gpu
from test_ttt import document

store, rank, world = met() if is_one_of_many() else (None, 0, 1)
lengths = [1, 40, 300, 3000, *map(int, np.random.default_rng(0).lognormal(6.2, 0.8, 40))]
texts, found = [document(n, seed) for seed, n in enumerate(lengths)], {}
for name in sys.argv[2:]:
    preset, _, phases = name.partition("+")
    config = ttt_preset(preset).override({"deadline": 0.0, "phases": phases or 0})
    queue = StoreQueue(dist.PrefixStore(name, store), rank, world) if store else None
    result = score(ScoreRequest(on_gpu(device=str(own_device())), texts, config, queue=queue))
    assert result.facts.get("ranks", 1) == world and not result.facts.get("lost_ranks")
    found[name] = [[d.name, d.status, d.base_nats, d.tempered_nats, d.adapted_nats] for d in result.documents]
if rank == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_bits_of_one(tmp_path):
    """Every preset, and phases: by torchrun, as a user starts it."""
    names = ["quick", "quick+2", "thorough", "best", "contest", "contest+1", "design"]
    (tmp_path / "scored.py").write_text(SCORED)
    path, env = os.pathsep.join(filter(None, sys.path)), {**os.environ, "OMP_NUM_THREADS": "4"}
    launchers = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    found = {}
    for world, launcher in launchers.items():
        out = tmp_path / f"{world}.json"
        command = [sys.executable, *launcher, tmp_path / "scored.py", out, *names]
        done = subprocess.run(command, env={**env, "PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        found[world] = json.loads(out.read_text())
    for name in names:
        assert found[1][name] == found[2][name], name
        assert any(status == ADAPTED for _, status, *_ in found[1][name])
