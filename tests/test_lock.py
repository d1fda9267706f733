"""One command at a time writes into a folder: who is refused, by what sentence, and what bars nobody."""

import errno
import fcntl
import json
import os
import signal

import pytest
from conftest import wait_for
from forks import Forked
from klora.model.lock import Locked, locked
from test_cli import klora

HOLD = """
import sys, time
from klora.model.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_bars_others_while_it_is_held_and_leaves_nothing(tmp_path):
    out = tmp_path / "a" / "b"
    with locked(out):
        with (
            pytest.raises(
                Locked, match=rf"b is in use by klora .*\(process {os.getpid()} on .*, since 20.*another --out"
            ),
            locked(out),
        ):
            pass
        with locked(out, rank="1"), locked(out / "model.klora", is_file=True):  # other things
            pass
    assert not list(tmp_path.iterdir())
    with locked(out):
        (out / "result").touch()
    assert [path.name for path in out.iterdir()] == ["result"]
    with locked(out):
        pass


def test_the_lock_of_a_killed_process_bars_nobody(tmp_path):
    holder = Forked(["-c", HOLD, tmp_path])
    path = tmp_path / ".klora.lock"
    wait_for(lambda: path.exists() and path.stat().st_size, holder)
    with pytest.raises(Locked, match=rf"is in use by klora .*\(process {holder.pid} on "), locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.exists()
    with locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_folder_in_the_lock_s_place_is_named_with_what_to_do(tmp_path):
    (tmp_path / ".klora.lock").mkdir()
    with pytest.raises(OSError, match=r"^.*\.klora\.lock is a folder in the place of klora's lock file; remove it"):
        locked(tmp_path).__enter__()


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1]", b"[" * 4096, b"\xff", b'{"pid": "x", "host": 1, "command": [], "since": {}}']
)
def test_a_lock_file_that_says_nothing_is_that_of_another_process(tmp_path, text):
    with locked(tmp_path):
        (tmp_path / ".klora.lock").write_bytes(text)
        with pytest.raises(Locked, match="is in use by another process; wait until it has ended"), locked(tmp_path):
            pass


def test_a_lock_file_that_goes_between_opening_and_locking_is_made_again(tmp_path, monkeypatch):
    lock, path, seen = fcntl.flock, tmp_path / ".klora.lock", []

    def slow(handle, how):
        if not seen:
            path.unlink()  # its holder ends now
        seen.append(handle)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with locked(tmp_path), pytest.raises(Locked), locked(tmp_path):
        pass
    assert len(seen) == 3


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch):
    def unable(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    said = []
    with locked(tmp_path / "out", say=said.append):
        pass
    assert len(said) == 1 and "is on a file system without locks (No locks available): let no other" in said[0]


def test_a_second_command_is_refused_before_it_changes_anything(tmp_path):
    """Whatever it is asked to do."""
    out = tmp_path / "out"
    commands = [("score", "no.klora"), ("train",), ("demo",)]
    with locked(out):
        (out / "loss.csv").write_text("another run's")
        (out / "checkpoint.safetensors").write_text("another run's")
        for command in commands:
            for more in ((), ("--overwrite",), ("--resume",)):
                if command == ("demo",) and more:
                    continue
                refused = klora(*command, "--out", out, *more, check=2)
                assert f"{out} is in use by klora" in refused.stderr.replace("\n", "")
        assert sorted(path.name for path in out.iterdir()) == [".klora.lock", "checkpoint.safetensors", "loss.csv"]
        machine = klora("train", "--out", out, "--json", check=2)
        assert json.loads(machine.stdout)["kind"] == "Locked"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "loss.csv"]


def test_each_rank_has_a_lock_of_its_own(tmp_path, monkeypatch):
    """A second run of several ranks finds each of them held; ranks of one run do not bar one another."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path):  # rank 0's
        assert "no such file" in klora("score", tmp_path / "no.klora", "--out", tmp_path, check=2).stderr
    with locked(tmp_path, rank="1"):
        assert "is in use by klora" in klora("score", tmp_path / "no.klora", "--out", tmp_path, check=2).stderr
