"""Token shards: files of uint16 tokens, the stream they form together, and the order in which training reads it.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then `count` little-endian uint16.
Documents follow each other, BOS first, and may run over the end of a shard into the next one. No function here holds
more of a corpus than the rows or the document it returns and one block. Shards are read and not mapped: of a file that
is cut short meanwhile a read says so, and a map ends the process by SIGBUS.
"""

import hashlib
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import KloraError
from .reading import is_count
from .storage import replacing
from .tokenizer import BOS_ID

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
SPLITS = ("train", "val")
SCAN_TOKENS = 2**20  # tokens looked through at a time: 2 MiB


class ShardError(KloraError, ValueError):
    """A shard file that is missing, damaged or of another format, or a stream that cannot serve what is asked."""


class ShardWriter:
    """Write a stream of tokens as `folder/prefix_split_000000.bin`, `..._000001.bin` and so on.

        with ShardWriter(folder, "val") as writer:
            writer.add(tokens)

    Tokens go straight to a temporary file. The shards take their names, synced, when the block ends well: after an
    exception the folder is as it was. Raises ShardError if `folder` already has shards of that prefix and split, which
    would mix with the new ones.

    tokens   tokens written so far
    paths    the shards; they exist once the block has ended
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        prefix: str = "fineweb",
        tokens_per_shard: int = 100_000_000,
    ):
        if split not in SPLITS:
            raise ShardError(f"split={split!r} is not possible; allowed: one of {', '.join(SPLITS)}")
        if not 1 <= tokens_per_shard < 2**31:
            raise ShardError(f"tokens_per_shard={tokens_per_shard} is not possible; allowed: 1 to {2**31 - 1}")
        self.folder = Path(folder)
        self.paths: list[Path] = []
        self.tokens = 0
        self._name = f"{prefix}_{split}"
        self._limit = tokens_per_shard
        self._in_shard = 0
        self._file = None
        self._unnamed = ExitStack()
        old = [path.name for path in _shards(self.folder, split) if path.name.startswith(f"{self._name}_")]
        if old:
            raise ShardError(f"{self.folder} already has {old[0]}; remove its shards or write to another folder")

    def __enter__(self) -> Self:
        return self

    def add(self, tokens: np.ndarray) -> None:
        """Append integers [n], each in 0..65535. ShardError for anything else."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ShardError(f"tokens are {tokens.dtype} {list(tokens.shape)}; wanted one dimension of integers")
        if tokens.dtype != np.uint16 and tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**16:
            raise ShardError(f"tokens from {tokens.min()} to {tokens.max()}; wanted 0 to {2**16 - 1}")
        while len(tokens):
            if self._file is None:
                self._begin_shard()
            part, tokens = np.split(tokens, [self._limit - self._in_shard])
            self._file.write(np.ascontiguousarray(part, dtype="<u2"))
            self._in_shard += len(part)
            self.tokens += len(part)
            if self._in_shard == self._limit:
                self._end_shard()

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._unnamed.__exit__(kind, error, trace)
            return
        with self._unnamed:
            if self._file is not None:
                self._end_shard()

    def _begin_shard(self) -> None:
        path = self.folder / f"{self._name}_{len(self.paths):06d}.bin"
        temporary = self._unnamed.enter_context(replacing(path))
        self._file = self._unnamed.enter_context(open(temporary, "wb"))  # noqa: SIM115
        self._file.write(bytes(HEADER_BYTES))
        self.paths.append(path)

    def _end_shard(self) -> None:
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self._in_shard
        with self._file as file:
            file.seek(0)
            file.write(header)
        self._file, self._in_shard = None, 0


class Shard:
    """An open shard of `len` tokens. ShardError if it is not a whole one, or where it has become shorter since."""

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # no pipe is waited for
            weakref.finalize(self, os.close, self._handle)
            size, head = os.fstat(self._handle).st_size, os.pread(self._handle, HEADER_BYTES, 0)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read: {error}") from error
        if len(head) < HEADER_BYTES:
            raise ShardError(f"{path} has {size} bytes; wanted a header of {HEADER_BYTES} bytes and tokens")
        magic, version, count = map(int, np.frombuffer(head, dtype="<i4")[:3])
        if magic != MAGIC:
            raise ShardError(f"{path} has magic {magic}; wanted {MAGIC}, the mark of a token shard")
        if version != VERSION:
            raise ShardError(f"{path} has version {version}; wanted {VERSION}")
        if count < 1 or size != HEADER_BYTES + 2 * count:
            raise ShardError(
                f"{path} has {size} bytes and a header of {count} tokens; wanted at least 1 token and "
                f"{HEADER_BYTES} + 2 * tokens bytes"
            )
        self._count = count

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` at most, uint16 [n]."""
        tokens = np.empty(min(stop, self._count) - start, dtype="<u2")
        left, at = memoryview(tokens).cast("B"), HEADER_BYTES + 2 * start
        try:
            while len(left) and (count := os.preadv(self._handle, [left], at)):
                left, at = left[count:], at + count
        except OSError as error:
            raise ShardError(f"{self.path}: cannot be read: {error}") from error
        if len(left):
            raise ShardError(
                f"{self.path} ends before token {start + len(tokens):,} of {self._count:,}: it was cut short after it "
                "was opened; copy it again"
            )
        return tokens

    def blocks(self) -> Iterator[np.ndarray]:
        """All tokens, SCAN_TOKENS at a time."""
        for start in range(0, self._count, SCAN_TOKENS):
            yield self.read(start, start + SCAN_TOKENS)


class ShardFacts(NamedTuple):
    """What tells a shard from another one: its name, the number of its tokens and their SHA-256."""

    name: str
    tokens: int
    sha256: str


def survey(paths: Sequence[str | Path], vocab_size: int, threads: int | None = None) -> list[ShardFacts]:
    """Read shards from end to end, several at a time. ShardError for a token that a vocabulary of that size has not."""

    def of_one(path: str | Path) -> ShardFacts:
        shard, digest, at = Shard(path), hashlib.sha256(), 0
        for block in shard.blocks():
            if block.max() >= vocab_size:
                wrong = int((block >= vocab_size).argmax())
                raise ShardError(
                    f"{path} has token {block[wrong]} at place {at + wrong:,}, but the tokenizer has {vocab_size} "
                    "pieces; wanted the tokenizer that made the shard"
                )
            digest.update(block)
            at += len(block)
        return ShardFacts(shard.path.name, len(shard), digest.hexdigest())

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return list(pool.map(of_one, paths))


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of `split` ("train" or "val") in `folder`, in the order of their names. ShardError if none."""
    found = _shards(Path(folder), split)
    if not found:
        raise ShardError(f"{folder}: there is no token shard *_{split}_<number>.bin")
    return found


def _shards(folder: Path, split: str) -> list[Path]:
    # Not a glob: my_val_set_train_000000.bin would match *_val_*.bin.
    name = re.compile(rf"(.*)_{split}_(\d+)\.bin")
    found = [(match, path) for path in folder.glob("*.bin") if (match := name.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: (pair[0][1], int(pair[0][2])))]


class TokenStream:
    """Several shards read as one sequence of tokens. ShardError if one of them is not a shard."""

    def __init__(self, paths: Sequence[str | Path]):
        if not paths:
            raise ShardError("a token stream of no shards; wanted at least one")
        self.paths = [Path(path) for path in paths]
        self._shards = [Shard(path) for path in self.paths]
        self._starts = np.cumsum([0, *map(len, self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens `start` to `stop`, uint16 [stop - start], whichever shards they lie in."""
        if not 0 <= start <= stop <= len(self):
            raise ShardError(f"tokens {start} to {stop} of a stream of {len(self)}")
        parts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base = int(self._starts[shard])
            part = self._shards[shard].read(start - base, stop - base)
            parts.append(part)
            start += len(part)
            shard += 1
        return np.concatenate([np.empty(0, dtype=np.uint16), *parts])

    def documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, tokens): uint16 [n] from a BOS to before the next one.

        A document is named STEM#INDEX: the shard in which it starts, and how many others start before it there.
        ShardError if the stream does not start with BOS, which is when it starts inside a document.
        """
        name, parts = "", []
        for path, shard in zip(self.paths, self._shards, strict=True):
            index = 0
            for block in shard.blocks():
                cuts = np.flatnonzero(block == BOS_ID).tolist()
                head, *pieces = np.split(block, cuts)
                if len(head) and not name:
                    raise ShardError(f"{path} starts with token {head[0]}; wanted BOS, {BOS_ID}")
                parts.append(head)
                for piece in pieces:
                    if name:
                        yield name, np.concatenate(parts)
                    name, parts = f"{path.stem}#{index}", [piece]
                    index += 1
        yield name, np.concatenate(parts)


class RowSampler:
    """Training rows of a stream in a new seeded order every epoch.

    Row i is tokens i*L to (i+1)*L inclusive: L inputs and the L targets one further. The last tokens that do not make a
    row of L + 1 are left out. The order depends on the seed and the epoch alone, and every rank that takes the same
    counts sees the same order. ShardError if the stream is shorter than one row.
    """

    def __init__(self, stream: TokenStream, row_length: int, seed: int):
        if row_length < 1:
            raise ShardError(f"row_length={row_length} is not possible; allowed: at least 1")
        self.stream = stream
        self.row_length = row_length
        self.seed = seed
        self.rows = (len(stream) - 1) // row_length
        if self.rows < 1:
            raise ShardError(
                f"a stream of {len(stream)} tokens has no row of {row_length} + 1; give more text or a shorter row"
            )
        self._go_to(0, 0)

    def next_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` rows: inputs and targets, both int64 [count, L] on the CPU."""
        return self.take(count, rank=0, world=1)

    def take(self, count: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of :meth:`take_rows`, int64 [count / world, L] each."""
        tokens = self.take_rows(count, rank, world).long()
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def take_rows(self, count: int, rank: int, world: int) -> Tensor:
        """Move on by `count` rows and return the `rank`-th of `world` equal parts, int32 [count / world, L + 1]."""
        if count < 1 or world < 1 or count % world or not 0 <= rank < world:
            raise ShardError(f"{count} rows for rank {rank} of {world}; wanted rows that divide over the ranks")
        share = count // world
        own = self._advance(count)[rank * share : (rank + 1) * share]
        length = self.row_length
        rows = np.stack([self.stream.tokens(i * length, (i + 1) * length + 1) for i in own.tolist()])
        return torch.from_numpy(rows.astype(np.int32))

    def state(self) -> dict[str, int]:
        """Where the sampler is, and what it must be given again to go on from there."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on exactly where :meth:`state` was taken. ShardError if stream, row length or seed are others."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ShardError(f"the saved sampler has {name}={state.get(name)}, this one {value}; cannot resume")
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if not (is_count(epoch) and is_count(position, self.rows)):
            raise ShardError(f"the saved sampler is at row {position} of epoch {epoch}; wanted row 0 to {self.rows}")
        self._go_to(epoch, position)

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "row_length": self.row_length, "tokens": len(self.stream)}

    def _go_to(self, epoch: int, position: int) -> None:
        # Hashed: seed + epoch would give epoch 1 of one seed the order of epoch 0 of the next.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._order = torch.randperm(self.rows, generator=generator)
        self._epoch, self._position = epoch, position

    def _advance(self, count: int) -> Tensor:
        """The next `count` row numbers, int64 [count], through as many epochs as it takes."""
        taken = []
        while count:
            if self._position == self.rows:
                self._go_to(self._epoch + 1, 0)
            part = self._order[self._position : self._position + count]
            taken.append(part)
            self._position += len(part)
            count -= len(part)
        return torch.cat(taken)
