"""What every op needs before it launches: registration, backend, checks in one wording, alignment, device facts.

A check raises ValueError, for what is no tensor at all TypeError: what was given, what is wanted. It costs a comparison
where nothing is wrong, and torch.compile traces it.

No Triton is imported here: references and packages without kernels may import it.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")
"""Whether Triton's interpreter runs the kernels. Triton decides it where a kernel is defined, so later changes of the
variable count for nothing."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels read and write; each op says what it sums in."""
FLOATS = (*DTYPES, torch.float64)
"""What references take."""
INTEGERS = (torch.int32, torch.int64)
"""Of slots, tokens and targets."""


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


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """What this backend takes."""
    return DTYPES if backend == "triton" else FLOATS


# Registration


def custom_op(name: str, *, mutates_args: Sequence[str]) -> "Callable[[Callable], CustomOp]":
    """As `torch.library.custom_op`; the function runs with the GPU of its first tensor as the current one.

    Triton launches on the current GPU, whichever the tensors are on: without this a process that holds tensors on
    several would read the memory of one from another.

    A function that returns nothing, such as a backward that writes what its caller gives it, needs no fake and has no
    gradient of its own: a second derivative is refused.
    """
    return lambda function: CustomOp(name, function, mutates_args)


class CustomOp:
    """An op of `torch.ops`, and a shortcut to its function.

    PyTorch takes longer to find an op's function than a GPU to run it: three Python calls and 3 microseconds an
    argument. Where nobody listens in between (no compiler, transform, dispatch mode, tracer or profiler, no subclass of
    a tensor), a call takes the shortcut: the same function, setup and backward, without the dispatcher. Every other
    call goes through `torch.ops`.
    """

    def __init__(self, name: str, function: Callable, mutates_args: Sequence[str]):
        signature = inspect.signature(function)
        self._name, self._function = name, function
        self._count = len(signature.parameters)
        self._written = [i for i, argument in enumerate(signature.parameters) if argument in mutates_args]
        self._returns = signature.return_annotation is not None
        self._makes_list = signature.return_annotation == list[Tensor]
        self._differentiable: Callable | None = None
        if self._returns:
            self._registered = torch.library.custom_op(name, on_its_device(function), mutates_args=mutates_args)
            self.overload = self._registered._opoverload
        else:
            self.overload = _writing_op(name, on_its_device(self._write), function, mutates_args)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or options or len(arguments) != self._count:
            return self.overload(*arguments, **options)
        looked = _look(arguments)
        if looked is None:
            return self.overload(*arguments)
        index, needs_grad = looked
        if index < 0 or index == torch.cuda.current_device():
            return self._call(arguments, needs_grad)
        with torch.cuda.device(index):
            return self._call(arguments, needs_grad)

    def _call(self, arguments: tuple, needs_grad: bool) -> Any:
        """Past the dispatcher, on the current GPU."""
        if not (needs_grad and torch.is_grad_enabled()):
            output = self._function(*arguments)
            if self._written:
                self._count_changes(arguments)
            return output
        if not self._returns:
            self._refuse_gradient()
        if self._differentiable is None:
            return self.overload(*arguments)
        output = self._differentiable(*arguments)
        return list(output) if self._makes_list else output

    def _write(self, *arguments: Any) -> None:
        """What the dispatcher calls of an op that returns nothing."""
        if torch.is_grad_enabled() and _requires_grad(arguments):
            self._refuse_gradient()
        self._function(*arguments)
        self._count_changes(arguments)

    def _refuse_gradient(self) -> NoReturn:
        raise RuntimeError(f"{self._name} has no gradient of its own: second derivatives are not possible")

    def _count_changes(self, arguments: Sequence) -> None:
        for i in self._written:
            if arguments[i] is not None:
                torch.autograd.graph.increment_version(arguments[i])

    def register_fake(self, fake: Callable) -> Callable:
        """As of a `torch.library.custom_op`."""
        return self._registered.register_fake(fake)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As of a `torch.library.custom_op`."""
        self._registered.register_autograd(backward, setup_context=setup_context)
        if any(str(argument.type) == "List[Tensor]" for argument in self.overload._schema.arguments):
            return  # a torch.autograd.Function sees no tensor in a list
        function, makes_list = self._function, self._makes_list

        def forward(ctx, *arguments):
            output = function(*arguments)
            setup_context(ctx, arguments, output)
            return tuple(output) if makes_list else output

        def of_list(ctx, *gradients):
            return backward(ctx, list(gradients))

        methods = {"forward": staticmethod(forward), "backward": staticmethod(of_list if makes_list else backward)}
        made = type(self._name.replace("::", "_"), (torch.autograd.Function,), methods)
        # Its own apply, in Python, looks for transforms and what they left, as _look has, and calls this.
        self._differentiable = super(torch.autograd.Function, made).apply


def _look(arguments: Sequence) -> tuple[int, bool] | None:
    """The first tensor's GPU, -1 without one, and whether any tensor requires a gradient.

    None where an op's function may not be called as it is, without the dispatcher.
    """
    if _modes() or _transforms() or _is_profiled() or _tracing() is not None:
        return None
    index, needs_grad = None, False
    try:
        for argument in arguments:
            if argument is None:
                continue
            kind = type(argument)
            if kind is Tensor or kind is Parameter:
                # Without memory it stands for something, or is empty; the dispatcher knows what to do.
                if not argument.data_ptr() or argument.is_neg():
                    return None
                if index is None:
                    index = argument.get_device()
                if argument.requires_grad:
                    needs_grad = True
            elif kind is list:
                for one in argument:
                    if type(one) is int:
                        continue
                    if not (type(one) in (Tensor, Parameter) and one.data_ptr()) or one.is_neg():
                        return None
                    if index is None:
                        index = one.get_device()
                    if one.requires_grad:
                        needs_grad = True
            elif kind not in PLAIN and isinstance(argument, Tensor):
                return None
    except RuntimeError:  # a tensor that has no address
        return None
    return -1 if index is None else index, needs_grad


_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
_is_profiled, _tracing = torch.autograd._profiler_enabled, torch._C._get_tracing_state
PLAIN = frozenset((bool, int, float, str))
"""What most arguments are that are no tensor."""


def _requires_grad(arguments: Sequence) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return True
        elif type(argument) is list and _requires_grad(argument):
            return True
    return False


_LIBRARIES: list[torch.library.Library] = []
"""An op is gone with its library."""


def _writing_op(name: str, write: Callable, function: Callable, mutates_args: Sequence[str]) -> Callable[..., None]:
    """The op without results that calls `write`, with the schema of `function`."""
    namespace, own_name = name.split("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    tags = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
    library.define(own_name + torch.library.infer_schema(function, mutates_args=mutates_args), tags=tags)
    library.impl(own_name, write, "CompositeExplicitAutograd")
    torch.library.register_fake(name, lambda *arguments: None, lib=library)
    return getattr(getattr(torch.ops, namespace), own_name).default


def on_its_device(function: Callable) -> Callable:
    """`function`, run with the GPU of its first tensor as the current one."""

    @functools.wraps(function)
    def on_device(*arguments: Any, **options: Any) -> Any:
        index = gpu_of(*arguments, *options.values())
        if index < 0 or index == torch.cuda.current_device():
            return function(*arguments, **options)
        with torch.cuda.device(index):
            return function(*arguments, **options)

    return on_device


def device_of(*arguments: Any) -> AbstractContextManager:
    """Makes the GPU of the first tensor among the arguments, or in a list among them, the current one."""
    index = gpu_of(*arguments)
    return nullcontext() if index < 0 else torch.cuda.device(index)


def gpu_of(*arguments: Any) -> int:
    """The number of the GPU of the first tensor among the arguments, or in a list among them; -1 without one."""
    for argument in arguments:
        first = argument[0] if isinstance(argument, list | tuple) and argument else argument
        if isinstance(first, Tensor):
            return first.get_device() if first.is_cuda else -1
    return -1


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


def empty_as(tensor: Tensor) -> Tensor:
    """Empty, contiguous, of the shape and dtype of `tensor`. `new_empty` takes twice as long to read a shape."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def empty_grad(tensor: Tensor, wanted: bool = True) -> Tensor | None:
    """Where a backward writes the gradient of `tensor`: contiguous; None where it is not wanted."""
    return empty_as(tensor) if wanted else None


# Checks


def describe(tensor: Tensor) -> str:
    """Such as "float64 [2, 3]"."""
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


def expect(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = (),
    device: torch.device | None = None,
) -> None:
    """Raise unless `tensor` has this shape, and where they are given one of these dtypes and this device.

    A number in `shape` has to be met, a name stands for any size, "..." in front for any dimensions: ("...", "D").
    """
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {tensor!r}; wanted a tensor, {_wanted(shape, dtypes, device)}")
        expect_plain(name, tensor)
    is_there = device is None or tensor.device == device
    if is_there and (not dtypes or tensor.dtype in dtypes) and _fits(tensor.shape, shape):
        return
    place = "" if is_there else f" on {tensor.device}"
    wanted = _wanted(shape, dtypes, None if is_there else device)
    raise ValueError(f"{name} is {describe(tensor)}{place}; wanted {wanted}")


def expect_plain(name: str, *tensors: Tensor) -> None:
    """ValueError for a DTensor: a kernel has one GPU's memory, and what a reference makes of shards is not its."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter and is_dtensor(tensor):
            raise ValueError(
                f"DTensor was given for `{name}`, {describe(tensor)} placed {tuple(tensor.placements)}; allowed: plain "
                f"tensors; give {name}.to_local(), this rank's part, or {name}.full_tensor(). Under fully_shard call "
                "the op in a module's forward: parameters are plain there"
            )


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a torch.distributed.tensor.DTensor. Who has none never imports that package, nor does this."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def _fits(given: torch.Size, shape: Sequence[int | str]) -> bool:
    if given == shape:
        return True
    if shape and shape[0] == "...":
        shape, given = shape[1:], given[max(0, len(given) - len(shape) + 1) :]
    if len(shape) != len(given):
        return False
    for wanted, size in zip(shape, given, strict=True):  # noqa: SIM110 a generator takes longer than what it compares
        if not isinstance(wanted, str) and wanted != size:
            return False
    return True


def _wanted(shape: Sequence[int | str], dtypes: Sequence[torch.dtype], device: torch.device | None) -> str:
    *others, last = [_name(dtype) for dtype in dict.fromkeys(dtypes)] or [""]
    kinds = f"{', '.join(others)} or {last} " if others else f"{last} ".lstrip()
    return f"{kinds}[{', '.join(map(str, shape))}]" + ("" if device is None else f" on {device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expect_multiples(step: int, most: int | None = None, **sizes: int) -> None:
    """ValueError unless every size is a positive multiple of `step`, up to `most`."""
    for name, size in sizes.items():
        if size < 1 or size % step or size > (most or size):
            kind = "number" if step == 1 else f"multiple of {step}"
            raise ValueError(f"{name} is {size}; wanted a positive {kind}" + (f" up to {most}" if most else ""))


def expect_one_of(name: str, value: Any, allowed: Sequence) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(map(str, allowed))}")


def expect_slots(slots: Tensor | None, batch: int, device: torch.device, pool: int | None = None) -> Tensor | None:
    """`slots` int32 or int64 [batch], contiguous. Without them, a `pool` that is given is one slot a document."""
    if slots is not None:
        expect("slots", slots, (batch,), INTEGERS, device)
        return slots.contiguous()
    if pool not in (None, batch):
        raise ValueError(f"slots is missing, and {pool} slots are not one for each of {batch} documents")
    return None


def expect_rows(name: str, grad: Tensor, like: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless `grad`, a pool's, has the shape and device of `like`, one of `dtypes`, and contiguous slots."""
    expect(name, grad, like.shape, dtypes, like.device)
    if not is_packed(grad):
        raise ValueError(f"{name} has strides {list(grad.stride())}; wanted each slot contiguous")


def refuse_gradients(instead: str, **tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor requires a gradient that the op, whichever its backend, does not give."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and gets none here; {instead}")


def refuse_in_reference(**tensors: Any) -> None:
    """ValueError where the reference was given what only the kernels' backward reads or writes."""
    for name, given in tensors.items():
        if given is not None:
            raise ValueError(f"{name} is given, and the reference has no backward of its own; wanted backend='triton'")


# Alignment


def cdiv(size: int, step: int) -> int:
    """size / step, rounded up. Triton's own takes 2 microseconds on the host, where it looks for constants."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    """The first power of two from `size` on, which is positive."""
    return 1 << (size - 1).bit_length()


def round_up(size: int, step: int) -> int:
    """The first multiple of `step` from `size` on."""
    return cdiv(size, step) * step


def padded_rank(rank: int) -> int:
    """R as the tensor cores take it: a power of two, at least 16."""
    return 16 if rank <= 16 else next_power_of_2(rank)


def is_packed(tensor: Tensor) -> bool:
    """Whether each tensor[i] is contiguous; they may lie any distance apart."""
    return tensor.is_contiguous() or tensor[:1].is_contiguous()


def is_aligned(tensor: Tensor) -> bool:
    """Whether the copy engine can reach it: innermost stride 1, other strides and address multiples of 16 bytes."""
    strides, address = tensor.stride(), tensor.data_ptr()
    if strides[-1] != 1 or not address or address % 16:
        return False
    step = 16 // tensor.itemsize
    for stride in strides[:-1]:  # noqa: SIM110
        if stride <= 0 or stride % step:
            return False
    return True


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` if the copy engine can reach it or nothing is in it, else a copy that it can reach."""
    if is_aligned(tensor) or not tensor.numel():
        return tensor
    return empty_aligned(tensor, *tensor.shape).copy_(tensor)


def empty_aligned(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor that the copy engine can reach: each row starts at a multiple of 16 bytes."""
    return like.new_empty(*shape[:-1], round_up(shape[-1], 16 // like.itemsize))[..., : shape[-1]]


# The device


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere 2, so that the interpreter walks several tiles a program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Of a GPU's L2 cache; elsewhere 50 MiB, which is Hopper's."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 << 20


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is a GPU with Hopper's tensor cores and copy engine."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
