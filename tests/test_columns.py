"""`add_columns_` and `copy_columns_`: parts of many shapes on the columns of one tensor, in few launches."""

import pytest
import torch
from conftest import replayed
from klora.kernels import columns
from klora.kernels.columns import PARTS, add_columns_, copy_columns_

SHAPES = [(8, 20), (33, 8), (1, 7), (5, 1), (4, 600), (2, 2048)]


def made(rows, shapes, device, seed=0):
    """A total with a gap behind each part, the parts, and where they start. Some parts are views of larger tensors."""
    draw = torch.Generator(device).manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, device=device, generator=draw)

    starts, parts, width = [], [], 0
    for number, (height, length) in enumerate(shapes):
        starts.append(width)
        width += -(-height * length // 4) * 4 + 4
        whole, middle = rand(rows, 3, height, 2 * length), slice(length // 2, length // 2 + length)
        views = whole[:, 1, :, middle], whole[:, 1].flatten(1)[:, : height * length].unflatten(1, (height, length))
        parts.append((*views, views[0].contiguous())[number % 3])
    return rand(rows, width), parts, starts


def expected(total, parts, starts, adds):
    total = total.clone()
    for part, start in zip(parts, starts, strict=True):
        columns_of_part = total[:, start : start + part[0].numel()]
        columns_of_part.copy_(part.flatten(1) + (columns_of_part if adds else 0))
    return total


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("rows", "times"), [(1, 1), (3, 1), (2, PARTS // 2)])
def test_each_part_is_added_to_its_columns_and_nothing_else(backend, adds, rows, times):
    total, parts, starts = made(rows, SHAPES * times, "cpu")
    wanted = expected(total, parts, starts, adds)
    (add_columns_ if adds else copy_columns_)(total, parts, starts, backend)
    assert torch.equal(total, wanted)


def test_no_parts_are_no_launch(monkeypatch):
    monkeypatch.setattr(columns, "_launch", lambda *_: pytest.fail("launched"))
    total = torch.ones(2, 3)
    add_columns_(total, [], [], backend="triton")
    assert (total == 1).all()


def test_a_launch_takes_many_parts(monkeypatch):
    launches = []
    monkeypatch.setattr(columns, "_launch", lambda total, parts, *more: launches.append(len(parts)))
    total, parts, starts = made(2, [(1, 4)] * (2 * PARTS + 1), "cpu")
    add_columns_(total, parts, starts, backend="triton")
    assert launches == [PARTS, PARTS, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("rows", [1, 64])
def test_parts_on_a_gpu(adds, rows):
    total, parts, starts = made(rows, [*SHAPES * 3, (8, 576), (1536, 8)], "cuda")
    wanted = expected(total, parts, starts, adds)
    (add_columns_ if adds else copy_columns_)(total, parts, starts)
    assert torch.equal(total, wanted)


@pytest.mark.gpu
def test_a_captured_launch_reads_the_parts_again():
    total, parts, starts = made(3, SHAPES, "cuda")
    before, wanted = total.clone(), expected(total, [2 * part for part in parts], starts, True)
    add_columns_(total, parts, starts)
    (out,), replay = replayed(lambda: [total.copy_(before), add_columns_(total, parts, starts)][:1])
    for part in parts:
        part.mul_(2)
    replay()
    assert torch.equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.slow
def test_columns_beyond_32_bits():
    rows, width = 3, 2**30
    total = torch.zeros(rows, width, device="cuda")
    part = torch.ones(rows, 4, 8, device="cuda")
    add_columns_(total, [part], [width - 32])
    assert total.sum().item() == rows * 32 and (total[:, -32:] == 1).all()
