"""The fused training step against the eager one, on the reference ops: same losses, gradients and weights."""

import dataclasses
import math
import signal
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, randomized
from klora.bench.tolerance import assert_as_exact
from klora.kernels import BOS_ID, dequantize_int6_ref, quantize_int6_ref
from klora.kernels.attention import document_starts
from klora.kernels.average import update_averages_
from klora.kernels.fold import Int6Grid, fold_rows_, unfold_rows_
from klora.model import fused
from klora.model.average import WeightAverages
from klora.model.config import ModelConfig, Preset, TrainConfig
from klora.model.fused import FusedStep
from klora.model.gpt import GPT, is_block_matrix
from klora.model.loading import load_run
from klora.model.optimizers import FlatGradients, Optimizers
from klora.model.parallel import Ranks
from klora.model.schedule import is_quantized
from klora.model.train import Trainer
from test_train import CONFIG, losses

CPU = torch.device("cpu")
DEVICES = (
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
)
"""Where kernels are compared with the reference: in the interpreter, and on a GPU where there is one."""


def eager_steps(model, config, steps):
    gradients, optimizers, reports = FlatGradients(model), Optimizers(model, config), []
    averages = WeightAverages(model, config)
    for index, batches in enumerate(steps):
        gradients.buffer.zero_()
        total = 0.0
        given = {"int6_clip": config.qat_clip if is_quantized(config, index, 0.0) else 0.0}
        for rows in batches:
            if config.document_mask:
                given["start"] = document_starts(rows[:, :-1], BOS_ID)
            loss = model.nll(rows[:, :-1], rows[:, 1:], **given).sum() / config.batch_tokens
            loss.backward()
            total += loss.item()
        reports.append((total, gradients.clip_(config.grad_clip).item()))
        optimizers.step(index, 0.5)
        averages.update(index + 1, 0.5)
    return reports, averages


def drawn(steps: int, micro_batches: int, rows: int = 2, length: int = 64) -> list[list[torch.Tensor]]:
    """Token rows of each micro-batch of each step, in documents of some ten tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (steps, micro_batches, rows, length + 1), generator=generator)
    return [list(step) for step in tokens.masked_fill(tokens < 30, BOS_ID)]


OPTIONS = ({}, {"document_mask": True}, {"qat_share": 0.5}, {"document_mask": True, "qat_share": 1.0})
"""Of the config, for runs of `max_steps`."""


@pytest.mark.parametrize(
    ("blocks", "micro_batches", "options"),
    [(1, 1, {}), (2, 2, {}), (5, 1, {}), *((5, 2, options) for options in OPTIONS)],
)
def test_it_takes_the_eager_step(blocks, micro_batches, options):
    model = dataclasses.replace(SMALL, blocks=blocks)
    averaging = {"ema_every": 2, "ema_decay": 0.9, "swa_every": 3, "swa_below": 0.6}
    tokens = {"batch_tokens": micro_batches * 128, "micro_batch_tokens": 128}
    config = TrainConfig(max_steps=4, **tokens, **averaging, **options)
    steps = drawn(4, micro_batches)
    plain, ours = randomized(model), randomized(model)
    expected, averages = eager_steps(plain, config, steps)
    step = FusedStep(ours, config, 2, micro_batches, Ranks(0, 1, CPU))
    found = []
    for index, batches in enumerate(steps):
        late = step.run(batches, index, 0.5, is_quantized(config, index, 0.0))
        found += [late] if late else []
    found += step.flush()
    assert found == [pytest.approx(report, rel=1e-5) for report in expected]
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    wanted, got = averages.candidates(), step.averages.candidates()
    assert wanted.keys() == got.keys() == {"ema", "swa"}
    for kind, tensors in wanted.items():
        for name, a in tensors.items():
            torch.testing.assert_close(
                got[kind][name], a, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_step_that_is_left_out_counts_in_no_average():
    config = TrainConfig(batch_tokens=256, micro_batch_tokens=128, ema_every=1, swa_every=1, swa_below=1.0)
    step = FusedStep(randomized(dataclasses.replace(SMALL, blocks=1)), config, 2, 2, Ranks(0, 1, CPU))

    def cut():
        yield torch.ones(2, 65, dtype=torch.int32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step.run(cut(), 0, 0.5)
    assert step.averages.candidates() == {} and step.flush() == []


def test_a_loss_that_is_no_number_is_known_late_and_leaves_its_step_out(monkeypatch):
    """Steps go on before the host knows: they are those of a run that never had the bad one, bit for bit."""
    config = TrainConfig(batch_tokens=128, micro_batch_tokens=128)
    generator, real = torch.Generator().manual_seed(0), fused.softcap_nll
    batches = [torch.randint(3, 300, (2, 65), generator=generator) for _ in range(5)]
    results = []
    for bad in (2, None):
        step, reports = FusedStep(randomized(), config, 2, 1, Ranks(0, 1, CPU)), []
        for index, rows in enumerate(batches):
            if index == 2 and bad is None:
                continue
            factor = math.nan if index == bad else 1.0
            monkeypatch.setattr(fused, "softcap_nll", lambda *a, factor=factor, **k: real(*a, **k) * factor)
            late = step.run([rows], index, 0.5)
            reports += [late] if late else []
        reports += step.flush()
        results.append((step, reports))
    (torn, seen), (healthy, expected) = results
    assert math.isnan(seen[2][0]) and seen[:2] + seen[3:] == expected
    assert torch.equal(torn.stored.values, healthy.stored.values)


def test_the_matrices_of_a_quantised_step_are_those_that_export_would_store():
    config = TrainConfig(batch_tokens=128, micro_batch_tokens=128, qat_share=0.5)
    step = FusedStep(randomized(), config, 2, 1, Ranks(0, 1, CPU))
    copies = dict(step.stored._copied)
    for is_on in (True, False):
        step.run(drawn(1, 1)[0], 0, 0.5, is_on)
        model = step.model
        for index, block in enumerate(model.blocks):
            rows = {"qkv": torch.cat([block.q, block.k, block.v]), "up": block.up}
            for name, scale in (("o", block.attn_scale), ("down", block.mlp_scale)):
                rows[name] = getattr(block, name)
                copies[name] = step.stored._copied[name] / (block.depth_scale * scale)[:, None]
            for name, matrix in rows.items():
                stored = dequantize_int6_ref(*quantize_int6_ref(matrix, config.qat_clip)) if is_on else matrix.detach()
                torch.testing.assert_close(copies[name][index].detach(), stored, rtol=1e-5, atol=1e-7)


def test_gradients_pass_straight_through_int6_values():
    """They are those of a model whose matrices are the values, also of what is multiplied with them."""
    model, rounded = randomized(), randomized()
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if is_block_matrix(name):
                parameter.copy_(dequantize_int6_ref(*quantize_int6_ref(parameter, 0.11)))
    (rows,) = drawn(1, 1)[0]
    losses = [m.nll(rows[:, :-1], rows[:, 1:], **g).sum() for m, g in ((model, {"int6_clip": 0.11}), (rounded, {}))]
    assert torch.equal(*losses) and not torch.equal(losses[0], model.nll(rows[:, :-1], rows[:, 1:]).sum())
    gradients = (
        torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (model, rounded), strict=True)
    )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def folded(backend, is_on, weight, scale, depth, grad):
    grid = Int6Grid(torch.full_like(depth[0], is_on, dtype=torch.int32), torch.full_like(scale, -1.0), 0.11)
    copy, plain, grad, dscale = (
        torch.empty_like(weight),
        torch.empty_like(weight),
        grad.clone(),
        torch.empty_like(scale),
    )
    fold_rows_(copy, weight, scale, depth, backend, grid)
    fold_rows_(plain, weight, None, None, backend, grid)
    unfold_rows_(grad, dscale, weight, scale, depth, backend, grid)
    return copy, plain, grad, dscale, grid.scales


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_on", [0, 1])
def test_the_kernels_fold_int6_values_as_the_reference_does(is_on, device):
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(2, 3, 700, generator=generator) for _ in range(2))
    weight[0, 1] = 0.0
    weight.clamp_(-3.0, 3.0)[1, 2, 600] = -14.0
    given = (t.to(device) for t in (weight, torch.rand(2, 3, generator=generator), torch.tensor([1.0, 0.5]), grad))
    weight, scale, depth, grad = given
    ours, plain = (folded(backend, is_on, weight, scale, depth, grad) for backend in ("triton", "reference"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    codes, scale = quantize_int6_ref(weight.view(6, 700), 0.11)
    is_whole = weight.abs().amax(-1) <= 31.5 * scale.view(2, 3)
    values = dequantize_int6_ref(codes, scale).view_as(weight)
    wanted = values if is_on else weight
    torch.testing.assert_close(ours[1][is_whole], wanted[is_whole], rtol=1e-6, atol=0.0)
    assert is_whole.sum() == 5
    assert float(ours[1][1, 2, 600]) == pytest.approx(-14.0, rel=0.12)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_nothing_of_one_document_reaches_the_next(backend):
    model = randomized(dataclasses.replace(SMALL, blocks=2, heads=2, kv_heads=1))
    model.backend = backend
    (rows,) = drawn(1, 1)[0]
    rows = rows[:1]
    rows[0, :40] = rows[0, :40].masked_fill(rows[0, :40] == BOS_ID, 5)
    rows[0, 21] = BOS_ID
    other = rows.clone()
    other[0, 3:21] = 7
    with torch.no_grad():
        for mask, is_same in ((True, True), (False, False)):
            starts = (document_starts(t, BOS_ID) if mask else None for t in (rows, other))
            one, two = (model.hidden(t, start=start) for t, start in zip((rows, other), starts, strict=True))
            assert torch.equal(one[:, 21:], two[:, 21:]) == is_same
            assert not torch.equal(one[:, :21], two[:, :21])


def test_adapters_and_caches_take_no_document_mask():
    model, tokens = randomized(), torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="start was given with adapters or a context"):
        model.hidden(tokens, cache=model.cache(1, 8), start=torch.zeros(1, 4, dtype=torch.int32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.25, 0.0), (0.0, 1.0), (0.75, 1.0)])
def test_the_averages_kernel_updates_what_its_weights_say(weights, device):
    generator = torch.Generator().manual_seed(0)
    ema, total, values = (torch.randn(5001, generator=generator).to(device) for _ in range(3))
    ours, plain = [ema.clone(), total.clone()], [ema.clone(), total.clone()]
    update_averages_(*ours, values, torch.tensor(weights, device=device), "triton")
    update_averages_(*plain, values, torch.tensor(weights, device=device), "reference")
    for a, b, before, weight in zip(ours, plain, (ema, total), weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert torch.equal(a, before) == (weight == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestOnTheGPU:
    MODEL = ModelConfig(vocab_size=300, width=256, blocks=5, heads=4, kv_heads=2, mlp_hidden=512, bigram_width=16)
    CONFIG = TrainConfig(
        batch_tokens=4 * 256, micro_batch_tokens=4 * 256, max_steps=4, ema_every=2, swa_every=3, swa_below=1.0
    )

    def stepped(self, steps=4, micro_batches=1, capture=True, poison=None, options=None):
        """A fused step and its model after some steps, with what they reported."""
        config = self.CONFIG.override(options or {})
        device = torch.device("cuda")
        model = GPT(self.MODEL)
        model.load_state_dict(randomized(self.MODEL).state_dict())
        model.configure(device, torch.bfloat16)
        rows = 4 // micro_batches
        step = FusedStep(model, config, rows, micro_batches, Ranks(0, 1, device), 256, capture)
        reports = []
        for index, batches in enumerate(drawn(steps, micro_batches, rows, 256)):
            if index == poison:
                with torch.no_grad():
                    step.stored.weights.blocks[0].gain[0] = float("nan")
            late = step.run(batches, index, 0.5, is_quantized(config, index, 0.0))
            reports += [late] if late else []
        return step, model, reports + step.flush()

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("micro_batches", [1, 2])
    def test_a_graph_computes_what_the_calls_do_and_twice_the_same(self, micro_batches, options):
        (one, _, seen), (other, _, again), (plain, _, without) = (
            self.stepped(4, micro_batches, capture, options=options) for capture in (True, True, False)
        )
        assert seen == again == without and all(math.isfinite(loss) for loss, _ in seen)
        assert torch.equal(one.stored.values, other.stored.values)
        assert torch.equal(one.stored.values, plain.stored.values)
        for each in (other, plain):
            for kind, tensors in one.averages.candidates().items():
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, each.averages.candidates()[kind][name]), (kind, name)

    def test_a_step_waits_for_nothing_on_the_device(self):
        """Whatever would make the host wait raises; the loss of a step is read when two further ones have begun."""
        model = GPT(self.MODEL)
        model.configure(torch.device("cuda"), torch.bfloat16)
        config = self.CONFIG.override({"qat_share": 0.5, "document_mask": True})
        step = FusedStep(model, config, 4, 1, Ranks(0, 1, torch.device("cuda")), 256)
        torch.cuda.set_sync_debug_mode("error")
        try:
            late = [step.run(batches, i, 0.5, i > 1) for i, batches in enumerate(drawn(4, 1, 4, 256))]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert late[:2] == [None, None] and None not in late[2:] and len(step.flush()) == 2

    def test_tokens_arrive_in_order_however_busy_the_device_is(self):
        torch.cuda._sleep(50_000_000)  # the memory that the feed gets may still be written to
        feed = fused.TokenFeed(torch.zeros(4, 257, dtype=torch.int32, device="cuda"))
        rows, seen = [step[0] for step in drawn(20, 1, 4, 256)], []
        for batch in rows:
            feed.send(batch)
            torch.cuda._sleep(1_000_000)
            seen.append(feed.tokens.clone())
        assert all(torch.equal(found.cpu(), batch.int()) for found, batch in zip(seen, rows, strict=True))

    @pytest.mark.parametrize("options", OPTIONS[1:])
    def test_an_option_of_the_step_takes_the_eager_one_s_losses(self, options):
        """In bf16 they agree to its rounding; without the option they do not."""
        config = self.CONFIG.override(options)
        model = GPT(self.MODEL)
        model.load_state_dict(randomized(self.MODEL).state_dict())
        model.configure(torch.device("cuda"), torch.bfloat16)
        steps = [[rows.cuda() for rows in batches] for batches in drawn(4, 1, 4, 256)]
        eager, _ = eager_steps(model, config, steps)
        *_, fused_ones = self.stepped(options=options)
        assert [loss for loss, _ in fused_ones] == pytest.approx([loss for loss, _ in eager], rel=2e-3)

    def test_micro_batches_add_up_to_a_batch(self):
        *_, whole = self.stepped()
        *_, parts = self.stepped(micro_batches=2)
        assert [loss for loss, _ in parts] == pytest.approx([loss for loss, _ in whole], rel=1e-3)

    def test_its_gradients_are_as_near_to_float64_as_eager_bf16_s(self):
        device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
        rows = torch.randint(3, 300, (4, 257), generator=generator).to(device)
        exact, plain, fused = (GPT(self.MODEL) for _ in range(3))
        for model in (exact, plain, fused):
            model.load_state_dict(randomized(self.MODEL).state_dict())
        exact.double().to(device)
        plain.configure(device, torch.bfloat16)
        plain.backend = "reference"
        fused.configure(device, torch.bfloat16)
        step = FusedStep(fused, self.CONFIG, 4, 1, Ranks(0, 1, device), 256, capture=False)
        step.tokens.copy_(rows)
        step._gradients(first=True)
        step.stored.finish()
        results = [[p.grad for p in fused.parameters()]]
        for model in (exact, plain):
            loss = model.nll(rows[:, :-1], rows[:, 1:]).sum() / self.CONFIG.batch_tokens
            results.append(torch.autograd.grad(loss, list(model.parameters())))
        assert_as_exact(results[0], results[1], results[2])

    def test_a_step_that_is_no_number_changes_no_weight(self):
        _, healthy, _ = self.stepped(steps=2)
        step, torn, reports = self.stepped(steps=3, poison=2)
        assert not math.isfinite(reports[2][0])
        for (name, a), b in zip(torn.named_parameters(), healthy.parameters(), strict=True):
            assert name == "blocks.0.gain" or torch.equal(a, b), name
        kept = step.optimizers.state_tensors()
        assert all(torch.isfinite(tensor).all() for name, tensor in kept.items())

    def trainer(self, folder, prepared, resume=False, **options) -> Trainer:
        settings = {"fused": "true", "attention": "klora", "max_steps": 6, "batch_tokens": 512, "train_length": 128}
        model = dataclasses.replace(self.MODEL, vocab_size=320)
        preset = Preset("small", model, CONFIG, "for tests").override(settings | {"micro_batch_tokens": 512} | options)
        return Trainer(preset, prepared, folder, Ranks(0, 1, torch.device("cuda")), resume)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_it_resumes_with_the_same_bits(self, tmp_path, data, options):
        whole = self.trainer(tmp_path / "whole", data, **options)
        whole.run()

        def interrupt(row):
            if row["step"] == 2:
                signal.raise_signal(signal.SIGTERM)

        assert self.trainer(tmp_path / "parts", data, **options).run(interrupt).status == "interrupted"
        parts = self.trainer(tmp_path / "parts", data, resume=True, **options)
        assert 2 <= parts.step < 6
        parts.run()
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
        assert torch.equal(whole.stepper.stored.values, parts.stepper.stored.values)

    def test_torchrun_with_one_process_trains_the_same_weights(self, tmp_path, data):
        sets = {"width": 256, "blocks": 2, "heads": 4, "kv_heads": 2, "mlp_hidden": 512, "bigram_width": 16}
        sets |= {"vocab_size": 320, "train_length": 128, "max_steps": 4, "batch_tokens": 512, "micro_batch_tokens": 512}
        sets |= {"attention": "klora", "document_mask": "true", "qat_share": 0.5}
        command = ["-m", "klora.cli", "train", "--shards", str(data.folder)]
        command += [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
        alone, launched = tmp_path / "alone", tmp_path / "launched"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        commands = [
            [sys.executable, *first, *command, "--out", str(out)] for first, out in (([], alone), (torchrun, launched))
        ]
        # Side by side: most of their time goes into starting.
        started = [
            subprocess.Popen(one, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for one in commands
        ]
        try:
            for process in started:
                _, errors = process.communicate(timeout=300)
                assert process.returncode == 0, errors
        finally:
            for process in started:
                process.kill()
        weights = [load_run(out)[0] for out in (alone, launched)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
