"""What a checkpoint holds of a training run, written and read."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .checkpoint import (
    CheckpointError,
    load_tensors,
    require_counts,
    save_tensors,
    unusable,
    version_of,
    with_prefix,
    without_prefix,
)
from .eager import EagerStep
from .fused import AHEAD, FusedStep
from .parallel import Ranks
from .run_folder import CHECKPOINT, RUN
from .shards import RowSampler, ShardError, ShardFacts

FIELDS = {"step": int, "seconds": float, "loss": float, "sampler": dict, "model": dict} | {
    "ema_updates": int,
    "swa_snapshots": int,
    "shards": list,
}


class RunState:
    """The state of a run in `folder`: what `stepper` changes, and how far `sampler` has read the `shards` of `data`.

    `books` have what is no tensor of the state after each of the latest steps. `last` is the step of the checkpoint
    that is there, 0 where there is none.
    """

    def __init__(
        self,
        folder: Path,
        stepper: FusedStep | EagerStep,
        sampler: RowSampler,
        ranks: Ranks,
        data: Path,
        shards: list[ShardFacts],
    ):
        self.folder, self.ranks = folder, ranks
        self.sampler, self.data, self.shards = sampler, data, shards
        self.stepper, self.model = stepper, stepper.model
        self.optimizers, self.averages = stepper.optimizers, stepper.averages
        self.last = 0
        self.books: deque[dict[str, Any]] = deque([self.book(0, 0, 0, 0)], maxlen=AHEAD + 2)
        self._beside = torch.cuda.Stream(ranks.device) if ranks.watch and ranks.device.type == "cuda" else None

    @property
    def path(self) -> Path:
        return self.folder / CHECKPOINT

    def book(self, step: int, tokens: int, ema_updates: int, swa_snapshots: int) -> dict[str, Any]:
        """What is no tensor of the state after `step` steps, which have read what the sampler has given."""
        counts = {"step": step, "tokens": tokens, "ema_updates": ema_updates, "swa_snapshots": swa_snapshots}
        return {**counts, "sampler": self.sampler.state()}

    def write(self, book: dict[str, Any], seconds: float, loss: float) -> None:
        """Write the tensors as they are, and `book`, as the checkpoint."""
        tensors = {
            **with_prefix("model", dict(self.model.named_parameters())),
            **with_prefix("optimizer", self.optimizers.state_tensors()),
            **with_prefix("ema", self.averages.ema),
            **with_prefix("swa", self.averages.swa if book["swa_snapshots"] else {}),
        }
        about = {"seconds": seconds, "loss": loss, "shards": self.shards, "model": self.model.config.to_dict()}
        save_tensors(self.path, tensors, book | about)

    def save_last(self, seconds: float, loss: float, written: Callable[[int], None]) -> str:
        """Write the state after the last finished step as the checkpoint, whatever the main thread waits for.

        No step changes anything any more. On a GPU steps may be under way that will never end. Therefore AdamW's own
        count says which step was the last, and copies take a stream beside them. `written` gets the step. Returns what
        is kept, for people.
        """
        why = ""
        again = f"`klora train --resume --out {self.folder}` goes on from there, on any number of GPUs"
        with torch.cuda.stream(self._beside) if self._beside else nullcontext():
            state = self.optimizers.state_tensors()
            steps = {int(tensor.cpu()) for name, tensor in state.items() if name.endswith("/step")}
            step, book = max(steps, default=0), next((book for book in self.books if book["step"] in steps), None)
            if step == 0:
                return "No step was finished; the same command starts again"
            if len(steps) > 1 or {name.rpartition("/")[0] for name in state} != set(self.optimizers.names.values()):
                why = "a part of the optimizer's state lay on another rank"
            elif step != self.last and book is None:
                why = "the averages were being compared"
            elif not (self.folder / RUN).is_file():
                why = f"{self.folder} of this machine is not the run's"
            elif step != self.last:
                try:
                    self.write(book, seconds, loss)
                    self.last = step
                    written(step)
                except OSError as error:
                    why = str(error)
        if not why:
            return f"The state after step {step} is in {self.path}; {again}"
        lost = f"The state after step {step} could not be kept ({why})"
        if not self.last:
            return f"{lost}, and there is no checkpoint yet; the same command starts again"
        return f"{lost}; {self.path} has that after step {self.last}: {again}"

    def load(self) -> dict[str, Any]:
        """Take the state of the checkpoint that is there; what it has beside tensors.

        CheckpointError: it is not usable. ShardError: it was trained on other tokens.
        """
        tensors, meta = load_tensors(self.path, fields=FIELDS)
        if meta["model"] != self.model.config.to_dict():
            raise CheckpointError(f"{self.path} holds another model than run.json describes; start the run afresh")
        tokens = {"tokens"} & meta.keys()
        require_counts(self.path, meta, ("step", "ema_updates", "swa_snapshots", *tokens), ("seconds",))
        if self.ranks.is_first:
            self._require_same_shards(meta["shards"])
        optimizer = without_prefix("optimizer", tensors)
        try:
            self.model.load_state_dict(without_prefix("model", tensors))
            self.stepper.refresh()
            # AdamW counts its steps in a CPU tensor, whatever the device of the moments.
            self.optimizers.load_state_tensors(
                {name: t if name.endswith("/step") else t.to(self.ranks.device) for name, t in optimizer.items()}
            )
            self.averages.load(without_prefix("ema", tensors), without_prefix("swa", tensors), meta)
            self.sampler.load_state(meta["sampler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ShardError):
                raise
            raise unusable(self.path, error, version_of(self.path)) from None
        self.last = meta["step"]
        return meta

    def _require_same_shards(self, known: list) -> None:
        """ShardError unless the shards are those that the checkpoint was trained on, token for token."""
        found = [tuple(facts) for facts in self.shards]
        try:
            known = [tuple(ShardFacts(*facts)) for facts in known]
        except TypeError as error:
            raise unusable(self.path, error, version_of(self.path)) from None
        if known == found:
            return
        now = next((facts for facts, then in zip(found, known, strict=False) if facts != then), None)
        what = f"{now[0]} holds other tokens" if now else f"{self.data} holds {len(found)} shards, not {len(known)}"
        raise ShardError(
            f"{what} than the run was trained on; put the shards back as they were, or start the run afresh with "
            "--overwrite"
        )
