"""Files changed behind their hashes, sizes and checksums, which are made right again."""

import base64
import hashlib
import json
import math
import random
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import safetensors.torch
import torch
import zstandard
from klora.model.checkpoint import _checksum
from klora.model.config import ConfigError, ModelConfig
from klora.model.gpt import is_block_matrix, parameter_count, parameter_shapes
from klora.ttt.journal import _chained

from .mutations import ODD, json_text, mutated_bytes, mutated_tokenizer, mutated_value
from .originals import FINGERPRINT


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def signed_artifact(header: dict, frame: bytes) -> bytes:
    """An artifact whose header's hash is right, whatever the header says."""

    def canonical(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    header = {key: value for key, value in header.items() if key != "header_sha256"}
    raw = canonical(header | {"header_sha256": sha256(canonical(header))})
    return struct.pack("<II", 0x184D2A50, len(raw)) + raw + frame


def artifact_parts(data: bytes) -> tuple[dict, bytes]:
    """(header, frame) of a whole artifact."""
    length = struct.unpack("<I", data[4:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def sealed(header: dict, payload: bytes) -> tuple[dict, bytes]:
    """(the header with sizes and hashes of the payload, the payload's frame)."""
    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(payload)
    header = header | {"payload_bytes": len(payload), "payload_sha256": sha256(payload)}
    return header | {"frame_bytes": len(frame), "frame_sha256": sha256(frame)}, frame


def forged_artifact(data: bytes, tokenizer: bytes, draw: random.Random) -> bytes:
    """Changed behind all hashes: header, config, payload, frame, or tokenizer."""
    header, frame = artifact_parts(data)
    kind = draw.randrange(16)
    if kind < 4:
        if draw.random() < 0.2:
            header, frame = artifact_parts(large_artifact(data, tokenizer))
        changed = mutated_value(header, draw) if draw.random() < 0.8 else header
        header = changed if isinstance(changed, dict) else header
    elif kind < 8:
        name = draw.choice(list(header["config"]))
        header["config"][name] = draw.choice((*ODD, 4, 8, 64, 300, 1024, 2**16, 2**20, 2**24))
        if draw.random() < 0.5:  # a payload that is all zeros and as large as the config says costs a file nothing
            data = zero_artifact(header, tokenizer)
            return data if data else signed_artifact(header, frame)
    elif kind < 14:
        payload = zstandard.decompress(frame)
        if kind < 10:
            payload = forged_table(payload, draw)
        elif kind < 12:
            tensors = safetensors.torch.load(payload)
            name = draw.choice(sorted(tensors))
            worth = draw.choice((math.nan, math.inf, 1e30, 0.0, -1.0, 33.0, -128.0))
            if tensors[name].numel() and (tensors[name].is_floating_point() or abs(worth) < 129):
                tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = worth
            if draw.random() < 0.2:
                tensors[name] = tensors[name].to(draw.choice((torch.float64, torch.bfloat16, torch.int32, torch.bool)))
            payload = safetensors.torch.save(tensors)
        else:
            payload = mutated_bytes(payload, draw)
        header, frame = sealed(header, payload)
    elif kind == 14:
        frame = mutated_bytes(frame, draw)
        header |= {"frame_bytes": len(frame), "frame_sha256": sha256(frame)}
    else:
        model = draw.choice((mutated_bytes, mutated_tokenizer))(tokenizer, draw)
        header["tokenizer"] = {"base64": base64.b64encode(model).decode(), "sha256": sha256(model)}
    return signed_artifact(header, frame)


@cache
def large_artifact(data: bytes, tokenizer: bytes) -> bytes:
    """A whole artifact of some kilobytes with a model that takes more than is allowed."""
    header, _ = artifact_parts(data)
    header["config"] |= {"bigram_rows": 2**23, "bigram_width": 8}
    return zero_artifact(header, tokenizer, most=256 << 20)


def zero_artifact(header: dict, tokenizer: bytes, most: int = 4 << 20) -> bytes:
    """A whole artifact of the header's config with zeros for weights; empty where no such file can be."""
    try:
        config = ModelConfig.from_dict(header["config"])
        if 2 * parameter_count(config) > most or config.blocks > 64:  # a whole model of 256 is work, not a hang
            return b""
    except (ConfigError, OverflowError, TypeError):
        return b""
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        if is_block_matrix(name):
            tensors[f"{name}.codes"] = torch.zeros(shape, dtype=torch.int8)
            tensors[f"{name}.scale"] = torch.zeros(shape[0], dtype=torch.float16)
        else:
            half = name in ("embed", "bigram.table", "bigram.project")
            tensors[name] = torch.zeros(shape, dtype=torch.float16 if half else torch.float32)
    payload = safetensors.torch.save(tensors)
    return signed_artifact(*sealed(header, payload))


def forged_table(data: bytes, draw: random.Random) -> bytes:
    """A file of tensors with its table of them changed."""
    size = struct.unpack("<Q", data[:8])[0]
    table = json_text(mutated_value(json.loads(data[8 : 8 + size]), draw), draw)
    return struct.pack("<Q", len(table)) + table + data[8 + size :]


def forged_safetensors(data: bytes, draw: random.Random, metadata: str = "klora") -> bytes:
    """A file of tensors and JSON in its `metadata` with one of both, or the table of tensors, changed."""
    size = struct.unpack("<Q", data[:8])[0]
    table, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = draw.randrange(8)
    if kind < 4:
        meta = json.loads(table["__metadata__"][metadata])
        table["__metadata__"][metadata] = json_text(mutated_value(meta, draw), draw).decode(errors="replace")
    elif kind == 4:
        table = mutated_value(table, draw)
    elif kind == 5:
        rest = bytearray(rest)
        at = 4 * draw.randrange(len(rest) // 4)
        rest[at : at + 4] = draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\x80\xff"))
    elif kind == 6:
        one, other = (draw.choice([name for name in table if name != "__metadata__"]) for _ in range(2))
        table[one], table[other] = table[other], table[one]
    else:
        return mutated_bytes(data, draw)
    raw = json_text(table, draw) if kind == 4 else json.dumps(table).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(rest)


def signed_tensors(data: bytes) -> bytes:
    """A file of tensors with klora's checksum of what it holds; as it is where it can be given none."""
    try:
        size = struct.unpack("<Q", data[:8])[0]
        table, tensors = json.loads(data[8 : 8 + size]), safetensors.torch.load(data)
        table["__metadata__"]["sha256"] = _checksum(tensors, table["__metadata__"])
        raw = json.dumps(table).encode()
    except Exception:  # whatever a damaged file makes the library raise
        return data
    return struct.pack("<Q", len(raw)) + raw + data[8 + size :]


def chained_lines(lines: Sequence[bytes]) -> bytes:
    """A journal's lines, each with the checksum that belongs behind those before it, if it is an object of JSON."""
    chain, found = "", []
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                record.pop("chain", None)
                chain = _chained(chain, json.dumps(record))
                line = json.dumps(record | {"chain": chain}).encode()
        found.append(line + b"\n")
    return b"".join(found)


def signed_array(data: bytes) -> bytes:
    """A base pass's file with the checksum of what stands behind its header."""
    array = data[10 + int.from_bytes(data[8:10], "little") : -32]
    return data[:-32] + hashlib.sha256(FINGERPRINT.encode() + array).digest()
