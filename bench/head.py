"""Group `head`: the loss of the soft-capped head, with one adapter a document, and without adapters for training.

The peers with a fused loss (Liger, cut-cross-entropy) take no adapter of the head, and Liger takes one gradient
for all tokens. The entries are compared with the reference in eager PyTorch and with torch.compile of it.
"""

import torch
from torch import Tensor

from ..kernels.lora_head_nll import lora_head_nll, lora_head_nll_ref, softcap_nll, softcap_nll_ref
from .entry import Call, Entry, Shape, Tensors, Variant

SOFTCAP, TEMPERATURE = 30.0, 0.98
ADAPTED = {"16384": {"B": 64, "S": 256, "D": 512, "V": 1024, "R": 16}}
TRAINED = {
    "98304": {"B": 96, "S": 1024, "D": 512, "V": 1024},
    "16384-wide": {"B": 16, "S": 1024, "D": 2048, "V": 32000},
}


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """h, weight, the adapters (if the shape has a rank), targets and dnll."""

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    batch, tokens, width, vocabulary = (shape[name] for name in "BSDV")
    tensors = [randn(batch, tokens, width).to(dtype), (randn(vocabulary, width) * 0.2).to(dtype)]
    if "R" in shape:
        tensors += [randn(batch, shape["R"], width) * width**-0.5, randn(batch, vocabulary, shape["R"]) * 0.3]
    targets = torch.randint(1, vocabulary, (batch, tokens), device=device, generator=generator)
    return *tensors, targets, (randn(batch, tokens).abs() + 0.1) / tokens


def _adapted(loss: Call) -> Call:
    """nll, dh, dA, dB."""

    def run(h: Tensor, weight: Tensor, a: Tensor, b: Tensor, targets: Tensor, dnll: Tensor) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (h, a, b)]
        nll = loss(leaves[0], weight, *leaves[1:], targets, SOFTCAP, TEMPERATURE)
        return nll, *torch.autograd.grad(nll, leaves, dnll)

    return run


def _trained(loss: Call) -> Call:
    """nll, dh, dweight."""

    def run(h: Tensor, weight: Tensor, targets: Tensor, dnll: Tensor) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (h, weight)]
        nll = loss(*leaves, targets, SOFTCAP)
        return nll, *torch.autograd.grad(nll, leaves, dnll)

    return run


def _variants(wrap, reference: Call, ours: Call) -> tuple[Variant, ...]:
    return (
        Variant("eager", lambda shape, device, dtype: wrap(reference)),
        Variant("torch.compile", lambda shape, device, dtype: wrap(torch.compile(reference)), devices=("cuda",)),
        Variant("klora", lambda shape, device, dtype: wrap(ours), is_ours=True),
    )


def _bytes(shape: Shape, itemsize: int) -> int:
    """h, targets and dnll in, nll and dh out; the weight in, and out where it is trained; the adapters both."""
    rows = shape["B"] * shape["S"]
    weight = shape["D"] * shape["V"] * itemsize
    adapters = 8 * shape["B"] * shape.get("R", 0) * (shape["D"] + shape["V"])
    return rows * (2 * shape["D"] * itemsize + 16) + (weight if "R" in shape else 2 * weight) + adapters


def _flops(shape: Shape) -> int:
    """Two products with the weight, a third for its gradient; three with each of the adapters' matrices."""
    rows, rank = shape["B"] * shape["S"], shape.get("R", 0)
    products = 2 if rank else 3
    return 2 * rows * (products * shape["D"] * shape["V"] + 3 * rank * (shape["D"] + shape["V"]))


ENTRIES = (
    Entry(
        group="head",
        op="lora_head_nll_forward_backward",
        shapes=ADAPTED,
        toy={"B": 2, "S": 12, "D": 32, "V": 70, "R": 3},
        draw=_draw,
        truth=lambda shape, *inputs: _adapted(lora_head_nll_ref)(*inputs),
        variants=_variants(_adapted, lora_head_nll_ref, lora_head_nll),
        bytes=_bytes,
        flops=_flops,
    ),
    Entry(
        group="head",
        op="softcap_nll_forward_backward",
        shapes=TRAINED,
        toy={"B": 2, "S": 12, "D": 32, "V": 70},
        gate={"B": 16, "S": 1000, "D": 512, "V": 1024},
        draw=_draw,
        truth=lambda shape, *inputs: _trained(softcap_nll_ref)(*inputs),
        variants=_variants(_trained, softcap_nll_ref, softcap_nll),
        bytes=_bytes,
        flops=_flops,
    ),
)
