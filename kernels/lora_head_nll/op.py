"""The torch.library ops, their autograd, and the public functions."""

import torch
from torch import Tensor

from ..dispatch import custom_op, resolve_backend
from ..slots import is_in_pool
from .launch import is_packed, launchable, outputs
from .reference import check_softcap, lora_head_nll_ref, softcap_nll_ref

MAX_RANK = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int32, torch.int64)


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
    return launchable(h, weight, lora_a, lora_b, slots, targets, softcap, temperature).forward(keep)


@_head_nll.register_fake
def _(h, weight, lora_a, lora_b, slots, targets, softcap, temperature, keep):
    return outputs(h, weight, lora_a, keep)


@custom_op("klora::head_nll_backward", mutates_args=())
def _head_nll_backward(
    dnll: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    slots: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    e: Tensor,
    u: Tensor,
    du: Tensor,
    softcap: float,
    temperature: float,
    wants_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = launchable(h, weight, lora_a, lora_b, slots, targets, softcap, temperature)
    dnll = dnll.contiguous()
    wanted = (h, weight if wants_dweight else None, lora_a, lora_b)
    if not h.numel():
        return tuple(h.new_empty(0) if t is None else t.new_zeros(t.shape) for t in wanted)
    dweight, da, db = (h.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted[1:])
    if lora_a is None and wants_dweight:
        return *head.plain_gradients(dnll, lse, e), da, db
    if lora_a is not None:
        head.adapter_gradient(dnll, lse, e, u, du, da, db, fill=True)
    if wants_dweight:
        dweight = head.plain_gradients(dnll, lse, e)[1]
    return head.hidden_gradient(dnll, lse, e, du), dweight, da, db


@_head_nll_backward.register_fake
def _(dnll, h, weight, lora_a, lora_b, slots, targets, lse, e, u, du, softcap, temperature, wants_dweight):
    def like(t: Tensor | None) -> Tensor:
        return h.new_empty(0) if t is None else t.new_empty(t.shape)

    return like(h), like(weight if wants_dweight else None), like(lora_a), like(lora_b)


def _setup_context(ctx, inputs, output):
    h, weight, lora_a, lora_b, slots, targets, ctx.softcap, ctx.temperature, _ = inputs
    ctx.save_for_backward(h, weight, lora_a, lora_b, slots, targets, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dnll, *_):
    if dnll is None:
        return (None,) * 9
    wants_dweight = ctx.needs_input_grad[1]
    grads = _head_nll_backward(dnll, *ctx.saved_tensors, ctx.softcap, ctx.temperature, wants_dweight)
    dh, dweight, da, db = (g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return dh, dweight, da, db, *(None,) * 5


_head_nll.register_autograd(_backward, setup_context=_setup_context)


@custom_op("klora::lora_head_nll_grads_", mutates_args=("dlora_a", "dlora_b"))
def _lora_head_nll_grads(
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    slots: Tensor | None,
    targets: Tensor,
    dnll: Tensor,
    dlora_a: Tensor | None,
    dlora_b: Tensor | None,
    softcap: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    head = launchable(h, weight, lora_a, lora_b, slots, targets, softcap, temperature)
    nll, lse, e, u, du = head.forward(keep=True)
    if not h.numel():
        return nll, torch.empty_like(h)
    dnll = dnll.contiguous()
    if lora_a is not None:
        head.adapter_gradient(dnll, lse, e, u, du, dlora_a, dlora_b, fill=False)
    return nll, head.hidden_gradient(dnll, lse, e, du)


@_lora_head_nll_grads.register_fake
def _(h, weight, lora_a, lora_b, slots, targets, dnll, dlora_a, dlora_b, softcap, temperature):
    return h.new_empty(h.shape[:2], dtype=torch.float32), h.new_empty(h.shape)


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
    if targets.shape != h.shape[:-1]:
        raise ValueError(f"targets are {list(targets.shape)}; wanted for h {list(h.shape)}: {list(h.shape[:-1])}")
    rows = h.reshape(1, -1, h.size(-1))
    if _takes_reference(rows, weight, targets.reshape(1, -1), softcap, temperature, backend):
        return softcap_nll_ref(h, weight, targets, softcap, temperature)
    keep = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    outputs = _head_nll(rows, weight, None, None, None, targets.reshape(1, -1), softcap, temperature, keep)
    return outputs[0].view(targets.shape)


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
    if _takes_reference(h, weight, targets, softcap, temperature, backend, lora_a, lora_b, slots):
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
    reference = _takes_reference(h, weight, targets, softcap, temperature, backend, lora_a, lora_b, slots)
    if dnll.shape != targets.shape:
        raise ValueError(f"dnll is {list(dnll.shape)}; wanted: {list(targets.shape)}")
    if not dnll.is_floating_point() or dnll.device != h.device:
        raise ValueError(f"dnll is {dnll.dtype} on {dnll.device}; wanted: float32 on {h.device}")
    for name, grad, of in (("dlora_a", dlora_a, lora_a), ("dlora_b", dlora_b, lora_b)):
        if (grad is None) != (of is None):
            raise ValueError(f"{name} is {'missing' if grad is None else 'given'}; wanted: one for each adapter matrix")
        if grad is None:
            continue
        if grad.shape != of.shape or grad.device != h.device or not is_packed(grad):
            raise ValueError(
                f"{name} is {list(grad.shape)} of strides {grad.stride()} on {grad.device}; wanted: "
                f"{list(of.shape)} on {h.device}, each slot contiguous"
            )
    if not reference:
        return _lora_head_nll_grads(
            h, weight, lora_a, lora_b, slots, targets, dnll, dlora_a, dlora_b, softcap, temperature
        )
    leaves = [t if t is None else t.detach().requires_grad_() for t in (h, lora_a, lora_b)]
    with torch.enable_grad():
        nll = lora_head_nll_ref(leaves[0], weight.detach(), *leaves[1:], targets, softcap, temperature, slots)
    dh, *grads = torch.autograd.grad(nll, [leaf for leaf in leaves if leaf is not None], dnll.to(nll.dtype))
    for out, grad in zip((dlora_a, dlora_b), grads, strict=False):  # no gradients without adapters
        named = slice(None) if slots is None else slots[is_in_pool(slots, len(out))].unique()
        out[named] = grad[named].to(out.dtype)
    return nll.detach(), dh


def _takes_reference(
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
    reference = resolve_backend(backend, h) == "reference"
    if h.dim() != 3 or weight.dim() != 2 or h.size(2) != weight.size(1):
        raise ValueError(f"h is {list(h.shape)} and weight {list(weight.shape)}; wanted: [B, S, D] and [V, D]")
    if targets.shape != h.shape[:2] or targets.dtype not in INTEGERS:
        raise ValueError(
            f"targets are {targets.dtype} {list(targets.shape)}; wanted: int32 or int64 {list(h.shape[:2])}"
        )
    check_softcap(softcap, temperature)
    if h.dtype != weight.dtype or not (reference or h.dtype in DTYPES):
        raise ValueError(f"h is {h.dtype} and weight {weight.dtype}; allowed: both bfloat16, float16 or float32")
    if not reference and h.size(2) % 16:
        raise ValueError(f"D is {h.size(2)}; the kernel wants a multiple of 16")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b: wanted both or neither")
    if lora_a is not None:
        _check_adapters(h, weight, lora_a, lora_b, slots)
    if slots is not None and (slots.shape != h.shape[:1] or slots.dtype not in INTEGERS):
        raise ValueError(f"slots are {slots.dtype} {list(slots.shape)}; wanted: int32 or int64 [{h.size(0)}]")
    for name, t in (("weight", weight), ("targets", targets), ("lora_a", lora_a), ("lora_b", lora_b), ("slots", slots)):
        if t is not None and t.device != h.device:
            raise ValueError(f"{name} is on {t.device} and h on {h.device}; all must be on one device")
    return reference


def _check_adapters(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, slots: Tensor | None) -> None:
    wanted = [lora_a.size(0), lora_a.size(1), h.size(2)] if lora_a.dim() == 3 else None
    if wanted is None or list(lora_a.shape) != wanted or not 1 <= wanted[1] <= MAX_RANK:
        raise ValueError(f"lora_a is {list(lora_a.shape)}; wanted: [slots, R, {h.size(2)}] with R from 1 to {MAX_RANK}")
    wanted = [lora_a.size(0), weight.size(0), lora_a.size(1)]
    if list(lora_b.shape) != wanted or lora_b.dtype != lora_a.dtype:
        raise ValueError(f"lora_b is {lora_b.dtype} {list(lora_b.shape)}; wanted: {lora_a.dtype} {wanted}")
    if slots is None and lora_a.size(0) != h.size(0):
        raise ValueError(f"{lora_a.size(0)} adapters for {h.size(0)} batch rows: without slots they must be as many")
