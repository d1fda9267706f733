"""Q, K and V projections with one LoRA adapter a document.

    [q | k | v] = x W^T + (x A_p^T) B_p^T           p the projection (q, k or v) that an output belongs to

    dx = dY W + sum_p t_p A_p      t_p = dY_p B_p      dA_p = t_p^T x      dB_p = dY_p^T (x A_p^T)
    dW = dY^T x    where weight requires a gradient, by cuBLAS

`lora_qkv_rope` goes on from the fp32 sums, head by head of q and k (z the rotation of n by the tables):

    n = y / rms(y)                 z = rotated n             q = gain[h] z                       k = z
    dy = rstd gain[h] (dz - z' / l mean(dz z') / gain[h]^2) unrotated,  z' = gain[h] z the output, dz its gradient,
                                                                   l = cos^2 + sin^2 of the tables, in general 1

x [B, S, D]; weight [Nq+Nk+Nv, D], the three projections stacked; lora_a [slots, 3, R, D]; lora_b [slots, Nq+Nk+Nv, R];
q, k, v [B, S, N_p]. Low-rank adaptation: Hu et al. 2021; rotation: Su et al. 2021. Sums are fp32; x A^T and t are
rounded to x's dtype before they are multiplied again, as PyTorch's products round them; q, k and v are rounded once, at
the end; dA and dB leave in the adapters' dtype. Kept for the backward: x A^T, and 1 / rms of each head.

FLOPs, N = Nq+Nk+Nv: forward 2 B S (D N + R (3D + N)); backward 2 B S (D N + 2 R (3D + N)). Bytes of the forward: x, W
and the outputs once, 3% more for x A^T; of the backward: dY twice (for dx and for dB), x, dx and t once, t once more.

Launches, one file each way. Forward: one. Adapters of another dtype than x's are gathered, rounded and padded before
it; those whose rows do not lie on 16 bytes before the backward, too. Backward: dx and t; dB at the same time, on a
second stream; then dA. `lora_qkv_rope` has one more before them, for the heads of q and k. Every sum is made in a fixed
order: the same bits in every run, and a document's bits do not depend on the rest of its batch. Where several documents
have a slot, dA and dB are added in the order of the batch (:mod:`.sums`), from fp32 memory of a gradient's size for
each document. Ranks up to 128, D and sizes multiples of 16, any S; tuned for ranks up to 16 in 16 bits.
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports
from ..slots import check_slots
from .reference import lora_qkv_ref, lora_qkv_rope_ref

if TYPE_CHECKING:
    from .op import lora_qkv
    from .rope import lora_qkv_rope

__all__ = ["check_slots", "lora_qkv", "lora_qkv_ref", "lora_qkv_rope", "lora_qkv_rope_ref"]

__getattr__, __dir__ = lazy_exports(__name__)
