"""The product of the way `after`, forward and backward: the ranks are more steps of its sum.

    y = [x | u] [W | B]^T + bias            dx = [dy | t] [W ; A]

The steps past the weight read the inner rows and the document's adapter, which are loaded as far ahead as all others.
Every document takes the steps of the pool's R: what lies above its own rank is zeros in both.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import aligned, cdiv
from ..dot import multiply_add
from ..launch import launched
from ..lora_qkv.adapters import Adapters
from ..lora_qkv.tiles import PIECES, begun, eighths, programs, slot_in_pool
from ..tile import tiled


@dataclass(frozen=True)
class AfterConfig:
    """Tile of a step: block_m tokens x block_n outputs, block_k of the sum."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


CONFIG = AfterConfig(128, 256, 64, 8, 3)
"""NVIDIA H200, 65,536 x 2,048 x 2,048, rank 64: y 0.730 ms, dx 0.801, cuBLAS 0.708. Beside dx a multiprocessor
holds a program of dA or dB as well (:func:`klora.kernels.lora_linear.reduce.pick_tiled_reduce_config`)."""


WEIGHT_IN_L2 = 16 << 20
"""Bytes of a weight that tiles side by side in time read again and again: a third of a Hopper's L2, beside x and y."""


def columns_at_a_time(columns: int, width: int, itemsize: int) -> int:
    """Columns of the weight, each of `width` numbers, that all rows take before the next ones, in equal shares."""
    shares = cdiv(columns * width * itemsize, WEIGHT_IN_L2)
    return cdiv(columns, shares)


@triton.jit
def _placed(tile, rows, ACROSS: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a tile: the first GROUP columns of all rows come first."""
    if GROUP >= ACROSS:
        return tile // ACROSS, tile % ACROSS
    else:
        first = tile // (rows * GROUP) * GROUP
        width = max(1, min(GROUP, ACROSS - first))  # a tile past the last one has no column
        within = tile - first * rows
        return within // width, first + within % width


@triton.jit
def _store_first(y_d, piece, b, s, n, M: tl.constexpr, N: tl.constexpr):
    y_d.store([b, s, n], piece.reshape(1, M, N))


@launched
@triton.jit(do_not_specialize=["S", "TILES", "COUNT"])
def _after_kernel(
    x_d, w_d, inner_d, factor_d, bias_ptr, slots_ptr, y_d, S, TILES, COUNT,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A program walks tiles [BM tokens, BN outputs] in one loop over all steps of all its tiles, as the kernels of
    `lora_qkv` do. The pieces of a tile leave one a step of the next. TRANSPOSED, the weight is [K, N] and the adapter's
    factor [R, N]; else [N, K] and [N, R].
    """
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    OWN: tl.constexpr = (K + BK - 1) // BK
    STEPS: tl.constexpr = OWN + (R + BK - 1) // BK
    W: tl.constexpr = BN // 8
    DTYPE: tl.constexpr = x_d.dtype
    across = tl.cdiv(S, BM)
    rows = TILES // ACROSS
    tile = tl.program_id(0) - tl.num_programs(0)
    b, s, n, slot = 0, 0, 0, 0
    step = STEPS - 1
    acc = tl.zeros((BM, BN), tl.float32)
    if bias_ptr is not None:
        acc = begun(bias_ptr, _placed(tl.program_id(0), rows, ACROSS, GROUP)[1] * BN, N, BM, BN, DTYPE)
    y0 = tl.zeros((BM, W), DTYPE)
    y1, y2, y3, y4, y5, y6, y7 = y0, y0, y0, y0, y0, y0, y0
    left, done_b, done_s, done_n = 0, 0, 0, 0
    for _ in range(0, tl.cdiv(TILES - tl.program_id(0), tl.num_programs(0)) * STEPS):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            row, column = _placed(tile, rows, ACROSS, GROUP)
            b, s, n = row // across, row % across * BM, column * BN
            slot = b
            if slots_ptr is not None:
                slot = slot_in_pool(tl.load(slots_ptr + b), COUNT)
        rows_d, columns_d, k, which = x_d, w_d, step * BK, 0
        if step >= OWN:
            rows_d, columns_d, k, which = inner_d, factor_d, (step - OWN) * BK, slot
        x = rows_d.load([b, s, k]).reshape(BM, BK)
        if TRANSPOSED:
            acc = multiply_add(x, columns_d.load([which, k, n]).reshape(BK, BN), acc)
        else:
            acc = multiply_add(x, columns_d.load([which, n, k]).reshape(BN, BK).T, acc)
        if left > 0:
            _store_first(y_d, y0, done_b, done_s, done_n, BM, W)
            y0, y1, y2, y3, y4, y5, y6 = y1, y2, y3, y4, y5, y6, y7
            done_n += W
            left -= 1
        if step == STEPS - 1:
            if STEPS < 8:
                for _ in range(left):
                    _store_first(y_d, y0, done_b, done_s, done_n, BM, W)
                    y0, y1, y2, y3, y4, y5, y6 = y1, y2, y3, y4, y5, y6, y7
                    done_n += W
            y0, y1, y2, y3, y4, y5, y6, y7 = eighths(acc.to(DTYPE), BM, BN)
            left, done_b, done_s, done_n = 8, b, s, n
            following = _placed(tile + tl.num_programs(0), rows, ACROSS, GROUP)[1]
            acc = begun(bias_ptr, following * BN, N, BM, BN, DTYPE)
    for _ in range(left):
        _store_first(y_d, y0, done_b, done_s, done_n, BM, W)
        y0, y1, y2, y3, y4, y5, y6 = y1, y2, y3, y4, y5, y6, y7
        done_n += W


def launch_after(
    x: Tensor, weight: Tensor, inner: Tensor, adapters: Adapters, y: Tensor, bias: Tensor | None = None
) -> None:
    """y = x W^T + inner B^T + bias, of `x` [B, S, K] and `weight` [N, K], in 16 bits.

    `inner` [B, S, R rounded up to 16] is finite wherever x is, and zeros above a document's own rank.
    """
    _launch(x, weight, inner, adapters.b, adapters, y, bias)


def launch_dx_after(dy: Tensor, weight: Tensor, inner: Tensor, adapters: Adapters, dx: Tensor) -> None:
    """dx = dy W + inner A, as :func:`launch_after`."""
    _launch(dy, weight, inner, adapters.a, adapters, dx, is_transposed=True)


def _launch(
    x: Tensor,
    weight: Tensor,
    inner: Tensor,
    factor: Tensor,
    adapters: Adapters,
    y: Tensor,
    bias: Tensor | None = None,
    is_transposed: bool = False,
) -> None:
    (batch, length, width), outputs = x.shape, y.size(2)
    config = CONFIG
    m, n, k = config.block_m, config.block_n, config.block_k
    tiles, block = batch * cdiv(length, m) * cdiv(outputs, n), (k, n) if is_transposed else (n, k)
    if tiles:
        _after_kernel[(programs(x.device, tiles),)](
            x_d=tiled(aligned(x), 1, m, k), w_d=tiled(aligned(weight)[None], 1, *block), inner_d=tiled(inner, 1, m, k),
            factor_d=tiled(factor, 1, *block), bias_ptr=bias, slots_ptr=adapters.slots,
            y_d=tiled(y, 1, m, n // PIECES), S=length, TILES=tiles, COUNT=factor.size(0), K=width, N=outputs,
            R=adapters.rank, BM=m, BN=n, BK=k,
            GROUP=columns_at_a_time(cdiv(outputs, n), n * width, x.element_size()), TRANSPOSED=is_transposed,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
