"""The formats: each target writes a changed file into a folder, and opens it as a command does."""

import fcntl
import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import klora.cli.train as command
import torch
import zstandard
from klora.bench.curves import CurveError, _is_eager, read_losses
from klora.bench.readings import load_records
from klora.bench.record import RecordError, slower_than
from klora.bench.report import markdown_tables
from klora.cli.bench import read_record, require_replaceable
from klora.cli.console import printable
from klora.cli.demo import is_demo
from klora.model.artifact import load_artifact
from klora.model.corpus import Corpus
from klora.model.curve import LossCurve
from klora.model.estimate import least_memory
from klora.model.int6_file import load_quantized
from klora.model.loading import model_from_artifact, model_from_run, tokenizer_of
from klora.model.lock import Locked, locked
from klora.model.placement import rows_per_rank
from klora.model.run_folder import began_with
from klora.model.shards import RowSampler, TokenStream, find_shards
from klora.model.tokenizer import Tokenizer
from klora.model.weights import frozen_weights
from klora.ttt.audit_report import AuditReport
from klora.ttt.documents import documents_from_texts, documents_from_tokens, with_own_names
from klora.ttt.journal import has_journals, open_journal
from klora.ttt.protocols import ttt_preset
from klora.ttt.results import ScoreResult, read_documents_csv
from klora.ttt.verify import Stored, read_nll, stated, which_nll

from .forgeries import chained_lines, forged_artifact, forged_safetensors, forged_table, signed_array, signed_tensors
from .mutations import json_text, mutated_bytes, mutated_tokenizer, mutated_value
from .originals import CELLS, FINGERPRINT, Files, adapted_linears, linears

LIMITS = {"MAX_MODEL_BYTES": 96 << 20, "MAX_DOCUMENT_BYTES": 1 << 20, "MAX_RECORD_BYTES": 4 << 20}
"""Limits of klora's, lowered so that small files reach them."""

Case = Callable[[Files, Path, random.Random], Iterator[None]]
"""Writes a changed file into the folder, yields, and opens it: the time and memory of the second half count."""


def artifact(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
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
    path = folder / "tokenizer.model"
    change = mutated_tokenizer if draw.random() < 0.5 else mutated_bytes
    path.write_bytes(change(files.data["tokenizer.model"], draw))
    yield
    Tokenizer.from_file(path, may_normalise=draw.random() < 0.5).encode("a text \n é")


def shards(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
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


LONG = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor(level=1).compress}


@cache
def long_line(kind: str) -> bytes:
    """A small file that unpacks, a frame or member at a time, to one line of 300 MiB."""
    return b"".join([LONG[kind](b'{"text": "')] + [LONG[kind](b"a" * (1 << 20))] * 300)


def texts(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
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
            (b'{"text": "' + b"a" * (3 << 20), b"\n" * (1 << 17), b'{"text": "' + b"\xc3\xa9" * 300_000 + b'"}')
        )
    if kind == ".jsonl.gz":
        data = gzip.compress(data, 1)
    elif kind == ".jsonl.zst":
        data = zstandard.ZstdCompressor(level=1, write_checksum=draw.random() < 0.5).compress(data)
    if kind in LONG and draw.random() < 0.01:
        data = long_line(kind)
    if draw.random() < 0.3:
        data = mutated_bytes(data, draw)
    path = folder / f"texts{kind}"
    path.write_bytes(data)
    yield
    corpus = Corpus.text([path]) if kind == ".txt" else Corpus.jsonl([path])
    with_own_names(list(documents_from_texts(corpus.documents(), files.tokenizer, 1)), lambda text: None)


def journal(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
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
    path = folder / "model.safetensors"
    data = forged_safetensors(files.data["model.safetensors"], draw)
    path.write_bytes(signed_tensors(data) if draw.random() < 0.8 else data)
    yield
    command._facts(path)
    model_from_run(folder, "cpu")(torch.ones(1, 4, dtype=torch.int64))


def benchmark(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
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
    path = folder / "documents.csv"
    path.write_bytes(mutated_bytes(files.data["documents.csv"], draw))
    yield
    with suppress(ValueError):  # which it promises
        read_documents_csv(path)


def stored_score(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    """What `klora verify` reads, and all that it says before it computes."""
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
        weights = forged_table(weights, draw)
    else:
        weights = mutated_bytes(weights, draw)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    yield
    adapted_linears().adapters.load("one", folder)


def linears_file(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    path = folder / "linears.safetensors"
    path.write_bytes(forged_safetensors(files.data["linears"], draw))
    yield
    load_quantized(linears(), path)(torch.ones(1, 64))


def lock_file(files: Files, folder: Path, draw: random.Random) -> Iterator[None]:
    """A lock that another process holds, and what its file says of that process."""
    path = folder / ".klora.lock"
    path.write_bytes(
        json_text(mutated_value(json.loads(files.data["lock"]), draw), draw)
        if draw.random() < 0.8
        else mutated_bytes(files.data["lock"], draw)
    )
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        yield
        try:
            with locked(folder):
                raise AssertionError("two hold one lock")
        except Locked as error:
            printable(str(error)).encode()


@dataclass(frozen=True)
class Target:
    """`share` of the cases in a hundred, and `bytes` that one may take beside what all may."""

    open: Case
    share: int
    bytes: int


RECORD = 12 * LIMITS["MAX_RECORD_BYTES"]
TARGETS = {
    "artifact": Target(artifact, 18, LIMITS["MAX_MODEL_BYTES"]),
    "tokenizer": Target(tokenizer_model, 4, 64 << 20),
    "shards": Target(shards, 6, 16 << 20),
    "texts": Target(texts, 11, 40 * 5 * LIMITS["MAX_DOCUMENT_BYTES"]),
    "journal": Target(journal, 11, RECORD),
    "run.json": Target(run_json, 8, RECORD),
    "loss.csv": Target(loss_csv, 4, RECORD),
    "checkpoint": Target(checkpoint, 8, LIMITS["MAX_MODEL_BYTES"]),
    "model": Target(trained_model, 5, LIMITS["MAX_MODEL_BYTES"]),
    "benchmark": Target(benchmark, 4, RECORD),
    "documents.csv": Target(documents_csv, 3, RECORD),
    "linears": Target(linears_file, 3, 64 << 20),
    "score": Target(stored_score, 7, RECORD),
    "peft": Target(peft_folder, 6, 64 << 20),
    "lock": Target(lock_file, 2, 16 << 20),
}
