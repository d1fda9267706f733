"""The gradients of a pool: those of its leaves, all of them once a backward is done, in few launches."""

import copy
import gc
import weakref

import pytest
import torch
from klora.kernels import columns
from klora.lora import attach, gradients
from tiny_lora import ROWS, TOKENS, Tiny, two_adapters
from torch import nn


def deep(layers, device="cpu", slots=2):
    """A stack of linears, each with adapters, of which B is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).to(device)
    lora = attach(model, slots=slots, targets=[str(number) for number in range(layers)], rank=4)
    for slot in range(slots):
        lora.adapters.create(str(slot), alpha=4)
    with torch.no_grad():
        lora.pool.params.normal_(std=0.2)
    return model, lora


def by_autograd(model, lora, x, rows):
    """What autograd says that the pool's gradient is."""
    leaves = [leaf for pair in lora.pool.leaves for leaf in pair]
    with lora.rows(rows):
        found = torch.autograd.grad(model(x).square().sum(), leaves, allow_unused=True, materialize_grads=True)
    total = torch.zeros_like(lora.pool.grads)
    for leaf, gradient in zip(leaves, found, strict=True):
        total.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset()).copy_(gradient)
    return total


@pytest.mark.parametrize("layers", [1, columns.PARTS // 2, columns.PARTS // 2 + 1])
def test_a_backward_adds_every_gradient_in_few_launches(layers, monkeypatch):
    model, lora = deep(layers)
    x, launches = torch.randn(2, 3, 16), []
    wanted = by_autograd(model, lora, x, ["0", "1"])

    def counted(*given):
        launches.append(given)
        columns.add_columns_(*given)

    monkeypatch.setattr(gradients, "add_columns_", counted)
    with lora.rows(["0", "1"]):
        model(x).square().sum().backward()
    assert len(launches) == -(-2 * layers // columns.PARTS)
    assert torch.equal(lora.pool.grads, wanted) and wanted.any(1).all()
    assert all(leaf.grad is None for pair in lora.pool.leaves for leaf in pair)


def test_a_linear_that_is_used_twice_and_one_that_is_not():
    model, lora = deep(3)
    x = torch.randn(2, 3, 16)
    with lora.rows(["0", "1"]):
        model[0](model[2](model[0](x))).square().sum().backward()
    of = [lora.pool.grads.as_strided(a.shape, a.stride(), a.storage_offset()).any() for a, _ in lora.pool.leaves]
    assert of == [True, False, True]
    twice = nn.Sequential(model[0], model[2], model[0])
    assert torch.equal(lora.pool.grads, by_autograd(twice, lora, x, ["0", "1"]))


class Failing(torch.autograd.Function):
    """Passes on what it is given, and no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        raise RuntimeError("no gradient")


def test_a_backward_that_fails_does_not_keep_the_next_from_its_gradients():
    model, lora = deep(3)
    x = torch.randn(2, 3, 16)
    wanted = by_autograd(model, lora, x, ["0", "1"])
    with lora.rows(["0", "1"]):
        failing = model[2](model[1](Failing.apply(model[0](x.requires_grad_()))))
        with pytest.raises(RuntimeError, match="no gradient"):
            failing.square().sum().backward()
        lora.optimizer().zero_grad()
        model(x).square().sum().backward()
    assert torch.equal(lora.pool.grads, wanted)


def test_gradients_that_are_dropped_come_with_no_later_backward():
    model = Tiny()
    lora = two_adapters(model)
    with lora.rows(ROWS):
        model(TOKENS).sum().backward()
    lora.optimizer().zero_grad()
    model.embed.weight.requires_grad_()
    model(TOKENS).sum().backward()
    assert not lora.pool.grads.any()


def fails(model, lora, x, first):
    """A backward that stops in front of the linears before `first`."""
    with lora.rows(["0", "1"]), pytest.raises(RuntimeError, match="no gradient"):
        model[first:](Failing.apply(model[:first](x.requires_grad_()))).square().sum().backward()


def test_gradients_of_a_backward_that_failed_are_those_that_it_has_made():
    model, lora = deep(5)
    x, places = torch.randn(2, 3, 16), lora.pool.leaves
    wanted = by_autograd(model, lora, x, ["0", "1"])
    wanted[:, : places[2][0].storage_offset()] = 0
    fails(model, lora, x, first=2)
    assert torch.equal(copy.deepcopy(lora).pool.grads, wanted) and torch.equal(lora.pool.grads, wanted)
    assert all(leaf.grad is None for pair in places for leaf in pair)


def test_a_new_adapter_has_no_gradient_of_a_backward_that_failed():
    model, lora = deep(3)
    x = torch.randn(2, 3, 16)
    fails(model, lora, x, first=1)
    lora.adapters.delete("1")
    lora.adapters.create("new")
    with lora.rows(["0", None]):
        model(x).square().sum().backward()
    assert lora.pool.grads[0].any() and not lora.pool.grads[1].any()


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_pool_ends_with_its_last_name(has_failed):
    model, lora = deep(2)
    x = torch.randn(2, 3, 16)
    if has_failed:
        fails(model, lora, x, first=1)
    else:
        with lora.rows(["0", "1"]):
            model(x).sum().backward()
    ends = [weakref.ref(one) for one in (lora.pool, lora.pool.gradients.total, *lora.pool.leaves[1])]
    lora.detach()
    del lora, model
    gc.collect()
    assert [end() for end in ends] == [None] * len(ends)


def test_a_backward_inside_another_adds_its_gradients_to_the_same_leaves():
    model, lora = deep(4)
    x = torch.randn(2, 3, 16)
    wanted = by_autograd(model, lora, x, ["0", "1"])
    with lora.rows(["0", "1"]):
        inner, middle = model(x).square().sum(), model[:2](x)
        middle.register_hook(lambda _: inner.backward())
        model[2:](middle).square().sum().backward()
    assert torch.equal(lora.pool.grads, 2 * wanted)


@pytest.mark.slow
def test_a_backward_that_is_compiled():
    model, lora = deep(3)
    x = torch.randn(2, 3, 16)
    wanted = by_autograd(model, lora, x, ["0", "1"])

    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler), lora.rows(["0", "1"]):
        for times in (1, 2):
            model(x).square().sum().backward()
            torch.testing.assert_close(lora.pool.grads, times * wanted)


@pytest.mark.slow
def test_a_step_that_is_compiled_with_its_backward():
    model, lora = deep(3)
    x = torch.randn(2, 3, 16)
    wanted = by_autograd(model, lora, x, ["0", "1"])

    @torch.compile(backend="eager")
    def step():
        model(x).square().sum().backward()

    with lora.rows(["0", "1"]):
        for times in (1, 2):
            step()
            torch.testing.assert_close(lora.pool.grads, times * wanted)


@pytest.mark.gpu
def test_gradients_made_on_two_streams_are_those_of_one():
    model, lora = deep(24, "cuda")
    x, side = torch.randn(2, 3, 16, device="cuda"), torch.cuda.Stream()
    with lora.rows(["0", "1"]):
        model(x).square().sum().backward()
    wanted = lora.pool.grads.clone()
    for _ in range(3):
        lora.optimizer().zero_grad()
        with lora.rows(["0", "1"]):
            y = model[:12](x)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = model[12:](y).square().sum()
            torch.cuda.current_stream().wait_stream(side)
            loss.backward()
        assert torch.equal(lora.pool.grads, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("is_entered_before", [False, True])
def test_a_captured_backward_adds_its_gradients_at_every_replay(is_entered_before):
    model, lora = deep(12, "cuda")
    x, slots = torch.randn(2, 3, 16, device="cuda"), torch.arange(2, device="cuda")
    with lora.rows(slots):
        model(x).square().sum().backward()
    once = lora.pool.grads.clone()
    lora.pool.grads.zero_()
    graph = torch.cuda.CUDAGraph()

    def backward():
        model(x).square().sum().backward()

    if is_entered_before:
        with lora.rows(slots), torch.cuda.graph(graph):
            backward()
    else:
        with torch.cuda.graph(graph), lora.rows(slots):
            backward()
    for times in (1, 2):
        graph.replay()
        torch.testing.assert_close(lora.pool.grads, times * once)


@pytest.mark.gpu
def test_memory_of_a_gradient_is_not_given_away_before_it_is_added():
    """The other stream goes on as soon as the backward returns, while the gradients that it made still wait."""
    model, lora = deep(2, "cuda")
    x, side = torch.randn(2, 3, 16, device="cuda"), torch.cuda.Stream()
    wanted = by_autograd(model, lora, x, ["0", "1"])
    with lora.rows(["0", "1"]):
        y = model[:1](x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = model[1:](y).square().sum()
        torch.cuda.current_stream().wait_stream(side)
        y.register_hook(lambda _: torch.cuda._sleep(500_000_000))
        loss.backward()
    with torch.cuda.stream(side):
        taken = [torch.full_like(leaf, 1e9) for leaf in lora.pool.leaves[1] for _ in range(8)]
    torch.cuda.synchronize()
    assert taken and torch.equal(lora.pool.grads, wanted)
