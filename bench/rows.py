"""The named rows of a record that is made row by row: which of them are wanted."""

from collections.abc import Mapping
from typing import TypeVar

import typer

T = TypeVar("T")


def picked(rows: Mapping[str, T], names: str) -> dict[str, T]:
    """The rows with these names, which have commas between them, in the order of `rows`; all where none is given.

    BadParameter: a name that does not exist.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise typer.BadParameter(f"there is no row {unknown[0]!r}; allowed: {', '.join(rows)}")
    return {name: row for name, row in rows.items() if not wanted or name in wanted}
