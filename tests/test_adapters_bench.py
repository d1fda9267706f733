"""bench/adapters.py on a tiny Llama: every row has a record, the gate goes red, a peer that cannot run is named."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import klora.bench.adapter_trainers as trainers
import klora.bench.adapters as adapters
import pytest
import torch
from klora.bench.adapter_trainers import Klora, Work, linears_of
from klora.bench.adapters import FASTER, GATE, ROWS, Row, gate, mixed_ranks, timed, verdicts
from klora.bench.gate import RedGate, why_broken
from klora.errors import KloraError
from klora.lora.attention import NAME
from test_warm import python
from tiny_hf import saved, tiny_llama
from torch._dynamo.backends.debugging import aot_eager

pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
COMPILE = torch.compile
TOY = {"batch": 3, "tokens": 8, "rank": 4, "rounds": 1, "commit": "x"}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """It takes a minute, and no test is about it."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return tiny_llama(**SIZES, num_hidden_layers=3)


def work(module, ranks=(4,) * 4, tokens: int = 12, dtype: torch.dtype = torch.float32) -> Work:
    drawn = torch.randint(290, (len(ranks), tokens + 1), generator=torch.Generator().manual_seed(0))
    return Work(module, drawn, tuple(ranks), dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, module) -> Path:
    place = saved(tmp_path_factory.mktemp("hf"))
    module.save_pretrained(place)
    return place


@pytest.fixture
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.slow
def test_the_record_has_every_row(folder, tmp_path, without_a_gpu, capsys):
    pytest.importorskip("peft", reason="pip install -e '.[test]' brings peft")
    adapters.main(folder, tmp_path / "adapters.json", names="", toy=True, **TOY)
    record = json.loads((tmp_path / "adapters.json").read_text())
    assert list(record["rows"]) == list(ROWS) and not record["missing"] and record["toy"]
    assert record["verdicts"] == [] and record["compiled_ahead"] == {}  # a toy's times say nothing
    assert record["model"]["num_hidden_layers"] == 3 and record["environment"]["versions"]["peft"]
    printed = capsys.readouterr().out
    for name, row in record["rows"].items():
        assert row["errors"]["float32"]["error"] <= row["errors"]["float32"]["allowed"]
        assert row["ms"]["p50"] > 0 and row["parts"] == 1 and not row["captured"], name
        assert f"{name}: {row['ms']['p50']:.1f} ms a step" in printed
    like = {
        name: row["loss"] for name, row in record["rows"].items() if name not in ("klora-int6", "klora-mixed-ranks")
    }
    assert all(loss == pytest.approx(like["klora"], rel=1e-5) for loss in like.values())
    assert record["rows"]["peft-one-by-one"]["ms_set_adapter_left_out"]["p50"] > 0
    assert "training mode" in record["rows"]["peft-mixed-batch"]["mode"]


AHEAD = """
import json
from functools import partial

import torch
from klora.kernels import dispatch

dispatch.resolve_backend = lambda backend, tensor: backend or "triton"
from klora.bench import adapters
from klora.kernels.precompile import recorded
from tiny_hf import tiny_llama

torch.set_num_threads(1)
torch.compile = partial(torch.compile, backend="aot_eager")
adapters.relative_error, adapters.DRAWS = lambda ours, exact: 0.0, dict.fromkeys(adapters.DRAWS, 2)
module = tiny_llama(hidden_size=64, intermediate_size=96, tie_word_embeddings=True).to(torch.bfloat16)
works = adapters.works_of(module, CPU, batch=5, tokens=80, rank=8)
rows = {name: row for name, row in adapters.ROWS.items() if row.is_ours}
ahead = recorded(partial(adapters.launches, works, rows))
measured = recorded(lambda: list(adapters.measured(works, rows, 1)))
print(json.dumps([list(ahead), list(measured)]))
"""


@pytest.mark.slow
def test_what_the_gates_and_steps_launch_is_compiled_ahead_and_nothing_else(tmp_path):
    ahead, measured = python(AHEAD, tmp_path / "cache")
    assert set(ahead) == set(measured) and len(ahead) > 50


@pytest.mark.slow
def test_a_missing_peft_is_named_as_missing(folder, tmp_path, without_a_gpu, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    rows = "klora,peft-one-by-one,peft-mixed-batch"
    adapters.main(folder, tmp_path / "adapters.json", names=rows, toy=True, **TOY)
    record = json.loads((tmp_path / "adapters.json").read_text())
    assert list(record["rows"]) == ["klora"]
    assert record["missing"] == dict.fromkeys(rows.split(",")[1:], "package peft is not installed")


@pytest.mark.slow
def test_a_peer_that_raises_is_named_and_ours_raises(module, monkeypatch):
    def refuse(work):
        raise TypeError("no such argument")

    works = {False: work(module), True: work(module)}
    rows = {"peer": Row(refuse), "klora": ROWS["klora"]}
    (_, _, why), (_, found, _) = adapters.measured(works, rows, 1)
    assert why == why_broken(TypeError("no such argument")) and found["ms"]["p50"] > 0
    with pytest.raises(TypeError, match="no such argument"):
        list(adapters.measured(works, {"klora": Row(refuse, is_ours=True)}, 1))


class Wrong(Klora):
    """Leaves out a thousandth of the gradients of one adapter's B in one linear."""

    def gradients(self):
        found = super().gradients()
        found["model.layers.1.mlp.down_proj"][1][1] *= 0.999
        return found


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_wrong_gradient_of_one_adapter_turns_the_gate_red(module, is_ours):
    with pytest.raises(RedGate, match="klora: the gradient of B of adapter 1 is .* No speed is reported"):
        gate(work(module), Row(Wrong, is_ours=is_ours), "klora")
    with pytest.raises(RedGate):
        list(adapters.measured({False: work(module)}, {"klora": Row(Wrong, is_ours=is_ours)}, 1))


def test_a_red_gate_ends_the_run_with_a_sentence(folder, tmp_path, without_a_gpu, monkeypatch):
    monkeypatch.setitem(ROWS, "klora", Row(Wrong, is_ours=True))
    with pytest.raises(SystemExit, match="No speed is reported"):
        adapters.main(folder, tmp_path / "adapters.json", names="klora-uncaptured,klora", toy=True, **TOY)
    assert not (tmp_path / "adapters.json").exists()


def test_every_adapter_and_rank_is_in_the_gate(module):
    mixed = work(module, mixed_ranks(6))
    assert mixed.ranks == (4, 16, 28, 40, 52, 64) and mixed_ranks(1) == (4,)
    cut = mixed.cut(**GATE)
    assert cut.ranks == (4, 28, 64) and len(cut.module.base_model.layers) == 2 and len(module.base_model.layers) == 3
    for a, b in (cut.adapters(name, linear) for name, linear in linears_of(cut.module).items()):
        for number, rank in enumerate(cut.ranks):
            assert (a[number, :rank] != 0).all() and (b[number, :, :rank] != 0).all()
            assert not a[number, rank:].any() and not b[number, :, rank:].any()
    errors = gate(mixed, ROWS["klora-mixed-ranks"], "klora-mixed-ranks")["float32"]
    assert 0 < errors["error"] <= errors["allowed"] < 1e-5


def test_six_bits_are_compared_with_the_weights_that_they_hold(module):
    """Not with the model's: their difference is a hundred times what is allowed."""
    errors = gate(work(module), ROWS["klora-int6"], "klora-int6")["float32"]
    assert errors["error"] <= errors["allowed"] < 1e-5
    trainer = ROWS["klora-int6"].build(work(module))
    bytes_of = trainer.base_bytes()
    assert bytes_of["dense"] == 4 * 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) and bytes_of["int6"] > 0
    pairs = zip(trainer.dense().parameters(), module.parameters(), strict=True)
    assert sum(not torch.equal(ours, own) for ours, own in pairs) == 7 * 3


class Coarse(Klora):
    """In bf16, six-bit weights whose scales have lost digits: `bits` of 11 are left."""

    bits = 7

    def __init__(self, work):
        super().__init__(work, base="int6")
        self.right = super().dense()
        if work.dtype == torch.bfloat16:
            for place in self.lora.pool.places:
                mantissa, exponent = torch.frexp(self.module.get_submodule(place.name).scale)
                rounded = torch.ldexp((mantissa * 2**self.bits).round() / 2**self.bits, exponent)
                self.module.get_submodule(place.name).scale.copy_(rounded)

    def dense(self):
        return self.right


@pytest.mark.slow
@pytest.mark.parametrize(("row", "is_right"), [(ROWS["klora-int6"], True), (ROWS["klora"], True),
                                               (Row(Coarse, is_ours=True), False)])  # fmt: skip
def test_in_bf16_right_arithmetic_is_allowed_and_a_scale_that_lost_a_bit_is_not(module, row, is_right):
    """Of one batch of tokens, right arithmetic was red in one of four."""
    of_bf16 = work(copy.deepcopy(module).to(torch.bfloat16), dtype=torch.bfloat16)
    errors = gate(of_bf16, row, "six bits")
    assert errors["float32"]["error"] <= errors["float32"]["allowed"]
    assert (errors["bfloat16"]["error"] <= errors["bfloat16"]["allowed"]) == is_right


def test_the_gate_compares_several_batches_of_tokens_that_are_the_same_for_all(module):
    given = work(module)
    one, other = (trainers.Stacked(given), ROWS["klora"].build(given))
    ours, theirs = (adapters._sample(trainer, 3) for trainer in (one, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    of_one = adapters._sample(trainers.Stacked(given), 1)
    for part, first in of_one.items():
        assert ours[part].shape == (3 * first.numel(),) and torch.equal(ours[part][: first.numel()], first)
        assert not torch.allclose(ours[part][first.numel() : 2 * first.numel()], first, rtol=0.1)


@pytest.mark.parametrize("name", ROWS)
def test_parts_of_a_batch_give_the_gradients_of_the_whole(name, module):
    pytest.importorskip("peft", reason="pip install -e '.[test]' brings peft")
    trainer = ROWS[name].build(work(module))
    whole = adapters._gradients(trainer)
    trainer.forget()
    trainer.split(4)
    assert [(rows.start, rows.stop) for rows in trainer.parts] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    parts = adapters._gradients(trainer)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "peft-one-by-one"])
def test_a_step_is_that_of_the_stacked_adapters(name, module):
    """Every row trains: after two steps its loss has fallen, by as much as that of the others."""
    pytest.importorskip("peft", reason="pip install -e '.[test]' brings peft")
    given = work(module)
    trainer = ROWS[name].build(given)
    plain = trainers.Stacked(replace(given, module=trainer.dense()))
    ours, theirs = ([float(one.step()) for _ in range(3)] for one in (trainer, plain))
    assert ours == pytest.approx(theirs, rel=1e-4) and ours[2] < ours[1] < ours[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "graphs"), [("klora-compiled", 4), ("klora-compiled-attention", 4), ("klora-compiled-fused", 3)]
)
def test_a_compiled_row_compiles_one_graph_for_all_layers(name, graphs, module, monkeypatch):
    """The first layer has another, for its input wants no gradient; then there are the last norm and PyTorch's loss."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=backend, fullgraph=True))
    torch.compiler.reset()
    trainer = ROWS[name].build(work(module))
    assert (trainer.module.config._attn_implementation == NAME) == (name != "klora-compiled")
    plain = ROWS["klora"].build(work(module))
    ours, theirs = ([float(one.step()) for _ in range(3)] for one in (trainer, plain))
    assert ours == pytest.approx(theirs, rel=1e-4) and len(compiled) == graphs
    row = timed(work(module), ROWS[name], 1)
    assert row["graphs"] == graphs and row["graph_breaks"] == 0
    assert timed(work(module), ROWS["klora"], 1)["graphs"] == 0


@pytest.mark.slow
def test_one_by_one_takes_the_steps_of_every_adapter_and_times_some(module, monkeypatch):
    pytest.importorskip("peft", reason="pip install -e '.[test]' brings peft")
    monkeypatch.setattr(trainers, "ONE_BY_ONE", 2)
    set_to = []
    trainer = trainers.PeftOneByOne(work(module))
    set_adapter = trainer.model.set_adapter
    monkeypatch.setattr(trainer.model, "set_adapter", lambda name: set_to.append(name) or set_adapter(name))
    before = [[leaf.clone() for leaf in trainer._flat(n)] for n in range(4)]
    trainer.step()
    moved = [any(map(torch.ne, map(torch.sum, old), map(torch.sum, trainer._flat(n)))) for n, old in enumerate(before)]
    assert set_to == ["0", "1"] and moved == [True, True, False, False]
    trainer.steps_of_the_last()
    assert set_to == ["0", "1"]
    row = timed(work(module), ROWS["peft-one-by-one"], 1)
    assert row["measured_adapters"] == 2 and row["ms_are"] == "scaled to 4 adapters by their number"


@pytest.mark.slow
def test_what_does_not_fit_is_tried_in_parts(module, monkeypatch):
    class Large(Klora):
        def backward(self, rows):
            if rows.stop - rows.start > 1:
                raise torch.OutOfMemoryError("no memory for so many")
            return super().backward(rows)

    device = torch.device("cpu")
    loss, parts = adapters._first_step(Large(work(module)), device)
    assert parts == 4 and (pytest.approx(loss, rel=1e-6), 1) == adapters._first_step(Klora(work(module)), device)


def test_pefts_layers_are_those_that_peft_makes(module):
    peft = pytest.importorskip("peft", reason="pip install -e '.[test]' brings peft")
    given = work(copy.deepcopy(module).to(torch.bfloat16), dtype=torch.bfloat16)
    ours = trainers.PeftMixedBatch(given).model
    about = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(trainers.LINEARS))
    plain = peft.get_peft_model(given.copy(), about, adapter_name="0").eval()
    for name in ("1", "2", "3"):
        plain.add_adapter(name, about)
    assert [(n, p.shape, p.dtype) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in plain.named_parameters()
    ]
    assert {p.dtype for n, p in ours.named_parameters() if ".lora_" in n} == {torch.float32}
    plain.load_state_dict(ours.state_dict())
    logits = [m(input_ids=given.tokens, adapter_names=["3", "0", "2", "1"]).logits for m in (ours, plain)]
    assert torch.equal(*logits)


def test_losses_are_shown_and_not_hidden():
    def row(ms, **more):
        return {"ms": {"p50": ms}, **more}

    rows = {
        "klora": row(10.0),
        "klora-mixed-ranks": row(1.0),
        "klora-int6": row(12.0, base_bytes={"ratio": 0.39}),
        "peft-one-by-one": row(50.0, ms_set_adapter_left_out={"p50": 39.0}),
        "compiled-bmm": row(12.0),
    }
    found = {verdict["what"]: (verdict["found"], verdict["is_reached"]) for verdict in verdicts(rows)}
    assert found == {
        "times faster than peft-one-by-one": (5.0, True),
        "times faster than peft-one-by-one, set_adapter left out": (3.9, False),
        "times faster than compiled-bmm": (1.2, False),
        "bytes of the base at six bits, of those in the model's dtype": (0.39, True),
        "time with a base at six bits, of that in the model's dtype": (1.2, False),
    }
    assert {verdict.get("by") for verdict in verdicts(rows)} == {"klora", None}
    faster = rows | {"klora-compiled": row(4.0), "klora-compiled-fused": row(5.0)}
    faster["klora-int6"] = row(3.0, base_bytes={"ratio": 0.39})
    found = {verdict["what"]: (verdict.get("by"), verdict["found"]) for verdict in verdicts(faster)}
    assert found["times faster than compiled-bmm"] == ("klora-compiled", 3.0)
    assert found["times faster than peft-one-by-one"] == ("klora-compiled", 12.5)
    assert found["time with a base at six bits, of that in the model's dtype"] == (None, 0.3)
    assert {name.partition(",")[0] for name in FASTER} <= set(ROWS)
    assert verdicts({"compiled-bmm": row(12.0)}) == []


def test_a_model_of_another_kind_is_refused(tmp_path, without_a_gpu):
    import transformers

    place = saved(tmp_path / "other")
    config = transformers.GPT2Config(vocab_size=290, bos_token_id=0, eos_token_id=0, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(place)
    with pytest.raises(KloraError, match="holds a GPT2LMHeadModel; wanted: a model of Llama's kind"):
        adapters.load(place, torch.float32)
    with pytest.raises(SystemExit, match="is no folder"):
        adapters.main(tmp_path / "none", tmp_path / "adapters.json", names="", toy=True, **TOY)
    with pytest.raises(SystemExit, match="--toy only tries it"):
        adapters.main(place, tmp_path / "adapters.json", names="", toy=False, **TOY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.is_ours])
def test_a_step_is_one_graph_and_right_in_bf16(name, monkeypatch):
    """Most of its time goes into compiling kernels. Here one set of them serves the gate and the step of every row:
    linears of one shape, and ranks up to one that all rows share. None is below 4, where the draws would be too few."""
    monkeypatch.setattr(torch, "compile", COMPILE)
    module = tiny_llama(**SIZES | {"intermediate_size": 64}, num_key_value_heads=4, num_hidden_layers=GATE["layers"])
    given = work(module.to(torch.bfloat16), (4, 8, 12, 16) if ROWS[name].is_mixed else (16,) * 4, dtype=torch.bfloat16)
    given = replace(given, tokens=given.tokens.cuda())
    errors = gate(given, ROWS[name], name)
    assert errors["bfloat16"]["error"] <= errors["bfloat16"]["allowed"]
    row = timed(given, ROWS[name], 1)
    assert row["captured"] == ROWS[name].captures, row.get("why_not_captured")
    assert (row["graphs"] > 0) == name.startswith("klora-compiled") and row["graph_breaks"] == 0
    assert row["peak_bytes"] > 0
