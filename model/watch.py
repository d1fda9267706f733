"""Who is still there: every rank's pulse in the launcher's store, and an orderly end for all where one is missing.

Two threads in each rank. One gives this rank's pulse to the store about once a second and reads those of the others, on
a connection of its own: a call may wait for ever where the launcher stands still. The other one judges, and waits for
nobody. A rank is lost when its pulse stands still for `patience` seconds. It is stuck when its main thread, which is
not waiting for others, has come no further for half as long again, and for four times its longest stretch so far. A
rank that waits in a collective is neither: its threads go on.

Then training ends on every rank, whatever its main thread waits for. `alive` becomes 0, from which on no step changes a
weight. The lowest rank that is left writes the state after the last finished step and says so. All leave by os._exit: a
collective with a dead rank never returns, and neither would an orderly teardown. No communicator is aborted. Its
kernels would end with sums that lack a rank's part; as it is the hung ones end with their process, and the weights are
copied on a stream beside them.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

PATIENCE = 30.0
"""Seconds without a pulse after which a rank counts as lost."""

LOST = 75
"""Exit status of training that has lost a rank or the launcher: EX_TEMPFAIL of sysexits.h, try again."""

BEAT = 1.0
"""Seconds between two pulses; a tenth of the patience where that is less."""

SUSPECT = 3.0
"""Seconds without a pulse, and at least three beats, after which a rank is lost once something else has gone wrong: a
collective has failed, or a signal to stop was not obeyed. torchrun kills what is left 30 s after a rank's death."""

STILL, STRETCH = 1.5, 4
"""A main thread stands still after so many times the patience, and so many times its longest stretch so far. It is more
than the patience, since on a GPU the host may wait for its device, and that for a lost rank."""

OBEY, STOP = 5.0, 15.0
"""Seconds after a signal until something must be wrong, and until the run ends without its main thread."""

TOUCH = 10.0
"""Seconds after a collective has failed in which a lost rank shows: after them the run ends without a name for it."""

GRACE = 3.0
"""Seconds in which a rank may meet by itself the error that another one has ended with."""

SETTLE = 2.0
"""Seconds in which an update that has read `alive` as 1 comes to its end on the GPU: many times what it takes."""

WRITE = 20.0
"""Seconds in which the state must be written; after them the last regular checkpoint stays."""

JOIN = 1800.0
"""Seconds in which every rank must have come."""


@dataclass(frozen=True)
class Verdict:
    """Why the run ends on all ranks, with which status, and which ranks have no part in its end."""

    why: str
    status: int = LOST
    lost: tuple[int, ...] = ()


class Watch:
    """Watches over `world` ranks for the one of number `rank`; `connect` opens a connection to their store.

    `alive`, int32 [1] on the CPU, is 1 until the run ends. `report` gets the sentence for people, on one rank.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        world: int,
        alive: Tensor,
        patience: float = PATIENCE,
        report: Callable[[str], None] = lambda text: print(f"klora: {text}", file=sys.stderr, flush=True),
        settle: float = 0.0,
    ):
        self.rank, self.world, self.alive, self.patience, self.report = rank, world, alive, patience, report
        self.beat, self._settle = min(BEAT, patience / 10), settle
        self.changing = threading.Lock()
        """Held while the weights, the optimizer or the run's files change."""
        self._connect = connect
        self._pulse: dict[str, Any] = {"beat": 0, "pid": os.getpid(), "parent": os.getppid(), "host": _host()}
        self._pulses: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}
        self._now, self._answered = 0.0, 0.0
        """Seconds that this process has run: one that was stopped for a while takes nobody for lost because of it."""
        self._news, self._sent = 0, 0
        self._push, self._is_over, self._has_sent = threading.Event(), threading.Event(), threading.Condition()
        self._save: Callable[[], str] | None = None
        self._signal: Callable[[], int] = lambda: 0
        self._since: dict[str, float] = {}
        self._waits, self._marked, self._longest, self._expected = 0, 0.0, 0.0, inf
        self._broken = ""

    def start(self) -> None:
        self._exchanging = threading.Thread(target=self._exchange, daemon=True)
        self._exchanging.start()
        threading.Thread(target=self._judge, daemon=True).start()

    @contextmanager
    def guard(self, save: Callable[[], str], heard: Callable[[], int]) -> Iterator[None]:
        """Meanwhile there is a state to keep: `save` writes it, with `changing` held, and returns what is kept where.

        `heard` is the number of the signal that asked for a stop, or 0.
        """
        self._save, self._signal = save, heard
        try:
            yield
        finally:
            self._save, self._signal, self._expected = None, lambda: 0, inf

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a call in which this process waits for others. One that fails does not return: the run ends."""
        self.mark()
        self._waits += 1
        try:
            yield
        except RuntimeError as error:
            self._broken = str(error) or type(error).__name__
            self.hold()
        finally:
            self._waits -= 1
            self._marked = self._now

    def gather(self) -> None:
        """Return when every rank has come. A signal is heard meanwhile; where PyTorch waits, none is."""
        while len(self._pulses) < self.world:
            time.sleep(self.beat / 10)

    def hold(self) -> None:
        """Never return: the judging thread ends the process."""
        threading.Event().wait()

    def mark(self) -> None:
        """Show that the main thread gets on."""
        if self._expected == 0:
            self._longest = max(self._longest, self._now - self._marked)
        self._marked = self._now

    def expect(self, seconds: float = 0.0) -> None:
        """From here on the main thread is expected to get on within `seconds`, or at its pace so far."""
        self._marked, self._expected = self._now, seconds

    def leave(self, error: BaseException | None = None) -> None:
        """Say that this process ends, well or with `error`; nobody takes it for lost then."""
        if error is None:
            self._pulse["left"] = True
        else:
            status = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 2)
            self._pulse["failed"] = [status, str(error)]
        self._is_over.set()
        self._send()

    def _send(self) -> None:
        """Give the pulse to the store now, as far as it answers."""
        self._news += 1
        news = self._news
        self._push.set()
        with self._has_sent:
            self._has_sent.wait_for(lambda: self._sent >= news, 2 * self.beat)

    def _exchange(self) -> None:
        """Beat and read, until this process leaves; a store that fails once is not asked again."""
        with suppress(RuntimeError):
            store, keys, present = self._connect(), [f"pulse/{rank}" for rank in range(self.world)], 0
            while True:
                self._push.clear()
                is_last, news = self._is_over.is_set(), self._news
                self._pulse["beat"] += 1
                store.set(keys[self.rank], json.dumps(dict(self._pulse)))
                if present < self.world:
                    present = sum(store.check([key]) for key in keys)
                if present == self.world:
                    for rank, text in enumerate(store.multi_get(keys)):
                        self._note(rank, json.loads(text))
                self._answered = self._now
                with self._has_sent:
                    self._sent = news
                    self._has_sent.notify_all()
                if is_last:
                    return
                self._push.wait(self.beat)

    def _note(self, rank: int, pulse: dict[str, Any]) -> None:
        if pulse["beat"] != self._pulses.get(rank, {}).get("beat"):
            self._changed[rank] = self._now
        self._pulses[rank] = pulse

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._is_over.wait(self.beat / 2):
            now = time.monotonic()
            self._now += min(now - last, 2 * self.beat)
            last = now
            self._pulse["alarm"] = bool(self._broken) or self._lasted("signal", bool(self._signal())) >= OBEY
            self._pulse["still"] = self._stands_still()
            verdict = self._verdict()
            if verdict:
                self._end(verdict)

    def _lasted(self, what: str, is_so: bool) -> float:
        """Seconds for which `what` has been so."""
        if not is_so:
            self._since.pop(what, None)
            return 0.0
        return self._now - self._since.setdefault(what, self._now)

    def _stands_still(self) -> bool:
        most = max(STILL * self.patience, STRETCH * self._longest, self._expected)
        return not self._waits and self._now - self._marked >= most

    def _verdict(self) -> Verdict | None:
        """What ends the run now, if anything does."""
        others = {rank: pulse for rank, pulse in self._pulses.items() if rank != self.rank}
        for pulse in others.values():
            if "verdict" in pulse:  # also of a rank that has left: it may have ended the run while this one was stopped
                return _verdict_of(pulse)
        others = {rank: pulse for rank, pulse in others.items() if not pulse.get("left")}
        has_alarm = any(pulse.get("alarm") for pulse in (*others.values(), self._pulse))
        patience = min(self.patience, max(SUSPECT, 3 * self.beat)) if has_alarm else self.patience
        there = {rank: pulse for rank, pulse in others.items() if "failed" not in pulse}
        silent = {rank: self._answered - self._changed[rank] for rank in there}  # as of its last answer
        lost = tuple(rank for rank, seconds in silent.items() if seconds >= patience)
        if self._now - self._answered >= self.patience:
            return Verdict(f"the launcher, which keeps the ranks' store, has not answered for {self.patience:g} s")
        if lost:
            return Verdict(f"{_named(lost)} lost, without a sign of life for {silent[lost[0]]:.0f} s", lost=lost)
        still = tuple(rank for rank, pulse in ({self.rank: self._pulse} | there).items() if pulse.get("still"))
        if still:
            return Verdict(
                f"{_named(still)} stuck: no sign of progress for {STILL * self.patience:g} s or more", lost=still
            )
        failed = {rank: pulse["failed"] for rank, pulse in others.items() if "failed" in pulse}
        if self._lasted("failed", bool(failed)) >= GRACE:
            rank, (status, text) = min(failed.items())
            return Verdict(f"rank {rank} has ended: {text}" if text else "", status, tuple(failed))
        if self._lasted("broken", bool(self._broken)) >= TOUCH:
            return Verdict(f"the ranks have lost touch ({self._broken:.300})")
        if self._lasted("stop", bool(self._signal())) >= STOP:
            return Verdict("stopped by a signal", 128 + self._signal())
        if len(self._pulses) < self.world and self._now >= JOIN:
            return Verdict(f"not all of the {self.world} ranks have come within {JOIN:g} s")
        return None

    def _end(self, verdict: Verdict) -> None:
        """End this process, and tell the others to; on one rank write what there is to keep, and say so."""
        self.alive.fill_(0)
        self._pulse["verdict"] = [verdict.why, verdict.status, verdict.lost]
        self._send()
        time.sleep(2 * self.beat)
        pulses = dict(sorted({**self._pulses, self.rank: self._pulse}.items()))
        # Ranks that came to several verdicts at once take that of the lowest.
        verdict = next(_verdict_of(pulse) for pulse in pulses.values() if "verdict" in pulse)
        for rank in {*verdict.lost} - {self.rank}:
            self._kill(pulses[rank])
        ready = [rank for rank, pulse in pulses.items() if _may_write(pulse)]
        writer = min((rank for rank in ready if rank not in verdict.lost), default=min(ready))
        if self.rank == writer:
            with suppress(Exception):  # whatever a report costs, the process ends
                kept = self._kept()
                if verdict.why:
                    self.report(f"{verdict.why}. {kept}")
        else:
            until = time.monotonic() + WRITE
            while self._exchanging.is_alive() and time.monotonic() < until and not self._pulses[writer].get("left"):
                time.sleep(self.beat / 2)
        self._pulse["left"] = True
        self._send()
        leave_now(verdict.status)

    def _kept(self) -> str:
        """Write what there is to keep, in a thread of its own: the disk or the GPU may not answer. What came of it."""
        save, kept = self._save, []
        if save is None:
            return "No step was under way; the same command goes on or starts again"

        def write() -> None:
            try:
                with self.changing:
                    time.sleep(self._settle)
                    kept.append(save())
                    threading.Event().wait()  # nothing changes from here on
            except Exception as error:
                kept.append(
                    f"The state after the last step could not be written ({error}); what was saved before stays"
                )

        threading.Thread(target=write, daemon=True).start()
        until = time.monotonic() + WRITE
        while not kept and time.monotonic() < until:
            time.sleep(self.beat / 10)
        late = f"The state after the last step could not be written within {WRITE:g} s; what was saved before stays"
        return kept[0] if kept else late

    def _kill(self, pulse: dict[str, Any]) -> None:
        """End a lost rank that is a child of this process's parent and gives no pulse: it may not wake up and write."""
        if "failed" in pulse or pulse.get("still") or (pulse["host"], pulse["parent"]) != (_host(), os.getppid()):
            return
        with suppress(OSError):
            if _state_of(pulse["pid"])[1:] == (str(os.getppid()),):
                os.kill(pulse["pid"], signal.SIGKILL)


def leave_now(status: int) -> None:
    """End this process without waiting for any of its threads; what was printed comes out."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # a progress display has hidden the cursor
    os._exit(status)


def _verdict_of(pulse: dict[str, Any]) -> Verdict:
    why, status, lost = pulse["verdict"]
    return Verdict(why, status, tuple(lost))


def _may_write(pulse: dict[str, Any]) -> bool:
    """Whether a rank has a part in the end: it has not left before, and is not known to be dead or stopped."""
    if "failed" in pulse or (pulse.get("left") and "verdict" not in pulse):
        return False
    return pulse["host"] != _host() or "verdict" in pulse or _state_of(pulse["pid"])[:1] not in ((), ("Z",), ("T",))


def _state_of(pid: int) -> tuple[str, ...]:
    """(state, parent) of a process of this machine, '?' where the system does not tell; nothing where there is none."""
    try:
        return tuple(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2])
    except OSError:
        return () if Path("/proc/self/stat").exists() else ("?", "")


def _host() -> str:
    return socket.gethostname()


def _named(ranks: tuple[int, ...]) -> str:
    """'rank 2 is' or 'ranks 2, 3 are'."""
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
