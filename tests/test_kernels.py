"""The ops' references where no model exercises them: slots, and the equations written out."""

import pytest
import torch
from klora.kernels import lora_head_nll_ref, lora_qkv_ref, softcap_nll_ref

B, S, D, R, V, SIZES = 3, 5, 8, 2, 11, (8, 4, 4)


def randn(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_lora_qkv_adds_each_projections_own_low_rank_product():
    x, weight, a, b = randn(B, S, D), randn(16, D), randn(4, 3, R, D), randn(4, 16, R)
    slots = torch.tensor([2, 0, 3])
    outputs = lora_qkv_ref(x, weight, a, b, SIZES, slots)
    for row, slot in enumerate(slots):
        start = 0
        for projection, size in enumerate(SIZES):
            rows = slice(start, start + size)
            whole = weight[rows] + b[slot, rows] @ a[slot, projection]
            torch.testing.assert_close(outputs[projection][row], x[row] @ whole.T)
            start += size


def test_a_slot_named_twice_sums_its_gradients():
    x, weight = randn(2, S, D), randn(16, D)
    a, b = randn(3, 3, R, D).requires_grad_(), randn(3, 16, R).requires_grad_()
    sum(o.square().sum() for o in lora_qkv_ref(x, weight, a, b, SIZES, torch.tensor([1, 1]))).backward()
    together = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    for row in range(2):
        sum(o.square().sum() for o in lora_qkv_ref(x[row : row + 1], weight, a[1:2], b[1:2], SIZES)).backward()
    torch.testing.assert_close((a.grad, b.grad), together)
    assert not together[0][[0, 2]].any() and together[0][1].abs().min() > 0


def test_lora_head_nll_is_the_plain_head_of_the_summed_weight():
    h, weight, a, b = randn(B, S, D), randn(V, D), randn(4, R, D), randn(4, V, R)
    targets, slots = torch.randint(0, V, (B, S)), torch.tensor([3, 1, 1])
    nll = lora_head_nll_ref(h, weight, a, b, targets, softcap=3.0, temperature=0.9, slots=slots)
    for row, slot in enumerate(slots):
        plain = softcap_nll_ref(h[row], weight + b[slot] @ a[slot], targets[row], 3.0, 0.9)
        torch.testing.assert_close(nll[row], plain)
    logits = 3.0 * torch.tanh(h[0] @ (weight + b[3] @ a[3]).T / 3.0) / 0.9
    torch.testing.assert_close(nll[0], logits.logsumexp(-1) - logits.gather(1, targets[0][:, None])[:, 0])
