"""Linears whose input is one, such as q, k and v of an attention: the first that is called computes all of them.

Which they are is known by their names and checked at every call: another input, and each computes its own.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attach import Rows, Site

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
)
"""Of one module, in the order in which it calls them."""


def find_shared(sites: Sequence["Site"]) -> list[list["Site"]]:
    """The sites of one module whose names say that their input is one."""
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        parent, _, name = site.place.name.rpartition(".")
        for index, names in enumerate(NAMES):
            if name in names and not site.place.is_conv1d:
                groups.setdefault((parent, index, site.place.inputs, type(site.module)), []).append(site)
    return [group for group in groups.values() if len(group) > 1]


class Input(NamedTuple):
    """What the outputs depend on beside the weights."""

    x: Tensor
    version: int
    rows: "Rows"
    settings: tuple

    @classmethod
    def of(cls, site: "Site", x: Tensor, rows: "Rows") -> "Input":
        is_cast = torch.is_autocast_enabled(x.device.type)
        cast = torch.get_autocast_dtype(x.device.type) if is_cast else None
        version = 0 if x.is_inference() else x._version
        return cls(x, version, rows, (torch.is_grad_enabled(), cast, site.module.training, site.lora.dropout))

    def is_same(self, other: "Input") -> bool:
        return self.x is other.x and self.rows is other.rows and self[1::2] == other[1::2]


class Shared:
    """Sites with one input. Once one of them is called with another input than the first was, all compute their own
    from the next `rows` on: within one, a block that is recomputed must do what it did.

    `compute` makes the outputs of several sites for an input, `is_one_launch` says whether it does so at once.
    """

    def __init__(
        self,
        sites: list["Site"],
        compute: Callable[[Sequence["Site"], Tensor], list[Tensor]],
        is_one_launch: Callable[[Sequence["Site"], Tensor], bool],
    ):
        self.sites, self.compute, self.is_one_launch = sites, compute, is_one_launch
        self.input: Input | None = None
        self.outputs: dict[Site, Tensor] = {}
        self.traced_input: Tensor | None = None
        self.traced_outputs: list[Tensor] = []
        self.is_one = self.was_one = True
        for turn, site in enumerate(sites):
            site.shared, site.turn = self, turn

    def traced(self, site: "Site", x: Tensor) -> Tensor:
        """The output of `site` for `x` in a graph of torch.compile, which holds the calls of all sites: those for one
        input are one launch where there is one for them. Nothing is kept from one graph to the next.
        """
        if not self.is_one or len({one.module.training for one in self.sites}) > 1:
            return self.compute([site], x)[0]
        if self.traced_input is None:
            if not self.is_one_launch(self.sites, x):
                return self.compute([site], x)[0]
            self.traced_input, self.traced_outputs = x, list(self.compute(self.sites, x))
        elif self.traced_input is not x:
            self.was_one = False
            return self.compute([site], x)[0]
        output = self.traced_outputs[site.turn]
        if site is self.sites[-1]:
            self.traced_input, self.traced_outputs = None, []
        return output

    def forward(self, site: "Site", x: Tensor, rows: "Rows") -> Tensor:
        """The output of `site` for `x`."""
        if not self.is_one or len({one.module.training for one in self.sites}) > 1:
            return self.compute([site], x)[0]
        given = Input.of(site, x, rows)
        is_waiting = site in self.outputs and self.input.rows is rows
        if is_waiting and self.input.is_same(given):
            output = self.outputs.pop(site)
            if not self.outputs:
                self.input = None
            return output
        if is_waiting:
            self.was_one = False
            return self.compute([site], x)[0]
        self.input, self.outputs = given, dict(zip(self.sites, self.compute(self.sites, x), strict=True))
        return self.outputs.pop(site)

    def forget(self) -> None:
        """At the end of `rows`: outputs that nobody asked for, and what was learnt in it."""
        self.input, self.outputs, self.is_one = None, {}, self.was_one
        self.traced_input, self.traced_outputs = None, []

    def __getstate__(self) -> dict:
        return vars(self) | {"input": None, "outputs": {}, "traced_input": None, "traced_outputs": []}
