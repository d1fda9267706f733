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

from .dispatch import custom_op, dtypes_of, expect, resolve_backend
from .lora_qkv.forward import empty_projected, launch_forward
from .lora_qkv.op import Lora, Saved, gradients
from .lora_qkv.validate import expect_product
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
    return launch_forward(x, weight, lora_a, lora_b, slots, [weight.size(0)]).flat()


@_op.register_fake
def _(x, weight, lora_a, lora_b, slots, grad_a, grad_b):
    return empty_projected(x, lora_a, lora_b, [weight.size(0)]).flat()


def _setup(ctx, inputs, output):
    x, weight, lora_a, lora_b, slots, *grads = inputs
    ctx.save_for_backward(*Saved.of(x, weight, lora_a, lora_b, slots, *output[1:]))
    ctx.lora = Lora.of(lora_a, lora_b, *grads)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 7
    saved, _ = Saved.split(ctx.saved_tensors)
    return *gradients(saved, ctx.lora, ctx.needs_input_grad[:4], [dy]), *(None,) * 3


_op.register_autograd(_backward, setup_context=_setup)


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
    expect("x", x, ("B", "S", "K"), dtypes_of(backend))
    given = {"lora_a": lora_a, "lora_b": lora_b}
    slots = expect_product("weight", weight, given, x.size(2), x, slots, grads, backend)
    if backend == "reference":
        return lora_linear_ref(x, weight, lora_a, lora_b, slots)
    return _op(x, weight, lora_a, lora_b, slots, *(grads or (None, None)))[0]
