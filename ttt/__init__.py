"""Test-time training: documents, adapters, protocols, scoring and the report."""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .documents import Document, documents_from_texts
    from .protocols import TTTConfig, ttt_preset
    from .score import Journal, score_documents

__all__ = ["Document", "Journal", "TTTConfig", "documents_from_texts", "score_documents", "ttt_preset"]

__getattr__, __dir__ = lazy_exports(__name__)
