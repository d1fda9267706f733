"""SIGINT and SIGTERM as a request to stop at the next safe point."""

import signal


class StopSignals:
    """While active, SIGINT and SIGTERM are noted in `received` instead of obeyed; a second SIGINT is obeyed at once."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
