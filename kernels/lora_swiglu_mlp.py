"""SwiGLU MLP with a LoRA adapter a document on any of its matrices: out = Wd (silu(Wg x) * (Wu x)), adapted.

    g = x Wg^T + (x Ag^T) Bg^T;   u = x Wu^T + (x Au^T) Bu^T;   h = silu(g) u;   out = h Wd^T + (h Ad^T) Bd^T
    td = dout Bd;   dh = dout Wd + td Ad;   dg, du of :mod:`klora.kernels.swiglu`
    tg = dg Bg;   tu = du Bu;   dx = dg Wg + tg Ag + du Wu + tu Au
    dAd = td^T h;   dBd = dout^T (h Ad^T);   dAg = tg^T x;   dBg = dg^T (x Ag^T);   as many of u
    dWd = dout^T h;   dWg = dg^T x;   dWu = du^T x      where a weight requires a gradient, by cuBLAS

x [B, S, D]; gate (Wg) and up (Wu) [hidden, D], down (Wd) [D, hidden]; gate_a and up_a [slots, R, D], gate_b and up_b
[slots, hidden, R]; down_a [slots, R, hidden], down_b [slots, D, R]; each with ranks and a scale of B as `lora_linear`
has them. SwiGLU: Shazeer 2020.

gate and up are one product: their weights are copied one behind the other, and all their adapters, rounded to x's
dtype, padded to one rank and times their scale. down is a joint `lora_linear`. A matrix without an adapter is a product
of `linear`; of gate and up, where one has an adapter, the other gets zeros. g, u and dh are rounded before they are
read again, as PyTorch rounds them. Kept for the backward: g, u and h, and what the adapters' launches keep.

FLOPs a row: 6 D hidden forward, as many for dx, and those of the adapters. Tensors [.., hidden]: forward g, u and h are
written, and read once each. Backward dh is written; dh, g and u are read, and dg and du written, in one pass that also
makes dB of gate and up and dA of down (:mod:`.lora_swiglu_backward`); dg and du are read once. Where down, or both gate
and up, have no adapter that gets a gradient, in fp32, above 16 ranks and for few documents SwiGLU's gradient is a pass
of its own, with launches of their own for dA and dB.

Every sum is made in a fixed order: the same bits in every run and in every batch. D and hidden are
multiples of 16, ranks up to 128.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, float32

from .dispatch import (
    INTEGERS,
    custom_op,
    dtypes_of,
    empty_as,
    expect,
    expect_slots,
    refuse_gradients,
    resolve_backend,
    round_up,
)
from .int6.layout import Int6Matrix
from .linear.op import linear_dweight
from .linear.product import GATE, launch_product
from .lora_linear import is_one_product, lora_linear_ref
from .lora_linear.plan import plan
from .lora_linear.stacked import RANKS
from .lora_qkv.adapters import launch_pack
from .lora_qkv.forward import empty_projected, launch_forward, not_projected
from .lora_qkv.op import Lora, Saved, gradients
from .lora_qkv.validate import expect_product
from .lora_swiglu_backward import adapted_slopes_, takes_slopes
from .mlp import swiglu_dx_, swiglu_slopes_
from .swiglu import swiglu_backward_, swiglu_ref

NAMES = "gate", "up", "down"


def lora_swiglu_mlp_ref(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_a: Tensor | None = None,
    gate_b: Tensor | None = None,
    up_a: Tensor | None = None,
    up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    scale: Sequence[Tensor | None] | None = None,
    ranks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """out [B, S, D] of `x` [B, S, D] by `gate` and `up` [hidden, D] and `down` [D, hidden], all of one float dtype.

    `gate_a`, `gate_b`, `up_a`, `up_b`, `down_a`, `down_b` and `slots` are as of :func:`lora_linear_ref`; None is no
    adapter on that matrix. `scale` and `ranks` have an entry for gate, up and down each. Autograd gives all gradients.

    Example: out = lora_swiglu_mlp_ref(x, up, up, down, up_a, up_b, up_a, up_b, down_a, down_b, slots)
    """

    def product(number: int, rows: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        if a is None:
            return F.linear(rows, weight)
        more = {"scale": None if scale is None else scale[number], "ranks": None if ranks is None else ranks[number]}
        return lora_linear_ref(rows, weight, a, b, slots, **more)

    h = swiglu_ref(product(0, x, gate, gate_a, gate_b), product(1, x, up, up_a, up_b))
    return product(2, h, down, down_a, down_b)


@custom_op("klora::lora_swiglu_mlp", mutates_args=())
def _op(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_a: Tensor | None,
    gate_b: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    slots: Tensor | None,
    gate_scale: Tensor | None,
    up_scale: Tensor | None,
    down_scale: Tensor | None,
    gate_ranks: Tensor | None,
    up_ranks: Tensor | None,
    down_ranks: Tensor | None,
) -> list[Tensor]:
    """out; g, u and h [B, S, hidden]; of gate and up x A^T and the stacked adapters; of down h A^T, and the adapters
    that had to be rounded or scaled. What is not there is empty. `gate_up` [2 hidden, D] is stacked.
    """
    factors = (gate_a, gate_b), (up_a, up_b)
    stacked = _stacked(x, down.size(1), factors, (gate_scale, up_scale), (gate_ranks, up_ranks))
    g, u, h, *kept = _gated(x, gate_up, stacked, slots)
    out, *kept_down = _product(h, down, down_a, down_b, slots, down_scale, down_ranks)
    return [out, g, u, h, *kept, *kept_down]


@_op.register_fake
def _(x, gate_up, down, gate_a, gate_b, up_a, up_b, down_a, down_b, slots, *about):
    g, u, h = (x.new_empty(*x.shape[:2], down.size(1)) for _ in range(3))
    stacked = _empty_stacked(x, down.size(1), (gate_a, up_a))
    kept = kept_down = not_projected(x)
    if stacked is not None:
        kept = empty_projected(x, *stacked, [down.size(1), down.size(1), 0]).xa, *stacked
    if down_a is not None:
        is_packed = _is_packed(down_a, x, about[2], about[5])
        kept_down = empty_projected(h, down_a, down_b, [down.size(0)], is_packed=is_packed).flat()[1:]
    return [x.new_empty(x.shape), g, u, h, *kept, *kept_down]


Factors = tuple[Tensor | None, Tensor | None]


def _empty_stacked(x: Tensor, hidden: int, lora_a: Sequence[Tensor | None]) -> tuple[Tensor, Tensor] | None:
    """Memory for A [slots, 3, R, D] and B [slots, 2 hidden, R], as the kernels take three projections; zeros where no
    adapter is. None where gate and up have none. R holds both pools', and is a multiple of RANKS.
    """
    given = [a for a in lora_a if a is not None]
    if not given:
        return None
    slots, rank = len(given[0]), round_up(max(a.size(1) for a in given), RANKS)
    new_b = x.new_empty if len(given) == 2 else x.new_zeros
    return x.new_zeros(slots, 3, rank, x.size(2)), new_b(slots, 2 * hidden, rank)


def _stacked(
    x: Tensor,
    hidden: int,
    factors: Sequence[Factors],
    scales: Sequence[Tensor | None],
    ranks: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor] | None:
    """The adapters of gate and up as one."""
    stacked = _empty_stacked(x, hidden, [a for a, _ in factors])
    if stacked is None:
        return None
    for (a, b), scale, rank, *part in zip(factors, scales, ranks, *_parts(*stacked), strict=True):
        if a is not None:
            launch_pack(a, b, None, [hidden], scale, rank, *part)
    return stacked


def _parts(stacked_a: Tensor, stacked_b: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """A of gate and of up, and B of both."""
    return stacked_a.unbind(1)[:2], stacked_b.chunk(2, dim=1)


def _is_packed(lora_a: Tensor | None, x: Tensor, scale: Tensor | None, ranks: Tensor | None) -> bool:
    return lora_a is not None and (lora_a.dtype != x.dtype or scale is not None or ranks is not None)


def _gated(x, gate_up, stacked, slots) -> tuple[Tensor, ...]:
    """g, u and h, x A^T and the stacked adapters."""
    hidden = gate_up.size(0) // 2
    h = x.new_empty(*x.shape[:2], hidden)
    if stacked is None:
        g, u = launch_product(x, gate_up[:hidden]), empty_as(h)
        launch_product(x, gate_up[hidden:], epilogue=GATE, kept=u.view(-1, hidden), gate=g, result=h)
        return g, u, h, *not_projected(x)
    made = launch_forward(x, gate_up, *stacked, slots, [hidden, hidden, 0], h=h)
    return *made.outs[:2], h, made.xa, *stacked


def _product(x, weight, lora_a, lora_b, slots, scale, ranks) -> tuple[Tensor, ...]:
    """The product, x A^T and the packed adapters."""
    if lora_a is None:
        return launch_product(x, weight), *not_projected(x)
    return launch_forward(x, weight, lora_a, lora_b, slots, [weight.size(0)], scale=scale, ranks=ranks).flat()


def _setup(ctx, inputs, output):
    x, gate_up, down, *lora, slots, gate_scale, up_scale, down_scale, _, _, down_ranks = inputs
    _, g, u, h, xa, stacked_a, stacked_b, *made = output
    down_a, down_b = lora[4:]
    of_gate_up = Saved(x, gate_up, stacked_a, stacked_b, xa, slots)
    of_down = Saved.of(h, down, down_a, down_b, slots, *made)
    ctx.save_for_backward(*of_gate_up, *of_down, g, u, gate_scale, up_scale, down_scale)
    ctx.ranks = [None if a is None else a.size(1) for a in lora[:4:2]]
    kind = next((a.dtype for a in lora[:4:2] if a is not None), None)
    ctx.gate_up = None if kind is None else Lora(stacked_a.shape, stacked_b.shape, kind, None, None)
    ctx.down = None if down_a is None else Lora.of(down_a, down_b, None, None)
    ctx.is_packed = _is_packed(down_a, x, down_scale, down_ranks)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, douts):
    dout, needs = douts[0], ctx.needs_input_grad
    if dout is None:
        return (None,) * 16
    of_gate_up, others = Saved.split(ctx.saved_tensors)
    of_down, (g, u, gate_scale, up_scale, down_scale) = Saved.split(others)
    needs_gate_up = (*needs[:2], any(needs[3:7:2]), any(needs[4:7:2]))
    needs_down = (any(needs_gate_up), needs[2], *needs[7:9])
    scale = _both_scales(gate_scale, up_scale, of_gate_up.a) if needs_gate_up[3] else None
    makes = _of_adapted if _is_one_launch(ctx, g, needs_gate_up, needs_down) else _one_by_one
    of_gate_up, of_down = makes(ctx, dout, of_gate_up, of_down, g, u, scale, down_scale, needs_gate_up, needs_down)
    dx, dgate_up, da, db = of_gate_up
    ddown, *down_lora = of_down
    return dx, dgate_up, ddown, *_of_matrices(da, db, ctx.ranks, needs[3:7]), *down_lora, *(None,) * 7


Gradients = Sequence[Tensor | None]


def _is_one_launch(ctx, g: Tensor, needs_gate_up: Sequence[bool], needs_down: Sequence[bool]) -> bool:
    """Whether what reads dh is one launch: where it has something to add up of gate and up, and of down."""
    if not (any(needs_gate_up[2:]) and any(needs_down[2:])):
        return False
    return takes_slopes(g, ctx.gate_up.b_shape[2], ctx.down.b_shape[2])


def _of_adapted(
    ctx, dout, of_gate_up, of_down, g, u, scale, down_scale, needs_gate_up, needs_down
) -> tuple[Gradients, Gradients]:
    """Of x, both weights, A and B of gate and up; of the weight, A and B of down. All that reads dh is one launch."""
    da, db = ctx.gate_up.empty_gradients(of_gate_up.x, of_gate_up.slots)
    down_lora = ctx.down.empty_gradients(of_down.x, of_down.slots)
    dg, du = empty_as(g), empty_as(u)
    about = of_gate_up.xa, scale, down_scale, ctx.down.b_shape[2], ctx.is_packed
    adapted_slopes_(dout, *of_down, g, u, *about, dg, du, db, *down_lora)
    into_da = ctx.gate_up._replace(grad_a=da)  # dB is made
    dx, dgate_up, _, _ = gradients(of_gate_up, into_da, needs_gate_up, _three(dg, du), is_packed=False)
    ddown = linear_dweight(dout, of_down.x) if needs_down[1] else None
    wanted = [grad if needed else None for grad, needed in zip(down_lora, needs_down[2:], strict=True)]
    return (dx, dgate_up, da, db), (ddown, *wanted)


def _one_by_one(
    ctx, dout, of_gate_up, of_down, g, u, scale, down_scale, needs_gate_up, needs_down
) -> tuple[Gradients, Gradients]:
    """As :func:`_of_adapted`, SwiGLU's gradient between the launches of down and those of gate and up."""
    needs_slopes = needs_down[0]
    dg, du = (empty_as(g), empty_as(u)) if needs_slopes else (None, None)
    if ctx.down is None:
        down = _of_product(dout, of_down, g, u, dg, du, needs_down[1])
    else:
        about = {"scale": down_scale, "is_packed": ctx.is_packed}
        dh, *down = gradients(of_down, ctx.down, needs_down, [dout], **about)
        if needs_slopes:
            swiglu_backward_(dh, g, u, dg, du)
    if not needs_slopes:
        return (None,) * 4, down
    if ctx.gate_up is None:
        return (*_of_products(dg, du, of_gate_up, *needs_gate_up[:2]), None, None), down
    about = {"scale": scale, "is_packed": False}
    return gradients(of_gate_up, ctx.gate_up, needs_gate_up, _three(dg, du), **about), down


def _three(dg: Tensor, du: Tensor) -> list[Tensor]:
    """With that of the third projection, which has no outputs."""
    return [dg, du, dg.new_empty(*dg.shape[:2], 0)]


def _both_scales(gate_scale: Tensor | None, up_scale: Tensor | None, stacked_a: Tensor) -> Tensor | None:
    """[2, slots], with 1 for one that is missing; None where both are."""
    if gate_scale is None and up_scale is None:
        return None
    both = gate_scale, up_scale
    return torch.stack([stacked_a.new_ones(len(stacked_a), dtype=float32) if one is None else one for one in both])


def _of_matrices(da, db, ranks: Sequence[int | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of A and B of gate, then of up, up to their `ranks`, of the stacked ones."""
    das, dbs = (None, None) if da is None else da.unbind(1)[:2], (None, None) if db is None else db.chunk(2, dim=1)
    found: list[Tensor | None] = []
    for a, b, rank, needs_a, needs_b in zip(das, dbs, ranks, needs[::2], needs[1::2], strict=True):
        found += [a[:, :rank] if needs_a else None, b[..., :rank] if needs_b else None]
    return found


def _of_product(dout, saved, g, u, dg, du, needs_weight) -> Gradients:
    """Writes dg and du, where they are given, by a weight without an adapter; its gradient, and none of A and B."""
    if dg is not None:
        swiglu_slopes_(dout, g, u, saved.weight, dg, du.view(-1, du.size(2)))
    return linear_dweight(dout, saved.x) if needs_weight else None, None, None


def _of_products(dg, du, saved, needs_x, needs_weight) -> Gradients:
    """Of x and of both weights, without adapters."""
    dx = empty_as(saved.x) if needs_x else None
    if needs_x:
        swiglu_dx_(dg, du, *saved.weight.chunk(2), dx)
    return dx, torch.cat([linear_dweight(d, saved.x) for d in (dg, du)]) if needs_weight else None


_op.register_autograd(_backward, setup_context=_setup)


def is_one_op(
    x: Tensor,
    weights: Sequence[Tensor | Int6Matrix],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    backend: str | None = None,
) -> bool:
    """Whether :func:`lora_linear` would make gate and up of x in one launch and down in another, for which this op
    stands: frozen dense weights without bias, and sizes and ranks that those launches are for. In that order.
    """
    down, b = weights[2], lora_b[2]
    return (
        is_one_product(x, weights[:2], lora_a[:2], lora_b[:2], biases[:2], backend)
        and biases[2] is None
        and not (isinstance(down, Int6Matrix) or down.requires_grad)
        and plan([tuple(down.shape)], x.dtype, x.size(0), x.size(1), b.size(2)) == "joint"
    )


def lora_swiglu_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_a: Tensor | None = None,
    gate_b: Tensor | None = None,
    up_a: Tensor | None = None,
    up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    scale: Sequence[Tensor | None] | None = None,
    ranks: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """out [B, S, D] of `x` [B, S, D]: Wd (silu(Wg x) * (Wu x)) with `gate` (Wg) and `up` (Wu) [hidden, D] and `down`
    (Wd) [D, hidden], adapted: the MLP of Llama, Mistral and Qwen.

    `gate_a` and `up_a` are [slots, R, D], `gate_b` and `up_b` [slots, hidden, R], `down_a` [slots, R, hidden] and
    `down_b` [slots, D, R], of x's dtype or float32, each with an R of its own; None is no adapter on that matrix.
    `slots`, and of `scale` float32 [slots] and `ranks` int32 or int64 [slots] the three entries for gate, up and down,
    are as of :func:`lora_linear`, with the same memory in the backward. x, the weights and the adapters get gradients.
    Each call copies the weights gate and up, and all slots of their adapters: a pool is best as small as the batch.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32, ranks up to 128, and D and hidden that are multiples of 16.
    ValueError: other shapes, dtypes, ranks or backends, tensors on several devices, half an adapter, a scale that
    requires a gradient.

    Example: out = lora_swiglu_mlp(x, up, up, down, up_a, up_b, up_a, up_b, down_a, down_b, slots)
    """
    backend = resolve_backend(backend, x)
    weights, lora_a, lora_b = (gate, up, down), (gate_a, up_a, down_a), (gate_b, up_b, down_b)
    slots = _expect(x, weights, lora_a, lora_b, slots, scale, ranks, backend)
    if backend == "reference":
        lora = (tensor for pair in zip(lora_a, lora_b, strict=True) for tensor in pair)
        return lora_swiglu_mlp_ref(x, *weights, *lora, slots, scale=scale, ranks=ranks)
    about = [None if t is None else t.contiguous() for given in (scale, ranks) for t in given or (None,) * 3]
    lora = [factor for pair in zip(lora_a, lora_b, strict=True) for factor in pair]
    return _op(x, torch.cat(weights[:2]), down, *lora, slots, *about)[0]


def _expect(x, weights, lora_a, lora_b, slots, scale, ranks, backend) -> Tensor | None:
    """The contiguous slots; raises on what the backend does not take."""
    expect("x", x, ("B", "S", "D"), dtypes_of(backend))
    width = x.size(2)
    expect("gate", weights[0], ("hidden", width), (x.dtype,), x.device)
    expect("up", weights[1], weights[0].shape, (x.dtype,), x.device)
    expect("down", weights[2], (width, weights[0].size(0)), (x.dtype,), x.device)
    slots = expect_slots(slots, x.size(0), x.device)
    for given, values in (("scale", scale), ("ranks", ranks)):
        if values is not None and (not isinstance(values, list | tuple) or len(values) != 3):
            raise ValueError(f"{given} is {values!r}; wanted one for gate, up and down each, or None")
    first = None
    for number, (name, weight, a, b) in enumerate(zip(NAMES, weights, lora_a, lora_b, strict=True)):
        if (a is None) != (b is None):
            raise ValueError(f"{name}_a and {name}_b: wanted A with B")
        if a is None:
            continue
        expect_product(name, weight, {f"{name}_a": a, f"{name}_b": b}, weight.size(1), x, slots, None, backend)
        first = first or (f"{name}_a", a)
        if len(a) != len(first[1]) or a.dtype != first[1].dtype:
            raise ValueError(f"{name}_a is {a.dtype} of {len(a)} slots; wanted those of {first[0]}")
        for what, values, dtypes in (("scale", scale, (float32,)), ("ranks", ranks, INTEGERS)):
            if values is not None and values[number] is not None:
                expect(f"{what} of {name}", values[number], (len(a),), dtypes, x.device)
                refuse_gradients("scale B instead", **{f"{what} of {name}": values[number]})
    if first is None:
        raise ValueError("no adapter is given; swiglu_mlp is the MLP without one")
    return slots
