"""Launch shapes, what both directions load, and the forward kernel.

A program takes a run of tokens of one document, ROWS at a time, as a tile [ROWS, CHUNKS, CHUNK] whose rows are
CHUNKS * CHUNK >= D wide. With CHUNK the 32 lanes of a warp times 16 bytes, a row of 512 belongs to one warp: each lane
loads 16 bytes twice, and the mean over a row needs shuffles but no barrier.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..dispatch import next_power_of_2
from ..launch import launched

SPLIT = 32
"""Tokens of one document whose gradient sums one program of the backward takes."""


@dataclass(frozen=True)
class RmsNormConfig:
    chunks: int
    rows: int
    chunk: int
    forward_tokens: int
    """tokens a program of the forward"""
    num_warps: int


@functools.cache
def pick_config(width: int, dtype: torch.dtype, sums: int = 0) -> RmsNormConfig:
    """The tile for rows of `width`, 16 elements a lane: 2,048 elements, or one row where two `sums` are held as well;
    32 a lane where one sum is, as in the adapting of biases.

    NVIDIA H200, 98,304 x 512 bf16, with x0's gradient added up and two sums: 0.194 ms; two rows 0.216, four 0.293.
    Forward, four rows a program: 0.119 between blocks and 0.099 after attention; sixteen 0.134 and 0.102. Both ways
    between blocks with biases, 65,536 rows: 0.189 with 4 warps, 0.155 with 2, 0.290 with 8.
    """
    padded = next_power_of_2(width)
    elements = max(512, padded) if sums >= 2 else max(2048, padded)
    of_a_warp = 1024 if sums == 1 else 512
    warps_a_row = max(1, padded // 512)
    chunk = min(padded, 512 // dtype.itemsize * warps_a_row)
    rows = min(SPLIT, max(1, elements // padded))
    return RmsNormConfig(padded // chunk, rows, chunk, rows, elements // of_a_warp)


@triton.jit
def columns(CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """The columns of a tile, [1, CHUNKS, CHUNK]."""
    return tl.arange(0, CHUNKS)[None, :, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]


@triton.jit
def bias_row(bias_ptr, slots_ptr, document, pool, stride, column, D: tl.constexpr):
    """What the slot of this document adds, zeros for a slot outside the pool."""
    slot = document.to(tl.int64) if slots_ptr is None else tl.load(slots_ptr + document).to(tl.int64)
    is_slot = (slot >= 0) & (slot < pool)
    return tl.load(bias_ptr + slot * stride + column, mask=(column < D) & is_slot, other=0.0)


@triton.jit
def gains(weight_ptr, column, D: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """What the columns of n are multiplied by: weight, or 1 + weight."""
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    return weight + 1.0 if UNIT_OFFSET else weight


@triton.jit
def mean_of_rows(tile, D: tl.constexpr):
    """[ROWS, CHUNKS, CHUNK] -> [ROWS]."""
    return tl.sum(tl.sum(tile, axis=1), axis=1) * (1.0 / D)


@launched
@triton.jit
def forward(
    x_ptr, branch_ptr, scale_ptr, bias_ptr, slots_ptr, pushed_ptr, skip_ptr, mix_ptr, x0_ptr, x_out_ptr, x_in_ptr,
    n_ptr, rstd_ptr, weight_ptr, tokens, pool, bias_stride,
    EPS: tl.constexpr, UNIT_OFFSET: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    splits = tl.cdiv(tokens, ROWS * STEPS)
    document = tl.program_id(0) // splits
    first = (tl.program_id(0) % splits) * (ROWS * STEPS)
    column = columns(CHUNKS, CHUNK)
    wide = column < D
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + column, mask=wide, other=0.0)
    if bias_ptr is not None:
        bias = bias_row(bias_ptr, slots_ptr, document, pool, bias_stride, column, D)
    if pushed_ptr is not None:
        skip = tl.load(skip_ptr + column, mask=wide, other=0.0)
    if mix_ptr is not None:
        mix_x = tl.load(mix_ptr + column, mask=wide, other=0.0)
        mix_x0 = tl.load(mix_ptr + D + column, mask=wide, other=0.0)
    if weight_ptr is not None:
        weight = gains(weight_ptr, column, D, UNIT_OFFSET)
    row_of_batch = document.to(tl.int64) * tokens + first
    base = row_of_batch * D
    for step in range(STEPS):
        rows = step * ROWS + tl.arange(0, ROWS)
        row = rows[:, None, None]
        mask = (first + row < tokens) & wide
        offsets = row * D + column
        value = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            value += branch if scale_ptr is None else scale * branch
        if bias_ptr is not None:
            value += bias
        if x_out_ptr is not None:
            tl.store(x_out_ptr + base + offsets, value.to(x_out_ptr.dtype.element_ty), mask=mask)
        if pushed_ptr is not None:
            value += skip * tl.load(pushed_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if mix_ptr is not None:
            value = mix_x * value + mix_x0 * tl.load(x0_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if x_in_ptr is not None:
            tl.store(x_in_ptr + base + offsets, value.to(x_in_ptr.dtype.element_ty), mask=mask)
        square = mean_of_rows(value * value, D)
        # The approximate rsqrt would be the largest error of the fp32 norm.
        rstd = tl.div_rn(1.0, tl.sqrt_rn(square + EPS))
        n = value * rstd[:, None, None]
        if weight_ptr is not None:
            n *= weight
        tl.store(n_ptr + base + offsets, n.to(n_ptr.dtype.element_ty), mask=mask)
        tl.store(rstd_ptr + row_of_batch + row, rstd[:, None, None], mask=first + row < tokens)
