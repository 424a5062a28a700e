"""What a run came to, in one plain sentence."""

import math
import statistics
from collections.abc import Sequence

from secateur.outcome import Record
from secateur.report import figures
from secateur.report.compare import (
    WHOLE,
    Point,
    asked,
    dense,
    half_width,
    metric,
    points,
    quality_of,
    shown,
    shrank,
    speed_up,
)

MISSED = 0.01  # further from the sparsity asked for than this, a sentence says so


def summary(record: Record) -> str:
    """What was removed, what happened to the quality, and whether the model is really smaller or faster."""
    return f"{_removed(record)}; {_quality(record)}; {_cost(record)}."


def headline(records: Sequence[Record]) -> str:
    """The sentence of one run, or for several which method did best at the middle sparsity, and how surely."""
    found = points(records)
    if len(found) == 1 and len(found[0].records) == 1:
        return summary(found[0].records[0])
    record = records[0]
    name, model = metric(record) or "quality", record.model.get("name") or "the model"
    everywhere = shown(found)
    at = [p for p in everywhere if not p.control] or everywhere
    fell_short = [p for p in at if p.asked and p.reached < p.asked / 2]  # to rank what hardly removed would mislead
    at = [p for p in at if p not in fell_short] or at
    ranked = sorted((p for p in at if p.quality is not None), key=lambda p: _rank(record, p))
    spread = f"{len(records)} runs of {len(at)} method{'s' * (len(at) > 1)} on {model}"
    if not ranked:
        return f"{spread}: {name} was not measured."
    best = ranked[0]
    alike = len({round(p.position, 9) for p in at}) == 1
    start = f"{'At' if alike else 'Near'} {figures.percent(best.position)} sparsity of {model}, "
    task = f" on {record.task['name']}" if record.task.get("name") else ""
    whole = dense(records)
    against = "" if whole is None else f" (dense: {figures.quality(whole)})"
    if not _finite(best):
        return f"{start}every method diverged{task}{against}."
    seeds = f" over {len(best.records)} seeds" if len(best.records) > 1 else " with one seed"
    told = f"{figures.interval(best.quality, best.half)}{seeds}{against}"
    if len(ranked) == 1:
        return f"{start}{best.series} reaches {name}{task} {told}."
    if len({figures.quality(p.quality) for p in ranked}) == 1:
        return f"{start}all {len(ranked)} methods have the same {name}{task}, {told}."
    lead, trail = ("highest", "lowest") if record.task.get("higher_is_better") else ("lowest", "highest")
    second, worst = ranked[1], ranked[-1]
    close = [p.series for p in ranked[1:] if _finite(p) and _overlap(best, p, name == "perplexity")]
    if close:
        sure = f"; its interval overlaps with that of {_join(close)}, so these seeds do not tell them apart"
    elif _finite(second) and (best.half is None or second.half is None):
        sure = "; without more seeds it is not known whether the order would hold"
    else:
        sure = ""
    if _finite(worst):
        last = f"{worst.series} has the {trail}, {figures.interval(worst.quality, worst.half)}"
    else:
        last = f"{worst.series} diverged"
    missed = [
        p
        for p in [*ranked, *(p for p in fell_short if p not in ranked)]
        if p.asked is not None and abs(p.reached - p.asked) > MISSED
    ]
    if missed:
        sure += f"; {_join([f'{p.series} removed {figures.percent(p.reached)} instead' for p in missed])}"
    sure += "".join(f"; {_beside(p)}" for p in everywhere if p.control and p not in at)
    return f"{start}{best.series} has the {lead} {name}{task} of {len(ranked)} methods, {told}, and {last}{sure}."


def _beside(control: Point) -> str:
    """What a model from which nothing was removed comes to."""
    size = control.mean(lambda of: of.after.stored_bytes)
    whole = control.records[0].ledger.before.stored_bytes
    held = "" if size is None else f" in {figures.size(size)}"
    held += f" instead of {figures.size(whole)}" if held and whole is not None else ""
    return f"{control.series} removes nothing and comes to {figures.quality(control.quality)}{held}"


def _finite(point: Point) -> bool:
    return point.quality is not None and math.isfinite(point.quality)


def _rank(record: Record, point: Point) -> float:
    if not _finite(point) or point.quality is None:
        return math.inf
    return -point.quality if record.task.get("higher_is_better") else point.quality


def _overlap(one: Point, other: Point, ratios: bool) -> bool:
    """Whether the intervals of two methods meet: of logarithms where the quality is one of ratios, as perplexity is."""
    scale = math.log if ratios and min([*one.qualities, *other.qualities], default=0) > 0 else float
    first, second = ([scale(q) for q in point.qualities] for point in (one, other))
    halves = half_width(first), half_width(second)
    if halves[0] is None or halves[1] is None:
        return False
    return abs(statistics.fmean(first) - statistics.fmean(second)) <= halves[0] + halves[1]


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _removed(record: Record) -> str:
    ledger, model = record.ledger, record.model.get("name") or "the model"
    if not ledger.prunable:
        return _changed(record, model)
    target = asked(record.settings)
    missed = target is not None and abs(ledger.sparsity - target) > MISSED
    instead = f" ({figures.percent(target)} was asked for)" if missed else ""
    weights = f"the {figures.count(ledger.prunable)} prunable weights of {model}"
    if ledger.of == "units":
        kinds = sorted({f"{row.kind}s" if row.kind != "stream" else "residual directions" for row in record.sites})
        units = f"{figures.percent(ledger.sparsity)}{instead} of the {' and '.join(kinds)}"
        return f"{record.method} removed {units}, with them {figures.percent(ledger.share)} of {weights}"
    if ledger.whole_of(ledger.of) is not None:
        off = f"{figures.percent(ledger.sparsity)}{instead} off the {WHOLE[ledger.of]} of {model}"
        of = weights.removesuffix(f" of {model}")
        return f"{record.method} took {off}, and with it {figures.percent(ledger.share)} of {of}"
    return f"{record.method} removed {figures.percent(ledger.sparsity)}{instead} of {weights}"


def _changed(record: Record, model: str) -> str:
    """Of a run that had nothing to remove, such as a recovery: what it did instead."""
    changed, zeros = record.edits.get("Update", 0), record.ledger.before.zeros
    if not changed:
        return f"{record.method} ran on {model} and removed nothing"
    kept = f" and kept {figures.count(zeros)} zeros" if 0 < zeros <= record.ledger.after.zeros else ""
    return f"{record.method} removed nothing from {model}: it changed {figures.count(changed)} tensors{kept}"


def _quality(record: Record) -> str:
    name = metric(record) or "quality"
    before, after = quality_of(record, "before"), quality_of(record, "after")
    if after is None:
        return f"{name} was not measured"
    task = f" on {record.task['name']}" if record.task.get("name") else ""
    sense = "higher" if record.task.get("higher_is_better") else "lower"
    if not math.isfinite(after):
        since = "" if before is None else f" from {figures.quality(before)}"
        return f"{name}{task} diverged{since}: it is no longer a finite number"
    if before is None:
        return f"{name}{task} is {figures.quality(after)} ({sense} is better; the dense model was not measured)"
    return f"{name}{task} went from {figures.quality(before)} to {figures.quality(after)} ({sense} is better)"


def _cost(record: Record) -> str:
    ledger = record.ledger
    before, after = ledger.before, ledger.after
    saved = "" if after.stored_bytes is None else f", and its saved weights take {figures.size(after.stored_bytes)}"
    if after.stored_bytes is not None and before.stored_bytes is not None:
        saved += f" instead of {figures.size(before.stored_bytes)}"
    if before.memory_bytes == after.memory_bytes and not shrank(ledger):
        # Zeros in a dense tensor are stored and multiplied like any other number.
        zeros = ", its zeros being stored as numbers" if after.zeros > before.zeros else ""
        return f"the model takes as much memory and work as before{zeros}{saved}"
    faster = speed_up(ledger)
    if faster is not None and ledger.timing_before is not None and ledger.timing_after is not None:
        first, second = ledger.timing_before.milliseconds, ledger.timing_after.milliseconds
        saved += f"; a forward pass took {figures.quality(second)} ms instead of {figures.quality(first)} ms"
    if before.memory_bytes != after.memory_bytes:
        held = f"{figures.size(after.memory_bytes)} in memory instead of {figures.size(before.memory_bytes)}"
        return f"the model takes {held}{saved}"
    if before.flops and after.flops is not None and after.flops < before.flops:
        less = figures.percent(1 - after.flops / before.flops)
        return f"a forward pass takes {less} less work, in as much memory{saved}"
    return f"the model has {figures.count(before.parameters - after.parameters)} parameters fewer{saved}"
