"""Every example runs as a script from a fresh folder, and what it prints is so."""

import ast
import importlib
import os
import re
from pathlib import Path

import pytest
import torch
from forks import Forked

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="a GPU machine gets the tests alone")

on_both_devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
        ),
    ],
)
NUMBER = r"([\d,.]+(?:e[+-]\d+)?)"


def run(name: str, device: str, folder: Path) -> str:
    """What the example prints on `device`; it leaves nothing in the folder that it runs in."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    process = Forked([EXAMPLES / name], folder, {**os.environ, **hidden})
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "DeprecationWarning" not in errors
    assert f"on {device}" in output
    assert not list(folder.iterdir())
    return output


def numbers(pattern: str, text: str) -> list[float]:
    """The number at each NUMBER of `pattern` in `text`, of all its matches."""
    found = [group for match in re.finditer(pattern, text) for group in match.groups()]
    assert found, f"no {pattern!r} in:\n{text}"
    return [float(group.replace(",", "")) for group in found]


@on_both_devices
def test_the_op_trains_and_is_as_exact_as_its_reference(device, tmp_path):
    printed = run("op_in_a_loop.py", device, tmp_path)
    first, last = numbers(rf"loss {NUMBER}", printed)
    assert last < first / 3
    (op,), (reference,) = numbers(rf"op {NUMBER}", printed), numbers(rf"reference {NUMBER}", printed)
    assert 0 < op <= max(1.1 * reference, 4 * torch.finfo(torch.float32).eps)


@on_both_devices
def test_muon_learns_and_gets_the_hidden_matrices_alone(device, tmp_path):
    printed = run("muon_in_30_lines.py", device, tmp_path)
    losses = numbers(rf"loss {NUMBER}", printed)
    assert losses[0] > 3 and losses[-1] < 0.05
    assert "Muon: [(256, 128), (64, 256)]; AdamW: [(23, 64), (256,), (64,), (23, 64), (23,)]" in printed


def test_muon_in_30_lines_has_30_lines():
    assert len((EXAMPLES / "muon_in_30_lines.py").read_text().splitlines()) <= 30


@on_both_devices
def test_int6_is_smaller_close_saved_and_undone(device, tmp_path):
    printed = run("int6_on_a_huggingface_model.py", device, tmp_path)
    dense, int6 = numbers(rf"14 linears at six bits: {NUMBER} bytes -> {NUMBER},", printed)
    assert 5 < dense / int6 < 32 / 6
    (error,) = numbers(rf"logits: relative error {NUMBER}%", printed)
    assert 0 < error < 20
    assert "loaded, the same logits: True" in printed and "undone, the dense logits: True" in printed
    assert re.search(r"skipped lm_head: its weight is tied to (model\.)?embed_tokens\.weight", printed)


@on_both_devices
def test_ten_unlike_adapters_learn_their_own_tasks_at_once(device, tmp_path):
    pytest.importorskip("transformers")
    printed = run("ten_adapters_at_once.py", device, tmp_path)
    each = numbers(rf"rank +{NUMBER}, {NUMBER} linears: loss {NUMBER} -> {NUMBER}", printed)
    assert each[::4] == list(range(4, 14)) and set(each[1::4]) == {8, 10, 12}
    assert all(after < before - 0.5 for before, after in zip(each[2::4], each[3::4], strict=True))
    (others,) = numbers(rf"each other's adapters: loss {NUMBER}", printed)
    assert others > max(each[3::4]) + 0.5


@on_both_devices
def test_a_peft_checkpoint_goes_in_and_out_with_equal_outputs(device, tmp_path):
    pytest.importorskip("peft")
    printed = run("peft_checkpoint_in_and_out.py", device, tmp_path)
    assert all(0 <= difference < 1e-5 for difference in numbers(rf"difference {NUMBER}", printed))
    (moved,) = numbers(rf"trained: {NUMBER} from", printed)
    assert moved > 1e-3 and "detached, the base model's logits: True" in printed


@on_both_devices
def test_adapters_learn_over_a_base_at_six_bits(device, tmp_path):
    pytest.importorskip("transformers")
    printed = run("lora_on_an_int6_base.py", device, tmp_path)
    dense, int6 = numbers(rf"{NUMBER} bytes of dense weights, {NUMBER} at six bits", printed)
    assert int6 < 0.4 * dense
    losses = numbers(rf"loss {NUMBER}", printed)
    assert losses[0] > 5 and losses[-1] < 0.1 and "detached, the dense weights: True" in printed


@on_both_devices
def test_adapting_beats_the_model_as_it_is_on_every_unseen_document(device, tmp_path):
    printed = run("score_and_adapt.py", device, tmp_path)
    first, last = numbers(rf"loss {NUMBER} nats", printed)
    assert last < 0.6 * first
    base, adapted = numbers(rf"unseen documents: {NUMBER} bits per byte, adapted {NUMBER} \(score_first\)", printed)
    assert 0 < adapted < base
    each = numbers(rf"tokens: {NUMBER} -> {NUMBER}", printed)
    assert len(each) == 6 and all(after < before for before, after in zip(each[::2], each[1::2], strict=True))


@on_both_devices
def test_a_hugging_face_model_gains_on_every_unseen_document(device, tmp_path):
    pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")
    printed = run("adapt_a_huggingface_model.py", device, tmp_path)
    first, last = numbers(rf"loss {NUMBER} nats", printed)
    assert last < 0.7 * first
    base, adapted = numbers(rf"unseen documents: {NUMBER} bits per byte, adapted {NUMBER} \(score_first\)", printed)
    assert 0 < adapted < base and "valid: True" in printed
    each = numbers(rf"tokens: {NUMBER} -> {NUMBER}", printed)
    assert len(each) == 16 and all(after < before for before, after in zip(each[::2], each[1::2], strict=True))


@on_both_devices
def test_one_kernel_needs_nothing_else_and_agrees_with_plain_pytorch(device, tmp_path):
    printed = run("one_kernel_alone.py", device, tmp_path)
    assert "klora.model was imported: False" in printed
    low, high = numbers(rf"after: {NUMBER} to {NUMBER}", printed)
    assert 0.6 < low < high < 1.3
    (difference,) = numbers(rf"difference between the two: {NUMBER}", printed)
    assert difference < (1e-4 if device == "cpu" else 0.06)  # bf16 on a GPU: each is 0.025 from fp32
    assert all(ms > 0 for ms in numbers(rf": {NUMBER} ms", printed)) and printed.count(" ms") == 2


@pytest.mark.parametrize("name", NAMES)
def test_an_example_uses_public_names_only(name):
    imports = [node for node in ast.walk(ast.parse((EXAMPLES / name).read_text())) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module.startswith("klora"):
            assert node.module in ("klora", "klora.kernels", "klora.lora", "klora.model", "klora.ttt"), node.module
            public = importlib.import_module(node.module).__all__
            assert {alias.name for alias in node.names} <= set(public)


def test_the_readme_has_one_line_for_each_example_and_each_has_a_test():
    rows = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\) \| .+ \|$", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(rows) == [(name, name) for name in NAMES]
    assert all(f'run("{name}"' in Path(__file__).read_text() for name in NAMES)
