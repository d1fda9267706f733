"""int6 in plain PyTorch: codes in [-31, 31] with one fp16 scale a row, or one for each group of a row's inputs.

    rms      = sqrt(mean w^2)                                     of the row, or of the group: the std about zero
    scale    = fp16(clip * rms)                                   rounded before the codes are computed; no floor
    code     = clamp(round(w / scale), -31, 31)
    w_hat    = scale * code                                       |w - w_hat| <= scale/2 where not clamped

weight [N, K] any float dtype, arithmetic in fp32; codes int8 [N, K]; scale fp16 [N], or [N, K/group] for groups of 32,
64 or 128 inputs. A zero row has scale 0 and codes 0. Any other scale is at least 2^-24, the smallest fp16: 0 would lose
the row where a code or two still holds it. `scale * code` has 16 significant bits, so w_hat is exact in fp32 and
rounded once to a narrower dtype.

Packed rows, the artifact's layout (the kernels' is in layout.py): int32 [..., W], W = 6 * ceil(K/32). Columns are
padded with code 0 to a multiple of 32 (a row starts at a multiple of 8 bytes) and each 16 codes take three words. With
f = code + 32, in 1..63:

    word 0   bits 4j..4j+3 = low four bits of f_j,      j = 0..7
    word 1   bits 4j..4j+3 = low four bits of f_{8+j},  j = 0..7
    word 2   bits 2j..2j+1 = high two bits of f_j,      j = 0..15

No code straddles two words, so the shift of every code is a function of its column alone. Bytes: 0.75 NK + 2N.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CODE_MAX = 31
"""Codes run from -31 to 31; -32 is not used, so that the grid is symmetric."""

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale; without groups a row has one."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16."""


def quantize_int6_ref(weight: Tensor, clip: float, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> codes int8 [N, K], scale fp16 [N] or [N, K/group_size]. `clip` is the grid's step in RMS.

    ValueError: another shape, a clip that is not a positive number, a weight that is not finite, a scale beyond fp16,
    a group size that is not 32, 64 or 128 or does not divide K.
    """
    if weight.dim() != 2 or weight.size(1) == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; int6 takes [N, K] with K at least 1")
    if not (0.0 < clip < math.inf):
        raise ValueError(f"clip={clip} is not possible; int6 takes a positive number, about 0.1")
    if group_size is not None:
        if group_size not in GROUP_SIZES or weight.size(1) % group_size:
            allowed = f"{', '.join(map(str, GROUP_SIZES))} that divide K, or None for one scale a row"
            raise ValueError(f"group_size={group_size} with K={weight.size(1)}; allowed: {allowed}")
        codes, scale = quantize_int6_ref(weight.reshape(-1, group_size), clip)
        return codes.view(weight.shape), scale.view(weight.size(0), -1)
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds a NaN or an infinity; int6 takes finite weights")
    rms = weight.square().mean(dim=1).sqrt()
    scale = torch.where(rms > 0, (clip * rms).clamp_min(SMALLEST_SCALE), 0.0).half()
    if torch.isinf(scale).any():
        row = int(torch.isinf(scale).nonzero()[0])
        raise ValueError(f"row {row} needs the scale {clip * float(rms[row]):.4g}; fp16 holds at most 65504")
    step = torch.where(scale > 0, scale.float(), 1.0)
    codes = (weight / step[:, None]).round().clamp(-CODE_MAX, CODE_MAX)
    return codes.to(torch.int8), scale


def dequantize_int6_ref(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes int8 [N, K], scale fp16 [N] or [N, groups] -> w_hat [N, K] in `dtype`."""
    groups = scale.view(codes.size(0), -1, 1).float()
    return (codes.unflatten(1, (groups.size(1), -1)).float() * groups).flatten(1).to(dtype)


def packed_words(columns: int) -> int:
    """int32 words of a packed row of `columns` codes."""
    return 6 * -(-columns // 32)


def pack_int6_ref(codes: Tensor) -> Tensor:
    """codes int8 [..., K] in [-31, 31] -> int32 [..., W] in the layout above. ValueError for any other code."""
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
    """int32 [..., W] -> codes int8 [..., columns], the inverse of :func:`pack_int6_ref`."""
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
    """A matrix [N, K] at six bits a weight."""

    packed: Tensor
    """int32 [N, 6 * ceil(K/32)]"""
    scale: Tensor
    """fp16 [N]"""
    shape: tuple[int, int]
    """N, K"""

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w_hat [N, K] in `dtype`."""
        return dequantize_int6_ref(unpack_int6_ref(self.packed, self.shape[1]), self.scale, dtype)
