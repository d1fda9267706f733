"""Models at six bits: the artifact straight into Int6Linear, the command line's --weights, any module's linears."""

import copy
import io
import json
import pickle
import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import SMALL, documents, randomized
from klora import KloraError
from klora.kernels.int6 import Int6Linear
from klora.model.artifact import load_artifact, save_artifact
from klora.model.config import ConfigError, ModelConfig
from klora.model.gpt import is_block_matrix
from klora.model.int6_file import load_quantized, save_quantized
from klora.model.int6_model import quantize_linears
from klora.model.loading import model_from_artifact
from klora.model.network import Adapters, BlockAdapters, Lora
from test_cli import klora
from test_int6_linear import layout_1
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

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
        assert not any(is_block_matrix(name) for name, _ in int6.named_parameters())
        assert sum(isinstance(module, Int6Linear) for module in int6.modules()) == 4 * len(int6.blocks)
        kept = {name for name, _ in dense.named_parameters() if not is_block_matrix(name)}
        assert {name for name, _ in int6.named_parameters()} == kept
        assert not any(tensor.is_meta for tensor in int6.state_dict().values())

    def test_decodes_over_a_cache(self, both):
        dense, int6 = both
        tokens = torch.randint(3, 300, (1, 12))
        whole = dense.logits(tokens)
        cache = int6.cache(batch=1, length=12)
        steps = [int6.logits(tokens[:, :5], cache), *(int6.logits(tokens[:, i : i + 1], cache) for i in range(5, 12))]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)

    def test_adapters_get_the_dense_model_s_gradients(self, both):
        config, tokens = both[0].config, torch.randint(3, 300, (2, 33))
        width, hidden = config.width, config.mlp_hidden
        pairs = [(2, 3, 4, width), (2, sum(config.qkv_sizes), 4), (2, 3, width), (2, width, 3)]
        pairs += [(2, 2, width), (2, hidden, 2), (2, 5, hidden), (2, width, 5)]
        shapes = [*pairs, (2, width)]
        leaves = [torch.randn(shape).mul_(0.1).requires_grad_() for _ in range(config.blocks) for shape in shapes]
        blocks = [leaves[i : i + 9] for i in range(0, len(leaves), 9)]
        adapters = Adapters(
            None, [BlockAdapters(*(Lora(*some[i : i + 2]) for i in range(0, 8, 2)), some[8]) for some in blocks]
        )
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

    @pytest.mark.slow
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
        self.inner = nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 16))
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

    @pytest.mark.parametrize("group_size", [16, 0, 64.0, True, "all"])
    def test_other_group_sizes_are_refused(self, group_size):
        with pytest.raises(ConfigError, match=f"group_size={group_size!r}; allowed: 32, 64, 128, None or 'auto'"):
            quantize_linears(nn.Sequential(nn.Linear(128, 8)), group_size)

    def test_groups_reach_every_linear(self):
        module = nn.Sequential(nn.Linear(64, 16), nn.Linear(32, 16))
        quantize_linears(module, group_size=32)
        assert [tuple(layer.scale.shape) for layer in module] == [(16, 2), (16, 1)]

    def test_groups_where_they_pay_and_the_report_says_so(self, tmp_path):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 512, bias=False), nn.Linear(512, 64))
        with torch.no_grad():
            module[3].weight[:, 7] *= 30
        dense, x = copy.deepcopy(module), torch.randn(16, 256)
        rows = quantize_linears(copy.deepcopy(module), None).swapped["3"]
        report = quantize_linears(module)
        assert {name: linear.group_size for name, linear in report.swapped.items()} == {"0": None, "2": None, "3": 64}
        one = report.swapped["3"]
        assert one.relative_error < 0.2 * rows.relative_error and one.bytes == rows.bytes + 2 * 64 * 7
        assert one.bytes == module[3].packed.nbytes + module[3].scale.nbytes
        assert "1 with a scale for every 64 inputs" in str(report).splitlines()
        assert "inputs" not in str(quantize_linears(copy.deepcopy(dense), None))
        save_quantized(module, tmp_path / "groups.safetensors")
        fresh = load_quantized(copy.deepcopy(dense), tmp_path / "groups.safetensors")
        assert torch.equal(fresh(x), module(x))
        with torch.device("meta"):
            fresh = copy.deepcopy(dense).to("meta")
        quantize_linears(fresh)
        fresh.load_state_dict(module.state_dict(), assign=True)
        assert fresh[3].weight.group_size == 64 and torch.equal(fresh(x), module(x))

    def test_a_linear_alone_is_refused(self):
        with pytest.raises(KloraError, match="Int6Linear.from_linear"):
            quantize_linears(nn.Linear(4, 4))

    def test_says_what_it_swapped_and_what_it_cost(self):
        torch.manual_seed(0)
        module = Shared()
        weight, x = module.inner[0].weight.detach().clone(), torch.randn(512, 32)
        report = quantize_linears(module)
        assert list(report.swapped) == ["first", "inner.0", "inner.2"] and report.swapped["first"].also == ("second",)
        assert list(report.skipped) == ["attention.out_proj"]
        assert "NonDynamicallyQuantizableLinear is a subclass" in report.skipped["attention.out_proj"]
        one = report.swapped["inner.0"]
        assert one.dense_bytes == 32 * 48 * 4 and one.bytes == 3 * 16 * 128 * 3 // 4 + 2 * 48
        found = (x @ (module.inner[0].dequantize() - weight).T).norm() / (x @ weight.T).norm()
        assert one.relative_error**0.5 == pytest.approx(float(found), rel=0.1)
        assert report.bytes == sum(linear.bytes for linear in report.swapped.values())
        assert min(s.relative_error for s in report.swapped.values()) <= report.relative_error < 0.002
        assert str(report).startswith("3 linears at six bits: 17,408 bytes -> ") and "skipped attention" in str(report)
        report()
        assert type(module.first) is nn.Linear, "the report may be called, as the undo that it was"

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (lambda: nn.Linear(64, 2), "too small: .2, 64. takes 512 bytes and 1,540"),
            (lambda: parametrizations.weight_norm(nn.Linear(64, 32)), "ParametrizedLinear is a subclass"),
            (lambda: prune.random_unstructured(nn.Linear(64, 32), "weight", 0.5), "more than a weight and a bias"),
            (lambda: type("Conv1D", (nn.Module,), {})(), "Conv1D holds its weight transposed"),
            (lambda: nn.Linear(64, 32, dtype=torch.complex64), "its weight is torch.complex64"),
            (lambda: nn.Linear(100, 64), "its 100 inputs are no multiple of group_size=64"),
            (lambda: nn.LazyLinear(3), "LazyLinear is a subclass"),
        ],
    )
    def test_what_is_left_says_why(self, make, why):
        module = nn.Sequential(make(), nn.Linear(128, 64))
        report = quantize_linears(module, group_size=64)
        assert list(report.swapped) == ["1"] and list(report.skipped) == ["0"]
        assert re.search(why, report.skipped["0"])
        assert not isinstance(module[0], Int6Linear)

    def test_a_forward_replaced_on_the_object_stays(self):
        module = nn.Sequential(nn.Linear(64, 32))
        plain = module[0].forward
        module[0].forward = lambda x: plain(x) + 1
        assert "its forward was replaced" in quantize_linears(module).skipped["0"]

    def test_tied_weights_stay_tied(self):
        module = nn.ModuleDict({"embed": nn.Embedding(64, 48), "body": nn.Linear(48, 48), "head": nn.Linear(48, 64)})
        module["head"].weight = module["embed"].weight
        report = quantize_linears(module)
        assert list(report.swapped) == ["body"] and report.skipped["head"] == "its weight is tied to embed.weight"
        assert module["head"].weight is module["embed"].weight

    def test_adapters_beside_frozen_linears_go_on_training(self):
        module = nn.Sequential(nn.Linear(128, 64).requires_grad_(False), nn.Linear(64, 64, bias=False))
        report = quantize_linears(module)
        assert list(report.swapped) == ["0"] and "trained while others are frozen" in report.skipped["1"]
        assert not module[0].bias.requires_grad and module[1].weight.requires_grad

    def test_a_weight_that_is_not_finite_is_named_and_nothing_is_swapped(self):
        module = nn.Sequential(nn.Linear(64, 32), nn.Sequential(nn.Linear(64, 32)))
        module[1][0].weight.data[3, 4] = torch.nan
        with pytest.raises(KloraError, match=r"1\.0: weight holds a NaN"):
            quantize_linears(module)
        assert type(module[0]) is nn.Linear

    def test_second_moments_reach_their_linears(self):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
        module[0].weight.data[:, 5] *= 100
        moment = torch.ones(64)
        moment[5] = 0
        plain = quantize_linears(module)
        plain.undo()
        aware = quantize_linears(module, second_moments={"0": moment})
        assert aware.swapped["0"].relative_error < 0.3 * plain.swapped["0"].relative_error
        assert aware.swapped["1"].relative_error == plain.swapped["1"].relative_error
        with pytest.raises(KloraError, match="second_moments names 'one', which is no linear"):
            quantize_linears(Shared(), second_moments={"one": moment})

    def test_a_fixed_clip_is_what_it_was(self):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 32))
        rms = module[0].weight.detach().square().mean(1).sqrt()
        quantize_linears(module, clip=0.11)
        assert torch.equal(module[0].scale, (0.11 * rms).half())


class TestStandsInForALinear:
    """Whatever held for the linear before the swap holds after it."""

    def test_hooks_go_on_and_their_handles_too(self):
        module, calls = nn.Sequential(nn.Linear(64, 32)), []
        linear = module[0]
        handles = [
            linear.register_forward_hook(lambda m, args, out: calls.append(("forward", type(m))) or out + 1),
            linear.register_forward_pre_hook(lambda m, args, kwargs: calls.append(("pre", type(m))), with_kwargs=True),
            linear.register_full_backward_hook(lambda m, dx, dout: calls.append(("backward", type(m)))),
            linear.register_full_backward_pre_hook(lambda m, dout: calls.append(("backward pre", type(m)))),
        ]
        report, x = quantize_linears(module), torch.randn(2, 64, requires_grad=True)
        out = module(x)
        assert torch.equal(out, F.linear(x, module[0].dequantize(), linear.bias) + 1)
        out.sum().backward()
        assert calls == [(kind, Int6Linear) for kind in ("pre", "forward", "backward pre", "backward")]
        handles[0].remove()
        late = module[0].register_forward_hook(lambda m, args, out: calls.append("late"))
        calls.clear()
        module(x)
        assert calls == [("pre", Int6Linear), "late"]
        report.undo()
        late.remove()
        calls.clear()
        module(x)
        assert calls == [("pre", nn.Linear)]

    @pytest.mark.parametrize("training", [True, False])
    def test_mode(self, training):
        module = nn.Sequential(nn.Linear(64, 32)).train(training)
        report = quantize_linears(module)
        assert module[0].training is training
        module.train(not training)
        report.undo()
        assert module[0].training is not training

    def test_the_optimizer_knows_the_bias(self):
        module = nn.Sequential(nn.Linear(64, 32))
        bias = module[0].bias
        optimizer = torch.optim.SGD([bias], lr=1.0)
        report = quantize_linears(module)
        assert module[0].bias is bias
        module(torch.randn(2, 64)).sum().backward()
        optimizer.step()
        after = module(torch.zeros(1, 64))[0].detach()
        assert torch.equal(after, bias.detach())
        report.undo()
        assert module[0].bias is bias and torch.equal(module(torch.zeros(1, 64))[0], after)

    def test_weight_says_device_dtype_and_shape(self):
        module = nn.Sequential(nn.Linear(64, 32)).bfloat16()
        quantize_linears(module)
        weight = module[0].weight
        assert (weight.device, weight.dtype, weight.requires_grad) == (CPU, torch.bfloat16, False)
        assert tuple(weight.shape) == (32, 64) and weight.size(1) == 64 and weight.numel() == 2048 and weight.dim() == 2
        assert module.half()[0].weight.dtype == torch.float16 and copy.deepcopy(module)[0].weight.dtype == torch.float16

    def test_a_model_that_reads_the_weight_itself(self):
        module, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(2, 64)
        quantize_linears(module)
        weight, bias = module[0].weight, module[0].bias
        assert torch.equal(F.linear(x, weight, bias), module(x))
        assert torch.equal(F.linear(input=x, weight=weight, bias=bias), module(x))
        for wrong in (lambda: x @ weight, lambda: torch.matmul(x, weight), lambda: F.bilinear(x, x, weight)):
            with pytest.raises(TypeError, match="packed at six bits. Call the module or F.linear"):
                wrong()
        for wrong in (lambda: x @ weight.T, lambda: weight.data.zero_(), lambda: weight.to(torch.float16)):
            with pytest.raises(AttributeError, match="has no '(T|data|to)': it is packed at six bits"):
                wrong()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("grad", [True, False])
    def test_transformer_encoder(self, training, grad):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).train(training)
        x, mask = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        exact = encoder(x, src_key_padding_mask=mask)
        report = quantize_linears(encoder)
        assert len(report.swapped) == 4 and len(report.skipped) == 2
        with torch.set_grad_enabled(grad):
            out = encoder(x, src_key_padding_mask=mask)
        live = ~mask
        assert 0 < (out - exact)[live].norm() < 0.05 * exact[live].norm()
        report.undo()
        assert torch.equal(encoder(x, src_key_padding_mask=mask), exact)

    def test_transformer_decoder_and_attention(self):
        model = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
        x, memory = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
        exact = model(x, memory)
        quantize_linears(model)
        assert (model(x, memory) - exact).norm() < 0.05 * exact.norm()

    def test_copies(self):
        torch.manual_seed(0)
        module, x = Shared(), torch.randn(3, 64)
        module.first.weight.data[2] *= 1e-9  # its scales are fp32
        quantize_linears(module)
        assert module.first.scale.dtype == torch.float32
        wanted, stream = module(x), io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            assert copied.first is copied.second and torch.equal(copied(x), wanted)
            assert copied.first.bias is not module.first.bias
        fresh = Shared()
        quantize_linears(fresh)
        fresh.load_state_dict(module.state_dict(), strict=True)
        assert torch.equal(fresh(x), wanted)
        half = copy.deepcopy(module).half()
        assert half.first.scale.dtype == torch.float32 and half.first.bias.dtype == torch.float16
        assert half.first(x.half()).dtype == torch.float16

    def test_dense_weights_are_not_loaded_into_six_bits_silently(self):
        module = nn.Sequential(nn.Linear(64, 32))
        dense = copy.deepcopy(module.state_dict())
        quantize_linears(module)
        with pytest.raises(ValueError, match=r"0\.weight is a dense weight .* load the dense weights first"):
            module.load_state_dict(dense, strict=False)

    def test_undo_follows_the_model(self):
        module = nn.Sequential(nn.Linear(64, 32))
        report = quantize_linears(module)
        module.double()
        report.undo()
        assert module(torch.randn(2, 64).double()).dtype == torch.float64

    def test_requires_grad_and_checkpointing(self):
        module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        quantize_linears(module)
        x = torch.randn(2, 64, requires_grad=True)
        checkpoint(module, x, use_reentrant=False).sum().backward()
        again = x.grad.clone()
        x.grad = None
        module.requires_grad_(False)(x).sum().backward()
        assert torch.equal(x.grad, again) and module[0].bias.grad is not None

    def test_autocast_casts_as_a_linear_does(self):
        module, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(2, 64)
        quantize_linears(module)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        assert module(x).dtype == torch.float32

    @pytest.mark.slow
    def test_compiles_whole(self):
        module, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48)), torch.randn(2, 64)
        quantize_linears(module)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))

    def test_made_in_inference_mode_it_trains(self):
        module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
        with torch.inference_mode():
            quantize_linears(module)
        x = torch.randn(2, 64, requires_grad=True)
        module(x).sum().backward()
        assert x.grad.any() and module[1].bias.grad.any()


class PretrainedFake(nn.Module):
    """As a Hugging Face model: tied embedding and head, and files that are read without complaint about what lacks."""

    def __init__(self, tie=True):
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.body = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128, bias=False)])
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 64, bias=False)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for linear in self.body:
            x = x + linear(x).relu()
        return self.head(self.norm(x))

    def save_pretrained(self, folder):
        state = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(state, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder):
        model = cls()
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=False)
        return model


class TestFiles:
    def test_save_pretrained_refuses_until_the_undo(self, tmp_path):
        model = PretrainedFake()
        report = quantize_linears(model)
        for saved in (model, copy.deepcopy(model)):
            with pytest.raises(RuntimeError, match="random weights without an error; use klora's save_quantized"):
                saved.save_pretrained(tmp_path)
        report.undo()
        model.save_pretrained(tmp_path)
        tokens = torch.arange(8)[None]
        assert torch.equal(PretrainedFake.from_pretrained(tmp_path)(tokens), model(tokens))

    def test_adapters_of_a_wrapper_are_saved_as_ever(self, tmp_path):
        wrapper = type("PeftModel", (nn.Module,), {"save_pretrained": lambda self, folder: "adapters"})()
        wrapper.base = PretrainedFake()
        quantize_linears(wrapper)
        assert wrapper.save_pretrained(tmp_path) == "adapters"
        with pytest.raises(RuntimeError, match="save_quantized"):
            wrapper.base.save_pretrained(tmp_path)

    @pytest.mark.parametrize("group_size", [None, 32])
    def test_round_trip(self, tmp_path, group_size):
        torch.manual_seed(0)
        model, tokens = Shared(), torch.randn(3, 64)
        model.first.weight.data[2] *= 1e-9
        quantize_linears(model, group_size)
        save_quantized(model, tmp_path / "model.safetensors")
        fresh = Shared().eval()
        assert load_quantized(fresh, tmp_path / "model.safetensors") is fresh
        assert torch.equal(fresh(tokens), model(tokens)) and fresh.first is fresh.second
        assert not fresh.first.training and fresh.state_dict().keys() == model.state_dict().keys()
        again = load_quantized(copy.deepcopy(model), tmp_path / "model.safetensors")
        assert torch.equal(again(tokens), model(tokens))

    def test_a_file_of_layout_1_is_read(self, tmp_path):
        """As klora wrote it while every number of inputs was padded to a multiple of 128."""
        model, path, x = Shared(), tmp_path / "m.safetensors", torch.randn(3, 64)
        quantize_linears(model)
        save_quantized(model, path)
        with safetensors.safe_open(path, framework="pt") as file:
            about, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, module in model.named_modules():
            if isinstance(module, Int6Linear):
                state |= {f"{name}.packed": layout_1(module.matrix.codes()), f"{name}.layout": torch.tensor(1)}
        safetensors.torch.save_file(state, path, about)
        fresh = load_quantized(Shared(), path)
        assert torch.equal(fresh(x), model(x)) and fresh.first is fresh.second
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
        state["inner.0.packed"] = state["inner.0.packed"][:, :, :2].clone()
        safetensors.torch.save_file(state, path, about)
        with pytest.raises(KloraError, match=r"inner.0.packed is \[.*, 2, 32, 4\]; this module takes"):
            load_quantized(Shared(), path)
        del state["inner.0.scale"]
        state["inner.0.layout"] = torch.ones(2)
        safetensors.torch.save_file(state, path, about)
        with pytest.raises(KloraError, match=r"inner.0.layout is \[2\]; this module takes \[\]"):
            load_quantized(Shared(), path)

    @pytest.mark.parametrize("tie", [True, False])
    def test_tied_weights_and_dtypes(self, tmp_path, tie):
        model, tokens = PretrainedFake(tie).bfloat16(), torch.arange(8)[None]
        quantize_linears(model)
        save_quantized(model, tmp_path / "m.safetensors")
        fresh = load_quantized(PretrainedFake(tie), tmp_path / "m.safetensors")
        assert torch.equal(fresh(tokens), model(tokens)) and fresh.body[0].weight.dtype == torch.bfloat16
        assert fresh.head.weight is fresh.embed.weight if tie else isinstance(fresh.head, Int6Linear)
        with pytest.raises(RuntimeError, match="save_quantized"):
            fresh.save_pretrained(tmp_path)

    def test_onto_a_model_on_meta(self, tmp_path):
        model, x = Shared(), torch.randn(3, 64)
        quantize_linears(model)
        save_quantized(model, tmp_path / "m.safetensors")
        with torch.device("meta"):
            fresh = Shared()
        load_quantized(fresh, tmp_path / "m.safetensors")
        assert torch.equal(fresh(x), model(x)) and fresh.first.weight.device == CPU
        with torch.device("meta"):
            fresh = PretrainedFake()
        with pytest.raises(KloraError, match="angles is on 'meta' and in no file"):
            load_quantized(fresh, tmp_path / "m.safetensors")

    def test_quantised_on_meta_and_then_loaded(self):
        model, x = Shared(), torch.randn(3, 64)
        quantize_linears(model)
        with torch.device("meta"):
            fresh = Shared()
        report = quantize_linears(fresh)
        assert report.swapped["first"].relative_error is None and fresh.first.packed.is_meta
        assert fresh.first.weight.device == torch.device("meta")
        fresh.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(fresh(x), model(x))

    def test_other_files_and_modules_are_refused_unchanged(self, tmp_path):
        model, path = Shared(), tmp_path / "m.safetensors"
        with pytest.raises(KloraError, match="holds no Int6Linear"):
            save_quantized(model, path)
        safetensors.torch.save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(KloraError, match="is no file of save_quantized"):
            load_quantized(model, path)
        path.write_bytes(b"nothing")
        for wrong in (path, tmp_path / "absent"):
            with pytest.raises(KloraError, match="cannot be read"):
                load_quantized(model, wrong)
        quantize_linears(model)
        save_quantized(model, path)
        other = Shared()
        other.inner[0] = nn.Linear(32, 40, bias=False)
        with pytest.raises(KloraError, match=r"inner\.0\.(packed|scale) is \[.*\]; this module takes"):
            load_quantized(other, path)
        assert type(other.first) is nn.Linear
        other.inner[0] = nn.Identity()
        with pytest.raises(KloraError, match=r"inner\.0 is at six bits there and Identity here"):
            load_quantized(other, path)

    def test_a_real_hugging_face_model(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
        )
        model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.arange(8)[None]
        quantize_linears(model)
        with pytest.raises(RuntimeError, match="save_quantized"):
            model.save_pretrained(tmp_path)
        save_quantized(model, tmp_path / "m.safetensors")
        fresh = load_quantized(transformers.LlamaForCausalLM(config).eval(), tmp_path / "m.safetensors")
        assert torch.equal(fresh(tokens).logits, model(tokens).logits)
