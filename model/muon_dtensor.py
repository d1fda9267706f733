"""Muon's matrices as DTensors on a mesh of one dimension: rows on its ranks, as FSDP2's fully_shard leaves them.

A matrix placed Replicate() is whole on every rank, and each takes the step of it. Of one placed Shard(0) a rank has
rows, of its gradient and momentum too, and Newton-Schulz takes the whole. So each matrix has an owner, by cost:

    a = mu m + g;   v = (g + mu a) / (1 + mu)     on the rows (Nesterov; else v = a), and v to the owner
    u = NS((1 + mu) v)                            there, and its rows back
    m <- a;   W <- (1 - lr * decay) W - lr * s u  on the rows, s of the whole matrix

v lies between g and a: it is finite where both are, and no sum that plain Muon would take overflows in it. Two
exchanges among all ranks carry v, as wide as the momentum, and u, fp16 on a GPU. Between them all ranks agree on
whether everything is finite. Where a mesh has one rank, the step is plain Muon's, bit for bit.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..kernels.newton_schulz import MuonDirections, muon_apply_
from ..kernels.newton_schulz.validate import checked_rate
from .muon_sharded import owners, wire_dtype

if TYPE_CHECKING:
    from .muon import Muon

Group = dict[str, Any]

ALLOWED = (
    "allowed: DTensors placed Shard(0) or Replicate() on one mesh of one dimension, with torch's own division of rows, "
    "and no plain tensors beside them"
)


@torch.no_grad()
def local_parts(parameters: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> list[Tensor]:
    """What this rank has of each parameter, of which one at least is a DTensor.

    Raises ValueError for one that Muon cannot update.
    """
    if process_group is not None:
        raise ValueError("process_group is given beside DTensors, which have that of their mesh; leave it out")
    mesh = next(p.device_mesh for p in parameters if isinstance(p, DTensor))
    for number, p in enumerate(parameters):
        what = f"parameter {number} of shape {tuple(p.shape)}"
        if not isinstance(p, DTensor):
            raise ValueError(f"{what} is a plain tensor beside DTensors; {ALLOWED}. Give each kind a Muon of its own")
        if p.device_mesh != mesh:
            raise ValueError(f"{what} is on {p.device_mesh}, another on {mesh}; {ALLOWED}. Give each mesh a Muon")
        if mesh.ndim != 1 or not (_is_whole(p) or _is_rows(p)):
            raise ValueError(
                f"{what} is a DTensor placed {p.placements} on a mesh of shape {tuple(mesh.shape)}; {ALLOWED}. Give "
                "parameter.redistribute(placements=[Shard(0)]), or fully_shard a mesh of one dimension"
            )
    return [p.to_local() for p in parameters]


def _is_whole(p: DTensor) -> bool:
    return type(p.placements[0]) is Replicate


def _is_rows(p: DTensor) -> bool:
    """Whether this rank has those rows that torch gives it; a rank that is not in the mesh has none."""
    if type(p.placements[0]) is not Shard or p.placements[0].dim != 0:
        return False
    mesh = p.device_mesh
    return mesh.get_coordinate() is None or p.to_local().size(0) == _height(
        p.size(0), mesh.get_local_rank(), mesh.size()
    )


def placed_as(momentum: Tensor, parameter: Tensor) -> Tensor:
    """`momentum`, one of them a DTensor, with the mesh and placement of `parameter`; whole where that is plain."""
    if not isinstance(parameter, DTensor):
        return momentum.full_tensor()
    if isinstance(momentum, DTensor):
        return momentum.redistribute(parameter.device_mesh, parameter.placements)
    whole = momentum.to(parameter.device)  # every rank has it: each cuts its own part
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def step_dtensors(muon: "Muon", batches: list[tuple[Group, list[DTensor]]]) -> None:
    """Muon's step of DTensors, on every rank of their mesh: taken by all ranks or by none."""
    mesh = batches[0][1][0].device_mesh
    if mesh.get_coordinate() is None:
        return
    steps: list[Whole | Rows] = []
    for group, parameters in batches:
        whole = [p for p in parameters if mesh.size() == 1 or _is_whole(p)]
        rows = [p for p in parameters if mesh.size() > 1 and not _is_whole(p)]
        steps += [kind(muon, group, some) for kind, some in ((Whole, whole), (Rows, rows)) if some]
    finite = torch.stack([one.finite for one in steps]).amin()
    if mesh.size() > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=mesh.get_group())
    muon._counter(finite.device).add_(1 - finite)
    for one in steps:
        one.take(finite)


class Whole:
    """The step of matrices that this rank has whole. `finite`, int32 scalar: whether every mu m + g is."""

    def __init__(self, muon: "Muon", group: Group, parameters: list[DTensor]):
        self.muon, self.group, self.parameters = muon, group, parameters
        self.directions = _directions(muon, group, _gradients(parameters), _momenta(muon, parameters))
        self.finite = self.directions.finite

    def take(self, finite: Tensor) -> None:
        """The second half, if `finite` is 1."""
        _apply(self.muon, self.group, self.parameters, self.directions.updates(finite))


class Rows:
    """The step of matrices of which this rank has rows. `finite`, int32 scalar: whether mu m + g is, of all it owns."""

    def __init__(self, muon: "Muon", group: Group, parameters: list[DTensor]):
        self.muon, self.group, self.parameters = muon, group, parameters
        self.momenta = _momenta(muon, parameters)
        g, m, device = _flat(_gradients(parameters)), _flat(self.momenta), self.momenta[0].device
        rate = checked_rate("momentum", group["momentum"], device)
        g = g.to(m.dtype)
        self.advanced = given = rate * m + g
        if group["nesterov"]:
            given = (rate / (1.0 + rate)) * self.advanced + (1.0 / (1.0 + rate)) * g
        self.exchange = RowExchange([p.shape for p in parameters], parameters[0].device_mesh)
        owned = self.exchange.to_owners(_as_parts(given, self.momenta))
        self.directions = _directions(muon, group, owned, list(map(torch.zeros_like, owned))) if owned else None
        self.finite = self.directions.finite if owned else torch.ones((), dtype=torch.int32, device=device)

    def take(self, finite: Tensor) -> None:
        """The second half, if `finite` is 1."""
        updates = self.directions.updates(finite) if self.directions else []
        updates = self.exchange.to_rows(updates, wire_dtype(self.momenta[0]), finite.device)
        momenta = torch.where(finite > 0, self.advanced, _flat(self.momenta))
        torch._foreach_copy_(self.momenta, _as_parts(momenta, self.momenta))
        _apply(self.muon, self.group, self.parameters, updates)


class RowExchange:
    """Rows of matrices of these shapes to the matrices' owners, and rows back; every rank of `mesh` takes part."""

    def __init__(self, shapes: Sequence[torch.Size], mesh: DeviceMesh):
        self.shapes, self.group, self.rank, self.world = shapes, mesh.get_group(), mesh.get_local_rank(), mesh.size()
        owner = owners(shapes, self.world)
        self.owned = [[i for i, rank in enumerate(owner) if rank == one] for one in range(self.world)]

    def to_owners(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """This rank's rows of every matrix -> the whole of those that it owns."""
        own = self.owned[self.rank]
        shapes = [[self._shape(i, rank) for i in own] for rank in range(self.world)]
        parts = [[rows[i] for i in some] for some in self.owned]
        received = _all_to_all(parts, shapes, rows[0].dtype, rows[0].device, self.group)
        return [torch.cat(blocks) for blocks in zip(*received, strict=True)]

    def to_rows(self, matrices: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """The matrices that this rank owns -> its rows of every matrix, in `dtype`."""
        own, shapes = self.owned[self.rank], [[self._shape(i, self.rank) for i in some] for some in self.owned]
        cuts = [[self._shape(i, rank)[0] for rank in range(self.world)] for i in own]
        blocks = [matrix.split(heights) for matrix, heights in zip(matrices, cuts, strict=True)]
        parts = [[block[rank] for block in blocks] for rank in range(self.world)]
        received = _all_to_all(parts, shapes, dtype, device, self.group)
        rows = {
            i: part for some, back in zip(self.owned, received, strict=True) for i, part in zip(some, back, strict=True)
        }
        return [rows[i] for i in range(len(self.shapes))]

    def _shape(self, number: int, rank: int) -> tuple[int, int]:
        """Of what `rank` has of a matrix."""
        rows, columns = self.shapes[number]
        return _height(rows, rank, self.world), columns


def _height(rows: int, rank: int, world: int) -> int:
    """Rows of a matrix that torch gives `rank`: the last ranks have fewer, or none."""
    step = -(-rows // world)
    return max(0, min(step, rows - step * rank))


def _all_to_all(
    parts: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, int]]],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """parts[r] to rank r, and from it what has shapes[r]; in one exchange, in `dtype`."""
    sizes = [[part.shape for part in some] for some in parts]
    sent, received = (torch.empty(sum(map(_count, some)), dtype=dtype, device=device) for some in (sizes, shapes))
    flat = [part for some in parts for part in some]
    if flat:
        torch._foreach_copy_(_as_parts(sent, flat), flat)
    dist.all_to_all_single(received, sent, list(map(_count, shapes)), list(map(_count, sizes)), group=group)
    views = iter(_views(received, [shape for some in shapes for shape in some]))
    return [[next(views) for _ in some] for some in shapes]


def _count(shapes: Iterable[Sequence[int]]) -> int:
    """Elements of matrices of these shapes."""
    return sum(rows * columns for rows, columns in shapes)


def _views(buffer: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Matrices of these shapes, one after the other in `buffer`."""
    return [part.view(*shape) for part, shape in zip(buffer.split([_count([s]) for s in shapes]), shapes, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Their entries, one after the other."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _as_parts(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`_flat` of such tensors holds of each."""
    return _views(buffer, [tensor.shape for tensor in tensors])


def _gradients(parameters: Sequence[DTensor]) -> list[Tensor]:
    """This rank's part of each gradient; one that is still to be summed over ranks, Partial(), is summed."""
    return [p.grad.redistribute(p.device_mesh, p.placements).to_local() for p in parameters]


def _momenta(muon: "Muon", parameters: Sequence[DTensor]) -> list[Tensor]:
    """This rank's part of each momentum; zeros where there is none yet."""
    for p in parameters:
        if "momentum" not in muon.state[p]:
            wide = torch.promote_types(p.dtype, torch.float32)
            muon.state[p]["momentum"] = torch.zeros_like(p, dtype=wide)
    return [muon.state[p]["momentum"].to_local() for p in parameters]


def _directions(muon: "Muon", group: Group, gradients: list[Tensor], momenta: list[Tensor]) -> MuonDirections:
    settings = (group[name] for name in ("momentum", "nesterov", "steps", "coefficients"))
    return MuonDirections(gradients, momenta, *settings, backend=muon.backend)


def _apply(muon: "Muon", group: Group, parameters: Sequence[DTensor], updates: Sequence[Tensor]) -> None:
    """Each update to this rank's part of its parameter."""
    some = [(p, u) for p, u in zip(parameters, updates, strict=True) if u.numel()]
    rates = group["lr"], group["weight_decay"], group["scale"]
    shards, rows = [p.to_local() for p, _ in some], [p.size(0) for p, _ in some]
    muon_apply_(shards, [u for _, u in some], *rates, rows=rows, backend=muon.backend)
    torch.autograd.graph.increment_version(parameters)
