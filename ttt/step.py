"""One step of the engine: a chunk of each document of a dense batch, scored and, where it trains, learnt from.

    nll_j   = NLL of the chunk's targets inside its window, under the document's adapter         (recorded)
    adapter <- Adam(adapter, grad mean(nll_j)),   steps_per_chunk times, where a place trains

The mathematics are those of the eager oracle in the tests; this is the form for a GPU. Shapes are fixed, every
index is a tensor and nothing waits for the device, so that a step can be captured in a CUDA graph. Windows lie so that
the chunk is among their last `chunk` inputs. The head, and all of the last block after its attention, run on those
alone, and neither a gather nor a scatter is needed between them. Gradients exist from block 0's QKV upwards only. The
kernels write those of the adapters into the pool. The reference ops, which a CPU runs, give them to autograd instead,
and they are copied.
"""

import numpy as np
import torch
from torch import Tensor

from ..kernels import lora_adam_
from ..model import network
from ..model.network import Adapters
from ..model.ranges import phase
from ..model.weights import Weights
from .adapters import Slots
from .head import head_nll, head_nll_grads_
from .protocols import learning_rate
from .ring import LEAD, Ring, RingContext
from .schedule import Queue

SLOT, TRAINED, COUNT, START, LENGTH, FIRST, RECORD, FILLED, FRESH, CHUNKS = range(10)
"""The fields of a plan, int32 [10, batch]. A place: its slot; its slot again if Adam steps it for this place, else -1;
how many targets the mean is over that is learnt from, -1 if nothing is; where its window starts in the tokens; the
window's inputs; the first of them that is scored; the row of the record; the document's tokens before the window. FRESH
and CHUNKS list the slots that a document enters in this round, and its chunks, from the first entry on.

Places of one slot add up their gradients. Only one of them may name it as trained: Adam steps a slot once a round."""

FIELDS = 10


def clear_plan(plan: Tensor | np.ndarray) -> None:
    """Make all places empty: no slot, a window of the first token, and no target in it."""
    plan[SLOT : COUNT + 1] = -1
    plan[START:] = 0
    plan[LENGTH : FIRST + 1] = 1


class _End(torch.autograd.Function):
    """A number of which `dhidden` is the gradient with respect to `hidden`.

    PyTorch takes a gradient that it is given only after comparing shapes by sympy, whose import took 0.8 s of every
    start (bench/results/nvidia-h200/tuning/scoring-2.txt, under a profiler).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, dhidden: Tensor) -> Tensor:
        ctx.save_for_backward(dhidden)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        return *ctx.saved_tensors, None


class EngineStep:
    """The step for `rows` places of the windows of `queue`; with a `ring`, in the context that it keeps.

    It reads the first `rows` places of `plan`, the documents' `tokens` int32 [any], and the `chunks` int64 [slots] of
    the document in each slot; it writes `record` (fp32, fp64 for a float64 model) and the pool. `record` holds rows of
    len(tokens), target for target where the token lies, and then batch * chunk cells that take what does not exist.
    """

    def __init__(
        self,
        weights: Weights,
        pool: Slots,
        tokens: Tensor,
        record: Tensor,
        plan: Tensor,
        chunks: Tensor,
        queue: Queue,
        rows: int,
        backend: str | None = None,
        ring: Ring | None = None,
    ):
        self.weights, self.pool, self.ttt, self.backend = weights, pool, pool.ttt, backend
        self.tokens, self.record, self.plan, self.chunks = tokens, record, plan, chunks
        self.rows, length = rows, queue.length
        self.writes_pool = backend == "triton" or (backend is None and tokens.is_cuda)
        self.ring = ring
        self._prepare(queue)
        self.column = torch.arange(0 if ring is None else -LEAD, length, device=tokens.device)
        self.scored = self.column[-self.ttt.chunk :]
        self.nowhere = len(record) - torch.arange(rows * self.ttt.chunk, device=tokens.device).view(rows, -1) - 1

    def _prepare(self, queue: Queue) -> None:
        """What a forward over the windows of `queue` reads beside its inputs."""
        cos, sin = self.weights.rotary(queue.length, self.ttt.window)
        self.rotary = cos[: queue.length].contiguous(), sin[: queue.length].contiguous()
        self.loss = self.weights.config.logit_softcap, queue.temperature

    @torch.no_grad()
    def score(self) -> None:
        """Record the NLL of every place's chunk.

        If another place trains in the round of a document's last chunk, `train` records that chunk instead, with the
        same bits.
        """
        slots, inputs, targets, place = self._inputs()
        context = self._context()
        self._write(self._nll(slots, inputs, targets, context), place)
        if context is not None:
            context.write(self.backend)

    def train(self) -> None:
        """Record the NLL of every place's chunk, then take the Adam steps of the places that train."""
        slots, inputs, targets, place = self._inputs()
        trained = self.plan[TRAINED, : self.rows]
        count = self.plan[COUNT, : self.rows].to(self.record.dtype)
        share = ((count > 0) / count)[:, None].expand_as(targets).contiguous()
        context = self._context()
        for step in range(self.ttt.steps_per_chunk):
            nll = self._gradients(slots, inputs, targets, share, context)
            if step == 0:
                self._write(nll, place)
            with phase("optimizer"), torch.no_grad():
                self._update(trained)
        if context is not None:
            context.write(self.backend)

    @torch.no_grad()
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """slots [rows]; inputs [rows, length]; targets [rows, chunk], -100 where there is none; where each one's NLL
        goes.

        Inputs past a window's end repeat its last one: nothing that is scored reads them.
        """
        slots = self.plan[SLOT, : self.rows]
        start, length, first, row = (self.plan[field, : self.rows, None].long() for field in range(START, RECORD + 1))
        at = start + torch.minimum(self.column, length - 1)
        inputs = self.tokens[at if self.ring is None else at.clamp(min=0)]
        exists = (self.scored >= first) & (self.scored < length)
        at = start + torch.minimum(self.scored, length - 1) + 1
        targets = torch.where(exists, self.tokens[at], -100)
        return slots, inputs, targets, torch.where(exists, row * len(self.tokens) + at, self.nowhere)

    def _nll(self, slots: Tensor, inputs: Tensor, targets: Tensor, context: RingContext | None) -> Tensor:
        """The NLL [rows, chunk], with the bits of :meth:`_gradients`."""
        adapters, head = self.pool.layout.adapters(slots, self._parts(self.pool.params))
        hidden = self._hidden(inputs, adapters, context)
        return head_nll(hidden, self.weights.head, head, targets, *self.loss, slots=slots, backend=self.backend)

    def _gradients(
        self, slots: Tensor, inputs: Tensor, targets: Tensor, share: Tensor, context: RingContext | None
    ) -> Tensor:
        """The NLL [rows, chunk]; the gradient of sum(share * NLL) goes to the pool's rows of `slots`."""
        layout, parts, grads = self.pool.layout, self._parts(self.pool.params), self._parts(self.pool.grads)
        _, head = layout.adapters(slots, parts, grads)
        leaves = [part.detach().requires_grad_() for part in parts[: layout.head_start]]
        adapters, _ = layout.adapters(slots, leaves + parts[layout.head_start :], grads if self.writes_pool else None)
        with phase("forward"), torch.enable_grad():
            hidden = self._hidden(inputs, adapters, context)
        with phase("backward"):
            nll, dhidden = head_nll_grads_(
                hidden, self.weights.head, head, targets, share, *self.loss, slots=slots, backend=self.backend
            )
            with torch.enable_grad():
                end = _End.apply(hidden, dhidden)
            if self.writes_pool:
                end.backward()
            else:
                torch._foreach_copy_(grads[: layout.head_start], torch.autograd.grad(end, leaves))
        return nll

    def _update(self, trained: Tensor) -> None:
        pool = self.pool
        pool.lr.copy_(learning_rate(self.ttt, pool.step, self.chunks))
        if pool.shared is not None:
            pool.lr[pool.shared].fill_(self.ttt.phase_lr)
        lora_adam_(
            pool.params,
            pool.grads,
            pool.exp_avg,
            pool.exp_avg_sq,
            pool.step,
            pool.lr,
            trained,
            pool.group_lr,
            (self.ttt.beta1, self.ttt.beta2),
            self.ttt.eps,
            decay=pool.decay,
            backend=self.backend,
        )

    def _write(self, nll: Tensor, place: Tensor) -> None:
        with torch.no_grad():
            self.record.index_copy_(0, place.flatten(), nll.flatten().to(self.record.dtype))

    @torch.no_grad()
    def _context(self) -> RingContext | None:
        if self.ring is None:
            return None
        slots, filled, count = (self.plan[field, : self.rows] for field in (SLOT, FILLED, LENGTH))
        return RingContext.of(self.ring, slots, filled, count, self.scored)

    def _hidden(self, inputs: Tensor, adapters: Adapters, context: RingContext | None) -> Tensor:
        return network.hidden(self.weights, inputs, self.rotary, adapters, self.ttt.chunk, context, self.backend)

    def _parts(self, rows: Tensor) -> list[Tensor]:
        return self.pool.views(rows, len(rows))
