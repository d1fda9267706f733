"""Group `head`: the loss of the soft-capped head, with one adapter a document, and without adapters for training; and
that of any model's head over a large vocabulary.

The peers with a fused loss (Liger, cut-cross-entropy) take no adapter of the head, and Liger takes one gradient
for all tokens. The entries with a softcap are compared with the reference in eager PyTorch and with torch.compile of
it. Over a large vocabulary, without a softcap and with the mean of the loss, all are compared: the two packages with
their sums in fp32, as every other variant has them, and PyTorch's own F.linear_cross_entropy in chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.lora_head_nll import (
    linear_nll,
    linear_nll_ref,
    lora_head_nll,
    lora_head_nll_ref,
    softcap_nll,
    softcap_nll_ref,
)
from .entry import Call, Entry, Shape, Tensors, Variant

SOFTCAP, TEMPERATURE = 30.0, 0.98
ADAPTED = {"16384": {"B": 64, "S": 256, "D": 512, "V": 1024, "R": 16}}
TRAINED = {
    "98304": {"B": 96, "S": 1024, "D": 512, "V": 1024},
    "16384-wide": {"B": 16, "S": 1024, "D": 2048, "V": 32000},
}
LARGE = {
    "4096-152064": {"B": 4, "S": 1024, "D": 2048, "V": 152_064},
    "16384-128256": {"B": 16, "S": 1024, "D": 2048, "V": 128_256},
}
"""All logits fit in what linear_nll keeps; they do not, and are made again."""


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


def _mean(loss: Call) -> Call:
    """loss, dh, dweight of `loss` of rows [rows, D]."""

    def run(h: Tensor, weight: Tensor, targets: Tensor, _: Tensor) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (h.flatten(0, 1), weight)]
        out = loss(*leaves, targets.flatten())
        return out, *torch.autograd.grad(out, leaves)

    return run


def _eager_mean(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight).float(), targets)


def _liger(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return _mean(lambda h, weight, targets: loss(weight, h, targets))


def _cut(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return _mean(lambda *inputs: linear_cross_entropy(*inputs, accum_e_fp32=True, accum_c_fp32=True))


def _chunked(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """In PyTorch from 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions()
    return _mean(lambda *inputs: F.linear_cross_entropy(*inputs, options=options))


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
    Entry(
        group="head",
        op="linear_nll_forward_backward",
        shapes=LARGE,
        toy={"B": 2, "S": 12, "D": 32, "V": 70},
        gate={"B": 1, "S": 1000, "D": 512, "V": 5000},
        draw=_draw,
        truth=lambda shape, *inputs: _mean(linear_nll_ref)(*inputs),
        variants=(
            *_variants(_mean, _eager_mean, linear_nll),
            Variant("liger-kernel", _liger, package="liger-kernel", devices=("cuda",)),
            Variant("cut-cross-entropy", _cut, package="cut-cross-entropy", devices=("cuda",), captures=False),
            Variant("F.linear_cross_entropy", _chunked, devices=("cuda",), captures=False),
        ),
        bytes=_bytes,
        flops=_flops,
    ),
)
