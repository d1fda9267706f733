"""Product with a weight, the same bits for a row in every launch: out = x W^T.

    dx = dout W      dW = dout^T x

x [..., K], weight [N, K] -> out [..., N], all of one dtype: bf16, fp16 or fp32. 16-bit products are summed in fp32,
fp32 ones in fp64, 16 at a time in fp32; both are rounded once. 2 K N FLOPs and K + N items a row, each way; the weight
is read once. dW, where the weight requires a gradient, is cuBLAS's.

Every element of out and dx is one sum over K, made by one program from first to last: it does not depend on the other
rows, their number, or where among them it lies. cuBLAS, which may take another algorithm for another number of rows,
does not promise that. The tile that a program makes is picked by the number of rows all the same: in 16 bits the tensor
cores add up K in one order, 16 at a time, whatever the tile. fp32, which they do not multiply, has one tile.

Any sizes; 16-bit sizes that are not multiples of 8 (fp32: 4) are copied to aligned rows first. Tuned for 16 bits.
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports

if TYPE_CHECKING:
    from .op import linear, linear_ref

__all__ = ["linear", "linear_ref"]

__getattr__, __dir__ = lazy_exports(__name__)
