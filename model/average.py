"""Averages of the weights over training: an exponential one of the whole run and a plain one of its end.

    EMA: every `every` steps  a <- decay^every a + (1 - decay^every) w,   a_0 = 0;   weights = a / (1 - decay^(every n))
    SWA: mean of one snapshot every `swa_every` steps while the learning-rate scale is below `swa_below`

The division removes what the zero start holds back, so that a short run is an average too (Kingma and Ba 2015, 3).
"""

import torch
from torch import Tensor, nn

from .config import TrainConfig


class WeightAverages:
    """EMA and SWA of a module's parameters, each in fp32."""

    def __init__(self, module: nn.Module, config: TrainConfig):
        self.config = config
        self.parameters = dict(module.named_parameters())
        self.ema = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.swa: dict[str, Tensor] = {}
        self.ema_updates = 0
        self.swa_snapshots = 0

    @torch.no_grad()
    def update(self, step: int, lr_scale: float) -> None:
        """Take in the weights after `step` steps where the config says so."""
        config = self.config
        weights = [p.detach() for p in self.parameters.values()]
        if step % config.ema_every == 0:
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - config.ema_decay**config.ema_every)
            self.ema_updates += 1
        if step % config.swa_every == 0 and lr_scale < config.swa_below:
            if not self.swa:
                self.swa = {name: torch.zeros_like(tensor) for name, tensor in self.ema.items()}
            torch._foreach_add_(list(self.swa.values()), weights)
            self.swa_snapshots += 1

    def load(self, ema: dict[str, Tensor], swa: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Go on from saved averages and their counts `ema_updates` and `swa_snapshots`."""
        for name, parameter in self.parameters.items():
            self.ema[name].copy_(ema[name])
            if swa:
                self.swa[name] = swa[name].to(parameter.device)
        self.ema_updates, self.swa_snapshots = counts["ema_updates"], counts["swa_snapshots"]

    def candidates(self) -> dict[str, dict[str, Tensor]]:
        """The averages there are, by name: 'ema' after its first update, 'swa' after its first snapshot."""
        found = {}
        if self.ema_updates:
            weight = 1 - self.config.ema_decay ** (self.config.ema_every * self.ema_updates)
            found["ema"] = {name: tensor / weight for name, tensor in self.ema.items()}
        if self.swa_snapshots:
            found["swa"] = {name: tensor / self.swa_snapshots for name, tensor in self.swa.items()}
        return found
