"""Muon: the update, torch's Muon beside it, what it saves, settings as tensors, and matrices divided among ranks."""

import copy
import os
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from klora.kernels.newton_schulz import newton_schulz_ref
from klora.model.muon import Muon
from klora.model.muon_sharded import owners

SHAPES = [(24, 40), (40, 24), (24, 24), (40, 24)]
BACKENDS = ["reference", "triton"]


def parameters(seed: int = 0, device: str = "cpu", dtype=torch.float32, shapes=SHAPES) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=draw).to(device, dtype)) for s in shapes]


def set_gradients(params, step: int, rank: int = 0) -> None:
    draw = torch.Generator().manual_seed(1000 * rank + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw).to(p.device, p.dtype)


def train(params, optimizer, steps: int, first: int = 0) -> list[torch.Tensor]:
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_update_is_the_one_in_the_docstring(backend, scale, nesterov):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params, 0.1, 0.9, 0.5, nesterov=nesterov, scale=scale, backend=backend)
    momenta = [torch.zeros(p.shape) for p in params]
    for step in range(2):
        set_gradients(params, step)
        for k, p in enumerate(params):
            momenta[k] = 0.9 * momenta[k] + p.grad
            update = newton_schulz_ref(p.grad + 0.9 * momenta[k] if nesterov else momenta[k])
            rows, columns = p.shape
            factor = max(1, rows / columns) ** 0.5 if scale == "original" else 0.2 * max(rows, columns) ** 0.5
            before[k] = (1 - 0.1 * 0.5) * before[k] - 0.1 * factor * update
        optimizer.step()
    for p, expected, momentum in zip(params, before, momenta, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(optimizer.state[p]["momentum"], momentum)


def follow_torchs_muon(adjust: str, device: str, **options) -> None:
    """A two-layer regression; torch's runs Newton-Schulz in bf16, so only the loss can be the same.

    How near is near: within 2% of torch's curve, and what torch's own curve moves when the examples are read in another
    order, which changes nothing but the rounding.
    """
    torch.manual_seed(0)
    inputs = torch.randn(64, 12)
    targets = torch.tanh(inputs @ torch.randn(12, 16) * 0.3) @ torch.randn(16, 8)
    inputs, targets = inputs.to(device), targets.to(device)
    lr = 0.01 if adjust == "original" else 0.01 / (0.2 * 4)

    def curve_of(make, x=inputs, y=targets) -> torch.Tensor:
        """Means over 50 steps, [20]."""
        torch.manual_seed(1)
        params = [torch.nn.Parameter((torch.randn(shape) * 0.3).to(device)) for shape in ((16, 12), (8, 16))]
        optimizer, curve = make(params), []
        for step in range(1000):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / 1000)
            optimizer.zero_grad()
            loss = (torch.tanh(x @ params[0].T) @ params[1].T - y).square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        return torch.stack(curve).view(20, 50).mean(1).cpu()

    def torchs(params):
        return torch.optim.Muon(params, lr=lr, momentum=0.9, weight_decay=0.02, adjust_lr_fn=adjust)

    ours = curve_of(lambda params: Muon(params, lr=lr, momentum=0.9, weight_decay=0.02, scale=adjust, **options))
    theirs, again = curve_of(torchs), curve_of(torchs, inputs.flip(0), targets.flip(0))
    assert ours[-1] < 0.1 * ours[0]
    scatter = ((again - theirs) / theirs).abs().max()
    assert scatter < 0.1
    assert ((ours - theirs) / theirs).abs().max() <= 0.02 + scatter


@pytest.mark.slow
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_a_thousand_steps_follow_torchs_muon(adjust):
    follow_torchs_muon(adjust, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_goes_on_from_its_state_dict_to_the_bit(backend, tmp_path):
    params = parameters()
    through = train(params, Muon(params, 0.1, 0.9, 0.1, backend=backend), 4)
    params = parameters()
    optimizer = Muon(params, 0.1, 0.9, 0.1, backend=backend)
    train(params, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = Muon(params, 0.5, 0.1, backend=backend)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert resumed.param_groups[0]["lr"] == 0.1
    for found, expected in zip(train(params, resumed, 2, first=2), through, strict=True):
        assert torch.equal(found, expected)


def test_momentum_of_bf16_parameters_is_fp32_also_after_a_load():
    params = parameters(dtype=torch.bfloat16)
    optimizer = Muon(params)
    train(params, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    loaded = Muon(params)
    loaded.load_state_dict(state)
    for p in params:
        assert p.dtype == torch.bfloat16 and loaded.state[p]["momentum"].dtype == torch.float32
        assert torch.equal(loaded.state[p]["momentum"], optimizer.state[p]["momentum"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_as_settings_and_groups_of_their_own(backend):
    plain, tensors = parameters(), parameters()
    groups = [{"params": plain[:2]}, {"params": plain[2:], "lr": 0.3, "momentum": 0.5}]
    one = Muon(groups, 0.1, 0.9, 0.1, backend=backend)
    groups = [{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.3, "momentum": 0.5}]
    two = Muon(groups, 0.1, 0.9, 0.1, capturable=True, backend=backend)
    assert all(isinstance(group["lr"], torch.Tensor) for group in two.param_groups)
    for step in range(2):
        for params, optimizer in ((plain, one), (tensors, two)):
            set_gradients(params, step)
            optimizer.step()
        one.param_groups[0]["lr"] = 0.2
        two.param_groups[0]["lr"].fill_(0.2)
    for a, b in zip(plain, tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_parameters_without_gradient_rest_and_the_closure_is_called():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params, 0.1)
    params[1].grad = torch.randn(params[1].shape)

    def closure():
        assert torch.is_grad_enabled()
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0 and optimizer.step() is None
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_no_number_moves_no_weight(backend):
    params = parameters()
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    params[0].grad[0, 0] = float("nan")
    Muon(params, 0.1, 0.9, backend=backend).step()
    assert torch.equal(params[0], before[0])
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"steps": 0}, "steps=0"),
        ({"coefficients": "x"}, "coefficients='x'"),
        ({"scale": "x"}, "scale='x'"),
        ({"lr": torch.tensor(0.1)}, "lr is a tensor; that takes capturable=True"),
    ],
)
def test_settings_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Muon(parameters(), **options)
    with pytest.raises(ValueError, match="takes real floating-point matrices"):
        Muon([torch.nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))])


# ---- among ranks


def test_matrices_are_divided_by_cost():
    shapes = [torch.Size(s) for s in [(512, 512)] * 20 + [(1536, 512), (512, 1536)] * 10 + [(256, 512)] * 20]
    cost = [min(s) ** 2 * (2 * max(s) + min(s)) for s in shapes]
    for world in (1, 2, 4, 8):
        owner = owners(shapes, world)
        load = [sum(c for c, o in zip(cost, owner, strict=True) if o == rank) for rank in range(world)]
        assert max(load) <= 1.05 * sum(cost) / world
    assert set(owners(shapes[:3], 8)) == {0, 1, 2}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    for world in (1, 2, 4):
        group = dist.new_group(list(range(world)))
        if rank < world:
            params = parameters()
            optimizer = Muon(params, 0.1, 0.9, 0.1, process_group=group)
            for step in range(3):
                for p in params:
                    p.grad = torch.zeros_like(p)
                for part in range(rank, 4, world):  # four parts of every gradient, whatever the number of ranks
                    some = parameters()
                    set_gradients(some, step, part)
                    for p, other in zip(params, some, strict=True):
                        p.grad += other.grad
                optimizer.step()
            held = sum(len(optimizer.state[p]) for p in params)
            torch.save(([p.detach() for p in params], held), f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_one_two_and_four_ranks_come_to_the_same_weights():
    with tempfile.TemporaryDirectory() as folder:
        # A server that has imported everything forks the four: spawned ones would import it all four times.
        mp.get_context("forkserver").set_forkserver_preload(["klora.model.muon", "torch.distributed", "test_muon"])
        mp.start_processes(_rank, args=(folder,), nprocs=4, start_method="forkserver")
        found = {
            world: [torch.load(os.path.join(folder, f"{world}-{rank}.pt")) for rank in range(world)]
            for world in (1, 2, 4)
        }
    alone = found[1][0][0]
    for world, ranks in found.items():
        assert sum(held for _, held in ranks) == len(SHAPES)  # momentum lies with the owner alone
        for weights, _ in ranks:
            for one, other, first in zip(weights, alone, ranks[0][0], strict=True):
                assert torch.equal(one, first), f"replicas of {world} ranks differ"
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestOnGpu:
    shapes = [(512, 512), (1536, 512), (512, 1536), (256, 512), (100, 332)]

    def test_the_kernels_follow_the_reference_with_the_same_bits_twice(self):
        """The reference multiplies in bf16: 5% of the way is its own error."""
        ends = []
        for backend in ("triton", "triton", "reference"):
            params = parameters(device="cuda", shapes=self.shapes)
            start = [p.detach().clone() for p in params]
            ends.append(train(params, Muon(params, 0.02, 0.9, 0.1, capturable=True, backend=backend), 3))
        for one, two, plain, s in zip(*ends, start, strict=True):
            assert torch.equal(one, two) and (one - plain).norm() <= 0.05 * (plain - s).norm()

    @pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
    def test_a_thousand_steps_of_the_kernels_follow_torchs_muon(self, adjust):
        follow_torchs_muon(adjust, "cuda", backend="triton")

    def test_a_captured_step_is_the_eager_one_with_changing_rates(self):
        eager, captured = (parameters(device="cuda", shapes=self.shapes) for _ in range(2))
        one = Muon(eager, 0.1, 0.9, 0.1, capturable=True)
        two = Muon(captured, 0.1, 0.9, 0.1, capturable=True)
        for params, optimizer in ((eager, one), (captured, two)):
            set_gradients(params, 0)
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            two.step()
        for step in range(1, 4):
            for optimizer in (one, two):
                optimizer.param_groups[0]["lr"].fill_(0.1 / step)
                optimizer.param_groups[0]["momentum"].fill_(0.9 - 0.1 * step)
            set_gradients(eager, step)
            for p, q in zip(captured, eager, strict=True):
                p.grad.copy_(q.grad)
            one.step()
            graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
