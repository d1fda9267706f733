"""Group `ceilings`: what this chip can do at best, measured in every run; the floors are computed from it."""

import torch
from torch import Tensor

from .entry import Entry, Shape, Tensors, Variant


def _draw_copy(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    return (torch.randn(shape["N"], device=device, generator=generator).to(dtype),)


def _draw_gemm(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    sizes = (shape["M"], shape["K"]), (shape["N"], shape["K"])
    return tuple(torch.randn(size, device=device, generator=generator).to(dtype) for size in sizes)


def _copy(shape: Shape, device: torch.device, dtype: torch.dtype):
    def run(x: Tensor) -> Tensor:
        return x.clone()

    return run


def _gemm(shape: Shape, device: torch.device, dtype: torch.dtype):
    return lambda x, weight: x @ weight.mT


ENTRIES = (
    Entry(
        group="ceilings",
        op="copy",
        shapes={"1Gi": {"N": 1 << 30}},
        toy={"N": 1 << 20},
        gate={"N": 1 << 20},
        draw=_draw_copy,
        truth=lambda shape, x: x,
        variants=(Variant("eager", _copy, captures=False),),  # in a graph it would be a memcpy node, which is slower
        bytes=lambda shape, itemsize: 2 * itemsize * shape["N"],
        flops=lambda shape: 0,
    ),
    Entry(
        group="ceilings",
        op="gemm",
        shapes={"8192": {"M": 8192, "N": 8192, "K": 8192}},
        toy={"M": 256, "N": 256, "K": 256},
        gate={"M": 1024, "N": 1024, "K": 1024},
        draw=_draw_gemm,
        truth=lambda shape, x, weight: x @ weight.mT,
        variants=(Variant("eager", _gemm),),
        bytes=lambda shape, itemsize: (
            itemsize * (shape["M"] * shape["K"] + shape["N"] * shape["K"] + shape["M"] * shape["N"])
        ),
        flops=lambda shape: 2 * shape["M"] * shape["N"] * shape["K"],
    ),
)
