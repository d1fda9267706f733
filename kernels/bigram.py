"""BigramHash: the row of a hash table that stands for (previous token, token).

    hash_i = ((36313 * t_i) xor (27191 * t_{i-1})) mod (rows - 1)        row rows-1 where t_i has no previous token

tokens [..., S] integer -> rows [..., S] int64. A token has no previous one at the start of the input and where it is
BOS itself: nothing of one document reaches the next. Moves 16 bytes a token.
"""

import torch
from torch import Tensor

BOS_ID = 1
"""Token id that starts a document."""


def bigram_hash_ref(tokens: Tensor, rows: int, previous: Tensor | None = None) -> Tensor:
    """Rows int64 [..., S] of the hash table for `tokens`, any integer dtype [..., S]. No gradient.

    `rows`, at least 2, is the size of the table; its last row is for a token without a previous one. `previous` int
    [...] is the token before the first, if the caller knows it.

    Example: hashed = bigram_hash_ref(tokens, rows=64)
    """
    tokens = tokens.long()
    before = torch.empty_like(tokens)
    before[..., 1:] = tokens[..., :-1]
    before[..., :1] = -1 if previous is None else previous[..., None]
    rows_hashed = torch.bitwise_xor(36313 * tokens, 27191 * before) % (rows - 1)
    return torch.where((before < 0) | (tokens == BOS_ID), rows - 1, rows_hashed)
