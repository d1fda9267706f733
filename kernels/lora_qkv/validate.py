"""What the ops accept."""

import torch
from torch import Tensor

from ..dispatch import resolve_backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_RANK = 128


def validate(x, weight, lora_a, lora_b, slots, sizes, grads, backend) -> tuple[str, list[int], Tensor | None]:
    """The backend that runs, the sizes and contiguous slots; raises ValueError on what the backend does not take."""
    backend = resolve_backend(backend, x)
    if x.dim() != 3 or weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f"x is {describe(x)} and weight {describe(weight)}; wanted [B, S, D] and [Nq+Nk+Nv, D]")
    width, rows = x.size(2), weight.size(0)
    if sizes is None and (rows < 3 or rows % 3):
        raise ValueError(f"sizes is missing, and weight's {rows} rows are not three equal projections")
    if sizes is not None and (len(sizes) != 3 or min(sizes) < 1 or sum(sizes) != rows):
        raise ValueError(f"sizes is {tuple(sizes)}; wanted three positive sizes that add up to weight's {rows} rows")
    rank = lora_a.size(-2) if lora_a.dim() == 4 else 0
    wanted = (3, rank, width), (rows, rank)
    if rank < 1 or lora_a.shape[1:] != wanted[0] or lora_b.shape[1:] != wanted[1] or lora_a.size(0) != lora_b.size(0):
        raise ValueError(
            f"lora_a is {describe(lora_a)} and lora_b {describe(lora_b)}; "
            f"wanted [slots, 3, R, {width}] and [slots, {rows}, R], R at least 1"
        )
    sizes = [rows // 3] * 3 if sizes is None else [int(size) for size in sizes]
    _validate_adapters({"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}, slots, grads, backend)
    if backend == "triton" and any(size < 1 or size % 16 for size in (width, *sizes)):
        raise ValueError(f"D is {width} and sizes {tuple(sizes)}; wanted positive multiples of 16")
    return backend, sizes, None if slots is None else slots.contiguous()


def validate_product(
    given: dict[str, Tensor], width: int, slots: Tensor | None, grads: tuple[Tensor, ...] | None, backend: str
) -> None:
    """Raises ValueError on one product with adapters that the backend does not take.

    `given` are x, the weight, A and B, by the names that their caller knows them by; `width` is that of the weight's
    inputs, which is x's but for the second matrix of an MLP.
    """
    (_, x), (name, weight), (name_a, a), (name_b, b) = given.items()
    if x.dim() != 3 or weight.dim() != 2 or weight.size(1) != width:
        raise ValueError(f"x is {describe(x)} and {name} {describe(weight)}; wanted [B, S, K] and [N, {width}]")
    rows, rank = weight.size(0), a.size(-2) if a.dim() == 3 else 0
    if rank < 1 or a.size(2) != width or list(b.shape) != [a.size(0), rows, rank]:
        raise ValueError(
            f"{name_a} is {describe(a)} and {name_b} {describe(b)}; "
            f"wanted [slots, R, {width}] and [slots, {rows}, R], R at least 1"
        )
    _validate_adapters(given, slots, grads, backend)
    if backend == "triton" and any(size < 1 or size % 16 for size in weight.shape):
        raise ValueError(f"{name} is {describe(weight)}; the kernel wants positive multiples of 16")


def _validate_adapters(given, slots, grads, backend) -> None:
    """What holds for adapters of any shape: one for each document, dtypes, devices, where gradients go."""
    (_, x), (_, weight), (_, a), (_, b) = given.items()
    named = [f"{name} {describe(tensor)}" for name, tensor in given.items()]
    if slots is None and a.size(0) != x.size(0):
        raise ValueError(f"slots is missing, and {a.size(0)} adapters are not one for each of {x.size(0)} documents")
    if slots is not None and (slots.shape != x.shape[:1] or slots.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"slots is {describe(slots)}; wanted int32 or int64 [{x.size(0)}]")
    if grads is not None and any(
        g.shape != p.shape or g.dtype not in (p.dtype, torch.float32) or (g.size(0) and not g[0].is_contiguous())
        for g, p in zip(grads, (a, b), strict=True)
    ):
        raise ValueError(f"grads are {', '.join(map(describe, grads))}; wanted rows like {describe(a)}, {describe(b)}")
    tensors = [*given.values(), *(grads or ()), *(() if slots is None else (slots,))]
    if len({tensor.device for tensor in tensors}) != 1:
        raise ValueError(f"tensors lie on {', '.join(sorted({str(t.device) for t in tensors}))}; wanted one device")
    if weight.dtype != x.dtype or not a.is_floating_point() or b.dtype != a.dtype:
        raise ValueError(
            f"given: {', '.join(named)}; wanted one dtype of {' and '.join(list(given)[:2])}, and one of "
            f"{' and '.join(list(given)[2:])}"
        )
    if backend != "triton":
        if grads is not None:
            raise ValueError("grads: the reference has no backward of its own to write them; use backend='triton'")
        return
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {describe(x)}; the kernel wants bfloat16, float16 or float32")
    if a.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"given: {', '.join(named[2:])}; wanted both {x.dtype} or torch.float32")
    if b.size(2) > MOST_RANK:
        raise ValueError(f"R is {b.size(2)}; allowed: up to {MOST_RANK}")


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
