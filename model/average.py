"""Averages of the weights over training: an exponential one of the whole run and a plain one of its end.

    EMA: every `every` steps  a <- decay^every a + (1 - decay^every) w,   a_0 = 0;   weights = a / (1 - decay^(every n))
    SWA: mean of one snapshot every `swa_every` steps while the learning-rate scale is below `swa_below`

The division removes what the zero start holds back, so that a short run is an average too (Kingma and Ba 2015, 3).
"""

import torch
from torch import Tensor, nn

from ..kernels.average import update_averages_
from .config import TrainConfig


class WeightAverages:
    """EMA and SWA of a module's parameters, each in fp32: `ema`, and in `swa` the sum of the snapshots so far.

    With `values`, the one buffer that all parameters are views of, the averages lie in buffers alike, and
    :meth:`update_on_device` is part of a step that may be captured.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, values: Tensor | None = None):
        self.config, self._values = config, values
        self.parameters = dict(module.named_parameters())
        self._flat = None if values is None else torch.zeros(2, len(values), device=values.device)
        self.ema, self.swa = (
            {name: self._zeros_like(p.detach(), index) for name, p in self.parameters.items()} for index in range(2)
        )
        self.ema_updates = 0
        self.swa_snapshots = 0

    def _zeros_like(self, parameter: Tensor, index: int) -> Tensor:
        """A tensor of its own, or where the parameter lies in its buffer."""
        if self._flat is None:
            return torch.zeros_like(parameter)
        start = parameter.storage_offset() - self._values.storage_offset()
        return self._flat[index, start : start + parameter.numel()].view_as(parameter)

    def weights_at(self, step: int, lr_scale: float) -> tuple[float, float]:
        """What the weights after `step` steps count in the EMA and in the SWA's sum; 0: they are left out."""
        config = self.config
        ema = 1 - config.ema_decay**config.ema_every if step % config.ema_every == 0 else 0.0
        return ema, float(step % config.swa_every == 0 and lr_scale < config.swa_below)

    def count(self, ema: float, swa: float) -> None:
        """Count an update at these weights."""
        self.ema_updates += ema > 0
        self.swa_snapshots += swa > 0

    @torch.no_grad()
    def update(self, step: int, lr_scale: float) -> None:
        """Take in the weights after `step` steps where the config says so."""
        ema, swa = self.weights_at(step, lr_scale)
        weights = [p.detach() for p in self.parameters.values()]
        if ema:
            torch._foreach_lerp_(list(self.ema.values()), weights, ema)
        if swa:
            torch._foreach_add_(list(self.swa.values()), weights)
        self.count(ema, swa)

    def update_on_device(self, weights: Tensor, backend: str) -> None:
        """Take in the buffer at `weights` fp32 [2] on the device: what :meth:`weights_at` says. The caller counts."""
        update_averages_(*self._flat, self._values, weights, backend)

    def load(self, ema: dict[str, Tensor], swa: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Go on from saved averages and their counts `ema_updates` and `swa_snapshots`. ValueError: other shapes."""
        for kind, averages in (("EMA", ema), ("SWA", swa)):
            for name, parameter in self.parameters.items() if averages else ():
                if averages[name].shape != parameter.shape:  # which would be broadcast
                    raise ValueError(f"the {kind} of {name} is {list(averages[name].shape)}")
        for name in self.parameters:
            self.ema[name].copy_(ema[name])
            if swa:
                self.swa[name].copy_(swa[name])
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
