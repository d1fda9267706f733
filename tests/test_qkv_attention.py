"""Projections, QK norm, rotation and attention in one op, trained: against float64 and the reference's error."""

import pytest
import torch
from klora.bench.tolerance import MARGIN, assert_as_exact, relative_error
from klora.kernels import rotary_tables
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
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
    with pytest.raises(ValueError, match=r"cos is \[36, 8\] on cpu; wanted: \[37, 8\]"):
        qkv_attention(x, weight, cos[:-1], sin, gain, sizes, head_dim=head_dim)
    with pytest.raises(ValueError, match=r"weight \[128, 48\]; wanted: \[B, S, D\] and \[96, D\]"):
        qkv_attention(x, weight, cos, sin, gain, (32, 32, 32), head_dim=head_dim)
    with pytest.raises(ValueError, match="as many of v as of k"):
        qkv_attention(x, weight, cos, sin, gain, (64, 48, 16), head_dim=head_dim)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("batch", "length"), [(3, 1000), (2, 64)])
def test_on_a_gpu_in_bf16_and_the_same_bits_twice(batch, length):
    inputs, sizes, head_dim = draw(batch, length, 512, 8, 4, 64, device="cuda")
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
    given = (*leaves, cos, sin, gain.requires_grad_(), list(sizes), head_dim, 9, True)
    torch.library.opcheck(torch.ops.klora.qkv_attention.default, given)
