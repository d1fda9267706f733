"""The engine for models of transformers: the same rounds, graphs, records and optimizer, another forward.

Adapters are those of klora.lora, a slot of its pool for each document. Autograd gives the gradients of the whole pool,
zeros where no place names a slot, and they are copied to where Adam reads them.
"""

import math

import torch
from torch import Tensor

from ..kernels.columns import copy_columns_
from ..lora.attach import Lora
from ..model.ranges import phase
from .adapters import Slots
from .engine import Engine
from .hf_model import HfModel
from .protocols import TTTConfig
from .ring import Ring, RingContext
from .schedule import Queue
from .step import EngineStep

MEASURED_TOKENS = 256
"""Tokens of the window by which a step's memory is measured: it grows with the number of tokens."""

IN_FLIGHT = 1.25
"""A step takes so many times what autograd keeps: gradients on their way, and the allocator's blocks."""


class HfStep(EngineStep):
    """The step of an :class:`HfModel`."""

    weights: HfModel

    def _prepare(self, queue: Queue) -> None:
        self.temperature = queue.temperature
        self.leaves = [leaf for pair in self.weights.lora.pool.leaves for leaf in pair]
        self.starts = [leaf.storage_offset() for leaf in self.leaves]

    def _nll(self, slots: Tensor, inputs: Tensor, targets: Tensor, context: RingContext | None) -> Tensor:
        with self.weights.rows(slots):
            hidden = self.weights.hidden(inputs, self.ttt.chunk)
        return self.weights.nll(hidden, targets, self.temperature, slots)

    def _gradients(
        self, slots: Tensor, inputs: Tensor, targets: Tensor, share: Tensor, context: RingContext | None
    ) -> Tensor:
        with phase("forward"), torch.enable_grad(), self.weights.rows(slots):
            hidden = self.weights.hidden(inputs, self.ttt.chunk)
        with phase("backward"):
            nll, dhidden = self.weights.nll_grads(hidden, targets, share, self.temperature, slots)
            grads = torch.autograd.grad(hidden, self.leaves, dhidden, allow_unused=True, materialize_grads=True)
            copy_columns_(self.pool.grads, grads, self.starts)
        return nll


class HfEngine(Engine):
    """Adapts sets of documents under one config, as :class:`Engine`, with an :class:`HfModel`."""

    def _make_pool(self, model: HfModel, slots: int, dtype: torch.dtype, can_capture: bool) -> None:
        self.weights, self.ring = model, None
        self.pool = slots_of(model.attach(self.config, slots), model, self.config)

    def _slot_bytes(self, model: HfModel) -> int:
        """Parameters, gradient and two moments in fp32, and as much again while autograd has its own."""
        return 32 * self._one(model)[0]

    def _activation_bytes(self, model: HfModel, config: TTTConfig, rows: int) -> int:
        _, kept = self._one(model)
        item = torch.finfo(model.dtype).bits // 8
        head = config.chunk * model.vocab_size * (item if model.has_parts else item + 12)
        return int(IN_FLIGHT * rows * (kept * config.window + head))

    def _tables_bytes(self, model: HfModel) -> int:
        return 0

    def _one(self, model: HfModel) -> tuple[int, float]:
        """Parameters of one adapter, and bytes that autograd keeps of a token: measured, before there are slots."""
        if not hasattr(self, "_measured"):
            pool = model.attach(self.config, 1).pool
            self._measured = pool.params.size(1), bytes_kept(model, min(MEASURED_TOKENS, self.config.window))
        return self._measured

    def _new_step(self, queue: Queue, rows: int, ring: Ring | None) -> HfStep:
        state = self.pool, self.tokens, self.record, self.plan, self.chunks
        return HfStep(self.weights, *state, queue, rows, self.backend)


def slots_of(lora: Lora, model: HfModel, config: TTTConfig) -> Slots:
    """The pool of `lora` as the engine takes it, every slot as a document starts.

    A is a_scale U(-1/sqrt(K), 1/sqrt(K)), K its inputs, and B zero. The pool keeps scales apart, so that an adapter is
    what PEFT trains.
    """
    pool = lora.pool
    rates = torch.ones(pool.params.size(1))
    draw = torch.Generator().manual_seed(config.adapter_seed)
    for index, (place, (a, b)) in enumerate(zip(pool.places, pool.leaves, strict=True)):
        target = model.ends[place.target]
        values = 2 * torch.rand(place.rank, place.inputs, generator=draw) - 1
        first, scale = config.a_scale * values / math.sqrt(place.inputs), config.scale(target)
        pool.write(0, index, first, torch.zeros(place.outputs, place.rank), scale)
        for leaf in (a, b):
            _view(rates[None], leaf).fill_(getattr(config, f"{target}_lr"))
    pool.spread(0)
    initial, rates = pool.params[0].clone(), rates.to(pool.device)
    decay = config.weight_decay * rates if config.weight_decay else None
    return Slots(config, pool.params, pool.grads, initial, rates, decay)


def bytes_kept(model: HfModel, tokens: int) -> float:
    """Bytes that autograd keeps of one token of a forward with adapters, the model's weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    slots = torch.zeros(1, dtype=torch.int64, device=model.device)
    inputs = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    weights.add(model.lora.pool.params.untyped_storage().data_ptr())
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), model.rows(slots):
        model.hidden(inputs, 1)
    return sum(kept.values()) / tokens


def _view(rows: Tensor, leaf: Tensor) -> Tensor:
    """The part of `rows` [slots, size] that lies where `leaf` [slots, ...] lies in the pool's rows."""
    start = leaf.storage_offset()
    return rows[:, start : start + leaf[0].numel()].unflatten(1, leaf.shape[1:])
