"""klora.lora's forward and backward: against the oracle, row by row in float64; rows, dropout and shared inputs."""

import copy
import importlib
import itertools

import pytest
import torch
from conftest import DTYPES
from klora.kernels import drop_ref, row_keys
from klora.lora import LoraError, attach
from tiny_lora import ROWS, TOKENS, Tiny, adapters_on_one, assert_exact, one_linear, randomize, two_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint

CUDA = torch.cuda.is_available()
attaching = importlib.import_module("klora.lora.attach")  # the package has a function of that name


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

    def test_bf16_is_dense_over_a_model_that_is_in_bf16(self):
        outputs = []
        for base in ("dense", "bf16"):
            model = one_linear().to(torch.bfloat16)
            lora = adapters_on_one(model, base=base)
            with lora.rows(ROWS):
                outputs.append(model(TOKENS))
        assert torch.equal(*outputs) and outputs[0].dtype == torch.bfloat16

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
            (0, "rows is 0; wanted: a list"),
            (None, "rows is None; wanted: a list"),
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

    @pytest.mark.parametrize("step", ["1", 1.5, True, 2**63])
    @pytest.mark.parametrize("rate", [0.0, 0.3])
    def test_a_step_that_is_no_whole_number_is_refused(self, step, rate):
        lora = two_adapters(Tiny(), dropout=rate)
        with pytest.raises(LoraError, match=f"step is {step!r}; wanted: a whole number"), lora.rows(ROWS, step):
            pytest.fail("inside")
        assert lora.current is None and not lora.pool.uses.any()

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

    @pytest.mark.parametrize("dtype", DTYPES)
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

    @pytest.mark.parametrize("slots", [1, 3, 4, 10])
    def test_every_linears_scales_and_ranks_lie_at_an_address_of_16_bytes(self, slots):
        """As the leaves do: at another one a kernel is compiled once more, and its launches are not remembered."""
        pool = attach(Tiny(), slots=slots, targets=["up", "down", "head"], rank=3).pool
        for each in (pool, copy.deepcopy(pool)):
            assert each.ranks.shape == each.scale.shape == (slots, len(each.places))
            for place, leaves in enumerate(each.leaves):
                columns = [each.ranks[:, place], each.scale[:, place]]
                assert all(column.is_contiguous() for column in columns)
                assert not any(tensor.data_ptr() % 16 for tensor in (*columns, *leaves))
