"""All of a block that follows its attention, up to the sum with the MLP's branch: projection, stream, norm and MLP.

    y = x + Wo mixed;   n = y / rms(y);   u = W1 n;   a = relu(u)^2;   branch = W2 a

    da = W2^T dbranch;   du = 2 relu(u) * da;   dy' = dy + (W1^T du - n mean(dn n)) / rms(y) = dx;   dmixed = Wo^T dx
    dW2 = dbranch a^T;   dW1 = du n^T;   dWo = dx mixed^T

mixed [..., Nq], x [..., D], out (Wo) [D, Nq], up (W1) [hidden, D], down (W2) [D, hidden] -> y and branch [..., D], all
of one dtype: bf16, fp16 or fp32. Sums are fp32 and rounded once. FLOPs are those of `linear` and `relu_squared_mlp`.

Three launches each way, the products of `linear`, with its promise: a row's bits do not depend on the rows beside it.
No pass over the stream is left (:class:`linear.product.RowNorm`). The first product adds x and leaves sums of squares;
the second is by y, and its rows are divided by rms(y). n is not stored: of tensors [..., D], the forward reads x and
writes y where `residual_norm` beside the products reads two, writes two and reads n. Backward, mean(dn n) is
mean(du u) hidden / D, which is known before dn: the product that makes dn ends in dx. It reads y and dy, where
`residual_norm` reads dn, n and dy and dn is written. du leaves divided by rms(y), as dx and dW1 = (du / rms) y^T want
it.

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


def residual_mlp_ref(mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(y, branch) [..., D]: the parts one after the other. Arguments as of :func:`residual_mlp`.

    `mixed` [..., Nq], `x` [..., D], `out` (Wo) [D, Nq], `up` (W1) [hidden, D], `down` (W2) [D, hidden]; all of one
    float dtype. Autograd gives all gradients.

    Example: y, branch = residual_mlp_ref(x, x, down @ up, up, down)
    """
    y = x + linear_ref(mixed, out)
    return y, relu_squared_mlp_ref(rms_norm_ref(y), up, down)


@custom_op("klora::residual_mlp", mutates_args=())
def _op(
    mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, branch, 1 / rms [rows], a [..., hidden], and in fp16 u [..., hidden], else nothing."""
    rows, (hidden, width) = x.shape[:-1].numel(), up.shape
    u = empty_aligned(x, rows, hidden) if x.dtype == torch.float16 else None
    norm = RowNorm.of(width, x.new_empty(rows, dtype=torch.float32), x)
    y = launch_product(mixed, out, epilogue=RESIDUAL, kept=x, norm=norm)
    a = launch_product(y, up, epilogue=SQUARE, kept=u, norm=norm)
    u = x.new_empty(0) if u is None else u.contiguous().view(a.shape)
    return y, launch_product(a, down), norm.rstd, a, u


@_op.register_fake
def _(mixed, x, out, up, down):
    a = x.new_empty(*x.shape[:-1], up.size(0))
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    u = x.new_empty(a.shape if x.dtype == torch.float16 else 0)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd, a, u


@custom_op("klora::residual_mlp_backward_", mutates_args=("du", "dx", "dmixed"))
def _backward_op(
    dbranch: Tensor,
    dy: Tensor | None,
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
    launch_product(dbranch, down, transposed=True, epilogue=SLOPE, kept=kept, norm=norm, result=du)
    launch_product(du, up, transposed=True, epilogue=NORM_GRADIENT, kept=y, direct=dy, norm=norm, result=dx)
    if dmixed is not None:
        launch_product(dx, out, transposed=True, result=dmixed)


def _setup(ctx, inputs, output):
    (mixed, _, out, up, down), (y, _, rstd, a, u) = inputs, output
    _, _, needs_out, _, needs_down = ctx.needs_input_grad[:5]
    kept = u if y.dtype == torch.float16 else a
    ctx.save_for_backward(mixed if needs_out else None, out, up, down, y, rstd, kept, a if needs_down else None)
    ctx.mark_non_differentiable(rstd, a, u)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dbranch, *_):
    mixed, out, up, down, y, rstd, kept, a = ctx.saved_tensors
    needs_mixed, needs_x, needs_out, needs_up, needs_down = ctx.needs_input_grad[:5]
    if dy is None and dbranch is None:
        return (None,) * 5
    dbranch = torch.zeros_like(y) if dbranch is None else dbranch
    du, dx = empty_grad(kept), empty_grad(y)
    dmixed = y.new_empty(*y.shape[:-1], out.size(1)) if needs_mixed else None
    if needs_mixed or needs_x or needs_out or needs_up:
        _backward_op(dbranch, dy, y, rstd, kept, out, up, down, du, dx, dmixed)
    return (
        dmixed,
        dx if needs_x else None,
        linear_dweight(dx, mixed) if needs_out else None,
        linear_dweight(du, y) if needs_up else None,
        linear_dweight(dbranch, a) if needs_down else None,
    )


_op.register_autograd(_backward, setup_context=_setup)


def residual_mlp(
    mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(y, branch) [..., D]: y = `x` + Wo `mixed`, branch = W2 relu(W1 y / rms(y))^2.

    `mixed` [..., Nq] and `x` [..., D] with the same leading dimensions; `out` (Wo) [D, Nq], `up` (W1) [hidden, D] and
    `down` (W2) [D, hidden], all of one dtype. All get gradients. The backward reads y: autograd refuses it once that
    was changed in place. EPS of rms_norm is added to the mean square.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernels take
    bfloat16, float16 or float32. They copy operands whose rows are not at multiples of 16 bytes.
    ValueError: other shapes, dtypes or backends, operands of several dtypes or devices.

    Example: y, branch = residual_mlp(x, x, down @ up, up, down)
    """
    backend = resolve_backend(backend, x)
    expect("x", x, ("...", "D"), dtypes_of(backend))
    expect("out", out, (x.size(-1), "Nq"), (x.dtype,), x.device)
    expect("mixed", mixed, (*x.shape[:-1], out.size(1)), (x.dtype,), x.device)
    expect("up", up, ("hidden", x.size(-1)), (x.dtype,), x.device)
    expect("down", down, (x.size(-1), up.size(0)), (x.dtype,), x.device)
    if backend == "reference" or not (out.numel() and up.numel()):  # a product over nothing has no launch to end
        return residual_mlp_ref(mixed, x, out, up, down)
    return _op(mixed, x, out, up, down)[:2]
