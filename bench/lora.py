"""Group `lora`: products with one adapter a document: the Q, K and V projections, also with what attention wants done
to q and k; a single product; the squared-ReLU MLP.

`cublas-without-lora` is the product that the adapters are added to, and its gradient of x: what they cost is the
distance to it. The adapters are of x's dtype, and read where they lie; `klora-fp32-adapters` takes them in fp32, which
is a launch more. `klora-two-launches` norms and rotates after the projections. `klora-without-lora` is the product or
the MLP that the adapters of `lora_linear` and `lora_mlp`, in fp32 as the engine has them, are added to.
"""

import torch
from torch import Tensor

from ..kernels.linear import linear
from ..kernels.lora_linear import lora_linear, lora_linear_ref
from ..kernels.lora_mlp import lora_mlp, lora_mlp_ref
from ..kernels.lora_qkv import lora_qkv, lora_qkv_ref, lora_qkv_rope, lora_qkv_rope_ref
from ..kernels.mlp import relu_squared_mlp
from ..kernels.rotary import norm_rotary, rotary_tables
from .entry import Call, Entry, Shape, Tensors, Variant

SEED = {"B": 64, "D": 512, "Nq": 512, "Nk": 256, "Nv": 256, "d": 64, "R": 8}
SHAPES = {f"B64-S{length}": {**SEED, "S": length} for length in (1024, 768, 512, 256)}
TOY = {"B": 2, "S": 24, "D": 32, "Nq": 32, "Nk": 16, "Nv": 16, "d": 16, "R": 8}
GATE = {**SEED, "B": 5, "S": 1000}
PRODUCTS = {
    f"{name}-R{rank}": {"B": batch, "S": length, "D": 512, "hidden": 1536, "R": rank}
    for name, batch, length in (("64x1024", 64, 1024), ("4x1024", 4, 1024), ("64x256", 64, 256))
    for rank in (8, 64)
}
TOY_PRODUCT = {"B": 2, "S": 24, "D": 32, "hidden": 48, "R": 8}
GATE_PRODUCT = {"B": 5, "S": 1000, "D": 512, "hidden": 1536, "R": 8}


def _sizes(shape: Shape) -> tuple[int, int, int]:
    return shape["Nq"], shape["Nk"], shape["Nv"]


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """x, weight, the adapters, and the gradients of q, k and v."""

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    batch, tokens, width, rank = (shape[name] for name in "BSDR")
    rows = sum(_sizes(shape))
    return (
        randn(batch, tokens, width).to(dtype),
        (randn(rows, width) * width**-0.5).to(dtype),
        (randn(batch, 3, rank, width) * width**-0.5).to(dtype),
        (randn(batch, rows, rank) * 0.3).to(dtype),
        *(randn(batch, tokens, size).to(dtype) for size in _sizes(shape)),
    )


def _forward(shape: Shape, project: Call) -> Call:
    """q, k, v."""
    return lambda x, weight, a, b, *douts: project(x, weight, a, b, sizes=_sizes(shape))


def _forward_backward(shape: Shape, project: Call) -> Call:
    """q, k, v, dx, dA, dB."""

    def run(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *douts: Tensor) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        outputs = project(leaves[0], weight, *leaves[1:], sizes=_sizes(shape))
        return *outputs, *torch.autograd.grad(outputs, leaves, douts)

    return run


def _matrix_product(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    return lambda x, weight, a, b, *douts: x.flatten(0, 1) @ weight.T


def _both_matrix_products(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """The gradients of q, k and v are joined once for each set of inputs, which is not part of the products."""
    joined: dict[int, Tensor] = {}

    def run(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *douts: Tensor) -> Tensors:
        key = douts[0].data_ptr()
        if key not in joined:
            joined[key] = torch.cat(douts, -1).flatten(0, 1)
        return x.flatten(0, 1) @ weight.T, joined[key] @ weight

    return run


def _with_fp32_adapters(call: Call) -> Call:
    """`call` on fp32 copies of the adapters, made once for each set of inputs."""
    copies: dict[int, Tensors] = {}

    def run(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *douts: Tensor) -> Tensors:
        key = a.data_ptr()
        if key not in copies:
            copies[key] = a.float(), b.float()
        return call(x, weight, *copies[key], *douts)

    return run


def _variants(wrap, bound: Call, instead: str) -> tuple[Variant, ...]:
    def compiled(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        return wrap(shape, torch.compile(lora_qkv_ref))

    return (
        Variant("eager", lambda shape, device, dtype: wrap(shape, lora_qkv_ref)),
        Variant("torch.compile", compiled, devices=("cuda",)),
        Variant("klora", lambda shape, device, dtype: wrap(shape, lora_qkv), is_ours=True),
        Variant(
            "klora-fp32-adapters",
            lambda shape, device, dtype: _with_fp32_adapters(wrap(shape, lora_qkv)),
            devices=("cuda",),
            is_ours=True,
        ),
        Variant("cublas-without-lora", bound, devices=("cuda",), instead=instead),
    )


def _tables(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """cos, sin and gain."""
    cos, sin = rotary_tables(shape["S"], shape["d"], 5e4, device=device)
    return {"cos": cos, "sin": sin, "gain": torch.linspace(1.0, 2.0, shape["Nq"] // shape["d"], device=device)}


def _rope(project: Call):
    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        more = {**_tables(shape, device), "sizes": _sizes(shape), "head_dim": shape["d"]}
        return lambda x, weight, a, b, *douts: project(x, weight, a, b, **more)

    return build


def _two_launches(x, weight, a, b, cos, sin, gain, sizes, head_dim) -> Tensors:
    q, k, v = lora_qkv(x, weight, a, b, sizes=sizes)
    q, k = norm_rotary(q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim)), cos, sin, gain)
    return q.flatten(-2), k.flatten(-2), v


def _rope_truth(shape: Shape, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *douts: Tensor) -> Tensors:
    tables = {name: table.double() for name, table in _tables(shape, x.device).items()}
    return lora_qkv_rope_ref(x, weight, a, b, **tables, sizes=_sizes(shape), head_dim=shape["d"])


def _bytes(passes: int):
    """x, weight, q, k, v and the adapters, each once; with two passes the gradients of all but the weight too."""

    def count(shape: Shape, itemsize: int) -> int:
        rows, width = sum(_sizes(shape)), shape["D"]
        tokens = itemsize * shape["B"] * shape["S"] * (width + rows)
        adapters = itemsize * shape["B"] * shape["R"] * (3 * width + rows)
        return passes * (tokens + adapters) + itemsize * rows * width

    return count


def _flops(products: int, adapter_products: int):
    """Products with the weight, and pairs of products with A and B."""

    def count(shape: Shape) -> int:
        rows, width = sum(_sizes(shape)), shape["D"]
        low_rank = adapter_products * shape["R"] * (3 * width + rows)
        return 2 * shape["B"] * shape["S"] * (products * width * rows + low_rank)

    return count


def _draw_products(matrices: int):
    """Draws x, the weight of o or those of the MLP, A and B of each in fp32, and dout."""

    def draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        def randn(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(size, device=device, generator=generator) * scale

        batch, tokens, width, rank = (shape[name] for name in "BSDR")
        sizes = [(width, width)] if matrices == 1 else [(shape["hidden"], width), (width, shape["hidden"])]
        weights = [randn(N, K, scale=K**-0.5).to(dtype) for N, K in sizes]
        pairs = [(randn(batch, rank, K, scale=K**-0.5), randn(batch, N, rank, scale=0.3)) for N, K in sizes]
        x, dout = (randn(batch, tokens, width).to(dtype) for _ in range(2))
        return x, *weights, *(lora for pair in pairs for lora in pair), dout

    return draw


def _adapted(function: Call, matrices: int) -> Call:
    """The output, dx and the gradients of the adapters."""

    def run(x: Tensor, *rest: Tensor) -> Tensors:
        weights, adapters, dout = rest[:matrices], rest[matrices:-1], rest[-1]
        leaves = [t.detach().requires_grad_() for t in (x, *adapters)]
        out = function(leaves[0], *weights, *leaves[1:])
        return out, *torch.autograd.grad(out, leaves, dout)

    return run


def _frozen(function: Call, matrices: int) -> Call:
    """The output and dx without adapters."""

    def run(x: Tensor, *rest: Tensor) -> Tensors:
        leaf = x.detach().requires_grad_()
        out = function(leaf, *rest[:matrices])
        return out, torch.autograd.grad(out, leaf, rest[-1])[0]

    return run


def _product_variants(matrices: int, reference: Call, ours: Call, base: Call, instead: str) -> tuple[Variant, ...]:
    def compiled(*given) -> Call:
        return _adapted(torch.compile(reference), matrices)

    return (
        Variant("eager", lambda *given: _adapted(reference, matrices)),
        Variant("torch.compile", compiled, devices=("cuda",)),
        Variant("klora", lambda *given: _adapted(ours, matrices), is_ours=True),
        Variant("klora-without-lora", lambda *given: _frozen(base, matrices), devices=("cuda",), instead=instead),
    )


def _product_sizes(shape: Shape, matrices: int) -> tuple[int, int]:
    """(numbers of the weights, numbers of one document's adapters)"""
    width, hidden = shape["D"], shape["D"] if matrices == 1 else shape["hidden"]
    return matrices * width * hidden, matrices * shape["R"] * (width + hidden)


def _product_bytes(matrices: int):
    """x, out, dout and dx once, the hidden values written once and read twice each way; weights twice; fp32 adapters
    and their gradients once.
    """

    def count(shape: Shape, itemsize: int) -> int:
        weights, adapters = _product_sizes(shape, matrices)
        tokens = shape["B"] * shape["S"] * (4 * shape["D"] + (6 * shape["hidden"] if matrices == 2 else 0))
        return itemsize * (tokens + 2 * weights) + 2 * 4 * shape["B"] * adapters

    return count


def _product_flops(matrices: int):
    def count(shape: Shape) -> int:
        weights, adapters = _product_sizes(shape, matrices)
        return 2 * shape["B"] * shape["S"] * (2 * weights + 3 * adapters)

    return count


def _product_entry(op: str, matrices: int, reference: Call, variants: tuple[Variant, ...]) -> Entry:
    return Entry(
        group="lora",
        op=op,
        shapes=PRODUCTS,
        toy=TOY_PRODUCT,
        gate=GATE_PRODUCT,
        draw=_draw_products(matrices),
        truth=lambda shape, *inputs: _adapted(reference, matrices)(*inputs),
        variants=variants,
        bytes=_product_bytes(matrices),
        flops=_product_flops(matrices),
    )


ENTRIES = (
    Entry(
        group="lora",
        op="lora_qkv_forward",
        shapes=SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_draw,
        truth=lambda shape, *inputs: _forward(shape, lora_qkv_ref)(*inputs),
        variants=_variants(_forward, _matrix_product, "x W^T alone"),
        bytes=_bytes(1),
        flops=_flops(1, 1),
    ),
    Entry(
        group="lora",
        op="lora_qkv_forward_backward",
        shapes=SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_draw,
        truth=lambda shape, *inputs: _forward_backward(shape, lora_qkv_ref)(*inputs),
        variants=_variants(_forward_backward, _both_matrix_products, "x W^T and dY W alone"),
        bytes=_bytes(2),
        flops=_flops(2, 3),
    ),
    Entry(
        group="lora",
        op="lora_qkv_rope_forward",
        shapes=SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_draw,
        truth=_rope_truth,
        variants=(
            Variant("eager", _rope(lora_qkv_rope_ref)),
            Variant("torch.compile", lambda *given: _rope(torch.compile(lora_qkv_rope_ref))(*given), devices=("cuda",)),
            Variant("klora-two-launches", _rope(_two_launches), is_ours=True),
            Variant("klora", _rope(lora_qkv_rope), is_ours=True),
            Variant("cublas-without-lora", _matrix_product, devices=("cuda",), instead="x W^T alone"),
        ),
        bytes=_bytes(1),
        flops=_flops(1, 1),
    ),
    _product_entry(
        "lora_linear_forward_backward",
        1,
        lora_linear_ref,
        _product_variants(1, lora_linear_ref, lora_linear, linear, "the product and its dx alone"),
    ),
    _product_entry(
        "lora_mlp_forward_backward",
        2,
        lora_mlp_ref,
        _product_variants(2, lora_mlp_ref, lora_mlp, relu_squared_mlp, "the MLP and its dx alone"),
    ),
)
