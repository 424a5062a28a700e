"""What the ten lessons of sparse networks say to runs side by side (`secateur.studies.ten_lessons`)."""

from collections.abc import Sequence
from statistics import fmean

from secateur.errors import SettingError
from secateur.method import Card, load
from secateur.outcome import Record
from secateur.report.compare import (
    COMPUTE,
    DENSITY,
    EXPLORED,
    WHOLE,
    Point,
    asked,
    at_step,
    dense,
    metric,
    points,
    shrank,
    speed_up,
)
from secateur.studies.ten_lessons import Execution, Finding, Origin, Passport, lint
from secateur.tasks.robustness import CALIBRATION, NOISY

OF = {"weights": "prunable weights", "units": "units", **WHOLE}
"""What a sparsity is a fraction of, in words."""


def findings(records: Sequence[Record]) -> list[Finding]:
    """What the lessons say to a comparison, the gravest first; nothing to a single run.

    Raises SettingError for no records, TaskError for runs that cannot be compared.
    """
    found = points(records)
    if len(found) < 2:
        return []
    before = [r.measured("before")[NOISY] for r in records if NOISY in r.measured("before")]
    higher, seen = bool(records[0].task.get("higher_is_better")), [passport(p) for p in found]
    whole = next((p for p in seen if p.origin == "dense" and p.asked == 0), None)  # trained as long as the others
    quality, noisy = dense(records), _mean(before)
    if whole is not None:
        quality, noisy = whole.quality if quality is None else quality, whole.noisy if noisy is None else noisy
    comparable = metric(records[0]) == "accuracy"  # with what noise leaves of it
    return lint(seen, quality, higher, dense_noisy=noisy if comparable else None)


def passport(point: Point) -> Passport:
    """What an operating point says of itself, over its seeds."""
    first = point.records[0]
    when = _when(first.method)
    curve = _density(first)
    spent = [r.curves[COMPUTE][-1] for r in point.records if r.curves.get(COMPUTE)]
    seen = [r.curves[EXPLORED] for r in point.records if r.curves.get(EXPLORED)]
    return Passport(
        name=point.series,
        method=first.method,
        asked=point.asked,
        sparsity=point.reached,
        denominator=OF.get(first.ledger.of, first.ledger.of),
        origin=_origin(first, when, curve),
        when=when,
        pattern=frozenset(row.kind for r in point.records for row in r.sites),
        execution=_execution(first),
        seeds=len(point.records),
        quality=point.quality,
        half=point.half,
        parameters=point.mean(lambda of: of.after.parameters - of.after.zeros) or 0.0,
        flops=point.mean(lambda of: of.after.flops),
        faster=all(speed_up(r.ledger) is not None for r in point.records),
        steps=max((step for step, _ in spent), default=None),
        compute=_mean([operations for _, operations in spent]),
        mean_density=fmean(curve) if curve else None,
        peak_density=max(curve) if curve else None,
        updates=max(map(len, seen), default=None),
        noisy=_after(point, NOISY),
        calibration=_after(point, CALIBRATION),
        explored=_mean([curve[-1][1] for curve in seen]),
    )


def _after(point: Point, name: str) -> float | None:
    return _mean([v for r in point.records if (v := r.measured("after").get(name)) is not None])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _when(method: str) -> str:
    """The moment of a method, of a chain the first link's; of one that is not the library's, after training."""
    card = _card(method)
    return card.when if card is not None else "before training" if method == "dense" else "after training"


def _card(method: str) -> Card | None:
    """The card of a method, of a chain the first link's; None for one that is not the library's."""
    try:
        return load(method.split("+")[0]).card
    except SettingError:
        return None


def _starts_sparse(card: Card | None) -> bool:
    """Whether a method has no dense phase; one that can also start dense, as GraNet, is told by its curve alone."""
    return card is not None and card.stage == ("sparse to sparse",)


def _density(record: Record) -> list[float]:
    """The fraction of the masked weights that was there at each step of training, as far as it was logged."""
    logged = {name.removeprefix(DENSITY): c for name, c in record.curves.items() if name.startswith(DENSITY) and c}
    spent = record.curves.get(COMPUTE, [])
    if not logged or not spent:
        return []
    sizes = {row.site: row.weights for row in record.sites}
    weights = {name: float(sizes.get(name, 1)) for name in logged}
    total, steps = sum(weights.values()), spent[-1][0]
    moments = [round(steps * i / 50) for i in range(51)]
    return [sum(weights[name] * at_step(curve, moment) for name, curve in logged.items()) / total for moment in moments]


def _origin(record: Record, when: str, curve: Sequence[float]) -> Origin:
    if record.method == "dense" or not (record.ledger.removed or asked(record.settings)):
        return "dense"
    if curve:
        return "sparse-to-sparse" if curve[0] <= 1.1 * curve[-1] else "dense-to-sparse"
    if when == "before training" or (_starts_sparse(_card(record.method)) and not record.settings.get("pretrain")):
        return "sparse-to-sparse"
    return "dense-to-sparse" if when in ("during training", "around training") else "post-training"


def _execution(record: Record) -> Execution:
    if any(made.target == "sparse" for made in record.exports):
        return "packed"
    if shrank(record.ledger):
        return "smaller"
    return "masked" if record.ledger.removed else "dense"
