"""RMS normalisation, and the boundary of a block: residual stream, U-Net, mix and norm in one launch.

    x_out = x + scale * branch + bias[slot]          a branch joins the stream; the bias is the document's own
    x_in  = a * (x_out + skip * pushed) + b * x0     [a, b] = mix; what is not given is left out
    n     = x_in * r,   r = 1 / sqrt(mean(x_in^2) + eps)     over the last dimension
    n     = x_in * r * w                             with a weight (Llama), or with 1 + w (Gemma)

    g       = dx_in + r * (dn - n * mean(dn * n))        the gradient of x_in
    dx0     = b * g;   dpushed = a * skip * g;   da = sum g * (x_out + skip * pushed);   db = sum g * x0
    dskip   = a * sum g * pushed
    with a weight: dn * w in place of dn, x_in * r in place of n, and dw = sum dn * x_in * r
    dx      = a * g + dx_out;   dbranch = scale * dx;   dscale = sum dx * branch;   dbias = sum dx over the document

x, branch, pushed, x0, x_out, x_in, n [B, S, D], contiguous, of one dtype: bf16, fp16 or fp32; D a multiple of 16 up to
8192. scale, skip [D] and mix [2, D] fp32. bias fp32 [slots, D], each row contiguous, rows any distance apart (a view of
a flat pool); slots int [B], the row that each document adds, or nothing where the batch row is the slot. -1 is no bias,
and neither is a slot past the pool. All arithmetic is fp32 and each output is rounded once: n comes from x_in before
its rounding. eps = 2^-23, one ulp of fp32 at 1: the embedding has std 0.005, so a larger eps would change the function.

Bytes a row of D, in items of the dtype (the vectors stay in cache): it runs at the speed of memory.

    after attention, x and branch                             forward 4 D     backward, frozen 5 D
    between blocks, x, branch and x0                          forward 5 D     backward, frozen 5 D
    with x_out stored for the U-Net                           forward + D     backward + D
    with pushed joined                                        forward + D     backward + D
    without scale (folded into the product before)                            backward - D
    x alone, with a weight                                    forward 2 D     backward 3 D

The backward reads dn, dx_in and n and writes dx and dbranch; it keeps n, which the next product reads, and r, 4 bytes a
row, instead of x_in; with a weight, which may be 0, x_in. Where scale, skip or mix are trained it also reads those of
x, branch, pushed and x0 that they belong to, and recomputes x_out. Sums over tokens are taken in fp32 over splits of
SPLIT tokens, then over the splits in order: 4 D / SPLIT bytes a row and sum. A split is part of one document, so that
dbias has the same bits in every batch; sums over the whole batch are taken over documents last. That of w, [D] in its
own dtype, knows no documents: it is taken over groups of 64 splits, then over groups. No atomics.

Zhang and Sennrich 2019 (RMSNorm).
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports
from .reference import EPS, ResidualNorm, Unnormed, opened, residual_norm_ref, rms_norm_ref

if TYPE_CHECKING:
    from .op import residual_norm, rms_norm

__all__ = [
    "EPS",
    "ResidualNorm",
    "Unnormed",
    "opened",
    "residual_norm",
    "residual_norm_ref",
    "rms_norm",
    "rms_norm_ref",
]

__getattr__, __dir__ = lazy_exports(__name__)
