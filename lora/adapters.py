"""The adapters by name: create, reset, delete, load and save."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import torch

from . import peft
from .pool import MOST_ALPHA, LoraError, Place, Pool


@dataclass(frozen=True)
class Adapter:
    """One adapter: its slot, and the rank and alpha that it has at each linear, by the linear's name."""

    slot: int
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    seed: int


class Adapters:
    """The adapters of a model, by name: `adapters["alice"].slot`, `"alice" in adapters`, `list(adapters)`.

    `lora.adapters` is one. Each takes a slot of the pool. LoraError, and nothing changed: an unknown name or one
    that is taken, no free slot, a rank above the pool's, a target that is not attached, a file that does not fit, a
    folder that cannot be written.

    Example: adapters: Adapters = lora.adapters
    """

    def __init__(self, pool: Pool, ranks: Mapping[str, int], alpha: float | None, seed: int, base_name: str | None):
        self.pool, self._defaults, self._seed, self._base_name = pool, (dict(ranks), alpha), seed, base_name
        self._named: dict[str, Adapter] = {}

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._named:
            raise LoraError(f"no adapter is called {name!r}; there are: {', '.join(self._named) or 'none yet'}")
        return self._named[name]

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def create(
        self,
        name: str,
        rank: int | Mapping[str, int] | None = None,
        alpha: float | None = None,
        targets: Iterable[str] | None = None,
        seed: int | None = None,
    ) -> int:
        """A new adapter that changes nothing yet: A is uniform within +-1/sqrt(K), as PEFT's, and B zero; its slot.

        `rank` is one for all or one for each target, at most the pool's; `targets` some of those attached. Left out,
        they are those of :func:`attach`. The output's scale is alpha / rank, 1 without an `alpha`. `seed` draws A.

        Example: slot = lora.adapters.create("carol", rank=4, alpha=8, targets=("q_proj",))
        """
        most, default_alpha = self._defaults
        if targets is None:
            targets = rank if isinstance(rank, Mapping) else most
        chosen = names_of("targets", targets)
        _check_names("targets", chosen, most)
        ranks = ranks_of(most if rank is None else rank, chosen, lenient=rank is None)
        if over := [target for target in chosen if ranks[target] > most[target]]:
            raise LoraError(
                f"rank {ranks[over[0]]} of {over[0]!r} is above the pool's, {most[over[0]]}; "
                f"attach with rank={ranks[over[0]]} or more"
            )
        alpha = check_alpha(default_alpha if alpha is None else alpha)
        if seed is not None:
            check_whole("seed", seed)
        slot = self._free_slot(name)
        places = [place for place in self.pool.places if place.target in chosen]
        self._named[name] = Adapter(
            slot,
            {place.name: ranks[place.target] for place in places},
            {place.name: float(ranks[place.target] if alpha is None else alpha) for place in places},
            self._seed + slot if seed is None else seed,
        )
        self.reset(name)
        return slot

    def reset(self, name: str) -> None:
        """The adapter as it was created: A drawn anew from the same seed, B zero, Adam at its start.

        Example: lora.adapters.reset("alice")
        """
        adapter = self[name]
        self.pool.clear(adapter.slot)
        draw = torch.Generator("cpu").manual_seed(adapter.seed)
        for index, place in self._places(adapter):
            rank = adapter.ranks[place.name]
            uniform = torch.rand(rank, place.inputs, generator=draw, dtype=torch.float32, device="cpu")
            lora_b, scale = self.pool.params.new_zeros(place.outputs, rank), adapter.alphas[place.name] / rank
            self.pool.write(adapter.slot, index, (2 * uniform - 1) / place.inputs**0.5, lora_b, scale)

    def delete(self, name: str) -> None:
        """Empty its slot for another adapter.

        Example: lora.adapters.delete("bob")
        """
        self.pool.clear(self[name].slot)
        del self._named[name]

    def load(self, name: str, folder: str | Path) -> int:
        """A new adapter from a folder that PEFT or :meth:`save` wrote; its slot.

        Example: slot = lora.adapters.load("dave", "alice-lora")
        """
        tensors, alphas = peft.read(Path(folder), self.pool.places)
        slot = self._free_slot(name)
        ranks = {place: len(pair[0]) for place, pair in tensors.items()}
        self._named[name] = adapter = Adapter(slot, ranks, alphas, self._seed + slot)
        self.pool.clear(slot)
        for index, place in self._places(adapter):
            self.pool.write(slot, index, *tensors[place.name], alphas[place.name] / ranks[place.name])
        return slot

    def save(self, name: str, folder: str | Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, which PEFT reads with equal outputs.

        Example: lora.adapters.save("alice", "alice-lora")
        """
        adapter = self[name]
        places = dict(self._places(adapter))
        tensors = {
            place.name: self.pool.read(adapter.slot, index, adapter.ranks[place.name])
            for index, place in places.items()
        }
        chosen = list(places.values())
        peft.write(Path(folder), tensors, adapter.alphas, chosen, self.pool.places, self._base_name)

    def slot_of(self, row: str | int | None) -> int:
        """The slot of a row of a batch: an adapter's name, its slot, or None or -1 for none."""
        if row is None or isinstance(row, str):
            return -1 if row is None else self[row].slot
        taken = sorted(adapter.slot for adapter in self._named.values())
        if isinstance(row, bool) or not isinstance(row, Integral) or row not in (-1, *taken):
            raise LoraError(f"slot {row!r} holds no adapter; allowed: -1 for none, and {taken}")
        return int(row)

    def _places(self, adapter: Adapter) -> list[tuple[int, Place]]:
        return [(index, place) for index, place in enumerate(self.pool.places) if place.name in adapter.ranks]

    def _free_slot(self, name: str) -> int:
        if not isinstance(name, str) or not name:
            raise LoraError(f"name is {name!r}; wanted: text that is not empty")
        if name in self:
            raise LoraError(f"an adapter is already called {name!r}; delete() it first, or give another name")
        free = sorted(set(range(self.pool.slots)) - {adapter.slot for adapter in self._named.values()})
        if not free:
            raise LoraError(f"all {self.pool.slots} slots are taken; delete() an adapter, or attach with more slots")
        return free[0]


def ranks_of(rank: int | Mapping[str, int], targets: list[str], lenient: bool = False) -> dict[str, int]:
    """The rank of each target; LoraError unless each has one of at least 1, and (if not lenient) nothing else has."""
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(targets, rank)
    if missing := [target for target in targets if target not in ranks]:
        raise LoraError(f"rank={ranks} gives none for {missing[0]!r}")
    if not lenient:
        _check_names("rank", ranks, targets)
    for target, value in ranks.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise LoraError(f"rank {value!r} of {target!r}; wanted: a whole number of at least 1")
    return {target: int(ranks[target]) for target in targets}


def check_alpha(alpha: float | None) -> float | None:
    """LoraError unless it is None or a number above 0 and below MOST_ALPHA."""
    if alpha is not None and not (isinstance(alpha, Real) and 0 < alpha < MOST_ALPHA):
        raise LoraError(
            f"alpha is {alpha!r}; wanted: a number above 0 and below {MOST_ALPHA:g}, or None for a scale of 1"
        )
    return alpha


def check_whole(name: str, number: int) -> None:
    """LoraError unless it is a whole number of 64 bits."""
    if isinstance(number, bool) or not isinstance(number, Integral) or not -(2**63) <= number < 2**63:
        raise LoraError(f"{name} is {number!r}; wanted: a whole number from -2**63 to below 2**63")


def names_of(what: str, names: str | Iterable[str]) -> list[str]:
    """One name or several as a list, each once; LoraError where one is no text or empty."""
    found = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if wrong := [name for name in found if not (isinstance(name, str) and name)]:
        raise LoraError(f"{what} names {wrong[0]!r}; wanted: text that is not empty, or a list of such names")
    return list(dict.fromkeys(found))


def _check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    names, allowed = list(names), list(allowed)
    if not names:
        raise LoraError(f"{what} is empty; allowed: {', '.join(allowed)}")
    if unknown := [name for name in names if name not in allowed]:
        raise LoraError(f"{what} names {unknown[0]!r}; allowed: {', '.join(allowed)}")
