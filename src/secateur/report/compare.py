"""Runs side by side: which of them may be compared, and what they say together.

Runs of one method that differ in nothing but the seed are one operating point; points that differ in nothing but
the sparsity are one series, a line of the chart.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import SettingError, TaskError
from secateur.method import load
from secateur.outcome import Ledger, Record

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom, where the expansion below is too coarse.
_T95 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
        2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
        2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272)  # fmt: skip


def t95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t for one degree of freedom or more.

    Beyond 30 degrees by the expansion in 1/freedom (Abramowitz and Stegun 1964, 26.7.5).
    """
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % t-interval of a mean; None for fewer than two values or one not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


WHOLE = {
    "parameters": "parameters",
    "flops": "work per forward pass",
    "bytes": "bytes in memory",
    "latency": "time per forward pass",
}
"""What a sparsity of the whole model is off."""

COMPUTE = "training compute"  # the curve of operations spent in training up to a step, zeros counted as free
DENSITY = "density of "  # begins the name of the curve of a site's density over training
EXPLORED = "explored"  # the curve of the fraction of the weights that were ever there, a point an update


def at_step(curve: Sequence[tuple[int, float]], moment: int) -> float:
    """The value of a curve that stays as it is until its next point; all there before its first."""
    return next((value for step, value in reversed(curve) if step <= moment), 1.0)


def asked(settings: dict[str, Any]) -> float | None:
    """The sparsity a run was asked for; None without a target.

    Links of a chain compose, 1 - (1 - s1)(1 - s2)...; a mask counts what is zero by then, so of several the largest.
    """
    if isinstance(links := settings.get("methods"), list):
        each = [(_masks(link), asked(link)) for link in links if isinstance(link, dict)]
        known = [(masks, s) for masks, s in each if s is not None]
        masked = max((s for masks, s in known if masks), default=0.0)
        left = (1 - masked) * math.prod(1 - s for masks, s in known if not masks)
        return 1 - left if known and len(known) == len(each) else None
    found = settings.get("sparsity")
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _masks(link: dict[str, Any]) -> bool:
    """Whether a link of a chain zeroes single weights or blocks of them: see `composed`."""
    try:
        return set(load(str(link.get("method"))).card.granularity) <= {"weight", "block"}
    except SettingError:
        return False


def metric(record: Record) -> str:
    """The name of the value that is the quality."""
    return str(record.task.get("metric") or "")


def quality_of(record: Record, when: str) -> float | None:
    """The quality before or after; None when it was not measured."""
    return record.measured(when).get(metric(record))


def shrank(ledger: Ledger) -> bool:
    """Whether the model itself is smaller, and not only zero in places."""
    before, after = ledger.before, ledger.after
    fewer = before.flops is not None and after.flops is not None and after.flops < before.flops
    return after.parameters < before.parameters or after.memory_bytes < before.memory_bytes or fewer


def speed_up(ledger: Ledger) -> float | None:
    """How many times faster a forward pass was; None where that must not be claimed.

    Not for a masked dense model, whose zeros are multiplied like any other weights; not for timings taken
    differently; not when the difference is within the spread of the repeats.
    """
    first, second = ledger.timing_before, ledger.timing_after
    if first is None or second is None or not shrank(ledger) or second.milliseconds <= 0:
        return None
    if (first.batch, first.threads, first.compiled) != (second.batch, second.threads, second.compiled):
        return None
    if first.milliseconds - second.milliseconds <= max(first.spread, second.spread):
        return None
    return first.milliseconds / second.milliseconds


@dataclass(frozen=True)
class Point:
    """One operating point: runs of one method that differ in nothing but the seed."""

    series: str  # the method, with the settings that tell it from others of its name
    asked: float | None  # sparsity
    records: tuple[Record, ...]  # one per seed

    @property
    def reached(self) -> float:
        """Sparsity, averaged over the seeds."""
        return statistics.fmean(r.ledger.sparsity for r in self.records)

    @property
    def position(self) -> float:
        """Where it stands on the axis of sparsity: as asked, or as reached where there was no target."""
        return self.reached if self.asked is None else self.asked

    @property
    def control(self) -> bool:
        """Whether nothing was to be removed, and nothing was: weights in fewer bits, to compare with."""
        return self.asked is None and self.reached == 0

    @property
    def qualities(self) -> list[float]:
        """The quality after, of each seed that was measured."""
        return [q for r in self.records if (q := quality_of(r, "after")) is not None]

    @property
    def diverged(self) -> int:
        """How many seeds ended in a quality that is not finite."""
        return sum(not math.isfinite(q) for q in self.qualities)

    @property
    def quality(self) -> float | None:
        """The mean over the seeds; infinite when one diverged, for a mean over the lucky ones would mislead."""
        if not self.qualities:
            return None
        return math.inf if self.diverged else statistics.fmean(self.qualities)

    @property
    def half(self) -> float | None:
        """Half the width of the 95 % interval of the quality."""
        return half_width(self.qualities)

    def mean(self, of: Callable[[Ledger], float | None]) -> float | None:
        """The mean of a line of the ledger over the seeds; None unless every seed has it."""
        found = [of(r.ledger) for r in self.records]
        known = [v for v in found if v is not None]
        return statistics.fmean(known) if known and len(known) == len(found) else None


def points(records: Sequence[Record]) -> list[Point]:
    """The operating points of comparable runs: series in the order met, each by sparsity.

    Of runs equal in everything, the seed too, the newest counts: repeating a seed makes no interval narrower.
    Raises SettingError for no records, TaskError for runs that cannot be compared.
    """
    check_comparable(records)
    labels = _labels(records)
    grouped: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        key = (labels[_variant(record)], _canonical({k: v for k, v in record.settings.items() if k != "seed"}))
        seeds = grouped.setdefault(key, {})
        seed = _canonical([record.task.get("seed"), record.settings.get("seed")])
        if seed not in seeds or seeds[seed].created <= record.created:
            seeds[seed] = record
    order = list(dict.fromkeys(labels[_variant(r)] for r in records))
    found = [
        Point(series, asked(next(iter(seeds.values())).settings), tuple(seeds[s] for s in sorted(seeds)))
        for (series, _), seeds in grouped.items()
    ]
    return sorted(found, key=lambda p: (order.index(p.series), p.position))


def series(found: Iterable[Point]) -> list[str]:
    """The names of the series, in order."""
    return list(dict.fromkeys(p.series for p in found))


def shown(found: Sequence[Point]) -> list[Point]:
    """One point per series, all as near as can be to the middle sparsity: for what is drawn run by run.

    Controls that remove nothing have no say in which that is.
    """
    every = sorted({p.position for p in found if not p.control}) or [0.0]
    middle = every[(len(every) - 1) // 2]
    return [min((p for p in found if p.series == s), key=lambda p: abs(p.position - middle)) for s in series(found)]


def dense(records: Sequence[Record]) -> float | None:
    """The quality before pruning, averaged over the models pruned; None when not measured."""
    found: dict[str, float] = {}
    for place, record in enumerate(records):
        before = quality_of(record, "before")
        if before is not None:
            found[str(record.model.get("fingerprint") or place)] = before
    return statistics.fmean(found.values()) if found else None


def compare_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per method and sparsity, numbers as they are; None is "not measured", infinite quality "diverged".

    Keys: method, asked, reached (sparsities), seeds, metric, quality (mean over the seeds), half_width (of its 95 %
    t-interval), diverged (seeds), dense (quality before), zeros, parameters, memory_bytes, stored_bytes, flops,
    flips (share of the top answers that changed), milliseconds, milliseconds_dense (timed in turn with it). Raises
    SettingError for no records, TaskError for runs that cannot be compared.
    """
    return [
        {
            "method": p.series,
            "asked": p.asked,
            "reached": p.reached,
            "seeds": len(p.records),
            "metric": metric(p.records[0]),
            "quality": p.quality,
            "half_width": p.half,
            "diverged": p.diverged,
            "dense": dense(p.records),
            "zeros": p.mean(lambda of: of.after.zeros),
            "parameters": p.mean(lambda of: of.after.parameters),
            "memory_bytes": p.mean(lambda of: of.after.memory_bytes),
            "stored_bytes": p.mean(lambda of: of.after.stored_bytes),
            "flops": p.mean(lambda of: of.after.flops),
            "flips": flips(p),
            "milliseconds": p.mean(lambda of: of.timing_after.milliseconds if of.timing_after else None),
            "milliseconds_dense": p.mean(lambda of: of.timing_before.milliseconds if of.timing_before else None),
        }
        for p in points(records)
    ]


def flips(point: Point) -> float | None:
    """The share of top answers that changed, averaged over the seeds; None unless every seed was looked at."""
    found = [r.damage.flips for r in point.records if r.damage is not None]
    return statistics.fmean(found) if found and len(found) == len(point.records) else None


def zero_shot_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for the dense model and one per method and sparsity: what they answer to multiple-choice questions.

    Keys: method, asked, tasks (name with its metric -> (accuracy, half of its 95 % interval)). The metric is acc_norm
    where the harness reports it, and acc elsewhere. The interval is over the seeds, or for one seed over the
    questions. Empty when no questions were asked.
    """
    found = points(records)
    rows: list[dict[str, Any]] = [{"method": "dense", "asked": None, "tasks": _answered(records, "before")}]
    rows += [{"method": p.series, "asked": p.asked, "tasks": _answered(p.records, "after")} for p in found]
    return rows if any(row["tasks"] for row in rows) else []


def _answered(records: Sequence[Record], when: str) -> dict[str, tuple[float, float | None]]:
    measured = [
        {k: v for m in r.measurements if m.when == when and m.split == "zero-shot" for k, v in m.values.items()}
        for r in records
    ]
    found: dict[str, tuple[float, float | None]] = {}
    for name in dict.fromkeys(key.rpartition(" ")[0] for values in measured for key in values):
        metric = f"{name} acc_norm" if any(f"{name} acc_norm" in values for values in measured) else f"{name} acc"
        each = [values[metric] for values in measured if metric in values]
        half = half_width(each)
        if half is None or len(set(each)) == 1:  # one seed, or a model that is the same for all
            error = next(values.get(f"{metric}_stderr") for values in measured if metric in values)
            half = None if error is None or not math.isfinite(error) else 1.96 * error
        found[metric] = statistics.fmean(each), half
    return found


def check_comparable(records: Sequence[Record]) -> None:
    """Raise SettingError for no records, and TaskError for runs of different tasks, models or splits."""
    if not records:
        raise SettingError("a report was asked for", "there are no run records", "Give the record of one run at least.")
    first = records[0]
    for record in records[1:]:
        for what, one, other in (
            ("tasks", first.task.get("name"), record.task.get("name")),
            ("metrics", metric(first), metric(record)),
            ("models", first.model.get("name"), record.model.get("name")),
        ):
            if one != other:
                raise TaskError(
                    f"{len(records)} runs were to be compared",
                    f"they are of different {what}: {one!r} and {other!r}",
                    "Make one report for each.",
                )
    # A fingerprint may depend on the seed, so data is held equal among runs of one seed.
    data: dict[str, str] = {}
    for record in records:
        seed, mark = str(record.task.get("seed")), str(record.task.get("fingerprint") or "")
        if mark and data.setdefault(seed, mark) != mark:
            raise TaskError(
                f"{len(records)} runs of {first.task.get('name')!r} were to be compared",
                f"those of seed {seed} did not see the same data or settings: {data[seed]} and {mark}",
                "Run them again on one task, or make one report for each.",
            )
    splits = sorted({m.split for r in records for m in r.measurements if metric(r) in m.values})
    if len(records) > 1 and len(splits) > 1:
        raise TaskError(
            f"{len(records)} runs were to be compared",
            f"their {metric(first)} was measured on different splits: {', '.join(splits)}",
            "Measure them on one split.",
        )


def _canonical(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _without_sparsity(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {k: _without_sparsity(v) for k, v in settings.items() if k not in ("sparsity", "seed")}
    return [_without_sparsity(v) for v in settings] if isinstance(settings, list) else settings


def _variant(record: Record) -> tuple[str, str]:
    # A method without a target is one series whatever its settings: they are what moves it along the axis.
    targeted = asked(record.settings) is not None
    return record.method, _canonical(_without_sparsity(record.settings)) if targeted else ""


def _labels(records: Sequence[Record]) -> dict[tuple[str, str], str]:
    """A name for every series: the method, and in brackets the settings that vary where it is there twice."""
    variants = {_variant(r): _without_sparsity(r.settings) for r in records}
    labels: dict[tuple[str, str], str] = {}
    for (method, key), own in variants.items():
        others = [v for (m, _), v in variants.items() if m == method]
        varying = [k for k in own if any(v.get(k) != own[k] for v in others)] if key else []
        told = ", ".join(f"{k}={own[k]}" for k in varying)
        label = f"{method} ({told})" if told else method
        label = label if len(label) <= 60 else label[:57] + "..."
        taken = sum(have == label or have.startswith(label + " #") for have in labels.values())
        labels[method, key] = f"{label} #{taken + 1}" if taken else label
    return labels
