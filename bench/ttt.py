"""Group `ttt`: one pass of score_first over a batch of documents of one length.

Outputs: the NLL of each document in nats. The fixed cost of making the batch is part of the call.
"""

import torch
from torch import Tensor

from ..kernels import BOS
from ..ttt.adapters import AdapterPool
from ..ttt.documents import Document
from ..ttt.protocols import TTTConfig
from ..ttt.scorer import Batch, Deadline, adapt_batch
from .entry import Call, Entry, Shape, Tensors, Variant
from .original import build_original_ttt
from .step import model_config, seeded_model


def _config(shape: Shape) -> TTTConfig:
    return TTTConfig(deadline=0.0, chunk=shape["chunk"], window=4 * shape["chunk"], batch=shape["B"])


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    size = shape["B"], shape["tokens"]
    tokens = torch.randint(3, model_config(shape).vocab_size, size, device=device, generator=generator)
    tokens[:, 0] = BOS
    return (tokens,)


def _adapt(shape: Shape, tokens: Tensor, model, pool: AdapterPool) -> Tensor:
    rows = tokens.cpu().numpy().astype("uint16")
    documents = [Document(str(index), row, bytes=1) for index, row in enumerate(rows)]
    adapted = adapt_batch(model, pool, Batch(documents, _config(shape), tokens.device), Deadline(0))
    return torch.from_numpy(adapted.nats)


def _eager(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    model = seeded_model(shape, device, dtype).requires_grad_(False)
    pool = AdapterPool(model.config, _config(shape), shape["B"], device)
    return lambda tokens: _adapt(shape, tokens, model, pool)


def _truth(shape: Shape, tokens: Tensor) -> Tensor:
    model = seeded_model(shape, tokens.device, torch.float32).double().requires_grad_(False)
    model.compute_dtype, model.attention = torch.float64, "math"
    pool = AdapterPool(model.config, _config(shape), shape["B"], tokens.device, torch.float64)
    return _adapt(shape, tokens, model, pool)


def _flops(shape: Shape) -> int:
    """Forward and the backward to the inputs (no gradient of frozen weights) of every window: 4 a weight and token."""
    config, chunk = model_config(shape), shape["chunk"]
    chunks = -(-(shape["tokens"] - 1) // chunk)
    weights = config.blocks * config.width * (sum(config.qkv_sizes) + config.width + 2 * config.mlp_hidden)
    total = 0
    for j in range(chunks):
        window = min((j + 1) * chunk, 4 * chunk)
        attention = window * config.width * config.blocks
        head = chunk * config.vocab_size * config.width
        trained = j + 1 < chunks
        total += window * weights * (4 if trained else 2) + head * (4 if trained else 2)
        total += window * attention * (7 if trained else 2)
    return shape["B"] * total


def _bytes(shape: Shape, itemsize: int) -> int:
    """Adam's 28 bytes a parameter of every adapter and step, and the weights once a step."""
    config = model_config(shape)
    adapter = AdapterPool(config, _config(shape), 1, torch.device("cpu")).layout.size
    steps = -(-(shape["tokens"] - 1) // shape["chunk"]) - 1
    weights = config.blocks * config.width * (sum(config.qkv_sizes) + config.width + 2 * config.mlp_hidden)
    return steps * (28 * shape["B"] * adapter + itemsize * weights)


ENTRIES = (
    Entry(
        group="ttt",
        op="score_first_pass",
        shapes={"seed-64x2049": {"blocks": 10, "B": 64, "tokens": 2049, "chunk": 256}},
        toy={"blocks": 0, "B": 3, "tokens": 97, "chunk": 16},
        gate={"blocks": 10, "B": 2, "tokens": 769, "chunk": 256},
        draw=_draw,
        truth=_truth,
        variants=(
            Variant("eager", _eager, captures=False),
            Variant("original", build_original_ttt, captures=False),
        ),
        bytes=_bytes,
        flops=_flops,
    ),
)
