"""Group `training`: the pieces of a training step, forward and backward with every gradient that training takes.

Each piece is what `klora train` runs at 98,304 tokens of the preset `seed`, beside torch.compile of its reference: what
a piece saves here, times how often it runs, is what the step would lose without it. The head's piece is in group
`head`, the whole step in group `step`.
"""

import functools

import torch
from torch import Tensor

from ..kernels import pick_attention
from ..kernels.embedding import bigram_embedding, bigram_embedding_ref
from ..kernels.qkv_attention import qkv_attention, qkv_attention_ref
from ..kernels.residual_mlp import residual_mlp, residual_mlp_ref
from ..kernels.rms_norm import residual_norm, residual_norm_ref
from ..kernels.rotary import rotary_tables
from .entry import Call, Entry, Shape, Tensors, Variant

SEED = {"96x1024": {"B": 96, "S": 1024, "D": 512, "hidden": 1536, "H": 8, "G": 4, "d": 64, "V": 1024, "rows": 10240}}
TOY = {"B": 2, "S": 20, "D": 32, "hidden": 48, "H": 4, "G": 2, "d": 16, "V": 300, "rows": 40}
GATE = {**SEED["96x1024"], "B": 4, "S": 1000}

BETWEEN_BLOCKS = ("x", "mix", "x0")
JOINED = ("x", "mix", "x0", "pushed", "skip")


def _all_gradients(function: Call) -> Call:
    """The outputs and the gradients of all floating inputs but the last ones, the gradients of the outputs."""

    def run(*inputs: Tensor) -> Tensors:
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs[:-1]]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], inputs[-1])

    return run


def _boundary(names: tuple[str, ...]):
    """Outputs and gradients of a boundary of blocks, whose vectors are trained; the scales lie in the matrices."""

    def wrap(function: Call) -> Call:
        def run(*inputs: Tensor) -> Tensors:
            leaves = [t.detach().requires_grad_() for t in inputs[:-2]]
            out = function(**dict(zip(names, leaves, strict=True)))
            return out.x_in, out.n, *torch.autograd.grad((out.x_in, out.n), leaves, inputs[-2:])

        return run

    return wrap


def _randn(device: torch.device, generator: torch.Generator):
    return functools.partial(torch.randn, device=device, generator=generator)


def _draw_boundary(names: tuple[str, ...]):
    def draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        randn, stream = _randn(device, generator), (shape["B"], shape["S"], shape["D"])
        vectors = {"mix": (2, shape["D"]), "skip": (shape["D"],)}
        drawn = [randn(vectors[name]) if name in vectors else randn(stream).to(dtype) for name in names]
        return *drawn, randn(stream).to(dtype), randn(stream).to(dtype)

    return draw


def _draw_embedding(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    randn, width = _randn(device, generator), shape["D"]
    tokens = torch.randint(2, shape["V"], (shape["B"], shape["S"]), device=device, generator=generator)
    tables = randn(shape["V"], width), randn(shape["rows"], width), randn(width)
    return tokens.int(), *tables, randn(shape["B"], shape["S"], width).to(dtype)


def _draw_qkv(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    randn, width, outputs = _randn(device, generator), shape["D"], shape["H"] * shape["d"]
    weight = randn(outputs + 2 * shape["G"] * shape["d"], width) * width**-0.5
    rows = shape["B"], shape["S"]
    gain = torch.rand(shape["H"], device=device, generator=generator) + 0.5
    return randn(*rows, width).to(dtype), weight.to(dtype), gain, randn(*rows, outputs).to(dtype)


def _weights(shape: Shape) -> tuple[tuple[int, int], ...]:
    """Sizes [N, K] of Wo, W1 and W2."""
    width, hidden = shape["D"], shape["hidden"]
    return (width, shape["H"] * shape["d"]), (hidden, width), (width, hidden)


def _draw_residual_mlp(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    randn, rows = _randn(device, generator), (shape["B"], shape["S"])
    weights = [(randn(n, k) * k**-0.5).to(dtype) for n, k in _weights(shape)]
    mixed, x, dz = (randn(*rows, size).to(dtype) for size in (shape["H"] * shape["d"], shape["D"], shape["D"]))
    return mixed, x, *weights, dz


def _embedding(function: Call) -> Call:
    def run(*inputs: Tensor) -> Tensors:
        return _all_gradients(lambda *tables: function(*tables, inputs[-1].dtype))(*inputs)

    return run


def _qkv(function: Call, shape: Shape, device: torch.device, tables: torch.dtype = torch.float32) -> Call:
    """The op with its rotary tables, which are built before."""
    queries, keys = shape["H"] * shape["d"], shape["G"] * shape["d"]
    cos, sin = rotary_tables(shape["S"], shape["d"], 50000.0, device, tables)
    options = {"sizes": (queries, keys, keys), "head_dim": shape["d"]}
    return _all_gradients(lambda x, weight, gain: function(x, weight, cos, sin, gain, **options))


def _picked(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    return pick_attention(device, dtype, shape["d"])[0]


def _qkv_reference(compiles: bool):
    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        reference = functools.partial(qkv_attention_ref, attention=_picked(shape, device, dtype))
        return _qkv(torch.compile(reference) if compiles else reference, shape, device)

    return build


def _variants(wrap, reference: Call, ours: Call) -> tuple[Variant, ...]:
    return (
        Variant("eager", lambda shape, device, dtype: wrap(reference)),
        Variant("torch.compile", lambda shape, device, dtype: wrap(torch.compile(reference)), devices=("cuda",)),
        Variant("klora", lambda shape, device, dtype: wrap(ours), is_ours=True),
    )


def _stream(tensors: int):
    """Bytes of so many tensors [B, S, D]."""
    return lambda shape, itemsize: tensors * itemsize * shape["B"] * shape["S"] * shape["D"]


def _residual_mlp_bytes(shape: Shape, itemsize: int) -> int:
    """mixed, x, y, z; dz, y, mixed, dx, dmixed; a and du written and read. Weights twice, their gradients once."""
    rows = shape["B"] * shape["S"]
    return itemsize * (rows * (9 * shape["D"] + 4 * shape["hidden"]) + 3 * sum(n * k for n, k in _weights(shape)))


def _qkv_flops(shape: Shape) -> int:
    tokens, heads = shape["B"] * shape["S"], shape["H"] + 2 * shape["G"]
    return 6 * tokens * shape["D"] * heads * shape["d"] + 7 * tokens * shape["S"] * shape["H"] * shape["d"]


def _residual(op: str, names: tuple[str, ...], tensors: int) -> Entry:
    wrap = _boundary(names)
    return Entry(
        group="training",
        op=op,
        shapes=SEED,
        toy=TOY,
        gate=GATE,
        draw=_draw_boundary(names),
        truth=lambda shape, *inputs: wrap(residual_norm_ref)(*inputs),
        variants=_variants(wrap, residual_norm_ref, residual_norm),
        bytes=_stream(tensors),
        flops=lambda shape: (2 * tensors + 6) * shape["B"] * shape["S"] * shape["D"],
    )


ENTRIES = (
    Entry(
        group="training",
        op="embedding_trained",
        shapes=SEED,
        toy=TOY,
        gate=GATE,
        draw=_draw_embedding,
        truth=lambda shape, *inputs: _embedding(bigram_embedding_ref)(*inputs),
        variants=_variants(_embedding, bigram_embedding_ref, bigram_embedding),
        bytes=_stream(4),
        flops=lambda shape: 20 * shape["B"] * shape["S"] * shape["D"],
    ),
    _residual("residual_norm_between_blocks_trained", BETWEEN_BLOCKS, 10),
    _residual("residual_norm_joined_trained", JOINED, 13),
    Entry(
        group="training",
        op="qkv_attention_trained",
        shapes=SEED,
        toy=TOY,
        gate=GATE,
        draw=_draw_qkv,
        truth=lambda shape, *inputs: _qkv(qkv_attention_ref, shape, inputs[0].device, torch.float64)(*inputs),
        variants=(
            Variant("eager", _qkv_reference(compiles=False), attention=_picked),
            Variant("torch.compile", _qkv_reference(compiles=True), devices=("cuda",), attention=_picked),
            Variant("klora", lambda shape, device, dtype: _qkv(qkv_attention, shape, device), is_ours=True),
        ),
        bytes=lambda shape, size: size * shape["B"] * shape["S"] * (4 * shape["D"] + 5 * shape["H"] * shape["d"]),
        flops=_qkv_flops,
    ),
    Entry(
        group="training",
        op="residual_mlp_trained",
        shapes=SEED,
        toy=TOY,
        gate=GATE,
        draw=_draw_residual_mlp,
        truth=lambda shape, *inputs: _all_gradients(residual_mlp_ref)(*inputs),
        variants=_variants(_all_gradients, residual_mlp_ref, residual_mlp),
        bytes=_residual_mlp_bytes,
        flops=lambda shape: 6 * shape["B"] * shape["S"] * sum(n * k for n, k in _weights(shape)),
    ),
)
