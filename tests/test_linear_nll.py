"""The loss of any model's head: as exact as F.cross_entropy, whatever the slices, and what it does not score."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, replayed
from hopper import few
from klora.bench.tolerance import assert_as_exact
from klora.kernels import linear_nll, linear_nll_ref, softcap_nll_ref
from klora.kernels.lora_head_nll.logits import STEP, slice_width
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
IGNORED = -100
ALL_KEPT, SLICES = 2 << 30, 1
"""`memory`: all logits are kept, or as few as there can be: slices of 1,024 columns, made again in the backward."""


def draw(rows=7, D=24, V=72, dtype=torch.float32, spread=0.5, seed=0) -> list[Tensor]:
    """h, weight, targets, token weights; half of the targets are the likeliest token: some p are near 1."""
    generator = torch.Generator().manual_seed(seed)
    h, weight = torch.randn(rows, D, generator=generator), torch.randn(V, D, generator=generator) * spread
    targets = torch.randint(0, V, (rows,), generator=generator)
    half = torch.rand(rows, generator=generator) < 0.5
    targets = torch.where(half, (h @ weight.T).argmax(-1), targets)
    targets[::5] = IGNORED
    token_weights = torch.rand(rows, generator=generator) + 0.1
    return [t.to(DEVICE) for t in (h.to(dtype), weight.to(dtype), targets, token_weights)]


def doubled(inputs) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in inputs]


def run(function, inputs, weighted=True, wanted=(0, 1), **about) -> list[Tensor]:
    """The loss and the gradients of h, weight and token_weights (those of `wanted` and, where given, the last)."""
    h, weight, targets, token_weights = inputs
    leaves = [t.detach().requires_grad_(place in wanted) for place, t in enumerate((h, weight))]
    token_weights = token_weights.detach().requires_grad_() if weighted else None
    loss = function(*leaves, targets, token_weights=token_weights, **about)
    into = [leaves[place] for place in wanted] + ([token_weights] if weighted else [])
    dloss = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, into, dloss.to(loss.dtype))]


def check(draws, memory=ALL_KEPT, **about) -> None:
    ours, exact, plain = (
        [run(function, change(inputs), **more) for inputs in draws]
        for function, change, more in (
            (linear_nll, list, {**about, "memory": memory, "backend": "triton"}),
            (linear_nll_ref, doubled, about),
            (linear_nll_ref, list, about),
        )
    )
    joined = ([torch.stack(same) for same in zip(*results, strict=True)] for results in (ours, exact, plain))
    assert_as_exact(*joined)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [ALL_KEPT, SLICES])
@pytest.mark.parametrize(
    ("rows", "D", "V", "softcap", "reduction"),
    [
        pytest.param(6, 24, 3000, None, "mean", marks=pytest.mark.slow),
        (3, 40, 2056, 30.0, "none"),
        (40, 16, 77, None, "sum"),
        (1, 8, 8, 5.0, "none"),
    ],
)
def test_loss_and_gradients_are_as_exact_as_pytorchs(rows, D, V, softcap, reduction, memory, dtype):
    draws = [draw(rows, D, V, dtype, seed=seed) for seed in range(8 if rows < 10 else 1)]
    for _, _, targets, _ in draws:
        targets[0] = V - 1  # something is scored where one row is all there is
    check(draws, memory, softcap=softcap, temperature=0.9, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ignored", [-100, 3])
def test_it_is_pytorchs_cross_entropy(reduction, ignored):
    """An index in the vocabulary may be the ignored one, such as that of padding."""
    h, weight, targets, _ = draw(rows=20)
    targets[2], targets[0] = ignored, 71
    targets = torch.where(targets == IGNORED, ignored, targets)
    wanted = F.cross_entropy(F.linear(h, weight), targets, reduction=reduction, ignore_index=ignored)
    for backend in ("reference", "triton"):
        for given in (targets, targets.int()):
            loss = linear_nll(h, weight, given, ignore_index=ignored, reduction=reduction, backend=backend)
            torch.testing.assert_close(loss, wanted)


def test_a_weighted_mean_divides_by_the_weights_of_what_is_scored():
    h, weight, targets, token_weights = draw(rows=20)
    nll = softcap_nll_ref(h, weight, targets, 30.0)
    scored = targets != IGNORED
    wanted = (nll * token_weights)[scored].sum() / token_weights[scored].sum()
    token_weights[~scored] = float("nan")
    for backend in ("reference", "triton"):
        torch.testing.assert_close(
            linear_nll(h, weight, targets, 30.0, token_weights=token_weights, backend=backend), wanted
        )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_where_nothing_is_scored_the_mean_and_its_gradients_are_zero(backend):
    inputs = draw()
    inputs[2].fill_(IGNORED)
    for weighted in (False, True):
        assert not any(bool(t.any()) for t in run(linear_nll, inputs, weighted, backend=backend))


def test_slices_change_no_more_than_rounding_and_no_bit_from_run_to_run():
    inputs = draw(5, 16, 2500)
    kept, again = (run(linear_nll, inputs, memory=m, backend="triton") for m in (ALL_KEPT, SLICES))
    torch.testing.assert_close(again, kept)
    for memory, first in ((ALL_KEPT, kept), (SLICES, again)):
        same = run(linear_nll, inputs, memory=memory, backend="triton")
        assert all(torch.equal(x, y) for x, y in zip(same, first, strict=True))


def test_only_the_gradients_that_are_wanted_are_made():
    inputs = draw(5, 16, 2500)
    both = run(linear_nll, inputs, weighted=False, memory=SLICES, backend="triton")
    for place in (0, 1):
        one = run(linear_nll, inputs, weighted=False, wanted=(place,), memory=SLICES, backend="triton")
        assert torch.equal(one[1], both[1 + place])


def test_what_is_kept_is_what_memory_says():
    h, weight, targets, _ = draw(rows=10, V=72)

    def kept_by(memory, requires_grad=True):
        seen: list[Tensor] = []
        leaf = h.detach().requires_grad_(requires_grad)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            linear_nll(leaf, weight, targets, memory=memory, backend="triton")
        return [t for t in seen if t.shape == (10, 72)]

    assert len(kept_by(10 * 72 * 4)) == 1 and not kept_by(10 * 72 * 4 - 1) and not kept_by(ALL_KEPT, False)
    assert slice_width(4096, 152_064, 2, 2 << 30) == 51_200 and slice_width(4096, 1000, 2, 2 << 30) == 1000
    for rows, memory in ((4096, 1 << 30), (1 << 20, 1 << 30), (10, 1)):
        width = slice_width(rows, 152_064, 2, memory)
        assert width % STEP == 0 and (width == STEP or width * rows * 2 <= memory // 4)


def test_any_leading_dimensions_and_strides():
    h, weight, targets, _ = draw(rows=12)
    wanted = run(linear_nll, (h, weight, targets, None), False, backend="triton")
    apart = h.repeat(1, 2).view(3, 4, 48)[..., :24], weight.mT.contiguous().mT, targets.view(4, 3).T.contiguous().T
    found = run(linear_nll, (apart[0], apart[1], targets.view(3, 4), None), False, backend="triton")
    torch.testing.assert_close(found, [wanted[0], wanted[1].view(3, 4, 24), wanted[2]])
    order = torch.arange(12, device=DEVICE).view(4, 3).T
    torch.testing.assert_close(linear_nll(h[order], weight, apart[2].T, backend="triton"), wanted[0])
    one = linear_nll(h[1], weight, targets[1], reduction="none", backend="triton")
    torch.testing.assert_close(one, linear_nll_ref(h, weight, targets, reduction="none")[1])


def test_very_large_logits_neither_overflow_nor_vanish():
    h, weight, targets, _ = draw(rows=12, V=3000, spread=40.0)
    targets[0], targets[5] = 2999, 0
    check([[h, weight, targets, torch.ones(12, device=DEVICE)]], SLICES)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [ALL_KEPT, SLICES])
def test_the_ops_are_registered_as_torch_wants_them(memory):
    h, weight, targets, _ = draw(3, 16, 1100)
    about = targets, 30.0, 0.9, IGNORED, memory
    leaves = [t.clone().requires_grad_() for t in (h, weight)]
    torch.library.opcheck(torch.ops.klora.linear_nll, (*leaves, *about, True))
    torch.library.opcheck(torch.ops.klora.linear_nll, (h, weight, *about, False))
    _, lse, z = torch.ops.klora.linear_nll(h, weight, *about, True)
    grads = torch.zeros_like(h), torch.zeros_like(weight)
    torch.library.opcheck(torch.ops.klora.linear_nll_backward_, (h, weight, *about, torch.ones(3), lse, z, *grads))


@pytest.mark.slow
def test_it_is_compiled_whole():
    inputs = draw()
    compiled = torch.compile(linear_nll, fullgraph=True, backend="aot_eager")
    wanted = run(linear_nll, inputs, backend="triton")
    torch.testing.assert_close(run(compiled, inputs, backend="triton"), wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"h": torch.zeros(7, 16)}, r"weight is float32 \[72, 24\]; wanted float32 \[V, 16\]"),
        ({"weight": torch.zeros(72, 24).half()}, r"weight is float16 .*; wanted float32"),
        ({"weight": torch.zeros(0, 24)}, "V is 0; wanted a positive number"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, r"targets is int64 \[6\]; wanted int32 or int64 \[7\]"),
        ({"targets": torch.zeros(7)}, "targets is float32"),
        ({"token_weights": torch.zeros(6)}, r"token_weights is float32 \[6\]; wanted .* \[7\]"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"reduction": "average"}, "reduction is 'average'; wanted one of none, sum, mean"),
        ({"memory": 0}, "memory is 0; wanted a positive number"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    h, weight, targets, _ = (t.cpu() for t in draw())
    with pytest.raises(ValueError, match=says):
        linear_nll(**{"h": h, "weight": weight, "targets": targets, "backend": "reference", **change})


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(
        ("rows", "D", "V", "softcap"), [(1000, 512, 5000, None), (333, 136, 32_008, 30.0), (5, 24, 1000, None)]
    )
    @pytest.mark.parametrize("memory", [ALL_KEPT, 1 << 22])
    def test_loss_and_gradients_are_as_exact_as_pytorchs(self, rows, D, V, softcap, memory, dtype):
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))  # what empty() hands out next is not zero
        check([draw(few(rows, 60), D, V, dtype, spread=0.2)], memory, softcap=softcap, reduction="none")

    @pytest.mark.parametrize("memory", [ALL_KEPT, 256 << 20])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_the_vocabulary_of_a_large_model(self, memory, reduction):
        """152,064 x 2,048: against float32, whose error is far below that of bf16; float64 would take minutes."""
        inputs = draw(4096, 2048, 152_064, torch.bfloat16, spread=0.03)
        ours = run(linear_nll, inputs, memory=memory, reduction=reduction)
        again = run(linear_nll, inputs, memory=memory, reduction=reduction)
        assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
        plain = run(linear_nll_ref, inputs, reduction=reduction)
        fp32 = [t.float() if t.is_floating_point() else t for t in inputs]
        assert_as_exact(ours, run(linear_nll_ref, fp32, reduction=reduction), plain)

    @pytest.mark.parametrize("memory", [2 << 30, 256 << 20])
    def test_its_memory_is_what_it_says(self, memory):
        h, weight, targets, _ = draw(4096, 512, 152_064, torch.bfloat16, spread=0.03)
        leaves = [t.requires_grad_() for t in (h, weight)]
        kept = 4096 * 152_064 * 2
        allowed = (kept if kept <= memory else 0) + memory // 4 + weight.numel() * 2 + h.numel() * 10 + (64 << 20)
        for _ in range(2):  # cuBLAS takes its workspace at the first call
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(linear_nll(*leaves, targets, memory=memory), leaves)
        assert torch.cuda.max_memory_allocated() - before <= allowed

    def test_it_is_captured_in_a_graph_and_compiled_whole(self):
        inputs = draw(500, 128, 5000, torch.bfloat16, spread=0.2)
        wanted = run(linear_nll, inputs, memory=1 << 20)
        found = run(torch.compile(linear_nll, fullgraph=True), inputs, memory=1 << 20)
        torch.testing.assert_close(found, wanted)
        h, weight, targets, token_weights = inputs
        leaves = [t.detach().requires_grad_() for t in (h, weight)]

        def step():
            loss = linear_nll(*leaves, targets, token_weights=token_weights, memory=1 << 20)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        held, replay = replayed(step, warm_up=1)
        replay()
        assert all(torch.equal(x, y) for x, y in zip(held, step(), strict=True))
