"""SIGINT, SIGTERM and SIGHUP as a request to stop at the next safe point; a second Ctrl-C ends the process at once."""

import os
import signal
import socket
import threading
from collections.abc import Callable

GRACE = 1.0
"""Seconds in which a second Ctrl-C may end the process by KeyboardInterrupt, which removes half-written files."""


class StopSignals:
    """While active, SIGINT, SIGTERM and SIGHUP (a terminal that is closed) are noted in `received` instead of obeyed.

    A second SIGINT is obeyed at once. A SIGHUP that was ignored before, as after nohup, stays ignored.
    Python's handlers wait for the operation in progress, which may be a backward of a minute, or a collective with a
    dead rank. Therefore a thread reads the signals from Python's wakeup descriptor. It notes and answers the first one,
    with `say`, and after a second SIGINT it ends the process with status 130 where KeyboardInterrupt has not done so
    within GRACE seconds. Outside the main thread, where Python allows no handlers, signals stay as they are.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None):
        self.received = 0
        self._say = say
        self._over = threading.Event()

    def __enter__(self) -> "StopSignals":
        self._is_active = threading.current_thread() is threading.main_thread()
        if self._is_active:
            self._reading, self._writing = socket.socketpair()
            self._writing.setblocking(False)
            self._descriptor_before = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _note(self, number: int, frame) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _watch(self) -> None:
        count = 0
        while numbers := self._reading.recv(64):
            for number in numbers:
                if number not in self._before:
                    continue
                count += 1
                self.received = self.received or number
                if count == 1:
                    self._say("stopping at the next safe point; Ctrl-C again ends at once, what was saved stays")
                elif number == signal.SIGINT and not self._over.wait(GRACE):
                    if os.isatty(2):
                        os.write(2, b"\x1b[?25h\n")  # a progress display has hidden the cursor
                    os._exit(128 + number)
        self._reading.close()

    def __exit__(self, *exc) -> None:
        if not self._is_active:
            return
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor_before)
        self._writing.close()  # the thread reads the end and closes its side
