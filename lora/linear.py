"""The product with adapters, in one place: what the op does not take yet is made of PyTorch's products here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Int6Matrix, int6_linear, lora_linear
from ..kernels.slots import rows_of_slots

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_RANK, KERNEL_MULTIPLE = 128, 16
"""What the kernel of `lora_linear` takes; other ranks and sizes run by its reference."""


def adapted_linear(
    x: Tensor,
    weight: Tensor | Int6Matrix,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    slots: Tensor,
    dropped: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y [B, S, N] of x [B, S, K]: x W^T + bias + s B (A x), A and B of the slot that `slots` [B] names.

    weight [N, K] of x's dtype, or at six bits; lora_a [slots, R, K], lora_b [slots, N, R] and scale [slots] fp32.
    `dropped` [B, S, K] is the adapters' input where it is not x.
    """
    lora_b = lora_b * scale[:, None, None]
    is_int6 = isinstance(weight, Int6Matrix)
    if is_int6 or dropped is not None:
        y = int6_linear(x, weight, bias, backend) if is_int6 else F.linear(x, weight, bias)
        lora_a, lora_b = (rows_of_slots(lora, slots).to(x.dtype) for lora in (lora_a, lora_b))
        return torch.baddbmm(y, torch.bmm(x if dropped is None else dropped, lora_a.mT), lora_b.mT)
    takes = x.dtype in KERNEL_DTYPES and lora_a.size(1) <= KERNEL_RANK
    if backend is None and not (takes and not any(size % KERNEL_MULTIPLE for size in weight.shape)):
        backend = "reference"
    y = lora_linear(x, weight, lora_a, lora_b, slots, backend=backend)
    return y if bias is None else y + bias


GOLDEN = 0x9E3779B9
"""Added so that keys of zeros are no fixed point of the hash."""


def drop(x: Tensor, rate: float, *key: Tensor | int) -> Tensor:
    """x [B, S, K] with its elements dropped at `rate`, the others divided by 1 - rate.

    A counter decides, no generator: element (s, k) of row b by a hash of s K + k and of the `key`, numbers or int64
    [B]. So the mask of a row depends on nothing else, and whoever computes it again gets the same.
    """
    hashed = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for part in key:
        hashed = _mix(hashed + part + GOLDEN)
    elements = torch.arange(x.shape[1:].numel(), device=x.device).view(x.shape[1:])
    first, second = (key[:, None, None] for key in (hashed, _mix(hashed + GOLDEN)))
    bits = _mix(_mix(elements + first) + second)
    return torch.where(bits >= round(rate * 2**32), x / (1 - rate), 0.0)


def _mix(bits: Tensor) -> Tensor:
    """A bijection of 32 bits in which each bit changes about half of the others (lowbias32), in int64."""
    bits = bits & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
