"""Which documents are used: samples and splits that no score can influence."""

import hashlib
import os
from collections.abc import Sequence

from .documents import Document


def name_digest(name: str) -> bytes:
    """The SHA-256 of a document's name."""
    return hashlib.sha256(os.fsencode(name)).digest()


def is_for_tuning(document: Document) -> bool:
    """Whether the document is in the half that constants are chosen on: by the hash of its tokens, which are its text.

    Neither its name nor its place counts, so that texts that are the same are in the same half.
    """
    return hashlib.sha256(document.tokens.tobytes()).digest()[0] % 2 == 0


def sample(documents: Sequence[Document], tokens: int) -> list[Document]:
    """Whole documents of up to `tokens` targets in all, in the order that they are given.

    They are chosen in the order of their texts' hashes, passing over those that no longer fit: a file that is renamed
    moves none.
    """
    chosen, total = set(), 0
    for index in sorted(range(len(documents)), key=lambda index: documents[index].sha256):
        if total + documents[index].targets <= tokens:
            chosen.add(index)
            total += documents[index].targets
    return [documents[index] for index in sorted(chosen)]
