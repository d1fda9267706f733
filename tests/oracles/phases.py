"""The oracle of phases: the order of documents, the shared adapter and its Adam, written out one chunk at a time.

It takes the model's forward, the adapter's layout and a chunk's loss from the oracle of adapting, and nothing of the
engine: a step's gradient is that of one sum over chunks, each computed alone.
"""

import functools
import hashlib

import torch
from klora.ttt.adapters import AdapterLayout

from .eager import chunk_nll


def groups(documents, phases: int) -> list[list]:
    """Documents by the hash of their names, in groups of which the first ones have one more if they do not divide."""
    left = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).hexdigest())
    found = []
    for number in range(phases + 1):
        count = -(-len(left) // (phases + 1 - number))
        found.append(left[:count])
        left = left[count:]
    return found


def steps(documents, config) -> list[list[tuple]]:
    """(document, chunk) of every shared step over a group."""
    kinds = -(-config.window // config.chunk)
    cut, open_steps, found = {config.trained_from + 1} if config.temperature != 1 else set(), {}, []
    starts = sorted(set(range(kinds)) | cut)
    for document in documents:
        for j in range(-(-document.targets // config.chunk)):
            kind = max(start for start in starts if start <= j)
            step = open_steps.setdefault(kind, [])
            step.append((document, j))
            if len(step) == config.phase_chunks:
                found.append(open_steps.pop(kind))
    return found + [open_steps[kind] for kind in sorted(open_steps)]


def shared_rows(model, documents, config) -> list[torch.Tensor]:
    """The adapter [size] that the documents of each group start from."""
    layout = AdapterLayout(model.config, config)
    row = layout.initial(config.adapter_seed).to(model.dtype)
    rate, square, mean = config.phase_lr * layout.group_lr().to(row), torch.zeros_like(row), torch.zeros_like(row)
    decay = 0.0 if layout.decay() is None else config.phase_lr * layout.decay().to(row)
    rows, taken = [row], 0
    start_of = {"all": lambda row: row, "a": functools.partial(without_b, layout)}[config.phase_start]
    for group in groups(documents, config.phases)[:-1]:
        for step in steps(group, config) * config.phase_passes:
            for _ in range(config.steps_per_chunk):
                leaf = row.clone().requires_grad_()
                parts = [leaf[part.start : part.stop].view(1, *part.shape) for part in layout.parts]
                losses = []
                for document, j in step:
                    tokens = torch.from_numpy(document.tokens.astype("int64"))
                    losses.append(chunk_nll(model, layout, parts, tokens, j, config))
                (gradient,) = torch.autograd.grad(torch.cat(losses).mean(), leaf)
                taken += 1
                mean = config.beta1 * mean + (1 - config.beta1) * gradient
                square = config.beta2 * square + (1 - config.beta2) * gradient**2
                denominator = (square / (1 - config.beta2**taken)).sqrt() + config.eps
                row = row - decay * row
                row = row - rate * (mean / (1 - config.beta1**taken)) / denominator
        rows.append(start_of(row))
    return rows


def without_b(layout, row) -> torch.Tensor:
    """An adapter [size] with zeros in every B and bias."""
    row = row.clone()
    adapters, head = layout.adapters(None, [row[p.start : p.stop].view(1, *p.shape) for p in layout.parts])
    loras = [head, *(lora for block in adapters.blocks for lora in (block.qkv, block.o, block.up, block.down))]
    for tensor in [*(lora.b for lora in loras if lora), *(block.bias for block in adapters.blocks)]:
        tensor.zero_()
    return row
