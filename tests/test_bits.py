"""The same bits in twenty runs of every op, and tensors past 2^31 elements through every op that takes them."""

import gc

import pytest
import torch
from klora.bench.tolerance import relative_error
from klora.kernels import int6_linear, quantize_int6
from test_contract import CUDA, DEVICE, OPS, Op, gradients, ops, same

RUNS = 20
BEYOND = 2**31
TOKENS = 8192
"""Tokens of a document of the large calls; documents are as many as make the first input pass 2^31 elements."""

PER_DOCUMENT = ("slots", "targets", "filled", "tokens", "positions")
"""Arguments beside the floats that have a value for each document."""

WITHOUT_SLOTS = [name for name, op in OPS.items() if op.per_document and "slots" not in op.more]
"""Whose gradients are made large: of documents alone."""

BY_CUBLAS = ("linear_nll",)
"""Ops with products of cuBLAS's, whose bits depend on how many rows there are."""

gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA GPU")]


def runs_agree(op: Op) -> None:
    """Outputs and gradients of all inputs."""
    first = gradients(op, "triton")
    for _ in range(RUNS - 1):
        same(gradients(op, "triton"), first)


# The interpreter runs programs one after the other: it shows what reads memory that nothing has written.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_norm", "softcap_nll", "linear"])
def test_twenty_runs_give_the_same_bits(name):
    runs_agree(OPS[name])


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_in_both_tables(name):
    """An op that the contract gains is run twenty times and made large with no line more."""
    few, many, copies = small_and_large(name, documents=3, tokens=5, dtype=torch.float32)
    for tensor in few.per_document or ("tokens",):
        small, large = (({**op.floats, **op.more})[tensor] for op in (few, many))
        assert len(large) == 3 * len(small) and torch.equal(large, torch.cat([small] * 3))
    assert copies == 3


def small_and_large(name: str, documents: int, tokens: int, dtype: torch.dtype) -> tuple[Op, Op, int]:
    """A call of two documents, and one of `documents` copies of both; and how many copies."""
    few = ops(B=2, S=tokens, dtype=dtype)[name]
    per_document = set(few.per_document) or {"tokens"}
    if name == "lora_cached_attention":
        per_document |= {"cos", "sin"}

    def large(key, value):
        if not (isinstance(value, torch.Tensor) and key in per_document | set(PER_DOCUMENT)):
            return value
        return value.repeat(documents, *[1] * (value.dim() - 1))

    floats, more = ({key: large(key, value) for key, value in part.items()} for part in (few.floats, few.more))
    return few, few._replace(floats=floats, more=more), documents


def agree(name: str, large: torch.Tensor, small: torch.Tensor) -> None:
    """The first and the last documents of `large` have the bits that they have alone; of cuBLAS's, the numbers."""
    for part in (large[:2], large[-2:]):
        if name in BY_CUBLAS:
            assert relative_error(part, small) < 1e-2
        else:
            assert torch.equal(part, small)


def require_gpu_memory(needed: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of GPU memory are needed, {free / 2**30:.0f} are free")


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("name", OPS)
    def test_twenty_runs_give_the_same_bits(self, name, dtype):
        """Programs run in any order here, many at a time."""
        runs_agree(ops(B=16, S=300, dtype=dtype)[name])

    @pytest.mark.parametrize("name", OPS)
    def test_a_tensor_past_2_31_elements(self, name, capsys):
        """The first and the last documents have the bits that they have alone; or the op says that it takes fewer."""
        first = next(iter(OPS[name].per_document), "tokens")
        width = ops(B=2, S=8)[name].floats[first][0, 0].numel() if first != "tokens" else 32
        copies = -(-(BEYOND + 1) // (2 * TOKENS * width)) + 1
        require_gpu_memory(100 << 30)
        few, many, _ = small_and_large(name, copies, TOKENS, torch.bfloat16)
        elements = 2 * copies * TOKENS * width
        assert elements > BEYOND
        with torch.no_grad():
            wanted = few("triton")
            try:
                got = many("triton")
            except ValueError as error:
                assert "2^31" in str(error)
                said = f"takes fewer: {error}"
            else:
                checked = 0
                for large, small in zip(got, wanted, strict=True):
                    if len(large) == copies * len(small) and len(small) == 2:
                        agree(name, large, small)
                        checked += 1
                assert checked, "an output for each document is compared"
                said = f"takes {elements:,} elements"
                del got
        with capsys.disabled():
            print(f"\n{name} {said}")

    @pytest.mark.parametrize("name", WITHOUT_SLOTS)
    def test_its_gradient_past_2_31_elements(self, name):
        first = OPS[name].per_document[0]
        width = ops(B=2, S=8)[name].floats[first][0, 0].numel()
        copies = -(-(BEYOND + 1) // (2 * TOKENS * width)) + 1
        require_gpu_memory(120 << 30)
        few, many, _ = small_and_large(name, copies, TOKENS, torch.bfloat16)

        def input_gradient(op: Op) -> torch.Tensor:
            leaf = op.floats[first].detach().requires_grad_()
            outputs = op("triton", **{first: leaf})
            outputs = [out for out in outputs if out.requires_grad]
            return torch.autograd.grad(outputs[:1], [leaf], [torch.ones_like(outputs[0])])[0]

        wanted, got = input_gradient(few), input_gradient(many)
        assert got.numel() > BEYOND
        agree(name, got, wanted)

    def test_int6_rows_past_2_31_elements(self):
        weight = quantize_int6(torch.randn(256, 512, device=DEVICE))
        require_gpu_memory(16 << 30)
        some = torch.randn(4096, 512, device=DEVICE, dtype=torch.bfloat16)
        copies = BEYOND // some.numel() + 2
        many = int6_linear(some.repeat(copies, 1), weight)
        one = int6_linear(some, weight)
        assert torch.equal(many[:4096], many[-4096:]) and torch.allclose(many[-4096:], one, rtol=1e-2, atol=1e-2)
