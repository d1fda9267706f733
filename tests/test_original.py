"""The baseline `original`: the same mathematics as ours where it says so, and the original's defects in sight."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SMALL, randomized
from klora.bench import original
from klora.bench.eager import Adam, adapt_batch
from klora.bench.entry import Variant
from klora.bench.gate import check
from klora.bench.original import adapt_original_batch, constant, original_batches, original_ttt, stretched_cosine
from klora.bench.step import ENTRIES as STEP
from klora.bench.ttt import ENTRIES as TTT_ENTRIES
from klora.kernels import BOS_ID
from klora.model.config import TrainConfig
from klora.model.optimizers import FlatGradients, Optimizers
from klora.ttt.documents import Document
from klora.ttt.protocols import MIN_NLL, MULTI_EPOCH, TTTConfig

CPU = torch.device("cpu")
TTT = TTTConfig(chunk=16, window=64, min_tokens=32, lora_rank=2, head_rank=3, epochs=2, deadline=0.0, batch=4)


def document(targets: int, seed: int = 0) -> Document:
    tokens = np.random.default_rng(seed).integers(3, SMALL.vocab_size, targets + 1).astype(np.uint16)
    tokens[0] = BOS_ID
    return Document(f"{seed}-{targets}", tokens, bytes=2 * targets)


@pytest.fixture(scope="module")
def model():
    return randomized().requires_grad_(False)


def ours(model, documents, config=TTT) -> list[float]:
    found = adapt_batch(model, Adam(model, config, len(documents)), documents)
    return [nll.double().sum().item() for nll in found]


def nats(model, documents, config=TTT, schedule=constant) -> list[float]:
    return [score.nats for score in adapt_original_batch(model, documents, config, schedule)]


@pytest.mark.parametrize(
    "targets",
    [16, 11, 32, 100],
    ids=["one chunk", "part of a chunk", "one step", "six steps, windows that slide"],
)
def test_documents_of_one_length_score_as_the_eager_baseline_does(model, targets):
    documents = [document(targets, seed) for seed in range(3)]
    assert nats(model, documents) == pytest.approx(ours(model, documents), rel=1e-6)


def test_all_chunks_agree_within_rounding_where_nothing_adapts(model):
    documents, still = [document(100, seed) for seed in range(3)], dataclasses.replace(TTT, lr=0.0)
    assert nats(model, documents, still) == pytest.approx(ours(model, documents, still), rel=1e-6)
    assert abs(nats(model, documents)[0] / nats(model, documents, still)[0] - 1) > 1e-4  # and adapting does change it


@pytest.mark.slow
def test_chunk_2_changes_when_a_batch_mate_gets_longer_under_the_stretched_cosine(model):
    def totals(targets: int, schedule) -> list[float]:
        return [nats(model, [document(targets), document(mate, 1)], TTT, schedule)[0] for mate in (48, 160)]

    for schedule, moves in ((constant, False), (stretched_cosine, True)):
        near, far = totals(32, schedule)  # chunks 0 and 1: before any step, and after the first, whose rate is `lr`
        assert near == pytest.approx(far, rel=1e-6)
        near, far = totals(48, schedule)  # and chunk 2
        assert (abs(near - far) > 1e-4 * near) is moves


@pytest.mark.slow
def test_adam_runs_on_for_documents_that_have_ended(model):
    """So that the next pass starts from another adapter; ours does not know the mate."""
    config = dataclasses.replace(TTT, protocol=MULTI_EPOCH, lr_floor=1.0)
    mates = [[document(40)], [document(160, 1), document(40)]]
    alone, beside = (nats(model, documents, config)[-1] for documents in mates)
    assert abs(alone - beside) > 1e-4 * alone
    assert alone == pytest.approx(ours(model, mates[0], config)[0], rel=1e-6)
    alone, beside = (ours(model, documents, config)[-1] for documents in mates)
    assert alone == pytest.approx(beside, rel=1e-6)


@pytest.mark.slow
def test_a_whole_run_keeps_the_order_of_the_documents_and_scores_short_ones_with_the_base_model(model):
    documents = [document(n, seed) for seed, n in enumerate((90, 20, 31, 60, 0, 150, 40, 60))]
    assert list(original_batches(documents, TTT)) == [[2, 6, 3, 7], [0, 5]]
    config = dataclasses.replace(TTT, protocol=MIN_NLL, deadline=1e-9)
    scores = original_ttt(model, documents, config)
    assert [score.kept_pass is None for score in scores] == [len(d.tokens) < 32 for d in documents]
    tokens = torch.from_numpy(documents[1].tokens.astype(np.int64))[None]
    assert scores[1].nats == pytest.approx(model.nll(tokens[:, :-1], tokens[:, 1:]).double().sum().item(), rel=1e-6)
    assert scores[4][:2] == (0.0, None)
    batch = adapt_original_batch(model, [documents[0], documents[5]], config)
    assert [scores[0][:2], scores[5][:2]] == [score[:2] for score in batch]
    assert scores[5].nll.double().sum().item() == pytest.approx(scores[5].nats, rel=1e-6) and len(scores[5].nll) == 150
    last = adapt_original_batch(model, [documents[0], documents[5]], dataclasses.replace(config, protocol=MULTI_EPOCH))
    for best, end in zip(batch, last, strict=True):
        assert best[:2] == end[:2] if best.kept_pass == 1 else best.nats < end.nats


def test_the_ttt_entry_takes_it_as_a_variant():
    entry = with_original(TTT_ENTRIES[0], original.build_original_ttt)
    verdicts = check(entry, entry.toy, CPU, torch.float32)
    assert verdicts["original"].is_green


def test_the_step_gives_the_loss_and_gradient_of_the_eager_variant():
    entry = with_original(STEP[0], original.build_original_step)
    verdicts = check(entry, entry.toy, CPU, torch.float32)
    assert verdicts["original"].is_green


def with_original(entry, build):
    variants = (*(v for v in entry.variants if v.name != "original"), Variant("original", build, captures=False))
    return dataclasses.replace(entry, variants=variants)


def test_with_one_rank_its_optimizers_take_our_step():
    config = dataclasses.replace(TrainConfig(), muon_momentum_start=0.99)
    tokens = torch.randint(3, SMALL.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    first, second = (randomized(dtype=torch.float64) for _ in range(2))  # where Adam makes no step of rounding
    loss_of = original.original_loss(first, 32)
    optimizers = original.OriginalOptimizers(first, config, ranks=1)
    gradients, reference = FlatGradients(second), Optimizers(second, config)
    for _ in range(2):
        original.original_train_step(loss_of, first, optimizers, tokens[:, :-1], tokens[:, 1:])
        gradients.buffer.zero_()
        second.nll(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        gradients.clip_(config.grad_clip)
        reference.step(0, 1.0)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), name


def test_an_eighth_of_the_matrices_is_one_ranks():
    model = randomized()
    counts = [len(original.OriginalOptimizers(model, TrainConfig(), rank=rank).momentum) for rank in range(8)]
    assert sum(counts) == 6 * SMALL.blocks and max(counts) - min(counts) <= 1


def test_bf16_keeps_an_fp32_residual_stream_and_fp32_masters(monkeypatch):
    model = randomized().requires_grad_(False)
    model.configure(CPU, torch.bfloat16)
    kept, block = [], original._block

    def watched(parameters, x, *rest):
        kept.append(x.dtype)
        return block(parameters, x, *rest)

    monkeypatch.setattr(original, "_block", watched)
    documents = [document(40, seed) for seed in range(2)]
    assert nats(model, documents) == pytest.approx(nats(randomized().requires_grad_(False), documents), rel=0.02)
    assert set(kept) == {torch.float32} and model.embed.dtype == torch.float32


def test_what_it_cannot_do_is_refused(model):
    with pytest.raises(ValueError, match="1 step a chunk, not steps_per_chunk=2"):
        adapt_original_batch(model, [document(40)], dataclasses.replace(TTT, steps_per_chunk=2))
    with pytest.raises(ValueError, match="requires_grad_"):
        adapt_original_batch(randomized(), [document(40)], TTT)
