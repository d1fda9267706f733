"""Muon's matrices divided among ranks: whose they are, and the buffers that carry gradients in and updates out.

Each matrix has one owner. Its gradient is summed over ranks to the owner (reduce-scatter), which alone keeps its
momentum and orthogonalises it; the update then goes to all (all-gather). Matrices travel in a few buckets, each with a
part of every rank, so that one bucket is on the wire while another is computed. What is gathered is the same on all
ranks bit for bit, and so are the weights.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKETS = 3
"""Exchanges of a step: one is computed while its neighbours travel. More would make them smaller than a link wants."""
ALIGNMENT = 8
"""Elements to which each matrix is rounded in a buffer: 16 bytes of the narrowest dtype, for whole vectors."""

# torch 2.13 renames both and warns of the old names; torch 2.11 has only those.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def owners(shapes: Sequence[torch.Size], world: int) -> list[int]:
    """Rank of each matrix: the costliest first, each to the rank with the least multiplications so far."""
    load = [0.0] * world
    owner = [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda i: (-_cost(shapes[i]), i)):
        owner[index] = min(range(world), key=lambda rank: (load[rank], rank))
        load[owner[index]] += _cost(shapes[index])
    return owner


def _cost(shape: torch.Size) -> float:
    """Multiplications of one Newton-Schulz iteration."""
    short, long = sorted(shape)
    return short * short * (2.0 * long + short)


class Bucket:
    """Some matrices of every rank, and the buffers in which they travel."""

    def __init__(self, members: list[list[int]], parameters: Sequence[Tensor], wire: torch.dtype):
        self.members = members
        sizes = [[-(-parameters[i].numel() // ALIGNMENT) * ALIGNMENT for i in row] for row in members]
        self.width = max(max(map(sum, sizes)), 1)
        self.starts = [[sum(row[:k]) for k in range(len(row))] for row in sizes]
        device = parameters[0].device
        grad_dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        self.gradients = torch.zeros(len(members), self.width, device=device, dtype=grad_dtype)
        self.summed = torch.empty(self.width, device=device, dtype=grad_dtype)
        self.update = torch.zeros(self.width, device=device, dtype=wire)
        self.updates = torch.empty(len(members), self.width, device=device, dtype=wire)

    def views(self, row: Tensor, rank: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The matrices of `rank` in its row of a buffer."""
        return [
            row[start : start + parameters[i].numel()].view(parameters[i].shape)
            for i, start in zip(self.members[rank], self.starts[rank], strict=True)
        ]


class Shards:
    """The exchange of one parameter group: start_reducing, then for each bucket reduced, start_gathering, gathered."""

    def __init__(self, parameters: Sequence[Tensor], group: dist.ProcessGroup):
        self.parameters, self.group = list(parameters), group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        owner = owners([p.shape for p in parameters], self.world)
        wire = torch.bfloat16 if parameters[0].is_cuda else parameters[0].dtype
        owned = [[i for i, rank in enumerate(owner) if rank == one] for one in range(self.world)]
        parts = [[row[b::BUCKETS] for row in owned] for b in range(BUCKETS)]
        self.buckets = [Bucket(members, parameters, wire) for members in parts if any(members)]
        self.waiting: dict[Bucket, dist.Work] = {}

    def start_reducing(self) -> None:
        """Send every gradient to its owner, the sum over ranks."""
        for bucket in self.buckets:
            for rank in range(self.world):
                for view, i in zip(
                    bucket.views(bucket.gradients[rank], rank, self.parameters), bucket.members[rank], strict=True
                ):
                    view.copy_(self.parameters[i].grad)
            self.waiting[bucket] = _reduce_scatter(
                bucket.summed, bucket.gradients.view(-1), group=self.group, async_op=True
            )

    def reduced(self, bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parameters in `bucket` and their gradients, once they are here."""
        self.waiting.pop(bucket).wait()
        owned = [self.parameters[i] for i in bucket.members[self.rank]]
        return owned, bucket.views(bucket.summed, self.rank, self.parameters)

    def start_gathering(self, bucket: Bucket, updates: Sequence[Tensor]) -> None:
        """Send this rank's updates of `bucket` to all."""
        for view, update in zip(bucket.views(bucket.update, self.rank, self.parameters), updates, strict=True):
            view.copy_(update)
        self.waiting[bucket] = _all_gather(bucket.updates.view(-1), bucket.update, group=self.group, async_op=True)

    def gathered(self, bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
        """All parameters of `bucket` and their updates, once they are here."""
        self.waiting.pop(bucket).wait()
        parameters, updates = [], []
        for rank in range(self.world):
            parameters += [self.parameters[i] for i in bucket.members[rank]]
            updates += bucket.views(bucket.updates[rank], rank, self.parameters)
        return parameters, updates
