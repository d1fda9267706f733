"""What the unadapted models say of a run's documents: the NLL of every target, and a draft of each result.

The NLL stands in arrays that the journal has, over the concatenation of the run's documents. A pass computes what they
lack, whichever documents it is asked for, so that an interrupted pass goes on where it stopped.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..model.storage import attempt
from ..model.weights import Weights
from .base import BaseNll
from .documents import Document
from .hf_model import HfModel
from .journal import Journal
from .progress import ScoringProgress
from .protocols import TTTConfig
from .results import DocumentResult, unadapted


class Drafts:
    """Results as the base model leaves them, by the document's index in `results`, and the NLL that they come from.

    `models` are the unadapted models by phase: "base" and, where it is scored beside it, "prequant". `group_of` says
    of which group each document is. With `keeps` the journal stores the passes on disk, too; `say` hears where it
    cannot.
    """

    def __init__(
        self,
        models: dict[str, Weights | HfModel],
        documents: Sequence[Document],
        config: TTTConfig,
        group_of: Mapping[int, int],
        journal: Journal,
        progress: ScoringProgress,
        keeps: bool,
        say: Callable[[str], None],
    ):
        self.models, self.documents, self.config, self.group_of = models, documents, config, group_of
        self.journal, self.progress, self.keeps, self.say = journal, progress, keeps, say
        sizes = np.array([len(document.tokens) for document in documents], dtype=np.int64)
        self.ends = np.cumsum(sizes)
        self.begins = self.ends - sizes
        self.results: dict[int, DocumentResult] = {}

    def make(self, indices: Sequence[int], tick: Callable[[str, int, int], None]) -> None:
        """Draft the results of documents; `tick` gets (phase, targets done, targets in all).

        NonFiniteScore where an NLL is no number.
        """
        for phase, model in self.models.items():
            with self.progress.timed(phase):
                self._pass(phase, model, indices, tick)
        for index in indices:
            before = self.nats("prequant", index)[0] if "prequant" in self.models else None
            self.results[index] = unadapted(
                self.documents[index], self.config, self.nats("base", index), before, self.group_of[index]
            )

    def nats(self, phase: str, index: int, start: int = 0) -> tuple[float, float]:
        """(nats, nats at the adapted temperature) of a document from its target `start` on."""
        nll = self._nll(phase)[:, self.begins[index] + 1 + start : self.ends[index]]
        return float(nll[0].sum(dtype=np.float64)), float(nll[1].sum(dtype=np.float64))

    def target_nll(self, index: int) -> np.ndarray:
        """The base model's NLL of every target of a document: a view, fp32 [targets]."""
        return self._nll("base")[0, self.begins[index] + 1 : self.ends[index]]

    def _pass(
        self, phase: str, model: Weights | HfModel, indices: Sequence[int], tick: Callable[[str, int, int], None]
    ) -> None:
        """One unadapted model's NLL of documents, into the journal's array; what that holds is not computed again."""
        if not indices:
            return
        documents, kept = [self.documents[index] for index in indices], self._nll(phase)
        cells = np.concatenate([np.arange(self.begins[index], self.ends[index]) for index in indices])
        total = sum(document.targets for document in documents)

        def keep(nll: np.ndarray) -> None:
            kept[:, cells] = nll
            if self.keeps:
                attempt("the copy of the base pass for --resume", lambda: self.journal.keep_base(phase), self.say)

        found = BaseNll(
            model,
            documents,
            self.config,
            lambda done: tick(phase, done, total),
            known=kept[:, cells],
            keep=keep,
            say=self.say,
        )
        kept[:, cells] = found.nll, found.tempered

    def _nll(self, phase: str) -> np.ndarray:
        """A pass of an unadapted model: fp32 [2, tokens] at both temperatures, over the run's documents."""
        return self.journal.base(phase, int(self.ends[-1]))
