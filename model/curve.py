"""loss.csv and loss.png: what a run did, step by step, readable while it still runs. They never end it."""

import csv
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from .reading import open_regular, read_bytes
from .storage import attempt, figure_png, new_figure, replacing, write_bytes

COLUMNS = ("step", "seconds", "tokens", "loss", "grad_norm", "lr_scale", "momentum", "validation_bpb")
MOST_CHARACTERS = 2**16
"""Of a line that is read: what has more is no row, and may be the whole of a damaged file."""


class LossCurve:
    """Appends one row a step to loss.csv and draws loss.png from it on request."""

    def __init__(
        self, folder: Path, resume_at: int = 0, say: Callable[[str], None] = warnings.warn, bytes_of: str = ""
    ):
        """Start afresh, or keep the rows up to step `resume_at` of a run that goes on from there.

        `say` gets one line when the picture cannot be drawn, and one when the CSV cannot be written.
        `bytes_of` names the text that the validation bits per byte are of, where it is not the original.
        """
        self.csv_path, self.png_path = folder / "loss.csv", folder / "loss.png"
        self._say = say
        self._unit = "bits per byte" + (f" of the {bytes_of}" if bytes_of else "")
        self._complaints: set[str] = set()
        try:
            with replacing(self.csv_path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                if resume_at and self.csv_path.exists():
                    writer.writerows(row for row in self._rows_so_far() if int(row["step"]) <= resume_at)
            self._file = open(self.csv_path, "a", newline="")  # noqa: SIM115 (held open for the whole run)
        except OSError as error:
            self._say_once("rows", f"{self.csv_path} cannot be written ({error}); training goes on without it")
            self._file = open(os.devnull, "a")  # noqa: SIM115
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def add(self, **values: float | int | str) -> None:
        """One step; `values` are COLUMNS, of which validation_bpb may be left out."""
        try:
            self._writer.writerow({name: _short(values.get(name, "")) for name in COLUMNS})
            self._file.flush()
        except OSError as error:
            self._say_once("rows", f"{self.csv_path} misses steps from {values['step']} on ({error}); training goes on")

    def rows(self) -> list[dict[str, str]]:
        """The rows there are, without those that a kill tore or that hold no numbers."""
        try:
            text = read_bytes(self.csv_path).decode("utf-8-sig", errors="replace").replace("\0", "")
        except FileNotFoundError:
            return []
        except OSError as error:
            self._say_once("drawn", f"{self.csv_path} cannot be drawn ({error}); training goes on")
            return []
        return list(_rows_of(text.splitlines()))

    def _rows_so_far(self) -> Iterator[dict[str, str]]:
        """As :meth:`rows`, one after the other: however long the file has become, a resumed run keeps them."""
        with io.TextIOWrapper(open_regular(self.csv_path), encoding="utf-8-sig", errors="replace") as file:
            lines = iter(lambda: file.readline(MOST_CHARACTERS), "")
            yield from _rows_of(line.replace("\0", "").rstrip("\n") for line in lines)

    def draw(self) -> None:
        """Loss (and validation BPB where it was measured) over steps, to loss.png."""
        attempt(str(self.png_path), self._draw, partial(self._say_once, "picture"))

    def _draw(self) -> None:
        rows = self.rows()
        if not rows:
            return
        steps = [int(row["step"]) for row in rows]
        figure = new_figure(8, 4.5)
        axes = figure.add_subplot()
        axes.plot(steps, [float(row["loss"]) for row in rows], color="#4c72b0", linewidth=0.8, label="training loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        axes.grid(alpha=0.3)
        lines = axes.get_lines()
        measured = [(int(row["step"]), float(row["validation_bpb"])) for row in rows if row["validation_bpb"]]
        if measured:
            right = axes.twinx()
            right.plot(*zip(*measured, strict=True), "o-", color="#c44e52", markersize=4, label="validation BPB")
            right.set_ylabel(f"validation {self._unit}")
            lines = [*lines, *right.get_lines()]
        axes.legend(lines, [line.get_label() for line in lines], loc="upper right")
        write_bytes(self.png_path, figure_png(figure, dpi=120))

    def close(self) -> None:
        """Draw once more, sync the CSV and close it."""
        self.draw()
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self._say_once("rows", f"{self.csv_path} may miss its last steps ({error})")

    def _say_once(self, kind: str, text: str) -> None:
        if kind not in self._complaints:
            self._complaints.add(kind)
            self._say(text)


def _rows_of(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The whole rows among lines of which the first one is the header; none where it is another."""
    lines = iter(lines)
    if next(lines, "") != ",".join(COLUMNS):
        return
    # A field's quotes may go on over lines, which no row of ours does: each line is read on its own.
    for cells in (line.split(",") for line in lines):
        if len(cells) == len(COLUMNS) and _is_whole(row := dict(zip(COLUMNS, cells, strict=True))):
            yield row


def _is_whole(row: dict[str, str]) -> bool:
    """Whether a row has every column, numbers in those that are drawn, and nothing more."""
    try:
        step, loss, bpb = int(row["step"]), float(row["loss"]), float(row["validation_bpb"] or 0)
    except ValueError:
        return False
    return 0 <= step <= 2**53 and math.isfinite(loss) and math.isfinite(bpb)


def _short(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
