"""README, CONTRIBUTING and docs: snippets run, commands parse, links resolve, and numbers are those of the records."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL, randomized, words
from klora.bench.readings import load_records
from klora.bench.readings import three_digits as three
from klora.bench.report import BEGIN, END, markdown_tables
from klora.model import preset, save_artifact
from klora.ttt import TTTConfig, ttt_preset

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [page for page in PAGES if page.exists()]
RESULTS = ROOT / "bench/results"

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="a GPU machine gets the tests alone")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str) -> list[tuple[str, str]]:
    """(page:line, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M):
            found.append((f"{name_of(page)}:{text[: match.start()].count(chr(10)) + 1}", match[1]))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(page:line, words) of every shell command, without comments."""
    found = []
    for where, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            one: list[str] = []
            for word in [*shlex.split(line.replace("<this repository>", "REPOSITORY"), comments=True), "&&"]:
                if word != "&&":
                    one.append(word)
                elif one:
                    found.append((where, one))
                    one = []
    return found


KLORA = [
    (where, line[line.index("klora.cli" if line[0] == "torchrun" else "klora") + 1 :])
    for where, line in commands()
    if line[0] == "klora" or "klora.cli" in line
]
OTHER = [(where, line) for where, line in commands() if line[0] != "klora" and "klora.cli" not in line]


@pytest.mark.parametrize(("where", "arguments"), KLORA, ids=[f"{w} {' '.join(a[:2])}" for w, a in KLORA])
def test_every_klora_command_is_one_that_the_command_line_takes(where, arguments):
    from klora.cli.app import command_of
    from klora.cli.options import parse_overrides

    name, *rest = arguments
    context = command_of(name).make_context(name, rest)
    pairs = [value for option, value in zip(rest, rest[1:], strict=False) if option == "--set"]
    if name == "train":
        preset(context.params["preset_name"]).override(parse_overrides(pairs))
    elif name == "score":
        ttt_preset().override(parse_overrides(pairs))
    else:
        assert not pairs


@pytest.mark.parametrize(("where", "line"), OTHER, ids=[f"{w} {' '.join(c[:2])}" for w, c in OTHER])
def test_every_other_command_names_what_there_is(where, line):
    match line:
        case ["make", target, *variables]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
            assert all(f"{v.split('=')[0]} ?=" in (ROOT / "Makefile").read_text() for v in variables)
        case ["pip", "install", *names]:
            setup = (ROOT / "setup.py").read_text()
            for name in names:
                extra = re.fullmatch(r"(?:\.|klora-kernels|-e)(?:\[([\w-]+)\])?", name)
                assert extra and (not extra[1] or f'"{extra[1]}": [' in setup), name
        case ["python", "-m", module, *_] | ["torchrun", "--nproc-per-node", _, "-m", module, *_]:
            assert (ROOT / f"{module.removeprefix('klora.').replace('.', '/')}.py").exists()
        case ["python" | "pytest", path, *_]:
            assert (ROOT / path).exists()
        case _:
            assert line[:2] in (["git", "clone"], ["cd", "klora"], [".", ".venv/bin/activate"]), line


RUN = """
import contextlib, io, json, sys
import klora
print(klora.__file__)
for where, code in json.load(open("snippets.json")):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, where, "exec"), {"__name__": "__main__"})
    except Exception:
        print(where, file=sys.stderr)
        raise
"""


@pytest.mark.slow
def test_every_python_snippet_runs_from_a_wheel(tmp_path, tokenizer):
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for folder in ("kernels", "lora", "model", "ttt", "bench", "cli", "src"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
    (source / "wheel").mkdir()
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        # what an index shows is the README
        assert (ROOT / "README.md").read_text().strip() in archive.read(metadata).decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
        archive.extractall(site)

    place = tmp_path / "somewhere"
    (place / "runs/demo").mkdir(parents=True)
    config = replace(SMALL, vocab_size=tokenizer.vocab_size, train_length=1024)
    weights = randomized(config).state_dict()
    save_artifact(place / "runs/demo/demo.klora", weights, config, tokenizer.to_bytes(), {}, 1_000_000)
    (place / "README.md").write_text(words(3, 120))
    snippets = blocks("python")
    assert len(snippets) >= 4
    (place / "snippets.json").write_text(json.dumps(snippets))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env |= {"TORCH_COMPILE_DISABLE": "1"}  # it wants a C++ compiler and a minute; tests of klora.lora compile
    done = subprocess.run([sys.executable, "-c", RUN], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(site)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_fits_the_width_of_a_page(page):
    for block in re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.S | re.M):
        assert max(map(len, block.splitlines())) <= 99, block


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_words_are_the_fields(page):
    private = re.compile(r"\b(told|turned|heat|rooms?|plain statements?)\b", re.I)
    assert not private.findall(page.read_text())


def test_records_and_runs_that_a_note_names_exist():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    for page in ROOT.glob("docs/notes/*.md"):
        for name in re.findall(r"`((?:bench/results/|tuning/)?[\w./-]*[\w*-]+\.(?:json|txt))`", page.read_text()):
            assert any(path.match(name) for path in files), (page.name, name)
        if page.name != "README.md":
            assert f"({page.name})" in (page.parent / "README.md").read_text()


def test_the_picture_is_its_scripts():
    assert runpy.run_path(str(ROOT / "docs/idea.py"))["draw"]() == (ROOT / "docs/idea.svg").read_text()


def test_the_benchmark_tables_are_those_of_the_records():
    tables = markdown_tables(load_records(RESULTS))
    inside = (ROOT / "docs/benchmarks.md").read_text().split(f"{BEGIN}\n")[1].split(f"\n{END}")[0]
    assert inside.strip() == tables.strip(), "run: klora bench report --readme docs/benchmarks.md"


def test_the_pipelines_results_are_its_record():
    record = json.loads((RESULTS / "nvidia-h200/pipeline.json").read_text())
    text = (ROOT / "docs/results.md").read_text()
    for name in ("before_quantisation", "after_quantisation", "adapted_score_first"):
        assert f"| {record['bpb'][name]:.4f} |" in text, name
    assert f"{record['artifact_bytes']:,} bytes" in text
    for phase in ("train", "export", "score"):
        assert f"{record[phase]['wall_seconds']:.0f} s" in text, phase
    assert record["artifact_bytes"] <= 16_000_000
    assert record["bpb"]["quantisation_gap"] < 0.013, "the original's"


def median_ms(gpu: str, group: str, op: str, shape: str, variant: str) -> float:
    """Cold, by CUDA events."""
    (ms,) = (
        result["ms"]["p50"]
        for result in json.loads((RESULTS / gpu / f"{group}.json").read_text())["results"]
        if (result["op"], result["shape"], result["variant"]) == (op, shape, variant)
        and (result["timing"], result["cache"]) == ("events", "cold")
    )
    return ms


def test_the_recorded_steps_are_those_of_their_record():
    text = (ROOT / "docs/results.md").read_text()
    names = {"eager": "eager PyTorch", "original": "the original's way", "klora": "klora, fused"}
    for variant in ("eager", "original", "torch.compile", "klora"):
        ms = [median_ms("nvidia-h200", "step", "train_step", f"{name}-98304", variant) for name in ("seed", "seed-11l")]
        assert f"| {names.get(variant, variant)} | {three(ms[0])} | {three(ms[1])} |" in text, variant


def test_the_seconds_of_adapting_are_those_of_their_records():
    rows = (ROOT / "docs/scoring.md").read_text().split("| | klora |")[1].splitlines()[2:7]
    places = (
        ("ttt", "score_first_pass", "seed-64x2049", ("klora", "eager", "torch.compile", "original")),
        ("corpus", "min_nll_corpus_LEAKY", "seed-391", ("klora", "eager", "torch.compile", "original")),
        ("corpus", "score_first_corpus", "seed-6250", ("klora", "eager")),
        ("corpus", "min_nll_corpus_LEAKY", "seed-6250", ("klora",)),
        ("ttt", "short_documents", "seed-2420", ("klora", "eager")),
    )
    for row, (group, op, shape, variants) in zip(rows, places, strict=True):
        said = [float(number) for number in re.findall(r"(?<![\d,])\d+\.\d+", row.split("|", 2)[2])]
        seconds = [median_ms("nvidia-h100-80gb-hbm3", group, op, shape, variant) / 1000 for variant in variants]
        assert said == pytest.approx(seconds, rel=0.02), row


def test_what_presets_bring_is_their_record():
    pattern = r"^\| `(\w+)` \| (\d+) s \| ([\d.]+) \| ([\d.]+) \| (-?[\d.]+)% \| (\d+)% \| ([\d.]+) \|$"
    said = re.findall(pattern, (ROOT / "docs/scoring.md").read_text(), re.M)
    assert {"quick", "thorough", "best", "contest"} == {name for name, *_ in said}
    for name, trained, *numbers in said:
        record = json.loads((RESULTS / f"nvidia-h200/tuning/sweep-{trained}s.json").read_text())
        (row,) = (row for row in record["rows"].values() if TTTConfig(**row["config"]) == ttt_preset(name))
        gain, long = 1 - row["adapted_bpb"] / record["rows"]["quick"]["base_bpb"], f"{100 * row['long']:.0f}"
        wanted = [f"{row['base_bpb']:.5f}", f"{row['adapted_bpb']:.5f}", f"{100 * gain:.2f}", long]
        assert numbers == [*wanted, f"{row['seconds']:.1f}"], (name, trained)
