"""dx of projections with adapters by warps that take turns: the bits of the other kernel, and where it is taken."""

import pytest
import torch
from hopper import MULTIPROCESSORS, compiled_for_hopper
from klora.kernels import lora_linear
from klora.kernels.dispatch import is_hopper
from klora.kernels.lora_qkv import dx_turns
from klora.kernels.lora_qkv.op import projected
from torch import Tensor

DEVICE = torch.device("cuda")
NEVER = 1 << 30
COUNT = 6
"""Adapters of a pool."""


@pytest.mark.parametrize(
    ("width", "rank", "sizes", "is_taken"),
    [
        (576, 8, [576], True),
        (1536, 16, [576], True),
        (576, 17, [576], False),
        (576, 8, [1536, 1536, 0], True),
        (576, 9, [1536, 1536, 0], False),
        (576, 8, [576, 192, 192], True),
        (576, 4, [576, 192, 192], False),
        (576, 9, [576, 192, 192], False),
        (576, 8, [576, 0, 192], False),
        (576, 8, [1536, 0, 0], False),
        (512, 8, [512], False),
        (2048, 8, [512], False),
    ],
)
def test_it_is_taken_for_few_ranks_and_columns_that_its_tiles_cover(width, rank, sizes, is_taken, monkeypatch):
    monkeypatch.setattr(dx_turns, "runs_on", lambda x: True)
    monkeypatch.setattr(dx_turns, "multiprocessors", lambda device: MULTIPROCESSORS)
    assert dx_turns.takes(torch.empty(64, 1024, width, device="meta"), rank, sizes) == is_taken


def test_it_wants_tiles_for_most_multiprocessors(monkeypatch):
    monkeypatch.setattr(dx_turns, "runs_on", lambda x: True)
    monkeypatch.setattr(dx_turns, "multiprocessors", lambda device: MULTIPROCESSORS)
    taken = [dx_turns.takes(torch.empty(b, 1024, 576, device="meta"), 8, [576]) for b in range(1, 9)]
    assert taken == sorted(taken) and taken.count(False) == 3  # of 24 tiles each, 93 are wanted


COMPILED = """
import subprocess, tempfile
import torch, triton
from hopper import pretend
from klora.kernels import lora_linear
from klora.kernels.lora_qkv import dx, forward
from klora.kernels.lora_qkv.op import projected
from klora.kernels.precompile import recorded

pretend()
forward.takes = dx.takes = lambda *about: True

def work(sizes, D, rank, kind):
    def run():
        x, weight = torch.zeros(5, 200, D, dtype=torch.bfloat16), torch.zeros(sum(sizes), D, dtype=torch.bfloat16)
        x.requires_grad_()
        lora_a = torch.zeros(9, *((len(sizes), rank) if len(sizes) > 1 else (rank,)), D, dtype=kind, requires_grad=True)
        lora_b = torch.zeros(9, sum(sizes), rank, dtype=kind, requires_grad=True)
        slots = torch.zeros(5, dtype=torch.int32)
        if len(sizes) > 1:
            out = torch.cat(projected(x, weight, lora_a, lora_b, slots, sizes), dim=2)
        else:
            out = lora_linear(x, weight, lora_a, lora_b, slots, backend="triton")
        out.sum().backward()
    return run

kinds = torch.float32, torch.bfloat16
for sizes, ranks in (([576], (1, 8, 12, 16)), ([1536, 1536], (1, 5, 8)), ([320, 64], (8,)), ([576, 192, 192], (8,))):
    for D in (576, 1536):
        for rank in ranks:
            for kernel in recorded(work(sizes, D, rank, kinds[rank % 8 == 0])).values():
                if kernel.name != "_dx_in_turns":
                    continue
                compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
                assert compiled.metadata.shared <= 232_448, compiled.metadata.shared
                with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                    file.write(compiled.asm["ptx"])
                    file.flush()
                    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "-o", "/dev/null", file.name]
                    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                assert "serialized" not in said and "0 bytes spill stores" in said, (sizes, rank, said)
                print("compiled")
"""


@pytest.mark.slow
def test_it_compiles_for_hopper_spills_nothing_and_its_matrix_instructions_overlap():
    assert compiled_for_hopper(COMPILED).split() == ["compiled"] * 18


def inputs(documents, length, sizes, D, rank, kind=torch.bfloat16, dtype=torch.bfloat16) -> dict:
    """What the ops take, and the gradients of their outputs; the first document has no adapter, two have the same."""
    draw = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(DEVICE, like)

    each = (len(sizes), rank) if len(sizes) > 1 else (rank,)
    slots = [-1, *(document % COUNT for document in range(2, documents)), 2][:documents]
    return {
        "x": randn(documents, length, D),
        "weight": randn(sum(sizes), D, scale=D**-0.5),
        "lora_a": randn(COUNT, *each, D, scale=D**-0.5, like=kind),
        "lora_b": randn(COUNT, sum(sizes), rank, scale=0.3, like=kind),
        "slots": torch.tensor(slots, device=DEVICE),
        "sizes": sizes,
        "douts": [randn(documents, length, size) for size in sizes],
    }


CASES = {
    "smol": {"sizes": [576], "D": 576, "rank": 8, "kind": torch.float32},
    "smol, in place": {"sizes": [576], "D": 576, "rank": 16},
    "smol, down": {"sizes": [576], "D": 1536, "rank": 12, "kind": torch.float32},
    "smol, gate and up": {"sizes": [1536, 1536], "D": 576, "rank": 8, "kind": torch.float32},
    "gate and up in place": {"sizes": [1536, 1536], "D": 576, "rank": 8},
    "unlike and odd": {"sizes": [80, 336], "D": 144, "rank": 8},
    "five ranks": {"sizes": [48, 16], "D": 272, "rank": 5, "kind": torch.float32},
    "smol, q, k and v": {"sizes": [576, 192, 192], "D": 576, "rank": 8, "kind": torch.float32},
    "q, k and v in place": {"sizes": [80, 16, 48], "D": 144, "rank": 8},
    "a step of 16": {"sizes": [16], "D": 192, "rank": 1, "kind": torch.float32},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not is_hopper(DEVICE), reason="warps take turns on Hopper")
class TestOnTheGPU:
    def made(self, given, tiles: int, monkeypatch) -> tuple[Tensor, ...]:
        """The gradients of x, A and B; in turns from `tiles` a multiprocessor on."""
        monkeypatch.setattr(dx_turns, "TURNS", tiles)
        sizes, x, weight = given["sizes"], given["x"].clone().requires_grad_(), given["weight"]
        lora = [given[name].clone().requires_grad_() for name in ("lora_a", "lora_b")]
        three = [*sizes, 0] if len(sizes) == 2 else sizes
        assert dx_turns.takes(x, lora[1].size(2), three) == (tiles == 0)
        if len(sizes) > 1:
            outs = projected(x, weight, *lora, given["slots"], sizes)
        else:
            outs = [lora_linear(x, weight, *lora, given["slots"], backend="triton")]
        return torch.autograd.grad(outs, [x, *lora], given["douts"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("documents", "length"), [(1, 1), (5, 777), (70, 130), (3, 7001)])
    @pytest.mark.parametrize("case", CASES)
    def test_the_bits_are_the_other_kernels(self, case, documents, length, dtype, monkeypatch):
        about = CASES[case] | ({} if CASES[case].get("kind") else {"kind": dtype})
        given = inputs(documents, length, dtype=dtype, **about)
        ours, others = (self.made(given, tiles, monkeypatch) for tiles in (0, NEVER))
        for one, other in zip(ours, others, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("case", ["smol", "smol, gate and up", "smol, q, k and v", "unlike and odd"])
    def test_a_documents_bits_are_the_same_in_every_run_and_batch(self, case, monkeypatch):
        given = inputs(60, 640, **CASES[case])
        first = self.made(given, 0, monkeypatch)
        for _ in range(10):
            for one, other in zip(first, self.made(given, 0, monkeypatch), strict=True):
                assert torch.equal(one, other)
        for some in (slice(0, 1), slice(7, 9), slice(20, 60)):
            part = {name: t[some] for name, t in given.items() if name in ("x", "slots")}
            part["douts"] = [dout[some].contiguous() for dout in given["douts"]]
            assert torch.equal(first[0][some], self.made(given | part, 0, monkeypatch)[0])

    @pytest.mark.parametrize("case", ["smol", "smol, down"])
    def test_rows_that_are_not_finite_change_no_others(self, case, monkeypatch):
        given = inputs(4, 300, **CASES[case])
        clean = self.made(given, 0, monkeypatch)[0]
        given["douts"][0][2, 100:200] = float("nan")
        found = self.made(given, 0, monkeypatch)[0]
        clean[2, 100:200] = found[2, 100:200] = 0.0
        assert torch.equal(clean, found)
