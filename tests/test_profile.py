"""Ranges cost nothing while they are off, name every phase while they are on; profiles add up."""

import dataclasses
import json
import sys
import timeit
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from conftest import SMALL, randomized
from klora.bench.profile import Work, kernel_table, residual_tensors, step_work
from klora.bench.step import model_config, seeded_model
from klora.bench.waterfall import STEP
from klora.model import ranges
from klora.model.config import TrainConfig
from klora.model.fused import FusedStep
from klora.model.parallel import Ranks
from klora.model.ranges import COLOURS, phase, ranges_on
from test_cli import klora
from test_ttt import TTT, document, score


@pytest.fixture
def entered(monkeypatch) -> list[tuple[str, str, str]]:
    """(name, colour, domain) of every range that nvtx is given."""
    import nvtx

    seen, annotate = [], nvtx.annotate

    def noted(message=None, color=None, domain=None, **rest):
        seen.append((message, color, domain))
        return annotate(message=message, color=color, domain=domain, **rest)

    monkeypatch.setattr(nvtx, "annotate", noted)
    return seen


def test_ranges_that_are_off_enter_nothing(entered):
    with phase("block"):
        pass
    assert not entered and phase("block") is phase("forward")


def test_ranges_that_are_off_cost_no_more_than_a_few_empty_contexts():
    """A fifth of a microsecond, or what the machine needs for as much; coverage, which traces every line, rests."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        uses = ("with phase('block'): pass", "with nothing: pass")
        names = {"phase": phase, "nothing": nullcontext()}
        each, bare = (min(timeit.repeat(use, globals=names, number=2000, repeat=50)) / 2000 for use in uses)
    finally:
        sys.settrace(tracer)
    assert each < 5 * bare, f"{1e9 * each:.0f} ns, an empty context {1e9 * bare:.0f} ns"


def test_ranges_that_are_on_have_one_colour_a_phase_and_the_domain_klora(entered, tmp_path):
    model = randomized()
    tokens = torch.randint(3, SMALL.vocab_size, (1, 8))
    with ranges_on():
        model.hidden(tokens)
        score([document(64)], tmp_path, TTT.override({"steps_per_chunk": 2}), model=model)
    assert not ranges._is_on
    names = {name for name, _, _ in entered}
    assert {"block", "forward", "backward", "optimizer"} <= names  # a "replay" is of a graph
    assert {(colour, domain) for _, colour, domain in entered} <= {(c, "klora") for c in COLOURS.values()}
    assert len(set(COLOURS.values())) == len(COLOURS)
    with ranges_on(), pytest.raises(KeyError), phase("lunch"):
        pass


def test_kernel_table_adds_up():
    ceilings = {"bytes_per_second": 1e12, "flops_per_second": 1e12}
    events = [("gemm", 1, 3000.0, None), ("copy", 1, 1000.0, 500_000_000), ("copy", 1, 2000.0, 500_000_000)]
    gemm, copy = kernel_table(iter([*events, ("gemm", 3, 3000.0, None)]), calls=2, ceilings=ceilings)
    assert (gemm.name, gemm.calls, gemm.ms, gemm.bytes, gemm.percent_of_floor) == ("gemm", 2, 3.0, None, None)
    assert (copy.name, copy.calls, copy.ms, copy.bytes) == ("copy", 1, 1.5, 500_000_000)
    assert copy.percent_of_floor == pytest.approx(100 * 0.5 / 1.5)
    assert gemm.share == pytest.approx(2 / 3) and gemm.share + copy.share == pytest.approx(1.0)
    assert kernel_table(iter([]), 1, ceilings) == []


def test_a_kernel_that_is_known_is_held_to_the_larger_of_its_floors():
    ceilings = {"bytes_per_second": 1e12, "flops_per_second": 1e13}
    events = [("ours", 4, 8000.0, None), ("copies", 2, 2000.0, None), ("other", 6, 1000.0, None)]
    work = {"ours": Work(2, 10**10, 10**8), "copies": Work(1, 0, 5 * 10**8), "other": Work(2, 10**10, 10**9)}
    ours, copies, other = kernel_table(iter(events), calls=2, ceilings=ceilings, work=work)
    assert (ours.flops, ours.bytes, ours.ms) == (10**10, 10**8, 4.0)
    assert ours.percent_of_floor == pytest.approx(100 * 1.0 / 4.0)  # 10 GFLOP at 10 TFLOP/s
    assert copies.percent_of_floor == pytest.approx(100 * 0.5 / 1.0)
    assert (other.calls, other.flops, other.bytes, other.percent_of_floor) == (3, None, None, None)  # 2 were expected


SEED = {"blocks": 10, "B": 96, "S": 1024}


@pytest.mark.parametrize("blocks", [10, 11])
def test_the_work_of_the_kernels_is_that_of_the_step(blocks):
    """Of three products with each matrix cuBLAS takes one; attention computes two products more than it has to."""
    shape = SEED | {"blocks": blocks}
    work, config = step_work(shape, torch.device("cpu"), torch.bfloat16), model_config(shape)
    attention = sum(work[name].flops for name in ("_forward_kernel", "_dq_kernel", "_dkdv_kernel"))
    least = 7 * 96 * 1024**2 * config.width * blocks
    assert attention == least * 9 // 7
    products = work["_product_kernel"].flops + work["_sweep"].flops
    assert products == (STEP.flops(shape) - least) * 2 // 3
    assert work["_product_kernel"].launches == 8 * blocks + 1


def test_the_bytes_of_the_residual_stream_are_those_of_its_tensors():
    config = model_config(SEED)
    assert residual_tensors(config) == {
        "forward": 3 + 2,
        "joined": 9 * 2 + 4,
        "backward": 7 + (8 * 7 + 6) + 4 + 2 * 4 + 3,
    }
    forward = step_work(SEED, torch.device("cpu"), torch.bfloat16)["forward"]
    assert forward == Work(2, 0, 96 * 1024 * (5 * 512 * 2 + 2 * 4))


@pytest.mark.slow
def test_a_step_launches_the_kernels_as_often_as_their_work_says(monkeypatch):
    """The whole step with its kernels, in Triton's interpreter; fp32 has another head and one kernel for products."""
    from triton.runtime import interpreter

    seen, launch = Counter(), interpreter.GridExecutor.__call__

    def counted(executor, *arguments, **options):
        seen[executor.fn.__name__] += 1
        return launch(executor, *arguments, **options)

    shape, device = {"blocks": 0, "B": 1, "S": 32}, torch.device("cpu")
    model = seeded_model(shape, device, torch.float32)
    model.backend = "triton"
    config = dataclasses.replace(TrainConfig(), batch_tokens=32)
    step = FusedStep(model, config, 1, 1, Ranks(0, 1, device), 32)
    step.rates.zero_()
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    step.replay()
    work = step_work(shape, device, torch.float32)
    del work["_sweep"]
    assert {name: seen[name] for name in work} == {name: one.launches for name, one in work.items()}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["step", "ttt"])
def test_profile_names_the_kernels_with_shares_and_writes_a_trace(tmp_path, what):
    result = json.loads(klora("profile", what, "--toy", "--device", "cpu", "--out", tmp_path, "--json").stdout)
    assert len(result["kernels"]) == 10 and result["variant"] == "eager" and result["shape"]["blocks"] == 0
    assert {"gpu", "versions", "commit", "date"} <= result["environment"].keys()
    shares = [row["share"] for row in result["kernels"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    names = {event.get("name") for event in json.loads((tmp_path / f"{what}-eager.json").read_text())["traceEvents"]}
    expected = {"step": {"forward", "backward", "optimizer", "block"}, "ttt": {"scoring", "backward", "optimizer"}}
    assert {f"klora::{name}" for name in expected[what]} <= names


@pytest.mark.slow
def test_profile_of_the_fused_step_is_recorded(tmp_path):
    record = tmp_path / "profile-step-klora.json"
    asked = ("profile", "step", "--variant", "klora", "--toy", "--device", "cpu", "--out", tmp_path, "--record", record)
    shown = klora(*asked).stdout
    found = json.loads(record.read_text())
    assert len(found["kernels"]) == 10 and found["variant"] == "klora" and found["trace"] is None
    assert {"name", "share", "flops", "percent_of_floor"} <= found["kernels"][0].keys()
    assert {"bytes_per_second", "flops_per_second"} == found["ceilings"].keys()
    assert "unknown" in shown and f"record: {record}" in shown
    names = {event.get("name") for event in json.loads((tmp_path / "step-klora.json").read_text())["traceEvents"]}
    assert "Optimizer.step#Muon.step" in names
    klora(*asked)
    own = tmp_path / "own.json"
    own.write_text("[1]")
    refused = klora(*asked, "--record", own, check=2)
    assert "own.json is there and is no profile's record; move it" in refused.stderr.replace("\n", "")
    assert own.read_text() == "[1]"
    refused = klora("profile", "step", "--no-trace", "--record", record, "--device", "cpu", check=2)
    assert "--record wants the trace" in refused.stderr


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_of_the_step_are_held_to_their_floors(tmp_path):
    """The residual stream runs under every attention; products and attention as their work says where ours is taken."""
    record = tmp_path / "kernels.json"
    klora("profile", "step", "--variant", "klora", "--out", tmp_path, "--record", record, "--rows", "40")
    rows = {row["name"]: row for row in json.loads(record.read_text())["kernels"]}
    held = {name for name, row in rows.items() if row["percent_of_floor"] is not None}
    assert {"forward", "backward"} <= held, {name: row["calls"] for name, row in rows.items()}
    if "_dq_kernel" in rows:
        assert {"_product_kernel", "_forward_kernel", "_dq_kernel", "_dkdv_kernel"} <= held
        assert all(10 < rows[name]["percent_of_floor"] < 110 for name in ("_product_kernel", "_dq_kernel"))


def test_profile_prints_the_commands_that_use_its_brackets(tmp_path):
    shown = klora("profile", "step", "--toy", "--device", "cpu", "--no-trace", "--out", tmp_path).stdout
    assert "nsys profile --capture-range=cudaProfilerApi" in shown and "ncu --profile-from-start off" in shown
    assert not list(tmp_path.iterdir())
    assert "'lunch' cannot be profiled; allowed: step, ttt" in klora("profile", "lunch", check=2).stderr
    wrong = klora("profile", "ttt", "--device", "cpu", "--variant", "best", check=2)
    assert "variant='best' is not possible; allowed on this device: eager" in wrong.stderr
