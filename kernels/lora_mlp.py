"""Squared-ReLU MLP with a LoRA adapter a document on either matrix, or on both: out = W2 relu(W1 x)^2, adapted.

    u = x W1^T + (x A1^T) B1^T;   a = relu(u)^2;   out = a W2^T + (a A2^T) B2^T
    t2 = dout B2;   du = 2 relu(u) * (dout W2 + t2 A2);   t1 = du B1;   dx = du W1 + t1 A1
    dA2 = t2^T a;   dB2 = dout^T (a A2^T);   dA1 = t1^T x;   dB1 = du^T (x A1^T);   dW2 = dout^T a;   dW1 = du^T x

x [B, S, D]; up (W1) [hidden, D], down (W2) [D, hidden]; up_a [slots, R1, D], up_b [slots, hidden, R1]; down_a [slots,
R2, hidden], down_b [slots, D, R2]. The ranks are independent. A matrix without an adapter is a product of `linear`; one
with an adapter is one of `lora_linear`. relu(u)^2 and the slope belong to their launches as in `relu_squared_mlp`: of
tensors [.., hidden] a is written once, du written and read as often as dout. Neither u nor the gradient of a is stored,
but u in fp16, whose a would lose every u below 2^-12.

Every sum is made by one program in a fixed order: the same bits in every run and in every batch. D and hidden are
multiples of 16, ranks up to 128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import aligned, custom_op, resolve_backend
from .linear.op import linear_dweight, linear_dx
from .linear.product import SLOPE, SQUARE, launch_product
from .lora_linear import backward_op, fake_xa, fresh_gradients, lora_linear_ref
from .lora_qkv.forward import launch_forward
from .lora_qkv.op import adapters_and_packed, fake_packed, launch
from .lora_qkv.validate import describe, validate_product
from .mlp import relu_squared_ref


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
    width, hidden = x.size(-1) if x.dim() else 0, up.size(0) if up.dim() else 0
    if x.dim() != 3 or up.dim() != 2 or up.size(1) != width or list(down.shape) != [width, hidden]:
        raise ValueError(
            f"x is {describe(x)}, up {describe(up)} and down {describe(down)}; wanted [B, S, D], [hidden, {width}] and "
            f"[{width}, hidden]"
        )
    if len({(tensor.dtype, tensor.device) for tensor in (x, up, down)}) != 1:
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (x, up, down))
        raise ValueError(f"x, up and down are {kinds}; wanted one dtype and one device")
    for name, weight, a, b, grads in (("up", up, up_a, up_b, up_grads), ("down", down, down_a, down_b, down_grads)):
        if (a is None) != (b is None) or (a is None and grads is not None):
            raise ValueError(f"{name}_a, {name}_b and {name}_grads: wanted A with B, and gradients with both")
        if a is not None:
            given = {"x": x, name: weight, f"{name}_a": a, f"{name}_b": b}
            validate_product(given, weight.size(1), slots, grads, backend)
    adapters = up_a, up_b, down_a, down_b
    if up_a is None and down_a is None:
        raise ValueError("no adapter is given; relu_squared_mlp is the MLP without one")
    if backend == "reference":
        return lora_mlp_ref(x, up, down, *adapters, slots)
    slots = None if slots is None else slots.contiguous()
    return _op(x, up, down, *adapters, slots, *(up_grads or (None, None)), *(down_grads or (None, None)))[0]


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
    kept = [
        x.new_empty(0) if lora is None else made
        for inputs, weight, lora in ((x, up, up_a), (a, down, down_a))
        for made in ((None,) * 3 if lora is None else (fake_xa(inputs, lora), *fake_packed(inputs, weight, lora)))
    ]
    return [x.new_empty(x.shape), a, u, *kept]


def _product(x, weight, lora_a, lora_b, slots, squared=False, u=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The product (squared: relu(u)^2 of it, and u), x A^T and the packed adapters."""
    if lora_a is None:
        rows = None if u is None else u.view(-1, u.size(2))
        out = launch_product(x, weight, **({"epilogue": SQUARE, "kept": rows} if squared else {}))
        return out, *(x.new_empty(0) for _ in range(3))
    adapters, packed = adapters_and_packed(x, lora_a, lora_b, slots, [weight.size(0)])
    made = launch_forward(aligned(x), aligned(weight), adapters, [weight.size(0)], squared=squared, u=u)
    return *made.outs, made.xa, *packed


@custom_op("klora::lora_mlp_du_", mutates_args=("da", "db"))
def _du_op(
    dout: Tensor,
    kept: Tensor,
    a: Tensor,
    down: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor,
    slots: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    rank: int,
    is_packed: bool,
    needs_du: bool,
) -> Tensor:
    """du [B, S, hidden] of dout [B, S, D], empty where it is not needed; dA2 and dB2 go to the rows of `da` and `db`.

    `kept` is u in fp16, else a.
    """
    if lora_a is None:
        return launch_product(dout, down, transposed=True, epilogue=SLOPE, kept=kept)
    du = a.new_empty(a.shape) if needs_du else None
    launch((dout,), a, down, lora_a, lora_b, xa, rank, slots, du, da, db, is_packed, kept if needs_du else None)
    return a.new_empty(0) if du is None else du


@_du_op.register_fake
def _(dout, kept, a, down, lora_a, lora_b, xa, slots, da, db, rank, is_packed, needs_du):
    return a.new_empty(a.shape if needs_du else 0)


def _setup(ctx, inputs, output):
    x, up, down, up_a, up_b, down_a, down_b, slots, *grads = inputs
    _, a, u, *kept = output
    ctx.up_grads, ctx.down_grads = grads[:2], grads[2:]
    ctx.save_for_backward(x, up, down, up_a, up_b, down_a, down_b, slots, a, u, *kept)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, douts):
    x, up, down, up_a, up_b, down_a, down_b, slots, a, u, *kept = ctx.saved_tensors
    dout, needs = douts[0], ctx.needs_input_grad
    if dout is None:
        return (None,) * 12
    up_grads, up_own = _where(ctx.up_grads, x, up_a, up_b, slots, needs[3] or needs[4])
    down_grads, down_own = _where(ctx.down_grads, x, down_a, down_b, slots, needs[5] or needs[6])
    needs_du = needs[0] or needs[1] or up_grads[0] is not None
    du = dx = None
    if needs_du or down_grads[0] is not None:
        read = *_read(x, down_a, down_b, *kept[3:]), slots, *down_grads
        du = _du_op(dout, u if u.numel() else a, a, down, *read, *_about(x, down_a), needs_du)
    if up_a is not None and (needs[0] or up_grads[0] is not None):
        read = *_read(x, up_a, up_b, *kept[:3]), slots, *up_grads
        dx = backward_op(du, x, up, *read, *_about(x, up_a), needs[0])
    elif needs[0]:
        dx = linear_dx(du, up)
    return (
        dx if needs[0] else None,
        linear_dweight(du, x) if needs[1] else None,
        linear_dweight(dout, a) if needs[2] else None,
        *(grad if wanted and up_own else None for grad, wanted in zip(up_grads, needs[3:5], strict=True)),
        *(grad if wanted and down_own else None for grad, wanted in zip(down_grads, needs[5:7], strict=True)),
        *(None,) * 5,
    )


def _where(grads, x, lora_a, lora_b, slots, needed: bool) -> tuple[tuple[Tensor | None, ...], bool]:
    """Where dA and dB go, and whether they are autograd's."""
    if lora_a is None or grads[0] is not None or not needed:
        return tuple(grads), False
    return fresh_gradients(x, lora_a, lora_b, slots), True


def _read(x, lora_a, lora_b, xa, packed_a, packed_b) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The adapters that the backward reads, and x A^T."""
    is_packed = lora_a is not None and lora_a.dtype != x.dtype
    return *((packed_a, packed_b) if is_packed else (lora_a, lora_b)), xa


def _about(x, lora_a) -> tuple[int, bool]:
    """rank, is_packed"""
    return (0, False) if lora_a is None else (lora_a.size(1), lora_a.dtype != x.dtype)


_op.register_autograd(_backward, setup_context=_setup)
