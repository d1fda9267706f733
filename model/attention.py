"""What runs attention in a training step: the choice that was asked for by name, or the fastest that runs here.

What is timed is what a block does with it: projections, norm, rotation and attention, forward and backward, at the
shape of a micro-batch. So our kernel, which is all of that in one op, and the others, which are a part of it, compare.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..kernels.attention import CHOICES, HEAD_DIMS, why_not
from ..kernels.attention.choices import PACKAGES, first_sentence
from . import network
from .config import ConfigError, ModelConfig
from .gpt import GPT
from .graphs import captured
from .parallel import Ranks
from .weights import weights_of

TIMED_ON = ("cuda",)
"""Devices on which `auto` measures; elsewhere it takes what the model was configured to."""
TIMED = tuple(name for name in CHOICES if name != "math")
"""What `auto` measures. PyTorch's plain attention keeps all scores, and is never the fastest."""
CALLS, WARM_UP = 20, 0.1
BY_NAME = "asked for by name"


class Attention(NamedTuple):
    """What runs attention, one of CHOICES, and why. As text: what logs and records say."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def require_attention(
    asked: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, documents: bool = False
) -> None:
    """ConfigError where a choice asked for by name is missing or cannot run here: why, and what to do.

    `documents`: it has to keep the documents of a row apart.
    """
    if asked == "auto":
        return
    about = config, device, dtype, documents
    reason = why_not_here(asked, *about)
    if reason:
        others = [name for name in CHOICES if name != asked and not why_not_here(name, *about)]
        raise ConfigError(f"attention={asked} is not possible: {reason}; allowed here: auto, {', '.join(others)}")


def why_not_here(
    name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype, documents: bool = False
) -> str:
    """Why a choice does not run in this model, with documents kept apart or not; empty if it does."""
    if name != "klora":
        return why_not(name, device, dtype, config.head_dim, config.heads, config.kv_heads, documents)
    if network.pick_backend(config, device, dtype) == "triton" and config.head_dim in HEAD_DIMS:
        return ""
    sizes = " or ".join(map(str, HEAD_DIMS))
    return f"our kernel wants a CUDA GPU, a width that is a multiple of 16, and a head size of {sizes}"


def choose_attention(
    model: GPT,
    asked: str,
    rows: int,
    length: int,
    ranks: Ranks,
    capture: bool,
    documents: bool = False,
    configured: str = "",
    began: str = "",
) -> Attention:
    """Set what `model` trains with, for micro-batches of [rows, length] tokens.

    `asked` is one of CHOICES or "auto". With `capture` it has to run in a CUDA graph, and is timed in one; with
    `documents` it has to keep the documents of a row apart, and is timed with rows of one. `configured` says why the
    model has the backend that auto keeps where nothing is timed. `began` is what the run began with: auto keeps to it
    where it still runs. All ranks choose the same. ConfigError where what was asked for does not run.
    """
    config, device, dtype = model.config, model.embed.device, model.dtype
    require_attention(asked, config, device, dtype, documents)
    names = TIMED if asked == "auto" else (asked,)
    if documents and why_not_here(model.attention, config, device, dtype, documents):
        model.attention, configured = "math", f"{model.attention} takes no document mask"
    if device.type not in TIMED_ON:
        if asked == "auto":
            return Attention(model.attention, configured)
        chosen = Attention(asked, BY_NAME)
    elif asked == "auto" and began and not why_not_here(began, config, device, dtype, documents):
        chosen = Attention(began, "as the run began")
    else:
        times, refused = measure(model, names, rows, length, capture, documents)
        slowest = ranks.most(*(times.get(name, math.inf) for name in names))
        times = {name: ms for name, ms in zip(names, slowest, strict=True) if ms < math.inf}
        if asked != "auto" and not times:
            where = "in a CUDA graph, which fused=false does without" if capture else "at the shape of a micro-batch"
            why = refused.get(asked, "another rank cannot run it")
            raise ConfigError(f"attention={asked} is not possible {where}: {why}; allowed: auto")
        shape = [rows, length, config.heads, config.head_dim]
        what = f"ms a block forward and backward at {shape} in {str(dtype).removeprefix('torch.')}"
        if not times:
            chosen = Attention(model.attention, f"{configured}; nothing could be timed{_describe_refused(refused)}")
        elif asked == "auto":
            chosen = fastest(times, refused, what)
        else:
            chosen = Attention(asked, f"{BY_NAME}; {times[asked]:.3f} {what}")
    model.chosen_attention = chosen.name
    return chosen


def fastest(times: Mapping[str, float], refused: Mapping[str, str], what: str) -> Attention:
    """The least of `times`, in milliseconds, with all of them and what was `refused` as the reason."""
    order = sorted(times, key=times.__getitem__)
    listed = ", ".join(f"{name} {times[name]:.3f}" for name in order)
    return Attention(order[0], f"the fastest, in {what}: {listed}{_describe_refused(refused)}")


def _describe_refused(refused: Mapping[str, str]) -> str:
    return f"; not here: {', '.join(f'{name} ({why})' for name, why in refused.items())}" if refused else ""


def measure(
    model: GPT, names: Sequence[str], rows: int, length: int, capture: bool, documents: bool = False
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each of `names` that runs, and why the others do not."""
    times, refused = {}, {}
    device = model.embed.device
    for name in names:
        if name in PACKAGES and not PACKAGES[name].is_installed:
            refused[name] = "not installed"
        elif reason := why_not_here(name, model.config, device, model.dtype, documents):
            refused[name] = reason
        else:
            try:
                times[name] = milliseconds(model, name, rows, length, capture, documents)
            except Exception as error:  # a package may raise anything, and memory may be short
                refused[name] = first_sentence(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return times, refused


def milliseconds(model: GPT, name: str, rows: int, length: int, capture: bool, documents: bool = False) -> float:
    """The median time of :func:`block_piece`, after WARM_UP seconds of it."""
    device = model.embed.device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    piece = block_piece(model, rows, length, name, documents)
    call = captured(piece, device) if capture else piece
    call()
    wait(device)
    began, samples = time.perf_counter(), []
    while time.perf_counter() - began < WARM_UP:
        call()
        wait(device)
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        wait(device)
        samples.append(1e3 * (time.perf_counter() - started))
    return statistics.median(samples)


def block_piece(model: GPT, rows: int, length: int, name: str, documents: bool = False) -> Callable[[], None]:
    """Forward and backward of one block's projections, norm, rotation and attention, as a training step runs them."""
    config, device = model.config, model.embed.device
    with torch.no_grad():
        weight = weights_of(model).blocks[0]
    weight = weight._replace(qkv=weight.qkv.detach().requires_grad_(), gain=weight.gain.detach().requires_grad_())
    rotary = tuple(table[:length].contiguous() for table in model.rotary(length, length))
    generator = torch.Generator(device).manual_seed(0)  # the global one draws what training draws
    n, dout = (
        torch.randn(rows, length, width, device=device, generator=generator).to(model.dtype)
        for width in (config.width, config.qkv_sizes[0])
    )
    n.requires_grad_()
    start = torch.zeros(rows, length, dtype=torch.int32, device=device) if documents else None
    about = network.About(config, rotary, model.attention, name, None, model.backend, start)

    def call() -> None:
        with torch.enable_grad():
            out = network.attention(about, weight, n, None, length, None)
            torch.autograd.grad(out, (n, weight.qkv, weight.gain), dout)

    return call
