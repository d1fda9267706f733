"""What every op shares: it runs on the GPU of its tensors, refuses in one wording, copies what is not aligned."""

import re
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import klora.kernels
import pytest
import torch
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
    is_aligned,
    is_hopper,
    l2_bytes,
    multiprocessors,
    on_its_device,
    padded_rank,
    refuse_in_reference,
)


def tensor_on(device: str) -> Mock:
    device = torch.device(device)
    gpu = -1 if device.index is None else device.index
    return Mock(spec=torch.Tensor, device=device, is_cuda=device.type == "cuda", get_device=lambda: gpu)


@pytest.mark.parametrize("arguments", [lambda t: (t,), lambda t: (2, "x", None, t), lambda t: (1.0, [t, t], "y")])
def test_the_device_is_that_of_the_first_tensor(arguments):
    for device, number in (("cuda:1", 1), ("cpu", -1)):
        assert device_of(*arguments(tensor_on(device)), tensor_on("cuda:0")) == number
    assert device_of() == device_of([], (), "z") == -1


def test_the_current_gpu_is_changed_only_for_tensors_of_another(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("klora.kernels.dispatch.device_of", lambda number: number)
    function = on_its_device(lambda number: number)
    assert [function(number) for number in (-1, 0, 1)] == [-1, 0, 1] and chosen == [1]


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
    with pytest.raises(RuntimeError, match="residual_norm_backward_ has no gradient of its own"):
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
