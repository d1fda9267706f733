"""Protobuf messages as lists of their fields, which no schema has to name.

A key is 8 times the number of a field, plus its type on the wire: 0 for a number, 1 and 5 for 8 and 4 bytes, 2 for
bytes behind their length.
"""

FIXED = {1: 8, 5: 4}


def wire_fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """The (key, value) of every field, in order."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        size = FIXED.get(key % 8)
        if size is None:
            size, at = _number(message, at)
        if key % 8 == 0:
            fields.append((key, size))
        else:
            fields.append((key, message[at : at + size]))
            at += size
    return fields


def wire_message(fields: list[tuple[int, int | bytes]]) -> bytes:
    """The message of such fields, with lengths that are right."""
    return b"".join(_number_bytes(key) + _value_bytes(key, value) for key, value in fields)


def _value_bytes(key: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _number_bytes(value)
    return value if key % 8 in FIXED else _number_bytes(len(value)) + value


def _number(data: bytes, at: int) -> tuple[int, int]:
    """(a number of seven bits a byte, the place behind it)."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _number_bytes(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
