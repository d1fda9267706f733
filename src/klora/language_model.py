"""A model from a file, in a few lines: logits, text, bits per byte, and those of a model that adapts while it reads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .model.artifact import load_artifact
from .model.config import ConfigError
from .model.generate import generate_text
from .model.gpt import GPT
from .model.loading import model_from_artifact, model_from_run, tokenizer_of, tokenizer_of_run
from .model.tokenizer import Tokenizer, TokenizerError
from .ttt.base import BaseNll
from .ttt.documents import Document, document_of, facts_of_texts
from .ttt.pipeline import ScoreRequest, score
from .ttt.protocols import SCORE_FIRST, TTTConfig, ttt_preset
from .ttt.results import BASE_ALONE, ScoreResult, unadapted


@torch.inference_mode(False)  # what is loaded may be adapted later
def load(path: str | Path, device: torch.device | str = "auto", weights: str = "dense") -> "LanguageModel":
    """The model and the tokenizer of an artifact, or of a finished run's folder (its weights before quantisation).

    path: the artifact's file, or the folder.
    device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:N" or a torch.device.
    weights: "dense", or "int6" to keep an artifact's matrices at six bits.

    KloraError: no such file, no artifact, no finished run, no such device, other weights.

    Example: lm = klora.load("tiny.klora")
    """
    path = Path(path)
    if not path.is_dir():
        artifact = load_artifact(path)
        return LanguageModel(model_from_artifact(artifact, device, weights), tokenizer_of(artifact))
    if weights != "dense":
        raise ConfigError(f"weights={weights!r} is not possible for a run's folder; allowed: 'dense', or an artifact")
    return LanguageModel(model_from_run(path, device), tokenizer_of_run(path))


class LanguageModel:
    """A :class:`~klora.model.GPT` and its tokenizer, both to be used on their own as well.

    Documents are given as one text, several, or a dictionary of names and texts. `device` is the model's.

    Example: lm = LanguageModel(model, tokenizer)
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def __repr__(self) -> str:
        config = self.model.config
        return f"<LanguageModel: {config.blocks} blocks of width {config.width} on {self.device}>"

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.embed.device

    @torch.no_grad()
    def logits(self, text: str | Sequence[int] | Tensor) -> Tensor:
        """Logits fp32 [S, V] of what follows each token of a text, or of its tokens int [S] or [B, S] -> [B, S, V].

        A text's first token is BOS, as of `tokenizer.encode(text)`: row i is about token i + 1. Past the model's
        training length the rotary base is that of S tokens. They lie on the model's device and need no gradient.

        TokenizerError: no token, one outside the vocabulary, tokens that are no integers, half a surrogate pair.

        Example: logits = lm.logits("import os")
        """
        tokens = torch.as_tensor(self._encode(text).astype(np.int64) if isinstance(text, str) else text)
        vocab = self.tokenizer.vocab_size
        if tokens.ndim not in (1, 2) or not tokens.numel() or tokens.is_floating_point():
            raise TokenizerError(f"tokens of {tokens.dtype} {list(tokens.shape)}; allowed: integers [S] or [B, S]")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            raise TokenizerError(f"tokens from {tokens.min()} to {tokens.max()}; allowed: 0 to {vocab - 1}")
        logits = self.model(tokens.to(self.device, torch.int64).view(-1, tokens.size(-1)))
        return logits.view(*tokens.shape, -1)

    def generate(
        self, prompt: str = "", tokens: int = 200, temperature: float = 0.8, top_k: int = 50, seed: int = 0
    ) -> str:
        """Text that goes on from `prompt`: up to `tokens` tokens, until a new document would begin.

        temperature 0 takes the likeliest token; otherwise one of the `top_k` likeliest (0: all) is drawn. The same seed
        gives the same text on the same machine. The prompt is no part of what is returned.

        TokenizerError: a prompt that is no text. ValueError: a negative setting.

        Example: text = lm.generate("import os", tokens=20, temperature=0)
        """
        self._encode(prompt)  # for its errors
        settings = {"most": tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
        return "".join(generate_text(self.model, self.tokenizer, prompt, **settings))

    def score(self, documents: str | Iterable[str] | Mapping[str, str]) -> ScoreResult:
        """Bits per byte of the model as it is: `.totals()["base_bpb"]`, and `base_bpb` of each of `.documents`.

        Bytes are the text's own in UTF-8.

        TokenizerError: a document that is no text, or that the tokenizer does not keep as it is. NonFiniteScore: an NLL
        that is no number.

        Example: bpb = lm.score("one text").totals()["base_bpb"]
        """
        config, read = ttt_preset(), self._documents(documents)
        base = BaseNll(self.model, read, config)
        results = [
            replace(unadapted(document, config, base.of(i)), status=BASE_ALONE) for i, document in enumerate(read)
        ]
        return ScoreResult(results, config, {}, facts_of_texts(), sha256=[document.sha256 for document in read])

    def adapt(
        self,
        documents: str | Iterable[str] | Mapping[str, str],
        preset: str | None = None,
        protocol: str = SCORE_FIRST,
        **settings: Any,
    ) -> ScoreResult:
        """Bits per byte of the model while it adapts to each document: every one gets an adapter of its own.

        `.totals()` has "base_bpb" and "adapted_bpb", `.documents` those of each. Documents that end before an adapter
        could have learned are left to the base model. `preset`: "quick" (the default), "thorough", "best" or "design";
        `settings` are fields of :class:`~klora.ttt.TTTConfig`, such as `chunk=64`. The weights do not change; they
        require no gradient afterwards.

        ConfigError: no such preset, protocol or setting. TokenizerError: a document that is no text, or that the
        tokenizer does not keep as it is. NonFiniteScore: an NLL that is no number, as of an adapter that diverged.

        Example: totals = lm.adapt({"notes": "one text"}, chunk=64).totals()
        """
        config: TTTConfig = ttt_preset(preset, protocol).override(settings)
        return score(ScoreRequest(self.model, self._documents(documents), config, facts=facts_of_texts()))

    def _documents(self, documents: str | Iterable[str] | Mapping[str, str]) -> list[Document]:
        if isinstance(documents, str):
            documents = [documents]
        if not isinstance(documents, Mapping):
            documents = {str(number): text for number, text in enumerate(documents)}
        return [document_of(name, text, self._encode(text), self.tokenizer) for name, text in documents.items()]

    def _encode(self, text: str) -> np.ndarray:
        """BOS and the text's tokens; TokenizerError for what is no text."""
        if not isinstance(text, str):
            raise TokenizerError(f"a text is a {type(text).__name__}; allowed: str")
        try:
            return self.tokenizer.encode(text)
        except UnicodeEncodeError:
            raise TokenizerError("a text has half a surrogate pair, which is no character") from None
