"""Test-time training of a causal language model of transformers: its documents, its folder, and one call for all.

A document is one token that begins a text, then the text's own. The first is the tokenizer's BOS; one that has none
begins a document with its EOS, as such models are trained. It is no target and no byte. A text is scored only where its
tokens decode to exactly this text, and its bytes are its own in UTF-8, whatever a token stands for.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..model.config import ConfigError
from ..model.corpus import TextDocument
from ..model.tokenizer import TokenizerError, first_difference
from .documents import Document, facts_of_texts, with_own_names
from .hf_model import HfModel
from .pipeline import ScoreRequest, score
from .protocols import HF, TTTConfig, ttt_preset
from .results import ScoreResult

END_OF_TEXT = "<|endoftext|>"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Names of the dtypes that a model can be loaded in."""

ABOUT, WEIGHTS = (".json", ".txt", ".model"), ".safetensors"
"""Endings of the files that say what a model and its tokenizer are, and of those with its weights."""

ENCODED = 64
"""Texts tokenized at a time."""


def adapt_hf(
    model: torch.nn.Module,
    tokenizer: Any,
    documents: Iterable[str | TextDocument],
    config: TTTConfig | None = None,
    **request: Any,
) -> ScoreResult:
    """Score texts by a causal model of transformers that is adapted to each while it reads it, side by side.

    `model` is an AutoModelForCausalLM on one device, `tokenizer` its own. `documents` are texts, or texts with names
    (`klora.model.corpus.TextDocument`). `config` is the preset `hf` if left out. `request` are fields of
    :class:`ScoreRequest`: journal, say, progress, should_stop, keeps_nll. The model comes back as it was given.

    ConfigError: a setting that such a model cannot have, by its name; a document that is no text; another model's
    tokenizer. TokenizerError: a text that the tokenizer does not give back. Else as :func:`score`.

    Example: result = adapt_hf(causal_lm, hf_tokenizer, [text])
    """
    config = ttt_preset(HF) if config is None else config
    if isinstance(documents, str | TextDocument):
        raise ConfigError("documents is one text; wanted: several, in a list")
    texts = [d if isinstance(d, TextDocument) else TextDocument(str(n), d) for n, d in enumerate(documents)]
    if wrong := [text for text in texts if not isinstance(text.text, str)]:
        raise ConfigError(f"document {wrong[0].name!r} is a {type(wrong[0].text).__name__}; wanted: text")
    with_names = with_own_names(list(hf_documents(texts, tokenizer)), request.get("say", lambda text: None))
    subject = HfModel(model, config)
    try:
        require_known_tokens(with_names, subject)
        facts = facts_of_texts() | facts_of_model(subject, tokenizer) | request.pop("facts", {})
        return score(ScoreRequest(subject, with_names, config, facts=facts, **request))
    finally:
        subject.close()


def begins_with(tokenizer: Any) -> int:
    """The token that a document begins with: BOS, else EOS, else <|endoftext|>. ConfigError where there is none."""
    if not hasattr(tokenizer, "bos_token_id"):
        raise ConfigError(
            f"the tokenizer is a {type(tokenizer).__name__}; wanted: one of transformers, the model's own"
        )
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.get_vocab().get(END_OF_TEXT)):
        if found is not None:
            return int(found)
    raise ConfigError(
        f"the tokenizer has no BOS, no EOS and no {END_OF_TEXT}, so that nothing comes before a document's first "
        "token; set its bos_token to the token that texts begin with in training"
    )


def hf_documents(texts: Iterable[TextDocument], tokenizer: Any) -> Iterator[Document]:
    """Tokenize texts as they come. TokenizerError where the tokens of one do not decode to exactly it.

    What reads like a control token in a text is text.
    """
    first, waiting = begins_with(tokenizer), []

    def encoded() -> Iterator[Document]:
        for text in waiting:
            _require_utf8(text)
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        rows = tokenizer([text.text for text in waiting], **plain)["input_ids"] if waiting else []
        for text, ids in zip(waiting, rows, strict=True):
            yield _document_of(text, [first, *ids], tokenizer)

    for text in texts:
        waiting.append(text)
        if len(waiting) == ENCODED:
            yield from encoded()
            waiting.clear()
    yield from encoded()


def require_known_tokens(documents: Sequence[Document], model: HfModel) -> None:
    """ConfigError for a token that the model has no embedding or logit for: on a GPU it would end the process."""
    known = min(len(model.module.get_input_embeddings().weight), model.vocab_size)
    for document in documents:
        if (most := int(document.tokens.max(initial=0))) >= known:
            raise ConfigError(
                f"document {document.name!r} has token {most}, and the model knows {known}: the tokenizer is another "
                "model's; give the model's own"
            )


def _require_utf8(text: TextDocument) -> None:
    try:
        text.text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"document {text.name!r} has half of a surrogate pair at character {error.start}, which no UTF-8 has; "
            "repair the text, or leave the document out"
        ) from None


def _document_of(text: TextDocument, ids: list[int], tokenizer: Any) -> Document:
    found = tokenizer.decode(ids[1:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if found != text.text:
        raise TokenizerError(
            f"document {text.name!r}: its tokens do not give its text back{first_difference(text.text, found)}: its "
            "bits per byte would be of another text; take a tokenizer that keeps this text as it is, or leave the "
            "document out"
        )
    data = text.text.encode()
    return Document(text.name, np.array(ids, dtype=np.int32), len(data), hashlib.sha256(data).hexdigest())


def facts_of_model(model: HfModel, tokenizer: Any) -> dict[str, Any]:
    """What a result says of the model, of how it was read, and of what its bits depend on."""
    first = begins_with(tokenizer)
    alone = "a document's last bits can depend on how many share its step: matrix products are the vendor's"
    return {
        "hf": {
            "class": type(model.module).__name__,
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocabulary": model.vocab_size,
            "adapted": sorted(model.ends),
            "begins_with": {
                "token": tokenizer.convert_ids_to_tokens(first),
                "is": "BOS" if first == tokenizer.bos_token_id else "in the place of a BOS, which there is not",
            },
            "attention": "causal, without masks" if model.skips_masks else "as the model has it",
            "loss": "fused with the head" if model.has_parts else "of the model's logits",
            "rounding": "one thread: to the bit, whatever the batch" if _is_exact(model) else alone,
        }
    }


def _is_exact(model: HfModel) -> bool:
    return model.device.type == "cpu" and torch.get_num_threads() == 1


def read_hf(
    folder: str | Path, device: torch.device, dtype: str = "auto"
) -> tuple[torch.nn.Module, Any, dict[str, str]]:
    """As :func:`load_hf`, and the hashes of what was read. ConfigError, too, where a file changed meanwhile."""
    before = _state_of(folder)
    module, tokenizer = load_hf(folder, device, dtype)
    hashes = hashes_of_folder(folder)
    require_unchanged(folder, before, _state_of(folder))
    return module, tokenizer, hashes


def require_unchanged(folder: str | Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """ConfigError where what is known of the folder's files, states or hashes, is no longer the same."""
    if before != after:
        raise ConfigError(f"{folder} changed while it was read; run again once nothing writes to it")


def _state_of(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """What changes with a file's content, of each that is hashed. The time of a change of its state nobody can set."""
    states = {path.name: path.stat() for path in _hashed(folder)}
    return {name: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in states.items()}


def load_hf(folder: str | Path, device: torch.device, dtype: str = "auto") -> tuple[torch.nn.Module, Any]:
    """The model and the tokenizer of a folder that save_pretrained wrote; no network is asked.

    `dtype` is one of DTYPES, or auto: bfloat16 on a GPU, float32 on a CPU. ConfigError: no such folder, another dtype,
    a model that is no causal one or wants code of its own, or no transformers.
    """
    folder = Path(folder)
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype={dtype!r} is not possible; allowed: auto, {', '.join(DTYPES)}")
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder; wanted: one with config.json, *.safetensors and the tokenizer's files"
        )
    missing = [name for name in ("config.json", "*.safetensors", "tokenizer*") if not list(folder.glob(name))]
    if missing:
        raise ConfigError(
            f"{folder} has no {' and no '.join(missing)}; save both with model.save_pretrained(FOLDER) and "
            "tokenizer.save_pretrained(FOLDER)"
        )
    chosen = DTYPES["bfloat16" if device.type == "cuda" else "float32"] if dtype == "auto" else DTYPES[dtype]
    local = {"local_files_only": True, "trust_remote_code": False}
    with _own_folders_hidden():
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"models of Hugging Face want a package that is not installed ({error.name}): pip install transformers"
            ) from None
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            _require_own_weights(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, use_safetensors=True, **local)
        except Exception as error:  # whatever a broken file makes a library raise
            why = " ".join(str(error).split())
            raise ConfigError(f"{folder} cannot be read as a causal language model: {why:.300}") from None
    return _in_memory(model.to(device)), tokenizer


def _in_memory(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights of its own: on a CPU they are the mapped file, and whatever is written to that later."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def _require_own_weights(folder: Path) -> None:
    """ValueError where weights would come from a file that :func:`hashes_of_folder` does not read."""
    named = [("config.json", [json.loads((folder / "config.json").read_bytes()).get("transformers_weights")])]
    for index in folder.glob("*.safetensors.index.json"):
        named.append((index.name, json.loads(index.read_bytes())["weight_map"].values()))
    for where, files in named:
        for file in filter(None, files):
            if Path(file).name != file or not file.endswith((".safetensors", ".safetensors.index.json")):
                raise ValueError(f"{where} takes weights from {file!r:.80}; wanted: *.safetensors of the folder itself")


@contextmanager
def _own_folders_hidden() -> Iterator[None]:
    """Inside, no clone's root is where modules are looked for: transformers would take its folder kernels/ for the
    package of that name. The klora that runs may be another one.
    """
    before = list(sys.path)
    sys.path[:] = [entry for entry in sys.path if not (Path(entry) / "kernels" / "dispatch.py").is_file()]
    try:
        yield
    finally:
        sys.path[:] = before


def hashes_of_folder(folder: str | Path) -> dict[str, str]:
    """SHA-256 of what a folder says of its model and tokenizer, and of its weights: the names and contents of files."""
    files = _hashed(folder)
    about = [path for path in files if path.suffix != WEIGHTS]
    weights = [path for path in files if path.suffix == WEIGHTS]
    return {"header_sha256": _digest(about), "payload_sha256": _digest(weights)}


def _hashed(folder: str | Path) -> list[Path]:
    """The files of model and tokenizer by name; none where there is no folder."""
    return sorted(path for path in Path(folder).glob("*") if path.suffix in (*ABOUT, WEIGHTS) and path.is_file())


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(os.fsencode(path.name) + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def token_bytes_of(tokenizer: Any) -> Callable[[np.ndarray], list[bytes]]:
    """Token ids to the bytes of each, for the report alone: no number is made of them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""
    alphabet = _byte_alphabet() if "ByteLevel" in decoder else None

    def of(piece: str) -> bytes:
        if alphabet is not None and all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("\u2581", " ").encode()

    return lambda ids: [of(piece) for piece in tokenizer.convert_ids_to_tokens(ids.tolist())]


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: printable Latin-1 for itself, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
