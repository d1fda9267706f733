"""What the README says is what the records, the command line and the tree say."""

import json
import re
from pathlib import Path

import pytest
from klora.bench.readings import three_digits as three

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="a GPU machine gets the tests alone")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "README.md").read_text()


def rows_of(text: str, head: str) -> list[list[str]]:
    """Cells of the rows below the line that starts with `head` and the line under it."""
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_it_is_short(text):
    assert len(text.splitlines()) <= 180


MEASURED = [
    (H200, "step", "train_step", "seed-98304", "events", "klora", "torch.compile"),
    (H100, "ttt", "score_first_pass", "seed-64x2049", "events", "klora", "torch.compile"),
    (H100, "lora", "lora_qkv_forward_backward", "B64-S1024", "graph", "klora", "torch.compile"),
    (H100, "muon", "newton_schulz_model", "seed-60", "graph", "klora", "cublas"),
    (H100, "int6", "int6_linear", "M1-8192x8192", "graph", "int6", "eager"),
    (H100, "int6", "int6_linear", "M4096-8192x8192", "graph", "int6", "eager"),
]


def test_every_measured_number_is_a_records_and_one_is_a_loss(text):
    rows = rows_of(text, "| work |")
    for row, (gpu, group, op, shape, timing, ours, other) in zip(rows, MEASURED, strict=True):
        ms = {
            result["variant"]: result["ms"]["p50"]
            for result in json.loads((RESULTS / gpu / f"{group}.json").read_text())["results"]
            if (result["op"], result["shape"], result["timing"], result["cache"]) == (op, shape, timing, "cold")
        }
        assert [row[1], row[3], row[4]] == [three(ms[ours]), three(ms[other]), three(ms[other] / ms[ours])], row
        assert row[5] == f"[{group}](bench/results/{gpu}/{group}.json)"
    assert sum(float(row[4]) < 1 for row in rows) == 1


def test_the_demos_numbers_are_its_records(text):
    totals = json.loads((ROOT / "bench/results/cpu/demo-score.json").read_text())["totals"]
    before, after, adapted = (f"{totals[name]:.4f}" for name in ("prequant_bpb", "base_bpb", "adapted_bpb"))
    assert f"BPB {before} before quantisation, {after} after, {adapted} adapted (score_first)" in text


def test_the_table_of_ops_names_ops(text):
    import klora.kernels

    named = [name for row in rows_of(text, "| op |") for name in re.findall(r"`(\w+)`", row[0])]
    assert len(named) > 10 and all(callable(getattr(klora.kernels, name)) for name in named)


def test_every_command_is_there_with_the_files_of_the_tree(text):
    from klora.cli.app import app
    from typer.main import get_command

    for name in get_command(app).commands:
        assert f"klora {name}" in text, name
    for line in re.search(r"## The tree\n\n```text\n(.*?)```", text, re.S)[1].splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line


def test_the_original_is_named_and_linked(text):
    assert "[openai/parameter-golf pull request 614](https://github.com/openai/parameter-golf/pull/614)" in text
    assert "MIT License" in (ROOT / "LICENSE").read_text() and "[license](LICENSE)" in text
