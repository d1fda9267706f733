"""The model that klora.lora adapts: with the rest of PyTorch, given back, merged, in six bits, and refused."""

import copy
import pickle

import pytest
import torch
from klora import KloraError
from klora.bench.tolerance import assert_as_exact
from klora.kernels import Int6Linear
from klora.lora import LoraError, attach
from tiny_lora import (
    ROWS,
    TOKENS,
    Tiny,
    adapters_on_one,
    assert_exact,
    assert_same_numbers,
    one_linear,
    parts,
    randomize,
    snapshot,
    two_adapters,
)
from torch import nn
from torch.nn.utils import prune

CUDA = torch.cuda.is_available()


class TestWithTheRestOfPyTorch:
    def test_checkpointing_outside_of_rows_is_refused_by_name(self):
        model = Tiny()
        lora = two_adapters(model)
        model.checkpointed = {"use_reentrant": False}
        with lora.rows(ROWS):
            loss = model(TOKENS).sum()
        with pytest.raises(LoraError, match=r"blocks.1.up is computed again by gradient checkpointing.*backward\(\)"):
            loss.backward()

    def test_checkpointing_within_other_rows_is_refused_by_name(self):
        model = Tiny()
        lora = two_adapters(model)
        model.checkpointed = {"use_reentrant": False}
        with lora.rows(ROWS):
            loss = model(TOKENS).sum()
        with pytest.raises(LoraError, match="outside of the `with lora.rows"), lora.rows(ROWS[::-1]):
            loss.backward()

    def test_checkpointing_of_the_base_model_works(self):
        model = Tiny()
        attach(model, slots=1, targets=["up"], freeze=False)
        model.checkpointed = {"use_reentrant": False}
        model(TOKENS).sum().backward()
        assert model.blocks[0].up.weight.grad is not None

    @pytest.mark.parametrize("options", [{}, {"dropout": 1e-9}, {"base": "int6"}])
    def test_autocast_casts_as_it_does_for_a_linear(self, options):
        model = nn.Sequential(nn.Linear(64, 32))
        weight, bias = model[0].weight.detach(), model[0].bias.detach()
        lora = attach(model, slots=1, targets=["0"], rank=4, alpha=2, **options)
        lora.adapters.create("one")
        randomize(lora)
        x = torch.randn(2, 5, 64)
        with torch.autocast("cpu", torch.bfloat16), lora.rows(["one", None]):
            out = model(x)
        assert out.dtype == torch.bfloat16
        a, b, scale = parts(lora, "one")["0"]
        if options.get("base") == "int6":
            weight = lora.sites[0].module.dequantize()
        exact = [nn.functional.linear(row.double(), weight.double(), bias.double()) for row in x]
        exact[0] += scale * x[0].double() @ a.double().mT @ b.double().mT
        with torch.autocast("cpu", torch.bfloat16):
            plain = [nn.functional.linear(row, weight, bias) for row in x]
            plain[0] = plain[0] + scale * (x[0] @ a.mT @ b.mT)
        assert_as_exact([out], [torch.stack(exact)], [torch.stack(plain)], margin=1.5)

    @pytest.mark.slow
    def test_compiled_whole(self):
        model = Tiny().double()
        lora = two_adapters(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_exact(model, lora, ROWS, TOKENS, run=compiled)
        with lora.rows(["small"] * 4):
            ours = compiled(TOKENS)
            torch.testing.assert_close(ours, model(TOKENS))
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
        with lora.rows(ROWS):
            assert not torch.allclose(compiled(TOKENS), ours, atol=1e-3)

    @pytest.mark.slow
    def test_other_rows_do_not_compile_again(self):
        model = Tiny()
        lora, compiles = two_adapters(model), []

        def backend(graph, _):
            compiles.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for rows in (ROWS, ROWS[::-1], torch.tensor([1, 1, 0, -1]), [None] * 4):
            with lora.rows(rows):
                assert torch.equal(compiled(TOKENS), model(TOKENS))
        assert len(compiles) == 1

    def test_another_default_device_and_dtype(self):
        model = Tiny()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                lora = two_adapters(model)
                optimizer = lora.optimizer(lr=0.1)
                with lora.rows(ROWS):
                    model(TOKENS).square().sum().backward()
                optimizer.step()
                optimizer.step(["big"])
        finally:
            torch.set_default_dtype(torch.float32)
        assert lora.pool.params.dtype == torch.float32 and optimizer.steps.tolist() == [2, 1, 0]

    def test_a_model_that_was_moved_is_refused(self):
        model = Tiny()
        lora = two_adapters(model)
        message = "blocks.0.up got meta and the adapters are on cpu; move the model, then attach"
        with pytest.raises(LoraError, match=message), lora.rows(ROWS):
            model.to("meta")(TOKENS.to("meta"))

    def test_a_linear_takes_its_input_by_name(self):
        model = one_linear()
        lora, x = adapters_on_one(model), torch.randn(2, 3, 16)
        with lora.rows(["big", "small"]):
            assert torch.equal(model.up(input=x), model.up(x))

    def test_hooks_are_called_around_the_adapted_linear(self):
        model = Tiny()
        lora, seen = two_adapters(model), []
        model.blocks[0].up.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with lora.rows(ROWS):
            model(TOKENS)
        base = nn.functional.linear(model.embed(TOKENS), model.blocks[0].up.weight, model.blocks[0].up.bias)
        assert len(seen) == 1 and not torch.allclose(seen[0], base, atol=1e-2)

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    def test_a_copy_is_a_copy(self, how):
        model = Tiny()
        lora = two_adapters(model)
        optimizer = lora.optimizer(lr=0.1)
        before = lora.pool.params.clone()
        other, its, adam = how((model, lora, optimizer))
        with its.rows(ROWS), lora.rows(ROWS):
            assert torch.equal(other(TOKENS), model(TOKENS))
            other(TOKENS).square().sum().backward()
        adam.step()
        assert torch.equal(lora.pool.params, before) and not lora.pool.grads.any()
        assert not torch.equal(its.pool.params, before) and adam.steps.tolist() == [1, 1, 0]
        its.adapters.reset("big")
        assert adam.steps.tolist() == [0, 1, 0]
        its.detach()
        assert "forward" in vars(model.blocks[0].up) and "forward" not in vars(other.blocks[0].up)
        assert not any(p.requires_grad for p in model.parameters()) and all(p.requires_grad for p in other.parameters())

    def test_state_dicts_and_parameters_are_the_models_own(self):
        model = Tiny()
        state, names = model.state_dict(), [name for name, _ in model.named_parameters()]
        two_adapters(model)
        assert [name for name, _ in model.named_parameters()] == names
        assert_same_numbers(model, state)

    def test_attached_in_inference_mode_it_trains(self):
        model = Tiny().double()
        with torch.inference_mode():
            lora = attach(model, slots=1, targets=["up"])
            lora.adapters.create("one")
            with lora.rows(["one"] * 4):
                model(TOKENS)
        randomize(lora)
        assert_exact(model, lora, ["one"] * 4, TOKENS)


class TestDetachAndMerge:
    @pytest.mark.parametrize("options", [{}, {"freeze": False}, {"dropout": 0.1}])
    def test_detach_gives_the_model_back_bit_for_bit(self, options):
        model = Tiny()
        model.head.requires_grad_(False)
        model.blocks[0].eval()
        model.blocks[1].up.register_forward_hook(lambda *_: None)
        before, numbers, logits = snapshot(model), copy.deepcopy(model.state_dict()), model(TOKENS)
        lora = two_adapters(model, **options)
        optimizer = lora.optimizer()
        with lora.rows(ROWS):
            model(TOKENS).sum().backward()
            optimizer.step()
            assert lora.detach() is model
            assert torch.equal(model(TOKENS), logits)
        assert snapshot(model) == before
        assert_same_numbers(model, numbers)
        lora.detach()
        with pytest.raises(LoraError, match="detached; attach again"), lora.rows(ROWS):
            pytest.fail("inside")
        two_adapters(model).detach()
        assert snapshot(model) == before

    @pytest.mark.parametrize("first", [0, 1])
    def test_two_pools_on_one_model_are_detached_in_either_order(self, first):
        model = Tiny()
        model.head.requires_grad_(False)
        before = snapshot(model)
        pools = [attach(model, slots=1, targets=[target]) for target in ("up", "down")]
        pools[first].detach()
        pools[1 - first].detach()
        assert snapshot(model) == before

    @pytest.mark.parametrize("name", ["big", "small"])
    def test_merge_leaves_the_adapter_in_the_weights(self, name):
        model = Tiny()
        before = snapshot(model)
        lora = two_adapters(model)
        with lora.rows([name] * 4):
            wanted = model(TOKENS)
        assert lora.merge(name) is model
        torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-5, atol=1e-5)
        assert snapshot(model) == before

    def test_a_detached_adapter_is_not_merged_and_that_is_said(self):
        model = Tiny()
        before, lora = copy.deepcopy(model.state_dict()), two_adapters(model)
        lora.detach()
        with pytest.raises(LoraError, match="the adapters are detached; attach again"):
            lora.merge("big")
        assert_same_numbers(model, before)

    def test_an_adapter_that_is_not_finite_is_not_merged(self):
        model = Tiny()
        lora = two_adapters(model)
        numbers = copy.deepcopy(model.state_dict())
        lora.pool.leaves[3][1].data[0, 0, 0] = torch.inf
        with pytest.raises(LoraError, match="'big' at blocks.1.down makes weights that are not finite; nothing was"):
            lora.merge("big")
        assert_same_numbers(model, numbers)
        assert len(lora.sites) == 4


class TestInt6:
    SIZES = {"width": 64, "hidden": 128}

    def test_it_is_the_oracle_over_the_weights_that_six_bits_hold(self):
        model, dense = one_linear(64, 128), one_linear(64, 128)
        lora = adapters_on_one(model, base="int6")
        assert type(model.up) is Int6Linear
        dense.up.weight.data = model.up.dequantize()
        assert_exact(dense, lora, ROWS, TOKENS, run=model)

    def test_detach_gives_the_dense_model_back(self):
        model = Tiny(**self.SIZES)
        before, numbers = snapshot(model), copy.deepcopy(model.state_dict())
        lora = two_adapters(model, base="int6")
        with pytest.raises(LoraError, match="cannot be copied"):
            copy.deepcopy(model)
        lora.detach()
        assert snapshot(model) == before
        assert_same_numbers(model, numbers)

    @pytest.mark.gpu
    @pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
    def test_on_a_gpu_the_dense_weights_wait_on_the_host(self):
        model = one_linear(256, 512).to("cuda", torch.bfloat16)
        linear, weight = model.up, model.up.weight.detach().clone()
        used = torch.cuda.memory_allocated()
        lora = attach(model, slots=1, rank={"up": 1}, base="int6")
        pool = sum(t.nbytes for t in (lora.pool.params, lora.pool.grads))
        assert torch.cuda.memory_allocated() - pool < used - weight.nbytes // 2
        assert linear.weight.device.type == "cpu"
        lora.detach()
        assert model.up is linear and torch.equal(linear.weight, weight)

    def test_merge_keeps_what_was_trained(self):
        model = Tiny(**self.SIZES)
        lora = two_adapters(model, base="int6")
        with lora.rows(["big"] * 4):
            wanted = model(TOKENS)
        merged = lora.merge("big")
        assert type(merged.blocks[0].up) is nn.Linear
        torch.testing.assert_close(merged(TOKENS), wanted, rtol=1e-4, atol=1e-4)

    def test_a_linear_that_stays_dense_is_named_and_the_model_left(self):
        model = Tiny()
        before, numbers = snapshot(model), copy.deepcopy(model.state_dict())
        with pytest.raises(LoraError, match="blocks.0.up stays dense: too small.*base='dense'"):
            attach(model, rank={"up": 2}, base="int6")
        assert snapshot(model) == before
        assert_same_numbers(model, numbers)

    def test_a_weight_that_six_bits_do_not_hold_is_named_and_the_model_left(self):
        model = Tiny(**self.SIZES)
        model.blocks[1].up.weight.data[3, 5] = torch.inf
        before, numbers = snapshot(model), copy.deepcopy(model.state_dict())
        with pytest.raises(LoraError, match="blocks.1.up: weight holds a NaN or an infinity.*base='dense'"):
            attach(model, rank={"up": 2}, base="int6")
        assert snapshot(model) == before
        assert_same_numbers(model, numbers)


def tied(model):
    model.head.weight = model.embed.weight


def same_memory(model):
    model.head.weight = nn.Parameter(model.embed.weight.detach())


def used_twice(model):
    model.blocks[1].up = model.blocks[0].up


def shared_block(model):
    model.blocks[1] = model.blocks[0]


def on_meta(model):
    model.to("meta")


def made_for_inference(model):
    with torch.inference_mode():
        model.blocks[0].up.weight = nn.Parameter(torch.zeros(32, 16), requires_grad=False)


def with_own_forward(model):
    model.blocks[0].up.forward = lambda x: x


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.blocks[0].up)


def pruned(model):
    prune.l1_unstructured(model.blocks[0].up, "weight", 0.5)


def with_attention(model):
    model.attention = nn.MultiheadAttention(16, 2)


def with_encoder(model):
    model.encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)


def half_on_meta(model):
    model.blocks[1].up.to("meta")


def untouched(model):
    pass


BAD = [
    (untouched, {"targets": ["q_proj"]}, "no module of this model is called 'q_proj'; its linears are: down, head, up"),
    (untouched, {"targets": ["up", "own"]}, "called 'own'"),
    (untouched, {"targets": []}, "targets is empty"),
    (untouched, {"targets": 3}, "targets names 3; wanted: text that is not empty, or a list of such names"),
    (untouched, {"targets": ["up", ""]}, "targets names ''"),
    (untouched, {"rank": {3: 2}}, "targets names 3"),
    (untouched, {"targets": "embed"}, "embed is a Embedding; adapters go on nn.Linear and Conv1D"),
    (untouched, {"targets": ["blocks.0"]}, "blocks.0 is a Block"),
    (untouched, {"targets": ["up"], "rank": 0}, "rank 0 of 'up'; wanted: a whole number of at least 1"),
    (untouched, {"targets": ["up", "down"], "rank": {"up": 3}}, "gives none for 'down'"),
    (untouched, {"targets": ["up"], "rank": {"up": 3, "down": 2}}, "rank names 'down'; allowed: up"),
    (untouched, {"targets": ["up"], "slots": 0}, "slots is 0"),
    (untouched, {"targets": ["up"], "slots": True}, "slots is True"),
    (untouched, {"targets": ["up"], "alpha": -1}, "alpha is -1"),
    (untouched, {"targets": ["up"], "dropout": 1.0}, "dropout is 1.0; allowed: from 0 to below 1"),
    (untouched, {"targets": ["up"], "dropout": "0.1"}, "dropout is '0.1'"),
    (untouched, {"targets": ["up"], "seed": "7"}, "seed is '7'; wanted: a whole number"),
    (untouched, {"targets": ["up"], "backend": "cudnn"}, "backend is 'cudnn'; allowed: None, 'reference', 'triton'"),
    (untouched, {"targets": ["up"], "base": "int4"}, "base is 'int4'; allowed: dense, bf16, int6"),
    (untouched, {"targets": ["up"], "base": "bf16"}, "blocks.0.up is torch.float32 and base='bf16'"),
    (tied, {"targets": ["head"]}, "the weight of head is tied to embed.weight; leave 'head' out of targets"),
    (same_memory, {"targets": ["head"]}, "the weight of head is tied to embed.weight"),
    (used_twice, {"targets": ["up"]}, "blocks.0.up and blocks.1.up are one module, used twice"),
    (shared_block, {"targets": ["up"]}, "blocks.0.up and blocks.1.up are one module, used twice"),
    (on_meta, {"targets": ["up"]}, "blocks.0.up is on 'meta', without numbers; load its weights first"),
    (half_on_meta, {"targets": ["up"]}, "blocks.1.up is on 'meta'"),
    (made_for_inference, {"targets": ["up"]}, "blocks.0.up was made in inference_mode"),
    (with_own_forward, {"targets": ["up"]}, "blocks.0.up has a forward of its own"),
    (two_adapters, {"targets": ["down"]}, r"blocks.0.down has a forward of its own: adapters .* \(detach\(\) them\)"),
    (parametrized, {"targets": ["up"]}, "blocks.0.up is a ParametrizedLinear"),
    (pruned, {"targets": ["up"]}, "blocks.0.up holds other than a floating-point weight and a bias"),
    (with_attention, {"targets": ["out_proj"]}, "attention.out_proj is a NonDynamicallyQuantizableLinear"),
    (with_encoder, {"targets": ["linear1"]}, "encoder.linear1 is read by TransformerEncoderLayer without its forward"),
]


@pytest.mark.parametrize(("change", "arguments", "message"), BAD, ids=[f"{c.__name__}-{m[:24]}" for c, _, m in BAD])
def test_a_model_that_cannot_be_is_named_and_left_as_it_was(change, arguments, message):
    model = Tiny()
    change(model)
    before = snapshot(model)
    with pytest.raises(LoraError, match=message) as error:
        attach(model, **arguments)
    assert isinstance(error.value, KloraError | ValueError)
    assert snapshot(model) == before


def test_what_is_no_model_is_named():
    with pytest.raises(LoraError, match="model is a dict; wanted: a torch.nn.Module"):
        attach({})
