"""A block's second half and the boundary behind it, up to the next attention: as exact as PyTorch part by part."""

import dataclasses
import functools

import pytest
import torch
from conftest import SMALL, randomized
from hopper import compiled_for_hopper, few, for_this_gpu
from klora.bench.tolerance import assert_as_exact
from klora.kernels import (
    lora_attention,
    lora_cached_attention,
    qkv_attention,
    residual_mlp,
    residual_mlp_norm,
    residual_norm,
    rotary_tables,
)
from klora.kernels.linear import product, turns
from klora.kernels.linear.product import BOUNDARY_ROWS, RESIDUAL_TILES
from klora.model.network import Adapters, BlockAdapters, KVCache, Lora, hidden
from klora.model.weights import weights_of
from torch import Tensor

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HEAD, SIZES, POOL, R = 16, (48, 16, 16), 5, 3
FIRST = ("mixed", "x", "out", "up", "down")
BOUNDARY = ("mix", "x0", "pushed", "skip", "bias")
QKV, ADAPTERS = ("weight",), ("lora_a", "lora_b")
FP32 = ("mix", "skip", "bias", "gain")
PLAIN, JOINED = ("mix", "x0"), ("mix", "x0", "pushed", "skip")
FROZEN = ("mixed", "x", "pushed", "bias", *ADAPTERS)
"""What has a gradient where weights are frozen."""


def inputs_of(B=2, S=7, D=32, hidden=80, dtype=torch.float32, boundary=BOUNDARY, wide=1) -> dict[str, Tensor]:
    """What the op and an attention behind it take. Rows of x are of several lengths, which norms take out again."""
    draw = torch.Generator().manual_seed(S)
    Nq, N = wide * SIZES[0], wide * sum(SIZES)
    of_bias = {"mix": (2, D), "x0": (B, S, D), "pushed": (B, S, D), "skip": (D,), "bias": (POOL, D)}
    sizes = {"mixed": (B, S, Nq), "x": (B, S, D), "out": (D, Nq), "up": (hidden, D), "down": (D, hidden)}
    sizes |= {name: of_bias[name] for name in boundary}
    sizes |= {"weight": (N, D), "lora_a": (POOL, 3, R, D), "lora_b": (POOL, N, R)}
    drawn = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
    for name in ("out", "up", "down", "weight"):
        drawn[name] /= sizes[name][-1] ** 0.5
    drawn["lora_a"] /= D**0.5
    drawn["mix"] += 2
    drawn["x"] *= torch.rand(B, S, 1, generator=draw) * 8
    drawn["gain"] = torch.ones(Nq // HEAD) + 0.3 * torch.randn(Nq // HEAD, generator=draw)
    return {name: tensor.to(DEVICE, torch.float32 if name in FP32 else dtype) for name, tensor in drawn.items()}


def doubled(inputs):
    return {name: tensor.double() for name, tensor in inputs.items()}


def results(inputs, wanted, adapted=False, slots=None, push=False, backend=None, op=residual_mlp_norm, **more):
    """x_out if it is pushed, x_in, attention of n; and the gradients of the `wanted` inputs."""
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    boundary = {name: leaves[name] for name in BOUNDARY if name in leaves}
    own_slots = {"slots": slots} if "bias" in boundary else {}
    made = op(*(leaves[name] for name in FIRST), **boundary, **own_slots, push=push, backend=backend, **more)
    out = attention_of(made.n, leaves, adapted, slots, backend)
    outputs = [made.x_in, out] if made.x_out is None else [made.x_out, made.x_in, out]
    loss = sum((output * gradient_like(output)).sum() for output in outputs)
    found = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    return [*(output.detach() for output in outputs), *found]


@functools.cache
def tables_of(length, dtype):
    return [table.to(dtype) for table in rotary_tables(length, HEAD, 100.0, DEVICE)]


def attention_of(n, leaves, adapted, slots, backend):
    wide = len(leaves["gain"]) * HEAD // SIZES[0]
    sizes = [wide * size for size in SIZES]
    tables = *tables_of(n.size(1), leaves["gain"].dtype), leaves["gain"]
    if adapted:
        given = *(leaves[name] for name in (*QKV, *ADAPTERS)), *tables
        return lora_attention(n, *given, slots, sizes, head_dim=HEAD, backend=backend)
    return qkv_attention(n, leaves["weight"], *tables, sizes, head_dim=HEAD, backend=backend)


def gradient_like(output: Tensor) -> Tensor:
    """Numbers that every dtype holds, the same for all documents."""
    drawn = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(9))
    return drawn.to(torch.bfloat16 if CUDA else torch.float16).to(output).expand_as(output)


def in_two_ops(mixed, x, out, up, down, **boundary):
    """What the one op does, with n stored."""
    return residual_norm(residual_mlp(mixed, x, out, up, down, backend=boundary["backend"]), **boundary)


def assert_as_exact_as_pytorch(inputs, wanted, **more):
    ours = results(inputs, wanted, backend=None if CUDA else "triton", **more)
    exact = results(doubled(inputs), wanted, backend="reference", **more)
    assert_as_exact(ours, exact, results(inputs, wanted, backend="reference", **more))


def same(ours, others):
    assert len(ours) == len(others)
    return all(torch.equal(x, y) for x, y in zip(ours, others, strict=True))


def slots_of(*slots):
    return torch.tensor(slots, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("boundary", "push", "S", "D"), [(PLAIN, False, 7, 32), (PLAIN, True, 70, 144), (JOINED, False, 70, 144)]
)
def test_trained_weights_have_gradients_as_exact_as_pytorchs(boundary, push, S, D, dtype):
    inputs = inputs_of(S=S, D=D, dtype=dtype, boundary=boundary)
    assert_as_exact_as_pytorch(inputs, [*FIRST, *boundary, *QKV], push=push)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("boundary", "push"), [((*PLAIN, "bias"), True), (BOUNDARY, False)])
def test_frozen_weights_with_adapters_and_biases_are_as_exact_as_pytorchs(boundary, push, dtype):
    inputs = inputs_of(S=BOUNDARY_ROWS, boundary=boundary, dtype=dtype)
    wanted = [name for name in FROZEN if name in inputs]
    assert_as_exact_as_pytorch(inputs, wanted, adapted=True, slots=slots_of(3, 1), push=push)


def test_a_small_mix_and_a_gain_have_the_gradients_that_two_ops_have():
    """The stream before a mix that is 0 cannot be had from what is behind it; a gain's has but three numbers."""
    inputs = inputs_of(S=9, boundary=JOINED)
    inputs["mix"][0, 3:5] = 0
    for push in (False, True):
        found, apart = (
            results(inputs, ["gain", "mix", "skip", "x"], push=push, backend="triton", op=op)
            for op in (residual_mlp_norm, in_two_ops)
        )
        torch.testing.assert_close(found, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", RESIDUAL_TILES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}")
def test_every_tile_computes_the_same(tile, monkeypatch):
    monkeypatch.setattr(product, "RESIDUAL_TILES", (tile,))
    inputs = inputs_of(S=128, D=144, dtype=torch.float16, boundary=(*JOINED, "bias"))
    assert_as_exact_as_pytorch(inputs, ["x", "pushed", "bias"], adapted=True, slots=slots_of(3, 1), push=True)


def test_a_document_has_the_same_bits_in_every_batch():
    inputs = inputs_of(S=128)
    wanted = [name for name in FROZEN if name not in ("bias", *ADAPTERS)]
    whole = results(inputs, wanted, adapted=True, slots=slots_of(2, 4), push=True, backend="triton")
    for b, slot in enumerate((2, 4)):
        own = {name: t[b : b + 1] if name in ("mixed", "x", "x0", "pushed") else t for name, t in inputs.items()}
        alone = results(own, wanted, adapted=True, slots=slots_of(slot), push=True, backend="triton")
        assert same(alone, [t[b : b + 1] for t in whole])


def test_a_slot_outside_the_pool_is_no_bias_and_reads_none():
    inputs = inputs_of(S=128)
    apart = results(inputs, ["x", "bias"], slots=slots_of(-1, 2), backend="triton", op=in_two_ops)
    inputs["bias"][[0, 1, POOL - 1]] = float("nan")
    for outside in (-1, 2**40):
        found = results(inputs, ["x", "bias"], slots=slots_of(outside, 2), backend="triton")
        torch.testing.assert_close(found, apart, rtol=1e-4, atol=1e-4)


def test_a_bias_of_documents_that_share_a_tile_is_added_as_two_ops_do_it():
    inputs = inputs_of(S=12)
    wanted = [name for name in FROZEN if name not in ADAPTERS]
    found, apart = (
        results(inputs, wanted, slots=slots_of(3, 1), backend="triton", op=op) for op in (residual_mlp_norm, in_two_ops)
    )
    assert same(found, apart)


def test_gradients_go_where_they_are_wanted():
    inputs = inputs_of(S=128, boundary=(*PLAIN, "bias"))
    wanted, slots = ["x", "x0", "bias"], slots_of(3, 1)
    *_, dx, dx0, dbias = results(inputs, wanted, slots=slots, backend="triton")
    pools = {"bias_grad": torch.full((POOL, 32), 7.0, device=DEVICE), "x0_grad": torch.ones_like(dx0)}
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    given = {name: leaves[name] for name in (*PLAIN, "bias")}
    made = residual_mlp_norm(
        *(leaves[name] for name in FIRST), **given, slots=slots, **pools, adds_x0=True, backend="triton"
    )
    out = attention_of(made.n, leaves, False, None, "triton")
    sum((output * gradient_like(output)).sum() for output in (made.x_in, out)).backward()
    assert torch.equal(leaves["x"].grad, dx) and leaves["x0"].grad is None and leaves["bias"].grad is None
    torch.testing.assert_close(pools["x0_grad"], dx0 + 1)
    assert torch.equal(pools["bias_grad"][slots], dbias[slots])
    assert (pools["bias_grad"][slots_of(0, 2, 4)] == 7).all()


@pytest.mark.parametrize("trained", [False, True])
def test_neither_n_nor_what_no_gradient_reads_is_kept(trained):
    kept: list[Tensor] = []
    inputs = inputs_of(S=128, boundary=PLAIN)
    leaves = {
        name: tensor.requires_grad_(name == "x" or (trained and name == "mix")) for name, tensor in inputs.items()
    }
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made = residual_mlp_norm(
            *(leaves[name] for name in FIRST), mix=leaves["mix"], x0=leaves["x0"], backend="triton"
        )
    of_rows = [t for t in kept if t.shape == (2, 128, 32)]
    assert len({t.data_ptr() for t in of_rows}) == (4 if trained else 2)  # y, x_in; x0 and the stream before the mix
    assert made.n.n.untyped_storage().nbytes() == 4


def test_a_cache_takes_an_unnormed_stream():
    inputs = inputs_of(S=5, boundary=PLAIN)
    cos, sin = (table.expand(2, 5, 8) for table in rotary_tables(5, HEAD, 100.0, DEVICE))
    cache = [torch.randn(POOL, 4, 1, HEAD, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(2)]
    slots = slots_of(3, 1)

    def outputs(backend):
        leaves = {name: tensor.detach().requires_grad_(name in FROZEN) for name, tensor in inputs.items()}
        made = residual_mlp_norm(*(leaves[name] for name in FIRST), mix=leaves["mix"], x0=leaves["x0"], backend=backend)
        given = *(leaves[name] for name in (*QKV, *ADAPTERS)), cos, sin, leaves["gain"], *cache, slots, slots_of(4, 2)
        out, k, v = lora_cached_attention(made.n, *given, 8, slots, SIZES, head_dim=HEAD, backend=backend)
        wanted = [leaves[name] for name in ("x", *ADAPTERS)]
        return [out, k, v, *torch.autograd.grad((out * gradient_like(out)).sum(), wanted)]

    torch.testing.assert_close(outputs("triton"), outputs("reference"), rtol=1e-3, atol=1e-4)


def test_bad_arguments_are_refused():
    inputs = inputs_of(boundary=PLAIN)
    given = [inputs[name] for name in FIRST]
    for backend in ("reference", "triton"):
        with pytest.raises(ValueError, match=r"mixed is float32 \[2, 7, 32\]; wanted float32 \[2, 7, 48\]"):
            residual_mlp_norm(given[1], *given[1:], mix=inputs["mix"], x0=inputs["x0"], backend=backend)
        with pytest.raises(ValueError, match="skip is given without pushed"):
            residual_mlp_norm(*given, mix=inputs["mix"], x0=inputs["x0"], skip=inputs["mix"][0], backend=backend)
        with pytest.raises(ValueError, match=r"mix is float32 \[32\]; wanted (float32 )?\[2, 32\]"):
            residual_mlp_norm(*given, mix=inputs["mix"][0], x0=inputs["x0"], backend=backend)


@pytest.mark.skipif(CUDA, reason="the interpreter runs the kernels where there is no GPU")
@pytest.mark.parametrize("adapted", [False, True])
def test_a_network_of_kernels_has_the_results_of_the_reference(adapted):
    """Blocks that push and that join, a tail, and gradients of all weights or of the adapters."""
    shape = dataclasses.replace(SMALL, heads=2, kv_heads=1, blocks=4)
    length, tail = (128, 40) if adapted else (24, 10)
    tokens = torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(0))

    def outputs(backend, dtype):
        model = randomized(shape, dtype).requires_grad_(not adapted)
        draw, leaves, adapters = torch.Generator().manual_seed(1), list(model.parameters()), None
        if adapted:
            sizes = (POOL, 3, R, 32), (POOL, sum(shape.qkv_sizes), R), (POOL, 32)
            drawn = [[0.2 * torch.randn(size, generator=draw) for size in sizes] for _ in range(shape.blocks)]
            blocks = [[t.to(dtype).requires_grad_() for t in block] for block in drawn]
            leaves = [leaf for block in blocks for leaf in block]
            adapters = Adapters(torch.tensor([4, 1]), [BlockAdapters(qkv=Lora(a, b), bias=c) for a, b, c in blocks])
        weights = weights_of(model)
        rotary = tuple(table[:length] for table in weights.rotary(length, length))
        n = hidden(weights, tokens, rotary, adapters, tail, backend=backend)
        return [n, *torch.autograd.grad((n * gradient_like(n)).sum(), leaves, allow_unused=True)]

    found = [outputs("triton", torch.float32), outputs("reference", torch.float64), outputs("reference", torch.float32)]
    found = [tensors for tensors in zip(*found, strict=True) if tensors[1] is not None and tensors[1].numel() > 8]
    assert_as_exact(*zip(*found, strict=True))


@pytest.mark.skipif(CUDA, reason="the interpreter runs the kernels where there is no GPU")
def test_what_reads_a_stored_n_gets_one():
    """A cache of one's own, PyTorch's attention chosen, and heads of a size that no kernel takes."""
    model = randomized(dataclasses.replace(SMALL, heads=2, kv_heads=1, blocks=2)).requires_grad_(False)
    weights, tokens = weights_of(model), torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    rotary = tuple(table[:9] for table in weights.rotary(9, 9))
    expected = hidden(weights, tokens, rotary)
    for given, context in ((weights, KVCache(weights, 1, 9)), (dataclasses.replace(weights, chosen="math"), None)):
        torch.testing.assert_close(hidden(given, tokens, rotary, context=context, backend="triton"), expected)
    odd = weights_of(randomized(dataclasses.replace(SMALL, blocks=2)).requires_grad_(False))
    rotary = tuple(table[:9] for table in odd.rotary(9, 9))
    torch.testing.assert_close(hidden(odd, tokens, rotary, backend="triton"), hidden(odd, tokens, rotary))


@pytest.mark.slow
def test_the_op_is_registered_as_torch_wants_it():
    """What compares outputs has no number to compare in n; the test below compiles it with what reads it."""
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    for dtype, push in ((torch.float32, True), (torch.float16, False)):
        inputs = inputs_of(1, 128, 16, 16, dtype)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        boundary = *(leaves[name] for name in ("bias",)), slots_of(2), *(leaves[name] for name in ("pushed", "skip"))
        given = *(leaves[name] for name in FIRST), *boundary, leaves["mix"], leaves["x0"], None, None, False, push
        torch.library.opcheck(torch.ops.klora.residual_mlp_norm, given, test_utils=tests)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_it_is_traced_whole_with_the_attention_behind_it(adapted):
    inputs, slots = inputs_of(S=128), slots_of(3, 1)
    wanted = [*FIRST, *BOUNDARY, *QKV, *(ADAPTERS if adapted else ())]
    leaves = {name: tensor.requires_grad_(name in wanted) for name, tensor in inputs.items()}

    def loss(leaves):
        boundary = {name: leaves[name] for name in BOUNDARY}
        made = residual_mlp_norm(
            *(leaves[name] for name in FIRST), **boundary, slots=slots, push=True, backend="triton"
        )
        out = attention_of(made.n, leaves, adapted, slots, "triton")
        return (made.x_out * made.x_in).sum() + (out * out).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(run(leaves), [leaves[name] for name in wanted]) for run in (loss, compiled))
    torch.testing.assert_close(found, expected)


COMPILED_FOR_HOPPER = """
import os, subprocess, tempfile
import torch, triton
from hopper import pretend
from klora.kernels import lora_attention, qkv_attention, residual_mlp_norm, rotary_tables
from klora.kernels.linear import product
from klora.kernels.precompile import recorded

pretend()
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

def leaf(*size, dtype=torch.bfloat16):
    return torch.zeros(size, dtype=dtype, requires_grad=True)

def stack(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])

def work(joins, pushes, adapted):
    def run():
        B, S, fp32 = 4, 1024, {"dtype": torch.float32}
        streams = leaf(B, S, 512), leaf(B, S, 512)
        given = {"mix": leaf(2, 512, **fp32), "x0": leaf(B, S, 512)}
        slots = torch.zeros(B, dtype=torch.int32)
        if joins:
            given |= {"pushed": leaf(B, S, 512), "skip": leaf(512, **fp32)}
        if adapted:
            given["mix"] = given["mix"].detach()
            given |= {"bias": leaf(64, 512, **fp32), "slots": slots}
        weights = leaf(512, 512), leaf(1536, 512), leaf(512, 1536)
        _, x, n = residual_mlp_norm(*streams, *weights, **given, push=pushes, backend="triton")
        tables = *rotary_tables(S, 64, 100.0, "cpu"), torch.ones(8)
        about = {"sizes": (512, 256, 256), "head_dim": 64, "unit_tables": True, "backend": "triton"}
        if adapted:
            lora = leaf(64, 3, 8, 512), leaf(64, 1024, 8)
            out = lora_attention(n, leaf(1024, 512), *lora, *tables, slots, **about)
        else:
            out = qkv_attention(n, leaf(1024, 512), *tables, **about)
        (x.sum() + out.sum()).backward()
    return run

for in_turns in (False, True):
    product.takes = lambda *about: in_turns
    for joins, pushes, adapted in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 0, 0), (0, 1, 0)):
        for kernel in recorded(work(joins, pushes, adapted)).values():
            names = kernel.function.arg_names
            keys = [name for name in ("EPILOGUE", "KIND") if name in names]
            kind = kernel.constants[(names.index(keys[0]),)] if keys else ""
            if kind not in ("boundary", "heads"):
                continue
            compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
            two = not in_turns and kind == "boundary"  # programs on a multiprocessor's 228 KiB, each with 1 KiB
            shared = compiled.metadata.shared
            assert shared <= (233_472 // 2 - 1024 if two else 232_448), (kind, shared)
            spilled = stack(compiled.asm["cubin"])
            assert spilled == 0, (kernel.name, kind, joins, pushes, adapted, spilled)
            print(kernel.name, kind)
"""


@pytest.mark.slow
def test_it_compiles_for_hopper_and_spills_nothing():
    """In a process where Triton is itself."""
    found = {line.strip() for line in compiled_for_hopper(COMPILED_FOR_HOPPER).splitlines()}
    assert {f"{name} {kind}" for name in ("_product_kernel", "_product") for kind in ("boundary", "heads")} <= found


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("B", "S", "D", "hidden"), [(4, 1024, 512, 1536), (3, 77, 144, 208)])
    def test_it_is_as_exact_as_pytorch(self, B, S, D, hidden, dtype):
        S = few(S, 64)
        if dtype == torch.float32:
            D, hidden = few(D, 144), few(hidden, 208)
        for boundary, push in ((PLAIN, True), (JOINED, False)):
            inputs = inputs_of(B, S, D, hidden, dtype, boundary, wide=4)
            assert_as_exact_as_pytorch(inputs, [*FIRST, *boundary, *QKV], push=push)
        inputs, slots = inputs_of(B, 128 * -(-S // 128), D, hidden, dtype), slots_of(3, 1, -1, 4)[:B]
        assert_as_exact_as_pytorch(inputs, FROZEN, adapted=True, slots=slots, push=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("B", "S", "D", "hidden", "boundaries"),
        [
            (64, 1024, 512, 1536, ((*PLAIN, "bias"), BOUNDARY, PLAIN, JOINED)),
            (64, 256, 512, 1536, ((*PLAIN, "bias"), BOUNDARY, PLAIN, JOINED)),
            # Each boundary once more, at sizes that are no multiples of a tile: half a minute is compiled for all four.
            (70, 1152, 336, 1000, (BOUNDARY, PLAIN)),
            (97, 1024, 144, 72, ((*PLAIN, "bias"), JOINED)),
        ],
    )
    def test_warps_that_take_turns_compute_the_same_bits(self, B, S, D, hidden, boundaries, dtype, monkeypatch):
        B = min(B, max(-(-for_this_gpu(B * S, D) // S), POOL + 1))
        slots = torch.arange(B, device=DEVICE) % (POOL + 1)
        for boundary in boundaries:
            inputs = inputs_of(B, S, D, hidden, dtype, boundary, wide=4)
            for push in (False, True):

                def everything(in_turns, inputs=inputs, boundary=boundary, push=push):
                    monkeypatch.setattr(product, "takes", lambda *about: in_turns)
                    own = {"slots": slots} if "bias" in boundary else {}
                    given = {name: inputs[name] for name in boundary}
                    made = residual_mlp_norm(*(inputs[name] for name in FIRST), **given, **own, push=push)
                    out = attention_of(made.n, inputs, False, None, None)
                    return [made.x_in, made.n.squares, out, *([made.x_out] if push else [])]

                assert turns.runs_on(inputs["x"]) or torch.cuda.get_device_capability()[0] != 9
                found = everything(True)
                assert same(found, everything(True)) and same(found, everything(False))

    def test_a_document_has_the_same_bits_in_every_batch(self):
        inputs = inputs_of(64, 1024, 512, 1536, torch.bfloat16, wide=4)
        slots, wanted = torch.arange(64, device=DEVICE) % POOL, ["mixed", "x", "pushed"]
        whole = results(inputs, wanted, adapted=True, slots=slots, push=True)
        for first, count in ((0, 1), (5, 1), (17, 4), (48, 16)):
            taken = slice(first, first + count)
            own = {name: t[taken] if name in ("mixed", "x", "x0", "pushed") else t for name, t in inputs.items()}
            alone = results(own, wanted, adapted=True, slots=slots[taken], push=True)
            assert same(alone, [t[taken] for t in whole])

    def test_it_is_captured_in_a_graph(self):
        inputs = inputs_of(16, 1024, 512, 1536, torch.bfloat16, wide=4)
        slots, wanted = torch.arange(16, device=DEVICE) % POOL, ["mixed", "x", "pushed"]
        expected = results(inputs, wanted, adapted=True, slots=slots)
        weights = [gradient_like(t) for t in expected[:2]]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        boundary = {name: leaves[name] for name in BOUNDARY}
        with torch.cuda.graph(graph, stream=stream):
            made = residual_mlp_norm(*(leaves[name] for name in FIRST), **boundary, slots=slots)
            out = attention_of(made.n, leaves, True, slots, None)
            found = torch.autograd.grad([made.x_in, out], [leaves[name] for name in wanted], weights)
        graph.replay()
        assert same([made.x_in, out, *found], expected)
