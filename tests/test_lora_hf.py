"""klora.lora on Hugging Face's models: against the oracle, and against PEFT in both directions."""

import contextlib
import copy
import inspect
import json
import re

import klora.lora
import klora.lora.mlp as mlps
import pytest
import torch
from klora.bench.tolerance import relative_error
from klora.lora import LoraError, attach
from oracles.adapted import adapted_rows
from tiny_lora import assert_exact, assert_same_numbers, parts, randomize, snapshot

transformers = pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")
peft = pytest.importorskip("peft", reason="pip install -e '.[test]' brings peft")

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
DROPS = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "Llama": (SIZES | HEADS | IDS, LINEARS),
    "Qwen2": (SIZES | IDS | {"num_attention_heads": 4, "num_key_value_heads": 2}, LINEARS),
    "Mistral": (SIZES | HEADS | IDS, LINEARS),
    "Gemma": (SIZES | HEADS | IDS, LINEARS),
    "GPT2": (GPT2 | DROPS | {"bos_token_id": 0, "eos_token_id": 1}, ("c_attn", "c_proj", "c_fc")),
}
TOKENS = torch.randint(96, (4, 6), generator=torch.Generator().manual_seed(0))
families = pytest.mark.parametrize("family", FAMILIES)


def build(family: str = "Llama", dtype: torch.dtype = torch.float32, **more):
    """A tiny model with random weights, the same at every call."""
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family][0] | more)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def two_adapters(model, targets, rank: int = 6, **options):
    """ "wide" on all targets, "narrow" on the first alone, with other ranks and alphas."""
    lora = attach(model, slots=3, targets=targets, rank=rank, **options)
    lora.adapters.create("wide", rank={target: 2 + i % 4 for i, target in enumerate(targets)}, alpha=5)
    lora.adapters.create("narrow", rank=3, alpha=0.75, targets=targets[:1])
    randomize(lora)
    return lora


@families
def test_mixed_adapters_are_those_of_the_oracle(family):
    model = build(family, torch.float64)
    lora = two_adapters(model, FAMILIES[family][1])
    assert_exact(model, lora, ["wide", None, "narrow", "wide"], TOKENS)


def usage_lines() -> list:
    """What is exported, and the public methods of its classes that a user calls."""
    public = {name: getattr(klora.lora, name) for name in klora.lora.__all__}
    methods = {
        f"{name}.{attribute}": value
        for name, thing in public.items()
        if isinstance(thing, type)
        for attribute, value in vars(thing).items()
        if not attribute.startswith("_") and inspect.isfunction(value)
    }
    called_by_the_package = ("Adapters.slot_of", "LoraAdam.clear")
    return [
        pytest.param(name, thing, id=name)
        for name, thing in (public | methods).items()
        if name not in called_by_the_package
    ]


@pytest.mark.parametrize(("name", "thing"), usage_lines())
def test_every_name_has_a_usage_line_that_runs_as_it_is_printed(name, thing, tmp_path, monkeypatch):
    (line,) = re.findall(r"^ *Example: (.+)$", thing.__doc__, re.M)
    assert name.rpartition(".")[2] in line
    monkeypatch.chdir(tmp_path)
    model, names = build(), {name: getattr(klora.lora, name) for name in klora.lora.__all__}
    if name not in ("attach", "Lora", "LoraError"):
        lora = attach(model, slots=4, targets=("q_proj", "v_proj"))
        for adapter in ("alice", "bob"):
            lora.adapters.create(adapter)
        names |= {"lora": lora, "optimizer": lora.optimizer()}
        lora.adapters.save("alice", "alice-lora")
        torch.save(names["optimizer"].state_dict(), "adam.pt")
    if name == "Attention.detach":
        names["attention"] = klora.lora.set_attention(model)
    exec(line, names | {"model": model, "tokens": TOKENS[:2], "torch": torch, "contextlib": contextlib})


@families
def test_detach_gives_the_model_back(family):
    model = build(family)
    before, numbers = snapshot(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = two_adapters(model, FAMILIES[family][1])
    with lora.rows(["wide"] * 4):
        model(TOKENS, labels=TOKENS).loss.backward()
    lora.detach()
    assert snapshot(model) == before
    assert_same_numbers(model, numbers)


@families
def test_merge(family):
    model = build(family)
    lora = two_adapters(model, FAMILIES[family][1])
    with lora.rows(["wide"] * 4), torch.no_grad():
        wanted = model(TOKENS).logits
    torch.testing.assert_close(lora.merge("wide")(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def assert_equal_to_peft(family, lora, name, folder) -> None:
    """The adapter gives in our model, in PEFT's (which reads the folder) and in the oracle the same logits.

    In float64, but for our scales and for RMS norms, which Hugging Face computes in fp32.
    """
    with lora.rows([name] * len(TOKENS)):
        ours = lora.model(TOKENS).logits
    exact, _ = adapted_rows(build(family), [parts(lora, name)] * len(TOKENS), TOKENS)
    theirs = peft.PeftModel.from_pretrained(build(family, torch.float64), folder).double()(TOKENS).logits
    assert relative_error(ours, exact) < 1e-6 and relative_error(theirs, exact) < 1e-6


@families
@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_peft_reads_what_we_save(family, name, tmp_path):
    lora = two_adapters(build(family, torch.float64), FAMILIES[family][1])
    lora.adapters.save(name, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is (family == "GPT2")
    assert_equal_to_peft(family, lora, name, tmp_path)


CONFIGS = {
    "plain": {},
    "patterns": {"rank_pattern": {"{last}": 2}, "alpha_pattern": {"{last}": 9, "0.{nested}": 1}},
    "stabilised": {"use_rslora": True},
    "one layer": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.1\..*\.({all})"},
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("Llama", "GPT2"))) for name in FAMILIES]
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_we_read_what_peft_saves(family, kind, tmp_path):
    targets = FAMILIES[family][1]
    names = {"last": targets[-1], "nested": "mlp." + targets[-1], "all": "|".join(targets)}

    def filled(value):
        if isinstance(value, dict):
            return {filled(key): number for key, number in value.items()}
        for name, text in names.items():
            value = value.replace("{" + name + "}", text) if isinstance(value, str) else value
        return value

    options = {"target_modules": list(targets)} | {name: filled(value) for name, value in CONFIGS[kind].items()}
    theirs = peft.get_peft_model(
        build(family),
        peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, fan_in_fan_out=family == "GPT2", **options),
    )
    theirs.save_pretrained(tmp_path)
    lora = attach(build(family, torch.float64), slots=2, targets=targets, rank=5)
    lora.adapters.load("theirs", tmp_path)
    assert_equal_to_peft(family, lora, "theirs", tmp_path)
    lora.adapters.save("theirs", tmp_path / "again")
    assert_equal_to_peft(family, lora, "theirs", tmp_path / "again")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_size": 64}, r"A \[4, 64\] and B .* of model.layers.0.self_attn.q_proj"),
        ({"num_hidden_layers": 3}, "has an adapter of model.layers.2.self_attn.[qv]_proj, .*another model"),
        ({"num_hidden_layers": 1}, "nothing for model.layers.1.self_attn.q_proj, .*another model"),
    ],
)
def test_a_peft_file_of_another_model_is_refused(more, message, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(build(**more), config).save_pretrained(tmp_path)
    lora = attach(build(), slots=1)
    with pytest.raises(LoraError, match=message):
        lora.adapters.load("theirs", tmp_path)
    assert not len(lora.adapters) and not lora.pool.params.any()


def test_a_model_that_peft_has_wrapped_is_refused():
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LoraError, match=r"q_proj is a peft\..*\.Linear; adapters go on nn.Linear and Conv1D"):
        attach(model, targets=["q_proj"])


def test_a_tied_head_is_refused():
    with pytest.raises(LoraError, match="the weight of lm_head is tied to model.embed_tokens.weight"):
        attach(build(tie_word_embeddings=True), targets=["lm_head"])


def test_conv1d_at_six_bits_is_refused():
    with pytest.raises(
        LoraError, match="transformer.h.0.attn.c_attn stays dense: a Conv1D holds its weight transposed"
    ):
        attach(build("GPT2"), targets=["c_attn"], base="int6")


def test_int6_trains_on_a_llama_and_refuses_to_be_saved_by_it(tmp_path):
    model = build(hidden_size=64, intermediate_size=64)
    lora = attach(model, slots=1, rank=4, base="int6")
    lora.adapters.create("one")
    optimizer = lora.optimizer(lr=0.05)
    losses = []
    for _ in range(8):
        with lora.rows(["one"] * 4):
            loss = model(TOKENS, labels=TOKENS).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(RuntimeError, match="six bits"):
        model.save_pretrained(tmp_path)
    lora.detach().save_pretrained(tmp_path)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = two_adapters(model, LINEARS, dropout=0.2)
        with lora.rows(["wide", None, "narrow", "wide"]):
            model(TOKENS, labels=TOKENS).loss.backward()
        grads.append(lora.pool.grads)
    assert torch.equal(*grads) and grads[0][:2].any(1).all()


def test_generation_with_a_cache_uses_each_rows_adapter():
    model = build().eval()
    lora = two_adapters(model, LINEARS)
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    mask = torch.ones(2, 6, dtype=torch.long)
    with lora.rows(["wide", "narrow"]):
        both = model.generate(TOKENS[:2], attention_mask=mask, **options)
        with pytest.raises(LoraError, match=r"batch of 4 and rows\(\) named 2.*generate\(\) repeats"):
            model.generate(TOKENS[:2], attention_mask=mask, num_beams=2, **options)
    for name, prompt, line in zip(("wide", "narrow"), TOKENS, both, strict=False):
        with lora.rows([name]):
            assert torch.equal(model.generate(prompt[None], attention_mask=mask[:1], **options)[0], line)


def test_saving_the_model_writes_the_base_model(tmp_path):
    model = build()
    lora = two_adapters(model, LINEARS)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, lora.detach()(TOKENS).logits)


def test_the_config_names_the_base_model(tmp_path):
    model = build()
    model.config.name_or_path = "somebody/some-model"
    two_adapters(model, LINEARS).adapters.save("narrow", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/some-model" and config["target_modules"] == ["q_proj"]


class TestOneLaunchForOneInput:
    """q, k and v, and gate and up, stacked where the kernel can."""

    OPS = ("lora_qkv", "lora_linear", "lora_linears", "lora_swiglu_mlp")

    def gradients(self, model, lora, rows):
        with lora.rows(rows):
            loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        found = lora.pool.grads.clone()
        lora.pool.grads.zero_()
        return loss.detach(), found

    def compiled(self, model, monkeypatch):
        """The layers of `model` compiled, and a list that gets the ops of ours in each graph."""
        found = []

        def backend(graph, inputs):
            nodes = [str(node.target) for node in graph.graph.nodes]
            found.append([sum(f"klora.{name}.default" in node for node in nodes) for name in self.OPS])
            return graph.forward

        torch.compiler.reset()
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
        return found

    @pytest.mark.slow
    def test_in_a_compiled_layer(self, monkeypatch):
        model = build(num_hidden_layers=3)
        lora = two_adapters(model, LINEARS, backend="triton")
        rows = ["wide", None, "narrow", "wide"]
        plain = self.gradients(model, lora, rows)
        ops = self.compiled(model, monkeypatch)
        ours = self.gradients(model, lora, rows)
        assert ops == [[1, 1, 0, 1], [1, 1, 0, 1]], "one graph for the first layer and one for all others"
        assert all(torch.equal(*pair) for pair in zip(ours, plain, strict=True))
        assert not any(site.shared.traced_outputs for site in lora.sites if site.shared)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
    def test_in_a_compiled_layer_on_a_gpu(self, monkeypatch):
        """Where PyTorch often is another one: what it cannot trace must not send a layer to the single ops."""
        model = build(num_hidden_layers=3).to("cuda", torch.bfloat16)
        lora = two_adapters(model, LINEARS)
        ops = self.compiled(model, monkeypatch)
        with lora.rows(["wide", None, "narrow", "wide"]):
            model(TOKENS.cuda(), use_cache=False).logits.float().sum().backward()
        assert ops == [[1, 1, 0, 1], [1, 1, 0, 1]] and lora.pool.grads[:2].any(1).all()

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{"slots": 65}, {"rank": 17}, {"dropout": 0.1}])
    def test_else_each_is_a_call_of_its_own(self, options, monkeypatch):
        model = build()
        lora = attach(model, **{"slots": 4, "targets": LINEARS, "rank": 8, "backend": "triton"} | options)
        lora.adapters.create("one")
        randomize(lora)
        model.train("dropout" in options)
        ops = self.compiled(model, monkeypatch)
        self.gradients(model, lora, ["one", None, "one", None])
        assert {tuple(graph) for graph in ops} in ({(0, 7, 0, 0)}, {(0, 0, 7, 0)})

    @pytest.mark.slow
    def test_another_input_has_its_own_outputs(self, monkeypatch):
        class Crossed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.q_proj, self.k_proj = (torch.nn.Linear(32, 16, bias=False) for _ in range(2))

            def forward(self, x):
                return self.q_proj(x), self.k_proj(x * 2)

        model, x = torch.nn.Sequential(Crossed()), torch.randn(2, 5, 32)
        lora = attach(model, slots=2, targets=("q_proj", "k_proj"), rank=4, backend="triton")
        lora.adapters.create("one")
        randomize(lora)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            with lora.rows(["one", None]):
                for ours, plain in zip(compiled(x), model(x), strict=True):
                    torch.testing.assert_close(ours, plain)
            assert not lora.sites[0].shared.is_one and not lora.sites[0].shared.traced_outputs


class TestMlp:
    """The MLP is one op where all of it fits; else it is what it was."""

    ROWS = ("wide", None, "narrow", "wide")

    @pytest.fixture
    def calls(self, monkeypatch):
        """Gets the input of each MLP that is one op."""
        found, compute = [], mlps.adapted_mlp
        monkeypatch.setattr(mlps, "adapted_mlp", lambda x, *given: found.append(x) or compute(x, *given))
        return found

    @staticmethod
    def attached(model, **options):
        lora = attach(model, **{"slots": 3, "targets": LINEARS, "rank": 6, "backend": "triton"} | options)
        lora.adapters.create("wide", alpha=5)
        lora.adapters.create("narrow", rank=3, alpha=0.75, targets=("up_proj", "down_proj"))
        randomize(lora)
        return lora

    def results(self, family="Llama", **options):
        """Logits and the gradients of all adapters."""
        model = build(family)
        lora = self.attached(model, **options)
        with lora.rows(self.ROWS):
            logits = model(TOKENS, use_cache=False).logits
            logits.square().mean().backward()
        return logits.detach(), lora.pool.grads

    @pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
    def test_it_is_the_same_function(self, family, calls, monkeypatch):
        monkeypatch.setitem(FAMILIES, "Qwen3", (SIZES | HEADS | IDS, LINEARS))
        ours = self.results(family)
        assert len(calls) == SIZES["num_hidden_layers"]
        for one, other in zip(ours, self.results(family, backend="reference"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert len(calls) == SIZES["num_hidden_layers"] and ours[1][:2].any(1).all() and not ours[1][2].any()

    @pytest.mark.parametrize(
        "options",
        [
            {"slots": 65},
            {"rank": 17},
            {"dropout": 0.1},
            {"freeze": False},
            {"base": "int6"},
            {"targets": ("up_proj", "down_proj")},
            {"rank": {"gate_proj": 6, "up_proj": 5, "down_proj": 6}},
            {"family": "Gemma"},
        ],
    )
    def test_else_each_linear_is_a_call_of_its_own(self, options, calls):
        more = {"targets": tuple(options["rank"])} if isinstance(options.get("rank"), dict) else {}
        ours = self.results(**options, **more)
        assert not calls and ours[0].isfinite().all()

    def test_nor_where_linears_are_not_stacked_or_something_else_is_in_their_place(self, calls):
        models = [build() for _ in range(6)]
        own, tanh, other, biased, trained = (model.model.layers[0].mlp for model in models[:5])
        own.forward = type(own).forward.__get__(own)
        tanh.act_fn = torch.nn.Tanh()
        other.__class__ = type("OwnMLP", (type(other),), {})
        biased.down_proj.bias = torch.nn.Parameter(torch.zeros(32))
        for model in models:
            lora = self.attached(model)
            lora.stacks = model is not models[5]
            trained.down_proj.weight.requires_grad_(model is models[4])
            calls.clear()
            with lora.rows(self.ROWS):
                model(TOKENS)
            assert len(calls) == (0 if model is models[5] else 1), "the second layer alone"

    @pytest.mark.parametrize("part", ["gate_proj", "down_proj", "act_fn"])
    @pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
    def test_a_hook_sees_what_it_listens_to(self, part, kind, calls):
        model, seen = build(num_hidden_layers=1), []
        lora = self.attached(model)
        module = getattr(model.model.layers[0].mlp, part)
        handle = getattr(module, f"register_{kind}_hook")(lambda module, *given: seen.append(module))
        for heard in (1, 0):
            with lora.rows(self.ROWS):
                model(TOKENS).logits.sum().backward()
            assert len(seen) == heard and len(calls) == 1 - heard
            handle.remove()
            seen.clear()

    def test_a_hook_on_every_module_sees_it_too(self, calls):
        model, seen = build(num_hidden_layers=1), []
        lora = self.attached(model)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *given: seen.append(module))
        try:
            with lora.rows(self.ROWS):
                model(TOKENS)
        finally:
            handle.remove()
        assert model.model.layers[0].mlp.up_proj in seen and not calls

    @staticmethod
    def doubled(part):
        """Its forward is another now."""
        forward = part.forward
        part.forward = lambda x: 2 * forward(x)

    @pytest.mark.parametrize(
        "change",
        [
            lambda mlp: TestMlp.doubled(mlp.gate_proj),
            lambda mlp: TestMlp.doubled(mlp.act_fn),
            lambda mlp: setattr(mlp, "act_fn", torch.nn.Tanh()),
            lambda mlp: setattr(mlp, "down_proj", torch.nn.Linear(48, 32)),
        ],
    )
    def test_a_part_that_is_another_since_is_called(self, change, calls):
        mlp, x = build().model.layers[0].mlp, torch.randn(4, 6, 32)
        lora = self.attached(torch.nn.ModuleDict({"mlp": mlp}), targets=LINEARS[-3:])
        change(mlp)
        with lora.rows(self.ROWS), torch.no_grad():
            assert torch.equal(mlp(x), type(mlp).forward(mlp, x)) and not calls

    @pytest.mark.parametrize("is_before", [True, False])
    def test_so_is_another_forward_of_its_class(self, is_before, calls, monkeypatch):
        mlp, x = build().model.layers[0].mlp, torch.randn(4, 6, 32)
        with monkeypatch.context() as patch:
            if is_before:
                patch.setattr(type(mlp), "forward", lambda self, x: x)
            lora = self.attached(torch.nn.ModuleDict({"mlp": mlp}), targets=LINEARS[-3:])
            patch.setattr(type(mlp), "forward", lambda self, x: x)
            with lora.rows(self.ROWS):
                assert mlp(x) is x and not calls

    def test_an_mlp_of_ones_own_needs_nothing_of_theirs(self, calls):
        """Not even an `act_fn`."""

        class OwnMLP(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.gate_proj, self.up_proj = (torch.nn.Linear(32, 48, bias=False) for _ in range(2))
                self.down_proj = torch.nn.Linear(48, 32, bias=False)

            def forward(self, x):
                return self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x))

        mlp, x = OwnMLP(), torch.randn(4, 6, 32)
        lora = self.attached(mlp, targets=LINEARS[-3:])
        with lora.rows(self.ROWS), torch.no_grad():
            assert torch.equal(mlp(x), OwnMLP.forward(mlp, x)) and not calls

    def test_the_model_may_be_an_mlp(self, calls):
        mlp = build().model.layers[0].mlp
        lora = self.attached(mlp, targets=LINEARS[-3:])
        with lora.rows(self.ROWS):
            mlp(torch.randn(4, 6, 32))
        assert len(calls) == 1 and "forward" not in vars(lora.detach())

    def test_dropout_counts_in_training_alone(self, calls):
        model = build()
        lora = self.attached(model, dropout=0.5)
        for is_training in (True, False):
            model.train(is_training)
            with lora.rows(self.ROWS), torch.no_grad():
                model(TOKENS)
        assert len(calls) == SIZES["num_hidden_layers"]

    def test_detach_leaves_the_forwards_of_others(self):
        """Even where a block is computed again in the backward: they lead to the class's own."""
        model = build()
        lora = self.attached(model)
        with lora.rows(self.ROWS), torch.no_grad():
            model(TOKENS)
        plain, x = copy.deepcopy(model.model.layers[0].mlp), torch.randn(4, 6, 32, requires_grad=True)
        mlp = model.model.layers[0].mlp
        self.doubled(mlp), self.doubled(mlp.gate_proj)
        plain.gate_proj.weight.data *= 2
        lora.detach()
        out = torch.utils.checkpoint.checkpoint(mlp, x, use_reentrant=False)
        out.sum().backward()
        torch.testing.assert_close(out, 2 * plain(x))
        assert x.grad.any() and "forward" not in vars(mlp.up_proj)

    def test_it_is_taken_off_and_copied(self, calls):
        model = build()
        before = snapshot(model)
        lora = self.attached(model)
        with torch.no_grad():
            base = model(TOKENS).logits
            assert not calls, "without rows it is the base model"
            with lora.rows(self.ROWS):
                adapted = model(TOKENS).logits
        copied = copy.deepcopy(lora)
        lora.detach()
        assert snapshot(model) == before and not any("forward" in vars(layer.mlp) for layer in model.model.layers)
        calls.clear()
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, base)
            with copied.rows(self.ROWS):
                assert torch.equal(copied.model(TOKENS).logits, adapted)
        assert len(calls) == SIZES["num_hidden_layers"]

    def test_its_input_has_any_dimensions_that_a_linears_may_have(self):
        mlp = build().model.layers[0].mlp
        lora, x = self.attached(torch.nn.ModuleDict({"mlp": mlp}), targets=LINEARS[-3:]), torch.randn(4, 6, 32)
        with lora.rows(self.ROWS), torch.no_grad():
            assert torch.equal(mlp(x.view(4, 2, 3, 32)).view(4, 6, 32), mlp(x))
            with pytest.raises(LoraError, match="gate_proj got .*with its tokens flattened"):
                mlp(x[0])
            with pytest.raises(LoraError, match=r"gate_proj got a batch of 2 and rows\(\) named 4"):
                mlp(x[:2])
