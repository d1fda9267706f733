"""The grouped matrix products: one launch runs the tiles of a table, whatever matrices and kinds they belong to.

A tile reads its operands through descriptors (the copy engine of Hopper), accumulates in fp32 and stores through
descriptors too. Of a symmetric product only tiles on and under the diagonal are in the table. Each is stored twice, the
second time transposed. A tile on the diagonal takes its upper half from its lower: the result equals its transpose bit
for bit. A tile of X X^T on the diagonal reads its operand once.

Two ways to run a plan. In steps, here: a launch for each set of tiles, each a programmatic dependent of the one before,
whose blocks are set up while the last of the other finish. Chained: one launch, in chained.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launched
from ..tile import tiled
from .chained import run_chained
from .plan import FIELDS, Plan


@dataclass(frozen=True)
class NewtonSchulzConfig:
    """Tile of the products, how the kernel is compiled, and how a plan is run."""

    panel: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    chained: bool = False
    """One launch, whose warps and registers are its own, in place of a launch for each set of tiles."""


@triton.jit
def _store(block, kind, add, target, mirror, i, j, alpha, beta, gamma, squares, result, PANEL: tl.constexpr):
    """Store tile (i, j) of a product where it belongs, and of a symmetric one its mirror image."""
    if kind >= 2:
        if kind == 2:
            result.store([target, j], block.to(result.dtype))
        else:
            result.store([target, i], block.to(result.dtype).T)
    else:
        index = tl.arange(0, PANEL)
        if add >= 0:
            block = alpha * block + beta * squares.load([add, 0]).to(tl.float32)
            block += tl.where(index[:, None] + i == index[None, :] + j, gamma, 0.0)
        out = block.to(squares.dtype)
        if kind == 0:
            squares.store([target, 0], out)
        else:
            transposed = out.T
            if i == j:
                squares.store([target, 0], tl.where(index[:, None] >= index[None, :], out, transposed))
            else:
                squares.store([target, 0], out)
                squares.store([mirror, 0], transposed)


@triton.jit
def _multiply(
    rows,
    columns,
    left,
    right,
    panel_step,
    depth,
    kind,
    BK: tl.constexpr,
    PANEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    acc = tl.zeros((PANEL, PANEL), tl.float32)
    if kind == 1:
        if left == right:
            for k in range(0, depth, BK):
                a = rows.load([left + k // PANEL * panel_step, k % PANEL])
                acc = tl.dot(a, a.T, acc, input_precision=PRECISION)
        else:
            for k in range(0, depth, BK):
                a = rows.load([left + k // PANEL * panel_step, k % PANEL])
                b = rows.load([right + k // PANEL * panel_step, k % PANEL])
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        for k in range(0, depth, BK):
            a = rows.load([left + k // PANEL * panel_step, k % PANEL])
            acc = tl.dot(a, columns.load([right + k, 0]), acc, input_precision=PRECISION)
    return acc


@launched
@triton.jit
def _products(
    rows,  # [PANEL, BK] of the arena
    columns,  # [BK, PANEL] of the arena
    squares,  # [PANEL, PANEL] of the arena
    result,  # [PANEL, PANEL] of the result
    tiles,
    factors,
    BK: tl.constexpr,
    PANEL: tl.constexpr,
    FIELDS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * FIELDS
    left = tl.load(tile)
    panel_step = tl.load(tile + 1)
    right = tl.load(tile + 2)
    depth = tl.load(tile + 3)
    add = tl.load(tile + 4)
    target = tl.load(tile + 5)
    mirror = tl.load(tile + 6)
    i = tl.load(tile + 7)
    j = tl.load(tile + 8)
    kind = tl.load(tile + 9)
    scalars = factors + tl.program_id(0) * 4
    alpha = tl.load(scalars)
    beta = tl.load(scalars + 1)
    gamma = tl.load(scalars + 2)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    acc = _multiply(rows, columns, left, right, panel_step, depth, kind, BK, PANEL, PRECISION)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    _store(acc, kind, add, target, mirror, i, j, alpha, beta, gamma, squares, result, PANEL)


def run_products(plan: Plan, arena: Tensor, result: Tensor, config: NewtonSchulzConfig) -> None:
    """All products of `plan` in `arena` [arena_rows, panel], where X is; the last ones write `result`.

    The plan is chained if `config` is.
    """
    panel, bk = config.panel, config.block_k
    if config.chained:
        run_chained(plan, arena, result, bk, config.num_stages)
        return
    options = {}
    if arena.is_cuda:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": True}
        if config.registers:
            options["maxnreg"] = config.registers
    blocks = {
        "rows": tiled(arena, panel, bk), "columns": tiled(arena, bk, panel),
        "squares": tiled(arena, panel, panel), "result": tiled(result, panel, panel),
    }  # fmt: skip
    for first, count in plan.launches:
        _products[(count,)](
            **blocks, tiles=plan.tiles[first:], factors=plan.factors[first:],
            BK=bk, PANEL=panel, FIELDS=FIELDS, PRECISION="ieee" if arena.dtype == torch.float32 else "tf32",
            DEPENDENT=arena.is_cuda, **options,
        )  # fmt: skip
