"""What runs attention in training: names, refusals, that the named one runs, that auto takes the fastest."""

import dataclasses
import json
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, randomized, replayed
from klora.bench.attention import ENTRIES, SHAPES, plain_attention
from klora.bench.record import run_group, validate
from klora.bench.step import ENTRIES as STEP
from klora.bench.tolerance import assert_as_exact
from klora.cli import train as train_command
from klora.install import pip_install, pip_install_from
from klora.kernels.attention import (
    CHOICES,
    PACKAGES,
    attend,
    auto,
    auto_attention,
    causal_attention,
    causal_attention_ref,
    choices,
    explain_attention,
    why_not,
)
from klora.model import attention
from klora.model.attention import choose_attention, require_attention
from klora.model.config import ConfigError, ModelConfig, TrainConfig
from klora.model.fused import FusedStep
from klora.model.gpt import GPT
from klora.model.loading import load_run
from klora.model.network import Adapters, BlockAdapters, Lora
from klora.model.parallel import Ranks
from klora.model.train import Trainer
from klora.model.weights import frozen_weights
from test_cli import klora
from test_train import ALONE, small_preset
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def calls(monkeypatch):
    """The three packages as modules that call PyTorch's plain attention; what they were called with."""
    made = []

    def install(name, returns):
        def flash_attn_func(q, k, v, causal=False):
            assert causal
            made.append((name, q.shape, k.shape, v.shape))
            return returns(causal_attention_ref(q, k, v, "math"))

        module = ModuleType(PACKAGES[name].module)
        module.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, PACKAGES[name].module, module)

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    install("fa4", lambda out: (out, None))
    install("fa3", lambda out: out)
    install("fa2", lambda out: out)
    return made


def not_installed(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(choices, "distribution", missing)


def test_the_config_takes_every_choice_and_nothing_else():
    for name in ("auto", *CHOICES):
        assert TrainConfig().override({"attention": name}).attention == name
    with pytest.raises(ConfigError, match="attention='fa5' is not possible; allowed: one of auto, klora, cudnn, flash"):
        TrainConfig(attention="fa5")
    assert TrainConfig().attention == "auto"


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    not_installed(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    advice = {
        "fa2": pip_install("flash-attn", "--no-build-isolation"),
        "fa3": pip_install_from("https://download.pytorch.org/whl/cu128", "flash-attn-3"),
        "fa4": pip_install("fa4"),
    }
    for name, command in advice.items():
        wanted = f"the package {PACKAGES[name].distribution} is not installed: {command}"
        assert why_not(name, CUDA, torch.bfloat16, 64) == wanted


@pytest.mark.parametrize(
    ("name", "says"),
    [("fa3", "it wants a CUDA GPU"), ("klora", "our kernel wants a CUDA GPU"), ("cudnn", "float32 with head size 8")],
)
def test_what_cannot_run_here_is_refused_and_what_can_is_named(name, says):
    with pytest.raises(ConfigError, match=f"attention={name} is not possible: .*{says}.*; allowed here: auto, .*math"):
        require_attention(name, SMALL, CPU, torch.float32)


@pytest.mark.parametrize("name", PACKAGES)
def test_what_cannot_keep_documents_apart_is_refused_by_name(name):
    says = (
        f"attention={name} is not possible: .* takes no document mask: document_mask=false runs it; allowed here: auto"
    )
    with pytest.raises(ConfigError, match=says):
        require_attention(name, SMALL, CPU, torch.float32, documents=True)
    q, start = torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{name} takes no document mask; allowed: cudnn, flash, efficient, math"):
        attend(q, q, q, name, start)


def test_a_configured_backend_without_a_document_mask_is_replaced_and_it_is_said(monkeypatch):
    monkeypatch.setattr(attention, "why_not_here", lambda name, *about: "no mask" if about[-1] else "")
    model = randomized()
    model.attention = "flash"
    chosen = choose_attention(model, "auto", 4, 64, ALONE, capture=False, documents=True, configured="the first")
    assert chosen.name == model.attention == "math" and "flash takes no document mask" in chosen.why


def test_it_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "prepare_first", lambda *_: pytest.fail("the text was read"))
    wrong = klora("train", "--set", "attention=fa4", "--device", "cpu", "--out", tmp_path / "run", check=2)
    assert "attention=fa4 is not possible: it wants a CUDA GPU" in wrong.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_called_by_its_public_function_with_the_groups_as_they_are(name, calls):
    q, k, v = (torch.randn(2, 9, heads, 16) for heads in (4, 2, 2))
    assert torch.equal(attend(q, k, v, name), causal_attention_ref(q, k, v, "math"))
    assert calls == [(name, q.shape, k.shape, v.shape)]


def gradients(model, tokens):
    return torch.autograd.grad(model.nll(tokens[:, :-1], tokens[:, 1:]).mean(), list(model.parameters()))


def test_the_chosen_one_is_what_a_training_step_runs_and_nothing_else_does(calls):
    tokens = torch.randint(3, 300, (2, 65), generator=torch.Generator().manual_seed(0))
    model = randomized()
    plain = gradients(model, tokens)
    model.chosen_attention = "fa4"
    for found, expected in zip(gradients(model, tokens), plain, strict=True):
        torch.testing.assert_close(found, expected)
    assert [call[0] for call in calls] == ["fa4"] * SMALL.blocks

    config = TrainConfig(batch_tokens=128, micro_batch_tokens=128)
    step = FusedStep(model, config, 2, 1, Ranks(0, 1, CPU))
    calls.clear()
    step.run([tokens], 0, 0.5)
    assert [call[0] for call in calls] == ["fa4"] * SMALL.blocks

    calls.clear()
    assert frozen_weights(model).chosen == "klora"
    model.logits(tokens[:, :4], model.cache(batch=2, length=8))
    rows = sum(SMALL.qkv_sizes)
    lora = Lora(torch.zeros(2, 3, 4, SMALL.width), torch.zeros(2, rows, 4))
    model.hidden(tokens[:, :-1], Adapters(None, [BlockAdapters(lora, bias=torch.zeros(2, SMALL.width))] * SMALL.blocks))
    assert not calls


def faked(monkeypatch, times):
    """Let auto measure on a CPU; `times` are its milliseconds, or what measuring raises."""

    def milliseconds(model, name, rows, length, capture, documents):
        assert (rows, length) == (4, 64)
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    monkeypatch.setattr(attention, "TIMED_ON", ("cpu",))
    monkeypatch.setattr(attention, "milliseconds", milliseconds)
    monkeypatch.setattr(attention, "why_not_here", lambda name, *_: "no kernel" if name == "efficient" else "")
    not_installed(monkeypatch)


TIMES = {"klora": 2.5, "cudnn": 1.25, "flash": RuntimeError("out of memory. Tried to allocate")}


def test_auto_takes_the_fastest_and_says_the_times(monkeypatch):
    faked(monkeypatch, TIMES)
    model = randomized()
    chosen = choose_attention(model, "auto", 4, 64, ALONE, capture=False)
    assert model.chosen_attention == chosen.name == "cudnn"
    assert str(chosen) == (
        "cudnn: the fastest, in ms a block forward and backward at [4, 64, 4, 8] in float32: cudnn 1.250, klora 2.500; "
        "not here: flash (out of memory), efficient (no kernel), fa2 (not installed), fa3 (not installed), "
        "fa4 (not installed)"
    )


def test_all_ranks_take_what_is_fastest_on_the_slowest_of_them(monkeypatch):
    class Two(Ranks):
        def most(self, *values):
            return [max(pair) for pair in zip(values, (1.0, 9.0, *values[2:]), strict=True)]

    faked(monkeypatch, TIMES)
    assert choose_attention(randomized(), "auto", 4, 64, Two(0, 2, CPU), capture=False).name == "klora"


def test_a_resumed_run_keeps_to_what_it_began_with(monkeypatch):
    faked(monkeypatch, TIMES)
    model = randomized()
    options = {"rows": 4, "length": 64, "ranks": ALONE, "capture": False}
    assert str(choose_attention(model, "auto", began="klora", **options)) == "klora: as the run began"
    assert choose_attention(model, "auto", began="", **options).name == "cudnn"


def test_one_asked_for_by_name_is_timed_alone_or_refused(monkeypatch):
    faked(monkeypatch, TIMES)
    chosen = choose_attention(randomized(), "klora", 4, 64, ALONE, capture=False)
    assert str(chosen) == "klora: asked for by name; 2.500 ms a block forward and backward at [4, 64, 4, 8] in float32"
    with pytest.raises(
        ConfigError, match="attention=flash is not possible in a CUDA graph, .*: out of memory; allowed"
    ):
        choose_attention(randomized(), "flash", 4, 64, ALONE, capture=True)


def test_where_nothing_can_be_timed_the_configured_backend_runs_and_it_is_said(monkeypatch):
    faked(monkeypatch, dict.fromkeys(TIMES, RuntimeError("out of memory")))
    model = randomized()
    chosen = choose_attention(model, "auto", 4, 64, ALONE, capture=False, configured="the first that runs")
    assert model.chosen_attention == chosen.name == model.attention
    assert chosen.why.startswith("the first that runs; nothing could be timed; not here: klora (out of memory), cudnn")


def test_what_is_timed_is_the_whole_piece(monkeypatch):
    """Unmocked, on a CPU: flash runs and is timed; ours, cuDNN and the packages say why they are not."""
    monkeypatch.setattr(attention, "WARM_UP", 0.0)
    model = randomized()
    times, refused = attention.measure(model, attention.TIMED, 2, 64, capture=False)
    assert times.keys() == {"flash"} and times["flash"] > 0
    assert refused.keys() == set(CHOICES) - {"flash", "math"}


@pytest.mark.slow
def test_the_choice_is_in_the_result_and_in_run_json(tmp_path, data, monkeypatch):
    ran = set()

    def recorded(q, k, v, backend="math", start=None):
        ran.add(backend)
        return causal_attention_ref(q, k, v, backend, start)

    monkeypatch.setattr(choices, "causal_attention_ref", recorded)
    trainer = Trainer(small_preset(attention="math", max_steps=1), data, tmp_path, ALONE)
    ran.clear()
    result = trainer.run()
    assert ran == {"math"} and result.attention == "math: asked for by name"
    assert json.loads((tmp_path / "run.json").read_text())["attention"] == {"name": "math", "why": "asked for by name"}
    assert load_run(tmp_path)[1]["provenance"]["result"]["attention"] == result.attention


@pytest.mark.parametrize("fused", ["false", "true"])
def test_a_cpu_takes_what_it_took_and_says_so(tmp_path, data, fused):
    trainer = Trainer(small_preset(fused=fused), data, tmp_path, ALONE)
    assert str(trainer.attention) == "flash: the CPU's blocked kernel"
    assert trainer.model.attention == "flash" and trainer.model.chosen_attention == "klora"


@pytest.mark.slow
def test_records_of_a_step_name_what_ran_attention():
    ceilings = {"bytes_per_second": 1e10, "flops_per_second": 1e11}
    record = run_group("step", STEP, ceilings, CPU, torch.float32, toy=True, rounds=(2, 2))
    named = {result["variant"]: result.get("attention") for result in record["results"]}
    validate(record)
    assert set(named.values()) == {"flash: the CPU's blocked kernel"} and named.keys() == {"eager", "original", "klora"}


def test_the_bench_has_every_package_and_heads_up_to_256():
    assert {shape["d"] for shape in SHAPES.values()} == {64, 80, 96, 128, 256}
    whole = [entry for entry in ENTRIES if entry.op in ("attention_forward", "attention_forward_backward")]
    assert len(whole) == 2
    for entry in whole:
        missing = entry.missing(CPU)
        assert all(package.distribution in missing for package in PACKAGES.values())
    packed = [entry for entry in ENTRIES if entry.op.startswith("attention_varlen")]
    assert len(packed) == 2 and all("flash-attn" in entry.missing(CPU) for entry in packed)


@pytest.mark.slow
def test_doctor_lists_the_choices():
    facts = json.loads(klora("doctor", "--device", "cpu", "--json").stdout)
    assert facts["attention choices"].keys() == set(CHOICES)
    assert facts["attention choices"]["flash"] == "runs here" and "CUDA GPU" in facts["attention choices"]["fa3"]
    assert facts["attention in training"] == "flash: the CPU's blocked kernel"
    assert {package.distribution for package in PACKAGES.values()} <= facts["missing"].keys()


# Without a model: auto_attention


def heads(length=20, d=16, device="cpu", dtype=torch.float32):
    """q, k and v of 4 heads over 2 groups, of which q and v want gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, n, d, generator=generator).to(device, dtype) for n in (4, 2, 2))
    return q.requires_grad_(), k, v.requires_grad_()


@pytest.fixture
def timed(monkeypatch):
    """auto_attention as if a CPU were worth measuring; the shapes that it measured."""
    met = []

    def measure(q, k, v):
        met.append((tuple(q.shape), auto._wants_gradients(q, k, v)))
        return {"flash": 0.5, "klora": 0.75}, {"cudnn": "no GPU"}

    monkeypatch.setattr(auto, "TIMED_ON", ("cpu",))
    monkeypatch.setattr(auto, "_CHOSEN", {})
    monkeypatch.setattr(auto, "_MET", {})
    monkeypatch.setattr(auto, "measure", measure)
    return met


def ran(monkeypatch):
    """Names that auto_attention runs from now on."""
    names, run = [], auto._run
    monkeypatch.setattr(auto, "_run", lambda name, *about: names.append(name) or run(name, *about))
    return names


def test_auto_attention_measures_a_shape_once_and_runs_the_fastest(timed, monkeypatch):
    names = ran(monkeypatch)
    q, k, v = heads(20)
    out = auto_attention(q, k, v)
    torch.testing.assert_close(out, causal_attention_ref(q, k, v))
    auto_attention(*heads(31))
    assert timed == [((2, 20, 4, 16), True)] and names == ["flash", "flash"]
    auto_attention(*heads(32))
    with torch.no_grad():
        auto_attention(q, k, v)
    assert timed[1:] == [((2, 32, 4, 16), True), ((2, 20, 4, 16), False)]
    chosen = explain_attention(q, k, v)
    assert len(timed) == 3 and (chosen.name, chosen.times["klora"]) == ("flash", 0.75)
    assert str(chosen) == (
        "flash: the fastest, forward and backward; flash 0.500 ms; klora 0.750 ms; not cudnn: no GPU"
    )


def test_what_is_kept_of_shapes_is_bounded_and_a_wrong_one_is_never_taken_for_a_known(timed, monkeypatch):
    monkeypatch.setattr(auto, "MOST_MET", 2)
    for length in (16, 17, 18, 19, 20):
        auto_attention(*heads(length))
    assert len(auto._MET) <= 2 and len(timed) == 1
    q, k, v = heads(20)
    for wrong in ((q, k.double(), v), (q, k, v.to("meta")), (q, k, v[..., :8])):
        with pytest.raises(ValueError, match="wanted"):
            auto_attention(*wrong)


def test_nothing_to_do_is_not_measured(timed):
    for q, k, v in (heads(0), (t[:0].detach() for t in heads())):
        assert auto_attention(q, k, v).shape == q.shape
    assert not timed


def test_what_must_be_deterministic_or_keeps_documents_apart_is_ours_and_not_measured(timed, monkeypatch):
    names = ran(monkeypatch)
    q, k, v = heads()
    auto_attention(q, k, v, deterministic=True)
    auto_attention(q, k, v, start=torch.zeros(2, 20, dtype=torch.int32))
    torch.use_deterministic_algorithms(True)
    try:
        auto_attention(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    assert names == ["klora"] * 3 and not timed


def test_a_choice_by_name_is_what_runs_and_others_are_refused(timed, monkeypatch):
    names = ran(monkeypatch)
    q, k, v = heads()
    for name in ("klora", "flash", "math"):
        torch.testing.assert_close(auto_attention(q, k, v, choice=name), causal_attention_ref(q, k, v))
    assert names == ["klora", "flash", "math"] and not timed
    with pytest.raises(ValueError, match="choice is 'fa5'; wanted one of auto, klora, cudnn"):
        auto_attention(q, k, v, choice="fa5")
    with pytest.raises(ValueError, match="choice is 'flash' and deterministic is True; allowed with it: 'auto', "):
        auto_attention(q, k, v, choice="flash", deterministic=True)
    with pytest.raises(ValueError, match=r"k is float32 \[2, 5, 2, 16\]; wanted float32 \[2, 20, G, 16\]"):
        auto_attention(q, k[:, :5], v)
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
        auto_attention(q, k, v, choice="cudnn")


def test_what_is_measured_runs_and_leaves_the_tensors_alone(monkeypatch):
    monkeypatch.setattr(auto, "ROUNDS", 1)
    q, k, v = heads()
    before = torch.get_rng_state()
    times, refused = auto.measure(q, k, v)
    assert {"klora", "flash"} <= times.keys() and "cudnn" in refused
    assert times.keys() | refused.keys() == set(auto.TIMED) and list(times.values()) == sorted(times.values())
    assert q.grad is None and v.grad is None and torch.equal(torch.get_rng_state(), before)


def test_where_nothing_can_be_measured_a_rule_decides(monkeypatch):
    monkeypatch.setattr(auto, "TIMED_ON", ("cpu",))
    monkeypatch.setattr(auto, "why_not", lambda name, *about: "not here" if name == "cudnn" else "")
    rule = auto._name_by_rule
    assert rule(CPU, torch.bfloat16, 64, 4, 2) == rule(CPU, torch.float32, 128, 4, 2) == "klora"
    assert rule(CPU, torch.bfloat16, 128, 4, 2) == "flash"
    assert rule(CPU, torch.float64, 64, 4, 2) == rule(CPU, torch.float32, 20, 4, 2) == "math"
    monkeypatch.setattr(auto, "why_not", lambda name, *about: "not here")
    assert rule(CPU, torch.bfloat16, 128, 4, 2) == "klora"


def one_more(q, k, v, choice="auto"):
    return auto_attention(q, k, v, choice=choice) + 1


def with_gradients(attention, q, k, v):
    """out, and the gradients of q and v, which `heads` says are wanted."""
    out = attention(q, k, v)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, (q, v), dout)]


def check_auto_compiles(inputs, backend, **options):
    """Beside what the rule names, which need not be what is the fastest outside of the compiler."""
    options = {"fullgraph": True, "backend": backend, **options}
    name = torch.compile(lambda q, k, v: explain_attention(q, k, v).name, **options)(*inputs)
    exact = with_gradients(lambda q, k, v: plain_attention(q, k, v) + 1, *doubled(inputs))
    by_name = with_gradients(lambda q, k, v: one_more(q, k, v, name), *inputs)
    assert_as_exact(with_gradients(torch.compile(one_more, **options), *inputs), exact, by_name)


def doubled(inputs):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]


@pytest.mark.slow
def test_auto_attention_compiles(timed):
    check_auto_compiles(heads(), "aot_eager")
    assert not timed, "nothing is measured under torch.compile"


@pytest.mark.slow
def test_auto_attention_compiles_where_sizes_are_symbols(timed):
    """Batch and length stay symbols; another size of head compiles again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(one_more, fullgraph=True, backend=counter)
    for batch, length, d, graphs in ((2, 20, 16, 1), (3, 31, 16, 1), (2, 20, 32, 2), (4, 9, 32, 2)):
        inputs = [t.detach()[:1].repeat(batch, 1, 1, 1) for t in heads(length, d)]
        for t in inputs:
            torch._dynamo.mark_dynamic(t, (0, 1))
        torch.testing.assert_close(compiled(*inputs), one_more(*inputs, choice="math"))
        assert counter.frame_count == graphs
    check_auto_compiles(heads(), "aot_eager", dynamic=True)


def of_pytorch(q, k, v):
    """A kernel of PyTorch's in blocks, called by itself. It rounds p to the dtype, as all in blocks do. PyTorch's plain
    attention is another yardstick: it computes 16 bits in fp32, and rounds once.
    """
    k, v = (t.repeat_interleave(q.size(2) // k.size(2), 2) for t in (k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)


def check_exact(inputs, names, attention=auto_attention):
    exact, yardstick = plain_attention(*doubled(inputs)), of_pytorch(*inputs)
    for name in names:
        assert_as_exact([attention(*inputs, choice=name)], [exact], [yardstick])


def test_each_choice_is_as_exact_as_a_kernel_of_pytorch_s_and_a_wrong_one_is_not():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = heads(dtype=dtype)
        check_exact(inputs, ("klora", "flash", "math"))
        for wrong in (
            lambda q, k, v, choice: auto_attention(1.01 * q, k, v, choice=choice),
            lambda q, k, v, choice: auto_attention(q, k.roll(1, 1), v.roll(1, 1), choice=choice),
        ):
            with pytest.raises(AssertionError, match="output 0: error"):
                check_exact(inputs, ("flash",), wrong)


def test_trying_what_runs_is_unheard_and_needs_no_gradients_outside(monkeypatch):
    def refuse(q, k, v, *about):
        warnings.warn("this kernel was not used because", stacklevel=1)
        raise RuntimeError("No available kernel")

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert not why_not("flash", CPU, torch.float32, 16)
        monkeypatch.setattr(choices, "causal_attention_ref", refuse)
        assert "No available kernel" in why_not("flash", CPU, torch.float32, 16)
        times, refused = auto.measure(*heads())
    assert times.keys() == {"klora"} and set(refused.values()) == {"No available kernel"}
    assert not heard


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestAutoOnGpu:
    @pytest.mark.parametrize("d", [64, 80, 128, 256])
    def test_the_fastest_is_as_exact_as_pytorch_s_and_its_times_are_named(self, d, monkeypatch):
        monkeypatch.setattr(auto, "_CHOSEN", {})
        monkeypatch.setattr(auto, "_MET", {})
        q, k, v = heads(300, d, "cuda", torch.bfloat16)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            chosen = explain_attention(q, k, v)
        assert not heard
        assert chosen.times[chosen.name] == min(chosen.times.values()) and "klora" in chosen.times
        assert torch.equal(auto_attention(q, k, v), auto_attention(q, k, v, choice=chosen.name))
        check_exact((q, k, v), chosen.times)

    def test_a_graph_takes_what_was_found_before_it_and_else_ours(self, monkeypatch):
        monkeypatch.setattr(auto, "_CHOSEN", {})
        monkeypatch.setattr(auto, "_MET", {})
        names = ran(monkeypatch)
        q, k, v = (t.detach() for t in heads(256, 128, "cuda", torch.bfloat16))
        causal_attention(q, k, v)
        replayed(lambda: [auto_attention(q, k, v)])
        assert names == ["klora"]
        expected = auto_attention(q, k, v)
        (out,), replay = replayed(lambda: [auto_attention(q, k, v)])
        replay()
        assert torch.equal(out, expected) and names[-1] == names[-2] == explain_attention(q, k, v).name

    @pytest.mark.parametrize("d", [64, 128])
    def test_it_compiles(self, d):
        check_auto_compiles(heads(256, d, "cuda", torch.bfloat16), "inductor")
        check_auto_compiles(heads(300, d, "cuda", torch.bfloat16), "inductor", dynamic=True)


WIDE = ModelConfig(vocab_size=300, width=256, blocks=4, heads=4, kv_heads=2, mlp_hidden=512, bigram_width=16)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def on_gpu(dtype=torch.bfloat16) -> GPT:
    model = GPT(WIDE)
    model.load_state_dict(randomized(WIDE).state_dict())
    model.configure(CUDA, dtype)
    return model


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in CHOICES])
def test_every_choice_takes_the_training_step_of_the_reference(name):
    reason = attention.why_not_here(name, WIDE, CUDA, torch.bfloat16)
    if reason:
        with pytest.raises(ConfigError, match=f"attention={name} is not possible"):
            choose_attention(on_gpu(), name, 2, 256, Ranks(0, 1, CUDA), capture=True)
        return
    tokens = torch.randint(3, 300, (2, 257), generator=torch.Generator().manual_seed(0)).cuda()

    def flat(grads):
        return [torch.cat([grad.flatten() for grad in grads])]

    def eager(model):
        model.backend, model.attention = "reference", "math"
        return flat(gradients(model, tokens))

    model = on_gpu()
    assert choose_attention(model, name, 2, 256, Ranks(0, 1, CUDA), capture=True).name == name
    config = dataclasses.replace(TrainConfig(), batch_tokens=512, micro_batch_tokens=512, grad_clip=1e9)
    step = FusedStep(model, config, 2, 1, Ranks(0, 1, CUDA), 256)
    step.rates.zero_()
    step.tokens.copy_(tokens)
    step.replay()
    exact = eager(on_gpu(None).double())
    assert_as_exact(flat(parameter.grad for parameter in model.parameters()), exact, eager(on_gpu()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("capture", [True, False])
def test_auto_on_a_gpu_names_the_times_of_what_runs(capture):
    for documents in (False, True):
        check_times({"capture": capture, "documents": documents})


def check_times(about):
    model = on_gpu()
    before = torch.cuda.get_rng_state()
    chosen = choose_attention(model, "auto", 8, 1024, Ranks(0, 1, CUDA), **about)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert model.chosen_attention == chosen.name and chosen.why.startswith("the fastest, in ms a block")
    timed, _, refused = chosen.why.partition("; not here")
    for name in ("klora",) if about["documents"] else ("klora", "cudnn", "flash"):
        assert f"{name} " in timed
    assert all((f"{name} " in timed) != (f"{name} (" in refused) for name in attention.TIMED)
