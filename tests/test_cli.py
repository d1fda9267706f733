"""The command line as a user meets it: the whole chain on a small corpus, wrong arguments, interruptions."""

import csv
import errno
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import klora.cli.doctor as doctor_module
import pytest
import torch
import typer
from conftest import wait_for
from forks import Forked
from klora import __version__
from klora.bench.record import RecordError
from klora.cli import main
from klora.cli.bench import require_replaceable
from klora.cli.console import Amount, Output
from klora.cli.demo import is_demo
from klora.cli.subject import _held_out_stdlib
from klora.install import pip_install
from klora.model import load_artifact
from klora.model.checkpoint import load_tensors, save_tensors
from klora.model.config import preset
from klora.model.corpus import Corpus
from klora.model.generate import generate_tokens
from klora.model.loading import model_from_artifact
from klora.model.parallel import Ranks
from klora.ttt.protocols import PRESETS
from rich.console import Console
from rich.progress import Progress

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
SMALL = {
    "vocab_size": 400,
    "width": 32,
    "blocks": 2,
    "heads": 2,
    "kv_heads": 1,
    "mlp_hidden": 64,
    "train_length": 128,
    "bigram_rows": 64,
    "bigram_width": 8,
    "batch_tokens": 512,
    "micro_batch_tokens": 512,
    "max_steps": 60,
    "warmdown_steps": 20,
    "validate_tokens": 4096,
}
SETS = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def klora(*arguments, check: int = 0) -> Done:
    """Run the command's own entry point in this process: the same code without seconds of imports."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["klora", *map(str, arguments)])
        patch.setenv("COLUMNS", "120")
        try:
            main()
        except SystemExit as exit:
            status = exit.code or 0
    done = Done(status, out.getvalue(), err.getvalue())
    assert status == check, f"{arguments}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Thirty text files, each with a subject of its own that repeats: there is something to adapt to."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        name = f"subject{number}"
        lines = [f"{name} has {i} parts; part {i} of {name} is called {name}-{i % 7}.\n" for i in range(40)]
        (folder / f"{name}.txt").write_text("".join(lines[: 6 + (number * 7) % 34]))
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    done = klora(
        "train", "--text", corpus, "--val-share", "0.2", "--out", out, "--cache", out.parent / "cache", *SETS, "--json"
    )
    result = json.loads(done.stdout)
    assert result["status"] == "finished" and result["step"] == 60
    exported = json.loads(klora("export", out, "--json").stdout)
    assert exported["bytes"] == (out / "model.klora").stat().st_size <= 16_000_000
    return out


@pytest.mark.slow
def test_score_writes_csv_json_and_a_report(run, corpus, tmp_path):
    done = klora("score", run / "model.klora", "--text", corpus, "--prequant", run, "--out", tmp_path, "--json")
    totals = json.loads(done.stdout)["totals"]
    assert totals["documents"] == 30
    assert totals["bytes"] == sum(path.stat().st_size for path in corpus.iterdir())
    assert abs(totals["base_bpb"] - totals["prequant_bpb"]) < 0.05
    assert totals["adapted_bpb"] < totals["base_bpb"]
    stored = json.loads((tmp_path / "score.json").read_text())
    assert stored["valid_score"] is True and len(stored["documents"]) == 30
    assert {"base", "adapt", "load", "tokenize"} <= stored["seconds"].keys()
    with open(tmp_path / "documents.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["name"] for row in rows) == sorted(path.name for path in corpus.iterdir())
    assert {"name", "tokens", "bytes", "base_bpb", "adapted_bpb"} <= rows[0].keys()
    HTMLParser().feed((tmp_path / "report.html").read_text())
    assert (tmp_path / "report.png").is_file()
    assert not (tmp_path / "journal.jsonl").exists()


@pytest.mark.slow
def test_leaky_results_say_so_on_the_terminal_and_in_files(run, corpus, tmp_path):
    done = klora(
        *("score", run / "model.klora", "--text", corpus, "--out", tmp_path, "--most-tokens", "4000"),
        *("--protocol", "min_nll", "--set", "epochs=2"),
    )
    assert "min_nll (LEAKY)" in done.stdout and "not a valid score" in done.stdout
    assert "LEAKY" in (tmp_path / "report.html").read_text()
    assert "adapted_bpb_LEAKY" in (tmp_path / "documents.csv").read_text()
    assert json.loads((tmp_path / "score.json").read_text())["label"] == "LEAKY"


@pytest.mark.slow
def test_score_reads_shards_and_their_names(run, tmp_path):
    folder = next(path for path in (run.parent / "cache").iterdir() if path.is_dir())
    done = klora("score", run / "model.klora", "--shards", folder, "--out", tmp_path, "--json")
    prepared = json.loads((folder / "prepared.json").read_text())["validation"]
    totals = json.loads(done.stdout)["totals"]
    assert totals["documents"] == prepared["documents"] and totals["bytes"] == prepared["bytes"]


def test_the_default_documents_are_those_that_training_held_out():
    """A model that saw 99% of the standard library is scored on the other 1%, not on the usual 5%."""
    share = _held_out_stdlib({"sources": {"kind": "stdlib", "validation_share": 0.01}})
    usual = _held_out_stdlib({"sources": {"kind": "text", "validation_share": None}})
    names, all_names = ({d.name for d in corpus.documents()} for corpus in (share, usual))
    assert 0 < len(names) < len(all_names) and names < all_names


@pytest.mark.slow
def test_provenance_names_the_sources_without_folders(run, corpus):
    provenance = load_artifact(run / "model.klora").provenance
    assert provenance["sources"] == {"kind": "text", "files": [corpus.name], "validation_share": 0.2}
    assert str(corpus.parent) not in json.dumps(provenance)


def test_train_reads_shards_and_what_defines_a_run_cannot_change(run, tmp_path):
    folder = next(path for path in (run.parent / "cache").iterdir() if path.is_dir())
    out = tmp_path / "run"
    klora("train", "--shards", folder, "--out", out, *SETS, "--set", "max_steps=5")
    wrong = klora("train", "--resume", "--out", out, "--set", "width=64", check=2)
    assert "width cannot change when a run is resumed (width is 32 there and 64 here); allowed: seconds" in wrong.stderr
    wrong = klora("train", "--resume", "--preset", "tiny", "--out", out, check=2)
    assert "--resume takes preset and data from the run" in wrong.stderr
    (out / "run.json").write_text("{}")
    assert "run.json is damaged" in klora("train", "--resume", "--out", out, check=2).stderr


@pytest.mark.slow
def test_sigint_writes_a_checkpoint_and_resume_finishes_the_run(run, tmp_path):
    folder = next(path for path in (run.parent / "cache").iterdir() if path.is_dir())
    out = tmp_path / "run"
    arguments = ["-m", "klora.cli", "train", "--shards", folder, "--out", out, *SETS]
    process = Forked([*arguments, "--set", "max_steps=100000", "--seconds", "600"], environment=ENV)
    wait_for(lambda: len(_lines(out / "loss.csv")) >= 5, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130 and "--resume" in output and "Traceback" not in errors
    export = klora("export", out, check=2)
    assert "its training did not finish" in export.stderr
    again = klora("train", "--shards", folder, "--out", out, *SETS, check=2)
    assert "holds an unfinished run; give --resume to go on, --overwrite to start afresh" in again.stderr
    steps = len(_lines(out / "loss.csv")) - 1
    done = klora("train", "--resume", "--out", out, "--set", f"max_steps={steps + 3}", "--json")
    assert json.loads(done.stdout)["step"] == steps + 3
    assert [line.split(",")[0] for line in _lines(out / "loss.csv")[1:]] == [str(i) for i in range(1, steps + 4)]


def test_the_help_of_train_lists_every_preset():
    from klora.model.config import PRESETS as OF_TRAINING

    text = klora("train", "--help").stdout
    assert all(name in text for name in OF_TRAINING)
    assert all(name in klora("warm", "--help").stdout for name in OF_TRAINING)


def test_ctrl_c_while_data_is_prepared_says_what_is_kept(tmp_path, monkeypatch, capsys):
    command = importlib.import_module("klora.cli.train")

    def interrupted(train, validation, vocab_size, cache, progress):
        progress("train", 1234)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "prepare", interrupted)
    corpora = Corpus.stdlib("train"), Corpus.stdlib("validation")
    ranks = Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(typer.Exit) as ended:
        command.prepare_first(corpora, preset("tiny"), tmp_path, ranks, Output(as_json=True))
    said = capsys.readouterr().err
    assert ended.value.exit_code == 130 and not any(tmp_path.iterdir())

    def stopped(*about):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "Trainer", stopped)
    with pytest.raises(typer.Exit) as ended:
        command.run_training(preset("tiny"), None, tmp_path, ranks, Output(as_json=True), {})
    assert ended.value.exit_code == 130 and "stopped before the first step; the data" in capsys.readouterr().err
    assert "stopped while tokenizing train, after 1,234 documents" in said and "nothing is kept" in said


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_an_interrupted_score_resumes(run, corpus, tmp_path):
    command = ["score", run / "model.klora", "--text", corpus, "--out", tmp_path, "--set", "batch=1"]
    process = Forked(["-m", "klora.cli", *command], environment=ENV)
    wait_for((tmp_path / "journal.base.npy").exists, process)  # the base pass is done, and adapting begins
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143 and "--resume goes on from there" in output
    resumed = klora(*command, "--resume")
    assert "documents are already scored, the base pass is done for 100% of the text" in resumed.stdout
    again = json.loads((tmp_path / "score.json").read_text())
    klora(*command, "--overwrite")
    assert json.loads((tmp_path / "score.json").read_text())["totals"]["adapted_bpb"] == pytest.approx(
        again["totals"]["adapted_bpb"], rel=1e-6
    )


@pytest.mark.slow
def test_generate_is_reproducible_and_greedy_at_zero(run):
    arguments = ("generate", run / "model.klora", "--prompt", "subject3 has", "--tokens", "20", "--json")
    first, second = (json.loads(klora(*arguments).stdout)["text"] for _ in range(2))
    assert first == second and first
    other = json.loads(klora(*arguments, "--seed", "5").stdout)["text"]
    assert other != first
    assert klora("generate", run / "model.klora", "--temperature", "0").stdout


@pytest.mark.slow
def test_doctor_says_what_is_used_and_why():
    facts = json.loads(klora("doctor", "--json").stdout)
    assert facts["device"].get("type") == "cpu" or "compute capability" in facts["device"]
    assert "(" in facts["attention backend"] and facts["kernel backend"].split(":")[0] == (
        "reference" if facts["device"].get("type") == "cpu" else "triton"
    )
    assert facts["versions"]["torch"] and "python" in facts["versions"]
    klora("doctor")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_doctor_advises_what_can_be_installed_here(device, monkeypatch):
    """Nothing that wants a GPU where there is none; the extra that brings a package, and this interpreter's pip."""
    monkeypatch.setattr(doctor_module, "_version", lambda name: None)
    missing = json.loads(klora("doctor", "--device", device, "--json").stdout)["missing"]
    assert missing["torch"] == f"required: {pip_install()}"
    for name in ("pytest-benchmark", "jsonschema"):
        assert missing[name].endswith(pip_install("bench"))
    peers = {"flash-attn": pip_install("flash-attn", "--no-build-isolation"), "flash-attn-4": pip_install("fa4")}
    for name, advice in peers.items():
        assert missing[name].endswith("wants a CUDA GPU" if device == "cpu" else advice)


def test_advice_uses_the_pip_of_this_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pip_install("bench").startswith(f"{sys.executable} -m pip install ")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "pip").touch(mode=0o755)
    assert pip_install("bench").startswith("pip install ")


def test_help_teaches_and_fields_are_listed():
    top = klora("--help").stdout
    assert all(command in top for command in ("demo", "train", "export", "score", "generate", "doctor"))
    assert "torchrun" in klora("train", "--help").stdout and "LEAKY" in klora("score", "--help").stdout
    fields = json.loads(klora("train", "--preset", "seed", "--set", "width=256", "--fields", "--json").stdout)
    assert fields["width"]["value"] == 256 and fields["muon_lr"]["allowed"] == "float, at least 0.0"
    assert fields["gradient_buckets"]["value"] == 1 and "during the backward" in fields["gradient_buckets"]["help"]
    assert fields["muon_gathers"]["value"] == 0 and "all-gathers" in fields["muon_gathers"]["help"]
    assert klora("--version").stdout == f"klora {__version__}\n"
    assert "steps_per_chunk" in klora("score", "any.klora", "--fields").stdout
    assert klora("score", "--fields").stdout == klora("score", "any.klora", "--fields").stdout


def test_the_honest_protocol_has_constants_of_its_own_and_the_leaky_ones_the_designs():
    def lr(*arguments: str) -> float:
        return json.loads(klora("score", "any.klora", *arguments, "--fields", "--json").stdout)["lr"]["value"]

    quick, thorough = PRESETS["quick"]["lr"], PRESETS["thorough"]["lr"]
    assert lr() == lr("--preset", "quick", "--protocol", "min_nll") == quick != 0.01
    assert lr("--preset", "thorough") == thorough != quick
    assert lr("--preset", "design") == lr("--protocol", "min_nll") == lr("--set", "protocol=multi_epoch") == 0.01
    assert lr("--set", "lr=0.5") == 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--preset", "huge"], "there is no preset 'huge'; allowed: tiny, seed, seed-11l"),
        (["train", "--set", "wdith=3"], "there is no field 'wdith' (given wdith=3); did you mean width"),
        (["train", "--set", "width"], "--set 'width' is not possible; allowed: FIELD=VALUE"),
        (["train", "--set", "heads=7"], "heads=7 is not possible; allowed: a divisor of width=128"),
        (["train", "--seconds", "-4"], "seconds=-4.0 is not possible; allowed: float, above 0.0"),
        (["train", "--val-share", "0"], "validation_share=0.0 is not possible; allowed: above 0, below 1"),
        (["train", "--text", "/nowhere"], "/nowhere: there is no such file or directory"),
        (["train", "--val-text", __file__], "a validation source was given without a training source"),
        (["train", "--shards", "/nowhere"], "/nowhere"),
        (["train", "--shards", "/nowhere", "--val-share", "0.1"], "leave out --text, --jsonl, --field, --val-text"),
        (
            ["train", "--shards", "/nowhere", "--val-jsonl", __file__],
            "--shards was given, whose folder holds both",
        ),
        (["train", "--text", __file__, "--val-text", __file__, "--val-share", "0.1"], "--val-share splits one source"),
        (["train", "--text", __file__, "--field", "body"], "--field body was given without a --jsonl file"),
        (["score", "x.klora", "--text", __file__, "--field", "body"], "--field body was given without a --jsonl file"),
        (["score", "x.klora", "--set", "o_rank=16"], "o_rank=16 is not possible; allowed: 0, with targets=q,k,v,head"),
        (["train", "--resume", "--out", "/nowhere/run"], "there is no run to resume in /nowhere/run"),
        (["train", "--device", "tpu"], "device='tpu' is not possible; allowed: auto, cpu, cuda or cuda:N"),
        (["export", "/nowhere"], "give the folder of a finished"),
        (["train", "--out", __file__], "is no folder; allowed: a folder, or a path where there is nothing yet"),
        (
            ["score", "x.klora", "--out", __file__],
            "is no folder; allowed: a folder, or a path where there is nothing yet",
        ),
        (["score"], "no artifact was given; give the path of one that klora export wrote"),
        (["score", "/nowhere.klora"], "/nowhere.klora: there is no such file"),
        (["score", __file__], "give a file that klora exported"),
        (["score", "x.klora", "--protocol", "best"], "protocol='best' is not possible; allowed: one of score_first"),
        (
            ["score", "x.klora", "--preset", "better"],
            "there is no preset 'better'; allowed: design, quick, thorough, best, contest",
        ),
        (["score", "x.klora", "--deadline", "-1"], "deadline=-1.0 is not possible; allowed: float, at least 0.0"),
        (["generate", __file__], "give a file that klora exported"),
        (["train", "--resume", "--overwrite"], "--resume goes on with the run in --out and --overwrite starts afresh"),
        (["train", "--out", "/proc/nowhere/run"], "/proc/nowhere/run cannot be written: /proc: "),
        (["train", "--out", "/dev/null/run"], "/dev/null/run cannot be written: /dev/null: "),
        (["demo", "--out", "/proc/nowhere"], "/proc/nowhere cannot be written"),
        (["demo", "--out", __file__], "is no folder; allowed: a folder"),
        (["export", "/nowhere", "--out", "/proc/nowhere.klora"], "/proc/nowhere.klora cannot be written"),
        (["export", "/nowhere", "--out", "/dev"], "--out /dev is no file"),
        (["export", "/nowhere", "--out", __file__], "is there and is no artifact of klora's; move it or give another"),
        (["score", "x.klora", "--out", "/proc/nowhere"], "/proc/nowhere cannot be written"),
        (["bench", "attention", "--out", "/proc/nowhere"], "cannot be written"),
        (["bench", "attention", "--check", "/nowhere.json"], "/nowhere.json: there is no such file; give a record"),
        (["bench", "attention", "--readme", "x.md"], "--readme was given without `report`"),
        (["bench", "attention", "--check", "x.json", "--against", "HEAD"], "--against and --check were both given"),
        (["profile", "step", "--out", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    ],
)
def test_mistakes_get_one_clear_sentence(arguments, says):
    done = klora(*arguments, check=2)
    assert says in done.stderr, done.stderr
    assert done.stderr.startswith("klora: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "klora.cli", "export", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("klora: /nowhere has no") and not done.stdout
    assert (
        subprocess.run([Path(sys.executable).with_name("klora"), "--version"], stdout=subprocess.PIPE).returncode == 0
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (["score", "/nowhere.klora"], "ArtifactError", "/nowhere.klora: there is no such file"),
        (["audit", "none.klora", "--tolerance", "nan"], "BadParameter", "'--tolerance'"),
        (["score", "--no-such-option"], "NoSuchOption", "--no-such-option"),
        (["no-such-command"], "UsageError", "no-such-command"),
    ],
)
def test_machines_get_their_errors_as_json(arguments, kind, says):
    done = klora(*arguments, "--json", check=2)
    found = json.loads(done.stdout)
    assert found["kind"] == kind and says in found["error"] and says in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["loss.csv", "tokenizer.model", "run.json"])
def test_a_file_of_the_users_with_a_name_of_a_runs_is_not_replaced_unasked(name, run, tmp_path):
    """What a run left that was killed before its first checkpoint is."""
    folder = next(path for path in (run.parent / "cache").iterdir() if path.is_dir())
    asked = ("train", "--shards", folder, "--out", tmp_path, *SETS, "--set", "max_steps=1")
    (tmp_path / name).write_text("{}")
    refused = klora(*asked, check=2).stderr.replace("\n", "")
    assert f"holds {name}, which the run would replace; give --overwrite to replace them, or another" in refused
    assert (tmp_path / name).read_text() == "{}" and len([*tmp_path.glob("*.*")]) == 1
    shutil.copy(run / "run.json", tmp_path)
    klora(*asked)
    assert (tmp_path / name).read_bytes() != b"{}"


def test_a_finished_run_is_not_overwritten_unasked(run):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    folder = next(path for path in (run.parent / "cache").iterdir() if path.is_dir())
    refused = klora("train", "--shards", folder, "--out", run, *SETS, check=2)
    assert f"{run} holds a finished run (60 steps in " in refused.stderr and "--overwrite to replace" in refused.stderr
    refused = klora("demo", "--out", run, check=2)
    assert "holds a finished run (60 steps" in refused.stderr
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.slow
def test_overwrite_replaces_a_run_and_the_estimate_is_said(run, tmp_path):
    folder = next(path for path in (run.parent / "cache").iterdir() if path.is_dir())
    arguments = ("train", "--shards", folder, "--out", tmp_path, *SETS, "--set", "max_steps=2")
    assert "a step takes about" in klora(*arguments).stdout
    again = klora(*arguments, "--set", "seed=7", "--overwrite")
    assert f"is kept in {tmp_path / 'replaced'} until this one has finished" in again.stderr
    assert json.loads((tmp_path / "run.json").read_text())["train"]["seed"] == 7
    assert not (tmp_path / "replaced").exists()


def test_a_demo_may_replace_a_demo(tmp_path):
    assert not is_demo(tmp_path)
    (tmp_path / "run.json").write_text('{"sources": {"kind": "stdlib", "demo": true}}')
    assert is_demo(tmp_path)
    (tmp_path / "run.json").write_text('{"sources": {"kind": "stdlib"}}')
    assert not is_demo(tmp_path)


def test_text_that_the_terminal_cannot_show_is_escaped(run, monkeypatch):
    class Terminal(io.TextIOWrapper):
        """An ASCII terminal: writing what it cannot show raises, unless a command has changed that."""

    for command in (("generate", run / "model.klora", "--prompt", "caf\u00e9 \u2192", "--tokens", "3"), ("--help",)):
        shown = Terminal(io.BytesIO(), encoding="ascii")
        with redirect_stdout(shown), monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["klora", *map(str, command)])
            with suppress(SystemExit):
                main()
        shown.flush()
        text = shown.buffer.getvalue().decode("ascii")
        assert text.startswith("caf\\xe9 \\u2192") or "Usage" in text


def test_a_prompt_is_read_as_utf8_where_the_locale_is_none(run):
    """Python hands over a half of a surrogate pair for each byte that is no ASCII."""
    arguments = ("generate", run / "model.klora", "--tokens", "3", "--json", "--prompt")
    from_bytes = "café".encode().decode("ascii", errors="surrogateescape")
    assert json.loads(klora(*arguments, from_bytes).stdout)["prompt"] == "café"
    wrong = b"caf\xe9".decode("ascii", errors="surrogateescape")
    assert "--prompt holds bytes that are not UTF-8" in klora(*arguments, wrong, check=2).stderr


def test_temperatures_too_small_or_too_large_to_divide_by_are_served(run):
    def text(temperature: str) -> str:
        prompt = ("--prompt", "subject3 has", "--tokens", "12", "--json")
        return json.loads(klora("generate", run / "model.klora", "--temperature", temperature, *prompt).stdout)["text"]

    assert text("0") == text("1e-46") == text("5e-324") == text("1e-38") == text("1e-30")
    loaded = load_artifact(run / "model.klora")
    model = model_from_artifact(loaded, torch.device("cpu"))
    assert len(list(generate_tokens(model, [1], 3, temperature=1e300, stop=-1))) == 3
    for temperature in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="the temperature is finite"):
            next(generate_tokens(model, [1], 3, temperature=temperature))


def test_an_export_replaces_artifacts_and_nothing_else(run, tmp_path):
    artifact = tmp_path / "model.klora"
    (tmp_path / "empty").touch()
    klora("export", run, "--out", tmp_path / "empty")
    klora("export", run, "--out", artifact)
    klora("export", run, "--out", artifact)
    shutil.copytree(run, tmp_path / "other")
    weights, meta = load_tensors(run / "model.safetensors")
    meta["provenance"]["sources"] = ["text"]
    save_tensors(tmp_path / "other" / "model.safetensors", weights, meta)
    assert "its sources are no object" in klora("export", tmp_path / "other", check=2).stderr
    artifact.write_text("the only copy of something")
    assert "is no artifact of klora's" in klora("export", run, "--out", artifact, check=2).stderr
    assert artifact.read_text() == "the only copy of something"


def test_bench_replaces_records_of_its_kind_and_nothing_else(tmp_path):
    path = tmp_path / "attention.json"
    require_replaceable(path, toy=True)
    for text, says in (("notes", "is no benchmark record"), ("[]", "is no benchmark record")):
        path.write_text(text)
        with pytest.raises(RecordError, match=says):
            require_replaceable(path, toy=False)
    path.write_text('{"results": [{"shape": "batch 4"}]}')
    require_replaceable(path, toy=False)
    with pytest.raises(RecordError, match="is a record of full shapes and --toy would replace it"):
        require_replaceable(path, toy=True)
    path.write_text('{"results": [{"shape": "toy"}]}')
    require_replaceable(path, toy=True)


def test_results_without_a_number_are_valid_json(capsys):
    Output(as_json=True).result({"loss": float("nan"), "bpb": {"last": [1.5, float("inf")]}})
    strict = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert strict == {"loss": None, "bpb": {"last": [1.5, None]}}


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_reader_that_has_gone_ends_nothing(monkeypatch, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

        def flush(self):
            raise error

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    output = Output()
    output.say("words")
    output.table("title", [("a", "b")])
    output.warn("words")
    with output.progress() as show:
        show("words", 1, 2)
    with pytest.raises(OSError, match="the result could not be printed .*files that were written are whole"):
        Output(as_json=True).result({"a": 1})


def test_a_user_without_a_home_has_a_cache_beside_the_runs():
    nobody = "import pwd\ndef unknown(number):\n    raise KeyError\npwd.getpwuid = unknown\n"
    show = nobody + "from klora.cli.options import DEFAULT_CACHE\nprint(DEFAULT_CACHE)"
    homeless = {name: text for name, text in ENV.items() if name != "HOME"}
    done = subprocess.run([sys.executable, "-c", show], env=homeless, capture_output=True, text=True)
    assert done.stdout == "runs/cache\n", done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_closed_before_the_start_ends_nothing(tmp_path, closed):
    """What would be its number goes to no file that is opened later."""
    show = "import os; from klora.cli.app import main; import sys; sys.argv[1:] = ['doctor', '--json']; main(); "
    show += "sys.exit(os.open(os.devnull, os.O_RDONLY) <= 2 or not sys.stderr)"
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, show], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout == "" if ">&-" in closed.replace("2>&-", "") else json.loads(done.stdout)


@pytest.mark.slow
def test_the_demo_gains_by_adaptation(tmp_path, monkeypatch):
    """On some packages of the standard library; the whole of it is read in test_corpus.py."""
    for package in ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "unittest"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, tmp_path / "library" / package)
    library = SimpleNamespace(get_path=lambda name: str(tmp_path / "library"))
    monkeypatch.setattr("klora.model.corpus.sysconfig", library)
    done = klora(
        *("demo", "--out", tmp_path / "demo", "--seconds", "2", "--tokens", "3000"),
        *("--cache", tmp_path / "cache", "--json"),
    )
    result = json.loads(done.stdout)
    assert result["adapted_bpb"] < result["base_bpb"]
    assert Path(result["report"]).is_file() and Path(result["artifact"]).stat().st_size == result["artifact_bytes"]


def test_a_progress_bar_has_a_unit_and_the_time_left():
    amount = Amount()

    def shown(completed, total, unit):
        """What stands behind a bar that came to `completed` in 40 seconds."""
        now = [0.0]
        bar = Progress(amount, get_time=lambda: now[0], auto_refresh=False)
        task = bar.add_task("", total=total, unit=unit)
        for step in (0.25, 0.5, 0.75, 1.0):
            now[0] += 10
            bar.update(task, completed=completed * step)
        return amount.render(bar.tasks[0]).plain

    assert shown(1000, 4000, "tokens") == "1,000/4,000 tokens  0:40, 2:00 left"
    assert shown(0, 4000, "tokens") == "0/4,000 tokens  0:40, -:-- left"
    assert shown(30, 90, "s") == "30/90 s  0:40, 1:00 left"
    assert shown(100, 100, "s") == "100/100 s  0:40, 0:00 left"
    assert shown(100, None, "documents") == "100 documents  0:40"
    assert shown(0, None, "") == "0:40"
    assert shown(40, 40 * 400, "steps").endswith("4:26:00 left")


@pytest.fixture
def bars(monkeypatch):
    """The progress displays that are made."""
    made = []

    class Kept(Progress):
        def __init__(self, *columns, **options):
            super().__init__(*columns, **options)
            made.append(self)

    monkeypatch.setattr("klora.cli.console.Progress", Kept)
    return made


def test_another_total_or_unit_is_another_task_whose_time_starts_anew(bars):
    with Output().progress() as show:
        show("base model", 5, 10, "tokens")
        first = bars[0].tasks[0]
        show("base model, on", 9, 10, "tokens")
        assert bars[0].tasks == [first] and (first.description, first.completed) == ("base model, on", 9)
        show("adapting [x]", 1, 10, "tokens")
        assert bars[0].tasks[0] is not first
        show("looking", 0)
    (last,) = bars[0].tasks
    assert (last.description, last.total, last.fields) == ("looking", None, {"unit": ""})


def test_a_bar_fits_on_a_line_of_eighty_columns(bars):
    with Output().progress() as show:
        for done in (0, 80_000):
            show("before quantisation", done, 1_234_567, "tokens")
        console = Console(width=80, file=io.StringIO())
        console.print(bars[0].get_renderable())
    (line,) = console.file.getvalue().splitlines()
    assert "80,000/1,234,567 tokens" in line


@pytest.mark.slow
def test_every_bar_of_the_commands_names_a_unit(corpus, tmp_path, monkeypatch):
    calls = []

    @contextmanager
    def progress(output):
        yield lambda text, done, total=None, unit="": calls.append((text, total, unit))

    monkeypatch.setattr(Output, "progress", progress)
    out, text = tmp_path / "run", tmp_path / "long.txt"
    text.write_text("".join(path.read_text() for path in sorted(corpus.iterdir())))
    train = ("train", "--text", corpus, "--val-share", "0.2", "--out", out, "--cache", tmp_path, *SETS)
    klora(*train)
    assert {unit for _, _, unit in calls} == {"documents", "steps"}
    klora(*train, "--overwrite", "--set", "max_steps=0", "--set", "seconds=0.5")
    assert {unit for _, _, unit in calls} == {"documents", "steps", "s"}
    calls.clear()
    klora("export", out)
    assert calls == [("choosing clips and compressing", None, "")], "nobody knows how long"
    calls.clear()
    klora("score", out / "model.klora", "--text", text, "--out", tmp_path / "score")
    assert {(text, unit) for text, _, unit in calls} == {("base model", "tokens"), ("adapting", "tokens")}
    assert all(total for _, total, _ in calls)
