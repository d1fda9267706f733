"""All of a block that follows its attention, up to the stream with both branches: projection, norm and MLP.

    y = x + Wo mixed;   n = y / rms(y);   u = W1 n;   a = relu(u)^2;   z = y + W2 a

    da = W2^T dz;   du = 2 relu(u) * da;   dn = W1^T du;   dx = dz + (dn - n mean(dn n)) / rms(y);   dmixed = Wo^T dx
    dW2 = dz a^T;   dW1 = du n^T;   dWo = dx mixed^T

mixed [..., Nq], x [..., D], out (Wo) [D, Nq], up (W1) [hidden, D], down (W2) [D, hidden] -> z [..., D], all of one
dtype: bf16, fp16 or fp32. Sums are fp32 and rounded once. FLOPs are those of `linear` and `relu_squared_mlp`.

Three launches each way, the products of `linear`, with its promise: a row's bits do not depend on the rows beside it.
There is no pass over the stream (:class:`linear.product.RowNorm`). The first product adds x and leaves sums of squares;
the second is by y, and its rows are divided by rms(y); the third adds y. n is not stored. Of tensors [..., D] the
stream takes two reads forward; `residual_norm` and the sum behind the MLP take four reads and three writes, and the
branches are written. Backward, mean(dn n) is mean(du u) hidden / D, which is known before dn: the product that makes dn
ends in dx. It reads y and dz, where `residual_norm` reads dn, n and dz and dn is written. du leaves divided by rms(y),
as dx and dW1 = (du / rms(y)) y^T want it.

Kept for the backward: mixed (for dWo), y, 1 / rms in fp32, a; in fp16 u for a, and a for dW2 alone.
"""

import torch
from torch import Tensor

from .dispatch import custom_op, dtypes_of, empty_aligned, empty_grad, expect, resolve_backend
from .linear import linear_ref
from .linear.op import linear_dweight
from .linear.product import NORM_GRADIENT, RESIDUAL, SLOPE, SQUARE, RowNorm, launch_product
from .mlp import relu_squared_mlp_ref
from .rms_norm import rms_norm_ref


def residual_mlp_ref(mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """z [..., D]: the parts one after the other. Arguments as of :func:`residual_mlp`.

    `mixed` [..., Nq], `x` [..., D], `out` (Wo) [D, Nq], `up` (W1) [hidden, D], `down` (W2) [D, hidden]; all of one
    float dtype. Autograd gives all gradients.

    Example: z = residual_mlp_ref(x, x, down @ up, up, down)
    """
    y = x + linear_ref(mixed, out)
    return y + relu_squared_mlp_ref(rms_norm_ref(y), up, down)


@custom_op("klora::residual_mlp", mutates_args=())
def _op(
    mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z, y, 1 / rms [rows], a [..., hidden], and in fp16 u [..., hidden], else nothing."""
    rows, (hidden, width) = x.shape[:-1].numel(), up.shape
    u = empty_aligned(x, rows, hidden) if x.dtype == torch.float16 else None
    norm = RowNorm.of(width, x.new_empty(rows, dtype=torch.float32), x)
    y = launch_product(mixed, out, epilogue=RESIDUAL, kept=x, norm=norm)
    a = launch_product(y, up, epilogue=SQUARE, kept=u, norm=norm)
    z = launch_product(a, down, epilogue=RESIDUAL, kept=y)
    return z, y, norm.rstd, a, x.new_empty(0) if u is None else u.contiguous().view(a.shape)


@_op.register_fake
def _(mixed, x, out, up, down):
    a = x.new_empty(*x.shape[:-1], up.size(0))
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    u = x.new_empty(a.shape if x.dtype == torch.float16 else 0)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd, a, u


@custom_op("klora::residual_mlp_backward_", mutates_args=("du", "dx", "dmixed"))
def _backward_op(
    dz: Tensor,
    y: Tensor,
    rstd: Tensor,
    kept: Tensor,
    out: Tensor,
    up: Tensor,
    down: Tensor,
    du: Tensor,
    dx: Tensor,
    dmixed: Tensor | None,
) -> None:
    """Writes du / rms, dx and dmixed. `kept` is u in fp16, else a."""
    norm = RowNorm.of(up.size(0), rstd, y)
    launch_product(dz, down, transposed=True, epilogue=SLOPE, kept=kept, norm=norm, result=du)
    launch_product(du, up, transposed=True, epilogue=NORM_GRADIENT, kept=y, direct=dz, norm=norm, result=dx)
    if dmixed is not None:
        launch_product(dx, out, transposed=True, result=dmixed)


def _setup(ctx, inputs, output):
    (mixed, _, out, up, down), (_, y, rstd, a, u) = inputs, output
    _, _, needs_out, _, needs_down = ctx.needs_input_grad[:5]
    kept = u if y.dtype == torch.float16 else a
    ctx.save_for_backward(mixed if needs_out else None, out, up, down, y, rstd, kept, a if needs_down else None)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dz, *_):
    mixed, out, up, down, y, rstd, kept, a = ctx.saved_tensors
    if dz is None:
        return (None,) * 5
    needs_mixed, needs_x, needs_out, needs_up, needs_down = ctx.needs_input_grad[:5]
    du, dx = empty_grad(kept), empty_grad(y)
    dmixed = y.new_empty(*y.shape[:-1], out.size(1)) if needs_mixed else None
    if needs_mixed or needs_x or needs_out or needs_up:
        _backward_op(dz, y, rstd, kept, out, up, down, du, dx, dmixed)
    return (
        dmixed,
        dx if needs_x else None,
        linear_dweight(dx, mixed) if needs_out else None,
        linear_dweight(du, y) if needs_up else None,
        linear_dweight(dz, a) if needs_down else None,
    )


_op.register_autograd(_backward, setup_context=_setup)


def residual_mlp(
    mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor, *, backend: str | None = None
) -> Tensor:
    """z [..., D] = y + W2 relu(W1 y / rms(y))^2 of y = `x` + Wo `mixed`.

    `mixed` [..., Nq] and `x` [..., D] with the same leading dimensions; `out` (Wo) [D, Nq], `up` (W1) [hidden, D] and
    `down` (W2) [D, hidden], all of one dtype. All get gradients. The EPS of rms_norm is added to the mean square.
    A forward costs its three products, 2 rows (Nq + 2 hidden) D FLOPs, and a backward as many again for dx and dmixed,
    with as many for the weights that require gradients. mixed, y [..., D], a [..., hidden] and 4 bytes a row are kept.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernels take
    bfloat16, float16 or float32. They copy operands whose rows are not at multiples of 16 bytes.
    ValueError: other shapes, dtypes or backends, operands of several dtypes or devices.

    Example: z = residual_mlp(x, x, down @ up, up, down)
    """
    backend = resolve_backend(backend, x)
    expect("x", x, ("...", "D"), dtypes_of(backend))
    expect("out", out, (x.size(-1), "Nq"), (x.dtype,), x.device)
    expect("mixed", mixed, (*x.shape[:-1], out.size(1)), (x.dtype,), x.device)
    expect("up", up, ("hidden", x.size(-1)), (x.dtype,), x.device)
    expect("down", down, (x.size(-1), up.size(0)), (x.dtype,), x.device)
    if backend == "reference" or not (out.numel() and up.numel()):  # a product over nothing has no launch to end
        return residual_mlp_ref(mixed, x, out, up, down)
    return _op(mixed, x, out, up, down)[0]
