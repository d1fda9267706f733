"""loss.csv and loss.png: what a run did, step by step, readable while it still runs."""

import csv
import os
from pathlib import Path

from .storage import figure_png, new_figure, replacing, write_bytes

COLUMNS = ("step", "seconds", "tokens", "loss", "grad_norm", "lr_scale", "momentum", "validation_bpb")


class LossCurve:
    """Appends one row a step to loss.csv and draws loss.png from it on request."""

    def __init__(self, folder: Path, resume_at: int = 0):
        """Start afresh, or keep the rows up to step `resume_at` of a run that goes on from there."""
        self.csv_path, self.png_path = folder / "loss.csv", folder / "loss.png"
        kept = [row for row in self.rows() if int(row["step"]) <= resume_at] if resume_at else []
        with replacing(self.csv_path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self._file = open(self.csv_path, "a", newline="")  # noqa: SIM115 (held open for the whole run)
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def add(self, **values: float | int | str) -> None:
        """One step; `values` are COLUMNS, of which validation_bpb may be left out."""
        self._writer.writerow({name: _short(values.get(name, "")) for name in COLUMNS})
        self._file.flush()

    def rows(self) -> list[dict[str, str]]:
        if not self.csv_path.exists():
            return []
        with open(self.csv_path, newline="") as file:
            # A row torn by a kill has no last column.
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def draw(self) -> None:
        """Loss (and validation BPB where it was measured) over steps, to loss.png."""
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
            right.set_ylabel("validation bits per byte")
            lines = [*lines, *right.get_lines()]
        axes.legend(lines, [line.get_label() for line in lines], loc="upper right")
        write_bytes(self.png_path, figure_png(figure, dpi=120))

    def close(self) -> None:
        """Draw once more, sync the CSV and close it."""
        self.draw()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _short(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
