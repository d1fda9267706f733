"""Bits per byte of a model on validation shards, row by row.

    BPB = sum of NLL over scored targets / ln 2 / bytes of their text

The rows are train_length tokens wide and do not overlap; a BOS target is not scored. Sums in float64. The text is the
one that the shards hold: of a tokenizer that normalises, the normalised text.
"""

import math
from collections.abc import Callable

import torch

from ..kernels import BOS_ID
from ..kernels.attention import document_starts
from .gpt import GPT
from .parallel import Ranks
from .shards import TokenStream
from .tokenizer import Tokenizer


@torch.no_grad()
def validation_bpb(
    model: GPT,
    stream: TokenStream,
    tokenizer: Tokenizer,
    most_tokens: int,
    micro_batch_tokens: int,
    ranks: Ranks,
    should_stop: Callable[[], bool] = lambda: False,
    document_mask: bool = False,
) -> float:
    """BPB over the first `most_tokens` tokens of `stream` (0: all), shared between the ranks.

    With `document_mask`, no token sees another document than its own. Where `should_stop` says so between two
    micro-batches, the rest is left out and the number is of no use. TokenizerError for tokens whose bytes of text are
    unknown.
    """
    length = min(model.config.train_length, len(stream) - 1)
    rows = (len(stream) - 1) // length
    if most_tokens:
        rows = min(rows, max(1, most_tokens // length))
    batch = max(1, micro_batch_tokens // length)
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(ranks.rank * batch, rows, ranks.world * batch):
        if should_stop():
            break
        count = min(batch, rows - start)
        tokens = stream.tokens(start * length, (start + count) * length + 1)
        tokenizer.require_known(tokens, "the validation text")
        bytes_of = torch.from_numpy(tokenizer.target_bytes(tokens)).view(count, length)
        tokens = torch.from_numpy(tokens.astype("int64"))
        targets = tokens[1:].view(count, length)
        inputs = tokens[:-1].view(count, length).to(ranks.device)
        start = document_starts(inputs, BOS_ID) if document_mask else None
        nll = model.nll(inputs, targets.to(ranks.device), start=start).cpu().double()
        sums += torch.stack([nll[targets != tokenizer.bos_id].sum(), bytes_of.sum().double()])
    nats, text_bytes = ranks.sum_(sums.to(ranks.device)).tolist()
    return nats / math.log(2) / max(text_bytes, 1)
