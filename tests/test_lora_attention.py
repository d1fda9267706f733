"""lora_attention, over a chunk and over a cache: two ops in one, with the gradients of both and nothing of the batch in
a document's bits.
"""

import pytest
import torch
from conftest import replayed
from hopper import few
from klora.bench.tolerance import assert_as_exact
from klora.kernels import (
    cache_write_,
    cached_attention,
    causal_attention,
    lora_attention,
    lora_attention_ref,
    lora_cached_attention,
    lora_qkv_rope,
    lora_qkv_rope_ref,
    rotary_tables,
)
from klora.kernels.lora_attention import WITHOUT_CACHE
from test_attention import kernel_of_pytorch
from test_attention import plain as formula
from test_cached_attention import draw as draw_cache
from test_cached_attention import kernel_of_pytorch as kernel_over_cache
from test_cached_attention import plain as formula_over_cache
from test_lora_qkv_rope import CUDA, DEVICE, doubled, draw

SIZES = {"sizes": (64, 32, 32), "head_dim": 16}
CACHE = ("cache_k", "cache_v", "cache_slots", "filled")
pytestmark = pytest.mark.usefixtures("empty_is_nan")


def drawn(length=37, tail=None, dtype=torch.float32, **more):
    call, _ = draw(length=length, dtype=dtype, **{**SIZES, **more})
    tail = length if tail is None else tail
    dout = torch.randn(call["x"].size(0), tail, call["sizes"][0], generator=torch.Generator().manual_seed(3))
    return {**call, "tail": tail}, dout.to(DEVICE, dtype)


def run(call, dout, backend="triton", **more):
    """out and the gradients of x, lora_a and lora_b."""
    return differentiated(lambda **given: lora_attention(**given, backend=backend, **more), call, dout)


def in_turn(call, dout, attention):
    """The reference of the projections, then `attention`, in the call's dtype."""

    def both(tail, **given):
        q, k, v = (part.unflatten(-1, (-1, call["head_dim"])) for part in lora_qkv_rope_ref(**given))
        return attention(q, k, v, tail).flatten(2)

    return differentiated(both, call, dout)


def differentiated(function, call, dout):
    leaves = {name: call[name].detach().requires_grad_() for name in ("x", "lora_a", "lora_b")}
    out = function(**{**call, **leaves})
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)


@pytest.mark.slow
@pytest.mark.parametrize("length, tail", [(1, None), (37, None), (70, 16), (33, 32), (20, 0)])
@pytest.mark.parametrize("slots", [None, [1, -1]])
def test_outputs_and_gradients_are_as_exact_as_pytorchs(length, tail, slots):
    seeds = range(8 if length == 1 else 1)  # the errors of one token's sums scatter
    draws = [drawn(length, tail, slots=slots, count=2, seed=seed) for seed in seeds]
    results = (
        [run(*one) for one in draws],
        [run(doubled(call), dout.double(), "reference") for call, dout in draws],
        *([in_turn(*one, attention) for one in draws] for attention in (formula, kernel_of_pytorch)),
    )
    assert_as_exact(*([torch.stack(same) for same in zip(*some, strict=True)] for some in results))


@pytest.mark.slow
def test_gradients_go_into_a_pool_where_one_is_given():
    call, dout = drawn(slots=[2, 0], count=4)
    _, _, da, db = run(call, dout)
    grads = torch.full_like(call["lora_a"], 7.0), torch.full_like(call["lora_b"], 7.0)
    x = call["x"].detach().requires_grad_()
    out = lora_attention(**{**call, "x": x}, grads=grads, backend="triton")
    out.backward(dout)
    for into, gradient in zip(grads, (da, db), strict=True):
        assert torch.equal(into[[0, 2]], gradient[[0, 2]]) and (into[[1, 3]] == 7.0).all()


def test_what_it_does_not_take_is_refused():
    call, _ = drawn()
    with pytest.raises(ValueError, match=r"tail is 38; allowed: 0 to S, 37"):
        lora_attention(**{**call, "tail": 38})
    with pytest.raises(ValueError, match=r"sizes is \(64, 32, 16\); wanted as many heads of v as of k"):
        lora_attention(**drawn(sizes=(64, 32, 16))[0])
    with pytest.raises(ValueError, match="head_dim is 8; wanted one of 16, 32, 64, 128"):
        lora_attention(**drawn(head_dim=8)[0], backend="triton")


@pytest.mark.slow
def test_opcheck():
    call, _ = drawn(length=17, slots=[1, 0], count=2)
    leaves = [call[name].detach().requires_grad_() for name in ("x", "weight", "lora_a", "lora_b")]
    leaves[1] = leaves[1].detach()
    rest = (call["cos"], call["sin"], call["gain"], call["slots"], list(call["sizes"]), 16, 8, None, None, True)
    torch.library.opcheck(torch.ops.klora.lora_attention.default, (*leaves, *rest, *WITHOUT_CACHE, None, None))
    out, lse, q, k, v, _, _, _, *rstds = (
        t.detach() for t in torch.ops.klora.lora_attention(*leaves, *rest, *WITHOUT_CACHE, None, None)
    )
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    given = [out, out, lse, q, k, v, *rest[:3], *rstds, True, *WITHOUT_CACHE, None, *grads]
    torch.library.opcheck(torch.ops.klora.lora_attention_backward_.default, given)
    x, squares = leaves[0].detach(), leaves[0].detach().square().sum(-1).view(1, -1)
    torch.library.opcheck(torch.ops.klora.lora_attention.default, (*leaves, *rest, *WITHOUT_CACHE, x.clone(), squares))
    given[-4] = squares.view(x.shape[:2])
    torch.library.opcheck(torch.ops.klora.lora_attention_backward_.default, given)
    call, _ = cached(length=17, slots=[1, 0], count=2)
    rest = (call["cos"], call["sin"], *rest[2:6], 17, *rest[7:])
    cache = (call[name].nan_to_num() if call[name].is_floating_point() else call[name] for name in CACHE)
    torch.library.opcheck(torch.ops.klora.lora_attention.default, (*leaves, *rest, *cache, call["window"], None, None))


@pytest.mark.slow
@pytest.mark.parametrize("low", [False, True])
def test_compile_with_fullgraph_gives_the_same_bits(low):
    call, dout = drawn(length=9, slots=[1, 0], count=2, dtype=torch.float16 if low else torch.float32)
    compiled = torch.compile(lora_attention, fullgraph=True, backend="aot_eager")
    results = (
        differentiated(lambda f=f, **given: f(**given, backend="triton"), call, dout)
        for f in (lora_attention, compiled)
    )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.any()


# Over a cache


def cached(length=20, filled=(0, 33), window=50, cache_slots=(2, 0), dtype=torch.float32, **more):
    """A call of lora_cached_attention, each document at its own positions, and dout."""
    call, dout = drawn(length, dtype=dtype, **{"batch": len(filled), **more})
    head_dim, sizes = call["head_dim"], call["sizes"]
    heads = {"H": sizes[0] // head_dim, "G": sizes[1] // head_dim, "d": head_dim}
    held, _ = draw_cache(T=length, window=window, filled=filled, slots=cache_slots, dtype=dtype, **heads)
    cache = {"cache_k": held["cache_k"], "cache_v": held["cache_v"], "cache_slots": held["slots"]}
    tables = dict(zip(("cos", "sin"), rotary_tables(max(filled) + length, head_dim, 5e4), strict=True))
    position = torch.tensor(filled)[:, None] + torch.arange(length)
    given = {**cache, "filled": held["filled"], **{name: table[position] for name, table in tables.items()}}
    del call["tail"]
    return {**call, **{name: t.to(DEVICE) for name, t in given.items()}, "window": window}, dout


def run_cached(call, dout, backend="triton", **more):
    """out and the gradients of x, lora_a and lora_b."""
    return differentiated(lambda **given: lora_cached_attention(**given, backend=backend, **more)[0], call, dout)


def cached_in_turn(call, dout, attention):
    """The reference of the projections, then `attention`, in the call's dtype."""

    def both(window, cache_k, cache_v, cache_slots, filled, **given):
        q, k, v = (part.unflatten(-1, (-1, call["head_dim"])) for part in lora_qkv_rope_ref(**given))
        cache = {"cache_k": cache_k, "cache_v": cache_v, "slots": cache_slots, "filled": filled, "window": window}
        return attention(q=q, k=k, v=v, **cache).flatten(2)

    return differentiated(both, call, dout)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"slots": [1, -1], "cache_slots": (-1, 1)},
        pytest.param({"length": 37, "filled": (100, 13)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_over_a_cache_outputs_and_gradients_are_as_exact_as_pytorchs(more):
    call, dout = cached(**{"count": 2, **more})
    exact = run_cached(doubled(call), dout.double(), "reference")
    plain = (cached_in_turn(call, dout, attention) for attention in (formula_over_cache, kernel_over_cache))
    assert_as_exact(run_cached(call, dout), exact, *plain)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_over_a_cache_it_is_the_two_ops_in_turn(backend):
    call, _ = cached(slots=[1, 0])
    out, *made = lora_cached_attention(**call, backend=backend)
    cache = [call.pop(name) for name in (*CACHE, "window")]
    rows = [{**call, "cos": call["cos"][b], "sin": call["sin"][b]} for b in range(2)]
    made_of = [[part[b] for part in lora_qkv_rope(**row, backend=backend)] for b, row in enumerate(rows)]
    q, k, v = (torch.stack(part).unflatten(-1, (-1, 16)) for part in zip(*made_of, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(made, (k, v), strict=True))
    assert torch.equal(out, cached_attention(q, k, v, *cache, backend=backend).flatten(2))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_document_in_chunks_is_the_document_as_a_whole(backend):
    """While no adapter changes, and the ring holds it."""
    call, _ = drawn(45, slots=[1, 0])
    whole = lora_attention(**call, backend="reference")
    x, tables = call["x"], (call["cos"], call["sin"])
    cache_k, cache_v = (torch.full((2, 30, 2, 16), torch.nan, device=DEVICE) for _ in range(2))
    rest = {name: call[name] for name in ("weight", "lora_a", "lora_b", "gain", "slots", "sizes", "head_dim")}
    rest |= {"cache_k": cache_k, "cache_v": cache_v, "cache_slots": call["slots"], "window": 45, "backend": backend}
    outs = []
    for start in range(0, 45, 15):
        filled, chunk = torch.full((2,), start, device=DEVICE), slice(start, start + 15)
        cos, sin = (table[chunk].expand(2, -1, -1) for table in tables)
        out, *made = lora_cached_attention(x[:, chunk], cos=cos, sin=sin, filled=filled, unit_tables=True, **rest)
        cache_write_(cache_k, cache_v, *made, call["slots"], filled, torch.full_like(filled, 15), backend=backend)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_over_a_cache_gradients_go_into_a_pool_where_one_is_given():
    call, dout = cached(slots=[2, 0], count=4)
    _, _, da, db = run_cached(call, dout)
    grads = torch.full_like(call["lora_a"], 7.0), torch.full_like(call["lora_b"], 7.0)
    x = call["x"].detach().requires_grad_()
    out, k, v = lora_cached_attention(**{**call, "x": x}, grads=grads, backend="triton")
    assert out.requires_grad and not k.requires_grad and not v.requires_grad
    out.backward(dout)
    for into, gradient in zip(grads, (da, db), strict=True):
        assert torch.equal(into[[0, 2]], gradient[[0, 2]]) and (into[[1, 3]] == 7.0).all()


def test_over_a_cache_what_it_does_not_take_is_refused():
    call, _ = cached()
    for change, says in (
        ({"cos": call["cos"][0]}, r"cos is float32 \[20, 8\]; wanted .*\[2, 20, 8\]"),
        ({"window": 51}, "window is 51; allowed"),
        ({"cache_k": call["cache_k"][..., :8]}, r"cache_k is .*; wanted float32 \[slots, capacity, 2, 16\]"),
        ({"cache_slots": call["cache_slots"][:1]}, r"cache_slots is int32 \[1\]"),
    ):
        with pytest.raises(ValueError, match=says):
            lora_cached_attention(**{**call, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOverACacheOnTheGPU:
    SEED = {"width": 512, "sizes": (512, 256, 256), "head_dim": 64}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "length, filled, window", [(32, (0, 50, 992, 3000), 1024), (256, (100, 1900, 0, 2048), 2048)]
    )
    def test_outputs_and_gradients_are_no_worse_than_the_ops_in_turn(self, dtype, length, filled, window):
        call, dout = cached(length, filled, window, (3, 0, -1, 1), dtype, **self.SEED)
        exact = run_cached(doubled(call), dout.double(), "reference")
        assert_as_exact(run_cached(call, dout), exact, cached_in_turn(call, dout, formula_over_cache))

    def test_wide_heads(self):
        sizes = {"width": 512, "sizes": (1024, 256, 256), "head_dim": 128}
        call, dout = cached(64, (70, 500), 300, dtype=torch.bfloat16, **sizes)
        exact = run_cached(doubled(call), dout.double(), "reference")
        assert_as_exact(run_cached(call, dout), exact, cached_in_turn(call, dout, formula_over_cache))

    def test_the_same_bits_in_every_run_batch_and_graph(self):
        call, dout = cached(64, (9, 960, 3000, 64), 1024, (0, 1, 2, 3), torch.bfloat16, **self.SEED)
        call = {**call, "slots": torch.arange(4, device="cuda")}
        first = run_cached(call, dout)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(run_cached(call, dout), first, strict=True))
        alone = {**call, **{name: call[name][2:3] for name in ("x", "cos", "sin", "slots", "cache_slots", "filled")}}
        out, dx, da, db = run_cached(alone, dout[2:3])
        for got, whole in zip((out, dx, da[2:3], db[2:3]), first, strict=True):
            assert torch.equal(got, whole[2:3])
        captured, replay = replayed(lambda: run_cached(call, dout), warm_up=1)
        replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOnTheGPU:
    SEED = {"batch": 6, "width": 512, "sizes": (512, 256, 256), "head_dim": 64}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("length, tail", [(1000, None), (1024, 256), (255, 200)])
    def test_outputs_and_gradients_are_no_worse_than_the_ops_in_turn(self, dtype, length, tail):
        """PyTorch's own 16-bit path rounds between all steps; so do our ops in turn, less often."""
        length = few(length, 140)
        call, dout = drawn(length, tail and min(tail, length), dtype, **self.SEED)
        exact = run(doubled(call), dout.double(), "reference")
        assert_as_exact(run(call, dout), exact, in_turn(call, dout, formula))

    def test_the_same_bits_in_every_run_and_every_batch(self):
        call, dout = drawn(1024, 256, torch.bfloat16, **self.SEED)
        first = run(call, dout)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(run(call, dout), first, strict=True))
        alone = {**call, "x": call["x"][2:3], "lora_a": call["lora_a"][2:3], "lora_b": call["lora_b"][2:3]}
        for got, whole in zip(run(alone, dout[2:3]), first, strict=True):
            assert torch.equal(got, whole[2:3])

    def test_it_is_captured_in_a_graph_and_compiled_whole(self):
        call, dout = drawn(256, 64, torch.bfloat16, **self.SEED)
        expected = run(call, dout)
        compiled = torch.compile(lambda x: lora_attention(**{**call, "x": x}), fullgraph=True)
        assert torch.equal(compiled(call["x"]), expected[0])
        captured, replay = replayed(lambda: run(call, dout), warm_up=1)
        replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_the_reference_is_the_two_ops_in_turn():
    call, _ = drawn(tail=9)
    arguments = {name: value for name, value in call.items() if name != "tail"}
    q, k, v = (part.unflatten(-1, (-1, 16)) for part in lora_qkv_rope(**arguments, backend="reference"))
    expected = causal_attention(q, k, v, 9, backend="reference").flatten(2)
    assert torch.equal(lora_attention(**call, backend="reference"), expected)
    del arguments["slots"]
    assert torch.equal(lora_attention_ref(**arguments, tail=9), expected)
