"""The reference, the registered ops, their autograd, and the public function."""

import torch.nn.functional as F
from torch import Tensor

from ..dispatch import custom_op, resolve_backend
from .product import DTYPES, launch_product


def linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., K] by `weight` [N, K] -> x W^T [..., N], by PyTorch's GEMM.

    Both are of one float dtype, and both get gradients.

    Example: out = linear_ref(x, weight)
    """
    return F.linear(x, weight)


def linear(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """`x` [..., K] by `weight` [N, K] -> x W^T [..., N], all of one dtype. Both get gradients.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32. It copies operands whose rows are not at multiples of 16 bytes.
    ValueError: other shapes, dtypes or backends, operands of several dtypes or devices.

    Example: out = linear(x, weight)
    """
    if weight.dim() != 2 or not x.dim() or x.size(-1) != weight.size(1):
        raise ValueError(f"x is {list(x.shape)} and weight {list(weight.shape)}; wanted: [..., K] and [N, K]")
    return _linear(x, weight) if runs_kernel(backend, x=x, weight=weight) else linear_ref(x, weight)


@custom_op("klora::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return launch_product(x, weight)


@_linear.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.size(0))


@custom_op("klora::linear_dx", mutates_args=())
def linear_dx(dout: Tensor, weight: Tensor) -> Tensor:
    """dout [..., N] by weight [N, K] -> dout W [..., K]."""
    return launch_product(dout, weight, transposed=True)


@linear_dx.register_fake
def _(dout, weight):
    return dout.new_empty(*dout.shape[:-1], weight.size(1))


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


def runs_kernel(backend: str | None, **operands: Tensor) -> bool:
    """Whether the kernel runs, and not the reference; raises ValueError on what neither takes, or the kernel."""
    first = next(iter(operands.values()))
    backend = resolve_backend(backend, first)
    given = ", ".join(f"{name} is {tensor.dtype} on {tensor.device}" for name, tensor in operands.items())
    if len({(tensor.dtype, tensor.device) for tensor in operands.values()}) > 1:
        raise ValueError(f"{given}; all must have one dtype and one device")
    if backend == "reference":
        return False
    if first.dtype not in DTYPES:
        raise ValueError(f"{given}; the kernel wants bfloat16, float16 or float32")
    return True
