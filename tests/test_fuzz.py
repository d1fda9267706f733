"""The fuzzer: a short run of it, what it writes and changes, which faults it finds, and what is none."""

import json
import os
import random
import re
import signal
import time

import fuzz
import numpy as np
import pytest
import torch
from fuzzing import targets
from fuzzing.forgeries import (
    chained_lines,
    large_artifact,
    signed_array,
    signed_tensors,
)
from fuzzing.mutations import mutated_tokenizer
from fuzzing.originals import CELLS, FINGERPRINT, Files
from fuzzing.targets import TARGETS, Target
from fuzzing.wire import wire_fields, wire_message
from klora.model.artifact import ArtifactError, load_artifact
from klora.model.checkpoint import CheckpointError, load_tensors
from klora.model.corpus import Corpus, CorpusError
from klora.model.tokenizer import Tokenizer, TokenizerError
from klora.ttt.journal import Journal, JournalError


@pytest.mark.slow
def test_a_few_hundred_mutated_files_of_every_format(tmp_path):
    """The short form of `make fuzz`, whose 1,000,000 have other numbers."""
    heard = []
    assert fuzz.fuzz(300, seed=7, processes=1, found=tmp_path / "found", say=heard.append) == 0
    assert re.fullmatch(r"fuzz: 300 of 300 files, [\d,]+/s, 0 findings, 0 min left", heard[-len(TARGETS) - 1])
    wanted = r"  (.+): (\d+) files, \d+ read, \d+ refused, 0 findings"
    found = dict(re.fullmatch(wanted, line).groups() for line in heard[-len(TARGETS) :])
    assert list(found) == list(TARGETS) and sum(map(int, found.values())) == 300


@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_opens_what_it_writes(target, files, tmp_path, monkeypatch):
    """A target that were refused whatever it wrote would find nothing: unchanged files are read to the end."""
    unchanged = {
        "mutated_bytes": lambda data, draw: data,
        "mutated_tokenizer": lambda data, draw: data,
        "mutated_value": lambda value, draw: value,
        "json_text": lambda value, draw: json.dumps(value).encode(),
        "forged_artifact": lambda data, tokenizer, draw: data,
        "forged_safetensors": lambda data, draw: data,
    }
    for name, same in unchanged.items():
        monkeypatch.setattr(targets, name, same)
    draw = random.Random(1)
    monkeypatch.setattr(draw, "random", lambda: 0.5)
    case = TARGETS[target].open(files, tmp_path, draw)
    next(case)
    with pytest.raises(StopIteration):
        next(case)


def test_what_the_fuzzer_changes_goes_behind_checksums(files, tmp_path):
    """A checksum that stayed as it was would stop every change before what it is to be tried on."""
    path, data = tmp_path / "checkpoint.safetensors", files.data["checkpoint.safetensors"]
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    table["__metadata__"]["klora"] = json.dumps({"other": 1})
    changed = json.dumps(table).encode()
    changed = len(changed).to_bytes(8, "little") + changed + data[8 + size :]
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_tensors(path)
    path.write_bytes(signed_tensors(changed))
    assert load_tensors(path)[1] == {"other": 1}
    assert signed_tensors(data[:50]) == data[:50]
    lines = [line.replace(b"9.0", b"7.0") for line in files.data["journal"].splitlines()]
    (tmp_path / "journal.jsonl").write_bytes(chained_lines([*lines, b"no JSON"]))
    with pytest.raises(JournalError, match=f"line {len(lines) + 1}: no JSON"):
        Journal(tmp_path / "journal.jsonl", FINGERPRINT, resume=True)
    (tmp_path / "journal.jsonl").write_bytes(chained_lines(lines))
    base = bytearray(files.data["base"])
    base[-36:-32] = np.float32(5).tobytes()
    (tmp_path / "journal.base.npy").write_bytes(signed_array(bytes(base)))
    journal = Journal(tmp_path / "journal.jsonl", FINGERPRINT, resume=True)
    assert journal.done[0].base_nats == 7.0 and journal.base("base", CELLS)[1, -1] == 5.0
    journal.close()


def test_a_tokenizer_is_changed_behind_its_syntax(files):
    """Blind changes to a model of SentencePiece's end in its parser."""
    model = files.data["tokenizer.model"]
    assert wire_message(wire_fields(model)) == model
    changed = [mutated_tokenizer(model, random.Random(number)) for number in range(40)]
    assert len({*changed}) == 40
    refused = []
    for one in changed:
        try:
            Tokenizer(one, may_normalise=True)
        except TokenizerError as error:
            refused.append(str(error))
    assert 10 < len(refused) < 38 and sum("ParseFromArray" in one for one in refused) < 5


@pytest.mark.parametrize(
    ("work", "wanted"),
    [
        (lambda: {}["absent"], "KeyError: 'absent'"),
        (lambda: os._exit(3), "exit status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "exit status -9"),
        (lambda: torch.zeros(100 << 20, dtype=torch.uint8).fill_(1), "bytes and 1,048,576 are declared"),
        (lambda: bytearray(7 << 30), "MemoryError"),
        (lambda: time.sleep(0.7), r"it took 0\.\d s of CPU time, 0\.[7-9] s on the clock"),
        (lambda: time.sleep(9), "it hung for 1 s"),
        pytest.param(lambda: [None for _ in range(3 * 10**7)], r"it took .* s of CPU time", marks=pytest.mark.slow),
    ],
    ids=["traceback", "crash", "signal", "memory", "addresses", "wait", "hang", "time"],
)
def test_the_fuzzer_finds_each_kind_of_fault(work, wanted, tmp_path, monkeypatch):
    def case(files, folder, draw):
        yield
        if "faulty" in found:
            work()

    found, heard = ["faulty"], []
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "STUCK", 1.0 if "hung" in wanted else 60.0)
    monkeypatch.setattr(fuzz, "made_files", lambda folder: Files())
    monkeypatch.setitem(TARGETS, "planted", Target(case, 1, 1 << 20))
    assert fuzz.fuzz(1, processes=1, only=["planted"], found=tmp_path, say=heard.append) == 1
    assert re.search(wanted, (tmp_path / "planted-0" / "finding.txt").read_text())
    assert heard[-1] == "  planted: 1 files, 0 read, 0 refused, 1 findings"
    found.clear()
    assert fuzz.fuzz(1, processes=1, only=["planted"], found=tmp_path, say=heard.append) == 0, "of an earlier run"


def test_memory_that_was_free_before_is_memory_that_a_file_takes(tmp_path, monkeypatch):
    """A large hole in the heap, of a test before this one, would serve what a file asks for."""

    def case(files, folder, draw):
        yield
        torch.zeros(100 << 20, dtype=torch.uint8).fill_(1)

    monkeypatch.setattr(fuzz, "made_files", lambda folder: Files())
    monkeypatch.setitem(TARGETS, "planted", Target(case, 1, 1 << 20))
    blocks = [torch.ones(16_000, dtype=torch.uint8) for _ in range(12_000)]
    above = torch.ones(16_000, dtype=torch.uint8)  # without it the heap would shrink
    blocks.clear()
    assert fuzz.fuzz(1, processes=1, only=["planted"], found=tmp_path, say=lambda line: None) == 1
    assert above.all()


def test_the_fuzzer_has_small_files_that_unpack_to_more_than_is_allowed(files, tmp_path, monkeypatch):
    for name, value in targets.LIMITS.items():
        monkeypatch.setenv(f"KLORA_{name}", str(value))
    whole = large_artifact(files.data["model.klora"], files.data["tokenizer.model"])
    (tmp_path / "model.klora").write_bytes(whole)
    with pytest.raises(ArtifactError, match=r"its config asks for 2,\d+,\d+,\d+ bytes and 100,663,296 are allowed"):
        load_artifact(tmp_path / "model.klora")
    for kind in targets.LONG:
        path = tmp_path / f"texts{kind}"
        path.write_bytes(targets.long_line(kind))
        with pytest.raises(CorpusError, match="and 1,048,576 are allowed"):
            list(Corpus.jsonl([path]).documents())
        assert 300 * 40 < path.stat().st_size < 1 << 19 and len(whole) < 1 << 15, "300 frames or members"


def test_of_a_hundred_files_each_format_has_its_share():
    shares = [target.share for target in TARGETS.values()]
    assert sum(shares) == 100 and min(shares) == 2, "docs/trust.md names them"


def test_a_wait_that_is_not_the_files_is_no_finding(tmp_path, monkeypatch):
    def case(files, folder, draw):
        yield
        if not slept.exists():
            slept.touch()
            time.sleep(0.7)

    slept = tmp_path / "slept"
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "made_files", lambda folder: Files())
    monkeypatch.setitem(TARGETS, "planted", Target(case, 1, 1 << 20))
    assert fuzz.fuzz(1, only=["planted"], found=tmp_path / "found", say=lambda text: None) == 0 and slept.exists()


def test_the_fuzzer_goes_on_behind_a_case_that_its_process_did_not_survive(tmp_path, monkeypatch):
    def case(files, folder, draw):
        yield
        number = draw.random()
        if number < 0.4:
            os._exit(3)

    monkeypatch.setattr(fuzz, "made_files", lambda folder: Files())
    monkeypatch.setitem(TARGETS, "planted", Target(case, 1, 1 << 20))
    heard = []
    findings = fuzz.fuzz(20, processes=2, only=["planted"], found=tmp_path, say=heard.append)
    assert 2 < findings < 16 and len(list(tmp_path.iterdir())) == findings
    assert heard[-1] == f"  planted: 20 files, {20 - findings} read, 0 refused, {findings} findings"
