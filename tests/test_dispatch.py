"""What every op shares: it runs on the GPU of its tensors, refuses in one wording, copies what is not aligned."""

import re
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import klora.kernels
import pytest
import torch
from klora.kernels import dispatch
from klora.kernels.dispatch import (
    DTYPES,
    INTEGERS,
    aligned,
    custom_op,
    device_of,
    empty_aligned,
    empty_grad,
    expect,
    expect_multiples,
    expect_one_of,
    expect_rows,
    expect_slots,
    gpu_of,
    is_aligned,
    is_hopper,
    l2_bytes,
    multiprocessors,
    on_its_device,
    padded_rank,
    refuse_in_reference,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def tensor_on(device: str) -> Mock:
    device = torch.device(device)
    gpu = -1 if device.index is None else device.index
    return Mock(spec=torch.Tensor, device=device, is_cuda=device.type == "cuda", get_device=lambda: gpu)


@pytest.mark.parametrize("arguments", [lambda t: (t,), lambda t: (2, "x", None, t), lambda t: (1.0, [t, t], "y")])
def test_the_device_is_that_of_the_first_tensor(arguments):
    for device, number in (("cuda:1", 1), ("cpu", -1)):
        assert gpu_of(*arguments(tensor_on(device)), tensor_on("cuda:0")) == number
    assert gpu_of() == gpu_of([], (), "z") == -1


def test_the_current_gpu_is_changed_only_for_tensors_of_another(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("klora.kernels.dispatch.gpu_of", lambda number: number)
    function = on_its_device(lambda number: number)
    assert [function(number) for number in (-1, 0, 1)] == [-1, 0, 1] and chosen == [1]
    with device_of(-1), device_of(2):
        assert chosen == [1, 2]


def test_the_schema_and_the_result_are_the_functions_own():
    @custom_op("klora_test::scaled", mutates_args=("x",))
    def scaled(x: torch.Tensor, parts: list[torch.Tensor], factor: float = 2.0) -> torch.Tensor:
        x.mul_(factor)
        return x + parts[0]

    x = torch.ones(3)
    assert torch.equal(scaled(x, [torch.ones(3)], factor=4.0), torch.full((3,), 5.0)) and torch.equal(
        x, 4 * torch.ones(3)
    )
    schema = str(torch.ops.klora_test.scaled.default._schema)
    assert schema == "klora_test::scaled(Tensor(a0!) x, Tensor[] parts, float factor=2.) -> Tensor"


def test_no_op_is_registered_without_its_device():
    sources = Path(klora.kernels.__file__).parent.rglob("*.py")
    direct = [path.name for path in sources if re.search(r"torch\.library\.(custom_op|Library)\(", path.read_text())]
    assert direct == ["dispatch.py"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_op_on_the_second_gpu_while_the_first_is_current():
    x, weight = torch.randn(64, 128, device="cuda:1").bfloat16(), torch.randn(96, 128, device="cuda:1").bfloat16()
    with torch.cuda.device(0):
        x.requires_grad_()
        out = klora.kernels.linear(x, weight)
        out.sum().backward()
    exact = x.detach().double() @ weight.double().T
    assert out.device.index == 1 and ((out.double() - exact).norm() < 0.01 * exact.norm()).item()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(64, 128), rtol=0.02, atol=0.1)


X = torch.ones(2, 3, 8)
EXPECTED = [
    (dict(shape=("B", "S", 9)), r"x is float32 [2, 3, 8]; wanted [B, S, 9]"),
    (dict(shape=("B", "S")), r"x is float32 [2, 3, 8]; wanted [B, S]"),
    (dict(shape=("...", 9)), r"x is float32 [2, 3, 8]; wanted [..., 9]"),
    (dict(shape=("...", 1, 2, 3, 8)), r"x is float32 [2, 3, 8]; wanted [..., 1, 2, 3, 8]"),
    (dict(shape=()), r"x is float32 [2, 3, 8]; wanted []"),
    (dict(shape=(2, 3, 8), dtypes=INTEGERS), r"x is float32 [2, 3, 8]; wanted int32 or int64 [2, 3, 8]"),
    (dict(shape=("...", "D"), dtypes=(torch.bool,)), r"x is float32 [2, 3, 8]; wanted bool [..., D]"),
    (
        dict(shape=("...", "D"), device=torch.device("meta")),
        r"x is float32 [2, 3, 8] on cpu; wanted [..., D] on meta",
    ),
]


@pytest.mark.parametrize(("wanted", "says"), EXPECTED)
def test_a_tensor_that_does_not_fit_is_described_beside_what_is_wanted(wanted, says):
    with pytest.raises(ValueError) as error:
        expect("x", X, **wanted)
    assert str(error.value) == says


def test_the_rule_s_own_sentence():
    with pytest.raises(ValueError) as error:
        expect("x", torch.ones(2, 3, dtype=torch.float64), ("...", "D"), DTYPES)
    assert str(error.value) == "x is float64 [2, 3]; wanted bfloat16, float16 or float32 [..., D]"


def test_what_fits_passes():
    for shape in ((2, 3, 8), ("B", "S", "D"), ("...", "D"), ("...", 8), ("...", 2, 3, 8), ("...", "B", 3, "D")):
        expect("x", X, shape, DTYPES, X.device)
    expect("one", torch.ones(()), ())
    expect("one", torch.ones(3), ("...",))


def test_a_list_for_a_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"^slots is \[0, 1\]; wanted a tensor, int32 or int64 \[2\] on cpu$"):
        expect_slots([0, 1], 2, torch.device("cpu"))
    with pytest.raises(TypeError, match=r"^x is None; wanted a tensor, \[B\]$"):
        expect("x", None, ("B",))


def test_sizes_choices_and_slots_in_the_same_words():
    expect_multiples(16, D=16, N=4096)
    for size in (0, -16, 24, 32):
        with pytest.raises(ValueError, match=f"^D is {size}; wanted a positive multiple of 16 up to 16$"):
            expect_multiples(16, 16, D=size)
    with pytest.raises(ValueError, match="^d is 8; wanted one of 16, 32$"):
        expect_one_of("d", 8, (16, 32))
    with pytest.raises(ValueError, match="^slots is missing, and 3 slots are not one for each of 2 documents$"):
        expect_slots(None, 2, torch.device("cpu"), pool=3)
    assert expect_slots(None, 2, torch.device("cpu"), pool=2) is None
    assert expect_slots(torch.arange(4)[::2], 2, torch.device("cpu")).is_contiguous()
    with pytest.raises(ValueError, match=r"grad has strides \[8, 1, 4\]; wanted each slot contiguous"):
        expect_rows("grad", torch.ones(3, 2, 4).transpose(1, 2), torch.ones(3, 4, 2), DTYPES)
    with pytest.raises(ValueError, match="^grads is given, and the reference has no backward of its own; wanted"):
        refuse_in_reference(x0_grad=None, grads=X)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_copies_what_the_copy_engine_cannot_reach_and_nothing_else(dtype):
    whole = torch.arange(10 * 48).to(dtype).view(10, 48)
    for view in (whole, whole[:, :32], whole[2:, 16:], whole[:0], whole[:, :0]):
        assert aligned(view) is view
    for view in (whole[:, 1:], whole[:, :3].contiguous(), whole.T[:7], whole[:, ::2], whole.view(-1)[1:-3]):
        copy = aligned(view)
        assert is_aligned(copy) and torch.equal(copy, view)
    assert is_aligned(empty_aligned(whole, 4, 5, 7)) and empty_aligned(whole, 4, 5, 7).shape == (4, 5, 7)


def test_the_facts_of_a_device():
    cpu = torch.device("cpu")
    assert multiprocessors(cpu) == 2 and l2_bytes(cpu) == 50 * 2**20 and not is_hopper(cpu)
    assert [padded_rank(rank) for rank in (1, 16, 17, 32, 100, 128)] == [16, 16, 32, 32, 128, 128]


def test_an_op_that_writes_what_it_is_given_needs_no_fake():
    """opcheck and torch.compile of an op without results, some of whose outputs are left out."""

    @custom_op("klora_test::halved_", mutates_args=("out", "other"))
    def halved_(x: torch.Tensor, out: torch.Tensor | None, other: torch.Tensor | None) -> None:
        for place in (out, other):
            if place is not None:
                torch.mul(x, 0.5, out=place)

    x = torch.rand(5)
    torch.library.opcheck(torch.ops.klora_test.halved_.default, (x, torch.empty(5), None))

    def half(x, wanted):
        out = empty_grad(x)
        halved_(x, out, empty_grad(x, wanted))
        return out

    for wanted in (False, True):
        assert torch.equal(torch.compile(half, fullgraph=True, backend="aot_eager")(x, wanted), x / 2)


def test_a_second_derivative_is_refused_where_an_op_writes_its_results():
    x = torch.rand(2, 3, 16, requires_grad=True)
    out = klora.kernels.rms_norm(x, backend="triton")
    with pytest.raises(RuntimeError, match="rms_norm_backward_ has no gradient of its own"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_a_written_tensor_counts_the_change():
    @custom_op("klora_test::zeroed_", mutates_args=("out",))
    def zeroed_(x: torch.Tensor, out: torch.Tensor) -> None:
        out.zero_()

    x, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    square = (leaf * x).sum()
    zeroed_(leaf.detach(), x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def scale_op(name: str, calls: list):
    """An op with a gradient; `calls` gets what each call of its function was given."""

    @custom_op(name, mutates_args=())
    def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
        calls.append(x)
        return x * factor

    @scaled.register_fake
    def _(x, factor):
        return torch.empty_like(x)

    def setup(ctx, inputs, output):
        ctx.factor = inputs[1]

    scaled.register_autograd(lambda ctx, dout: (dout * ctx.factor, None), setup_context=setup)
    return scaled


def listed_op(name: str):
    @custom_op(name, mutates_args=())
    def listed(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        return [part.clone() for part in x.split(sizes)]

    def setup(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])

    def backward(ctx, douts):
        return torch.cat([douts[0], torch.zeros_like(douts[1])]), None

    listed.register_autograd(backward, setup_context=setup)
    return listed


@pytest.fixture
def through_torch_ops(monkeypatch):
    """How many calls went through the dispatcher."""
    counted = []
    look = dispatch._look
    monkeypatch.setattr(dispatch, "_look", lambda arguments: look(arguments) or counted.append(1))
    return counted


def test_the_shortcut_and_torch_ops_give_the_same(through_torch_ops):
    x, scaled, listed = torch.rand(3), scale_op("klora_test::same", []), listed_op("klora_test::listed")
    for op, rest in ((scaled, 2.0), (listed, [1, 2])):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        ours, theirs = op(leaves[0], rest), op.overload(leaves[1], rest)
        assert type(ours) is type(theirs)
        for one, other in zip(*((out if isinstance(out, list) else [out]) for out in (ours, theirs)), strict=True):
            assert torch.equal(one, other) and one.requires_grad == other.requires_grad
        for out, leaf in ((ours, leaves[0]), (theirs, leaves[1])):
            (out[0] if isinstance(out, list) else out).sum().backward()
            assert leaf.grad is not None
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        with torch.no_grad():
            assert not any(out.requires_grad for out in [op(leaves[0], rest)] if isinstance(out, torch.Tensor))
        with torch.inference_mode():
            out = op(x, rest)
            assert all(one.is_inference() for one in (out if isinstance(out, list) else [out]))
    assert not through_torch_ops


class Subclass(torch.Tensor):
    pass


@pytest.mark.slow
def test_whoever_listens_in_between_is_heard(through_torch_ops):
    """Modes, transforms, tracers, profilers, subclasses and tensors that stand for others take the dispatcher."""
    seen = []
    scaled, x = scale_op("klora_test::heard", seen), torch.rand(3)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(func)
            return func(*args, **(kwargs or {}))

    heard = []
    with Mode():
        scaled(x, 2.0)
    assert scaled.overload in heard
    with FakeTensorMode() as mode:
        assert type(scaled(mode.from_tensor(x), 2.0)) is not torch.Tensor
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        scaled(x, 2.0)
    assert "klora_test::heard" in {event.name for event in profiled.events()}
    scaled(x.as_subclass(Subclass), 2.0)
    assert len(through_torch_ops) >= 4
    z = torch.complex(x, x).conj().imag
    assert z.is_neg() and torch.equal(scaled(z, 2.0), -2 * x) and not seen[-1].is_neg()
    zeros = torch._efficientzerotensor(3)
    assert torch.equal(scaled(zeros, 2.0), torch.zeros(3)) and not seen[-1]._is_zerotensor()
    nodes = make_fx(lambda x: scaled(x, 2.0))(x).graph.nodes
    assert scaled.overload in {node.target for node in nodes}
    rows = torch.rand(2, 3)
    assert torch.equal(torch.vmap(lambda x: scaled(x, 2.0))(rows), 2 * rows)  # PyTorch's own loop over the rows
    with pytest.raises(RuntimeError, match="functorch|setup_context"):
        torch.func.grad(lambda x: scaled(x, 2.0).sum())(x)
    with pytest.raises(RuntimeError, match="forward AD|jvp|forward-mode"), forward_ad.dual_level():
        scaled(forward_ad.make_dual(x.clone().requires_grad_(), x), 2.0)
    before, leaf = len(through_torch_ops), x.clone().requires_grad_()
    compiled = torch.compile(lambda x: scaled(x, 2.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(leaf).sum(), leaf)[0], torch.full((3,), 2.0))
    assert before == len(through_torch_ops)  # a compiled graph calls torch.ops itself


def test_names_defaults_and_dead_wrappers_take_the_dispatcher(through_torch_ops):
    scaled, leaked = scale_op("klora_test::named", []), []
    assert torch.equal(scaled(torch.ones(2), factor=3.0), torch.full((2,), 3.0))
    torch.func.grad(lambda x: leaked.append(x) or x.sum())(torch.ones(2))
    assert torch.equal(scaled(leaked[0], 2.0), torch.full((2,), 2.0)) and len(through_torch_ops) == 1


def test_an_op_without_a_gradient_says_so_when_one_is_asked_for():
    @custom_op("klora_test::without", mutates_args=())
    def without(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    out = without(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        out.sum().backward()
