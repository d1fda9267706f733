"""Compiling kernels side by side, before a run compiles them one after another at their first launch.

:func:`recorded` runs a piece of work with every launch left out, and returns what the launches would have compiled. So
the work itself says which kernels it takes, in which dtypes, sizes and tiles. :func:`compile_all` compiles such a list
in processes of their own, which need no GPU, into the cache on disk where Triton looks at a first launch.

Triton offers no list of this kind. What is used of its insides is the same in versions 3.6 and 3.7.

A kernel's key in the cache can depend on which kernels were launched before it: Triton hashes with a kernel the global
constants of the functions that it calls, but only of those that were hashed earlier. So work is recorded as a process
that begins with it would launch it, and a kernel is compiled under the hash that it had there.
"""

import hashlib
import importlib
import io
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends import backends
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import JITFunction

from ..cores import usable_cores
from .launch import RUN

MOST_JOBS = 8
"""Processes, where none are asked for: beyond these, their start costs what they save."""

_RECORDING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Compilation:
    """One kernel for one set of argument types and constants: what `triton.compile` takes."""

    function: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: Any
    hash: str
    """the function's, when it was launched"""

    @property
    def name(self) -> str:
        return self.function.fn.__qualname__

    def source(self) -> ASTSource:
        self.function.hash = self.hash
        kind = GluonASTSource if self.function.is_gluon() else ASTSource
        return kind(self.function, self.signature, self.constants, self.attributes)

    def key(self) -> str:
        """Its name in Triton's cache, as `triton.compile` makes it."""
        source, backend = self.source(), make_backend(self.target)
        options = backend.parse_options({**self.options, **source.parse_options()})
        text = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
        return hashlib.sha256(text.encode()).hexdigest()

    def compile(self) -> None:
        """Into Triton's cache: the kernel, and where there is a GPU what launches it.

        Triton 3.6 has the C compiler make a launcher for each signature at a first launch; 3.7 has one for all.
        """
        compiled = triton.compile(self.source(), target=self.target, options=self.options)
        if any(backend.driver.is_active() for backend in backends.values()):
            driver.active.launcher_cls(compiled.src, compiled.metadata)


def cache_folder() -> Path:
    """Where Triton keeps compiled kernels."""
    return Path(knobs.cache.dir)


def is_cached(key: str, name: str) -> bool:
    """Whether Triton's cache holds the kernel of that key and name."""
    metadata = f"{name[:150]}.json"
    return metadata in (get_cache_manager(key).get_group(metadata) or {})


def recorded(work: Callable[[], object]) -> dict[str, Compilation]:
    """What the launches in `work()` would compile, by its key. Nothing is launched, so what `work` computes is garbage.

    `work` must not read from a kernel's output which memory it touches. Its tensors are real: they have to fit.
    """
    found: dict[tuple, Compilation] = {}
    with _RECORDING, _launches_left_out(found):
        _forget_hashes()
        work()
    return {one.key(): one for one in found.values()}


def _forget_hashes() -> None:
    """As if no kernel had been launched yet in this process."""
    package = __package__ + "."
    for module in [module for name, module in sys.modules.items() if name.startswith(package)]:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.hash, value.used_global_vals = None, {}


@contextmanager
def _launches_left_out(found: dict[tuple, Compilation]) -> Iterator[None]:
    run, compile_now = JITFunction.run, JITFunction._do_compile
    caches: list[tuple[dict, str]] = []
    noted = object()  # stands for the compiled kernel, so that its other launches are not looked at

    def run_nothing(self, *arguments, grid, warmup, **options):
        RUN(self, *arguments, grid=grid, warmup=True, **options)

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        compiled, _, target, *_ = self.device_caches[device]
        found[self, key] = Compilation(
            self, signature, constexprs, attrs, dict(options.__dict__), target, self.cache_key
        )
        compiled[key] = noted
        caches.append((compiled, key))
        return noted

    JITFunction.run, JITFunction._do_compile = run_nothing, note
    try:
        yield
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_now
        for compiled, key in caches:
            del compiled[key]


def compile_all(
    compilations: Sequence[Compilation],
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Compile each into Triton's cache, `jobs` processes at a time; what failed, and why.

    `jobs` None is one a core, at most MOST_JOBS. `progress` gets how many are done, of how many. The processes import
    the caller's main module, as those of multiprocessing do.
    """
    jobs = min(jobs or min(MOST_JOBS, usable_cores()), max(1, len(compilations)))
    failed = []
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_ignore_interrupts)
    try:
        futures = {pool.submit(_compile, _pickled(one)): one.name for one in compilations}
        for done, future in enumerate(as_completed(futures), start=1):
            if why := future.result():
                failed.append(f"{futures[future]}: {why}")
            progress(done, len(futures))
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the parent tells these to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compile(pickled: bytes) -> str:
    """Empty, or why it could not be compiled."""
    try:
        pickle.loads(pickled).compile()
    except Exception as error:  # the compiler may raise anything; the run will say it where it launches the kernel
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


class _Pickler(pickle.Pickler):
    """Kernels by the names of their modules and functions: those of another process have state of their own."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, JITFunction):
            return _function, (value.fn.__module__, value.fn.__qualname__)
        return NotImplemented


def _pickled(one: Compilation) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(one)
    return buffer.getvalue()


def _function(module: str, name: str) -> JITFunction:
    return getattr(importlib.import_module(module), name)
