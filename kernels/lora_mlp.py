"""Squared-ReLU MLP with a LoRA adapter a document on either matrix, or on both: out = W2 relu(W1 x)^2, adapted.

    u = x W1^T + (x A1^T) B1^T;   a = relu(u)^2;   out = a W2^T + (a A2^T) B2^T
    t2 = dout B2;   du = 2 relu(u) * (dout W2 + t2 A2);   t1 = du B1;   dx = du W1 + t1 A1
    dA2 = t2^T a;   dB2 = dout^T (a A2^T);   dA1 = t1^T x;   dB1 = du^T (x A1^T);   dW2 = dout^T a;   dW1 = du^T x

x [B, S, D]; up (W1) [hidden, D], down (W2) [D, hidden]; up_a [slots, R1, D], up_b [slots, hidden, R1]; down_a [slots,
R2, hidden], down_b [slots, D, R2]. The ranks are independent. A matrix without an adapter is a product of `linear`; one
with an adapter is one of `lora_linear`. relu(u)^2 and the slope belong to their launches as in `relu_squared_mlp`: of
tensors [.., hidden] a is written once, du written and read as often as dout. Neither u nor the gradient of a is stored,
but u in fp16, whose a would lose every u below 2^-12.

Every sum is made in a fixed order: the same bits in every run and in every batch. D and hidden are
multiples of 16, ranks up to 128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import custom_op, dtypes_of, expect, expect_slots, resolve_backend
from .linear.op import linear_dweight, linear_dx
from .linear.product import SQUARE, launch_product
from .lora_linear import lora_linear_ref
from .lora_qkv.forward import empty_projected, launch_forward, not_projected
from .lora_qkv.op import Lora, Saved, gradients
from .lora_qkv.validate import expect_product
from .mlp import mlp_du, relu_squared_ref


def lora_mlp_ref(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_a: Tensor | None = None,
    up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """out [B, S, D] of `x` [B, S, D] by `up` [hidden, D] and `down` [D, hidden], all of one float dtype.

    `up_a`, `up_b`, `down_a`, `down_b` and `slots` are as of :func:`lora_linear_ref`; None is no adapter on that matrix.
    Autograd gives all gradients.

    Example: out = lora_mlp_ref(x, up, down, up_a, up_b, down_a, down_b, slots)
    """
    u = F.linear(x, up) if up_a is None else lora_linear_ref(x, up, up_a, up_b, slots)
    a = relu_squared_ref(u)
    return F.linear(a, down) if down_a is None else lora_linear_ref(a, down, down_a, down_b, slots)


@custom_op("klora::lora_mlp", mutates_args=())
def _op(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    slots: Tensor | None,
    up_grad_a: Tensor | None,
    up_grad_b: Tensor | None,
    down_grad_a: Tensor | None,
    down_grad_b: Tensor | None,
) -> list[Tensor]:
    """out, a [B, S, hidden], in fp16 u, and of both matrices x A^T and the adapters that had to be rounded. What is not
    there is empty.
    """
    u = x.new_empty(*x.shape[:2], up.size(0)) if x.dtype == torch.float16 else None
    a, *kept_up = _product(x, up, up_a, up_b, slots, squared=True, u=u)
    out, *kept_down = _product(a, down, down_a, down_b, slots)
    return [out, a, x.new_empty(0) if u is None else u, *kept_up, *kept_down]


@_op.register_fake
def _(x, up, down, up_a, up_b, down_a, down_b, slots, up_grad_a, up_grad_b, down_grad_a, down_grad_b):
    a = x.new_empty(*x.shape[:2], up.size(0))
    u = x.new_empty(a.shape if x.dtype == torch.float16 else 0)
    kept = []
    for inputs, weight, lora_a, lora_b in ((x, up, up_a, up_b), (a, down, down_a, down_b)):
        is_adapted, sizes = lora_a is not None, [weight.size(0)]
        kept += empty_projected(inputs, lora_a, lora_b, sizes).flat()[1:] if is_adapted else not_projected(x)
    return [x.new_empty(x.shape), a, u, *kept]


def _product(x, weight, lora_a, lora_b, slots, squared=False, u=None) -> tuple[Tensor, ...]:
    """The product (squared: relu(u)^2 of it, and u), x A^T and the packed adapters."""
    if lora_a is not None:
        return launch_forward(x, weight, lora_a, lora_b, slots, [weight.size(0)], squared=squared, u=u).flat()
    rows = None if u is None else u.view(-1, u.size(2))
    out = launch_product(x, weight, **({"epilogue": SQUARE, "kept": rows} if squared else {}))
    return out, *not_projected(x)


def _setup(ctx, inputs, output):
    x, up, down, up_a, up_b, down_a, down_b, slots, *grads = inputs
    _, a, u, *made = output
    of_up = Saved.of(x, up, up_a, up_b, slots, *made[:3])
    ctx.save_for_backward(*of_up, *Saved.of(a, down, down_a, down_b, slots, *made[3:]), u)
    ctx.up = None if up_a is None else Lora.of(up_a, up_b, *grads[:2])
    ctx.down = None if down_a is None else Lora.of(down_a, down_b, *grads[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, douts):
    dout, needs = douts[0], ctx.needs_input_grad
    if dout is None:
        return (None,) * 12
    of_up, others = Saved.split(ctx.saved_tensors)
    of_down, (u,) = Saved.split(others)
    is_pooled = ctx.up is not None and ctx.up.grad_a is not None
    needs_du = any(needs[i] for i in (0, 1, 3, 4)) or is_pooled
    kept = u if u.numel() else of_down.x
    du, ddown, *ddown_lora = _matrix_gradients(of_down, ctx.down, (needs_du, needs[2], *needs[5:7]), dout, kept)
    dx, dup, *dup_lora = _matrix_gradients(of_up, ctx.up, (*needs[:2], *needs[3:5]), du)
    return dx, dup, ddown, *dup_lora, *ddown_lora, *(None,) * 5


def _matrix_gradients(saved, lora, needs, dout, kept=None) -> tuple[Tensor | None, ...]:
    """Of the inputs of one matrix (`kept`: of u, whose relu(u)^2 they are), the matrix, A and B."""
    if lora is not None:
        return gradients(saved, lora, needs, [dout], kept)
    dx = None
    if needs[0]:
        dx = linear_dx(dout, saved.weight) if kept is None else mlp_du(dout, kept, saved.weight)
    return dx, linear_dweight(dout, saved.x) if needs[1] else None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def lora_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_a: Tensor | None = None,
    up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    up_grads: tuple[Tensor, Tensor] | None = None,
    down_grads: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """out [B, S, D] of `x` [B, S, D]: W2 relu(W1 x)^2 with `up` (W1) [hidden, D] and `down` (W2) [D, hidden], adapted.

    `up_a` [slots, R1, D] and `up_b` [slots, hidden, R1] are the adapters of up, `down_a` [slots, R2, hidden] and
    `down_b` [slots, D, R2] those of down; None is none on that matrix. Adapters, `slots`, and `up_grads` and
    `down_grads`, where the backward writes dA and dB, are as of :func:`lora_linear`. All inputs get gradients.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, ranks up to 128, and D and hidden that are multiples of 16.
    ValueError: other shapes, dtypes, ranks or backends, tensors on several devices, half an adapter, gradients of an
    adapter that is not there, or with the reference.

    Example: out = lora_mlp(x, up, down, up_a, up_b, down_a, down_b, slots)
    """
    backend = resolve_backend(backend, x)
    expect("x", x, ("B", "S", "D"), dtypes_of(backend))
    width = x.size(2)
    expect("up", up, ("hidden", width), (x.dtype,), x.device)
    expect("down", down, (width, up.size(0)), (x.dtype,), x.device)
    for name, weight, a, b, grads in (("up", up, up_a, up_b, up_grads), ("down", down, down_a, down_b, down_grads)):
        if (a is None) != (b is None) or (a is None and grads is not None):
            raise ValueError(f"{name}_a, {name}_b and {name}_grads: wanted A with B, and gradients with both")
        if a is not None:
            given = {f"{name}_a": a, f"{name}_b": b}
            expect_product(name, weight, given, weight.size(1), x, slots, grads, backend)
    if up_a is None and down_a is None:
        raise ValueError("no adapter is given; relu_squared_mlp is the MLP without one")
    adapters = up_a, up_b, down_a, down_b, expect_slots(slots, x.size(0), x.device)
    if backend == "reference":
        return lora_mlp_ref(x, up, down, *adapters)
    return _op(x, up, down, *adapters, *(up_grads or (None, None)), *(down_grads or (None, None)))[0]
