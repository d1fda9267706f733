"""Which linears of a model the targets name, and why one cannot have adapters."""

from collections.abc import Mapping

import torch
from torch import nn

from .pool import LoraError, Place


def find_linears(model: nn.Module, targets: list[str], ranks: Mapping[str, int]) -> list[Place]:
    """The linears that the targets name, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found, missing = [], dict.fromkeys(targets)
    for module, places in names.items():
        ends = [target for target in targets if any(f".{place}".endswith(f".{target}") for place in places)]
        if not ends:
            continue
        for target in ends:
            missing.pop(target, None)
        name, target = places[0], max(ends, key=len)
        if len(places) > 1:
            raise LoraError(f"{name} and {places[1]} are one module, used twice; it cannot have an adapter for each")
        _check_module(model, name, module)
        is_conv1d = type(module).__name__ == "Conv1D"
        outputs, inputs = module.weight.mT.shape if is_conv1d else module.weight.shape
        found.append(Place(name, target, is_conv1d, inputs, outputs, ranks[target]))
    if missing:
        linears = {name.rpartition(".")[2] for (m, (name, *_)) in names.items() if _is_linear(m)}
        called = ", ".join(sorted(linears)) or "none"
        raise LoraError(f"no module of this model is called {next(iter(missing))!r}; its linears are: {called}")
    return found


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _check_module(model: nn.Module, name: str, module: nn.Module) -> None:
    kind, parent = type(module).__name__, model.get_submodule(name.rpartition(".")[0])
    if not _is_linear(module):
        whose = f"{type(module).__module__}." if kind == "Linear" else ""
        raise LoraError(f"{name} is a {whose}{kind}; adapters go on nn.Linear and Conv1D")
    if "forward" in vars(module):
        raise LoraError(
            f"{name} has a forward of its own: adapters that are attached already (detach() them), or hooks"
        )
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise LoraError(
            f"{name} is read by {type(parent).__name__} without its forward; an adapter would have no effect"
        )
    weight = module._parameters.get("weight")
    if set(module._parameters) != {"weight", "bias"} or weight is None or not weight.is_floating_point():
        raise LoraError(f"{name} holds other than a floating-point weight and a bias; take that off first")
    if weight.is_meta:
        raise LoraError(f"{name} is on 'meta', without numbers; load its weights first")
    if weight.is_inference():
        raise LoraError(f"{name} was made in inference_mode and gets no gradients; load the model outside of it")


def check_weights(model: nn.Module, modules: Mapping[str, nn.Module], dtype: torch.dtype | None) -> None:
    """LoraError where a weight is another module's too, of another dtype than is asked, or on another device."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel() and not parameter.is_meta:
            owners.setdefault(parameter.data_ptr(), []).append(name)
    devices = {module.weight.device: name for name, module in modules.items()}
    for name, module in modules.items():
        if tied := [owner for owner in owners.get(module.weight.data_ptr(), ()) if owner != f"{name}.weight"]:
            raise LoraError(
                f"the weight of {name} is tied to {tied[0]}; leave {name.rpartition('.')[2]!r} out of targets"
            )
        if dtype is not None and module.weight.dtype != dtype:
            raise LoraError(f"{name} is {module.weight.dtype} and base='bf16'; cast the model, or give base='dense'")
    if len(devices) > 1:
        raise LoraError(
            f"{' and '.join(f'{name} is on {device}' for device, name in devices.items())}; wanted: one device"
        )
