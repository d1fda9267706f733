"""Whether a run of the fast step learns as eager PyTorch does: its loss beside that of eager runs of several seeds.

    python -m klora.bench.curves --runs runs/fast runs/eager-1 runs/eager-2 runs/eager-3 --out curves

Each folder is a run of `klora train`; of its loss.csv the loss and the learning rate of each step are read. A loss is
smoothed over SMOOTH steps: the mean of that step's and those before it. At every step the seeds span a spread, from
their least smoothed loss to their largest. The fast run is inside where its own lies in that spread, which nothing
widens; how far it leaves it is said in nats, with the step, above and below. Below is a better loss, and it is said all
the same. Of four curves of one kind one lies between the other three at half of the steps only. So the same is said of
each seed among the others, whose spread is narrower still.

Runs are compared up to the step at which their learning rates part, as they do where a run's length is given in
seconds. The result goes to OUT.json, the curves to OUT.png.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import KloraError
from ..model.reading import read_bytes, read_json
from ..model.storage import attempt, figure_png, new_figure, write_bytes, write_text

SMOOTH = 50
LEAST_SEEDS = 2
FAST, SEEDS, BAND = "#c44e52", "#4c72b0", "#c9d6ea"


class CurveError(KloraError, ValueError):
    """Runs that cannot be compared; the message says why, and what to give."""


def read_losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, scale of the learning rate) of a run. CurveError where there are none."""
    path = folder / "loss.csv"
    try:
        lines = read_bytes(path).decode().splitlines()
        rows = {int(row["step"]): (float(row["loss"]), float(row["lr_scale"])) for row in csv.DictReader(lines)}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise CurveError(f"{path} is no loss.csv of a run ({type(error).__name__}: {error})") from None
    if not rows:
        raise CurveError(f"{path} has no steps")
    return rows


def fast_of(folders: Sequence[Path], given: Path | None) -> Path:
    """The fast run: the one that was named, or the only one whose run.json does not say fused=false."""
    if given is not None:
        if given not in folders:
            raise CurveError(f"--fast is {given}; allowed: one of --runs, {', '.join(map(str, folders))}")
        return given
    fused = [folder for folder in folders if not _is_eager(folder)]
    if len(fused) != 1:
        raise CurveError(
            f"{len(fused)} of {len(folders)} runs are not said to be eager (fused=false in run.json); name the fast "
            "one with --fast"
        )
    return fused[0]


def _is_eager(folder: Path) -> bool:
    try:
        return str(read_json(folder / "run.json")["train"]["fused"]).lower() == "false"
    except (OSError, KeyError, TypeError, ValueError):
        return False


def smoothed(losses: np.ndarray) -> np.ndarray:
    """[steps] -> [steps - SMOOTH + 1], the means of SMOOTH steps."""
    return np.lib.stride_tricks.sliding_window_view(losses, SMOOTH).mean(axis=-1)


def compared(fast: dict[int, tuple[float, float]], seeds: Sequence[dict[int, tuple[float, float]]]) -> dict[str, Any]:
    """Smoothed curves of the steps that can be compared, and how the fast one lies in the seeds' spread.

    `steps` int [n], `fast` [n], `seeds` [runs, n] are the curves; the rest are JSON values.
    """
    runs = [fast, *seeds]
    steps = sorted(set.intersection(*map(set, runs)))
    scales = np.array([[run[step][1] for step in steps] for run in runs])
    same = np.isclose(scales, scales[:1], rtol=1e-4, atol=1e-6).all(axis=0)
    until = len(steps) if same.all() else int(same.argmin())
    if until < SMOOTH:
        raise CurveError(
            f"the runs have {len(steps)} steps in common and the same learning rates in the first {until}; at least "
            f"{SMOOTH} are needed: give runs of the same data, preset and length in steps"
        )
    losses = np.array([[run[step][0] for step in steps[:until]] for run in runs])
    own, *others = curves = list(map(smoothed, losses))
    at = np.array(steps[SMOOTH - 1 : until])
    place = _place(own, others, at)
    return {
        "steps": at,
        "fast": own,
        "seeds": np.array(others),
        **place,
        "widest_spread": _number((np.max(others, axis=0) - np.min(others, axis=0)).max()),
        "each_seed_among_the_others": [
            _place(seed, [other for other in others if other is not seed], at) for seed in others
        ],
        "last": {"step": int(at[-1]), "fast": _number(own[-1]), "seeds": [_number(curve[-1]) for curve in curves[1:]]},
        "first_step": int(at[0]),
        "last_step": int(at[-1]),
        "steps_in_common": len(steps),
        "learning_rates_part_at": None if until == len(steps) else int(steps[until]),
    }


def _place(own: np.ndarray, others: Sequence[np.ndarray], at: np.ndarray) -> dict[str, Any]:
    """How a curve lies in the spread of `others`: whether inside, and how far it leaves it on either side."""
    above, below = own - np.max(others, axis=0), np.min(others, axis=0) - own
    inside = (above <= 0) & (below <= 0)

    def leaves(by: np.ndarray) -> dict[str, Any]:
        worst = int(np.nan_to_num(by, nan=np.inf).argmax())
        return {"nats": _number(max(by[worst], 0.0)), "step": int(at[worst])}

    return {
        "inside": bool(inside.all()),
        "share_of_steps_inside": float(inside.mean()),
        "above": leaves(above),
        "below": leaves(below),
    }


def _number(value: float) -> float | None:
    """What JSON can hold: None for what is no number."""
    return float(value) if np.isfinite(value) else None


def _four(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


def said(found: dict[str, Any]) -> str:
    """The verdict, for people."""
    last, part = found["last"], found["learning_rates_part_at"]
    steps = f"steps {found['first_step']:,} to {found['last_step']:,}"
    if found["inside"]:
        verdict = f"inside the seeds' spread at all of {steps}"
    else:
        ways = [(way, found[way]) for way in ("above", "below") if found[way]["nats"] != 0]
        furthest = " and ".join(f"{_four(by['nats'])} nats {way} it at step {by['step']:,}" for way, by in ways)
        verdict = f"inside the seeds' spread at {found['share_of_steps_inside']:.1%} of {steps}, at most {furthest}"
    seeds = ", ".join(map(_four, last["seeds"]))
    end = f"at the last of them {_four(last['fast'])}, the seeds {seeds}"
    apart = "" if part is None else f". From step {part:,} on the learning rates part: it is not compared"
    seeds = found["each_seed_among_the_others"]
    shares = ", ".join(f"{seed['share_of_steps_inside']:.1%}" for seed in seeds)
    furthest = ", ".join(_four(_furthest(seed)) for seed in seeds)
    among = f"each seed among the others is inside at {shares} of the steps and at most {furthest} nats apart"
    return f"the fast run's smoothed loss is {verdict}; {end}. To compare: {among}{apart}"


def _furthest(place: dict[str, Any]) -> float | None:
    both = [place[way]["nats"] for way in ("above", "below")]
    return None if None in both else max(both)


def drawn(found: dict[str, Any], names: Sequence[str], verdict: str):
    """The curves above, and below how far they lie from the middle of the seeds' spread."""
    figure = new_figure(12, 8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps, seeds, fast = found["steps"], found["seeds"], found["fast"]
    low, high = seeds.min(axis=0), seeds.max(axis=0)
    middle = (low + high) / 2
    for axes, less in ((upper, 0.0), (lower, middle)):
        axes.fill_between(steps, low - less, high - less, color=BAND, label="the seeds' spread")
        for name, loss in zip(names[1:], seeds, strict=True):
            axes.plot(steps, loss - less, color=SEEDS, linewidth=0.7, alpha=0.7, label=name)
        axes.plot(steps, fast - less, color=FAST, linewidth=1.4, label=f"{names[0]} (fast)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    upper.set_ylabel(f"loss, mean of {SMOOTH} steps (nats a token)", fontsize=12)
    upper.legend(fontsize=11, frameon=False)
    lower.set_ylabel("from the spread's middle", fontsize=12)
    lower.set_xlabel("step", fontsize=12)
    figure.suptitle("Loss of the fast step beside eager seeds", x=0.015, ha="left", fontsize=15, weight="bold")
    figure.supxlabel(verdict, x=0.015, ha="left", fontsize=10, color="#444444", wrap=True)
    return figure


def curves(folders: Sequence[Path], out: Path, fast: Path | None = None) -> dict[str, Any]:
    """Compare the runs, write OUT.json and OUT.png, and return what the JSON says."""
    chosen = fast_of(folders, fast)
    seeds = [folder for folder in folders if folder != chosen]
    if len(seeds) < LEAST_SEEDS:
        raise CurveError(f"{len(seeds)} eager runs were given beside {chosen}; at least {LEAST_SEEDS} are needed")
    found = compared(read_losses(chosen), [read_losses(folder) for folder in seeds])
    verdict, names = said(found), [folder.name for folder in (chosen, *seeds)]
    result = {
        "name": "curves",
        "smoothed_over": SMOOTH,
        "fast_run": names[0],
        "seed_runs": names[1:],
        "verdict": verdict,
        **{name: value for name, value in found.items() if name not in ("steps", "fast", "seeds")},
    }
    write_text(out.with_name(f"{out.name}.json"), json.dumps(result, indent=1) + "\n")
    picture = out.with_name(f"{out.name}.png")
    attempt(
        str(picture),
        lambda: write_bytes(picture, figure_png(drawn(found, names, verdict), dpi=150)),
        lambda text: print(text, file=sys.stderr),
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the fast run is inside the spread, 1 where it is not, 2 where the runs cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m klora.bench.curves", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", type=Path, required=True, metavar="FOLDER", help="run folders")
    parser.add_argument("--fast", type=Path, help="the fast one of them; else the one without fused=false in run.json")
    parser.add_argument("--out", type=Path, default=Path("curves"), help="OUT.json and OUT.png are written")
    given = parser.parse_args(arguments)
    try:
        result = curves(given.runs, given.out, given.fast)
    except CurveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result["verdict"])
    return 0 if result["inside"] else 1


if __name__ == "__main__":
    sys.exit(main())
