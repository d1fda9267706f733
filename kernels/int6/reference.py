"""int6 in plain PyTorch: codes in [-31, 31] with one scale a row, or one for each group of a row's inputs.

    code     = clamp(round(w / scale), -31, 31)
    w_hat    = scale * code                                       |w - w_hat| <= scale/2 where not clamped
    error    = sum_k h_k (w_k - w_hat_k)^2                        h: mean square of each input where given, else 1
    scale    = the one of least error for its row (or group)      where a clip is given, clip * sqrt(mean w^2)

weight [N, K] any float dtype, arithmetic in fp32; codes int8 [N, K]; scale [N], or [N, K/group] for groups of 32, 64 or
128 inputs. A zero row has scale 0 and codes 0. Scales are rounded to 11 significant bits before the codes are computed.
They are stored in fp16 where it holds them, else (a scale below 2^-19, weights of about 2e-5) all of the matrix in fp32
with the same 11 bits. So `scale * code` has 16 significant bits, w_hat is exact in fp32 and rounded once to a narrower
dtype.

Packed rows, the artifact's layout (the kernels' is in layout.py): int32 [..., W], W = 6 * ceil(K/32). Columns are
padded with code 0 to a multiple of 32 (a row starts at a multiple of 8 bytes) and each 16 codes take three words. With
f = code + 32, in 1..63:

    word 0   bits 4j..4j+3 = low four bits of f_j,      j = 0..7
    word 1   bits 4j..4j+3 = low four bits of f_{8+j},  j = 0..7
    word 2   bits 2j..2j+1 = high two bits of f_j,      j = 0..15

No code straddles two words, so the shift of every code is a function of its column alone. Bytes: 0.75 NK + 2N.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import expect_plain

CODE_MAX = 31
"""Codes run from -31 to 31; -32 is not used, so that the grid is symmetric."""

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale; without groups a row has one."""

GroupSize = int | Literal["auto"] | None
"""Inputs that share a scale; None is one scale a row, "auto" is what :func:`pick_group_size` picks."""

SMALLEST_FP16_SCALE = 2.0**-19
"""The smallest scale stored in fp16. At this value its steps are 1/32 of it, finer than the search's; below they are
coarser, until rows vanish at 2^-25."""

SMALLEST_SCALE = 2.0**-126
"""The smallest scale but 0."""

REACH_STEPS = tuple(0.88**step for step in range(10))
"""Scales tried for a row, in units of the one that reaches its largest weight. One weight of 100 rms among 4096 is best
at 0.74, among 16384 at 0.41."""

RMS_CLIPS = (0.08, 0.11, 0.15, 0.2)
"""And in units of its rms, weighted as the errors are. 0.11 is best for a Gaussian row of some thousand weights."""

NEIGHBOURS = (0.94, 1.06)
"""Of the best of those, tried last: what is left is within 5% of the least squared error."""

SAMPLE = 1 << 18
"""Weights of a matrix, in whole rows evenly spread, by which its group size is picked."""

CPU_BLOCK, GPU_BLOCK = 1 << 19, 1 << 26
"""Weights searched at a time: on a CPU so that all passes find them in the cache (45 ns a weight on one thread, 9 with
a fixed clip), on a GPU so that the memory for it is bounded (two copies in fp32)."""


def is_group_size(size: Any, columns: int) -> bool:
    """Whether a row of `columns` weights can have a scale for every `size` of them; None is one for the row."""
    return size is None or (isinstance(size, Integral) and size in GROUP_SIZES and columns % size == 0)


@torch.no_grad()
def quantize_int6_ref(
    weight: Tensor, clip: float | None = None, group_size: int | None = None, second_moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> codes int8 [N, K], scale fp16 or fp32 [N] or [N, K/group_size]. Neither has a gradient.

    `weight` has any float dtype. `clip` None searches the scale of least error for each row or group; a number fixes
    scale = clip * rms for all. `group_size` is 32, 64 or 128 inputs a scale; None is one scale a row. `second_moment`
    [K] weights the errors: the mean square of each input of the linear, or any importance of it.

    ValueError: another shape, a clip that is not a positive number, a weight that is not finite, a scale beyond fp16, a
    group size that is not 32, 64 or 128 or does not divide K, a second moment of another shape or below 0, or beside a
    fixed clip.

    Example: codes, scales = quantize_int6_ref(weight, group_size=32)
    """
    expect_plain("weight", weight)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; int6 takes [N, K] with N and K at least 1")
    if not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype}; int6 takes a floating-point weight")
    if weight.is_meta:
        raise ValueError("weight is on 'meta' and holds no values; load it first")
    if clip is not None and not (0.0 < clip < math.inf):
        raise ValueError(f"clip={clip} is not possible; int6 takes a positive number, about 0.1, or None to search")
    rows, columns = weight.shape
    if not is_group_size(group_size, columns):
        allowed = f"{', '.join(map(str, GROUP_SIZES))} that divide K, None for one scale a row; quantize_int6: 'auto'"
        raise ValueError(f"group_size={group_size} with K={columns}; allowed: {allowed}")
    groups = 1 if group_size is None else columns // group_size
    importance = None if second_moment is None else _importance(second_moment, weight, clip, groups)
    weight = weight.detach().float()
    grouped = weight.reshape(rows, groups, -1)
    wanted = _search_scales(grouped, importance) if clip is None else clip * grouped.square().mean(dim=-1).sqrt()
    scale = torch.where(wanted == 0, 0.0, rounded_scale(wanted))  # a NaN or an infinity of the weight is one here
    half = scale.half()
    too_small = (scale > 0) & (scale < SMALLEST_FP16_SCALE)
    is_good, needs_fp32 = torch.stack([torch.isfinite(half).all(), too_small.any()]).tolist()
    if not is_good:
        if not torch.isfinite(weight).all():
            raise ValueError("weight holds a NaN or an infinity; int6 takes finite weights")
        row, group = torch.isinf(half).nonzero()[0].tolist()
        raise ValueError(f"row {row} needs the scale {float(wanted[row, group]):.4g}; int6 takes at most 65504")
    scale = scale if needs_fp32 else half
    step = torch.where(scale > 0, scale.float(), 1.0)[..., None]
    codes = (grouped / step).round_().clamp_(-CODE_MAX, CODE_MAX).to(torch.int8)
    return codes.view(rows, columns), scale.view(rows) if group_size is None else scale


def pick_group_size(weight: Tensor, clip: float | None = None, second_moment: Tensor | None = None) -> int | None:
    """128, 64 or None (one scale a row) for `weight` [N, K]: the least squared error * (1 + 128 / group).

    So groups of 128, an eighth of a bit more a weight, must at least halve the error of row scales, and groups of 64, a
    quarter of a bit, leave a third. A finer grid would gain less for these bits (1.2 and 1.4 times); the rest pays for
    the wide kernel, which takes row scales alone. Of K = 4096 the error falls 1.5 and 1.8 times for Gaussian weights,
    5.7 and 9.1 times for Student-t (3 degrees), 18 and 32 times where one input has weights 30 times larger.

    A fixed clip keeps row scales. The error is weighted as the search of :func:`quantize_int6_ref` weights it. What
    that function refuses is not refused here.

    Example: codes, scales = quantize_int6_ref(weight, group_size=pick_group_size(weight))
    """
    if clip is not None or weight.dim() != 2 or weight.numel() == 0:
        return None
    rows, columns = weight.shape
    sample = weight[:: max(1, weight.numel() // SAMPLE)]
    costs: dict[int | None, float] = {}
    for size in (None, 128, 64):
        if size is None or (columns % size == 0 and columns > size):
            with suppress(ValueError):  # refused when the whole weight is quantised, with its reason
                error = relative_error(sample, *quantize_int6_ref(sample, None, size, second_moment), second_moment)
                costs[size] = error * (1 + 128 / size if size else 1)
    return min(costs, key=costs.__getitem__, default=None)


def _importance(second_moment: Tensor, weight: Tensor, clip: float | None, groups: int) -> Tensor:
    """The second moment as fp32 [groups, inputs] on the weight's device, each group with a mean of 1."""
    if clip is not None:
        raise ValueError(f"a second moment is given with clip={clip}; it weights the search: leave the clip None")
    expect_plain("second_moment", second_moment)
    if tuple(second_moment.shape) != (weight.size(1),):
        raise ValueError(f"second_moment has shape {list(second_moment.shape)}; this weight takes [{weight.size(1)}]")
    importance = second_moment.detach().to(weight.device, torch.float32)
    if not (torch.isfinite(importance) & (importance >= 0)).all():
        raise ValueError("second_moment holds a NaN, an infinity or a value below 0; give a mean of squares")
    importance = importance.view(groups, -1)
    return importance / importance.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _search_scales(weight: Tensor, importance: Tensor | None) -> Tensor:
    """weight fp32 [N, groups, inputs], importance [groups, inputs] -> the scale of least error, fp32 [N, groups]."""
    rows = max(1, (GPU_BLOCK if weight.is_cuda else CPU_BLOCK) // max(1, weight[:1].numel()))
    return torch.cat([_search_block(block, importance) for block in weight.split(rows)])


def _search_block(weight: Tensor, importance: Tensor | None) -> Tensor:
    off = weight.square()
    rms = (off if importance is None else off.mul_(importance)).mean(dim=-1, keepdim=True).sqrt()
    reach = weight.abs().amax(dim=-1, keepdim=True) / CODE_MAX
    best, least = reach, torch.full_like(reach, math.inf)

    def attempt(scale: Tensor) -> None:
        nonlocal best, least
        step = rounded_scale(scale)
        torch.div(weight, step, out=off)
        off.round_().clamp_(-CODE_MAX, CODE_MAX).mul_(step).sub_(weight).square_()
        error = (off if importance is None else off.mul_(importance)).sum(dim=-1, keepdim=True)
        better = (error < least) & (scale > 0)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)

    for base, factors in ((reach, REACH_STEPS), (rms, RMS_CLIPS)):
        for factor in factors:
            attempt(base * factor)
    coarse = best
    for factor in NEIGHBOURS:
        attempt(coarse * factor)
    return best.squeeze(-1)


def rounded_scale(scale: Tensor) -> Tensor:
    """fp32 scales at 11 significant bits, ties to even, none below the smallest."""
    bits = scale.clamp_min(SMALLEST_SCALE).view(torch.int32)
    return (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)


def relative_error(weight: Tensor, codes: Tensor, scale: Tensor, second_moment: Tensor | None = None) -> float:
    """sum h (w - w_hat)^2 / sum h w^2 with h = `second_moment` [K] or 1; 0 for a zero matrix."""
    weight = weight.detach().float()
    error, energy = dequantize_int6_ref(codes, scale).sub_(weight).square_(), weight.square()
    if second_moment is not None:
        importance = second_moment.detach().to(weight.device, torch.float32)
        error, energy = error.mul_(importance), energy.mul_(importance)
    error, energy = (float(part.sum(1).double().sum()) for part in (error, energy))
    return error / energy if energy > 0 else 0.0


def dequantize_int6_ref(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`codes` int8 [N, K] and `scale` fp16 or fp32, [N] or [N, groups] -> w_hat [N, K] in `dtype`. No gradient.

    Example: w_hat = dequantize_int6_ref(codes, scales)
    """
    groups = scale.view(codes.size(0), -1, 1).float()
    return (codes.unflatten(1, (groups.size(1), -1)).float() * groups).flatten(1).to(dtype)


def packed_words(columns: int) -> int:
    """int32 words of a packed row of `columns` codes."""
    return 6 * -(-columns // 32)


def pack_int6_ref(codes: Tensor) -> Tensor:
    """`codes` int8 [..., K] in [-31, 31] -> int32 [..., W], W = 6 * ceil(K / 32), in the layout above.

    ValueError: any other code, dtype, or K = 0.

    Example: packed = pack_int6_ref(codes)
    """
    if codes.dtype != torch.int8 or codes.dim() == 0 or codes.size(-1) == 0:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; packing takes int8 [..., K] with K at least 1")
    outside = (codes < -CODE_MAX) | (codes > CODE_MAX)
    if outside.any():
        raise ValueError(f"a code is {int(codes[outside][0])}; int6 codes are in [-31, 31]")
    fields = F.pad(codes, (0, -codes.size(-1) % 32)).long() + 32
    fields = fields.unflatten(-1, (fields.size(-1) // 16, 16))
    shift = torch.arange(16, device=codes.device)
    low = ((fields & 15) << 4 * (shift % 8)).unflatten(-1, (2, 8)).sum(-1)
    high = ((fields >> 4) << 2 * shift).sum(-1, keepdim=True)
    return torch.cat([low, high], dim=-1).flatten(-2).to(torch.int32)


def unpack_int6_ref(packed: Tensor, columns: int) -> Tensor:
    """`packed` int32 [..., W] -> codes int8 [..., columns], the inverse of :func:`pack_int6_ref`.

    ValueError: another dtype, or a W that `columns` does not give.

    Example: codes = unpack_int6_ref(pack_int6_ref(codes), columns=64)
    """
    if packed.dtype != torch.int32 or columns < 1 or packed.dim() == 0 or packed.size(-1) != packed_words(columns):
        wanted = f"int32 [..., {packed_words(columns)}]"
        raise ValueError(f"packed is {packed.dtype} {list(packed.shape)}; {columns} columns take {wanted}")
    words = packed.unflatten(-1, (packed.size(-1) // 3, 3))
    shift = torch.arange(16, device=packed.device, dtype=torch.int32)
    low = (words[..., :2].repeat_interleave(8, dim=-1) >> 4 * (shift % 8)) & 15
    high = (words[..., 2:] >> 2 * shift) & 3
    return ((low | high << 4) - 32).to(torch.int8).flatten(-2)[..., :columns].contiguous()


@dataclass(frozen=True, eq=False)
class Int6Weight:
    """A matrix [N, K] at six bits a weight, in packed rows: what an artifact stores. Nothing is checked.

    Example: rows = Int6Weight(pack_int6_ref(codes), scales, (128, 64))
    """

    packed: Tensor
    """int32 [N, 6 * ceil(K/32)]"""
    scale: Tensor
    """fp16 [N], or fp32 where one is too small for fp16"""
    shape: tuple[int, int]
    """N, K"""

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w_hat [N, K] in `dtype`."""
        return dequantize_int6_ref(unpack_int6_ref(self.packed, self.shape[1]), self.scale, dtype)
