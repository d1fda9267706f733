"""SentencePiece BPE with byte fallback, and how many bytes of text each token stands for.

    bytes(t | prev) = UTF-8 length of t's text without one leading space
                      + 1 if t's piece starts with a space and prev is not a control token

A byte token is 1; control, unknown and unused tokens are 0. SentencePiece puts a space in front of every text; after
BOS it is not text, and that is the space the rule leaves out. (A model with add_dummy_prefix off puts none there: each
space it encodes is counted.) Inside pieces a space is U+2581, counted as the 1 byte it stands for. So the bytes of a
document's targets sum to its text's UTF-8 length, with one exception: a literal U+2581 in a text is indistinguishable
from a space, and is counted (1 byte, not 3) and decoded as one.

That holds for models that keep a text as it is. Of one that normalises text (NFKC, folded case, spaces dropped) the
bytes are those of the normalised text. Token shards may be made by such a model, and every number of theirs says so. A
text is scored only where its tokens give it back as it is.
Models that are counted wrong even then (that write spaces behind words or have no piece for them) are refused: every
model is probed when it is loaded.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
import sentencepiece

from ..errors import KloraError
from .corpus import TextDocument
from .reading import read_bytes

BOS_ID = 1
MAX_VOCAB = 2**16  # shards hold uint16
SPACE = "\u2581"
UNKNOWN_MARK = "\u2585"  # SentencePiece refuses to train on any sentence that contains its mark of an unknown character

# A training sentence is at most 1000 characters, so never over the 4192 bytes above which SentencePiece drops it.
SENTENCE_CHARACTERS = 1000
SENTENCE_BYTES = 4192
# At most 100 MB of ASCII text: bounds memory for a corpus of any size.
SAMPLED_SENTENCES = 100_000

GATHERED = 2**20
"""Tokens whose bytes are gathered at a time: some tens of MB of places."""

PROBES = {
    "a space": " ",
    "several spaces": "a  b   c",
    "leading and trailing spaces": "  a ",
    "line ends": "a\nb\r\nc\r\n\nd\n",
    "tabs": "\ta\t\tb",
    "upper case": "Straße ABC İI",
    "composed and decomposed accents": "é e\u0301 \u212b \u00c5 가 \u1100\u1161",
    "full-width letters": "Ａｂ１！ ｶﾞ",
    "ligatures": "ﬁ ﬄ ĳ …",
    "emoji": "😀👩\u200d🚀❤\ufe0f",
    "other spaces": "\u00a0a\u2028b\u3000c\ufeffd\x0be\x85",
    "the mark of a space": f"a{SPACE}b {SPACE}",
    "the null character": "\0a\0",
    "names of control tokens": "<s></s><unk><pad><0x0A>",
    # The first 256 characters and one for each other lead byte of UTF-8: every byte that a text can have.
    "all bytes": "".join(map(chr, (*range(0x100), *range(0x100, 0x800, 0x40), *range(0x800, 0xD800, 0x800))))
    + "\ue000\uf000\U00010000\U00040000\U00080000\U000c0000\U00100000",
}
"""Texts that a model has to give back as they are, or as it says that it normalises them."""

COVERS_MUCH = "all bytes", "its own pieces", "characters"
"""Probes of many kinds of text at once: what a model changes in them is named where no other probe names it."""

KEEPS_TEXT = (
    "normalization_rule_name=identity, remove_extra_whitespaces=false, treat_whitespace_as_suffix=false, "
    "byte_fallback=true and a piece for the space"
)
"""The options of SentencePiece's trainer that make such a model."""


class TokenizerError(KloraError, ValueError):
    """A tokenizer that cannot be trained as asked, or a model that does not fit this system."""


class Tokenizer:
    """A SentencePiece model with BOS id 1 that gives every text back as it is, or normalised.

    piece_bytes    int64 [V]  bytes of the piece without one leading space; 0 for control tokens
    leading_space  bool [V]   whether the piece starts with a space
    is_control     bool [V]   control, unknown and unused tokens: no text
    is_lost        bool [V]   unknown and unused tokens: text that nobody knows; no text is encoded as them
    adds_space     bool       whether the model puts a space in front of every text, which is none of its bytes
    changes        str        what normalising does to text, with an example; empty where the model keeps text

    Example: tokens = Tokenizer.from_file("runs/tiny/tokenizer.model").encode("import os")
    """

    def __init__(self, model: bytes, source: str = "tokenizer", may_normalise: bool = False):
        """`model` is a serialized SentencePiece model; `source` names it in errors.

        TokenizerError: bytes that are no model, another BOS, too many pieces, no byte fallback, or a model that does
        not give back what it encoded. The error says which text it changes. With `may_normalise` the normalised text
        may be what it gives back.
        """
        self._model = bytes(model)
        try:
            # Not the constructor: it takes empty bytes for no model and loads nothing.
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(self._model)
        except (RuntimeError, ValueError) as error:
            raise TokenizerError(f"{source} is not a SentencePiece model: {error}") from None
        try:
            self._read(source, may_normalise)
        except TokenizerError:
            raise
        except (ValueError, RuntimeError, IndexError, OverflowError) as error:
            raise TokenizerError(f"{source} is a damaged SentencePiece model: {error}") from None

    def _read(self, source: str, may_normalise: bool) -> None:
        """Take what the class promises from the model, and probe it."""
        processor = self._processor
        if processor.bos_id() != BOS_ID:
            raise TokenizerError(f"{source} has BOS id {processor.bos_id()}; wanted {BOS_ID}, which splits the shards")
        if processor.vocab_size() > MAX_VOCAB:
            raise TokenizerError(f"{source} has {processor.vocab_size()} pieces; allowed: at most {MAX_VOCAB}")
        ids = range(processor.vocab_size())
        byte = [processor.is_byte(i) for i in ids]
        if sum(byte) != 256:
            raise TokenizerError(f"{source} has no byte fallback; without it text outside its pieces counts as 0 bytes")
        self.is_lost = np.array([processor.is_unknown(i) or processor.is_unused(i) for i in ids])
        control = [processor.is_control(i) or bool(self.is_lost[i]) for i in ids]
        self._text = [_piece_text(processor.id_to_piece(i), byte[i], control[i]) for i in ids]
        self.is_control = np.array(control)
        self.leading_space = np.array([self._text[i].startswith(b" ") and not byte[i] for i in ids])
        self._bytes = np.frombuffer(b"".join(self._text), dtype=np.uint8)
        self._sizes = np.array([len(text) for text in self._text])
        self._ends = np.cumsum(self._sizes)
        self.piece_bytes = self._sizes - self.leading_space
        self.adds_space = self._text[processor.encode("a")[0]].startswith(b" ")
        fault, changed = self._probed()
        refused = fault or ("" if may_normalise else next((f"changes {n}: it {c}" for n, c in changed.items()), ""))
        if refused:
            raise TokenizerError(
                f"{source} {refused}: bits per byte would be of another text. Allowed: models that keep text as it is "
                f"({KEEPS_TEXT}), such as those that `klora train` makes"
            )
        names = [name for name in changed if name not in COVERS_MUCH] or list(changed)
        self.changes = f"{', '.join(names)} (it {changed[names[0]]})" if names else ""

    def _probed(self) -> tuple[str, dict[str, str]]:
        """(what is wrong with the model, what normalising does to each probe that it changes), both empty at best.

        Wrong is a text that is given back neither as it is nor as SentencePiece normalises it, or is miscounted.
        """
        changed = {}
        learned = "".join(text.decode() for text in self._text if not _is_broken(text))
        for name, text in {**PROBES, "its own pieces": learned}.items():
            ids, wanted, normalised = self.encode(text), text.replace(SPACE, " "), self.normalise(text)
            found, counted = self.decode(ids), int(self.target_bytes(ids).sum())
            does = f"reads {_around(wanted, found)} back as {_around(found, wanted)}"
            if found != normalised:
                return f"changes {name}: it {does}", {}
            if counted != len(normalised.encode()):
                size = len(normalised.encode())
                return f"miscounts {name}: {counted} bytes for {_around(normalised)}, which has {size}", {}
            if found != wanted:
                changed[name] = does
        wanted, found = every_character().replace(SPACE, " "), self.normalise(every_character())
        if found != wanted:
            changed["characters"] = f"reads {_around(wanted, found)} as {_around(found, wanted)}"
        return "", changed

    @classmethod
    def train(cls, documents: Iterable[TextDocument | str], vocab_size: int = 1024) -> Self:
        """Learn `vocab_size` pieces from one pass over documents or texts: the same pieces from the same ones.

        At most SAMPLED_SENTENCES sentences, a uniform sample of all, are held. TokenizerError if the text is too small
        or its alphabet too large for `vocab_size`; errors of `documents` itself pass through.

        Example: learned = Tokenizer.train(Corpus.text(["essays"]).documents(), vocab_size=300)
        """
        if vocab_size > MAX_VOCAB:
            raise TokenizerError(f"vocab_size={vocab_size} is not possible; allowed: at most {MAX_VOCAB}")
        source = _Remembering(_sentences([documents] if isinstance(documents, str) else documents))
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(source),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                # The bytes take the rarest characters; in a small vocabulary a merge saves more than a piece for each.
                character_coverage=0.9995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                add_dummy_prefix=True,
                unk_id=0,
                bos_id=BOS_ID,
                eos_id=2,
                pad_id=-1,
                input_sentence_size=SAMPLED_SENTENCES,
                shuffle_input_sentence=True,
                max_sentence_length=SENTENCE_BYTES,
                num_threads=16,  # not the machine's count, so that no machine can learn other pieces
                minloglevel=4,
            )
        except RuntimeError as error:
            if source.error is not None:
                raise source.error from None
            raise TokenizerError(_training_failure(str(error), vocab_size)) from None
        return cls(model.getvalue())

    @classmethod
    def from_bytes(cls, model: bytes, may_normalise: bool = False) -> Self:
        """The tokenizer of a serialized SentencePiece model; errors as of the class.

        Example: same = Tokenizer.from_bytes(tokenizer.to_bytes())
        """
        return cls(model, may_normalise=may_normalise)

    @classmethod
    def from_file(cls, path: str | Path, may_normalise: bool = False) -> Self:
        """The tokenizer of a file of SentencePiece's; TokenizerError also where it cannot be read.

        Example: same = Tokenizer.from_file("runs/tiny/tokenizer.model")
        """
        try:
            return cls(read_bytes(Path(path)), str(path), may_normalise)
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read as a tokenizer: {error}") from error

    def to_bytes(self) -> bytes:
        """The serialized SentencePiece model."""
        return self._model

    @property
    def vocab_size(self) -> int:
        """Number of pieces V; ids are 0 to V - 1."""
        return len(self._text)

    @property
    def bos_id(self) -> int:
        """The id that begins every text."""
        return BOS_ID

    def encode(self, text: str) -> np.ndarray:
        """uint16 [n]: BOS and the text's tokens. UnicodeEncodeError if `text` has half a surrogate pair."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Each text as in :meth:`encode`, on `threads` threads."""
        if not texts:
            return []
        encoded = self._processor.encode([text.encode() for text in texts], add_bos=True, num_threads=threads)
        return [np.array(ids, dtype=np.uint16) for ids in encoded]

    def normalise(self, text: str) -> str:
        """The text that the tokens of `text` stand for: `text` itself, but for U+2581, where the model keeps text."""
        put, found = self._processor.normalize("a"), self._processor.normalize(text)
        # The space that SentencePiece adds, before the text or behind it, is none of the text.
        found = found.removeprefix(SPACE) if put.startswith(SPACE) else found
        return (found.removesuffix(SPACE) if put.endswith(SPACE) else found).replace(SPACE, " ")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` [n]; the space that the model adds at the start or after a control token is left out.

        Bytes that are not UTF-8 become U+FFFD. TokenizerError for an id outside the vocabulary.
        """
        return self.text_bytes(ids).decode(errors="replace")

    def text_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of text of all of `ids` [n], one after the other, which :meth:`decode` decodes."""
        ids = np.asarray(ids, dtype=np.int64)
        cut, parts = self._cut(ids), []
        for begin in range(0, ids.size, GATHERED):
            piece, less = ids[begin : begin + GATHERED], cut[begin : begin + GATHERED]
            sizes = self._sizes[piece] - less
            # From a byte's place here to its place among the bytes of all pieces: what is cut lies before both.
            shift = self._ends[piece] - np.cumsum(sizes)
            parts.append(self._bytes[np.arange(sizes.sum()) + np.repeat(shift, sizes)].tobytes())
        return b"".join(parts)

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` int64 [n] begin with the space that the model adds. TokenizerError for an id of no piece."""
        self._require_ids(ids)
        starts_text = np.concatenate([[True], self.is_control[ids[:-1]]])[: ids.size] & self.adds_space
        return self.leading_space[ids] & starts_text

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """The bytes of text of each of `ids` [n], which :meth:`text_bytes` joins; of a control token none."""
        ids = np.asarray(ids, dtype=np.int64)
        return [self._text[i][c:] for i, c in zip(ids.tolist(), self._cut(ids).tolist(), strict=True)]

    def target_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of text of each target `tokens[1:]` given the token before it: [n] -> int64 [n - 1].

        TokenizerError for an id outside the vocabulary.
        """
        tokens = np.asarray(tokens)
        self._require_ids(tokens)
        previous, target = tokens[:-1], tokens[1:]
        return self.piece_bytes[target] + (self.leading_space[target] & ~(self.is_control[previous] & self.adds_space))

    def require_known(self, tokens: np.ndarray, name: str) -> None:
        """TokenizerError where the bytes of `tokens` are unknown: ids outside the vocabulary, and lost text."""
        try:
            self._require_ids(tokens)
        except TokenizerError as error:
            raise TokenizerError(f"{name} has {error}; give the tokenizer that made the shards") from None
        if (lost := self.is_lost[tokens]).any():
            raise TokenizerError(
                f"{name} has the unknown token {tokens[lost][0]}, whose bytes of text nobody knows; make the shards "
                "with this tokenizer, which has a token for every byte"
            )

    def count_controls(self, tokens: np.ndarray) -> int:
        """How many of `tokens` are control tokens other than BOS."""
        return int((self.is_control[tokens] & (tokens != BOS_ID)).sum())

    def notes_on_shards(self, controls: int, holder: str = "the shards") -> tuple[str, ...]:
        """Sentences that belong beside bits per byte of shards; `holder` has `controls` control tokens but BOS."""
        notes = []
        if self.changes:
            notes.append(
                "bits per byte are per byte of the normalised text, as the shards hold it, not of the original: the "
                f"tokenizer changes {self.changes}"
            )
        if controls:
            notes.append(
                f"{holder} have {controls:,} control tokens other than BOS: bits per byte count their bits, and no "
                "byte for them"
            )
        return tuple(notes)

    def _require_ids(self, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise TokenizerError(f"ids from {ids.min()} to {ids.max()}; allowed: 0 to {self.vocab_size - 1}")


class _Remembering:
    """Iterate and keep the exception that ended it: SentencePiece turns it into a RuntimeError of its own."""

    def __init__(self, items: Iterable[str]):
        self._items = items
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._items
        except Exception as error:
            self.error = error
            raise


def _sentences(documents: Iterable[TextDocument | str]) -> Iterator[str]:
    """Cut documents into training sentences: after the last line end that fits, else at a space, else anywhere.

    Line ends stay inside a sentence, so that pieces like ':\\n' are learned.
    """
    for document in documents:
        text = (document if isinstance(document, str) else document.text).replace(UNKNOWN_MARK, "")
        start = 0
        while start < len(text):
            stop = start + SENTENCE_CHARACTERS
            if stop < len(text):
                cut = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start + 1, stop)
                stop = cut if cut > start else stop
            # SentencePiece puts a space in front of a sentence, as it stands in front of a text.
            yield text[start:stop].removeprefix(" ")
            start = stop


def _piece_text(piece: str, is_byte: bool, is_control: bool) -> bytes:
    if is_control:
        return b""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


@cache
def every_character() -> str:
    """All of Unicode but surrogates, in order."""
    return np.array([*range(0xD800), *range(0xE000, 0x110000)], dtype="<u4").tobytes().decode("utf-32-le")


def _is_broken(text: bytes) -> bool:
    """Whether a piece's bytes are only a part of a character."""
    return len(text) == 1 and text >= b"\x80"


def first_difference(text: str, found: str) -> str:
    """Where `found` begins to differ from `text`, to be put behind a sentence; empty where they are equal."""
    return "" if found == text else f" ({_around(text, found)} is read back as {_around(found, text)})"


def _around(text: str, other: str = "") -> str:
    """`text` quoted; of a long one the part where it begins to differ from `other`."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text if len(text) <= 24 else text[max(0, at - 4) : at + 8])


def _training_failure(message: str, vocab_size: int) -> str:
    """SentencePiece's message in terms of what to change."""
    if most := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too large for this text, which yields {most[1]} pieces; "
            f"give more text or a vocab_size of at most {most[1]}"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small for this text: its frequent characters, the 256 bytes and 3 control "
            f"tokens need a vocab_size of at least {least[1]}"
        )
    if "!sentences_.empty()" in message:
        return "there is no text to train the tokenizer on"
    return f"SentencePiece could not train: {message}"
