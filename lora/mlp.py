"""MLPs of transformers whose three linears have adapters, as one op: SwiGLU is no pass of its own.

Where the op is not meant for what it is given, a hook listens to a part of the MLP, or a part is not what it was when
adapters were attached, its forward is the module's own, and each linear what it is elsewhere.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules import module as every_module

from .linear import adapted_mlp, is_one_mlp

if TYPE_CHECKING:
    from .attach import Inputs, Site

NAMES = "gate_proj", "up_proj", "down_proj"
CLASSES = "LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"
"""Of transformers, whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
SILU = "SiLU", "SiLUActivation"
HOOKS = "forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"


def find_mlps(model: nn.Module, sites: Sequence["Site"]) -> list[list["Site"]]:
    """The sites of gate, up and down of each MLP that is known, with SiLU and its class's own forward."""
    named, found = {site.place.name: site for site in sites}, []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in named):
        own = [named.get(f"{parent}.{name}" if parent else name) for name in NAMES]
        module = model.get_submodule(parent)
        if all(own) and _is_known(module) and "forward" not in vars(module):
            found.append(own)
    return found


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    is_theirs = kind.__name__ in CLASSES and kind.__module__.startswith("transformers.models.")
    if not is_theirs or kind.forward.__module__ != kind.__module__:  # somebody's patch of the class
        return False
    return type(module.act_fn).__name__ in SILU and "forward" not in vars(module.act_fn)


def stands_in(owner: object, module: nn.Module) -> bool:
    """Whether the forward of `owner` is called in the place of the module's."""
    forward = vars(module).get("forward")
    # getattr with a default would do, but for torch.compile up to 2.11, which takes the default.
    return isinstance(forward, MethodType) and forward.__self__ is owner


class SwigluMlp:
    """One MLP, whose `forward` is called in the place of the module's. `sites` are those of gate, up and down; `inputs`
    makes of them and their input what the op takes.
    """

    def __init__(self, module: nn.Module, sites: list["Site"], inputs: Callable[[list["Site"], Tensor], "Inputs"]):
        self.module, self.sites, self.inputs = module, sites, inputs

    def forward(self, x: Tensor) -> Tensor:
        first, lora = self.sites[0], self.sites[0].lora
        if not (self._is_whole() and first.is_active(x) and lora.stacks) or self._has_dropout():
            return type(self.module).forward(self.module, x)
        given = self.inputs(self.sites, x)
        if not is_one_mlp(*given, lora.backend):
            return type(self.module).forward(self.module, x)
        scales, ranks = [site.scale for site in self.sites], [site.ranks for site in self.sites]
        out = adapted_mlp(given.x, given.weights, given.adapters, scales, ranks, lora.current.slots, lora.backend)
        return out.unflatten(1, x.shape[1:-1]) if x.dim() > 3 else out

    def _is_whole(self) -> bool:
        """Whether the op stands for what would be called: nobody has replaced a part or its forward, or hooks it."""
        has_sites = all(
            getattr(self.module, name) is site.module and stands_in(site, site.module)
            for name, site in zip(NAMES, self.sites, strict=True)
        )
        return has_sites and _is_known(self.module) and not self._is_watched()

    def _has_dropout(self) -> bool:
        return self.sites[0].lora.dropout > 0 and any(site.module.training for site in self.sites)

    def _is_watched(self) -> bool:
        """Whether a hook wants to see what the op does not make: a part's input, output or their gradients."""
        parts = self.module.act_fn, *(site.module for site in self.sites)
        return any(getattr(part, f"_{name}") for part in parts for name in HOOKS) or any(
            getattr(every_module, f"_global_{name}") for name in HOOKS
        )
