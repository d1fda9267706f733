"""`klora doctor`: what this machine has, what klora will use and why, and what is missing."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from ..install import pip_install
from ..kernels import pick_attention
from ..kernels.attention import CHOICES, PACKAGES
from ..model.attention import choose_attention, why_not_here
from ..model.config import ModelConfig, TrainConfig
from ..model.gpt import GPT
from ..model.parallel import Ranks, pick_device
from ..model.placement import compute_dtype, is_fused
from . import options
from .console import Output

REQUIRED = ("torch", "numpy", "sentencepiece", "zstandard", "safetensors", "nvtx", "typer", "rich", "matplotlib")
OPTIONAL = {
    "triton": ("the Triton kernels (Linux with a CUDA GPU)", ""),
    "pytest-benchmark": ("the benchmarks under pytest (pytest bench/)", "bench"),
    "jsonschema": ("klora bench --check and klora bench report", "bench"),
}
"""What each is for, and the extra that brings it."""

KERNEL_BACKENDS = {
    "cpu": "reference: the ops in eager PyTorch; Triton kernels want a CUDA GPU",
    "cuda": "triton: training (--set fused=false: eager), scoring, Muon and int6 linears",
}


def doctor(device: options.Device = "auto", as_json: options.Json = False) -> None:
    """Show device, versions, the attention backend in use and why, the kernel backend, and what is missing."""
    output = Output(as_json)
    facts = examine(device)
    for name, value in facts.items():
        if isinstance(value, dict):
            output.table(name, [(f"  {key}", str(item)) for key, item in value.items()])
        else:
            output.say(f"{name}: {value}")
    output.result(facts)


def examine(device_name: str) -> dict:
    """The facts that `doctor` shows, as JSON values."""
    device = pick_device(device_name)
    dtype = compute_dtype(TrainConfig(), device)
    backend, why = pick_attention(device, dtype, ModelConfig().head_dim)
    versions = {"python": platform.python_version(), "klora": __version__}
    missing = {}
    for name in REQUIRED:
        found = _version(name)
        if found is None:
            missing[name] = f"required: {pip_install()}"
        else:
            versions[name] = found
    for name, (purpose, extra) in OPTIONAL.items():
        found = _version(name)
        if found is not None:
            versions[name] = found
        else:
            missing[name] = f"optional, for {purpose}" + (f": {pip_install(extra)}" if extra else "")
    for name, package in PACKAGES.items():
        purpose = f"{package.about}, attention={name} in training"
        found = _version(package.distribution) if package.is_installed else None
        if found is not None:
            versions[package.distribution] = found
        else:
            way = "; wants a CUDA GPU" if device.type == "cpu" else f": {package.advice}"
            missing[package.distribution] = f"optional, for {purpose}{way}"
    if device.type == "cpu":
        missing["CUDA GPU"] = "optional: PyTorch sees none, so everything runs on the CPU; preset tiny is made for it"
    return {
        "device": _device_facts(device),
        "compute dtype": str(dtype).removeprefix("torch."),
        "attention backend": f"{backend} ({why})",
        "attention in training": _training_attention(device, dtype),
        "attention choices": {
            name: why_not_here(name, ModelConfig(), device, dtype) or "runs here" for name in CHOICES
        },
        "kernel backend": KERNEL_BACKENDS[device.type],
        "versions": versions,
        "missing": missing or "nothing",
    }


def _device_facts(device: torch.device) -> dict[str, str]:
    if device.type == "cpu":
        return {"name": platform.processor() or platform.machine(), "cores": str(os.cpu_count()), "type": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "multiprocessors": str(properties.multi_processor_count),
        "CUDA (PyTorch's)": str(torch.version.cuda),
        "GPUs": str(torch.cuda.device_count()),
    }


def _training_attention(device: torch.device, dtype: torch.dtype) -> str:
    """What `klora train` chooses for the default model; on a GPU it is timed."""
    model, config = GPT(ModelConfig()), TrainConfig()
    why = model.configure(device, dtype)
    length, ranks = model.config.train_length, Ranks(0, 1, device)
    rows = config.micro_batch_tokens // length
    return str(choose_attention(model, "auto", rows, length, ranks, is_fused(config, model), configured=why))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        found = importlib.util.find_spec(name.replace("-", "_")) is not None
        return "installed, version unknown" if found else None
