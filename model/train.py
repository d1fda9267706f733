"""Training: the loop, its clock, its schedule, its checkpoints and the weights it leaves behind.

A run lives in one folder: run.json (what was asked for), loss.csv and loss.png (written as it goes),
checkpoint.safetensors (the latest state), tokenizer.model, and at the end model.safetensors: the better of the EMA and
the SWA weights on the validation split.

The clock counts training only: it stands still while the run validates and writes checkpoints. A run whose length is
set by `max_steps` continues bit for bit on a CPU after an interruption, as long as `seconds` is not reached. Where the
clock decides, the learning rate depends on the machine's speed, so no two runs are the same.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import KloraError
from .average import WeightAverages
from .checkpoint import CheckpointError, load_tensors, save_tensors, with_prefix, without_prefix
from .config import ConfigError, Preset, TrainConfig
from .curve import LossCurve
from .evaluate import validation_bpb
from .gpt import GPT, parameter_count
from .optimizers import FlatGradients, Optimizers
from .parallel import Ranks
from .prepare import Prepared
from .ranges import phase
from .shards import RowSampler, TokenStream
from .signals import StopSignals
from .storage import write_bytes, write_text

CHECKPOINT, MODEL, RUN, TOKENIZER = "checkpoint.safetensors", "model.safetensors", "run.json", "tokenizer.model"


class NonFiniteLoss(KloraError, RuntimeError):
    """The loss or the gradient norm is no longer a number; the weights were not updated with it."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Times in seconds of training; BPB on the validation shards, by weights that were tried."""

    status: str
    """'finished', or 'interrupted' with a checkpoint to resume from."""
    step: int
    seconds: float
    tokens: int
    parameters: int
    loss: float
    validation_bpb: dict[str, float]
    kept: str
    """Name in validation_bpb of the weights in model.safetensors; empty when interrupted."""
    attention: str
    signal: int = 0
    """Number of the signal that interrupted the run."""


def lr_scale(config: TrainConfig, step: int, elapsed: float) -> float:
    """Learning-rate multiplier of step `step` after `elapsed` seconds: 1, then linear to 0 over the warmdown.

    The warmdown lasts `warmdown_steps` at the mean step time so far, at most the share `warmdown_most` of the run. With
    `max_steps` it is counted in steps, and the clock does not touch it.
    """
    if config.max_steps:
        warmdown, left = min(config.warmdown_steps, config.warmdown_most * config.max_steps), config.max_steps - step
    elif step:
        warmdown = min(config.warmdown_steps * elapsed / step, config.warmdown_most * config.seconds)
        left = max(config.seconds - elapsed, 0.0)
    else:
        return 1.0
    return min(1.0, left / warmdown) if warmdown else 1.0


class TrainingClock:
    """Seconds of training, of this run and of those it continues; it can be held for other work."""

    def __init__(self, device: torch.device, elapsed: float = 0.0):
        self.device = device
        self.started = time.perf_counter() - elapsed

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @contextmanager
    def held(self):
        """Time spent inside does not count."""
        self._synchronize()
        before = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.started += time.perf_counter() - before

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Trainer:
    """One training run in `folder`. With `resume`, it goes on from the checkpoint there.

    `sources` says in JSON values what the text was, for run.json and the artifact's provenance.
    Raises ConfigError where the config does not fit the data or the ranks, CheckpointError where `resume` finds no
    usable state, NonFiniteLoss where training diverges.
    """

    def __init__(
        self,
        preset: Preset,
        data: Prepared,
        folder: Path,
        ranks: Ranks,
        resume: bool = False,
        sources: dict | None = None,
    ):
        self.preset, self.config, self.data, self.ranks = preset, preset.train, data, ranks
        self.folder = Path(folder)
        self.sources = sources or {}
        rows, left = divmod(self.config.batch_tokens, preset.model.train_length * ranks.world)
        if left or not rows:
            raise ConfigError(
                f"batch_tokens={self.config.batch_tokens} is not possible; allowed: multiples of train_length x ranks, "
                f"{preset.model.train_length} x {ranks.world}"
            )
        if data.tokenizer.vocab_size != preset.model.vocab_size:
            raise ConfigError(
                f"vocab_size={preset.model.vocab_size} is not possible; the tokenizer has {data.tokenizer.vocab_size}"
            )
        self.rows_per_rank = rows
        torch.manual_seed(self.config.seed)
        self.model = GPT(preset.model)
        self.attention_reason = self.model.configure(ranks.device, compute_dtype(self.config, ranks.device))
        self.gradients = FlatGradients(self.model)
        self.optimizers = Optimizers(self.model, self.config)
        self.averages = WeightAverages(self.model, self.config)
        self.sampler = RowSampler(TokenStream(data.train), preset.model.train_length, self.config.seed)
        self.validation = TokenStream(data.validation)
        if len(self.validation) < 2:
            raise ConfigError(f"the validation shards hold {len(self.validation)} token; allowed: at least 2")
        self.step, self.loss = 0, math.nan
        self.clock = TrainingClock(ranks.device)
        self.last_checkpoint = 0
        if resume:
            self._load_checkpoint()
        self.curve = LossCurve(self.folder, resume_at=self.step) if ranks.is_first else None
        if ranks.is_first:
            self._describe_run()

    def run(self, progress: Callable[[dict[str, Any]], None] = lambda row: None) -> TrainResult:
        """Train to the end or to a signal. `progress` gets each row of loss.csv."""
        config = self.config
        with StopSignals() as stop:
            (elapsed,) = self.ranks.most(self.clock.seconds())
            next_validation, next_checkpoint = elapsed + config.validate_seconds, elapsed + config.checkpoint_seconds
            while not self._is_over(elapsed):
                scale = lr_scale(config, self.step, elapsed)
                grad_norm = self._train_step(scale)
                elapsed, signalled = self.ranks.most(self.clock.seconds(), stop.received)
                row = {
                    "step": self.step,
                    "seconds": elapsed,
                    "tokens": self.step * config.batch_tokens,
                    "loss": self.loss,
                    "grad_norm": grad_norm,
                    "lr_scale": scale,
                    "momentum": self.optimizers.momentum(self.step - 1),
                }
                if elapsed >= next_validation:
                    with self.clock.held():
                        row["validation_bpb"] = self._validate()
                    next_validation = elapsed + config.validate_seconds
                if self.curve:
                    self.curve.add(**row)
                progress(row)
                if signalled:
                    return self._interrupted(int(signalled))
                if elapsed >= next_checkpoint:
                    with self.clock.held():
                        self._save_checkpoint()
                    next_checkpoint = elapsed + config.checkpoint_seconds
            return self._finish()

    def _is_over(self, elapsed: float) -> bool:
        """Whether the clock or the number of steps ends the run; not before its first step."""
        config = self.config
        by_steps = config.max_steps and self.step >= config.max_steps
        return self.step > 0 and (elapsed >= config.seconds or bool(by_steps))

    def _train_step(self, scale: float) -> float:
        """One optimizer step over batch_tokens tokens; returns the gradient norm before clipping."""
        config, length = self.config, self.preset.model.train_length
        with phase("data"):
            all_rows = self.rows_per_rank * self.ranks.world
            inputs, targets = self.sampler.take(all_rows, self.ranks.rank, self.ranks.world)
        self.gradients.buffer.zero_()
        total = torch.zeros((), device=self.ranks.device)
        rows = max(1, config.micro_batch_tokens // length)
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
            x, y = x.to(self.ranks.device, non_blocking=True), y.to(self.ranks.device, non_blocking=True)
            with phase("forward"):
                loss = self.model.nll(x, y).sum() / config.batch_tokens
            with phase("backward"):
                loss.backward()
            total += loss.detach()
        self.ranks.sum_(self.gradients.buffer)
        self.ranks.sum_(total)
        grad_norm = self.gradients.clip_(config.grad_clip)
        self.loss, norm = torch.stack([total, grad_norm]).tolist()
        if not (math.isfinite(self.loss) and math.isfinite(norm)):
            if self.curve:
                self.curve.close()
            raise NonFiniteLoss(self._explain_non_finite(norm))
        with phase("optimizer"):
            self.optimizers.step(self.step, scale)
        self.step += 1
        self.averages.update(self.step, scale)
        return norm

    def _explain_non_finite(self, norm: float) -> str:
        saved = f"{self.folder / CHECKPOINT} (step {self.last_checkpoint})" if self.last_checkpoint else "none yet"
        return (
            f"step {self.step + 1} gave loss {self.loss} and gradient norm {norm}; the weights were not updated with "
            f"it. Last checkpoint: {saved}. Try smaller learning rates (muon_lr, embed_lr, scalar_lr), a smaller "
            "grad_clip, or dtype=float32; --resume goes on from the checkpoint."
        )

    def _validate(self) -> float:
        config = self.config
        return validation_bpb(
            self.model,
            self.validation,
            self.data.tokenizer,
            config.validate_tokens,
            config.micro_batch_tokens,
            self.ranks,
        )

    def _finish(self) -> TrainResult:
        """Evaluate the last weights and both averages, keep the better average, write model.safetensors."""
        seconds = self.clock.seconds()
        self._save_checkpoint()
        last = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        candidates = self.averages.candidates()
        scores = {"last": self._validate()}
        for name, weights in candidates.items():
            self.model.load_state_dict(weights)
            scores[name] = self._validate()
        if not all(map(math.isfinite, scores.values())):
            raise NonFiniteLoss(f"the validation BPB is no number: {scores}. Try smaller learning rates.")
        kept = min(candidates, key=scores.__getitem__, default="last")
        self.model.load_state_dict(candidates.get(kept, last))
        result = self._result("finished", seconds, scores, kept)
        if self.ranks.is_first:
            meta = {
                "model": self.preset.model.to_dict(),
                "provenance": {
                    "preset": self.preset.name,
                    "train": self.config.to_dict(),
                    "sources": self.sources,
                    "ranks": self.ranks.world,
                    "device": device_name(self.ranks.device),
                    "torch": torch.__version__,
                    "result": dataclasses.asdict(result),
                },
            }
            save_tensors(self.folder / MODEL, dict(self.model.named_parameters()), meta)
            self.curve.close()
        self.ranks.wait()
        return result

    def _interrupted(self, number: int) -> TrainResult:
        seconds = self.clock.seconds()
        self._save_checkpoint()
        if self.curve:
            self.curve.close()
        return self._result("interrupted", seconds, {}, "", number)

    def _result(self, status: str, seconds: float, scores: dict[str, float], kept: str, number: int = 0) -> TrainResult:
        return TrainResult(
            status=status,
            step=self.step,
            seconds=seconds,
            tokens=self.step * self.config.batch_tokens,
            parameters=parameter_count(self.preset.model),
            loss=self.loss,
            validation_bpb=scores,
            kept=kept,
            attention=f"{self.model.attention}: {self.attention_reason}",
            signal=number,
        )

    def _describe_run(self) -> None:
        """Write what the run is, so that --resume and export need no other argument; drop what an older run left."""
        if not self.step:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        (self.folder / MODEL).unlink(missing_ok=True)
        write_bytes(self.folder / TOKENIZER, self.data.tokenizer.to_bytes())
        run = {
            "preset": self.preset.name,
            "model": self.preset.model.to_dict(),
            "train": self.config.to_dict(),
            "data": str(self.data.folder.resolve()),
            "sources": self.sources,
        }
        write_text(self.folder / RUN, json.dumps(run, indent=2) + "\n")

    def _save_checkpoint(self) -> None:
        if self.ranks.is_first:
            averages = self.averages
            tensors = {
                **with_prefix("model", dict(self.model.named_parameters())),
                **with_prefix("optimizer", self.optimizers.state_tensors()),
                **with_prefix("ema", averages.ema),
                **with_prefix("swa", averages.swa),
            }
            meta = {
                "step": self.step,
                "seconds": self.clock.seconds(),
                "loss": self.loss,
                "sampler": self.sampler.state(),
                "ema_updates": averages.ema_updates,
                "swa_snapshots": averages.swa_snapshots,
                "model": self.preset.model.to_dict(),
            }
            save_tensors(self.folder / CHECKPOINT, tensors, meta)
            self.curve.draw()
        self.ranks.wait()
        self.last_checkpoint = self.step

    def _load_checkpoint(self) -> None:
        path = self.folder / CHECKPOINT
        tensors, meta = load_tensors(path)
        if meta["model"] != self.preset.model.to_dict():
            raise CheckpointError(f"{path} holds another model than run.json describes; start the run afresh")
        device = self.ranks.device
        self.model.load_state_dict(without_prefix("model", tensors))
        optimizer = without_prefix("optimizer", tensors)
        # AdamW counts its steps in a CPU tensor, whatever the device of the moments.
        self.optimizers.load_state_tensors(
            {name: t if name.endswith("/step") else t.to(device) for name, t in optimizer.items()}
        )
        self.averages.load(without_prefix("ema", tensors), without_prefix("swa", tensors), meta)
        self.sampler.load_state(meta["sampler"])
        self.step = self.last_checkpoint = meta["step"]
        self.loss = meta["loss"]
        self.clock = TrainingClock(device, meta["seconds"])


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic: `config.dtype`, where auto is bf16 on a GPU and fp32 on a CPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
