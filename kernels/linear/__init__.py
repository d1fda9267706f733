"""Product with a weight, the same bits for a row in every launch: out = x W^T.

    dx = dout W      dW = dout^T x

x [..., K], weight [N, K] -> out [..., N], all of one dtype: bf16, fp16 or fp32. 16-bit products are summed in fp32,
fp32 ones in fp64, 16 at a time in fp32; both are rounded once. 2 K N FLOPs and K + N items a row, each way; the weight
is read once. dW, where the weight requires a gradient, is cuBLAS's.

Every element of out and dx is one sum over K, made by one program from first to last. It does not depend on the other
rows, their number, or its place among them. cuBLAS does not promise that: it may take another algorithm for another
number of rows. The tile of a program does depend on that number. In 16 bits no bit depends on the tile: the tensor
cores add up K in one order, 16 at a time. fp32, which they do not multiply, has one tile.

Any sizes; 16-bit sizes that are not multiples of 8 (fp32: 4) are copied to aligned rows first. Tuned for 16 bits.
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports

if TYPE_CHECKING:
    from .op import linear, linear_ref

__all__ = ["linear", "linear_ref"]

__getattr__, __dir__ = lazy_exports(__name__)
