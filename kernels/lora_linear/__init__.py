"""Product of one input with one or several frozen weights, and one LoRA adapter a document, each of a rank of its own.

    y_p = x W_p^T + bias_p + s (drop_p(x) A_p^T) B_p^T        of slot(b): rank r, scale s, A_p its first r rows

    dx = sum_p dy_p W_p + mask_p t_p A_p / (1 - rate)         t_p = s dy_p B_p
    dA_p = t_p^T drop_p(x)      dB_p = dy_p^T s drop_p(x) A_p^T      dbias_p = sum of dy_p
    dW_p = dy_p^T x             where a dense weight requires a gradient, by cuBLAS

x [B, S, K]; weight [N, K] of x's dtype, or at six bits; lora_a [slots, R, K], lora_b [slots, N, R] of x's dtype or
fp32; bias [N] of x's dtype; scale fp32 [slots]; ranks int32 [slots]; y [B, S, N]. Low-rank adaptation: Hu et al. 2021.
Any K, N, S and R; 16 bits read fastest where K and N are multiples of 8.

Sums are fp32; u = s drop(x) A^T and t, the inner rows, are rounded to x's dtype before they are multiplied again, as
PyTorch's products round them. Every sum is made in a fixed order, without atomics: the same bits in every run, and a
document's bits do not depend on what else a batch of this shape holds. Where cuBLAS makes the product it may take
another kernel for another number of rows; else they do not depend on that either.

FLOPs a row: 2 K N and 2 r (K + N) forward, 2 K N and 4 r (K + N) backward. joint and after, r is the pool's R, rounded
up to 16, 32 or a multiple of 64, and adapters of fp32 or with ranks are rounded first, one for each document; added,
it is the rank of the document's own adapter. Where the products are made is :mod:`plan`'s to say:

    joint    u in the same launch as x W^T: `lora_qkv`'s kernels with one projection for three,
             and up to rank 16 on Hopper their form by warps that take turns
    stacked  two or three projections so, after copies of their weights and adapters one after the other
    after    u first, in a launch of its own; then [x | u] [W | B]^T, the ranks more steps of the sum; six bits are
             unpacked before, one weight at a time
    added    u first, x W^T by cuBLAS or the kernels of six bits, and u B^T added in a pass over y

Bytes beside the products': x once more for u, dy once more for t, x and dy once more for dA and dB; u and t
written and read; added, y and dx read and written once more. dA and dB are made beside dx, on a second stream, but
added.
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports
from .reference import lora_linear_ref

if TYPE_CHECKING:
    from .op import is_one_product, lora_linear

__all__ = ["is_one_product", "lora_linear", "lora_linear_ref"]

__getattr__, __dir__ = lazy_exports(__name__)
