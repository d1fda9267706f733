"""Choosing the clip of every int6 matrix: the least weight error that fits a number of bytes.

    bits(m, k)   weights of m * order-0 entropy of its codes at clip k: what an entropy coder needs for them
    error(m, k)  sum (w - w_hat)^2 / mean(w^2): weights of m * relative squared error

`choose_clips` minimises the sum of error(m, k_m) subject to the sum of bits(m, k_m) <= budget. Every matrix starts at
its coarsest clip; then the step along a curve's convex hull that removes most error for a bit is taken, again and
again, until the next one does not fit. That is the Lagrangian optimum: all matrices end at one exchange rate of error
for bits. The choices at two budgets are nested, so more bytes never give more error. `quantize_to_fit` turns bytes of a
real file into bits of entropy.

A row's scale is the clip times its rms. Only a row whose largest weights that would cut off has a scale of its own,
the one of least error, where that is larger (`quantize_rows`): few weights, but they are the ones that count.

`quantize_int6` has a search of its own. Its codes take six bits each, so every row has the scale of least error. Here
an entropy coder makes coarser codes smaller.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import zstandard
from torch import Tensor

from ..kernels.int6 import CODE_MAX, quantize_int6_ref, relative_error

CLIPS = tuple(0.03 * (2.0 / 0.03) ** (step / 63) for step in range(64))
"""The clips tried, 7% apart. A row of +-c is cut off below 1/31 = 0.032; a Gaussian row is best near 0.11 (5.2 bits)
and takes 1.3 bits at 2; a row with a single weight in 1536 that is not zero is cut off below 1.26."""

SAMPLE = 65_536
"""Weights of a matrix that its curve is measured on, in whole rows drawn with a fixed seed."""


TRIES = 5
"""Calls of `encode` with the slow search; one is enough where the quick one predicts it well."""

MARGIN = 0.0005
"""Share of the code bytes aimed below the budget, for what the prediction does not see."""

SLACK = 0.003
"""Share of the budget that may stay unused without another try."""

ERRORS = (0.1, 0.03, 0.01, 0.003)
"""Relative squared errors whose budgets `error_budgets` gives."""

LARGE_ERROR = 0.01
"""Relative squared error worth a warning. 0.0019 cost the seed preset 0.0019 bits per byte of 0.516 after 844 steps.
The loss grows about in proportion to the error, where that is of rounding: a few large weights that are cut off cost
more than all of it (docs/notes/training.md)."""

ALLOWANCE = 1.02
"""Factor on the entropy of those budgets, for what an entropy coder leaves."""


@dataclass(frozen=True)
class ClipCurve:
    """Cost of one matrix at each of CLIPS."""

    bits: tuple[float, ...]
    error: tuple[float, ...]

    def hull(self) -> list[tuple[float, float, float]]:
        """(bits, error, clip) from the coarsest clip to the one of least error, each step gaining less for a bit."""
        hull: list[tuple[float, float, float]] = []
        for point in sorted(zip(self.bits, self.error, CLIPS, strict=True)):
            if hull and point[1] >= hull[-1][1]:
                continue
            while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
                hull.pop()
            hull.append(point)
        return hull


def _gain(coarse: tuple[float, float, float], fine: tuple[float, float, float]) -> float:
    """Error removed by each bit."""
    return (coarse[1] - fine[1]) / (fine[0] - coarse[0])


def quantize_rows(weight: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> codes int8 [N, K] and scale fp16 or fp32 [N]: clip * rms, and what cuts a row off is widened."""
    codes, scale = quantize_int6_ref(weight, clip)
    cut = _is_cut(weight.float().abs().amax(dim=1), scale.float()).nonzero().flatten()
    if not cut.numel():
        return codes, scale
    own_codes, own_scale = quantize_int6_ref(weight[cut])
    wider = own_scale > scale[cut]
    rows = cut[wider]
    scale = scale.to(torch.promote_types(scale.dtype, own_scale.dtype))
    codes[rows], scale[rows] = own_codes[wider], own_scale[wider].to(scale.dtype)
    return codes, scale


def _is_cut(largest: Tensor, scale: Tensor) -> Tensor:
    """Where a weight is further from the largest code than rounding takes one."""
    return largest > (CODE_MAX + 0.5) * scale


def clip_curve(weight: Tensor) -> ClipCurve:
    """Measure the curve of weight [N, K] on a sample of its rows. Zero rows cost nothing and are left out.

    All clips at once, each with the rows that it cuts off as :func:`quantize_rows` has them. The scales' rounding to
    fp16 is left out.
    """
    rms = weight.float().square().mean(dim=1).sqrt()
    rows = rms.nonzero().flatten()
    if rows.numel() == 0:
        return ClipCurve((0.0,) * len(CLIPS), (0.0,) * len(CLIPS))
    draw = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(0))
    sample = rows[draw[: -(-SAMPLE // weight.size(1))].to(rows.device)]
    u, energy = weight[sample].float() / rms[sample, None], rms[sample].square()
    own = quantize_int6_ref(u)[1].float()
    clips = torch.tensor(CLIPS, device=u.device)[:, None]
    clips = torch.where(_is_cut(u.abs().amax(dim=1), clips), torch.maximum(clips, own), clips)
    weights, bits, error = rows.numel() * weight.size(1), [], []
    for clip in clips[..., None]:
        codes = (u / clip).round_().clamp_(-CODE_MAX, CODE_MAX)
        count = torch.bincount((codes + CODE_MAX).long().flatten(), minlength=2 * CODE_MAX + 1).double()
        bits.append(torch.special.entr(count / u.numel()).sum() / math.log(2.0))
        error.append((codes.mul_(clip).sub_(u).square_().sum(dim=1) * energy).double().sum())
    share = torch.stack(error) / (energy.double().sum() * u.size(1))
    return ClipCurve(tuple((weights * torch.stack(bits)).tolist()), tuple((weights * share).tolist()))


def choose_clips(curves: Mapping[str, ClipCurve], code_bytes: float) -> tuple[dict[str, float], float]:
    """The clip of every matrix for codes of at most `code_bytes` at their entropy, and the bytes of that choice.

    Where the bytes allow it, every matrix takes its clip of least error. Where nothing fits it is the coarsest choice,
    whose bytes are then above `code_bytes`.
    """
    hulls = {name: curve.hull() for name, curve in curves.items()}
    chosen = dict.fromkeys(hulls, 0)
    bits = sum(hull[0][0] for hull in hulls.values())
    for name, more, _ in _steps(hulls):
        if bits + more > 8 * code_bytes:
            break
        bits += more
        chosen[name] += 1
    return {name: hull[chosen[name]][2] for name, hull in hulls.items()}, bits / 8


def _steps(hulls: Mapping[str, list[tuple[float, float, float]]]) -> Iterator[tuple[str, float, float]]:
    """(matrix, bits it takes, error it removes) of each step along the hulls, most error for a bit first."""
    chosen = dict.fromkeys(hulls, 0)
    steps = [(-_gain(*hull[:2]), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        hull, at = hulls[name], chosen[name]
        yield name, hull[at + 1][0] - hull[at][0], hull[at][1] - hull[at + 1][1]
        chosen[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull[at + 1], hull[at + 2]), name))


class Budget(NamedTuple):
    """A size and the error of the weights that fit it."""

    bytes: int
    relative_error: float


def error_budgets(curves: Mapping[str, ClipCurve], weights: int, other_bytes: float) -> list[Budget]:
    """Budgets of the coarsest clips, of the first choice at or below each of ERRORS, and of the finest.

    `other_bytes` is what a file holds beside the codes. The bytes are predicted, within about two percent of the codes.
    """
    hulls = {name: curve.hull() for name, curve in curves.items()}
    bits, error = (sum(hull[0][part] for hull in hulls.values()) for part in (0, 1))
    path = [(bits, error)]
    for _, more, less in _steps(hulls):
        bits, error = bits + more, error - less
        path.append((bits, error))
    first = (next((i for i, point in enumerate(path) if point[1] <= most * weights), None) for most in ERRORS)
    chosen = sorted({0, len(path) - 1, *(i for i in first if i is not None)})
    return [Budget(math.ceil(other_bytes + ALLOWANCE * path[i][0] / 8), max(0.0, path[i][1]) / weights) for i in chosen]


class QuantizedMatrices(NamedTuple):
    """Matrices as codes int8 [N, K] and scale fp16 or fp32 [N], with what that cost them."""

    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    clips: dict[str, float]
    errors: dict[str, float]
    """relative squared error of each matrix"""
    relative_error: float
    """the mean of `errors`, each matrix counted by its weights"""
    budgets: Sequence[Budget] = ()
    """what other budgets would give, from `quantize_to_fit`"""


def quantize_matrices(matrices: Mapping[str, Tensor], clips: Mapping[str, float]) -> QuantizedMatrices:
    """Quantise each matrix [N, K] at its clip, as :func:`quantize_rows`."""
    codes, scales, errors = {}, {}, {}
    for name, matrix in matrices.items():
        codes[name], scales[name] = quantize_rows(matrix, clips[name])
        errors[name] = relative_error(matrix, codes[name], scales[name])
    weights = sum(matrix.numel() for matrix in matrices.values())
    total = sum(errors[name] * matrix.numel() for name, matrix in matrices.items()) / weights
    return QuantizedMatrices(codes, scales, dict(clips), errors, total)


def quantize_to_fit(
    matrices: Mapping[str, Tensor], budget: int, encode: Callable[[QuantizedMatrices, bool], Sequence[bytes]]
) -> tuple[QuantizedMatrices, Sequence[bytes]]:
    """Quantise with the least error for which the parts that `encode` makes have at most `budget` bytes together.

    `encode(quantized, search)` compresses with :func:`compress`. The clips are first fitted without the slow search,
    which tells the size within a percent or better, and then corrected by what the search finds. ValueError, with the
    smallest size there is and one of no large error, where the coarsest clips do not fit.
    """
    curves = {name: clip_curve(matrix) for name, matrix in matrices.items()}
    allowance, fitted = float(budget), None
    for _ in range(3):
        clips, entropy = choose_clips(curves, allowance)
        if clips == fitted:
            break
        fitted = clips
        size = sum(map(len, encode(quantize_matrices(matrices, clips), False)))
        allowance = (1 - MARGIN) * entropy + budget - size
    tried, best = [], None
    for left in reversed(range(TRIES)):
        # the last try is the coarsest choice, so that the size in the error is the smallest there is
        clips, entropy = choose_clips(curves, allowance if left or best else 0.0)
        if clips in tried:
            break
        tried.append(clips)
        quantized = quantize_matrices(matrices, clips)
        parts = encode(quantized, True)
        size = sum(map(len, parts))
        other_bytes = size - entropy
        if size <= budget and (best is None or quantized.relative_error < best[0].relative_error):
            best = quantized, parts
        if 0 <= budget - size <= SLACK * budget:
            break
        allowance = (1 - MARGIN) * entropy + budget - size
    budgets = error_budgets(curves, sum(matrix.numel() for matrix in matrices.values()), other_bytes)
    if best is None:
        raise ValueError(
            f"the smallest artifact of this model takes {size:,} bytes and the budget is {budget:,}; give a budget of "
            f"{advice(budgets)}, or train a smaller model (the embedding, the tokenizer and the header count). At "
            f"{size:,} bytes the relative squared error of the weights would be {budgets[0].relative_error:.2g}"
        )
    quantized, parts = best
    return quantized._replace(budgets=budgets), parts


def advice(budgets: Sequence[Budget]) -> str:
    """The smallest of `budgets` whose error is not large, and that error; the largest where there is none."""
    good = next((budget for budget in budgets if budget.relative_error <= LARGE_ERROR), budgets[-1])
    return f"about {good.bytes:,} bytes (relative squared error {good.relative_error:.2g})"


def compress(data: bytes, search: bool = True) -> bytes:
    """One zstd frame with content size and checksum: level 22, or next to no search for matches where that is smaller.

    In codes a match is an accident whose offset costs more than it saves. The optimal parser takes it all the same,
    because it prices it by earlier bytes. At 2 to 4 bits a code its output is further above the entropy than that of
    almost no search. Matches under 7 bytes are never looked for. `search=False` makes only the frame of almost no
    search, which is much quicker.
    """

    def frame(**options) -> bytes:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            22, source_size=len(data), min_match=7, write_checksum=True, write_content_size=True, **options
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(data)

    almost_no_matches = frame(strategy=zstandard.STRATEGY_FAST, hash_log=6, target_length=0)
    return min(almost_no_matches, frame(), key=len) if search else almost_no_matches
