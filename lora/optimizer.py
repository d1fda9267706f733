"""Adam on the pool: all adapters in one launch, each with its own learning rate and its own count of steps."""

from collections.abc import Iterable
from math import isfinite
from numbers import Real

import torch
from torch import Tensor

from ..kernels import lora_adam_
from .adapters import Adapters, names_of
from .pool import LoraError


class LoraAdam:
    """Adam (AdamW with `weight_decay`) of the adapters; made by :meth:`Lora.optimizer`.

    `lr` fp32 [slots] and `steps` int64 [slots] are the slots' own; exp_avg and exp_avg_sq are fp32 [slots, P]. A new,
    reset or loaded adapter starts with zero moments, at step 0, at the learning rate that was given here.

    Example: optimizer: LoraAdam = lora.optimizer(lr=1e-3, weight_decay=0.01)
    """

    def __init__(self, adapters: Adapters, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        is_pair = isinstance(betas, tuple | list) and len(betas) == 2
        numbers = (lr, eps, weight_decay, *betas) if is_pair else ()
        is_right = numbers and all(isinstance(number, Real) and isfinite(number) for number in numbers)
        if not (is_right and lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise LoraError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}; allowed: lr and weight_decay at "
                "least 0, betas from 0 to below 1, eps above 0"
            )
        self.adapters, self.betas, self.eps, self.first_lr = adapters, tuple(betas), eps, float(lr)
        pool = self.pool = adapters.pool
        self.lr = torch.full((pool.slots,), float(lr), dtype=torch.float32, device=pool.device)
        self.steps = torch.zeros(pool.slots, dtype=torch.int64, device=pool.device)
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(pool.params) for _ in range(2))
        self.decay = torch.full_like(pool.params[0], weight_decay) if weight_decay else None
        pool.optimizers.add(self)

    def set_lr(self, name: str, lr: float) -> None:
        """The learning rate of one adapter from now on.

        Example: optimizer.set_lr("alice", 3e-4)
        """
        slot = self.adapters[name].slot
        if not (isinstance(lr, Real) and 0 <= lr < float("inf")):
            raise LoraError(f"lr is {lr!r}; wanted: a number of at least 0")
        self.lr[slot] = lr

    def step(self, names: Iterable[str] | None = None) -> None:
        """One step of the adapters that are named; None: of every one that has a gradient that is not zero.

        Nothing waits for the device. The others keep their bits, moments and count.

        Example: optimizer.step(["alice", "bob"])
        """
        pool = self.pool
        if names is None:
            numbers = torch.arange(pool.slots, device=pool.device)
            has_gradient = torch.linalg.vector_norm(pool.grads, float("inf"), dim=1) != 0
            slots = torch.where(has_gradient, numbers, -1)
        else:
            chosen = sorted({self.adapters[name].slot for name in names_of("names", names)})
            slots = torch.tensor(chosen, dtype=torch.int64, device=pool.device)
        lora_adam_(
            *(pool.params, pool.grads, self.exp_avg, self.exp_avg_sq, self.steps, self.lr, slots),
            betas=self.betas,
            eps=self.eps,
            decay=self.decay,
        )

    def zero_grad(self) -> None:
        """Gradients of every adapter to zero.

        Example: optimizer.zero_grad()
        """
        self.pool.grads.zero_()

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.pool.optimizers.add(self)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Forget one slot's moments, steps and learning rate."""
        for tensor in (self.steps, self.exp_avg, self.exp_avg_sq):
            tensor[slot] = 0
        self.lr[slot] = self.first_lr

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what the next step depends on beside the adapters, by name.

        Example: torch.save(optimizer.state_dict(), "adam.pt")
        """
        return {name: getattr(self, name).clone() for name in ("lr", "steps", "exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state of the same pool, its adapters in the same slots.

        Example: optimizer.load_state_dict(torch.load("adam.pt"))
        """
        own = {name: getattr(self, name) for name in ("lr", "steps", "exp_avg", "exp_avg_sq")}
        if {name: tuple(t.shape) for name, t in state.items()} != {name: tuple(t.shape) for name, t in own.items()}:
            found = {name: list(tensor.shape) for name, tensor in state.items()}
            raise LoraError(f"the state is {found}; this pool's is { ({n: list(t.shape) for n, t in own.items()}) }")
        for name, tensor in own.items():
            tensor.copy_(state[name])
