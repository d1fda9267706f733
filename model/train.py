"""Training: the loop, its clock, its schedule, its checkpoints and the weights it leaves behind.

A run lives in one folder: run.json (what was asked for), loss.csv and loss.png (written as it goes),
checkpoint.safetensors (the latest state), tokenizer.model, and at the end model.safetensors. That is the best on the
validation split of the last weights, their EMA and their SWA. A run that starts afresh in the folder of another one
moves that one's files to replaced/ first, and removes them when it has finished. A finished run that is resumed keeps
its weights until there are better ones on the validation split.

The clock counts training only: it stands still while the run validates and writes checkpoints. Between micro-batches
the run looks for signals and at the clock. A step that a signal or the cap cuts short is left out, as if it had not
begun. The first step counts with the tokens that it has read when the cap comes. A run whose length is set by
`max_steps` continues bit for bit on a CPU after an interruption, as long as `seconds` is not reached. Where the clock
decides, the learning rate depends on the machine's speed, so no two runs are the same.
"""

import dataclasses
import hashlib
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KloraError
from ..version import __version__
from .attention import choose_attention
from .checkpoint import (
    CheckpointError,
    load_tensors,
    save_tensors,
)
from .config import ConfigError, Preset
from .curve import LossCurve
from .eager import EagerStep
from .estimate import Estimate, available_memory, estimate, fused_memory, least_memory, require_memory, state_bytes
from .evaluate import validation_bpb
from .fused import FusedStep
from .gpt import GPT, parameter_count
from .parallel import Ranks, processes_here
from .placement import compute_dtype, device_name, is_fused, micro_batches_of, rows_per_rank
from .prepare import Prepared
from .ranges import phase
from .run_folder import MODEL, RUN, TOKENIZER, began_with, drop_replaced, set_aside
from .run_state import RunState
from .schedule import TrainingClock, is_quantized, lr_scale
from .shards import RowSampler, ShardError, ShardFacts, TokenStream, survey
from .signals import StopSignals
from .storage import require_writable, write_bytes, write_text

ROW_BYTES = 8
"""Of a token of a step's rows: as they are read, stacked and widened."""

SLOW = 600.0
"""Seconds that a validation, a checkpoint or the end of a run may take on a rank that the others wait for."""

SLOW_STEP = 2.0
"""Seconds a step from which several ranks agree between micro-batches on whether to stop; it takes a collective."""


class NonFiniteLoss(KloraError, RuntimeError):
    """The loss or the gradient norm is no longer a number; the weights were not updated with it."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Times in seconds of training; BPB on the validation shards, by weights that were tried.

    A BPB that is no number is left out.
    """

    status: str
    """'finished', or 'interrupted' with a checkpoint to resume from."""
    step: int
    seconds: float
    tokens: int
    parameters: int
    loss: float
    validation_bpb: dict[str, float]
    kept: str
    """Name in validation_bpb of the weights in model.safetensors; 'before' are those of the finished run that was
    resumed; empty when interrupted."""
    attention: str
    """What ran attention, and why."""
    signal: int = 0
    """Number of the signal that interrupted the run."""


class _StepCut(Exception):
    """A step ends between two of its micro-batches."""


class Trainer:
    """One training run in `folder`. With `resume`, it goes on from the checkpoint there.

    `sources` says in JSON values what the text was, for run.json and the artifact's provenance. `say` gets a line for
    people where something is worth knowing and ends nothing. `estimate` tells what a step takes.
    Raises ConfigError where the config does not fit the data, the ranks or the memory, CheckpointError where `resume`
    finds no usable state, ShardError where a shard is damaged or `resume` finds other tokens, OSError where `folder`
    cannot be written, NonFiniteLoss where training diverges. Until all that is known nothing in `folder` changes.
    """

    def __init__(
        self,
        preset: Preset,
        data: Prepared,
        folder: Path,
        ranks: Ranks,
        resume: bool = False,
        sources: dict | None = None,
        say: Callable[[str], None] = warnings.warn,
    ):
        self.preset, self.config, self.data, self.ranks = preset, preset.train, data, ranks
        self.folder = Path(folder)
        self.sources = sources or {}
        self.say = say if ranks.is_first else lambda text: None
        ranks.require_same(self._settings(resume))
        if not resume and self.folder.resolve() == data.folder.resolve():
            raise ConfigError(
                f"{folder} holds the shards, beside which the run's tokenizer would be a second one; give the run a "
                "folder of its own"
            )
        rows = rows_per_rank(preset, ranks.world)
        if data.tokenizer.vocab_size != preset.model.vocab_size:
            raise ConfigError(
                f"vocab_size={preset.model.vocab_size} is not possible; the tokenizer has {data.tokenizer.vocab_size}"
            )
        self.rows_per_rank = rows
        available = available_memory(ranks.device, processes_here())
        require_memory(least_memory(preset.model) + ROW_BYTES * rows * preset.model.train_length, available, preset)
        if ranks.is_first:
            require_writable(
                self.folder, 2 * state_bytes(preset.model)
            )  # a checkpoint is written beside the one before
        torch.manual_seed(self.config.seed)
        self.model = GPT(preset.model)
        configured = self.model.configure(ranks.device, compute_dtype(self.config, ranks.device))
        self.is_fused = is_fused(self.config, self.model)
        length, most = preset.model.train_length, max(1, self.config.micro_batch_tokens // preset.model.train_length)
        micro_batches = micro_batches_of(rows, most)
        if self.is_fused:
            memory = fused_memory(preset.model, rows // micro_batches * length)
            require_memory(memory, available, preset)
        self.attention = choose_attention(
            self.model,
            self.config.attention,
            rows // micro_batches if self.is_fused else min(rows, most),
            length,
            ranks,
            capture=self.is_fused,
            documents=self.config.document_mask,
            configured=configured,
            began=began_with(self.folder / RUN) if resume else "",
        )
        if self.is_fused:
            self.stepper = FusedStep(self.model, self.config, rows // micro_batches, micro_batches, ranks, say=self.say)
        else:
            self.stepper = EagerStep(self.model, self.config, ranks)
        self.optimizers, self.averages = self.stepper.optimizers, self.stepper.averages
        self.sampler = RowSampler(TokenStream(data.train), preset.model.train_length, self.config.seed)
        self.validation = TokenStream(data.validation)
        if len(self.validation) < 2:
            raise ConfigError(f"the validation shards hold {len(self.validation)} token; allowed: at least 2")
        self.step, self.tokens, self.loss, self.elapsed = 0, 0, math.nan, 0.0
        self.clock = TrainingClock(ranks.device)
        self.is_resumed = resume
        shards = self._survey()
        self.state = RunState(self.folder, self.stepper, self.sampler, ranks, data.folder, shards)
        if resume:
            self._load_checkpoint()
        with self.clock.held():
            if self.is_fused:
                self.estimate = Estimate(memory, available, None, None)
            else:
                self.estimate = estimate(self.model, preset, ranks.world, available, len(self.validation), self.say)
        self._pending: deque[dict[str, Any]] = deque()
        self.curve = None
        if ranks.is_first:
            if not resume:
                set_aside(self.folder, self.say)
            self._describe_run()
            text = "normalised text" if data.tokenizer.changes else ""
            self.curve = LossCurve(self.folder, resume_at=self.step, say=say, bytes_of=text)

    def _settings(self, resume: bool) -> dict[str, Any]:
        """What all ranks have to have in common, by name."""
        tokenizer = hashlib.sha256(self.data.tokenizer.to_bytes()).hexdigest()
        about = {"klora": __version__, "resume": resume, "preset": self.preset.name, "tokenizer": tokenizer}
        tokens = {
            f"tokens of {split}": len(TokenStream(paths))
            for split, paths in (("train", self.data.train), ("validation", self.data.validation))
        }
        return about | tokens | self.preset.model.to_dict() | self.config.to_dict()

    def _survey(self) -> list[ShardFacts]:
        """Facts of all shards as the first rank finds them, read once a machine. ConfigError: this one has others."""
        reads = self.ranks.is_first or self.ranks.is_first_here
        paths = [*self.data.train, *self.data.validation]
        found = survey(paths, self.data.tokenizer.vocab_size) if reads else []
        known = self.ranks.from_first(found)
        other = next((facts for facts, then in zip(found, known, strict=False) if facts[1:] != then[1:]), None)
        if other:
            raise ConfigError(
                f"rank {self.ranks.rank} is not of the first rank's run: its {self.data.folder / other.name} holds "
                "other tokens; copy the first rank's shards to every machine"
            )
        self.ranks.wait()  # before the first one changes the folder
        return known

    def run(self, progress: Callable[[dict[str, Any]], None] = lambda row: None) -> TrainResult:
        """Train to the end or to a signal. `progress` gets each row of loss.csv, once its loss is known."""
        config, step_seconds = self.config, math.inf
        with StopSignals(self.say) as stop, self.ranks.guard(self._save_last_step, lambda: stop.received):
            (elapsed,) = self.ranks.most(self.clock.seconds())
            next_validation, next_checkpoint = elapsed + config.validate_seconds, elapsed + config.checkpoint_seconds
            while not self._is_over(elapsed):
                before, scale = elapsed, lr_scale(config, self.step, elapsed)
                watched = self.ranks.world == 1 or step_seconds > SLOW_STEP
                quantized = is_quantized(config, self.step, elapsed)
                if not self._train_step(scale, quantized, stop, watched, progress):
                    self._report(self.stepper.flush(), progress)
                    (signalled,) = self.ranks.most(stop.received)
                    return self._interrupted(int(signalled)) if signalled else self._finish()
                elapsed, signalled = self.ranks.most(self.clock.seconds(), stop.received)
                self._pending[-1]["seconds"] = self.elapsed = elapsed
                self.ranks.expect()
                step_seconds = elapsed - before
                if elapsed >= next_validation and not signalled:
                    self.ranks.expect(SLOW)
                    with self.clock.held():
                        bpb = self._validate(lambda: bool(stop.received))
                    (signalled,) = self.ranks.most(stop.received)
                    if not signalled:
                        self._pending[-1]["validation_bpb"] = bpb
                    next_validation = elapsed + config.validate_seconds
                if signalled or elapsed >= next_checkpoint or not self.is_fused:
                    self._report(self.stepper.flush(), progress)
                if signalled:
                    return self._interrupted(int(signalled))
                if elapsed >= next_checkpoint:
                    with self.clock.held():
                        self._try_to_save_checkpoint()
                    next_checkpoint = elapsed + config.checkpoint_seconds
            self._report(self.stepper.flush(), progress)
            return self._finish()

    def _is_over(self, elapsed: float) -> bool:
        """Whether the clock or the number of steps ends the run; not before its first step."""
        config = self.config
        by_steps = config.max_steps and self.step >= config.max_steps
        return self.step > 0 and (elapsed >= config.seconds or bool(by_steps))

    def _train_step(
        self,
        scale: float,
        quantized: bool,
        stop: StopSignals,
        watched: bool,
        progress: Callable[[dict[str, Any]], None],
    ) -> bool:
        """Start one optimizer step over batch_tokens tokens; False where it was cut short and left out.

        Where `watched`, a signal or the cap may cut it between micro-batches. Then it is as if it had not begun; but a
        first step that the cap cuts is taken with the mean gradient of the tokens read.
        """
        config, length = self.config, self.preset.model.train_length
        position, read, book = self.sampler.state(), 0, self.state.books[-1]
        with phase("data"):
            all_rows = self.rows_per_rank * self.ranks.world
            rows = self.sampler.take_rows(all_rows, self.ranks.rank, self.ranks.world)
            self._require_known(rows)
        averaged = self.averages.weights_at(self.step + 1, scale)
        # Noted before the step, whose end no other thread sees.
        self.state.books.append(
            self.state.book(
                self.step + 1,
                self.tokens + config.batch_tokens,
                book["ema_updates"] + (averaged[0] > 0),
                book["swa_snapshots"] + (averaged[1] > 0),
            )
        )

        def batches() -> Iterator[Tensor]:
            nonlocal read
            for part in rows.split(self.stepper.rows or max(1, config.micro_batch_tokens // length)):
                self.ranks.mark()
                if watched:
                    elapsed, signalled = self.ranks.most(self.clock.seconds(), stop.received)
                    if signalled or (elapsed >= config.seconds and read and self.step):
                        raise _StepCut
                    if elapsed >= config.seconds and read and not self.is_fused:
                        return
                yield part
                read += len(part) * length * self.ranks.world

        try:
            late = self.stepper.run(batches(), self.step, scale, quantized)
        except _StepCut:
            self.sampler.load_state(position)
            self.state.books.pop()
            return False
        self._report([late] if late else [], progress)
        self.step += 1
        self.tokens = self.state.books[-1]["tokens"] = self.tokens + read
        row = {"step": self.step, "seconds": 0.0, "tokens": self.tokens, "lr_scale": scale}
        self._pending.append(row | {"momentum": self.optimizers.momentum(self.step - 1)})
        return True

    def _require_known(self, rows: Tensor) -> None:
        """ShardError for a token that no shard had when the run began."""
        if rows.max() >= self.preset.model.vocab_size:
            raise ShardError(
                f"a shard in {self.data.folder} has changed since training began: it has token {rows.max()} and the "
                f"tokenizer {self.preset.model.vocab_size} pieces; put the shards back as they were. {self._kept()}; "
                "--resume goes on from the checkpoint"
            )

    def _report(self, reports: Sequence[tuple[float, float]], progress: Callable[[dict[str, Any]], None]) -> None:
        """Write the rows of the oldest steps that have none, from their (loss, gradient norm)."""
        for loss, norm in reports:
            with self.ranks.changing():
                row = self._pending.popleft()
            self.loss = loss
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.ranks.stop_if_lost()
                if self.curve:
                    self.curve.close()
                raise NonFiniteLoss(self._explain_non_finite(row["step"], norm))
            row |= {"loss": loss, "grad_norm": norm}
            if self.curve:
                self.curve.add(**row)
            progress(row)

    def _explain_non_finite(self, step: int, norm: float) -> str:
        return (
            f"step {step} gave loss {self.loss} and gradient norm {norm}; the weights were not updated with "
            f"it. {self._kept()}. Try smaller learning rates (muon_lr, embed_lr, scalar_lr), a smaller "
            "grad_clip, or dtype=float32; --resume goes on from the checkpoint."
        )

    def _kept(self) -> str:
        saved = f"{self.state.path} (step {self.state.last})" if self.state.last else "none yet"
        return f"Last checkpoint: {saved}"

    def _validate(self, should_stop: Callable[[], bool] = lambda: False) -> float:
        config = self.config

        def should_end() -> bool:
            self.ranks.mark()
            return should_stop()

        return validation_bpb(
            self.model,
            self.validation,
            self.data.tokenizer,
            config.validate_tokens,
            config.micro_batch_tokens,
            self.ranks,
            should_end,
            config.document_mask,
        )

    def _finish(self) -> TrainResult:
        """Evaluate the last weights and both averages, keep the best, write model.safetensors."""
        seconds = self.clock.seconds()
        self._try_to_save_checkpoint()
        with self.ranks.changing():  # from here on the model holds what is compared
            self.state.books.clear()
        last = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        candidates, scores = {"last": last, **self.averages.candidates(), **self._finished_before()}, {}
        for name, weights in candidates.items():
            self.model.load_state_dict(weights)
            scores[name] = self._validate()
        scores = {name: bpb for name, bpb in scores.items() if math.isfinite(bpb)}
        if not scores:
            raise NonFiniteLoss(
                f"the validation BPB of {', '.join(candidates)} is no number. Try smaller learning rates."
            )
        kept = min(scores, key=scores.__getitem__)
        self.model.load_state_dict(candidates[kept])
        result = self._result("finished", seconds, scores, kept)
        if self.ranks.is_first:
            meta = {
                "model": self.preset.model.to_dict(),
                "tokenizer": hashlib.sha256(self.data.tokenizer.to_bytes()).hexdigest(),
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
            try:
                save_tensors(self.folder / MODEL, dict(self.model.named_parameters()), meta)
            except OSError as error:
                raise OSError(f"{error}; training is done: make space, then --resume writes the weights") from None
            drop_replaced(self.folder)
            self.curve.close()
        self.ranks.wait()
        return result

    def _finished_before(self) -> dict[str, dict[str, Tensor]]:
        """The weights that the run left when it had finished earlier, as 'before'; nothing where it had not."""
        path = self.folder / MODEL
        if not (self.is_resumed and path.is_file()):
            return {}
        try:
            weights, meta = load_tensors(path, fields={"model": dict})
        except CheckpointError as error:
            self.say(f"{error}; it is replaced")
            return {}
        return {"before": weights} if meta["model"] == self.preset.model.to_dict() else {}

    def _interrupted(self, number: int) -> TrainResult:
        seconds = self.clock.seconds()
        try:
            self._save_checkpoint()
        except OSError as error:
            raise OSError(f"{error}; {self._kept()}; make space, then --resume goes on from there") from None
        finally:
            if self.curve:
                self.curve.close()
        return self._result("interrupted", seconds, {}, "", number)

    def _result(self, status: str, seconds: float, scores: dict[str, float], kept: str, number: int = 0) -> TrainResult:
        return TrainResult(
            status=status,
            step=self.step,
            seconds=seconds,
            tokens=self.tokens,
            parameters=parameter_count(self.preset.model),
            loss=self.loss,
            validation_bpb=scores,
            kept=kept,
            attention=str(self.attention),
            signal=number,
        )

    def _describe_run(self) -> None:
        """Write what the run is, so that --resume and export need no other argument."""
        run = {
            "klora": __version__,
            "preset": self.preset.name,
            "model": self.preset.model.to_dict(),
            "train": self.config.to_dict(),
            "data": str(self.data.folder.resolve()),
            "sources": self.sources,
            "attention": self.attention._asdict(),
        }
        write_text(self.folder / RUN, json.dumps(run, indent=2) + "\n")  # first: it shows whose the other files are
        write_bytes(self.folder / TOKENIZER, self.data.tokenizer.to_bytes())

    def _try_to_save_checkpoint(self) -> None:
        """A disk that is full for now costs a checkpoint, not the run."""
        try:
            self._save_checkpoint()
        except OSError as error:
            self.say(f"no checkpoint of step {self.step} ({error}); training goes on. {self._kept()}")
            self.ranks.wait()

    def _save_checkpoint(self) -> None:
        self.ranks.expect(SLOW)
        if self.ranks.is_first:
            averages = self.averages
            with self.ranks.changing():
                book = self.state.book(self.step, self.tokens, averages.ema_updates, averages.swa_snapshots)
                self.state.write(book, self.clock.seconds(), self.loss)
            self.curve.draw()
        self.ranks.wait()
        self.state.last = self.step

    def _save_last_step(self) -> str:
        """Keep the state after the last finished step, whatever the main thread waits for; what is kept, for people.

        The watch calls it, with `changing` held.
        """
        return self.state.save_last(self.elapsed, self.loss, self._report_finished)

    def _report_finished(self, step: int) -> None:
        """Add the rows up to `step` that loss.csv lacks."""
        rows, results = [row for row in self._pending if row["step"] <= step], self.stepper.finished()
        if self.curve and len(rows) <= len(results):  # else the main thread has taken the oldest
            for row, (loss, norm) in zip(rows, results, strict=False):
                self.curve.add(**row | {"seconds": row["seconds"] or self.elapsed, "loss": loss, "grad_norm": norm})

    def _load_checkpoint(self) -> None:
        meta = self.state.load()
        self.step, self.loss, self.elapsed = meta["step"], meta["loss"], meta["seconds"]
        self.tokens = meta.get("tokens", self.step * self.config.batch_tokens)
        self.clock = TrainingClock(self.ranks.device, self.elapsed)
        self.state.books.append(self.state.book(self.step, self.tokens, meta["ema_updates"], meta["swa_snapshots"]))
