"""An estimate of the memory that an engine takes: of a training step, of a slot, and the largest batch that fits."""

from collections.abc import Callable
from typing import Any

import torch

from ..kernels.attention import HEAD_DIMS
from ..kernels.dispatch import padded_rank
from ..model.config import ModelConfig
from ..model.gpt import GPT
from ..model.weights import Weights
from .adapters import AdapterLayout
from .protocols import CACHED, TARGETS, TTTConfig
from .ring import ring_numbers

ENGINE_SHARE = 0.85
"""Share of the free memory that an engine plans for."""


def numbers_of_rank(rank: int) -> int:
    """Numbers that a LoRA keeps of an input; none without one."""
    return padded_rank(rank) if rank else 0


def numbers_kept(shape: ModelConfig, config: TTTConfig) -> int:
    """Numbers that a training step keeps for its backward, for each input of the window, in the compute dtype.

    In each block: its input, normed or not, the stream before the MLP, q, k and v, attention's output, the MLP's hidden
    values and what each LoRA kept, its input times A; q and k before their rotation and another output, whose layout is
    not the product's, where attention is PyTorch's; the first forward's k and v for a cache. And the outputs pushed for
    later blocks.
    """
    q, k, v = shape.qkv_sizes
    ranks = 3 * numbers_of_rank(max(map(config.rank, "qkv"))) + sum(
        numbers_of_rank(config.rank(n)) for n in ("o", "up", "down")
    )
    block = 2 * shape.width + (q + k + v) + q + shape.mlp_hidden + ranks
    if shape.head_dim not in HEAD_DIMS:
        block += (q + k) + q
    if config.context == CACHED:
        block += k + v
    return shape.blocks * block + shape.blocks // 2 * shape.width


def activation_bytes(model: GPT | Weights, config: TTTConfig, rows: int) -> int:
    """Bytes that a training step of `rows` places takes at most: what autograd keeps and what is in flight.

    In flight: three hidden tensors of the MLP, the gradients of q, k and v, the gradient of a LoRA's output times its
    B, and eight tensors of the residual stream; before the first block, five of the stream in fp32. The head's logits
    are of the chunk alone. Of each place, its adapters in the compute dtype. A quarter is added for the allocator's
    blocks and the products' workspaces.
    """
    shape, item = model.config, torch.finfo(model.dtype).bits // 8
    width, hidden = shape.width, shape.mlp_hidden
    times_b = 3 * numbers_of_rank(max(map(config.rank, TARGETS)))
    in_flight = max(3 * hidden + 2 * sum(shape.qkv_sizes) + times_b + 8 * width, 5 * width * 4 // item)
    head = config.chunk * (shape.vocab_size + 4 * width + 8 * config.rank("head"))
    kept, packed = numbers_kept(shape, config), AdapterLayout(shape, config).size
    return int(1.25 * rows * item * (config.inputs * (kept + in_flight) + head + packed))


def slot_bytes(model: GPT | Weights, config: TTTConfig) -> int:
    """Bytes of one slot: parameters, gradient and two moments; with the context `cached`, keys and values."""
    item = 8 if model.dtype == torch.float64 else 4
    kept = ring_numbers(model.config, config) if config.context == CACHED else 0
    return 4 * item * AdapterLayout(model.config, config).size + kept * torch.finfo(model.dtype).bits // 8


def largest_batch(batch: int, needed: Callable[[int], int], free: int) -> int:
    """`batch` halved until its `needed` bytes are at most ENGINE_SHARE of the `free` ones."""
    while needed(batch) > ENGINE_SHARE * free:
        if batch == 1:
            raise MemoryError(
                f"adapting one document at a time takes about {needed(1) >> 20} MiB and {free >> 20} MiB are free, of "
                f"which {ENGINE_SHARE:.0%} may be used. Free some, or take a shorter window, fewer slots or, with "
                "phases, a smaller phase_chunks"
            )
        batch //= 2
    return batch


def memory_of(facts: dict[str, Any]) -> str:
    """What an engine's facts say of its size, for people."""
    free = f" of {facts['free_bytes'] / 2**30:.1f} GiB free" if "free_bytes" in facts else ""
    return (
        f"engine: {facts['batch']} documents side by side in {facts['slots']} slots, "
        f"at most {facts['estimated_bytes'] / 2**30:.1f} GiB{free}"
    )
