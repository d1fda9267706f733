"""What the tests themselves rely on: the interpreter's short cuts, forked commands, captured calls, what is traced."""

import ast
import dataclasses
import functools
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import is_covered, replayed, wait_for
from forks import Forked
from klora.kernels import rms_norm, rms_norm_ref

interpreted = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="of Triton's interpreter")


@interpreted
def test_the_interpreter_knows_the_same_numpy_dtypes_by_name():
    import triton.language as tl
    from triton.runtime import interpreter

    ours, theirs = interpreter._get_np_dtype, interpreter._get_np_dtype.__wrapped__
    scalars = (tl.int1, tl.int8, tl.uint16, tl.int32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float8e5)
    for scalar in scalars:
        for dtype in (scalar, tl.pointer_type(scalar), tl.pointer_type(tl.pointer_type(scalar))):
            for kind in (dtype, tl.block_type(dtype, [4, 8])):
                assert ours(kind) == ours(kind) == theirs(kind), kind


@interpreted
def test_types_and_tensors_of_the_interpreter_are_what_triton_makes():
    import triton.language as tl

    def made(cls, *arguments):
        ours, theirs = cls(*arguments), cls.__new__(cls)
        cls.__init__.__wrapped__(theirs, *arguments)
        assert ours.__class__ is theirs.__class__ and vars(ours).keys() == vars(theirs).keys()
        for name, value in vars(theirs).items():
            assert str(getattr(ours, name)) == str(value) and type(getattr(ours, name)) is type(value), name
        return ours

    for _ in range(2):
        for element in (tl.float32, tl.int1, tl.pointer_type(tl.float16), tl.pointer_type(tl.float16, const=True)):
            made(tl.tensor, object, element)
            for shape in ([4], [4, 8], [tl.constexpr(4), 8], tl.tuple([4, 8])):
                block = made(tl.block_type, element, shape)
                assert block.element_ty is element and made(tl.tensor, object, block).type is block
        for refused, error in (([3], ValueError), ([], TypeError), ([4.0], TypeError), ((4, 8), AssertionError)):
            with pytest.raises(error):
                tl.block_type(tl.float32, refused)


@interpreted
def test_the_language_is_patched_during_a_launch_alone_and_drops_only_a_check_that_is_not_made():
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

    x = torch.randn(3, 48)
    for _ in range(2):
        torch.testing.assert_close(rms_norm(x, backend="triton"), rms_norm_ref(x))
        assert is_builtin(tl.load) and is_builtin(tl.tensor.__add__)
    assert interpreter_builder.options == dataclasses.replace(InterpreterOptions(), sanitize_overflow=False)
    assert not interpreter_builder.options.debug, "with it the check of overflow would be an assertion"


def test_tests_of_kernels_alone_are_not_traced_by_coverage(request):
    folder = Path(__file__).parent
    assert not any(is_covered(folder / f"test_{name}.py") for name in ("mlp", "contract", "tolerance"))
    assert all(
        is_covered(folder / f"test_{name}.py")
        for name in ("model", "train", "ttt", "engine", "cli", "bench", "bench_report")
    )
    for item in request.session.items:
        assert bool(item.get_closest_marker("no_cover")) is not is_covered(item.path), item.nodeid


@functools.cache
def quick_tests(file: Path) -> list[str]:
    """The functions of a file that `make test-fast` runs, with some of their cases at least."""
    return [
        f"{file.name}::{function.name}"
        for function in ast.parse(file.read_text()).body
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
        if not any(re.match(r"pytest\.mark\.(slow|gpu)", ast.unparse(mark)) for mark in function.decorator_list)
    ]


@pytest.mark.parametrize("package", ["kernels", "model", "ttt", "cli", "bench"])
def test_quick_tests_cover_every_package(package):
    """In the files that name the package."""
    files = Path(__file__).parent.glob("test_*.py")
    naming = [file for file in files if re.search(rf"^(from|import) klora\.{package}\b", file.read_text(), re.M)]
    quick = [name for file in naming for name in quick_tests(file)]
    assert len(quick) >= 50, quick


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_replayed_call_has_run_as_often_as_it_says_and_reads_its_inputs_again():
    x, calls = torch.ones(3, device="cuda"), []

    def call():
        calls.append(torch.cuda.is_current_stream_capturing())
        return [x * 2]

    (doubled,), replay = replayed(call, warm_up=2)
    assert calls == [False, False, True] and doubled.isnan().all()
    for value in (3.0, 4.0):
        x.fill_(value)
        replay()
        assert torch.equal(doubled, x * 2)


@pytest.mark.slow
def test_a_forked_command_is_what_python_runs(tmp_path):
    code = """import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), dict(os.environ), __name__, "torch" in sys.modules, "pytest" in sys.modules]))
print("words", file=sys.stderr)
sys.exit(3)"""
    process = Forked(["-c", code, "one", 2], tmp_path, {"NAME": "value"})
    output, errors = process.communicate()
    assert json.loads(output) == [["-c", "one", "2"], str(tmp_path), {"NAME": "value"}, "__main__", True, False]
    assert errors == "words\n" and process.returncode == process.wait() == 3

    (tmp_path / "script.py").write_text("import neighbour, sys\nprint(__file__, sys.argv)\nraise SystemExit('no')")
    (tmp_path / "neighbour.py").write_text("")
    script = str(tmp_path / "script.py")
    process = Forked([script, "x"])
    assert process.communicate() == (f"{script} {[script, 'x']}\n", "no\n") and process.returncode == 1

    process = Forked(["-m", "json.tool", "--no-such-option"])
    assert "usage" in process.communicate()[1] and process.returncode == 2

    process = Forked(["-c", "1 / 0"])
    assert "ZeroDivisionError" in process.communicate()[1] and process.returncode == 1


@pytest.mark.slow
def test_signals_reach_a_forked_command(tmp_path):
    code = "import pathlib, signal\npathlib.Path('ready').touch()\nsignal.pause()"
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, -signal.SIGTERM)):
        process = Forked(["-c", code], tmp_path)
        wait_for((tmp_path / "ready").exists, process)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait() == status == process.poll()
        process.send_signal(number)  # to one that has ended: nothing
        (tmp_path / "ready").unlink()
