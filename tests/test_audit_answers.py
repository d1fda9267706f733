"""What the audit takes: documents, tolerances, and answers of a scorer in any form."""

import numpy as np
import pytest
import torch
from klora.ttt.audit import AuditError, audit
from test_audit import DOCUMENTS, VOCAB, Counts


def test_documents_that_show_nothing_are_refused():
    for documents, says in (
        ([], "none of 0 documents has four tokens"),
        ([np.array([1, 5])], "none of 1 documents has four tokens"),
        ([np.array([1.0, 2.0])], r"document 0 is float64 \[2\]; wanted integers"),
        ([np.zeros((2, 2), int)], r"document 0 is int64 \[2, 2\]; wanted integers"),
        ([np.array([1, 5, 6, 48])], "document 0 has tokens from 1 to 48; allowed: 0 to 47"),
    ):
        with pytest.raises(AuditError, match=says):
            audit(Counts(), documents, VOCAB)


@pytest.mark.parametrize(
    "of", [{"tolerance": -1.0}, {"tolerance": np.nan}, {"tolerance": np.inf}, {"batch_tolerance": np.nan}]
)
def test_a_tolerance_that_would_pass_anything_is_refused(of):
    with pytest.raises(AuditError, match="allowed: nats from 0, and finite"):
        audit(Counts(), DOCUMENTS, VOCAB, **of)


def test_a_tolerance_beyond_any_probability_is_no_overflow():
    """Of two passes that are as far apart: exp of that many nats is no float64."""
    calls = iter(range(10**6))

    def apart(documents):
        nll = 1e3 * next(calls)
        return [np.full(len(tokens) - 1, nll) for tokens in documents]

    assert "within 1e+03 nats" in audit(apart, DOCUMENTS, VOCAB, tolerance=1e9).checks[1].evidence


class Answers(Counts):
    """Honest up to call `honest`; from then on what `change` makes of an honest answer."""

    def __init__(self, honest, change):
        super().__init__()
        self.honest, self.change, self.calls = honest, change, 0

    def __call__(self, documents):
        self.calls += 1
        answer = super().__call__(documents)
        return answer if self.calls <= self.honest else self.change(answer)


ANSWERS = {
    "one too few": lambda answer: answer[1:],
    "one too many": lambda answer: [*answer, answer[0]],
    "none": lambda answer: None,
    "no arrays": lambda answer: [None for _ in answer],
    "no numbers": lambda answer: [object() for _ in answer],
    "words": lambda answer: ["cheap" for _ in answer],
    "a mean": lambda answer: [nll.mean() for nll in answer],
    "columns": lambda answer: [nll[:, None] for nll in answer],
    "a target too few": lambda answer: [nll[1:] for nll in answer],
}


@pytest.mark.parametrize("change", ANSWERS)
def test_an_answer_that_is_not_one_nll_a_target_fails_at_whichever_call(change):
    """It ends no audit, and random tokens whose NLLs are left out are not free."""
    honest = Answers(10**6, None)
    audit(honest, DOCUMENTS, VOCAB)
    for call in range(honest.calls):
        report = audit(Answers(call, ANSWERS[change]), DOCUMENTS, VOCAB)
        assert "random tokens" in report.failed or report.failed == ("targets",), f"after {call} calls:\n{report}"


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16])
def test_tokens_that_the_documents_type_does_not_hold_are_tried_as_themselves(dtype):
    """With 1,024 tokens: of a scorer that knows its language those of a byte would be another text."""
    vocab = 1024
    likely = np.where(np.arange(vocab) < 100, 8.0, 1.0)

    def scorer(rows):
        return [-np.log(likely / likely.sum())[row[1:]] for row in rows]

    report = audit(scorer, [np.arange(1, 90).astype(dtype)], vocab, most_swapped=2**20)
    assert report.passed, str(report)


def test_a_scorer_of_documents_of_several_types_gets_integers():
    seen = []

    def scorer(rows):
        seen.extend(row.dtype for row in rows)
        return Counts()(rows)

    assert audit(scorer, [DOCUMENTS[0].astype(np.uint64), DOCUMENTS[1].astype(np.int64)], VOCAB).passed
    assert set(seen) == {np.dtype(np.int64)}


def test_a_scorer_may_give_tensors():
    """As a model gives them."""

    def rough(documents):
        return [torch.tensor(nll).bfloat16().requires_grad_() for nll in Counts()(documents)]

    report = audit(rough, DOCUMENTS, VOCAB)
    assert report.checks[0].passed and report.checks[1].passed, str(report)


def test_a_scorer_may_answer_in_one_buffer_again_and_again():
    """As a captured graph does."""
    buffer = np.zeros(2**14)

    def reusing(documents):
        found = Counts()(documents)
        ends = np.cumsum([len(nll) for nll in found])
        buffer[: ends[-1]] = np.concatenate(found)
        return np.split(buffer[: ends[-1]], ends[:-1])

    report = audit(reusing, DOCUMENTS, VOCAB)
    assert report.passed, str(report)


def test_what_a_scorer_does_to_its_arrays_changes_nothing():
    def careless(documents):
        found = Counts()(documents)
        for tokens in documents:
            tokens[:] = 0
        return found

    assert audit(careless, DOCUMENTS, VOCAB).passed
