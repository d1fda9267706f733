"""The forward launch: three projections, and for q and k what attention wants done to each head; or one product, and
for the MLP its squared ReLU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import aligned, cdiv, padded_rank
from ..dot import multiply_add
from ..launch import launched
from ..rms_norm import EPS
from ..swiglu import launch_swiglu
from ..tile import added, tiled
from .adapters import adapters_of, empty_packed
from .gated import launch_gated, takes_gated
from .heads import HeadTables, gains, heads_at_once, norm_rotate_by_quarters, norm_rotate_whole
from .tiles import (
    PIECES,
    begun,
    cleared,
    described,
    eighths,
    is_stacked,
    of_three,
    programs,
    slot_in_pool,
    store_squares,
)
from .turns import launch_in_turns, takes


@dataclass(frozen=True)
class ForwardConfig:
    """Tile of a step: block_m tokens x block_n outputs, block_k of D; the widest head that it can norm and rotate."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    widest_head: int


def pick_forward_config(dtype: torch.dtype, rank: int, groups: int = 3, has_bias: bool = False) -> ForwardConfig:
    if dtype == torch.float32:
        return ForwardConfig(64, 64, 16, 8, 2, 64)  # no tensor cores: what does not spill
    if padded_rank(rank) > 16 and (groups == 3 or rank > (32 if has_bias else 64)):
        return ForwardConfig(128, 128, 64, 8, 3, 64)  # R up to 64 fits registers and shared memory
    # It holds up to 64 ranks of one product, 223 KB, and 32 with a bias (of 64 that spills 40 bytes).
    # NVIDIA H100, 65536 x 512 x 1024: 0.128 ms; 4 stages 0.132; cuBLAS without adapters 0.110. A form of it with norm
    # and rotation 0.170; those in a launch after it 0.210. Heads of 64 spill nothing, of 32 1.1 KB, of 128 1.0 KB.
    return ForwardConfig(128, 256, 64, 8, 3, 128)


class Projected(NamedTuple):
    """What the forward makes; for a forward's fake, too."""

    outs: list[Tensor]
    """q, k and v [B, S, N_p], or the one product"""
    xa: Tensor
    """x A^T [B, S, 3 padded R], or padded R, rounded to x's dtype"""
    packed_a: Tensor
    """the adapters that had to be rounded to x's dtype (:func:`empty_packed`), else empty"""
    packed_b: Tensor
    rstds: list[Tensor]
    """with HeadTables, 1 / rms of each head of q and of k [B, S, heads] in fp32"""
    norm: Tensor | None = None
    """of an unnormed x, 1 / rms of each row [B, S] in fp32"""

    def flat(self) -> tuple[Tensor, ...]:
        return *self.outs, self.xa, self.packed_a, self.packed_b, *self.rstds


def empty_projected(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    sizes: Sequence[int],
    head_dim: int = 0,
    is_packed: bool | None = None,
    unnormed: bool = False,
) -> Projected:
    """Memory for what :func:`launch_forward` makes. `is_packed` None: where the adapters have another dtype than x."""
    batch, length, _ = x.shape
    is_packed = lora_a.dtype != x.dtype if is_packed is None else is_packed
    packed = empty_packed(x, lora_b, len(sizes)) if is_packed else (x.new_empty(0), x.new_empty(0))
    heads = [size // head_dim for size in sizes[:2]] if head_dim else []
    return Projected(
        [x.new_empty(batch, length, size) for size in sizes],
        x.new_empty(batch, length, len(sizes) * padded_rank(lora_b.size(2))),
        *packed,
        [x.new_empty(batch, length, count, dtype=torch.float32) for count in heads],
        x.new_empty(batch, length, dtype=torch.float32) if unnormed else None,
    )


def not_projected(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of x A^T and the packed adapters, where there is no adapter."""
    return x.new_empty(0), x.new_empty(0), x.new_empty(0)


@triton.jit
def _store_piece(q_d, k_d, v_d, p, b, s, n, piece, M: tl.constexpr, N: tl.constexpr):
    out_d = q_d
    if v_d is not None:
        if p == 2:
            out_d = v_d
        elif p == 1:
            out_d = k_d
    out_d.store([b, s, n], piece.reshape(1, M, N))


@launched
@triton.jit(do_not_specialize=["S", "TILES", "COUNT", "ROWS"])
def _forward_kernel(
    x_d, w_d, a_d, b_ptr, bias_ptr, slots_ptr, q_d, k_d, v_d, xa_ptr, u_ptr, cos_ptr, sin_ptr, gain_ptr, rstd_q_ptr,
    rstd_k_ptr, norm_ptr, squares_ptr, table_stride, b_stride, S, TILES, COUNT, ROWS,
    NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    STACKED: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HEAD: tl.constexpr,
    HEADS: tl.constexpr, EPS: tl.constexpr, SQUARED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program walks tiles [BM tokens, BN outputs of one projection] in one loop over all steps of all its tiles, so
    that the loads of a tile start while the one before it is finished, whose rounded pieces are stored one a step.
    Neighbours work on the same tokens: x comes from the L2 cache. One product is q alone, without k_d and v_d; SQUARED,
    relu(u)^2 of it leaves, at once, for want of registers; and u, where u_ptr is given.

    With squares_ptr the rows x are unnormed: the product is divided by their rms, x A^T is stored as it is.
    """
    GROUPS: tl.constexpr = 1 if v_d is None else 3
    TQ: tl.constexpr = (NQ + BN - 1) // BN
    TK: tl.constexpr = (NK + BN - 1) // BN
    TV: tl.constexpr = (NV + BN - 1) // BN
    STEPS: tl.constexpr = (D + BK - 1) // BK
    N: tl.constexpr = NQ + NK + NV
    W: tl.constexpr = BN // 8
    DTYPE: tl.constexpr = x_d.dtype
    across = tl.cdiv(S, BM)
    tile = tl.program_id(0) - tl.num_programs(0)
    b, s, p, n, slot = 0, 0, 0, 0, 0
    step = STEPS - 1
    acc = tl.zeros((BM, BN), tl.float32)
    if bias_ptr is not None:
        acc = begun(bias_ptr, tl.program_id(0) % TQ * BN, NQ, BM, BN, DTYPE)
    xa = tl.zeros((BM, RP), tl.float32)
    y0 = tl.zeros((BM, W), DTYPE)
    y1, y2, y3, y4, y5, y6, y7 = y0, y0, y0, y0, y0, y0, y0
    left, done_b, done_s, done_p, done_n = 0, 0, 0, 0, 0
    r = tl.arange(0, RP)
    for _ in range(0, tl.cdiv(TILES - tl.program_id(0), tl.num_programs(0)) * STEPS):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            column, row = tile % (TQ + TK + TV), tile // (TQ + TK + TV)
            b, s = row // across, row % across * BM
            n = column * BN
            if GROUPS == 3:
                p = (column >= TQ).to(tl.int32) + (column >= TQ + TK).to(tl.int32)
                n = (column - tl.where(p == 0, 0, tl.where(p == 1, TQ, TQ + TK))) * BN
            slot = b
            if slots_ptr is not None:
                slot = slot_in_pool(tl.load(slots_ptr + b), COUNT)
        first = 0
        if GROUPS == 3:
            first = tl.where(p == 0, 0, tl.where(p == 1, NQ, NQ + NK))
        x = x_d.load([b, s, step * BK]).reshape(BM, BK)
        w = w_d.load([first + n, step * BK])
        a = a_d.load([slot, p * R, step * BK]).reshape(RP, BK)
        xa = multiply_add(x, a.T, xa)
        acc = multiply_add(x, w.T, acc)
        if left > 0:
            _store_piece(q_d, k_d, v_d, done_p, done_b, done_s, done_n, y0, BM, W)
            y0, y1, y2, y3, y4, y5, y6 = y1, y2, y3, y4, y5, y6, y7
            done_n += W
            left -= 1
        if step == STEPS - 1:
            row_n, row_s = first + n + tl.arange(0, BN), s + tl.arange(0, BM)
            mask, token = row_s < S, b.to(tl.int64) * S + row_s
            named = (slot >= 0) & (slot < COUNT)
            b_rows = b_ptr + slot.to(tl.int64) * b_stride + row_n[:, None] * RT + r
            if STACKED:
                b_rows += p * R
            lora_b = tl.load(b_rows, (row_n < N)[:, None] & (r < R)[None, :] & named, other=0.0)
            if cos_ptr is not None:
                # What comes from memory is asked for before the product below: it arrives meanwhile.
                offsets = row_s[:, None] * (HEAD // 2) + tl.arange(0, HEAD // 2)
                cos_rows, sin_rows = cos_ptr, sin_ptr
                if table_stride is not None:
                    cos_rows += b.to(tl.int64) * table_stride
                    sin_rows += b.to(tl.int64) * table_stride
                cos = tl.load(cos_rows + offsets, mask[:, None] & (p < 2), other=0.0)
                sin = tl.load(sin_rows + offsets, mask[:, None] & (p < 2), other=0.0)
                head, queries = n // HEAD, tl.where(p == 0, NQ // HEAD, 0)
                gain_0 = gains(gain_ptr, head, queries, HEADS)
                if HEADS * HEAD < BN:
                    gain_1 = gains(gain_ptr, head + HEADS, queries, HEADS)
                    gain_2 = gains(gain_ptr, head + 2 * HEADS, queries, HEADS)
                    gain_3 = gains(gain_ptr, head + 3 * HEADS, queries, HEADS)
            # R rows of A were wanted and RP loaded: those past R are zeros, or belong to the next projection. Where R
            # is no multiple of 8, a choice among the sums makes ptxas serialise the matrix instructions.
            inner = xa.to(DTYPE)
            if GROUPS == 3:
                inner = tl.where((r < R)[None, :], xa, 0.0).to(DTYPE)
            acc = multiply_add(inner, lora_b.T, acc)
            square = None
            if squares_ptr is not None:
                square = added(squares_ptr, token, mask, ROWS, BLOCKS) * (1.0 / D) + EPS
                norm = tl.div_rn(1.0, tl.sqrt_rn(square))
                tl.store(norm_ptr + token, norm, mask & (p == 0) & (n == 0))
                if cos_ptr is None:
                    acc *= norm[:, None]
            if u_ptr is not None:
                tl.store(u_ptr + token[:, None] * N + row_n, acc.to(DTYPE), mask[:, None] & (row_n < N)[None, :])
            if STEPS < 8:
                for _ in range(left):
                    _store_piece(q_d, k_d, v_d, done_p, done_b, done_s, done_n, y0, BM, W)
                    y0, y1, y2, y3, y4, y5, y6 = y1, y2, y3, y4, y5, y6, y7
                    done_n += W
            if cos_ptr is not None:
                if p < 2:
                    rstd_ptr, heads = rstd_q_ptr, NQ // HEAD
                    if p == 1:
                        rstd_ptr, heads = rstd_k_ptr, NK // HEAD
                    rstd_rows = rstd_ptr + token * heads
                    if HEADS * HEAD < BN:
                        y0, y1, y2, y3, y4, y5, y6, y7 = norm_rotate_by_quarters(
                            acc, cos, sin, gain_0, gain_1, gain_2, gain_3, rstd_rows, mask, head, heads,
                            square, BM, BN, HEAD, EPS, DTYPE,
                        )  # fmt: skip
                    else:
                        y0, y1, y2, y3, y4, y5, y6, y7 = norm_rotate_whole(
                            acc, cos, sin, gain_0, rstd_rows, mask, head, heads, square, BM, BN, HEAD, EPS, DTYPE
                        )
                else:
                    if squares_ptr is not None:
                        acc *= norm[:, None]
                    y0, y1, y2, y3, y4, y5, y6, y7 = eighths(acc.to(DTYPE), BM, BN)
            elif not SQUARED:
                y0, y1, y2, y3, y4, y5, y6, y7 = eighths(acc.to(DTYPE), BM, BN)
            if SQUARED:
                store_squares(q_d, acc, b, s, n, BM, BN)
            else:
                left, done_b, done_s, done_p, done_n = 8, b, s, p, n
            if n == 0:
                tl.store(xa_ptr + (token[:, None] * GROUPS + p) * RP + r, inner, mask[:, None])
            if bias_ptr is None:
                acc = cleared(BM, BN, DTYPE)
            else:
                acc = begun(bias_ptr, (tile + tl.num_programs(0)) % TQ * BN, NQ, BM, BN, DTYPE)
            xa = cleared(BM, RP, DTYPE)
    for _ in range(left):
        _store_piece(q_d, k_d, v_d, done_p, done_b, done_s, done_n, y0, BM, W)
        y0, y1, y2, y3, y4, y5, y6 = y1, y2, y3, y4, y5, y6, y7
        done_n += W


def launch_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None,
    sizes: Sequence[int],
    heads: HeadTables | None = None,
    squared: bool = False,
    u: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    squares: Tensor | None = None,
    h: Tensor | None = None,
) -> Projected:
    """Everything that the forward makes; with `heads`, q and k are normed, rotated and q is times the gain. `h`
    [B, S, N], of two equal projections, gets silu(q) * k.

    With `squares`, as of :class:`Unnormed`, the products are of x / rms(x), and xa is of x.

    One size is one product. `squared`: the product is u, of which relu(u)^2 is returned; `u` [B, S, N] gets it itself.
    `bias` [N] is added to one product; `scale` and `ranks` are as of :func:`adapters_of`.
    """
    (batch, length, width), rank, groups = x.shape, lora_b.size(2), len(sizes)
    head_dim = heads.head_dim if heads else 0
    is_packed = lora_a.dtype != x.dtype or scale is not None or ranks is not None
    made = empty_projected(x, lora_a, lora_b, sizes, head_dim, is_packed, squares is not None)
    packed = (made.packed_a, made.packed_b) if is_packed else None
    adapters = adapters_of(x, lora_a, lora_b, slots, sizes, packed, scale, ranks)
    cos, sin, gain = heads[:3] if heads else (None, None, None)
    rstd_q, rstd_k = made.rstds or (None, None)
    is_plain = heads is None and not squared and u is None and squares is None
    stacked = adapters.is_packed and is_stacked(rank, groups)
    if made.xa.numel() and h is not None and takes_gated(x, rank, h.size(2)):
        launch_gated(x, weight, adapters, stacked, *made.outs[:2], h, made.xa)
        return made
    if made.xa.numel() and is_plain and takes(x, rank, sizes):
        launch_in_turns(x, weight, adapters, sizes, stacked, bias, made.outs, made.xa)
    elif made.xa.numel():
        padded, config = padded_rank(rank), pick_forward_config(x.dtype, rank, groups, bias is not None)
        m, n, k = config.block_m, config.block_n, config.block_k
        tiles = batch * cdiv(length, m) * sum(cdiv(size, n) for size in sizes)
        q_d, k_d, v_d = of_three([tiled(out, 1, m, n // PIECES) for out in described(made.outs)])
        nq, nk, nv = of_three(sizes, 0)
        _forward_kernel[(programs(x.device, tiles),)](
            x_d=tiled(aligned(x), 1, m, k), w_d=tiled(aligned(weight), n, k), a_d=tiled(adapters.a, 1, padded, k),
            b_ptr=adapters.b, bias_ptr=bias, slots_ptr=adapters.slots,
            q_d=q_d, k_d=k_d, v_d=v_d, xa_ptr=made.xa, u_ptr=u, cos_ptr=cos, sin_ptr=sin, gain_ptr=gain,
            rstd_q_ptr=rstd_q, rstd_k_ptr=rstd_k, norm_ptr=made.norm, squares_ptr=squares,
            table_stride=heads.table_stride if heads else None,
            b_stride=adapters.b.stride(0), S=length, TILES=tiles, COUNT=adapters.b.size(0), ROWS=batch * length,
            NQ=nq, NK=nk, NV=nv, D=width, R=rank, RT=adapters.b.size(2),
            STACKED=stacked, RP=padded, BM=m, BN=n, BK=k, HEAD=head_dim,
            HEADS=heads_at_once(n, head_dim), EPS=EPS, SQUARED=squared,
            BLOCKS=0 if squares is None else len(squares),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    if h is not None:
        launch_swiglu(*made.outs[:2], h)
    return made
