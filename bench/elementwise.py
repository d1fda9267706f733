"""Group `elementwise`: norms, residual stream and rotary, forward and backward, as adaptation runs them.

Weights are frozen, so that the gradients are those of the activations and of the documents' biases; `trained` has the
gradients of the vectors as well. The products around these ops are left out. The ops for anyone's model, a norm with a
weight that is trained, rotary alone and SwiGLU, run at the sizes of a Llama of 1 to 2 thousand million parameters,
beside Liger's where it has the same.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.rms_norm import residual_norm, residual_norm_ref, rms_norm
from ..kernels.rotary import apply_rotary, apply_rotary_ref, norm_rotary, norm_rotary_ref, rotary_tables
from ..kernels.swiglu import swiglu, swiglu_ref
from .entry import Call, Entry, Shape, Tensors, Variant

STREAM = {"64x1024": {"B": 64, "S": 1024, "D": 512}}
HEADS = {"64x1024": {"B": 64, "S": 1024, "H": 8, "G": 4, "d": 64}}
LLAMA = {"16x1024": {"B": 16, "S": 1024, "D": 2048, "F": 5632, "H": 32, "G": 8, "d": 64}}
TOY = {"B": 2, "S": 9, "D": 32, "F": 48, "H": 4, "G": 2, "d": 16}
GATE = {"B": 4, "S": 1000, "D": 512, "F": 1536, "H": 8, "G": 4, "d": 64}

ATTENTION = ("x", "branch", "scale")
BETWEEN = (*ATTENTION, "bias", "mix", "x0")
JOINED = (*BETWEEN, "pushed", "skip")
VECTORS = ("scale", "bias", "mix", "skip")
FROZEN = ("scale", "mix", "skip", "x0")


def _variants(wrap, reference: Call, ours: Call) -> tuple[Variant, ...]:
    return (
        Variant("eager", lambda shape, device, dtype: wrap(reference)),
        Variant("torch.compile", lambda shape, device, dtype: wrap(torch.compile(reference)), devices=("cuda",)),
        Variant("klora", lambda shape, device, dtype: wrap(ours), is_ours=True),
    )


def _boundary(op: str, names: tuple[str, ...], tensors: int, trained: bool = False) -> Entry:
    """One kind of boundary of a block; `tensors` [B, S, D] are read or written by forward and backward together."""

    def draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        batch, width = shape["B"], shape["D"]
        sizes = {"scale": (width,), "skip": (width,), "mix": (2, width), "bias": (batch, width)}
        stream = (batch, shape["S"], width)
        drawn = [
            torch.randn(sizes.get(name, stream), device=device, generator=generator).to(
                torch.float32 if name in VECTORS else dtype
            )
            for name in (*names, "dx_in", "dn")
        ]
        return tuple(drawn)

    def wrap(function: Call) -> Call:
        def run(*inputs: Tensor) -> Tensors:
            given = dict(zip(names, inputs[:-2], strict=True))
            leaves = {name: t.detach().requires_grad_(trained or name not in FROZEN) for name, t in given.items()}
            out = function(**leaves)
            wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
            return out.x_in, out.n, *torch.autograd.grad((out.x_in, out.n), wanted, inputs[-2:])

        return run

    def count(shape: Shape, itemsize: int) -> int:
        vectors = sum({"mix": 2, "bias": 2 * shape["B"]}.get(name, 1) for name in names if name in VECTORS)
        return shape["D"] * (tensors * itemsize * shape["B"] * shape["S"] + 4 * vectors)

    return Entry(
        group="elementwise",
        op=op,
        shapes=STREAM,
        toy=TOY,
        gate=GATE,
        draw=draw,
        truth=lambda shape, *inputs: wrap(residual_norm_ref)(*inputs),
        variants=_variants(wrap, residual_norm_ref, residual_norm),
        bytes=count,
        # About two operations for every tensor that an element is combined with, and six for the norm.
        flops=lambda shape: (2 * tensors + 6) * shape["B"] * shape["S"] * shape["D"],
    )


def _draw_heads(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """The stacked output of a QKV product, gain, dq, dk."""
    batch, tokens, heads, groups, size = (shape[name] for name in ("B", "S", "H", "G", "d"))
    outer = batch, tokens
    sizes = (*outer, (heads + 2 * groups) * size), (heads,), (*outer, heads, size), (*outer, groups, size)
    qkv, gain, dq, dk = (torch.randn(size, device=device, generator=generator) for size in sizes)
    return qkv.to(dtype), gain, dq.to(dtype), dk.to(dtype)


def _rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> Tensors:
    return norm_rotary_ref(q, cos, sin, gain), norm_rotary_ref(k, cos, sin)


def _rotary(function: Call, shape: Shape, device: torch.device, tables: torch.dtype = torch.float32) -> Call:
    """q, k and their gradients; cos and sin are built before, in the dtype `tables`."""
    cos, sin = rotary_tables(shape["S"], shape["d"], 50000.0, device, tables)

    def run(qkv: Tensor, gain: Tensor, dq: Tensor, dk: Tensor) -> Tensors:
        heads, groups, size = dq.size(2), dk.size(2), dq.size(3)
        parts = qkv.split([heads * size, groups * size, groups * size], dim=-1)[:2]
        q, k = (part.unflatten(-1, (-1, size)).detach().requires_grad_() for part in parts)
        outputs = function(q, k, cos, sin, gain)
        return *outputs, *torch.autograd.grad(outputs, (q, k), (dq, dk))

    return run


def _rotary_bytes(shape: Shape, itemsize: int) -> int:
    """q and k in and out; dq and dk in and out, q and k again; the tables twice."""
    tokens, both = shape["B"] * shape["S"], (shape["H"] + shape["G"]) * shape["d"]
    return 5 * tokens * both * itemsize + 8 * shape["S"] * shape["d"]


def _draw_rows(*names: str):
    """Draws for each name a tensor: rows [B, S, size of the name], "weight" [D]."""

    def draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        sizes = ((shape["D"],) if name == "weight" else (shape["B"], shape["S"], shape[name]) for name in names)
        return tuple(torch.randn(size, device=device, generator=generator).to(dtype) for size in sizes)

    return draw


def _all_gradients(function: Call) -> Call:
    """The output, and the gradients of all inputs but the last, which is the output's."""

    def run(*inputs: Tensor) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in inputs[:-1]]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, inputs[-1])

    return run


def _eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def _liger(name: str, *more) -> Variant:
    """A function of Liger's, which has its arguments in our order, then `more`."""

    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        from liger_kernel.transformers import functional

        return _all_gradients(lambda *tensors: getattr(functional, name)(*tensors, *more))

    return Variant("liger-kernel", build, package="liger-kernel", devices=("cuda",))


def _apply_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, _: Tensor, **how: bool) -> Tensors:
    return apply_rotary_ref(q, cos, sin, **how), apply_rotary_ref(k, cos, sin, **how)


def _plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, _: Tensor, **how: bool) -> Tensors:
    return apply_rotary(q, k, cos, sin, **how)


def _rotary_alone(op: str, interleaved: bool) -> Entry:
    reference, ours = (partial(function, interleaved=interleaved) for function in (_apply_both, _plain_rotary))
    return Entry(
        group="elementwise",
        op=op,
        shapes=LLAMA,
        toy=TOY,
        gate=GATE,
        draw=_draw_heads,
        truth=lambda shape, qkv, *rest: _rotary(reference, shape, qkv.device, torch.float64)(qkv, *rest),
        variants=(
            Variant("eager", lambda shape, device, dtype: _rotary(reference, shape, device)),
            Variant(
                "torch.compile",
                lambda shape, device, dtype: _rotary(torch.compile(reference), shape, device),
                devices=("cuda",),
            ),
            Variant("klora", lambda shape, device, dtype: _rotary(ours, shape, device), is_ours=True),
        ),
        bytes=lambda shape, size: (
            4 * shape["B"] * shape["S"] * (shape["H"] + shape["G"]) * shape["d"] * size + 8 * shape["S"] * shape["d"]
        ),
        flops=lambda shape: 6 * shape["B"] * shape["S"] * (shape["H"] + shape["G"]) * shape["d"],
    )


ENTRIES = (
    _boundary("residual_norm_after_attention", ATTENTION, 9),
    _boundary("residual_norm_between_blocks", BETWEEN, 10),
    _boundary("residual_norm_joined", JOINED, 12),
    _boundary("residual_norm_trained", JOINED, 17, trained=True),
    Entry(
        group="elementwise",
        op="norm_rotary",
        shapes=HEADS,
        toy=TOY,
        gate=GATE,
        draw=_draw_heads,
        truth=lambda shape, qkv, *rest: _rotary(_rotary_reference, shape, qkv.device, torch.float64)(qkv, *rest),
        variants=(
            Variant("eager", lambda shape, device, dtype: _rotary(_rotary_reference, shape, device)),
            Variant(
                "torch.compile",
                lambda shape, device, dtype: _rotary(torch.compile(_rotary_reference), shape, device),
                devices=("cuda",),
            ),
            Variant("klora", lambda shape, device, dtype: _rotary(norm_rotary, shape, device), is_ours=True),
        ),
        bytes=_rotary_bytes,
        flops=lambda shape: 20 * shape["B"] * shape["S"] * (shape["H"] + shape["G"]) * shape["d"],
    ),
    Entry(
        group="elementwise",
        op="rms_norm_weighted_trained",
        shapes=LLAMA,
        toy=TOY,
        gate=GATE,
        draw=_draw_rows("D", "weight", "D"),
        truth=lambda shape, *inputs: _all_gradients(_eager_norm)(*inputs),
        variants=(
            *_variants(_all_gradients, _eager_norm, partial(rms_norm, eps=1e-5)),
            _liger("liger_rms_norm", 1e-5, 0.0, "llama", False),
        ),
        bytes=lambda shape, size: size * shape["D"] * (5 * shape["B"] * shape["S"] + 3),
        flops=lambda shape: 14 * shape["B"] * shape["S"] * shape["D"],
    ),
    Entry(
        group="elementwise",
        op="swiglu",
        shapes=LLAMA,
        toy=TOY,
        gate=GATE,
        draw=_draw_rows("F", "F", "F"),
        truth=lambda shape, *inputs: _all_gradients(swiglu_ref)(*inputs),
        variants=(*_variants(_all_gradients, swiglu_ref, swiglu), _liger("liger_swiglu")),
        bytes=lambda shape, size: 8 * size * shape["B"] * shape["S"] * shape["F"],
        flops=lambda shape: 16 * shape["B"] * shape["S"] * shape["F"],
    ),
    _rotary_alone("apply_rotary", interleaved=False),
    _rotary_alone("apply_rotary_interleaved", interleaved=True),
)
