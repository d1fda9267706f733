"""Squared-ReLU MLP: out = W2 relu(W1 x)^2.

    u = W1 x;   a = relu(u)^2;   out = W2 a
    da = W2^T dout;   du = 2 relu(u) * da;   dx = W1^T du;   dW2 = dout a^T;   dW1 = du x^T

x [..., D], up (W1) [hidden, D], down (W2) [D, hidden] -> [..., D], all of one dtype: bf16, fp16 or fp32. 4 * D * hidden
FLOPs a row forward, as many for dx, as many again for the weights' gradients. The products are cuBLAS's, accumulated in
fp32; relu(u)^2 and its gradient are one launch each, computed in fp32 and rounded once.

Bytes of the two launches, in items of the dtype: forward 2 * hidden a row (reads u, writes a), backward 3 * hidden
(reads u and da, writes du). u is kept for the backward, not a: sqrt(a) would bring the rounding of a into du, and in
fp16 lose every u below 2^-12. With frozen weights nothing else is kept and dx alone is computed; a trained W2 keeps a,
too, which is written anyway.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def relu_squared_mlp_ref(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W2 relu(W1 x)^2, products accumulated in fp32 by the GEMM."""
    return F.linear(relu_squared_ref(F.linear(x, up)), down)


def relu_squared_ref(u: Tensor) -> Tensor:
    """relu(u)^2."""
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
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    # Not max(u, 0): a NaN stays one.
    u = tl.where(u <= 0.0, 0.0, u)
    tl.store(out_ptr + at, (u * u).to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _backward(dout_ptr, u_ptr, du_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    du = tl.where(u <= 0.0, 0.0, 2.0 * u * dout)
    tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=at < size)


def _launch(kernel, *tensors: Tensor) -> None:
    size, config = tensors[0].numel(), pick_config()
    if size:
        kernel[(triton.cdiv(size, config.block),)](*tensors, size, BLOCK=config.block, num_warps=config.num_warps)


@torch.library.custom_op("klora::relu_squared", mutates_args=())
def _relu_squared(u: Tensor) -> Tensor:
    out = u.new_empty(u.shape)
    _launch(_forward, u.contiguous(), out)
    return out


@_relu_squared.register_fake
def _(u):
    return u.new_empty(u.shape)


@torch.library.custom_op("klora::relu_squared_backward", mutates_args=())
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
    """relu(u)^2 of any shape, in u's dtype."""
    if backend not in (None, "reference", "triton"):
        raise ValueError(f"backend is {backend!r}; allowed: None, 'reference', 'triton'")
    if backend == "reference" or (backend is None and u.device.type == "cpu"):
        return relu_squared_ref(u)
    if u.dtype not in DTYPES:
        raise ValueError(f"u is {u.dtype}; the kernel wants bfloat16, float16 or float32")
    return _relu_squared(u)


def relu_squared_mlp(x: Tensor, up: Tensor, down: Tensor, *, backend: str | None = None) -> Tensor:
    """x [..., D] -> W2 relu(W1 x)^2 [..., D]; gradients of what requires one."""
    width = x.size(-1) if x.dim() else 0
    if up.dim() != 2 or up.size(1) != width or list(down.shape) != [width, up.size(0)]:
        raise ValueError(
            f"up is {list(up.shape)} and down {list(down.shape)}; wanted, for x {list(x.shape)}: [hidden, {width}] and "
            f"[{width}, hidden]"
        )
    if not x.dtype == up.dtype == down.dtype:
        raise ValueError(f"x is {x.dtype}, up {up.dtype} and down {down.dtype}; all must have one dtype")
    return F.linear(relu_squared(F.linear(x, up), backend=backend), down)
