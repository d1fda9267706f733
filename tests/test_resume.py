"""What a training run keeps: checkpoints, resuming, damaged and foreign files."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from klora import __version__
from klora.cli.console import Output
from klora.cli.export import export_run
from klora.model.checkpoint import CheckpointError, _checksum, load_tensors, save_tensors, version_of
from klora.model.config import ConfigError
from klora.model.curve import LossCurve
from klora.model.loading import load_run
from klora.model.prepare import Prepared, prepared_from_shards
from klora.model.shards import ShardError
from klora.model.train import Trainer
from safetensors.torch import save_file
from test_cli import klora
from test_train import ALONE, digests, losses, small_preset


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    """The run of the small preset that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    Trainer(small_preset(), data, folder, ALONE).run()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_resume_continues_bit_for_bit(tmp_path, data, whole, stop_at):
    continues_bit_for_bit(tmp_path, data, whole, stop_at, {})


@pytest.mark.slow
def test_resume_continues_bit_for_bit_with_masks_and_quantised(tmp_path, data):
    options = {"document_mask": True, "qat_share": 0.75}
    Trainer(small_preset(**options), data, tmp_path / "whole", ALONE).run()
    continues_bit_for_bit(tmp_path, data, tmp_path / "whole", 5, options)


def continues_bit_for_bit(tmp_path, data, whole, stop_at, options):
    part = tmp_path / "part"

    def interrupt(row):
        if row["step"] == stop_at:
            signal.raise_signal(signal.SIGTERM)

    stopped = Trainer(small_preset(**options), data, part, ALONE).run(interrupt)
    assert stopped.status == "interrupted" and stopped.step == stop_at and stopped.signal == signal.SIGTERM
    with pytest.raises(CheckpointError, match="its training did not finish"):
        load_run(part)
    resumed = Trainer(small_preset(**options), data, part, ALONE, resume=True)
    assert resumed.step == stop_at
    resumed.run()
    assert losses(part) == losses(whole)
    expected, _ = load_run(whole)
    got, _ = load_run(part)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_a_model_of_one_block_is_resumed(tmp_path, data):
    """It has no skip, so that a parameter and its state hold no element."""
    out = tmp_path / "run"
    Trainer(small_preset(blocks=1, max_steps=2), data, out, ALONE).run()
    assert Trainer(small_preset(blocks=1, max_steps=3), data, out, ALONE, resume=True).run().step == 3


@pytest.mark.slow
def test_a_checkpoint_on_the_timer_is_resumed_after_a_kill(tmp_path, data, whole):
    """Steps after the last checkpoint are done again: loss.csv has each step once, as in the run without the kill."""
    part = tmp_path / "part"

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 4:
            trainer._save_checkpoint()
        if row["step"] == 7:
            raise Killed

    trainer = Trainer(small_preset(), data, part, ALONE)
    with pytest.raises(Killed):
        trainer.run(kill)
    Trainer(small_preset(), data, part, ALONE, resume=True).run()
    assert losses(part) == losses(whole)


@pytest.mark.slow
def test_checkpoints_are_written_on_the_timer(tmp_path, data):
    seen = []

    def watch(row):
        time.sleep(0.02)
        seen.append((tmp_path / "checkpoint.safetensors").exists())

    Trainer(small_preset(checkpoint_seconds=0.05), data, tmp_path, ALONE).run(watch)
    assert not seen[0] and seen[-1]


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"step": 1})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_tensors(path, {"a": torch.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    tensors, meta = load_tensors(path)
    assert meta == {"step": 1} and tensors["a"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_foreign_safetensors_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="was not written by klora"):
        load_tensors(tmp_path / "foreign.safetensors")


@pytest.mark.slow
def test_a_torn_row_of_the_curve_is_dropped(tmp_path, data):
    Trainer(small_preset(max_steps=3), data, tmp_path, ALONE).run()
    with open(tmp_path / "loss.csv", "a") as file:
        file.write("2,0.5")
    assert [row["step"] for row in LossCurve(tmp_path, resume_at=3).rows()] == ["1", "2", "3"]


def written(path: Path, tensors: dict, header: dict[str, str]) -> None:
    """A file of these tensors and of this header, with the checksum that belongs to them."""
    save_file(tensors, path, metadata=header | {"sha256": _checksum(tensors, header)})


def test_metadata_that_is_damaged_is_a_checkpoint_error(tmp_path, data):
    def rewrite(path: Path, text: str) -> None:
        written(path, load_tensors(tmp_path / "whole.safetensors")[0], {"klora": text})

    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    checkpoint, model = tmp_path / "checkpoint.safetensors", tmp_path / "model.safetensors"
    shutil.copy(checkpoint, tmp_path / "whole.safetensors")
    whole = load_tensors(checkpoint)[1]
    for text, says in (
        ("{", "its metadata is no JSON"),
        ("[1]", "its metadata has no step"),
        (json.dumps({**whole, "step": "2"}), "its metadata has no step"),
        (json.dumps({k: v for k, v in whole.items() if k != "sampler"}), "its metadata has no sampler"),
    ):
        rewrite(checkpoint, text)
        with pytest.raises(CheckpointError, match=says):
            Trainer(small_preset(), data, tmp_path, ALONE, resume=True)
    for text in ("}", "null", '{"model": {}}', '{"model": 1, "provenance": {}}'):
        rewrite(model, text)
        with pytest.raises(CheckpointError, match="its metadata"):
            load_run(tmp_path)
    save_tensors(checkpoint, {"model/embed": torch.ones(2)}, whole)
    with pytest.raises(CheckpointError, match="is damaged"):
        Trainer(small_preset(), data, tmp_path, ALONE, resume=True)


@pytest.mark.parametrize(("version", "writer"), [("0.0.9", "klora 0.0.9"), (None, "an older klora, from before")])
def test_a_run_of_another_version_is_refused_with_its_name_and_what_to_do(tmp_path, data, version, writer):
    """Whichever part has changed: the settings, the checkpoint's metadata or its tensors, the finished weights."""
    from klora.cli.train import _stored_run

    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    checkpoint, model, run = (tmp_path / name for name in ("checkpoint.safetensors", "model.safetensors", "run.json"))
    says = f"was written by {writer}.*this is klora {__version__}, which.*{{}}.*go on with the version that wrote it"
    stamp = {} if version is None else {"version": version}
    (tensors, meta), (weights, finished) = load_tensors(checkpoint), load_tensors(model)
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith("ema/")}
    for parts, about in ((tensors, {k: v for k, v in meta.items() if k != "sampler"}), (fewer, meta)):
        written(checkpoint, parts, {"klora": json.dumps(about)} | stamp)
        with pytest.raises(CheckpointError, match=says.format("")):
            Trainer(small_preset(), data, tmp_path, ALONE, resume=True)
    del finished["model"]["bigram_rows"]
    written(model, weights, {"klora": json.dumps(finished)} | stamp)
    with pytest.raises(CheckpointError, match=says.format("no value for bigram_rows")):
        load_run(tmp_path)
    stored = json.loads(run.read_text())
    assert stored.pop("klora") == __version__ and version_of(checkpoint) == version
    for part, name in (("train", "attention"), ("model", "bigram_rows")):
        older = {**stored, part: {k: v for k, v in stored[part].items() if k != name}}
        run.write_text(json.dumps(older if version is None else {**older, "klora": version}))
        with pytest.raises(CheckpointError, match=says.format(f"no value for {name}")):
            _stored_run(tmp_path, {})
    run.write_text(json.dumps({**older, "klora": __version__}))
    with pytest.raises(CheckpointError, match="is damaged .*has no value for"):
        _stored_run(tmp_path, {})


@pytest.mark.slow
def test_a_damaged_curve_does_not_stop_a_resumed_run(tmp_path, data):
    Trainer(small_preset(max_steps=3), data, tmp_path, ALONE).run()
    lines = (tmp_path / "loss.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "loss.csv").write_bytes(b"".join([*lines[:2], b"x,\x00\xff,,,,,,\r\n", *lines[3:]]))
    assert Trainer(small_preset(max_steps=5), data, tmp_path, ALONE, resume=True).run().step == 5
    assert [step for step, _ in losses(tmp_path)] == ["1", "3", "4", "5"]


def test_a_curve_that_a_spreadsheet_has_saved_keeps_its_rows(tmp_path, data):
    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    path = tmp_path / "loss.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    Trainer(small_preset(max_steps=3), data, tmp_path, ALONE, resume=True).run()
    assert [step for step, _ in losses(tmp_path)] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("moves", [2, 3])
def test_a_kill_while_a_run_is_set_aside_leaves_it_its_description(tmp_path, finished, data, monkeypatch, moves):
    out, done = tmp_path / "run", []
    shutil.copytree(finished, out)
    before, rename = digests(out), Path.rename

    class Killed(Exception):
        pass

    def killed(self, target):
        if len(done) == moves:
            raise Killed
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        Trainer(small_preset(), data, out, ALONE)
    monkeypatch.undo()
    Trainer(small_preset(seed=5), data, out, ALONE)
    kept = digests(out / "replaced")
    for name in ("model.safetensors", "run.json", "tokenizer.model"):
        assert kept[name] == before[name]
    load_run(out / "replaced")


@pytest.mark.slow
def test_a_finished_run_stays_until_what_replaces_it_has_finished(tmp_path, data):
    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    first = load_run(tmp_path)[0]

    class Killed(Exception):
        pass

    def kill(row):
        raise Killed

    said = []
    for seed in (1, 2):  # the second attempt finds an unfinished run, and must keep the finished one
        with pytest.raises(Killed):
            Trainer(small_preset(seed=seed), data, tmp_path, ALONE, say=said.append).run(kill)
        kept = load_run(tmp_path / "replaced")[0]
        assert all(torch.equal(first[name], kept[name]) for name in first)
        assert (tmp_path / "replaced" / "tokenizer.model").exists()
        with pytest.raises(CheckpointError, match="has no model.safetensors"):
            load_run(tmp_path)
    assert len(said) == 1 and str(tmp_path / "replaced") in said[0]
    (tmp_path / "replaced" / "notes.txt").write_text("somebody's")
    Trainer(small_preset(max_steps=3), data, tmp_path, ALONE).run()
    assert load_run(tmp_path)[1]["provenance"]["result"]["step"] == 3
    assert [path.name for path in (tmp_path / "replaced").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_resuming_a_finished_run_keeps_its_model_until_the_longer_one_is_done(tmp_path, data):
    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    model = digests(tmp_path)["model.safetensors"]
    longer = small_preset(max_steps=4)

    def interrupt(row):
        assert digests(tmp_path)["model.safetensors"] == model
        signal.raise_signal(signal.SIGTERM)

    assert Trainer(longer, data, tmp_path, ALONE, resume=True).run(interrupt).status == "interrupted"
    assert digests(tmp_path)["model.safetensors"] == model
    assert Trainer(longer, data, tmp_path, ALONE, resume=True).run().step == 4
    assert digests(tmp_path)["model.safetensors"] != model


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    Trainer(small_preset(max_steps=2), data, folder, ALONE).run()
    return folder


@pytest.mark.parametrize("name", [pytest.param("checkpoint.safetensors", marks=pytest.mark.slow), "model.safetensors"])
def test_a_flipped_bit_is_refused_with_the_files_name(tmp_path, finished, name):
    """Anywhere: in the header's length, the header, the metadata, a tensor."""
    path, whole = tmp_path / name, (finished / name).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    places = [
        *range(8),
        *draw.sample(range(8, header), 100),
        *draw.sample(range(header, len(whole)), 40),
        len(whole) - 1,
    ]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_tensors(path)
    path.write_bytes(whole)
    assert load_tensors(path)[0]


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors"])
def test_a_file_without_a_checksum_is_one_of_an_older_klora(tmp_path, finished, name):
    tensors, meta = load_tensors(finished / name)
    save_file(tensors, tmp_path / name, metadata={"klora": json.dumps(meta), "version": "0.0.9"})
    with pytest.raises(CheckpointError, match=r"was written by klora 0.0.9, .*\(it has no checksum\)"):
        load_tensors(tmp_path / name)


def test_a_tokenizer_that_is_not_the_runs_is_refused(tmp_path, finished, data):
    """A damaged one may still be a tokenizer, of other pieces."""
    import klora as package

    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "tokenizer.model").read_bytes()
    assert package.load(tmp_path).tokenizer.vocab_size == 320
    at = re.search(rb"[a-z]{4}", whole).start()  # within a piece
    (tmp_path / "tokenizer.model").write_bytes(whole[:at] + b"9" + whole[at + 1 :])
    for read in (lambda: package.load(tmp_path), lambda: export_run(tmp_path, tmp_path / "a", 10**6, Output(True))):
        with pytest.raises(CheckpointError, match="tokenizer.model is damaged, or of another run"):
            read()


def changed_shards(data, tmp_path, split: str) -> Prepared:
    """The same shards, of which one of that split has another token in the middle."""
    shutil.copytree(data.folder, tmp_path / "shards", dirs_exist_ok=True)
    (path,) = (path for path in (tmp_path / "shards").glob(f"*_{split}_*.bin"))
    tokens = bytearray(path.read_bytes())
    tokens[1024 + len(tokens) // 4 * 2] ^= 1
    path.write_bytes(tokens)
    return prepared_from_shards(tmp_path / "shards")


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_tokens_of_equal_count_are_refused_at_resume(tmp_path, finished, data, split):
    shutil.copytree(finished, tmp_path / "run")
    before = digests(tmp_path / "run")
    others = changed_shards(data, tmp_path, split)
    says = rf"fineweb_{split}_000000.bin holds other tokens than the run was trained on; put the shards back"
    with pytest.raises(ShardError, match=says):
        Trainer(small_preset(max_steps=3), others, tmp_path / "run", ALONE, resume=True)
    fewer = dataclasses.replace(data, validation=data.train)
    with pytest.raises(ShardError, match="fineweb_train_000000.bin holds other tokens"):
        Trainer(small_preset(max_steps=3), fewer, tmp_path / "run", ALONE, resume=True)
    assert digests(tmp_path / "run") == before
    assert Trainer(small_preset(max_steps=3), data, tmp_path / "run", ALONE, resume=True).step == 2


def test_a_token_out_of_range_is_found_before_the_first_step_wherever_it_is(tmp_path, data, monkeypatch):
    """It was an IndexError when training came to it."""
    monkeypatch.setattr("klora.model.prepare.SAMPLE_TOKENS", 64)
    shutil.copytree(data.folder, tmp_path / "shards")
    (path,) = (tmp_path / "shards").glob("*_train_*.bin")
    tokens = bytearray(path.read_bytes())
    tokens[-2:] = (320).to_bytes(2, "little")
    path.write_bytes(tokens)
    place = len(tokens) // 2 - 512 - 1
    with pytest.raises(
        ShardError, match=f"train_000000.bin has token 320 at place {place:,}, but the tokenizer has 320 p"
    ):
        Trainer(small_preset(), prepared_from_shards(tmp_path / "shards"), tmp_path / "run", ALONE)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_shard_that_is_overwritten_during_training_ends_it_in_a_sentence(tmp_path, data):
    shutil.copytree(data.folder, tmp_path / "shards")
    (path,) = (tmp_path / "shards").glob("*_train_*.bin")

    def overwrite(row):
        with open(path, "r+b") as file:
            file.seek(1024)
            file.write(b"\xff" * (path.stat().st_size - 1024))

    trainer = Trainer(small_preset(), prepared_from_shards(tmp_path / "shards"), tmp_path / "run", ALONE)
    with pytest.raises(ShardError, match=r"changed since training began: it has token 65535 .*Last checkpoint: none"):
        trainer.run(overwrite)


def test_a_run_is_not_begun_among_its_shards(tmp_path, data):
    """Its tokenizer would be a second one there, with which no run can be resumed."""
    shutil.copytree(data.folder, tmp_path / "shards")
    before = digests(tmp_path / "shards")
    prepared = prepared_from_shards(tmp_path / "shards")
    with pytest.raises(ConfigError, match="shards holds the shards, .*a folder of its own"):
        Trainer(small_preset(), prepared, tmp_path / "run" / ".." / "shards", ALONE)
    assert digests(tmp_path / "shards") == before


def test_shards_that_are_gone_are_named_when_a_run_is_resumed(tmp_path, data):
    from klora.cli.train import _stored_run

    Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"data": str(tmp_path / "moved")}))
    with pytest.raises(ShardError, match=r"moved, which is gone; put them back, or name .* in .*run\.json"):
        _stored_run(tmp_path, {})


@pytest.mark.parametrize("worse", [True, False])
def test_a_resumed_run_keeps_the_weights_it_had_unless_there_are_better_ones(tmp_path, finished, data, worse):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = load_run(tmp_path)[0]
    trainer = Trainer(small_preset(max_steps=4), data, tmp_path, ALONE, resume=True)
    validate = trainer._validate

    def validated(*stop) -> float:
        is_old = all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        return validate(*stop) + (1.0 if is_old != worse else 0.0)

    trainer._validate = validated
    result = trainer.run()
    after, meta = load_run(tmp_path)
    assert (result.kept == "before") == worse == all(torch.equal(after[name], before[name]) for name in before)
    assert meta["provenance"]["result"]["kept"] == result.kept and "before" in result.validation_bpb


def test_resuming_with_other_settings_says_which_differ(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    sets = [part for pair in ("width=64", "blocks=5", "seed=9", "muon_lr=0.5") for part in ("--set", pair)]
    refused = klora("train", "--resume", "--out", tmp_path, *sets, check=2).stderr.replace("\n", "")
    assert (
        "width, seed cannot change when a run is resumed (width is 32 there and 64 here, seed is 1337 there" in refused
    )
    refused = klora("train", "--resume", "--preset", "tiny", "--out", tmp_path, check=2).stderr.replace("\n", "")
    assert "--resume takes preset and data from the run (preset small, data /" in refused


@pytest.mark.slow
def test_how_a_step_is_shared_out_may_change_when_a_run_is_resumed(tmp_path, finished):
    """A smaller GPU, or fewer of them, may want that; the batch and the curve stay."""
    changes = {
        "as it was": (),
        "otherwise": ("micro_batch_tokens=64", "graph_collectives=between", "reduce_dtype=bfloat16"),
        "in parts": ("micro_batch_tokens=64", "gradient_buckets=2", "muon_gathers=3"),
    }
    curves = []
    for name, pairs in changes.items():
        shutil.copytree(finished, out := tmp_path / name)
        sets = [part for pair in ("max_steps=4", *pairs) for part in ("--set", pair)]
        klora("train", "--resume", "--out", out, *sets)
        curves.append([float(loss) for _, loss in losses(out)])
        stored = json.loads((out / "run.json").read_text())["train"]
        assert {f"{name}={value}" for name, value in stored.items()} >= {*pairs, "batch_tokens=256", "max_steps=4"}
        assert (stored["micro_batch_tokens"] == 64) == bool(pairs)
    assert len(curves[0]) == 4 and curves[1:] == [pytest.approx(curves[0], rel=1e-5)] * 2


@pytest.mark.slow
def test_a_run_that_is_older_than_the_ways_of_ranks_goes_on_with_their_defaults(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path, names = tmp_path / "run.json", ("gradient_buckets", "muon_gathers")
    run = json.loads(path.read_text())
    run["train"] = {name: value for name, value in run["train"].items() if name not in names}
    path.write_text(json.dumps(run))
    klora("train", "--resume", "--out", tmp_path, "--set", "max_steps=4", "--set", "muon_gathers=1")
    stored = json.loads(path.read_text())["train"]
    assert [stored[name] for name in names] == [1, 1] and len(losses(tmp_path)) == 4
