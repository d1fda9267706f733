"""Newton-Schulz orthogonalisation, the step at the heart of Muon.

    X_0 = G / (|G|_F + eps);     A = X X^T;     X <- a X + (b A + c A A) X,    `steps` times

with (a, b, c) = (3.4445, -4.7750, 2.0315) (Jordan 2024): singular values in [0.01, 1] end in [0.68, 1.13]. matrices
[..., m, n]; a tall matrix is transposed so that A has the short side. The norm is taken in fp32, the products in
`dtype`: 2*steps*m*(2*n + m)*m FLOPs for m <= n.
"""

import torch
from torch import Tensor

JORDAN = (3.4445, -4.7750, 2.0315)


def newton_schulz_ref(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Orthogonalise matrices [..., m, n] -> the same shape, in `dtype` (default: bf16 on a GPU, as given on a CPU)."""
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else matrices.dtype
    a, b, c = JORDAN
    norm = torch.linalg.vector_norm(matrices.to(torch.promote_types(torch.float32, matrices.dtype)), dim=(-2, -1))
    x = (matrices / (norm[..., None, None] + 1e-7)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
