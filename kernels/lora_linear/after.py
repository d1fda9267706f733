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
from ..lora_qkv.tiles import PIECES, begun, eighths, programs, slot_in_pool, store_tile
from ..tile import tiled


@dataclass(frozen=True)
class AfterConfig:
    """Tile of a step: block_m tokens x block_n outputs, block_k of the sum. `late`: the pieces of a tile leave one a
    step of the next.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    late: bool


FORWARD = AfterConfig(128, 256, 64, 8, 3, late=True)
"""NVIDIA H200, 65,536 x 2,048 x 2,048, the same tile with ranks at its end: 0.783 ms of rank 16, cuBLAS 0.774."""
BACKWARD = AfterConfig(128, 256, 64, 8, 3, late=False)
"""As above 0.801 ms, cuBLAS 0.783. At once, by the compiler: 158 registers and 160 KiB leave a multiprocessor as much
as a program of dA or dB takes (:func:`klora.kernels.lora_linear.reduce.pick_tiled_reduce_config`)."""


@triton.jit
def _store_first(y_d, piece, b, s, n, M: tl.constexpr, N: tl.constexpr):
    y_d.store([b, s, n], piece.reshape(1, M, N))


@launched
@triton.jit(do_not_specialize=["S", "TILES", "COUNT"])
def _after_kernel(
    x_d, w_d, inner_d, factor_d, bias_ptr, slots_ptr, y_d, S, TILES, COUNT,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """A program walks tiles [BM tokens, BN outputs] in one loop over all steps of all its tiles, as the kernels of
    `lora_qkv` do. TRANSPOSED, the weight is [K, N] and the adapter's factor [R, N]; else [N, K] and [N, R].
    """
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    OWN: tl.constexpr = (K + BK - 1) // BK
    STEPS: tl.constexpr = OWN + (R + BK - 1) // BK
    W: tl.constexpr = BN // 8
    DTYPE: tl.constexpr = x_d.dtype
    across = tl.cdiv(S, BM)
    tile = tl.program_id(0) - tl.num_programs(0)
    b, s, n, slot = 0, 0, 0, 0
    step = STEPS - 1
    acc = tl.zeros((BM, BN), tl.float32)
    if bias_ptr is not None:
        acc = begun(bias_ptr, tl.program_id(0) % ACROSS * BN, N, BM, BN, DTYPE)
    if LATE:
        y0 = tl.zeros((BM, W), DTYPE)
        y1, y2, y3, y4, y5, y6, y7 = y0, y0, y0, y0, y0, y0, y0
        left, done_b, done_s, done_n = 0, 0, 0, 0
    for _ in range(0, tl.cdiv(TILES - tl.program_id(0), tl.num_programs(0)) * STEPS):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            row = tile // ACROSS
            b, s, n = row // across, row % across * BM, tile % ACROSS * BN
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
        if LATE:  # noqa: SIM102 (known to the compiler, and a number that is not)
            if left > 0:
                _store_first(y_d, y0, done_b, done_s, done_n, BM, W)
                y0, y1, y2, y3, y4, y5, y6 = y1, y2, y3, y4, y5, y6, y7
                done_n += W
                left -= 1
        if step == STEPS - 1:
            if LATE:
                if STEPS < 8:
                    for _ in range(left):
                        _store_first(y_d, y0, done_b, done_s, done_n, BM, W)
                        y0, y1, y2, y3, y4, y5, y6 = y1, y2, y3, y4, y5, y6, y7
                        done_n += W
                y0, y1, y2, y3, y4, y5, y6, y7 = eighths(acc.to(DTYPE), BM, BN)
                left, done_b, done_s, done_n = 8, b, s, n
            else:
                store_tile(y_d, acc, b, s, n, BM, BN)
            acc = begun(bias_ptr, (tile + tl.num_programs(0)) % ACROSS * BN, N, BM, BN, DTYPE)
    if LATE:
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
    _launch(FORWARD, x, weight, inner, adapters.b, adapters, y, bias)


def launch_dx_after(dy: Tensor, weight: Tensor, inner: Tensor, adapters: Adapters, dx: Tensor) -> None:
    """dx = dy W + inner A, as :func:`launch_after`."""
    _launch(BACKWARD, dy, weight, inner, adapters.a, adapters, dx, is_transposed=True)


def _launch(
    config: AfterConfig,
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
    m, n, k = config.block_m, config.block_n, config.block_k
    tiles, block = batch * cdiv(length, m) * cdiv(outputs, n), (k, n) if is_transposed else (n, k)
    if tiles:
        _after_kernel[(programs(x.device, tiles),)](
            x_d=tiled(aligned(x), 1, m, k), w_d=tiled(aligned(weight)[None], 1, *block), inner_d=tiled(inner, 1, m, k),
            factor_d=tiled(factor, 1, *block), bias_ptr=bias, slots_ptr=adapters.slots,
            y_d=tiled(y, 1, m, n // PIECES), S=length, TILES=tiles, COUNT=factor.size(0), K=width, N=outputs,
            R=adapters.rank, BM=m, BN=n, BK=k, TRANSPOSED=is_transposed, LATE=config.late,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
