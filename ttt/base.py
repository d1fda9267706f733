"""The base pass: what the unadapted model says of every target, thousands of documents in a few large batches.

Documents of fewer than `min_tokens` tokens are windows of their own; longer ones are cut into the windows in which the
adapted model sees them. Windows are padded to a multiple of PAD and those of one padded length share a batch, so that a
window's arithmetic does not know its batch mates. Indices, tokens and results stay on the device: nothing waits for it
until all results are read.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels import softcap_nll
from ..model.gpt import GPT
from .documents import Document, Windows, chunk_windows
from .protocols import TTTConfig
from .step import FrozenModel

MICRO_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Tokens in one forward, by device type: what fits in cache, and what fills a GPU."""

PAD = 64
"""Windows are padded to a multiple of this."""


class BaseNll:
    """Per-target NLL of the unadapted model over a set of documents, at temperature 1 and at the adapted one.

    `nll` and `tempered` are fp32 arrays over the concatenation of all documents; `of` sums a document's part from its
    target `start` on, in float64. `is_short` says which documents have fewer than `min_tokens` tokens. `tick`
    gets the number of targets sent to the device so far. `backend` is handed to the ops; a float64 model, which no
    kernel takes, runs on the reference.
    """

    def __init__(
        self,
        model: GPT | FrozenModel,
        documents: Sequence[Document],
        config: TTTConfig,
        tick: Callable[[int], None] = lambda targets: None,
        backend: str | None = None,
    ):
        self.config = config
        targets = np.array([document.targets for document in documents], dtype=np.int64)
        self.offsets = np.cumsum(targets + 1) - (targets + 1)
        self.targets = targets
        self.is_short = targets + 1 < config.min_tokens
        long = ~self.is_short
        whole = Windows(self.offsets, targets, np.zeros_like(targets))
        plans = [
            (_select(whole, self.is_short & (targets > 0)), config.min_tokens, 1.0),
            (
                chunk_windows(targets[long], self.offsets[long], config.chunk, config.window),
                config.window,
                config.temperature,
            ),
        ]
        frozen = model if isinstance(model, FrozenModel) else FrozenModel(model)
        device = frozen.embed.device
        backend = backend or ("reference" if frozen.dtype == torch.float64 else None)
        tokens = np.concatenate([document.tokens for document in documents] or [np.zeros(0)]).astype(np.int32)
        on_device = torch.from_numpy(tokens).to(device)
        # The last cell takes what does not exist.
        record = torch.zeros(2, len(tokens) + 1, device=device)
        done = 0
        for windows, longest, temperature in plans:
            for targets_sent in _score(frozen, on_device, record, windows, longest, temperature, backend):
                done += targets_sent
                tick(done)
        self.nll, self.tempered = record[:, :-1].cpu().numpy()

    def of(self, index: int, start: int = 0) -> tuple[float, float]:
        """(nats, nats at the adapted temperature) of document `index` from its target `start` on."""
        begin, end = self.offsets[index] + 1 + start, self.offsets[index] + 1 + self.targets[index]
        return float(self.nll[begin:end].sum(dtype=np.float64)), float(self.tempered[begin:end].sum(dtype=np.float64))


@torch.no_grad()
def _score(
    model: FrozenModel,
    tokens: Tensor,
    record: Tensor,
    windows: Windows,
    longest: int,
    temperature: float,
    backend: str | None,
) -> Iterator[int]:
    """Write the NLL of every target of `windows` into `record`, at temperature 1 and at `temperature`."""
    device = tokens.device
    # Tables for the windows that there are: `longest` may be a bound that no document comes near.
    cos, sin = model.model.rotary(-(-int(windows.length.max(initial=1)) // PAD) * PAD, longest)
    start, length, first = (
        torch.from_numpy(a).to(device)[:, None] for a in (windows.start, windows.length, windows.first)
    )
    for rows, padded in _batches_of_one_length(windows.length, MICRO_TOKENS[device.type]):
        tail = padded - int(windows.first[rows].min())
        chosen = torch.from_numpy(rows).to(device)
        begin, end, scored_from = start[chosen], length[chosen], first[chosen]
        column = torch.arange(padded, device=device)
        # Inputs past a window's end repeat its last one: nothing that is scored reads them.
        inputs = tokens[begin + torch.minimum(column, end - 1)]
        hidden = model.hidden(inputs, (cos[:padded].contiguous(), sin[:padded].contiguous()), tail, backend=backend)
        scored = column[padded - tail :]
        exists = (scored >= scored_from) & (scored < end)
        at = begin + torch.minimum(scored, end - 1) + 1
        targets = torch.where(exists, tokens[at], -100)
        place = torch.where(exists, at, record.size(1) - 1).flatten()
        for out, heat in zip(record, (1.0, temperature), strict=True):
            nll = softcap_nll(hidden, model.head, targets, model.config.logit_softcap, heat, backend=backend)
            out.index_copy_(0, place, nll.flatten().float())
        yield int((windows.length[rows] - windows.first[rows]).sum())


def _select(windows: Windows, keep: np.ndarray) -> Windows:
    return Windows(windows.start[keep], windows.length[keep], windows.first[keep])


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
