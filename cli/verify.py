"""`klora verify`: recompute a share of a stored score."""

from pathlib import Path
from typing import Annotated

import typer

from ..model.artifact import load_artifact
from ..model.config import ConfigError
from ..model.loading import model_from_artifact, tokenizer_of
from ..model.parallel import own_device
from ..model.placement import device_name, processor_name
from ..ttt.audit_report import AuditReport, Check
from ..ttt.documents import facts_of_texts, facts_of_tokens
from ..ttt.hf import hashes_of_folder, require_unchanged
from ..ttt.verify import RELATIVE, Stored, model_of_hf, read_nll, scored_of, which_nll
from ..ttt.verify import verify as verify_stored
from . import options
from .audit import finish
from .console import Output
from .subject import Subject, documents_of, hashes_of, source_of, versions
from .threads import settle_threads


def verify(
    result: Annotated[Path, typer.Argument(help="score.json that `klora score` wrote.")],
    artifact: Annotated[Path | None, typer.Option("--artifact", help="The artifact that was scored.")] = None,
    hf: Annotated[
        Path | None, typer.Option("--hf", metavar="FOLDER", help="The Hugging Face folder that was scored.")
    ] = None,
    text: options.Text = None,
    jsonl: options.Jsonl = None,
    field: options.Field = "text",
    shards: options.Shards = None,
    nll: Annotated[
        Path | None, typer.Option("--nll", metavar="FILE", help="Also compare each target with `klora score --nll`.")
    ] = None,
    share: Annotated[
        float, typer.Option("--share", min=0.0, max=1.0, help="Share of the documents to recompute; at least one is.")
    ] = 0.05,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Draws the documents. Left out: chance, and the report says which it was."),
    ] = None,
    rounding: Annotated[
        float,
        typer.Option(
            "--rounding",
            min=0.0,
            max=1.0,
            help="Share of a document's nats, of one at least, by which they may differ where versions, device, "
            "processor, threads or scorer do. Where none does, they must be the same to the bit.",
        ),
    ] = RELATIVE,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Recompute a random share of a stored score and compare it with what score.json says.

    The documents are those that were scored: all of the source, whether or not a sample was. Files may have other
    names, as a document is known by the hash of its text. Exit status 0 where all is as it says, 1 where it is not.

    Example: klora verify scores/score.json --artifact tiny.klora --jsonl held-out.jsonl
    """
    output = Output(as_json)
    if (artifact is None) == (hf is None):
        raise ConfigError("give what was scored, by --artifact or by --hf, and one of them alone")
    if hf and not (text or jsonl):
        raise ConfigError("--hf was given without --text or --jsonl; give the documents that were scored")
    source = source_of(text, jsonl, field, shards)
    stored = Stored(result)
    kept = read_nll(nll, stored) if nll else None
    of_nll = [which_nll(nll, stored)] if nll else []
    chosen = own_device(device)
    settle_threads(chosen)
    loaded = load_artifact(artifact) if artifact else None
    here = hashes_of(loaded) if loaded else hashes_of_folder(hf)
    same = here == stored.hashes
    says = "header and payload have the hashes of the result" if same else f"{here} is another than {stored.hashes}"
    checks = [Check("artifact", same, says)]
    if same:
        if loaded:
            fits = stored.values["artifact"].get("provenance") == loaded.provenance
            checks.append(Check("provenance", fits, f"it is {'what' if fits else 'another than'} the artifact has"))
            said, size = stored.values["artifact"].get("bytes"), artifact.stat().st_size
            says = f"the artifact has {size:,}" + ("" if said == size else f", and the result says {said!r:.40}")
            checks.append(Check("bytes", said == size, says))
            tokenizer = tokenizer_of(loaded)
            documents = documents_of(source, tokenizer, loaded.provenance)
            model, installed = model_from_artifact(loaded, chosen, stored.weights), versions(chosen)
        else:
            subject = Subject.of_folder(hf, chosen, stored.weights, stored.config)
            require_unchanged(hf, here, subject.hashes)
            checks.append(model_of_hf(stored, subject.facts["hf"]))
            documents = subject.documents(source, output.warn)
            model, installed, tokenizer = subject.model, subject.facts["versions"], subject.tokenizer
        of_bytes = facts_of_tokens(scored_of(stored, documents), tokenizer) if shards else facts_of_texts()
        setting = {"versions": installed, "device": device_name(chosen), "processor": processor_name(chosen)}
        about = {"share": share, "seed": seed, "rounding": rounding, "nll": kept, "of_bytes": of_bytes}
        report = verify_stored(stored, model, documents, setting, **about)
        checks += [*of_nll, *report.checks]
    finish(output, AuditReport(tuple(checks), report.unseen if same else ("everything else",)), {"result": str(result)})
