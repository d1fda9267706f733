"""Models whose matrices stay at six bits: this project's, straight from an artifact, and any other's nn.Linears."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..kernels.int6 import Int6Linear, Int6Matrix, Int6Weight
from .artifact import Artifact
from .gpt import GPT, MATRICES, Block, is_block_matrix


def keep_int6(block: Block, matrices: Mapping[str, Int6Weight], device: torch.device) -> None:
    """Put four Int6Linears in the place of the block's six matrices; Q, K and V are one, stacked."""
    for name in MATRICES:
        delattr(block, name)
    parts = [matrices[name] for name in ("q", "k", "v")]
    packed = torch.cat([part.packed for part in parts]), torch.cat([part.scale for part in parts])
    stacked = Int6Weight(*packed, (sum(part.shape[0] for part in parts), parts[0].shape[1]))
    for name, weight in (("qkv", stacked), *((name, matrices[name]) for name in ("o", "up", "down"))):
        setattr(block, name, Int6Linear.from_matrix(Int6Matrix.from_rows(weight, device)))


def int6_model_from_artifact(artifact: Artifact, device: torch.device) -> GPT:
    """The artifact's model in fp32 on `device` with the block matrices as the artifact has them, repacked there."""
    config = artifact.config
    with torch.device("meta"):
        model = GPT(config)
        for index in range(config.blocks):
            prefix = f"blocks.{index}."
            matrices = {name: artifact.tensors[prefix + name] for name in MATRICES}
            keep_int6(model.blocks[index], matrices, device)
    rest = {name: tensor.float() for name, tensor in artifact.tensors.items() if not is_block_matrix(name)}
    model.load_state_dict(rest, strict=False, assign=True)
    return model.to(device)


def quantize_linears(
    module: nn.Module,
    group_size: int | None = None,
    clip: float = 0.11,
    keep: Callable[[str, nn.Linear], bool] = lambda name, linear: False,
) -> Callable[[], None]:
    """Swap every nn.Linear below `module` for an :class:`Int6Linear` in place, on its device; returns the undo.

    `keep(name, linear)` says which stay as they are. Subclasses of nn.Linear stay too: what they do is not known here.
    A linear that is used in several places stays shared. The undo holds the original weights; drop it to free them.
    ValueError if `module` is itself a linear, which has no place to be swapped in.
    """
    if isinstance(module, nn.Linear):
        raise ValueError("the module is itself an nn.Linear; use Int6Linear.from_linear on it")
    swaps = [
        (parent, name, child)
        for path, parent in module.named_modules()
        for name, child in parent._modules.items()  # named_children() names a shared child once
        if type(child) is nn.Linear and not keep(f"{path}.{name}" if path else name, child)
    ]
    made = {}
    for _, _, child in swaps:
        if child not in made:
            made[child] = Int6Linear.from_linear(child, group_size, clip)
    for parent, name, child in swaps:
        setattr(parent, name, made[child])

    def undo() -> None:
        for parent, name, child in swaps:
            setattr(parent, name, child)

    return undo
