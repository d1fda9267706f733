"""Grids: only the first axis of a launch may count documents, tokens or slots; CUDA takes 65,535 on the other two.

And slots: what names them is read in the width that it has, or refused.
"""

import ast
from functools import partial
from pathlib import Path

import klora.kernels
import pytest
import torch
from klora.kernels import cache_write_, lora_adam_
from test_contract import BACKENDS, DEVICE, OPS, POOL, WITH_SLOTS, Op, gradients, ops

KERNELS = Path(klora.kernels.__file__).parent
LARGEST = 65_535

BY_WEIGHTS = {
    "_sum_rows": "columns of an embedding, 128 a program",
    "add_splits": "columns of a norm, which has up to 4,096",
    "permute_inputs": "columns of an int6 matrix, 1,024 a program",
    "tile_forward": "parts of a sum over the columns of an int6 matrix, up to 4",
    "warp_backward": "parts of a sum over the rows of an int6 matrix, up to 8",
    "dequantize_tiles": "rows of an int6 matrix, 32 a program",
}
"""Kernels with a second axis, and what it counts: weights, which documents and tokens do not change."""


def axes_of_launches() -> dict[str, int]:
    """Of each kernel that some file here launches, how many axes its grid has; 0 where a variable holds it."""
    found = {}
    for path in KERNELS.rglob("*.py"):
        if path.name == "launch.py":  # launches what the others ask for
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and node.keywords:
                grid = node.func.slice
                found[ast.unparse(node.func.value)] = len(grid.elts) if isinstance(grid, ast.Tuple) else 0
    return found


def test_a_grid_has_one_axis_or_its_second_counts_weights():
    axes = axes_of_launches()
    assert {name for name, count in axes.items() if count > 1} == BY_WEIGHTS.keys()
    assert {name for name, count in axes.items() if count == 0} == {"_measure", "_fill", "_apply"}, "one axis, yielded"


@pytest.fixture
def grids(monkeypatch) -> list[tuple]:
    """What the interpreter is asked to run, which it does not."""
    from triton.runtime import interpreter

    if DEVICE.type == "cuda":
        pytest.skip("the interpreter alone shows its grids")
    seen = []

    def note(self, *arguments, **options):
        seen.append((self.fn.__name__, tuple(self.grid)))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", note)
    return seen


def beyond_the_first(grids: list[tuple], call) -> set[tuple]:
    """Of all launches of `call`, their kernels and the grid's axes after the first."""
    grids.clear()
    call()
    assert grids
    assert all(size <= LARGEST for _, grid in grids for size in grid[1:])
    return {(name, grid[1:]) for name, grid in grids}


@pytest.mark.parametrize("name", OPS)
def test_documents_and_tokens_are_on_the_first_axis(name, grids):
    """Forward and backward: the other axes of a call of 300 documents are those of two."""

    def run(op: Op) -> None:
        gradients(op, "triton")

    few = beyond_the_first(grids, lambda: run(ops(B=2, S=5)[name]))
    assert beyond_the_first(grids, lambda: run(ops(B=300, S=5)[name])) == few
    assert beyond_the_first(grids, lambda: run(ops(B=2, S=700)[name])) == few


def test_slots_are_on_the_first_axis(grids):
    def adam(slots: int) -> None:
        pools = [torch.rand(slots, 5) for _ in range(4)]
        lora_adam_(*pools, torch.zeros(slots, dtype=torch.int64), torch.ones(slots), backend="triton")

    def write(documents: int) -> None:
        chunk, ring = torch.rand(documents, 3, 1, 16), torch.rand(documents, 8, 1, 16)
        counts = torch.zeros(documents, dtype=torch.int64)
        cache_write_(ring, ring.clone(), chunk, chunk, counts, counts, counts, backend="triton")

    for call in (adam, write):
        assert beyond_the_first(grids, lambda call=call: call(66_000)) == beyond_the_first(
            grids, lambda call=call: call(2)
        )


def test_nothing_outside_of_the_kernels_launches_any():
    """So the launches above are all that there are."""
    for folder in ("ttt", "model", "lora", "cli", "bench"):
        for path in (KERNELS.parent / folder).rglob("*.py"):
            assert "triton.jit" not in path.read_text() and "gluon" not in path.read_text(), path


# ---- the integers that name them


def adam(slots: torch.Tensor, backend: str) -> list[torch.Tensor]:
    pools = [torch.full((POOL, 10), 0.5, device=DEVICE) for _ in range(4)]
    step, lr = torch.zeros(POOL, dtype=torch.int64, device=DEVICE), torch.ones(POOL, device=DEVICE)
    lora_adam_(*pools, step, lr, slots, backend=backend)
    return [*pools, step]


def write(slots: torch.Tensor, backend: str, **more: torch.Tensor) -> list[torch.Tensor]:
    chunk = torch.arange(2 * 3 * 16, device=DEVICE).view(2, 3, 1, 16) / 8
    keys, values = torch.zeros(2, POOL, 8, 1, 16, device=DEVICE)
    counts = {name: torch.full((2,), 3, device=DEVICE) for name in ("filled", "count")} | more
    cache_write_(keys, values, chunk, -chunk, slots, **counts, backend=backend)
    return [keys, values]


def op_with_slots(name: str, slots: torch.Tensor, backend: str) -> list[torch.Tensor]:
    return gradients(OPS[name], backend, slots=slots)


NAMED = {"lora_adam_": adam, "cache_write_": write} | {name: partial(op_with_slots, name) for name in WITH_SLOTS}
"""What every public op that takes slots gives for these ones."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMED)
def test_slots_are_int32_or_int64_and_mean_the_same(name, backend):
    slots = torch.tensor([2, -1], device=DEVICE)
    expected = NAMED[name](slots, backend)
    for found, other in zip(NAMED[name](slots.int(), backend), expected, strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float32])
def test_other_numbers_are_no_slots(name, backend, dtype):
    """They would be read as some of 32 bits, or cut to them."""
    with pytest.raises(ValueError, match=r"slots is .*; wanted int32 or int64"):
        NAMED[name](torch.ones(2, dtype=dtype, device=DEVICE), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["filled", "count"])
def test_counts_of_a_cache_are_int32_or_int64(name, backend):
    slots, given = torch.tensor([0, 1], device=DEVICE), torch.tensor([4, 2], device=DEVICE)
    for found, other in zip(*(write(slots, backend, **{name: of}) for of in (given, given.int())), strict=True):
        assert torch.equal(found, other)
    with pytest.raises(ValueError, match=rf"{name} is .*; wanted int32 or int64"):
        write(slots, backend, **{name: given.short()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMED)
def test_a_slot_that_32_bits_would_cut_to_another_is_none(name, backend):
    wrong = torch.tensor([2**32 + 2, -(2**63)], device=DEVICE)
    none = NAMED[name](torch.tensor([-1, -1], device=DEVICE), backend)
    for found, other in zip(NAMED[name](wrong, backend), none, strict=True):
        assert torch.equal(found, other)
