"""Launching a kernel again without asking Triton again which of its compilations is meant.

Triton looks at every argument of every launch, writes its types and options into a text and looks for it: 8 to 20
microseconds, more than most kernels of a small batch take. :func:`launched` remembers the compilation by a key of what
Triton looks at and calls its launcher, as `kernel.warmup(...)[grid](...)` does.
"""

import threading
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
from triton.knobs import HookChain
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

IS_KNOWN = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])
"""Versions whose launches are known to look at nothing else. Others launch as they do."""

RUN = JITFunction.run
"""Triton's own, imported before anybody here replaces it."""


class _Thread(threading.local):
    has_context = False
    """Whether this thread is known to have a CUDA context."""


_THREAD = _Thread()


def _ensure_context() -> None:
    """Gives this thread a CUDA context, if it has none.

    The driver makes a tensor map for the context of the thread that asks for it. A thread gets one with its first call
    of CUDA's runtime, which allocations from PyTorch's cache are not: one that begins with a launch, of a pool or of a
    backward, would be refused. To ask whether a stream is captured is such a call, and one that a capture allows.
    """
    if torch.cuda.is_initialized():  # else nothing is launched: kernels are recorded, or compiled
        torch.cuda.is_current_stream_capturing()
        _THREAD.has_context = True


def launched(kernel: Any) -> Any:
    """`kernel`, a `@triton.jit` or `@gluon.jit` function launched by keyword arguments, with cheap launches.

    It stays the JITFunction that it is. A launch takes Triton's own way, and is not remembered, where the key does not
    say everything: an address that is not on 16 bytes, an integer past 32 bits, a hook; and while somebody has
    replaced `JITFunction.run`, to see every launch. In Triton's interpreter nothing changes.

    A thread may begin with a launch, which by Triton alone can fail ("invalid device context").
    """
    kind = {JITFunction: _Launched, GluonJITFunction: _LaunchedGluon}.get(type(kernel))
    if IS_KNOWN and kind is not None:
        kernel.__class__ = kind
        kernel.forms, kernel.compilations = {}, {}
    return kernel


class _Launched(JITFunction):
    def __getitem__(self, grid: Any) -> Any:
        def launch(*positional: Any, **arguments: Any) -> Any:
            if not _THREAD.has_context:
                _ensure_context()
            if positional or callable(grid) or JITFunction.run is not RUN or self.pre_run_hooks:
                return self.run(*positional, grid=grid, warmup=False, **arguments)
            form = self.forms.get(names := tuple(arguments))
            if form is None:
                form = self.forms[names] = _Form(self, names)
            active = driver.active
            device = active.get_current_device()
            key = form.key(device, arguments)
            remembered = self.compilations.get(key) if key else None
            if remembered is None:
                compiled = self.run(grid=grid, warmup=False, **arguments)
                if key and isinstance(compiled, CompiledKernel):
                    self.compilations[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata
                return compiled
            compiled, run, function, metadata = remembered
            x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
            stream, values = active.get_current_stream(device), form.in_order(arguments)
            if _is_watched():
                compiled[x, y, z](*values, stream=stream)
            else:  # what that ends in, without the metadata and calls of hooks that nobody has set
                run(x, y, z, stream, function, metadata, None, None, None, *values)
            return compiled

        return launch


class _LaunchedGluon(_Launched, GluonJITFunction):
    pass


def _is_watched() -> bool:
    """Whether a hook, such as a profiler's, is to be called around each launch."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (type(enter) is type(leave) is HookChain) or bool(enter.calls or leave.calls)


class _Form:
    """One set of names that a kernel is launched with."""

    def __init__(self, kernel: JITFunction, names: tuple[str, ...]):
        parameters = kernel.signature.parameters
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        constants |= {name for name in names if name not in parameters}  # options, such as num_warps
        self.is_whole = all(name in names for name in parameters)
        self.in_order = _all_of([name for name in parameters if name in names])
        self.constants = _all_of([name for name in names if name in constants])
        self.inputs = _all_of([name for name in names if name not in constants])

    def key(self, device: int, arguments: dict[str, Any]) -> tuple | None:
        """What tells apart the compilations of these arguments; None where that takes Triton itself."""
        runtime = knobs.runtime
        if not self.is_whole or runtime.add_stages_inspection_hook is not None:
            return None
        key = [self, device, runtime.debug, knobs.compilation.instrumentation_mode, *self.constants(arguments)]
        return None if _note(self.inputs(arguments), key) % 16 else tuple(key)


ODD = 1
"""The address of what a key cannot tell."""


def _note(values: tuple, key: list) -> int:
    """Appends what Triton looks at; all addresses, or-ed, of which the last four bits are zero where all are on 16."""
    addresses = 0
    for value in values:
        if value is None:
            key.append(None)
            continue
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            addresses |= value.data_ptr()
            key.append(value.dtype)
        elif kind is int:
            if not -(2**31) <= value < 2**31:
                return ODD
            key.append(1 if value == 1 else 16 if value % 16 == 0 else 2)
        elif kind is TensorDescriptor:  # made of an address on 16 bytes
            key += value.base.dtype, *value.block_shape
        elif kind is LaidOutDescriptor:
            key += value.base.dtype, *value.block_shape, value.layout
        elif kind is tuple:
            key.append(len(value))
            addresses |= _note(value, key)
        elif kind is bool or kind is float:
            key.append(kind)
        else:
            return ODD
    return addresses


def _all_of(names: list[str]) -> Any:
    """itemgetter that gives a tuple for any number of names."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda arguments: tuple(arguments[name] for name in names)
