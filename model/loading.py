"""A model ready to run, from an artifact or from a run's folder."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from .artifact import Artifact, ArtifactError, load_artifact
from .checkpoint import CheckpointError, load_meta, load_tensors, unusable, version_of
from .config import ConfigError, ModelConfig, TrainConfig
from .estimate import loading_bytes
from .gpt import GPT, parameter_shapes
from .parallel import pick_device
from .placement import compute_dtype
from .reading import limit, raising
from .run_folder import CHECKPOINT, MODEL, TOKENIZER
from .tokenizer import Tokenizer

WEIGHTS = ("dense", "int6")
WEIGHTS_HELP = "dense: the artifact's matrices dequantised once; int6: kept at six bits a weight."


def model_from_artifact(
    artifact: Artifact | str | Path, device: torch.device | str = "auto", weights: str = "dense"
) -> GPT:
    """The model of an artifact, or of the file of one, on `device`, computing in bf16 on a GPU and in fp32 on a CPU.

    `device` is a torch.device, or "auto", "cpu", "cuda" or "cuda:N" as :func:`pick_device` takes it. `weights` "dense"
    dequantises the block matrices once; "int6" keeps them at six bits. Called with tokens int [B, S] the model returns
    logits fp32 [B, S, V]; it is frozen. ArtifactError: a file that is no artifact. ConfigError: another device or other
    weights.

    Example: model = model_from_artifact("tiny.klora", weights="int6")
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r} is not possible; allowed: {', '.join(WEIGHTS)}")
    artifact, device = artifact if isinstance(artifact, Artifact) else load_artifact(artifact), _device(device)
    if weights == "int6":
        from .int6_model import int6_model_from_artifact

        model = int6_model_from_artifact(artifact, device)
        model.configure(device, compute_dtype(TrainConfig(), device))
        return model.requires_grad_(False)
    return _placed(artifact.config, artifact.state_dict(), device)


def model_from_run(run: str | Path, device: torch.device | str = "auto", of: Artifact | None = None) -> GPT:
    """The model of a finished run's folder, before quantisation; `device` as in :func:`model_from_artifact`.

    CheckpointError: no finished run, or one from which the artifact `of` was not exported. ConfigError: no such device.

    Example: model = model_from_run("runs/tiny")
    """
    tensors, meta = load_run(run)
    if of is not None and (meta["model"] != of.config.to_dict() or meta["provenance"] != of.provenance):
        raise CheckpointError(f"{run} is not the run that the artifact was exported from; give that one")
    return _placed(ModelConfig.from_dict(meta["model"]), tensors, _device(device))


def tokenizer_of(artifact: Artifact) -> Tokenizer:
    """The artifact's tokenizer, which may normalise text where the model was trained on shards of such a one.

    ArtifactError: its pieces are not as many as the model's. TokenizerError: it is no tokenizer of this library's.

    Example: tokenizer = tokenizer_of(load_artifact("tiny.klora"))
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
        tensors, meta = load_tensors(path, fields={"model": dict, "provenance": dict})
        try:
            config = ModelConfig.from_dict(meta["model"])
        except ConfigError as error:
            raise unusable(path, error, version_of(path)) from None
        require_fitting(path, tensors, config)
        return tensors, meta
    if (Path(run) / CHECKPOINT).is_file():
        raise CheckpointError(f"{run} has no {MODEL}: its training did not finish; `klora train --resume --out {run}`")
    raise CheckpointError(f"{run} has no {MODEL}; give the folder of a finished `klora train --out {run}`")


def tokenizer_of_run(run: str | Path, may_normalise: bool = True) -> Tokenizer:
    """The tokenizer of a finished run's folder. CheckpointError where it is not the one that the run was trained with.

    TokenizerError: it is no tokenizer of this library's.
    """
    path = Path(run) / TOKENIZER
    tokenizer = Tokenizer.from_file(path, may_normalise)
    if (
        hashlib.sha256(tokenizer.to_bytes()).hexdigest()
        != load_meta(Path(run) / MODEL, {"tokenizer": str})["tokenizer"]
    ):
        raise CheckpointError(f"{path} is damaged, or of another run: it does not match its SHA-256; copy it again")
    return tokenizer


def require_fitting(path: Path, tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> None:
    """CheckpointError unless `tensors` are those of a model of `config`, within the limit of what one may take."""
    asked, most = loading_bytes(config), limit("MAX_MODEL_BYTES")
    if asked > most:
        raise CheckpointError(
            f"{path}: its config asks for {asked:,} bytes and {most:,} are allowed; {raising('MAX_MODEL_BYTES', asked)}"
        )
    shapes = parameter_shapes(config)
    for name in sorted(shapes.keys() | tensors.keys()):
        seen = list(tensors[name].shape) if name in tensors else "missing"
        wanted = list(shapes[name]) if name in shapes else "no such parameter"
        if seen != wanted:
            why = f"{name!r:.80} is {seen}, its config wants {wanted}"
            raise unusable(path, why, version_of(path))


def _device(device: torch.device | str) -> torch.device:
    return device if isinstance(device, torch.device) else pick_device(device)


def _placed(config: ModelConfig, weights: dict[str, torch.Tensor], device: torch.device) -> GPT:
    with torch.device("meta"):  # nothing is initialised to be overwritten: orthogonal matrices are slow to make
        model = GPT(config)
    # Assigned, for `to_empty` from the meta device imports sympy, at every start.
    model.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}, assign=True)
    model.configure(device, compute_dtype(TrainConfig(), device))
    return model.requires_grad_(False)
