"""Whether two lists of numbers rise and fall together."""

from collections.abc import Sequence
from statistics import fmean


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, in [-1, 1]; 0 where one of the lists is the same throughout."""
    return _correlation(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, the mean rank for ties."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) + 1) / 2 for v in values]


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    ma, mb = fmean(a), fmean(b)
    over = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    under = (sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b)) ** 0.5
    return over / under if under else 0.0
