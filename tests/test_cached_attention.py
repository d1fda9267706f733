"""Attention of a chunk over a cache: against float64 and the assembled window, rings, who reads what, the writing."""

import math
from functools import partial

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import compiled_for_hopper
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import assert_as_exact
from klora.kernels import cache_write_, cached_attention, causal_attention
from test_attention import KERNEL, ON_GPU, in_another_layout
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.interpreter import InterpreterBuilder

NAMES = ("q", "k", "v")
pytestmark = pytest.mark.usefixtures("empty_is_nan")


def draw(
    T=20, H=4, G=2, d=16, window=50, capacity=None, filled=(0, 7, 100), slots=None, count=4, dtype=torch.float32,
    device="cpu", seed=0,
):  # fmt: skip
    """The arguments by name, and dout. What no document may read of the cache is NaN."""
    generator = torch.Generator().manual_seed(seed)
    B, capacity = len(filled), window - T if capacity is None else capacity
    slots = [(2 * b + 1) % count for b in range(B)] if slots is None else slots

    def randn(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    cache_k, cache_v = (torch.full((count, capacity, G, d), math.nan, dtype=dtype) for _ in range(2))
    for slot, before in zip(slots, filled, strict=True):
        for position in range(max(0, before + T - window), before) if 0 <= slot < count else ():
            cache_k[slot, position % capacity], cache_v[slot, position % capacity] = randn(G, d), randn(G, d)
    call = {
        "q": randn(B, T, H, d),
        "k": randn(B, T, G, d),
        "v": randn(B, T, G, d),
        "cache_k": cache_k,
        "cache_v": cache_v,
        "slots": torch.tensor(slots, dtype=torch.int32),
        "filled": torch.tensor(filled, dtype=torch.int32),
    }
    dout = randn(B, T, H, d).to(device)
    return {**{name: tensor.to(device) for name, tensor in call.items()}, "window": window}, dout


def run(call, dout, attention=cached_attention, **more) -> list[Tensor]:
    """out, dq, dk and dv."""
    leaves = {name: call[name].detach().requires_grad_() for name in NAMES}
    out = attention(**{**call, **leaves}, **more)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)]


def doubled(call):
    return {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in call.items()}


def read_by(call, b) -> list[Tensor]:
    """Keys and values [n, G, d] that document b reads of its cache, one position after the other."""
    slot, filled = int(call["slots"][b]), int(call["filled"][b])
    count, capacity = call["cache_k"].shape[:2]
    if not 0 <= slot < count:
        return [call[name][b, :0] for name in ("k", "v")]
    cells = [p % capacity for p in range(max(0, filled + call["q"].size(1) - call["window"]), filled)]
    return [call[name][slot, cells] for name in ("cache_k", "cache_v")]


def term_by_term(softmax):
    """The oracle: document by document, softmax over the keys that the docstring names."""

    def attention(**call):
        outs = []
        for b in range(call["q"].size(0)):
            old_k, old_v = read_by(call, b)
            share = call["q"].size(2) // call["k"].size(2)
            k, v = (
                torch.cat([old, new[b]]).repeat_interleave(share, 1)
                for old, new in ((old_k, call["k"]), (old_v, call["v"]))
            )
            future = torch.ones(len(k), len(k), dtype=torch.bool, device=k.device).triu(1)[len(old_k) :]
            future[:, : len(old_k)] = False
            outs.append(softmax(call["q"][b], k, v, future))
        return torch.stack(outs)

    return attention


@term_by_term
def plain(q, k, v, future):
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.size(-1) ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -math.inf).softmax(-1), v)


@term_by_term
def kernel_of_pytorch(q, k, v, future):
    """Whose p comes from the logsumexp, as ours does."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    mask = torch.zeros(future.shape, dtype=q.dtype, device=q.device).masked_fill(future, -math.inf)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if q.is_cuda else SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[None, None])
    return out[0].transpose(0, 1)


def check(call, dout):
    yardsticks = (plain, kernel_of_pytorch) if call["q"].dtype == torch.float32 else (plain,)
    exact = run(doubled(call), dout.double(), plain)
    assert_as_exact(run(call, dout, **KERNEL), exact, *(run(call, dout, formula) for formula in yardsticks))


SHAPES = [
    {},  # empty, partly filled, wrapped around
    {"T": 32, "window": 150, "capacity": 150, "filled": (118, 1000), "H": 2, "G": 1, "count": 5},
    {"T": 17, "window": 90, "capacity": 101, "filled": (101, 73), "H": 3, "G": 3},
    {"T": 1, "window": 40, "filled": (39, 12), "H": 4, "G": 1},
    {"T": 70, "window": 75, "filled": (5, 3), "d": 32, "H": 3, "G": 1},
    {"T": 20, "window": 20, "filled": (0, 33)},  # nothing of a cache
    {"T": 9, "window": 80, "filled": (64, 90), "d": 128, "H": 2},
    {"T": 9, "window": 80, "slots": (-1, 4, 2), "d": 64},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_gradients_are_as_exact_as_pytorchs(shape, dtype):
    check(*draw(**shape, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape):
    call, dout = draw(**shape)
    call, dout = doubled(call), dout.double()
    for got, wanted in zip(run(call, dout, backend="reference"), run(call, dout, plain), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_document_in_chunks_is_the_document_as_a_whole(backend):
    """Chunk after chunk, each written behind the other, while the ring is large enough: causal attention at once."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 75, heads, 16, generator=generator) for heads in (4, 2, 2))
    cache_k, cache_v = (torch.full((3, 64, 2, 16), math.nan) for _ in range(2))
    slots, outs = torch.tensor([2, 0]), []
    for start in range(0, 75, 25):
        filled = torch.full((2,), start)
        chunk = [t[:, start : start + 25] for t in (q, k, v)]
        outs.append(cached_attention(*chunk, cache_k, cache_v, slots, filled, 75, backend=backend))
        cache_write_(cache_k, cache_v, *chunk[1:], slots, filled, torch.full((2,), 25), backend=backend)
    torch.testing.assert_close(torch.cat(outs, 1), causal_attention(q, k, v, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_smallest_ring_holds_what_a_sliding_window_wants(backend):
    """A capacity of window - T, written after the chunk: each chunk sees the last `window` tokens, and they alone."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 100, heads, 16, generator=generator) for heads in (2, 1, 1))
    cache_k, cache_v = (torch.full((1, 27, 1, 16), math.nan) for _ in range(2))
    slot, count = torch.zeros(1, dtype=torch.int32), torch.tensor([20])
    for start in range(0, 100, 20):
        filled = torch.tensor([start])
        chunk = [t[:, start : start + 20] for t in (q, k, v)]
        out = cached_attention(*chunk, cache_k, cache_v, slot, filled, 47, backend=backend)
        cache_write_(cache_k, cache_v, *chunk[1:], slot, filled, count, backend=backend)
        window = [t[:, max(0, start - 27) : start + 20] for t in (q, k, v)]
        torch.testing.assert_close(out, causal_attention(*window, 20, backend="reference"))


@pytest.mark.slow
@settings(max_examples=6)
@given(
    T=st.integers(1, 40),
    before=st.integers(0, 60),
    spare=st.integers(0, 20),
    filled=st.lists(st.integers(0, 200), min_size=1, max_size=2),
    G=st.integers(1, 2),
    ratio=st.sampled_from([1, 2, 3, 4]),
    data=st.data(),
)
def test_any_shape_any_ring(T, before, spare, filled, G, ratio, data):
    slots = data.draw(st.permutations([-1, 0, 1, 2, 3]))[: len(filled)]
    call, dout = draw(T, G * ratio, G, 16, T + before, before + spare, filled, slots)
    exact = run(doubled(call), dout.double(), plain)
    for got, wanted in zip(run(call, dout, **KERNEL), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_document_has_the_same_bits_in_every_batch_and_every_run():
    call, dout = draw(filled=(30, 7, 100, 61), count=9, dtype=torch.float16)
    whole = run(call, dout, **KERNEL)
    alone = {**call, **{name: call[name][2:3] for name in (*NAMES, "slots", "filled")}}
    for got, wanted in zip(run(alone, dout[2:3], **KERNEL), whole, strict=True):
        assert torch.equal(got[0], wanted[2])
    for got, wanted in zip(run(call, dout, **KERNEL), whole, strict=True):
        assert torch.equal(got, wanted)


def test_the_bits_do_not_depend_on_where_in_the_ring_the_keys_lie():
    call, dout = draw(window=50, capacity=40, filled=(80, 121), dtype=torch.float16)
    moved, _ = draw(window=50, capacity=64, filled=(80, 121), dtype=torch.float16)
    for b in range(2):
        for name, held in zip(("cache_k", "cache_v"), read_by(call, b), strict=True):
            filled = int(call["filled"][b])
            cells = [position % 64 for position in range(filled - len(held), filled)]
            moved[name][int(call["slots"][b]), cells] = held
    for got, wanted in zip(run(moved, dout, **KERNEL), run(call, dout, **KERNEL), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_int32_and_int64_say_the_same(kind):
    call, dout = draw(dtype=torch.float16)
    expected = run(call, dout, **KERNEL)
    given = {name: call[name].to(kind) for name in ("slots", "filled")}
    for got, wanted in zip(run({**call, **given}, dout, **KERNEL), expected, strict=True):
        assert torch.equal(got, wanted)


def test_fewer_tokens_than_none_are_none():
    for backend in ("reference", "triton"):
        results = [run(*draw(filled=filled), backend=backend) for filled in ((0, 0), (-3, -(2**31)))]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", ["view of a projection", "heads before tokens", "elements of a head apart"])
def test_any_layout_gives_the_same_bits(layout):
    call, dout = draw(filled=(30, 100), dtype=torch.float16)
    strided = {name: in_another_layout(call[name], layout) for name in (*NAMES, "cache_k", "cache_v")}
    assert not any(t.is_contiguous() for t in strided.values())
    results = run({**call, **strided}, in_another_layout(dout, layout), **KERNEL)
    for got, wanted in zip(results, run(call, dout, **KERNEL), strict=True):
        assert torch.equal(got, wanted)


def test_a_document_pays_for_what_its_cache_holds(monkeypatch):
    """Products of blocks: three for each block of 16 keys, however long the window is."""
    products, create_dot = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, *given: products.append(1) or create_dot(self, *given)
    )

    def count(filled, slot=0):
        products.clear()
        cached_attention(**draw(T=16, H=1, G=1, window=2000, filled=(filled,), slots=(slot,))[0], **KERNEL)
        return len(products)

    empty = count(0)
    assert [count(filled) - empty for filled in (160, 161, 5000)] == [30, 33, 3 * 124]
    assert count(160, slot=-1) == empty


def test_a_write_between_forward_and_backward_is_refused():
    call, dout = draw()
    q = call["q"].requires_grad_()
    out = cached_attention(**call, **KERNEL)
    cache_write_(*(call[n] for n in ("cache_k", "cache_v", "k", "v", "slots", "filled", "slots")), **KERNEL)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, q, dout)


# Writing


def written(cache: Tensor, new: Tensor, slots, filled, count) -> Tensor:
    """The cache after its tokens came one by one."""
    cache = cache.clone()
    for b, slot in enumerate(slots):
        for i in range(min(count[b], new.size(1)) if 0 <= slot < len(cache) and filled[b] >= 0 else 0):
            cache[slot, (filled[b] + i) % cache.size(1)] = new[b, i]
    return cache


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("capacity", "slots", "filled", "count"),
    [
        (60, (3, 0, -1, 1), (0, 50, 3, 7), (45, 45, 45, 0)),
        (30, (1, 4, 2, 2**31 - 1), (29, 0, 1000, 2), (45, 3, 31, 4)),
        (45, (0, 1, 2, 3), (-1, 2**31 - 46, 45, 13), (9, 45, 99, -2)),
    ],
)
def test_the_first_tokens_are_written_around_the_ring(capacity, slots, filled, count, kind, backend):
    generator = torch.Generator().manual_seed(0)
    caches = [torch.randn(4, capacity, 2, 16, generator=generator) for _ in range(2)]
    chunk = [torch.randn(4, 45, 2, 16, generator=generator) for _ in range(2)]
    expected = [written(cache, new, slots, filled, count) for cache, new in zip(caches, chunk, strict=True)]
    cache_write_(*caches, *chunk, *(torch.tensor(t, dtype=kind) for t in (slots, filled, count)), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_caches_may_be_views_of_a_pool_and_chunks_of_a_projection(backend):
    pool = torch.zeros(3, 2, 2, 40, 16)  # slots, keys and values, heads, cells
    caches = [pool[:, i].transpose(1, 2) for i in range(2)]
    call, _ = draw(T=20, filled=(30, 3))
    chunk = [in_another_layout(call[name], "view of a projection").requires_grad_() for name in ("k", "v")]
    slots, filled, count = torch.tensor([2, 0]), torch.tensor([30, 3]), torch.tensor([20, 11])
    expected = [written(old, new, slots.tolist(), [30, 3], [20, 11]) for old, new in zip(caches, chunk, strict=True)]
    cache_write_(*caches, *chunk, slots, filled, count, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True)) and not pool.requires_grad


# The op


def refused(function, good, change, says):
    with pytest.raises(ValueError, match=says):
        function(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(3, 20, 64)}, r"q is float32 \[3, 20, 64\]; wanted .* \[B, S, H, d\]"),
        ({"k": torch.zeros(3, 20, 3, 16)}, "k has 3 heads; wanted a divisor of q's 4"),
        ({"v": torch.zeros(3, 19, 2, 16)}, r"v is float32 \[3, 19, 2, 16\]; wanted float32 \[3, 20, 2, 16\]"),
        ({"cache_k": torch.zeros(4, 30, 1, 16)}, r"cache_k is .*; wanted float32 \[slots, capacity, 2, 16\]"),
        ({"cache_v": torch.zeros(4, 31, 2, 16)}, r"cache_v is .*; wanted float32 \[4, 30, 2, 16\]"),
        ({"cache_v": torch.zeros(4, 30, 2, 16, dtype=torch.float16)}, "cache_v is float16"),
        ({"cache_v": torch.zeros(4, 2, 30, 16).transpose(1, 2)}, "cache_k has strides .* allocate both alike"),
        ({"slots": torch.zeros(3)}, r"slots is float32 \[3\]; wanted int32 or int64 \[3\]"),
        ({"filled": torch.zeros(2, dtype=torch.int32)}, r"filled is int32 \[2\]"),
        ({"window": 51}, "window is 51; allowed, beside chunks of 20 tokens and a capacity of 30: 20 to 50"),
        ({"window": 19}, "window is 19"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    refused(cached_attention, {**draw()[0], **KERNEL}, change, says)


def test_bad_arguments_of_a_write_are_refused():
    call = draw()[0]
    good = {n: call[n] for n in ("cache_k", "cache_v", "k", "v", "slots", "filled")} | {"count": call["filled"]}
    refused(cache_write_, good, {"count": torch.zeros(3)}, r"count is float32 \[3\]")
    refused(cache_write_, good, {"k": torch.zeros(3, 20, 32)}, r"k is float32 \[3, 20, 32\]; wanted \[B, S, H, d\]")
    refused(cache_write_, good, {"v": torch.zeros(3, 21, 2, 16)}, "v is")
    refused(cache_write_, good, {"backend": "x"}, "backend is 'x'")


def test_what_the_kernel_alone_does_not_take_is_refused_by_it_alone():
    for more, says in (
        ({"d": 24}, "d is 24; wanted one of 16, 32, 64, 128"),
        ({"dtype": torch.float64}, "q is float64 .*; wanted bfloat16, float16 or float32"),
    ):
        call, _ = draw(**more)
        cached_attention(**call)
        refused(cached_attention, call, KERNEL, says)


def test_a_slot_beyond_32_bits_is_refused():
    call = {name: t.to("meta") if torch.is_tensor(t) else t for name, t in draw()[0].items()}
    vast = torch.zeros(1, device="meta").as_strided((2, 2**27, 2, 16), (2**32, 32, 16, 1))
    refused(cached_attention, call, {"cache_k": vast, "cache_v": vast}, "allowed: slots of fewer than 2\\^31 numbers")


def check_registration(device):
    call, dout = draw(device=device)
    leaves = [call[name].detach().requires_grad_() for name in NAMES]
    rest = [call[name].nan_to_num() for name in ("cache_k", "cache_v")] + [call["slots"], call["filled"], 50]
    torch.library.opcheck(torch.ops.klora.cached_attention.default, (*leaves, *rest))
    tensors = [t.detach() for t in leaves]
    out, lse = torch.ops.klora.cached_attention(*tensors, *rest)
    given = dout, *tensors, out, lse, None, *rest, *(torch.empty_like(t) for t in tensors)
    torch.library.opcheck(torch.ops.klora.attention_backward.default, given)
    torch.library.opcheck(
        torch.ops.klora.cache_write_.default, (*rest[:2], *tensors[1:], *rest[2:4], torch.full_like(rest[2], 9))
    )


def check_compiled(device, backend):
    call, dout = draw(device=device)

    def function(**given):
        return cached_attention(**{**given, "q": 2 * given["q"]}, **KERNEL) + 1

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(call, dout, compiled), run(call, dout, function))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sizes_may_be_symbols(backend):
    attention = partial(cached_attention, backend=backend)
    compiled = torch.compile(attention, fullgraph=True, backend="eager", dynamic=True)
    for more in ({}, {"T": 5, "window": 31}):
        call, _ = draw(**more)
        torch.testing.assert_close(compiled(**call), attention(**call))


@pytest.mark.slow
def test_opcheck_and_compile_on_a_cpu():
    check_registration("cpu")
    check_compiled("cpu", "aot_eager")


COMPILED_FOR_HOPPER = """
import torch
from hopper import NoGPU
from klora.kernels.attention import backward, cached, forward
from klora.kernels.attention.cached_keys import Cache
from triton.runtime import driver

class Compiled:
    def __init__(self, module, name, reads_cache):
        self.kernel, self.reads_cache = getattr(module, name), reads_cache
        setattr(module, name, self)

    def __getitem__(self, grid):
        return lambda *args, **options: self.check(self.kernel.warmup(*args, grid=grid, **options))

    def check(self, compiled):
        assert compiled.metadata.shared <= 232_448
        if self.reads_cache:
            assert "wgmma.mma_async" in compiled.asm["ptx"]
            assert "cp.async.cg.shared.global" in compiled.asm["ptx"], "it is not read 16 bytes at a time"

driver._active = NoGPU()
Compiled(forward, "_forward_kernel", True), Compiled(backward, "_dq_kernel", True)
Compiled(backward, "_dkdv_kernel", False), Compiled(cached, "_write_kernel", False)
for d in (64, 128):
    q, k = (torch.zeros(2, 32, heads, d, dtype=torch.bfloat16) for heads in (8, 4))
    held, index = torch.zeros(3, 1024, 4, d, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    cache = Cache(held, held, index, index, 1024)
    out, lse = forward.launch_forward(q, k, k, 32, cache=cache)
    backward.launch_backward(out, q, k, k, out, lse, [torch.empty_like(t) for t in (q, k, k)], cache=cache)
    cached._write_op(held, held, k, k, index, index, index)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper():
    """In a process where Triton is itself."""
    compiled_for_hopper(COMPILED_FOR_HOPPER)


# On a GPU

ON_HOPPER = [
    {"T": 32, "window": 1024, "filled": (0, 31, 500, 5000)},
    {"T": 256, "window": 2048, "capacity": 2048, "filled": (1792, 2100)},
    {"T": 100, "window": 1000, "filled": (333, 900, 64)},
    {"T": 16, "window": 300, "filled": (284, 1), "H": 4, "G": 4},
    {"T": 77, "window": 400, "filled": (300, 90), "H": 8, "G": 2},
    {"T": 64, "window": 500, "filled": (400, 63), "slots": (-1, 2)},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", ON_HOPPER, ids=str)
class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("d", [64, 128])
    def test_attention_and_its_gradients_are_as_exact_as_pytorchs(self, shape, d, dtype):
        check(*draw(**{"H": 8, "G": 4, **shape}, d=d, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestMoreOnGpu:
    SHAPE = {"T": 64, "window": 1024, "H": 8, "G": 4, "d": 64, "dtype": torch.bfloat16, "device": "cuda"}

    def test_runs_and_batches_have_the_same_bits(self):
        call, dout = draw(**self.SHAPE, filled=(0, 100, 960, 5000, 61, 1000), count=13)
        first = run(call, dout)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(run(call, dout), first, strict=True))
        for mates in ([3], [3, 5], [0, 1, 3], [5, 4, 3, 2, 1, 0]):
            mixed = {**call, **{name: call[name][mates] for name in (*NAMES, "slots", "filled")}}
            for got, wanted in zip(run(mixed, dout[mates]), first, strict=True):
                assert torch.equal(got[mates.index(3)], wanted[3])

    def test_a_pool_beyond_32_bits(self):
        """Slot 40 of 41 begins past 2^31 numbers."""
        call, dout = draw(**self.SHAPE, filled=(500, 3), slots=(1, 0), count=2)
        caches = [torch.full((41, 2**18, 4, 64), math.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        far = {**call, "slots": torch.tensor([40, 2], dtype=torch.int32, device="cuda")}
        for name, cache in zip(("cache_k", "cache_v"), caches, strict=True):
            cache[40, :960], cache[2, :960], far[name] = call[name][1], call[name][0], cache
        for got, wanted in zip(run(far, dout), run(call, dout), strict=True):
            assert torch.equal(got, wanted)
        chunk, count = (far["k"], far["v"]), torch.full_like(far["slots"], 64)
        cache_write_(*caches, *chunk, far["slots"], far["filled"], count)
        for cache, new in zip(caches, chunk, strict=True):
            assert torch.equal(cache[40, 500:564], new[0]) and torch.equal(cache[2, 3:67], new[1])

    def test_opcheck_and_compile(self):
        check_registration("cuda")
        check_compiled("cuda", "inductor")

    def test_a_cuda_graph_replays_it_with_other_slots_and_lengths(self):
        static, static_dout = draw(**self.SHAPE, filled=(0, 9, 400), count=7)
        fresh, fresh_dout = draw(**self.SHAPE, filled=(960, 2000, 1), slots=(5, 0, 2), count=7, seed=1)
        count, window = torch.full_like(static["slots"], 64), static.pop("window")

        def step():
            results = run({**static, "window": window}, static_dout)
            with torch.no_grad():
                cache_write_(*(static[n] for n in ("cache_k", "cache_v", "k", "v", "slots", "filled")), count)
            return results

        step()
        results, replay = replayed(step)
        for name in static:
            static[name].copy_(fresh[name])
        static_dout.copy_(fresh_dout)
        replay()
        for got, wanted in zip(results, run(fresh, fresh_dout), strict=True):
            assert torch.equal(got, wanted)
        cache_write_(*(fresh[n] for n in ("cache_k", "cache_v", "k", "v", "slots", "filled")), count)
        assert torch.equal(static["cache_k"].nan_to_num(), fresh["cache_k"].nan_to_num())
        assert torch.equal(static["cache_v"].nan_to_num(), fresh["cache_v"].nan_to_num())
