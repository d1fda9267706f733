"""The product with a weight and the squared-ReLU MLP: as exact as PyTorch, and the same bits in every batch."""

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import for_this_gpu
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import assert_as_exact
from klora.kernels.linear import linear, linear_ref, product, turns
from klora.kernels.linear.product import FP32_TILE, SLOPE_TILE, TILES, pick_tile
from klora.kernels.mlp import relu_squared_mlp, relu_squared_mlp_ref
from torch import Tensor

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA GPU")]


def draw(*shapes, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Rows x, then weights [N, K] scaled to keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(t if number == 0 else t / t.size(-1) ** 0.5).to(DEVICE, dtype) for number, t in enumerate(drawn)]


def mlp_inputs(rows=7, D=32, hidden=48, dtype=torch.float32) -> list[Tensor]:
    """x, up, down."""
    return draw((rows, D), (hidden, D), (D, hidden), dtype=dtype)


def results(function, inputs, wanted=None, **more) -> list[Tensor]:
    """The output and the gradients of the `wanted` inputs (of all)."""
    wanted = range(len(inputs)) if wanted is None else wanted
    leaves = [t.detach().requires_grad_(number in wanted) for number, t in enumerate(inputs)]
    out = function(*leaves, **more)
    generator = torch.Generator().manual_seed(9)
    dout = torch.randn(out.shape, generator=generator).to(torch.bfloat16 if CUDA else torch.float16)
    return [out.detach(), *torch.autograd.grad(out, [leaves[number] for number in wanted], dout.to(out))]


def assert_as_exact_as_pytorch(function, reference, inputs, wanted=None):
    """Few rows are taken eight times, with other signs: the errors of a handful of sums scatter."""
    generator = torch.Generator().manual_seed(7)
    signs = [[torch.randint(0, 2, t.shape, generator=generator).to(t) * 2 - 1 for t in inputs] for _ in range(7)]
    draws = [inputs, *([t * sign for t, sign in zip(inputs, some, strict=True)] for some in signs)]
    draws = draws[: 8 if len(inputs[0]) < 8 else 1]
    ours = [results(function, drawn, wanted, backend="triton") for drawn in draws]
    exact = [results(reference, [t.double() for t in drawn], wanted) for drawn in draws]
    plain = [results(reference, drawn, wanted) for drawn in draws]
    assert_as_exact(*([torch.stack(same) for same in zip(*some, strict=True)] for some in (ours, exact, plain)))


def same(ours, others):
    assert len(ours) == len(others)
    return all(torch.equal(x, y) for x, y in zip(ours, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "K", "N"), [(1, 16, 16), (70, 80, 144), (129, 64, 32), (5, 50, 35)])
def test_the_product_and_its_gradients_are_as_exact_as_pytorchs(rows, K, N, dtype):
    assert_as_exact_as_pytorch(linear, linear_ref, draw((rows, K), (N, K), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "D", "hidden"), [(1, 16, 48), (70, 32, 144), (5, 36, 50)])
def test_the_mlp_and_its_gradients_are_as_exact_as_pytorchs(rows, D, hidden, dtype):
    assert_as_exact_as_pytorch(relu_squared_mlp, relu_squared_mlp_ref, mlp_inputs(rows, D, hidden, dtype))


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    rows=st.sampled_from([1, 7, 33, 70]),
    D=st.integers(1, 70),
    hidden=st.integers(1, 70),
    wanted=st.lists(st.integers(0, 2), min_size=1, unique=True),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_sizes_and_any_gradients(rows, D, hidden, wanted, dtype):
    inputs = mlp_inputs(rows, D, hidden, dtype)
    assert_as_exact_as_pytorch(relu_squared_mlp, relu_squared_mlp_ref, inputs, wanted)
    assert_as_exact_as_pytorch(linear, linear_ref, inputs[:2], [number for number in wanted if number < 2] or [0])


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_computes_the_same(tile, monkeypatch):
    inputs = draw((150, 80), (272, 80), dtype=torch.float16)
    monkeypatch.setattr(product, "TILES", (tile,))
    assert_as_exact_as_pytorch(linear, linear_ref, inputs)


def test_the_tile_follows_the_number_of_rows_and_the_dtype():
    def picked(rows, outputs, dtype=torch.bfloat16, epilogue="store"):
        return pick_tile(dtype, epilogue, rows, outputs, processors=132)

    assert [picked(rows, 512) for rows in (65536, 4096, 2048, 1024)] == list(TILES)
    assert picked(1024, 1536) is TILES[1] and picked(8192, 1536) is TILES[0]
    for rows in (1, 4096, 65536):
        assert picked(rows, 512, torch.float32) is FP32_TILE and picked(rows, 512, epilogue="slope") is SLOPE_TILE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "D", "hidden"), [(98304, 512, 1536), (70001, 328, 1000), (131073, 8, 136)])
def test_warps_that_take_turns_compute_the_same_bits(rows, D, hidden, dtype, monkeypatch):
    x, up, down = mlp_inputs(for_this_gpu(rows, hidden), D, hidden, dtype)
    leaf = x.requires_grad_()
    takes_turns = turns.takes(x, hidden, 0)

    def gradient():
        return torch.autograd.grad(relu_squared_mlp(leaf, up, down), leaf, torch.ones_like(x))[0]

    found = [gradient(), gradient()]
    monkeypatch.setattr(product, "takes", lambda x, outputs, head_dim: False)
    assert takes_turns or torch.cuda.get_device_capability()[0] != 9
    assert same(found, [gradient()] * 2)


def test_a_row_has_the_same_bits_wherever_it_lies():
    x, up, down = mlp_inputs(rows=75)
    dout = torch.randn(75, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def both(rows):
        leaf = x[rows].detach().requires_grad_()
        out = relu_squared_mlp(leaf, up, down, backend="triton")
        projected = linear(leaf, down.mT, backend="triton")
        return out, torch.autograd.grad(out, leaf, dout[rows])[0], projected

    whole = both(slice(None))
    for rows in (slice(3, 4), slice(10, 75), slice(0, 64)):
        assert same(both(rows), [t[rows] for t in whole])


def test_any_leading_dimensions_and_any_strides():
    x, up, down = mlp_inputs(rows=10)
    for shape in ((32,), (10, 32), (2, 1, 5, 32)):
        rows = x[0] if shape == (32,) else x.view(shape)
        torch.testing.assert_close(
            results(relu_squared_mlp, (rows, up, down), backend="triton"),
            results(relu_squared_mlp_ref, (rows, up, down)),
        )
    apart = x.repeat(1, 3)[:, 1:65:2], up.repeat(2, 1)[1::2].mT.contiguous().mT, down[:, None].expand(-1, 2, -1)[:, 1]
    torch.testing.assert_close(results(relu_squared_mlp, apart, backend="triton"), results(relu_squared_mlp_ref, apart))
    leaf = x.clone().requires_grad_()
    for function, more in ((relu_squared_mlp, {"backend": "triton"}), (relu_squared_mlp_ref, {})):
        function(leaf, up, down, **more).sum().backward()  # the gradient of a sum is one number, expanded
    torch.testing.assert_close(leaf.grad, 2 * torch.autograd.grad(relu_squared_mlp_ref(leaf, up, down).sum(), leaf)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_nan_and_infinity(dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, -3.0, 2.0, -inf, inf, nan], dtype=dtype, device=DEVICE)[:, None]
    x = torch.cat([x, torch.zeros_like(x)], dim=1)  # 0 * inf is NaN in a longer sum
    one = torch.tensor([[1.0]], dtype=dtype, device=DEVICE)
    inputs = x[:, :1].contiguous(), one, one
    out, dx = results(relu_squared_mlp, inputs, [0], backend="triton")
    plain, dplain = results(relu_squared_mlp_ref, inputs, [0])
    torch.testing.assert_close(out, plain, equal_nan=True)
    torch.testing.assert_close(dx, dplain, equal_nan=True)


def test_frozen_weights_keep_one_tensor_of_hidden_rows():
    for dtype in (torch.float32, torch.float16):
        kept: list[Tensor] = []
        x, up, down = mlp_inputs(dtype=dtype)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            relu_squared_mlp(x.requires_grad_(), up, down, backend="triton")
        rows = [t for t in kept if t.size(0) == len(x)]
        u = x.detach() @ up.mT
        assert len(rows) == 1
        torch.testing.assert_close(rows[0], u if dtype == torch.float16 else u.relu().square())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do_is_done(dtype):
    for rows, D, hidden in ((0, 32, 48), (3, 32, 0), (3, 0, 48)):
        inputs = [torch.zeros(size, dtype=dtype) for size in ((rows, D), (hidden, D), (D, hidden))]
        torch.testing.assert_close(
            results(relu_squared_mlp, inputs, backend="triton"), results(relu_squared_mlp_ref, inputs)
        )
        torch.testing.assert_close(results(linear, inputs[:2], backend="triton"), results(linear_ref, inputs[:2]))


def test_bad_arguments_are_refused():
    x, up, down = mlp_inputs()
    with pytest.raises(ValueError, match=r"down is float32 \[48, 32\]; wanted float32 \[32, 48\]"):
        relu_squared_mlp(x, up, up)
    with pytest.raises(ValueError, match=r"x is float32 \[\]; wanted .* \[..., D\]"):
        relu_squared_mlp(torch.zeros(()), torch.zeros(48, 0), torch.zeros(0, 48))
    with pytest.raises(ValueError, match="up is float16 .*; wanted float32"):
        relu_squared_mlp(x, up.half(), down)
    with pytest.raises(ValueError, match="weight is .* on meta; wanted .* on cpu"):
        linear(x, up.to("meta"))
    with pytest.raises(ValueError, match=r"weight is float32 \[32, 48\]; wanted float32 \[N, 32\]"):
        linear(x, down)
    for function, inputs in ((linear, (x, up)), (relu_squared_mlp, (x, up, down))):
        with pytest.raises(ValueError, match="backend is 'cuda'"):
            function(*inputs, backend="cuda")
        with pytest.raises(ValueError, match="x is float64.*; wanted bfloat16, float16 or float32"):
            function(*(t.double() for t in inputs), backend="triton")


@pytest.mark.slow
def test_the_ops_are_registered_as_torch_wants_it():
    for dtype in (torch.float32, torch.float16):
        x, up, down = mlp_inputs(3, 16, 16, dtype)
        leaves = [t.clone().requires_grad_() for t in (x, up, down)]
        torch.library.opcheck(torch.ops.klora.linear, leaves[:2])
        torch.library.opcheck(torch.ops.klora.linear_dx_, (x, up, torch.empty_like(x)))
        torch.library.opcheck(torch.ops.klora.relu_squared_mlp, leaves)
        torch.library.opcheck(torch.ops.klora.relu_squared_mlp, (leaves[0], up, down))
        torch.library.opcheck(torch.ops.klora.relu_squared_mlp_du_, (x, x.new_ones(3, 16), down, x.new_empty(3, 16)))


def both_ops(x, up, down, backend="triton"):
    return relu_squared_mlp(linear(x, down @ up, backend=backend), up, down, backend=backend)


def test_they_are_traced_whole():
    inputs = mlp_inputs()
    compiled = torch.compile(both_ops, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, inputs), results(both_ops, inputs))
    torch.testing.assert_close(results(compiled, inputs, [0]), results(both_ops, inputs, [0]))


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("rows", "D", "hidden"), [(4000, 512, 1536), (777, 80, 208), (130, 36, 50)])
    def test_they_are_as_exact_as_pytorchs(self, rows, D, hidden, dtype):
        inputs = mlp_inputs(for_this_gpu(rows, hidden), D, hidden, dtype)
        assert_as_exact_as_pytorch(relu_squared_mlp, relu_squared_mlp_ref, inputs)
        assert_as_exact_as_pytorch(relu_squared_mlp, relu_squared_mlp_ref, inputs, [0])
        assert_as_exact_as_pytorch(linear, linear_ref, inputs[:2])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_small_numbers_have_their_gradients(self, dtype):
        x, up, down = mlp_inputs(1000, 512, 1536, dtype)
        assert_as_exact_as_pytorch(relu_squared_mlp, relu_squared_mlp_ref, [x * 2.0**-8, up, down], [0])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_row_has_the_same_bits_in_every_batch(self, dtype):
        most = 65536 if dtype == torch.bfloat16 else 20000
        x, up, down = mlp_inputs(most, 512, 1536, dtype)
        out_weight = draw((1,), (512, 512), dtype=dtype)[1]
        dout = x.flip(0).contiguous()

        def everything(rows):
            leaf = x[rows].detach().requires_grad_()
            outputs = relu_squared_mlp(leaf, up, down), linear(leaf, out_weight)
            return *outputs, *(torch.autograd.grad(out, leaf, dout[rows])[0] for out in outputs)

        whole = everything(slice(None))
        for rows in (1, 17, 256, 1000, 1024, 2048, 3072, 4096, 8192, 12288, 16384):
            for start in (0, 1, most - rows):
                taken = slice(start, start + rows)
                assert same(everything(taken), [t[taken] for t in whole]), f"{rows} rows from {start}"

    def test_every_tile_has_the_same_bits(self, monkeypatch):
        inputs, seen = draw((for_this_gpu(5000, 512), 1536), (512, 1536), dtype=torch.bfloat16), []
        for tile in TILES:
            monkeypatch.setattr(product, "TILES", (tile,))
            seen.append(results(linear, inputs, [0]))
        assert all(same(seen[0], others) for others in seen[1:])

    def test_the_same_bits_every_time(self):
        inputs = mlp_inputs(16 * 768, 512, 1536, torch.bfloat16)
        first = results(relu_squared_mlp, inputs, [0])
        assert all(same(results(relu_squared_mlp, inputs, [0]), first) for _ in range(19))

    def test_they_are_captured_in_a_graph_and_compiled_whole(self):
        inputs = mlp_inputs(500, 128, 384, torch.bfloat16)
        expected = results(both_ops, inputs)
        compiled = torch.compile(both_ops, fullgraph=True)
        for x, y in zip(results(compiled, inputs), expected, strict=True):
            assert (x.double() - y.double()).norm() < 1e-2 * y.double().norm()

        def step():
            leaves = [t.detach().requires_grad_() for t in inputs]
            out = both_ops(*leaves)
            return [out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)]

        held, replay = replayed(step, warm_up=1)
        replay()
        assert same(held, step())
