"""The sweep without adapters on Hopper: groups of warps that take turns (:mod:`klora.kernels.pingpong`).

What :func:`klora.kernels.lora_head_nll.forward.sweep` computes with KEEP and BOUNDED where there is a softcap: E in
bf16, and of each row the sum of exp(logit) and the target's z, of which a second launch makes the rest. A group takes
BLOCK rows through a share of the vocabulary; while it exponentiates a tile, the other multiplies its own. Where pairs
of groups are fewer than multiprocessors, the vocabulary is cut into `shares`, whose sums are added in their order.

Per logit three results of the special functions unit and about fourteen instructions: as long as the product at D 512,
and hidden by it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..dispatch import cdiv, multiprocessors
from ..launch import launched
from ..pingpong import (
    ACC,
    BLOCK,
    DEPTH,
    GROUP_REGISTERS,
    LOAD_REGISTERS,
    SWIZZLED,
    load_step,
    make_ring,
    multiply_tile,
    runs_on,
    swizzled,
)
from .forward import end_of_row


@gluon.jit
def _weighted(z, softcap, gain, scale):
    """As the Triton sweep's."""
    root = gl.rsqrt(1.0 + gl.exp2(z * (2.8853900817779268 / softcap)))
    r = root * root
    bits = gain * 1.4426950408889634
    return gl.exp2(r * (-2.0 * bits) + (bits + gl.log2(4.0 * scale))), r - r * r


@gluon.jit
def _sweep_rows(
    e_desc, targets_ptr, totals_ptr, z_targets_ptr, inputs, weights, stores, loaded, empty, turn, rows, pairs,
    softcap, gain, scale,
    GROUP: gl.constexpr, SHARES: gl.constexpr, TILES: gl.constexpr, V: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    store = stores.index(GROUP)
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, ACC))
    count = GROUP
    for item in range(gl.program_id(0), pairs * SHARES, gl.num_programs(0)):
        m = (item // SHARES * 2 + GROUP) * BLOCK
        share = item % SHARES
        row = m + gl.arange(0, BLOCK, gl.SliceLayout(1, ACC))
        target = gl.load(targets_ptr + row, mask=row < rows, other=-1)
        target = gl.where((target >= 0) & (target < V), target, -1).to(gl.int32)
        total = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, ACC))
        z_target = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, ACC))
        for tile in range(share * TILES, share * TILES + TILES):
            z = multiply_tile(inputs, weights, loaded, empty, turn, count, GROUP, STEPS, False)
            v = tile * BLOCK + column
            z_target += gl.sum(gl.where(v[None, :] == target[:, None], z, 0.0), 1)
            p, quarter = _weighted(z, softcap, gain, scale)
            if V % (SHARES * TILES * BLOCK):
                p = gl.where((v < V)[None, :], p, 0.0)
            total += gl.sum(p, 1)
            tma.store_wait(0)
            store.store((p * quarter).to(store.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(e_desc, [m, tile * BLOCK], store)
            count += 2
        gl.store(totals_ptr + share * rows + row, total, mask=row < rows)
        gl.store(z_targets_ptr + share * rows + row, z_target, mask=row < rows)
    tma.store_wait(0)


@gluon.jit
def _load(
    h_desc, weight_desc, inputs, weights, loaded, empty, pairs,
    SHARES: gl.constexpr, TILES: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    step = 0
    for item in range(gl.program_id(0), pairs * SHARES, gl.num_programs(0)):
        share = item % SHARES
        for tile in range(share * TILES, share * TILES + TILES):
            for group in range(2):
                m = (item // SHARES * 2 + group) * BLOCK
                for k in range(STEPS):
                    place, columns = [m, k * DEPTH], [tile * BLOCK, k * DEPTH]
                    load_step(h_desc, weight_desc, place, columns, inputs, weights, loaded, empty, step)
                    step += 1


@launched
@gluon.jit(do_not_specialize=["rows", "pairs"])
def _sweep(
    h_desc,  # [rows, D], blocks [BLOCK, DEPTH]
    weight_desc,  # [V, D], blocks [BLOCK, DEPTH]
    e_desc,  # [rows, V], blocks [BLOCK, BLOCK]
    targets_ptr,
    totals_ptr,  # fp32 [SHARES, rows]
    z_targets_ptr,
    rows,
    pairs,
    softcap,
    gain,
    scale,
    SHARES: gl.constexpr,
    TILES: gl.constexpr,
    V: gl.constexpr,
    STEPS: gl.constexpr,
):
    inputs, weights, loaded, empty, turn = make_ring(h_desc.dtype, [BLOCK, DEPTH])
    stores = gl.allocate_shared_memory(h_desc.dtype, [2, BLOCK, BLOCK], SWIZZLED)
    gl.warp_specialize(
        [
            (_sweep_rows, (
                e_desc, targets_ptr, totals_ptr, z_targets_ptr, inputs, weights, stores, loaded, empty, turn, rows,
                pairs, softcap, gain, scale, 0, SHARES, TILES, V, STEPS,
            )),
            (_sweep_rows, (
                e_desc, targets_ptr, totals_ptr, z_targets_ptr, inputs, weights, stores, loaded, empty, turn, rows,
                pairs, softcap, gain, scale, 1, SHARES, TILES, V, STEPS,
            )),
            (_load, (h_desc, weight_desc, inputs, weights, loaded, empty, pairs, SHARES, TILES, STEPS)),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["rows"])
def _finish_rows(
    targets_ptr, totals_ptr, z_targets_ptr, nll_ptr, lse_ptr, top_ptr, e_ptr, rows, stride_e, softcap, gain, scale,
    V: tl.constexpr, SHARES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """nll, the logsumexp and the target's element of E, N rows a program."""
    row = tl.program_id(0) * N + tl.arange(0, N)
    mask = row < rows
    target = tl.load(targets_ptr + row, mask=mask, other=-1)
    scored = (target >= 0) & (target < V)
    total = tl.zeros((N,), tl.float32)
    z_target = tl.zeros((N,), tl.float32)
    for share in range(SHARES):
        total += tl.load(totals_ptr + share * rows + row, mask=mask, other=1.0)
        z_target += tl.load(z_targets_ptr + share * rows + row, mask=mask, other=0.0)
    nll, _, after, lse, more = end_of_row(total, z_target, softcap, gain, scale, e_ptr.dtype.element_ty)
    tl.store(nll_ptr + row, tl.where(scored, nll, 0.0), mask=mask)
    tl.store(lse_ptr + row, tl.where(scored, lse + more, float("inf")), mask=mask)
    tl.store(top_ptr + row, 0.0, mask=mask)
    tl.store(e_ptr + row.to(tl.int64) * stride_e + target, after, mask=mask & scored)


def takes(h: Tensor) -> bool:
    """Whether rows h [B, S, D] are many enough, and in bf16 on Hopper."""
    return runs_on(h) and h.dtype == torch.bfloat16 and h.shape[:2].numel() >= 8192


def pick_shares(pairs: int, tiles: int, processors: int) -> int:
    """In how many shares the vocabulary's `tiles` are swept: those that leave the fewest multiprocessors idle."""

    def rounds(shares: int) -> float:
        return cdiv(pairs * shares, processors) * cdiv(tiles, shares)

    return min(range(1, min(tiles, 16) + 1), key=lambda shares: (rounds(shares), shares))


def launch_sweep(
    h: Tensor, weight: Tensor, targets: Tensor, nll: Tensor, lse: Tensor, e: Tensor, softcap: float, temperature: float
) -> None:
    """nll [B, S], lse [2, B, S] and E [B, S, V] of h [B, S, D] and weight [V, D], contiguous, in bf16."""
    h, e = h.reshape(-1, h.size(-1)), e.flatten(0, 1)
    (rows, width), vocabulary, block, depth = h.shape, weight.size(0), BLOCK.value, DEPTH.value
    pairs, tiles, processors = cdiv(rows, 2 * block), cdiv(vocabulary, block), multiprocessors(h.device)
    shares = pick_shares(pairs, tiles, processors)
    totals, z_targets = (nll.new_empty(shares, rows) for _ in range(2))
    shared = dict(
        targets_ptr=targets, totals_ptr=totals, z_targets_ptr=z_targets, rows=rows, softcap=softcap,
        gain=softcap / temperature, scale=1 / temperature, V=vocabulary, SHARES=shares, num_warps=4,
    )  # fmt: skip
    _sweep[(min(processors, pairs * shares),)](
        h_desc=swizzled(h, block, depth), weight_desc=swizzled(weight, block, depth), e_desc=swizzled(e, block, block),
        pairs=pairs, TILES=cdiv(tiles, shares), STEPS=cdiv(width, depth), maxnreg=168, **shared,
    )  # fmt: skip
    _finish_rows[(cdiv(rows, 256),)](
        nll_ptr=nll, lse_ptr=lse[0], top_ptr=lse[1], e_ptr=e, stride_e=e.stride(0), N=256, **shared
    )
