"""Group `step`: one training step of a preset on one device's share of the tokens.

Forward, backward, clip and both optimizers. The learning rate is zero, so that every call computes the same function of
its inputs; every product of the step is still taken. Outputs: the loss and the clipped gradient of all parameters.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from ..kernels import pick_attention
from ..model.attention import Attention, choose_attention
from ..model.config import ModelConfig, TrainConfig, preset
from ..model.fused import FusedStep
from ..model.gpt import GPT, is_block_matrix, parameter_shapes
from ..model.optimizers import FlatGradients, Optimizers
from ..model.parallel import Ranks
from ..model.ranges import phase
from .entry import Call, Entry, Shape, Tensors, Variant

ROWS, LENGTH = 96, 1024
TOY_MODEL = ModelConfig(vocab_size=300, width=32, blocks=2, heads=2, kv_heads=1, mlp_hidden=64, train_length=64)


MODELS = {0: TOY_MODEL, 10: preset("seed").model, 11: preset("seed-11l").model}
"""Networks by their numbers of blocks; 0 stands for the toy."""


def model_config(shape: Shape) -> ModelConfig:
    """The network that a shape names."""
    return MODELS[shape["blocks"]]


def seeded_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> GPT:
    """The same weights on every call, none of them zero: zero matrices would hide what they multiply."""
    torch.manual_seed(0)
    model = GPT(model_config(shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.configure(device, dtype)
    return model


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    size = shape["B"], shape["S"] + 1
    tokens = torch.randint(3, model_config(shape).vocab_size, size, device=device, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _step(compile_model: bool):
    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        model = seeded_model(shape, device, dtype)
        model.backend = "reference"
        gradients, config = FlatGradients(model), TrainConfig()
        optimizers = Optimizers(model, config)
        nll = torch.compile(model.nll) if compile_model else model.nll

        def run(tokens: Tensor, targets: Tensor) -> Tensors:
            gradients.buffer.zero_()
            with phase("forward"):
                loss = nll(tokens, targets).mean()
            with phase("backward"):
                loss.backward()
            gradients.clip_(config.grad_clip)
            with phase("optimizer"):
                optimizers.step(0, lr_scale=0.0)
            return loss.detach(), gradients.buffer

        return run

    return build


def _configured(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """What runs attention in a model that is only configured."""
    return ": ".join(pick_attention(device, dtype, model_config(shape).head_dim))


@functools.cache
def _auto(blocks: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """What `klora train` chooses at the shape that is timed; the gate judges the same, at its own."""
    model = GPT(model_config({"blocks": blocks}))
    why = model.configure(device, dtype)
    return choose_attention(model, "auto", ROWS, LENGTH, Ranks(0, 1, device), capture=True, configured=why)


def _fused_attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    return str(_auto(shape["blocks"], device, dtype))


def _fused(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """What `klora train` runs on a GPU; the gradients leave its buffer in the parameters' order, one copy dearer."""
    model = seeded_model(shape, device, dtype)
    model.chosen_attention = _auto(shape["blocks"], device, dtype).name
    config = dataclasses.replace(TrainConfig(), batch_tokens=shape["B"] * shape["S"])
    step = FusedStep(model, config, shape["B"], 1, Ranks(0, 1, device), shape["S"])
    step.rates.zero_()

    def run(tokens: Tensor, targets: Tensor) -> Tensors:
        step.tokens[:, :-1], step.tokens[:, -1] = tokens, targets[:, -1]
        step.replay()
        return step.report[0].clone(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    return run


def _original(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    from .original import build_original_step  # it takes its weights from here

    return build_original_step(shape, device, dtype)


def _original_attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    is_flash = device.type == "cuda" and dtype.itemsize == 2
    return "flash: as the original had it" if is_flash else _configured(shape, device, dtype)


def _truth(shape: Shape, tokens: Tensor, targets: Tensor) -> Tensors:
    model = seeded_model(shape, tokens.device, torch.float32).double()
    model.compute_dtype, model.attention, model.backend = torch.float64, "math", "reference"
    loss = model.nll(tokens, targets).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    return loss.detach(), gradient * (TrainConfig().grad_clip / (gradient.norm() + 1e-6)).clamp(max=1.0)


def _flops(shape: Shape) -> int:
    """6 a parameter of a matrix and token, and the causal half of attention forward (2 products) and backward (5)."""
    config, tokens = model_config(shape), shape["B"] * shape["S"]
    matrices = sum(size.numel() for name, size in parameter_shapes(config).items() if is_block_matrix(name))
    dense = 6 * tokens * (matrices + config.vocab_size * config.width)
    return dense + 7 * tokens * shape["S"] * config.heads * config.head_dim * config.blocks


def _bytes(shape: Shape, itemsize: int) -> int:
    """Parameters, gradients and optimizer states once each way: what no fusion can leave out."""
    parameters = sum(size.numel() for size in parameter_shapes(model_config(shape)).values())
    return 4 * parameters * (2 + 2 + 4)


ENTRIES = (
    Entry(
        group="step",
        op="train_step",
        shapes={
            "seed-98304": {"blocks": 10, "B": ROWS, "S": LENGTH},
            "seed-11l-98304": {"blocks": 11, "B": ROWS, "S": LENGTH},
        },
        toy={"blocks": 0, "B": 2, "S": 32},
        gate={"blocks": 10, "B": 2, "S": 256},
        draw=_draw,
        truth=_truth,
        variants=(
            Variant("eager", _step(compile_model=False), captures=False, attention=_configured),
            Variant(
                "torch.compile", _step(compile_model=True), devices=("cuda",), captures=False, attention=_configured
            ),
            Variant("original", _original, captures=False, attention=_original_attention),
            Variant("klora", _fused, captures=False, is_ours=True, attention=_fused_attention),
        ),
        bytes=_bytes,
        flops=_flops,
    ),
)
