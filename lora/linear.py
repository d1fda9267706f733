"""The product with adapters, in one place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Dropout, Int6Matrix, lora_linear


def adapted_linears(
    x: Tensor,
    weights: Sequence[Tensor | Int6Matrix],
    biases: Sequence[Tensor | None],
    adapters: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[Tensor],
    ranks: Sequence[Tensor],
    slots: Tensor,
    dropout: Dropout | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """y_p [B, S, N] of x [B, S, K] for each linear: x W^T + bias + s B (A drop(x)), of the slot that `slots` [B] names.

    weights [N, K] of x's dtype, or at six bits; adapters A [slots, R, K] and B [slots, N, R] fp32; scales fp32 and
    ranks int32 [slots].
    """
    if backend is None and x.dtype == torch.float64:
        backend = "reference"  # no GPU multiplies it fast
    lora_a, lora_b = (list(factor) for factor in zip(*adapters, strict=True))
    more = {"bias": list(biases), "scale": list(scales), "ranks": list(ranks), "dropout": dropout}
    return lora_linear(x, list(weights), lora_a, lora_b, slots, **more, backend=backend)
