"""MLPs of transformers whose three linears have adapters, as one op: SwiGLU is no pass of its own.

Where the op is not meant for what it is given, or a hook listens to a part of the MLP, its forward is the module's own,
and each linear what it is elsewhere.
"""

from collections.abc import Callable, Sequence
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
        own = [named.get(f"{parent}.{name}") for name in NAMES]
        if all(own) and _is_known(model.get_submodule(parent)):
            found.append(own)
    return found


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    is_theirs = kind.__name__ in CLASSES and kind.__module__.startswith("transformers.models.")
    return is_theirs and type(module.act_fn).__name__ in SILU and "forward" not in vars(module)


class SwigluMlp:
    """One MLP, whose `forward` is called in the place of the module's. `sites` are those of gate, up and down; `inputs`
    makes of them and their input what the op takes.
    """

    def __init__(self, module: nn.Module, sites: list["Site"], inputs: Callable[[list["Site"], Tensor], "Inputs"]):
        self.module, self.sites, self.inputs = module, sites, inputs

    def forward(self, x: Tensor) -> Tensor:
        lora, first = self.sites[0].lora, self.sites[0]
        if not first.is_active(x) or lora.dropout or not lora.stacks or self._is_watched():
            return type(self.module).forward(self.module, x)
        given = self.inputs(self.sites, x)
        if not is_one_mlp(*given, lora.backend):
            return type(self.module).forward(self.module, x)
        scales, ranks = [site.scale for site in self.sites], [site.ranks for site in self.sites]
        out = adapted_mlp(given.x, given.weights, given.adapters, scales, ranks, lora.current.slots, lora.backend)
        return out.unflatten(1, x.shape[1:-1]) if x.dim() > 3 else out

    def _is_watched(self) -> bool:
        """Whether a hook wants to see what the op does not make: a part's input, output or their gradients."""
        parts = self.module.act_fn, *(site.module for site in self.sites)
        return any(getattr(part, f"_{name}") for part in parts for name in HOOKS) or any(
            getattr(every_module, f"_global_{name}") for name in HOOKS
        )
