"""Newton-Schulz: the coefficients, the kernels in the interpreter and on a GPU, and what no spectrum may do to them."""

import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import replayed
from hopper import few
from hypothesis import example, given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import assert_as_exact
from klora.bench.tolerance import relative_error as error
from klora.kernels.newton_schulz import (
    NewtonSchulzConfig,
    coefficients_of,
    muon_apply_,
    muon_updates,
    newton_schulz,
    newton_schulz_ref,
    op,
    pick_config,
    pick_form,
)
from klora.kernels.newton_schulz.edges import fill_arena, measure
from klora.kernels.newton_schulz.pieces import pieces_of
from klora.kernels.newton_schulz.plan import GRAM, PROGRAMS, SYMMETRIC, Plan, Shapes, plan_of, result_layout
from klora.kernels.newton_schulz.products import run_products
from klora.kernels.newton_schulz.reference import EPS, SAFETY

SETS = ("jordan", "polar_express")
RANGES = {"jordan": (0.68, 1.13), "polar_express": (0.86, 1.14)}


def with_spectrum(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """A float64 matrix with these singular values and random singular vectors."""
    side = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, side, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, side, dtype=torch.float64))
    return u @ torch.diag(values) @ v.T


def plain(x: torch.Tensor, coefficients: str = "jordan") -> torch.Tensor:
    """The batched GEMMs of PyTorch, axpys fused, in bf16."""
    x = (x.float() / torch.linalg.vector_norm(x.float(), dim=(-2, -1), keepdim=True)).bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in coefficients_of(coefficients, 5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the coefficients


def nearest_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The a x + b x^3 + c x^5 whose largest distance from 1 on [low, high] is least, by Remez's exchange."""
    points = torch.tensor([low, (3 * low + high) / 4, (low + 3 * high) / 4, high], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for _ in range(60):
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        turns = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        points = torch.tensor([low, *turns, high], dtype=torch.float64)
    return a, b, c


def test_polar_express_is_the_composition_of_nearest_quintics():
    """Amsel et al. 2025: each is the nearest quintic on what those before it left of [0.001, 1], recentred on 1."""
    found = coefficients_of("polar_express", 9)
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    for step in range(7):
        a, b, c = nearest_quintic(max(low, cushion * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        a, b, c = (2.0 / sum(ends) * k for k in (a, b, c))
        assert found[step] == pytest.approx((a / SAFETY, b / SAFETY**3, c / SAFETY**5), rel=1e-8)
        low = a * low + b * low**3 + c * low**5
        high = 2.0 - low
    assert found[7:] == [(1.875, -1.25, 0.375)] * 2
    assert coefficients_of("jordan", 2) == [(3.4445, -4.7750, 2.0315)] * 2


def check_range(coefficients: str, form: str | None, device: str, rows: int, columns: int, spread: float) -> None:
    """Singular values end in their range, from spectra whose normalised values reach down to 0.01."""
    low, high = RANGES[coefficients]
    for values in (torch.logspace(-spread, 0, rows), torch.linspace(10**-spread, 1.0, rows)):
        matrix = with_spectrum(rows, columns, values.double())
        assert torch.linalg.svdvals(matrix / matrix.norm()).min() >= 0.01
        backend = "triton" if form else "reference"
        out = newton_schulz(matrix.to(device, torch.float32), 5, coefficients, form=form, backend=backend)
        after = torch.linalg.svdvals(out.double().cpu())
        assert low - 0.02 <= after.min() and after.max() <= high + 0.02


@pytest.mark.parametrize("coefficients", SETS)
@pytest.mark.parametrize("form", [None, "standard", "gram"])
def test_singular_values_end_in_their_range(coefficients, form):
    check_range(coefficients, form, "cpu", 40, 60, 1.3)


# ---- the kernels against float64


def truth(matrix: torch.Tensor, coefficients: str = "jordan", steps: int = 5) -> torch.Tensor:
    return newton_schulz_ref(matrix.double(), steps, None, coefficients)


def products_in_fp32(matrix: torch.Tensor, coefficients: str, iterations: int) -> torch.Tensor:
    """Five iterations as the kernels order them, X <- P X with P = a I + b R + c R R, in PyTorch.

    R = X X^T is computed anew after so many `iterations`: 1 in the standard form, 3 in the Gram form.
    """
    tall = matrix.size(-2) > matrix.size(-1)
    x = (matrix / torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=torch.float64)).float()
    x = x.mT if tall else x
    one, polynomials = torch.eye(x.size(-2)), coefficients_of(coefficients, 5)
    while polynomials:
        r, total = x @ x.mT, one
        for a, b, c in polynomials[:iterations]:
            p = a * one + b * r + c * (r @ r)
            total, r = total @ p, p @ (r @ p)
        x, polynomials = total @ x, polynomials[iterations:]
    return x.mT if tall else x


@pytest.mark.parametrize("coefficients", SETS)
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_the_kernels_are_as_exact_as_pytorch_in_fp32(coefficients, form):
    tensors = [torch.randn(2, 40, 70), torch.randn(130, 24), torch.randn(64, 64)]
    found = newton_schulz(tensors, coefficients=coefficients, form=form, backend="triton")
    for matrix, ours in zip(tensors, found, strict=True):
        eager = newton_schulz_ref(matrix, 5, None, coefficients)
        same = products_in_fp32(matrix, coefficients, 3 if form == "gram" else 1)
        assert_as_exact([ours], [truth(matrix, coefficients)], [eager], [same])


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@example(shapes=[(1, 1, 1), (2, 1, 5)], steps=5, coefficients="jordan")
@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=3),
    steps=st.integers(1, 7),
    coefficients=st.sampled_from(SETS),
)
def test_any_list_of_shapes(shapes, steps, coefficients):
    tensors = [torch.randn(shape) for shape in shapes]
    found = newton_schulz(tensors, steps, coefficients, backend="triton")
    for matrix, ours in zip(tensors, found, strict=True):
        torch.testing.assert_close(ours.double(), truth(matrix, coefficients, steps), rtol=0, atol=2e-4)


def test_fp16_is_better_than_bf16_by_the_bits_it_has_more():
    matrix = torch.randn(96, 200)
    ours = newton_schulz(matrix.half(), backend="triton")
    assert ours.dtype == torch.float16
    assert error(ours, truth(matrix.half())) < 0.3 * error(newton_schulz_ref(matrix.bfloat16()), truth(matrix.half()))


def test_transposed_strided_and_batched_inputs_are_the_same_matrices():
    whole = torch.randn(2, 2, 40, 30)
    views = [whole[0].mT, whole[1, :, ::2, 1::2], whole.transpose(0, 1), whole[0, :1].expand(2, 40, 30)]
    views.append(whole.flatten()[1:1201].view(40, 30))  # contiguous, at an address that is no multiple of 16 bytes
    copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
    together = newton_schulz(views + copies, 2, backend="triton")
    for view, ours, other in zip(views, together[:5], together[5:], strict=True):
        assert ours.shape == view.shape and torch.equal(ours, other)
        assert error(ours, truth(view, steps=2)) < 1e-4


@pytest.mark.slow
def test_what_a_graph_reads_outlives_the_caches(monkeypatch):
    """A graph is captured, and then more shapes come than the cache of plans holds."""
    found = weakref.WeakSet()
    caches = {name: getattr(op, name) for name in ("_layout", "_targets")}

    def forget():
        for cache in (*caches.values(), plan_of):
            cache.cache_clear()
        gc.collect()

    def watched(make):
        def made(*arguments):
            tables = make(*arguments)
            found.update(tables)
            return tables

        return made

    def step():
        gradients, momenta, parameters = ([torch.randn(20, 24)] for _ in range(3))
        updates = muon_updates(gradients, momenta, 0.9, steps=1, backend="triton")
        muon_apply_(parameters, updates, 0.1, 0.0, backend="triton")

    for name, cache in caches.items():
        monkeypatch.setattr(op, name, watched(cache))
    monkeypatch.setattr(op, "_READ_BY_GRAPHS", {})
    step()
    forget()
    assert not found
    monkeypatch.setattr(op, "_is_captured", lambda device: True)
    step()
    forget()
    assert len(found) == 4, "a plan and its pieces; the pieces of what is applied, and their scales"


def filled(tensors, pieces, arena):
    """The arena with normalised `tensors` in it."""
    norms = arena.new_empty(sum(map(len, tensors)), 2, dtype=torch.float32), arena.new_empty((), dtype=torch.int32)
    measure(tensors, None, 0.0, True, pieces, *norms)
    fill_arena(tensors, None, 0.0, True, pieces, *norms, arena)
    return arena


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_every_product_of_symmetric_matrices_is_symmetric_to_the_bit(form):
    """Nothing of the arena is uninitialised either: it starts as NaN."""
    tensors = [torch.randn(2, 130, 200)]
    config = pick_config((), torch.float32, torch.device("cpu"))
    shapes = (Shapes(2, 130, 200, form),)
    plan = plan_of(shapes, 3, "jordan", config.panel, torch.device("cpu"))
    layouts = ((tuple(tensors[0].size()), tuple(tensors[0].stride())),)
    pieces = pieces_of(layouts, config.panel, plan.starts, torch.device("cpu"))
    arena = torch.full((plan.arena_rows, config.panel), math.nan)
    result = torch.full((plan.result_rows, plan.result_columns), math.nan)
    run_products(plan, filled(tensors, pieces, arena), result, config)
    m, n, panel = 192, 256, config.panel
    rows = m * m // panel
    written = {p.result for together in PROGRAMS[form][0](3, "jordan") for p in together if p.kind in (GRAM, SYMMETRIC)}
    for start in plan.starts:
        for copy in written:
            first = start + 2 * m * n // panel + copy * rows
            square = arena[first : first + rows].view(m // panel, m, panel).permute(1, 0, 2).reshape(m, m)
            assert torch.equal(square, square.T) and square[:130, :130].any(1).all()
    assert result.isfinite().all()


MIXED = (Shapes(2, 70, 50, "standard"), Shapes(1, 33, 100, "gram"), Shapes(3, 16, 16, "standard"))


@pytest.mark.parametrize("coefficients", SETS)
def test_a_tile_waits_for_all_tiles_of_its_matrix_in_the_sets_before(coefficients):
    plan = plan_of(MIXED, 5, coefficients, 16, torch.device("cpu"), chained=True)
    before = torch.zeros(6, dtype=torch.int32)
    for first, count in plan.launches:
        matrix, needed = plan.tiles[first : first + count, 12].long(), plan.tiles[first : first + count, 13]
        assert torch.equal(needed, before[matrix])
        before += torch.bincount(matrix, minlength=6).int()
    assert first + count == len(plan.tiles) and (before > 0).all()
    assert set(matrix.tolist()) == set(range(6)), "every matrix ends in the last set, which writes the result"


def run_in_turn(plan: Plan, arena: torch.Tensor, result: torch.Tensor, step: int) -> None:
    """What the chained kernel does, tile by tile: of an S it stores and reads the lower triangle alone."""
    panel = arena.size(1)
    for tile, (alpha, beta, gamma, _) in zip(plan.tiles.tolist(), plan.factors.tolist(), strict=True):
        left, panel_step, right, left_columns, right_columns, depth, first, second, addend = tile[:9]
        row, column, kind, is_diagonal = *tile[9:12], tile[14]
        acc = torch.zeros(panel, panel, dtype=arena.dtype)
        for k in range(0, depth, step):
            below, across = k // panel * panel_step, k % panel
            a = arena[left + below :][:panel, across : across + step]
            if k >= second:
                a = arena[left_columns + k :][:step].T
            b = arena[right + below :][:panel, across : across + step].T
            if k >= first:
                b = arena[right_columns + k :][:step]
            acc += a @ b
        if addend >= 0:
            acc = alpha * acc + beta * arena[addend : addend + panel]
            acc += gamma * torch.eye(panel, dtype=arena.dtype) if is_diagonal else 0.0
        if kind == 1:
            acc = acc.tril() + acc.tril(-1).T
        target = arena if kind < 2 else result
        target[row : row + panel, column : column + panel] = acc.T if kind == 3 else acc


@pytest.mark.parametrize("coefficients", SETS)
def test_a_chained_plan_reads_what_it_has_stored(coefficients):
    """The table of the chained kernel, in fp64: what nobody has stored is NaN."""
    panel = 16
    tensors = [torch.randn(s.count, s.rows, s.columns) for s in MIXED]
    plan = plan_of(MIXED, 5, coefficients, panel, torch.device("cpu"), chained=True)
    arena = torch.full((plan.arena_rows, panel), math.nan, dtype=torch.float64)
    result = torch.full((plan.result_rows, plan.result_columns), math.nan, dtype=torch.float64)
    firsts, _, _ = result_layout(MIXED, panel)
    starts = iter(plan.starts)
    for matrix in (matrix for tensor in tensors for matrix in tensor.double()):
        x = matrix / (matrix.norm() + EPS)
        x = x.T if x.size(0) > x.size(1) else x
        m, n = (-(-side // panel) * panel for side in x.shape)
        padded = torch.zeros(m, n, dtype=torch.float64)
        padded[: x.size(0), : x.size(1)] = x
        start = next(starts)
        arena[start : start + m * n // panel] = padded.view(m, -1, panel).transpose(0, 1).reshape(-1, panel)
    run_in_turn(plan, arena, result, panel // 2)
    for tensor, first in zip(tensors, firsts, strict=True):
        height = -(-tensor.size(1) // panel) * panel
        found = result[first:][: len(tensor) * height].view(len(tensor), height, -1)[:, : tensor.size(1)]
        torch.testing.assert_close(found[..., : tensor.size(2)], truth(tensor, coefficients), rtol=0, atol=1e-5)


def test_a_matrix_does_not_depend_on_what_is_beside_it():
    alone = torch.randn(40, 90)
    beside = [torch.randn(50, 50), alone, torch.full((3, 8), math.nan), torch.randn(2, 100, 20)]
    assert torch.equal(newton_schulz(alone, backend="triton"), newton_schulz(beside, backend="triton")[1])


# ---- what is not an ordinary matrix


def check_hard_inputs(backend: str, coefficients: str, device: str) -> None:
    wide = with_spectrum(40, 60, torch.logspace(-10, 0, 40, dtype=torch.float64)).float()
    rank_2 = torch.randn(40, 2) @ torch.randn(2, 60)
    huge = torch.randn(40, 60)
    huge[3, 4] = 1e30
    tiny = torch.randn(40, 60) * 1e-6
    for matrix in (wide, rank_2, huge, tiny, wide * 1e18):
        ours = newton_schulz(matrix[None].to(device), coefficients=coefficients, backend=backend)[0].cpu()
        assert ours.isfinite().all() and torch.linalg.matrix_norm(ours.float(), ord=2) < 1.3
        if device == "cpu" and matrix is not huge:
            eager, same = newton_schulz_ref(matrix, 5, None, coefficients), products_in_fp32(matrix, coefficients, 1)
            assert_as_exact([ours], [truth(matrix, coefficients)], [eager], [same])
    for bad in (math.nan, math.inf, -math.inf):
        matrix = torch.randn(2, 40, 60)
        matrix[1, 0, 0] = bad
        ours = newton_schulz(matrix.to(device), coefficients=coefficients, backend=backend).cpu()
        assert ours[0].norm() > 4 and not ours[1].any()
    assert not newton_schulz(torch.zeros(3, 40, 60, device=device), backend=backend).any()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("coefficients", SETS)
def test_hard_inputs_give_finite_matrices(backend, coefficients):
    check_hard_inputs(backend, coefficients, "cpu")


def test_what_is_refused():
    good = torch.randn(4, 4)
    for tensors, match in (
        (torch.randn(3), r"shape \(3,\)"),
        (torch.randn(0, 4), r"shape \(0, 4\)"),
        (torch.ones(4, 4, dtype=torch.int32), "torch.int32"),
        ([good, good.half()], "one dtype on one device"),
        (torch.randn(2, 0, 4), r"shape \(2, 0, 4\)"),
        (good.to_sparse(), "torch.sparse_coo"),
    ):
        with pytest.raises(ValueError, match=match):
            newton_schulz(tensors)
    for options, match in (
        ({"steps": 0}, "steps=0"),
        ({"coefficients": "x"}, "coefficients='x'"),
        ({"form": "x"}, "form='x'"),
        ({"backend": "x"}, "backend is 'x'; allowed: None, 'reference', 'triton'"),
    ):
        with pytest.raises(ValueError, match=match):
            newton_schulz(good, **options)
    with pytest.raises(ValueError, match="backend='reference'"):
        newton_schulz(good.double(), backend="triton")
    assert newton_schulz([]) == [] and newton_schulz(good.double()).dtype == torch.float64


BACKENDS = ("reference", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_gets_a_gradient(backend):
    """Of a Parameter, of a tensor with a history, and in place on leaves, outside no_grad."""
    weight, gradient = torch.nn.Parameter(torch.randn(8, 12)), torch.randn(8, 12)
    assert not newton_schulz(weight, 1, backend=backend).requires_grad
    assert not newton_schulz([weight * 2.0], 1, backend=backend)[0].requires_grad
    assert not newton_schulz_ref(weight, 1).requires_grad
    momentum = torch.zeros(8, 12)
    (update,) = muon_updates([gradient.requires_grad_() * 1.0], [momentum], 0.9, steps=1, backend=backend)
    assert not update.requires_grad and not momentum.requires_grad and momentum.any()
    before, version = weight.detach().clone(), weight._version
    muon_apply_([weight], [update.requires_grad_()], 0.1, 0.0, backend=backend)
    assert weight.is_leaf and weight.requires_grad and not torch.equal(weight, before) and weight._version > version


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_no_matrices_and_empty_lists(backend):
    some, none = torch.randn(2, 8, 12), torch.randn(3, 0, 12, 8)
    assert newton_schulz(none, backend=backend).shape == none.shape
    mixed = newton_schulz([none, some, none[0]], 1, dtype=torch.float16, backend=backend)
    assert [m.shape for m in mixed] == [none.shape, some.shape, none[0].shape]
    assert all(m.dtype == torch.float16 for m in mixed)
    assert torch.equal(mixed[1], newton_schulz(some, 1, dtype=torch.float16, backend=backend))
    assert newton_schulz([], backend=backend) == [] and muon_updates([], [], 0.9, backend=backend) == []
    assert muon_apply_([], [], 0.1, 0.0, backend=backend) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_rows_of_a_matrix_are_applied_as_in_the_whole(scale, backend):
    whole, update = torch.randn(30, 8), torch.randn(30, 8)
    parts = [whole[:7].clone(), whole[7:].clone()]
    muon_apply_([whole], [update], 0.1, 0.5, scale, backend=backend)
    muon_apply_(parts, [update[:7], update[7:]], 0.1, 0.5, scale, backend=backend, rows=[30, 30])
    assert torch.equal(torch.cat(parts), whole)
    for rows in ([30], [30, 7]):
        with pytest.raises(ValueError, match=r"rows are \[30.*for each of 2 parameters its own rows or more"):
            muon_apply_(parts, [update[:7], update[7:]], 0.1, 0.5, scale, backend=backend, rows=rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_entry_that_is_not_finite_skips_the_call(backend):
    gradients, momenta, weights = ([torch.randn(8, 12), torch.randn(70, 9)] for _ in range(3))
    for bad in (math.nan, math.inf, -math.inf):
        for some in (gradients, momenta):
            kept, some[1][69, 8] = some[1][69, 8].item(), bad
            copies = [t.clone() for t in momenta + weights]
            updates = muon_updates(gradients, momenta, 0.9, steps=1, backend=backend)
            muon_apply_(weights, updates, 0.1, 0.5, backend=backend)
            assert all(u.isnan().all() for u in updates)
            assert all(
                torch.equal(t.nan_to_num(), c.nan_to_num()) for t, c in zip(momenta + weights, copies, strict=True)
            )
            some[1][69, 8] = kept
    before = [t.clone() for t in momenta]
    assert all(u.isfinite().all() for u in muon_updates(gradients, momenta, 0.9, steps=1, backend=backend))
    assert not any(torch.equal(t, b) for t, b in zip(momenta, before, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
def test_reference_and_kernel_write_the_same_momenta_to_the_bit(nesterov):
    """Also where it ends near the largest number, at zero, and among the smallest."""
    values = torch.tensor([3e38, -3e38, 1.7e38, 0.0, -0.0, 1e-45, 1e-38, 1.0])
    gradients = [torch.randn(8, 12), values.repeat(3, 1), torch.zeros(4, 4)]
    start = [torch.randn(8, 12), values.flip(0).repeat(3, 1) * 0.1, torch.zeros(4, 4)]
    ends = {}
    for backend in BACKENDS:
        momenta = [m.clone() for m in start]
        ends[backend] = momenta, muon_updates(gradients, momenta, 0.9, nesterov, 5, backend=backend)
    for one, two in zip(*(ends[backend][0] for backend in BACKENDS), strict=True):
        assert torch.equal(one, two) and one.isfinite().all()
    for one, two in zip(*(ends[backend][1] for backend in BACKENDS), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_of_any_strides_are_applied_as_they_are(backend):
    """Transposed, with gaps, expanded, at an odd address; in fp16, as a GPU gives them."""
    whole = torch.randn(30, 50).half()
    odd = [whole[:24].T, whole[3:27, 5:45:2], whole[:1].expand(24, 50), torch.randn(961).half()[1:].view(24, 40)]
    weights = [torch.randn(u.shape) for u in odd]
    expected = [
        0.95 * w - 0.1 * max(1, w.size(0) / w.size(1)) ** 0.5 * u.float() for w, u in zip(weights, odd, strict=True)
    ]
    muon_apply_(weights, odd, 0.1, 0.5, backend=backend)
    for w, e in zip(weights, expected, strict=True):
        torch.testing.assert_close(w, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_that_do_not_belong_together_are_refused(backend):
    a, b, wide = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 5)
    one = a.clone()
    for gradients, momenta, match in (
        ([a], [wide], r"gradients have shapes \[\(4, 4\)\], momenta \[\(4, 5\)\]"),
        ([a, b], [one], "gradients have shapes"),
        ([a[None]], [one[None]], r"gradients: a tensor of shape \(1, 4, 4\)"),
        ([a, b], [one, b.clone().half()], "momenta: tensors of torch.float32 on cpu and torch.float16"),
        ([a, b], [one, one], "share memory"),
        ([a], [a], "share memory"),
        ([a], [torch.zeros(1, 4).expand(4, 4)], "its entries share memory"),
    ):
        with pytest.raises(ValueError, match=match):
            muon_updates(gradients, momenta, 0.9, backend=backend)
    for parameters, updates, match in (
        ([a], [wide], "parameters have shapes"),
        ([a], [], "parameters have shapes"),
        ([a, b.half()], [one, one], "parameters: tensors of torch.float32 on cpu and torch.float16"),
        ([a, a], [one, one], "share memory"),
        ([wide[:, :4], wide[:, :4]], [one, one], "share memory"),
        ([torch.zeros(4, 1).expand(4, 4)], [one], "its entries share memory"),
    ):
        with pytest.raises(ValueError, match=match):
            muon_apply_(parameters, updates, 0.1, 0.0, backend=backend)
    with pytest.raises(ValueError, match="lr is a tensor of shape"):
        muon_apply_([a], [one], torch.ones(2), 0.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_numbers_are_coefficients_of_every_step(backend):
    matrix, numbers = torch.randn(8, 12), (2.0, -1.5, 0.5)
    x = matrix / (matrix.norm() + EPS)
    for _ in range(2):
        gram = x @ x.T
        x = 2.0 * x + (-1.5 * gram + 0.5 * (gram @ gram)) @ x
    torch.testing.assert_close(newton_schulz(matrix, 2, numbers, backend=backend), x, rtol=1e-5, atol=1e-5)
    for bad in ("1,2", (1.0, 2.0), (1.0, 2.0, math.nan), 3, "a,b,c"):
        with pytest.raises(ValueError, match="or three finite numbers"):
            newton_schulz(matrix, 2, bad, backend=backend)


# ---- as an operator


@pytest.mark.slow
def test_the_operators_pass_opcheck():
    wide, tall = torch.randn(2, 20, 30), torch.randn(1, 30, 20)
    op = torch.ops.klora
    result = torch.empty(64 * 3, 64)
    torch.library.opcheck(op.newton_schulz, ([wide, tall], 1, "jordan", "standard,gram", result))
    lists = [wide[:1], tall], [torch.randn_like(wide[:1]), torch.randn_like(tall)]
    about = *lists, 0.9, None, True, 1, "jordan", "standard,standard"
    norms = torch.empty(2, 2), torch.empty((), dtype=torch.int32)
    torch.library.opcheck(op.muon_norms, (*about, torch.float32, *norms))
    op.muon_norms(*about, torch.float32, *norms)
    torch.library.opcheck(op.muon_updates, (*about, *norms, torch.zeros((), dtype=torch.int64), result[:128]))
    torch.library.opcheck(op.muon_apply, ([tall], [torch.randn_like(tall)], 0.1, 0.0, None, None, "original", [30]))


def test_it_compiles_whole():
    matrices = [torch.randn(20, 30), torch.randn(2, 30, 20)]
    compiled = torch.compile(
        lambda m: newton_schulz(m, 1, backend="triton")[1] * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(matrices), newton_schulz(matrices, 1, backend="triton")[1] * 2)


def test_the_tiles_of_a_gpu_are_picked_while_it_is_compiled():
    gpu, shapes = torch.device("cuda"), (Shapes(60, 256, 512, "gram"),)

    def panel(x):
        return x * pick_config(shapes, torch.bfloat16, gpu).panel

    assert torch.compile(panel, fullgraph=True, backend="eager")(torch.ones(1)) == 64
    assert pick_config((Shapes(88, 256, 512, "gram"),), torch.bfloat16, gpu).panel == 128


# ---- on a GPU

SHAPES = [(20, 512, 512), (3, 1536, 512), (3, 512, 1536), (4, 256, 512), (2, 100, 333), (1, 1, 7), (2, 640, 1000)]
"""Together enough tiles for the chained launch."""


@pytest.fixture(scope="module")
def kernels():
    """Every kernel that the tests on a GPU launch, compiled side by side."""
    many = [torch.randn(shape, device="cuda").bfloat16() for shape in SHAPES]
    one, batch = torch.randn(1, 40, 60, device="cuda"), torch.randn(32, 1024, 1024, device="cuda")
    work = [lambda: newton_schulz(many), lambda: newton_schulz(one), lambda: newton_schulz(batch)]
    work.append(lambda: newton_schulz(one, dtype=torch.float32))
    with ThreadPoolExecutor(len(work)) as pool:
        for future in [pool.submit(one) for one in work]:
            future.result()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.usefixtures("kernels")
class TestOnGpu:
    @pytest.mark.parametrize("coefficients", SETS)
    @pytest.mark.parametrize("form", [None, "standard", "gram"])
    def test_no_worse_than_cublas(self, coefficients, form):
        tensors = [torch.randn(shape, device="cuda").bfloat16() for shape in SHAPES]
        for matrix, ours in zip(tensors, newton_schulz(tensors, 5, coefficients, form=form), strict=True):
            assert_as_exact([ours], [truth(matrix, coefficients)], [plain(matrix, coefficients)])

    @pytest.mark.parametrize("coefficients", SETS)
    def test_hard_spectra(self, coefficients):
        check_hard_inputs("triton", coefficients, "cuda")
        for form in ("standard", "gram"):
            check_range(coefficients, form, "cuda", 300, 700, 0.9)
        rank_2 = torch.cat([torch.ones(2), torch.zeros(254)])
        for spectrum in (torch.logspace(-2, 0, 256), torch.logspace(-10, 0, 256), rank_2):
            matrix = with_spectrum(256, 640, spectrum.double()).cuda().float()[None]
            ours = newton_schulz(matrix, 5, coefficients)
            assert_as_exact([ours], [truth(matrix, coefficients)], [plain(matrix, coefficients)])

    def test_the_largest_finite_numbers_are_served_and_one_that_is_not_gives_zeros(self):
        signs = torch.randn(2, 200, 300, device="cuda").sign()
        for dtype in (torch.float16, torch.float32):
            largest = newton_schulz(signs * 3e38, dtype=dtype)
            assert error(largest, newton_schulz(signs, dtype=dtype).double()) < 1e-3
        signs[1, 199, 299] = math.inf
        ours = newton_schulz(signs)
        assert torch.equal(ours[0], newton_schulz(signs[:1])[0]) and not ours[1].any()

    def test_fp32_is_no_worse_than_pytorchs(self):
        matrix = torch.randn(3, 200, 300, device="cuda")
        ours, eager = newton_schulz(matrix, dtype=torch.float32), newton_schulz_ref(matrix, 5, torch.float32)
        assert_as_exact([ours], [truth(matrix)], [eager])

    def test_the_same_bits_in_twenty_runs_and_from_a_graph(self):
        tensors = [torch.randn(shape, device="cuda").bfloat16() for shape in SHAPES]
        first = newton_schulz(tensors)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, newton_schulz(tensors), strict=True))
        captured, replay = replayed(lambda: newton_schulz(tensors))
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
        fresh = newton_schulz(tensors)
        for _ in range(3):
            replay()
            assert all(torch.equal(a, b) for a, b in zip(fresh, captured, strict=True))

    def test_one_launch_and_a_launch_a_set_give_the_same_bits(self):
        tensors = [torch.randn(shape, device="cuda").bfloat16() for shape in SHAPES]
        shapes = tuple(Shapes(*shape, pick_form(*shape[1:])) for shape in SHAPES)
        chained = pick_config(shapes, torch.bfloat16, tensors[0].device)
        assert chained.chained
        in_steps = NewtonSchulzConfig(panel=chained.panel, block_k=64, num_warps=8, num_stages=3, registers=128)
        layouts = tuple((tuple(t.size()), tuple(t.stride())) for t in tensors)
        results = []
        for config in (chained, in_steps):
            plan = plan_of(shapes, 5, "jordan", config.panel, tensors[0].device, config.chained)
            pieces = pieces_of(layouts, config.panel, plan.starts, tensors[0].device)
            arena = torch.full((plan.arena_rows, config.panel), math.nan, device="cuda", dtype=torch.float16)
            results.append(torch.zeros(plan.result_rows, plan.result_columns, device="cuda", dtype=torch.bfloat16))
            run_products(plan, filled(tensors, pieces, arena), results[-1], config)
        assert results[0].any() and torch.equal(*results)

    def test_launches_whose_blocks_wait_for_each_other_may_meet(self):
        """Each is started whole or not at all."""
        shapes = SHAPES if few(len(SHAPES), 3) == len(SHAPES) else SHAPES[3:6]
        tensors = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
        expected = newton_schulz(tensors)
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in range(3)], []
        for _ in range(few(10, 1)):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(newton_schulz(tensors))
        torch.cuda.synchronize()
        for results in found:
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    def test_transposed_and_strided_inputs_are_the_same_matrices(self):
        whole = torch.randn(2, 2, 400, 300, device="cuda")
        for view in (whole[0].mT, whole[1, :, ::2, 1::2], whole.transpose(0, 1), whole[0, :1].expand(2, 400, 300)):
            assert torch.equal(newton_schulz(view), newton_schulz(view.clone(memory_format=torch.contiguous_format)))

    def test_it_compiles_whole(self):
        tensors = [torch.randn(shape, device="cuda").bfloat16() for shape in SHAPES]
        compiled = torch.compile(lambda m: [o * 2 for o in newton_schulz(m)], fullgraph=True, backend="aot_eager")
        for ours, twice in zip(compiled(tensors), newton_schulz(tensors), strict=True):
            assert torch.equal(ours, twice * 2)

    def test_a_batch_of_more_than_two_to_the_thirty_elements(self):
        tensors = torch.randn(1100, 1024, 1024, device="cuda")
        ours = newton_schulz(tensors)
        for index in (0, 1099):
            assert error(ours[index], truth(tensors[index])) < 3e-3
