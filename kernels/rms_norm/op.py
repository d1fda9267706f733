"""Launchers, the torch.library ops with their autograd, and the public functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import (
    DTYPES,
    FLOATS,
    cdiv,
    custom_op,
    empty_as,
    empty_grad,
    expect,
    expect_multiples,
    expect_rows,
    expect_slots,
    next_power_of_2,
    refuse_in_reference,
    resolve_backend,
    round_up,
)
from .backward import GROUP, SPLITS_AT_ONCE, add_splits, backward
from .forward import SPLIT, forward, pick_config
from .reference import EPS, ResidualNorm, residual_norm_ref, rms_norm_ref

WIDEST = 8192
NEEDS = (
    *(("skip", "pushed"), ("pushed", "skip"), ("mix", "x0"), ("x0", "mix"), ("scale", "branch")),
    *(("slots", "bias"), ("bias_grad", "bias"), ("x0_grad", "x0")),
)
"""Arguments that mean nothing without another."""


@custom_op("klora::residual_norm", mutates_args=())
def _op(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    slots: Tensor | None,
    pushed: Tensor | None,
    skip: Tensor | None,
    mix: Tensor | None,
    x0: Tensor | None,
    bias_grad: Tensor | None,
    x0_grad: Tensor | None,
    adds_x0: bool,
    stores_x_out: bool,
    stores_x_in: bool,
    weight: Tensor | None,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_out, x_in, n, 1 / rms. `bias_grad`, `x0_grad` and `adds_x0` are only passed on to the backward."""
    x_out, x_in, n, rstd = outputs = _outputs(x, stores_x_out, stores_x_in)
    stored = x_out if stores_x_out else None, x_in if stores_x_in else None
    joined = branch, scale, bias, slots, pushed, skip, mix, x0
    _launch_forward(x.shape, x, *joined, *stored, n, rstd, weight, eps, unit_offset)
    return outputs


def _launch_forward(
    shape: Sequence[int],
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    slots: Tensor | None,
    pushed: Tensor | None,
    skip: Tensor | None,
    mix: Tensor | None,
    x0: Tensor | None,
    x_out: Tensor | None,
    x_in: Tensor | None,
    n: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    eps: float,
    unit_offset: bool,
) -> None:
    """x, of this `shape` [B, S, D], and what joins it -> what is given to be written."""
    batch, tokens, width = shape
    if not x.numel():
        return
    config = pick_config(width, x.dtype)
    forward[(batch * cdiv(tokens, config.forward_tokens),)](
        x_ptr=x, branch_ptr=branch, scale_ptr=scale, bias_ptr=bias, slots_ptr=slots, pushed_ptr=pushed,
        skip_ptr=skip, mix_ptr=mix, x0_ptr=x0, x_out_ptr=x_out, x_in_ptr=x_in, n_ptr=n, rstd_ptr=rstd,
        weight_ptr=weight, tokens=tokens,
        pool=0 if bias is None else bias.size(0), bias_stride=0 if bias is None else bias.stride(0),
        EPS=eps, UNIT_OFFSET=unit_offset, D=width, CHUNKS=config.chunks, ROWS=config.rows, CHUNK=config.chunk,
        STEPS=config.forward_tokens // config.rows, num_warps=config.num_warps,
    )  # fmt: skip


@_op.register_fake
def _(x, branch, scale, bias, slots, pushed, skip, mix, x0, bias_grad, x0_grad, adds_x0, *stored_and_norm):
    return _outputs(x, *stored_and_norm[:2])


def _outputs(x: Tensor, stores_x_out: bool, stores_x_in: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty x_out, x_in, n and 1 / rms fp32 [B, S]; the first two of no element where they are not stored."""
    x_out = empty_as(x) if stores_x_out else x.new_empty(0)
    x_in = empty_as(x) if stores_x_in else x.new_empty(0)
    return x_out, x_in, empty_as(x), x.new_empty(x.size(0), x.size(1), dtype=torch.float32)


@custom_op(
    "klora::residual_norm_backward_",
    mutates_args=("dx", "dbranch", "dpushed", "dscale", "dmix", "dskip", "dbias", "dx0", "dweight"),
)
def backward_op(
    dn: Tensor | None,
    dx_in: Tensor | None,
    dx_out: Tensor | None,
    n: Tensor,
    rstd: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    slots: Tensor | None,
    pushed: Tensor | None,
    skip: Tensor | None,
    mix: Tensor | None,
    x0: Tensor | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
    dpushed: Tensor | None,
    dscale: Tensor | None,
    dmix: Tensor | None,
    dskip: Tensor | None,
    dbias: Tensor | None,
    dx0: Tensor | None,
    adds_dx0: bool,
    weight: Tensor | None,
    dweight: Tensor | None,
    unit_offset: bool,
    squares: Tensor | None,
) -> None:
    """Writes the gradients that are given. The rows of `dbias` [slots, D] that `slots` name are written, and all of
    `dx0` is, or added to with `adds_dx0`. With a weight, `n` is x_in. With `squares`, in place of `rstd`, it is x_in,
    and `dn` the gradient that :class:`Unnormed` has.
    """
    given = dn, dx_in, dx_out, n, rstd, x, branch, scale, bias, slots, pushed, skip, mix, x0
    grads = dx, dbranch, dpushed, dscale, dmix, dskip, dbias, dx0
    _launch_backward(n.shape, *given, *grads, adds_dx0, weight, dweight, unit_offset, squares)


def _launch_backward(
    shape: Sequence[int],
    dn: Tensor | None,
    dx_in: Tensor | None,
    dx_out: Tensor | None,
    n: Tensor,
    rstd: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    slots: Tensor | None,
    pushed: Tensor | None,
    skip: Tensor | None,
    mix: Tensor | None,
    x0: Tensor | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
    dpushed: Tensor | None,
    dscale: Tensor | None,
    dmix: Tensor | None,
    dskip: Tensor | None,
    dbias: Tensor | None,
    dx0: Tensor | None,
    adds_dx0: bool,
    weight: Tensor | None,
    dweight: Tensor | None,
    unit_offset: bool,
    squares: Tensor | None = None,
) -> None:
    """As :func:`backward_op`, for n of this `shape` [B, S, D]."""
    vectors = [grad for grad in (dscale, dmix, dskip) if grad is not None]
    batch, tokens, width = shape
    if not n.numel():
        for grad in (*vectors, dweight, None if slots is not None else dbias):
            if grad is not None:
                grad.zero_()
        return
    splits = cdiv(tokens, SPLIT)
    has_bias, has_weight = dbias is not None, dweight is not None
    kinds = sum(grad.numel() // width for grad in vectors)
    config = pick_config(width, n.dtype, has_bias + kinds + has_weight)
    every = (has_bias + kinds) * batch * splits
    of_weight = round_up(batch * splits, GROUP) if has_weight else 0
    both = n.new_empty(every + of_weight, width, dtype=torch.float32)
    dn, dx_in, dx_out = [grad if grad is None else grad.contiguous() for grad in (dn, dx_in, dx_out)]
    backward[(batch * splits,)](
        dn_ptr=dn, dx_in_ptr=dx_in, dx_out_ptr=dx_out, n_ptr=n, rstd_ptr=rstd, x_ptr=x, branch_ptr=branch,
        scale_ptr=scale, bias_ptr=bias, slots_ptr=slots, pushed_ptr=pushed, skip_ptr=skip, mix_ptr=mix, x0_ptr=x0,
        weight_ptr=weight, squares_ptr=squares, dx_ptr=dx, dbranch_ptr=dbranch, dpushed_ptr=dpushed, dx0_ptr=dx0,
        sums_ptr=both, tokens=tokens,
        pool=0 if bias is None else bias.size(0), bias_stride=0 if bias is None else bias.stride(0),
        all_tokens=batch * tokens,
        BIAS=has_bias, SCALE=dscale is not None, MIX=dmix is not None, SKIP=dskip is not None,
        WEIGHT=has_weight, ADDS=adds_dx0, UNIT_OFFSET=unit_offset, D=width,
        CHUNKS=config.chunks, ROWS=config.rows, CHUNK=config.chunk, STEPS=SPLIT // config.rows, EPS=EPS,
        BLOCKS=0 if squares is None else len(squares), num_warps=config.num_warps,
    )  # fmt: skip
    sums = both[:every].view(has_bias + kinds, batch, splits, width) if every else None
    if has_bias:
        _add_splits(sums[0], dbias, slots, batch)
    if vectors:
        by_document = sums.new_empty((kinds, batch, width))
        _add_splits(sums[has_bias:], by_document.flatten(0, 1), None, batch)
        first = 0
        for grad in vectors:
            rows = grad.view(-1, width)
            _add_splits(by_document[first : first + len(rows)], rows, None, len(rows))
            first += len(rows)
    if has_weight:
        both[every + batch * splits :].zero_()
        groups = both.new_empty(of_weight // GROUP, width)
        _add_splits(both[every:].view(-1, GROUP, width), groups, None, batch)
        _add_splits(groups[None], dweight[None], None, batch)


def _add_splits(sums: Tensor, out: Tensor, slots: Tensor | None, batch: int) -> None:
    """sums [..., splits, D], contiguous, into the rows of `out` [rows, D]."""
    splits, width = sums.shape[-2:]
    block = min(128, next_power_of_2(width))
    add_splits[(sums.numel() // (splits * width), cdiv(width, block))](
        sums_ptr=sums, out_ptr=out, slots_ptr=slots, batch=batch, splits=splits, pool=out.size(0),
        out_stride=out.stride(0), D=width, SPLITS=SPLITS_AT_ONCE, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, branch, scale, bias, slots, pushed, skip, mix, x0, ctx.bias_grad, ctx.x0_grad, ctx.adds_x0, *more = inputs
    ctx.stores_x_out, ctx.stores_x_in, weight, _, ctx.unit_offset = more
    _, x_in, n, rstd = output
    if weight is not None:  # n cannot be had from n * weight
        n = x_in if ctx.stores_x_in else x
    _, needs_branch, needs_scale, _, _, _, needs_skip, needs_mix, *_ = ctx.needs_input_grad
    ctx.bias_rows = 0 if bias is None else bias.size(0)
    # What no gradient reads is not kept.
    ctx.save_for_backward(
        n,
        rstd,
        x if needs_mix else None,
        branch if needs_mix or needs_scale else None,
        scale if needs_mix or needs_branch else None,
        bias if needs_mix else None,
        slots,
        pushed if needs_mix or needs_skip else None,
        skip,
        mix,
        x0 if needs_mix else None,
        weight,
    )
    ctx.set_materialize_grads(False)


def _backward(ctx, dx_out, dx_in, dn, _):
    dx_out, dx_in = dx_out if ctx.stores_x_out else None, dx_in if ctx.stores_x_in else None
    if dn is None and dx_in is None and dx_out is None:
        return (None,) * 17
    x, branch, scale, bias, _, pushed, skip, mix, x0, *_, needs_weight, _, _ = ctx.needs_input_grad
    *saved, weight = ctx.saved_tensors
    n, scaled, slots = saved[0], saved[4], saved[6]
    # The gradient of a branch without scale is that of x.
    is_shared = branch and scaled is None
    dx, dbranch = empty_grad(n, x or is_shared), empty_grad(n, branch and not is_shared)
    dpushed = empty_grad(n, pushed)
    width, fp32 = n.size(2), {"dtype": torch.float32}
    dscale = n.new_empty(width, **fp32) if scale else None
    dskip = n.new_empty(width, **fp32) if skip else None
    dmix = n.new_empty(2, width, **fp32) if mix else None
    dbias, dx0 = ctx.bias_grad, ctx.x0_grad
    if bias and dbias is None:
        dbias = (n.new_empty if slots is None else n.new_zeros)(ctx.bias_rows, width, **fp32)
    if x0 and dx0 is None:
        dx0 = empty_grad(n)
    given = dx, dbranch, dpushed, dscale, dmix, dskip, dbias if bias else None, dx0 if x0 else None
    dweight = empty_grad(weight) if needs_weight else None
    adds = ctx.adds_x0 and ctx.x0_grad is not None
    backward_op(dn, dx_in, dx_out, *saved, *given, adds, weight, dweight, ctx.unit_offset, None)
    dbias, dx0 = dbias if bias and ctx.bias_grad is None else None, dx0 if x0 and ctx.x0_grad is None else None
    dx, dbranch = dx if x else None, dx if is_shared else dbranch
    return dx, dbranch, dscale, dbias, None, dpushed, dskip, dmix, dx0, *(None,) * 5, dweight, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


@custom_op("klora::rms_norm", mutates_args=())
def _norm_op(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """n of `x` [..., D], contiguous, and 1 / rms of its rows: the launch of a boundary that joins nothing.

    An op of its own: to autograd each result costs a microsecond, and each view around it five.
    """
    n, rstd = _norm_outputs(x)
    _launch_forward((1, rstd.numel(), x.size(-1)), x, *(None,) * 10, n, rstd, weight, eps, unit_offset)
    return n, rstd


@_norm_op.register_fake
def _(x, weight, eps, unit_offset):
    return _norm_outputs(x)


def _norm_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_as(x), x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)


@custom_op("klora::rms_norm_backward_", mutates_args=("dx", "dweight"))
def _norm_backward_op(
    dn: Tensor,
    n: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    unit_offset: bool,
) -> None:
    """With a weight, `n` is x."""
    nothing = (None,) * 9
    shape = 1, rstd.numel(), n.size(-1)
    grads = dx, *(None,) * 7
    _launch_backward(shape, dn, None, None, n, rstd, *nothing, *grads, False, weight, dweight, unit_offset)


def _setup_norm(ctx, inputs, output):
    x, weight, _, ctx.unit_offset = inputs
    n, rstd = output
    ctx.save_for_backward(n if weight is None else x, rstd, weight)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, dn, _):
    if dn is None:
        return (None,) * 4
    n, rstd, weight = ctx.saved_tensors
    needs_x, needs_weight, _, _ = ctx.needs_input_grad
    dx, dweight = empty_grad(n, needs_x), empty_grad(weight, needs_weight)
    _norm_backward_op(dn, n, rstd, weight, dx, dweight, ctx.unit_offset)
    return dx, dweight, None, None


_norm_op.register_autograd(_norm_backward, setup_context=_setup_norm)


def _takes_reference(x: Tensor, shape: tuple[str, ...], backend: str | None) -> bool:
    """Whether `backend` means the reference; raises for an x that it does not take."""
    reference = resolve_backend(backend, x) == "reference"
    expect("x", x, shape, () if reference else DTYPES)
    if not reference:
        expect_multiples(16, WIDEST, D=x.size(-1))
    return reference


def _check_gain(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, reference: bool) -> None:
    if not eps > 0:
        raise ValueError(f"eps is {eps}; wanted a number above 0")
    if unit_offset and weight is None:
        raise ValueError("unit_offset is given without weight")
    if weight is not None:
        expect("weight", weight, (x.size(-1),), FLOATS if reference else DTYPES, x.device)


def check_boundary(x: Tensor, *, backend: str | None, **given: Tensor | None) -> Tensor | None:
    """The slots as the kernel takes them; raises on tensors of a boundary that the backend does not take."""
    reference = _takes_reference(x, ("B", "S", "D"), backend)
    for name, other in NEEDS:
        if given.get(name) is not None and given.get(other) is None:
            raise ValueError(f"{name} is given without {other}")
    slots, width = expect_slots(given["slots"], x.size(0), x.device), x.size(2)
    rows = x.size(0) if slots is None else "slots"
    shapes = {"scale": (width,), "skip": (width,), "mix": (2, width), "bias": (rows, width)}
    fp32 = () if reference else (torch.float32,)
    for name in ("branch", "pushed", "x0", *shapes):
        if given.get(name) is not None:
            expect(name, given[name], shapes.get(name, x.shape), fp32 if name in shapes else (x.dtype,), x.device)
    bias_grad, x0_grad = given["bias_grad"], given["x0_grad"]
    if bias_grad is not None:
        expect_rows("bias_grad", bias_grad, given["bias"], (torch.float32,))
    if x0_grad is not None:
        expect("x0_grad", x0_grad, x.shape, (x.dtype,), x.device)
        if not x0_grad.is_contiguous():
            raise ValueError(f"x0_grad has strides {list(x0_grad.stride())}; wanted a contiguous tensor")
    return slots


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = EPS,
    unit_offset: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`x` [..., D] / sqrt(mean(x^2) + `eps`) over the last dimension, in its dtype; times `weight` [D], as in Llama.

    With `unit_offset` times 1 + weight, as in Gemma. x and weight, of any float dtype that the backend takes, get
    gradients, each in its own dtype.

    Without a weight the backward reads what is returned: change none of it before.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, and a D that is a multiple of 16 up to 8192.
    ValueError: other shapes, dtypes or backends, an eps that is not above 0, unit_offset without weight.

    Example: n = rms_norm(x, scale, eps=1e-6)
    """
    reference = _takes_reference(x, ("...", "D"), backend)
    _check_gain(x, weight, eps, unit_offset, reference)
    if reference:
        return rms_norm_ref(x, weight, eps, unit_offset)
    weight = None if weight is None else weight.contiguous()
    return _norm_op(x.contiguous(), weight, eps, unit_offset)[0]


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    slots: Tensor | None = None,
    pushed: Tensor | None = None,
    skip: Tensor | None = None,
    mix: Tensor | None = None,
    x0: Tensor | None = None,
    push: bool = False,
    last: bool = False,
    bias_grad: Tensor | None = None,
    x0_grad: Tensor | None = None,
    adds_x0: bool = False,
    weight: Tensor | None = None,
    eps: float = EPS,
    unit_offset: bool = False,
    backend: str | None = None,
) -> ResidualNorm:
    """(x_out, x_in, n) of a block's boundary, all [B, S, D] in x's dtype; the equations are those of the package.

    `x`, `branch`, `pushed` and `x0` are [B, S, D] of one dtype. `scale` and `skip` [D], `mix` [2, D] and `bias` [slots,
    D] are float32 for the kernel. `slots` int32 or int64 [B] is the row of bias that each document adds; None takes row
    b for document b. `skip` comes with pushed, mix with x0, scale with branch. `weight` [D], `eps` and `unit_offset`
    are those of :func:`rms_norm`. All but slots get gradients.

    x_out is None without `push`, and x_in with `last`: what is not read is not stored. Tensors that are not contiguous
    are copied, all but bias, whose rows may lie any distance apart. The backward reads n, with a weight x_in: autograd
    refuses it once that was changed in place.

    With `bias_grad`, a float32 tensor like bias (a view of a pool of gradients), the backward writes the rows of the
    slots that are named, leaves the others alone, and autograd gets no gradient of bias, which has to require one all
    the same. `x0_grad`, like x0, does the same for x0: it is written, or with `adds_x0` added to, so that the
    boundaries that share an x0 share one sum. Only the kernel takes the two.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, and a D that is a multiple of 16 up to 8192.
    ValueError: other shapes, dtypes or backends, tensors on several devices, one of a pair without the other, a pooled
    gradient with the reference, an eps that is not above 0.

    Example: x_out, x_in, n = residual_norm(x, branch, scale, push=True)
    """
    slots = check_boundary(
        x, branch=branch, pushed=pushed, x0=x0, scale=scale, skip=skip, mix=mix, bias=bias, slots=slots,
        bias_grad=bias_grad, x0_grad=x0_grad, backend=backend,
    )  # fmt: skip
    reference = resolve_backend(backend, x) == "reference"
    _check_gain(x, weight, eps, unit_offset, reference)
    if reference:
        refuse_in_reference(bias_grad=bias_grad, x0_grad=x0_grad)
        return residual_norm_ref(
            x, branch, scale, bias=bias, slots=slots, pushed=pushed, skip=skip, mix=mix, x0=x0, push=push, last=last,
            weight=weight, eps=eps, unit_offset=unit_offset,
        )  # fmt: skip
    # Without anything to add, the stream is x itself.
    is_plain = branch is None and bias is None and pushed is None and mix is None
    x, branch, scale, pushed, skip, mix, x0, weight = (
        t if t is None else t.contiguous() for t in (x, branch, scale, pushed, skip, mix, x0, weight)
    )
    bias = bias if bias is None or bias.stride(1) == 1 else bias.contiguous()
    stored = push and not is_plain, (not last or weight is not None) and not is_plain
    stream = x, branch, scale, bias, slots, pushed, skip, mix, x0, bias_grad, x0_grad, adds_x0
    x_out, x_in, n, _ = _op(*stream, *stored, weight, eps, unit_offset)
    if is_plain:
        x_out = x_in = x
    return ResidualNorm(x_out if push else None, None if last else x_in, n)
