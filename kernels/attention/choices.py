"""The attentions that a training step may run, by name: how each is called, which run here, and how one is installed.

    klora                            our kernels (op.py; with the projections, ../qkv_attention.py)
    cudnn, flash, efficient, math    PyTorch's own, through causal_attention_ref
    fa2, fa3, fa4                    the packages flash-attn, flash-attn-3 and flash-attn-4, by their public functions

All take q [B, S, H, d] and k, v [B, S, G, d], and differentiate by themselves. Of the gradients, only ours are promised
to have the same bits in every run.
"""

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from typing import NamedTuple

import torch
from torch import Tensor

from ...install import pip_install, pip_install_from
from .reference import BACKENDS, causal_attention_ref


class Package(NamedTuple):
    """A distribution, and its module with the function flash_attn_func."""

    distribution: str
    module: str
    about: str

    @property
    def is_installed(self) -> bool:
        try:
            distribution(self.distribution)
        except PackageNotFoundError:
            return False
        return True

    @property
    def advice(self) -> str:
        """The command that installs it."""
        if self.distribution == "flash-attn":  # it is compiled against the PyTorch that is installed
            return pip_install("flash-attn", "--no-build-isolation")
        if self.distribution == "flash-attn-4":
            return pip_install("fa4")
        cuda = (torch.version.cuda or "12.8").replace(".", "")
        return pip_install_from(f"https://download.pytorch.org/whl/cu{cuda}", self.distribution)  # it is not on PyPI


PACKAGES = {
    "fa2": Package("flash-attn", "flash_attn", "FlashAttention-2"),
    "fa3": Package("flash-attn-3", "flash_attn_interface", "FlashAttention-3"),
    "fa4": Package("flash-attn-4", "flash_attn.cute", "FlashAttention-4"),
}
CHOICES = ("klora", *BACKENDS, *PACKAGES)


def attend(q: Tensor, k: Tensor, v: Tensor, name: str, start: Tensor | None = None) -> Tensor:
    """Causal attention of q [B, S, H, d] over k, v [B, S, G, d] by the choice of that name; not by ours.

    With `start`, within documents; no package takes it: :func:`why_not` says so.
    """
    if name in BACKENDS:
        return causal_attention_ref(q, k, v, name, start)
    if start is not None:
        raise ValueError(f"{name} takes no document mask; allowed: {', '.join(BACKENDS)}")
    out = importlib.import_module(PACKAGES[name].module).flash_attn_func(q, k, v, causal=True)
    return out if isinstance(out, Tensor) else out[0]  # some versions return the logsumexp too


def pick_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """(name, reason) of the PyTorch backend for this `device`, `dtype` and `head_dim`: the first that runs.

    Each is tried with a small forward and backward. The order on a GPU is "cudnn", "flash", "efficient", "math".

    Example: name, reason = pick_attention(torch.device("cpu"), torch.float32, head_dim=64)
    """
    if device.type == "cpu":
        return ("math", "CPU") if why_not("flash", device, dtype, head_dim) else ("flash", "the CPU's blocked kernel")
    order = ("cudnn", "flash", "efficient")
    refused = []
    for name in order:
        if not why_not(name, device, dtype, head_dim):
            gone = f"; not available here: {', '.join(refused)}" if refused else ""
            return name, f"first that runs of {', '.join(order)} for {dtype}, head size {head_dim}{gone}"
        refused.append(name)
    return "math", f"none of {', '.join(order)} runs for {dtype}, head size {head_dim}"


def why_not(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    heads: int = 2,
    groups: int = 1,
    documents: bool = False,
) -> str:
    """Why a choice that is not ours does not run for such heads: found by a small forward and backward. Empty: it runs.

    `documents`: with a document mask. For a package that is missing, the answer is the command that installs it.
    """
    if documents and name in PACKAGES:
        return f"{PACKAGES[name].about}'s function takes no document mask: document_mask=false runs it"
    if name in PACKAGES and device.type != "cuda":
        return "it wants a CUDA GPU"
    if name in PACKAGES and not PACKAGES[name].is_installed:
        return f"the package {PACKAGES[name].distribution} is not installed: {PACKAGES[name].advice}"
    try:
        with torch.inference_mode(False), torch.enable_grad(), refusals_unheard():
            q = torch.zeros(1, 256, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
            k = torch.zeros(1, 256, groups, head_dim, device=device, dtype=dtype)
            start = torch.zeros(1, 256, device=device, dtype=torch.int32) if documents else None
            attend(q, k, k, name, start).sum().backward()
    except Exception as error:  # a package may raise anything, from its import to its launch
        masked = " and a document mask (document_mask=false goes without)" if documents else ""
        what = f"{str(dtype).removeprefix('torch.')} with head size {head_dim}{masked}"
        return f"it does not run {what} here: {first_sentence(error)}"
    return ""


def refusals_unheard() -> warnings.catch_warnings:
    """A context without warnings: PyTorch explains a refusal in several, and whoever tries what runs says it better."""
    return warnings.catch_warnings(action="ignore")


def first_sentence(error: Exception) -> str:
    """The first sentence of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
