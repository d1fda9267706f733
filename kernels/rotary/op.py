"""Launchers, the torch.library ops with their autograd, and the public function."""

import torch
import triton
from torch import Tensor

from ..dispatch import custom_op, refuse_gradients, resolve_backend
from ..rms_norm import EPS
from .backward import backward
from .forward import forward, pick_config
from .reference import norm_rotary_ref

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _launch(kernel, q: Tensor, k: Tensor, tensors: tuple[Tensor | None, ...], strided: tuple[Tensor, ...]) -> None:
    """Run `kernel` over all tokens: `tensors`, the number of tokens, the outer strides of `strided`."""
    batch, tokens, heads, head_dim = q.shape
    config = pick_config(max(heads, k.size(2)), head_dim)
    kernel[(batch * triton.cdiv(tokens, config.tokens),)](
        *tensors,
        tokens,
        *(stride for tensor in strided for stride in tensor.stride()[:3]),
        EPS=EPS,
        H=heads,
        G=k.size(2),
        D=head_dim,
        HEADS=min(config.heads, triton.next_power_of_2(heads)),
        HEADS_K=min(config.heads, triton.next_power_of_2(k.size(2))),
        TOKENS=config.tokens,
        HALF=config.half,
        num_warps=config.num_warps,
    )


def _with_whole_heads(tensor: Tensor) -> Tensor:
    """The tensor, copied only where the elements of a head are not side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


@custom_op("klora::norm_rotary", mutates_args=())
def _norm_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel():
        q, k = _with_whole_heads(q), _with_whole_heads(k)
        _launch(forward, q, k, (q, k, cos, sin, gain, q_out, k_out), (q, k))
    return q_out, k_out


@_norm_rotary.register_fake
def _(q, k, cos, sin, gain):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@custom_op("klora::norm_rotary_backward", mutates_args=())
def _norm_rotary_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor | None,
    wants_dgain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dgain = cos.new_empty(q.size(2) if wants_dgain else 0)
    if not q.numel():
        return dq, dk, dgain.zero_()
    dq_out, dk_out, q, k = (_with_whole_heads(t) for t in (dq_out, dk_out, q, k))
    sums = None
    if wants_dgain:
        tokens = pick_config(max(q.size(2), k.size(2)), q.size(3)).tokens
        sums = cos.new_empty(q.size(0) * triton.cdiv(q.size(1), tokens), q.size(2))
    tensors = dq_out, dk_out, q, k, cos, sin, gain, dq, dk, sums
    _launch(backward, q, k, tensors, (dq_out, dk_out, q, k))
    if wants_dgain:
        torch.sum(sums, 0, out=dgain)
    return dq, dk, dgain


@_norm_rotary_backward.register_fake
def _(dq_out, dk_out, q, k, cos, sin, gain, wants_dgain):
    return q.new_empty(q.shape), k.new_empty(k.shape), cos.new_empty(q.size(2) if wants_dgain else 0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dq_out, dk_out):
    wants_q, wants_k, _, _, wants_dgain = ctx.needs_input_grad
    dq, dk, dgain = _norm_rotary_backward(dq_out, dk_out, *ctx.saved_tensors, wants_dgain)
    return dq if wants_q else None, dk if wants_k else None, None, None, dgain if wants_dgain else None


_norm_rotary.register_autograd(_autograd, setup_context=_setup_context)


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
    refuse_gradients("detach it", cos=cos, sin=sin)
    backend = resolve_backend(backend, q)
    if q.dim() != 4 or q.size(3) % 2 or not q.size(2):
        raise ValueError(f"q is {list(q.shape)}; wanted: [B, S, H, d] with an even d and at least one head")
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.size(3) != q.size(3) or k.dtype != q.dtype or not k.size(2):
        wanted = [*q.shape[:2], "G", q.size(3)]
        raise ValueError(f"k is {k.dtype} {list(k.shape)}; wanted, beside q: {q.dtype} {wanted}")
    for name, tensor, shape in (
        ("cos", cos, [q.size(1), q.size(3) // 2]),
        ("sin", sin, [q.size(1), q.size(3) // 2]),
        ("gain", gain, [q.size(2)]),
        ("k", k, list(k.shape)),
    ):
        if tensor is not None and (list(tensor.shape) != shape or tensor.device != q.device):
            raise ValueError(f"{name} is {list(tensor.shape)} on {tensor.device}; wanted: {shape} on {q.device}")
    if backend == "reference":
        return norm_rotary_ref(q, cos, sin, gain), norm_rotary_ref(k, cos, sin)
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; the kernel wants bfloat16, float16 or float32")
    for name, tensor in (("cos", cos), ("sin", sin), ("gain", gain)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}; the kernel wants float32")
    return _norm_rotary(q, k, cos.contiguous(), sin.contiguous(), None if gain is None else gain.contiguous())
