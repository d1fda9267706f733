"""The backward kernel, and the sum of its splits."""

import triton
import triton.language as tl

from ..launch import launched
from ..tile import rstd_of
from .forward import bias_row, columns, gains, mean_of_rows

SPLITS_AT_ONCE = 32
"""Splits that the second stage adds in one tile: all of a document of 1,024 tokens."""
GROUP = 64
"""Splits of the weight's gradient, which knows no documents, that are added before the groups are."""


@launched
@triton.jit
def backward(
    dn_ptr, dx_in_ptr, dx_out_ptr, n_ptr, rstd_ptr, x_ptr, branch_ptr, scale_ptr, bias_ptr, slots_ptr, pushed_ptr,
    skip_ptr, mix_ptr, x0_ptr, weight_ptr, squares_ptr, dx_ptr, dbranch_ptr, dpushed_ptr, dx0_ptr, sums_ptr, tokens,
    pool, bias_stride, all_tokens,
    BIAS: tl.constexpr, SCALE: tl.constexpr, MIX: tl.constexpr, SKIP: tl.constexpr, WEIGHT: tl.constexpr,
    ADDS: tl.constexpr, UNIT_OFFSET: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gradients of SPLIT = ROWS * STEPS tokens; BIAS, SCALE, MIX, SKIP, WEIGHT say whose sums go to sums_ptr, in that
    order. With a weight, which may be 0, n_ptr is x_in; with squares_ptr, as of Unnormed, it is, too, and dn_ptr is the
    gradient of n times rstd.

    The sum for `mix_x` wants the stream before the mix. In 16 bits it comes from what is read anyway, as x_in =
    n / rstd and mix_x * stream = x_in - mix_x0 * x0, unless a factor is so small beside the other that digits would be
    lost.
    """
    splits = tl.cdiv(tokens, ROWS * STEPS)
    document = tl.program_id(0) // splits
    first = (tl.program_id(0) % splits) * (ROWS * STEPS)
    column = columns(CHUNKS, CHUNK)
    wide = column < D
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + column, mask=wide, other=0.0)
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + column, mask=wide, other=0.0)
    if mix_ptr is not None:
        mix_x = tl.load(mix_ptr + column, mask=wide, other=0.0)
        mix_x0 = tl.load(mix_ptr + D + column, mask=wide, other=0.0)
    if MIX:
        is_exact = n_ptr.dtype.element_ty == tl.float32
        smallest = tl.min(tl.where(wide, tl.abs(mix_x) - 0.25 * tl.abs(mix_x0), 1.0))
        divides = (smallest > 1e-3) & (not is_exact)
    if MIX and bias_ptr is not None:
        bias = bias_row(bias_ptr, slots_ptr, document, pool, bias_stride, column, D)
    if weight_ptr is not None:
        weight = gains(weight_ptr, column, D, UNIT_OFFSET)
    if WEIGHT:
        dweight = tl.zeros((ROWS, CHUNKS, CHUNK), tl.float32)
    if BIAS:
        dbias = tl.zeros((ROWS, CHUNKS, CHUNK), tl.float32)
    if SCALE:
        dscale = tl.zeros((ROWS, CHUNKS, CHUNK), tl.float32)
    if MIX:
        dmix_x = tl.zeros((ROWS, CHUNKS, CHUNK), tl.float32)
        dmix_x0 = tl.zeros((ROWS, CHUNKS, CHUNK), tl.float32)
    if SKIP:
        dskip = tl.zeros((ROWS, CHUNKS, CHUNK), tl.float32)
    row_of_batch = document.to(tl.int64) * tokens + first
    base = row_of_batch * D
    for step in range(STEPS):
        rows = step * ROWS + tl.arange(0, ROWS)
        row = rows[:, None, None]
        mask = (first + row < tokens) & wide
        offsets = row * D + column
        grad = tl.zeros((ROWS, CHUNKS, CHUNK), tl.float32)
        if dn_ptr is not None or MIX:
            n = tl.load(n_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            is_token = first + rows < tokens
            if squares_ptr is not None:
                rstd = rstd_of(squares_ptr, row_of_batch + rows, is_token, all_tokens, D, EPS, BLOCKS)
            else:
                rstd = tl.load(rstd_ptr + row_of_batch + rows, mask=is_token, other=1.0)
            if weight_ptr is not None or squares_ptr is not None:
                n *= rstd[:, None, None]
        if dn_ptr is not None:
            dn = tl.load(dn_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            if squares_ptr is not None:
                dn *= (1.0 / rstd)[:, None, None]
            if WEIGHT:
                dweight += dn * n
            if weight_ptr is not None:
                dn *= weight
            mean = mean_of_rows(dn * n, D)
            grad = rstd[:, None, None] * (dn - n * mean[:, None, None])
        if dx_in_ptr is not None:
            grad += tl.load(dx_in_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            branch = tl.load(branch_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if SKIP:
            pushed = tl.load(pushed_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if MIX:
            if divides:
                value = n * (1.0 / rstd)[:, None, None]
            else:
                value = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
                if branch_ptr is not None:
                    joined = tl.load(branch_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
                    value += joined if scale_ptr is None else scale * joined
                if bias_ptr is not None:
                    value += bias
                if pushed_ptr is not None:
                    value += skip * tl.load(pushed_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            dmix_x += grad * value
            dmix_x0 += grad * tl.load(x0_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if dx0_ptr is not None:
            dx0 = mix_x0 * grad
            if ADDS:
                dx0 += tl.load(dx0_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx0_ptr + base + offsets, dx0.to(dx0_ptr.dtype.element_ty), mask=mask)
        if mix_ptr is not None:
            grad *= mix_x
        if SKIP:
            dskip += grad * pushed
        if dpushed_ptr is not None:
            tl.store(dpushed_ptr + base + offsets, (skip * grad).to(dpushed_ptr.dtype.element_ty), mask=mask)
        if dx_out_ptr is not None:
            grad += tl.load(dx_out_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if dx_ptr is not None:
            tl.store(dx_ptr + base + offsets, grad.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + base + offsets, (scale * grad).to(dbranch_ptr.dtype.element_ty), mask=mask)
        if BIAS:
            dbias += grad
        if SCALE:
            dscale += grad * branch
    place = tl.program_id(0).to(tl.int64)
    if BIAS:
        _store_sum(sums_ptr, place, dbias, column, D)
        place += tl.num_programs(0)
    if SCALE:
        _store_sum(sums_ptr, place, dscale, column, D)
        place += tl.num_programs(0)
    if MIX:
        if divides:
            dmix_x = (dmix_x - mix_x0 * dmix_x0) / mix_x
        _store_sum(sums_ptr, place, dmix_x, column, D)
        place += tl.num_programs(0)
        _store_sum(sums_ptr, place, dmix_x0, column, D)
        place += tl.num_programs(0)
    if SKIP:
        _store_sum(sums_ptr, place, dskip, column, D)
        place += tl.num_programs(0)
    if WEIGHT:
        _store_sum(sums_ptr, place, dweight, column, D)


@triton.jit
def _store_sum(sums_ptr, place, tile, column, D: tl.constexpr):
    tl.store(sums_ptr + place * D + column, tl.sum(tile, axis=0, keep_dims=True), mask=column < D)


@launched
@triton.jit
def add_splits(
    sums_ptr, out_ptr, slots_ptr, batch, splits, pool, out_stride,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = sum of sums[row, :splits]; with slots out[slot] = that of all rows that name the slot, in order.

    Rows of `out` lie out_stride apart; what no row names is left alone. The first row that names a slot does the work
    for all of them.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if slots_ptr is None:
        total += _document_sum(sums_ptr, row, splits, column, D, SPLITS, BLOCK)
        tl.store(out_ptr + row.to(tl.int64) * out_stride + column, total, mask=column < D)
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        earlier = 0
        for other in range(batch):
            if tl.load(slots_ptr + other).to(tl.int64) == slot:
                if other < row:
                    earlier += 1
                else:
                    total += _document_sum(sums_ptr, other, splits, column, D, SPLITS, BLOCK)
        if (slot >= 0) & (slot < pool) & (earlier == 0):
            tl.store(out_ptr + slot * out_stride + column, total, mask=column < D)


@triton.jit
def _document_sum(sums_ptr, document, splits, column, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    base = sums_ptr + tl.cast(document, tl.int64) * splits * D
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & (column < D)[None, :]
        total += tl.sum(tl.load(base + split[:, None] * D + column[None, :], mask=mask, other=0.0), axis=0)
    return total
