"""Squared-ReLU MLP: out = W2 relu(W1 x)^2.

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
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import custom_op, empty_aligned
from .linear.op import linear_dweight, linear_dx, runs_kernel
from .linear.product import SLOPE, SQUARE, launch_product


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


@dataclass(frozen=True)
class ReluSquaredConfig:
    block: int
    num_warps: int


def pick_config() -> ReluSquaredConfig:
    """The launch for every size: two loads of 16 bytes a lane and tensor, in 16-bit dtypes."""
    return ReluSquaredConfig(block=2048, num_warps=4)


@triton.jit
def _forward(u_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    # Not max(u, 0): a NaN stays one.
    u = tl.where(u <= 0.0, 0.0, u)
    tl.store(out_ptr + offsets, (u * u).to(out_ptr.dtype.element_ty), mask=offsets < size)


@triton.jit
def _backward(dout_ptr, u_ptr, du_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    du = tl.where(u <= 0.0, 0.0, 2.0 * u * dout)
    tl.store(du_ptr + offsets, du.to(du_ptr.dtype.element_ty), mask=offsets < size)


def _launch(kernel, *tensors: Tensor) -> None:
    size, config = tensors[0].numel(), pick_config()
    if size:
        kernel[(triton.cdiv(size, config.block),)](*tensors, size, BLOCK=config.block, num_warps=config.num_warps)


@custom_op("klora::relu_squared", mutates_args=())
def _relu_squared(u: Tensor) -> Tensor:
    out = u.new_empty(u.shape)
    _launch(_forward, u.contiguous(), out)
    return out


@_relu_squared.register_fake
def _(u):
    return u.new_empty(u.shape)


@custom_op("klora::relu_squared_backward", mutates_args=())
def _relu_squared_backward(dout: Tensor, u: Tensor) -> Tensor:
    du = u.new_empty(u.shape)
    _launch(_backward, dout.contiguous(), u.contiguous(), du)
    return du


@_relu_squared_backward.register_fake
def _(dout, u):
    return u.new_empty(u.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_relu_squared.register_autograd(
    lambda ctx, dout: _relu_squared_backward(dout, *ctx.saved_tensors), setup_context=_setup_context
)


def relu_squared(u: Tensor, *, backend: str | None = None) -> Tensor:
    """relu(u)^2 for `u` of any shape, in its dtype, with a gradient. The kernel takes bfloat16, float16 or float32.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: another dtype or backend.

    Example: a = relu_squared(x)
    """
    return _relu_squared(u) if runs_kernel(backend, u=u) else relu_squared_ref(u)


@custom_op("klora::relu_squared_mlp", mutates_args=())
def _mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, a [..., hidden], and in fp16 u [..., hidden], else nothing."""
    u = empty_aligned(x, x.shape[:-1].numel(), up.size(0)) if x.dtype == torch.float16 else None
    a = launch_product(x, up, epilogue=SQUARE, kept=u)
    return launch_product(a, down), a, x.new_empty(0) if u is None else u.contiguous().view(a.shape)


@_mlp.register_fake
def _(x, up, down):
    a = x.new_empty(*x.shape[:-1], up.size(0))
    return x.new_empty(x.shape), a, x.new_empty(a.shape if x.dtype == torch.float16 else 0)


@custom_op("klora::relu_squared_mlp_du", mutates_args=())
def _mlp_du(dout: Tensor, kept: Tensor, down: Tensor) -> Tensor:
    """du [..., hidden] of dout [..., D] and `kept` [..., hidden]: u in fp16, else a."""
    return launch_product(dout, down, transposed=True, epilogue=SLOPE, kept=kept)


@_mlp_du.register_fake
def _(dout, kept, down):
    return dout.new_empty(kept.shape)


def _setup_mlp(ctx, inputs, output):
    (x, up, down), (_, a, u) = inputs, output
    needs_x, needs_up, needs_down = ctx.needs_input_grad[:3]
    kept = u if x.dtype == torch.float16 else a
    ctx.save_for_backward(
        x if needs_up else None, up, down, kept if needs_x or needs_up else None, a if needs_down else None
    )
    ctx.mark_non_differentiable(a, u)
    ctx.set_materialize_grads(False)


def _mlp_backward(ctx, dout, *_):
    x, up, down, kept, a = ctx.saved_tensors
    if dout is None:
        return None, None, None
    du = None if kept is None else _mlp_du(dout, kept, down)
    dx = linear_dx(du, up) if ctx.needs_input_grad[0] else None
    return dx, None if x is None else linear_dweight(du, x), None if a is None else linear_dweight(dout, a)


_mlp.register_autograd(_mlp_backward, setup_context=_setup_mlp)


def relu_squared_mlp(x: Tensor, up: Tensor, down: Tensor, *, backend: str | None = None) -> Tensor:
    """`x` [..., D] -> W2 relu(W1 x)^2 [..., D]; `up` (W1) is [hidden, D] and `down` (W2) [D, hidden], all of one dtype.

    x, up and down get gradients.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernels take
    bfloat16, float16 or float32. They copy operands whose rows are not at multiples of 16 bytes.
    ValueError: other shapes, dtypes or backends, operands of several dtypes or devices.

    Example: out = relu_squared_mlp(x, up, down)
    """
    width = x.size(-1) if x.dim() else 0
    if not x.dim() or up.dim() != 2 or up.size(1) != width or list(down.shape) != [width, up.size(0)]:
        raise ValueError(
            f"up is {list(up.shape)} and down {list(down.shape)}; wanted, for x {list(x.shape)}: [hidden, {width}] and "
            f"[{width}, hidden]"
        )
    if runs_kernel(backend, x=x, up=up, down=down):
        return _mlp(x, up, down)[0]
    return relu_squared_mlp_ref(x, up, down)
