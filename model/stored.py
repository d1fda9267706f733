"""Parameters and gradients in one buffer each, and the weights of a step beside them in the compute dtype.

    values    fp32: first the matrices of all blocks, kind by kind, then everything else
    grads     fp32, laid out alike, but for the matrices range by range of blocks: what several ranks add up in one
              piece lies side by side. Every parameter's `.grad` is a part of it
    copies    the matrices in the compute dtype, with the scales folded in: what the products of a step read; late in a
              run with quantisation they are those of the matrices' int6 values, made once a step

The copies are made again after each step of the optimizers, in a few launches; a step's gradients are those of the
copies, and :meth:`StoredWeights.finish` turns them into those of the parameters: what autograd would do through
weights_of, for all blocks at once.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.fold import Int6Grid, fold_rows_, unfold_rows_
from .gpt import GPT
from .weights import BlockWeights, Weights

MATRICES = ("qkv", "o", "up", "down")
SCALED = (("o", "attn_scale"), ("down", "mlp_scale"))
"""Matrices, and the scales that are folded into their rows."""
VECTORS = ("resid_mix", "gain", "attn_scale", "mlp_scale")


class GradientBucket(NamedTuple):
    """Gradients that come at about the same time in a backward, and travel together."""

    leaves: slice
    """of the autograd leaves"""
    sums: slice
    """of the buffer of sums"""


class StoredWeights:
    """A model's parameters, moved into one buffer, and its weights around them.

    `values`, `grads` fp32 [size]; `parts` names the views of both: a kind of all blocks ([L, ...]) or one parameter.
    `sums` is `grads` and, behind it, what of a step's gradients belongs to no parameter, and its loss, `total`: all
    that ranks add up. `weights` is what the network reads. Its leaves are the autograd leaves of a step. With
    `int6_clip`, :meth:`quantize` turns int6 values of that clip on and off.

    `buckets` are the gradients in the order in which a backward makes them: the matrices of each of `ranges` ranges of
    blocks, the last one first, then everything else. What a bucket brings to the other ranks, :meth:`carried`, is its
    part of `sums`, or of matrices a copy in `wire_dtype` where that is another dtype.
    """

    def __init__(self, model: GPT, int6_clip: float = 0.0, ranges: int = 1, wire_dtype: torch.dtype = torch.float32):
        self.model, self.dtype = model, model.dtype
        shapes = self._shapes()
        starts, size = {}, 0
        for name, shape in shapes.items():
            starts[name] = size
            size += shape.numel()
        device, config = model.embed.device, model.config
        rows = config.vocab_size, config.bigram_rows
        self.values = torch.zeros(size, device=device)
        last = size + sum(rows) * config.width
        self.sums, self._accumulated = (torch.zeros(last + 1, device=device) for _ in range(2))
        self.grads, self.total = self.sums[:size], self.sums[last]
        self.parts, self.part_grads, self._added = (
            {name: buffer[starts[name] :][: shape.numel()].view(shape) for name, shape in shapes.items()}
            for buffer in (self.values, self.sums, self._accumulated)
        )
        self.head_grad, self.bigram_grad = self.sums[size:last].view(-1, config.width).split(rows)
        self._head_added, self._bigram_added = self._accumulated[size:last].view(-1, config.width).split(rows)
        end = starts[VECTORS[0]]
        self.matrix_grads = self.sums[:end]
        self._blocks = _ranges(len(model.blocks), ranges)
        self._range_grads = self._laid_out(shapes)
        self._move_parameters()
        self.copies = torch.empty(end, device=device, dtype=self.dtype)
        self._stacked = torch.empty_like(self.copies)
        self._wire = None
        if wire_dtype != torch.float32:
            self._wire = self._stacked if self.dtype == wire_dtype else torch.empty_like(self.copies, dtype=wire_dtype)
        self._copied = {
            name: self.copies[starts[name] :][: shapes[name].numel()].view(shapes[name]) for name in MATRICES
        }
        self.head = torch.empty_like(model.embed, dtype=self.dtype, requires_grad=False)
        self.bigram = torch.empty(config.bigram_rows, config.width, device=device)
        self.mix = torch.empty_like(self.parts["resid_mix"])
        self.is_quantized = False
        self._grids = self._made_grids(int6_clip, device)
        self.depth = torch.tensor([block.depth_scale for block in model.blocks], device=device)
        self.weights, self.leaves, self._other_grads, self._other_added = self._weights()
        self.buckets = self._made_buckets(end)
        self.refresh()

    def _shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of each part, in the order of the buffer."""
        model = self.model
        block, count = model.blocks[0], len(model.blocks)
        shapes = {"qkv": (block.q.size(0) + block.k.size(0) + block.v.size(0), block.q.size(1))}
        shapes |= {name: getattr(block, name).shape for name in (*MATRICES[1:], *VECTORS)}
        parts = {name: torch.Size((count, *shape)) for name, shape in shapes.items()}
        others = {name: p.shape for name, p in model.named_parameters() if not name.startswith("blocks.")}
        return parts | dict(sorted(others.items(), key=lambda item: item[0] == "bigram.scale"))  # a single number: last

    def _laid_out(self, shapes: dict[str, torch.Size]) -> list[dict[str, Tensor]]:
        """Of each range of blocks the gradients of its matrices, name -> [blocks, rows, columns]. `part_grads` of a
        matrix becomes a list of those of each block.
        """
        start, found = 0, []
        for blocks in self._blocks:
            found.append({})
            for name in MATRICES:
                shape = (blocks.stop - blocks.start, *shapes[name][1:])
                stop = start + math.prod(shape)
                found[-1][name], start = self.sums[start:stop].view(shape), stop
        for name in MATRICES:
            self.part_grads[name] = [grad for grads in found for grad in grads[name].unbind()]
        return found

    def _made_buckets(self, end: int) -> list[GradientBucket]:
        """The buckets, the last range first; the matrices' gradients end at `end`."""
        leaf = start = 0
        buckets: list[GradientBucket] = []
        for grads in self._range_grads:
            leaves, size = sum(len(grad) for grad in grads.values()), sum(grad.numel() for grad in grads.values())
            buckets.insert(0, GradientBucket(slice(leaf, leaf + leaves), slice(start, start + size)))
            leaf, start = leaf + leaves, start + size
        return [*buckets, GradientBucket(slice(leaf, len(self.leaves)), slice(end, len(self.sums)))]

    @torch.no_grad()
    def _move_parameters(self) -> None:
        """Make every parameter, and its gradient, a view of the buffers."""
        named = dict(self.model.named_parameters())
        for name, parameter in named.items():
            if name.startswith("blocks."):
                _, index, kind = name.split(".")
                value, grad = (parts[kind if kind not in "qkv" else "qkv"][int(index)] for parts in self._both)
                if kind in "qkv":
                    rows = [named[f"blocks.{index}.{other}"].size(0) for other in "qkv"]
                    value, grad = (t.split(rows)["qkv".index(kind)] for t in (value, grad))
            else:
                value, grad = (parts[name] for parts in self._both)
            parameter.data = value.copy_(parameter)
            parameter.grad = grad

    @property
    def _both(self) -> tuple[dict[str, Tensor], dict[str, Tensor | list[Tensor]]]:
        return self.parts, self.part_grads

    def _weights(self) -> tuple[Weights, list[Tensor], list[Tensor], list[Tensor]]:
        """The weights; their leaves, first the matrices in the buffer's order; of the other leaves, where the gradient
        goes and where it is added up.
        """
        model, parts, half = self.model, self.parts, len(self.model.blocks) // 2
        others: list[tuple[Tensor, Tensor, Tensor]] = []

        def leaf(value: Tensor, grad: Tensor, added: Tensor) -> Tensor:
            others.append((value.detach().requires_grad_(), grad, added))
            return others[-1][0]

        def part(name: str, value: Tensor | None = None, index: int | slice = slice(None)) -> Tensor:
            value = parts[name] if value is None else value
            return leaf(value[index], self.part_grads[name][index], self._added[name][index])

        matrices = {name: [copy.detach().requires_grad_() for copy in self._copied[name].unbind()] for name in MATRICES}
        blocks = []
        for index in range(len(model.blocks)):
            joined = index - half
            skip = part("skip", index=joined) if 0 < joined < len(model.skip) else None
            mix, gain = part("resid_mix", self.mix, index), part("gain", index=index)
            qkv, out, up, down = (matrices[name][index] for name in MATRICES)
            blocks.append(BlockWeights(mix, skip, qkv, gain, out, up, down))
        weights = Weights(
            model.config,
            part("embed"),
            leaf(self.bigram, self.bigram_grad, self._bigram_added),
            part("smear.gate"),
            leaf(self.head, self.head_grad, self._head_added),
            tuple(blocks),
            model.rotary,
            model.attention,
            model.chosen_attention,
        )
        leaves, grads, added = map(list, zip(*others, strict=True))
        in_order = [copy for some in self._blocks for name in MATRICES for copy in matrices[name][some]]
        return weights, in_order + leaves, grads, added

    def _made_grids(self, clip: float, device: torch.device) -> dict[str, Int6Grid | None]:
        """The int6 grid of each kind of matrix, all with one switch; None without a clip."""
        if not clip:
            return dict.fromkeys(MATRICES)
        is_on = torch.zeros((), dtype=torch.int32, device=device)
        rows = {name: self.parts[name].shape[:2] for name in MATRICES}
        return {name: Int6Grid(is_on, torch.zeros(rows[name], device=device), clip) for name in MATRICES}

    def quantize(self, is_on: bool) -> None:
        """From here on, let the copies be those of the int6 values, or no longer; a graph that makes them obeys."""
        if is_on != self.is_quantized:
            self.is_quantized = is_on
            self._grids["qkv"].is_on.fill_(int(is_on))
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights those of the parameters as they are."""
        parts, grids = self.parts, self._grids
        for matrix in ("qkv", "up"):
            if grids[matrix] is None:
                self._copied[matrix].copy_(parts[matrix])
            else:
                fold_rows_(self._copied[matrix], parts[matrix], None, None, self.model.backend, grids[matrix])
        for matrix, scale in SCALED:
            about = parts[matrix], parts[scale], self.depth, self.model.backend
            fold_rows_(self._copied[matrix], *about, grids[matrix])
        self.head.copy_(parts["embed"])
        torch.mul(parts["bigram.scale"], self._projected(), out=self.bigram)
        self.mix.copy_(parts["resid_mix"])
        if len(self.model.skip):
            self.mix[self._middle, 0].mul_(1 + parts["skip"][0])

    def _projected(self) -> Tensor:
        return F.linear(self.parts["bigram.table"], self.parts["bigram.project"])

    @property
    def _middle(self) -> int:
        """The block whose join is the stream itself."""
        return len(self.model.blocks) // 2

    def take(self, gradients: Sequence[Tensor], first: bool, last: bool = True) -> None:
        """Write the leaves' gradients of the first micro-batch of a step, add those of the others; all buckets."""
        for number, bucket in enumerate(self.buckets):
            self.take_bucket(number, gradients[bucket.leaves], first, last)

    @torch.no_grad()
    def take_bucket(self, number: int, gradients: Sequence[Tensor], first: bool, last: bool = True) -> None:
        """As :meth:`take`, those of one bucket. After the `last` micro-batch the sum is where it is carried from."""
        if number == len(self.buckets) - 1:
            if first:
                torch._foreach_copy_(self._other_grads, gradients)
            else:
                torch._foreach_copy_(self._other_added, gradients)
                torch._foreach_add_(self._other_grads, self._other_added)
            return
        part = self.buckets[number].sums
        stacked, matrices = self._stacked[part], self.sums[part]
        torch.cat([gradient.flatten() for gradient in gradients], out=stacked)
        is_carried = last and self._wire is not None
        if not first:
            matrices.add_(stacked)
            if is_carried:
                self._wire[part].copy_(matrices)
        elif not is_carried:
            matrices.copy_(stacked)
        elif self._wire is not self._stacked:
            self._wire[part].copy_(stacked)

    def carried(self, number: int) -> Tensor:
        """What ranks add up of a bucket, in place."""
        is_rest = number == len(self.buckets) - 1
        return (self.sums if is_rest or self._wire is None else self._wire)[self.buckets[number].sums]

    @torch.no_grad()
    def finish(self) -> None:
        """Turn the sums of a step into the gradients of the parameters."""
        parts, grads = self.parts, self.part_grads
        if self._wire is not None:
            self.matrix_grads.copy_(self._wire)
        for blocks, of_range in zip(self._blocks, self._range_grads, strict=True):
            for matrix, scale in SCALED:
                grid = self._grids[matrix]
                if grid is not None:
                    grid = grid._replace(scales=grid.scales[blocks])
                about = parts[matrix][blocks], parts[scale][blocks], self.depth[blocks], self.model.backend
                unfold_rows_(of_range[matrix], grads[scale][blocks], *about, grid)
        grads["embed"].add_(self.head_grad)
        table, project, scale = (parts[f"bigram.{name}"] for name in ("table", "project", "scale"))
        grads["bigram.scale"].copy_((self.bigram_grad * self._projected()).sum())
        torch.mul(scale, self.bigram_grad @ project, out=grads["bigram.table"])
        torch.mul(scale, self.bigram_grad.mT @ table, out=grads["bigram.project"])
        if len(self.model.skip):
            mix = grads["resid_mix"][self._middle, 0]
            torch.mul(mix, parts["resid_mix"][self._middle, 0], out=grads["skip"][0])
            mix.mul_(1 + parts["skip"][0])


def _ranges(blocks: int, count: int) -> list[slice]:
    """`blocks` in at most `count` ranges, the smallest first: in a backward that comes last, and nothing hides it."""
    count = min(count, blocks)
    edges = [blocks * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]
