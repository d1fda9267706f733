"""Row scales folded into weights, forward and backward: for the copies of matrices that a step multiplies with.

    copy_r = (d s_r) v_r;   dw_r = (d s_r) dcopy_r,   ds_r = d sum_k dcopy_rk v_rk;      v = w, or w at its int6 values

w and dcopy fp32 [L, D, K], contiguous, s fp32 [L, D], d fp32 [L]: one factor a layer. `fold_rows_` writes copies
[L, D, K] of any float dtype; `unfold_rows_` turns dcopy into dw in place and writes ds. Each number is read once: 6
bytes an element for a 16-bit copy, 12 backward. A row belongs to one program, so the sum over it has one order.

int6 values, for the late steps of a run whose weights will be stored so:

    v = t clamp(round(w / t), -31, 31),   t = max(clip rms(row), 0.9 max |row| / 31), at 11 significant bits

That is what the exporter stores at this clip, without its searches: quantize_int6_ref(w, clip) where that cuts no
weight off, but for matrices with scales below 2^-14, which a file may hold in fp16 with fewer bits. The gradient
passes straight through to w (Bengio et al. 2013), and that of s is exact. A row is read twice then, the second time
from cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import device_of
from .int6.reference import CODE_MAX, SMALLEST_SCALE, rounded_scale
from .launch import launched

BLOCK = 512
MOST_CODE, LEAST_SCALE = tl.constexpr(float(CODE_MAX)), tl.constexpr(SMALLEST_SCALE)
REACH = tl.constexpr(0.9 / CODE_MAX)
"""What a row's scale is at least, of its largest weight: few are large, and a trained model needs them. One of 11 rms
among 1536 has the least squared error at 0.9."""
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
"""Added to a small fp32 number and subtracted again, it leaves the nearest integer, ties to even."""


class Int6Grid(NamedTuple):
    """Whether rows are at their int6 values, and which."""

    is_on: Tensor
    """int32 [], on the device: a step that was captured once serves before and after"""
    scales: Tensor
    """fp32 [L, D]: the t of each row, written by the fold and read by the unfold; 0: the row is as it is"""
    clip: float


@triton.jit
def _int6(w, scale):
    """w at the nearest of the 63 multiples of `scale`; as it is where that is 0."""
    code = tl.minimum(tl.maximum(tl.div_rn(w, tl.where(scale > 0.0, scale, 1.0)), -MOST_CODE), MOST_CODE)
    return tl.where(scale > 0.0, ((code + TO_INTEGER) - TO_INTEGER) * scale, w)


@triton.jit
def _row_scale(w_ptr, base, clip, K, BLOCK: tl.constexpr):
    """clip * rms of a row, or what reaches its largest weight, at 11 significant bits."""
    total = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + base + k, mask=k < K, other=0.0)
        total += w * w
        largest = tl.maximum(largest, tl.abs(w))
    wanted = clip * tl.sqrt_rn(tl.div_rn(tl.sum(total), tl.full((), K, tl.float32)))
    wanted = tl.maximum(wanted, tl.max(largest) * REACH)
    bits = tl.maximum(wanted, LEAST_SCALE).to(tl.int32, bitcast=True)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return tl.where(wanted == 0.0, 0.0, bits.to(tl.float32, bitcast=True))


@launched
@triton.jit
def _fold(w_ptr, s_ptr, d_ptr, out_ptr, is_on_ptr, scales_ptr, clip, D, K, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = row.to(tl.int64) * K
    if s_ptr is not None:
        scale = tl.load(d_ptr + row // D) * tl.load(s_ptr + row)
    if is_on_ptr is not None:
        int6_scale = 0.0
        if tl.load(is_on_ptr) != 0:
            int6_scale = _row_scale(w_ptr, base, clip, K, BLOCK)
        tl.store(scales_ptr + row, int6_scale)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + base + k, mask=k < K, other=0.0)
        if is_on_ptr is not None:
            w = _int6(w, int6_scale)
        if s_ptr is not None:
            w *= scale
        tl.store(out_ptr + base + k, w.to(out_ptr.dtype.element_ty), mask=k < K)


@launched
@triton.jit
def _unfold(grad_ptr, w_ptr, s_ptr, d_ptr, ds_ptr, scales_ptr, D, K, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    depth = tl.load(d_ptr + row // D)
    scale = depth * tl.load(s_ptr + row)
    base = row.to(tl.int64) * K
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + base + k, mask=k < K, other=0.0)
        w = tl.load(w_ptr + base + k, mask=k < K, other=0.0)
        if scales_ptr is not None:
            w = _int6(w, tl.load(scales_ptr + row))
        total += grad * w
        tl.store(grad_ptr + base + k, grad * scale, mask=k < K)
    tl.store(ds_ptr + row, depth * tl.sum(total))


def int6_values_ref(weight: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """`weight` [..., K] at its int6 values, and the scale of each row [...]. Waits for nothing; has no gradient.

    Example: values, scales = int6_values_ref(weight, clip=0.11)
    """
    weight = weight.detach()
    wanted = clip * weight.float().square().mean(-1).sqrt()
    wanted = torch.maximum(wanted, REACH.value * weight.float().abs().amax(-1))
    scale = torch.where(wanted == 0, 0.0, rounded_scale(wanted))
    return _at(weight, scale), scale


def _at(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` [..., K] at the multiples of `scale` [...]; a row as it is where that is 0."""
    step = torch.where(scale > 0, scale, 1.0)[..., None]
    codes = (weight.float() / step).round_().clamp_(-CODE_MAX, CODE_MAX)
    return torch.where(scale[..., None] > 0, codes * step, weight).to(weight.dtype)


def fold_rows_(
    copy: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    depth: Tensor | None,
    backend: str,
    grid: Int6Grid | None = None,
) -> None:
    """Write `copy` [L, D, K]. Without `scale` and `depth` they are 1; with `grid`, weights are at their int6 values
    where it is on.
    """
    if backend == "reference":
        if grid is not None:
            grid.scales.zero_()
            if grid.is_on:
                weight, grid.scales[:] = int6_values_ref(weight, grid.clip)
        if scale is None:
            copy.copy_(weight)
        else:
            torch.mul(weight, (depth[:, None] * scale)[..., None], out=copy)
        return
    is_on, scales, clip = grid or (None, None, None)
    with device_of(weight):
        _fold[(weight.size(0) * weight.size(1),)](
            w_ptr=weight, s_ptr=scale, d_ptr=depth, out_ptr=copy, is_on_ptr=is_on, scales_ptr=scales, clip=clip,
            D=weight.size(1), K=weight.size(2), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def unfold_rows_(
    grad: Tensor,
    dscale: Tensor,
    weight: Tensor,
    scale: Tensor,
    depth: Tensor,
    backend: str,
    grid: Int6Grid | None = None,
) -> None:
    """Turn `grad` [L, D, K], the copies', into the weights' and write `dscale` [L, D]. `grid` is the fold's."""
    if backend == "reference":
        values = weight if grid is None else _at(weight, grid.scales)
        torch.mul(depth[:, None], (grad * values).sum(-1), out=dscale)
        grad.mul_((depth[:, None] * scale)[..., None])
        return
    with device_of(weight):
        _unfold[(scale.numel(),)](
            grad_ptr=grad, w_ptr=weight, s_ptr=scale, d_ptr=depth, ds_ptr=dscale,
            scales_ptr=None if grid is None else grid.scales, D=weight.size(1), K=weight.size(2), BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
