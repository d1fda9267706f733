"""Launchers, the torch.library ops with their autograd, and the public function."""

import torch
from torch import Tensor

from ..dispatch import (
    DTYPES,
    cdiv,
    custom_op,
    describe,
    empty_as,
    empty_grad,
    expect,
    next_power_of_2,
    refuse_gradients,
    resolve_backend,
)
from ..rms_norm import EPS
from .backward import backward
from .forward import forward, pick_config
from .reference import norm_rotary_ref


def _launch(kernel, q: Tensor, k: Tensor, **arguments: Tensor | int | None) -> None:
    """Run `kernel` over all tokens, with its own `arguments`."""
    batch, tokens, heads, head_dim = q.shape
    config = pick_config(max(heads, k.size(2)), head_dim)
    (q_b, q_s, q_h, _), (k_b, k_s, k_h, _) = q.stride(), k.stride()
    kernel[(batch * cdiv(tokens, config.tokens),)](
        **arguments, q_ptr=q, k_ptr=k, tokens=tokens, q_stride_b=q_b, q_stride_s=q_s, q_stride_h=q_h, k_stride_b=k_b,
        k_stride_s=k_s, k_stride_h=k_h, EPS=EPS, H=heads, G=k.size(2), D=head_dim,
        HEADS=min(config.heads, next_power_of_2(heads)),
        HEADS_K=min(config.heads, next_power_of_2(k.size(2))),
        TOKENS=config.tokens, HALF=config.half, num_warps=config.num_warps,
    )  # fmt: skip


def with_whole_heads(tensor: Tensor) -> Tensor:
    """The tensor, copied only where the elements of a head are not side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


@custom_op("klora::norm_rotary", mutates_args=())
def _op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    q_out, k_out = empty_as(q), empty_as(k)
    if q.numel():
        q, k = with_whole_heads(q), with_whole_heads(k)
        _launch(forward, q, k, cos_ptr=cos, sin_ptr=sin, gain_ptr=gain, q_out_ptr=q_out, k_out_ptr=k_out)
    return q_out, k_out


@_op.register_fake
def _(q, k, cos, sin, gain):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@custom_op("klora::norm_rotary_backward_", mutates_args=("dq", "dk", "dgain"))
def _backward_op(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dgain: Tensor | None,
) -> None:
    sums = None
    if dgain is not None:
        tokens = pick_config(max(q.size(2), k.size(2)), q.size(3)).tokens
        sums = cos.new_empty(q.size(0) * cdiv(q.size(1), tokens), q.size(2))
    if q.numel():
        dq_out, dk_out, q, k = (with_whole_heads(t) for t in (dq_out, dk_out, q, k))
        (q_b, q_s, q_h, _), (k_b, k_s, k_h, _) = dq_out.stride(), dk_out.stride()
        _launch(
            backward, q, k, dq_out_ptr=dq_out, dk_out_ptr=dk_out, cos_ptr=cos, sin_ptr=sin, gain_ptr=gain, dq_ptr=dq,
            dk_ptr=dk, sums_ptr=sums, dq_stride_b=q_b, dq_stride_s=q_s, dq_stride_h=q_h, dk_stride_b=k_b,
            dk_stride_s=k_s, dk_stride_h=k_h,
        )  # fmt: skip
    if dgain is not None:
        torch.sum(sums, 0, out=dgain)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dq_out, dk_out):
    q, k, cos, sin, gain = ctx.saved_tensors
    wants_q, wants_k, _, _, wants_dgain = ctx.needs_input_grad
    dq, dk, dgain = empty_grad(q), empty_grad(k), cos.new_empty(q.size(2)) if wants_dgain else None
    _backward_op(dq_out, dk_out, q, k, cos, sin, gain, dq, dk, dgain)
    return dq if wants_q else None, dk if wants_k else None, None, None, dgain


_op.register_autograd(_autograd, setup_context=_setup_context)


def expect_tables(
    cos: Tensor,
    sin: Tensor,
    gain: Tensor | None,
    shape: tuple[int, ...],
    heads: int,
    device: torch.device,
    backend: str,
) -> None:
    """Raise unless cos and sin have this shape and no gradient, and gain is [heads]; for the kernel in float32."""
    refuse_gradients("detach it", cos=cos, sin=sin)
    dtypes = (torch.float32,) if backend == "triton" else ()
    for name, tensor, wanted in (("cos", cos, shape), ("sin", sin, shape), ("gain", gain, (heads,))):
        if tensor is not None or name != "gain":
            expect(name, tensor, wanted, dtypes, device)


def norm_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`q` [B, S, H, d] and `k` [B, S, G, d], each head normed to rms 1 and rotated, q's times `gain` [H].

    q and k are of one dtype, which is that of the results. `cos` and `sin` are [S, d/2]; they may be of any length, not
    of unit length alone. The three tables are float32 for the kernel; gain may be None. q, k and gain get gradients.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32.
    ValueError: other shapes, an odd d, other dtypes or backends, tensors on several devices, a cos or sin that requires
    a gradient.

    Example: q, k = norm_rotary(q, k, cos, sin, gain)
    """
    backend = resolve_backend(backend, q)
    expect("q", q, ("B", "S", "H", "d"), DTYPES if backend == "triton" else ())
    batch, tokens, heads, head_dim = q.shape
    expect("k", k, (batch, tokens, "G", head_dim), (q.dtype,), q.device)
    if head_dim % 2 or not heads or not k.size(2):
        raise ValueError(f"q is {describe(q)} and k {describe(k)}; wanted an even d and at least one head of each")
    expect_tables(cos, sin, gain, (tokens, head_dim // 2), heads, q.device, backend)
    if backend == "reference":
        return norm_rotary_ref(q, cos, sin, gain), norm_rotary_ref(k, cos, sin)
    return _op(q, k, cos.contiguous(), sin.contiguous(), None if gain is None else gain.contiguous())
