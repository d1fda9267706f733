"""Where the products are made, by shape: the one rule of `lora_linear`, forward and backward."""

from collections.abc import Sequence
from typing import Literal

from torch import dtype, float32

from ..dispatch import padded_rank

Way = Literal["joint", "stacked", "after", "added"]

JOINT = 32_768
"""Ranks times features up to which u is made in the launch of the product. There A costs R / 256 of a product, in every
tile of 256 outputs, and B at its end another microsecond a tile, 50 / K. In a launch of its own u costs a pass over x,
187 / N on an H200, 64 / K for a step of ranks, and a launch: about as much at R N = 32,768, by arithmetic for 512 to
4,096 features. Measured there: at 512 features joint is the faster one at every rank to 64, forward and backward."""
JOINT_FEATURES = 1_536
"""The most features of a joint launch where `after` is possible. Measured on an H200, 65,536 rows, forward and backward
in ms, joint / after: at 2,048 features 1.830 / 1.717 at rank 8 and 1.905 / 1.776 at rank 16 (forward alone 0.818 /
0.815); at rank 8 0.557 / 0.598 from 576 to 1,536 features and 0.570 / 0.597 back (nvidia-h200/tuning/
lora_linears-5.txt). At 1,024 joint is the faster one at rank 32, after at 64. `added` is no match: at 2,048 1.50
products to the 1.18 of joint."""
JOINT_RANK = 64
"""The largest of a joint launch: above it no tile of 256 outputs holds the sums."""
STACKED_RANK = 16
"""The largest of several products in one launch: it reads the rows of A of all of them at once."""
SHORT = 64
"""Tokens below which half a tile of one's own product would be empty, which holds rows of one document alone."""
UNPACKED = 2_048
"""Rows from which on six bits are unpacked before a product, which `int6_linear` does there, too. Both ways `added`
took 0.347 ms where a dense weight took 0.189, and `after` 0.220 (65,536 rows, 512 x 512, rank 16, an H200: nvidia-h200/
tuning/lora_linears-3.txt, lora_linears-4-int6.json). Never joint: the backward of that launch would keep the unpacked
weight."""


def plan(
    shapes: Sequence[tuple[int, int]],
    kind: dtype,
    documents: int,
    length: int,
    rank: int,
    *,
    has_dropout: bool = False,
    has_int6: bool = False,
    can_stack: bool = False,
) -> Way:
    """The way of all projections by weights of these shapes, for documents of `length` tokens; `kind` is x's dtype,
    `rank` the pool's. `has_int6`: some weights are at six bits. `can_stack`: nothing but sizes, dropout and six bits
    forbids to stack them.

    joint     one dense product, without dropout, K and N multiples of 16; rank times the larger of them up to JOINT,
              and that up to JOINT_FEATURES unless only `added` is left
    stacked   two or three such products of one input, ranks up to STACKED_RANK
    after     16 bits, from SHORT tokens on, K and N multiples of 8; with six bits from UNPACKED rows on
    added     all others
    """
    sizes = [size for shape in shapes for size in shape]
    takes_after = kind != float32 and not any(size % 8 for size in sizes) and length >= SHORT
    if has_int6:
        return "after" if takes_after and documents * length >= UNPACKED else "added"
    is_small = rank <= JOINT_RANK and padded_rank(rank) * max(sizes) <= JOINT
    is_narrow = max(sizes) <= JOINT_FEATURES or not takes_after
    if not has_dropout and is_small and is_narrow and not any(size % 16 for size in sizes):
        if len(shapes) == 1:
            return "joint"
        if can_stack and len(shapes) <= 3 and rank <= STACKED_RANK:
            return "stacked"
    return "after" if takes_after else "added"


def dx_way(way: Way, projections: int, has_dropout: bool) -> Way:
    """The backward's, of a forward that was not joint: a mask, and a sum over projections, take a pass of their own."""
    return way if projections == 1 and not has_dropout else "added"
