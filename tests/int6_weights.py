"""Weights at six bits for tests, and their tiles as layout.py states them, made another way than there."""

import torch
import torch.nn.functional as F
from klora.kernels.int6 import quantize_int6

HALVED = [(16, 64), (80, 40), (200, 192), (130, 320), (192, 576)]
"""With a last tile column of 64 inputs: one row of tiles, blocks of 128 rows that end early, late or not."""
GROUPED = [(48, 160, 32), (32, 192, 64), (17, 256, 128), (200, 192, 32), (136, 64, 64)]


def matrix(rows, columns, group_size=None, device="cpu", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return quantize_int6(torch.randn(rows, columns, generator=generator, device=device), group_size)


def documented_words(tile):
    """The 3 x 32 x 4 words of a tile of 16 x 128 codes, as layout.py states them, in Python integers."""
    words = [[[0] * 4 for _ in range(32)] for _ in range(3)]
    for lane in range(32):
        g, t = divmod(lane, 4)
        for chunk in range(4):
            pairs = []
            for row in (g, g + 8):
                for j in range(4):
                    k = 32 * chunk + 8 * t + 2 * j
                    pairs.append([int(tile[row, k + odd]) + 32 for odd in (0, 1)])
            for odd in (0, 1):
                f = [pair[odd] for pair in pairs]
                halves = (
                    f[0] | f[1] << 6 | (f[6] & 15) << 12,
                    f[2] | f[3] << 6 | (f[7] & 15) << 12,
                    f[4] | f[5] << 6 | (f[6] >> 4) << 12 | (f[7] >> 4) << 14,
                )
                for word, half in enumerate(halves):
                    words[word][lane][chunk] |= half << 16 * odd
    return words


def documented_tiles(codes):
    """The tiles of codes [N, K] as layout.py states them: of 128 inputs, then of two rows' last 64."""
    rows, columns = codes.shape
    whole = columns if columns % 128 > 64 else columns // 128 * 128
    main = F.pad(codes[:, :whole], (0, -whole % 128, 0, -rows % 16))
    matrices = [main]
    if whole < columns:
        last = F.pad(codes[:, whole:], (0, whole + 64 - columns, 0, -rows % 128))
        pairs = [(r, r + 64) for first in range(0, rows, 128) for r in range(first, min(first + 64, rows))]
        shared = torch.stack([torch.cat([last[r], last[other]]) for r, other in pairs])
        matrices.append(F.pad(shared, (0, 0, 0, -len(shared) % 16)))
    return [
        matrix[row : row + 16, column : column + 128]
        for matrix in matrices
        for row in range(0, matrix.size(0), 16)
        for column in range(0, matrix.size(1), 128)
    ]


def layout_1(codes):
    """The tiles of codes [N, K] as klora stored them before: K padded to a multiple of 128."""
    padded = F.pad(codes, (0, -codes.size(1) % 128, 0, -codes.size(0) % 16))
    tiles = torch.tensor([documented_words(tile) for tile in documented_tiles(padded)])
    return tiles.to(torch.int32).view(padded.size(0) // 16, padded.size(1) // 128, 3, 32, 4)
