"""Group `mlp`: products with frozen weights, alone and as an MLP, forward and dx, as adaptation runs them.

Rows are those of the engine's batches: 64, 16 or 4 documents, windows of 256 to 1,024 tokens.
"""

import torch
from torch import Tensor

from ..kernels.linear import linear, linear_ref
from ..kernels.mlp import relu_squared_mlp, relu_squared_mlp_ref, swiglu_mlp, swiglu_mlp_ref
from .entry import Call, Entry, Shape, Tensors, Variant

ROWS = {
    f"{batch}x{tokens}": batch * tokens for batch, tokens in ((64, 1024), (64, 512), (16, 1024), (4, 1024), (4, 256))
}
PRODUCTS = {
    f"{rows}-{K}-{N}": {"rows": M, "K": K, "N": N} for K, N in ((512, 512), (1536, 512)) for rows, M in ROWS.items()
}
GATED = {"16384-2048-5632": {"rows": 16384, "D": 2048, "hidden": 5632}}
MLPS = {name: {"rows": rows, "D": 512, "hidden": 1536} for name, rows in ROWS.items()}


def _draw(rows: int, *weights: tuple[int, int]):
    """Draws x, the weights [N, K], each of about the size 1 / sqrt(K), and dout."""

    def draw(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        sizes = (
            ((rows, weights[0][1]), 1.0),
            *((size, size[1] ** -0.5) for size in weights),
            ((rows, weights[-1][0]), 1.0),
        )
        return tuple((torch.randn(size, device=device, generator=generator) * scale).to(dtype) for size, scale in sizes)

    return draw


def _frozen(function: Call) -> Call:
    """The output and dx."""

    def run(x: Tensor, *rest: Tensor) -> Tensors:
        *weights, dout = rest
        leaf = x.detach().requires_grad_()
        out = function(leaf, *weights)
        return out, torch.autograd.grad(out, leaf, dout)[0]

    return run


def _variants(reference: Call, ours: Call) -> tuple[Variant, ...]:
    return (
        Variant("eager", lambda shape, device, dtype: _frozen(reference)),
        Variant("torch.compile", lambda shape, device, dtype: _frozen(torch.compile(reference)), devices=("cuda",)),
        Variant("klora", lambda shape, device, dtype: _frozen(ours), is_ours=True),
    )


def _mlp_bytes(shape: Shape, itemsize: int) -> int:
    """x, relu(u)^2 and out; dout, relu(u)^2 again and dx, as one kernel each way would move them. The weights twice."""
    rows, width, hidden = shape["rows"], shape["D"], shape["hidden"]
    return itemsize * (rows * (4 * width + 2 * hidden) + 4 * width * hidden)


def _gated_bytes(shape: Shape, itemsize: int) -> int:
    """x, gate, up and out; dout, gate and up again and dx, as one kernel each way moves them. The weights twice."""
    rows, width, hidden = shape["rows"], shape["D"], shape["hidden"]
    return itemsize * (rows * (4 * width + 4 * hidden) + 6 * width * hidden)


def _draw_gated(shape: Shape, *how) -> Tensors:
    return _draw(shape["rows"], *[(shape["hidden"], shape["D"])] * 2, (shape["D"], shape["hidden"]))(*how)


ENTRIES = (
    Entry(
        group="mlp",
        op="linear_frozen",
        shapes=PRODUCTS,
        toy={"rows": 18, "K": 48, "N": 32},
        gate={"rows": 4000, "K": 1536, "N": 512},
        draw=lambda shape, *how: _draw(shape["rows"], (shape["N"], shape["K"]))(*how),
        truth=lambda shape, *inputs: _frozen(linear_ref)(*inputs),
        variants=_variants(linear_ref, linear),
        bytes=lambda shape, size: 2 * size * (shape["rows"] * (shape["K"] + shape["N"]) + shape["K"] * shape["N"]),
        flops=lambda shape: 4 * shape["rows"] * shape["K"] * shape["N"],
    ),
    Entry(
        group="mlp",
        op="relu_squared_mlp_frozen",
        shapes=MLPS,
        toy={"rows": 18, "D": 32, "hidden": 48},
        gate={"rows": 4000, "D": 512, "hidden": 1536},
        draw=lambda shape, *how: _draw(shape["rows"], (shape["hidden"], shape["D"]), (shape["D"], shape["hidden"]))(
            *how
        ),
        truth=lambda shape, *inputs: _frozen(relu_squared_mlp_ref)(*inputs),
        variants=_variants(relu_squared_mlp_ref, relu_squared_mlp),
        bytes=_mlp_bytes,
        flops=lambda shape: 8 * shape["rows"] * shape["D"] * shape["hidden"],
    ),
    Entry(
        group="mlp",
        op="swiglu_mlp_frozen",
        shapes=MLPS | GATED,
        toy={"rows": 18, "D": 32, "hidden": 48},
        gate={"rows": 4000, "D": 512, "hidden": 1536},
        draw=_draw_gated,
        truth=lambda shape, *inputs: _frozen(swiglu_mlp_ref)(*inputs),
        variants=_variants(swiglu_mlp_ref, swiglu_mlp),
        bytes=_gated_bytes,
        flops=lambda shape: 12 * shape["rows"] * shape["D"] * shape["hidden"],
    ),
)
