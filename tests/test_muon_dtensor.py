"""Muon over DTensors: whole matrices made of the ranks' rows, on 1, 2 and 4 processes, and what is refused."""

import copy
import math
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import klora.model.muon_dtensor as muon_dtensor
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from klora.bench.tolerance import assert_as_exact
from klora.kernels import linear
from klora.model.muon import Muon
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

SHAPES = [(24, 40), (40, 24), (9, 12), (7, 5), (1, 6), (3, 8)]
"""On four ranks 9 rows are 3, 3, 3, 0, and one is on the first alone."""
ROWS, WHOLE = [Shard(0)], [Replicate()]


def drawn(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def placed(tensor: Tensor, mesh, placements=ROWS) -> DTensor:
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)


def parameters(mesh=None, placements=ROWS, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    """Plain ones without a mesh."""
    tensors = drawn(0, dtype, shapes)
    return [nn.Parameter(t if mesh is None else placed(t, mesh, placements)) for t in tensors]


def set_gradients(params, step: int) -> None:
    for p, gradient in zip(params, drawn(step, params[0].dtype, [p.shape for p in params]), strict=True):
        p.grad = placed(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient.to(p.device)


def train(params, optimizer, steps: int = 3, first: int = 1) -> list[Tensor]:
    """Whole weights, then whole momenta."""
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()
    return snapshot(params, optimizer)


def snapshot(params, optimizer) -> list[Tensor]:
    tensors = [*(p.detach() for p in params), *(optimizer.state[p]["momentum"] for p in params)]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).clone() for t in tensors]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def follows_plain(mesh, placements=ROWS, shapes=SHAPES, **options) -> None:
    """As near to float64 as plain Muon is."""
    runs = []
    for dtype, on in ((torch.float32, mesh), (torch.float64, None), (torch.float32, None)):
        params = parameters(on, placements, dtype, shapes)
        chosen = {**options, "backend": "reference"} if dtype == torch.float64 else options
        runs.append(train(params, Muon(params, 0.1, 0.9, 0.1, **chosen)))
    assert_as_exact(*runs)


# ---- cases: each runs on every rank of a mesh


def rows_of_any_number_follow_plain_muon(mesh):
    follows_plain(mesh)
    follows_plain(mesh, nesterov=False, scale="match_rms_adamw")


def the_kernels_follow_plain_muon(mesh):
    follows_plain(mesh, shapes=[(9, 12), (5, 7)], steps=2, backend="triton")


def settings_may_be_tensors(mesh):
    follows_plain(mesh, capturable=True)


def replicated_parameters_are_plain_muon_bit_for_bit(mesh):
    params, plain = parameters(mesh, WHOLE), parameters()
    assert same(*(train(some, Muon(some, 0.1, 0.9, 0.1)) for some in (params, plain)))


def sharded_and_replicated_ones_share_a_step(mesh):
    params, plain = parameters(mesh), parameters()
    params[1::2] = parameters(mesh, WHOLE)[1::2]
    ours, theirs = (train(some, Muon(some, 0.1, 0.9, 0.1)) for some in (params, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def gradients_that_are_parts_of_a_sum_are_summed(mesh):
    for placements in (ROWS, WHOLE):
        params, plain = parameters(mesh, placements), parameters()
        set_gradients(plain, 1)
        for p, q in zip(params, plain, strict=True):
            p.grad = DTensor.from_local(q.grad / mesh.size(), mesh, [Partial()])
        ends = []
        for some in (params, plain):
            optimizer = Muon(some, 0.1, 0.9)
            optimizer.step()
            ends.append(snapshot(some, optimizer))
        torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def momentum_lies_as_its_parameter_and_is_fp32(mesh):
    params = parameters(mesh, dtype=torch.bfloat16)
    optimizer = Muon(params, 0.1, 0.9)
    train(params, optimizer, 1)
    for p in params:
        momentum = optimizer.state[p]["momentum"]
        assert momentum.dtype == torch.float32 and p.dtype == torch.bfloat16
        assert momentum.placements == p.placements and momentum.to_local().shape == p.to_local().shape


def each_matrix_is_orthogonalised_once(mesh):
    """And the costly ones on different ranks."""
    counted, make = [], muon_dtensor.MuonDirections
    muon_dtensor.MuonDirections = lambda gradients, *rest, **more: (
        counted.extend(g.shape for g in gradients) or make(gradients, *rest, **more)
    )
    try:
        params = parameters(mesh)
        train(params, Muon(params), 1)
    finally:
        muon_dtensor.MuonDirections = make
    every = [None] * mesh.size()
    dist.all_gather_object(every, counted, group=mesh.get_group())
    assert sorted(shape for some in every for shape in some) == sorted(map(torch.Size, SHAPES))
    large = [sum(min(shape) == 24 for shape in some) for some in every]
    assert max(large) == (1 if mesh.size() > 1 else 2)


def an_entry_on_one_rank_that_is_not_finite_skips_the_step_of_all(mesh):
    params = parameters(mesh)
    optimizer = Muon([{"params": params[:2]}, {"params": params[2:], "momentum": 0.5}], 0.1, 0.9, 0.5)
    before = train(params, optimizer, 1)
    for count, bad in enumerate((math.nan, math.inf), 1):
        set_gradients(params, 2)
        if mesh.get_local_rank() == 0:
            params[4].grad.to_local()[0, 0] = bad
        optimizer.step()
        assert same(snapshot(params, optimizer), before) and optimizer.skipped_steps == count
    set_gradients(params, 2)
    optimizer.step()
    after = snapshot(params, optimizer)
    assert optimizer.skipped_steps == 2 and not any(map(torch.equal, after, before))


def the_largest_finite_gradients_are_served(mesh):
    """g + mu (mu m + g) overflows, mu m + g does not."""
    params, plain = parameters(mesh), parameters()
    ends = []
    for some in (params, plain):
        optimizer = Muon(some, 0.1, 0.9)
        set_gradients(some, 1)
        for p in some:
            p.grad = p.grad.sign() * 3e38
        optimizer.step()
        ends.append([p.detach() for p in some])
        assert optimizer.skipped_steps == 0
    torch.testing.assert_close([p.full_tensor() for p in ends[0]], ends[1], rtol=1e-5, atol=1e-5)


def groups_have_their_own_settings_and_some_parameters_rest(mesh):
    ends = []
    for on in (mesh, None):
        params = parameters(on)
        optimizer = Muon([{"params": params[:3]}, {"params": params[3:], "lr": 0.3, "momentum": 0.5}], 0.1, 0.9, 0.1)
        for step in (1, 2):
            set_gradients(params, step)
            params[0].grad = params[5].grad = None
            optimizer.step()
        assert "momentum" not in optimizer.state[params[0]]
        ends.append([p.full_tensor() if on else p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def a_state_dict_goes_on_to_the_bit_and_moves_between_layouts(mesh):
    params = parameters(mesh)
    through = train(params, Muon(params, 0.1, 0.9, 0.1), 3)
    params, plain = parameters(mesh), parameters()
    optimizer, other = Muon(params, 0.1, 0.9, 0.1), Muon(plain, 0.1, 0.9, 0.1)
    whole = train(plain, other, 2)
    train(params, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    assert same(train(*copy.deepcopy((params, optimizer)), 1, first=3), through)
    assert all(isinstance(one["momentum"], DTensor) for one in state["state"].values())
    resumed = Muon(params, 0.5)
    resumed.load_state_dict(state)
    assert same(train(params, resumed, 1, first=3), through)
    from_plain, to_plain, moved = Muon(params), Muon(plain), Muon(parameters(mesh, WHOLE))
    from_plain.load_state_dict(other.state_dict())
    to_plain.load_state_dict(state)
    moved.load_state_dict(state)
    for k, p in enumerate(params):
        first = from_plain.state[p]["momentum"]
        assert first.placements == p.placements and torch.equal(first.full_tensor(), whole[len(params) + k])
        torch.testing.assert_close(to_plain.state[plain[k]]["momentum"], whole[len(params) + k])
        last = moved.state[moved.param_groups[0]["params"][k]]["momentum"]
        assert last.placements == (Replicate(),) and last.to_local().shape == p.shape
    torchs = from_plain.torch_state_dict()["state"]
    assert all(isinstance(one["momentum_buffer"], DTensor) for one in torchs.values())


class Mlp(nn.Module):
    """Two matrices, the first by one of our ops: fully_shard gives a forward plain parameters."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 10, bias=False), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(linear(x, self.up.weight)))


def mlp(mesh=None) -> Mlp:
    torch.manual_seed(3)
    module = Mlp()
    if mesh is not None:
        module = fully_shard(module.to(mesh.device_type), mesh=mesh)
    return module


def curve_of(module, optimizer, rank: int, world: int, steps: int = 4) -> list[Tensor]:
    """Losses of eight rows, of which each rank has its share."""
    x, y = torch.randn(8, 12, generator=torch.Generator().manual_seed(5)), torch.linspace(-1, 1, 48).view(8, 6)
    x, y = (t[rank::world].to(next(module.parameters()).device) for t in (x, y))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def trains_as_plain(mesh, **tolerance) -> None:
    module, plain = mlp(mesh), mlp().to(mesh.device_type)
    losses = curve_of(module, Muon(module.parameters(), 0.05, 0.9, 0.1), mesh.get_local_rank(), mesh.size())
    expected = curve_of(plain, Muon(plain.parameters(), 0.05, 0.9, 0.1), 0, 1)
    for loss in losses:
        dist.all_reduce(loss, group=mesh.get_group())
    torch.testing.assert_close([loss / mesh.size() for loss in losses], expected, **tolerance)
    assert expected[-1] < expected[0]
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert isinstance(p, DTensor) and p.placements == (Shard(0),)
        torch.testing.assert_close(p.detach().full_tensor(), q.detach(), **tolerance)


def a_model_of_fully_shard_trains_as_a_plain_one(mesh):
    trains_as_plain(mesh, rtol=1e-5, atol=1e-5)


def a_checkpoint_of_fully_shard_resumes(mesh, folder):
    rank, world = mesh.get_local_rank(), mesh.size()
    module = mlp(mesh)
    optimizer = Muon(module.parameters(), 0.05, 0.9, 0.1)
    curve_of(module, optimizer, rank, world, 2)
    path = folder / f"checkpoint-{world}"
    dcp.save(
        {"optimizer": get_optimizer_state_dict(module, optimizer)}, checkpoint_id=path, process_group=mesh.get_group()
    )
    module.zero_grad()  # PyTorch then makes the state that it loads into by a step of zeros
    resumed = Muon(module.parameters(), 0.5)
    state = {"optimizer": get_optimizer_state_dict(module, resumed)}
    dcp.load(state, checkpoint_id=path, process_group=mesh.get_group())
    set_optimizer_state_dict(module, resumed, state["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.05
    for p in module.parameters():
        one, other = (some.state[p]["momentum"] for some in (optimizer, resumed))
        assert one.to_local().any() or not one.to_local().numel()
        assert other.placements == (Shard(0),) and torch.equal(one.to_local(), other.to_local())


def what_cannot_be_updated_is_refused(mesh):
    good, allowed = parameters(mesh), r"allowed: DTensors placed Shard\(0\) or Replicate\(\) on one mesh"
    with pytest.raises(ValueError, match=r"process_group is given beside DTensors.*leave it out"):
        Muon(good, process_group=mesh.get_group())
    with pytest.raises(ValueError, match=rf"parameter 6 of shape \(24, 40\) is a plain tensor.*{allowed}"):
        Muon([*good, *parameters()[:1]])
    optimizer = Muon(good)
    with pytest.raises(ValueError, match=rf"parameter 6 of shape \(24, 40\) is a plain tensor.*{allowed}"):
        optimizer.add_param_group({"params": parameters()[:1]})
    assert len(optimizer.param_groups) == 1
    local = torch.ones(3, 4)
    of_columns = placed(torch.ones(8, 4), mesh, [Shard(1)])
    own_rows = local if mesh.get_local_rank() == 3 else local[:2]  # torch gives 3, 3, 3, 0
    uneven = DTensor.from_local(own_rows, mesh, ROWS, shape=(9, 4), stride=(4, 1))
    partial_sum = DTensor.from_local(local, mesh, [Partial()])
    for wrong in (of_columns, partial_sum, *([uneven] if mesh.size() == 4 else [])):
        with pytest.raises(
            ValueError, match=rf"parameter 1 of shape .* placed .* on a mesh of shape .*{allowed}.*redis"
        ):
            Muon([good[0], nn.Parameter(wrong)])
    if mesh.size() == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(0)]):
            with pytest.raises(ValueError, match=rf"on a mesh of shape \(2, 2\); {allowed}"):
                Muon([nn.Parameter(distribute_tensor(torch.ones(8, 4), square, placements))])
        with pytest.raises(ValueError, match=rf"parameter 1 of shape \(8, 4\) is on .*another on.*{allowed}"):
            Muon([good[0], nn.Parameter(distribute_tensor(torch.ones(8, 4), square["a"], ROWS))])
    with pytest.raises(ValueError, match="Muon takes matrices"):
        Muon([nn.Parameter(placed(torch.ones(8), mesh))])
    with pytest.raises(ValueError, match="share memory"):
        Muon([{"params": good[:1]}, {"params": [nn.Parameter(good[0].detach())]}])


def one_rank_is_plain_muon_bit_for_bit_and_those_outside_its_mesh_do_nothing(mesh):
    """Of another mesh, of the first rank alone."""
    alone = DeviceMesh("cpu", [0])
    params, plain = parameters(alone), parameters()
    ours, theirs = (Muon(some, 0.1, 0.9, 0.1) for some in (params, plain))
    for step in (1, 2):
        set_gradients(params, step), set_gradients(plain, step)
        ours.step(), theirs.step()
    if dist.get_rank() == 0:
        assert same([p.to_local() for p in params], plain)
        assert same(
            [ours.state[p]["momentum"].to_local() for p in params], [theirs.state[p]["momentum"] for p in plain]
        )
    assert ours.skipped_steps == 0


CASES = [
    rows_of_any_number_follow_plain_muon,
    the_kernels_follow_plain_muon,
    settings_may_be_tensors,
    replicated_parameters_are_plain_muon_bit_for_bit,
    sharded_and_replicated_ones_share_a_step,
    gradients_that_are_parts_of_a_sum_are_summed,
    momentum_lies_as_its_parameter_and_is_fp32,
    each_matrix_is_orthogonalised_once,
    an_entry_on_one_rank_that_is_not_finite_skips_the_step_of_all,
    the_largest_finite_gradients_are_served,
    groups_have_their_own_settings_and_some_parameters_rest,
    a_state_dict_goes_on_to_the_bit_and_moves_between_layouts,
    a_model_of_fully_shard_trains_as_a_plain_one,
    a_checkpoint_of_fully_shard_resumes,
    what_cannot_be_updated_is_refused,
    one_rank_is_plain_muon_bit_for_bit_and_those_outside_its_mesh_do_nothing,
]
ON = {case.__name__: (2, 4) for case in CASES} | {"the_kernels_follow_plain_muon": (2,)}
ON |= {"one_rank_is_plain_muon_bit_for_bit_and_those_outside_its_mesh_do_nothing": (4,)}


def _rank(rank: int, folder: str) -> None:
    """Every case on the meshes of the first 2 and of all 4 ranks; a file for each that failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = Path(folder)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=4, timeout=limit)
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("which", "of"))["of"]
    for world, mesh in ((2, half), (4, init_device_mesh("cpu", (4,)))):
        for case in CASES:
            if world in ON[case.__name__]:
                own = place / f"{rank // world}"
                own.mkdir(exist_ok=True)
                try:
                    partial(case, folder=own)(mesh) if "folder" in case.__code__.co_varnames[:2] else case(mesh)
                except BaseException:  # a test's own failure is no Exception
                    (place / f"{case.__name__}-{world}-{rank}.failed").write_text(traceback.format_exc())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """The folder in which four processes have left what failed."""
    with tempfile.TemporaryDirectory() as folder:
        # A server that has imported everything forks the four: spawned ones would import it all four times.
        mp.get_context("forkserver").set_forkserver_preload(["test_muon_dtensor"])
        mp.start_processes(_rank, args=(folder,), nprocs=4, start_method="forkserver")
        yield Path(folder)


@pytest.mark.parametrize(("case", "world"), [(name, world) for name, worlds in ON.items() for world in worlds])
def test_on_several_ranks(ranks, case, world):
    for failed in ranks.glob(f"{case}-{world}-*.failed"):
        pytest.fail(f"{failed.stem}: {failed.read_text()}")


def test_without_dtensors_their_package_is_not_imported(monkeypatch):
    """None in sys.modules: an import of it would raise."""
    for name in ("torch.distributed.tensor", "klora.model.muon_dtensor"):
        monkeypatch.setitem(sys.modules, name, None)
    params = parameters()
    optimizer = Muon(params, 0.1, 0.9)
    train(params, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    linear(torch.ones(3, 40), params[0])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fully_shard_on_two_gpus():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_gpu_rank, args=(folder,), nprocs=2, start_method="spawn")


def _gpu_rank(rank: int, folder: str) -> None:
    """Products in fp16: the weights may be some roundings of a step apart."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cuda", (2,))
    trains_as_plain(mesh, rtol=5e-3, atol=5e-3)
    for capturable in (False, True):
        ends = []
        for on in (mesh, None):
            params = parameters(on, shapes=[(512, 512), (1536, 512), (512, 1536), (101, 332), (1, 64)])
            if on is None:
                params = [nn.Parameter(p.detach().cuda()) for p in params]
            start = [p.detach().clone() for p in params]
            optimizer = Muon(params, 0.02, 0.9, 0.1, capturable=capturable)
            weights = train(params, optimizer, 3)[: len(params)]
            ends.append([w - (s.full_tensor() if on else s) for w, s in zip(weights, start, strict=True)])
        for ours, plain in zip(*ends, strict=True):
            assert (ours - plain).norm() <= 0.05 * plain.norm()
    params = parameters(mesh)
    optimizer = Muon(params, 0.1, 0.9, 0.5)
    before = train(params, optimizer, 1)
    set_gradients(params, 2)
    if rank == 1:
        params[0].grad.to_local()[0, 0] = math.nan
    optimizer.step()
    assert same(snapshot(params, optimizer), before) and optimizer.skipped_steps == 1
    set_gradients(params, 2)
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    dist.destroy_process_group()
