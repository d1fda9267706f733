"""Momentum of all matrices in one pass, where a step is taken: what ranks do that share out the rest of Muon's step.

    m <- mu m + g

m and g fp32 [N], contiguous. mu fp32 [] and whether the step is taken, bool [], lie on the device, so that one CUDA
graph serves every step. 12 bytes an element; where the step is not taken a program reads one byte and ends.
"""

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import cdiv, device_of
from .launch import launched

BLOCK = 2048


@launched
@triton.jit
def _advance(m_ptr, g_ptr, rate_ptr, taken_ptr, N, BLOCK: tl.constexpr):
    if tl.load(taken_ptr) != 0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m = tl.load(m_ptr + i, mask=i < N, other=0.0)
        tl.store(m_ptr + i, tl.load(rate_ptr) * m + tl.load(g_ptr + i, mask=i < N, other=0.0), mask=i < N)


def advance_momentum_(momentum: Tensor, gradient: Tensor, rate: Tensor, taken: Tensor, backend: str) -> None:
    """Advance `momentum` [N] by `gradient` [N] at `rate` [], if `taken`, a bool [], says so."""
    if backend == "reference":
        if taken:
            momentum.mul_(rate).add_(gradient)
        return
    with device_of(momentum):
        _advance[(cdiv(len(momentum), BLOCK),)](
            m_ptr=momentum, g_ptr=gradient, rate_ptr=rate, taken_ptr=taken, N=len(momentum), BLOCK=BLOCK, num_warps=8
        )
