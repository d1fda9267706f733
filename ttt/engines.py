"""What adapts the documents of a run: the engine, captured or not, with as many places as the GPU has memory for."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..model.config import ConfigError
from ..model.weights import Weights
from .documents import Document
from .engine import ROWS, Engine, engine_of
from .engine_memory import memory_of
from .hf_model import HfModel
from .protocols import TARGETS, TTTConfig
from .schedule import queues_of

ENGINE, UNCAPTURED = "engine", "uncaptured"
SCORERS = ("auto", ENGINE, UNCAPTURED)
"""engine: fused kernels in CUDA graphs; uncaptured: the same steps without graphs, for debugging and for a CPU, with
the same bits. auto: the engine on a GPU, elsewhere uncaptured."""

CPU_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Numbers of places that steps are made for on a CPU, where an empty place costs as much as a full one and a step that
is not captured costs nothing to make."""

WHOLE_ROWS = 4
"""Rows that the products of a CPU's library take at a time. Windows of 1, 2 and 3 tokens and LoRAs of rank 1 had other
bits in a batch than alone; from 4 tokens on no size that was tried had (AMD EPYC, MKL, with and without vector
extensions: bench/results/cpu/batch-bits-1.txt). What is no multiple of 4 is not trusted all the same: another library
may take the last rows otherwise."""


def pick_scorer(scorer: str, device: torch.device) -> str:
    """The scorer that `scorer` means on `device`; ConfigError where there is none."""
    if scorer == "eager":
        raise ConfigError("scorer='eager' is gone: the engine scores on a CPU, too; allowed: auto, uncaptured")
    if scorer not in SCORERS:
        raise ConfigError(f"scorer={scorer!r} is not possible; allowed: {', '.join(SCORERS)}")
    if scorer == ENGINE and device.type != "cuda":
        raise ConfigError(f"scorer='engine' is not possible on {device}: graphs want a GPU; allowed: auto, uncaptured")
    return (ENGINE if device.type == "cuda" else UNCAPTURED) if scorer == "auto" else scorer


class Engines:
    """Makes the engines of a run: each time the GPU's memory runs out, the next one with half as many places.

    `scorer` is what :func:`pick_scorer` gave, `all_documents` are those of the run: with phases one engine takes them
    all, and has the shared adapter. `learnt` is the number of groups that this adapter has learned from; a smaller
    engine begins at 0. `facts` are those of the engines that :meth:`note` got.
    """

    def __init__(
        self,
        scorer: str,
        model: Weights | HfModel,
        config: TTTConfig,
        all_documents: Sequence[Document],
        say: Callable[[str], None],
    ):
        self.scorer, self.model, self.config, self.all_documents, self.say = scorer, model, config, all_documents, say
        self.facts: dict[str, Any] = {}
        self.learnt = 0
        self._engine: Engine | None = None

    @property
    def is_on_cpu(self) -> bool:
        """Whether there is no device to wait for."""
        return self.model.device.type == "cpu"

    def fits(self, documents: Sequence[Document], work: Callable[[Engine], None]) -> bool:
        """Do `work` with an engine for these documents; whether the GPU had the memory for it.

        If not, the next engine has half as many places, which changes no score. With phases the shared adapter is gone
        with its engine, and has to learn again what it had learned. OutOfMemoryError where one place is too many.
        """
        batch = self.config.batch
        try:
            engine = self._engine_for(documents)
            batch = engine.facts["batch"]
            work(engine)
            return True
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise
            why = str(error).partition("\n")[0]
        engine = self._engine = None
        self.learnt = 0
        self.config = self.config.override({"batch": batch // 2})
        gc.collect()
        torch.cuda.empty_cache()
        self.say(
            f"the GPU's memory ran out with {batch} documents side by side; going on with {batch // 2}, which changes "
            f"no score ({why})"
        )
        return False

    def note(self, engine: Engine) -> None:
        """Take an engine that has adapted its documents into `facts`."""
        if self.config.phases:  # one engine for all groups, whose facts of a run are those of the last one
            added = "rounds", "seconds", "handing_over_seconds"
            sums = {name: self.facts.get(name, 0) + engine.facts[name] for name in added}
            self.facts = {**engine.facts, **sums}
            del self.facts["useful_places"]
        elif not self.facts or engine.facts["batch"] < self.facts["batch"]:
            self.facts = engine.facts

    def _batch_changes_bits(self) -> bool:
        """Whether a batch could change the last bits of a score on this CPU.

        Several threads share out a product's rows by how many there are. On one, too, the last rows and a single column
        go another way.
        """
        sizes = {self.config.chunk, *(queue.length for queue in queues_of(self.config))}
        ranks = {self.config.rank(target) for target in TARGETS}
        return torch.get_num_threads() > 1 or any(size % WHOLE_ROWS for size in sizes) or 1 in ranks

    def _engine_for(self, documents: Sequence[Document]) -> Engine:
        """An engine for these documents; with phases one for all documents, which has the shared adapter."""
        if self._engine is not None:
            return self._engine
        rows, capture = CPU_ROWS if self.is_on_cpu else ROWS, False if self.scorer == UNCAPTURED else None
        held = self.all_documents if self.config.phases else documents
        config = self.config
        if self.is_on_cpu:
            most = 1 if self._batch_changes_bits() else max(len(held), 1)
            config = config.override({"batch": min(config.batch, most)})
        engine = engine_of(self.model, config, held, rows=rows, capture=capture)
        self.say(memory_of(engine.facts))
        if self.config.phases:
            self._engine = engine
        return engine
