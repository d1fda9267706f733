"""loss.csv and loss.png: what a run did, step by step, readable while it still runs. They never end it."""

import csv
import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .reading import read_bytes
from .storage import attempt, figure_png, new_figure, replacing, write_bytes

COLUMNS = ("step", "seconds", "tokens", "loss", "grad_norm", "lr_scale", "momentum", "validation_bpb")


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
            kept = [row for row in self.rows() if int(row["step"]) <= resume_at] if resume_at else []
            with replacing(self.csv_path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)
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
            self._say_once("rows before", f"the rows of {self.csv_path} are left out ({error}); training goes on")
            return []
        # A field's quotes may go on over lines, which no row of ours does: each line is read on its own.
        head, *lines = text.splitlines() or [""]
        cells = (line.split(",") for line in lines) if head == ",".join(COLUMNS) else ()
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in cells if len(row) == len(COLUMNS)]
        return [row for row in rows if _is_whole(row)]

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


def _is_whole(row: dict[str, str]) -> bool:
    """Whether a row has every column, numbers in those that are drawn, and nothing more."""
    try:
        step, loss, bpb = int(row["step"]), float(row["loss"]), float(row["validation_bpb"] or 0)
    except ValueError:
        return False
    return 0 <= step <= 2**53 and math.isfinite(loss) and math.isfinite(bpb)


def _short(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
