"""Running entries and what is kept of it: results/<gpu>/<group>.json.

A record is one group on one machine: `schema` 1, `group`, `environment`, `ceilings` (bytes and operations a second, of
the same run), `missing` (variants that could not run or raised, and why), `bounds` (variants that compute something
else, and what; they have no errors) and `results`, one for each op, shape, dtype, variant, timing and cache ("cold" or
"warm"):

    ms {p20, p50, p80, rounds, steady}, peak_bytes, bytes, flops, floor_ms, percent_of_floor, errors, allowed

and `attention`, what ran it and why, where a variant chooses.

peak_bytes is the most memory that building a variant and calling it once take, its inputs left out: what a call works
in may have been set aside before, in the pool of a CUDA graph. Null: not measured.

floor_ms is the larger of bytes / copy rate and flops / GEMM rate; percent_of_floor is 100 * floor_ms / p50, so that 100
is the best there is. `validate` checks a record against RECORD_SCHEMA (JSON Schema 2020-12).
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..errors import KloraError
from ..install import pip_install
from .entry import Entry, Shape, Variant
from .environment import environment
from .gate import Verdict, check, why_broken
from .timing import MemoryWatch, Taken, Thunk, Times, captured, input_sets, peak_bytes, time_interleaved

SLOWER = 1.05
"""A median this much above the baseline's fails the comparison."""

_NUMBER, _TEXT = {"type": "number"}, {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_NOT_EMPTY = {"type": "string", "minLength": 1}
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
            "environment": {
                "type": "object",
                "properties": {
                    **{"gpu": _TEXT_OR_NULL, "driver": _TEXT_OR_NULL, "commit": _TEXT, "date": _TEXT},
                    "versions": {"type": "object", "additionalProperties": _TEXT_OR_NULL},
                },
                "required": ["gpu", "driver", "versions", "commit", "date"],
            },
            "ceilings": _fields({"bytes_per_second": _POSITIVE, "flops_per_second": _POSITIVE}),
            "missing": {
                "type": "array",
                "items": _fields({"op": _TEXT, "variant": _TEXT, "why": _NOT_EMPTY}),
            },
            "bounds": {"type": "array", "items": _fields({"op": _TEXT, "variant": _TEXT, "instead": _NOT_EMPTY})},
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
                        "errors": {"type": "array", "items": _NUMBER},
                        "allowed": {"type": "array", "items": _NUMBER},
                        "attention": _NOT_EMPTY,
                    },
                    optional=["attention"],
                ),
            },
        }
    ),
}


class RecordError(KloraError, ValueError):
    """A file that is no record, and where it departs from the schema."""


def validate(record: Any, name: str = "record") -> None:
    """Raise RecordError with the path and the reason of the first departure from RECORD_SCHEMA."""
    try:
        import jsonschema
    except ModuleNotFoundError:
        raise RecordError(f"checking a record needs the package jsonschema: {pip_install('bench')}") from None
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(RECORD_SCHEMA).iter_errors(record))
    if problem is not None:
        raise RecordError(f"{name} is no benchmark record: at {problem.json_path}: {problem.message}")
    bounds = {(bound["op"], bound["variant"]) for bound in record["bounds"]}
    for result in record["results"]:
        if not result["errors"] and (result["op"], result["variant"]) not in bounds:
            fault = f"{result['op']} {result['variant']} has no errors and is not among the bounds"
            raise RecordError(f"{name} is no benchmark record: {fault}")


def run_group(
    group: str,
    entries: Sequence[Entry],
    ceilings: Mapping[str, float],
    device: torch.device,
    dtype: torch.dtype,
    toy: bool,
    rounds: tuple[int, int] = (20, 200),
    commit: str = "",
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
    so_far: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Gate and time all `entries` of one group; the record as JSON values. RedGate passes through: no speed then.

    `progress` gets (what is next, shapes done, shapes in all); `so_far` gets the record after each shape.
    """
    results: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    bounds: list[dict[str, str]] = []
    record = {
        "schema": 1,
        "group": group,
        "environment": environment(commit),
        "ceilings": dict(ceilings),
        "missing": missing,
        "bounds": bounds,
        "results": results,
    }
    done, total = 0, sum(1 if toy else len(entry.shapes) for entry in entries)
    for entry in entries:
        missing += [{"op": entry.op, "variant": name, "why": why} for name, why in entry.missing(device).items()]
        bounds += [
            {"op": entry.op, "variant": v.name, "instead": v.instead} for v in entry.present(device) if v.instead
        ]
        shapes = {"toy": entry.toy} if toy else entry.shapes
        progress(f"{entry.op}: correctness", done, total)
        broken: dict[str, str] = {}
        gate = entry.toy if toy else entry.gate or next(iter(shapes.values()))
        verdicts = check(entry, gate, device, dtype, broken=broken)
        for name, shape in shapes.items():
            progress(f"{entry.op} {name}: timing", done, total)
            entry = dataclasses.replace(entry, variants=tuple(v for v in entry.variants if v.name not in broken))
            results += _time_entry(entry, name, shape, verdicts, ceilings, device, dtype, rounds, broken)
            raised = [{"op": entry.op, "variant": name, "why": why} for name, why in broken.items()]
            record["missing"] = missing + raised
            so_far(record)
            done += 1
        missing = record["missing"]
    return record


def measure_ceilings(
    entries: Sequence[Entry], device: torch.device, dtype: torch.dtype, toy: bool, rounds: tuple[int, int] = (20, 200)
) -> dict[str, float]:
    """Copy bandwidth in bytes a second and GEMM rate in operations a second, from the ceilings' own entries."""
    rates = {}
    for entry in entries:
        shape = entry.toy if toy else next(iter(entry.shapes.values()))
        eager = [variant for variant in entry.present(device) if variant.name == "eager"]
        thunks = {name: calls[:1] for name, calls in _thunks(entry, eager, shape, device, dtype).items()}
        times = time_interleaved(thunks, device, *rounds)["eager"]
        work = entry.flops(shape) or entry.bytes(shape, dtype.itemsize)
        rates["flops_per_second" if entry.flops(shape) else "bytes_per_second"] = work / times.p50 * 1e3
    return rates


def _thunks(
    entry: Entry,
    variants: Sequence[Variant],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    broken: dict[str, str] | None = None,
    built: dict[str, Taken] | None = None,
) -> dict[str, list[Thunk]]:
    """Calls of each variant, built once, on input sets that all variants share: as many as keep the cache cold.

    A bound, which the gate has not called, may raise: `broken` gets its name and the reason. `built` gets what building
    each took.
    """
    if not entry.once:  # which is compiled for shapes of any size, since it has its time from one call
        torch.compiler.reset()  # what was compiled for other shapes would make this one's dynamic
    sets = 1 if entry.once else input_sets(entry.bytes(shape, dtype.itemsize), device)
    generator = torch.Generator(device).manual_seed(1)
    drawn = [entry.draw(shape, device, dtype, generator) for _ in range(sets)]
    thunks = {}
    for variant in variants:
        watch = MemoryWatch(device)
        try:
            call = variant.build(shape, device, dtype)
            taken = watch.taken()
            if variant.instead and not entry.once:
                call(*drawn[0])
        except Exception as error:
            if broken is None or not variant.instead:
                raise
            broken[variant.name] = why_broken(error)
            continue
        thunks[variant.name] = [partial(call, *inputs) for inputs in drawn]
        if built is not None and taken is not None:
            built[variant.name] = taken
    return thunks


def _time_entry(
    entry: Entry,
    name: str,
    shape: Shape,
    verdicts: Mapping[str, Verdict],
    ceilings: Mapping[str, float],
    device: torch.device,
    dtype: torch.dtype,
    rounds: tuple[int, int],
    broken: dict[str, str],
) -> list[dict[str, Any]]:
    moved, operations = entry.bytes(shape, dtype.itemsize), entry.flops(shape)
    floor = 1e3 * max(moved / ceilings["bytes_per_second"], operations / ceilings["flops_per_second"])
    variants = [v for v in entry.present(device) if v.shapes is None or name in v.shapes or name == "toy"]
    built: dict[str, Taken] = {}
    thunks = _thunks(entry, variants, shape, device, dtype, broken, built)
    captures = [variant.name for variant in variants if variant.captures and variant.name in thunks]
    attention = {v.name: {"attention": v.attention(shape, device, dtype)} for v in variants if v.attention}
    results = []
    if entry.once:
        may_break = {variant.name for variant in variants if variant.instead}
        ways: Iterable[Measured] = [_measured_once(thunks, device, may_break, broken)]
    else:
        ways = _measured(captures, thunks, device, rounds)
    for timing, cache, measured, peaks in ways:
        for variant, times in measured.items():
            verdict = verdicts.get(variant)
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
                    "peak_bytes": _whole_peak(built.get(variant), peaks[variant]),
                    "bytes": moved,
                    "flops": operations,
                    "floor_ms": floor,
                    "percent_of_floor": 100 * floor / times.p50,
                    "errors": list(verdict.errors) if verdict else [],
                    "allowed": list(verdict.allowed) if verdict else [],
                    **attention.get(variant, {}),
                }
            )
    return results


def _whole_peak(built: Taken | None, of_call: int | None) -> int | None:
    """The most that building or a call takes, where a call comes on top of what building keeps."""
    return of_call if built is None or of_call is None else max(built.peak, built.kept + of_call)


Measured = tuple[str, str, dict[str, Times], dict[str, int | None]]
"""Timing, cache, times and peak bytes of one way in which the variants are timed."""


def _measured_once(
    thunks: Mapping[str, list[Thunk]], device: torch.device, may_break: Collection[str], broken: dict[str, str]
) -> Measured:
    """One call of each variant; `broken` gets the names of those of `may_break` that raise, and why."""
    peaks: dict[str, int | None] = {}
    times: dict[str, Times] = {}
    for name, calls in thunks.items():
        one = partial(time_interleaved, {name: calls}, device, 1, 1, warmup=0)
        try:
            peaks[name] = peak_bytes(lambda one=one: times.update(one()), device)
        except Exception as error:
            if name not in may_break:
                raise
            broken[name] = why_broken(error)
    return _plain_timing(device), "cold", times, peaks


def _plain_timing(device: torch.device) -> str:
    return "events" if device.type == "cuda" else "clock"


def _measured(
    captures: Sequence[str], thunks: Mapping[str, list[Thunk]], device: torch.device, rounds: tuple[int, int]
) -> Iterator[Measured]:
    """Every way in which the variants are timed that can be called again and again."""
    plain = _plain_timing(device)
    peaks = {name: peak_bytes(calls[0], device) for name, calls in thunks.items()}
    yield plain, "cold", time_interleaved(thunks, device, *rounds), peaks
    yield plain, "warm", time_interleaved({name: calls[:1] for name, calls in thunks.items()}, device, *rounds), peaks
    if device.type == "cuda" and captures:
        graphs = {name: [captured(call, device) for call in thunks[name]] for name in captures}
        yield "graph", "cold", time_interleaved(graphs, device, *rounds), peaks
        warm = {name: replays[:1] for name, replays in graphs.items()}
        yield "graph", "warm", time_interleaved(warm, device, *rounds), peaks


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
