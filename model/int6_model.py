"""Models whose matrices stay at six bits: this project's, straight from an artifact, and any other's nn.Linears."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.int6 import (
    GROUP_SIZES,
    GroupSize,
    Int6Linear,
    Int6Matrix,
    Int6Weight,
    is_group_size,
    pack_int6,
    packed_shape,
    pick_group_size,
    quantize_int6_ref,
    relative_error,
)
from .artifact import Artifact
from .config import ConfigError
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
    """The artifact's model in fp32 on `device`, its block matrices at six bits as the file has them.

    They are repacked on `device`. :func:`~klora.model.model_from_artifact` also picks backends and freezes the model.

    Example: model = int6_model_from_artifact(load_artifact("tiny.klora"), torch.device("cpu"))
    """
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


@dataclass(frozen=True)
class SwappedLinear:
    """What became of one linear."""

    relative_error: float | None
    """sum h (w - w_hat)^2 / sum h w^2, h the second moment where given; None on "meta". Its root is the error of the
    output for independent inputs."""
    dense_bytes: int
    bytes: int
    """of the codes and the scales"""
    also: tuple[str, ...] = ()
    """Other places of the same linear."""
    group_size: int | None = None
    """Inputs that share a scale; None: one scale a row."""


@dataclass(frozen=True, eq=False)
class QuantizedLinears:
    """What :func:`quantize_linears` did; print it for a summary, call `undo()` to have the linears back."""

    swapped: dict[str, SwappedLinear]
    skipped: dict[str, str]
    """Linears (and Conv1Ds) that stay as they are, and why."""
    undo: Callable[[], None]
    """Puts the original linears back, on the device, in the dtype and in the mode that the model has by then. It holds
    their weights: drop this object to free them."""

    def __call__(self) -> None:
        self.undo()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the swapped weights as they were."""
        return sum(linear.dense_bytes for linear in self.swapped.values())

    @property
    def bytes(self) -> int:
        """Bytes of the swapped weights now, scales included."""
        return sum(linear.bytes for linear in self.swapped.values())

    @property
    def relative_error(self) -> float:
        """The mean over the swapped weights."""
        errors = [(linear.relative_error or 0.0) * linear.bytes for linear in self.swapped.values()]
        return sum(errors) / self.bytes if errors else 0.0

    def __str__(self) -> str:
        count = f"{len(self.swapped)} linear{'s' * (len(self.swapped) != 1)} at six bits"
        lines = [f"{count}: {self.dense_bytes:,} bytes -> {self.bytes:,}, output error {self.relative_error**0.5:.1%}"]
        sizes = Counter(linear.group_size for linear in self.swapped.values() if linear.group_size)
        lines += [f"{number} with a scale for every {size} inputs" for size, number in sorted(sizes.items())]
        return "\n".join(lines + [f"skipped {name}: {why}" for name, why in self.skipped.items()])


def quantize_linears(
    module: nn.Module,
    group_size: GroupSize = "auto",
    clip: float | None = None,
    keep: Callable[[str, nn.Linear], bool] = lambda name, linear: False,
    second_moments: Mapping[str, Tensor] | None = None,
) -> QuantizedLinears:
    """Swap the nn.Linears below `module` for :class:`Int6Linear` in place, each on its device; says what it did.

    `group_size` "auto" takes for each linear one scale a row, or one for every 128 or 64 inputs where the error falls
    enough for it (:func:`pick_group_size`); None, 32, 64 or 128 is for all. The result says what each linear got.
    `clip` None searches the scale of least error for every row or group; a number fixes it (`quantize_int6`).
    `second_moments` weights that search: for a linear's name, the mean square of each of its inputs, [in_features].
    `keep(name, linear)` says which stay as they are. A linear that is used in several places stays shared.

    Hooks, train or eval mode, and the bias (the same Parameter) go over to the new module. Left as they are, with the
    reason in the result: subclasses and Conv1D, weights that are tied to another module's, computed by a hook, trained
    while others are frozen (adapters), or not smaller at six bits. On "meta" the structure is made, for weights to be
    loaded. A Hugging Face model's `save_pretrained` would write what `from_pretrained` cannot read: until the undo it
    raises and names :func:`save_quantized`; call this on the whole model, for a part does not know its model.

    ConfigError, and nothing swapped: `module` is itself a linear, which has no place to be swapped in; a weight that is
    not finite; another group size; a second moment of no linear.

    Example: report = quantize_linears(torch.nn.Sequential(torch.nn.Linear(256, 256)), group_size=64)
    """
    if isinstance(module, nn.Linear):
        raise ConfigError("the module is itself an nn.Linear; use Int6Linear.from_linear on it")
    if group_size != "auto" and not is_group_size(group_size, math.lcm(*GROUP_SIZES)):
        raise ConfigError(f"group_size={group_size!r}; allowed: {', '.join(map(str, GROUP_SIZES))}, None or 'auto'")
    names = _names_of_linears(module)
    moments = dict(second_moments or {})
    if unknown := sorted(moments.keys() - {name for places in names.values() for name in places}):
        raise ConfigError(f"second_moments names {unknown[0]!r}, which is no linear of this module")
    owners = _owners(module)
    forced = None if group_size == "auto" else group_size
    some_frozen = any(type(linear) is nn.Linear and not linear.weight.requires_grad for linear in names)
    made, swapped, skipped = {}, {}, {}
    for linear, (name, *also) in names.items():
        why = _why_not(linear, (name, *also), owners, forced, keep)
        if why is None and some_frozen and linear.weight.requires_grad:
            why = "its weight is trained while others are frozen; at six bits it would be frozen too"
        if why:
            skipped |= dict.fromkeys((name, *also), why)
            continue
        moment = next((moments[place] for place in (name, *also) if place in moments), None)
        try:
            made[linear], error = _quantized(linear, group_size, clip, moment)
        except ValueError as refused:
            raise ConfigError(f"{name}: {refused}") from refused
        size = made[linear].packed.nbytes + made[linear].scale.nbytes
        swapped[name] = SwappedLinear(error, linear.weight.nbytes, size, tuple(also), made[linear].weight.group_size)
    return QuantizedLinears(swapped, skipped, replace_linears(module, made))


def replace_linears(module: nn.Module, made: Mapping[nn.Module, Int6Linear]) -> Callable[[], None]:
    """Put each of `made` wherever its linear is below `module`, with its hooks and mode; returns the undo."""
    swaps = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()  # named_children() names a shared child once
        if child in made
    ]
    for linear, int6 in made.items():
        _share_hooks(linear, int6)
        int6.train(linear.training)
    for parent, name, child in swaps:
        setattr(parent, name, made[child])
    guarded = _guard_save_pretrained(module) if made else []

    def undo() -> None:
        for parent, name, child in swaps:
            if parent._modules.get(name) is made[child]:
                setattr(parent, name, child)
        for linear, int6 in made.items():
            linear.bias = int6.bias
            if not int6.packed.is_meta and not linear.weight.is_meta:
                linear.to(int6.packed.device, int6.dtype)
            _share_hooks(int6, linear)
            linear.train(int6.training)
        for model in guarded:
            vars(model).pop("save_pretrained", None)

    return undo


def _names_of_linears(module: nn.Module) -> dict[nn.Module, list[str]]:
    """Every linear and Conv1D below `module`, with the names of its places."""
    names: dict[nn.Module, list[str]] = {}
    for path, parent in module.named_modules():
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D":
                names.setdefault(child, []).append(f"{path}.{name}" if path else name)
    return names


def _owners(module: nn.Module) -> dict[int, list[str]]:
    """Names of each Parameter, by its id, one for each module that holds it."""
    owners: dict[int, list[str]] = {}
    for path, parent in module.named_modules():
        for name, parameter in parent._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return owners


def _why_not(
    linear: nn.Module,
    names: Sequence[str],
    owners: Mapping[int, Sequence[str]],
    group_size: int | None,
    keep: Callable[[str, nn.Linear], bool],
) -> str | None:
    """Why `linear` is not swapped; None where it is."""
    kind = type(linear)
    if kind.__name__ == "Conv1D":
        return "a Conv1D holds its weight transposed, [in, out]; only nn.Linear is swapped"
    if kind is not nn.Linear:
        return f"{kind.__name__} is a subclass of nn.Linear; what it does beside the product would be lost"
    if any(keep(name, linear) for name in names):
        return "kept by `keep`"
    if set(linear._parameters) != {"weight", "bias"} or linear._buffers or linear._modules:
        return "it holds more than a weight and a bias (weight_norm, pruning, adapters)"
    if "forward" in vars(linear):
        return "its forward was replaced on the object; the replacement would be lost"
    weight = linear.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is {weight.dtype} in a {type(weight).__name__}; int6 takes a floating-point nn.Parameter"
    if tied := [owner for owner in owners[id(weight)] if owner.rpartition(".")[0] not in names]:
        return f"its weight is tied to {', '.join(tied)}"
    rows, columns = weight.shape
    packed = 4 * math.prod(packed_shape(rows, columns)) + 2 * rows * (columns // group_size if group_size else 1)
    if packed >= weight.nbytes:
        return f"too small: [{rows}, {columns}] takes {weight.nbytes:,} bytes and {packed:,} at six bits"
    if group_size is not None and columns % group_size:
        return f"its {columns} inputs are no multiple of group_size={group_size}"
    return None


def _quantized(
    linear: nn.Linear, group_size: GroupSize, clip: float | None, second_moment: Tensor | None
) -> tuple[Int6Linear, float | None]:
    """The linear at six bits and its relative squared error."""
    weight = linear.weight
    if weight.is_meta:
        return Int6Linear.from_linear(linear, group_size), None
    with torch.inference_mode(False):  # as quantize_int6, whose codes the error needs before they are packed
        if group_size == "auto":
            group_size = pick_group_size(weight, clip, second_moment)
        codes, scale = quantize_int6_ref(weight, clip, group_size, second_moment)
        matrix = Int6Matrix(pack_int6(codes), scale, tuple(weight.shape))
        int6 = Int6Linear.from_matrix(matrix, linear.bias, weight.dtype)
    return int6, relative_error(weight, codes, scale, second_moment)


HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
"""Where nn.Module keeps what is called around a forward or a backward."""


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    """`target` has the very dictionaries of `source`, so that a handle's `remove()` acts on both."""
    vars(target).update({name: vars(source)[name] for name in HOOKS})


def _guard_save_pretrained(module: nn.Module) -> list[nn.Module]:
    """Make `save_pretrained` of every Hugging Face model in `module` raise; returns those that did not yet.

    PEFT's wrapper stays as it is: what it saves is the adapters alone.
    """
    models = [m for m in module.modules() if hasattr(type(m), "save_pretrained") and "save_pretrained" not in vars(m)]
    models = [m for m in models if not any(base.__name__ == "PeftModel" for base in type(m).__mro__)]
    for model in models:
        model.save_pretrained = _refuse_save_pretrained
    return models


def _refuse_save_pretrained(*args, **kwargs):
    raise RuntimeError(
        "this model's linears are at six bits, and from_pretrained would fill them with random weights without an error"
        "; use klora's save_quantized(model, 'model.safetensors'), and load_quantized on a fresh model, or undo() "
        "the quantisation first"
    )
