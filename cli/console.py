"""What the command says and how: people read stderr's progress and stdout's tables, machines read --json on stdout."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text


def printable(text: str) -> str:
    """`text` with an escape such as \\x1b for every character that would steer a terminal or turn its line around.

    Those are control characters but line ends and tabs, and the marks of Unicode for separators, directions and halves
    of surrogate pairs.
    """
    return "".join(
        c if c in "\n\t" or c.isprintable() or c == "\u00a0" or c == "\u3000" else _escaped(c) for c in str(text)
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class Said(logging.Handler):
    """Shows what the library logs, as :meth:`Output.warn` shows its lines."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            print(f"klora: {printable(record.getMessage())}", file=sys.stderr, flush=True)


class PatientConsole(Console):
    """A console that falls silent when its reader has gone; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Amount(ProgressColumn):
    """How far a task is, with its unit, and the time it has taken and has left: `3/40 tokens  0:02, 0:25 left`.

    Without a total, what is done alone; without a unit, the time alone.
    """

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "")
        total = "" if task.total is None else f"/{task.total:,.0f}"
        amount = f"{task.completed:,.0f}{total} {unit}  " if unit else ""
        left = task.time_remaining
        if unit == "s" and task.total is not None:
            left = max(task.total - task.completed, 0.0)
        rest = "" if task.total is None else f", {_clock(left)} left" if left is not None else ", -:-- left"
        return Text(f"{amount}{_clock(task.elapsed or 0.0)}{rest}")


def _clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Output:
    """Speaks to a person, or with `as_json` prints one JSON object at the end and nothing else.

    A character that the terminal's encoding lacks is written as its escape, and a reader that has gone away is not
    missed, nor a disk that is full: none of them ends a command that has work to do.
    """

    def __init__(self, as_json: bool = False):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        self.as_json = as_json
        self.is_silent = as_json
        self.console = PatientConsole(stderr=as_json, highlight=False, soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """One line for people."""
        if not self.is_silent:
            with suppress(OSError):
                self.console.print(printable(text), style=style, markup=False)

    def warn(self, text: str) -> None:
        """One line on stderr, with --json too: something that ended nothing, but that one should know."""
        with suppress(OSError):
            print(f"klora: {printable(text)}", file=sys.stderr, flush=True)

    def table(self, title: str, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ()) -> None:
        """A small table for people; without `columns`, a list of names and values."""
        if self.is_silent:
            return
        rows = [tuple(escape(printable(cell)) for cell in row) for row in rows]
        title, columns = escape(printable(title)), tuple(escape(printable(column)) for column in columns)
        table = Table(title=title or None, title_justify="left", show_header=bool(columns), box=None, pad_edge=False)
        for column in columns or ("", "") if rows else ():
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        with suppress(OSError):
            self.console.print(table)

    def result(self, values: dict[str, Any]) -> None:
        """The command's result for machines; people have had it in words. OSError: nobody takes it."""
        if self.as_json:
            try:
                print(json.dumps(_finite(values), indent=1, default=str), flush=True)
            except OSError as error:
                raise OSError(f"the result could not be printed ({error}); files that were written are whole") from None

    @contextmanager
    def progress(self) -> Iterator[Callable[..., None]]:
        """A live display; call what it yields with (text, done, total=None, unit="").

        `unit` names what `done` and `total` count, "s" for seconds; `total` is None where it is not known. Another unit
        or total is another task, whose time starts anew.
        """
        if self.is_silent:
            yield lambda text, done, total=None, unit="": None
            return
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=12), Amount()
        display = Progress(*columns, console=PatientConsole(stderr=True), transient=True, refresh_per_second=4)
        task = display.add_task("", total=None, unit="")
        shown: tuple[float | None, str] = None, ""

        def show(text: str, done: float, total: float | None = None, unit: str = "") -> None:
            nonlocal task, shown
            text = printable(text)
            if (total, unit) != shown or done < display.tasks[0].completed:
                shown = total, unit
                display.remove_task(task)
                task = display.add_task(text, total=total, completed=done, unit=unit)
            else:
                display.update(task, description=text, completed=done)

        with suppress(OSError):
            display.start()
        try:
            yield show
        finally:
            with suppress(OSError):
                display.stop()


def _finite(value: Any) -> Any:
    """`value` with null for every NaN and infinity, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
