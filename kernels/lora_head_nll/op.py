"""The torch.library ops, their autograd, and the public functions."""

import torch
from torch import Tensor

from ..dispatch import (
    FLOATS,
    INTEGERS,
    custom_op,
    dtypes_of,
    empty_grad,
    expect,
    expect_multiples,
    expect_rows,
    expect_slots,
    resolve_backend,
)
from ..slots import is_in_pool
from .launch import Head, empty_outputs
from .reference import check_softcap, lora_head_nll_ref, softcap_nll_ref

MAX_RANK = 128


@custom_op("klora::head_nll", mutates_args=())
def _head_nll(
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    slots: Tensor | None,
    targets: Tensor,
    softcap: float,
    temperature: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = empty_outputs(h, weight, lora_a, keep)
    Head.of(h, weight, lora_a, lora_b, slots, targets, softcap, temperature).forward(outputs, keep)
    return outputs


@_head_nll.register_fake
def _(h, weight, lora_a, lora_b, slots, targets, softcap, temperature, keep):
    return empty_outputs(h, weight, lora_a, keep)


@custom_op("klora::head_nll_backward", mutates_args=("dh", "dweight", "dlora_a", "dlora_b"))
def _head_nll_backward(
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    slots: Tensor | None,
    targets: Tensor,
    softcap: float,
    temperature: float,
    dnll: Tensor,
    lse: Tensor,
    e: Tensor,
    u: Tensor,
    du: Tensor,
    dh: Tensor,
    dweight: Tensor | None,
    dlora_a: Tensor | None,
    dlora_b: Tensor | None,
) -> None:
    head = Head.of(h, weight, lora_a, lora_b, slots, targets, softcap, temperature)
    head.backward(dnll, lse, e, u, du, dh, dweight, dlora_a, dlora_b, fill=True)


def _setup_context(ctx, inputs, output):
    *ctx.numbers, _ = inputs[6:]
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dnll, *_):
    if dnll is None:
        return (None,) * 9
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad
    inputs, made = saved[:6], saved[6:]
    h, weight, lora_a, lora_b, *_ = inputs
    grads = empty_grad(h), empty_grad(weight, needed[1]), *(t if t is None else empty_grad(t) for t in (lora_a, lora_b))
    _head_nll_backward(*inputs, *ctx.numbers, dnll, *made, *grads)
    return *(g if wanted else None for g, wanted in zip(grads, needed, strict=False)), *(None,) * 5


_head_nll.register_autograd(_backward, setup_context=_setup_context)


@custom_op("klora::lora_head_nll_grads_", mutates_args=("nll", "dh", "dlora_a", "dlora_b"))
def _lora_head_nll_grads(
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    slots: Tensor | None,
    targets: Tensor,
    softcap: float,
    temperature: float,
    dnll: Tensor,
    nll: Tensor,
    dh: Tensor,
    dlora_a: Tensor | None,
    dlora_b: Tensor | None,
) -> None:
    head = Head.of(h, weight, lora_a, lora_b, slots, targets, softcap, temperature)
    _, *kept = empty_outputs(h, weight, lora_a, keep=True)
    head.forward((nll, *kept), keep=True)
    head.backward(dnll, *kept, dh, None, dlora_a, dlora_b, fill=False)


def _check(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    temperature: float,
    backend: str | None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    slots: Tensor | None = None,
) -> bool:
    """Whether `backend` means the reference; ValueError for arguments that it does not take."""
    backend = resolve_backend(backend, h)
    expect("h", h, ("B", "S", "D"), dtypes_of(backend))
    expect("weight", weight, ("V", h.size(2)), (h.dtype,), h.device)
    expect("targets", targets, h.shape[:2], INTEGERS, h.device)
    check_softcap(softcap, temperature)
    if backend == "triton":
        expect_multiples(16, D=h.size(2))
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b: wanted both or neither")
    if lora_a is not None:
        expect("lora_a", lora_a, ("slots", "R", h.size(2)), FLOATS, h.device)
        expect("lora_b", lora_b, (lora_a.size(0), weight.size(0), lora_a.size(1)), (lora_a.dtype,), h.device)
        expect_multiples(1, MAX_RANK, R=lora_a.size(1))
    expect_slots(slots, h.size(0), h.device, None if lora_a is None else lora_a.size(0))
    return backend == "reference"


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless every one of `targets` is -100 (not scored) or in [0, `vocabulary`).

    It reads the device: for debugging.

    Example: check_targets(targets, vocabulary=50)
    """
    scored = targets[targets != -100]
    if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < vocabulary:
        raise ValueError(
            f"targets go from {int(scored.min())} to {int(scored.max())}; allowed: -100 and 0 to {vocabulary - 1}"
        )


def softcap_nll(
    h: Tensor, weight: Tensor, targets: Tensor, softcap: float, temperature: float = 1.0, *, backend: str | None = None
) -> Tensor:
    """nll fp32 [...] of `targets` int32 or int64 [...] for `h` [..., D] under the head `weight` [V, D] of h's dtype.

    Logits are softcap * tanh(z / softcap) / temperature; `softcap` math.inf is none. A target outside [0, V) gives 0
    and no gradient. h and weight get gradients.
    Where gradients are wanted, 8,192 rows of bf16 and more take another kernel on Hopper: a row's last bits may then
    depend on how many rows there are. Kept for the backward: E [rows, V] in h's dtype. FLOPs: 2 rows D V forward, twice
    as many backward.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, and a D that is a multiple of 16.
    ValueError: other shapes, dtypes or backends, a softcap or `temperature` that is not above 0, tensors on several
    devices.

    Example: nll = softcap_nll(h, head, targets, softcap=30.0)
    """
    expect("targets", targets, h.shape[:-1], INTEGERS, h.device)
    rows = h.reshape(1, -1, h.size(-1))
    if _check(rows, weight, targets.reshape(1, -1), softcap, temperature, backend):
        return softcap_nll_ref(h, weight, targets, softcap, temperature)
    keep = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    nll, *_ = _head_nll(rows, weight, None, None, None, targets.reshape(1, -1), softcap, temperature, keep)
    return nll.view(targets.shape)


def lora_head_nll(
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    softcap: float,
    temperature: float = 1.0,
    slots: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """nll fp32 [B, S] of `targets` int32 or int64 [B, S] for `h` [B, S, D], row b adapted by slot slots[b].

    `weight` is [V, D] in h's dtype; `lora_a` [slots, R, D] and `lora_b` [slots, V, R] have one float dtype, R up to
    128. `slots` is int32 or int64 [B]; None takes slot b for row b. A slot outside the pool is no adapter. Without
    lora_a and lora_b no row has an adapter; slots still make the bits of a row independent of its batch, which
    :func:`softcap_nll` does not promise. h, weight, lora_a and lora_b get gradients.

    `softcap`, `temperature` and targets are those of :func:`softcap_nll`. `backend` is "reference" or "triton"; None
    takes the reference on a CPU and the kernel on a GPU.
    ValueError: what :func:`softcap_nll` refuses, adapters or slots of another shape or dtype.

    Example: nll = lora_head_nll(h, head, head_a, head_b, targets, softcap=30.0, slots=slots)
    """
    if _check(h, weight, targets, softcap, temperature, backend, lora_a, lora_b, slots):
        return lora_head_nll_ref(h, weight, lora_a, lora_b, targets, softcap, temperature, slots)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (h, weight, lora_a, lora_b))
    return _head_nll(h, weight, lora_a, lora_b, slots, targets, softcap, temperature, keep)[0]


@torch.no_grad()
def lora_head_nll_grads_(
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    dnll: Tensor,
    dlora_a: Tensor | None,
    dlora_b: Tensor | None,
    softcap: float,
    temperature: float = 1.0,
    slots: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(nll fp32 [B, S], dh [B, S, D]) in one call, for a loss whose gradient `dnll` fp32 [B, S] to nll is known before.

    `h`, `weight`, `lora_a`, `lora_b`, `targets`, `softcap`, `temperature` and `slots` are those of
    :func:`lora_head_nll`. No autograd, and no gradient of weight. dA and dB are written into `dlora_a` and `dlora_b`,
    which are shaped like the adapters and may be views of a flat pool; without adapters both are None. Slots that no
    row names keep their values.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU.
    ValueError: what :func:`lora_head_nll` refuses, a `dnll` or gradients of another shape, dtype or device.

    Example: nll, dh = lora_head_nll_grads_(h, head, head_a, head_b, targets, dnll, dhead_a, dhead_b, 30.0, slots=slots)
    """
    reference = _check(h, weight, targets, softcap, temperature, backend, lora_a, lora_b, slots)
    expect("dnll", dnll, targets.shape, FLOATS, h.device)
    for name, grad, of in (("dlora_a", dlora_a, lora_a), ("dlora_b", dlora_b, lora_b)):
        if (grad is None) != (of is None):
            raise ValueError(f"{name} is {'missing' if grad is None else 'given'}; wanted: one for each adapter matrix")
        if grad is not None:
            expect_rows(name, grad, of, FLOATS)
    if not reference:
        nll, dh = h.new_empty(h.shape[:2], dtype=torch.float32), empty_grad(h)
        about = h, weight, lora_a, lora_b, slots, targets, softcap, temperature
        _lora_head_nll_grads(*about, dnll, nll, dh, dlora_a, dlora_b)
        return nll, dh
    leaves = [t if t is None else t.detach().requires_grad_() for t in (h, lora_a, lora_b)]
    with torch.enable_grad():
        nll = lora_head_nll_ref(leaves[0], weight.detach(), *leaves[1:], targets, softcap, temperature, slots)
    dh, *grads = torch.autograd.grad(nll, [leaf for leaf in leaves if leaf is not None], dnll.to(nll.dtype))
    for out, grad in zip((dlora_a, dlora_b), grads, strict=False):  # no gradients without adapters
        named = slice(None) if slots is None else slots[is_in_pool(slots, len(out))].unique()
        out[named] = grad[named].to(out.dtype)
    return nll.detach(), dh
