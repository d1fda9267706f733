"""lora_qkv_rope: projections, QK norm, rotation and gain in one launch, as exact as the plain ops in turn."""

import pytest
import torch
from conftest import replayed
from klora.bench.tolerance import assert_as_exact
from klora.kernels.lora_qkv import lora_qkv_rope, lora_qkv_rope_ref
from klora.kernels.rotary import rotary_tables

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def draw(
    batch=2, length=5, width=32, sizes=(64, 32, 16), head_dim=16, rank=8, slots=None, count=None, dtype=torch.float32,
    low=False, seed=0,
):  # fmt: skip
    """The arguments of the op by name, and the gradients of q, k and v; adapters in fp32, or in 16 bits like x."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    count, adapter = count or batch, dtype if low else torch.float32
    cos, sin = rotary_tables(length, head_dim, 5e4)
    call = {
        "x": randn(batch, length, width).to(dtype),
        "weight": (randn(sum(sizes), width) / width**0.5).to(dtype),
        "lora_a": (randn(count, 3, rank, width) / width**0.5).to(adapter),
        "lora_b": (randn(count, sum(sizes), rank) * 0.3).to(adapter),
        "cos": cos,
        "sin": sin,
        "gain": torch.rand(sizes[0] // head_dim, generator=generator) + 0.5,
        "slots": None if slots is None else torch.tensor(slots, dtype=torch.int32),
    }
    douts = [randn(batch, length, size).to(DEVICE, dtype) for size in sizes]
    call = {name: None if value is None else value.to(DEVICE) for name, value in call.items()}
    return {**call, "sizes": sizes, "head_dim": head_dim}, douts


def run(call, douts, backend="triton", **more):
    """q, k, v and the gradients of x, lora_a and lora_b."""
    leaves = {name: call[name].detach().requires_grad_() for name in ("x", "lora_a", "lora_b")}
    outputs = lora_qkv_rope(**{**call, **leaves}, backend=backend, **more)
    return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, list(leaves.values()), douts)


def doubled(call):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}


def assert_as_exact_as_plain_pytorch(batch, length, *more, seed=0, **options):
    """q, k, v, dx, dA and dB, over four draws where there are few numbers: their errors scatter."""
    seeds = range(seed, seed + (4 if batch * length < 40 else 1))
    draws = [draw(batch, length, *more, seed=one, **options) for one in seeds]
    ours = [run(call, douts) for call, douts in draws]
    plain = [run(call, douts, "reference") for call, douts in draws]
    exact = [run(doubled(call), [dout.double() for dout in douts], "reference") for call, douts in draws]
    assert_as_exact(*([torch.stack(same) for same in zip(*some, strict=True)] for some in (ours, exact, plain)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "width", "heads", "head_dim", "rank", "slots", "dtype", "low"),
    [
        (1, 48, (2, 1), 32, 8, [2, -1], torch.float32, False),
        (7, 16, (1, 1), 16, 1, None, torch.float16, True),
        (7, 16, (3, 1), 16, 20, [1, 1], torch.float32, False),
        (33, 80, (3, 2), 16, 20, [0, 0, 3], torch.float16, False),
        (70, 48, (1, 2), 64, 8, None, torch.float32, True),
    ],
)
def test_every_output_and_gradient_is_as_exact_as_plain_pytorch(
    length, width, heads, head_dim, rank, slots, dtype, low
):
    batch, count = (len(slots), 4) if slots else (2, 2)
    sizes = heads[0] * head_dim, heads[1] * head_dim, 48
    assert_as_exact_as_plain_pytorch(
        batch, length, width, sizes, head_dim, rank, slots, count, dtype, low, seed=4 * length
    )


def test_the_widest_head_is_rotated_as_a_whole():
    assert_as_exact_as_plain_pytorch(1, 20, sizes=(384, 128, 32), head_dim=128, dtype=torch.float16)
    call, _ = draw(1, 3, sizes=(256, 256, 32), head_dim=256, dtype=torch.float16)
    with pytest.raises(ValueError, match="head_dim is 256; wanted a power of two up to 128"):
        lora_qkv_rope(**call, backend="triton")


def test_a_gain_of_zero_gives_zeros_and_lets_no_gradient_through():
    call, douts = draw(2, 9)
    call["gain"][1] = 0.0
    ours, plain = run(call, douts), run(call, douts, "reference")
    assert not ours[0][..., 16:32].any()
    for got, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5)


def test_a_documents_bits_do_not_depend_on_its_batch_mates():
    call, douts = draw(3, 40, dtype=torch.float16)
    together = run(call, douts)
    torn = {**call, **{name: call[name].clone() for name in ("x", "lora_a", "lora_b")}}
    for name in ("x", "lora_a", "lora_b"):
        torn[name][[0, 2]] = float("nan")
    for one, other in zip(together, run(torn, douts), strict=True):
        assert torch.equal(one[1], other[1])


def test_gradients_go_to_a_pool_and_a_missing_gradient_counts_as_zero():
    call, douts = draw(2, 9, slots=[3, 1], count=4)
    grads = torch.full_like(call["lora_a"], 7.0), torch.full_like(call["lora_b"], 7.0)
    wanted = run(call, [douts[0], torch.zeros_like(douts[1]), torch.zeros_like(douts[2])])
    x = call["x"].detach().requires_grad_()
    q, _, _ = lora_qkv_rope(**{**call, "x": x}, grads=grads, backend="triton")
    (dx,) = torch.autograd.grad(q, x, douts[0].mT.contiguous().mT)
    assert torch.equal(dx, wanted[3])
    for grad, gradient in zip(grads, wanted[4:], strict=True):
        assert torch.equal(grad[[1, 3]], gradient[[1, 3]]) and (grad[[0, 2]] == 7.0).all()


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_no_documents_or_no_tokens(batch, length):
    call, douts = draw(batch, length, count=batch or None) if batch else draw(1, length)
    if not batch:
        call |= {name: call[name][:0] for name in ("x", "lora_a", "lora_b")}
        douts = [dout[:0] for dout in douts]
    *outputs, dx, da, db = run(call, douts)
    assert [tuple(out.shape) for out in outputs] == [(batch, length, size) for size in call["sizes"]]
    assert dx.shape == call["x"].shape and not da.any() and not db.any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head_dim": 24}, "head_dim is 24 and sizes .*; wanted an even divisor of the first two"),
        ({"cos": torch.zeros(5, 7, device=DEVICE)}, r"cos is float32 \[5, 7\]; wanted float32 \[5, 8\]"),
        ({"sin": torch.zeros(4, 8, device=DEVICE)}, r"sin is float32 \[4, 8\]; wanted float32 \[5, 8\]"),
        ({"gain": torch.zeros(2, device=DEVICE)}, r"gain is float32 \[2\]; wanted float32 \[4\]"),
        ({"gain": torch.zeros(4, device=DEVICE).double()}, r"gain is float64 \[4\]; wanted float32 \[4\]"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_input_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        lora_qkv_rope(**{**draw()[0], "backend": "triton", **change})


def test_the_cpu_takes_the_reference():
    call, _ = draw()
    for got, theirs in zip(lora_qkv_rope(**call), lora_qkv_rope_ref(**call), strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-5)
        assert CUDA or torch.equal(got, theirs)


@pytest.mark.slow
def test_opcheck():
    torch.use_deterministic_algorithms(False)  # opcheck compares runs, and unused padding is fresh memory
    call, (dq, dk, _) = draw(slots=[1, 0])
    leaves = [call[name].requires_grad_(name != "weight") for name in ("x", "weight", "lora_a", "lora_b")]
    tables = [call[name] for name in ("cos", "sin", "gain")]
    arguments = (*leaves, *tables, call["slots"], list(call["sizes"]), call["head_dim"], None, None)
    torch.library.opcheck(torch.ops.klora.lora_qkv_rope.default, arguments)
    q, k, *_, rstd_q, rstd_k = (t.detach() for t in torch.ops.klora.lora_qkv_rope(*arguments))
    given = dq, dk, q, k, rstd_q, rstd_k, *tables, torch.zeros_like(q), torch.zeros_like(k)
    torch.library.opcheck(torch.ops.klora.lora_qkv_rope_heads_backward_.default, given)


@pytest.mark.slow
def test_compile_with_fullgraph_gives_the_same_bits():
    call, douts = draw(slots=[1, 0])
    compiled = torch.compile(lora_qkv_rope, fullgraph=True, backend="aot_eager")
    leaves = {name: call[name].detach().requires_grad_() for name in ("x", "lora_a", "lora_b")}
    outputs = compiled(**{**call, **leaves}, backend="triton")
    gradients = torch.autograd.grad(outputs, list(leaves.values()), douts)
    for one, other in zip((*outputs, *gradients), run(call, douts), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOnTheGPU:
    SEED = {"width": 512, "sizes": (512, 256, 256), "head_dim": 64, "dtype": torch.bfloat16, "low": True}
    SLOTS = {"slots": [4, 0, 6, 2, 4], "count": 8}

    @pytest.mark.parametrize("length", [1, 7, 255, 1000])
    def test_bf16_of_the_seed_is_as_exact_as_plain_pytorch(self, length):
        assert_as_exact_as_plain_pytorch(5, length, **self.SEED, **self.SLOTS)

    @pytest.mark.parametrize(
        "other",
        [
            {"dtype": torch.float32, "sizes": (192, 64, 48), "head_dim": 64},
            {"dtype": torch.float16, "sizes": (400, 144, 16), "head_dim": 16, "rank": 20},
            {"dtype": torch.bfloat16, "sizes": (384, 128, 64), "head_dim": 128},
            {"dtype": torch.bfloat16, "sizes": (384, 96, 64), "head_dim": 32, "low": True},
        ],
    )
    def test_other_heads_ranks_and_dtypes(self, other):
        assert_as_exact_as_plain_pytorch(2, 130, 80, **other)

    def test_twenty_runs_and_a_cuda_graph_give_the_same_bits(self):
        torch.use_deterministic_algorithms(False)
        call, douts = draw(64, 255, **self.SEED)
        first = run(call, douts)
        for _ in range(20):
            for one, other in zip(first, run(call, douts), strict=True):
                assert torch.equal(one, other)
        held, replay = replayed(lambda: run(call, douts))
        replay()
        for one, other in zip(first, held, strict=True):
            assert torch.equal(one, other)
