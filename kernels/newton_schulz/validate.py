"""What newton_schulz and the two halves of Muon's step accept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import DTYPES, expect_plain, is_hopper, resolve_backend


def pick_backend(device: torch.device) -> str:
    """'triton' where the kernels run, which is on Hopper; 'reference' elsewhere."""
    return "triton" if is_hopper(device) else "reference"


def takes_kernel(tensor: Tensor, backend: str | None, other: torch.dtype) -> bool:
    """Whether the kernels run on `tensor` beside one of dtype `other`; ValueError if they are asked to and cannot."""
    is_served = tensor.dtype in DTYPES and other in DTYPES
    if backend is None and not is_served:
        return False
    takes = resolve_backend(backend, tensor) == "triton"
    if takes and not is_served:
        raise ValueError(
            f"{tensor.dtype} with {other} is not possible for the kernels; allowed: {', '.join(map(str, DTYPES))}, or "
            "backend='reference'"
        )
    return takes


def check_device(device: torch.device) -> None:
    """ValueError for a GPU that the kernels do not run on. Inside the ops, where no compiler traces it.

    Off the GPU they run in Triton's interpreter.
    """
    if device.type == "cuda" and pick_backend(device) != "triton":
        raise ValueError("the kernels need compute capability 9.0 (Hopper); allowed here: backend='reference'")


def check_tensors(name: str, tensors: Sequence[Tensor], ndim: int | None = None) -> None:
    """ValueError for what is no matrix, or not of `ndim` dimensions, and for a list that is not of one kind."""
    expect_plain(name, *tensors)
    for t in tensors:
        if t.ndim < 2 or 0 in t.shape[-2:] or t.ndim != (ndim or t.ndim):
            allowed = "[m, n]" if ndim == 2 else "[..., m, n]"
            raise ValueError(
                f"{name}: a tensor of shape {tuple(t.shape)} is not possible; allowed: {allowed}, m and n above 0"
            )
        if not t.is_floating_point():
            raise ValueError(f"{name}: a tensor of {t.dtype} is not possible; allowed: floating point")
        if t.layout != torch.strided:
            raise ValueError(f"{name}: a tensor of layout {t.layout} is not possible; allowed: dense, t.to_dense()")
        first = tensors[0]
        if (t.dtype, t.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name}: tensors of {first.dtype} on {first.device} and {t.dtype} on {t.device} are not possible in "
                "one call; allowed: one dtype on one device"
            )


def check_alike(name: str, tensors: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    """ValueError unless both lists have the same shapes on one device."""
    shapes, other_shapes = ([tuple(t.shape) for t in some] for some in (tensors, others))
    if shapes != other_shapes:
        raise ValueError(f"{name} have shapes {shapes}, {other_name} {other_shapes}; allowed: the same, one by one")
    if tensors[0].device != others[0].device:
        raise ValueError(f"{name} are on {tensors[0].device}, {other_name} on {others[0].device}; allowed: one device")


def check_apart(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> None:
    """ValueError for a written tensor whose entries share memory, with each other or with another tensor.

    Of two tensors with gaps in them, only those that start at one address are found.
    """
    if torch.compiler.is_compiling():
        return
    spans = []
    for is_written, tensors in ((True, written), (False, read)):
        for t in tensors:
            if t.device.type == "meta" or not t.numel():
                continue
            is_dense = t.is_contiguous()
            if not is_dense:
                sizes = sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)
                reach = 1
                for stride, size in sizes:
                    if is_written and stride < reach:
                        raise ValueError(
                            f"a matrix of shape {tuple(t.shape)} and strides {t.stride()} is written, but its entries "
                            "share memory; allowed: none do. Give a copy: tensor.clone()"
                        )
                    reach += (size - 1) * stride
                is_dense = reach == t.numel()
            start = t.data_ptr()
            spans.append((start, start + t.numel() * t.itemsize if is_dense else start + 1, is_written))
    spans.sort()
    end_written = end_read = 0
    for start, end, is_written in spans:
        if start < end_written or (is_written and start < end_read):
            raise ValueError(
                "two matrices of one call share memory, and one of them is written; allowed: each has its own. Give "
                "each once, or a copy: tensor.clone()"
            )
        if is_written:
            end_written = max(end_written, end)
        else:
            end_read = max(end_read, end)


def checked_rate(name: str, rate: float | Tensor, device: torch.device) -> float | Tensor:
    """A number, or a scalar tensor on `device`: fp32 for the kernels. One that is elsewhere is read."""
    if not isinstance(rate, Tensor):
        return float(rate)
    if rate.numel() != 1:
        raise ValueError(f"{name} is a tensor of shape {tuple(rate.shape)}; allowed: a number or a tensor of one")
    if rate.device != device:
        return float(rate)
    return rate.detach().reshape(()).to(torch.float32)
