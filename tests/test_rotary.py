"""Rotary position embedding alone: both pairings, partial heads, any positions, and what it refuses."""

import pytest
import torch
from conftest import DTYPES, replayed
from klora.bench.tolerance import assert_as_exact
from klora.kernels import apply_rotary, apply_rotary_ref, norm_rotary, rms_norm_ref, rotary_tables
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def draw(B=2, S=9, H=4, G=2, d=16, rotated=16, dtype=torch.float32, length=20) -> tuple[list[Tensor], Tensor]:
    """q, k, their gradients, cos, sin; positions of two packed documents, the second one's from 3 on."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, S, heads, d) for heads in (H, G, H, G)]
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    positions = torch.cat([torch.arange(S // 2), 3 + torch.arange(S - S // 2)]).expand(B, S).clone()
    positions[-1] = positions[-1].flip(0)
    return [*tensors, *rotary_tables(length, rotated, 100.0, DEVICE)], positions.to(DEVICE)


def both_ref(q, k, *about, interleaved=False) -> tuple[Tensor, Tensor]:
    return apply_rotary_ref(q, *about, interleaved), apply_rotary_ref(k, *about, interleaved)


def run(function, inputs, *about, **more) -> list[Tensor]:
    """q, k and the gradients of both."""
    q, k, dq, dk, cos, sin = inputs
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    outputs = function(*leaves, cos, sin, *about, **more)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, (dq, dk))]


def check(inputs, positions, interleaved) -> None:
    ours = run(apply_rotary, inputs, positions, interleaved=interleaved, backend="triton")
    exact = run(both_ref, [t.double() for t in inputs], positions, interleaved=interleaved)
    assert_as_exact(ours, exact, run(both_ref, inputs, positions, interleaved=interleaved))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("H", "G", "d", "rotated"), [(4, 2, 16, 16), (5, 1, 20, 6), (2, 2, 80, 32), (1, 1, 2, 2)])
def test_it_is_as_exact_as_pytorch(H, G, d, rotated, interleaved, dtype):
    inputs, positions = draw(2, 9, H, G, d, rotated, dtype)
    for given in (positions, positions[1].int(), None):
        check(inputs, given, interleaved)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_each_pair_is_a_complex_number_times_a_unit_one(backend):
    (q, k, _, _, cos, sin), positions = draw(rotated=12)
    unit = torch.complex(cos, sin)[positions][:, :, None]
    for interleaved in (False, True):
        out, _ = apply_rotary(q, k, cos, sin, positions, interleaved=interleaved, backend=backend)

        def pairs(x, interleaved=interleaved):
            first, second = (x[..., 0:12:2], x[..., 1:12:2]) if interleaved else (x[..., :6], x[..., 6:12])
            return torch.complex(first, second)

        torch.testing.assert_close(pairs(out), pairs(q) * unit)
        assert torch.equal(out[..., 12:], q[..., 12:])


def test_it_is_norm_rotary_without_its_norm():
    (q, k, _, _, cos, sin), _ = draw()
    normed = norm_rotary(q, k, cos[:9], sin[:9], backend="triton")
    plain = apply_rotary(rms_norm_ref(q), rms_norm_ref(k), cos, sin, backend="triton")
    torch.testing.assert_close(plain, normed)


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_documents_are_rotated_as_if_alone(interleaved):
    (q, k, _, _, cos, sin), _ = draw(B=1, S=9)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4], device=DEVICE)
    about = {"interleaved": interleaved, "backend": "triton"}
    packed = apply_rotary(q, k, cos, sin, positions, **about)
    for part in (slice(0, 4), slice(4, 9)):
        alone = apply_rotary(q[:, part], k[:, part], cos, sin, **about)
        assert all(torch.equal(x[:, part], y) for x, y in zip(packed, alone, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_position_outside_the_tables_makes_its_token_nan(backend):
    (q, k, _, _, cos, sin), positions = draw(rotated=8)
    positions[0, 2], positions[1, 4], positions[1, 5] = 20, -1, 2**32 + 1
    out, _ = apply_rotary(q, k, cos, sin, positions, backend=backend)
    is_nan = out[..., :8].isnan().all(-1).all(-1)
    assert is_nan.nonzero().tolist() == [[0, 2], [1, 4], [1, 5]] and not out[..., 8:].isnan().any()
    assert not out[~is_nan].isnan().any()


def test_any_layout_and_second_derivatives():
    inputs, positions = draw()
    q, k, dq, dk, *tables = inputs
    expected = run(apply_rotary, inputs, positions, backend="triton")
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)], [t.mT.contiguous().mT for t in (dq, dk)]
    found = run(apply_rotary, [*apart[0], *apart[1], *tables], positions, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    leaves = [t.double().requires_grad_() for t in (q[:1, :2, :1], k[:1, :2, :1])]
    tables = [t.double() for t in tables]
    assert torch.autograd.gradgradcheck(lambda q, k: apply_rotary(q, k, *tables), leaves)
    q = q.clone().requires_grad_()
    out, _ = apply_rotary(q, k, *inputs[4:], backend="triton")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(dq.sum(), q)[0], torch.full_like(q, 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_op_is_registered_as_torch_wants_it(interleaved):
    (q, k, _, _, cos, sin), positions = draw(S=3, rotated=12)
    leaves = [t.requires_grad_() for t in (q, k)]
    for given in (None, positions):
        torch.library.opcheck(torch.ops.klora.apply_rotary, (*leaves, cos, sin, given, interleaved, False))
    compiled = torch.compile(apply_rotary, fullgraph=True, backend="aot_eager")
    inputs = [*leaves, torch.ones_like(q), torch.ones_like(k), cos, sin]
    about = {"interleaved": interleaved, "backend": "triton"}
    torch.testing.assert_close(run(compiled, inputs, positions, **about), run(apply_rotary, inputs, positions, **about))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(2, 9, 64)}, r"q is float32 \[2, 9, 64\]; wanted .*\[B, S, H, d\]"),
        ({"k": torch.zeros(2, 9, 2, 8)}, r"k is float32 .*; wanted float32 \[2, 9, G, 16\]"),
        ({"k": torch.zeros(2, 9, 0, 16)}, "G is 0; wanted a positive number"),
        ({"cos": torch.zeros(20, 9)}, r"sin is float32 \[20, 8\]; wanted .*\[20, 9\]"),
        ({"cos": torch.zeros(20, 9), "sin": torch.zeros(20, 9)}, "wanted .* r from 2 to d = 16"),
        ({"cos": torch.zeros(8, 8), "sin": torch.zeros(8, 8)}, "without positions an L of at least S = 9"),
        ({"cos": torch.zeros(20, 8, requires_grad=True)}, "cos requires a gradient"),
        ({"positions": torch.zeros(9)}, r"positions is float32 \[9\]; wanted int32 or int64 \[9\]"),
        ({"positions": torch.zeros(2, 8, dtype=torch.int64)}, r"positions is int64 \[2, 8\]; wanted .* \[2, 9\]"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    (q, k, _, _, cos, sin), _ = draw()
    good = {name: t.cpu() for name, t in zip(("q", "k", "cos", "sin"), (q, k, cos, sin), strict=True)}
    with pytest.raises(ValueError, match=says):
        apply_rotary(**{**good, "backend": "reference", **change})


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize(
        ("B", "S", "H", "G", "d", "rotated"),
        [(4, 1023, 32, 8, 128, 128), (2, 300, 16, 16, 256, 64), (3, 77, 5, 1, 20, 6)],
    )
    def test_it_is_as_exact_as_pytorch(self, B, S, H, G, d, rotated, interleaved, dtype):
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))  # what empty() hands out next is not zero
        inputs, positions = draw(B, S, H, G, d, rotated, dtype, length=2048)
        for given in (positions, None):
            check(inputs, given, interleaved)

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_the_same_bits_every_time_in_a_graph_and_compiled(self, interleaved):
        inputs, positions = draw(4, 500, 8, 4, 64, 32, torch.bfloat16, length=1024)
        about = {"interleaved": interleaved}
        first = run(apply_rotary, inputs, positions, **about)
        held, replay = replayed(lambda: run(apply_rotary, inputs, positions, **about), warm_up=1)
        replay()
        compiled = run(torch.compile(apply_rotary, fullgraph=True), inputs, positions, **about)
        for results in (held, compiled, run(apply_rotary, inputs, positions, **about)):
            assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True))
