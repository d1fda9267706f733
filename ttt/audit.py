"""Whether a scorer's numbers are a score: anyone's, from its answers alone.

A scorer takes documents, int arrays that begin with BOS, and gives the NLL in nats of every token after BOS. What makes
its sum a score: the distribution at a position depends on the text before it and on the model alone; it sums to one
over the vocabulary, fixed before the target is looked at; a document is scored as if it were alone. The audit changes
what must not matter and looks for a difference, and what must matter and adds up.

    sum over v of exp(-nll of v after the same text) = 1             of a distribution that does not see its target
    P(product over targets of 1 + s (V exp(-nll) - 1) > 1e6) < 1e-6  of uniform random tokens, whatever the scorer does

The second is Ville's inequality: under uniform random targets V q(target) has the mean 1 for every distribution q that
is fixed before its target, so that a bet of a share s on each is a martingale of mean 1, and so is the mean of the bets
of several shares. A model that knows its language loses all of s = 1: random tokens cost it dear. Smaller shares
outlive that, and win where some targets alone cost too little.

Neither asks for exact hidden states. Whatever a pass rounds before its softmax makes another q, which sums to one as
well and is as fixed before its target. What more can be asked of our own models is in :mod:`.model_audit`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import KloraError
from .audit_report import AuditReport, Check
from .results import NLL_ROUNDING

Scorer = Callable[[list[np.ndarray]], Sequence[np.ndarray]]

STAKES = 2.0 ** -np.arange(11)
"""Shares that are bet on random tokens."""

SURE = 1e-6
"""Chance that a fair scorer fails the check of random tokens."""

SUMS = 1e-3
"""How far from 1 probabilities may sum up by rounding: of fp32 NLLs, as many as there are tokens."""

MOST_SWAPPED = 2**18
"""Tokens that the scorer reads for one sum over the vocabulary; where all would be more, some targets are left out."""

MOST_PLACES = 16
"""Targets drawn from all documents for such sums: of a cheat at every third one, one in 650 audits tries none."""

NO_DISTRIBUTION = ": they are no distribution that is fixed before the target is looked at"

ALONE = 4
"""Documents that are scored alone, each in a call of its own."""


class AuditError(KloraError, ValueError):
    """Documents that nothing can be found out with."""


class _NoAnswer(Exception):
    """An answer of a scorer that is not one NLL for each target, and what it is instead."""


def audit(
    scorer: Scorer,
    documents: Sequence[np.ndarray],
    vocab_size: int,
    *,
    tolerance: float = 0.0,
    batch_tolerance: float | None = None,
    positions: int = 4,
    places: Sequence[Sequence[int]] = (),
    most_swapped: int = MOST_SWAPPED,
    seed: int = 0,
) -> AuditReport:
    """Look for what would make a scorer's numbers no score; one line of the report a check, with its evidence.

    scorer: takes a list of int arrays [n], BOS first, and gives a list of arrays or tensors [n - 1]: the NLL in nats of
    tokens 1 to n - 1. It is called some forty times, with up to `most_swapped` tokens at a time.
    documents: such arrays, of which one at least has four tokens. A few of some hundred targets see most; a scorer
    that adapts wants them longer than what it adapts after.
    tolerance: nats by which a target's NLL may differ by rounding; 0: bit for bit.
    batch_tolerance: the same where a document keeps its length: scored again, alone, beside others, before other text.
    Left out, it is `tolerance`; a scorer whose batches change no bit is held to that by 0.
    positions: how many places of each document text is changed after, at how many others the vocabulary is summed up,
    up to MOST_PLACES in all, and how many times as many random tokens are drawn as the documents have.
    places: targets of each document that are tried in any case, the first one being 1: where a scorer's chunks begin
    and end, a fault may be at no other. Of those sums half go to them. Left out: none.
    seed: draws them all.

    AuditError: documents that are no such arrays, or that nothing can be found out with; a tolerance that is below 0
    or not finite. What the scorer raises passes through. The arrays that it is given are int64.

    Example: report = audit(lambda rows: [torch.full((len(row) - 1,), 6.0) for row in rows], [document.tokens], 400)
    """
    within_batch = tolerance if batch_tolerance is None else batch_tolerance
    if not (0 <= tolerance < math.inf and 0 <= within_batch < math.inf):
        raise AuditError(f"tolerance={tolerance}, batch_tolerance={batch_tolerance}; allowed: nats from 0, and finite")
    return _Audit(
        scorer, documents, vocab_size, tolerance, within_batch, positions, places, most_swapped, seed
    ).report()


class _Audit:
    """One audit. `whole` is what the scorer said of all documents together, the first time that it was asked; `noise`
    is by how many nats it has since said something else of a target, and no more than it may.
    """

    def __init__(
        self, scorer, documents, vocab_size, tolerance, batch_tolerance, positions, places, most_swapped, seed
    ):
        self.scorer, self.vocab, self.tolerance, self.batch_tolerance = scorer, vocab_size, tolerance, batch_tolerance
        self.noise = 0.0
        self.most_swapped, self.positions, self.random = most_swapped, positions, np.random.default_rng(seed)
        self.documents = _checked(documents, vocab_size)
        self.places = _places(places, self.documents)
        self.cuts = [(i, cut) for i in range(len(self.documents)) for cut in self._cuts(i)]
        self.whole: list[np.ndarray] = []

    def report(self) -> AuditReport:
        try:
            self.whole = self._scores(self.documents)
        except _NoAnswer as wrong:
            return AuditReport((Check("targets", False, str(wrong)),))
        checks = [self._targets()]
        if checks[0].passed:
            checks += [self._repeated(), self._alone(), self._order(), self._company(), self._later_text()]
            checks += [self._length(), self._last_target(), *self._vocabulary(), self._random_tokens()]
        return AuditReport(tuple(checks))

    def _scores(self, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The scorer's answer to copies of documents, in float64: it may keep or change what it is given.

        _NoAnswer where it is not one number for each target.
        """
        answer = self.scorer([tokens.copy() for tokens in documents])
        if not isinstance(answer, Iterable):
            raise _NoAnswer(f"{type(answer).__name__} for {len(documents)} documents: wanted a list of arrays")
        rows = list(answer)
        if len(rows) != len(documents):
            raise _NoAnswer(f"{len(rows)} arrays for {len(documents)} documents")
        return [_array(nll, len(tokens) - 1) for nll, tokens in zip(rows, documents, strict=True)]

    def _cuts(self, index: int) -> list[int]:
        """How many targets come before a change: few, half, all but one, some at random, and the places to try."""
        last = len(self.documents[index]) - 2
        if last < 1:
            return []
        drawn = self.random.integers(1, last + 1, max(self.positions - 3, 0)).tolist()
        named = {target for i, target in self.places if i == index and target <= last}
        return sorted({1, last, max(last // 2, 1), *drawn} | named)

    def _targets(self) -> Check:
        """Whether the NLL of every token after BOS is one."""
        wrong = next(filter(None, map(_fault, self.whole)), "")
        total = sum(len(tokens) - 1 for tokens in self.documents)
        return Check(
            "targets",
            not wrong,
            wrong or f"one finite NLL for each of {total:,} targets of {len(self.documents)} documents",
        )

    def _same(
        self,
        name: str,
        pairs: Iterator[tuple[str, np.ndarray, np.ndarray]],
        holds: str,
        broken: str,
        other_pass: bool = False,
    ) -> Check:
        """Whether scores (where, expected, found) are the same; `broken` says what it means where they are not.

        `other_pass`: a document of another length, which another pass may score.
        """
        most, where, count, allowed = 0.0, "", 0, self.tolerance if other_pass else self.batch_tolerance
        try:
            pairs = list(pairs)
        except _NoAnswer as wrong:
            return Check(name, False, f"{wrong}; {broken}")
        for place, expected, found in pairs:
            count += len(expected)
            # Not finite on either side is a difference, whatever the other says.
            apart = np.nan_to_num(np.abs(expected - found), nan=math.inf)
            if len(apart) and (worst := float(apart.max())) > most:
                at = int(apart.argmax())
                most, where = worst, f"{place}, target {at + 1}: {found[at]:.6g} nats, {expected[at]:.6g} before"
        if not other_pass:
            self.noise = min(max(self.noise, most), allowed)
        if most > allowed:
            return Check(name, False, f"{where}; {broken}")
        bits = "bit for bit" if most == 0 else f"within {most:.2g} nats (allowed: {allowed:.3g})"
        return Check(name, True, f"{count:,} targets {holds}: {bits}")

    def _against(
        self, documents: Sequence[np.ndarray], of: Sequence[int], says: str, upto: Sequence[int] | None = None
    ):
        """(where, what was said of the whole document `of`, what is said now), of the first `upto` targets."""
        found = self._scores(documents)
        for row, (index, nll) in enumerate(zip(of, found, strict=True)):
            if upto is None:
                yield f"document {index} {says}", self.whole[index], nll
            else:
                size = upto[row]
                yield f"document {index} {says} after target {size}", self.whole[index][:size], nll[:size]

    def _repeated(self) -> Check:
        every = range(len(self.documents))
        return self._same(
            "repeated",
            self._against(self.documents, every, "scored a second time"),
            "scored a second time",
            "something is kept between calls",
        )

    def _alone(self) -> Check:
        def pairs():
            for index in range(min(len(self.documents), ALONE)):
                yield from self._against([self.documents[index]], [index], "scored alone")

        return self._same("alone", pairs(), "scored alone", "scores depend on the documents beside them or before them")

    def _order(self) -> Check:
        order = list(range(len(self.documents)))[::-1]
        return self._same(
            "order",
            self._against([self.documents[index] for index in order], order, "in reverse order"),
            "in reverse order",
            "scores depend on the order of the documents",
        )

    def _company(self) -> Check:
        """The same documents between copies of themselves and random ones."""
        every = list(range(len(self.documents)))
        strangers = [self._random(len(tokens)) for tokens in self.documents]

        def pairs():
            found = self._scores([*strangers, *self.documents, *self.documents])
            for copy in range(2):
                for index in every:
                    nll = found[len(every) * (1 + copy) + index]
                    yield f"document {index}, copy {copy + 1} in one call", self.whole[index], nll

        return self._same(
            "company", pairs(), "twice in a call, behind others", "documents of one call learn from one another"
        )

    def _random(self, tokens: int) -> np.ndarray:
        """BOS and uniform random tokens."""
        drawn = self.random.integers(0, self.vocab, tokens).astype(self.documents[0].dtype)
        drawn[:1] = self.documents[0][0]
        return drawn

    def _tail(self, index: int, cut: int, tokens: int) -> np.ndarray:
        """A document up to its target `cut`, and as many random tokens as make it so long; the first is another one."""
        kept = self.documents[index][: cut + 1]
        tail = self._random(tokens)[cut + 1 :]
        if cut + 1 < len(self.documents[index]) and len(tail) and tail[0] == self.documents[index][cut + 1]:
            tail[0] = (int(tail[0]) + 1) % self.vocab
        return np.concatenate([kept, tail])

    def _later_text(self) -> Check:
        """Random tokens after a target, and the target itself again and again: what a look ahead would expect it by."""
        of, upto = [i for i, _ in self.cuts], [cut for _, cut in self.cuts]

        def pairs():
            tails = [self._tail(i, cut, len(self.documents[i])) for i, cut in self.cuts]
            yield from self._against(tails, of, "with random tokens", upto)
            for tail, cut in zip(tails, upto, strict=True):
                tail[cut + 1 :] = tail[cut]
            yield from self._against(tails, of, "with its target repeated", upto)

        return self._same(
            "later text",
            pairs(),
            "before other text of the same length",
            "a score depends on text after its target",
        )

    def _length(self) -> Check:
        """Cut, the last targets left out, which :meth:`_last_target` looks at; and made longer."""

        def pairs():
            of = [i for i, _ in self.cuts]
            cut = [self.documents[i][: c + 1] for i, c in self.cuts]
            yield from self._against(cut, of, "cut", [c - 1 for _, c in self.cuts])
            every = range(len(self.documents))
            longer = [self._tail(i, len(t) - 1, 2 * len(t) + 1) for i, t in enumerate(self.documents)]
            yield from self._against(longer, every, "made longer", [len(t) - 1 for t in self.documents])

        return self._same(
            "length",
            pairs(),
            "of documents cut or made longer",
            "a score depends on how long its document is",
            other_pass=True,
        )

    def _last_target(self) -> Check:
        def pairs():
            cut = [self.documents[i][: c + 1] for i, c in self.cuts]
            for (i, c), nll in zip(self.cuts, self._scores(cut), strict=True):
                yield f"document {i} cut after target {c}, its last target", self.whole[i][c - 1 : c], nll[c - 1 :]

        return self._same(
            "last target",
            pairs(),
            "as last ones",
            "the last target of a document is not scored like any other",
            other_pass=True,
        )

    def _vocabulary(self) -> Iterator[Check]:
        """The sum of the probabilities of all tokens as the first target of a document that ends there, as the last one
        of as many as can be read for every token, and as one in the middle of the longest, with the text after it."""
        index = int(np.argmax([len(tokens) for tokens in self.documents]))
        tokens = self.documents[index]
        end, middle = min(len(tokens), max(2, self.most_swapped // self.vocab)), max((len(tokens) - 1) // 2, 1)
        for target, size in sorted({(1, 2), (end - 1, end), (middle, len(tokens))}):
            total, of, fits = self._sum(target, tokens[:size], self.most_swapped)
            says = f"the probabilities of {of} sum to {total:.6g} in document {index}"
            yield Check(f"vocabulary at target {target}", fits, says + ("" if fits else NO_DISTRIBUTION))
        yield self._anywhere()

    def _anywhere(self) -> Check:
        """The same at targets drawn from all documents, half of them from the places to try, as last ones, of as many
        tokens as can be afforded.
        """
        most = max(min(self.positions * len(self.documents), MOST_PLACES), 1)
        every = [(i, target) for i, tokens in enumerate(self.documents) for target in range(1, len(tokens))]
        named = self._drawn(self.places, most // 2)
        drawn = named + self._drawn(every, most - len(named))
        share, sums, whole = self.most_swapped // len(drawn), [], 0
        for i, target in drawn:
            total, of, fits = self._sum(target, self.documents[i][: target + 1], share)
            if not fits:
                says = f"the probabilities of {of} sum to {total:.6g} at target {target} of document {i}"
                return Check("vocabulary anywhere", False, says + NO_DISTRIBUTION)
            sums.append(total)
            whole += of.startswith("all")
        where = f"at {len(sums):,} targets drawn by chance, {whole:,} of them over all {self.vocab:,} tokens"
        return Check("vocabulary anywhere", True, f"{where}, probabilities sum to {min(sums):.6g} to {max(sums):.6g}")

    def _drawn(self, targets: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
        """Up to `most` of the targets, by chance."""
        return [targets[place] for place in self.random.permutation(len(targets))[:most]]

    def _sum(self, target: int, tokens: np.ndarray, most: int) -> tuple[float, str, bool]:
        """The sum of probabilities, of which tokens, and whether it can be; for up to `most` tokens that are read.

        All rows have one length, the same text before the target, and are scored in one call. Rounding that they
        share is that of one distribution, which sums to 1 whatever was rounded before its softmax. So the tolerance
        between passes has no say here. What is left is the rounding of the NLLs, SUMS, and what differs from row to
        row: not more than the checks before have seen between calls.
        """
        count = min(self.vocab, max(2, most // len(tokens)))
        swapped = [tokens.copy() for _ in range(count)]
        for one, token in zip(swapped, self._likely(), strict=False):
            one[target] = token
        of = f"{'all' if count == self.vocab else f'{count:,} of'} {self.vocab:,} tokens"
        try:
            found = self._scores(swapped)
        except _NoAnswer as wrong:
            return math.nan, f"{of} ({wrong})", False
        total = float(np.exp(-np.array([nll[target - 1] for nll in found])).sum())
        slack = SUMS + math.expm1(min(self.noise, math.log(self.vocab)))  # by more, nothing would be asked of a sum
        # Of some tokens only, too much is a proof; too little is not.
        return total, of, total <= 1 + slack and (count < self.vocab or total >= 1 - slack)

    def _likely(self) -> np.ndarray:
        """All tokens, those that the documents have most of first: a part of them holds most of the probability."""
        counts = np.bincount(np.concatenate(self.documents).astype(np.int64), minlength=self.vocab)
        return np.lexsort((self.random.random(self.vocab), -counts))

    def _random_tokens(self) -> Check:
        """Ville's inequality holds for any distribution that is fixed before its target, the rounding of all that comes
        before the softmax included. What rounding can add is that probabilities sum up to a little more than 1: by
        SUMS at most, as in the checks of the vocabulary.
        """
        try:
            nll = np.concatenate([nll for _ in range(max(self.positions, 1)) for nll in self._random_scores()])
        except _NoAnswer as wrong:
            return Check("random tokens", False, str(wrong))
        limit, cheaper = math.log(1 / SURE) + math.log1p(SUMS) * len(nll), float((math.log(self.vocab) - nll).sum())
        with np.errstate(divide="ignore", over="ignore"):  # a probability of 0, on which all was bet, and a huge one
            bets = np.log1p(STAKES[:, None] * (self.vocab * np.exp(-nll) - 1)).sum(1)
        won = float(np.logaddexp.reduce(bets)) - math.log(len(STAKES))
        fair = won <= limit
        says = "" if fair else f": by chance once in {1 / SURE:,.0f} at most"
        cost = f"{abs(cheaper):.4g} nats {'less' if cheaper > 0 else 'more'} than ln {self.vocab} each"
        bet = f"a bet on them {'wins' if won > 0 else 'loses'} {abs(won):.4g} nats"
        return Check("random tokens", fair, f"{len(nll):,} uniform random tokens cost, in all, {cost}; {bet}{says}")

    def _random_scores(self) -> list[np.ndarray]:
        """What as many random tokens as the documents have are scored with."""
        return self._scores([self._random(len(tokens)) for tokens in self.documents])


def _array(nll: Any, wanted: int) -> np.ndarray:
    """float64 [wanted], a copy. Of a tensor of PyTorch, be it on a GPU, in bf16 or with a gradient, the values.

    _NoAnswer: no numbers, or other than so many.
    """
    try:
        found = np.array(nll.detach().double().cpu().numpy() if hasattr(nll, "detach") else nll, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise _NoAnswer(f"{type(nll).__name__} for {wanted} targets: {error}") from None
    if found.shape != (wanted,):
        raise _NoAnswer(
            f"{list(found.shape)} NLLs for {wanted} targets: every token after BOS is a target, and BOS is none"
        )
    return found


def _checked(documents: Sequence[np.ndarray], vocab_size: int) -> list[np.ndarray]:
    found = [np.asarray(tokens) for tokens in documents]
    for number, tokens in enumerate(found):
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or not len(tokens):
            raise AuditError(
                f"document {number} is {tokens.dtype} {list(tokens.shape)}; wanted integers [n], BOS and its tokens"
            )
        if not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise AuditError(
                f"document {number} has tokens from {tokens.min()} to {tokens.max()}; allowed: 0 to {vocab_size - 1}"
            )
        found[number] = tokens.astype(np.int64)  # holds every token, those that the documents lack as well
    if not any(len(tokens) > 3 for tokens in found):
        raise AuditError(f"none of {len(found)} documents has four tokens, BOS counted; give longer ones")
    return found


def _places(places: Sequence[Sequence[int]], documents: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """(document, target) of the places to try. AuditError: a list too few or too many, or no target of its document."""
    if not len(places):
        return []
    if len(places) != len(documents):
        raise AuditError(f"places has {len(places)} lists for {len(documents)} documents; give one of each, or none")
    for number, (targets, tokens) in enumerate(zip(places, documents, strict=True)):
        if wrong := [target for target in targets if not 1 <= target < len(tokens)]:
            raise AuditError(
                f"places of document {number} has {wrong[0]}; allowed: its targets, 1 to {len(tokens) - 1}"
            )
    return [(number, int(target)) for number, targets in enumerate(places) for target in sorted({*targets})]


def _fault(nll: np.ndarray) -> str:
    """What is wrong with the NLLs of a document, by their values alone."""
    if not np.isfinite(nll).all():
        return f"an NLL of {nll[~np.isfinite(nll)][0]}"
    if len(nll) and nll.min() < -NLL_ROUNDING:
        return f"an NLL of {nll.min():.6g} nats, below 0: a probability above 1"
    return ""
