"""A stored score that a third party recomputes, and what a resumed run may go on from; `klora audit` on a file."""

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import SMALL, randomized, words
from klora.model.artifact import load_artifact, save_artifact
from klora.model.corpus import Corpus
from klora.ttt.documents import documents_from_texts
from klora.ttt.journal import Journal, fingerprint
from klora.ttt.model_audit import SWAPPED
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.progress import Interrupted
from klora.ttt.protocols import TTTConfig
from klora.ttt.results import BASE_ALONE, DIVERGED, PARTIAL, SHORT, DocumentResult, ScoreResult
from klora.ttt.verify import Stored, VerifyError, read_nll, which_nll
from test_cli import klora

SETS = [part for pair in ("chunk=16", "window=64", "adapt_from=32") for part in ("--set", pair)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.klora"
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size, blocks=2)
    save_artifact(path, randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    return path


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "some.jsonl"
    path.write_text("".join(json.dumps({"text": words(seed, 8 + 25 * seed)}) + "\n" for seed in range(5)))
    return path


@pytest.fixture(scope="module")
def scored(artifact, lines, tmp_path_factory) -> Path:
    """A folder with score.json and nll.safetensors."""
    out = tmp_path_factory.mktemp("scored")
    klora("score", artifact, "--jsonl", lines, "--out", out, *SETS, "--nll", out / "nll.safetensors")
    return out


def verified(scored, artifact, lines, *more, check=0):
    done = klora("verify", scored / "score.json", "--artifact", artifact, "--jsonl", lines, *more, check=check)
    assert "Traceback" not in done.stderr
    return done.stdout.replace("\n", " ")


def test_a_score_names_all_that_it_takes_to_compute_it_again(scored, artifact, lines):
    stored = json.loads((scored / "score.json").read_text())
    header = load_artifact(artifact).header
    assert [stored["artifact"][n] for n in ("header_sha256", "payload_sha256")] == [
        header["header_sha256"],
        header["payload_sha256"],
    ]
    source = stored["source"]
    assert (source["kind"], source["files"], source["documents"], source["most_tokens"]) == (
        "jsonl",
        ["some.jsonl"],
        5,
        0,
    )
    assert all(len(document["sha256"]) == 64 for document in stored["documents"])
    threads = os.environ.get("OMP_NUM_THREADS")
    assert stored["threads"] == int(threads) if threads else stored["threads"] >= 1
    assert stored["scorer"] == "uncaptured" and stored["weights"] == "dense"
    assert {"klora", "torch"} <= stored["versions"].keys() and stored["config"]["chunk"] == 16
    assert stored["device"] == "CPU" and stored["processor"].endswith(f", {torch.backends.cpu.get_cpu_capability()}")
    assert stored["nll"]["file"] == "nll.safetensors" and len(stored["nll"]["sha256"]) == 64
    nll = read_nll(scored / "nll.safetensors", Stored(scored / "score.json"))
    for document, found in zip(stored["documents"], nll, strict=True):
        assert len(found) == document["tokens"]
        assert found.sum(dtype=np.float64) == pytest.approx(document["adapted_nats"], rel=1e-12)


def test_what_was_scored_is_verified_to_the_bit(scored, artifact, lines, tmp_path):
    """Under another name of the file, too."""
    renamed = tmp_path / "other.jsonl"
    shutil.copy(lines, renamed)
    said = verified(scored, artifact, renamed, "--share", "1", "--nll", scored / "nll.safetensors")
    assert "pass  recomputed: 5 documents are what they were, to the bit: at most 0 apart" in said
    assert "pass  targets: each target's NLL is what it was: at most 0 apart" in said and said.strip().endswith(
        "passed"
    )
    machine = klora(
        "verify", scored / "score.json", "--artifact", artifact, "--jsonl", lines, "--share", "0.3", "--json"
    )
    report = json.loads(machine.stdout)
    assert report["passed"] and "3 documents that were not recomputed" in report["unseen"][0]


def test_a_file_for_nlls_is_tried_before_the_work_and_takes_no_other_files_place(scored, artifact, lines, tmp_path):
    mine, folder, older = tmp_path / "mine.klora", tmp_path / "folder", tmp_path / "older.safetensors"
    shutil.copy(artifact, mine)
    shutil.copy(scored / "nll.safetensors", older)
    folder.mkdir()
    out = tmp_path / "out"
    for path, says in (
        (mine, "is there and is no file of NLLs; move it or give another --nll"),
        (folder, "is no file; allowed: a file, or a path where there is nothing yet"),
        (Path("/proc/nll"), "cannot be written"),
        (out / "score.json", "has the name of another file of the results"),
        (out / "journal.jsonl", "has the name of another file of the results"),
        (out / ".klora.lock", "has the name of another file of the results"),
    ):
        refused = klora("score", artifact, "--jsonl", lines, "--out", out, *SETS, "--nll", path, check=2)
        assert says in refused.stderr.replace("\n", " ") and not out.exists()
    assert mine.read_bytes() == artifact.read_bytes()
    klora("score", artifact, "--jsonl", lines, "--out", out, *SETS, "--nll", older)
    here, there = (read_nll(path, Stored(out / "score.json")) for path in (older, scored / "nll.safetensors"))
    assert all(map(np.array_equal, here, there))


def forged(scored: Path, folder: Path, change) -> Path:
    values = json.loads((scored / "score.json").read_text())
    change(values)
    (folder / "score.json").write_text(json.dumps(values))
    return folder


def cheaper(values):
    for document in values["documents"]:
        document["adapted_nats"] *= 0.9
    values["totals"]["adapted_bpb"] *= 0.9


def one_left_out(values):
    gone = values["documents"].pop()
    values["totals"] |= {"documents": 4, "tokens": values["totals"]["tokens"] - gone["tokens"]}


def base_alone(values):
    """Documents of a status that no run of `klora score` gives, at next to no nats, and all else as that makes it."""
    for document in values["documents"][1:]:
        document.update(status=BASE_ALONE, adapted_nats=1.0)
    consistent(values)


def consistent(values):
    """What is derived from the documents, as a run derives it."""
    derived = {"sha256", "base_bpb", "adapted_bpb"}
    results = [
        DocumentResult.from_json({name: value for name, value in document.items() if name not in derived})
        for document in values["documents"]
    ]
    again = ScoreResult(results, TTTConfig.from_dict(values["config"]), {}).to_json()
    for name in ("totals", "valid_score", "why_not_valid"):
        values.pop(name, None)
        values.update({name: again[name]} if name in again else {})
    for document, other in zip(values["documents"], again["documents"], strict=True):
        document.update(other)


def leaky(values):
    values["config"]["layout"] = "original"
    values["config"]["adapt_from"] = 0


FORGED = {
    "the total": (lambda v: v["totals"].update(adapted_bpb=1.0), "FAIL  totals: adapted_bpb is 1.0, not"),
    "nats": (cheaper, "FAIL  recomputed: adapted_nats of 'some.jsonl:"),
    "a document": (one_left_out, "FAIL  documents: the result is not of all documents: 1 are missing in the result"),
    "its bytes": (lambda v: v["documents"][0].update(bytes=10**6), "has other tokens or bytes than the result says"),
    "valid": (leaky, "FAIL  valid_score: valid_score is True under score_first, layout=original, and should be False"),
    "the sample": (
        lambda v: v["source"].update(most_tokens=100),
        "FAIL  documents: the result is not of a sample of 100",
    ),
    "bits per byte of a document": (
        lambda v: v["documents"][1].update(adapted_bpb=0.5),
        "FAIL  totals: adapted_bpb of 'some.jsonl:2' is 0.5, not",
    ),
    "another total": (
        lambda v: v["totals"].update(base_bpb_at_temperature=9.0, prequant_bpb=8.0),
        "FAIL  totals: prequant_bpb is 8.0, not None; base_bpb_at_temperature is 9.0, not",
    ),
    "the share that was adapted": (
        lambda v: v["totals"].update(adapted_share=0.5),
        "FAIL  totals: adapted_share is 0.5, not 1.0",
    ),
    "the protocol": (
        lambda v: v["config"].update(protocol="min_nll", min_tokens=16, window=16, adapt_from=0, layout="original"),
        "FAIL  labels: protocol is 'score_first', not 'min_nll'; protocol_label is 'score_first', not 'min_nll (LEAKY",
    ),
    "why it is not valid": (
        lambda v: v.update(why_not_valid=["the machine was slow"]),
        "FAIL  valid_score: valid_score is True under score_first, layout=start; why_not_valid is another",
    ),
    "the pass that was kept": (
        lambda v: v["documents"][4].update(kept_pass=3),
        "FAIL  recomputed: kept_pass of 'some.jsonl:5' is 3, not 0; wanted: to the bit",
    ),
    "the nats at the temperature": (
        lambda v: [d.update(tempered_nats=d["tempered_nats"] + 1) for d in v["documents"]],
        "FAIL  recomputed: tempered_nats of 'some.jsonl:",
    ),
    "what the source holds": (
        lambda v: v["source"].update(tokens=10**6),
        "FAIL  source: tokens is 1000000, not",
    ),
    "the provenance": (
        lambda v: v["artifact"]["provenance"].update(steps=10**6),
        "FAIL  provenance: it is another than the artifact has",
    ),
    "the size of the artifact": (
        lambda v: v["artifact"].update(bytes=12),
        "FAIL  bytes: the artifact has ",
    ),
    "that a document was adapted, by other versions": (
        lambda v: (v["versions"].update(torch="1.0"), v["documents"][4].update(status=SHORT, adapted_tokens=0)),
        "FAIL  recomputed: status of 'some.jsonl:5' is 'short', not 'adapted'; adapted_tokens of 'some.jsonl:5' is 0",
    ),
    "a sweep": (
        lambda v: v.update(sweep={}),
        "FAIL  sweep: it is no record of what a sweep tried and chose",
    ),
    "another number among the totals": (
        lambda v: v["totals"].update(best_bpb=0.1),
        "FAIL  totals: no result has a total 'best_bpb'",
    ),
    "the hash of the source": (lambda v: v["source"].update(sha256="0" * 64), "FAIL  source: sha256 is '000"),
    "that nothing was to adapt to a document": (
        base_alone,
        "FAIL  recomputed: adapted_nats of 'some.jsonl:",
    ),
    "of which text its bytes are": (
        lambda v: v.update(bytes_of="normalised text"),
        "FAIL  labels: bytes_of is 'normalised text', not 'text'",
    ),
    "versions": (
        lambda v: (cheaper(v), v["versions"].update(torch="1.0")),
        "wanted: within a share of 0.001, as versions differ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FORGED)
def test_a_forged_score_fails_for_its_reason(scored, artifact, lines, tmp_path, what):
    change, says = FORGED[what]
    assert says in verified(forged(scored, tmp_path, change), artifact, lines, "--share", "1", check=1)


def test_a_note_that_a_result_has_to_have_is_missed(scored, tmp_path, artifact, lines):
    """Of a document that diverged."""

    def diverged(values):
        values["documents"][4].update(status=DIVERGED, adapted_tokens=16)
        values["totals"].update(
            Stored(forged(scored, tmp_path, lambda v: v.update(values)) / "score.json").again["totals"]
        )

    said = verified(forged(scored, tmp_path, diverged), artifact, lines, check=1)
    assert "FAIL  labels: the note \"1 document diverged ('some.jsonl:5')" in said and "pass  totals: " in said


def test_whoever_made_a_result_cannot_know_which_documents_are_recomputed(scored, artifact, lines):
    """Chance draws them, and the report says how to draw them again."""
    seeds = set()
    for seed in (None, None, 7):
        more = () if seed is None else ("--seed", seed)
        said = verified(scored, artifact, lines, *more)
        seeds.add(int(re.search(r"4 documents that were not recomputed \(--seed (\d+) draws the same\)", said)[1]))
    assert 7 in seeds and len(seeds) == 3


def test_another_version_is_verified_within_the_stated_rounding(scored, artifact, lines, tmp_path):
    def elsewhere(values):
        values["threads"], values["device"] = 64, "another"
        for document in values["documents"]:
            document["base_nats"] *= 1 + 1e-6

    said = verified(forged(scored, tmp_path, elsewhere), artifact, lines, check=1)
    assert (
        "pass  recomputed: 1 documents are what they were, within a share of 0.001, as device, threads differ" in said
    )
    assert "FAIL  totals: base_bpb" in said  # which no rounding is allowed to


def test_what_all_documents_have_lost_is_said_where_rounding_is_allowed(scored, artifact, lines, tmp_path):
    """Each by less than rounding may be."""

    def a_little_cheaper(values):
        values["versions"]["torch"] = "1.0"
        for document in values["documents"]:
            document["adapted_nats"] *= 1 - 8e-4

    said = verified(forged(scored, tmp_path, a_little_cheaper), artifact, lines, "--share", "1", check=1)
    assert "pass  recomputed: 5 documents" in said and "at most 0.0008 apart, -0.0008 in all" in said


def test_a_cpu_of_another_kind_is_held_to_the_rounding(scored, artifact, lines, monkeypatch):
    """Its sums have another order: without AVX512, nats of the demo's model differed in the eighth digit."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    said = verified(scored, artifact, lines)
    assert "pass  recomputed: 1 documents are what they were, within a share of 0.001, as processor differ" in said


def test_another_artifact_or_other_targets_are_refused(scored, artifact, lines, tmp_path, tokenizer):
    config = dataclasses.replace(load_artifact(artifact).config, softcap=29.0)
    other = tmp_path / "other.klora"
    save_artifact(other, randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    assert "FAIL  artifact: " in verified(scored, other, lines, check=1)
    nll = safetensors.numpy.load_file(scored / "nll.safetensors")
    with safetensors.safe_open(scored / "nll.safetensors", "numpy") as file:
        metadata = file.metadata()
    nll["nll"][40] += 0.5
    safetensors.numpy.save_file(nll, tmp_path / "nll.safetensors", metadata)
    said = verified(scored, artifact, lines, "--share", "1", "--nll", tmp_path / "nll.safetensors", check=1)
    assert "FAIL  sums: " in said and "FAIL  targets: target " in said
    assert "FAIL  nll file: has the hash " in said
    nameless = forged(scored, tmp_path, lambda v: v.pop("nll"))
    assert which_nll(scored / "nll.safetensors", Stored(nameless / "score.json")).passed, "of a run that kept none"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"a": 1, "a": 2}',
        b"[1]",
        b"\xff",
        b'{"config": {}}',
        b"[" * 100_000,
        b'{"config": {"chunk": 3}}',
        None,
    ],
)
def test_a_file_that_is_no_score_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "score.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VerifyError, match=r"score.json is no score.json of this klora that could be recomputed: "):
        Stored(path)
    with pytest.raises(VerifyError, match="is no file of NLLs"):
        read_nll(path, None)


def test_one_of_two_documents_with_the_same_text_is_missed(artifact, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": words(seed, 30)}) + "\n" for seed in (1, 2, 2)))
    klora("score", artifact, "--jsonl", path, "--out", tmp_path, *SETS)

    def one_of_two(values):
        values["documents"].pop()
        consistent(values)

    said = verified(forged(tmp_path, tmp_path, one_of_two), artifact, path, check=1)
    assert "FAIL  documents: the result is not of all documents: 1 are missing in the result and 0 are not in" in said


@pytest.mark.slow
def test_the_record_of_a_sweep_is_that_of_its_halves_and_its_choice(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["klora.ttt.sweep"], "grid", lambda config: [{}, {"lr": 0.001}])
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": words(seed, 60)}) + "\n" for seed in range(8)))
    klora("score", artifact, "--jsonl", path, "--out", tmp_path, *SETS, "--sweep")
    honest = json.loads((tmp_path / "score.json").read_text())
    said = verified(tmp_path, artifact, path)
    assert "pass  sweep: " in said and "not seen here: " in said.split("what a sweep measured of the constants")[0]
    other = [row["changes"] for row in honest["sweep"]["tried"] if row["changes"] != honest["sweep"]["chosen"]][0]
    for change, says in (
        ({"documents_tuning": 0}, "documents_tuning is 0, not "),
        ({"tokens_tuning": 1}, "tokens_tuning is 1, not "),
        ({"chosen": other}, f"chosen is {other}, not "),
        ({"tried": [{"changes": {"lr": 0.5}, "adapted_bpb": 1.0}], "chosen": {"lr": 0.5}}, "lr of the config is "),
        ({"tried": []}, "it is no record of what a sweep tried and chose"),
    ):
        (tmp_path / "score.json").write_text(json.dumps(honest | {"sweep": honest["sweep"] | change}))
        assert f"FAIL  sweep: {says}" in verified(tmp_path, artifact, path, check=1)
    (tmp_path / "score.json").write_text(json.dumps(honest | {"notes": []}))
    assert "FAIL  sweep: the note '5 of the 8 documents were" in verified(tmp_path, artifact, path, check=1)


@pytest.mark.slow
def test_with_phases_a_late_document_moves_no_other_into_another_group(artifact, tmp_path):
    """Of which the recomputed groups would otherwise be cut: an honest result would be called a forged one."""
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": words(seed, 60)}) + "\n" for seed in range(6)))
    klora("score", artifact, "--jsonl", path, "--out", tmp_path, *SETS, "--phases", "1")

    def late(values):
        for document in [one for one in values["documents"] if one["group"] == 1][:2]:
            document.update(status=PARTIAL, adapted_tokens=16)
        consistent(values)

    said = verified(forged(tmp_path, tmp_path, late), artifact, path)
    assert "pass  recomputed: 4 documents are what they were, to the bit" in said
    assert "2 documents of which a deadline left text to the base model; the names" in said


def test_documents_that_a_deadline_left_are_said_to_be_unseen(scored, artifact, lines, tmp_path):
    """No share of them can be recomputed."""

    def late(values):
        values["documents"][4].update(status=PARTIAL, adapted_tokens=16)
        consistent(values)

    said = verified(forged(scored, tmp_path, late), artifact, lines, "--share", "1")
    assert "not seen here: 1 documents of which a deadline left text to the base model; what the model" in said
    assert "pass  recomputed: 4 documents" in said and "valid_score is False" in said


def test_a_sample_is_of_texts_and_says_so(artifact, lines, tmp_path):
    """A file that is renamed moves no document into the sample or out of it."""
    renamed = tmp_path / "other.jsonl"
    shutil.copy(lines, renamed)
    hashes = []
    for path in (lines, renamed):
        out = tmp_path / path.stem
        klora("score", artifact, "--jsonl", path, "--out", out, *SETS, "--most-tokens", "300")
        stored = json.loads((out / "score.json").read_text())
        assert stored["source"]["documents"] == 5 and stored["source"]["most_tokens"] == 300
        hashes.append([document["sha256"] for document in stored["documents"]])
    assert hashes[0] == hashes[1] and 0 < len(hashes[0]) < 5
    assert "a sample of 300 tokens" in verified(tmp_path / "some", artifact, renamed)


@pytest.mark.parametrize("change", ["softcap", "scorer", "weights", "text"])
def test_a_run_goes_on_only_with_the_same_model_scorer_and_text(
    artifact, lines, tmp_path, change, tokenizer, monkeypatch
):
    """Softcap is in the header alone, and no weight tells of it."""
    out, command = tmp_path / "out", ("score", artifact, "--jsonl", lines, *SETS, "--out", tmp_path / "out")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("klora.ttt.pipeline.score", stop)
        klora(*command, check=130)
    assert (out / "journal.jsonl").exists()
    if change == "softcap":
        config = dataclasses.replace(load_artifact(artifact).config, softcap=29.0)
        other = tmp_path / "other.klora"
        save_artifact(other, randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
        assert load_artifact(other).header["payload_sha256"] == load_artifact(artifact).header["payload_sha256"]
        command = ("score", other, *command[2:])
    elif change == "scorer":
        monkeypatch.setattr("klora.cli.scoring.pick_scorer", lambda scorer, device: "engine")
    elif change == "weights":
        command = (*command, "--weights", "int6")
    else:
        (tmp_path / "some.jsonl").write_text(lines.read_text().replace("alpha", "delta", 1))
        command = ("score", artifact, "--jsonl", tmp_path / "some.jsonl", *command[4:])
    refused = klora(*command, "--resume", check=2)
    assert "belongs to a run with another artifact, other documents or other settings" in refused.stderr


@pytest.mark.slow
def test_targets_that_an_interrupted_run_had_scored_are_kept_too(lines, tokenizer, tmp_path):
    """By a run that did not keep them: what its journal holds is scored again, and must be what it says."""
    documents = list(documents_from_texts(Corpus.jsonl([lines]).documents(), tokenizer))
    config = TTTConfig(layout="start", chunk=16, window=64, adapt_from=32)
    model = randomized(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size, blocks=2))
    whole = score(ScoreRequest(model, documents, config, keeps_nll=True))
    key = fingerprint("artifact", documents, config, False)

    def resumed(results):
        book = Journal(tmp_path / "journal.jsonl", key, resume=False, overwrite=True)
        book.add(results)
        try:
            return score(ScoreRequest(model, documents, config, journal=book, keeps_nll=True))
        finally:
            book.close()

    again = resumed({index: whole.documents[index] for index in (0, 3, 4)})
    for ours, theirs in zip(again.nll, whole.nll, strict=True):
        np.testing.assert_array_equal(ours, theirs)

    book = Journal(tmp_path / "journal.jsonl", key, resume=False, overwrite=True)
    book.add(dict(enumerate(whole.documents)))
    request = ScoreRequest(model, documents, config, journal=book, keeps_nll=True)
    with pytest.raises(Interrupted, match="5 of 5 documents are scored, but 5 that .* of which nothing is kept"):
        score(dataclasses.replace(request, should_stop=lambda: True))
    book.close()
    other = dataclasses.replace(whole.documents[4], adapted_nats=whole.documents[4].adapted_nats * 0.99)
    with pytest.raises(ValueError, match="the journal says that 'some.jsonl:5' has .* and scoring it again gives"):
        resumed({4: other})


@pytest.mark.slow
def test_an_audit_of_a_file_passes_and_says_so(artifact, lines, monkeypatch):
    monkeypatch.setitem(SWAPPED, "cpu", 2**11)
    report = json.loads(klora("audit", artifact, "--jsonl", lines, *SETS, "--most-tokens", "100", "--json").stdout)
    assert report["passed"] and report["adapted"] and [c for c in report["checks"] if c["name"] == "full softmax"]
    assert report["tolerance"] == 1e-4 and "a pass in float32 is off from float64 by" in report["rounding"]
    assert all("bit for bit" in check["evidence"] for check in report["checks"][1:6])
    sets = [part for pair in ("min_tokens=16", "chunk=16", "window=64", "epochs=2") for part in ("--set", pair)]
    leaky = ("audit", artifact, "--jsonl", lines, "--protocol", "min_nll", *sets, "--most-tokens", "60")
    said = klora(*leaky, check=1).stdout
    assert "auditing min_nll (LEAKY)" in said and "FAIL  later text: " in said and "failed: later text" in said


def test_an_audit_wants_documents_on_their_own(artifact, lines):
    refused = klora("audit", artifact, "--jsonl", lines, "--set", "phases=2", check=2)
    assert "phases=2 is not possible in an audit" in refused.stderr
