"""What the record of the engine is made of: errors against eager PyTorch, and bits that are equal or not."""

import json

import numpy as np
import pytest
import torch
import typer
from conftest import SMALL, randomized
from klora.bench import engine
from klora.kernels import BOS_ID
from klora.ttt.protocols import CACHED, RECOMPUTED, START, TARGETS, TTTConfig

CONFIG = TTTConfig(chunk=16, window=64, min_tokens=2, lora_rank=2, head_rank=3, deadline=0.0, batch=4)


@pytest.fixture
def small(monkeypatch):
    """Steps, mates and documents of a size for a CPU."""
    drawn = engine.drawn
    monkeypatch.setattr(engine, "STEPS", (1, 3))
    monkeypatch.setattr(engine, "MATES", (0, 2))
    monkeypatch.setattr(
        engine, "drawn", lambda lengths, vocabulary=0: drawn([min(n, 90) for n in lengths][:5], SMALL.vocab_size)
    )
    return randomized().requires_grad_(False)


def test_documents_are_the_same_every_time_and_start_with_bos():
    one, other = engine.drawn([30, 40]), engine.drawn([30, 40])
    assert [len(d.tokens) for d in one] == [30, 40] and all(
        d.tokens[0] == BOS_ID and d.tokens[1:].min() > 2 for d in one
    )
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_errors_are_relative_to_the_exact_model_after_the_steps_that_are_named(small):
    found = engine.errors(small, small, CONFIG)
    assert set(found) == {"engine", "eager"} and set(found["engine"]) == {"1", "3"}
    assert found["eager"] == {"1": 0.0, "3": 0.0} and max(found["engine"].values()) < 1e-5
    other = randomized(seed=1).requires_grad_(False)
    assert min(engine.errors(small, other, CONFIG)["engine"].values()) > 0.01


CACHED_CONFIG = TTTConfig(
    layout=START, context=CACHED, chunk=16, window=64, targets=",".join(TARGETS), lora_rank=2, head_rank=3, batch=4
)


@pytest.mark.slow
def test_errors_of_cached_context_are_those_of_the_reference_ops(small):
    documents = engine.drawn([80, 80])
    exact = engine.plain_nll(small, documents, CACHED_CONFIG)
    recomputed = engine.plain_nll(small, documents, CACHED_CONFIG.override({"context": RECOMPUTED}))
    assert exact.shape == (2, 79) and not np.allclose(exact, recomputed, rtol=1e-4)
    found = engine.errors(small, small, CACHED_CONFIG)
    assert found["eager"] == {"1": 0.0, "3": 0.0} and max(found["engine"].values()) < 1e-5
    other = randomized(seed=1).requires_grad_(False)
    assert min(engine.errors(small, other, CACHED_CONFIG)["engine"].values()) > 0.01


def test_a_pace_is_of_the_faster_of_two_runs_with_the_same_bits(small, monkeypatch):
    found = engine.pace(small, CACHED_CONFIG, engine.drawn([80, 60]))
    assert found["tokens"] == 79 + 59 and found["bits"] == {"equal": True, "largest_difference": 0.0}
    assert found["tokens_per_second"] == pytest.approx(138 / min(found["seconds"])) and len(found["seconds"]) == 2
    assert found["config"]["context"] == CACHED and found["batch"] == 4
    runs, exact = iter((0.0, 1e-3)), engine.engine_nll
    monkeypatch.setattr(
        engine, "engine_nll", lambda *given: [nll + run for run in [next(runs)] for nll in exact(*given)]
    )
    assert not engine.pace(small, CACHED_CONFIG, engine.drawn([80]))["bits"]["equal"]


@pytest.mark.slow
def test_the_record_has_the_rows_that_were_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "TOY_LENGTHS", (300, 200))
    engine.check(tmp_path / "engine.json", "contest, cached-64,recomputed-256", toy=True, commit="abc")
    found = json.loads((tmp_path / "engine.json").read_text())
    assert list(found["rows"]) == ["recomputed-256", "cached-64", "contest"] and found["environment"]["commit"] == "abc"
    contest = found["rows"]["contest"]
    assert (contest["config"]["window"], contest["config"]["chunk"], contest["config"]["up_rank"]) == (2048, 48, 0)
    assert set(contest["errors"]["engine"]) == {"1", "2"} and contest["tokens"] == 498
    assert capsys.readouterr().out.count("bits equal, errors after 1, 2 steps") == 3
    with pytest.raises(typer.BadParameter, match="there is no row 'cached-8'; allowed: recomputed-256, cached-256"):
        engine.check(tmp_path / "none.json", "cached-8", toy=True)
    assert [c.chunk for n, c in engine.PACES.items() if n.startswith("cached")] == [256, 128, 64, 32]


@pytest.mark.slow
def test_bits_say_what_differs_and_by_how_much(small, monkeypatch):
    found = engine.bits(small, CONFIG)
    assert found["another run"] == found["without graphs"] == {"equal": True, "largest_difference": 0.0}
    assert all(one["largest_difference"] < 1e-6 for one in found["batch mates"].values())
    runs = iter(range(100))
    exact = engine.engine_nll
    monkeypatch.setattr(engine, "engine_nll", lambda *given: [nll + 1e-3 * next(runs) for nll in exact(*given)])
    moved = engine.bits(small, CONFIG)["another run"]
    assert not moved["equal"] and moved["largest_difference"] > 1e-5


def test_what_runs_side_by_side_is_covered_once():
    assert engine.covered_by([(5.0, 7.0), (0.0, 3.0), (1.0, 2.0), (2.0, 4.0)]) == (8.0, 6.0)


def test_it_wants_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch sees none here"):
        engine.check(tmp_path / "engine.json")
    assert not (tmp_path / "engine.json").exists()
