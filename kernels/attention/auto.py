"""Causal attention by the fastest of ours and PyTorch's here, found once for each shape, and what was found.

Ours is ahead up to a head size of 64, cuDNN at 128 (docs/notes/attention.md), and both depend on the shape and on the
versions. So the first call of a shape on a GPU times them: forward, and backward too where a gradient is wanted, on the
call's own tensors, host and launches included. Later calls look the name up. Batches and lengths of the same power of
two share what was found, so that rows of any length are not timed again and again.

What cannot be timed follows a rule. While a CUDA graph is captured, a shape that was not met before goes to ours. Under
torch.compile, heads up to 64 go to ours, and larger ones to the first of cuDNN and flash that runs them; batch and
length may be symbols there. A row with documents goes to ours: PyTorch's would write a mask [B, 1, S, S]. So does a
call that must be deterministic.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import DTYPES, expect_one_of
from .choices import CHOICES, attend, first_sentence, pick_attention, refusals_unheard, why_not
from .op import MOST_HEAD, causal_attention, check_qkv

TIMED = ("klora", "cudnn", "flash", "efficient")
"""What is timed. PyTorch's plain attention keeps all scores, and is never the fastest."""
TIMED_ON = ("cuda",)
WARM_UP, ROUNDS, CALLS = 2, 7, 3
MOST_SECONDS = 2.0
"""After as much no further round begins."""


class Chosen(NamedTuple):
    """What runs a call, and why. As text: one line for a log."""

    name: str
    """one of CHOICES; "klora" is causal_attention"""
    why: str
    times: Mapping[str, float]
    """milliseconds of each that was timed, the fastest first"""
    refused: Mapping[str, str]
    """why others were not"""

    def __str__(self) -> str:
        timed = "".join(f"; {name} {ms:.3f} ms" for name, ms in self.times.items())
        return f"{self.name}: {self.why}{timed}" + "".join(f"; not {name}: {why}" for name, why in self.refused.items())


_CHOSEN: dict[tuple, Chosen] = {}
"""By what :func:`_sizes` says of a call."""
_MET: dict[tuple, Chosen] = {}
"""By what :func:`_exactly` says of a call that was checked: 1 us instead of the 6 of checks and sizes."""
MOST_MET = 1024


def _wants_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _exactly(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    dtypes, devices = (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device)
    return q.shape, k.shape, v.shape, dtypes, devices, _wants_gradients(q, k, v)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    batch, length, heads, head_dim = q.shape
    sizes = batch.bit_length(), length.bit_length(), heads, k.size(2), head_dim
    return *sizes, q.dtype, q.device, _wants_gradients(q, k, v)


def explain_attention(
    q: Tensor, k: Tensor, v: Tensor, *, start: Tensor | None = None, deterministic: bool = False
) -> Chosen:
    """What auto_attention runs for such `q` [B, S, H, d], `k` and `v` [B, S, G, d]: its name, why, and the times.

    `start` and `deterministic` are those of auto_attention. A shape that is new is timed here, which waits for the GPU.
    ValueError: shapes, dtypes or devices that do not fit.

    Example: print(explain_attention(q, k, v))
    """
    is_free = start is None and not (deterministic or torch.are_deterministic_algorithms_enabled())
    is_timed = is_free and not torch.compiler.is_compiling()
    if is_timed and (met := _MET.get(_exactly(q, k, v))) is not None:
        return met
    check_qkv(q, k, v, "reference")
    if start is not None:
        return Chosen("klora", "of these only ours skips the blocks of other documents", {}, {})
    if not is_free:
        return Chosen("klora", "the only one whose gradients have the same bits in every run", {}, {})
    if not is_timed:
        heads = map(index, (q.size(3), q.size(2), k.size(2)))  # numbers, where the compiler has symbols
        name = _name_by_rule(q.device, q.dtype, *heads)
        return Chosen(name, "by head size: nothing is timed under torch.compile", {}, {})
    sizes = _sizes(q, k, v)
    if sizes not in _CHOSEN:
        if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            name = _without_trying(q.dtype, q.size(3))
            return Chosen(name, "nothing is timed while a CUDA graph is captured: call it once before", {}, {})
        _CHOSEN[sizes] = _choose(q, k, v)
    if len(_MET) >= MOST_MET:
        _MET.clear()
    _MET[_exactly(q, k, v)] = _CHOSEN[sizes]
    return _CHOSEN[sizes]


@functools.cache
def _of_pytorch(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    return pick_attention(device, dtype, head_dim)


def _name_by_rule(device: torch.device, dtype: torch.dtype, head_dim: int, heads: int, groups: int) -> str:
    if device.type not in TIMED_ON:
        return _of_pytorch(device, dtype, head_dim)[0]
    if head_dim > 64 and dtype.itemsize == 2:
        for name in ("cudnn", "flash"):
            if not why_not(name, device, dtype, head_dim, heads, groups):
                return name
    return _without_trying(dtype, head_dim)


def _without_trying(dtype: torch.dtype, head_dim: int) -> str:
    """What certainly runs on a GPU."""
    return "klora" if dtype in DTYPES and head_dim % 8 == 0 and head_dim <= MOST_HEAD else "math"


_name_by_rule._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler


def _choose(q: Tensor, k: Tensor, v: Tensor) -> Chosen:
    if not q.numel():
        return Chosen("klora", "there is nothing to do", {}, {})
    if q.device.type not in TIMED_ON:
        return Chosen(*_of_pytorch(q.device, q.dtype, q.size(3)), {}, {})
    times, refused = measure(q, k, v)
    if not times:
        return Chosen("math", "nothing else runs", times, refused)
    what = "forward and backward" if _wants_gradients(q, k, v) else "forward"
    return Chosen(next(iter(times)), f"the fastest, {what}", times, refused)


def measure(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each of TIMED that runs for these tensors, the fastest first; and why the others do not.

    In turns, so that drift of clocks meets all alike. The tensors are read, and nothing is kept.
    """
    calls, refused = {}, {}
    for name in TIMED:
        try:
            call = _call(name, q, k, v)
            with refusals_unheard():
                for _ in range(WARM_UP):
                    call()
            _wait(q.device)
            calls[name] = call
        except Exception as error:  # of PyTorch's or of the compiler's, and memory may be short
            refused[name] = first_sentence(error)
    began, samples = time.perf_counter(), {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(_milliseconds(call, q.device))
        if time.perf_counter() - began > MOST_SECONDS:
            break
    times = {name: statistics.median(values) for name, values in samples.items()}
    return dict(sorted(times.items(), key=lambda item: item[1])), refused


def _call(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """`name` on these tensors, with a backward where they want one: that of the gradients that they want."""
    is_trained = _wants_gradients(q, k, v)
    leaves = [t.detach().requires_grad_(is_trained and t.requires_grad) for t in (q, k, v)]
    wanted = [t for t in leaves if t.requires_grad]

    def call() -> None:
        out = _run(name, *leaves, None)
        if wanted:
            torch.autograd.grad(out, wanted, out.detach())

    return call


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None) -> Tensor:
    return causal_attention(q, k, v, start=start) if name == "klora" else attend(q, k, v, name, start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(call: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    _wait(device)
    return 1e3 * (time.perf_counter() - started) / CALLS


def auto_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: Tensor | None = None,
    choice: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Causal attention of `q` [B, S, H, d] over `k` and `v` [B, S, G, d] -> [B, S, H, d], by the fastest that runs.

    H is a multiple of G. With `choice` "auto", the first call of a shape on a GPU times ours, cuDNN, flash and
    PyTorch's efficient one, and waits for the GPU; later calls take what was found. explain_attention says which, and
    the times. Any of CHOICES by name takes that: "klora" (causal_attention), "cudnn", "flash", "efficient", "math",
    "fa2", "fa3", "fa4".

    `deterministic` takes ours: gradients with the same bits in every run. So do `start` int32 [B, S], which keeps
    documents apart as in causal_attention, and torch.use_deterministic_algorithms. Each process chooses by itself:
    where several must have the same bits, give them a name.

    ValueError: other shapes, dtypes or choices, tensors of several dtypes or devices. RuntimeError: one asked for by
    name does not run these tensors.

    Example: out = auto_attention(q, k, v)
    """
    name = choice
    if choice == "auto":
        name = explain_attention(q, k, v, start=start, deterministic=deterministic).name
    elif deterministic and choice != "klora":
        raise ValueError(f"choice is {choice!r} and deterministic is True; allowed with it: 'auto', 'klora'")
    else:
        expect_one_of("choice", choice, ("auto", *CHOICES))
        check_qkv(q, k, v, "reference")
    return _run(name, q, k, v, start)
