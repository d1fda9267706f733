"""lora_linear for anyone's model: own ranks, scale, bias, dropout, six bits, odd sizes, several projections."""

import importlib
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from conftest import DTYPES, replayed
from hopper import compiled_for_hopper, few
from klora.bench.tolerance import assert_as_exact
from klora.kernels import Dropout, Int6Matrix, drop_ref, lora_linear, lora_linear_ref, quantize_int6, row_keys
from klora.kernels.lora_linear import after, reduce
from klora.kernels.lora_linear.inner import (
    launch_inner,
    launch_tiled_inner,
    pick_inner_config,
    pick_tiled_inner_config,
)
from klora.kernels.lora_linear.plan import dx_way, plan
from klora.kernels.lora_linear.pool import Pool, variant_of, variants
from klora.kernels.lora_qkv.adapters import adapters_of
from torch import Tensor

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA GPU")]
RANKS = (1, 5, 17, 64)


def inputs(
    sizes=(40,),
    batch=4,
    length=66,
    K=24,
    R=64,
    ranks=RANKS,
    slots=(3, -1, 0, 2),
    count=4,
    dtype=torch.float32,
    low=False,
    int6=False,
    rate=0.0,
    plain=False,
    has_bias=True,
) -> dict[str, Any]:
    """What lora_linear takes for projections of these sizes, and the outputs' gradients; `plain`: no bias, no scale."""
    draw = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(DEVICE, like)

    kind = dtype if low else torch.float32
    weights = [randn(N, K, scale=K**-0.5) for N in sizes]
    return {
        "x": randn(batch, length, K),
        "weight": [quantize_int6(weight.float()) for weight in weights] if int6 else weights,
        "lora_a": [randn(count, R, K, scale=K**-0.5, like=kind) for _ in sizes],
        "lora_b": [randn(count, N, R, scale=0.3, like=kind) for N in sizes],
        "slots": None if slots is None else torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        "bias": None if plain or not has_bias else [randn(N) for N in sizes],
        "scale": None if plain else [randn(count, like=torch.float32).abs() + 0.5 for _ in sizes],
        "ranks": None if ranks is None else [torch.tensor(ranks, dtype=torch.int32, device=DEVICE) for _ in sizes],
        "dropout": Dropout(rate, [row_keys(p, torch.arange(batch, device=DEVICE)) for p in range(len(sizes))])
        if rate
        else None,
        "douts": [randn(batch, length, N) for N in sizes],
    }


LEAVES = ("x", "lora_a", "lora_b", "bias")
AB = ("lora_a", 1), ("lora_b", 2)
"""And where their ranks are."""


def results(function, given: dict[str, Any], **more) -> list[Tensor]:
    """The outputs, then the gradients of x, A, B and the bias."""
    given = dict(given)
    douts, leaves = given.pop("douts"), []
    for name in LEAVES:
        if given[name] is not None:
            one = [given[name]] if name == "x" else given[name]
            one = [tensor.detach().requires_grad_() for tensor in one]
            given[name] = one[0] if name == "x" else one
            leaves.extend(one)
    outs = function(**given, **more)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts)]


def exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: one if name in ("dropout", "ranks", "slots") else exact(one) for name, one in value.items()}
    if isinstance(value, list):
        return [exact(one) for one in value]
    return value.double() if isinstance(value, Tensor) else value


def assert_as_exact_as_plain_pytorch(given: dict[str, Any]) -> None:
    ours, plain = results(lora_linear, given, backend="triton"), results(lora_linear_ref, given)
    assert_as_exact(ours, results(lora_linear_ref, exact(given)), plain)


CASES = {
    "odd sizes, unlike ranks": {},
    "six bits": {"int6": True, "K": 64},
    "dropout": {"rate": 0.3},
    "three projections, dropout": {"sizes": (40, 24, 16), "rate": 0.2, "ranks": (0, 3, 20, 9), "R": 20},
    "six bits, 192 inputs": {"int6": True, "sizes": (200,), "K": 192},
    "three at six bits": {"sizes": (40, 16, 16), "int6": True, "K": 32, "R": 8, "ranks": (1, 3, 8, 4)},
    "a slot three times": {"sizes": (40, 24), "plain": True, "low": True, "slots": (1, 1, 0, 1), "R": 17},
    "no multiples of 8": {"sizes": (17,), "K": 7, "R": 3, "ranks": None, "slots": None},
    "joint, with all": {"sizes": (48,), "K": 32, "R": 8, "ranks": (1, 5, 8, 0), "slots": (1, 1, 0, 3)},
    "joint, its dtype": {"sizes": (32,), "K": 16, "R": 16, "ranks": (1, 9, 16, 4), "low": True, "slots": (1, 2, 0, 3)},
    "after, its dtype, in place": {"plain": True, "low": True, "ranks": None, "R": 24},
    "after, two steps of ranks": {"R": 80, "ranks": (1, 80, 64, 70), "slots": (1, 3, -1, 1)},
    "no document with an adapter": {"slots": (-1, 7, -1, -1)},
    "stacked, two": {
        "sizes": (48, 32),
        "K": 32,
        "R": 8,
        "ranks": (1, 5, 8, 0),
        "slots": (1, 1, 0, 3),
        "has_bias": False,
    },
    "stacked, three": {"sizes": (48, 16, 32), "K": 48, "R": 16, "ranks": (1, 9, 16, 4), "has_bias": False},
    "stacked, its dtype": {"sizes": (16, 80), "K": 16, "R": 4, "ranks": None, "low": True, "plain": True},
    "joint, above 16": {"sizes": (48,), "K": 32, "R": 20, "ranks": (1, 5, 20, 0), "slots": (1, 2, 0, 3)},
    "of 256": {"sizes": (16,), "K": 16, "R": 256, "ranks": (256, 5, 200, 129), "slots": (1, 3, 2, 0), "length": 5},
    "above 128": {"sizes": (48,), "K": 32, "R": 200, "ranks": (1, 5, 200, 70), "slots": (1, 3, 2, 3), "length": 9},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "three at six bits")) for c in CASES]
)
def test_outputs_and_gradients_are_as_exact_as_plain_pytorchs(case, dtype):
    assert_as_exact_as_plain_pytorch(inputs(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("stacked")])
def test_projections_are_stacked(case, monkeypatch):
    module, calls = importlib.import_module("klora.kernels.lora_linear.op"), []
    stacked = module.stacked_linears
    monkeypatch.setattr(module, "stacked_linears", lambda x, given: calls.append(given) or stacked(x, given))
    given = inputs(**CASES[case], dtype=torch.float16)
    results(lora_linear, given, backend="triton")
    assert len(calls) == 1
    no_scale = {"scale": None, "ranks": None}
    no_stack = [
        {"weight": [weight.clone().requires_grad_() for weight in given["weight"]]},
        {"bias": [torch.zeros_like(weight[:, 0]) for weight in given["weight"]]},
        {name: [torch.cat([one] * 17) for one in given[name]] for name in ("lora_a", "lora_b")} | no_scale,
        {name: [given[name][0], torch.cat([given[name][1]] * 2, dim)] + given[name][2:] for name, dim in AB},
    ]
    for changed in (*no_stack, {"stacks": False}):
        results(lora_linear, given | changed, backend="triton")
    assert len(calls) == 1


def test_a_weight_in_shares_gives_the_same_bits(monkeypatch):
    """Its columns are taken in groups where all of them would not stay in L2; the last group may be smaller."""
    given = inputs(sizes=(600,), K=24, length=200, dtype=torch.float16)
    whole = results(lora_linear, given, backend="triton")
    monkeypatch.setattr(after, "WEIGHT_IN_L2", 2 * 256 * 24 * 2)
    assert after.columns_at_a_time(3, 256 * 24, 2) == 2
    monkeypatch.setattr(after, "programs", lambda device, tiles: 5)
    for one, other in zip(whole, results(lora_linear, given, backend="triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [{}, {"sizes": (40, 16), "R": 8, "ranks": (1, 3, 8, 4)}, {"rate": 0.3}])
def test_six_bits_are_unpacked_for_many_rows(case, monkeypatch):
    """Then a product has the bits that it has by the dense weight: y, and dx of one projection without dropout."""
    monkeypatch.setattr(importlib.import_module("klora.kernels.lora_linear.plan"), "UNPACKED", 4 * 66)
    given = inputs(**{"int6": True, "dtype": torch.float16} | case)
    assert_as_exact_as_plain_pytorch(given)
    dense = {**given, "weight": [matrix.dequantize(torch.float16) for matrix in given["weight"]]}
    ours, theirs = (results(lora_linear, one, backend="triton") for one in (given, dense))
    same = len(ours) if not case else len(given["weight"])
    assert all(torch.equal(*pair) for pair in zip(ours[:same], theirs[:same], strict=True))


def test_every_way_is_reached_by_shape():
    def way(N, K, rank=8, dropout=False, dtype=torch.bfloat16, projections=1, length=1024, int6=False, stack=False):
        about = {"has_dropout": dropout, "has_int6": int6, "can_stack": stack}
        return plan([(N, K)] * projections, dtype, 2, length, rank, **about)

    assert way(512, 512) == way(1024, 1024) == way(1024, 512, 32) == way(512, 512, 64) == way(576, 1536) == "joint"
    assert way(1552, 1024) == way(2048, 2048) == way(512, 2048, 16) == way(1024, 512, 64) == way(4096, 4096) == "after"
    assert way(2048, 2048, length=63) == way(2048, 2048, dtype=torch.float32) == "joint"  # where `added` is left
    assert way(24, 40) == way(512, 512, projections=3) == way(512, 512, dropout=True) == way(512, 512, 200) == "after"
    assert way(4096, 4096, dtype=torch.float32) == way(20, 40) == way(4096, 4096, length=63) == "added"
    assert way(512, 512, length=1) == way(512, 512, stack=True) == "joint"
    assert way(512, 512, projections=2, stack=True) == way(1536, 576, 16, projections=3, stack=True) == "stacked"
    assert way(512, 512, 17, projections=2, stack=True) == way(512, 512, projections=4, stack=True) == "after"
    assert way(512, 520, projections=2, stack=True) == way(2048, 512, projections=2, stack=True) == "after"
    assert way(512, 512, projections=2, stack=True, dropout=True) == "after"
    assert way(512, 512, projections=2, stack=True, int6=True) == "after"
    assert way(512, 512, int6=True) == way(512, 512, int6=True, projections=3) == "after"
    assert way(512, 512, int6=True, length=1023) == way(512, 512, int6=True, dtype=torch.float32) == "added"
    assert dx_way("after", 1, False) == "after" and dx_way("after", 1, True) == dx_way("after", 3, False) == "added"


@pytest.mark.parametrize(
    ("K", "dtype"), [(24, torch.float16), pytest.param(24, torch.float32, marks=pytest.mark.slow), (32, torch.float16)]
)
def test_what_lies_above_an_adapters_rank_is_not_read_and_gets_no_gradient(K, dtype):
    R, N = (16, 48) if K == 32 else (40, 40)
    given = inputs((N,), K=K, R=R, ranks=(3, 0, 16, 5), slots=(0, 1, 2, 2), dtype=dtype)
    wanted = results(lora_linear, given, backend="triton")
    for slot, rank in enumerate((3, 0, 16, 5)):
        given["lora_a"][0][slot, rank:], given["lora_b"][0][slot, :, rank:] = torch.nan, torch.nan
    for one, other in zip(wanted, results(lora_linear, given, backend="triton"), strict=True):
        assert torch.equal(one, other)
    _, _, da, db, _ = wanted
    for slot, rank in enumerate((3, 0, 16)):
        assert not da[slot, rank:].any() and not db[slot, :, rank:].any()
        assert not rank or (da[slot, :rank].any(1).all() and db[slot, :, :rank].any(0).all())


@pytest.mark.parametrize("processors", [114, 132])
def test_few_rows_are_counted_by_the_gpus_own_multiprocessors(processors):
    few, many = (pick_tiled_inner_config(16, rows, processors) for rows in (128 * processors, 128 * processors + 1))
    assert (few.block_m, many.block_m) == (64, 128)


@triton.jit
def _widths(out_ptr, ranks_ptr, VARIANTS: tl.constexpr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, 16 << variant_of(tl.load(ranks_ptr + i), VARIANTS))


@pytest.mark.skipif(CUDA, reason="a kernel of a test's own, for the interpreter")
def test_an_adapter_takes_a_product_as_wide_as_its_own_rank():
    ranks = torch.tensor([1, 16, 17, 32, 33, 64, 200], dtype=torch.int32)
    for widest, wanted in ((200, [16, 16, 32, 32, 64, 64, 64]), (20, [16, 16, 32, 32]), (3, [16, 16])):
        out, config = torch.zeros(len(wanted), dtype=torch.int32), pick_inner_config(torch.bfloat16, widest)
        _widths[(len(wanted),)](out, ranks, variants(config.ranks))
        assert out.tolist() == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [{"sizes": (40, 16)}, {"sizes": (40, 16), "rate": 0.4}, {"dtype": torch.float16, "length": 70}],
)
def test_parts_of_a_slot_are_added_in_one_order(case, monkeypatch):
    """A slot with one document of one part, one with two, and documents of several parts; the last by the copy
    engine.
    """
    given = inputs(**{"length": 40, "R": 20, "ranks": (20, 3, 17, 20), "slots": (1, 3, 1, -1)} | case)
    whole = results(lora_linear, given, backend="triton")
    monkeypatch.setattr(reduce, "PART", 16)
    assert_as_exact_as_plain_pytorch(given)
    again, first = (results(lora_linear, given, backend="triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))
    torch.testing.assert_close(again, whole)


def test_a_slot_that_no_document_has_gets_zeros():
    """Of several parts and of one, where the pool's gradients are fresh memory."""
    for given in (inputs(dtype=torch.float16), inputs((40, 16), slots=(1, 1, 1, 1))):
        named = {slot for slot in given["slots"].tolist() if slot >= 0}
        grads = results(lora_linear, given, backend="triton")[len(given["weight"]) + 1 :]
        for grad in grads[: 2 * len(given["weight"])]:
            assert [bool(grad[slot].any()) for slot in range(4)] == [slot in named for slot in range(4)]


def test_what_nobody_reads_above_a_rank_is_zeros():
    """The product takes steps of the pool's R: an inner row that is short has zeros there, whoever made it."""
    ranks = torch.tensor([3, 0, 40, 17], dtype=torch.int32, device=DEVICE)
    a, b = (torch.randn(size, device=DEVICE, dtype=torch.float16) for size in ((4, 40, 24), (4, 48, 40)))
    x, slots = torch.randn(3, 70, 24, device=DEVICE, dtype=torch.float16), torch.tensor([3, 2, -1], device=DEVICE)
    pool = Pool.of([a], [b], slots, [None], [ranks], [None], 0.0)
    packed = adapters_of(x, a, b, slots, [48], ranks=ranks)
    for inner in (launch_inner([x], pool), launch_tiled_inner(x, pool, packed)):
        assert inner.shape == (3, 70, 48) and inner[0, :, :17].any() and inner[1, :, :40].any()
        assert not inner[0, :, 17:].any() and not inner[1, :, 40:].any() and not inner[2].any()


@pytest.mark.parametrize(
    "case",
    [
        {"sizes": (40, 16)},
        {"dtype": torch.float16},
        {"dtype": torch.float16, "length": 70},
        {"rate": 0.5},
        pytest.param({"int6": True}, marks=pytest.mark.slow),
    ],
)
def test_a_documents_bits_do_not_depend_on_what_else_is_in_the_batch(case):
    given = inputs(**{"batch": 3, "slots": (3, 0, 2), "length": 40} | case)
    together = results(lora_linear, given, backend="triton")
    for name in ("x", "douts"):
        for tensor in [given[name]] if name == "x" else given[name]:
            tensor[[0, 2]] = torch.nan
    for lora in (*given["lora_a"], *given["lora_b"]):
        lora[1:] = torch.nan
    among_nans, count = results(lora_linear, given, backend="triton"), len(given["weight"])
    for out, other in zip(together[: count + 1], among_nans, strict=False):  # the outputs and dx
        assert torch.equal(out[1], other[1])
    for grad, other in zip(together[count + 1 : 3 * count + 1], among_nans[count + 1 :], strict=False):
        assert torch.equal(grad[0], other[0])


def test_the_kernels_mask_has_the_bits_of_the_reference():
    """With A the unit matrix, and B too, what is added to y is drop(x) itself."""
    K, unit = 24, torch.eye(24, device=DEVICE)[None]
    x = torch.ones(3, 50, K, device=DEVICE).requires_grad_()
    weight, keys = torch.zeros(K, K, device=DEVICE), row_keys(7, torch.tensor([5, 5, 2**40 + 1], device=DEVICE))
    y = lora_linear(
        x, weight, unit, unit, torch.zeros(3, dtype=torch.int64, device=DEVICE), dropout=Dropout(0.3, keys),
        backend="triton",
    )  # fmt: skip
    dropped = drop_ref(x.detach(), 0.3, keys)
    assert torch.equal(y != 0, dropped != 0) and torch.equal(y[0], y[1]) and not torch.equal(y[0], y[2])
    torch.testing.assert_close(y.detach(), dropped)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dropped)


@pytest.mark.parametrize("length", [0, 9])
@pytest.mark.parametrize("slots", [None, (2, -1, 3, 0)])
def test_gradients_are_written_to_the_named_rows_of_a_pool(slots, length):
    given = inputs((40, 16), R=17, length=length, slots=slots, ranks=(1, 5, 17, 9))
    pairs = list(zip(given["lora_a"], given["lora_b"], strict=True))
    pool = torch.full((4, sum(lora[0].numel() for pair in pairs for lora in pair) + 5), 7.0, device=DEVICE)
    views, start = [], 5
    for lora in (lora for pair in pairs for lora in pair):
        views.append(pool[:, start : start + lora[0].numel()].view(lora.shape))
        start += lora[0].numel()
    wanted = results(lora_linear, given, backend="triton")[3:7]
    x = given["x"].requires_grad_()
    douts = given.pop("douts")
    outs = lora_linear(**given, grads=list(zip(views[::2], views[1::2], strict=True)), backend="triton")
    torch.autograd.backward(outs, douts)
    named = range(4) if slots is None else [0, 2, 3]
    assert x.grad is not None and (pool[:, :5] == 7.0).all() and (slots is None or (pool[1] == 7.0).all())
    for view, gradient in zip((*views[::2], *views[1::2]), wanted, strict=True):
        assert torch.equal(view[list(named)], gradient[list(named)])


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dtype": torch.float16},
        pytest.param({"int6": True}, marks=pytest.mark.slow),
        {"K": 32, "sizes": (48,), "R": 16},
    ],
)
def test_an_output_may_be_changed_in_place(case):
    given = inputs(**case | {"ranks": (1, 5, 16, 9)})
    wanted = results(lora_linear, given | {"douts": [2 * dout for dout in given["douts"]]}, backend="triton")

    def doubled(*arguments, **options):
        outs = lora_linear(*arguments, **options)
        for out in outs:
            out.mul_(2)
        return outs

    for one, other in zip(wanted[1:], results(doubled, given, backend="triton")[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "case",
    [{}, pytest.param({"int6": True, "length": 130}, marks=pytest.mark.slow), {"K": 32, "sizes": (48,), "R": 16}],
)
def test_autocast_around_the_op_changes_nothing(case):
    given = inputs(**case | {"ranks": (1, 5, 16, 9)})
    wanted = results(lora_linear, given, backend="triton")

    def cast(*arguments, **options):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return lora_linear(*arguments, **options)

    for one, other in zip(wanted, results(cast, given, backend="triton"), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_one_weight_is_a_list_of_one():
    given = inputs()
    many = lora_linear(**{name: one for name, one in given.items() if name != "douts"}, backend="triton")
    alone = {name: one[0] if isinstance(one, list) else one for name, one in given.items() if name != "douts"}
    one = lora_linear(**alone, backend="triton")
    assert isinstance(many, tuple) and torch.equal(many[0], one)


def test_an_output_that_is_not_used_has_a_gradient_of_zeros():
    given = inputs((40, 16), dtype=torch.float16)
    given.pop("douts")
    given["x"].requires_grad_()
    for weight in given["weight"]:
        weight.requires_grad_()
    first, _ = lora_linear(**given, backend="triton")
    first.sum().backward()
    wanted = torch.autograd.grad(lora_linear_ref(**given)[0].sum(), given["weight"][0])[0]
    torch.testing.assert_close(given["weight"][0].grad, wanted, rtol=1e-2, atol=1e-2)
    assert not given["weight"][1].grad.any()


ONE = {name: one[0] if isinstance(one, list) else one for name, one in inputs().items() if name != "douts"}
TWO = {name: one for name, one in inputs((40, 16)).items() if name != "douts"}
BAD = {
    r"weight is float32 \[40, 16\]; wanted float32 \[N, 24\]": {**ONE, "weight": ONE["weight"][:, :16]},
    r"lora_b is .*\[4, 40, 63\]; wanted float32 \[4, 40, 64\]": {**ONE, "lora_b": ONE["lora_b"][..., :63]},
    r"bias is float32 \[39\]; wanted float32 \[40\]": {**ONE, "bias": ONE["bias"][:39]},
    r"scale is float64 \[4\]; wanted float32 \[4\]": {**ONE, "scale": ONE["scale"].double()},
    r"ranks is float32 \[4\]; wanted int32 or int64 \[4\]": {**ONE, "ranks": ONE["scale"]},
    r"keys is int32 \[4\]; wanted int64 \[4\]": {**ONE, "dropout": Dropout(0.5, ONE["ranks"])},
    r"dropout's rate is 1.0; wanted a number from 0 to below 1": {**ONE, "dropout": Dropout(1.0, ONE["ranks"].long())},
    "scale requires a gradient, and gets none here; .* scale lora_b instead": {
        **ONE,
        "scale": ONE["scale"].clone().requires_grad_(),
    },
    r"lora_a\[1\] is float32 \[4, 64, 23\]": {**TWO, "lora_a": [TWO["lora_a"][0], TWO["lora_a"][1][..., :23]]},
    "lora_b is 1 for 2 weights; wanted a list with one for each": {**TWO, "lora_b": TWO["lora_b"][:1]},
    "bias is a Tensor for 2 weights": {**TWO, "bias": TWO["bias"][0]},
    r"weight is six bits of \[40, 32\]; wanted \[N, 24\]": {
        **ONE,
        "weight": quantize_int6(torch.randn(40, 32).to(DEVICE)),
    },
    "slots is missing, and 3 slots are not one for each of 4": {
        **{name: ONE[name] for name in ("x", "weight")},
        "lora_a": ONE["lora_a"][:3],
        "lora_b": ONE["lora_b"][:3],
    },
    "grads is given, and the reference has no backward": {
        **ONE,
        "grads": (ONE["lora_a"], ONE["lora_b"]),
        "backend": "reference",
    },
    r"grads\[0\] is float32": {**ONE, "grads": (ONE["lora_b"], ONE["lora_a"])},
}


@pytest.mark.parametrize(("message", "given"), BAD.items(), ids=range(len(BAD)))
def test_bad_input_is_refused_with_what_was_given_and_what_is_allowed(message, given):
    with pytest.raises(ValueError, match=message):
        lora_linear(**{"backend": "triton"} | given)


@pytest.mark.slow
@pytest.mark.parametrize("case", [{"sizes": (40, 16), "rate": 0.3}, {"int6": True}, {"plain": True, "ranks": None}])
def test_opcheck(case):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs, and unused padding is fresh memory
    given = inputs(**{"R": 16, "ranks": (16,) * 4, "slots": (3, 1, 0, 2)} | case)
    for name in ("lora_a", "lora_b"):
        [tensor.requires_grad_() for tensor in given[name]]
    weights = [w.packed if isinstance(w, Int6Matrix) else w for w in given["weight"]]
    int6_scales = [w.scale for w in given["weight"] if isinstance(w, Int6Matrix)]
    rate, keys = given["dropout"] or (0.0, [])
    arguments = (
        given["x"].requires_grad_(), weights, int6_scales, given["bias"] or [], given["lora_a"], given["lora_b"],
        given["slots"], given["scale"] or [], given["ranks"] or [], keys, rate, [], [],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.klora.lora_linears.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"sizes": (40, 16), "rate": 0.3},
        {"sizes": (48,), "K": 32, "R": 8, "ranks": (8,) * 4},
        {"sizes": (48, 32), "K": 32, "R": 8, "ranks": (8, 0, 3, 4), "has_bias": False},
    ],
)
def test_compile_with_fullgraph_gives_the_same_bits(case):
    given = inputs(**case)
    ours = results(lora_linear, given, backend="triton")
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    for one, other in zip(ours, results(compiled, given, backend="triton"), strict=True):
        assert torch.equal(one, other)


SERIALISED = """
import subprocess, tempfile
import torch, triton
from hopper import pretend
from klora.kernels import lora_linear
from klora.kernels.precompile import recorded

pretend()

def work(*sizes, rank):
    def run():
        x = torch.zeros(5, 200, 512, dtype=torch.bfloat16).requires_grad_()
        weights = [torch.zeros(N, 512, dtype=torch.bfloat16) for N in sizes]
        lora_a, lora_b = [torch.zeros(9, rank, 512) for _ in sizes], [torch.zeros(9, N, rank) for N in sizes]
        outs = lora_linear(x, weights, lora_a, lora_b, torch.zeros(5, dtype=torch.int32), backend="triton")
        torch.autograd.grad(outs, x, [torch.zeros_like(y) for y in outs])
    return run

for rank in (1, 4, 12, 16):
    for sizes in ((512,), (256, 256)):
        for kernel in recorded(work(*sizes, rank=rank)).values():
            if kernel.name in ("_forward_kernel", "_dx_kernel"):
                compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
                with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                    file.write(compiled.asm["ptx"])
                    file.flush()
                    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "-o", "/dev/null", file.name]
                    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                print(kernel.name, "serialised" if "serialized" in said else "overlapped")
"""


@pytest.mark.slow
def test_matrix_instructions_overlap_at_every_rank():
    """As ptxas says; a step's wait for one another's end otherwise."""
    assert sorted(compiled_for_hopper(SERIALISED).splitlines()) == (
        ["_dx_kernel overlapped"] * 8 + ["_forward_kernel overlapped"] * 8
    )


class TestOnTheGPU:
    pytestmark = gpu
    BATCH = {"batch": 5, "slots": (4, 0, -1, 2, 4), "count": 6, "ranks": (1, 5, 17, 64, 40, 0), "dtype": torch.bfloat16}

    @pytest.mark.parametrize("length", [1, 300, 2100])
    @pytest.mark.parametrize(
        "case",
        [
            {"sizes": (512,), "K": 512},
            {"sizes": (512,), "K": 512, "R": 16, "ranks": (1, 5, 16, 9, 7, 0)},
            {"sizes": (512,), "K": 512, "R": 32, "ranks": (1, 5, 32, 9, 20, 0)},
            {"sizes": (1536, 1536), "K": 576, "R": 8, "ranks": (1, 5, 8, 3, 7, 0), "has_bias": False},
            {"sizes": (576, 192, 192), "K": 576, "R": 16, "ranks": (1, 5, 16, 9, 7, 0), "has_bias": False},
            {"sizes": (2048,), "K": 1024},
            {"sizes": (2048,), "K": 1024, "low": True, "plain": True, "ranks": None},
            {"sizes": (1000,), "K": 520, "R": 200, "ranks": (1, 5, 200, 64, 70, 0)},
            {"sizes": (4096,), "K": 2048},
            {"sizes": (2048,), "K": 4224},
            {"sizes": (2048,), "K": 2048, "R": 16, "ranks": (1, 5, 16, 9, 7, 0)},
            {"sizes": (1024, 256, 256), "K": 1024, "rate": 0.1, "R": 32, "ranks": (1, 5, 32, 9, 20, 0)},
            {"sizes": (40,), "K": 24, "rate": 0.3},
            {"sizes": (1000, 8), "K": 1024, "R": 256, "ranks": (1, 250, 256, 64, 40, 0)},
            {"sizes": (1024, 256), "K": 512, "int6": True},
            {"sizes": (1000,), "K": 520, "int6": True},
            {"sizes": (1536, 1536), "K": 576, "int6": True, "R": 8, "ranks": (1, 5, 8, 3, 7, 0), "has_bias": False},
            {"sizes": (576, 192, 192), "K": 576, "int6": True, "R": 16, "ranks": (1, 5, 16, 9, 7, 0)},
            {"sizes": (200,), "K": 192, "int6": True},
            {"sizes": (17,), "K": 7},
        ],
    )
    def test_bf16_is_as_exact_as_plain_pytorch(self, case, length):
        assert_as_exact_as_plain_pytorch(inputs(**self.BATCH | {"length": few(length, 70)} | case))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("case", CASES)
    def test_other_dtypes(self, case, dtype):
        assert_as_exact_as_plain_pytorch(inputs(**CASES[case], dtype=dtype))

    @pytest.mark.parametrize(
        "case",
        [
            {"sizes": (2048,), "K": 1024},
            {"sizes": (512, 512), "K": 512, "rate": 0.2},
            {"sizes": (4096,), "K": 1024},
            {"sizes": (512,), "K": 512, "int6": True},
        ],
    )
    def test_twenty_runs_give_the_same_bits(self, case):
        given = inputs(**self.BATCH | {"length": 1500} | case)
        first = results(lora_linear, given, backend="triton")
        for _ in range(20):
            for one, other in zip(first, results(lora_linear, given, backend="triton"), strict=True):
                assert torch.equal(one, other)

    @pytest.mark.parametrize("case", [{"sizes": (2048,), "K": 1024}, {"sizes": (4096, 512), "K": 512, "rate": 0.2}])
    def test_a_cuda_graph_replays_it(self, case):
        torch.use_deterministic_algorithms(False)
        given = inputs(**self.BATCH | {"length": 256} | case)
        wanted = results(lora_linear, given)
        held, replay = replayed(lambda: results(lora_linear, given), warm_up=1)
        replay()
        for one, other in zip(wanted, held, strict=True):
            assert torch.equal(one, other)
