"""Documents as the scorer takes them, and the windows in which their targets are scored.

A document is BOS followed by its tokens; its targets are the tokens after BOS, each counted once. Targets are cut into
chunks of `chunk`; chunk j is scored inside a window of up to `window` tokens that ends where the chunk ends. The layout
says where it begins: TTTConfig.window_start.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..model.corpus import TextDocument
from ..model.tokenizer import Tokenizer, TokenizerError, first_difference
from .protocols import START, TTTConfig

ENCODE_BATCH, ENCODE_CHARACTERS = 256, 2**22
"""Texts tokenized at a time, and characters from which on a batch ends: bounds memory and feeds the threads."""


@dataclass(frozen=True)
class Document:
    """One document to score: uint16 `tokens` [n + 1] of which the first is BOS, and the UTF-8 bytes of its text.

    Tokens of models of transformers, of any vocabulary, are int32. `text_sha256` is the hex SHA-256 of the text; empty
    where a document came as tokens.

    Example: document = Document("notes", tokenizer.encode(text), len(text.encode()))
    """

    name: str
    tokens: np.ndarray
    bytes: int
    text_sha256: str = ""

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the text, or of the tokens where there is no text."""
        return self.text_sha256 or hashlib.sha256(self.tokens.tobytes()).hexdigest()

    @property
    def targets(self) -> int:
        """Number of tokens that are scored: all but BOS."""
        return len(self.tokens) - 1


def digest_of(documents: Iterable[Document]) -> str:
    """Hex SHA-256 of the documents' hashes, whatever their order."""
    return hashlib.sha256("".join(sorted(document.sha256 for document in documents)).encode()).hexdigest()


def documents_from_texts(
    texts: Iterable[TextDocument], tokenizer: Tokenizer, threads: int | None = None
) -> Iterator[Document]:
    """Tokenize texts as they come, on `threads` threads or as many as PyTorch has; bytes are those of the UTF-8 text.

    `texts` are `klora.model.corpus.TextDocument`s of a name and a text, as a Corpus yields them.

    Raises TokenizerError where a text's tokens do not give it back, as of one with U+2581, SentencePiece's own mark of
    a space, and of one that the tokenizer normalises: bits per byte would be of another text.

    Example: documents = list(documents_from_texts(Corpus.text(["essays"]).documents(), tokenizer))
    """
    batch: list[TextDocument] = []

    def encoded() -> Iterator[Document]:
        many = torch.get_num_threads() if threads is None else threads
        tokens = tokenizer.encode_many([document.text for document in batch], many)
        for document, ids in zip(batch, tokens, strict=True):
            yield document_of(document.name, document.text, ids, tokenizer)

    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if len(batch) == ENCODE_BATCH or characters >= ENCODE_CHARACTERS:
            yield from encoded()
            batch.clear()
            characters = 0
    yield from encoded()


def with_own_names(documents: Sequence[Document], say: Callable[[str], None]) -> list[Document]:
    """The documents, each under a name of its own: a later one of a name gets " (2)" behind it, and so on.

    Otherwise no row of a result would say which of them it is of. `say` hears of it once.
    """
    taken, numbers, named, changed = {document.name for document in documents}, {}, [], []
    for document in documents:
        number = numbers[document.name] = numbers.get(document.name, 0) + 1
        if number > 1:
            while (name := f"{document.name} ({number})") in taken:
                number += 1
            taken.add(name)
            numbers[document.name] = number
            changed.append(document.name)
            document = replace(document, name=name)
        named.append(document)
    if changed:
        say(
            f"{len(changed):,} documents have the name of an earlier one, such as {changed[0]!r:.120}; they get numbers"
        )
    return named


def document_of(name: str, text: str, ids: np.ndarray, tokenizer: Tokenizer) -> Document:
    """The document of a text and its tokens. TokenizerError where they are not the tokens of exactly this text."""
    encoded, counted, found = text.encode(), int(tokenizer.target_bytes(ids).sum()), tokenizer.text_bytes(ids)
    if found != encoded or counted != len(encoded):
        difference = first_difference(text, found.decode(errors="replace"))
        raise TokenizerError(
            f"document {name!r} has {len(encoded):,} bytes of text, and its tokens stand for {counted:,}{difference}: "
            "its bits per byte would be of another text; give a tokenizer that keeps this text as it is, or leave the "
            "document out"
        )
    return Document(name, ids, len(encoded), hashlib.sha256(encoded).hexdigest())


def documents_from_tokens(pairs: Iterable[tuple[str, np.ndarray]], tokenizer: Tokenizer) -> Iterator[Document]:
    """Documents from (name, tokens that start with BOS), as a token stream has them; bytes by the tokenizer's rule.

    Raises TokenizerError where that rule cannot say how many bytes they are: for tokens outside the vocabulary and for
    the unknown one, whose text is lost.
    """
    for name, tokens in pairs:
        tokenizer.require_known(tokens, f"document {name!r}")
        yield Document(name, tokens, int(tokenizer.target_bytes(tokens).sum()))


def facts_of_texts() -> dict[str, Any]:
    """What a result of texts says of its bytes: of which text they are, and sentences that belong beside it."""
    return {"bytes_of": "text", "notes": []}


def facts_of_tokens(documents: Iterable[Document], tokenizer: Tokenizer) -> dict[str, Any]:
    """As :func:`facts_of_texts` of documents that came as tokens, and how many control tokens they have."""
    controls = sum(tokenizer.count_controls(document.tokens) for document in documents)
    notes = tokenizer.notes_on_shards(controls, "the scored documents")
    return {"bytes_of": "normalised text" if tokenizer.changes else "text", "notes": list(notes)}


@dataclass(frozen=True)
class Windows:
    """Windows over one concatenation of documents; int64 arrays of one entry a window.

    Inputs are tokens[start : start + length]; the targets scored are those that follow inputs `first` to `length` - 1.
    """

    start: np.ndarray
    length: np.ndarray
    first: np.ndarray


def chunk_windows(targets: np.ndarray, offsets: np.ndarray, config: TTTConfig) -> Windows:
    """Windows of every chunk of documents with `targets` targets whose BOS lies at `offsets` in the concatenation.

    In the layout `start` the chunks whose windows begin with the document share one.
    """
    size = config.chunk
    shared = config.window // size if config.layout == START else 1
    counts = -(-(targets - shared * size).clip(min=0) // size) + (targets > 0)
    document = np.repeat(np.arange(len(targets)), counts)
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    chunk = index + shared - 1
    end = np.minimum((chunk + 1) * size, targets[document])
    start = config.window_start(chunk, end)
    first = np.where(index > 0, chunk * size, 0)
    return Windows(offsets[document] + start, end - start, first - start)
