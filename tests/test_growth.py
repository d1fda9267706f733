"""Memory over rounds of train and score: the short form of `tests/growth.py`, and that it sees a leak."""

import growth
import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.slow
def test_training_and_scoring_again_and_again_does_not_grow(tmp_path):
    found = growth.growth(growth.Rounds(tmp_path, CPU), 0.0, CPU, least=2)
    assert not found["grows"] and found["rounds"] == 5, growth.described(found)
    assert not list(tmp_path.glob("tmp*")), "a round leaves no file"


def test_a_leak_is_seen():
    kept = []
    found = growth.growth(lambda: kept.append(bytearray(2 << 20)), 0.0, CPU)
    assert found["grows"] == ["rss"] and "memory grows: rss" in growth.described(found)


def test_what_is_held_for_a_moment_is_no_leak():
    sizes = iter([1, 9, 2, 8, 3, 1, 7, 2, 9, 1, 5, 1])
    found = growth.growth(lambda: bytearray(next(sizes) << 20), 0.0, CPU)
    assert found["grows"] == [] and "no growth" in growth.described(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_s_memory_does_not_grow(tmp_path):
    device = torch.device("cuda")
    found = growth.growth(growth.Rounds(tmp_path, device), 20.0, device)
    assert not found["grows"], growth.described(found)
