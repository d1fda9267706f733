"""The engine: the eager oracle's numbers, whatever the batch; a schedule without gaps; no wait inside a step."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import SMALL, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.eager import Adam, adapt_batch
from klora.bench.tolerance import allowed_error, relative_error
from klora.model.artifact import load_artifact, save_artifact
from klora.model.config import ModelConfig, preset
from klora.model.gpt import GPT
from klora.model.loading import model_from_artifact
from klora.ttt.base import BaseNll
from klora.ttt.documents import Document
from klora.ttt.engine import Engine, engine_of
from klora.ttt.engine_memory import activation_bytes, largest_batch, numbers_kept, slot_bytes
from klora.ttt.protocols import TTTConfig
from klora.ttt.queue import Deadline
from klora.ttt.results import Adapted
from klora.ttt.run import Run
from klora.ttt.schedule import Queue, Schedule, queues_of
from klora.ttt.shapes import Shape
from klora.ttt.step import EngineStep, clear_plan
from oracles.eager import adapt as eager
from oracles.eager import token_nll as eager_token_nll
from test_ttt import document
from torch.utils._python_dispatch import TorchDispatchMode

STRICT = TTTConfig(layout="start", chunk=16, window=64, lora_rank=2, head_rank=3, temperature=0.9, batch=4)
TTT = TTTConfig(chunk=16, window=64, min_tokens=2, lora_rank=2, head_rank=3, epochs=2, deadline=0.0, batch=4)
RAGGED = (113, 1, 16, 17, 64, 65, 7, 96)
"""One target, exactly one chunk and one more, exactly one window and one more, and long ones, in no order."""


SHALLOW = dataclasses.replace(SMALL, blocks=4)


def model64(config: ModelConfig = SHALLOW) -> GPT:
    return randomized(config, torch.float64).requires_grad_(False)


SHALLOW64 = model64(dataclasses.replace(SMALL, blocks=2))


def documents(targets=RAGGED):
    return [document(n, seed) for seed, n in enumerate(targets)]


def adapt_documents(model: GPT, docs, config: TTTConfig, deadline, should_stop=lambda: False, facts=None, **options):
    engine = engine_of(model, config, docs, **options)
    adapted = engine.adapt(docs, deadline, should_stop)
    if facts is not None:
        facts |= engine.facts
    return adapted


def engine_for(model: GPT, docs, config: TTTConfig, **options) -> Engine:
    return Engine(model, config, sum(d.targets + 1 for d in docs), **options)


def token_nll(engine: Engine, docs, row: int = 0) -> list[np.ndarray]:
    """What the engine recorded for each document's targets, in the order of `docs`."""
    return engine.token_nll(docs, [row] * len(docs))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("protocol", ["score_first", "multi_epoch", "min_nll"])
def test_every_token_has_the_eager_oracles_nll_in_float64(protocol, steps):
    config = TTT.override({"protocol": protocol, "steps_per_chunk": steps, "lr": 0.02})
    model, docs = model64() if steps == 1 else SHALLOW64, documents()
    engine = engine_for(model, docs, config, rows=(2,), slots=5)
    adapted, expected = engine.adapt(docs, Deadline(0)), eager(model, docs, config)
    assert adapted.targets.tolist() == list(RAGGED) == expected.targets.tolist()
    assert adapted.kept_pass.tolist() == expected.kept_pass.tolist()
    np.testing.assert_allclose(adapted.nats, expected.nats, rtol=1e-9)
    for index in (0, 2, 5, 6):
        doc = docs[index]
        passes = eager_token_nll(model, doc, config)
        rows = range(config.passes) if protocol == "min_nll" else [0]
        for row in rows:
            found = token_nll(engine, docs, row)[index]
            np.testing.assert_allclose(found, passes[row] if protocol == "min_nll" else passes[-1], rtol=1e-9)


TARGETS = {
    "o": {"o_rank": 4, "o_alpha": 8.0},
    "up,down": {"up_rank": 3, "down_lr": 2.0},
    "q,o,head": {"weight_decay": 1.0},
    "k, v": {"k_rank": 1, "v_alpha": 1.0},
    "q,k,v,o,up,down,head": {"q_rank": 1, "k_rank": 3, "beta1": 0.0, "a_scale": 2.0},
}
"""Sets of targets, and other things that a set may be asked for with."""


@pytest.mark.slow
@pytest.mark.parametrize("targets", TARGETS)
def test_any_set_of_targets_agrees_with_the_eager_scorer_after_1_8_and_48_steps(targets):
    """Chunk after chunk: the NLL of chunk n is that after n steps."""
    config = TTT.override({"targets": targets, "chunk": 8, "window": 16, **TARGETS[targets]})
    model, docs = model64(dataclasses.replace(SMALL, blocks=2)), documents((49 * 8 + 5, 17))
    engine = engine_for(model, docs, config, slots=2)
    engine.adapt(docs, Deadline(0))
    found, expected = token_nll(engine, docs)[0], eager_token_nll(model, docs[0], config)[0]
    for steps in (1, 8, 48):
        chunk = slice(8 * steps, 8 * (steps + 1))
        np.testing.assert_allclose(found[chunk], expected[chunk], rtol=1e-8)
    base = eager_token_nll(model, docs[0], config.override({"lr": 0.0}))[0]
    assert not np.allclose(found[8:16], base[8:16], rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("chunk, window", [(16, 100), (20, 50), (32, 32)])
def test_any_depth_and_any_window_agree_with_the_eager_oracle(blocks, chunk, window):
    """Windows past the training length and no multiple of the chunk; U-Nets of no, one and several skips."""
    config = TTT.override({"chunk": chunk, "window": window})
    model, docs = model64(dataclasses.replace(SMALL, blocks=blocks)), documents((130, 101, 33, 100))
    adapted = adapt_documents(model, docs, config, Deadline(0))
    np.testing.assert_allclose(adapted.nats, eager(model, docs, config).nats, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("adapt_from", [0, 17, 97])
@pytest.mark.parametrize("chunk, window", [(16, 64), (20, 50), (32, 32)])
def test_windows_from_the_start_agree_with_the_eager_oracle(adapt_from, chunk, window):
    """The temperature changes in a queue of its own, before and after windows have their full length."""
    changes = {"steps_per_chunk": 2, "lr_warmup": 70, "lr_half": 60, "beta1": 0.0}
    config = STRICT.override({"chunk": chunk, "window": window, "adapt_from": adapt_from} | changes)
    model, docs = SHALLOW64, documents((130, 101, 33, 100, 5))
    adapted = adapt_documents(model, docs, config, Deadline(0), slots=3)
    np.testing.assert_allclose(adapted.nats, eager(model, docs, config).nats, rtol=1e-9)


@st.composite
def strict_configs(draw):
    """One pass that scores first, its windows from the start, in small numbers; whatever else may be chosen."""
    chunk = draw(st.integers(3, 20))
    targets = draw(st.sampled_from(["q,k,v,head", "v", "q,o", "k,up,down", "q,k,v,o,up,down,head"]))
    alpha = draw(st.sampled_from([0.0, 3.0]))
    return STRICT.override(
        {
            "chunk": chunk,
            "window": chunk + draw(st.integers(0, 30)),
            "adapt_from": draw(st.integers(0, 40)),
            "steps_per_chunk": draw(st.integers(1, 2)),
            "targets": targets,
            **{f"{target}_alpha": alpha for target in targets.split(",")},
            **{f"{target}_rank": 1 for target in targets.split(",") if target in draw(st.sampled_from(["vo", "ku"]))},
            "a_scale": draw(st.sampled_from([1.0, 2.0])),
            "lr_warmup": draw(st.sampled_from([0, 40])),
            "lr_half": draw(st.sampled_from([0, 30])),
            "beta1": draw(st.sampled_from([0.0, 0.9])),
            "weight_decay": draw(st.sampled_from([0.0, 1.0])),
            "temperature": draw(st.sampled_from([0.9, 1.0])),
            "lr": 0.05,
            "batch": 2,
        }
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(strict_configs(), st.integers(1, 49), st.randoms())
def test_no_score_depends_on_later_text(config, reached, random):
    """Other text after any target, and no text after it: the same bits before, wherever that is in a chunk."""
    model, doc = SHALLOW64, document(50)
    other = doc.tokens.copy()
    other[reached + 1 :] = [random.randrange(1, SMALL.vocab_size) for _ in other[reached + 1 :]]
    scores = []
    for tokens in (doc.tokens, other, doc.tokens[: reached + 1]):
        some = Document("", tokens, 1)
        engine = engine_for(model, [some], config)
        engine.adapt([some], Deadline(0))
        scores.append(token_nll(engine, [some])[0][:reached])
    np.testing.assert_array_equal(scores[1], scores[0])
    np.testing.assert_array_equal(scores[2], scores[0])


@pytest.mark.parametrize("adapt_from", [0, 40])
def test_what_is_too_short_to_learn_from_has_the_same_numbers_from_the_base_pass(adapt_from):
    """Base pass and engine differ by rounding alone where no step was taken; and there is no jump at any length."""
    config = STRICT.override({"adapt_from": adapt_from, "lr": 0.05})
    assert config.first_adapted == (16 if adapt_from == 0 else 48)
    model, whole = model64(), document(100, 7)
    for targets in (1, 15, 16, 17, 47, 48, 49):
        doc = Document("", whole.tokens[: targets + 1], 1)
        base = BaseNll(model, [doc], config)
        assert base.is_short[0] == (targets <= config.first_adapted)
        engine = engine_for(model, [doc], config)
        engine.adapt([doc], Deadline(0))
        early = min(targets, config.first_adapted)
        nll = token_nll(engine, [doc])[0]
        np.testing.assert_allclose(base.tempered[1:][:early], nll[:early], rtol=2e-6)
        assert (base.tempered == base.nll)[1:].tolist() == [n < config.first_adapted for n in range(targets)]


def test_base_and_adapted_model_read_the_same_windows():
    config = STRICT.override({"lr": 0.0, "window": 50, "adapt_from": 20})
    model, docs = model64(), documents((130, 101, 33, 100, 5, 0))
    base = BaseNll(model, docs, config)
    adapted = adapt_documents(model, docs[:-1], config, Deadline(0))
    np.testing.assert_allclose(adapted.nats, [base.of(index)[1] for index in range(5)], rtol=1e-6)


def test_fp32_agrees_with_the_eager_oracle():
    model, docs = randomized().requires_grad_(False), documents()
    adapted = adapt_documents(model, docs, TTT, Deadline(0))
    np.testing.assert_allclose(adapted.nats, eager(model, docs, TTT).nats, rtol=1e-4)


def test_a_model_of_six_bits_gives_what_its_dense_twin_gives(tokenizer, tmp_path):
    config = dataclasses.replace(SHALLOW, vocab_size=tokenizer.vocab_size)
    path = tmp_path / "model.klora"
    save_artifact(path, randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    loaded, docs = load_artifact(path), documents((65, 20))
    dense, packed = (
        adapt_documents(model_from_artifact(loaded, torch.device("cpu"), weights), docs, TTT, Deadline(0)).nats
        for weights in ("dense", "int6")
    )
    np.testing.assert_allclose(packed, dense, rtol=1e-6)


@pytest.mark.slow
def test_a_document_does_not_know_its_batch():
    """Batch mates, order, slots, batch and number of places change nothing but the order of sums inside a product."""
    config = TTT.override({"protocol": "min_nll"})
    model, docs = SHALLOW64, documents()
    whole = adapt_documents(model, docs, config, Deadline(0)).nats
    np.testing.assert_allclose(adapt_documents(model, docs[::-1], config, Deadline(0)).nats[::-1], whole, rtol=1e-12)
    for batch, rows, slots in ((1, (), 1), (3, (1,), 3), (64, (16, 4), 256), (4, (), 2), (8, (1, 2, 3, 4, 5), 9)):
        again = adapt_documents(model, docs, config.override({"batch": batch}), Deadline(0), rows=rows, slots=slots)
        np.testing.assert_allclose(again.nats, whole, rtol=1e-12)
    alone = [adapt_documents(model, [doc], config, Deadline(0)).nats[0] for doc in docs]
    np.testing.assert_allclose(alone, whole, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["score_first", "multi_epoch", "min_nll"])
@pytest.mark.parametrize("every", [0.0, 60.0])
def test_documents_that_are_through_are_handed_over_once_with_what_they_have_in_the_end(protocol, every):
    model, docs, handed = model64(), documents(), {}

    def finished(positions, some: Adapted) -> None:
        assert not handed.keys() & set(positions.tolist())
        handed.update(zip(positions.tolist(), zip(some.nats, some.targets, some.kept_pass, strict=True), strict=True))
        times.append(len(positions))

    times: list[int] = []
    config = TTT.override({"protocol": protocol})
    engine = engine_for(model, docs, config, rows=(2,), slots=3)
    adapted = engine.adapt(docs, Deadline(0), finished=finished, every=every)
    assert [handed[n] for n in range(len(docs))] == list(
        zip(adapted.nats, adapted.targets, adapted.kept_pass, strict=True)
    )
    assert (len(times) > 1) == (every == 0.0)
    sums = [nll.sum() for nll in engine.token_nll(docs, adapted.kept_pass)]
    np.testing.assert_allclose(sums, adapted.nats, rtol=1e-12)


@pytest.mark.slow
def test_an_engine_is_used_again_without_a_trace_of_the_run_before():
    model, docs = model64(), documents()
    engine = engine_for(model, docs, TTT)
    first = engine.adapt(docs, Deadline(0))
    engine.adapt(documents((100, 30))[::-1], Deadline(0))
    again = engine.adapt(docs, Deadline(0))
    assert again.nats.tolist() == first.nats.tolist()
    with pytest.raises(ValueError, match=r"the documents have 1000 tokens; this engine holds \d+"):
        engine.adapt([document(999)], Deadline(0))


def test_facts_say_what_was_chosen_and_how_full_the_places_were():
    facts = {}
    docs = documents()
    adapt_documents(model64(), docs, TTT, Deadline(0), facts=facts, slots=6)
    assert facts["batch"] == 4 and facts["slots"] == 6 and facts["rows"] == [4] and facts["captured"] is False
    assert facts["estimated_bytes"] > 6 * slot_bytes(model64(), TTT)
    assert 0 < facts["useful_places"] <= 1 and facts["rounds"] >= 8


def test_no_documents_are_no_rounds():
    adapted = adapt_documents(model64(), [], TTT, Deadline(0))
    assert len(adapted.nats) == len(adapted.targets) == len(adapted.kept_pass) == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="capture is True, on cpu with backend None; graphs want CUDA kernels"):
        Engine(model64(), TTT, 100, capture=True)
    with pytest.raises(ValueError, match="slots is 0; allowed: at least 1"):
        Engine(model64(), TTT, 100, slots=0)
    with pytest.raises(ValueError, match="tokens is 1; allowed: 2 to"):
        Engine(model64(), TTT, 1)


def test_the_estimate_grows_with_what_is_kept():
    model = model64()
    sets = ["q", "q,o", "q,o,up", "q,o,up,down", "q,o,up,down,head"]
    for fewer, more in itertools.pairwise(TTT.override({"targets": targets}) for targets in sets):
        assert activation_bytes(model, more, 4) > activation_bytes(model, fewer, 4)
        assert slot_bytes(model, more) > slot_bytes(model, fewer)
    assert activation_bytes(model, TTT, 8) == pytest.approx(2 * activation_bytes(model, TTT, 4), abs=2)
    assert activation_bytes(model, TTT.override({"window": 128}), 4) > activation_bytes(model, TTT, 4)


def test_the_batch_is_halved_until_it_fits():
    assert largest_batch(64, lambda batch: 100 * batch, 10_000) == 64
    assert largest_batch(64, lambda batch: 100 * batch, 7_000) == 32
    with pytest.raises(MemoryError, match="takes about 100 MiB and 99 MiB are free"):
        largest_batch(64, lambda batch: batch * 100 << 20, 99 << 20)


# ---- deadline ----


class AfterRounds(Deadline):
    """Passes after `rounds` rounds, each of which tells its `progress`."""

    def __init__(self, rounds: int):
        self.rounds, self.reached = rounds, []

    def passed(self) -> bool:
        return len(self.reached) >= self.rounds


def test_no_step_is_made_once_the_deadline_has_passed(monkeypatch):
    class After(Deadline):
        def passed(self) -> bool:
            return len(made) >= most

    docs, make, made = documents(), Engine._made, []
    monkeypatch.setattr(Engine, "_made", lambda engine, shape: made.append(shape) or make(engine, shape))
    for most in (0, 3):
        made.clear()
        adapted = adapt_documents(model64(), docs, TTT, After(0), facts=(facts := {}))
        assert not adapted.targets.any() and len(made) == facts["steps"] == most


def test_the_deadline_stops_between_rounds_and_counts_what_was_scored():
    model, docs = model64(), documents()
    full = engine_for(model, docs, TTT, slots=5)
    full.adapt(docs, Deadline(0))
    whole = token_nll(full, docs)
    seen = []
    for rounds in range(0, full.facts["rounds"] + 1, 4):
        engine = engine_for(model, docs, TTT, slots=5)
        deadline = AfterRounds(rounds)
        passed = deadline.reached
        adapted = engine.adapt(docs, deadline, progress=passed.append)
        assert engine.facts["rounds"] == rounds == len(passed)
        assert adapted.targets.sum() == (passed[-1] if passed else 0)
        seen.append(int(adapted.targets.sum()))
        for reached, doc, nll, nats in zip(adapted.targets, docs, whole, adapted.nats, strict=True):
            assert reached == doc.targets or reached % TTT.chunk == 0
            assert nats == pytest.approx(nll[:reached].sum(), rel=1e-12, abs=1e-12)
    assert seen == sorted(seen) and seen[0] == 0
    stops = iter([False, False, True])
    stopped = adapt_documents(model, docs, TTT, Deadline(0), lambda: next(stops))
    assert 0 < stopped.targets.sum() < sum(RAGGED)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["multi_epoch", "min_nll"])
def test_leaky_documents_count_only_when_their_last_pass_has_ended(protocol):
    config = TTT.override({"protocol": protocol})
    model, docs = model64(), documents()
    whole = adapt_documents(model, docs, config, Deadline(0))
    counted = []
    for rounds in (0, 5, 13, 10**6):
        deadline = AfterRounds(rounds)
        adapted = engine_of(model, config, docs).adapt(docs, deadline, progress=deadline.reached.append)
        done = adapted.targets > 0
        assert adapted.targets[done].tolist() == whole.targets[done].tolist()
        np.testing.assert_allclose(adapted.nats[done], whole.nats[done], rtol=1e-12)
        counted.append(int(done.sum()))
    assert counted[0] == 0 and counted == sorted(counted) and counted[-1] == len(docs) and 0 < counted[2] < len(docs)


# ---- the step ----


class NoWait(TorchDispatchMode):
    """Fails where a value would be brought from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket._qualified_op_name not in (
            "aten::_local_scalar_dense",
            "aten::is_nonzero",
            "aten::equal",
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["score_first", "min_nll"])
def test_a_round_brings_nothing_to_the_host(protocol):
    config = TTT.override({"protocol": protocol, "steps_per_chunk": 2})
    docs = documents()
    engine = engine_for(model64(), docs, config, slots=5)
    run = Run(sorted(docs, key=lambda d: -d.targets), config)
    rounds = list(Schedule(run.chunks, config.passes, 5, engine.queues, engine.rows))
    engine.prepare()
    engine._load(run, sorted(docs, key=lambda d: -d.targets))
    with NoWait():
        for number, taken in enumerate(rounds[:12]):
            engine._launch(number, taken, run)
    with pytest.raises(AssertionError), NoWait():
        engine.record.sum().item()


class Ops(TorchDispatchMode):
    """Counts the project's own ops."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "klora":
            self.seen[func._opname] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_is_shapes_alone_and_runs_the_kernels_once_where_they_are_needed():
    """The `seed` preset in bf16 without memory: nothing in a step asks for a value, or fits its ops badly together."""
    with torch.device("meta"):
        model = GPT(preset("seed").model).requires_grad_(False)
    model.compute_dtype = torch.bfloat16
    engine = Engine(model, TTTConfig(batch=4), 5000, rows=(), capture=False, backend="triton")
    engine.prepare()
    with Ops() as ops:
        engine._steps[3, 4, True]()
    seen = ops.seen
    assert seen == {
        "bigram_embedding": 1,
        "residual_norm": 2,  # before the first block and behind the last
        "lora_attention": 10,
        "residual_mlp_norm": 9,
        "residual_mlp": 1,
        "lora_head_nll_grads_": 1,
        "residual_norm_backward_": 10,  # none below block 0
        "lora_backward_": 10,
        "lora_attention_backward_": 10,
        "residual_mlp_backward_": 10,
        "lora_adam_": 1,
    }
    all_seven = {"targets": "q,k,v,o,up,down,head", "lora_rank": 64, "head_rank": 80}
    engine = Engine(model, TTTConfig(batch=4).override(all_seven), 5000, rows=(), capture=False, backend="triton")
    engine.prepare()
    with Ops() as ops:
        engine._steps[3, 4, True]()
    apart = {"residual_mlp": ["residual_norm", "lora_linear", "lora_mlp"]}
    apart["residual_mlp_norm"] = [*apart["residual_mlp"], "residual_norm"]
    apart["residual_mlp_backward_"] = ["residual_norm_backward_", *3 * ["lora_backward_"]]
    expected = Counter()
    for name, count in seen.items():
        for part in apart.get(name, [name]):
            expected[part] += count
    assert ops.seen == expected
    engine = Engine(model, TTTConfig(batch=4, targets="o"), 5000, rows=(), capture=False, backend="triton")
    engine.prepare()
    with Ops() as ops:
        engine._steps[3, 4, True]()
    none = "lora_attention", "lora_qkv", "lora_attention_backward_", "lora_mlp"
    assert ops.seen["qkv_attention"] == 10 and not any(ops.seen[name] for name in none)
    assert ops.seen["lora_linear"] == ops.seen["lora_backward_"] == 10
    assert ops.seen["lora_head_nll_grads_"] == 1


def test_a_step_that_only_scores_runs_no_backward():
    with torch.device("meta"):
        model = GPT(preset("seed").model).requires_grad_(False)
    model.compute_dtype = torch.bfloat16
    engine = Engine(model, TTTConfig(batch=4), 5000, rows=(), capture=False, backend="triton")
    engine.prepare([Shape(0, 4, False)])
    with Ops() as ops:
        engine._steps[0, 4, False]()
    assert ops.seen == {
        "bigram_embedding": 1,
        "residual_norm": 2,  # before the first block and behind the last
        "lora_attention": 10,
        "residual_mlp_norm": 9,
        "residual_mlp": 1,
        "head_nll": 1,
    }


def test_steps_over_empty_places_leave_no_trace():
    """What a capture runs: every shape, over a pool, a record and counters that hold something."""
    docs = documents()
    engine = engine_for(model64(), docs, TTT, rows=(1, 2), slots=3)
    engine.adapt(docs, Deadline(0))
    pool, cells = engine.pool, len(engine.tokens)
    state = [pool.params, pool.exp_avg, pool.exp_avg_sq, pool.step, engine.record[:cells], engine.tokens]
    before = [tensor.clone() for tensor in state]
    engine.prepare()
    clear_plan(engine.plan)
    for step in engine._steps.values():
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert len(engine._steps) == 4 * 3 * 2


# ---- the schedule ----

QUEUES = [Queue(0, 256, 1.0), Queue(1, 512, 1.0)]


@st.composite
def laws(draw):
    chunks = sorted(draw(st.lists(st.integers(1, 40), min_size=1, max_size=60)), reverse=True)
    rows = draw(st.lists(st.integers(1, 16), min_size=1, max_size=4))
    return chunks, draw(st.integers(1, 4)), draw(st.integers(1, 40)), rows


@settings(max_examples=60, deadline=None)
@given(laws(), st.sets(st.integers(1, 45), max_size=4), st.integers(0, 41))
def test_a_schedule_takes_every_chunk_once_in_order_and_frees_every_slot(law, later, trained_from):
    chunks, passes, slots, rows = law
    firsts = sorted({0, *later})
    queues = [Queue(first, 256 * (q + 1), 1.0) for q, first in enumerate(firsts)]
    schedule = Schedule(chunks, passes, slots, queues, rows, trained_from)
    seen = {document: [] for document in range(len(chunks))}
    holder, first_seen = {}, []
    for taken in schedule:
        assert len(set(taken.document)) == len(taken.document) == len(set(taken.slot)) <= taken.rows in rows
        assert (taken.chunk >= firsts[taken.queue]).all() and len(taken.document)
        assert (taken.chunk < [*firsts, math.inf][taken.queue + 1]).all()
        for d, s, j, p, trains in zip(taken.document, taken.slot, taken.chunk, taken.number, taken.trains, strict=True):
            if not seen[d]:
                holder[d] = s
                first_seen.append(d)
            assert holder[d] == s
            seen[d].append((p, j))
            assert trains == (trained_from <= j < chunks[d] - 1)
        active = [d for d in first_seen if len(seen[d]) < passes * chunks[d]]
        assert len({holder[d] for d in active}) == len(active) <= slots
    for d, count in enumerate(chunks):
        assert seen[d] == [(p, j) for p in range(passes) for j in range(count)]
    assert (schedule._document == -1).all() and not schedule._held.any()


def test_documents_get_slots_longest_first():
    taken = list(Schedule([9, 7, 5, 3, 2, 1], 1, 2, QUEUES, [2]))
    starts = [d for r in taken for d in r.document[r.starts]]
    assert starts == sorted(starts)
    with pytest.raises(ValueError, match="longest first"):
        Schedule([3, 5], 1, 2, QUEUES, [2])
    with pytest.raises(ValueError, match="without targets"):
        Schedule([3, 0], 1, 2, QUEUES, [2])


@pytest.mark.parametrize("every, passes, most", [(16, 6, 1.25), (16, 1, 1.5), (1, 1, 1.03)])
def test_a_real_law_keeps_the_places_full_and_its_longest_document_bounds_the_run(every, passes, most):
    """lognormal(6.555, 1.066) tokens, clipped to [8, 60000]; 6,250 documents or every 16th of them."""
    drawn = np.random.default_rng(0).lognormal(6.555, 1.066, 6250).astype(np.int64).clip(8, 60000)[::every]
    config = TTTConfig()
    queues = queues_of(config)
    run = Run([Document("", np.empty(n, np.uint16), 0) for n in sorted(drawn[drawn >= 512])[::-1]], config)
    rounds = list(Schedule(run.chunks, passes, 256, queues, [64, 16, 4]))
    for taken in rounds:
        run.count(taken, queues[taken.queue].length)
    assert len(rounds) <= most * max(passes * run.chunks[0], -(-passes * run.chunks.sum() // 64))
    assert run.inputs >= 0.985 * run.places


def test_queues_are_the_window_lengths():
    def lengths(config: TTTConfig) -> list[int]:
        queues = queues_of(config)
        assert [queue.first for queue in queues] == list(range(len(queues)))
        return [queue.length for queue in queues]

    assert lengths(TTTConfig()) == [256, 512, 768, 1024]
    assert lengths(TTT.override({"window": 50})) == [16, 32, 48, 50]
    assert lengths(TTT.override({"window": 16})) == [16]


# ---- the kernels ----


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs the kernels where there is no GPU")
@pytest.mark.parametrize("targets", ["q,k,v,head", "o", "q,k,v,o,up,down,head"])
def test_the_kernels_in_the_interpreter_agree_with_the_reference(targets):
    """Gradients written straight into the pool, slots of -1, mixed batches: in fp32, over a tiny model."""
    shape = dataclasses.replace(SMALL, blocks=2, heads=2, kv_heads=1)
    ranks = {"k_rank": 1} if "k" in targets else {}
    config = TTT.override({"chunk": 16, "window": 32, "batch": 3, "targets": targets} | ranks)
    model = randomized(shape).requires_grad_(False)
    docs = documents((37, 20))
    exact = adapt_documents(model, docs, config, Deadline(0), backend="reference")
    kernels = adapt_documents(model, docs, config, Deadline(0), backend="triton")
    np.testing.assert_allclose(kernels.nats, exact.nats, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs the kernels where there is no GPU")
def test_the_backward_keeps_what_the_memory_estimate_says(monkeypatch):
    """At a head size of the kernels'; the last block keeps less, since most of it runs on a chunk alone."""
    shape = dataclasses.replace(SMALL, width=128, heads=2, kv_heads=1, mlp_hidden=384, blocks=2)
    config, steps = TTTConfig(chunk=32, window=64, batch=2, deadline=0.0, targets="q,k,v,o,up,down,head"), []
    hidden = EngineStep._hidden

    def watched(*arguments):
        kept = {}

        def keep(tensor):
            if tensor.dim() > 1 and tensor.size(0) == 2 and {32, 64} & set(tensor.shape[1:]):  # of places and inputs
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = hidden(*arguments)
        steps.append(sum(kept.values()))
        if len(steps) == 2:  # of whole windows: the largest
            raise InterruptedError
        return out

    monkeypatch.setattr(EngineStep, "_hidden", watched)
    docs = documents((65, 65))
    with pytest.raises(InterruptedError):
        adapt_documents(randomized(shape).requires_grad_(False), docs, config, Deadline(0), backend="triton")
    planned = 4 * config.batch * config.window * numbers_kept(shape, config)
    assert 0.8 * planned < max(steps) < planned


# ---- on a GPU ----

WIDE = ModelConfig(vocab_size=300, width=256, blocks=4, heads=4, kv_heads=2, mlp_hidden=512, bigram_width=16)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
LONG = (2500, 1800, 1024, 700, 512, 257, 256, 1)


def on_gpu(dtype=torch.bfloat16, device: str = "cuda") -> GPT:
    model = randomized(WIDE)
    model.configure(torch.device(device), dtype)
    return model.requires_grad_(False)


def recorded(model: GPT, docs, config: TTTConfig, **options) -> torch.Tensor:
    engine = engine_for(model, docs, config, **options)
    engine.adapt(docs, Deadline(0))
    return engine.record[: -config.chunk * engine.facts["batch"]].clone()


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("protocol, steps", [("score_first", 1), ("score_first", 2), ("min_nll", 1)])
    def test_graphs_give_the_bits_of_no_graphs_and_of_another_run(self, protocol, steps):
        config = TTTConfig(protocol=protocol, epochs=2, steps_per_chunk=steps, deadline=0.0, batch=8)
        model, docs = on_gpu(), documents(LONG)
        graphs = recorded(model, docs, config, rows=(2,))
        assert torch.equal(graphs, recorded(model, docs, config, rows=(2,)))
        assert torch.equal(graphs, recorded(model, docs, config, rows=(2,), capture=False))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    @pytest.mark.parametrize("capture", [True, False])
    def test_the_second_gpu_gives_the_bits_of_the_first_which_is_current(self, capture):
        config, docs = TTTConfig(deadline=0.0, batch=8), documents(LONG)
        first, second = (recorded(on_gpu(device=f"cuda:{n}"), docs, config, capture=capture) for n in (0, 1))
        assert torch.cuda.current_device() == 0 and torch.equal(first.cpu(), second.cpu())

    @pytest.mark.parametrize("targets", ["o", "up,down", "q,o,head", "q,k,v,o,up,down,head"])
    def test_graphs_of_any_targets_give_the_bits_of_no_graphs(self, targets):
        ranks = {"lora_rank": 64, "head_rank": 80} | ({"up_rank": 24} if "up" in targets else {})
        config = TTTConfig(deadline=0.0, batch=8, targets=targets, weight_decay=0.1, **ranks)
        model, docs = on_gpu(), documents(LONG)
        graphs = recorded(model, docs, config, rows=(2,))
        assert torch.equal(graphs, recorded(model, docs, config, rows=(2,)))
        assert torch.equal(graphs, recorded(model, docs, config, rows=(2,), capture=False))

    def test_captures_leave_no_trace(self):
        config = TTTConfig(deadline=0.0, batch=8)
        engine = engine_for(on_gpu(), documents(LONG), config, rows=(2,))
        state = [engine.pool.params, engine.pool.exp_avg, engine.pool.exp_avg_sq, engine.pool.step]
        before = [tensor.clone() for tensor in state]
        engine.prepare()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))

    @pytest.mark.parametrize("targets", ["q,k,v,head", "q,k,v,o,up,down,head"])
    @pytest.mark.parametrize("rank", [8, 80])
    def test_memory_stays_within_the_estimate(self, targets, rank):
        ranks = {"lora_rank": rank, "head_rank": rank}
        config, docs = TTTConfig(deadline=0.0, batch=16, targets=targets, **ranks), documents([3000] * 20)
        model = on_gpu()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine = engine_for(model, docs, config)
        engine.adapt(docs, Deadline(0))
        assert torch.cuda.max_memory_allocated() - before <= engine.facts["estimated_bytes"]

    @pytest.mark.parametrize("targets", ["q,k,v,head", "o", "up,down", "q,o,head", "q,k,v,o,up,down,head"])
    def test_bf16_is_as_close_to_fp32_as_eager_pytorch_in_bf16(self, targets):
        """Relative error of the nats of the chunks after 1, 8 and 48 Adam steps, against eager PyTorch in fp32.

        The targets of a document share its adapter's error, which grows from step to step: a document is one sample.
        """
        config = TTTConfig(deadline=0.0, batch=64, targets=targets)
        docs = [document(49 * 256 + 100, seed) for seed in range(64)]
        models = on_gpu(torch.float32), on_gpu()
        exact, plain = (torch.stack(adapt_batch(model, Adam(model, config, len(docs)), docs)).cpu() for model in models)
        engine = engine_for(on_gpu(), docs, config)
        engine.adapt(docs, Deadline(0))
        ours = torch.from_numpy(np.stack(token_nll(engine, docs)))
        for steps in (1, 8, 48):
            chunk = slice(steps * 256, (steps + 1) * 256)
            error, theirs = (relative_error(x[:, chunk], exact[:, chunk]) for x in (ours, plain))
            print(f"after {steps} steps: engine {error:.2e}, eager in bf16 {theirs:.2e}")
            assert error <= allowed_error(theirs, torch.float32, len(docs))

    def test_a_document_has_the_same_nll_in_five_batches(self):
        config, doc = TTTConfig(deadline=0.0, batch=16), document(1500, 3)
        found = []
        for mates in (0, 1, 3, 9, 15):
            docs = [doc, *(document(700 + 100 * i, i + 10) for i in range(mates))]
            engine = engine_for(on_gpu(), docs, config, rows=(4,))
            engine.adapt(docs, Deadline(0))
            found.append(token_nll(engine, docs)[0])
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])

    def test_a_base_pass_goes_on_from_what_is_kept(self):
        config, docs = TTTConfig(batch=8), documents(LONG)
        model = on_gpu()
        whole, kept = BaseNll(model, docs, config), []
        known = np.stack([whole.nll, whole.tempered])
        known[:, known.shape[1] // 2 :] = np.nan
        again = BaseNll(model, docs, config, known=known, keep=kept.append)
        found, is_known = np.stack([again.nll, again.tempered]), ~np.isnan(known)
        assert np.isfinite(found).all() and len(kept) == 1 and np.array_equal(kept[0], found)
        for index in range(len(docs)):
            assert again.of(index) == pytest.approx(whole.of(index), rel=1e-3)
        untouched = is_known.all(0)
        untouched[known.shape[1] // 2 - config.window :] = False  # a window that is partly known is computed whole
        assert np.array_equal(found[:, untouched], known[:, untouched])


def test_a_model_without_a_softcap_is_adapted_as_the_eager_oracle_does():
    model, docs = model64(dataclasses.replace(SHALLOW, softcap=0.0)), documents()
    adapted = adapt_documents(model, docs, TTT, Deadline(0))
    assert np.isfinite(adapted.nats).all()
    np.testing.assert_allclose(adapted.nats, eager(model, docs, TTT).nats, rtol=1e-9)
