"""Muon: momentum, orthogonalised by Newton-Schulz, for matrices (Jordan 2024).

m <- mu m + g;   u = NS(g + mu m)   (Nesterov; else u = NS(m))
W <- (1 - lr * decay) W - lr * s * u,   s = sqrt(max(1, rows/cols)), or 0.2 sqrt(max(rows, cols)) (Liu et al. 2025)

On a GPU all matrices of a group go through the same few launches: momentum and norm, the products, the update. On a
CPU they go through the plain statement, a batch for each shape. Momentum is fp32 whatever the parameters are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.newton_schulz import coefficients_of, muon_apply_, muon_updates, update_scale
from .muon_sharded import Shards

RATES = ("lr", "momentum", "weight_decay")


class Muon(torch.optim.Optimizer):
    """Muon over two-dimensional parameters.

    coefficients: 'jordan' or 'polar_express'; scale: 'original' or 'match_rms_adamw'. With `capturable`, lr, momentum
    and weight_decay are device tensors of their group: change them in place between replays of a CUDA graph. With
    `process_group`, `.grad` is this rank's part of the gradient: the sum over ranks is taken here, each rank
    orthogonalises its share of the matrices, keeps the momentum of those alone, and all ranks get all updates; the same
    parameters must have gradients on every rank, and a state_dict goes back to the rank it came from.
    `backend` is 'triton' or 'reference'; None takes the kernels on a GPU. A matrix whose direction is not finite gets
    no update but its decay.

    Raises ValueError for a parameter that is not a matrix (vectors and scalars belong to AdamW), and for settings out
    of range.
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
        coefficients: str = "jordan",
        scale: str = "original",
        capturable: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
        backend: str | None = None,
    ):
        self.process_group, self.backend = process_group, backend
        self._shards: dict[tuple[Tensor, ...], Shards] = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "steps": steps,
            "nesterov": nesterov,
            "coefficients": coefficients,
            "scale": scale,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after a look at its parameters and settings."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if group["capturable"]:
            device = group["params"][0].device
            for name in RATES:
                group[name] = torch.as_tensor(group[name], dtype=torch.float32).to(device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; momentum stays fp32 where parameters are not. Capture graphs anew after it."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                momentum = state_dict["state"][number]["momentum"]
                self.state[parameter]["momentum"] = momentum.to(parameter.device, _momentum_dtype(parameter), copy=True)

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if self.process_group is None:
            self._apply(group, parameters, self._updates(group, parameters, [p.grad for p in parameters]))
            return
        key = tuple(parameters)
        if key not in self._shards:
            self._shards[key] = Shards(parameters, self.process_group)
        shards = self._shards[key]
        shards.start_reducing()
        for bucket in shards.buckets:
            mine, gradients = shards.reduced(bucket)
            shards.start_gathering(bucket, self._updates(group, mine, gradients) if mine else [])
        for bucket in shards.buckets:
            self._apply(group, *shards.gathered(bucket))

    def _updates(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Orthogonal update of each parameter, after its momentum's."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter, dtype=_momentum_dtype(parameter))
        return muon_updates(
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


def _momentum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _check(group: dict[str, Any]) -> None:
    """ValueError for what Muon cannot do."""
    for parameter in group["params"]:
        if parameter.ndim != 2:
            raise ValueError(f"Muon takes matrices; a parameter of shape {tuple(parameter.shape)} was given")
        if not parameter.is_floating_point():
            raise ValueError(f"Muon takes real floating-point matrices; one of {parameter.dtype} was given")
    for name, top in (("lr", None), ("momentum", 1.0), ("weight_decay", None)):
        value = float(group[name])
        if not (value >= 0.0 and (top is None or value < top)):
            below = f", below {top}" if top else ""
            raise ValueError(f"{name}={value} is not possible; allowed: at least 0.0{below}")
        if isinstance(group[name], Tensor) and not group["capturable"]:
            raise ValueError(f"{name} is a tensor; that takes capturable=True")
    coefficients_of(group["coefficients"], group["steps"])
    update_scale(1, 1, group["scale"])
