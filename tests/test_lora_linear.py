"""lora_linear and lora_mlp: as exact as plain PyTorch for every matrix that has an adapter, and the same every run."""

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import compiled_for_hopper, for_this_gpu
from klora.bench.tolerance import assert_as_exact
from klora.kernels import linear, lora_linear, lora_linear_ref, lora_mlp, lora_mlp_ref, lora_qkv, relu_squared_mlp
from klora.kernels.lora_qkv.forward import launch_forward, pick_forward_config
from torch import Tensor

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA GPU")]
UP, DOWN = ("up_a", "up_b"), ("down_a", "down_b")


def inputs(
    batch=3, length=5, K=32, N=48, ranks=(8, 3), slots=None, count=None, dtype=torch.float32, seed=0, low=False
) -> dict[str, Tensor]:
    """What lora_mlp takes, K wide and N hidden, and dout; the adapters are fp32, or (low) like x."""
    draw, count = torch.Generator().manual_seed(seed), count or batch

    def randn(*size: int, scale: float = 1.0, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(DEVICE, like)

    adapters = {"like": dtype if low else torch.float32}
    given = {"x": randn(batch, length, K), "up": randn(N, K, scale=K**-0.5), "down": randn(K, N, scale=N**-0.5)}
    for name, outputs, width, rank in (("up", N, K, ranks[0]), ("down", K, N, ranks[1])):
        given[f"{name}_a"] = randn(count, rank, width, scale=width**-0.5, **adapters)
        given[f"{name}_b"] = randn(count, outputs, rank, scale=0.3, **adapters)
    given["slots"] = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    return given | {"dout": randn(batch, length, K)}


def product(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What lora_linear takes, of the matrix down: x is [B, S, N]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*given["x"].shape[:2], given["down"].size(1), generator=generator).to(given["x"])
    names = {"weight": "down", "lora_a": "down_a", "lora_b": "down_b", "slots": "slots", "dout": "dout"}
    return {"x": x, **{name: given[other] for name, other in names.items()}}


def results(function, given, wanted=None, **more) -> list[Tensor]:
    """The output, then the gradients of x and the adapters (or of what is wanted)."""
    wanted = [n for n in given if n == "x" or n.endswith(("_a", "_b"))] if wanted is None else wanted
    leaves = {name: given[name].detach().requires_grad_() for name in wanted if given[name] is not None}
    rest = {name: t for name, t in given.items() if name not in leaves and name != "dout"}
    out = function(**rest, **leaves, **more)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), given["dout"])]


def exact(given):
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in given.items()}


def assert_as_exact_as_plain_pytorch(function, reference, given, wanted=None):
    ours, plain = results(function, given, wanted, backend="triton"), results(reference, given, wanted)
    assert_as_exact(ours, results(reference, exact(given), wanted), plain)


BOTH = {"lora_linear": (lora_linear, lora_linear_ref, product), "lora_mlp": (lora_mlp, lora_mlp_ref, dict)}
SHAPES = [
    {"batch": 2, "length": 33, "K": 48, "N": 80, "ranks": (3, 20), "slots": [1, 0]},
    {"batch": 3, "length": 7, "K": 16, "N": 32, "ranks": (1, 16), "slots": [3, -1, 3], "count": 5},
    {"batch": 2, "length": 130, "K": 144, "N": 272, "ranks": (8, 8)},
]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("case", "dtype", "low"), [(0, torch.float32, False), (1, torch.float32, True),
                                                    (1, torch.float16, False), (2, torch.float16, True)])  # fmt: skip
def test_outputs_and_gradients_are_as_exact_as_plain_pytorchs(name, case, dtype, low):
    function, reference, take = BOTH[name]
    assert_as_exact_as_plain_pytorch(function, reference, take(inputs(**SHAPES[case], dtype=dtype, low=low)))


def test_a_tile_has_192_outputs_where_tiles_of_256_would_have_a_ninth_more_columns():
    def outputs(*sizes, dtype=torch.bfloat16, rank=8):
        return pick_forward_config(dtype, rank, len(sizes), plain_sizes=sizes).outputs

    assert [outputs(size) for size in (16, 192, 288, 384, 576, 1152)] == [192] * 6
    assert [outputs(size) for size in (208, 256, 512, 640, 960, 1024, 1536, 2048)] == [256] * 8
    assert outputs(576, 192, 192) == outputs(576, rank=16) == outputs(576, dtype=torch.float16) == 192
    assert outputs(512, 256, 256) == outputs(512, 192, 256) == outputs(576, rank=17) == 256
    assert outputs(576, dtype=torch.float32) == 64
    assert pick_forward_config(torch.bfloat16, 8).outputs == 256, "of heads, squares and unnormed rows"


TAILED = {
    "a tail that ends early": {"batch": 2, "length": 130, "N": 80, "K": 336, "ranks": (1, 8)},
    "a tail past the end": {"length": 40, "N": 448, "K": 288, "ranks": (1, 1), "slots": [3, -1, 3], "count": 5},
    "full tiles": {"batch": 2, "length": 7, "N": 384, "K": 576, "ranks": (1, 16), "slots": [1, 0]},
    "short": {"batch": 5, "length": 129, "N": 64, "K": 48, "ranks": (1, 3), "slots": [2, 2, 0, 7, 1], "count": 3},
}
"""Of :func:`product`: K outputs of N features. Steps are 64 features, and a tile's six pieces leave one a step of the
next: fewer steps than pieces, as many, and more; programs have several tiles."""


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("case", TAILED)
def test_tiles_with_a_tail_are_as_exact_as_plain_pytorch(case, low):
    given = product(inputs(**TAILED[case], dtype=torch.float16, low=low))
    assert pick_forward_config(torch.float16, given["lora_b"].size(2), 1, False, given["weight"].shape[:1]).tail
    assert_as_exact_as_plain_pytorch(lora_linear, lora_linear_ref, given)
    bias = torch.randn(given["weight"].size(0), generator=torch.Generator().manual_seed(2)).to(given["x"])
    assert_as_exact_as_plain_pytorch(lora_linear, lora_linear_ref, given | {"bias": bias})


def test_hidden_units_that_are_squared_have_no_tail():
    """Their tiles leave another way, in the forward; 288 of them are two tiles of 256, and of 192."""
    given = inputs(2, 40, K=48, N=288, dtype=torch.float16)
    assert_as_exact_as_plain_pytorch(lora_mlp, lora_mlp_ref, given)
    call = (*(given[name] for name in ("x", "up", *UP)), None, [288])
    alone, with_u = (launch_forward(*call, squared=True, u=u).outs[0] for u in (None, given["x"].new_empty(2, 40, 288)))
    assert torch.equal(alone, with_u)


COMPILED_FOR_HOPPER = """
import re, subprocess, tempfile
import torch, triton
from hopper import pretend
from klora.kernels import lora_linear, lora_qkv
from klora.kernels.precompile import recorded

pretend()

def work(*sizes, low, bias=False):
    def run():
        N, three, kind = sum(sizes), () if len(sizes) == 1 else (3,), torch.bfloat16 if low else torch.float32
        x, weight = torch.zeros(4, 200, 576, dtype=torch.bfloat16), torch.zeros(N, 576, dtype=torch.bfloat16)
        lora = torch.zeros(9, *three, 8, 576, dtype=kind), torch.zeros(9, N, 8, dtype=kind)
        slots, more = torch.zeros(4, dtype=torch.int32), {"bias": weight[:, 0].contiguous()} if bias else {}
        more |= {"sizes": sizes} if three else {}
        (lora_qkv if three else lora_linear)(x, weight, *lora, slots, **more, backend="triton")
    return run

for run in (work(576, low=True), work(576, low=False, bias=True), work(576, 192, 192, low=False)):
    kernel, = (one for one in recorded(run).values() if one.name == "_forward_kernel")
    compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
    assert compiled.metadata.shared <= 232_448, compiled.metadata.shared
    assert compiled.asm["ttgir"].count("ttng.wait_barrier") == 1, "a step's four loads share one"
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "-o", "/dev/null", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert " 0 bytes spill stores, 0 bytes spill loads" in said and "serialized" not in said, said
    print(*sorted(set(re.findall("wgmma.mma_async.sync.aligned.m64n([0-9]+)k16", ptx)), key=int))
"""


@pytest.mark.slow
def test_a_tile_with_a_tail_compiles_for_hopper_to_wide_products_that_overlap_and_spill_nothing():
    """In a process where Triton is itself."""
    assert compiled_for_hopper(COMPILED_FOR_HOPPER).splitlines() == ["16 64 128"] * 3


THREE_TILES = {"K": 80, "N": 576, "slots": [1, -1, 1], "count": 2}
"""A product of 576 features: dx takes tiles of 192 columns, which documents of 200 tokens do not fill."""


@pytest.mark.parametrize(("rank", "low"), [(1, True), (8, False), (16, True)])
def test_tiles_of_192_columns(rank, low):
    given = product(inputs(3, 200, **THREE_TILES, ranks=(1, rank), dtype=torch.float16, low=low))
    assert_as_exact_as_plain_pytorch(lora_linear, lora_linear_ref, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [UP, DOWN], ids=["down alone", "up alone"])
def test_an_mlp_with_one_adapter(absent, dtype):
    given = inputs(2, 40, dtype=dtype, slots=[1, 0]) | dict.fromkeys(absent)
    assert_as_exact_as_plain_pytorch(lora_mlp, lora_mlp_ref, given)


@pytest.mark.parametrize("name", BOTH)
def test_weights_get_gradients_as_well(name):
    function, reference, take = BOTH[name]
    given = take(inputs(2, 9))
    assert_as_exact_as_plain_pytorch(
        function, reference, given, ["weight"] if name == "lora_linear" else ["up", "down"]
    )


@pytest.mark.parametrize("wanted", [("x",), ("up_a",), ("up_b",), ("down_a",), ("down_b", "x"), ("up_a", "down_b")])
def test_only_the_gradients_that_are_wanted(wanted):
    given = inputs(2, 9, slots=[1, 0])
    assert_as_exact_as_plain_pytorch(lora_mlp, lora_mlp_ref, given, list(wanted))


@pytest.mark.parametrize("rank", [80, 128, 129])
def test_large_ranks(rank):
    given = product(inputs(1, 9, ranks=(1, rank)))
    assert_as_exact_as_plain_pytorch(lora_linear, lora_linear_ref, given)


def test_an_mlps_ranks_end_at_128():
    with pytest.raises(ValueError, match="R is 129; wanted a positive number up to 128"):
        results(lora_mlp, inputs(1, 2, ranks=(1, 129)), backend="triton")


def test_it_is_a_projection_of_lora_qkv_to_the_bit():
    given = product(inputs(2, 40, K=96, N=32, dtype=torch.float16))
    x, weight, a, b = (given[name] for name in ("x", "weight", "lora_a", "lora_b"))
    ours = lora_linear(x, weight, a, b, backend="triton")
    three = lora_qkv(x, weight, a[:, None].expand(-1, 3, -1, -1).contiguous(), b, backend="triton")
    assert torch.equal(ours, torch.cat(three, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_document_without_an_adapter_has_the_bits_of_an_adapter_of_zeros(dtype):
    given = inputs(2, 40, slots=[-1, 0], dtype=dtype)
    nothing = {name: torch.zeros_like(given[name]) for name in (*UP, *DOWN)}
    ours, zeros = (results(lora_mlp, given | some, ["x"], backend="triton") for some in ({}, nothing))
    for one, other in zip(ours, zeros, strict=True):
        assert torch.equal(one[0], other[0])
    plain = relu_squared_mlp(given["x"], given["up"], given["down"], backend="triton")
    torch.testing.assert_close(ours[0][0], plain[0])
    ours = results(lora_linear, product(given), ["x"], backend="triton")[0][0]
    torch.testing.assert_close(ours, linear(product(given)["x"], given["down"], backend="triton")[0])


@pytest.mark.parametrize("name", BOTH)
def test_a_documents_bits_do_not_depend_on_its_batch_mates(name):
    function, _, take = BOTH[name]
    given = take(inputs(3, 40, dtype=torch.float16))
    together = results(function, given, backend="triton")
    per_document = [n for n in given if n in ("x", "dout") or n.endswith(("_a", "_b"))]
    torn = {n: given[n].index_fill(0, torch.tensor([0, 2], device=DEVICE), float("nan")) for n in per_document}
    alone = {n: given[n][1:2].contiguous() for n in per_document}
    among_nans, single = (results(function, given | some, backend="triton") for some in (torn, alone))
    for one, other, own in zip(together, among_nans, single, strict=True):
        assert torch.equal(one[1], other[1]) and torch.equal(one[1], own[0])


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("rank", [8, 3])  # rows of 16 bytes, and rows that have to be copied
def test_gradients_are_written_to_the_named_rows_of_a_pool(rank, low):
    given = inputs(3, 9, ranks=(rank, rank), slots=[3, -1, 1], count=5, dtype=torch.float16, low=low)
    wanted = results(lora_mlp, given, backend="triton")
    sizes = [given[name][0].numel() for name in (*UP, *DOWN)]
    pool = torch.full((5, sum(sizes) + 5), 7.0, device=DEVICE)
    views = [rows.view(given[n].shape) for rows, n in zip(pool[:, 5:].split(sizes, 1), (*UP, *DOWN), strict=True)]
    into = {"up_grads": tuple(views[:2]), "down_grads": tuple(views[2:])}
    out, dx = results(lora_mlp, given, ["x"], backend="triton", **into)
    assert torch.equal(out, wanted[0]) and torch.equal(dx, wanted[1])
    for view, gradient in zip(views, wanted[2:], strict=True):
        torch.testing.assert_close(view[[1, 3]].to(gradient.dtype), gradient[[1, 3]], rtol=0, atol=0)
    assert (pool[[0, 2, 4]] == 7.0).all() and (pool[:, :5] == 7.0).all()
    given, grads = product(given), (torch.full_like(views[2], 7.0), torch.full_like(views[3], 7.0))
    _, dx, *wanted = results(lora_linear, given, backend="triton")
    assert torch.equal(dx, results(lora_linear, given, ["x"], backend="triton", grads=grads)[1])
    for grad, gradient in zip(grads, wanted, strict=True):
        assert torch.equal(grad[[1, 3]].to(gradient.dtype), gradient[[1, 3]]) and (grad[[0, 2, 4]] == 7.0).all()


@pytest.mark.parametrize("slots", [None, [2, -1, 3, 0]])
def test_no_tokens_write_zeros_to_the_named_rows_of_a_pool(slots):
    given = inputs(4, 0, slots=slots)
    grads = {f"{n}_grads": tuple(torch.full_like(given[f"{n}_{p}"], 7.0) for p in "ab") for n in ("up", "down")}
    results(lora_mlp, given, ["x"], backend="triton", **grads)
    for grad in (*grads["up_grads"], *grads["down_grads"]):
        assert [float(row.abs().max()) for row in grad] == ([0.0] * 4 if slots is None else [0.0, 7.0, 0.0, 0.0])


def test_a_row_that_is_not_finite_leaves_a_nan_where_pytorch_does():
    given = inputs(1, 6)
    given["x"][0, 2, 3] = float("nan")
    ours, plain = (results(f, given, **m) for f, m in ((lora_mlp, {"backend": "triton"}), (lora_mlp_ref, {})))
    assert torch.equal(ours[0].isnan(), plain[0].isnan()) and ours[0].isnan().any()


GIVEN = {name: t for name, t in inputs().items() if name != "dout"}
BAD = {
    "up is float32 \\[48, 16\\]; wanted float32 \\[hidden, 32\\]": {"up": GIVEN["up"][:, :16]},
    "x is float32 .*; wanted bfloat16, float16 or float32 \\[B, S, D\\]": {"x": GIVEN["x"][0]},
    "up is float16 .*; wanted float32": {"up": GIVEN["up"].half()},
    "up_a is float32 \\[3, 8, 16\\]; wanted float32 \\[slots, R, 32\\]": {"up_a": GIVEN["up_a"][..., :16]},
    "down_b is float32 \\[3, 32, 2\\]": {"down_b": GIVEN["down_b"][..., :2]},
    "2 slots are not one for each of 3": {"up_a": GIVEN["up_a"][:2], "up_b": GIVEN["up_b"][:2]},
    "slots is float32 \\[3\\]": {"slots": torch.zeros(3, device=DEVICE)},
    "up_a, up_b and up_grads: wanted A with B": {"up_b": None},
    "down_a, down_b and down_grads: wanted": {"down_a": None, "down_b": None, "down_grads": (GIVEN["up_a"],) * 2},
    "no adapter is given; relu_squared_mlp": dict.fromkeys((*UP, *DOWN)),
    "grads.0. is float32": {"up_grads": (GIVEN["up_b"], GIVEN["up_a"])},
    "grads is given, and the reference has no backward": {
        "backend": "reference",
        "up_grads": (GIVEN["up_a"], GIVEN["up_b"]),
    },
    "backend is 'cuda'": {"backend": "cuda"},
    "up_a is float16 .*; wanted float32": {"up_a": GIVEN["up_a"].half(), "up_b": GIVEN["up_b"].half()},
    "up_b is float16 .*; wanted float32": {"up_b": GIVEN["up_b"].half()},
    "up_a is .* on meta; wanted .* on": {"up_a": GIVEN["up_a"].to("meta")},
    "N of up is 40; wanted a positive mult.*16": {
        "up": GIVEN["up"][:40],
        "up_b": GIVEN["up_b"][:, :40],
        "down": GIVEN["down"][:, :40],
        "down_a": GIVEN["down_a"][..., :40],
    },
}


@pytest.mark.parametrize(("message", "changed"), BAD.items(), ids=range(len(BAD)))
def test_bad_input_is_refused_with_what_was_given_and_what_is_allowed(message, changed):
    with pytest.raises(ValueError, match=message):
        lora_mlp(**{**GIVEN, "backend": "triton", **changed})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("absent", "slots", "dtype"),
    [((), None, torch.float32), ((), [1, 0], torch.float16), (UP, [1, 0], torch.float32), (DOWN, None, torch.float16)],
)
def test_opcheck_of_an_mlp(absent, slots, dtype):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs, and unused padding is fresh memory
    given = inputs(2, 5, slots=slots, dtype=dtype) | dict.fromkeys(absent)
    names = "x", "up", "down", *UP, *DOWN
    leaves = [t if t is None or n in ("up", "down") else t.requires_grad_() for n, t in ((n, given[n]) for n in names)]
    torch.library.opcheck(torch.ops.klora.lora_mlp.default, (*leaves, given["slots"], *(None,) * 4))


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, [1, 0]])
def test_opcheck_of_a_product(slots):
    torch.use_deterministic_algorithms(False)
    given = product({name: None if t is None else t.detach() for name, t in inputs(2, 5, slots=slots).items()})
    leaves = [given["x"].requires_grad_(), given["weight"], given["lora_a"].requires_grad_(), given["lora_b"]]
    torch.library.opcheck(torch.ops.klora.lora_linear.default, (*leaves, given["slots"], *(None,) * 5))


@pytest.mark.slow
@pytest.mark.parametrize("into_pool", [False, True])
def test_compile_with_fullgraph_gives_the_same_bits(into_pool):
    given = inputs(2, 5, slots=[1, 0])
    grads = {f"{n}_grads": tuple(torch.zeros_like(given[f"{n}_{p}"]) for p in "ab") for n in ("up", "down")}

    def loss(x, up_a, up_b, down_a, down_b):
        more = {"up": given["up"], "down": given["down"], "slots": given["slots"], "backend": "triton"}
        more |= grads if into_pool else {}
        out = lora_mlp(x * 1.0, up_a=up_a, up_b=up_b, down_a=down_a, down_b=down_b, **more)
        return (out * given["dout"]).sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [given[name].clone().requires_grad_() for name in ("x", *UP, *DOWN)]
        function(*leaves).backward()
        own = [leaf.grad for leaf in leaves[1:]]
        found.append([leaves[0].grad, *((*grads["up_grads"], *grads["down_grads"]) if into_pool else own)])
        found[-1] = [t.clone() for t in found[-1]]
        for pair in grads.values():
            [grad.zero_() for grad in pair]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.any()


class TestOnTheGPU:
    pytestmark = gpu
    SEED = {"slots": [4, 0, 6, 2, 4], "count": 8, "K": 512, "N": 1536, "dtype": torch.bfloat16}

    @pytest.mark.parametrize("name", BOTH)
    @pytest.mark.parametrize("ranks", [(8, 16), (24, 64), (80, 128)])
    @pytest.mark.parametrize(("length", "low"), [(1, False), (7, True), (1000, False)])
    def test_bf16_of_the_seed_is_as_exact_as_plain_pytorch(self, name, ranks, length, low):
        function, reference, take = BOTH[name]
        given = take(inputs(5, length, **self.SEED, ranks=ranks, low=low))
        assert_as_exact_as_plain_pytorch(function, reference, given)

    @pytest.mark.parametrize("name", BOTH)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("case", [0, 1, 2])
    def test_other_widths_ranks_and_dtypes(self, name, dtype, case):
        function, reference, take = BOTH[name]
        assert_as_exact_as_plain_pytorch(function, reference, take(inputs(**SHAPES[case], dtype=dtype)))

    @pytest.mark.parametrize(("length", "K", "rank"), [(5000, 576, 8), (200, 1008, 1), (33, 192, 16)])
    def test_tiles_of_192_columns(self, length, K, rank):
        case = {**THREE_TILES, "K": K, "ranks": (1, rank), "dtype": torch.bfloat16}
        given = product(inputs(3, for_this_gpu(length, 576), **case))
        assert_as_exact_as_plain_pytorch(lora_linear, lora_linear_ref, given)

    @pytest.mark.parametrize("absent", [UP, DOWN])
    def test_an_mlp_with_one_adapter(self, absent):
        given = inputs(5, 300, **self.SEED) | dict.fromkeys(absent)
        assert_as_exact_as_plain_pytorch(lora_mlp, lora_mlp_ref, given)

    @pytest.mark.parametrize("rank", [80, 128])
    def test_ranks_above_64_in_fp32(self, rank):
        given = product(inputs(2, 70, K=64, N=128, ranks=(1, rank)))
        assert_as_exact_as_plain_pytorch(lora_linear, lora_linear_ref, given)

    @pytest.mark.parametrize("name", BOTH)
    def test_twenty_runs_and_any_batch_give_the_same_bits(self, name):
        function, _, take = BOTH[name]
        given = take(inputs(40, 255, **{**self.SEED, "slots": list(range(40)), "count": 40}))
        first = results(function, given, backend="triton")
        for _ in range(20):
            for one, other in zip(first, results(function, given, backend="triton"), strict=True):
                assert torch.equal(one, other)
        some = {n: given[n][3:5].contiguous() for n in ("x", "dout", "slots")}
        again = results(function, given | some, backend="triton")
        for number, (one, other) in enumerate(zip(first, again, strict=True)):
            assert torch.equal(one[3:5], other if number < 2 else other[3:5])  # out and dx; gradients of the pool

    @pytest.mark.parametrize(("outputs", "K"), [(576, 576), (192, 576), (576, 1536)])
    @pytest.mark.parametrize(("length", "low"), [(7, True), (1000, False)])
    def test_tiles_with_a_tail_are_as_exact_as_plain_pytorch_and_the_same_every_run(self, outputs, K, length, low):
        """16 documents of 1,000 tokens are three tiles a program with 576 outputs, one with 192."""
        batch = -(-for_this_gpu(16 * length, outputs) // length)
        slots, generator = [(4 * b) % 7 - 1 for b in range(batch)], torch.Generator().manual_seed(3)
        for dtype, rank in ((torch.bfloat16, 8), (torch.float16, 16)):
            given = product(inputs(batch, length, outputs, K, (1, rank), slots, 7, dtype, low=low))
            assert_as_exact_as_plain_pytorch(lora_linear, lora_linear_ref, given)
            given["bias"] = torch.randn(outputs, generator=generator).to(given["x"])
            assert_as_exact_as_plain_pytorch(lora_linear, lora_linear_ref, given)
            first = results(lora_linear, given, backend="triton")
            for _ in range(5):
                for one, other in zip(first, results(lora_linear, given, backend="triton"), strict=True):
                    assert torch.equal(one, other)
            some = {name: given[name][3:5].contiguous() for name in ("x", "dout", "slots")} if batch > 4 else {}
            again = results(lora_linear, given | some, backend="triton")
            for one, other in zip(first[:2], again[:2], strict=True):  # y and dx
                assert torch.equal(one[3:5] if some else one, other)

    def test_a_cuda_graph_replays_it(self):
        torch.use_deterministic_algorithms(False)
        given = inputs(5, 256, **self.SEED)
        wanted = results(lora_mlp, given)
        held, replay = replayed(lambda: results(lora_mlp, given), warm_up=1)
        replay()
        for one, other in zip(wanted, held, strict=True):
            assert torch.equal(one, other)
