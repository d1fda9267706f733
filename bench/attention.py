"""Group `attention`: ours, the formula in eager PyTorch, PyTorch's SDPA backends, and competing packages."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import PACKAGES, attend, causal_attention
from .entry import Call, Entry, Shape, Tensors, Variant

SHAPES = {
    "B96-S1024": {"B": 96, "S": 1024, "H": 8, "G": 4, "d": 64},
    "B64-S256": {"B": 64, "S": 256, "H": 8, "G": 4, "d": 64},
    "B64-S512": {"B": 64, "S": 512, "H": 8, "G": 4, "d": 64},
    "B64-S768": {"B": 64, "S": 768, "H": 8, "G": 4, "d": 64},
    "B64-S1024": {"B": 64, "S": 1024, "H": 8, "G": 4, "d": 64},
    "B48-S2048": {"B": 48, "S": 2048, "H": 8, "G": 4, "d": 64},
    "B48-S1024-d128": {"B": 48, "S": 1024, "H": 8, "G": 4, "d": 128},
}
TOY = {"B": 2, "S": 48, "H": 4, "G": 2, "d": 16}
GATE = {"B": 2, "S": 1000, "H": 8, "G": 4, "d": 64}


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d), causal) v, term by term in the dtype of the inputs."""
    groups = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(-1) ** 0.5
    future = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhij,bjhd->bihd", F.softmax(scores.masked_fill(future, float("-inf")), -1), v)


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    sizes = [(shape["B"], shape["S"], heads, shape["d"]) for heads in (shape["H"], shape["G"], shape["G"], shape["H"])]
    return tuple(torch.randn(size, device=device, generator=generator).to(dtype) for size in sizes)


def _forward(attention: Call) -> Call:
    return lambda q, k, v, dout: attention(q, k, v)


def _forward_backward(attention: Call) -> Call:
    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    return run


def _variants(wrap) -> tuple[Variant, ...]:
    def sdpa(backend: str, *devices: str) -> Variant:
        return Variant(
            f"sdpa-{backend}",
            lambda shape, device, dtype: wrap(lambda q, k, v: attend(q, k, v, backend)),
            devices=devices,
        )

    def compiled(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        return wrap(torch.compile(plain_attention))

    def package(name: str) -> Variant:
        def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
            return wrap(lambda q, k, v: attend(q, k, v, name))

        return Variant(PACKAGES[name].distribution, build, package=PACKAGES[name].distribution, devices=("cuda",))

    return (
        Variant("eager", lambda shape, device, dtype: wrap(plain_attention)),
        Variant("klora", lambda shape, device, dtype: wrap(causal_attention), is_ours=True),
        Variant("torch.compile", compiled, devices=("cuda",)),
        sdpa("cudnn", "cuda"),
        sdpa("flash", "cpu", "cuda"),
        *map(package, PACKAGES),
    )


def _bytes(tensors_of_heads: int, tensors_of_groups: int):
    def count(shape: Shape, itemsize: int) -> int:
        rows = shape["B"] * shape["S"] * shape["d"]
        return itemsize * rows * (tensors_of_heads * shape["H"] + tensors_of_groups * shape["G"])

    return count


def _flops(products: int):
    """`products` matrix products over the causal half of the square."""
    return lambda shape: products * shape["B"] * shape["H"] * shape["S"] ** 2 * shape["d"]


ENTRIES = (
    Entry(
        group="attention",
        op="attention_forward",
        shapes=SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_draw,
        truth=lambda shape, *inputs: _forward(plain_attention)(*inputs),
        variants=_variants(_forward),
        bytes=_bytes(2, 2),
        flops=_flops(2),
    ),
    Entry(
        group="attention",
        op="attention_forward_backward",
        shapes=SHAPES,
        toy=TOY,
        gate=GATE,
        draw=_draw,
        truth=lambda shape, *inputs: _forward_backward(plain_attention)(*inputs),
        variants=_variants(_forward_backward),
        bytes=_bytes(4, 4),
        flops=_flops(7),
    ),
)
