"""lora_swiglu_mlp: as exact as plain PyTorch whichever matrices have adapters, and the same bits in every batch."""

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import MULTIPROCESSORS, compiled_for_hopper, few
from klora.bench.tolerance import assert_as_exact
from klora.kernels import lora_swiglu_backward, lora_swiglu_mlp, lora_swiglu_mlp_ref
from klora.kernels.dispatch import is_hopper
from klora.kernels.lora_qkv import forward
from torch import Tensor

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA GPU")]
MATRICES = "gate", "up", "down"


def inputs(
    batch=4,
    length=66,
    D=32,
    hidden=48,
    R=(8, 8, 8),
    ranks=(1, 5, 8, 0),
    slots=(3, -1, 0, 2),
    count=4,
    dtype=torch.float32,
    low=False,
    plain=False,
    absent=(),
) -> dict[str, Any]:
    """What the op takes, and dout; `plain`: no scale and no ranks, `low`: adapters in x's dtype."""
    draw = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(DEVICE, like)

    given, kind = {"x": randn(batch, length, D)}, dtype if low else torch.float32
    for name, rank in zip(MATRICES, R, strict=True):
        N, K = (D, hidden) if name == "down" else (hidden, D)
        given[name] = randn(N, K, scale=1.5 * K**-0.5)
        given[f"{name}_a"] = randn(count, rank, K, scale=K**-0.5, like=kind)
        given[f"{name}_b"] = randn(count, N, rank, scale=0.3, like=kind)
    for name in absent:
        given[f"{name}_a"] = given[f"{name}_b"] = None
    numbers = [torch.tensor([min(r, R[p]) for r in ranks], dtype=torch.int32, device=DEVICE) for p in range(3)]
    about = {"scale": [randn(count, like=torch.float32).abs() + 0.5 for _ in MATRICES], "ranks": numbers}
    given["slots"] = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    return given | ({} if plain else about) | {"dout": randn(batch, length, D)}


def is_wanted(name: str) -> bool:
    return name == "x" or name.endswith(("_a", "_b"))


def results(function, given: dict[str, Any], wanted=None, **more) -> list[Tensor]:
    """The output, then the gradients of x and the adapters (or of what is wanted)."""
    wanted = [name for name in given if is_wanted(name) and given[name] is not None] if wanted is None else wanted
    leaves = {name: given[name].detach().requires_grad_() for name in wanted}
    rest = {name: t for name, t in given.items() if name not in leaves and name != "dout"}
    out = function(**rest, **leaves, **more)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), given["dout"])]


def exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: one if name in ("ranks", "slots") else exact(one) for name, one in value.items()}
    if isinstance(value, list):
        return [exact(one) for one in value]
    return value.double() if isinstance(value, Tensor) else value


def check(given: dict[str, Any], wanted=None) -> None:
    ours, plain = (results(f, given, wanted, **m) for f, m in ((OP, {"backend": "triton"}), (REFERENCE, {})))
    assert_as_exact(ours, results(REFERENCE, exact(given), wanted), plain)


OP, REFERENCE = lora_swiglu_mlp, lora_swiglu_mlp_ref

CASES = {
    "unlike ranks": {},
    "unlike pools": {"R": (3, 8, 20), "ranks": (1, 20, 3, 9), "D": 48, "hidden": 144},
    "its dtype": {"R": (4, 4, 16), "low": True, "plain": True, "slots": (1, 1, 0, 3)},
    "its dtype, in place": {"R": (8, 8, 8), "low": True, "plain": True, "D": 16, "hidden": 16, "slots": None},
    "a slot three times": {"slots": (1, 1, 0, 1), "R": (16, 16, 16), "ranks": (1, 9, 16, 4)},
    "several tiles": {"batch": 2, "slots": (0, 3), "length": 200, "D": 80, "hidden": 272, "R": (12, 12, 12)},
    "one token": {"length": 1, "batch": 24, "count": 24, "slots": range(24), "ranks": (1, 3, 8) * 8},
    "above 16": {"R": (40, 40, 70), "ranks": (40, 33, 1, 0)},
    "gate alone": {"absent": ("up", "down")},
    "up alone": {"absent": ("gate", "down")},
    "down alone": {"absent": ("gate", "up")},
    "all but down": {"absent": ("down",), "plain": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_as_exact_as_plain_pytorchs(case, dtype):
    check(inputs(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("absent", [(), ("gate", "up"), ("down",)])
def test_weights_get_gradients(absent):
    check(inputs(absent=absent, dtype=torch.float16), list(MATRICES))


def test_the_equations_written_out():
    given = {name: t for name, t in exact(inputs(slots=(1, 0, 3, 2), plain=True)).items() if name != "dout"}
    each = {name: given[name][given["slots"]] for name in given if name.endswith(("_a", "_b"))}

    def product(rows, name):
        return rows @ given[name].T + (rows @ each[f"{name}_a"].mT) @ each[f"{name}_b"].mT

    g, u = product(given["x"], "gate"), product(given["x"], "up")
    torch.testing.assert_close(REFERENCE(**given), product(g * torch.sigmoid(g) * u, "down"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_documents_bits_do_not_depend_on_what_else_is_in_the_batch(dtype):
    given = inputs(batch=3, slots=(3, 0, 2), dtype=dtype)
    together = results(OP, given, backend="triton")
    for name in ("x", "dout"):
        given[name][[0, 2]] = torch.nan
    for name in given:
        if name.endswith(("_a", "_b")):
            given[name][1:] = torch.nan
    among_nans = results(OP, given, backend="triton")
    for number, (one, other) in enumerate(zip(together, among_nans, strict=True)):
        assert torch.equal(*((one[1], other[1]) if number < 2 else (one[0], other[0])))
    alone = {name: given[name][1:2].contiguous() for name in ("x", "dout", "slots")}
    for one, other in zip(together[:2], results(OP, given | alone, backend="triton"), strict=False):
        assert torch.equal(one[1], other[0])


def test_what_lies_above_an_adapters_rank_is_not_read_and_gets_no_gradient():
    ranks = (3, 0, 8, 5)
    given = inputs(ranks=ranks, slots=(0, 1, 2, 2))
    wanted = results(OP, given, backend="triton")
    for name in MATRICES:
        for slot, rank in enumerate(ranks):
            given[f"{name}_a"][slot, rank:], given[f"{name}_b"][slot, :, rank:] = torch.nan, torch.nan
    found = results(OP, given, backend="triton")
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)
    for da, db in zip(found[2::2], found[3::2], strict=True):
        for slot, rank in enumerate(ranks[:3]):
            assert not da[slot, rank:].any() and not db[slot, :, rank:].any()
            assert not rank or (da[slot, :rank].any(1).all() and db[slot, :, :rank].any(0).all())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("missing", [None, "gate", "up", "down"])
def test_a_scale_is_a_factor_of_b_and_of_its_gradient(missing, kind):
    """In powers of two, which round nothing: the same bits as with B times the scale, whichever matrix has one."""
    given = inputs(dtype=torch.float16, low=kind == torch.float16)
    factors = dict(zip(MATRICES, ((2.0, 4.0, 1.0, 0.5), (0.5, 0.5, 2.0, 4.0), (4.0, 2.0, 0.5, 8.0)), strict=True))
    given["scale"] = [None if name == missing else torch.tensor(factors[name], device=DEVICE) for name in MATRICES]
    scaled = given | {"scale": None}
    for name, scale in zip(MATRICES, given["scale"], strict=True):
        if scale is not None:
            scaled[f"{name}_b"] = (given[f"{name}_b"] * scale.view(-1, 1, 1)).to(kind)
    names = ["x", *(name for name in given if name.endswith(("_a", "_b")))]
    found, wanted = (results(OP, one, names, backend="triton") for one in (given, scaled))
    for name, one, other in zip(["out", *names], found, wanted, strict=True):
        if name.endswith("_b") and name[:-2] != missing:
            other = (other * torch.tensor(factors[name[:-2]], device=DEVICE).view(-1, 1, 1)).to(kind)
        assert torch.equal(one, other) and one.any(), name


def test_each_gradient_alone_has_the_bits_that_it_has_with_the_others(monkeypatch):
    given = inputs(dtype=torch.float16)
    in_steps_of(64, monkeypatch)
    names = [name for name in given if is_wanted(name)]
    whole = results(OP, given, names, backend="triton")
    for number, name in enumerate(names, 1):
        assert torch.equal(results(OP, given, [name], backend="triton")[1], whole[number])


ONE_LAUNCH = {
    "ranks and scales": {},
    "neither": {"plain": True},
    "its dtype, in place": {"low": True, "plain": True},
    "a slot twice": {"slots": (2, 0, 2, 1)},
    "a slot three times, in three tiles": {"slots": (1, 0, 1, 1), "hidden": 144},
    "every slot the same": {"slots": (2, 2, 2, 2), "length": 130},
    "no adapter": {"slots": (-1, 0, -1, 0)},
    "past the pool": {"slots": (4, 2, 9, 2)},
    "without slots": {"slots": None},
    "one token": {"length": 1, "slots": (0, 2, 0, 1)},
    "ragged": {"length": 130, "batch": 3, "slots": (2, 1, 2), "hidden": 80},
    "full tiles": {"length": 64, "hidden": 64, "slots": (0, 1, 0, 1)},
    "unlike ranks": {"R": (3, 8, 16), "ranks": (1, 16, 3, 9), "slots": (1, 3, 1, 0)},
    "16 beside 1": {"R": (16, 12, 1), "ranks": (16, 1, 9, 4), "slots": (0, 0, 3, 2)},
    "a batch of one": {"batch": 1, "slots": (2,)},
    "gate has none": {"absent": ("gate",), "slots": (1, 1, 0, 1)},
    "up has none": {"absent": ("up",), "slots": (1, 1, 0, 1)},
}
"""Of the middle of the backward: what reads dh."""


def both_ways(given: dict[str, Any], monkeypatch, wanted=None) -> tuple[list[Tensor], list[Tensor], int]:
    """The results with the middle in launches of its own and in one, and how often that one was launched."""
    module, found, launched = importlib.import_module("klora.kernels.lora_swiglu_mlp"), [], []
    launch = lora_swiglu_backward._launch_slopes
    monkeypatch.setattr(lora_swiglu_backward, "_launch_slopes", lambda *about: launched.append(found) or launch(*about))
    for is_one in (False, True):
        monkeypatch.setattr(module, "takes_slopes", lambda *about, taken=is_one: taken)
        found.append(results(OP, given, wanted, backend="triton"))
        assert is_one or not launched
    monkeypatch.undo()
    return *found, len(launched)


def in_steps_of(tokens: int, monkeypatch) -> None:
    """As the launches that the one stands for, for the interpreter rounds by the step: fp32 takes 16 tokens at once."""
    config = dataclasses.replace(lora_swiglu_backward.CONFIG, block_s=tokens)
    monkeypatch.setattr(lora_swiglu_backward, "CONFIG", config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", ONE_LAUNCH)
def test_the_middle_of_the_backward_in_one_launch_has_the_same_bits(case, dtype, monkeypatch):
    given = inputs(**ONE_LAUNCH[case], dtype=dtype)
    in_steps_of(16 if dtype == torch.float32 else 64, monkeypatch)
    apart, together, launched = both_ways(given, monkeypatch)
    assert launched == 1
    names = ["out", *(name for name in given if is_wanted(name) and given[name] is not None)]
    for name, one, other in zip(names, apart, together, strict=True):
        assert torch.equal(one, other) and one.any(), name


@pytest.mark.parametrize("case", ["a slot three times, in three tiles", "past the pool", "ragged", "16 beside 1"])
def test_the_middle_in_one_launch_is_as_exact_as_plain_pytorch_in_fp32(case, monkeypatch):
    module = importlib.import_module("klora.kernels.lora_swiglu_mlp")
    monkeypatch.setattr(module, "takes_slopes", lambda *about: True)
    check(inputs(**ONE_LAUNCH[case]))


@pytest.mark.parametrize(
    ("wanted", "launches"),
    [
        (["x"], 0),
        (["gate_a", "up_b"], 0),
        (["down_a", "down_b"], 0),
        (["x", "gate_b"], 0),
        (["up_a", "down_b"], 1),
        (["gate_b", "down_a"], 1),
        (["x", "up_b", "down_a"], 1),
        ([*MATRICES, "gate_a", "up_b", "down_a", "down_b"], 1),
    ],
)
def test_the_middle_is_one_launch_where_gate_or_up_and_down_want_gradients(wanted, launches, monkeypatch):
    given = inputs(dtype=torch.float16, slots=(2, -1, 2, 0), hidden=80)
    in_steps_of(64, monkeypatch)
    apart, together, launched = both_ways(given, monkeypatch, wanted)
    assert launched == launches
    for name, one, other in zip(["out", *wanted], apart, together, strict=True):
        assert torch.equal(one, other) and one.any(), name


@pytest.mark.parametrize(
    ("dtype", "documents", "ranks", "is_one"),
    [
        (torch.bfloat16, 64, (16, 16), True),
        (torch.float16, 11, (8, 1), True),
        (torch.float16, 10, (8, 1), False),
        (torch.float32, 64, (8, 8), False),
        (torch.bfloat16, 64, (24, 8), False),
        (torch.float16, 64, (8, 17), False),
    ],
)
def test_the_middle_is_one_launch_of_16_bits_few_ranks_and_many_documents(dtype, documents, ranks, is_one, monkeypatch):
    """Of 24 programs each, of which an H200 runs 264."""
    monkeypatch.setattr(lora_swiglu_backward, "multiprocessors", lambda device: MULTIPROCESSORS)
    g = torch.empty(documents, 7, 1536, dtype=dtype, device="meta")
    assert lora_swiglu_backward.takes_slopes(g, *ranks) == is_one


@pytest.mark.parametrize("slots", [None, (2, 2, -1)])
def test_no_tokens_leave_zeros(slots):
    given = inputs(3, 0, slots=slots, count=3, ranks=(1, 5, 8), dtype=torch.float16)
    for grad in results(OP, given, backend="triton")[2:]:
        assert not grad.any()


GIVEN = {name: t for name, t in inputs().items() if name != "dout"}
BAD = {
    r"x is float32 .*; wanted bfloat16, float16 or float32 \[B, S, D\]": {"x": GIVEN["x"][0]},
    r"gate is float32 \[48, 16\]; wanted float32 \[hidden, 32\]": {"gate": GIVEN["gate"][:, :16]},
    r"up is float32 \[47, 32\]; wanted float32 \[48, 32\]": {"up": GIVEN["up"][1:]},
    r"down is float32 \[48, 32\]; wanted float32 \[32, 48\]": {"down": GIVEN["up"]},
    r"up_a is float32 \[4, 8, 16\]; wanted float32 \[slots, R, 32\]": {"up_a": GIVEN["up_a"][..., :16]},
    r"down_b is float32 \[4, 32, 2\]": {"down_b": GIVEN["down_b"][..., :2]},
    "up_a and up_b: wanted A with B": {"up_b": None},
    "up_a is torch.float32 of 3 slots; wanted those of gate_a": {"up_a": GIVEN["up_a"][:3], "up_b": GIVEN["up_b"][:3]},
    "no adapter is given; swiglu_mlp is": {f"{name}_{part}": None for name in MATRICES for part in "ab"},
    "scale is .*; wanted one for gate, up and down each": {"scale": GIVEN["scale"][0]},
    r"ranks of down is float32 \[4\]; wanted int32 or int64": {"ranks": [None, None, GIVEN["scale"][0]]},
    "scale of gate requires a gradient": {"scale": [torch.ones(4, device=DEVICE).requires_grad_(), None, None]},
    r"slots is float32 \[4\]": {"slots": torch.zeros(4, device=DEVICE)},
    "N of gate is 40; wanted a positive mult.*16": {
        **{name: GIVEN[name][:40] for name in ("gate", "up")},
        **{f"{name}_b": GIVEN[f"{name}_b"][:, :40] for name in ("gate", "up")},
        "down": GIVEN["down"][:, :40],
        "down_a": GIVEN["down_a"][..., :40],
    },
    "backend is 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize(("message", "changed"), BAD.items(), ids=range(len(BAD)))
def test_bad_input_is_refused_with_what_was_given_and_what_is_allowed(message, changed):
    with pytest.raises(ValueError, match=message):
        OP(**{**GIVEN, "backend": "triton", **changed})


@pytest.mark.slow
@pytest.mark.parametrize("absent", [(), ("gate", "up"), ("down",)])
def test_opcheck(absent):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs, and unused padding is fresh memory
    given, calls = inputs(2, 5, slots=(1, 0), absent=absent), []
    module = __import__("klora.kernels.lora_swiglu_mlp", fromlist=["_op"])
    op = module._op
    try:
        module._op = lambda *arguments: calls.append(arguments) or op(*arguments)
        given = {name: t.requires_grad_() if is_wanted(name) and t is not None else t for name, t in given.items()}
        OP(**{name: t for name, t in given.items() if name != "dout"}, backend="triton")
    finally:
        module._op = op
    leaves = [
        t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in calls[0]
    ]
    # x A^T of a third projection, which is empty, is never written: no comparison of two runs' outputs.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.klora.lora_swiglu_mlp.default, tuple(leaves), test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, (1, 1)])
def test_opcheck_of_the_middle_of_the_backward(slots, monkeypatch):
    torch.use_deterministic_algorithms(False)
    module, calls = importlib.import_module("klora.kernels.lora_swiglu_mlp"), []
    launch = module.adapted_slopes_
    monkeypatch.setattr(module, "adapted_slopes_", lambda *about: calls.append(about) or launch(*about))
    given = inputs(2, 5, slots=slots, count=2, R=(8, 16, 16), ranks=(8, 3), dtype=torch.float16, hidden=144)
    results(OP, given, backend="triton")
    given = [torch.zeros_like(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in calls[0]]
    torch.library.opcheck(torch.ops.klora.lora_swiglu_slopes_.default, tuple(given))


@pytest.mark.slow
def test_compile_with_fullgraph_gives_the_same_bits():
    given = inputs(2, 5, slots=(1, 0), dtype=torch.float16, hidden=144)
    names = [name for name in given if is_wanted(name)]
    rest = {name: t for name, t in given.items() if name not in (*names, "dout")}

    def loss(*leaves):
        return (OP(**dict(zip(names, leaves, strict=True)), **rest, backend="triton") * given["dout"]).sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [given[name].clone().requires_grad_() for name in names]
        function(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.any()


COMPILED = """
import subprocess, tempfile
import torch, triton
from hopper import pretend
from klora.kernels import lora_swiglu_backward
from klora.kernels.lora_qkv import forward
from klora.kernels.lora_swiglu_mlp import lora_swiglu_mlp
from klora.kernels.precompile import recorded

pretend()
forward.takes = forward.takes_gated = lambda *about: True

def work(D, hidden, rank, kind):
    def run():
        x = torch.zeros(5, 200, D, dtype=torch.bfloat16, requires_grad=True)
        weights = [torch.zeros(size, dtype=torch.bfloat16) for size in ((hidden, D), (hidden, D), (D, hidden))]
        sizes = [size for N, K in (weight.shape for weight in weights) for size in ((rank, K), (N, rank))]
        lora = [torch.zeros(5, *size, dtype=kind, requires_grad=True) for size in sizes]
        lora_swiglu_mlp(x, *weights, *lora, backend="triton").sum().backward()
    return run

kinds = torch.float32, torch.bfloat16, torch.float32, torch.bfloat16
for rank, kind in zip((1, 8, 12, 16), kinds, strict=True):
    for kernel in recorded(work(576, 1536, rank, kind)).values():
        if kernel.name not in ("_gated_in_turns", "_slopes_kernel"):
            continue
        compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
        is_gated = kernel.name == "_gated_in_turns"
        assert compiled.metadata.shared <= 232_448 / (1 if is_gated else 2), compiled.metadata.shared
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "-o", "/dev/null", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "C751" not in said and "0 bytes spill stores" in said, (rank, said)
        registers = int(said.partition(" registers")[0].rpartition(" ")[2]) * 32 * compiled.metadata.num_warps
        assert is_gated or registers <= 65_536 / 2, (rank, said)
        print(kernel.name)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_spill_nothing_and_their_matrix_instructions_overlap():
    """Of the middle of the backward two programs fit a multiprocessor."""
    assert sorted(compiled_for_hopper(COMPILED).split()) == ["_gated_in_turns"] * 4 + ["_slopes_kernel"] * 4


class TestOnTheGPU:
    pytestmark = gpu
    SMOL = {"D": 576, "hidden": 1536, "dtype": torch.bfloat16}

    @pytest.mark.parametrize("R", [(8, 8, 8), (4, 16, 12), (16, 16, 16)])
    @pytest.mark.parametrize(("documents", "length", "plain"), [(200, 1, False), (5, 300, True), (5, 1000, False)])
    def test_bf16_is_as_exact_as_plain_pytorch(self, R, documents, length, plain):
        """A document of one token gives dA the error of a rank's one number: many of them make a mean."""
        slots = (3, -1, 0, 2, 2) * (documents // 5)
        check(inputs(documents, length, R=R, ranks=(1, 4, 16, 9), slots=slots, plain=plain, **self.SMOL))

    @pytest.mark.parametrize("case", CASES)
    def test_bf16_of_small_ones(self, case):
        check(inputs(**CASES[case], dtype=torch.bfloat16))

    @pytest.mark.skipif(not CUDA or not is_hopper(DEVICE), reason="warps take turns on Hopper")
    @pytest.mark.parametrize("case", [{}, {"D": 80, "hidden": 272}, {"D": 16, "hidden": 144}])
    @pytest.mark.parametrize(("documents", "length"), [(5, 1), (5, 777), (70, 130), (3, 7001)])
    def test_in_turns_the_bits_are_the_same(self, documents, length, case, monkeypatch):
        """As of the launches that they stand for, in every run."""
        documents, length = few(documents, 10), few(length, 200)
        sizes, slots = self.SMOL | case, [-1, *(document % 4 for document in range(1, documents))]
        given = inputs(documents, length, R=(8, 4, 8), ranks=(1, 4, 8, 3), slots=slots, **sizes)
        made = []
        for is_in_turns in (False, True, True, True):
            monkeypatch.setattr(forward, "takes_gated", lambda *about, taken=is_in_turns: taken)
            made.append(results(OP, given))
        for again in made[1:]:
            for one, other in zip(made[0], again, strict=True):
                assert torch.equal(one, other)

    @pytest.mark.parametrize("hidden", [1536, 272])
    @pytest.mark.parametrize(("documents", "length", "slots"), [(5, 777, (3, -1, 2, 3, 7)), (64, 130, [1] * 64)])
    def test_the_middle_of_the_backward_in_one_launch_has_the_same_bits(
        self, documents, length, slots, hidden, monkeypatch
    ):
        sizes = self.SMOL | {"hidden": hidden}
        given = inputs(documents, length, R=(8, 4, 12), ranks=(1, 4, 12, 8), slots=slots, **sizes)
        apart, together, launched = both_ways(given, monkeypatch)
        assert launched == 1
        for one, other in zip(apart, together, strict=True):
            assert torch.equal(one, other)

    def test_runs_and_batches_give_the_same_bits(self):
        """Of 60 documents the launches' warps take turns, of one they don't."""
        given = inputs(60, 640, R=(8, 8, 8), ranks=range(1, 61), slots=range(60), count=60, **self.SMOL)
        first = results(OP, given)
        for _ in range(10):
            for one, other in zip(first, results(OP, given), strict=True):
                assert torch.equal(one, other)
        for some in (slice(0, 1), slice(7, 9), slice(20, 60)):
            part = {name: given[name][some].contiguous() for name in ("x", "dout", "slots")}
            for number, (one, other) in enumerate(zip(first, results(OP, given | part), strict=True)):
                assert torch.equal(one[some], other if number < 2 else other[some])

    def test_a_cuda_graph_replays_it(self):
        torch.use_deterministic_algorithms(False)
        given = inputs(8, 1024, slots=(3, -1, 0, 2, 3, 1, 0, 0), **self.SMOL)
        wanted = results(OP, given)
        held, replay = replayed(lambda: results(OP, given), warm_up=1)
        replay()
        for one, other in zip(wanted, held, strict=True):
            assert torch.equal(one, other)
