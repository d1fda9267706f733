"""The sweep over the vocabulary: nll, logsumexp, and the part of the gradient that needs only a row factor more."""

import triton
import triton.language as tl

from ..dot import multiply_add
from ..launch import launched


@triton.jit
def softcapped(z, softcap, CAPPED: tl.constexpr):
    """tanh(z / softcap) and its slope 1 - tanh^2, with the relative error of fp32 for small arguments too; without a
    softcap z itself and 1.

    Below 0.625 an odd polynomial (coefficients of the Cephes library), above it 1 - 2 / (1 + exp(2 x)).
    """
    if CAPPED:
        x = z / softcap
        s = x * x
        tail = -5.70498872745e-3
        tail = tail * s + 2.06390887954e-2
        tail = tail * s - 5.37397155531e-2
        tail = tail * s + 1.33314422036e-1
        tail = tail * s - 3.33332819422e-1
        rest = 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
        far = tl.where(x < 0, rest - 1.0, 1.0 - rest)
        t = tl.where(tl.abs(x) < 0.625, x + x * s * tail, far)
        return t, 1.0 - t * t
    else:
        return z, tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _weighted(z, softcap, gain, scale):
    """4 scale exp(l), a quarter of the slope, and tanh, in ten instructions: the error of 1e-7 is for 16-bit inputs.

    With r = 1 / (1 + exp(2 z / c)), a squared rsqrt, tanh is 1 - 2 r and its slope 4 (r - r^2); their constants go into
    the exponent, so that the product of the first two results is the slope / temperature times exp(l).
    """
    root = tl.math.rsqrt(1.0 + tl.exp2(z * (2.8853900817779268 / softcap)))
    r = root * root
    bits = gain * 1.4426950408889634
    return tl.exp2(r * (-2.0 * bits) + (bits + tl.log2(4.0 * scale))), r - r * r, 1.0 - 2.0 * r


@triton.jit
def end_of_row(total, z_target, softcap, gain, scale, DTYPE: tl.constexpr):
    """Of a row whose logits are bounded, from its sum of 4 scale exp(l) and its target's z: nll, the target's element
    of E as its tile had it and as it shall be, the logsumexp, and what E's row factor wants added to it.

    The target's element gets p - 1 instead of p. It is the largest of its row: the row factor takes what rounding did
    to it.
    """
    p, quarter, t = _weighted(z_target, softcap, gain, scale)
    lse = tl.log(total) - tl.log(4.0 * scale)
    exact = (p - total) * quarter
    after = exact.to(DTYPE)
    rounding = after.to(tl.float32) / exact
    more = tl.where(tl.abs(rounding - 1.0) < 0.01, tl.log(rounding), 0.0)
    return lse - t * gain, (p * quarter).to(DTYPE), after, lse, more


@launched
@triton.jit(do_not_specialize=["S", "width", "slots"])
def sweep(
    h_desc,
    weight_desc,
    lora_a_ptr,
    lora_b_ptr,
    slots_ptr,
    targets_ptr,
    nll_ptr,
    lse_ptr,
    top_ptr,
    e_ptr,
    u_ptr,
    du_ptr,
    S,
    width,
    stride_e,
    slots,
    stride_a,
    stride_b,
    softcap,
    gain,
    scale,
    DTYPE: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BOUNDED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program takes BLOCK_S tokens of a batch row through the whole vocabulary. `gain` is softcap /
    temperature and `scale` 1 / temperature; `gain` is `scale` where nothing is CAPPED.

    HAS_LSE: the logsumexp is known, and E is the gradient of nll to z itself. Otherwise nll and the logsumexp come out,
    and with KEEP, which BOUNDED has to allow, an E that exp(-lse) normalises. The logsumexp is `top` + `lse`, the
    largest logit and the rest: their sum would lose digits. A top of 0 does where it is BOUNDED. With KEEP and without
    HAS_LSE, exp(-lse) is the factor that E wants, which differs from the logsumexp's by a rounding.
    """
    blocks = tl.cdiv(S, BLOCK_S)
    first = tl.program_id(0) % blocks * BLOCK_S
    row = tl.program_id(0) // blocks
    token = first + tl.arange(0, BLOCK_S)
    mask_s = token < S
    offsets = row.to(tl.int64) * S + token
    v = tl.arange(0, BLOCK_V)
    r = tl.arange(0, RANK_PADDED)
    if RANK:
        slot = row.to(tl.int64) if slots_ptr is None else tl.load(slots_ptr + row).to(tl.int64)
        mask_r = (r < RANK) & (slot >= 0) & (slot < slots)
        lora_a_ptr += slot * stride_a
        lora_b_ptr += slot * stride_b
        u = tl.zeros((BLOCK_S, RANK_PADDED), tl.float32)
        # `width` is D, which the compiler must not know where it would unroll this loop: for D to 128 and ranks to 16,
        # ptxas 12.8 then addresses B wrongly in the product below that makes du.
        for k in range(0, D if D > 256 else width, BLOCK_D):
            d = k + tl.arange(0, BLOCK_D)
            h = tl.reshape(h_desc.load([row, first, k]), (BLOCK_S, BLOCK_D))
            a = tl.load(lora_a_ptr + r[:, None] * D + d[None, :], mask=mask_r[:, None] & (d < D)[None, :], other=0.0)
            u = multiply_add(h, a.to(DTYPE).T, u)
        if KEEP:
            tl.store(u_ptr + offsets[:, None] * RANK_PADDED + r[None, :], u, mask=mask_s[:, None])
        low = u.to(DTYPE)
        du = tl.zeros((BLOCK_S, RANK_PADDED), tl.float32)
    target = tl.load(targets_ptr + offsets, mask=mask_s, other=-1)
    if target.dtype == tl.int64:
        target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    scored = (target >= 0) & (target < V)
    total = tl.zeros((BLOCK_S,), tl.float32)
    z_target = tl.zeros((BLOCK_S,), tl.float32)
    if HAS_LSE:
        lse = tl.load(lse_ptr + offsets, mask=mask_s, other=float("inf"))
        top = tl.load(top_ptr + offsets, mask=mask_s, other=0.0)
    else:
        top = tl.full((BLOCK_S,), 0.0 if BOUNDED else float("-inf"), tl.float32)
    for n in range(0, V, BLOCK_V):
        z = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
        for k in range(0, D, BLOCK_D):
            h = tl.reshape(h_desc.load([row, first, k]), (BLOCK_S, BLOCK_D))
            z = multiply_add(h, weight_desc.load([n, k]).T, z)
        mask_v = n + v < V
        if RANK:
            b_ptrs = lora_b_ptr + (n + v)[:, None] * RANK + r[None, :]
            b = tl.load(b_ptrs, mask=mask_v[:, None] & mask_r[None, :], other=0.0).to(DTYPE)
            z = multiply_add(low, b.T, z)
        is_target = (n + v)[None, :] == target[:, None]
        if HAS_LSE:
            t, slope = softcapped(z, softcap, CAPPED)
            e = tl.exp((t * gain - top[:, None]) - lse[:, None])
            e = (e - tl.where(is_target, 1.0, 0.0)) * (slope * scale)
        else:
            z_target += tl.sum(tl.where(is_target, z, 0.0), 1)
            if BOUNDED:
                p, quarter, _ = _weighted(z, softcap, gain, scale)
                if V % BLOCK_V:
                    p = tl.where(mask_v[None, :], p, 0.0)
                total += tl.sum(p, 1)
                e = p * quarter
            else:
                logits = tl.where(mask_v[None, :], softcapped(z, softcap, CAPPED)[0] * gain, float("-inf"))
                higher = tl.maximum(top, tl.max(logits, 1))
                total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
                top = higher
        if KEEP:
            e = e.to(DTYPE)
            tl.store(e_ptr + offsets[:, None] * stride_e + (n + v)[None, :], e, mask=mask_s[:, None] & mask_v[None, :])
            if RANK:
                du = multiply_add(e, b, du)
    if not HAS_LSE:
        if BOUNDED:
            nll, before, after, lse, more = end_of_row(total, z_target, softcap, gain, scale, DTYPE)
        else:
            t, _ = softcapped(z_target, softcap, CAPPED)
            lse = tl.log(total)
            nll = lse - (t * gain - top)
        tl.store(nll_ptr + offsets, tl.where(scored, nll, 0.0), mask=mask_s)
        tl.store(top_ptr + offsets, top, mask=mask_s)
        if KEEP:
            lse += more
            # The barrier keeps this store behind that of its tile.
            tl.debug_barrier()
            tl.store(e_ptr + offsets * stride_e + target, after, mask=mask_s & scored)
            if RANK:
                b_ptrs = lora_b_ptr + target[:, None] * RANK + r[None, :]
                b = tl.load(b_ptrs, mask=(mask_s & scored)[:, None] & mask_r[None, :], other=0.0).to(DTYPE)
                du += (after.to(tl.float32) - before.to(tl.float32))[:, None] * b.to(tl.float32)
        tl.store(lse_ptr + offsets, tl.where(scored, lse, float("inf")), mask=mask_s)
    if KEEP and RANK:
        tl.store(du_ptr + offsets[:, None] * RANK_PADDED + r[None, :], du, mask=mask_s[:, None])
