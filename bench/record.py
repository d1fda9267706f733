"""Running entries and what is kept of it: results/<gpu>/<group>.json.

A record is one group on one machine: `schema` 1, `group`, `environment`, `ceilings` (bytes and operations a second, of
the same run), `missing` (variants that could not run, and why) and `results`, one for each op, shape, dtype,
variant, timing and cache ("cold" or "warm"):

    ms {p20, p50, p80, rounds, steady}, peak_bytes, bytes, flops, floor_ms, percent_of_floor, errors, allowed

floor_ms is the larger of bytes / copy rate and flops / GEMM rate; percent_of_floor is 100 * floor_ms / p50, so that 100
is the best there is. `validate` checks a record against RECORD_SCHEMA (JSON Schema 2020-12).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .entry import Entry, Shape, Variant
from .environment import environment
from .gate import Verdict, check
from .timing import Times, captured, input_sets, peak_bytes, time_interleaved

SLOWER = 1.05
"""A median this much above the baseline's fails the comparison."""

_NUMBER, _TEXT = {"type": "number"}, {"type": "string"}
_POSITIVE, _COUNT = {"type": "number", "exclusiveMinimum": 0}, {"type": "integer", "minimum": 0}


def _fields(properties: Mapping[str, Any], optional: Sequence[str] = ()) -> dict[str, Any]:
    """An object with exactly these properties."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


RECORD_SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    **_fields(
        {
            "schema": {"const": 1},
            "group": _TEXT,
            "environment": {"type": "object", "required": ["gpu", "driver", "versions", "commit", "date"]},
            "ceilings": _fields({"bytes_per_second": _POSITIVE, "flops_per_second": _POSITIVE}),
            "missing": {
                "type": "array",
                "items": _fields({"op": _TEXT, "variant": _TEXT, "why": {"type": "string", "minLength": 1}}),
            },
            "results": {
                "type": "array",
                "items": _fields(
                    {
                        "op": _TEXT,
                        "shape": _TEXT,
                        "sizes": {"type": "object", "additionalProperties": _COUNT},
                        "dtype": _TEXT,
                        "variant": _TEXT,
                        "timing": {"enum": ["events", "graph", "clock"]},
                        "cache": {"enum": ["cold", "warm"]},
                        "ms": _fields(
                            {
                                "p20": _POSITIVE,
                                "p50": _POSITIVE,
                                "p80": _POSITIVE,
                                "rounds": {"type": "integer", "minimum": 1},
                                "steady": {"type": "boolean"},
                            }
                        ),
                        "peak_bytes": {"type": ["integer", "null"]},
                        "bytes": _COUNT,
                        "flops": _COUNT,
                        "floor_ms": _POSITIVE,
                        "percent_of_floor": _POSITIVE,
                        "errors": {"type": "array", "items": _NUMBER, "minItems": 1},
                        "allowed": {"type": "array", "items": _NUMBER, "minItems": 1},
                    }
                ),
            },
        }
    ),
}


class RecordError(ValueError):
    """A file that is no record, and where it departs from the schema."""


def validate(record: Any, name: str = "record") -> None:
    """Raise RecordError with the path and the reason of the first departure from RECORD_SCHEMA."""
    try:
        import jsonschema
    except ModuleNotFoundError:
        raise RecordError("checking a record needs the package jsonschema: pip install 'klora[bench]'") from None
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(RECORD_SCHEMA).iter_errors(record))
    if problem is not None:
        raise RecordError(f"{name} is no benchmark record: at {problem.json_path}: {problem.message}")


def run_group(
    group: str,
    entries: Sequence[Entry],
    ceilings: Mapping[str, float],
    device: torch.device,
    dtype: torch.dtype,
    toy: bool,
    rounds: tuple[int, int] = (20, 200),
    commit: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Gate and time all `entries` of one group; the record as JSON values. RedGate passes through: no speed then."""
    results: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for entry in entries:
        missing += [{"op": entry.op, "variant": name, "why": why} for name, why in entry.missing(device).items()]
        shapes = {"toy": entry.toy} if toy else entry.shapes
        progress(f"{entry.op}: correctness")
        verdicts = check(entry, entry.toy if toy else entry.gate or next(iter(shapes.values())), device, dtype)
        for name, shape in shapes.items():
            progress(f"{entry.op} {name}: timing")
            results += _time_entry(entry, name, shape, verdicts, ceilings, device, dtype, rounds)
    return {
        "schema": 1,
        "group": group,
        "environment": environment(commit),
        "ceilings": dict(ceilings),
        "missing": missing,
        "results": results,
    }


def measure_ceilings(
    entries: Sequence[Entry], device: torch.device, dtype: torch.dtype, toy: bool, rounds: tuple[int, int] = (20, 200)
) -> dict[str, float]:
    """Copy bandwidth in bytes a second and GEMM rate in operations a second, from the ceilings' own entries."""
    rates = {}
    for entry in entries:
        shape = entry.toy if toy else next(iter(entry.shapes.values()))
        times = _times(entry, shape, entry.present(device), 1, device, dtype, rounds)["eager"]
        work = entry.flops(shape) or entry.bytes(shape, dtype.itemsize)
        rates["flops_per_second" if entry.flops(shape) else "bytes_per_second"] = work / times.p50 * 1e3
    return rates


def _times(entry, shape, variants, sets, device, dtype, rounds, graphs: bool = False) -> dict[str, Times]:
    thunks = {v.name: calls for v, calls in _thunks(entry, shape, variants, sets, device, dtype).items()}
    if graphs:
        thunks = {name: [captured(call, device) for call in calls] for name, calls in thunks.items()}
    return time_interleaved(thunks, device, *rounds)


def _thunks(entry: Entry, shape: Shape, variants: Sequence[Variant], sets: int, device, dtype):
    """`sets` calls of each variant, on inputs of their own that all variants share."""
    generator = torch.Generator(device).manual_seed(1)
    drawn = [entry.draw(shape, device, dtype, generator) for _ in range(sets)]
    built = {variant: variant.build(shape, device, dtype) for variant in variants}
    return {v: [lambda call=call, inputs=inputs: call(*inputs) for inputs in drawn] for v, call in built.items()}


def _time_entry(
    entry: Entry,
    name: str,
    shape: Shape,
    verdicts: Mapping[str, Verdict],
    ceilings: Mapping[str, float],
    device: torch.device,
    dtype: torch.dtype,
    rounds: tuple[int, int],
) -> list[dict[str, Any]]:
    variants = entry.present(device)
    moved, operations = entry.bytes(shape, dtype.itemsize), entry.flops(shape)
    floor = 1e3 * max(moved / ceilings["bytes_per_second"], operations / ceilings["flops_per_second"])
    peaks = {
        v.name: peak_bytes(calls[0], device) for v, calls in _thunks(entry, shape, variants, 1, device, dtype).items()
    }
    results = []
    for timing in ("events", "graph") if device.type == "cuda" else ("clock",):
        timed = [v for v in variants if timing != "graph" or v.captures]
        for cache in ("cold", "warm") if timed else ():
            sets = input_sets(moved, device) if cache == "cold" else 1
            measured = _times(entry, shape, timed, sets, device, dtype, rounds, graphs=timing == "graph")
            for variant, times in measured.items():
                results.append(
                    {
                        "op": entry.op,
                        "shape": name,
                        "sizes": dict(shape),
                        "dtype": str(dtype).removeprefix("torch."),
                        "variant": variant,
                        "timing": timing,
                        "cache": cache,
                        "ms": {
                            "p20": times.p20,
                            "p50": times.p50,
                            "p80": times.p80,
                            "rounds": times.rounds,
                            "steady": times.is_steady,
                        },
                        "peak_bytes": peaks[variant],
                        "bytes": moved,
                        "flops": operations,
                        "floor_ms": floor,
                        "percent_of_floor": 100 * floor / times.p50,
                        "errors": list(verdicts[variant].errors),
                        "allowed": list(verdicts[variant].allowed),
                    }
                )
    return results


def slower_than(baseline: Mapping[str, Any], record: Mapping[str, Any], factor: float = SLOWER) -> list[str]:
    """One line for each result whose median is more than `factor` times the baseline's."""
    before = {result_key(result): result["ms"]["p50"] for result in baseline["results"]}
    lines = []
    for result in record["results"]:
        old, new = before.get(result_key(result)), result["ms"]["p50"]
        if old is not None and new > factor * old:
            name = " ".join((*result_key(result)[:2], result["variant"], result["timing"], result["cache"]))
            lines.append(f"{name}: {new:.4f} ms, {100 * (new / old - 1):.1f}% over the baseline's {old:.4f} ms")
    return lines


def result_key(result: Mapping[str, Any]) -> tuple[str, ...]:
    """What a result is of: op, shape, dtype, variant, timing and cache."""
    return tuple(result[name] for name in ("op", "shape", "dtype", "variant", "timing", "cache"))
