"""The grouped matrix products: one launch runs the tiles of a table, whatever matrices and kinds they belong to.

A tile reads its operands through descriptors (the copy engine of Hopper), accumulates in fp32 and stores through
descriptors too. Of a symmetric product only tiles on and under the diagonal are in the table; each is stored twice, the
second time turned, and a tile on the diagonal takes its upper half from its lower: the result equals its transpose bit
for bit. A tile of X X^T on the diagonal reads its operand once.

Two ways to run a plan. In steps: a launch for each set of tiles, each a programmatic dependent of the one before, whose
blocks are set up while the last of the other finish. Chained: one launch of as many blocks as the GPU holds, which
walk through all tiles in order; a counter for each matrix says how many of its tiles are stored, and a tile waits until
those that it needs are. Nothing is summed through the counters, so results are the same bits in both.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .plan import FIELDS, Plan


@dataclass(frozen=True)
class NewtonSchulzConfig:
    """Tile of the products, how the kernel is compiled, and how a plan is run."""

    panel: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    chained_blocks: int = 0
    """Blocks a multiprocessor of a chained launch; 0 runs the plan in steps."""


@triton.jit
def _await(done, needed):
    """Return once `needed` tiles are counted at `done`; what they stored may be read through descriptors then.

    A tile waits for tiles before it in the table alone, and a block takes its tiles in the table's order: this ends
    once every block of the launch is on a multiprocessor. Blocks that wait hold theirs, so no other launch that waits
    for its own blocks may run beside this one.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred ready;
        .reg .u32 count;
        again:
        ld.acquire.gpu.global.u32 count, [$1];
        setp.ge.u32 ready, count, $2;
        @ready bra over;
        nanosleep.u32 20;
        bra again;
        over:
        fence.proxy.async;
        mov.u32 $0, count;
        }""",
        "=r,l,r",
        [done, needed],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _announce(done):
    """Count this tile at `done`, after all that it stored has arrived in memory."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()
    tl.atomic_add(done, 1, sem="release", scope="gpu")


@triton.jit
def _store(block, kind, add, here, there, i, j, alpha, beta, gamma, squares, result, PANEL: tl.constexpr):
    """Store tile (i, j) of a product where it belongs, and of a symmetric one its mirror image."""
    if kind >= 2:
        if kind == 2:
            result.store([here, j], block.to(result.dtype))
        else:
            result.store([here, i], block.to(result.dtype).T)
    else:
        index = tl.arange(0, PANEL)
        if add >= 0:
            block = alpha * block + beta * squares.load([add, 0]).to(tl.float32)
            block += tl.where(index[:, None] + i == index[None, :] + j, gamma, 0.0)
        out = block.to(squares.dtype)
        if kind == 0:
            squares.store([here, 0], out)
        else:
            turned = out.T
            if i == j:
                squares.store([here, 0], tl.where(index[:, None] >= index[None, :], out, turned))
            else:
                squares.store([here, 0], out)
                squares.store([there, 0], turned)


@triton.jit
def _multiply(
    rows,
    columns,
    left,
    left_step,
    right,
    right_step,
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
                a = rows.load([left + k // PANEL * left_step, k % PANEL])
                acc = tl.dot(a, a.T, acc, input_precision=PRECISION)
        else:
            for k in range(0, depth, BK):
                a = rows.load([left + k // PANEL * left_step, k % PANEL])
                b = rows.load([right + k // PANEL * right_step, k % PANEL])
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        for k in range(0, depth, BK):
            a = rows.load([left + k // PANEL * left_step, k % PANEL])
            acc = tl.dot(a, columns.load([right + k, 0]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _read(tiles, factors, number, FIELDS: tl.constexpr):
    """What the table says of one tile."""
    tile = tiles + number * FIELDS
    scalars = factors + number * 4
    return (
        tl.load(tile),
        tl.load(tile + 1),
        tl.load(tile + 2),
        tl.load(tile + 3),
        tl.load(tile + 4),
        tl.load(tile + 5),
        tl.load(tile + 6),
        tl.load(tile + 7),
        tl.load(tile + 8),
        tl.load(tile + 9),
        tl.load(tile + 10),
        tl.load(tile + 11),
        tl.load(tile + 12),
        tl.load(scalars),
        tl.load(scalars + 1),
        tl.load(scalars + 2),
    )


@triton.jit(do_not_specialize=["total"])
def _products(
    rows,  # [PANEL, BK] of the arena
    columns,  # [BK, PANEL] of the arena
    squares,  # [PANEL, PANEL] of the arena
    result,  # [PANEL, PANEL] of the result
    tiles,
    factors,
    done,
    total,
    BK: tl.constexpr,
    PANEL: tl.constexpr,
    FIELDS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    number = tl.program_id(0)
    left, left_step, right, right_step, depth, add, here, there, i, j, kind, matrix, needed, alpha, beta, gamma = _read(
        tiles, factors, number, FIELDS
    )
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if not CHAINED:
        acc = _multiply(rows, columns, left, left_step, right, right_step, depth, kind, BK, PANEL, PRECISION)
        if DEPENDENT:
            tl.extra.cuda.gdc_launch_dependents()
        _store(acc, kind, add, here, there, i, j, alpha, beta, gamma, squares, result, PANEL)
    else:
        while number < total:
            number += tl.num_programs(0)
            _await(done + matrix, needed)
            acc = _multiply(rows, columns, left, left_step, right, right_step, depth, kind, BK, PANEL, PRECISION)
            _store(acc, kind, add, here, there, i, j, alpha, beta, gamma, squares, result, PANEL)
            _announce(done + matrix)
            # Read at the end: at the start, before the products, it costs registers and was no faster.
            (
                left,
                left_step,
                right,
                right_step,
                depth,
                add,
                here,
                there,
                i,
                j,
                kind,
                matrix,
                needed,
                alpha,
                beta,
                gamma,
            ) = _read(tiles, factors, tl.minimum(number, total - 1), FIELDS)


def run_products(plan: Plan, arena: Tensor, result: Tensor, config: NewtonSchulzConfig) -> None:
    """All products of `plan` in `arena` [arena_rows, panel], where X is; the last ones write `result`."""
    panel, bk = config.panel, config.block_k
    blocks = ((arena, panel, bk), (arena, bk, panel), (arena, panel, panel), (result, panel, panel))
    descriptors = [TensorDescriptor.from_tensor(tensor, [rows, columns]) for tensor, rows, columns in blocks]
    on_gpu = arena.is_cuda
    chained = on_gpu and config.chained_blocks > 0
    options = {}
    if on_gpu:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": not chained}
        if config.registers:
            options["maxnreg"] = config.registers
    launches, done, most = plan.launches, arena, len(plan.tiles)
    if chained:
        done = torch.zeros(len(plan.starts), dtype=torch.int32, device=arena.device)
        launches = ((0, len(plan.tiles)),)
        most = torch.cuda.get_device_properties(arena.device).multi_processor_count * config.chained_blocks
    for first, count in launches:
        _products[(min(count, most),)](
            *descriptors,
            plan.tiles[first:],
            plan.factors[first:],
            done,
            count,
            BK=bk,
            PANEL=panel,
            FIELDS=FIELDS,
            PRECISION="ieee" if arena.dtype == torch.float32 else "tf32",
            DEPENDENT=on_gpu and not chained,
            CHAINED=chained,
            **options,
        )
