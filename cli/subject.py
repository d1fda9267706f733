"""What a command scores: a model with its tokenizer, and the documents of a source."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..model.artifact import Artifact, load_artifact
from ..model.config import ConfigError
from ..model.corpus import Corpus
from ..model.gpt import GPT
from ..model.loading import model_from_artifact, model_from_run, tokenizer_of
from ..model.prepare import tokenizer_beside
from ..model.shards import TokenStream, find_shards
from ..model.tokenizer import Tokenizer
from ..ttt.documents import Document, digest_of, documents_from_texts, documents_from_tokens, with_own_names
from ..ttt.hf import facts_of_model, hf_documents, read_hf, require_known_tokens, token_bytes_of
from ..ttt.hf_model import HfModel
from ..ttt.protocols import TTTConfig
from ..ttt.report import TokenBytes
from ..ttt.sampling import sample
from . import options
from .threads import share_of_cores


class Source(NamedTuple):
    """--text, --jsonl, --field and --shards; none of them is the library's held-out part."""

    text: list[Path] | None = None
    jsonl: list[Path] | None = None
    field: str = "text"
    shards: Path | None = None


def source_of(text: list[Path] | None, jsonl: list[Path] | None, field: str, shards: Path | None) -> Source:
    """What a command was given; ConfigError for what does not go together."""
    if shards and (text or jsonl):
        raise ConfigError("--shards was given together with --text or --jsonl; give one of them")
    options.require_field_is_read(field, jsonl)
    return Source(text, jsonl, field, shards)


@dataclass(frozen=True)
class Subject:
    """What is scored: a model, its tokenizer, and what a result says of them; `before` is it before quantisation.

    `documents` makes those of a source; its other argument hears of new names.
    """

    model: GPT | HfModel
    tokenizer: Any
    hashes: dict[str, str]
    facts: dict[str, Any]
    documents: Callable[[Source, Callable[[str], None]], list[Document]]
    token_bytes: TokenBytes
    before: GPT | None = None

    @classmethod
    def of_artifact(cls, path: Path, device: torch.device, weights: str, prequant: Path | None) -> "Subject":
        """An artifact's. `prequant` is the run that it was exported from."""
        loaded = load_artifact(path)
        model = model_from_artifact(loaded, device, weights)
        before = model_from_run(prequant, device, of=loaded) if prequant else None
        tokenizer = tokenizer_of(loaded)

        def documents(source: Source, say: Callable[[str], None]) -> list[Document]:
            return documents_of(source, tokenizer, loaded.provenance, say)

        facts = _facts(path, loaded, device)
        return cls(model, tokenizer, hashes_of(loaded), facts, documents, tokenizer.token_bytes, before)

    @classmethod
    def of_folder(cls, folder: Path, device: torch.device, dtype: str, config: TTTConfig) -> "Subject":
        """A Hugging Face folder's."""
        module, tokenizer, hashes = read_hf(folder, device, dtype)
        model = HfModel(module, config)

        def documents(source: Source, say: Callable[[str], None]) -> list[Document]:
            text, jsonl, field, _ = source
            texts = options.corpus_from(text, jsonl, field).documents()
            found = with_own_names(list(hf_documents(texts, tokenizer)), say)
            require_known_tokens(found, model)
            return found

        facts = {
            "artifact": {"file": Path(os.path.abspath(folder)).name, **hashes},
            "versions": versions(device) | {"transformers": version("transformers")},
            **facts_of_model(model, tokenizer),
        }
        return cls(model, tokenizer, hashes, facts, documents, token_bytes_of(tokenizer))


def documents_of(
    source: Source, tokenizer: Tokenizer, provenance: dict, say: Callable[[str], None] = lambda text: None
) -> list[Document]:
    """The documents of a source, in its order; without one, the library's held-out part.

    Each has a name of its own; `say` hears of those that were given one. ConfigError, CorpusError or TokenizerError: no
    such source, or text that the tokenizer does not keep.
    """
    text, jsonl, field, shards = source
    if shards:
        if tokenizer_beside(shards).to_bytes() != tokenizer.to_bytes():
            raise ConfigError(
                f"the shards in {shards} were made by another tokenizer than the artifact's; make them again"
            )
        found = list(documents_from_tokens(TokenStream(find_shards(shards, "val")).documents(), tokenizer))
    else:
        corpus = options.corpus_from(text, jsonl, field) or _held_out_stdlib(provenance)
        found = list(documents_from_texts(corpus.documents(), tokenizer, share_of_cores()))
    return with_own_names(found, say)


def _held_out_stdlib(provenance: dict) -> Corpus:
    """The part of the standard library that training held out; with another share, trained text would be scored."""
    sources = provenance.get("sources")
    sources = sources if isinstance(sources, dict) else {}
    share = sources.get("validation_share") if sources.get("kind") == "stdlib" else None
    return Corpus.stdlib("validation", share) if share else Corpus.stdlib("validation")


def sampled(documents: list[Document], most_tokens: int) -> list[Document]:
    """The documents to score: all, or with `most_tokens` a sample that no score can influence."""
    if not most_tokens:
        return documents
    kept = sample(documents, most_tokens)
    if not kept:
        raise ConfigError(f"--most-tokens {most_tokens} is less than any document has; allowed: more, or 0 for all")
    return kept


def facts_of_source(source: Source, documents: list[Document], most_tokens: int) -> dict[str, Any]:
    """What was scored: the files' names, what they hold, and of how many tokens a sample was taken; 0: none was."""
    text, jsonl, field, shards = source
    kind = "shards" if shards else "text" if text else "jsonl" if jsonl else "stdlib"
    return {
        "kind": kind,
        "files": [path.name for path in ([shards] if shards else text or jsonl or [])],
        **({"field": field} if jsonl else {}),
        "hashes_are_of": "tokens" if shards else "text",
        "documents": len(documents),
        "tokens": sum(document.targets for document in documents),
        "sha256": digest_of(documents),
        "most_tokens": most_tokens,
    }


def hashes_of(artifact: Artifact) -> dict[str, str]:
    """What an artifact is: header and payload."""
    return {name: artifact.header[name] for name in ("header_sha256", "payload_sha256")}


def versions(device: torch.device) -> dict[str, str]:
    """The versions that bits depend on. Triton makes the kernels of a GPU."""
    found = {"klora": __version__, "torch": torch.__version__}
    if device.type == "cuda":
        with suppress(PackageNotFoundError):
            found["triton"] = version("triton")
    return found


def _facts(path: Path, artifact: Artifact, device: torch.device) -> dict[str, Any]:
    """What a reader needs to know to trust or repeat the result."""
    return {
        "artifact": {
            "file": path.name,
            "bytes": path.stat().st_size,
            **hashes_of(artifact),
            "provenance": artifact.provenance,
        },
        "versions": versions(device),
    }
