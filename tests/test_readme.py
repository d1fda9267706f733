"""What the README says is what the records say."""

import json
from pathlib import Path

import pytest
from klora.bench.report import BEGIN, END, load_records, markdown_tables

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="a GPU machine gets the tests alone")


def test_the_measured_table_is_the_pipelines_record():
    record = json.loads((ROOT / "bench/results/nvidia-h200/pipeline.json").read_text())
    text = (ROOT / "README.md").read_text()
    for name in ("before_quantisation", "after_quantisation", "adapted_score_first"):
        assert f"| {record['bpb'][name]:.4f} |" in text, name
    assert f"{record['artifact_bytes']:,} bytes" in text
    for phase in ("train", "export", "score"):
        assert f"{record[phase]['wall_seconds']:.0f} s" in text, phase
    assert record["artifact_bytes"] <= 16_000_000
    assert record["bpb"]["quantisation_gap"] <= 0.010


def test_the_benchmark_tables_are_those_of_the_records():
    tables = markdown_tables(load_records(ROOT / "bench/results"))
    inside = (ROOT / "README.md").read_text().split(f"{BEGIN}\n")[1].split(f"\n{END}")[0]
    assert inside.strip() == tables.strip(), "run: klora bench report --readme README.md"


def test_every_link_to_a_file_leads_somewhere():
    import re

    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
