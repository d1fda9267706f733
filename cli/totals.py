"""What `klora score` says of a result: its totals as a table, and notes on what to know of them."""

from ..ttt.protocols import LEAK_WARNING, ORIGINAL, TTTConfig, label
from ..ttt.results import SHORT, ScoreResult
from .console import Output


def say_totals(result: ScoreResult, output: Output) -> None:
    """The bits per byte and the seconds of each phase, as a table."""
    totals, mark = result.totals(), " LEAKY" if result.config.is_leaky else ""
    mark += "".join(f" ({note})" for note in (result.phases_note, result.deadline_note) if note)
    names = {
        "prequant_bpb": "before quantisation",
        "base_bpb": "base model" if "hf" in result.facts else "after quantisation",
        "adapted_bpb": f"adapted, {label(result.config.protocol)}",
    }
    rows = [
        (name, f"{totals[key]:.4f} bits per byte{mark if key == 'adapted_bpb' else ''}")
        for key, name in names.items()
        if totals[key] is not None
    ]
    statuses = ", ".join(f"{count:,} {status}" for status, count in totals["by_status"].items())
    rows.append(
        ("documents", f"{totals['documents']:,} ({statuses}), {totals['tokens']:,} tokens, {totals['bytes']:,} bytes")
    )
    rows.append(("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in result.seconds.items())))
    output.table("", rows)
    if result.documents and all(document.status == SHORT for document in result.documents):
        output.say(f"note: no document was adapted: {_why_short(result.config)}", style="bold yellow")
    for note in [*result.notes, *_notes_on_ranks(result)]:
        output.say(f"note: {note}", style="bold yellow")
    if result.deadline_hit:
        output.say(
            f"The deadline of {result.config.deadline:g} s left text to the base model; how much depends on the speed "
            "of this machine. With --deadline 0 all of it is adapted.",
            style="bold yellow",
        )
    if result.config.is_leaky:
        output.say(LEAK_WARNING, style="bold red")


def _notes_on_ranks(result: ScoreResult) -> list[str]:
    """What became of ranks that did not come to the end, which changes no score."""
    became = {"lost_ranks": "were lost, and others took over their documents", "absent_ranks": "never came"}
    ranks = {says: ", ".join(map(str, result.facts.get(name, ()))) for name, says in became.items()}
    return [f"of the ranks, these {says}: {numbers}" for says, numbers in ranks.items() if numbers]


def _why_short(config: TTTConfig) -> str:
    if not config.learns:
        return f"at lr={config.lr:g} no step changes anything, and the score is the base model's"
    if config.layout == ORIGINAL:
        return f"with layout=original and min_tokens={config.min_tokens}, none has so many tokens, BOS counted"
    return (
        f"with chunk={config.chunk} and adapt_from={config.adapt_from}, only what comes after a document's first "
        f"{config.first_adapted:,} targets can be, and none has more"
    )
