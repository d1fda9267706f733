"""What a slot means to the reference of an op whose rows each name a row of a pool."""

import torch
from torch import Tensor


def is_in_pool(slots: Tensor, count: int) -> Tensor:
    """bool [B]: which of `slots` name one of `count` rows. Any other, -1 or 2^32, names none."""
    return (slots >= 0) & (slots < count)


def rows_of_slots(pool: Tensor, slots: Tensor) -> Tensor:
    """pool [slots, ...] -> [B, ...]: zeros where a slot names no row, whatever the pool holds, NaN included."""
    named = is_in_pool(slots, pool.size(0))
    if not pool.size(0):
        pool = torch.cat([pool, pool.new_zeros(1, *pool.shape[1:])])
    rows = pool[torch.where(named, slots, 0)]
    return rows.masked_fill(~named.view(-1, *(1,) * (rows.dim() - 1)), 0.0)


def check_slots(slots: Tensor, count: int, distinct: bool = False) -> None:
    """Raise ValueError unless every one of `slots` int [B] is -1 or in [0, `count`), each once if `distinct`.

    It reads the device: for debugging.

    Example: check_slots(slots, count=3)
    """
    named = [slot for slot in slots.tolist() if slot != -1]
    wrong = [slot for slot in named if not 0 <= slot < count]
    if wrong:
        raise ValueError(f"slots {wrong} are not possible; allowed: -1 and 0 to {count - 1}")
    if distinct and len({*named}) < len(named):
        raise ValueError(f"slots {slots.tolist()} name a slot twice; allowed: each once, and -1")
