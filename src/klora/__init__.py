"""Adapting a language model to each document while it reads it: Triton kernels, a lean model, test-time training."""

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import KloraError
from .lazy import lazy_exports
from .version import __version__

if TYPE_CHECKING:
    from . import kernels as kernels
    from . import lora as lora
    from . import model as model
    from . import ttt as ttt
    from .language_model import LanguageModel, load

__all__ = ["KloraError", "LanguageModel", "__version__", "load"]

__getattr__, __dir__ = lazy_exports(__name__)

if not Path(__file__).with_name("kernels").exists():  # src/klora of a clone: the subpackages are folders at its root
    __path__.append(str(Path(__file__).parents[2]))
