"""klora from Python: the lines that the README prints, and what the handle gives and refuses."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import klora
import pytest
import torch
from conftest import SMALL, randomized, words
from klora.model import load_artifact, model_from_artifact, save_artifact, tokenizer_of

ROOT = Path(__file__).parent.parent
TEXTS = [words(seed, 120) for seed in (3, 4)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "demo.klora"
    # Past the training length the rotary base depends on the window, which scoring chooses.
    config = replace(SMALL, vocab_size=tokenizer.vocab_size, train_length=1024)
    save_artifact(path, randomized(config).state_dict(), config, tokenizer.to_bytes(), {}, 1_000_000)
    return path


@pytest.fixture(scope="module")
def lm(artifact) -> klora.LanguageModel:
    return klora.load(artifact, device="cpu")


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="a GPU machine gets the tests alone")
def test_the_readmes_lines_run_as_they_are_printed(artifact, tmp_path, monkeypatch, capsys):
    (lines,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        if "klora.load" in block
    ]
    (tmp_path / "runs/demo").mkdir(parents=True)
    shutil.copy(artifact, tmp_path / "runs/demo/demo.klora")
    (tmp_path / "README.md").write_text(TEXTS[0])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(lines, names)
    assert capsys.readouterr().out.strip()
    assert names["adapted"].documents[0].adapted_bpb > 0


def test_logits_are_the_models_for_text_and_for_tokens(lm, artifact):
    tokens = lm.tokenizer.encode(TEXTS[0]).astype("int64")
    logits = lm.logits(TEXTS[0])
    assert logits.shape == (len(tokens), lm.tokenizer.vocab_size) and logits.dtype == torch.float32
    assert not logits.requires_grad
    model = model_from_artifact(artifact, "cpu")
    with torch.no_grad():
        assert torch.equal(model(torch.from_numpy(tokens)[None])[0], logits)
    assert torch.equal(lm.logits(tokens.tolist()), logits)
    assert torch.equal(lm.logits(torch.from_numpy(tokens)[None].int()), logits[None])


def test_a_score_is_the_logits_own(lm):
    tokens = torch.from_numpy(lm.tokenizer.encode(TEXTS[0]).astype("int64"))
    nll = torch.nn.functional.cross_entropy(lm.logits(tokens)[:-1].double(), tokens[1:], reduction="sum")
    result = lm.score(TEXTS)
    assert result.documents[0].base_bpb == pytest.approx(nll.item() / math.log(2) / len(TEXTS[0].encode()), rel=1e-5)
    assert [document.name for document in result.documents] == ["0", "1"]
    totals = lm.score([*TEXTS, "words " * 500]).totals()
    assert totals["by_status"] == {"base model alone": 3} and not totals["deadline_hit"]
    assert lm.score(dict(zip("ab", TEXTS, strict=True))).totals() == result.totals()
    assert lm.score(TEXTS[0]).documents == result.documents[:1] and lm.score([]).totals()["documents"] == 0


def test_adapting_changes_the_long_documents_scores_and_not_the_model(lm):
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    result = lm.adapt([*TEXTS, "short"], preset="quick", adapt_from=64, chunk=32, window=64)
    assert [document.status for document in result.documents] == ["adapted", "adapted", "short"]
    assert all(document.adapted_nats != document.base_nats for document in result.documents[:2])
    assert result.config.lr == klora.ttt.ttt_preset("quick").lr and not result.config.is_leaky
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


@pytest.mark.parametrize("mode", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode])
def test_a_caller_that_evaluates_gets_the_same_adaptation(lm, artifact, mode):
    settings = {"adapt_from": 64, "chunk": 32, "window": 64}
    expected = lm.adapt(TEXTS, **settings)
    with mode():
        loaded = klora.load(artifact, device="cpu")
        assert loaded.adapt(TEXTS, **settings).documents == expected.documents
    assert loaded.adapt(TEXTS, **settings).documents == expected.documents


def test_generation_is_reproducible(lm):
    assert lm.generate("alpha", tokens=8) == lm.generate("alpha", tokens=8)
    assert lm.generate("alpha", tokens=8, temperature=0)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto"])
@pytest.mark.parametrize("weights", ["dense", "int6"])
def test_a_device_is_a_string_or_a_device_and_an_artifact_a_path_or_itself(artifact, device, weights):
    loaded = load_artifact(artifact)
    tokens = torch.tensor([[1, 5, 9]], device=klora.load(artifact, device).device)
    expected = klora.load(str(artifact), device, weights).model(tokens)
    assert torch.equal(model_from_artifact(loaded, device, weights)(tokens), expected)
    assert torch.equal(model_from_artifact(str(artifact), device, weights).logits(tokens), expected)
    assert tokenizer_of(loaded).vocab_size == expected.size(-1)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda lm, path: klora.load(path.parent / "none.klora"), "there is no such file"),
        (lambda lm, path: klora.load(path.parent), "give the folder of a finished"),
        (lambda lm, path: klora.load(path.parent, weights="int6"), "allowed: 'dense'"),
        (lambda lm, path: klora.load(path, "tpu"), "device='tpu' is not possible"),
        (lambda lm, path: klora.load(path, "cpu", "int4"), "allowed: dense, int6"),
        (lambda lm, path: lm.logits([]), "allowed: integers"),
        (lambda lm, path: lm.logits([1.5]), "allowed: integers"),
        (lambda lm, path: lm.logits([1, 400]), "allowed: 0 to 399"),
        (lambda lm, path: lm.logits([-1]), "allowed: 0 to 399"),
        (lambda lm, path: klora.load(path, None), "device=None is not possible"),
        (lambda lm, path: lm.generate("\ud800"), "half a surrogate pair"),
        (lambda lm, path: lm.generate(tokens=-1), "-1 tokens"),
        (lambda lm, path: lm.generate(temperature=math.nan), "temperature=nan"),
        (lambda lm, path: lm.score([b"bytes"]), "a text is a bytes; allowed: str"),
        (lambda lm, path: lm.adapt(TEXTS, preset="better"), "there is no preset 'better'"),
        (lambda lm, path: lm.adapt(TEXTS, chnk=3), "did you mean chunk"),
    ],
)
def test_mistakes_are_klora_errors_that_say_what_is_allowed(lm, artifact, mistake, says):
    with pytest.raises(klora.KloraError, match=re.escape(says)):
        mistake(lm, artifact)
