"""The audit: every planted cheat is refused for its reason, the honest scorer passes, and so does what is called valid."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SMALL, randomized
from klora.kernels import BOS
from klora.model.gpt import GPT
from klora.ttt.audit import UNSEEN, AuditError, audit, full_softmax, scorer_of
from klora.ttt.protocols import TTTConfig

VOCAB = 48
TINY = dataclasses.replace(SMALL, vocab_size=260, width=16, blocks=2, heads=2, kv_heads=1, mlp_hidden=24)
STRICT = TTTConfig(layout="start", chunk=8, window=32, lora_rank=2, head_rank=3, lr=0.02, temperature=1.0)
ROUNDING = 1e-4


def document(targets: int, seed: int) -> np.ndarray:
    """Words that come again and again, so that there is something to learn."""
    random = np.random.default_rng(seed)
    words = random.integers(3, VOCAB, (3, 4))
    tokens = np.concatenate([[BOS], words[random.integers(0, 3, targets)].flatten()[:targets]])
    return tokens.astype(np.uint16)


DOCUMENTS = [document(30, 0), document(17, 1), document(8, 2)]


@pytest.fixture(scope="module")
def model() -> GPT:
    return randomized(TINY).requires_grad_(False)


class Counts:
    """An honest scorer that adapts: add-half counts of the document so far. Cheats change one thing of it."""

    def __init__(self):
        self.counts = np.full(VOCAB, 0.5)

    def start(self) -> None:
        self.counts = np.full(VOCAB, 0.5)

    def distribution(self, tokens: np.ndarray, at: int) -> np.ndarray:
        return self.counts / self.counts.sum()

    def update(self, tokens: np.ndarray, at: int) -> None:
        self.counts[tokens[at]] += 1

    def nll(self, tokens: np.ndarray, at: int) -> float:
        return -float(np.log(self.distribution(tokens, at)[tokens[at]]))

    def document(self, tokens: np.ndarray) -> np.ndarray:
        self.start()
        nll = []
        for at in range(1, len(tokens)):
            nll.append(self.nll(tokens, at))
            self.update(tokens, at)
        return np.array(nll)

    def __call__(self, documents: list[np.ndarray]) -> list[np.ndarray]:
        return [self.document(tokens) for tokens in documents]


class Smaller(Counts):
    """loss x 0.9: a temperature on the loss."""

    def nll(self, tokens, at):
        return 0.9 * super().nll(tokens, at)


class Raised(Counts):
    """The target's logit + 5 before the softmax: normalised over the vocabulary, and conditioned on the target."""

    def distribution(self, tokens, at):
        raised = super().distribution(tokens, at).copy()
        raised[tokens[at]] *= np.exp(5)
        return raised / raised.sum()


class Hotter(Counts):
    """A temperature that is chosen for each target by what suits it."""

    def nll(self, tokens, at):
        logits = np.log(self.distribution(tokens, at))
        return min(-(logits / t - np.log(np.exp(logits / t).sum()))[tokens[at]] for t in (0.5, 1.0, 2.0))


class NeverReset(Counts):
    """Adapters that are never reset."""

    def start(self):
        pass


class KeptInACall(Counts):
    """Adapters that are reset for each call, and not for each document."""

    def start(self):
        pass

    def __call__(self, documents):
        Counts.start(self)
        return super().__call__(documents)


class AfterUpdate(Counts):
    """Every target scored after the update that has seen it."""

    def document(self, tokens):
        self.start()
        nll = []
        for at in range(1, len(tokens)):
            self.update(tokens, at)
            nll.append(self.nll(tokens, at))
        return np.array(nll)


class AfterItsChunk(Counts):
    """Every chunk of four scored after the update that has seen it."""

    def document(self, tokens):
        self.start()
        nll = []
        for begin in range(1, len(tokens), 4):
            chunk = range(begin, min(begin + 4, len(tokens)))
            for at in chunk:
                self.update(tokens, at)
            nll += [self.nll(tokens, at) for at in chunk]
        return np.array(nll)


class BestPass(Counts):
    """Two passes, of which each document keeps the better."""

    def document(self, tokens):
        first = super().document(tokens)
        second = np.array([self.nll(tokens, at) for at in range(1, len(tokens))])
        return min(first, second, key=np.sum)


class RateByLength(Counts):
    """A schedule that is stretched over the length of the document."""

    def document(self, tokens):
        self.rate = 1 / len(tokens)
        return super().document(tokens)

    def update(self, tokens, at):
        self.counts[tokens[at]] += self.rate


class LastFree(Counts):
    """The last target of a document costs nothing."""

    def document(self, tokens):
        nll = super().document(tokens)
        nll[-1:] = 0.0
        return nll


class LastDropped(Counts):
    """The last target of a document is left out."""

    def document(self, tokens):
        return super().document(tokens)[:-1]


class WithoutBos(Counts):
    """BOS dropped: the first token is nobody's target."""

    def document(self, tokens):
        return super().document(tokens[1:])


class FirstFree(Counts):
    """BOS dropped, and a zero in the place of the first target."""

    def document(self, tokens):
        return np.concatenate([[0.0], super().document(tokens[1:])])[: len(tokens) - 1]


class TwoBos(Counts):
    """BOS duplicated: it is a target itself, an easy one."""

    def document(self, tokens):
        return super().document(np.concatenate([tokens[:1], tokens]))


class Lookahead(Counts):
    """The distribution reads one token further than the target."""

    def distribution(self, tokens, at):
        raised = super().distribution(tokens, at).copy()
        raised[tokens[min(at + 1, len(tokens) - 1)] if at + 1 < len(tokens) else 0] += 0.3
        return raised / raised.sum()


class Remembers(Counts):
    """A cache of documents that it has scored before, which cost half."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def document(self, tokens):
        known = tokens.tobytes() in self.seen
        self.seen.add(tokens.tobytes())
        return super().document(tokens) * (0.5 if known else 1.0)


class FirstIsDearer(Counts):
    """The first document of a call is scored by another model."""

    def __call__(self, documents):
        first, *rest = super().__call__(documents)
        return [first + 0.1, *rest]


class NotANumber(Counts):
    """A NaN, which a sum over finite values would leave out."""

    def document(self, tokens):
        nll = super().document(tokens)
        nll[1:2] = np.nan
        return nll


class Certain(Counts):
    """A bonus that makes some NLLs negative."""

    def nll(self, tokens, at):
        return super().nll(tokens, at) - 5.0


NOT_NORMALISED = "they are no distribution that is fixed before the target is looked at"

CHEATS = {
    Smaller: ("vocabulary at target 1", NOT_NORMALISED),
    Raised: ("vocabulary at target 1", NOT_NORMALISED),
    Hotter: ("vocabulary at target 30", NOT_NORMALISED),
    NeverReset: ("repeated", "something is kept between calls"),
    KeptInACall: ("alone", "scores depend on the documents beside them or before them"),
    AfterUpdate: ("vocabulary at target 1", NOT_NORMALISED),
    AfterItsChunk: ("later text", "a score depends on text after its target"),
    BestPass: ("later text", "a score depends on text after its target"),
    RateByLength: ("length", "a score depends on how long its document is"),
    LastFree: ("last target", "the last target of a document is not scored like any other"),
    LastDropped: ("targets", "every token after BOS is a target, and BOS is none"),
    WithoutBos: ("targets", "every token after BOS is a target, and BOS is none"),
    FirstFree: ("vocabulary at target 1", NOT_NORMALISED),
    TwoBos: ("targets", "every token after BOS is a target, and BOS is none"),
    Lookahead: ("later text", "a score depends on text after its target"),
    Remembers: ("repeated", "something is kept between calls"),
    FirstIsDearer: ("order", "scores depend on the order of the documents"),
    NotANumber: ("targets", "an NLL of nan"),
    Certain: ("targets", "below 0: a probability above 1"),
}


def test_an_honest_scorer_passes_bit_for_bit():
    report = audit(Counts(), DOCUMENTS, VOCAB)
    assert report.passed, str(report)
    names = [check.name for check in report.checks]
    assert names[:8] == ["targets", "repeated", "alone", "order", "company", "later text", "length", "last target"]
    assert names[8:] == [f"vocabulary at target {n}" for n in (1, 15, 30)] + ["random tokens"]
    assert "bit for bit" in report.checks[1].evidence
    assert str(report).endswith("not seen by any audit: " + "; ".join(UNSEEN))
    assert report.to_json()["passed"] is True and len(report.to_json()["checks"]) == len(names)


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_planted_cheat_is_refused_for_its_reason(cheat):
    report, (name, reason) = audit(cheat(), DOCUMENTS, VOCAB), CHEATS[cheat]
    assert not report.passed and name in report.failed, str(report)
    (evidence,) = (check.evidence for check in report.checks if check.name == name)
    assert reason in evidence and f"FAIL  {name}: " in str(report)


def test_random_tokens_alone_show_a_scorer_that_is_not_normalised():
    """With a vocabulary of which most is left out of the sum, and of which nothing likely was tried."""

    def cheap(documents):
        return [np.full(len(tokens) - 1, 0.9 * np.log(50_000)) for tokens in documents]

    report = audit(cheap, [document(200, 0)], 50_000, most_swapped=1000)
    assert report.failed == ("random tokens",) and "by chance once in 1,000,000 at most" in str(report)
    assert "of 50,000 tokens sum to" in report.checks[-2].evidence


def test_a_tolerance_is_stated_and_covers_no_more_than_itself():
    random = np.random.default_rng(0)

    def noisy(documents):
        return [nll + random.uniform(0, 1e-5, len(nll)) for nll in Counts()(documents)]

    assert "repeated" in audit(noisy, DOCUMENTS, VOCAB).failed
    report = audit(noisy, DOCUMENTS, VOCAB, tolerance=2e-5)
    assert report.passed and "(allowed: 2e-05)" in report.checks[1].evidence
    assert not audit(noisy, DOCUMENTS, VOCAB, tolerance=1e-7).passed


def test_documents_that_show_nothing_are_refused():
    for given, says in (
        ([], "none of 0 documents has four tokens"),
        ([np.array([1, 5])], "none of 1 documents has four tokens"),
        ([np.array([1.0, 2.0])], r"document 0 is float64 \[2\]; wanted integers"),
        ([np.zeros((2, 2), int)], r"document 0 is int64 \[2, 2\]; wanted integers"),
        ([np.array([1, 5, 6, 48])], "document 0 has tokens from 1 to 48; allowed: 0 to 47"),
    ):
        with pytest.raises(AuditError, match=says):
            audit(Counts(), given, VOCAB)


def test_what_a_scorer_does_to_its_arrays_changes_nothing():
    def careless(documents):
        found = Counts()(documents)
        for tokens in documents:
            tokens[:] = 0
        return found

    assert audit(careless, DOCUMENTS, VOCAB).passed


@pytest.mark.slow
@pytest.mark.parametrize("context", ["recomputed", "cached"])
def test_score_first_passes(model, context):
    config = STRICT.override({"context": context})
    report = audit(scorer_of(model, config), DOCUMENTS, TINY.vocab_size, tolerance=ROUNDING)
    assert report.passed, str(report)
    check = full_softmax(model, config, DOCUMENTS[0], ROUNDING)
    assert check.passed and f"{'adapted' if context == 'recomputed' else 'base'} model" in check.evidence


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["multi_epoch", "min_nll"])
def test_the_leaky_protocols_fail_for_their_reason(model, protocol):
    config = TTTConfig(
        chunk=8, window=32, min_tokens=16, lora_rank=2, head_rank=3, lr=0.02, protocol=protocol, epochs=3
    )
    report = audit(scorer_of(model, config), DOCUMENTS, TINY.vocab_size, tolerance=ROUNDING)
    assert {"later text", "length", "vocabulary at target 15"} <= set(report.failed), str(report)
    assert "a score depends on text after its target" in str(report)


@pytest.mark.slow
def test_the_layout_original_fails_where_documents_are_cut(model):
    """It is not leaky, and no later text of the same length matters; and it is not called valid."""
    config = TTTConfig(chunk=8, window=32, min_tokens=16, lora_rank=2, head_rank=3, lr=0.02)
    report = audit(scorer_of(model, config), DOCUMENTS, TINY.vocab_size, tolerance=ROUNDING)
    assert "length" in report.failed and "later text" not in report.failed, str(report)
    assert not config.is_causal and not config.is_leaky


@torch.no_grad()
def test_the_full_softmax_shows_an_nll_that_is_not_of_it(model, monkeypatch):
    for tokens, which in ((DOCUMENTS[0], "adapted"), (DOCUMENTS[2], "base")):
        check = full_softmax(model, STRICT.override({"lr": 0.05}), tokens, ROUNDING)
        assert check.passed and check.evidence.startswith(f"{which} model") and "all 260 logits" in check.evidence
    for name in ("klora.ttt.step.head_nll", "klora.ttt.base.softcap_nll"):
        monkeypatch.setattr(name, smaller(name))
    for tokens in (DOCUMENTS[0], DOCUMENTS[2]):
        check = full_softmax(model, STRICT, tokens, ROUNDING)
        assert not check.passed and "differ from the recorded" in check.evidence


def smaller(name: str):
    """The op of that name with its NLL times 0.9."""
    module, op = name.rsplit(".", 1)
    honest = getattr(__import__(module, fromlist=[op]), op)
    return lambda *arguments, **options: 0.9 * honest(*arguments, **options)
