"""A model ready to run, from an artifact or from a run's folder."""

from pathlib import Path

import torch

from .artifact import Artifact
from .checkpoint import CheckpointError, load_tensors
from .config import ModelConfig, TrainConfig
from .gpt import GPT
from .train import CHECKPOINT, MODEL, compute_dtype


def model_from_artifact(artifact: Artifact, device: torch.device) -> GPT:
    """The artifact's model on `device`, computing in bf16 on a GPU and in fp32 on a CPU."""
    return _placed(GPT(artifact.config), artifact.state_dict(), device)


def model_from_run(run: Path, device: torch.device) -> GPT:
    """The model of a finished run, before quantisation. Raises CheckpointError where there is none."""
    tensors, meta = load_run(run)
    return _placed(GPT(ModelConfig.from_dict(meta["model"])), tensors, device)


def load_run(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and metadata of a finished run; CheckpointError says what is missing and what to do."""
    path = Path(run) / MODEL
    if path.is_file():
        return load_tensors(path)
    if (Path(run) / CHECKPOINT).is_file():
        raise CheckpointError(f"{run} has no {MODEL}: its training did not finish; `klora train --resume --out {run}`")
    raise CheckpointError(f"{run} has no {MODEL}; give the folder of a finished `klora train --out {run}`")


def _placed(model: GPT, weights: dict[str, torch.Tensor], device: torch.device) -> GPT:
    model.load_state_dict(weights)
    model.configure(device, compute_dtype(TrainConfig(), device))
    return model.requires_grad_(False)
