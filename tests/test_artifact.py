"""The artifact: choosing clips for a budget, the file's layout and its round trip."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import struct
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.cli import export
from klora.kernels.int6 import Int6Weight, dequantize_int6_ref, quantize_int6_ref, relative_error
from klora.model import artifact
from klora.model.artifact import ArtifactError, load_artifact, save_artifact
from klora.model.config import ModelConfig
from klora.model.gpt import GPT, is_block_matrix, parameter_shapes
from klora.model.loading import model_from_artifact
from klora.model.quantize import CLIPS, ClipCurve, choose_clips, clip_curve, compress, quantize_rows, quantize_to_fit

CONFIG = ModelConfig(
    vocab_size=260,
    width=32,
    blocks=2,
    heads=2,
    kv_heads=1,
    mlp_hidden=48,
    train_length=64,
    bigram_rows=64,
    bigram_width=8,
)
WIDE = ModelConfig(
    vocab_size=260, width=128, blocks=2, heads=2, kv_heads=1, mlp_hidden=384, bigram_rows=64, bigram_width=8
)
TOKENIZER = bytes(range(256)) * 3
PROVENANCE = {"steps": 7, "seconds": 1.5, "data": ["train.bin"], "note": "ü"}


def random_state(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in parameter_shapes(config).items()}


def save(path, config=CONFIG, seed=0, **options):
    return save_artifact(path, random_state(config, seed), config, TOKENIZER, PROVENANCE, **options)


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    """Summary of an artifact of WIDE whose budget does not bind."""
    return save(tmp_path_factory.mktemp("loose") / "model.klora", WIDE)


def split(data):
    """Header and frame of an artifact, read independently of the loader."""
    length = struct.unpack("<I", data[4:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def payload_of(data):
    return zstandard.ZstdDecompressor().decompress(split(data)[1])


class TestClipCurve:
    @pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "uneven rows", "sparse", "outliers"])
    def test_agrees_with_the_quantizer(self, kind):
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(96, 128, generator=generator) * 0.02
        if kind == "heavy tails":
            weight = weight * torch.randn(96, 128, generator=generator).exp()
        elif kind == "uneven rows":
            weight = weight * torch.linspace(0.01, 3, 96)[:, None]
        elif kind == "sparse":
            weight[::2] = 0
            weight[:, 5:] *= 0.01
        elif kind == "outliers":
            weight[::9, 7] = 0.4
        curve = clip_curve(weight)
        live = int(weight.any(dim=1).sum()) * 128
        for index in (0, 10, 20, 30, 45, 63):
            codes, scale = quantize_rows(weight, CLIPS[index])
            error = (weight.double() - dequantize_int6_ref(codes, scale, torch.float64)).square().sum()
            counts = np.bincount(codes[weight.any(dim=1)].numpy().flatten().astype(int) + 31, minlength=63)
            share = counts[counts > 0] / live
            assert curve.bits[index] == pytest.approx(-live * (share * np.log2(share)).sum(), rel=0.01)
            assert curve.error[index] == pytest.approx(
                float(live * error / weight.double().square().sum()), rel=0.01, abs=1e-6 * live
            )

    def test_a_sample_of_rows_stands_for_all(self):
        weight = torch.randn(1024, 512, generator=torch.Generator().manual_seed(2))
        sampled, quarter = clip_curve(weight), clip_curve(weight[:128])
        for index in (10, 20, 40):
            assert sampled.bits[index] == pytest.approx(8 * quarter.bits[index], rel=0.01)
            assert sampled.error[index] == pytest.approx(8 * quarter.error[index], rel=0.05)

    def test_a_zero_matrix_costs_nothing(self):
        curve = clip_curve(torch.zeros(4, 8))
        assert set(curve.bits) == set(curve.error) == {0.0}


class TestQuantizeRows:
    """What one clip for a matrix cuts off: weights that a trained model has few of, and needs."""

    def matrix(self, outliers=3, size=12.0):
        weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(4))
        weight[:outliers, 100] = size
        return weight

    @pytest.mark.parametrize("size", [7.0, 12.0, -40.0])
    def test_the_largest_weight_of_a_row_stays(self, size):
        weight = self.matrix(size=size)
        kept, cut = (dequantize_int6_ref(*q(weight, 0.149))[:3, 100] for q in (quantize_rows, quantize_int6_ref))
        assert (kept / size).min() > 0.85
        assert (cut / size).max() < (0.85 if size == 7.0 else 0.5)

    def test_other_rows_have_the_scale_of_the_clip(self):
        weight = self.matrix()
        codes, scale = quantize_rows(weight, 0.149)
        wanted_codes, wanted_scale = quantize_int6_ref(weight, 0.149)
        assert torch.equal(codes[3:], wanted_codes[3:]) and torch.equal(scale[3:], wanted_scale[3:])
        assert (scale[:3] > wanted_scale[:3]).all()

    @pytest.mark.parametrize("clip", CLIPS[::6])
    def test_no_row_has_more_error_than_by_its_clip_alone(self, clip):
        """But for what the search of a row's scale leaves, a tenth."""
        weight = self.matrix() * torch.randn(96, 1, generator=torch.Generator().manual_seed(6)).exp()
        ours, alone = (
            (dequantize_int6_ref(*q(weight, clip)) - weight).square().sum(dim=1)
            for q in (quantize_rows, quantize_int6_ref)
        )
        assert (ours <= alone * 1.1).all() and (ours[0] < alone[0]) == (clip < 0.3)

    def test_a_scale_too_small_for_fp16_keeps_its_bits(self):
        weight = self.matrix() * 1e-7
        codes, scale = quantize_rows(weight, 0.149)
        assert scale.dtype == torch.float32
        assert relative_error(weight, codes, scale) < 0.01


class TestChooseClips:
    def curves(self, count=2, seed=3):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(16, 64), (48, 32), (24, 24)][:count]
        return {
            f"m{i}": clip_curve(torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp())
            for i, shape in enumerate(shapes)
        }

    def cost(self, curves, clips):
        at = {name: CLIPS.index(clip) for name, clip in clips.items()}
        return (
            sum(curve.bits[at[name]] for name, curve in curves.items()) / 8,
            sum(curve.error[at[name]] for name, curve in curves.items()),
        )

    @pytest.mark.slow
    @given(st.integers(0, 20), st.floats(0.0, 1.0))
    @settings(deadline=None, max_examples=30)
    def test_no_other_choice_of_as_many_bits_has_less_error(self, seed, share):
        curves = self.curves(seed=seed)
        least, most = (self.cost(curves, choose_clips(curves, budget)[0])[0] for budget in (0.0, 1e9))
        budget = least + share * (most - least) + 1e-6
        clips, spent = choose_clips(curves, budget)
        bits, error = self.cost(curves, clips)
        assert spent == pytest.approx(bits) and bits <= budget
        for pair in itertools.product(CLIPS, repeat=2):
            other_bits, other_error = self.cost(curves, dict(zip(curves, pair, strict=True)))
            assert other_bits > bits + 1e-6 or other_error >= error - 1e-9

    @given(st.lists(st.floats(0.0, 4000.0), min_size=2, max_size=8))
    @settings(deadline=None, max_examples=50)
    def test_more_bytes_never_give_more_error(self, budgets):
        curves = self.curves(3)
        errors = [self.cost(curves, choose_clips(curves, budget)[0])[1] for budget in sorted(budgets)]
        assert errors == sorted(errors, reverse=True)

    def test_the_budget_is_used(self):
        curves = self.curves(3)
        least, most = (choose_clips(curves, budget)[1] for budget in (0.0, 1e9))
        middle = (least + most) / 2
        assert 0.95 * middle < choose_clips(curves, middle)[1] <= middle

    def test_a_large_budget_gives_every_matrix_its_best_clip(self):
        curves = self.curves(3)
        clips, _ = choose_clips(curves, 1e9)
        for name, curve in curves.items():
            assert curve.error[CLIPS.index(clips[name])] == min(curve.error)

    def test_where_nothing_fits_the_choice_is_the_smallest(self):
        curves = self.curves(3)
        _, spent = choose_clips(curves, 1.0)
        assert spent == pytest.approx(sum(min(curve.bits) for curve in curves.values()) / 8)

    def test_bits_go_where_they_remove_most_error(self):
        """Two matrices alike but for their number of weights get the same clip: the exchange rate is one."""
        curve = clip_curve(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        tripled = ClipCurve(tuple(3 * bits for bits in curve.bits), tuple(3 * error for error in curve.error))
        for budget in (2000.0, 5000.0, 8000.0):
            clips, _ = choose_clips({"a": curve, "b": tripled}, budget)
            assert abs(CLIPS.index(clips["a"]) - CLIPS.index(clips["b"])) <= 1


class TestCompress:
    @pytest.mark.parametrize("clip", [0.12, 0.16, 0.3, 0.45])
    def test_codes_come_near_their_entropy(self, clip):
        """Also behind a table of halves, whose statistics mislead zstd's search for matches."""
        generator = torch.Generator().manual_seed(4)
        codes, _ = quantize_int6_ref(torch.randn(1536, 512, generator=generator), clip)
        table = torch.randn(1024, 256, generator=generator).half()
        counts = np.bincount(codes.numpy().flatten().astype(int) + 31)
        share = counts[counts > 0] / codes.numel()
        entropy = -codes.numel() * (share * np.log2(share)).sum() / 8
        alone = len(compress(table.numpy().tobytes()))
        for search in (False, True):
            assert len(compress(table.numpy().tobytes() + codes.numpy().tobytes(), search)) - alone < 1.02 * entropy

    def test_repetition_is_found(self):
        data = random.Random(0).randbytes(70_000) * 4
        assert len(compress(data)) < 0.3 * len(data)


class TestBudget:
    @pytest.mark.slow
    def test_files_fit_and_errors_fall_as_budgets_grow(self, tmp_path, loose):
        errors = []
        for share in (0.6, 0.7, 0.8, 0.9):
            path = tmp_path / "model.klora"
            budget = int(share * loose.bytes)
            summary = save(path, WIDE, budget=budget)
            assert summary.bytes == path.stat().st_size <= budget == summary.budget
            assert summary.bytes >= 0.98 * budget, "the budget is there to be used"
            errors.append(summary.relative_error)
        assert errors == sorted(errors, reverse=True) and errors[-1] > loose.relative_error

    @pytest.mark.slow
    def test_an_unreachable_budget_names_the_smallest_that_works(self, tmp_path):
        path = tmp_path / "model.klora"
        with pytest.raises(
            ArtifactError, match=r"takes ([\d,]+) bytes and the budget is 20,000; give a budget"
        ) as caught:
            save(path, WIDE, budget=20_000)
        assert not path.exists()
        smallest = int(str(caught.value).split("takes ")[1].split(" bytes")[0].replace(",", ""))
        assert save(path, WIDE, budget=smallest + 8).bytes <= smallest + 8, "the digits of the budget are in the header"
        with pytest.raises(ArtifactError, match="the smallest artifact"):
            save(path, WIDE, budget=smallest - 500)

    def test_the_embedding_counts(self, tmp_path, loose):
        """The same matrices beside a larger embedding get fewer bits."""
        larger = WIDE.override({"vocab_size": 600})
        state = random_state(WIDE)
        state["embed"] = torch.randn(600, 128, generator=torch.Generator().manual_seed(5))
        budget = int(1.05 * loose.bytes)
        small = save(tmp_path / "small.klora", WIDE, budget=budget)
        large = save_artifact(tmp_path / "large.klora", state, larger, TOKENIZER, PROVENANCE, budget=budget)
        assert large.bytes <= budget
        assert large.relative_error > 2 * small.relative_error
        assert all(large.clips[name] > small.clips[name] for name in small.clips)

    @pytest.mark.slow
    def test_the_tokenizer_and_the_provenance_count(self, tmp_path, loose):
        budget = loose.bytes
        noise = random.Random(0).randbytes(budget // 5)
        state = random_state(WIDE)
        tokenizer = save_artifact(tmp_path / "a", state, WIDE, noise, {}, budget=budget)
        provenance = save_artifact(tmp_path / "b", state, WIDE, b"", {"note": noise.hex()}, budget=budget)
        for summary in (tokenizer, provenance):
            assert summary.bytes <= budget and summary.relative_error > 1.5 * loose.relative_error

    @pytest.mark.parametrize(
        "budget",
        [
            pytest.param(1_050_000, marks=pytest.mark.slow),
            pytest.param(1_150_000, marks=pytest.mark.slow),
            1_300_000,
            16_000_000,
        ],
    )
    def test_one_slow_compression_is_enough(self, tmp_path, monkeypatch, budget):
        """It takes up to half a minute on a real model: sizes are predicted, not tried."""
        config = WIDE.override({"width": 256, "mlp_hidden": 768, "vocab_size": 1024})
        slow = []
        monkeypatch.setattr(artifact, "compress", lambda data, search: slow.append(search) or compress(data, search))
        tokenizer = random.Random(0).randbytes(30_000)
        summary = save_artifact(tmp_path / "a", random_state(config), config, tokenizer, {}, budget=budget)
        assert 0.995 * min(budget, 1_330_000) < summary.bytes <= budget
        assert slow.count(True) == 1

    def test_the_last_try_is_the_coarsest(self):
        """Even where sizes answer to nothing but the coarsest clips."""
        matrices = {"a": torch.randn(32, 64, generator=torch.Generator().manual_seed(0))}
        coarsest, _ = choose_clips({"a": clip_curve(matrices["a"])}, 0.0)
        sizes = []

        def encode(quantized, search):
            sizes.append(900 if quantized.clips == coarsest else 1001)
            return [bytes(sizes[-1])]

        quantized, parts = quantize_to_fit(matrices, 1000, encode)
        assert quantized.clips == coarsest and len(parts[0]) == 900
        assert sizes[-1] == 900 and len(sizes) > 2

    def test_the_summary_is_the_file(self, tmp_path, loose):
        path = tmp_path / "model.klora"
        summary = save(path, WIDE)
        state, loaded = random_state(WIDE), load_artifact(path)
        assert list(summary.clips) == list(summary.errors) == [name for name in state if is_block_matrix(name)]
        total = weights = 0.0
        for name, error in summary.errors.items():
            difference = (state[name].double() - loaded.tensors[name].dequantize(torch.float64)).square().sum()
            assert error == pytest.approx(float(difference / state[name].double().square().sum()), rel=1e-6)
            total, weights = total + error * state[name].numel(), weights + state[name].numel()
        assert summary.relative_error == pytest.approx(total / weights)
        stored = loaded.header["quantization"]
        assert stored["budget"] == 16_000_000 and stored["relative_error"] == summary.relative_error
        assert {name: entry["clip"] for name, entry in stored["matrices"].items()} == summary.clips


class TestRoundTrip:
    @pytest.mark.parametrize(
        "config",
        [CONFIG, CONFIG.override({"blocks": 1}), CONFIG.override({"blocks": 3, "width": 36, "mlp_hidden": 50})],
    )
    def test_every_tensor_comes_back_as_stored(self, tmp_path, config):
        state = random_state(config)
        summary = save_artifact(tmp_path / "a", state, config, TOKENIZER, PROVENANCE)
        artifact = load_artifact(tmp_path / "a")
        assert artifact.config == config
        assert artifact.tokenizer_bytes == TOKENIZER
        assert artifact.provenance == PROVENANCE
        loaded = artifact.state_dict()
        assert list(loaded) == list(state)
        for name, tensor in state.items():
            if is_block_matrix(name):
                assert isinstance(artifact.tensors[name], Int6Weight)
                expected = dequantize_int6_ref(*quantize_rows(tensor, summary.clips[name]))
            elif name in ("embed", "bigram.table", "bigram.project"):
                expected = tensor.half().float()
            else:
                expected = tensor
            assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], expected)
        GPT(config).load_state_dict(loaded)
        assert {tensor.dtype for tensor in artifact.state_dict(torch.bfloat16).values()} == {torch.bfloat16}

    def test_the_same_state_gives_the_same_bytes(self, tmp_path):
        save(tmp_path / "once")
        save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "once").read_bytes()

    def test_a_fresh_model_with_its_zero_matrices(self, tmp_path):
        torch.manual_seed(0)
        state = GPT(CONFIG).state_dict()
        save_artifact(tmp_path / "a", state, CONFIG, TOKENIZER, {}, budget=100_000)
        assert not load_artifact(tmp_path / "a").tensors["blocks.0.o"].dequantize().any()

    def test_a_model_of_zeros(self, tmp_path):
        state = {name: torch.zeros(shape) for name, shape in parameter_shapes(CONFIG).items()}
        assert save_artifact(tmp_path / "a", state, CONFIG, TOKENIZER, {}).relative_error == 0.0
        assert not any(tensor.any() for tensor in load_artifact(tmp_path / "a").state_dict().values())

    def test_plain_zstd_tools_read_the_payload(self, tmp_path):
        path = tmp_path / "model.klora"
        save(path)
        data = path.read_bytes()
        payload = payload_of(data)
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
            assert reader.read() == payload
        if shutil.which("zstd"):
            assert subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout == payload
        assert safetensors.torch.load(payload)["blocks.0.q.codes"].shape == (32, 32)
        assert zstandard.get_frame_parameters(split(data)[1]).has_checksum

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_state_may_be_views_of_one_buffer(self, tmp_path, dtype):
        state = random_state(CONFIG)
        shared = torch.cat([tensor.flatten() for tensor in state.values()] * 2).to(dtype)
        parts = shared.split([tensor.numel() for tensor in state.values()] * 2)
        views = {name: part.view(tensor.shape) for (name, tensor), part in zip(state.items(), parts, strict=False)}
        views["blocks.0.mlp_scale"] = views["blocks.0.attn_scale"]
        save_artifact(tmp_path / "a", views, CONFIG, TOKENIZER, {})
        loaded = load_artifact(tmp_path / "a").tensors
        assert torch.equal(loaded["blocks.0.mlp_scale"], views["blocks.0.attn_scale"].float())


class TestSaveRefuses:
    def refuse(self, tmp_path, match, state=None, provenance=PROVENANCE):
        path = tmp_path / "model.klora"
        path.write_bytes(b"old")
        with pytest.raises(ArtifactError, match=match):
            save_artifact(path, state or random_state(CONFIG), CONFIG, TOKENIZER, provenance)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.klora"]

    @pytest.mark.parametrize(
        ("name", "value", "match"),
        [
            ("smear.gate", None, "'smear.gate' is missing"),
            ("_orig_mod.embed", torch.zeros(2), r"'_orig_mod.embed' is \[2\], the config wants no such parameter"),
            ("blocks.0.k", torch.zeros(32, 32), r"'blocks.0.k' is \[32, 32\], the config wants \[16, 32\]"),
            ("embed", torch.full((260, 32), 70000.0), "embed holds a value that is not finite or beyond 65504"),
            ("bigram.project", torch.full((32, 8), -70000.0), "bigram.project holds a value"),
            ("blocks.1.up", torch.full((48, 32), 40000.0), "blocks.1.up holds a value"),
            ("blocks.1.q", torch.full((32, 32), torch.nan), "blocks.1.q holds a value that is not finite"),
            ("blocks.0.gain", torch.full((2,), torch.inf), "blocks.0.gain holds a value that is not finite"),
        ],
    )
    def test_a_state_that_cannot_be_stored(self, tmp_path, name, value, match):
        state = random_state(CONFIG)
        if value is None:
            del state[name]
        else:
            state[name] = value
        self.refuse(tmp_path, match, state)

    @pytest.mark.parametrize(
        ("provenance", "match"),
        [
            ({"a": {1, 2}}, "not JSON"),
            ({"a": float("nan")}, "not JSON"),
            ({"a": {10: 0, 9: 0}}, "use text as keys"),
            ({"a": "x" * (4 << 20)}, "shorten the provenance"),
        ],
    )
    def test_a_provenance_that_does_not_read_back(self, tmp_path, provenance, match):
        self.refuse(tmp_path, match, provenance=provenance)

    def test_a_folder_for_a_path(self, tmp_path):
        with pytest.raises(ArtifactError, match="is a folder"):
            save(tmp_path)

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_failing_disk_leaves_the_old_file(self, tmp_path, monkeypatch, call):
        path = tmp_path / "model.klora"
        path.write_bytes(b"old")

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            save(path)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.klora"]


def test_the_header_says_what_the_documentation_says(tmp_path):
    save(tmp_path / "model.klora")
    data = (tmp_path / "model.klora").read_bytes()
    header, frame = split(data)
    payload = payload_of(data)
    assert header["format"] == "klora" and header["version"] == 1
    assert ModelConfig.from_dict(header["config"]) == CONFIG
    assert base64.b64decode(header["tokenizer"]["base64"]) == TOKENIZER
    assert header["payload_bytes"] == len(payload) and header["payload_sha256"] == sha256(payload)
    assert header["frame_bytes"] == len(frame) and header["frame_sha256"] == sha256(frame)
    signed = canonical({key: value for key, value in header.items() if key != "header_sha256"})
    assert header["header_sha256"] == sha256(signed)


class TestLargeErrors:
    """A budget that ruins the weights is not taken in silence."""

    @pytest.mark.slow
    def test_a_small_budget_gets_a_warning_and_advice_that_holds(self, tmp_path, loose):
        assert loose.warning is None and loose.relative_error < 0.002
        path = tmp_path / "model.klora"
        summary = save(path, WIDE, budget=int(0.6 * loose.bytes))
        assert summary.relative_error > 0.03
        assert f"relative squared error of {summary.relative_error:.2g}" in summary.warning
        advised = int(re.search(r"about ([\d,]+) bytes", summary.warning)[1].replace(",", ""))
        again = save(path, WIDE, budget=advised)
        assert again.warning is None and again.relative_error <= 0.01

    @pytest.mark.slow
    def test_budgets_have_the_errors_that_they_are_said_to_have(self, tmp_path, loose):
        assert list(loose.budgets) == sorted(loose.budgets)
        assert list(loose.budgets.values()) == sorted(loose.budgets.values(), reverse=True)
        assert loose.budgets[max(loose.budgets)] == pytest.approx(loose.relative_error, rel=0.02)
        for budget, error in list(loose.budgets.items())[1::2]:
            assert save(tmp_path / "model.klora", WIDE, budget=budget).relative_error <= error * 1.05

    def test_an_unreachable_budget_is_not_answered_with_a_useless_one(self, tmp_path):
        path = tmp_path / "model.klora"
        with pytest.raises(ArtifactError, match=r"relative squared error of the weights would be 0\.\d+$") as caught:
            save(path, WIDE, budget=20_000)
        advised = int(re.search(r"give a budget of about ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
        assert save(path, WIDE, budget=advised).relative_error <= 0.01

    @pytest.mark.slow
    def test_the_command_says_it_in_words_and_in_json(self, tmp_path, monkeypatch, capsys, loose):
        tokenizer = SimpleNamespace(vocab_size=WIDE.vocab_size, to_bytes=lambda: TOKENIZER)
        monkeypatch.setattr(export, "tokenizer_of_run", lambda run, may_normalise: tokenizer)
        meta = {"model": WIDE.to_dict(), "provenance": PROVENANCE}
        monkeypatch.setattr(export, "load_run", lambda run: (random_state(WIDE), meta))
        for as_json in (False, True):
            export.export(tmp_path, None, int(0.6 * loose.bytes), False, as_json)
            said = capsys.readouterr()
            if as_json:
                result = json.loads(said.out)
                assert result["warning"].startswith("the weights have a relative squared error of")
                assert all(error > 0 and int(size) > 0 for size, error in result["budgets"].items())
            else:
                assert "warning: the weights have a relative squared error of" in said.out
                assert "would have a relative squared weight error of" in said.out


class TestSmallWeights:
    """fp16 holds no scale and no embedding of weights of 1e-7 as well as it holds those of 0.1."""

    @pytest.mark.parametrize("std", [1e-6, 1e-7, 1e-9])
    def test_are_stored_as_well_as_others(self, tmp_path, loose, std):
        state = random_state(WIDE)
        for name in ("blocks.0.q", "embed", "bigram.table"):
            state[name] = state[name] * std
        state["blocks.1.up"][7] *= std
        path = tmp_path / "model.klora"
        summary = save_artifact(path, state, WIDE, TOKENIZER, PROVENANCE)
        loaded = load_artifact(path)
        header = split(path.read_bytes())[0]
        assert header["version"] == 2
        assert header["float32"] == ["bigram.table", "blocks.0.q.scale", "blocks.1.up.scale", "embed"]
        assert summary.errors["blocks.0.q"] == pytest.approx(loose.errors["blocks.0.q"], rel=0.05)
        found = loaded.tensors["blocks.0.q"].dequantize().double()
        assert (found - state["blocks.0.q"]).norm() < 0.035 * state["blocks.0.q"].double().norm()
        row = loaded.tensors["blocks.1.up"].dequantize()[7].double()
        assert (row - state["blocks.1.up"][7]).norm() < 0.05 * state["blocks.1.up"][7].double().norm()
        assert torch.equal(loaded.tensors["embed"], state["embed"])
        GPT(WIDE).load_state_dict(loaded.state_dict())
        dense, int6 = (model_from_artifact(loaded, torch.device("cpu"), weights) for weights in ("dense", "int6"))
        tokens = torch.arange(3, 40)[None]
        torch.testing.assert_close(int6.logits(tokens), dense.logits(tokens), rtol=1e-5, atol=1e-5)

    def test_ordinary_weights_make_the_same_file_as_ever(self, tmp_path):
        """Version 1, which every klora reads."""
        save(tmp_path / "model.klora")
        header = split((tmp_path / "model.klora").read_bytes())[0]
        assert header["version"] == 1 and "float32" not in header


def test_a_model_without_a_softcap_comes_back_without_one(tmp_path):
    config = dataclasses.replace(CONFIG, softcap=0.0)
    save(tmp_path / "model.klora", config)
    assert load_artifact(tmp_path / "model.klora").config == config
