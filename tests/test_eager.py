"""The baseline `eager` of the benchmarks: the oracle's numbers, in batches."""

import dataclasses

import pytest
import torch
from conftest import SMALL, randomized
from klora.bench.eager import Adam, adapt_batch
from oracles.eager import token_nll
from test_ttt import TTT, document


@pytest.mark.slow
@pytest.mark.parametrize(
    "protocol, steps", [("score_first", 1), ("score_first", 3), ("multi_epoch", 2), ("min_nll", 1)]
)
def test_a_batch_has_the_oracles_nll_in_float64(protocol, steps):
    config = TTT.override({"protocol": protocol, "steps_per_chunk": steps, "min_tokens": 2})
    model = randomized(dataclasses.replace(SMALL, blocks=2), torch.float64).requires_grad_(False)
    adam = Adam(model, config, 6, torch.float64)
    documents = [document(n, n) for n in (150, 96, 64, 40, 33, 16)]
    passes = [token_nll(model, doc, config) for doc in documents]
    expected = [min(nll, key=sum) if protocol == "min_nll" else nll[-1] for nll in passes]
    for _ in range(2):  # the second time from the same start
        for found, nll in zip(adapt_batch(model, adam, documents), expected, strict=True):
            assert found.numpy() == pytest.approx(nll, rel=1e-6)


def test_documents_that_have_ended_take_no_more_adam_steps():
    model = randomized().requires_grad_(False)
    adam = Adam(model, TTT, 2)
    adapt_batch(model, adam, [document(100), document(40, 1)])
    assert adam.step.tolist() == [6, 2]  # 7 and 3 chunks; the last one is scored only


def test_a_batch_comes_longest_first():
    model = randomized().requires_grad_(False)
    with pytest.raises(ValueError, match="longest first"):
        adapt_batch(model, Adam(model, TTT, 2), [document(40), document(100)])
