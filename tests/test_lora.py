"""klora.lora on models of this file: against the oracle, row by row in float64, and everything that it refuses."""

import copy
import importlib
import io
import itertools
import json
import pickle
from collections import OrderedDict

import pytest
import torch
from klora import KloraError
from klora.bench.tolerance import assert_as_exact, relative_error
from klora.kernels import Int6Linear, drop_ref, row_keys
from klora.lora import LoraError, attach
from oracles.adapted import adapted_rows
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

CUDA = torch.cuda.is_available()
attaching = importlib.import_module("klora.lora.attach")  # the package has a function of that name


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


class TestOutputsAndGradients:
    @pytest.mark.parametrize("sizes", [{}, {"width": 12, "hidden": 20}, {"width": 7, "hidden": 1}])
    def test_unlike_adapters_in_one_batch_are_those_of_the_oracle(self, sizes):
        model = Tiny(**sizes).double()
        assert_exact(model, two_adapters(model), ROWS, TOKENS)

    @pytest.mark.parametrize(("backend", "dtype"), [(None, torch.float32), (None, torch.bfloat16),
                                                    ("triton", torch.float32), ("triton", torch.float16)])  # fmt: skip
    def test_they_are_as_exact_as_plain_pytorch(self, backend, dtype):
        model = one_linear().to(dtype)
        assert_exact(model, adapters_on_one(model, backend=backend), ROWS, TOKENS)

    def test_rows_without_adapters_have_the_base_models_bits_and_so_has_no_rows(self):
        model = Tiny()
        base = model(TOKENS)
        lora = two_adapters(model)
        assert torch.equal(model(TOKENS), base)
        with lora.rows(ROWS):
            logits = model(TOKENS)
        torch.testing.assert_close(logits[2], base[2], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(logits[[0, 1, 3]], base[[0, 1, 3]], atol=1e-2)

    def test_a_new_adapter_changes_nothing_yet(self):
        model = Tiny()
        base = model(TOKENS)
        lora = attach(model, slots=1, targets=["up"])
        lora.adapters.create("new")
        with lora.rows(["new"] * 4):
            torch.testing.assert_close(model(TOKENS), base, rtol=1e-6, atol=1e-6)

    def test_gradients_add_up_over_batches(self):
        model = Tiny()
        lora = two_adapters(model)
        for rows, tokens in ((ROWS, TOKENS), (ROWS[:1], TOKENS[:1])):
            with lora.rows(rows):
                model(tokens).sum().backward()
        both = lora.pool.grads.clone()
        lora.pool.grads.zero_()
        with lora.rows([*ROWS, "big"]):
            model(torch.cat([TOKENS, TOKENS[:1]])).sum().backward()
        torch.testing.assert_close(both, lora.pool.grads, rtol=1e-4, atol=1e-5)

    def test_gradients_of_the_base_with_freeze_off(self):
        model = Tiny()
        lora = two_adapters(model, freeze=False)
        with lora.rows(ROWS):
            model(TOKENS).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_four_dimensional_inputs(self):
        model = nn.Sequential(nn.Linear(16, 16))
        lora = attach(model, slots=1, targets=["0"])
        lora.adapters.create("one")
        randomize(lora)
        x = torch.randn(2, 3, 5, 16)
        with lora.rows(["one", None]):
            torch.testing.assert_close(model(x), model(x.flatten(1, 2)).unflatten(1, (3, 5)))

    @pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
    def test_empty_batches(self, shape):
        model = nn.Sequential(nn.Linear(16, 16))
        lora = attach(model, slots=1, targets=["0"], dropout=0.5)
        lora.adapters.create("one")
        with lora.rows(["one"] * shape[0]):
            out = model(torch.zeros(shape))
        out.sum().backward()
        assert out.shape == shape and not lora.pool.grads.any()

    @pytest.mark.gpu
    @pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("outputs", [512, 120])
    @pytest.mark.parametrize("rank", [3, 64])
    def test_on_a_gpu(self, dtype, rank, outputs):
        model = one_linear(256, outputs).to("cuda", dtype)
        assert_exact(model, adapters_on_one(model, rank), ROWS, TOKENS.cuda())


class TestRows:
    def test_names_slots_none_and_tensors_are_one(self):
        model = Tiny()
        lora = two_adapters(model)
        outputs = []
        for rows in (ROWS, [0, 1, -1, 0], torch.tensor([0, 1, -1, 0]), torch.tensor([0, 1, -1, 0], dtype=torch.int32)):
            with lora.rows(rows):
                outputs.append(model(TOKENS))
        assert all(torch.equal(output, outputs[0]) for output in outputs)

    def test_they_nest_and_end_with_an_error_too(self):
        model = Tiny()
        lora, base = two_adapters(model), model(TOKENS)
        with pytest.raises(ZeroDivisionError), lora.rows(ROWS):
            outer = model(TOKENS)
            with lora.rows([None] * 4):
                torch.testing.assert_close(model(TOKENS), base, rtol=1e-6, atol=1e-6)
            assert torch.equal(model(TOKENS), outer)
            raise ZeroDivisionError
        assert torch.equal(model(TOKENS), base)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (["bob"], "no adapter is called 'bob'; there are: big, small"),
            ([2], r"slot 2 holds no adapter; allowed: -1 for none, and \[0, 1\]"),
            ([64], "slot 64 holds no adapter"),
            ([-2], "slot -2 holds no adapter"),
            ([True], "slot True holds no adapter"),
            ([1.0], "slot 1.0 holds no adapter"),
            (torch.tensor([5]), "slot 5 holds no adapter"),
            (torch.tensor([0.0]), "float32"),
            (torch.tensor([[0]]), r"\[1, 1\]; wanted: int32 or int64 \[B\]"),
            ("big", "rows is 'big'; wanted: a list"),
        ],
    )
    def test_what_names_no_adapter(self, rows, message):
        lora = two_adapters(Tiny())
        with pytest.raises(LoraError, match=message), lora.rows(rows):
            pytest.fail("inside")
        assert lora.current is None

    def test_a_batch_of_another_size_is_refused(self):
        model = Tiny()
        lora = two_adapters(model)
        with pytest.raises(LoraError, match=r"blocks.0.up got a batch of 4 and rows\(\) named 2"), lora.rows([0, 1]):
            model(TOKENS)

    def test_flattened_tokens_are_refused_with_the_way_out(self):
        model = Tiny()
        lora = two_adapters(model)
        message = r"blocks.0.up got \[4, 16\]: with its tokens flattened .* call the model with \[batch, tokens\]"
        with pytest.raises(LoraError, match=message), lora.rows(ROWS):
            model(TOKENS[:, 0])


class TestOptimizer:
    def test_it_is_adamw_for_each_adapter_by_itself(self):
        """Two adapters of one batch take the steps that torch's AdamW takes with each alone, at its own rate."""
        model = Tiny()
        lora = two_adapters(model)
        optimizer = lora.optimizer(lr=0.02, weight_decay=0.1)
        optimizer.set_lr("small", 0.005)
        plain = {name: parts(lora, name) for name in lora.adapters}
        theirs = {}
        for name, lr in (("big", 0.02), ("small", 0.005)):
            leaves = [t.double().requires_grad_() for t in flat(plain[name])]
            theirs[name] = leaves, torch.optim.AdamW(leaves, lr=lr, weight_decay=0.1, eps=1e-8)
        for _ in range(4):
            optimizer.zero_grad()
            with lora.rows(ROWS):
                model(TOKENS).logsumexp(-1).sum().backward()
            for name, (leaves, adam) in theirs.items():
                for leaf, gradient in zip(leaves, flat(parts(lora, name, gradients=True)), strict=True):
                    leaf.grad = gradient.double()
                adam.step()
            optimizer.step()
        for name, (leaves, _) in theirs.items():
            for ours, leaf in zip(flat(parts(lora, name)), leaves, strict=True):
                torch.testing.assert_close(ours.double(), leaf.detach(), rtol=1e-5, atol=1e-6)
        assert optimizer.steps.tolist() == [4, 4, 0]

    def test_what_pads_a_smaller_rank_stays_zero(self):
        model = Tiny()
        lora = two_adapters(model)
        optimizer = lora.optimizer(lr=0.1, weight_decay=0.1)
        used = lora.pool.params != 0
        for _ in range(3):
            with lora.rows(ROWS):
                model(TOKENS).square().sum().backward()
            optimizer.step()
        assert torch.equal(lora.pool.params != 0, used) and used[0].sum() > used[1].sum() > 0 == used[2].sum()

    def test_only_adapters_with_a_gradient_step_unless_they_are_named(self):
        model = Tiny()
        lora = two_adapters(model)
        optimizer = lora.optimizer()
        with lora.rows(["big"] * 4):
            model(TOKENS).sum().backward()
        before = lora.pool.params.clone()
        optimizer.step()
        assert optimizer.steps.tolist() == [1, 0, 0]
        optimizer.step("small")
        assert optimizer.steps.tolist() == [1, 1, 0]
        assert torch.equal(lora.pool.params[1], before[1]) and not torch.equal(lora.pool.params[0], before[0])
        with pytest.raises(LoraError, match="no adapter is called 'bob'"):
            optimizer.step(["small", "bob"])
        assert optimizer.steps.tolist() == [1, 1, 0]

    def test_a_nan_stays_in_its_adapter(self):
        model = Tiny()
        lora = two_adapters(model)
        optimizer = lora.optimizer()
        with lora.rows(ROWS):
            loss = model(TOKENS).square().sum((1, 2))
            (loss * torch.tensor([1.0, torch.nan, 1.0, 1.0])).sum().backward()
        optimizer.step()
        assert lora.pool.params[0].isfinite().all() and lora.pool.params[1].isnan().any()

    def test_a_saved_state_goes_on_with_the_same_bits(self):
        def train(lora, optimizer, steps):
            for _ in range(steps):
                with lora.rows(ROWS):
                    lora.model(TOKENS).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()

        lora = two_adapters(Tiny())
        optimizer = lora.optimizer(lr=0.1)
        train(lora, optimizer, 2)
        file = io.BytesIO()
        torch.save((optimizer.state_dict(), lora.pool.params), file)
        file.seek(0)
        again = two_adapters(Tiny())
        other = again.optimizer()
        state, params = torch.load(file)
        other.load_state_dict(state)
        again.pool.params.copy_(params)
        train(lora, optimizer, 2)
        train(again, other, 2)
        assert torch.equal(lora.pool.params, again.pool.params)
        with pytest.raises(LoraError, match="this pool's is"):
            attach(Tiny(), slots=2, targets=["up"]).optimizer().load_state_dict(state)

    @pytest.mark.parametrize("how", ["reset", "delete", "load"])
    def test_a_slot_starts_anew(self, how, tmp_path):
        lora = two_adapters(Tiny())
        optimizer = lora.optimizer(lr=0.1)
        lora.adapters.save("big", tmp_path)
        with lora.rows(ROWS):
            lora.model(TOKENS).square().sum().backward()
        optimizer.set_lr("big", 0.5)
        optimizer.step()
        if how == "reset":
            lora.adapters.reset("big")
        else:
            lora.adapters.delete("big")
            assert not lora.pool.params[0].any()
            slot = lora.adapters.create("big") if how == "delete" else lora.adapters.load("big", tmp_path)
            assert slot == 0
        fresh = optimizer.steps, optimizer.exp_avg, optimizer.exp_avg_sq, lora.pool.grads
        assert not any(tensor[0].any() for tensor in fresh) and optimizer.lr[0] == torch.tensor(0.1)
        assert all(tensor[1].any() for tensor in fresh)

    @pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": 0.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -1.0},
                                       {"lr": float("nan")}])  # fmt: skip
    def test_settings_that_are_refused(self, wrong):
        with pytest.raises(LoraError, match=f"{next(iter(wrong))}=.*allowed"):
            two_adapters(Tiny()).optimizer(**wrong)


class TestAdapters:
    def test_create_reset_and_delete(self):
        lora = attach(Tiny(), slots=2, rank={"up": 4, "down": 8}, alpha=16)
        adapters = lora.adapters
        assert [adapters.create("a"), adapters.create("b", rank=2, alpha=1, targets="up")] == [0, 1]
        assert list(adapters) == ["a", "b"] and "a" in adapters and "c" not in adapters and len(adapters) == 2
        assert adapters["a"].ranks == {f"blocks.{i}.{n}": r for i in (0, 1) for n, r in (("up", 4), ("down", 8))}
        assert adapters["b"].ranks == {"blocks.0.up": 2, "blocks.1.up": 2}
        assert lora.pool.scale.tolist() == [[4, 2, 4, 2], [0.5, 0, 0.5, 0]]
        a, b, _ = parts(lora, "a")["blocks.0.down"]
        bound = 32**-0.5
        assert not b.any() and a.abs().max() <= bound and a.abs().mean() == pytest.approx(bound / 2, rel=0.2)
        first = lora.pool.params.clone()
        lora.pool.params.add_(1)
        adapters.reset("a")
        assert torch.equal(lora.pool.params[0], first[0])
        adapters.delete("a")
        assert adapters.create("c") == 0 and list(adapters) == ["b", "c"]

    def test_a_seed_draws_the_same_adapter_in_any_slot(self):
        lora = attach(Tiny(), slots=3, targets=["up"])
        for name, seed in (("a", 5), ("b", None), ("c", 5)):
            lora.adapters.create(name, seed=seed)
        first, other, same = lora.pool.params
        assert torch.equal(first, same) and not torch.equal(first, other)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "big"}, "already called 'big'"),
            ({"name": ""}, "name is ''"),
            ({"name": 3}, "name is 3"),
            ({"rank": 0}, "rank 0 of 'up'; wanted: a whole number of at least 1"),
            ({"rank": -1}, "rank -1"),
            ({"rank": True}, "rank True"),
            ({"rank": 2.5}, "rank 2.5"),
            ({"rank": 4}, "rank 4 of 'down' is above the pool's, 3; attach with rank=4 or more"),
            ({"rank": {"head": 2}}, "targets names 'head'; allowed: up, down"),
            ({"rank": {"up": 2}, "targets": ["up", "down"]}, "gives none for 'down'"),
            ({"rank": {"up": 2, "down": 2}, "targets": ["up"]}, "rank names 'down'; allowed: up"),
            ({"targets": ["head"]}, "targets names 'head'; allowed: up, down"),
            ({"targets": []}, "targets is empty"),
            ({"alpha": 0}, "alpha is 0; wanted: a number above 0"),
            ({"alpha": float("nan")}, "alpha is nan"),
            ({"alpha": "8"}, "alpha is '8'"),
        ],
    )
    def test_an_adapter_that_cannot_be_leaves_the_pool_as_it_was(self, arguments, message):
        lora = two_adapters(Tiny())
        before, names = lora.pool.params.clone(), list(lora.adapters)
        with pytest.raises(LoraError, match=message):
            lora.adapters.create(**{"name": "new"} | arguments)
        assert torch.equal(lora.pool.params, before) and list(lora.adapters) == names

    def test_a_full_pool_and_unknown_names(self):
        lora = attach(Tiny(), slots=1, targets=["up"])
        lora.adapters.create("a")
        with pytest.raises(LoraError, match=r"all 1 slots are taken; delete\(\) an adapter"):
            lora.adapters.create("b")
        for method in (lora.adapters.delete, lora.adapters.reset, lora.merge):
            with pytest.raises(LoraError, match="no adapter is called 'b'; there are: a"):
                method("b")


def drop(x, rate, *key):
    return drop_ref(x, rate, row_keys(*key))


class TestDropout:
    def test_a_mask_depends_on_its_row_alone(self):
        x = torch.ones(3, 6, 8)
        step, nth = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
        slots = torch.tensor([4, 7, 4])
        whole = drop(x, 0.5, 9, 0, slots, step, nth)
        alone = drop(x[1:2, :3], 0.5, 9, 0, slots[1:2], step[1:2], nth[1:2])
        assert torch.equal(whole[1:2, :3], alone)
        others = [drop(x, 0.5, *key) for key in ((8, 0, slots, step, nth), (9, 1, slots, step, nth),
                  (9, 0, slots + 1, step, nth), (9, 0, slots, step + 1, nth))]  # fmt: skip
        for masks in itertools.combinations([*whole, *others[0], *others[1], *others[2], *others[3]], 2):
            assert not torch.equal(*masks)

    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
    def test_the_rate_and_the_mean(self, rate):
        x = torch.ones(20, 100, 50)
        key = torch.arange(20)
        kept = drop(x, rate, key) != 0
        share = kept.double().mean(-1)
        assert kept.double().mean().item() == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / x.numel()) ** 0.5)
        assert share.var().item() == pytest.approx(rate * (1 - rate) / 50, rel=0.2), "elements are independent"
        assert drop(x, rate, key).mean().item() == pytest.approx(1, rel=0.05)
        pairs = (kept[:10] == kept[10:]).double().mean().item()
        assert pairs == pytest.approx(rate**2 + (1 - rate) ** 2, abs=0.01), "rows are independent"

    def test_every_element_is_dropped_at_the_rate(self):
        kept = drop(torch.ones(4000, 4, 5), 0.3, 0, torch.arange(4000)) != 0
        shares = kept.double().mean(0).flatten()
        assert (shares - 0.7).abs().max() < 4 * (0.3 * 0.7 / 4000) ** 0.5

    def test_it_is_of_the_adapters_input_alone_and_in_training_alone(self):
        model = Tiny()
        lora, base = two_adapters(model, dropout=0.5), model(TOKENS)
        with lora.rows([None] * 4):
            torch.testing.assert_close(model(TOKENS), base, rtol=1e-6, atol=1e-6)
        with lora.rows(ROWS, step=1):
            dropped = model(TOKENS)
            model.eval()
            whole = model(TOKENS)
            lora.dropout = 0.0
            assert torch.equal(model(TOKENS), whole)
        assert not torch.allclose(dropped[0], whole[0], atol=1e-3)

    def test_equal_rows_and_equal_linears_draw_masks_of_their_own(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.one = nn.Linear(16, 16)
                self.other = copy.deepcopy(self.one)

            def forward(self, x):
                return self.one(x), self.other(x)

        model, x = Pair(), torch.randn(1, 5, 16).expand(2, -1, -1)
        lora = attach(model, slots=1, targets=["one", "other"], dropout=0.5)
        lora.adapters.create("a")
        for index in (0, 1):
            lora.pool.write(0, index, torch.ones(8, 16), torch.ones(16, 8), 1.0)
        with lora.rows(["a", "a"]):
            one, other = model(x)
        assert not torch.allclose(one, other) and not torch.allclose(one[0], one[1])
        model.eval()
        with lora.rows(["a", "a"]):
            one, other = model(x)
        assert torch.equal(one, other)

    def test_the_same_step_draws_the_same_and_the_next_another(self):
        model = Tiny()
        lora = two_adapters(model, dropout=0.3)

        def logits(rows, tokens, **options):
            with lora.rows(rows, **options):
                return model(tokens)

        first, second = logits(ROWS, TOKENS), logits(ROWS, TOKENS)
        assert not torch.allclose(first[0], second[0], atol=1e-4)
        assert torch.equal(logits(ROWS, TOKENS, step=0), first) and torch.equal(logits(ROWS, TOKENS, step=1), second)
        beside = logits(["small", "big"], TOKENS[[1, 0]], step=0)
        torch.testing.assert_close(beside, first[[1, 0]], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            used = lora.pool.uses.clone()
            logits(ROWS, TOKENS)
        assert torch.equal(lora.pool.uses, used) and used[2] == 0

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_recomputed_block_draws_the_same(self, use_reentrant):
        grads = []
        for checkpointed in ({}, {"use_reentrant": use_reentrant}):
            model = Tiny()
            model.checkpointed = checkpointed
            lora = two_adapters(model, dropout=0.5)
            model.embed.weight.requires_grad_()  # the reentrant kind gives gradients only through inputs that want them
            with lora.rows(ROWS):
                model(TOKENS).square().sum().backward()
            grads.append(lora.pool.grads)
        assert torch.equal(*grads) and grads[0].any()


class Attention(nn.Module):
    """k and v of `memory`, or of x as q; x may be tokens."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, width)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, 24),
            nn.Linear(width, 8, bias=False),
            nn.Linear(width, 8),
        )

    def forward(self, x, memory=None):
        x = x if x.is_floating_point() else self.embed(x)
        memory = x if memory is None else memory
        return torch.cat([self.q_proj(x), self.k_proj(memory), self.v_proj(memory)], -1)


class TestSharedInputs:
    @pytest.fixture
    def calls(self, monkeypatch):
        """The names of the linears that each call of the op computes."""
        found, compute = [], attaching.adapted

        def counted(sites, x):
            found.append([site.place.name for site in sites])
            return compute(sites, x)

        monkeypatch.setattr(attaching, "adapted", counted)
        return found

    @staticmethod
    def attached(model, **options):
        lora = attach(model, slots=3, rank={"q_proj": 5, "k_proj": 3, "v_proj": 5}, **options)
        lora.adapters.create("big", alpha=7)
        lora.adapters.create("small", rank={"q_proj": 2, "v_proj": 4}, alpha=3)
        randomize(lora)
        return lora

    X = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(4))

    def test_q_k_and_v_are_one_call_and_the_oracles(self, calls):
        model = Attention().double()
        lora = self.attached(model)
        assert_exact(model, lora, ROWS, self.X.double())
        assert_exact(model, lora, ROWS[::-1], self.X.double())
        assert calls == [["q_proj", "k_proj", "v_proj"]] * 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_the_kernels_are_as_exact_as_plain_pytorch(self, calls, dtype):
        model = Attention().to(dtype)
        assert_exact(model, self.attached(model, backend="triton"), ROWS, TOKENS)
        assert len(calls) == 1

    def test_another_input_is_computed_by_itself_and_from_the_next_rows_on_all_are(self, calls):
        model = Attention()
        lora, memory = self.attached(model), self.X.flip(1).contiguous()
        for _ in range(2):
            with lora.rows(ROWS):
                out = model(self.X, memory)
            with lora.rows(ROWS):
                parts = [
                    getattr(model, f"{n}_proj")(x.clone()) for n, x in (("q", self.X), ("k", memory), ("v", memory))
                ]
            torch.testing.assert_close(out, torch.cat(parts, -1), rtol=1e-5, atol=1e-5)
        assert calls[0] == ["q_proj", "k_proj", "v_proj"] and calls[1:3] == [["k_proj"], ["v_proj"]]
        assert calls[-3:] == [["q_proj"], ["k_proj"], ["v_proj"]]

    def test_an_input_that_was_changed_in_place_is_another(self):
        model = Attention()
        lora = self.attached(model)
        x = self.X.clone()
        with lora.rows(ROWS), torch.no_grad():
            model.q_proj(x)
            k = model.k_proj(x.add_(1))
        with lora.rows(ROWS), torch.no_grad():
            torch.testing.assert_close(k, model.k_proj(x.clone()))

    def test_outputs_that_nobody_asked_for_are_let_go(self):
        model = Attention()
        lora = self.attached(model)
        with lora.rows(ROWS):
            model.q_proj(self.X)
            shared = lora.sites[0].shared
            assert len(shared.outputs) == 2
            copy.deepcopy(lora)
        assert shared is lora.sites[2].shared and not shared.outputs and shared.input is None

    def test_a_recomputed_attention_draws_and_computes_the_same(self):
        grads = []
        for recompute in (False, True):
            model = Attention()
            lora, x = self.attached(model, dropout=0.3), self.X.clone().requires_grad_()
            with lora.rows(ROWS):
                out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
                out.square().sum().backward()
            grads.append((lora.pool.grads, x.grad))
        for one, other in zip(*grads, strict=True):
            assert torch.equal(one, other) and one.any()

    def test_other_names_and_sizes_are_not_shared(self):
        model = nn.ModuleDict({"q_proj": nn.Linear(16, 8), "k_proj": nn.Linear(8, 8), "out": nn.Linear(16, 8)})
        lora = attach(model, slots=1, targets=["q_proj", "k_proj", "out"])
        assert not any(site.shared for site in lora.sites)


class TestRanks:
    def test_each_adapter_has_its_own_rank_in_the_pool(self):
        lora = two_adapters(Tiny())
        assert lora.pool.ranks.tolist() == [[5, 3, 5, 3], [0, 2, 0, 2], [0, 0, 0, 0]]
        lora.adapters.reset("small")
        lora.adapters.delete("big")
        assert lora.pool.ranks.tolist() == [[0, 0, 0, 0], [0, 2, 0, 2], [0, 0, 0, 0]]
        assert all(table[:, i].is_contiguous() for table in (lora.pool.ranks, lora.pool.scale) for i in range(4))

    @pytest.mark.parametrize("options", [{"dropout": 0.5}, {"base": "int6"}, {"rank": 200}])
    def test_the_op_takes_what_pytorchs_products_once_did(self, options):
        """The kernel's outputs and gradients are those of its reference, which draws the same masks."""
        found = []
        for backend in ("triton", "reference"):
            model = one_linear(64, 40)
            lora = adapters_on_one(model, backend=backend, **options)
            with lora.rows(ROWS, step=3):
                out = model(TOKENS)
            out.square().sum().backward()
            found.append((out.detach(), lora.pool.grads))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert ours.any()


class TestWithTheRestOfPyTorch:
    def test_checkpointing_outside_of_rows_is_refused_by_name(self):
        model = Tiny()
        lora = two_adapters(model)
        model.checkpointed = {"use_reentrant": False}
        with lora.rows(ROWS):
            loss = model(TOKENS).sum()
        with pytest.raises(LoraError, match=r"blocks.1.up is computed again by gradient checkpointing.*backward\(\)"):
            loss.backward()

    def test_checkpointing_within_other_rows_is_refused_by_name(self):
        model = Tiny()
        lora = two_adapters(model)
        model.checkpointed = {"use_reentrant": False}
        with lora.rows(ROWS):
            loss = model(TOKENS).sum()
        with pytest.raises(LoraError, match="outside of the `with lora.rows"), lora.rows(ROWS[::-1]):
            loss.backward()

    def test_checkpointing_of_the_base_model_works(self):
        model = Tiny()
        attach(model, slots=1, targets=["up"], freeze=False)
        model.checkpointed = {"use_reentrant": False}
        model(TOKENS).sum().backward()
        assert model.blocks[0].up.weight.grad is not None

    @pytest.mark.parametrize("options", [{}, {"dropout": 1e-9}, {"base": "int6"}])
    def test_autocast_casts_as_it_does_for_a_linear(self, options):
        model = nn.Sequential(nn.Linear(64, 32))
        weight, bias = model[0].weight.detach(), model[0].bias.detach()
        lora = attach(model, slots=1, targets=["0"], rank=4, alpha=2, **options)
        lora.adapters.create("one")
        randomize(lora)
        x = torch.randn(2, 5, 64)
        with torch.autocast("cpu", torch.bfloat16), lora.rows(["one", None]):
            out = model(x)
        assert out.dtype == torch.bfloat16
        a, b, scale = parts(lora, "one")["0"]
        if options.get("base") == "int6":
            weight = lora.sites[0].module.dequantize()
        exact = [nn.functional.linear(row.double(), weight.double(), bias.double()) for row in x]
        exact[0] += scale * x[0].double() @ a.double().mT @ b.double().mT
        with torch.autocast("cpu", torch.bfloat16):
            plain = [nn.functional.linear(row, weight, bias) for row in x]
            plain[0] = plain[0] + scale * (x[0] @ a.mT @ b.mT)
        assert_as_exact([out], [torch.stack(exact)], [torch.stack(plain)], margin=1.5)

    @pytest.mark.slow
    def test_compiled_whole(self):
        model = Tiny().double()
        lora = two_adapters(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_exact(model, lora, ROWS, TOKENS, run=compiled)
        with lora.rows(["small"] * 4):
            ours = compiled(TOKENS)
            torch.testing.assert_close(ours, model(TOKENS))
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
        with lora.rows(ROWS):
            assert not torch.allclose(compiled(TOKENS), ours, atol=1e-3)

    @pytest.mark.slow
    def test_other_rows_do_not_compile_again(self):
        model = Tiny()
        lora, compiles = two_adapters(model), []

        def backend(graph, _):
            compiles.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for rows in (ROWS, ROWS[::-1], torch.tensor([1, 1, 0, -1]), [None] * 4):
            with lora.rows(rows):
                assert torch.equal(compiled(TOKENS), model(TOKENS))
        assert len(compiles) == 1

    def test_another_default_device_and_dtype(self):
        model = Tiny()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                lora = two_adapters(model)
                optimizer = lora.optimizer(lr=0.1)
                with lora.rows(ROWS):
                    model(TOKENS).square().sum().backward()
                optimizer.step()
                optimizer.step(["big"])
        finally:
            torch.set_default_dtype(torch.float32)
        assert lora.pool.params.dtype == torch.float32 and optimizer.steps.tolist() == [2, 1, 0]

    def test_a_model_that_was_moved_is_refused(self):
        model = Tiny()
        lora = two_adapters(model)
        message = "blocks.0.up got meta and the adapters are on cpu; move the model, then attach"
        with pytest.raises(LoraError, match=message), lora.rows(ROWS):
            model.to("meta")(TOKENS.to("meta"))

    def test_a_linear_takes_its_input_by_name(self):
        model = one_linear()
        lora, x = adapters_on_one(model), torch.randn(2, 3, 16)
        with lora.rows(["big", "small"]):
            assert torch.equal(model.up(input=x), model.up(x))

    def test_hooks_are_called_around_the_adapted_linear(self):
        model = Tiny()
        lora, seen = two_adapters(model), []
        model.blocks[0].up.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with lora.rows(ROWS):
            model(TOKENS)
        base = nn.functional.linear(model.embed(TOKENS), model.blocks[0].up.weight, model.blocks[0].up.bias)
        assert len(seen) == 1 and not torch.allclose(seen[0], base, atol=1e-2)

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    def test_a_copy_is_a_copy(self, how):
        model = Tiny()
        lora = two_adapters(model)
        optimizer = lora.optimizer(lr=0.1)
        before = lora.pool.params.clone()
        other, its, adam = how((model, lora, optimizer))
        with its.rows(ROWS), lora.rows(ROWS):
            assert torch.equal(other(TOKENS), model(TOKENS))
            other(TOKENS).square().sum().backward()
        adam.step()
        assert torch.equal(lora.pool.params, before) and not lora.pool.grads.any()
        assert not torch.equal(its.pool.params, before) and adam.steps.tolist() == [1, 1, 0]
        its.adapters.reset("big")
        assert adam.steps.tolist() == [0, 1, 0]
        its.detach()
        assert "forward" in vars(model.blocks[0].up) and "forward" not in vars(other.blocks[0].up)
        assert not any(p.requires_grad for p in model.parameters()) and all(p.requires_grad for p in other.parameters())

    def test_state_dicts_and_parameters_are_the_models_own(self):
        model = Tiny()
        state, names = model.state_dict(), [name for name, _ in model.named_parameters()]
        two_adapters(model)
        assert [name for name, _ in model.named_parameters()] == names
        assert_same_numbers(model, state)

    def test_attached_in_inference_mode_it_trains(self):
        model = Tiny().double()
        with torch.inference_mode():
            lora = attach(model, slots=1, targets=["up"])
            lora.adapters.create("one")
            with lora.rows(["one"] * 4):
                model(TOKENS)
        randomize(lora)
        assert_exact(model, lora, ["one"] * 4, TOKENS)


class TestDetachAndMerge:
    @pytest.mark.parametrize("options", [{}, {"freeze": False}, {"dropout": 0.1}])
    def test_detach_gives_the_model_back_bit_for_bit(self, options):
        model = Tiny()
        model.head.requires_grad_(False)
        model.blocks[0].eval()
        model.blocks[1].up.register_forward_hook(lambda *_: None)
        before, numbers, logits = snapshot(model), copy.deepcopy(model.state_dict()), model(TOKENS)
        lora = two_adapters(model, **options)
        optimizer = lora.optimizer()
        with lora.rows(ROWS):
            model(TOKENS).sum().backward()
            optimizer.step()
            assert lora.detach() is model
            assert torch.equal(model(TOKENS), logits)
        assert snapshot(model) == before
        assert_same_numbers(model, numbers)
        lora.detach()
        with pytest.raises(LoraError, match="detached; attach again"), lora.rows(ROWS):
            pytest.fail("inside")
        two_adapters(model).detach()
        assert snapshot(model) == before

    @pytest.mark.parametrize("name", ["big", "small"])
    def test_merge_leaves_the_adapter_in_the_weights(self, name):
        model = Tiny()
        before = snapshot(model)
        lora = two_adapters(model)
        with lora.rows([name] * 4):
            wanted = model(TOKENS)
        assert lora.merge(name) is model
        torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-5, atol=1e-5)
        assert snapshot(model) == before

    def test_an_adapter_that_is_not_finite_is_not_merged(self):
        model = Tiny()
        lora = two_adapters(model)
        numbers = copy.deepcopy(model.state_dict())
        lora.pool.leaves[3][1].data[0, 0, 0] = torch.inf
        with pytest.raises(LoraError, match="'big' at blocks.1.down makes weights that are not finite; nothing was"):
            lora.merge("big")
        assert_same_numbers(model, numbers)
        assert len(lora.sites) == 4


class TestInt6:
    SIZES = {"width": 64, "hidden": 128}

    def test_it_is_the_oracle_over_the_weights_that_six_bits_hold(self):
        model, dense = one_linear(64, 128), one_linear(64, 128)
        lora = adapters_on_one(model, base="int6")
        assert type(model.up) is Int6Linear
        dense.up.weight.data = model.up.dequantize()
        assert_exact(dense, lora, ROWS, TOKENS, run=model)

    def test_detach_gives_the_dense_model_back(self):
        model = Tiny(**self.SIZES)
        before, numbers = snapshot(model), copy.deepcopy(model.state_dict())
        lora = two_adapters(model, base="int6")
        with pytest.raises(LoraError, match="cannot be copied"):
            copy.deepcopy(model)
        lora.detach()
        assert snapshot(model) == before
        assert_same_numbers(model, numbers)

    @pytest.mark.gpu
    @pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
    def test_on_a_gpu_the_dense_weights_wait_on_the_host(self):
        model = one_linear(256, 512).to("cuda", torch.bfloat16)
        linear, weight = model.up, model.up.weight.detach().clone()
        used = torch.cuda.memory_allocated()
        lora = attach(model, slots=1, rank={"up": 1}, base="int6")
        pool = sum(t.nbytes for t in (lora.pool.params, lora.pool.grads))
        assert torch.cuda.memory_allocated() - pool < used - weight.nbytes // 2
        assert linear.weight.device.type == "cpu"
        lora.detach()
        assert model.up is linear and torch.equal(linear.weight, weight)

    def test_merge_keeps_what_was_trained(self):
        model = Tiny(**self.SIZES)
        lora = two_adapters(model, base="int6")
        with lora.rows(["big"] * 4):
            wanted = model(TOKENS)
        merged = lora.merge("big")
        assert type(merged.blocks[0].up) is nn.Linear
        torch.testing.assert_close(merged(TOKENS), wanted, rtol=1e-4, atol=1e-4)

    def test_a_linear_that_stays_dense_is_named_and_the_model_left(self):
        model = Tiny()
        before, numbers = snapshot(model), copy.deepcopy(model.state_dict())
        with pytest.raises(LoraError, match="blocks.0.up stays dense: too small.*base='dense'"):
            attach(model, rank={"up": 2}, base="int6")
        assert snapshot(model) == before
        assert_same_numbers(model, numbers)


def tied(model):
    model.head.weight = model.embed.weight


def same_memory(model):
    model.head.weight = nn.Parameter(model.embed.weight.detach())


def used_twice(model):
    model.blocks[1].up = model.blocks[0].up


def shared_block(model):
    model.blocks[1] = model.blocks[0]


def on_meta(model):
    model.to("meta")


def made_for_inference(model):
    with torch.inference_mode():
        model.blocks[0].up.weight = nn.Parameter(torch.zeros(32, 16), requires_grad=False)


def with_own_forward(model):
    model.blocks[0].up.forward = lambda x: x


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.blocks[0].up)


def pruned(model):
    prune.l1_unstructured(model.blocks[0].up, "weight", 0.5)


def with_attention(model):
    model.attention = nn.MultiheadAttention(16, 2)


def with_encoder(model):
    model.encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)


def half_on_meta(model):
    model.blocks[1].up.to("meta")


def untouched(model):
    pass


BAD = [
    (untouched, {"targets": ["q_proj"]}, "no module of this model is called 'q_proj'; its linears are: down, head, up"),
    (untouched, {"targets": ["up", "own"]}, "called 'own'"),
    (untouched, {"targets": []}, "targets is empty"),
    (untouched, {"targets": "embed"}, "embed is a Embedding; adapters go on nn.Linear and Conv1D"),
    (untouched, {"targets": ["blocks.0"]}, "blocks.0 is a Block"),
    (untouched, {"targets": ["up"], "rank": 0}, "rank 0 of 'up'; wanted: a whole number of at least 1"),
    (untouched, {"targets": ["up", "down"], "rank": {"up": 3}}, "gives none for 'down'"),
    (untouched, {"targets": ["up"], "rank": {"up": 3, "down": 2}}, "rank names 'down'; allowed: up"),
    (untouched, {"targets": ["up"], "slots": 0}, "slots is 0"),
    (untouched, {"targets": ["up"], "slots": True}, "slots is True"),
    (untouched, {"targets": ["up"], "alpha": -1}, "alpha is -1"),
    (untouched, {"targets": ["up"], "dropout": 1.0}, "dropout is 1.0; allowed: from 0 to below 1"),
    (untouched, {"targets": ["up"], "base": "int4"}, "base is 'int4'; allowed: dense, bf16, int6"),
    (untouched, {"targets": ["up"], "base": "bf16"}, "blocks.0.up is torch.float32 and base='bf16'"),
    (tied, {"targets": ["head"]}, "the weight of head is tied to embed.weight; leave 'head' out of targets"),
    (same_memory, {"targets": ["head"]}, "the weight of head is tied to embed.weight"),
    (used_twice, {"targets": ["up"]}, "blocks.0.up and blocks.1.up are one module, used twice"),
    (shared_block, {"targets": ["up"]}, "blocks.0.up and blocks.1.up are one module, used twice"),
    (on_meta, {"targets": ["up"]}, "blocks.0.up is on 'meta', without numbers; load its weights first"),
    (half_on_meta, {"targets": ["up"]}, "blocks.1.up is on 'meta'"),
    (made_for_inference, {"targets": ["up"]}, "blocks.0.up was made in inference_mode"),
    (with_own_forward, {"targets": ["up"]}, "blocks.0.up has a forward of its own"),
    (two_adapters, {"targets": ["down"]}, r"blocks.0.down has a forward of its own: adapters .* \(detach\(\) them\)"),
    (parametrized, {"targets": ["up"]}, "blocks.0.up is a ParametrizedLinear"),
    (pruned, {"targets": ["up"]}, "blocks.0.up holds other than a floating-point weight and a bias"),
    (with_attention, {"targets": ["out_proj"]}, "attention.out_proj is a NonDynamicallyQuantizableLinear"),
    (with_encoder, {"targets": ["linear1"]}, "encoder.linear1 is read by TransformerEncoderLayer without its forward"),
]


@pytest.mark.parametrize(("change", "arguments", "message"), BAD, ids=[f"{c.__name__}-{m[:24]}" for c, _, m in BAD])
def test_a_model_that_cannot_be_is_named_and_left_as_it_was(change, arguments, message):
    model = Tiny()
    change(model)
    before = snapshot(model)
    with pytest.raises(LoraError, match=message) as error:
        attach(model, **arguments)
    assert isinstance(error.value, KloraError | ValueError)
    assert snapshot(model) == before


class TestFiles:
    def test_a_saved_adapter_comes_back_to_the_bit(self, tmp_path):
        lora = two_adapters(Tiny())
        for name in ROWS[:2]:
            lora.adapters.save(name, tmp_path / name)
        model = Tiny()
        other = attach(model, slots=4, targets=["up", "down"], rank=8)
        assert [other.adapters.load(name, tmp_path / name) for name in ("small", "big")] == [0, 1]
        for name in ("big", "small"):
            ours, theirs = parts(lora, name), parts(other, name)
            assert ours.keys() == theirs.keys()
            for place in ours:
                assert all(torch.equal(a, b) for a, b in zip(ours[place][:2], theirs[place][:2], strict=True))
                assert ours[place][2] == pytest.approx(theirs[place][2])
        assert sorted(path.name for path in (tmp_path / "big").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]

    def test_targets_keep_their_short_names(self, tmp_path):
        lora = two_adapters(Tiny())
        lora.adapters.save("big", tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["target_modules"] == ["down", "up"] and config["lora_alpha"] == 7
        assert {config["r"], *config["rank_pattern"].values()} == {5, 3}

    def test_a_failed_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        lora = two_adapters(Tiny())
        lora.adapters.save("big", tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            lora.adapters.save("small", tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.fixture
    def folder(self, tmp_path):
        two_adapters(Tiny()).adapters.save("big", tmp_path)
        return tmp_path

    @staticmethod
    def edit(folder, tensors=None, **fields):
        """Change fields of the config, and the tensors."""
        from safetensors.torch import load_file, save_file

        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        if tensors:
            save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type 'IA3'; wanted: LORA"),
            ({"use_dora": True}, "use_dora=True; klora reads plain LoRA"),
            ({"bias": "all"}, "bias='all'"),
            ({"modules_to_save": ["head"]}, "modules_to_save"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
            ({"lora_alpha": None}, "alpha None for blocks"),
            ({"lora_alpha": 0}, "alpha 0 for blocks"),
            ({"target_modules": ["up", "down", "head"]}, None),
        ],
    )
    def test_a_config_that_is_another_function(self, folder, fields, message):
        self.edit(folder, **fields)
        lora = attach(Tiny(), slots=1, targets=["up", "down"])
        if message is None:
            assert lora.adapters.load("a", folder) == 0
            return
        with pytest.raises(LoraError, match=message):
            lora.adapters.load("a", folder)
        assert not len(lora.adapters) and not lora.pool.params.any()

    @staticmethod
    def renamed(old, new):
        return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            (renamed("blocks.0.up", "layers.9.up"), "has an adapter of layers.9.up, .*another model"),
            (
                renamed("blocks.1.up.lora_A", "blocks.1.up.magnitude"),
                "blocks.1.up.magnitude.weight, which is no A or B",
            ),
            (
                lambda t: {n: x for n, x in t.items() if "1.up" not in n},
                "nothing for blocks.1.up, which its target_mod",
            ),
            (lambda t: {n: x for n, x in t.items() if "1.up.lora_A" not in n}, "lora_B of blocks.1.up alone"),
            (
                lambda t: {n: x[:, :-1].contiguous() for n, x in t.items()},
                r"A \[., \d+\] and B .* this model's is \[r, ",
            ),
            (lambda t: {n: x * torch.inf for n, x in t.items()}, "not all finite"),
        ],
    )
    def test_a_file_of_another_model(self, folder, tensors, message):
        self.edit(folder, tensors)
        lora = attach(Tiny(), slots=1, targets=["up", "down"])
        with pytest.raises(LoraError, match=message):
            lora.adapters.load("a", folder)
        assert not len(lora.adapters) and not lora.pool.params.any()

    def test_a_rank_above_the_pools_and_targets_that_are_not_attached(self, folder):
        with pytest.raises(LoraError, match="rank 5; attach with rank=5 or more, not 4"):
            attach(Tiny(), targets=["up", "down"], rank=4).adapters.load("a", folder)
        with pytest.raises(LoraError, match="blocks.0.down, .*attach with more targets than up"):
            attach(Tiny(), targets=["up"]).adapters.load("a", folder)

    def test_files_that_are_not_there_or_broken(self, folder, tmp_path):
        lora = attach(Tiny(), slots=1, targets=["up", "down"])
        with pytest.raises(LoraError, match="adapter_config.json: no such file; wanted: a folder as PEFT"):
            lora.adapters.load("a", tmp_path / "nowhere")
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(LoraError, match=r"adapter_model.safetensors cannot be read"):
            lora.adapters.load("a", folder)
        weights.rename(folder / "adapter_model.bin")
        with pytest.raises(LoraError, match="no such file; adapter_model.bin is a pickle, save it as safetensors"):
            lora.adapters.load("a", folder)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(LoraError, match="adapter_config.json cannot be read"):
            lora.adapters.load("a", folder)
