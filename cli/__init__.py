"""The `klora` command. Imports everything; nothing imports it."""

from .app import main

__all__ = ["main"]
