"""The training step on several ranks, over gloo on a CPU: the curve, weights and state of one process, or nothing."""

import contextlib
import dataclasses
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SMALL, randomized
from klora.kernels import BOS_ID
from klora.kernels.momentum import advance_momentum_
from klora.model import fused, graphs, muon_sharded, reduction
from klora.model.config import ConfigError, ModelConfig, TrainConfig
from klora.model.fused import FusedStep
from klora.model.gpt import GPT
from klora.model.graphs import release_collectives
from klora.model.parallel import Ranks
from klora.model.stored import StoredWeights

CPU = torch.device("cpu")
ROWS, LENGTH, STEPS, BAD = 8, 64, 4, 1
AVERAGING = {"ema_every": 2, "ema_decay": 0.9, "swa_every": 3, "swa_below": 0.6}
CONFIG = TrainConfig(batch_tokens=ROWS * LENGTH, micro_batch_tokens=ROWS * LENGTH, max_steps=STEPS, **AVERAGING)
SETTINGS = {
    "one": {},
    "two": {"micro_batches": 2},
    "options": {"micro_batches": 2, "document_mask": True, "qat_share": 1.0},
    "between": {"graph_collectives": "between"},
    "between-two": {"graph_collectives": "between", "micro_batches": 2},
    "shared": {"muon_gathers": 2},
    "shared-between-two": {"muon_gathers": 1, "graph_collectives": "between", "micro_batches": 2},
    "buckets": {"gradient_buckets": 3},
    "buckets-two-wire": {"gradient_buckets": 2, "micro_batches": 2, "reduce_dtype": "bfloat16"},
    "buckets-shared-options": {
        **{"gradient_buckets": 3, "muon_gathers": 2, "micro_batches": 2},
        **{"document_mask": True, "qat_share": 1.0},
    },
    "wire": {"reduce_dtype": "bfloat16"},
    "wire-between-two": {"reduce_dtype": "bfloat16", "graph_collectives": "between", "micro_batches": 2},
}
CASES = [(name, 4) for name in SETTINGS] + [(name, 2) for name in ("one", "between-two", "shared")]
"""Settings, and on how many ranks they are run."""
DAMAGES = [
    *(("nan", name) for name in ("one", "shared-between-two")),
    *(("death", name) for name in ("one", "between-two", "shared-between-two")),
    *(("death in the gather", name) for name in ("shared", "shared-between-two")),
]
"""What goes wrong in a step of four ranks: a loss that is no number on the last one, a death in a collective."""


def drawn() -> torch.Tensor:
    """Token rows of each step, in documents of some ten tokens."""
    tokens = torch.randint(3, 300, (STEPS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens.masked_fill(tokens < 30, BOS_ID)


def made(name: str, ranks, model: ModelConfig = SMALL) -> FusedStep:
    options = dict(SETTINGS[name])
    micro_batches = options.pop("micro_batches", 1)
    rows = ROWS // ranks.world // micro_batches
    return FusedStep(randomized(model), CONFIG.override(options), rows, micro_batches, ranks)


def stepped(step: FusedStep, steps, before=lambda index: None) -> list[tuple[float, float]]:
    """What the steps of these numbers report."""
    reports, rank, world = [], step.ranks.rank, step.ranks.world
    for index in steps:
        before(index)
        own = drawn()[index].chunk(world)[rank].split(step.rows)
        # int6 values of weights that are near each other may be a whole step apart: at first they are the same.
        late = step.run(own, index, 0.5, step.config.qat_share > 0 and index == 0)
        reports += [late] if late else []
    return reports + step.flush()


def kept(step: FusedStep) -> dict[str, torch.Tensor]:
    """All that a step may change on the device."""
    every = {"values": step.stored.values, "averages": step.averages._flat, **step.optimizers.state_tensors()}
    return {name: tensor.clone() for name, tensor in every.items()}


def counted(step: FusedStep) -> tuple[int, int, int]:
    return step.optimizers.muon.skipped_steps, step.averages.ema_updates, step.averages.swa_snapshots


def loaded(step: FusedStep, path: Path) -> None:
    """Go on from a state that another number of ranks has left."""
    state = torch.load(path)
    step.stored.values.copy_(state["values"])
    step.refresh()
    step.optimizers.load_state_tensors({name: t for name, t in state.items() if "/" in name})


class Damage:
    """Does it in step BAD, and keeps what there was before and after it."""

    def __init__(self, kind: str, step: FusedStep, patch: pytest.MonkeyPatch):
        self.kind, self.step, self.patch = kind, step, patch
        self.before: dict[str, torch.Tensor] = {}

    def __call__(self, index: int) -> None:
        ranks, patch = self.step.ranks, self.patch
        if index == BAD + 1:
            patch.undo()
            ranks.alive.fill_(1)
            self.after = kept(self.step)
        if index != BAD:
            return
        self.before = kept(self.step)
        if self.kind == "nan" and ranks.rank == ranks.world - 1:
            real = fused.softcap_nll
            patch.setattr(fused, "softcap_nll", lambda *a, **k: real(*a, **k) * math.nan)
        if self.kind == "death":
            patch.setattr(reduction.dist, "all_reduce", self.aborted)
        if self.kind == "death in the gather":
            patch.setattr(muon_sharded, "all_gather", lambda received, sent, **k: self.aborted(received))

    def aborted(self, tensor, **options) -> SimpleNamespace:
        """A collective whose communicator was aborted: it returns, and leaves anything behind."""
        self.step.ranks.alive.fill_(0)
        tensor.fill_(0.25)
        return SimpleNamespace(wait=lambda: None)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    found = {}

    def ranks():
        return Ranks(rank, world, CPU)

    for name, on in CASES:
        if on == world:
            step = made(name, ranks())
            found[name] = stepped(step, range(STEPS)), kept(step), counted(step)
    for kind, name in DAMAGES if world == 4 else ():
        step = made(name, ranks())
        with pytest.MonkeyPatch.context() as patch:
            damage = Damage(kind, step, patch)
            reports = stepped(step, range(STEPS), damage)
        found[name, kind] = reports, kept(step), counted(step), damage.before, damage.after
    half, path = made("shared", ranks()), Path(folder) / "half.pt"
    if world == 4:
        stepped(half, range(BAD))
        if rank == 0:
            torch.save(kept(half), path)
    else:
        loaded(half, path)
        found["resumed"] = stepped(half, range(BAD, STEPS)), kept(half)
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each rank of two worlds has found, and the folder with the state that the first one left."""
    folder = tmp_path_factory.mktemp("ranks")
    # A server that has imported everything forks them: spawned ones would import it all, each for itself.
    mp.get_context("forkserver").set_forkserver_preload(["test_ranks_step"])
    for world in (4, 2):
        mp.start_processes(_rank, args=(world, str(folder)), nprocs=world, start_method="forkserver")
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in (2, 4)}, folder


@cache
def alone(name: str, left_out: int | None = None) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], tuple]:
    step = made(name, Ranks(0, 1, CPU))
    return stepped(step, [index for index in range(STEPS) if index != left_out]), kept(step), counted(step)


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.parametrize(("name", "world"), CASES)
def test_ranks_take_the_steps_of_one_process_and_are_equal_bit_for_bit(runs, name, world):
    """Loss curve, weights, momenta, AdamW's state and averages; with bf16 on the wire to its rounding."""
    reports, state, counts = alone(name)
    first, *others = (found[name] for found in runs[0][world])
    tolerance = 5e-3 if "wire" in name else 1e-5
    assert [loss for loss, _ in first[0]] == pytest.approx([loss for loss, _ in reports], rel=tolerance)
    assert [norm for _, norm in first[0]] == pytest.approx([norm for _, norm in reports], rel=10 * tolerance)
    if "wire" not in name:
        assert_near(first[1], state)
    for reports, state, counts_there in (first, *others):
        assert reports == first[0] and counts_there == counts
        assert_same(state, first[1])


def test_collectives_between_the_parts_of_a_step_give_the_same_bits_as_within(runs):
    found = runs[0][4][0]
    for one, other in (("one", "between"), ("two", "between-two")):
        assert found[one][0] == found[other][0]
        assert_same(found[one][1], found[other][1])


def test_on_one_rank_the_ways_of_several_change_nothing():
    (reports, state, counts), (*other, counts_too) = alone("options"), alone("buckets-shared-options")
    assert (reports, counts) == (other[0], counts_too)
    assert_same(state, other[1])


def test_bf16_on_the_wire_is_not_fp32(runs):
    found = runs[0][4][0]
    assert found["wire"][0][0][0] == found["one"][0][0][0]  # the loss travels in fp32
    assert found["wire"][0][0][1] != found["one"][0][0][1]
    assert found["wire"][0][0][1] == pytest.approx(found["one"][0][0][1], rel=2**-8)


@pytest.mark.parametrize("name", [name for kind, name in DAMAGES if kind == "nan"])
def test_a_loss_that_is_no_number_on_one_rank_leaves_the_step_out_on_all(runs, name):
    _, state, (_, *averaged) = alone(name, left_out=BAD)
    for found in runs[0][4]:
        reports, after_all, counts, before, after = found[name, "nan"]
        assert [math.isnan(loss) for loss, _ in reports] == [index == BAD for index in range(STEPS)]
        assert counts == (1, *averaged)
        assert_same(before, after)
        assert_near(after_all, state)


@pytest.mark.parametrize(("kind", "name"), [damage for damage in DAMAGES if damage[0] != "nan"])
def test_a_rank_that_is_gone_in_a_collective_leaves_the_step_out(runs, kind, name):
    """What an aborted collective leaves are finite numbers here: only `alive` tells."""
    for found in runs[0][4]:
        reports, _, counts, before, after = found[name, kind]
        assert [math.isnan(loss) for loss, _ in reports] == [index == BAD for index in range(STEPS)]
        assert counts == (1, *alone(name, left_out=BAD)[2][1:])
        assert_same(before, after)


def test_a_state_of_four_ranks_goes_on_with_two_and_with_one(runs):
    found, folder = runs
    step = made("shared", Ranks(0, 1, CPU))
    loaded(step, folder / "half.pt")
    of_one = stepped(step, range(BAD, STEPS))
    wanted_reports, wanted = found[4][0]["shared"][:2]
    names = wanted.keys() - {"averages"}  # they are the trainer's to load
    for reports, state in ((of_one, kept(step)), found[2][0]["resumed"], found[2][1]["resumed"]):
        assert reports == [pytest.approx(report, rel=1e-5) for report in wanted_reports[BAD:]]
        assert_near({name: state[name] for name in names}, {name: wanted[name] for name in names})


def test_every_rank_holds_the_whole_state_of_the_optimizers(runs):
    names = set(alone("one")[1])
    for found in runs[0][4]:
        assert names == found["shared"][1].keys() == found["one"][1].keys()


def test_buckets_are_all_of_the_sums_once_in_ranges_of_blocks_last_first():
    stored = StoredWeights(randomized(dataclasses.replace(SMALL, blocks=11)), ranges=4)
    *ranges, rest = stored.buckets
    assert [(b.leaves.stop - b.leaves.start) // 4 for b in ranges] == [3, 3, 3, 2]
    assert [b.sums.stop for b in ranges[1:]] == [b.sums.start for b in ranges[:-1]] and ranges[-1].sums.start == 0
    assert rest.sums == slice(ranges[0].sums.stop, len(stored.sums)) and stored.total.data_ptr() == (
        stored.sums[-1:].data_ptr()
    )
    assert len(StoredWeights(randomized(dataclasses.replace(SMALL, blocks=1)), ranges=4).buckets) == 2


@pytest.fixture
def one_of_gloo(tmp_path):
    """A process group of this process alone: collectives give what they are given."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("count", "leave_before"), [(1, 0), (3, 2)])
def test_buckets_are_on_their_way_before_the_first_block_has_gradients(one_of_gloo, monkeypatch, count, leave_before):
    config = CONFIG.override({"gradient_buckets": count})
    step = FusedStep(randomized(), config, 4, 1, Ranks(0, 2, CPU))
    order, all_reduce = [], dist.all_reduce
    step.stored.weights.blocks[0].down.register_hook(lambda gradient: order.append("the first block's"))
    monkeypatch.setattr(
        reduction.dist, "all_reduce", lambda *given, **more: order.append("a sum") or all_reduce(*given, **more)
    )
    stepped(step, [0])
    assert order.count("a sum") == count + 1 and order.index("the first block's") == leave_before


@pytest.mark.parametrize("gathers", [0, 2])
@pytest.mark.parametrize("fails", ["nowhere", "here", "there"])
def test_collectives_that_cannot_be_captured_run_between_graphs_on_all_ranks(one_of_gloo, monkeypatch, fails, gathers):
    """Without a GPU a stand-in captures; the warm-up before it changes nothing."""
    seen, said = [], []

    def captured(part, device, **options):
        if fails == "here" and step.collectives == "captured":
            raise RuntimeError("operation not permitted when stream is capturing")
        assert options["collectives"]
        seen.append(part)
        return part

    failed = [1.0] if fails == "there" else [0.0]
    ranks = Ranks(0, 2, CPU)
    monkeypatch.setattr(Ranks, "most", lambda self, own: [max(own, *failed)])
    step = FusedStep(randomized(), CONFIG.override({"muon_gathers": gathers}), 4, 1, ranks)
    for name, stand_in in (
        ("capture_stream", lambda owner, device: None),
        ("run_on", lambda stream, call: call()),
        ("captured", captured),
    ):
        monkeypatch.setattr(fused, name, stand_in)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    before = step.stored.values.clone()
    micro_batches, rest = step._made(True, said.append)
    assert torch.equal(step.stored.values, before) and counted(step) == (0, 0, 0)
    assert all(not t.any() for name, t in kept(step).items() if name != "values")
    assert len(micro_batches) == 1
    if fails == "nowhere":
        assert step.collectives == "captured" and rest == [] and said == [] and seen == micro_batches
        return
    assert step.collectives == "between" and len(said) == 1 and len(rest) == (4 if gathers else 2)
    assert ("RuntimeError: operation not permitted" if fails == "here" else "it failed on another rank") in said[0]
    assert [part in seen for part in rest] == ([False, True, False, True] if gathers else [False, True])


def test_graphs_with_collectives_end_before_the_process_group_and_no_others(monkeypatch):
    """NCCL's communicator waits for its graphs when it is destroyed."""
    ended, modes = [], []

    class Graph:
        def reset(self):
            ended.append(self)

    def graph(captured_graph, capture_error_mode, **options):
        modes.append(capture_error_mode)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with_some, without = (
        graphs.captured(lambda: None, CPU, warm_up=0, stream=SimpleNamespace(), collectives=each)
        for each in (True, False)
    )
    release_collectives()
    assert ended == [with_some.graph] and without.graph not in ended and modes == ["thread_local", "global"]
    del with_some
    release_collectives()
    assert len(ended) == 1


def test_the_flags_of_a_step_on_ranks_are_refused_by_name():
    for name in ("reduce_dtype", "graph_collectives"):
        with pytest.raises(ConfigError, match=f"{name}='x' is not possible; allowed: one of"):
            TrainConfig().override({name: "x"})


DEVICES = (
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("taken", [False, True])
def test_the_momentum_kernel_advances_where_the_step_is_taken(taken, device):
    generator = torch.Generator().manual_seed(0)
    before, gradient = (torch.randn(5001, generator=generator).to(device) for _ in range(2))
    gradient[7] = math.nan if not taken else 1.0
    rate, is_taken = torch.tensor(0.9, device=device), torch.tensor(taken, device=device)
    ours, plain = before.clone(), before.clone()
    advance_momentum_(ours, gradient, rate, is_taken, "triton")
    advance_momentum_(plain, gradient, rate, is_taken, "reference")
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours, before) is not taken


# ---- two GPUs, NCCL

WIDE = ModelConfig(vocab_size=300, width=256, blocks=5, heads=4, kv_heads=2, mlp_hidden=512, bigram_width=16)
ON_GPU = [
    ("captured", 1, 2, "float32", 3),
    ("captured", 2, 0, "bfloat16", 3),
    *(
        (collectives, micro_batches, gathers, dtype, 1)
        for collectives in ("captured", "between")
        for micro_batches, gathers, dtype in (
            (1, 0, "float32"),
            (2, 0, "float32"),
            (1, 2, "float32"),
            (2, 1, "bfloat16"),
        )
    ),
]
"""Collectives, micro-batches, gathers of Muon's updates, dtype on the wire, buckets of blocks."""


def _gpu_rank(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    init = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": 2, "device_id": device}
    dist.init_process_group("cpu:gloo,cuda:nccl", **init)
    found = {}
    for case in ON_GPU:
        for capture in (True, False):
            collectives, micro_batches, gathers, dtype, buckets = case
            ranks = Ranks(rank, 2, device)
            model = GPT(WIDE)
            model.load_state_dict(randomized(WIDE).state_dict())
            model.configure(device, torch.bfloat16)
            given = {"graph_collectives": collectives, "reduce_dtype": dtype}
            given |= {"muon_gathers": gathers, "gradient_buckets": buckets}
            said, rows = [], ROWS // 2 // micro_batches
            step = FusedStep(
                model, CONFIG.override(given), rows, micro_batches, ranks, LENGTH, capture, say=said.append
            )
            reports = stepped(step, range(STEPS))
            whole, before = kept(step), counted(step)
            ranks.alive.zero_()
            lost = stepped(step, [BAD])
            found[case, capture] = {
                "said": said,
                "reports": reports,
                "kept": {name: t.cpu() for name, t in whole.items()},
                "lost": lost,
                "unchanged": all(torch.equal(t, whole[name]) for name, t in kept(step).items()),
                "counted": (before, counted(step)),
            }
    torch.save(found, f"{folder}/{rank}.pt")
    release_collectives()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_capture_what_they_call_and_are_equal_bit_for_bit(tmp_path):
    """Collectives in one graph, between graphs and in none give the same bits; a rank that is gone changes nothing."""
    mp.start_processes(_gpu_rank, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (case, capture), mine in one.items():
        theirs, called = other[case, capture], one[case, False]
        assert mine["said"] == [], f"{case} fell back"
        assert mine["reports"] == theirs["reports"] == called["reports"], (case, capture)
        assert all(math.isfinite(loss) for loss, _ in mine["reports"])
        for state in (theirs["kept"], called["kept"]):
            assert_same(mine["kept"], state)
        assert math.isnan(mine["lost"][0][0]) and mine["unchanged"] and theirs["unchanged"], (case, capture)
        (_, *averaged), (skipped, *still) = mine["counted"]
        assert skipped == 1 and averaged == still
    for case in ON_GPU:
        if case[0] == "between":
            assert_same(one[("captured", *case[1:]), True]["kept"], one[case, True]["kept"])
