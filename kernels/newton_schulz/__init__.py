"""Newton-Schulz orthogonalisation, the step at the heart of Muon, for any number of matrices of any shapes at once.

    X_0 = G / (|G|_F + eps);   R = X X^T;   X <- (a I + b R + c R R) X,   `steps` times

The Frobenius norm is fp32 (in units of the largest entry, so that no square overflows); products take fp16 operands,
which are 8 times finer than bf16 and hold every intermediate, and accumulate in fp32; fp32 results are computed in
fp32. For m <= n and five steps: m*m*(15 n + 5 m) operations in the standard form, m*m*(6 n + 14 m) in the Gram form
(Zhang, Amsel, Chen, Dao 2026, with the restart after the third step), symmetric products halved in both. Least bytes:
matrices in, matrices out; on the way the arena holds two copies of each matrix and two to five of its m x m square,
all in fp16. No gradient. Needs Hopper.

reference.py is the reference. plan.py puts the products of all matrices in order. products.py computes them set by set,
chained.py in one launch. edges.py does what comes before and after, by the table of pieces.py. op.py decides what runs
where, and validate.py what is accepted.
"""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports
from .reference import (
    EPS,
    JORDAN,
    coefficients_of,
    muon_apply_ref_,
    muon_updates_ref,
    newton_schulz_ref,
    update_scale,
)

if TYPE_CHECKING:
    from .op import (
        MuonDirections,
        muon_apply_,
        muon_updates,
        newton_schulz,
        pick_config,
        pick_form,
    )
    from .products import NewtonSchulzConfig
    from .validate import check_apart, pick_backend

__all__ = [
    "EPS",
    "JORDAN",
    "MuonDirections",
    "NewtonSchulzConfig",
    "check_apart",
    "coefficients_of",
    "muon_apply_",
    "muon_apply_ref_",
    "muon_updates",
    "muon_updates_ref",
    "newton_schulz",
    "newton_schulz_ref",
    "pick_backend",
    "pick_config",
    "pick_form",
    "update_scale",
]

__getattr__, __dir__ = lazy_exports(__name__)
