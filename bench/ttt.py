"""Group `ttt`: one pass of score_first over documents of one length, and short documents. Group `corpus`: all lengths.

Outputs: the NLL of every target, document after document, in the pass that counts. The fixed cost of making the batches
and of reading the results is part of a call; compiling is not, nor are an engine's captures, since one engine serves a
whole run.

The original's workload, `corpus`, is every `every`th of 6,250 documents whose lengths follow lognormal(6.555, 1.066),
clipped to [8, 60000] tokens. It runs in six passes of min_nll, and in one of score_first. The results of min_nll are
LEAKY: they are compared here, never reported. Its short documents are those under 512 tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..kernels import BOS_ID, softcap_nll_ref
from ..model import network
from ..model.config import ModelConfig
from ..model.gpt import GPT
from ..model.weights import Weights, frozen_weights
from ..ttt.adapters import AdapterLayout
from ..ttt.base import BaseNll
from ..ttt.documents import Document
from ..ttt.engine import SLOTS_A_PLACE, Engine
from ..ttt.protocols import MIN_NLL, SCORE_FIRST, TTTConfig
from ..ttt.queue import Deadline
from .eager import Adam, adapt_batch
from .entry import Call, Entry, Shape, Tensors, Variant
from .law import LONGEST, law_lengths
from .original import build_original_ttt, original_ttt
from .step import model_config, seeded_model


def _config(shape: Shape) -> TTTConfig:
    return TTTConfig(deadline=0.0, chunk=shape["chunk"], window=4 * shape["chunk"], batch=shape["B"])


def _draw(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    size = shape["B"], shape["tokens"]
    tokens = torch.randint(3, model_config(shape).vocab_size, size, device=device, generator=generator)
    tokens[:, 0] = BOS_ID
    return (tokens,)


def _documents(tokens: Tensor) -> list[Document]:
    return [Document(str(at), row, bytes=1) for at, row in enumerate(tokens.cpu().numpy().astype("uint16"))]


@contextmanager
def _compiled_blocks() -> Iterator[None]:
    """The network's blocks compiled one by one, since the batch and the window change from step to step.

    A block is met with gradients and without, with one document and with several: more often than is allowed.
    """
    before, network.block = network.block, _compiled_block()
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        network.block = before


@cache
def _compiled_block() -> Callable:
    return torch.compile(network.block, dynamic=True)


def _frozen_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> GPT:
    """The seeded model."""
    return seeded_model(shape, device, dtype).requires_grad_(False)


def _exact_model(shape: Shape, device: torch.device) -> GPT:
    model = seeded_model(shape, device, torch.float32).double().requires_grad_(False)
    model.compute_dtype, model.attention = torch.float64, "math"
    return model


def _eager_pass(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    model = _frozen_model(shape, device, dtype)
    adam = Adam(model, _config(shape), shape["B"])
    return lambda tokens: torch.cat(adapt_batch(model, adam, _documents(tokens)))


def _compiled_pass(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    run = _eager_pass(shape, device, dtype)

    def call(tokens: Tensor) -> Tensor:
        with _compiled_blocks():
            return run(tokens)

    return call


def _engine_pass(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    config = _config(shape)
    engine = Engine(_frozen_model(shape, device, dtype), config, shape["B"] * shape["tokens"], slots=shape["B"])
    engine.prepare()
    return lambda tokens: torch.from_numpy(np.concatenate(_adapted(engine, _documents(tokens))))


def _adapted(engine: Engine, documents: list[Document]) -> list[np.ndarray]:
    return engine.token_nll(documents, engine.adapt(documents, Deadline(0)).kept_pass)


def _truth(shape: Shape, tokens: Tensor) -> Tensor:
    model = _exact_model(shape, tokens.device)
    return torch.cat(adapt_batch(model, Adam(model, _config(shape), shape["B"], torch.float64), _documents(tokens)))


def corpus_lengths(shape: Shape) -> np.ndarray:
    """Tokens of each document, BOS among them; at most `longest`, where the shape has one."""
    return law_lengths(6250, shape.get("longest", LONGEST))[:: shape["every"]]


def _draw_corpus(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    lengths = corpus_lengths(shape)
    vocabulary = model_config(shape).vocab_size
    tokens = torch.randint(3, vocabulary, (int(lengths.sum()),), device=device, generator=generator)
    tokens[torch.from_numpy(lengths.cumsum() - lengths).to(device)] = BOS_ID
    return (tokens,)


def _corpus(shape: Shape, tokens: Tensor) -> list[Document]:
    parts = np.split(tokens.cpu().numpy().astype("uint16"), corpus_lengths(shape).cumsum()[:-1])
    return [Document(str(index), part, bytes=1) for index, part in enumerate(parts)]


def _corpus_config(shape: Shape) -> TTTConfig:
    return TTTConfig(
        protocol=MIN_NLL if shape["passes"] > 1 else SCORE_FIRST,
        epochs=shape["passes"],
        deadline=0.0,
        chunk=shape["chunk"],
        min_tokens=shape["shortest"],
        batch=shape["B"],
    )


def _in_order(documents: list[Document], *parts: dict[str, Tensor]) -> Tensor:
    nll = {name: values for part in parts for name, values in part.items()}
    return torch.cat([nll[document.name] for document in documents])


def _split(documents: list[Document], shortest: int) -> tuple[list[Document], list[Document]]:
    """The documents of fewer than `shortest` tokens, and the others, longest first."""
    long = sorted((d for d in documents if len(d.tokens) >= shortest), key=lambda d: -d.targets)
    return [d for d in documents if len(d.tokens) < shortest], long


def _base(model: GPT | Weights, documents: list[Document], config: TTTConfig) -> dict[str, Tensor]:
    nll = torch.from_numpy(BaseNll(model, documents, config).nll).split(
        [document.targets + 1 for document in documents]
    )
    return {document.name: values[1:] for document, values in zip(documents, nll, strict=True)}


def _score_corpus(shape: Shape, tokens: Tensor, model: GPT, dtype: torch.dtype = torch.float32) -> Tensor:
    """NLL of every target: of the short documents by the base model, of the others in batches, longest first."""
    documents, config = _corpus(shape, tokens), _corpus_config(shape)
    short, long = _split(documents, config.min_tokens)
    adam, nll = Adam(model, config, config.batch, dtype), {}
    for begin in range(0, len(long), config.batch):
        mates = long[begin : begin + config.batch]
        found = adapt_batch(model, adam, mates)
        nll |= {document.name: values.cpu() for document, values in zip(mates, found, strict=True)}
    return _in_order(documents, _base(model, short, config), nll)


def _corpus_eager(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    model = _frozen_model(shape, device, dtype)
    return lambda tokens: _score_corpus(shape, tokens, model)


def _corpus_compiled(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """A call is timed once, so some documents go first: what is timed is not to be the compiler."""
    model = _frozen_model(shape, device, dtype)
    few = {**shape, "every": WARM_UP, "passes": 1}

    def run(tokens: Tensor, shape: Shape = shape) -> Tensor:
        with _compiled_blocks():
            return _score_corpus(shape, tokens, model)

    run(*_draw_corpus(few, device, dtype, torch.Generator(device).manual_seed(2)), few)
    return run


def _corpus_engine(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    model, config = _frozen_model(shape, device, dtype), _corpus_config(shape)
    frozen, long = frozen_weights(model), [length for length in corpus_lengths(shape) if length >= config.min_tokens]
    engine = Engine(model, config, int(sum(long)), slots=min(SLOTS_A_PLACE * config.batch, len(long)))
    engine.prepare()

    def run(tokens: Tensor) -> Tensor:
        documents = _corpus(shape, tokens)
        short, long = _split(documents, config.min_tokens)
        found = {d.name: torch.from_numpy(nll) for d, nll in zip(long, _adapted(engine, long), strict=True)}
        return _in_order(documents, _base(frozen, short, config), found)

    return run


def _original_corpus(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    model = _frozen_model(shape, device, dtype)

    def run(tokens: Tensor) -> Tensor:
        return torch.cat([s.nll for s in original_ttt(model, _corpus(shape, tokens), _corpus_config(shape))])

    return run


def _draw_short(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    (tokens,) = _draw_corpus(shape, device, dtype, generator)
    return (tokens[torch.from_numpy(np.repeat(_is_short(shape), corpus_lengths(shape))).to(device)],)


def _is_short(shape: Shape) -> np.ndarray:
    return corpus_lengths(shape) < shape["shortest"]


def _short_documents(shape: Shape, tokens: Tensor) -> list[Document]:
    ends = corpus_lengths(shape)[_is_short(shape)].cumsum()
    parts = np.split(tokens.cpu().numpy().astype("uint16"), ends[:-1])
    return [Document(str(index), part, bytes=1) for index, part in enumerate(parts)]


@torch.no_grad()
def _one_by_one(shape: Shape, tokens: Tensor, model: GPT) -> Tensor:
    """The original's way: each short document by itself, at batch size 1."""
    nll, weight = [], model.embed.to(model.dtype)
    for document in _short_documents(shape, tokens):
        row = torch.from_numpy(document.tokens.astype(np.int64)).to(tokens.device)[None]
        hidden = model.hidden(row[:, :-1], rotary_length=shape["shortest"], backend="reference")
        nll.append(softcap_nll_ref(hidden[0], weight, row[0, 1:], model.config.logit_softcap))
    return torch.cat(nll)


def _short_eager(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    model = _frozen_model(shape, device, dtype)
    return lambda tokens: _one_by_one(shape, tokens, model)


def _short_packed(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """Its kernels are compiled before it is timed, as an engine's are."""
    model, config = frozen_weights(_frozen_model(shape, device, dtype)), _corpus_config(shape)

    def run(tokens: Tensor) -> Tensor:
        documents = _short_documents(shape, tokens)
        return _in_order(documents, _base(model, documents, config))

    run(*_draw_short(shape, device, dtype, torch.Generator(device).manual_seed(2)))
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
    return [int(length) - 1 for length in corpus_lengths(shape) if length >= shape["shortest"]]


def _corpus_flops(shape: Shape) -> int:
    config, passes = model_config(shape), _corpus_config(shape).passes
    long = sum(_document_flops(config, targets, shape["chunk"]) for targets in _long_targets(shape))
    return passes * long + _short_flops(shape)


def _short_flops(shape: Shape) -> int:
    config, short = model_config(shape), corpus_lengths(shape)[_is_short(shape)] - 1
    return sum(_window_flops(config, int(targets), int(targets), trained=False) for targets in short)


def _corpus_bytes(shape: Shape, itemsize: int) -> int:
    config, ttt = model_config(shape), _corpus_config(shape)
    return ttt.passes * sum(_document_bytes(config, ttt, targets) for targets in _long_targets(shape))


LAW = {"B": 64, "shortest": 512, "chunk": 256}
TOY_LAW = {"blocks": 0, "B": 3, "shortest": 512, "chunk": 256, "every": 3000}
WARM_UP = 100
"""Every so many documents of the law are adapted before a compiled model is timed."""
GATE_LAW = {"blocks": 10, "B": 8, "shortest": 512, "chunk": 256, "every": 250, "longest": 640}
"""Two passes of min_nll, and documents of at most three chunks. Adam makes a step of any rounding of a gradient that is
nearly zero: after tens of them two equally good scorers have parted (tuning/corpus-gate-1.txt)."""


ENTRIES = (
    Entry(
        group="ttt",
        op="score_first_pass",
        shapes={"seed-64x2049": {"blocks": 10, "B": 64, "tokens": 2049, "chunk": 256}},
        toy={"blocks": 0, "B": 3, "tokens": 97, "chunk": 16},
        gate={"blocks": 10, "B": 8, "tokens": 769, "chunk": 256},
        draw=_draw,
        truth=_truth,
        variants=(
            Variant("eager", _eager_pass, captures=False),
            Variant("torch.compile", _compiled_pass, devices=("cuda",), captures=False),
            Variant("original", build_original_ttt, captures=False),
            Variant("klora", _engine_pass, captures=False, is_ours=True),
        ),
        bytes=_bytes,
        flops=_flops,
    ),
    Entry(
        group="corpus",
        op="min_nll_corpus_LEAKY",
        shapes={
            "seed-391": {"blocks": 10, "every": 16, "passes": 6, **LAW},
            "seed-11l-391": {"blocks": 11, "every": 16, "passes": 6, **LAW},
            "seed-6250": {"blocks": 10, "every": 1, "passes": 6, **LAW},
        },
        toy={**TOY_LAW, "passes": 2},
        gate={**GATE_LAW, "passes": 2},
        draw=_draw_corpus,
        truth=lambda shape, tokens: _score_corpus(shape, tokens, _exact_model(shape, tokens.device), torch.float64),
        variants=(
            Variant("eager", _corpus_eager, captures=False, shapes=("seed-391", "seed-11l-391")),
            Variant(
                "torch.compile",
                _corpus_compiled,
                devices=("cuda",),
                captures=False,
                shapes=("seed-391",),
            ),
            Variant(
                "original",
                _original_corpus,
                captures=False,
                instead="min_nll with one cosine over the longest document of each batch, the original's defect",
                shapes=("seed-391", "seed-11l-391"),
            ),
            Variant("klora", _corpus_engine, captures=False, is_ours=True),
        ),
        bytes=_corpus_bytes,
        flops=_corpus_flops,
        once=True,
    ),
    Entry(
        group="corpus",
        op="score_first_corpus",
        shapes={"seed-6250": {"blocks": 10, "every": 1, "passes": 1, **LAW}},
        toy={**TOY_LAW, "passes": 1},
        gate={**GATE_LAW, "passes": 1},
        draw=_draw_corpus,
        truth=lambda shape, tokens: _score_corpus(shape, tokens, _exact_model(shape, tokens.device), torch.float64),
        variants=(
            Variant("eager", _corpus_eager, captures=False),
            Variant("klora", _corpus_engine, captures=False, is_ours=True),
        ),
        bytes=_corpus_bytes,
        flops=_corpus_flops,
        once=True,
    ),
    Entry(
        group="ttt",
        op="short_documents",
        shapes={"seed-2420": {"blocks": 10, "every": 1, "passes": 1, **LAW}},
        toy={**TOY_LAW, "passes": 1, "every": 1500},
        gate={**GATE_LAW, "passes": 1},
        draw=_draw_short,
        truth=lambda shape, tokens: _one_by_one(shape, tokens, _exact_model(shape, tokens.device)),
        variants=(
            Variant("eager", _short_eager, captures=False),
            Variant("klora", _short_packed, captures=False, is_ours=True),
        ),
        bytes=lambda shape, itemsize: 0,
        flops=_short_flops,
        once=True,
    ),
)
