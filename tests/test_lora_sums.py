"""The gradients of an adapter that several documents of a batch have: sums in the order of the batch, of any number."""

import pytest
import torch
from klora.kernels import lora_linear, lora_swiglu_mlp
from klora.kernels.lora_qkv.op import projected
from klora.kernels.lora_qkv.sums import can_share, sums_of
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNT = 5
"""Adapters of a pool."""
D, HIDDEN, RANK = 48, 80, 8


def linear(given: dict[str, Tensor], slots: Tensor) -> Tensor:
    return lora_linear(given["x"], given["up"], given["up_a"], given["up_b"], slots, backend="triton")


def three(given: dict[str, Tensor], slots: Tensor) -> Tensor:
    sizes = [32, 16, HIDDEN - 48]
    return torch.cat(projected(given["x"], given["up"], given["three_a"], given["up_b"], slots, sizes), 2)


def mlp(given: dict[str, Tensor], slots: Tensor) -> Tensor:
    lora = (given[f"{name}_{part}"] for name in ("gate", "up", "down") for part in "ab")
    weights = (given[name] for name in ("gate", "up", "down"))
    return lora_swiglu_mlp(given["x"], *weights, *lora, slots, backend="triton")


OPS = {"linear": linear, "three": three, "mlp": mlp}


def inputs(documents: int, length: int, dtype: torch.dtype, pool: int = COUNT) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0, like: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(DEVICE, like)

    given = {"x": randn(documents, length, D)}
    for name, n, k in (("gate", HIDDEN, D), ("up", HIDDEN, D), ("down", D, HIDDEN)):
        given[name] = randn(n, k, scale=k**-0.5)
        given[f"{name}_a"] = randn(1, RANK, k, scale=k**-0.5, like=torch.float32).expand(pool, -1, -1).contiguous()
        given[f"{name}_b"] = randn(1, n, RANK, scale=0.3, like=torch.float32).expand(pool, -1, -1).contiguous()
    given["three_a"] = torch.stack([given["up_a"], given["gate_a"], -given["up_a"]], 1)
    return given


def gradients(op: str, given: dict[str, Tensor], slots: list[int]) -> list[Tensor]:
    """Of the adapters that the op uses; equal adapters in all slots, and gradients of outputs that a document keeps."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.items() if name.endswith(("_a", "_b"))}
    out = OPS[op](given | leaves, torch.tensor(slots, device=DEVICE))
    dout = torch.cos(torch.arange(out.numel(), device=DEVICE)).view(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
    return [grad for grad in found if grad is not None]


def check(op: str, slots: list[int], length: int, dtype: torch.dtype) -> None:
    """The gradients are those of each document alone, added one after the other; also when they are made again."""
    given = inputs(len(slots), length, dtype)
    alone = gradients(op, inputs(len(slots), length, dtype, pool=len(slots)), list(range(len(slots))))
    for _ in range(3 if DEVICE.type == "cpu" else 20):
        for ours, each in zip(gradients(op, given, slots), alone, strict=True):
            wanted = torch.zeros_like(ours)
            for document, slot in enumerate(slots):
                if slot in range(COUNT):
                    wanted[slot] += each[document]
            assert torch.equal(ours, wanted)
            assert ours.any() or not any(slot in range(COUNT) for slot in slots)


SLOTS = {
    "one": [3, 3, 3, 3, 3],
    "two": [1, 2, 1, 1, 2],
    "one of them alone": [4, 0, 4, 0, 2],
    "none": [-1, 1, -1, 1, 1],
    "past the pool": [COUNT, 1, COUNT, 9, 1],
    "a batch of one": [2],
    "nobody's": [-1, -1],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("slots", SLOTS)
def test_a_slots_gradient_is_the_sum_of_its_documents_in_the_order_of_the_batch(op, slots):
    check(op, SLOTS[slots], 37, torch.float16)


@pytest.mark.parametrize("op", OPS)
def test_it_is_in_fp32_too(op):
    check(op, SLOTS["two"], 20, torch.float32)


def test_memory_for_sums_is_a_row_a_document_and_where_no_slot_can_be_shared_there_is_none():
    x, slots = torch.zeros(3, 4, 16), torch.zeros(3, dtype=torch.int32)
    assert can_share(slots, x) and not can_share(None, x) and not can_share(slots, x[:1])
    first, second = sums_of(x, (32, 5), (16, 3))
    for each, offset in ((first, (0, 0)), (second, (32, 8))):
        parts, ended = each["parts_ptr"], each["ended_ptr"]
        assert (parts.storage_offset(), ended.storage_offset()) == offset and not ended.any()
        assert (each["parts_stride"], each["ended_stride"]) == (parts.stride(0), ended.stride(0)) == (48, 11)


@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("length", [1, 700])
    @pytest.mark.parametrize("slots", [[3] * 64, [document % 5 for document in range(70)], [-1, *[2, 0, 2] * 43]])
    def test_it_is_the_sum_in_every_run(self, op, length, slots):
        check(op, slots, length, torch.bfloat16)
