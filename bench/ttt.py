"""Group `ttt`: one pass of score_first over documents of one length, and the original's workload.

Outputs: the NLL of each document in nats. The fixed cost of making the batches is part of the call.

The original's workload is a law of lengths, lognormal(6.555, 1.066) clipped to [8, 60000] tokens, of 6,250 documents
every `every`th, in six passes of min_nll. Its results are LEAKY and are compared here, never reported.
"""

import numpy as np
import torch
from torch import Tensor

from ..kernels import BOS
from ..model.config import ModelConfig
from ..model.gpt import GPT
from ..ttt.adapters import AdapterLayout, AdapterPool
from ..ttt.base import BaseNll
from ..ttt.documents import Document
from ..ttt.protocols import MIN_NLL, TTTConfig
from ..ttt.scorer import Batch, Deadline, adapt_batch
from .entry import Call, Entry, Shape, Tensors, Variant
from .original import build_original_ttt, original_ttt
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


def _frozen_model(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> GPT:
    """The seeded model; compiled block by block, since the batch and the window change from step to step."""
    model = seeded_model(shape, device, dtype).requires_grad_(False)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=True)
    return model


def _exact_model(shape: Shape, device: torch.device) -> GPT:
    model = seeded_model(shape, device, torch.float32).double().requires_grad_(False)
    model.compute_dtype, model.attention = torch.float64, "math"
    return model


def _scorer(compiled: bool):
    def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
        model = _frozen_model(shape, device, dtype, compiled)
        pool = AdapterPool(model.config, _config(shape), shape["B"], device)
        return lambda tokens: _adapt(shape, tokens, model, pool)

    return build


def _truth(shape: Shape, tokens: Tensor) -> Tensor:
    model = _exact_model(shape, tokens.device)
    pool = AdapterPool(model.config, _config(shape), shape["B"], tokens.device, torch.float64)
    return _adapt(shape, tokens, model, pool)


def _corpus_lengths(shape: Shape) -> np.ndarray:
    """Tokens of each document, BOS among them."""
    drawn = np.random.default_rng(0).lognormal(6.555, 1.066, 6250).astype(np.int64)
    return drawn.clip(8, 60000)[:: shape["every"]]


def _draw_corpus(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    lengths = _corpus_lengths(shape)
    vocabulary = model_config(shape).vocab_size
    tokens = torch.randint(3, vocabulary, (int(lengths.sum()),), device=device, generator=generator)
    tokens[torch.from_numpy(lengths.cumsum() - lengths).to(device)] = BOS
    return (tokens,)


def _corpus(shape: Shape, tokens: Tensor) -> list[Document]:
    parts = np.split(tokens.cpu().numpy().astype("uint16"), _corpus_lengths(shape).cumsum()[:-1])
    return [Document(str(index), part, bytes=1) for index, part in enumerate(parts)]


def _corpus_config(shape: Shape) -> TTTConfig:
    return TTTConfig(
        protocol=MIN_NLL, deadline=0.0, chunk=shape["chunk"], min_tokens=shape["shortest"], batch=shape["B"]
    )


def _score_corpus(shape: Shape, tokens: Tensor, model: GPT, pool_dtype: torch.dtype = torch.float32) -> Tensor:
    """Nats of every document: the short ones by the base model, the others in batches, longest first."""
    documents, config = _corpus(shape, tokens), _corpus_config(shape)
    short = [document for document in documents if len(document.tokens) < config.min_tokens]
    base = BaseNll(model, short, config)
    nats = {document.name: base.of(index)[0] for index, document in enumerate(short)}
    long = sorted((d for d in documents if len(d.tokens) >= config.min_tokens), key=lambda d: -d.targets)
    pool = AdapterPool(model.config, config, config.batch, tokens.device, pool_dtype)
    for begin in range(0, len(long), config.batch):
        mates = long[begin : begin + config.batch]
        adapted = adapt_batch(model, pool, Batch(mates, config, tokens.device), Deadline(0))
        nats |= {document.name: value for document, value in zip(mates, adapted.nats, strict=True)}
    return torch.tensor([nats[document.name] for document in documents], dtype=torch.float64)


def _corpus_eager(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    model = _frozen_model(shape, device, dtype)
    return lambda tokens: _score_corpus(shape, tokens, model)


def _original_corpus(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    model = _frozen_model(shape, device, dtype)

    def run(tokens: Tensor) -> Tensor:
        scores = original_ttt(model, _corpus(shape, tokens), _corpus_config(shape))
        return torch.tensor([score.nats for score in scores], dtype=torch.float64)

    return run


def _block_weights(config: ModelConfig) -> int:
    return config.blocks * config.width * (sum(config.qkv_sizes) + config.width + 2 * config.mlp_hidden)


def _window_flops(config: ModelConfig, window: int, scored: int, trained: bool) -> int:
    """One window forward and, where trained, backward to the inputs: a frozen weight gets no gradient.

    2 operations a weight and token forward and 2 backward; the causal half of attention's 2 products forward and 5
    backward; the head over the chunk's rows alone.
    """
    weights = window * _block_weights(config) + scored * config.vocab_size * config.width
    attention = window * window * config.width * config.blocks
    return weights * (4 if trained else 2) + attention * (7 if trained else 2)


def _document_flops(config: ModelConfig, targets: int, chunk: int) -> int:
    chunks = -(-targets // chunk)
    return sum(
        _window_flops(config, min((j + 1) * chunk, 4 * chunk, targets), min(chunk, targets - j * chunk), j + 1 < chunks)
        for j in range(chunks)
    )


def _document_bytes(config: ModelConfig, ttt: TTTConfig, targets: int) -> int:
    """Adam's 28 bytes a parameter of the document's adapter every step."""
    adapter = AdapterLayout(config, ttt).size
    return (-(-targets // ttt.chunk) - 1) * 28 * adapter


def _flops(shape: Shape) -> int:
    return shape["B"] * _document_flops(model_config(shape), shape["tokens"] - 1, shape["chunk"])


def _bytes(shape: Shape, itemsize: int) -> int:
    return shape["B"] * _document_bytes(model_config(shape), _config(shape), shape["tokens"] - 1)


def _long_targets(shape: Shape) -> list[int]:
    return [int(length) - 1 for length in _corpus_lengths(shape) if length >= shape["shortest"]]


def _corpus_flops(shape: Shape) -> int:
    config, passes = model_config(shape), _corpus_config(shape).passes
    long = sum(_document_flops(config, targets, shape["chunk"]) for targets in _long_targets(shape))
    short = (int(length) - 1 for length in _corpus_lengths(shape) if length < shape["shortest"])
    return passes * long + sum(_window_flops(config, targets, targets, trained=False) for targets in short)


def _corpus_bytes(shape: Shape, itemsize: int) -> int:
    config, ttt = model_config(shape), _corpus_config(shape)
    return ttt.passes * sum(_document_bytes(config, ttt, targets) for targets in _long_targets(shape))


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
            Variant("eager", _scorer(compiled=False), captures=False),
            Variant("torch.compile", _scorer(compiled=True), devices=("cuda",), captures=False),
            Variant("original", build_original_ttt, captures=False),
        ),
        bytes=_bytes,
        flops=_flops,
    ),
    Entry(
        group="ttt",
        op="min_nll_corpus_LEAKY",
        shapes={"seed-391": {"blocks": 10, "B": 64, "every": 16, "shortest": 512, "chunk": 256}},
        toy={"blocks": 0, "B": 3, "every": 3000, "shortest": 512, "chunk": 256},
        gate={"blocks": 10, "B": 2, "every": 1500, "shortest": 512, "chunk": 256},
        draw=_draw_corpus,
        truth=lambda shape, tokens: _score_corpus(shape, tokens, _exact_model(shape, tokens.device), torch.float64),
        variants=(
            Variant("eager", _corpus_eager, captures=False),
            Variant(
                "original",
                _original_corpus,
                captures=False,
                instead="min_nll with one cosine over the longest document of each batch, the original's defect",
            ),
        ),
        bytes=_corpus_bytes,
        flops=_corpus_flops,
        once=True,
    ),
)
