"""Norms, the boundary of a block and rotary: kernels against the references and float64."""

import pytest
import torch
from conftest import DTYPES, replayed
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import assert_as_exact, relative_error
from klora.kernels.mlp import relu_squared_mlp
from klora.kernels.rms_norm import EPS, residual_norm, residual_norm_ref, rms_norm, rms_norm_ref
from klora.kernels.rotary import norm_rotary, norm_rotary_ref, rotary_tables
from torch import Tensor

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

ATTENTION = ("branch", "scale")
BETWEEN = ("branch", "scale", "bias", "mix", "x0")
JOINED = (*BETWEEN, "pushed", "skip")
FIRST = ("mix", "x0")
VECTORS = ("scale", "bias", "skip", "mix")


def draw(names, B=2, S=5, D=48, rows=None, dtype=torch.float32, device="cpu", seed=0) -> dict[str, Tensor]:
    """x and the named arguments of a boundary; `bias` is a view of a wider pool of `rows` slots."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"scale": (D,), "skip": (D,), "mix": (2, D), "bias": (rows or B, 3 * D)}
    tensors = {}
    for name in ("x", *names):
        tensor = torch.randn(shapes.get(name, (B, S, D)), generator=generator)
        tensors[name] = tensor.to(device, torch.float32 if name in VECTORS else dtype)
    if "bias" in names:
        tensors["bias"] = tensors["bias"][:, D : 2 * D]
    return tensors


def douts(like, rounded=None, seed=1):
    """A gradient for each tensor, rounded to the dtype `rounded` before it gets the tensor's."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(t.shape, generator=generator).to(rounded or t.dtype) for t in like]
    return [dout.to(t.device, t.dtype) for dout, t in zip(drawn, like, strict=True)]


def boundary(function, tensors, wanted=None, rounded=None, **more):
    """The outputs that there are, and the gradients of the `wanted` arguments (of all)."""
    wanted = tensors if wanted is None else wanted
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    outputs = [t for t in function(**leaves, **more) if t is not None]
    grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], douts(outputs, rounded))
    return [t.detach() for t in outputs] + list(grads)


def doubled(tensors):
    return {name: t.double() for name, t in tensors.items()}


def check_boundary(tensors, wanted=None, **more):
    ours = boundary(residual_norm, tensors, wanted, backend="triton", **more)
    plain = boundary(residual_norm_ref, tensors, wanted, **more)
    exact = boundary(residual_norm_ref, doubled(tensors), wanted, rounded=tensors["x"].dtype, **more)
    assert_as_exact(ours, exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), ATTENTION, BETWEEN, JOINED, FIRST, ("branch",), ("bias",)])
def test_a_boundary_and_its_gradients_are_as_exact_as_pytorchs(names, dtype):
    check_boundary(draw(names, S=70, D=80, dtype=dtype), push=bool(names))


@pytest.mark.slow
@pytest.mark.parametrize(("B", "S", "D"), [(1, 1, 16), (3, 33, 512), (1, 7, 2048), (1, 3, 4096)])
def test_widths_and_lengths(B, S, D):
    check_boundary(draw(JOINED, B, S, D, dtype=torch.float16))


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    names=st.sampled_from([ATTENTION, BETWEEN, JOINED]),
    B=st.integers(1, 3),
    S=st.integers(1, 40),
    D=st.integers(1, 9).map(lambda n: 16 * n),
    data=st.data(),
)
def test_any_shape_any_slots_any_gradients(names, B, S, D, data):
    tensors = draw(names, B, S, D, rows=4)
    more = {"push": data.draw(st.booleans()), "last": data.draw(st.booleans())}
    if "bias" in names:
        more["slots"] = torch.tensor(data.draw(st.lists(st.integers(-1, 3), min_size=B, max_size=B)))
    through = data.draw(st.sampled_from(["x", "branch"]))
    wanted = sorted({through, *data.draw(st.lists(st.sampled_from(sorted(tensors))))})
    ours = boundary(residual_norm, tensors, wanted, backend="triton", **more)
    exact = boundary(residual_norm_ref, doubled(tensors), wanted, **more)
    for x, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=1e-4, atol=1e-4)


def test_the_equations_written_out():
    t = doubled(draw(JOINED, rows=3))
    slots = torch.tensor([2, -1])
    out = residual_norm(**t, slots=slots, push=True)
    x_out = t["x"] + t["scale"] * t["branch"]
    x_out[0] += t["bias"][2]
    x_in = t["mix"][0] * (x_out + t["skip"] * t["pushed"]) + t["mix"][1] * t["x0"]
    torch.testing.assert_close(out.x_out, x_out)
    torch.testing.assert_close(out.x_in, x_in)
    torch.testing.assert_close(out.n, x_in / (x_in.square().mean(-1, keepdim=True) + 2.0**-23).sqrt())


def test_slots_read_and_write_their_own_rows_and_repeats_sum_up():
    tensors = draw(("branch", "bias"), B=4, S=40, rows=5)
    slots = torch.tensor([3, -1, 3, 9], dtype=torch.int32)
    ours = boundary(residual_norm, tensors, slots=slots, backend="triton")
    tensors["bias"] = tensors["bias"].clone()
    inside = slots.where(slots < 5, -1)
    exact = boundary(residual_norm_ref, doubled(tensors), slots=inside)
    for x, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, rtol=1e-4, atol=1e-4)
    assert not ours[-1][[0, 1, 2, 4]].any() and ours[-1][3].all()


def test_the_bias_gradient_goes_into_a_pool():
    tensors = draw(BETWEEN, B=3, S=40, rows=5)
    slots = torch.tensor([3, -1, 0])
    whole = boundary(residual_norm, tensors, slots=slots, backend="triton")[list(tensors).index("bias") + 2]
    pool = torch.full((5, 100), 7.0)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = residual_norm(**leaves, slots=slots, bias_grad=pool[:, 20:68], backend="triton")
    outputs = [out.x_in, out.n]
    torch.autograd.backward(outputs, douts(outputs))
    assert leaves["bias"].grad is None and leaves["x"].grad is not None
    assert torch.equal(pool[[0, 3], 20:68], whole[[0, 3]])
    pool[[0, 3], 20:68] = 7.0
    assert (pool == 7.0).all()


def test_a_document_has_the_same_bits_in_every_batch():
    tensors = draw(JOINED, B=3, S=75, D=64)
    per_document = [name for name in tensors if name not in ("scale", "skip", "mix")]
    whole = boundary(residual_norm, tensors, per_document, backend="triton")
    alone = {name: t[1:2] if name in per_document else t for name, t in tensors.items()}
    leaves = {name: t.detach().requires_grad_(name in per_document) for name, t in alone.items()}
    outputs = list(residual_norm(**leaves, backend="triton"))[1:]
    slices = [dout[1:2] for dout in douts([t for t in whole[:2]])]
    grads = torch.autograd.grad(outputs, [leaves[name] for name in per_document], slices)
    for one, of_all in zip([*outputs, *grads], whole, strict=True):
        assert torch.equal(one[0], of_all[1])


def test_what_nobody_asked_for_is_not_stored():
    tensors = draw(ATTENTION)
    for more, missing in (({}, "x_out"), ({"last": True}, "x_in")):
        for backend in ("reference", "triton"):
            assert getattr(residual_norm(**tensors, **more, backend=backend), missing) is None
    plain = residual_norm(tensors["x"], push=True, backend="triton")
    assert plain.x_in is tensors["x"] and plain.x_out is tensors["x"]


def test_only_what_the_gradients_read_is_kept():
    kept: list[Tensor] = []
    tensors = draw(BETWEEN, D=64)
    for name in ("x", "branch", "bias"):
        tensors[name] = tensors[name].detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = residual_norm(**tensors, backend="triton")
    whole = [t for t in kept if t.shape == tensors["x"].shape]
    assert len(whole) == 1 and torch.equal(whole[0], out.n)


def test_gradients_may_come_from_one_output_alone_and_in_any_layout():
    tensors = draw(BETWEEN)
    for pick in ("x_in", "n"):
        grads = []
        for function, more in ((residual_norm, {"backend": "triton"}), (residual_norm_ref, {})):
            leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            getattr(function(**leaves, **more), pick).sum(0).mT.square().sum().backward()
            grads.append([leaf.grad for leaf in leaves.values()])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_rms_norm_takes_any_leading_dimensions_and_strides():
    for shape in ((32,), (7, 32), (2, 3, 5, 32)):
        x = torch.randn(*shape[:-1], 64)[..., ::2].requires_grad_()
        ours, plain = rms_norm(x, backend="triton"), rms_norm_ref(x)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(*(torch.autograd.grad(o.sin().sum(), x) for o in (ours, plain)))
    tiny = torch.full((1, 32), 1e-4)
    torch.testing.assert_close(rms_norm(tiny, backend="triton"), rms_norm_ref(tiny))


def test_nothing_to_do_is_done():
    for B, S in ((0, 4), (2, 0)):
        results = boundary(residual_norm, draw(JOINED, B, S, D=32), backend="triton")
        assert all(not t.any() for t in results)
        q, cos = torch.zeros(B, S, 2, 8, requires_grad=True), torch.zeros(S, 4)
        gain = torch.ones(2, requires_grad=True)
        outputs = norm_rotary(q, q, cos, cos, gain, backend="triton")
        assert not torch.autograd.grad(sum(o.sum() for o in outputs), gain)[0].any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(5, 48)}, r"x is float32 \[5, 48\]; wanted bfloat16, float16 or float32 \[B, S, D\]"),
        (
            {"branch": torch.zeros(2, 5, 32)},
            r"branch is float32 \[2, 5, 32\]; wanted float32 \[2, 5, 48\]",
        ),
        (
            {"x0": torch.zeros(2, 5, 48, dtype=torch.float16)},
            r"x0 is float16 \[2, 5, 48\]; wanted float32",
        ),
        ({"scale": torch.zeros(47)}, r"scale is float32 \[47\]; wanted float32 \[48\]"),
        ({"scale": torch.zeros(48, dtype=torch.float16)}, r"scale is float16 \[48\]; wanted float32 \[48\]"),
        ({"mix": torch.zeros(48)}, r"mix is float32 \[48\]; wanted float32 \[2, 48\]"),
        ({"bias": torch.zeros(3, 48)}, r"bias is float32 \[3, 48\]; wanted float32 \[2, 48\]"),
        ({"skip": None}, "pushed is given without skip"),
        ({"x0": None}, "mix is given without x0"),
        ({"branch": None}, "scale is given without branch"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, r"slots is int32 \[3\]; wanted int32 or int64 \[2\]"),
        ({"slots": torch.zeros(2)}, r"slots is float32 \[2\]; wanted int32 or int64 \[2\]"),
        ({"bias": None, "slots": torch.zeros(2)}, "slots is given without bias"),
        ({"scale": torch.zeros(48, device="meta")}, r"scale is float32 \[48\] on meta; wanted float32 \[48\] on cpu"),
        ({"bias_grad": torch.zeros(3, 48)}, r"bias_grad is float32 \[3, 48\]; wanted float32 \[2, 48\]"),
        (
            {"bias_grad": torch.zeros(2, 48, dtype=torch.float16)},
            r"bias_grad is float16 .*; wanted float32 \[2, 48\]",
        ),
        (
            {"bias_grad": torch.zeros(2, 48), "backend": "reference"},
            "bias_grad is given, and the reference has no",
        ),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_boundaries_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        residual_norm(**{**draw(JOINED), "backend": "triton", **change})


def test_bad_widths_and_dtypes_are_refused():
    for size in (8, 24, 8208):
        with pytest.raises(ValueError, match=f"D is {size}; wanted a positive multiple of 16 up to 8192"):
            rms_norm(torch.zeros(2, size), backend="triton")
    with pytest.raises(ValueError, match=r"x is float64 \[2, 16\]; wanted bfloat16, float16 or float32 \[..., D\]"):
        rms_norm(torch.zeros(2, 16, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        rms_norm(torch.zeros(2, 16), backend="gpu")


def normed(function, x, weight, dn, **more):
    """n and the gradients of x and weight."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    n = function(*leaves, **more)
    return [n.detach(), *torch.autograd.grad(n, leaves, dn.to(n.dtype))]


def check_weighted_norm(rows, D, dtype, weight_dtype, device="cpu", **about):
    """About a hundred numbers: eight draws, for chance decides which sum is better."""
    found = [], [], []
    for seed in range(8 if rows * D < 500 else 1):
        generator = torch.Generator().manual_seed(seed)
        x, weight, dn = (torch.randn(s, generator=generator) for s in ((rows, D), (D,), (rows, D)))
        x, dn, weight = x.to(device, dtype), dn.to(device, dtype), weight.to(device, weight_dtype)
        found[0].append(normed(rms_norm, x, weight, dn, backend="triton", **about))
        found[1].append(normed(rms_norm_ref, x.double(), weight.double(), dn, **about))
        found[2].append(normed(rms_norm_ref, x, weight, dn, **about))
    assert_as_exact(*([torch.stack(same) for same in zip(*results, strict=True)] for results in found))


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 2, pytest.param((torch.float16,) * 2, marks=pytest.mark.slow), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize(("rows", "D"), [(1, 16), (70, 80), (2100, 16)])
def test_a_norm_with_a_weight_is_as_exact_as_pytorchs(rows, D, dtypes, unit_offset):
    """2,100 rows: more splits of 32 than a group has."""
    check_weighted_norm(rows, D, *dtypes, eps=1e-5, unit_offset=unit_offset)


def test_a_weighted_norm_written_out_and_at_a_weight_of_zero():
    x, weight = torch.randn(6, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    n = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, eps=0.5), n * weight)
    torch.testing.assert_close(rms_norm(x, weight, eps=0.5, unit_offset=True), n * (1 + weight))
    zero = torch.zeros(32)
    ours, plain = (normed(rms_norm, x.float(), zero, x.float(), backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, plain)
    assert not ours[0].any() and not ours[1].any() and ours[2].all()


@pytest.mark.parametrize("names", [(), ATTENTION, JOINED])
@pytest.mark.parametrize("last", [False, True])
def test_a_boundary_may_end_with_a_weight(names, last):
    tensors = draw(names, S=70, D=80) | {"weight": torch.randn(80, generator=torch.Generator().manual_seed(3))}
    check_boundary(tensors, push=bool(names), last=last, eps=1e-5, unit_offset=True)
    check_boundary(tensors, wanted=["x", "weight"], last=last)


def test_a_weighted_norm_may_be_changed_in_place_and_has_no_gradients_of_no_rows():
    x, weight = torch.randn(3, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    rms_norm(x, weight, backend="triton").mul_(2).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * rms_norm_ref(x).sum(0).detach())
    results = normed(rms_norm, torch.zeros(0, 32), torch.ones(32), torch.zeros(0, 32), backend="triton")
    assert not results[2].any()


def test_bad_weights_are_refused():
    x = torch.zeros(2, 5, 32)
    for function in (rms_norm, residual_norm):
        for backend in ("reference", "triton"):
            with pytest.raises(ValueError, match=r"weight is float32 \[16\]; wanted .* \[32\]"):
                function(x, weight=torch.zeros(16), backend=backend)
            with pytest.raises(ValueError, match="eps is 0.0; wanted a number above 0"):
                function(x, eps=0.0, backend=backend)
            with pytest.raises(ValueError, match="unit_offset is given without weight"):
                function(x, unit_offset=True, backend=backend)
        with pytest.raises(ValueError, match="weight is float64 .*; wanted bfloat16, float16 or float32"):
            function(x, weight=torch.zeros(32, dtype=torch.float64), backend="triton")


def heads(B=2, S=5, H=4, G=2, d=16, dtype=torch.float32, device="cpu", seed=0):
    """The stacked output of a QKV product, gain, and the gradients of both outputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, S, (H + 2 * G) * d), (H,), (B, S, H, d), (B, S, G, d)
    qkv, gain, *grads = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return qkv.to(dtype), gain, *(grad.to(dtype) for grad in grads)


def plain_rotary(q, k, cos, sin, gain):
    return norm_rotary_ref(q, cos, sin, gain), norm_rotary_ref(k, cos, sin)


def rotate(function, qkv, gain, dq, dk, **more):
    """q, k and the gradients of qkv and gain."""
    (_, S, H, d), G = dq.shape, dk.size(2)
    tables = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    cos, sin = rotary_tables(S, d, 50000.0, qkv.device, tables)
    leaves = qkv.detach().requires_grad_(), gain.detach().requires_grad_()
    q, k, _ = (t.unflatten(-1, (-1, d)) for t in leaves[0].split([H * d, G * d, G * d], dim=-1))
    outputs = function(q, k, cos, sin, leaves[1], **more)
    return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, leaves, (dq, dk)))


def check_rotary(inputs):
    exact = rotate(plain_rotary, *(t.double() for t in inputs))
    assert_as_exact(rotate(norm_rotary, *inputs, backend="triton"), exact, rotate(plain_rotary, *inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "S", "H", "G", "d"), [(2, 21, 8, 4, 64), (1, 1, 1, 1, 2), (2, 40, 6, 3, 20)])
def test_rotary_and_its_gradients_are_as_exact_as_pytorchs(B, S, H, G, d, dtype):
    check_rotary(heads(B, S, H, G, d, dtype))


def test_rotary_of_more_heads_than_a_tile_holds():
    check_rotary(heads(1, 3, 40, 24, 128, torch.float16))


def test_rotary_without_gain_in_other_layouts_and_of_one_output():
    qkv, _, dq, dk = heads()
    cos, sin = rotary_tables(5, 16, 100.0)
    # Heads before tokens, as attention lays them out, and elements of a head apart.
    for q in (dq.transpose(1, 2).contiguous().transpose(1, 2), dq.mT.contiguous().mT):
        results = []
        for function, more in ((norm_rotary, {"backend": "triton"}), (plain_rotary, {})):
            leaves = q.detach().requires_grad_(), dk.detach().requires_grad_()
            q_out, _ = function(*leaves, cos, sin, None, **more)
            results.append((q_out.detach(), torch.autograd.grad(q_out.sin().sum(), leaves[0])[0]))
        torch.testing.assert_close(*results)


def test_rotary_at_gain_zero_has_the_gradient_of_gain():
    qkv, _, dq, dk = heads()
    inputs = qkv, torch.zeros(4), dq, dk
    ours, plain = rotate(norm_rotary, *inputs, backend="triton"), rotate(plain_rotary, *inputs)
    torch.testing.assert_close(ours, plain)
    assert not ours[0].any() and ours[3].all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"q": torch.zeros(2, 5, 64)},
            r"q is float32 \[2, 5, 64\]; wanted .* \[B, S, H, d\]",
        ),
        ({"q": torch.zeros(2, 5, 4, 15), "k": torch.zeros(2, 5, 2, 15)}, "wanted an even d"),
        ({"q": torch.zeros(2, 5, 0, 16)}, "at least one head of each"),
        ({"k": torch.zeros(2, 5, 0, 16)}, "at least one head of each"),
        ({"k": torch.zeros(2, 4, 2, 16)}, r"k is float32 \[2, 4, 2, 16\]; wanted float32 \[2, 5, G, 16\]"),
        (
            {"k": torch.zeros(2, 5, 2, 16, dtype=torch.float16)},
            r"k is float16 .*; wanted float32 \[2, 5, G, 16\]",
        ),
        ({"cos": torch.zeros(6, 8)}, r"cos is float32 \[6, 8\]; wanted float32 \[5, 8\]"),
        ({"sin": torch.zeros(5, 8, dtype=torch.float64)}, r"sin is float64 \[5, 8\]; wanted float32 \[5, 8\]"),
        ({"gain": torch.zeros(2)}, r"gain is float32 \[2\]; wanted float32 \[4\]"),
        ({"k": torch.zeros(2, 5, 2, 16, device="meta")}, "k is .* on meta"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_rotary_arguments_are_refused(change, says):
    table = torch.zeros(5, 8)
    good = {"q": torch.zeros(2, 5, 4, 16), "k": torch.zeros(2, 5, 2, 16), "cos": table, "sin": table}
    with pytest.raises(ValueError, match=says):
        norm_rotary(**{**good, "gain": torch.zeros(4), "backend": "triton", **change})
    with pytest.raises(ValueError, match=r"q is float64 .*; wanted bfloat16, float16 or float32 \[B, S, H, d\]"):
        norm_rotary(good["q"].double(), good["k"].double(), table, table, backend="triton")


def mlp_weights(D, hidden, dtype, device):
    """up, down."""
    generator = torch.Generator().manual_seed(0)
    sizes = (hidden, D), (D, hidden)
    return [(torch.randn(size, generator=generator) * size[1] ** -0.5).to(device, dtype) for size in sizes]


@pytest.mark.slow
def test_the_ops_are_registered_as_torch_wants_it():
    t = {name: tensor.detach().requires_grad_() for name, tensor in draw(JOINED, S=3, D=16, rows=3).items()}
    order = [t[name] for name in ("x", "branch", "scale", "bias")]
    order += [torch.tensor([2, -1]), *(t[name] for name in ("pushed", "skip", "mix", "x0"))]
    torch.library.opcheck(torch.ops.klora.residual_norm, (*order, None, None, False, True, True, None, EPS, False))
    torch.library.opcheck(
        torch.ops.klora.residual_norm, (t["x"], *[None] * 10, False, False, False, t["scale"], 1e-5, True)
    )
    for weight, unit_offset in ((None, False), (t["scale"], True)):
        torch.library.opcheck(torch.ops.klora.rms_norm, (t["x"], weight, 1e-5, unit_offset))
    plain = [tensor.detach() for tensor in order]
    rstd = torch.rand(2, 3)
    backward = torch.ops.klora.residual_norm_backward_
    given = [torch.zeros(3, 16), torch.zeros_like(plain[0])]
    grads = [torch.zeros_like(plain[place]) for place in (0, 1, 5, 2, 7, 6)]
    torch.library.opcheck(backward, (*plain[:1] * 4, rstd, *plain, *grads, *given, True, None, None, False, None))
    nothing, scale = [None] * 9, t["scale"].detach()
    weighted = *nothing, grads[0], *[None] * 7, False, scale, scale.clone(), True, None
    torch.library.opcheck(backward, (plain[0], None, None, plain[0], rstd, *weighted))
    squares = plain[0].square().sum(-1).view(1, -1)
    given = plain[0], None, None, plain[0], None, *nothing, grads[0], *[None] * 7, False, None, None, False, squares
    torch.library.opcheck(backward, given)
    torch.library.opcheck(
        torch.ops.klora.rms_norm_backward_,
        (plain[0], plain[0].clone(), torch.rand(6), scale, grads[0], scale.clone(), True),
    )
    qkv, gain, dq, dk = heads(S=3)
    cos, sin = rotary_tables(3, 16, 100.0)
    q, k = qkv[..., :64].unflatten(-1, (4, 16)), qkv[..., 64:96].unflatten(-1, (2, 16))
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k)]
    torch.library.opcheck(torch.ops.klora.norm_rotary, (*leaves, cos, sin, gain.requires_grad_()))
    plain = q, k, cos, sin, gain.detach(), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(gain.detach())
    torch.library.opcheck(torch.ops.klora.norm_rotary_backward_, (dq, dk, *plain))


def whole_block(t, qkv, gain, cos, sin, up, down, backend=None):
    """Every op once, one after the other."""
    out = residual_norm(**t, push=True, backend=backend)
    q, k = (part.unflatten(-1, (-1, 16)) for part in qkv.split([64, 32, 32], dim=-1)[:2])
    q, k = norm_rotary(q, k, cos, sin, gain, backend=backend)
    return out.x_out.sum(), out.x_in.mean(), relu_squared_mlp(out.n, up, down, backend=backend), q, k


def block_arguments(device="cpu", dtype=torch.float32, B=2, S=5, D=32):
    t = draw(JOINED, B, S, D, dtype=dtype, device=device)
    qkv, gain, *_ = heads(B, S, dtype=dtype, device=device)
    return t, qkv, gain, *rotary_tables(S, 16, 100.0, device), *mlp_weights(D, 48, dtype, device)


def block_results(function, t, qkv, gain, cos, sin, up, down, **more):
    t = {name: tensor.detach().requires_grad_() for name, tensor in t.items()}
    leaves = [tensor.detach().requires_grad_() for tensor in (qkv, gain, up, down)]
    outputs = function(t, *leaves[:2], cos, sin, *leaves[2:], **more)
    grads = torch.autograd.grad(outputs, [*t.values(), *leaves], douts(outputs))
    return [*(o.detach() for o in outputs), *grads]


@pytest.mark.slow
def test_they_are_traced_whole():
    arguments = block_arguments()
    compiled = torch.compile(whole_block, fullgraph=True, backend="aot_eager")
    ours = block_results(compiled, *arguments, backend="triton")
    for x, plain in zip(ours, block_results(whole_block, *arguments, backend="triton"), strict=True):
        torch.testing.assert_close(x, plain)


class TestOnTheGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize(
        ("names", "dtype", "B", "S", "D"),
        [
            *((names, torch.bfloat16, 4, 1024, 512) for names in ((), ATTENTION, BETWEEN, JOINED, FIRST)),
            *((JOINED, dtype, 3, 255, 512) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
            *((JOINED, dtype, 5, 77, 80) for dtype in (torch.bfloat16, torch.float32)),
            *((JOINED, dtype, 2, 100, 4096) for dtype in (torch.bfloat16, torch.float32)),
        ],
    )
    def test_a_boundary_is_as_exact_as_pytorchs(self, names, dtype, B, S, D):
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))  # what empty() hands out next is not zero
        tensors = draw(names, B, S, D, dtype=dtype, device="cuda")
        check_boundary(tensors, push=bool(names))
        check_boundary(tensors, wanted=[n for n in ("x", "branch", "bias", "pushed") if n in tensors])

    @pytest.mark.parametrize("unit_offset", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("rows", "D"), [(16384, 2048), (777, 8192), (50_001, 128), (3, 80)])
    def test_a_norm_with_a_weight_is_as_exact_as_pytorchs(self, rows, D, dtype, unit_offset):
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))
        check_weighted_norm(rows, D, dtype, dtype, "cuda", eps=1e-5, unit_offset=unit_offset)
        check_weighted_norm(rows, D, dtype, torch.float32, "cuda", eps=1e-5, unit_offset=unit_offset)

    def test_a_weight_has_the_same_bits_every_time(self):
        x = torch.randn(50_001, 1024, device="cuda").bfloat16()
        weight = torch.randn(1024, device="cuda")
        first = normed(rms_norm, x, weight, x)
        for _ in range(19):
            assert all(torch.equal(a, b) for a, b in zip(first, normed(rms_norm, x, weight, x), strict=True))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_boundary_with_a_weight_and_8192_columns(self, dtype):
        tensors = draw(JOINED, 2, 100, 8192, dtype=dtype, device="cuda")
        check_boundary(tensors | {"weight": torch.randn(8192, device="cuda")}, eps=1e-5)

    @pytest.mark.parametrize(
        ("dtype", "B", "S", "H", "G", "d"),
        [
            *((dtype, 4, 1023, 8, 4, 64) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
            (torch.bfloat16, 3, 255, 6, 2, 128),
            (torch.bfloat16, 2, 77, 3, 3, 20),
            (torch.float32, 1, 33, 40, 8, 256),
        ],
    )
    def test_rotary_is_as_exact_as_pytorchs(self, dtype, B, S, H, G, d):
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))
        check_rotary(heads(B, S, H, G, d, dtype, "cuda"))

    def test_the_same_bits_every_time_and_in_every_batch(self):
        tensors = draw(JOINED, 8, 1000, 512, rows=9, dtype=torch.bfloat16, device="cuda")
        slots = torch.tensor([8, 1, 1, 3, -1, 0, 8, 2], dtype=torch.int32, device="cuda")
        qkv = heads(8, 1000, 8, 4, 64, torch.bfloat16, "cuda")
        first = boundary(residual_norm, tensors, slots=slots), rotate(norm_rotary, *qkv)
        for _ in range(19):
            again = boundary(residual_norm, tensors, slots=slots), rotate(norm_rotary, *qkv)
            for x, y in zip(first, again, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
        vectors = ("scale", "skip", "mix", "bias")
        alone = {name: t if name in vectors else t[3:4] for name, t in tensors.items()}
        leaves = {name: t.detach().requires_grad_(name in ("x", "branch", "bias")) for name, t in alone.items()}
        outputs = list(residual_norm(**leaves, slots=slots[3:4]))[1:]
        together = {name: t.detach().requires_grad_(name in ("x", "branch", "bias")) for name, t in tensors.items()}
        whole = list(residual_norm(**together, slots=slots))[1:]
        grads = [
            torch.autograd.grad(out, [given[name] for name in ("x", "branch", "bias")], dout)
            for out, given, dout in ((outputs, leaves, [d[3:4] for d in douts(whole)]), (whole, together, douts(whole)))
        ]
        assert torch.equal(outputs[1][0], whole[1][3])
        assert torch.equal(grads[0][0][0], grads[1][0][3]) and torch.equal(grads[0][1][0], grads[1][1][3])
        assert torch.equal(grads[0][2][3], grads[1][2][3])

    def test_they_are_captured_in_a_graph_and_compiled_whole(self):
        arguments = block_arguments("cuda", torch.bfloat16, B=4, S=100)
        expected = block_results(whole_block, *arguments)
        compiled = torch.compile(whole_block, fullgraph=True)
        for x, y in zip(block_results(compiled, *arguments)[2:], expected[2:], strict=True):
            assert relative_error(x, y) < 1e-2
        held, replay = replayed(lambda: step(arguments), warm_up=1)
        replay()
        for x, y in zip(held, step(arguments), strict=True):
            assert torch.equal(x, y)


def step(arguments):
    """Outputs and gradients of all ops, with gradients that a captured graph can make: no random numbers."""
    t, qkv, gain, cos, sin, up, down = arguments
    t = {name: tensor.detach().requires_grad_() for name, tensor in t.items()}
    leaves = [tensor.detach().requires_grad_() for tensor in (qkv, gain, up, down)]
    outputs = whole_block(t, *leaves[:2], cos, sin, *leaves[2:])
    grads = torch.autograd.grad(sum(o.float().sin().sum() for o in outputs), [*t.values(), *leaves])
    return [*(o.detach() for o in outputs), *grads]
