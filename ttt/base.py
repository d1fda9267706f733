"""The base pass: what the unadapted model says of every target, thousands of documents in a few large batches.

Documents are cut into the windows in which the adapted model sees them; in the layout `original` those of fewer than
`min_tokens` tokens are windows of their own. In the layout `start` these are windows that advance by `chunk` and score
their last `chunk` targets; the first scores all that it holds. `context` changes nothing here: the base model reads
every window anew. Windows are padded to a multiple of PAD and those of one padded length share a batch, so that a
window's arithmetic does not depend on the rest of its batch. Indices, tokens and results stay on the device: nothing
waits for it until all results are read.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels import softcap_nll
from ..model import network
from ..model.gpt import GPT
from ..model.weights import Weights, frozen_weights
from .documents import Document, Windows, chunk_windows
from .hf_model import HfModel
from .protocols import START, TTTConfig

MICRO_TOKENS = {"cpu": 8192, "cuda": 131072}
"""Tokens in one forward, by device type: what fits in cache, and what keeps a GPU ahead of the launches (NVIDIA H200,
3.8 million tokens of `seed`: 1.66 s; at 65,536 2.28 s, at 524,288 1.60 s; tuning/scoring-1.txt)."""

PAD = 64
"""Windows are padded to a multiple of this."""

KEEP_SECONDS = 60.0
"""How much of the pass a kill can cost. What is kept is 8 bytes a token, read from the device and written whole."""


class BaseNll:
    """Per-target NLL of the unadapted model over a set of documents, at temperature 1 and at the adapted one.

    `nll` and `tempered` are fp32 arrays over the concatenation of all documents; `of` sums a document's part from its
    target `start` on, in float64. The adapted temperature is that of each target: 1 before the first that a step could
    change. `is_short` says which documents are not adapted. `tick` gets the number of targets sent to the device so
    far. `backend` is handed to the ops; a float64 model, which no kernel takes, runs on the reference.

    `known` is what an interrupted pass over the same documents had found: fp32 [2, n] over their concatenation, NaN for
    targets that it had not reached. A window whose targets are all known is not computed again. `keep` gets such an
    array every KEEP_SECONDS, before an exception of `tick` goes on, and at the end. Windows for which a GPU has not the
    memory go in two halves, which `say` hears of.
    """

    def __init__(
        self,
        model: GPT | Weights | HfModel,
        documents: Sequence[Document],
        config: TTTConfig,
        tick: Callable[[int], None] = lambda targets: None,
        backend: str | None = None,
        known: np.ndarray | None = None,
        keep: Callable[[np.ndarray], None] = lambda nll: None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.config = config
        targets = np.array([document.targets for document in documents], dtype=np.int64)
        self.offsets = np.cumsum(targets + 1) - (targets + 1)
        self.targets = targets
        self.is_short = ~config.adapts(targets)
        plans = self._plans()
        device = model.device
        tokens = np.concatenate([document.tokens for document in documents] or [np.zeros(0)]).astype(np.int32)
        on_device = torch.from_numpy(tokens).to(device)
        # The last cell takes what does not exist.
        record = torch.full((2, len(tokens) + 1), torch.nan, device=device)
        if known is not None:
            record[:, :-1] = torch.from_numpy(known)
            plans = [(_unknown(windows, known), longest, temperature) for windows, longest, temperature in plans]
        record[:, torch.from_numpy(self.offsets)] = 0.0  # BOS is no target

        def found() -> np.ndarray:
            return record[:, :-1].cpu().numpy()

        done = int(targets.sum()) - sum(int((windows.length - windows.first).sum()) for windows, _, _ in plans)
        kept_at, is_new = time.monotonic(), False
        for windows, longest, temperature in plans:
            if isinstance(model, HfModel):
                reader: Reader = model
            else:
                # Tables for the windows that there are: `longest` may be a bound that no document comes near.
                most = -(-int(windows.length.max(initial=1)) // PAD) * PAD
                reader = _Reader(frozen_weights(model), most, longest, backend)
            for targets_sent in _score(reader, on_device, record, windows, temperature, say):
                done, is_new = done + targets_sent, True
                try:
                    tick(done)
                except Exception:
                    keep(found())
                    raise
                if time.monotonic() - kept_at > KEEP_SECONDS:
                    keep(found())
                    kept_at = time.monotonic()
        self.nll, self.tempered = nll = found()
        if is_new:
            keep(nll)
        if config.temperature_of(0) != config.temperature:
            early = _positions(targets) <= config.first_adapted
            self.tempered[early] = self.nll[early]

    def _plans(self) -> list[tuple[Windows, int, float]]:
        """Windows, the length whose rotary base is theirs, and the temperature."""
        config, targets, offsets = self.config, self.targets, self.offsets
        if config.layout == START:
            windows = chunk_windows(targets, offsets, config)
            whole = windows.first == 0  # apart, so that no batch computes the head for all because of one
            return [(_select(windows, part), config.window, config.temperature) for part in (whole, ~whole)]
        whole, long = Windows(offsets, targets, np.zeros_like(targets)), ~self.is_short
        return [
            (_select(whole, self.is_short & (targets > 0)), config.min_tokens, 1.0),
            (chunk_windows(targets[long], offsets[long], config), config.window, config.temperature),
        ]

    def of(self, index: int, start: int = 0) -> tuple[float, float]:
        """(nats, nats at the adapted temperature) of document `index` from its target `start` on."""
        begin, end = self.offsets[index] + 1 + start, self.offsets[index] + 1 + self.targets[index]
        return float(self.nll[begin:end].sum(dtype=np.float64)), float(self.tempered[begin:end].sum(dtype=np.float64))


class Reader(Protocol):
    """A model as the base pass reads it. `micro_tokens` is how many tokens a forward may have."""

    micro_tokens: int

    def hidden(self, inputs: Tensor, tail: int) -> Tensor:
        """What :meth:`nll` takes, of the last `tail` of `inputs` int [B, S]."""

    def nll(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """NLL [B, tail] of `targets` int [B, tail]; 0 where a target is -100."""


class _Reader:
    """Our own model, for windows of up to `most` inputs, with the rotary base of `longest`."""

    def __init__(self, weights: Weights, most: int, longest: int, backend: str | None):
        self.weights, self.tables = weights, weights.rotary(most, longest)
        self.backend = backend or ("reference" if weights.dtype == torch.float64 else None)
        self.micro_tokens = MICRO_TOKENS[weights.device.type]

    def hidden(self, inputs: Tensor, tail: int) -> Tensor:
        cos, sin = (table[: inputs.size(1)].contiguous() for table in self.tables)
        return network.hidden(self.weights, inputs, (cos, sin), tail=tail, backend=self.backend)

    def nll(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        softcap = self.weights.config.logit_softcap
        return softcap_nll(hidden, self.weights.head, targets, softcap, temperature, backend=self.backend)


@torch.no_grad()
def _score(
    reader: Reader,
    tokens: Tensor,
    record: Tensor,
    windows: Windows,
    temperature: float,
    say: Callable[[str], None],
) -> Iterator[int]:
    """Write the NLL of every target of `windows` into `record`, at temperature 1 and at `temperature`."""
    device = tokens.device
    start, length, first = (
        torch.from_numpy(a).to(device)[:, None] for a in (windows.start, windows.length, windows.first)
    )

    def compute(rows: np.ndarray, padded: int) -> None:
        tail = padded - int(windows.first[rows].min())
        chosen = torch.from_numpy(rows).to(device)
        begin, end, scored_from = start[chosen], length[chosen], first[chosen]
        column = torch.arange(padded, device=device)
        # Inputs past a window's end repeat its last one: nothing that is scored reads them.
        inputs = tokens[begin + torch.minimum(column, end - 1)]
        hidden = reader.hidden(inputs, tail)
        scored = column[padded - tail :]
        exists = (scored >= scored_from) & (scored < end)
        at = begin + torch.minimum(scored, end - 1) + 1
        targets = torch.where(exists, tokens[at], -100)
        place = torch.where(exists, at, record.size(1) - 1).flatten()
        for divisor in dict.fromkeys((1.0, temperature)):
            nll = reader.nll(hidden, targets, divisor)
            into = record[0 if divisor == 1.0 else 1 :]
            into.index_copy_(1, place, nll.flatten().float().expand(len(into), -1))

    def fits(rows: np.ndarray, padded: int) -> bool:
        """Compute; whether the GPU had the memory for it."""
        try:
            compute(rows, padded)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            return False
        return True

    # Several threads of a CPU share out a product's rows by how many there are: a batch would change the last bits.
    most = 1 if device.type == "cpu" and torch.get_num_threads() > 1 else reader.micro_tokens
    waiting = list(_batches_of_one_length(windows.length, most))[::-1]
    while waiting:
        rows, padded = waiting.pop()
        if len(rows) * padded > most and len(rows) > 1:
            waiting += [(half, padded) for half in np.array_split(rows, 2)[::-1]]
        elif fits(rows, padded):
            yield int((windows.length[rows] - windows.first[rows]).sum())
        else:
            torch.cuda.empty_cache()
            most = len(rows) * padded // 2
            say(f"the GPU's memory ran out with {len(rows) * padded:,} tokens at a time; going on with {most:,}")
            waiting.append((rows, padded))


def _positions(targets: np.ndarray) -> np.ndarray:
    """The place of every token in its document, BOS at 0, of documents one after the other."""
    sizes = targets + 1
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _select(windows: Windows, keep: np.ndarray) -> Windows:
    return Windows(windows.start[keep], windows.length[keep], windows.first[keep])


def _unknown(windows: Windows, known: np.ndarray) -> Windows:
    """The windows with any target of which `known` [2, n] does not say both NLLs."""
    missing = np.concatenate([[0], np.cumsum(np.isnan(known).any(0))])
    return _select(windows, missing[windows.start + windows.length + 1] > missing[windows.start + windows.first + 1])


def _batches_of_one_length(lengths: np.ndarray, micro_tokens: int) -> Iterator[tuple[np.ndarray, int]]:
    """Indices of windows whose padded length is the same, at most `micro_tokens` tokens at a time, and that length."""
    padded = -(-lengths // PAD) * PAD
    order = np.argsort(padded, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(padded[order])) + 1):
        if len(group):
            length = int(padded[group[0]])
            rows = max(1, micro_tokens // length)
            for begin in range(0, len(group), rows):
                yield group[begin : begin + rows], length
