"""What the whole suite shares: the Triton interpreter, one thread, small models, sample texts and a tokenizer."""

import os
import random
import tracemalloc

import torch

# Before anything imports triton: without a GPU its interpreter runs the kernels, with one the tests marked gpu do.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest
from klora.model.config import ModelConfig
from klora.model.corpus import Document
from klora.model.gpt import GPT
from klora.model.tokenizer import Tokenizer

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


def documents(count: int, length: int = 100) -> list[Document]:
    return [Document(f"{i}.txt", words(i, length)) for i in range(count)]


def peak_memory(work) -> int:
    """Bytes allocated by Python and NumPy at the highest point while `work()` runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors gain nothing from more threads, and lose a lot to them on a busy machine."""
    torch.set_num_threads(1)


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
