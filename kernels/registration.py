"""Registration of an operator that launches kernels: `torch.library.custom_op`, on the device of its tensors."""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


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


def device_of(*arguments: Any) -> AbstractContextManager:
    """Makes the GPU of the first tensor among the arguments, or in a list among them, the current one."""
    for argument in arguments:
        first = argument[0] if isinstance(argument, Sequence) and argument else argument
        if isinstance(first, Tensor):
            return torch.cuda.device(first.device) if first.is_cuda else nullcontext()
    return nullcontext()
