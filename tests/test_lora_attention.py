"""lora_attention: two ops in one, with the gradients of both and nothing of the batch in a document's bits."""

import pytest
import torch
from klora.bench.tolerance import assert_as_exact
from klora.kernels import causal_attention, lora_attention, lora_attention_ref, lora_qkv_rope, lora_qkv_rope_ref
from test_attention import kernel_of_pytorch
from test_attention import plain as formula
from test_lora_qkv_rope import CUDA, DEVICE, doubled, draw

SIZES = {"sizes": (64, 32, 32), "head_dim": 16}
pytestmark = pytest.mark.usefixtures("empty_is_nan")


def drawn(length=37, tail=None, dtype=torch.float32, **more):
    call, _ = draw(length=length, dtype=dtype, **{**SIZES, **more})
    tail = length if tail is None else tail
    dout = torch.randn(call["x"].size(0), tail, call["sizes"][0], generator=torch.Generator().manual_seed(3))
    return {**call, "tail": tail}, dout.to(DEVICE, dtype)


def run(call, dout, backend="triton", **more):
    """out and the gradients of x, lora_a and lora_b."""
    return differentiated(lambda **given: lora_attention(**given, backend=backend, **more), call, dout)


def in_turn(call, dout, attention):
    """The reference of the projections, then `attention`, in the call's dtype."""

    def both(tail, **given):
        q, k, v = (part.unflatten(-1, (-1, call["head_dim"])) for part in lora_qkv_rope_ref(**given))
        return attention(q, k, v, tail).flatten(2)

    return differentiated(both, call, dout)


def differentiated(function, call, dout):
    leaves = {name: call[name].detach().requires_grad_() for name in ("x", "lora_a", "lora_b")}
    out = function(**{**call, **leaves})
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)


@pytest.mark.slow
@pytest.mark.parametrize("length, tail", [(1, None), (37, None), (70, 16), (33, 32), (20, 0)])
@pytest.mark.parametrize("slots", [None, [1, -1]])
def test_outputs_and_gradients_are_as_exact_as_pytorchs(length, tail, slots):
    seeds = range(8 if length == 1 else 1)  # the errors of one token's sums scatter
    draws = [drawn(length, tail, slots=slots, count=2, seed=seed) for seed in seeds]
    results = (
        [run(*one) for one in draws],
        [run(doubled(call), dout.double(), "reference") for call, dout in draws],
        *([in_turn(*one, attention) for one in draws] for attention in (formula, kernel_of_pytorch)),
    )
    assert_as_exact(*([torch.stack(same) for same in zip(*some, strict=True)] for some in results))


@pytest.mark.slow
def test_gradients_go_into_a_pool_where_one_is_given():
    call, dout = drawn(slots=[2, 0], count=4)
    _, _, da, db = run(call, dout)
    grads = torch.full_like(call["lora_a"], 7.0), torch.full_like(call["lora_b"], 7.0)
    x = call["x"].detach().requires_grad_()
    out = lora_attention(**{**call, "x": x}, grads=grads, backend="triton")
    out.backward(dout)
    for into, gradient in zip(grads, (da, db), strict=True):
        assert torch.equal(into[[0, 2]], gradient[[0, 2]]) and (into[[1, 3]] == 7.0).all()


def test_what_it_does_not_take_is_refused():
    call, _ = drawn()
    with pytest.raises(ValueError, match=r"tail is 38; allowed: 0 to S, 37"):
        lora_attention(**{**call, "tail": 38})
    with pytest.raises(ValueError, match=r"sizes is \(64, 32, 16\); wanted as many heads of v as of k"):
        lora_attention(**drawn(sizes=(64, 32, 16))[0])
    with pytest.raises(ValueError, match="head_dim is 8; the kernel wants one of 16, 32, 64, 128"):
        lora_attention(**drawn(head_dim=8)[0], backend="triton")


@pytest.mark.slow
def test_opcheck():
    call, _ = drawn(length=17, slots=[1, 0], count=2)
    leaves = [call[name].detach().requires_grad_() for name in ("x", "weight", "lora_a", "lora_b")]
    leaves[1] = leaves[1].detach()
    rest = (call["cos"], call["sin"], call["gain"], call["slots"], list(call["sizes"]), 16, 8, None, None, True)
    torch.library.opcheck(torch.ops.klora.lora_attention.default, (*leaves, *rest))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
class TestOnTheGPU:
    SEED = {"batch": 6, "width": 512, "sizes": (512, 256, 256), "head_dim": 64}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("length, tail", [(1000, None), (1024, 256), (255, 200)])
    def test_outputs_and_gradients_are_no_worse_than_the_ops_in_turn(self, dtype, length, tail):
        """PyTorch's own 16-bit path rounds between all steps; so do our ops in turn, less often."""
        call, dout = drawn(length, tail, dtype, **self.SEED)
        exact = run(doubled(call), dout.double(), "reference")
        assert_as_exact(run(call, dout), exact, in_turn(call, dout, formula))

    def test_the_same_bits_in_every_run_and_every_batch(self):
        call, dout = drawn(1024, 256, torch.bfloat16, **self.SEED)
        first = run(call, dout)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(run(call, dout), first, strict=True))
        alone = {**call, "x": call["x"][2:3], "lora_a": call["lora_a"][2:3], "lora_b": call["lora_b"][2:3]}
        for got, whole in zip(run(alone, dout[2:3]), first, strict=True):
            assert torch.equal(got, whole[2:3])

    def test_it_is_captured_in_a_graph_and_compiled_whole(self):
        call, dout = drawn(256, 64, torch.bfloat16, **self.SEED)
        expected = run(call, dout)
        compiled = torch.compile(lambda x: lora_attention(**{**call, "x": x}), fullgraph=True)
        assert torch.equal(compiled(call["x"]), expected[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(call, dout)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(call, dout)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_the_reference_is_the_two_ops_in_turn():
    call, _ = drawn(tail=9)
    arguments = {name: value for name, value in call.items() if name != "tail"}
    q, k, v = (part.unflatten(-1, (-1, 16)) for part in lora_qkv_rope(**arguments, backend="reference"))
    expected = causal_attention(q, k, v, 9, backend="reference").flatten(2)
    assert torch.equal(lora_attention(**call, backend="reference"), expected)
    del arguments["slots"]
    assert torch.equal(lora_attention_ref(**arguments, tail=9), expected)
