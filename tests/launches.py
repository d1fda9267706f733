"""Launches without a GPU: kernels are compiled for Hopper, and a driver writes down what would be launched.

`python -m tests.launches` ends with status 1 where a remembered launch is not the one that Triton would have made, and
prints as JSON how many Python calls a call of some ops makes on the host, and which launches of the ops of
bench/host.py are not remembered.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl
from klora.kernels import dispatch, launch
from klora.kernels.launch import IS_KNOWN, launched
from klora.kernels.tile import tiled
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
from triton.runtime.jit import JITFunction

LAUNCHED: list[tuple] = []
"""(grid, stream, arguments) of every launch."""


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, metadata, about, enter, leave, *arguments):
        if enter is not None:
            enter(about)
        LAUNCHED.append(((x, y, z), stream, arguments))
        if leave is not None:
            leave(about)


class Driver:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 232448}
    )
    device = 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 7 + device


@launched
@triton.jit(do_not_specialize=["n"])
def kernel(x_ptr, y_ptr, x_d, stride, n, factor, flag, several, BLOCK: tl.constexpr, ON: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, i < n)
    if x_d is not None:
        x += x_d.load([0, 0]).reshape(BLOCK).to(x.dtype)
    if several[0] is not None:
        x += tl.load(several[0] + several[1])
    if y_ptr is not None and ON:
        tl.store(y_ptr + i, x * factor, (i < n) & (flag != 0))


@launched
@gluon.jit(do_not_specialize=["n"])
def gluon_kernel(x_d, y_ptr, n, stride, BLOCK: gl.constexpr):
    i = gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [1], [0]))
    if x_d is not None:
        n += x_d.shape[0]
    gl.store(y_ptr + i * stride, n, i < n)


def every_gluon_launch():
    """As :func:`every_launch`, of what only Gluon's kernels take: descriptors with a layout in shared memory."""
    memory = {dtype: torch.zeros(1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    y = torch.zeros(64, dtype=torch.int32)
    plain = dict(x_d=None, y_ptr=y, n=9, stride=4, BLOCK=32, num_warps=1)
    yield plain
    for dtype, rows, block, width in (
        *((torch.bfloat16, rows, (8, 64), 128) for rows in (16, 8)),
        (torch.bfloat16, 16, (16, 64), 128),
        (torch.bfloat16, 16, (8, 64), 64),
        (torch.float32, 16, (8, 64), 128),
    ):
        tensor, bits = memory[dtype][: rows * 64].view(rows, 64), 8 * dtype.itemsize
        layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=2)
        for padding in ("zero", "nan"):
            described = LaidOutDescriptor(
                tensor, list(tensor.shape), list(tensor.stride()), list(block), layout, padding
            )
            yield plain | dict(x_d=described)
    for change in (dict(stride=1), dict(stride=16), dict(n=16), dict(y_ptr=y[1:]), dict(maxnreg=64)):
        yield plain | change


def every_launch():
    """Arguments that differ in one thing that Triton looks at, or in none."""
    memory = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    x = memory[torch.bfloat16]
    plain = dict(x_ptr=x, y_ptr=x, x_d=None, stride=4, n=9, factor=1.5, flag=True, BLOCK=16, ON=True, num_warps=4)
    plain |= dict(several=(None, 4))
    yield plain
    for several in ((x, 4), (x, 5), (x, 16), (x, 1), (x, 2**31), (x[1:], 4), (memory[torch.float32], 4), (None, 1)):
        yield plain | dict(several=several)
    yield plain | dict(x_ptr=torch.nn.Parameter(x, requires_grad=False))
    for name in ("x_ptr", "y_ptr"):
        yield plain | {name: memory[torch.float32]}
        yield plain | {name: x[1:]}
    yield plain | dict(y_ptr=None)
    for stride in (0, 1, 2, 3, 16, 17, 32, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, 2**33, -(2**31), -(2**31) - 1):
        yield plain | dict(stride=stride)
        yield plain | dict(n=stride)
    yield plain | dict(factor=2.5)
    yield plain | dict(factor=0.0)
    yield plain | dict(factor=2)
    yield plain | dict(factor=1)
    yield plain | dict(flag=False)
    yield plain | dict(flag=1)
    yield plain | dict(flag=0)
    yield plain | dict(BLOCK=32)
    yield plain | dict(ON=False)
    yield plain | dict(num_warps=2)
    yield plain | dict(num_stages=2)
    for dtype, block in ((torch.bfloat16, (1, 16)), (torch.float32, (1, 16)), (torch.bfloat16, (2, 8))):
        yield plain | dict(x_d=tiled(memory[dtype].view(4, 16), *block))
    yield dict(reversed(plain.items()))


def is_same(one, other) -> bool:
    """Whether two arguments of a launch are one thing, a tuple by what it holds."""
    return all(map(is_same, one, other)) if type(one) is type(other) is tuple else one is other


def check_every_launch(driver: Driver) -> None:
    plain = JITFunction.run
    for number in (0, 1):
        driver.device = number
        for turn in range(3):
            both = [(kernel, arguments) for arguments in every_launch()]
            for jitted, arguments in both + [(gluon_kernel, arguments) for arguments in every_gluon_launch()]:
                made = jitted[(3, 2)](**arguments)
                wanted = plain(jitted, grid=(3, 2), warmup=False, **arguments)
                assert made is wanted and isinstance(made, CompiledKernel), (turn, arguments)
                ours, theirs = LAUNCHED[-2:]
                assert ours[:2] == theirs[:2] == ((3, 2, 1), 7 + number)
                assert all(map(is_same, ours[2], theirs[2])), arguments
    driver.device = 0


def check_who_sees_a_launch() -> None:
    """A launch is Triton's own where somebody has replaced `JITFunction.run`, or has a hook before it."""
    arguments, seen, run = next(every_launch()), [], JITFunction.run
    kernel[(1,)](**arguments)
    kernel.run = None  # which a remembered launch does without
    kernel[(1,)](**arguments)
    del kernel.run
    JITFunction.run = lambda self, *given, **options: seen.append("replaced") or run(self, *given, **options)
    kernel[(1,)](**arguments)
    JITFunction.run = run
    kernel.add_pre_run_hook(lambda **_: seen.append("hook"))
    kernel[(1,)](**arguments)
    kernel.pre_run_hooks.clear()
    kernel[lambda meta: seen.append("grid") or (1,)](**arguments)
    kernel[(1,)](*[arguments[name] for name in kernel.arg_names])
    assert seen == ["replaced", "hook", "grid"] and [made[2] for made in LAUNCHED[-5:]].count(LAUNCHED[-1][2]) >= 1
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    for chain in hooks:  # a profiler's, who hears of remembered launches, too
        heard = []
        chain.add(heard.append)
        kernel[(1,)](**arguments)
        chain.remove(heard.append)
        kernel[(1,)](**arguments)
        assert [about.get()["name"] for about in heard] == ["kernel"]
    launches = len(LAUNCHED)
    triton.knobs.runtime.debug = True
    assert kernel[(1,)](**arguments) is not None and len(LAUNCHED) == launches + 1
    triton.knobs.runtime.debug = False


def check_who_has_a_context() -> None:
    """Each thread asks CUDA's runtime before its first launch on a GPU, and then no more."""
    arguments, asked, cuda = next(every_launch()), [], torch.cuda
    plain = cuda.is_initialized, cuda.is_current_stream_capturing
    cuda.is_current_stream_capturing = lambda: asked.append(len(LAUNCHED))
    for answers in ((False, True, True), (True, True)):
        with ThreadPoolExecutor(1) as pool:
            for known in answers:
                cuda.is_initialized = lambda known=known: known
                pool.submit(kernel[(1,)], **arguments).result()
    cuda.is_initialized, cuda.is_current_stream_capturing = plain
    assert asked == [len(LAUNCHED) - 4, len(LAUNCHED) - 2]
    launch._THREAD.has_context = True  # as a thread's that has launched on a GPU


def calls_of(function) -> int:
    """Python's calls in one call of `function`, C functions included, after it has been called twice."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    function(), function()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count - 1


def calls_of_ops() -> dict[str, list[int]]:
    """Op -> calls of its forward, and of its forward and backward."""
    from klora import kernels as ops

    dispatch.INTERPRETED = True  # the CPU's tensors stand for a GPU's
    leaf = lambda *shape: torch.randn(shape, dtype=torch.bfloat16).requires_grad_()  # noqa: E731
    x, weight = leaf(1, 32, 64), leaf(64, 64).detach()
    a, b, slots = leaf(2, 16, 64), leaf(2, 64, 16), torch.zeros(1, dtype=torch.int64)
    found = {}
    for name, function, leaves in (
        ("rms_norm", lambda x: ops.rms_norm(x, backend="triton"), (x,)),
        ("linear", lambda x: ops.linear(x, weight, backend="triton"), (x,)),
        (
            "lora_linear",
            lambda *given: ops.lora_linear(given[0], weight, *given[1:], slots, backend="triton"),
            (x, a, b),
        ),
    ):
        dout = torch.ones_like(function(*leaves))

        def both(function=function, leaves=leaves, dout=dout):
            return torch.autograd.grad(function(*leaves), leaves, dout)

        found[name] = [calls_of(lambda function=function, leaves=leaves: function(*leaves)), calls_of(both)]
    return found


@contextmanager
def launches_of_triton(run):
    """While `run` stands for `JITFunction.run`, known to klora.kernels.launch as Triton's own: those that reach it."""
    seen = []

    def noted(kernel, *given, **options):
        seen.append(kernel.__name__)
        return run(kernel, *given, **options)

    plain = JITFunction.run
    launch.RUN = JITFunction.run = noted
    try:
        yield seen
    finally:
        launch.RUN = JITFunction.run = plain


def forward_and_backward(row) -> None:
    """One of bench/host.py's rows, as it is measured."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in row.leaves)
    out = row.klora(*leaves)
    torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def launches_of_rows() -> dict[str, list]:
    """Row of bench/host.py -> launches that take Triton's own way the first time, and the second.

    Nothing is compiled.
    """
    from klora.bench.host import rows

    for module in list(sys.modules.values()):
        if hasattr(module, "resolve_backend"):
            module.resolve_backend = lambda backend, tensor: backend or "triton"

    def compiled(kernel, *given, **options):
        made = object.__new__(CompiledKernel)
        made.module, made.function, made.packed_metadata, made._run = 1, 2, (), lambda *arguments: None
        return made

    found = {}
    with launches_of_triton(compiled) as seen:
        for name, row in rows(torch.device("cpu"), torch.bfloat16).items():
            found[name] = []
            for _ in range(2):
                seen.clear()
                forward_and_backward(row)
                found[name].append(list(seen))
    return found


if __name__ == "__main__":
    assert IS_KNOWN and kernel.compilations == {}
    triton.runtime.driver.set_active(driver := Driver())
    check_every_launch(driver)
    check_who_sees_a_launch()
    check_who_has_a_context()
    print(
        json.dumps(
            {
                "remembered": len(kernel.compilations),
                "gluon": len(gluon_kernel.compilations),
                "calls": calls_of_ops(),
                "rows": launches_of_rows(),
            }
        )
    )
