"""The plugin that tests run with under compute-sanitizer: what it moves to the CPU, the GPU it pretends, its lines."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import hopper
import pytest
import sanitize
import sanitized
import test_mlp
import test_qkv_attention
import test_residual_mlp
import torch
import torch.nn.functional as F
from klora.kernels import dispatch, pingpong
from klora.kernels.linear import linear, linear_ref, turns
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).parent
ROUNDED = {torch.float64: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Moved(sanitized.FormulasOnTheCPU):
    """Moves what is on the CPU, as if that were the GPU, and keeps the ops' names."""

    def __init__(self):
        super().__init__("cpu")
        self.names = []

    def on_the_cpu(self, func, args, kwargs, like):
        self.names.append(func.overloadpacket.__name__)
        return super().on_the_cpu(func, args, kwargs, like)


class Called(TorchDispatchMode):
    """Keeps the ops' names and the dtypes of mm's. Around another mode it sees what that calls."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        if func.overloadpacket is torch.ops.aten.mm:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def draw(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float32])
def test_products_run_on_the_cpu_forward_and_backward(dtype):
    """But those in fp32. Of 16 bits they are rounded once."""
    x, w, dout = draw((9, 40), (40, 7), (9, 7), dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, w)]
    with Called() as called, Moved() as moved:
        out = x @ w
        found = [out, *torch.autograd.grad(out, leaves, dout)]
    assert moved.names == ([] if dtype == torch.float32 else ["mm"] * 3) and called.names.count("mm") == 3
    assert called.dtypes == {torch.float64 if dtype == torch.float64 else torch.float32}
    x, w, dout = (tensor.detach().float() if dtype.itemsize == 2 else tensor.detach() for tensor in (x, w, dout))
    for one, other in zip(found, (x @ w, dout @ w.mT, x.mT @ dout), strict=True):
        assert one.dtype == dtype and one.device == x.device
        torch.testing.assert_close(one, other.to(dtype), rtol=1e-12 if dtype == torch.float64 else 0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_all_kinds_of_products_in_place_and_into_a_tensor_too(dtype):
    a, b, c, vector = draw((3, 5, 8), (3, 8, 6), (3, 5, 6), (8,), dtype=dtype)
    calls = [
        (lambda c: torch.bmm(a, b), "bmm"),
        (lambda c: torch.baddbmm(c, a, b, beta=0.5, alpha=2.0), "baddbmm"),
        (lambda c: c.baddbmm_(a, b), "baddbmm_"),
        (lambda c: torch.addmm(c[0], a[0], b[0]), "addmm"),
        (lambda c: c[0].addmm_(a[0], b[0]), "addmm_"),
        (lambda c: torch.mm(a[0], b[0], out=c[0]), "mm"),
        (lambda c: F.linear(a[0], b[0].mT, c[0, 0]), "addmm"),
        (lambda c: a[0] @ vector, "mv"),
        (lambda c: vector @ vector, "dot"),
        (lambda c: torch.einsum("bij,bjk->bik", a, b), "bmm"),
    ]
    for call, name in calls:
        expected, changed = c.clone(), c.clone()
        with Moved() as moved:
            found = call(changed)
        torch.testing.assert_close(found, call(expected), rtol=ROUNDED[dtype] or 1e-12, atol=4 * ROUNDED[dtype])
        torch.testing.assert_close(changed, expected, rtol=ROUNDED[dtype] or 1e-12, atol=4 * ROUNDED[dtype])
        assert moved.names == [name]
        assert torch.equal(changed, c) != (name.endswith("_") or found._base is changed), name
    held = c[0].contiguous()
    with Moved():
        assert torch.mm(a[0], b[0], out=held) is held and held.addmm_(a[0], b[0]) is held


def formula(table, x):
    """What references are made of: lookups, views, sums, writes in place and into a part."""
    rows = F.embedding(torch.tensor([1, 1, 3]), table) @ x
    p = (rows * 0.5).softmax(-1) * 1.5
    p[0].mul_(2).add_(0.25)
    p[:, 1:] += rows[:, :-1].exp().mean(1, keepdim=True)
    torch._foreach_mul_([p[2]], 2.0)
    mask = torch.ones(p.shape).triu(1).bool()
    return torch.where(mask, p, 0.0).cumsum(1) + torch.cat([p, rows], 1).square().norm() + p.detach().amax(1, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float32])
def test_a_formula_runs_there_but_in_fp32_only_what_is_large(dtype):
    def gradients():
        table, x = (tensor.requires_grad_() for tensor in draw((10, 4), (4, 6), dtype=dtype))
        out = formula(table, x)
        return [out.detach(), *torch.autograd.grad(out, (table, x), torch.ones_like(out))]

    expected = gradients()
    with Moved() as moved:
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= max(4 * ROUNDED.get(dtype, 0.0), 1e-6 if dtype == torch.float32 else 1e-12)
    if dtype == torch.float32:
        assert moved.names == ["embedding_dense_backward"]
    else:
        of_them = {"embedding", "mm", "_softmax", "mul_", "exp", "where", "cumsum", "cat", "embedding_dense_backward"}
        assert of_them <= {*moved.names}
    with Moved() as moved:
        q, r = torch.linalg.qr(expected[0].float())
        q @ r
    assert moved.names == ["linalg_qr"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_has_another_dtype_or_draws_stays(dtype):
    (x,) = draw((5, 6), dtype=dtype)
    calls = (
        lambda: x.softmax(-1, dtype=torch.float32),
        lambda: x.sum(1, dtype=torch.float32),
        lambda: x.float() + 1,
        lambda: x.to(torch.float32) * x,
        lambda: torch.full_like(x, 2),
        lambda: x.new_zeros(3).fill_(2),
        lambda: x.clone(memory_format=torch.contiguous_format),
        lambda: torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(1)),
    )
    for call in calls:
        with Moved() as moved:
            found = call()
        expected = call()
        assert found.dtype == expected.dtype and torch.equal(found, expected) and moved.names == []


def test_ops_of_klora_run_where_they_are():
    """A product in an op, and the kernels; the formula that they are compared with does not."""

    @dispatch.custom_op("klora_sanitized::squared", mutates_args=())
    def squared(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    squared.register_fake(torch.empty_like)
    squared.register_autograd(
        lambda ctx, grad: squared(grad), setup_context=lambda ctx, inputs, output: ctx.set_materialize_grads(True)
    )
    x = draw((5, 5))[0]
    with Moved() as moved:
        leaf = x.clone().requires_grad_()
        out = squared(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, x)
    assert moved.names == [] and torch.equal(out, x @ x) and torch.equal(gradient, x @ x)
    names = []
    for function, options in ((linear, {"backend": "triton"}), (linear_ref, {})):
        x, w, dout = draw((20, 16), (16, 16), (20, 16), dtype=torch.float16)
        with Moved() as moved:
            torch.autograd.grad(function(x.requires_grad_(), w, **options), x, dout)
        names.append(moved.names)
    assert names == [[], ["mm"] * 2]


def test_a_backward_sees_the_mode_in_a_thread_of_its_own():
    """PyTorch hands the modes on to it. That of a GPU's tensors has one; on a CPU one that is nested too deeply."""
    seen = []

    class Deeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaf = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
                if ctx.depth:
                    Deeper.apply(leaf, ctx.depth - 1).sum().backward()
                else:
                    seen.append(threading.get_native_id())
                    (leaf @ leaf.detach()).sum().backward()
            return grad, None

    with Moved() as moved:
        Deeper.apply(torch.ones(3, 3, dtype=torch.float64, requires_grad=True), 80).sum().backward()
    assert moved.names.count("mm") == 2, "the product, and its backward"
    assert seen != [threading.get_native_id()]


@pytest.mark.parametrize(
    ("allowed", "runs"),
    [
        (SDPBackend.MATH, "bmm"),
        (SDPBackend.EFFICIENT_ATTENTION, "_scaled_dot_product_flash_attention_for_cpu"),
        (SDPBackend.CUDNN_ATTENTION, "_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_attention_runs_on_the_cpu_fused_where_that_was_allowed(allowed, runs):
    """Causal, with a mask, and with fewer heads of k and v."""
    q, k, v, mask = draw((2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16), (9, 9))
    repeated = (tensor.repeat_interleave(2, 1) for tensor in (k, v))
    causal = torch.zeros(9, 9, dtype=torch.float64).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    k2, v2 = repeated
    for arguments, options, bias in (
        ((q, k, v), {"is_causal": True, "enable_gqa": True}, causal),
        ((q, k, v, mask), {"enable_gqa": True}, mask),
        ((q, k2, v2), {"attn_mask": mask}, mask),
        ((q, k2, v2), {}, torch.zeros(9, 9)),
    ):
        leaf = arguments[0].clone().requires_grad_()
        with Called() as called, sanitized.AttentionOnTheCPU("cpu"), sdpa_kernel(allowed):
            out = F.scaled_dot_product_attention(leaf, *arguments[1:], **options)
            (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        assert runs in called.names and ("bmm" in called.names) == (runs == "bmm")
        other = q.clone().requires_grad_()
        wanted = (other @ k2.mT / 4 + bias).softmax(-1) @ v2
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(gradient, torch.autograd.grad(wanted.square().sum(), other)[0])


UNDER_THE_PLUGIN = """
import os, pytest, torch
from klora.kernels.dispatch import l2_bytes, multiprocessors
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

def test_few_multiprocessors():
    gpu = torch.device("cuda", 0)
    assert multiprocessors(gpu) == 16 and l2_bytes(gpu) == 50

def test_the_modes():
    assert [_get_current_dispatch_mode().device, _get_current_function_mode().device] == ["cuda", "cuda"]
    assert "OnTheCPU" in str(_get_current_dispatch_mode()) and torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))

def test_it_is_compiled():
    assert _get_current_dispatch_mode() is _get_current_function_mode() is None
    assert torch.compile(lambda x: x @ x, backend="eager", fullgraph=True)(torch.eye(2)).trace() == 2

@pytest.mark.parametrize("text", ["with spaces, a/b::c"])
def test_fails(text):
    assert False

@pytest.mark.skip
def test_skipped():
    pass

def test_is_cut():
    os._exit(9)
"""
FAKE = """
import torch
from types import SimpleNamespace
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132, L2_cache_size=50)
"""


@pytest.mark.slow
def test_a_process_with_the_plugin(tmp_path):
    """Its GPU, the modes around each test, and a line for each, in the log before the next begins."""
    (tmp_path / "test_it.py").write_text(UNDER_THE_PLUGIN)
    (tmp_path / "fake.py").write_text(FAKE)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "fake", "-p", "sanitized", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(tmp_path), str(TESTS), os.environ.get("PYTHONPATH", "")])
    with open(tmp_path / "log", "w") as log:
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""}
        done = subprocess.run([*command, "test_it.py"], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    text = (tmp_path / "log").read_text()
    assert done.returncode == 9, text
    over = sanitize.tests_over(text)
    names = ["few_multiprocessors", "the_modes", "it_is_compiled", "fails[with spaces, a/b::c]", "skipped"]
    assert [test for _, test in over] == [f"test_it.py::test_{name}" for name in names], text
    ends = re.findall(r"^[.Fs] sanitized: [\d.]+ s, (\w+): ", text, re.MULTILINE)
    assert ends == ["passed", "passed", "passed", "failed", "skipped"]


def test_nothing_else_loads_it(pytestconfig):
    assert not pytestconfig.pluginmanager.hasplugin("sanitized")
    assert "sanitized" in sanitize.Part("memcheck", "test_mlp", [], 1, 1).command("compute-sanitizer")
    for name in ("pyproject.toml", "Makefile", "tests/conftest.py"):
        assert "sanitized" not in (TESTS.parent / name).read_text()


def cases(function, *names):
    """The values that a test is parametrized with."""
    (values,) = (mark.args[1] for mark in function.pytestmark if mark.name == "parametrize" and mark.args[0] == names)
    return values


def test_rows_for_a_gpu_of_few_multiprocessors_are_few_and_warps_still_take_turns():
    """On an H200 they are what the tests say."""
    assert pingpong.BLOCK.value == hopper.TILE
    mlp = cases(test_mlp.test_warps_that_take_turns_compute_the_same_bits, "rows", "D", "hidden")
    residual = test_residual_mlp.TestOnTheGpu.test_warps_that_take_turns_compute_the_same_bits
    heads = test_qkv_attention.test_warps_that_take_turns_finish_heads_with_the_same_bits
    products = [(rows, hidden) for rows, _, hidden in mlp]
    products += [(rows, D) for rows, D, _ in cases(residual, "rows", "D", "hidden")]
    products += [
        (rows, (queries + 2 * keys) * head_dim)
        for rows, queries, keys, head_dim in cases(heads, "rows", "queries", "keys", "head_dim")
    ]
    assert len(products) == 9
    for rows, outputs in products:
        assert [hopper.for_this_gpu(rows, outputs, processors) for processors in (132, 144)] == [rows, rows]
        for processors in (1, 8, sanitized.MULTIPROCESSORS, 66):
            fewer = hopper.for_this_gpu(rows, outputs, processors)
            tiles = turns._tiles(fewer, outputs)
            assert turns.TURNS * processors < hopper.TILES_EACH * processors <= tiles and fewer < rows
            assert fewer % hopper.TILE == rows % hopper.TILE
        assert hopper.for_this_gpu(rows, outputs, sanitized.MULTIPROCESSORS) <= 98304 // 8
    assert hopper.for_this_gpu(130, 1536, 8) == 130, "no more than are asked for"


def test_tokens_and_runs_are_fewer_where_a_gpu_seems_to_have_few_multiprocessors():
    assert [hopper.few(1000, 300, processors) for processors in (132, 144, 16)] == [1000, 1000, 300]
    assert hopper.few(20, 300, 16) == 20
