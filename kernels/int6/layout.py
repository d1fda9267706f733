"""The kernels' layout of int6 codes: tiles of 16 rows x 128 inputs, 1,536 bytes each, every thread's loads 16 bytes.

    packed int32 [tiles, 3, 32, 4]      tile, word of a triple, lane, chunk

Tiles follow one another row by row. K is padded to a multiple of 128, but where K mod 128 is 1 to 64 (`has_half`), the
last tile column is of 64 inputs, and two tile rows share a tile of it: rows r and r + 64 of each 128 rows are one row
of 128 inputs there, r's before those of r + 64. These tiles follow all others. So tile row i has number 4 (i div 8) + i
mod 4 of them, chunks 0 and 1 where i mod 8 is below 4, else 2 and 3. 576 inputs are not padded to 640.

A lane l = 4g + t (g in 0..7, t in 0..3) of a warp owns in each 32-input chunk c of a tile the eight inputs 32c + 8t ..
32c + 8t + 7 of rows g and g + 8: 16 codes in three words. With f = code + 32 (1..63) the codes go in pairs of
neighbouring inputs, the even one in the lower 16 bits of a word and the odd one in the upper 16; pairs 0..3 are row
g's, 4..7 row g + 8's:

    bits of each half    0..5        6..11       12..15
    word 0               pair 0      pair 1      lower four bits of pair 6
    word 1               pair 2      pair 3      lower four bits of pair 7
    word 2               pair 4      pair 5      12..13: upper two of pair 6, 14..15: upper two of pair 7

So a pair is one shift and one lop3 away from two bf16 (or fp16) numbers 128 + f (1024 + f), whose mantissa holds f as
it stands; a subtraction makes them the codes, exactly. What a lane holds is its share of the A operand of two 16x8x16
tensor-core products, once the inputs of a chunk are numbered so that each lane's eight are neighbours, and eight
neighbouring activations are one 16-byte load: nothing is permuted at run time, neither weights nor activations.

N is padded to a multiple of 16. All padding is code 0. Bytes: 0.75 * padded N * padded K, and the scales. Where the
last block is of less than 128 rows, some rows of a last column of 64 have none to share their tiles with.

Layout 1 was int32 [ceil(N/16), ceil(K/128), 3, 32, 4], with K always padded to a multiple of 128. State dicts and files
of it are repacked as they are loaded (`from_layout_1`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import expect_plain
from .reference import (
    CODE_MAX,
    GROUP_SIZES,
    GroupSize,
    Int6Weight,
    dequantize_int6_ref,
    pick_group_size,
    quantize_int6_ref,
    unpack_int6_ref,
)

LAYOUT = 2
"""Version of the layout above; of others, modules and files take layout 1."""

ROWS, COLUMNS = 16, 128
"""A tile."""
HALF = COLUMNS // 2
"""The inputs of each of two rows that are one row in a last tile column of 64, and how far apart the two are."""

SCALE_DTYPES = (torch.float16, torch.float32)

LOW, HIGH = 0x000F000F, 0x00300030
"""The lower four and the upper two bits of a pair."""


def tile_grid(rows: int, columns: int) -> tuple[int, int, bool]:
    """Tile rows and tile columns of [rows, columns] codes, and `has_half`: whether the last column is of 64 inputs."""
    return -(-rows // ROWS), -(-columns // COLUMNS), 0 < columns % COLUMNS <= HALF


def packed_shape(rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the packed tensor of [rows, columns] codes."""
    tile_rows, tile_columns, has_half = tile_grid(rows, columns)
    halves = -(-_shared_rows(rows) // ROWS) if has_half else 0
    return tile_rows * (tile_columns - has_half) + halves, 3, 32, 4


def _shared_rows(rows: int) -> int:
    """Rows of 128 inputs that the last 64 of `rows` rows make."""
    return rows // COLUMNS * HALF + min(rows % COLUMNS, HALF)


def scale_shapes(rows: int, columns: int) -> list[tuple[int, ...]]:
    """Shapes that the scales of [rows, columns] codes may have: one scale a row, then each group size that fits."""
    return [(rows,)] + [(rows, columns // size) for size in GROUP_SIZES if columns % size == 0]


def pack_int6(codes: Tensor) -> Tensor:
    """`codes` int8 [N, K] in [-31, 31] -> int32 tiles of :func:`packed_shape` in the layout above, on one device.

    ValueError: any other code, shape or dtype, or N or K of 0.

    Example: packed = pack_int6(codes)
    """
    expect_plain("codes", codes)
    if codes.dtype != torch.int8 or codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; packing takes int8 [N, K], neither of them 0")
    outside = (codes < -CODE_MAX) | (codes > CODE_MAX)
    if outside.any():
        raise ValueError(f"a code is {int(codes[outside][0])}; int6 codes are in [-31, 31]")
    return _packed(codes)


def unpack_int6(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """`packed` int32 tiles -> codes int8 [N, K] of `shape` (N, K), the inverse of :func:`pack_int6`.

    ValueError: another dtype, or a shape that is not :func:`packed_shape`'s.

    Example: codes = unpack_int6(pack_int6(codes), (128, 64))
    """
    expect_plain("packed", packed)
    wanted = packed_shape(*shape)
    if packed.dtype != torch.int32 or tuple(packed.shape) != wanted:
        found = f"{packed.dtype} {list(packed.shape)}"
        raise ValueError(f"packed is {found}; {list(shape)} weights take int32 {list(wanted)}: truncated or not int6")
    (rows, columns), (tile_rows, tile_columns, has_half) = shape, tile_grid(*shape)
    whole = tile_columns - has_half
    codes = _codes(packed[: tile_rows * whole], tile_rows, whole)[:rows, :columns]
    if has_half:
        shared = packed[tile_rows * whole :]
        last = _apart(_codes(shared, len(shared), 1), rows)
        codes = torch.cat([codes, last[:, : columns - whole * COLUMNS]], dim=1)
    return codes.contiguous()


def from_layout_1(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Tiles of layout 1 -> the same codes of `shape` (N, K) in this one. What is no such tensor is given back as it is.

    Example: packed = from_layout_1(packed, (128, 64))
    """
    tile_rows, tile_columns, has_half = tile_grid(*shape)
    if packed.dtype != torch.int32 or tuple(packed.shape) != (tile_rows, tile_columns, 3, 32, 4):
        return packed
    tiles = packed.flatten(0, 1)
    return _packed(_codes(tiles, tile_rows, tile_columns)[: shape[0], : shape[1]]) if has_half else tiles


def _packed(codes: Tensor) -> Tensor:
    """int8 [N, K] in [-32, 31] -> tiles."""
    _, tile_columns, has_half = tile_grid(*codes.shape)
    if not has_half:
        return _tiles(codes)
    whole = (tile_columns - 1) * COLUMNS
    return torch.cat([_tiles(codes[:, :whole]), _tiles(_side_by_side(codes[:, whole:]))])


def _side_by_side(last: Tensor) -> Tensor:
    """[N, up to 64] -> [:func:`_shared_rows`, 128]: rows r and r + 64 of each 128 rows as one."""
    rows, columns = last.shape
    blocks = F.pad(last, (0, HALF - columns, 0, -rows % COLUMNS)).view(-1, 2, HALF, HALF)
    return blocks.transpose(1, 2).reshape(-1, COLUMNS)[: _shared_rows(rows)]


def _apart(shared: Tensor, rows: int) -> Tensor:
    """[at least :func:`_shared_rows`, 128] -> [N, 64], the inverse of :func:`_side_by_side`."""
    blocks = F.pad(shared, (0, 0, 0, -len(shared) % HALF)).view(-1, HALF, 2, HALF)
    return blocks.transpose(1, 2).reshape(-1, HALF)[:rows]


def _tiles(codes: Tensor) -> Tensor:
    """int8 [N, K] -> tiles of 16 x 128, row by row."""
    fields = F.pad(codes, (0, -codes.size(1) % COLUMNS, 0, -codes.size(0) % ROWS)).int() + 32
    tiles = fields.view(fields.size(0) // ROWS, 2, 8, fields.size(1) // COLUMNS, 4, 4, 4, 2)  # row h g, column c t j e
    pairs = tiles[..., 0] | tiles[..., 1] << 16
    p = pairs.permute(1, 6, 0, 3, 2, 5, 4).flatten(4, 5).flatten(0, 1)  # [pair, tile row, tile column, lane, chunk]
    words = (
        p[0] | p[1] << 6 | (p[6] & LOW) << 12,
        p[2] | p[3] << 6 | (p[7] & LOW) << 12,
        p[4] | p[5] << 6 | (p[6] & HIGH) << 8 | (p[7] & HIGH) << 10,
    )
    return torch.stack(words, dim=2).flatten(0, 1)


def _codes(tiles: Tensor, tile_rows: int, tile_columns: int) -> Tensor:
    """The inverse of :func:`_tiles`, with all padding."""
    w0, w1, w2 = tiles.unbind(1)
    pairs = [w0, w0 >> 6, w1, w1 >> 6, w2, w2 >> 6]
    pairs += [(w0 >> 12 & LOW) | (w2 >> 8 & HIGH), (w1 >> 12 & LOW) | (w2 >> 10 & HIGH)]
    p = torch.stack(pairs).view(2, 4, tile_rows, tile_columns, 8, 4, 4)  # h, j, tile row, tile column, g, t, c
    fields = torch.stack([p & 63, p >> 16 & 63], dim=-1).to(torch.int8) - 32
    return fields.permute(2, 0, 4, 3, 6, 5, 1, 7).reshape(tile_rows * ROWS, tile_columns * COLUMNS)


@dataclass(frozen=True, eq=False)
class Int6Matrix:
    """A weight [N, K] at six bits a weight, in the layout that the kernels read.

    Both parts are contiguous: the kernels read them by their place.
    ValueError: parts of other shapes, dtypes or strides, another version of the layout.

    Example: matrix = Int6Matrix(pack_int6(codes), scales, (128, 64))
    """

    packed: Tensor
    """int32, see :func:`packed_shape`"""
    scale: Tensor
    """[N], or [N, K/group] with a scale for each group of inputs. fp16, or fp32 of 11 significant bits where one is too
    small for that; the wide kernel takes no fp32 ones, nor does any with fp16 inputs but the dense one."""
    shape: tuple[int, int]
    """N, K"""
    layout: int = LAYOUT

    def __post_init__(self):
        rows, columns = self.shape
        if self.layout != LAYOUT:
            raise ValueError(f"packed data has layout version {self.layout}; this klora reads {LAYOUT}: pack it again")
        wanted = packed_shape(rows, columns)
        if self.packed.dtype != torch.int32 or tuple(self.packed.shape) != wanted:
            found = f"{self.packed.dtype} {list(self.packed.shape)}"
            raise ValueError(f"packed is {found}; {[rows, columns]} weights take int32 {list(wanted)}: truncated?")
        scales = scale_shapes(rows, columns)
        if self.scale.dtype not in SCALE_DTYPES or tuple(self.scale.shape) not in scales:
            found = f"{self.scale.dtype} {list(self.scale.shape)}"
            allowed = " or ".join(str(list(shape)) for shape in scales)
            raise ValueError(f"scale is {found}; {[rows, columns]} weights take float16 or float32 {allowed}")
        if not (self.packed.is_contiguous() and self.scale.is_contiguous()):
            raise ValueError("packed and scale are not both contiguous; call .contiguous() on them")

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None for one scale a row."""
        return None if self.scale.dim() == 1 else self.shape[1] // self.scale.size(1)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    @classmethod
    def from_rows(cls, weight: Int6Weight, device: torch.device | str | None = None) -> "Int6Matrix":
        """The same codes and scales as packed rows hold, repacked on `device`."""
        packed, scale = weight.packed.to(device), weight.scale.to(device)
        return cls(pack_int6(unpack_int6_ref(packed, weight.shape[1])), scale, weight.shape)

    def codes(self) -> Tensor:
        """int8 [N, K]"""
        return unpack_int6(self.packed, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w_hat [N, K] in `dtype`, in plain PyTorch."""
        return dequantize_int6_ref(self.codes(), self.scale, dtype)


def quantize_int6(
    weight: Tensor, group_size: GroupSize = "auto", clip: float | None = None, second_moment: Tensor | None = None
) -> Int6Matrix:
    """`weight` [N, K] -> codes and scales by :func:`quantize_int6_ref`, packed, all on the weight's device.

    `group_size` "auto" takes groups where they pay (:func:`pick_group_size`); None is one scale a row, 32, 64 or 128
    one for so many inputs. `clip`, `second_moment` and the errors (ValueError) are those of :func:`quantize_int6_ref`.
    The result has no gradient, and may be trained through even if it was made in inference mode.

    Example: matrix = quantize_int6(weight)
    """
    with torch.inference_mode(False):
        if group_size == "auto":
            group_size = pick_group_size(weight, clip, second_moment)
        codes, scale = quantize_int6_ref(weight, clip, group_size, second_moment)
        return Int6Matrix(pack_int6(codes), scale, tuple(weight.shape))
