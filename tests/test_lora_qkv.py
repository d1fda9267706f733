"""lora_qkv: as exact as plain PyTorch in the same dtype, for every shape, slot and gradient, and the same every run."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import replayed
from hopper import compiled_for_hopper
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import allowed_error, assert_as_exact, relative_error
from klora.kernels.lora_qkv import check_slots, lora_qkv, lora_qkv_ref
from klora.kernels.lora_qkv.dx import pick_backward_config

pytestmark = pytest.mark.usefixtures("empty_is_nan")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES, D, R = (32, 16, 16), 32, 8
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA GPU")]


def inputs(
    batch=3, length=5, width=D, sizes=SIZES, rank=R, slots=None, count=None, dtype=torch.float32, seed=0, low=False
):
    """(x, weight, lora_a, lora_b, slots, sizes) and the gradients of q, k and v; the adapters are fp32, or like x."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=draw)

    count = count or batch
    x, weight = randn(batch, length, width), randn(sum(sizes), width) / width**0.5
    lora_a, lora_b = randn(count, 3, rank, width) / width**0.5, randn(count, sum(sizes), rank) * 0.3
    douts = [randn(batch, length, size).to(DEVICE, dtype) for size in sizes]
    slots = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    adapters = (lora.to(DEVICE, dtype if low else torch.float32) for lora in (lora_a, lora_b))
    return (x.to(DEVICE, dtype), weight.to(DEVICE, dtype), *adapters, slots, sizes), douts


def outputs_and_gradients(function, given, douts):
    """q, k, v and the gradients of x, lora_a and lora_b."""
    x, weight, lora_a, lora_b, slots, sizes = given
    leaves = [t.detach().requires_grad_() for t in (x, lora_a, lora_b)]
    outputs = function(leaves[0], weight, leaves[1], leaves[2], slots, sizes)
    return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, douts)


def ours(*given):
    return lora_qkv(*given, backend="triton")


def plain(x, weight, lora_a, lora_b, slots, sizes):
    return lora_qkv_ref(x, weight, lora_a, lora_b, sizes, slots)


def truth(given, douts):
    exact = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in given]
    return outputs_and_gradients(plain, exact, [dout.double() for dout in douts])


def assert_as_exact_as_plain_pytorch(given, douts, function=ours):
    """q, k, v, dx, dA and dB."""
    got, theirs = (outputs_and_gradients(f, given, douts) for f in (function, plain))
    assert_as_exact(got, truth(given, douts), theirs)


multiples = st.integers(1, 5).map(lambda i: 16 * i)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    length=st.sampled_from([1, 7, 33, 70]),
    width=multiples,
    sizes=st.tuples(multiples, multiples, multiples),
    rank=st.sampled_from([1, 3, 8, 16, 20]),
    slots=st.none() | st.lists(st.integers(-1, 3), min_size=2, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    low=st.booleans(),
)
def test_every_output_and_gradient_is_as_exact_as_plain_pytorch(length, width, sizes, rank, slots, dtype, low):
    batch, count = (len(slots), 4) if slots else (2, 2)
    assert_as_exact_as_plain_pytorch(*inputs(batch, length, width, sizes, rank, slots, count, dtype, length, low))


@pytest.mark.parametrize(
    ("width", "rank", "slots", "low"),
    [
        (400, 8, [1, 0], False),  # two tiles of 256
        (272, 16, [1, 1], False),  # two of 192: the last ends in its first 128
        (336, 8, [-1, 2], True),  # in its last 64
        (576, 1, None, False),  # where the third does
    ],
)
def test_tiles_that_span_more_than_one_block_of_every_dimension(width, rank, slots, low):
    given = inputs(2, 130, width, (272, 144, 16), rank, slots, 3 if slots else 2, torch.float16, low=low)
    assert_as_exact_as_plain_pytorch(*given)


@pytest.mark.parametrize(
    ("width", "columns"),
    [(192, 192), (272, 192), (384, 192), (576, 192), (1152, 192), (1344, 192)]
    + [(256, 256), (400, 256), (512, 256), (960, 256), (1024, 256), (1536, 256)],
)
def test_dx_takes_tiles_of_192_columns_where_those_of_256_are_a_tenth_more(width, columns):
    for dtype, groups in itertools.product((torch.bfloat16, torch.float16), (1, 3)):
        config = pick_backward_config(dtype, 16, groups, width)
        assert (config.block_d + config.tail, config.tail > 0) == (columns, columns == 192)
        others = [(torch.float32, 16, groups, width), (dtype, 17, groups, width), (dtype, 16, groups, width, True)]
        assert not any(pick_backward_config(*other).tail for other in others)


BESIDE = """
import torch, triton
from hopper import pretend
from klora.kernels import lora_linear, lora_qkv
from klora.kernels.precompile import recorded

pretend()

def leaf(*size, dtype=torch.float32):
    return torch.zeros(size, dtype=dtype, requires_grad=True)

def one(rank):
    x, weight = leaf(2, 256, 576, dtype=torch.bfloat16), leaf(192, 576, dtype=torch.bfloat16).detach()
    lora_linear(x, weight, leaf(2, rank, 576), leaf(2, 192, rank), backend="triton").sum().backward()

def three(rank):
    x, weight = leaf(2, 256, 576, dtype=torch.bfloat16), leaf(960, 576, dtype=torch.bfloat16).detach()
    factors = leaf(2, 3, rank, 576), leaf(2, 960, rank)
    sum(out.sum() for out in lora_qkv(x, weight, *factors, sizes=(576, 192, 192), backend="triton")).backward()

for work in (one, three):
    for rank in (8, 16):
        shared = {}
        for kernel in recorded(lambda: work(rank)).values():
            if kernel.name in ("_dx_kernel", "_db_kernel"):
                compiled = triton.compile(kernel.source(), target=kernel.target, options=kernel.options)
                shared[kernel.name] = compiled.metadata.shared
                if kernel.name == "_dx_kernel":
                    assert all(f"m64n{n}k16" in compiled.asm["ptx"] for n in (128, 64))
        # Both on a multiprocessor's 228 KiB, each with 1 KiB.
        assert len(shared) == 2 and sum(shared.values()) <= 233_472 - 2048, (work.__name__, rank, shared)
"""


@pytest.mark.slow
def test_db_fits_beside_dx_in_tiles_of_192_columns():
    """On Hopper; compiled in a process where Triton is itself."""
    compiled_for_hopper(BESIDE)


@pytest.mark.parametrize(("rank", "dtype"), [(64, torch.float32), (80, torch.float16), (128, torch.float32)])
def test_ranks_up_to_128_and_none_above(rank, dtype):
    given, douts = inputs(1, 9, rank=rank, dtype=dtype)
    assert_as_exact_as_plain_pytorch(given, douts)
    with pytest.raises(ValueError, match="R is 129; wanted a positive number up to 128"):
        ours(*inputs(1, 9, rank=129)[0])


def test_a_slot_named_twice_gets_the_sum_and_an_unnamed_one_zero():
    given, douts = inputs(4, 6, slots=[2, 0, 2, 2], count=4)
    assert_as_exact_as_plain_pytorch(given, douts)
    *_, da, db = outputs_and_gradients(ours, given, douts)
    assert not da[[1, 3]].any() and not db[[1, 3]].any() and da[[0, 2]].all()


def test_a_documents_bits_do_not_depend_on_its_batch_mates():
    (x, weight, a, b, _, sizes), douts = inputs(3, 40, dtype=torch.float16)
    together = outputs_and_gradients(ours, (x, weight, a, b, None, sizes), douts)
    noise = x.clone()
    noise[[0, 2]] = float("nan")
    torn_a, torn_b = (t.index_fill(0, torch.tensor([0, 2], device=DEVICE), float("inf")) for t in (a, b))
    among_nans = outputs_and_gradients(ours, (noise, weight, torn_a, torn_b, None, sizes), douts)
    alone = outputs_and_gradients(
        ours, (x[1:2], weight, a[1:2], b[1:2], None, sizes), [dout[1:2].contiguous() for dout in douts]
    )
    for one, other, single in zip(together, among_nans, alone, strict=True):
        assert torch.equal(one[1], other[1]) and torch.equal(one[1], single[0])


def test_strided_inputs_and_expanded_gradients():
    (x, weight, a, b, _, sizes), _ = inputs(2, 6)
    given = x.repeat(1, 2, 2)[:, ::2, D // 2 :][:, :, : D + 3][..., 3:], weight.T.contiguous().T, a, b, None, sizes
    assert not given[0].is_contiguous() and not given[1].is_contiguous()
    assert_as_exact_as_plain_pytorch(given, [x.new_tensor(1.5).expand(2, 6, size) for size in sizes])


def pools(rows, given):
    """lora_a and lora_b as views into one pool [rows, P], and the pool."""
    lora_a, lora_b = given[2:4]
    first = lora_a[0].numel()
    pool = torch.full((rows, 5 + first + lora_b[0].numel()), 7.0, device=DEVICE)
    views = pool[:, 5 : 5 + first].view(rows, *lora_a.shape[1:]), pool[:, 5 + first :].view(rows, *lora_b.shape[1:])
    views[0].copy_(lora_a), views[1].copy_(lora_b)
    return views, pool


@pytest.mark.parametrize("rank", [8, 3])  # rows of 16 bytes, and rows that have to be copied
def test_16_bit_adapters_are_read_where_they_lie_and_leave_fp32_gradients(rank):
    """To the bits of the same adapters in fp32, which are rounded to what they were."""
    given, douts = inputs(4, 40, slots=[5, -1, 0, 7], count=6, rank=rank, dtype=torch.float16, low=True)
    x, weight, a, b, slots, sizes = given
    stride = a[0].numel() + b[0].numel()
    pool = torch.full((6, -(-stride // 8) * 8 + 8), 7.0, dtype=torch.float16, device=DEVICE)
    first = a[0].numel()
    low = pool[:, :first].view(a.shape), pool[:, first:stride].view(b.shape)
    low[0].copy_(a), low[1].copy_(b)
    results = []
    for adapters in (low, (a.float(), b.float())):
        leaf, grads = x.detach().requires_grad_(), (torch.full_like(a, 9.0).float(), torch.full_like(b, 9.0).float())
        outputs = lora_qkv(leaf, weight, *adapters, slots, sizes, grads=grads, backend="triton")
        results.append((*outputs, *torch.autograd.grad(outputs, leaf, douts), *grads))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (results[0][4][[1, 2, 3, 4]] == 9.0).all() and (results[0][4][[0, 5]] != 9.0).all()


def test_slots_need_not_be_contiguous():
    (x, weight, a, b, slots, sizes), _ = inputs(2, 5, slots=[2, 0], count=3)
    strided = torch.stack([slots, slots + 1], 1)[:, 0]
    for one, other in zip(ours(x, weight, a, b, slots, sizes), ours(x, weight, a, b, strided, sizes), strict=True):
        assert torch.equal(one, other)


def test_adapters_and_their_gradients_live_in_flat_pools():
    given, douts = inputs(2, 9, slots=[3, 1], count=4)
    (a, b), pool = pools(4, given)
    x = given[0].requires_grad_()
    views, grads = pools(4, given)
    grads.fill_(7.0)
    outputs = lora_qkv(x, given[1], a, b, given[4], given[5], grads=views, backend="triton")
    (dx,) = torch.autograd.grad(outputs, x, douts)
    q, k, v, *wanted = outputs_and_gradients(ours, given, douts)
    for got, other in zip((*outputs, dx), (q, k, v, wanted[0]), strict=True):
        assert torch.equal(got, other)
    named = torch.tensor([3, 1], device=DEVICE)
    for view, gradient in zip(views, wanted[1:], strict=True):
        assert torch.equal(view[named], gradient[named])
    assert (grads[[0, 2]] == 7.0).all() and (grads[:, :5] == 7.0).all()


@pytest.mark.parametrize("wanted", [("x",), ("a",), ("b",), ("a", "b"), ("x", "b")], ids="+".join)
def test_only_the_gradients_that_are_wanted(wanted):
    (x, weight, a, b, slots, sizes), douts = inputs(2, 9)
    exact = dict(zip("xab", truth((x, weight, a, b, slots, sizes), douts)[3:], strict=True))
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in zip("xab", (x, a, b), strict=True)}
    outputs = ours(leaves["x"], weight, leaves["a"], leaves["b"], slots, sizes)
    gradients = torch.autograd.grad(outputs[0], [leaves[name] for name in wanted], douts[0], retain_graph=True)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)  # k's and v's gradients were left out
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in wanted], douts)
    for name, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("slots", [None, [0, 1]])
def test_no_documents_or_no_tokens_give_empty_outputs_and_zero_gradients(batch, length, slots):
    given, douts = inputs(batch, length, slots=slots and slots[:batch], count=2 if slots else batch)
    *outputs, dx, da, db = outputs_and_gradients(ours, given, douts)
    assert [tuple(out.shape) for out in outputs] == [(batch, length, size) for size in SIZES]
    assert dx.shape == given[0].shape and not da.any() and not db.any()


@pytest.mark.parametrize("slots", [None, [2, -1, 3, 0]])
def test_no_tokens_write_zeros_to_the_named_rows_of_a_pool(slots):
    (x, weight, a, b, slots, sizes), douts = inputs(4, 0, slots=slots)
    grads = torch.full_like(a, 7.0), torch.full_like(b, 7.0)
    outputs = lora_qkv(x.requires_grad_(), weight, a, b, slots, sizes, grads=grads, backend="triton")
    torch.autograd.backward(outputs, douts)
    for grad in grads:
        assert [float(row.abs().max()) for row in grad] == ([0.0] * 4 if slots is None else [0.0, 7.0, 0.0, 0.0])


def test_three_equal_projections_need_no_sizes_and_the_cpu_takes_the_reference():
    x, weight, a, b, _, _ = inputs(2, 4, sizes=(16, 16, 16))[0]
    for got, theirs in zip(lora_qkv(x, weight, a, b), lora_qkv_ref(x, weight, a, b, (16, 16, 16)), strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-5)
        assert CUDA or torch.equal(got, theirs)


X, WEIGHT, A, B, _, _ = inputs()[0]
BAD = {
    "x is float32 .*; wanted bfloat16, float16 or float32 \\[B, S, D\\]": {"x": X[0]},
    "weight is float32 \\[64, 16\\]; wanted float32 \\[Nq.Nk.Nv, 32\\]": {"weight": WEIGHT[:, :16]},
    "64 rows are not three equal": {"sizes": None},
    "sizes is \\(32, 32, 16\\)": {"sizes": (32, 32, 16)},
    "sizes is \\(64, 0, 0\\)": {"sizes": (64, 0, 0)},
    "lora_a is float32 \\[3, 2, 8, 32\\]": {"lora_a": A[:, :2]},
    "lora_b is float32 \\[3, 64, 7\\]; wanted float32 \\[3, 64, 8\\]": {"lora_b": B[..., :7]},
    "2 slots are not one for each of 3": {"lora_a": A[:2], "lora_b": B[:2]},
    "slots is float32 \\[3\\]": {"slots": torch.zeros(3, device=DEVICE)},
    "slots is int32 \\[2\\]": {"slots": torch.zeros(2, dtype=torch.int32, device=DEVICE)},
    "backend is 'cuda'": {"backend": "cuda"},
    "weight is float16 .*; wanted float32": {"weight": WEIGHT.half()},
    "lora_a is float16 .*; wanted float32": {"lora_a": A.half(), "lora_b": B.half()},
    "lora_b is float16 .*; wanted float32": {"lora_b": B.half()},
    "lora_a is .* on meta; wanted .* on": {"lora_a": A.to("meta")},
    "D is 24; wanted a positive multiple of 16": {"x": X[..., :24], "weight": WEIGHT[:, :24], "lora_a": A[..., :24]},
    "D is 0; wanted a positive multiple of 16": {"x": X[..., :0], "weight": WEIGHT[:, :0], "lora_a": A[..., :0]},
    "0 rows are not three equal": {"weight": WEIGHT[:0], "lora_b": B[:, :0], "sizes": None},
    "grads.1. is float16": {"grads": (A, B.half())},
}


@pytest.mark.parametrize(("message", "changed"), BAD.items(), ids=range(len(BAD)))
def test_bad_input_is_refused_with_what_was_given_and_what_is_allowed(message, changed):
    call = {"x": X, "weight": WEIGHT, "lora_a": A, "lora_b": B, "sizes": SIZES, "backend": "triton", **changed}
    with pytest.raises(ValueError, match=message):
        lora_qkv(**call)


def test_the_reference_cannot_write_gradients_into_a_pool():
    with pytest.raises(ValueError, match="grads"):
        lora_qkv(X, WEIGHT, A, B, sizes=SIZES, grads=(A, B), backend="reference")


def test_check_slots_names_those_outside():
    check_slots(torch.tensor([0, 3, 3, -1], device=DEVICE), 4)
    with pytest.raises(ValueError, match=r"slots \[4, -2\] are not possible; allowed: -1 and 0 to 3"):
        check_slots(torch.tensor([4, 0, -2], device=DEVICE), 4)


def test_a_document_without_an_adapter_gets_the_plain_projections_and_gives_no_gradient():
    given, douts = inputs(3, 6, slots=[1, -1, 1], count=3)
    assert_as_exact_as_plain_pytorch(given, douts)
    (x, weight, a, b, _, sizes), _ = given, douts
    outputs = ours(x, weight, a, b, torch.tensor([1, -1, 7], dtype=torch.int32, device=DEVICE), sizes)
    for output, rows in zip(outputs, weight.split(sizes), strict=True):
        torch.testing.assert_close(output[1:], (x @ rows.T)[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slots", "needs", "dtype"),
    [
        (None, (True, True), torch.float32),
        ([1, 0], (False, True), torch.float32),
        ([1, 0], (True, True), torch.float16),
    ],
)
def test_opcheck(slots, needs, dtype):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs, and unused padding is fresh memory
    x, weight, a, b, slots, sizes = inputs(2, 5, slots=slots, dtype=dtype)[0]
    leaves = x.requires_grad_(needs[0]), weight, a.requires_grad_(needs[1]), b
    torch.library.opcheck(torch.ops.klora.lora_qkv.default, (*leaves, slots, list(sizes), None, None))
    leaves = [t.detach() for t in leaves]
    q, k, v, xa, *packed = torch.ops.klora.lora_qkv(*leaves, slots, list(sizes), None, None)
    is_packed = a.dtype != x.dtype
    read = packed if is_packed else leaves[2:]
    given = [q, k, v], *leaves[:2], *read, xa, slots, None, None, b.size(2), is_packed
    grads = [torch.zeros_like(t) for t in (leaves[0], *leaves[2:])]
    torch.library.opcheck(torch.ops.klora.lora_backward_.default, (*given, *grads))
    torch.library.opcheck(torch.ops.klora.lora_backward_.default, (*given, grads[0], None, None))


@pytest.mark.parametrize("into_pool", [False, True])
def test_compile_with_fullgraph_gives_the_same_bits(into_pool):
    given, douts = inputs(2, 5, slots=[1, 0])
    views = pools(2, given)[0] if into_pool else None

    def loss(x, weight, a, b, slots, sizes):
        outputs = lora_qkv(x * 1.0, weight, a, b, slots, sizes, grads=views, backend="triton")
        return sum((out * dout).sum() for out, dout in zip(outputs, douts, strict=True))

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [given[i].clone().requires_grad_() for i in (0, 2, 3)]
        function(leaves[0], given[1], leaves[1], leaves[2], *given[4:]).backward()
        results.append([leaves[0].grad, *(t.clone() for t in (views or (leaves[1].grad, leaves[2].grad)))])
        if into_pool:
            [view.fill_(0) for view in views]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.any()


class TestOnTheGPU:
    pytestmark = gpu
    SEED = {"slots": [4, 0, 6, 2, 4], "count": 8, "width": 512, "sizes": (512, 256, 256), "dtype": torch.bfloat16}

    @pytest.fixture(scope="class")
    def cases(self):
        """Inputs of other widths, ranks and dtypes. Compiles their kernels and those of the seed side by side."""
        drawn = [
            inputs(2, 130, 48, (80, 16, 32), 3, [1, 0], 2, torch.float32),
            inputs(2, 130, 272, (400, 144, 16), 20, [1, 0], 2, torch.float16),
            inputs(2, 130, 256, (128, 64, 64), 64, [1, 1], 2, torch.bfloat16),
            inputs(3, 130, 512, (512, 256, 256), 8, [1, -1, 4], 5, torch.bfloat16, low=True),
            inputs(2, 130, 128, (128, 64, 64), 24, [1, 0], 2, torch.bfloat16, low=True),
            inputs(2, 130, 512, (512, 256, 256), 80, [1, 0], 2, torch.bfloat16),
            inputs(2, 130, 512, (512, 256, 256), 128, [1, 0], 2, torch.bfloat16, low=True),
            inputs(2, 70, 64, (64, 32, 32), 128, [1, 0], 2, torch.float32),
            inputs(3, 1000, 576, (576, 192, 192), 8, [1, -1, 1], 2, torch.bfloat16),
            inputs(2, 130, 336, (144, 48, 48), 16, [1, 0], 2, torch.float16, low=True),
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda case: outputs_and_gradients(ours, *case), [inputs(5, 9, **self.SEED), *drawn]))
        return drawn

    @pytest.mark.parametrize("case", range(10))
    def test_other_widths_ranks_and_dtypes(self, cases, case):
        assert_as_exact_as_plain_pytorch(*cases[case])

    @pytest.mark.parametrize("low", [False, True])
    @pytest.mark.parametrize("length", [1, 7, 255, 1000])
    def test_bf16_of_the_seed_is_as_exact_as_plain_pytorch(self, length, low):
        assert_as_exact_as_plain_pytorch(*inputs(5, length, **self.SEED, low=low))

    @pytest.mark.parametrize("low", [False, True])
    def test_twenty_runs_give_the_same_bits(self, low):
        given, douts = inputs(64, 255, **{**self.SEED, "slots": [*range(63), 4], "count": 70}, low=low)
        first = outputs_and_gradients(ours, given, douts)
        for _ in range(20):
            for one, other in zip(first, outputs_and_gradients(ours, given, douts), strict=True):
                assert torch.equal(one, other)

    def test_a_cuda_graph_replays_it(self):
        torch.use_deterministic_algorithms(False)
        given, douts = inputs(5, 256, **self.SEED)
        wanted = outputs_and_gradients(ours, given, douts)
        held, replay = replayed(lambda: outputs_and_gradients(ours, given, douts), warm_up=1)
        replay()
        for one, other in zip(wanted, held, strict=True):
            assert torch.equal(one, other)

    def test_compile_with_fullgraph_gives_the_same_bits(self):
        torch.use_deterministic_algorithms(False)
        given, douts = inputs(5, 255, **self.SEED)
        wanted = outputs_and_gradients(ours, given, douts)
        compiled = outputs_and_gradients(torch.compile(ours, fullgraph=True), given, douts)
        for one, other in zip(wanted, compiled, strict=True):
            assert torch.equal(one, other)

    def test_fifty_adam_steps_follow_plain_pytorch(self):
        """bf16 of both kinds stays equally near to the losses of plain fp32."""
        torch.use_deterministic_algorithms(False)
        losses = {}
        for name, function, dtype in (
            ("exact", plain, torch.float32),
            ("plain", plain, torch.bfloat16),
            ("ours", ours, torch.bfloat16),
        ):
            (x, weight, a, b, slots, sizes), targets = inputs(5, 256, **{**self.SEED, "dtype": dtype})
            leaves = [a.requires_grad_(), b.requires_grad_()]
            adam = torch.optim.Adam(leaves, lr=0.01, betas=(0.9, 0.95), eps=1e-10)
            path = []
            for _ in range(50):
                outputs = function(x, weight, *leaves, slots, sizes)
                loss = sum((o.float() - t.float()).square().mean() for o, t in zip(outputs, targets, strict=True))
                adam.zero_grad()
                loss.backward()
                adam.step()
                path.append(loss.detach())
            losses[name] = torch.stack(path)
        assert losses["exact"][-1] < 0.98 * losses["exact"][0]
        distance = {name: relative_error(losses[name], losses["exact"]) for name in ("plain", "ours")}
        assert distance["ours"] <= allowed_error(distance["plain"], torch.bfloat16, 50)
