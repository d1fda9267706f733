"""Adam on a pool of slots: the kernel against the reference and against float64, and what it must not touch."""

import pytest
import torch
from conftest import replayed
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import assert_as_exact
from klora.kernels.lora_adam import lora_adam_, lora_adam_ref_
from klora.kernels.slots import check_slots
from torch import Tensor

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
STATE = ("params", "exp_avg", "exp_avg_sq", "step")


def pool(slots: int, size: int, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """A pool in the middle of its life: moments and counters are not zero."""
    torch.manual_seed(seed)
    tensors = {
        "params": torch.randn(slots, size),
        "grads": torch.randn(slots, size) * 1e-3,
        "exp_avg": torch.randn(slots, size) * 1e-3,
        "exp_avg_sq": torch.rand(slots, size) * 1e-6,
        "step": torch.randint(0, 2000, (slots,)),
        "lr": torch.rand(slots) * 0.01,
        "group_lr": torch.rand(size) * 3,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def copied(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {k: v.to(dtype, copy=True) if dtype and v.is_floating_point() else v.clone() for k, v in tensors.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 1023, 1024, 2500])
def test_a_step_is_as_exact_as_pytorchs(size, device):
    start = pool(5, size, device)
    slots = torch.tensor([3, -1, 0, 4], dtype=torch.int32, device=device)
    ours, plain, exact = copied(start), copied(start), copied(start, torch.float64)
    lora_adam_(**ours, slots=slots, backend="triton")
    lora_adam_ref_(**plain, slots=slots)
    lora_adam_ref_(**exact, slots=slots)
    moved = [0, 3, 4]
    assert_as_exact(*([tensors[name][moved] for name in STATE[:3]] for tensors in (ours, exact, plain)))
    for name in STATE[:3]:
        assert torch.equal(ours[name][1:3], start[name][1:3])
    assert torch.equal(ours["step"], exact["step"])
    for name in ("grads", "lr", "group_lr"):
        assert torch.equal(ours[name], start[name])


@pytest.mark.parametrize("device", DEVICES)
def test_fifty_steps_follow_the_exact_trajectory(device):
    start = pool(3, 1500, device)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        start[name].zero_()
    ours, plain, exact = copied(start), copied(start), copied(start, torch.float64)
    for number in range(50):
        grads = torch.randn(3, 1500, device=device) * 1e-3
        chosen = torch.tensor([0, 2] if number % 2 else [0, 1, 2], device=device)
        for tensors in (ours, plain, exact):
            tensors["grads"].copy_(grads)
        lora_adam_(**ours, slots=chosen, backend="triton")
        lora_adam_ref_(**plain, slots=chosen)
        lora_adam_ref_(**exact, slots=chosen)
    assert ours["step"].tolist() == [50, 25, 50]
    assert_as_exact(*([tensors[name] for name in STATE[:3]] for tensors in (ours, exact, plain)))


@settings(max_examples=10, deadline=None)
@given(data=st.data(), slots=st.integers(1, 6), size=st.integers(1, 40))
def test_only_the_chosen_slots_move(data, slots, size):
    chosen = data.draw(st.lists(st.integers(0, slots - 1), unique=True))
    places = data.draw(st.permutations(chosen + [-1] * data.draw(st.integers(0, 2))))
    start = pool(slots, size)
    ours, plain = copied(start), copied(start)
    lora_adam_(**ours, slots=torch.tensor(places, dtype=torch.int32), backend="triton")
    lora_adam_(**plain, slots=torch.tensor(places, dtype=torch.int32), backend="reference")
    for name in STATE:
        torch.testing.assert_close(ours[name], plain[name])
        for slot in set(range(slots)) - set(chosen):
            assert torch.equal(ours[name][slot], start[name][slot])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_without_slots_and_factors_every_row_moves_at_its_own_rate(backend):
    ours, plain = pool(3, 70), pool(3, 70)
    del ours["group_lr"]
    lora_adam_(**ours, backend=backend)
    lora_adam_ref_(**{**plain, "group_lr": torch.ones(70)})
    torch.testing.assert_close(ours["params"], plain["params"])
    assert torch.equal(ours["step"], plain["step"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_weight_decay_is_adamws_and_without_a_first_beta_the_first_moment_is_left_alone(beta1, backend, device):
    """Against torch.optim.AdamW, each parameter with a weight decay of its own."""
    ours = {name: t for name, t in pool(1, 70, device).items() if name != "group_lr"}
    for name in ("exp_avg_sq", "step"):
        ours[name].zero_()
    ours["exp_avg"].fill_(0.0 if beta1 else float("nan"))
    decay = torch.linspace(0.0, 5.0, 70, device=device)
    twins = [torch.nn.Parameter(p.double().clone()) for p in ours["params"][0]]
    lr = ours["lr"].item()
    groups = [{"params": [twin], "weight_decay": wd} for twin, wd in zip(twins, decay.double().tolist(), strict=True)]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(beta1, 0.95), eps=1e-10)
    for number in range(12):
        grads = torch.randn(1, 70, generator=torch.Generator().manual_seed(number)).to(device)
        ours["grads"].copy_(grads)
        for twin, grad in zip(twins, grads[0].double(), strict=True):
            twin.grad = grad
        adam.step()
        lora_adam_(**ours, betas=(beta1, 0.95), decay=decay, backend=backend)
    torch.testing.assert_close(ours["params"][0].double(), torch.stack(twins).detach(), rtol=1e-5, atol=1e-6)
    assert ours["exp_avg"].isnan().all() if not beta1 else ours["exp_avg"].all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_weight_decay_has_the_bits_of_a_decay_of_zero(device):
    ours, zero = pool(3, 1500, device), pool(3, 1500, device)
    lora_adam_(**ours, backend="triton")
    lora_adam_(**zero, decay=torch.zeros(1500, device=device), backend="triton")
    assert all(torch.equal(ours[name], zero[name]) for name in STATE)


def test_the_first_step_moves_each_parameter_by_its_learning_rate():
    tensors = pool(2, 50)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        tensors[name].zero_()
    before = tensors["params"].clone()
    lora_adam_(**tensors, backend="triton")
    moved = -tensors["lr"][:, None] * tensors["group_lr"] * tensors["grads"].sign()
    torch.testing.assert_close(tensors["params"], before + moved, rtol=1e-4, atol=1e-6)


def test_nothing_to_do_is_done():
    for slots, size, chosen in ((0, 8, None), (3, 0, None), (3, 8, torch.tensor([], dtype=torch.int32))):
        ours = pool(slots, size)
        before = copied(ours)
        lora_adam_(**ours, slots=chosen, backend="triton")
        assert all(torch.equal(ours[name], before[name]) for name in before)


def test_the_op_is_registered_as_torch_wants_it():
    tensors = pool(3, 30)
    order = ("params", "grads", "exp_avg", "exp_avg_sq", "step", "lr", "group_lr")
    for decay, beta1 in ((None, 0.9), (torch.ones(30), 0.0)):
        rest = torch.tensor([2, 0], dtype=torch.int32), decay, beta1, 0.95, 1e-10
        torch.library.opcheck(torch.ops.klora.lora_adam_, tuple(tensors[name] for name in order) + rest)


def test_it_is_compiled_whole():
    ours, compiled = pool(3, 30), pool(3, 30)
    torch.compile(lora_adam_, fullgraph=True, backend="aot_eager")(**compiled, backend="triton")
    lora_adam_(**ours, backend="triton")
    assert all(torch.equal(ours[name], compiled[name]) for name in STATE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"params": torch.zeros(3)}, r"params is float32 \[3\]; wanted \[slots, P\]"),
        ({"grads": torch.zeros(3, 9)}, r"grads is .* \[3, 9\]; wanted float32 \[3, 8\]"),
        ({"exp_avg": torch.zeros(3, 8, dtype=torch.float16)}, "exp_avg is float16"),
        ({"exp_avg_sq": torch.zeros(8, 3).T}, r"exp_avg_sq has strides \(1, 3\)"),
        ({"step": torch.zeros(3, dtype=torch.int32)}, r"step is int32 \[3\]; wanted int64 \[3\]"),
        ({"lr": torch.zeros(4)}, "lr is"),
        ({"lr": torch.zeros(3, device="meta")}, "lr is .* on meta; wanted .* on cpu"),
        ({"group_lr": torch.zeros(3)}, "group_lr is"),
        ({"decay": torch.zeros(3)}, "decay is"),
        ({"slots": torch.zeros(2)}, "slots is float32"),
        ({"slots": torch.zeros(2, 2, dtype=torch.int32)}, r"slots is int32 \[2, 2\]"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps -1.0"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        lora_adam_(**{**pool(3, 8), "backend": "triton", **change})


def test_slots_outside_the_pool_change_nothing_and_the_check_finds_them():
    ours = pool(3, 8)
    before = copied(ours)
    outside = torch.tensor([3, -7], dtype=torch.int32)
    lora_adam_(**ours, slots=outside, backend="triton")
    assert all(torch.equal(ours[name], before[name]) for name in before)
    with pytest.raises(ValueError, match=r"slots \[3, -7\] are not possible; allowed: -1 and 0 to 2"):
        check_slots(outside, 3, distinct=True)
    with pytest.raises(ValueError, match="name a slot twice"):
        check_slots(torch.tensor([1, -1, 1]), 3, distinct=True)
    check_slots(torch.tensor([-1, 2, -1, 0]), 3, distinct=True)
    check_slots(torch.tensor([], dtype=torch.int32), 3, distinct=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestOnTheGpu:
    def test_many_programs_advance_a_counter_once_and_give_the_same_bits(self):
        start = pool(96, 50_000, "cuda")
        slots = torch.randperm(96, device="cuda")[:64].int()
        results = []
        for _ in range(20):
            tensors = copied(start)
            lora_adam_(**tensors, slots=slots)
            results.append(tensors)
        named = torch.zeros(96, dtype=torch.bool, device="cuda").index_fill_(0, slots.long(), True)
        assert torch.equal(results[0]["step"], start["step"] + named)
        for other in results[1:]:
            assert all(torch.equal(other[name], results[0][name]) for name in STATE)

    def test_it_is_captured_in_a_graph_and_compiled_whole(self):
        direct, captured, compiled = (pool(8, 5000, "cuda") for _ in range(3))
        slots = torch.tensor([5, -1, 1], dtype=torch.int32, device="cuda")
        lora_adam_(**pool(8, 5000, "cuda"), slots=slots)
        _, replay = replayed(lambda: lora_adam_(**captured, slots=slots))
        step = torch.compile(lora_adam_, fullgraph=True)
        for _ in range(3):
            lora_adam_(**direct, slots=slots)
            replay()
            step(**compiled, slots=slots)
        for name in STATE:
            assert torch.equal(captured[name], direct[name]) and torch.equal(compiled[name], direct[name])
