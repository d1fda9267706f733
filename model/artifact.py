"""The artifact: one file that holds config, tokenizer and int6 weights, and nothing that can run.

    offset  bytes
    0       4        0x184D2A50 little-endian: a zstd skippable frame, which `zstd -d` passes over
    4       4        H, u32 little-endian, at most 4 MiB
    8       H        header: canonical JSON (ASCII, sorted keys, no spaces)
    8+H     F        one zstd frame of level 22 with content size and checksum: the payload, in safetensors format

Header: format "klora", version, config, tokenizer {base64, sha256}, payload_bytes, payload_sha256, frame_bytes,
frame_sha256, provenance (free JSON), quantization {budget, relative_error, matrices: {name: {clip, relative_error}}}
and header_sha256, over the header without that field. Every byte of the file is under one of the hashes or compared.

Payload: for each block matrix `name.codes` int8 [N, K] and `name.scale` fp16 [N]; embed, bigram.table and
bigram.project fp16; the other parameters fp32. Codes are stored a byte each, because an entropy coder works on bytes.
That is version 1. Version 2, written only where fp16 is too narrow for one of those, has one field more, `float32`: the
payload's tensors that are fp32 in the place of fp16, sorted, at least one.

A file is not trusted. Before anything of the size that it asks for is allocated, the header is bounded and checked. The
config gives the exact tensors. They give what the model takes up to the weights that a forward reads, which has a limit
(`loading_bytes`), and the payload's size, which must be what the zstd frame claims.
"""

import base64
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
import zstandard
from torch import Tensor

from ..errors import KloraError
from ..kernels.int6 import Int6Weight, pack_int6_ref
from .config import ConfigError, ModelConfig
from .estimate import loading_bytes
from .gpt import is_block_matrix, parameter_shapes
from .quantize import CLIPS, LARGE_ERROR, QuantizedMatrices, advice, compress, quantize_to_fit
from .reading import limit, open_regular, raising
from .storage import write_bytes

MAGIC = 0x184D2A50
VERSIONS = (1, 2)
MAX_HEADER = 4 << 20
MAX_WINDOW = 128 << 20
"""The window of zstd level 22, and the most that plain `zstd -d` accepts."""
HALF = ("embed", "bigram.table", "bigram.project")
HALF_ERROR = 1e-6
"""Relative squared error above which one of HALF is stored in fp32; rounding to a normal fp16 makes about 4e-8."""
DTYPES = {"I8": torch.int8, "F16": torch.float16, "F32": torch.float32}
HEADER_FIELDS = (
    dict.fromkeys(("format", "payload_sha256", "frame_sha256", "header_sha256"), str)
    | dict.fromkeys(("version", "payload_bytes", "frame_bytes"), int)
    | dict.fromkeys(("config", "tokenizer", "provenance", "quantization"), dict)
)
FLOAT32 = "float32"
"""The field of version 2."""
DAMAGED = "the file was damaged or changed: copy or export it again"


class ArtifactError(KloraError, ValueError):
    """A file that is no whole artifact, or weights that cannot become one.

    Example: with contextlib.suppress(ArtifactError): artifact = load_artifact("missing.klora")
    """


@dataclass(frozen=True)
class ArtifactSummary:
    """What `save_artifact` wrote. The dictionaries are in the model's order."""

    bytes: int
    budget: int
    relative_error: float
    """sum over matrices of weights * relative squared error, divided by all their weights"""
    clips: dict[str, float]
    errors: dict[str, float]
    """relative squared error, sum (w - w_hat)^2 / sum w^2"""
    budgets: dict[int, float]
    """about how many bytes would have which relative error"""
    warning: str | None
    """what to do about a large error; None where it is small"""


@dataclass(frozen=True, eq=False)
class Artifact:
    """A loaded artifact. `tensors` has a model parameter under each name, block matrices at six bits a weight."""

    config: ModelConfig
    tokenizer_bytes: bytes
    provenance: dict[str, Any]
    header: dict[str, Any]
    tensors: dict[str, Tensor | Int6Weight]

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All parameters in `dtype`, for `GPT.load_state_dict`."""
        return {
            name: _dequantized(tensor, dtype) if isinstance(tensor, Int6Weight) else tensor.to(dtype)
            for name, tensor in self.tensors.items()
        }


def save_artifact(
    path: str | Path,
    model_state: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_bytes: bytes,
    provenance: Mapping[str, Any],
    budget: int = 16_000_000,
) -> ArtifactSummary:
    """Quantise `model_state` to a file of at most `budget` bytes with the least weight error; one rank calls this.

    `model_state` is a GPT's state_dict, of any dtype and device; it is not changed. `tokenizer_bytes` are
    `Tokenizer.to_bytes()`; `provenance` is JSON that the file carries along. Everything counts: header, tokenizer,
    embedding. The file appears whole or not at all.

    ArtifactError: a state that does not fit `config`, weights beyond fp16 or not finite, a provenance that is not JSON,
    a budget out of reach. OSError: the disk.

    Example: summary = save_artifact("tiny.klora", model.state_dict(), model.config, tokenizer.to_bytes(), {})
    """
    path = Path(path)
    _require(not path.is_dir(), f"{path} is a folder; give the path of a file to write")
    state = _checked_state(model_state, config)
    matrices = {name: tensor for name, tensor in state.items() if is_block_matrix(name)}
    kept = {
        name: _narrowed(tensor) if name in HALF else tensor for name, tensor in state.items() if name not in matrices
    }
    header = {
        "format": "klora",
        "config": config.to_dict(),
        "tokenizer": {"base64": base64.b64encode(tokenizer_bytes).decode(), "sha256": _sha256(tokenizer_bytes)},
        "provenance": dict(provenance),
    }
    try:
        quantized, parts = quantize_to_fit(matrices, budget, partial(_encode, header, kept, budget))
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    write_bytes(path, *parts)
    size, error = sum(map(len, parts)), quantized.relative_error
    warning = None
    if error > LARGE_ERROR:
        warning = (
            f"the weights have a relative squared error of {error:.2g}; above {LARGE_ERROR} a model is visibly worse: "
            f"give a budget of {advice(quantized.budgets)}"
        )
    return ArtifactSummary(size, budget, error, quantized.clips, quantized.errors, dict(quantized.budgets), warning)


def load_artifact(path: str | Path, max_bytes: int | None = None) -> Artifact:
    """Read and check the artifact at `path`, on the CPU: its config, tokenizer, provenance and tensors.

    `max_bytes` bounds what the model takes from here to the weights that a forward reads, its dequantised matrices,
    projected bigram table and rotary tables counted. None: 2 GiB, or KLORA_MAX_MODEL_BYTES of the environment.
    ArtifactError: anything but a whole artifact, or a model that takes more.

    Example: artifact = load_artifact("tiny.klora")
    """
    path = Path(path)
    try:
        _require(not path.is_dir(), "it is a folder; give the path of an exported artifact")
        _require(path.is_file(), "there is no such file; give the path of an exported artifact")
        with open_regular(path) as file:
            return _read(file, limit("MAX_MODEL_BYTES") if max_bytes is None else max_bytes)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error.__cause__
    except OSError as error:
        raise ArtifactError(f"{path}: it cannot be read ({error.strerror}); check its permissions") from error


def is_artifact(path: Path) -> bool:
    """Whether the file starts as an artifact does; nothing more is checked."""
    with open_regular(path) as file:
        return file.read(4) == struct.pack("<I", MAGIC)


def _read(file: BinaryIO, max_bytes: int) -> Artifact:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    magic, length = struct.unpack("<II", start) if len(start) == 8 else (None, 0)
    _require(magic == MAGIC, f"it starts with {start[:4]!r}, which no artifact does; give a file that klora exported")
    _require(length <= MAX_HEADER, f"its header claims {length:,} bytes, at most {MAX_HEADER:,} are allowed; {DAMAGED}")
    _require(8 + length <= size, f"its header claims {length:,} bytes and the file has {size:,}; {DAMAGED}")
    header = _decode_header(file.read(length))
    config = _config(header["config"])
    tokenizer_bytes = _tokenizer(header["tokenizer"])
    layout = _payload_layout(config, max_bytes, _wide(header, config))
    frame_bytes, payload_bytes = header["frame_bytes"], header["payload_bytes"]
    exact = _layout_bytes(layout)
    most = exact + 1024 + 256 * len(layout)
    _require(
        exact < payload_bytes <= most,
        f"its payload claims {payload_bytes:,} bytes, the config's tensors take {exact:,} to {most:,}; {DAMAGED}",
    )
    most = payload_bytes + payload_bytes // 64 + 1024
    _require(frame_bytes <= most, f"its frame claims {frame_bytes:,} bytes, the payload needs no more than {most:,}")
    whole = 8 + length + frame_bytes
    _require(size == whole, f"it has {size:,} bytes and its header speaks of {whole:,}; {DAMAGED}")
    frame = file.read(frame_bytes)
    _require(_sha256(frame) == header["frame_sha256"], f"its compressed frame does not match its sha256; {DAMAGED}")
    payload = _decompress(frame, payload_bytes)
    _require(_sha256(payload) == header["payload_sha256"], f"its payload does not match its sha256; {DAMAGED}")
    return Artifact(config, tokenizer_bytes, header["provenance"], header, _tensors(payload, layout, config))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ArtifactError(message)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _encode_header(header: dict[str, Any]) -> bytes:
    """Canonical JSON with header_sha256. Refuses what would not read back as the same bytes (NaN, integer keys)."""
    try:
        raw = _canonical(header | {"header_sha256": _sha256(_canonical(header))})
        same = _canonical(json.loads(raw)) == raw
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"the header is not JSON ({error}); make provenance of text, numbers, lists, dicts"
        ) from error
    _require(same, "provenance has keys that JSON cannot hold; use text as keys")
    _require(len(raw) <= MAX_HEADER, f"the header takes {len(raw):,} bytes of {MAX_HEADER:,}; shorten the provenance")
    return raw


def _decode_header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
        whole = isinstance(header, dict) and _canonical(header) == raw
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"its header is not the JSON that klora writes; {DAMAGED}") from error
    _require(whole, f"its header is not the JSON that klora writes; {DAMAGED}")
    kind, version = header.get("format"), header.get("version")
    _require(kind == "klora", f"its format is {kind!r:.60}; give a file that klora exported")
    _require(version in VERSIONS, f"it is version {version!r:.60}, this klora reads versions 1 and 2; export it again")
    unsigned = {key: value for key, value in header.items() if key != "header_sha256"}
    signed = header.get("header_sha256") == _sha256(_canonical(unsigned))
    _require(signed, f"its header does not match its sha256; {DAMAGED}")
    types = {key: type(value) for key, value in header.items()}
    wanted = HEADER_FIELDS | ({FLOAT32: list} if version == 2 else {})
    odd = sorted(key for key in types.keys() | wanted.keys() if types.get(key) != wanted.get(key))
    _require(not odd, f"its header's fields are wrong at {', '.join(odd):.200}; export it again with this klora")
    return header


def _config(values: dict[str, Any]) -> ModelConfig:
    wanted = {key: type(value) for key, value in ModelConfig().to_dict().items()}
    same = {key: type(value) for key, value in values.items()} == wanted
    _require(same, f"its config has other fields than this klora's ({', '.join(wanted)}); export it again")
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise ArtifactError(f"its config is impossible: {error}; {DAMAGED}") from error


def _tokenizer(field: dict[str, Any]) -> bytes:
    try:
        data = base64.b64decode(field["base64"], validate=True)
        same = _sha256(data) == field["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"its tokenizer is not base64 with a sha256; {DAMAGED}") from error
    _require(same, f"its tokenizer does not match its sha256; {DAMAGED}")
    return data


def _wide(header: dict[str, Any], config: ModelConfig) -> list[str]:
    """The payload's tensors that are fp32 in the place of fp16."""
    wide = header.get(FLOAT32, [])
    narrow = {*HALF, *(f"{name}.scale" for name in parameter_shapes(config) if is_block_matrix(name))}
    good = all(type(name) is str and name in narrow for name in wide) and wide == sorted(set(wide))
    _require(good and bool(wide) == (FLOAT32 in header), f"its field {FLOAT32!r} names no tensors of fp16; {DAMAGED}")
    return wide


def _payload_layout(config: ModelConfig, max_bytes: int, wide: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of the payload's tensors, from shapes alone."""
    layout = {}
    for name, shape in parameter_shapes(config).items():
        if is_block_matrix(name):
            layout[f"{name}.codes"] = "I8", tuple(shape)
            layout[f"{name}.scale"] = "F32" if f"{name}.scale" in wide else "F16", (shape[0],)
        else:
            layout[name] = "F16" if name in HALF and name not in wide else "F32", tuple(shape)
    asked = loading_bytes(config, _layout_bytes(layout))
    _require(
        asked <= max_bytes,
        f"its config asks for {asked:,} bytes and {max_bytes:,} are allowed; {raising('MAX_MODEL_BYTES', asked)} or "
        "give load_artifact that max_bytes",
    )
    return layout


def _layout_bytes(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in layout.values())


def _decompress(frame: bytes, payload_bytes: int) -> bytes:
    """The content of one zstd frame that is exactly `payload_bytes` long and fills `frame`."""
    try:
        claims = zstandard.get_frame_parameters(frame)
        _require(
            claims.content_size == payload_bytes and claims.window_size <= MAX_WINDOW,
            f"its frame claims {claims.content_size:,} bytes (window {claims.window_size:,}), its header "
            f"{payload_bytes:,} (window at most {MAX_WINDOW:,}); {DAMAGED}",
        )
        payload = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"its frame is not zstd ({error}); {DAMAGED}") from error
    _require(len(payload) == payload_bytes, f"its frame holds {len(payload):,} bytes of {payload_bytes:,}; {DAMAGED}")
    return payload


def _tensors(
    payload: bytes, layout: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig
) -> dict[str, Tensor | Int6Weight]:
    """The payload's tensors, checked against `layout`, under the names of the model's parameters and in their order."""
    try:
        entries = dict(safetensors.deserialize(payload))
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"its payload is not safetensors ({error}); {DAMAGED}") from error
    found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    for name in sorted(found.keys() | layout.keys()):
        seen, wanted = found.get(name, "missing"), layout.get(name, "no such tensor")
        _require(seen == wanted, f"its tensor {name!r} is {seen}, the config wants {wanted}; export it again")
    flat = {}
    for name, (dtype, shape) in layout.items():
        flat[name] = torch.empty(shape, dtype=DTYPES[dtype])
        if flat[name].numel():  # frombuffer takes no empty buffer
            flat[name] = torch.frombuffer(entries[name]["data"], dtype=DTYPES[dtype]).reshape(shape)
        finite = bool(torch.isfinite(flat[name]).all())
        _require(finite, f"its tensor {name!r} holds a NaN or an infinity; export a healthy checkpoint")
    tensors: dict[str, Tensor | Int6Weight] = {}
    for name in parameter_shapes(config):
        if is_block_matrix(name):
            codes, scale = flat[f"{name}.codes"], flat[f"{name}.scale"]
            _require(bool((scale >= 0).all()), f"its tensor '{name}.scale' holds a negative scale; {DAMAGED}")
            try:
                packed = torch.cat([pack_int6_ref(rows) for rows in codes.split(_rows_at_a_time(codes.size(1)))])
                tensors[name] = Int6Weight(packed, scale, tuple(codes.shape))
            except ValueError as error:
                raise ArtifactError(f"its tensor '{name}.codes' is wrong: {error}; {DAMAGED}") from error
        else:
            tensors[name] = flat[name]
    return tensors


def _rows_at_a_time(columns: int) -> int:
    """Packing a code takes some 40 bytes for a moment: of at most about a million of them."""
    return max(1, 2**20 // columns)


def _dequantized(weight: Int6Weight, dtype: torch.dtype) -> Tensor:
    """`weight.dequantize(dtype)`, some rows at a time."""
    rows, columns = weight.shape
    dense = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, size := _rows_at_a_time(columns)):
        some = slice(start, start + size)
        part = Int6Weight(weight.packed[some], weight.scale[some], (min(size, rows - start), columns))
        dense[some] = part.dequantize(dtype)
    return dense


def _checked_state(model_state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A copy of the state in fp32 on the CPU, in the model's order, if it is the state of `config`."""
    shapes = parameter_shapes(config)
    for name in sorted(shapes.keys() | model_state.keys()):
        seen = list(model_state[name].shape) if name in model_state else "missing"
        wanted = list(shapes[name]) if name in shapes else "no such parameter"
        _require(seen == wanted, f"the state's {name!r} is {seen}, the config wants {wanted}; give them of one model")
    state = {name: model_state[name].detach().to("cpu", torch.float32, copy=True).contiguous() for name in shapes}
    for name, tensor in state.items():
        half = torch.finfo(torch.float16).max
        most = half / CLIPS[-1] if is_block_matrix(name) else half if name in HALF else torch.finfo(torch.float32).max
        _require(
            bool((tensor.abs() <= most).all()),
            f"{name} holds a value that is not finite or beyond {most:g}: it diverged, export an earlier checkpoint",
        )
    return state


def _narrowed(tensor: Tensor) -> Tensor:
    """fp16, or fp32 as it was where fp16 is too narrow for its values."""
    half = tensor.half()
    off, energy = ((part.double().square().sum()) for part in (half.float() - tensor, tensor))
    return tensor if off > HALF_ERROR * energy else half


def _encode(
    header: dict[str, Any], kept: dict[str, Tensor], budget: int, quantized: QuantizedMatrices, search: bool
) -> tuple[bytes, bytes, bytes]:
    """The file in three parts: magic and length, header, frame."""
    codes = {f"{name}.codes": tensor for name, tensor in quantized.codes.items()}
    scales = {f"{name}.scale": tensor for name, tensor in quantized.scales.items()}
    tensors = kept | codes | scales
    wide = sorted(name for name in {*HALF, *scales} if tensors[name].dtype == torch.float32)
    payload = safetensors.torch.save(tensors)
    frame = compress(payload, search)
    matrices = {
        name: {"clip": clip, "relative_error": quantized.errors[name]} for name, clip in quantized.clips.items()
    }
    raw = _encode_header(
        header
        | ({"version": 2, FLOAT32: wide} if wide else {"version": 1})
        | {
            "payload_bytes": len(payload),
            "payload_sha256": _sha256(payload),
            "frame_bytes": len(frame),
            "frame_sha256": _sha256(frame),
            "quantization": {"budget": budget, "relative_error": quantized.relative_error, "matrices": matrices},
        }
    )
    return struct.pack("<II", MAGIC, len(raw)), raw, frame
