"""Group `int6`: linears from six-bit weights against the same weights in x's dtype.

One call is several layers: `weights` of one shape on the same x, or all linears of a model's blocks for one token.
They are enough that none is in the L2 cache when its turn comes again, as in a model, and that launching a graph is a
small part of the time. Peers have other codes, of 8 or 4 bits. They are bounds beside the table, not judged by its
gate.
Last, quantising and packing as many linears as a model of 7 billion weights has: those of one layer, again and again.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.int6 import (
    Int6Matrix,
    Int6Weight,
    int6_linear,
    int6_linear_dx,
    pack_int6_ref,
    quantize_int6,
    quantize_int6_ref,
)
from .entry import Call, Entry, Shape, Tensors, Variant

LAYERS = {"8192x8192": (8192, 8192), "14336x4096": (14336, 4096), "4096x14336": (4096, 14336)}


def _shape(rows: int, outputs: int, inputs: int) -> Shape:
    return {"M": rows, "N": outputs, "K": inputs, "weights": 4 if rows <= 64 else 1}


SHAPES = {f"M{rows}-{name}": _shape(rows, *layer) for name, layer in LAYERS.items() for rows in (1, 4, 16, 64)}
SHAPES |= {f"M{rows}-8192x8192": _shape(rows, 8192, 8192) for rows in (256, 1024, 4096)}
DX_SHAPES = {f"M{rows}-8192x8192": _shape(rows, 8192, 8192) for rows in (16, 4096)}
DECODE = {"10-blocks": {"blocks": 10, "width": 512, "qkv": 1024, "hidden": 1536}}
TOY = {"M": 3, "N": 48, "K": 64, "weights": 2}
LADDER = (1, 8, 16, 32, 64, 128, 200, 300, 1000, 2048)
"""Rows of x for each weight of the gate: every kernel that the picks choose from is judged."""
GATE = {"M": max(LADDER), "N": 4096, "K": 4096, "weights": len(LADDER), "ladder": 1}
CLIP = 0.11
PEERS = tuple(f"M{rows}-4096x14336" for rows in (1, 4, 16, 64))
"""Shapes that the peers are timed at."""
TUNED_BY_GEMLITE = PEERS[:3]
"""Those for which gemlite ships what it found on an H100; to tune itself for another takes it minutes."""

Product = Callable[[Tensor, Int6Matrix, Tensor], Tensor]
"""x [M, K] (or dout [M, N]), the matrix, the same matrix in x's dtype -> [M, N] (or [M, K])"""


def _sizes(shape: Shape) -> list[tuple[int, int]]:
    """[N, K] of each layer of a call."""
    if "blocks" not in shape:
        return [(shape["N"], shape["K"])] * shape["weights"]
    width, hidden = shape["width"], shape["hidden"]
    return [(shape["qkv"], width), (width, width), (hidden, width), (width, hidden)] * shape["blocks"]


def _drawing(side: int) -> Callable[[Shape, torch.device, torch.dtype, torch.Generator], Tensors]:
    """x of each width on that side of the layers ([N, K][side]), then packed, scale and dense of each layer."""

    def draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        def randn(*size: int) -> Tensor:
            return torch.randn(size, device=device, generator=generator)

        tensors = [randn(shape.get("M", 1), width).to(dtype) for width in sorted({s[side] for s in _sizes(shape)})]
        for rows, columns in _sizes(shape):
            weight = randn(rows, columns)
            weight += 0.1 * weight.sign()  # more than half a step from zero: no code is 0
            matrix = quantize_int6(weight * columns**-0.5, clip=CLIP)
            tensors += [matrix.packed, matrix.scale, matrix.dequantize(dtype)]
        return tuple(tensors)

    return draw


def _each(shape: Shape, inputs: Tensors, side: int, product: Product) -> Tensors:
    sizes = _sizes(shape)
    widths = sorted({size[side] for size in sizes})
    x = dict(zip(widths, inputs, strict=False))
    rows = LADDER if "ladder" in shape else [shape.get("M", 1)] * len(sizes)
    parts = inputs[len(widths) :]
    return tuple(
        product(x[size[side]][:first], Int6Matrix(packed, scale, size), dense)
        for packed, scale, dense, size, first in zip(parts[::3], parts[1::3], parts[2::3], sizes, rows, strict=True)
    )


def _truth(side: int):
    """In float64 of the codes and scales; the scales come as float64 copies of what is fp16."""

    def exact(shape: Shape, *inputs: Tensor) -> Tensors:
        first = len(inputs) - 3 * len(_sizes(shape))
        inputs = [t.half() if at >= first and (at - first) % 3 == 1 else t for at, t in enumerate(inputs)]
        product = F.linear if side else torch.matmul
        return _each(shape, tuple(inputs), side, lambda x, matrix, _: product(x, matrix.dequantize(torch.float64)))

    return exact


def _variant(name: str, side: int, product: Product, **about) -> Variant:
    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        return lambda *inputs: _each(shape, inputs, side, product)

    return Variant(name, build, **about)


def _linear(side: int) -> tuple[Variant, Variant]:
    if side:
        return (
            _variant("eager", side, lambda x, matrix, dense: F.linear(x, dense)),
            _variant("int6", side, lambda x, matrix, dense: int6_linear(x, matrix), is_ours=True),
        )
    return (
        _variant("eager", side, lambda dout, matrix, dense: dout @ dense),
        _variant("int6", side, lambda dout, matrix, dense: int6_linear_dx(dout, matrix), is_ours=True),
    )


def _peer(
    name: str,
    tools: Callable[[], tuple[Callable, Callable]],
    instead: str,
    package: str = "",
    shapes: tuple[str, ...] = PEERS,
) -> Variant:
    """`tools()` gives pack(dense) -> packed, and multiply(x, packed). A weight is packed at its first call, untimed."""

    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        pack, multiply = tools()
        packed = {}

        def product(x: Tensor, matrix: Int6Matrix, dense: Tensor) -> Tensor:
            if dense.data_ptr() not in packed:
                packed[dense.data_ptr()] = pack(dense)
            return multiply(x, packed[dense.data_ptr()])

        return lambda *inputs: _each(shape, inputs, 1, product)

    return Variant(name, build, package=package, devices=("cuda",), instead=instead, shapes=shapes)


def quantize_int8(dense: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> int8 codes [N, K] and a scale a row, in its dtype."""
    scale = dense.float().abs().amax(1) / 127
    return (dense.float() / scale[:, None]).round().to(torch.int8), scale.to(dense.dtype)


def linear_int8(x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    codes, scale = packed
    return F.linear(x, codes.to(x.dtype)) * scale


def _gemlite_8() -> tuple[Callable, Callable]:
    from gemlite.helper import A16W8_INT8

    return lambda dense: A16W8_INT8(dense.device, dense.dtype).from_weights(dense), lambda x, layer: layer(x)


def quantize_uint4(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> codes uint8 [N, K] in 0..15, scale and zero [N K/128, 1]: dense is about (code - zero) * scale."""
    groups = dense.float().reshape(-1, 128)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8)
    return codes.view(dense.shape), scale.to(dense.dtype), (-low / scale).to(dense.dtype)


def _gemlite_4() -> tuple[Callable, Callable]:
    from gemlite.helper import A16W4_HQQ_INT

    def pack(dense: Tensor):
        return A16W4_HQQ_INT(dense.device, dense.dtype).from_weights(*quantize_uint4(dense))

    return pack, lambda x, layer: layer(x)


def _bitsandbytes() -> tuple[Callable, Callable]:
    import bitsandbytes

    return (
        lambda dense: bitsandbytes.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4"),
        lambda x, packed: bitsandbytes.matmul_4bit(x, packed[0].t(), packed[1]),
    )


FOREIGN = (
    _peer("compile-int8", lambda: (quantize_int8, torch.compile(linear_int8)), "8 bits a weight, one scale a row"),
    _peer("gemlite-8", _gemlite_8, "8 bits a weight, one scale a row", "gemlite", TUNED_BY_GEMLITE),
    _peer("gemlite-4", _gemlite_4, "4 bits a weight, a scale for 128", "gemlite", TUNED_BY_GEMLITE),
    _peer("bitsandbytes-nf4", _bitsandbytes, "4 bits a weight, a scale for 64", "bitsandbytes"),
)


# ---- quantising and packing a model


def _layer_sizes(shape: Shape) -> list[tuple[int, int]]:
    """[N, K] of the linears of one layer: four of attention, three of a gated MLP."""
    width, hidden = shape["width"], shape["hidden"]
    return [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]


ONE_OF_EACH = (0, 4, 6)
"""Places of a matrix of each shape among `_layer_sizes`."""


def _draw_layer(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    return tuple(torch.randn(size, device=device, generator=generator).to(dtype) for size in _layer_sizes(shape))


def _packing(
    quantize: Callable[[Tensor], Int6Matrix | Int6Weight],
) -> Callable[[Shape, torch.device, torch.dtype], Call]:
    """As many layers as a model has, one after the other; judged by a matrix of each shape."""

    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        def run(*weights: Tensor) -> Tensors:
            for _ in range(shape["layers"]):
                packed = [quantize(weight) for weight in weights]
            return tuple(packed[at].dequantize() for at in ONE_OF_EACH)

        return run

    return build


def _quantize_rows(weight: Tensor) -> Int6Weight:
    codes, scale = quantize_int6_ref(weight, CLIP)
    return Int6Weight(pack_int6_ref(codes), scale, tuple(weight.shape))


def _exactly_quantized(shape: Shape, *weights: Tensor) -> Tensors:
    """In fp64 but for the scales, which are fp16 by definition."""
    found = []
    for weight in (weights[at] for at in ONE_OF_EACH):
        scale = (CLIP * weight.square().mean(dim=1).sqrt()).half().double()[:, None]
        found.append((weight / scale).round().clamp(-31, 31) * scale)
    return tuple(found)


def _packing_bytes(shape: Shape, itemsize: int) -> int:
    return shape["layers"] * sum(n * k * itemsize + n * k * 3 // 4 + 2 * n for n, k in _layer_sizes(shape))


def _bytes(shape: Shape, itemsize: int) -> int:
    """Packed weights, scales and results of each layer; an x that several layers read counts once."""
    rows, sizes = shape.get("M", 1), _sizes(shape)
    weights = sum(n * k * 3 // 4 + 2 * n for n, k in sizes)
    return weights + itemsize * rows * (sum(n for n, _ in sizes) + sum({k for _, k in sizes}))


def _flops(shape: Shape) -> int:
    return 2 * shape.get("M", 1) * sum(n * k for n, k in _sizes(shape))


ENTRIES = (
    Entry(
        group="int6",
        op="int6_linear",
        shapes=SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_drawing(1),
        truth=_truth(1),
        variants=(*_linear(1), *FOREIGN),
        bytes=_bytes,
        flops=_flops,
    ),
    Entry(
        group="int6",
        op="int6_linear_dx",
        shapes=DX_SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_drawing(0),
        truth=_truth(0),
        variants=_linear(0),
        bytes=_bytes,
        flops=_flops,
    ),
    Entry(
        group="int6",
        op="int6_decode",
        shapes=DECODE,
        toy={"blocks": 1, "width": 32, "qkv": 64, "hidden": 48},
        draw=_drawing(1),
        truth=_truth(1),
        variants=_linear(1),
        bytes=_bytes,
        flops=_flops,
    ),
    Entry(
        group="int6",
        op="int6_packing",
        shapes={"7B": {"layers": 32, "width": 4096, "hidden": 11008}},
        toy={"layers": 2, "width": 64, "hidden": 96},
        gate={"layers": 1, "width": 512, "hidden": 1376},
        draw=_draw_layer,
        truth=_exactly_quantized,
        variants=(
            Variant("eager", _packing(_quantize_rows), captures=False),
            Variant("int6", _packing(partial(quantize_int6, clip=CLIP)), captures=False, is_ours=True),
        ),
        bytes=_packing_bytes,
        flops=lambda shape: 0,
        once=True,
    ),
)
