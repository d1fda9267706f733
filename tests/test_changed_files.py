"""Files that change while they are read or afterwards: what is loaded is in memory, what is hashed is what was read."""

import copy
import os
from pathlib import Path

import klora.cli.verify as verify_command
import pytest
import torch
from klora.model.checkpoint import load_tensors, save_tensors
from klora.model.config import ConfigError
from klora.model.int6_file import load_quantized, save_quantized
from klora.model.int6_model import quantize_linears
from klora.ttt import hf
from test_cli import klora
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes folders of Hugging Face's by their names."""
    pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")
    from tiny_hf import saved

    return lambda name: saved(tmp_path_factory.mktemp("models") / name)


def overwrite(file: Path) -> None:
    """In place, every byte, with the size as it was."""
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.write(b"?" * size)


def swap_last_byte(file: Path) -> None:
    """With size and time of the last change as they were."""
    before = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(before.st_size - 1)
        opened.write(b"?")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_state_is(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert before and all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_model_of_transformers_is_not_its_file(models):
    folder = models("model")
    module, _ = hf.load_hf(folder, CPU)
    before = state_of(module)
    overwrite(folder / "model.safetensors")
    assert_state_is(module, before)


def test_a_checkpoint_that_was_read_is_not_its_file(tmp_path):
    """A run that goes on would train on what is written there, and a truncated file would end it by a signal."""
    saved = {"model/weight": torch.randn(64, 64)}
    save_tensors(tmp_path / "checkpoint.safetensors", saved, {})
    loaded, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    overwrite(tmp_path / "checkpoint.safetensors")
    assert torch.equal(loaded["model/weight"], saved["model/weight"])


def test_a_model_at_six_bits_is_not_its_file(tmp_path):
    dense = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96))
    quantized = copy.deepcopy(dense)
    quantize_linears(quantized)
    save_quantized(quantized, tmp_path / "model.safetensors")
    loaded = load_quantized(copy.deepcopy(dense), tmp_path / "model.safetensors")
    before = state_of(loaded)
    overwrite(tmp_path / "model.safetensors")
    assert_state_is(loaded, before)


@pytest.mark.parametrize("swapped", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_changes_between_being_read_and_being_hashed_is_refused(models, monkeypatch, swapped):
    folder, hashed = models("model"), hf.hashes_of_folder
    hf.read_hf(folder, CPU)

    def swapping(of):
        swap_last_byte(Path(of) / swapped)
        return hashed(of)

    monkeypatch.setattr(hf, "hashes_of_folder", swapping)
    with pytest.raises(ConfigError, match="model changed while it was read; run again once nothing writes to it"):
        hf.read_hf(folder, CPU)


def test_what_is_no_file_of_the_models_may_change_meanwhile(models, monkeypatch):
    """Results that are written into the folder, and a link that leads nowhere."""
    folder, loaded = models("model"), hf.load_hf
    (folder / "broken.json").symlink_to(folder / "nothing.json")

    def writing(of, *others):
        (Path(of) / "journal.jsonl").write_text("{}")
        return loaded(of, *others)

    monkeypatch.setattr(hf, "load_hf", writing)
    assert hf.read_hf(folder, CPU)[2] == hf.hashes_of_folder(folder)


def test_a_folder_that_changes_between_the_two_looks_of_verify_is_refused(models, tmp_path, monkeypatch):
    folder, jsonl = models("model"), tmp_path / "some.jsonl"
    jsonl.write_text('{"text": "one text, and nothing after it"}\n')
    config = ["--set", "chunk=8", "--set", "window=32", "--set", "lr=0.01"]
    klora("score", "--hf", folder, "--jsonl", jsonl, "--out", tmp_path / "out", *config)
    whole = verify_command.Subject.of_folder

    def swapping(of, *others):
        with open(Path(of) / "config.json", "a") as file:
            file.write("\n")
        return whole(of, *others)

    asked = ["verify", tmp_path / "out/score.json", "--hf", folder, "--jsonl", jsonl, "--share", 1]
    assert "to the bit" in klora(*asked).stdout
    monkeypatch.setattr(verify_command.Subject, "of_folder", swapping)
    refused = klora(*asked, check=2).stderr
    assert "model changed while it was read" in " ".join(refused.split()) and "Traceback" not in refused
