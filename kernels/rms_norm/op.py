"""Launchers, the torch.library ops with their autograd, and the public functions."""

import torch
import triton
from torch import Tensor

from ..dispatch import custom_op, resolve_backend
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
    x0_grad: Tensor | None,
    adds_x0: bool,
    push: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_out, x_in, n, 1 / rms. `bias_grad`, `x0_grad` and `adds_x0` are only passed on to the backward."""
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
def _(x, branch, scale, bias, slots, pushed, skip, mix, x0, bias_grad, x0_grad, adds_x0, push, keep):
    return _outputs(x, push, keep)


def _outputs(x: Tensor, push: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty x_out, x_in, n and 1 / rms fp32 [B, S]; the first two of no element where they are not stored."""
    x_out, x_in = (x.new_empty(x.shape if stored else 0) for stored in (push, keep))
    return x_out, x_in, x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


@custom_op("klora::residual_norm_backward", mutates_args=("dbias", "dx0"))
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
    dbias: Tensor | None,
    dx0: Tensor | None,
    adds_dx0: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch, dpushed, dscale, dmix, dskip; empty where `wants`, in that order, says no.

    The rows of `dbias` [slots, D] that `slots` name are written, and all of `dx0` is, or added to with `adds_dx0`.
    """
    grads = _gradients(n, wants)
    batch, tokens, width = n.shape
    if not n.numel():
        for grad in (*grads, *(() if dx0 is None or adds_dx0 else (dx0,))):
            grad.zero_()
        if dbias is not None and slots is None:
            dbias.zero_()
        return tuple(grads)
    dx, dbranch, dpushed = (grad if wanted else None for grad, wanted in zip(grads, wants[:3], strict=False))
    has_bias, (has_scale, has_mix, has_skip) = dbias is not None, wants[3:]
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
        ADDS=adds_dx0,
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
        vectors = sums.new_empty((kinds - has_bias, batch, width))
        _add_splits(sums[has_bias:], vectors.flatten(0, 1), None, batch)
        first = 0
        for grad, wanted in zip(grads[3:], wants[3:], strict=True):
            if wanted:
                rows = grad.view(-1, width)
                _add_splits(vectors[first : first + len(rows)], rows, None, len(rows))
                first += len(rows)
    return tuple(grads)


@_residual_norm_backward.register_fake
def _(
    dn, dx_in, dx_out, n, rstd, x, branch, scale, bias, slots, pushed, skip, mix, x0, dbias, dx0, adds_dx0, wants
):  # fmt: skip
    return tuple(_gradients(n, wants))


def _gradients(n: Tensor, wants: list[bool]) -> list[Tensor]:
    width = n.size(2)
    shapes = [n.shape] * 3 + [(width,), (2, width), (width,)]
    dtypes = [n.dtype] * 3 + [torch.float32] * 3
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
    x, branch, scale, bias, slots, pushed, skip, mix, x0, ctx.bias_grad, ctx.x0_grad, ctx.adds_x0, *stored = inputs
    ctx.push, ctx.keep = stored
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
        return (None,) * 14
    x, branch, scale, bias, _, pushed, skip, mix, x0, *_ = ctx.needs_input_grad
    n, _, _, _, scaled, _, slots, *_ = ctx.saved_tensors
    # The gradient of a branch without scale is that of x.
    is_shared = branch and scaled is None
    dbias, dx0 = ctx.bias_grad if bias else None, ctx.x0_grad if x0 else None
    is_given = dbias is not None, dx0 is not None
    if bias and dbias is None:
        dbias = n.new_empty(ctx.bias_rows, n.size(2), dtype=torch.float32)
        if slots is not None:
            dbias.zero_()
    if x0 and dx0 is None:
        dx0 = torch.empty_like(n)
    wants = [x or is_shared, branch and not is_shared, pushed, scale, mix, skip]
    adds = ctx.adds_x0 and is_given[1]
    grads = _residual_norm_backward(dn, dx_in, dx_out, *ctx.saved_tensors, dbias, dx0, adds, wants)
    dx, dbranch, dpushed, dscale, dmix, dskip = (
        grad if wanted else None for grad, wanted in zip(grads, wants, strict=True)
    )
    if is_shared:
        dx, dbranch = dx if x else None, dx
    dbias, dx0 = (None if given else grad for grad, given in zip((dbias, dx0), is_given, strict=True))
    return dx, dbranch, dscale, dbias, None, dpushed, dskip, dmix, dx0, None, None, None, None, None


_residual_norm.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(x: Tensor, *, backend: str | None = None) -> Tensor:
    """`x` [..., D] / rms(x) over the last dimension, in its dtype, with a gradient.

    The backward reads what is returned: change none of it before.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, and a D that is a multiple of 16 up to 4096.
    ValueError: other shapes, dtypes or backends.

    Example: n = rms_norm(x)
    """
    _check(x.unsqueeze(0) if x.dim() < 3 else x)
    if _takes_reference(x, backend):
        return rms_norm_ref(x)
    rows = x.reshape(1, -1, x.size(-1)).contiguous()
    return _residual_norm(rows, *(None,) * 10, False, False, False)[2].view(x.shape)


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
    backend: str | None = None,
) -> ResidualNorm:
    """(x_out, x_in, n) of a block's boundary, all [B, S, D] in x's dtype; the equations are those of the package.

    `x`, `branch`, `pushed` and `x0` are [B, S, D] of one dtype. `scale` and `skip` [D], `mix` [2, D] and `bias` [slots,
    D] are float32 for the kernel. `slots` int32 or int64 [B] is the row of bias that each document adds; None takes row
    b for document b. `skip` comes with pushed, mix with x0, scale with branch. All but slots get gradients.

    x_out is None without `push`, and x_in with `last`: what is not read is not stored. Tensors that are not contiguous
    are copied, all but bias, whose rows may lie any distance apart. The backward reads n: autograd refuses it once n
    was changed in place.

    With `bias_grad`, a float32 tensor like bias (a view of a pool of gradients), the backward writes the rows of the
    slots that are named, leaves the others alone, and autograd gets no gradient of bias, which has to require one all
    the same. `x0_grad`, like x0, does the same for x0: it is written, or with `adds_x0` added to, so that the
    boundaries that share an x0 share one sum. Only the kernel takes the two.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, and a D that is a multiple of 16 up to 4096.
    ValueError: other shapes, dtypes or backends, tensors on several devices, one of a pair without the other, a pooled
    gradient with the reference.

    Example: x_out, x_in, n = residual_norm(x, branch, scale, push=True)
    """
    given = {"branch": branch, "pushed": pushed, "x0": x0}
    vectors = {"scale": scale, "skip": skip, "mix": mix, "bias": bias}
    _check(x, given, vectors, slots)
    if bias_grad is not None and (bias is None or bias_grad.shape != bias.shape or bias_grad.stride(1) != 1):
        raise ValueError(f"bias_grad is {list(bias_grad.shape)}; wanted: rows like those of bias, each contiguous")
    if bias_grad is not None and (bias_grad.dtype != torch.float32 or bias_grad.device != x.device):
        raise ValueError(f"bias_grad is {bias_grad.dtype} on {bias_grad.device}; wanted: float32 on {x.device}")
    if x0_grad is not None and (
        x0 is None or x0_grad.shape != x0.shape or x0_grad.dtype != x.dtype or not x0_grad.is_contiguous()
    ):
        raise ValueError(f"x0_grad is {x0_grad.dtype} {list(x0_grad.shape)}; wanted: like x0, contiguous")
    if _takes_reference(x, backend):
        for name, grad in (("bias_grad", bias_grad), ("x0_grad", x0_grad)):
            if grad is not None:
                raise ValueError(f"{name}: the reference has no backward of its own to write it; use backend='triton'")
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
    x_out, x_in, n, _ = _residual_norm(
        x, branch, scale, bias, slots, pushed, skip, mix, x0, bias_grad, x0_grad, adds_x0, *stored
    )
    if is_plain:
        x_out = x_in = x
    return ResidualNorm(x_out if push else None, None if last else x_in, n)


def _takes_reference(x: Tensor, backend: str | None) -> bool:
    """Whether `backend` means the reference; ValueError for an x that the kernel does not take."""
    if resolve_backend(backend, x) == "reference":
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
