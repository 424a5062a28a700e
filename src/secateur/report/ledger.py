"""The ledger in words: zeros, parameters, bytes, work and time as lines of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.outcome import Exported, Record, Timing
from secateur.report import figures
from secateur.report.compare import WHOLE, shrank, speed_up


@dataclass(frozen=True)
class Line:
    """One line of the ledger, before and after."""

    name: str
    before: str
    after: str
    change: str = ""
    how: str = ""  # how it was counted


def lines(record: Record) -> list[Line]:
    """What a run cost, each kind of cost by itself."""
    ledger = record.ledger
    before, after = ledger.before, ledger.after
    return [
        *_target(record),
        Line("weights removed", "0", figures.count(ledger.removed), f"{figures.percent(ledger.share)} sparsity",
             f"of the {figures.count(ledger.prunable)} weights in the sites that could have been cut"),
        Line("parameters", figures.count(before.parameters), figures.count(after.parameters),
             change(before.parameters, after.parameters), "elements of all parameters, tied ones once"),
        Line("zeros among them", figures.count(before.zeros), figures.count(after.zeros), "",
             "elements that are exactly zero; they save nothing by themselves"),
        Line("bytes in memory", figures.size(before.memory_bytes), figures.size(after.memory_bytes),
             change(before.memory_bytes, after.memory_bytes), "of all parameters and buffers, zeros included"),
        Line("stored bytes", figures.size(before.stored_bytes), figures.size(after.stored_bytes),
             change(before.stored_bytes, after.stored_bytes), "of the weights in a file, saved or as it would be"),
        *(Line(f"bytes as {made.target}", figures.size(made.dense_bytes), figures.size(made.bytes),
               change(made.dense_bytes, made.bytes), _how_tried(made)) for made in record.exports),
        Line("work per forward pass", figures.work(before.flops), figures.work(after.flops),
             change(before.flops, after.flops), "counted as if dense, over the task's example"),
        Line("time per forward pass", _time(ledger.timing_before), _time(ledger.timing_after), _faster(record),
             _how_timed(ledger.timing_after or ledger.timing_before)),
    ]  # fmt: skip


def _target(record: Record) -> list[Line]:
    """What was asked for and what was reached, where that is of the whole model."""
    ledger, wanted = record.ledger, record.settings.get("sparsity")
    if not isinstance(wanted, float) or ledger.whole_of(ledger.of) is None:
        return []
    of = WHOLE[ledger.of]
    reached = f"{figures.percent(ledger.sparsity)} reached"
    return [Line(f"sparsity of the {of}", f"{figures.percent(wanted)} asked", reached, "", "of the whole model")]


def ways(found: Sequence[Record]) -> dict[str, str]:
    """How each line was counted, for several runs."""
    told: dict[str, list[str]] = {}
    for record in found:
        for line in lines(record):
            if line.how and line.how not in told.setdefault(line.name, []):
                told[line.name].append(line.how)
    return {name: "; or ".join(hows) for name, hows in told.items() if hows}


def change(before: float | None, after: float | None) -> str:
    """How much less or more there is, as a percentage; empty when not known."""
    if not before or after is None:
        return ""
    if before == after:
        return "the same"
    less = figures.percent(abs(before - after) / before)
    return f"{less} {'less' if after < before else 'more'}"


def _how_tried(made: Exported) -> str:
    whole = f"all of its files, beside each number of the pruned model written out in {made.dtype}"
    if made.difference is None:
        return f"{whole}; not tried in a run-time"
    return f"{whole}; {made.runtime} answers alike (difference {made.difference:.2g})"


def _time(timing: Timing | None) -> str:
    if timing is None:
        return figures.ABSENT
    shown = figures.quality(timing.milliseconds)
    decimals = len(shown.partition(".")[2])
    return f"{shown} ms (spread {timing.spread:,.{decimals}f} ms)"


def _faster(record: Record) -> str:
    ledger = record.ledger
    if ledger.timing_before is None or ledger.timing_after is None:
        return ""
    if not shrank(ledger):
        zeros = ledger.after.zeros > ledger.before.zeros
        return "no speed-up: zeros are multiplied too" if zeros else "no speed-up: the model is no smaller"
    faster = speed_up(ledger)
    return "no speed-up beyond the spread" if faster is None else f"{faster:.2f} times as fast"


def _how_timed(timing: Timing | None) -> str:
    if timing is None:
        return ""
    compiled = ", compiled" if timing.compiled else ""
    return (
        f"median of {timing.repeats} repeats, both models in turn; batch {timing.batch}, "
        f"{timing.threads} thread{'s' * (timing.threads != 1)}, {timing.dtype}{compiled}; "
        "spread: between the quartiles"
    )
