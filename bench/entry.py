"""What is measured: an entry declares an op, its shapes, its inputs, its variants, its cost and its truth.

A new op is measured by writing one `Entry` and naming it in groups.py. Everything else (the correctness gate, timing,
floors, records, pytest-benchmark) is the harness's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution

import torch
from torch import Tensor

Shape = Mapping[str, int]
Tensors = tuple[Tensor, ...]
Call = Callable[..., Tensor | Tensors]


@dataclass(frozen=True)
class Variant:
    """One implementation. `build(shape, device, dtype)` returns a function of the drawn inputs; it is not timed.

    `package` is the distribution that a peer needs to be installed. `devices` says where it runs. `captures` is false
    where a CUDA graph cannot hold it. Only a variant with `is_ours` is held to the yardstick's error.

    `instead` is for a variant that computes something else and is timed as a bound: it says what. The gate cannot
    judge it, and no table shows it without these words.
    """

    name: str
    build: Callable[[Shape, torch.device, torch.dtype], Call]
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    captures: bool = True
    is_ours: bool = False
    instead: str = ""
    shapes: tuple[str, ...] | None = None
    """Names of the shapes at which it is timed; None: all. Correctness is checked all the same."""
    attention: Callable[[Shape, torch.device, torch.dtype], str] | None = None
    """What runs attention in it, and why, where that is chosen on the machine: its results name it."""

    def why_missing(self, device: torch.device) -> str:
        """Why this variant cannot run on `device`; empty if it can."""
        if device.type not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {device.type}"
        if self.package:
            try:
                distribution(self.package)
            except PackageNotFoundError:
                return f"package {self.package} is not installed"
        return ""


@dataclass(frozen=True, eq=False)
class Entry:
    """One op. Functions of a shape get the dictionary of its sizes.

    draw(shape, device, dtype, generator)   fresh random inputs, none of them zero
    truth(shape, *inputs)                   outputs for the float64 copies of the inputs
    bytes(shape, itemsize), flops(shape)    least bytes through device memory, and operations, of one call
    """

    group: str
    op: str
    shapes: Mapping[str, Shape]
    toy: Shape
    """Shape for machines without a GPU, and for tests."""
    draw: Callable[[Shape, torch.device, torch.dtype, torch.Generator], Tensors]
    truth: Call
    variants: tuple[Variant, ...]
    bytes: Callable[[Shape, int], int]
    flops: Callable[[Shape], int]
    gate: Shape | None = None
    """Shape at which correctness is checked, where the float64 truth of the real ones is out of reach."""
    yardstick: str = "eager"
    """The variant of plain PyTorch whose error ours is compared with."""
    once: bool = False
    """A call takes too long to be repeated: each variant is called once, warmed up by the gate and by its `build`."""

    def present(self, device: torch.device) -> list[Variant]:
        return [variant for variant in self.variants if not variant.why_missing(device)]

    def missing(self, device: torch.device) -> dict[str, str]:
        """Name and reason of each variant that cannot run on `device`."""
        reasons = {variant.name: variant.why_missing(device) for variant in self.variants}
        return {name: reason for name, reason in reasons.items() if reason}


def as_tuple(outputs: Tensor | Tensors) -> Tensors:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
