"""Token plus bigram, norm and smear: the kernel against float64, and against the reference's error."""

import pytest
import torch
from conftest import DTYPES
from klora.bench.tolerance import assert_as_exact
from klora.kernels import BOS_ID
from klora.kernels.embedding import bigram_embedding, bigram_embedding_ref


def draw(batch, length, vocabulary=50, rows=32, width=48, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, vocabulary, (batch, length), generator=generator)
    tokens[tokens % 7 == 0] = BOS_ID
    tables = (torch.randn(size, generator=generator) for size in ((vocabulary, width), (rows, width), (width,)))
    return tokens.to(dtype), *tables, torch.randn(batch, length, width, generator=generator)


def run(function, tokens, embed, bigram, gate, dout, dtype, **options):
    leaves = [t.detach().requires_grad_() for t in (embed, bigram, gate)]
    out = function(tokens, *leaves, dtype, **options)
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


@pytest.mark.parametrize("shape", [(2, 70), (1, 1), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_as_near_to_float64_as_the_reference_s(shape, dtype):
    inputs = draw(*shape, dtype=torch.int32 if dtype == torch.float16 else torch.int64)
    dout = inputs[-1].to(dtype).float()
    exact = run(
        bigram_embedding_ref,
        *(t.double() if t.is_floating_point() else t for t in inputs[:-1]),
        dout.double(),
        torch.float64,
    )
    plain = run(bigram_embedding_ref, *inputs[:-1], dout, dtype)
    ours = run(bigram_embedding, *inputs[:-1], dout, dtype, backend="triton")
    assert_as_exact(ours, exact, plain)


def test_nothing_crosses_bos_and_unknown_tokens_read_zeros():
    tokens, embed, bigram, gate, _ = draw(1, 12)
    tokens[0, 6] = BOS_ID
    other = tokens.clone()
    other[0, :6] = 3
    first, second = (bigram_embedding(t, embed, bigram, gate, torch.float32, backend="triton") for t in (tokens, other))
    assert torch.equal(first[:, 6:], second[:, 6:]) and not torch.equal(first[:, :6], second[:, :6])
    tokens[0, 11] = 2**32 + 5
    out = run(bigram_embedding, tokens, embed, bigram, gate, torch.ones_like(first), torch.float32, backend="triton")
    assert all(torch.isfinite(t).all() for t in out)


def test_wrong_arguments_are_refused():
    tokens, embed, bigram, gate, _ = draw(1, 4)
    with pytest.raises(ValueError, match=r"tokens is float32 \[1, 4\]; wanted int32 or int64"):
        bigram_embedding(tokens.float(), embed, bigram, gate, torch.float32)
    with pytest.raises(ValueError, match=r"gate is float32 \[47\]; wanted \[48\]"):
        bigram_embedding(tokens, embed, bigram, gate[1:], torch.float32)
    with pytest.raises(ValueError, match="dtype is torch.float64; wanted one of torch.bfloat16"):
        bigram_embedding(tokens, embed, bigram, gate, torch.float64, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_in_bf16_and_the_same_bits_twice():
    inputs = [t.cuda() for t in draw(8, 1000, 1024, 2048, 512)]
    dout = inputs[-1].bfloat16().float()
    exact = run(
        bigram_embedding_ref,
        *(t.double() if t.is_floating_point() else t for t in inputs[:-1]),
        dout.double(),
        torch.float64,
    )
    plain = run(bigram_embedding_ref, *inputs[:-1], dout, torch.bfloat16)
    ours, again = (run(bigram_embedding, *inputs[:-1], dout, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    assert_as_exact(ours, exact, plain)
