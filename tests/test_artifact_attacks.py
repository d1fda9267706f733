"""Artifacts that are damaged, foreign, or made on purpose to break the loader: every one is refused with a reason."""

import json
import random
import struct
import time

import pytest
import safetensors.torch
import torch
import zstandard
from conftest import peak_memory
from klora.model.artifact import ArtifactError, load_artifact
from test_artifact import PROVENANCE, canonical, payload_of, save, sha256, split

BOMB = 256 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Path and bytes of a good artifact of a small model."""
    path = tmp_path_factory.mktemp("artifact") / "model.klora"
    save(path)
    return path, path.read_bytes()


@pytest.fixture(scope="module")
def bomb():
    """A frame of a few kilobytes that expands to 256 MiB of zeros."""
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(BOMB))
    assert len(frame) < 64 << 10
    return frame


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


class TestDamage:
    @pytest.mark.slow
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
    def test_foreign_files_are_refused(self, tmp_path, data):
        refuse(tmp_path, data, "which no artifact does; give a file that klora exported")

    def test_a_pickle_is_not_read(self, tmp_path):
        torch.save({"embed": torch.zeros(2)}, tmp_path / "weights.pt")
        refuse(tmp_path, (tmp_path / "weights.pt").read_bytes(), "which no artifact does")

    def test_a_path_without_a_file(self, tmp_path):
        for path, says in ((tmp_path / "absent", "there is no such file"), (tmp_path, "it is a folder")):
            with pytest.raises(ArtifactError, match=f"{says}; give the path of an exported artifact"):
                load_artifact(path)

    def test_an_unreadable_file(self, tmp_path, saved, monkeypatch):
        def fail(*_, **__):
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
            ({"version": 3}, "it is version 3, this klora reads versions 1 and 2"),
            ({"version": 2}, "fields are wrong at float32"),
            ({"float32": ["embed"]}, "fields are wrong at float32"),
            ({"version": 2, "float32": "embed"}, "fields are wrong at float32"),
            *(
                ({"version": 2, "float32": names}, "its field 'float32' names no tensors of fp16")
                for names in ([], [1], [["embed"]], ["embed", "embed"], ["smear.gate"], ["embed", "bigram.table"])
            ),
            ({"version": 2, "float32": ["embed"]}, "the config's tensors take"),
            ({"version": 2, "float32": ["blocks.0.q.scale"]}, "scale' is .'F16', .32.*wants .'F32'"),
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
            ({"vocab_size": 65536, "width": 65536}, "asks for [0-9,]{11,} bytes and 2,147,483,648 are allowed"),
            ({"mlp_hidden": 1 << 20, "width": 65536, "blocks": 256, "bigram_rows": 1 << 24}, "asks for"),
            ({"width": 2**62}, "its config is impossible: width=4611686018427387904"),
            ({"train_length": 1 << 20, "width": 65536}, "asks for"),
            ({"train_length": 1 << 30}, "its config is impossible: train_length"),
            ({"blocks": 10**9}, "its config is impossible: blocks"),
        ],
    )
    def test_configs_are_refused_before_their_memory(self, tmp_path, saved, changes, match):
        config = split(saved[1])[0]["config"] | changes
        start = time.process_time()
        assert peak_memory(lambda: refuse(tmp_path, forged(saved[1], config=config), match)) < 16 << 20
        assert time.process_time() - start < 5

    def test_the_limit_is_the_callers(self, saved):
        with pytest.raises(ArtifactError, match="20,000 are allowed; .*set KLORA_MAX_MODEL_BYTES="):
            load_artifact(saved[0], max_bytes=20_000)


class TestHostileFrame:
    def refuse_in_little_memory(self, tmp_path, data, match):
        assert peak_memory(lambda: refuse(tmp_path, data, match)) < 16 << 20

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
