"""A score that a third party can recompute: what is stored of it, and the comparison with what is computed anew.

`score.json` names the artifact by the hashes of its header and payload, every document by the hash of its text, and the
options, versions, device, threads and scorer. A file of NLLs beside it has what each target cost.
"""

import hashlib
import json
import math
import random
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import KloraError
from ..model.gpt import GPT
from ..model.reading import is_count, open_regular, parse_json, read_bytes
from ..model.storage import write_bytes
from .audit_report import AuditReport, Check, sums
from .documents import Document, digest_of
from .hf_model import HfModel
from .pipeline import ScoreRequest, score
from .protocols import TTTConfig
from .results import DIVERGED, NOT_ADAPTED, PARTIAL, DocumentResult, ScoreResult
from .sampling import is_for_tuning, sample
from .sweep import best_of, facts_of_halves, note_on

NLL_FORMAT = "klora-nll-1"

RELATIVE = 1e-3
"""Share of a document's nats, of one at least, by which they may differ where versions, device, processor,
threads or scorer do."""

SETTING = "versions", "device", "processor", "threads", "scorer"
"""The facts of a result under which the same document has the same bits."""

NATS = "base_nats", "tempered_nats", "adapted_nats"
STATE = "status", "adapted_tokens", "group"
"""What is compared of a document that is scored again: within the rounding, and what no rounding changes."""

OF_HF = "class", "parameters", "dtype", "vocabulary", "adapted", "begins_with"
"""What a result says of a model of transformers that is the same on every machine."""

LABELS = "protocol", "protocol_label", "label", "warning", "depends_on_earlier_documents"
"""What a result says of itself beside its numbers."""

SHOWN = 3
"""Wrong values that a check names."""


class VerifyError(KloraError, ValueError):
    """A file that is no result of this library, or that does not belong to the others."""


class Stored:
    """A score.json that was read. VerifyError: a file that is none, or one of an earlier version without hashes.

    `again` is what a result of these documents and this config says, but for what only the run can know.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.values: dict[str, Any] = parse_json(read_bytes(self.path))
            self.config = TTTConfig.from_dict(self.values["config"])
            self.documents: list[dict[str, Any]] = self.values["documents"]
            artifact = self.values["artifact"]
            self.hashes = {name: artifact[name] for name in ("header_sha256", "payload_sha256")}
            self.weights, self.totals, self.source = (self.values[name] for name in ("weights", "totals", "source"))
            if not all(isinstance(document["sha256"], str) for document in self.documents):
                raise TypeError("a document without a hash")
            derived = {"sha256", "base_bpb", "adapted_bpb"}
            results = [
                DocumentResult.from_json({name: value for name, value in document.items() if name not in derived})
                for document in self.documents
            ]
            self.again = ScoreResult(results, self.config, {}).to_json()
            same = isinstance(self.totals, dict) and isinstance(self.source, dict) and isinstance(self.weights, str)
            if not same or not all(is_count(self.source[name]) for name in ("documents", "tokens", "most_tokens")):
                raise TypeError("fields of other types")
        except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            says = f"no field {error}" if isinstance(error, KeyError) else error
            raise VerifyError(f"{path} is no score.json of this klora that could be recomputed: {says}") from None


def write_nll(path: str | Path, result: ScoreResult) -> None:
    """Write what each target cost: tensors `nll` fp32 [targets], document after document, and `offsets` int64
    [documents + 1], in safetensors format, with the documents' hashes as metadata.

    ValueError: a result that has not kept them.
    """
    if result.nll is None:
        raise ValueError("the result has no NLL of every target; score with keeps_nll=True")
    offsets = np.concatenate([[0], np.cumsum([len(nll) for nll in result.nll])]).astype(np.int64)
    nll = np.concatenate([*result.nll, np.zeros(0, np.float32)]).astype(result.nll[0].dtype if result.nll else "f4")
    metadata = {"format": NLL_FORMAT, "sha256": json.dumps(list(result.sha256))}
    write_bytes(Path(path), safetensors.numpy.save({"nll": nll, "offsets": offsets}, metadata))


def is_nll(path: str | Path) -> bool:
    """Whether a file says that :func:`write_nll` wrote it."""
    try:
        open_regular(Path(path)).close()
        with safetensors.safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format") == NLL_FORMAT
    except (OSError, safetensors.SafetensorError):
        return False


def read_nll(path: str | Path, stored: Stored) -> list[np.ndarray]:
    """The NLL of each target of the documents of a stored score. VerifyError: no such file, or another result's."""
    try:
        open_regular(Path(path)).close()
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != NLL_FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r:.60}")
            hashes, nll, offsets = parse_json(metadata["sha256"]), file.get_tensor("nll"), file.get_tensor("offsets")
        fits = offsets.shape == (len(hashes) + 1,) and nll.ndim == 1 and nll.dtype in (np.float32, np.float64)
        fits = fits and offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(nll)
        if not fits or (np.diff(offsets) < 0).any():
            raise ValueError("its tensors do not fit together")
        if not np.isfinite(nll).all():
            raise ValueError("an NLL is no finite number")
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,  # a dtype that NumPy has not
        safetensors.SafetensorError,
    ) as error:
        raise VerifyError(f"{path} is no file of NLLs that `klora score --nll` wrote: {error}") from None
    sizes = [(digest, int(size)) for digest, size in zip(hashes, np.diff(offsets), strict=True)]
    if sizes != [(document["sha256"], document["tokens"]) for document in stored.documents]:
        raise VerifyError(f"{path} holds the NLLs of other documents than {stored.path}; give the file of that run")
    return np.split(nll, offsets[1:-1])


def which_nll(path: str | Path, stored: Stored) -> Check:
    """Whether a file of NLLs is the one that the result names, byte for byte."""
    named = stored.values.get("nll")
    wanted = named.get("sha256") if isinstance(named, dict) else None
    with open_regular(Path(path)) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted is None:
        return Check("nll file", True, "the result names none, and this one fits it")
    says = "has the hash" if found == wanted else f"has the hash {found}, and not that"
    return Check("nll file", found == wanted, f"{says} that the result names")


def model_of_hf(stored: Stored, found: Mapping[str, Any]) -> Check:
    """Whether a result says of its model of transformers what `facts_of_model` found of it."""
    said = stored.values.get("hf")
    wanted = {name: found[name] for name in OF_HF}
    pairs = [("", said if isinstance(said, dict) else {}, wanted), ("", stored.values, {"weights": found["dtype"]})]
    wrong = _differing(pairs)
    return Check("model", not wrong, wrong or f"{found['class']} of {found['parameters']:,} parameters")


def verify(
    stored: Stored,
    model: GPT | HfModel,
    documents: Sequence[Document],
    setting: Mapping[str, Any],
    *,
    share: float = 0.05,
    seed: int | None = None,
    rounding: float = RELATIVE,
    nll: Sequence[np.ndarray] | None = None,
    of_bytes: Mapping[str, Any] = MappingProxyType({}),
) -> AuditReport:
    """Recompute a random share of the documents of a stored score and compare; one check a line.

    documents: all that the source has, whether or not they were sampled. setting: `versions`, `device` and `processor`
    here. nll: as :func:`read_nll` gives it. rounding: the share of a document's nats, of one at least, by which they
    may differ where the setting does; where it does not they must be the same to the bit. seed: draws the documents;
    None: by chance, which whoever made a result cannot have known. of_bytes: what the result has to say of its bytes,
    as `facts_of_tokens` gives it of the documents that :func:`scored_of` the source; left out: nothing.
    """
    checks, seed = stated(stored, documents, nll, of_bytes), secrets.randbits(32) if seed is None else seed
    by_hash = {document.sha256: document for document in documents}
    # Whatever else is said of a document, it is no reason not to recompute it.
    late = [one["status"] in (PARTIAL, NOT_ADAPTED) for one in stored.documents]
    known = [index for index, one in enumerate(stored.documents) if one["sha256"] in by_hash]
    in_time = [index for index in known if not late[index]]
    indices = in_time
    if not stored.config.phases and indices:
        indices = random.Random(seed).sample(indices, min(len(indices), max(1, math.ceil(share * len(indices)))))
    if not indices:
        return AuditReport((*checks, Check("recomputed", False, "no document of the result can be recomputed")))
    config, again = stored.config.override({"deadline": 0.0}), [stored.documents[index] for index in indices]
    # With phases groups are cut of all documents, and learned from: of those, too, whose scores are not compared.
    among = known if stored.config.phases else indices
    asked = [stored.documents[index] for index in among]
    chosen = [replace(by_hash[one["sha256"]], name=one["name"]) for one in asked]
    scorer = stored.values.get("scorer") if setting["device"] == stored.values.get("device") else "auto"
    found = score(ScoreRequest(model, chosen, config, scorer=scorer or "auto", keeps_nll=True))
    rows = [among.index(index) for index in indices]
    found = replace(found, documents=[found.documents[row] for row in rows], nll=[found.nll[row] for row in rows])
    here = dict(setting) | {name: found.facts[name] for name in ("threads", "scorer")}
    differs = [name for name in SETTING if stored.values.get(name) != here.get(name)]
    allowed = rounding if differs else 0.0
    checks.append(_recomputed(again, found, allowed, differs))
    if nll is not None:
        checks.append(_targets(again, found, [nll[index] for index in indices], allowed))
    rest = len(in_time) - len(again)
    others = f"{rest:,} documents that were not recomputed (--seed {seed} draws the same); --share 1 recomputes all"
    unseen = [others] if rest else []
    unseen += [f"{sum(late):,} documents of which a deadline left text to the base model"] if any(late) else []
    unseen += ["the names, by whose hashes phases group the documents"] if stored.config.phases else []
    unseen += ["what a sweep measured of the constants that it tried"] if "sweep" in stored.values else []
    unseen += ["what the model was trained on", "bits per byte before quantisation, which want the run"]
    return AuditReport(tuple(checks), tuple(unseen))


def stated(
    stored: Stored,
    documents: Sequence[Document],
    nll: Sequence[np.ndarray] | None = None,
    of_bytes: Mapping[str, Any] = MappingProxyType({}),
) -> list[Check]:
    """Whether what a result says fits together and is of the documents of its source: nothing is recomputed."""
    checks = [_source(stored, documents), _which(stored, documents), _totals(stored), _valid(stored)]
    checks += [_labels(stored, of_bytes)]
    checks += [_swept(stored, documents)] if "sweep" in stored.values else []
    said = ((document["name"], document["adapted_nats"]) for document in stored.documents)
    return checks if nll is None else [*checks, sums(said, nll)]


def _source(stored: Stored, documents: Sequence[Document]) -> Check:
    """Whether the source holds what the result says that it does."""
    here = {"documents": len(documents), "tokens": sum(document.targets for document in documents)}
    here |= {"sha256": digest_of(documents)}
    wrong = _differing([("", stored.source, here)])
    return Check(
        "source", not wrong, wrong or f"{here['documents']:,} documents, {here['tokens']:,} tokens, their hash"
    )


def scored_of(stored: Stored, documents: Sequence[Document]) -> Sequence[Document]:
    """Those of a source's documents that the run was given: all, or its sample; a sweep chose of these."""
    most = stored.source["most_tokens"]
    return sample(documents, most) if most else documents


def _which(stored: Stored, documents: Sequence[Document]) -> Check:
    """Whether the documents are those of the source: all of them, its sample, or what a sweep left."""
    most, tuned = stored.source["most_tokens"], "sweep" in stored.values
    wanted = [one for one in scored_of(stored, documents) if not (tuned and is_for_tuning(one))]
    here, there = (sorted(hashes) for hashes in ([d.sha256 for d in wanted], [d["sha256"] for d in stored.documents]))
    sizes = {document.sha256: (document.targets, document.bytes) for document in wanted}
    off = [d for d in stored.documents if sizes.get(d["sha256"]) != (d["tokens"], d["bytes"])]
    of = f"a sample of {most:,} tokens" if most else "all documents"
    of += " but those that a sweep chose its constants on" if tuned else ""
    if here == there and not off:
        return Check("documents", True, f"{len(there):,} documents by their hashes, tokens and bytes: {of}")
    lost, extra = (Counter(here) - Counter(there)).total(), (Counter(there) - Counter(here)).total()
    what = f"{lost:,} are missing in the result and {extra:,} are not in the source"
    if off and not (lost or extra):
        what = f"{off[0]['name']!r} has other tokens or bytes than the result says"
    return Check("documents", False, f"the result is not of {of}: {what}")


def _totals(stored: Stored) -> Check:
    """Whether the totals and each document's bits per byte are what the documents' nats make."""
    pairs = [("", stored.totals, stored.again["totals"])]
    each = zip(stored.documents, stored.again["documents"], strict=True)
    pairs += [(f" of {old['name']!r:.60}", old, new) for old, new in each]
    more = sorted(stored.totals.keys() - stored.again["totals"].keys())  # of documents they are no score.json
    unknown = f"no result has a total {', '.join(map(repr, more[:SHOWN]))}" if more else ""
    wrong = "; ".join(filter(None, [_differing(pairs), unknown]))
    adapted = stored.again["totals"]["adapted_bpb"]
    return Check("totals", not wrong, wrong or f"adapted_bpb {adapted} is that of the documents")


def _differing(pairs: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """What `said` says otherwise than `value`s are, of (of what, said, values)."""
    wrong = [
        f"{name}{of} is {said.get(name)!r:.40}, not {value!r:.100}"
        for of, said, values in pairs
        for name, value in values.items()
        if said.get(name) != value
    ]
    more = f"; and {len(wrong) - SHOWN:,} more" if wrong[SHOWN:] else ""
    return "; ".join(wrong[:SHOWN]) + more


def _valid(stored: Stored) -> Check:
    """Whether the result calls itself valid where, and only where, it is, and says why not."""
    (valid, why), (says, reasons) = (
        (of.get("valid_score"), of.get("why_not_valid", [])) for of in (stored.again, stored.values)
    )
    evidence = f"valid_score is {says} under {stored.config.protocol}, layout={stored.config.layout}"
    if says is valid:
        return Check("valid_score", reasons == why, evidence + ("" if reasons == why else "; why_not_valid is another"))
    return Check("valid_score", False, f"{evidence}, and should be {valid}")


def _labels(stored: Stored, of_bytes: Mapping[str, Any]) -> Check:
    """Whether the result is labelled as its config and its documents want it, with the notes that belong beside it."""
    facts = dict(of_bytes)
    wanted = [*facts.pop("notes", []), *stored.again.get("notes", [])]
    wrong = _differing([("", stored.values, {name: stored.again.get(name) for name in LABELS} | facts)])
    notes = stored.values.get("notes", [])
    missing = [note for note in wanted if not isinstance(notes, list) or note not in notes]
    wrong = "; ".join(filter(None, [wrong, *(f"the note {note!r:.80} is missing" for note in missing)]))
    return Check("labels", not wrong, wrong or f"{stored.again['protocol_label']}, as its config says")


def _swept(stored: Stored, documents: Sequence[Document]) -> Check:
    """Whether a sweep's record is of the source's halves, its choice the best that it tried, and both are said."""
    said, halves = stored.values["sweep"], ([], [])
    for document in scored_of(stored, documents):
        halves[not is_for_tuning(document)].append(document)
    facts, notes = facts_of_halves(*halves), stored.values.get("notes", [])
    try:
        best = best_of(said["tried"])
        note = note_on(facts, best)
        wrong = _differing([("", said, facts | {"chosen": best}), (" of the config", stored.config.to_dict(), best)])
    except (KeyError, TypeError, ValueError, AttributeError):
        return Check("sweep", False, "it is no record of what a sweep tried and chose")
    missing = "" if isinstance(notes, list) and note in notes else f"the note {note!r:.80} is missing"
    wrong = "; ".join(filter(None, [wrong, missing]))
    return Check("sweep", not wrong, wrong or "its choice is the best that it says it tried, and the note says so")


def _recomputed(again: Sequence[Mapping[str, Any]], found: ScoreResult, allowed: float, differs: list[str]) -> Check:
    worst, where = 0.0, ""
    for old, new in zip(again, found.documents, strict=True):
        for name in NATS:
            a, b = old[name], getattr(new, name)
            # Of a document of certain targets the nats are rounding alone, of which a share says nothing.
            apart = abs(a - b) / max(abs(b), 1.0)
            if apart > worst:
                worst, where = apart, f"{name} of {old['name']!r} is {a}, and {b} when it is computed anew"
    if worst <= allowed:
        names = STATE if differs else (*STATE, "kept_pass")
        # Rounding has a say in where a document diverges, and in which of its passes is the best.
        where = _differing(
            (f" of {old['name']!r:.60}", old, {name: getattr(new, name) for name in names})
            for old, new in zip(again, found.documents, strict=True)
            if not (differs and DIVERGED in (old["status"], new.status))
        )
        worst = math.inf if where else worst
    how = "to the bit" if not differs else f"within a share of {allowed:g}, as {', '.join(differs)} differ"
    if worst <= allowed:
        # Rounding has no direction: what all documents have lost is not it, though it is less than each may be off.
        said, here = math.fsum(old["adapted_nats"] for old in again), math.fsum(d.adapted_nats for d in found.documents)
        total = f", {(said - here) / max(abs(here), 1.0):+.2g} in all" * bool(differs)
        says = f"{len(again):,} documents are what they were, {how}: at most {worst:.2g} apart{total}"
        return Check("recomputed", True, says)
    return Check("recomputed", False, f"{where}; wanted: {how}")


def _targets(
    again: Sequence[Mapping[str, Any]], found: ScoreResult, nll: Sequence[np.ndarray], allowed: float
) -> Check:
    """Whether the targets' NLLs are what they were."""
    worst, where = 0.0, ""
    for old, new, before in zip(again, found.nll, nll, strict=True):
        apart = np.abs(before - new) / np.maximum(new, 1.0)
        if len(apart) and apart.max() > worst:
            worst, where = float(apart.max()), f"target {int(apart.argmax()) + 1} of {old['name']!r}"
    limit = 100 * allowed  # one target's rounding is more than that of a sum
    fits = worst <= limit
    return Check(
        "targets",
        fits,
        f"each target's NLL is what it was: at most {worst:.2g} apart {where}"
        if fits
        else f"{where} is {worst:.2g} apart; allowed: {limit:g}",
    )
