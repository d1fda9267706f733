"""Muon: momentum, orthogonalised by Newton-Schulz, for matrices (Jordan 2024).

m <- mu m + g;   u = NS(g + mu m)                         Nesterov
W <- (1 - lr * decay) W - lr * sqrt(max(1, rows/cols)) u
"""

import torch
from torch import Tensor

from ..kernels import newton_schulz_ref


class Muon(torch.optim.Optimizer):
    """Muon over two-dimensional parameters; matrices of one shape are orthogonalised in one batch.

    Raises ValueError for a parameter that is not a matrix: vectors and scalars belong to AdamW.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.99, weight_decay: float = 0.0, steps: int = 5):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices; a parameter of shape {tuple(parameter.shape)} was given")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients, then call step()")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step_of_one_shape(parameters, group)

    def _step_of_one_shape(self, parameters: list[Tensor], group: dict) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        nesterov = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
        rows, columns = parameters[0].shape
        update = newton_schulz_ref(torch.stack(nesterov), group["steps"]).to(parameters[0].dtype)
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, update.unbind(), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
