"""int6 kernels: products and gradients against float64, the op's contracts, the module."""

import copy
import dataclasses

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import DTYPES, replayed
from hopper import compiled_for_hopper, few
from int6_weights import GROUPED, HALVED, layout_1, matrix
from klora.bench.tolerance import assert_as_exact
from klora.kernels.int6 import (
    LAYOUT,
    Int6Linear,
    Int6Matrix,
    int6_linear,
    int6_linear_dx,
    pack_int6,
    pick_config,
    pick_config_dx,
    quantize_int6,
)
from klora.kernels.int6.op import Int6Config, _backward, _forward, dequantize
from torch import nn


def is_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
ODD = [(16, 128), (32, 32), (48, 160), (7, 33), (130, 96)]


@pytest.fixture(autouse=True)
def nan_in_what_is_not_written():
    """Deterministic mode fills every new tensor with NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class TestInterpreter:
    """The kernels without inline assembly, in fp32 and fp16."""

    @pytest.mark.parametrize(("rows", "columns"), ODD + HALVED)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_product_and_gradients(self, rows, columns, dtype):
        check_product(matrix(rows, columns), 5, dtype, "cpu")

    @pytest.mark.parametrize(("rows", "columns", "group_size"), GROUPED)
    def test_group_scales(self, rows, columns, group_size):
        check_product(matrix(rows, columns, group_size), 3, torch.float32, "cpu")

    def test_many_rows_dequantise_once(self):
        check_product(matrix(48, 160), 600, torch.float32, "cpu")

    @pytest.mark.parametrize("shape", HALVED)
    @pytest.mark.parametrize("rows", [2, 20, 40, 100, 400])
    def test_a_last_column_of_64_changes_no_bit(self, shape, rows):
        same_bits_as_padded(shape, None, rows, torch.float32, "cpu")

    @pytest.mark.parametrize("group_size", [32, 64])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_last_column_of_64_changes_no_bit_of_groups(self, group_size, dtype):
        same_bits_as_padded((200, 192), group_size, 20, dtype, "cpu")

    def test_codes_of_other_rows_do_no_harm_to_large_scales(self):
        """Rows r and r + 64 share a tile; 31 * 60,000 is no fp16 number, and no code of 31 has that scale."""
        codes, scale = torch.zeros(200, 192, dtype=torch.int8), torch.full((200, 3), 60_000.0).half()
        codes[:, 128:], scale[:, 2] = 31, 2.0**-10
        weight = Int6Matrix(pack_int6(codes), scale, (200, 192))
        out = int6_linear(torch.ones(20, 192).half(), weight, backend="triton")
        assert (out == 64 * 31 * 2.0**-10).all()

    def test_identity_gives_the_weight(self):
        weight = matrix(32, 96)
        out = int6_linear(torch.eye(96), weight, backend="triton")
        assert torch.equal(out.T, weight.dequantize())

    @pytest.mark.parametrize("group_size", [None, 32])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(40, 160), (200, 64), (72, 576)])
    def test_dequantised_bits(self, shape, group_size, dtype):
        weight = matrix(*shape, group_size)
        assert torch.equal(dequantize(weight.packed, weight.scale, weight.shape, dtype), weight.dequantize(dtype))

    @pytest.mark.slow
    def test_opcheck(self):
        weight = matrix(32, 64)
        for x, bias in ((torch.randn(3, 64), None), (torch.randn(2, 64), torch.randn(32))):
            x.requires_grad_()
            if bias is not None:
                bias.requires_grad_()
            torch.library.opcheck(torch.ops.klora.int6_product, (x, weight.packed, weight.scale, bias, 32))
        torch.library.opcheck(torch.ops.klora.int6_product_dx, (torch.randn(3, 32), weight.packed, weight.scale, 64))


def padded_to_128(weight):
    """The same weight with inputs of code 0 after its last ones, to a multiple of 128: no last column of 64."""
    rows, columns = weight.shape
    scale = weight.scale
    if weight.group_size:
        scale = F.pad(scale, (0, -columns % 128 // weight.group_size))
    return Int6Matrix(pack_int6(F.pad(weight.codes(), (0, -columns % 128))), scale, (rows, columns + -columns % 128))


def same_bits_as_padded(shape, group_size, rows, dtype, device, forward=None, backward=None):
    """Both products, as exact as plain PyTorch's, and but for cuBLAS's sums with the bits of a padded weight.

    By these configs; without, by those that are picked.
    """
    weight = matrix(*shape, group_size, device)
    other = padded_to_128(weight)
    x, dout = (torch.randn(rows, n, device=device).to(dtype) for n in shape[::-1])
    bias = torch.randn(shape[0], device=device).to(dtype)
    forward = forward or pick_config(rows, *shape, dtype, assembly=False)
    backward = backward or pick_config_dx(rows, *shape, dtype, assembly=False)
    outs, dxs = [], []
    for one in (weight, other):
        inputs = F.pad(x, (0, one.shape[1] - shape[1]))
        outs.append(_forward(inputs, one.packed, one.scale, bias, shape[0], forward))
        dxs.append(_backward(dout, one.packed, one.scale, one.shape[1], backward)[:, : shape[1]])
    for config, (one, padded) in ((forward, outs), (backward, dxs)):
        assert config.kernel == "dense" or torch.equal(one, padded)
    exact, near = weight.dequantize(torch.float64), weight.dequantize(dtype)
    truth = F.linear(x.double(), exact, bias.double()), dout.double() @ exact
    assert_as_exact([outs[0], dxs[0]], list(truth), [F.linear(x, near, bias), dout @ near])


def check_product(weight, rows, dtype, device, bias=True):
    """Output and gradients against float64 and plain PyTorch's."""
    generator = torch.Generator(device).manual_seed(1)

    def randn(*size):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    inputs = [randn(rows, weight.shape[1]), *([randn(weight.shape[0])] if bias else [])]
    dout = randn(rows, weight.shape[0])
    exact_weight = weight.dequantize(torch.float64)
    exact = [F.linear(*(t.double() for t in (inputs[0], exact_weight, *inputs[1:]))), dout.double() @ exact_weight]
    exact += [dout.double().sum(0)] if bias else []
    results = []
    for product in (
        lambda x, b=None: int6_linear(x, weight, b, backend="triton"),
        lambda x, b=None: F.linear(x, weight.dequantize(dtype), b),
    ):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = product(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    assert_as_exact(results[0], exact, results[1])
    assert torch.equal(int6_linear_dx(dout, weight, backend="triton"), results[0][1])


class TestInputs:
    def test_any_leading_dimensions_and_strides(self):
        weight, x = matrix(32, 64), torch.randn(64, 3, 2).permute(2, 1, 0)
        out = int6_linear(x, weight, backend="triton")
        assert out.shape == (2, 3, 32)
        torch.testing.assert_close(out, F.linear(x, weight.dequantize()), rtol=1e-4, atol=1e-4)
        assert int6_linear(x[0, 0], weight, backend="triton").shape == (32,)
        assert int6_linear(x[:, :0], weight, backend="triton").shape == (2, 0, 32)

    @pytest.mark.parametrize(
        ("x", "bias", "message"),
        [
            (
                torch.randn(2, 63),
                None,
                r"x is float32 \[2, 63\]; wanted bfloat16, float16 or float32 \[..., 64\]",
            ),
            (torch.randn(2, 64).double(), None, "x is float64"),
            (torch.tensor(1.0), None, r"x is float32 \[\]"),
            (torch.randn(2, 64), torch.randn(31), r"bias is float32 \[31\]; wanted float32 \[32\]"),
            (torch.randn(2, 64), torch.randn(32).half(), "bias is float16"),
            (torch.randn(2, 64, device="meta"), None, "weight.packed is .* on cpu; wanted .* on meta"),
        ],
    )
    def test_bad_input_is_refused(self, x, bias, message):
        with pytest.raises(ValueError, match=message):
            int6_linear(x, matrix(32, 64), bias)

    def test_other_backends_are_refused(self):
        with pytest.raises(ValueError, match="backend is 'cuda'; allowed: None, 'reference', 'triton'"):
            int6_linear(torch.randn(1, 64), matrix(32, 64), backend="cuda")
        with pytest.raises(ValueError, match=r"dout is float32 \[1, 64\]; wanted .* \[..., 32\]"):
            int6_linear_dx(torch.randn(1, 64), matrix(32, 64))


def wide_range(rows, columns, group_size=None, device="cpu"):
    """A matrix with fp32 scales: a few rows are far below the others."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, device=device)
    weight[::3] *= 1e-7
    weight[1::3] *= 1e-11
    matrix = quantize_int6(weight, group_size)
    assert matrix.scale.dtype == torch.float32
    return matrix


class TestAgreement:
    """The kernels and the reference: the same gradients, the same rows, the same refusals."""

    @pytest.mark.parametrize("backend", ["reference", "triton"])
    @pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 3, 64)])
    def test_empty_batches(self, shape, backend):
        weight, bias = matrix(32, 64), torch.randn(32, requires_grad=True)
        x = torch.randn(shape, requires_grad=True)
        out = int6_linear(x, weight, bias, backend=backend)
        assert out.shape == (*shape[:-1], 32) and out.requires_grad
        out.sum().backward()
        assert x.grad.shape == shape and not bias.grad.any()
        assert int6_linear_dx(torch.randn(*shape[:-1], 32), weight, backend=backend).shape == shape

    @pytest.mark.parametrize("rows", [3, 40, 500])
    def test_one_gradient_for_x_and_bias(self, rows):
        weight, dout = matrix(32, 64), torch.randn(rows, 32)
        for wanted in ((True, True), (True, False), (False, True)):
            found = []
            for backend in ("reference", "triton"):
                torch.manual_seed(0)
                x, bias = (
                    torch.randn(size).requires_grad_(on) for size, on in zip(((rows, 64), 32), wanted, strict=True)
                )
                int6_linear(x, weight, bias, backend=backend).backward(dout)
                found.append((x.grad, bias.grad))
            for ours, plain, on in zip(*found, wanted, strict=True):
                assert (ours is not None) == (plain is not None) == on
                if on:
                    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)

    def test_no_gradient_where_none_is_asked(self):
        weight, x = matrix(32, 64), torch.randn(3, 64, requires_grad=True)
        for backend in ("reference", "triton"):
            with torch.no_grad():
                assert not int6_linear(x, weight, backend=backend).requires_grad
            assert not int6_linear(x.detach(), weight, backend=backend).requires_grad

    @pytest.mark.parametrize(("rows", "dtype"), [(3, torch.float32), (20, torch.float16), (500, torch.float32)])
    def test_misaligned_and_strided_inputs(self, rows, dtype):
        weight = matrix(32, 64)
        for x in (
            torch.randn(rows * 64 + 1).to(dtype)[1:].view(rows, 64),
            torch.randn(rows, 128).to(dtype)[:, ::2],
            torch.randn(64, rows).to(dtype).T,
            torch.randn(1, 64).to(dtype).expand(rows, 64),
        ):
            for product, part in ((int6_linear, x), (int6_linear_dx, x[:, :32])):
                out = product(part, weight, backend="triton")
                plain = product(part.clone(memory_format=torch.contiguous_format), weight, backend="reference")
                torch.testing.assert_close(out, plain, rtol=1e-2, atol=32 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("rows", [5, 40, 500])
    @pytest.mark.parametrize("group_size", [None, 32])
    def test_what_is_not_finite_stays_in_its_row(self, rows, group_size):
        weight = matrix(24, 96, group_size)
        x, dout = torch.randn(rows, 96), torch.randn(rows, 24)
        bad = x.clone(), dout.clone()
        for tensor, value in zip(bad, (torch.nan, torch.inf), strict=True):
            tensor[1] = value
            tensor[2, 3] = torch.nan
        others = torch.arange(rows) > 2
        for clean, spoilt, product in ((x, bad[0], int6_linear), (dout, bad[1], int6_linear_dx)):
            out = product(spoilt, weight, backend="triton")
            assert torch.equal(out[others], product(clean, weight, backend="triton")[others])
            assert not torch.isfinite(out[1:3]).any()

    @pytest.mark.parametrize("backend", ["reference", "triton"])
    def test_outputs_may_be_changed_in_place(self, backend):
        weight, x = matrix(32, 64), torch.randn(2, 3, 64, requires_grad=True)
        int6_linear(x, weight, backend=backend).mul_(2).add_(1).sum().backward()
        exact = 2 * torch.ones(2, 3, 32) @ weight.dequantize()
        torch.testing.assert_close(x.grad, exact, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("group_size", [None, 32])
    @pytest.mark.parametrize("rows", [5, 40])
    def test_scales_in_fp32(self, group_size, rows):
        """Each row of small weights as exact as the others, forward and backward."""
        weight, x = wide_range(48, 96, group_size), torch.randn(rows, 96)
        exact = weight.dequantize(torch.float64)
        out, truth = int6_linear(x, weight, backend="triton").double(), x.double() @ exact.T
        assert ((out - truth).norm(dim=0) <= 1e-5 * truth.norm(dim=0)).all()
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(dequantize(weight.packed, weight.scale, weight.shape, dtype), weight.dequantize(dtype))
            check_product(weight, rows, dtype, "cpu")


class TestModule:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("group_size", [None, 64])
    def test_stands_in_for_a_linear(self, bias, group_size):
        linear, x = nn.Linear(128, 48, bias=bias), torch.randn(5, 128)
        int6 = Int6Linear.from_linear(linear, group_size)
        assert int6.bias is None or torch.equal(int6.bias, linear.bias)
        assert torch.equal(int6(x), F.linear(x, int6.dequantize(), linear.bias))
        assert 0 < (int6(x) - linear(x)).norm() < 0.05 * linear(x).norm()
        assert [name for name, _ in int6.named_parameters()] == (["bias"] if bias else [])

    def test_state_round_trips_through_safetensors(self, tmp_path):
        int6 = Int6Linear.from_linear(nn.Linear(96, 40), 32)
        safetensors.torch.save_file(int6.state_dict(), tmp_path / "linear.safetensors")
        fresh = Int6Linear(96, 40, group_size=32)
        fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "linear.safetensors"))
        assert torch.equal(fresh.packed, int6.packed) and torch.equal(fresh.scale, int6.scale)
        x = torch.randn(2, 96)
        assert torch.equal(fresh(x), int6(x))

    def test_other_versions_and_truncated_data_are_refused_by_name(self):
        state = Int6Linear.from_linear(nn.Linear(96, 40)).state_dict()
        module = nn.Sequential(Int6Linear(96, 40))
        for change, message in (
            ({"0.layout": torch.tensor(LAYOUT + 1)}, "0.packed has layout version 3; this klora reads 2"),
            ({"0.packed": state["packed"][:1]}, r"0.packed is torch.int32 \[1, 3, 32, 4\]; this module takes"),
            (
                {"0.packed": torch.zeros(2, 1, 3, 32, 4, dtype=torch.int32), "0.layout": torch.tensor(1)},
                r"0.packed is torch.int32 \[2, 1, 3, 32, 4\]; this module takes",
            ),
            ({"0.scale": state["scale"].double()}, "0.scale is torch.float64"),
        ):
            with pytest.raises(ValueError, match=message):
                module.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()} | change)

    @pytest.mark.parametrize("shape", [(40, 128), (40, 64), (200, 192)])
    def test_a_state_of_layout_1_is_read(self, shape):
        int6 = Int6Linear.from_linear(nn.Linear(*shape[::-1]))
        state = int6.state_dict() | {"packed": layout_1(int6.matrix.codes()), "layout": torch.tensor(1)}
        for assign in (False, True):
            fresh = Int6Linear(*shape[::-1])
            fresh.load_state_dict(state, assign=assign)
            assert torch.equal(fresh.packed, int6.packed) and int(fresh.layout) == LAYOUT
        assert int(state["layout"]) == 1 and state["packed"].dim() == 5

    def test_a_cast_leaves_codes_and_scales(self):
        int6 = Int6Linear.from_linear(nn.Linear(64, 32))
        cast = copy.deepcopy(int6).to(torch.bfloat16)
        assert cast.bias.dtype == torch.bfloat16
        assert torch.equal(cast.scale, int6.scale) and torch.equal(cast.packed, int6.packed)
        assert cast(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16

    def test_trains_what_is_before_it_and_its_bias(self):
        model = nn.Sequential(nn.Linear(16, 64), Int6Linear.from_linear(nn.Linear(64, 32)))
        model(torch.randn(4, 16)).square().sum().backward()
        assert model[0].weight.grad.norm() > 0 and model[1].bias.grad.norm() > 0


@pytest.mark.parametrize("pick", [pick_config, pick_config_dx])
def test_every_number_of_rows_has_a_config_that_fits_it(pick):
    for M in (1, 2, 8, 9, 16, 17, 64, 65, 256, 1000, 4096, 100_000):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for assembly, can_be_wide in ((True, True), (True, False), (False, False)):
                for N, K in ((512, 512), (4096, 4096), (8192, 8192), (4096, 14336), (5000, 5001)):
                    config = pick(M, N, K, dtype, assembly, can_be_wide)
                    assert config.kernel in ("warp", "tile", "wide", "dense")
                    assert assembly and dtype != torch.float32 or config.kernel not in ("warp", "wide")
                    assert config.kernel != "warp" or 8 * config.eights >= M
                    assert config.split <= 8 and config.num_warps in (4, 8, 16)
                    if config.kernel == "wide":
                        assert can_be_wide and N % 8 == 0 and K % 8 == 0
                        loads = -(-K // 128) if pick is pick_config else -(-N // 128)
                        assert loads % config.split == 0


def test_a_contraction_is_shared_by_as_many_programs_as_the_gpu_runs():
    splits = [pick_config(16, 8192, 8192, torch.bfloat16, processors=count).split for count in (66, 132, 264)]
    assert splits == [1, 2, 4]


COMPILED_FOR_HOPPER = """
import torch
from hopper import NoGPU
from klora.kernels.int6 import quantize_int6, wide
from triton.runtime import driver

class Compiled:
    def __getitem__(self, grid):
        return lambda *args, **options: self.check(kernel.warmup(*args, grid=grid, **options))

    def check(self, compiled):
        assert compiled.asm["ptx"].count("wgmma.mma_async") == 4 and compiled.metadata.shared <= 232_448

driver._active, wide.multiprocessors, kernel, wide.wide_product = NoGPU(), lambda _: 132, wide.wide_product, Compiled()
for K in (512, 576):
    weight = quantize_int6(torch.randn(256, K))
    for dtype, backward, split in ((torch.bfloat16, False, 1), (torch.bfloat16, True, 1), (torch.float16, False, 2)):
        x = torch.zeros(300, 256 if backward else K, dtype=dtype)
        wide.wide(x, weight.packed, weight.scale, None, weight.shape, backward, split, 256, 4)
"""


@pytest.mark.slow
def test_the_wide_kernel_compiles_for_hopper():
    """It has no interpreter; this is what can be said of it without a GPU. In a process where Triton is itself."""
    compiled_for_hopper(COMPILED_FOR_HOPPER)


class TestGPU:
    """Few shapes and dtypes, for each kernel is compiled anew for each."""

    pytestmark = GPU

    @pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 32, 33, 64, 100, 384, 400])
    @pytest.mark.parametrize("size", [(512, 512), (1536, 2048), (4096, 1024), (192, 576), (576, 192)])
    def test_product_and_gradients(self, size, rows):
        check_product(matrix(*size, device="cuda"), rows, torch.bfloat16, "cuda", bias=False)

    @pytest.mark.parametrize(
        ("rows", "dtype", "group_size"),
        [(5, torch.float16, None), (40, torch.float16, None), (5, torch.float32, None), (3, torch.bfloat16, 64)]
        + [(12, torch.bfloat16, 32), (8, torch.float16, 128), (50, torch.bfloat16, 128)],
    )
    def test_dtypes_groups_and_bias(self, rows, dtype, group_size):
        check_product(matrix(272, 1152, group_size, device="cuda"), rows, dtype, "cuda")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(576, 576), (200, 192), (1536, 576), (136, 64)])
    def test_a_last_column_of_64_changes_no_bit(self, shape, dtype):
        """By every kernel, of few rows and of many, and both ways."""
        warps = Int6Config("warp", num_warps=8, split=2), Int6Config("warp", num_warps=8, eights=2, split=2)
        for rows, forward, backward in (
            (1, Int6Config("warp", num_warps=4), warps[0]),
            (8, Int6Config("warp", num_warps=8), warps[0]),
            (5, Int6Config("warp", num_warps=16), dataclasses.replace(warps[0], split=1)),
            (16, Int6Config("tile", block_m=16, split=1, stages=4), warps[1]),
            (9, Int6Config("tile", block_m=16, split=min(4, -(-shape[1] // 128)), stages=4), warps[1]),
            (40, Int6Config("tile", block_m=64, split=1, stages=4), Int6Config("dense")),
            (few(300, 140), Int6Config("tile", block_m=128), Int6Config("dense")),
        ):
            same_bits_as_padded(shape, None, rows, dtype, "cuda", forward, backward)

    @pytest.mark.parametrize("group_size", [32, 64])
    def test_a_last_column_of_64_changes_no_bit_of_groups(self, group_size):
        warp, tile = Int6Config("warp", num_warps=8), Int6Config("tile", block_m=32, split=2)
        same_bits_as_padded((200, 576), group_size, 7, torch.bfloat16, "cuda", warp, warp)
        same_bits_as_padded((200, 576), group_size, 30, torch.bfloat16, "cuda", tile, Int6Config("dense"))

    @pytest.mark.skipif(not is_hopper(), reason="the wide kernel is Hopper's")
    @pytest.mark.parametrize(
        ("shape", "split"), [((576, 576), 1), ((1536, 576), 1), ((200, 192), 1), ((200, 192), 2), ((136, 64), 1)]
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_last_column_of_64_changes_no_bit_of_the_wide_kernel(self, shape, split, dtype):
        config = Int6Config("wide", block_m=256, split=split, stages=4)
        for rows in (130, 700):
            same_bits_as_padded(shape, None, rows, dtype, "cuda", config, config)

    def test_odd_sizes_and_places(self):
        for size in ((33, 36), (100, 1000)):
            for rows in (3, 13):
                check_product(matrix(*size, device="cuda"), rows, torch.bfloat16, "cuda", bias=False)
        weight = matrix(64, 256, device="cuda")
        x = torch.randn(3 * 256 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(3, 256)
        assert torch.equal(int6_linear(x, weight), int6_linear(x.clone(), weight))

    def test_identity_gives_the_weight(self):
        weight = matrix(96, 256, device="cuda")
        exact = weight.dequantize(torch.bfloat16)
        eye = torch.eye(256, device="cuda", dtype=torch.bfloat16)
        for rows in (1, 8, 16, 32, 64, 256):
            for start in range(0, 256, rows):
                out = int6_linear(eye[start : start + rows], weight)
                assert torch.equal(out.T, exact[:, start : start + rows])

    @pytest.mark.parametrize(("dtype", "group_size"), [(torch.bfloat16, None), (torch.float16, 64)])
    @pytest.mark.parametrize("columns", [1024, 576, 64])
    def test_dequantised_bits(self, columns, dtype, group_size):
        weight = matrix(200, columns, group_size, device="cuda")
        assert torch.equal(dequantize(weight.packed, weight.scale, weight.shape, dtype), weight.dequantize(dtype))

    @pytest.mark.parametrize(("least", "most"), [(1, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 256)])
    def test_a_row_s_bits_do_not_depend_on_the_batch(self, least, most):
        weight = matrix(4096, 4096, device="cuda")
        x = torch.randn(most, 4096, device="cuda", dtype=torch.bfloat16)
        whole = int6_linear(x, weight)
        for rows in {least, (least + most) // 2, most - 1}:
            assert torch.equal(int6_linear(x[:rows], weight), whole[:rows])
            assert torch.equal(int6_linear(x[-rows:], weight), whole[-rows:])

    @pytest.mark.parametrize("rows", [1, 16, 32, 64, 256, 1024])
    def test_the_same_bits_every_time(self, rows):
        """Many programs and steps: products that run into each other would show in some of them."""
        weight = matrix(8192, 4096, device="cuda")
        x, dout = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (4096, 8192))
        first = int6_linear(x, weight), int6_linear_dx(dout, weight)
        for _ in range(20):
            again = int6_linear(x, weight), int6_linear_dx(dout, weight)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.skipif(not is_hopper(), reason="the wide kernel is Hopper's")
    @pytest.mark.parametrize("split", [1, 2, 4])
    @pytest.mark.parametrize(
        ("size", "rows"),
        [((520, 1032), 1), ((136, 1024), 130), ((1000, 520), 300), ((3200, 512), 4100)]
        + [((576, 192), 300), ((192, 576), 1000), ((1536, 576), 2100)],
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_wide_kernel_at_any_size(self, size, rows, split, dtype):
        """Blocks, loads and rows cut off, more blocks than programs; every output written, 20 times the same."""
        weight, config = matrix(*size, device="cuda"), Int6Config("wide", block_m=256, split=split, stages=4)
        rows = few(rows, 1030)
        x, dout = (torch.randn(rows, n, device="cuda", dtype=dtype) for n in size[::-1])
        bias = torch.randn(size[0], device="cuda", dtype=dtype)
        exact = weight.dequantize(torch.float64)
        plain = F.linear(x, exact.to(dtype), bias), dout @ exact.to(dtype)
        truth = F.linear(x.double(), exact, bias.double()), dout.double() @ exact
        loads = -(-size[1] // 128), -(-size[0] // 128)
        products = (
            lambda: _forward(x, weight.packed, weight.scale, bias, size[0], config),
            lambda: _backward(dout, weight.packed, weight.scale, size[1], config),
        )
        for product, steps, near, true in zip(products, loads, plain, truth, strict=True):
            if steps % split:
                continue
            first = product()
            assert_as_exact([first], [true], [near])
            assert all(torch.equal(first, product()) for _ in range(few(20, 2)))

    def test_opcheck_and_fullgraph(self):
        weight = matrix(64, 256, device="cuda")
        x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.library.opcheck(torch.ops.klora.int6_product, (x, weight.packed, weight.scale, None, 64))
        model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)).cuda().bfloat16()
        model[2] = Int6Linear.from_linear(model[2])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for rows in (1, 16):
            x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("group_size", [None, 64])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_scales_in_fp32(self, dtype, group_size):
        """Every kernel that the picks choose from, and the dequantisation, on rows that fp16 scales would lose."""
        size = few(4096, 1024)
        weight = wide_range(size, size, group_size, "cuda")
        assert torch.equal(dequantize(weight.packed, weight.scale, weight.shape, dtype), weight.dequantize(dtype))
        exact = weight.dequantize(torch.float64)
        for rows in (3, 12, 40, 100, few(300, 140), few(1000, 140)):
            check_product(weight, rows, dtype, "cuda", bias=False)
            if dtype != torch.float16:  # whose dense weight has lost the smallest rows; a kernel may keep them
                x = torch.randn(rows, size, device="cuda").to(dtype)
                out, truth = int6_linear(x, weight).double(), x.double() @ exact.T
                expected = exact.norm(dim=1) * x.double().norm() / size**0.5  # of a column of the output
                assert ((out - truth).norm(dim=0) <= 0.01 * expected).all()

    @pytest.mark.parametrize("rows", [3, 12, 40, 100, 300, 1000])
    def test_what_is_not_finite_stays_in_its_row(self, rows):
        weight = matrix(4096, 4096, device="cuda")
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        spoilt = x.clone()
        spoilt[1] = torch.nan
        for product in (int6_linear, int6_linear_dx):
            out, clean = product(spoilt, weight), product(x, weight)
            assert torch.equal(out[2:], clean[2:]) and torch.equal(out[0], clean[0]) and out[1].isnan().all()

    def test_empty_batches(self):
        weight = matrix(64, 256, device="cuda")
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(0, 256, device="cuda", dtype=dtype, requires_grad=True)
            out = int6_linear(x, weight)
            out.sum().backward()
            assert out.shape == (0, 64) and x.grad.shape == (0, 256)

    def test_the_search_agrees_with_the_cpu(self):
        weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
        weight[:, 5] *= 30
        moment = torch.rand(1024) + 0.1
        for group_size in (None, 64, "auto"):
            for second_moment in (None, moment):
                found = quantize_int6(weight.cuda(), group_size, second_moment=second_moment)
                wanted = quantize_int6(weight, group_size, second_moment=second_moment)
                errors = [((m.dequantize().cpu() - weight).square() * moment).sum() for m in (found, wanted)]
                assert float(errors[0] / errors[1]) == pytest.approx(1, rel=0.001)

    @pytest.mark.parametrize("rows", [1, 16, 64, 1024])
    def test_replays_in_a_graph(self, rows):
        weight = matrix(1536, 2048, device="cuda")
        x, dout = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (2048, 1536))
        int6_linear(x, weight), int6_linear_dx(dout, weight)
        (out, dx), replay = replayed(lambda: (int6_linear(x, weight), int6_linear_dx(dout, weight)))
        x.normal_(), dout.normal_()
        replay()
        assert torch.equal(out, int6_linear(x, weight)) and torch.equal(dx, int6_linear_dx(dout, weight))

    def test_no_second_copy_for_the_backward(self):
        weight = matrix(8192, 8192, device="cuda")
        x = torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        int6_linear(x, weight).sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        int6_linear(x, weight).sum().backward()
        assert torch.cuda.max_memory_allocated() - before < weight.nbytes // 2
