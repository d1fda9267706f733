"""Group `muon`: Newton-Schulz of a model's matrices and of large ones, and Muon's whole step."""

from functools import partial

import torch
from torch import Tensor

from ..kernels.newton_schulz import JORDAN, newton_schulz, newton_schulz_ref, update_scale
from ..model.muon import Muon
from .entry import Call, Entry, Shape, Tensors, Variant

LR, MOMENTUM, DECAY = 1.0, 0.95, 0.1
"""With lr 1 and small weights, the error of what a step leaves is the error of its update."""


def model_matrices(shape: Shape) -> list[tuple[int, int, int]]:
    """(count, rows, columns) of a model's matrices: q and o, k and v, up, down."""
    blocks, width, narrow, hidden = shape["blocks"], shape["D"], shape["kv"], shape["H"]
    sizes = ((2, width, width), (2, narrow, width), (1, hidden, width), (1, width, hidden))
    return [(count * blocks, rows, columns) for count, rows, columns in sizes]


def _draw_model(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    return tuple(torch.randn(size, device=device, generator=generator).to(dtype) for size in model_matrices(shape))


def _draw_batch(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    return (torch.randn(shape["B"], shape["m"], shape["n"], device=device, generator=generator).to(dtype),)


def gemm_newton_schulz(x: Tensor) -> Tensor:
    """Three batched GEMMs an iteration, the axpys in their epilogues: the most that cuBLAS is asked for."""
    norm = torch.linalg.vector_norm(x.to(torch.promote_types(torch.float32, x.dtype)), dim=(-2, -1), keepdim=True)
    x, tall = (x / (norm + 1e-7)).to(x.dtype), x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    a, b, c = JORDAN
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _each(function) -> Call:
    return lambda *tensors: tuple(function(x) for x in tensors)


def _gram_package(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    from gram_newton_schulz import GramNewtonSchulz

    return _each(GramNewtonSchulz(ns_coefficients=[list(JORDAN)] * 5))


def _one_by_one(x: Tensor) -> Tensor:
    return torch.stack([newton_schulz_ref(matrix, dtype=x.dtype) for matrix in x])


CUBLAS = Variant("cublas", lambda *_: _each(gemm_newton_schulz))
GRAM = Variant(
    "gram-newton-schulz",
    _gram_package,
    package="gram-newton-schulz",
    devices=("cuda",),
    captures=False,  # it captures graphs of its own
)
KLORA = Variant("klora", lambda *_: lambda *tensors: tuple(newton_schulz(tensors)), is_ours=True)


def _products(m: int, n: int) -> int:
    """Least operations known of five iterations: symmetric products halved, the standard or the Gram form."""
    m, n = sorted((m, n))
    return min(5 * m * m * (3 * n + m), m * m * (6 * n + 14 * m))


# ---- the whole step


def _draw_step(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """Parameters, gradients and momenta, fp32 as in training."""

    def draw(scale: float) -> Tensors:
        return tuple(x * scale for x in _draw_model(shape, device, torch.float32, generator))

    return *draw(1e-3), *draw(1.0), *draw(1.0)


def _split(inputs: Tensors) -> list[list[Tensor]]:
    """Parameters, gradients, momenta, matrix by matrix."""
    third = len(inputs) // 3
    return [[matrix for batch in inputs[k : k + third] for matrix in batch] for k in (0, third, 2 * third)]


def _plain_step(parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor]) -> None:
    """Muon with nothing that it does not need: it skips no step, as ours does, and is the faster for it."""
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_add_(momenta, gradients)
    directions = torch._foreach_add(gradients, torch._foreach_mul(momenta, MOMENTUM))
    torch._foreach_mul_(parameters, 1.0 - LR * DECAY)
    for shape in {parameter.shape: None for parameter in parameters}:
        some = [index for index, parameter in enumerate(parameters) if parameter.shape == shape]
        updates = newton_schulz_ref(torch.stack([directions[index] for index in some]))
        for index, update in zip(some, updates.unbind(), strict=True):
            parameters[index].sub_(update.to(parameters[index].dtype) * (LR * update_scale(*shape)))


def _truth_step(shape: Shape, *inputs: Tensor) -> Tensors:
    parameters, gradients, momenta = ([t.clone() for t in part] for part in _split(inputs))
    _plain_step(parameters, gradients, momenta)
    return tuple(parameters)


def _stepping(optimizer_of) -> Call:
    """Each set of inputs is copied once; its copies move on from call to call, as a training's do."""

    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        runs: dict[int, tuple] = {}

        def run(*inputs: Tensor) -> Tensors:
            key = inputs[0].data_ptr()
            if key not in runs:
                parameters, gradients, momenta = ([t.clone() for t in part] for part in _split(inputs))
                runs[key] = tuple(parameters), optimizer_of(parameters, gradients, momenta), inputs
            parameters, step, _ = runs[key]
            step()
            return parameters

        return run

    return build


def _optimizer_step(kind, state: str, share: float, **options):
    """step() of an optimizer whose momentum buffers hold `share` of the momenta."""

    def make(parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor]):
        optimizer = kind(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, **options)
        for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
            parameter.grad = gradient
            optimizer.state[parameter][state] = momentum * share
        return optimizer.step

    return make


def _compiled_step(parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor]):
    # With loops reordered after fusion, Inductor of PyTorch 2.11 ends in an assertion of its own on this function.
    compiled = torch.compile(_plain_step, options={"loop_ordering_after_fusion": False})
    return partial(compiled, parameters, gradients, momenta)


def _eager_step(parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor]):
    return partial(_plain_step, parameters, gradients, momenta)


SEED = {"blocks": 10, "D": 512, "kv": 256, "H": 1536}
TOY = {"blocks": 8, "D": 24, "kv": 12, "H": 36}
"""Blocks as in a model: the error of few square matrices is that of the worst conditioned one, which is chance."""

ENTRIES = (
    Entry(
        group="muon",
        op="newton_schulz_model",
        shapes={"seed-60": SEED},
        toy=TOY,
        draw=_draw_model,
        truth=lambda shape, *tensors: tuple(newton_schulz_ref(x) for x in tensors),
        variants=(CUBLAS, Variant("one-by-one", lambda *_: _each(_one_by_one), captures=False), GRAM, KLORA),
        yardstick="cublas",
        bytes=lambda shape, itemsize: 2 * itemsize * sum(c * m * n for c, m, n in model_matrices(shape)),
        flops=lambda shape: sum(c * _products(m, n) for c, m, n in model_matrices(shape)),
    ),
    Entry(
        group="muon",
        op="newton_schulz_batch",
        shapes={
            "B1-512x512": {"B": 1, "m": 512, "n": 512},
            "B1-1024x1024": {"B": 1, "m": 1024, "n": 1024},
            "B32-2048x2048": {"B": 32, "m": 2048, "n": 2048},
            "B8-4096x4096": {"B": 8, "m": 4096, "n": 4096},
            "B8-4096x11008": {"B": 8, "m": 4096, "n": 11008},
        },
        toy={"B": 8, "m": 24, "n": 40},
        gate={"B": 2, "m": 640, "n": 1000},
        draw=_draw_batch,
        truth=lambda shape, x: newton_schulz_ref(x),
        variants=(CUBLAS, GRAM, KLORA),
        yardstick="cublas",
        bytes=lambda shape, itemsize: 2 * itemsize * shape["B"] * shape["m"] * shape["n"],
        flops=lambda shape: shape["B"] * _products(shape["m"], shape["n"]),
    ),
    Entry(
        group="muon",
        op="muon_step",
        shapes={"seed-60": SEED},
        toy=TOY,
        draw=_draw_step,
        truth=_truth_step,
        variants=(
            Variant("eager", _stepping(_eager_step), captures=False),
            Variant("torch.compile", _stepping(_compiled_step), devices=("cuda",)),
            Variant(
                "torch.optim.Muon",  # in bf16 everywhere, so there is nothing to compare it with on a CPU
                _stepping(_optimizer_step(torch.optim.Muon, "momentum_buffer", 1 - MOMENTUM)),
                devices=("cuda",),
                captures=False,
            ),
            Variant("klora", _stepping(_optimizer_step(Muon, "momentum", 1.0, capturable=True)), is_ours=True),
        ),
        bytes=lambda shape, itemsize: 4 * 5 * sum(c * m * n for c, m, n in model_matrices(shape)),
        flops=lambda shape: sum(c * _products(m, n) for c, m, n in model_matrices(shape)),
    ),
)
