"""One whole file of every format, made by klora itself."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from klora.lora import attach
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

FINGERPRINT, CELLS = "a run", 50


@dataclass
class Files:
    """One whole file of every format, as bytes, and what is needed to open changed ones without making it again."""

    data: dict[str, bytes] = field(default_factory=dict)
    tokenizer: Any = None
    trainer: Any = None
    prepared: Any = None
    documents: list = field(default_factory=list)


def made_files(folder: Path) -> Files:
    """A small run, its artifact, a scoring's journal and results, and texts."""
    made, draw = Files(), random.Random(0)
    stems = ["alpha", "beta", "gamma", "delta", "epsilon", "=", ":", "\n", "def", "return", "import", "self", "é", "😀"]
    texts = [" ".join(draw.choices(stems, k=60)) for _ in range(30)]
    made.tokenizer = Tokenizer.train(texts, 300)
    made.documents = [
        Document(f"{i}.txt", made.tokenizer.encode(text), len(text.encode())) for i, text in enumerate(texts)
    ]
    _train(made, texts[:6], folder)
    _score(made, folder)
    module = linears()
    quantize_linears(module)
    save_quantized(module, folder / "linears")
    adapted = adapted_linears()
    adapted.adapters.create("one")
    adapted.adapters.save("one", folder)
    for name in ("linears", "adapter_config.json", "adapter_model.safetensors"):
        made.data[name] = (folder / name).read_bytes()
    lines = [json.dumps({"name": str(i), "text": text}) for i, text in enumerate(texts[:8])]
    lock = {"pid": 1, "host": "one", "command": "train", "since": "2026-01-01 00:00:00"}
    made.data["jsonl"] = "".join(f"{line}\n" for line in lines).encode()
    made.data["text"] = texts[0].encode()
    made.data["record"] = json.dumps(benchmark_record()).encode()
    made.data["lock"] = json.dumps(lock).encode()
    return made


def _train(made: Files, texts: list[str], folder: Path) -> None:
    """Shards of the texts, a run of a few steps on them, and its artifact."""
    paths = {}
    for split in ("train", "val"):
        with ShardWriter(folder, split) as writer:
            for text in texts:
                writer.add(made.tokenizer.encode(text))
        paths[split] = writer.paths
    (folder / "tokenizer.model").write_bytes(made.tokenizer.to_bytes())
    made.prepared = Prepared(made.tokenizer, paths["train"], paths["val"], folder)
    sizes = {"width": 16, "blocks": 2, "heads": 2, "kv_heads": 1, "mlp_hidden": 16, "train_length": 16}
    config = ModelConfig(vocab_size=300, bigram_rows=16, bigram_width=4, **sizes)
    steps = TrainConfig(seconds=600.0, max_steps=4, batch_tokens=32, micro_batch_tokens=32, validate_tokens=64)
    preset = Preset("small", config, steps.override({"ema_every": 1, "swa_every": 1, "swa_below": 1.0}), "for fuzzing")
    run = folder / "run"
    made.trainer = Trainer(preset, made.prepared, run, Ranks(0, 1, torch.device("cpu")), say=lambda text: None)
    made.trainer.run()
    tensors, meta = load_run(run)
    save_artifact(run / "model.klora", tensors, config, made.tokenizer.to_bytes(), meta["provenance"])
    for name in ("run.json", "loss.csv", "checkpoint.safetensors", "model.safetensors", "model.klora"):
        made.data[name] = (run / name).read_bytes()
    made.data["tokenizer.model"] = made.tokenizer.to_bytes()
    made.data["shard"] = paths["val"][0].read_bytes()


def _score(made: Files, folder: Path) -> None:
    """The journal of a scoring of six documents, and its results."""
    scored = made.documents[:6]
    results = {
        i: DocumentResult(d.name, d.targets, d.bytes, SHORT if i % 2 else ADAPTED, 9.0, 9.0, 8.0, 9.5, 0, d.targets)
        for i, d in enumerate(scored)
    }
    journal = Journal(folder / "journal.jsonl", FINGERPRINT, resume=False)
    journal.add(results)
    journal.base("base", CELLS)[:] = 1.0
    journal.keep_base("base")
    journal.add_seconds({"base": 1.5, "adapt": 2.5})
    journal.close()
    made.data["journal"] = (folder / "journal.jsonl").read_bytes()
    made.data["base"] = (folder / "journal.base.npy").read_bytes()
    source = {"documents": 6, "tokens": sum(d.targets for d in scored), "most_tokens": 0, "sha256": digest_of(scored)}
    facts = {"source": source, "artifact": {"header_sha256": "a", "payload_sha256": "b"}, "weights": "dense"}
    nll = [np.full(document.targets, 8.0 / document.targets, np.float32) for document in scored]
    hashes = [document.sha256 for document in scored]
    result = ScoreResult(list(results.values()), ttt_preset(), {"base": 1.0}, facts, None, hashes, nll)
    write_nll(folder / "nll.safetensors", result)
    result.write(folder)
    for name in ("documents.csv", "score.json", "nll.safetensors"):
        made.data[name] = (folder / name).read_bytes()


def linears() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))


def adapted_linears():
    """A model with adapters whose files are PEFT's."""
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
