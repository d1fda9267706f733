"""The registered ops, their autograd, and the public function."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from ..dispatch import custom_op, empty_grad, resolve_backend
from ..dropout import Dropout
from ..int6.layout import Int6Matrix
from ..int6.op import dequantize, int6_product, int6_product_dx
from ..linear.op import cublas_, linear_dweight
from ..lora_qkv.adapters import Adapters, adapters_of, empty_packed
from ..lora_qkv.forward import empty_projected, launch_forward
from ..lora_qkv.op import Lora, Saved, gradients, with_zeros, zero_named_rows
from ..side_stream import beside, join
from .add import launch_add
from .after import launch_after, launch_dx_after
from .inner import launch_inner, launch_tiled_inner
from .plan import Way, dx_way, plan
from .pool import Pool, dense, inner_width
from .reduce import launch_reduce
from .reference import lora_linear_ref
from .stacked import can_be_stacked, stacked_linears
from .validate import expect_projections

# One product with u in its launch


@custom_op("klora::lora_linear", mutates_args=())
def _joint(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and what the backward wants: x A^T, and the adapters that had to be rounded or scaled (else empty)."""
    more = {"bias": bias, "scale": scale, "ranks": ranks}
    return launch_forward(x, weight, lora_a, lora_b, slots, [weight.size(0)], **more).flat()


@_joint.register_fake
def _(x, weight, lora_a, lora_b, slots, grad_a, grad_b, bias, scale, ranks):
    is_packed = lora_a.dtype != x.dtype or scale is not None or ranks is not None
    return empty_projected(x, lora_a, lora_b, [weight.size(0)], is_packed=is_packed).flat()


def _setup_joint(ctx, inputs, output):
    x, weight, lora_a, lora_b, slots, grad_a, grad_b, _, scale, ranks = inputs
    ctx.save_for_backward(*Saved.of(x, weight, lora_a, lora_b, slots, *output[1:]), scale)
    ctx.lora = Lora.of(lora_a, lora_b, grad_a, grad_b)
    ctx.is_packed = lora_a.dtype != x.dtype or scale is not None or ranks is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_joint(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    saved, (scale,) = Saved.split(ctx.saved_tensors)
    found = gradients(saved, ctx.lora, ctx.needs_input_grad[:4], [dy], scale=scale, is_packed=ctx.is_packed)
    dbias = dy.sum((0, 1)) if ctx.needs_input_grad[7] else None
    return *found, *(None,) * 3, dbias, None, None


_joint.register_autograd(_backward_joint, setup_context=_setup_joint)


# Any number of products, with u in a launch before them


def _packed(x: Tensor, given: Sequence[Tensor | None]) -> list[Tensor]:
    """A list as an op with gradients takes it, without None: empty where there is nothing, else with empty tensors."""
    is_there = any(one is not None for one in given)
    return [x.new_empty(0) if one is None else one for one in given] if is_there else []


def _unpacked(given: Sequence[Tensor], count: int) -> list[Tensor | None]:
    """What :func:`_packed` was given."""
    return [one if one.numel() else None for one in given] or [None] * count


def _way(x, int6_scales, lora_b, keys) -> Way:
    return _plan(x, lora_b, has_dropout=bool(keys), has_int6=bool(int6_scales))


def _plan(x: Tensor, lora_b: Sequence[Tensor], **about: bool) -> Way:
    shapes, rank = [(b.size(1), x.size(2)) for b in lora_b], max(b.size(2) for b in lora_b)
    return plan(shapes, x.dtype, x.size(0), x.size(1), rank, **about)


def _pool(lora_a, lora_b, slots, scales, ranks, keys, rate) -> Pool:
    return Pool.of(lora_a, lora_b, slots, *(_unpacked(one, len(lora_a)) for one in (scales, ranks, keys)), rate)


def _adapters(x: Tensor, pool: Pool, p: int, packed: tuple[Tensor, Tensor] | None = None) -> Adapters:
    """Projection `p`'s as the copy engine reads them, in `packed` if need be. Scales are the inner rows'."""
    lora_a, lora_b = pool.lora_a[p], pool.lora_b[p]
    return adapters_of(x, lora_a, lora_b, pool.slots, [lora_b.size(1)], packed, ranks=pool.ranks[p])


def _kept_adapters(way: Way, x, lora_a, lora_b, ranks, keys) -> tuple[Tensor, Tensor]:
    """Memory for packed adapters that the backward reads too; empty where it packs none, or none again."""
    is_read = dx_way(way, len(lora_b), bool(keys)) == "after"
    is_packed = is_read and (lora_a[0].dtype != x.dtype or bool(ranks))
    return empty_packed(x, lora_b[0], 1) if is_packed else (x.new_empty(0), x.new_empty(0))


@custom_op("klora::lora_linears", mutates_args=())
def _op(
    x: Tensor,
    weights: list[Tensor],
    int6_scales: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    slots: Tensor | None,
    scales: list[Tensor],
    ranks: list[Tensor],
    keys: list[Tensor],
    rate: float,
    grads_a: list[Tensor],
    grads_b: list[Tensor],
) -> list[Tensor]:
    """y of each projection, the inner rows, and the adapters that were packed for the backward too (else empty). A
    weight is dense, or with a scale in int6_scales packed at six bits. What may be missing is as :func:`_packed` makes
    it. `grads_a` and `grads_b` are only passed on to the backward; they are empty where autograd gets the gradients.
    """
    pool, flat = _pool(lora_a, lora_b, slots, scales, ranks, keys, rate), dense(x)
    way, outs = _way(x, int6_scales, lora_b, keys), []
    packed = _kept_adapters(way, x, lora_a, lora_b, ranks, keys)
    adapters = []
    if way == "after":
        adapters = [_adapters(flat, pool, p, packed if packed[0].numel() else None) for p in range(len(weights))]
    if len(adapters) == 1 and not keys:
        inner = launch_tiled_inner(flat, pool, adapters[0])
    else:
        inner = launch_inner([flat] * len(weights), pool)
    more = (_unpacked(one, len(weights)) for one in (int6_scales, biases))
    for p, (weight, int6_scale, bias) in enumerate(zip(weights, *more, strict=True)):
        rows, outputs = flat.view(-1, flat.size(2)), lora_b[p].size(1)
        if way == "after":
            y = x.new_empty(*x.shape[:2], outputs)
            if int6_scale is not None:
                weight = dequantize(weight, int6_scale, (outputs, flat.size(2)), x.dtype)
            launch_after(flat, weight, inner[..., pool.places[p]], adapters[p], y, bias)
            outs.append(y)
            continue
        if int6_scale is None:
            y = x.new_empty(*x.shape[:2], outputs)
            cublas_(y.view(-1, outputs), rows, weight.mT, bias)
        else:
            y = int6_product(rows, weight, int6_scale, bias, outputs)
            y = torch.ops.aten._unsafe_view(y, [*x.shape[:2], outputs])  # a view could not be changed in place
        launch_add(y, inner, pool, p)
        outs.append(y)
    return [*outs, inner, *packed]


@_op.register_fake
def _(x, weights, int6_scales, biases, lora_a, lora_b, slots, scales, ranks, keys, rate, grads_a, grads_b):
    outs = [x.new_empty(*x.shape[:2], b.size(1)) for b in lora_b]
    way = _way(x, int6_scales, lora_b, keys)
    inner = x.new_empty(*x.shape[:2], inner_width(lora_b))
    return [*outs, inner, *_kept_adapters(way, x, lora_a, lora_b, ranks, keys)]


@custom_op("klora::lora_linears_backward_", mutates_args=("dx", "das", "dbs"))
def _backward_op(
    dys: list[Tensor],
    x: Tensor,
    inner: Tensor,
    weight: Tensor | None,
    int6_scale: Tensor | None,
    packed: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    slots: Tensor | None,
    scales: list[Tensor],
    ranks: list[Tensor],
    keys: list[Tensor],
    rate: float,
    fills: bool,
    dx: Tensor | None,
    das: list[Tensor],
    dbs: list[Tensor],
) -> None:
    """Writes the rows of dA and dB that `slots` name, with `fills` zeros to the others, and dx: all of it by the
    `weight` of one projection (with a scale at six bits) and its adapters, `packed` or in place; without one it adds
    the adapters' part to what is there. dx may be None, `das` and `dbs` together empty.
    """
    if not x.numel():
        zero_named_rows([*das, *dbs], slots)
        return
    pool, dys, x = _pool(lora_a, lora_b, slots, scales, ranks, keys, rate), [dense(dy) for dy in dys], dense(x)
    ready = None
    if weight is None:
        t = launch_inner(dys, pool, is_backward=True)
        if dx is not None:
            launch_add(dx, t, pool)
    else:
        adapters = Adapters(*packed, lora_b[0].size(2), None) if packed[0].numel() else _adapters(x, pool, 0)
        t = launch_tiled_inner(dys[0], pool, adapters, is_backward=True)
        if dx is not None:
            ready = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None
            if int6_scale is not None:
                weight = dequantize(weight, int6_scale, (dys[0].size(2), x.size(2)), x.dtype)
            launch_dx_after(dys[0], weight, t, adapters, dx)
    if das:
        with beside(x.device, ready):
            launch_reduce(dys, inner, pool, dbs, of_a=False, fills=fills)
            launch_reduce([x] * len(das), t, pool, das, of_a=True, fills=fills)
        join(x.device, ready)


def _setup(ctx, inputs, output):
    x, weights, int6_scales, biases, lora_a, lora_b, slots, scales, ranks, keys, ctx.rate, *ctx.grads = inputs
    lists = weights, int6_scales, lora_a, lora_b, scales, ranks, keys
    ctx.save_for_backward(x, *output[-3:], slots, *(tensor for one in lists for tensor in one))
    ctx.counts = [len(one) for one in lists]
    ctx.way = _way(x, int6_scales, lora_b, keys)
    ctx.mark_non_differentiable(*output[-3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, douts):
    x, inner, *packed, slots = ctx.saved_tensors[:5]
    rest = ctx.saved_tensors[5:]
    rest = iter(rest)
    lists = [list(islice(rest, count)) for count in ctx.counts]
    weights, int6_scales, lora_a, lora_b, scales, ranks, keys = lists
    needs_x, needs_weights, _, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    (das, dbs), is_pooled = ctx.grads, bool(ctx.grads[0])
    dys = with_zeros(x, douts[:-3], [b.size(1) for b in lora_b])
    if not is_pooled and any((*needs_a, *needs_b)):
        fresh = torch.empty_like if x.numel() else torch.zeros_like
        das, dbs = ([fresh(lora, memory_format=torch.contiguous_format) for lora in one] for one in (lora_a, lora_b))
    is_after = dx_way(ctx.way, len(weights), bool(keys)) == "after"
    each_scale = _unpacked(int6_scales, len(weights))
    dx, weight, int6_scale = None, *((weights[0], each_scale[0]) if is_after else (None, None))
    if needs_x and is_after:
        dx = empty_grad(x)
    elif needs_x:
        dx = _products_dx(dys, weights, each_scale, x)
    if needs_x or das:
        about = *lists[2:4], slots, *lists[4:], ctx.rate, not is_pooled
        _backward_op(dys, x, inner, weight, int6_scale, packed, *about, dx, das, dbs)
    dweights = [linear_dweight(dy, x) if needed else None for dy, needed in zip(dys, needs_weights, strict=True)]
    dbiases = [dys[p].sum((0, 1)) if needed else None for p, needed in enumerate(needs_bias)]
    da, db = (
        [grads[p] if needed and not is_pooled else None for p, needed in enumerate(needs)]
        for grads, needs in ((das, needs_a), (dbs, needs_b))
    )
    none = [[None] * len(one) for one in (int6_scales, scales, ranks, keys, *ctx.grads)]
    return dx, dweights, none[0], dbiases, da, db, None, *none[1:4], None, *none[4:]


def _products_dx(
    dys: Sequence[Tensor], weights: Sequence[Tensor], int6_scales: Sequence[Tensor | None], x: Tensor
) -> Tensor:
    """sum_p dy_p W_p [B, S, K]."""
    width, dx = x.size(2), None
    for dy, weight, int6_scale in zip(dys, weights, int6_scales, strict=True):
        rows = dy.reshape(-1, dy.size(2))
        if int6_scale is not None:
            part = int6_product_dx(rows, weight, int6_scale, width)
            dx = part if dx is None else dx.add_(part)
        else:
            dx = rows @ weight if dx is None else dx.addmm_(rows, weight)
    return dx.view(x.shape)


_op.register_autograd(_backward, setup_context=_setup)


def is_one_product(
    x: Tensor,
    weights: Sequence[Tensor | Int6Matrix],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    backend: str | None = None,
) -> bool:
    """Whether :func:`lora_linear` makes these projections of x in one launch, without dropout and `grads`."""
    can_stack = can_be_stacked(weights, lora_a, lora_b, biases)
    return resolve_backend(backend, x) == "triton" and can_stack and _plan(x, lora_b, can_stack=True) == "stacked"


def lora_linear(
    x: Tensor,
    weight: Tensor | Int6Matrix | Sequence[Tensor | Int6Matrix],
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    slots: Tensor | None = None,
    *,
    bias: Tensor | None | Sequence[Tensor | None] = None,
    scale: Tensor | None | Sequence[Tensor | None] = None,
    ranks: Tensor | None | Sequence[Tensor | None] = None,
    dropout: Dropout | None = None,
    grads: tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]] | None = None,
    stacks: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """y [B, S, N] of `x` [B, S, K], by `weight` [N, K] of x's dtype or at six bits, and each document's adapter.

    `lora_a` is [slots, R, K] and `lora_b` [slots, N, R], of x's dtype or float32, views into a pool if need be. `slots`
    int32 or int64 [B] names the adapter of each document, -1 none; None gives document b adapter b. Slots are not
    looked at on the host, and one past the pool counts as -1. `scale` float32 [slots] multiplies B; `ranks` int32 or
    int64 [slots] says how many rows of A and columns of B each adapter has, up to R: the others are not read, and their
    gradients are zero. A document costs the pool's R where the product is one's own, else the rank of its own adapter
    (:mod:`klora.kernels.lora_linear`). Six bits are unpacked for 2,048 rows and more: N K numbers of x's dtype exist
    during that product, forward and backward. `bias` is [N] in x's dtype. `dropout` is of the adapters' input: a
    :class:`Dropout`.

    With a sequence of weights, such as those of q, k and v, everything else but x and slots is a sequence or None too,
    and the outputs are a tuple: x is read for all of them at once. Two or three of up to 1,536 features and rank 16, in
    a pool of up to 64 slots, are one launch, after copies of their weights and of the whole pool one behind the other,
    with other bits than in a larger pool; `stacks` False has them never so.

    x, lora_a, lora_b, bias and a dense weight get gradients; that of weight is made by cuBLAS. A slot named twice gets
    the sum of the gradients, in the order of the batch; with slots, the backward takes fp32 memory of an adapter's
    gradients for each document until then. `grads` is two tensors shaped like lora_a and lora_b, of their dtype or
    float32 (views into a pool of gradients). With it the backward writes the rows of the slots that are named, leaves
    the other rows alone, and autograd gets no gradient of lora_a and lora_b; x or lora_a has to require one all the
    same. Only the kernel takes it.

    `backend` is "reference" or "triton"; None takes the reference on a CPU and the kernel on a GPU. The kernel takes
    bfloat16, float16 or float32. Any sizes; 16 bits are fastest where K and N are multiples of 8.
    ValueError: other shapes, dtypes or backends, tensors on several devices, a scale that requires a gradient, `grads`
    with the reference.

    Example: y = lora_linear(x, up, up_a, up_b, slots)
    """
    backend = resolve_backend(backend, x)
    options = {"bias": bias, "scale": scale, "ranks": ranks, "dropout": dropout}
    given = expect_projections(x, weight, lora_a, lora_b, slots, *options.values(), grads, backend)
    if backend == "reference":
        return lora_linear_ref(x, weight, lora_a, lora_b, given.slots, **options)
    a, b = given.lora_a, given.lora_b
    has_int6 = any(isinstance(one, Int6Matrix) for one in given.weights)
    can_stack = stacks and given.grads[0] is None and can_be_stacked(given.weights, a, b, given.biases)
    way = _plan(x, b, has_dropout=dropout is not None, has_int6=has_int6, can_stack=can_stack)
    if way == "stacked":
        return tuple(stacked_linears(x, given))
    if way == "joint":
        pooled = given.grads[0] or (None, None)
        more = given.biases[0], given.scales[0], given.ranks[0]
        y, *_ = _joint(x, given.weights[0], a[0], b[0], given.slots, *pooled, *more)
        return (y,) if isinstance(weight, list | tuple) else y
    weights = [one.packed if isinstance(one, Int6Matrix) else one for one in given.weights]
    int6_scales = [one.scale if isinstance(one, Int6Matrix) else None for one in given.weights]
    pooled = [list(pair) for pair in zip(*given.grads, strict=True)] if given.grads[0] is not None else ([], [])
    int6_scales, biases, scales, all_ranks, keys = (
        _packed(x, one) for one in (int6_scales, given.biases, given.scales, given.ranks, given.keys)
    )
    about = scales, all_ranks, keys, given.rate, *pooled
    outs = _op(x, weights, int6_scales, biases, a, b, given.slots, *about)[: len(weights)]
    return tuple(outs) if isinstance(weight, list | tuple) else outs[0]
