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

`residual_mlp_norm` goes on to what the next block reads, as `residual_norm` does:

    x_out = z + bias[slot];   x_in = mix_x (x_out + skip pushed) + mix_x0 x0;   n = x_in / rms(x_in)

The last product ends in x_in, and leaves sums of its squares; n is not stored (:class:`rms_norm.Unnormed`): attention's
product is by x_in, and divided by rms(x_in) as it ends. Of tensors [..., D] the boundary reads x0 and pushed, and
writes x_out where it is pushed or mix is trained; `residual_norm` reads z and writes n besides, and z and x_in are
written once each. Backward, `residual_norm`'s launch comes before the others. Kept: x_in, for n.
"""

import torch
from torch import Tensor

from .dispatch import custom_op, dtypes_of, empty_aligned, empty_grad, expect, refuse_in_reference, resolve_backend
from .linear import linear_ref
from .linear.op import linear_dweight
from .linear.product import (
    BOUNDARY,
    BOUNDARY_ROWS,
    NORM_GRADIENT,
    RESIDUAL,
    SLOPE,
    SQUARE,
    Boundary,
    RowNorm,
    empty_sums,
    launch_product,
)
from .mlp import relu_squared_mlp_ref
from .rms_norm import ResidualNorm, Unnormed, residual_norm_ref, rms_norm_ref
from .rms_norm.op import backward_op as boundary_backward_op
from .rms_norm.op import check_boundary, residual_norm


def residual_mlp_ref(mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """z [..., D]: the parts one after the other. Arguments as of :func:`residual_mlp`.

    `mixed` [..., Nq], `x` [..., D], `out` (Wo) [D, Nq], `up` (W1) [hidden, D], `down` (W2) [D, hidden]; all of one
    float dtype. Autograd gives all gradients.

    Example: z = residual_mlp_ref(x, x, down @ up, up, down)
    """
    y = x + linear_ref(mixed, out)
    return y + relu_squared_mlp_ref(rms_norm_ref(y), up, down)


def residual_mlp_norm_ref(
    mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor, **boundary: Tensor | bool | None
) -> ResidualNorm:
    """(x_out, x_in, n): the parts one after the other. Arguments as of :func:`residual_mlp_norm`.

    `mixed` [B, S, Nq], `x` [B, S, D], `out` (Wo) [D, Nq], `up` (W1) [hidden, D], `down` (W2) [D, hidden]; all of one
    float dtype. `boundary`: what residual_norm_ref takes beside its first three. Autograd gives all gradients.

    Example: x_out, x_in, n = residual_mlp_norm_ref(x, x, down @ up, up, down, mix=mix, x0=x0)
    """
    return residual_norm_ref(residual_mlp_ref(mixed, x, out, up, down), **boundary)


@custom_op("klora::residual_mlp", mutates_args=())
def _op(
    mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z, y, 1 / rms [rows], a [..., hidden], and in fp16 u [..., hidden], else nothing."""
    y, rstd, a, u = _launch_up(mixed, x, out, up)
    return launch_product(a, down, epilogue=RESIDUAL, kept=y), y, rstd, a, u


def _launch_up(mixed: Tensor, x: Tensor, out: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, 1 / rms, a and u, or in its place nothing."""
    rows, (hidden, width) = x.shape[:-1].numel(), up.shape
    u = empty_aligned(x, rows, hidden) if x.dtype == torch.float16 else None
    norm = RowNorm.of(width, x.new_empty(rows, dtype=torch.float32), x)
    y = launch_product(mixed, out, epilogue=RESIDUAL, kept=x, norm=norm)
    a = launch_product(y, up, epilogue=SQUARE, kept=u, norm=norm)
    return y, norm.rstd, a, x.new_empty(0) if u is None else u.contiguous().view(a.shape)


def _empty_up(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = x.new_empty(*x.shape[:-1], up.size(0))
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return x.new_empty(x.shape), rstd, a, x.new_empty(a.shape if x.dtype == torch.float16 else 0)


@_op.register_fake
def _(mixed, x, out, up, down):
    return x.new_empty(x.shape), *_empty_up(x, up)


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


def _saved(needs, inputs, made) -> tuple[Tensor | None, ...]:
    """What :func:`_gradients` reads, of the first five inputs and of what :func:`_launch_up` made."""
    (mixed, _, out, up, down), (y, rstd, a, u) = inputs, made
    kept = u if y.dtype == torch.float16 else a
    return mixed if needs[2] else None, out, up, down, y, rstd, kept, a if needs[4] else None


def _gradients(dz, needs, saved) -> tuple[Tensor | None, ...]:
    """Of the first five inputs, for which autograd `needs` them."""
    mixed, out, up, down, y, rstd, kept, a = saved
    needs_mixed, needs_x, needs_out, needs_up, needs_down = needs
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


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*_saved(ctx.needs_input_grad, inputs, output[1:]))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dz, *_):
    return (None,) * 5 if dz is None else _gradients(dz, ctx.needs_input_grad[:5], ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup)


@custom_op("klora::residual_mlp_norm", mutates_args=())
def _norm_op(
    mixed: Tensor,
    x: Tensor,
    out: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    pushed: Tensor | None,
    skip: Tensor | None,
    mix: Tensor,
    x0: Tensor,
    bias_grad: Tensor | None,
    x0_grad: Tensor | None,
    adds_x0: bool,
    stores_x_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_out or nothing, x_in, n and squares of :class:`Unnormed`, and the last four of :func:`_op`. `bias_grad`,
    `x0_grad` and `adds_x0` are only passed on to the backward.
    """
    y, rstd, a, u = _launch_up(mixed, x, out, up)
    x_out, n, squares = _empty_boundary(x, stores_x_out)
    flat = x_out.view(-1, x.size(-1)) if stores_x_out else None
    boundary = Boundary(mix, x0, pushed, skip, bias, slots, flat, x.size(1))
    x_in = launch_product(a, down, epilogue=BOUNDARY, kept=y, norm=RowNorm(None, squares), boundary=boundary)
    return x_out, x_in, n, squares, y, rstd, a, u


def _empty_boundary(x: Tensor, stores_x_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    squares = empty_sums(x.size(-1), x.shape[:-1].numel(), x)
    return x.new_empty(x.shape if stores_x_out else 0), x.new_empty(1).expand(x.shape), squares


@_norm_op.register_fake
def _(mixed, x, out, up, down, bias, slots, pushed, skip, mix, x0, bias_grad, x0_grad, adds_x0, stores_x_out):
    x_out, n, squares = _empty_boundary(x, stores_x_out)
    return x_out, x.new_empty(x.shape), n, squares, *_empty_up(x, up)


def _norm_setup(ctx, inputs, output):
    *_, bias, slots, pushed, skip, mix, x0, ctx.bias_grad, ctx.x0_grad, ctx.adds_x0, ctx.stores_x_out = inputs
    x_out, x_in, _, squares, *made = output
    needs = ctx.needs_input_grad
    needs_skip, needs_mix = needs[8:10]
    ctx.bias_rows = 0 if bias is None else len(bias)
    ctx.save_for_backward(
        x_in,
        squares,
        x_out if needs_mix else None,
        slots,
        pushed if needs_mix or needs_skip else None,
        skip,
        mix,
        x0 if needs_mix else None,
        *_saved(needs, inputs[:5], made),
    )
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, dx_out, dx_in, dn, *_):
    if dx_out is None and dx_in is None and dn is None:
        return (None,) * 15
    x_in, squares, x_out, slots, pushed, skip, mix, x0, *saved = ctx.saved_tensors
    *needs, needs_bias, _, needs_pushed, needs_skip, needs_mix, needs_x0 = ctx.needs_input_grad[:11]
    width, fp32 = x_in.size(-1), {"dtype": torch.float32}
    dz, dpushed = empty_grad(x_in), empty_grad(x_in, needs_pushed)
    dskip = x_in.new_empty(width, **fp32) if needs_skip else None
    dmix = x_in.new_empty(2, width, **fp32) if needs_mix else None
    dbias, dx0 = ctx.bias_grad if needs_bias else None, ctx.x0_grad if needs_x0 else None
    if needs_bias and dbias is None:
        dbias = (x_in.new_empty if slots is None else x_in.new_zeros)(ctx.bias_rows, width, **fp32)
    if needs_x0 and dx0 is None:
        dx0 = empty_grad(x_in)
    boundary_backward_op(
        *(dn, dx_in, dx_out if ctx.stores_x_out else None, x_in, None),
        *(x_out, None, None, None, slots, pushed, skip, mix, x0),
        *(dz, None, dpushed, None, dmix, dskip, dbias, dx0, ctx.adds_x0 and ctx.x0_grad is not None),
        *(None, None, False, squares),
    )
    dbias, dx0 = None if ctx.bias_grad is not None else dbias, None if ctx.x0_grad is not None else dx0
    return *_gradients(dz, needs, saved), dbias, None, dpushed, dskip, dmix, dx0, *(None,) * 4


_norm_op.register_autograd(_norm_backward, setup_context=_norm_setup)


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
    backend = _checked(mixed, x, out, up, down, backend)
    if backend == "reference" or not (out.numel() and up.numel()):  # a product over nothing has no launch to end
        return residual_mlp_ref(mixed, x, out, up, down)
    return _op(mixed, x, out, up, down)[0]


def _checked(mixed: Tensor, x: Tensor, out: Tensor, up: Tensor, down: Tensor, backend: str | None) -> str:
    """The backend that runs; raises on what it does not take."""
    backend = resolve_backend(backend, x)
    expect("x", x, ("...", "D"), dtypes_of(backend))
    expect("out", out, (x.size(-1), "Nq"), (x.dtype,), x.device)
    expect("mixed", mixed, (*x.shape[:-1], out.size(1)), (x.dtype,), x.device)
    expect("up", up, ("hidden", x.size(-1)), (x.dtype,), x.device)
    expect("down", down, (x.size(-1), up.size(0)), (x.dtype,), x.device)
    return backend


def residual_mlp_norm(
    mixed: Tensor,
    x: Tensor,
    out: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    mix: Tensor,
    x0: Tensor,
    bias: Tensor | None = None,
    slots: Tensor | None = None,
    pushed: Tensor | None = None,
    skip: Tensor | None = None,
    push: bool = False,
    bias_grad: Tensor | None = None,
    x0_grad: Tensor | None = None,
    adds_x0: bool = False,
    backend: str | None = None,
) -> ResidualNorm:
    """(x_out, x_in, n) [B, S, D] of what the next block reads: :func:`residual_mlp`, then :func:`residual_norm` of it.

    `mixed`, `x`, `out`, `up` and `down` are those of residual_mlp, x being [B, S, D]; `mix`, `x0`, `bias`, `slots`,
    `pushed`, `skip`, `push`, `bias_grad`, `x0_grad` and `adds_x0` those of residual_norm, and so are the gradients.

    Of the kernel n is :class:`Unnormed`, which lora_attention, lora_cached_attention and qkv_attention take. The
    reference stores it, and so do two launches in place of one beside a bias where S is no multiple of 128. The
    backward reads x_in, and x_out where mix has a gradient: autograd refuses it once they were changed in place.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: what either op refuses.

    Example: x_out, x_in, n = residual_mlp_norm(x, x, down @ up, up, down, mix=mix, x0=x0)
    """
    backend = _checked(mixed, x, out, up, down, backend)
    boundary = {"bias": bias, "slots": slots, "pushed": pushed, "skip": skip, "mix": mix, "x0": x0}
    grads = {"bias_grad": bias_grad, "x0_grad": x0_grad}
    slots = check_boundary(x, **boundary, **grads, backend=backend)
    if backend == "reference":
        refuse_in_reference(**grads)
        return residual_mlp_norm_ref(mixed, x, out, up, down, **(boundary | {"slots": slots}), push=push)
    if not (out.numel() and up.numel() and x.numel()) or (bias is not None and x.size(1) % BOUNDARY_ROWS):
        z = residual_mlp(mixed, x, out, up, down, backend=backend)
        return residual_norm(z, **boundary, **grads, adds_x0=adds_x0, push=push, backend=backend)
    bias = bias if bias is None or bias.stride(1) == 1 else bias.contiguous()
    pushed, skip, mix, x0 = (t if t is None else t.contiguous() for t in (pushed, skip, mix, x0))
    stores_x_out = push or (torch.is_grad_enabled() and mix.requires_grad)
    given = bias, slots, pushed, skip, mix, x0, bias_grad, x0_grad, adds_x0, stores_x_out
    x_out, x_in, n, squares, *_ = _norm_op(mixed, x, out, up, down, *given)
    return ResidualNorm(x_out if push else None, x_in, Unnormed(n, x_in, squares))
