"""What an audit says: its checks, what it allowed for, and what it cannot see."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

UNSEEN = (
    "whether the model, or the constants that adapt it, have seen these documents before",
    "a leak at positions that were not tried: more documents and positions see more",
    "a scorer that knows that it is audited, or chance in what it does",
    "a leak below the tolerance",
    "bits per byte: how many bytes the text has is not the scorer's to say",
)
"""What no check here can see."""


@dataclass(frozen=True)
class Check:
    """One property: its name, whether it holds, and what was seen."""

    name: str
    passed: bool
    evidence: str


@dataclass(frozen=True)
class AuditReport:
    """The checks of one audit. `unseen` is what it cannot see, and `rounding` what it allowed for, where it says so.

    Example: passed = AuditReport(()).passed
    """

    checks: tuple[Check, ...]
    unseen: tuple[str, ...] = UNSEEN
    rounding: "Rounding | None" = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that did not pass."""
        return tuple(check.name for check in self.checks if not check.passed)

    def __str__(self) -> str:
        lines = [f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.evidence}" for check in self.checks]
        lines += [f"rounding: {self.rounding}"] if self.rounding else []
        verdict = f"failed: {', '.join(self.failed)}" if self.failed else "every check passed"
        return "\n".join([*lines, verdict, "not seen here: " + "; ".join(self.unseen)])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "passed": self.passed,
            "failed": list(self.failed),
            "checks": [asdict(check) for check in self.checks],
            "unseen": list(self.unseen),
            **({"tolerance": self.rounding.tolerance, "rounding": str(self.rounding)} if self.rounding else {}),
        }


@dataclass(frozen=True)
class Rounding:
    """Nats by which a target's NLL may differ between two passes of our own, and how that came about."""

    tolerance: float
    says: str

    def __str__(self) -> str:
        return f"two passes may differ by {self.tolerance:.3g} nats: {self.says}"


def sums(said: Iterable[tuple[str, float]], nll: Iterable[np.ndarray]) -> Check:
    """Whether what is said of documents, (name, nats) of each, are the sums of their targets' NLLs."""
    worst, where = 0.0, ""
    for (name, nats), found in zip(said, nll, strict=True):
        apart = abs(float(found.sum(dtype=np.float64)) - nats) / max(nats, 1.0)
        if apart > worst:
            worst, where = apart, name
    fits = worst <= 1e-9
    says = "are the documents' nats" if fits else f"are off by a share of {worst:.2g} at {where!r}"
    return Check("sums", fits, f"sums over the targets {says}")
