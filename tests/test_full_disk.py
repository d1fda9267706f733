"""What a run writes where a disk is full, or a folder or a name is in the way: work is kept, and a sentence says so."""

import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from klora.model.checkpoint import save_tensors
from klora.model.loading import load_run
from klora.model.storage import require_writable, write_text
from klora.model.train import Trainer
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_train import ALONE, small_preset


@pytest.mark.slow
def test_a_disk_that_fails_costs_rows_and_checkpoints_not_the_run(tmp_path, data, monkeypatch):
    said = []
    trainer = Trainer(small_preset(checkpoint_seconds=1e-6), data, tmp_path, ALONE, say=said.append)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("klora.model.run_state.save_tensors", fail)
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


def test_a_folder_that_cannot_be_written_is_known_before_anything_is_made(tmp_path, data):
    for path in (Path("/proc/nowhere/run"), Path("/dev/null/run")):
        with pytest.raises(OSError, match=f"{path} cannot be written"):
            Trainer(small_preset(), data, path, ALONE)
    with pytest.raises(OSError, match=r"needs .* bytes and .* free; make space"):
        require_writable(tmp_path / "a" / "b", 2**60)
    require_writable(tmp_path / "a" / "b", 1)
    assert not list(tmp_path.iterdir())


def full(*given, **options):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_disk_that_is_full_at_a_checkpoint_costs_that_checkpoint(tmp_path, data, monkeypatch):
    said, kept = [], []

    def fill(row):
        if row["step"] == 3:
            kept.append((tmp_path / "checkpoint.safetensors").read_bytes())
            monkeypatch.setattr("klora.model.checkpoint.save_file", full)
        if row["step"] == 6:
            assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept[0]
            monkeypatch.undo()

    trainer = Trainer(small_preset(checkpoint_seconds=1e-6, max_steps=8), data, tmp_path, ALONE, say=said.append)
    assert trainer.run(fill).step == 8 and load_run(tmp_path)
    lost = [line for line in said if "no checkpoint of step" in line]
    assert len(lost) == 3 and all("No space left" in line for line in lost)
    kept_there = f"Last checkpoint: {tmp_path / 'checkpoint.safetensors'} (step 2)"
    assert all(line.endswith(kept_there) for line in lost)
    assert not list(tmp_path.glob(".*partial"))


def test_a_disk_that_is_full_at_the_first_checkpoint_promises_none(tmp_path, data, monkeypatch):
    said = []
    trainer = Trainer(small_preset(checkpoint_seconds=1e-6, max_steps=1), data, tmp_path, ALONE, say=said.append)
    monkeypatch.setattr("klora.model.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.run()
    lost = [line for line in said if "no checkpoint of step 1" in line]
    assert lost and all(line.endswith("training goes on. Last checkpoint: none yet") for line in lost)


def test_a_disk_that_is_full_at_a_stop_ends_in_a_sentence_with_the_last_checkpoint_whole(tmp_path, data, monkeypatch):
    def fill(row):
        if row["step"] == 3:
            trainer._save_checkpoint()
            monkeypatch.setattr("klora.model.checkpoint.save_file", full)
        if row["step"] == 5:
            signal.raise_signal(signal.SIGTERM)

    trainer = Trainer(small_preset(), data, tmp_path, ALONE)
    says = r"No space left .*; Last checkpoint: .*checkpoint.safetensors \(step 3\); make space, then --resume goes on"
    with pytest.raises(OSError, match=says):
        trainer.run(fill)
    monkeypatch.undo()
    assert Trainer(small_preset(), data, tmp_path, ALONE, resume=True).step == 3


def test_a_disk_that_is_full_at_the_end_keeps_the_training(tmp_path, data, monkeypatch):
    save = save_file

    def fill(tensors, path, **options):
        (full if "model.safetensors" in str(path) else save)(tensors, path, **options)

    monkeypatch.setattr("klora.model.checkpoint.save_file", fill)
    with pytest.raises(
        OSError, match="No space left .*; training is done: make space, then --resume writes the weights"
    ):
        Trainer(small_preset(max_steps=3), data, tmp_path, ALONE).run()
    monkeypatch.undo()
    resumed = Trainer(small_preset(max_steps=3), data, tmp_path, ALONE, resume=True)
    assert resumed.step == 3 and resumed.run().step == 3 and load_run(tmp_path)


def test_a_curve_that_cannot_be_written_costs_one_line(tmp_path, data):
    (tmp_path / "loss.csv").mkdir()
    said = []
    result = Trainer(small_preset(max_steps=3), data, tmp_path, ALONE, say=said.append).run()
    assert result.status == "finished" and load_run(tmp_path)
    assert sum("loss.csv cannot be written" in line and "training goes on without it" in line for line in said) == 1


def test_a_file_with_the_longest_name_that_there_is_can_be_replaced(tmp_path):
    """What is written beside it first has no longer one."""
    for name in ("a" * 255, "a" + "ä" * 127):
        for text in ("one", "two"):
            write_text(tmp_path / name, text)
            assert (tmp_path / name).read_text() == text
        assert [file.name for file in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
