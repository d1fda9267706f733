"""What only a GPU can show: the backends that are picked there, and that bf16 stays close to fp32."""

import gc

import pytest
import torch
from conftest import randomized
from klora.bench.timing import MemoryWatch, captured, peak_bytes, time_interleaved
from klora.bench.tolerance import assert_as_exact
from klora.kernels import causal_attention_ref, pick_attention
from klora.model.config import ModelConfig, preset
from klora.model.gpt import GPT
from klora.ttt.base import BaseNll
from klora.ttt.engine import engine_of
from klora.ttt.protocols import TTTConfig
from klora.ttt.queue import Deadline
from klora.ttt.results import ADAPTED, DIVERGED
from test_ttt import document, poison, score

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

WIDE = ModelConfig(vocab_size=300, width=256, blocks=4, heads=4, kv_heads=2, mlp_hidden=512, bigram_width=16)


@pytest.mark.parametrize("length", [1, 2, 7, 255, 1000])
def test_the_backend_that_is_picked_is_no_worse_than_plain_bf16(length):
    torch.manual_seed(0)
    device = torch.device("cuda")
    backend, why = pick_attention(device, torch.bfloat16, 64)
    assert backend in ("cudnn", "flash") and "bfloat16" in why
    q, k, v = (torch.randn(2, length, heads, 64, device=device, dtype=torch.bfloat16) for heads in (8, 4, 4))
    exact = causal_attention_ref(q.double(), k.double(), v.double(), "math")
    ours = causal_attention_ref(q, k, v, backend)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 8
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    plain = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
    assert_as_exact([ours], [exact], [plain])


def test_bf16_scores_are_close_to_fp32_after_many_adapter_steps():
    """The kernels' in bf16 to those of plain PyTorch in fp32, for which nothing is compiled."""
    torch.manual_seed(0)
    config = TTTConfig(deadline=0.0)
    documents = [document(n, n) for n in (2500, 1800, 1024, 700, 512)]
    nats = {}
    for dtype, backend in ((torch.float32, "reference"), (torch.bfloat16, None)):
        model = GPT(WIDE)
        model.load_state_dict(randomized(WIDE).state_dict())
        model.configure(torch.device("cuda"), dtype)
        model.requires_grad_(False)
        base = BaseNll(model, documents, config, backend=backend)
        adapted = engine_of(model, config, documents, backend=backend).adapt(documents, Deadline(0))
        nats[dtype] = ([base.of(i)[0] for i in range(5)], adapted.nats.tolist())
    assert nats[torch.bfloat16][0] == pytest.approx(nats[torch.float32][0], rel=5e-3)
    assert nats[torch.bfloat16][1] == pytest.approx(nats[torch.float32][1], rel=1e-2)


def test_one_training_step_of_the_seed_preset_in_bf16():
    torch.manual_seed(0)
    model = GPT(preset("seed").model)
    model.configure(torch.device("cuda"), torch.bfloat16)
    tokens = torch.randint(3, 1024, (4, 1025), device="cuda")
    loss = model.nll(tokens[:, :-1], tokens[:, 1:]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(6.93, abs=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_reading_token_by_token_gives_the_logits_of_the_whole():
    model = GPT(WIDE)
    model.load_state_dict(randomized(WIDE).state_dict())
    model.configure(torch.device("cuda"), torch.bfloat16)
    tokens = torch.randint(3, 300, (2, 12), device="cuda")
    cache = model.cache(batch=2, length=12)
    with torch.no_grad():
        whole = model.logits(tokens)
        steps = [model.logits(tokens[:, :5], cache), *(model.logits(tokens[:, i : i + 1], cache) for i in range(5, 12))]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0.05, atol=0.05 * whole.std().item())


def test_a_graph_replay_computes_what_the_call_does_and_its_memory_is_counted():
    device = torch.device("cuda")
    x, out = torch.randn(1 << 20, device=device), torch.empty(1 << 20, device=device)
    replay = captured(lambda: torch.mul(x, 2, out=out), device)
    x.normal_()
    replay()
    assert torch.equal(out, 2 * x)
    assert peak_bytes(lambda: x + 1, device) == x.nbytes
    watch = MemoryWatch(device)
    captured(lambda: torch.mul(x + 1, 2, out=out), device)
    taken = watch.taken()
    assert taken.peak >= x.nbytes > taken.kept
    times = time_interleaved({"graph": [replay], "twice": [lambda: (replay(), replay())]}, device)
    assert 0 < times["graph"].p50 < times["twice"].p50


def on_gpu() -> GPT:
    model = GPT(WIDE)
    model.load_state_dict(randomized(WIDE).state_dict())
    model.configure(torch.device("cuda"), torch.bfloat16)
    return model


def test_a_document_that_diverges_falls_back_and_no_other_bit_changes(tmp_path, monkeypatch):
    documents = [document(n, n) for n in (400, 2000, 640, 1500, 200)]
    config, model = TTTConfig(deadline=0.0, min_tokens=256), on_gpu()
    clean = score(documents, tmp_path / "clean", config, model).documents
    poison(monkeypatch, place=1, after=2)  # the one of 1,500 targets
    result = score(documents, tmp_path / "poisoned", config, model)
    assert result.facts["scorer"] == "engine"
    for index, (found, expected) in enumerate(zip(result.documents, clean, strict=True)):
        assert index == 3 or found == expected
    assert (result.documents[3].status, result.documents[3].adapted_tokens) == (DIVERGED, 3 * config.chunk)
    assert result.documents[3].base_nats == clean[3].base_nats


@pytest.mark.parametrize("scorer", ["engine", "uncaptured"])
def test_memory_that_runs_out_halves_the_batch_aloud_and_changes_no_score(tmp_path, scorer):
    """A limit on what PyTorch may allocate, of which the estimate knows nothing: 60% of what the batch takes."""
    documents = [document(1000 + 7 * n, n) for n in range(40)]
    config, model, said = TTTConfig(deadline=0.0, batch=32), on_gpu(), []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    clean = score(documents, tmp_path / "clean", config, model, scorer=scorer)
    taken = torch.cuda.max_memory_reserved() - before
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 0.6 * taken
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        result = score(documents, tmp_path / "full", config, model, scorer=scorer, say=said.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("memory ran out with 32 documents side by side; going on with 16" in line for line in said)
    assert result.facts["engine"]["batch"] < 32
    for found, expected in zip(result.documents, clean.documents, strict=True):
        assert (found.adapted_nats, found.status) == (expected.adapted_nats, ADAPTED)
        assert found.base_nats == pytest.approx(expected.base_nats, rel=1e-3)
