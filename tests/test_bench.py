"""The harness is honest: planted faults are caught, records keep to their schema, every entry runs."""

import copy
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Forked
from klora.bench import timing
from klora.bench.against import compare
from klora.bench.attention import ENTRIES as ATTENTION
from klora.bench.attention import plain_attention
from klora.bench.ceilings import ENTRIES as CEILINGS
from klora.bench.entry import Variant
from klora.bench.gate import RedGate, check
from klora.bench.groups import GROUPS, UnknownGroup, entries_of
from klora.bench.record import RecordError, measure_ceilings, run_group, slower_than, validate
from klora.bench.timing import time_interleaved
from klora.bench.tolerance import relative_error
from klora.cli.bench import bench
from test_cli import klora

CPU, FEW = torch.device("cpu"), (3, 3)
FORWARD = ATTENTION[0]


def with_variant(entry, variant: Variant):
    return dataclasses.replace(entry, variants=(*entry.variants, variant))


def forward_only(attention):
    return lambda shape, device, dtype: lambda q, k, v, dout: attention(q, k, v)


def run(entries, group="attention") -> dict:
    ceilings = measure_ceilings(CEILINGS, CPU, torch.float32, toy=True, rounds=FEW)
    return run_group(group, entries, ceilings, CPU, torch.float32, toy=True, rounds=FEW)


@pytest.fixture(scope="module")
def record() -> dict:
    return run([FORWARD])


SLOW = ("ttt", "corpus", "step")


@pytest.mark.parametrize("group", [pytest.param(g, marks=[pytest.mark.slow] * (g in SLOW)) for g in GROUPS])
def test_every_entry_runs_at_its_toy_shape_and_gives_a_valid_record(group):
    record = json.loads(json.dumps(run(GROUPS[group], group)))
    validate(record)
    measured = {(result["op"], result["variant"]) for result in record["results"]}
    missing = {(entry["op"], entry["variant"]) for entry in record["missing"]}
    declared = {(entry.op, variant.name) for entry in GROUPS[group] for variant in entry.variants}
    assert measured | missing == declared and not measured & missing
    assert not [m for m in record["missing"] if m["why"].startswith("it raises")]
    caches = {"cold"} if all(entry.once for entry in GROUPS[group]) else {"cold", "warm"}
    assert {result["cache"] for result in record["results"]} == caches


def test_inputs_of_every_entry_are_random_fresh_and_nowhere_zero():
    for entry in entries_of([]):
        first, again, other = (
            entry.draw(entry.toy, CPU, torch.float32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        for a, b, c in zip(first, again, other, strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c) and a.count_nonzero() == a.numel(), entry.op


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: plain_attention(q, k, v) * 1.001,
        lambda q, k, v: plain_attention(q, k, v).index_fill(1, torch.tensor([0]), float("nan")),
        lambda q, k, v: plain_attention(q, k, v)[:, :-1],
        lambda q, k, v: torch.zeros_like(q),
    ],
    ids=["off by 0.1%", "one NaN row", "a row short", "never written"],
)
@pytest.mark.parametrize("is_ours", [True, False])
def test_a_wrong_variant_turns_the_gate_red_and_gets_no_speed(wrong, is_ours):
    entry = with_variant(FORWARD, Variant("planted", forward_only(wrong), is_ours=is_ours))
    with pytest.raises(RedGate, match="attention_forward.*planted has error.*No speed is reported"):
        run([entry])


def test_ours_is_held_to_a_tenth_over_the_yardstick_and_peers_to_a_factor():
    def rounded(q, k, v):
        return plain_attention(q, k, v) * (1 + 3e-7)  # twice the error of plain fp32

    ours = with_variant(FORWARD, Variant("planted", forward_only(rounded), is_ours=True))
    with pytest.raises(RedGate):
        check(ours, FORWARD.toy, CPU, torch.float32)
    peer = with_variant(FORWARD, Variant("planted", forward_only(rounded)))
    verdict = check(peer, FORWARD.toy, CPU, torch.float32)["planted"]
    assert verdict.is_green and verdict.errors[0] > verdict.allowed[0] / 4


def test_a_bound_is_timed_without_a_verdict_and_named(record):
    entry = with_variant(FORWARD, Variant("copy", forward_only(lambda q, k, v: q.clone()), instead="a copy of q"))
    made = run([entry])
    validate(made)
    assert made["bounds"] == [{"op": FORWARD.op, "variant": "copy", "instead": "a copy of q"}]
    assert {result["variant"]: result["errors"] for result in made["results"]}["copy"] == []
    made["bounds"] = []
    with pytest.raises(RecordError, match="attention_forward copy has no errors and is not among the bounds"):
        validate(made)


def test_an_entry_of_one_call_is_called_once_beside_its_gate():
    calls = []

    def counted(q, k, v):
        calls.append(1)
        return plain_attention(q, k, v)

    entry = dataclasses.replace(with_variant(FORWARD, Variant("counted", forward_only(counted))), once=True)
    results = [result for result in run([entry])["results"] if result["variant"] == "counted"]
    assert [(result["timing"], result["cache"], result["ms"]["rounds"]) for result in results] == [("clock", "cold", 1)]
    assert not results[0]["ms"]["steady"], "one round shows no spread"
    assert len(calls) == 2, "the gate, and the call that is timed"


@pytest.mark.slow
def test_a_variant_is_timed_at_its_shapes_alone():
    limited = Variant("limited", forward_only(plain_attention), shapes=("other",))
    entry = dataclasses.replace(
        with_variant(FORWARD, limited), shapes={"small": FORWARD.toy, "other": dict(FORWARD.toy)}
    )
    ceilings = measure_ceilings(CEILINGS, CPU, torch.float32, toy=True, rounds=FEW)
    made = run_group("attention", [entry], ceilings, CPU, torch.float32, toy=False, rounds=FEW)
    timed = {(result["shape"], result["variant"]) for result in made["results"]}
    assert ("other", "limited") in timed and ("small", "limited") not in timed and ("small", "eager") in timed


def test_a_run_that_is_killed_leaves_what_it_had_measured(tmp_path, monkeypatch):
    """It is killed at the second of three entries; what is left is a record of the first."""

    def killed(*_):
        raise KeyboardInterrupt

    first = with_variant(FORWARD, Variant("peer", forward_only(broken_attention), instead="nothing at all"))
    second = dataclasses.replace(FORWARD, op="killed", draw=killed)
    monkeypatch.setitem(GROUPS, "attention", (first, second, FORWARD))
    with pytest.raises(KeyboardInterrupt):
        bench(["attention"], out=tmp_path, rounds=2, device="cpu")
    (left,) = tmp_path.rglob("*.*")
    assert left.name == "attention.json.part"
    record = json.loads(left.read_text())
    validate(record)
    assert {result["op"] for result in record["results"]} == {FORWARD.op}
    assert "peer" in {missing["variant"] for missing in record["missing"]}
    monkeypatch.setitem(GROUPS, "attention", (FORWARD,))
    bench(["attention"], out=tmp_path, rounds=2, device="cpu")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["attention.json"]


def broken_attention(q, k, v):
    raise RuntimeError("no\n   such instruction")


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("instead", ["", "nothing at all"])
def test_a_peer_that_raises_is_named_and_takes_nobody_along(instead, once):
    entry = with_variant(FORWARD, Variant("peer", forward_only(broken_attention), instead=instead))
    entry = dataclasses.replace(entry, once=once)
    made = run([entry])
    validate(made)
    missing = {m["variant"]: m["why"] for m in made["missing"]}
    assert missing["peer"] == "it raises RuntimeError: no such instruction"
    assert "eager" in {result["variant"] for result in made["results"]}
    with pytest.raises(RuntimeError):
        check(with_variant(FORWARD, Variant("peer", forward_only(broken_attention))), FORWARD.toy, CPU, torch.float32)


def test_what_is_ours_may_not_raise():
    with pytest.raises(RuntimeError, match="no"):
        run([with_variant(FORWARD, Variant("ours", forward_only(broken_attention), is_ours=True))])


def test_a_peer_that_is_not_installed_is_named_as_missing():
    entry = with_variant(FORWARD, Variant("peer", forward_only(plain_attention), package="no-such-package-anywhere"))
    missing = {m["variant"]: m["why"] for m in run([entry])["missing"]}
    assert missing["peer"] == "package no-such-package-anywhere is not installed"


def test_a_slowed_variant_is_caught_by_the_comparison_and_named(record):
    def slowed(shape, device, dtype):
        def call(*inputs):
            time.sleep(0.02)
            return plain_attention(*inputs[:3])

        return call

    eager, *others = FORWARD.variants
    slow = dataclasses.replace(FORWARD, variants=(dataclasses.replace(eager, build=slowed), *others))
    lines = slower_than(record, run([slow]))
    assert any("attention_forward toy eager" in line and "over the baseline" in line for line in lines)
    assert slower_than(record, record) == []


def test_exactly_five_percent_is_allowed_and_more_is_not(record):
    for factor, count in ((1.049, 0), (1.051, len(record["results"]))):
        other = copy.deepcopy(record)
        for result in other["results"]:
            result["ms"]["p50"] *= factor
        assert len(slower_than(record, other)) == count


@pytest.mark.slow
def test_the_command_ends_with_status_1_when_a_baseline_is_beaten(tmp_path):
    klora("bench", "attention", "--rounds", "3", "--out", tmp_path, "--json")
    path = tmp_path / "cpu" / "attention.json"
    baseline = json.loads(path.read_text())
    for result in baseline["results"]:
        result["ms"]["p50"] /= 1000
    path.write_text(json.dumps(baseline))
    done = klora("bench", "attention", "--rounds", "3", "--out", tmp_path / "new", "--check", path, check=1)
    assert "slower: attention_forward toy eager" in done.stdout
    shown = klora("bench", "report", "--out", tmp_path).stdout
    assert "sdpa-flash" in shown and "picture: " in shown and list((tmp_path / "cpu").glob("*.png"))
    assert "klora bench --out" in klora("bench", "report", "--out", tmp_path / "none", check=2).stderr
    wrong = klora("bench", "attention", "--check", Path(__file__), check=2)
    assert "is no benchmark record: it is not JSON" in wrong.stderr
    other = klora("bench", "muon", "--check", path, check=2)
    assert "attention.json is of the group attention, which is not run; add it" in other.stderr.replace("\n", " ")
    for result in baseline["results"]:
        result["shape"] = "batch 4"
    path.write_text(json.dumps(baseline))
    other = klora("bench", "attention", "--rounds", "1", "--out", tmp_path / "new", "--check", path, check=2)
    assert "has no result in common with this run" in other.stderr
    unknown = klora("bench", "atention", check=2)
    assert "there is no group 'atention'; allowed: ceilings, attention, step, training, ttt, corpus" in unknown.stderr
    with pytest.raises(UnknownGroup):
        entries_of(["atention"])


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), 2, r"\$.schema"),
        (("results", 0, "ms", "p50"), -1.0, r"p50"),
        (("results", 0, "cache"), "lukewarm", r"lukewarm"),
        (("results", 0, "extra"), 1, r"extra"),
        (("missing",), [{"op": "x", "variant": "y", "why": ""}], r"why"),
        (("environment",), {"gpu": None}, r"environment"),
    ],
)
def test_the_validator_refuses_what_departs_from_the_schema(record, path, value, says):
    broken = copy.deepcopy(record)
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(RecordError, match=says):
        validate(broken)
    validate(record)


def test_a_result_without_its_error_is_no_result(record):
    broken = copy.deepcopy(record)
    del broken["results"][0]["errors"]
    with pytest.raises(RecordError, match="errors"):
        validate(broken)


def test_relative_error():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.tensor([3.0, float("nan")]), exact) == float("inf")


def test_timing_takes_turns():
    order = []
    thunks = {"a": [lambda: order.append("a")], "b": [lambda: order.append("b1"), lambda: order.append("b2")]}
    times = time_interleaved(thunks, CPU, least_rounds=4, most_rounds=4, warmup=0)
    assert order == ["a", "b1", "a", "b2", "a", "b1", "a", "b2"]
    assert times["a"].rounds == 4
    slept = time_interleaved({"sleep": [lambda: time.sleep(0.01)]}, CPU, least_rounds=3, most_rounds=3, warmup=0)
    assert slept["sleep"].p50 >= 10


def test_timing_stops_when_it_is_steady_and_says_when_it_is_not(monkeypatch):
    for noise, rounds, is_steady in ((0.0, 5, True), (5.0, 40, False)):
        clock = itertools.cycle([10.0, 10.0 + noise])
        monkeypatch.setattr(timing, "_milliseconds", lambda thunk, device, clock=clock: next(clock))
        times = time_interleaved({"x": [lambda: None]}, CPU, least_rounds=5, most_rounds=40, warmup=0)["x"]
        assert (times.rounds, times.is_steady) == (rounds, is_steady)
        assert times.p20 == 10.0 and times.p80 == 10.0 + noise


def test_slow_calls_end_with_the_seconds_after_three_rounds():
    calls = []
    thunks = {"x": [lambda: (calls.append(1), time.sleep(0.02))]}
    times = time_interleaved(thunks, CPU, least_rounds=50, most_rounds=100, warmup=5, most_seconds=0.04)["x"]
    assert times.rounds == 3 and len(calls) == 3 + 1


@pytest.mark.slow
def test_pytest_benchmark_runs_the_same_entries(tmp_path):
    folder = Path(__file__).parent.parent / "bench"
    if not (folder / "bench_entries.py").exists():  # on a GPU machine the package is installed, not checked out
        folder = Path(sys.modules["klora.bench.gate"].__file__).parent
    options = ["--benchmark-only", "--benchmark-max-time=0.02", "--benchmark-min-rounds=2", "-p", "no:cacheprovider"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's, for one
    command = ["-m", "pytest", folder / "bench_entries.py", *options, f"--benchmark-json={tmp_path / 'out.json'}"]
    process = Forked(command, environment=env)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    names = {b["name"] for b in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    expected = {f"test_speed[{e.op}-toy-{v.name}]" for e in entries_of([]) for v in e.present(CPU)}
    assert names == expected or torch.cuda.is_available()


def worktrees() -> list[str]:
    """Their folders; the commits in them may change at any time."""
    command = ["git", "worktree", "list", "--porcelain"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return [line for line in listed.stdout.splitlines() if line.startswith("worktree ")]


@pytest.mark.slow
@pytest.mark.skipif(not (Path(__file__).parent.parent / ".git").exists(), reason="a GPU machine gets no repository")
def test_another_commit_is_timed_beside_this_one(monkeypatch):
    monkeypatch.setattr(compare, "__defaults__", (1,))  # one turn: a process here and one there
    before = worktrees()
    result = json.loads(klora("bench", "attention", "--against", "HEAD", "--rounds", "5", "--toy", "--json").stdout)
    timed = 2 * sum(len(entry.present(torch.device("cpu"))) for entry in GROUPS["attention"])  # cold and warm
    assert result["against"] == "HEAD" and len(result["results"]) == timed
    assert all(entry["here"] > 0 and entry["there"] > 0 for entry in result["results"])
    assert worktrees() == before
    wrong = klora("bench", "attention", "--against", "no-such-commit", check=2)
    assert "git cannot check out 'no-such-commit'" in wrong.stderr


@pytest.mark.slow
def test_progress_counts_the_shapes_of_all_entries():
    one, two = (dataclasses.replace(FORWARD, shapes=dict.fromkeys(names, FORWARD.toy)) for names in ("ab", "c"))
    ceilings, calls = measure_ceilings(CEILINGS, CPU, torch.float32, toy=True, rounds=FEW), []
    for toy, total in ((True, 2), (False, 3)):
        calls.clear()
        run_group(
            *("attention", [one, two], ceilings, CPU, torch.float32),
            toy=toy,
            rounds=FEW,
            progress=lambda *call: calls.append(call),
        )
        assert {call[2] for call in calls} == {total}
        assert [done for text, done, _ in calls if text.endswith("timing")] == list(range(total))
