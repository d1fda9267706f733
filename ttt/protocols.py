"""How a document is adapted and which numbers may be called its score.

| protocol | passes | what is recorded | valid score? |
|---|---|---|---|
| score_first | one | a chunk's loss before any update that has seen it | yes |
| multi_epoch | `epochs` | the last pass: its weights were trained on the same targets | no, LEAKY |
| min_nll | `epochs` | each document's best pass: hindsight on top of that | no, LEAKY |

The leaky two exist to reproduce earlier work and to show what a leak is worth. Whatever prints or stores their result
goes through :func:`label`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.config import ConfigError, Settings, setting

SCORE_FIRST, MULTI_EPOCH, MIN_NLL = "score_first", "multi_epoch", "min_nll"
TARGETS = "q", "k", "v", "o", "up", "down", "head"
"""The matrices that a LoRA may be added to: the projections, Wo, W1 and W2 of the MLP, and the head."""
MOST_RANK = 128
LEAKY = "LEAKY"
LEAK_WARNING = (
    "LEAKY: these bits per byte come from weights that were trained on the very targets they score. "
    "They are not a valid score and must not be reported as one; use score_first."
)


@dataclass(frozen=True)
class TTTConfig(Settings):
    """Test-time training: what is adapted, with which steps, and how it is scored.

    The defaults are the preset `design` without its deadline. Its steps are too large for one pass over text that a
    model knows well: :func:`ttt_preset` gives what is measured to suit it.

    Every field is a keyword; its help and range stand beside it. ConfigError: a value out of range, or a chunk longer
    than its window.

    Example: config = TTTConfig(lr=0.002, temperature=1.0, min_tokens=64)
    """

    protocol: str = setting(
        SCORE_FIRST, "multi_epoch and min_nll are LEAKY", choices=(SCORE_FIRST, MULTI_EPOCH, MIN_NLL)
    )
    epochs: int = setting(6, "passes over a document in the leaky protocols", at_least=1)
    steps_per_chunk: int = setting(1, "Adam steps on a chunk once it is scored", at_least=1, at_most=64)
    chunk: int = setting(256, "targets a chunk", at_least=1, at_most=2**20)
    window: int = setting(1024, "most tokens a chunk is scored in, itself included", at_least=1, at_most=2**20)
    min_tokens: int = setting(512, "documents of fewer tokens (BOS counts) are left to the base model", at_least=2)
    targets: str = setting("q,k,v,head", "matrices that have a LoRA: some of q, k, v, o, up, down and head")
    lora_rank: int = setting(8, "rank of the LoRA on each matrix but the head", at_least=1, at_most=MOST_RANK)
    head_rank: int = setting(16, "rank of the LoRA on the head", at_least=1, at_most=MOST_RANK)
    q_rank: int = setting(0, "rank of the LoRA on Q; 0: lora_rank", at_least=0, at_most=MOST_RANK)
    k_rank: int = setting(0, "rank of the LoRA on K; 0: lora_rank", at_least=0, at_most=MOST_RANK)
    v_rank: int = setting(0, "rank of the LoRA on V; 0: lora_rank", at_least=0, at_most=MOST_RANK)
    o_rank: int = setting(0, "rank of the LoRA on Wo; 0: lora_rank", at_least=0, at_most=MOST_RANK)
    up_rank: int = setting(0, "rank of the LoRA on W1 of the MLP; 0: lora_rank", at_least=0, at_most=MOST_RANK)
    down_rank: int = setting(0, "rank of the LoRA on W2 of the MLP; 0: lora_rank", at_least=0, at_most=MOST_RANK)
    q_alpha: float = setting(0.0, "scales the LoRA on Q by q_alpha / rank; 0: by 1", at_least=0.0)
    k_alpha: float = setting(0.0, "scales the LoRA on K by k_alpha / rank; 0: by 1", at_least=0.0)
    v_alpha: float = setting(0.0, "scales the LoRA on V by v_alpha / rank; 0: by 1", at_least=0.0)
    o_alpha: float = setting(0.0, "scales the LoRA on Wo by o_alpha / rank; 0: by 1", at_least=0.0)
    up_alpha: float = setting(0.0, "scales the LoRA on W1 by up_alpha / rank; 0: by 1", at_least=0.0)
    down_alpha: float = setting(0.0, "scales the LoRA on W2 by down_alpha / rank; 0: by 1", at_least=0.0)
    head_alpha: float = setting(0.0, "scales the LoRA on the head by head_alpha / rank; 0: by 1", at_least=0.0)
    a_scale: float = setting(1.0, "A starts as a_scale * U(-1/sqrt(K), 1/sqrt(K)), K its inputs", at_least=0.0)
    lr: float = setting(0.01, "Adam learning rate", at_least=0.0)
    head_lr: float = setting(2.0, "multiplies lr for the head's LoRA", at_least=0.0)
    q_lr: float = setting(0.5, "multiplies lr for the LoRA on Q", at_least=0.0)
    k_lr: float = setting(0.3, "multiplies lr for the LoRA on K", at_least=0.0)
    v_lr: float = setting(1.5, "multiplies lr for the LoRA on V", at_least=0.0)
    o_lr: float = setting(1.0, "multiplies lr for the LoRA on Wo", at_least=0.0)
    up_lr: float = setting(1.0, "multiplies lr for the LoRA on W1 of the MLP", at_least=0.0)
    down_lr: float = setting(1.0, "multiplies lr for the LoRA on W2 of the MLP", at_least=0.0)
    bias_lr: float = setting(3.0, "multiplies lr for the biases", at_least=0.0)
    lr_floor: float = setting(0.1, "the leaky protocols' cosine ends at this share of lr", at_least=0.0, at_most=1.0)
    beta1: float = setting(0.9, "Adam beta 1", at_least=0.0, below=1.0)
    beta2: float = setting(0.95, "Adam beta 2", at_least=0.0, below=1.0)
    eps: float = setting(1e-10, "Adam epsilon", above=0.0)
    weight_decay: float = setting(
        0.0, "AdamW: a step also takes the learning rate times weight_decay of each parameter from it", at_least=0.0
    )
    temperature: float = setting(0.98, "divides the logits of adapted documents", above=0.0)
    batch: int = setting(64, "documents adapted side by side", at_least=1)
    deadline: float = setting(0.0, "seconds of scoring after which nothing more is adapted; 0: none", at_least=0.0)
    adapter_seed: int = setting(
        0, "seed of the adapters' initial state, one for all documents", at_least=0, at_most=2**63 - 1
    )

    def check(self):
        self.require(self.chunk <= self.window, "chunk", f"at most window={self.window}")
        names = self.target_names
        possible = set(names) <= set(TARGETS) and len(set(names)) == len(names)
        self.require(possible, "targets", f"some of {', '.join(TARGETS)}, each once, with commas between them")

    @property
    def target_names(self) -> list[str]:
        """The matrices that have a LoRA."""
        return [name.strip() for name in self.targets.split(",")]

    def rank(self, target: str) -> int:
        """The rank of the LoRA on a matrix: 0 where there is none."""
        if target not in self.target_names:
            return 0
        return self.head_rank if target == "head" else getattr(self, f"{target}_rank") or self.lora_rank

    def scale(self, target: str) -> float:
        """What the LoRA on a matrix is multiplied by: alpha / rank."""
        alpha = getattr(self, f"{target}_alpha")
        return alpha / max(self.rank(target), 1) if alpha else 1.0

    @property
    def is_leaky(self) -> bool:
        """Whether the protocol's numbers are no valid score."""
        return self.protocol != SCORE_FIRST

    @property
    def passes(self) -> int:
        """How often a document is read: once, or `epochs` times in a leaky protocol."""
        return self.epochs if self.is_leaky else 1


DESIGN, QUICK, THOROUGH = "design", "quick", "thorough"

PRESETS: dict[str, dict[str, Any]] = {
    DESIGN: {"deadline": 550.0},
    QUICK: {"lr": 0.002, "temperature": 1.0},
    THOROUGH: {
        "lr": 0.0005,
        "temperature": 1.0,
        "chunk": 64,
        "steps_per_chunk": 2,
        "lora_rank": 16,
        "head_rank": 32,
    },
}
"""Named sets of constants, as changes to the defaults. `design` is the original's, made for six passes over the same
text in 550 seconds; the others have no deadline, so that no score depends on a machine's speed. They are from a sweep
of one pass of score_first (bench/sweep.py): `thorough` is its end, but for adapting to documents of 66 to 511 tokens,
which was worth nothing; `quick` is the best row with the design's one step for 256 targets, at the temperature of the
other."""


def ttt_preset(name: str | None = None, protocol: str = SCORE_FIRST) -> TTTConfig:
    """The config of a preset under `protocol`. None: `quick` for score_first, `design` for the leaky protocols.

    Presets are `quick`, `thorough` and `design`. ConfigError: a name or a protocol that does not exist.

    Example: config = ttt_preset("thorough").override({"min_tokens": 64})
    """
    config = TTTConfig(protocol=protocol)
    if name is None:
        name = DESIGN if config.is_leaky else QUICK
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; allowed: {', '.join(PRESETS)}")
    return config.override(PRESETS[name])


def label(protocol: str) -> str:
    """The protocol's name as it is shown to people: `score_first`, or `min_nll (LEAKY)`."""
    return protocol if protocol == SCORE_FIRST else f"{protocol} ({LEAKY})"


def learning_rate(config: TTTConfig, step: Tensor, chunks: Tensor) -> Tensor:
    """Learning rate of each document's next Adam step; `step` int [B] counts those taken, `chunks` int [B] its chunks.

    score_first: constant, so that it depends on nothing later than the chunk. Leaky protocols: a cosine from lr to
    lr_floor * lr over that document's own steps, whatever else is in its batch.
    """
    if not config.is_leaky:
        return torch.full(step.shape, config.lr, device=step.device)
    last = (config.epochs * config.steps_per_chunk * (chunks - 1) - 1).clamp(min=1)
    share = (step / last).clamp(max=1.0)
    cosine = 0.5 * (1 + torch.cos(math.pi * share))
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * cosine)
