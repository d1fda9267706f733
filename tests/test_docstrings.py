"""Every public name says how it is used: a docstring with an example that runs on a CPU, in the words of the field."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

PACKAGES = ("klora.kernels",)
"""Packages whose `__all__` is held to this; `tensors` holds what their examples name."""
OPS = ("klora.kernels",)
"""Those of them whose docstrings name every argument, and the errors."""


def public(packages: tuple[str, ...], kind=callable) -> list:
    """(package, name) of what the packages export and is of that kind, as parameters of a test."""
    found = []
    for package in packages:
        module = importlib.import_module(package)
        names = [name for name in module.__all__ if kind(getattr(module, name))]
        assert names, f"{package} exports nothing"
        found += [pytest.param(package, name, id=f"{package}.{name}") for name in names]
    return found


def namespace(package: str) -> dict:
    """What an example may name: torch, the package's public names, and small tensors drawn anew for each."""
    module = importlib.import_module(package)
    return {name: getattr(module, name) for name in module.__all__} | {"torch": torch} | tensors()


def tensors() -> dict:
    """Two documents of 8 tokens, 64 wide; 4 heads of 16 over 2 groups; 3 adapters of rank 4, 3 caches; 50 words."""
    from klora.kernels import quantize_int6, quantize_int6_ref, rotary_tables

    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    weight = normal(128, 64) / 8
    cos, sin = rotary_tables(8, 16, 10000.0)
    codes, scales = quantize_int6_ref(weight)
    words = torch.randint(50, (2, 8), generator=draw)
    stream = {name: normal(2, 8, 64) for name in ("x", "h", "branch", "pushed", "x0")}
    pool = {name: normal(3, 100) for name in ("params", "grads", "exp_avg")}
    matrices = {name: [normal(16, 32), normal(24, 8)] for name in ("parameters", "gradients", "momenta", "updates")}
    return {
        **stream,
        "weight": weight,
        "dout": normal(2, 8, 128),
        "sizes": (64, 32, 32),
        "slots": torch.tensor([2, 0]),
        "lora_a": normal(3, 3, 4, 64) / 8,
        "lora_b": normal(3, 128, 4),
        "up_a": normal(3, 4, 64) / 8,
        "up_b": normal(3, 128, 4),
        "down_a": normal(3, 4, 128) / 11,
        "down_b": normal(3, 64, 4),
        "scale": normal(64),
        "mix": normal(2, 64),
        "q": normal(2, 8, 4, 16),
        "k": normal(2, 8, 2, 16),
        "v": normal(2, 8, 2, 16),
        "cache_k": normal(3, 6, 2, 16),
        "cache_v": normal(3, 6, 2, 16),
        "filled": torch.tensor([3, 40]),
        "count": torch.tensor([8, 5]),
        "own_cos": cos.expand(2, 8, 8),
        "own_sin": sin.expand(2, 8, 8),
        "cos": cos,
        "sin": sin,
        "gain": normal(4),
        "up": normal(128, 64) / 8,
        "down": normal(64, 128) / 11,
        "head": normal(50, 64) / 8,
        "head_a": normal(3, 4, 64) / 8,
        "head_b": normal(3, 50, 4),
        "dhead_a": torch.zeros(3, 4, 64),
        "dhead_b": torch.zeros(3, 50, 4),
        "dnll": torch.full((2, 8), 0.1),
        "tokens": words,
        "targets": words,
        "embed": normal(50, 64),
        "bigram": normal(64, 64),
        "gate": normal(64),
        "codes": codes,
        "scales": scales,
        "matrix": quantize_int6(weight),
        **pool,
        "exp_avg_sq": normal(3, 100).square(),
        "step": torch.zeros(3, dtype=torch.int64),
        "lr": torch.full((3,), 0.01),
        "group_lr": torch.ones(100),
        **matrices,
    }


PRIVATE = re.compile(r"(?<![a-z])(told|turned|heat|fade|mine|rooms?|plain statement)(?![a-z])", re.IGNORECASE)
"""Words that this project once had for describe, rotated, temperature, rescale, own, package, reference."""


@pytest.mark.parametrize(
    "package", ["klora.kernels", "klora.lora", "klora.model", "klora.ttt", "klora.cli", "klora.bench"]
)
def test_the_words_of_a_package_are_those_of_the_field(package):
    (folder,) = importlib.import_module(package).__path__
    files = sorted(Path(folder).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(folder)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert not found, "\n".join(found)


def example_of(documented) -> str:
    """The code after "Example:", up to the end of its paragraph."""
    found = re.search(r"^Example: (.+(?:\n.+)*)", inspect.getdoc(documented) or "", re.MULTILINE)
    assert found, f"the docstring of {documented.__name__} has no line 'Example: ...'"
    return found[1]


@pytest.mark.parametrize(("package", "name"), public(PACKAGES))
def test_the_example_of_a_docstring_runs(package, name):
    documented = getattr(importlib.import_module(package), name)
    example = example_of(documented)
    assert re.search(rf"\b{name}\b", example), f"the example of {name} does not use it: {example}"
    exec(compile(example, f"example of {name}", "exec"), namespace(package))


@pytest.mark.parametrize(("package", "name"), public(OPS, inspect.isfunction))
def test_the_docstring_of_an_op_names_its_arguments_and_errors(package, name):
    documented = getattr(importlib.import_module(package), name)
    text, parameters = inspect.getdoc(documented), inspect.signature(documented).parameters
    unnamed = [parameter for parameter in parameters if not re.search(rf"\b{parameter}\b", text)]
    assert not unnamed, f"the docstring of {name} does not speak of {unnamed}"
    refuses = "raise ValueError" in inspect.getsource(documented) or "backend" in parameters and "_ref" not in name
    assert "ValueError" in text or not refuses, f"{name} refuses arguments, and its docstring does not say which"


BACKEND_IN_PLACE = ("causal_attention_ref",)
"""One of PyTorch's attentions."""


@pytest.mark.parametrize(("package", "name"), public(OPS, inspect.isfunction))
def test_the_backend_is_the_last_argument_and_given_by_name(package, name):
    parameters = inspect.signature(getattr(importlib.import_module(package), name)).parameters
    if "backend" in parameters and name not in BACKEND_IN_PLACE:
        last = list(parameters.values())[-1]
        assert (last.name, last.kind, last.default) == ("backend", inspect.Parameter.KEYWORD_ONLY, None)
