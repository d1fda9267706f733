"""The sweep: what it may look at, and that its winner is what was measured to be best."""

import dataclasses
import json

import pytest
import typer
from conftest import SMALL, randomized, words
from klora.bench.sweep import STEPS, Sample, choice, is_held_out, search, sweep
from klora.model.artifact import save_artifact
from klora.ttt.protocols import TTTConfig
from klora.ttt.sampling import sample
from test_ttt import document

START = TTTConfig(chunk=16, window=64, min_tokens=32, lora_rank=2, head_rank=3, deadline=0.0, batch=4, lr=0.0)


def test_the_halves_share_no_document_and_the_sample_is_drawn_by_names_alone():
    documents = [document(40 + n, n) for n in range(40)]
    halves = [[d for d in documents if is_held_out(d.name) is side] for side in (False, True)]
    assert len(halves[0]) + len(halves[1]) == 40 and min(map(len, halves)) > 10
    chosen = sample(documents, 500)
    assert sum(d.targets for d in chosen) <= 500 and len(chosen) >= 8
    assert chosen == sample(documents[::-1], 500)[::-1]


def test_bits_per_byte_count_short_documents_and_nothing_changes_without_a_learning_rate():
    model = randomized().requires_grad_(False)
    tuning = Sample(model, [document(100), document(20, 1), document(64, 2)])
    found = tuning.run(START.override({"temperature": 1.0}))
    assert found.adapted_bpb == pytest.approx(found.base_bpb, rel=1e-5)
    assert tuning.run(START.override({"lr": 0.05})).adapted_bpb != pytest.approx(found.base_bpb, rel=1e-4)
    assert len(tuning._base) == 1


def test_the_search_keeps_the_best_and_every_step_goes_around_it():
    class Valley:
        """Bits per byte with its least at lr 0.002, 1 step, rank 4 and chunk 128."""

        def run(self, config):
            wanted = {"lr": 0.002, "steps_per_chunk": 1, "lora_rank": 4, "chunk": 128, "temperature": 1.0}
            away = sum(abs(getattr(config, name) / value - 1) for name, value in wanted.items())
            return Sample_found(adapted_bpb=1 + away)

    @dataclasses.dataclass
    class Sample_found:
        adapted_bpb: float
        base_bpb: float = 1.0
        gained: float = 0.5
        seconds: float = 0.0

    *_, (best, rows) = search(Valley(), TTTConfig())
    assert (best.lr, best.steps_per_chunk, best.lora_rank, best.chunk, best.temperature) == (0.002, 1, 4, 128, 1.0)
    assert rows[0]["changes"] == {} and min(row["adapted_bpb"] for row in rows) == pytest.approx(1.0)
    assert len(rows) == sum(len(step(TTTConfig())) for step in STEPS)
    assert all(row["config"]["protocol"] == "score_first" for row in rows)


def test_steps_that_bring_next_to_nothing_are_not_chosen():
    one, two, four = (TTTConfig(steps_per_chunk=steps) for steps in (1, 2, 4))
    assert choice([(one, 1.0), (two, 0.9996), (four, 0.99959)]) is one
    assert choice([(one, 1.0), (two, 0.9994), (four, 0.9990)]) is two
    assert choice([(one, 1.0), (TTTConfig(lr=0.1), 0.9999)]).lr == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("presets", [False, True])
def test_a_record_is_of_one_half_of_the_documents(tmp_path, tokenizer, monkeypatch, presets):
    small = {name: getattr(START, name) for name in ("chunk", "window", "min_tokens", "lora_rank", "head_rank")}
    monkeypatch.setattr("klora.ttt.protocols.PRESETS", {"design": small, "quick": {**small, "lr": 0.003}})
    monkeypatch.setattr("klora.bench.sweep.PRESETS", ("design", "quick"))
    monkeypatch.setattr("klora.bench.sweep.STEPS", (lambda best: [{}], lambda best: [{"lr": 0.003}]))
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
    save_artifact(tmp_path / "m.klora", randomized(config).state_dict(), config, tokenizer.to_bytes(), {"steps": 0})
    lines = [json.dumps({"name": f"{n}.txt", "text": words(n, 30 + 10 * n)}) for n in range(8)]
    (tmp_path / "val.jsonl").write_text("\n".join(lines))
    sweep(tmp_path / "m.klora", tmp_path / "val.jsonl", tmp_path / "record.json", presets, 0, "cpu", "abc")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["documents"] == sum(is_held_out(f"{n}.txt") is presets for n in range(8))
    with pytest.raises(typer.BadParameter, match="none of at most 3 tokens"):
        sweep(tmp_path / "m.klora", tmp_path / "val.jsonl", tmp_path / "none.json", presets, 3, "cpu", "abc")
    if presets:
        assert set(record["presets"]) == {"design", "quick"}
        assert record["presets"]["design"]["base_bpb"] == record["presets"]["quick"]["base_bpb"]
    else:
        assert len(record["rows"]) == 2 and record["chosen"] in ({}, {"lr": 0.003})
