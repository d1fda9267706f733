"""The reference, the registered ops, their autograd, and the public function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import custom_op, dtypes_of, expect, resolve_backend
from .product import launch_product


def linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., K] by `weight` [N, K] -> x W^T [..., N], by PyTorch's GEMM.

    Both are of one float dtype, and both get gradients.

    Example: out = linear_ref(x, weight)
    """
    return F.linear(x, weight)


@custom_op("klora::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return launch_product(x, weight)


@_linear.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.size(0))


@custom_op("klora::linear_dx_", mutates_args=("dx",))
def _dx_op(dout: Tensor, weight: Tensor, dx: Tensor) -> None:
    launch_product(dout, weight, transposed=True, result=dx)


def linear_dx(dout: Tensor, weight: Tensor) -> Tensor:
    """dout [..., N] by weight [N, K] -> dout W [..., K]."""
    dx = dout.new_empty(*dout.shape[:-1], weight.size(1))
    _dx_op(dout, weight, dx)
    return dx


def cublas_(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Writes `rows` [M, K] by `weight` [K, N] (+ `bias` [N]) to `out` [M, N], by cuBLAS; for an op's inside.

    Autocast, which may be on around an op, does not reach a product whose output is given.
    """
    return torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias, rows, weight, out=out)


def linear_dweight(dout: Tensor, x: Tensor) -> Tensor:
    """dout [..., N], x [..., K] -> dout^T x [N, K], by cuBLAS."""
    rows = x.shape[:-1].numel()
    return dout.reshape(rows, dout.size(-1)).mT @ x.reshape(rows, x.size(-1))


def _setup_context(ctx, inputs, output):
    x, weight = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)


def _backward(ctx, dout):
    x, weight = ctx.saved_tensors
    return None if weight is None else linear_dx(dout, weight), None if x is None else linear_dweight(dout, x)


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """`x` [..., K] by `weight` [N, K] -> x W^T [..., N], all of one dtype. Both get gradients.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32. It copies operands whose rows are not at multiples of 16 bytes.
    ValueError: other shapes, dtypes or backends, operands of several dtypes or devices.

    Example: out = linear(x, weight)
    """
    backend = resolve_backend(backend, x)
    expect("x", x, ("...", "K"), dtypes_of(backend))
    expect("weight", weight, ("N", x.size(-1)), (x.dtype,), x.device)
    return linear_ref(x, weight) if backend == "reference" else _linear(x, weight)
