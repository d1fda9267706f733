"""Adapting a language model to each document while it reads it: Triton kernels, a lean model, test-time training.

>>> import klora
>>> lm = klora.load("tiny.klora", device="cpu")
"""

from typing import TYPE_CHECKING

from .errors import KloraError
from .lazy import lazy_exports

if TYPE_CHECKING:
    from .language_model import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["KloraError", "LanguageModel", "__version__", "load"]

__getattr__, __dir__ = lazy_exports(__name__)
