"""What a training run keeps: checkpoints, resuming, damaged and foreign files, a disk that fails."""

import json
import os
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from klora import __version__
from klora.model.checkpoint import CheckpointError, load_tensors, save_tensors, version_of
from klora.model.curve import LossCurve
from klora.model.loading import load_run
from klora.model.storage import require_writable, write_text
from klora.model.train import Trainer
from test_train import ALONE, digests, losses, small_preset


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    """The run of the small preset that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    Trainer(small_preset(), data, folder, ALONE).run()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_resume_continues_bit_for_bit(tmp_path, data, whole, stop_at):
    continues_bit_for_bit(tmp_path, data, whole, stop_at, {})


@pytest.mark.slow
def test_resume_continues_bit_for_bit_with_masks_and_quantised(tmp_path, data):
    options = {"document_mask": True, "qat_share": 0.75}
    Trainer(small_preset(**options), data, tmp_path / "whole", ALONE).run()
    continues_bit_for_bit(tmp_path, data, tmp_path / "whole", 5, options)


def continues_bit_for_bit(tmp_path, data, whole, stop_at, options):
    part = tmp_path / "part"

    def interrupt(row):
        if row["step"] == stop_at:
            signal.raise_signal(signal.SIGTERM)

    stopped = Trainer(small_preset(**options), data, part, ALONE).run(interrupt)
    assert stopped.status == "interrupted" and stopped.step == stop_at and stopped.signal == signal.SIGTERM
    with pytest.raises(CheckpointError, match="its training did not finish"):
        load_run(part)
    resumed = Trainer(small_preset(**options), data, part, ALONE, resume=True)
    assert resumed.step == stop_at
    resumed.run()
    assert losses(part) == losses(whole)
    expected, _ = load_run(whole)
    got, _ = load_run(part)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.slow
def test_a_checkpoint_on_the_timer_is_resumed_after_a_kill(tmp_path, data, whole):
    """Steps after the last checkpoint are done again: loss.csv has each step once, as in the run without the kill."""
    part = tmp_path / "part"

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 4:
            trainer._save_checkpoint()
        if row["step"] == 7:
            raise Killed

    trainer = Trainer(small_preset(), data, part, ALONE)
    with pytest.raises(Killed):
        trainer.run(kill)
    Trainer(small_preset(), data, part, ALONE, resume=True).run()
    assert losses(part) == losses(whole)


@pytest.mark.slow
def test_checkpoints_are_written_on_the_timer(tmp_path, data):
    seen = []

    def watch(row):
        time.sleep(0.02)
        seen.append((tmp_path / "checkpoint.safetensors").exists())

    Trainer(small_preset(checkpoint_seconds=0.05), data, tmp_path, ALONE).run(watch)
    assert not seen[0] and seen[-1]


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"step": 1})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_tensors(path, {"a": torch.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    tensors, meta = load_tensors(path)
    assert meta == {"step": 1} and tensors["a"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_foreign_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="was not written by klora"):
        load_tensors(tmp_path / "foreign.safetensors")


def test_a_torn_row_of_the_curve_is_dropped(tmp_path, data):
    Trainer(small_preset(max_steps=3), data, tmp_path, ALONE).run()
    with open(tmp_path / "loss.csv", "a") as file:
        file.write("2,0.5")
    assert [row["step"] for row in LossCurve(tmp_path, resume_at=3).rows()] == ["1", "2", "3"]


def test_a_disk_that_fails_costs_rows_and_checkpoints_not_the_run(tmp_path, data, monkeypatch):
    from klora.model import train as module

    said, save = [], module.save_tensors
    trainer = Trainer(small_preset(checkpoint_seconds=1e-6), data, tmp_path, ALONE, say=said.append)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        module, "save_tensors", lambda path, *rest: (save if "model" in path.name else fail)(path, *rest)
    )
    monkeypatch.setattr(trainer.curve._writer, "writerow", fail)
    assert trainer.run().status == "finished" and load_run(tmp_path)
    assert sum("no checkpoint of step" in line and "No space left" in line for line in said) >= 2
    assert sum("loss.csv" in line for line in said) == 1


def test_files_get_the_permissions_of_the_umask_or_of_what_they_replace(tmp_path):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "weights", {"a": torch.ones(1)}, {})
        write_text(tmp_path / "text", "a")
        assert mode(tmp_path / "weights") == mode(tmp_path / "text") == 0o640
        (tmp_path / "weights").chmod(0o604)
        save_tensors(tmp_path / "weights", {"a": torch.ones(1)}, {})
        assert mode(tmp_path / "weights") == 0o604
    finally:
        os.umask(before)


def test_metadata_that_is_damaged_is_a_checkpoint_error(tmp_path, data):
    from safetensors.torch import save_file

    def rewrite(path: Path, text: str) -> None:
        tensors, _ = load_tensors(tmp_path / "whole.safetensors")
        save_file(tensors, path, metadata={"klora": text})

    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    checkpoint, model = tmp_path / "checkpoint.safetensors", tmp_path / "model.safetensors"
    shutil.copy(checkpoint, tmp_path / "whole.safetensors")
    whole = load_tensors(checkpoint)[1]
    for text, says in (
        ("{", "its metadata is no JSON"),
        ("[1]", "its metadata has no step"),
        (json.dumps({**whole, "step": "2"}), "its metadata has no step"),
        (json.dumps({k: v for k, v in whole.items() if k != "sampler"}), "its metadata has no sampler"),
    ):
        rewrite(checkpoint, text)
        with pytest.raises(CheckpointError, match=says):
            Trainer(small_preset(), data, tmp_path, ALONE, resume=True)
    for text in ("}", "null", '{"model": {}}', '{"model": 1, "provenance": {}}'):
        rewrite(model, text)
        with pytest.raises(CheckpointError, match="its metadata"):
            load_run(tmp_path)
    save_tensors(checkpoint, {"model/embed": torch.ones(2)}, whole)
    with pytest.raises(CheckpointError, match="is damaged"):
        Trainer(small_preset(), data, tmp_path, ALONE, resume=True)


@pytest.mark.parametrize(("version", "writer"), [("0.0.9", "klora 0.0.9"), (None, "an older klora, from before")])
def test_a_run_of_another_version_is_refused_with_its_name_and_what_to_do(tmp_path, data, version, writer):
    """Whichever part has changed: the settings, the checkpoint's metadata or its tensors, the finished weights."""
    from klora.cli.train import _stored_run
    from safetensors.torch import save_file

    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    checkpoint, model, run = (tmp_path / name for name in ("checkpoint.safetensors", "model.safetensors", "run.json"))
    says = f"was written by {writer}.*this is klora {__version__}, which.*{{}}.*go on with the version that wrote it"
    stamp = {} if version is None else {"version": version}
    (tensors, meta), (weights, finished) = load_tensors(checkpoint), load_tensors(model)
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith("ema/")}
    for parts, about in ((tensors, {k: v for k, v in meta.items() if k != "sampler"}), (fewer, meta)):
        save_file(parts, checkpoint, metadata={"klora": json.dumps(about)} | stamp)
        with pytest.raises(CheckpointError, match=says.format("")):
            Trainer(small_preset(), data, tmp_path, ALONE, resume=True)
    del finished["model"]["bigram_rows"]
    save_file(weights, model, metadata={"klora": json.dumps(finished)} | stamp)
    with pytest.raises(CheckpointError, match=says.format("no value for bigram_rows")):
        load_run(tmp_path)
    stored = json.loads(run.read_text())
    assert stored.pop("klora") == __version__ and version_of(checkpoint) == version
    for part, name in (("train", "attention"), ("model", "bigram_rows")):
        older = {**stored, part: {k: v for k, v in stored[part].items() if k != name}}
        run.write_text(json.dumps(older if version is None else {**older, "klora": version}))
        with pytest.raises(CheckpointError, match=says.format(f"no value for {name}")):
            _stored_run(tmp_path, {})
    run.write_text(json.dumps({**older, "klora": __version__}))
    with pytest.raises(CheckpointError, match="is damaged .*has no value for"):
        _stored_run(tmp_path, {})


@pytest.mark.slow
def test_a_damaged_curve_does_not_stop_a_resumed_run(tmp_path, data):
    Trainer(small_preset(max_steps=3), data, tmp_path, ALONE).run()
    lines = (tmp_path / "loss.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "loss.csv").write_bytes(b"".join([*lines[:2], b"x,\x00\xff,,,,,,\r\n", *lines[3:]]))
    assert Trainer(small_preset(max_steps=5), data, tmp_path, ALONE, resume=True).run().step == 5
    assert [step for step, _ in losses(tmp_path)] == ["1", "3", "4", "5"]


@pytest.mark.slow
def test_a_finished_run_stays_until_what_replaces_it_has_finished(tmp_path, data):
    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    first = load_run(tmp_path)[0]

    class Killed(Exception):
        pass

    def kill(row):
        raise Killed

    said = []
    for seed in (1, 2):  # the second attempt finds an unfinished run, and must keep the finished one
        with pytest.raises(Killed):
            Trainer(small_preset(seed=seed), data, tmp_path, ALONE, say=said.append).run(kill)
        kept = load_run(tmp_path / "replaced")[0]
        assert all(torch.equal(first[name], kept[name]) for name in first)
        assert (tmp_path / "replaced" / "tokenizer.model").exists()
        with pytest.raises(CheckpointError, match="has no model.safetensors"):
            load_run(tmp_path)
    assert len(said) == 1 and str(tmp_path / "replaced") in said[0]
    (tmp_path / "replaced" / "notes.txt").write_text("somebody's")
    Trainer(small_preset(max_steps=3), data, tmp_path, ALONE).run()
    assert load_run(tmp_path)[1]["provenance"]["result"]["step"] == 3
    assert [path.name for path in (tmp_path / "replaced").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_resuming_a_finished_run_keeps_its_model_until_the_longer_one_is_done(tmp_path, data):
    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    model = digests(tmp_path)["model.safetensors"]
    longer = small_preset(max_steps=4)

    def interrupt(row):
        assert digests(tmp_path)["model.safetensors"] == model
        signal.raise_signal(signal.SIGTERM)

    assert Trainer(longer, data, tmp_path, ALONE, resume=True).run(interrupt).status == "interrupted"
    assert digests(tmp_path)["model.safetensors"] == model
    assert Trainer(longer, data, tmp_path, ALONE, resume=True).run().step == 4
    assert digests(tmp_path)["model.safetensors"] != model


def test_a_folder_that_cannot_be_written_is_known_before_anything_is_made(tmp_path, data):
    for path in (Path("/proc/nowhere/run"), Path("/dev/null/run")):
        with pytest.raises(OSError, match=f"{path} cannot be written"):
            Trainer(small_preset(), data, path, ALONE)
    with pytest.raises(OSError, match=r"needs .* bytes and .* free; make space"):
        require_writable(tmp_path / "a" / "b", 2**60)
    require_writable(tmp_path / "a" / "b", 1)
    assert not list(tmp_path.iterdir())
