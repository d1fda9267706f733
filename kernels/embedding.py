"""What a network reads of its tokens: token plus hashed bigram, normed and smeared, in one launch.

    e_i  = E[t_i] + G[h_i],  h_i = bigram_hash(t_{i-1}, t_i);   n_i = e_i r_i,  r_i = 1 / sqrt(mean(e_i^2) + eps)
    x0_i = n_i + g (m_i n_{i-1} - n_i),  g = sigmoid(gate);     m_i = 0 where t_i has no previous token, else 1

    dn_i = (1 - g) dx0_i + g m_{i+1} dx0_{i+1};   de_i = r_i (dn_i - n_i mean(dn_i n_i))
    dE_t = sum of de_i over t_i = t;   dG_h likewise;   dgate = g (1 - g) sum_i dx0_i (m_i n_{i-1} - n_i)

tokens int32 or int64 [B, S]; E [V, D], G [rows, D] and gate [D] fp32 -> x0 [B, S, D] in `dtype`: bf16, fp16 or fp32
(fp64 for the reference). A token has no previous one where a row starts and where it is BOS: nothing of one document
reaches the next. A token outside [0, V) reads zeros and gets no gradient (the reference refuses it). All arithmetic is
fp32 and rounded once. Neither e nor n is stored: the tables are read again, from cache.

Bytes a token, in items of the dtype: forward D; backward D for dx0, D for de written, 2 D for de read by each table's
sum. The sums take the tokens of a row of the table in their order, which a stable sort finds: fp32, no atomics, the
same bits in every run. de is rounded to `dtype` before it is summed.

BigramHash and SmearGate: see the model's design.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .bigram import BOS_ID, bigram_hash_ref
from .dispatch import (
    DTYPES,
    INTEGERS,
    cdiv,
    custom_op,
    empty_grad,
    expect,
    expect_one_of,
    next_power_of_2,
    refuse_in_reference,
    resolve_backend,
)
from .launch import launched
from .rms_norm import EPS, rms_norm_ref
from .tile import row_dots

ROWS, WARPS = 4, 4
"""Tokens of a tile: with D 512, a row belongs to one warp."""
TOKENS = 64
"""Tokens that one program of the backward takes, and whose share of dgate is one row of its sum."""
SEGMENT, COLUMNS = 32, 128
"""Tokens and columns of a tile of a table's sum."""


def bigram_embedding_ref(tokens: Tensor, embed: Tensor, bigram: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """x0 [B, S, D] in `dtype`, term by term: the norm in the tables' dtype, the smear in `dtype`.

    `tokens` int [B, S], all in [0, V); `embed` [V, D], `bigram` [rows, D] and `gate` [D] in any float dtype. Autograd
    gives the gradients of the last three.

    Example: x0 = bigram_embedding_ref(tokens, embed, bigram, gate, torch.float32)
    """
    rows = bigram_hash_ref(tokens, bigram.size(0))
    n = rms_norm_ref(F.embedding(tokens, embed) + F.embedding(rows, bigram)).to(dtype)
    before = torch.cat([torch.zeros_like(n[:, :1]), n[:, :-1]], dim=1)
    before = before.masked_fill((tokens == BOS_ID)[..., None], 0.0)
    return torch.lerp(n, before, torch.sigmoid(gate).to(dtype))


@triton.jit
def _hash(token, before, has_before, HASHES: tl.constexpr):
    """The bigram's row; the last one for a token without a previous one."""
    row = ((36313 * token) ^ (27191 * before)) % (HASHES - 1)
    return tl.where(has_before, row, HASHES - 1)


@triton.jit
def _normed(
    tokens_ptr, embed_ptr, bigram_ptr, first, row, S, V,
    HASHES: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, N: tl.constexpr, BOS: tl.constexpr,
):  # fmt: skip
    """n [ROWS, N] and 1 / rms [ROWS] of positions first + row, zeros outside [0, S)."""
    position = first + row
    mask = (position >= 0) & (position < S)
    token = tl.load(tokens_ptr + position, mask=mask, other=-1).to(tl.int64)
    has_before = mask & (position > 0) & (token != BOS)
    before = tl.load(tokens_ptr + position - 1, mask=has_before, other=0).to(tl.int64)
    hashed = _hash(token, before, has_before, HASHES)
    column = tl.arange(0, N)
    wide = (column < D)[None, :]
    known = mask & (token >= 0) & (token < V)
    e = tl.load(embed_ptr + token[:, None] * D + column[None, :], mask=known[:, None] & wide, other=0.0)
    e += tl.load(bigram_ptr + hashed[:, None] * D + column[None, :], mask=known[:, None] & wide, other=0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(row_dots(e, e) * (1.0 / D) + EPS))
    return e * rstd[:, None], rstd, has_before


@launched
@triton.jit(do_not_specialize=["S", "V"])
def _forward(
    tokens_ptr, embed_ptr, bigram_ptr, gate_ptr, out_ptr, S, V,
    HASHES: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr, BOS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, ROWS)
    document, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    tokens_ptr += document.to(tl.int64) * S
    row, column = tl.arange(0, ROWS), tl.arange(0, N)
    gate = tl.sigmoid(tl.load(gate_ptr + column, mask=column < D, other=0.0))[None, :]
    n, _, has_before = _normed(tokens_ptr, embed_ptr, bigram_ptr, first, row, S, V, HASHES, D, EPS, N, BOS)
    before, _, _ = _normed(tokens_ptr, embed_ptr, bigram_ptr, first - 1, row, S, V, HASHES, D, EPS, N, BOS)
    x0 = n + gate * (tl.where(has_before[:, None], before, 0.0) - n)
    offsets = (document.to(tl.int64) * S + first + row)[:, None] * D + column[None, :]
    mask = (first + row < S)[:, None] & (column < D)[None, :]
    tl.store(out_ptr + offsets, x0.to(out_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit(do_not_specialize=["S", "V"])
def _backward(
    dout_ptr, more_ptr, tokens_ptr, embed_ptr, bigram_ptr, gate_ptr, de_ptr, sums_ptr, S, V,
    HASHES: tl.constexpr, D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr,
    BOS: tl.constexpr,
):  # fmt: skip
    """de of STEPS * ROWS tokens, and their share of dgate / (g (1 - g)), to row program_id of `sums`.

    The gradient of x0 is the sum of dout and, where it is given, `more`.
    """
    blocks = tl.cdiv(S, ROWS * STEPS)
    document, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * (ROWS * STEPS)
    tokens_ptr += document.to(tl.int64) * S
    base = document.to(tl.int64) * S * D
    row, column = tl.arange(0, ROWS), tl.arange(0, N)
    wide = column < D
    gate = tl.sigmoid(tl.load(gate_ptr + column, mask=wide, other=0.0))[None, :]
    dgate = tl.zeros((ROWS, N), tl.float32)
    for step in range(STEPS):
        start = first + step * ROWS
        n, rstd, has_before = _normed(tokens_ptr, embed_ptr, bigram_ptr, start, row, S, V, HASHES, D, EPS, N, BOS)
        before, _, _ = _normed(tokens_ptr, embed_ptr, bigram_ptr, start - 1, row, S, V, HASHES, D, EPS, N, BOS)
        position = start + row
        offsets = base + position.to(tl.int64)[:, None] * D + column[None, :]
        mask = (position < S)[:, None] & wide[None, :]
        dx = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        after = tl.load(tokens_ptr + position + 1, mask=position + 1 < S, other=BOS)
        smears = (after != BOS)[:, None]
        dx_after = tl.load(dout_ptr + offsets + D, mask=smears & wide[None, :], other=0.0).to(tl.float32)
        if more_ptr is not None:
            dx += tl.load(more_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dx_after += tl.load(more_ptr + offsets + D, mask=smears & wide[None, :], other=0.0).to(tl.float32)
        dgate += dx * (tl.where(has_before[:, None], before, 0.0) - n)
        dn = dx + gate * (dx_after - dx)
        de = rstd[:, None] * (dn - n * (row_dots(dn, n) * (1.0 / D))[:, None])
        tl.store(de_ptr + offsets, de.to(de_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + column, tl.sum(dgate, 0), mask=wide)


@launched
@triton.jit
def _sum_rows(
    de_ptr, order_ptr, starts_ptr, out_ptr, D: tl.constexpr, SEGMENT: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Row program_id(0) of a table: the sum of de over order[starts[row]:starts[row + 1]]."""
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    total = tl.zeros((SEGMENT, COLUMNS), tl.float32)
    for begin in range(start, stop, SEGMENT):
        offsets = begin + tl.arange(0, SEGMENT)
        place = tl.load(order_ptr + offsets, mask=offsets < stop, other=0)
        mask = (offsets < stop)[:, None] & (column < D)[None, :]
        total += tl.load(de_ptr + place[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * D + column, tl.sum(total, 0), mask=column < D)


def _sum_by_row(de: Tensor, rows: Tensor, out: Tensor) -> None:
    """Write out fp32 [count, D]: the sum of de [tokens, D] over the tokens of each row, by `rows` int [tokens]."""
    count, width = out.shape
    ordered, order = torch.sort(rows, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=rows.device, dtype=rows.dtype))
    _sum_rows[(count, cdiv(width, COLUMNS))](
        de_ptr=de, order_ptr=order, starts_ptr=starts, out_ptr=out, D=width, SEGMENT=SEGMENT, COLUMNS=COLUMNS,
        num_warps=4,
    )  # fmt: skip


def _shared(tokens: Tensor, embed: Tensor, bigram: Tensor, gate: Tensor) -> dict[str, Any]:
    """What both directions take."""
    width = embed.size(1)
    return dict(
        tokens_ptr=tokens, embed_ptr=embed, bigram_ptr=bigram, gate_ptr=gate, S=tokens.size(1), V=embed.size(0),
        HASHES=bigram.size(0), D=width, N=next_power_of_2(width), ROWS=ROWS, EPS=EPS, BOS=BOS_ID,
        num_warps=WARPS,
    )  # fmt: skip


@custom_op("klora::bigram_embedding", mutates_args=())
def _op(
    tokens: Tensor, embed: Tensor, bigram: Tensor, gate: Tensor, dtype: torch.dtype, x0_grad: Tensor | None
) -> Tensor:
    """`x0_grad` is only passed on to the backward."""
    batch, length = tokens.shape
    out = embed.new_empty(batch, length, embed.size(1), dtype=dtype)
    if out.numel():
        _forward[(batch * cdiv(length, ROWS),)](out_ptr=out, **_shared(tokens, embed, bigram, gate))
    return out


@_op.register_fake
def _(tokens, embed, bigram, gate, dtype, x0_grad):
    return embed.new_empty(*tokens.shape, embed.size(1), dtype=dtype)


@custom_op("klora::bigram_embedding_backward", mutates_args=("dembed", "dbigram", "dgate"))
def _backward_op(
    dout: Tensor,
    more: Tensor | None,
    tokens: Tensor,
    embed: Tensor,
    bigram: Tensor,
    gate: Tensor,
    dembed: Tensor,
    dbigram: Tensor,
    dgate: Tensor,
) -> None:
    if not dout.numel():
        for grad in (dembed, dbigram, dgate):
            grad.zero_()
        return
    de = empty_grad(dout)
    blocks = tokens.size(0) * cdiv(tokens.size(1), TOKENS)
    sums = gate.new_empty(blocks, embed.size(1))
    _backward[(blocks,)](
        dout_ptr=dout.contiguous(), more_ptr=more, de_ptr=de, sums_ptr=sums, STEPS=TOKENS // ROWS,
        **_shared(tokens, embed, bigram, gate),
    )  # fmt: skip
    de, opened = de.flatten(0, 1), torch.sigmoid(gate)
    _sum_by_row(de, tokens.flatten(), dembed)
    _sum_by_row(de, bigram_hash_ref(tokens, bigram.size(0)).flatten().to(tokens.dtype), dbigram)
    torch.mul(opened * (1 - opened), sums.sum(0), out=dgate)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.x0_grad = inputs[5]


def _autograd(ctx, dout):
    saved = ctx.saved_tensors
    grads = [empty_grad(t) for t in saved[1:]]
    _backward_op(dout, ctx.x0_grad, *saved, *grads)
    needed = ctx.needs_input_grad[1:4]
    return None, *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), None, None


_op.register_autograd(_autograd, setup_context=_setup)


def bigram_embedding(
    tokens: Tensor,
    embed: Tensor,
    bigram: Tensor,
    gate: Tensor,
    dtype: torch.dtype,
    *,
    x0_grad: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x0 [B, S, D] in `dtype` of `tokens` int32 or int64 [B, S].

    `embed` is [V, D], `bigram` [rows, D] and `gate` [D]. The kernel takes them in float32, and a `dtype` of bfloat16,
    float16 or float32. All three get gradients.

    The backward adds `x0_grad` [B, S, D], contiguous and in `dtype`, to the gradient that autograd brings: it holds
    what residual_norm has written. Only the kernel takes it.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: other shapes, dtypes or backends, tensors on several devices, `x0_grad` with the reference.

    Example: x0 = bigram_embedding(tokens, embed, bigram, gate, torch.float32)
    """
    backend = resolve_backend(backend, tokens)
    kinds, device = (torch.float32,) if backend == "triton" else (), tokens.device
    expect("tokens", tokens, ("B", "S"), INTEGERS)
    expect("embed", embed, ("V", "D"), kinds, device)
    expect("bigram", bigram, ("rows", embed.size(1)), kinds, device)
    expect("gate", gate, embed.shape[1:], kinds, device)
    if bigram.size(0) < 2:
        raise ValueError(f"bigram has {bigram.size(0)} rows; wanted at least 2")
    if backend == "reference":
        refuse_in_reference(x0_grad=x0_grad)
        return bigram_embedding_ref(tokens, embed, bigram, gate, dtype)
    expect_one_of("dtype", dtype, DTYPES)
    if x0_grad is not None:
        expect("x0_grad", x0_grad, (*tokens.shape, embed.size(1)), (dtype,), device)
        if not x0_grad.is_contiguous():
            raise ValueError(f"x0_grad has strides {x0_grad.stride()}; wanted contiguous")
    tables = (table.contiguous() for table in (embed, bigram, gate))
    return _op(tokens.contiguous(), *tables, dtype, x0_grad)
