"""The trainers of bench/adapters.py: one step of many adapters by klora.lora, by PEFT and by adapters that are stacked.

A :class:`Work` is the model, the tokens and what the adapters start from; each trainer takes the same step of it.
"""

import copy
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import linear_nll
from ..lora import attach, set_attention
from ..ttt.hf_model import skip_masks
from .gate import why_broken

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LR, SCALE = 1e-3, 2.0
LOGITS = 1 << 35
"""Bytes that `linear_nll` may keep: all logits of 65,536 tokens, which is what the other losses keep, in one slice."""
ONE_BY_ONE = 8
"""Adapters whose steps are timed one by one; the time of all is scaled from them."""

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

    optimizer: torch.optim.Optimizer
    """Of all adapters, where they have one."""

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
        return self.nll(self.logits(rows), self.work.tokens[rows, 1:])

    @staticmethod
    def nll(logits: Tensor, targets: Tensor) -> Tensor:
        """Of `logits` [b, S, V]: the NLL of `targets` [b, S], summed over rows and averaged over tokens."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return F.cross_entropy(wide, targets.flatten(), reduction="sum") / targets.size(1)

    def backward(self, rows: slice) -> Tensor:
        """The loss, after its gradients were added to those of these rows' adapters."""
        loss = self.loss(rows)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Adam of all adapters; gradients are gone."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Gradients are gone."""
        self.optimizer.zero_grad()

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
        return linear_nll(hidden, head, targets, reduction="sum", memory=LOGITS) / targets.size(1)

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


class KloraCompiled(Klora):
    """By klora.lora in a model whose layers torch.compile has compiled. `attends`: with klora's attention.

    One graph serves all layers, so that compiling does not take longer with more of them. `compiles` False launches
    those of our kernels that the compiled one launches, which has its own way to find linears with one input.
    """

    def __init__(self, work: Work, attends: bool = False, is_fused: bool = False, compiles: bool = True):
        super().__init__(work, is_fused=is_fused)
        if attends:
            set_attention(self.module)
        if compiles:
            base = self.module.base_model
            for part in (*base.layers, base.norm):
                part.compile(dynamic=False)
            self.nll = torch.compile(self.nll, dynamic=False)
        else:
            for shared in {site.shared for site in self.lora.sites} - {None}:
                shared.forward = lambda site, x, rows, shared=shared: shared.traced(site, x)


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
