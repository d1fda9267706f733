"""Docstrings of what klora, klora.model and klora.ttt export: each has a line "Example: ...", and every line runs."""

import ast
import contextlib
import inspect
import re
from pathlib import Path

import klora
import klora.model
import klora.ttt
import pytest
import torch
from conftest import documents, randomized, words
from klora.model.checkpoint import save_tensors
from klora.model.config import ModelConfig
from klora.model.corpus import Corpus
from klora.ttt.sampling import is_for_tuning
from tiny_hf import tiny_llama, tiny_tokenizer

PACKAGES = (klora, klora.model, klora.ttt)
pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")

PUBLIC = {name: getattr(package, name) for package in PACKAGES for name in package.__all__ if name != "__version__"}


def examples(thing) -> list[str]:
    return re.findall(r"^ *Example: (.+)$", thing.__doc__ or "", re.M)


def with_methods() -> dict[str, object]:
    """What is exported, and the public methods of its classes."""
    methods = {
        f"{name}.{attribute}": getattr(thing, attribute)
        for name, thing in PUBLIC.items()
        if inspect.isclass(thing)
        for attribute, value in vars(thing).items()
        if not attribute.startswith("_") and isinstance(value, classmethod) | inspect.isfunction(value)
    }
    return PUBLIC | methods


LINES = [
    pytest.param(line, id=name, marks=[pytest.mark.slow] * (name == "sweep"))
    for name, thing in with_methods().items()
    for line in examples(thing)
]


def one_of_each_half(tokenizer) -> list:
    """A document that a sweep tunes on and one that it scores, just long enough to adapt."""
    found = {}
    for seed in range(20):
        document = klora.ttt.Document(str(seed), tokenizer.encode(words(seed, 400))[:514], 1)
        found[is_for_tuning(document)] = document
    return list(found.values())


@pytest.fixture(scope="module")
def names(tmp_path_factory, tokenizer):
    """A folder with the files that the lines speak of, and the objects."""
    folder = tmp_path_factory.mktemp("usage")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, blocks=3, heads=4, kv_heads=2, mlp_hidden=48, bigram_width=8
    )
    model, text = randomized(config), words(1, 40)
    quantized = torch.nn.Sequential(torch.nn.Linear(256, 256))
    klora.model.quantize_linears(quantized)
    (folder / "runs/tiny").mkdir(parents=True)
    (folder / "essays").mkdir()
    for document in documents(20):
        (folder / "essays" / document.name).write_text(document.text)
    with contextlib.chdir(folder):
        klora.model.save_artifact("tiny.klora", model.state_dict(), config, tokenizer.to_bytes(), {})
        Path("runs/tiny/tokenizer.model").write_bytes(tokenizer.to_bytes())
        weights = dict(model.named_parameters())
        save_tensors(Path("runs/tiny/model.safetensors"), weights, {"model": config.to_dict(), "provenance": {}})
        klora.model.save_quantized(quantized, "linears.safetensors")
        lm = klora.load("tiny.klora", device="cpu")
        lm.score(text).write(Path("scores"))
        journal = klora.ttt.Journal(Path("earlier.jsonl"), fingerprint="", resume=False)
        yield PUBLIC | {
            "klora": klora,
            "torch": torch,
            "contextlib": contextlib,
            "Path": Path,
            "Corpus": Corpus,
            "model": model,
            "quantized": quantized,
            "tokenizer": tokenizer,
            "lm": lm,
            "text": text,
            "tokens": torch.randint(3, tokenizer.vocab_size, (2, 16)),
            "document": klora.ttt.Document("notes", tokenizer.encode(text), len(text.encode())),
            "essays": one_of_each_half(tokenizer),
            "journal": journal,
            "causal_lm": tiny_llama(),
            "hf_tokenizer": tiny_tokenizer(eos_token="<|endoftext|>"),
        }
        journal.close()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_usage_line(name):
    lines = examples(PUBLIC[name])
    assert lines and all(len(ast.parse(line).body) == 1 for line in lines)
    assert name in lines[0], "the line uses the name"


@pytest.mark.parametrize("line", LINES)
def test_the_usage_lines_run_as_they_are_printed(line, names):
    exec(line, dict(names))


def test_the_errors_are_those_that_their_lines_catch(names):
    with pytest.raises(klora.KloraError, match="no such file"):
        klora.load("missing.klora")
    with pytest.raises(klora.model.ConfigError, match="heads=7"):
        klora.model.ModelConfig(heads=7)
