"""What operators that launch kernels share: registration on the device of their tensors, and which backend runs."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")
"""Whether Triton's interpreter runs the kernels. Triton decides it where a kernel is defined, so later changes of the
variable count for nothing."""


def check_backend(backend: str | None) -> None:
    """ValueError where there is no such backend."""
    if backend not in (None, "reference", "triton"):
        raise ValueError(f"backend is {backend!r}; allowed: None, 'reference', 'triton'")


def resolve_backend(backend: str | None, tensor: Tensor) -> str:
    """The backend that runs on `tensor`: "triton" or "reference"; None is the kernel on a GPU, else the reference.

    ValueError: any other, or the kernel for a tensor that it cannot reach.
    """
    check_backend(backend)
    if backend == "triton" and not (tensor.is_cuda or tensor.is_meta or INTERPRETED):
        raise ValueError(
            f"backend is 'triton' and the tensors are on {tensor.device}; the kernels run on a CUDA GPU: move the "
            "tensors there, or give backend='reference' or None. To debug the kernels without a GPU, set "
            "TRITON_INTERPRET=1 before klora is imported"
        )
    return backend or ("triton" if tensor.is_cuda else "reference")


def custom_op(name: str, *, mutates_args: str | Iterable[str]) -> Callable[[Callable], Any]:
    """As `torch.library.custom_op`; the function runs with the GPU of its first tensor as the current one.

    Triton launches on the current GPU, whichever the tensors are on: without this a process that holds tensors on
    several would read the memory of one from another.
    """

    def register(function: Callable) -> Any:
        @functools.wraps(function)
        def on_device(*arguments: Any, **options: Any) -> Any:
            with device_of(*arguments, *options.values()):
                return function(*arguments, **options)

        return torch.library.custom_op(name, on_device, mutates_args=mutates_args)

    return register


def keep_output(output: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """What of an op's output its backward saves, and what then says whether the output's user has changed it in place.

    Autograd refuses a saved tensor that was changed. What is saved here is another tensor over the same memory, and the
    output's count of changes is read from a third, which holds no memory: the backward makes the output again.
    """
    counter = output.detach()
    with suppress(RuntimeError):  # where a dispatch mode knows no such assignment, it holds the memory after all
        counter.data = output.new_empty(0)
    before = counter._version
    return output.data, lambda: counter._version != before


def refuse_gradients(instead: str, **tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor requires a gradient that the op, whichever its backend, does not give."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and gets none here; {instead}")


def device_of(*arguments: Any) -> AbstractContextManager:
    """Makes the GPU of the first tensor among the arguments, or in a list among them, the current one."""
    for argument in arguments:
        first = argument[0] if isinstance(argument, Sequence) and argument else argument
        if isinstance(first, Tensor):
            return torch.cuda.device(first.device) if first.is_cuda else nullcontext()
    return nullcontext()
