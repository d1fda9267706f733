"""Adam on a pool of adapters; an entry of the group `lora`.

The op works in place. Each variant makes its own copy of a drawn state at the first call with it and steps that copy
from then on: the gate judges the first step, the clock sees steps alone, and `peak_bytes` includes the copy.
"""

import torch
from torch import Tensor

from ..kernels.lora_adam import lora_adam_, lora_adam_ref_
from .entry import Call, Entry, Shape, Tensors, Variant

SHAPES = {"64x234496": {"slots": 64, "P": 234_496}}
TOY = {"slots": 3, "P": 700}
BETAS, EPS = (0.9, 0.95), 1e-10


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """params, grads, exp_avg, exp_avg_sq, step, lr, group_lr, in fp32 whatever `dtype` is."""
    slots, size = shape["slots"], shape["P"]

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, generator=generator)

    step = torch.randint(1, 50, (slots,), device=device, generator=generator)
    moments = randn(slots, size) * 1e-3, randn(slots, size).square() * 1e-6 + 1e-12
    return randn(slots, size), randn(slots, size) * 1e-3, *moments, step, randn(slots).abs() * 1e-2, randn(size).abs()


def _stepping(update: Call) -> Call:
    """A function of the drawn state that steps its own copy of it, and returns the copy's params and moments."""
    copies: dict[int, Tensors] = {}

    def run(*inputs: Tensor) -> Tensors:
        key = inputs[0].data_ptr()
        if key not in copies:
            copies[key] = tuple(t.clone() for t in inputs)
        update(*copies[key])
        return copies[key][0], *copies[key][2:4]

    return run


def _reference(params, grads, exp_avg, exp_avg_sq, step, lr, group_lr) -> None:
    lora_adam_ref_(params, grads, exp_avg, exp_avg_sq, step, lr, group_lr, betas=BETAS, eps=EPS)


def _klora(params, grads, exp_avg, exp_avg_sq, step, lr, group_lr) -> None:
    lora_adam_(params, grads, exp_avg, exp_avg_sq, step, lr, None, group_lr, BETAS, EPS)


def _torch_fused(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def update(params, grads, exp_avg, exp_avg_sq, step, lr, group_lr) -> None:
        key = params.data_ptr()
        if key not in optimizers:
            params.requires_grad_().grad = grads
            optimizers[key] = torch.optim.Adam([params], lr[0], betas=BETAS, eps=EPS, fused=True, capturable=True)
        optimizers[key].step()

    return _stepping(update)


ENTRIES = (
    Entry(
        group="lora",
        op="lora_adam_",
        shapes=SHAPES,
        toy=TOY,
        draw=_draw,
        truth=lambda shape, *inputs: _stepping(_reference)(*inputs),
        variants=(
            Variant("eager", lambda shape, device, dtype: _stepping(_reference)),
            Variant(
                "torch.compile", lambda shape, device, dtype: _stepping(torch.compile(_reference)), devices=("cuda",)
            ),
            Variant("torch-fused", _torch_fused, devices=("cuda",), instead="one rate and one counter for all slots"),
            Variant("klora", lambda shape, device, dtype: _stepping(_klora), is_ours=True),
        ),
        bytes=lambda shape, itemsize: 28 * shape["slots"] * shape["P"] + 4 * shape["P"] + 20 * shape["slots"],
        flops=lambda shape: 15 * shape["slots"] * shape["P"],
    ),
)
