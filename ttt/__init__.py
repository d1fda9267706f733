"""Test-time training: documents, adapters, protocols, scoring and the report."""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .audit import audit
    from .audit_report import AuditReport
    from .documents import Document, documents_from_texts
    from .hf import adapt_hf
    from .journal import Journal
    from .pipeline import ScoreRequest, score
    from .protocols import TTTConfig, ttt_preset
    from .results import read_documents_csv
    from .sweep import sweep

__all__ = [
    "AuditReport",
    "Document",
    "Journal",
    "ScoreRequest",
    "TTTConfig",
    "adapt_hf",
    "audit",
    "documents_from_texts",
    "read_documents_csv",
    "score",
    "sweep",
    "ttt_preset",
]

__getattr__, __dir__ = lazy_exports(__name__)
