"""A plugin of pytest's for tests under compute-sanitizer, which alone loads it (:mod:`sanitize`).

A tool slows down whatever runs on a GPU by a hundred times and more, be it ours or not. So a test does three things
otherwise here than in the suite:

- What PyTorch computes in float64 and in 16 bits, attention among it, is computed on the CPU, where no tool watches.
  What klora's ops launch stays where it is, and so does what is in float32: a GPU adds up a row in another order than a
  CPU, which changes the error, and that is what ours are compared with. So does all of a test of graphs or of a
  compiler, which `--whole` adds.
- The GPU seems to have MULTIPROCESSORS: persistent kernels walk several tiles a program at small sizes, which tests
  take from `hopper.for_this_gpu`.
- Each test ends with a line of its seconds and its name: a log that is cut says what was slow.
"""

import time

import pytest
import sanitize
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MULTIPROCESSORS = 16
"""With fewer most of the GPU would idle where sizes are small anyway; with more tests would have to be larger."""
SORTING = {"embedding_dense_backward"}
STAY = {"_to_copy", "copy_", "clone", "fill_", "zero_", "set_", "resize_", "_local_scalar_dense"}
"""What copies, and what only writes or reads memory."""


def is_large(func: torch._ops.OpOverload) -> bool:
    """Of other libraries, or with a sort: on the CPU in every dtype."""
    name = func.overloadpacket.__name__.lstrip("_")
    return name in SORTING or (name.startswith("linalg_") and not name.endswith("norm"))


def computes(func: torch._ops.OpOverload, leaves: list) -> bool:
    """Whether it computes in the dtype of what it is given, and returns what is new or written to."""
    name, returns = func.overloadpacket.__name__, func._schema.returns
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    is_memory = name in STAY or name.startswith(("new_", "empty")) or name.endswith("_like")
    is_elsewhere = any(isinstance(leaf, torch.Generator | torch.device | torch.dtype) for leaf in leaves)
    is_wider = name.startswith(("native_", "_fused_")) or (name in ("_softmax", "_log_softmax") and leaves[2])
    return bool(returns) and not (is_view or is_memory or is_elsewhere or is_wider)


class FormulasOnTheCPU(TorchDispatchMode):
    """Runs on the CPU what computes with tensors of a `device`'s type in float64 or 16 bits alone, and what is large in
    any dtype, and brings back results and what was changed.

    Of 16 bits it is computed in fp32 and rounded once. While an op is dispatched the mode is off: it does not see what
    klora's ops call. A backward runs in the modes of whoever asked for it, so it sees that.
    """

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, leaves = kwargs or {}, tree_leaves((args, kwargs))
        there = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == self.device]
        dtypes = {leaf.dtype for leaf in there if leaf.is_floating_point()}
        is_formula = len(dtypes) == 1 and dtypes < {torch.float64, torch.float16, torch.bfloat16}
        if func.namespace == "aten" and there and ((is_formula and computes(func, leaves)) or is_large(func)):
            like = next((leaf for leaf in there if leaf.dtype in dtypes), there[0])
            return self.on_the_cpu(func, args, kwargs, like)
        return func(*args, **kwargs)

    def on_the_cpu(self, func, args: tuple, kwargs: dict, like: Tensor):
        narrow = like.dtype if like.is_floating_point() and like.itemsize == 2 else None
        copies: list[tuple[Tensor, Tensor]] = []

        def there(leaf):
            if not isinstance(leaf, Tensor):
                return leaf
            copy = leaf.to("cpu", copy=True)
            copy = copy.float() if copy.dtype == narrow else copy
            copies.append((copy, leaf))
            return copy

        def back(leaf):
            if not isinstance(leaf, Tensor):
                return leaf
            for copy, original in copies:
                if copy is leaf:  # `out`, or what an op in place has changed
                    return original.copy_(leaf)
            return leaf.to(like.device, narrow if narrow and leaf.is_floating_point() else leaf.dtype)

        return tree_map(back, func(*tree_map(there, args), **tree_map(there, kwargs)))


class AttentionOnTheCPU(TorchFunctionMode):
    """Runs PyTorch's attention of tensors of a `device`'s type on the CPU, where its backward follows it.

    As a fused kernel where one was allowed, whose p comes from the logsumexp on a CPU as well, else by the formula.
    """

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].device.type != self.device:
            return func(*args, **kwargs)
        return self.on_the_cpu(*args, **kwargs).to(args[0].device)

    def on_the_cpu(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *others, **options) -> Tensor:
        mask = options.pop("attn_mask", mask)
        q, k, v, mask = (tensor if tensor is None else tensor.cpu() for tensor in (q, k, v, mask))
        if options.pop("enable_gqa", False):
            k, v = (tensor.repeat_interleave(q.size(-3) // tensor.size(-3), -3) for tensor in (k, v))
        cuda = torch.backends.cuda
        is_fused = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if is_fused else SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, mask, *others, **options)


class Few:
    """What PyTorch says of a GPU, and MULTIPROCESSORS."""

    multi_processor_count = MULTIPROCESSORS

    def __init__(self, properties):
        self._properties = properties

    def __getattr__(self, name: str):
        return getattr(self._properties, name)


class Seconds:
    """A line for each test once it is over, behind its dot: what it took, how it ended, which it was."""

    def __init__(self, reporter):
        self.reporter = reporter

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.began, self.outcome = time.monotonic(), "passed"
        return (yield)

    def pytest_runtest_logreport(self, report) -> None:
        if not report.passed:
            self.outcome = report.outcome

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        seconds = time.monotonic() - self.began
        self.reporter.write_line(f" sanitized: {seconds:.1f} s, {self.outcome}: {nodeid}")
        self.reporter.flush()


@pytest.hookimpl(trylast=True)  # once there is a reporter
def pytest_configure(config) -> None:
    properties = torch.cuda.get_device_properties
    torch.cuda.get_device_properties = lambda *device, **named: Few(properties(*device, **named))
    config.add_cleanup(lambda: setattr(torch.cuda, "get_device_properties", properties))
    config.pluginmanager.register(Seconds(config.pluginmanager.getplugin("terminalreporter")), "seconds")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if any(word in item.name.lower() for word in sanitize.GRAPHS):
        return (yield)
    with AttentionOnTheCPU(), FormulasOnTheCPU():
        return (yield)
