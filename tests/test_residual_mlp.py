"""What follows a block's attention in one op: as exact as PyTorch part by part, and the same bits in every batch."""

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import compiled_for_hopper, for_this_gpu
from klora.bench.tolerance import assert_as_exact
from klora.kernels.linear import product, turns
from klora.kernels.linear.product import NORM_GRADIENT_TILE, RESIDUAL_TILES, TILES
from klora.kernels.residual_mlp import residual_mlp, residual_mlp_ref
from klora.kernels.rms_norm import EPS
from torch import Tensor

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NAMES = ("mixed", "x", "out", "up", "down")


def inputs_of(rows=7, Nq=48, D=32, hidden=80, dtype=torch.float32) -> list[Tensor]:
    """mixed, x, out, up, down; the rows of x are of several lengths, which the norm takes out again."""
    draw = torch.Generator().manual_seed(rows)
    sizes = (rows, Nq), (rows, D), (D, Nq), (hidden, D), (D, hidden)
    drawn = [
        torch.randn(size, generator=draw) / (size[-1] ** 0.5 if number > 1 else 1) for number, size in enumerate(sizes)
    ]
    drawn[1] *= torch.rand(rows, 1, generator=draw) * 8
    return [tensor.to(DEVICE, dtype) for tensor in drawn]


def gradients(function, inputs, wanted=NAMES, **more) -> list[Tensor]:
    """z and the gradients of the `wanted` inputs."""
    leaves = [tensor.detach().requires_grad_(name in wanted) for name, tensor in zip(NAMES, inputs, strict=True)]
    z = function(*leaves, **more)
    return [z.detach(), *torch.autograd.grad(z, [leaf for leaf in leaves if leaf.requires_grad], gradient_like(z))]


def gradient_like(z: Tensor) -> Tensor:
    """Numbers that every dtype holds."""
    dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    return dz.to(torch.bfloat16 if CUDA else torch.float16).to(z)


def assert_as_exact_as_pytorch(inputs, wanted=NAMES):
    """Few rows are taken eight times, with other signs: the errors of a handful of sums scatter."""
    draw = torch.Generator().manual_seed(7)
    signs = [[torch.randint(0, 2, t.shape, generator=draw).to(t) * 2 - 1 for t in inputs] for _ in range(7)]
    draws = [inputs, *([t * sign for t, sign in zip(inputs, some, strict=True)] for some in signs)]
    draws = draws[: 8 if len(inputs[0]) < 8 else 1]
    ours = [gradients(residual_mlp, drawn, wanted, backend="triton") for drawn in draws]
    exact = [gradients(residual_mlp_ref, [t.double() for t in drawn], wanted) for drawn in draws]
    plain = [gradients(residual_mlp_ref, drawn, wanted) for drawn in draws]
    assert_as_exact(*([torch.stack(same) for same in zip(*some, strict=True)] for some in (ours, exact, plain)))


def same(ours, others):
    assert len(ours) == len(others)
    return all(torch.equal(x, y) for x, y in zip(ours, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "Nq", "D", "hidden"), [(1, 16, 16, 48), (70, 64, 144, 272), (5, 50, 36, 35)])
def test_outputs_and_gradients_are_as_exact_as_pytorchs(rows, Nq, D, hidden, dtype):
    assert_as_exact_as_pytorch(inputs_of(rows, Nq, D, hidden, dtype))


@pytest.mark.parametrize("wanted", [["mixed"], ["x", "down"], ["out"], ["up"], ["down"]])
def test_any_gradients_alone(wanted):
    assert_as_exact_as_pytorch(inputs_of(9), wanted)


@pytest.mark.parametrize(
    "tile", [*RESIDUAL_TILES, NORM_GRADIENT_TILE, *TILES[:1]], ids=lambda tile: f"{tile.block_m}x{tile.block_n}"
)
def test_every_tile_computes_the_same(tile, monkeypatch):
    """The sums over blocks do not fit tiles of another width, so these are for those without sums alone."""
    if tile in RESIDUAL_TILES:
        monkeypatch.setattr(product, "RESIDUAL_TILES", (tile,))
    else:
        monkeypatch.setattr(product, "NORM_GRADIENT_TILE", tile)
    assert_as_exact_as_pytorch(inputs_of(150, 64, 144, 272, torch.float16))


def test_tiles_that_leave_sums_leave_the_same():
    assert {(tile.block_n, tile.block_n // tile.pieces) for tile in (*RESIDUAL_TILES, product.SLOPE_TILE)} == {
        (128, 32)
    }


def test_a_row_has_the_same_bits_wherever_it_lies():
    mixed, x, *weights = inputs_of(75)
    whole = gradients(residual_mlp, (mixed, x, *weights), NAMES[:2], backend="triton")
    dz = gradient_like(whole[0])
    for rows in (slice(3, 4), slice(10, 75), slice(0, 64)):
        leaves = [tensor[rows].detach().requires_grad_() for tensor in (mixed, x)]
        z = residual_mlp(*leaves, *weights, backend="triton")
        assert same([z, *torch.autograd.grad(z, leaves, dz[rows])], [tensor[rows] for tensor in whole])


def test_rows_of_zeros_and_rows_that_are_not_finite():
    mixed, x, *weights = inputs_of(6)
    mixed[0], x[0], x[2, 3], x[4] = 0, 0, float("nan"), float("inf")
    found = gradients(residual_mlp, (mixed, x, *weights), NAMES[:2], backend="triton")
    plain = gradients(residual_mlp_ref, (mixed, x, *weights), NAMES[:2])
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours[:4], theirs[:4], equal_nan=True, rtol=1e-4, atol=EPS**-0.5 * 1e-5)
        assert not ours[4].isfinite().all() and ours[5].isfinite().all()


def test_any_leading_dimensions_and_any_strides():
    mixed, x, out, up, down = inputs_of(10)
    for shape in ((), (10,), (2, 1, 5)):
        given = (mixed[0], x[0]) if not shape else (mixed.view(*shape, -1), x.view(*shape, -1))
        found = gradients(residual_mlp, (*given, out, up, down), backend="triton")
        torch.testing.assert_close(found, gradients(residual_mlp_ref, (*given, out, up, down)), rtol=1e-4, atol=1e-5)
    apart = (
        mixed.repeat(1, 3)[:, 1:97:2],
        x.repeat(1, 3)[:, 1:65:2],
        out.mT.contiguous().mT,
        up.repeat(2, 1)[1::2],
        down,
    )
    found = gradients(residual_mlp, apart, backend="triton")
    torch.testing.assert_close(found, gradients(residual_mlp_ref, apart), rtol=1e-4, atol=1e-5)


def test_nothing_to_do_is_done():
    for rows, Nq, D, hidden in ((0, 48, 32, 80), (3, 0, 32, 80), (3, 48, 32, 0)):
        inputs = inputs_of(1, max(Nq, 1), D, max(hidden, 1))
        cut = (rows, Nq), (rows, D), (D, Nq), (hidden, D), (D, hidden)
        inputs = [tensor.new_zeros(size) for tensor, size in zip(inputs, cut, strict=True)]
        torch.testing.assert_close(
            gradients(residual_mlp, inputs, backend="triton"), gradients(residual_mlp_ref, inputs)
        )


def test_frozen_weights_keep_the_stream_and_one_tensor_of_hidden_rows():
    for dtype in (torch.float32, torch.float16):
        kept: list[Tensor] = []
        mixed, x, *weights = inputs_of(9, dtype=dtype)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            residual_mlp(mixed.requires_grad_(), x, *weights, backend="triton")
        assert sorted(tuple(t.shape) for t in kept if t.size(0) == 9) == [(9,), (9, 32), (9, 80)]


def test_bad_arguments_are_refused():
    mixed, x, out, up, down = inputs_of()
    with pytest.raises(ValueError, match=r"mixed is float32 \[7, 32\]; wanted float32 \[7, 48\]"):
        residual_mlp(x, x, out, up, down)
    with pytest.raises(ValueError, match=r"out is float32 \[48, 32\]; wanted float32 \[32, Nq\]"):
        residual_mlp(mixed, x, out.mT, up, down)
    with pytest.raises(ValueError, match=r"down is float32 \[80, 32\]; wanted float32 \[32, 80\]"):
        residual_mlp(mixed, x, out, up, up)
    with pytest.raises(ValueError, match="x is float64.*; wanted bfloat16, float16 or float32"):
        residual_mlp(*(t.double() for t in (mixed, x, out, up, down)), backend="triton")


@pytest.mark.slow
def test_the_ops_are_registered_as_torch_wants_it():
    for dtype in (torch.float32, torch.float16):
        inputs = inputs_of(3, 16, 16, 16, dtype)
        torch.library.opcheck(torch.ops.klora.residual_mlp, [t.clone().requires_grad_() for t in inputs])
        _, x, *weights = inputs
        rstd, empty = torch.ones(3, device=DEVICE), [torch.empty_like(x) for _ in range(3)]
        torch.library.opcheck(torch.ops.klora.residual_mlp_backward_, (x, x, rstd, x.abs(), *weights, *empty))


def test_it_is_traced_whole():
    inputs = inputs_of()
    compiled = torch.compile(residual_mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradients(compiled, inputs, backend="triton"), gradients(residual_mlp, inputs, backend="triton")
    )


COMPILED_FOR_HOPPER = """
import torch, triton
from hopper import pretend
from klora.kernels import residual_mlp
from klora.kernels.linear import product
from klora.kernels.precompile import recorded

pretend()

def leaf(*size):
    return torch.zeros(size, dtype=torch.bfloat16, requires_grad=True)

def work():
    inputs = leaf(4000, 512), leaf(4000, 512), leaf(512, 512), leaf(1536, 512), leaf(512, 1536)
    residual_mlp(*inputs, backend="triton").sum().backward()

for in_turns in (False, True):
    product.takes = lambda *about: in_turns
    for kernel in recorded(work).values():
        compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
        names = kernel.function.arg_names
        kind = kernel.constants[(names.index("EPILOGUE" if "EPILOGUE" in names else "KIND"),)]
        # Tiles with something to wait for are made for two programs on a multiprocessor's 228 KiB, each with 1 KiB.
        two = not in_turns and kind in ("residual", "slope", "norm_gradient")
        assert compiled.metadata.shared <= (233_472 // 2 - 1024 if two else 232_448), (kind, compiled.metadata.shared)
        print(kernel.name, kind)
"""


@pytest.mark.slow
def test_it_compiles_for_hopper():
    """In a process where Triton is itself."""
    found = {line.strip() for line in compiled_for_hopper(COMPILED_FOR_HOPPER).splitlines()}
    ends = "residual", "slope", "norm_gradient"
    assert {f"{kernel} {kind}" for kernel in ("_product_kernel", "_product") for kind in ends} <= found


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(
        ("rows", "Nq", "D", "hidden"), [(4000, 512, 512, 1536), (777, 80, 144, 208), (130, 36, 52, 50)]
    )
    def test_it_is_as_exact_as_pytorch(self, rows, Nq, D, hidden, dtype):
        inputs = inputs_of(for_this_gpu(rows, D), Nq, D, hidden, dtype)
        assert_as_exact_as_pytorch(inputs)
        assert_as_exact_as_pytorch(inputs, ["mixed"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("rows", "D", "hidden"), [(65536, 512, 1536), (70001, 328, 1000), (131073, 136, 72)])
    def test_warps_that_take_turns_compute_the_same_bits(self, rows, D, hidden, dtype, monkeypatch):
        inputs = inputs_of(for_this_gpu(rows, D), 96, D, hidden, dtype)
        takes_turns = turns.takes(inputs[1], D, 0)
        found = gradients(residual_mlp, inputs)
        assert same(found, gradients(residual_mlp, inputs))
        monkeypatch.setattr(product, "takes", lambda x, outputs, head_dim: False)
        assert takes_turns or torch.cuda.get_device_capability()[0] != 9
        assert same(found[:3], gradients(residual_mlp, inputs)[:3])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_row_has_the_same_bits_in_every_batch(self, dtype):
        most = 65536 if dtype == torch.bfloat16 else 20000
        mixed, x, *weights = inputs_of(most, 512, 512, 1536, dtype)
        dz = x.flip(0).contiguous()

        def everything(rows):
            leaves = [tensor[rows].detach().requires_grad_() for tensor in (mixed, x)]
            z = residual_mlp(*leaves, *weights)
            return z, *torch.autograd.grad(z, leaves, dz[rows])

        whole = everything(slice(None))
        for rows in (1, 17, 256, 1000, 1024, 4096, 8192, 16384):
            for start in (0, 1, most - rows):
                taken = slice(start, start + rows)
                assert same(everything(taken), [tensor[taken] for tensor in whole]), f"{rows} rows from {start}"

    @pytest.mark.parametrize("tile", RESIDUAL_TILES)
    def test_every_tile_has_the_same_bits(self, tile, monkeypatch):
        inputs = inputs_of(for_this_gpu(5000, 512), 512, 512, 1536, torch.bfloat16)
        expected = gradients(residual_mlp, inputs, NAMES[:2])
        monkeypatch.setattr(product, "RESIDUAL_TILES", (tile,))
        assert same(gradients(residual_mlp, inputs, NAMES[:2]), expected)

    def test_it_is_captured_in_a_graph(self):
        inputs = inputs_of(16384, 512, 512, 1536, torch.bfloat16)
        expected = gradients(residual_mlp, inputs, NAMES[:2])
        gradient = gradient_like(expected[0])

        def step():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs[:2]]
            z = residual_mlp(*leaves, *inputs[2:])
            return [z.detach(), *torch.autograd.grad(z, leaves, gradient)]

        found, replay = replayed(step)
        replay()
        assert same(found, expected)
