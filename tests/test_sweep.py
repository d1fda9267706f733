"""The sweep: what it may look at, what it may cost, that it goes on where it stopped, and that it chooses the best."""

import dataclasses
import json
from dataclasses import fields

import pytest
import typer
from conftest import SMALL, randomized, words
from klora.bench import sweep as module
from klora.bench.sweep import ALL, ROWS, Sample, choices, sweep
from klora.model.artifact import save_artifact
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.protocols import BEST, CACHED, CONTEST, QUICK, START, THOROUGH, TTTConfig, ttt_preset
from klora.ttt.sampling import is_for_tuning, sample
from test_ttt import document

SHALLOW = dataclasses.replace(SMALL, blocks=2)
TINY = TTTConfig(
    layout=START, chunk=16, window=64, lora_rank=2, head_rank=3, batch=4, temperature=1.0, deadline=0.0, lr=0.002
)
CONFIGS = {
    QUICK: TINY,
    THOROUGH: TINY.override({"steps_per_chunk": 2}),
    "cached": TINY.override({"context": CACHED, "chunk": 8, "beta1": 0.0} | ALL),
    "diverged": TINY.override({"lr": 1e38}),
}


def test_the_sample_is_drawn_by_texts_alone():
    documents = [document(40 + n, n) for n in range(40)]
    chosen = sample(documents, 500)
    assert sum(d.targets for d in chosen) <= 500 and len(chosen) >= 8
    assert chosen == sample(documents[::-1], 500)[::-1]
    renamed = sample([dataclasses.replace(d, name=f"other-{d.name}") for d in documents], 500)
    assert [d.sha256 for d in renamed] == [d.sha256 for d in chosen]


def test_bits_per_byte_count_short_documents_and_nothing_changes_without_a_learning_rate(monkeypatch):
    monkeypatch.setattr(module, "LONG", 90)
    tuning = Sample(randomized().requires_grad_(False), [document(100), document(12, 1), document(64, 2)])
    found = tuning.run(TINY.override({"lr": 0.0}))
    assert found.adapted_bpb == pytest.approx(found.base_bpb, rel=1e-5) and found.own_gain == pytest.approx(0, abs=1e-5)
    moved = tuning.run(TINY.override({"lr": 0.05}))
    assert moved.adapted_bpb != pytest.approx(found.base_bpb, rel=1e-4)
    assert moved.long in (0.0, 1.0) and moved.short in (0.0, 0.5)  # the document of 12 tokens is not adapted
    assert len(tuning._base) == 1 and 0 < moved.seconds < moved.wall_seconds
    assert Sample(tuning.weights, [document(12)]).run(TINY).long is None


def row(bpb, seconds, phases=0, long=0.75):
    return {"adapted_bpb": bpb, "seconds": seconds, "wall_seconds": seconds, "long": long, "config": {"phases": phases}}


def test_a_preset_takes_the_best_row_that_it_can_pay():
    rows = {
        QUICK: row(1.0, 1.0),
        THOROUGH: row(0.95, 5.0),
        "cheap": row(0.97, 1.04),
        "dear": row(0.94, 5.3, long=None),
        "few gain": row(0.4, 0.5, long=0.74),
        "dearest": row(0.5, 8.1),
        "phases": row(0.5, 0.9, phases=1),
        "diverged": row(None, 0.1),
        "failed": {"error": "no memory", "wall_seconds": 1.0},
    }
    assert choices(rows) == {QUICK: "cheap", THOROUGH: THOROUGH, "best": "dear"}
    assert choices({name: rows[name] for name in (QUICK, "dear")}) == {QUICK: QUICK, "best": "dear"}
    assert choices({"dear": rows["dear"], "failed": rows["failed"]}) == {}
    assert choices({QUICK: row(1.0, 1.0, long=0.5)}) == {}


def test_a_chunk_has_both_contexts_and_nothing_else_differs():
    for chunk, recomputed in ((256, QUICK), (128, "recomputed-128"), (64, "recomputed-64"), (32, "recomputed-32")):
        assert ROWS[f"cached-{chunk}"] == ROWS[recomputed].override({"context": "cached"})
        assert ROWS[recomputed].chunk == chunk


def test_the_rows_begin_with_what_is_to_be_beaten_and_try_every_lead():
    assert list(ROWS)[:4] == [QUICK, THOROUGH, BEST, CONTEST]
    assert all(ROWS[name] == ttt_preset(name) for name in (QUICK, THOROUGH, BEST, CONTEST))
    for name, values in {
        "context": {"recomputed", "cached"},
        "chunk": {256, 128, 64, 48, 32},
        "targets": {"q,k,v,head", ALL["targets"]},
        "lora_rank": {8, 16, 32, 64, 80},
        "beta1": {0.9, 0.0},
        "window": {1024, 1536, 2048},
        "lr_half": {0, 2048},
        "weight_decay": {0.0, 0.5},
        "a_scale": {0.5, 1.0},
        "phases": {0, 3},
        "phase_start": {"all", "a"},
        "adapt_from": {0, 256},
        "lr_warmup": {0, 512},
    }.items():
        assert {getattr(config, name) for config in ROWS.values()} == values
    assert len({config.lr for config in ROWS.values()}) >= 6
    assert all((c.layout, c.protocol, c.deadline, c.temperature) == (START, "score_first", 0, 1) for c in ROWS.values())
    assert len({json.dumps(config.to_dict()) for config in ROWS.values()}) == len(ROWS)


FIXED = {
    **dict.fromkeys(("protocol", "layout", "deadline"), "one pass that is a valid score, of all the text"),
    **dict.fromkeys(("epochs", "lr_floor", "min_tokens"), "read by another protocol or layout alone"),
    **dict.fromkeys(("batch", "adapter_seed"), "changes no score, or by chance alone"),
    "eps": "the design's",
    "temperature": "1: nothing but adapting is to gain",
    **dict.fromkeys(("q_rank", "k_rank", "v_rank", "o_rank"), "as up_rank, of which there is a row"),
    **dict.fromkeys(("o_lr", "up_lr", "down_lr"), "as lr; the design has factors for the others"),
    **dict.fromkeys(("phase_passes", "phase_chunks"), "as phase_lr: how far the shared adapter goes"),
}
"""Options that all rows have alike, and why."""


def test_every_other_option_has_a_row():
    values = {field.name: {getattr(config, field.name) for config in ROWS.values()} for field in fields(TTTConfig)}
    assert {name for name, found in values.items() if len(found) == 1} == FIXED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["all", "a"])
def test_with_phases_a_row_is_what_klora_score_gives(start):
    """Groups of all documents; one that is too short for a step of its own is scored by what was learned, or not."""
    documents = [document(n, n) for n in (100, 12, 64, 9, 90, 16, 30)]
    phases = {"lr": 0.01, "phase_lr": 0.01, "phases": 2, "phase_start": start, "phase_chunks": 3}
    config, model = TINY.override(phases), randomized().requires_grad_(False)
    found = Sample(model, documents).run(config)
    expected = score(ScoreRequest(model, documents, config)).totals()
    assert found.base_bpb == pytest.approx(expected["base_bpb"], rel=1e-6)
    assert found.adapted_bpb == pytest.approx(expected["adapted_bpb"], rel=1e-6)
    assert found.adapted_bpb != pytest.approx(Sample(model, documents).run(TINY).adapted_bpb, rel=1e-4)


@pytest.mark.slow
def test_every_row_can_be_run():
    tuning = Sample(randomized(SHALLOW).requires_grad_(False), [document(270), document(70, 1)])
    for name, config in ROWS.items():
        found = tuning.run(config)
        assert found.adapted_bpb != found.base_bpb, name


@pytest.fixture
def text(tmp_path, tokenizer, monkeypatch):
    """Arguments of a sweep of CONFIGS over 12 documents, and how the record is read."""
    monkeypatch.setattr(module, "ROWS", CONFIGS)
    config = dataclasses.replace(SHALLOW, vocab_size=tokenizer.vocab_size)
    save_artifact(tmp_path / "m.klora", randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    lines = [json.dumps({"name": f"{n}.txt", "text": words(n, 30 + 10 * n)}) for n in range(12)]
    (tmp_path / "val.jsonl").write_text("\n".join(lines))
    paths = {"artifact": tmp_path / "m.klora", "jsonl": tmp_path / "val.jsonl", "record": tmp_path / "record.json"}
    usual = {"rows": "", "seconds": 0.0, "tokens": 100_000, "device": "cpu", "commit": "abc"}
    return paths | usual, lambda: json.loads((tmp_path / "record.json").read_text())


@pytest.mark.slow
def test_rows_are_measured_on_one_half_and_the_chosen_ones_score_the_other(text, monkeypatch, capsys):
    arguments, read = text
    halves = []
    monkeypatch.setattr(Sample, "__init__", spy(Sample.__init__, halves))
    sweep(**arguments)
    tuning, held_out = halves
    assert tuning and held_out and all(map(is_for_tuning, tuning)) and not any(map(is_for_tuning, held_out))
    found = read()
    assert list(found["rows"]) == list(CONFIGS) and found["rows"]["diverged"]["adapted_bpb"] is None
    assert found["tuning"]["documents"] + found["held_out"]["documents"] == 12
    quick, cached = found["rows"][QUICK], found["rows"]["cached"]
    assert cached["gain"] == pytest.approx(1 - cached["adapted_bpb"] / quick["base_bpb"])
    assert found["chosen"] == choices(found["rows"]) and set(found["chosen"]) == {QUICK, THOROUGH, "best"}
    assert set(found["held_out_scores"]) == {QUICK, THOROUGH, *found["chosen"].values()}
    assert found["held_out_scores"][QUICK]["base_bpb"] != quick["base_bpb"]
    said = capsys.readouterr().out
    assert "diverged" in said and "documents that gain: long -, short " in said
    for preset, name in found["chosen"].items():
        line = next(line for line in said.splitlines() if line.startswith("held-out half") and f": {name}: " in line)
        assert preset in line.split(": ")[0]


def spy(init, halves):
    def run(self, model, documents):
        halves.append(documents)
        init(self, model, documents)

    return run


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(text, monkeypatch, capsys):
    arguments, read = text
    sweep(**arguments | {"rows": QUICK})
    first = read()["rows"][QUICK]
    measured, run = [], Sample.run
    monkeypatch.setattr(Sample, "run", lambda self, config: (measured.append(config), run(self, config))[1])
    sweep(**arguments | {"seconds": 1e-9})
    assert not measured and "quick: it is in" in capsys.readouterr().out and list(read()["rows"]) == [QUICK]
    sweep(**arguments | {"rows": f"cached,{QUICK}"})
    assert measured[0] == CONFIGS["cached"] and TINY not in measured[:1]
    assert read()["rows"][QUICK] == first and list(read()["rows"]) == [QUICK, "cached"]
    monkeypatch.setattr(module, "ROWS", CONFIGS | {QUICK: TINY.override({"lr": 0.003})})  # the name is another config's
    sweep(**arguments | {"rows": QUICK})
    assert read()["rows"][QUICK]["config"]["lr"] == 0.003


def test_a_row_that_is_older_than_a_field_was_measured_at_its_default(tmp_path):
    tried = module.Sweep({}, tmp_path / "record.json", {})
    older, other = TINY.to_dict(), TINY.override({"phases": 1, "phase_start": "a"})
    del older["phase_start"]
    assert tried._has({QUICK: {"config": older}}, QUICK, TINY)
    assert not tried._has({QUICK: {"config": older | {"phases": 1}}}, QUICK, other)
    assert not tried._has({QUICK: {"config": older | {"gone": 1}}}, QUICK, TINY)
    assert not tried._has({QUICK: {"config": older, "error": "no memory"}}, QUICK, TINY)


@pytest.mark.slow
def test_a_row_that_fails_costs_no_other_and_is_tried_again(text, monkeypatch):
    arguments, read = text
    run = Sample.run

    def failing(self, config):
        if config.context == CACHED:
            raise MemoryError("none left")
        return run(self, config)

    monkeypatch.setattr(Sample, "run", failing)
    with pytest.raises(typer.Exit):
        sweep(**arguments)
    assert read()["rows"]["cached"]["error"] == "MemoryError: none left" and len(read()["rows"]) == len(CONFIGS)
    monkeypatch.setattr(Sample, "run", run)
    sweep(**arguments)
    assert read()["rows"]["cached"]["adapted_bpb"] > 0


@pytest.mark.slow
def test_no_row_begins_that_leaves_no_time_for_the_held_out_half(text, monkeypatch, capsys):
    arguments, read = text
    now, found = [0.0], iter([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])

    def run(self, config):
        now[0] += 10
        return module.Found(1.0, next(found), 0.0, 0.8, 0.0, 1.0, 10.0)

    monkeypatch.setattr(Sample, "run", run)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "sample", lambda documents, tokens: [document(50)])  # halves of one size
    sweep(**arguments | {"seconds": 45.0})
    assert list(read()["rows"]) == [QUICK, THOROUGH] and now[0] == 40 and len(read()["held_out_scores"]) == 2
    assert "cached and the rows behind it wait for another call" in capsys.readouterr().out


def test_what_is_not_there_or_broken_is_said_in_a_sentence(text):
    arguments, _ = text
    with pytest.raises(SystemExit, match="none.klora: there is no such file; give the path of an exported artifact"):
        sweep(**arguments | {"artifact": arguments["artifact"].with_name("none.klora")})
    with pytest.raises(SystemExit, match="none.jsonl: there is no such file"):
        sweep(**arguments | {"jsonl": arguments["jsonl"].with_name("none.jsonl")})


def test_what_is_no_sweep_of_this_text_is_refused_and_kept(text):
    arguments, _ = text
    for wrong in ('{"name": "sweep"}', "not json", "[]"):
        arguments["record"].write_text(wrong)
        with pytest.raises(typer.BadParameter, match="no sweep of this artifact and text"):
            sweep(**arguments)
        assert arguments["record"].read_text() == wrong
    with pytest.raises(typer.BadParameter, match="there is no row 'quickest'; allowed: quick, thorough, cached"):
        sweep(**arguments | {"rows": "quick,quickest"})
    with pytest.raises(typer.BadParameter, match="none of at most 3 tokens is in the tuning half"):
        sweep(**arguments | {"tokens": 3, "record": arguments["record"].with_name("none.json")})
