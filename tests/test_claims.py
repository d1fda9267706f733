"""Which documents each rank claims: all of them once, the longest dealt out, rounds that stay full, ends that agree."""

from collections import Counter

import numpy as np
import pytest
import torch.distributed as dist
from klora.ttt.claims import SharedWaiting, dealt
from klora.ttt.engine import ROWS, slots_a_place
from klora.ttt.protocols import ttt_preset
from klora.ttt.queue import StoreQueue
from klora.ttt.schedule import OVERHEAD, Schedule, queues_of, visits_of
from klora.ttt.shapes import CAPTURE, LOOKED_AT, Shape, Shapes, expected_rounds


def test_ranks_get_every_document_once_longest_first_and_none_holds_more_than_its_share():
    store = dist.HashStore()
    chunks = np.sort(np.random.default_rng(0).integers(1, 60, 300))[::-1]
    visits = visits_of(chunks, 2, range(4))
    taken: list[list[int]] = [[] for _ in range(4)]
    waiting = [SharedWaiting(visits, StoreQueue(store, rank, 4), taken[rank].extend) for rank in range(4)]
    busy_until = [0.0] * 4
    for rank in range(4):
        places = waiting[rank].take(256, 0)
        busy_until[rank] = int(visits[places].sum())
        assert busy_until[rank] - visits[places[-1]].sum() <= visits.sum() / 4
    while min(busy_until) < float("inf"):
        rank = int(np.argmin(busy_until))  # it has worked off what it had
        busy_until[rank] += int(visits[waiting[rank].take(8, 0)].sum()) or float("inf")
    assert sorted(place for places in taken for place in places) == list(range(300))
    assert all(places == sorted(places) for places in taken)
    totals = [visits[places].sum() for places in taken]
    assert max(totals) < 1.25 * min(totals)


def test_the_longest_documents_are_dealt_out_and_the_rest_comes_longest_first():
    work = [int(n) for n in np.sort(np.random.default_rng(0).lognormal(7.0, 1.0, 500))[::-1]]
    for world in (1, 2, 4, 8):
        order, share = dealt(work, world), sum(work) / (world + 1)
        assert sorted(order) == list(range(500))
        piles = np.flatnonzero(np.diff(order) < 0)  # each begins with a longer one than the last of the one before
        assert len(piles) == world - 1 if world < 8 else len(piles) <= world
        assert sorted([order[0], *(order[place + 1] for place in piles)])[:world] == list(range(world))
        sums = [sum(work[place] for place in pile) for pile in np.split(order, piles + 1)]
        assert max(sums[:-1] or [0]) <= share + work[0]
    assert dealt([], 3) == [] and dealt([5], 2) == [0]


QUICK = ttt_preset()
QUEUES, SLOTS = queues_of(QUICK), slots_a_place(QUICK) * QUICK.batch
WIDTHS = sorted({*(row for row in ROWS if row < QUICK.batch), QUICK.batch})


def rounds_of(chunks, waiting=None) -> Schedule:
    return Schedule(chunks, QUICK.passes, SLOTS, QUEUES, WIDTHS, QUICK.trained_from, waiting)


def costs_of_ranks(world, targets):
    """What each rank's rounds cost by the schedule's own rule, by which they take turns, and their shapes.

    One rank shares with nobody.
    """
    chunks = -(-targets // QUICK.chunk)
    visits = visits_of(chunks, QUICK.passes, [queue.first for queue in QUEUES])
    order, store, taken, ranks = dealt(targets.tolist(), world), dist.HashStore(), [[] for _ in range(world)], []
    for rank in range(world):
        shared = SharedWaiting(visits, StoreQueue(store, rank, world), taken[rank].extend, order=order)
        ranks.append(iter(rounds_of(chunks, shared if world > 1 else None)))
    seconds, shapes, at_work = np.zeros(world), [[] for _ in range(world)], set(range(world))
    while at_work:
        rank = min(at_work, key=lambda rank: seconds[rank])
        if (step := next(ranks[rank], None)) is None:
            at_work.remove(rank)
        else:
            seconds[rank] += OVERHEAD + step.rows * QUEUES[step.queue].length
            shapes[rank].append(Shape.of(step))
    assert world == 1 or sorted(place for places in taken for place in places) == list(range(len(targets)))
    return seconds, shapes


def lognormal(count):
    """Targets of so many documents, longest first."""
    return np.sort(np.random.default_rng(0).lognormal(7.0, 1.0, count).astype(np.int64))[::-1] + 1


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_with_uneven_documents_end_at_about_the_same_time(world):
    """Within 5% of the mean: 2,000 documents of a lognormal law, in rounds that cost what the schedule takes them to.

    Longest first, without piles, the rank that came first ended a third after the mean of eight.
    """
    seconds, _ = costs_of_ranks(world, lognormal(2000))
    assert seconds.max() <= 1.05 * seconds.mean()


def test_two_ranks_take_half_of_what_one_takes():
    """Within 0.2%: ranks that held their share and no more had narrow rounds at the end, and took 0.3% longer."""
    (alone, _), (together, _) = (costs_of_ranks(world, lognormal(4000)) for world in (1, 2))
    assert together.max() <= 1.002 / 2 * alone.max()


def price_of_steps(taken, at_first):
    """Tokens that making steps costs, those of `at_first` and later ones, and what rounds lose in larger ones."""
    shapes, made = Shapes([queue.length for queue in QUEUES], CAPTURE), set(at_first)
    lost = 0.0
    for shape in taken:
        made.add(picked := shapes.pick(shape, made))
        lost += shapes.cost(picked) - shapes.cost(shape)
    return CAPTURE * len(made) + lost


@pytest.mark.parametrize(("world", "count"), [(2, 4000), (4, 8000), (2, 12500)])
def test_ranks_know_before_their_first_round_which_steps_they_want(world, count):
    """As if each knew its own rounds, to the price of a step a rank.

    With the widest of each queue at first, and the others once they had lost their price, it was that of two to four:
    0.2 s and more of each rank, however many documents there were.
    """
    targets = lognormal(count)
    expected = expected_rounds(-(-targets // QUICK.chunk), world, rounds_of)
    shapes = Shapes([queue.length for queue in QUEUES], CAPTURE)
    own = ours = 0.0
    for taken in costs_of_ranks(world, targets)[1]:
        assert sum(expected.values()) == pytest.approx(len(taken), rel=0.1)
        own += price_of_steps(taken, shapes.worth(Counter(taken)))
        ours += price_of_steps(taken, shapes.worth(expected))
    assert ours <= own + world * CAPTURE


def test_of_many_documents_few_are_looked_at():
    """And about as many rounds are expected of a share as it has."""
    chunks = -(-lognormal(60_000) // QUICK.chunk)
    looked_at = []
    expected = expected_rounds(chunks, 2, lambda some: rounds_of(looked_at.append(int(some.sum())) or some))
    assert LOOKED_AT <= looked_at[0] <= 2 * LOOKED_AT < chunks.sum() / 2
    assert sum(expected.values()) == pytest.approx(chunks.sum() / 2 / QUICK.batch, rel=0.1)
