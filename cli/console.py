"""What the command says and how: people read stderr's progress and stdout's tables, machines read --json on stdout."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class PatientConsole(Console):
    """A console that falls silent when its reader has gone; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Output:
    """Speaks to a person, or with `as_json` prints one JSON object at the end and nothing else.

    A character that the terminal's encoding lacks is written as its escape, and a reader that has gone away is not
    missed: neither ends a command that has work to do.
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
            self.console.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """One line on stderr, with --json too: something that ended nothing, but that one should know."""
        with suppress(OSError):
            print(f"klora: {text}", file=sys.stderr, flush=True)

    def table(self, title: str, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ()) -> None:
        """A small table for people; without `columns`, a list of names and values."""
        if self.is_silent:
            return
        rows = [tuple(escape(cell) for cell in row) for row in rows]
        table = Table(title=title or None, title_justify="left", show_header=bool(columns), box=None, pad_edge=False)
        for column in columns or ("", "") if rows else ():
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def result(self, values: dict[str, Any]) -> None:
        """The command's result for machines; people have had it in words."""
        if self.as_json:
            sys.stdout.write(json.dumps(_finite(values), indent=1, default=str) + "\n")

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, float, float | None], None]]:
        """A live display; call what it yields with (text, done, total), total None where it is not known."""
        if self.is_silent:
            yield lambda text, done, total=None: None
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        display = Progress(*columns, console=PatientConsole(stderr=True), transient=True, refresh_per_second=4)
        task = display.add_task("", total=None)

        def show(text: str, done: float, total: float | None = None) -> None:
            display.update(task, description=text, completed=int(done), total=None if total is None else int(total))

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
