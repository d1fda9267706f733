"""The fused training step against the eager one, on the reference ops: same losses, gradients and weights."""

import dataclasses

import pytest
import torch
from conftest import SMALL, randomized
from klora.model.config import TrainConfig
from klora.model.fused import FusedStep
from klora.model.optimizers import FlatGradients, Optimizers
from klora.model.parallel import Ranks

CPU = torch.device("cpu")


def eager_steps(model, config, steps):
    gradients, optimizers, reports = FlatGradients(model), Optimizers(model, config), []
    for index, batches in enumerate(steps):
        gradients.buffer.zero_()
        total = 0.0
        for rows in batches:
            loss = model.nll(rows[:, :-1], rows[:, 1:]).sum() / config.batch_tokens
            loss.backward()
            total += loss.item()
        reports.append((total, gradients.clip_(config.grad_clip).item()))
        optimizers.step(index, 0.5)
    return reports


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_takes_the_eager_step(blocks, micro_batches):
    model = dataclasses.replace(SMALL, blocks=blocks)
    config = TrainConfig(batch_tokens=micro_batches * 128, micro_batch_tokens=128)
    generator = torch.Generator().manual_seed(0)
    steps = [[torch.randint(3, 300, (2, 65), generator=generator) for _ in range(micro_batches)] for _ in range(4)]
    plain, fused = randomized(model), randomized(model)
    expected = eager_steps(plain, config, steps)
    step = FusedStep(fused, config, 2, micro_batches, Ranks(0, 1, CPU))
    found = [late for index, batches in enumerate(steps) if (late := step.run(batches, index, 0.5))] + step.flush()
    assert found == [pytest.approx(report, rel=1e-5) for report in expected]
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
