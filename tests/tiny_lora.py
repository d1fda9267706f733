"""Small models of linears, adapters on them, and what the tests of klora.lora compare."""

import itertools
from collections import OrderedDict

import torch
from klora.bench.tolerance import assert_as_exact, relative_error
from klora.lora import attach
from oracles.adapted import adapted_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.sin(self.up(x)))


class Tiny(nn.Module):
    """Tokens [B, S] -> logits [B, S, 40]; `checkpointed` recomputes its blocks."""

    def __init__(self, width: int = 16, hidden: int = 32, blocks: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, width), nn.Linear(width, 40, bias=False)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.checkpointed = {}

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, **self.checkpointed) if self.checkpointed else block(x)
        return self.head(x)


def one_linear(width: int = 16, outputs: int = 32) -> nn.Module:
    """Where an error is that of one product, which the rule of tolerance is about."""
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(embed=nn.Embedding(40, width), up=nn.Linear(width, outputs)))


TOKENS = torch.randint(40, (4, 7), generator=torch.Generator().manual_seed(1))
ROWS = ["big", "small", None, "big"]


def randomize(lora) -> None:
    """Numbers in every A and B: an adapter whose B is zero hides what it is multiplied by."""
    draw = torch.Generator("cpu").manual_seed(2)
    for name in lora.adapters:
        adapter = lora.adapters[name]
        for index, place in enumerate(lora.pool.places):
            if place.name in adapter.ranks:
                rank, device = adapter.ranks[place.name], lora.pool.device
                a, b = (
                    torch.randn(size, generator=draw, device="cpu")
                    for size in ((rank, place.inputs), (place.outputs, rank))
                )
                scale = adapter.alphas[place.name] / rank
                lora.pool.write(adapter.slot, index, a.to(device) / 4, b.to(device) / 4, scale)


def two_adapters(model, **options):
    """ "big" has both targets at rank 5 and 3, "small" one at rank 2; in slots 0 and 1 of 3."""
    lora = attach(model, slots=3, rank={"up": 5, "down": 3}, **options)
    lora.adapters.create("big", alpha=7)
    lora.adapters.create("small", rank={"down": 2}, alpha=3)
    randomize(lora)
    return lora


def adapters_on_one(model, rank: int = 5, **options):
    """Of `one_linear`: "big" has the pool's rank and "small" 2."""
    lora = attach(model, slots=3, targets=["up"], rank=rank, **options)
    lora.adapters.create("big", alpha=7)
    lora.adapters.create("small", rank=2, alpha=3)
    randomize(lora)
    return lora


def parts(lora, name, gradients: bool = False) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B (or their gradients) and the scale of an adapter by the names of its linears."""
    adapter, pool, found = lora.adapters[name], lora.pool, {}
    for index, place in enumerate(pool.places):
        if place.name in adapter.ranks:
            rank, leaves = adapter.ranks[place.name], pool.leaves[index]
            whole = pool.grads if gradients else pool.params
            a, b = (whole.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset()) for leaf in leaves)
            scale = adapter.alphas[place.name] / rank
            found[place.name] = a[adapter.slot, :rank].clone(), b[adapter.slot, :, :rank].clone(), scale
    return found


def flat(pairs) -> list[Tensor]:
    return [tensor for pair in pairs.values() for tensor in pair[:2]]


def assert_exact(model, lora, rows, tokens, run=None) -> None:
    """Logits and every adapter's gradients are the oracle's, or those of a model of one linear as exact as PyTorch's.

    A model in float64 leaves the rounding of scales and gradients to the pool's fp32.
    """
    named = list(dict.fromkeys(row for row in rows if row is not None))
    adapters = {name: parts(lora, name) for name in named}
    dtype = next(model.parameters()).dtype
    lora.pool.grads.zero_()
    with lora.rows(rows):
        out = (model if run is None else run)(tokens)
        logits = getattr(out, "logits", out)
        dout = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
        logits.backward(dout)
    ours = [logits.detach(), *itertools.chain(*(flat(parts(lora, name, gradients=True)) for name in named))]
    if dtype == torch.float64:
        out, leaves = adapted_rows(model, [adapters.get(row) for row in rows], tokens)
        exact = [out, *torch.autograd.grad(out, [t for pairs in leaves for t in flat(pairs)], dout)]
        for our, true in zip(ours, exact, strict=True):
            assert relative_error(our, true) < 1e-6
        return
    results = []
    for precision, merged in ((torch.float64, True), (dtype, True), (dtype, False)):
        out, leaves = adapted_rows(model, [adapters.get(row) for row in rows], tokens, precision, merged)
        grads = torch.autograd.grad(out, [t for pairs in leaves for t in flat(pairs)], dout.to(precision))
        results.append([out.detach(), *grads])
    exact, *plain = results
    kinds = [tensor.dtype for tensor in ours]  # those of the adapters' gradients are fp32 whatever the model's
    assert_as_exact(ours, exact, *([t.to(kind) for t, kind in zip(one, kinds, strict=True)] for one in plain))


def snapshot(model) -> tuple:
    """Everything that attach must leave or give back."""
    return (
        {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)},
        {name: set(vars(module)) for name, module in model.named_modules()},
        {name: id(module._forward_hooks) for name, module in model.named_modules()},
        [module.training for module in model.modules()],
    )


def assert_same_numbers(model, before: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
