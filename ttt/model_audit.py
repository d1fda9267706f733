"""The audit of our own models: their scorer, what its passes may differ by, and the full softmax in float64.

The checks of :mod:`.audit` see a scorer's answers alone. Of our own models more is known: which bits our ops promise,
how far a pass in the compute dtype rounds, and the hidden states and logits that a recorded NLL comes from.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ..kernels.attention import HEAD_DIMS
from ..kernels.lora_head_nll.reference import softcap_logits_ref
from ..model import network
from ..model.gpt import GPT
from ..model.network import Adapters, BlockAdapters, Lora
from ..model.weights import BlockWeights, Weights, frozen_weights
from .audit import Scorer, audit
from .audit_report import AuditReport, Check, Rounding, sums
from .base import BaseNll
from .documents import Document
from .engine import ROWS, engine_of
from .engines import CPU_ROWS, UNCAPTURED
from .hf_model import HfModel
from .pipeline import ScoreRequest, score
from .protocols import TTTConfig
from .queue import Deadline
from .results import ScoreResult

SWAPPED = {"cpu": 2**15, "cuda": 2**20}
"""Tokens that our own models read for one sum over the vocabulary, by device type: what takes about a minute."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Nats by which a target's NLL may differ between our own passes at least, by compute dtype: the same function in other
sums, as of the base pass for a document that is cut too short to adapt. :func:`measured_rounding` looks for more."""

MOST_MEASURED = 4096
"""Targets that the rounding of a pass is measured on; a pass over them costs a few hundredths of an audit."""


def scorer_of(model: GPT | HfModel, config: TTTConfig, scorer: str = "auto") -> Scorer:
    """The scorer that `klora score` is, for :func:`audit`: documents adapted under `config`, without a deadline."""
    return lambda rows: _scored(model, config, scorer, rows).nll


def _scored(model: GPT | HfModel, config: TTTConfig, scorer: str, rows: Sequence[np.ndarray]) -> ScoreResult:
    documents = _named(rows, np.int32 if isinstance(model, HfModel) else np.uint16)
    config = config.override({"deadline": 0.0})
    return score(ScoreRequest(model, documents, config, scorer=scorer, keeps_nll=True))


def _named(rows: Sequence[np.ndarray], dtype: type = np.uint16) -> list[Document]:
    return [Document(str(number), tokens.astype(dtype), 1) for number, tokens in enumerate(rows)]


def audit_model(
    model: GPT,
    config: TTTConfig,
    documents: Sequence[np.ndarray],
    *,
    scorer: str = "auto",
    tolerance: float | None = None,
    seed: int = 0,
) -> AuditReport:
    """:func:`audit` of our own scorer, at borders of its chunks too; whether nats are the sums of the NLLs; whether a
    slot that is used again keeps a trace; the full softmax of an adapted document and of a short one.

    tolerance: as of :func:`audit`, for every check. Left out, two passes may differ by :func:`measured_rounding`, and
    nothing by the documents beside one or by the text after a target, where our ops promise that.
    """
    vocab, swapped = model.config.vocab_size, SWAPPED[model.embed.device.type]
    rounding = measured_rounding(model, config, documents) if tolerance is None else Rounding(tolerance, "as was given")
    exact = tolerance is None and promises_bits(model)
    report = audit(
        scorer_of(model, config, scorer),
        documents,
        vocab,
        tolerance=rounding.tolerance,
        batch_tolerance=0.0 if exact else None,
        places=borders(config, documents, seed),
        seed=seed,
        most_swapped=swapped,
    )
    # In ascending tokens none of an earlier chunk comes again, so that adapting does harm: of such documents the score
    # is not the better one of two numbers.
    random = np.random.default_rng(seed)
    strangers = [np.append(t[:1], np.sort(random.integers(0, vocab, len(t) - 1))) for t in documents]
    both = [*documents, *strangers]
    result = _scored(model, config, scorer, both)
    own = [sums(((one.name, one.adapted_nats) for one in result.documents), result.nll)]
    own += one_slot(model, config, both, result, scorer, 0.0 if exact else rounding.tolerance)
    longest, shortest = max(documents, key=len), documents[0][: min(config.chunk, config.min_tokens) // 2 + 1]
    softmax = partial(full_softmax, model, config, tolerance=rounding.tolerance)
    checks = [softmax(tokens) for tokens in (longest, shortest) if len(tokens) > 1]
    return replace(report, checks=(*report.checks, *own, *checks), rounding=rounding)


def borders(config: TTTConfig, documents: Sequence[np.ndarray], seed: int = 0) -> list[list[int]]:
    """The last target of a chunk of each document, drawn from all but its last one, and the first of the next."""
    random, found = np.random.default_rng(seed), []
    for tokens in documents:
        whole = (len(tokens) - 2) // config.chunk
        last = int(random.integers(1, whole + 1)) * config.chunk if whole > 0 else 0
        found.append([last, last + 1] if last else [])
    return found


def one_slot(
    model: GPT, config: TTTConfig, documents: Sequence[np.ndarray], result: ScoreResult, scorer: str, tolerance: float
) -> list[Check]:
    """Whether documents that follow one another in one slot score what the scorer's `result` says of them.

    No check where nothing is adapted.
    """
    adapted = [index for index, one in enumerate(result.documents) if one.adapted_tokens]
    if not adapted:
        return []
    weights, named = frozen_weights(model), _named([documents[index] for index in adapted])
    rows, capture = CPU_ROWS if weights.device.type == "cpu" else ROWS, False if scorer == UNCAPTURED else None
    with torch.enable_grad():
        engine = engine_of(weights, config, named, slots=1, rows=rows, capture=capture)
        found = engine.token_nll(named, engine.adapt(named, Deadline(0)).kept_pass)
    most, where = 0.0, 0
    for index, nll in zip(adapted, found, strict=True):
        reached = result.documents[index].adapted_tokens
        apart = np.nan_to_num(np.abs(nll[:reached] - result.nll[index][:reached]), nan=np.inf).max()
        if apart > most:
            most, where = float(apart), index
    if most > tolerance:
        says = f"document {where} differs by {most:.3g} nats (allowed: {tolerance:.3g}): a slot keeps what was before"
        return [Check("one slot", False, says)]
    bits = "bit for bit" if not most else f"within {most:.2g} nats (allowed: {tolerance:.3g})"
    return [Check("one slot", True, f"{len(adapted):,} documents, one after another in one slot: {bits}")]


def promises_bits(model: GPT) -> bool:
    """Whether no batch changes a bit: not where a GPU runs PyTorch's attention or products in place of our kernels."""
    if model.embed.device.type == "cpu":
        return True
    runs_kernels = network.pick_backend(model.config, model.embed.device, model.dtype) == "triton"
    return runs_kernels and model.config.head_dim in HEAD_DIMS


@torch.no_grad()
def measured_rounding(model: GPT, config: TTTConfig, documents: Sequence[np.ndarray]) -> Rounding:
    """What two passes of the unadapted model may differ by: each by its rounding, measured on these documents.

    It is twice the most by which an NLL differs between hidden states of the compute dtype and those of float64, of the
    same weights, but at least ROUNDING. Both are made by the reference ops: a fault of a kernel widens nothing. They
    read one window at a time, of all documents in turn, until MOST_MEASURED targets are seen.
    """
    weights = frozen_weights(model)
    wide, divisor = in_float64(weights), min(1.0, config.temperature)
    most, seen, size = 0.0, 0, min(config.window, MOST_MEASURED)
    for begin in range(0, max(map(len, documents)), size):
        for tokens in documents:
            window = torch.from_numpy(tokens[begin : begin + size + 1].astype(np.int64)).to(weights.device)[None]
            if window.size(1) < 2 or seen >= MOST_MEASURED:
                continue
            passes = (_hidden(of, window[:, :-1], config.window) for of in (weights, wide))
            nll, exact = (_full_nll(wide, h, None, window[0, 1:], divisor) for h in passes)
            most, seen = max(most, float((nll - exact).abs().max())), seen + len(exact)
    least, dtype = ROUNDING[model.dtype], str(model.dtype).removeprefix("torch.")
    measured = f"a pass in {dtype} is off from float64 by {most:.2g} at most, of {seen:,} targets"
    says = f"{measured}, twice" if 2 * most > least else f"what {dtype} is always allowed; {measured}"
    return Rounding(max(2 * most, least), says)


def in_float64(weights: Weights) -> Weights:
    """Frozen weights with the values that they have, for a pass in float64."""

    def wide(block: BlockWeights) -> BlockWeights:
        return BlockWeights(*(part if part is None else part.double() for part in block))

    def rotary(rows: int, length: int) -> tuple[torch.Tensor, ...]:
        return tuple(table.double() for table in weights.rotary(rows, length))

    parts = {name: getattr(weights, name).double() for name in ("embed", "bigram", "gate", "head")}
    # PyTorch's other backends for attention take no float64 on a GPU.
    return replace(weights, **parts, blocks=tuple(map(wide, weights.blocks)), rotary=rotary, attention="math")


def _hidden(weights: Weights, inputs: torch.Tensor, longest: int, adapters: Adapters | None = None) -> torch.Tensor:
    """float64 [S, D] of one window int [1, S], by the reference ops in the weights' dtype."""
    cos, sin = (table[: inputs.size(1)].contiguous() for table in weights.rotary(inputs.size(1), longest))
    return network.hidden(weights, inputs, (cos, sin), adapters, backend="reference")[0].double()


def _full_nll(wide: Weights, h: torch.Tensor, head: Lora | None, targets: torch.Tensor, divisor: float) -> torch.Tensor:
    """NLL float64 [S] of a softmax over all logits, for h float64 [S, D]."""
    z = h @ wide.head.T
    if head is not None:
        z = z + (h @ head.a[0].T) @ head.b[0].T
    logp = softcap_logits_ref(z, wide.config.logit_softcap, divisor).log_softmax(-1)
    return -logp.gather(1, targets[:, None])[:, 0]


@torch.no_grad()
def full_softmax(model: GPT, config: TTTConfig, tokens: np.ndarray, tolerance: float) -> Check:
    """Whether the recorded NLLs of a document's last chunk are those of a softmax over the whole vocabulary.

    Hidden states and all logits are computed anew in float64, from the same weights and from the adapter as it was when
    that chunk was scored: what the recorded NLLs differ by is the rounding of one pass. With the context `cached`, and
    where the document diverges, they are the base model's.
    """
    document = Document("audited", tokens.astype(np.uint16), 1)
    config = config.override({"deadline": 0.0, "phases": 0})
    weights, targets = frozen_weights(model), document.targets
    chunk = (targets - 1) // config.chunk
    first, start = chunk * config.chunk, int(config.window_start(np.array(chunk), np.array(targets)))
    adapts = config.adapts(targets) and config.learns and config.context != "cached"
    adapters = head = None
    if adapts:
        with torch.enable_grad():
            engine = engine_of(weights, config.override({"batch": 1}), [document], slots=1)
            adapted = engine.adapt([document], Deadline(0))
            recorded = engine.token_nll([document], adapted.kept_pass)[0]
        adapts = not adapted.diverged[0]
    if adapts:
        pool = engine.pool
        slots = torch.zeros(1, dtype=torch.int32, device=weights.embed.device)
        adapters, head = _adapters_in_float64(*pool.layout.adapters(slots, pool.views(pool.params, 1)), weights.dtype)
    else:
        first = start = 0  # one window, which every document begins with
        targets = min(targets, config.window)
        recorded = BaseNll(weights, [replace(document, tokens=document.tokens[: targets + 1])], config).nll[1:]
    on_device = torch.from_numpy(document.tokens.astype(np.int64)).to(weights.embed.device)
    longest, wide = config.window if adapts or config.is_causal else config.min_tokens, in_float64(weights)
    h = _hidden(wide, on_device[None, start:targets], longest, adapters)[first - start :]
    divisor = config.temperature_of(chunk) if adapts else 1.0
    expected = _full_nll(wide, h, head, on_device[first + 1 : targets + 1], divisor).cpu().numpy()
    apart = float(np.abs(expected - recorded[first:targets]).max())
    passed = apart <= tolerance
    of = f"{'adapted' if adapts else 'base'} model, targets {first + 1} to {targets}"
    says = "differ from the recorded by" if not passed else "agree with the recorded within"
    return Check(
        "full softmax",
        passed,
        f"{of}: NLLs of a softmax over all {weights.config.vocab_size:,} logits, in float64, {says} {apart:.3g} nats "
        f"(allowed: {tolerance:.3g})",
    )


def _adapters_in_float64(adapters: Adapters, head: Lora | None, dtype: torch.dtype) -> tuple[Adapters, Lora | None]:
    """Adapters with the values that ops in `dtype` read: matrices are rounded to it, a bias is not."""

    def wide(lora: Lora | None) -> Lora | None:
        return lora and Lora(lora.a.to(dtype).double(), lora.b.to(dtype).double())

    blocks = [
        BlockAdapters(*map(wide, (of.qkv, of.o, of.up, of.down)), bias=None if of.bias is None else of.bias.double())
        for of in adapters.blocks
    ]
    return adapters._replace(blocks=blocks), wide(head)
