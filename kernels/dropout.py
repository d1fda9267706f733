"""Dropout by a counter: which element is kept follows from its row's key and its place, and from no generator.

    kept(key, e)   mix(mix(e + key) + mix(key + GOLDEN)) >= rate 2^32        e = s K + k, sums modulo 2^32

for element (s, k) of a row [S, K]. The kernels' is `kept` of `lora_linear`. So a mask depends on nothing else, and who
computes it again gets the same bits: a backward, a block that is recomputed, another batch. mix is a bijection of 32
bits in which each bit changes about half of the others (lowbias32).
"""

from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
"""Added so that keys of zeros are no fixed point of the hash."""
FIRST, SECOND = 0x7FEB352D, 0x846CA68B


class Dropout(NamedTuple):
    """Elements are dropped at `rate`, from 0 to below 1, by `keys` int64 [B] of :func:`row_keys`; those that are kept
    are divided by 1 - rate. Where several inputs are dropped, `keys` has one tensor for each.

    Example: dropout = Dropout(0.1, row_keys(7, slots))
    """

    rate: float
    keys: Tensor | list[Tensor]


def row_keys(*parts: Tensor | int) -> Tensor:
    """int64 [B]: what draws the mask of each row, a hash of all `parts`, numbers or integers [B] of which one has to be
    a tensor.

    Example: keys = row_keys(7, slots)
    """
    like = next(part for part in parts if isinstance(part, Tensor))
    keys = torch.zeros(like.shape, dtype=torch.int64, device=like.device)
    for part in parts:
        keys = _mix(keys + part + GOLDEN)
    return keys


def threshold(rate: float) -> int:
    """Elements whose bits are below it are dropped."""
    return min(round(rate * 2**32), 2**32 - 1)


def drop_ref(x: Tensor, rate: float, keys: Tensor) -> Tensor:
    """`x` [B, S, K] with its elements dropped at `rate` by `keys` int64 [B], the others divided by 1 - rate.

    Example: dropped = drop_ref(x, 0.1, row_keys(slots))
    """
    elements = torch.arange(x.shape[1:].numel(), device=x.device).view(x.shape[1:])
    first, second = (key[:, None, None] for key in (keys, _mix(keys + GOLDEN)))
    bits = _mix(_mix(elements + first) + second)
    return torch.where(bits >= threshold(rate), x / (1 - rate), 0.0)


def _mix(bits: Tensor) -> Tensor:
    """In int64, of which the lowest 32 bits count."""
    bits = bits & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * FIRST) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * SECOND) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
