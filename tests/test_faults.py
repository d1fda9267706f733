"""Commands that are killed at any time and started again, until they are done: nothing is lost and no number changes.

A kill is SIGKILL at a random time of the command's life. `make test` kills each command a few times, `make faults`
fifty times, and says how many were survived.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomized, wait_for, words
from forks import Forked
from klora.model.artifact import load_artifact, save_artifact
from klora.model.checkpoint import load_tensors
from klora.model.config import Preset
from klora.model.parallel import Ranks
from klora.model.train import Trainer
from test_ranks import free_port
from test_train import CONFIG, SMALL_MODEL, losses

KILLS = int(os.environ.get("KLORA_FAULTS", "1"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

pytestmark = pytest.mark.slow


class Killer:
    """Starts a command, and kills it at a random time of a life of `seconds`, KILLS times in all."""

    def __init__(self, seed: int, seconds: float = 0.0):
        self.draw, self.seconds, self.kills, self.starts = random.Random(seed), seconds, 0, 0

    def whole(self, *arguments) -> None:
        """Run a command to its end, which takes `seconds`."""
        started = time.monotonic()
        self.end(Forked(["-m", "klora.cli", *arguments], environment=ENVIRONMENT))
        self.seconds = time.monotonic() - started

    def end(self, process: Forked, *statuses: int) -> int:
        """The status of a process that nobody kills; AssertionError for one that is neither 0 nor among `statuses`."""
        said = process.communicate()
        assert process.returncode in (0, *statuses) and "Traceback" not in said[1], said[1][-3000:]
        return process.returncode

    def strike(self, process: Forked, least: float = 0.2) -> bool:
        """Kill a process after a random share of `seconds`, at `least` that; whether it was still alive."""
        until = time.monotonic() + self.draw.uniform(least, 1.0) * self.seconds
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        hit = process.wait() == -signal.SIGKILL
        self.kills += hit
        return hit

    def run(self, command, is_done) -> None:
        """Start what `command()` gives again and again until it is done: killed while there are kills left."""
        while not is_done():
            self.starts += 1
            process = Forked(["-m", "klora.cli", *command()], environment=ENVIRONMENT)
            if self.kills >= KILLS:
                self.end(process)
                assert is_done()
            elif not self.strike(process):
                self.end(process)

    def say(self, what: str) -> None:
        print(f"{what}: {self.kills} of {self.kills} kills survived, {self.starts} starts")


def is_newer(path: Path, time_ns: int) -> bool:
    return path.exists() and path.stat().st_mtime_ns > time_ns


def sets(**values) -> list[str]:
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, data) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.klora"
    save_artifact(path, randomized(SMALL_MODEL).state_dict(), SMALL_MODEL, data.tokenizer.to_bytes(), {"steps": 0})
    return path


@pytest.fixture(scope="module")
def scoring(tmp_path_factory, artifact) -> list:
    """`klora score` of some texts, without --out."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(8):
        (folder / f"{number}.txt").write_text(words(number, 40 + 30 * (number % 4)))
    return ["score", artifact, "--text", folder, *sets(chunk=16, window=64, adapt_from=32, batch=2)]


def scores(folder: Path) -> list[float]:
    return [document["adapted_nats"] for document in json.loads((folder / "score.json").read_text())["documents"]]


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, scoring) -> tuple[list[float], float]:
    """The scores of one process that nobody kills, and how many seconds it takes."""
    folder, killer = tmp_path_factory.mktemp("unharmed"), Killer(0)
    killer.whole(*scoring, "--out", folder)
    return scores(folder), killer.seconds


def test_training_survives_kills_bit_for_bit(tmp_path, data):
    """The weights and the losses are those of a run that nobody killed."""
    train = {**CONFIG.to_dict(), "max_steps": 20, "checkpoint_seconds": 0.05}
    known = {**SMALL_MODEL.to_dict(), **train}
    options = ["--shards", data.folder, *sets(**known)]
    killer, round_ = Killer(1), 0
    killer.whole("train", "--out", tmp_path / "whole", *options)
    expected = load_tensors(tmp_path / "whole" / "model.safetensors")[0]
    while killer.kills < KILLS or not round_:
        out, round_ = tmp_path / f"out{round_}", round_ + 1

        def command(out: Path = out) -> list:
            resumes = (out / "checkpoint.safetensors").exists()
            return ["train", "--out", out, *(["--resume"] if resumes else options)]

        killer.run(command, (out / "model.safetensors").exists)
        if not (out / "checkpoint.safetensors").exists():
            continue
        got = load_tensors(out / "model.safetensors")[0]
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        assert losses(out) == losses(tmp_path / "whole")
        assert not list(out.glob(".*model.safetensors.*partial"))
    killer.say("train")


def test_exports_survive_kills(tmp_path, data):
    """There is the artifact from before or the whole new one, at any time."""
    preset = Preset("small", SMALL_MODEL, CONFIG.override({"max_steps": 2}), "")
    Trainer(preset, data, tmp_path / "run", Ranks(0, 1, torch.device("cpu"))).run()
    out, killer = tmp_path / "model.klora", Killer(2)
    command = "export", tmp_path / "run", "--out", out
    killer.whole(*command)
    new = out.read_bytes()
    save_artifact(out, randomized(SMALL_MODEL).state_dict(), SMALL_MODEL, data.tokenizer.to_bytes(), {"steps": 0})
    old = out.read_bytes()
    while killer.kills < KILLS:
        killer.starts += 1
        out.write_bytes(old)
        killer.strike(Forked(["-m", "klora.cli", *command], environment=ENVIRONMENT))
        assert out.read_bytes() in (old, new)
    killer.whole(*command)
    assert out.read_bytes() == new and load_artifact(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.klora", "run"]
    killer.say("export")


def test_scoring_survives_kills(tmp_path, scoring, unharmed):
    """The same scores, and nothing of another run beside them."""
    expected, seconds = unharmed
    killer, round_ = Killer(3, seconds), 0
    while killer.kills < KILLS or not round_:
        out, round_ = tmp_path / f"out{round_}", round_ + 1

        def command(out: Path = out) -> list:
            return [*scoring, "--out", out, *(["--resume"] if any(out.glob("journal*")) else [])]

        def is_done(out: Path = out) -> bool:
            return (out / "score.json").exists() and not any(out.glob("journal*"))

        killer.run(command, is_done)
        np.testing.assert_allclose(scores(out), expected, rtol=1e-5)
        names = {path.name for path in out.iterdir()} - {".klora.lock"}
        assert names == {"documents.csv", "report.html", "report.png", "score.json"}
    killer.say("score")


def test_ranks_survive_kills(tmp_path, scoring, unharmed):
    """One of two ranks is killed, in turns: the first takes over; the other ends with a sentence, and --resume goes on.

    Where the first is killed in the last moment of all, the other has everything and ends well, too.
    """
    expected, seconds = unharmed
    killer, round_, kills = Killer(4, seconds / 4), 0, max(2, KILLS)
    while killer.kills < kills:
        out, round_ = tmp_path / f"out{round_}", round_ + 1
        while not (out / "score.json").exists() or any(out.glob("journal*")):
            killer.starts, began = killer.starts + 1, time.time_ns()
            together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            more = ["--resume"] if any(out.glob("journal*")) else []
            command = ["-m", "klora.cli", *scoring, "--out", out, "--patience", "3", *more]
            ranks = [Forked(command, environment={**ENVIRONMENT, **together, "RANK": str(rank)}) for rank in range(2)]
            if killer.kills < kills:
                # A rank that is not there yet is waited for: half an hour, as the first one may read journals.
                for process, name in zip(ranks, ("journal.jsonl", "journal-1.jsonl"), strict=True):
                    wait_for(lambda path=out / name, began=began: is_newer(path, began), process)
                rank = 1 - killer.kills % 2
                killer.strike(ranks[rank], least=0.0)
                killer.end(ranks[1 - rank], *([] if rank else [2]))
            for process in ranks:
                process.wait()
        np.testing.assert_allclose(scores(out), expected, rtol=1e-5)
    killer.say("ranks")
