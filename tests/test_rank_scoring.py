"""The bench of scoring on several ranks: what it runs, what counts, and that it ends red where scores differ."""

import json
import sys

import pytest
from klora.bench import rank_scoring
from klora.bench.rank_scoring import balance_of, command, differing, main, said, summary, times_of


def result(whole: float, adapting: float, ranks: int = 1, **changed) -> dict:
    """What a run of four documents left, and the seconds from its start to its end."""
    documents = [
        {
            "name": str(n),
            "status": "adapted",
            "tokens": 100,
            "adapted_tokens": 80,
            "base_nats": 3.0,
            "adapted_nats": 2.0,
        }
        for n in range(4)
    ]
    documents[1] |= changed
    phases = {"base": 1.0, "adapt": adapting + 2.0} if ranks == 1 else {"score": adapting + 3.5}
    engine = {"seconds": adapting + 0.5, "handing_over_seconds": 0.5, "prepare_seconds": 1.5}
    many = {"ranks": ranks, "rank_seconds": [10.0] + [6.0] * (ranks - 1)} if ranks > 1 else {}
    about = dict.fromkeys(("artifact", "source", "config", "device", "versions"), "x")
    return (
        about
        | many
        | {
            "documents": documents,
            "seconds": {"load": 1.0, **phases},
            "engine": engine,
            "totals": {"adapted_bpb": 0.5},
            "whole": whole,
        }
    )


def test_one_process_is_the_command_and_several_are_torchruns():
    assert command(1, ["m.klora"]) == [sys.executable, "-m", "klora.cli", "score", "m.klora"]
    two = command(2, ["m.klora"])
    assert two[1:3] == ["-m", "torch.distributed.run"] and two[-4:] == ["-m", "klora.cli", "score", "m.klora"]
    assert two[two.index("--nproc-per-node") + 1] == "2"


def test_captures_and_handing_over_are_left_out_of_what_they_are_no_part_of():
    assert times_of(result(20.0, 8.0)) == {"whole": 20.0, "scoring": 9.5, "adapting": 8.0}
    assert times_of(result(20.0, 8.0, ranks=2)) == {"whole": 20.0, "scoring": 10.0, "adapting": 8.0}
    assert balance_of(result(20.0, 8.0)) is None and balance_of(result(20.0, 8.0, ranks=2)) == 1.25


def test_the_fastest_run_counts_and_the_first_number_of_ranks_is_what_others_are_compared_with():
    rows = summary({1: [result(30.0, 9.0), result(20.0, 8.0)], 2: [result(16.0, 4.0, 2), result(15.0, 5.0, 2)]})
    assert rows[1]["seconds"] == {"whole": 20.0, "scoring": 9.5, "adapting": 8.0}
    assert rows[1]["tokens_per_second"] == {"whole": 20.0, "scoring": 400 / 9.5, "adapting": 40.0}
    assert rows[2]["times_as_fast"] == {"whole": 20 / 15, "scoring": 9.5 / 6.0, "adapting": 2.0}
    assert rows[2]["busiest_by_mean"] == 1.25 and not rows[2]["differing"]
    assert [line.split()[0] for line in said(rows).splitlines()] == ["ranks", "1", "2"]


def test_a_score_that_differs_in_its_last_bit_is_named():
    one = result(1.0, 1.0)
    assert differing(one, result(2.0, 3.0, 2)) == []
    assert differing(one, result(1.0, 1.0, adapted_nats=2.0000000000000004)) == ["1"]
    assert differing(one, result(1.0, 1.0, status="diverged")) == ["1"]
    assert differing(one, one | {"documents": []}) == ["4 documents against 0"]


def test_a_record_is_written_and_unequal_scores_end_red(monkeypatch, tmp_path, capsys):
    def scored(ranks, arguments, folder):
        seen.append((ranks, arguments))
        return result(20.0 / ranks, 8.0 / ranks, ranks, **changed if ranks > 1 else {})

    seen, changed, record = [], {}, tmp_path / "record.json"
    monkeypatch.setattr(rank_scoring, "scored", scored)
    about = {"jsonl": ["place/a.jsonl"], "record": record, "commit": "abc", "set_": ["chunk=64"]}
    main("m.klora", **about, ranks=[1, 2], repeats=2, preset="quick", most_tokens=0, device="auto")
    assert [ranks for ranks, _ in seen] == [1, 2, 1, 2]
    assert seen[0][1][:5] == ["m.klora", "--jsonl", "place/a.jsonl", "--set", "chunk=64"]
    written = json.loads(record.read_text())
    assert written["arguments"][:3] == ["m.klora", "--jsonl", "a.jsonl"], "a place says where a machine keeps it"
    assert written["name"] == "rank_scoring" and written["environment"]["commit"] == "abc"
    assert written["rows"]["2"]["times_as_fast"]["adapting"] == 2.0 and "equal" in capsys.readouterr().out
    changed["adapted_nats"] = 2.5
    with pytest.raises(SystemExit, match="1"):
        main("m.klora", **about, ranks=[1, 2], repeats=2, preset="quick", most_tokens=0, device="auto")
    assert json.loads(record.read_text())["rows"]["2"]["differing"] == ["1"]
    assert "1 differ" in capsys.readouterr().out


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(SystemExit, match="ended with 2:(.|\n)*there is no such file"):
        rank_scoring.scored(1, [str(tmp_path / "none.klora")], tmp_path / "out")
