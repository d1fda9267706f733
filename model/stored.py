"""Parameters and gradients in one buffer each, and the weights of a step beside them in the compute dtype.

    values    fp32: first the matrices of all blocks, kind by kind, then everything else
    grads     fp32, laid out alike; every parameter's `.grad` is a part of it
    copies    the matrices in the compute dtype, with the scales folded in: what the products of a step read; late in a
              run with quantisation they are those of the matrices' int6 values, made once a step

The copies are made again after each step of the optimizers, in a few launches; a step's gradients are those of the
copies, and :meth:`StoredWeights.finish` turns them into those of the parameters: what autograd would do through
weights_of, for all blocks at once.
"""

from collections.abc import Sequence

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


class StoredWeights:
    """A model's parameters, moved into one buffer, and its weights around them.

    `values`, `grads` fp32 [size]; `parts` names the views of both: a kind of all blocks ([L, ...]) or one parameter.
    `sums` is `grads` and, behind it, what of a step's gradients belongs to no parameter: all that ranks add up.
    `weights` is what the network reads. Its leaves are the autograd leaves of a step. With `int6_clip`,
    :meth:`quantize` turns int6 values of that clip on and off.
    """

    def __init__(self, model: GPT, int6_clip: float = 0.0):
        self.model, self.dtype = model, model.dtype
        shapes = self._shapes()
        starts, size = {}, 0
        for name, shape in shapes.items():
            starts[name] = size
            size += shape.numel()
        device, config = model.embed.device, model.config
        rows = config.vocab_size, config.bigram_rows
        self.values = torch.zeros(size, device=device)
        self.sums, self._accumulated = (torch.zeros(size + sum(rows) * config.width, device=device) for _ in range(2))
        self.grads = self.sums[:size]
        self.parts, self.part_grads, self._added = (
            {name: buffer[starts[name] :][: shape.numel()].view(shape) for name, shape in shapes.items()}
            for buffer in (self.values, self.sums, self._accumulated)
        )
        self.head_grad, self.bigram_grad = self.sums[size:].view(-1, config.width).split(rows)
        self._head_added, self._bigram_added = self._accumulated[size:].view(-1, config.width).split(rows)
        self._move_parameters()
        end = starts[VECTORS[0]]
        self.copies = torch.empty(end, device=device, dtype=self.dtype)
        self._stacked = torch.empty_like(self.copies)
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
    def _both(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
        return weights, [copy for name in MATRICES for copy in matrices[name]] + leaves, grads, added

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

    @torch.no_grad()
    def take(self, gradients: Sequence[Tensor], first: bool) -> None:
        """Write the leaves' gradients of the first micro-batch of a step, add those of the others."""
        count = len(MATRICES) * len(self.model.blocks)
        torch.cat([gradient.flatten() for gradient in gradients[:count]], out=self._stacked)
        matrices = self.grads[: len(self._stacked)]
        if first:
            matrices.copy_(self._stacked)
            torch._foreach_copy_(self._other_grads, gradients[count:])
        else:
            matrices.add_(self._stacked)
            torch._foreach_copy_(self._other_added, gradients[count:])
            torch._foreach_add_(self._other_grads, self._other_added)

    @torch.no_grad()
    def finish(self) -> None:
        """Turn the gradients of the weights into those of the parameters."""
        parts, grads = self.parts, self.part_grads
        for matrix, scale in SCALED:
            about = parts[matrix], parts[scale], self.depth, self.model.backend
            unfold_rows_(grads[matrix], grads[scale], *about, self._grids[matrix])
        grads["embed"].add_(self.head_grad)
        table, project, scale = (parts[f"bigram.{name}"] for name in ("table", "project", "scale"))
        grads["bigram.scale"].copy_((self.bigram_grad * self._projected()).sum())
        torch.mul(scale, self.bigram_grad @ project, out=grads["bigram.table"])
        torch.mul(scale, self.bigram_grad.mT @ table, out=grads["bigram.project"])
        if len(self.model.skip):
            mix = grads["resid_mix"][self._middle, 0]
            torch.mul(mix, parts["resid_mix"][self._middle, 0], out=grads["skip"][0])
            mix.mul_(1 + parts["skip"][0])
