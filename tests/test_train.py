"""Training: schedule, averages, checkpoints, resuming, signals, divergence, and several ranks."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from klora.kernels import newton_schulz_ref
from klora.model.average import WeightAverages
from klora.model.checkpoint import CheckpointError, load_tensors, save_tensors
from klora.model.config import ConfigError, Preset, TrainConfig
from klora.model.corpus import Document
from klora.model.curve import LossCurve
from klora.model.evaluate import validation_bpb
from klora.model.gpt import GPT
from klora.model.loading import load_run, model_from_run
from klora.model.muon import Muon
from klora.model.parallel import Ranks, pick_device
from klora.model.prepare import Prepared
from klora.model.shards import ShardWriter, TokenStream
from klora.model.tokenizer import Tokenizer
from klora.model.train import NonFiniteLoss, Trainer, lr_scale

ALONE = Ranks(0, 1, torch.device("cpu"))
SENTENCES = [
    "The fox jumps over the lazy dog while a quick brown hen looks on.",
    "def adapt(document): return score(document, before=True)",
    "Seven numbers: 3, 14, 15, 92, 65, 35 and 89; none of them is even, but two.",
    "Kernels read what they need once and write what they made once.",
]
SMALL_MODEL = SMALL.override({"vocab_size": 320})
CONFIG = TrainConfig(
    seconds=3600.0,
    max_steps=12,
    batch_tokens=256,
    micro_batch_tokens=128,
    warmdown_steps=6,
    ema_every=2,
    swa_every=2,
    swa_below=0.9,
    ema_decay=0.9,
    validate_tokens=512,
)


def small_preset(**overrides) -> Preset:
    return Preset("small", SMALL_MODEL, CONFIG, "for tests").override(overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(SENTENCES, 20)) for _ in range(40)]
    tokenizer = Tokenizer.train([Document(str(i), text) for i, text in enumerate(texts)], 320)
    paths = {}
    for split, part in (("train", texts[:30]), ("val", texts[30:])):
        with ShardWriter(folder, split) as writer:
            for text in part:
                writer.add(tokenizer.encode(text))
        paths[split] = list(writer.paths)
    (folder / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    return Prepared(tokenizer, paths["train"], paths["val"], folder)


def losses(folder: Path) -> list[tuple[str, str]]:
    with open(folder / "loss.csv") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def test_training_learns_and_leaves_a_whole_run(tmp_path, data):
    result = Trainer(small_preset(max_steps=60), data, tmp_path, ALONE).run()
    first, last = float(losses(tmp_path)[0][1]), float(losses(tmp_path)[-1][1])
    assert last < 0.6 * first
    assert result.status == "finished" and result.step == 60 and result.tokens == 60 * 256
    assert {"last", "ema", "swa"} == result.validation_bpb.keys()
    assert result.kept in ("ema", "swa")
    assert result.validation_bpb[result.kept] == min(result.validation_bpb["ema"], result.validation_bpb["swa"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*partial"))
    model = model_from_run(tmp_path, torch.device("cpu"))
    again = validation_bpb(model, TokenStream(data.validation), data.tokenizer, 512, 128, ALONE)
    assert again == pytest.approx(result.validation_bpb[result.kept], rel=1e-6)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["model"] == SMALL_MODEL.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_resume_continues_bit_for_bit(tmp_path, data, stop_at):
    whole, part = tmp_path / "whole", tmp_path / "part"
    Trainer(small_preset(), data, whole, ALONE).run()

    def interrupt(row):
        if row["step"] == stop_at:
            signal.raise_signal(signal.SIGTERM)

    stopped = Trainer(small_preset(), data, part, ALONE).run(interrupt)
    assert stopped.status == "interrupted" and stopped.step == stop_at + 1 and stopped.signal == signal.SIGTERM
    with pytest.raises(CheckpointError, match="its training did not finish"):
        load_run(part)
    resumed = Trainer(small_preset(), data, part, ALONE, resume=True)
    assert resumed.step == stop_at + 1
    resumed.run()
    assert losses(part) == losses(whole)
    expected, _ = load_run(whole)
    got, _ = load_run(part)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.slow
def test_a_checkpoint_on_the_timer_is_resumed_after_a_kill(tmp_path, data):
    """Steps after the last checkpoint are done again: loss.csv has each step once, as in the run without the kill."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    Trainer(small_preset(), data, whole, ALONE).run()

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


def test_the_clock_stops_a_run_and_stands_still_during_validation(tmp_path, data):
    trainer = Trainer(small_preset(max_steps=0, seconds=0.5, validate_seconds=0.05), data, tmp_path, ALONE)
    slow = trainer._validate
    trainer._validate = lambda: (time.sleep(0.2), slow())[1]
    started = time.perf_counter()
    result = trainer.run()
    assert time.perf_counter() - started > result.seconds + 0.4
    with open(tmp_path / "loss.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["seconds"]) < 0.5 for row in rows[:-1]) and float(rows[-1]["seconds"]) >= 0.5
    assert any(row["validation_bpb"] for row in rows)


def test_a_non_finite_loss_stops_with_step_checkpoint_and_advice(tmp_path, data):
    trainer = Trainer(small_preset(), data, tmp_path, ALONE)

    def poison(row):
        if row["step"] == 3:
            trainer._save_checkpoint()
            with torch.no_grad():
                trainer.model.blocks[0].gain[0] = float("nan")

    with pytest.raises(
        NonFiniteLoss, match=r"step 4 gave loss nan.*checkpoint.safetensors \(step 3\).*Try smaller learning"
    ):
        trainer.run(poison)
    tensors, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_every_gradient_is_zeroed_before_each_step(tmp_path, data):
    trainer = Trainer(small_preset(), data, tmp_path, ALONE)
    trainer.gradients.buffer.fill_(1e6)
    first = trainer._train_step(0.0)
    assert first < 1e3


def test_gradient_accumulation_equals_one_big_batch(tmp_path, data):
    big = Trainer(small_preset(micro_batch_tokens=256), data, tmp_path / "a", ALONE)
    small = Trainer(small_preset(micro_batch_tokens=64), data, tmp_path / "b", ALONE)
    assert big._train_step(1.0) == pytest.approx(small._train_step(1.0), rel=1e-5)
    torch.testing.assert_close(big.gradients.buffer, small.gradients.buffer, rtol=1e-4, atol=1e-7)


def test_lr_schedule():
    by_steps = TrainConfig(max_steps=100, warmdown_steps=20, seconds=600.0)
    assert [lr_scale(by_steps, step, 1.0) for step in (0, 80, 90, 99)] == pytest.approx([1, 1, 0.5, 0.05])
    assert lr_scale(by_steps, 50, 590.0) == 1.0  # the clock does not touch a schedule in steps
    clock = TrainConfig(seconds=600.0, warmdown_steps=3000)
    assert lr_scale(clock, 0, 0.0) == 1.0
    assert lr_scale(clock, 1000, 82.0) == 1.0  # 82 ms a step: the last 246 s
    assert lr_scale(clock, 4000, 600 - 123.0) == pytest.approx(123 / (3000 * 477 / 4000))
    assert lr_scale(clock, 10, 300.0) == pytest.approx(0.5)  # slow steps: the warmdown is the whole run
    half = TrainConfig(seconds=600.0, warmdown_steps=3000, warmdown_most=0.5)
    assert [lr_scale(half, 10, t) for t in (300.0, 450.0, 601.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert lr_scale(TrainConfig(warmdown_steps=0, seconds=10.0), 5, 9.0) == 1.0


def test_averages_are_the_averages_of_what_they_saw():
    model = torch.nn.Linear(3, 1, bias=False)
    config = TrainConfig(ema_every=2, ema_decay=0.9, swa_every=3, swa_below=0.5)
    averages = WeightAverages(model, config)
    assert averages.candidates() == {}
    history = {}
    for step in range(1, 13):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 3))
        history[step] = model.weight.detach().clone()
        averages.update(step, lr_scale=1.0 if step < 6 else 0.4)
    found = averages.candidates()
    torch.testing.assert_close(found["swa"]["weight"], (history[6] + history[9] + history[12]) / 3)
    keep = 0.9**2
    weights = {step: (1 - keep) * keep ** ((12 - step) // 2) for step in range(2, 13, 2)}
    expected = sum(w * history[step] for step, w in weights.items()) / sum(weights.values())
    torch.testing.assert_close(found["ema"]["weight"], expected)


def test_muon_orthogonalises_scales_and_decays():
    torch.manual_seed(0)
    tall, wide = torch.nn.Parameter(torch.randn(48, 12)), torch.nn.Parameter(torch.randn(12, 48))
    before = tall.detach().clone(), wide.detach().clone()
    tall.grad, wide.grad = torch.randn(48, 12), torch.randn(12, 48)
    Muon([tall, wide], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    for parameter, start, scale in ((tall, before[0], 2.0), (wide, before[1], 1.0)):
        update = (start * (1 - 0.1 * 0.5) - parameter.detach()) / (0.1 * scale)
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.65 and values.max() < 1.16
        torch.testing.assert_close(update, newton_schulz_ref(1.9 * parameter.grad), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"Muon takes matrices; a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_newton_schulz_bounds_singular_values_of_known_spectra():
    torch.manual_seed(0)
    for rows, columns in ((64, 64), (32, 96), (96, 32)):
        u, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), dtype=torch.float64))
        spectrum = torch.logspace(-1, 0, min(rows, columns), dtype=torch.float64)
        values = torch.linalg.svdvals(newton_schulz_ref(u @ torch.diag(spectrum) @ v.T))
        assert values.min() > 0.66 and values.max() < 1.15


def test_what_does_not_fit_is_refused(tmp_path, data):
    with pytest.raises(
        ConfigError, match="batch_tokens=100 is not possible; allowed: multiples of train_length x ranks"
    ):
        Trainer(small_preset(batch_tokens=100), data, tmp_path, ALONE)
    with pytest.raises(ConfigError, match="vocab_size=400 is not possible; the tokenizer has 320"):
        Trainer(small_preset(vocab_size=400), data, tmp_path, ALONE)
    with pytest.raises(CheckpointError, match="there is no file"):
        Trainer(small_preset(), data, tmp_path / "none", ALONE, resume=True)
    Trainer(small_preset(), data, tmp_path, ALONE)._save_checkpoint()
    with pytest.raises(CheckpointError, match="holds another model"):
        Trainer(small_preset(blocks=3), data, tmp_path, ALONE, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        Trainer(small_preset(), data, tmp_path, ALONE, resume=True)
    with pytest.raises(ConfigError, match="device='tpu' is not possible; allowed: auto, cpu, cuda"):
        pick_device("tpu")


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


def test_validation_counts_every_target_but_bos(data):
    """A model that knows nothing: log2(V) bits a target that is no BOS, over the bytes of the text."""
    model = GPT(SMALL_MODEL)
    with torch.no_grad():
        model.embed.zero_()
    stream = TokenStream(data.validation)
    tokens = stream.tokens(0, len(stream)).astype(np.int64)
    used = (len(stream) - 1) // 64 * 64
    targets = tokens[1 : used + 1]
    expected = (targets != 1).sum() * np.log2(320) / data.tokenizer.target_bytes(tokens[: used + 1]).sum()
    assert validation_bpb(model, stream, data.tokenizer, 0, 128, ALONE) == pytest.approx(float(expected), rel=1e-6)


WORKER = """
import json, sys, torch
from pathlib import Path
from klora.model.config import Preset, ModelConfig, TrainConfig
from klora.model.parallel import join_ranks
from klora.model.prepare import prepared_from_shards
from klora.model.train import Trainer
torch.set_num_threads(1)
model, train, shards, out = json.loads(sys.argv[1])
with join_ranks("cpu") as ranks:
    preset = Preset("small", ModelConfig.from_dict(model), TrainConfig.from_dict(train), "")
    trainer = Trainer(preset, prepared_from_shards(shards), Path(out), ranks)
    trainer.run()
    torch.save({n: p.detach() for n, p in trainer.model.named_parameters()}, f"{out}/rank{ranks.rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_train_the_same_weights_as_one(tmp_path, data):
    preset = small_preset(max_steps=6)
    Trainer(preset, data, tmp_path / "alone", ALONE).run()
    together = tmp_path / "together"
    together.mkdir()
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = json.dumps([preset.model.to_dict(), preset.train.to_dict(), str(data.folder), str(together)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(together / f"rank{rank}.pt") for rank in (0, 1))
    expected, _ = load_run(tmp_path / "alone")
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
    got, _ = load_run(together)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4)
    assert [s for s, _ in losses(together)] == [str(i) for i in range(1, 7)]


def test_a_signal_in_the_last_phase_loses_nothing(tmp_path, data):
    """SIGTERM while the averages are evaluated: the run finishes, and a kill then would have left a checkpoint."""
    trainer = Trainer(small_preset(), data, tmp_path, ALONE)
    validate, seen = trainer._validate, []

    def interrupted():
        seen.append((tmp_path / "checkpoint.safetensors").exists())
        signal.raise_signal(signal.SIGTERM)
        return validate()

    trainer._validate = interrupted
    assert trainer.run().status == "finished" and all(seen) and seen
    assert (tmp_path / "model.safetensors").exists()
    longer = Trainer(small_preset(max_steps=15), data, tmp_path, ALONE, resume=True)
    assert longer.step == 12 and longer.run().step == 15


def test_a_torn_row_of_the_curve_is_dropped(tmp_path, data):
    Trainer(small_preset(max_steps=3), data, tmp_path, ALONE).run()
    with open(tmp_path / "loss.csv", "a") as file:
        file.write("2,0.5")
    assert [row["step"] for row in LossCurve(tmp_path, resume_at=3).rows()] == ["1", "2", "3"]


def test_a_second_interrupt_is_obeyed_at_once(tmp_path, data):
    def interrupt_twice(row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Trainer(small_preset(), data, tmp_path, ALONE).run(interrupt_twice)
    assert signal.getsignal(signal.SIGINT) is before
