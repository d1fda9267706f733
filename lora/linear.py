"""The products with adapters, in one place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Dropout, Int6Matrix, lora_linear, lora_swiglu_mlp
from ..kernels.lora_linear import is_one_product
from ..kernels.lora_swiglu_mlp import is_one_op


def adapted_linears(
    x: Tensor,
    weights: Sequence[Tensor | Int6Matrix],
    biases: Sequence[Tensor | None],
    adapters: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[Tensor],
    ranks: Sequence[Tensor],
    slots: Tensor,
    dropout: Dropout | None = None,
    stacks: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """y_p [B, S, N] of x [B, S, K] for each linear: x W^T + bias + s B (A drop(x)), of the slot that `slots` [B] names.

    weights [N, K] of x's dtype, or at six bits; adapters A [slots, R, K] and B [slots, N, R] fp32; scales fp32 and
    ranks int32 [slots]. `stacks` False: none of them together in one launch.
    """
    backend = _backend(x, backend)
    lora_a, lora_b = (list(factor) for factor in zip(*adapters, strict=True))
    more = {"bias": list(biases), "scale": list(scales), "ranks": list(ranks), "dropout": dropout, "stacks": stacks}
    return lora_linear(x, list(weights), lora_a, lora_b, slots, **more, backend=backend)


def are_one_product(
    x: Tensor,
    weights: Sequence[Tensor | Int6Matrix],
    biases: Sequence[Tensor | None],
    adapters: Sequence[tuple[Tensor, Tensor]],
    backend: str | None = None,
) -> bool:
    """Whether :func:`adapted_linears` makes all of them in one launch, where there is no dropout."""
    lora_a, lora_b = zip(*adapters, strict=True)
    return is_one_product(x, weights, lora_a, lora_b, biases, _backend(x, backend))


def adapted_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    adapters: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[Tensor],
    ranks: Sequence[Tensor],
    slots: Tensor,
    backend: str | None = None,
) -> Tensor:
    """out [B, S, D] of x [B, S, D]: down(silu(gate x) * up x), each of the three as :func:`adapted_linears` has it."""
    lora = (factor for pair in adapters for factor in pair)
    return lora_swiglu_mlp(x, *weights, *lora, slots, scale=scales, ranks=ranks, backend=backend)


def is_one_mlp(
    x: Tensor,
    weights: Sequence[Tensor | Int6Matrix],
    biases: Sequence[Tensor | None],
    adapters: Sequence[tuple[Tensor, Tensor]],
    backend: str | None = None,
) -> bool:
    """Whether :func:`adapted_mlp` is meant for these linears gate, up and down."""
    lora_a, lora_b = zip(*adapters, strict=True)
    return is_one_op(x, weights, lora_a, lora_b, biases, _backend(x, backend))


def _backend(x: Tensor, backend: str | None) -> str | None:
    """No GPU multiplies float64 fast."""
    return "reference" if backend is None and x.dtype == torch.float64 else backend
