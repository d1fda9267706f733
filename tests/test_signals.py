"""Signals while training: heard at the next safe point, and the second one at once."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from klora.model.curve import LossCurve
from klora.model.train import Trainer
from test_train import ALONE, losses, small_preset


@pytest.mark.slow
def test_a_signal_in_the_last_phase_loses_nothing(tmp_path, data):
    """SIGTERM while the averages are evaluated: the run finishes, and a kill then would have left a checkpoint."""
    trainer = Trainer(small_preset(), data, tmp_path, ALONE)
    validate, seen = trainer._validate, []

    def interrupted():
        seen.append((tmp_path / "checkpoint.safetensors").exists())
        signal.raise_signal(signal.SIGTERM)
        return validate()

    trainer._validate = interrupted
    assert trainer.run().status == "finished" and all(seen) and seen
    assert (tmp_path / "model.safetensors").exists()
    longer = Trainer(small_preset(max_steps=15), data, tmp_path, ALONE, resume=True)
    assert longer.step == 12 and longer.run().step == 15


def test_a_second_interrupt_is_obeyed_at_once(tmp_path, data):
    def interrupt_twice(row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Trainer(small_preset(), data, tmp_path, ALONE).run(interrupt_twice)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint_unless_that_was_ignored(tmp_path, data, before):
    def close(row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGHUP)

    earlier = signal.signal(signal.SIGHUP, before)
    try:
        result = Trainer(small_preset(max_steps=4), data, tmp_path, ALONE).run(close)
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, earlier)
    if before is signal.SIG_IGN:  # nohup
        assert result.status == "finished"
    else:
        assert (result.status, result.signal) == ("interrupted", signal.SIGHUP)
        assert Trainer(small_preset(), data, tmp_path, ALONE, resume=True).step == result.step < 4


@pytest.mark.slow
def test_a_signal_is_heard_between_micro_batches_and_nothing_is_lost(tmp_path, data):
    whole, part = tmp_path / "whole", tmp_path / "part"
    preset = small_preset(micro_batch_tokens=64, max_steps=6)
    Trainer(preset, data, whole, ALONE).run()
    trainer, calls = Trainer(preset, data, part, ALONE), []
    nll = trainer.model.nll

    def counted(x, y, **more):
        calls.append(x)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
        return nll(x, y, **more)

    trainer.model.nll = counted
    stopped = trainer.run()
    assert (stopped.status, stopped.step, len(calls)) == ("interrupted", 2, 10)
    Trainer(preset, data, part, ALONE, resume=True).run()
    assert losses(part) == losses(whole)


def test_a_signal_is_heard_within_a_validation(tmp_path, data):
    trainer = Trainer(small_preset(validate_seconds=1e-6, micro_batch_tokens=64), data, tmp_path, ALONE)
    calls, nll = [], trainer.model.nll

    def counted(x, y, **more):
        calls.append(torch.is_grad_enabled())
        if len(calls) == 6:  # the second of the first validation's eight
            signal.raise_signal(signal.SIGINT)
        return nll(x, y, **more)

    trainer.model.nll = counted
    assert trainer.run().status == "interrupted"
    assert calls == [True] * 4 + [False] * 2
    assert [row["validation_bpb"] for row in LossCurve(tmp_path, resume_at=1).rows()] == [""]


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait_for_the_operation_in_progress():
    script = """
import hashlib, sys
from klora.model.signals import StopSignals
with StopSignals(lambda text: print(text, flush=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**28)  # minutes in one call that no Python handler interrupts
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again ends at once" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()


def test_signals_outside_the_main_thread_stay_as_they_are(tmp_path, data):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(lambda: Trainer(small_preset(max_steps=2), data, tmp_path, ALONE).run()).result()
    assert result.status == "finished"
