"""Captures on a GPU: whose stream they are on, and what garbage does to them."""

import gc

import pytest
import torch
from klora.model.graphs import capture_stream, captured

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


class Owner:
    pass


def test_a_stream_is_its_owner_s_alone_and_then_the_next_one_s():
    one, other = Owner(), Owner()
    streams = [capture_stream(owner, DEVICE) for owner in (one, other)]
    assert streams[0] != streams[1]
    del one
    assert capture_stream(Owner(), DEVICE) == streams[0]


def test_making_and_dropping_captures_takes_no_more_memory():
    """Each stream that cuBLAS ran on would keep a workspace."""
    a = torch.randn(512, 512, device=DEVICE)

    def held() -> int:
        captured(lambda: a @ a, DEVICE)()
        torch.cuda.synchronize()
        gc.collect()
        return torch.cuda.memory_allocated()

    assert len({held() for _ in range(6)}) == 1


def test_garbage_with_a_graph_in_it_does_not_spoil_a_capture():
    count = torch.zeros((), device=DEVICE)
    ring = [captured(lambda: count.add_(1), DEVICE)]
    ring.append(ring)
    del ring
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        replay = captured(lambda: [[[]] for _ in range(1000)] and count.add_(1), DEVICE)
    finally:
        gc.set_threshold(*thresholds)
    before = count.item()
    replay()
    assert count.item() == before + 1 and gc.isenabled()
