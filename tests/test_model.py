"""The network against a loop written from its equations, and which optimizer trains which parameter."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
from conftest import SMALL, randomized
from klora.kernels import BOS_ID, ntk_base, rotary_tables
from klora.model import gpt
from klora.model.config import PRESETS, ConfigError, ModelConfig, TrainConfig, allowed_values, preset
from klora.model.generate import generate_tokens
from klora.model.gpt import GPT, is_block_matrix, parameter_count, parameter_shapes
from klora.model.network import Adapters, BlockAdapters, Lora
from klora.model.optimizers import FlatGradients, Optimizers
from klora.model.weights import frozen_weights


def norm(x):
    return x / torch.sqrt((x * x).mean() + 2.0**-23)


def naive_logits(model: GPT, tokens: list[int]) -> torch.Tensor:
    """Logits [S, V] of one sequence, one token and one head at a time, from the equations of the design."""
    config, d = model.config, model.config.head_dim
    base = config.rope_base
    if len(tokens) > config.train_length:
        base *= (len(tokens) / config.train_length) ** (d / (d - 2))
    embedded = []
    for i, t in enumerate(tokens):
        if i == 0 or t == BOS_ID:
            row = config.bigram_rows - 1
        else:
            row = ((36313 * t) ^ (27191 * tokens[i - 1])) % (config.bigram_rows - 1)
        bigram = model.bigram.project @ model.bigram.table[row]
        embedded.append(norm(model.embed[t] + model.bigram.scale * bigram))
    gate = torch.sigmoid(model.smear.gate)
    x0 = []
    for i, t in enumerate(tokens):
        before = torch.zeros_like(gate) if i == 0 or t == BOS_ID else embedded[i - 1]
        x0.append((1 - gate) * embedded[i] + gate * before)
    x, stack, skip = list(x0), [], 0
    for index, block in enumerate(model.blocks):
        if index >= config.blocks // 2 and stack:
            pushed = stack.pop()
            x = [xi + model.skip[skip] * pi for xi, pi in zip(x, pushed, strict=True)]
            skip += 1
        depth = 1 / math.sqrt(index + 1)
        x = [block.resid_mix[0] * xi + block.resid_mix[1] * oi for xi, oi in zip(x, x0, strict=True)]
        heads_of = {"q": [], "k": [], "v": []}
        for i, xi in enumerate(x):
            n = norm(xi)
            for name in "qkv":
                heads = list((getattr(block, name) @ n).split(d))
                if name != "v":
                    heads = [rotate(norm(head), i, base) for head in heads]
                if name == "q":
                    heads = [head * block.gain[h] for h, head in enumerate(heads)]
                heads_of[name].append(heads)
        mixed = []
        for i in range(len(x)):
            outs = []
            for h in range(config.heads):
                g = h // (config.heads // config.kv_heads)
                scores = torch.stack([heads_of["q"][i][h] @ heads_of["k"][j][g] for j in range(i + 1)]) / math.sqrt(d)
                weights = torch.softmax(scores, 0)
                outs.append(sum(weights[j] * heads_of["v"][j][g] for j in range(i + 1)))
            mixed.append(torch.cat(outs))
        x = [xi + depth * block.attn_scale * (block.o @ m) for xi, m in zip(x, mixed, strict=True)]
        x = [xi + depth * block.mlp_scale * (block.down @ torch.relu(block.up @ norm(xi)) ** 2) for xi in x]
        if index < config.blocks // 2:
            stack.append(x)
    return torch.stack([config.softcap * torch.tanh(model.embed @ norm(xi) / config.softcap) for xi in x])


def rotate(head, position, base):
    d = head.numel()
    out = torch.empty_like(head)
    for i in range(d // 2):
        angle = position * base ** (-2 * i / d)
        out[i] = head[i] * math.cos(angle) - head[i + d // 2] * math.sin(angle)
        out[i + d // 2] = head[i + d // 2] * math.cos(angle) + head[i] * math.sin(angle)
    return out


@pytest.mark.parametrize("blocks", [1, 4, 5])
@pytest.mark.parametrize("length", [13, 20])
@torch.no_grad()
def test_batched_forward_equals_the_plain_loop_in_float64(blocks, length):
    config = ModelConfig(**{**SMALL.to_dict(), "blocks": blocks, "train_length": 16})
    model = randomized(config, torch.float64)
    tokens = torch.randint(3, config.vocab_size, (2, length))
    tokens[:, 0] = BOS_ID
    tokens[1, 7] = BOS_ID
    expected = torch.stack([naive_logits(model, row.tolist()) for row in tokens])
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_loss_is_the_negative_log_softmax_of_the_logits(small_model):
    tokens = torch.randint(3, 300, (2, 20))
    expected = -small_model.logits(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(small_model.nll(tokens[:, :-1], tokens[:, 1:]), expected)


@torch.no_grad()
def test_smear_and_bigram_do_not_cross_bos(small_model):
    """With attention and MLP silent, what stands before BOS cannot reach what stands after it."""
    for block in small_model.blocks:
        block.o.zero_()
    tokens = torch.randint(3, 300, (1, 16))
    tokens[0, 8] = BOS_ID
    other = tokens.clone()
    other[0, :8] = torch.randint(3, 300, (8,))
    first, second = small_model.hidden(tokens), small_model.hidden(other)
    assert torch.equal(first[:, 8:], second[:, 8:])
    assert not torch.equal(first[:, :8], second[:, :8])
    other[0, 8] = 5
    assert not torch.equal(small_model.hidden(other)[:, 9:], second[:, 9:])


@torch.no_grad()
def test_future_tokens_do_not_change_the_past(small_model):
    tokens = torch.randint(3, 300, (1, 40))
    other = tokens.clone()
    other[0, 25:] = torch.randint(3, 300, (15,))
    torch.testing.assert_close(small_model.hidden(tokens)[:, :25], small_model.hidden(other)[:, :25])


@pytest.mark.parametrize("total", [40, 90], ids=["within the training length", "beyond it"])
@torch.no_grad()
def test_a_cache_gives_what_the_whole_sequence_gives(small_model, total):
    small_model.double()
    tokens = torch.randint(3, 300, (2, total))
    tokens[1, 20] = BOS_ID
    whole = small_model.logits(tokens)
    cache = small_model.cache(batch=2, length=total)
    steps = [small_model.logits(tokens[:, :15], cache)]
    steps += [small_model.logits(tokens[:, i : i + 1], cache) for i in range(15, total)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=f"the cache holds {total} tokens"):
        small_model.logits(tokens[:, :1], cache)


def test_a_filled_cache_takes_one_token_at_a_time(small_model):
    cache = small_model.cache(batch=1, length=10)
    small_model.logits(torch.tensor([[1, 5]]), cache)
    with pytest.raises(ValueError, match="1 token at a time, not 2"):
        small_model.logits(torch.tensor([[6, 7]]), cache)


@torch.no_grad()
@pytest.mark.parametrize("targets", [["qkv"], ["o"], ["up"], ["down"], ["qkv", "o", "up", "down"]], ids="+".join)
def test_adapters_add_low_rank_weights_and_biases(small_model, targets):
    """A model with adapters equals one whose weights had the product of their factors added, scales undone."""
    small_model.double()
    config, tokens = SMALL, torch.randint(3, 300, (1, 20))
    width, hidden = config.width, config.mlp_hidden
    sizes = {"qkv": (sum(config.qkv_sizes), width), "o": (width, width), "up": (hidden, width), "down": (width, hidden)}

    def lora(name: str) -> Lora:
        (N, K), several = sizes[name], (3,) if name == "qkv" else ()
        return Lora(*(0.2 * torch.randn(shape).double() for shape in ((1, *several, 4, K), (1, N, 4))))

    blocks = [BlockAdapters(**{name: lora(name) for name in targets}) for _ in range(config.blocks)]
    plain, adapted = small_model.hidden(tokens), small_model.hidden(tokens, Adapters(None, blocks))
    for block, given in zip(small_model.blocks, blocks, strict=True):
        scales = {"o": block.depth_scale * block.attn_scale, "down": block.depth_scale * block.mlp_scale}
        for name in targets:
            lora_a, lora_b, _ = getattr(given, name)
            if name == "qkv":
                for part, projection, a in zip(lora_b[0].split(config.qkv_sizes), "qkv", lora_a[0], strict=True):
                    getattr(block, projection).add_(part @ a)
            else:
                getattr(block, name).add_(lora_b[0] @ lora_a[0] / scales.get(name, torch.ones(1))[:, None])
    torch.testing.assert_close(small_model.hidden(tokens), adapted)
    assert not torch.allclose(plain, adapted)
    shifted = Adapters(None, [BlockAdapters(bias=torch.ones(1, width).double())] * config.blocks)
    assert not torch.allclose(small_model.hidden(tokens, shifted), small_model.hidden(tokens))


def test_parameter_counts_of_the_presets():
    assert parameter_count(preset("seed-11l").model) == 26_829_913
    assert parameter_count(preset("seed").model) == 24_468_561
    assert parameter_count(preset("tiny").model) < 1_000_000
    shapes = parameter_shapes(preset("seed").model)
    assert sum(map(is_block_matrix, shapes)) == 60


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(preset("tiny").model)
    block = model.blocks[2]
    torch.testing.assert_close(block.up.T @ block.up, torch.eye(128), atol=1e-5, rtol=0)
    assert not block.o.any() and not block.down.any() and not model.bigram.table.any()
    assert model.embed.std().item() == pytest.approx(0.005, rel=0.02)
    assert model.bigram.scale.item() == pytest.approx(0.05)
    assert (block.gain == 1.5).all() and (block.resid_mix == torch.tensor([[1.0], [0.0]])).all()


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_in_exactly_one_optimizer_and_in_the_gradient_buffer(name):
    chosen = preset(name)
    with torch.device("meta"):
        model = GPT(chosen.model)
    optimizers = Optimizers(model, chosen.train)
    trained = [p for o in (optimizers.muon, optimizers.adamw) for group in o.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained)) and set(trained) == set(model.parameters())
    in_muon = {optimizers.names[p] for group in optimizers.muon.param_groups for p in group["params"]}
    assert in_muon == {name for name in parameter_shapes(chosen.model) if is_block_matrix(name)}
    learning_rates = {optimizers.names[p]: g["lr"] for g in optimizers.adamw.param_groups for p in g["params"]}
    assert learning_rates.pop("embed") == 0.03
    assert set(learning_rates.values()) == {0.02}
    assert {"bigram.table", "bigram.project", "bigram.scale", "smear.gate"} <= learning_rates.keys()
    assert all(group["weight_decay"] == 0.04 for o in (optimizers.muon, optimizers.adamw) for group in o.param_groups)


def test_every_parameter_gets_a_gradient_and_is_moved(small_model):
    gradients = FlatGradients(small_model)
    optimizers = Optimizers(small_model, TrainConfig())
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    tokens = torch.randint(3, 300, (4, 65))
    small_model.nll(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    for name, parameter in small_model.named_parameters():
        assert parameter.grad.untyped_storage().data_ptr() == gradients.buffer.untyped_storage().data_ptr(), name
        assert parameter.grad.abs().max() > 0, name
    optimizers.step(0, 1.0)
    for name, parameter in small_model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_gradient_clip_is_global(small_model):
    gradients = FlatGradients(small_model)
    gradients.buffer.normal_()
    norm_before = gradients.buffer.norm().item()
    assert gradients.clip_(0.3).item() == pytest.approx(norm_before)
    total = math.sqrt(sum(p.grad.square().sum().item() for p in small_model.parameters()))
    assert total == pytest.approx(0.3, rel=1e-4)
    gradients.clip_(10.0)
    assert gradients.buffer.norm().item() == pytest.approx(0.3, rel=1e-4)


def test_muon_momentum_rises_linearly():
    model = randomized()
    optimizers = Optimizers(model, TrainConfig())
    assert optimizers.momentum(0) == pytest.approx(0.92)
    assert optimizers.momentum(750) == pytest.approx(0.955)
    assert optimizers.momentum(1500) == optimizers.momentum(9999) == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("width", "-3", r"width=-3 is not possible; allowed: int, at least 8"),
        ("width", "wide", r"width='wide' is not possible; allowed: int, at least 8"),
        ("heads", "7", r"heads=7 is not possible; allowed: a divisor of width=512"),
        ("kv_heads", "3", r"kv_heads=3 is not possible; allowed: a divisor of heads=8"),
        ("softcap", "nan", r"softcap=nan is not possible"),
        ("seconds", "inf", r"seconds=inf is not possible"),
        ("bigram_rows", "10" + "0" * 14, r"bigram_rows=10+ is not possible; allowed: int, at least 2, at most"),
        ("dtype", "float8", r"dtype='float8' is not possible; allowed: one of auto, float32, bfloat16"),
        ("muon_momentum", "1.0", r"muon_momentum=1.0 is not possible; allowed: float, at least 0.0, below 1.0"),
        ("wdith", "512", r"there is no field 'wdith' \(given wdith=512\); did you mean width"),
        ("micro_batch_tokens", "100", r"micro_batch_tokens=100 is not possible; allowed: at least one row"),
        ("blocks", 2.5, r"blocks=2.5 is not possible; allowed: int"),
    ],
)
def test_impossible_values_are_refused_with_field_value_and_what_is_allowed(name, value, says):
    with pytest.raises(ConfigError, match=says):
        preset("seed").override({name: value})


def test_every_field_can_be_overridden_from_text():
    for config in (ModelConfig(), TrainConfig()):
        for name, value in config.to_dict().items():
            assert config.override({name: str(value)}) == config
    assert preset("seed").override({"batch_tokens": "1_024", "muon_lr": "1e-3"}).train.muon_lr == 1e-3
    assert {f.name for f in ModelConfig.__dataclass_fields__.values()}.isdisjoint(TrainConfig.__dataclass_fields__)


def test_unknown_preset_and_incomplete_config_are_refused():
    with pytest.raises(ConfigError, match="there is no preset 'huge'; allowed: tiny, seed, seed-11l, seed-2k"):
        preset("huge")
    with pytest.raises(ConfigError, match="ModelConfig has no value for blocks"):
        ModelConfig.from_dict({k: v for k, v in ModelConfig().to_dict().items() if k != "blocks"})
    assert allowed_values(TrainConfig.__dataclass_fields__["seed"]).startswith("int, at least 0")


def test_a_stored_config_may_be_older_than_the_fields_of_execution_and_no_others():
    given = TrainConfig(reduce_dtype="bfloat16", gradient_buckets=4, muon_gathers=2)
    assert TrainConfig.from_dict(given.to_dict()) == given
    execution = ("reduce_dtype", "graph_collectives", "gradient_buckets", "muon_gathers")
    for name in given.to_dict():
        older = {k: v for k, v in given.to_dict().items() if k != name}
        if name in execution:
            assert TrainConfig.from_dict(older) == given.override({name: getattr(TrainConfig(), name)})
        else:
            with pytest.raises(ConfigError, match=f"^TrainConfig has no value for {name}$"):
                TrainConfig.from_dict(older)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gradient_buckets": 0}, "gradient_buckets=0 is not possible; allowed: int, at least 1, at most 256"),
        ({"gradient_buckets": "two"}, "gradient_buckets='two' is not possible; allowed: int, at least 1, at most 256"),
        ({"gradient_buckets": 11}, "gradient_buckets=11 is not possible; allowed: 1 to blocks=10"),
        ({"gradient_buckets": 4, "blocks": 2}, "gradient_buckets=4 is not possible; allowed: 1 to blocks=2"),
        (
            {"gradient_buckets": 2, "graph_collectives": "between"},
            "gradient_buckets=2 is not possible; allowed: 1 with graph_collectives=between, where nothing leaves "
            "during the backward",
        ),
        (
            {"muon_gathers": -1},
            "muon_gathers=-1 is not possible; allowed: int, at least 0, at most 256 (0: every rank makes all)",
        ),
        ({"muon_gathers": 11}, "muon_gathers=11 is not possible; allowed: 0 to blocks=10"),
    ],
)
def test_ways_of_ranks_that_cannot_be_are_refused_in_one_sentence(given, says):
    with pytest.raises(ConfigError) as refused:
        preset("seed").override(given)
    assert str(refused.value) == says
    for possible in ({"gradient_buckets": 10, "muon_gathers": 10}, {"muon_gathers": 2, "graph_collectives": "between"}):
        assert preset("seed").override(possible).train.to_dict().items() >= possible.items()


def test_tokens_of_other_dimensions_are_refused():
    for tokens in (torch.zeros(5, dtype=torch.int64), torch.zeros(1, 5, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"wanted int32 or int64 \[B, S\]"):
            randomized()(tokens)


def test_training_follows_an_evaluation_under_inference_mode():
    """What the evaluation left behind in the model, its rotary tables, is no inference tensor."""
    tokens = torch.randint(260, SMALL.vocab_size, (2, 80))
    model, fresh = randomized(), randomized()
    with torch.inference_mode():
        evaluated = model.nll(tokens[:, :-1], tokens[:, 1:])
    again = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    for trained in (model, again, fresh):
        nll = trained.nll(tokens[:, :-1], tokens[:, 1:])
        nll.mean().backward()
        assert torch.equal(nll.detach(), evaluated)
    for ours, others, plain in zip(model.parameters(), again.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours.grad, plain.grad) and torch.equal(others.grad, plain.grad)


@pytest.mark.parametrize("rows", [None, 100])  # as many as the sequence is long, or of one longer window
def test_rotary_tables_are_few_and_have_the_bits_of_tables_made_alone(rows):
    model = randomized()
    for length in [*range(1, 400, 7), 64, 1, 399]:
        base = ntk_base(SMALL.rope_base, length, SMALL.train_length, SMALL.head_dim)
        tables = model.rotary(rows or length, length)
        alone = rotary_tables(rows or length, SMALL.head_dim, base)
        assert all(torch.equal(table[: len(one)], one) for table, one in zip(tables, alone, strict=True))
    kept = sum(table.numel() for tables in model._rotary.values() for table in tables)
    assert kept <= gpt.ROTARY_TABLES * 512 * SMALL.head_dim


def test_tables_of_one_base_are_made_a_few_times_for_all_lengths(monkeypatch):
    made = []
    monkeypatch.setattr(gpt, "rotary_tables", lambda rows, *about: made.append(rows) or rotary_tables(rows, *about))
    model = randomized()
    for rows in [*range(1, 1000, 3), 5, 600]:
        assert len(model.rotary(rows, 4096)[0]) >= rows
    assert made == [64, 128, 256, 512, 1024]


def test_a_softcap_of_0_is_none():
    """In the logits, in the loss, in generation, and in text; JSON, which has no infinity, keeps the 0."""
    config = preset("tiny").override({"softcap": "0"}).model
    assert (config.softcap, config.logit_softcap) == (0.0, math.inf)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    with pytest.raises(
        ConfigError, match=r"softcap=inf is not possible; allowed: float, at least 0.0 \(0: no softcap\)"
    ):
        config.override({"softcap": "inf"})
    with pytest.raises(ConfigError, match=r"softcap=-1.0 is not possible"):
        config.override({"softcap": "-1"})
    model = randomized(dataclasses.replace(SMALL, softcap=0.0), torch.float64)
    tokens = torch.randint(260, SMALL.vocab_size, (2, 9))
    logits = model.logits(tokens)
    assert torch.equal(logits, model.hidden(tokens) @ model.embed.T)
    assert logits.abs().max() > 1
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(model.nll(tokens[:, :-1], tokens[:, 1:]), wanted)
    likeliest = list(generate_tokens(model, tokens[0].tolist(), 1, temperature=0, stop=-1))
    length = tokens.size(1) + 1
    assert likeliest == [int((model.hidden(tokens[:1], rotary_length=length)[0, -1] @ model.embed.T).argmax())]


def test_the_backend_follows_the_device_unless_it_was_set(monkeypatch):
    model = GPT(SMALL)
    assert model.backend == "reference"
    monkeypatch.setattr(gpt, "pick_backend", lambda config, device, dtype: f"of {device.type}")
    assert model.backend == "of cpu" and model.to("meta").backend == "of meta"
    model.backend = "triton"
    assert model.backend == copy.deepcopy(model).backend == "triton"


def test_a_field_of_two_values_takes_true_and_false_alone():
    for text, value in (("true", True), ("False", False), (True, True)):
        assert TrainConfig().override({"document_mask": text}).document_mask is value
    for wrong in ("yes", "1", 1, None):
        with pytest.raises(ConfigError, match=r"document_mask=.* is not possible; allowed: true or false"):
            TrainConfig().override({"document_mask": wrong})


def test_seed_2k_is_seed_at_twice_the_length_with_the_same_tokens_a_step():
    seed, longer = preset("seed"), preset("seed-2k")
    assert longer.model == seed.model.override({"train_length": 2048}) and longer.train == seed.train
    assert longer.train.batch_tokens % 2048 == 0
    for name in ("document_mask", "qat_share"):
        assert not any(getattr(each.train, name) for each in PRESETS.values()), "off in the presets"


def test_frozen_weights_of_a_model_in_training_ask_for_no_gradient():
    model = randomized()
    weights = frozen_weights(model)
    tensors = [weights.embed, weights.bigram, weights.gate, weights.head, *(t for b in weights.blocks for t in b)]
    assert not any(t.requires_grad for t in tensors if t is not None)
    assert all(p.requires_grad for p in model.parameters())
