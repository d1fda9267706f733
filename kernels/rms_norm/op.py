"""Launchers, the torch.library ops with their autograd, and the public functions."""

import torch
import triton
from torch import Tensor

from ..registration import custom_op
from .backward import SPLITS_AT_ONCE, add_splits, backward
from .forward import SPLIT, forward, pick_config
from .reference import EPS, ResidualNorm, residual_norm_ref, rms_norm_ref

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int32, torch.int64)
WIDEST = 4096


@custom_op("klora::residual_norm", mutates_args=())
def _residual_norm(
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
    push: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_out, x_in, n, 1 / rms. `bias_grad` is only passed on to the backward."""
    x_out, x_in, n, rstd = _outputs(x, push, keep)
    batch, tokens, width = x.shape
    if x.numel():
        config = pick_config(width, x.dtype)
        forward[(batch * triton.cdiv(tokens, config.forward_tokens),)](
            x,
            branch,
            scale,
            bias,
            slots,
            pushed,
            skip,
            mix,
            x0,
            x_out if push else None,
            x_in if keep else None,
            n,
            rstd,
            tokens,
            0 if bias is None else bias.size(0),
            0 if bias is None else bias.stride(0),
            EPS=EPS,
            D=width,
            CHUNKS=config.chunks,
            ROWS=config.rows,
            CHUNK=config.chunk,
            STEPS=config.forward_tokens // config.rows,
            num_warps=config.num_warps,
        )
    return x_out, x_in, n, rstd


@_residual_norm.register_fake
def _(x, branch, scale, bias, slots, pushed, skip, mix, x0, bias_grad, push, keep):
    return _outputs(x, push, keep)


def _outputs(x: Tensor, push: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty x_out, x_in, n and 1 / rms fp32 [B, S]; the first two of no element where they are not stored."""
    x_out, x_in = (x.new_empty(x.shape if stored else 0) for stored in (push, keep))
    return x_out, x_in, x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


@custom_op("klora::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    dn: Tensor | None,
    dx_in: Tensor | None,
    dx_out: Tensor | None,
    n: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    branch: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    slots: Tensor | None,
    pushed: Tensor | None,
    skip: Tensor | None,
    mix: Tensor | None,
    x0: Tensor | None,
    bias_rows: int,
    wants: list[bool],
) -> list[Tensor]:
    """dx, dbranch, dpushed, dx0, dbias, dscale, dmix, dskip; empty where `wants`, in that order, says no."""
    grads = _gradients(n, bias_rows, wants)
    saved = n, rstd, x, branch, scale, bias, slots, pushed, skip, mix, x0
    if slots is not None:
        grads[4].zero_()
    _launch_backward(dn, dx_in, dx_out, *saved, grads[4] if wants[4] else None, grads, wants)
    return grads


@_residual_norm_backward.register_fake
def _(dn, dx_in, dx_out, n, rstd, x, branch, scale, bias, slots, pushed, skip, mix, x0, bias_rows, wants):
    return _gradients(n, bias_rows, wants)


@custom_op("klora::residual_norm_backward_into", mutates_args=("dbias",))
def _residual_norm_backward_into(
    dn: Tensor | None,
    dx_in: Tensor | None,
    dx_out: Tensor | None,
    n: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    branch: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    slots: Tensor | None,
    pushed: Tensor | None,
    skip: Tensor | None,
    mix: Tensor | None,
    x0: Tensor | None,
    dbias: Tensor,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch, dpushed, dx0, dscale, dmix, dskip as above; dbias goes to the rows of `dbias` that `slots` name."""
    grads = _gradients(n, 0, wants)
    saved = n, rstd, x, branch, scale, bias, slots, pushed, skip, mix, x0
    _launch_backward(dn, dx_in, dx_out, *saved, dbias, grads, wants)
    return *grads[:4], *grads[5:]


@_residual_norm_backward_into.register_fake
def _(dn, dx_in, dx_out, n, rstd, x, branch, scale, bias, slots, pushed, skip, mix, x0, dbias, wants):
    grads = _gradients(n, 0, wants)
    return *grads[:4], *grads[5:]


def _launch_backward(
    dn, dx_in, dx_out, n, rstd, x, branch, scale, bias, slots, pushed, skip, mix, x0, dbias, grads, wants
) -> None:
    """Fill `grads`, and the rows of `dbias` [slots, D] that `slots` name, unless it is None."""
    batch, tokens, width = n.shape
    if not n.numel():
        for grad in (*grads[:4], *grads[5:]):
            grad.zero_()
        if dbias is not None and slots is None:
            dbias.zero_()
        return
    dx, dbranch, dpushed, dx0 = (grad if wanted else None for grad, wanted in zip(grads, wants[:4], strict=False))
    has_bias, (has_scale, has_mix, has_skip) = dbias is not None, wants[5:]
    splits = triton.cdiv(tokens, SPLIT)
    kinds = has_bias + has_scale + 2 * has_mix + has_skip
    config = pick_config(width, n.dtype, kinds)
    sums = n.new_empty((kinds, batch, splits, width), dtype=torch.float32)
    dn, dx_in, dx_out = (grad if grad is None else grad.contiguous() for grad in (dn, dx_in, dx_out))
    backward[(batch * splits,)](
        dn,
        dx_in,
        dx_out,
        n,
        rstd,
        x,
        branch,
        scale,
        bias,
        slots,
        pushed,
        skip,
        mix,
        x0,
        dx,
        dbranch,
        dpushed,
        dx0,
        sums,
        tokens,
        0 if bias is None else bias.size(0),
        0 if bias is None else bias.stride(0),
        BIAS=has_bias,
        SCALE=has_scale,
        MIX=has_mix,
        SKIP=has_skip,
        D=width,
        CHUNKS=config.chunks,
        ROWS=config.rows,
        CHUNK=config.chunk,
        STEPS=SPLIT // config.rows,
        num_warps=config.num_warps,
    )
    if has_bias:
        _add_splits(sums[0], dbias, slots, batch)
    if kinds > has_bias:
        vectors = sums.new_empty(((kinds - has_bias) * batch, width))
        _add_splits(sums[has_bias:], vectors, None, batch)
        totals = list(vectors.unflatten(0, (-1, batch)).sum(1))
        if has_scale:
            grads[5].copy_(totals.pop(0))
        if has_mix:
            torch.stack((totals.pop(0), totals.pop(0)), out=grads[6])
        if has_skip:
            grads[7].copy_(totals.pop(0))


def _gradients(n: Tensor, bias_rows: int, wants: list[bool]) -> list[Tensor]:
    width = n.size(2)
    shapes = [n.shape] * 4 + [(bias_rows, width), (width,), (2, width), (width,)]
    dtypes = [n.dtype] * 4 + [torch.float32] * 4
    return [
        n.new_empty(shape if wanted else 0, dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, wants, strict=True)
    ]


def _add_splits(sums: Tensor, out: Tensor, slots: Tensor | None, batch: int) -> None:
    """sums [..., splits, D], contiguous, into the rows of `out` [rows, D]."""
    splits, width = sums.shape[-2:]
    block = min(128, triton.next_power_of_2(width))
    add_splits[(sums.numel() // (splits * width), triton.cdiv(width, block))](
        sums,
        out,
        slots,
        batch,
        splits,
        out.size(0),
        out.stride(0),
        D=width,
        SPLITS=SPLITS_AT_ONCE,
        BLOCK=block,
        num_warps=4,
    )


def _setup_context(ctx, inputs, output):
    x, branch, scale, bias, slots, pushed, skip, mix, x0, ctx.bias_grad, ctx.push, ctx.keep = inputs
    _, _, n, rstd = output
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
    )
    ctx.set_materialize_grads(False)


def _backward(ctx, dx_out, dx_in, dn, _):
    dx_out, dx_in = dx_out if ctx.push else None, dx_in if ctx.keep else None
    if dn is None and dx_in is None and dx_out is None:
        return (None,) * 12
    x, branch, scale, bias, _, pushed, skip, mix, x0, *_ = ctx.needs_input_grad
    # The gradient of a branch without scale is that of x.
    is_shared = branch and ctx.saved_tensors[4] is None
    is_into = bias and ctx.bias_grad is not None
    wants = [x or is_shared, branch and not is_shared, pushed, x0, bias and not is_into, scale, mix, skip]
    given = dn, dx_in, dx_out, *ctx.saved_tensors
    if is_into:
        others = _residual_norm_backward_into(*given, ctx.bias_grad, wants)
        grads = *others[:4], None, *others[4:]
    else:
        grads = _residual_norm_backward(*given, ctx.bias_rows, wants)
    dx, dbranch, dpushed, dx0, dbias, dscale, dmix, dskip = (
        grad if wanted else None for grad, wanted in zip(grads, wants, strict=True)
    )
    if is_shared:
        dx, dbranch = dx if x else None, dx
    return dx, dbranch, dscale, dbias, None, dpushed, dskip, dmix, dx0, None, None, None


_residual_norm.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x [..., D] / rms(x) over the last dimension. The backward reads what is returned: change none of it before."""
    _check(x.unsqueeze(0) if x.dim() < 3 else x)
    if _takes_reference(x, backend):
        return rms_norm_ref(x)
    rows = x.reshape(1, -1, x.size(-1)).contiguous()
    return _residual_norm(rows, *(None,) * 9, False, False)[2].view(x.shape)


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
    backend: str | None = None,
) -> ResidualNorm:
    """(x_out, x_in, n) of the boundary; shapes, dtypes and equations: see the package.

    x_out is None without `push`, and x_in with `last`: what nobody reads is not stored. Tensors that are not contiguous
    are copied, all but `bias`, whose rows may lie any distance apart. With `bias_grad`, a tensor like `bias` (a view of
    a pool of gradients), the backward writes the rows of the slots named there, leaves the others alone, and autograd
    gets no gradient of `bias`, which has to require one all the same. The backward reads n: autograd refuses it once n
    was changed in place.
    """
    given = {"branch": branch, "pushed": pushed, "x0": x0}
    vectors = {"scale": scale, "skip": skip, "mix": mix, "bias": bias}
    _check(x, given, vectors, slots)
    if bias_grad is not None and (bias is None or bias_grad.shape != bias.shape or bias_grad.stride(1) != 1):
        raise ValueError(f"bias_grad is {list(bias_grad.shape)}; wanted: rows like those of bias, each contiguous")
    if bias_grad is not None and (bias_grad.dtype != torch.float32 or bias_grad.device != x.device):
        raise ValueError(f"bias_grad is {bias_grad.dtype} on {bias_grad.device}; wanted: float32 on {x.device}")
    if _takes_reference(x, backend):
        if bias_grad is not None:
            raise ValueError("bias_grad: the reference has no backward of its own to write it; use backend='triton'")
        return residual_norm_ref(
            x, branch, scale, bias=bias, slots=slots, pushed=pushed, skip=skip, mix=mix, x0=x0, push=push, last=last
        )
    for name, vector in vectors.items():
        if vector is not None and vector.dtype != torch.float32:
            raise ValueError(f"{name} is {vector.dtype}; the kernel wants float32")
    # Without anything to add, the stream is x itself.
    is_plain = branch is None and bias is None and pushed is None and mix is None
    x, branch, scale, slots, pushed, skip, mix, x0 = (
        t if t is None else t.contiguous() for t in (x, branch, scale, slots, pushed, skip, mix, x0)
    )
    bias = bias if bias is None or bias.stride(1) == 1 else bias.contiguous()
    stored = (push and not is_plain, not last and not is_plain)
    x_out, x_in, n, _ = _residual_norm(x, branch, scale, bias, slots, pushed, skip, mix, x0, bias_grad, *stored)
    if is_plain:
        x_out = x_in = x
    return ResidualNorm(x_out if push else None, None if last else x_in, n)


def _takes_reference(x: Tensor, backend: str | None) -> bool:
    """Whether `backend` means the reference here; raises ValueError where the kernel takes no such x."""
    if backend not in (None, "reference", "triton"):
        raise ValueError(f"backend is {backend!r}; allowed: None, 'reference', 'triton'")
    if backend == "reference" or (backend is None and x.device.type == "cpu"):
        return True
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the kernel wants bfloat16, float16 or float32")
    if x.size(-1) % 16 or not 16 <= x.size(-1) <= WIDEST:
        raise ValueError(f"D is {x.size(-1)}; the kernel wants a multiple of 16 up to {WIDEST}")
    return False


def _check(
    x: Tensor,
    given: dict[str, Tensor | None] | None = None,
    vectors: dict[str, Tensor | None] | None = None,
    slots: Tensor | None = None,
) -> None:
    """ValueError where the arguments do not fit together, for the kernel and the reference alike."""
    given, vectors = given or {}, vectors or {}
    if x.dim() < 2 or (vectors and x.dim() != 3):
        raise ValueError(f"x is {list(x.shape)}; wanted: [B, S, D]")
    for one, other in (("skip", "pushed"), ("pushed", "skip"), ("mix", "x0"), ("x0", "mix"), ("scale", "branch")):
        both = given | vectors
        if both.get(one) is not None and both.get(other) is None:
            raise ValueError(f"{one} is given without {other}")
    if slots is not None and vectors["bias"] is None:
        raise ValueError("slots are given without bias")
    width = x.size(-1)
    for name, tensor in given.items():
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; wanted: {x.dtype} {list(x.shape)}, as x")
    shapes = {"scale": [width], "skip": [width], "mix": [2, width]}
    for name, tensor in vectors.items():
        if tensor is None:
            continue
        rows = x.size(0) if slots is None else tensor.size(0)
        wanted = shapes.get(name, [rows, width])
        if list(tensor.shape) != wanted:
            raise ValueError(f"{name} is {list(tensor.shape)}; wanted: {wanted}")
    if slots is not None and (slots.shape != x.shape[:1] or slots.dtype not in INTEGERS):
        raise ValueError(f"slots are {slots.dtype} {list(slots.shape)}; wanted: int32 or int64 [{x.size(0)}]")
    for name, tensor in (given | vectors | {"slots": slots}).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; all must be on one device")
