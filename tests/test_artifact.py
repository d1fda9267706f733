"""The artifact: choosing clips for a budget, the file's round trip, and every way in which a file can be wrong."""

import base64
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.kernels.int6 import Int6Weight, dequantize_int6_ref, quantize_int6_ref
from klora.model import artifact
from klora.model.artifact import ArtifactError, load_artifact, save_artifact
from klora.model.config import ModelConfig
from klora.model.gpt import GPT, is_block_matrix, parameter_shapes
from klora.model.quantize import CLIPS, ClipCurve, choose_clips, clip_curve, compress, quantize_to_fit

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
BOMB = 256 << 20
PROVENANCE = {"steps": 7, "seconds": 1.5, "data": ["train.bin"], "note": "ü"}


def random_state(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in parameter_shapes(config).items()}


def save(path, config=CONFIG, seed=0, **options):
    return save_artifact(path, random_state(config, seed), config, TOKENIZER, PROVENANCE, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Path and bytes of a good artifact of CONFIG."""
    path = tmp_path_factory.mktemp("artifact") / "model.klora"
    save(path)
    return path, path.read_bytes()


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    """Summary of an artifact of WIDE whose budget does not bind."""
    return save(tmp_path_factory.mktemp("loose") / "model.klora", WIDE)


@pytest.fixture(scope="module")
def bomb():
    """A frame of a few kilobytes that expands to 256 MiB of zeros."""
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(BOMB))
    assert len(frame) < 64 << 10
    return frame


def split(data):
    """Header and frame of an artifact, read independently of the loader."""
    length = struct.unpack("<I", data[4:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def join(header, frame):
    """An artifact whose header hash is right, whatever the header says."""
    header = {key: value for key, value in header.items() if key != "header_sha256"}
    raw = canonical(header | {"header_sha256": sha256(canonical(header))})
    return struct.pack("<II", 0x184D2A50, len(raw)) + raw + frame


def forged(data, frame=None, **changes):
    """`data` with header fields (and frame) replaced by someone who computes all hashes again."""
    header, old = split(data)
    if frame is not None:
        header |= {"frame_bytes": len(frame), "frame_sha256": sha256(frame)}
    return join(header | changes, old if frame is None else frame)


def with_payload(data, payload):
    """`data` around another payload, all sizes and hashes right."""
    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(payload)
    return forged(data, frame, payload_bytes=len(payload), payload_sha256=sha256(payload))


def payload_of(data):
    return zstandard.ZstdDecompressor().decompress(split(data)[1])


def with_tensors(data, change):
    """`data` after `change` has edited the dictionary of its payload's tensors."""
    tensors = safetensors.torch.load(payload_of(data))
    change(tensors)
    return with_payload(data, safetensors.torch.save(tensors))


def refuse(tmp_path, data, match):
    path = tmp_path / "bad.klora"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=match) as caught:
        load_artifact(path)
    assert str(caught.value).startswith(f"{path}: ")


class TestClipCurve:
    @pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "uneven rows", "sparse"])
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
        curve = clip_curve(weight)
        live = int(weight.any(dim=1).sum()) * 128
        for index in (0, 10, 20, 30, 45, 63):
            codes, scale = quantize_int6_ref(weight, CLIPS[index])
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

    def test_room_to_spare_gives_every_matrix_its_best_clip(self):
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

    def test_the_tokenizer_and_the_provenance_count(self, tmp_path, loose):
        budget = loose.bytes
        noise = random.Random(0).randbytes(budget // 5)
        state = random_state(WIDE)
        tokenizer = save_artifact(tmp_path / "a", state, WIDE, noise, {}, budget=budget)
        provenance = save_artifact(tmp_path / "b", state, WIDE, b"", {"note": noise.hex()}, budget=budget)
        for summary in (tokenizer, provenance):
            assert summary.bytes <= budget and summary.relative_error > 1.5 * loose.relative_error

    @pytest.mark.parametrize("budget", [1_050_000, 1_150_000, 1_300_000, 16_000_000])
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
                expected = dequantize_int6_ref(*quantize_int6_ref(tensor, summary.clips[name]))
            elif name in ("embed", "bigram.table", "bigram.project"):
                expected = tensor.half().float()
            else:
                expected = tensor
            assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], expected)
        GPT(config).load_state_dict(loaded)
        assert {tensor.dtype for tensor in artifact.state_dict(torch.bfloat16).values()} == {torch.bfloat16}

    def test_the_same_state_gives_the_same_bytes(self, tmp_path, saved):
        save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == saved[1]

    def test_a_fresh_model_with_its_zero_matrices(self, tmp_path):
        torch.manual_seed(0)
        state = GPT(CONFIG).state_dict()
        save_artifact(tmp_path / "a", state, CONFIG, TOKENIZER, {}, budget=100_000)
        assert not load_artifact(tmp_path / "a").tensors["blocks.0.o"].dequantize().any()

    def test_a_model_of_zeros(self, tmp_path):
        state = {name: torch.zeros(shape) for name, shape in parameter_shapes(CONFIG).items()}
        assert save_artifact(tmp_path / "a", state, CONFIG, TOKENIZER, {}).relative_error == 0.0
        assert not any(tensor.any() for tensor in load_artifact(tmp_path / "a").state_dict().values())

    def test_plain_zstd_tools_read_the_payload(self, saved):
        path, data = saved
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


class TestDamage:
    def test_every_flipped_bit_is_seen(self, tmp_path, saved):
        data = saved[1]
        start = len(data) - len(split(data)[1])
        places = {*range(16), *range(start - 8, start + 24), *range(len(data) - 12, len(data))}
        places |= set(random.Random(0).sample(range(len(data)), 200))
        path = tmp_path / "bad.klora"
        for place in sorted(places):
            for bit in {0, 4, place % 8}:
                bad = bytearray(data)
                bad[place] ^= 1 << bit
                path.write_bytes(bad)
                with pytest.raises(ArtifactError):
                    load_artifact(path)
        path.write_bytes(data)
        load_artifact(path)

    def test_every_truncation_is_seen(self, tmp_path, saved):
        data = saved[1]
        start = len(data) - len(split(data)[1])
        lengths = {*range(10), start - 1, start, start + 1, start + 5, len(data) - 1, len(data) - 5}
        for length in sorted(lengths | set(random.Random(1).sample(range(len(data)), 40))):
            refuse(tmp_path, data[:length], "export")

    @pytest.mark.parametrize("tail", [b"\0", b"\n", b"PK\x03\x04" * 1000])
    def test_bytes_after_the_end_are_seen(self, tmp_path, saved, tail):
        refuse(tmp_path, saved[1] + tail, "its header speaks of")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\n",
            b"once upon a time\n" * 100,
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100),
            safetensors.torch.save({"embed": torch.zeros(4, 4)}),
            zstandard.ZstdCompressor().compress(b"a plain zstd frame" * 10),
            b"\x51\x2a\x4d\x18\x02\0\0\0{}",
        ],
    )
    def test_foreign_files_are_told_apart(self, tmp_path, data):
        refuse(tmp_path, data, "which no artifact does; give a file that klora exported")

    def test_a_pickle_is_not_read(self, tmp_path):
        torch.save({"embed": torch.zeros(2)}, tmp_path / "weights.pt")
        refuse(tmp_path, (tmp_path / "weights.pt").read_bytes(), "which no artifact does")

    def test_a_path_without_a_file(self, tmp_path):
        for path in (tmp_path / "absent", tmp_path):
            with pytest.raises(ArtifactError, match="there is no such file"):
                load_artifact(path)

    def test_an_unreadable_file(self, tmp_path, saved, monkeypatch):
        def fail(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", fail)
        with pytest.raises(ArtifactError, match="cannot be read .Permission denied."):
            load_artifact(saved[0])


class TestHostileHeader:
    """Files made on purpose: every hash in them is right."""

    def test_forging_itself_works(self, tmp_path, saved):
        path = tmp_path / "same.klora"
        path.write_bytes(with_tensors(saved[1], lambda tensors: None))
        assert load_artifact(path).provenance == PROVENANCE

    @pytest.mark.parametrize("length", [0xFFFFFFFF, (4 << 20) + 1])
    def test_a_header_beyond_its_limit_is_not_read(self, tmp_path, saved, length):
        refuse(tmp_path, saved[1][:4] + struct.pack("<I", length) + saved[1][8:], "at most 4,194,304 are allowed")

    def test_a_header_longer_than_the_file(self, tmp_path, saved):
        refuse(tmp_path, saved[1][:4] + struct.pack("<I", 4 << 20) + saved[1][8:], "header claims 4,194,304 bytes and")

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"null",
            b"[]",
            b"\xff\xfe{\0}\0",
            b"[" * 200_000,
            b'{"a":' * 200_000,
            b'{"format":NaN}',
            b'{"format":1e999}',
            b'{"format": "klora"}',
            b'{"format":"klora","format":"klora"}',
            b'{"version":' + b"9" * 5000 + b"}",
        ],
    )
    def test_other_json_is_not_a_header(self, tmp_path, raw):
        refuse(tmp_path, struct.pack("<II", 0x184D2A50, len(raw)) + raw, "not the JSON that klora writes")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"format": "other"}, "its format is 'other'"),
            ({"version": 2}, "it is version 2, this klora reads version 1"),
            ({"version": True}, "fields are wrong at version"),
            ({"version": "1" * 100_000}, "it is version '1{59}, this klora"),
            ({"extra": 1}, "fields are wrong at extra"),
            ({"provenance": None}, "fields are wrong at provenance"),
            ({"payload_bytes": 1.0}, "fields are wrong at payload_bytes"),
            ({"frame_bytes": -1}, "its header speaks of"),
            ({"frame_bytes": 10**12}, "the payload needs no more than"),
            ({"payload_bytes": 10**12}, "the config's tensors take"),
            ({"payload_bytes": 8}, "the config's tensors take"),
            ({"payload_sha256": "0" * 64}, "its payload does not match its sha256"),
            ({"frame_sha256": "0" * 64}, "its compressed frame does not match its sha256"),
            ({"tokenizer": {}}, "its tokenizer is not base64"),
            ({"tokenizer": {"base64": 1, "sha256": ""}}, "its tokenizer is not base64"),
            ({"tokenizer": {"base64": "é", "sha256": ""}}, "its tokenizer is not base64"),
            ({"tokenizer": {"base64": "a$==", "sha256": ""}}, "its tokenizer is not base64"),
            ({"tokenizer": {"base64": "", "sha256": ""}}, "its tokenizer does not match its sha256"),
            ({"config": {}}, "its config has other fields"),
        ],
    )
    def test_fields(self, tmp_path, saved, changes, match):
        refuse(tmp_path, forged(saved[1], **changes), match)

    def test_a_missing_field(self, tmp_path, saved):
        header, frame = split(saved[1])
        del header["provenance"]
        refuse(tmp_path, join(header, frame), "fields are wrong at provenance")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"width": 64}, "the config's tensors take"),
            ({"blocks": 1}, "the config's tensors take"),
            ({"width": "32"}, "its config has other fields"),
            ({"depth": 3}, "its config has other fields"),
            ({"heads": 3}, "its config is impossible: heads=3"),
            ({"rope_base": 10**400}, "its config has other fields"),
            ({"vocab_size": 65536, "width": 10**9}, "asks for [0-9,]{15,} bytes and 1,073,741,824 are allowed"),
            ({"mlp_hidden": 1 << 30, "width": 1 << 30, "bigram_rows": 1 << 30}, "asks for"),
            ({"width": 2**62}, "width=4611686018427387904; at most 1073741824"),
            ({"train_length": 1 << 30}, "asks for"),
            ({"blocks": 10**9}, "its config is impossible: blocks"),
        ],
    )
    def test_configs_are_refused_before_their_memory(self, tmp_path, saved, changes, match):
        config = split(saved[1])[0]["config"] | changes
        tracemalloc.start()
        start = time.perf_counter()
        refuse(tmp_path, forged(saved[1], config=config), match)
        assert time.perf_counter() - start < 5
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        tracemalloc.stop()

    def test_the_limit_is_the_callers(self, saved):
        with pytest.raises(ArtifactError, match="20,000 are allowed; raise max_bytes"):
            load_artifact(saved[0], max_bytes=20_000)


class TestHostileFrame:
    def refuse_in_little_memory(self, tmp_path, data, match):
        tracemalloc.start()
        refuse(tmp_path, data, match)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20

    def test_a_bomb_that_says_so(self, tmp_path, saved, bomb):
        self.refuse_in_little_memory(tmp_path, forged(saved[1], bomb), "its frame claims 268,435,456 bytes")

    def test_a_bomb_whose_header_agrees(self, tmp_path, saved, bomb):
        data = forged(saved[1], bomb, payload_bytes=BOMB)
        self.refuse_in_little_memory(tmp_path, data, "the config's tensors take")

    def test_a_bomb_that_claims_the_right_size(self, tmp_path, saved, bomb):
        size = split(saved[1])[0]["payload_bytes"]
        at = bomb.index(struct.pack("<I", BOMB))
        lying = bomb[:at] + struct.pack("<I", size) + bomb[at + 4 :]
        assert at < 14 and zstandard.get_frame_parameters(lying).content_size == size
        self.refuse_in_little_memory(tmp_path, forged(saved[1], lying), "its frame is not zstd")

    def test_a_frame_without_a_size(self, tmp_path, saved):
        frame = zstandard.ZstdCompressor(write_content_size=False).compress(payload_of(saved[1]))
        self.refuse_in_little_memory(tmp_path, forged(saved[1], frame), "its frame claims")

    def test_a_window_beyond_the_limit(self, tmp_path, saved):
        """Window descriptor 0xA0 is 2^30 bytes; the frame's content is the right one."""
        payload = payload_of(saved[1])
        blocks = [payload[start : start + 65536] for start in range(0, len(payload), 65536)]
        raw = b"".join(struct.pack("<I", len(block) << 3 | (block is blocks[-1]))[:3] + block for block in blocks)
        frame = b"\x28\xb5\x2f\xfd\x80\xa0" + struct.pack("<I", len(payload)) + raw
        assert zstandard.ZstdDecompressor(max_window_size=1 << 31).decompress(frame) == payload
        self.refuse_in_little_memory(tmp_path, forged(saved[1], frame), r"window 1,073,741,824")

    def test_what_is_no_frame(self, tmp_path, saved):
        for frame in (b"", b"\0" * 100, b"\x50\x2a\x4d\x18\x04\0\0\0abcd", split(saved[1])[1][:-40]):
            refuse(tmp_path, forged(saved[1], frame), "its frame")

    def test_a_second_frame(self, tmp_path, saved):
        frame = split(saved[1])[1]
        refuse(
            tmp_path, forged(saved[1], frame + zstandard.ZstdCompressor().compress(b"more")), "its frame is not zstd"
        )


class TestHostilePayload:
    @pytest.mark.parametrize(
        ("name", "value", "match"),
        [
            ("smear.gate", None, "'smear.gate' is missing"),
            ("extra", torch.zeros(1), "'extra' is .*wants no such tensor"),
            ("embed", torch.zeros(260, 32, dtype=torch.bfloat16), "'embed' is .'BF16'"),
            ("embed", torch.zeros(32, 260, dtype=torch.float16), "'embed' is .'F16', .32, 260.."),
            ("blocks.0.q.codes", torch.full((32, 32), 32, dtype=torch.int8), "a code is 32"),
            ("blocks.0.q.codes", torch.full((32, 32), -128, dtype=torch.int8), "a code is -128"),
            ("blocks.0.q.scale", torch.full((32,), -1.0, dtype=torch.float16), "holds a negative scale"),
            ("blocks.0.q.scale", torch.full((32,), torch.inf, dtype=torch.float16), "holds a NaN or an infinity"),
            ("embed", torch.full((260, 32), torch.nan, dtype=torch.float16), "holds a NaN or an infinity"),
            ("bigram.scale", torch.tensor(-torch.inf), "holds a NaN or an infinity"),
        ],
    )
    def test_tensors(self, tmp_path, saved, name, value, match):
        def change(tensors):
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value

        refuse(tmp_path, with_tensors(saved[1], change), match)

    @pytest.mark.parametrize("length", [0, 2**32, 2**64 - 1])
    def test_what_is_no_safetensors(self, tmp_path, saved, length):
        payload = struct.pack("<Q", length) + payload_of(saved[1])[8:]
        refuse(tmp_path, with_payload(saved[1], payload), "its payload is not safetensors")

    def test_tensors_that_overlap(self, tmp_path, saved):
        payload = payload_of(saved[1])
        length = struct.unpack("<Q", payload[:8])[0]
        entries = json.loads(payload[8 : 8 + length])
        entries["blocks.0.mlp_scale"]["data_offsets"] = entries["blocks.0.attn_scale"]["data_offsets"]
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        payload = struct.pack("<Q", len(header)) + header + payload[8 + length :]
        refuse(tmp_path, with_payload(saved[1], payload), "its payload is not safetensors")


def test_the_header_says_what_the_documentation_says(saved):
    header, frame = split(saved[1])
    payload = payload_of(saved[1])
    assert header["format"] == "klora" and header["version"] == 1
    assert ModelConfig.from_dict(header["config"]) == CONFIG
    assert base64.b64decode(header["tokenizer"]["base64"]) == TOKENIZER
    assert header["payload_bytes"] == len(payload) and header["payload_sha256"] == sha256(payload)
    assert header["frame_bytes"] == len(frame) and header["frame_sha256"] == sha256(frame)
    signed = canonical({key: value for key, value in header.items() if key != "header_sha256"})
    assert header["header_sha256"] == sha256(signed)
