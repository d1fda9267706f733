"""SwiGLU alone and as an MLP: as exact as PyTorch, the same bits in every batch, and what it keeps."""

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import for_this_gpu
from klora.bench.tolerance import assert_as_exact
from klora.kernels import swiglu, swiglu_mlp, swiglu_mlp_ref, swiglu_ref
from torch import Tensor

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def draw(*shapes, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Rows first, then weights [N, K] scaled to keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(t if number == 0 else t / t.size(-1) ** 0.5).to(DEVICE, dtype) for number, t in enumerate(drawn)]


def mlp_inputs(rows=7, D=32, hidden=48, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x, gate, up, down."""
    return draw((rows, D), (hidden, D), (hidden, D), (D, hidden), dtype=dtype, seed=seed)


def gates(rows, F, dtype=torch.float32, seed=0) -> list[Tensor]:
    """gate and up, of about the size 3: both tails of the sigmoid."""
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(rows, F, generator=generator)).to(DEVICE, dtype) for _ in range(2)]


def results(function, inputs, wanted=None, **more) -> list[Tensor]:
    """The output and the gradients of the `wanted` inputs (of all)."""
    wanted = range(len(inputs)) if wanted is None else wanted
    leaves = [t.detach().requires_grad_(number in wanted) for number, t in enumerate(inputs)]
    out = function(*leaves, **more)
    generator = torch.Generator().manual_seed(9)
    dout = torch.randn(out.shape, generator=generator).to(torch.bfloat16 if CUDA else torch.float16)
    return [out.detach(), *torch.autograd.grad(out, [leaves[number] for number in wanted], dout.to(out))]


def check(function, reference, draws, wanted=None) -> None:
    ours = [results(function, drawn, wanted, backend="triton") for drawn in draws]
    exact = [results(reference, [t.double() for t in drawn], wanted) for drawn in draws]
    plain = [results(reference, drawn, wanted) for drawn in draws]
    assert_as_exact(*([torch.stack(same) for same in zip(*some, strict=True)] for some in (ours, exact, plain)))


def same(ours, others) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "F"), [(1, 5), (70, 48), (3, 3001)])
def test_it_and_its_gradients_are_as_exact_as_pytorchs(rows, F, dtype):
    check(swiglu, swiglu_ref, [gates(rows, F, dtype, seed) for seed in range(8 if rows == 1 else 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "D", "hidden"), [(1, 16, 48), (70, 32, 144), (5, 36, 50)])
def test_the_mlp_and_its_gradients_are_as_exact_as_pytorchs(rows, D, hidden, dtype):
    draws = [mlp_inputs(rows, D, hidden, dtype, seed) for seed in range(8 if rows < 8 else 1)]
    check(swiglu_mlp, swiglu_mlp_ref, draws)
    check(swiglu_mlp, swiglu_mlp_ref, draws, [0])


def test_the_equations_written_out():
    x, gate, up, down = (t.double() for t in mlp_inputs())
    g, u = x @ gate.T, x @ up.T
    torch.testing.assert_close(swiglu(g, u, backend="reference"), g * torch.sigmoid(g) * u)
    torch.testing.assert_close(swiglu_mlp(x, gate, up, down, backend="reference"), (g * torch.sigmoid(g) * u) @ down.T)


def test_each_gradient_alone_has_the_bits_that_it_has_with_the_others():
    for function, inputs in ((swiglu, gates(9, 20)), (swiglu_mlp, mlp_inputs())):
        whole = results(function, inputs, backend="triton")
        for number in range(len(inputs)):
            alone = results(function, inputs, [number], backend="triton")
            assert torch.equal(alone[1], whole[1 + number]) and torch.equal(alone[0], whole[0])


def test_a_row_has_the_same_bits_wherever_it_lies():
    x, *weights = mlp_inputs(rows=75)
    whole = results(lambda leaf: swiglu_mlp(leaf, *weights, backend="triton").square(), [x])
    out = swiglu_mlp(x, *weights, backend="triton")
    for rows in (slice(3, 4), slice(10, 75), slice(0, 64)):
        assert torch.equal(swiglu_mlp(x[rows], *weights, backend="triton"), out[rows])
    assert same(whole, results(lambda leaf: swiglu_mlp(leaf, *weights, backend="triton").square(), [x]))


def test_halves_of_one_product_and_any_leading_dimensions():
    both = torch.randn(2, 3, 5, 64, device=DEVICE)
    wanted = results(swiglu_ref, both.chunk(2, -1))
    for given in (both.chunk(2, -1), [t.mT.contiguous().mT for t in both.chunk(2, -1)]):
        torch.testing.assert_close(results(swiglu, given, backend="triton"), wanted)
    one = [t[0, 0, 0] for t in both.chunk(2, -1)]
    torch.testing.assert_close(swiglu(*one, backend="triton"), swiglu_ref(*one))
    leaf = both[..., :32].clone().requires_grad_()
    swiglu(leaf, leaf, backend="triton").sum().backward()  # the gradient of a sum is one number, expanded
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(swiglu_ref(leaf, leaf).sum(), leaf)[0])
    x, *weights = mlp_inputs(rows=30)
    found = results(swiglu_mlp, [x.view(2, 3, 5, 32), *weights], backend="triton")
    wanted = results(swiglu_mlp_ref, [x.view(2, 3, 5, 32), *weights])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_nan_and_infinity(dtype):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([0.0, -0.0, -30.0, 30.0, -200.0, 200.0, inf, nan], dtype=dtype, device=DEVICE)[:, None]
    inputs = gate, torch.full_like(gate, 0.5)
    ours, plain = results(swiglu, inputs, backend="triton"), results(swiglu_ref, inputs)
    torch.testing.assert_close([t[:6] for t in ours], [t[:6] for t in plain])
    torch.testing.assert_close(ours[0], plain[0], equal_nan=True)


def test_what_is_kept_is_two_tensors_of_hidden_rows():
    kept: list[Tensor] = []
    x, *weights = mlp_inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu_mlp(x.requires_grad_(), *weights, backend="triton")
    assert [t.shape for t in kept].count((7, 48)) == 2
    with torch.no_grad():
        assert [t.numel() for t in torch.ops.klora.swiglu_mlp(x, *weights, False)] == [7 * 32, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do_is_done(dtype):
    for rows, D, hidden in ((0, 32, 48), (3, 32, 0), (3, 0, 48)):
        inputs = [torch.zeros(s, dtype=dtype) for s in ((rows, D), (hidden, D), (hidden, D), (D, hidden))]
        torch.testing.assert_close(results(swiglu_mlp, inputs, backend="triton"), results(swiglu_mlp_ref, inputs))


def test_bad_arguments_are_refused():
    x, gate, up, down = (t.cpu() for t in mlp_inputs())
    for call, says in (
        (lambda: swiglu(x, gate), r"up is float32 \[48, 32\]; wanted float32 \[7, 32\]"),
        (lambda: swiglu(x, x.half()), "up is float16 .*; wanted float32"),
        (lambda: swiglu(x, x.to("meta")), "up is .* on meta; wanted .* on cpu"),
        (lambda: swiglu(x.double(), x.double(), backend="triton"), "gate is float64 .*; wanted bfloat16, float16 or"),
        (lambda: swiglu(x, x, backend="cuda"), "backend is 'cuda'"),
        (lambda: swiglu_mlp(x, gate, up[1:], down), r"up is float32 \[47, 32\]; wanted float32 \[48, 32\]"),
        (lambda: swiglu_mlp(x, gate, up, up), r"down is float32 \[48, 32\]; wanted float32 \[32, 48\]"),
        (lambda: swiglu_mlp(x, gate.half(), up, down), "gate is float16 .*; wanted float32"),
        (lambda: swiglu_mlp(x, gate, up, down, backend="cuda"), "backend is 'cuda'"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


@pytest.mark.slow
def test_the_ops_are_registered_as_torch_wants_them():
    x, gate, up, down = mlp_inputs(3, 16, 16)
    leaves = [t.clone().requires_grad_() for t in (x, gate, up, down)]
    torch.library.opcheck(torch.ops.klora.swiglu, leaves[:1] * 2)
    torch.library.opcheck(torch.ops.klora.swiglu_backward_, (x, x, x, torch.empty_like(x), torch.empty_like(x)))
    torch.library.opcheck(torch.ops.klora.swiglu_mlp, (*leaves, True))
    torch.library.opcheck(torch.ops.klora.swiglu_mlp, (x, gate, up, down, False))
    g, dg, du = (torch.ones(3, 16) for _ in range(3))
    torch.library.opcheck(torch.ops.klora.swiglu_mlp_dgate_dup_, (x, g, g.clone(), down, dg, du))
    torch.library.opcheck(torch.ops.klora.swiglu_mlp_dx_, (dg, du, gate, up, torch.empty_like(x)))


def test_they_are_traced_whole():
    for function, inputs in ((swiglu, gates(9, 20)), (swiglu_mlp, mlp_inputs())):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            results(compiled, inputs, backend="triton"), results(function, inputs, backend="triton")
        )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("rows", "D", "hidden"), [(4000, 512, 1536), (777, 80, 208), (130, 36, 50)])
    def test_they_are_as_exact_as_pytorchs(self, rows, D, hidden, dtype):
        rows = for_this_gpu(rows, hidden)
        check(swiglu, swiglu_ref, [gates(rows, hidden, dtype)])
        check(swiglu_mlp, swiglu_mlp_ref, [mlp_inputs(rows, D, hidden, dtype)])
        check(swiglu_mlp, swiglu_mlp_ref, [mlp_inputs(rows, D, hidden, dtype)], [0])

    def test_a_row_has_the_same_bits_in_every_batch_and_run(self):
        x, *weights = mlp_inputs(20_000, 512, 1536, torch.bfloat16)
        dout = x.flip(0).contiguous()

        def both(rows):
            leaf = x[rows].detach().requires_grad_()
            out = swiglu_mlp(leaf, *weights)
            return out.detach(), torch.autograd.grad(out, leaf, dout[rows])[0]

        whole = both(slice(None))
        for rows in (1, 17, 1000, 4096, 16384, 20_000):
            for start in (0, 20_000 - rows):
                taken = slice(start, start + rows)
                assert same(both(taken), [t[taken] for t in whole]), f"{rows} rows from {start}"

    def test_they_are_captured_in_a_graph_and_compiled_whole(self):
        inputs = mlp_inputs(500, 128, 384, torch.bfloat16)
        expected = results(swiglu_mlp, inputs)
        compiled = torch.compile(swiglu_mlp, fullgraph=True)
        for x, y in zip(results(compiled, inputs), expected, strict=True):
            assert (x.double() - y.double()).norm() < 1e-2 * y.double().norm()
        leaves = [t.detach().requires_grad_() for t in inputs]

        def step():
            out = swiglu_mlp(*leaves)
            return [out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)]

        held, replay = replayed(step, warm_up=1)
        replay()
        assert same(held, step())
