"""Causal attention: the kernels against PyTorch's attention and float64, their bits, and the op's registration."""

import itertools
import math

import pytest
import torch
from conftest import DTYPES, replayed
from hopper import few
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.attention import plain_attention
from klora.bench.tolerance import assert_as_exact
from klora.kernels.attention import (
    backward,
    causal_attention,
    causal_attention_ref,
    causal_attention_varlen,
    check_cu_seqlens,
    document_starts,
    forward,
    packed_starts,
    why_not,
)
from klora.kernels.attention.backward import NormRotary, launch_backward
from klora.kernels.attention.forward import launch_forward
from klora.kernels.attention.op import WITHOUT_CACHE
from klora.kernels.rms_norm import EPS
from klora.kernels.rotary import norm_rotary, norm_rotary_ref, rotary_tables
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
KERNEL = {"backend": "triton"}


def draw(B=2, S=37, H=4, G=2, d=16, tail=None, dtype=torch.float32, device="cpu", seed=0) -> list[Tensor]:
    """q, k, v and dout."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, S, H, d), (B, S, G, d), (B, S, G, d), (B, S if tail is None else tail, H, d)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def attend(attention, q, k, v, dout, **more) -> list[Tensor]:
    """out, dq, dk and dv."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, **more)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def kernel_of_pytorch(q, k, v, tail):
    """PyTorch's own that takes fp32; it knows no groups on a GPU."""
    k, v = (t.repeat_interleave(q.size(2) // k.size(2), 2) for t in (k, v))
    return causal_attention_ref(q, k, v, "efficient" if q.is_cuda else "flash")[:, q.size(1) - tail :]


def plain(q, k, v, tail):
    return plain_attention(q, k, v)[:, q.size(1) - tail :]


def formulas(inputs):
    """Yardsticks. 16 bits: the formula in the same dtype. fp32, where p comes from the logsumexp: PyTorch's kernel that
    does the same as well.
    """
    return (plain, kernel_of_pytorch) if inputs[0].dtype == torch.float32 else (plain,)


def check(inputs):
    tail = inputs[3].size(1)
    exact = attend(plain, *(t.double() for t in inputs), tail=tail)
    yardsticks = (attend(formula, *inputs, tail=tail) for formula in formulas(inputs))
    assert_as_exact(attend(causal_attention, *inputs, tail=tail, **KERNEL), exact, *yardsticks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "S", "H", "G", "d", "tail"),
    [(2, 70, 4, 2, 16, 70), (1, 45, 4, 1, 32, 45), (1, 33, 3, 3, 16, 33), (2, 90, 2, 1, 64, 41), (1, 20, 2, 2, 128, 9)],
)
def test_attention_and_its_gradients_are_as_exact_as_pytorchs(B, S, H, G, d, tail, dtype):
    check(draw(B, S, H, G, d, tail, dtype))


OTHER_HEADS = [
    (1, 37, 4, 2, 8, 37),
    (1, 21, 2, 1, 24, 21),
    (2, 19, 2, 2, 72, 11),
    (1, 70, 4, 2, 80, 70),
    (1, 33, 3, 1, 96, 33),
    (1, 20, 8, 2, 120, 20),
    (1, 35, 2, 1, 136, 35),
    (1, 70, 4, 1, 256, 70),
]
"""Head sizes that a block pads, and the widest."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "S", "H", "G", "d", "tail"), OTHER_HEADS)
def test_heads_of_any_multiple_of_8_are_as_exact_as_pytorchs(B, S, H, G, d, tail, dtype):
    check(draw(B, S, H, G, d, tail, dtype))


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 2),
    S=st.integers(1, 50),
    G=st.integers(1, 2),
    ratio=st.sampled_from([1, 2, 3, 4, 6, 8]),
    d=st.sampled_from([16, 32]),
    data=st.data(),
)
def test_any_shape_any_tail(B, S, G, ratio, d, data):
    tail = data.draw(st.integers(1, S))
    inputs = draw(B, S, G * ratio, G, d, tail)
    ours = attend(causal_attention, *inputs, tail=tail, **KERNEL)
    exact = attend(plain, *(t.double() for t in inputs), tail=tail)
    for x, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=1e-4, atol=1e-5)


def test_the_equations_written_out():
    q, k, v, dout = (t.double() for t in draw(B=1, S=9, H=2, G=1))
    out, dq, dk, dv = attend(causal_attention, q, k, v, dout)
    for h in range(2):
        s = (q[0, :, h] @ k[0, :, 0].T / math.sqrt(16)).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        p = s.softmax(-1)
        torch.testing.assert_close(out[0, :, h], p @ v[0, :, 0])
        ds = p * (dout[0, :, h] @ v[0, :, 0].T - (dout[0, :, h] * out[0, :, h]).sum(-1, keepdim=True))
        torch.testing.assert_close(dq[0, :, h], ds @ k[0, :, 0] / math.sqrt(16))
        dk[0, :, 0] -= ds.T @ q[0, :, h] / math.sqrt(16)
        dv[0, :, 0] -= p.T @ dout[0, :, h]
    torch.testing.assert_close(dk, torch.zeros_like(dk))
    torch.testing.assert_close(dv, torch.zeros_like(dv))


def check_one_token(dtype, device):
    q, k, v, dout = draw(S=1, d=64, dtype=dtype, device=device)
    out, dq, dk, dv = attend(causal_attention, q, k, v, dout, **KERNEL)
    assert torch.equal(out, v.repeat_interleave(2, 2))
    torch.testing.assert_close(dv, dout.unflatten(2, (2, 2)).sum(3))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5, "zero but for the order of two sums"


def test_one_token_attends_to_itself():
    check_one_token(torch.float32, "cpu")
    check_one_token(torch.float16, "cpu")


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, dout = draw(S=40)
    inputs = 100 * q, 100 * k, v, dout
    for x, truth in zip(
        attend(causal_attention, *inputs, **KERNEL), attend(causal_attention, *inputs, backend="reference"), strict=True
    ):
        torch.testing.assert_close(x, truth, rtol=1e-3, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_tail_is_the_end_of_the_whole_and_dq_is_zero_before_it(backend):
    q, k, v, dout = draw(S=50, tail=21)
    whole = attend(causal_attention, q, k, v, torch.cat([torch.zeros(2, 29, 4, 16), dout], 1), backend=backend)
    out, *grads = attend(causal_attention, q, k, v, dout, tail=21, backend=backend)
    torch.testing.assert_close(out, whole[0][:, 29:])
    assert causal_attention(q, k, v, 21, backend=backend).is_contiguous()
    torch.testing.assert_close(grads, whole[1:])
    assert not grads[0][:, :29].any() and grads[0][:, 29:].all()


def in_another_layout(tensor: Tensor, layout: str) -> Tensor:
    if layout == "view of a projection":
        B, S, heads, d = tensor.shape
        return torch.cat([tensor.new_zeros(B, S, 48), tensor.flatten(2)], -1)[..., 48:].unflatten(-1, (heads, d))
    if layout == "heads before tokens":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "elements of a head apart":
        return tensor.mT.contiguous().mT
    return torch.cat([tensor, tensor[..., :1]], -1)[..., :-1]  # rows that are not 16 bytes apart


@pytest.mark.parametrize(
    "layout", ["view of a projection", "heads before tokens", "elements of a head apart", "rows 17 apart"]
)
def test_any_layout_gives_the_same_bits(layout):
    inputs = draw(S=20)
    strided = [in_another_layout(t, layout) for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    for x, y in zip(
        attend(causal_attention, *inputs, **KERNEL), attend(causal_attention, *strided, **KERNEL), strict=True
    ):
        assert torch.equal(x, y)


def test_a_gradient_may_be_expanded_and_a_part_of_them_be_wanted():
    q, k, v, _ = draw(S=20)
    grads = []
    for backend in ("reference", "triton"):
        leaf = k.detach().requires_grad_()
        causal_attention(q, leaf, v, backend=backend).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_a_document_has_the_same_bits_in_every_batch():
    inputs = draw(B=3, S=45, tail=30)
    whole = attend(causal_attention, *inputs, tail=30, **KERNEL)
    alone = attend(causal_attention, *(t[1:2] for t in inputs), tail=30, **KERNEL)
    for x, y in zip(alone, whole, strict=True):
        assert torch.equal(x[0], y[1])


class Launch:
    """Stands for a kernel; `made` gets its name at each launch."""

    def __init__(self, name, made):
        self.name, self.made = name, made

    def __getitem__(self, grid):
        return lambda **arguments: self.made.append(self.name)


class Operations(TorchDispatchMode):
    """Names what PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_forward_is_one_launch_and_a_backward_two_and_nothing_is_copied_or_filled(monkeypatch):
    q, k, v, dout = draw(S=40, d=64)
    made = []
    monkeypatch.setattr(forward, "_forward_kernel", Launch("forward", made))
    monkeypatch.setattr(backward, "_dq_kernel", Launch("dq", made))
    monkeypatch.setattr(backward, "_dkdv_kernel", Launch("dkdv", made))
    with Operations() as ran:
        out, lse = launch_forward(q, k, v, 40)
        launch_backward(dout, q, k, v, out, lse, [torch.empty_like(t) for t in (q, k, v)])
    assert made == ["forward", "dq", "dkdv"]
    assert set(ran.names) <= {"new_empty", "empty_like", "slice", "view", "zero_", "detach"}
    assert ran.names.count("zero_") <= 1, "of the queries before the tail: there are none"


def poisoned(monkeypatch):
    """Every tensor that is made empty is full of NaN."""
    for place, name in ((Tensor, "new_empty"), (torch, "empty_like")):
        empty = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, empty=empty, **more: empty(*given, **more).fill_(math.nan))


def test_everything_is_written(monkeypatch):
    inputs = draw(S=45, tail=18)
    expected = attend(causal_attention, *inputs, tail=18, **KERNEL)
    poisoned(monkeypatch)
    for x, y in zip(attend(causal_attention, *inputs, tail=18, **KERNEL), expected, strict=True):
        assert torch.equal(x, y)


def test_nothing_to_do_is_done():
    for B, S, tail in ((0, 4, 4), (2, 0, 0), (2, 5, 0)):
        for x in attend(causal_attention, *draw(B, S, tail=tail), tail=tail, **KERNEL):
            assert not x.any()


# The backward that ends in the projections' gradients


def rotated(B, S, H, G, d, tail, dtype, device="cpu"):
    """Projections q and k, v and dout; the tables, the gain (one of them zero) and what `NormRotary` holds."""
    inputs = draw(B, S, H, G, d, tail, dtype, device)
    cos, sin = rotary_tables(S, d, 50000.0, device)
    gain = torch.linspace(0, 2, H, device=device)
    rstd = [(t.float().square().mean(-1) + EPS).rsqrt() for t in inputs[:2]]
    return inputs, NormRotary(cos, sin, gain, *rstd)


def projections_grads(q, k, v, dout, rotary, attention=plain, composed=False):
    """dq, dk and dv of norm, rotation and `attention`: by autograd, or in the kernel's own backward."""
    tables = rotary.cos.to(q.dtype), rotary.sin.to(q.dtype), rotary.gain.to(q.dtype)
    if composed:
        q, k = norm_rotary(q, k, *rotary[:3], **KERNEL)
        out, lse = launch_forward(q, k, v, dout.size(1))
        grads = [torch.empty_like(t) for t in (q, k, v)]
        launch_backward(dout, q, k, v, out, lse, grads, rotary)
        return grads
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    if q.dtype != torch.float64:
        tables = rotary[:3]
    rotated_q, rotated_k = norm_rotary_ref(leaves[0], *tables), norm_rotary_ref(leaves[1], *tables[:2])
    out = attention(rotated_q, rotated_k, leaves[2], dout.size(1))
    return torch.autograd.grad(out, leaves, dout)


def check_rotated(made):
    inputs, rotary = made
    exact = projections_grads(*(t.double() for t in inputs), rotary)
    yardsticks = (projections_grads(*inputs, rotary, formula) for formula in formulas(inputs))
    assert_as_exact(projections_grads(*inputs, rotary, composed=True), exact, *yardsticks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_ends_in_the_gradients_of_the_projections(dtype):
    check_rotated(rotated(2, 45, 4, 2, 32, 45, dtype))
    check_rotated(rotated(3, 40, 4, 1, 16, 13, dtype))


# The op


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(2, 5, 64)}, r"q is float32 \[2, 5, 64\]; wanted .* \[B, S, H, d\]"),
        ({"q": torch.zeros(2, 5, 0, 16)}, "q has no heads; wanted at least one"),
        ({"k": torch.zeros(2, 5, 3, 16)}, "k has 3 heads; wanted a divisor of q's 4"),
        ({"k": torch.zeros(2, 4, 2, 16)}, r"k is float32 \[2, 4, 2, 16\]; wanted float32 \[2, 5, G, 16\]"),
        ({"v": torch.zeros(2, 5, 2, 32)}, r"v is float32 \[2, 5, 2, 32\]"),
        ({"v": torch.zeros(2, 5, 2, 16, dtype=torch.float16)}, "v is float16"),
        ({"v": torch.zeros(2, 5, 2, 16, device="meta")}, "v is .* on meta"),
        ({"tail": 6}, "tail is 6; allowed: 0 to S, 5"),
        ({"tail": -1}, "tail is -1"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    good = {"q": torch.zeros(2, 5, 4, 16), "k": torch.zeros(2, 5, 2, 16), "v": torch.zeros(2, 5, 2, 16), **KERNEL}
    with pytest.raises(ValueError, match=says):
        causal_attention(**{**good, **change})


def test_what_the_kernel_alone_does_not_take_is_refused_by_it_alone():
    for inputs, says in (
        (draw(d=20), "d is 20; wanted a positive multiple of 8 up to 256"),
        (draw(S=5, d=264), "d is 264; wanted a positive multiple of 8 up to 256"),
        (draw(dtype=torch.float64), "q is float64 .*; wanted bfloat16, float16 or float32"),
    ):
        causal_attention(*inputs[:3])
        with pytest.raises(ValueError, match=says):
            causal_attention(*inputs[:3], **KERNEL)


def check_registration(device):
    for tail in (20, 7):
        leaves = [t.requires_grad_() for t in draw(S=20, device=device)[:3]]
        op = torch.ops.klora.causal_attention
        torch.library.opcheck(op.default, (*leaves, None, tail))
        q, k, v = (t.detach() for t in leaves)
        out, lse = op(q, k, v, None, tail)
        into = [torch.empty_like(t) for t in (q, k, v)]
        given = out, q, k, v, out, lse, None, *WITHOUT_CACHE, *into
        torch.library.opcheck(torch.ops.klora.attention_backward.default, given)
        torch.library.opcheck(op.default, (*leaves, starts_of([[3, 8]] * 2, 20, device), tail))
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=device)
    for entries in (cu_seqlens, cu_seqlens[1:], cu_seqlens[::2]):
        torch.library.opcheck(torch.ops.klora.packed_starts.default, (entries, 70))


def check_compiled(device, backend):
    q, k, v, dout = draw(S=20, tail=7, device=device)
    compiled = torch.compile(
        lambda q, k, v: causal_attention(2 * q, k, v, 7, **KERNEL) + 1, fullgraph=True, backend=backend
    )
    eager = attend(lambda q, k, v: causal_attention(2 * q, k, v, 7, **KERNEL) + 1, q, k, v, dout)
    torch.testing.assert_close(attend(compiled, q, k, v, dout), eager)
    inputs, cu_seqlens = packed(device=device), torch.tensor(CU_SEQLENS, dtype=torch.int32, device=device)
    compiled = torch.compile(causal_attention_varlen, fullgraph=True, backend=backend)
    eager = attend(causal_attention_varlen, *inputs, cu_seqlens=cu_seqlens, **KERNEL)
    torch.testing.assert_close(attend(compiled, *inputs, cu_seqlens=cu_seqlens, **KERNEL), eager)
    check_compiled_starts(device, backend)


def check_compiled_starts(device, backend):
    """Of entries that are a whole tensor, a slice, and made by the compiled function itself."""

    def starts(whole, lengths):
        made = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        return [packed_starts(entries, 70) for entries in (whole, whole[1:], made, made[:3])]

    whole = torch.tensor([0, *CU_SEQLENS], dtype=torch.int32, device=device)
    inputs = whole, torch.tensor([1, 0, 17], device=device)
    compiled = torch.compile(starts, fullgraph=True, backend=backend)
    for x, y in zip(compiled(*inputs), starts(*inputs), strict=True):
        assert torch.equal(x, y)
    tokens = torch.tensor([[5, 5, 1, 5, 1, 1, 5], [1, 5, 5, 5, 5, 5, 5]], device=device)
    compiled = torch.compile(document_starts, fullgraph=True, backend=backend)
    assert torch.equal(compiled(tokens, 1), document_starts(tokens, 1))


def check_symbols(device, backend, compiler):
    """Batch and length stay symbols, and the number of groups may become one."""
    from torch._dynamo.testing import CompileCounterWithBackend

    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)

    def attention(q, k, v):
        packed = causal_attention_varlen(*(t.flatten(0, 1) for t in (q, k, v)), cu_seqlens, backend=backend)
        return causal_attention(q, k, v, backend=backend) + 1, packed

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for B, S, G in ((2, 9, 2), (3, 7, 2), (2, 8, 4)):
        inputs = draw(B, S, 4, G, device=device)[:3]
        for t in inputs:
            torch._dynamo.mark_dynamic(t, (0, 1))
        for x, y in zip(compiled(*inputs), attention(*inputs), strict=True):
            torch.testing.assert_close(x, y)
        assert counter.frame_count == 1 or G == 4
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert "klora.packed_starts.default" in targets and not any("searchsorted" in target for target in targets)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sizes_may_be_symbols(backend):
    check_symbols("cpu", backend, "eager")


@pytest.mark.slow
def test_opcheck_and_compile_on_a_cpu():
    check_registration("cpu")
    check_compiled("cpu", "aot_eager")


# Documents side by side in a row

CUTS = ([], [1], [16, 32, 64], [5, 6, 7, 40, 63, 65], list(range(1, 70)))
"""Where further documents start in each row: none, after one token, at tiles' edges, inside tiles, everywhere."""


def starts_of(cuts, S, device="cpu") -> Tensor:
    tokens = torch.zeros(len(cuts), S, dtype=torch.int64, device=device)
    for row, places in enumerate(cuts):
        tokens[row, [place for place in places if place < S]] = 1
    return document_starts(tokens, bos=1)


def apart(formula, cuts):
    """`formula` over each document alone: what a mask of documents must amount to."""

    def attention(q, k, v, tail):
        S, rows = q.size(1), []
        for row, places in enumerate(cuts):
            ends = [0, *(place for place in places if place < S), S]
            parts = [
                formula(*(t[row : row + 1, a:b] for t in (q, k, v)), b - a)
                for a, b in itertools.pairwise(ends)
                if a < b
            ]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)[:, S - tail :]

    return attention


def check_documents(inputs, cuts=CUTS):
    S, tail = inputs[0].size(1), inputs[3].size(1)
    exact = attend(apart(plain, cuts), *(t.double() for t in inputs), tail=tail)
    yardsticks = (attend(apart(formula, cuts), *inputs, tail=tail) for formula in formulas(inputs))
    start = starts_of(cuts, S, inputs[0].device)
    assert_as_exact(attend(causal_attention, *inputs, tail=tail, start=start, **KERNEL), exact, *yardsticks)


def test_starts_are_those_of_the_last_bos():
    tokens = torch.tensor([[5, 5, 1, 5, 1, 1, 5], [1, 5, 5, 5, 5, 5, 5]])
    start = document_starts(tokens, bos=1)
    assert start.dtype == torch.int32 and start.tolist() == [[0, 0, 2, 2, 4, 5, 5], [0] * 7]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "H", "G", "d", "tail"), [(70, 4, 2, 16, 70), (70, 2, 2, 32, 70), (66, 4, 1, 16, 23)])
def test_no_token_sees_another_document(S, H, G, d, tail, dtype):
    check_documents(draw(len(CUTS), S, H, G, d, tail, dtype))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(S=st.integers(1, 80), ratio=st.sampled_from([1, 2, 3, 4]), data=st.data())
def test_any_documents_any_tail(S, ratio, data):
    tail = data.draw(st.integers(1, S))
    cuts = [sorted(data.draw(st.sets(st.integers(1, S), max_size=8))) for _ in range(2)]
    inputs = draw(2, S, ratio, 1, 16, tail)
    ours = attend(causal_attention, *inputs, tail=tail, start=starts_of(cuts, S), **KERNEL)
    exact = attend(apart(plain, cuts), *(t.double() for t in inputs), tail=tail)
    for x, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=1e-4, atol=1e-5)


def check_one_document(inputs):
    tail, S = inputs[3].size(1), inputs[0].size(1)
    start = starts_of([[]] * len(inputs[0]), S, inputs[0].device)
    without = attend(causal_attention, *inputs, tail=tail, **KERNEL)
    for x, y in zip(attend(causal_attention, *inputs, tail=tail, start=start, **KERNEL), without, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("S", "tail"), [(70, 70), (64, 64), (50, 21)])
def test_a_row_of_one_document_has_the_bits_of_no_mask(S, tail):
    check_one_document(draw(1, S, 4, 2, 16, tail, torch.float16 if S == 64 else torch.float32))


def test_the_reference_keeps_documents_apart_too():
    inputs = draw(len(CUTS), 70)
    ours = attend(causal_attention, *inputs, start=starts_of(CUTS, 70), backend="reference")
    for x, truth in zip(ours, attend(apart(plain, CUTS), *inputs, tail=70), strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-4, atol=1e-5)


def test_starts_of_another_form_are_refused():
    q, k, v, _ = draw(S=9)
    for start in (torch.zeros(2, 9), torch.zeros(2, 8, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"start is .* wanted int32 \[2, 9\]"):
            causal_attention(q, k, v, start=start)


# Packed documents

CU_SEQLENS = [0, 1, 1, 18, 34, 35, 70]
"""A document of one token, an empty one, cuts inside tiles and at their edges."""


def packed(total=70, H=4, G=2, d=16, dtype=torch.float32, device="cpu") -> list[Tensor]:
    """q, k, v and dout of packed documents."""
    return [t[0] for t in draw(1, total, H, G, d, dtype=dtype, device=device)]


def one_at_a_time(formula, entries):
    """`formula`, of q [1, S, H, d], over each document; what follows the last is one more."""

    def attention(q, k, v):
        ends = [*entries, q.size(0)]
        return torch.cat([
            formula(*(t[None, a:b] for t in (q, k, v)), b - a)[0] for a, b in itertools.pairwise(ends) if a < b
        ])  # fmt: skip

    return attention


def check_packed(inputs, entries):
    cu_seqlens = torch.tensor(entries, dtype=torch.int32, device=inputs[0].device)
    exact = attend(one_at_a_time(plain, entries), *(t.double() for t in inputs))
    yardsticks = (attend(one_at_a_time(formula, entries), *inputs) for formula in formulas([t[None] for t in inputs]))
    assert_as_exact(attend(causal_attention_varlen, *inputs, cu_seqlens=cu_seqlens, **KERNEL), exact, *yardsticks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_documents_are_as_exact_as_each_alone(dtype):
    check_packed(packed(dtype=dtype), CU_SEQLENS)
    check_packed(packed(40, 3, 1, 24, dtype), [0, 0, 7, 30])
    check_packed(packed(20, 2, 2, 16, dtype), [0])
    for x in attend(causal_attention_varlen, *packed(0), cu_seqlens=torch.zeros(3, dtype=torch.int32), **KERNEL):
        assert x.numel() == 0


def test_the_reference_takes_packed_documents_too():
    inputs, cu_seqlens = packed(), torch.tensor(CU_SEQLENS, dtype=torch.int32)
    ours = attend(causal_attention_varlen, *inputs, cu_seqlens=cu_seqlens, backend="reference")
    for x, truth in zip(ours, attend(one_at_a_time(plain, CU_SEQLENS), *inputs), strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-4, atol=1e-5)


def check_packed_bits(inputs, entries):
    cu_seqlens = torch.tensor(entries, dtype=torch.int32, device=inputs[0].device)
    together = attend(causal_attention_varlen, *inputs, cu_seqlens=cu_seqlens, **KERNEL)
    for a, b in itertools.pairwise(entries):
        alone = attend(causal_attention, *(t[None, a:b] for t in inputs), **KERNEL) if a < b else ()
        for x, y in zip(alone, together, strict=bool(alone)):
            assert torch.equal(x[0], y[a:b])


def test_a_document_that_starts_at_a_block_has_the_bits_of_it_alone():
    check_packed_bits(packed(150, d=16, dtype=torch.float16), [0, 64, 64, 128, 150])


def test_blocks_of_other_documents_are_skipped():
    """What is not finite there would spoil any tile that it is multiplied in."""
    q, k, v, dout = packed(192, d=16, dtype=torch.float16)
    clean = attend(causal_attention, *(t[None, 64:128] for t in (q, k, v, dout)), **KERNEL)
    for t in (q, k, v, dout):
        t[:64], t[128:] = math.nan, math.inf
    cu_seqlens = torch.tensor([0, 64, 128, 192], dtype=torch.int32)
    together = attend(causal_attention_varlen, q, k, v, dout, cu_seqlens=cu_seqlens, **KERNEL)
    for x, y in zip(clean, together, strict=True):
        assert torch.equal(x[0], y[64:128])


def test_starts_of_packed_documents():
    def starts(entries, total):
        return packed_starts(torch.tensor(entries, dtype=torch.int32), total)

    assert starts([0, 2, 2, 3, 5], 7).tolist() == [[0, 0, 2, 3, 3, 5, 5]]
    assert starts([0], 2).tolist() == [[0, 0]] and starts([0, 0], 0).shape == (1, 0)
    assert starts([0, 1], 1).dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(1, 9, 4, 16)}, r"q is float32 \[1, 9, 4, 16\]; wanted \[T, H, d\]"),
        ({"k": torch.zeros(8, 2, 16)}, r"k is float32 \[8, 2, 16\]; wanted \[9, G, 16\]"),
        ({"v": torch.zeros(9, 1, 16)}, r"v is float32 \[9, 1, 16\]; wanted \[9, 2, 16\]"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"cu_seqlens is int64 \[2\]; wanted int32 \[documents \+ 1\]"),
        ({"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, r"cu_seqlens is int32 \[1, 2\]"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens is empty"),
        (
            {"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
            "cu_seqlens is .* on meta; wanted .* on cpu",
        ),
    ],
)
def test_what_are_no_packed_documents_is_refused(change, says):
    good = dict(zip("qkv", packed(9), strict=False), cu_seqlens=torch.tensor([0, 9], dtype=torch.int32), **KERNEL)
    with pytest.raises(ValueError, match=says):
        causal_attention_varlen(**{**good, **change})


def test_entries_are_checked_where_that_is_asked_for():
    check_cu_seqlens(torch.tensor(CU_SEQLENS, dtype=torch.int32), 70)
    for entries in ([1, 9], [0, 5, 4], [0, 10], []):
        with pytest.raises(ValueError, match=r"cu_seqlens is \[.*\]; allowed: from 0 on, .* up to 9 tokens"):
            check_cu_seqlens(torch.tensor(entries, dtype=torch.int32), 9)


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_a_package_without_a_document_mask_is_refused_by_name(name):
    reason = why_not(name, torch.device("cuda"), torch.bfloat16, 64, documents=True)
    assert "takes no document mask" in reason and "document_mask=false" in reason


# On a GPU


def shortened(S: int, tail: int) -> tuple[int, int]:
    """Under a tool 140 tokens at most: tiles of 64 and of 128, and a part of one."""
    S = few(S, 140)
    return S, min(S, tail)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("S", "H", "G", "d", "tail"),
    [
        (7, 8, 4, 64, 7),
        (255, 8, 4, 64, 255),
        (1000, 8, 4, 64, 1000),
        (1000, 8, 4, 64, 256),
        (300, 4, 4, 64, 77),
        (300, 8, 2, 64, 300),
        (130, 6, 2, 16, 130),
        (130, 2, 1, 32, 101),
        (200, 2, 1, 128, 200),
    ],
)
class TestOnGpu:
    pytestmark = ON_GPU

    def test_attention_and_its_gradients_are_as_exact_as_pytorchs(self, S, H, G, d, tail, dtype):
        S, tail = shortened(S, tail)
        check(draw(2, S, H, G, d, tail, dtype, "cuda"))

    def test_everything_is_written(self, S, H, G, d, tail, dtype, monkeypatch):
        S, tail = shortened(S, tail)
        inputs = draw(2, S, H, G, d, tail, dtype, "cuda")
        expected = attend(causal_attention, *inputs, tail=tail)
        poisoned(monkeypatch)
        for x, y in zip(attend(causal_attention, *inputs, tail=tail), expected, strict=True):
            assert torch.equal(x, y)

    def test_the_backward_ends_in_the_gradients_of_the_projections(self, S, H, G, d, tail, dtype):
        S, tail = shortened(S, tail)
        check_rotated(rotated(2, S, H, G, d, tail, dtype, "cuda"))

    def test_no_token_sees_another_document(self, S, H, G, d, tail, dtype):
        S, tail = shortened(S, tail)
        cuts = [*CUTS, [64, 128, 129, 500, 512], [S // 2, S - 1]]
        cuts = cuts[-few(len(cuts), 2) :]
        check_documents(draw(len(cuts), S, H, G, d, tail, dtype, "cuda"), cuts)

    def test_a_row_of_one_document_has_the_bits_of_no_mask(self, S, H, G, d, tail, dtype):
        S, tail = shortened(S, tail)
        check_one_document(draw(2, S, H, G, d, tail, dtype, "cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("d", "H", "G"), [(8, 4, 2), (24, 2, 2), (80, 8, 2), (120, 2, 2), (136, 4, 2), (256, 4, 1)])
class TestOtherHeadsOnGpu:
    pytestmark = ON_GPU

    def test_attention_and_its_gradients_are_as_exact_as_pytorchs(self, d, H, G, dtype):
        check(draw(2, 201, H, G, d, 201, dtype, "cuda"))

    def test_packed_documents_are_as_exact_as_each_alone(self, d, H, G, dtype):
        check_packed(packed(300, H, G, d, dtype, "cuda"), [*CU_SEQLENS, 200, 263])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestMoreOnGpu:
    def test_a_packed_document_that_starts_at_a_block_has_the_bits_of_it_alone(self):
        cuts = [0, 256, 256, 1280, 1500] if few(1500, 150) == 1500 else [0, 64, 64, 128, 150]
        for d in (64, 80, 128, 256):
            check_packed_bits(packed(cuts[-1], 8, 4, d, torch.bfloat16, "cuda"), cuts)

    def test_a_cuda_graph_replays_packed_documents(self):
        inputs = packed(300, 8, 4, 64, torch.bfloat16, "cuda")
        cu_seqlens = torch.tensor([0, 10, 300, 300], dtype=torch.int32, device="cuda")
        attend(causal_attention_varlen, *inputs, cu_seqlens=cu_seqlens)
        results, replay = replayed(lambda: attend(causal_attention_varlen, *inputs, cu_seqlens=cu_seqlens))
        cu_seqlens.copy_(torch.tensor([0, 1, 100, 290]))
        replay()
        for x, y in zip(results, attend(causal_attention_varlen, *inputs, cu_seqlens=cu_seqlens), strict=True):
            assert torch.equal(x, y)

    @pytest.mark.parametrize(("S", "tail"), [(1024, 1024), (1000, 256)])
    def test_runs_and_batches_have_the_same_bits(self, S, tail):
        inputs = draw(16, S, 8, 4, 64, tail, torch.bfloat16, "cuda")
        first = attend(causal_attention, *inputs, tail=tail)
        for _ in range(20):
            for x, y in zip(attend(causal_attention, *inputs, tail=tail), first, strict=True):
                assert torch.equal(x, y)
        for documents in ([3], [3, 5], [9, 3, 1], [15, 14, 13, 3], list(range(15, -1, -1))):
            mixed = attend(causal_attention, *(t[documents] for t in inputs), tail=tail)
            for x, y in zip(mixed, first, strict=True):
                assert torch.equal(x[documents.index(3)], y[3])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_one_token_attends_to_itself(self, dtype):
        check_one_token(dtype, "cuda")

    def test_opcheck_and_compile(self):
        check_registration("cuda")
        check_compiled("cuda", "inductor")

    def test_sizes_may_be_symbols(self):
        check_symbols("cuda", "triton", "inductor")

    def test_a_cuda_graph_replays_it(self):
        q, k, v, dout = draw(2, 300, 8, 4, 64, 100, torch.bfloat16, "cuda")
        static = [t.clone() for t in (q, k, v, dout)]
        attend(causal_attention, *static, tail=100)
        results, replay = replayed(lambda: attend(causal_attention, *static, tail=100))
        for t, fresh in zip(static, draw(2, 300, 8, 4, 64, 100, torch.bfloat16, "cuda", seed=1), strict=True):
            t.copy_(fresh)
        replay()
        expected = attend(causal_attention, *static, tail=100)
        for x, y in zip(results, expected, strict=True):
            assert torch.equal(x, y)
