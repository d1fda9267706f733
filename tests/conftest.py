"""What the whole suite shares: the Triton interpreter, one thread, and small models."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: the CPU runs kernels in its interpreter

import pytest
import torch
from klora.model.config import ModelConfig
from klora.model.gpt import GPT

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


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors gain nothing from more threads, and lose a lot to them on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def small_model() -> GPT:
    return randomized()
