"""Changes to bytes, to values of JSON and to SentencePiece's models, each drawn from a generator of random numbers."""

import json
import math
import random
import struct
from typing import Any

from .wire import wire_fields, wire_message

NUMBERS = (
    *(0, 1, -1, 2, 31, 255, 256, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**64, 10**30, 10**400),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\0", "\ud800", "\x1b[2J", "=cmd", "../..", "9" * 300, [], {}, [[]], {"": None}),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *NUMBERS,
)
EDGES = [n.to_bytes(size, "little") for n in (0, 1, 127, 128, 255) for size in (1, 2, 4)]
EDGES += [b"\xff" * size for size in (1, 2, 4, 8)] + [b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\x10\0\0\0\0"]


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some flips, cuts, insertions, repetitions and exchanges."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.7 else draw.randrange(min(len(data), 64) + 1)
        length = min(draw.choice((1, 2, 4, 8, 64, 1024)), len(data) - at)
        kind = draw.randrange(8)
        if kind == 0 and length:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and length:
            data[at] = draw.randrange(256)
        elif kind == 2:
            edge = draw.choice(EDGES)
            data[at : at + len(edge)] = edge
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 4, 8, 100)))
        elif kind == 6:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 50))
        else:
            data[at:at] = draw.choice(
                (b"\n", b"\r", b"\0", b'"', b"{", b"[" * 3000, b",", b"\xff", b"\xef\xbb\xbf", b"NaN")
            )
    return bytes(data)


def slots(value: Any) -> list[tuple[dict | list, Any]]:
    """(holder, its key or index) of every value inside a JSON value."""
    found, holders = [], [value]
    for holder in holders:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        holders += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


def mutated_value(value: Any, draw: random.Random) -> Any:
    """A copy with one or more values of other types, sizes or depths, and fields more or less."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = json.loads(json.dumps(value))
        inside = slots(value)
        if not inside:
            return draw.choice(ODD)
        holder, last = draw.choice(inside)
        kind = draw.randrange(10)
        if kind < 5:
            holder[last] = draw.choice(ODD)
        elif kind == 5 and type(holder[last]) in (int, float) and abs(holder[last]) < 1e300:
            old = holder[last]
            holder[last] = draw.choice((-old, old + 1, old * 2, float(old), str(old)))
        elif kind == 6:
            del holder[last]
        elif kind == 7 and isinstance(holder, dict):
            holder[draw.choice(("", "extra", "\ud800", "name", "loss"))] = draw.choice(ODD)
        elif kind == 8:
            deep: Any = []
            for _ in range(draw.choice((20, 60, 110, 150))):
                deep = [deep] if draw.random() < 0.5 else {"a": deep}
            holder[last] = deep
        else:
            holder[last] = draw.choice((["x"] * 1000, {str(i): i for i in range(500)}, "y" * 5000))
    return value


def json_text(value: Any, draw: random.Random) -> bytes:
    """JSON, or what Python's writer makes of NaN; at times with a name twice, too deep, or damaged."""
    text = json.dumps(value)
    kind = draw.randrange(12)
    if kind == 0 and "{" in text:
        at = draw.choice([i for i, c in enumerate(text) if c == "{"])
        text = f'{text[: at + 1]}"a":1,"a":2{"" if text[at + 1 : at + 2] == "}" else ","}{text[at + 1 :]}'
    elif kind == 1:
        text = text.replace(
            ":", ":" + draw.choice(("[" * 100_000, "1e999", "-" * 10, "9" * 5000, "NaN", '{"a":' * 50_000)), 1
        )
    elif kind == 2:
        return mutated_bytes(text.encode(), draw)
    return text.encode()


PIECES = (
    b"",
    b"a",
    b" ",
    "\u2581".encode(),
    "\u2581\u2581a".encode(),
    b"<0x41>",
    b"<0xzz>",
    b"<s>",
    b"\xff",
    b"y" * 5000,
)
"""Texts for pieces and options of a SentencePiece model."""


def mutated_tokenizer(model: bytes, draw: random.Random) -> bytes:
    """A SentencePiece model that its parser takes, with pieces or options changed, gone, twice or exchanged."""
    fields = wire_fields(model)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(fields)) if draw.random() < 0.6 else -draw.choice((1, 2))  # behind the pieces: options
        other = draw.randrange(len(fields))
        kind = draw.randrange(8)
        if kind < 5:
            key, message = fields[at]
            fields[at] = key, wire_message(_mutated_fields(wire_fields(message), draw))
        elif kind == 5 and len(fields) > 2:
            del fields[at]
        elif kind == 6:
            fields.insert(at, fields[other])
        else:
            fields[at], fields[other] = fields[other], fields[at]
    return wire_message(fields)


def _mutated_fields(fields: list[tuple[int, Any]], draw: random.Random) -> list[tuple[int, Any]]:
    """One field with another value, or one more: a number, a fraction, a text or a table of characters."""
    numbers = (0, 1, 2, 3, 4, 5, 6, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1)
    fractions = (0.0, -1.0, 1e38, math.nan, math.inf, -math.inf)
    if not fields or draw.random() < 0.2:
        table = struct.pack("<I", 1024) + draw.randbytes(1024) + b"a\0b\0"
        number, type_, value = draw.choice(
            ((2, 2, table), (draw.randrange(1, 60), 0, draw.choice(numbers)), (draw.randrange(1, 60), 2, b"x"))
        )
        return [*fields, (8 * number + type_, value)]
    at = draw.randrange(len(fields))
    key, value = fields[at]
    if key % 8 == 0:
        value = draw.choice(numbers)
    elif key % 8 == 5:
        value = struct.pack("<f", draw.choice(fractions))
    else:
        value = draw.choice(PIECES) if draw.random() < 0.5 else mutated_bytes(value, draw)
    return [*fields[:at], (key, value), *fields[at + 1 :]]
