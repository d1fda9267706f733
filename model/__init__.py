"""The lean language model: config, network, data and tokenizer, Muon, training, artifact."""

from .artifact import ArtifactError, load_artifact, save_artifact
from .config import ConfigError, ModelConfig, TrainConfig, preset
from .gpt import GPT
from .loading import model_from_artifact, model_from_run
from .muon import Muon
from .tokenizer import Tokenizer

__all__ = [
    "GPT",
    "ArtifactError",
    "ConfigError",
    "ModelConfig",
    "Muon",
    "Tokenizer",
    "TrainConfig",
    "load_artifact",
    "model_from_artifact",
    "model_from_run",
    "preset",
    "save_artifact",
]
