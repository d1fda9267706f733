"""`klora score --sweep`: constants are chosen on one half of the text, and the other half alone is scored."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch.distributed as dist
from conftest import SMALL, randomized, words
from klora.model.artifact import save_artifact
from klora.model.config import ConfigError
from klora.ttt.documents import Document
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.progress import Interrupted
from klora.ttt.protocols import PRESETS, ttt_preset
from klora.ttt.queue import StoreQueue
from klora.ttt.results import read_documents_csv
from klora.ttt.sampling import is_for_tuning
from klora.ttt.sweep import grid, in_halves, sweep
from test_cli import klora
from test_ttt import TTT, document

MODULE = sys.modules["klora.ttt.sweep"]  # the package's name is the function
DOCUMENTS = [document(40 + n, n) for n in range(8)] + [document(9, 100 + n) for n in range(4)]
TUNING = [d for d in DOCUMENTS if is_for_tuning(d)]


def test_the_halves_go_by_text_alone():
    tuning, scored = in_halves(DOCUMENTS, TTT)
    assert tuning == TUNING and [d for d in DOCUMENTS if d in tuning or d in scored] == DOCUMENTS
    assert len(tuning) + len(scored) == 12 and min(len(tuning), len(scored)) > 2
    moved = [Document(f"other {n}", d.tokens.copy(), d.bytes) for n, d in enumerate(DOCUMENTS[::-1])]
    assert [is_for_tuning(d) for d in moved[::-1]] == [is_for_tuning(d) for d in DOCUMENTS]


def test_the_grid_is_around_the_config_and_starts_with_it():
    changes = grid(TTT)
    assert changes[0] == {} and len(changes) == 12
    assert {"lr": 0.005, "chunk": 8, "beta1": 0.8} in changes and {"lr": 0.02} in changes
    assert grid(TTT.override({"lr": 0.0, "chunk": 1, "beta1": 0.0})) == [{}]
    of_presets = {name: len(grid(ttt_preset(name))) for name in PRESETS}
    assert of_presets == dict.fromkeys(PRESETS, 6) | {"design": 12}  # as the option's help says


def test_the_best_on_one_half_scores_the_other_alone(monkeypatch):
    seen, said = [], []
    request = ScoreRequest(randomized(), DOCUMENTS, TTT.override({"deadline": "1e-9"}), prequant=randomized(seed=1))
    request = dataclasses.replace(
        request, progress=lambda *at: seen.append(at), say=said.append, facts={"notes": ["n"]}
    )
    tried = [{}, {"lr": 0.02}, {"lr": 1e38}, {"lr": 0.0}]  # of random tokens nothing can be learnt
    monkeypatch.setattr(MODULE, "grid", lambda config: tried)
    found = sweep(request)
    assert found.documents == [d for d in DOCUMENTS if d not in TUNING] and found.prequant is request.prequant
    rows = found.facts["sweep"]["tried"]
    for row in (rows[0], rows[1], rows[3]):
        config = TTT.override(row["changes"])
        assert row["adapted_bpb"] == score(ScoreRequest(randomized(), TUNING, config)).totals()["adapted_bpb"]
    assert rows[2]["adapted_bpb"] is None and "diverged" in said[2]
    best = min((row for row in rows if row["adapted_bpb"]), key=lambda row: row["adapted_bpb"])["changes"]
    assert found.config == request.config.override(best) and found.facts["sweep"]["chosen"] == best == {"lr": 0.0}
    note = f"{len(TUNING)} of the 12 documents were used to choose the constants (lr=0) and are left out of the score"
    assert (
        found.facts["notes"][0] == "n" and found.facts["notes"][1].startswith(note) and not request.facts.get("sweep")
    )
    targets = sum(d.targets for d in TUNING)
    assert {phase for phase, *_ in seen} == {"sweep"} and seen[-1][2] == 4 * targets
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.slow
def test_what_a_sweep_cannot_do_is_refused_and_it_can_be_stopped():
    request = ScoreRequest(randomized(), DOCUMENTS, TTT)
    for change, says in (
        ({"config": TTT.override({"protocol": "min_nll"})}, "protocol='min_nll' is not possible; allowed: score_first"),
        ({"queue": StoreQueue(dist.HashStore(), 0, 2)}, "several ranks is not possible"),
        ({"documents": TUNING}, "are in the scored half, none of them long enough to adapt; give more documents"),
        (
            {"config": TTT.override({"lr": 0.0})},
            "a sweep at lr=0 is not possible: no step changes anything; give a rate",
        ),
        ({"config": TTT.override({"lr": 1e38})}, "gave the tuning half a finite score; give a smaller lr"),
    ):
        with pytest.raises(ConfigError, match=says):
            sweep(dataclasses.replace(request, **change))
    with pytest.raises(Interrupted):
        sweep(dataclasses.replace(request, should_stop=lambda: True))


@pytest.mark.slow
def test_every_output_says_how_many_documents_were_left_out(tmp_path, tokenizer, monkeypatch):
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
    save_artifact(tmp_path / "m.klora", randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(words(number, 60))
    monkeypatch.setattr(MODULE, "grid", lambda config: [{}, {"lr": 0.001}])
    sets = [part for pair in ("chunk=16", "window=64") for part in ("--set", pair)]
    command = ["score", tmp_path / "m.klora", "--text", tmp_path / "texts", "--out", tmp_path / "out", *sets, "--sweep"]
    shown = klora(*command).stdout.replace("\n", "")
    stored = json.loads((tmp_path / "out" / "score.json").read_text())
    texts = [Document("", tokenizer.encode(words(number, 60)), 1) for number in range(8)]
    tuning = [f"{number}.txt" for number, text in enumerate(texts) if is_for_tuning(text)]
    scored = [f"{number}.txt" for number in range(8) if f"{number}.txt" not in tuning]
    assert [row["name"] for row in read_documents_csv(tmp_path / "out" / "documents.csv")] == scored
    assert stored["sweep"]["documents_tuning"] == len(tuning) and stored["sweep"]["documents_scored"] == len(scored)
    assert len(stored["sweep"]["tried"]) == 2 and np.isfinite(stored["sweep"]["tried"][1]["adapted_bpb"])
    assert stored["totals"]["documents"] == len(scored) and stored["config"]["lr"] in (0.001, 0.002)
    note = f"{len(tuning)} of the 8 documents were used to choose the constants"
    assert f"note: {note}" in shown and note in stored["notes"][0]
    assert note in (tmp_path / "out" / "report.html").read_text()
    leaky = klora(*command, "--protocol", "min_nll", check=2).stderr.replace("\n", "")
    assert "--sweep was given with the protocol min_nll (LEAKY); allowed: score_first" in leaky
