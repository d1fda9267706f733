"""Muon: momentum, orthogonalised by Newton-Schulz, for matrices (Jordan 2024).

m <- mu m + g;   u = NS(g + mu m)   (Nesterov; else u = NS(m))
W <- (1 - lr * decay) W - lr * s * u,   s = sqrt(max(1, rows/cols)), or 0.2 sqrt(max(rows, cols)) (Liu et al. 2025)

On a GPU all matrices of a group go through the same few launches: the norm, momentum, the products, the update. On a
CPU they go through the reference, a batch for each shape. Momentum is fp32 whatever the parameters are.

A step is taken whole or not at all: nothing is written before all matrices of all groups, on all ranks, are known to be
finite. If only the matrix with the bad gradient were left out, the others would move by gradients of a backward pass
that has gone wrong, and layers would differ in how many steps they have seen.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import is_dtensor
from ..kernels.newton_schulz import (
    EPS,
    MuonDirections,
    check_apart,
    coefficients_of,
    muon_apply_,
    update_scale,
)
from .muon_sharded import Shards

RATES = ("lr", "momentum", "weight_decay")
TORCH_NAMES = {"ns_steps": "steps", "ns_coefficients": "coefficients", "adjust_lr_fn": "scale"}
"""Names of torch.optim.Muon, and those they have here."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEADS = ("lm_head", "head", "output", "output_layer", "unembed", "embed_out", "classifier", "score")
"""Usual names of a model's last module, whose rows are the vocabulary or the classes."""


class Muon(torch.optim.Optimizer):
    """Muon over matrices; its defaults are not torch.optim.Muon's: lr 0.02 (1e-3), momentum 0.99 (0.95), decay 0 (0.1).

    Positional arguments come in another order than torch's, too: momentum is before weight_decay. Momentum is the sum
    mu m + g where torch keeps the mean, which is (1 - mu) times it; the directions are the same.

    coefficients: 'jordan', 'polar_express' or three numbers; scale: 'original' or 'match_rms_adamw'. torch's names
    `ns_steps`, `ns_coefficients` and `adjust_lr_fn` mean `steps`, `coefficients` and `scale`, here, in groups and in
    state_dicts. lr, momentum and weight_decay may be tensors of one number; with `capturable` they are always tensors
    on the device of their group: change them in place between replays of a CUDA graph.

    With `process_group`, `.grad` is this rank's part of the gradient, and the sum over ranks is taken here. Each rank
    orthogonalises its share of the matrices and keeps the momentum of those alone; all ranks get all updates. The same
    parameters must have gradients on every rank, and a state_dict goes back to the rank it came from.
    `backend` is 'triton' or 'reference'; None takes the kernels on a GPU, but for float64.

    If mu m + g of any matrix has an entry that is not finite, the whole step is skipped: no weight and no momentum
    changes, and nothing decays. `skipped_steps` counts them.

    Parameters may be DTensors placed Shard(0) or Replicate() on one mesh of one dimension: fully_shard(model) of FSDP2
    first, then Muon as ever. Momentum lies as they do, and each rank orthogonalises its share of the sharded ones.

    Parameters may be of several dtypes. One without gradient rests, one without entries too. A state_dict of
    torch.optim.Muon loads; :meth:`torch_state_dict` is for the way back. A deepcopy has the same process group; an
    optimizer with one cannot be pickled.

    Raises ValueError for a parameter that is not a dense matrix of floating point (:func:`split_parameters` finds those
    that are), for parameters that share memory, and for settings out of range. step() raises it for a sparse gradient.

    Example: muon = Muon(split_parameters(model)[0], lr=0.02, momentum=0.95)
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 0.02,
        momentum: float | Tensor = 0.99,
        weight_decay: float | Tensor = 0.0,
        steps: int = 5,
        *,
        nesterov: bool = True,
        coefficients: str | tuple[float, float, float] = "jordan",
        scale: str = "original",
        capturable: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
        backend: str | None = None,
        ns_steps: int | None = None,
        ns_coefficients: tuple[float, float, float] | None = None,
        adjust_lr_fn: str | None = None,
        eps: float = EPS,
    ):
        self.process_group, self.backend = process_group, backend
        self._shards: dict[tuple[Tensor, ...], Shards] = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "steps": steps if ns_steps is None else ns_steps,
            "nesterov": nesterov,
            "coefficients": coefficients if ns_coefficients is None else ns_coefficients,
            "scale": scale if adjust_lr_fn is None else adjust_lr_fn,
            "capturable": capturable,
        }
        _check_eps(eps)
        torchs = {"ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "adjust_lr_fn": adjust_lr_fn}
        _check_iteration(defaults, {TORCH_NAMES[name]: name for name, value in torchs.items() if value is not None})
        super().__init__(params, defaults)
        self.param_groups[0]["skipped_steps"] = torch.zeros((), dtype=torch.int64)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped, because something was not finite. Waits for the GPU."""
        return int(self.param_groups[0]["skipped_steps"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after a look at its parameters and settings."""
        given = _rename(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group, given)
            _check_parameters(group["params"])
            check_apart(self._parts([p for one in self.param_groups for p in one["params"]]))
        except ValueError:
            self.param_groups.pop()
            raise
        _put_rates(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient, or none of them; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._batches()
        if batches and is_dtensor(batches[0][1][0]):
            from .muon_dtensor import step_dtensors

            step_dtensors(self, batches)
        elif batches:
            (self._step if self.process_group is None else self._step_sharded)(batches)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, or torch.optim.Muon's; momentum stays fp32 where parameters are not.

        `capturable` stays what it is here. Capture graphs again after it. Raises ValueError, before anything changes,
        for settings out of range.
        """
        state_dict = self._in_our_form(state_dict)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            _put_rates(group)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                momentum = state_dict["state"][number]["momentum"]
                if is_dtensor(parameter) or is_dtensor(momentum):
                    from .muon_dtensor import placed_as

                    momentum = placed_as(momentum, parameter)
                self.state[parameter]["momentum"] = momentum.to(parameter.device, _momentum_dtype(parameter), copy=True)

    def torch_state_dict(self) -> dict[str, Any]:
        """A state_dict for torch.optim.Muon over the same parameters, with copies of the momenta, times 1 - mu.

        Raises ValueError for coefficients that differ from step to step, which torch has not.
        """
        state_dict = self.state_dict()
        groups, state = [], {}
        for group in state_dict["param_groups"]:
            kept = {k: v for k, v in group.items() if k not in (*TORCH_NAMES.values(), "capturable", "skipped_steps")}
            each = set(coefficients_of(group["coefficients"], group["steps"]))
            if len(each) > 1:
                raise ValueError(
                    f"coefficients={group['coefficients']!r} differ from step to step; torch.optim.Muon takes three "
                    "numbers for all steps: allowed here: 'jordan' or three numbers"
                )
            mean = 1.0 - float(group["momentum"])
            torchs = {"ns_steps": group["steps"], "ns_coefficients": each.pop(), "adjust_lr_fn": group["scale"]}
            groups.append({**kept, **{name: float(group[name]) for name in RATES}, **torchs, "eps": EPS})
            for number in group["params"]:
                if number in state_dict["state"]:
                    state[number] = {"momentum_buffer": state_dict["state"][number]["momentum"] * mean}
        return {"state": state, "param_groups": groups}

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError("an optimizer with a process group cannot be pickled; save its state_dict()")
        return self._contents()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("process_group", None), ("backend", None), ("_shards", {})):
            self.__dict__.setdefault(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Muon":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        memo[id(self.process_group)] = self.process_group
        other.__setstate__(copy.deepcopy({**self._contents(), "process_group": self.process_group}, memo))
        return other

    def _contents(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def _in_our_form(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of `state_dict` with our names and settings; torch's mean becomes the sum that is kept here."""
        groups, state = [], dict(state_dict["state"])
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            group = dict(saved)
            given = _rename(group)
            group = {**{name: own[name] for name in self.defaults}, **group, "capturable": own["capturable"]}
            _check_settings(group, given)
            groups.append(group)
            for number in group["params"]:
                if "momentum_buffer" in state.get(number, {}):
                    mean = state[number]["momentum_buffer"]
                    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
                    state[number] = {"momentum": mean / (1.0 - float(group["momentum"]))}
        groups += state_dict["param_groups"][len(groups) :]
        if groups:
            skipped = groups[0].get("skipped_steps", 0)
            groups[0]["skipped_steps"] = torch.tensor(int(skipped), dtype=torch.int64)
        return {**state_dict, "state": state, "param_groups": groups}

    def _parts(self, parameters: list[Tensor]) -> list[Tensor]:
        """What this rank has of the parameters: all of them, where none is a DTensor."""
        if not any(map(is_dtensor, parameters)):
            return parameters
        from .muon_dtensor import local_parts

        return local_parts(parameters, self.process_group)

    def _batches(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The parameters to be updated, with their group; those of a batch are of one kind."""
        batches = []
        for group in self.param_groups:
            _rename(group)
            kinds: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    if p.grad.layout != torch.strided:
                        raise ValueError(
                            f"a gradient of layout {p.grad.layout} is not possible; allowed: dense ones. Embeddings "
                            "belong to AdamW or SparseAdam: klora.model.split_parameters leaves them out"
                        )
                    kinds.setdefault((p.device, p.dtype, p.grad.dtype), []).append(p)
            batches += [(group, parameters) for parameters in kinds.values()]
        return batches

    def _step(self, batches: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        directions = [self._directions(group, some, [p.grad for p in some]) for group, some in batches]
        finite = _joined(directions)
        skipped = self._counter(finite.device)
        for (group, parameters), one in zip(batches, directions, strict=True):
            updates = one.updates(finite.to(parameters[0].device), skipped)
            skipped = None
            self._apply(group, parameters, updates)

    def _step_sharded(self, batches: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        exchanges = []
        for group, parameters in batches:
            key = tuple(parameters)
            if key not in self._shards:
                self._shards[key] = Shards(parameters, self.process_group)
            self._shards[key].start_reducing()
            exchanges += [(group, self._shards[key], bucket) for bucket in self._shards[key].buckets]
        directions = []
        for group, shards, bucket in exchanges:
            owned, gradients = shards.reduced(bucket)
            directions.append(self._directions(group, owned, gradients) if owned else None)
        finite = self._agreed([one for one in directions if one], batches[0][1][0].device)
        self._counter(finite.device).add_(1 - finite)
        for (_, shards, bucket), one in zip(exchanges, directions, strict=True):
            shards.start_gathering(bucket, one.updates(finite) if one else [])
        for group, shards, bucket in exchanges:
            self._apply(group, *shards.gathered(bucket))

    def _agreed(self, directions: list[MuonDirections], device: torch.device) -> Tensor:
        """Whether all directions of all ranks are finite, int32 scalar."""
        finite = torch.ones((), dtype=torch.int32, device=device)
        if directions:
            finite = _joined(directions)
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN, group=self.process_group)
        return finite

    def _directions(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> MuonDirections:
        """The directions of some parameters, nothing written yet; first their momenta, where there are none."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter, dtype=_momentum_dtype(parameter))
        return MuonDirections(
            gradients,
            [self.state[parameter]["momentum"] for parameter in parameters],
            group["momentum"],
            group["nesterov"],
            group["steps"],
            group["coefficients"],
            backend=self.backend,
        )

    def _apply(self, group: dict[str, Any], parameters: list[Tensor], updates: list[Tensor]) -> None:
        muon_apply_(parameters, updates, group["lr"], group["weight_decay"], group["scale"], backend=self.backend)

    def _counter(self, device: torch.device) -> Tensor:
        """The count of skipped steps, on `device`, where the parameters are now."""
        group = self.param_groups[0]
        group["skipped_steps"] = group["skipped_steps"].to(device)
        return group["skipped_steps"]


def split_parameters(model: nn.Module, heads: Iterable[str] = HEADS) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of `model` for Muon and those for AdamW: Muon(matrices), torch.optim.AdamW(rest).

    Muon gets the matrices of hidden layers. AdamW gets embeddings, heads, vectors, scalars, and tensors of three or
    more dimensions such as convolutions. Embeddings are the weights of nn.Embedding and nn.EmbeddingBag, also where
    they are tied to a head. Heads are the parameters of modules whose own name is in `heads`, and of what a model's
    get_output_embeddings() returns. Parameters that require no gradient are in neither; each other one is in exactly
    one.

    Example: matrices, rest = split_parameters(model)
    """
    heads = set(heads)
    for_adamw: set[int] = set()
    modules = list(model.named_modules())
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in modules:
        is_head = name.rsplit(".", 1)[-1] in heads or module is outputs
        if is_head or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            for_adamw.update(id(p) for p in module.parameters())
    matrices, rest = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and parameter.is_floating_point()
            (matrices if is_matrix and id(parameter) not in for_adamw else rest).append(parameter)
    return matrices, rest


def _momentum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _joined(directions: list[MuonDirections]) -> Tensor:
    """Whether all of them are finite, int32 scalar on the device of the first."""
    first = directions[0].finite
    return first if len(directions) == 1 else torch.stack([one.finite.to(first.device) for one in directions]).amin()


def _rename(group: dict[str, Any]) -> dict[str, str]:
    """Give torch's settings in a group the names they have here; returns which of torch's names stood for ours."""
    given = {}
    for theirs, ours in TORCH_NAMES.items():
        if theirs in group:
            value = group.pop(theirs)
            group[ours] = "original" if ours == "scale" and value is None else value
            given[ours] = theirs
    _check_eps(group.pop("eps", EPS))
    return given


def _put_rates(group: dict[str, Any]) -> None:
    """With `capturable`, the rates as tensors on the group's device."""
    if group["capturable"] and group["params"]:
        device = group["params"][0].device
        for name in RATES:
            group[name] = torch.as_tensor(group[name], dtype=torch.float32).to(device)


def _check_eps(eps: float) -> None:
    if eps != EPS:
        raise ValueError(f"eps={eps} is not possible; allowed: {EPS}")


def _check_parameters(parameters: list[Tensor]) -> None:
    """ValueError for what Muon cannot update."""
    for p in parameters:
        if p.ndim != 2:
            raise ValueError(
                f"Muon takes matrices; a parameter of shape {tuple(p.shape)} was given. Vectors, scalars and "
                "convolutions belong to AdamW: klora.model.split_parameters(model) gives the parameters of each"
            )
        if p.dtype not in DTYPES:
            raise ValueError(f"Muon takes real floating-point matrices; one of {p.dtype} was given; allowed: {DTYPES}")
        if p.layout != torch.strided:
            raise ValueError(f"Muon takes dense matrices; one of layout {p.layout} was given. Give a dense parameter")


def _check_settings(group: dict[str, Any], given: Mapping[str, str]) -> None:
    """ValueError for settings out of range, under the name that was `given` for ours."""
    for name, top in (("lr", None), ("momentum", 1.0), ("weight_decay", None)):
        if isinstance(group[name], Tensor) and group[name].numel() != 1:
            raise ValueError(f"{name} has shape {tuple(group[name].shape)}; allowed: a number or a tensor of one")
        value = float(group[name])
        if not (0.0 <= value < (float("inf") if top is None else top)):
            below = f", below {top}" if top else ""
            raise ValueError(f"{name}={value} is not possible; allowed: at least 0.0{below}")
    _check_iteration(group, given)


def _check_iteration(group: dict[str, Any], given: Mapping[str, str]) -> None:
    try:
        coefficients_of(group["coefficients"], group["steps"])
        update_scale(1, 1, group["scale"])
    except ValueError as error:
        name, rest = str(error).split("=", 1)
        raise ValueError(f"{given.get(name, name)}={rest}") from None
