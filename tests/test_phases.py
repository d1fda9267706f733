"""Phases: a shared adapter that learns from scored documents. What it is, what may depend on it, and who says so."""

import dataclasses
import json
import os
import re
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, randomized
from forks import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.cli.app import app
from klora.model.artifact import save_artifact
from klora.model.config import ConfigError, preset
from klora.model.gpt import GPT
from klora.ttt import pipeline
from klora.ttt.adapters import AdapterPool
from klora.ttt.base import BaseNll
from klora.ttt.claims import dealt
from klora.ttt.documents import Document
from klora.ttt.engine import Engine, engine_of
from klora.ttt.journal import JournalError, fingerprint
from klora.ttt.phases import groups_of, shared_steps
from klora.ttt.pipeline import ScoreRequest
from klora.ttt.progress import Interrupted
from klora.ttt.protocols import TTTConfig, ttt_preset
from klora.ttt.queue import Deadline, StoreQueue
from klora.ttt.results import ADAPTED, NOT_ADAPTED, SHORT
from klora.ttt.run import Run
from klora.ttt.step import COUNT, SLOT, TRAINED, EngineStep, clear_plan
from oracles import phases as oracle
from oracles.eager import token_nll as eager_nll
from test_cached_context import oracle as cached_nll
from test_cli import klora
from test_engine import SHALLOW64, STRICT, Ops, gpu, on_gpu, strict_configs, token_nll
from test_ranks import free_port
from test_ttt import document, score
from typer.testing import CliRunner

PHASED = STRICT.override({"phases": 2, "phase_lr": 0.01, "phase_chunks": 3, "temperature": 1.0})
LENGTHS = (100, 16, 65, 7, 40, 90, 33, 17, 0, 64)
SAYS = "depends on earlier documents"


def documents(lengths=LENGTHS) -> list[Document]:
    return [document(n, seed) for seed, n in enumerate(lengths)]


def run(docs, config=PHASED, model: GPT = SHALLOW64, **options):
    return pipeline.score(ScoreRequest(model, docs, config, **options))


def nats(result) -> dict[str, float]:
    return {d.name: d.adapted_nats for d in result.documents}


# ---- the rule


def test_groups_go_by_names_and_their_number_alone():
    docs = documents()
    names = [[docs[i].name for i in group] for group in groups_of(docs, 2)]
    assert [len(group) for group in names] == [4, 3, 3]
    assert names == [[d.name for d in group] for group in oracle.groups(docs, 2)]
    backwards = docs[::-1]
    assert [[backwards[i].name for i in group] for group in groups_of(backwards, 2)] == names
    other = [dataclasses.replace(d, tokens=document(50, 99).tokens) for d in docs]
    assert groups_of(other, 2) == groups_of(docs, 2)
    assert [len(group) for group in groups_of(docs[:2], 3)] == [1, 1, 0, 0] and groups_of([], 1) == [[], []]


def test_a_shared_step_has_chunks_of_one_queue_and_every_chunk_is_in_one_step():
    steps = list(shared_steps([5, 1, 0, 3], [0, 1, 3], 2))
    found = [(step.queue, list(zip(step.document.tolist(), step.chunk.tolist(), strict=True))) for step in steps]
    assert found == [
        (1, [(0, 1), (0, 2)]),
        (2, [(0, 3), (0, 4)]),
        (0, [(0, 0), (1, 0)]),
        (1, [(3, 1), (3, 2)]),
        (0, [(3, 0)]),
    ]


# ---- the numbers


CHANGES = {
    "plain": {},
    "several": {"steps_per_chunk": 2, "phase_passes": 2, "weight_decay": 0.5, "beta1": 0.0, "lr_half": 30},
    "late": {"chunk": 20, "window": 50, "adapt_from": 30, "temperature": 0.9, "targets": "q,o,up,down"},
    "cached": {"context": "cached", "temperature": 0.9, "phase_chunks": 5, "targets": "v,o,up,down,head"},
    "a": {"phase_start": "a", "targets": "q,v,o,up,down,head", "v_rank": 1, "a_scale": 0.5, "weight_decay": 0.5},
    "a cached": {"phase_start": "a", "context": "cached", "temperature": 0.9, "v_alpha": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_the_shared_adapter_and_what_starts_from_it_are_the_oracles(name):
    """In float64, after one phase and after two; a batch smaller than a shared step and one that is larger."""
    config, docs, model = PHASED.override(CHANGES[name]), documents(), SHALLOW64
    groups, rows = oracle.groups(docs, 2), oracle.shared_rows(model, docs, config)
    for batch in (1, 4):
        engine = engine_of(model, config.override({"batch": batch}), docs)
        for number, (group, row) in enumerate(zip(groups, rows, strict=True)):
            np.testing.assert_allclose(engine.pool.initial, row, rtol=1e-9, atol=1e-12)
            group = [d for d in group if d.targets]
            engine.adapt(group, Deadline(0))
            for doc, found in zip(group, engine.token_nll(group), strict=True):
                if config.context == "cached":
                    expected = cached_nll(model, doc, config, initial=row).numpy()
                else:
                    (expected,) = eager_nll(model, doc, config, row)
                np.testing.assert_allclose(found, expected, rtol=1e-9)
            if number < 2:
                assert engine.learn(group, lambda: False)
                assert not torch.equal(engine.pool.initial, row)


@pytest.mark.parametrize("context", ["recomputed", pytest.param("cached", marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["all", "a"])
def test_a_run_gives_the_oracles_numbers_and_leaves_less_to_the_base_model(context, start):
    """From A alone it leaves as much as without phases."""
    config, docs = PHASED.override({"context": context, "phase_start": start}), documents()
    result, rows = run(docs, config), oracle.shared_rows(SHALLOW64, docs, config)
    where = {d.name: number for number, group in enumerate(oracle.groups(docs, 2)) for d in group}
    for doc, d in zip(docs, result.documents, strict=True):
        assert d.group == where[doc.name]
        assert d.status == (ADAPTED if doc.targets > (0 if d.group and start == "all" else 16) else SHORT)
        if d.status == SHORT:
            assert d.adapted_nats == d.base_nats
        elif context == "cached":
            expected = cached_nll(SHALLOW64, doc, config, initial=rows[d.group]).sum()
            np.testing.assert_allclose(d.adapted_nats, expected, rtol=1e-9)
        else:
            expected = eager_nll(SHALLOW64, doc, config, rows[d.group])[0].sum()
            np.testing.assert_allclose(d.adapted_nats, expected, rtol=1e-9)
    assert any(d.status == ADAPTED and d.tokens <= 16 for d in result.documents) == (start == "all")
    assert result.facts["phases"]["documents_in_groups"] == [4, 3, 3]
    taken = [len(oracle.steps(group, config)) for group in oracle.groups(docs, 2)[:2]]
    assert result.facts["engine"]["shared_steps"] == sum(taken) and "learn" in result.seconds


def from_a_and_alone(model, config, docs, **options) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The NLLs of the last of `docs` after the others were learned from, with its A alone and without phases."""
    found = []
    for phases in (1, 0):
        engine = engine_of(model, config.override({"phases": phases, "phase_start": "a"}), docs, **options)
        if phases:
            engine.learn(docs[:-1])
        engine.adapt(docs[-1:], Deadline(0))
        found.append(engine.token_nll(docs[-1:])[0])
    return found


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("context", ["recomputed", "cached"])
@pytest.mark.usefixtures("one_thread")
def test_what_starts_from_a_is_the_base_model_to_the_bit_until_its_own_first_step(context, backend):
    changes = {"context": context, "phase_lr": 0.3, "adapt_from": 32, "window": 32, "targets": "q,k,v,o,up,down,head"}
    model = randomized(dataclasses.replace(SMALL, blocks=2, heads=2, kv_heads=1)).requires_grad_(False)
    docs, config = documents((40, 33, 60)), PHASED.override(changes)
    learned, alone = from_a_and_alone(model, config, docs, backend=backend)
    np.testing.assert_array_equal(learned[:32], alone[:32])
    assert (learned[32:] != alone[32:]).any()
    if context == "recomputed":
        np.testing.assert_allclose(learned[:32], BaseNll(model, docs[-1:], config).nll[1:33], rtol=1e-5)


def test_what_is_carried_is_every_a_and_no_b_or_bias():
    """The pool's own values: a rank of zero stays one, and neither B nor a bias is there before the first step."""
    config = PHASED.override({"phase_start": "a", "targets": "q,v,up,head", "q_rank": 1})
    pool = AdapterPool(SMALL, config, 2, torch.device("cpu"))
    pool.params[pool.shared].uniform_(1.0, 2.0)
    pool.start_from_shared()
    pool.start(torch.tensor([1]))
    adapters, head = pool.layout.adapters(None, pool.views(pool.params[1:2], 1))
    _, shared_head = pool.layout.adapters(None, pool.views(pool.params[2:], 1))
    assert torch.equal(head.a, shared_head.a) and not head.b.any()
    for block in adapters.blocks:
        assert (block.qkv.a >= 1).all() and (block.up.a >= 1).all() and block.o is block.down is None
        assert not any(tensor.any() for tensor in (block.qkv.b, block.up.b, block.bias))


@pytest.mark.parametrize("change, learns", [({}, True), ({"phase_lr": 0.0}, False), ({"phase_start": "a"}, False)])
def test_at_a_rate_of_zero_a_alone_changes_nothing(change, learns):
    config = PHASED.override({"lr": 0.0} | change)
    assert config.learns is learns and all(config.is_left_to_base(99, group) is not learns for group in (1, 2))


@pytest.mark.slow
def test_what_earlier_documents_teach_helps_later_ones_like_them():
    """One text under many names: what the first group leaves in the shared adapter is worth a lot to the others."""
    tokens = np.tile(np.arange(10, 26, dtype=np.uint16), 6)
    tokens[0] = 1
    docs = [Document(str(n), tokens, 100) for n in range(12)]
    result = run(docs, PHASED.override({"phases": 1, "phase_passes": 4}), randomized())
    first, second = ([d for d in result.documents if d.group == number] for number in (0, 1))
    assert max(d.adapted_nats for d in second) < 0.8 * min(d.adapted_nats for d in first)


def test_a_step_adds_up_its_places_and_steps_the_shared_slot_once():
    """The mean over all targets of the step, one Adam step, and no other slot touched."""
    docs = documents((40, 10))
    engine = engine_of(SHALLOW64, PHASED, docs)
    before = engine.pool.params.clone()
    engine.learn(docs)
    shared = engine.pool.shared
    assert engine.pool.step.tolist() == [0] * shared + [3] and engine.facts["shared_steps"] == 3
    assert torch.equal(engine.pool.params[:shared], before[:shared])
    assert torch.equal(engine.pool.initial, engine.pool.params[shared])
    plan = engine._ring[0].numpy()  # the queue of the first chunks: 16 targets and 10
    assert plan[SLOT, :3].tolist() == [shared, shared, -1] and plan[COUNT, :3].tolist() == [26, 26, -1]
    assert (plan[TRAINED] == shared).sum() == 1


def test_passes_over_a_group_are_no_list_in_memory():
    """A stop that comes after the first step of very many."""
    docs, config = documents((40, 10)), PHASED.override({"phase_passes": 10**9})
    stops = iter([False, True])
    assert engine_of(SHALLOW64, config, docs).learn(docs, lambda: next(stops)) is False


# ---- what a score may depend on


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(1, 2), st.sampled_from(["recomputed", "cached"]), st.sampled_from(["all", "a"]), st.randoms())
def test_no_bit_of_an_earlier_group_depends_on_the_text_of_a_later_one(changed, context, start, random):
    """Other tokens, fewer or more, in every document from a group on; the groups before it have the same bits."""
    docs, config = documents(), PHASED.override({"context": context, "phase_start": start})
    group_of = {docs[i].name: number for number, group in enumerate(groups_of(docs, 2)) for i in group}
    other = [
        Document(d.name, document(random.randrange(1, 90), random.randrange(1000)).tokens, 100)
        if group_of[d.name] >= changed
        else d
        for d in docs
    ]
    one, two = run(docs, config).documents, run(other, config).documents
    earlier = [(a, b) for a, b in zip(one, two, strict=True) if a.group < changed and a.status == ADAPTED]
    assert earlier and [a.adapted_nats for a, _ in earlier] == [b.adapted_nats for _, b in earlier]
    assert [d.group for d in one] == [d.group for d in two]
    last = [(a, b) for a, b in zip(one, two, strict=True) if a.group == 2]
    assert all(a.adapted_nats != b.adapted_nats for a, b in last if a.tokens)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    strict_configs(),
    st.sampled_from(["recomputed", "cached"]),
    st.sampled_from(["all", "a"]),
    st.integers(1, 49),
    st.randoms(),
)
def test_no_score_of_a_later_group_depends_on_its_documents_later_text(config, context, start, reached, random):
    learns = {"phases": 1, "phase_lr": 0.01, "phase_chunks": 3, "phase_start": start, "context": context}
    config, earlier, later = config.override(learns), documents((40, 33)), document(50, 9).tokens
    other = later.copy()
    other[reached + 1 :] = [random.randrange(1, SMALL.vocab_size) for _ in other[reached + 1 :]]
    engine, scores = engine_of(SHALLOW64, config, [*earlier, Document("", later, 1)]), []
    assert engine.learn(earlier)
    for tokens in (later, other, later[: reached + 1]):
        some = Document("", tokens, 1)
        engine.adapt([some], Deadline(0))
        scores.append(token_nll(engine, [some])[0][:reached])
    np.testing.assert_array_equal(scores[1], scores[0])
    np.testing.assert_array_equal(scores[2], scores[0])


@pytest.mark.parametrize("start", ["all", "a"])
def test_the_first_group_has_the_bits_of_a_run_without_phases(start):
    docs = documents()
    first = [docs[i] for i in sorted(groups_of(docs, 2)[0])]
    alone = run(first, PHASED.override({"phases": 0}))
    phased = nats(run(docs, PHASED.override({"phase_start": start})))
    assert nats(alone) == {d.name: phased[d.name] for d in first}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 3, 16, 20, 255, 256])
def test_a_documents_own_step_is_the_mean_over_its_chunk_to_the_bit(dtype, chunk, monkeypatch):
    config = STRICT.override({"chunk": chunk, "window": 256})
    engine, shares = Engine(randomized(dtype=dtype), config, 600, slots=2, rows=(2,)), []
    step = EngineStep(
        engine.weights, engine.pool, engine.tokens, engine.record, engine.plan, engine.chunks, engine.queues[0], 2
    )
    monkeypatch.setattr(EngineStep, "_gradients", lambda self, *given: shares.append(given[3]) or given[3])
    clear_plan(engine.plan)
    engine.plan[SLOT : COUNT + 1, 0] = torch.tensor([0, 0, chunk])
    step.train()
    trained = torch.tensor([True, False]).to(dtype) / chunk
    assert shares[0].dtype == dtype and torch.equal(shares[0], trained[:, None].expand(2, chunk))
    assert engine.pool.shared is None and len(engine.pool.params) == 2


def test_without_phases_their_settings_change_nothing():
    docs, config = documents(), PHASED.override({"phases": 0})
    other = config.override({"phase_lr": 1.0, "phase_passes": 3, "phase_chunks": 1, "phase_start": "a"})
    one = run(docs, config)
    assert nats(one) == nats(run(docs, other)) and {d.group for d in one.documents} == {0}
    assert "phases" not in one.facts and not one.notes and not one.phases_note
    assert one.to_json()["depends_on_earlier_documents"] is False


@pytest.mark.slow
@pytest.mark.parametrize("start", ["all", "a"])
def test_neither_the_order_of_documents_nor_the_batch_nor_another_run_changes_a_score(start):
    docs, config = documents(), PHASED.override({"phase_start": start})
    whole = nats(run(docs, config))
    assert nats(run(docs, config)) == whole
    batches = [run(docs, config.override({"batch": batch})) for batch in (1, 9)]
    for again in (run(docs[::-1], config), *batches):
        found = nats(again)
        np.testing.assert_allclose([found[name] for name in whole], list(whole.values()), rtol=1e-12)


# ---- processes, interruptions, deadlines


def together(world: int, lost: tuple[int, ...] = (), config=PHASED, **options):
    """Runs on threads that share a store; `lost` ranks never come."""
    store, found = dist.HashStore(), {}

    def one(rank: int) -> None:
        found[rank] = run(documents(), config, queue=StoreQueue(store, rank, world, **options))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world) if rank not in lost]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, store


@pytest.mark.parametrize(
    "world, start", [pytest.param(1, "all", marks=pytest.mark.slow), (2, "all"), (2, "a"),
                     pytest.param(3, "all", marks=pytest.mark.slow)])  # fmt: skip
def test_ranks_give_the_scores_of_one_process(world, start):
    config = PHASED.override({"phase_start": start})
    alone, (found, _) = run(documents(), config), together(world, config=config)
    assert len(found) == world
    for result in found.values():
        assert [d.status for d in result.documents] == [d.status for d in alone.documents]
        assert [d.group for d in result.documents] == [d.group for d in alone.documents]
        np.testing.assert_allclose(list(nats(result).values()), list(nats(alone).values()), rtol=1e-12)


def test_every_rank_has_the_bits_of_the_same_shared_adapter_and_learns_behind_the_last_score(monkeypatch):
    """No document of a group is published after any rank has begun to learn from it."""
    learn, seen, lock = Engine.learn, [], threading.Lock()
    publish = StoreQueue.publish

    def learned(self, docs, *more):
        with lock:
            seen.append(("learn", {d.name for d in docs}))
        done = learn(self, docs, *more)
        rows.append(self.pool.initial.clone())
        return done

    def published(self, results):
        with lock:
            seen.append(("score", {result.name for result in results.values()}))
        publish(self, results)

    rows: list[torch.Tensor] = []
    monkeypatch.setattr(Engine, "learn", learned)
    monkeypatch.setattr(StoreQueue, "publish", published)
    together(2)
    assert len(rows) == 4 and len({row.numpy().tobytes() for row in rows}) == 2
    for at, (what, names) in enumerate(seen):
        if what == "learn":
            assert not any(names & later for kind, later in seen[at:] if kind == "score")
            assert names <= set().union(*(before for kind, before in seen[:at] if kind == "score"))


@pytest.mark.slow
def test_the_documents_of_a_rank_that_is_lost_in_a_later_group_go_to_the_others():
    store, docs, found = dist.HashStore(), documents(), {}
    lost = StoreQueue(store, 2, 3)
    lost.beat()
    later = sorted(groups_of(docs, 2)[1], key=lambda i: -docs[i].targets)
    order = dealt([docs[i].targets for i in later if docs[i].targets > 0], 3)
    lost.own([later[order[lost.claim("long/1").start]]])

    def one(rank: int) -> None:
        found[rank] = run(docs, queue=StoreQueue(store, rank, 3, patience=2.5))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = list(nats(run(docs)).values())
    for result in found.values():
        assert result.facts["lost_ranks"] == [2]
        np.testing.assert_allclose(list(nats(result).values()), alone, rtol=1e-12)


def stop_after(times: int):
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > times

    return stop


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_numbers_wherever_it_was_stopped(tmp_path, monkeypatch):
    docs = documents()
    whole = score(docs, tmp_path, PHASED, SHALLOW64)
    learned, stopped_in = [], set()
    learn = Engine.learn

    def watched(self, *given):
        learned.append(False)
        learned[-1] = learn(self, *given)
        return learned[-1]

    monkeypatch.setattr(Engine, "learn", watched)
    for times in range(2, 60, 3):
        learned.clear()
        try:
            score(docs, tmp_path, PHASED, SHALLOW64, should_stop=stop_after(times))
            break
        except Interrupted:
            stopped_in.add((len(learned), learned[-1:] == [False]))
        resumed = score(docs, tmp_path, PHASED, SHALLOW64, resume=True)
        np.testing.assert_allclose(list(nats(resumed).values()), list(nats(whole).values()), rtol=1e-12)
        assert [d.group for d in resumed.documents] == [d.group for d in whole.documents]
    # Before any phase, inside the first and the second one, and between them.
    assert {(0, False), (1, True), (1, False), (2, True)} <= stopped_in


def test_a_finished_run_learns_nothing_again(tmp_path, monkeypatch):
    docs = documents()
    whole = score(docs, tmp_path, PHASED, SHALLOW64)
    monkeypatch.setattr(Engine, "learn", lambda *given: pytest.fail("there is nothing left to learn for"))
    assert nats(score(docs, tmp_path, PHASED, SHALLOW64, resume=True)) == nats(whole)


def test_other_phases_are_another_run(tmp_path):
    docs = documents((40, 20))
    score(docs, tmp_path, PHASED)
    keys = {fingerprint("artifact", docs, PHASED, False)}
    for change in (
        {"phases": 1}, {"phase_lr": 0.5}, {"phase_passes": 2}, {"phase_chunks": 2}, {"phase_start": "a"}
    ):  # fmt: skip
        keys.add(fingerprint("artifact", docs, PHASED.override(change), False))
        with pytest.raises(JournalError, match="other settings"):
            score(docs, tmp_path, PHASED.override(change), resume=True)
    assert len(keys) == 6


def test_nothing_is_learned_once_the_deadline_has_passed(monkeypatch):
    """In the middle of a phase: the groups before it are scored, and those after it are the base model's."""

    class InTheSecondPhase(Deadline):
        def __init__(self, *given):
            pass

        def passed(self) -> bool:
            return len(fills) > first

    docs, fills, fill = documents(), [], Run.fill_shared
    whole, first = nats(run(docs)), len(oracle.steps(oracle.groups(docs, 2)[0], PHASED))
    monkeypatch.setattr(Run, "fill_shared", lambda *given: fills.append(1) or fill(*given))
    monkeypatch.setattr("klora.ttt.queue.Deadline", InTheSecondPhase)
    result = run(docs)
    assert len(fills) == first + 1
    for d in result.documents:
        starts = 0 if d.group else 16
        assert d.status == (SHORT if d.tokens <= starts else ADAPTED if d.group < 2 else NOT_ADAPTED)
        assert d.adapted_nats == (whole[d.name] if d.status == ADAPTED else d.base_nats)
    assert result.deadline_hit


# ---- what is refused, and what is said


def test_phases_are_for_score_first_from_the_start():
    with pytest.raises(ConfigError, match="phases=2 is not possible; allowed: 0, with protocol=min_nll"):
        TTTConfig(protocol="min_nll", phases=2)
    with pytest.raises(ConfigError, match="phases=1 is not possible; allowed: 0, with layout=original; give layout"):
        ttt_preset("design").override({"phases": 1})
    with pytest.raises(ConfigError, match="phases=-1"):
        ttt_preset().override({"phases": "-1"})
    assert ttt_preset().phases == 0 and ttt_preset().phase_start == "all"
    with pytest.raises(ConfigError, match="phase_start='b' is not possible; allowed: one of all, a"):
        ttt_preset().override({"phases": 1, "phase_start": "b"})
    whole = ttt_preset().to_dict()
    del whole["phase_start"]
    with pytest.raises(ConfigError, match="TTTConfig has no value for phase_start"):
        TTTConfig.from_dict(whole)
    with pytest.raises(ValueError, match="phases is 0: there is no shared adapter"):
        Engine(SHALLOW64, STRICT, 100).learn(documents((40,)))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("phases")
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size, blocks=2)
    save_artifact(folder / "m.klora", randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    (folder / "texts").mkdir()
    for number in range(6):
        (folder / "texts" / f"{number}.txt").write_text(f"text {number} says one thing and then another\n" * 8)
    sets = [part for pair in ("chunk=16", "window=64", "phase_chunks=4") for part in ("--set", pair)]
    return ["score", folder / "m.klora", "--text", folder / "texts", *sets, "--device", "cpu"]


@pytest.mark.slow
def test_every_output_says_that_scores_depend_on_earlier_documents(files, tmp_path):
    said = CliRunner().invoke(app, [*map(str, files), "--phases", "2", "--out", str(tmp_path / "two")]).output
    shown = re.sub(r"\s+", " ", said)
    assert f"(phases=2: {SAYS})" in shown and "note: scores depend on earlier documents (phases=2): 2 times" in shown
    result = json.loads((tmp_path / "two" / "score.json").read_text())
    assert result["depends_on_earlier_documents"] is True and result["valid_score"] is True
    assert result["notes"][-1].startswith("scores depend on earlier documents (phases=2)")
    assert result["phases"]["documents_in_groups"] == [2, 2, 2]
    assert sorted(d["group"] for d in result["documents"]) == [0, 0, 1, 1, 2, 2]
    page = (tmp_path / "two" / "report.html").read_text()
    assert "Scores depend on earlier documents (phases=2)" in page
    assert page.count(f"(phases=2: {SAYS})") >= 2 and "of a document of the first group are scored" in page

    from_a = ["--phases", "1", "--set", "phase_start=a", "--out", str(tmp_path / "a")]
    shown = re.sub(r"\s+", " ", CliRunner().invoke(app, [*map(str, files), *from_a]).output)
    marked = "phases=1, phase_start=a"
    assert f"({marked}: {SAYS})" in shown and "start from its A alone, with B and biases of zero" in shown
    result = json.loads((tmp_path / "a" / "score.json").read_text())
    assert result["valid_score"] is True and result["config"]["phase_start"] == "a"
    assert result["notes"][-1].startswith(f"scores depend on earlier documents ({marked}): once")
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count(f"({marked}: {SAYS})") >= 2
    assert "tokens are scored before the document&#x27;s own first step" in page

    said = CliRunner().invoke(app, [*map(str, files), "--out", str(tmp_path / "none")]).output
    page = (tmp_path / "none" / "report.html").read_text()
    plain = json.loads((tmp_path / "none" / "score.json").read_text())
    assert plain["depends_on_earlier_documents"] is False and plain["config"]["phases"] == 0
    assert "earlier documents" not in re.sub(r"\s+", " ", said) + page.split("Every setting")[0]


def test_the_option_is_the_setting(files):
    said = [
        json.loads(CliRunner().invoke(app, [*map(str, files), *option, "--fields", "--json"]).stdout)
        for option in (("--phases", "3"), ("--set", "phases=3"), ())
    ]
    assert said[0] == said[1] and said[0]["phases"]["value"] == 3 and said[2]["phases"]["value"] == 0
    assert said[0]["phase_start"]["value"] == "all" and said[0]["phase_start"]["allowed"] == "one of all, a"


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(files, tmp_path):
    command = [*map(str, files), "--phases", "2", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port())}
    cli = ["-m", "klora.cli", *command, "--out", tmp_path / "two"]
    started = [Forked(cli, environment={**env, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    klora(*command, "--out", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "score.json").read_text())["documents"] for name in ("one", "two"))
    np.testing.assert_allclose([d["adapted_nats"] for d in two], [d["adapted_nats"] for d in one], rtol=1e-6)


# ---- memory, and the kernels


def test_the_pool_and_the_estimate_have_one_slot_more():
    pool = AdapterPool(SMALL, PHASED, 3, torch.device("cpu"))
    assert pool.shared == 3 and pool.params.shape[0] == 4
    plain = PHASED.override({"phases": 0})
    for context in ("recomputed", "cached"):
        one, two = (
            Engine(SHALLOW64, config.override({"context": context}), 500, slots=2).facts["estimated_bytes"]
            for config in (plain, PHASED.override({"phase_chunks": 64}))
        )
        assert two > one


@pytest.mark.parametrize("context, made", [("recomputed", 4 * 2 + 4), ("cached", 1 * 2 + 4)])
def test_a_rehearsal_makes_the_shared_steps_and_leaves_no_trace(context, made):
    engine = Engine(SHALLOW64, PHASED.override({"context": context}), 500, rows=(), slots=2)
    state = [engine.pool.params, engine.pool.exp_avg, engine.pool.exp_avg_sq, engine.pool.step]
    before = [tensor.clone() for tensor in state]
    engine.rehearse()
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert len({id(step) for steps in (engine._steps, engine._shared_steps) for step in steps.values()}) == made


@pytest.mark.parametrize("start", ["all", "a"])
@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_a_shared_step_asks_the_device_for_nothing_and_steps_adam_once(context, start):
    """The `seed` preset in bf16 without memory: a value asked for would be an error, and could not be captured."""
    with torch.device("meta"):
        model = GPT(preset("seed").model).requires_grad_(False)
    model.compute_dtype = torch.bfloat16
    config = ttt_preset().override({"context": context, "phases": 1, "phase_start": start, "batch": 4})
    engine = Engine(model, config, 5000, rows=(), capture=False, backend="triton")
    engine._prepare_shared([3])
    with Ops() as ops:
        engine._shared_steps[3, 16, True]()
        engine.pool.start_from_shared()
        engine.pool.start(torch.zeros(2, dtype=torch.int64, device="meta"))
    assert ops.seen["lora_adam_"] == ops.seen["lora_head_nll_grads_"] == 1 and "cache_write_" not in ops.seen


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs the kernels where there is no GPU")
@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_the_kernels_in_the_interpreter_learn_what_the_reference_learns(context):
    config = PHASED.override({"window": 32, "batch": 2, "context": context, "targets": "q,k,v,o,up,down,head"})
    model = randomized(dataclasses.replace(SMALL, blocks=2, heads=2, kv_heads=1)).requires_grad_(False)
    docs, found = documents((40, 20)), []
    for backend in ("reference", "triton"):
        engine = engine_of(model, config, docs, backend=backend)
        start = engine.pool.initial.clone()
        engine.learn(docs)
        found.append(engine.pool.initial - start)
    # Adam divides by a gradient's size: where that is nearly zero its sign is noise.
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("start", ["all", "a"])
    @pytest.mark.parametrize("context", ["recomputed", "cached"])
    def test_graphs_give_the_bits_of_no_graphs_and_of_another_run_and_batch(self, context, start):
        """What starts from the shared adapter after two phases, and every NLL of the last group."""
        config = ttt_preset().override({"context": context, "phases": 2, "batch": 16, "phase_chunks": 8})
        config = config.override({"phase_start": start})
        docs, model, found = documents((3000, 700, 1500, 200, 900, 2000)), on_gpu(), []
        for capture, batch in ((True, 16), (True, 16), (False, 16), (True, 4)):
            engine = engine_of(model, config.override({"batch": batch}), docs, capture=capture)
            for group in groups_of(docs, 2)[:2]:
                engine.learn([docs[i] for i in group])
            last = [docs[i] for i in groups_of(docs, 2)[2]]
            engine.adapt(last, Deadline(0))
            found.append((engine.pool.initial.cpu(), *map(torch.from_numpy, engine.token_nll(last))))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))

    @pytest.mark.parametrize("capture", [True, False])
    @pytest.mark.parametrize("context", ["recomputed", "cached"])
    def test_what_starts_from_a_is_the_base_model_to_the_bit_until_its_own_first_step(self, context, capture):
        """In bf16, of LoRAs on every matrix; a step that is captured reads what the slot starts with."""
        config = ttt_preset("thorough").override({"context": context, "phase_lr": 0.01, "adapt_from": 128})
        learned, alone = from_a_and_alone(on_gpu(), config, documents((1500, 700, 1200)), capture=capture)
        np.testing.assert_array_equal(learned[:128], alone[:128])
        assert (learned[128:] != alone[128:]).any() and np.isfinite(learned).all()

    @pytest.mark.parametrize("context", ["recomputed", "cached"])
    def test_memory_stays_within_the_estimate(self, context):
        config = ttt_preset().override({"context": context, "phases": 1, "batch": 8, "phase_chunks": 32})
        docs, model = documents([3000] * 20), on_gpu()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine = engine_of(model, config, docs)
        engine.learn(docs[:10])
        engine.adapt(docs[10:], Deadline(0))
        assert torch.cuda.max_memory_allocated() - before <= engine.facts["estimated_bytes"]
