"""Which shapes an engine makes steps for: no more than their rounds are worth, and the bits of those that it leaves."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.ttt.protocols import ttt_preset
from klora.ttt.queue import Deadline
from klora.ttt.schedule import Schedule, Waiting, queues_of
from klora.ttt.shapes import CAPTURE, Shape, Shapes
from test_cached_context import CACHED
from test_engine import LONG, TTT, documents, engine_for, model64, on_gpu, token_nll

LENGTHS = (256, 512, 768, 1024)
SHAPES = st.builds(Shape, st.integers(0, 3), st.sampled_from((4, 16, 64)), st.booleans())


def test_a_step_takes_narrower_rounds_and_those_without_training():
    wide = Shape(1, 64, True)
    assert all(wide.takes(Shape(1, rows, trains)) for rows in (4, 64) for trains in (False, True))
    assert not any(wide.takes(other) for other in (Shape(0, 64, True), Shape(1, 65, True)))
    assert not Shape(1, 64, False).takes(Shape(1, 4, True))


@given(st.dictionaries(SHAPES, st.integers(1, 200), min_size=1), st.sets(SHAPES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_made_is_worth_it_and_what_is_not_loses_no_more_than_a_step(rounds, there):
    shapes = Shapes(LENGTHS, CAPTURE)
    made = shapes.worth(rounds, there)
    assert len(made) == len(set(made)) and not there & set(made)
    for shape, count in rounds.items():
        lost = min(shapes.cost(one) for one in {*made, *there} if one.takes(shape)) - shapes.cost(shape)
        assert count * lost <= CAPTURE
        if shape in made:
            others = [one for one in {*made, *there} - {shape} if one.takes(shape)]
            assert not others or count * (min(map(shapes.cost, others)) - shapes.cost(shape)) > CAPTURE
    assert set(Shapes(LENGTHS, 0.0).worth(rounds)) == set(rounds)


@given(st.lists(SHAPES, min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_rounds_that_nobody_knew_of_lose_no_more_than_a_step_of_their_own_before_they_get_it(taken):
    shapes = Shapes(LENGTHS, CAPTURE)
    made = {Shape(queue, 64, True) for queue in range(4)}
    lost = Counter()
    for shape in taken:
        picked = shapes.pick(shape, made)
        assert picked.takes(shape)
        if picked in made:
            lost[shape] += shapes.cost(picked) - shapes.cost(shape)
        else:
            assert picked == shape
            made.add(picked)
    assert all(value <= CAPTURE for value in lost.values())


@pytest.mark.parametrize(("name", "all_of_them", "few"), [("quick", 13, 6), ("thorough", 40, 19)])
def test_documents_of_many_lengths_want_few_steps(name, all_of_them, few):
    """Most shapes are of one to five rounds, where a queue runs out."""
    config = ttt_preset(name)
    targets = np.sort(np.random.default_rng(0).lognormal(7.2, 0.9, 1800).astype(np.int64))[::-1] + config.min_tokens
    queues = queues_of(config)
    schedule = Schedule(-(-targets // config.chunk), 1, 256, queues, (4, 16, 64), config.trained_from)
    rounds = Counter(map(Shape.of, schedule))
    shapes = Shapes([queue.length for queue in queues], CAPTURE)
    made = shapes.worth(rounds)
    assert len(rounds) >= 0.7 * all_of_them and len(made) <= few
    whole = sum(count * shapes.cost(shape) for shape, count in rounds.items())
    taken = sum(count * min(shapes.cost(one) for one in made if one.takes(shape)) for shape, count in rounds.items())
    assert taken + CAPTURE * len(made) < whole + CAPTURE * len(rounds)
    assert taken < 1.03 * whole


@pytest.mark.parametrize("waits", [False, True], ids=["known rounds", "handed out"])
@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_rounds_in_larger_steps_have_the_bits_of_their_own(waits, context, one_thread):
    config = CACHED if context == "cached" else TTT
    docs, found = documents(), []
    for price in (0.0, float("inf")):
        engine = engine_for(model64(), docs, config, slots=8, rows=(1, 2))
        engine._shapes.price = price
        waiting = (lambda visits: Waiting(visits)) if waits else None
        adapted = engine.adapt(docs, Deadline(0), waiting=waiting)
        found.append((adapted, token_nll(engine, docs), engine.facts["steps"]))
    (own, own_nll, many), (larger, larger_nll, few) = found
    assert few < many
    np.testing.assert_array_equal(own.nats, larger.nats)
    for one, other in zip(own_nll, larger_nll, strict=True):
        np.testing.assert_array_equal(one, other)


class EverySecond(Waiting):
    """What one of two processes gets of documents that are handed out in turns."""

    sharers = 2

    def __init__(self, visits: np.ndarray):
        super().__init__(visits[::2])

    def take(self, *given: int) -> np.ndarray:
        return 2 * super().take(*given)


class Unforeseen(Waiting):
    """Documents of which nothing but the longest is expected."""

    sharers = 10**6


@pytest.mark.parametrize(("waiting", "late"), [(EverySecond, False), (Unforeseen, True)])
def test_steps_of_documents_that_are_handed_out_are_made_before_the_first_round(waiting, late):
    """As far as the documents are those that were to be expected; others are made when they lose their price."""
    docs = documents([*range(20, 140, 2)])
    engine = engine_for(model64(), docs, TTT, slots=8, rows=(1, 2, 4))
    engine._shapes.price = 200.0 if late else 2000.0
    made, at_first = [], []

    def step(shape: Shape, whole: bool = False):
        made.append(shape)
        return lambda: at_first.append(len(made))  # rounds of nothing: the host's part is looked at

    engine._made = step
    engine.adapt(docs, Deadline(0), waiting=waiting)
    assert len(set(made)) == len(made) == engine.facts["steps"] > 1
    assert (at_first[0] < len(made)) == late


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("price", [0.0, CAPTURE])
def test_steps_that_are_captured_between_rounds_change_no_bit(price):
    """Of all but the longest document's they are, while documents are under way; at no price those of few rounds, too.

    Without graphs, all are made.
    """
    config, docs, found = ttt_preset("quick").override({"batch": 8, "deadline": 0.0}), documents((*LONG, 600, 300)), []
    for capture in (True, False):
        engine = engine_for(on_gpu(), docs, config, rows=(2,), capture=capture)
        engine._shapes.price = price if capture else 0.0
        engine.adapt(docs, Deadline(0), waiting=Unforeseen)
        found.append((engine.record[: -config.chunk * 8].clone(), engine.facts["steps"]))
    (record, made), (own, every) = found
    assert torch.equal(record, own)
    assert made == every if price == 0.0 else made < every
