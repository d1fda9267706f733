"""The audit of our own models: the honest scorer and what is called valid pass, in every config, and nothing else."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, randomized
from forks import Forked
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from klora.kernels import BOS_ID
from klora.model.artifact import save_artifact
from klora.model.gpt import GPT
from klora.model.loading import model_from_artifact
from klora.model.weights import frozen_weights
from klora.ttt import model_audit
from klora.ttt.adapters import Slots
from klora.ttt.audit import audit
from klora.ttt.base import BaseNll
from klora.ttt.documents import Document
from klora.ttt.engine import engine_of
from klora.ttt.model_audit import ROUNDING as ALLOWED
from klora.ttt.model_audit import (
    SWAPPED,
    audit_model,
    borders,
    full_softmax,
    in_float64,
    measured_rounding,
    promises_bits,
    scorer_of,
)
from klora.ttt.phases import groups_of
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.protocols import TARGETS, TTTConfig
from klora.ttt.queue import Deadline
from klora.ttt.results import NLL_ROUNDING, SHORT, with_adaptation
from klora.ttt.step import EngineStep
from test_audit import DOCUMENTS, VOCAB, document

reference = sys.modules["klora.kernels.lora_head_nll.reference"]
"""The module, whose name in its package is a function."""
TINY = dataclasses.replace(SMALL, vocab_size=260, width=16, blocks=2, heads=2, kv_heads=1, mlp_hidden=24)
WIDE = dataclasses.replace(TINY, width=128, mlp_hidden=192)
STRICT = TTTConfig(layout="start", chunk=8, window=32, lora_rank=2, head_rank=3, lr=0.02, temperature=1.0)
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def model() -> GPT:
    return randomized(TINY).requires_grad_(False)


def sure_model(token: int, factor: float, config=TINY) -> GPT:
    """A model whose longest row of the embedding is that of `token`: after itself it is all but certain."""
    model = randomized(config).requires_grad_(False)
    model.embed[token] *= factor
    return model


def sure_document(token: int, targets: int) -> np.ndarray:
    """Few words, `token` again and again, and a surprise in the middle of it and near its end."""
    tokens = np.array([BOS_ID, 5, 9, *[token] * (targets - 2)], np.uint16)
    tokens[[targets // 2, -4]] = 7
    return tokens


BELOW = 4.5e-6
"""Nats below 0 that a fused kernel's rounding gave a target of a trained model, with logits of up to 30."""


@pytest.fixture
def rounds_below_zero(monkeypatch) -> None:
    """The NLL of the reference ops, which is never below 0, rounded as that kernel's."""
    honest = reference._nll
    monkeypatch.setattr(reference, "_nll", lambda z, targets, *loss: honest(z, targets, *loss) - BELOW * (targets >= 0))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_score_first_passes(model, context):
    config = STRICT.override({"context": context})
    report = audit(scorer_of(model, config), DOCUMENTS, TINY.vocab_size, tolerance=ROUNDING)
    assert report.passed, str(report)
    check = full_softmax(model, config, DOCUMENTS[0], ROUNDING)
    assert check.passed and f"{'adapted' if context == 'recomputed' else 'base'} model" in check.evidence


@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_a_model_that_is_all_but_certain_passes(context, monkeypatch, rounds_below_zero):
    """Its NLLs round below 0, in the base pass and in the engine's."""
    monkeypatch.setitem(SWAPPED, "cpu", 2**11)
    sure, config = sure_model(257, 16.0), STRICT.override({"context": context})
    documents = [sure_document(257, 30), sure_document(257, 6)]
    lowest = [nll.min() for nll in scorer_of(sure, config)(documents)]
    assert max(lowest) < 0 and min(lowest) > -NLL_ROUNDING
    report = audit_model(sure, config, documents)
    assert report.passed, str(report)


def test_the_rounding_between_passes_is_measured_on_the_model(monkeypatch):
    sure, documents = sure_model(144, 16.0, WIDE), [sure_document(144, 32), document(32, 1), document(1, 2)]
    exactly = measured_rounding(sure, STRICT, documents)
    assert exactly.tolerance == ALLOWED[torch.float32] and "what float32 is always allowed" in str(exactly)
    sure.configure(torch.device("cpu"), torch.bfloat16)
    roughly = measured_rounding(sure, STRICT, documents)
    weights = frozen_weights(sure)
    named = [Document("a", tokens, 1) for tokens in documents]
    nll, exact = (BaseNll(of, named, STRICT, backend="reference").nll for of in (weights, in_float64(weights)))
    assert roughly.tolerance > ALLOWED[torch.bfloat16] and "of 65 targets, twice" in str(roughly)
    assert roughly.tolerance == pytest.approx(2 * np.abs(nll - exact).max(), rel=0.25)
    hotter = measured_rounding(sure, STRICT.override({"temperature": 0.5}), documents)
    assert hotter.tolerance > 1.5 * roughly.tolerance
    assert "of 99 targets" in str(measured_rounding(sure, STRICT, [*documents, document(34, 3)]))
    monkeypatch.setattr(model_audit, "MOST_MEASURED", 20)
    assert "of 20 targets" in str(measured_rounding(sure, STRICT, documents))


def test_weights_in_float64_are_those_of_a_model_in_float64(model):
    named = [Document("a", DOCUMENTS[0], 1)]
    wide = GPT(TINY).to(torch.float64).requires_grad_(False)
    wide.load_state_dict(model.state_dict())
    wide.configure(torch.device("cpu"), torch.float64)
    found = [BaseNll(of, named, STRICT).nll for of in (in_float64(frozen_weights(model)), wide)]
    np.testing.assert_allclose(*found, atol=2e-6)


def test_the_full_softmax_differs_by_the_rounding_of_one_pass():
    """In bf16 the recorded NLLs are compared with those of float64, adapters and all."""
    rough = randomized(WIDE).requires_grad_(False)
    rough.configure(torch.device("cpu"), torch.bfloat16)
    tokens = DOCUMENTS[2]
    weights, named = frozen_weights(rough), [Document("a", tokens, 1)]
    nll, exact = (BaseNll(of, named, STRICT).nll for of in (weights, in_float64(weights)))
    apart = float(np.abs(nll - exact).max())
    assert f"within {apart:.3g} nats" in full_softmax(rough, STRICT, tokens, 0.1).evidence
    adapted = full_softmax(rough, STRICT, DOCUMENTS[0], measured_rounding(rough, STRICT, DOCUMENTS).tolerance)
    assert adapted.passed and adapted.evidence.startswith("adapted model")
    full = STRICT.override({"targets": "q,k,v,o,up,down,head", "lr": 0.05, "temperature": 0.9})
    exactly = randomized(WIDE, torch.float64).requires_grad_(False)
    exactly.configure(torch.device("cpu"), torch.float64)
    assert full_softmax(exactly, full, DOCUMENTS[0], 1e-12).passed


def test_our_own_scorer_is_held_to_the_bits_that_it_promises(model, monkeypatch):
    """A difference that the rounding between passes would hide; a tolerance that is given is for every check."""
    honest = scorer_of(model, STRICT)
    monkeypatch.setitem(SWAPPED, "cpu", 2**9)

    def dearer(documents):
        first, *rest = honest(documents)
        return [first + np.float32(5e-5), *rest]

    monkeypatch.setattr(model_audit, "scorer_of", lambda *arguments: dearer)
    assert {"alone", "order", "company"} <= set(audit_model(model, STRICT, DOCUMENTS[1:]).failed)
    report = audit_model(model, STRICT, DOCUMENTS[1:], tolerance=1e-4)
    assert report.passed and str(report.rounding) == "two passes may differ by 0.0001 nats: as was given"
    assert report.to_json()["tolerance"] == 1e-4 and f"\nrounding: {report.rounding}\n" in str(report)


TRACES = ["params", "exp_avg", "exp_avg_sq", "step"]


@pytest.mark.parametrize("kept", TRACES)
def test_what_a_slot_keeps_of_the_document_before_is_seen(model, monkeypatch, kept):
    """Few documents have a slot each: none is used twice, and other checks see nothing."""
    monkeypatch.setitem(SWAPPED, "cpu", 2**9)
    honest = Slots.start

    def start(self, slots):
        before = getattr(self, kept).clone()
        honest(self, slots)
        getattr(self, kept).copy_(before)

    monkeypatch.setattr(Slots, "start", start)
    report = audit_model(model, STRICT, DOCUMENTS[:2])
    assert report.failed == ("one slot",) and "a slot keeps what was before" in str(report), str(report)


def test_nats_that_are_not_the_sum_of_the_targets_are_seen(model, monkeypatch):
    """Of each document the better of two, which its targets' NLLs do not show, and which here is always the adapted
    model's: but for ascending tokens.
    """
    monkeypatch.setitem(SWAPPED, "cpu", 2**9)

    def better(draft, *adapted):
        found = with_adaptation(draft, *adapted)
        return dataclasses.replace(found, adapted_nats=min(found.adapted_nats, draft.base_nats))

    monkeypatch.setattr("klora.ttt.pipeline.with_adaptation", better)
    report = audit_model(model, STRICT, DOCUMENTS[:2])
    assert report.failed == ("sums",) and "are off by a share of" in str(report), str(report)


def test_a_fault_at_the_borders_of_chunks_is_seen(model, monkeypatch):
    """The last target of a chunk of 64 that is scored after the step that has learned from it."""
    monkeypatch.setitem(SWAPPED, "cpu", 2**9)
    honest = EngineStep.train

    def train(self):
        honest(self)
        slots, inputs, targets, place = self._inputs()
        self._write(self._nll(slots, inputs, targets, None)[:, -1:], place[:, -1:])

    monkeypatch.setattr(EngineStep, "train", train)
    documents = [document(100, 0), document(30, 1)]
    config = STRICT.override({"chunk": 64, "window": 96})
    assert borders(config, documents) == [[64, 65], []]
    report = audit_model(model, config, documents)
    assert report.failed == ("last target",), str(report)


def test_where_pytorchs_ops_run_on_a_gpu_no_bit_is_promised():
    for width, heads, dtype, promised in (
        (128, 2, torch.bfloat16, True),
        (128, 16, torch.bfloat16, False),  # heads of 8
        (72, 2, torch.float32, False),
        (128, 2, torch.float64, False),
    ):
        config = dataclasses.replace(TINY, width=width, heads=heads)
        embed = SimpleNamespace(device=torch.device("cuda"))
        assert promises_bits(SimpleNamespace(config=config, embed=embed, dtype=dtype)) is promised


@pytest.mark.gpu
@pytest.mark.parametrize("context", ["recomputed", "cached"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_score_first_passes_on_a_gpu(dtype, context):
    """In captured graphs; the same length gives the same bits, whatever the text after it and beside it is.

    The model is all but certain of most targets, and its logits are so large that bf16 rounds them by more than usual.
    """
    on_gpu = sure_model(144, 16.0, WIDE)
    on_gpu.configure(torch.device("cuda"), dtype)
    config = STRICT.override({"context": context, "chunk": 32, "window": 64})
    documents = [sure_document(144, 80), document(12, 12)]
    report = audit_model(on_gpu, config, documents, scorer="engine")
    assert report.passed, str(report)
    assert min(nll.min() for nll in scorer_of(on_gpu, config, "engine")(documents[:1])) < 1e-4
    bits = [check for check in report.checks if check.name in ("repeated", "alone", "order", "company", "later text")]
    assert len(bits) == 5 and all("bit for bit" in check.evidence for check in bits), str(report)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["multi_epoch", "min_nll"])
def test_the_leaky_protocols_fail_for_their_reason(model, protocol):
    config = TTTConfig(
        chunk=8, window=32, min_tokens=16, lora_rank=2, head_rank=3, lr=0.02, protocol=protocol, epochs=3
    )
    report = audit(scorer_of(model, config), DOCUMENTS[:2], TINY.vocab_size, tolerance=ROUNDING, most_swapped=4000)
    assert {"later text", "length", "last target"} <= set(report.failed), str(report)
    assert "a score depends on text after its target" in str(report)


@pytest.mark.slow
def test_the_layout_original_fails_where_documents_are_cut(model):
    """It is not leaky, and no later text of the same length matters; and it is not called valid."""
    config = TTTConfig(chunk=8, window=32, min_tokens=16, lora_rank=2, head_rank=3, lr=0.02)
    report = audit(scorer_of(model, config), DOCUMENTS[:2], TINY.vocab_size, tolerance=ROUNDING, most_swapped=4000)
    assert "length" in report.failed and "later text" not in report.failed, str(report)
    assert not config.is_causal and not config.is_leaky


def test_of_a_document_that_diverges_the_full_softmax_is_the_base_models(model):
    """Which the result has from there."""
    check = full_softmax(model, STRICT.override({"lr": 1e30}), DOCUMENTS[0], ROUNDING)
    assert check.passed and check.evidence.startswith("base model"), check.evidence


@torch.no_grad()
def test_the_full_softmax_shows_an_nll_that_is_not_of_it(model, monkeypatch):
    for tokens, which in ((DOCUMENTS[0], "adapted"), (DOCUMENTS[2], "base")):
        check = full_softmax(model, STRICT.override({"lr": 0.05}), tokens, ROUNDING)
        assert check.passed and check.evidence.startswith(f"{which} model") and "all 260 logits" in check.evidence
    for name in ("klora.ttt.step.head_nll", "klora.ttt.base.softcap_nll"):
        monkeypatch.setattr(name, smaller(name))
    for tokens in (DOCUMENTS[0], DOCUMENTS[2]):
        check = full_softmax(model, STRICT, tokens, ROUNDING)
        assert not check.passed and "differ from the recorded" in check.evidence


def smaller(name: str):
    """The op of that name with its NLL times 0.9."""
    module, op = name.rsplit(".", 1)
    honest = getattr(__import__(module, fromlist=[op]), op)
    return lambda *arguments, **options: 0.9 * honest(*arguments, **options)


OPTIONS = {
    "chunk": st.integers(3, 10),
    "window": st.integers(0, 14),  # more than the chunk
    "adapt_from": st.integers(0, 14),
    "steps_per_chunk": st.integers(1, 2),
    "context": st.sampled_from(["recomputed", "cached"]),
    "targets": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(",".join),
    "lora_rank": st.integers(1, 3),
    "head_rank": st.integers(1, 3),
    **{f"{name}_rank": st.sampled_from([0, 1, 4]) for name in TARGETS if name != "head"},
    **{f"{name}_alpha": st.sampled_from([0.0, 3.0]) for name in TARGETS},
    **{f"{name}_lr": st.sampled_from([1.0, 0.0, 2.0]) for name in (*TARGETS, "bias")},
    "a_scale": st.sampled_from([1.0, 0.5]),
    "lr": st.sampled_from([0.03, 0.03, 0.0]),
    "lr_warmup": st.sampled_from([0, 14]),
    "lr_half": st.sampled_from([0, 14]),
    "beta1": st.sampled_from([0.0, 0.9]),
    "beta2": st.sampled_from([0.95, 0.99]),
    "eps": st.sampled_from([1e-10, 1e-6]),
    "weight_decay": st.sampled_from([0.0, 0.5]),
    "temperature": st.sampled_from([1.0, 0.9]),
    "batch": st.integers(1, 3),
    "phases": st.sampled_from([0, 0, 2]),
    "phase_start": st.sampled_from(["all", "a"]),
    "phase_lr": st.sampled_from([0.001, 0.03]),
    "phase_passes": st.integers(1, 2),
    "phase_chunks": st.integers(1, 4),
    "adapter_seed": st.integers(0, 3),
}
"""Values, in small numbers, of every option that a config which is called valid may have more than one of."""


def test_every_option_is_drawn_or_has_no_say_in_a_valid_score():
    """One value of the protocol and of the layout is valid, and no deadline is; the others are of the leaky ones."""
    fixed = {"protocol", "layout", "deadline", "epochs", "lr_floor", "min_tokens"}
    assert OPTIONS.keys() | fixed == {field.name for field in dataclasses.fields(TTTConfig)}
    assert not OPTIONS.keys() & fixed


@st.composite
def valid_configs(draw) -> TTTConfig:
    """Any config that is called valid."""
    changes = {name: draw(values) for name, values in OPTIONS.items()}
    changes["window"] += changes["chunk"]
    names = changes["targets"].split(",")
    for name in set(TARGETS) - set(names):
        changes |= {f"{name}_alpha": 0.0} | ({} if name == "head" else {f"{name}_rank": 0})
    if not set("qkv") & set(names):
        changes["context"] = "recomputed"
    return STRICT.override(changes)


def nll_of(model: GPT, config: TTTConfig, documents: list[np.ndarray]) -> list[np.ndarray]:
    named = [Document(str(number), tokens, 1) for number, tokens in enumerate(documents)]
    result = score(ScoreRequest(model, named, config, keeps_nll=True))
    assert not result.why_not_valid
    return result.nll


@pytest.mark.slow
@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(valid_configs(), st.integers(1, 27), st.integers(0, 2), st.integers(0, 9))
def test_what_is_called_valid_is_strictly_causal(model, config, cut, which, seed):
    """Cut after a target, or with other text from there on, a document has the scores that it had up to there.

    To the bit where the same pass scores it: a document that is cut too short to adapt is scored by the base pass.
    With phases the other documents of its group, and of those before, keep theirs, too.
    """
    documents = [document(28, number) for number in range(3)]
    whole = nll_of(model, config, documents)
    other = documents[which].copy()
    other[cut + 1 :] = np.random.default_rng(seed).integers(3, VOCAB, 28 - cut)
    group_of = {i: g for g, group in enumerate(groups_of([Document(str(i), documents[i], 1) for i in range(3)],
                config.phases)) for i in group}  # fmt: skip
    for changed in (other, documents[which][: cut + 1]):
        found = nll_of(model, config, [*documents[:which], changed, *documents[which + 1 :]])
        same_pass = config.is_left_to_base(len(changed) - 1, group_of[which]) == config.is_left_to_base(
            28, group_of[which]
        )
        apart = np.abs(found[which][:cut] - whole[which][:cut]).max()
        assert apart == 0 if same_pass else apart < 2e-5, apart
        for index in {0, 1, 2} - {which}:
            if group_of[index] <= group_of[which]:
                np.testing.assert_array_equal(found[index], whole[index])


def test_a_document_that_outgrows_its_first_window_is_scored_from_what_is_kept(model):
    """Though no step has been taken by then: the base pass, which reads windows anew, gives another number."""
    config = STRICT.override({"context": "cached", "chunk": 7, "window": 13, "adapt_from": 20})
    assert [config.adapts(n) for n in (7, 8, 21, 22)] == [False, True, True, True]
    assert config.override({"context": "recomputed"}).first_adapted == config.first_adapted == 21
    tokens = document(30, 1)
    whole, cut = (nll_of(model, config, [tokens[:size]])[0] for size in (31, 16))
    np.testing.assert_array_equal(cut, whole[:15])


@pytest.mark.parametrize(
    "change", [{"layout": "original", "adapt_from": 0}, {"protocol": "multi_epoch"}, {"protocol": "min_nll"}]
)
def test_what_is_not_strictly_causal_is_not_called_valid(model, change):
    """And it is not: a document that is cut has other scores before."""
    config = TTTConfig(chunk=8, window=16, min_tokens=8, lora_rank=2, head_rank=3, lr=0.03, epochs=2).override(change)
    tokens, scores = document(30, 0), []
    for size in (30, 21):
        result = score(ScoreRequest(model, [Document("a", tokens[: size + 1], 1)], config, keeps_nll=True))
        assert result.why_not_valid and result.to_json()["valid_score"] is False
        scores.append(result.nll[0][:21])
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


@pytest.mark.parametrize("weights", ["dense", "int6"])
@pytest.mark.parametrize(
    "change",
    [{}, {"temperature": 0.9}, {"context": "cached"}, {"phases": 1, "phase_lr": 0.0}, {"weight_decay": 0.5},
     {"phases": 1, "phase_lr": 0.1, "phase_start": "a"},
     {"layout": "original", "temperature": 0.98, "min_tokens": 8}, {"protocol": "min_nll", "layout": "original"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("scorer", ["uncaptured", pytest.param("engine", marks=pytest.mark.gpu)])
def test_without_a_learning_rate_the_score_is_the_base_models_to_the_bit(
    model, tokenizer, tmp_path, change, scorer, weights
):
    """In every scorer, whatever the temperature: a step that changes nothing has no first target that it changed."""
    save_artifact(tmp_path / "a.klora", model.state_dict(), model.config, tokenizer.to_bytes(), {})
    model = model_from_artifact(tmp_path / "a.klora", "cuda" if scorer == "engine" else "cpu", weights)
    documents = [Document(str(size), document(size, size), size) for size in (40, 17, 3)]
    config = STRICT.override({"lr": 0.0}).override(change)
    result = score(ScoreRequest(model, documents, config, scorer=scorer, keeps_nll=True))
    assert all(one.adapted_nats == one.base_nats and one.status == SHORT for one in result.documents)
    base = BaseNll(model, documents, config)
    np.testing.assert_array_equal(np.concatenate(result.nll), np.concatenate(
        [base.nll[o + 1 : o + 1 + n] for o, n in zip(base.offsets, base.targets, strict=True)]))  # fmt: skip


def test_a_step_at_a_rate_of_zero_changes_no_bit_of_an_adapter(model):
    """The engine itself, which a score at that rate does not ask: its NLLs are the base model's but for rounding."""
    doc, config = Document("a", document(40, 0), 1), STRICT.override({"lr": 0.0, "weight_decay": 0.5})
    engine = engine_of(model, config, [doc])
    before = engine.pool.params.clone()
    adapted = engine.adapt([doc], Deadline(0))
    assert torch.equal(engine.pool.params, before) and engine.pool.step.max() == 4
    np.testing.assert_allclose(adapted.nats, [BaseNll(model, [doc], config).of(0)[0]], rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"chunk": 9, "window": 40}, {"chunk": 1}, {"chunk": 3, "context": "cached"}, {"chunk": 16, "window": 21}, {},
     {"lora_rank": 1}, {"head_rank": 1}, {"chunk": 4, "window": 20, "context": "cached", "head_rank": 5}],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("one_thread")
def test_no_batch_mate_changes_a_bit_on_one_thread_whatever_the_sizes(model, change):
    """Of products with a row more than are taken at a time, and of a single column."""
    config = STRICT.override({"targets": ",".join(TARGETS)} | change)
    documents = [document(40, number) for number in range(3)]
    together = nll_of(model, config, documents)
    for some in ([1], [2, 0]):
        for index, found in zip(some, nll_of(model, config, [documents[i] for i in some]), strict=True):
            np.testing.assert_array_equal(found, together[index])


THREADS = f"""
import sys
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(int(sys.argv[1]))
from test_model_audit import *
documents = [document(size, size) for size in (40, 33, 21, 30)]
weights = randomized(dataclasses.replace(SMALL, vocab_size=260, blocks=2)).requires_grad_(False)
together = nll_of(weights, STRICT, documents)
for some in ([0], [1], [3, 2], [2, 1, 0]):
    for index, found in zip(some, nll_of(weights, STRICT, [documents[i] for i in some])):
        assert np.array_equal(found, together[index]), index
base = [BaseNll(weights, [Document("", documents[i], 1) for i in some], STRICT).nll for some in ([0], [0, 1, 2, 3])]
assert np.array_equal(base[0], base[1][: len(base[0])])
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_the_batch_changes_no_bit_with_any_number_of_threads(threads):
    process = Forked(["-c", THREADS, str(threads)])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
