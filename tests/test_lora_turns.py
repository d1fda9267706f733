"""The plain forward with adapters by warps that take turns: the bits of the other kernel, and who makes which tile."""

from types import SimpleNamespace

import pytest
import torch
from hopper import MULTIPROCESSORS, compiled_for_hopper
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import assert_as_exact
from klora.kernels.dispatch import cdiv, is_hopper
from klora.kernels.lora_qkv import turns
from klora.kernels.lora_qkv.forward import launch_forward
from torch import Tensor

DEVICE = torch.device("cuda")
NEVER = 1 << 30
COUNT = 6
"""Adapters of a pool."""


@pytest.mark.parametrize(
    ("sizes", "outputs"),
    [([576], 192), ([192], 192), ([576, 192, 192], 192), ([1536, 1536, 0], 192), ([512], 128), ([1024], 128)],
)
def test_tiles_are_of_the_width_that_wastes_least(sizes, outputs):
    assert turns.pick_config(sizes).block_n == outputs


@pytest.mark.parametrize(
    ("blocks", "across", "columns"), [(512, 3, 3), (512, 16, 16), (128, 16, 16), (64, 16, 8), (16, 16, 2), (1, 5, 1)]
)
def test_a_chunk_is_as_long_as_leaves_no_multiprocessor_without_work(blocks, across, columns):
    assert turns.pick_columns(blocks, across, MULTIPROCESSORS, row_bytes=1152) == columns


def test_a_chunk_is_one_tile_where_x_does_not_stay_in_the_cache():
    assert turns.pick_columns(512, 3, MULTIPROCESSORS, row_bytes=3072) == 1
    assert turns.pick_columns(64, 16, MULTIPROCESSORS, row_bytes=3072) == 8


def places(program: int, programs: int, documents: int, length: int, sizes: list[int], config, monkeypatch) -> list:
    """What the program's tiles are, in order, by the kernel's own rule in plain Python."""
    tiles = [cdiv(size, config.block_n) for size in sizes]
    blocks = documents * cdiv(length, turns.BLOCK.value)
    columns = turns.pick_columns(blocks, sum(tiles), programs, row_bytes=1152)
    chunks = blocks * sum(tiles) // columns
    about = *sizes[:2], *tiles, config.block_n, 3
    language = SimpleNamespace(
        program_id=lambda axis: torch.tensor(program),
        num_programs=lambda axis: programs,
        where=torch.where,
        int32=torch.int32,
    )
    monkeypatch.setattr(turns, "gl", language)
    monkeypatch.setattr(turns, "BLOCK", turns.BLOCK.value)
    count = cdiv(max(chunks - program, 0), programs) * columns
    found = [turns.place_of.fn(torch.tensor(i), columns, length, *about) for i in range(count)]
    monkeypatch.undo()
    return [tuple(map(int, place)) for place in found]


@given(
    st.integers(1, 7),
    st.integers(1, 600),
    st.sampled_from([[576, 192, 192], [1536, 1536, 0], [192, 320, 64], [40, 600, 260]]),
    st.sampled_from([turns.TurnsConfig(192, 4), turns.TurnsConfig(128, 5)]),
    st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_every_tile_is_made_once_and_of_the_u_of_its_tokens_and_projection(documents, length, sizes, config, programs):
    seen = []
    for program in range(programs):
        with pytest.MonkeyPatch.context() as monkeypatch:
            tiles = places(program, programs, documents, length, sizes, config, monkeypatch)
        u = None
        for b, s, p, n, row, makes_u in tiles:
            assert row == sum(sizes[:p]) + n and n < sizes[p]
            u = (b, s, p) if makes_u else u
            assert u == (b, s, p) and (makes_u or n > 0)
            seen.append((b, s, p, n))
    wanted = [
        (b, s, p, n)
        for b in range(documents)
        for s in range(0, length, turns.BLOCK.value)
        for p, size in enumerate(sizes)
        for n in range(0, size, config.block_n)
    ]
    assert sorted(seen) == wanted


COMPILED = """
import subprocess, tempfile
import torch, triton
from hopper import pretend
from klora.kernels.lora_qkv import forward, turns
from klora.kernels.precompile import recorded

pretend()
forward.takes = lambda *about: True

def work(sizes, rank, bias):
    groups, rows = len(sizes), sum(sizes)
    def run():
        x, weight = torch.zeros(5, 200, 576, dtype=torch.bfloat16), torch.zeros(rows, 576, dtype=torch.bfloat16)
        lora_a = torch.zeros(9, *((3, rank) if groups == 3 else (rank,)), 576)
        slots = torch.zeros(5, dtype=torch.int32)
        forward.launch_forward(x, weight, lora_a, torch.zeros(9, rows, rank), slots, sizes, bias=bias)
    return run

for outputs, stages in ((192, 4), (128, 5)):
    turns.pick_config = lambda sizes: turns.TurnsConfig(outputs, stages)
    for rank in (1, 8, 12, 16):
        for sizes in ([576], [576, 192, 192], [1536, 1536, 0]):
            bias = torch.zeros(576, dtype=torch.bfloat16) if len(sizes) == 1 else None
            for kernel in recorded(work(sizes, rank, bias)).values():
                if kernel.name != "_forward_in_turns":
                    continue
                compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
                assert compiled.metadata.shared <= 232_448, compiled.metadata.shared
                with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                    file.write(compiled.asm["ptx"])
                    file.flush()
                    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "-o", "/dev/null", file.name]
                    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                assert "serialized" not in said and "0 bytes spill stores" in said, (sizes, rank, outputs, said)
                print("compiled")
"""


@pytest.mark.slow
def test_it_compiles_for_hopper_spills_nothing_and_its_matrix_instructions_overlap():
    assert compiled_for_hopper(COMPILED).split() == ["compiled"] * 24


def inputs(documents, length, sizes, K, rank, dtype=torch.bfloat16, has_bias=False) -> dict:
    """What launch_forward takes; the first document has no adapter, and two have the same one."""
    draw = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(DEVICE, dtype)

    rows, each = sum(sizes), (3, rank) if len(sizes) == 3 else (rank,)
    slots = [-1, *(document % COUNT for document in range(2, documents)), 2][:documents]
    return {
        "x": randn(documents, length, K),
        "weight": randn(rows, K, scale=K**-0.5),
        "lora_a": randn(COUNT, *each, K, scale=K**-0.5),
        "lora_b": randn(COUNT, rows, rank, scale=0.3),
        "slots": torch.tensor(slots, device=DEVICE),
        "sizes": sizes,
        "bias": randn(rows) if has_bias else None,
    }


def by_pytorch(x, weight, lora_a, lora_b, slots, sizes, bias) -> list[Tensor]:
    lora_a = lora_a if lora_a.dim() == 4 else lora_a[:, None]
    has_adapter = (slots >= 0)[:, None, None]
    outs = []
    for p, (W, B) in enumerate(zip(weight.split(sizes), lora_b.split(sizes, dim=1), strict=True)):
        u = torch.where(has_adapter, x @ lora_a[slots, p].mT, 0.0)
        outs.append(torch.nn.functional.linear(x, W, bias) + u @ B[slots].mT)
    return outs


CASES = {
    "smol": {"sizes": [576], "K": 576, "rank": 8},
    "smol, down": {"sizes": [576], "K": 1536, "rank": 12, "has_bias": True},
    "smol, qkv": {"sizes": [576, 192, 192], "K": 576, "rank": 8},
    "smol, gate and up": {"sizes": [1536, 1536, 0], "K": 576, "rank": 16},
    "one narrow": {"sizes": [48], "K": 48, "rank": 4, "has_bias": True},
    "a step of 16": {"sizes": [272], "K": 16, "rank": 1},
    "tiles of 128": {"sizes": [512], "K": 208, "rank": 16},
    "three odd ones": {"sizes": [192, 336, 64], "K": 144, "rank": 4},
}
"""All ways through the kernel; K is no multiple of a step, N none of a tile."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not is_hopper(DEVICE), reason="warps take turns on Hopper")
class TestOnTheGPU:
    def made(self, given, tiles: int, monkeypatch) -> list[Tensor]:
        """The outputs and x A^T of what has any; in turns from `tiles` a multiprocessor on."""
        monkeypatch.setattr(turns, "TURNS", tiles)
        assert turns.takes(given["x"], given["lora_b"].size(2), given["sizes"]) == (tiles == 0)
        made = launch_forward(**given)
        each = made.xa.chunk(len(given["sizes"]), dim=-1)
        return [*made.outs, *(xa for xa, out in zip(each, made.outs, strict=True) if out.numel())]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("documents", "length"), [(1, 1), (5, 777), (70, 130), (3, 7001)])
    @pytest.mark.parametrize("case", CASES)
    def test_the_bits_are_the_other_kernels(self, case, documents, length, dtype, monkeypatch):
        given = inputs(documents, length, dtype=dtype, **CASES[case])
        ours, others = (self.made(given, tiles, monkeypatch) for tiles in (0, NEVER))
        for one, other in zip(ours, others, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("case", CASES)
    def test_it_is_as_exact_as_pytorch(self, case, monkeypatch):
        given = inputs(5, 1111, **CASES[case])
        true = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
        ours, exact, plain = self.made(given, 0, monkeypatch), by_pytorch(**true), by_pytorch(**given)
        ours = ours[: len(given["sizes"])]
        assert_as_exact(*([one for one in outs if one.numel()] for outs in (ours, exact, plain)))

    @pytest.mark.parametrize("case", CASES)
    def test_a_documents_bits_are_the_same_in_every_run_and_batch(self, case, monkeypatch):
        given = inputs(60, 640, **CASES[case])
        first = self.made(given, 0, monkeypatch)
        for _ in range(10):
            for one, other in zip(first, self.made(given, 0, monkeypatch), strict=True):
                assert torch.equal(one, other)
        for some in (slice(0, 1), slice(7, 9), slice(20, 60)):
            part = {**given, "x": given["x"][some].contiguous(), "slots": given["slots"][some]}
            for one, other in zip(first, self.made(part, 0, monkeypatch), strict=True):
                assert torch.equal(one[some], other)

    def test_a_slot_beyond_32_bits_is_no_adapter(self, monkeypatch):
        given = inputs(4, 300, **CASES["smol, qkv"])
        given["slots"][1] = 2**32 + 1
        found = self.made(given, 0, monkeypatch)
        given["slots"][1] = -1
        for one, other in zip(found, self.made(given, 0, monkeypatch), strict=True):
            assert torch.equal(one, other)

    def test_rows_that_are_not_finite_change_no_others(self, monkeypatch):
        given = inputs(4, 300, **CASES["smol, qkv"])
        clean = self.made(given, 0, monkeypatch)
        given["x"][2, 100:200] = float("nan")
        found = self.made(given, 0, monkeypatch)
        for one, other in zip(clean, found, strict=True):
            one[2, 100:200] = other[2, 100:200] = 0.0
            assert torch.equal(one, other)
