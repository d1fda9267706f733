"""Where a network is computed, in which dtype, by which step, and how a batch is shared out."""

import platform
from contextlib import suppress
from pathlib import Path

import torch

from .config import ConfigError, Preset, TrainConfig
from .gpt import GPT


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def processor_name(device: torch.device) -> str:
    """A GPU's name; a CPU's model and the instructions that PyTorch takes there, which the order of sums depends on."""
    if device.type == "cuda":
        return device_name(device)
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic: `config.dtype`, where auto is bf16 on a GPU and fp32 on a CPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def is_fused(config: TrainConfig, model: GPT) -> bool:
    """Whether training takes the fused step; ConfigError where it was asked for and cannot be had."""
    on_gpu = model.embed.device.type == "cuda"
    if config.fused == "true" and on_gpu and model.backend != "triton":
        raise ConfigError("fused=true is not possible for this model; allowed: a width that is a multiple of 16")
    return config.fused == "true" or (config.fused == "auto" and on_gpu and model.backend == "triton")


def rows_per_rank(preset: Preset, world: int) -> int:
    """Rows of a step that each of `world` ranks takes; ConfigError where the batch cannot be shared out."""
    rows, left = divmod(preset.train.batch_tokens, preset.model.train_length * world)
    if left or not rows:
        raise ConfigError(
            f"batch_tokens={preset.train.batch_tokens} is not possible; allowed: multiples of train_length x ranks, "
            f"{preset.model.train_length} x {world}"
        )
    return rows


def micro_batches_of(rows: int, most: int) -> int:
    """The least number of equal micro-batches of at most `most` rows that make up `rows`."""
    count = -(-rows // max(1, most))
    return next(n for n in range(count, rows + 1) if rows % n == 0)
