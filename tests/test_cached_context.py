"""Context `cached`: the engine against a plain loop over chunks that keeps lists of keys and values."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.bench.tolerance import allowed_error, relative_error
from klora.kernels import BOS_ID, bigram_embedding_ref, rms_norm_ref
from klora.model.config import ConfigError, preset
from klora.model.gpt import GPT
from klora.model.weights import frozen_weights
from klora.ttt.adapters import AdapterLayout
from klora.ttt.base import BaseNll
from klora.ttt.documents import Document
from klora.ttt.engine import Engine
from klora.ttt.engine_memory import activation_bytes, numbers_kept, slot_bytes
from klora.ttt.protocols import TTTConfig
from klora.ttt.queue import Deadline
from klora.ttt.ring import Ring, RingContext
from klora.ttt.run import Run
from klora.ttt.schedule import Schedule, queues_of
from klora.ttt.step import EngineStep, clear_plan
from test_engine import (
    LONG,
    SHALLOW,
    STRICT,
    Ops,
    documents,
    engine_for,
    gpu,
    model64,
    on_gpu,
    recorded,
    strict_configs,
    token_nll,
)
from test_engine import test_no_score_depends_on_later_text as no_score_depends_on_later_text
from test_ttt import document, score

CACHED = STRICT.override({"context": "cached", "lr": 0.05})


def oracle(
    model: GPT, doc: Document, config: TTTConfig, steps_at: list[int] | None = None, initial: torch.Tensor | None = None
) -> torch.Tensor:
    """NLL of a document's targets, chunk by chunk, in the model's dtype; `initial` is the adapter it starts from."""
    weights, layout = frozen_weights(model), AdapterLayout(model.config, config)
    dtype = weights.dtype
    params = layout.initial(config.adapter_seed).to(weights.embed) if initial is None else initial
    factor, moments, taken = layout.group_lr().to(params), [torch.zeros_like(params)] * 2, 0
    decay = torch.zeros_like(params) if layout.decay() is None else layout.decay().to(params)
    tokens = torch.from_numpy(doc.tokens.astype(np.int64)).to(params.device)
    x0 = bigram_embedding_ref(tokens[None, :-1], weights.embed, weights.bigram, weights.gate, dtype)[0]
    cos, sin = weights.rotary(doc.targets, config.window)
    keys, values = ([[] for _ in weights.blocks] for _ in range(2))
    head_dim, sizes, found = model.config.head_dim, model.config.qkv_sizes, []

    def linear(x, weight, lora):
        """x W^T, and (x A^T) B^T where there is a LoRA."""
        out = F.linear(x, weight)
        return out if lora is None else out + F.linear(F.linear(x, lora.a[0].to(dtype)), lora.b[0].to(dtype))

    def rotated(x, at, gain=None):
        first, second = rms_norm_ref(x).to(cos.dtype).chunk(2, -1)
        c, s = cos[at, None], sin[at, None]
        x = torch.cat([first * c - second * s, second * c + first * s], -1)
        return (x if gain is None else x * gain[:, None]).to(dtype)

    def forward(row, begin, end):
        """NLL [end - begin] and each block's own keys and values."""
        adapters, head = layout.adapters(None, [row[p.start : p.stop].view(1, *p.shape) for p in layout.parts])
        at, first = torch.arange(begin, end, device=tokens.device), max(0, begin + config.chunk - config.window)
        x = start = x0[begin:end]
        pushed, own = [], []
        for index, (weight, block) in enumerate(zip(weights.blocks, adapters.blocks, strict=True)):
            lora_a, lora_b = (part[0].to(dtype) for part in (block.qkv.a, block.qkv.b))
            if weight.skip is not None:
                x = x + weight.skip.to(dtype) * pushed.pop()
            x = (weight.mix[0] * x + weight.mix[1] * start).to(dtype)
            n = rms_norm_ref(x)
            b = lora_b.split(sizes)
            qkv = F.linear(n, weight.qkv).split(sizes, -1)
            q, k, v = (
                (part + F.linear(F.linear(n, lora_a[i]), b[i])).unflatten(-1, (-1, head_dim))
                for i, part in enumerate(qkv)
            )
            q, k = rotated(q, at, weight.gain), rotated(k, at)
            own.append((k.detach(), v.detach()))
            seen_k, seen_v = (torch.cat([*kept[index][first:begin], new]) for kept, new in ((keys, k), (values, v)))
            group = q.size(1) // k.size(1)
            scores = torch.einsum("qhd,khd->hqk", q, seen_k.repeat_interleave(group, 1)) / head_dim**0.5
            hidden = torch.arange(first, end, device=at.device)[None] > at[:, None]
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            mixed = torch.einsum("hqk,khd->qhd", p, seen_v.repeat_interleave(group, 1))
            x = x + linear(mixed.flatten(1), weight.out, block.o)
            x = x + linear(linear(rms_norm_ref(x), weight.up, block.up).relu().square(), weight.down, block.down)
            x = x + block.bias[0].to(dtype)
            if index + 1 < len(weights.blocks) // 2:
                pushed.append(x)
        z = linear(rms_norm_ref(x), weights.head, head).to(cos.dtype)
        cap = model.config.softcap
        logits = cap * torch.tanh(z / cap) / config.temperature_of(begin // config.chunk)
        return F.cross_entropy(logits, tokens[begin + 1 : end + 1], reduction="none"), own

    for begin in range(0, doc.targets, config.chunk):
        end = min(begin + config.chunk, doc.targets)
        trains = end < doc.targets and begin + config.chunk >= config.adapt_from
        if steps_at is not None:
            steps_at.append(taken)
        for step in range(config.steps_per_chunk if trains else 1):
            row = params.clone().requires_grad_()
            nll, own = forward(row, begin, end)
            if step == 0:
                found.append(nll.detach())
                made = own
            if trains:
                (grad,) = torch.autograd.grad(nll.mean(), row)
                taken += 1
                moments = [
                    beta * m + (1 - beta) * g
                    for beta, m, g in zip((config.beta1, config.beta2), moments, (grad, grad**2), strict=True)
                ]
                mean, square = (
                    m / (1 - beta**taken) for beta, m in zip((config.beta1, config.beta2), moments, strict=True)
                )
                rate = config.lr * min(1.0, (begin + config.chunk) / (config.lr_warmup or 1))
                rate /= 1 + (begin + config.chunk) / config.lr_half if config.lr_half else 1.0
                params = params - rate * decay * params - rate * factor * mean / (square.sqrt() + config.eps)
        for index, (k, v) in enumerate(made):
            keys[index] += list(k.split(1))
            values[index] += list(v.split(1))
    return torch.cat(found)


def cached_nll(model: GPT, docs, config: TTTConfig, **options) -> list[np.ndarray]:
    engine = engine_for(model, docs, config, **options)
    engine.adapt(docs, Deadline(0))
    return token_nll(engine, docs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk": 8, "window": 20, "steps_per_chunk": 2, "adapt_from": 30},
        {"chunk": 32, "window": 32, "temperature": 1.0},
        {"chunk": 3, "window": 100, "adapt_from": 7},
        {"chunk": 1, "window": 40},
        {"lr_warmup": 50, "lr_half": 40, "beta1": 0.0, "steps_per_chunk": 2},
    ],
)
def test_the_engine_gives_what_a_plain_loop_gives_in_float64(changes):
    """After up to 100 steps; windows past the training length, of the chunk alone, beyond the document."""
    config = CACHED.override(changes)
    model, docs = model64(), documents((100, 33, 7, 64))
    found = cached_nll(model, docs, config, rows=(2,), slots=3)
    for doc, nll in zip(docs, found, strict=True):
        np.testing.assert_allclose(nll, oracle(model, doc, config), rtol=1e-9)


TARGETS = {
    "q,down": {"down_lr": 2.0},
    "k,up": {"k_rank": 1, "up_alpha": 6.0},
    "v,o,head": {"o_rank": 4, "weight_decay": 1.0},
    "q,k,v,o,up,down,head": {"v_rank": 1, "head_alpha": 4.0, "beta1": 0.0, "beta2": 0.99, "a_scale": 2.0},
}
"""Sets of targets that the context `cached` may have, each target in one, and what it may be asked for with."""


@pytest.mark.slow
@pytest.mark.parametrize("targets", TARGETS)
def test_any_set_of_targets_agrees_with_the_plain_loop_after_1_8_and_48_steps(targets):
    """Chunk after chunk: the NLL of chunk n is that after n steps."""
    changes = {"targets": targets, "chunk": 8, "window": 20, "lr": 0.01, **TARGETS[targets]}
    config, doc, steps = CACHED.override(changes), document(49 * 8 + 5), []
    model = model64(dataclasses.replace(SMALL, blocks=2))
    (found,), expected = cached_nll(model, [doc], config), oracle(model, doc, config, steps)
    still = oracle(model, doc, config.override({"lr": 0.0}))
    for count in (1, 8, 48):
        chunk = slice(8 * steps.index(count), 8 * steps.index(count) + 8)
        np.testing.assert_allclose(found[chunk], expected[chunk], rtol=1e-8)
        assert not np.allclose(still[chunk], expected[chunk], rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_any_depth_agrees_with_the_plain_loop(blocks):
    model, doc = model64(dataclasses.replace(SMALL, blocks=blocks)), document(70)
    np.testing.assert_allclose(cached_nll(model, [doc], CACHED)[0], oracle(model, doc, CACHED), rtol=1e-9)


@pytest.mark.slow
def test_fp32_is_as_close_to_float64_as_the_plain_loop_after_1_8_and_48_steps():
    config, doc, steps = CACHED.override({"lr": 0.01, "chunk": 8}), document(49 * 8 + 5), []
    exact = oracle(model64(), doc, config, steps)
    plain = oracle(randomized(SHALLOW).requires_grad_(False), doc, config)
    ours = torch.from_numpy(cached_nll(randomized(SHALLOW).requires_grad_(False), [doc], config)[0])
    for count in (1, 8, 48):
        at = steps.index(count)
        chunk = slice(8 * at, 8 * at + 8)
        error, theirs = (relative_error(x[chunk], exact[chunk]) for x in (ours, plain))
        assert error <= allowed_error(theirs, torch.float32, 8)


@pytest.mark.slow
def test_a_document_does_not_know_its_batch_or_its_slot():
    """Another document was in the slot before, on other steps: nothing of it is read."""
    model, docs = model64(), documents((100, 90, 33, 7, 64, 1))
    whole = cached_nll(model, docs, CACHED)
    for batch, rows, slots in ((1, (), 1), (3, (1,), 3), (8, (1, 2, 4), 9)):
        again = cached_nll(model, docs, CACHED.override({"batch": batch}), rows=rows, slots=slots)
        for one, other in zip(again, whole, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(strict_configs(), st.integers(1, 49), st.randoms())
def test_no_score_depends_on_later_text(config, reached, random):
    no_score_depends_on_later_text.hypothesis.inner_test(config.override({"context": "cached"}), reached, random)


@pytest.mark.parametrize("window", [128, 112])
def test_nothing_adapted_and_all_in_sight_is_the_base_model(window):
    """Keys of an adapter that changes nothing, in a window as long as the document: what a whole window gives."""
    config = CACHED.override({"lr": 0.0, "window": window})
    model, doc = model64(), document(100)
    base = BaseNll(model, [doc], config)
    np.testing.assert_allclose(cached_nll(model, [doc], config)[0], base.tempered[1:], rtol=2e-6)


def test_what_is_kept_reaches_further_back_than_the_window():
    """A key saw its own window: text before a chunk's window moves what is cached, not what is recomputed."""
    model, doc = model64(), document(100)
    other = Document("", np.concatenate([doc.tokens[:1], doc.tokens[2:3], doc.tokens[2:]]), 1)
    for context, far in (("cached", True), ("recomputed", False)):
        config = CACHED.override({"lr": 0.0, "window": 32, "context": context})
        one, two = (cached_nll(model, [some], config)[0][48:64] for some in (doc, other))
        assert np.any(one != two) == far


def test_there_is_one_queue_or_one_for_each_temperature():
    assert queues_of(CACHED.override({"temperature": 1.0})) == [(0, 16, 1.0)]
    assert queues_of(CACHED.override({"adapt_from": 33})) == [(0, 16, 1.0), (3, 16, 0.9)]
    engine = engine_for(model64(), documents(), CACHED.override({"temperature": 1.0}), rows=(2,))
    engine.prepare()
    assert engine.facts["steps"] == 4 and engine.facts["slots"] == 4 and engine.facts["context"] == "cached"


@pytest.mark.parametrize("position", [1, 2, 5])
def test_a_chunks_embedding_is_the_whole_documents(position):
    """Also where the lead-in reaches before the document, into another one's tokens."""
    model, doc = model64(), document(9)
    weights = frozen_weights(model)
    tokens = torch.from_numpy(np.concatenate([[7, 9], doc.tokens]).astype(np.int64))
    tables = weights.embed, weights.bigram, weights.gate
    whole = bigram_embedding_ref(tokens[None, 2:], *tables, torch.float64)
    ring = Ring(weights, CACHED, 1, 10)
    zero = torch.zeros(1, dtype=torch.int32)
    context = RingContext.of(ring, zero, zero, zero, torch.arange(3))
    for at in (0, position):
        x0 = context.embedded(weights, tokens[None, at : at + 5], "reference")
        assert torch.equal(x0, whole[:, at : at + 3])
    assert int(tokens[2]) == BOS_ID


def test_a_document_beyond_the_longest_is_refused():
    engine = Engine(model64(), CACHED, 1000, longest=50)
    with pytest.raises(ValueError, match="a document has 51 tokens; this engine takes up to 50"):
        engine.adapt([document(50)], Deadline(0))
    engine.adapt([document(49)], Deadline(0))


def test_the_context_wants_the_layout_from_the_start_and_the_engine(tmp_path):
    with pytest.raises(ConfigError, match="context='cached' is not possible; allowed: recomputed, with layout=origin"):
        TTTConfig(context="cached")
    weights = frozen_weights(model64(dataclasses.replace(SMALL, width=96, heads=2, kv_heads=1)))
    with pytest.raises(
        ConfigError, match="not possible on a GPU with heads of 48; allowed: recomputed, or heads of 16,"
    ):
        Ring(weights, CACHED, 1, 10, by_kernel=True)
    result = score([document(40), document(10)], tmp_path, CACHED)
    assert [d.status for d in result.documents] == ["adapted", "short"]
    assert result.facts["engine"]["context"] == "cached" and result.facts["scorer"] == "uncaptured"


def test_the_estimates_count_the_rings_and_the_chunk_alone():
    model, plain = model64(), CACHED.override({"context": "recomputed"})
    cells = 2 * SHALLOW.blocks * (CACHED.window - CACHED.chunk) * SHALLOW.qkv_sizes[1]
    assert slot_bytes(model, CACHED) - slot_bytes(model, plain) == 8 * cells
    engine = Engine(model, CACHED, 100)
    assert engine.ring.keys.numel() + engine.ring.values.numel() == engine.facts["slots"] * cells
    assert activation_bytes(model, CACHED, 4) < activation_bytes(model, plain, 4)
    assert numbers_kept(SHALLOW, CACHED) > numbers_kept(SHALLOW, plain)


def test_steps_over_empty_places_leave_no_trace():
    engine = engine_for(model64(), documents(), CACHED, rows=(1, 2), slots=3)
    engine.adapt(documents(), Deadline(0))
    state = [engine.pool.params, engine.pool.exp_avg, engine.pool.step, engine.ring.keys, engine.ring.values]
    before = [tensor.clone() for tensor in state]
    engine.prepare()
    clear_plan(engine.plan)
    for step in engine._steps.values():
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True)) and len(engine._steps) == 2 * 3 * 2


def test_a_step_runs_the_kernels_once_over_the_chunk():
    """The `seed` preset in bf16 without memory: nothing in a step asks for a value, or fits its ops badly together."""
    with torch.device("meta"):
        model = GPT(preset("seed").model).requires_grad_(False)
    model.compute_dtype = torch.bfloat16
    config = TTTConfig(layout="start", context="cached", temperature=1.0, batch=4)
    engine = Engine(model, config, 5000, rows=(), capture=False, backend="triton")
    engine.prepare()
    with Ops() as ops:
        engine._steps[0, 4, True]()
    blocks = {"lora_attention", "lora_attention_backward_", "lora_backward_", "cache_write_"}
    assert {name: ops.seen[name] for name in blocks} == dict.fromkeys(blocks, 10)
    assert ops.seen["bigram_embedding"] == ops.seen["lora_adam_"] == ops.seen["lora_head_nll_grads_"] == 1


@pytest.mark.parametrize("passes, most", [(1, 1.03)])
def test_a_real_law_keeps_the_places_full_with_as_many_slots_as_places(passes, most):
    """lognormal(6.555, 1.066) tokens, clipped to [8, 60000]; 6,250 documents, in one queue."""
    drawn = np.random.default_rng(0).lognormal(6.555, 1.066, 6250).astype(np.int64).clip(8, 60000)
    config = TTTConfig(layout="start", context="cached", temperature=1.0)
    long = sorted(drawn[config.adapts(drawn - 1)])[::-1]
    run = Run([Document("", np.empty(n, np.uint16), 0) for n in long], config)
    rounds = list(Schedule(run.chunks, passes, 64, queues_of(config), [64, 16, 4]))
    assert len(rounds) <= most * max(run.chunks[0], -(-run.chunks.sum() // 64))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs the kernels where there is no GPU")
def test_the_kernels_in_the_interpreter_agree_with_the_reference():
    config = CACHED.override({"window": 32, "batch": 3, "lr": 0.01})
    model = randomized(dataclasses.replace(SMALL, blocks=2, heads=2, kv_heads=1)).requires_grad_(False)
    docs = documents((53, 20))
    exact, kernels = (np.concatenate(cached_nll(model, docs, config, backend=b)) for b in ("reference", "triton"))
    np.testing.assert_allclose(kernels, exact, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs the kernels where there is no GPU")
def test_the_backward_keeps_what_the_memory_estimate_says(monkeypatch):
    """At a head size of the kernels'; the first forward's keys and values are counted, which the ring will get."""
    shape = dataclasses.replace(SMALL, width=128, heads=2, kv_heads=1, mlp_hidden=384, blocks=2)
    config = TTTConfig(layout="start", context="cached", chunk=32, window=128, batch=2, temperature=1.0)
    steps, hidden = [], EngineStep._hidden

    def watched(*arguments):
        kept = {}

        def keep(tensor):
            if tensor.dim() > 1 and 64 in (tensor.shape[0] * tensor.shape[1], tensor.shape[1]):  # of places and inputs
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden(*arguments)
        steps.append(sum(kept.values()))
        raise InterruptedError  # the next ones keep no more

    monkeypatch.setattr(EngineStep, "_hidden", watched)
    docs = documents((96, 96))
    with pytest.raises(InterruptedError):
        cached_nll(randomized(shape).requires_grad_(False), docs, config, backend="triton")
    k_and_v = shape.blocks * sum(shape.qkv_sizes[1:])
    planned = 4 * config.batch * config.chunk * (numbers_kept(shape, config) - k_and_v)
    # Tables, and the statistics of heads and queries, in fp32: the quarter that is added covers them.
    statistics = 2 * shape.blocks * (shape.heads + shape.kv_heads)
    beside = 4 * config.batch * config.chunk * (shape.head_dim + statistics)
    assert 0.8 * planned < max(steps) < planned + beside


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("steps", [1, 2])
    def test_graphs_give_the_bits_of_no_graphs_and_of_another_run(self, steps):
        config = CACHED.override({"chunk": 64, "window": 256, "steps_per_chunk": steps, "lr": 0.002, "batch": 8})
        model, docs = on_gpu(), documents(LONG)
        graphs = recorded(model, docs, config, rows=(2,))
        assert torch.equal(graphs, recorded(model, docs, config, rows=(2,)))
        assert torch.equal(graphs, recorded(model, docs, config, rows=(2,), capture=False))

    def test_a_document_has_the_same_nll_in_five_batches(self):
        config, doc = CACHED.override({"chunk": 128, "window": 1024, "lr": 0.002, "batch": 16}), document(1500, 3)
        found = []
        for mates in (0, 1, 3, 9, 15):
            docs = [doc, *(document(700 + 100 * i, i + 10) for i in range(mates))]
            found.append(cached_nll(on_gpu(), docs, config, rows=(4,))[0])
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])

    @pytest.mark.parametrize("context", ["cached", "recomputed"])
    def test_no_bit_depends_on_later_text(self, context):
        config, doc = CACHED.override({"chunk": 64, "window": 512, "lr": 0.002, "context": context}), document(1300)
        whole = cached_nll(on_gpu(), [doc], config)[0]
        for targets in (1, 64, 65, 700, 1299):
            cut = Document("", doc.tokens[: targets + 1], 1)
            np.testing.assert_array_equal(cached_nll(on_gpu(), [cut], config)[0], whole[:targets])

    def test_memory_stays_within_the_estimate(self):
        config, docs = CACHED.override({"chunk": 256, "window": 1024, "batch": 16}), documents([3000] * 20)
        model = on_gpu()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine = engine_for(model, docs, config)
        engine.adapt(docs, Deadline(0))
        assert torch.cuda.max_memory_allocated() - before <= engine.facts["estimated_bytes"]

    @pytest.mark.parametrize("targets", ["q,k,v,head", "v,o", "q,up,down", "q,k,v,o,up,down,head"])
    def test_bf16_is_as_close_to_fp32_as_the_plain_loop_in_bf16(self, targets):
        """Relative error of the NLL of the chunks after 1, 8 and 48 Adam steps, against the plain loop in fp32."""
        config = CACHED.override({"chunk": 256, "window": 1024, "lr": 0.002, "targets": targets})
        doc, steps = document(49 * 256 + 100), []
        exact = oracle(on_gpu(torch.float32), doc, config, steps).cpu()
        plain = oracle(on_gpu(), doc, config).float().cpu()
        ours = torch.from_numpy(cached_nll(on_gpu(), [doc], config)[0])
        for count in (1, 8, 48):
            chunk = slice(256 * steps.index(count), 256 * (steps.index(count) + 1))
            error, theirs = (relative_error(x[chunk], exact[chunk]) for x in (ours, plain))
            print(f"after {count} steps: engine {error:.2e}, plain loop in bf16 {theirs:.2e}")
            assert error <= allowed_error(theirs, torch.float32, 256)
