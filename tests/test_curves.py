"""Curves of runs: smoothed, inside the seeds' spread or not, and by how much they leave it."""

import json

import numpy as np
import pytest
from klora.bench.curves import CurveError, curves, main, smoothed
from klora.model.curve import COLUMNS
from PIL import Image

STEPS = 200


def save(folder, losses, fused="auto", scales=None):
    """A run with these losses from step 1 on."""
    folder.mkdir(parents=True)
    values = dict.fromkeys(COLUMNS, "")
    lines = [",".join(COLUMNS)]
    for step, loss in enumerate(losses, 1):
        scale = 1.0 if scales is None else scales[step - 1]
        row = values | {"step": step, "loss": loss, "lr_scale": scale, "tokens": 1, "seconds": 1, "grad_norm": 1}
        lines.append(",".join(str(row[name]) for name in COLUMNS))
    (folder / "loss.csv").write_text("\n".join(lines) + "\n")
    (folder / "run.json").write_text(json.dumps({"train": {"fused": fused}}))
    return folder


def decay(shift=0.0, steps=STEPS):
    return 3 + 4 * np.exp(-np.arange(steps) / 50) + shift


@pytest.fixture
def seeds(tmp_path):
    return [save(tmp_path / f"eager-{n}", decay(shift), fused="false") for n, shift in enumerate((-0.1, 0.0, 0.1))]


def test_a_loss_is_smoothed_over_fifty_steps():
    assert smoothed(np.arange(52.0)).tolist() == [24.5, 25.5, 26.5]


def test_a_run_between_the_seeds_is_inside(tmp_path, seeds, capsys):
    flat = save(tmp_path / "flat", decay(0.02))
    assert main(["--runs", str(flat), *map(str, seeds), "--out", str(tmp_path / "curves")]) == 0
    assert "inside the seeds' spread at all of steps 50 to 200" in capsys.readouterr().out
    found = json.loads((tmp_path / "curves.json").read_text())
    assert found["inside"] and found["share_of_steps_inside"] == 1.0 and found["fast_run"] == "flat"
    assert found["seed_runs"] == ["eager-0", "eager-1", "eager-2"] and found["above"]["nats"] == 0.0
    assert found["widest_spread"] == pytest.approx(0.2) and found["learning_rates_part_at"] is None
    alone = found["each_seed_among_the_others"]
    assert [seed["inside"] for seed in alone] == [False, True, False]
    assert [alone[0]["below"]["nats"], alone[2]["above"]["nats"]] == pytest.approx([0.1, 0.1])
    with Image.open(tmp_path / "curves.png") as image:
        image.verify()
        assert image.size == (1800, 1200)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "side", "other"), [(0.13, "above", "below"), (-0.15, "below", "above")])
def test_how_far_a_run_leaves_the_spread_is_said(tmp_path, seeds, capsys, shift, side, other):
    losses = decay()
    losses[150:] += shift
    found = curves([save(tmp_path / "fast", losses), *seeds], tmp_path / "curves")
    assert not found["inside"]
    assert found[side] == {"nats": pytest.approx(abs(shift) - 0.1), "step": 200} and found[other]["nats"] == 0.0
    # 0.1 is passed once more than 50 * 0.1 / |shift| of the 50 losses are moved
    outside = 50 - int(50 * 0.1 / abs(shift))
    assert found["share_of_steps_inside"] == pytest.approx(1 - outside / 151)
    assert f"{abs(shift) - 0.1:.4f} nats {side} it at step 200" in found["verdict"]
    assert other not in found["verdict"]
    assert main(["--runs", str(tmp_path / "fast"), *map(str, seeds), "--out", str(tmp_path / "again")]) == 1


def test_a_loss_that_is_no_number_is_outside(tmp_path, seeds):
    losses = decay()
    losses[-1] = np.nan
    found = curves([save(tmp_path / "fast", losses), *seeds], tmp_path / "curves")
    assert not found["inside"] and found["last"]["fast"] is None and found["share_of_steps_inside"] == 150 / 151
    assert found["above"] == {"nats": None, "step": 200} and "no number nats above it at step 200" in found["verdict"]
    assert "NaN" not in (tmp_path / "curves.json").read_text()


def test_runs_are_compared_until_their_learning_rates_part(tmp_path, seeds):
    scales = np.ones(STEPS)
    scales[120:] = np.linspace(0.99, 0.0, 80)
    losses = decay()
    losses[120:] -= 1.0
    found = curves([save(tmp_path / "fast", losses, scales=scales), *seeds], tmp_path / "curves")
    assert found["inside"] and found["last_step"] == 120 and found["learning_rates_part_at"] == 121
    assert "From step 121 on the learning rates part: it is not compared" in found["verdict"]
    scales[10:] = 0.5
    with pytest.raises(CurveError, match="the same learning rates in the first 10; at least 50"):
        curves([save(tmp_path / "soon", losses, scales=scales), *seeds], tmp_path / "none")
    assert not (tmp_path / "none.json").exists()


def test_what_cannot_be_compared_is_refused(tmp_path, seeds, capsys):
    fast = save(tmp_path / "fast", decay(steps=60))
    with pytest.raises(CurveError, match="0 of 3 runs are not said to be eager.*name the fast one with --fast"):
        curves(seeds, tmp_path / "curves")
    assert curves(seeds, tmp_path / "curves", fast=seeds[1])["fast_run"] == "eager-1"
    with pytest.raises(CurveError, match="--fast is .*allowed: one of --runs"):
        curves(seeds, tmp_path / "curves", fast=fast)
    with pytest.raises(CurveError, match="1 eager runs were given"):
        curves([fast, seeds[0]], tmp_path / "curves")
    with pytest.raises(CurveError, match="have 49 steps in common"):
        curves([save(tmp_path / "short", decay(steps=49)), *seeds], tmp_path / "curves")
    assert main(["--runs", str(tmp_path / "nowhere"), *map(str, seeds)]) == 2
    assert "is no loss.csv of a run (FileNotFoundError" in capsys.readouterr().err
    (fast / "loss.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(CurveError, match="KeyError"):
        curves([fast, *seeds], tmp_path / "curves")


def test_a_picture_that_fails_leaves_the_result(tmp_path, seeds, monkeypatch, capsys):
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda *arguments, **options: 1 / 0)
    assert curves([save(tmp_path / "fast", decay()), *seeds], tmp_path / "curves")["inside"]
    assert (tmp_path / "curves.json").exists() and not (tmp_path / "curves.png").exists()
    assert "curves.png could not be made" in capsys.readouterr().err
