"""Averages of weights, updated inside a training step: an exponential one and a sum, each where its weight says so.

    ema <- ema + a (w - ema) where a > 0;   total <- total + b w where b > 0

ema, total and w fp32 [N], contiguous; a and b are the two fp32 of `weights`, on the device, so that one CUDA graph
serves every step. Where both are 0, which is most steps, a program reads 8 bytes and ends; else 12 bytes an element for
each of the two.
"""

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import cdiv, device_of
from .launch import launched

BLOCK = 2048


@launched
@triton.jit
def _update(ema_ptr, total_ptr, w_ptr, weights_ptr, N, BLOCK: tl.constexpr):
    a, b = tl.load(weights_ptr), tl.load(weights_ptr + 1)
    if (a > 0.0) | (b > 0.0):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + i, mask=i < N, other=0.0)
        if a > 0.0:
            ema = tl.load(ema_ptr + i, mask=i < N, other=0.0)
            tl.store(ema_ptr + i, ema + a * (w - ema), mask=i < N)
        if b > 0.0:
            total = tl.load(total_ptr + i, mask=i < N, other=0.0)
            tl.store(total_ptr + i, total + b * w, mask=i < N)


def update_averages_(ema: Tensor, total: Tensor, values: Tensor, weights: Tensor, backend: str) -> None:
    """Take `values` [N] into `ema` and `total` at `weights` [2]. The reference reads these on the host."""
    if backend == "reference":
        a, b = weights.tolist()
        if a:
            ema.lerp_(values, a)
        if b:
            total.add_(values, alpha=b)
        return
    with device_of(values):
        _update[(cdiv(len(values), BLOCK),)](
            ema_ptr=ema, total_ptr=total, w_ptr=values, weights_ptr=weights, N=len(values), BLOCK=BLOCK, num_warps=8
        )
