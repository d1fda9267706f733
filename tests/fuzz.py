"""Mutated files of every format that klora reads, each opened as a command opens it: `make fuzz`.

    python tests/fuzz.py --count 1000000

A case is a number: with the seed it says which file of which target is changed, and how. Half of the changes go behind
hashes, sizes and JSON syntax, which are made right again, since blind ones stop there. A file may be refused by an
error for users (KloraError, OSError) or be read. What is none of both is a finding: another exception, a crash, over
SECONDS of CPU time, or more memory than the target declares. Findings are kept with their files; the exit status is 1.

Cases run in processes that live on, thousands a minute. Limits are lowered (see LIMITS), so that small files reach
them. A process that crashes or hangs is started again behind its case.
"""

import argparse
import base64
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import zstandard

ROOT = Path(__file__).parents[1]
SECONDS = 2.0
STUCK = 30.0
"""Seconds on the clock after which a process that has not ended its case is stopped."""
LIMITS = {"MAX_MODEL_BYTES": 96 << 20, "MAX_DOCUMENT_BYTES": 1 << 20, "MAX_RECORD_BYTES": 4 << 20}
SPARE = 32 << 20
"""Bytes beside what a target declares: caches of allocators, code that is loaded at first use."""
ADDRESSES = 6 << 30
"""Bytes of address space beyond the start: what asks for more gets a MemoryError, which is a finding."""

NUMBERS = (
    0,
    1,
    -1,
    2,
    31,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**64,
    10**30,
    10**400,
)
ODD: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\0", "\ud800", "\x1b[2J", "=cmd", "../..", "9" * 300, [], {}, [[]], {"": None}),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *NUMBERS,
)
EDGES = [n.to_bytes(size, "little") for n in (0, 1, 127, 128, 255) for size in (1, 2, 4)]
EDGES += [b"\xff" * size for size in (1, 2, 4, 8)] + [b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\x10\0\0\0\0"]


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some flips, cuts, insertions, repetitions and exchanges."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.7 else draw.randrange(min(len(data), 64) + 1)
        length = min(draw.choice((1, 2, 4, 8, 64, 1024)), len(data) - at)
        kind = draw.randrange(8)
        if kind == 0 and length:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and length:
            data[at] = draw.randrange(256)
        elif kind == 2:
            edge = draw.choice(EDGES)
            data[at : at + len(edge)] = edge
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 4, 8, 100)))
        elif kind == 6:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 50))
        else:
            data[at:at] = draw.choice(
                (b"\n", b"\r", b"\0", b'"', b"{", b"[" * 3000, b",", b"\xff", b"\xef\xbb\xbf", b"NaN")
            )
    return bytes(data)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inside for found in places(item, (*path, key)))]


def mutated_value(value: Any, draw: random.Random) -> Any:
    """A copy with one or more values of other types, sizes or depths, and fields more or less."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = json.loads(json.dumps(value))
        *outer, last = draw.choice(places(value)[1:] or [(None,)])
        if last is None:
            return draw.choice(ODD)
        holder = value
        for key in outer:
            holder = holder[key]
        kind = draw.randrange(10)
        if kind < 5:
            holder[last] = draw.choice(ODD)
        elif kind == 5 and type(holder[last]) in (int, float) and abs(holder[last]) < 1e300:
            old = holder[last]
            holder[last] = draw.choice((-old, old + 1, old * 2, float(old), str(old)))
        elif kind == 6:
            del holder[last]
        elif kind == 7 and isinstance(holder, dict):
            holder[draw.choice(("", "extra", "\ud800", "name", "loss"))] = draw.choice(ODD)
        elif kind == 8:
            deep: Any = []
            for _ in range(draw.choice((20, 60, 110, 150))):
                deep = [deep] if draw.random() < 0.5 else {"a": deep}
            holder[last] = deep
        else:
            holder[last] = draw.choice((["x"] * 1000, {str(i): i for i in range(500)}, "y" * 5000))
    return value


def json_text(value: Any, draw: random.Random) -> bytes:
    """JSON, or what Python's writer makes of NaN; at times with a name twice, too deep, or damaged."""
    text = json.dumps(value)
    kind = draw.randrange(12)
    if kind == 0 and "{" in text:
        at = draw.choice([i for i, c in enumerate(text) if c == "{"])
        text = f'{text[: at + 1]}"a":1,"a":2{"" if text[at + 1 : at + 2] == "}" else ","}{text[at + 1 :]}'
    elif kind == 1:
        text = text.replace(
            ":", ":" + draw.choice(("[" * 100_000, "1e999", "-" * 10, "9" * 5000, "NaN", '{"a":' * 50_000)), 1
        )
    elif kind == 2:
        return mutated_bytes(text.encode(), draw)
    return text.encode()


@dataclass
class Files:
    """One whole file of every format, as bytes, and what is needed to open changed ones without making it again."""

    data: dict[str, bytes] = field(default_factory=dict)
    tokenizer: Any = None
    trainer: Any = None
    prepared: Any = None
    documents: list = field(default_factory=list)


def made_files(folder: Path) -> Files:
    """A small run, its artifact, a scoring's journal and results, and texts, all made by klora itself."""
    from klora.kernels.int6 import Int6Linear  # noqa: F401 (imported before processes are forked)
    from klora.model.artifact import save_artifact
    from klora.model.config import ModelConfig, Preset, TrainConfig
    from klora.model.int6_file import save_quantized
    from klora.model.int6_model import quantize_linears
    from klora.model.loading import load_run
    from klora.model.parallel import Ranks
    from klora.model.prepare import Prepared
    from klora.model.shards import ShardWriter
    from klora.model.tokenizer import Tokenizer
    from klora.model.train import Trainer
    from klora.ttt.documents import Document, digest_of
    from klora.ttt.journal import Journal
    from klora.ttt.protocols import ttt_preset
    from klora.ttt.results import ADAPTED, SHORT, DocumentResult, ScoreResult
    from klora.ttt.verify import write_nll

    made, draw = Files(), random.Random(0)
    stems = ["alpha", "beta", "gamma", "delta", "epsilon", "=", ":", "\n", "def", "return", "import", "self", "é", "😀"]
    texts = [" ".join(draw.choices(stems, k=60)) for _ in range(30)]
    made.tokenizer = Tokenizer.train(texts, 300)
    sizes = {"width": 16, "blocks": 2, "heads": 2, "kv_heads": 1, "mlp_hidden": 16, "train_length": 16}
    config = ModelConfig(vocab_size=300, bigram_rows=16, bigram_width=4, **sizes)
    steps = TrainConfig(seconds=600.0, max_steps=4, batch_tokens=32, micro_batch_tokens=32, validate_tokens=64)
    paths = {}
    for split in ("train", "val"):
        with ShardWriter(folder, split) as writer:
            for text in texts[:6]:
                writer.add(made.tokenizer.encode(text))
        paths[split] = writer.paths
    (folder / "tokenizer.model").write_bytes(made.tokenizer.to_bytes())
    made.prepared = Prepared(made.tokenizer, paths["train"], paths["val"], folder)
    run = folder / "run"
    preset = Preset("small", config, steps.override({"ema_every": 1, "swa_every": 1, "swa_below": 1.0}), "for fuzzing")
    made.trainer = Trainer(preset, made.prepared, run, Ranks(0, 1, torch.device("cpu")), say=lambda text: None)
    made.trainer.run()
    for name in ("run.json", "loss.csv", "checkpoint.safetensors", "model.safetensors"):
        made.data[name] = (run / name).read_bytes()
    tensors, meta = load_run(run)
    save_artifact(folder / "model.klora", tensors, config, made.tokenizer.to_bytes(), meta["provenance"])
    made.data["model.klora"] = (folder / "model.klora").read_bytes()
    made.data["tokenizer.model"] = made.tokenizer.to_bytes()
    made.data["shard"] = paths["val"][0].read_bytes()
    module = linears()
    quantize_linears(module)
    save_quantized(module, folder / "linears.safetensors")
    made.data["linears"] = (folder / "linears.safetensors").read_bytes()
    made.documents = [
        Document(f"{i}.txt", made.tokenizer.encode(text), len(text.encode())) for i, text in enumerate(texts)
    ]
    results = {
        index: DocumentResult(
            d.name, d.targets, d.bytes, SHORT if index % 2 else ADAPTED, 9.0, 9.0, 8.0, 9.5, 0, d.targets
        )
        for index, d in enumerate(made.documents[:6])
    }
    journal = Journal(folder / "journal.jsonl", FINGERPRINT, resume=False)
    journal.add(results)
    journal.base("base", CELLS)[:] = 1.0
    journal.keep_base("base")
    journal.add_seconds({"base": 1.5, "adapt": 2.5})
    journal.close()
    made.data["journal"] = (folder / "journal.jsonl").read_bytes()
    made.data["base"] = (folder / "journal.base.npy").read_bytes()
    scored = made.documents[:6]
    source = {"documents": 6, "tokens": sum(d.targets for d in scored), "most_tokens": 0, "sha256": digest_of(scored)}
    facts = {"source": source, "artifact": {"header_sha256": "a", "payload_sha256": "b"}, "weights": "dense"}
    nll = [np.full(document.targets, 8.0 / document.targets, np.float32) for document in scored]
    hashes = [document.sha256 for document in scored]
    of_run = ScoreResult(list(results.values()), ttt_preset(), {"base": 1.0}, facts, None, hashes, nll)
    write_nll(folder / "nll.safetensors", of_run)
    of_run.write(folder)
    adapted = adapted_linears()
    adapted.adapters.create("one")
    adapted.adapters.save("one", folder)
    for name in ("documents.csv", "score.json", "nll.safetensors", "adapter_config.json", "adapter_model.safetensors"):
        made.data[name] = (folder / name).read_bytes()
    made.data["jsonl"] = b"".join(
        json.dumps({"name": str(i), "text": text}).encode() + b"\n" for i, text in enumerate(texts[:8])
    )
    made.data["text"] = texts[0].encode()
    made.data["record"] = json.dumps(benchmark_record()).encode()
    return made


FINGERPRINT, CELLS = "a run", 50


def linears() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))


def adapted_linears():
    """A model with adapters whose files are PEFT's."""
    from klora.lora import attach

    names = {name: torch.nn.Linear(16, 16) for name in ("q_proj", "v_proj")}
    return attach(torch.nn.ModuleDict(names), slots=1, targets=list(names), rank=4)


def benchmark_record() -> dict[str, Any]:
    ms = {"p20": 1.0, "p50": 1.1, "p80": 1.2, "rounds": 20, "steady": True}
    result = {
        "op": "lora",
        "shape": "seed",
        "sizes": {"N": 8},
        "dtype": "bfloat16",
        "variant": "eager",
        "timing": "events",
    }
    result |= {"cache": "cold", "ms": ms, "peak_bytes": 100, "bytes": 10, "flops": 10, "floor_ms": 0.5}
    result |= {"percent_of_floor": 50.0, "errors": [1e-3], "allowed": [1e-2]}
    return {
        "schema": 1,
        "group": "kernels",
        "environment": {"gpu": "A", "driver": "1", "versions": {"torch": "2"}, "commit": "abc", "date": "2026-01-01"},
        "ceilings": {"bytes_per_second": 1e12, "flops_per_second": 1e14},
        "missing": [{"op": "lora", "variant": "other", "why": "absent"}],
        "bounds": [],
        "results": [result, result | {"variant": "triton"}],
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def signed_artifact(header: dict, frame: bytes) -> bytes:
    """An artifact whose header's hash is right, whatever the header says."""

    def canonical(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    header = {key: value for key, value in header.items() if key != "header_sha256"}
    raw = canonical(header | {"header_sha256": _sha256(canonical(header))})
    return struct.pack("<II", 0x184D2A50, len(raw)) + raw + frame


def forged_artifact(data: bytes, tokenizer: bytes, draw: random.Random) -> bytes:
    """Changed behind all hashes: header, config, payload, frame, or tokenizer."""
    length = struct.unpack("<I", data[4:8])[0]
    header, frame = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw.randrange(16)
    if kind < 4:
        changed = mutated_value(header, draw)
        header = changed if isinstance(changed, dict) else header
    elif kind < 8:
        name = draw.choice(list(header["config"]))
        header["config"][name] = draw.choice((*ODD, 4, 8, 64, 300, 1024, 2**16, 2**20, 2**24))
        if draw.random() < 0.5:  # a payload that is all zeros and as large as the config says costs a file nothing
            data = zero_artifact(header, tokenizer)
            return data if data else signed_artifact(header, frame)
    elif kind < 14:
        payload = zstandard.decompress(frame)
        size = struct.unpack("<Q", payload[:8])[0]
        if kind < 10:
            table = json_text(mutated_value(json.loads(payload[8 : 8 + size]), draw), draw)
            payload = struct.pack("<Q", len(table)) + table + payload[8 + size :]
        elif kind < 12:
            tensors = safetensors.torch.load(payload)
            name = draw.choice(list(tensors))
            worth = draw.choice((math.nan, math.inf, 1e30, 0.0, -1.0, 33.0, -128.0))
            if tensors[name].numel() and (tensors[name].is_floating_point() or abs(worth) < 129):
                tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = worth
            if draw.random() < 0.2:
                tensors[name] = tensors[name].to(draw.choice((torch.float64, torch.bfloat16, torch.int32, torch.bool)))
            payload = safetensors.torch.save(tensors)
        else:
            payload = mutated_bytes(payload, draw)
        frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(payload)
        header |= {"payload_bytes": len(payload), "payload_sha256": _sha256(payload)}
        header |= {"frame_bytes": len(frame), "frame_sha256": _sha256(frame)}
    elif kind == 14:
        frame = mutated_bytes(frame, draw)
        header |= {"frame_bytes": len(frame), "frame_sha256": _sha256(frame)}
    else:
        model = mutated_bytes(tokenizer, draw)
        header["tokenizer"] = {"base64": base64.b64encode(model).decode(), "sha256": _sha256(model)}
    return signed_artifact(header, frame)


def zero_artifact(header: dict, tokenizer: bytes, most: int = 4 << 20) -> bytes:
    """A whole artifact of the header's config with zeros for weights; empty where no such file can be."""
    from klora.model.config import ConfigError, ModelConfig
    from klora.model.gpt import is_block_matrix, parameter_count, parameter_shapes

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
    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(payload)
    header = header | {"payload_bytes": len(payload), "payload_sha256": _sha256(payload)}
    header |= {"frame_bytes": len(frame), "frame_sha256": _sha256(frame)}
    return signed_artifact(header, frame)


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
    from klora.model.checkpoint import _checksum

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
    from klora.ttt.journal import _chained

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


# Each writes a changed file into `folder`, yields, and opens it: the time and memory of the second half count.
Case = Callable[[Files, Path, random.Random], Iterator[None]]


def artifact(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.model.artifact import load_artifact
    from klora.model.loading import model_from_artifact, tokenizer_of
    from klora.model.weights import frozen_weights

    whole, tokenizer = files.data["model.klora"], files.data["tokenizer.model"]
    data = forged_artifact(whole, tokenizer, draw) if draw.random() < 0.6 else mutated_bytes(whole, draw)
    path = folder / "model.klora"
    path.write_bytes(data)
    yield
    found = load_artifact(path)
    if found.tokenizer_bytes != tokenizer:
        tokenizer_of(found)
    model = model_from_artifact(found, "cpu", draw.choice(("dense", "int6")))
    frozen_weights(model)
    if found.config.train_length <= 2**16:
        model(torch.ones(1, 4, dtype=torch.int64))


def tokenizer_model(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.model.tokenizer import Tokenizer

    path = folder / "tokenizer.model"
    path.write_bytes(mutated_bytes(files.data["tokenizer.model"], draw))
    yield
    Tokenizer.from_file(path, may_normalise=draw.random() < 0.5).encode("a text \n é")


def shards(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.model.shards import RowSampler, TokenStream, find_shards
    from klora.ttt.documents import documents_from_tokens

    for path in folder.glob("*.bin"):
        path.unlink()
    for number in range(draw.choice((1, 2))):
        data = bytearray(mutated_bytes(files.data["shard"], draw))
        if draw.random() < 0.6 and len(data) >= 1024:  # with a header that fits
            data = data[: len(data) // 2 * 2]
            data[:12] = struct.pack("<iii", 20240520, 1, (len(data) - 1024) // 2)
        (folder / f"{draw.choice(('a', 'b'))}_val_{number}.bin").write_bytes(data)
    yield
    stream = TokenStream(find_shards(folder, "val"))
    RowSampler(stream, 16, 0).take_rows(4, 0, 1)
    list(documents_from_tokens(stream.documents(), files.tokenizer))


def texts(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.model.corpus import Corpus
    from klora.ttt.documents import documents_from_texts, with_own_names

    kind = draw.choice((".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"))
    data = files.data["text" if kind == ".txt" else "jsonl"]
    if kind != ".txt" and draw.random() < 0.5:
        lines = data.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json_text(mutated_value(json.loads(lines[at]), draw), draw)
        data = b"\n".join(lines)
    elif draw.random() < 0.5:
        data = mutated_bytes(data, draw)
    if draw.random() < 0.02:  # what a small file can unpack to
        data = draw.choice(
            (b'{"text": "' + b"a" * (3 << 20), b"\n" * (1 << 20), b'{"text": "' + b"\xc3\xa9" * 300_000 + b'"}')
        )
    if kind == ".jsonl.gz":
        data = gzip.compress(data, 1)
    elif kind == ".jsonl.zst":
        data = zstandard.ZstdCompressor(level=1, write_checksum=draw.random() < 0.5).compress(data)
    if draw.random() < 0.3:
        data = mutated_bytes(data, draw)
    path = folder / f"texts{kind}"
    path.write_bytes(data)
    yield
    corpus = Corpus.text([path]) if kind == ".txt" else Corpus.jsonl([path])
    with_own_names(list(documents_from_texts(corpus.documents(), files.tokenizer, 1)), lambda text: None)


def journal(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.ttt.journal import has_journals, open_journal
    from klora.ttt.protocols import ttt_preset
    from klora.ttt.results import ScoreResult

    for path in folder.glob("journal*"):
        path.unlink()
    data = files.data["journal"]
    if draw.random() < 0.7:
        lines = data.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json_text(mutated_value(json.loads(lines[at]), draw), draw).replace(b"\n", b" ")
        data = chained_lines(lines) if draw.random() < 0.8 else b"\n".join(lines) + b"\n"
    else:
        data = mutated_bytes(data, draw)
    (folder / draw.choice(("journal.jsonl", "journal.jsonl", "journal-1.jsonl"))).write_bytes(data)
    if draw.random() < 0.5:
        base = mutated_bytes(files.data["base"], draw)
        (folder / "journal.base.npy").write_bytes(signed_array(base) if draw.random() < 0.7 else base)
    yield
    has_journals(folder)
    kept = open_journal(folder, FINGERPRINT, resume=draw.random() < 0.8)
    try:
        kept.base("base", CELLS)
        done = [kept.done[index] for index in range(6) if index in kept.done]
        if draw.random() < 0.1:
            ScoreResult(done, ttt_preset(), dict(kept.seconds)).write(folder)
    finally:
        kept.close()


def run_json(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    import klora.cli.train as command
    from klora.bench.curves import _is_eager
    from klora.cli.demo import is_demo
    from klora.model.estimate import least_memory
    from klora.model.placement import rows_per_rank
    from klora.model.run_folder import began_with

    run = json.loads(files.data["run.json"])
    path = folder / "run.json"
    path.write_bytes(
        json_text(mutated_value(run, draw), draw)
        if draw.random() < 0.8
        else mutated_bytes(files.data["run.json"], draw)
    )
    yield
    began_with(path), is_demo(folder), _is_eager(folder)
    real = command.prepared_from_shards
    command.prepared_from_shards = lambda data: files.prepared if str(data) == run["data"] else real(data)
    try:
        preset, _, _ = command._stored_run(folder, {})
    finally:
        command.prepared_from_shards = real
    rows_per_rank(preset, 1), least_memory(preset.model)


def loss_csv(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.bench.curves import CurveError, read_losses
    from klora.model.curve import LossCurve

    (folder / "loss.csv").write_bytes(mutated_bytes(files.data["loss.csv"], draw))
    yield
    with suppress(CurveError):
        read_losses(folder)
    curve = LossCurve(folder, resume_at=draw.choice((1, 3, 10**6)), say=lambda text: None)
    curve.rows()
    if draw.random() > 0.002:
        curve.draw = lambda: None
    curve.add(step=5, loss=1.0)
    curve.close()


def checkpoint(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    trainer = files.trainer
    data = forged_safetensors(files.data["checkpoint.safetensors"], draw)
    (folder / "checkpoint.safetensors").write_bytes(signed_tensors(data) if draw.random() < 0.8 else data)
    yield
    trainer.state.folder = folder
    trainer._load_checkpoint()
    if draw.random() < 0.1:  # what was taken in can be trained on
        trainer.stepper.run([trainer.sampler.take_rows(2, 0, 1)], trainer.step, 1.0)
        trainer.stepper.flush()


def trained_model(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.cli.train import _facts
    from klora.model.loading import model_from_run

    path = folder / "model.safetensors"
    data = forged_safetensors(files.data["model.safetensors"], draw)
    path.write_bytes(signed_tensors(data) if draw.random() < 0.8 else data)
    yield
    _facts(path)
    model_from_run(folder, "cpu")(torch.ones(1, 4, dtype=torch.int64))


def benchmark(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.bench.readings import load_records
    from klora.bench.record import RecordError, slower_than
    from klora.bench.report import markdown_tables
    from klora.cli.bench import read_record, require_replaceable

    path = folder / "gpu" / "kernels.json"
    path.parent.mkdir(exist_ok=True)
    record = json.loads(files.data["record"])
    path.write_bytes(
        json_text(mutated_value(record, draw), draw)
        if draw.random() < 0.9
        else mutated_bytes(files.data["record"], draw)
    )
    yield
    with suppress(RecordError):
        require_replaceable(path, toy=draw.random() < 0.5)
    slower_than(record, read_record(path))
    markdown_tables(load_records(folder))


def documents_csv(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.ttt.results import read_documents_csv

    path = folder / "documents.csv"
    path.write_bytes(mutated_bytes(files.data["documents.csv"], draw))
    yield
    with suppress(ValueError):  # which it promises
        read_documents_csv(path)


def stored_score(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    """What `klora verify` reads, and all that it says before it computes."""
    from klora.ttt.audit import AuditReport
    from klora.ttt.verify import Stored, read_nll, stated, which_nll

    score, nll = files.data["score.json"], files.data["nll.safetensors"]
    if draw.random() < 0.3:
        nll = forged_safetensors(nll, draw, "sha256")
    elif draw.random() < 0.8:
        score = json_text(mutated_value(json.loads(score), draw), draw)
    else:
        score = mutated_bytes(score, draw)
    (folder / "score.json").write_bytes(score)
    (folder / "nll.safetensors").write_bytes(nll)
    yield
    stored = Stored(folder / "score.json")
    kept, file = read_nll(folder / "nll.safetensors", stored), which_nll(folder / "nll.safetensors", stored)
    report = AuditReport((file, *stated(stored, files.documents[:6], kept)))
    str(report), json.dumps(report.to_json(), allow_nan=False)


def peft_folder(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    config, weights = files.data["adapter_config.json"], files.data["adapter_model.safetensors"]
    if draw.random() < 0.6:
        config = json_text(mutated_value(json.loads(config), draw), draw)
    elif draw.random() < 0.5:
        size = struct.unpack("<Q", weights[:8])[0]
        table = json_text(mutated_value(json.loads(weights[8 : 8 + size]), draw), draw)
        weights = struct.pack("<Q", len(table)) + table + weights[8 + size :]
    else:
        weights = mutated_bytes(weights, draw)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    yield
    adapted_linears().adapters.load("one", folder)


def linears_file(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    from klora.model.int6_file import load_quantized

    path = folder / "linears.safetensors"
    path.write_bytes(forged_safetensors(files.data["linears"], draw))
    yield
    load_quantized(linears(), path)(torch.ones(1, 64))


@dataclass(frozen=True)
class Target:
    """`share` of the cases, and `bytes` that one may take beside SPARE."""

    open: Case
    share: float
    bytes: int


RECORD = 12 * LIMITS["MAX_RECORD_BYTES"]
TARGETS = {
    "artifact": Target(artifact, 24, LIMITS["MAX_MODEL_BYTES"]),
    "tokenizer": Target(tokenizer_model, 2, 64 << 20),
    "shards": Target(shards, 8, 16 << 20),
    "texts": Target(texts, 16, 40 * 5 * LIMITS["MAX_DOCUMENT_BYTES"]),
    "journal": Target(journal, 14, RECORD),
    "run.json": Target(run_json, 8, RECORD),
    "loss.csv": Target(loss_csv, 6, RECORD),
    "checkpoint": Target(checkpoint, 8, LIMITS["MAX_MODEL_BYTES"]),
    "model": Target(trained_model, 5, LIMITS["MAX_MODEL_BYTES"]),
    "benchmark": Target(benchmark, 4, RECORD),
    "documents.csv": Target(documents_csv, 3, RECORD),
    "linears": Target(linears_file, 2, 64 << 20),
    "score": Target(stored_score, 6, RECORD),
    "peft": Target(peft_folder, 3, 64 << 20),
}


def _memory() -> tuple[int, int]:
    """(resident bytes now, the most since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines if line.startswith("Vm"))
    return tuple(1024 * int(found[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def run_case(files: Files, folder: Path, seed: int, number: int, only: Sequence[str]) -> tuple[str, str]:
    """(name of its target, what is wrong with it or nothing) of one case."""
    from klora.errors import KloraError

    draw = random.Random(f"{seed} {number}")
    name = draw.choices(list(only), [TARGETS[name].share for name in only])[0]
    target = TARGETS[name]
    place = folder / f"case-{name}"
    place.mkdir(exist_ok=True)
    case = target.open(files, place, draw)
    next(case)
    Path("/proc/self/clear_refs").write_text("5")
    before, started, wrong = _memory()[0], time.process_time(), ""
    try:
        next(case, None)
    except (KloraError, OSError):
        pass
    except Exception:
        wrong = traceback.format_exc()
    seconds, taken = time.process_time() - started, _memory()[1] - before
    if not wrong and seconds > SECONDS:
        wrong = f"it took {seconds:.1f} s of CPU time"
    if not wrong and taken > target.bytes + SPARE:
        wrong = f"it took {taken:,} bytes and {target.bytes:,} are declared"
    return name, wrong


def _work(files: Files, folder: Path, seed: int, numbers: range, only: Sequence[str], at, found: Path) -> None:
    """Run cases; `at` has the number of the one that runs, when it began, and how many are done."""
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        at[0], at[1] = number, time.monotonic()
        name, wrong = run_case(files, folder, seed, number, only)
        if wrong:
            keep(found, folder / f"case-{name}", name, number, wrong)
        at[2] += 1
    at[0] = -1


def keep(found: Path, files: Path, name: str, number: int, wrong: str) -> None:
    """Copy a case's files beside what is wrong with it."""
    place = found / f"{name}-{number}"
    shutil.copytree(files, place, dirs_exist_ok=True)
    (place / "finding.txt").write_text(wrong)
    print(f"\nfuzz: case {number}, {name}: {wrong.strip().splitlines()[-1][:300]}; kept in {place}", flush=True)


def fuzz(
    count: int,
    seed: int = 0,
    processes: int = 1,
    only: Sequence[str] = tuple(TARGETS),
    found: Path | None = None,
    first: int = 0,
    say: Callable[[str], None] = print,
) -> int:
    """Run cases `first` to `first + count`; how many of them are findings. They are kept in `found`."""
    import logging

    logging.getLogger("klora").addHandler(logging.NullHandler())
    found = found or Path(tempfile.mkdtemp(prefix="klora-fuzz-"))
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    context = multiprocessing.get_context("fork")
    before = {name: os.environ.get(f"KLORA_{name}") for name in LIMITS}
    os.environ |= {f"KLORA_{name}": str(value) for name, value in LIMITS.items()}
    try:
        with tempfile.TemporaryDirectory(dir=memory) as scratch:
            files = made_files(Path(scratch))
            return _fuzz(files, Path(scratch), context, count, seed, processes, only, found, first, say)
    finally:
        for name, value in before.items():
            os.environ.pop(f"KLORA_{name}")
            if value is not None:
                os.environ[f"KLORA_{name}"] = value


def _fuzz(files, scratch, context, count, seed, processes, only, found, first, say) -> int:
    def start(worker: int, begin: int):
        folder = scratch / f"worker-{worker}"
        folder.mkdir(exist_ok=True)
        numbers = range(begin, first + count, processes)
        process = context.Process(target=_work, args=(files, folder, seed, numbers, only, states[worker], found))
        process.start()
        return process

    states = [context.RawArray("d", 3) for _ in range(processes)]
    workers = {worker: start(worker, first + worker) for worker in range(processes)}
    started = said = time.monotonic()
    while workers:
        time.sleep(0.05)
        for worker, process in list(workers.items()):
            state = states[worker]
            number, stuck = int(state[0]), time.monotonic() - state[1] > STUCK and state[1] > 0
            if process.is_alive() and not (stuck and number >= 0):
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del workers[worker]
            if number >= 0:
                wrong = f"it hung for {STUCK:.0f} s" if process.exitcode == -9 else f"exit status {process.exitcode}"
                draw = random.Random(f"{seed} {number}")
                name = draw.choices(list(only), [TARGETS[name].share for name in only])[0]
                keep(found, scratch / f"worker-{worker}" / f"case-{name}", name, number, wrong)
                state[0], state[1], state[2] = number, 0.0, state[2] + 1
                if number + processes < first + count:
                    workers[worker] = start(worker, number + processes)
        if time.monotonic() - said > 10 or not workers:
            said = time.monotonic()
            done = int(sum(state[2] for state in states))
            rate = done / (said - started)
            left = (count - done) / rate / 60 if rate else math.inf
            findings = len(list(found.iterdir())) if found.exists() else 0
            say(f"fuzz: {done:,} of {count:,} files, {rate:,.0f}/s, {findings} findings, {left:,.0f} min left")
    return len(list(found.iterdir())) if found.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="files to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: with --count 1, that one again")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; repeatable")
    parser.add_argument("--found", type=Path, default=ROOT / "runs" / "fuzz", help="where findings are kept")
    given = parser.parse_args()
    findings = fuzz(given.count, given.seed, given.processes, given.target or tuple(TARGETS), given.found, given.first)
    where = f" in {given.found}" if findings else ""
    print(f"fuzz: {given.count:,} files of {len(TARGETS)} formats, {findings} findings{where}")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
