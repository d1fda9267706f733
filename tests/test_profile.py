"""Ranges cost nothing while they are off, name every phase while they are on; profiles add up."""

import json
import sys
import timeit
from contextlib import nullcontext

import pytest
import torch
from conftest import SMALL, randomized
from klora.bench.profile import kernel_table
from klora.model import ranges
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
    assert {"block", "replay", "forward", "backward", "optimizer"} <= names
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


def test_profile_prints_the_commands_that_use_its_brackets(tmp_path):
    shown = klora("profile", "step", "--toy", "--device", "cpu", "--no-trace", "--out", tmp_path).stdout
    assert "nsys profile --capture-range=cudaProfilerApi" in shown and "ncu --profile-from-start off" in shown
    assert not list(tmp_path.iterdir())
    assert "'lunch' cannot be profiled; allowed: step, ttt" in klora("profile", "lunch", check=2).stderr
    wrong = klora("profile", "ttt", "--device", "cpu", "--variant", "best", check=2)
    assert "variant='best' is not possible; allowed on this device: eager" in wrong.stderr
