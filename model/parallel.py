"""One process a device: who this process is, and the few collectives that training needs."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .config import ConfigError

PREPARATION = datetime.timedelta(hours=6)
"""How long a rank waits for another: the first one may tokenize a large corpus while the others stand by."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world` processes, and its device. A single process is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def most(self, *values: float) -> list[float]:
        """The largest of each value over ranks, so that every rank takes the same decision from it.

        The values are the host's and go over gloo: no GPU is waited for.
        """
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self) -> None:
        """Return when every rank is here."""
        if self.world > 1:
            dist.barrier()


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name, now the current one if it is a GPU's number; 'auto' is the GPU if there is one.

    ConfigError if it does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") and not str(name).startswith("cuda:"):
        raise ConfigError(f"device={name!r} is not possible; allowed: auto, cpu, cuda or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r} was asked for, but PyTorch sees no CUDA GPU here; use --device cpu")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r} is not possible; there are {torch.cuda.device_count()} GPUs, from cuda:0")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def is_one_of_many() -> bool:
    """Whether a launcher (torchrun, or whoever sets its variables) started several processes of this command."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank_of_many() -> str:
    """The number of this process among several; empty for the first one, and for one that is alone."""
    return os.environ["RANK"].lstrip("0") if is_one_of_many() else ""


def processes_here() -> int:
    """How many of them run on this machine: all, where whoever started them does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if is_one_of_many() else 1


def own_device(name: str = "auto") -> torch.device:
    """As :func:`pick_device`; of several processes on GPUs, each gets the GPU of its local rank."""
    chosen = pick_device(name)
    if chosen.type == "cuda" and chosen.index is None and is_one_of_many():
        chosen = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', os.environ['RANK'])}")
    return chosen


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this run: torchrun's if it launched us (NCCL for what lies on a GPU, else gloo), or one alone."""
    chosen = pick_device(device)
    if not dist.is_torchelastic_launched():
        yield Ranks(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=chosen, timeout=PREPARATION)
    else:
        dist.init_process_group("gloo", timeout=PREPARATION)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()
