"""klora.lora.set_attention: a model of transformers computes what it did, and what the kernel cannot do is refused."""

import copy
import pickle
import re

import pytest
import torch
from klora.bench.tolerance import relative_error
from klora.kernels import dispatch
from klora.lora import LoraError, attach, set_attention
from klora.lora import attention as attention_module
from tiny_hf import tiny_llama
from tiny_lora import Tiny, randomize
from torch._dynamo.backends.debugging import aot_eager

transformers = pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")
TOKENS = torch.randint(290, (3, 17), generator=torch.Generator().manual_seed(0))


def numbers(model, run=None, **given) -> list[torch.Tensor]:
    """The logits of TOKENS, and the gradients of every parameter."""
    model.zero_grad()
    out = (run or model)(input_ids=TOKENS, labels=TOKENS, **given)
    out.loss.backward()
    return [out.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(relative_error(a, b.double()) < 2e-6 for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """The shapes of q and k of each call of the kernel."""
    met = []

    def attend(q, k, v):
        met.append((*q.shape, k.size(2)))
        return CAUSAL(q, k, v)

    monkeypatch.setattr(attention_module, "causal_attention", attend)
    return met


CAUSAL = attention_module.causal_attention
GROUPS = {"grouped": 2, "alone": 4, "one": 1}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma"])
def test_it_computes_what_the_models_own_attention_does(kind, groups, calls):
    model = tiny_llama(kind, num_key_value_heads=groups)
    wanted = numbers(model)
    attention = set_attention(model)
    size = getattr(model.config, "head_dim", None) or 8
    assert same(numbers(model), wanted) and calls == [(3, 17, 4, size, groups)] * 2
    assert attention.detach() is model and model.config._attn_implementation == "sdpa"
    assert same(numbers(model), wanted) and len(calls) == 2
    attention.detach()
    numbers(model, attention_mask=torch.tensor([[0] + [1] * 16] * 3))  # nothing looks at it any more


def test_the_kernel_itself_computes_it(monkeypatch):
    if not dispatch.INTERPRETED:
        pytest.skip("the kernel runs on a GPU, or in Triton's interpreter")
    model = tiny_llama(hidden_size=64)
    wanted = numbers(model)
    set_attention(model)
    monkeypatch.setattr(attention_module, "causal_attention", lambda *qkv: CAUSAL(*qkv, backend="triton"))
    assert same(numbers(model), wanted)


def test_adapters_and_attention_go_together_and_compile_whole():
    model = tiny_llama()
    lora = attach(model, slots=3, targets=("q_proj", "down_proj"), rank=4)
    for name in ("a", "b", "c"):
        lora.adapters.create(name)
    randomize(lora)

    def step(run) -> list[torch.Tensor]:
        lora.pool.grads.zero_()
        with lora.rows(["a", "b", None]):
            loss = run(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
            loss.backward()
        return [loss.detach(), lora.pool.grads.clone()]

    wanted = step(model)
    set_attention(model)
    assert same(step(model), wanted)
    assert same(step(torch.compile(model, backend="aot_eager", fullgraph=True)), wanted)


@pytest.mark.slow
def test_one_graph_serves_all_layers():
    """Whose adapters are found by no number that a guard would hold; the input of the first wants no gradient."""
    torch.compiler.reset()  # of another test's model, a layer's size would be taken for one that changes
    model, graphs = tiny_llama(num_hidden_layers=4), []
    lora = attach(model, slots=2, targets=("q_proj", "v_proj", "down_proj"), rank=4)
    for name in ("a", "b"):
        lora.adapters.create(name, alpha=4)
    randomize(lora)
    with lora.rows(["a", "b", None]):
        wanted = model(TOKENS, use_cache=False).logits

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    with lora.rows(["a", "b", None]):
        assert torch.allclose(model(TOKENS, use_cache=False).logits, wanted, atol=1e-5)
    assert len(graphs) == 2


def through_a_file(model):
    """As another process reads it, where transformers does not know the attention."""
    data = pickle.dumps(model)
    del transformers.AttentionInterface._global_mapping[attention_module.NAME]
    return pickle.loads(data)


@pytest.mark.parametrize("how", [copy.deepcopy, through_a_file])
def test_a_copy_is_a_copy(how, calls):
    model = tiny_llama()
    wanted = numbers(model)
    attention = set_attention(model)
    other = how(model)
    attention.detach()
    assert same(numbers(other), wanted) and len(calls) == 2
    with pytest.raises(LoraError, match="position_ids"):
        other(TOKENS, position_ids=torch.arange(17)[None])


def left(tokens):
    return (torch.arange(tokens.size(1)) >= 3).long().expand(tokens.shape)


def gap(tokens):
    mask = torch.ones_like(tokens)
    mask[1, 5] = 0
    return mask


FORWARDS = [
    ({"attention_mask": left(TOKENS)}, "attention_mask hides tokens of row 0 before others; pad on the right"),
    ({"attention_mask": gap(TOKENS)}, "attention_mask hides tokens of row 1"),
    ({"attention_mask": torch.ones(3, 1, 17, 17)}, "attention_mask is of [3, 1, 17, 17]; allowed: [batch, tokens]"),
    ({"attention_mask": {"full_attention": None}}, "attention_mask is a dict"),
    ({"attention_mask": torch.ones(3, 17, device="meta")}, "cannot be looked at on meta without waiting for it"),
    ({"position_ids": torch.arange(17)[None]}, "position_ids may pack documents into a row"),
    ({"cu_seq_lens_q": torch.tensor([0, 17])}, "cu_seq_lens_q is asked of attention"),
    ({"output_attentions": True}, "output_attentions is asked of attention"),
    ({"is_causal": False}, "attention that is not causal was asked for"),
]


@pytest.mark.parametrize(("given", "message"), FORWARDS, ids=[message[:40] for _, message in FORWARDS])
def test_a_forward_that_it_would_compute_wrongly_is_refused(given, message):
    model = tiny_llama()
    set_attention(model)
    with pytest.raises(LoraError, match=re.escape(message)):
        model(input_ids=TOKENS, use_cache=False, **given)
    with pytest.raises(LoraError, match=re.escape(message)):
        model.model(TOKENS, use_cache=False, **given)


def test_a_mask_is_looked_at_wherever_it_stands():
    model = tiny_llama()
    set_attention(model)
    with pytest.raises(LoraError, match="attention_mask hides tokens of row 0"):
        model.model(TOKENS, left(TOKENS))


def test_padding_on_the_right_changes_no_token_before_it():
    model = tiny_llama()
    mask = (torch.arange(17) < torch.tensor([[17], [12], [4]])).long()
    wanted = model(TOKENS, attention_mask=mask).logits
    set_attention(model)
    ours = model(TOKENS, attention_mask=mask).logits
    assert torch.allclose(ours[mask.bool()], wanted[mask.bool()], atol=1e-5)
    assert torch.equal(ours, model(TOKENS).logits)


@pytest.mark.parametrize("whole", [True, False])
def test_torch_compile_does_not_hide_a_mask(whole):
    """With fullgraph=True it cannot be looked at; else what cannot be compiled runs as it is, and looks."""
    model = tiny_llama()
    set_attention(model)
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    with pytest.raises(torch._dynamo.exc.Unsupported if whole else LoraError):
        compiled(TOKENS, attention_mask=left(TOKENS), use_cache=False)
    assert torch.allclose(compiled(TOKENS, use_cache=False).logits, model(TOKENS).logits, atol=1e-5)


def test_a_cache_is_refused_where_it_holds_tokens():
    model = tiny_llama().eval()
    attention = set_attention(model)
    cache = model(TOKENS, use_cache=True).past_key_values
    with pytest.raises(LoraError, match="1 queries and 18 keys: klora's attention reads no cache"):
        model(TOKENS[:, :1], past_key_values=cache)
    with pytest.raises(LoraError, match="detach"):
        model.generate(TOKENS[:1], max_new_tokens=2, pad_token_id=0)
    attention.detach()
    assert model.generate(TOKENS[:1], max_new_tokens=2, pad_token_id=0).shape[1] > 17


def test_dropout_is_refused_in_training_alone():
    model = tiny_llama(attention_dropout=0.1)
    set_attention(model)
    model.eval()(TOKENS)
    with pytest.raises(LoraError, match="attention_dropout is 0.1 in training"):
        model.train()(TOKENS)


def test_another_scale_is_refused():
    model = tiny_llama("Granite")
    set_attention(model)
    with pytest.raises(LoraError, match=r"the scale of attention is 1.0; allowed: 1 / sqrt\(8\)"):
        model(TOKENS)


def not_causal():
    model = tiny_llama()
    model.config.is_causal = False
    return model


def one_layer_not_causal():
    model = tiny_llama()
    model.model.layers[1].self_attn.is_causal = False
    return model


def taken():
    model = tiny_llama()
    set_attention(model)
    return model


def t5():
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def bloom():
    config = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    return transformers.BloomForCausalLM(config)


MODELS = [
    (Tiny, "model is a Tiny; wanted: a causal language model of transformers"),
    (t5, "T5ForConditionalGeneration has several parts"),
    (bloom, "BloomForCausalLM takes no other attention"),
    (not_causal, "LlamaForCausalLM has attention that is not causal"),
    (one_layer_not_causal, "LlamaForCausalLM has attention that is not causal"),
    (taken, "this LlamaForCausalLM has klora's attention already"),
    (lambda: tiny_llama("Mistral", sliding_window=8), "has a sliding window of 8; allowed: full attention"),
    (lambda: tiny_llama("Gemma2", head_dim=8), "has sliding_attention; allowed: full attention"),
    (
        lambda: tiny_llama("Gemma2", head_dim=8, sliding_window=None, layer_types=["full_attention"] * 2),
        "has attn_logit_softcapping=50.0",
    ),
    (lambda: tiny_llama(head_dim=12), "has heads of 12; allowed: multiples of 8 up to 256"),
    (lambda: tiny_llama(head_dim=264), "has heads of 264; allowed: multiples of 8 up to 256"),
]


@pytest.mark.parametrize(("build", "message"), MODELS, ids=[message[:40] for _, message in MODELS])
def test_a_model_that_it_does_not_fit_is_named_and_left_as_it_was(build, message):
    model = build()
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    hooks = [len(part._forward_pre_hooks) for part in model.modules()]
    with pytest.raises(LoraError, match=re.escape(message)):
        set_attention(model)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == before
    assert [len(part._forward_pre_hooks) for part in model.modules()] == hooks
