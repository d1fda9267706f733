"""What the op accepts, in one form: lists with an entry for each projection."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, float32, int64

from ..dispatch import (
    INTEGERS,
    dtypes_of,
    expect,
    expect_multiples,
    expect_rows,
    expect_slots,
    refuse_gradients,
    refuse_in_reference,
)
from ..dropout import Dropout
from ..int6.layout import Int6Matrix
from .reference import as_list


@dataclass(frozen=True)
class Projections:
    """One entry for each projection; what was left out is None."""

    weights: list[Tensor | Int6Matrix]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    biases: list[Tensor | None]
    scales: list[Tensor | None]
    ranks: list[Tensor | None]
    keys: list[Tensor | None]
    rate: float
    grads: list[tuple[Tensor, Tensor] | None]
    slots: Tensor | None


def expect_projections(
    x: Tensor,
    weight: Any,
    lora_a: Any,
    lora_b: Any,
    slots: Tensor | None,
    bias: Any,
    scale: Any,
    ranks: Any,
    dropout: Dropout | None,
    grads: Any,
    backend: str,
) -> Projections:
    """Raises on what the backend does not take."""
    expect("x", x, ("B", "S", "K"), dtypes_of(backend))
    is_list = isinstance(weight, list | tuple)
    weights = list(weight) if is_list else [weight]
    rate, keys = (0.0, None) if dropout is None else dropout
    if not 0 <= rate < 1:
        raise ValueError(f"dropout's rate is {rate!r}; wanted a number from 0 to below 1")
    given = {"lora_a": lora_a, "lora_b": lora_b, "bias": bias, "scale": scale, "ranks": ranks, "keys": keys}
    for name, value in (given | {"grads": grads}).items() if is_list else ():
        if value is not None and (not isinstance(value, list | tuple) or len(value) != len(weights)):
            found = f"{len(value)}" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
            raise ValueError(f"{name} is {found} for {len(weights)} weights; wanted a list with one for each")
    lists = {name: as_list(value, len(weights)) for name, value in given.items()}
    lists["grads"] = as_list(grads if is_list or grads is None else [grads], len(weights))
    slots = expect_slots(slots, x.size(0), x.device)
    for p, weight in enumerate(weights):
        own = {name: values[p] for name, values in lists.items()}
        _expect_one(f"[{p}]" if is_list else "", x, weight, own, slots, backend)
    a, b, *others, pairs = lists.values()
    biases, scales, all_ranks, all_keys = ([None if t is None else t.contiguous() for t in ts] for ts in others)
    return Projections(weights, a, b, biases, scales, all_ranks, all_keys, rate, pairs, slots)


def _expect_one(
    place: str, x: Tensor, weight: Tensor | Int6Matrix, own: dict[str, Any], slots: Tensor | None, backend: str
) -> None:
    """`place` says in messages which of several projections this is; `own` holds what it has beside its weight."""
    width, device = x.size(2), x.device
    if isinstance(weight, Int6Matrix):
        if weight.shape[1] != width:
            raise ValueError(f"weight{place} is six bits of {list(weight.shape)}; wanted [N, {width}]")
        expect(f"weight{place}.packed", weight.packed, weight.packed.shape, device=device)
        expect(f"weight{place}.scale", weight.scale, weight.scale.shape, device=device)
    else:
        expect(f"weight{place}", weight, ("N", width), (x.dtype,), device)
    outputs, a, b = weight.shape[0], own["lora_a"], own["lora_b"]
    dtypes = (x.dtype, float32) if backend == "triton" else dtypes_of(backend)
    expect(f"lora_a{place}", a, ("slots", "R", width), dtypes, device)
    expect(f"lora_b{place}", b, (a.size(0), outputs, a.size(1)), (a.dtype,), device)
    expect_multiples(1, **{f"N of weight{place}": outputs, "K": width, f"R of lora_a{place}": a.size(1)})
    expect_slots(slots, x.size(0), device, pool=a.size(0))
    for name, shape, dtypes in (
        ("bias", (outputs,), (x.dtype,)),
        ("scale", (a.size(0),), (float32,)),
        ("ranks", (a.size(0),), INTEGERS),
        ("keys", (x.size(0),), (int64,)),
    ):
        if own[name] is not None:
            expect(f"{name}{place}", own[name], shape, dtypes, device)
    refuse_gradients("a scale of B is a factor of its gradient: scale lora_b instead", scale=own["scale"])
    if own["grads"] is not None:
        for i, (grad, like) in enumerate(zip(own["grads"], (a, b), strict=True)):
            expect_rows(f"grads{place}[{i}]", grad, like, (like.dtype, float32))
        if backend == "reference":
            refuse_in_reference(grads=own["grads"])
