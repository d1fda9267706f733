"""What the whole suite shares: the interpreter, threads (OMP_NUM_THREADS, or one), small models, texts, a tokenizer."""

import dataclasses
import functools
import inspect
import os
import random
import re
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import torch

# Before anything imports triton: without a GPU its interpreter runs the kernels, with one the tests marked gpu do.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import numpy as np
import pytest
from hypothesis import settings
from klora.model.config import ModelConfig
from klora.model.corpus import TextDocument
from klora.model.gpt import GPT
from klora.model.prepare import Prepared
from klora.model.shards import ShardWriter
from klora.model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` puts the current folder first. There transformers would take kernels/ for the package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]

SMALL = ModelConfig(
    vocab_size=300,
    width=32,
    blocks=5,
    heads=4,
    kv_heads=2,
    mlp_hidden=48,
    train_length=64,
    bigram_rows=64,
    bigram_width=8,
)


SENTENCES = [
    "The fox jumps over the lazy dog while a quick brown hen looks on.",
    "def adapt(document): return score(document, before=True)",
    "Seven numbers: 3, 14, 15, 92, 65, 35 and 89; none of them is even, but two.",
    "Kernels read what they need once and write what they made once.",
]


DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
"""Of kernels in the interpreter, which has no bfloat16. In half precision they do the same again: `slow`."""

RENDERED = {"test_bench_report", "test_curves", "test_fuzz", "test_growth", "test_hostile", "test_report"}
"""Files of tests in which pictures are rendered."""

# The same examples on every machine, and no limit on the time of one: both would make a verdict depend on the machine.
settings.register_profile("klora", deadline=None, derandomize=True)
settings.load_profile("klora")


def speed_up_the_interpreter() -> None:
    """Let Triton's interpreter do once what it does at every operation and every call of a device function.

    No number changes: what is left out is looked for again, patched again or dropped.
    """
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names, dtypes = {}, {}
    patch, np_dtype_of = interpreter._patch_lang, interpreter._get_np_dtype

    def builtins_to_patch(owner):
        """Some hundred members are looked through for them."""
        if owner not in names:
            names[owner] = [name for name, member in inspect.getmembers(owner) if is_builtin(member)]
        if names[owner] and not is_builtin(getattr(owner, names[owner][0])):
            return []  # they are replaced all together, and stay so until the launch ends
        return [(name, getattr(owner, name)) for name in names[owner]]

    @functools.cache
    def languages(function) -> list:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]

    def patch_once_a_launch(function):
        if any(is_builtin(lang.load) for lang in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    @functools.wraps(np_dtype_of)
    def np_dtype_by_name(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = np_dtype_of(dtype)
        return dtypes[name]

    blocks, tensors = {}, {}
    init_block, init_tensor = tl.block_type.__init__, tl.tensor.__init__

    @functools.wraps(init_block)
    def init_block_of_a_shape(self, element_ty, shape):
        sizes = [getattr(size, "value", size) for size in shape]
        key = element_ty.name, type(shape), *sizes, *map(type, sizes)
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        vars(self).update(blocks[key], element_ty=element_ty)

    @functools.wraps(init_tensor)
    def init_tensor_of_a_type(self, handle, type):
        own = {"handle": handle, "type": type, "dtype": type.scalar}
        if type.name not in tensors:
            init_tensor(self, handle, type)
            tensors[type.name] = {name: value for name, value in vars(self).items() if name not in own}
        vars(self).update(tensors[type.name], **own)

    tl.block_type.__init__, tl.tensor.__init__ = init_block_of_a_shape, init_tensor_of_a_type
    builder = interpreter.interpreter_builder
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": builtins_to_patch})
    interpreter._patch_lang, interpreter._get_np_dtype = patch_once_a_launch, np_dtype_by_name
    if not builder.options.debug:  # integers are computed in int64 as well, for an assertion that only debug makes
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if os.environ["TRITON_INTERPRET"] == "1":
    speed_up_the_interpreter()


@functools.cache
def is_covered(file: Path) -> bool:
    """Whether a file of tests is about more than kernels and how exact they are: coverage is of the other packages."""
    return bool(re.search(r"klora\.(model|ttt|cli|bench\.(record|report))", file.read_text()))


def pytest_collection_modifyitems(items) -> None:
    """All other tests run without coverage's tracer: it stops at every call, and the interpreter makes millions."""
    for item in items:
        if not is_covered(item.path):
            item.add_marker("no_cover")


def randomized(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    """A model none of whose parameters is at its initial value: zero matrices would hide what they multiply."""
    torch.manual_seed(seed)
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def words(seed: int, count: int) -> str:
    """Text with indentation and line ends, the same for the same seed."""
    draw = random.Random(seed)
    stems = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "kappa", "lambda", "sigma", "omega"]
    ends = ["ing", "ed", "s", "", "tion", "ly", "er"]
    return "".join(
        draw.choice(stems) + draw.choice(ends) + draw.choice([" ", " ", " = ", ":\n    ", "\n", "\n\n"])
        for _ in range(count)
    )


def documents(count: int, length: int = 100) -> list[TextDocument]:
    return [TextDocument(f"{i}.txt", words(i, length)) for i in range(count)]


def wait_for(reached, process, seconds: float = 600.0) -> None:
    """Until `reached()`, however slow the machine; AssertionError once the process has ended without it, or hangs."""
    until = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, f"it ended with {process.returncode} before it came so far"
        assert time.monotonic() < until, f"it has not come so far in {seconds:.0f} s"
        time.sleep(0.02)


def peak_memory(work) -> int:
    """Bytes allocated by Python and NumPy at the highest point while `work()` runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def replayed(call, *, warm_up: int = 0):
    """What `call` returns from the graph that it is captured in, NaN until the first replay, and what replays it.

    `call` returns a list or tuple of tensors, or None. It runs `warm_up` times before, on another stream; with 0 its
    kernels have run already. Graph and streams are plain PyTorch's: that is how whoever uses an op captures it.
    """
    if warm_up:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                call()
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # once the GPU has done all that it was given
        results = call()
    with torch.no_grad():
        for tensor in results or ():
            tensor.fill_(float("nan"))
    return results, graph.replay


@pytest.fixture(scope="session", autouse=True)
def threads():
    """Small tensors gain nothing from more threads, and lose a lot to them on a busy machine."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="module", autouse=True)
def rendered(request):
    """Pictures of runs and scores are drawn, and rendered where tests are about them: to render takes half a second."""
    if request.module.__name__ in RENDERED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for module in ("klora.ttt.picture", "klora.model.curve"):
            patch.setattr(f"{module}.figure_png", lambda figure, dpi: b"\x89PNG, not rendered")
        yield


@pytest.fixture
def empty_is_nan():
    """Every fresh output starts as NaN, so that one element left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_model() -> GPT:
    return randomized()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(documents(40), vocab_size=400)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Prepared:
    """Shards of sentences that repeat, and their tokenizer of 320 pieces: small enough to train on in a test."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(SENTENCES, 20)) for _ in range(40)]
    tokenizer = Tokenizer.train([TextDocument(str(i), text) for i, text in enumerate(texts)], 320)
    paths = {}
    for split, part in (("train", texts[:30]), ("val", texts[30:])):
        with ShardWriter(folder, split) as writer:
            for text in part:
                writer.add(tokenizer.encode(text))
        paths[split] = list(writer.paths)
    (folder / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    return Prepared(tokenizer, paths["train"], paths["val"], folder)


@pytest.fixture
def one_thread():
    """However many the environment asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """One file of every format that klora reads."""
    from fuzzing.originals import made_files

    return made_files(tmp_path_factory.mktemp("files"))
