"""Weights and training state on disk: safetensors with JSON metadata, written atomically, read without pickle.

A file also names the version of klora that wrote it, so that a later one can say why it does not take the file, and a
SHA-256 of everything else in it: a bit that has flipped is refused, wherever it is.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import KloraError
from ..version import __version__
from .reading import is_count, is_finite, open_regular, parse_json
from .storage import replacing

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CheckpointError(KloraError, ValueError):
    """A file of weights or of training state that cannot be used, and why."""


def unusable(path: Path, why: object, version: str | None) -> CheckpointError:
    """Why a run's file, written by `version`, cannot be used: another version wrote it, or it is damaged."""
    if version == __version__:
        return CheckpointError(f"{path} is damaged ({why}); copy it again, or start the run afresh with --overwrite")
    writer = f"klora {version}" if version else "an older klora, from before files named their version"
    return CheckpointError(
        f"{path} was written by {writer}, and this is klora {__version__}, which does not take it ({why}); go on with "
        "the version that wrote it, or start the run afresh with --overwrite"
    )


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and the JSON-serialisable `meta` to `path`, atomically. OSError: the disk does not take it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"klora": json.dumps(meta), "version": __version__}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=header | {"sha256": _checksum(tensors, header)})
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} could not be written ({error})") from None


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and values of CPU tensors, and the header without its checksum."""
    texts = {name: text for name, text in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode(errors="surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_tensors(
    path: Path, fields: Mapping[str, type] = MappingProxyType({})
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_tensors` wrote, on the CPU, with metadata that has `fields` of those types.

    Raises CheckpointError for a missing, damaged or foreign file, and for a tensor that is not finite.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: a mapped file would be whatever is written to it later, unseen by the checks below.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no iteration protocol)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    meta = _metadata(path, metadata, fields)
    checksum = metadata.get("sha256")
    if checksum is None:
        raise unusable(path, "it has no checksum", metadata.get("version"))
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{path} holds {name!r:.80} in {tensor.dtype}, which klora writes no tensor in")
    if checksum != _checksum(tensors, metadata):
        raise CheckpointError(
            f"{path} is damaged: its content does not match its SHA-256; copy it again, or start the run afresh with "
            "--overwrite"
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: its tensor {name!r:.80} holds a NaN or an infinity; copy the file again, or go on from an "
                "earlier one"
            )
    return tensors, meta


def load_meta(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """The metadata alone, without reading a tensor. Raises CheckpointError as :func:`load_tensors`."""
    return _metadata(path, _header(path), fields)


def version_of(path: Path) -> str | None:
    """The version of klora that wrote the file; None where it names none. Raises CheckpointError as `load_meta`."""
    return _header(path).get("version")


def _header(path: Path) -> dict[str, str]:
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _metadata(path: Path, header: Mapping[str, str], fields: Mapping[str, type]) -> dict[str, Any]:
    text = header.get("klora")
    if text is None:
        raise CheckpointError(f"{path} was not written by klora: it has no klora metadata")
    try:
        meta = parse_json(text, numbers=False)  # the loss before the first step is NaN
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its metadata is no JSON ({error}); copy or make it again") from None
    wrong = [name for name, kind in fields.items() if not isinstance(meta, dict) or type(meta.get(name)) is not kind]
    if wrong or not isinstance(meta, dict):
        raise unusable(path, f"its metadata has no {' and no '.join(wrong) or 'names'}", header.get("version"))
    return meta


def require_counts(path: Path, meta: Mapping[str, Any], counts: Iterable[str], seconds: Iterable[str] = ()) -> None:
    """CheckpointError unless `counts` of the metadata are integers from 0 to 2^53, and `seconds` finite from 0."""
    good = {name: is_count(meta.get(name)) for name in counts}
    good |= {name: is_finite(meta.get(name)) and 0 <= meta[name] < 1e12 for name in seconds}
    for name, holds in good.items():
        if not holds:
            raise unusable(path, f"its metadata has {name}={meta.get(name)!r:.60}", version_of(path))


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors filed under `prefix`, by their own names."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}
