"""A model ready to run, from an artifact or from a run's folder."""

from pathlib import Path

import torch

from .artifact import Artifact, ArtifactError
from .checkpoint import CheckpointError, load_tensors
from .config import ConfigError, ModelConfig, TrainConfig
from .gpt import GPT
from .int6_model import int6_model_from_artifact
from .tokenizer import Tokenizer
from .train import CHECKPOINT, MODEL, compute_dtype

WEIGHTS = ("dense", "int6")
WEIGHTS_HELP = "dense: the artifact's matrices dequantised once; int6: kept at six bits a weight."


def model_from_artifact(artifact: Artifact, device: torch.device, weights: str = "dense") -> GPT:
    """The artifact's model on `device`, computing in bf16 on a GPU and in fp32 on a CPU.

    `weights` "dense" dequantises the block matrices once; "int6" keeps them at six bits.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"--weights {weights!r} is not possible; allowed: {', '.join(WEIGHTS)}")
    if weights == "int6":
        model = int6_model_from_artifact(artifact, device)
        model.configure(device, compute_dtype(TrainConfig(), device))
        return model.requires_grad_(False)
    return _placed(artifact.config, artifact.state_dict(), device)


def model_from_run(run: Path, device: torch.device, of: Artifact | None = None) -> GPT:
    """The model of a finished run, before quantisation.

    Raises CheckpointError where there is none, or where `of` was exported from another run.
    """
    tensors, meta = load_run(run)
    if of is not None and (meta["model"] != of.config.to_dict() or meta["provenance"] != of.provenance):
        raise CheckpointError(f"{run} is not the run that the artifact was exported from; give that one")
    return _placed(ModelConfig.from_dict(meta["model"]), tensors, device)


def tokenizer_of(artifact: Artifact) -> Tokenizer:
    """The artifact's tokenizer, which may normalise text where the model was trained on shards of such a one.

    ArtifactError where it is not the one that the model was made for.
    """
    tokenizer = Tokenizer.from_bytes(artifact.tokenizer_bytes, may_normalise=True)
    if tokenizer.vocab_size != artifact.config.vocab_size:
        raise ArtifactError(
            f"the artifact's tokenizer has {tokenizer.vocab_size} pieces and its model {artifact.config.vocab_size}; "
            "export it again from its own run"
        )
    return tokenizer


def load_run(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and metadata of a finished run; CheckpointError says what is missing and what to do."""
    path = Path(run) / MODEL
    if path.is_file():
        return load_tensors(path, fields={"model": dict, "provenance": dict})
    if (Path(run) / CHECKPOINT).is_file():
        raise CheckpointError(f"{run} has no {MODEL}: its training did not finish; `klora train --resume --out {run}`")
    raise CheckpointError(f"{run} has no {MODEL}; give the folder of a finished `klora train --out {run}`")


def _placed(config: ModelConfig, weights: dict[str, torch.Tensor], device: torch.device) -> GPT:
    with torch.device("meta"):  # nothing is initialised to be overwritten: orthogonal matrices are dear
        model = GPT(config)
    model.to_empty(device="cpu").load_state_dict(weights)
    model.configure(device, compute_dtype(TrainConfig(), device))
    return model.requires_grad_(False)
