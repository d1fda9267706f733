"""Every group of entries, by name. A new op is one line here."""

from ..errors import KloraError
from . import (
    attention,
    ceilings,
    elementwise,
    head,
    int6,
    lora,
    lora_adam,
    lora_linears,
    mlp,
    muon,
    step,
    training,
    ttt,
)
from .entry import Entry

GROUPS: dict[str, tuple[Entry, ...]] = {
    "ceilings": ceilings.ENTRIES,
    "attention": attention.ENTRIES,
    "step": step.ENTRIES,
    "training": training.ENTRIES,
    "ttt": tuple(entry for entry in ttt.ENTRIES if entry.group == "ttt"),
    "corpus": tuple(entry for entry in ttt.ENTRIES if entry.group == "corpus"),
    "lora": (*lora.ENTRIES, *lora_linears.ENTRIES, *lora_adam.ENTRIES),
    "head": head.ENTRIES,
    "muon": muon.ENTRIES,
    "int6": int6.ENTRIES,
    "elementwise": elementwise.ENTRIES,
    "mlp": mlp.ENTRIES,
}


class UnknownGroup(KloraError, ValueError):
    """A group that does not exist; the message lists those that do."""


def entries_of(names: list[str]) -> list[Entry]:
    """Entries of the named groups, all of them where no name is given."""
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise UnknownGroup(f"there is no group {unknown[0]!r}; allowed: {', '.join(GROUPS)}")
    return [entry for name in names or GROUPS for entry in GROUPS[name]]
