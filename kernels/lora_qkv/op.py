"""The registered ops, their autograd, and the public functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backward import launch_backward
from .forward import launch_forward, launch_pack
from .reference import lora_qkv_ref
from .tiles import padded_rank, stacked_rank

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_RANK = 64


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
    """q [B, S, Nq], k [B, S, Nk] and v [B, S, Nv], in x's dtype, of x [B, S, D] by weight and each document's adapter.

    `sizes` is (Nq, Nk, Nv); three equal ones where it is left out. `slots` int32 or int64 [B] names the adapter of each
    document, -1 none; left out, document b has adapter b. Slots are not looked at on the host, and one past the pool
    counts as -1 in the kernel: :func:`check_slots` finds it.
    A slot named twice gets the sum of the gradients, added in the order of the batch. Gradients flow to x, lora_a and
    lora_b, never to weight.

    The adapters may be views into a pool [slots, P], of x's dtype or fp32. With `grads`, two tensors like lora_a and
    lora_b (views into a pool of gradients), the backward writes the rows of the slots named there, leaves the other
    rows alone, and autograd gets no gradient of lora_a and lora_b; x or lora_a has to require one all the same.

    `backend` is "reference" or "triton"; left out, CPU tensors take the reference and CUDA tensors the kernel. The
    kernel copies x, weight and incoming gradients that are not aligned rows (16 bytes), and adapters whose rows have
    gaps inside.
    """
    backend = _validate(x, weight, lora_a, lora_b, slots, sizes, grads, backend)
    sizes = [weight.size(0) // 3] * 3 if sizes is None else [int(size) for size in sizes]
    if backend == "reference":
        if grads is not None:
            raise ValueError("grads: the reference has no backward of its own to write them; use backend='triton'")
        return lora_qkv_ref(x, weight, lora_a, lora_b, tuple(sizes), slots)
    q, k, v, *_ = _op(x, weight, lora_a, lora_b, slots, sizes, *(grads or (None, None)))
    return q, k, v


def check_slots(slots: Tensor, count: int) -> None:
    """Raise ValueError unless every slot is -1 or below `count`. Waits for the device: for debugging."""
    wrong = [slot for slot in slots.tolist() if not -1 <= slot < count]
    if wrong:
        raise ValueError(f"slots {wrong} are not possible; allowed: -1 and 0 to {count - 1}")


@torch.library.custom_op("klora::lora_qkv", mutates_args=())
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
    """q, k, v and what the backward wants: xa, and the adapters of the batch as the tensor cores read them."""
    packed_a, packed_b = launch_pack(_rows(lora_a), _rows(lora_b), slots, x.size(0), sizes, x.dtype)
    outs = launch_forward(_aligned(x), _aligned(weight), packed_a, packed_b, lora_a.size(2), sizes)
    return *outs, packed_a, packed_b


@_op.register_fake
def _(x, weight, lora_a, lora_b, slots, sizes, grad_a, grad_b):
    batch, length = x.shape[:2]
    padded, stacked = padded_rank(lora_a.size(2)), stacked_rank(lora_a.size(2))
    outs = [x.new_empty(batch, length, size) for size in (*sizes, 3 * padded)]
    return *outs, x.new_empty(batch, stacked, x.size(2)), x.new_empty(batch, weight.size(0), stacked)


@torch.library.custom_op("klora::lora_qkv_backward", mutates_args=())
def _backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    x: Tensor,
    weight: Tensor,
    packed_a: Tensor,
    packed_b: Tensor,
    xa: Tensor,
    slots: Tensor | None,
    count: int,
    rank: int,
    lora_dtype: torch.dtype,
    needs_dx: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA [count, 3, R, D], dB [count, N, R]; what is not needed is empty."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    da = db = None
    if needs_lora:
        fresh = x.new_empty if slots is None and x.numel() else x.new_zeros
        da, db = (fresh(shape, dtype=lora_dtype) for shape in _lora_shapes(x, weight, count, rank))
    _launch(dq, dk, dv, x, weight, packed_a, packed_b, xa, rank, slots, dx, da, db)
    nothing = x.new_empty(0)
    return tuple(nothing.clone() if grad is None else grad for grad in (dx, da, db))


@_backward_op.register_fake
def _(dq, dk, dv, x, weight, packed_a, packed_b, xa, slots, count, rank, lora_dtype, needs_dx, needs_lora):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)
    if not needs_lora:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, *(x.new_empty(shape, dtype=lora_dtype) for shape in _lora_shapes(x, weight, count, rank))


@torch.library.custom_op("klora::lora_qkv_backward_into", mutates_args=("da", "db"))
def _backward_into_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    x: Tensor,
    weight: Tensor,
    packed_a: Tensor,
    packed_b: Tensor,
    xa: Tensor,
    slots: Tensor | None,
    da: Tensor,
    db: Tensor,
    needs_dx: bool,
) -> Tensor:
    """dx, empty where it is not needed; dA and dB go to the rows of `da` and `db` that `slots` name."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    _launch(dq, dk, dv, x, weight, packed_a, packed_b, xa, da.size(2), slots, dx, da, db)
    return x.new_empty(0) if dx is None else dx


@_backward_into_op.register_fake
def _(dq, dk, dv, x, weight, packed_a, packed_b, xa, slots, da, db, needs_dx):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)


def _setup(ctx, inputs, output):
    x, weight, lora_a, _, slots, sizes, grad_a, grad_b = inputs
    ctx.save_for_backward(x, weight, *output[4:], output[3], slots)
    ctx.lora = lora_a.size(0), lora_a.size(2), lora_a.dtype
    ctx.grads, ctx.sizes = (grad_a, grad_b), sizes
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, *douts):
    x, weight, packed_a, packed_b, xa, slots = ctx.saved_tensors
    shape = x.shape[:2]
    douts = [x.new_zeros(*shape, n) if d is None else d for d, n in zip(douts[:3], ctx.sizes, strict=True)]
    needs_dx, _, needs_a, needs_b = ctx.needs_input_grad[:4]
    saved = (*douts, x, weight, packed_a, packed_b, xa, slots)
    da = db = None
    if ctx.grads[0] is not None:
        dx = _backward_into_op(*saved, *ctx.grads, needs_dx)
    else:
        dx, da, db = _backward_op(*saved, *ctx.lora, needs_dx, needs_a or needs_b)
    return dx if needs_dx else None, None, da if needs_a else None, db if needs_b else None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def _launch(dq, dk, dv, x, weight, packed_a, packed_b, xa, rank, slots, dx, da, db) -> None:
    if x.numel():
        douts = tuple(_aligned(dout) for dout in (dq, dk, dv))
        launch_backward(douts, _aligned(x), _aligned(weight), packed_a, packed_b, xa, rank, slots, dx, da, db)
    elif da is not None and slots is None:
        da.zero_(), db.zero_()


def _lora_shapes(x: Tensor, weight: Tensor, count: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (count, 3, rank, x.size(2)), (count, weight.size(0), rank)


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor` if the copy engine can read it, else a copy: innermost stride 1, the other strides and the address
    multiples of 16 bytes.
    """
    steps = [tensor.data_ptr(), *(stride * tensor.itemsize for stride in tensor.stride()[:-1])]
    readable = tensor.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps)
    return tensor if readable else tensor.clone(memory_format=torch.contiguous_format)


def _rows(lora: Tensor) -> Tensor:
    """`lora` if each slot of it is one contiguous row."""
    return lora if lora.size(0) == 0 or lora[0].is_contiguous() else lora.contiguous()


def _validate(x, weight, lora_a, lora_b, slots, sizes, grads, backend) -> str:
    """The backend that runs; raises ValueError on what no backend takes."""
    backend = backend or ("triton" if x.is_cuda else "reference")
    if backend not in ("reference", "triton"):
        raise ValueError(f"backend is {backend!r}; allowed: 'reference', 'triton' or None")
    if x.dim() != 3 or weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f"x is {_told(x)} and weight {_told(weight)}; wanted [B, S, D] and [Nq+Nk+Nv, D]")
    width, rows = x.size(2), weight.size(0)
    if sizes is None and rows % 3:
        raise ValueError(f"sizes is missing, and weight's {rows} rows are not three equal projections")
    if sizes is not None and (len(sizes) != 3 or min(sizes) < 1 or sum(sizes) != rows):
        raise ValueError(f"sizes is {tuple(sizes)}; wanted three positive sizes that add up to weight's {rows} rows")
    rank = lora_a.size(-2) if lora_a.dim() == 4 else 0
    wanted = (3, rank, width), (rows, rank)
    if rank < 1 or lora_a.shape[1:] != wanted[0] or lora_b.shape[1:] != wanted[1] or lora_a.size(0) != lora_b.size(0):
        raise ValueError(
            f"lora_a is {_told(lora_a)} and lora_b {_told(lora_b)}; "
            f"wanted [slots, 3, R, {width}] and [slots, {rows}, R], R at least 1"
        )
    if slots is None and lora_a.size(0) != x.size(0):
        raise ValueError(
            f"slots is missing, and {lora_a.size(0)} adapters are not one for each of {x.size(0)} documents"
        )
    if slots is not None and (slots.shape != x.shape[:1] or slots.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"slots is {_told(slots)}; wanted int32 or int64 [{x.size(0)}]")
    if grads is not None and any(
        g.shape != p.shape or g.dtype != p.dtype or (g.size(0) and not g[0].is_contiguous())
        for g, p in zip(grads, (lora_a, lora_b), strict=True)
    ):
        raise ValueError(f"grads are {', '.join(map(_told, grads))}; wanted rows like {_told(lora_a)}, {_told(lora_b)}")
    given = [x, weight, lora_a, lora_b, *(grads or ()), *(() if slots is None else (slots,))]
    if len({tensor.device for tensor in given}) != 1:
        raise ValueError(f"tensors lie on {', '.join(sorted({str(t.device) for t in given}))}; wanted one device")
    if backend == "triton":
        _validate_kernel(x, weight, lora_a, lora_b, sizes or [rows // 3] * 3, rank)
    return backend


def _validate_kernel(x, weight, lora_a, lora_b, sizes, rank) -> None:
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"x is {_told(x)} and weight {_told(weight)}; wanted one dtype of {DTYPES}")
    if lora_a.dtype not in (x.dtype, torch.float32) or lora_b.dtype != lora_a.dtype:
        raise ValueError(
            f"lora_a is {_told(lora_a)} and lora_b {_told(lora_b)}; wanted both {x.dtype} or torch.float32"
        )
    if rank > MOST_RANK:
        raise ValueError(f"R is {rank}; allowed: up to {MOST_RANK}")
    if any(size % 16 for size in (x.size(2), *sizes)):
        raise ValueError(f"D is {x.size(2)} and sizes {tuple(sizes)}; wanted multiples of 16")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
