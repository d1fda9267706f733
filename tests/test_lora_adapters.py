"""klora.lora's adapters: made, trained and reset each by itself, saved, loaded, and what is refused."""

import io
import json

import pytest
import torch
from klora.lora import LoraError, attach
from tiny_lora import ROWS, TOKENS, Tiny, flat, parts, two_adapters


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
            ({"alpha": 1e308}, r"alpha is 1e\+308; wanted: a number above 0 and below 1e\+30"),
            ({"alpha": "8"}, "alpha is '8'"),
            ({"targets": 3}, "targets names 3; wanted: text that is not empty, or a list of such names"),
            ({"targets": ["up", 3]}, "targets names 3"),
            ({"seed": "7"}, "seed is '7'; wanted: a whole number"),
            ({"seed": True}, "seed is True"),
            ({"seed": 2**63}, f"seed is {2**63}"),
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
                                       {"lr": float("nan")}, {"lr": "fast"}, {"eps": float("inf")}, {"betas": 0.9},
                                       {"betas": (0.9,)}])  # fmt: skip
    def test_settings_that_are_refused(self, wrong):
        with pytest.raises(LoraError, match=f"{next(iter(wrong))}=.*allowed"):
            two_adapters(Tiny()).optimizer(**wrong)

    @pytest.mark.parametrize("lr", [-1, float("nan"), float("inf"), "fast", None])
    def test_a_learning_rate_that_is_none_leaves_the_one_before(self, lr):
        optimizer = two_adapters(Tiny()).optimizer(lr=0.5)
        with pytest.raises(LoraError, match=f"lr is {lr!r}; wanted: a number of at least 0"):
            optimizer.set_lr("big", lr)
        assert optimizer.lr.tolist() == [0.5] * 3

    @pytest.mark.parametrize(("names", "says"), [(5, "names names 5"), ([0], "names names 0"), (["bob"], "'bob'")])
    def test_a_step_of_what_is_no_adapter_moves_nothing(self, names, says):
        lora = two_adapters(Tiny())
        optimizer, before = lora.optimizer(), lora.pool.params.clone()
        lora.pool.grads.fill_(1)
        with pytest.raises(LoraError, match=says):
            optimizer.step(names)
        assert torch.equal(lora.pool.params, before) and not optimizer.steps.any()


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
        with pytest.raises(LoraError, match=f"{tmp_path} cannot be written: disk full"):
            lora.adapters.save("small", tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_file_in_a_folders_place_is_refused_and_left(self, tmp_path):
        (tmp_path / "notes").write_text("kept")
        with pytest.raises(LoraError, match="notes cannot be written: .*File exists"):
            two_adapters(Tiny()).adapters.save("big", tmp_path / "notes")
        assert (tmp_path / "notes").read_text() == "kept"

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
            ({"lora_alpha": 1e308}, r"alpha 1e\+308 for blocks.*; wanted: a number below 1e\+30"),
            ({"lora_alpha": 10**400}, "beyond 64 bits"),
            ({"alpha_pattern": 3}, "alpha_pattern=3; wanted: an alpha for each name"),
            ({"alpha_pattern": {"(": 3}}, "'\\(', which is no regular expression"),
            ({"target_modules": [3]}, r"target_modules=\[3\]; wanted: names"),
            ({"target_modules": "(up|down"}, "'\\(up.down', which is no regular expression"),
            ({"extra": json.loads("[" * 200 + "]" * 200)}, "over 100 deep"),
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
