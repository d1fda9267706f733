"""The life of several ranks in training: one curve on any number of them, losses, restarts, and who does what once.

Ranks are lost for good: by SIGKILL, or by SIGSTOP, after which a process answers nothing and closes nothing.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import wait_for
from forks import Forked
from klora.model import watch
from klora.model.checkpoint import load_tensors
from klora.model.parallel import Ranks
from klora.model.shards import RowSampler, TokenStream
from klora.model.train import Trainer
from klora.model.watch import LOST, Watch
from test_cli import klora
from test_ranks import free_port
from test_train import ALONE, CONFIG, SMALL_MODEL, digests, losses, small_preset

STEPS = 60
PATIENCE = 4.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}


def options(data, **train) -> list:
    """Of a run of the small model, whose checkpoints come from losses alone."""
    values = {**SMALL_MODEL.to_dict(), **CONFIG.to_dict(), "max_steps": STEPS, "micro_batch_tokens": 64, **train}
    return ["--shards", data.folder, *(part for pair in values.items() for part in ("--set", "{}={}".format(*pair)))]


class Torchrun:
    """`klora train --out OUT` with more options under torchrun, on `count` ranks."""

    def __init__(self, count: int, out: Path, *arguments, launcher: tuple[str, ...] = ()):
        self.out, self.count = out, count
        ranks = ["--nproc-per-node", count, "--master-port", free_port(), *launcher]
        train = ["-m", "klora.cli", "train", "--out", out, "--patience", PATIENCE, *arguments]
        command = [sys.executable, "-m", "torch.distributed.run", *ranks, *train]
        self.process = subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def strike(self, rank: int, number: int, after: int) -> None:
        """Send a signal to a rank once step `after` is in loss.csv."""
        wait_for(lambda: steps(self.out) >= after, self.process)
        (victim,) = (pid for pid in self.children() if environment_of(pid).get("RANK") == str(rank))
        os.kill(victim, number)

    def children(self) -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def end(self, seconds: float = 120.0) -> tuple[int, str]:
        """(status, what all have said), and nobody is left."""
        try:
            said, _ = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        return self.process.returncode, said


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def steps(out: Path) -> int:
    """Rows of loss.csv."""
    path = out / "loss.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def curve(out: Path) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in losses(out)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data) -> dict[int, float]:
    """The losses of one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("alone")
    klora("train", "--out", folder, *options(data))
    return curve(folder)


@pytest.mark.slow
def test_four_ranks_have_the_curve_of_one_process(tmp_path, data, alone):
    status, said = Torchrun(4, tmp_path / "run", *options(data)).end()
    assert status == 0, said[-3000:]
    assert curve(tmp_path / "run") == pytest.approx(alone, rel=1e-5, abs=1e-5)
    assert load_tensors(tmp_path / "run" / "model.safetensors") and said.count("validation BPB") == 1
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []


@pytest.mark.slow
def test_a_rank_that_stops_or_dies_ends_all_with_a_checkpoint_and_a_smaller_world_goes_on(tmp_path, data, alone):
    """A rank of four is stopped, then the first of two is killed, then one process ends the run: one curve."""
    out = tmp_path / "run"
    endless = Torchrun(4, out, *options(data))
    for run, rank, number, after in ((endless, 2, signal.SIGSTOP, 5), (None, 0, signal.SIGKILL, 20)):
        run = run or Torchrun(2, out, "--resume")
        run.strike(rank, number, after)
        began = time.monotonic()
        status, said = run.end()
        assert status == 1 and time.monotonic() - began < PATIENCE + 25, said[-3000:]
        (line,) = (line for line in said.splitlines() if line.startswith("klora: rank"))
        step = load_tensors(out / "checkpoint.safetensors")[1]["step"]
        assert line.startswith(f"klora: rank {rank} is lost, without a sign of life for") and step >= after
        assert f"The state after step {step} is in {out / 'checkpoint.safetensors'}" in line
        assert f"`klora train --resume --out {out}` goes on from there, on any number of GPUs" in line
        assert (
            said.count(f"exitcode  : {LOST} ") == run.count - 1 and "Traceback (most recent call last):\n  File" in said
        )
        assert "SIGKILL" in said
    klora("train", "--out", out, "--resume")
    found = curve(out)
    assert {step: alone[step] for step in found} == pytest.approx(found, rel=1e-5, abs=1e-5)
    assert set(alone) - set(found) <= {step + 1 for step in found}  # the row that the first rank took with it
    assert len(alone) - len(found) <= 1


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_go_on_with_their_run(tmp_path, data, alone):
    """The first run's folder is one that --overwrite empties: once."""
    out = tmp_path / "run"
    klora("train", "--out", out, *options(data, max_steps=2))
    run = Torchrun(4, out, *options(data), "--overwrite", launcher=("--max-restarts", "1"))
    wait_for(lambda: steps(out) > 2 and not (out / "model.safetensors").exists(), run.process)
    run.strike(3, signal.SIGKILL, 8)
    status, said = run.end()
    assert status == 0, said[-3000:]
    assert "klora: rank 3 is lost" in said and "resuming at step" in said
    assert curve(out) == pytest.approx(alone, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_launchers_of_two_nodes_have_one_run_and_a_rank_lost_on_one_ends_both(tmp_path, data, alone):
    out = tmp_path / "run"

    def nodes(*arguments) -> list[Torchrun]:
        meeting = "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "run"
        meeting += "--rdzv-endpoint", f"localhost:{free_port()}"
        return [Torchrun(1, out, *arguments, launcher=meeting) for _ in range(2)]

    both = nodes(*options(data))
    wait_for(lambda: steps(out) >= 5, both[0].process)
    (other,) = (node for node in both if environment_of(*node.children())["RANK"] == "1")
    other.strike(1, signal.SIGKILL, 5)
    ends = [node.end() for node in both]
    said = "".join(said for _, said in ends)
    assert [status for status, _ in ends] == [1, 1] and said.count("klora: rank 1 is lost") == 1, said[-3000:]
    ends = [node.end() for node in nodes("--resume")]
    assert [status for status, _ in ends] == [0, 0], ends
    assert curve(out) == pytest.approx(alone, rel=1e-5, abs=1e-5)


def together(count: int, *command, **more) -> list[Forked]:
    """A command on ranks that were started by hand."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Forked(command, environment={**ENVIRONMENT, **shared, **more, "RANK": str(rank)}) for rank in range(count)]


OTHERS = {
    "a rate": (["--set", "muon_lr=0.5"], "muon_lr is 0.02 there and 0.5 here"),
    "an end": (["--set", "max_steps=7"], "max_steps is 60 there and 7 here"),
    "a start": (["--resume"], "--resume is False there and True here"),
    "a text": (["--shards", "OTHERS"], "fineweb_train_000000.bin holds other tokens"),
}


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_a_rank_of_another_run_is_refused_before_anything_changes(tmp_path, data, other):
    """A rank of another machine, where an option or a file may be another."""
    given, says = OTHERS[other]
    shutil.copytree(data.folder, tmp_path / "others")
    for path in (tmp_path / "others").glob("*_train_*.bin"):
        tokens = path.read_bytes()
        path.write_bytes(tokens[:-4] + tokens[-2:] + tokens[-4:-2])
    given = [str(tmp_path / "others") if part == "OTHERS" else part for part in given]
    command = ["-m", "klora.cli", "train", "--out", tmp_path / "run", *options(data)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    ranks = [
        Forked(part, environment={**ENVIRONMENT, **shared, "RANK": str(rank)})
        for rank, part in enumerate((command, [*command, *given]))
    ]
    said = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert all("rank 1 is not of the first rank's run: " in error and says in error for _, error in said), said
    assert not (tmp_path / "run" / "run.json").exists()


WAYS = {
    "buckets": {"gradient_buckets": 3},
    "gathers": {"muon_gathers": 2},
    "all": {"gradient_buckets": 3, "muon_gathers": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_share_out_a_step_in_another_way_have_the_curve_of_one_process(tmp_path, data, alone, way):
    ranks = together(4, "-m", "klora.cli", "train", "--out", tmp_path, *options(data, fused="true", **WAYS[way]))
    said = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0] * 4, said
    assert curve(tmp_path) == pytest.approx(alone, rel=1e-5, abs=1e-5)
    stored = json.loads((tmp_path / "run.json").read_text())["train"]
    assert stored.items() >= {"fused": "true", **WAYS[way]}.items()


@pytest.mark.slow
def test_a_run_of_ranks_is_resumed_in_another_way_and_by_one_process_in_any(tmp_path, data, alone):
    """Four ranks in parts, four in others, then one, on which they mean nothing: one curve."""
    command = "-m", "klora.cli", "train", "--out", tmp_path
    for after, given in (
        (5, options(data, fused="true", **WAYS["all"])),
        (20, ["--resume", "--set", "gradient_buckets=2", "--set", "muon_gathers=0"]),
    ):
        ranks = together(4, *command, *given)
        wait_for(lambda after=after: steps(tmp_path) >= after, ranks[0])
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        said = [process.communicate() for process in ranks]
        assert [process.returncode for process in ranks] == [128 + signal.SIGTERM] * 4, said
    assert steps(tmp_path) < STEPS
    klora("train", "--out", tmp_path, "--resume", "--set", "gradient_buckets=5", "--set", "muon_gathers=5")
    assert curve(tmp_path) == pytest.approx(alone, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_an_interrupt_stops_all_ranks_with_one_checkpoint_and_one_sentence(tmp_path, data):
    ranks = together(2, "-m", "klora.cli", "train", "--out", tmp_path, *options(data, max_steps=10**6))
    wait_for(lambda: steps(tmp_path) >= 3, ranks[0])
    for process in ranks:
        process.send_signal(signal.SIGINT)
    said = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [130, 130], said
    assert sum(out.count("stopped at step") + error.count("stopping at the next") for out, error in said) == 2
    step = load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"]
    assert f"stopped at step {step}; `klora train --resume" in said[0][0] and len(losses(tmp_path)) == step
    assert said[1][0] == said[1][1] == ""


WAITING = """
import signal, sys
from klora.model.parallel import join_ranks
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
try:
    with join_ranks("cpu"):
        pass
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
def test_a_rank_that_waits_for_another_to_come_can_be_interrupted():
    port = free_port()
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    waiting = Forked(["-c", WAITING], environment={**ENVIRONMENT, **alone})
    wait_for(lambda: is_heard(port), waiting)
    time.sleep(1.0)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(60) == 130


JOINED = """
import json, os
from klora.model.parallel import join_ranks
with join_ranks("cpu"):
    print(json.dumps({name: text for name, text in os.environ.items() if name.startswith("NCCL_")}))
"""


@pytest.mark.slow
def test_the_variables_of_nccl_stay_as_they_are_set():
    """NVLink multicast is off where a machine says so; nothing is set beside it."""
    given = {"NCCL_NVLS_ENABLE": "0", "NCCL_ALGO": "Ring"}
    wanted = {name: text for name, text in ENVIRONMENT.items() if name.startswith("NCCL_")} | given
    for process in together(2, "-c", JOINED, **given):
        said, error = process.communicate()
        assert process.returncode == 0 and json.loads(said) == wanted, error


def is_heard(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_the_first_rank_may_take_the_store_with_it(tmp_path, data):
    """Without torchrun it is the first rank's. Another rank of its machine sees that it is dead."""
    command = "train", "--out", tmp_path, "--patience", "2", *options(data, max_steps=10**6)
    ranks = together(2, "-m", "klora.cli", *command)
    wait_for(lambda: steps(tmp_path) >= 3, ranks[0])
    ranks[0].send_signal(signal.SIGKILL)
    said = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [-signal.SIGKILL, LOST], said
    step = load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"]
    assert step >= 3 and f"The state after step {step} is in" in said[1][1] and said[1][1].count("klora:") == 1


POISONED = """
import json, sys, torch
from pathlib import Path
from klora.model.config import Preset, ModelConfig, TrainConfig
from klora.model.parallel import join_ranks
from klora.model.prepare import prepared_from_shards
from klora.model.train import NonFiniteLoss, Trainer
model, train, shards, out, kind = json.loads(sys.argv[1])
with join_ranks("cpu", patience=2.0) as ranks:
    preset = Preset("small", ModelConfig.from_dict(model), TrainConfig.from_dict(train), "")
    trainer = Trainer(preset, prepared_from_shards(shards), Path(out), ranks)
    nll = trainer.model.nll
    def harm(*given, **options):
        if trainer.step == 3 and ranks.rank == 1 and kind != "clock":
            if kind == "error":
                raise OSError("the disk of this rank is gone")
            if kind == "stuck":
                __import__("time").sleep(3600)
            return nll(*given, **options) * float("nan")
        return nll(*given, **options)
    trainer.model.nll = harm
    trainer.clock.started -= 0.4 * ranks.rank if kind == "clock" else 0.0
    try:
        step = trainer.run().step
        print(step, *(parameter.double().sum().item() for parameter in trainer.model.parameters()))
    except NonFiniteLoss as error:
        print(f"{trainer.step}: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "error", "stuck"])
def test_what_befalls_one_rank_ends_all(tmp_path, data, kind):
    (tmp_path / "poisoned.py").write_text(POISONED)
    preset = small_preset(max_steps=10**6)
    about = [preset.model.to_dict(), preset.train.to_dict(), str(data.folder), str(tmp_path / "run"), kind]
    ranks = together(2, tmp_path / "poisoned.py", json.dumps(about))
    said = [process.communicate() for process in ranks]
    statuses = [process.returncode for process in ranks]
    if kind == "nan":
        assert statuses == [0, 0], said
        assert all("step 4 gave loss nan and gradient norm nan; the weights were not updated" in out for out, _ in said)
        assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
        return
    why = {"error": "rank 1 has ended: the disk of this rank is gone", "stuck": "rank 1 is stuck: no sign of progress"}
    assert statuses == ([2, 1] if kind == "error" else [LOST, LOST]), said
    assert why[kind] in said[0][1] and "The state after step 3 is in" in said[0][1]
    assert load_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 3
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.slow
def test_clocks_that_differ_decide_the_same_on_all_ranks(tmp_path, data):
    """When to validate, to write, to lower the rate and to end: else the ranks would wait for each other, or differ."""
    (tmp_path / "clock.py").write_text(POISONED)
    times = {"max_steps": 0, "seconds": 2.0, "validate_seconds": 0.5, "checkpoint_seconds": 0.5}
    preset = small_preset(**times)
    about = [preset.model.to_dict(), preset.train.to_dict(), str(data.folder), str(tmp_path / "run"), "clock"]
    ranks = together(2, tmp_path / "clock.py", json.dumps(about))
    said = [process.communicate() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert said[0][0] == said[1][0] and int(said[0][0].split()[0]) >= 2


class TestData:
    """Rows are a function of the step alone: ranks share each step's out."""

    def sampler(self, data) -> RowSampler:
        return RowSampler(TokenStream(data.train), 64, seed=7)

    @pytest.mark.parametrize("world", [2, 3, 4, 6, 12])
    def test_ranks_read_the_rows_of_one_process_and_none_twice(self, data, world):
        alone, ranks = self.sampler(data), [self.sampler(data) for _ in range(world)]
        for _ in range(3 * alone.rows // 12):
            parts = [sampler.take_rows(12, rank, world) for rank, sampler in enumerate(ranks)]
            assert torch.equal(torch.cat(parts), alone.take_rows(12, 0, 1))
        assert all(sampler.state() == alone.state() for sampler in ranks)

    def test_an_epoch_has_every_row_once_on_any_number_of_ranks(self, data):
        alone = self.sampler(data)
        count = alone.rows // 4 * 4
        ranks = [self.sampler(data) for _ in range(4)]
        read = torch.cat([sampler.take_rows(count, rank, 4) for rank, sampler in enumerate(ranks)])
        starts = {int(i): n for n, i in enumerate(alone._order[:count].tolist())}
        assert len(starts) == count == len(read)
        assert torch.equal(read, torch.stack([alone.take_rows(1, 0, 1)[0] for _ in range(count)]))

    @pytest.mark.parametrize("worlds", [(4, 2, 1), (1, 3, 4), (6, 4, 12)])
    def test_after_a_resume_on_another_number_the_rows_go_on(self, data, worlds):
        alone, state = self.sampler(data), self.sampler(data).state()
        for world in worlds:
            ranks = [self.sampler(data) for _ in range(world)]
            for sampler in ranks:
                sampler.load_state(state)
            for _ in range(5):
                parts = [sampler.take_rows(12, rank, world) for rank, sampler in enumerate(ranks)]
                assert torch.equal(torch.cat(parts), alone.take_rows(12, 0, 1))
            state = ranks[-1].state()


class Left(BaseException):
    """What stands for the end of a process, in the thread that ends it."""


class Room:
    """Watches of several ranks in one process and one store; each tells what it reported and its status."""

    def __init__(self, monkeypatch, world: int, patience: float = 2.0):
        self.store, self.statuses, self.reports, self.guards = dist.HashStore(), {}, {}, ExitStack()
        self.watches = [
            Watch(lambda: self.store, rank, world, torch.ones(1, dtype=torch.int32), patience, self.reporter(rank))
            for rank in range(world)
        ]
        monkeypatch.setattr(watch, "leave_now", self.leave)
        monkeypatch.setattr(threading, "excepthook", lambda given: None)
        monkeypatch.setattr(watch, "SUSPECT", 0.5)
        monkeypatch.setattr(watch, "GRACE", 0.5)

    def reporter(self, rank: int):
        return lambda text: self.reports.__setitem__(rank, text)

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.watches[rank].start()

    def guard(self, save, heard=lambda: 0) -> None:
        """Let `save(rank)` write the state of each rank until the room is closed."""
        for rank, one in enumerate(self.watches):
            self.guards.enter_context(one.guard(partial(save, rank), heard))

    def close(self) -> None:
        self.guards.close()
        for one in self.watches:
            one.leave()

    def leave(self, status: int) -> None:
        self.statuses[threading.get_ident()] = status
        raise Left

    def wait(self, count: int) -> list[int]:
        wait_until(lambda: len(self.statuses) >= count)
        return list(self.statuses.values())


def wait_until(reached, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def room(monkeypatch):
    rooms = []
    yield lambda *given: rooms.append(Room(monkeypatch, *given)) or rooms[-1]
    for one in rooms:
        one.close()


def test_ranks_that_beat_and_wait_are_not_lost_and_those_that_leave_are_not_missed(room):
    all_ = room(2, 1.0)
    all_.start(0, 1)
    first, second = all_.watches
    first.expect()
    second.expect()
    with first.waiting():
        for _ in range(20):
            time.sleep(0.1)
            second.mark()
        second.leave()
        time.sleep(1.5)
    assert all_.statuses == {} and first.alive.item() == second.alive.item() == 1


def test_nothing_is_said_of_a_rank_that_is_not_yet_there_or_takes_its_time(room):
    """It may import, tokenize or compile."""
    all_ = room(2, 0.5)
    all_.start(0)
    time.sleep(1.0)
    all_.start(1)
    all_.watches[1].expect(600.0)
    time.sleep(1.5)
    assert all_.statuses == {}


def test_all_leave_for_one_reason_and_the_lowest_that_is_left_keeps_the_state(room):
    all_, saved = room(3, 2.0), []
    all_.start(0, 1, 2)
    all_.guard(lambda rank: (saved.append(rank), "kept")[1])
    wait_until(lambda: all(len(one._pulses) == 3 for one in all_.watches))
    all_.watches[0].leave(OSError("no disk"))
    assert all_.wait(2) == [2, 2] and saved == [1]
    assert all_.reports == {1: "rank 0 has ended: no disk. kept"}
    assert [one.alive.item() for one in all_.watches] == [1, 0, 0]


def test_a_rank_that_was_stopped_and_wakes_ends_as_the_others_did_and_keeps_nothing(room):
    """They took it for lost, wrote the state and ended: what it would write could be older than a run that went on."""
    all_, saved = room(2, 2.0), []
    all_.guard(saved.append)
    pulse = {"beat": 1, "pid": os.getpid(), "parent": os.getppid(), "host": "another", "left": True}
    all_.store.set(
        "pulse/1", json.dumps(pulse | {"verdict": ["rank 0 lost, without a sign of life for 60 s", LOST, [0]]})
    )
    all_.start(0)
    assert all_.wait(1) == [LOST]
    assert saved == [] and all_.reports == {}


def test_weights_that_are_being_changed_are_not_written(room, monkeypatch):
    monkeypatch.setattr(watch, "WRITE", 0.3)
    monkeypatch.setattr(watch, "STOP", 0.1)
    all_, saved = room(1, 1.0), []
    all_.guard(saved.append, lambda: signal.SIGTERM)
    with all_.watches[0].changing:
        all_.start(0)
        assert all_.wait(1) == [128 + signal.SIGTERM]
    assert saved == [] and "could not be" in all_.reports[0]


def test_a_store_that_is_gone_ends_training_with_the_first_ranks_state(room, monkeypatch):
    all_ = room(2, 0.5)
    all_.guard(lambda rank: "kept")
    all_.start(0, 1)
    wait_until(lambda: all(len(one._pulses) == 2 for one in all_.watches))

    def fail(*given):
        raise dist.DistNetworkError("connection reset")

    monkeypatch.setattr(json, "dumps", fail)  # what the threads call before each beat
    assert all_.wait(2) == [LOST, LOST]
    assert list(all_.reports) == [0] and "the launcher, which keeps the ranks' store, has not" in all_.reports[0]


@pytest.mark.parametrize("fused", ["false", "true"])
def test_the_state_that_a_loss_leaves_is_that_after_the_last_step_bit_for_bit(tmp_path, data, fused):
    """Whatever the main thread does: here it is at the data of the next step, whose rows the sampler has given."""
    preset = small_preset(fused=fused, max_steps=8, qat_share=0.0)
    Trainer(preset, data, tmp_path / "whole", ALONE).run()
    trainer, said = Trainer(preset, data, tmp_path / "part", ALONE), []

    class Lost(Exception):
        pass

    run = trainer.stepper.run

    def lose(*given):
        if trainer.step == 5:
            said.append(trainer._save_last_step())
            raise Lost
        return run(*given)

    assert trainer._save_last_step() == "No step was finished; the same command starts again"
    trainer.stepper.run = lose
    with pytest.raises(Lost):
        trainer.run()
    assert "The state after step 5 is in" in said[0] and steps(tmp_path / "part") == 5
    resumed = Trainer(preset, data, tmp_path / "part", ALONE, resume=True)
    assert (resumed.step, resumed.tokens) == (5, 5 * 256)
    resumed.run()
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    names = ("model.safetensors", "checkpoint.safetensors")
    got, wanted = ([load_tensors(tmp_path / run / name)[0] for name in names] for run in ("part", "whole"))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(got, wanted, strict=True) for name in b)


def test_a_state_that_lies_elsewhere_or_is_compared_leaves_the_last_checkpoint(tmp_path, data):
    trainer = Trainer(small_preset(max_steps=4), data, tmp_path, ALONE)
    state = trainer.optimizers.state_tensors

    def lose(row):
        if row["step"] == 2:
            trainer._save_checkpoint()
            before = digests(tmp_path)["checkpoint.safetensors"]
        if row["step"] == 3:
            before = digests(tmp_path)["checkpoint.safetensors"]
            trainer.optimizers.state_tensors = lambda: {k: v for k, v in state().items() if "blocks.0" not in k}
            said = trainer._save_last_step()
            assert "step 3 could not be kept (a part of the optimizer's state lay on another rank)" in said
            assert "checkpoint.safetensors has that after step 2: `klora train --resume" in said
            trainer.optimizers.state_tensors = state
            trainer.state.folder = tmp_path / "of-this-machine"
            assert "of-this-machine of this machine is not the run's); " in trainer._save_last_step()
            trainer.state.folder = tmp_path
            trainer.state.books.clear()
            assert "(the averages were being compared)" in trainer._save_last_step()
            assert digests(tmp_path)["checkpoint.safetensors"] == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(lose)


def test_one_process_exports_however_many_were_started(tmp_path, data, monkeypatch):
    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in (3, 0):
        monkeypatch.setenv("RANK", str(rank))
        done = klora("export", tmp_path)
        assert (tmp_path / "model.klora").exists() == (rank == 0) and bool(done.stdout) == (rank == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_state_is_read_beside_what_never_ends_on_the_gpu(tmp_path, data):
    """A collective with a lost rank stands in the stream of the steps for ever; here a kernel does for seconds."""
    device = torch.device("cuda", 0)
    preset = small_preset(width=256, mlp_hidden=768, fused="true", max_steps=8)
    trainer, said = Trainer(preset, data, tmp_path, Ranks(0, 1, device)), []
    assert trainer.ranks.alive.is_pinned()

    def hang(row):
        if row["step"] == 4:
            torch.cuda.synchronize()
            trainer.state._beside = torch.cuda.Stream(device)
            torch.cuda._sleep(2 * 10**10)
            hung = torch.cuda.Event()
            hung.record()
            said.append(trainer._save_last_step())
            said.append(hung.query())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(hang)
    assert said[0].startswith("The state after step") and not said[1]
    resumed = Trainer(preset, data, tmp_path, Ranks(0, 1, device), resume=True)
    assert 4 <= resumed.step <= 6 and resumed.step - 1 <= len(losses(tmp_path)) <= resumed.step
    for name, tensor in trainer.model.named_parameters():
        assert torch.equal(tensor, dict(resumed.model.named_parameters())[name]), name
