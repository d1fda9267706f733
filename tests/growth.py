"""Train and score again and again in one process: does its memory grow? `python tests/growth.py --seconds 1800`

A round trains a small model for some steps, exports it, loads the artifact, scores documents with it, and writes the
results and the report. The first rounds fill caches and are not counted. Of what the process holds after each further
round (resident memory, and on a GPU what tensors take and what the allocator has reserved) the least of the last third
is compared with the least of the first third: what is held for a moment, or returned late, is in neither.
"""

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

WARM_ROUNDS = 3
LEAST_ROUNDS = 9
ALLOWED = {"rss": 4 << 20, "cuda_allocated": 0, "cuda_reserved": 0}
"""Bytes by which each may grow: an allocator of the C library rounds to pages of its own."""


class Rounds:
    """Data and settings that all rounds share."""

    def __init__(self, folder: Path, device: torch.device):
        from klora.model.config import preset
        from klora.model.prepare import Prepared
        from klora.model.shards import ShardWriter
        from klora.model.tokenizer import Tokenizer
        from klora.ttt.documents import Document
        from klora.ttt.protocols import ttt_preset

        self.folder, self.device = folder, device
        words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "kappa", "lambda", "sigma", "omega"]
        draw = torch.Generator().manual_seed(0)
        picks = torch.randint(len(words), (12, 150), generator=draw).tolist()
        texts = [" ".join(words[i] for i in row) for row in picks]
        tokenizer = Tokenizer.train(texts, 300)
        paths = {}
        for split in ("train", "val"):
            with ShardWriter(folder, split) as writer:
                for text in texts:
                    writer.add(tokenizer.encode(text))
            paths[split] = writer.paths
        self.data = Prepared(tokenizer, paths["train"], paths["val"], folder)
        on_gpu = device.type == "cuda"
        sizes = {"vocab_size": 300, "train_length": 64, "bigram_rows": 64, "bigram_width": 16}
        sizes |= {"width": 128 if on_gpu else 32, "blocks": 2, "heads": 2, "kv_heads": 1, "mlp_hidden": 64}
        steps = {"seconds": 600.0, "max_steps": 20 if on_gpu else 4, "batch_tokens": 256, "micro_batch_tokens": 256}
        steps |= {"validate_tokens": 512, "ema_every": 1, "swa_every": 1, "swa_below": 1.0}
        self.preset = preset("tiny").override(sizes | steps)
        self.documents = [Document(str(i), tokenizer.encode(text), len(text)) for i, text in enumerate(texts)]
        self.config = ttt_preset().override({"chunk": 32, "window": 64, "batch": 4})

    def __call__(self) -> None:
        """One round; what it made goes with it."""
        from klora.model.artifact import save_artifact
        from klora.model.loading import load_run, model_from_artifact
        from klora.model.parallel import Ranks
        from klora.model.train import Trainer
        from klora.ttt.pipeline import ScoreRequest, score
        from klora.ttt.report import write_report

        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            run, artifact = Path(place) / "run", Path(place) / "model.klora"
            Trainer(self.preset, self.data, run, Ranks(0, 1, self.device), say=lambda text: None).run()
            tensors, meta = load_run(run)
            save_artifact(artifact, tensors, self.preset.model, self.data.tokenizer.to_bytes(), meta["provenance"])
            del tensors
            model = model_from_artifact(artifact, self.device)
            result = score(ScoreRequest(model, self.documents, self.config))
            result.write(Path(place))
            write_report(result, Path(place))


def held(device: torch.device) -> dict[str, int]:
    """Bytes held once everything that can go has gone."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {"rss": next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        found["cuda_allocated"] = torch.cuda.memory_allocated(device)
        found["cuda_reserved"] = torch.cuda.memory_reserved(device)
    return found


def growth(
    work: Callable[[], None],
    seconds: float,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    least: int = LEAST_ROUNDS,
) -> dict[str, Any]:
    """Run `work` for `seconds`, and `least` times at least: what was held at the start and the end, and the verdict."""
    began = said = time.monotonic()
    rounds: list[dict[str, int]] = []
    gc.freeze()  # what is there before the first round need not be looked through after each
    try:
        while time.monotonic() - began < seconds or len(rounds) < WARM_ROUNDS + least:
            work()
            rounds.append(held(device))
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"{said - began:.0f} s, {len(rounds)} rounds: {_amounts(rounds[-1])}")
    finally:
        gc.unfreeze()
    counted = rounds[WARM_ROUNDS:]
    third = max(1, len(counted) // 3)
    start, end = (
        {name: min(r[name] for r in part) for name in rounds[0]} for part in (counted[:third], counted[-third:])
    )
    grown = {name: end[name] - start[name] for name in start}
    return {
        "rounds": len(rounds),
        "seconds": time.monotonic() - began,
        "first_round": rounds[0],
        "start": start,
        "end": end,
        "grown": grown,
        "grows": [name for name, more in grown.items() if more > ALLOWED[name]],
    }


def _amounts(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {amount / 2**20:,.1f} MiB" for name, amount in found.items())


def described(found: dict[str, Any]) -> str:
    verdict = f"memory grows: {', '.join(found['grows'])}" if found["grows"] else "no growth"
    return (
        f"{found['rounds']} rounds of train, export, score and report in {found['seconds']:.0f} s: {verdict}\n"
        f"  start: {_amounts(found['start'])}\n  end:   {_amounts(found['end'])}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        found = growth(Rounds(Path(folder), device), given.seconds, device, say=lambda text: print(text, flush=True))
    print(described(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["grows"]))


if __name__ == "__main__":
    sys.exit(main())
