"""Kernels compiled ahead: what is recorded without a launch, the processes that compile it, and who asks for it."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from klora.cli import warm as warm_module
from klora.cli.console import Output
from klora.cli.warm import Work, warmed
from klora.kernels import precompile
from klora.model.config import ConfigError, Preset, TrainConfig
from klora.model.placement import rows_per_rank
from klora.ttt.protocols import ttt_preset
from test_cli import klora

CUDA = torch.cuda.is_available()
GPU = torch.device("cuda")
ZERO = "integer division or modulo by zero"

NO_GPU = """
import torch
from hopper import pretend

pretend()
CPU = torch.device("cpu")
"""
"""Kernels can be asked for on CPU tensors, and none of them could be launched."""

COMPILED = """
import dataclasses, json
from klora.kernels import linear, rms_norm
from klora.kernels.precompile import compile_all, is_cached, recorded

def work():
    x = torch.ones(32, 64, dtype=torch.bfloat16)
    rms_norm(linear(x, x, backend="triton"), backend="triton")

if __name__ == "__main__":
    found = recorded(work)
    first, second = found.values()
    assert recorded(work).keys() == found.keys()
    second.function.hash = first.hash  # hashed in another order it would have another key
    bad = dataclasses.replace(second, signature={name: "*nothing" for name in second.signature})
    done = []
    before = [is_cached(key, one.name) for key, one in found.items()]
    failed = compile_all([bad, first, second], 1, lambda *counts: done.append(counts))
    after = [is_cached(key, one.name) for key, one in found.items()]

    from triton import knobs
    hits = []
    knobs.compilation.listener = lambda cache_hit, **about: hits.append(cache_hit)
    for one in found.values():
        one.compile()
    print(json.dumps([before, failed, done, after, hits]))
"""

RECORDED = """
import dataclasses, json
import klora.model.gpt, klora.model.optimizers
from klora.cli import warm
from klora.kernels import dispatch, precompile
from klora.kernels.attention import backward
from klora.model.config import Preset, TrainConfig
from klora.ttt.protocols import ttt_preset
from conftest import SMALL

klora.model.gpt.pick_backend = klora.model.optimizers.pick_backend = lambda *about: "triton"
warm.why_not_here = lambda *about: ""
train = TrainConfig(batch_tokens=256, micro_batch_tokens=128, dtype="float32", fused="true", attention="klora")
preset = Preset("small", dataclasses.replace(SMALL, width=64), train, about="a test's")
step = warm.record(warm.training(preset, CPU), CPU)
precompile._forget_hashes()
backward._dkdv_kernel.cache_key  # before those of the functions that it calls
assert warm.record(warm.training(preset, CPU), CPU).keys() == step.keys()
config = ttt_preset().override({"batch": "32", "window": "64", "chunk": "32", "adapt_from": "16"})
model = warm.untrained(preset, CPU)
scores = [warm.record(warm.scoring(model, config, slots, backend="triton"), CPU) for slots in warm.SLOTS]

import numpy as np
import torch
from klora.ttt import base
from klora.ttt.documents import Document

# A product's tile depends on its rows, on a GPU's number of multiprocessors.
base.MICRO_TOKENS["cpu"], dispatch.multiprocessors = 4096, lambda device: 12
torch.set_num_threads(1)
model.configure(CPU, torch.bfloat16)
ahead = warm.record(warm.scoring(model, config, 24, backend="triton"), CPU)
texts = [Document(str(n), np.zeros(n, np.uint16), n) for n in range(8, 200, 8)]
late = warm.record(warm.Work({}, lambda: base.BaseNll(model, texts, config, backend="triton")), CPU)
assert len(late) > 10 and not late.keys() - ahead.keys(), {late[key].name for key in late.keys() - ahead.keys()}
modules = [sorted({one.function.fn.__module__.split(".")[2] for one in found.values()}) for found in (step, *scores)]
print(json.dumps([modules, [list(found) for found in (step, *scores)]]))
"""

HF = """
import json
from functools import partial

import numpy as np
import torch
from klora.kernels import dispatch

dispatch.resolve_backend, dispatch.multiprocessors = (lambda backend, tensor: backend or "triton"), lambda device: 12
from klora.bench import hf
from klora.cli.warm import record, scoring
from klora.kernels.precompile import recorded
from klora.ttt.base import BaseNll
from klora.ttt.documents import Document
from klora.ttt.engine import engine_of
from klora.ttt.hf_model import HfModel
from klora.ttt.protocols import ttt_preset
from klora.ttt.queue import Deadline
from tiny_hf import tiny_llama

torch.set_num_threads(1)
module = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
config = ttt_preset("hf").override({"batch": "20", "window": "64", "chunk": "32"})
model = HfModel(module, config)
work = scoring(model, config, 6)
ahead = record(work, CPU)
assert model.lora is None and json.dumps(work.facts)
texts = [Document(str(n), np.zeros(n, np.int32), n) for n in (40, 90, 130, 200, 65, 300)]

def run():
    BaseNll(model, texts, config)
    engine_of(model, config, texts, capture=False).adapt(texts, Deadline(0))

late = recorded(run)
model.close()
benched = recorded(partial(hf.launches, module, config, 6))
print(json.dumps([list(one) for one in (ahead, late, benched)] + [sorted({one.name for one in late.values()})]))
"""


def python(code: str, cache) -> list:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path]))
    path = cache.parent / "script.py"
    path.write_text(NO_GPU + code)
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("there", [True, False], ids=["a GPU", "no GPU"])
def test_what_launches_a_kernel_is_made_with_it_where_there_is_a_gpu(monkeypatch, there):
    made = []
    stub = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: there))
    monkeypatch.setattr(precompile, "backends", {"stub": stub})
    active = SimpleNamespace(active=SimpleNamespace(launcher_cls=lambda *about: made.append(about)))
    monkeypatch.setattr(precompile, "driver", active)
    monkeypatch.setattr(precompile.triton, "compile", lambda source, **about: SimpleNamespace(src=source, metadata=5))
    monkeypatch.setattr(precompile.Compilation, "source", lambda one: "source")
    precompile.Compilation(None, {}, {}, {}, {}, None, "").compile()
    assert made == ([("source", 5)] if there else [])


@pytest.mark.slow
def test_processes_fill_the_cache_where_a_launch_would_look(tmp_path):
    """One that cannot be compiled is named, and the others are compiled all the same."""
    before, failed, done, after, hits = python(COMPILED, tmp_path / "cache")
    assert before == [False] * 2 and after == hits == [True] * 2
    assert done == [[1, 3], [2, 3], [3, 3]] and len(failed) == 1
    assert re.fullmatch(r"\w+: \w+: .+", failed[0])


@pytest.mark.slow
def test_a_training_step_and_scoring_are_recorded_without_a_gpu(tmp_path):
    """Nothing could be launched there. A pool of 17 slots takes other kernels than one of 16."""
    (step, *scores), (step_keys, *score_keys) = python(RECORDED, tmp_path / "cache")
    assert {"attention", "embedding", "fold", "lora_head_nll", "newton_schulz", "rms_norm"} <= set(step)
    assert all({"attention", "lora_adam", "lora_head_nll", "lora_qkv", "rms_norm"} <= set(score) for score in scores)
    assert len(step_keys) > 20 and len(score_keys[0]) > 20
    assert 0 < len(set(score_keys[1]) - set(score_keys[0])) < len(score_keys[1])
    assert not (tmp_path / "cache").exists(), "recording compiles nothing"


@pytest.mark.slow
def test_scoring_a_model_of_transformers_launches_what_is_recorded_ahead(tmp_path):
    """Of documents of any length, by `klora score --hf` and by its benchmark, which has a gate in fp32, too."""
    pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")
    ahead, late, benched, names = python(HF, tmp_path / "cache")
    assert set(late) <= set(ahead) and set(late) <= set(benched) and len(benched) > len(ahead)
    assert {"_reduce_kernel", "_adam", "sweep", "_after_kernel", "_add_kernel"} <= set(names)


def test_a_benchmark_compiles_ahead_and_goes_on_where_that_fails(monkeypatch, tmp_path, capsys):
    pytest.importorskip("klora.bench.ahead")
    from klora.bench.ahead import compiled_ahead

    kernels = Kernels(monkeypatch, tmp_path, 5, failing=1)
    found = compiled_ahead(lambda: None, GPU)
    assert found.pop("seconds") >= 0
    assert found == {"kernels": 5, "compiled": 4, "failed": ["kernel 0: no reason"]}
    assert compiled_ahead(lambda: None, torch.device("cpu")) == {} and kernels.recordings == 1
    assert compiled_ahead(lambda: 1 // 0, GPU) == {"failed": ["it raises ZeroDivisionError: " + ZERO]}
    assert f"klora: kernels were not compiled ahead: it raises ZeroDivisionError: {ZERO}" in capsys.readouterr().err


class Kernels:
    """Stands in for Triton's cache, and for the processes that fill it."""

    def __init__(self, monkeypatch, folder, count: int, failing: int = 0):
        from klora.kernels import precompile

        self.found = {f"key {i}": Kernel(f"kernel {i}") for i in range(count)}
        self.cached, self.failing, self.recordings = set(), failing, 0
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
        monkeypatch.setattr(precompile, "is_cached", lambda key, name: key in self.cached and name in key_name(key))
        monkeypatch.setattr(precompile, "compile_all", self.compile_all)
        monkeypatch.setattr(precompile, "recorded", self.recorded)

    def recorded(self, work):
        self.recordings += 1
        work()
        return self.found

    def compile_all(self, missing, jobs, progress):
        good = missing[self.failing :]
        self.cached |= {key for key, one in self.found.items() if one in good}
        return [f"{one.name}: no reason" for one in missing[: self.failing]]


class Kernel:
    def __init__(self, name: str):
        self.name = name


def key_name(key: str) -> str:
    return key.replace("key", "kernel")


def work_of(**facts) -> Work:
    return Work(facts, lambda: None)


class TestWarmed:
    """As if there were a GPU: what `klora train` and `klora score` do at their start."""

    def test_it_says_so_and_later_runs_see_at_once_that_all_is_there(self, monkeypatch, tmp_path, capsys):
        kernels = Kernels(monkeypatch, tmp_path, 5)
        warmed(work_of, GPU, Output())
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "compiling 5 kernels side by side, once on this machine; --no-warm leaves them to the run"
        assert said[1].startswith("5 kernels compiled in ") and said[1].endswith(f" s, kept in {tmp_path}")
        warmed(work_of, GPU, Output())
        assert kernels.recordings == 1 and not capsys.readouterr().out

    @pytest.mark.slow
    def test_what_is_gone_from_the_cache_is_compiled_again(self, monkeypatch, tmp_path, capsys):
        kernels = Kernels(monkeypatch, tmp_path, 9)
        warmed(work_of, GPU, Output())
        kernels.cached -= {f"key {i}" for i in range(4)}
        warmed(work_of, GPU, Output())
        assert kernels.recordings == 2 and "\n4 kernels compiled" in capsys.readouterr().out
        assert len(kernels.cached) == 9

    @pytest.mark.slow
    def test_other_settings_and_other_code_have_lists_of_their_own(self, monkeypatch, tmp_path):
        kernels = Kernels(monkeypatch, tmp_path, 5)
        for make in (work_of, lambda: work_of(width=64), lambda: work_of(width=32)):
            warmed(make, GPU, Output(as_json=True))
        assert kernels.recordings == 3
        monkeypatch.setattr(warm_module, "__version__", "0.0.1")
        warmed(work_of, GPU, Output(as_json=True))
        assert kernels.recordings == 4 and len(list(tmp_path.glob("klora/*.json"))) == 4

    def test_a_few_are_left_to_the_run(self, monkeypatch, tmp_path, capsys):
        kernels = Kernels(monkeypatch, tmp_path, 3)
        warmed(work_of, GPU, Output())
        assert not kernels.cached and not capsys.readouterr().out

    @pytest.mark.parametrize("part", ["make", "record", "compile", "list"])
    def test_no_failure_ends_the_run(self, monkeypatch, tmp_path, capsys, part):
        def fail(*arguments):
            raise MemoryError("no more")

        kernels = Kernels(monkeypatch, tmp_path, 5)
        if part == "compile":
            kernels.compile_all = fail
            monkeypatch.setattr("klora.kernels.precompile.compile_all", fail)
        if part == "list":
            (tmp_path / "klora").write_text("a file where the folder should be")
        make = {"make": fail, "record": lambda: Work({}, fail)}.get(part, work_of)
        warmed(make, GPU, Output())
        (said,) = filter(None, capsys.readouterr().err.splitlines())
        assert said.startswith("klora: kernels were not compiled ahead (")

    def test_a_kernel_that_does_not_compile_is_named(self, monkeypatch, tmp_path, capsys):
        Kernels(monkeypatch, tmp_path, 6, failing=2)
        warmed(work_of, GPU, Output())
        said = capsys.readouterr()
        assert said.err.strip() == "klora: 2 kernels could not be compiled ahead; the first: kernel 0: no reason"
        assert "\n4 kernels compiled in" in said.out

    def test_of_several_processes_one_compiles_and_the_others_wait_for_it(self, monkeypatch, tmp_path, capsys):
        """Four scorings at once, by hand or by a launcher, compiled the same kernels four times."""
        kernels, others = Kernels(monkeypatch, tmp_path, 5), []
        compile_all = kernels.compile_all

        def slowly(*arguments):
            others.extend(threading.Thread(target=warmed, args=(work_of, GPU, Output())) for _ in range(3))
            for other in others:
                other.start()
            until = time.monotonic() + 60
            while capsys_said() < 3 and time.monotonic() < until:
                time.sleep(0.01)
            return compile_all(*arguments)

        said = []

        def capsys_said() -> int:
            said.append(capsys.readouterr().out)
            return "".join(said).count("another process compiles kernels on this machine; waiting for them")

        monkeypatch.setattr("klora.kernels.precompile.compile_all", slowly)
        warmed(work_of, GPU, Output())
        for other in others:
            other.join(timeout=60)
        assert capsys_said() == 3 and kernels.recordings == 1 and len(kernels.cached) == 5
        assert "".join(said).count("kernels compiled in") == 1

    def test_one_that_stands_still_is_not_waited_for_for_ever(self, monkeypatch, tmp_path, capsys):
        kernels = Kernels(monkeypatch, tmp_path, 5)
        monkeypatch.setattr(warm_module, "TURN", 0.3)
        (tmp_path / "klora").mkdir()
        with open(tmp_path / "klora" / "compiling.lock", "wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            warmed(work_of, GPU, Output())
        assert kernels.recordings == 1 and len(kernels.cached) == 5

    def test_a_folder_without_locks_is_as_good(self, monkeypatch, tmp_path):
        def unable(*about):
            raise OSError(errno.ENOLCK, "no locks available")

        kernels = Kernels(monkeypatch, tmp_path, 5)
        monkeypatch.setattr(warm_module.fcntl, "flock", unable)
        warmed(work_of, GPU, Output())
        assert kernels.recordings == 1 and len(kernels.cached) == 5

    def test_without_a_gpu_there_is_nothing_to_do(self):
        warmed(lambda: pytest.fail("nothing is recorded"), torch.device("cpu"), Output())


@pytest.mark.slow
def test_the_command_compiles_what_is_missing_and_says_where_nothing_was_to_do(monkeypatch, tmp_path, capsys):
    kernels = Kernels(monkeypatch, tmp_path, 5)
    monkeypatch.setattr(warm_module, "require_gpu", lambda device: torch.device("cpu"))
    monkeypatch.setattr(warm_module, "untrained", lambda *about: None)
    monkeypatch.setattr(warm_module, "training", lambda *about: work_of(part="training"))
    monkeypatch.setattr(warm_module, "scoring", lambda *about: work_of(part="scoring", slots=about[2]))
    warm_module.warm(set_=["blocks=2"])
    assert kernels.recordings == 3 and capsys.readouterr().out.startswith("5 kernels compiled in ")
    warm_module.warm(train=True, set_=["blocks=2"])
    assert capsys.readouterr().out == f"nothing to do: all 5 kernels are in {tmp_path}\n"
    warm_module.warm(score=True, set_=["blocks=2"], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert kernels.recordings == 6 and (found["kernels"], found["compiled"], found["cache"]) == (5, 0, str(tmp_path))
    assert set(found) == {"kernels", "compiled", "failed", "cache", "seconds"}


def test_the_scoring_is_that_of_the_preset_that_is_named(monkeypatch, tmp_path):
    Kernels(monkeypatch, tmp_path, 5)
    monkeypatch.setattr(warm_module, "require_gpu", lambda device: torch.device("cpu"))
    monkeypatch.setattr(warm_module, "untrained", lambda *about: None)
    seen = []
    monkeypatch.setattr(warm_module, "scoring", lambda *about: seen.append(about[1]) or work_of(slots=about[2]))
    warm_module.warm(score=True)
    warm_module.warm(score=True, scoring_preset="contest")
    assert seen == [ttt_preset("quick")] * 2 + [ttt_preset("contest")] * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu"], "there is nothing to compile for cpu: the kernels run on a CUDA GPU"),
        (["model.klora", "--preset", "tiny"], "an artifact is scored, not trained; leave out --preset"),
        (["model.klora", "--train"], "an artifact is scored, not trained"),
        (["--preset", "seed", "--weights", "int6"], "--weights int6 was given without an artifact"),
        (["--scoring", "slow"], "there is no preset 'slow'; allowed: design, quick, thorough, best, contest, hf"),
        (["--scoring", "best", "--train"], "--scoring best was given with --train, which leaves scoring out"),
    ],
)
def test_what_it_refuses(arguments, says):
    done = klora("warm", *arguments, check=2)
    assert says in done.stderr and "Traceback" not in done.stderr


def test_a_batch_that_cannot_be_shared_out_is_refused_as_training_refuses_it():
    train = TrainConfig(batch_tokens=100, micro_batch_tokens=64)
    with pytest.raises(ConfigError, match="batch_tokens=100 is not possible; allowed: multiples of .*, 64 x 2"):
        rows_per_rank(Preset("small", SMALL, train, about=""), world=2)


def compile_nothing(code: str, parts: tuple[str, ...], folder: Path, after_the_first: dict[str, str] | None = None):
    """Run each part of a script in a process of its own, all with one cache; each prints what it compiled."""
    (folder / "script.py").write_text(code)
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for number, part in enumerate(parts):
        more = (after_the_first or {}) if number else {}
        command = [sys.executable, folder / "script.py", part]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [], part


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
def test_on_a_gpu_a_run_compiles_nothing_that_was_not_compiled_ahead(tmp_path):
    """In a fresh cache: what was compiled ahead is what the fused step, or the engine, of a later process launches. Nor
    is anything left to a C compiler, which Triton 3.6 has make launchers."""
    code = """
import json, sys
import torch
from klora.cli.warm import record, scoring, training, untrained
from klora.kernels.precompile import compile_all
from klora.model.config import preset
from klora.model.fused import FusedStep
from klora.model.parallel import Ranks
from klora.ttt.engine import Engine
from klora.ttt.protocols import ttt_preset

def main(part):
    from triton import knobs
    device, chosen = torch.device("cuda"), preset("seed").override({"attention": "klora", "batch_tokens": "16384"})
    config, model = ttt_preset().override({"batch": "16"}), untrained(chosen, device)
    missed = []
    knobs.compilation.listener = lambda src, cache_hit, **about: cache_hit or missed.append(src.name)
    if part == "ahead":
        found = record(training(chosen, device), device)
        found |= record(scoring(model.requires_grad_(False), config, 64), device)
        missed = compile_all(list(found.values()))
        assert len(found) > 40
    elif part == "train":
        model.chosen_attention = "klora"
        step = FusedStep(model, chosen.train, 16384 // chosen.model.train_length, 1, Ranks(0, 1, device))
        step.run([torch.ones(step.rows, chosen.model.train_length + 1, dtype=torch.int32)], 0, 1.0)
    else:
        Engine(model.requires_grad_(False), config, 4096, slots=64).prepare()
    torch.cuda.synchronize()
    print(json.dumps(missed))

if __name__ == "__main__":
    main(sys.argv[1])
"""
    compile_nothing(code, ("ahead", "train", "score"), tmp_path, {"CC": "false"})


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
def test_on_a_gpu_scoring_a_model_of_transformers_compiles_nothing_that_was_not_compiled_ahead(tmp_path):
    pytest.importorskip("transformers", reason="pip install -e '.[test]' brings transformers")
    code = """
import json, sys
import numpy as np
import torch
from klora.cli.warm import record, scoring
from klora.kernels.precompile import compile_all
from klora.ttt.documents import Document
from klora.ttt.hf_model import HfModel
from klora.ttt.pipeline import ScoreRequest, score
from klora.ttt.protocols import ttt_preset
from tiny_hf import tiny_llama

def main(part):
    from triton import knobs
    config = ttt_preset("hf").override({"batch": "16", "window": "64", "chunk": "32"})
    model = HfModel(tiny_llama(tie_word_embeddings=True).to("cuda", torch.bfloat16), config)
    missed = []
    knobs.compilation.listener = lambda src, cache_hit, **about: cache_hit or missed.append(src.name)
    if part == "ahead":
        found = record(scoring(model, config, 6), model.device)
        missed = compile_all(list(found.values()))
        assert len(found) > 20
    else:
        texts = [Document(str(n), np.full(n, 7, np.int32), n) for n in (40, 90, 130, 200, 65, 300)]
        assert score(ScoreRequest(model, texts, config)).facts["engine"]["captured"]
    torch.cuda.synchronize()
    print(json.dumps(missed))

if __name__ == "__main__":
    main(sys.argv[1])
"""
    compile_nothing(code, ("ahead", "score"), tmp_path)
