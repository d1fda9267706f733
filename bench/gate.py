"""The correctness gate: no speed without it.

Ours passes where each output's error is within the tolerance that tolerance.py allows over plain PyTorch in the same
dtype, on inputs that are fresh, random and nowhere zero. Any other variant passes with a margin of FOREIGN: a peer may
round differently, but one that is called wrongly computes something else, and its speed would mean nothing. A NaN
never passes.
"""

from dataclasses import dataclass

import torch

from ..errors import KloraError
from .entry import Entry, Shape, as_tuple
from .tolerance import MARGIN, allowed_error, relative_error

FOREIGN = 4.0


class RedGate(KloraError, RuntimeError):
    """A variant computes something else than the op; the message names it, its error and what was allowed."""


@dataclass(frozen=True)
class Verdict:
    """A variant's relative errors, one an output, and the most that was allowed."""

    errors: tuple[float, ...]
    allowed: tuple[float, ...]

    @property
    def is_green(self) -> bool:
        return all(error <= most for error, most in zip(self.errors, self.allowed, strict=True))


def check(
    entry: Entry,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    broken: dict[str, str] | None = None,
) -> dict[str, Verdict]:
    """Errors at `shape` of every variant that is present and computes the op. RedGate if one is not allowed.

    Where `broken` is given, it gets the name and the reason of each variant that raises: somebody else's compiler or
    package does not take our own measurement along. What is ours, and the yardstick, raise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    inputs = entry.draw(shape, device, dtype, generator)
    exact = as_tuple(entry.truth(shape, *(t.double() if t.is_floating_point() else t for t in inputs)))
    errors = {}
    judged = [variant for variant in entry.present(device) if not variant.instead]
    for variant in judged:
        try:
            outputs = as_tuple(variant.build(shape, device, dtype)(*inputs))
        except Exception as error:
            if broken is None or variant.is_ours or variant.name == entry.yardstick:
                raise
            broken[variant.name] = why_broken(error)
            continue
        errors[variant.name] = tuple(relative_error(o, e) for o, e in zip(outputs, exact, strict=True))
        if variant.name == entry.yardstick:
            dtypes = [output.dtype for output in outputs]
    yardstick = errors[entry.yardstick]
    verdicts = {}
    for variant in judged:
        if variant.name not in errors:
            continue
        factor = MARGIN if variant.is_ours else FOREIGN
        allowed = (
            allowed_error(error, kind, out.numel(), factor)
            for error, kind, out in zip(yardstick, dtypes, exact, strict=True)
        )
        verdicts[variant.name] = Verdict(errors[variant.name], tuple(allowed))
    red = {name: verdict for name, verdict in verdicts.items() if not verdict.is_green}
    if red:
        faults = "; ".join(
            f"{name} has error {_short(v.errors)}, allowed {_short(v.allowed)}" for name, v in red.items()
        )
        raise RedGate(f"{entry.op} at {dict(shape)}, {dtype}: {faults}. No speed is reported.")
    return verdicts


def why_broken(error: Exception) -> str:
    """What a record says of a variant that raises."""
    return f"it raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _short(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.2e}" for value in values)
