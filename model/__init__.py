"""The lean language model: config, network, data and tokenizer, Muon, training, artifact."""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .artifact import ArtifactError, load_artifact, save_artifact
    from .config import ConfigError, ModelConfig, TrainConfig, preset
    from .gpt import GPT
    from .int6_file import load_quantized, save_quantized
    from .int6_model import int6_model_from_artifact, quantize_linears
    from .loading import model_from_artifact, model_from_run, tokenizer_of
    from .muon import Muon, split_parameters
    from .tokenizer import Tokenizer

__all__ = [
    "GPT",
    "ArtifactError",
    "ConfigError",
    "ModelConfig",
    "Muon",
    "Tokenizer",
    "TrainConfig",
    "int6_model_from_artifact",
    "load_artifact",
    "load_quantized",
    "model_from_artifact",
    "model_from_run",
    "preset",
    "quantize_linears",
    "save_artifact",
    "save_quantized",
    "split_parameters",
    "tokenizer_of",
]

__getattr__, __dir__ = lazy_exports(__name__)
