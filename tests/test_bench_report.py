"""The report of the benchmarks: what tables say, that pictures are drawn, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from klora.bench.groups import GROUPS
from klora.bench.pictures import draw
from klora.bench.readings import load_records
from klora.bench.record import RecordError, _whole_peak, validate
from klora.bench.report import BEGIN, END, ReadmeError, markdown_tables, report, rewrite_readme
from klora.bench.timing import Taken
from klora.bench.training import ENTRIES as TRAINING
from klora.bench.waterfall import times_in_step, waterfalls
from klora.model.config import preset
from klora.model.gpt import GPT
from klora.model.weights import weights_of
from PIL import Image

pytestmark = pytest.mark.filterwarnings("error")

MIB = 2**20
HEAD = (
    "| op | shape | variant | timing | cold ms: p50 (p20 - p80) | warm ms | % of floor | x vs eager | peak MiB "
    "| error |\n| :-- | :-- | :-- | :-- | --: | --: | --: | --: | --: | --: |"
)


def result(variant="eager", p50=2.0, op="mix", shape="B2", timing="graph", cache="cold", steady=True, **fields):
    """A result with a floor of 1 ms, by copying 1 GB at 1 TB/s."""
    values = {"peak_bytes": 3 * MIB, "bytes": 10**9, "flops": 4 * 10**9, "errors": [1e-3, 0.00123456]} | fields
    ms = {"p20": 0.99 * p50, "p50": p50, "p80": 1.005 * p50, "rounds": 20, "steady": steady}
    cost = {"floor_ms": 1.0, "percent_of_floor": 100 / p50, "allowed": [0.01, 0.01]}
    where = {"op": op, "shape": shape, "sizes": {"B": 2}, "dtype": "bfloat16", "variant": variant}
    return {**where, "timing": timing, "cache": cache, "ms": ms, **cost, **values}


def record(results, group="kernels", missing=(), bounds=(), gpu="Fake GPU 9000"):
    environment = {
        "gpu": gpu,
        "driver": "580.1" if gpu else None,
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "commit": "0123456789abcdef",
        "date": "2030-01-02T03:04:05Z",
    }
    rates = {"bytes_per_second": 1e12, "flops_per_second": 5.004e14}
    made = {"schema": 1, "group": group, "environment": environment, "ceilings": rates}
    made |= {"missing": list(missing), "bounds": list(bounds), "results": list(results)}
    validate(made)
    return made


def save(folder: Path, *records, gpu="fake-gpu-9000") -> Path:
    (folder / gpu).mkdir(parents=True, exist_ok=True)
    for made in records:
        (folder / gpu / f"{made['group']}.json").write_text(json.dumps(made))
    return folder


def rows(tables: str) -> list[list[str]]:
    """Cells of every row below a table's head."""
    lines = [line for line in tables.splitlines() if line.startswith("| ") and line not in HEAD]
    return [line.strip("| ").split(" | ") for line in lines]


def kernels():
    """Variants with and without graphs, two shapes, one unsteady, one without its peak."""
    yield result("eager", 8.0)
    yield result("ours", 2.0)
    yield result("ours", 1.25, cache="warm")
    yield result("eager", 9.0, timing="events")
    yield result("peer", 3.0, timing="events", steady=False, peak_bytes=None)
    yield result("eager", 1234.5, shape="B4", flops=10**12)
    yield result("ours", 0.0123456, shape="B4", flops=10**12)
    yield result("eager", 4.0, op="copy", flops=0)
    yield result("ours", 5.0, op="copy", flops=0)


BOUNDS = [{"op": "mix", "variant": "bare", "instead": "the product without the adapter"}]
MISSING = [
    {"op": "mix", "variant": "liger", "why": "package liger is not installed"},
    {"op": "copy", "variant": "liger", "why": "package liger is not installed"},
    {"op": "mix", "variant": "flash", "why": "runs on cuda, not on cpu"},
]


def test_a_section_says_everything_about_one_record():
    results = [
        result("eager", 8.0),
        result("eager", 7.0, cache="warm", steady=False),
        result("ours", 2.5, steady=False),
        result("bare", 2.0, errors=[], allowed=[]),
    ]
    tables = markdown_tables([record(results, missing=MISSING, bounds=BOUNDS)])
    assert tables == (
        "### Fake GPU 9000: kernels\n\n"
        "Fake GPU 9000, driver 580.1, torch 2.11.0, triton 3.6.0, commit 0123456, 2030-01-02, bfloat16; "
        "ceilings: copy 1.00 TB/s, GEMM 500 TFLOP/s.\n\n"
        f"{HEAD}\n"
        "| mix | B2 | eager | graph | 8.00 (7.92 - 8.04) | 7.00 † | 12.5 | 1.00 | 3.00 | 1.23e-03 |\n"
        "| mix | B2 | ours | graph | 2.50 (2.48 - 2.51) † | - | 40.0 | 3.20 | 3.00 | 1.23e-03 |\n"
        "| mix | B2 | bare | graph | 2.00 (1.98 - 2.01) | - | 50.0 | 4.00 | 3.00 | ‡ |\n\n"
        "† unsteady: at the last round, p80 - p20 was still 2% of the median or more.\n\n"
        "‡ Timed as bounds, these compute something else:\n\n"
        "- bare (mix): the product without the adapter\n\n"
        "Missing:\n\n"
        "- liger (mix, copy): package liger is not installed\n"
        "- flash (mix): runs on cuda, not on cpu\n"
    )


def test_peak_memory_is_what_building_keeps_and_a_call_adds_or_what_building_took():
    assert _whole_peak(Taken(peak=7, kept=4), 2) == 7 and _whole_peak(Taken(peak=7, kept=4), 5) == 9
    assert _whole_peak(None, 5) == 5 and _whole_peak(Taken(1, 1), None) is None


def test_a_speedup_is_taken_against_eager_measured_in_the_same_way():
    found = {tuple(row[:4]): (row[4].split()[0], *row[5:9]) for row in rows(markdown_tables([record(kernels())]))}
    assert found[("mix", "B2", "ours", "graph")] == ("2.00", "1.25", "50.0", "4.00", "3.00")
    assert found[("mix", "B2", "peer", "events")] == ("3.00", "-", "33.3", "3.00", "-")
    assert found[("mix", "B4", "ours", "graph")] == ("0.0123", "-", "8,100", "100,000", "3.00")
    assert found[("mix", "B4", "eager", "graph")] == ("1,230", "-", "0.0810", "1.00", "3.00")
    assert found[("copy", "B2", "ours", "graph")] == ("5.00", "-", "20.0", "0.800", "3.00")
    assert len(found) == 7  # a variant has one row, by the graph where there is one


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.996, "10.0"), (999.6, "1,000"), (0.00999999, "0.0100"), (0.00012345, "1.23e-04"), (99.96, "100")],
)
def test_numbers_keep_three_digits_when_rounding_carries(value, text):
    assert rows(markdown_tables([record([result(p50=value)])]))[0][4].split()[0] == text


def test_a_speedup_beyond_float64_is_said():
    slow, instant = result(variant="eager", p50=1e300), result(variant="klora", p50=1e-300)
    assert "| inf |" in markdown_tables([record([slow, instant])])


def test_edges_of_tables():
    only_ours, nothing = record([result("ours", errors=[0.0], op="a|b")]), record([], group="none", missing=MISSING)
    (row,) = rows(markdown_tables([only_ours]))
    assert row[0] == r"a\|b" and row[7] == "-" and row[9] == "0.00e+00"
    assert "†" not in markdown_tables([only_ours]) and "Missing" not in markdown_tables([only_ours])
    assert "### Fake GPU 9000: none" in markdown_tables([nothing]) and "No results." in markdown_tables([nothing])
    on_cpu = markdown_tables([record([result(timing="clock")])])  # a GPU in the machine does not time the CPU
    assert on_cpu.startswith("### CPU: kernels\n\nCPU, torch 2.11.0, ")
    assert markdown_tables([record([result()], gpu=None)]).startswith("### CPU")


def test_records_are_found_sorted_and_other_files_passed_over(tmp_path):
    made = [record([result()], group=group) for group in ("step", "attention")]
    save(tmp_path, *made)
    save(tmp_path, record([result(timing="clock")], group="zeta", gpu=None), gpu="cpu")
    (tmp_path / "cpu" / "demo-score.json").write_text('{"totals": {}, "schema": 1}')
    (tmp_path / "cpu" / "pipeline.json").write_text('{"name": "pipeline", "environment": {}}')
    (tmp_path / "cpu" / "list.json").write_text('["schema", "results"]')
    (tmp_path / "attention.json").write_text("not in a GPU's folder")
    found = [(r["environment"]["gpu"], r["group"]) for r in load_records(tmp_path)]
    assert found == [(None, "zeta"), ("Fake GPU 9000", "attention"), ("Fake GPU 9000", "step")]


def test_what_is_no_record_is_refused_with_its_path(tmp_path):
    save(tmp_path, record([result()]))
    path = tmp_path / "fake-gpu-9000" / "broken.json"
    path.write_text(json.dumps({**record([result()]), "schema": 2}))
    with pytest.raises(RecordError, match=r"broken\.json is no benchmark record: at \$\.schema"):
        load_records(tmp_path)
    path.write_text('{"schema": 1, ')
    with pytest.raises(RecordError, match=r"broken\.json is no benchmark record: it is not JSON"):
        load_records(tmp_path)
    path.write_text(json.dumps(record([result()])))
    with pytest.raises(RecordError, match=r"broken\.json and .*kernels\.json are both Fake GPU 9000, kernels"):
        load_records(tmp_path)


@pytest.mark.parametrize("name", ["", "absent"])
def test_without_records_the_error_says_how_to_make_some(tmp_path, name):
    with pytest.raises(RecordError, match="there are no benchmark records in .*: make some with `klora bench --out"):
        report(tmp_path / name)


def sizes(pictures: list[Path]) -> dict[str, tuple[int, int]]:
    found = {}
    for path in pictures:
        with Image.open(path) as image:
            image.verify()
            assert image.format == "PNG"
            found[path.stem] = image.size
    return found


@pytest.mark.slow
def test_pictures_of_every_group_and_gpu(tmp_path):
    copy = record([result(op="copy", flops=0), result(op="gemm", bytes=10**7, flops=10**12)], group="ceilings")
    on_cpu = record([result(timing="clock", steady=False)], gpu=None)
    pictures = draw([on_cpu, copy, record(kernels(), missing=MISSING)], tmp_path)
    here = [str(path.relative_to(tmp_path).with_suffix("")) for path in pictures]
    assert here == [
        *("cpu/roofline", "cpu/floor"),
        *("fake-gpu-9000/speedup-kernels", "fake-gpu-9000/roofline", "fake-gpu-9000/floor"),
    ]
    assert all(width == 1800 and height > 300 for width, height in sizes(pictures).values())
    assert sorted(tmp_path.rglob("*")) == sorted({*pictures, *(path.parent for path in pictures)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("results", "names"),
    [
        ([], set()),
        ([result(cache="warm")], set()),
        ([result()], {"roofline", "floor"}),
        ([result(flops=0), result(op="less", bytes=0)], {"roofline", "floor"}),
        ([result("ours"), result("peer")], {"roofline", "floor"}),
        ([result(), result("ours", 300.0)], {"speedup-kernels", "roofline", "floor"}),
        ([result(timing="events"), result("ours", 0.001)], {"roofline", "floor"}),
        ([result(f"{n}", n + 1.0, op=f"op {n % 15}") for n in range(30)], {"roofline", "floor"}),
    ],
    ids=["none", "warm only", "one", "nothing to count", "no eager", "slow", "other timings", "many"],
)
def test_edges_of_pictures(tmp_path, results, names):
    assert set(sizes(draw([record(results)], tmp_path))) == names


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


def drawn_texts(monkeypatch) -> list[str]:
    """What every picture saved from now on says."""
    from matplotlib.figure import Figure

    said, save_figure = [], Figure.savefig

    def spy(figure, *arguments, **options):
        said.append(" / ".join(texts(figure)))
        return save_figure(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return said


@pytest.mark.slow
def test_what_pictures_say(tmp_path, monkeypatch):
    said = drawn_texts(monkeypatch)
    draw([record(kernels())], tmp_path)
    speedup, roofline, floor = said
    assert "4.00x / 3.00x (events) † / 100,000x / 0.800x" in speedup
    assert "50.0% ours / 8,100% ours / 25.0% eager" in floor
    assert "1  mix B2: ours, 2.00 TFLOP/s" in roofline and "2  mix B4: ours, 81,000 TFLOP/s" in roofline
    assert "roof: copy 1.00 TB/s, GEMM 500 TFLOP/s" in roofline and "no FLOPs or bytes to count: copy" in roofline
    assert "cold cache, timed by CUDA graph replay" in floor and "events" not in floor + roofline
    assert "cold cache, timed by CUDA graph replay; where marked (events), by CUDA events" in speedup
    assert "† unsteady: p80 - p20" in speedup and "†" not in floor + roofline


@pytest.mark.slow
def test_a_bound_is_never_the_fastest_variant(tmp_path, monkeypatch):
    said = drawn_texts(monkeypatch)
    draw([record([result("eager"), result("bare", 1.1, errors=[], allowed=[])], bounds=BOUNDS)], tmp_path)
    assert "50.0% eager" in said[2] and "bare" not in said[1] + said[2]


SEED_SIZES = {"D": 512, "hidden": 1536, "H": 8, "G": 4, "d": 64, "V": 1024, "rows": 10240}
PIECES = {  # op -> torch.compile's and klora's milliseconds
    "embedding_trained": (2.0, 1.0),
    "residual_norm_between_blocks_trained": (0.7, 0.4),
    "residual_norm_joined_trained": (0.9, 0.5),
    "qkv_attention_trained": (1.6, 1.2),
    "residual_mlp_trained": (1.60, 1.61),
}


def step_records(head=True, blocks=10, pieces=PIECES):
    """Whole steps, pieces and the head of a seed, as their groups record them."""
    whole = {"eager": 131.9, "original": 69.8, "torch.compile": 64.8, "klora": 41.5}
    sizes = {"blocks": blocks, "B": 96, "S": 1024}
    steps = [
        result(name, ms, op="train_step", shape=f"seed-{blocks}", timing="events", sizes=sizes)
        for name, ms in whole.items()
    ]
    trained = {"shape": "96x1024", "sizes": {"B": 96, "S": 1024} | SEED_SIZES}
    parts = [
        result(name, ms, op=op, **trained)
        for op, pair in pieces.items()
        for name, ms in zip(("torch.compile", "klora"), pair, strict=True)
    ]
    parts += [result("klora", 9.0, op="residual_mlp_trained", timing="events", **trained)]  # not timed alike
    losses = {"shape": "98304", "sizes": {"B": 96, "S": 1024, "D": 512, "V": 1024}}
    losses = [
        result(name, ms, op="softcap_nll_forward_backward", **losses)
        for name, ms in (("torch.compile", 0.9), ("klora", 0.8))
    ]
    made = [record(parts, "training"), record(steps, "step")]
    return [*made, record(losses, "head")] if head else made


SAVINGS = {
    "embedding_trained": 1 * 1.0,
    "residual_norm_between_blocks_trained": 5 * 0.3,
    "residual_norm_joined_trained": 4 * 0.4,
    "qkv_attention_trained": 10 * 0.4,
    "residual_mlp_trained": 10 * -0.01,
    "softcap_nll_forward_backward": 1 * 0.1,
}


@pytest.mark.parametrize("name", ["seed", "seed-11l"])
def test_pieces_run_as_often_as_the_network_joins(name):
    config = dataclasses.replace(preset(name).model, width=64, heads=4, kv_heads=2, mlp_hidden=64)
    blocks = weights_of(GPT(config)).blocks
    times, joined = times_in_step(config), sum(block.skip is not None for block in blocks)
    assert times["residual_norm_joined_trained"] == joined > 0
    assert times["residual_norm_between_blocks_trained"] == len(blocks) - 1 - joined
    assert set(times) == {entry.op for entry in TRAINING} | {"softcap_nll_forward_backward"}
    measured = {entry.op for group in GROUPS.values() for entry in group}
    assert set(times) <= measured


def test_a_waterfall_goes_from_one_step_to_the_other():
    results = [result for made in step_records() for result in made["results"]]
    (found,) = waterfalls(results)
    assert {saving.op: saving.ms for saving in found.savings} == pytest.approx(SAVINGS)
    assert found.savings[0].op == "qkv_attention_trained" and found.savings[-1].op == "residual_mlp_trained"
    assert (found.before, found.after, found.others) == (64.8, 41.5, {"eager": 131.9, "original": 69.8})
    assert found.rest == pytest.approx(64.8 - 41.5 - sum(SAVINGS.values())) and not found.unmeasured
    (headless,) = waterfalls([r for made in step_records(head=False) for r in made["results"]])
    assert headless.unmeasured == ["softcap_nll_forward_backward"]
    assert headless.rest == pytest.approx(found.rest + 0.1)
    assert waterfalls(step_records(blocks=7)[1]["results"]) == []  # of no network that is known
    others = [{**r, "sizes": r["sizes"] | {"B": 48}} if r["op"] != "train_step" else r for r in results]
    assert waterfalls(others) == []  # pieces of another shape
    assert waterfalls([r for r in results if (r["op"], r["variant"]) != ("train_step", "klora")]) == []


def test_the_section_of_the_pieces_says_what_each_is_worth_in_a_step():
    tables = markdown_tables(step_records())
    section, *_ = tables.split("### Fake GPU 9000: step")
    assert "What removing a piece, for torch.compile of it, would cost a training step (seed-98304):" in section
    assert "| piece | torch.compile, ms | klora, ms | times a step | ms a step |" in section
    assert "| residual norm joined | 0.900 | 0.500 | 4 | +1.60 |" in section
    assert "| residual mlp | 1.60 | 1.61 | 10 | -0.100 |" in section and "| together |  |  |  | +8.10 |" in section
    assert "would cost" not in markdown_tables([record([result()], "training")])
    assert "would cost" not in markdown_tables(step_records()[1:])


@pytest.mark.slow
def test_the_waterfall_is_drawn_with_every_piece(tmp_path, monkeypatch):
    said = drawn_texts(monkeypatch)
    pictures = draw(step_records(head=False), tmp_path)
    (size,) = (size for name, size in sizes(pictures).items() if name == "waterfall-seed-10")
    assert size[0] == 1800 and size[1] > 500
    (text,) = (text for text in said if "from torch.compile to klora" in text)
    for part in ("64.8 ms", "41.5 ms", "-4.00 ms", "10 x qkv attention", "embedding", "+0.100 ms", "rest: optimizers"):
        assert part in text
    assert "eager: 132 ms" in text and "not measured, in the rest: softcap_nll_forward_backward" in text


README = f"# Title\n\n  {BEGIN}\nold\n{END}\n\nrest, no newline"


def test_the_readme_is_rewritten_between_its_markers_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert rewrite_readme(readme, "### new\n\n| table |\n") is True
    expected = f"# Title\n\n  {BEGIN}\n\n### new\n\n| table |\n\n{END}\n\nrest, no newline"
    assert readme.read_text() == expected
    assert rewrite_readme(readme, "### new\n\n| table |\n") is False
    assert readme.read_text() == expected
    assert rewrite_readme(readme, "other") is True
    assert readme.read_text() == f"# Title\n\n  {BEGIN}\n\nother\n\n{END}\n\nrest, no newline"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", f"has 0 lines `{BEGIN}`, one is needed"),
        (f"{BEGIN}\n", f"has 0 lines `{END}`, one is needed"),
        (f"a line with {BEGIN} in it\n{END}\n", f"has 0 lines `{BEGIN}`"),
        (f"{BEGIN}\n{BEGIN}\n{END}\n", f"has 2 lines `{BEGIN}`"),
        (f"{BEGIN}\n{END}\n{END}\n", f"has 2 lines `{END}`"),
        (f"{END}\n{BEGIN}\n", f"has the line `{END}` before the line `{BEGIN}`"),
    ],
    ids=["none", "no end", "inside a line", "two begins", "two ends", "wrong order"],
)
def test_a_readme_without_one_pair_of_markers_is_refused_and_kept(tmp_path, text, says):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ReadmeError) as refused:
        rewrite_readme(readme, "tables")
    assert says in str(refused.value) and str(readme) in str(refused.value)
    assert readme.read_text() == text


def test_report_does_all_and_says_what_it_did(tmp_path):
    save(tmp_path / "results", record([result(), result("ours", 1.5)]))
    readme = tmp_path / "README.md"
    readme.write_text(README)
    made = report(tmp_path / "results", readme)
    assert made.readme_changed is True and made.tables in readme.read_text()
    assert made.records == load_records(tmp_path / "results")
    assert [path.name for path in made.pictures] == ["speedup-kernels.png", "roofline.png", "floor.png"]
    save(tmp_path / "results", record([]))
    assert report(tmp_path / "results").readme_changed is None


def test_a_picture_that_cannot_be_drawn_leaves_the_tables(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(*args, **kwargs):
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(Figure, "savefig", fail)
    said = []
    assert draw([record(kernels())], tmp_path, said.append) == []
    assert said and all(".png" in line and "no fonts here" in line for line in said)
