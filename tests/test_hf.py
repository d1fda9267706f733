"""Test-time training of models of transformers: against a plain PEFT loop, and what makes its numbers a score."""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import klora.ttt as klora_ttt
import numpy as np
import pytest
import safetensors
import torch
from conftest import documents as texts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import assert_as_exact
from klora.model.config import ConfigError
from klora.model.corpus import TextDocument as Text
from klora.model.tokenizer import TokenizerError
from klora.ttt import hf as hf_module
from klora.ttt.audit import audit
from klora.ttt.documents import Document
from klora.ttt.hf import adapt_hf, begins_with, hashes_of_folder, hf_documents, load_hf, token_bytes_of
from klora.ttt.hf_engine import HfStep
from klora.ttt.hf_model import MICRO_TOKENS, HfModel
from klora.ttt.journal import Journal, fingerprint
from klora.ttt.model_audit import scorer_of
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.progress import Interrupted
from klora.ttt.protocols import ttt_preset
from klora.ttt.results import ADAPTED, SHORT
from klora.ttt.sweep import sweep
from test_cli import klora
from tiny_hf import SIZES, saved, tiny_llama, tiny_tokenizer

transformers = pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")

TTT = ttt_preset("hf").override({"chunk": 8, "window": 32, "lr": 0.01})
SETS = [part for pair in ("chunk=8", "window=32", "lr=0.01") for part in ("--set", pair)]
GPT2 = {"vocab_size": 290, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "sliding_window": 8}


def family(name: str, **sizes: int) -> torch.nn.Module:
    """A tiny model of a family of its own kind: tied and untied heads, fused q, k and v, a softcap, sliding windows."""
    if name == "GPT2":
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | sizes)).eval()
    more = {"Gemma2": GEMMA, "Mistral": {"sliding_window": 8}, "Llama": {"tie_word_embeddings": True}}
    return tiny_llama(name, **more.get(name, {}) | sizes)


FAMILIES = {
    # whether it is read without masks, and whether by its base and its head
    "Llama": (True, True),
    "Qwen2": (True, True),
    "GPT2": (True, True),
    "Mistral": (False, True),
    "Gemma2": (False, False),
}


def document(targets: int, seed: int = 0) -> Document:
    """Words that come again and again, so that there is something to learn."""
    random = np.random.default_rng(seed)
    words = random.integers(3, SIZES["vocab_size"], (3, 5))
    tokens = np.concatenate([[0], words[random.integers(0, 3, targets)].flatten()[:targets]])
    return Document(f"{seed}", tokens.astype(np.int32), targets)


DOCUMENTS = [document(targets, seed) for seed, targets in enumerate((60, 8, 27, 75, 33, 0, 20))]


def scored(documents, config=TTT, module=None, **request):
    model = HfModel(tiny_llama() if module is None else module, config)
    try:
        return score(ScoreRequest(model, documents, config, keeps_nll=True, **request))
    finally:
        model.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": 3 * text.text[:90]}) + "\n" for text in texts_of(3)))
    return path


# What is computed


@pytest.mark.parametrize("name", FAMILIES)
def test_the_nll_is_that_of_a_peft_loop(name):
    """Document by document, with every setting that changes a step, by the one rule of tolerance."""
    hf = pytest.importorskip("klora.bench.hf")
    pytest.importorskip("peft", reason="pip install -e '.[test]' brings peft")
    changes = {"lr_half": 40, "weight_decay": 0.1, "temperature": 0.9, "adapt_from": 9, "o_alpha": 12.0, "down_lr": 0.5}
    config, module = TTT.override(changes | {"down_rank": 3, "steps_per_chunk": 2}), family(name)
    chosen = [DOCUMENTS[4], DOCUMENTS[6]]
    found = scored(chosen, config, module).nll
    exact, plain = hf.PeftLoop(module, config, torch.float64), hf.PeftLoop(module, config)
    for nll, one in zip(found, chosen, strict=True):
        ours, true, theirs = (torch.from_numpy(x) for x in (nll, exact.nll(one.tokens), plain.nll(one.tokens)))
        assert_as_exact([ours], [true], [theirs])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_read_the_short_way_where_that_gives_its_own_bits(name):
    model = HfModel(family(name), TTT)
    assert (model.skips_masks, model.has_parts) == FAMILIES[name]
    assert model.micro_tokens == MICRO_TOKENS["cpu"]
    model.close()
    within = HfModel(tiny_llama("Mistral", sliding_window=64), TTT)
    assert within.skips_masks, "windows that no sliding window cuts"
    within.close()


def test_a_window_may_be_of_all_positions_whatever_the_base_pass_pads_to():
    config = TTT.override({"chunk": 10, "window": 40})
    module = family("GPT2", n_positions=64)
    cut = family("GPT2", n_positions=40)
    state = module.state_dict()
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:40]
    cut.load_state_dict(state)
    whole, found = (scored(DOCUMENTS[:4], config, m) for m in (module, cut))
    assert found.totals()["by_status"] == {ADAPTED: 3, SHORT: 1}
    for ours, expected in zip(found.nll, whole.nll, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="window=40 is not possible; allowed: at most 39, the pos"):
        scored(DOCUMENTS[:1], config, family("GPT2", n_positions=39))


def test_an_untied_head_is_adapted_too():
    module, config = tiny_llama(), TTT.override({"targets": "v,head", "head_rank": 3})
    result = scored(DOCUMENTS[:1], config, module)
    assert not np.array_equal(result.nll[0], scored(DOCUMENTS[:1], config.override({"targets": "v"}), module).nll[0])
    hf = pytest.importorskip("klora.bench.hf")
    ours, true, plain = (
        torch.from_numpy(x)
        for x in (
            result.nll[0],
            hf.PeftLoop(module, config, torch.float64).nll(DOCUMENTS[0].tokens),
            hf.PeftLoop(module, config).nll(DOCUMENTS[0].tokens),
        )
    )
    assert_as_exact([ours], [true], [plain])


def test_adapting_gains_and_the_first_chunk_is_the_base_models():
    result = scored(DOCUMENTS)
    assert [d.status for d in result.documents] == [ADAPTED, SHORT, ADAPTED, ADAPTED, ADAPTED, SHORT, ADAPTED]
    assert result.totals()["adapted_bpb"] < result.totals()["base_bpb"] - 0.05
    base = scored(DOCUMENTS, TTT.override({"lr": 0.0})).nll
    for ours, unadapted in zip(result.nll, base, strict=True):
        np.testing.assert_allclose(ours[:8], unadapted[:8], rtol=2e-6)


# What makes it a score


def test_without_a_learning_rate_the_score_is_the_base_models_to_the_bit():
    result = scored(DOCUMENTS, TTT.override({"lr": 0.0}))
    assert all(one.adapted_nats == one.base_nats and one.status == SHORT for one in result.documents)
    for nll, one in zip(result.nll, result.documents, strict=True):
        assert nll.sum(dtype=np.float64) == pytest.approx(one.base_nats, rel=1e-12)


def test_a_folder_has_hashes_whatever_its_files_are_called(tmp_path):
    hashes = []
    for name in (b"a.json", b"\xff.json"):
        (tmp_path / os.fsdecode(name)).write_text("{}")
        hashes.append(hashes_of_folder(tmp_path)["header_sha256"])
    assert len(set(hashes)) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_document_has_the_same_bits_among_others():
    """To the bit: alone, in a batch of two with others waiting, and in one of all. The pool grows with the documents,
    and what is one launch by its size must not be.
    """
    assert not HfModel(tiny_llama(), TTT).attach(TTT, 2).stacks
    together, pairs = scored(DOCUMENTS).nll, scored(DOCUMENTS[::-1], TTT.override({"batch": 2})).nll[::-1]
    for index, one in enumerate(DOCUMENTS):
        assert np.array_equal(together[index], pairs[index]), index
        assert np.array_equal(together[index], scored([one]).nll[0]), index


@pytest.mark.slow
@settings(max_examples=5)
@given(st.integers(2, 59), st.integers(0, 10**6))
def test_a_prefix_has_the_scores_that_it_has_in_any_document(cut, seed):
    whole, other = DOCUMENTS[0].tokens, np.random.default_rng(seed).integers(3, 290, 80).astype(np.int32)
    changed = Document("changed", np.concatenate([whole[: cut + 1], other]), 1)
    ends = Document("ends", whole[: cut + 1], 1)
    there, longer, alone = scored([DOCUMENTS[0], changed, ends]).nll
    assert np.array_equal(there[:cut], longer[:cut])
    np.testing.assert_allclose(alone, there[:cut], rtol=0 if cut > TTT.chunk else 2e-6)


@pytest.mark.slow
def test_the_audit_passes():
    model = HfModel(tiny_llama(), TTT)
    tokens = [one.tokens for one in (DOCUMENTS[6], document(12, 9))]
    report = audit(scorer_of(model, TTT), tokens, SIZES["vocab_size"], tolerance=1e-5, most_swapped=4096)
    model.close()
    assert report.passed, str(report)


@pytest.mark.slow
def test_the_audit_finds_a_step_that_comes_too_early(monkeypatch):
    """A chunk scored after it was learnt from: the audit is not blind here."""
    train = HfStep.train

    def late(step):
        train(step)
        step.score()

    monkeypatch.setattr(HfStep, "train", late)
    model = HfModel(tiny_llama(), TTT)
    report = audit(scorer_of(model, TTT), [DOCUMENTS[6].tokens], SIZES["vocab_size"], tolerance=1e-5, most_swapped=1024)
    model.close()
    assert "later text" in report.failed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"context": "cached"}, "context='cached' is not possible; allowed: recomputed for a Hugging Face model"),
        ({"bias_lr": 3.0}, "bias_lr=3.0 is not possible; allowed: 0.0 for a Hugging Face model; the preset hf"),
        ({"phases": 2}, "phases=2 is not possible; allowed: 0"),
        ({"layout": "original"}, "layout='original' is not possible; allowed: start"),
        ({"layout": "original", "protocol": "min_nll"}, "protocol='min_nll' is not possible; allowed: score_first"),
        ({"layout": "original", "protocol": "multi_epoch"}, "protocol='multi_epoch' is not possible"),
        ({"window": 4096}, "window=4096 is not possible; allowed: at most 2048, the positions of this model"),
        (
            {"targets": "q,head"},
            "targets='q,head' .*allowed: no head for this model, whose head is tied",
        ),
    ],
    ids=str,
)
def test_settings_that_such_a_model_cannot_have_are_refused_by_name(changes, says):
    module = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        adapt_hf(module, tiny_tokenizer(eos_token="<|endoftext|>"), ["the fox"], TTT.override(changes))
    assert all(p.requires_grad for p in module.parameters())


def test_q_k_and_v_in_one_matrix_are_adapted_together_or_not_at_all():
    module = family("GPT2")
    for changes in ({"targets": "q,v"}, {"q_rank": 4}, {"v_lr": 2.0}, {"k_alpha": 3.0}):
        with pytest.raises(ConfigError, match="all of q, k and v or none.*c_attn of this model is all three in one"):
            HfModel(module, TTT.override(changes))
    with pytest.raises(ConfigError, match="no down for this model, whose linears are called c_attn, c_fc, c_proj"):
        module.transformer.h[0].mlp.c_proj = module.transformer.h[1].mlp.c_proj = torch.nn.Identity()
        HfModel(module, TTT)


def test_a_linear_that_a_forward_does_not_reach_changes_nothing():
    module, config = tiny_llama(), TTT.override({"targets": "q"})
    wanted = scored(DOCUMENTS[:1], config, module).nll[0]
    module.unused = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32)})
    assert np.array_equal(scored(DOCUMENTS[:1], config, module).nll[0][:8], wanted[:8])
    found = HfModel(module, config)
    assert len(found.attach(config, 1).pool.places) == 3
    found.close()


def test_a_model_without_a_head_is_refused():
    for module, kind in ((torch.nn.Linear(2, 2), "Linear"), (tiny_llama().model, "LlamaModel")):
        with pytest.raises(ConfigError, match=f"a {kind} has no head that gives logits; wanted: a causal"):
            HfModel(module, TTT)


def test_a_model_without_a_device_is_refused():
    with torch.device("meta"):
        module = tiny_llama()
    with pytest.raises(ConfigError, match="the model's parameters are on meta; wanted: all of them on one CPU or GPU"):
        HfModel(module, TTT)


# Text and tokens


def test_a_document_begins_with_bos_and_else_with_eos():
    both = tiny_tokenizer(bos_token="a", eos_token="<|endoftext|>")
    none = tiny_tokenizer()
    assert begins_with(both) == both.convert_tokens_to_ids("a")
    assert begins_with(tiny_tokenizer(eos_token="<|endoftext|>")) == begins_with(none) == 0
    without = copy.deepcopy(none)
    without.get_vocab = dict
    with pytest.raises(ConfigError, match="the tokenizer has no BOS, no EOS and no .* set its bos_token"):
        begins_with(without)


@pytest.mark.parametrize("text", ["the fox", " two  spaces\n\n\tand\r\n", "é😀 \u2581", "<|endoftext|> is text", ""])
def test_bytes_are_those_of_the_text_and_tokens_give_it_back(text):
    tokenizer = tiny_tokenizer(eos_token="<|endoftext|>")
    (found,) = hf_documents([Text("a", text)], tokenizer)
    assert found.bytes == len(text.encode()) and found.tokens[0] == 0
    assert (found.tokens[1:] != 0).all(), "what reads like a control token is text"
    assert tokenizer.decode(found.tokens[1:]) == text
    assert b"".join(token_bytes_of(tokenizer)(found.tokens[1:])) == text.encode()


def test_a_text_that_its_tokens_do_not_give_back_is_refused_by_name():
    texts = [Text("fine", "the fox"), Text("shouting", "the FOX")]
    with pytest.raises(TokenizerError, match=r"document 'shouting': .* \('the FOX' is read back as 'the fox'\)"):
        list(hf_documents(texts, tiny_tokenizer(lowercases=True)))


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"documents": "the fox"}, ConfigError, "documents is one text; wanted: several, in a list"),
        ({"documents": Text("a", "the fox")}, ConfigError, "documents is one text"),
        ({"documents": ["the fox", 3]}, ConfigError, "document '1' is a int; wanted: text"),
        ({"documents": ["the fox", "a\ud800b"]}, TokenizerError, "document '1' has half of a surrogate pair at .* 1,"),
        ({"tokenizer": None}, ConfigError, "the tokenizer is a NoneType; wanted: one of transformers"),
        ({"model": None}, ConfigError, "a NoneType has no head that gives logits"),
    ],
)
def test_what_is_no_model_tokenizer_or_text_is_refused_by_name(given, error, says):
    about = {"model": tiny_llama(), "tokenizer": tiny_tokenizer(eos_token="<|endoftext|>"), "documents": ["the fox"]}
    with pytest.raises(error, match=says):
        adapt_hf(**about | given)


def test_another_models_tokenizer_is_named_before_a_gpu_would_fail(folder, jsonl, tmp_path, no_network):
    module = tiny_llama(vocab_size=100)
    before = state_of(module)
    says = r"has token \d+, and the model knows 100: the tokenizer is another model's"
    with pytest.raises(ConfigError, match=f"document '1' {says}"):
        adapt_hf(module, tiny_tokenizer(eos_token="<|endoftext|>"), ["", "the fox " * 20], TTT)
    assert state_of(module) == before
    other = saved(tmp_path / "other")
    module.save_pretrained(other)
    done = klora("score", "--hf", other, "--jsonl", jsonl, "--out", tmp_path / "scores", "--device", "cpu", check=2)
    assert re.search(says, done.stderr) and "Traceback" not in done.stderr


@pytest.mark.usefixtures("one_thread")
def test_the_result_says_what_was_scored():
    module, said = tiny_llama(), []
    texts = ["the fox jumps over " * 9, Text("mine", "the dog"), Text("mine", "")]
    result = adapt_hf(module, tiny_tokenizer(eos_token="<|endoftext|>"), texts, TTT, say=said.append, keeps_nll=True)
    stored = result.to_json()
    assert [d["name"] for d in stored["documents"]] == ["0", "mine", "mine (2)"]
    assert [d["bytes"] for d in stored["documents"]] == [171, 7, 0] and stored["valid_score"]
    about = stored["hf"]
    assert about["class"] == "LlamaForCausalLM" and about["dtype"] == "float32" and about["vocabulary"] == 290
    assert about["begins_with"] == {"token": "<|endoftext|>", "is": "in the place of a BOS, which there is not"}
    assert about["rounding"] == "one thread: to the bit, whatever the batch"
    assert sum(map(len, result.nll)) == stored["totals"]["tokens"]
    assert any("documents side by side" in text for text in said)


# The run


def state_of(module: torch.nn.Module) -> tuple:
    forwards = [name for name, m in module.named_modules() if "forward" in vars(m)]
    flags = [p.requires_grad for p in module.parameters()]
    return module.training, flags, module.config._attn_implementation, forwards


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails, monkeypatch):
    module = tiny_llama().train()
    module.lm_head.weight.requires_grad_(False)
    before, numbers = state_of(module), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if fails:
        monkeypatch.setattr(HfStep, "train", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapt_hf(module, tiny_tokenizer(eos_token="<|endoftext|>"), ["the fox " * 20], TTT)
    else:
        adapt_hf(module, tiny_tokenizer(eos_token="<|endoftext|>"), ["the fox " * 20], TTT)
    assert state_of(module) == before
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in module.state_dict().items())


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path):
    config, module = TTT.override({"batch": 1}), tiny_llama()
    key, whole = fingerprint("model", DOCUMENTS, config, False), scored(DOCUMENTS, config, module)
    steps = []

    def journal(resume: bool) -> Journal:
        return Journal(tmp_path / "journal.jsonl", key, resume)

    def stop_after(phase, done, total):
        steps.append(phase == "adapt" and done > 80)

    with pytest.raises(Interrupted):
        request = {"progress": stop_after, "should_stop": lambda: any(steps)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("klora.ttt.pipeline.CPU_EVERY", 0.0)
            scored(DOCUMENTS, config, module, journal=journal(False), **request)
    resumed = journal(True)
    assert 0 < len(resumed.done) < len(DOCUMENTS)
    again = scored(DOCUMENTS, config, module, journal=resumed)
    assert [d.adapted_nats for d in again.documents] == pytest.approx([d.adapted_nats for d in whole.documents])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_where_memory_runs_out_half_as_many_documents_go_on(monkeypatch):
    train, said = HfStep.train, []

    def full(step):
        if step.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        train(step)

    whole = scored(DOCUMENTS, TTT.override({"batch": 4}))
    monkeypatch.setattr(HfStep, "train", full)
    halved = scored(DOCUMENTS, TTT.override({"batch": 4}), say=said.append)
    assert any("with 4 documents side by side; going on with 2, which changes no score" in text for text in said)
    assert all(np.array_equal(a, b) for a, b in zip(halved.nll, whole.nll, strict=True))


def test_the_estimate_grows_with_places_and_window():
    model = HfModel(tiny_llama(), TTT)
    needs = {}
    for batch, window in ((1, 32), (4, 32), (4, 64)):
        engine = model.engine(TTT.override({"batch": batch, "window": window}), 100, slots=4)
        needs[batch, window] = engine.facts["estimated_bytes"]
    model.close()
    assert needs[1, 32] < needs[4, 32] < needs[4, 64] < 2.2 * needs[4, 32]


@pytest.mark.slow
def test_a_sweep_chooses_constants_for_such_a_model():
    documents = [document(30, seed) for seed in range(6)]
    model = HfModel(tiny_llama(), TTT)
    request = sweep(ScoreRequest(model, documents, TTT))
    result = score(request)
    model.close()
    assert len(result.facts["sweep"]["tried"]) >= 4 and result.totals()["documents"] < 6


# The command


@pytest.fixture
def no_network(monkeypatch):
    def refused(*arguments):
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.mark.slow
def test_the_command_scores_a_folder_and_verify_agrees(folder, jsonl, tmp_path, no_network):
    out, nll = tmp_path / "out", tmp_path / "nll.safetensors"
    shown = klora("score", "--hf", folder, "--jsonl", jsonl, "--out", out, "--nll", nll, *SETS)
    assert "base model " in shown.stdout and "quantisation" not in shown.stdout
    stored = json.loads((out / "score.json").read_text())
    assert stored["valid_score"] and stored["weights"] == "float32" and stored["totals"]["documents"] == 3
    assert stored["totals"]["adapted_bpb"] < stored["totals"]["base_bpb"]
    hashes = hashes_of_folder(folder)
    assert {name: stored["artifact"][name] for name in hashes} == hashes and "transformers" in stored["versions"]
    page = (out / "report.html").read_text()
    assert "base model" in page and "Quantisation gap" not in page and "<h2>One document" in page
    again = klora("verify", out / "score.json", "--hf", folder, "--jsonl", jsonl, "--nll", nll, "--share", 1)
    assert "3 documents are what they were, to the bit" in again.stdout
    stored["hf"]["class"] = "Another"
    (out / "score.json").write_text(json.dumps(stored | {"weights": "auto"}))
    forged = klora("verify", out / "score.json", "--hf", folder, "--jsonl", jsonl, check=1).stdout.replace("\n", " ")
    assert "FAIL  model: class is 'Another', not 'LlamaForCausalLM'; weights is 'auto', not 'float32'" in forged
    changed = saved(tmp_path / "other")
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    other = klora("verify", out / "score.json", "--hf", changed, "--jsonl", jsonl, check=1)
    assert "is another than" in other.stdout.replace("\n", " ")


@pytest.mark.slow
def test_a_folder_may_be_the_one_that_the_command_runs_in(jsonl, tmp_path, monkeypatch):
    """Its results lie beside it, under the name that it has outside."""
    monkeypatch.chdir(saved(tmp_path / "tiny"))
    klora("score", "--hf", ".", "--jsonl", jsonl, *SETS)
    assert json.loads((tmp_path / "tiny-score" / "score.json").read_text())["artifact"]["file"] == "tiny"


def test_what_the_command_refuses_before_it_loads_anything(folder, jsonl, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, says in [
        (["--hf", tmp_path / "none", "--jsonl", jsonl], "is no folder; wanted: one with config.json"),
        (["--hf", tmp_path / "empty", "--jsonl", jsonl], "has no config.json and no *.safetensors and no tokenizer*"),
        (["--hf", folder], "--hf was given without --text or --jsonl"),
        (["model.klora", "--hf", folder, "--jsonl", jsonl], "--hf was given together with an artifact"),
        (["--hf", folder, "--jsonl", jsonl, "--prequant", tmp_path], "--hf was given together with --prequant"),
        (["--hf", folder, "--jsonl", jsonl, "--weights", "int6"], "--hf was given together with --weights"),
        (["--hf", folder, "--jsonl", jsonl, "--dtype", "int8"], "dtype='int8' is not possible; allowed: auto"),
        (["--hf", folder, "--jsonl", jsonl, "--protocol", "min_nll"], "protocol='min_nll' is not possible"),
        (["--hf", folder, "--jsonl", jsonl, "--preset", "quick"], "bias_lr=3.0 is not possible; allowed: 0.0"),
        (["model.klora", "--dtype", "float32"], "--dtype float32 was given without --hf"),
    ]:
        refused = klora("score", *arguments, "--out", tmp_path / "out", check=2)
        assert says in " ".join(refused.stderr.split()), refused.stderr
        assert "Traceback" not in refused.stderr and not (tmp_path / "out/score.json").exists()
    both = klora("verify", tmp_path / "score.json", "--jsonl", jsonl, check=2)
    assert "by --artifact or by --hf" in both.stderr.replace("\n", " ")


def test_a_broken_folder_and_a_missing_package_are_named(folder, tmp_path, monkeypatch, no_network):
    broken = saved(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="broken cannot be read as a causal language model"):
        load_hf(broken, torch.device("cpu"))
    (broken / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ConfigError, match="broken cannot be read as a causal language model: .*no_such_model"):
        load_hf(broken, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"a package that is not installed .*: pip install transformers"):
        load_hf(folder, torch.device("cpu"))


@pytest.mark.parametrize("where", ["sub/model.safetensors", "../other/model.safetensors", "model.bin"])
def test_weights_that_the_hash_of_a_folder_does_not_cover_are_refused(tmp_path, where):
    """They could be swapped, and a run would go on with them or be verified by them."""
    broken, other = saved(tmp_path / "broken"), saved(tmp_path / "other")
    weights = broken / "model.safetensors"
    with safetensors.safe_open(weights, "numpy") as file:
        names = list(file.keys())
    shutil.move(weights, broken / "part.safetensors")
    index = broken / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    load_hf(broken, torch.device("cpu"))
    (broken / "sub").mkdir()
    shutil.copy(other / "model.safetensors", broken / "sub")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, where)}))
    with pytest.raises(ConfigError, match=f"model.safetensors.index.json takes weights from '{where}'; wanted: "):
        load_hf(broken, torch.device("cpu"))
    index.unlink()
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"transformers_weights": where}))
    with pytest.raises(ConfigError, match=f"config.json takes weights from '{where}'; wanted: "):
        load_hf(broken, torch.device("cpu"))


def test_a_clones_own_folders_are_not_taken_for_packages(monkeypatch):
    """`python -m` in a clone's root puts it first; its folder kernels/ has the name of a package of Hugging Face."""
    root = str(Path(klora_ttt.__file__).resolve().parents[1])
    monkeypatch.setattr(sys, "path", ["", root, *sys.path])
    monkeypatch.chdir(root)
    with hf_module._own_folders_hidden():
        assert not {"", root} & set(sys.path) and sys.path
    assert sys.path[:2] == ["", root]


def test_another_clones_folders_are_not_taken_for_packages_either(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "dispatch.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with hf_module._own_folders_hidden():
        assert str(tmp_path) not in sys.path
    assert sys.path[0] == str(tmp_path)


def test_transformers_is_imported_in_a_clones_root(no_network):
    """By whoever loads a model of their own there, before klora has a say."""
    root = Path(klora_ttt.__file__).resolve().parents[1]
    code = "import transformers.models.llama.modeling_llama, kernels; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == root / "kernels" / "__init__.py"


def test_the_dtype_is_what_was_asked_for(folder):
    module, _ = load_hf(folder, torch.device("cpu"))
    assert module.dtype == torch.float32
    assert load_hf(folder, torch.device("cpu"), "bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_the_benchmark_compares_with_the_loop_first(folder, tmp_path):
    hf = pytest.importorskip("klora.bench.hf")
    pytest.importorskip("peft", reason="pip install -e '.[test]' brings peft")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "the fox jumps " * (20 + n)}) + "\n" for n in range(4)))
    about = {"documents": 4, "peer_documents": 2, "dtype": "auto", "device": "cpu", "commit": "x", "field": "text"}
    hf.check(folder, texts, tmp_path / "hf.json", set_=["chunk=16", "window=64"], **about)
    record = json.loads((tmp_path / "hf.json").read_text())
    assert record["errors"]["float32"]["klora"] <= record["errors"]["float32"]["allowed"]
    assert record["peft_measured"]["documents"] == 2 and record["times_faster"] > 0
    scaled = record["peft_measured"]["seconds"] * record["adapted_targets"] / record["peft_measured"]["targets"]
    assert record["peft_seconds"] == pytest.approx(scaled)
    module, _ = load_hf(folder, torch.device("cpu"))
    config = TTT.override({"chunk": 16})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(hf.RedGate, match="No speed is reported"):
        right = hf.klora_nll
        # One target of each document is off by a hundredth of a nat.
        patch.setattr(hf, "klora_nll", lambda *given: [nll + 0.01 * (nll == nll.max()) for nll in right(*given)])
        hf.gate(module, config, [document(60, seed) for seed in range(2)])


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_have_the_bits_of_steps_without_them(name):
    config, documents = TTT.override({"batch": 4}), [document(40 + 9 * seed, seed) for seed in range(9)]
    module = family(name).to("cuda", torch.bfloat16)
    captured, plain = (scored(documents, config, module, scorer=scorer) for scorer in ("engine", "uncaptured"))
    assert captured.facts["engine"]["captured"] and not plain.facts["engine"]["captured"]
    if FAMILIES[name][0]:
        assert all(np.array_equal(a, b) for a, b in zip(captured.nll, plain.nll, strict=True))
    else:  # the masks that transformers makes are others while a stream is captured
        assert captured.totals()["adapted_bpb"] == pytest.approx(plain.totals()["adapted_bpb"], rel=0.01)
    assert captured.totals()["adapted_bpb"] < captured.totals()["base_bpb"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_nll_is_that_of_a_peft_loop_on_a_gpu(name):
    hf = pytest.importorskip("klora.bench.hf")
    pytest.importorskip("peft")
    documents = [document(24, seed) for seed in range(4)]
    errors = hf.gate(family(name).to("cuda"), TTT, documents)["float32"]
    assert errors["klora"] <= errors["allowed"]
