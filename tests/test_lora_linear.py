"""lora_linear and lora_mlp: as exact as plain PyTorch for every matrix that has an adapter, and the same every run."""

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import for_this_gpu
from klora.bench.tolerance import assert_as_exact
from klora.kernels import linear, lora_linear, lora_linear_ref, lora_mlp, lora_mlp_ref, lora_qkv, relu_squared_mlp
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

    def test_a_cuda_graph_replays_it(self):
        torch.use_deterministic_algorithms(False)
        given = inputs(5, 256, **self.SEED)
        wanted = results(lora_mlp, given)
        held, replay = replayed(lambda: results(lora_mlp, given), warm_up=1)
        replay()
        for one, other in zip(wanted, held, strict=True):
            assert torch.equal(one, other)
