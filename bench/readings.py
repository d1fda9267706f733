"""Records as they lie on disk, and what tables and pictures both take from their results."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..model.reading import read_json
from .record import RecordError, validate
from .timing import TIMINGS

YARDSTICK = "eager"
UNSTEADY, ONE_CALL = "†", "§"

Record = Mapping[str, Any]
Result = Mapping[str, Any]


def load_records(folder: Path) -> list[dict[str, Any]]:
    """Valid records of `folder`/<gpu>/<group>.json by GPU and group. Other JSON files there are passed over."""
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            record = read_json(path)
        except ValueError as error:
            raise RecordError(f"{path} is no benchmark record: it is not JSON ({error})") from None
        if not isinstance(record, dict) or not {"schema", "results"} <= record.keys():
            continue
        validate(record, str(path))
        other, _ = found.setdefault((gpu_of(record), record["group"]), (path, record))
        if other != path:
            raise RecordError(f"{other} and {path} are both {gpu_of(record)}, {record['group']}: keep one of them")
    if not found:
        raise RecordError(f"there are no benchmark records in {folder}: make some with `klora bench --out {folder}`")
    return [record for _, (_, record) in sorted(found.items())]


def gpu_of(record: Record) -> str:
    """The GPU's name; CPU for what was timed by the processor's clock, even on a machine with a GPU."""
    on_cpu = any(result["timing"] == "clock" for result in record["results"])
    return "CPU" if on_cpu else record["environment"]["gpu"] or "CPU"


def preferred(results: Iterable[Result]) -> list[Result]:
    """Of the cold results, one for each variant at each place, by the first of TIMINGS that it has."""
    order, chosen = list(TIMINGS), {}
    for result in results:
        key = (place_of(result), result["variant"])
        if result["cache"] == "cold" and (
            key not in chosen or order.index(result["timing"]) < order.index(chosen[key]["timing"])
        ):
            chosen[key] = result
    return list(chosen.values())


def timings_of(results: Iterable[Result]) -> list[str]:
    """The timings of `results`, the preferred one first."""
    used = {result["timing"] for result in results}
    return [name for name in TIMINGS if name in used]


def place_of(result: Result) -> tuple[str, str, str]:
    return result["op"], result["shape"], result["dtype"]


def by_place(results: Iterable[Result]) -> dict[tuple[str, str, str], list[Result]]:
    places: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        places.setdefault(place_of(result), []).append(result)
    return places


def best_of(results: Iterable[Result]) -> Result:
    """The fastest that computes the op; a bound, which has no errors, only where there is nothing else."""
    return min(results, key=lambda result: (not result["errors"], result["ms"]["p50"]))


def eager_times(results: Iterable[Result]) -> dict[tuple[str, ...], float]:
    """Median of the yardstick by op, shape, dtype, timing and cache."""
    return {(*place_of(r), r["timing"], r["cache"]): r["ms"]["p50"] for r in results if r["variant"] == YARDSTICK}


def speedup_of(result: Result, eager: Mapping[tuple[str, ...], float]) -> float | None:
    """Eager's median over this one's; None where eager was not measured in the same way."""
    yardstick = eager.get((*place_of(result), result["timing"], result["cache"]))
    return None if yardstick is None else yardstick / result["ms"]["p50"]


def attained(result: Result) -> float:
    """TFLOP/s."""
    return result["flops"] / result["ms"]["p50"] / 1e9


def intensity(result: Result) -> float:
    return result["flops"] / result["bytes"]


def unsteady_mark(ms: Mapping[str, Any]) -> str:
    mark = ONE_CALL if ms["rounds"] == 1 else UNSTEADY
    return "" if ms["steady"] else f" {mark}"


def signed_ms(ms: float) -> str:
    return f"{'-' if ms < 0 else '+'}{three_digits(abs(ms))}"


def rates_text(ceilings: Mapping[str, float]) -> str:
    copy, gemm = (three_digits(ceilings[name] / 1e12) for name in ("bytes_per_second", "flops_per_second"))
    return f"copy {copy} TB/s, GEMM {gemm} TFLOP/s"


def three_digits(value: float) -> str:
    """`value` to three significant digits; "inf" where a quotient of two numbers is beyond float64."""
    rounded = float(f"{value:.3g}")
    if not math.isfinite(rounded):
        return str(rounded)
    if rounded and abs(rounded) < 1e-3:
        return f"{value:.2e}"
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(digits, 0)}f}"
