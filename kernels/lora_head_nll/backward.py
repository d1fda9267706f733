"""What follows from E: the gradients of h, of both adapter matrices and of the weight."""

import triton
import triton.language as tl

from ..dot import multiply_add
from ..launch import launched


@triton.jit
def _row_factor(dnll_ptr, lse_ptr, offsets, mask):
    """What a row of E has to be multiplied by: dnll, and exp(-lse) where E is not normalised (lse_ptr given)."""
    factor = tl.load(dnll_ptr + offsets, mask=mask, other=0.0)
    if lse_ptr is not None:
        factor *= tl.exp(-tl.load(lse_ptr + offsets, mask=mask, other=0.0))
    return factor


@launched
@triton.jit(do_not_specialize=["rows"])
def scale_rows(
    h_ptr, dnll_ptr, lse_ptr, out_ptr, factors_ptr, rows, D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    """out = factor * h, BLOCK rows [D] a program; and the factors."""
    row, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    factor = _row_factor(dnll_ptr, lse_ptr, row, row < rows)
    tl.store(factors_ptr + row, factor, mask=row < rows)
    offsets = row.to(tl.int64)[:, None] * D + column[None, :]
    mask = (row < rows)[:, None] & (column < D)[None, :]
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (h * factor[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit(do_not_specialize=["S", "slots"])
def hidden_gradient(
    e_desc,
    weight_desc,
    lora_a_ptr,
    slots_ptr,
    dnll_ptr,
    lse_ptr,
    du_ptr,
    dh_ptr,
    S,
    slots,
    stride_a,
    DTYPE: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dh = factor * (E W + du A), a tile of BLOCK_S x BLOCK_D a program: those of one block of tokens side by side."""
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    column = tl.program_id(0) % tiles_d * BLOCK_D
    block = tl.program_id(0) // tiles_d
    blocks = tl.cdiv(S, BLOCK_S)
    row = block // blocks
    first = block % blocks * BLOCK_S
    token = first + tl.arange(0, BLOCK_S)
    mask_s = token < S
    offsets = row.to(tl.int64) * S + token
    d = column + tl.arange(0, BLOCK_D)
    dh = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for n in range(0, V, BLOCK_V):
        e = tl.reshape(e_desc.load([row, first, n]), (BLOCK_S, BLOCK_V))
        dh = multiply_add(e, weight_desc.load([n, column]), dh)
    if RANK:
        r = tl.arange(0, RANK_PADDED)
        slot = row.to(tl.int64) if slots_ptr is None else tl.load(slots_ptr + row).to(tl.int64)
        mask_r = (r < RANK) & (slot >= 0) & (slot < slots)
        a_ptrs = lora_a_ptr + slot * stride_a + r[:, None] * D + d[None, :]
        a = tl.load(a_ptrs, mask=mask_r[:, None] & (d < D)[None, :], other=0.0)
        du = tl.load(du_ptr + offsets[:, None] * RANK_PADDED + r[None, :], mask=mask_s[:, None], other=0.0)
        dh = multiply_add(du.to(DTYPE), a.to(DTYPE), dh)
    dh *= _row_factor(dnll_ptr, lse_ptr, offsets, mask_s)[:, None]
    tl.store(dh_ptr + offsets[:, None] * D + d[None, :], dh.to(DTYPE), mask=mask_s[:, None] & (d < D)[None, :])


@launched
@triton.jit(do_not_specialize=["B", "S"])
def adapter_gradient(
    h_ptr,
    e_ptr,
    u_ptr,
    du_ptr,
    slots_ptr,
    dnll_ptr,
    lse_ptr,
    da_ptr,
    db_ptr,
    B,
    S,
    stride_hb,
    stride_hs,
    stride_e,
    stride_da,
    stride_db,
    DTYPE: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    FILL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dB = E^T (factor u) and dA = (factor du)^T h of one slot, BLOCK_N of the V + D columns a program.

    The batch rows that name the slot are summed in their order. FILL writes zeros for a slot that no row names; without
    it that slot's memory is not touched. ROWS is the power of two from B up.
    """
    tiles_v: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = tiles_v + (D + BLOCK_N - 1) // BLOCK_N
    slot = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    is_b = tile < tiles_v
    if is_b:
        x_ptr = e_ptr
        y_ptr = u_ptr
        stride_b = S.to(tl.int64) * stride_e
        stride_s = stride_e
        columns = V
    else:
        tile -= tiles_v
        x_ptr = h_ptr
        y_ptr = du_ptr
        stride_b = stride_hb.to(tl.int64)
        stride_s = stride_hs
        columns = D
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK_PADDED)
    acc = tl.zeros((BLOCK_N, RANK_PADDED), tl.float32)
    if slots_ptr is None:
        row = slot
    else:
        rows = tl.arange(0, ROWS)
        names_it = tl.load(slots_ptr + rows, mask=rows < B, other=-1) == slot
        row = tl.min(tl.where(names_it, rows, B))
    is_named = row < B
    while row < B:
        x_row = x_ptr + row * stride_b
        first = row.to(tl.int64) * S
        for start in range(0, S, BLOCK_S):
            token = start + tl.arange(0, BLOCK_S)
            mask_s = token < S
            offsets = first + token
            x_ptrs = x_row + token.to(tl.int64)[:, None] * stride_s + column[None, :]
            x = tl.load(x_ptrs, mask=mask_s[:, None] & (column < columns)[None, :], other=0.0)
            y = tl.load(y_ptr + offsets[:, None] * RANK_PADDED + r[None, :], mask=mask_s[:, None], other=0.0)
            y *= _row_factor(dnll_ptr, lse_ptr, offsets, mask_s)[:, None]
            acc = multiply_add(x.T, y.to(DTYPE), acc)
        row = B if slots_ptr is None else tl.min(tl.where(names_it & (rows > row), rows, B))
    if FILL or is_named:
        mask = (column < columns)[:, None] & (r < RANK)[None, :]
        if is_b:
            tl.store(db_ptr + slot.to(tl.int64) * stride_db + column[:, None] * RANK + r[None, :], acc, mask=mask)
        else:
            tl.store(da_ptr + slot.to(tl.int64) * stride_da + r[None, :] * D + column[:, None], acc, mask=mask)
