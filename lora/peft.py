"""PEFT's files of one adapter: adapter_config.json and adapter_model.safetensors."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..model.reading import is_finite, open_regular, parse_json, read_bytes
from .pool import MOST_ALPHA, LoraError, Place

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<part>[AB])\.weight")
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways of drawing the first A and B that leave the base weights alone."""
UNSUPPORTED = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config"),
)
"""Fields of the config that make it another function where they are set."""

Tensors = Mapping[str, tuple[Tensor, Tensor]]
"""A [r, K] and B [N, r] by the name of their linear."""


def write(
    folder: Path,
    tensors: Tensors,
    alphas: Mapping[str, float],
    places: Sequence[Place],
    attached: Sequence[Place],
    base_name: str | None,
) -> None:
    """Write an adapter that has `places` among those that are `attached`; an old file stays until the new is whole.

    LoraError where the folder cannot be written.
    """
    named = {place.name: _short(place, places, attached) for place in places}
    ranks = {place.name: len(tensors[place.name][0]) for place in places}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(place.is_conv1d for place in places),
        "target_modules": sorted(set(named.values())),
        # a full name for each: PEFT takes the first of the patterns that a name ends in
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: _plain(value) for name, value in alphas.items() if value != alpha},
    }
    parts = {
        f"base_model.model.{name}.lora_{part}.weight": tensor.cpu().contiguous()
        for name, pair in tensors.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder, parts, config)
    except (OSError, safetensors.SafetensorError) as error:
        raise LoraError(f"{folder} cannot be written: {error}") from error


def _replace(folder: Path, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    fresh = {name: folder / f"{name}.{os.getpid()}.part" for name in (WEIGHTS, CONFIG)}
    try:
        safetensors.torch.save_file(parts, fresh[WEIGHTS], {"format": "pt"})
        fresh[CONFIG].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, path in fresh.items():
            path.replace(folder / name)
    finally:
        for path in fresh.values():
            path.unlink(missing_ok=True)


def _short(place: Place, places: Sequence[Place], attached: Sequence[Place]) -> str:
    """The end of its name that all linears of its target share, if the adapter has them all; else its whole name."""
    whole = [other for other in attached if _ends_in(other.name, place.target)]
    return place.target if all(other in places for other in whole) else place.name


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def read(folder: Path, places: Sequence[Place]) -> tuple[Tensors, dict[str, float]]:
    """A and B, and alpha, of each linear that the adapter has; LoraError, naming the file, where it does not fit."""
    config, stored = _config(folder / CONFIG), _stored(folder / WEIGHTS)
    known = {place.name: place for place in places}
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        if not (match := KEY.fullmatch(key)):
            raise LoraError(f"{folder / WEIGHTS} holds {key}, which is no A or B of a linear's LoRA")
        halves.setdefault(match["name"], {})[match["part"]] = tensor
    if foreign := [name for name in halves if name not in known]:
        raise LoraError(
            f"{folder / WEIGHTS} has an adapter of {foreign[0]}, which has none here: it is of another model, or "
            f"attach with more targets than {', '.join(sorted({place.target for place in places}))}"
        )
    for name, parts in halves.items():
        _check_shapes(folder / WEIGHTS, known[name], parts)
    if missing := [place.name for place in places if place.name not in halves and _wants(config, place.name)]:
        raise LoraError(
            f"{folder / WEIGHTS} has nothing for {missing[0]}, which its target_modules name: it is of another model"
        )
    if not halves:
        raise LoraError(f"{folder / WEIGHTS} holds no tensor")
    tensors = {name: (parts["A"], parts["B"]) for name, parts in halves.items()}
    return tensors, {name: _alpha(folder / CONFIG, config, name, len(pair[0])) for name, pair in tensors.items()}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_bytes(path))
    except FileNotFoundError:
        raise LoraError(f"{path}: no such file; wanted: a folder as PEFT's save_pretrained writes it") from None
    except (OSError, ValueError) as error:
        raise LoraError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise LoraError(f"{path} is of peft_type {kind!r}; wanted: LORA")
    wrong = [name for name in UNSUPPORTED if config.get(name)]
    wrong += ["bias"] * (config.get("bias", "none") != "none")
    wrong += ["init_lora_weights"] * (config.get("init_lora_weights", True) not in PLAIN_INITS)
    if wrong:
        raise LoraError(f"{path} has {wrong[0]}={config[wrong[0]]!r:.80}; klora reads plain LoRA: A, B, rank and alpha")
    targets, patterns = config.get("target_modules") or [], config.get("alpha_pattern") or {}
    if not isinstance(targets, str | list) or not all(isinstance(target, str) for target in targets):
        raise LoraError(f"{path} has target_modules={targets!r:.80}; wanted: names, or one regular expression")
    if not isinstance(patterns, dict):
        raise LoraError(f"{path} has alpha_pattern={patterns!r:.80}; wanted: an alpha for each name")
    for pattern in (*patterns, *([targets] if isinstance(targets, str) else [])):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise LoraError(f"{path} has {pattern!r:.80}, which is no regular expression: {error}") from None
    return config


def _stored(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        also = "; adapter_model.bin is a pickle, save it as safetensors" * path.with_suffix(".bin").exists()
        raise LoraError(f"{path}: no such file{also}")
    try:
        open_regular(path).close()
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise LoraError(f"{path} cannot be read: {error}") from error


def _check_shapes(path: Path, place: Place, parts: Mapping[str, Tensor]) -> None:
    if parts.keys() != {"A", "B"}:
        raise LoraError(f"{path} has lora_{min(parts)} of {place.name} alone; wanted: A and B")
    a, b = parts["A"], parts["B"]
    found = f"{path} has A {list(a.shape)} and B {list(b.shape)} of {place.name}"
    if a.dim() != 2 or not len(a) or a.size(1) != place.inputs or list(b.shape) != [place.outputs, len(a)]:
        raise LoraError(f"{found}; this model's is [r, {place.inputs}] and [{place.outputs}, r]")
    if len(a) > place.rank:
        raise LoraError(f"{found}: rank {len(a)}; attach with rank={len(a)} or more, not {place.rank}")
    if not (a.is_floating_point() and b.is_floating_point() and a.isfinite().all() and b.isfinite().all()):
        raise LoraError(f"{found}, which are not all finite numbers")


def _wants(config: Mapping[str, Any], name: str) -> bool:
    """Whether the config asks for an adapter at this linear, for all that can be said without PEFT."""
    if any(config.get(field) is not None for field in ("layers_to_transform", "exclude_modules")):
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, name) is not None
    return any(_ends_in(name, target) for target in targets)


def _alpha(path: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha, as it is divided by the rank: PEFT's rank-stabilised LoRA divides by its root."""
    patterns = config.get("alpha_pattern") or {}
    matching = [key for key in patterns if re.match(rf"(.*\.)?({key})$", name)]
    alpha = patterns[matching[0]] if matching else config.get("lora_alpha")
    if not is_finite(alpha) or not 0 < abs(alpha) < MOST_ALPHA:
        raise LoraError(f"{path} has alpha {alpha!r:.80} for {name}; wanted: a number below {MOST_ALPHA:g}, but 0")
    return alpha * rank**0.5 if config.get("use_rslora") else float(alpha)
