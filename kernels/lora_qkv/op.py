"""The registered ops, their autograd, and the public function."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import aligned, custom_op, empty_grad
from ..linear.op import linear_dweight
from .adapters import Adapters, adapters_of
from .backward import launch_backward
from .forward import empty_projected, launch_forward
from .reference import lora_qkv_ref
from .validate import expect_projections


@custom_op("klora::lora_qkv", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None,
    sizes: list[int],
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and what the backward wants: xa, and the adapters that had to be rounded (else empty). `grad_a` and
    `grad_b` are only passed on to it.
    """
    return launch_forward(x, weight, lora_a, lora_b, slots, sizes).flat()


@_op.register_fake
def _(x, weight, lora_a, lora_b, slots, sizes, grad_a, grad_b):
    return empty_projected(x, lora_a, lora_b, sizes).flat()


@custom_op("klora::lora_backward_", mutates_args=("dx", "da", "db"))
def backward_op(
    douts: list[Tensor],
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    xa: Tensor,
    slots: Tensor | None,
    kept: Tensor | None,
    scale: Tensor | None,
    rank: int,
    is_packed: bool,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
) -> None:
    """Writes dx, and the rows of dA and dB that `slots` name: of one product or of three. dx, or da and db, may be
    None; db alone where it was made elsewhere. `a` and `b` are lora_a and lora_b, or what was packed of them; `kept` is
    as of :func:`launch_backward`.
    """
    if x.numel():
        sizes = [dout.size(2) for dout in douts]
        adapters = Adapters(a, b, rank, None) if is_packed else adapters_of(x, a, b, slots, sizes)
        douts = [aligned(dout) for dout in douts]
        launch_backward(douts, aligned(x), aligned(weight), adapters, xa, slots, dx, da, db, kept, scale)
    else:  # sums over no tokens
        zero_named_rows([grad for grad in (da, db) if grad is not None], slots)


def zero_named_rows(grads: Sequence[Tensor], slots: Tensor | None) -> None:
    """Zeros to the rows of each gradient [slots, ..] that `slots` name, all of them without: a sum over no tokens."""
    for grad in grads:
        every = torch.arange(grad.size(0), device=grad.device)
        named = torch.ones_like(every, dtype=torch.bool) if slots is None else (slots[:, None] == every).any(0)
        grad.masked_fill_(named.view(-1, *(1,) * (grad.dim() - 1)), 0.0)


class Saved(NamedTuple):
    """The tensors that a backward of projections with adapters reads. They come first among those that an op saves."""

    x: Tensor
    weight: Tensor
    a: Tensor
    """lora_a, or what was packed of it"""
    b: Tensor
    xa: Tensor
    slots: Tensor | None

    @classmethod
    def of(cls, x, weight, lora_a, lora_b, slots, xa, packed_a, packed_b) -> "Saved":
        is_packed = lora_a is not None and packed_a.dim() == 3
        return cls(x, weight, *((packed_a, packed_b) if is_packed else (lora_a, lora_b)), xa, slots)

    @classmethod
    def split(cls, tensors: Sequence[Tensor | None]) -> tuple["Saved", Sequence[Tensor | None]]:
        """(these, the others) of the tensors that an op saved."""
        count = len(cls._fields)
        return cls(*tensors[:count]), tensors[count:]


class Lora(NamedTuple):
    """What :func:`gradients` knows of lora_a and lora_b, and the pools that their gradients go to."""

    a_shape: torch.Size
    b_shape: torch.Size
    dtype: torch.dtype
    grad_a: Tensor | None
    grad_b: Tensor | None

    @classmethod
    def of(cls, lora_a, lora_b, grad_a, grad_b) -> "Lora":
        return cls(lora_a.shape, lora_b.shape, lora_a.dtype, grad_a, grad_b)

    def empty_gradients(self, x: Tensor, slots: Tensor | None) -> list[Tensor]:
        """Memory for dA and dB; zeros where not every row is written."""
        fresh = x.new_empty if slots is None and x.numel() else x.new_zeros
        return [fresh(shape, dtype=self.dtype) for shape in (self.a_shape, self.b_shape)]


def gradients(
    saved: Saved,
    lora: Lora,
    needs: Sequence[bool],
    douts: Sequence[Tensor],
    kept: Tensor | None = None,
    scale: Tensor | None = None,
    is_packed: bool | None = None,
) -> tuple[Tensor | None, ...]:
    """Of x, weight, lora_a and lora_b, for which autograd `needs` them, by the gradients of the projections.

    `kept` and `scale` are as of :func:`launch_backward`. `is_packed` None: where the adapters' dtype is not x's.
    """
    x, slots = saved.x, saved.slots
    needs_x, needs_weight, needs_a, needs_b = needs
    da, db = lora.grad_a, lora.grad_b
    is_pooled = da is not None
    if not is_pooled and (needs_a or needs_b):
        da, db = lora.empty_gradients(x, slots)
    dx = empty_grad(x, needs_x)
    if needs_x or da is not None:
        kept = kept if needs_x else None
        is_packed = lora.dtype != x.dtype if is_packed is None else is_packed
        backward_op(list(douts), *saved, kept, scale, lora.b_shape[2], is_packed, dx, da, db)
    dweights = [linear_dweight(dout, x) for dout in douts] if needs_weight else [None]
    dweight = torch.cat(dweights) if len(dweights) > 1 else dweights[0]
    return dx, dweight, *(None if is_pooled or not needed else grad for grad, needed in ((da, needs_a), (db, needs_b)))


def _setup(ctx, inputs, output):
    x, weight, lora_a, lora_b, slots, ctx.sizes, *grads = inputs
    ctx.save_for_backward(*Saved.of(x, weight, lora_a, lora_b, slots, *output[3:]))
    ctx.lora = Lora.of(lora_a, lora_b, *grads)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, *douts):
    saved, _ = Saved.split(ctx.saved_tensors)
    return *gradients(saved, ctx.lora, ctx.needs_input_grad[:4], with_zeros(saved.x, douts[:3], ctx.sizes)), *(
        None,
    ) * 4


def with_zeros(x: Tensor, douts: Sequence[Tensor | None], sizes: Sequence[int]) -> list[Tensor]:
    """The gradients of the projections; zeros where autograd has none."""
    return [x.new_zeros(*x.shape[:2], n) if dout is None else dout for dout, n in zip(douts, sizes, strict=True)]


_op.register_autograd(_backward, setup_context=_setup)


def projected(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, slots: Tensor | None, sizes: Sequence[int]
) -> list[Tensor]:
    """Two or three projections of x [B, S, D]: `weight` [sum of `sizes`, D], `lora_a` [slots, 2 or 3, R, D] and
    `lora_b` [slots, sum of `sizes`, R]. The kernels take three; the third of two has no outputs.
    """
    if len(sizes) == 2:
        lora_a = torch.cat([lora_a, torch.zeros_like(lora_a[:, :1])], dim=1)
    outs = _op(x, weight, lora_a, lora_b, slots, [*sizes, 0][:3], None, None)
    return list(outs[: len(sizes)])


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    *,
    grads: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, Nq], k [B, S, Nk] and v [B, S, Nv] of `x` [B, S, D], by `weight` and each document's adapter.

    `weight` is [Nq+Nk+Nv, D] in x's dtype, `lora_a` [slots, 3, R, D] and `lora_b` [slots, Nq+Nk+Nv, R]. `sizes` is (Nq,
    Nk, Nv); None is three equal ones. `slots` int32 or int64 [B] names the adapter of each document, -1 none; None
    gives document b adapter b. Slots are not looked at on the host, and one past the pool counts as -1:
    :func:`check_slots` finds it.

    x, weight, lora_a and lora_b get gradients; that of weight is made by cuBLAS. A slot named twice gets the sum of the
    gradients, added in the order of the batch; with slots, the backward takes fp32 memory of an adapter's gradients for
    each document until then.

    The adapters may be views into a pool [slots, P], of x's dtype or float32. Those of x's dtype whose rows lie on 16
    bytes are read in place; others take a launch more. `grads` is two tensors shaped like lora_a and lora_b, of their
    dtype or float32 (views into a pool of gradients). With it the backward writes the rows of the slots that are named,
    leaves the other rows alone, and autograd gets no gradient of lora_a and lora_b; x or lora_a has to require one all
    the same. Only the kernel takes it.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, R up to 128, and D and sizes that are multiples of 16. It copies x, weight and
    incoming gradients that are not aligned rows (16 bytes), and adapters whose rows have gaps.
    ValueError: other shapes, dtypes, ranks, sizes or backends, tensors on several devices, `grads` with the reference.

    Example: q, k, v = lora_qkv(x, weight, lora_a, lora_b, slots, sizes)
    """
    backend, sizes, slots = expect_projections(x, weight, lora_a, lora_b, slots, sizes, grads, backend)
    if backend == "reference":
        return lora_qkv_ref(x, weight, lora_a, lora_b, tuple(sizes), slots)
    q, k, v, *_ = _op(x, weight, lora_a, lora_b, slots, sizes, *(grads or (None, None)))
    return q, k, v
