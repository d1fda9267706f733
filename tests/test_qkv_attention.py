"""Projections, QK norm, rotation and attention in one op, trained: against float64 and the reference's error."""

import pytest
import torch
from conftest import DTYPES
from hopper import few, for_this_gpu
from klora.bench.tolerance import MARGIN, assert_as_exact, relative_error
from klora.kernels import rotary_tables
from klora.kernels.attention import document_starts
from klora.kernels.linear import product, turns
from klora.kernels.linear.product import HEADS, Heads, launch_product
from klora.kernels.qkv_attention import qkv_attention, qkv_attention_ref


def draw(batch=2, length=37, width=48, heads=4, groups=2, head_dim=16, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    sizes = heads * head_dim, groups * head_dim, groups * head_dim
    cos, sin = rotary_tables(length, head_dim, 50000.0, torch.device("cpu"), torch.float32)
    tensors = (
        torch.randn(batch, length, width, generator=generator),
        torch.randn(sum(sizes), width, generator=generator) * width**-0.5,
        cos[:length],
        sin[:length],
        torch.rand(heads, generator=generator) + 0.5,
        torch.randn(batch, length, sizes[0], generator=generator),
    )
    return tuple(t.to(device) for t in tensors), sizes, head_dim


def run(function, inputs, sizes, head_dim, dtype, tail=None, vectors=None, **options):
    x, weight, cos, sin, gain, dout = inputs
    vectors = vectors or torch.float32
    leaves = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), gain.to(vectors).requires_grad_()
    tables = cos.to(vectors), sin.to(vectors)
    out = function(*leaves[:2], *tables, leaves[2], sizes, head_dim=head_dim, tail=tail, **options)
    return out, *torch.autograd.grad(out, leaves, dout[:, -out.size(1) :].to(dtype))


def rounded(inputs, dtype):
    x, weight, cos, sin, gain, dout = inputs
    return *(t.to(dtype).float() for t in (x, weight)), cos, sin, gain, dout.to(dtype).float()


@pytest.mark.slow
@pytest.mark.parametrize(("length", "head_dim", "tail"), [(37, 16, None), (20, 32, 5), (70, 64, None)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_as_near_to_float64_as_the_reference_s(length, head_dim, tail, dtype):
    inputs, sizes, head_dim = draw(length=length, head_dim=head_dim)
    inputs = rounded(inputs, dtype)
    exact = run(qkv_attention_ref, inputs, sizes, head_dim, torch.float64, tail, torch.float64)
    plain = run(qkv_attention_ref, inputs, sizes, head_dim, dtype, tail)
    ours = run(qkv_attention, inputs, sizes, head_dim, dtype, tail, backend="triton")
    # fp32: p comes from the logsumexp, which costs up to half as much error again (see causal_attention)
    assert_as_exact(ours, exact, plain, margin=1.6 if dtype == torch.float32 else MARGIN)


def test_a_gain_of_zero_and_wrong_arguments():
    inputs, sizes, head_dim = draw()
    inputs[4][1] = 0.0
    exact = run(qkv_attention_ref, inputs, sizes, head_dim, torch.float64, None, torch.float64)
    ours = run(qkv_attention, inputs, sizes, head_dim, torch.float32, backend="triton")
    assert relative_error(ours[1], exact[1]) < 1e-5 and ours[3][1] == 0
    x, weight, cos, sin, gain, _ = inputs
    with pytest.raises(ValueError, match=r"cos is float32 \[36, 8\]; wanted .*\[37, 8\]"):
        qkv_attention(x, weight, cos[:-1], sin, gain, sizes, head_dim=head_dim)
    with pytest.raises(ValueError, match=r"weight is float32 \[128, 48\]; wanted float32 \[96, 48\]"):
        qkv_attention(x, weight, cos, sin, gain, (32, 32, 32), head_dim=head_dim)
    with pytest.raises(ValueError, match="as many of v as of k"):
        qkv_attention(x, weight, cos, sin, gain, (64, 48, 16), head_dim=head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("tail", [None, 20])
@pytest.mark.parametrize("large", [False, True])
def test_documents_are_kept_apart_with_and_without_a_bound(tail, large):
    inputs, sizes, head_dim = draw(length=35, heads=2, groups=1)
    if large:  # the running maximum is searched
        inputs[4].mul_(40.0)
    tokens = torch.zeros(2, 35, dtype=torch.int64)
    tokens[0, [1, 16, 33]] = tokens[1, 34] = 1
    given = {"tail": tail, "start": document_starts(tokens, bos=1)}
    exact = run(qkv_attention_ref, inputs, sizes, head_dim, torch.float64, vectors=torch.float64, **given)
    plain = run(qkv_attention_ref, inputs, sizes, head_dim, torch.float32, **given)
    ours = run(qkv_attention, inputs, sizes, head_dim, torch.float32, backend="triton", **given)
    assert_as_exact(ours[:3], exact[:3], plain[:3], margin=1.6)
    assert relative_error(ours[3], exact[3]) < 1e-3
    one = {"tail": tail, "start": torch.zeros(2, 35, dtype=torch.int32)}
    whole, masked = (
        run(qkv_attention, inputs, sizes, head_dim, torch.float32, backend="triton", **options)
        for options in ({"tail": tail}, one)
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, masked, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("is_one", [True, False])
def test_documents_on_a_gpu_in_bf16(is_one):
    inputs, sizes, head_dim = draw(3, 1000, 512, 8, 4, 64, device="cuda")
    inputs = rounded(inputs, torch.bfloat16)
    tokens = torch.zeros(3, 1000, dtype=torch.int64, device="cuda")
    if not is_one:
        tokens[0, ::97] = tokens[1, [64, 65, 512]] = tokens[2, 300:310] = 1
    start = document_starts(tokens, bos=1)
    exact = run(qkv_attention_ref, inputs, sizes, head_dim, torch.float64, None, torch.float64, start=start)
    plain = run(qkv_attention_ref, inputs, sizes, head_dim, torch.bfloat16, start=start)
    ours, again = (run(qkv_attention, inputs, sizes, head_dim, torch.bfloat16, start=start) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    assert_as_exact(ours, exact, plain)
    if is_one:
        whole = run(qkv_attention, inputs, sizes, head_dim, torch.bfloat16)
        assert all(torch.equal(one, other) for one, other in zip(ours, whole, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("batch", "length"), [(3, 1000), (2, 64)])
def test_on_a_gpu_in_bf16_and_the_same_bits_twice(batch, length):
    inputs, sizes, head_dim = draw(batch, few(length, 300), 512, 8, 4, 64, device="cuda")
    inputs = rounded(inputs, torch.bfloat16)
    exact = run(qkv_attention_ref, inputs, sizes, head_dim, torch.float64, None, torch.float64)
    plain = run(qkv_attention_ref, inputs, sizes, head_dim, torch.bfloat16)
    ours, again = (run(qkv_attention, inputs, sizes, head_dim, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    assert_as_exact(ours, exact, plain)


@pytest.mark.parametrize("case", ["a large gain", "tables that stretch", "none that fits"])
def test_a_bound_that_does_not_hold_is_no_harm(case):
    """The forward subtracts a bound of the scores instead of their maximum where it can."""
    inputs, sizes, head_dim = draw(length=40)
    x, weight, cos, sin, gain, dout = inputs
    if case == "a large gain":
        gain = gain * torch.tensor([1.0, 40.0, 0.1, 8.0])
    elif case == "tables that stretch":
        cos, sin = 3 * cos, 3 * sin
    else:
        cos, sin = 6 * cos, 6 * sin
    inputs = x, weight, cos, sin, gain, dout
    exact = run(qkv_attention_ref, inputs, sizes, head_dim, torch.float64, None, torch.float64)
    plain = run(qkv_attention_ref, inputs, sizes, head_dim, torch.float32)
    ours = run(qkv_attention, inputs, sizes, head_dim, torch.float32, backend="triton")
    assert_as_exact(ours[:3], exact[:3], plain[:3], margin=1.6)
    # Four sums of terms that cancel, of scores in the hundreds: right, but no yardstick for rounding.
    assert relative_error(ours[3], exact[3]) < 1e-3


@pytest.mark.slow
def test_unit_tables_are_the_same_bits_whether_they_are_looked_at_or_not():
    inputs, sizes, head_dim = draw()
    looked, trusted = (
        run(qkv_attention, inputs, sizes, head_dim, torch.float32, backend="triton", unit_tables=unit)
        for unit in (False, True)
    )
    assert all(torch.equal(one, other) for one, other in zip(looked, trusted, strict=True))


@pytest.mark.slow
def test_the_op_is_registered_as_torch_wants_it():
    (x, weight, cos, sin, gain, _), sizes, head_dim = draw(length=9)
    leaves = [t.requires_grad_() for t in (x, weight)]
    given = (*leaves, cos, sin, gain.requires_grad_(), list(sizes), head_dim, 9, True, None)
    stream, squares = x.detach().clone(), x.detach().square().sum(-1).view(1, -1)
    torch.library.opcheck(torch.ops.klora.qkv_attention.default, (*given, None, None))
    torch.library.opcheck(torch.ops.klora.qkv_attention.default, (*given, stream, squares))
    out, qkv, rstd, lse, norm = (t.detach() for t in torch.ops.klora.qkv_attention(*given, stream, squares))
    for dgain, its_norm in ((torch.zeros_like(gain.detach()), norm), (None, None)):
        tables = cos, sin, gain.detach(), list(sizes), head_dim, True, None, its_norm
        grads = torch.zeros_like(qkv), dgain
        torch.library.opcheck(
            torch.ops.klora.qkv_attention_backward_.default, (out, out, qkv, rstd, lse, *tables, *grads)
        )


@pytest.mark.slow
def test_compile_with_fullgraph_gives_the_same_bits():
    inputs, sizes, head_dim = draw(length=9)
    compiled = torch.compile(qkv_attention, fullgraph=True, backend="aot_eager")
    results = (run(f, inputs, sizes, head_dim, torch.float32, backend="triton") for f in (qkv_attention, compiled))
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(
    ("rows", "queries", "keys", "head_dim"), [(24 * 1000, 8, 4, 64), (40001, 12, 6, 32), (140001, 6, 3, 16)]
)
def test_warps_that_take_turns_finish_heads_with_the_same_bits(rows, queries, keys, head_dim, monkeypatch):
    generator = torch.Generator("cuda").manual_seed(0)
    rows = for_this_gpu(rows, (queries + 2 * keys) * head_dim)
    x = torch.randn(rows, 328, device="cuda", generator=generator, dtype=torch.bfloat16)
    weight = torch.randn((queries + 2 * keys) * head_dim, 328, device="cuda", generator=generator, dtype=torch.bfloat16)
    cos, sin = rotary_tables(1000, head_dim, 50000.0, x.device, torch.float32)
    gain = torch.rand(queries, device="cuda", generator=generator) + 0.5

    def finished():
        rstd = torch.zeros(rows, queries + keys, device="cuda")
        heads = Heads(cos, sin, gain, rstd, queries, keys, head_dim)
        return launch_product(x, weight, epilogue=HEADS, heads=heads), rstd

    assert turns.takes(x, len(weight), head_dim) or torch.cuda.get_device_capability()[0] != 9
    found = finished()
    monkeypatch.setattr(product, "takes", lambda x, outputs, head_dim: False)
    assert all(torch.equal(one, other) for one, other in zip(found, finished(), strict=True))
