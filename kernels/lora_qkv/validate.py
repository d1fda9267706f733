"""What the ops accept."""

import torch
from torch import Tensor

from ..registration import resolve_backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_RANK = 64


def validate(x, weight, lora_a, lora_b, slots, sizes, grads, backend) -> tuple[str, list[int], Tensor | None]:
    """The backend that runs, the sizes and contiguous slots; raises ValueError on what the backend does not take."""
    backend = resolve_backend(backend, x)
    if x.dim() != 3 or weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f"x is {_describe(x)} and weight {_describe(weight)}; wanted [B, S, D] and [Nq+Nk+Nv, D]")
    width, rows = x.size(2), weight.size(0)
    if sizes is None and (rows < 3 or rows % 3):
        raise ValueError(f"sizes is missing, and weight's {rows} rows are not three equal projections")
    if sizes is not None and (len(sizes) != 3 or min(sizes) < 1 or sum(sizes) != rows):
        raise ValueError(f"sizes is {tuple(sizes)}; wanted three positive sizes that add up to weight's {rows} rows")
    rank = lora_a.size(-2) if lora_a.dim() == 4 else 0
    wanted = (3, rank, width), (rows, rank)
    if rank < 1 or lora_a.shape[1:] != wanted[0] or lora_b.shape[1:] != wanted[1] or lora_a.size(0) != lora_b.size(0):
        raise ValueError(
            f"lora_a is {_describe(lora_a)} and lora_b {_describe(lora_b)}; "
            f"wanted [slots, 3, R, {width}] and [slots, {rows}, R], R at least 1"
        )
    if slots is None and lora_a.size(0) != x.size(0):
        raise ValueError(
            f"slots is missing, and {lora_a.size(0)} adapters are not one for each of {x.size(0)} documents"
        )
    if slots is not None and (slots.shape != x.shape[:1] or slots.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"slots is {_describe(slots)}; wanted int32 or int64 [{x.size(0)}]")
    if grads is not None and any(
        g.shape != p.shape or g.dtype not in (p.dtype, torch.float32) or (g.size(0) and not g[0].is_contiguous())
        for g, p in zip(grads, (lora_a, lora_b), strict=True)
    ):
        raise ValueError(
            f"grads are {', '.join(map(_describe, grads))}; wanted rows like {_describe(lora_a)}, {_describe(lora_b)}"
        )
    given = [x, weight, lora_a, lora_b, *(grads or ()), *(() if slots is None else (slots,))]
    if len({tensor.device for tensor in given}) != 1:
        raise ValueError(f"tensors lie on {', '.join(sorted({str(t.device) for t in given}))}; wanted one device")
    if weight.dtype != x.dtype or not lora_a.is_floating_point() or lora_b.dtype != lora_a.dtype:
        raise ValueError(
            f"x is {_describe(x)}, weight {_describe(weight)}, lora_a {_describe(lora_a)} and lora_b "
            f"{_describe(lora_b)}; wanted one dtype of x and weight, and one of lora_a and lora_b"
        )
    sizes = [rows // 3] * 3 if sizes is None else [int(size) for size in sizes]
    if backend == "triton":
        _validate_kernel(x, lora_a, lora_b, sizes, rank)
    elif grads is not None:
        raise ValueError("grads: the reference has no backward of its own to write them; use backend='triton'")
    return backend, sizes, None if slots is None else slots.contiguous()


def _validate_kernel(x, lora_a, lora_b, sizes, rank) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {_describe(x)}; the kernel wants bfloat16, float16 or float32")
    if lora_a.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"lora_a is {_describe(lora_a)} and lora_b {_describe(lora_b)}; wanted both {x.dtype} or torch.float32"
        )
    if rank > MOST_RANK:
        raise ValueError(f"R is {rank}; allowed: up to {MOST_RANK}")
    if any(size < 1 or size % 16 for size in (x.size(2), *sizes)):
        raise ValueError(f"D is {x.size(2)} and sizes {tuple(sizes)}; wanted positive multiples of 16")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
