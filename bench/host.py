"""What a call of an op costs the processor, beside eager PyTorch: microseconds from the call to its return.

`python -m klora.bench.host --record host.json`. Shapes are so small that the GPU is done before the next call comes:
many calls in a row, nobody waits for the GPU, and the clock is read before the queue is awaited. The least of several
rounds counts, for other work only adds. `waited` is how long, for each call, the GPU still worked after the last one: a
time beside which it is not small is the GPU's.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from .. import kernels as ops
from ..model.storage import write_text
from .environment import environment
from .rows import picked

LIMITS = {"forward": 25.0, "forward and backward": 60.0}
"""Microseconds that a call shall take on the host of an H200."""

BATCH, TOKENS, WIDTH, HEADS, HEAD, RANK = 2, 16, 128, 2, 64, 16


class Row(NamedTuple):
    """An op and what PyTorch has in its place, on the same `leaves`; both give one tensor."""

    klora: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]


def rows(device: torch.device, dtype: torch.dtype) -> dict[str, Row]:
    """Every op that a step or a pass of adapting calls often."""

    def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) / 8

    x, heads = drawn(BATCH, TOKENS, WIDTH), [drawn(BATCH, TOKENS, HEADS, HEAD) for _ in range(3)]
    weight, stacked = drawn(WIDTH, WIDTH), drawn(3 * WIDTH, WIDTH)
    up, down = drawn(4 * WIDTH, WIDTH), drawn(WIDTH, 4 * WIDTH)
    a, b = drawn(BATCH, RANK, WIDTH), drawn(BATCH, WIDTH, RANK)
    a3, b3 = drawn(BATCH, 3, RANK, WIDTH), drawn(BATCH, 3 * WIDTH, RANK)
    slots = torch.arange(BATCH, device=device)
    cos, sin = (drawn(TOKENS, HEAD // 2, dtype=torch.float32) for _ in range(2))
    gain, scale = drawn(HEADS, dtype=torch.float32), drawn(WIDTH, dtype=torch.float32)
    targets, vocabulary = torch.zeros(BATCH, TOKENS, dtype=torch.int64, device=device), drawn(256, WIDTH)
    int6 = ops.quantize_int6(drawn(WIDTH, WIDTH, dtype=torch.float32))
    sizes = WIDTH, WIDTH, WIDTH

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return {
        "rms_norm": Row(ops.rms_norm, lambda x: F.rms_norm(x, (WIDTH,)), (x,)),
        "residual_norm": Row(
            lambda *given: ops.residual_norm(*given, push=True)[2],
            lambda *given: ops.residual_norm_ref(*given, push=True)[2],
            (x, drawn(*x.shape), scale),
        ),
        "norm_rotary": Row(
            lambda q, k: ops.norm_rotary(q, k, cos, sin, gain)[0],
            lambda q, k: (ops.norm_rotary_ref(q, cos, sin, gain), ops.norm_rotary_ref(k, cos, sin))[0],
            (heads[0], heads[1]),
        ),
        "causal_attention": Row(ops.causal_attention, sdpa, tuple(heads)),
        "softcap_nll": Row(
            lambda h: ops.softcap_nll(h, vocabulary, targets, 15.0),
            lambda h: ops.softcap_nll_ref(h, vocabulary, targets, 15.0),
            (x,),
        ),
        "relu_squared_mlp": Row(ops.relu_squared_mlp, ops.relu_squared_mlp_ref, (x, up, down)),
        "linear": Row(ops.linear, F.linear, (x, weight)),
        "int6_linear": Row(lambda x: ops.int6_linear(x, int6), lambda x: F.linear(x, weight), (x,)),
        "lora_linear": Row(
            lambda x, a, b: ops.lora_linear(x, weight, a, b, slots),
            lambda x, a, b: ops.lora_linear_ref(x, weight, a, b, slots),
            (x, a, b),
        ),
        "lora_qkv": Row(
            lambda x, a, b: ops.lora_qkv(x, stacked, a, b, slots)[0],
            lambda x, a, b: ops.lora_qkv_ref(x, stacked, a, b, sizes, slots)[0],
            (x, a3, b3),
        ),
        "lora_qkv_rope": Row(
            lambda x, a, b: ops.lora_qkv_rope(x, stacked, a, b, cos, sin, gain, slots, head_dim=HEAD)[0],
            lambda x, a, b: ops.lora_qkv_rope_ref(x, stacked, a, b, cos, sin, gain, sizes, HEAD, slots)[0],
            (x, a3, b3),
        ),
    }


def host_time(call: Callable[[], object], device: torch.device, calls: int, rounds: int) -> dict[str, float]:
    """Microseconds of a call on the host, the least of all rounds, and those that the GPU then still worked."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(10):
        call()
    found = []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        returned = time.perf_counter()
        wait()
        found.append(((returned - started) / calls * 1e6, (time.perf_counter() - returned) / calls * 1e6))
    microseconds, waited = min(found)
    return {"us": round(microseconds, 2), "waited": round(waited, 2)}


def measured(row: Row, device: torch.device, calls: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Each kind of call -> {"klora": ..., "eager": ...}."""
    found: dict[str, dict[str, Any]] = {"without gradient": {}, "forward": {}, "forward and backward": {}}
    leaves = tuple(leaf.detach().requires_grad_() for leaf in row.leaves)
    for name, function in (("klora", row.klora), ("eager", row.eager)):
        dout = torch.ones_like(function(*leaves))

        def both(function=function, dout=dout) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*leaves), leaves, dout, allow_unused=True)

        with torch.no_grad():
            found["without gradient"][name] = host_time(lambda f=function: f(*leaves), device, calls, rounds)
        found["forward"][name] = host_time(lambda f=function: f(*leaves), device, calls, rounds)
        found["forward and backward"][name] = host_time(both, device, calls, rounds)
    return found


def main(
    record: Annotated[Path, typer.Option(help="The record to write, and to write again after each op.")] = Path(
        "host.json"
    ),
    names: Annotated[str, typer.Option("--ops", help="Ops, with commas; all.")] = "",
    calls: Annotated[int, typer.Option(min=1, help="Calls in a round.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the fastest counts.")] = 20,
    toy: Annotated[bool, typer.Option("--toy", help="Also on a CPU, where both are PyTorch's.")] = False,
    commit: Annotated[str, typer.Option(help="Commit that is measured, where there is no git to ask.")] = "",
) -> None:
    """Measure and write the record."""
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or toy):
        raise SystemExit("launches are measured on a CUDA GPU, and PyTorch sees none here; --toy only tries it")
    device = torch.device("cuda" if on_gpu else "cpu")
    found: dict[str, Any] = {}
    result = {
        "name": "host",
        "environment": environment(commit),
        "toy": toy,
        "limits": LIMITS,
        "calls": calls,
        "rounds": rounds,
        "rows": found,
    }
    for name, row in picked(rows(device, torch.bfloat16 if on_gpu else torch.float32), names).items():
        found[name] = measured(row, device, calls, rounds)
        said = (f"{kind} {of['klora']['us']:.1f} (eager {of['eager']['us']:.1f})" for kind, of in found[name].items())
        print(f"{name}: {', '.join(said)} us", flush=True)
        write_text(record, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
