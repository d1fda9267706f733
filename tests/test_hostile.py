"""What nobody vouches for: limits refused before they are allocated, pipes, odd JSON, names."""

import csv
import gzip
import io
import json
import logging
import math
import os
import random
from contextlib import suppress
from types import SimpleNamespace

import fuzz
import numpy as np
import pytest
import torch
import typer
import zstandard
from conftest import randomized
from fuzzing.forgeries import (
    forged_artifact,
    sha256,
    zero_artifact,
)
from fuzzing.mutations import slots
from fuzzing.originals import CELLS, FINGERPRINT, benchmark_record
from hypothesis import given, settings
from hypothesis import strategies as st
from klora import KloraError
from klora.bench.curves import CurveError, read_losses
from klora.bench.readings import load_records
from klora.bench.record import RecordError, validate
from klora.bench.sweep import Sweep
from klora.cli.bench import read_record, require_replaceable
from klora.cli.console import Output, printable
from klora.cli.train import _stored_run
from klora.lora import peft
from klora.model.artifact import ArtifactError, load_artifact, save_artifact
from klora.model.checkpoint import CheckpointError, load_tensors, save_tensors
from klora.model.config import ConfigError, ModelConfig, TrainConfig
from klora.model.corpus import Corpus, CorpusError
from klora.model.curve import COLUMNS, LossCurve
from klora.model.estimate import least_memory, loading_bytes
from klora.model.int6_file import load_quantized, save_quantized
from klora.model.int6_model import quantize_linears
from klora.model.loading import load_run, model_from_artifact, model_from_run
from klora.model.reading import LimitError, limit, parse_json, read_bytes
from klora.model.shards import Shard
from klora.model.storage import write_text
from klora.model.tokenizer import Tokenizer, TokenizerError
from klora.model.weights import frozen_weights
from klora.ttt.documents import ENCODE_BATCH, ENCODE_CHARACTERS, Document, documents_from_texts, with_own_names
from klora.ttt.journal import Journal, JournalError
from klora.ttt.protocols import ttt_preset
from klora.ttt.results import ADAPTED, DocumentResult, ScoreResult, read_documents_csv
from klora.ttt.verify import Stored, read_nll
from test_cli import klora

TINY = ModelConfig(vocab_size=300, width=16, blocks=2, heads=2, kv_heads=1, mlp_hidden=16, train_length=16)
TINY = TINY.override({"bigram_rows": 16, "bigram_width": 4})


def grown(work) -> int:
    """Bytes by which this process was larger while `work()` ran than before."""
    before = fuzz.peak_bytes(reset=True)
    work()
    return fuzz.peak_bytes() - before


class TestLimits:
    def test_what_a_model_takes_is_counted_before_it_is_taken(self, files, tmp_path):
        """A table of pairs that is all zeros costs a file nothing, and 256 GiB once it is projected."""
        whole = files.data["model.klora"]
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[4:8], "little")])
        header["config"] |= {"bigram_rows": 2**20, "bigram_width": 1, "width": 1024, "train_length": 16}
        header["config"] |= {"vocab_size": 300, "mlp_hidden": 8, "blocks": 1}
        path = tmp_path / "pairs.klora"
        path.write_bytes(zero_artifact(header, b"", most=16 << 20))
        assert 0 < path.stat().st_size < 64 << 10
        wanted = (
            r"its config asks for [89],\d{3},\d{3},\d{3} bytes and 2,147,483,648 are allowed; if you trust the file"
        )
        assert grown(lambda: self.refuse(path, wanted + ", set KLORA_MAX_MODEL_BYTES=")) < 64 << 20

    def refuse(self, path, wanted):
        with pytest.raises(ArtifactError, match=wanted):
            load_artifact(path)

    @pytest.mark.parametrize(
        ("changes", "most"),
        [
            ({"bigram_rows": 2**24, "bigram_width": 1, "width": 4096}, 256 << 30),
            ({"train_length": 2**20, "width": 4096, "heads": 1}, 4 << 30),
            ({"vocab_size": 65536, "width": 8192}, 4 << 30),
        ],
    )
    def test_what_counts(self, changes, most):
        assert loading_bytes(TINY.override(changes)) > most
        assert loading_bytes(ModelConfig()) < 512 << 20, "the preset has room"

    @pytest.mark.slow
    @pytest.mark.parametrize("weights", ["dense", "int6"])
    @pytest.mark.parametrize(
        "changes",
        [{"bigram_rows": 2**15, "width": 512, "heads": 8}, {"mlp_hidden": 4096, "width": 1024, "blocks": 3}],
        ids=["pairs", "matrices"],
    )
    def test_a_model_takes_no_more_than_was_counted(self, weights, changes, tmp_path):
        config = TINY.override(changes)
        whole = {"format": "klora", "version": 1, "config": config.to_dict(), "provenance": {}, "quantization": {}}
        whole["tokenizer"] = {"base64": "", "sha256": sha256(b"")}
        (tmp_path / "model.klora").write_bytes(zero_artifact(whole, b"", most=1 << 30))
        counted = loading_bytes(config)
        made = lambda: frozen_weights(model_from_artifact(tmp_path / "model.klora", "cpu", weights))  # noqa: E731
        made()
        assert grown(made) < counted

    def test_a_run_s_weights_have_the_same_limit(self, files, tmp_path, monkeypatch):
        (tmp_path / "model.safetensors").write_bytes(files.data["model.safetensors"])
        model_from_run(tmp_path, "cpu")
        monkeypatch.setenv("KLORA_MAX_MODEL_BYTES", "1000")
        with pytest.raises(
            CheckpointError, match="its config asks for .* and 1,000 are allowed; .*KLORA_MAX_MODEL_BYTES="
        ):
            model_from_run(tmp_path, "cpu")

    def test_training_counts_the_projected_table_too(self):
        more = TINY.override({"bigram_rows": 2**24, "bigram_width": 1})
        assert least_memory(more) - least_memory(TINY) > 12 * 2**24 * TINY.width

    @pytest.mark.parametrize("text", ["x", "-1", "0", "1e9", "9" * 30, "٣"])
    def test_a_limit_is_a_number_of_bytes(self, text, monkeypatch):
        monkeypatch.setenv("KLORA_MAX_MODEL_BYTES", text)
        with pytest.raises(LimitError, match="KLORA_MAX_MODEL_BYTES=.* is not possible; allowed: bytes"):
            limit("MAX_MODEL_BYTES")

    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
    def test_a_line_that_unpacks_without_an_end(self, suffix, tmp_path, monkeypatch):
        monkeypatch.setenv("KLORA_MAX_DOCUMENT_BYTES", str(8 << 20))
        path = tmp_path / f"bomb{suffix}"
        line = b'{"text": "' + b"a" * (96 << 20)
        pack = {".jsonl": bytes, ".jsonl.gz": lambda b: gzip.compress(b, 1), ".jsonl.zst": zstandard.compress}[suffix]
        path.write_bytes(pack(line))
        del line
        wanted = r"line 1: it has [\d,]+ bytes or more and 8,388,608 are allowed; .* set KLORA_MAX_DOCUMENT_BYTES="

        def refused():
            with pytest.raises(CorpusError, match=wanted):
                list(Corpus.jsonl([path]).documents())

        assert grown(refused) < 64 << 20

    def test_a_text_file_beyond_the_limit(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "long.txt").write_text("a" * 1001)
        (tmp_path / "short.txt").write_text("b")
        monkeypatch.setenv("KLORA_MAX_DOCUMENT_BYTES", "1000")
        with pytest.raises(CorpusError, match="1,001 bytes and 1,000 are allowed; .*KLORA_MAX_DOCUMENT_BYTES=1001"):
            list(Corpus.text([tmp_path / "long.txt"]).documents())
        assert [d.name for d in Corpus.text([tmp_path]).documents()] == ["short.txt"]
        assert "long.txt skipped" in caplog.text

    def test_long_texts_are_tokenized_a_few_at_a_time(self, tokenizer, monkeypatch):
        batches = []
        encode = Tokenizer.encode_many
        spy = lambda self, texts, threads: batches.append(sum(map(len, texts))) or encode(self, texts, threads)  # noqa: E731
        monkeypatch.setattr(Tokenizer, "encode_many", spy)
        monkeypatch.setattr("klora.ttt.documents.ENCODE_CHARACTERS", 1000)
        texts = [fuzz_text(i, 600) for i in range(6)]
        assert len(list(documents_from_texts(texts, tokenizer))) == 6
        assert max(batches) <= 1200 and ENCODE_CHARACTERS * 40 < 256 << 20 < ENCODE_BATCH * limit("MAX_DOCUMENT_BYTES")


def fuzz_text(number: int, length: int):
    from klora.model.corpus import TextDocument as Text

    return Text(str(number), "ab " * (length // 3))


@pytest.mark.parametrize(
    "opens",
    [
        load_artifact,
        lambda path: Corpus.text([path]),
        lambda path: Corpus.jsonl([path]),
        Tokenizer.from_file,
        Shard,
        lambda path: _stored_run(path.parent, {}),
        lambda path: Journal(path, "", resume=True),
        lambda path: Journal(path, "", resume=False),
        lambda path: load_records(path.parent.parent),
        read_record,
        lambda path: require_replaceable(path, toy=True),
        load_tensors,
        lambda path: load_run(path.parent),
        read_losses,
        read_documents_csv,
        lambda path: load_quantized(torch.nn.Linear(64, 64), path),
        read_bytes,
        Stored,
        lambda path: read_nll(path, None),
        lambda path: peft.read(path.parent, []),
    ],
)
@pytest.mark.parametrize("name", ["run.json", "a_val_0.bin", "model.safetensors", "loss.csv", "adapter_config.json"])
def test_a_pipe_is_not_waited_for(opens, name, tmp_path):
    """Nobody writes into it: whoever opened it for reading would wait for ever."""
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises((KloraError, OSError)):
        opens(path)


def test_a_loss_csv_that_is_too_long_costs_the_picture_and_no_row(tmp_path, monkeypatch):
    lines = [",".join(COLUMNS), *(f"{step},0.5,64,3.25,1.5,1,0.95," for step in range(1, 101))]
    (tmp_path / "loss.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("KLORA_MAX_RECORD_BYTES", "100")
    heard = []
    LossCurve(tmp_path, resume_at=90, say=heard.append).close()
    assert (tmp_path / "loss.csv").read_text().splitlines() == lines[:91]
    assert len(heard) == 1 and "100 are allowed" in heard[0] and "training goes on" in heard[0]


def test_a_loss_csv_that_cannot_be_read_is_left_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "loss.csv")
    heard = []
    LossCurve(tmp_path, resume_at=3, say=heard.append).close()
    assert (tmp_path / "loss.csv").is_fifo() and "is a pipe" in heard[0] and "training goes on" in heard[0]


def test_a_folder_in_the_place_of_a_file_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "run.json"
    path.mkdir()
    with pytest.raises(OSError, match=rf"^{path} is a folder where a file is to be read; move it away"):
        read_bytes(path)
    with pytest.raises(OSError, match=rf"^{path} is a folder where a file is to be written; move it away"):
        write_text(path, "{}")
    assert [left.name for left in tmp_path.iterdir()] == ["run.json"]


class TestJson:
    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ('{"a": 1, "a": 2}', "'a' stands twice"),
            ('{"b": {"a": 1, "c": 3, "a": 2}}', "'a' stands twice"),
            ("[" * 200 + "]" * 200, "over 100 deep"),
            ("[" * 100_000, "too deep"),
            ("[NaN]", "NaN is not finite"),
            ("[1e999]", "1e999 is not finite"),
            ("[-Infinity]", "not finite"),
            ("1" + "0" * 30, "beyond 64 bits"),
            ("9" * 5000, "beyond 64 bits"),
            ("", "Expecting value"),
        ],
    )
    def test_what_is_refused(self, text, why):
        with pytest.raises(ValueError, match=why):
            parse_json(text)

    def test_an_integer_on_which_a_formula_would_overflow_is_refused_even_where_nan_is_read(self):
        with pytest.raises(ValueError, match="beyond 64 bits"):
            parse_json(f"[NaN, {10**400}]", numbers=False)

    @pytest.mark.slow
    @settings(max_examples=50)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        )
    )
    def test_anything_else_is_read_as_python_reads_it(self, value):
        text = json.dumps(value)
        assert json.dumps(parse_json(text, numbers=False)) == text

    @settings(max_examples=60)
    @given(st.data())
    def test_records_of_any_values(self, data):
        """Journals, run.json and benchmark records whose values are of any type: a result, or a sentence."""
        value = (
            st.none()
            | st.booleans()
            | st.integers(-(2**70), 2**70)
            | st.floats()
            | st.text()
            | st.just([])
            | st.just({})
        )
        record = benchmark_record()
        holder, key = data.draw(st.sampled_from(slots(record)))
        holder[key] = data.draw(value)
        with suppress(RecordError):
            validate(record)

    def test_numbers_in_a_config_that_float64_does_not_hold(self):
        for name, value in (
            ("seconds", 10**400),
            ("warmdown_steps", 10**400),
            ("max_steps", 2**60),
            ("ema_every", -(10**30)),
        ):
            with pytest.raises(ConfigError, match=f"{name}="):
                TrainConfig.from_dict(TrainConfig().to_dict() | {name: value})
        with pytest.raises(ConfigError, match="at most 9007199254740992"):
            TrainConfig(max_steps=2**60)


class TestJournal:
    def written(self, tmp_path, files, **changes):
        lines = files.data["journal"].splitlines()
        line = json.loads(lines[1])
        line["result"] |= changes
        (tmp_path / "journal.jsonl").write_text("\n".join([lines[0].decode(), json.dumps(line)]) + "\n")
        return Journal(tmp_path / "journal.jsonl", FINGERPRINT, resume=True)

    @pytest.mark.slow
    def test_as_it_is(self, tmp_path, files):
        self.written(tmp_path, files).close()

    @pytest.mark.parametrize(
        "changes",
        [
            *(
                {name: value}
                for name in ("tokens", "bytes", "kept_pass")
                for value in (-1, 1.5, True, "1", None, 2**60)
            ),
            *(
                {name: value}
                for name in ("base_nats", "adapted_nats")
                for value in (-5.0, math.inf, math.nan, True, "x", [])
            ),
            *({"status": value} for value in (None, "other", [], {})),
            {"name": "\ud800"},
            {"name": None},
            {"adapted_tokens": 10**6},
            {"extra": 1},
        ],
        ids=str,
    )
    def test_values_that_no_run_has_written(self, changes, tmp_path, files):
        with pytest.raises(JournalError, match="line 2: .*remove that line"):
            self.written(tmp_path, files, **changes)

    def test_a_base_pass_that_claims_more_than_it_has(self, tmp_path, files):
        """The header is believed only as far as the file goes."""
        (tmp_path / "journal.jsonl").write_bytes(files.data["journal"])
        whole = files.data["base"]
        for bad in (
            whole.replace(b"(2, 50)", b"(2, 5000000000000)".ljust(7)),
            whole.replace(b"(2, 50)", b"(2,-50)"),
            whole.replace(b"'<f4'", b"'|O' "),
            whole[:-1],
            whole + b"\0",
            b"",
            whole[:9],
            b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        ):
            (tmp_path / "journal.base.npy").write_bytes(bad)
            with pytest.raises(JournalError, match="is damaged; give --overwrite"):
                Journal(tmp_path / "journal.jsonl", FINGERPRINT, resume=True)
        (tmp_path / "journal.base.npy").write_bytes(whole)
        journal = Journal(tmp_path / "journal.jsonl", FINGERPRINT, resume=True)
        assert np.array_equal(journal.base("base", CELLS), np.ones((2, CELLS), np.float32))
        journal.close()


class TestWeights:
    @pytest.mark.parametrize("worth", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_named(self, worth, tmp_path):
        state = {name: tensor.detach().clone() for name, tensor in randomized(TINY).named_parameters()}
        state["blocks.1.gain"][0] = worth
        save_tensors(tmp_path / "model.safetensors", state, {"model": TINY.to_dict(), "provenance": {}})
        with pytest.raises(
            CheckpointError, match="its tensor 'blocks.1.gain' holds a NaN or an infinity; copy the file"
        ):
            model_from_run(tmp_path, "cpu")
        linear = torch.nn.Sequential(torch.nn.Linear(64, 64))
        quantize_linears(linear)
        linear[0].scale.data[0] = worth
        save_quantized(linear, tmp_path / "linear.safetensors")
        with pytest.raises(CheckpointError, match="'0.scale' holds a NaN or an infinity"):
            load_quantized(torch.nn.Sequential(torch.nn.Linear(64, 64)), tmp_path / "linear.safetensors")

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("model/embed", torch.zeros(1, 16)),
            ("ema/embed", torch.zeros(1)),
            ("swa/embed", torch.zeros(1)),
            ("optimizer/embed/exp_avg", torch.zeros(1)),
            ("optimizer/embed/step", torch.tensor(-1.0)),
            ("optimizer/embed/exp_avg_sq", torch.full((300, 16), -1.0)),
            ("optimizer/embed/other", torch.zeros(300, 16)),
            ("optimizer/blocks.0.q/step", torch.tensor(1.0)),
            ("model/embed", torch.full((300, 16), torch.nan)),
            ("model/embed", torch.zeros(300, 16, dtype=torch.int64)),
        ],
    )
    def test_a_checkpoint_s_tensors_are_those_of_its_parameters(self, name, tensor, files, tmp_path):
        """None is broadcast, and what an optimizer would fail on later is refused now."""
        path, trainer = tmp_path / "checkpoint.safetensors", files.trainer
        path.write_bytes(files.data[path.name])
        tensors, meta = load_tensors(path)
        trainer.state.folder = tmp_path
        trainer._load_checkpoint()
        save_tensors(path, tensors | {name: tensor}, meta)
        with pytest.raises(CheckpointError):
            trainer._load_checkpoint()

    @pytest.mark.parametrize("name", ["step", "seconds", "tokens", "ema_updates", "swa_snapshots", "sampler", "model"])
    def test_a_checkpoint_s_metadata(self, name, files, tmp_path):
        path, trainer = tmp_path / "checkpoint.safetensors", files.trainer
        path.write_bytes(files.data[path.name])
        tensors, meta = load_tensors(path)
        trainer.state.folder = tmp_path
        for value in (-1, -1.0, 10**30, 1e300, math.nan, True, None, "x", [], {}, {"epoch": 10**30}):
            save_tensors(path, tensors, meta | {name: value})
            with pytest.raises(KloraError):
                trainer._load_checkpoint()


HOSTILE = "a\x1b[2Jb\x07c\rd\x9be\u202ef\u2028g\x7f"


class TestNames:
    def test_nothing_steers_a_terminal(self):
        assert printable(HOSTILE) == r"a\x1b[2Jb\x07c\rd\x9be\u202ef\u2028g\x7f"
        assert printable("\ud800\0") == r"\ud800\x00"
        for text in ("é 😀 日本\u3000語\u00a0!\n\tx", ""):
            assert printable(text) == text

    def test_whatever_says_a_name(self, capsys):
        output = Output()
        output.say(HOSTILE)
        output.warn(HOSTILE)
        output.table(HOSTILE, [(HOSTILE, "1")], ("name", HOSTILE))
        with output.progress() as show:
            show(HOSTILE, 1.0)
        said = "".join(capsys.readouterr())
        assert said.count(r"a\x1b[2Jb") >= 3 and not set("\x07\r\x9b\u202e\u2028\x7f") & set(said.replace("\r\n", "\n"))
        assert "\x1b[2J" not in said

    def test_errors_about_files_of_any_name(self, tmp_path, files):
        model = tmp_path / "model.klora"
        model.write_bytes(files.data["model.klora"])
        for arguments in (
            ("score", tmp_path / HOSTILE),
            ("export", tmp_path / HOSTILE),
            ("generate", tmp_path / HOSTILE),
            ("score", model, "--text", tmp_path / HOSTILE),
            ("score", model, "--jsonl", tmp_path / HOSTILE),
            (HOSTILE,),
            ("score", "--" + HOSTILE),
        ):
            done = klora(*arguments, check=2)
            said = done.stdout + done.stderr
            assert r"\x1b[2J" in said.replace("\n", "") or "x1b" in said, arguments
            assert not set("\x1b\x07\r\x9b\u202e\x7f") & set(said), arguments

    def test_what_the_library_logs(self, tmp_path, caplog):
        (tmp_path / HOSTILE).write_bytes(b"\xff")
        done = klora("train", "--text", tmp_path, "--out", tmp_path / "run", "--cache", tmp_path / "cache", check=2)
        assert r"\x1b[2J" in done.stderr and "\x1b" not in done.stderr
        assert sum(type(h).__name__ == "Said" for h in logging.getLogger("klora").handlers) == 1

    def test_what_a_model_writes(self, files, tmp_path, monkeypatch):
        """Its pieces are the file's: a terminal sees escapes, a pipe gets the text."""
        (tmp_path / "model.klora").write_bytes(files.data["model.klora"])
        monkeypatch.setattr("klora.cli.generate.generate_text", lambda *a, **k: iter(["x\x1b[2J", "é\n"]))
        assert klora("generate", tmp_path / "model.klora").stdout == "x\x1b[2Jé\n\n"

        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr("test_cli.io", SimpleNamespace(StringIO=Terminal))
        assert klora("generate", tmp_path / "model.klora").stdout == "x\\x1b[2Jé\n\n"

    def test_documents_of_one_name_get_numbers(self):
        heard = []
        names = ["a", "b", "a", "a (2)", "a", HOSTILE, HOSTILE]
        documents = [Document(name, np.array([1, index], np.uint16), 1) for index, name in enumerate(names)]
        named = with_own_names(documents, heard.append)
        assert [d.name for d in named] == ["a", "b", "a (3)", "a (2)", "a (4)", HOSTILE, f"{HOSTILE} (2)"]
        assert all(one.tokens is other.tokens for one, other in zip(named, documents, strict=True))
        assert len(heard) == 1 and "3 documents have the name of an earlier one, such as 'a'" in heard[0]
        assert with_own_names(documents[:2], heard.append) == documents[:2] and len(heard) == 1

    @pytest.mark.parametrize(
        "start", ["=", "+", "-", "@", "\t", "\r", "\n", "x;=", "x\t=", 'x",="', "'=", "x\r=", "x\n="]
    )
    def test_no_name_becomes_a_formula_in_a_spreadsheet(self, start, tmp_path):
        """Whatever separates its cells: a comma, a semicolon or a tab. And each name comes back as it was."""
        name = f"{start}cmd|' /C calc'!A0"
        result = DocumentResult(name, 3, 3, ADAPTED, 9.0, 9.0, 8.0, None, 0, 3)
        ScoreResult([result], ttt_preset(), {}).write(tmp_path)
        text = (tmp_path / "documents.csv").read_bytes().decode()
        for separator in ",;\t":
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
            assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
        assert [row["name"] for row in read_documents_csv(tmp_path / "documents.csv")] == [name]


def test_records_that_are_no_records(tmp_path):
    """Each reader's own sentence, where JSON is no object, too deep, or not of the types that klora writes."""
    path = tmp_path / "gpu" / "kernels.json"
    path.parent.mkdir()
    for text in ("[" * 100_000, "null", "[]", '{"a": 1, "a": 2}', "{}", '{"results": 1, "schema": 1}', "NaN", "\xff"):
        path.write_text(text, encoding="latin-1")
        for reader in (
            read_record,
            lambda path: require_replaceable(path, toy=True),
            lambda path: load_records(tmp_path),
        ):
            with pytest.raises(RecordError):
                reader(path)
        with pytest.raises(typer.BadParameter):
            Sweep({"name": "sweep"}, path, {})
        (tmp_path / "run.json").write_bytes(path.read_bytes())
        with pytest.raises(CheckpointError, match="run.json is damaged"):
            _stored_run(tmp_path, {})
    for damage in ({"rows": []}, {"rows": {"a": 1}, "held_out_scores": {}}, {}):
        path.write_text(json.dumps({"name": "sweep"} | damage))
        with pytest.raises(typer.BadParameter, match="is damaged at rows"):
            Sweep({"name": "sweep"}, path, {})


def test_losses_that_are_no_losses(tmp_path):
    for data in (b"", b"\0", b'step,loss,lr_scale\n1,"' + b"a" * 200_000, b"step,loss\n1,2\n", b"\xff\xfe"):
        (tmp_path / "loss.csv").write_bytes(data)
        with pytest.raises(CurveError):
            read_losses(tmp_path)
        curve = LossCurve(tmp_path, resume_at=10)
        assert curve.rows() == []
        curve._file.close()


def test_a_tokenizer_whose_pieces_are_no_text(files):
    whole = files.data["tokenizer.model"]
    at = whole.index("é".encode())
    with pytest.raises(TokenizerError):
        Tokenizer(whole[:at] + b"\xff\xff" + whole[at + 2 :])


@pytest.mark.slow
def test_a_hostile_artifact_does_not_end_the_commands_with_a_traceback(files, tmp_path):
    whole, tokenizer = files.data["model.klora"], files.data["tokenizer.model"]
    path = tmp_path / "model.klora"
    for number in range(12):
        path.write_bytes(forged_artifact(whole, tokenizer, random.Random(number)))
        with suppress(AssertionError):  # one that is only changed, not damaged, generates
            klora("generate", path, "--tokens", "2", check=2)
    save_artifact(path, dict(randomized(TINY).named_parameters()), TINY, tokenizer, {"sources": [1]})
    text = tmp_path / "a.txt"
    text.write_text("alpha beta " * 20)
    klora("score", path, "--text", text, "--out", tmp_path / "scores", "--set", "chunk=16", "--set", "window=32")
