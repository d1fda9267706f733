"""From two corpora to what training reads: a tokenizer and token shards, made once and kept in a cache."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cores import usable_cores
from .corpus import Corpus, TextDocument
from .shards import Shard, ShardError, ShardWriter, find_shards
from .storage import building, sync_folder, write_bytes, write_text
from .tokenizer import BOS_ID, Tokenizer, TokenizerError

FORMAT = 1  # raise it when the same corpora would give other tokens, so that old caches are left alone
BATCH_CHARACTERS = 2**20  # text encoded at a time: enough to keep the threads busy, a few tens of MB of Python integers
SAMPLE_TOKENS = 2**16  # tokens of each shard that are compared with the tokenizer

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Prepared:
    """A tokenizer and the shards that it wrote, all in `folder`; `notes` belong beside every bit per byte of theirs."""

    tokenizer: Tokenizer
    train: list[Path]
    validation: list[Path]
    folder: Path
    notes: tuple[str, ...] = ()


def prepare(
    train: Corpus, validation: Corpus, vocab_size: int, cache: str | Path, progress: Progress | None = None
) -> Prepared:
    """Train a tokenizer on `train` and write both corpora as shards under `cache`, unless they exist already.

    The folder is named by a hash of both fingerprints and `vocab_size`. It is built under another name and renamed when
    complete, so an interrupted call leaves nothing that a later one uses, and of two calls at once the first wins. What
    a killed one left is removed by the next that builds.
    `prepared.json` in it holds documents, tokens and bytes (of UTF-8 text) of each split. `progress(phase, documents)`
    is called as each of the phases "tokenizer", "train" and "validation" goes on. Raises CorpusError, TokenizerError.
    """
    key = json.dumps([FORMAT, train.fingerprint(), validation.fingerprint(), vocab_size])
    folder = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.exists():
        with building(folder) as temporary:
            built = temporary / folder.name
            built.mkdir()
            _build(train, validation, vocab_size, built, progress or (lambda phase, done: None))
            try:
                built.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
        sync_folder(folder.parent)
    try:
        return prepared_from_shards(folder)
    except (ShardError, TokenizerError) as error:
        raise ShardError(f"{error}; remove {folder}, which is made again from the text") from None


def prepared_from_shards(folder: str | Path) -> Prepared:
    """What lies in `folder`: shards *_train_<number>.bin and *_val_<number>.bin, and the one *.model that made them.

    The tokenizer may normalise text: the shards hold what it made of it. Raises ShardError or TokenizerError if
    something is missing, damaged, ambiguous or does not belong together, and for validation tokens of unknown text.
    """
    folder = Path(folder)
    train, validation = find_shards(folder, "train"), find_shards(folder, "val")
    tokenizer = tokenizer_beside(folder)
    for path in train + validation:
        head = Shard(path).read(0, SAMPLE_TOKENS)
        highest = int(head.max())
        if highest >= tokenizer.vocab_size:
            raise ShardError(
                f"{path} has token {highest}, but the tokenizer beside it has {tokenizer.vocab_size} pieces; "
                "wanted the tokenizer that made the shard"
            )
        if path in (train[0], validation[0]) and head[0] != BOS_ID:
            raise ShardError(f"{path} starts with token {head[0]}; wanted BOS, {BOS_ID}")
    controls = sum(_count_controls(path, tokenizer) for path in validation)
    return Prepared(tokenizer, train, validation, folder, tokenizer.notes_on_shards(controls, "the validation shards"))


def _count_controls(path: Path, tokenizer: Tokenizer) -> int:
    """Control tokens other than BOS in a shard. TokenizerError for tokens whose bytes are unknown."""
    controls = 0
    for block in Shard(path).blocks():
        tokenizer.require_known(block, str(path))
        controls += tokenizer.count_controls(block)
    return controls


def tokenizer_beside(folder: Path) -> Tokenizer:
    """The one *.model in a folder of shards, which may normalise. ShardError where there is none, or more than one."""
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        names = ", ".join(path.name for path in models) or "none"
        raise ShardError(f"{folder}: wanted one tokenizer *.model beside the shards, found {names}")
    return Tokenizer.from_file(models[0], may_normalise=True)


def _build(train: Corpus, validation: Corpus, vocab_size: int, folder: Path, progress: Progress) -> None:
    tokenizer = Tokenizer.train(_counted(train.documents(), "tokenizer", progress), vocab_size)
    write_bytes(folder / f"{train.kind}_{vocab_size}_bpe.model", tokenizer.to_bytes())
    counts = {}
    for phase, split, corpus in (("train", "train", train), ("validation", "val", validation)):
        documents = text_bytes = 0
        with ShardWriter(folder, split, prefix=corpus.kind) as writer:
            for texts in _batches(_counted(corpus.documents(), phase, progress)):
                for tokens in tokenizer.encode_many(texts, threads=usable_cores()):
                    writer.add(tokens)
                documents += len(texts)
                text_bytes += sum(len(text.encode()) for text in texts)
        counts[phase] = {"documents": documents, "tokens": writer.tokens, "bytes": text_bytes}
    record = {"format": FORMAT, "vocab_size": vocab_size, "sources": [str(train), str(validation)], **counts}
    write_text(folder / "prepared.json", json.dumps(record, indent=2) + "\n")


def _counted(documents: Iterable[TextDocument], phase: str, progress: Progress) -> Iterator[TextDocument]:
    for done, document in enumerate(documents, start=1):
        yield document
        progress(phase, done)


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[str]]:
    """Lists of texts of about BATCH_CHARACTERS together; a longer text is a list of its own or ends one."""
    texts, characters = [], 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts
