"""`original`: a baseline that does the work of the system klora rebuilds, the slow way that system did it.

It exists so that anyone can measure the original's times again: the same work in the same order with the same kinds of
launches, and none of its code. It is no reference for results (that is bench/eager.py), and nothing is built on it.

Modelled, because it costs time:
- Adaptation runs eagerly under bf16 autocast: fp32 residual stream, fp32 weights cast to bf16 at every use; Q, K and V
  are three projections that each cast their own input and add their own LoRA products; flash attention.
- The head covers the whole window, not only the chunk's rows, and its logits are fp32.
- Documents are put in order of their number of chunks and cut into batches. A batch runs until its longest document
  ends: those that ended stay in it as rows of padding, and torch's Adam goes on moving their adapters, tensor by
  tensor: the original's 26,000 launches for 64 documents of 1,536 tokens allow no fewer.
- Python loops over the documents of a batch to copy each window to the device, and to tally each chunk's nats and bytes
  in a score of tiny launches that end in `.item()`, which waits; documents too short to adapt are scored one at a time.
- Training: compiled forward and backward with flash attention, everything after them eager. Gradient norms are taken
  tensor by tensor, Newton-Schulz matrix by matrix over one rank's share, updates applied matrix by matrix.
Modelled though it is free, because the original's numbers came from it: the cosine learning rate stretched over the
longest document of the batch, by which a document's scores depend on the rest of its batch (`schedule` replaces it).

Left out, because it changes what is computed and its cost is small:
- a "temperature" that multiplied the loss: here it divides the logits, which is one elementwise pass more;
- half of the bias vectors unused: here all are added;
- bigram and smear parameters in no optimizer, and their stale gradients in the norm: here AdamW has them;
- features that mix the previous document into BOS; adapters that start at random: here :class:`AdapterLayout`'s row.
Left out, because it lies outside the timed work: communication, averages of the weights, the deadline.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import (
    BOS_ID,
    bigram_hash_ref,
    causal_attention_ref,
    newton_schulz_ref,
    norm_rotary_ref,
    relu_squared_mlp_ref,
    rms_norm_ref,
    softcap_logits_ref,
    softcap_nll_ref,
)
from ..model.config import ModelConfig, TrainConfig
from ..model.gpt import GPT, Block, is_block_matrix
from ..ttt.adapters import AdapterLayout
from ..ttt.documents import Document
from ..ttt.protocols import MIN_NLL, TTTConfig
from . import step as step_group
from .entry import Call, Shape, Tensors

RANKS = 8
"""GPUs of the original's training run: one of them orthogonalises every eighth matrix."""

Rotary = tuple[Tensor, Tensor]
Schedule = Callable[[TTTConfig, int, int], float]


class OriginalScore(NamedTuple):
    """Nats of all targets of a document, the pass they are from, and each target's; no pass where no adapter was."""

    nats: float
    kept_pass: int | None
    nll: Tensor


class Tally:
    """Sums of nats, bytes and tokens on the device, one document and chunk at a time, and those of all of them.

    All but the nats are for their cost alone: without a tokenizer a piece counts 1, and 1 more for a space before it.
    """

    def __init__(self, pieces: int, device: torch.device):
        self.bytes_of = torch.ones(pieces, dtype=torch.int16, device=device)
        self.has_space = torch.ones(pieces, dtype=torch.bool, device=device)
        self.is_control = torch.zeros(pieces, dtype=torch.bool, device=device)
        self.nats, self.bytes, self.tokens = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))

    def take(self, nll: Tensor, inputs: Tensor, targets: Tensor) -> tuple[float, float, float]:
        """(nats, bytes, tokens) of the targets [n] that follow `inputs` [n]."""
        sizes = self.bytes_of[targets].double()
        sizes += self.has_space[targets] & ~self.is_control[inputs]
        nats, size, count = nll.double().sum(), sizes.sum(), torch.ones_like(targets).sum()
        self.nats += nats
        self.bytes += size
        self.tokens += count
        return nats.item(), size.item(), count.item()


def stretched_cosine(config: TTTConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` of the batch's `steps`, which its longest document sets: the original's defect."""
    share = min(step / max(steps - 1, 1), 1.0)
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * 0.5 * (1 + math.cos(math.pi * share)))


def constant(config: TTTConfig, step: int, steps: int) -> float:
    """The same learning rate at every step, as score_first has it."""
    return config.lr


class LowRank(nn.Module):
    """(x A^T) B^T with one pair a batch row: a [slots, R, D], b [slots, N, R]."""

    def __init__(self, a: Tensor, b: Tensor, slots: int):
        super().__init__()
        self.a = nn.Parameter(a.expand(slots, -1, -1).clone())
        self.b = nn.Parameter(b.expand(slots, -1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.a.mT) @ self.b.mT


class BlockLora(nn.Module):
    """A block's three separate LoRA pairs and the bias [slots, D] added after it."""

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor, sizes: Sequence[int], slots: int):
        super().__init__()
        self.q, self.k, self.v = (LowRank(*pair, slots) for pair in zip(a, b.split(sizes), strict=True))
        self.bias = nn.Parameter(bias.expand(slots, -1).clone())


class OriginalAdapters(nn.Module):
    """The adapters of a batch as separate tensors, all starting from the row that :class:`AdapterLayout` draws."""

    def __init__(self, model: ModelConfig, ttt: TTTConfig, slots: int, device: torch.device):
        super().__init__()
        layout = AdapterLayout(model, ttt)
        row = layout.initial(ttt.adapter_seed).to(device)
        *blocks, head_a, head_b = (row[part.start : part.stop].view(part.shape) for part in layout.parts)
        self.blocks = nn.ModuleList(
            BlockLora(*blocks[i : i + 3], model.qkv_sizes, slots) for i in range(0, len(blocks), 3)
        )
        self.head = LowRank(head_a, head_b, slots)

    def adam(self, ttt: TTTConfig) -> torch.optim.Adam:
        """torch's Adam; each group's `factor` multiplies the learning rate of the schedule."""
        factors = {"q": ttt.q_lr, "k": ttt.k_lr, "v": ttt.v_lr, "bias": ttt.bias_lr, "head": ttt.head_lr}
        groups = {kind: {"params": [], "factor": factor} for kind, factor in factors.items()}
        for name, parameter in self.named_parameters():  # "blocks.0.q.a", "blocks.0.bias", "head.a"
            groups[next(part for part in name.split(".") if part in groups)]["params"].append(parameter)
        betas = (ttt.beta1, ttt.beta2)
        return torch.optim.Adam(groups.values(), lr=ttt.lr, betas=betas, eps=ttt.eps, foreach=False)


def flash_or_given(model: GPT) -> str:
    """Flash attention for 16-bit work on a GPU, as the original had it; elsewhere what the model is configured to."""
    return "flash" if model.embed.is_cuda and model.dtype.itemsize == 2 else model.attention


def original_hidden(
    model: GPT, tokens: Tensor, rotary: Rotary, stream: torch.dtype, adapters: OriginalAdapters | None = None
) -> Tensor:
    """tokens [B, S] -> rmsnorm(x) [B, S, D] with the residual stream in `stream`; `rotary` has exactly S rows."""
    attention, half = flash_or_given(model), len(model.blocks) // 2
    x = x0 = _smear(model, rms_norm_ref(F.embedding(tokens, model.embed) + _bigram(model, tokens)).to(stream), tokens)
    pushed = []
    for index, block in enumerate(model.blocks):
        if index >= half and pushed:
            x = x + model.skip[index - half].to(x.dtype) * pushed.pop()
        x = _block(block, x, x0, rotary, attention, adapters.blocks[index] if adapters is not None else None)
        if index < half:
            pushed.append(x)
    return rms_norm_ref(x)


def _bigram(model: GPT, tokens: Tensor) -> Tensor:
    table = F.embedding(bigram_hash_ref(tokens, model.config.bigram_rows), model.bigram.table)
    return model.bigram.scale * F.linear(table, model.bigram.project)


def _smear(model: GPT, x: Tensor, tokens: Tensor) -> Tensor:
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    before = before.masked_fill((tokens == BOS_ID)[..., None], 0.0)
    return torch.lerp(x, before, torch.sigmoid(model.smear.gate).to(x.dtype))


def _block(block: Block, x: Tensor, x0: Tensor, rotary: Rotary, attention: str, lora: BlockLora | None) -> Tensor:
    keep, restore = block.resid_mix.to(x.dtype)
    x = keep * x + restore * x0
    n = rms_norm_ref(x)
    q, k, v = (F.linear(n, weight.to(n.dtype)) for weight in (block.q, block.k, block.v))
    if lora is not None:
        q, k, v = q + lora.q(n), k + lora.k(n), v + lora.v(n)
    q, k, v = (part.unflatten(-1, (-1, block.config.head_dim)) for part in (q, k, v))
    cos, sin = (table.to(q.dtype) for table in rotary)
    q = norm_rotary_ref(q, cos, sin, block.gain.to(q.dtype))
    k = norm_rotary_ref(k, cos, sin)
    mixed = causal_attention_ref(q, k, v, attention).flatten(2)
    x = x + (block.depth_scale * block.attn_scale).to(x.dtype) * F.linear(mixed, block.o.to(mixed.dtype))
    n = rms_norm_ref(x)
    hidden = relu_squared_mlp_ref(n, block.up.to(n.dtype), block.down.to(n.dtype))
    x = x + (block.depth_scale * block.mlp_scale).to(x.dtype) * hidden
    return x if lora is None else x + lora.bias[:, None]


def _rotary(model: GPT, length: int) -> Rotary:
    cos, sin = model.rotary(length, length)
    return cos[:length], sin[:length]


def _ttt_nll(
    model: GPT, inputs: Tensor, targets: Tensor, adapters: OriginalAdapters | None, temperature: float
) -> Tensor:
    """NLL [B, S] fp32 of every target of the window."""
    device = inputs.device.type
    with torch.autocast(device, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        hidden = original_hidden(model, inputs, _rotary(model, inputs.size(1)), torch.float32, adapters)
        z = F.linear(hidden, model.embed)
        if adapters is not None:
            z = z + adapters.head(hidden)
    logits = softcap_logits_ref(z, model.config.logit_softcap, temperature)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _window(document: Document, j: int, config: TTTConfig) -> tuple[int, int, int]:
    """(start, end, first) of chunk j: inputs tokens[start:end]; its targets follow inputs `first` to the last."""
    end = min((j + 1) * config.chunk, document.targets)
    start = max(end - config.window, 0)
    return start, end, j * config.chunk - start


def _copy_windows(documents: Sequence[Document], j: int, config: TTTConfig, device: torch.device) -> Tensors:
    """Inputs and targets [B, L] of chunk j, document by document; rows of documents that have ended are padding."""
    length = min((j + 1) * config.chunk, config.window)
    inputs = torch.zeros(len(documents), length, dtype=torch.int64, device=device)
    targets = torch.zeros_like(inputs)
    for row, document in enumerate(documents):
        if j * config.chunk < document.targets:
            start, end, _ = _window(document, j, config)
            tokens = torch.from_numpy(document.tokens[start : end + 1].astype(np.int64)).to(device)
            inputs[row, : end - start], targets[row, : end - start] = tokens[:-1], tokens[1:]
    return inputs, targets


def adapt_original_batch(
    model: GPT, documents: Sequence[Document], config: TTTConfig, schedule: Schedule = stretched_cosine
) -> list[OriginalScore]:
    """Adapt and score one batch, its documents in any order, under `config.protocol`. `model` has to be frozen."""
    if config.steps_per_chunk != 1:
        raise ValueError(f"the original takes 1 step a chunk, not steps_per_chunk={config.steps_per_chunk}")
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model's parameters require gradients; call model.requires_grad_(False) first")
    device = model.embed.device
    adapters = OriginalAdapters(model.config, config, len(documents), device)
    adam, tally = adapters.adam(config), Tally(model.config.vocab_size, device)
    chunks = [-(-document.targets // config.chunk) for document in documents]
    rounds, step = max(chunks), 0
    totals = [[0.0] * len(documents) for _ in range(config.passes)]
    nlls: list[list[list[Tensor]]] = [[[] for _ in documents] for _ in totals]
    for totals_of_pass, nlls_of_pass in zip(totals, nlls, strict=True):
        for j in range(rounds):
            inputs, targets = _copy_windows(documents, j, config, device)
            trained = [j + 1 < count for count in chunks]
            with torch.set_grad_enabled(any(trained)):
                nll = _ttt_nll(model, inputs, targets, adapters, config.temperature)
            recorded = nll.detach()
            for row, document in enumerate(documents):
                if j < chunks[row]:
                    start, end, first = _window(document, j, config)
                    at = row, slice(first, end - start)
                    totals_of_pass[row] += tally.take(recorded[at], inputs[at], targets[at])[0]
                    nlls_of_pass[row].append(recorded[at])
            if any(trained):
                for group in adam.param_groups:
                    group["lr"] = group["factor"] * schedule(config, step, config.passes * (rounds - 1))
                loss = nll[:, -config.chunk :].mean(dim=1) * torch.tensor(trained, device=device)
                adam.zero_grad()
                loss.sum().backward()
                adam.step()
                step += 1
    best = np.argmin(totals, axis=0).tolist() if config.protocol == MIN_NLL else [config.passes - 1] * len(documents)
    return [OriginalScore(totals[kept][row], kept, torch.cat(nlls[kept][row])) for row, kept in enumerate(best)]


def original_batches(documents: Sequence[Document], config: TTTConfig) -> Iterator[list[int]]:
    """Indices of the documents to adapt, `config.batch` at a time: fewest chunks first, file order where equal."""
    long = [index for index, document in enumerate(documents) if len(document.tokens) >= config.min_tokens]
    long.sort(key=lambda index: -(-documents[index].targets // config.chunk))
    for begin in range(0, len(long), config.batch):
        yield long[begin : begin + config.batch]


def original_ttt(
    model: GPT, documents: Sequence[Document], config: TTTConfig, schedule: Schedule = stretched_cosine
) -> list[OriginalScore]:
    """Score every document, in the order given; `config.deadline` is ignored.

    The original's run is `TTTConfig(protocol="min_nll")`. What min_nll and multi_epoch return is LEAKY, no score: it is
    the caller's duty to label it so (ttt/protocols.py, `label`) wherever it is printed or stored. Under
    `stretched_cosine` even score_first depends on the rest of a document's batch. Use this function for its time alone.
    """
    scores = [OriginalScore(0.0, None, torch.zeros(0, device=model.embed.device))] * len(documents)
    tally = Tally(model.config.vocab_size, model.embed.device)
    for index, document in enumerate(documents):
        if len(document.tokens) < config.min_tokens and document.targets:
            tokens = torch.from_numpy(document.tokens.astype(np.int64)).to(model.embed.device)[None]
            with torch.no_grad():
                nll = _ttt_nll(model, tokens[:, :-1], tokens[:, 1:], None, 1.0)
            scores[index] = OriginalScore(tally.take(nll[0], tokens[0, :-1], tokens[0, 1:])[0], None, nll[0])
    for batch in original_batches(documents, config):
        adapted = adapt_original_batch(model, [documents[index] for index in batch], config, schedule)
        for index, score in zip(batch, adapted, strict=True):
            scores[index] = score
    return scores


class OriginalOptimizers:
    """Muon in a loop over the block matrices that are rank `rank`'s, and torch's AdamW over all the rest.

    The other ranks' updates, which an all-reduce would bring, are zero here: this is one GPU's share of a step's work
    and trains a model only with `ranks=1`.
    """

    def __init__(self, model: GPT, config: TrainConfig, ranks: int = RANKS, rank: int = 0):
        named = list(model.named_parameters())
        self.config = config
        self.matrices = [parameter for name, parameter in named if is_block_matrix(name)]
        self.momentum = {i: torch.zeros_like(self.matrices[i]) for i in range(rank, len(self.matrices), ranks)}
        rest = [parameter for name, parameter in named if not is_block_matrix(name) and name != "embed"]
        self.adamw = torch.optim.AdamW(
            [{"params": [model.embed], "peak": config.embed_lr}, {"params": rest, "peak": config.scalar_lr}],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.adam_weight_decay,
            fused=model.embed.is_cuda,
        )

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """One update with every learning rate times `lr_scale`, momentum at its final value."""
        config, lr = self.config, self.config.muon_lr * lr_scale
        sizes = [matrix.numel() for matrix in self.matrices]
        dtype = torch.bfloat16 if self.matrices[0].is_cuda else self.matrices[0].dtype
        flat = torch.zeros(sum(sizes), device=self.matrices[0].device, dtype=dtype)  # what the ranks would all-reduce
        updates = [part.view_as(m) for part, m in zip(flat.split(sizes), self.matrices, strict=True)]
        for index, momentum in self.momentum.items():
            gradient = self.matrices[index].grad
            momentum.mul_(config.muon_momentum).add_(gradient)
            update = newton_schulz_ref(gradient.add(momentum, alpha=config.muon_momentum), config.newton_schulz_steps)
            updates[index].copy_(update * max(1.0, update.size(0) / update.size(1)) ** 0.5)
        for matrix, update in zip(self.matrices, updates, strict=True):
            matrix.mul_(1.0 - lr * config.muon_weight_decay)
            matrix.add_(update.to(matrix.dtype), alpha=-lr)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * lr_scale
        self.adamw.step()


def original_train_step(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    model: GPT,
    optimizers: OriginalOptimizers,
    tokens: Tensor,
    targets: Tensor,
    lr_scale: float = 1.0,
) -> Tensor:
    """One step of `model` on tokens, targets [B, S]; returns the loss and leaves the clipped gradients."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = loss_of(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), optimizers.config.grad_clip)
    optimizers.step(lr_scale)
    return loss.detach()


def original_loss(model: GPT, length: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean NLL of rows of `length` tokens, compiled on a GPU; the residual stream is in the compute dtype."""
    rotary = _rotary(model, length)

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = original_hidden(model, tokens, rotary, model.dtype)
        return softcap_nll_ref(hidden, model.embed.to(hidden.dtype), targets, model.config.logit_softcap).mean()

    return torch.compile(loss_of, dynamic=False, fullgraph=True) if model.embed.is_cuda else loss_of


def build_original_step(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """For the entry `train_step`: (tokens, targets) -> loss and clipped gradient, which is one copy of it dearer."""
    model = step_group.seeded_model(shape, device, dtype)
    optimizers, loss_of = OriginalOptimizers(model, TrainConfig()), original_loss(model, shape["S"])

    def run(tokens: Tensor, targets: Tensor) -> Tensors:
        loss = original_train_step(loss_of, model, optimizers, tokens, targets, lr_scale=0.0)
        return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    return run


def build_original_ttt(
    shape: Shape, device: torch.device, dtype: torch.dtype, schedule: Schedule = constant
) -> Callable[[Tensor], Tensor]:
    """For the entry `score_first_pass`: tokens [B, n + 1] -> NLL [B * n]. The entry's learning rate is constant."""
    model = step_group.seeded_model(shape, device, dtype).requires_grad_(False)
    config = TTTConfig(deadline=0.0, chunk=shape["chunk"], window=4 * shape["chunk"], batch=shape["B"])

    def run(tokens: Tensor) -> Tensor:
        rows = tokens.cpu().numpy().astype("uint16")
        documents = [Document(str(index), row, bytes=1) for index, row in enumerate(rows)]
        return torch.cat([score.nll for score in adapt_original_batch(model, documents, config, schedule)])

    return run
