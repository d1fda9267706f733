"""The head's loss: kernels against the reference and float64, for outputs and every gradient."""

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import for_this_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import MARGIN, assert_as_exact
from klora.kernels.lora_head_nll import (
    check_targets,
    lora_head_nll,
    lora_head_nll_grads_,
    lora_head_nll_ref,
    softcap_nll,
    softcap_nll_ref,
    turns,
)
from klora.kernels.lora_head_nll.launch import Head
from klora.kernels.lora_head_nll.turns import pick_shares
from torch import Tensor

CAP, TEMPERATURE = 30.0, 0.98
NAMES = ("nll", "dh", "dlora_a", "dlora_b")


def draw(B=2, S=5, D=32, V=70, R=3, slots=None, dtype=torch.float32, device="cpu", spread=0.5, seed=0):
    """h, weight, lora_a, lora_b, targets, dnll; half of the targets are the likeliest token: some p are near 1."""
    generator = torch.Generator().manual_seed(seed)
    pool = B if slots is None else slots

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    h, weight = randn(B, S, D), randn(V, D) * spread
    a, b = (torch.rand(pool, R, D, generator=generator) * 2 - 1) / D**0.5, randn(pool, V, R) * 0.3
    targets = torch.randint(0, V, (B, S), generator=generator)
    likeliest = (h @ weight.T).argmax(-1)
    targets = torch.where(torch.rand(B, S, generator=generator) < 0.5, likeliest, targets)
    dnll = torch.rand(B, S, generator=generator) + 0.1
    return [t.to(device) for t in (h.to(dtype), weight.to(dtype), a, b, targets, dnll)]


def run(function, h, weight, a, b, targets, dnll, cap=CAP, temperature=TEMPERATURE, **more):
    """nll and the gradients of h, lora_a and lora_b."""
    leaves = [t.detach().requires_grad_() for t in (h, a, b)]
    nll = function(leaves[0], weight, *leaves[1:], targets, cap, temperature, **more)
    return nll.detach(), *torch.autograd.grad(nll, leaves, dnll.to(nll.dtype))


def run_plain(function, h, weight, targets, dnll, cap=CAP, temperature=TEMPERATURE, **more):
    """nll and the gradients of h and weight."""
    leaves = [t.detach().requires_grad_() for t in (h, weight)]
    nll = function(*leaves, targets, cap, temperature, **more)
    return nll.detach(), *torch.autograd.grad(nll, leaves, dnll.to(nll.dtype))


def doubled(inputs):
    return [t.double() if t.is_floating_point() else t for t in inputs]


def joined(results):
    """The results of several draws, tensor by tensor."""
    return [torch.stack(tensors) for tensors in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "S", "D", "V", "R"),
    [(2, 7, 32, 70, 3), (1, 1, 16, 5, 1), (3, 40, 48, 129, 17), (1, 9, 16, 40, 128)],
)
def test_outputs_and_gradients_are_as_exact_as_pytorchs(B, S, D, V, R, dtype):
    # A handful of sums is exact to a rounding or two on both sides, and chance decides which is better: eight draws.
    draws = [draw(B, S, D, V, R, dtype=dtype, seed=seed) for seed in range(1 if S > 7 else 8)]
    ours, plain, exact = (
        joined([run(function, *change(inputs), **more) for inputs in draws])
        for function, change, more in (
            (lora_head_nll, list, {"backend": "triton"}),
            (lora_head_nll_ref, list, {}),
            (lora_head_nll_ref, doubled, {}),
        )
    )
    assert_as_exact(ours, exact, plain)
    draws = [[h, weight, targets, dnll] for h, weight, _, _, targets, dnll in draws]
    ours, plain, exact = (
        joined([run_plain(function, *change(inputs), **more) for inputs in draws])
        for function, change, more in (
            (softcap_nll, list, {"backend": "triton"}),
            (softcap_nll_ref, list, {}),
            (softcap_nll_ref, doubled, {}),
        )
    )
    assert_as_exact(ours, exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sweep_with_a_row_factor_as_in_bf16(dtype, monkeypatch):
    """The way that bf16 takes, in dtypes that the interpreter knows; at this cap exp(logit) is in their range."""
    monkeypatch.setattr(Head, "is_bounded", True)
    monkeypatch.setattr(Head, "is_normalised", False)
    inputs = draw(3, 40, 48, 129, 5, dtype=dtype, slots=4)
    inputs[4][1, 3] = -100
    more = {"cap": 4.0, "slots": torch.tensor([2, -1, 2])}
    ours = run(lora_head_nll, *inputs, **more, backend="triton")
    exact = run(lora_head_nll_ref, *doubled(inputs), **more)
    # The quick arithmetic is for 16 bits: in fp32 its error of 1e-7 of the cap shows.
    margin = MARGIN if dtype == torch.float16 else 4
    assert_as_exact(ours, exact, run(lora_head_nll_ref, *inputs, **more), margin=margin)
    h, weight, _, _, targets, dnll = inputs
    plain = [h, weight, targets, dnll, 4.0]
    ours = run_plain(softcap_nll, *plain, backend="triton")
    exact = run_plain(softcap_nll_ref, *doubled(plain[:4]), 4.0)
    assert_as_exact(ours, exact, run_plain(softcap_nll_ref, *plain), margin=margin)


@pytest.mark.parametrize(("cap", "temperature"), [(3.0, 1.0), (15.0, 0.5), (200.0, 1.0), (30.0, 0.1)])
def test_every_softcap_and_temperature(cap, temperature):
    """Caps over 60 track a maximum; small ones saturate; wide logits make probabilities of 0 and 1."""
    inputs = draw(S=20, spread=4.0)
    ours = run(lora_head_nll, *inputs, cap, temperature, backend="triton")
    plain = run(lora_head_nll_ref, *inputs, cap, temperature)
    assert_as_exact(ours, run(lora_head_nll_ref, *doubled(inputs), cap, temperature), plain)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    slots=st.lists(st.integers(-1, 4), min_size=1, max_size=4),
    tokens=st.integers(1, 40),
    vocabulary=st.integers(1, 80),
    rank=st.integers(1, 5),
)
def test_slots_may_repeat_and_may_be_none(slots, tokens, vocabulary, rank):
    inputs = draw(len(slots), tokens, 16, vocabulary, rank, slots=5)
    chosen = torch.tensor(slots, dtype=torch.int32)
    ours = run(lora_head_nll, *inputs, slots=chosen, backend="triton")
    plain = run(lora_head_nll, *inputs, slots=chosen, backend="reference")
    for x, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-5)
    unnamed = [slot for slot in range(5) if slot not in slots]
    assert not ours[2][unnamed].any() and not ours[3][unnamed].any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_go_straight_into_a_flat_pool(backend):
    B, S, D, V, R, slots = 3, 9, 16, 20, 2, 5
    h, weight, a, b, targets, dnll = draw(B, S, D, V, R, slots=slots)
    start, size = 7, R * D + V * R
    pool, grads = torch.randn(slots, start + size + 3), torch.full((slots, start + size + 3), 99.0)

    def views(rows: Tensor) -> tuple[Tensor, Tensor]:
        middle = start + R * D
        return rows[:, start:middle].view(slots, R, D), rows[:, middle : start + size].view(slots, V, R)

    for view, values in zip(views(pool), (a, b), strict=True):
        view.copy_(values)
    chosen = torch.tensor([4, -1, 1])
    nll, dh = lora_head_nll_grads_(
        h, weight, *views(pool), targets, dnll, *views(grads), CAP, TEMPERATURE, chosen, backend=backend
    )
    expected = run(lora_head_nll_ref, h, weight, a, b, targets, dnll, slots=chosen)
    torch.testing.assert_close((nll, dh), expected[:2], rtol=1e-4, atol=1e-5)
    for view, grad in zip(views(grads), expected[2:], strict=True):
        torch.testing.assert_close(view[[1, 4]], grad[[1, 4]], rtol=1e-4, atol=1e-5)
        assert (view[[0, 2, 3]] == 99).all()
    assert (grads[:, :start] == 99).all() and (grads[:, start + size :] == 99).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_without_adapters_it_is_the_plain_head_and_its_gradient(backend):
    h, weight, a, b, targets, dnll = draw(3, 9)
    slots = torch.tensor([2, -1, 0])
    expected = run_plain(softcap_nll_ref, h, weight, targets, dnll)[:2]
    none = (None, None)
    nll, dh = lora_head_nll_grads_(h, weight, *none, targets, dnll, *none, CAP, TEMPERATURE, slots, backend=backend)
    torch.testing.assert_close((nll, dh), expected, rtol=1e-4, atol=1e-5)
    leaf = h.clone().requires_grad_()
    again = lora_head_nll(leaf, weight, *none, targets, CAP, TEMPERATURE, slots, backend=backend)
    assert torch.equal(again, nll) and torch.equal(torch.autograd.grad(again, leaf, dnll)[0], dh)
    with pytest.raises(ValueError, match="dlora_a is given; wanted: one for each adapter matrix"):
        lora_head_nll_grads_(h, weight, *none, targets, dnll, a, b, CAP, TEMPERATURE, slots, backend=backend)
    with pytest.raises(ValueError, match="lora_a and lora_b: wanted both or neither"):
        lora_head_nll(h, weight, a, None, targets, CAP, TEMPERATURE, slots, backend=backend)


def test_a_target_of_minus_100_is_not_scored():
    inputs = draw(S=6)
    inputs[4][0, 2] = inputs[4][1, 5] = -100
    for backend in ("reference", "triton"):
        nll, dh, _, _ = run(lora_head_nll, *inputs, backend=backend)
        assert nll[0, 2] == nll[1, 5] == 0 and not dh[0, 2].any() and not dh[1, 5].any()
    ours, plain = (run(lora_head_nll, *inputs, backend=name) for name in ("triton", "reference"))
    for x, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-5)
    check_targets(inputs[4], 70)
    inputs[4][0, 0] = 70
    with pytest.raises(ValueError, match="targets go from .* to 70; allowed: -100 and 0 to 69"):
        check_targets(inputs[4], 70)


def test_a_row_does_not_know_its_batch_mates():
    inputs = draw(3, 10)
    whole = run(lora_head_nll, *inputs, backend="triton")
    for row in range(3):
        alone = [t if t is inputs[1] else t[row : row + 1] for t in inputs]
        for x, y in zip(whole, run(lora_head_nll, *alone, backend="triton"), strict=True):
            assert torch.equal(x[row : row + 1], y)


def test_h_and_dnll_need_not_be_contiguous():
    h, weight, a, b, targets, _ = draw(2, 6, 32)
    dnll = torch.tensor(0.5).expand(2, 6)
    expected = run(lora_head_nll, h, weight, a, b, targets, dnll.contiguous(), backend="triton")
    wide = torch.randn(2, 11, 48)
    for view in (wide[:, 5:, 16:], wide[:, 5:, 3:35], torch.empty(2, 32, 6).mT, h.mT.contiguous().mT):
        view = view[..., :32]
        view.copy_(h)
        strided = (view, weight, a, b.mT.contiguous().mT, targets.T.contiguous().T, dnll)
        for x, y in zip(expected, run(lora_head_nll, *strided, backend="triton"), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("B", "S"), [(0, 4), (2, 0)])
def test_an_empty_batch_has_empty_losses_and_zero_gradients(B, S, backend):
    h, weight, a, b, targets, dnll = draw(B, S) if B else draw(1, S)
    h, a, b, targets, dnll = (t[:B] for t in (h, a, b, targets, dnll))
    if backend == "triton":
        nll, dh, da, db = run(lora_head_nll, h, weight, a, b, targets, dnll, backend=backend)
        assert dh.shape == h.shape and da.shape == a.shape and not da.any() and not db.any()
        assert not run_plain(softcap_nll, h, weight, targets, dnll, backend=backend)[2].any()
    else:
        nll = lora_head_nll(h, weight, a, b, targets, CAP)
    assert nll.shape == (B, S) and nll.dtype == torch.float32


def test_softcap_nll_takes_any_leading_dimensions():
    h, weight, _, _, targets, _ = draw(6, 4)
    nll = softcap_nll(h, weight, targets, CAP, backend="triton")
    assert torch.equal(
        softcap_nll(h.view(2, 3, 4, 32), weight, targets.view(2, 3, 4), CAP, backend="triton").view(6, 4), nll
    )
    assert torch.equal(softcap_nll(h[0, 0], weight, targets[0, 0], CAP, backend="triton"), nll[0, 0])
    torch.testing.assert_close(nll, softcap_nll(h, weight, targets, CAP))


def test_without_gradients_nothing_is_kept_for_them():
    h, weight, a, b, targets, _ = draw()
    with torch.no_grad():
        nll = lora_head_nll(h.requires_grad_(), weight, a, b, targets, CAP, backend="triton")
    assert not nll.requires_grad
    kept = torch.ops.klora.head_nll(h.detach(), weight, a, b, None, targets, CAP, 1.0, False)
    assert [t.numel() for t in kept[2:]] == [0, 0, 0] and torch.equal(kept[0], nll)


@pytest.mark.slow
def test_the_ops_are_registered_as_torch_wants_them():
    h, weight, a, b, targets, dnll = draw(2, 5, 16, 20, 2, slots=3)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (h, a, b)]
    torch.library.opcheck(
        torch.ops.klora.head_nll, (leaves[0], weight, *leaves[1:], slots, targets, CAP, TEMPERATURE, True)
    )
    h, a, b = (t.detach() for t in leaves)
    torch.library.opcheck(torch.ops.klora.head_nll, (h, weight, None, None, None, targets, CAP, TEMPERATURE, False))
    into = torch.zeros_like(h), torch.zeros_like(a), torch.zeros_like(b)
    about = h, weight, a, b, slots, targets, CAP, TEMPERATURE
    torch.library.opcheck(torch.ops.klora.lora_head_nll_grads_, (*about, dnll, dnll.clone(), *into))
    _, *kept = torch.ops.klora.head_nll(*about, True)
    torch.library.opcheck(torch.ops.klora.head_nll_backward, (*about, dnll, *kept, into[0], None, *into[1:]))


def test_it_is_compiled_whole():
    inputs = draw(2, 5, 16, 20, 2)
    compiled = torch.compile(lora_head_nll, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        run(compiled, *inputs, backend="triton"), run(lora_head_nll, *inputs, backend="triton"), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"h": torch.zeros(5, 32)}, r"h is float32 \[5, 32\]; wanted .* \[B, S, D\]"),
        ({"h": torch.zeros(2, 5, 16)}, r"weight is float32 \[70, 32\]; wanted float32 \[V, 16\]"),
        ({"h": torch.zeros(2, 5, 32).half()}, r"weight is float32 .*; wanted float16 \[V, 32\]"),
        ({"h": torch.zeros(2, 5, 24), "weight": torch.zeros(70, 24)}, "D is 24; wanted a positive multiple of 16"),
        ({"lora_a": torch.zeros(2, 3, 16)}, r"lora_a is float32 \[2, 3, 16\]; wanted .* \[slots, R, 32\]"),
        ({"lora_a": torch.zeros(2, 129, 32), "lora_b": torch.zeros(2, 70, 129)}, "R is 129; .* up to 128"),
        ({"lora_b": torch.zeros(2, 71, 3)}, r"lora_b is .* \[2, 71, 3\]; wanted float32 \[2, 70, 3\]"),
        ({"lora_b": torch.zeros(2, 70, 3).half()}, "lora_b is float16"),
        ({"lora_a": torch.zeros(3, 3, 32), "lora_b": torch.zeros(3, 70, 3)}, "3 slots are not one for each of 2"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, r"slots is int32 \[3\]; wanted .* \[2\]"),
        ({"slots": torch.zeros(2)}, "slots is float32"),
        ({"targets": torch.zeros(2, 5)}, "targets is float32"),
        ({"targets": torch.zeros(2, 4, dtype=torch.int64)}, r"targets is int64 \[2, 4\]; wanted .*\[2, 5\]"),
        ({"targets": torch.zeros(2, 5, dtype=torch.int64, device="meta")}, "targets is .* on meta; wanted .* on cpu"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: None, 'reference', 'triton'"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    names = ("h", "weight", "lora_a", "lora_b", "targets")
    arguments = dict(zip(names, draw(), strict=False), softcap=CAP, backend="triton")
    with pytest.raises(ValueError, match=says):
        lora_head_nll(**{**arguments, **change})


def test_bad_outputs_and_leading_dimensions_are_refused():
    h, weight, a, b, targets, dnll = draw()
    with pytest.raises(ValueError, match=r"dnll is float32 \[5\]; wanted .* \[2, 5\]"):
        lora_head_nll_grads_(h, weight, a, b, targets, dnll[0], a.clone(), b.clone(), CAP)
    with pytest.raises(ValueError, match="dlora_b has strides .*; wanted each slot contiguous"):
        lora_head_nll_grads_(h, weight, a, b, targets, dnll, a.clone(), b.mT.contiguous().mT, CAP)
    with pytest.raises(ValueError, match=r"targets is int64 \[2\]; wanted .* \[2, 5\]"):
        softcap_nll(h, weight, targets[:, 0], CAP)


def test_the_vocabulary_is_cut_where_rows_are_few():
    assert pick_shares(pairs=384, tiles=8, processors=132) == 1
    assert pick_shares(pairs=64, tiles=250, processors=132) == 2
    assert pick_shares(pairs=32, tiles=8, processors=132) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize(
        ("B", "S", "D", "V", "R", "dtype"),
        [
            (4, 256, 512, 1024, 16, torch.bfloat16),
            (3, 255, 512, 1000, 16, torch.bfloat16),
            (5, 50, 80, 77, 40, torch.bfloat16),
            (2, 1, 16, 3, 64, torch.bfloat16),
            (3, 255, 512, 1000, 80, torch.bfloat16),
            (5, 50, 80, 77, 128, torch.bfloat16),
            (5, 50, 80, 77, 128, torch.float32),
            (5, 50, 80, 77, 16, torch.bfloat16),  # widths to 128 at ranks to 16: see the loop over them in `sweep`
            (3, 100, 128, 300, 8, torch.bfloat16),
            (5, 50, 80, 77, 16, torch.float16),
            (5, 50, 80, 77, 16, torch.float32),
        ],
    )
    def test_outputs_and_gradients_are_as_exact_as_pytorchs(self, B, S, D, V, R, dtype):
        inputs = draw(B, S, D, V, R, dtype=dtype, device="cuda", spread=0.2)
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))  # what empty() hands out next is not zero
        ours = run(lora_head_nll, *inputs)
        assert_as_exact(ours, run(lora_head_nll_ref, *doubled(inputs)), run(lora_head_nll_ref, *inputs))
        h, weight, _, _, targets, dnll = inputs
        plain = [h, weight, targets, dnll]
        ours = run_plain(softcap_nll, *plain)
        assert_as_exact(ours, run_plain(softcap_nll_ref, *doubled(plain)), run_plain(softcap_nll_ref, *plain))

    @pytest.mark.parametrize(("rows", "D", "V"), [(9001, 80, 300), (20000, 512, 1000), (8192, 144, 5000)])
    def test_warps_that_take_turns_are_as_exact_as_pytorch(self, rows, D, V):
        rows = max(for_this_gpu(rows, V), min(rows, 8193))  # with less the warps would not take turns
        h, weight, _, _, targets, dnll = draw(1, rows, D, V, 1, dtype=torch.bfloat16, device="cuda", spread=0.2)
        targets[0, 3], targets[0, 4], targets[0, 5] = -100, V, 2**32 + 1
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))
        plain = [h, weight, targets, dnll]
        assert turns.takes(h) or torch.cuda.get_device_capability()[0] != 9
        ours = run_plain(softcap_nll, *plain)
        assert_as_exact(ours, run_plain(softcap_nll_ref, *doubled(plain)), run_plain(softcap_nll_ref, *plain))
        assert all(torch.equal(x, y) for x, y in zip(ours, run_plain(softcap_nll, *plain), strict=True))

    @pytest.mark.parametrize("cap", [3.0, 200.0])
    def test_saturated_and_unbounded_logits_in_bf16(self, cap):
        inputs = draw(5, 50, 80, 77, 40, dtype=torch.bfloat16, device="cuda", spread=4.0)
        ours = run(lora_head_nll, *inputs, cap)
        assert_as_exact(ours, run(lora_head_nll_ref, *doubled(inputs), cap), run(lora_head_nll_ref, *inputs, cap))

    def test_the_same_bits_every_time(self):
        inputs = draw(8, 100, 512, 1024, 16, slots=9, dtype=torch.bfloat16, device="cuda")
        slots = torch.tensor([8, 1, 1, 3, -1, 0, 8, 2], dtype=torch.int32, device="cuda")
        first = run(lora_head_nll, *inputs, slots=slots)
        for _ in range(19):
            assert all(torch.equal(x, y) for x, y in zip(first, run(lora_head_nll, *inputs, slots=slots), strict=True))
        h, weight, a, b, targets, dnll = inputs
        alone = run(lora_head_nll, h[3:4], weight, a, b, targets[3:4], dnll[3:4], slots=slots[3:4])
        assert torch.equal(alone[1], first[1][3:4]) and torch.equal(alone[2][3], first[2][3])

    def test_without_adapters_a_row_has_the_same_bits_in_every_batch(self):
        h, weight, _, _, targets, dnll = draw(64, 256, 512, 1024, dtype=torch.bfloat16, device="cuda")
        none, slots = (None, None), torch.arange(64, device="cuda")
        whole = lora_head_nll_grads_(h, weight, *none, targets, dnll, *none, CAP, TEMPERATURE, slots)
        few = (t[3:5].contiguous() for t in (targets, dnll))
        targets, dnll = few
        part = lora_head_nll_grads_(h[3:5], weight, *none, targets, dnll, *none, CAP, TEMPERATURE, slots[3:5])
        assert all(torch.equal(x[3:5], y) for x, y in zip(whole, part, strict=True))

    def test_no_fp32_logits_in_memory(self):
        inputs = draw(64, 256, 512, 1024, 16, dtype=torch.bfloat16, device="cuda")
        run(lora_head_nll, *inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(lora_head_nll, *inputs)
        rows, bytes_of_logits = 64 * 256, 64 * 256 * 1024 * 4
        assert torch.cuda.max_memory_allocated() - before < bytes_of_logits + rows * 512 * 2

    def test_it_is_captured_in_a_graph_and_compiled_whole(self):
        inputs = draw(4, 100, 512, 1024, 16, dtype=torch.bfloat16, device="cuda")
        h, weight, a, b, targets, dnll = inputs
        expected = run(lora_head_nll, *inputs)
        compiled = torch.compile(lora_head_nll, fullgraph=True)
        for x, y in zip(run(compiled, *inputs), expected, strict=True):
            assert torch.equal(x, y)
        grads = torch.empty_like(a), torch.empty_like(b)
        lora_head_nll_grads_(h, weight, a, b, targets, dnll, *grads, CAP, TEMPERATURE)
        for grad in grads:
            grad.fill_(float("nan"))
        outputs, replay = replayed(
            lambda: lora_head_nll_grads_(h, weight, a, b, targets, dnll, *grads, CAP, TEMPERATURE)
        )
        replay()
        for x, y in zip((*outputs, *grads), expected, strict=True):
            assert torch.equal(x, y)
