"""Test-time training: documents, adapters, protocols, scoring and the report."""
