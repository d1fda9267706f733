"""Product with a frozen weight and one LoRA adapter a document: y = x W^T + (x A^T) B^T.

    dx = dy W + t A      t = dy B      dA = t^T x      dB = dy^T (x A^T)
    dW = dy^T x          where weight requires a gradient, by cuBLAS

x [B, S, K]; weight [N, K]; lora_a [slots, R, K]; lora_b [slots, N, R]; y [B, S, N]. It is one of the three projections
of `lora_qkv` by the same launches: sums, roundings, FLOPs and bytes are described there, with one projection for three,
and so are the promises. The same bits in every run; a document's bits do not depend on the rest of its batch.

K and N multiples of 16, R up to 128, any S.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import aligned, custom_op, resolve_backend
from .linear.op import linear_dweight
from .lora_qkv.adapters import Adapters
from .lora_qkv.forward import launch_forward
from .lora_qkv.op import adapters_and_packed, fake_packed, launch
from .lora_qkv.tiles import padded_rank
from .lora_qkv.validate import validate_product
from .slots import rows_of_slots


def lora_linear_ref(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, slots: Tensor | None = None) -> Tensor:
    """y [B, S, N] of `x` [B, S, K], in its float dtype: x W^T + (x A^T) B^T with each document's A and B.

    `weight` is [N, K] in x's dtype. `lora_a` [slots, R, K] and `lora_b` [slots, N, R] are cast to x's dtype. `slots`
    int [B] names the adapter of each document, None document b's own. A slot named twice sums its gradients; -1, or any
    slot outside the pool, is no adapter. Autograd gives the gradients of x, weight, lora_a and lora_b.

    Example: y = lora_linear_ref(x, up, up_a, up_b, slots)
    """
    if slots is not None:
        lora_a, lora_b = rows_of_slots(lora_a, slots), rows_of_slots(lora_b, slots)
    return torch.baddbmm(F.linear(x, weight), torch.bmm(x, lora_a.to(x.dtype).mT), lora_b.to(x.dtype).mT)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None = None,
    *,
    grads: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """y [B, S, N] of `x` [B, S, K], by `weight` [N, K] of x's dtype and each document's adapter.

    `lora_a` is [slots, R, K] and `lora_b` [slots, N, R]. They, `slots`, `grads` and the gradients are those of
    :func:`lora_qkv`: adapters of x's dtype or float32, views into a pool if need be; slot -1 is no adapter; with
    `grads` the backward writes the rows of the slots that are named.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, R up to 128, and K and N that are multiples of 16.
    ValueError: other shapes, dtypes, ranks or backends, tensors on several devices, `grads` with the reference.

    Example: y = lora_linear(x, up, up_a, up_b, slots)
    """
    backend = resolve_backend(backend, x)
    given = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    validate_product(given, x.size(-1) if x.dim() else 0, slots, grads, backend)
    if backend == "reference":
        return lora_linear_ref(x, weight, lora_a, lora_b, slots)
    slots = None if slots is None else slots.contiguous()
    return _op(x, weight, lora_a, lora_b, slots, *(grads or (None, None)))[0]


@custom_op("klora::lora_linear", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and what the backward wants: x A^T, and the adapters that had to be rounded (else empty)."""
    adapters, packed = _adapters(x, weight, lora_a, lora_b, slots)
    made = launch_forward(aligned(x), aligned(weight), adapters, [weight.size(0)])
    return *made.outs, made.xa, *packed


@_op.register_fake
def _(x, weight, lora_a, lora_b, slots, grad_a, grad_b):
    return x.new_empty(*x.shape[:2], weight.size(0)), fake_xa(x, lora_a), *fake_packed(x, weight, lora_a)


def _adapters(x, weight, lora_a, lora_b, slots) -> tuple[Adapters, tuple[Tensor, Tensor]]:
    return adapters_and_packed(x, lora_a, lora_b, slots, [weight.size(0)])


def fake_xa(x: Tensor, lora_a: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], padded_rank(lora_a.size(1)))


@custom_op("klora::lora_linear_backward_", mutates_args=("da", "db"))
def backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    xa: Tensor,
    slots: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    rank: int,
    is_packed: bool,
    needs_dx: bool,
) -> Tensor:
    """dx, empty where it is not needed; dA and dB, where they are wanted, go to the rows that `slots` name."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    launch((dy,), x, weight, a, b, xa, rank, slots, dx, da, db, is_packed)
    return x.new_empty(0) if dx is None else dx


@backward_op.register_fake
def _(dy, x, weight, a, b, xa, slots, da, db, rank, is_packed, needs_dx):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)


def fresh_gradients(x: Tensor, lora_a: Tensor, lora_b: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
    """Memory for dA and dB: of zeros where a slot may be named by no document."""
    fresh = torch.empty_like if slots is None and x.numel() else torch.zeros_like
    da, db = (fresh(lora, memory_format=torch.contiguous_format) for lora in (lora_a, lora_b))
    return da, db


def _setup(ctx, inputs, output):
    x, weight, lora_a, lora_b, slots, *ctx.grads = inputs
    _, xa, *packed = output
    ctx.is_packed = lora_a.dtype != x.dtype
    ctx.save_for_backward(x, weight, lora_a, lora_b, slots, xa, *packed)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    x, weight, lora_a, lora_b, slots, xa, *packed = ctx.saved_tensors
    if dy is None:
        return (None,) * 7
    needs_dx, needs_dweight, needs_a, needs_b = ctx.needs_input_grad[:4]
    da, db = ctx.grads
    into_pool = da is not None
    if not into_pool and (needs_a or needs_b):
        da, db = fresh_gradients(x, lora_a, lora_b, slots)
    dx = None
    if needs_dx or da is not None:
        read = packed if ctx.is_packed else (lora_a, lora_b)
        dx = backward_op(dy, x, weight, *read, xa, slots, da, db, lora_b.size(2), ctx.is_packed, needs_dx)
    return (
        dx if needs_dx else None,
        linear_dweight(dy, x) if needs_dweight else None,
        da if needs_a and not into_pool else None,
        db if needs_b and not into_pool else None,
        *(None,) * 3,
    )


_op.register_autograd(_backward, setup_context=_setup)
