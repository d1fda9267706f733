"""What a step of training will take, before the first one: bytes from its shapes and a short trial, seconds from it.

    state  = 4 bytes x (weights, gradients, EMA, SWA: 4 a parameter; Muon: 1 of a matrix; AdamW: 2 of all others)
    tokens = bytes that autograd keeps for the backward, a token, from a forward of 128 tokens and one of 256
    memory = state + the larger of a micro-batch's tokens and, at the end, the weights three times more

What lives only for a moment is not counted: what is refused for want of memory could not have run.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import ConfigError, ModelConfig, Preset
from .gpt import GPT, is_block_matrix, parameter_count, parameter_shapes

TRIAL_TOKENS = 256
MOMENT_BYTES = 64 << 20
"""What lives only while some rows of a matrix are packed or dequantised."""

USABLE_SHARE = 0.7
"""Share of the available memory that advice plans with: the bounds leave out what lives only for a moment."""


@dataclass(frozen=True)
class Estimate:
    """Of one rank. Seconds are None on a GPU, where a short trial says nothing about a full batch."""

    memory: int
    """bytes, at least"""
    available: int | None
    """bytes; None where the system does not tell"""
    step_seconds: float | None
    """forward and backward of batch_tokens / ranks tokens"""
    validation_seconds: float | None
    """one validation, which `seconds` does not count"""

    def __str__(self) -> str:
        memory = f"at least {_gb(self.memory)}" + (f" of {_gb(self.available)}" if self.available else "")
        if self.step_seconds is None:
            return f"a step takes {memory} of memory"
        return (
            f"a step takes about {_seconds(self.step_seconds)} and {memory} of memory; "
            f"a validation, which the cap does not count, about {_seconds(self.validation_seconds)}"
        )


def state_bytes(config: ModelConfig) -> int:
    """Bytes that training holds beside the activations: weights, gradients, averages, optimizer state, all fp32."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    return 4 * sum(size * (5 if is_block_matrix(name) else 6) for name, size in sizes.items())


def least_memory(config: ModelConfig) -> int:
    """Bytes that training takes whatever the batch: its last phase holds three candidates beside the state.

    The projected bigram table, its scaled form and its gradient are each as large as the vocabulary of pairs times D.
    """
    return state_bytes(config) + 12 * parameter_count(config) + 12 * config.bigram_rows * config.width


def loading_bytes(config: ModelConfig, payload: int = 0) -> int:
    """Bytes, at most, from a file's `payload` to the weights that a forward reads, whichever of both is more.

    Loading holds the payload twice, its compressed form, and the matrices at six bits. Then there are the parameters in
    fp32, once as they are read, once in the model and once folded or stacked; the bigram table, projected and scaled;
    rotary tables of two bases and the angles that they are made of.
    """
    parameters = 4 * parameter_count(config)
    bigram = 2 * 4 * config.bigram_rows * config.width
    rotary = (2 * 4 + 3 * 8) * config.train_length * (config.head_dim // 2)
    return max(4 * payload, payload + 3 * parameters + bigram + rotary) + MOMENT_BYTES


def fused_memory(config: ModelConfig, tokens: int) -> int:
    """Bytes of the fused step on `tokens` at a time, from its shapes.

    They are what the backward reads of each block in 16 bits, the head's part of a logit, the state, the copies of the
    weights, and two sums of gradients.
    """
    block = 5 * config.width + 2 * config.qkv_sizes[0] + 2 * config.qkv_sizes[1] + config.mlp_hidden
    kept = 2 * tokens * (config.blocks * block + config.vocab_size)
    bigram = 12 * config.bigram_rows * config.width
    return state_bytes(config) + 6 * parameter_count(config) + bigram + kept


def available_memory(device: torch.device, processes: int = 1) -> int | None:
    """Bytes that a process may still take on `device`; on a CPU, its share among `processes`. None: not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found = [amount for amount in (_system_memory(), _control_group_memory()) if amount is not None]
    return min(found) // processes if found else None


def require_memory(memory: int, available: int | None, preset: Preset, token_bytes: float = 0.0) -> None:
    """ConfigError where `memory` bytes are more than there are; it names a micro-batch that fits, if there is one."""
    if available is None or memory <= available:
        return
    train, length = preset.train, preset.model.train_length
    state = state_bytes(preset.model)
    rows = int((USABLE_SHARE * available - state) / (token_bytes * length)) if token_bytes else 0
    advice = f"--set micro_batch_tokens={rows * length}" if rows >= 1 else "a smaller width, fewer blocks"
    raise ConfigError(
        f"{preset.name} with micro_batch_tokens={train.micro_batch_tokens} needs at least {_gb(memory)} of memory "
        f"({_gb(state)} of them for weights, optimizer and averages) and {_gb(available)} are available; "
        f"give {advice}, or --preset tiny"
    )


def estimate(
    model: GPT, preset: Preset, ranks: int, available: int | None, validation_tokens: int, say: Callable[[str], None]
) -> Estimate:
    """Try `model` on a few tokens. `say` gets advice where one step is longer than the run may last.

    Gradients are added to; zero them after. Raises ConfigError as :func:`require_memory`.
    """
    train, length = preset.train, preset.model.train_length
    long = min(length, TRIAL_TOKENS)
    short = long // 2
    (fewer, _), (more, seconds) = _trial(model, short), _trial(model, long)
    token_bytes = (more - fewer) / (long - short)
    tokens = train.batch_tokens // ranks
    micro_batch = min(tokens, train.micro_batch_tokens // length * length)
    activations = int(fewer + token_bytes * (micro_batch - short))
    memory = max(state_bytes(preset.model) + activations, least_memory(preset.model))
    require_memory(memory, available, preset, token_bytes)
    if model.embed.device.type == "cuda":
        return Estimate(memory, available, None, None)
    step = seconds / long * tokens
    if step > train.seconds:
        fitting = int(train.seconds / 100 / step * train.batch_tokens) // (length * ranks) * length * ranks
        advice = f"--set batch_tokens={fitting}, " if fitting else ""
        say(
            f"one step takes about {_seconds(step)} and the cap is {_seconds(train.seconds)}: it ends the run within "
            f"its first step, with what it has read by then; give {advice}--preset tiny, more --seconds, or a GPU"
        )
    validated = min(train.validate_tokens or validation_tokens, validation_tokens)
    return Estimate(memory, available, step, seconds / long * validated / ranks / 3)  # a forward is a third


def _trial(model: GPT, length: int) -> tuple[int, float]:
    """(bytes kept for the backward, seconds) of one forward and backward of `length` tokens."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.arange(length, device=model.embed.device).remainder(model.config.vocab_size)[None]
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.nll(tokens, tokens).sum()
    loss.backward()
    return sum(kept.values()), time.perf_counter() - started


def _system_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _control_group_memory(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves: limit - used + page cache that can go. None without a limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / limit).with_name("memory.stat").read_text().splitlines())
            return max(0, most - now + int(stat.get(cache, 0)))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 1e10 else f"{size / 1e9:,.1f} GB"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"
