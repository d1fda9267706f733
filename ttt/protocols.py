"""How a document is adapted and which numbers may be called its score.

| protocol | passes | what is recorded | valid score? |
|---|---|---|---|
| score_first | one | a chunk's loss before any update that has seen it | yes, in the layout `start` |
| multi_epoch | `epochs` | the last pass: its weights were trained on the same targets | no, LEAKY |
| min_nll | `epochs` | each document's best pass: hindsight on top of that | no, LEAKY |

The leaky two exist to reproduce earlier work and to show what a leak is worth. Whatever prints or stores their result
goes through :func:`label`. In the layout `original` a score can depend on how its document goes on: nothing leaks into
the weights, but it is not strictly causal, and not called valid.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.config import ConfigError, Settings, setting

SCORE_FIRST, MULTI_EPOCH, MIN_NLL = "score_first", "multi_epoch", "min_nll"
START, ORIGINAL = "start", "original"
RECOMPUTED, CACHED = "recomputed", "cached"
FROM_ALL, FROM_A = "all", "a"
TARGETS = "q", "k", "v", "o", "up", "down", "head"
"""The matrices that a LoRA may be added to: the projections, Wo, W1 and W2 of the MLP, and the head."""
FORM_OF_TARGETS = f"some of {', '.join(TARGETS)}, each once, with commas between them"
MOST_RANK = 128
LEAKY = "LEAKY"
LEAK_WARNING = (
    "LEAKY: these bits per byte come from weights that were trained on the very targets they score. "
    "They are not a valid score and must not be reported as one; use score_first."
)

NOT_CAUSAL = (
    "not a valid score: with layout=original the last window and what is adapted depend on where a document ends, so "
    "that a score can depend on text after it; layout=start does not"
)

MIN_TOKENS = 512


@dataclass(frozen=True)
class TTTConfig(Settings):
    """Test-time training: what is adapted, with which steps, and how it is scored.

    The defaults are the preset `design` without its deadline. Its steps are too large for one pass over text that a
    model knows well: :func:`ttt_preset` gives what is measured to suit it.

    In layout `start` no score depends on what comes later in its document. Chunk j covers the targets [j chunk, (j + 1)
    chunk), and its window begins at max(0, (j + 1) chunk - window), whether the document goes on or not. An Adam step
    is taken after a chunk if `adapt_from` targets are scored by then. `temperature` divides the logits from the first
    target on that a step could have changed: `first_adapted`. A document that has none is left to the base model, which
    gives it the same numbers to rounding.

    Every field is a keyword; its help and range stand beside it. ConfigError: a value out of range, or a chunk longer
    than its window.

    Example: config = TTTConfig(lr=0.002, temperature=1.0, min_tokens=64)
    """

    protocol: str = setting(
        SCORE_FIRST, "multi_epoch and min_nll are LEAKY", choices=(SCORE_FIRST, MULTI_EPOCH, MIN_NLL)
    )
    epochs: int = setting(6, "passes over a document in the leaky protocols", at_least=1)
    steps_per_chunk: int = setting(1, "Adam steps on a chunk once it is scored", at_least=1, at_most=64)
    layout: str = setting(
        ORIGINAL,
        "start: windows lie as if the document went on, so that no score depends on later text; original: the last "
        "window ends with the document, and documents under min_tokens are not adapted",
        choices=(START, ORIGINAL),
    )
    chunk: int = setting(
        256, "targets a chunk; also the stride of the windows, adapted or not", at_least=1, at_most=2**20
    )
    window: int = setting(
        1024,
        "most tokens a chunk is scored in, itself included: every target past them has at least window - chunk "
        "tokens of context",
        at_least=1,
        at_most=2**20,
    )
    adapt_from: int = setting(
        0, "layout start: targets of a document that are scored before its first Adam step", at_least=0
    )
    context: str = setting(
        RECOMPUTED,
        "recomputed: a chunk's whole window is computed anew; cached: keys and values of earlier chunks stay as they "
        "were when their chunk was scored (layout start)",
        choices=(RECOMPUTED, CACHED),
    )
    min_tokens: int = setting(
        MIN_TOKENS,
        "layout original: documents of fewer tokens (BOS counts) are left to the base model",
        at_least=2,
    )
    targets: str = setting("q,k,v,head", "matrices that have a LoRA", form=FORM_OF_TARGETS)
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
    a_scale: float = setting(1.0, "A starts as a_scale * U(-1/sqrt(K), 1/sqrt(K)), K its inputs", above=0.0)
    lr: float = setting(0.01, "Adam learning rate", at_least=0.0)
    head_lr: float = setting(2.0, "multiplies lr for the head's LoRA", at_least=0.0)
    q_lr: float = setting(0.5, "multiplies lr for the LoRA on Q", at_least=0.0)
    k_lr: float = setting(0.3, "multiplies lr for the LoRA on K", at_least=0.0)
    v_lr: float = setting(1.5, "multiplies lr for the LoRA on V", at_least=0.0)
    o_lr: float = setting(1.0, "multiplies lr for the LoRA on Wo", at_least=0.0)
    up_lr: float = setting(1.0, "multiplies lr for the LoRA on W1 of the MLP", at_least=0.0)
    down_lr: float = setting(1.0, "multiplies lr for the LoRA on W2 of the MLP", at_least=0.0)
    bias_lr: float = setting(3.0, "multiplies lr for the biases", at_least=0.0)
    lr_warmup: int = setting(
        0,
        "the rate of a step after p targets of its document is lr * min(1, p / lr_warmup) / (1 + p / lr_half)",
        at_least=0,
        zero="no warmup",
    )
    lr_half: int = setting(
        0, "targets after which the rate has fallen to lr / 2; see lr_warmup", at_least=0, zero="it does not fall"
    )
    lr_floor: float = setting(0.1, "the leaky protocols' cosine ends at this share of lr", at_least=0.0, at_most=1.0)
    beta1: float = setting(0.9, "Adam beta 1", at_least=0.0, below=1.0)
    beta2: float = setting(0.95, "Adam beta 2", at_least=0.0, below=1.0)
    eps: float = setting(1e-10, "Adam epsilon", above=0.0)
    weight_decay: float = setting(
        0.0, "AdamW: a step also takes the learning rate times weight_decay of each parameter from it", at_least=0.0
    )
    temperature: float = setting(0.98, "divides the logits of adapted documents", above=0.0)
    batch: int = setting(64, "documents adapted side by side", at_least=1)
    phases: int = setting(
        0,
        "layout start: after each of so many groups of documents is scored, a shared adapter learns from it and all "
        "later documents start from there, so that their scores depend on earlier documents",
        at_least=0,
        at_most=1024,
        zero="every document is on its own",
    )
    phase_start: str = setting(
        FROM_ALL,
        "all: later documents start from the shared adapter; a: from its A alone, with B and biases of zero, so that "
        "each is scored as by the base model until its own first step",
        choices=(FROM_ALL, FROM_A),
    )
    phase_lr: float = setting(0.001, "Adam learning rate of the shared adapter", at_least=0.0)
    phase_passes: int = setting(1, "times that the shared adapter reads each document of a group", at_least=1)
    phase_chunks: int = setting(
        16, "chunks that a step of the shared adapter learns from, whatever the batch", at_least=1, at_most=1024
    )
    deadline: float = setting(0.0, "seconds of scoring after which nothing more is adapted; 0: none", at_least=0.0)
    adapter_seed: int = setting(
        0, "seed of the adapters' initial state, one for all documents", at_least=0, at_most=2**63 - 1
    )

    def check(self):
        self.require(self.chunk <= self.window, "chunk", f"at most window={self.window}")
        from_start = self.layout == START
        self.require(not (from_start and self.is_leaky), "layout", f"original, with protocol={self.protocol}")
        self.require(from_start or self.context == RECOMPUTED, "context", "recomputed, with layout=original")
        for name in ("lr_warmup", "lr_half"):
            leaky = f"0, with protocol={self.protocol}, whose rate is a cosine"
            self.require(not self.is_leaky or not getattr(self, name), name, leaky)
        leaky = f"0, with protocol={self.protocol}: phases are for {SCORE_FIRST}"
        self.require(not (self.phases and self.is_leaky), "phases", leaky)
        self.require(from_start or not self.phases, "phases", "0, with layout=original; give layout=start")
        self.require(from_start or not self.adapt_from, "adapt_from", "0; layout=original goes by min_tokens")
        self.require(
            not from_start or self.min_tokens == MIN_TOKENS,
            "min_tokens",
            f"{MIN_TOKENS}, which is not used: layout=start goes by adapt_from, and adapts every document longer than "
            "that and than a chunk",
        )
        names = self.target_names
        possible = set(names) <= set(TARGETS) and len(set(names)) == len(names)
        self.require(possible, "targets", FORM_OF_TARGETS)
        for target in TARGETS:
            # Those that every config has a value of, such as head_rank and q_lr, belong to presets for any targets.
            for name in (f"{target}_alpha", *([] if target == "head" else [f"{target}_rank"])):
                self.require(target in names or not getattr(self, name), name, f"0, with targets={self.targets}")
        self.require(
            self.context == RECOMPUTED or not {"q", "k", "v"}.isdisjoint(names),
            "targets",
            "some of q, k and v among them, with context=cached",
        )

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
    def is_causal(self) -> bool:
        """Whether a target's score depends on the text up to it alone: one pass in the layout `start`."""
        return not self.is_leaky and self.layout == START

    @property
    def learns(self) -> bool:
        """Whether any step can change an adapter; where none can, the base model's score is the score."""
        return self.lr > 0 or (self.starts_learned and self.phase_lr > 0)

    @property
    def starts_learned(self) -> bool:
        """Whether what earlier documents taught is in a later document's first scores: not by A alone, as B is zero."""
        return self.phases > 0 and self.phase_start == FROM_ALL

    @property
    def passes(self) -> int:
        """How often a document is read: once, or `epochs` times in a leaky protocol."""
        return self.epochs if self.is_leaky else 1

    @property
    def trained_from(self) -> int:
        """The first chunk after which an Adam step may be taken."""
        return max(-(-self.adapt_from // self.chunk) - 1, 0)

    @property
    def first_adapted(self) -> int:
        """The first target that is scored after an Adam step could have been taken."""
        return (self.trained_from + 1) * self.chunk

    def adapts(self, targets: Any) -> Any:
        """Whether a document of `targets` targets is adapted, not left to the base model: of an int or of an array.

        With the context `cached` a document that outgrows its first window is, too: from there on the base model reads
        windows anew, and a document that goes on would have been scored from what is kept.
        """
        if self.layout == ORIGINAL:
            return targets + 1 >= self.min_tokens
        in_sight = self.window // self.chunk * self.chunk
        return targets > (min(self.first_adapted, in_sight) if self.context == CACHED else self.first_adapted)

    def is_left_to_base(self, targets: int, group: int) -> bool:
        """Whether a document of `targets` targets in that group of the phases is left to the base model.

        With `phase_start` all, in later groups even the first target is scored by an adapter that has learned. At a
        rate of zero none has.
        """
        return not self.learns or (not targets if group and self.starts_learned else not self.adapts(targets))

    def temperature_of(self, chunk: int) -> float:
        """What divides the logits of a chunk's targets in a document that is adapted."""
        return 1.0 if self.layout == START and chunk <= self.trained_from else self.temperature

    @property
    def inputs(self) -> int:
        """Most inputs of a document that a step computes."""
        return self.chunk if self.context == CACHED else self.window

    def window_start(self, chunk: Any, end: Any) -> Any:
        """The input at which the windows of chunks begin that end before target `end`: of arrays or tensors."""
        last = (chunk + 1) * self.chunk if self.layout == START else end
        return (last - self.window).clip(min=0)


DESIGN, QUICK, THOROUGH, BEST, CONTEST, HF = "design", "quick", "thorough", "best", "contest", "hf"

_QUICK = {"layout": START, "lr": 0.002, "beta1": 0.0, "temperature": 1.0}
_THOROUGH = _QUICK | {"lr": 0.0005, "chunk": 64, "targets": ",".join(TARGETS)}
PRESETS: dict[str, dict[str, Any]] = {
    DESIGN: {"deadline": 550.0},
    QUICK: _QUICK,
    THOROUGH: _THOROUGH,
    BEST: _THOROUGH | {"lr": 0.00025, "lora_rank": 64, "head_rank": 64},
    # openai/parameter-golf, pull request 1855: its LoRAs and their optimizer, without its SGD of the base.
    CONTEST: {
        "layout": START,
        "context": CACHED,
        "chunk": 48,
        "window": 2048,
        "targets": ",".join(TARGETS),
        "lora_rank": 80,
        "head_rank": 80,
        **{f"{target}_alpha": 144.0 for target in TARGETS},
        "lr": 0.0001,
        **{f"{target}_lr": 1.0 for target in TARGETS},
        "bias_lr": 0.0,
        "beta1": 0.0,
        "beta2": 0.99,
        "weight_decay": 0.5,
        "temperature": 1.0,
    },
    HF: {
        "layout": START,
        "targets": "q,k,v,o,up,down",
        "lr": 0.0005,
        **{f"{target}_lr": 1.0 for target in TARGETS},
        "bias_lr": 0.0,
        "beta1": 0.0,
        "temperature": 1.0,
    },
}
"""Named sets of constants, as changes to the defaults. `design` is the original's, made for six passes over the same
text in 550 seconds. The others have no deadline and the layout `start`, so that no score depends on a machine's speed
or on later text. `quick`, `thorough` and `best` are rows of a sweep of one pass of score_first, on text that they were
not chosen on and for two models (docs/notes/adapting.md): the design's one step for 256 targets; a step for 64, of
LoRAs on every matrix; and those at rank 64. `contest` is another's, to be compared with: one rate for all matrices and
no biases. `hf` is for models of transformers: as `quick`, but for what those have not, and all matrices but the head at
one rate. It is not tuned yet."""


def ttt_preset(name: str | None = None, protocol: str = SCORE_FIRST) -> TTTConfig:
    """The config of a preset under `protocol`. None: `quick` for score_first, `design` for the leaky protocols.

    Presets are `quick`, `thorough`, `best`, `contest`, `design` and, for models of transformers, `hf`. The leaky
    protocols keep the layout `original`, which `contest` cannot have. ConfigError: a name or a protocol that does not
    exist, or a preset under a leaky protocol that is not for it.

    Example: config = ttt_preset("thorough").override({"adapt_from": 512})
    """
    config = TTTConfig(protocol=protocol)
    if name is None:
        name = DESIGN if config.is_leaky else QUICK
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; allowed: {', '.join(PRESETS)}")
    changes = PRESETS[name] | ({"layout": ORIGINAL} if config.is_leaky else {})
    return config.override(changes)


def label(protocol: str) -> str:
    """The protocol's name as it is shown to people: `score_first`, or `min_nll (LEAKY)`."""
    return protocol if protocol == SCORE_FIRST else f"{protocol} ({LEAKY})"


def learning_rate(config: TTTConfig, step: Tensor, chunks: Tensor) -> Tensor:
    """Learning rate of each document's next Adam step; `step` int [B] counts those taken, `chunks` int [B] its chunks.

    score_first: lr, which lr_warmup and lr_half change by the targets that are scored when the step is taken: by
    nothing later than the chunk. Leaky protocols: a cosine from lr to lr_floor * lr over that document's own steps,
    whatever else is in its batch.
    """
    if not config.is_leaky:
        # In float64, which the pool rounds once.
        rate = torch.full(step.shape, config.lr, dtype=torch.float64, device=step.device)
        if not (config.lr_warmup or config.lr_half):
            return rate
        scored = (config.trained_from + 1 + step // config.steps_per_chunk).double() * config.chunk
        if config.lr_warmup:
            rate = rate * (scored / config.lr_warmup).clamp(max=1.0)
        return rate / (1 + scored / config.lr_half) if config.lr_half else rate
    last = (config.epochs * config.steps_per_chunk * (chunks - 1) - 1).clamp(min=1)
    share = (step / last).clamp(max=1.0)
    cosine = 0.5 * (1 + torch.cos(math.pi * share))
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * cosine)
