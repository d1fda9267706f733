"""Entries of group `lora` for `lora_linear` on anyone's model: square layers of some widths, unlike ranks, six bits.

    lora_linears_forward            against x W^T alone
    lora_linears_forward_backward   against x W^T and dy W alone
    lora_linears_mixed_ranks        ranks from 4 to 64 in one batch, against all at the mean of them
    lora_linears_int6               a base at six bits, against the same in x's dtype

Adapters are fp32 in a pool, each with a rank and a scale of its own, as klora.lora has them; every document has
another, or (one) all have the same. `peft` is how PEFT runs a batch of many adapters: for each of them its rows, in
eager PyTorch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Int6Matrix, lora_linear, lora_linear_ref, quantize_int6
from .entry import Call, Entry, Shape, Tensors, Variant

LENGTH = 1024
SHAPES = {
    f"{batch}x{LENGTH}-K{width}-R{rank}": {"B": batch, "S": LENGTH, "K": width, "R": rank}
    for batch in (16, 64)
    for width in (512, 2048, 4096)
    for rank in (8, 16, 64)
}
SHAPES |= {f"64x{LENGTH}-K2048-R16-one": {"B": 64, "S": LENGTH, "K": 2048, "R": 16, "one": 1}}
MIXED = {name: {**shape, "mixed": 1} for name, shape in SHAPES.items() if shape["R"] == 64}
INT6 = {name: shape for name, shape in SHAPES.items() if shape["R"] == 16}
GATE, TOY = {"B": 5, "S": 300, "K": 2048, "R": 64}, {"B": 3, "S": 20, "K": 40, "R": 8}
LEAST = 4
"""The smallest of mixed ranks."""


def _ranks(shape: Shape) -> list[int]:
    """Of each slot, the first one unused: the pool's, or from LEAST up to it in even steps."""
    slots, most = shape["B"] + 1, shape["R"]
    if not shape.get("mixed"):
        return [most] * slots
    return [LEAST + (most - LEAST) * max(slot - 1, 0) // (shape["B"] - 1) for slot in range(slots)]


def _about(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """slots, scale and ranks."""
    batch = shape["B"]
    slots = torch.ones(batch, dtype=torch.int32) if shape.get("one") else torch.arange(1, batch + 1, dtype=torch.int32)
    ranks = torch.tensor(_ranks(shape), dtype=torch.int32)
    return {
        "slots": slots.to(device),
        "scale": torch.linspace(0.5, 2.0, batch + 1, device=device),
        "ranks": ranks.to(device),
    }


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """x, weight, A, B and dout."""

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=device, generator=generator) * scale

    batch, tokens, width, rank = (shape[name] for name in "BSKR")
    return (
        randn(batch, tokens, width).to(dtype),
        randn(width, width, scale=width**-0.5).to(dtype),
        randn(batch + 1, rank, width, scale=width**-0.5),
        randn(batch + 1, width, rank, scale=0.3),
        randn(batch, tokens, width).to(dtype),
    )


def _draw_int6(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """As :func:`_draw`, of a weight at six bits; then its packed codes and scales."""
    x, weight, *rest = _draw(shape, device, dtype, generator)
    matrix = quantize_int6(weight.float() + 0.1 * weight.float().sign() * weight.size(0) ** -0.5)  # no code is 0
    return x, matrix.dequantize(dtype), *rest, matrix.packed, matrix.scale


def _forward(function: Call, about: dict[str, Tensor]) -> Call:
    return lambda x, weight, a, b, *_: function(x, weight, a, b, **about)


def _forward_backward(function: Call, about: dict[str, Tensor]) -> Call:
    """y, dx, dA, dB."""

    def run(x, weight, a, b, dout, *_) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        y = function(leaves[0], weight, *leaves[1:], **about)
        return y, *torch.autograd.grad(y, leaves, dout)

    return run


Wrap = Callable[[Call, dict[str, Tensor]], Call]


def _peft(x, weight, a, b, slots, scale, ranks) -> Tensor:
    """The base's product, then for each adapter of the batch its rows, as PEFT does them."""
    y = F.linear(x, weight)
    for slot in range(1, len(a)):
        rows = (slots == slot).nonzero()[:, 0]
        if len(rows):
            rank = int(ranks[slot])
            inner = F.linear(x[rows], a[slot, :rank].to(x.dtype))
            outer = F.linear(inner, b[slot, :, :rank].to(x.dtype)) * scale[slot].to(x.dtype)
            y = y.index_add(0, rows, outer)
    return y


def _product(x, weight, a, b, dout) -> Tensor:
    return x.flatten(0, 1) @ weight.T


def _products(x, weight, a, b, dout) -> Tensors:
    return x.flatten(0, 1) @ weight.T, dout.flatten(0, 1) @ weight


def _at_mean_rank(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """The step with A and B of the mean rank, rounded up to 16, cut once for each set of inputs."""
    mean = min(-(-sum(_ranks(shape)[1:]) // (16 * shape["B"])) * 16, shape["R"])
    about = _about(shape, device)
    call = _forward_backward(lora_linear, about | {"ranks": torch.full_like(about["ranks"], mean)})
    cut: dict[int, Tensors] = {}

    def run(x, weight, a, b, dout) -> Tensors:
        if a.data_ptr() not in cut:
            cut[a.data_ptr()] = a[:, :mean].contiguous(), b[..., :mean].contiguous()
        return call(x, weight, *cut[a.data_ptr()], dout)

    return run


def _with_int6(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    call = _forward_backward(lora_linear, _about(shape, device))
    return lambda x, weight, a, b, dout, packed, scale: call(
        x, Int6Matrix(packed, scale, tuple(weight.shape)), a, b, dout
    )


def _int6_truth(shape: Shape, *inputs: Tensor) -> Tensors:
    """Of the codes and scales, which come as float64 copies of what is fp16."""
    x, weight, a, b, dout, packed, scale = inputs
    exact = Int6Matrix(packed, scale.half(), tuple(weight.shape)).dequantize(torch.float64)
    return _forward_backward(lora_linear_ref, _about(shape, x.device))(x, exact, a, b, dout)


def _build(wrap: Wrap, function: Call):
    return lambda shape, device, dtype: wrap(function, _about(shape, device))


def _variants(wrap: Wrap, bound: Call, instead: str) -> tuple[Variant, ...]:
    def compiled(*given) -> Call:
        return _build(wrap, torch.compile(lora_linear_ref))(*given)

    return (
        Variant("eager", _build(wrap, lora_linear_ref)),
        Variant("torch.compile", compiled, devices=("cuda",)),
        Variant("peft", _build(wrap, _peft), captures=False),
        Variant("klora", _build(wrap, lora_linear), is_ours=True),
        Variant("cublas-without-lora", lambda *given: bound, devices=("cuda",), instead=instead),
    )


def _bytes(passes: int):
    """x, y and the adapters of fp32 once, with two passes their gradients too; the weight once a pass."""

    def count(shape: Shape, itemsize: int) -> int:
        width, adapters = shape["K"], 1 if shape.get("one") else shape["B"]
        tokens = 2 * itemsize * shape["B"] * shape["S"] * width
        return passes * (tokens + itemsize * width**2 + 2 * 4 * adapters * shape["R"] * width)

    return count


def _flops(products: int, adapter_products: int):
    """Products with the weight, and pairs of products with A and B of each document's rank."""

    def count(shape: Shape) -> int:
        ranks = sum(_ranks(shape)[1:])
        return 2 * shape["S"] * shape["K"] * (products * shape["B"] * shape["K"] + 2 * adapter_products * ranks)

    return count


def _entry(op: str, wrap: Wrap, variants: tuple[Variant, ...], passes: int, **more) -> Entry:
    defaults = {"shapes": SHAPES, "toy": TOY, "gate": GATE, "draw": _draw}
    defaults["truth"] = lambda shape, *inputs: wrap(lora_linear_ref, _about(shape, inputs[0].device))(*inputs)
    return Entry(
        group="lora",
        op=op,
        variants=variants,
        bytes=_bytes(passes),
        flops=_flops(passes, 1 if passes == 1 else 3),
        **defaults | more,
    )


_STEP = _variants(_forward_backward, _products, "x W^T and dy W alone")

ENTRIES = (
    _entry("lora_linears_forward", _forward, _variants(_forward, _product, "x W^T alone"), 1),
    _entry("lora_linears_forward_backward", _forward_backward, _STEP, 2),
    _entry(
        "lora_linears_mixed_ranks",
        _forward_backward,
        (
            *_STEP,
            Variant(
                "klora-mean-rank",
                _at_mean_rank,
                instead="every adapter at the mean of the ranks, rounded up to 16",
            ),
        ),
        2,
        shapes=MIXED,
        toy={**TOY, "mixed": 1},
        gate={**GATE, "mixed": 1},
    ),
    _entry(
        "lora_linears_int6",
        _forward_backward,
        (
            Variant("eager", _build(_forward_backward, lora_linear_ref)),
            Variant("klora", _with_int6, is_ours=True),
            Variant("klora-dense-base", _build(_forward_backward, lora_linear), instead="the base in x's dtype"),
        ),
        2,
        shapes=INT6,
        toy={**TOY, "K": 64},
        draw=_draw_int6,
        truth=_int6_truth,
    ),
)
