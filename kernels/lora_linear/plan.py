"""Where the products are made, by shape: the one rule of `lora_linear`, forward and backward."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, float32

Way = Literal["joint", "after", "added"]

NARROW = 2048
"""Features below which u is made in the launch of the product: a pass of its own over x would take a tenth as long as
the product or more, by bytes and FLOPs. At exactly so many it still pays up to FEW ranks: forward and backward 1.18 of
two cuBLAS products, for 1.27 (NVIDIA H200, 65,536 rows, rank 16; bench/results/nvidia-h200/tuning/lora_linears-1.txt).
At rank 64 it does not: 1.84 for 1.54."""
WIDE = 4096
"""Features from which cuBLAS makes the product: a pass over y takes less than a tenth as long. By bytes and FLOPs;
not measured."""
FEW = 16
"""Ranks that a step of a matrix instruction takes: the least that an adapter costs."""
SHORT = 64
"""Tokens below which half a tile of one's own product would be empty, which holds rows of one document alone."""
JOINT_RANK, JOINT_RANKS = 128, FEW
"""The largest R of a joint launch, where all adapters have it, and where each has its own: there all cost R."""


def plan(weights: Sequence[Tensor | None], length: int, rank: int, has_ranks: bool, has_dropout: bool) -> Way:
    """The way of all projections of documents of `length` tokens; a weight that is None is at six bits, `rank` is the
    pool's.

    joint     one dense product, without dropout, K and N multiples of 16, below NARROW; small ranks if each has its own
    after     dense weights of 16 bits, below WIDE, from SHORT tokens on, K and N multiples of 8; joint all the same at
              NARROW with FEW ranks
    added     all others
    """
    if any(weight is None for weight in weights):
        return "added"
    sizes = [size for weight in weights for size in weight.shape]
    most_rank = JOINT_RANKS if has_ranks else JOINT_RANK
    may_join = len(weights) == 1 and not has_dropout and rank <= most_rank and not any(size % 16 for size in sizes)
    if may_join and max(sizes) < NARROW:
        return "joint"
    is_dense = weights[0].dtype != float32 and not any(size % 8 for size in sizes)
    if not is_dense or max(sizes) >= WIDE or length < SHORT:
        return "added"
    return "joint" if may_join and rank <= FEW and max(sizes) == NARROW else "after"


def dx_way(way: Way, projections: int, has_dropout: bool) -> Way:
    """The backward's, of a forward that was not joint: a mask, and a sum over projections, take a pass of their own."""
    return way if projections == 1 and not has_dropout else "added"
