"""One process a device: who this process is, and the few collectives that training needs.

Processes that were started side by side, by torchrun or by whoever sets its variables (RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), watch over each other: see watch.py.
"""

import datetime
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import ConfigError
from .graphs import release_collectives
from .storage import differences
from .watch import JOIN, PATIENCE, SETTLE, Watch

PREPARATION = datetime.timedelta(hours=6)
"""How long a rank waits for another: the first one may tokenize a large corpus while the others stand by."""

CALL = datetime.timedelta(minutes=1)
"""How long a rank calls for the first one's store, which is there, in a library that hears no signal."""

BEGUN = "klora/train/begun"
"""Key in the launcher's store, which outlives the processes that it starts again: they have begun a run."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world` processes, and its device. A single process is rank 0 of 1.

    `alive`, int32 [1] on the CPU, pinned where the device is a GPU, is 1 until a rank is lost. A step of several ranks
    reads it on its device after its last collective, and changes nothing where it is 0.
    """

    rank: int
    world: int
    device: torch.device
    alive: Tensor = field(default=None, repr=False, compare=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    """The launcher's, on a connection for the main thread."""

    def __post_init__(self):
        if self.alive is None:
            object.__setattr__(self, "alive", alive_on(self.device))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this process is the first one of its machine."""
        return self.world == 1 or _number("LOCAL_RANK", default=self.rank) == 0

    def waiting(self) -> AbstractContextManager[None]:
        """Around a call in which this process waits for the other ranks.

        Every collective stands in one. Where it fails because a rank is gone, it does not return: the watch ends the
        process, and keeps what there is.
        """
        return self.watch.waiting() if self.watch else nullcontext()

    def changing(self) -> AbstractContextManager:
        """Around whatever changes weights, optimizer, averages or the run's files: no other thread reads them then.

        No collective belongs inside: a dead rank would keep the state from being written.
        """
        return self.watch.changing if self.watch else nullcontext()

    def mark(self) -> None:
        """Show that this process gets on."""
        if self.watch:
            self.watch.mark()

    def stop_if_lost(self) -> None:
        """Where a rank is lost, do not return: the watch ends this process. Such a step's loss is no number."""
        if self.watch and not self.alive:
            self.watch.hold()

    def expect(self, seconds: float = 0.0) -> None:
        """From here on this process is expected to get on within `seconds`, or as fast as it did so far."""
        if self.watch:
            self.watch.expect(seconds)

    def guard(self, save: Callable[[], str], heard: Callable[[], int]) -> AbstractContextManager[None]:
        """Let `save` write the state where a rank is lost meanwhile: see :meth:`Watch.guard`."""
        return self.watch.guard(save, heard) if self.watch else nullcontext()

    def begin(self) -> None:
        """Note in the launcher's store that a run has begun."""
        if self.store and self.is_first:
            self.store.set(BEGUN, "1")

    @property
    def has_begun(self) -> bool:
        """Whether the same launcher started these processes again, after their run had begun."""
        return self.store is not None and restarts() > 0 and self.store.check([BEGUN])

    def from_first(self, value: Any) -> Any:
        """The first rank's `value`, anything small that can be pickled."""
        if self.world == 1:
            return value
        values = [value]
        with self.waiting():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def require_same(self, settings: dict[str, Any]) -> None:
        """ConfigError on a rank whose `settings` are others than the first one's: each would train something else."""
        if differing := differences(self.from_first(settings), settings):
            raise ConfigError(
                f"rank {self.rank} is not of the first rank's run: {differing}; start all ranks with the same klora, "
                "options and data"
            )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            with self.waiting():
                dist.all_reduce(tensor)
        return tensor

    def most(self, *values: float) -> list[float]:
        """The largest of each value over ranks, so that every rank takes the same decision from it.

        The values are the host's and go over gloo: no GPU is waited for.
        """
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.waiting():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self) -> None:
        """Return when every rank is here."""
        if self.world > 1:
            with self.waiting():
                dist.barrier()


def alive_on(device: torch.device) -> Tensor:
    """The flag of :class:`Ranks`, 1."""
    return torch.ones(1, dtype=torch.int32, pin_memory=device.type == "cuda")


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
    return "RANK" in os.environ and _number("WORLD_SIZE", 1, default=1) > 1


def rank_of_many() -> str:
    """The number of this process among several; empty for the first one, and for one that is alone."""
    return str(_rank() or "") if is_one_of_many() else ""


def restarts() -> int:
    """How often torchrun has started these processes again."""
    return _number("TORCHELASTIC_RESTART_COUNT", default=0)


def processes_here() -> int:
    """How many of them run on this machine: all, where whoever started them does not say."""
    return _number("LOCAL_WORLD_SIZE", 1, default=_number("WORLD_SIZE", 1)) if is_one_of_many() else 1


def own_device(name: str = "auto") -> torch.device:
    """As :func:`pick_device`; of several processes on GPUs, each gets the GPU of its local rank."""
    chosen = pick_device(name)
    if chosen.type == "cuda" and chosen.index is None and is_one_of_many():
        chosen = pick_device(f"cuda:{_number('LOCAL_RANK', default=_rank())}")
    return chosen


def _rank() -> int:
    return _number("RANK", most=_number("WORLD_SIZE", 1) - 1)


def _number(name: str, least: int = 0, most: float = math.inf, default: int | None = None) -> int:
    """The launcher's variable of that name, `default` where it is not set; ConfigError where it is no such number."""
    text = os.environ.get(name, default)
    try:
        number = int(text)
        if least <= number <= most:
            return number
    except (TypeError, ValueError):
        pass
    allowed = f"{least} to {most}" if most < math.inf else f"whole numbers from {least}"
    raise ConfigError(f"the environment has {name}={text}; allowed for one of several ranks: {allowed}")


def met() -> tuple[dist.Store, int, int]:
    """The store that all ranks reach, the number of this one and how many there are. ConfigError: they cannot meet.

    Where no launcher keeps the store the first rank does, and waits for nobody: PyTorch's own rendezvous would wait for
    all of them, without a word.
    """
    timeout = datetime.timedelta(seconds=JOIN)
    rank, world, (host, port) = _rank(), _number("WORLD_SIZE", 1), _address()
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return next(dist.rendezvous("env://", timeout=timeout))
        if rank == 0:
            socket.getaddrinfo(host, port)
        else:
            _wait_for(host, port)
        store = dist.TCPStore(host, port, None, rank == 0, CALL, wait_for_workers=False)
    except (OSError, ValueError, dist.DistError) as error:
        raise ConfigError(f"RANK and WORLD_SIZE are set, but the ranks cannot meet at {host}:{port}: {error}") from None
    store.set_timeout(timeout)
    return store, rank, world


def _wait_for(host: str, port: int) -> None:
    """Until somebody listens there, for as long as ranks are waited for. OSError: nobody does.

    Where PyTorch waits, no signal is heard, and its C++ shows a stack every minute.
    """
    until = time.monotonic() + JOIN
    while True:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.1)


def _address() -> tuple[str, int]:
    """Of the ranks' store. ConfigError: nobody says it."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not; set the address and a free port of the "
            "first rank's machine on every rank, or start the ranks by torchrun"
        )
    return os.environ["MASTER_ADDR"], _number("MASTER_PORT", most=65535)


@contextmanager
def join_ranks(
    device: str = "auto", patience: float = PATIENCE, report: Callable[[str], None] | None = None
) -> Iterator[Ranks]:
    """The ranks of this run, one process alone or several (NCCL for what lies on a GPU, else gloo).

    Where one of several is lost, gives no pulse for `patience` seconds or ends with an error, all end within a minute,
    by os._exit, and one of them gives `report` a sentence. ConfigError: the processes cannot meet, or not on `device`.
    """
    if device.startswith("cuda:") and processes_here() > 1:
        raise ConfigError(
            f"device={device!r} names one GPU and {processes_here()} processes run here; give --device cuda, which "
            "gives each its own"
        )
    chosen = own_device(device)
    if not is_one_of_many():
        yield Ranks(0, 1, chosen)
        return
    store, rank, world = met()
    alive, settle = alive_on(chosen), SETTLE if chosen.type == "cuda" else 0.0
    watch = Watch(_pulses, rank, world, alive, patience, settle=settle, **({"report": report} if report else {}))
    watch.start()
    try:
        with watch.waiting():
            watch.gather()
            # NCCL's own watchdog, which torchrun turns on, would end the process before the state is written.
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
            backend, more = ("cpu:gloo,cuda:nccl", {"device_id": chosen}) if chosen.type == "cuda" else ("gloo", {})
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"klora/train/{restarts()}/group", store),
                rank=rank,
                world_size=world,
                timeout=PREPARATION,
                **more,
            )
        yield Ranks(rank, world, chosen, alive, watch, _launcher())
    except BaseException as error:
        watch.leave(error)
        release_collectives()
        raise
    watch.leave()
    release_collectives()
    dist.destroy_process_group()


def _launcher() -> dist.Store:
    """A connection of its own to the launcher's store."""
    return dist.TCPStore(*_address(), is_master=False)


def _pulses() -> dist.Store:
    """As :func:`_launcher`, to the part for the pulses of this attempt."""
    return dist.PrefixStore(f"klora/train/{restarts()}", _launcher())
