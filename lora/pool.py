"""The pool: every adapter is one flat row of fp32 parameters, whatever its rank, alpha and targets.

A row holds A [R, K] and B [N, R] of one linear after the other, as PEFT's files do: the scale s = alpha / rank and the
adapter's own rank are kept beside them, rank 0 where it has no adapter. R is the linear's rank in the pool, the largest
that an adapter may have there. What lies above an adapter's own rank is zero, is not read, and has gradients of zero:
Adam does not move it.
"""

from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from ..errors import KloraError
from .gradients import Gradients

MOST_ALPHA = 1e30
"""Far beyond any in use, and fp32 holds it times the root of a rank."""


class LoraError(KloraError, ValueError):
    """A model that adapters do not fit, an adapter that does not exist, or a file of another model.

    Example: with contextlib.suppress(LoraError): attach(model, targets=("no_such_linear",))
    """


@dataclass(frozen=True)
class Place:
    """A linear of the model, `inputs` to `outputs` features, whose adapters have rank `rank` or less."""

    name: str
    target: str
    """what it was found by: the end of its name"""
    is_conv1d: bool
    inputs: int
    outputs: int
    rank: int

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """of A and B"""
        return (self.rank, self.inputs), (self.outputs, self.rank)


class Pool:
    """params and grads fp32 [slots, P], and A and B of each linear as leaves over them; scale fp32 and ranks int32
    [slots, linears], of which a linear's column is contiguous.

    The leaves are views of params. Once a backward is done their gradients are in grads, so that Adam takes all of them
    in one launch. They are not the leaves' .grad itself: autograd warns of gradients that are not contiguous.
    `uses` int64 [slots] counts how often a slot was named for training; dropout draws by it.
    """

    def __init__(self, slots: int, places: list[Place], device: torch.device):
        self.slots, self.places, self.device = slots, places, device
        size = sum(_aligned(rows * columns) for place in places for rows, columns in place.sizes)
        with torch.inference_mode(False):
            self.params, grads = (torch.zeros(slots, size, dtype=torch.float32, device=device) for _ in range(2))
            # A column begins on 16 bytes: elsewhere a kernel is compiled once more, and no launch of it is remembered.
            self.scale, self.ranks = (
                torch.zeros(len(places), _aligned(slots), dtype=dtype, device=device)[:, :slots].mT
                for dtype in (torch.float32, torch.int32)
            )
            self.uses = torch.zeros(slots, dtype=torch.int64, device=device)
            self._make_leaves(grads)
        self.optimizers: WeakSet = WeakSet()

    def _make_leaves(self, grads: Tensor) -> None:
        self.leaves: list[tuple[Tensor, Tensor]] = []
        self.gradients, start = Gradients(grads), 0
        for place in self.places:
            pair = []
            for rows, columns in place.sizes:
                stop = start + rows * columns
                pair.append(self.params[:, start:stop].unflatten(1, (rows, columns)).detach().requires_grad_())
                self.gradients.watch(pair[-1], start)
                start += _aligned(rows * columns)
            self.leaves.append(tuple(pair))

    def __getstate__(self) -> dict:
        """Without the leaves: pickle and deepcopy would part them from their pool."""
        own = {name: value for name, value in vars(self).items() if name not in ("leaves", "gradients")}
        return own | {"grads": self.grads, "optimizers": None}

    def __setstate__(self, state: dict) -> None:
        own = {name: value for name, value in state.items() if name != "grads"}
        vars(self).update(own, optimizers=WeakSet())
        self._make_leaves(state["grads"])

    @property
    def grads(self) -> Tensor:
        """Those of a backward that failed on its way, too."""
        self.gradients.add_all()
        return self.gradients.total

    @torch.no_grad()
    def write(self, slot: int, index: int, a: Tensor, b: Tensor, scale: float) -> None:
        """Put A [r, K] and B [N, r] of linear `index` into an empty slot."""
        rank = len(a)
        lora_a, lora_b = self.leaves[index]
        lora_a[slot, :rank].copy_(a)
        lora_b[slot, :, :rank].copy_(b)
        self.scale[slot, index], self.ranks[slot, index] = scale, rank

    @torch.no_grad()
    def spread(self, slot: int) -> None:
        """Make every slot's adapter the one of this slot."""
        for tensor in (self.params, self.scale, self.ranks):
            tensor.copy_(tensor[slot].clone())

    def read(self, slot: int, index: int, rank: int) -> tuple[Tensor, Tensor]:
        """Copies of A [rank, K] and B [N, rank]."""
        lora_a, lora_b = self.leaves[index]
        return lora_a.detach()[slot, :rank].clone(), lora_b.detach()[slot, :, :rank].clone()

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """An empty slot: parameters, gradients, and what optimizers keep of it."""
        for tensor in (self.params, self.grads, self.scale, self.ranks, self.uses):
            tensor[slot] = 0
        for optimizer in self.optimizers:
            optimizer.clear(slot)


def _aligned(numbers: int) -> int:
    """Up to 16 bytes: kernels read what is in a pool where it lies."""
    return -(-numbers // 4) * 4
