"""Sampling text from a model, one token at a time over a KV cache."""

import math
from collections.abc import Iterator

import torch

from .config import ConfigError
from .gpt import GPT
from .tokenizer import Tokenizer


@torch.no_grad()
def generate_tokens(
    model: GPT, prompt: list[int], most: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0, stop: int = 1
) -> Iterator[int]:
    """Yield up to `most` token ids that follow `prompt`; ends early at token `stop` (BOS: a new document begins).

    temperature 0 takes the likeliest token; otherwise logits / temperature are sampled among the `top_k` likeliest
    (0: all) with a generator seeded by `seed`. The rotary base is the one of the final length, fixed from the start.
    A temperature below 1.2e-38, by which fp32 cannot divide, is taken as 0.
    Raises ConfigError, a ValueError, for an empty prompt or impossible settings.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; it holds at least BOS")
    if most < 0 or not 0 <= temperature < math.inf or top_k < 0:
        raise ConfigError(
            f"{most} tokens, temperature={temperature}, top_k={top_k}: none may be negative, the temperature is finite"
        )
    temperature = min(temperature, torch.finfo(torch.float32).max)
    device = model.embed.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.cache(batch=1, length=len(prompt) + most)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(most):
        logits = model.logits(tokens, cache)[0, -1]
        if temperature < torch.finfo(torch.float32).tiny:
            token = logits.argmax()
        else:
            if 0 < top_k < logits.numel():
                logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
            token = torch.multinomial(torch.softmax((logits - logits.max()) / temperature, -1), 1, generator=generator)[
                0
            ]
        tokens = token.view(1, 1)
        if int(token) == stop:
            return
        yield int(token)


def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str, **settings) -> Iterator[str]:
    """Yield the text that grows after `prompt`, piece by piece; `settings` as in :func:`generate_tokens`.

    What is yielded concatenates to the decoded whole: bytes of an unfinished character are held back until it is
    finished, or the text ends.
    """
    ids = [int(token) for token in tokenizer.encode(prompt)]
    shown = tokenizer.decode(ids[1:])
    for token in generate_tokens(model, ids, stop=tokenizer.bos_id, **settings):
        ids.append(token)
        text = tokenizer.decode(ids[1:])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        yield text[len(shown) :]
        shown = text
    yield tokenizer.decode(ids[1:])[len(shown) :]
