"""What an import and a command load, and that names which are imported late are all there."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import klora
import pytest
import torch
from forks import Forked
from klora.cli.app import COMMANDS, command_of

SUBPACKAGES = ("kernels", "lora", "model", "ttt", "bench", "cli")
HEAVY = ("torch", "numpy", "triton", "sympy", "torch._dynamo", "torch._inductor", "matplotlib", "rich")
LAZY = ("klora", "klora.kernels", "klora.lora", "klora.model", "klora.ttt") + tuple(
    f"klora.kernels.{path.parent.name}"
    for path in sorted(Path(importlib.import_module("klora.kernels").__file__).parent.glob("*/__init__.py"))
)


def python(code: str, *arguments: str):
    """What `code` prints as JSON in a new interpreter."""
    command = [sys.executable, "-c", f"import json, sys, time\n{code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def python_with_torch(code: str):
    """The same in an interpreter that has torch already, where that changes nothing."""
    process = Forked(["-c", f"import json, sys\n{code}"])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def loaded_by(code: str) -> set[str]:
    return set(python(f"{code}\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"))


def test_scoring_loads_no_training():
    code = """
import klora.cli.scoring
print(json.dumps([name for name in sys.modules if name.startswith("klora.model.")]))"""
    loaded = set(python_with_torch(code))
    assert "klora.model.artifact" in loaded
    assert not {f"klora.model.{name}" for name in ("train", "fused", "eager", "muon", "optimizers")} & loaded


def test_adapters_load_of_the_model_what_reads_their_files():
    code = """
from klora.lora import attach
others = "klora.model.", "klora.ttt", "peft", "transformers"
print(json.dumps([name for name in sys.modules if name.startswith(others)]))"""
    assert python_with_torch(code) == ["klora.model.reading"]


@pytest.mark.slow
def test_what_an_import_loads():
    assert loaded_by("import klora; klora.__version__; klora.KloraError") == set()
    references = "from klora.kernels import lora_qkv_ref, lora_qkv_rope_ref, lora_head_nll_ref, pick_attention"
    by_torch, by_references = python(f"""loaded = lambda: [name for name in {HEAVY} if name in sys.modules]
import torch; by_torch = loaded()
import klora.kernels, klora.lora, klora.model, klora.ttt; {references}
print(json.dumps([by_torch, loaded()]))""")
    assert {"triton", "torch._dynamo"}.isdisjoint(by_torch), "this test shows nothing where torch loads them itself"
    assert by_references == by_torch
    assert "torch._dynamo" not in loaded_by(
        "from klora.kernels import *; from klora.lora import *; from klora.model import *"
    )


@pytest.mark.slow
def test_loading_and_adapting_a_model_import_no_sympy(tmp_path):
    """PyTorch imports it for tensors on the meta device and for gradients that it is given."""
    assert "sympy" not in python(f"""
import numpy as np, torch
from klora.model import GPT, ModelConfig, load_artifact, save_artifact
from klora.model.loading import model_from_artifact
from klora.ttt.documents import Document
from klora.ttt.engine import Engine
from klora.ttt.protocols import TTTConfig
from klora.ttt.queue import Deadline
config = ModelConfig(vocab_size=300, width=32, blocks=2, heads=2, kv_heads=1, mlp_hidden=64, train_length=64)
save_artifact({str(tmp_path / "m.klora")!r}, GPT(config).state_dict(), config, b"", {{"steps": 0}})
model = model_from_artifact(load_artifact({str(tmp_path / "m.klora")!r}), torch.device("cpu"), "dense")
ttt = TTTConfig(chunk=16, window=32, min_tokens=2, lora_rank=2, head_rank=2, batch=2, deadline=0.0, epochs=1)
document = Document("one", np.arange(1, 50, dtype=np.uint16), 49)
adapted = Engine(model, ttt, 50, slots=2, backend="triton").adapt([document], Deadline(0))
assert adapted.targets.tolist() == [48]
print(json.dumps(sorted(sys.modules)))""")


@pytest.mark.slow
def test_importing_the_kernels_takes_at_most_a_seventh_longer_than_what_they_need():
    """The package needs torch, three ops Triton as well. CPU seconds, up to three times: other work only adds."""
    code = """def seconds(statement):
    start = time.process_time()
    exec(statement)
    return time.process_time() - start
ops = "from klora.kernels import lora_qkv, linear, softcap_nll"
print(json.dumps([seconds(part) for part in ("import torch", "import klora.kernels", "import triton", ops)]))"""
    runs = []
    for _ in range(3):
        runs.append(python(code))
        package = min(sum(run[:2]) for run in runs) / min(run[0] for run in runs)
        with_ops = min(map(sum, runs)) / min(run[0] + run[2] for run in runs)
        if max(package, with_ops) <= 1.15:
            return
    raise AssertionError(runs)


@pytest.mark.parametrize("option", ["--version", pytest.param("--help", marks=pytest.mark.slow)])
def test_version_and_help_are_fast_and_load_no_torch(option):
    code = f"""sys.argv = ["klora", {option!r}]
from klora.cli import main
try: main()
except SystemExit as exit: assert not exit.code
print(json.dumps([time.process_time(), "torch" in sys.modules]))"""
    seconds, has_torch = min(python(code) for _ in range(3))
    assert seconds < 0.5 and not has_torch


@pytest.mark.slow
def test_a_command_loads_no_other():
    code = """sys.argv = ["klora", "generate", "--help"]
from klora.cli import main
try: main()
except SystemExit: pass
print(json.dumps([name for name in sys.modules if name.startswith(("klora.bench", "klora.cli", "klora.ttt"))]))"""
    assert set(python_with_torch(code)) == {
        f"klora.cli{name}" for name in ("", ".app", ".console", ".generate", ".options")
    }


def test_the_list_of_commands_says_what_each_says_of_itself():
    for name, first_line in COMMANDS.items():
        assert command_of(name).help.split("\n\n")[0].replace("\n", " ") == first_line


@pytest.mark.parametrize("name", LAZY)
def test_names_that_are_imported_late_are_all_there(name):
    package = importlib.import_module(name)
    tree = ast.parse(inspect.getsource(package))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    statements = [statement for statement in block.body if statement.module]
    late = {alias.name: f"{name}.{statement.module}" for statement in statements for alias in statement.names}
    assert late.keys() <= set(package.__all__) <= set(dir(package))
    for exported in package.__all__:
        value = getattr(package, exported)
        assert not isinstance(value, types.ModuleType)
        if exported in late:
            assert value is getattr(importlib.import_module(late[exported]), exported)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        package.no_such_name  # noqa: B018


@pytest.mark.slow
def test_the_packages_are_there_with_klora_alone():
    code = (
        "import klora\nprint(json.dumps([klora.kernels.BOS_ID, klora.ttt.ttt_preset().lr, klora.model.GPT.__name__]))"
    )
    assert python_with_torch(code) == [1, klora.ttt.ttt_preset().lr, "GPT"]
    assert {"kernels", "lora", "model", "ttt"} <= set(dir(klora))


@pytest.mark.slow
def test_an_op_asked_for_late_is_registered_compiles_whole_and_goes_before_its_module():
    """`kernels.linear` is the function, also where the module of that name was imported first."""
    code = """import torch, klora.kernels
before = hasattr(torch.ops.klora, "linear")
x, w = torch.ones(4, 16), torch.ones(8, 16)
function = lambda x, w: klora.kernels.linear(x, w) + klora.kernels.rms_norm_ref(x)[:, :8]
compiled = torch.compile(function, fullgraph=True, backend="eager")(x, w)
print(json.dumps([before, hasattr(torch.ops.klora, "linear"), torch.equal(compiled, function(x, w))]))"""
    assert python_with_torch(code) == [False, True, True]
    module_first = "import klora.kernels.linear.op, klora.kernels.lora_attention, klora.kernels as k\n"
    names = "print(json.dumps([k.linear.__name__, k.lora_attention.__name__]))"
    assert python_with_torch(module_first + names) == ["linear", "lora_attention"]


def every_class() -> list[type]:
    folders = {name: Path(importlib.import_module(f"klora.{name}").__file__).parent for name in SUBPACKAGES}
    modules = [
        importlib.import_module(f"klora.{name}.{'.'.join(path.relative_to(folder).with_suffix('').parts)}")
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
        if path.stem not in ("__init__", "__main__", "bench_entries")
    ]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]


def test_every_error_for_users_is_a_klora_error():
    errors = [c for c in every_class() if issubclass(c, Exception) and not c.__name__.startswith("_")]
    assert len(errors) >= 16
    for error in errors:
        assert issubclass(error, klora.KloraError), error
        assert issubclass(error, ValueError | RuntimeError), error  # as callers caught them before


@pytest.mark.parametrize("error", [klora.KloraError("what\nto do"), OSError("disk"), MemoryError("too much")])
def test_an_error_for_users_ends_the_command_with_its_sentence(error, monkeypatch, capsys):
    from klora.cli import app

    def fail():
        raise error

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(sys, "argv", ["klora"])
    with pytest.raises(SystemExit, match="2"):
        app.main()
    assert capsys.readouterr().err == f"klora: {error}\n"


def test_memory_that_is_short_is_said_and_any_other_error_is_shown_whole(monkeypatch, capsys):
    from klora.cli import app

    def fail(error):
        raise error

    monkeypatch.setattr(app, "app", lambda: fail(torch.OutOfMemoryError("2 GiB")))
    with pytest.raises(SystemExit, match="2"):
        app.main()
    assert re.match(r"klora: out of GPU memory \(2 GiB\); give a smaller", capsys.readouterr().err)
    monkeypatch.setattr(app, "app", lambda: torch.empty(2**55))
    with pytest.raises(SystemExit, match="2"):
        app.main()
    assert re.match(r"klora: out of memory \(.*can't allocate memory.*\); give a smaller", capsys.readouterr().err)
    monkeypatch.setattr(app, "app", lambda: fail(MemoryError()))
    with pytest.raises(SystemExit, match="2"):
        app.main()
    assert capsys.readouterr().err == "klora: out of memory\n"
    monkeypatch.setattr(app, "app", lambda: fail(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        app.main()
