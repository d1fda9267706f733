"""Threads of a command: as many as it can use of the cores it may have, and few where a GPU does the work.

PyTorch starts one thread a core of the machine. Several commands side by side then have several threads a core, and
whoever waits for the others spins: on two cores, four scorings at once took 82 s, and 25 s with one thread each.
"""

import os

import torch

from ..cores import usable_cores
from ..model.parallel import processes_here

BESIDE_A_GPU = 4
"""Threads of a process whose work is on a GPU: its tensors on the host are weights to load and indices to send."""


def share_of_cores() -> int:
    """Threads for each of the ranks on this machine, at least 1."""
    return max(1, usable_cores() // processes_here())


def settle_threads(device: torch.device) -> None:
    """Leave PyTorch no more threads than this process's share of the cores, and BESIDE_A_GPU where it has one.

    OMP_NUM_THREADS, where it is set, is what somebody chose.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    most = share_of_cores()
    torch.set_num_threads(min(torch.get_num_threads(), most if device.type == "cpu" else min(most, BESIDE_A_GPU)))
