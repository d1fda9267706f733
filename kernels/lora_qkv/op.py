"""The registered ops, their autograd, and the public functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import aligned, custom_op
from ..linear.op import linear_dweight
from .adapters import Adapters, adapters_of, launch_pack, packed_adapters
from .backward import launch_backward
from .forward import launch_forward
from .reference import lora_qkv_ref
from .tiles import padded_rank, stacked_rank
from .validate import validate


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    *,
    grads: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, Nq], k [B, S, Nk] and v [B, S, Nv] of `x` [B, S, D], by `weight` and each document's adapter.

    `weight` is [Nq+Nk+Nv, D] in x's dtype, `lora_a` [slots, 3, R, D] and `lora_b` [slots, Nq+Nk+Nv, R]. `sizes` is (Nq,
    Nk, Nv); None is three equal ones. `slots` int32 or int64 [B] names the adapter of each document, -1 none; None
    gives document b adapter b. Slots are not looked at on the host, and one past the pool counts as -1:
    :func:`check_slots` finds it.

    x, weight, lora_a and lora_b get gradients; that of weight is made by cuBLAS. A slot named twice gets the sum of the
    gradients, added in the order of the batch.

    The adapters may be views into a pool [slots, P], of x's dtype or float32. Those of x's dtype whose rows lie on 16
    bytes are read in place; others take a launch more. `grads` is two tensors shaped like lora_a and lora_b, of their
    dtype or float32 (views into a pool of gradients). With it the backward writes the rows of the slots that are named,
    leaves the other rows alone, and autograd gets no gradient of lora_a and lora_b; x or lora_a has to require one all
    the same. Only the kernel takes it.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, R up to 128, and D and sizes that are multiples of 16. It copies x, weight and
    incoming gradients that are not aligned rows (16 bytes), and adapters whose rows have gaps.
    ValueError: other shapes, dtypes, ranks, sizes or backends, tensors on several devices, `grads` with the reference.

    Example: q, k, v = lora_qkv(x, weight, lora_a, lora_b, slots, sizes)
    """
    backend, sizes, slots = validate(x, weight, lora_a, lora_b, slots, sizes, grads, backend)
    if backend == "reference":
        return lora_qkv_ref(x, weight, lora_a, lora_b, tuple(sizes), slots)
    q, k, v, *_ = _op(x, weight, lora_a, lora_b, slots, sizes, *(grads or (None, None)))
    return q, k, v


def check_slots(slots: Tensor, count: int) -> None:
    """Raise ValueError unless every one of `slots` int [B] is -1 or in [0, `count`).

    It reads the device: for debugging.

    Example: check_slots(slots, count=3)
    """
    wrong = [slot for slot in slots.tolist() if not -1 <= slot < count]
    if wrong:
        raise ValueError(f"slots {wrong} are not possible; allowed: -1 and 0 to {count - 1}")


@custom_op("klora::lora_qkv", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None,
    sizes: list[int],
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and what the backward wants: xa, and the adapters that had to be rounded (else empty)."""
    adapters, packed = adapters_and_packed(x, lora_a, lora_b, slots, sizes)
    made = launch_forward(aligned(x), aligned(weight), adapters, sizes)
    return *made.outs, made.xa, *packed


@_op.register_fake
def _(x, weight, lora_a, lora_b, slots, sizes, grad_a, grad_b):
    return *fake_outputs(x, sizes, lora_a.size(2)), *fake_packed(x, weight, lora_a)


@custom_op("klora::lora_qkv_backward", mutates_args=())
def backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    xa: Tensor,
    slots: Tensor | None,
    count: int,
    rank: int,
    lora_dtype: torch.dtype,
    needs_dx: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA [count, 3, R, D], dB [count, N, R]; what is not needed is empty. `a` and `b` are lora_a and lora_b, or
    what was packed of them.
    """
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    da = db = None
    if needs_lora:
        fresh = x.new_empty if slots is None and x.numel() else x.new_zeros
        da, db = (fresh(shape, dtype=lora_dtype) for shape in _lora_shapes(x, weight, count, rank))
    launch((dq, dk, dv), x, weight, a, b, xa, rank, slots, dx, da, db, is_packed=a.dim() == 3)
    nothing = x.new_empty(0)
    return tuple(nothing.clone() if grad is None else grad for grad in (dx, da, db))


@backward_op.register_fake
def _(dq, dk, dv, x, weight, a, b, xa, slots, count, rank, lora_dtype, needs_dx, needs_lora):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)
    if not needs_lora:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, *(x.new_empty(shape, dtype=lora_dtype) for shape in _lora_shapes(x, weight, count, rank))


@custom_op("klora::lora_qkv_backward_into", mutates_args=("da", "db"))
def backward_into_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    xa: Tensor,
    slots: Tensor | None,
    da: Tensor,
    db: Tensor,
    needs_dx: bool,
) -> Tensor:
    """dx, empty where it is not needed; dA and dB go to the rows of `da` and `db` that `slots` name."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    launch((dq, dk, dv), x, weight, a, b, xa, da.size(2), slots, dx, da, db, is_packed=a.dim() == 3)
    return x.new_empty(0) if dx is None else dx


@backward_into_op.register_fake
def _(dq, dk, dv, x, weight, a, b, xa, slots, da, db, needs_dx):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)


def _setup(ctx, inputs, output):
    x, weight, lora_a, lora_b, slots, sizes, grad_a, grad_b = inputs
    ctx.save_for_backward(*saved(x, weight, lora_a, lora_b, slots, *output[3:6]))
    ctx.lora = lora_a.size(0), lora_a.size(2), lora_a.dtype
    ctx.grads, ctx.sizes = (grad_a, grad_b), sizes
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, *douts):
    x = ctx.saved_tensors[0]
    douts = [x.new_zeros(*x.shape[:2], n) if d is None else d for d, n in zip(douts[:3], ctx.sizes, strict=True)]
    return *gradients(ctx, douts), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def adapters_and_packed(x, lora_a, lora_b, slots, sizes) -> tuple[Adapters, tuple[Tensor, Tensor]]:
    """The adapters as the kernels read them, and what was rounded for that, which the backward wants again."""
    if lora_a.dtype == x.dtype:
        return adapters_of(lora_a, lora_b, slots, x.size(0), sizes, x.dtype), (x.new_empty(0), x.new_empty(0))
    packed = launch_pack(lora_a, lora_b, slots, x.size(0), sizes, x.dtype)
    return packed_adapters(*packed, lora_a.size(-2)), packed


def fake_packed(x, weight, lora_a) -> tuple[Tensor, Tensor]:
    if lora_a.dtype == x.dtype:
        return x.new_empty(0), x.new_empty(0)
    batch, rank, groups = x.size(0), lora_a.size(-2), lora_a.size(1) if lora_a.dim() == 4 else 1
    b = x.new_empty(batch, weight.size(0), stacked_rank(rank, groups))
    return x.new_empty(batch, groups * rank, x.size(2)), b


def fake_outputs(x, sizes, rank) -> list[Tensor]:
    return [x.new_empty(*x.shape[:2], size) for size in (*sizes, 3 * padded_rank(rank))]


def saved(x, weight, lora_a, lora_b, slots, xa, packed_a, packed_b) -> tuple[Tensor | None, ...]:
    """What :func:`gradients` takes from the context first."""
    read = (lora_a, lora_b) if lora_a.dtype == x.dtype else (packed_a, packed_b)
    return x, weight, *read, xa, slots


def gradients(ctx, douts) -> tuple[Tensor | None, ...]:
    """Of x, weight, lora_a and lora_b, by the gradients of the three projections."""
    tensors = ctx.saved_tensors[:6]
    needs_dx, needs_dweight, needs_a, needs_b = ctx.needs_input_grad[:4]
    dx = dweight = da = db = None
    if ctx.grads[0] is not None:
        dx = backward_into_op(*douts, *tensors, *ctx.grads, needs_dx)
    elif needs_dx or needs_a or needs_b:
        dx, da, db = backward_op(*douts, *tensors, *ctx.lora, needs_dx, needs_a or needs_b)
    if needs_dweight:
        dweight = torch.cat([linear_dweight(dout, tensors[0]) for dout in douts])
    return dx if needs_dx else None, dweight, da if needs_a else None, db if needs_b else None


def launch(
    douts: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    xa: Tensor,
    rank: int,
    slots: Tensor | None,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    is_packed: bool,
    kept: Tensor | None = None,
) -> None:
    """The backward of one product or of three, from adapters as they were given, or as :func:`launch_pack` made them.

    What it writes, and `kept`, are as of :func:`launch_backward`.
    """
    if x.numel():
        sizes = [dout.size(2) for dout in douts]
        adapters = packed_adapters(a, b, rank) if is_packed else adapters_of(a, b, slots, x.size(0), sizes, x.dtype)
        douts = tuple(aligned(dout) for dout in douts)
        launch_backward(douts, aligned(x), aligned(weight), adapters, xa, slots, dx, da, db, kept)
    elif da is not None:  # sums over no tokens
        every = torch.arange(da.size(0), device=x.device)
        named = torch.ones_like(every, dtype=torch.bool) if slots is None else (slots[:, None] == every).any(0)
        for grad in (da, db):
            grad.masked_fill_(named.view(-1, *(1,) * (grad.dim() - 1)), 0.0)


def _lora_shapes(x: Tensor, weight: Tensor, count: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (count, 3, rank, x.size(2)), (count, weight.size(0), rank)
