"""What each piece of a training step saves, and how the step goes from torch.compile's time to klora's.

A piece's saving is torch.compile's time of it less klora's, forward and backward (groups `training` and `head`), times
how often a step runs it. What is left of the difference between the two whole steps (group `step`) is the rest: the
optimizers, the casts and the clip, the first and the last norm, and whatever the pieces do to each other in a step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.config import ModelConfig
from .step import ENTRIES, MODELS, model_config
from .timing import TIMINGS

BEFORE, AFTER = "torch.compile", "klora"
(STEP,) = ENTRIES
SIZES = {"D": "width", "hidden": "mlp_hidden", "H": "heads", "G": "kv_heads", "d": "head_dim", "V": "vocab_size"}
"""Sizes of a piece's shape, and the field of the network that they are."""

Result = Mapping[str, Any]


def times_in_step(config: ModelConfig) -> dict[str, int]:
    """Op -> how often a step runs the piece. The U-Net's first join is folded into the mix of its boundary."""
    blocks, pushes = config.blocks, config.blocks // 2
    joined = max(min(pushes, blocks - pushes) - 1, 0)
    return {
        "embedding_trained": 1,
        "residual_norm_between_blocks_trained": blocks - 1 - joined,
        "residual_norm_joined_trained": joined,
        "qkv_attention_trained": blocks,
        "residual_mlp_trained": blocks,
        "softcap_nll_forward_backward": 1,
    }


@dataclass(frozen=True)
class Saving:
    """One piece: the milliseconds of its two variants, and how often a step runs it."""

    op: str
    before: float
    after: float
    times: int

    @property
    def name(self) -> str:
        return self.op.removesuffix("_trained").removesuffix("_forward_backward").replace("_", " ")

    @property
    def ms(self) -> float:
        """What a step would lose without it."""
        return self.times * (self.before - self.after)


@dataclass(frozen=True)
class Waterfall:
    """A whole step under both, and the pieces between them, the largest saving first."""

    shape: str
    before: float
    after: float
    savings: Sequence[Saving]
    unmeasured: Sequence[str]
    """ops of the step that no record has"""
    others: Mapping[str, float]
    """the other variants' milliseconds"""

    @property
    def rest(self) -> float:
        return self.before - self.after - sum(saving.ms for saving in self.savings)


def savings_of(results: Iterable[Result], sizes: Mapping[str, int]) -> list[Saving]:
    """The pieces of a step of `sizes` that were measured at its shapes, in the step's order."""
    config, results = model_config(sizes), list(results)
    found = []
    for op, times in times_in_step(config).items():
        of_step = [r for r in results if r["op"] == op and _is_of(r["sizes"], sizes, config)]
        pair = _pair(of_step)
        if pair and times:
            found.append(Saving(op, *pair, times))
    return found


def waterfalls(results: Iterable[Result]) -> list[Waterfall]:
    """One for each shape of the step at which both variants were measured and a piece was."""
    results, found = list(results), []
    steps: dict[str, list[Result]] = {}
    for result in results:
        if result["op"] == STEP.op and result["sizes"].get("blocks") in MODELS:
            steps.setdefault(result["shape"], []).append(result)
    for shape, of_shape in steps.items():
        sizes, pair = of_shape[0]["sizes"], _pair(of_shape)
        savings = savings_of(results, sizes) if pair else []
        if savings:
            wanted = {op for op, times in times_in_step(model_config(sizes)).items() if times}
            missing = sorted(wanted - {saving.op for saving in savings})
            savings.sort(key=lambda saving: -saving.ms)
            others = {name: ms for name, ms in _medians(of_shape).items() if name not in (BEFORE, AFTER)}
            found.append(Waterfall(shape, *pair, savings, missing, others))
    return found


def _is_of(piece: Mapping[str, int], step: Mapping[str, int], config: ModelConfig) -> bool:
    """Whether a piece's shape is that of the step."""
    alike = all(piece[size] == getattr(config, field) for size, field in SIZES.items() if size in piece)
    return alike and all(piece.get(size) == step[size] for size in ("B", "S"))


def _pair(results: Sequence[Result]) -> tuple[float, float] | None:
    """Cold medians of both variants, timed alike."""
    for timing in TIMINGS:
        ms = _medians([result for result in results if result["timing"] == timing])
        if BEFORE in ms and AFTER in ms:
            return ms[BEFORE], ms[AFTER]
    return None


def _medians(results: Iterable[Result]) -> dict[str, float]:
    """Variant -> cold median."""
    return {result["variant"]: result["ms"]["p50"] for result in results if result["cache"] == "cold"}
