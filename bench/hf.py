"""A model of transformers adapted by klora, beside a plain PEFT loop that takes one document after the other.

    python -m klora.bench.hf --model FOLDER --jsonl held-out.jsonl --record hf.json

First the gate: of the GATED_DOCUMENTS longest documents, GATED chunks of each, in fp32, klora's NLL may be as far from
the loop's in float64 as the loop's own in fp32 (bench/tolerance.py). Then the times, in the dtype that is asked for:

    klora_seconds   the adapting of all documents by adapt_hf, graphs captured anew; a first run has compiled kernels.
                    `klora_rounds_seconds` of them are those of the rounds, captures left out
    peft_seconds    of --peer-documents documents, after one that warms up, times the share that their targets are of
                    all targets. It is scaled, not measured; `peft_measured` says what was.

`errors` are those of both in that dtype, on the gate's documents. The loop is what one would write: PEFT's adapters,
torch.optim.Adam, logits of the chunk alone. Before the gate klora's kernels are compiled side by side
(`compiled_ahead`): one after another they take minutes.
"""

import copy
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from ..cli.warm import scoring
from ..model.corpus import Corpus, TextDocument
from ..model.parallel import pick_device
from ..model.storage import write_text
from ..ttt.documents import Document
from ..ttt.hf import adapt_hf, hf_documents, load_hf
from ..ttt.hf_engine import slots_of
from ..ttt.hf_model import HfModel
from ..ttt.pipeline import ScoreRequest, score
from ..ttt.protocols import HF, TTTConfig, learning_rate, ttt_preset
from ..ttt.results import ScoreResult
from .ahead import compiled_ahead
from .environment import environment
from .gate import RedGate
from .tolerance import allowed_error, relative_error

GATED = 3
"""Chunks of a document of the gate: Adam makes a step of any rounding of a gradient that is nearly zero, so that after
tens of them two equally good loops have parted."""
GATED_DOCUMENTS = 4
"""One sample: of one document alone, an error's size is chance."""


class PeftLoop:
    """The loop over one document at a time, on a copy of `module`."""

    def __init__(self, module: nn.Module, config: TTTConfig, dtype: torch.dtype | None = None):
        from peft import LoraConfig, get_peft_model

        first, ends = initial_adapters(module, config)
        targets = {end: (config.rank(target), config.scale(target)) for end, target in ends.items()}
        about = LoraConfig(
            target_modules=list(targets),
            rank_pattern={end: rank for end, (rank, _) in targets.items()},
            alpha_pattern={end: rank * scale for end, (rank, scale) in targets.items()},
            lora_dropout=0.0,
        )
        module = copy.deepcopy(module)
        self.config, self.device = config, next(module.parameters()).device
        self.model = get_peft_model(module.to(dtype) if dtype else module, about, autocast_adapter_dtype=False).eval()
        self.first = {f"base_model.model.{name}.lora_A.default.weight": a for name, a in first.items()}
        self.adapters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for parameter in self.adapters.values():
            parameter.data = parameter.data.to(wide)
        self.rates = {name: getattr(config, f"{_target(name, ends)}_lr") for name in self.adapters}

    def nll(self, tokens: np.ndarray) -> np.ndarray:
        """NLL [targets] of a document: each chunk scored, then learnt from."""
        config, size = self.config, self.config.chunk
        with torch.no_grad():
            for name, parameter in self.adapters.items():
                parameter.copy_(self.first[name]) if name in self.first else parameter.zero_()
        groups = [{"params": [p], "factor": self.rates[name]} for name, p in self.adapters.items()]
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, weight_decay=decay)
        row = torch.from_numpy(tokens.astype(np.int64)).to(self.device)[None]
        targets, found, steps = len(tokens) - 1, [], 0
        for chunk in range(-(-targets // size)):
            first, end = chunk * size, min((chunk + 1) * size, targets)
            start = int(config.window_start(np.array(chunk), np.array(end)))
            learns = end < targets and chunk >= config.trained_from
            for number in range(config.steps_per_chunk if learns else 1):
                with torch.set_grad_enabled(learns):
                    nll = self._chunk(row[:, start:end], row[0, first + 1 : end + 1], config.temperature_of(chunk))
                if number == 0:
                    found.append(nll.detach())
                if learns:
                    rate = float(learning_rate(config, torch.tensor([steps]), torch.tensor([1])))
                    for group in optimizer.param_groups:
                        group["lr"] = rate * group["factor"]
                    optimizer.zero_grad()
                    nll.mean().backward()
                    optimizer.step()
                    steps += 1
        return torch.cat(found).cpu().numpy()

    def _chunk(self, inputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
        logits = self.model(input_ids=inputs, use_cache=False, logits_to_keep=len(targets)).logits[0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide) / temperature, targets, reduction="none")


def _target(name: str, ends: Mapping[str, str]) -> str:
    """The target of an adapter's parameter, by the name of its linear."""
    linear = name.partition(".lora_")[0]
    return ends[max((end for end in ends if linear.endswith(f".{end}")), key=len)]


def initial_adapters(module: nn.Module, config: TTTConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A [R, K] of every linear, by its name, as a document starts with it; and the targets by the names' ends."""
    model = HfModel(module, config)
    try:
        pool = model.attach(config, 1).pool
        slots_of(model.lora, model, config)
        return {p.name: pool.read(0, index, p.rank)[0] for index, p in enumerate(pool.places)}, model.ends
    finally:
        model.close()


def klora_nll(module: nn.Module, config: TTTConfig, documents: Sequence[Document]) -> list[np.ndarray]:
    """NLL [targets] of each document by the engine."""
    model = HfModel(module, config)
    try:
        return list(score(ScoreRequest(model, documents, config, keeps_nll=True)).nll)
    finally:
        model.close()


def gate(module: nn.Module, config: TTTConfig, documents: Sequence[Document]) -> dict[str, dict[str, float]]:
    """Relative errors of klora's NLL and of the loop's, in fp32 and in the model's dtype. RedGate: klora's in fp32 is
    larger than the rule allows.
    """
    cut = [Document(d.name, d.tokens[: GATED * config.chunk + 1], 1) for d in documents]

    def looped(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        loop = PeftLoop(module, config, dtype)
        return torch.from_numpy(np.concatenate([loop.nll(document.tokens) for document in cut]))

    exact, found = looped(module, torch.float64), {}
    for dtype in dict.fromkeys((torch.float32, next(module.parameters()).dtype)):
        copied = copy.deepcopy(module).to(dtype)
        ours = torch.from_numpy(np.concatenate(klora_nll(copied, config, cut)))
        errors = {"peft": relative_error(looped(copied), exact), "klora": relative_error(ours, exact)}
        found[str(dtype).removeprefix("torch.")] = errors
        if dtype == torch.float32:
            allowed = allowed_error(errors["peft"], torch.float32, len(exact))
            errors["allowed"] = allowed
            if errors["klora"] > allowed:
                says = f"klora's NLL is {errors['klora']:.2e} from the loop's in float64; allowed: {allowed:.2e}"
                raise RedGate(f"{says}. No speed is reported.")
    return found


def launches(module: nn.Module, config: TTTConfig, documents: int) -> None:
    """Launch what the gate and then the adapting of so many documents launch, for :func:`compiled_ahead`."""
    dtype = next(module.parameters()).dtype
    works = [(copy.deepcopy(module).to(each), GATED_DOCUMENTS) for each in dict.fromkeys((torch.float32, dtype))]
    for each, count in [*works, (module, documents)]:
        model = HfModel(each, config)
        try:
            scoring(model, config, count).run()
        finally:
            model.close()


def peft_seconds(module: nn.Module, config: TTTConfig, documents: Sequence[Document]) -> dict[str, Any]:
    """Seconds that the loop takes for documents, after the first, cut to two chunks, has warmed it up."""
    loop = PeftLoop(module, config)
    loop.nll(documents[0].tokens[: 2 * config.chunk + 1])
    _wait(loop.device)
    began = time.perf_counter()
    for document in documents:
        loop.nll(document.tokens)
    _wait(loop.device)
    targets = sum(document.targets for document in documents)
    return {"documents": len(documents), "targets": targets, "seconds": time.perf_counter() - began}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(
    module: nn.Module, tokenizer: Any, texts: Sequence[TextDocument], config: TTTConfig, peers: int
) -> dict[str, Any]:
    """The gate, both times and the gain in bits per byte."""
    long = [d for d in hf_documents(texts, tokenizer) if config.adapts(d.targets)]
    if not long:
        raise ValueError(f"no document has more than {config.first_adapted} targets: there is nothing to adapt")
    by_length = sorted(long, key=lambda document: document.targets)
    ahead = compiled_ahead(partial(launches, module, config, len(long)), next(module.parameters()).device)
    errors = gate(module, config, by_length[-GATED_DOCUMENTS:])
    # Documents of all lengths: one in the middle of each of `peers` equal parts.
    chosen = [by_length[(2 * n + 1) * len(by_length) // (2 * peers)] for n in range(min(peers, len(by_length)))]
    peft = peft_seconds(module, config, chosen)
    adapt_hf(module, tokenizer, texts, config)
    result = adapt_hf(module, tokenizer, texts, config)
    targets = sum(document.targets for document in long)
    scaled = peft["seconds"] * targets / peft["targets"]
    seconds, rounds = result.seconds["adapt"], result.facts["engine"]["seconds"]
    return {
        "documents": len(texts),
        "adapted_documents": len(long),
        "adapted_targets": targets,
        "compiled_ahead": ahead,
        "errors": errors,
        "klora_seconds": seconds,
        "klora_rounds_seconds": rounds,
        "klora_base_pass_seconds": result.seconds["base"],
        "klora_targets_per_second": targets / seconds,
        "peft_measured": peft,
        "peft_seconds": scaled,
        "peft_seconds_are": "scaled by targets from those of the measured documents",
        "times_faster": scaled / seconds,
        "times_faster_after_captures": scaled / rounds,
        **_scores(result),
    }


def _scores(result: ScoreResult) -> dict[str, Any]:
    totals = result.totals()
    return {
        "base_bpb": totals["base_bpb"],
        "adapted_bpb": totals["adapted_bpb"],
        "gain_bpb": totals["base_bpb"] - totals["adapted_bpb"],
        "engine": result.facts["engine"],
        "model": result.facts["hf"],
    }


def check(
    model: Annotated[Path, typer.Option(help="Folder of the model and its tokenizer, as save_pretrained writes it.")],
    jsonl: Annotated[Path, typer.Option(help="Documents: one JSON object a line (.jsonl, .jsonl.gz, .jsonl.zst).")],
    record: Annotated[Path, typer.Option(help="The record to write.")] = Path("hf.json"),
    field: Annotated[str, typer.Option(help="Name of the text's field.")] = "text",
    documents: Annotated[int, typer.Option(min=1, help="Documents from the start of the file.")] = 1024,
    peer_documents: Annotated[int, typer.Option(min=1, help="Documents that the loop is timed on.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    set_: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE of the preset hf. Repeatable.")] = None,
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Measure and write the record."""
    from ..cli.options import parse_overrides

    config = ttt_preset(HF).override(parse_overrides(set_))
    module, tokenizer = load_hf(model, pick_device(device), dtype)
    every = Corpus.jsonl([jsonl], field=field).documents()
    texts = [text for text, _ in zip(every, range(documents), strict=False)]
    found = measured(module, tokenizer, texts, config, peer_documents)
    result = {"name": "hf", "environment": environment(commit), "config": config.to_dict(), **found}
    write_text(record, json.dumps(result, indent=1) + "\n")
    scaled_from = f"scaled from {found['peft_measured']['documents']}"
    print(
        f"{found['adapted_documents']:,} documents: {found['klora_seconds']:.1f} s, of them "
        f"{found['klora_rounds_seconds']:.1f} without captures; PEFT, one by one, "
        f"{found['peft_seconds']:,.1f} s ({scaled_from}): "
        f"{found['times_faster']:.1f} and {found['times_faster_after_captures']:.1f} times; "
        f"{found['base_bpb']:.4f} -> {found['adapted_bpb']:.4f} bits per byte"
    )


if __name__ == "__main__":
    typer.run(check)
