"""MLPs: squared-ReLU, out = W2 relu(W1 x)^2, and SwiGLU, out = W2 (silu(Wg x) * Wu x).

    u = W1 x;   a = relu(u)^2;   out = W2 a
    da = W2^T dout;   du = 2 relu(u) * da;   dx = W1^T du;   dW2 = dout a^T;   dW1 = du x^T

x [..., D], up (W1) [hidden, D], down (W2) [D, hidden] -> [..., D], all of one dtype: bf16, fp16 or fp32. 4 * D * hidden
FLOPs a row forward, as many for dx, as many again for the weights' gradients.

Four launches, the products of `linear`, with its promise: a row's bits do not depend on the rows beside it. relu(u)^2
is the epilogue of u's tiles and du that of da's, in fp32 and before anything is rounded. Neither u nor da is stored. Of
tensors [..., hidden], a is written once and read twice, du written and read once. The weights' gradients are cuBLAS's.

The backward needs relu(u) = sqrt(a). a comes from u before it is rounded, so the root halves the one rounding that a
has: du is more exact than from a rounded u. Only fp16, whose a would lose every u below 2^-12, keeps u beside a. With
frozen weights nothing else is kept.

SwiGLU, with g = Wg x, u = Wu x and a = silu(g) u, has one product more each way, and the same promise:

    da = W2^T dout;   dg, du of :mod:`klora.kernels.swiglu`;   dx = Wg^T dg + Wu^T du
    dWg = dg x^T;   dWu = du x^T;   dW2 = dout a^T

a is the epilogue of u's tiles, which read g's, and dg and du that of da's; dx's second product adds the first. Of
tensors [..., hidden], g, u and a are written once and g and a read once forward (without gradients u is not written);
g and u are read, dg and du written and read once backward. da is not stored, and of the forward g and u are kept: a is
made again where W2 gets a gradient. 6 * D * hidden FLOPs a row forward, as many for dx and for the weights' gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import custom_op, dtypes_of, empty_aligned, empty_as, expect, resolve_backend
from .linear.op import linear_dweight, linear_dx
from .linear.product import ADD, GATE, GATE_SLOPE, SLOPE, SQUARE, launch_product
from .swiglu import swiglu, swiglu_ref


def relu_squared_mlp_ref(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`x` [..., D] -> W2 relu(W1 x)^2 [..., D], products accumulated in fp32 by the GEMM.

    `up` (W1) is [hidden, D], `down` (W2) [D, hidden]; all of one float dtype. Autograd gives all gradients.

    Example: out = relu_squared_mlp_ref(x, up, down)
    """
    return F.linear(relu_squared_ref(F.linear(x, up)), down)


def relu_squared_ref(u: Tensor) -> Tensor:
    """relu(u)^2 for `u` of any shape and float dtype, with a gradient.

    Example: a = relu_squared_ref(x)
    """
    return F.relu(u).square()


@custom_op("klora::relu_squared_mlp", mutates_args=())
def _op(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, a [..., hidden], and in fp16 u [..., hidden], else nothing."""
    u = empty_aligned(x, x.shape[:-1].numel(), up.size(0)) if x.dtype == torch.float16 else None
    a = launch_product(x, up, epilogue=SQUARE, kept=u)
    return launch_product(a, down), a, x.new_empty(0) if u is None else u.contiguous().view(a.shape)


@_op.register_fake
def _(x, up, down):
    a = x.new_empty(*x.shape[:-1], up.size(0))
    return x.new_empty(x.shape), a, x.new_empty(a.shape if x.dtype == torch.float16 else 0)


@custom_op("klora::relu_squared_mlp_du_", mutates_args=("du",))
def _du_op(dout: Tensor, kept: Tensor, down: Tensor, du: Tensor) -> None:
    launch_product(dout, down, transposed=True, epilogue=SLOPE, kept=kept, result=du)


def mlp_du(dout: Tensor, kept: Tensor, down: Tensor) -> Tensor:
    """du [..., hidden] of dout [..., D] and `kept` [..., hidden]: u in fp16, else a."""
    du = empty_as(kept)
    _du_op(dout, kept, down, du)
    return du


def _setup(ctx, inputs, output):
    (x, up, down), (_, a, u) = inputs, output
    needs_x, needs_up, needs_down = ctx.needs_input_grad[:3]
    kept = u if x.dtype == torch.float16 else a
    ctx.save_for_backward(
        x if needs_up else None, up, down, kept if needs_x or needs_up else None, a if needs_down else None
    )
    ctx.mark_non_differentiable(a, u)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    x, up, down, kept, a = ctx.saved_tensors
    if dout is None:
        return None, None, None
    du = None if kept is None else mlp_du(dout, kept, down)
    dx = linear_dx(du, up) if ctx.needs_input_grad[0] else None
    return dx, None if x is None else linear_dweight(du, x), None if a is None else linear_dweight(dout, a)


_op.register_autograd(_backward, setup_context=_setup)


def relu_squared_mlp(x: Tensor, up: Tensor, down: Tensor, *, backend: str | None = None) -> Tensor:
    """`x` [..., D] -> W2 relu(W1 x)^2 [..., D]; `up` (W1) is [hidden, D] and `down` (W2) [D, hidden], all of one dtype.

    x, up and down get gradients.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernels take
    bfloat16, float16 or float32. They copy operands whose rows are not at multiples of 16 bytes.
    ValueError: other shapes, dtypes or backends, operands of several dtypes or devices.

    Example: out = relu_squared_mlp(x, up, down)
    """
    backend = resolve_backend(backend, x)
    expect("x", x, ("...", "D"), dtypes_of(backend))
    expect("up", up, ("hidden", x.size(-1)), (x.dtype,), x.device)
    expect("down", down, (x.size(-1), up.size(0)), (x.dtype,), x.device)
    return relu_squared_mlp_ref(x, up, down) if backend == "reference" else _op(x, up, down)[0]


def swiglu_mlp_ref(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`x` [..., D] -> W2 (silu(Wg x) * Wu x) [..., D], products accumulated in fp32 by the GEMM.

    `gate` (Wg) and `up` (Wu) are [hidden, D], `down` (W2) [D, hidden]; all of one float dtype. Autograd gives all
    gradients.

    Example: out = swiglu_mlp_ref(x, up, up, down)
    """
    return F.linear(swiglu_ref(F.linear(x, gate), F.linear(x, up)), down)


@custom_op("klora::swiglu_mlp", mutates_args=())
def _swiglu_op(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, and with `keep` g and u [..., hidden], else nothing."""
    g = launch_product(x, gate)
    u = empty_aligned(x, x.shape[:-1].numel(), up.size(0)) if keep else None
    if keep and not x.numel():
        u.zero_()
    a = launch_product(x, up, epilogue=GATE, kept=u, gate=g)
    out = launch_product(a, down)
    return (out, g, u.contiguous().view(g.shape)) if keep else (out, x.new_empty(0), x.new_empty(0))


@_swiglu_op.register_fake
def _(x, gate, up, down, keep):
    size = (*x.shape[:-1], up.size(0)) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(size), x.new_empty(size)


@custom_op("klora::swiglu_mlp_dgate_dup_", mutates_args=("dg", "du"))
def swiglu_slopes_(dout: Tensor, g: Tensor, u: Tensor, down: Tensor, dg: Tensor, du: Tensor) -> None:
    """dg [..., hidden] and `du` [rows, hidden], its rows at multiples of 16 bytes."""
    if not dout.numel():
        du.zero_()
    launch_product(dout, down, transposed=True, epilogue=GATE_SLOPE, kept=u, gate=g, result=dg, dup=du)


@custom_op("klora::swiglu_mlp_dx_", mutates_args=("dx",))
def swiglu_dx_(dg: Tensor, du: Tensor, gate: Tensor, up: Tensor, dx: Tensor) -> None:
    """dx [..., D] of dg and du, by both weights."""
    launch_product(dg, gate, transposed=True, result=dx)
    launch_product(du, up, transposed=True, epilogue=ADD, kept=dx, result=dx)


def _swiglu_setup(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _swiglu_backward(ctx, dout, *_):
    x, gate, up, down, g, u = ctx.saved_tensors
    if dout is None:
        return (None,) * 5
    needs_x, needs_gate, needs_up, needs_down, _ = ctx.needs_input_grad
    dx = dgate = dup = None
    if needs_x or needs_gate or needs_up:
        dg, du = empty_as(g), empty_aligned(g, g.shape[:-1].numel(), g.size(-1))
        swiglu_slopes_(dout, g, u, down, dg, du)
        if needs_x:
            dx = empty_as(x)
            swiglu_dx_(dg, du, gate, up, dx)
        dgate = linear_dweight(dg, x) if needs_gate else None
        dup = linear_dweight(du, x) if needs_up else None
    ddown = linear_dweight(dout, swiglu(g, u, backend="triton")) if needs_down else None
    return dx, dgate, dup, ddown, None


_swiglu_op.register_autograd(_swiglu_backward, setup_context=_swiglu_setup)


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, backend: str | None = None) -> Tensor:
    """`x` [..., D] -> W2 (silu(Wg x) * Wu x) [..., D], the MLP of Llama, Mistral, Qwen and Gemma's kin with SiLU.

    `gate` (Wg) and `up` (Wu) are [hidden, D], `down` (W2) [D, hidden], all of one dtype, as nn.Linear stores them. x
    and the weights get gradients.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernels take
    bfloat16, float16 or float32. They copy operands whose rows are not at multiples of 16 bytes.
    ValueError: other shapes, dtypes or backends, operands of several dtypes or devices.

    Example: out = swiglu_mlp(x, up, up, down)
    """
    backend = resolve_backend(backend, x)
    expect("x", x, ("...", "D"), dtypes_of(backend))
    expect("gate", gate, ("hidden", x.size(-1)), (x.dtype,), x.device)
    expect("up", up, gate.shape, (x.dtype,), x.device)
    expect("down", down, (x.size(-1), up.size(0)), (x.dtype,), x.device)
    if backend == "reference":
        return swiglu_mlp_ref(x, gate, up, down)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate, up, down))
    return _swiglu_op(x, gate, up, down, keep)[0]
