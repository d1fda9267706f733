"""Models at six bits: the artifact straight into Int6Linear, the command line's --weights, any module's linears."""

import json

import pytest
import torch
from conftest import SMALL, documents, randomized
from klora.kernels.int6 import Int6Linear
from klora.model.artifact import load_artifact, save_artifact
from klora.model.config import ConfigError, ModelConfig
from klora.model.gpt import BlockAdapter, KVCache, is_block_matrix
from klora.model.int6_model import Int6Block, quantize_linears
from klora.model.loading import model_from_artifact
from test_cli import klora
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artifact_path(tokenizer, tmp_path_factory):
    """An artifact whose tokenizer and model fit each other, with the fields that scoring asks of a provenance."""
    config = ModelConfig.from_dict({**SMALL.to_dict(), "vocab_size": tokenizer.vocab_size})
    path = tmp_path_factory.mktemp("int6") / "model.klora"
    save_artifact(path, randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    return path


@pytest.fixture(scope="module")
def both(artifact_path):
    loaded = load_artifact(artifact_path)
    return model_from_artifact(loaded, CPU), model_from_artifact(loaded, CPU, "int6")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for document in documents(4, 60):
        (folder / document.name).write_text(document.text)
    return folder


class TestModelFromArtifact:
    def test_computes_what_the_dense_model_computes(self, both):
        dense, int6 = both
        tokens = torch.randint(3, 300, (2, 40))
        torch.testing.assert_close(int6.logits(tokens), dense.logits(tokens), rtol=1e-5, atol=1e-5)

    def test_holds_no_block_matrix_but_packed(self, both):
        dense, int6 = both
        assert all(isinstance(block, Int6Block) for block in int6.blocks)
        assert not any(is_block_matrix(name) for name, _ in int6.named_parameters())
        assert sum(isinstance(module, Int6Linear) for module in int6.modules()) == 4 * len(int6.blocks)
        kept = {name for name, _ in dense.named_parameters() if not is_block_matrix(name)}
        assert {name for name, _ in int6.named_parameters()} == kept
        assert not any(tensor.is_meta for tensor in int6.state_dict().values())

    def test_decodes_over_a_cache(self, both):
        dense, int6 = both
        tokens = torch.randint(3, 300, (1, 12))
        whole = dense.logits(tokens)
        cache = KVCache(int6, batch=1, length=12)
        steps = [int6.logits(tokens[:, :5], cache), *(int6.logits(tokens[:, i : i + 1], cache) for i in range(5, 12))]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)

    def test_adapters_get_the_dense_model_s_gradients(self, both):
        config, tokens = both[0].config, torch.randint(3, 300, (2, 33))
        shapes = (2, 3, 4, config.width), (2, sum(config.qkv_sizes), 4), (2, config.width)
        leaves = [torch.randn(shape).mul_(0.1).requires_grad_() for _ in range(config.blocks) for shape in shapes]
        adapters = [BlockAdapter(*leaves[3 * i : 3 * i + 3]) for i in range(config.blocks)]
        dense, int6 = (torch.autograd.grad(model.hidden(tokens, adapters).sin().sum(), leaves) for model in both)
        for ours, theirs in zip(int6, dense, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    def test_takes_the_artifact_s_weights_and_initialises_none(self, artifact_path, monkeypatch):
        monkeypatch.setattr(nn.init, "orthogonal_", lambda tensor: pytest.fail("loading waits for an initialisation"))
        loaded = load_artifact(artifact_path)
        found, wanted = model_from_artifact(loaded, CPU).state_dict(), loaded.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name].to(found[name].dtype)) for name in wanted)

    def test_other_weights_are_refused(self, artifact_path):
        with pytest.raises(ConfigError, match="'int4' is not possible; allowed: dense, int6"):
            model_from_artifact(load_artifact(artifact_path), CPU, "int4")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_it_is_as_close_to_fp32_as_the_dense_model(artifact_path):
    loaded, device = load_artifact(artifact_path), torch.device("cuda")
    tokens = torch.randint(3, 300, (2, 3), device=device)
    exact = model_from_artifact(loaded, CPU).logits(tokens.cpu()).double()
    errors = [
        (model_from_artifact(loaded, device, weights).logits(tokens).double().cpu() - exact).norm()
        for weights in ("dense", "int6")
    ]
    assert errors[1] <= 1.2 * errors[0]


class TestCommandLine:
    def test_generate_says_the_same_with_both(self, artifact_path):
        said = [
            json.loads(
                klora(
                    *("generate", artifact_path, "--prompt", "alpha", "--tokens", "12", "--temperature", "0"),
                    *("--device", "cpu", "--weights", weights, "--json"),
                ).stdout
            )["text"]
            for weights in ("dense", "int6")
        ]
        assert said[0] == said[1]

    def test_score_agrees_and_says_which_weights(self, artifact_path, text, tmp_path):
        totals = {}
        for weights in ("dense", "int6"):
            out = tmp_path / weights
            klora("score", artifact_path, "--text", text, "--out", out, "--device", "cpu", "--weights", weights)
            stored = json.loads((out / "score.json").read_text())
            assert stored["weights"] == weights
            totals[weights] = stored["totals"]
        assert totals["int6"]["base_bpb"] == pytest.approx(totals["dense"]["base_bpb"], rel=1e-5)
        assert totals["int6"]["adapted_bpb"] == pytest.approx(totals["dense"]["adapted_bpb"], rel=1e-4)

    def test_other_weights_are_refused(self, artifact_path):
        done = klora("generate", artifact_path, "--weights", "fp4", check=2)
        assert "weights='fp4' is not possible; allowed: dense, int6" in done.stderr


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = self.first
        self.inner = nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 8))
        self.attention = nn.MultiheadAttention(32, 2)

    def forward(self, x):
        return self.inner(self.first(x) + self.second(x))


class TestQuantizeLinears:
    def test_swaps_in_place_and_undoes(self):
        torch.manual_seed(0)
        module = Shared()
        x = torch.randn(5, 64)
        before, originals = module(x), dict(module.named_modules())
        undo = quantize_linears(module)
        assert isinstance(module.first, Int6Linear) and module.second is module.first
        assert isinstance(module.inner[0], Int6Linear) and isinstance(module.inner[2], Int6Linear)
        assert type(module.attention.out_proj) is type(originals["attention.out_proj"])
        after = module(x)
        assert 0 < (after - before).norm() < 0.1 * before.norm()
        undo()
        assert dict(module.named_modules()) == originals
        assert torch.equal(module(x), before)

    def test_keep_leaves_what_it_names(self):
        module = Shared()
        quantize_linears(module, keep=lambda name, linear: name == "inner.2")
        assert isinstance(module.inner[0], Int6Linear) and type(module.inner[2]) is nn.Linear

    def test_groups_reach_every_linear(self):
        module = nn.Sequential(nn.Linear(64, 16), nn.Linear(32, 16))
        quantize_linears(module, group_size=32)
        assert [tuple(layer.scale.shape) for layer in module] == [(16, 2), (16, 1)]

    def test_a_linear_alone_is_refused(self):
        with pytest.raises(ValueError, match="Int6Linear.from_linear"):
            quantize_linears(nn.Linear(4, 4))
