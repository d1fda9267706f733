"""Training: schedule, averages, divergence, estimates, validation and several ranks."""

import csv
import hashlib
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, randomized, wait_for
from forks import Forked
from klora.kernels import newton_schulz_ref
from klora.model.average import WeightAverages
from klora.model.checkpoint import CheckpointError, load_tensors
from klora.model.config import ConfigError, Preset, TrainConfig
from klora.model.estimate import state_bytes
from klora.model.evaluate import validation_bpb
from klora.model.gpt import GPT
from klora.model.loading import load_run, model_from_run
from klora.model.muon import Muon
from klora.model.parallel import Ranks, pick_device
from klora.model.schedule import is_quantized, lr_scale
from klora.model.shards import ShardWriter, TokenStream
from klora.model.tokenizer import TokenizerError
from klora.model.train import NonFiniteLoss, Trainer

ALONE = Ranks(0, 1, torch.device("cpu"))
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


def digests(folder: Path) -> dict[str, str]:
    """Content of every file directly in `folder`, as a hash."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def losses(folder: Path) -> list[tuple[str, str]]:
    with open(folder / "loss.csv") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_training_learns_and_leaves_a_whole_run(tmp_path, data):
    result = Trainer(small_preset(max_steps=60), data, tmp_path, ALONE).run()
    first, last = float(losses(tmp_path)[0][1]), float(losses(tmp_path)[-1][1])
    assert last < 0.6 * first
    assert result.status == "finished" and result.step == 60 and result.tokens == 60 * 256
    assert {"last", "ema", "swa"} == result.validation_bpb.keys()
    assert result.validation_bpb[result.kept] == min(result.validation_bpb.values())
    assert (tmp_path / "loss.png").is_file()
    assert not list(tmp_path.glob(".*partial"))
    model = model_from_run(tmp_path, torch.device("cpu"))
    again = validation_bpb(model, TokenStream(data.validation), data.tokenizer, 512, 128, ALONE)
    assert again == pytest.approx(result.validation_bpb[result.kept], rel=1e-6)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["model"] == SMALL_MODEL.to_dict()


@pytest.mark.slow
def test_the_clock_stops_a_run_and_stands_still_during_validation(tmp_path, data):
    trainer = Trainer(small_preset(max_steps=0, seconds=0.5, validate_seconds=0.05), data, tmp_path, ALONE)
    slow = trainer._validate
    trainer._validate = lambda *stop: (time.sleep(0.2), slow(*stop))[1]
    started = time.perf_counter()
    result = trainer.run()
    assert time.perf_counter() - started > result.seconds + 0.4
    with open(tmp_path / "loss.csv") as file:
        rows = list(csv.DictReader(file))
    # The step that the cap cuts between micro-batches is left out: the last row may lie before it.
    assert all(float(row["seconds"]) < 0.5 for row in rows[:-1]) and result.seconds >= 0.5
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


def one_step(trainer, scale=1.0):
    """(loss, gradient norm) of the trainer's next step."""
    rows = trainer.sampler.take_rows(trainer.rows_per_rank, 0, 1)
    trainer.stepper.run(rows.split(trainer.config.micro_batch_tokens // (rows.size(1) - 1)), 0, scale)
    return trainer.stepper.flush()[0]


def test_every_gradient_is_zeroed_before_each_step(tmp_path, data):
    trainer = Trainer(small_preset(), data, tmp_path, ALONE)
    trainer.stepper.gradients.buffer.fill_(1e6)
    assert one_step(trainer, 0.0)[1] < 1e3


def test_gradient_accumulation_equals_one_big_batch(tmp_path, data):
    big = Trainer(small_preset(micro_batch_tokens=256), data, tmp_path / "a", ALONE)
    small = Trainer(small_preset(micro_batch_tokens=64), data, tmp_path / "b", ALONE)
    assert one_step(big) == pytest.approx(one_step(small), rel=1e-5)
    gradients = (trainer.stepper.gradients.buffer for trainer in (big, small))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


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


def test_the_steps_with_int6_matrices_are_the_last_share_of_the_run():
    steps = TrainConfig(max_steps=10, qat_share=0.3)
    assert [is_quantized(steps, step, 1e9) for step in range(10)] == [False] * 7 + [True] * 3
    clock = TrainConfig(seconds=100.0, qat_share=0.1)
    assert [is_quantized(clock, 5, elapsed) for elapsed in (0.0, 89.0, 91.0)] == [False, False, True]
    assert not is_quantized(TrainConfig(max_steps=10), 10, 1e9)


@pytest.mark.slow
def test_validation_keeps_documents_apart_where_training_does(tmp_path, data):
    model, stream = randomized(SMALL_MODEL), TokenStream(data.validation)
    apart, together = (
        validation_bpb(model, stream, data.tokenizer, 0, 128, ALONE, document_mask=mask) for mask in (True, False)
    )
    assert apart != pytest.approx(together, rel=1e-5)
    trainer = Trainer(small_preset(document_mask=True, validate_tokens=0), data, tmp_path, ALONE)
    trainer.model.load_state_dict(model.state_dict())
    assert trainer._validate() == pytest.approx(apart, rel=1e-6)


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


def test_validation_refuses_text_that_nobody_knows(data, tmp_path):
    """The unknown token counted 0 bytes, and the BPB was too high without a word."""
    with ShardWriter(tmp_path, "val") as writer:
        writer.add(np.array([1, *[50] * 100, data.tokenizer.encode("a")[1], 0, *[50] * 100], np.uint16))
    with pytest.raises(TokenizerError, match="the validation text has the unknown token 0, whose bytes of text nobod"):
        validation_bpb(GPT(SMALL_MODEL), TokenStream(writer.paths), data.tokenizer, 0, 128, ALONE)


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
HOLD = """cd "$0"; env -0 > env$RANK; mv env$RANK environment$RANK; while [ ! -e done ]; do sleep 0.1; done"""
"""What torchrun starts for each rank: it gives the environment to forks, which need no seconds of imports."""


@pytest.mark.slow
def test_two_ranks_train_the_same_weights_as_one(tmp_path, data):
    preset = small_preset(max_steps=6)
    Trainer(preset, data, tmp_path / "alone", ALONE).run()
    together = tmp_path / "together"
    together.mkdir()
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = json.dumps([preset.model.to_dict(), preset.train.to_dict(), str(data.folder), str(together)])
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    launcher = Forked([*command, "sh", "-c", HOLD, together])
    paths = [together / f"environment{rank}" for rank in range(2)]
    wait_for(lambda: all(path.exists() for path in paths), launcher)
    environments = [dict(entry.split("=", 1) for entry in path.read_text().split("\0")[:-1]) for path in paths]
    for process in [Forked([tmp_path / "worker.py", arguments], environment=given) for given in environments]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
    (together / "done").touch()
    assert launcher.wait() == 0
    first, second = (torch.load(together / f"rank{rank}.pt") for rank in (0, 1))
    expected, _ = load_run(tmp_path / "alone")
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
    got, _ = load_run(together)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4)
    assert [s for s, _ in losses(together)] == [str(i) for i in range(1, 7)]


@pytest.mark.parametrize("best", ["last", "ema", "swa"])
def test_the_best_weights_on_validation_are_kept(tmp_path, data, best):
    trainer = Trainer(small_preset(), data, tmp_path, ALONE)
    seen = {}

    def validate(*stop) -> float:
        name = ("last", "ema", "swa")[len(seen)]
        seen[name] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        return 1.0 if name == best else 2.0

    trainer._validate = validate
    assert trainer.run().kept == best
    weights, meta = load_run(tmp_path)
    assert meta["provenance"]["result"]["kept"] == best
    assert all(torch.equal(weights[name], tensor) for name, tensor in seen[best].items())


def test_an_average_that_is_no_number_does_not_lose_the_run(tmp_path, data):
    trainer = Trainer(small_preset(), data, tmp_path, ALONE)
    scores = iter([2.0, float("nan"), float("inf")])
    trainer._validate = lambda *stop: next(scores)
    result = trainer.run()
    assert (result.kept, result.validation_bpb) == ("last", {"last": 2.0})


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_costs_one_line(tmp_path, data, monkeypatch):

    def fail(figure, dpi):
        raise RuntimeError("no fonts here")

    monkeypatch.setattr("klora.model.curve.figure_png", fail)
    said = []
    trainer = Trainer(small_preset(checkpoint_seconds=1e-6), data, tmp_path, ALONE, say=said.append)
    assert trainer.run().status == "finished" and load_run(tmp_path)
    assert len(said) == 1 and "loss.png" in said[0] and "RuntimeError: no fonts here" in said[0]


def test_the_estimate_counts_the_state_and_what_autograd_keeps(tmp_path, data):
    trainer = Trainer(small_preset(micro_batch_tokens=256), data, tmp_path, ALONE)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    nll = trainer.model.nll

    def watched(*given, **options):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return nll(*given, **options)

    trainer.model.nll = watched
    one_step(trainer, 0.0)
    del trainer.model.nll
    parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    activations = sum(size for storage, size in kept.items() if storage not in parameters)
    assert state_bytes(SMALL_MODEL) + activations == pytest.approx(trainer.estimate.memory, rel=0.02)
    trainer.run()
    held = [
        *trainer.model.parameters(),
        trainer.stepper.gradients.buffer,
        *trainer.averages.ema.values(),
        *trainer.averages.swa.values(),
        *(t for name, t in trainer.optimizers.state_tensors().items() if not name.endswith("/step")),
    ]
    assert sum(t.nbytes for t in held) == state_bytes(SMALL_MODEL)
    assert trainer.estimate.step_seconds > 0 and "of memory" in str(trainer.estimate)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_estimate_on_a_gpu_is_what_training_takes_at_least(tmp_path, data):
    preset = small_preset(
        **{"width": 256, "mlp_hidden": 768, "batch_tokens": 2**16, "micro_batch_tokens": 2**16, "max_steps": 8}
    )
    torch.cuda.reset_peak_memory_stats()  # a graph's memory counts when it is captured, not when it is replayed
    trainer = Trainer(preset, data, tmp_path, Ranks(0, 1, torch.device("cuda")))
    assert trainer.run().status == "finished"
    assert 0.4 * torch.cuda.max_memory_allocated() < trainer.estimate.memory <= torch.cuda.max_memory_allocated()
    assert trainer.estimate.step_seconds is None and trainer.estimate.memory < trainer.estimate.available


def test_what_does_not_fit_in_memory_is_refused_with_what_does(tmp_path, data, monkeypatch):
    from klora.model import train as module

    batch = {"batch_tokens": 65536, "micro_batch_tokens": 65536}
    needed = Trainer(small_preset(**batch), data, tmp_path / "free", ALONE).estimate.memory
    available = needed // 2
    monkeypatch.setattr(module, "available_memory", lambda device, processes: available)
    before = digests(tmp_path / "free")
    with pytest.raises(ConfigError, match="micro_batch_tokens=65536 needs at least .* are available; give") as why:
        Trainer(small_preset(**batch), data, tmp_path / "free", ALONE)
    assert digests(tmp_path / "free") == before
    advised = int(str(why.value).split("--set micro_batch_tokens=")[1].split(",")[0])
    fits = Trainer(small_preset(**batch | {"micro_batch_tokens": advised}), data, tmp_path / "fits", ALONE)
    assert fits.estimate.memory <= available < 2 * fits.estimate.memory
    available = 1000
    with pytest.raises(ConfigError, match="needs at least .* give a smaller width"):
        Trainer(small_preset(width=2**14, mlp_hidden=2**16), data, tmp_path / "wide", ALONE)
    assert not (tmp_path / "wide").exists()


def test_the_cap_ends_a_step_that_is_longer_and_says_so_before(tmp_path, data):
    said = []
    preset = small_preset(batch_tokens=2**15, micro_batch_tokens=64, seconds=0.05, max_steps=0)
    result = Trainer(preset, data, tmp_path, ALONE, say=said.append).run()
    assert "and the cap is 0.05 s: it ends the run within its first step" in said[0]
    assert result.status == "finished" and result.step == 1
    assert 64 <= result.tokens < 2**15 and result.tokens % 64 == 0 and result.seconds < 5
    expected = np.log(320)  # the first loss is that of a model that knows nothing: the mean over the tokens read
    assert result.loss == pytest.approx(expected, rel=0.1)


def test_the_cap_leaves_out_a_later_step_that_it_cuts(tmp_path, data):
    trainer = Trainer(small_preset(max_steps=0, micro_batch_tokens=64), data, tmp_path, ALONE)

    def spend(row):
        if row["step"] == 2:
            trainer.clock.started -= trainer.config.seconds - trainer.clock.seconds() - 0.002
            trainer.model.nll, nll = (lambda x, y, **more: (time.sleep(0.01), nll(x, y, **more))[1]), trainer.model.nll

    state = {}
    finish = trainer._finish
    trainer._finish = lambda: (state.update(trainer.sampler.state()), finish())[1]
    result = trainer.run(spend)
    assert (result.status, result.step, result.tokens) == ("finished", 2, 512)
    assert state["position"] == 8  # two steps of four rows


class TestFused:
    """The fused step in the trainer, on the reference ops of a CPU."""

    @pytest.mark.slow
    def test_it_trains_as_the_eager_one_does(self, tmp_path, data):
        settings = {"max_steps": 6, "micro_batch_tokens": 64}
        for name, fused in (("eager", "false"), ("fused", "true")):
            result = Trainer(small_preset(fused=fused, **settings), data, tmp_path / name, ALONE).run()
            assert result.status == "finished" and result.step == 6
        plain, fused = (losses(tmp_path / name) for name in ("eager", "fused"))
        assert [step for step, _ in fused] == [step for step, _ in plain]
        assert [float(loss) for _, loss in fused] == pytest.approx([float(loss) for _, loss in plain], rel=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, {"document_mask": True, "qat_share": 0.75}])
    def test_it_resumes_bit_for_bit(self, tmp_path, data, options):
        preset = small_preset(fused="true", max_steps=6, **options)
        whole = Trainer(preset, data, tmp_path / "whole", ALONE)
        whole.run()

        def interrupt(row):
            if row["step"] == 2:
                signal.raise_signal(signal.SIGTERM)

        assert Trainer(preset, data, tmp_path / "parts", ALONE).run(interrupt).status == "interrupted"
        parts = Trainer(preset, data, tmp_path / "parts", ALONE, resume=True)
        assert 2 <= parts.step < 6
        parts.run()
        for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            assert torch.equal(a, b)
        for name, tensors in whole.averages.candidates().items():
            assert all(torch.equal(t, parts.averages.candidates()[name][key]) for key, t in tensors.items()), name

    def test_a_loss_that_is_no_number_harms_no_weight(self, tmp_path, data):
        trainer = Trainer(small_preset(fused="true", max_steps=9), data, tmp_path, ALONE)
        before = {}

        def poison(row):
            if row["step"] == 2:
                with torch.no_grad():
                    trainer.stepper.stored.weights.blocks[0].gain[0] = float("nan")
                before.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

        with pytest.raises(NonFiniteLoss, match="gave loss nan"):
            trainer.run(poison)
        changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
        assert changed == [] or changed == ["blocks.0.gain"]
        kept = {**trainer.optimizers.state_tensors(), **trainer.averages.ema, **trainer.averages.swa}
        torn = [name for name, tensor in kept.items() if not torch.isfinite(tensor).all()]
        assert torn == [] or torn == ["blocks.0.gain"]
