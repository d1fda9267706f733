"""The clock of a run, and what a step does by it: its learning rate, and whether its matrices are int6."""

import time
from contextlib import contextmanager

import torch

from .config import TrainConfig


def lr_scale(config: TrainConfig, step: int, elapsed: float) -> float:
    """Learning-rate multiplier of step `step` after `elapsed` seconds: 1, then linear to 0 over the warmdown.

    The warmdown lasts `warmdown_steps` at the mean step time so far, at most the share `warmdown_most` of the run. With
    `max_steps` it is counted in steps, and the clock does not touch it.
    """
    if config.max_steps:
        warmdown, left = min(config.warmdown_steps, config.warmdown_most * config.max_steps), config.max_steps - step
    elif step:
        warmdown = min(config.warmdown_steps * elapsed / step, config.warmdown_most * config.seconds)
        left = max(config.seconds - elapsed, 0.0)
    else:
        return 1.0
    return min(1.0, left / warmdown) if warmdown else 1.0


def is_quantized(config: TrainConfig, step: int, elapsed: float) -> bool:
    """Whether step `step`, after `elapsed` seconds, is of the share at the end of the run with int6 matrices."""
    done, whole = (step, config.max_steps) if config.max_steps else (elapsed, config.seconds)
    return config.qat_share > 0 and done >= (1 - config.qat_share) * whole


class TrainingClock:
    """Seconds of training, of this run and of those it continues; it can be held for other work."""

    def __init__(self, device: torch.device, elapsed: float = 0.0):
        self.device = device
        self.started = time.perf_counter() - elapsed

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @contextmanager
    def held(self):
        """Time spent inside does not count."""
        self._synchronize()
        before = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.started += time.perf_counter() - before

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
