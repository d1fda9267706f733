"""The reference of the norm and of the boundary of a block."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..slots import rows_of_slots

EPS = 2.0**-23


class Unnormed(NamedTuple):
    """n = x / rms(x) [B, S, D] that is not stored: the product that reads it is by x, and divides by rms(x) as it ends.

    Autograd knows it as `n`, whose gradient is that of n divided by rms(x): what the product by x gives anyway.

    Example: Unnormed(n=x.new_empty(1).expand_as(x), x=x, squares=x.square().sum(-1).view(1, -1))
    """

    n: Tensor
    """[B, S, D] of no memory, whose numbers mean nothing"""
    x: Tensor
    """[B, S, D]"""
    squares: Tensor
    """[blocks, B S] fp32, the sums of x's squares over blocks of D"""

    @property
    def dtype(self) -> torch.dtype:
        """That of n."""
        return self.n.dtype

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a GPU."""
        return self.n.is_cuda

    def size(self, dim: int) -> int:
        """Of n."""
        return self.n.size(dim)


def opened(n: Tensor | Unnormed) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What autograd knows n as, and, where it is not stored, x, whose gradient is not asked for, and its squares.

    Example: n, x, squares = opened(rms_norm(x))
    """
    return (n.n, n.x.detach(), n.squares) if isinstance(n, Unnormed) else (n, None, None)


class ResidualNorm(NamedTuple):
    """What comes out of a boundary: three tensors [B, S, D] of one dtype, or None.

    Example: ResidualNorm(x_out=None, x_in=x, n=rms_norm(x))
    """

    x_out: Tensor | None
    """the block's output, where it was asked for"""
    x_in: Tensor | None
    """the residual stream that goes on, unless it ends here"""
    n: Tensor | Unnormed
    """x_in normalised"""


def rms_norm_ref(x: Tensor, weight: Tensor | None = None, eps: float = EPS, unit_offset: bool = False) -> Tensor:
    """`x` [..., D] / rms(x) over the last dimension, in its float dtype; times `weight` [D], with `unit_offset` 1 + it.

    `eps` is added to the mean square. With a weight all is computed in float32 (fp64 stays fp64) and rounded once.
    Autograd gives the gradients of x and weight.

    Example: n = rms_norm_ref(x)
    """
    if weight is None:
        return F.rms_norm(x, (x.size(-1),), eps=eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    gain = weight.to(wide) + 1 if unit_offset else weight.to(wide)
    return (F.rms_norm(x.to(wide), (x.size(-1),), eps=eps) * gain).to(x.dtype)


def residual_norm_ref(
    x: Tensor,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    slots: Tensor | None = None,
    pushed: Tensor | None = None,
    skip: Tensor | None = None,
    mix: Tensor | None = None,
    x0: Tensor | None = None,
    push: bool = False,
    last: bool = False,
    weight: Tensor | None = None,
    eps: float = EPS,
    unit_offset: bool = False,
) -> ResidualNorm:
    """The boundary term by term in x's dtype: (x_out, x_in, n), all [B, S, D]. Arguments as of :func:`residual_norm`.

    `x`, `branch`, `pushed` and `x0` are [B, S, D] of one float dtype; `scale` and `skip` [D], `mix` [2, D] and `bias`
    [slots, D] any float dtype; `slots` int [B]; `weight`, `eps` and `unit_offset` are those of :func:`rms_norm_ref`.
    x_out is None without `push`, x_in with `last`. Autograd gives all gradients.

    Example: x_out, x_in, n = residual_norm_ref(x, branch, scale, push=True)
    """
    x_out = x
    if branch is not None:
        x_out = x_out + (branch if scale is None else scale.to(x.dtype) * branch)
    if bias is not None:
        rows = bias if slots is None else rows_of_slots(bias, slots)
        x_out = x_out + rows.to(x.dtype)[:, None]
    x_in = x_out if pushed is None else x_out + skip.to(x.dtype) * pushed
    if mix is not None:
        mix_x, mix_x0 = mix.to(x.dtype)
        x_in = mix_x * x_in + mix_x0 * x0
    return ResidualNorm(x_out if push else None, None if last else x_in, rms_norm_ref(x_in, weight, eps, unit_offset))
