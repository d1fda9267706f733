"""Every number of the system, with what it means and what it may be.

Three frozen dataclasses are built on :class:`Settings`: :class:`ModelConfig` (the network), :class:`TrainConfig` (its
training) and, in the package ``ttt``, ``TTTConfig`` (its adaptation). A preset is a named pair of the first two.

A settings object cannot exist with an impossible value: construction raises :class:`ConfigError`, whose text names the
field, what was given and what is allowed.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Self

from ..errors import KloraError

LARGEST = 2**53
"""Of an integer whose field names no other limit."""


class ConfigError(KloraError, ValueError):
    """A field that does not exist or a value that is not allowed.

    Example: with contextlib.suppress(ConfigError): config = ModelConfig(heads=7)
    """


def setting(
    default,
    help,
    *,
    at_least=None,
    above=None,
    at_most=None,
    below=None,
    choices=None,
    zero=None,
    form=None,
    execution=None,
):
    """Declare a field: its default (whose type is the field's type), a line of help and the values allowed.

    `zero` says what 0 means where it is no number like the others, `form` what a text looks like. `execution`: it says
    how the work is done, not what comes out; a stored config that is older than the field need not have it.
    """
    allowed = {
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "choices": choices,
        "zero": zero,
        "form": form,
        "execution": execution,
    }
    return dataclasses.field(
        default=default, metadata={"help": help, **{k: v for k, v in allowed.items() if v is not None}}
    )


def allowed_values(field: dataclasses.Field) -> str:
    """The values a field takes, in words: ``'int, at least 1'``."""
    rules = field.metadata
    if isinstance(field.default, bool):
        return "true or false"
    if "form" in rules:
        return rules["form"]
    if "choices" in rules:
        return "one of " + ", ".join(str(choice) for choice in rules["choices"])
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    parts = [f"{words[rule]} {rules[rule]}" for rule in words if rule in rules]
    zero = f" (0: {rules['zero']})" if "zero" in rules else ""
    return ", ".join([type(field.default).__name__, *parts]) + zero


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the config dataclasses: range checks, overrides from text, and a dictionary form for JSON."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_allowed(field, value):
                allowed = allowed_values(field) + (f", at most {LARGEST}" if _is_too_large(field, value) else "")
                raise ConfigError(f"{field.name}={value!r:.200} is not possible; allowed: {allowed}")
        self.check()

    def check(self) -> None:
        """Rules between fields. Overridden where there are any; raises ConfigError."""

    def require(self, holds: bool, name: str, allowed: str) -> None:
        """Raise ConfigError for field `name` unless `holds`; `allowed` says what would be accepted."""
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)!r} is not possible; allowed: {allowed}")

    def override(self, values: Mapping[str, Any]) -> Self:
        """A copy with some fields replaced. Text is converted to the field's type; unknown names are refused."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        unknown = [name for name in values if name not in fields]
        if unknown:
            raise ConfigError(unknown_field(unknown[0], values[unknown[0]], fields))
        return dataclasses.replace(self, **{name: _parse(fields[name], value) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`. A missing field is refused like an unknown one, unless it is of execution."""
        fields = dataclasses.fields(cls)
        missing = [field.name for field in fields if field.name not in values and "execution" not in field.metadata]
        if missing:
            raise ConfigError(f"{cls.__name__} has no value for {', '.join(missing)}")
        return cls().override(values)


def unknown_field(name: str, value: Any, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known fields: {', '.join(sorted(known))}"
    return f"there is no field {name!r} (given {name}={value}); {hint}"


def _is_too_large(field: dataclasses.Field, value: Any) -> bool:
    """Whether an integer without a limit of its own is one that float64, which most of them meet, does not hold."""
    return type(value) is int and abs(value) > LARGEST and "at_most" not in field.metadata


def _is_allowed(field: dataclasses.Field, value: Any) -> bool:
    rules = field.metadata
    if type(value) is not type(field.default):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if _is_too_large(field, value):
        return False
    return (
        ("choices" not in rules or value in rules["choices"])
        and ("at_least" not in rules or value >= rules["at_least"])
        and ("above" not in rules or value > rules["above"])
        and ("at_most" not in rules or value <= rules["at_most"])
        and ("below" not in rules or value < rules["below"])
    )


def _parse(field: dataclasses.Field, value: Any) -> Any:
    """Bring `value` to the field's type where that loses nothing; anything else is refused by name."""
    kind = type(field.default)
    try:
        if isinstance(value, str) and kind is bool:
            return {"true": True, "false": False}.get(value.strip().lower(), value)
        if isinstance(value, str) and kind is not str:
            text = value.strip().replace("_", "")
            return int(text) if kind is int else float(text)
        if kind is float and type(value) is int:
            return float(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"{field.name}={value!r} is not possible; allowed: {allowed_values(field)}") from None
    return value


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """The network: sizes, vocabulary, rotary base. Defaults are the `seed` preset: 10 blocks, 24,468,561 parameters.

    Every field is a keyword; its help and range stand beside it. ConfigError: a value out of range, heads that do not
    divide width, kv_heads that do not divide heads, a head_dim = width / heads that is odd or 2.

    Example: config = ModelConfig(width=256, blocks=6, heads=4, kv_heads=2)
    """

    vocab_size: int = setting(1024, "tokenizer pieces", at_least=260, at_most=65536)
    width: int = setting(512, "residual width D", at_least=8, at_most=65536)
    blocks: int = setting(10, "transformer blocks L", at_least=1, at_most=256)
    heads: int = setting(8, "query heads", at_least=1, at_most=65536)
    kv_heads: int = setting(4, "key and value heads; divides heads", at_least=1, at_most=65536)
    mlp_hidden: int = setting(1536, "hidden width of the MLP", at_least=8, at_most=2**20)
    rope_base: float = setting(50000.0, "base of the rotary frequencies", above=1.0)
    softcap: float = setting(
        30.0, "logits are softcap * tanh(logits / softcap); 0: as they are", at_least=0.0, zero="no softcap"
    )
    train_length: int = setting(
        1024, "tokens in a training row; longer inputs scale rope_base", at_least=8, at_most=2**20
    )
    bigram_rows: int = setting(
        2048, "rows of the bigram hash table; the last stands for no previous token", at_least=2, at_most=2**24
    )
    bigram_width: int = setting(128, "width of a bigram row before its projection to D", at_least=1, at_most=65536)

    def check(self):
        self.require(self.width % self.heads == 0, "heads", f"a divisor of width={self.width}")
        self.require(self.heads % self.kv_heads == 0, "kv_heads", f"a divisor of heads={self.heads}")
        self.require(
            self.head_dim % 2 == 0 and self.head_dim > 2,
            "heads",
            "a number that makes head_dim = width/heads even and above 2 (RoPE rotates pairs)",
        )

    @property
    def head_dim(self) -> int:
        """Width of one head, of queries, keys and values alike."""
        return self.width // self.heads

    @property
    def logit_softcap(self) -> float:
        """`softcap` as the ops take it: infinite where it is off. JSON, which keeps the setting, has no infinity."""
        return self.softcap or math.inf

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output rows of Wq, Wk, Wv."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """How a model is trained. Defaults are the `seed` preset on any number of GPUs.

    Every field is a keyword; its help and range stand beside it. Times are in seconds, batches in tokens. ConfigError:
    a value out of range, a momentum that starts above where it ends, or several gradient_buckets between two graphs.

    Example: config = TrainConfig(seconds=120.0, batch_tokens=8192, micro_batch_tokens=8192)
    """

    seconds: float = setting(600.0, "wall-clock cap of the training loop in seconds", above=0.0)
    max_steps: int = setting(0, "stop after this many steps; 0: only the clock stops the run", at_least=0)
    batch_tokens: int = setting(786_432, "tokens a step, over all ranks", at_least=8, at_most=2**32)
    micro_batch_tokens: int = setting(98_304, "most tokens in one forward on one rank", at_least=8)
    fused: str = setting(
        "auto",
        "the step on our kernels, in CUDA graphs; auto: on a GPU; false: eager PyTorch",
        choices=("auto", "true", "false"),
    )
    attention: str = setting(
        "auto",
        "what runs attention; auto: on a GPU the fastest at this shape. klora promises the same bits in every run",
        choices=("auto", "klora", "cudnn", "flash", "efficient", "math", "fa2", "fa3", "fa4"),
    )
    document_mask: bool = setting(False, "attention keeps the documents of a row apart, in training and validation")
    qat_share: float = setting(
        0.0,
        "share of the run, at its end, in whose steps the matrices of blocks are at int6 values, as export rounds them",
        at_least=0.0,
        at_most=1.0,
        zero="never",
    )
    qat_clip: float = setting(
        0.11, "and their scale in units of a row's rms; export searches one a matrix", above=0.0, at_most=2.0
    )
    dtype: str = setting("auto", "compute dtype; auto: bfloat16 on a GPU", choices=("auto", "float32", "bfloat16"))
    reduce_dtype: str = setting(
        "float32",
        "dtype in which ranks add up the matrices' gradients of a fused step; everything else in float32",
        choices=("float32", "bfloat16"),
        execution=True,
    )
    graph_collectives: str = setting(
        "captured",
        "what ranks exchange in a fused step: within its CUDA graph, or between two graphs",
        choices=("captured", "between"),
        execution=True,
    )
    gradient_buckets: int = setting(
        1,
        "parts in which ranks add up the blocks' gradients of a fused step, the last blocks first, during the backward",
        at_least=1,
        at_most=256,
        execution=True,
    )
    muon_gathers: int = setting(
        0,
        "all-gathers of Muon's updates in a fused step, of which each rank then makes its share",
        at_least=0,
        at_most=256,
        zero="every rank makes all",
        execution=True,
    )
    muon_lr: float = setting(0.02, "learning rate of Muon (block matrices)", at_least=0.0)
    muon_momentum_start: float = setting(0.92, "Nesterov momentum at step 0", at_least=0.0, below=1.0)
    muon_momentum: float = setting(0.99, "Nesterov momentum after its warm-up", at_least=0.0, below=1.0)
    muon_momentum_steps: int = setting(1500, "steps over which the momentum rises", at_least=1)
    muon_weight_decay: float = setting(0.04, "decoupled weight decay of Muon", at_least=0.0)
    newton_schulz_steps: int = setting(5, "Newton-Schulz iterations", at_least=1, at_most=20)
    embed_lr: float = setting(0.03, "AdamW learning rate of the embedding", at_least=0.0)
    scalar_lr: float = setting(0.02, "AdamW learning rate of vectors, scalars, bigram and smear", at_least=0.0)
    adam_beta1: float = setting(0.9, "AdamW beta 1", at_least=0.0, below=1.0)
    adam_beta2: float = setting(0.95, "AdamW beta 2", at_least=0.0, below=1.0)
    adam_eps: float = setting(1e-8, "AdamW epsilon", above=0.0)
    adam_weight_decay: float = setting(0.04, "decoupled weight decay of AdamW", at_least=0.0)
    grad_clip: float = setting(0.3, "global gradient norm is clipped to this", above=0.0)
    warmdown_steps: int = setting(3000, "the learning rate falls to 0 over this many steps' time", at_least=0)
    warmdown_most: float = setting(1.0, "but over no more than this share of the run", at_least=0.0, at_most=1.0)
    ema_decay: float = setting(0.999, "decay of the weight average, per step", at_least=0.0, below=1.0)
    ema_every: int = setting(10, "steps between updates of the weight average", at_least=1)
    swa_every: int = setting(50, "steps between snapshots for the late average", at_least=1)
    swa_below: float = setting(0.2, "snapshots are taken while the lr scale is below this", at_least=0.0, at_most=1.0)
    validate_seconds: float = setting(60.0, "seconds between validations", above=0.0)
    validate_tokens: int = setting(1_048_576, "validation tokens used; 0: all", at_least=0)
    checkpoint_seconds: float = setting(120.0, "seconds between checkpoints", above=0.0)
    seed: int = setting(1337, "seed of the initial weights and the data order", at_least=0, at_most=2**63 - 1)

    def check(self):
        self.require(
            self.muon_momentum_start <= self.muon_momentum, "muon_momentum_start", f"at most {self.muon_momentum}"
        )
        self.require(
            self.gradient_buckets == 1 or self.graph_collectives == "captured",
            "gradient_buckets",
            f"1 with graph_collectives={self.graph_collectives}, where nothing leaves during the backward",
        )


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named model and the way to train it."""

    name: str
    model: ModelConfig
    train: TrainConfig
    about: str

    def override(self, values: Mapping[str, Any]) -> "Preset":
        """Replace fields of the model and of the training by name; the two share no field name."""
        model_names = {field.name for field in dataclasses.fields(ModelConfig)}
        train_names = {field.name for field in dataclasses.fields(TrainConfig)}
        for name, value in values.items():
            if name not in model_names | train_names:
                raise ConfigError(unknown_field(name, value, model_names | train_names))
        preset = dataclasses.replace(
            self,
            model=self.model.override({k: v for k, v in values.items() if k in model_names}),
            train=self.train.override({k: v for k, v in values.items() if k in train_names}),
        )
        if preset.train.micro_batch_tokens < preset.model.train_length:
            raise ConfigError(
                f"micro_batch_tokens={preset.train.micro_batch_tokens} is not possible; allowed: at least one row, "
                f"train_length={preset.model.train_length}"
            )
        for name, least in (("gradient_buckets", 1), ("muon_gathers", 0)):
            if (given := getattr(preset.train, name)) > preset.model.blocks:
                raise ConfigError(f"{name}={given} is not possible; allowed: {least} to blocks={preset.model.blocks}")
        return preset


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            ModelConfig(width=128, blocks=4, heads=2, kv_heads=1, mlp_hidden=384, bigram_width=32),
            TrainConfig(
                seconds=90.0,
                batch_tokens=2048,
                micro_batch_tokens=4096,
                warmdown_steps=300,
                warmdown_most=0.5,
                muon_momentum_steps=100,
                ema_decay=0.95,
                ema_every=2,
                swa_every=5,
                swa_below=0.1,
                validate_seconds=40.0,
                validate_tokens=16_384,
                checkpoint_seconds=30.0,
            ),
            "a CPU and two minutes",
        ),
        Preset("seed", ModelConfig(), TrainConfig(), "10 blocks, for 600 s on 8 GPUs"),
        Preset("seed-11l", ModelConfig(blocks=11), TrainConfig(), "what the published figures ran: 11 blocks"),
        Preset("seed-2k", ModelConfig(train_length=2048), TrainConfig(), "seed on half as many rows of 2,048 tokens"),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name: its `.model` is a ModelConfig, its `.train` a TrainConfig.

    ConfigError: no preset has that name; it lists those that exist.

    Example: model = GPT(preset("tiny").override({"blocks": 2}).model)
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]
