"""`klora score` as a user meets it: what it refuses before the work, keeps when stopped, and says of a deadline."""

import csv
import dataclasses
import html
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import klora as klora_package
import numpy as np
import pytest
from conftest import SMALL, randomized, words
from klora.model.artifact import load_artifact, save_artifact
from klora.model.checkpoint import load_tensors, save_tensors
from klora.model.run_folder import MODEL
from klora.model.shards import ShardWriter
from klora.model.tokenizer import Tokenizer, TokenizerError
from klora.ttt.protocols import ttt_preset
from klora.ttt.report import write_report
from klora.ttt.results import NOT_ADAPTED, RESULTS, DocumentResult, ScoreResult, read_documents_csv
from test_cli import SMALL as CLI_SMALL
from test_cli import klora
from test_tokenizer import CONTEST, model_with

SETS = [part for pair in ("chunk=16", "window=64", "adapt_from=64", "batch=2") for part in ("--set", pair)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.klora"
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
    save_artifact(path, randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("=1+1.txt", "b.txt", "c.txt", "d.txt")):
        (folder / name).write_text(words(number, 20 + 60 * number))
    return folder


def command(artifact, texts, out, *more) -> list:
    return ["score", artifact, "--text", texts, "--out", out, *SETS, *more]


@pytest.mark.slow
def test_a_run_that_was_stopped_is_neither_overwritten_nor_lost(artifact, texts, tmp_path, monkeypatch):
    """Stopped in the base pass and then while adapting: each time the next command says what there is."""
    out = tmp_path / "out"
    whole = json.loads(klora(*command(artifact, texts, tmp_path / "whole", "--json")).stdout)["totals"]
    stops = iter([lambda phase, done: phase == "base", lambda phase, done: phase.startswith("adapt") and done > 300])

    def stopping(stop):
        """The progress display of a run to which SIGTERM comes when `stop` says so."""

        def shown(show):
            return lambda phase, done, total: stop(phase, done) and os.kill(os.getpid(), signal.SIGTERM)

        return shown

    monkeypatch.setitem(sys.modules["klora.ttt.base"].MICRO_TOKENS, "cpu", 128)
    with monkeypatch.context() as patch:
        patch.setattr("klora.cli.scoring._shown", stopping(next(stops)))
        stopped = klora(*command(artifact, texts, out), check=143)
    assert "0 of 4 documents are scored; the same command with --resume goes on from there" in stopped.stdout
    assert not (out / "score.json").exists()
    refused = klora(*command(artifact, texts, out), check=2)
    assert "0 finished documents and" in refused.stderr and "of the base pass" in refused.stderr
    with monkeypatch.context() as patch:
        patch.setattr("klora.cli.scoring._shown", stopping(next(stops)))
        resumed = klora(*command(artifact, texts, out, "--resume"), check=143)
    assert "resuming: 0 documents are already scored, the base pass is done for" in resumed.stdout
    kept = (out / "journal.jsonl").read_bytes()
    refused = klora(*command(artifact, texts, out), check=2)
    assert "finished documents and 100% of the base pass of an interrupted run would be lost; give --resume" in (
        refused.stderr
    )
    assert "or --overwrite to start afresh" in refused.stderr and (out / "journal.jsonl").read_bytes() == kept
    both = klora(*command(artifact, texts, out, "--resume", "--overwrite"), check=2)
    assert "--resume and --overwrite were both given; give one of them" in both.stderr
    resumed = klora(*command(artifact, texts, out, "--resume", "--json"))
    assert json.loads(resumed.stdout)["totals"]["adapted_bpb"] == pytest.approx(whole["adapted_bpb"], rel=1e-6)
    assert sorted(path.name for path in out.iterdir()) == ["documents.csv", "report.html", "report.png", "score.json"]


@pytest.mark.slow
def test_overwrite_starts_afresh(artifact, texts, tmp_path):
    (tmp_path / "journal.jsonl").write_text(
        '{"fingerprint": "x"}\n' + json.dumps({"index": 0, "result": _result()}) + "\n"
    )
    (tmp_path / "journal-3.jsonl").write_text((tmp_path / "journal.jsonl").read_text())
    refused = klora(*command(artifact, texts, tmp_path), check=2)
    assert "journal-3.jsonl: 2 finished documents" in refused.stderr.replace("\n", "")
    assert "Traceback" not in refused.stderr
    wrong = klora(*command(artifact, texts, tmp_path, "--resume"), check=2)
    assert "belongs to a run with another artifact" in wrong.stderr and "--overwrite to start afresh" in wrong.stderr
    done = klora(*command(artifact, texts, tmp_path, "--overwrite"))
    assert "resuming" not in done.stdout and not list(tmp_path.glob("journal*"))


@pytest.mark.slow
def test_results_of_a_finished_run_are_replaced_only_when_asked(artifact, texts, tmp_path):
    klora(*command(artifact, texts, tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for more in (("--preset", "thorough"), ("--resume",)):
        refused = klora(*command(artifact, texts, tmp_path, *more), check=2)
        assert "holds the results of a finished run; give --overwrite" in refused.stderr.replace("\n", "")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    klora(*command(artifact, texts, tmp_path, "--overwrite", "--deadline", "1e-9"))
    assert (tmp_path / "score.json").read_bytes() != before["score.json"]


@pytest.mark.slow
def test_a_run_that_was_stopped_before_it_had_anything_does_not_give_finished_results_away(artifact, texts, tmp_path):
    """Of a run with --overwrite that ends at once a journal without results is left."""
    klora(*command(artifact, texts, tmp_path))
    before = (tmp_path / "score.json").read_bytes()
    (tmp_path / "journal.jsonl").write_text('{"fingerprint": "x"}\n')
    refused = klora(*command(artifact, texts, tmp_path), check=2).stderr.replace("\n", "")
    assert "finished run and the journal of another; give --resume to go on with that, --overwrite" in refused
    assert (tmp_path / "score.json").read_bytes() == before


def test_a_folder_without_a_name_of_its_own_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "it is a folder; give the path of an exported artifact" in klora("score", ".", check=2).stderr
    assert "has no name that the results could be called after; give --out" in klora("score", "/", check=2).stderr


@pytest.mark.slow
def test_no_file_of_the_users_is_taken_for_a_journal_or_replaced(artifact, tmp_path):
    """Texts that lie in --out, under names such as klora's own."""
    line = json.dumps({"text": words(0, 40)}) + "\n"
    own = [tmp_path / name for name in ("journals.jsonl", "journal-2024.jsonl", "journal-x.txt")]
    copy = tmp_path / "journal-backup.jsonl"
    for path, text in [*((path, line) for path in own), (copy, '{"fingerprint": "x"}\n')]:
        path.write_text(text)
    score = ["score", artifact, "--jsonl", own[0], "--jsonl", own[1], "--out", tmp_path, *SETS]
    klora(*score)
    assert all(path.read_text() == line for path in own) and copy.exists()
    refused = klora(*score, check=2).stderr.replace("\n", "")
    assert "holds the results of a finished run; give --overwrite to replace them" in refused
    klora(*score, "--overwrite")
    assert all(path.read_text() == line for path in own)

    for path in map(tmp_path.joinpath, RESULTS):
        path.unlink()
    own = tmp_path / "journal.jsonl"
    own.write_text(line)
    refused = klora(*score, check=2).stderr.replace("\n", "")
    assert "journal.jsonl is there and is no journal of klora's, and a journal would take its place; move it" in refused
    assert own.read_text() == line
    own.unlink()
    (tmp_path / "report.html").write_text("mine")
    refused = klora(*score, check=2).stderr.replace("\n", "")
    assert "holds report.html, which the results would replace; give --overwrite to replace them, or another" in refused
    assert (tmp_path / "report.html").read_text() == "mine"


def _result() -> dict:
    names = ("name", "tokens", "bytes", "status", "base_nats", "tempered_nats", "adapted_nats")
    return dict(zip(names, ("a", 3, 6, "short", 1.0, 1.0, 1.0), strict=True))


@pytest.mark.slow
def test_a_deadline_is_none_by_default_and_stands_in_every_output(artifact, texts, tmp_path):
    plain = klora(*command(artifact, texts, tmp_path / "plain"))
    stored = json.loads((tmp_path / "plain" / "score.json").read_text())
    assert stored["config"]["deadline"] == 0.0 and stored["totals"]["adapted_share"] == 1.0
    assert "deadline:" not in plain.stdout and "The deadline of" not in plain.stdout
    hit = klora(*command(artifact, texts, tmp_path / "hit", "--deadline", "1e-9"))
    assert "bits per byte (deadline: 0.0% adapted)" in hit.stdout
    assert "The deadline of 1e-09 s left text to the base model" in hit.stdout
    totals = json.loads((tmp_path / "hit" / "score.json").read_text())["totals"]
    assert totals["adapted_share"] == 0.0 and totals["deadline_hit"] is True
    assert "adapted (deadline: 0.0% adapted)" in (tmp_path / "hit" / "report.html").read_text()
    shares = {row["adapted_share"] for row in read_documents_csv(tmp_path / "hit" / "documents.csv")}
    assert shares == {0.0, None}
    machine = klora(*command(artifact, texts, tmp_path / "json", "--deadline", "1e-9", "--json"))
    assert json.loads(machine.stdout)["totals"]["adapted_share"] == 0.0


@pytest.mark.slow
def test_names_reach_the_csv_as_text(artifact, texts, tmp_path):
    klora(*command(artifact, texts, tmp_path))
    with open(tmp_path / "documents.csv", newline="") as file:
        names = [row[0] for row in csv.reader(file)]
    assert names == ["name", "'=1+1.txt", "b.txt", "c.txt", "d.txt"]
    assert [row["name"] for row in read_documents_csv(tmp_path / "documents.csv")][0] == "=1+1.txt"


def test_what_cannot_be_written_is_found_before_the_work(artifact, texts, tmp_path, monkeypatch):
    def work(*arguments, **options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("klora.cli.subject.load_artifact", work)
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in RESULTS:
        (tmp_path / "taken" / name / name).mkdir(parents=True)
    for out, says in (
        *((tmp_path / "taken" / name, f"{name} is no file; allowed: a file") for name in RESULTS),
        ("/proc/klora/scores", "cannot be written"),
        (tmp_path / "file" / "scores", "cannot be written"),
        (tmp_path / "file", "is no folder"),
        (tmp_path / "nowhere", "is no folder"),
    ):
        assert says in klora(*command(artifact, texts, out), check=2).stderr.replace("\n", " ")
    monkeypatch.setattr("klora.cli.scoring.SPARE_BYTES", 2**60)
    assert (
        "free; make space or give a path on another disk" in klora(*command(artifact, texts, tmp_path), check=2).stderr
    )
    monkeypatch.undo()
    monkeypatch.setattr("klora.cli.scoring.TOKEN_BYTES", 2**50)
    monkeypatch.setattr("klora.ttt.pipeline.score", work)
    assert "make space" in klora(*command(artifact, texts, tmp_path), check=2).stderr


@pytest.mark.slow
def test_a_report_that_cannot_be_made_costs_no_results(artifact, texts, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no page today")

    monkeypatch.setattr("klora.ttt.report._page", fail)
    done = klora(*command(artifact, texts, tmp_path))
    assert (
        "the report could not be made (RuntimeError: no page today)" in done.stderr and "bits per byte" in done.stdout
    )
    assert (tmp_path / "score.json").exists() and not list(tmp_path.glob("journal*"))


def test_an_artifact_or_shards_with_a_tokenizer_that_is_counted_wrong_are_refused(artifact, tokenizer, tmp_path):
    suffix = model_with(treat_whitespace_as_suffix=True)
    config = load_artifact(artifact).config
    save_artifact(tmp_path / "suffix.klora", randomized(config).state_dict(), config, suffix, {"steps": 0})
    refused = klora("score", tmp_path / "suffix.klora", "--text", __file__, check=2)
    assert "changes a space: it reads ' ' back as '  '" in refused.stderr
    for split in ("train", "val"):
        with ShardWriter(tmp_path / "shards", split) as writer:
            writer.add(tokenizer.encode("alpha beta"))
    (tmp_path / "shards" / "fineweb.model").write_bytes(suffix)
    for arguments in (("score", artifact), ("train", "--out", tmp_path / "run")):
        refused = klora(*arguments, "--shards", tmp_path / "shards", check=2)
        assert "fineweb.model changes a space" in refused.stderr


@pytest.fixture(scope="module")
def contest_run(tmp_path_factory) -> SimpleNamespace:
    """Shards as the contest makes them, a run trained on them and its artifact, each by its own command."""
    folder, model = tmp_path_factory.mktemp("contest"), model_with(**CONTEST)
    contest = Tokenizer(model, may_normalise=True)
    for split, seeds in (("train", range(12)), ("val", range(20, 23))):
        with ShardWriter(folder / "shards", split) as writer:
            for seed in seeds:
                writer.add(contest.encode(words(seed, 150)))
    (folder / "shards" / "fineweb_1024_bpe.model").write_bytes(model)
    sizes = {**CLI_SMALL, "vocab_size": contest.vocab_size, "max_steps": 2, "warmdown_steps": 1}
    sets = [part for name, value in sizes.items() for part in ("--set", f"{name}={value}")]
    trained = klora("train", "--shards", folder / "shards", "--out", folder / "run", *sets)
    klora("export", folder / "run", "--out", folder / "model.klora")
    return SimpleNamespace(folder=folder, tokenizer=contest, stdout=trained.stdout, sets=sets)


@pytest.mark.slow
def test_training_on_shards_of_normalised_text_says_so(contest_run, tmp_path):
    (note,) = contest_run.tokenizer.notes_on_shards(0)
    said = contest_run.stdout.replace("\n", "")
    assert said.index("validation BPB") < said.index(f"note: {note}".replace("\n", ""))
    run = contest_run.folder / "run"
    assert json.loads((run / "run.json").read_text())["sources"]["notes"] == [note]
    artifact = load_artifact(contest_run.folder / "model.klora")
    assert artifact.provenance["sources"] == {"kind": "shards", "notes": [note]}
    arguments = ("train", "--shards", contest_run.folder / "shards", "--out", tmp_path / "run", *contest_run.sets)
    assert json.loads(klora(*arguments, "--json").stdout)["notes"] == [note]


@pytest.mark.slow
def test_scores_of_normalised_shards_say_so_in_every_output(contest_run, tmp_path):
    (note,) = contest_run.tokenizer.notes_on_shards(0)
    arguments = ("score", contest_run.folder / "model.klora", "--shards", contest_run.folder / "shards", *SETS)
    shown = klora(*arguments, "--out", tmp_path)
    assert f"note: {note}" in shown.stdout
    stored = json.loads((tmp_path / "score.json").read_text())
    assert (stored["notes"], stored["bytes_of"]) == ([note], "normalised text")
    texts = [contest_run.tokenizer.normalise(words(seed, 150)) for seed in (20, 21, 22)]
    assert stored["totals"]["bytes"] == sum(len(text.encode()) for text in texts)
    page = (tmp_path / "report.html").read_text()
    assert html.escape(note[1:]) in page[: page.index("bits per byte</small>")]  # above the numbers
    rows = read_documents_csv(tmp_path / "documents.csv")
    assert [row["bytes_of_normalised_text"] for row in rows] == [len(text.encode()) for text in texts]
    machine = json.loads(klora(*arguments, "--out", tmp_path / "json", "--json").stdout)
    assert (machine["notes"], machine["bytes_of"]) == ([note], "normalised text")


def test_scores_of_shards_with_control_tokens_say_so(artifact, tokenizer, tmp_path):
    """Tokens of no text, as an end of document is one: their bits are counted, and were so without a word."""
    with ShardWriter(tmp_path, "val") as writer:
        writer.add(np.append(tokenizer.encode("alpha beta"), 2))
        writer.add(np.append(tokenizer.encode("gamma"), 2))
    (tmp_path / "fineweb.model").write_bytes(tokenizer.to_bytes())
    shown = klora("score", artifact, "--shards", tmp_path, "--out", tmp_path / "out", *SETS)
    assert "note: the scored documents have 2 control tokens other than BOS: bits per byte count" in shown.stdout
    stored = json.loads((tmp_path / "out" / "score.json").read_text())
    assert stored["totals"]["bytes"] == len("alpha betagamma") and stored["bytes_of"] == "text"
    assert len(stored["notes"]) == 1
    again = ("verify", tmp_path / "out" / "score.json", "--artifact", artifact, "--shards", tmp_path)
    klora(*again)
    (tmp_path / "out" / "score.json").write_text(json.dumps(stored | {"notes": []}))
    assert 'FAIL  labels: the note "the scored' in klora(*again, check=1).stdout.replace("'", '"')


@pytest.mark.slow
def test_texts_that_the_tokenizer_does_not_keep_are_refused_by_name(contest_run, texts, tmp_path):
    score = ("score", contest_run.folder / "model.klora", *SETS, "--out", tmp_path / "out", "--text")
    refused = klora(*score, texts, check=2)
    assert "document '=1+1.txt' has" in refused.stderr and "is read back as" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "out").exists()
    (tmp_path / "kept.txt").write_text("alpha beta gamma")
    klora(*score, tmp_path / "kept.txt")
    stored = json.loads((tmp_path / "out" / "score.json").read_text())
    assert (stored["notes"], stored["bytes_of"], stored["totals"]["bytes"]) == ([], "text", 16)


def test_an_artifact_of_normalised_shards_generates(contest_run):
    shown = klora("generate", contest_run.folder / "model.klora", "--prompt", "alpha beta", "--tokens", "4")
    assert "alpha beta" in shown.stdout


def test_a_run_on_text_cannot_have_a_tokenizer_that_normalises(contest_run, tmp_path):
    tensors, meta = load_tensors(contest_run.folder / "run" / MODEL)
    meta["provenance"]["sources"] = {"kind": "text"}
    save_tensors(tmp_path / MODEL, tensors, meta)
    (tmp_path / "tokenizer.model").write_bytes(contest_run.tokenizer.to_bytes())
    assert "tokenizer.model changes a space" in klora("export", tmp_path, check=2).stderr


@pytest.mark.slow
def test_scores_without_a_note_have_none(artifact, texts, tmp_path):
    shown = klora(*command(artifact, texts, tmp_path))
    stored = json.loads((tmp_path / "score.json").read_text())
    assert (stored["notes"], stored["bytes_of"]) == ([], "text") and "note:" not in shown.stdout


def test_the_demo_says_its_deadline_and_what_it_left_out(tmp_path, monkeypatch):
    """The demo without its training and scoring, which take minutes."""
    left_out = DocumentResult("a", 100, 200, NOT_ADAPTED, 14.0, 13.5, 14.0, 13.9)
    scored = ScoreResult([left_out], ttt_preset(), {})
    stubs = {"prepare_first": None, "run_training": SimpleNamespace(signal=0), "export_run": SimpleNamespace(bytes=5)}
    stubs |= {"fit_threads": None, "Scoring": SimpleNamespace(run=lambda output: scored)}
    for name, value in stubs.items():
        monkeypatch.setattr(f"klora.cli.demo.{name}", lambda *arguments, value=value, **options: value)
    shown = klora("demo", "--out", tmp_path / "demo").stdout
    assert "scoring, adapted to each document (no further ones after 100 s)" in shown
    assert "adapted (score_first, deadline: 0.0% adapted)" in shown
    machine = json.loads(klora("demo", "--out", tmp_path / "demo", "--json").stdout)
    assert (machine["deadline"], machine["adapted_share"], machine["deadline_hit"]) == (100.0, 0.0, True)


def test_pictures_of_normalised_text_say_so(contest_run, tmp_path, monkeypatch):
    drawn = []

    def keep(figure, dpi):
        drawn.append({text for axes in figure.axes for text in (axes.get_title(), axes.get_ylabel())})
        return b"png"

    for module in ("klora.ttt.picture", "klora.model.curve"):
        monkeypatch.setattr(f"{module}.figure_png", keep)
    facts = {"bytes_of": "normalised text"}
    write_report(
        ScoreResult([DocumentResult("a", 100, 200, NOT_ADAPTED, 1.0, 1.0, 1.0)], ttt_preset(), {}, facts), tmp_path
    )
    assert "bits per byte of the normalised text (lower is better)" in drawn.pop()
    klora(
        "train",
        "--shards",
        contest_run.folder / "shards",
        "--out",
        tmp_path / "run",
        *contest_run.sets,
        "--set",
        "validate_seconds=1e-6",
    )
    assert "validation bits per byte of the normalised text" in drawn.pop()


def test_a_loaded_model_refuses_texts_that_its_tokenizer_does_not_keep(contest_run):
    for name in ("run", "model.klora"):
        model = klora_package.load(contest_run.folder / name)
        for scored in (model.score, model.adapt):
            assert scored("alpha beta").documents[0].bytes == 10
            with pytest.raises(
                TokenizerError, match="document 'spaced' has 8 bytes of text, and its tokens stand for 5"
            ):
                scored({"spaced": "  alpha "})


@pytest.mark.slow
def test_where_nothing_is_adapted_it_says_why(artifact, texts, tmp_path):
    """The adapted number is then the base model's."""
    for more, why in (
        (("adapt_from=3000",), "with chunk=16 and adapt_from=3000, only what comes after a document's first 3,008"),
        (("layout=original", "adapt_from=0", "min_tokens=9000"), "with layout=original and min_tokens=9000, none has"),
    ):
        sets = [part for pair in more for part in ("--set", pair)]
        said = klora(*command(artifact, texts, tmp_path / more[0], *sets)).stdout.replace("\n", "")
        assert f"note: no document was adapted: {why}" in said
    assert "no document was adapted" not in klora(*command(artifact, texts, tmp_path / "all")).stdout


def test_a_sweep_that_is_stopped_does_not_promise_to_go_on(artifact, texts, tmp_path, monkeypatch):
    def stopping(show):
        return lambda phase, done, total: os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("klora.cli.scoring._shown", stopping)
    module = sys.modules["klora.ttt.sweep"]
    monkeypatch.setattr(module, "in_halves", lambda documents, config: (documents[:2], documents[2:]))
    stopped = klora(*command(artifact, texts, tmp_path / "out", "--sweep"), check=143)
    assert "stopped in the sweep, of which nothing is kept: the same command begins it again" in stopped.stdout
    assert "--resume" not in stopped.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapt_from", [0, 64, 5000])
def test_kernels_are_compiled_for_the_documents_that_are_adapted(
    artifact, texts, tmp_path, monkeypatch, tokenizer, adapt_from
):
    """As if there were a GPU: min_tokens, which layout start does not read, has no say in it."""
    asked = []

    def warmed(make, device, output):
        make()
        raise KeyboardInterrupt

    monkeypatch.setattr("klora.cli.scoring.own_device", lambda name: SimpleNamespace(type="cuda"))
    monkeypatch.setattr("klora.cli.subject.model_from_artifact", lambda *about: None)
    monkeypatch.setattr("klora.cli.warm.warmed", warmed)
    monkeypatch.setattr("klora.cli.warm.scoring", lambda model, config, documents, weights: asked.append(documents))
    klora(*command(artifact, texts, tmp_path / "out", "--set", f"adapt_from={adapt_from}"), check=130)
    targets = [len(tokenizer.encode(path.read_text())) - 1 for path in texts.iterdir()]
    first = max(adapt_from, 16)
    assert asked == [sum(count > first for count in targets)]


@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_a_stride_is_the_chunk_and_gives_base_and_adapted_model_their_context(artifact, texts, tmp_path, context):
    given = ["score", artifact, "--text", texts, "--set", "window=32", "--set", f"context={context}"]
    found = [
        json.loads(klora(*given, *more, "--out", tmp_path / more[-1], "--json").stdout)
        for more in (("--stride", "8"), ("--set", "chunk=8"), ("--stride", "32"))
    ]
    assert found[0]["config"] == found[1]["config"] and found[0]["config"]["chunk"] == 8
    assert found[0]["totals"] == found[1]["totals"] and found[0]["totals"]["base_bpb"] != found[2]["totals"]["base_bpb"]


@pytest.mark.parametrize(
    "more, says",
    [
        (("--stride", "0"), "Invalid value for '--stride'"),
        (("--stride", "2000"), "chunk=2000 is not possible; allowed: at most window=1024"),
        (("--stride", "8", "--set", "chunk=8"), "--stride was given together with --set chunk=8; give one of them"),
        (("--phases", "1", "--set", "phases=0"), "--phases was given together with --set phases=0; give one of them"),
        (("--deadline", "1", "--set", "deadline=2"), "--deadline was given together with --set deadline=2"),
        (("--protocol", "min_nll", "--set", "protocol=score_first"), "--protocol was given together with --set"),
        (("--phases", "-1"), "phases=-1 is not possible; allowed: int, at least 0"),
        (("--preset", "nope"), "there is no preset 'nope'; allowed: design, quick, thorough, best, contest, hf"),
        (("--set", "targets=x"), "targets='x' is not possible; allowed: some of q, k, v, o, up, down, head"),
        (("--set", "o_rank=4"), "o_rank=4 is not possible; allowed: 0, with targets=q,k,v,head"),
        (("--set", "context=kept"), "context='kept' is not possible; allowed: one of recomputed, cached"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_of_adapting_is_refused_by_its_name_before_the_work(artifact, tmp_path, more, says):
    refused = klora("score", artifact, "--out", tmp_path / "out", *more, check=2)
    assert says in refused.stderr and "Traceback" not in refused.stderr and not (tmp_path / "out").exists()


def test_a_sweep_over_too_few_documents_says_what_it_wants(artifact, texts, tmp_path):
    one = ["score", artifact, "--text", texts / "b.txt", "--out", tmp_path / "out", *SETS, "--sweep"]
    refused = klora(*one, check=2)
    assert re.search(r"of 1 documents \d are in the \w+ half, none of them long enough to adapt; give", refused.stderr)
    assert "Traceback" not in refused.stderr and not (tmp_path / "out").exists()
