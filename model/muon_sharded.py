"""Muon's matrices divided among ranks: whose they are, and the buffers that carry gradients in and updates out.

Each matrix has one owner, which orthogonalises it; the update then goes to all (all-gather). Matrices travel in a few
buckets, each with a part of every rank, so that one bucket is on the wire while another is computed. What is gathered
is the same on all ranks bit for bit, and so are the weights.

:class:`klora.model.Muon` with a process group has the parts of gradients: each is summed over ranks to its owner
(reduce-scatter), which alone keeps its momentum. The training step has the sums, which its clip wants, and every rank
keeps all momenta: a pass over them is cheaper than the copy that an owner would need to take a step back, and the state
of a run is whole on every rank that is left when another one dies.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.momentum import advance_momentum_
from ..kernels.newton_schulz import MuonDirections, muon_apply_

BUCKETS = 3
"""Exchanges of a step: one is computed while its neighbours travel. More would make them smaller than a link wants."""
ALIGNMENT = 8
"""Elements to which matrices of one width are rounded in a buffer: 16 bytes of the narrowest dtype."""

# torch 2.13 renames both and warns of the old names; torch 2.11 has only those.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
    """Some matrices of every rank, and the buffers in which their updates travel."""

    def __init__(self, members: list[list[int]], parameters: Sequence[Tensor]):
        # Those with as many columns lie below each other: one copy brings them in.
        self.members = [sorted(row, key=lambda i: parameters[i].size(-1)) for row in members]
        self.starts: list[list[int]] = []
        stops = []
        for row in self.members:
            starts, stop = [], 0
            for before, i in zip([None, *row], row, strict=False):
                if before is not None and parameters[before].size(-1) != parameters[i].size(-1):
                    stop = -(-stop // ALIGNMENT) * ALIGNMENT
                starts.append(stop)
                stop += parameters[i].numel()
            self.starts.append(starts)
            stops.append(-(-stop // ALIGNMENT) * ALIGNMENT)
        self.width = max(stops) + ALIGNMENT  # the last element says whether what was sent is finite
        options = {"device": parameters[0].device, "dtype": wire_dtype(parameters[0])}
        self.update = torch.zeros(self.width, **options)
        self.updates = torch.zeros(len(members), self.width, **options)

    def views(self, row: Tensor, rank: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The matrices of `rank` in its row of a buffer."""
        return [
            row[start : start + parameters[i].numel()].view(parameters[i].shape)
            for i, start in zip(self.members[rank], self.starts[rank], strict=True)
        ]


def wire_dtype(like: Tensor) -> torch.dtype:
    """Of updates on their way to matrices like this: on a GPU the kernels' own, since entries are about 1 at most."""
    return torch.float16 if like.is_cuda and like.dtype != torch.float64 else like.dtype


class UpdateShards:
    """Matrices of one dtype divided among the ranks of `group`, and the exchange of their updates.

    For each bucket start_gathering, then gathered.
    """

    def __init__(self, parameters: Sequence[Tensor], group: dist.ProcessGroup | None, buckets: int = BUCKETS):
        self.parameters, self.group = list(parameters), group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        owner = owners([p.shape for p in parameters], self.world)
        owned = [[i for i, rank in enumerate(owner) if rank == one] for one in range(self.world)]
        parts = [[row[b::buckets] for row in owned] for b in range(buckets)]
        self.buckets = [Bucket(members, parameters) for members in parts if any(members)]
        self.waiting: dict[Bucket, dist.Work] = {}

    def start_gathering(self, bucket: Bucket, updates: Sequence[Tensor], finite: Tensor | float = 1.0) -> None:
        """Send this rank's updates of `bucket` to all, and whether they are `finite`."""
        self.fill(bucket, updates, finite)
        self.waiting[bucket] = all_gather(bucket.updates.view(-1), bucket.update, group=self.group, async_op=True)

    def fill(self, bucket: Bucket, updates: Sequence[Tensor], finite: Tensor | float = 1.0) -> None:
        """Make these what :meth:`gather_all` sends."""
        placed = zip(updates, bucket.starts[self.rank], strict=True)
        for columns, some in groupby(placed, key=lambda one: one[0].size(-1)):
            below, (start, *_) = zip(*some, strict=True)
            rows = sum(len(update) for update in below)
            torch.cat(below, out=bucket.update[start : start + rows * columns].view(rows, columns))
        bucket.update[-1] = finite

    def gather_all(self) -> None:
        """Send what was filled in, one bucket after the other."""
        for bucket in self.buckets:
            all_gather(bucket.updates.view(-1), bucket.update, group=self.group)

    def wait(self) -> None:
        """Until all updates that are under way are here."""
        for bucket in list(self.waiting):
            self.waiting.pop(bucket).wait()

    def gathered(self, bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
        """All parameters of `bucket` and their updates, once they are here."""
        if bucket in self.waiting:
            self.waiting.pop(bucket).wait()
        parameters, updates = [], []
        for rank in range(self.world):
            parameters += [self.parameters[i] for i in bucket.members[rank]]
            updates += bucket.views(bucket.updates[rank], rank, self.parameters)
        return parameters, updates


class Shards(UpdateShards):
    """As UpdateShards, where a rank has only its part of each gradient: start_reducing, then for each bucket reduced.

    Each gradient is summed over ranks to its owner.
    """

    def __init__(self, parameters: Sequence[Tensor], group: dist.ProcessGroup):
        super().__init__(parameters, group)
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        options = {"device": parameters[0].device, "dtype": dtype}
        self.gradients = {bucket: torch.zeros(self.world, bucket.width, **options) for bucket in self.buckets}
        self.summed = {bucket: torch.empty(bucket.width, **options) for bucket in self.buckets}

    def start_reducing(self) -> None:
        """Send every gradient to its owner, the sum over ranks."""
        for bucket in self.buckets:
            gradients = self.gradients[bucket]
            for rank in range(self.world):
                for view, i in zip(
                    bucket.views(gradients[rank], rank, self.parameters), bucket.members[rank], strict=True
                ):
                    view.copy_(self.parameters[i].grad)
            self.waiting[bucket] = _reduce_scatter(
                self.summed[bucket], gradients.view(-1), group=self.group, async_op=True
            )

    def reduced(self, bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parameters in `bucket` and their gradients, once they are here."""
        self.waiting.pop(bucket).wait()
        owned = [self.parameters[i] for i in bucket.members[self.rank]]
        return owned, bucket.views(self.summed[bucket], self.rank, self.parameters)


class SharedStep:
    """Muon's step among ranks that all hold the whole gradients and momenta: each orthogonalises its share.

    `muon` has one group, and the gradients of its parameters are parts of `gradients`, fp32 [N]; the momenta become
    parts of one buffer alike. Nothing but scratch is written before :meth:`apply`, which comes after the last
    collective. What is applied is what was gathered, also by its owner.
    """

    def __init__(self, muon: torch.optim.Optimizer, gradients: Tensor, buckets: int):
        (self.group,) = muon.param_groups
        self.muon, self.gradients = muon, gradients
        self.momenta = torch.zeros_like(gradients)
        self.group["skipped_steps"] = self.group["skipped_steps"].to(gradients.device)
        for parameter in self.group["params"]:
            muon.state[parameter]["momentum"] = self._momentum(parameter)
        self.shards = UpdateShards(self.group["params"], None, buckets)
        self._scratch = [[torch.zeros_like(p) for p in self._owned(bucket)] for bucket in self.shards.buckets]

    def _momentum(self, parameter: Tensor) -> Tensor:
        start = parameter.grad.storage_offset() - self.gradients.storage_offset()
        return self.momenta[start : start + parameter.numel()].view_as(parameter)

    def _owned(self, bucket: Bucket) -> list[Tensor]:
        return [self.shards.parameters[i] for i in bucket.members[self.shards.rank]]

    def orthogonalise(self, finite: Tensor, send: bool) -> None:
        """This rank's updates, NaN where `finite`, a bool [], is False. With `send`, a bucket leaves when it is made.

        Else :meth:`gather` sends them.
        """
        settings = {name: self.group[name] for name in ("momentum", "nesterov", "steps", "coefficients")}
        directions: dict[Bucket, MuonDirections] = {}
        for bucket, scratch in zip(self.shards.buckets, self._scratch, strict=True):
            if scratch:
                owned = self._owned(bucket)
                torch._foreach_copy_(scratch, [self.muon.state[p]["momentum"] for p in owned])
                gradients = [p.grad for p in owned]
                directions[bucket] = MuonDirections(gradients, scratch, **settings, backend=self.muon.backend)
        finite = torch.stack([finite.int(), *(one.finite for one in directions.values())]).amin()
        put = self.shards.start_gathering if send else self.shards.fill
        for bucket in self.shards.buckets:
            put(bucket, directions[bucket].updates(finite) if bucket in directions else [], finite)

    def gather(self) -> None:
        """Send what :meth:`orthogonalise` left."""
        self.shards.gather_all()

    def finite(self) -> Tensor:
        """Once all updates are here: whether all of all ranks are finite, bool []."""
        self.shards.wait()
        return torch.cat([bucket.updates[:, -1] for bucket in self.shards.buckets]).amin() > 0

    def apply(self, taken: Tensor) -> None:
        """Update momenta and weights if `taken`, a bool [], says so; else count a skipped step."""
        group, muon = self.group, self.muon
        advance_momentum_(self.momenta, self.gradients, group["momentum"], taken, muon.backend)
        parameters, updates = [], []
        for bucket in self.shards.buckets:
            bucket.updates.masked_fill_(~taken, math.nan)
            for gathered, some in zip((parameters, updates), self.shards.gathered(bucket), strict=True):
                gathered += some
        muon_apply_(parameters, updates, group["lr"], group["weight_decay"], group["scale"], backend=muon.backend)
        group["skipped_steps"].add_(~taken)
