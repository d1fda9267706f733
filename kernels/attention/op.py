"""The registered ops, their autograd, and the public function."""

import torch
from torch import Tensor

from ..dispatch import aligned, custom_op, keep_output, resolve_backend
from .backward import launch_backward
from .forward import launch_forward
from .reference import causal_attention_ref

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tail: int | None = None,
    *,
    start: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of `q` [B, S, H, d] over `k` and `v` [B, S, G, d] -> [B, T, H, d], contiguous, in their dtype.

    H is a multiple of G. T is `tail`, where only the last T queries are wanted, else S. q is given whole all the same,
    and its gradient is zero before them. q, k and v get gradients. The result may be changed in place: the backward,
    which reads it, then makes it again.

    `start` int32 [B, S] keeps documents of a row apart: token i sees tokens start_i to i. It must not fall along a row
    nor be beyond its own token (document_starts makes it); this is not checked, because that would wait for the GPU.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, and a head size d of 16, 32, 64 or 128. It copies tensors whose heads are not side by
    side elements, or whose rows are not a multiple of 16 bytes apart.
    ValueError: other shapes, dtypes, tails, starts or backends, tensors of several dtypes or devices.

    Example: out = causal_attention(q, k, v)
    """
    tail, backend = _validate(q, k, v, tail, backend)
    start = checked_start(start, q)
    if backend == "reference":
        return causal_attention_ref(q, k, v, start=start)[:, q.size(1) - tail :].contiguous()
    return causal_op(q, k, v, tail, start)[0]


def checked_start(start: Tensor | None, x: Tensor) -> Tensor | None:
    """`start`, contiguous; ValueError unless it is int32 [B, S] beside x [B, S, ...]."""
    if start is None:
        return None
    if start.dtype != torch.int32 or start.shape != x.shape[:2] or start.device != x.device:
        raise ValueError(
            f"start is {_describe(start)} on {start.device}; wanted int32 {list(x.shape[:2])} on {x.device}, the index "
            "of the first token of each token's document"
        )
    return start.contiguous()


@custom_op("klora::causal_attention", mutates_args=())
def causal_op(q: Tensor, k: Tensor, v: Tensor, tail: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out, and the logsumexp that the backward wants."""
    return launch_forward(aligned(q), aligned(k), aligned(v), tail, start=start)


@causal_op.register_fake
def _(q, k, v, tail, start=None):
    batch, _, heads, width = q.shape
    lse = q.new_empty(batch, heads, tail, dtype=torch.float32)
    return q.new_empty(batch, tail, heads, width), lse


@custom_op("klora::causal_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(aligned(dout), aligned(q), aligned(k), aligned(v), out, lse, start=start)[:3]


@_backward_op.register_fake
def _(dout, q, k, v, out, lse, start):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, ctx.tail, start = inputs
    out, ctx.is_changed = keep_output(output[0])
    ctx.save_for_backward(q, k, v, out, output[1], start)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 5
    q, k, v, out, lse, start = ctx.saved_tensors
    out = causal_op(q, k, v, ctx.tail, start)[0] if ctx.is_changed() else out
    grads = _backward_op(dout, q, k, v, out, lse, start)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None


causal_op.register_autograd(_backward, setup_context=_setup)


def _validate(q, k, v, tail, backend) -> tuple[int, str]:
    """(queries wanted, the backend that runs); raises ValueError on what no backend takes."""
    backend = resolve_backend(backend, q)
    if q.dim() != 4 or not q.size(2):
        raise ValueError(f"q is {_describe(q)}; wanted [B, S, H, d] with at least one head")
    if k.dim() != 4 or not k.size(2) or q.size(2) % k.size(2):
        raise ValueError(f"k is {_describe(k)}; wanted [B, S, G, d] with a G that divides q's {q.size(2)} heads")
    wanted = [*q.shape[:2], k.size(2), q.size(3)]
    for name, tensor in (("k", k), ("v", v)):
        if list(tensor.shape) != wanted or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {_describe(tensor)} on {tensor.device}; wanted, beside q: {q.dtype} {wanted} on {q.device}"
            )
    tail = q.size(1) if tail is None else tail
    if not 0 <= tail <= q.size(1):
        raise ValueError(f"tail is {tail}; allowed: 0 to S, {q.size(1)}")
    if backend == "triton" and q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; the kernel wants bfloat16, float16 or float32")
    if backend == "triton" and q.size(3) not in HEAD_DIMS:
        raise ValueError(f"d is {q.size(3)}; the kernel wants one of {', '.join(map(str, HEAD_DIMS))}")
    return tail, backend


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
