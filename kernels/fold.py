"""Row scales folded into weights, forward and backward: for the copies of Wo and W2 that a step multiplies with.

    copy_r = (d s_r) w_r;      dw_r = (d s_r) dcopy_r,   ds_r = d sum_k dcopy_rk w_rk

w and dcopy fp32 [L, D, K], contiguous, s fp32 [L, D], d fp32 [L]: one factor a layer. `fold_rows_` writes copies
[L, D, K] of any float dtype; `unfold_rows_` turns dcopy into dw in place and writes ds. Each number is read once: 6
bytes an element for a 16-bit copy, 12 backward. A row belongs to one program, so the sum over it has one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registration import device_of

BLOCK = 512


@triton.jit
def _fold(w_ptr, s_ptr, d_ptr, out_ptr, D, K, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    scale = tl.load(d_ptr + row // D) * tl.load(s_ptr + row)
    base = row.to(tl.int64) * K
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + base + k, mask=k < K, other=0.0)
        tl.store(out_ptr + base + k, (w * scale).to(out_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def _unfold(grad_ptr, w_ptr, s_ptr, d_ptr, ds_ptr, D, K, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    depth = tl.load(d_ptr + row // D)
    scale = depth * tl.load(s_ptr + row)
    base = row.to(tl.int64) * K
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + base + k, mask=k < K, other=0.0)
        total += grad * tl.load(w_ptr + base + k, mask=k < K, other=0.0)
        tl.store(grad_ptr + base + k, grad * scale, mask=k < K)
    tl.store(ds_ptr + row, depth * tl.sum(total))


def fold_rows_(copy: Tensor, weight: Tensor, scale: Tensor, depth: Tensor, backend: str) -> None:
    """Write `copy` [L, D, K]."""
    if backend == "reference":
        torch.mul(weight, (depth[:, None] * scale)[..., None], out=copy)
        return
    with device_of(weight):
        _fold[(scale.numel(),)](weight, scale, depth, copy, *weight.shape[1:], BLOCK=BLOCK, num_warps=4)


def unfold_rows_(grad: Tensor, dscale: Tensor, weight: Tensor, scale: Tensor, depth: Tensor, backend: str) -> None:
    """Turn `grad` [L, D, K], the copies', into the weights' and write `dscale` [L, D]."""
    if backend == "reference":
        torch.mul(depth[:, None], (grad * weight).sum(-1), out=dscale)
        grad.mul_((depth[:, None] * scale)[..., None])
        return
    with device_of(weight):
        _unfold[(scale.numel(),)](grad, weight, scale, depth, dscale, *weight.shape[1:], BLOCK=BLOCK, num_warps=4)
