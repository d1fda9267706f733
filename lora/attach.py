"""Adapters onto the linears of a model and off again: `attach` and what it returns.

The linears stay where and what they are: their `forward` alone is another while adapters are attached. So names,
parameters, hooks and state dicts are the model's own, and what reads `linear.weight` finds it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import KloraError
from ..kernels import Dropout, Int6Linear, Int6Matrix, row_keys
from ..kernels.dispatch import resolve_backend
from .adapters import Adapters, check_alpha, check_whole, names_of, ranks_of
from .find import check_weights, find_linears
from .linear import adapted_linears, are_one_product
from .mlp import SwigluMlp, find_mlps, stands_in
from .optimizer import LoraAdam
from .pool import LoraError, Pool
from .shared import Shared, find_shared

BASES = {"dense": None, "bf16": torch.bfloat16, "int6": None}
"""What the base weights are, and the dtype that is asked of them."""


@dataclass
class Rows:
    """The slot of each row of a batch, int64 [B]; with dropout what else draws its mask, int64 [B] too."""

    slots: Tensor
    step: Tensor | None = None
    nth: Tensor | None = None
    """how many rows before it have its slot"""
    was_run: bool = False
    """whether a forward has used them"""


class Site:
    """One linear with adapters: its `forward` is called in the place of the module's. `shared` are the sites that have
    its input too, such as q, k and v, None where there are none.
    """

    def __init__(self, lora: "Lora", index: int, module: nn.Module):
        self.lora, self.index, self.module = lora, index, module
        self.place = lora.pool.places[index]
        self.shared: Shared | None = None
        self.turn = 0
        """when its module calls it, among those of `shared`"""
        self.bind(lora.pool, index)

    def bind(self, pool: Pool, index: int) -> None:
        """Keep what is its own of the pool: A and B, scale and ranks. Found by `index` in each forward, they would make
        torch.compile trace every layer anew; so one graph serves all layers alike.
        """
        self.leaves, self.scale, self.ranks = pool.leaves[index], pool.scale[:, index], pool.ranks[:, index]

    def __getstate__(self) -> dict:
        """Without what is the pool's: :meth:`Lora.__setstate__` binds it again."""
        return {name: value for name, value in vars(self).items() if name not in ("leaves", "scale", "ranks")}

    def forward(self, input: Tensor) -> Tensor:
        lora, module, x = self.lora, self.module, input
        if not self.is_active(x):
            return type(module).forward(module, x)
        if self.shared is None:
            return adapted([self], x)[0]
        if torch.compiler.is_compiling():
            return self.shared.traced(self, x)
        return self.shared.forward(self, x, lora.current)

    def is_active(self, x: Tensor) -> bool:
        """Whether the rows of `x`, the module's input, have adapters; LoraError where that cannot be."""
        if not torch.compiler.is_compiling():
            self._check_recomputing()
        if self.lora.current is None:
            return False
        self._check(x, self.lora.current.slots)
        return True

    def _check(self, x: Tensor, slots: Tensor) -> None:
        if x.dim() < 3:
            raise LoraError(
                f"{self.place.name} got {list(x.shape)}: with its tokens flattened a row's adapter is not known; call "
                "the model with [batch, tokens], or leave this linear out of the targets"
            )
        if len(x) != len(slots):
            raise LoraError(
                f"{self.place.name} got a batch of {len(x)} and rows() named {len(slots)}; name one for each row of "
                "the batch, also of those that generate() repeats"
            )
        if x.device != slots.device:
            raise LoraError(
                f"{self.place.name} got {x.device} and the adapters are on {slots.device}; move the model, then attach"
            )

    def _check_recomputing(self) -> None:
        """Gradient checkpointing runs a forward again in the backward: with other rows it would be another function."""
        rows, in_backward = self.lora.current, torch._C._current_graph_task_id() != -1
        if in_backward and self.lora.was_used and (rows is None or not rows.was_run):
            raise LoraError(
                f"{self.place.name} is computed again by gradient checkpointing, outside of the `with lora.rows(...)` "
                "of its forward; call backward() inside it"
            )
        if rows is not None and not in_backward:
            rows.was_run = True


class Inputs(NamedTuple):
    """What the product takes for several sites that have the input x [B, S, K]."""

    x: Tensor
    weights: list[Tensor | Int6Matrix]
    biases: list[Tensor | None]
    adapters: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, sites: Sequence[Site], x: Tensor) -> "Inputs":
        x = x.reshape(x.size(0), -1, x.size(-1)) if x.dim() > 3 else x
        is_cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        x = x.to(torch.get_autocast_dtype(x.device.type)) if is_cast else x
        weights, biases = [], []
        for site in sites:
            weight = site.module.matrix if isinstance(site.module, Int6Linear) else site.module.weight
            weight = weight.mT if site.place.is_conv1d else weight
            weights.append(weight.to(x.dtype) if is_cast and isinstance(weight, Tensor) else weight)
            biases.append(None if site.module.bias is None else site.module.bias.to(x.dtype))
        return cls(x, weights, biases, [site.leaves for site in sites])


def has_dropout(site: Site) -> bool:
    return site.lora.dropout > 0 and site.module.training


def adapted(sites: Sequence[Site], x: Tensor) -> list[Tensor]:
    """The outputs of `sites`, all of which have the input `x`."""
    lora, shape = sites[0].lora, x.shape
    rows, dropout = lora.current, None
    if has_dropout(sites[0]):
        keys = [row_keys(lora.seed, site.index, rows.slots, rows.step, rows.nth) for site in sites]
        dropout = Dropout(lora.dropout, keys)
    scales, ranks = [site.scale for site in sites], [site.ranks for site in sites]
    outs = adapted_linears(*Inputs.of(sites, x), scales, ranks, rows.slots, dropout, lora.stacks, lora.backend)
    return [y.unflatten(1, shape[1:-1]) if len(shape) > 3 else y for y in outs]


def is_one_launch(sites: Sequence[Site], x: Tensor) -> bool:
    """Whether :func:`adapted` makes all of them at once; else each is as well made by itself."""
    return (
        sites[0].lora.stacks
        and not has_dropout(sites[0])
        and are_one_product(*Inputs.of(sites, x), sites[0].lora.backend)
    )


class Lora:
    """Adapters on a model; made by :func:`attach`.

    `adapters` creates, loads and saves them, `rows` says which row of a batch uses which, `optimizer` trains them,
    `merge` puts one into the weights, `detach` gives the model back. Without `rows` the model is the base model.

    Example: lora: Lora = attach(model, slots=4)
    """

    def __init__(
        self, model: nn.Module, pool: Pool, adapters: Adapters, dropout: float, seed: int, backend: str | None
    ):
        self.model, self.pool, self.adapters = model, pool, adapters
        self.dropout, self.seed, self.backend = dropout, seed, backend
        self.sites: list[Site] = []
        self.mlps: list[SwigluMlp] = []
        self.current: Rows | None = None
        self.stacks = True
        """whether linears of one input may be one launch, which a pool of many slots is not"""
        self.was_used = False
        self._frozen: list[nn.Parameter] = []
        """those of the model that :func:`attach` has frozen"""
        self._report: Any = None

    def __getstate__(self) -> dict:
        if self._report is not None:
            raise LoraError("adapters over a base at six bits cannot be copied; detach() first, or give base='dense'")
        return vars(self)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        for index, site in enumerate(self.sites):
            site.bind(self.pool, index)

    @contextmanager
    def rows(self, slots: Sequence[str | int | None] | Tensor, step: int | None = None) -> Iterator[None]:
        """Inside, row b of every batch uses the adapter `slots[b]`: a name, a slot, or None or -1 for none.

        An int tensor [B] on the device is taken as it is, without waiting for it: what names no slot is none. Dropout
        draws its mask by the seed, the slot, the linear, the rows before with that slot, and `step`. Left out, `step`
        counts how often a slot was named here with gradients enabled.

        Example: with lora.rows(["alice", None]): logits = model(tokens).logits
        """
        self._check_attached()
        pool = self.pool
        if isinstance(slots, str) or not isinstance(slots, Iterable):
            raise LoraError(f"rows is {slots!r}; wanted: a list with one adapter for each row of the batch")
        if isinstance(slots, Tensor):
            if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
                raise LoraError(f"rows is {slots.dtype} {list(slots.shape)}; wanted: int32 or int64 [B]")
            slots = slots if slots.is_cuda else slots.tolist()
        if step is not None:
            check_whole("step", step)
        if not isinstance(slots, Tensor):
            numbers = [self.adapters.slot_of(slot) for slot in slots]
            slots = torch.tensor(numbers, dtype=torch.int64, device=pool.device)
        outer, self.current = self.current, self._rows(slots.to(pool.device, torch.int64), step)
        self.was_used = True
        try:
            yield
        finally:
            self.current = outer
            for shared in {site.shared for site in self.sites if site.shared is not None}:
                shared.forget()

    def _check_attached(self) -> None:
        if not self.sites:
            raise LoraError("the adapters are detached; attach again")

    def _rows(self, slots: Tensor, step: int | None) -> Rows:
        if not self.dropout:
            return Rows(slots)
        same = slots[:, None] == slots
        nth = same.tril(-1).sum(1)
        uses = self.pool.uses
        steps = uses[slots.clamp(0, len(uses) - 1)] if step is None else torch.full_like(slots, step)
        if torch.is_grad_enabled():
            uses += (slots[:, None] == torch.arange(len(uses), device=slots.device)).any(0)
        return Rows(slots, steps, nth)

    def optimizer(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> LoraAdam:
        """Adam for all adapters of the pool, those that are created later included; see :class:`LoraAdam`.

        Example: optimizer = lora.optimizer(lr=3e-4)
        """
        return LoraAdam(self.adapters, lr, betas, eps, weight_decay)

    @torch.no_grad()
    def merge(self, name: str) -> nn.Module:
        """Add one adapter to the base weights and take all adapters off; the model, which now is what it was with it.

        At six bits the weights are what six bits hold plus the adapter, in the dtype that they had. LoraError, and
        nothing changed, where the sum is not finite.

        Example: model = lora.merge("alice")
        """
        self._check_attached()
        adapter = self.adapters[name]
        sites = [site for site in self.sites if site.place.name in adapter.ranks]
        for site in sites:
            if not self._merged(site, name).isfinite().all():
                raise LoraError(f"{name!r} at {site.place.name} makes weights that are not finite; nothing was merged")
        model = self.detach()
        for site in sites:
            weight = model.get_submodule(site.place.name).weight
            weight.copy_(self._merged(site, name))
        return model

    def _merged(self, site: Site, name: str) -> Tensor:
        """W + s B A, rounded to the weights' dtype."""
        adapter, module = self.adapters[name], site.module
        is_int6 = isinstance(module, Int6Linear)
        dtype = module.dtype if is_int6 else module.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        weight = module.dequantize(wide) if is_int6 else module.weight.to(wide)
        a, b = self.pool.read(adapter.slot, site.index, adapter.ranks[site.place.name])
        change = (b.to(wide) @ a.to(wide)) * self.pool.scale[adapter.slot, site.index]
        return (weight + (change.mT if site.place.is_conv1d else change)).to(dtype)

    def detach(self) -> nn.Module:
        """Take the adapters off; the model, bit for bit as it was given. A second call does nothing.

        A `forward` that somebody else has put onto a module since stays there.

        Example: model = lora.detach()
        """
        for one in (*self.mlps, *self.sites):
            if stands_in(one, one.module):
                del one.module.forward
        if self._report is not None:
            self._report.undo()
        for parameter in self._frozen:
            parameter.requires_grad_()
        self.sites, self.mlps, self.current, self._report, self._frozen = [], [], None, None, []
        self.was_used = False
        return self.model


def attach(
    model: nn.Module,
    slots: int = 64,
    targets: Iterable[str] | None = None,
    rank: int | Mapping[str, int] = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    base: str = "dense",
    seed: int = 0,
    freeze: bool = True,
    backend: str | None = None,
) -> Lora:
    """Let `slots` adapters act on the linears of `model` whose names end in one of `targets`, in place.

    nn.Linear and Hugging Face's Conv1D. `rank` is the largest that an adapter may have, for all targets or for each;
    `alpha` what adapters have that are created without one (None: a scale of 1). `targets` are those of `rank`, or
    q_proj and v_proj. `dropout` is of the adapters' input, while the linear is in training mode. `base` "dense" keeps
    the weights as they are ("bf16": and wants them so), "int6" computes with six bits; the dense ones wait in the
    host's memory. `freeze` turns gradients of the model's own parameters off until :meth:`Lora.detach`. `backend` is
    that of the ops. The pool takes 8 bytes a parameter, an optimizer 8 more.

    LoraError, and the model as it was: a target that is no such linear, a linear that is in two places, shares its
    weight with another, has a `forward` of its own, is read past its `forward` or is on "meta"; another rank, alpha,
    dropout, base, seed or backend.

    Example: lora = attach(model, slots=4, targets=("q_proj", "down_proj"), rank=8, alpha=16)
    """
    if not isinstance(model, nn.Module):
        raise LoraError(f"model is a {type(model).__name__}; wanted: a torch.nn.Module")
    if targets is None:
        targets = rank if isinstance(rank, Mapping) else ("q_proj", "v_proj")
    targets = names_of("targets", targets)
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise LoraError(f"slots is {slots!r}; wanted: a whole number of at least 1")
    if base not in BASES:
        raise LoraError(f"base is {base!r}; allowed: {', '.join(BASES)}")
    if not (isinstance(dropout, Real) and 0 <= dropout < 1):
        raise LoraError(f"dropout is {dropout!r}; allowed: from 0 to below 1")
    check_alpha(alpha)
    check_whole("seed", seed)
    if not targets:
        raise LoraError("targets is empty; name the linears that get adapters, such as 'q_proj'")
    ranks = ranks_of(rank, targets)
    found = find_linears(model, targets, ranks)
    modules = {place.name: model.get_submodule(place.name) for place in found}
    check_weights(model, modules, BASES[base])
    weight = next(iter(modules.values())).weight
    try:
        resolve_backend(backend, weight)
    except ValueError as error:
        raise LoraError(str(error)) from None
    pool = Pool(slots, found, weight.device)
    base_name = getattr(getattr(model, "config", None), "name_or_path", None) or None
    lora = Lora(model, pool, Adapters(pool, ranks, alpha, seed, base_name), dropout, seed, backend)
    try:
        if freeze:
            lora._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model.requires_grad_(False)
        if base == "int6":
            lora._report = _quantize(model, modules)
        for index, place in enumerate(found):
            lora.sites.append(Site(lora, index, model.get_submodule(place.name)))
            lora.sites[-1].module.forward = lora.sites[-1].forward
        for sites in find_shared(lora.sites):
            Shared(sites, adapted, is_one_launch)
        for sites in find_mlps(model, lora.sites):
            module = model.get_submodule(sites[0].place.name.rpartition(".")[0])
            lora.mlps.append(SwigluMlp(module, sites, Inputs.of))
            module.forward = lora.mlps[-1].forward
    except BaseException:
        lora.detach()
        raise
    return lora


def _quantize(model: nn.Module, modules: Mapping[str, nn.Module]) -> Any:
    """The linears at six bits, their dense weights on the host; returns what quantize_linears does."""
    from ..model.int6_model import quantize_linears

    try:
        report = quantize_linears(model, keep=lambda name, linear: name not in modules)
    except KloraError as error:
        raise LoraError(f"{error}; leave it out, or give base='dense'") from None
    if skipped := [name for name in modules if name in report.skipped]:
        report.undo()
        raise LoraError(f"{skipped[0]} stays dense: {report.skipped[skipped[0]]}; leave it out, or give base='dense'")
    for linear in modules.values():
        linear.weight.data = linear.weight.data.cpu()
    return report
