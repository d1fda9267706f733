"""What the record of the engine is made of: errors against eager PyTorch, and bits that are equal or not."""

import numpy as np
import pytest
import torch
from conftest import SMALL, randomized
from klora.bench import engine
from klora.kernels import BOS
from klora.ttt.protocols import TTTConfig

CONFIG = TTTConfig(chunk=16, window=64, min_tokens=2, lora_rank=2, head_rank=3, deadline=0.0, batch=4)


@pytest.fixture
def small(monkeypatch):
    """Steps, mates and documents of a size for a CPU."""
    drawn = engine.drawn
    monkeypatch.setattr(engine, "STEPS", (1, 3))
    monkeypatch.setattr(engine, "MATES", (0, 2))
    monkeypatch.setattr(engine, "drawn", lambda lengths: drawn([min(n, 90) for n in lengths][:5], SMALL.vocab_size))
    return randomized().requires_grad_(False)


def test_documents_are_the_same_every_time_and_start_with_bos():
    one, other = engine.drawn([30, 40]), engine.drawn([30, 40])
    assert [len(d.tokens) for d in one] == [30, 40] and all(d.tokens[0] == BOS and d.tokens[1:].min() > 2 for d in one)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


def test_errors_are_relative_to_the_exact_model_after_the_steps_that_are_named(small):
    found = engine.errors(small, small, CONFIG)
    assert set(found) == {"engine", "eager"} and set(found["engine"]) == {"1", "3"}
    assert found["eager"] == {"1": 0.0, "3": 0.0} and max(found["engine"].values()) < 1e-5
    other = randomized(seed=1).requires_grad_(False)
    assert min(engine.errors(small, other, CONFIG)["engine"].values()) > 0.01


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


def test_it_wants_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="PyTorch sees none here"):
        engine.check(tmp_path / "engine.json")
    assert not (tmp_path / "engine.json").exists()
