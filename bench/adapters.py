"""One training step of 64 adapters on a model of transformers: klora.lora beside PEFT and torch.compile.

    python -m klora.bench.adapters --model FOLDER --record adapters.json
    python -m klora.bench.adapters --model FOLDER --record adapters.json --rows klora,klora-int6

A step is forward, cross entropy, backward and Adam: of 64 rows of 1,024 random tokens, each a document with an adapter
of its own, on all seven linears of a block. The base is bf16 and frozen, the adapters are fp32.

    klora               klora.lora, the whole step one CUDA graph
    klora-uncaptured    the same without a graph
    klora-linear-nll    as klora, the loss by klora.kernels.linear_nll, which keeps no logits
    klora-mixed-ranks   as klora, with ranks from 4 to 64
    klora-int6          as klora, the base at six bits
    peft-one-by-one     PEFT with all adapters loaded: set_adapter and a step for each, one after the other
    peft-mixed-batch    PEFT with `adapter_names` in the forward
    compiled-bmm        torch.compile of adapters stacked as [64, R, K] and applied by torch.bmm, also as one graph

All rows have the same adapters, tokens and loss, and attention by PyTorch's causal kernels, without masks. Nothing is
dropped out. First the gate: for a cut of the model, in fp32, the gradients of every adapter, B not zero, against those
of the stacked adapters in float64 (bench/tolerance.py). Rows are timed one after another, each on a model of its own
that is freed after it. A step that runs out of memory is tried again in 2, 4, ... `parts`, one after the other.
"""

import copy
import gc
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from ..errors import KloraError
from ..kernels import linear_nll
from ..lora import attach
from ..model.config import ConfigError
from ..model.storage import write_text
from ..ttt.hf import load_hf
from ..ttt.hf_model import skip_masks
from .environment import environment
from .gate import FOREIGN, RedGate, why_broken
from .rows import picked
from .timing import captured, time_interleaved
from .tolerance import MARGIN, allowed_error, relative_error

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LR, SCALE = 1e-3, 2.0
LEAST, MOST = 4, 64
"""Of mixed ranks."""

GATE = {"layers": 2, "batch": 3, "tokens": 64}
ONE_BY_ONE = 8
"""Adapters whose steps are timed one by one; the time of all is scaled from them."""

FASTER = {"peft-one-by-one": 4.0, "peft-one-by-one, set_adapter left out": 4.0, "peft-mixed-batch": 3.0}
FASTER |= {"compiled-bmm": 1.5}
"""How many times faster than these klora shall be."""
INT6_BYTES, INT6_TIME = 0.40, 1.15
"""The most that a base at six bits shall take of the bytes and of the time of one in bf16."""

ONE_AT_A_TIME = "each row alone, on a fresh model, one row after another"

Gradients = dict[str, tuple[Tensor, Tensor]]
"""Of A [B, R, K] and B [B, N, R], by the name of their linear; adapter b is that of row b."""


@dataclass(frozen=True)
class Work:
    """What every row is given: a model of transformers, `tokens` int64 [B, S + 1], and the rank of each adapter."""

    module: nn.Module
    tokens: Tensor
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def batch(self) -> int:
        return len(self.ranks)

    def copy(self, has_masks: bool = False) -> nn.Module:
        """The model in `dtype` where the tokens are, frozen, without dropout and, if not asked for, without masks."""
        module = copy.deepcopy(self.module).to(self.tokens.device, self.dtype).eval().requires_grad_(False)
        if not has_masks:
            skip_masks(module)
        return module

    def adapters(self, name: str, linear: nn.Module) -> tuple[Tensor, Tensor]:
        """A [B, R, K] and B [B, N, R], fp32, of the linear `name`, the same at every call. Zero above a rank."""
        device, most = self.tokens.device, max(self.ranks)
        draw = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        has_rank = torch.arange(most, device=device) < torch.tensor(self.ranks, device=device)[:, None]
        a = 2 * torch.rand(self.batch, most, linear.in_features, generator=draw, device=device) - 1
        b = torch.randn(self.batch, linear.out_features, most, generator=draw, device=device)
        return a * has_rank[:, :, None] / linear.in_features**0.5, 0.05 * b * has_rank[:, None]

    def cut(self, layers: int, batch: int, tokens: int) -> "Work":
        """The first layers, rows and tokens; of ranks the first, the last and what lies evenly between."""
        base = self.module.base_model
        every, base.layers = base.layers, base.layers[:layers]
        try:
            module = copy.deepcopy(self.module)
        finally:
            base.layers = every
        module.config.num_hidden_layers = len(module.base_model.layers)
        batch = min(batch, self.batch)
        ranks = tuple(self.ranks[n * (self.batch - 1) // max(batch - 1, 1)] for n in range(batch))
        return replace(self, module=module, tokens=self.tokens[:batch, : tokens + 1], ranks=ranks)


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The linears that get adapters, by their names."""
    return {name: linear for name, linear in module.named_modules() if name.rpartition(".")[2] in LINEARS}


class Trainer:
    """Steps of all adapters of `work`, on a model of its own. `parts` are the rows that a forward takes at a time."""

    def __init__(self, work: Work):
        self.work, self.parts = work, [slice(0, work.batch)]

    def split(self, count: int) -> None:
        """Let a step take `count` parts, one after the other."""
        size = -(-self.work.batch // count)
        self.parts = [slice(first, first + size) for first in range(0, self.work.batch, size)]

    def logits(self, rows: slice) -> Tensor:
        """[b, S, V] of these rows, each with its adapter."""
        raise NotImplementedError

    def loss(self, rows: slice) -> Tensor:
        """Sum of the rows' mean NLL: a row's adapter has the gradient that it would have alone."""
        logits, targets = self.logits(rows), self.work.tokens[rows, 1:]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return F.cross_entropy(wide, targets.flatten(), reduction="sum") / targets.size(1)

    def backward(self, rows: slice) -> Tensor:
        """The loss, after its gradients were added to those of these rows' adapters."""
        loss = self.loss(rows)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Adam of all adapters; gradients are gone."""
        raise NotImplementedError

    def forget(self) -> None:
        """Gradients are gone."""
        raise NotImplementedError

    def step(self) -> Tensor:
        """The loss, after one step of all adapters."""
        loss = sum(self.backward(rows) for rows in self.parts)
        self.update()
        return loss

    def gradients(self) -> Gradients:
        """What :meth:`backward` has gathered."""
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """A model with the base weights that this one computes with."""
        return self.work.module

    def _inputs(self, rows: slice) -> dict[str, Any]:
        return {"input_ids": self.work.tokens[rows, :-1], "use_cache": False}


class Klora(Trainer):
    """By klora.lora."""

    def __init__(self, work: Work, base: str = "dense", is_fused: bool = False):
        super().__init__(work)
        self.module, self.is_fused = work.copy(), is_fused
        linears = linears_of(self.module)
        self.lora = attach(self.module, slots=work.batch, targets=LINEARS, rank=max(work.ranks), base=base)
        for number, rank in enumerate(work.ranks):
            self.lora.adapters.create(str(number), rank=rank, alpha=SCALE * rank)
        with torch.no_grad():
            for place, leaves in zip(self.lora.pool.places, self.lora.pool.leaves, strict=True):
                for leaf, first in zip(leaves, work.adapters(place.name, linears[place.name]), strict=True):
                    leaf.copy_(first)
        self.optimizer = self.lora.optimizer(lr=LR)
        self.slots = torch.arange(work.batch, device=work.tokens.device)

    def logits(self, rows: slice) -> Tensor:
        with self.lora.rows(self.slots[rows]):
            return self.module(**self._inputs(rows)).logits

    def loss(self, rows: slice) -> Tensor:
        if not self.is_fused:
            return super().loss(rows)
        targets = self.work.tokens[rows, 1:]
        with self.lora.rows(self.slots[rows]):
            hidden = self.module.base_model(**self._inputs(rows))[0]
        head = self.module.get_output_embeddings().weight
        return linear_nll(hidden, head, targets, reduction="sum") / targets.size(1)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def gradients(self) -> Gradients:
        pool = self.lora.pool
        return {
            place.name: tuple(pool.grads.as_strided(x.shape, x.stride(), x.storage_offset()).clone() for x in leaves)
            for place, leaves in zip(pool.places, pool.leaves, strict=True)
        }

    def dense(self) -> nn.Module:
        module = copy.deepcopy(self.work.module).to(self.work.tokens.device, torch.float32)
        with torch.no_grad():
            for name, linear in linears_of(module).items():
                own = self.module.get_submodule(name)
                if hasattr(own, "dequantize"):
                    linear.weight.copy_(own.dequantize(torch.float32))
        return module

    def base_bytes(self) -> dict[str, float]:
        """Bytes of the adapted linears' weights in the model's dtype, and of their codes and scales."""
        matrices = [self.module.get_submodule(place.name).matrix for place in self.lora.pool.places]
        dense = sum(place.inputs * place.outputs for place in self.lora.pool.places) * self.work.dtype.itemsize
        int6 = sum(matrix.packed.nbytes + matrix.scale.nbytes for matrix in matrices)
        return {"dense": dense, "int6": int6, "ratio": int6 / dense}


class StackedLinear(nn.Module):
    """A linear with the adapters of a batch: A [B, R, K], B [B, N, R], of which `owner` says what rows are computed."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, owner: "Stacked"):
        super().__init__()
        self.linear, self.a, self.b = linear, nn.Parameter(a), nn.Parameter(b)
        self.owner = [owner]  # in a list: it is no part of the module

    def forward(self, x: Tensor) -> Tensor:
        a, b = (factor[self.owner[0].rows].to(x.dtype) for factor in (self.a, self.b))
        return self.linear(x) + SCALE * torch.bmm(torch.bmm(x, a.mT), b.mT)


class Stacked(Trainer):
    """By torch.bmm. In float64 it is what the gate compares with, in another dtype the gate's yardstick."""

    def __init__(self, work: Work, has_masks: bool = False):
        super().__init__(work)
        self.module, self.rows = work.copy(has_masks), slice(0, work.batch)
        wide = torch.promote_types(work.dtype, torch.float32)
        self.linears = {}
        for name, linear in linears_of(self.module).items():
            a, b = (factor.to(wide) for factor in work.adapters(name, linear))
            self.linears[name] = StackedLinear(linear, a, b, self)
            self.module.set_submodule(name, self.linears[name])
        leaves = [leaf for linear in self.linears.values() for leaf in (linear.a, linear.b)]
        self.optimizer = torch.optim.Adam(leaves, lr=LR, fused=True, capturable=work.tokens.is_cuda)

    def backward(self, rows: slice) -> Tensor:
        self.rows = rows
        return super().backward(rows)

    def logits(self, rows: slice) -> Tensor:
        return self.module(**self._inputs(rows)).logits

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def gradients(self) -> Gradients:
        return {name: (linear.a.grad, linear.b.grad) for name, linear in self.linears.items()}


class CompiledBmm(Stacked):
    """By torch.compile, the loss included."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.loss = torch.compile(self.loss)


class Peft(Trainer):
    """By PEFT, with all adapters loaded."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.names = [str(number) for number in range(work.batch)]
        module = work.copy()
        first = {name: work.adapters(name, linear) for name, linear in linears_of(module).items()}
        self.model = peft_model(module, dict(zip(self.names, work.ranks, strict=True)))
        leaves = dict(self.model.named_parameters())
        self.leaves: list[dict[str, tuple[nn.Parameter, nn.Parameter]]] = []
        for number, (name, rank) in enumerate(zip(self.names, work.ranks, strict=True)):
            paths = {linear: f"base_model.model.{linear}.lora_{{}}.{name}.weight" for linear in first}
            own = {linear: (leaves[path.format("A")], leaves[path.format("B")]) for linear, path in paths.items()}
            for linear, (a, b) in own.items():
                a.data.copy_(first[linear][0][number, :rank])
                b.data.copy_(first[linear][1][number, :, :rank])
            self.leaves.append(own)

    def _flat(self, number: int) -> list[nn.Parameter]:
        """A and B of one adapter."""
        return [leaf for pair in self.leaves[number].values() for leaf in pair]

    def gradients(self) -> Gradients:
        for number, name in enumerate(self.names):
            if any(leaf.grad is None for leaf in self._flat(number)):
                raise RuntimeError(f"the adapter {name} gets no gradient")
        return {
            linear: tuple(torch.stack([own[linear][part].grad for own in self.leaves]) for part in (0, 1))
            for linear in self.leaves[0]
        }


def peft_model(module: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """The model as PEFT wraps it, with adapters of these names.

    PEFT looks through the whole model for every adapter, for 64 of them a minute long. So they are made on the first
    layer, and its linears copied to the others, each with its own weight.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    layers = module.base_model.layers
    first, rest = layers[0], list(layers[1:])
    del layers[1:]
    model = None
    for name, rank in ranks.items():
        about = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=list(LINEARS), lora_dropout=0.0)
        if model is None:
            model = get_peft_model(module, about, adapter_name=name)
        else:
            model.add_adapter(name, about)
    adapted = {name: part for name, part in first.named_modules() if isinstance(part, LoraLayer)}
    for layer in rest:
        for name, linear in adapted.items():
            own = {id(linear.base_layer): layer.get_submodule(name)}
            layer.set_submodule(name, copy.deepcopy(linear, own))
        layers.append(layer)
    return model.eval()


class PeftOneByOne(Peft):
    """One adapter after the other, each with its own Adam."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.split(work.batch)
        self.optimizers = [torch.optim.Adam(self._flat(n), lr=LR, fused=True) for n in range(work.batch)]

    def logits(self, rows: slice) -> Tensor:
        return self.model(**self._inputs(rows)).logits

    def backward(self, rows: slice) -> Tensor:
        self.model.set_adapter(self.names[rows.start])
        return super().backward(rows)

    def step(self) -> Tensor:
        return sum(self.step_of(number, self.backward) for number in range(self.sample))

    def steps_of_the_last(self) -> Tensor:
        """As many steps as :meth:`step` takes, all of the adapter that it has set last."""
        return sum(self.step_of(self.sample - 1, super(PeftOneByOne, self).backward) for _ in range(self.sample))

    def step_of(self, number: int, backward: Callable[[slice], Tensor]) -> Tensor:
        """One step of one adapter."""
        loss = backward(self.parts[number])
        self.optimizers[number].step()
        self.optimizers[number].zero_grad()
        return loss

    def forget(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @property
    def sample(self) -> int:
        """Adapters whose steps are timed."""
        return min(ONE_BY_ONE, self.work.batch)


class PeftMixedBatch(Peft):
    """All adapters in one forward, which PEFT has for inference."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.refusal = self._refusal_of_training()
        leaves = [leaf.requires_grad_() for number in range(work.batch) for leaf in self._flat(number)]
        self.optimizer = torch.optim.Adam(leaves, lr=LR, fused=True)

    @torch.no_grad()
    def _refusal_of_training(self) -> str:
        """What PEFT says to it in training mode; empty, and the model stays in that mode, where it says nothing."""
        self.model.train()
        try:
            self.model(input_ids=self.work.tokens[:, :1], adapter_names=self.names, use_cache=False)
        except ValueError as error:
            self.model.eval()
            return why_broken(error)
        return ""

    def logits(self, rows: slice) -> Tensor:
        return self.model(**self._inputs(rows), adapter_names=self.names[rows]).logits

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Row:
    """What is timed. `captures`: as one CUDA graph. `is_mixed`: with unlike ranks. `package` is what it wants."""

    build: Callable[[Work], Trainer]
    captures: bool = False
    is_ours: bool = False
    is_mixed: bool = False
    package: str = ""

    @property
    def why_missing(self) -> str:
        """Empty where its package is installed, or where it wants none."""
        is_there = not self.package or find_spec(self.package) is not None
        return "" if is_there else f"package {self.package} is not installed"


INT6, FUSED = partial(Klora, base="int6"), partial(Klora, is_fused=True)
ROWS = {
    "klora": Row(Klora, captures=True, is_ours=True),
    "klora-uncaptured": Row(Klora, is_ours=True),
    "klora-linear-nll": Row(FUSED, captures=True, is_ours=True),
    "klora-mixed-ranks": Row(Klora, captures=True, is_ours=True, is_mixed=True),
    "klora-int6": Row(INT6, captures=True, is_ours=True),
    "peft-one-by-one": Row(PeftOneByOne, package="peft"),
    "peft-mixed-batch": Row(PeftMixedBatch, package="peft"),
    "compiled-bmm": Row(CompiledBmm, captures=True),
}


def gate(work: Work, row: Row, name: str) -> dict[str, Any]:
    """Of a cut of `work`: the worst error of an adapter's gradient for A or B, in fp32 and, of ours, in its dtype.

    RedGate: one in fp32 is larger than the rule allows.
    """
    cut, found = work.cut(**GATE), {}
    for dtype in dict.fromkeys((torch.float32, work.dtype if row.is_ours else torch.float32)):
        trainer = row.build(replace(cut, dtype=dtype))
        ours = _gradients(trainer)
        of_base = replace(cut, module=trainer.dense(), dtype=dtype)
        plain = _gradients(Stacked(of_base))
        exact = _gradients(Stacked(replace(of_base, dtype=torch.float64), has_masks=True))
        worst: dict[str, Any] = {}
        for part, sizes in exact.items():
            eager, error = (relative_error(gradients[part], sizes) for gradients in (plain, ours))
            allowed = allowed_error(eager, dtype, sizes.numel(), MARGIN if row.is_ours else FOREIGN)
            if dtype == torch.float32 and not error <= allowed:
                says = f"{name}: the gradient of {part} is {error:.2e} from float64; allowed: {allowed:.2e}"
                raise RedGate(f"{says}. No speed is reported.")
            if not worst or error > worst["error"]:
                worst = {"error": error, "eager": eager, "allowed": allowed, "of": part}
        found[str(dtype).removeprefix("torch.")] = worst
    return found


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Flat, of A and of B of each adapter."""
    for rows in trainer.parts:
        trainer.backward(rows)
    found, ranks = trainer.gradients(), trainer.work.ranks
    flat = {}
    for number, rank in enumerate(ranks):
        flat[f"A of adapter {number}"] = torch.cat([a[number, :rank].flatten() for a, _ in found.values()])
        flat[f"B of adapter {number}"] = torch.cat([b[number, :, :rank].flatten() for _, b in found.values()])
    return flat


def timed(work: Work, row: Row, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, most bytes that were allocated, and how it was run. `first_step_seconds` are from the
    building to the end of the first step: adapters made and kernels compiled.
    """
    device = work.tokens.device
    _free(device)
    began = time.perf_counter()
    trainer = row.build(work)
    loss, parts = _first_step(trainer, device)
    found: dict[str, Any] = {
        "loss": loss / work.batch,
        "parts": parts,
        "captured": False,
        "first_step_seconds": time.perf_counter() - began,
    }
    step: Callable[[], object] = trainer.step
    if row.captures and device.type == "cuda":
        try:
            step = captured(trainer.step, device)
            found["captured"] = True
        except RuntimeError as error:
            found["why_not_captured"] = why_broken(error)
            trainer.forget()
    thunks, factor = {"ms": [step]}, 1.0
    if isinstance(trainer, PeftOneByOne):
        thunks["ms_set_adapter_left_out"] = [trainer.steps_of_the_last]
        factor = work.batch / trainer.sample
        found |= {"loss": loss / trainer.sample, "measured_adapters": trainer.sample}
        found["ms_are"] = f"scaled to {work.batch} adapters by their number"
    times = time_interleaved(thunks, device, least_rounds=3, most_rounds=rounds, warmup=1, most_seconds=10.0)
    for name, of in times.items():
        found[name] = {"p20": factor * of.p20, "p50": factor * of.p50, "p80": factor * of.p80, "rounds": of.rounds}
    found["peak_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if isinstance(trainer, PeftMixedBatch):
        found["mode"] = f"eval; in training mode {trainer.refusal}" if trainer.refusal else "training"
    if row.build is INT6:
        found["base_bytes"] = trainer.base_bytes()
    return found


def _first_step(trainer: Trainer, device: torch.device) -> tuple[float, int]:
    """The loss of the first step, and in how many parts it fits."""
    parts = 1
    while True:
        try:
            return float(trainer.step()), parts
        except torch.OutOfMemoryError:
            if parts >= trainer.work.batch or isinstance(trainer, PeftOneByOne):
                raise
        trainer.forget()
        _free(device)
        parts *= 2
        trainer.split(parts)


def _free(device: torch.device) -> None:
    """Nothing of an earlier row is left, and peaks of memory count from here."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def verdicts(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What klora shall reach beside each row that was timed, and what it does."""
    times = {name: row["ms"]["p50"] for name, row in rows.items()}
    for name, row in rows.items():
        if "ms_set_adapter_left_out" in row:
            times[f"{name}, set_adapter left out"] = row["ms_set_adapter_left_out"]["p50"]
    found = []
    if "klora" in times:
        for name, wanted in FASTER.items():
            if name in times:
                faster = times[name] / times["klora"]
                what = f"times faster than {name}"
                found.append({"what": what, "found": faster, "at_least": wanted, "is_reached": faster >= wanted})
    if "klora-int6" in rows:
        ratio = rows["klora-int6"]["base_bytes"]["ratio"]
        what = "bytes of the base at six bits, of those in the model's dtype"
        found.append({"what": what, "found": ratio, "at_most": INT6_BYTES, "is_reached": ratio <= INT6_BYTES})
        if "klora" in times:
            ratio = times["klora-int6"] / times["klora"]
            what = "time with a base at six bits, of that in the model's dtype"
            found.append({"what": what, "found": ratio, "at_most": INT6_TIME, "is_reached": ratio <= INT6_TIME})
    return found


def mixed_ranks(batch: int) -> tuple[int, ...]:
    """From LEAST to MOST in even steps."""
    return tuple(LEAST + (MOST - LEAST) * number // max(batch - 1, 1) for number in range(batch))


def measured(
    works: Mapping[bool, Work], rows: Mapping[str, Row], rounds: int
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(row, what it gave, why it gave nothing): first every gate, then every time. `works` are those of like and of
    mixed ranks. What is ours raises; a peer that raises is named.
    """
    errors: dict[tuple, dict[str, Any]] = {}
    missing = {name: row.why_missing for name, row in rows.items() if row.why_missing}
    for name, row in rows.items():
        kind = row.build, row.is_mixed
        if name not in missing and kind not in errors:
            with _peer(name, row, missing):
                errors[kind] = gate(works[row.is_mixed], row, name)
    for name, row in rows.items():
        found: dict[str, Any] = {}
        if name not in missing:
            with _peer(name, row, missing):
                found = {"errors": errors[row.build, row.is_mixed], **timed(works[row.is_mixed], row, rounds)}
        yield name, found, missing.get(name, "")
    _free(works[False].tokens.device)


@contextmanager
def _peer(name: str, row: Row, missing: dict[str, str]) -> Iterator[None]:
    """Inside, what somebody else's package raises is noted in `missing`; what is ours, and a red gate, raise."""
    try:
        yield
    except Exception as error:
        if row.is_ours or isinstance(error, RedGate):
            raise
        missing[name] = why_broken(error)


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder, on the CPU. ConfigError: it has no blocks with the seven linears."""
    module, _ = load_hf(folder, torch.device("cpu"), str(dtype).removeprefix("torch."))
    layers = getattr(module.base_model, "layers", None)
    missing = {*LINEARS} - {name.rpartition(".")[2] for name in linears_of(module)}
    if not isinstance(layers, nn.ModuleList) or missing:
        raise ConfigError(
            f"{folder} holds a {type(module).__name__}; wanted: a model of Llama's kind, whose `layers` have the "
            f"linears {', '.join(LINEARS)}"
        )
    return module


def facts_of(module: nn.Module) -> dict[str, Any]:
    """What a record says of the model."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    parameters = sum(parameter.numel() for parameter in module.parameters())
    about = {name: getattr(module.config, name) for name in sizes}
    return {"kind": type(module).__name__, "parameters": parameters, **about}


def works_of(module: nn.Module, device: torch.device, batch: int, tokens: int, rank: int) -> dict[bool, Work]:
    """The same rows with adapters of one rank (False) and of mixed ranks (True)."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = module.get_input_embeddings().num_embeddings
    drawn = torch.randint(vocabulary, (batch, tokens + 1), generator=draw).to(device)
    like = Work(module, drawn, (rank,) * batch, module.dtype)
    return {False: like, True: replace(like, ranks=mixed_ranks(batch))}


def said(name: str, row: Mapping[str, Any], why: str) -> str:
    """A line about a row."""
    if why:
        return f"{name}: {why}"
    more = ["one graph"] * row["captured"] + [f"{row['parts']} parts"] * (row["parts"] > 1)
    if "ms_set_adapter_left_out" in row:
        more.append(f"without set_adapter {row['ms_set_adapter_left_out']['p50']:.1f} ms")
        more.append(f"scaled from {row['measured_adapters']}")
    if row["peak_bytes"] is not None:
        more.append(f"peak {row['peak_bytes'] / 2**30:.1f} GiB")
    return f"{name}: {row['ms']['p50']:.1f} ms a step{''.join(f', {part}' for part in more)}"


def main(
    model: Annotated[Path, typer.Option(help="Folder of a model of Llama's kind, as save_pretrained writes it.")],
    record: Annotated[Path, typer.Option(help="The record to write, and to write again after each row.")] = Path(
        "adapters.json"
    ),
    names: Annotated[str, typer.Option("--rows", help="Rows, with commas; all.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Adapters, each with one row of the batch.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 1024,
    rank: Annotated[int, typer.Option(min=1, help="Rank of every adapter but the mixed ones.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Most steps of which the median counts.")] = 5,
    toy: Annotated[bool, typer.Option("--toy", help="Also on a CPU, in fp32: it only tries the measurement.")] = False,
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Measure and write the record."""
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or toy):
        raise SystemExit("a training step is measured on a CUDA GPU, and PyTorch sees none here; --toy only tries it")
    rows = picked(ROWS, names)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    try:
        works = works_of(load(model, dtype), device, batch, tokens, rank)
        result = {
            "name": "adapters",
            "environment": environment(commit, "transformers", "peft"),
            "toy": not on_gpu,
            "model": facts_of(works[False].module),
            "sizes": {"batch": batch, "tokens": tokens, "rank": rank, "mixed_ranks": [LEAST, MOST]},
            "linears": LINEARS,
            "dtype": str(dtype).removeprefix("torch."),
            "gate": GATE,
            "timed": ONE_AT_A_TIME,
            "rows": found,
            "missing": missing,
        }
        for name, row, why in measured(works, rows, rounds):
            (missing if why else found)[name] = why or row
            print(said(name, row, why), flush=True)
            result["verdicts"] = verdicts(found) if on_gpu else []
            write_text(record, json.dumps(result, indent=1) + "\n")
    except KloraError as error:
        raise SystemExit(str(error)) from None
    for verdict in result["verdicts"]:
        wanted = f"at least {verdict['at_least']}" if "at_least" in verdict else f"at most {verdict['at_most']}"
        print(f"{verdict['found']:.2f} {verdict['what']}; wanted: {wanted}{' - missed' * (not verdict['is_reached'])}")


if __name__ == "__main__":
    typer.run(main)
