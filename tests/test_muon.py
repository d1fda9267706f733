"""Muon: the update, torch's Muon beside it, what it saves, settings as tensors, and matrices divided among ranks."""

import copy
import inspect
import math
import os
import pickle
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import replayed
from klora.kernels.newton_schulz import coefficients_of, newton_schulz_ref
from klora.model.muon import Muon, split_parameters
from klora.model.muon_sharded import owners

SHAPES = [(24, 40), (40, 24), (24, 24), (40, 24)]
BACKENDS = ["reference", "triton"]
TRITON_SLOW = ["reference", pytest.param("triton", marks=pytest.mark.slow)]


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


def snapshot(params, optimizer) -> list[torch.Tensor]:
    """Every weight and every momentum."""
    return [t.detach().clone() for p in params for t in (p, optimizer.state[p]["momentum"])]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_with_an_entry_that_is_not_finite_is_skipped_whole_and_counted(backend):
    """Groups and dtypes are several batches: all of them are skipped for one entry of the last."""
    params = parameters(shapes=SHAPES[:3])
    params += parameters(1, dtype=torch.float64 if backend == "reference" else torch.float16, shapes=SHAPES[:1])
    groups = [{"params": params[:2]}, {"params": params[2:], "momentum": 0.5}]
    optimizer = Muon(groups, 0.1, 0.9, 0.5, steps=1, backend=backend)
    train(params, optimizer, 1)
    before = snapshot(params, optimizer)
    for count, bad in enumerate((math.nan, math.inf, -math.inf), 1):
        set_gradients(params, count)
        params[-1].grad[3, 4] = bad
        optimizer.step()
        assert same(snapshot(params, optimizer), before) and optimizer.skipped_steps == count
    set_gradients(params, 9)
    optimizer.step()
    after = snapshot(params, optimizer)
    assert all(t.isfinite().all() and not torch.equal(t, b) for t, b in zip(after, before, strict=True))
    assert optimizer.skipped_steps == 3
    restored = Muon([{"params": params[:2]}, {"params": params[2:]}], backend=backend)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.skipped_steps == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_finite_gradients_are_served_and_a_sum_that_overflows_is_skipped(backend):
    params = parameters()
    optimizer = Muon(params, 0.1, 0.9, backend=backend)
    set_gradients(params, 0)
    for p in params:
        p.grad = p.grad.sign() * 3e38
    expected = [newton_schulz_ref(p.grad.double()) for p in params]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, b, update in zip(params, before, expected, strict=True):
        factor = max(1, p.size(0) / p.size(1)) ** 0.5
        torch.testing.assert_close(p.detach().double(), b - 0.1 * factor * update, rtol=1e-4, atol=1e-4)
    state = snapshot(params, optimizer)
    optimizer.step()  # 0.9 * 3e38 + 3e38 is beyond fp32
    assert same(snapshot(params, optimizer), state) and optimizer.skipped_steps == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_zeros_and_of_the_smallest_numbers_are_steps(backend):
    params = parameters()
    before = [p.detach().clone() for p in params]
    for p, value in zip(params, (0.0, 1e-45, 1e-38, 1e-31), strict=True):
        p.grad = torch.full_like(p, value)
    optimizer = Muon(params, 0.1, 0.9, 0.5, backend=backend)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), 0.95 * b)


def test_a_step_skipped_by_a_grad_scaler_changes_nothing():
    params = parameters()
    optimizer = Muon(params, 0.1, 0.9, 0.5)
    train(params, optimizer, 1)
    before = snapshot(params, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (math.inf, None):
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params) * (bad or 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(snapshot(params, optimizer), before) == (bad is not None)
    assert optimizer.skipped_steps == 0


def test_gradients_that_are_clipped_by_a_norm_that_is_not_finite_skip_the_step():
    params = parameters()
    optimizer = Muon(params, 0.1, 0.9, 0.5)
    train(params, optimizer, 1)
    before = snapshot(params, optimizer)
    params[0].grad[0, 0] = math.inf
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    assert same(snapshot(params, optimizer), before) and optimizer.skipped_steps == 1


# ---- what torch's optimizers can do


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("backend", TRITON_SLOW)
def test_a_copy_steps_as_the_original(copied, backend):
    params = parameters(shapes=SHAPES[:2])
    optimizer = Muon(params, 0.1, 0.9, 0.1, backend=backend)
    train(params, optimizer, 1)
    others, other = copied((params, optimizer))
    assert other.backend == backend
    for step in (1, 2):
        for some, one in ((params, optimizer), (others, other)):
            set_gradients(some, step)
            some[0].grad[0, 0] = math.nan if step == 1 else 0.0
            one.step()
    assert same(snapshot(params, optimizer), snapshot(others, other))
    assert optimizer.skipped_steps == other.skipped_steps == 1


@pytest.mark.parametrize("backend", TRITON_SLOW)
def test_dtypes_may_be_mixed_and_some_parameters_empty_or_frozen(backend):
    shapes = [*SHAPES[:2], (0, 8), (8, 0)]
    dtypes = [torch.float32, torch.float16, torch.float32, torch.float16]
    params = [parameters(k, dtype=d, shapes=[s])[0] for k, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]
    params += parameters(5, shapes=[(6, 6)])
    params[-1].requires_grad_(False)
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    together = Muon(params, 0.1, 0.9, 0.1, backend=backend)
    each = [Muon([p], 0.1, 0.9, 0.1, backend=backend) for p in alone]
    for step in range(2):
        for k, (p, q) in enumerate(zip(params[:4], alone[:4], strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k)).to(p.dtype)
            q.grad = p.grad.clone()
        together.step()
        for one in each:
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))
    assert together.skipped_steps == 0


@pytest.mark.parametrize("backend", TRITON_SLOW)
def test_gradients_and_parameters_of_any_strides_are_the_same_matrices(backend):
    """Transposed, with gaps, expanded, and at addresses that are no multiple of 16 bytes."""
    plain = parameters(shapes=[(24, 40)] * 4)
    whole = torch.empty(30, 50)
    odd = [torch.empty(40, 24).T, whole[3:27, 5:45], torch.empty(961)[1:].view(24, 40), torch.empty(24, 40)]
    strided = [torch.nn.Parameter(t) for t in odd]
    optimizers = [Muon(some, 0.1, 0.9, 0.1, backend=backend) for some in (plain, strided)]
    with torch.no_grad():
        for p, q in zip(plain, strided, strict=True):
            q.copy_(p)
    for step in range(2):
        set_gradients(plain, step)
        plain[3].grad = plain[3].grad[:1].expand(24, 40).contiguous()
        strided[0].grad = plain[0].grad.clone()
        strided[1].grad = plain[1].grad.T.contiguous().T if step else plain[1].grad.clone()
        strided[2].grad = torch.cat([torch.zeros(3), plain[2].grad.flatten()])[3:].view(24, 40)
        strided[3].grad = plain[3].grad[:1].expand(24, 40)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(*map(snapshot, (plain, strided), optimizers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", TRITON_SLOW)
def test_schedulers_move_a_rate_that_is_a_number_or_a_tensor(backend):
    ends = []
    for lr, capturable in ((0.1, False), (torch.tensor(0.1), False), (torch.tensor([0.1]), False), (0.1, True)):
        params = parameters(shapes=SHAPES[:1])
        optimizer = Muon(params, lr, 0.9, capturable=capturable, backend=backend)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=False)
        ends += params
    for p in ends[1:]:
        torch.testing.assert_close(p, ends[0], rtol=1e-6, atol=1e-6)


def test_it_takes_torchs_names():
    params = parameters()
    one = Muon(params, ns_steps=3, adjust_lr_fn="match_rms_adamw", ns_coefficients=(2.0, -1.5, 0.5), eps=1e-7)
    two = Muon(parameters(), steps=3, scale="match_rms_adamw", coefficients=(2.0, -1.5, 0.5))
    for name in ("steps", "scale", "coefficients"):
        assert one.param_groups[0][name] == two.param_groups[0][name]
    one.add_param_group({"params": parameters(2), "ns_steps": 2, "adjust_lr_fn": None})
    assert one.param_groups[1]["steps"] == 2 and one.param_groups[1]["scale"] == "original"
    one.param_groups[0]["ns_steps"] = 1
    train(params, one, 1)
    assert one.param_groups[0]["steps"] == 1
    with pytest.raises(ValueError, match=r"eps=1e-05 is not possible; allowed: 1e-07"):
        Muon(params, eps=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours", "value"),
    [("adjust_lr_fn", "scale", "x"), ("ns_steps", "steps", 0), ("ns_coefficients", "coefficients", (1.0, 2.0))],
)
def test_a_setting_is_refused_under_the_name_that_was_given(theirs, ours, value):
    for name in (theirs, ours):
        with pytest.raises(ValueError, match=f"^{name}=.* is not possible; allowed: "):
            Muon(parameters(), **{name: value})
        with pytest.raises(ValueError, match=f"^{name}=.* is not possible; allowed: "):
            Muon(parameters()).add_param_group({"params": parameters(2), name: value})
    state = Muon(parameters()).state_dict()
    state["param_groups"][0][theirs] = value
    with pytest.raises(ValueError, match=f"^{theirs}=.* is not possible; allowed: "):
        Muon(parameters()).load_state_dict(state)


def test_every_default_that_differs_from_torchs_is_in_the_first_line_of_its_docs():
    first = Muon.__doc__.splitlines()[0]
    ours, torchs = (inspect.signature(kind).parameters for kind in (Muon, torch.optim.Muon))
    shared = [name for name in ours if name in torchs and torchs[name].default is not inspect.Parameter.empty]
    assert {"lr", "momentum", "weight_decay", "nesterov", "ns_steps", "ns_coefficients", "adjust_lr_fn", "eps"} == {
        *shared
    }
    for name in ("lr", "momentum", "weight_decay"):
        assert f"{ours[name].default:g} ({torchs[name].default:g}" in first.replace("1e-3", "0.001")
    group = Muon(parameters()).param_groups[0]
    assert group["nesterov"] is torchs["nesterov"].default and group["steps"] == torchs["ns_steps"].default
    assert coefficients_of(group["coefficients"], 1) == [torchs["ns_coefficients"].default]
    assert ours["eps"].default == torchs["eps"].default and group["scale"] == "original"


@pytest.mark.parametrize("way", ["torch to ours", "ours to torch"])
def test_a_state_dict_goes_from_torchs_muon_to_ours_and_back(way):
    """The momentum decides where the next step goes: its gradient is small beside it."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    first, then = parameters(), parameters(1)
    source = Muon(first, **settings) if way == "ours to torch" else torch.optim.Muon(first, **settings)
    train(first, source, 3)
    with torch.no_grad():
        for p, q in zip(then, first, strict=True):
            p.copy_(q)
    if way == "ours to torch":
        target = torch.optim.Muon(then, lr=5.0)
        target.load_state_dict(source.torch_state_dict())
    else:
        target = Muon(then, lr=5.0, backend="triton")
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        assert target.param_groups[0]["steps"] == 5 and not target.param_groups[0]["capturable"]
    assert target.param_groups[0]["lr"] == 0.1 and target.param_groups[0]["momentum"] == 0.9
    start = [p.detach().clone() for p in first]
    for params, optimizer in ((first, source), (then, target)):
        set_gradients(params, 7)
        for p in params:
            p.grad *= 0.3
        optimizer.step()
    for p, q, s in zip(first, then, start, strict=True):
        assert (p - q).norm() < 0.03 * (p - s).norm()


def test_a_state_dict_goes_to_other_devices_dtypes_and_rates():
    params = parameters()
    optimizer = Muon(params, 0.1, 0.9, 0.1, capturable=True)
    train(params, optimizer, 2)
    halves = parameters(dtype=torch.bfloat16)
    plain = Muon(halves, backend="reference")
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not plain.param_groups[0]["capturable"] and float(plain.param_groups[0]["lr"]) == pytest.approx(0.1)
    for p, q in zip(params, halves, strict=True):
        assert torch.equal(plain.state[q]["momentum"], optimizer.state[p]["momentum"])
    back = Muon(params, capturable=True)
    older = Muon(parameters(), 0.3).state_dict()
    del older["param_groups"][0]["skipped_steps"]
    back.load_state_dict(older)
    assert back.param_groups[0]["capturable"] and isinstance(back.param_groups[0]["lr"], torch.Tensor)
    assert back.param_groups[0]["lr"] == 0.3 and back.skipped_steps == 0
    meta = Muon([torch.nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES], capturable=True)
    meta.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert meta.param_groups[0]["lr"].device.type == "meta"


def test_a_state_dict_of_settings_out_of_range_changes_nothing():
    params = parameters()
    optimizer = Muon(params, 0.1, 0.9)
    train(params, optimizer, 1)
    before, state = snapshot(params, optimizer), copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["momentum"] = 1.5
    with pytest.raises(ValueError, match=r"momentum=1.5 is not possible"):
        optimizer.load_state_dict(state)
    assert same(snapshot(params, optimizer), before) and optimizer.param_groups[0]["momentum"] == 0.9
    with pytest.raises(ValueError, match=r"differ from step to step"):
        Muon(params, coefficients="polar_express").torch_state_dict()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.conv = torch.nn.Conv1d(6, 6, 3)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6, bias=False)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.norm = torch.nn.LayerNorm(6)
        self.lm_head = torch.nn.Linear(6, 11, bias=False)
        self.tied = torch.nn.Linear(6, 11, bias=False)
        self.tied.weight = self.embed.weight


def test_a_model_is_split_into_matrices_for_muon_and_the_rest_for_adamw():
    model = Model()
    matrices, rest = split_parameters(model)
    assert [id(p) for p in matrices] == [id(model.up.weight), id(model.down.weight)]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, matrices + rest)) == sorted(trained)
    assert id(model.lm_head.weight) not in {id(p) for p in split_parameters(model)[0]}
    assert id(model.down.weight) not in {id(p) for p in split_parameters(model, heads=["down"])[0]}
    Muon(matrices)


@pytest.mark.parametrize(
    ("parameter", "match"),
    [
        (torch.zeros(3), r"shape \(3,\) was given.*split_parameters"),
        (torch.zeros(4, 3, 2, 2), r"shape \(4, 3, 2, 2\) was given.*split_parameters"),
        (torch.zeros(3, 3, dtype=torch.complex64), r"one of torch.complex64 was given"),
        (torch.zeros(3, 3).to(torch.float8_e5m2), r"one of torch.float8_e5m2 was given"),
        (torch.zeros(3, 3).to_sparse(), r"one of layout torch.sparse_coo was given"),
        (torch.zeros(1, 3).expand(3, 3), r"its entries share memory"),
    ],
)
def test_parameters_that_are_no_dense_matrices_are_refused(parameter, match):
    good = parameters()
    optimizer = Muon(good)
    with pytest.raises(ValueError, match=match):
        Muon([*parameters(1), torch.nn.Parameter(parameter)])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [torch.nn.Parameter(parameter)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_parameters_that_share_memory_are_refused_and_parts_of_one_are_not():
    whole = torch.randn(24, 40)
    for one, other in ((whole, whole), (whole[:13], whole[12:]), (whole, whole[3:5])):
        with pytest.raises(ValueError, match="two matrices of one call share memory"):
            Muon([{"params": [torch.nn.Parameter(one)]}, {"params": [torch.nn.Parameter(other)]}])
    p = torch.nn.Parameter(whole)
    with pytest.raises(ValueError, match="two matrices of one call share memory"):
        Muon([p, p])
    for one, other in ((whole[:12], whole[12:]), (whole[:, :20], whole[:, 20:])):
        Muon([torch.nn.Parameter(one), torch.nn.Parameter(other)])


def test_a_sparse_gradient_is_refused_before_anything_changes():
    params = parameters()
    embedding = torch.nn.Embedding(7, 5, sparse=True)
    optimizer = Muon([*params, embedding.weight], 0.1)
    set_gradients(params, 0)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"layout torch.sparse_coo is not possible.*split_parameters"):
        optimizer.step()
    assert same(params, before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"steps": 0}, "steps=0"),
        ({"coefficients": "x"}, "coefficients='x'"),
        ({"scale": "x"}, "scale='x'"),
        ({"lr": torch.ones(2)}, r"lr has shape \(2,\)"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"coefficients": (1.0, 2.0)}, r"coefficients=\(1.0, 2.0\)"),
        ({"ns_steps": 2.5}, "steps=2.5"),
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
            for step in range(4):
                for p in params:
                    p.grad = torch.zeros_like(p)
                for part in range(rank, 4, world):  # four parts of every gradient, whatever the number of ranks
                    some = parameters()
                    set_gradients(some, step, part)
                    for p, other in zip(params, some, strict=True):
                        p.grad += other.grad
                if step == 1 and rank == world - 1:
                    params[2].grad[0, 0] = math.nan
                before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
                optimizer.step()
                after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
                if step:
                    assert same(before, after) == (step == 1), f"step {step} of rank {rank} of {world}"
            assert optimizer.skipped_steps == 1
            assert copy.deepcopy(optimizer).process_group is group
            with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
                pickle.dumps(optimizer)
            held = sum(len(optimizer.state[p]) for p in params)
            torch.save(([p.detach() for p in params], held), f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_one_two_and_four_ranks_come_to_the_same_weights_and_skip_the_same_step():
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
        _, replay = replayed(two.step)
        for step in range(1, 4):
            for optimizer in (one, two):
                optimizer.param_groups[0]["lr"].fill_(0.1 / step)
                optimizer.param_groups[0]["momentum"].fill_(0.9 - 0.1 * step)
            set_gradients(eager, step)
            for p, q in zip(captured, eager, strict=True):
                p.grad.copy_(q.grad)
            one.step()
            replay()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_captured_step_that_is_not_finite_leaves_every_bit_and_counts_one(self, bad):
        """More matrices than one launch takes, of two dtypes; the entry is in the last of the second."""
        plain, captured = (
            parameters(device="cuda", shapes=[*self.shapes, *[(24, 40)] * 62])
            + parameters(1, "cuda", torch.bfloat16, shapes=self.shapes[3:])
            for _ in range(2)
        )
        one, two = (Muon(some, 0.1, 0.9, 0.1, capturable=True) for some in (plain, captured))
        for params, optimizer in ((plain, one), (captured, two)):
            set_gradients(params, 0)
            optimizer.step()
        _, replay = replayed(two.step)
        before = snapshot(captured, two)
        captured[-1].grad[99, 331] = bad
        replay()
        assert same(snapshot(captured, two), before) and two.skipped_steps == 1
        set_gradients(plain, 1)
        for p, q in zip(captured, plain, strict=True):
            p.grad.copy_(q.grad)
        one.step()
        replay()
        assert same(snapshot(captured, two), snapshot(plain, one)) and two.skipped_steps == 1
        assert not any(torch.equal(t, b) for t, b in zip(snapshot(captured, two), before, strict=True))

    def test_nothing_waits_for_the_gpu(self):
        params = parameters(device="cuda", shapes=self.shapes)
        optimizer = Muon(params, 0.1, 0.9, 0.1)
        set_gradients(params, 0)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_reference_and_kernel_take_the_same_steps(self):
        """The largest finite gradients are taken, a sum that overflows is not, the smallest are; any strides."""
        ends = []
        for backend in ("reference", "triton"):
            params = parameters(device="cuda", shapes=self.shapes)
            start = [p.detach().clone() for p in params]
            optimizer = Muon(params, 0.1, 0.9, 0.1, backend=backend)
            taken = []
            for value in (3e38, 3e38, 1e-38, 0.0):
                for p in params:
                    sign = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).sign().cuda()
                    p.grad = (sign * value).T.contiguous().T
                before = snapshot(params, optimizer) if taken else start
                optimizer.step()
                taken.append(not same(before, snapshot(params, optimizer) if taken else [p.detach() for p in params]))
            assert taken == [True, False, True, True] and optimizer.skipped_steps == 1
            ends.append([p.detach().clone() for p in params])
        for plain, ours, s in zip(*ends, start, strict=True):
            assert ours.isfinite().all() and (ours - plain).norm() <= 0.05 * (plain - s).norm()
