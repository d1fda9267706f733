"""One safetensors file of a model with Int6Linears: everything of its state, and which linears are at six bits."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..kernels.int6 import LAYOUT, Int6Linear
from ..kernels.int6.layout import SCALE_DTYPES
from ..kernels.int6.linear import take_layout_1
from .checkpoint import CheckpointError
from .config import ConfigError
from .int6_model import replace_linears
from .reading import open_regular, parse_json
from .storage import replacing

FORMAT, VERSION = "klora int6 linears", 1


def save_quantized(module: nn.Module, path: Path | str) -> None:
    """Write the state of `module`, after :func:`quantize_linears`, to `path`. The file appears whole or not at all.

    Tied tensors are written once. ConfigError: no Int6Linear in it, a state that is not tensors, tensors on "meta".
    OSError: the disk.

    Example: save_quantized(quantized, "linears.safetensors")
    """
    linears = {
        name: {"group_size": linear.weight.group_size, "dtype": str(linear.dtype).removeprefix("torch.")}
        for name, linear in module.named_modules(remove_duplicate=False)
        if isinstance(linear, Int6Linear)
    }
    if not linears:
        raise ConfigError("the module holds no Int6Linear; call quantize_linears on it first")
    tensors, aliases, first = {}, {}, {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            found = '"meta"' if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(f"{name} is on {found}; a quantised model is saved from tensors that hold values")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()  # safetensors refuses views of one storage
    about = {"format": FORMAT, "version": VERSION, "linears": linears, "aliases": aliases}
    with replacing(Path(path)) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"klora": json.dumps(about)})


def load_quantized(module: nn.Module, path: Path | str, device: torch.device | str | None = None) -> nn.Module:
    """Fill `module`, built as the saved one was before it was quantised, from a file of :func:`save_quantized`.

    Its linears become the file's Int6Linears; hooks and modes stay, tied weights stay tied. Parameters and buffers are
    replaced by the file's, in the file's dtype, so build optimizers afterwards. Tiles of layout 1 are repacked. What is
    on "meta" goes to `device` (the CPU if left out), the rest stays where it is. Returns `module`.

    CheckpointError (no such file, one of another model) or ConfigError (a buffer on "meta" that no state holds), and
    nothing changed.

    Example: module = load_quantized(torch.nn.Sequential(torch.nn.Linear(256, 256)), "linears.safetensors")
    """
    about, state = _read(Path(path))
    linears = about["linears"]
    own = module.state_dict()
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in own]
    if lost:
        raise ConfigError(f"{lost[0]} is on 'meta' and in no file; build the module on a real device")
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    made = {}
    for name, spec in linears.items():
        linear = dict(module.named_modules(remove_duplicate=False)).get(name)
        if type(linear) not in (nn.Linear, Int6Linear):
            raise CheckpointError(
                f"{path}: {name} is at six bits there and {type(linear).__name__} here; wanted nn.Linear"
            )
        try:
            int6 = _empty(linear, spec)
        except ValueError as error:
            raise CheckpointError(f"{path}: {name}: {error}; this module is another one, or the file damaged") from None
        take_layout_1(state, f"{name}.", (linear.out_features, linear.in_features))
        made[linear] = made.get(linear, int6)
        expected.pop(f"{name}.weight", None)
        expected |= {f"{name}.{part}": tuple(getattr(int6, part).shape) for part in ("packed", "scale", "layout")}
    for name in sorted(expected.keys() | state.keys()):
        found = list(state[name].shape) if name in state else "missing"
        wanted = list(expected[name]) if name in expected else "no such tensor"
        if found != wanted:
            raise CheckpointError(f"{path}: {name} is {found}; this module takes {wanted}: build it with its config")
    devices = {name: torch.device(device or "cpu") if tensor.is_meta else tensor.device for name, tensor in own.items()}
    for name in linears:
        at = devices.get(f"{name}.weight", devices.get(f"{name}.packed"))
        devices |= {f"{name}.{part}": at for part in ("packed", "scale", "layout")}
    replace_linears(module, made)
    ties: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    # Copies: a mapped file would be whatever is written to it later.
    copies = {name: tensor.to(devices[name], copy=True) for name, tensor in state.items()}
    module.load_state_dict(copies, assign=True)
    for first, *others in ties.values():
        for other in others:
            parent, _, leaf = other.rpartition(".")
            setattr(module.get_submodule(parent), leaf, module.get_parameter(first))
    return module


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        open_regular(path).close()
        with safetensors.safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get("klora", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give a file of save_quantized") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no file of save_quantized; for a dense checkpoint, load it and quantise then")
    if about.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {about.get('version')!r:.60}; this klora reads {VERSION}: save it again"
        )
    linears, aliases = (about.get(name) for name in ("linears", "aliases"))
    if not (isinstance(linears, dict) and all(map(_is_spec, linears.values()))):
        raise CheckpointError(
            f"{path} is damaged: it does not say which linears are at six bits, and how; save it again"
        )
    if not (isinstance(aliases, dict) and all(isinstance(name, str) and name in state for name in aliases.values())):
        raise CheckpointError(f"{path} is damaged: its tied tensors are not there; save it again")
    for name in linears:
        packed, scale, layout = (state.get(f"{name}.{part}") for part in ("packed", "scale", "layout"))
        if packed is None or scale is None or layout is None:
            continue  # named with all that are missing
        if packed.dtype != torch.int32 or scale.dtype not in SCALE_DTYPES or layout.tolist() not in (1, LAYOUT):
            raise CheckpointError(
                f"{path}: {name} is {packed.dtype} with scales {scale.dtype} in layout {layout.tolist()!r:.60}; this "
                f"klora reads int32, floats and layouts 1 and {LAYOUT}: save it again"
            )
        if not torch.isfinite(scale).all():
            raise CheckpointError(f"{path}: its tensor '{name}.scale' holds a NaN or an infinity; save it again")
    return about, state | {alias: state[name] for alias, name in aliases.items()}


def _is_spec(spec: Any) -> bool:
    """Whether a value says how a linear is at six bits."""
    if not isinstance(spec, dict) or spec.keys() != {"group_size", "dtype"}:
        return False
    group, dtype = spec["group_size"], spec["dtype"]
    return (group is None or type(group) is int) and dtype in ("float32", "float16", "bfloat16", "float64")


def _empty(linear: nn.Linear | Int6Linear, spec: dict) -> Int6Linear:
    """An Int6Linear on "meta" in the place of `linear`, with its bias."""
    dtype = getattr(torch, spec["dtype"])
    int6 = Int6Linear(linear.in_features, linear.out_features, False, spec["group_size"], "meta", dtype)
    int6.bias = linear.bias
    return int6
