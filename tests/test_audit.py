"""The audit of anyone's scorer: every planted cheat is refused for its reason, and honest ones pass."""

import re

import numpy as np
import pytest
from klora.kernels import BOS_ID
from klora.ttt.audit import AuditError, audit
from klora.ttt.audit_report import UNSEEN
from klora.ttt.results import NLL_ROUNDING

VOCAB = 48


def document(targets: int, seed: int) -> np.ndarray:
    """Words that come again and again, so that there is something to learn."""
    random = np.random.default_rng(seed)
    words = random.integers(3, VOCAB, (3, 4))
    tokens = np.concatenate([[BOS_ID], words[random.integers(0, 3, targets)].flatten()[:targets]])
    return tokens.astype(np.uint16)


DOCUMENTS = [document(30, 0), document(17, 1), document(8, 2)]


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

    more = 5.0

    def distribution(self, tokens, at):
        raised = super().distribution(tokens, at).copy()
        raised[tokens[at]] *= np.exp(self.more)
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


class Bonus(Counts):
    """Every probability times e^0.2, not normalised: less than a tolerance for rounding in bf16."""

    def nll(self, tokens, at):
        return super().nll(tokens, at) - 0.2


class RaisedALittle(Raised):
    """By 0.2 alone."""

    more = 0.2


class Noisy(Counts):
    """Honest, but that no two passes round alike."""

    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(0)

    def nll(self, tokens, at):
        return super().nll(tokens, at) + self.random.uniform(-0.05, 0.05)


class NoisyBonus(Noisy, Bonus):
    """Every probability times e^0.2, behind the noise."""


class Fluent(Counts):
    """An honest scorer that knows its language: random tokens cost it far more than ln V, whatever some of them save.

    A cheat of it does what it does at every third target alone.
    """

    FOLLOWS = np.exp(3.5 * np.random.default_rng(5).standard_normal((VOCAB, VOCAB)))
    FOLLOWS /= FOLLOWS.sum(1, keepdims=True)

    def distribution(self, tokens, at):
        return 0.98 * self.FOLLOWS[tokens[at - 1]] + 0.02 * super().distribution(tokens, at)


class RaisedAtSome(Fluent):
    """The target's logit + 5."""

    def distribution(self, tokens, at):
        raised = super().distribution(tokens, at).copy()
        raised[tokens[at]] *= np.exp(5.0 * (at % 3 == 0))
        return raised / raised.sum()


class SmallerAtSome(Fluent):
    """loss x 0.9."""

    def nll(self, tokens, at):
        return super().nll(tokens, at) * (0.9 if at % 3 == 0 else 1.0)


class HotterAtSome(Fluent):
    """A temperature that is chosen by what suits the target."""

    def nll(self, tokens, at):
        return Hotter.nll(self, tokens, at) if at % 3 == 0 else super().nll(tokens, at)


def fluent_document(targets: int, seed: int) -> np.ndarray:
    """Text of that language."""
    random, tokens = np.random.default_rng(seed), [BOS_ID]
    while len(tokens) <= targets:
        tokens.append(random.choice(VOCAB, p=Fluent.FOLLOWS[tokens[-1]]))
    return np.array(tokens, dtype=np.uint16)


FLUENT = [fluent_document(100, 0), fluent_document(61, 1), fluent_document(40, 2)]


class ScoredAgain(Counts):
    """The last target of each chunk of 40 is scored a second time, with the next chunk, after what has seen it."""

    def document(self, tokens):
        nll = super().document(tokens)
        self.start()
        for at in range(1, len(tokens)):
            self.update(tokens, at)
            if at % 40 == 0 and at + 1 < len(tokens):
                nll[at - 1] = self.nll(tokens, at)
        return nll


class RaisedAtBorders(Raised):
    """The target's logit + 5 at the first target of each chunk of 40."""

    def distribution(self, tokens, at):
        self.more = 5.0 * (at % 40 == 1 and at > 1)
        return super().distribution(tokens, at)


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
    assert names[8:] == [f"vocabulary at target {n}" for n in (1, 15, 30)] + ["vocabulary anywhere", "random tokens"]
    assert "at 12 targets drawn by chance, 12 of them over all 48 tokens, prob" in report.checks[-2].evidence
    assert "bit for bit" in report.checks[1].evidence
    assert str(report).endswith("not seen here: " + "; ".join(UNSEEN))
    assert report.to_json()["passed"] is True and len(report.to_json()["checks"]) == len(names)


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_planted_cheat_is_refused_for_its_reason(cheat):
    report, (name, reason) = audit(cheat(), DOCUMENTS, VOCAB), CHEATS[cheat]
    assert not report.passed and name in report.failed, str(report)
    (evidence,) = (check.evidence for check in report.checks if check.name == name)
    assert reason in evidence and f"FAIL  {name}: " in str(report)


@pytest.mark.parametrize("seed", range(3))
def test_an_honest_scorer_that_knows_its_language_passes(seed):
    report = audit(Fluent(), FLUENT, VOCAB, seed=seed)
    assert report.passed, str(report)
    assert report.checks[-1].evidence.startswith("804 uniform random tokens cost, in all, ")
    assert "nats more than ln 48 each; a bet on them loses" in report.checks[-1].evidence


@pytest.mark.parametrize("cheat", [RaisedAtSome, SmallerAtSome, HotterAtSome])
def test_a_cheat_at_some_targets_is_refused_where_random_tokens_cost_dear(cheat):
    """Those that are always tried, target 1 and two more, are none of them."""
    report = audit(cheat(), FLUENT, VOCAB)
    assert "vocabulary anywhere" in report.failed and NOT_NORMALISED in str(report), str(report)
    (evidence,) = (check.evidence for check in report.checks if check.name == "vocabulary anywhere")
    assert int(re.search(r"at target (\d+) of document", evidence)[1]) % 3 == 0


@pytest.mark.parametrize("cheat, failed", [(ScoredAgain, "last target"), (RaisedAtBorders, "vocabulary anywhere")])
def test_a_cheat_at_the_borders_of_chunks_is_refused_where_they_are_named(cheat, failed):
    """Two targets in a hundred: chance tries neither."""
    documents = [document(100, 0), document(17, 1)]
    assert audit(cheat(), documents, VOCAB).passed
    for seed in range(4):
        report = audit(cheat(), documents, VOCAB, places=[[40, 41], []], seed=seed)
        assert failed in report.failed, str(report)
    assert audit(Counts(), documents, VOCAB, places=[[40, 41], [17]]).passed


@pytest.mark.parametrize(
    "places, says",
    [([[1]], "places has 1 lists for 2 documents"),
     ([[1], [0]], "places of document 1 has 0; allowed: its targets, 1 to 17"),
     ([[101], []], "places of document 0 has 101; allowed: its targets, 1 to 100")],
)  # fmt: skip
def test_places_that_are_no_targets_are_refused(places, says):
    with pytest.raises(AuditError, match=re.escape(says)):
        audit(Counts(), [document(100, 0), document(17, 1)], VOCAB, places=places)


def test_a_bet_of_a_share_wins_where_all_would_be_lost():
    """Of random tokens that cost more than ln V each, though some of them cost too little."""
    report = audit(RaisedAtSome(), FLUENT, VOCAB, most_swapped=VOCAB)
    evidence = report.checks[-1].evidence
    assert "random tokens" in report.failed and "nats more than ln 48 each; a bet on them wins" in evidence


def test_random_tokens_alone_show_a_scorer_that_is_not_normalised():
    """With a vocabulary of which most is left out of the sum, and of which nothing likely was tried."""

    def cheap(documents):
        return [np.full(len(tokens) - 1, 0.9 * np.log(50_000)) for tokens in documents]

    report = audit(cheap, [document(200, 0)], 50_000, most_swapped=1000)
    assert report.failed == ("random tokens",) and "by chance once in 1,000,000 at most" in str(report)
    assert "of 50,000 tokens sum to" in report.checks[-3].evidence
    assert "at 4 targets drawn by chance, 0 of them over all 50,000 tokens, prob" in report.checks[-2].evidence


def test_a_tolerance_is_stated_and_covers_no_more_than_itself():
    random = np.random.default_rng(0)

    def noisy(documents):
        return [nll + random.uniform(0, 1e-5, len(nll)) for nll in Counts()(documents)]

    assert "repeated" in audit(noisy, DOCUMENTS, VOCAB).failed
    report = audit(noisy, DOCUMENTS, VOCAB, tolerance=2e-5)
    assert report.passed and "(allowed: 2e-05)" in report.checks[1].evidence
    assert not audit(noisy, DOCUMENTS, VOCAB, tolerance=1e-7).passed


@pytest.mark.parametrize("tolerance", [0.1, 0.3])
@pytest.mark.parametrize("cheat", [Bonus, RaisedALittle, NoisyBonus])
def test_a_tolerance_of_the_size_of_bf16_hides_no_small_cheat(cheat, tolerance):
    report = audit(cheat(), DOCUMENTS, VOCAB, tolerance=tolerance)
    assert "vocabulary at target 1" in report.failed and NOT_NORMALISED in str(report), str(report)


@pytest.mark.parametrize("seed", range(3))
def test_an_honest_scorer_whose_passes_round_apart_passes(seed):
    report = audit(Noisy(), DOCUMENTS, VOCAB, tolerance=0.1, seed=seed)
    assert report.passed and "within 0.0" in report.checks[1].evidence, str(report)


def test_no_tolerance_makes_random_tokens_cheap():
    """The rounding of hidden states leaves a distribution one: what is allowed is what a sum may be off."""

    def bonus(of):
        return lambda documents: [np.full(len(tokens) - 1, np.log(50_000) - of) for tokens in documents]

    for of, targets, failed in ((0.05, 600, ("random tokens",)), (0.0009, 20_000, ())):
        report = audit(bonus(of), [document(targets, 0)], 50_000, tolerance=0.3, most_swapped=1000)
        assert report.failed == failed, str(report)


def test_what_keeps_its_length_can_be_held_to_its_bits():
    """With a tolerance for documents that are cut or made longer, which another pass may score."""

    class OtherPass(Counts):
        def document(self, tokens):
            return super().document(tokens) + (0.05 if len(tokens) % 2 else 0.0)

    report = audit(OtherPass(), DOCUMENTS, VOCAB, tolerance=0.06, batch_tolerance=0.0)
    bits = {check.name: "bit for bit" in check.evidence for check in report.checks}
    assert all(bits[name] for name in ("repeated", "alone", "order", "company", "later text"))
    assert "length" not in report.failed and not bits["length"] and "allowed: 0.06" in str(report)
    report = audit(FirstIsDearer(), DOCUMENTS, VOCAB, tolerance=0.3, batch_tolerance=0.0)
    assert {"alone", "order", "company"} <= set(report.failed)


def test_a_rounding_below_zero_is_no_fault_and_more_is_one():
    """Of a language in which the next token is certain."""

    def certain(below):
        def one(tokens):
            follows = tokens[1:] == (tokens[:-1].astype(int) + 1) % VOCAB
            return np.where(follows, -below, 60.0)

        return lambda documents: [one(tokens) for tokens in documents]

    documents = [np.arange(1, 40, dtype=np.uint16), np.arange(1, 3, dtype=np.uint16)]
    report = audit(certain(0.9 * NLL_ROUNDING), documents, VOCAB)
    assert report.passed, str(report)
    report = audit(certain(1.1 * NLL_ROUNDING), documents, VOCAB)
    assert report.failed == ("targets",) and "below 0: a probability above 1" in str(report)
