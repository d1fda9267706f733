"""The bench of the step on ranks: a try on two processes, and the projection's arithmetic."""

import json

import pytest
import torch
from forks import Forked
from klora.bench.ranks import WAYS, Way, fit, main, project, table


@pytest.mark.slow
def test_two_processes_write_a_whole_record(tmp_path):
    path = tmp_path / "ranks.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = Forked([*torchrun, "-m", "klora.bench.ranks", "--record", path, "--commit", "abc", "--toy"], tmp_path)
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    record = json.loads(path.read_text())
    assert record["problems"] == [] and record["environment"]["commit"] == "abc" and record["world"] == 2
    assert [row["tokens"] for row in record["alone"]] == [128, 64]
    assert [(row["tokens"], len(row["ms_of_each"])) for row in record["apart"]] == [(128, 2), (64, 2)]
    assert all(ms > 0 for row in record["apart"] for ms in row["ms_of_each"])
    ways = [way._asdict() for way in WAYS]
    assert [row["way"] for row in record["results"]] == ways and all(row["right"] for row in record["results"])
    assert [row["way"] for row in record["replicas"]] == ways
    assert all(row["entries_apart"] == 0 and row["steps"] == 5 for row in record["replicas"])
    assert [(row["way"], row["tokens_a_rank"]) for row in record["together"]] == [
        (way, tokens) for tokens in (128, 64) for way in ways
    ]
    assert all(row["collectives"] == row["way"]["graph_collectives"] for row in record["together"])
    assert {row["adamw"] for row in record["adamw"]} == {"on each", "shared"}
    assert record["projection"]["is"] == "a projection, not a measurement"
    assert table(record) in shown and "PROBLEM" not in shown


def test_without_a_gpu_it_says_so_before_it_takes_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measured on CUDA GPUs, and PyTorch sees none here; --toy only tries it"):
        main(tmp_path / "ranks.json")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="the environment has RANK=3; allowed for one of several ranks: 0 to 1"):
        main(tmp_path / "ranks.json", toy=True)


def links(latency: float, bandwidth: float) -> list[dict]:
    return [
        {"collective": "all_reduce", "bytes": size, "ms": 2 * latency + size / bandwidth}
        for size in (2**20, 2**24, 2**27)
    ]


def test_the_link_is_fitted_to_the_all_reduces():
    assert fit(links(0.01, 2.0e8)) == (pytest.approx(0.01), pytest.approx(2.0e8))


def test_a_projection_adds_what_nothing_hides_and_grows_it_as_a_ring_does():
    times = {"p50": 40.8}
    rows = [
        {"tokens_a_rank": 98304, "way": way._asdict(), "collectives": way.graph_collectives, "ms": times}
        for way in WAYS[:4]
    ]
    record = {"alone": [{"tokens": 98304, "ms": {"p50": 40.0}}], "links": links(0.01, 2.0e8), "together": rows}
    found = project(record, 98304, {"last": 2 * 10**7, "all": 10**8})
    ms = {(row["gpus"], Way(**row["way"])): row["ms"] for row in found}
    # Of two: 0.02 + 0.1 ms; of eight 0.14 + 0.175.
    assert ms[8, Way(gradient_buckets=4)] == pytest.approx(40.0 + 0.8 * 0.315 / 0.12)
    assert ms[8, Way()] == pytest.approx(40.0 + 0.8 * (0.14 + 0.875) / (0.02 + 0.5))
    assert ms[4, WAYS[0]] == pytest.approx(40.0 + 0.8 * (0.06 + 0.75) / (0.02 + 0.5))
    assert {row["tokens_a_step"] for row in found} == {4 * 98304, 786432}
