"""Documents with the lengths of the contest's law, cut from real text: what `klora.bench.rank_scoring` is timed on.

    python -m klora.bench.law train.jsonl.zst law.jsonl.zst --documents 12500

A document's length in tokens is lognormal, as in the group `ttt` of the benchmarks; its text is the next so many
characters of the source, whose documents follow one another. The same arguments give the same documents.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import zstandard

from ..errors import KloraError
from ..model.corpus import Corpus
from ..model.storage import write_bytes

MEAN, DEVIATION = 6.555, 1.066
"""Of the logarithm of a document's tokens."""
SHORTEST, LONGEST = 8, 60_000
CHARACTERS = 2.7
"""A token of technical English by a vocabulary of 1,024."""


def law_lengths(documents: int, longest: int = LONGEST) -> np.ndarray:
    """Tokens of each document, int64 [documents]; those of fewer documents are the first of those of more."""
    drawn = np.random.default_rng(0).lognormal(MEAN, DEVIATION, documents)
    return drawn.astype(np.int64).clip(SHORTEST, longest)


def cut(text: str, lengths: Iterable[int]) -> Iterator[str]:
    """Parts of `text` of so many characters each, end to end; it begins anew where it ends."""
    at = 0
    for length in lengths:
        part = text[at : at + length]
        while len(part) < length:
            part += text[: length - len(part)]
        yield part
        at = (at + length) % len(text)


def law(
    source: Annotated[Path, typer.Argument(help="Documents, JSON lines.")],
    out: Annotated[Path, typer.Argument(help="The file to write, JSON lines by zstd.")],
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 6250,
    characters: Annotated[float, typer.Option(min=0.1, help="Characters that a token stands for.")] = CHARACTERS,
) -> None:
    """Write the documents."""
    try:
        text = "\n\n".join(document.text for document in Corpus.jsonl([source]).documents())
    except KloraError as error:
        raise SystemExit(str(error)) from None
    lengths = (int(length * characters) for length in law_lengths(documents))
    lines = (json.dumps({"name": f"law-{n}", "text": text}) for n, text in enumerate(cut(text, lengths)))
    write_bytes(out, zstandard.ZstdCompressor(threads=-1).compress("\n".join(lines).encode() + b"\n"))
    print(f"{out}: {documents:,} documents")


if __name__ == "__main__":
    typer.run(law)
