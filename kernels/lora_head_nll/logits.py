"""The loss of any model's head over a large vocabulary: products by the GEMM library, logits in 16 bits and in slices.

    z = h W^T;   l = c * tanh(z / c) / T             c the softcap, or none: l = z / T
    nll = logsumexp(l) - l[target];   loss = sum of w nll, that over sum of w, or nll itself

    dz = dnll * (softmax(l) - onehot(target)) * (1 - tanh^2(z / c)) / T;   dh = dz W;   dW = dz^T h

Where :mod:`klora.kernels.lora_head_nll` sweeps a vocabulary of a few thousand tile by tile, here one product after
another makes the z of a slice of the vocabulary for all rows, in h's dtype as PyTorch's linear does. One launch takes
it into the running largest logit and sum of each row, or, in the backward, turns it into dz. A slice of dW is final,
as all rows are in it; dh is summed over the slices in fp32, in their order. All sums have one order: the same bits in
every run.

Memory beside inputs and gradients, for T rows: `memory` bytes say how much. All z are kept for the backward where they
fit: T V items of h's dtype. Else 8 bytes a row are kept, and the backward makes z again. A slice is a quarter of
`memory` at most (1,024 columns at least); with several slices dh takes 8 T D bytes more. fp32 logits exist nowhere,
unless h is fp32.

FLOPs: 2 T D V forward; 4 T D V backward, 6 where z is made again. Bytes beside the products, in items: z once forward;
z and dz once backward.

Milakov and Gimelshein 2018 (the running largest logit and sum).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import (
    FLOATS,
    INTEGERS,
    cdiv,
    custom_op,
    dtypes_of,
    empty_grad,
    expect,
    expect_multiples,
    expect_one_of,
    next_power_of_2,
    resolve_backend,
    round_up,
)
from ..launch import launched
from ..linear.product import launch_product
from .forward import softcapped
from .reference import NO_SOFTCAP, REDUCTIONS, check_softcap, linear_nll_ref, reduce_nll

TILE = 2048
"""Logits a program holds at a time, 16 a lane: two loads of 16 bytes each in 16 bits."""
STEP = 1024
"""The width of a slice is a multiple, so that the products' tiles are whole."""


@triton.jit
def _targets(targets_ptr, row, mask, vocabulary, ignore):
    """Targets as int32, -1 where nothing is scored."""
    target = tl.load(targets_ptr + row, mask=mask, other=-1)
    scored = (target >= 0) & (target < vocabulary) & (target != ignore)
    return tl.where(scored, target, -1).to(tl.int32)


@triton.jit
def _multiple(number, VECTOR: tl.constexpr):
    """`number`, a multiple of VECTOR, as one that the compiler knows to be: it loads 16 bytes at a time then."""
    return number // VECTOR * VECTOR


@launched
@triton.jit(do_not_specialize=["rows", "first", "columns", "vocabulary", "ignore"])
def row_sums(
    z_ptr, targets_ptr, nll_ptr, lse_ptr, top_ptr, rows, first, columns, vocabulary, ignore, stride_z, softcap, gain,
    CAPPED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """A slice of the vocabulary, `columns` from `first` on, into the largest logit of ROWS rows, their sums of
    exp(logit - largest) and their targets' z; after the LAST one nll and the logsumexp without the largest.

    Each lane keeps the largest and the sum of its own columns: nothing crosses lanes before the end.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    columns, stride_z = _multiple(columns, VECTOR), _multiple(stride_z, VECTOR)
    z_ptr += row.to(tl.int64)[:, None] * stride_z
    largest = tl.full((ROWS, BLOCK), -1e38, tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        is_inside = mask[:, None] & (column < columns)
        z = tl.load(z_ptr + column, mask=is_inside, other=0.0).to(tl.float32)
        logits = tl.where(is_inside, softcapped(z, softcap, CAPPED)[0] * gain, float("-inf"))
        # Of exp(largest - higher) and exp(logits - higher), the higher of both, one is 1: only the other one is made.
        rest = tl.exp(-tl.abs(logits - largest))
        sums = tl.where(logits > largest, sums * rest + 1.0, sums + rest)
        largest = tl.maximum(largest, logits)
    top = tl.max(largest, 1)
    total = tl.sum(sums * tl.exp(largest - top[:, None]), 1)
    target = _targets(targets_ptr, row, mask, vocabulary, ignore)
    is_here = (target >= first) & (target < first + columns)
    place = tl.where(is_here, target - first, 0)[:, None]
    z_target = tl.sum(tl.load(z_ptr + place, mask=is_here[:, None], other=0.0).to(tl.float32), 1)
    if not FIRST:
        before = tl.load(top_ptr + row, mask=mask, other=0.0)
        higher = tl.maximum(top, before)
        total *= tl.exp(top - higher)
        total += tl.load(lse_ptr + row, mask=mask, other=0.0) * tl.exp(before - higher)
        top = higher
        z_target += tl.load(nll_ptr + row, mask=mask, other=0.0)
    if LAST:
        total = tl.log(tl.where(mask, total, 1.0))
        nll = total - (softcapped(z_target, softcap, CAPPED)[0] * gain - top)
        z_target = tl.where(target >= 0, nll, 0.0)
    tl.store(nll_ptr + row, z_target, mask=mask)
    tl.store(lse_ptr + row, total, mask=mask)
    tl.store(top_ptr + row, top, mask=mask)


@launched
@triton.jit(do_not_specialize=["rows", "first", "columns", "vocabulary", "ignore"])
def logit_gradient(
    z_ptr, dz_ptr, targets_ptr, dnll_ptr, lse_ptr, top_ptr, rows, first, columns, vocabulary, ignore, stride_z,
    stride_dz, softcap, gain, scale,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dz of a slice of the vocabulary from its z, which may be the same memory; a tile [ROWS, BLOCK] a program."""
    columns = _multiple(columns, VECTOR)
    stride_z, stride_dz = _multiple(stride_z, VECTOR), _multiple(stride_dz, VECTOR)
    blocks = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = row < rows
    is_inside = mask[:, None] & (column < columns)
    target = _targets(targets_ptr, row, mask, vocabulary, ignore)[:, None]
    lse = tl.load(lse_ptr + row, mask=mask, other=0.0)[:, None]
    top = tl.load(top_ptr + row, mask=mask, other=0.0)[:, None]
    factor = tl.load(dnll_ptr + row, mask=mask, other=0.0)[:, None] * scale
    wide = row.to(tl.int64)[:, None]
    z = tl.load(z_ptr + wide * stride_z + column, mask=is_inside, other=0.0).to(tl.float32)
    t, slope = softcapped(z, softcap, CAPPED)
    p = tl.exp((t * gain - top) - lse)
    dz = (p - tl.where(first + column == target, 1.0, 0.0)) * (slope * factor)
    dz = tl.where(target >= 0, dz, 0.0)
    tl.store(dz_ptr + wide * stride_dz + column, dz.to(dz_ptr.dtype.element_ty), mask=is_inside)


def slice_width(rows: int, vocabulary: int, itemsize: int, memory: int) -> int:
    """How wide slices of the vocabulary are, about alike: a quarter of `memory` at most."""
    most = max(STEP, memory // 4 // (rows * itemsize) // STEP * STEP)
    return min(vocabulary, round_up(cdiv(vocabulary, cdiv(vocabulary, most)), STEP))


def _slices(h: Tensor, weight: Tensor, memory: int) -> list[slice]:
    vocabulary = weight.size(0)
    width = slice_width(h.size(0), vocabulary, h.itemsize, memory)
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _empty_slice(h: Tensor, parts: list[slice]) -> Tensor:
    """Memory for one slice at a time."""
    return h.new_empty(h.size(0) * (parts[0].stop - parts[0].start))


def _slice_in(held: Tensor, h: Tensor, part: slice) -> Tensor:
    """[rows, columns of the slice], contiguous."""
    rows, columns = h.size(0), part.stop - part.start
    return held.view(-1)[: rows * columns].view(rows, columns)


def _launch(
    kernel, whole_rows: bool, z: Tensor, first: int, vocabulary: int, softcap: float, temperature: float, **own
):
    """`kernel` over a slice z [rows, columns] of the logits, by whole rows or by tiles."""
    rows, columns = z.shape
    block = min(TILE, next_power_of_2(columns))
    height, is_capped = TILE // block, softcap < NO_SOFTCAP
    cap = softcap if is_capped else 1.0
    programs = cdiv(rows, height) * (1 if whole_rows else cdiv(columns, block))
    kernel[(programs,)](
        z_ptr=z, rows=rows, first=first, columns=columns, vocabulary=vocabulary, stride_z=z.stride(0), softcap=cap,
        gain=cap / temperature, CAPPED=is_capped, ROWS=height, BLOCK=block,
        VECTOR=8 if columns % 8 == 0 and z.stride(0) % 8 == 0 else 1, num_warps=4, **own,
    )  # fmt: skip


def _empty_outputs(h: Tensor, weight: Tensor, memory: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """nll fp32 [rows], the logsumexp in two terms [2, rows], and z [rows, V] where it is kept, else nothing."""
    rows, vocabulary = h.size(0), weight.size(0)
    is_kept = keep and rows * vocabulary * h.itemsize <= memory
    fp32 = {"dtype": torch.float32}
    z = h.new_empty(rows, vocabulary) if is_kept else h.new_empty(0)
    return h.new_empty(rows, **fp32), h.new_empty(2, rows, **fp32), z


@custom_op("klora::linear_nll", mutates_args=())
def _op(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    temperature: float,
    ignore_index: int,
    memory: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    nll, lse, z = outputs = _empty_outputs(h, weight, memory, keep)
    if not len(nll):
        return outputs
    vocabulary = weight.size(0)
    parts = [slice(0, vocabulary)] if z.numel() else _slices(h, weight, memory)
    held = z if z.numel() else _empty_slice(h, parts)
    for part in parts:
        z = torch.mm(h, weight[part].T, out=_slice_in(held, h, part))
        _launch(
            row_sums, True, z, part.start, vocabulary, softcap, temperature, targets_ptr=targets, nll_ptr=nll,
            lse_ptr=lse[0], top_ptr=lse[1], ignore=ignore_index, FIRST=part is parts[0], LAST=part is parts[-1],
        )  # fmt: skip
    return outputs


@_op.register_fake
def _(h, weight, targets, softcap, temperature, ignore_index, memory, keep):
    return _empty_outputs(h, weight, memory, keep)


@custom_op("klora::linear_nll_backward_", mutates_args=("dh", "dweight"))
def _backward_op(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    temperature: float,
    ignore_index: int,
    memory: int,
    dnll: Tensor,
    lse: Tensor,
    kept: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
) -> None:
    if not len(h):
        if dweight is not None:
            dweight.zero_()
        return
    parts, dnll = _slices(h, weight, memory), dnll.contiguous()
    held, is_summed = _empty_slice(h, parts), len(parts) > 1 and dh is not None
    if is_summed:
        total, share = (dh.new_empty(dh.shape, dtype=torch.float32) for _ in range(2))
    for part in parts:
        dz = _slice_in(held, h, part)
        z = kept[:, part] if kept.numel() else torch.mm(h, weight[part].T, out=dz)
        _launch(
            logit_gradient, False, z, part.start, weight.size(0), softcap, temperature, dz_ptr=dz, targets_ptr=targets,
            dnll_ptr=dnll, lse_ptr=lse[0], top_ptr=lse[1], ignore=ignore_index, stride_dz=dz.stride(0),
            scale=1 / temperature,
        )  # fmt: skip
        if dweight is not None:
            torch.mm(dz.T, h, out=dweight[part])
        if is_summed:
            launch_product(dz, weight[part], transposed=True, result=total if part is parts[0] else share)
            if part is not parts[0]:
                total += share
        elif dh is not None:
            torch.mm(dz, weight, out=dh)
    if is_summed:
        dh.copy_(total)


def _setup_context(ctx, inputs, output):
    h, weight, targets, *ctx.numbers, _ = inputs
    ctx.save_for_backward(h, weight, targets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dnll, *_):
    if dnll is None:
        return (None,) * 8
    *inputs, lse, kept = ctx.saved_tensors
    grads = [empty_grad(t, wanted) for t, wanted in zip(inputs[:2], ctx.needs_input_grad, strict=False)]
    _backward_op(*inputs, *ctx.numbers, dnll, lse, kept, *grads)
    return *grads, *(None,) * 6


_op.register_autograd(_backward, setup_context=_setup_context)


def linear_nll(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    memory: int = 2 << 30,
    backend: str | None = None,
) -> Tensor:
    """The cross entropy of `targets` int32 or int64 [...] for `h` [..., D] under any model's head `weight` [V, D].

    `h` and `weight` have one dtype, and both get gradients. Logits are z / `temperature`, or with a `softcap`
    softcap * tanh(z / softcap) / temperature. A target of `ignore_index`, and any outside [0, V), is not scored: its
    nll is 0, and it gives no gradient. `token_weights`, float [...], multiply the nll, and get a gradient.

    `reduction` is "none": nll fp32 [...]; "sum"; or "mean": the sum over that of the weights of what is scored (without
    weights its number), and 0 where nothing is.

    `memory` is how many bytes of logits may be kept for the backward, 2 GiB; where all of them need more, the backward
    makes them again, slice by slice, for a third more time. A slice takes a quarter of it. Vocabularies and widths of a
    multiple of 8 are the fast ones.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32.
    ValueError: other shapes, dtypes, reductions or backends, a softcap or temperature that is not above 0, a memory
    below 1, tensors on several devices.

    Example: loss = linear_nll(h, head, targets)
    """
    backend = resolve_backend(backend, h)
    expect("h", h, ("...", "D"), dtypes_of(backend))
    expect("weight", weight, ("V", h.size(-1)), (h.dtype,), h.device)
    expect("targets", targets, h.shape[:-1], INTEGERS, h.device)
    if token_weights is not None:
        expect("token_weights", token_weights, targets.shape, FLOATS, h.device)
    softcap = float("inf") if softcap is None else softcap
    check_softcap(softcap, temperature)
    expect_one_of("reduction", reduction, REDUCTIONS)
    expect_multiples(1, memory=memory, V=weight.size(0))
    about = {"token_weights": token_weights, "ignore_index": ignore_index, "reduction": reduction}
    if backend == "reference":
        return linear_nll_ref(h, weight, targets, softcap, temperature, **about)
    keep = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    rows, flat = h.reshape(-1, h.size(-1)), targets.reshape(-1).contiguous()
    nll, *_ = _op(rows, weight, flat, softcap, temperature, ignore_index, memory, keep)
    return reduce_nll(nll.view(targets.shape), targets, weight.size(0), **about)
